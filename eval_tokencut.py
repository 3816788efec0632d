"""Unsupervised object discovery with TokenCut: CorLoc of dense features.

    python eval_tokencut.py --dataroot ROOT --dataset VOC12 --set trainval --output_dir out/dino
    python eval_tokencut.py --dataroot ROOT --dataset VOC07 --set trainval \\
        --lift_path lift.pth --output_dir out/lift
    python eval_tokencut.py --dataroot ROOT --dataset COCO20k --tau 0.3 --output_dir out/coco
    python eval_tokencut.py --image_path photos/ --output_dir out/photos

The last command needs no annotation: it draws the object that it finds in each photo. --dinoseg
cuts the attention of CLS instead: DINO-seg, the baseline of LOST.

The cells of an image are a graph, joined where their descriptors have a cosine above tau. The
second smallest eigenvector of its normalised cut splits it. The connected part around the
eigenvector's largest entry is the object. An image counts as found if the box of that part has an
IoU of 0.5 or more with any annotated box. CorLoc is the share of images found. As in the protocol,
images without an object that could be found count as not found; a note names them, and says what
CorLoc is without them.

ROOT holds VOC2012/VOCdevkit or VOCdevkit. For COCO20k it holds coco_20k_filenames.txt and
COCO/{annotations,images}. The paper takes tau 0.2 for VOC and 0.3 for COCO20k.

Prints CorLoc, or without annotation a table of boxes. OUTPUT_DIR/predictions has a small file for
each image, from which a run that was stopped goes on; at the end, OUTPUT_DIR/predictions.jsonl has
all of them. 60 photos at 224 with ViT-Ti and LiFT take 7 s on one CPU core.

Sources: TokenCut, Wang et al., CVPR 2022 (arXiv 2202.11539); LOST, Simeoni et al., BMVC 2021
(arXiv 2109.14279).

Notation: C channels, H W image pixels, h w the grid of a map, N = h*w cells. A box is x0, y0, x1,
y1 in pixels.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_one_process,
    check_range,
    deciding,
    note,
    progress,
    report,
    settings,
    skipped,
    truth,
    why_skipped,
)
from files import SETTINGS, Results, first_line, inside, replacing, write_text

VOC_YEARS = {"VOC07": "2007", "VOC12": "2012"}

# flags of the LiFT release that never had an effect on its results, and their defaults
NO_EFFECT = {
    "--arch": "vit_small", "--patch_size": 16, "--which_features": "k", "--k_patches": 100,
    "--resize": None,
}  # fmt: skip


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", help="folder that holds the data sets; needed without --image_path")
    add("--dataset", choices=(*VOC_YEARS, "COCO20k"), default="VOC07", help="(default: VOC07)")
    add("--set", default="train", help="image set of VOC (default: train); COCO20k has one")
    add("--no_hard", action="store_true", help="leave out VOC's difficult and truncated objects")
    add("--no_evaluation", action="store_true", help="read no annotation: boxes, but no CorLoc")
    add("--image_path", help="a photo, folder or pattern to search instead of a data set")
    add("--imsize", type=int, default=224, help="pixels a side of the square input (default: 224)")
    add("--native", action="store_true", help="each image at its own size, as in TokenCut")
    add("--imagenet_norm", action="store_true", help="ImageNet's mean and std for any backbone")
    add("--tau", type=float, default=0.2, help="cosine above which cells are joined (default: 0.2)")
    add("--eps", type=float, default=1e-5, help="weight of all other edges (default: 1e-5)")
    add("--no-binary-graph", action="store_true", help="weigh joined cells by their cosine")
    add("--dinoseg", action="store_true", help="cut the attention of CLS: the baseline DINO-seg")
    add("--dinoseg_head", type=int, default=4, help="its head, counted from 0 (default: 4)")
    add("--output_dir", default="outputs", help="for predictions, pictures (default: outputs)")
    add(
        "--save_predictions", type=truth, nargs="?", const=True, default=True, metavar="True|False",
        help="write predictions, and go on from those that are there (default: True)",
    )  # fmt: skip
    add("--no-save_predictions", dest="save_predictions", action="store_false", help="write none")
    add("--overwrite", action="store_true", help="remove the predictions of an earlier run first")
    add("--visualize", choices=("attn", "pred", "all"), help="draw what was cut, the box, or all")
    add("--save-feat-dir", help="folder for the map [C, h, w] of each image, as .npy")
    for flag, default in NO_EFFECT.items():
        # nargs=1: what is given is a list of one, and so never equals the default
        add(flag, nargs=1, default=default, help=argparse.SUPPRESS)
    add_backbone_args(command)
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports below

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.linalg import eigh
from scipy.ndimage import label
from scipy.sparse.linalg import LinearOperator, eigsh
from torchvision.transforms.functional import to_tensor

from backbones import IMAGENET
from extractor import ViTExtractor
from features import Features, build_features
from photos import corner_cells, note_left_out, read_image
from voc_coco import Sample, bounding_box, box_iou, have_area, read_coco20k, read_photos, read_voc

LONGEST_NAME = 240  # bytes of a photo's name: systems allow 255, and pictures add a suffix
SMALL_GRAPH = 256  # cells up to which LAPACK is as fast as Lanczos
MOST = 2**14  # cells of a graph, whose N^2 weights in float32 then take 1 GiB


class Source(NamedTuple):
    """The photo of a Sample, and what the backbone sees of it."""

    photo: Image.Image
    images: torch.Tensor    # [1, 3, H, W] in 0..1, maybe padded right and below
    inner: tuple[int, int]  # width and height of the images without padding


class Part(NamedTuple):
    """The object of an image, on its grid."""

    heat: np.ndarray  # what was cut, [h, w]: the eigenvector, or the attention of CLS
    mask: np.ndarray  # the object's cells, [h, w]
    seed: int         # number of the cell that it grew from, row by row


class Found(NamedTuple):
    """What the search of one image gave."""

    sample: Sample
    photo: Image.Image
    feats: torch.Tensor           # its map [C, h, w], without padding
    part: Part
    extent: tuple[float, float]   # columns and rows of cells that the photo covers, not padding
    entry: dict[str, Any]         # see `discover`


# ---- TokenCut -----------------------------------------------------------------------------------


def affinity(feats: torch.Tensor, tau: float, eps: float = 1e-5, binary: bool = True) -> np.ndarray:
    """The graph of a map [C, h, w]: the weights [N, N] of its edges (TokenCut, section 3.2).

    Args:
        binary: weigh joined cells by 1, else by their cosine; eps is the weight of all others.
    """
    count = feats[0].numel()
    if count > MOST:
        what = f"the graph of {count} cells is too large ({MOST} take 1 GiB)"
        raise ValueError(f"{what}: pass a smaller --imsize or --lift_iter, or leave out --native")
    cells = F.normalize(feats.float().flatten(1).T, dim=1)         # [N, C]
    cosine = (cells @ cells.T).cpu().numpy()                       # [N, N]
    dtype: Any = np.float64 if len(cosine) <= SMALL_GRAPH else np.float32
    if binary:
        return np.where(cosine > tau, dtype(1), dtype(eps))
    weights = np.where(cosine < tau, eps, cosine).astype(dtype)
    return weights.clip(eps)  # a tau below eps lets smaller cosines pass


def second_eigenvector(graph: np.ndarray) -> np.ndarray:
    """The second smallest eigenvector v [N] of (D - A) v = lambda D v (Shi and Malik, 2000).

    Graphs of up to SMALL_GRAPH cells go to LAPACK: in them, cells often tie for the largest entry,
    so that rounding chooses the object, and LAPACK's is the same everywhere, as far as we saw.
    Larger graphs go to Lanczos in float32.

    Args:
        graph: A, [N, N]; it may be overwritten. D is the diagonal of its row sums.
    """
    if np.ptp(graph) <= 1e-5 * np.abs(graph).max():
        # all edges are equal, and every v is as good as any other: LAPACK's is 1 at the second cell
        v = np.zeros(len(graph))
        v[min(1, len(graph) - 1)] = 1
        return v

    degree = graph.sum(1, dtype=np.float64)
    if len(graph) <= SMALL_GRAPH:
        # asks for the second and third, as TokenCut does; two cells have no third
        last = min(2, len(graph) - 1)
        _, vectors = eigh(np.diag(degree) - graph, np.diag(degree), subset_by_index=[1, last])
        return vectors[:, 0]

    # D^-1/2 A D^-1/2 has the eigenvalues 1 - lambda and the eigenvectors D^1/2 v, so the second
    # largest is wanted; in place, as a copy may take another GiB
    scale = (1 / np.sqrt(degree)).astype(np.float32)               # [N]
    graph *= scale[:, None]
    graph *= scale

    # the largest eigenvalue is 1, and its unit eigenvector u is known: subtracting 2 u u^T moves it
    # to -1, so that the second largest becomes the largest
    u = np.sqrt(degree / degree.sum()).astype(np.float32)          # [N]

    def product(x: np.ndarray) -> np.ndarray:
        return graph @ x - 2 * (u @ x) * u

    operator = LinearOperator(graph.shape, product, dtype=np.float32)
    start = np.random.RandomState(0).standard_normal(len(graph)).astype(np.float32)
    _, vectors = eigsh(operator, k=1, which="LA", v0=start)
    return scale * vectors[:, 0]


def tokencut(feats: torch.Tensor, tau: float = 0.2, eps: float = 1e-5, binary: bool = True) -> Part:
    """The object in a map [C, h, w]; its heat is the eigenvector, largest at the seed."""
    v = second_eigenvector(affinity(feats, tau, eps, binary))

    # the first of the largest entries wins; in float32, entries that differ by no more than
    # rounding count as equal
    size = np.abs(v)                                               # [N]
    largest = size.max()
    if v.dtype == np.float32:
        largest *= 1 - 1e-5
    seed = int(np.argmax(size >= largest))  # argmax of a mask: its first True

    # of the two sides of the cut, the object's is that of the seed
    mask = v > v.mean()
    if not mask[seed]:
        v = -v
        mask = ~mask
    grid = feats.shape[1:]
    labels, _ = label(mask.reshape(grid))  # 1, 2, ... for the 4-connected parts
    return Part(v.reshape(grid), labels == labels.flat[seed], seed)


def cls_attention(extractor: ViTExtractor, images: torch.Tensor) -> torch.Tensor:
    """How CLS attends to the cells of images [1, 3, H, W] in 0..1: [1, heads, h, w]."""
    height, width = extractor.grid(*images.shape[2:])
    images = extractor.normalize(images.to(extractor.device))
    attention = extractor.extract_descriptors(images, facet="attn", include_cls=True)
    of_cls = attention[:, 0, 0]                                # [1, T * heads], heads vary fastest
    by_token = of_cls.unflatten(1, (-1, extractor.heads))      # [1, T, heads]
    cells = by_token[:, -height * width :]                     # without prefix tokens
    return cells.mT.unflatten(2, (height, width))              # [1, heads, h, w]


def dinoseg(attention: torch.Tensor, head: int, mass: float = 0.6) -> Part:
    """The largest connected part of the cells that hold `mass` of a head's attention [heads, h, w].

    Source: LOST, section 4.
    """
    heat = attention[head].cpu().numpy()
    order = heat.argsort(axis=None)                                # [N], the weakest first
    held = heat.flat[order].cumsum()                               # by a cell and all weaker ones
    mask = np.zeros(heat.shape, dtype=bool)
    mask.flat[order] = held > (1 - mass) * heat.sum()

    labels, _ = label(mask)  # 1, 2, ... for the connected parts, 0 for what is left out
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()
    seed = np.where(largest, heat, -1).argmax()  # its strongest cell; attention is never negative
    return Part(heat, largest, int(seed))


# ---- searching ----------------------------------------------------------------------------------


def read_source(sample: Sample, size: int | None, patch: int, mean: tuple[float, ...]) -> Source:
    """The Source of a Sample; ValueError or FileNotFoundError if it cannot be read.

    Args:
        size: side in pixels of the square that the photo is resized to; None leaves its own size,
            which is padded to multiples of the patch, right and below.
        mean: the colour of the padding. The backbone's is 0 when it is normalised.
    """
    if len(os.fsencode(sample.path.name)) > LONGEST_NAME:
        what = f"{sample.path} is a name of more than {LONGEST_NAME} bytes"
        raise ValueError(f"{what}: make it shorter")
    photo = read_image(sample.path, upright=sample.upright)
    scaled = photo
    if size:
        scaled = photo.resize((size, size), Image.Resampling.BILINEAR)

    # -n % patch is what n lacks to the next multiple
    width, height = scaled.size
    padded_size = (height + -height % patch, width + -width % patch)
    images = torch.tensor(mean)[:, None, None].repeat(1, *padded_size)
    images[:, :height, :width] = to_tensor(scaled)
    return Source(photo, images[None], (width, height))


def discover(sample: Sample, source: Source, maps: Callable, cut: Callable) -> Found:
    """Search one Sample.

    The entry holds `box` in pixels of the input, `photo_box` in pixels of the photo, and `seed`.
    Where there is annotation, it also holds `objects`, how many of them have an area, `iou`, the
    largest with any of those, and `correct`, whether that is 0.5 or more.

    Args:
        maps: any callable from images [1, 3, H, W] in 0..1 to maps [1, C, h, w].
        cut: from such a map [C, h, w] to a Part.
    """
    photo, images, inner = source
    feats = maps(images)[0]                                       # [C, h, w]
    cell_width = images.shape[3] / feats.shape[2]
    cell_height = images.shape[2] / feats.shape[1]
    extent = (inner[0] / cell_width, inner[1] / cell_height)

    # cells of nothing but padding are dropped; 1e-9 keeps rounding from adding one
    columns, rows = np.ceil(np.array(extent) - 1e-9).astype(int)
    feats = feats[:, :rows, :columns]
    part = cut(feats)

    box = bounding_box(part.mask, (cell_width, cell_height), inner)
    scale = np.tile(np.divide(inner, photo.size), 2)  # input pixels in one of the photo: x, y, x, y
    entry = {"box": box.tolist(), "photo_box": (box / scale).tolist(), "seed": part.seed}
    if sample.boxes is not None:
        objects = sample.boxes[have_area(sample.boxes, *photo.size)]
        iou = box_iou(box, np.trunc(objects * scale)).max(initial=0)
        entry.update(objects=len(objects), iou=float(iou), correct=bool(iou >= 0.5))
    return Found(sample, photo, feats, part, extent, entry)


def search(
    samples: list[Sample],
    read: Callable[[Sample], Source],
    maps: Callable,
    cut: Callable,
    results: Results | None = None,
    save: Callable[[Found], None] | None = None,
    skip: bool = False,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Search all Samples.

    Args:
        read, maps, cut: `read_source` with its options, and see `discover`.
        results: keeps what was found; a Sample that is in there is not searched again.
        save: called with each Found, before that is kept.
        skip: leave out photos that cannot be searched, instead of raising.
    Returns:
        {name: entry}, entries as from `discover`, and {name: reason} of what was left out.
    """
    predictions = {}
    left_out = {}
    hits = 0
    known = 0
    caught = Exception if skip else ()  # what does not end the run
    bar = progress(samples, unit="image")
    for sample in bar:
        file = f"{sample.name}.json"
        if results and results.has(file):
            entry = read_entry(results.path(file), sample.boxes is not None)
            known += 1
        else:
            try:
                found = discover(sample, read(sample), maps, cut)
            except caught as error:
                left_out[sample.name] = why_skipped(error).removeprefix(f"{sample.path} is ")
                continue
            entry = found.entry
            if save:
                save(found)
            if results:  # last: an image that has an entry has its map and pictures, too
                with results.writing(file) as path:
                    path.write_text(json.dumps(entry))

        predictions[sample.name] = entry
        if "correct" in entry:
            hits += entry["correct"]
            bar.set_postfix_str(f"CorLoc {100 * hits / len(predictions):.2f}", refresh=False)
    if known:
        note(f"{known} of {len(samples)} were searched before: pass --overwrite to repeat that")
    return predictions, left_out


