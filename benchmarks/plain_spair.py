"""SPair-71k keypoint matching as one writes it first, and as a user of today would write it.

eval_spair.py must agree with both (tests/test_eval_spair.py) and is timed against them
(`python benchmarks/speed.py spair`).

The reference, `plain_*`: both images of every pair go through the network, become S x S x C maps,
and every keypoint is compared with all pixels.

Of today, `todays_spair`: each image goes through timm's own fused forward once, in batches of as
many as eval_spair.py takes. Descriptors are read at the keypoints of the source alone, and all of a
pair are compared with the pixels of the target in one product.
"""

import json
import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import Case, shared_data
from PIL import Image
from plain_extract import plain_lift, todays_lift, todays_map
from plain_extract import plain_map as plain_keys  # the plain_map below is of pixels
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from eval_spair import Match, default_batch, evaluate, images_of, match_pairs, read_pairs
from extractor import ViTExtractor
from lift import LiFT, upsample

Features = Callable[[Tensor], Tensor]  # images [B, 3, S, S] in 0..1 -> descriptors [B, C, h, w]

# the results of evaluate, and the predicted points [K, 2] of every pair
Scores = tuple[dict[str, Any], list[Tensor]]

# ---- the reference ------------------------------------------------------------------------------


def plain_square(path: Path, size: int) -> tuple[Image.Image, float, tuple[int, int]]:
    """An image on its black square, its scale, and its offset (x, y) there."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = size / max(width, height)
    if width >= height:
        shorter = int(np.around(size * height / width))
        small = image.resize((size, shorter), Image.LANCZOS)
        x = 0
        y = int((size - shorter) / 2)
    else:
        shorter = int(np.around(size * width / height))
        small = image.resize((shorter, size), Image.LANCZOS)
        x = int((size - shorter) / 2)
        y = 0
    square = Image.new("RGB", (size, size))
    square.paste(small, (x, y))
    return square, scale, (x, y)


def plain_map(features: Features, path: Path, size: int) -> tuple[Tensor, float, tuple[int, int]]:
    """Descriptors [C, S, S] of an image on its black square, its scale, and its offset there."""
    square, scale, offset = plain_square(path, size)
    feats = features(to_tensor(square)[None])                                     # [1, C, h, w]
    feats = F.normalize(feats, dim=1)
    pixels = F.interpolate(feats, (size, size), mode="bilinear", align_corners=False)
    return pixels[0], scale, offset


def plain_pair(
    features: Features, path: Path, root: Path, size: int, cosine: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Match one pair.

    Returns:
        In the target's square: the predicted points [K, 2], the annotated points [K, 2], and the
        longer side of the object's box.
    """
    entry = json.loads(path.read_text())
    images = Path(root, "JPEGImages", entry["category"])
    source, source_scale, (source_x, source_y) = plain_map(
        features, images / entry["src_imname"], size
    )
    target, target_scale, (target_x, target_y) = plain_map(
        features, images / entry["trg_imname"], size
    )
    if cosine:
        source = F.normalize(source, dim=0)
        target = F.normalize(target, dim=0)

    predicted = []
    for x, y in entry["src_kps"]:
        column = int(x * source_scale + source_x)
        row = int(y * source_scale + source_y)
        similarity = source[:, row, column] @ target.flatten(1)                   # [S*S]
        best = int(similarity.argmax())
        predicted.append([best % size, best // size])

    truth = []
    for x, y in entry["trg_kps"]:
        truth.append([x * target_scale + target_x, y * target_scale + target_y])

    left, top, right, bottom = entry["trg_bndbox"]
    extent = max(bottom - top, right - left) * target_scale
    return torch.tensor(predicted), torch.tensor(truth), extent


def plain_spair(
    features: Features,
    root: str | Path,
    size: int,
    alphas: tuple[float, ...] = (0.1, 0.05, 0.01),
    cosine: bool = False,
) -> Scores:
    """PCK in percent over all test pairs, and the predictions, category by category."""
    results = {}
    predictions = []
    for category in sorted(os.listdir(Path(root, "JPEGImages"))):
        hits = {alpha: [] for alpha in alphas}
        paths = sorted(Path(root, "PairAnnotation/test").glob(f"*[:_]{category}.json"))
        for path in paths:
            predicted, truth, extent = plain_pair(features, path, Path(root), size, cosine)
            for point, true_point in zip(predicted, truth):
                distance = (point - true_point).norm()
                for alpha in alphas:
                    hits[alpha].append(float(distance < alpha * extent))
            predictions.append(predicted)

        row = {"pairs": len(paths), "keypoints": len(hits[alphas[0]])}
        for alpha in alphas:
            row[f"pck@{alpha}"] = 100 * np.mean(hits[alpha])
        results[category] = row

    mean = {}
    for alpha in alphas:
        key = f"pck@{alpha}"
        mean[key] = np.mean([row[key] for row in results.values()])
    results["mean"] = mean
    return results, predictions


# ---- of today -----------------------------------------------------------------------------------


def todays_describe(
    features: Features, paths: list[Path], size: int
) -> dict[Path, tuple[Tensor, float, Tensor]]:
    """Descriptors [1, C, h, w], scale and offset of every image, which go in batches."""
    described = {}
    batch_size = default_batch(size)
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        squares = [plain_square(path, size) for path in batch]
        images = torch.stack([to_tensor(square) for square, _, _ in squares])     # [B, 3, S, S]
        feats = F.normalize(features(images), dim=1)                              # [B, C, h, w]
        for number, path in enumerate(batch):
            _, scale, offset = squares[number]
            # a slice is still known to be channels last; feats[number, None] is not, and is
            # interpolated eight times as slowly
            one = feats[number : number + 1]                                      # [1, C, h, w]
            described[path] = (one, scale, torch.tensor(offset))
    return described


def todays_queries(feats: Tensor, points: Tensor, size: int) -> Tensor:
    """The descriptors [C, K] of a map [1, C, h, w] at the pixels of points [K, 2] of the square."""
    pixels = points.long()
    at = 2 * (pixels + 0.5) / size - 1  # the centres of these pixels, in -1..1
    sampled = F.grid_sample(feats, at[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0]


def todays_spair(features: Features, root: str | Path, size: int) -> Scores:
    """The same, but each image is described once, in a batch, and a pair's keypoints together."""
    pairs = read_pairs(root, per_category=0)
    described = todays_describe(features, images_of(pairs), size)

    matches = []
    for pair in pairs:
        source, source_scale, source_offset = described[pair.source]
        target, target_scale, target_offset = described[pair.target]
        points = pair.source_points * source_scale + source_offset
        truth = pair.target_points * target_scale + target_offset

        queries = todays_queries(source, points, size)                            # [C, K]
        pixels = F.interpolate(target, (size, size), mode="bilinear")[0].flatten(1)  # [C, S*S]
        best = (queries.T @ pixels).argmax(dim=1)                                 # [K]
        predicted = torch.stack([best % size, best // size], dim=1)
        matches.append(Match(pair, points, truth, predicted, pair.extent * target_scale))
    return evaluate(matches), [match.predicted for match in matches]


# ---- a small data set ---------------------------------------------------------------------------


def write_tree(
    root: str | Path,
    categories: tuple[str, ...] = ("cat", "dog"),
    images: int = 3,
    keypoints: int = 5,
    separator: str = ":",
    seed: int = 0,
) -> Path:
    """Write a small SPair-71k: smooth random images, and all ordered pairs of each category.

    Args:
        images: how many in a category; they have several shapes.
        keypoints: how many in a pair.
        separator: what stands before the category in the names of the annotation files.
    Returns:
        `root`.
    """
    random = np.random.RandomState(seed)
    shapes = [(120, 90), (90, 120), (100, 100), (127, 61)]
    annotations = Path(root, "PairAnnotation/test")
    annotations.mkdir(parents=True)
    for category in categories:
        folder = Path(root, "JPEGImages", category)
        folder.mkdir(parents=True)
        sizes = [shapes[i % len(shapes)] for i in range(images)]
        for i, size in enumerate(sizes):
            noise = Image.fromarray(random.randint(0, 256, (9, 9, 3), dtype=np.uint8))
            noise.resize(size, Image.BICUBIC).save(folder / f"{i:04d}.jpg", quality=95)

        for s in range(images):
            for t in range(images):
                if s == t:
                    continue
                source_points = (random.rand(keypoints, 2) * sizes[s]).astype(int)
                target_points = (random.rand(keypoints, 2) * sizes[t]).astype(int)
                entry = {
                    "src_imname": f"{s:04d}.jpg",
                    "trg_imname": f"{t:04d}.jpg",
                    "category": category,
                    "src_kps": source_points.tolist(),
                    "trg_kps": target_points.tolist(),
                    "trg_bndbox": [5, 4, 55, 50],
                }
                name = f"{s:03d}{t:03d}-{s:04d}-{t:04d}{separator}{category}.json"
                (annotations / name).write_text(json.dumps(entry))
    return Path(root)


# ---- what benchmarks/speed.py times -------------------------------------------------------------


def setup(root: str | Path, size: int) -> tuple[Callable[[], Scores], ...]:
    """The three callables of a Case: all pairs below `root`, with ViT-S/16 and one LiFT.

    Both have random weights.
    """
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224.dino", num_classes=0, img_size=size)
    extractor = ViTExtractor("dino_vits16", stride=16, model=vit, device="cpu")
    lift = LiFT(384, 16, pre_shape=False, post_shape=False).eval().requires_grad_(False)
    lift.fold()  # as load_lift does; the baselines do not use what it keeps
    fast_lift = deepcopy(lift).to(memory_format=torch.channels_last)

    def of_reference(images):
        images = extractor.normalize(images)
        feats = plain_keys(vit, images, layer=11, facet="key", stride=16)
        return plain_lift(lift, images, feats)

    def of_ours(images):
        images = extractor.normalize(images)
        return upsample(lift, images, extractor(images))

    @torch.inference_mode()
    def of_today(images):
        images = extractor.normalize(images)
        return todays_lift(fast_lift, images, todays_map(vit, images))

    def ours():
        matches = match_pairs(of_ours, read_pairs(root, per_category=0), size)
        return evaluate(matches), [match.predicted for match in matches]

    def reference():
        return plain_spair(of_reference, root, size)

    def today():
        return todays_spair(of_today, root, size)

    return reference, ours, today


def setup_shared(size: int = 224) -> tuple[Callable[[], Scores], ...]:
    """The three callables for the 22 pairs of the shared sample.

    Raises:
        FileNotFoundError: the sample is not there.
    """
    return setup(shared_data("SPair-71k"), size)


def setup_dense(size: int = 224, images: int = 8) -> tuple[Callable[[], Scores], ...]:
    """The three callables for all ordered pairs of some images, so each is in many pairs."""
    folder = tempfile.TemporaryDirectory()
    root = write_tree(folder.name, ("cat",), images, keypoints=8)
    callables = setup(root, size)
    for call in callables:
        call.folder = folder  # it is deleted with the last of the callables
    return callables


def same(baseline: Scores, ours: Scores) -> None:
    """Assert that 95 % of the predicted pixels are equal, and PCK within one percentage point.

    All cannot be: outside the centres of border cells pixels tie, and rounding decides.
    """
    base_results, base_points = baseline
    our_results, our_points = ours
    agree = []
    for theirs, points in zip(base_points, our_points):
        agree.append((theirs == points).all(dim=1))
    equal = torch.cat(agree).double().mean().item()
    assert equal >= 0.95, f"{100 * equal:.1f} % of the predictions agree"

    for name, row in base_results.items():
        assert our_results[name].keys() == row.keys()
        for key, value in row.items():
            assert abs(our_results[name][key] - value) < 1, name


CASES = [
    Case("SPair, 22 pairs at 224, S/16 + LiFT", 4, setup_shared, same),
    Case("SPair, each image in 14 pairs, 224, S/16 + LiFT", 12, setup_dense, same),
    Case(
        "SPair, 6 pairs of 3 images at 448, S/16 + LiFT",
        1,
        partial(setup_dense, 448, 3),
        same,
        memory=10,
    ),
]
