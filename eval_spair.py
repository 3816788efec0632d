"""Semantic correspondence on SPair-71k (Min et al., 2019): percentage of correct keypoints (PCK) of dense features.

    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --imsize 224                       # DINO
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --imsize 224 --upsample bilinear   # + bilinear
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --imsize 224 --lift_path lift.pth  # + LiFT
    python eval_spair.py --dataroot SPair-71k --model_type dino_vits16 --imsize 448                       # DINO at 448

The protocol is that of the LiFT paper's release. Both images go, on black, to a square; descriptors are L2-normalised
on the feature grid and interpolated bilinearly to pixels; every keypoint of the source goes to the target pixel of
largest dot product; it is correct if nearer to the annotated point than alpha times the longer side of the object's
box. 100 pairs a category are drawn with replacement (--pairs_per_category 0: all once). A category's PCK is over its
keypoints, the result is the mean over categories. Other conventions (--match, --threshold, --average) are off by default.

Prints a table (pairs, keypoints and PCK of every category, and the mean) and, as the last line, the same with all
settings as JSON. On 1 CPU core, ViT-S/16 + LiFT at 224 takes 0.13 s an image, however many pairs it is in, and 2 ms a pair.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from extractor import Command, ViTExtractor, add_backbone_args, read_image, replacing, settings
from lift import add_lift_args, upsampler


class Pair(NamedTuple):
    """One annotated pair; points [K, 2] are (x, y) in pixels of the original images, `extent` is in target pixels."""

    path: Path
    category: str
    source: Path
    target: Path
    source_points: torch.Tensor
    target_points: torch.Tensor
    extent: float  # longer side of the object's bounding box in the target


class Described(NamedTuple):
    """An image in its S x S square: x_square = x * scale + offset."""

    feats: torch.Tensor  # [C, h, w], cells of unit length
    norm: torch.Tensor | None  # [S, S] lengths after interpolation, for cosine matching
    size: tuple  # (W, H) of the original
    scale: float
    offset: torch.Tensor  # [2]


class Match(NamedTuple):
    """A matched pair; points [K, 2] are (x, y) in pixels of the S x S squares, and so is `extent`."""

    pair: Pair
    source: torch.Tensor
    target: torch.Tensor
    predicted: torch.Tensor
    extent: float


# ---- the data set ---------------------------------------------------------------------------------------------------


def read_pair(path, images):
    """The Pair of an annotation file, its images in the folder `images`. Raises ValueError for anything else."""
    try:
        entry = json.loads(path.read_text())
        source, target = (torch.from_numpy(np.array(entry[key], np.float32)) for key in ("src_kps", "trg_kps"))
        if source.ndim != 2 or source.shape[1] != 2 or source.shape != target.shape:
            raise ValueError(f"src_kps and trg_kps of shapes {list(source.shape)} and {list(target.shape)}")
        x0, y0, x1, y1 = entry["trg_bndbox"]
        names = (images / entry["src_imname"], images / entry["trg_imname"])
        return Pair(path, images.name, *names, source, target, float(max(x1 - x0, y1 - y0)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no SPair-71k annotation ({error!r}): extract the data set again") from error


def read_pairs(root, split="test", categories=None, per_category=100, seed=0):
    """The pairs of the evaluation, category by category, sorted by name.

    `per_category` pairs are drawn with replacement, as in the LiFT release (numpy's legacy generator, seeded once, one
    `choice` a category); 0 takes all once. Both file names in circulation are found: `...:cow.json`, `..._cow.json`.
    Raises FileNotFoundError for a missing folder, ValueError for a category without pairs.
    """
    annotations, images = Path(root, "PairAnnotation", split), Path(root, "JPEGImages")
    for folder in (annotations, images):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: pass SPair-71k's folder as --dataroot, and a --split it has")
    random, pairs = np.random.RandomState(seed), []
    for category in sorted(set(categories or (folder.name for folder in images.iterdir() if folder.is_dir()))):
        paths = sorted(annotations.glob(f"*[_:]{category}.json"))
        if not paths:
            raise ValueError(f"no pairs of category {category!r} in {annotations}: choose others with --categories")
        chosen = random.choice(len(paths), per_category) if per_category else range(len(paths))
        read = {i: read_pair(paths[i], images / category) for i in set(chosen)}
        pairs += [read[i] for i in chosen]
    return pairs


def letterbox(image, size):
    """PIL image -> (square PIL image with the longer side `size`, centred on black; scale; offset [2])."""
    longer = max(image.size)
    resized = image.resize([round(size * side / longer) for side in image.size], Image.Resampling.LANCZOS)
    offset = tuple((size - side) // 2 for side in resized.size)
    square = Image.new("RGB", (size, size))
    square.paste(resized, offset)
    return square, size / longer, torch.tensor(offset)


# ---- matching -------------------------------------------------------------------------------------------------------


def describe(features, paths, size, cosine):
    """Features of the images at `paths`, as one batch: {path: Described}."""
    images = [read_image(path) for path in paths]
    squares, scales, offsets = zip(*(letterbox(image, size) for image in images))
    batch = features(torch.stack([to_tensor(square) for square in squares]))  # [B, C, h, w]
    feats = [F.normalize(f, dim=0) for f in batch]  # memory of their own, given back one by one
    norms = [pixel_norms(f, size) if cosine else None for f in feats]
    sizes = [image.size for image in images]
    return dict(zip(paths, map(Described, feats, norms, sizes, scales, offsets)))


def pixel_norms(feats, size):
    """Lengths [S, S] of the descriptors [C, h, w] after interpolation to S x S pixels, a few channels at a time."""
    parts = (F.interpolate(part[None], (size, size), mode="bilinear") for part in feats.split(16))
    return sum(part.square().sum(dim=1)[0] for part in parts).sqrt()


def place(points, image, path):
    """Points [K, 2] of an original image -> points of its square. Raises ValueError for one outside the image."""
    inside = ((points >= 0) & (points < torch.tensor(image.size))).all(dim=1)
    if not inside.all():
        point, (width, height) = points[~inside][0].tolist(), image.size
        raise ValueError(f"{path}: keypoint {point} is outside its {width}x{height} image: correct or remove this file")
    return points * image.scale + image.offset


def descriptors_at(feats, points, size):
    """Descriptors [C, K] of a map [C, h, w] that covers size x size pixels, at the pixels of the points [K, 2]."""
    x, y = points.long().T
    rows, columns = (
        F.interpolate(torch.eye(cells, device=feats.device)[None], size, mode="linear")[0] for cells in feats.shape[1:]
    )  # what each cell weighs in each pixel: [h, S] and [w, S]
    return torch.einsum("chw,hk,wk->ck", feats, rows[:, y], columns[:, x])


def best_pixels(source, target, points, size):
    """For points [K, 2] of the source square the most similar pixels of the target square, [K, 2] as (x, y).

    The similarity is computed on the feature grid and interpolated. Interpolation is linear, so that is the similarity
    with the interpolated descriptors, without ever building their S x S x C tensor.
    """
    queries = descriptors_at(source.feats, points, size)
    similarity = torch.einsum("ck,chw->khw", queries, target.feats)
    similarity = F.interpolate(similarity[None], (size, size), mode="bilinear")[0]  # [K, S, S]
    if target.norm is not None:
        similarity = similarity / target.norm
    best = similarity.flatten(1).argmax(dim=1).cpu()
    return torch.stack([best % size, best // size], dim=1)


def match_pair(pair, images, size):
    """The Match of a pair, `images` {path: Described}."""
    source, target = images[pair.source], images[pair.target]
    points = place(pair.source_points, source, pair.path)
    truth = place(pair.target_points, target, pair.path)
    return Match(pair, points, truth, best_pixels(source, target, points, size), pair.extent * target.scale)


def chunks(pairs, capacity):
    """Split pairs into lists that need at most `capacity` (2 or more) images each, few of them in several lists."""
    images = list(dict.fromkeys(image for pair in pairs for image in (pair.source, pair.target)))
    size = len(images) if len(images) <= capacity else max(1, capacity // 2)
    block = {image: i // size for i, image in enumerate(images)}

    def blocks(pair):
        return sorted((block[pair.source], block[pair.target]))

    return [list(group) for _, group in groupby(sorted(pairs, key=blocks), blocks)]


def match_pairs(features, pairs, size, cosine=False, batch_size=None, cache_mb=1024):
    """Match all pairs: a list of Match, in the order of `pairs`.

    `features` is any callable from images [B, 3, S, S] in 0..1 to descriptors [B, C, h, w]. Each image passes through
    it once as long as a category's descriptors fit into `cache_mb` MiB; with less, some are computed again.
    """
    batch_size = batch_size or max(1, 4 * 224**2 // size**2)
    unique = {pair.path: pair for pair in pairs}.values()
    images, found = describe(features, [pairs[0].source], size, cosine), {}
    bytes_each = sum(x.nbytes for x in images[pairs[0].source][:2] if x is not None)
    capacity = max(2, cache_mb * 2**20 // bytes_each)
    categories = groupby(unique, lambda pair: pair.category)
    with tqdm(total=len(unique), unit="pair", disable=None) as bar:
        for chunk in (chunk for _, category in categories for chunk in chunks(list(category), capacity)):
            needed = dict.fromkeys(image for pair in chunk for image in (pair.source, pair.target))
            images = {path: images[path] for path in needed if path in images}
            missing = [path for path in needed if path not in images]
            for pair in chunk:
                while not {pair.source, pair.target} <= images.keys():
                    images |= describe(features, missing[:batch_size], size, cosine)
                    del missing[:batch_size]
                found[pair.path] = match_pair(pair, images, size)
                bar.update()
    return [found[pair.path] for pair in pairs]


# ---- scores ---------------------------------------------------------------------------------------------------------


def correct(match, alpha, threshold="lt"):
    """Which keypoints [K] of a Match are nearer than (`le`: at most) alpha times the object's longer side."""
    distance, limit = (match.predicted - match.target).norm(dim=1), alpha * match.extent
    return distance <= limit if threshold == "le" else distance < limit


