"""Semantic correspondence on SPair-71k: percentage of correct keypoints (PCK) of dense features.

    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --upsample bilinear
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --lift_path lift.pth
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --imsize 448
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits8 --stride 4 --layer 9 --bin

The first four are rows of the LiFT paper: the backbone, bilinear upsampling, LiFT, and twice the
size. The last takes the descriptors of dino-vit-features: log-binned keys of layer 9.

Each image is resized and centred on a black square. Its descriptors are L2-normalised on the
feature grid and interpolated bilinearly to pixels. Every keypoint of the source is matched to the
target pixel with the largest dot product. It is correct if that pixel is nearer to the annotated
point than alpha times the longer side of the object's box. A category's PCK is over its keypoints,
and the result is the mean over the categories. This is the protocol of the LiFT paper's release;
--match, --threshold and --average choose other conventions.

100 pairs of each category are drawn, with replacement. --pairs_per_category 0 takes every pair
once. Prints a table of pairs, keypoints and PCK. On one CPU core, ViT-S/16 with LiFT at 224 takes
0.13 s for an image, which is described once, and 2 ms for a pair. --bin takes 17 times the memory.

Sources: SPair-71k, Min et al., 2019 (arXiv 1908.10543); log-binned descriptors, Amir et al., 2021
(arXiv 2112.05814).

Notation: C channels, h w the grid of a map, S the side of the square in pixels, K keypoints. Points
are (x, y).
"""

import argparse
import glob
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_one_process,
    check_range,
    progress,
    report,
    settings,
)
from files import inside, replacing

