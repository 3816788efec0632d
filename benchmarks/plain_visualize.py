"""Self-similarity maps as one writes them first: the slow, obvious version that eval_visualize_feats.py must equal.

One cosine after another, cell by cell. `python benchmarks/speed.py visualize` times the two beside each other.
"""

import torch
import torch.nn.functional as F
from case import Case

import eval_visualize_feats


def plain_self_similarity(feats, row, column):
    """Cosine of the cell (row, column) of a map [C, h, w] to every cell, min-max normalised: [h, w] in 0..1."""
    _, h, w = feats.shape
    cosines = torch.zeros(h, w)
    for i in range(h):
        for j in range(w):
            cosines[i, j] = F.cosine_similarity(feats[:, row, column], feats[:, i, j], dim=0)
    return (cosines - cosines.min()) / (cosines.max() - cosines.min())


def setup(size=224, channels=384):
    """The map of ViT-S/16 after LiFT has been applied four times to a photo of 224 pixels: 224x224 cells."""
    feats = torch.randn(channels, size, size, generator=torch.Generator().manual_seed(0))
    centre = (size // 2, size // 2)
    return (
        lambda: plain_self_similarity(feats, *centre),
        lambda: eval_visualize_feats.self_similarity(feats, [centre])[0],
    )


def same(plain, ours):
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


CASES = [Case("visualize: self-similarity, 224x224 cells of 384", 20, setup, same)]