def evaluate(matches, alphas=(0.1, 0.05, 0.01), threshold="lt", average="category"):
    """PCK in percent: {category: {"pairs", "keypoints", "pck@0.1", ...}, ..., "mean": {"pck@0.1", ...}}.

    `average` is what weighs the same in the mean: a category (over its keypoints), a keypoint, or an image pair; with
    `image` a category's own figure is the mean over its pairs, too.
    """

    def row(matches):
        hits = {alpha: [correct(match, alpha, threshold).double() for match in matches] for alpha in alphas}
        if average == "image":
            hits = {alpha: [h.mean(dim=0, keepdim=True) for h in pairs] for alpha, pairs in hits.items()}
        return {f"pck@{alpha}": 100 * torch.cat(pairs).mean().item() for alpha, pairs in hits.items()}

    results = {}
    for category, group in groupby(matches, lambda match: match.pair.category):
        group = list(group)
        results[category] = {"pairs": len(group), "keypoints": sum(len(match.source) for match in group)} | row(group)
    rows = list(results.values())
    mean = {f"pck@{alpha}": sum(row[f"pck@{alpha}"] for row in rows) / len(rows) for alpha in alphas}
    return results | {"mean": mean if average == "category" else row(matches)}


def table(results):
    """The results of `evaluate` as text, a line a category."""
    keys = list(results["mean"])
    lines = [f"{'category':15}{'pairs':>7}{'keypoints':>11}" + "".join(f"{key:>10}" for key in keys)]
    for name, row in results.items():
        counts = f"{name:15}{row.get('pairs', ''):>7}{row.get('keypoints', ''):>11}"
        lines.append(counts + "".join(f"{row[key]:10.2f}" for key in keys))
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(match, size, alpha, threshold, side=448):
    """A Match as a picture: source with its keypoints, target with annotated (rings) and predicted points (discs).

    A keypoint has one colour in both; a line joins ring and disc, green if correct at `alpha`, else red.
    """
    zoom, picture = side / size, Image.new("RGB", (2 * side, side))
    for i, path in enumerate((match.pair.source, match.pair.target)):
        picture.paste(letterbox(read_image(path), side)[0], (i * side, 0))
    pen = ImageDraw.Draw(picture)
    right = torch.tensor([side, 0])
    hits = correct(match, alpha, threshold)
    points = zip(match.source * zoom, match.target * zoom + right, match.predicted * zoom + right, hits)
    for i, (source, target, predicted, hit) in enumerate(points):
        colour = ImageColor.getrgb(f"hsv({360 * i // len(match.source)}, 100%, 100%)")
        pen.line([*target.tolist(), *predicted.tolist()], fill="lime" if hit else "red", width=2)
        pen.circle(source.tolist(), 5, fill=colour, outline="black")
        pen.circle(target.tolist(), 7, outline=colour, width=3)
        pen.circle(predicted.tolist(), 4, fill=colour, outline="black")
    return picture


