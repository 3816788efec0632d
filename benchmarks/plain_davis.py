"""DAVIS as one would write it first: a dense affinity of all cells of all context frames, and scores mask by mask.

The propagation follows DINO's evaluation (arXiv 2104.14294), the scores the definitions in Perazzi et al. 2016 and the way
davis2017-evaluation computes them. tests/test_eval_davis.py compares eval_davis.py with it, benchmarks/speed.py times the two.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import Case
from PIL import Image
from plain_extract import plain_lift, plain_map

import eval_davis
from extractor import ViTExtractor
from lift import LiFT, upsample

# ---- propagation ----------------------------------------------------------------------------------------------------


def window(h, w, radius):
    """1 for pairs of cells at most `radius` apart on both axes, 0 for others: [h*w, h*w]."""
    if radius == 0:
        return torch.ones(h * w, h * w)
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    i, j = i.flatten(), j.flatten()
    near = ((i[:, None] - i[None, :]).abs() <= radius) & ((j[:, None] - j[None, :]).abs() <= radius)
    return near.float()


def transfer(target, context, mask, topk):
    """Soft segmentation [n, h, w] of features [C, h, w] from a context of [(features [C, h, w], segmentation [n, h, w])]."""
    _, h, w = target.shape
    target = F.normalize(target.flatten(1).T, dim=1)                                             # [N, C]
    sources = F.normalize(torch.stack([feats.flatten(1) for feats, _ in context]), dim=1)        # [T, C, N]
    affinity = torch.exp(torch.bmm(target[None].repeat(len(context), 1, 1), sources) / 0.1)      # [T, N, N]
    affinity = (affinity * mask).transpose(1, 2).reshape(-1, h * w)                              # [T*N, N], a column per target
    least = torch.topk(affinity, min(topk, len(affinity)), dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(0, keepdim=True)
    votes = torch.stack([segmentation.flatten(1) for _, segmentation in context])                # [T, n, N]
    votes = votes.transpose(1, 2).reshape(-1, votes.shape[1]).T                                  # [n, T*N]
    return (votes @ affinity).reshape(-1, h, w)


def propagate(features, frames, labels, n_last_frames, radius, topk):
    """Soft segmentations [n, h, w] of frames [t, 3, H, W] but the first, whose labels [H, W] are given."""
    first = features(frames[:1])[0]
    h, w = first.shape[1:]
    mask, recent, found = window(h, w, radius), deque(maxlen=n_last_frames), []
    small = np.array(Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST))
    given = torch.stack([torch.from_numpy(small == k).float() for k in range(labels.max() + 1)])
    for frame in frames[1:]:
        feats = features(frame[None])[0]
        segmentation = transfer(feats, [(first, given), *recent], mask, topk)
        recent.append((feats, segmentation))
        found.append(segmentation)
    return found


def harden(segmentation, patch, size):
    """Labels [H, W] at `size` (W, H) of a soft segmentation [n, h, w]."""
    large = F.interpolate(segmentation[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    for channel in large:
        if channel.max() > 0:
            channel -= channel.min()
            channel /= channel.max()
    labels = large.max(0).indices.numpy().astype(np.uint8)
    return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


# ---- scores ---------------------------------------------------------------------------------------------------------


def boundary(mask):
    """Boundary of a mask [H, W] bool, by the definition."""
    edge = np.zeros_like(mask)
    edge[:-1, :-1] = (mask[:-1, :-1] ^ mask[:-1, 1:]) | (mask[:-1, :-1] ^ mask[1:, :-1]) | (mask[:-1, :-1] ^ mask[1:, 1:])
    edge[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    edge[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return edge


def jaccard(mask, truth):
    """Intersection over union of two masks [H, W] bool, 1 if both are empty."""
    union = np.sum(mask | truth)
    return 1.0 if union == 0 else np.sum(mask & truth) / union


def contour(mask, truth):
    """F-measure of the boundaries of two masks [H, W] bool, by the definition."""
    radius = int(np.ceil(0.008 * np.linalg.norm(mask.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    found, wanted = boundary(mask), boundary(truth)
    found_dilated = cv2.dilate(found.astype(np.uint8), disk)
    wanted_dilated = cv2.dilate(wanted.astype(np.uint8), disk)
    if found.sum() == 0 and wanted.sum() > 0:
        precision, recall = 1, 0
    elif found.sum() > 0 and wanted.sum() == 0:
        precision, recall = 0, 1
    elif found.sum() == 0 and wanted.sum() == 0:
        precision, recall = 1, 1
    else:
        precision = np.sum(found * wanted_dilated) / found.sum()
        recall = np.sum(wanted * found_dilated) / wanted.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def decay(values):
    """Mean of the first quarter minus mean of the last."""
    edges = [round(float(edge) + 1e-10) - 1 for edge in np.linspace(1, len(values), 5)]
    return np.mean(values[edges[0] : edges[1] + 1]) - np.mean(values[edges[3] : edges[4] + 1])


def read_stack(paths):
    """Labels [t, H, W] of indexed PNGs, 255 as background."""
    labels = np.stack([np.array(Image.open(path)) for path in paths])
    return np.where(labels == 255, 0, labels)


def score(results, annotations):
    """`score_stack` of lists of PNGs."""
    return score_stack(read_stack(results[1:-1]), read_stack(annotations))


def score_stack(found, truth):
    """(J mean, J recall, J decay, F mean, F recall, F decay) of every object of a video: [objects, 6].

    `truth` is all annotations [t, H, W], `found` the results between the first and the last.
    """
    table = []
    for k in range(1, truth[0].max() + 1):
        masks, truths = found == k, truth[1:-1] == k
        row = []
        for measure in (jaccard, contour):
            values = np.array([measure(a, b) for a, b in zip(masks, truths)])
            row += [values.mean(), np.mean(values > 0.5), decay(values)]
        table.append(row)
    return table


# ---- the cases ------------------------------------------------------------------------------------------------------


def one_frame(patch):
    """A frame of 224 x 224 through ViT-S and LiFT, and its labels from a full context of eight frames."""

    def setup():
        torch.manual_seed(0)
        model = timm.create_model(f"vit_small_patch{patch}_224", num_classes=0)
        extractor = ViTExtractor(f"dino_vits{patch}", model=deepcopy(model), device="cpu")
        lift = LiFT(extractor.width, patch).eval().requires_grad_(False)
        side = 2 * 224 // patch
        image, context = torch.randn(1, 3, 224, 224), random_context(extractor.width, side)
        ready, mask = our_context(context), window(side, side, 12)

        def plain():
            feats = plain_lift(lift, image, plain_map(model, image, 11, "key", patch))
            segmentation = transfer(feats[0], context, mask, 5)
            return harden(segmentation, patch, (854, 480))

        def ours():
            cells = F.normalize(upsample(lift, image, extractor(image)), dim=1)[0].permute(1, 2, 0).contiguous()
            return eval_davis.harden(eval_davis.transfer(cells, ready, 12, 5).permute(2, 0, 1), patch, (854, 480))

        return plain, ours

    return setup


def random_context(width, side):
    """Features [C, h, w] and segmentations [2, h, w] of eight random frames."""
    return [(torch.randn(width, side, side), torch.rand(2, side, side).softmax(0)) for _ in range(8)]


def our_context(context):
    """The same as eval_davis.py keeps it: L2-normalised, channels last."""
    return [
        (F.normalize(feats, dim=0).permute(1, 2, 0).contiguous(), votes.permute(1, 2, 0).contiguous()) for feats, votes in context
    ]


def affinity():
    """The affinity alone, 56 x 56 cells of 384 channels."""
    torch.manual_seed(0)
    context, cells, mask = random_context(384, 56), torch.randn(384, 56, 56), window(56, 56, 12)
    ready, (ours_cells, _) = our_context(context), our_context([(cells, cells)])[0]
    return lambda: transfer(cells, context, mask, 5), lambda: eval_davis.transfer(ours_cells, ready, 12, 5).permute(2, 0, 1)


def scores():
    """J and F of three of the shared videos, masks in memory."""
    shared = Path(os.environ.get("LIFT_SHARED", "../shared")) / "data"
    videos = eval_davis.find_sequences(shared / "DAVIS", ["blackswan", "dog", "libby"], False)
    truths = [read_stack(video.masks) for video in videos]
    founds = [read_stack([shared / "DAVIS_osvos_results" / v.name / path.name for path in v.masks[1:-1]]) for v in videos]

    def score_video(found, truth):
        scores = np.array([eval_davis.score_frame(a, b, truth[0].max()) for a, b in zip(found, truth[1:-1])])
        return [eval_davis.summary(j) + eval_davis.summary(f) for j, f in scores.transpose(1, 2, 0)]

    def ours():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(list(pool.map(score_video, founds, truths)))

    return lambda: np.concatenate(list(map(score_stack, founds, truths))), ours


def same_labels(plain, ours):
    """At least 99.9 % of pixels agree: a cell on the brink may go either way."""
    assert (plain == ours).mean() >= 0.999


CASES = [
    Case("davis: a frame, S/16 + LiFT (28x28)", 1.8, one_frame(16), same_labels),
    Case("davis: a frame, S/8 + LiFT (56x56)", 4.0, one_frame(8), same_labels),
    Case("davis: affinity alone (56x56)", 4.0, affinity, lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=0), 5.0),
    Case("davis: J&F of three videos", 5.0, scores, np.testing.assert_allclose),
]
