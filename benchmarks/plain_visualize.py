"""Self-similarity maps as the reference computes them, and as a user of today would write them.

eval_visualize_feats.py must equal both; `python benchmarks/speed.py visualize` times them.

The reference takes one cosine after another, cell by cell. Today one calls F.cosine_similarity once
for the whole map.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

import eval_visualize_feats


def min_max(values: Tensor) -> Tensor:
    """Scale values to 0..1."""
    return (values - values.min()) / (values.max() - values.min())


def plain_self_similarity(feats: Tensor, row: int, column: int) -> Tensor:
    """Cosine of the cell (row, column) of a map to every cell, min-max normalised.

    Args:
        feats: [C, h, w].
    Returns:
        [h, w] in 0..1.
    """
    _, height, width = feats.shape
    query = feats[:, row, column]
    cosines = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            cosines[i, j] = F.cosine_similarity(query, feats[:, i, j], dim=0)
    return min_max(cosines)


def todays_self_similarity(feats: Tensor, row: int, column: int) -> Tensor:
    """plain_self_similarity in one call."""
    query = feats[:, row, column, None, None]  # [C, 1, 1]
    return min_max(F.cosine_similarity(query, feats, dim=0))


def setup(size: int = 224, channels: int = 384) -> tuple[Callable[[], Tensor], ...]:
    """The reference, ours and today's way, each on the centre cell of one random map.

    The map has the shape of ViT-S/16's after four applications of LiFT to a photo of 224 pixels.
    """
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(channels, size, size, generator=generator)
    row, column = size // 2, size // 2

    def reference() -> Tensor:
        return plain_self_similarity(feats, row, column)

    def ours() -> Tensor:
        return eval_visualize_feats.self_similarity(feats, [(row, column)])[0]

    def today() -> Tensor:
        return todays_self_similarity(feats, row, column)

    return reference, ours, today


def same(baseline: Tensor, ours: Tensor) -> None:
    """Raise AssertionError where they differ by more than rounding."""
    torch.testing.assert_close(ours, baseline, atol=1e-5, rtol=0)


CASES = [Case("visualize: self-similarity, 224x224 cells of 384", 20, setup, same)]