def save_pictures(matches, count, folder, size, alpha, threshold):
    """Draw `count` matches, spread evenly over all, into PNG files of `folder`."""
    for i in np.linspace(0, len(matches) - 1, min(count, len(matches))).astype(int):
        name = matches[i].pair.path.stem.replace(":", "_")
        with replacing(Path(folder, f"{name}.png")) as temporary:
            draw(matches[i], size, alpha, threshold).save(temporary)


# ---- command line ---------------------------------------------------------------------------------------------------


def parser():
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="SPair-71k folder, with PairAnnotation and JPEGImages")
    add("--split", default="test", help="folder of PairAnnotation (default: test)")
    add("--categories", nargs="+", help="categories to evaluate (default: all folders of JPEGImages)")
    add("--pairs_per_category", type=int, default=100, help="pairs drawn a category, 0 for all (default: 100)")
    add("--seed", type=int, default=0, help="of that draw (default: 0)")
    add("--imsize", type=int, default=224, help="side of the square input in pixels (default: 224)")
    add("--match", choices=("dot", "cosine"), default="dot", help="cosine: renormalise after interpolation")
    add("--alpha", type=float, nargs="+", default=[0.1, 0.05, 0.01], help="PCK thresholds (default: 0.1 0.05 0.01)")
    add("--threshold", choices=("lt", "le"), default="lt", help="distance < or <= alpha times the box (default: lt)")
    add("--average", choices=("category", "keypoint", "image"), default="category", help="what weighs the same")
    add("--batch_size", type=int, help="images a forward pass (default: the pixels of 4 at 224)")
    add("--cache_mb", type=int, default=1024, help="MiB of descriptors kept for further pairs (default: 1024)")
    add("--visualize", type=int, default=0, metavar="N", help="draw N pairs into --output_dir")
    add("--output_dir", default="spair_pictures", help="folder of those pictures (default: spair_pictures)")
    add("--json", help="write the JSON line to this file, too")
    add_backbone_args(command)
    add_lift_args(command)
    return command