def read_entry(path: Path, annotated: bool) -> dict[str, Any]:
    """The entry of an image that was searched before; ValueError if the file is damaged."""
    needed = {"box", "photo_box", "seed"}
    if annotated:
        needed |= {"iou", "correct", "objects"}
    try:
        entry = json.loads(path.read_text())
        missing = needed - set(entry)
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
        return entry
    except (ValueError, TypeError, RecursionError) as error:  # as after a power cut
        what = f"{path} is damaged ({first_line(error)})"
        raise ValueError(f"{what}: remove it, or pass --overwrite") from error


def corloc(predictions: dict[str, dict]) -> dict[str, Any]:
    """CorLoc of predictions {name: entry}, entries as from `discover`.

    Returns:
        {"corloc" in percent of all images, "found", "images", "without_object": the names of those
        in which nothing can be found}; without annotation {"images"} only.
    """
    images = len(predictions)
    if not all("correct" in entry for entry in predictions.values()):
        return {"images": images}
    found = sum(entry["correct"] for entry in predictions.values())
    without = [name for name, entry in predictions.items() if entry["objects"] == 0]
    return {
        "corloc": 100 * found / images, "found": found, "images": images, "without_object": without,
    }  # fmt: skip


# ---- pictures -----------------------------------------------------------------------------------