LARGEST = 4096  # pixels a side: the similarities of 30 keypoints then take 2 GB
LEGEND = 32  # pixels below a picture


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="SPair-71k's folder: PairAnnotation and JPEGImages")
    add("--split", default="test", help="folder of PairAnnotation (default: test)")
    add("--categories", nargs="+", help="names of categories (default: all)")
    add(
        "--pairs_per_category", type=int, default=100,
        help="pairs drawn from each category; 0 takes every pair once (default: 100)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="seed of that draw (default: 0)")
    add("--imsize", type=int, default=224, help="side of the square in pixels (default: 224)")
    add("--bin", action="store_true", help="log-binned descriptors, as in dino-vit-features")
    add(
        "--match", choices=("dot", "cosine"), default="dot",
        help="cosine normalises the descriptors again after interpolation (default: dot)",
    )  # fmt: skip
    add(
        "--alpha", type=float, nargs="+", default=[0.1, 0.05, 0.01],
        help="PCK thresholds, as shares of the object's box (default: 0.1 0.05 0.01)",
    )  # fmt: skip
    add(
        "--threshold", choices=("lt", "le"), default="lt",
        help="correct is a distance < or <= alpha times the box (default: lt)",
    )  # fmt: skip
    add(
        "--average", choices=("category", "keypoint", "image"), default="category",
        help="what counts equally in the mean; image: each pair (default: category)",
    )  # fmt: skip
    add("--batch_size", type=int, help="images per forward pass (default: 4 at 224 pixels)")
    add("--cache_mb", type=int, default=1024, help="MiB of descriptors in memory (default: 1024)")
    add("--visualize", type=int, default=0, metavar="N", help="pairs to draw (default: 0)")
    add("--output_dir", default="spair_pictures", help="for pictures (default: spair_pictures)")
    add_backbone_args(command)
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports below

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from extractor import log_bin
from features import build_features
from lift import tokens_to_map
from photos import read_image, spread

Maps = Callable[[Tensor], Tensor]  # images [B, 3, S, S] in 0..1 -> descriptors [B, C, h, w]


class Pair(NamedTuple):
    """One annotated pair, in pixels of the original images."""

    path: Path                                          # of the annotation
    category: str
    source: Path
    target: Path
    source_points: Tensor                               # [K, 2]
    target_points: Tensor                               # [K, 2]
    extent: float                                       # longer side of the target's box


class Described(NamedTuple):
    """An image's descriptors, and its place: its point p is at p * scale + offset in the square."""

    feats: Tensor                                       # [C, h, w], every cell of length 1
    norm: Tensor | None                                 # [S, S], of pixel_norms; None for "dot"
    size: tuple[int, int]                               # (W, H) of the original
    scale: float
    offset: Tensor                                      # [2]


class Match(NamedTuple):
    """A matched pair, in pixels of the squares."""

    pair: Pair
    source: Tensor                                      # [K, 2], the keypoints
    target: Tensor                                      # [K, 2], the same, as annotated
    predicted: Tensor                                   # [K, 2]
    extent: float                                       # longer side of the target's box


# ---- the data set -------------------------------------------------------------------------------


def read_pair(path: Path, images: Path) -> Pair:
    """The Pair of an annotation file whose images are in the folder `images`; refuses bad ones."""
    try:
        entry = json.loads(path.read_text())
        # by way of float64: numpy warns of what is too large for float32, torch makes it infinite
        source_points = torch.from_numpy(np.array(entry["src_kps"], np.float64)).float()
        target_points = torch.from_numpy(np.array(entry["trg_kps"], np.float64)).float()
        left, top, right, bottom = entry["trg_bndbox"]
        extent = float(max(right - left, bottom - top))
        source = inside(images, entry["src_imname"])
        target = inside(images, entry["trg_imname"])

        paired = source_points.shape == target_points.shape == (len(source_points), 2)
        if not paired or not target_points.isfinite().all() or not 0 < extent < math.inf:
            raise ValueError("src_kps and trg_kps must pair points [x, y], trg_bndbox be a box")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"{path} is not an SPair-71k annotation ({error!r})"
        raise ValueError(f"{what}: extract the data set again") from error
    for image in (source, target):
        if not image.is_file():
            raise FileNotFoundError(f"there is no image at {image}: extract the data set again")
    return Pair(path, images.name, source, target, source_points, target_points, extent)


def read_pairs(
    root: str | Path,
    split: str = "test",
    categories: list[str] | None = None,
    per_category: int = 100,
    seed: int = 0,
) -> list[Pair]:
    """The pairs of the evaluation, category by category.

    Pairs are drawn as in the LiFT release: numpy's legacy generator, seeded once, and one `choice`
    with replacement for each category, in alphabetical order. Both styles of file names in
    circulation are found, `...:cow.json` and `..._cow.json`.

    Args:
        categories: None takes all.
        per_category: how many pairs are drawn; 0 takes every pair once.
    Raises:
        FileNotFoundError, ValueError: a folder, a category or an image is missing, or damaged.
    """
    annotations = Path(root, "PairAnnotation", split)
    images = Path(root, "JPEGImages")
    for folder in (annotations, images):
        if not folder.is_dir():
            remedy = "pass SPair-71k's folder as --dataroot, and a --split that is in it"
            raise FileNotFoundError(f"there is no folder {folder}: {remedy}")
    if not categories:
        categories = [folder.name for folder in images.iterdir() if folder.is_dir()]

    random = np.random.RandomState(seed)
    pairs: list[Pair] = []
    for category in sorted(set(categories)):
        paths = sorted(annotations.glob(f"*[_:]{glob.escape(category)}.json"))
        if not paths:
            what = f"there are no pairs of category {category!r} in {annotations}"
            raise ValueError(f"{what}: choose others with --categories")
        if per_category > 0:
            paths = [paths[number] for number in random.choice(len(paths), per_category)]
        pairs += [read_pair(path, images / category) for path in paths]
    return pairs


def images_of(pairs: list[Pair]) -> list[Path]:
    """The images of some pairs, each once, in the order in which they are needed."""
    every = [path for pair in pairs for path in (pair.source, pair.target)]
    return list(dict.fromkeys(every))


def letterbox(image: Image.Image, size: int) -> tuple[Image.Image, float, Tensor]:
    """An image centred on a black square of `size` pixels a side, its scale and offset [2]."""
    longer = max(image.size)
    width = max(1, round(size * image.width / longer))
    height = max(1, round(size * image.height / longer))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)

    offset = ((size - width) // 2, (size - height) // 2)
    square = Image.new("RGB", (size, size))
    square.paste(resized, offset)
    return square, size / longer, torch.tensor(offset)


# ---- matching -----------------------------------------------------------------------------------


def binned(features: Maps) -> Maps:
    """The same features, log-binned: each cell is joined by its surroundings, in 17 bins."""

    def bins(images: Tensor) -> Tensor:
        feats = features(images)                                                  # [B, C, h, w]
        height, width = feats.shape[2:]
        return tokens_to_map(log_bin(feats), (height, width))                     # [B, 17*C, h, w]

    return bins


def describe(features: Maps, paths: list[Path], size: int, cosine: bool) -> dict[Path, Described]:
    """The descriptors of some images, which pass through the network as one batch."""
    # keypoints are in pixels as they are stored, whatever EXIF says
    images = [read_image(path, upright=False) for path in paths]
    boxed = [letterbox(image, size) for image in images]
    squares = torch.stack([to_tensor(square) for square, _, _ in boxed])          # [B, 3, S, S]
    batch = features(squares)                                                     # [B, C, h, w]

    described = {}
    for path, image, (_, scale, offset), raw in zip(paths, images, boxed, batch):
        # normalize makes a copy: a mere view would keep the whole batch in memory
        feats = F.normalize(raw, dim=0)                                           # [C, h, w]
        norm = pixel_norms(feats, size) if cosine else None
        described[path] = Described(feats, norm, image.size, scale, offset)
    return described


def pixel_norms(feats: Tensor, size: int) -> Tensor:
    """The lengths [S, S] that descriptors [C, h, w] have after interpolation to pixels."""
    sum_of_squares = torch.zeros(size, size, device=feats.device)
    # 16 channels at a time: all of them at S x S pixels would fill the memory
    for part in feats.split(16):
        pixels = F.interpolate(part[None], (size, size), mode="bilinear")[0]      # [16, S, S]
        sum_of_squares += pixels.square().sum(dim=0)
    return sum_of_squares.sqrt()


def place(points: Tensor, image: Described) -> Tensor:
    """Points [K, 2] of an original image, in its square."""
    return points * image.scale + image.offset


def pixel_weights(cells: int, size: int, device: torch.device) -> Tensor:
    """Along one axis, the weight of each cell in each pixel of linear interpolation: [cells, S]."""
    # in row i only cell i is 1, so the pixels of that row are its weights
    one_hot = torch.eye(cells, device=device)                                     # [cells, cells]
    return F.interpolate(one_hot[None], size, mode="linear")[0]


def descriptors_at(feats: Tensor, points: Tensor, size: int) -> Tensor:
    """The descriptors [C, K] of a map [C, h, w] at the pixels of points [K, 2] of the square.

    Bilinear interpolation is linear interpolation along each axis in turn, so the weight of a cell
    is that of its row times that of its column.
    """
    x, y = points.long().T  # the pixels in which the points lie
    height, width = feats.shape[1:]
    row_weights = pixel_weights(height, size, feats.device)[:, y]                 # [h, K]
    column_weights = pixel_weights(width, size, feats.device)[:, x]               # [w, K]
    return torch.einsum("chw,hk,wk->ck", feats, row_weights, column_weights)


def best_pixels(source: Described, target: Described, points: Tensor, size: int) -> Tensor:
    """The most similar pixels [K, 2] of the target square for points [K, 2] of the source square.

    The similarity is computed on the feature grid and then interpolated. Interpolation is linear,
    so this is the similarity with the interpolated descriptors, whose S x S x C tensor is never
    needed.
    """
    queries = descriptors_at(source.feats, points, size)                          # [C, K]
    at_cells = torch.einsum("ck,chw->khw", queries, target.feats)                 # [K, h, w]
    similarity = F.interpolate(at_cells[None], (size, size), mode="bilinear")[0]  # [K, S, S]

    # the length of a query does not change which of its pixels is best, the target's lengths do
    if target.norm is not None:
        similarity = similarity / target.norm
    best = similarity.flatten(1).argmax(dim=1).cpu()                              # [K]
    return torch.stack([best % size, best // size], dim=1)                        # (x, y)


def match_pair(pair: Pair, images: dict[Path, Described], size: int) -> Match:
    """Find the source's keypoints in the target; ValueError for one outside the source."""
    source = images[pair.source]
    target = images[pair.target]
    points = pair.source_points
    within = ((points >= 0) & (points < torch.tensor(source.size))).all(dim=1)    # [K]
    if not within.all():
        point = points[~within][0].tolist()
        width, height = source.size
        what = f"{pair.path}: keypoint {point} is outside its {width}x{height} image"
        raise ValueError(f"{what}: correct or remove this file")

    points = place(points, source)
    truth = place(pair.target_points, target)  # may be outside: only the distance to it counts
    predicted = best_pixels(source, target, points, size)
    return Match(pair, points, truth, predicted, pair.extent * target.scale)


def chunks(pairs: list[Pair], capacity: int) -> list[list[Pair]]:
    """Split pairs into lists that need at most `capacity` images each, which is 2 or more.

    More images than that are cut into blocks of half the capacity, and the pairs whose images lie
    in the same two blocks make one list. So an image is in few of the lists.
    """
    images = images_of(pairs)
    if len(images) <= capacity:
        return [pairs]
    block_size = capacity // 2
    block_of = {image: number // block_size for number, image in enumerate(images)}
    by_blocks = defaultdict(list)
    for pair in pairs:
        first, second = sorted((block_of[pair.source], block_of[pair.target]))
        by_blocks[first, second].append(pair)
    return [by_blocks[blocks] for blocks in sorted(by_blocks)]


def default_batch(size: int) -> int:
    """How many images have as many pixels as four images of 224x224, at least one."""
    return max(1, 4 * 224**2 // size**2)


def match_pairs(
    features: Maps,
    pairs: list[Pair],
    size: int,
    cosine: bool = False,
    batch_size: int | None = None,
    cache_mb: int = 1024,
) -> list[Match]:
    """Match all pairs, and return them in their order.

    Each image is described once if the descriptors of a category fit into `cache_mb` MiB; with less
    memory, some are described again.

    Args:
        features: any callable from images [B, 3, S, S] in 0..1 to descriptors [B, C, h, w].
        size: S.
        cosine: normalise the descriptors again after interpolation.
        batch_size: images per call of `features`; None: default_batch(size).
    """
    batch_size = batch_size or default_batch(size)
    unique = {pair.path: pair for pair in pairs}  # a pair that was drawn twice is matched once
    by_category = defaultdict(list)
    for pair in unique.values():
        by_category[pair.category].append(pair)

    # all images take as much memory as the first, which tells how many fit
    images = describe(features, [pairs[0].source], size, cosine)
    first = images[pairs[0].source]
    bytes_each = first.feats.nbytes
    if first.norm is not None:
        bytes_each += first.norm.nbytes
    capacity = max(2, cache_mb * 2**20 // bytes_each)

    work = []
    for group in by_category.values():
        work.extend(chunks(group, capacity))

    found = {}
    with progress(total=sum(map(len, work)), unit="pair") as bar:
        for chunk in work:
            # of the chunk before, only those images stay in memory that this one needs too
            needed = images_of(chunk)
            images = {path: images[path] for path in needed if path in images}
            missing = [path for path in needed if path not in images]
            for start in range(0, len(missing), batch_size):
                images.update(describe(features, missing[start : start + batch_size], size, cosine))

            for pair in chunk:
                found[pair.path] = match_pair(pair, images, size)
                bar.update()
    return [found[pair.path] for pair in pairs]


# ---- scores -------------------------------------------------------------------------------------


def correct(match: Match, alpha: float, threshold: str = "lt") -> Tensor:
    """Which keypoints [K] are found within alpha times the longer side of the target's box.

    With threshold "lt" the distance must be less than that; with "le" it may be equal.
    """
    distance = (match.predicted - match.target).norm(dim=1)
    limit = alpha * match.extent
    if threshold == "le":
        return distance <= limit
    return distance < limit


def pck(
    matches: list[Match], alphas: Sequence[float], threshold: str, per_image: bool
) -> dict[str, float]:
    """Percentage of correct keypoints for each alpha; `per_image`: the mean of the pairs' own."""
    scores = {}
    for alpha in alphas:
        hits = [correct(match, alpha, threshold).double() for match in matches]   # [K] each
        if per_image:
            hits = [hit.mean(dim=0, keepdim=True) for hit in hits]                # [1] each
        scores[f"pck@{alpha}"] = 100 * torch.cat(hits).mean().item()
    return scores


def evaluate(
    matches: list[Match],
    alphas: Sequence[float] = (0.1, 0.05, 0.01),
    threshold: str = "lt",
    average: str = "category",
) -> dict[str, dict[str, Any]]:
    """PCK of every category and their mean, in percent.

    Args:
        average: what counts equally in the mean: "category", "keypoint", or "image", which is a
            pair, and counts equally within a category too.
    Returns:
        {category: {"pairs", "keypoints", "pck@0.1", ...}, ..., "mean": {"pck@0.1", ...}}
    """
    per_image = average == "image"
    by_category = defaultdict(list)
    for match in matches:
        by_category[match.pair.category].append(match)

    results: dict[str, dict[str, Any]] = {}
    for category, group in by_category.items():
        keypoints = sum(len(match.source) for match in group)
        scores = pck(group, alphas, threshold, per_image)
        results[category] = {"pairs": len(group), "keypoints": keypoints, **scores}

    mean = pck(matches, alphas, threshold, per_image)
    if average == "category":
        for key in mean:
            mean[key] = sum(row[key] for row in results.values()) / len(results)
    results["mean"] = mean
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results of `evaluate` as text, a line for each category."""
    keys = list(results["mean"])
    header = f"{'category':15}{'pairs':>7}{'keypoints':>11}"
    lines = [header + "".join(f"{key:>10}" for key in keys)]
    for name, row in results.items():
        counts = f"{name:15}{row.get('pairs', ''):>7}{row.get('keypoints', ''):>11}"
        lines.append(counts + "".join(f"{row[key]:10.2f}" for key in keys))
    return "\n".join(lines)


# ---- pictures -----------------------------------------------------------------------------------


def draw(match: Match, size: int, alpha: float, threshold: str, side: int = 448) -> Image.Image:
    """Draw a Match: the source on the left, the target on the right, a legend below.

    A keypoint has the same colour in both. The two squares have `side` pixels, those in which the
    points of the Match are `size`.
    """
    picture = Image.new("RGB", (2 * side, side + LEGEND), "white")
    for number, path in enumerate((match.pair.source, match.pair.target)):
        square, _, _ = letterbox(read_image(path, upright=False), side)
        picture.paste(square, (number * side, 0))

    zoom = side / size
    to_the_right = torch.tensor([side, 0])
    points = (match.source * zoom).tolist()
    truths = (match.target * zoom + to_the_right).tolist()
    guesses = (match.predicted * zoom + to_the_right).tolist()
    hits = correct(match, alpha, threshold).tolist()
    pen = ImageDraw.Draw(picture)
    for number, point in enumerate(points):
        hue = 360 * number // len(points)
        colour = ImageColor.getrgb(f"hsv({hue}, 100%, 100%)")
        line = "lime" if hits[number] else "red"
        pen.line([*truths[number], *guesses[number]], fill=line, width=2)
        pen.circle(point, 5, fill=colour, outline="black")
        pen.circle(truths[number], 7, outline=colour, width=3)
        pen.circle(guesses[number], 4, fill=colour, outline="black")  # fits into the ring

    text = (
        "disc: keypoint (left), and where it was found (right)    ring: where it is annotated    "
        f"line: green if correct at alpha {alpha:g}, else red"
    )
    middle = side + LEGEND // 2
    pen.text((12, middle), text, "black", ImageFont.load_default(13), anchor="lm")
    return picture


# ---- the command --------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Match all pairs, print the table, draw pictures."""
    check_range(
        args, imsize=1, batch_size=1, cache_mb=0, pairs_per_category=0, visualize=0, seed=0
    )
    if args.imsize > LARGEST:
        raise ValueError(f"--imsize {args.imsize} is too large: pass {LARGEST} or less")
    check_one_process()
    pairs = read_pairs(
        args.dataroot, args.split, args.categories, args.pairs_per_category, args.seed
    )
    features = build_features(args)
    features.check_size(args.imsize, args.imsize)
    maps: Maps = binned(features) if args.bin else features

    batch_size = args.batch_size or default_batch(args.imsize)
    cosine = args.match == "cosine"
    matches = match_pairs(maps, pairs, args.imsize, cosine, batch_size, args.cache_mb)
    results = evaluate(matches, args.alpha, args.threshold, args.average)
    print(table(results))

    all_settings = settings(
        args,
        device=str(features.backbone.device),
        batch_size=batch_size,
        categories=[name for name in results if name != "mean"],
        **features.facts(),
    )
    keypoints = sum(len(match.source) for match in matches)
    counts = {"pairs": len(pairs), "keypoints": keypoints, "images": len(images_of(pairs))}
    report(args, {"settings": all_settings, **counts, "results": results})

    for match in spread(matches, args.visualize):
        # the largest alpha: a line is green if the keypoint is correct at any
        picture = draw(match, args.imsize, max(args.alpha), args.threshold)
        name = match.pair.path.stem.replace(":", "_")
        with replacing(Path(args.output_dir, f"{name}.png")) as temporary:
            picture.save(temporary)


if __name__ == "__main__":
    parser().run(main)
