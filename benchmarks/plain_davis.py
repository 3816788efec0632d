"""DAVIS as its protocol is written, and as one would write it with today's parts.

eval_davis.py must equal both; `python benchmarks/speed.py davis` times them.

The reference is `transfer`, `score_stack` and what they call. It has a dense affinity of all cells
of all context frames, and scores mask by mask. The propagation follows DINO's evaluation (arXiv
2104.14294), the scores the definitions in Perazzi et al. 2016 and the way davis2017-evaluation
computes them.

The version of today is `todays_transfer`. It has one matrix product with the window added to it,
top-k and a gather, and takes exponentials of those that vote only. Its scores are the reference's,
by a pool of threads.

Notation: h w the grid of features, N = h*w cells, C channels, n labels, T context frames.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import Case, shared_data
from PIL import Image
from plain_extract import plain_lift, plain_map, todays_lift, todays_map

import davis_scores
import eval_davis
from extractor import ViTExtractor
from lift import LiFT, upsample

# ---- propagation --------------------------------------------------------------------------------


def window(h, w, radius):
    """1 for pairs of cells at most `radius` apart on both axes, 0 for others: [N, N]."""
    if radius == 0:
        return torch.ones(h * w, h * w)
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    i = i.flatten()
    j = j.flatten()
    near_rows = (i[:, None] - i[None, :]).abs() <= radius
    near_columns = (j[:, None] - j[None, :]).abs() <= radius
    return (near_rows & near_columns).float()


def transfer(target, context, mask, topk):
    """Carry the segmentations of a context over to a frame.

    Args:
        target: features [C, h, w].
        context: pairs of features [C, h, w] and a soft segmentation [n, h, w].
        mask: see `window`.
    Returns:
        Soft segmentation [n, h, w].
    """
    _, h, w = target.shape
    frames = len(context)
    target = F.normalize(target.flatten(1).T, dim=1)                            # [N, C]
    sources = torch.stack([feats.flatten(1) for feats, _ in context])           # [T, C, N]
    sources = F.normalize(sources, dim=1)
    cosine = torch.bmm(target[None].repeat(frames, 1, 1), sources)              # [T, N, N]
    affinity = torch.exp(cosine / 0.1) * mask
    affinity = affinity.transpose(1, 2).reshape(-1, h * w)                      # [T*N, N]

    # each column is a target: what is below its topk-th entry does not vote
    least = torch.topk(affinity, min(topk, len(affinity)), dim=0).values[-1]
    affinity[affinity < least] = 0
    affinity = affinity / affinity.sum(0, keepdim=True)

    votes = torch.stack([segmentation.flatten(1) for _, segmentation in context])  # [T, n, N]
    votes = votes.transpose(1, 2).reshape(-1, votes.shape[1]).T                    # [n, T*N]
    return (votes @ affinity).reshape(-1, h, w)


def todays_transfer(target, context, far, topk):
    """The same with top-k and a gather; the topk cells vote, ties with the last of them do not.

    Args:
        context: pairs as for `transfer`, with L2-normalised features.
        far: -inf for pairs outside the window, 0 for others: [N, N].
    """
    _, h, w = target.shape
    target = F.normalize(target.flatten(1), dim=0)                              # [C, N]
    sources = torch.cat([feats.flatten(1) for feats, _ in context], dim=1)      # [C, T*N]
    votes = torch.cat([segmentation.flatten(1) for _, segmentation in context], dim=1)
    cosine = target.T @ sources                                                 # [N, T*N]
    by_frame = cosine.unflatten(1, (len(context), -1))                          # [N, T, N], a view
    by_frame.add_(far[:, None])  # changes cosine too
    values, indices = cosine.topk(topk)                                         # [N, topk]
    weights = (values / 0.1).softmax(1)
    carried = (votes.T[indices] * weights[..., None]).sum(1)                    # [N, n]
    return carried.T.reshape(-1, h, w)


def propagate(features, frames, labels, n_last_frames, radius, topk):
    """Propagate the labels of the first frame of a video, frame by frame.

    Args:
        features: callable [1, 3, H, W] -> [1, C, h, w].
        frames: [t, 3, H, W].
        labels: of the first frame, [H, W].
    Returns:
        A soft segmentation [n, h, w] of every frame but the first.
    """
    first = features(frames[:1])[0]
    h, w = first.shape[1:]
    mask = window(h, w, radius)
    small = np.array(Image.fromarray(labels).resize((w, h), Image.Resampling.NEAREST))
    channels = []
    for number in range(labels.max() + 1):
        channels.append(torch.from_numpy(small == number).float())
    given = torch.stack(channels)

    recent = deque(maxlen=n_last_frames)
    found = []
    for frame in frames[1:]:
        feats = features(frame[None])[0]
        segmentation = transfer(feats, [(first, given), *recent], mask, topk)
        recent.append((feats, segmentation))
        found.append(segmentation)
    return found


def harden(segmentation, patch, size):
    """Labels [H, W] at `size` (W, H) of a soft segmentation [n, h, w]."""
    large = F.interpolate(
        segmentation[None], scale_factor=patch, mode="bilinear", align_corners=False
    )[0]
    for channel in large:  # views: `large` itself is stretched
        if channel.max() > 0:
            channel -= channel.min()
            channel /= channel.max()
    labels = large.max(0).indices.numpy().astype(np.uint8)
    return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


# ---- scores -------------------------------------------------------------------------------------


def boundary(mask):
    """Boundary of a mask [H, W] bool, by the definition."""
    here = mask[:-1, :-1]
    right = here ^ mask[:-1, 1:]
    lower = here ^ mask[1:, :-1]
    lower_right = here ^ mask[1:, 1:]
    edge = np.zeros_like(mask)
    edge[:-1, :-1] = right | lower | lower_right
    edge[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    edge[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return edge


def jaccard(mask, truth):
    """Intersection over union of two masks [H, W] bool, 1 if both are empty."""
    union = np.sum(mask | truth)
    if union == 0:
        return 1.0
    return np.sum(mask & truth) / union


def contour(mask, truth):
    """F-measure of the boundaries of two masks [H, W] bool, by the definition."""
    radius = int(np.ceil(0.008 * np.linalg.norm(mask.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    found = boundary(mask)
    wanted = boundary(truth)
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
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def decay(values):
    """Mean of the first quarter minus mean of the last."""
    edges = []
    for edge in np.linspace(1, len(values), 5):
        edges.append(round(float(edge) + 1e-10) - 1)
    return np.mean(values[edges[0] : edges[1] + 1]) - np.mean(values[edges[3] : edges[4] + 1])


def read_stack(paths):
    """Labels [t, H, W] of indexed PNGs, 255 as background."""
    labels = np.stack([np.array(Image.open(path)) for path in paths])
    return np.where(labels == 255, 0, labels)


def score(results, annotations):
    """`score_stack` of lists of PNGs."""
    return score_stack(read_stack(results[1:-1]), read_stack(annotations))


def score_stack(found, truth):
    """Score all objects of a video.

    Args:
        found: the results between the first and the last frame, [t - 2, H, W].
        truth: all annotations, [t, H, W].
    Returns:
        A row (J mean, J recall, J decay, F mean, F recall, F decay) for each object.
    """
    rows = []
    for number in range(1, truth[0].max() + 1):
        masks = found == number
        truths = truth[1:-1] == number
        row = []
        for measure in (jaccard, contour):
            values = np.array([measure(mask, true_mask) for mask, true_mask in zip(masks, truths)])
            row += [values.mean(), np.mean(values > 0.5), decay(values)]
        rows.append(row)
    return rows


# ---- the cases ----------------------------------------------------------------------------------


def random_context(count, side):
    """Features [C, h, w] and segmentations [2, h, w] of eight random frames."""
    context = []
    for _ in range(8):
        context.append((torch.randn(count, side, side), torch.rand(2, side, side).softmax(0)))
    return context


def normalized_context(context):
    """The same with L2-normalised features, as whoever keeps a context would store them."""
    normalized = []
    for feats, votes in context:
        normalized.append((F.normalize(feats, dim=0), votes))
    return normalized


def our_context(context):
    """The same as eval_davis.py keeps it: L2-normalised, channels last."""
    ours = []
    for feats, votes in normalized_context(context):
        cells = feats.permute(1, 2, 0).contiguous()
        ours.append((cells, votes.permute(1, 2, 0).contiguous()))
    return ours


def few_frames(patch: int) -> tuple[Callable[[], Any], ...]:
    """Frames of 224 x 224 through ViT-S and LiFT, and their labels from a full context of eight.

    They are as many as eval_davis.py passes through the backbone at once. The version of today does
    so, too; the reference takes one after the other.
    """
    torch.manual_seed(0)
    model = timm.create_model(f"vit_small_patch{patch}_224", num_classes=0)
    extractor = ViTExtractor(f"dino_vits{patch}", patch, model=deepcopy(model), device="cpu")
    lift = LiFT(extractor.channels, patch).eval().requires_grad_(False)
    lift.fold()  # as load_lift does; the baselines do not use what it keeps
    fast_lift = deepcopy(lift).to(memory_format=torch.channels_last)
    images = torch.randn(eval_davis.BATCH, 3, 224, 224)
    side = 2 * 224 // patch
    context = random_context(extractor.channels, side)
    ready = our_context(context)
    todays = normalized_context(context)
    mask = window(side, side, 12)
    far = mask.log()  # 0 inside, -inf outside
    size = (854, 480)

    @torch.no_grad()
    def reference():
        labels = []
        for image in images.split(1):
            feats = plain_lift(lift, image, plain_map(model, image, 11, "key", patch))
            labels.append(harden(transfer(feats[0], context, mask, 5), patch, size))
        return np.stack(labels)

    @torch.inference_mode()
    def ours():
        maps = F.normalize(upsample(lift, images, extractor(images)), dim=1)
        labels = []
        for cells in maps.permute(0, 2, 3, 1).contiguous():
            segmentation = eval_davis.transfer(cells, ready, 12, 5).permute(2, 0, 1)
            labels.append(eval_davis.harden(segmentation, patch, size))
        return np.stack(labels)

    @torch.inference_mode()
    def today():
        labels = []
        for feats in todays_lift(fast_lift, images, todays_map(model, images)):
            labels.append(harden(todays_transfer(feats, todays, far, 5), patch, size))
        return np.stack(labels)

    return reference, ours, today


def affinity() -> tuple[Callable[[], Any], ...]:
    """The transfer of labels alone, without backbone and LiFT: 56 x 56 cells of 384 channels."""
    torch.manual_seed(0)
    context = random_context(384, 56)
    feats = torch.randn(384, 56, 56)
    mask = window(56, 56, 12)
    far = mask.log()
    ready = our_context(context)
    todays = normalized_context(context)
    cells = F.normalize(feats, dim=0).permute(1, 2, 0).contiguous()

    def reference():
        return transfer(feats, context, mask, 5)

    def ours():
        return eval_davis.transfer(cells, ready, 12, 5).permute(2, 0, 1)

    def today():
        return todays_transfer(feats, todays, far, 5)

    return reference, ours, today


def score_video(found, truth):
    """The rows of `score_stack` by the functions of davis_scores.py."""
    scores = []
    for labels, true_labels in zip(found, truth[1:-1]):
        scores.append(davis_scores.score_frame(labels, true_labels, truth[0].max()))
    rows = []
    for j, f in np.array(scores).transpose(1, 2, 0):
        rows.append(davis_scores.summary(j) + davis_scores.summary(f))
    return rows


def scores() -> tuple[Callable[[], Any], ...]:
    """J and F of three of the shared videos, masks in memory.

    Raises:
        FileNotFoundError: the videos are not there.
    """
    davis = shared_data("DAVIS")
    results = shared_data("DAVIS_osvos_results")
    names = ["blackswan", "dog", "libby"]
    truths = []
    founds = []
    for video in eval_davis.find_videos(davis, names, False):
        folder = results / video.name
        truths.append(read_stack(video.masks))
        founds.append(read_stack([folder / path.name for path in video.masks[1:-1]]))

    def reference():
        return np.concatenate(list(map(score_stack, founds, truths)))

    def in_threads(score_one):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(list(pool.map(score_one, founds, truths)))

    return reference, partial(in_threads, score_video), partial(in_threads, score_stack)


def same_labels(baseline, ours):
    """At least 99.9 % of pixels agree: a cell on the brink may go either way."""
    assert (baseline == ours).mean() >= 0.999


def close(baseline, ours):
    """Segmentations agree within 1e-4."""
    torch.testing.assert_close(baseline, ours, atol=1e-4, rtol=0)


CASES = [
    Case("davis: four frames, S/16 + LiFT (28x28)", 1.8, partial(few_frames, 16), same_labels),
    Case("davis: four frames, S/8 + LiFT (56x56)", 4.0, partial(few_frames, 8), same_labels),
    Case("davis: affinity alone (56x56)", 4.0, affinity, close, memory=5.0),
    Case("davis: J&F of three videos", 5.0, scores, np.testing.assert_allclose),
]