def draw(found: Found) -> dict[str, Image.Image]:
    """Three pictures of what was found.

    "attn" is the photo under what was cut, dark to bright; "mask" the photo, dark outside of the
    object; "pred" the photo with the box found in red, and annotated ones in green.
    """
    photo, part = found.photo, found.part
    rows, columns = part.heat.shape
    # the cells that the photo covers; rounding may put them beyond the last one
    covered = (0, 0, min(found.extent[0], columns), min(found.extent[1], rows))
    nearest = Image.Resampling.NEAREST

    # the four corner cells of many ViTs are far from all others, and 2 % of a 14x14 grid: without
    # the outermost 3 % they would leave one colour to the rest
    low, high = np.percentile(part.heat, (3, 97))
    # a flat map has low = high, and np.interp wants them to rise
    scaled = np.interp(part.heat, (low, high + 1e-12), (0, 255)).astype(np.uint8)
    bgr = cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS)          # [h, w, 3]
    colours = Image.fromarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
    heat = Image.blend(photo, colours.resize(photo.size, nearest, box=covered), 0.65)

    dark = photo.point(lambda value: value // 4)
    cells = Image.fromarray(part.mask.astype(np.uint8) * 255)
    mask = Image.composite(photo, dark, cells.resize(photo.size, nearest, box=covered))

    boxes = [(found.entry["photo_box"], "red")]
    if found.sample.boxes is not None:
        boxes = [(box, "lime") for box in found.sample.boxes] + boxes  # red is drawn over green
    boxed = photo.copy()
    pen = ImageDraw.Draw(boxed)
    line = max(2, min(photo.size) // 100)
    for (x0, y0, x1, y1), colour in boxes:
        # Pillow draws the last corner too, and a box ends before x1 and y1
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        pen.rectangle(corners, outline=colour, width=line)
    return {"attn": heat, "mask": mask, "pred": boxed}


def corners_stand_apart(feats: torch.Tensor) -> bool:
    """Whether the corner cells of a map [C, h, w] are unlike all others.

    Unlike means: their cosines to the mean descriptor are all less than half of the median cell's.
    So it is in many ViTs, and TokenCut takes the corners for the object.
    """
    unit = F.normalize(feats.float(), dim=0)                       # [C, h, w]
    mean = F.normalize(unit.mean((1, 2)), dim=0)                   # [C]
    cosine = torch.einsum("chw,c->hw", unit, mean).cpu()
    elsewhere = ~corner_cells(*cosine.shape)
    corners = cosine.masked_fill(elsewhere, -1)
    return bool(corners.max() < 0.5 * cosine.median())


# ---- command line -------------------------------------------------------------------------------


def drop_flags_without_effect(args: argparse.Namespace) -> None:
    """Take NO_EFFECT's flags out of the Namespace, with a note for those that are given."""
    given = []
    for flag, default in NO_EFFECT.items():
        name = flag.removeprefix("--")
        if getattr(args, name) != default:
            given.append(flag)
        delattr(args, name)
    if given:
        note(f"{' '.join(given)} do nothing, here as in the LiFT release")


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """The Samples that --image_path, or --dataset, --dataroot and --set, ask for."""
    annotated = not args.no_evaluation
    samples = []
    if args.image_path is not None:
        samples = read_photos(args.image_path)
    elif args.dataroot and args.dataset == "COCO20k":
        samples = read_coco20k(args.dataroot, annotated)
    elif args.dataroot:
        year = VOC_YEARS[args.dataset]
        samples = read_voc(args.dataroot, year, args.set, args.no_hard, annotated)
    if not samples:
        what = "pass --image_path PHOTOS, or --dataroot FOLDER and a --set with images"
        raise ValueError(f"there is nothing to search: {what}")
    return samples


def choose_cut(args: argparse.Namespace, features: Features) -> tuple[Callable, Callable]:
    """The `maps` and `cut` of `discover`; ValueError where --dinoseg is not possible."""
    if not args.dinoseg:
        binary = not args.no_binary_graph
        return features, partial(tokencut, tau=args.tau, eps=args.eps, binary=binary)

    backbone: Any = features.backbone
    if getattr(backbone.model, "cls_token", None) is None:
        what = f"--dinoseg needs a backbone with a CLS token, {backbone.name} has none"
        raise ValueError(f"{what}: pass another --model_type, or leave out --dinoseg")
    if args.dinoseg_head >= backbone.heads:
        heads = f"0 to {backbone.heads - 1}"
        raise ValueError(f"--dinoseg_head {args.dinoseg_head} does not exist: pass one of {heads}")
    return partial(cls_attention, backbone), partial(dinoseg, head=args.dinoseg_head)


def choose_input(args: argparse.Namespace, features: Features) -> Callable[[Sample], Source]:
    """`read_source` with the options that the flags ask for."""
    if args.imagenet_norm:
        features.backbone.mean, features.backbone.std = IMAGENET
    size = None
    if not args.native:
        size = args.imsize
        features.check_size(size, size)
    return partial(read_source, size=size, patch=features.patch, mean=features.backbone.mean)


def table(scores: dict[str, Any], predictions: dict[str, dict]) -> str:
    """The result of `corloc` as text; without annotation, the boxes in the photos."""
    if "corloc" in scores:
        counts = f"images {scores['images']}   found {scores['found']}"
        return f"{counts}   CorLoc {scores['corloc']:.2f}"
    lines = [f"{'x0':>7} {'y0':>7} {'x1':>7} {'y1':>7}   photo"]
    for name, entry in predictions.items():
        box = " ".join(f"{corner:7.1f}" for corner in entry["photo_box"])
        lines.append(f"{box}   {name}")
    return "\n".join(lines)


def note_without_object(scores: dict[str, Any]) -> None:
    """Name the images of a data set that count as not found whatever the features are."""
    names = scores.get("without_object")
    if not names:
        return
    listed = ", ".join(names[:5])
    if len(names) > 5:
        listed += ", ..."
    text = (
        f"in {len(names)} of {scores['images']} images nothing can be found: nothing is annotated, "
        f"or only crowds, or boxes without an area in the image ({listed}). CorLoc counts them as "
        "not found"
    )
    others = scores["images"] - len(names)
    if others:
        text += f"; without them it is {100 * scores['found'] / others:.2f}"
    note(text)


def open_results(args: argparse.Namespace, facts: dict[str, Any]) -> Results | None:
    """The folder of predictions, unless --no-save_predictions."""
    if not args.save_predictions:
        return None
    # --visualize and --save-feat-dir stay in: an image that was searched before is not searched
    # again, so its pictures and its map must be there
    decisive = deciding(
        args,
        leave_out=("output_dir", "save_predictions", "overwrite", "channel", "patch"),
        paths=("dataroot", "image_path", "save_feat_dir"),
        **facts,
    )
    own = ("*.*.json",)  # as cat.jpg.json
    remedy = "pass --overwrite, or another --output_dir"
    return Results(Path(args.output_dir, "predictions"), decisive, args.overwrite, own, remedy)


def save_found(args: argparse.Namespace, apart: list[str], found: Found) -> None:
    """Write the map and the pictures of an image; note in `apart` if its corners stand apart."""
    name = found.sample.name
    if args.save_feat_dir:
        with replacing(inside(args.save_feat_dir, f"{name}.npy")) as path:
            np.save(path, found.feats.cpu().numpy())
    if not args.visualize:
        return
    for kind, picture in draw(found).items():
        if args.visualize in (kind, "all"):
            with replacing(inside(args.output_dir, f"{name}_{kind}.png")) as path:
                picture.save(path)
    if not args.dinoseg and corners_stand_apart(found.feats):
        apart.append(name)


def write_predictions(path: Path, results: Results, predictions: dict[str, dict]) -> None:
    """Write all entries to one file: a line of the settings, then a line for each image."""
    lines = [{"settings": json.loads(results.path(SETTINGS).read_text())}]
    lines += [{"name": name, **entry} for name, entry in predictions.items()]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def main(args: argparse.Namespace) -> None:
    """Search every image; write predictions and pictures; print CorLoc or the boxes."""
    drop_flags_without_effect(args)
    check_range(args, imsize=1, dinoseg_head=0, tau=0, eps=1e-12)
    if args.dinoseg and (args.lift_path or args.upsample or args.my_extractor):
        others = "--lift_path, --upsample and --my_extractor"
        raise ValueError(f"--dinoseg cuts the attention of a ViT itself: leave out {others}")
    check_one_process()
    samples = read_samples(args)
    own_photos = args.image_path is not None
    if own_photos and args.visualize is None:
        args.visualize = "all"
    features = build_features(args)
    maps, cut = choose_cut(args, features)
    read = choose_input(args, features)
    facts = features.facts()
    results = open_results(args, facts)

    apart: list[str] = []  # names of photos whose corners stand apart
    save = partial(save_found, args, apart)
    skip = own_photos and len(samples) > 1
    predictions, left_out = search(samples, read, maps, cut, results, save, skip)
    for name, reason in left_out.items():
        skipped(name, reason)
    if not predictions:
        raise ValueError(f"none of {len(samples)} photos could be searched: replace or remove them")
    if results:
        write_predictions(Path(args.output_dir, "predictions.jsonl"), results, predictions)

    scores = corloc(predictions)
    print(table(scores, predictions))
    note_without_object(scores)
    if apart:
        note(
            f"in {len(apart)} of these photos the features of the corner cells stand apart from "
            "all others, and what is found may be a corner or all but the corners: "
            "try a higher --tau or, without LiFT, another --facet"
        )
    if own_photos:
        note_left_out(args.image_path)
        scores["skipped"] = left_out
    all_settings = settings(args, device=str(features.backbone.device), **facts)
    report(args, {"settings": all_settings, "results": scores})


if __name__ == "__main__":
    parser().run(main)