def main(args):
    for flag, least in {"imsize": 1, "batch_size": 1, "cache_mb": 0, "pairs_per_category": 0, "visualize": 0}.items():
        value = vars(args)[flag]
        if value is not None and value < least:
            raise ValueError(f"--{flag} {value} is too small: pass {least} or more")
    extractor = ViTExtractor.from_args(args)
    up = upsampler(args, extractor)

    def features(images):  # [B, 3, S, S] in 0..1 -> [B, C, h, w]
        images = extractor.normalize(images.to(extractor.device))
        return up(images, extractor(images))

    pairs = read_pairs(args.dataroot, args.split, args.categories, args.pairs_per_category, args.seed)
    matches = match_pairs(features, pairs, args.imsize, args.match == "cosine", args.batch_size, args.cache_mb)
    results = evaluate(matches, args.alpha, args.threshold, args.average)
    print(table(results))
    images = {image for pair in pairs for image in (pair.source, pair.target)}
    counts = {"pairs": len(pairs), "keypoints": sum(len(match.source) for match in matches), "images": len(images)}
    line = json.dumps({"settings": settings(args), **counts, "results": results})
    print(line)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(line + "\n")
    save_pictures(matches, args.visualize, args.output_dir, args.imsize, max(args.alpha), args.threshold)


if __name__ == "__main__":
    parser().run(main)
