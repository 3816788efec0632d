"""Unsupervised object discovery with TokenCut: CorLoc of dense features.

    python eval_tokencut.py --dataroot ROOT --dataset VOC12 --set trainval --output_dir out/dino
    python eval_tokencut.py --dataroot ROOT --dataset VOC07 --set trainval \\
        --lift_path lift.pth --output_dir out/lift
    python eval_tokencut.py --dataroot ROOT --dataset COCO20k --tau 0.3 --output_dir out/coco
    python eval_tokencut.py --image_path photos/ --output_dir out/photos

The last command needs no annotation: it draws the object that it finds in each photo.

The cells of an image are a graph, joined where their descriptors have a cosine above tau. The
second smallest eigenvector of its normalised cut splits it. The connected part around the
eigenvector's largest entry is the object. An image counts as found if the box of that part has an
IoU of 0.5 or more with any annotated box. CorLoc is the share of images found.

--dinoseg takes the attention of CLS instead: DINO-seg, the baseline of LOST.

ROOT holds VOC2012/VOCdevkit or VOCdevkit. For COCO20k it holds coco_20k_filenames.txt and
COCO/{annotations,images}. The paper takes tau 0.2 for VOC and 0.3 for COCO20k.

Prints CorLoc and, as the last line, the same and all settings as JSON. Each image is a line of
OUTPUT_DIR/predictions.jsonl, and a run that was stopped goes on from it. Of --image_path, what
cannot be read or is too large is named at the end; in a data set it ends the run. 60 photos at 224
with ViT-Ti and LiFT take about 7 s on one CPU core.

Sources: TokenCut, Wang et al., CVPR 2022 (arXiv 2202.11539); LOST, Simeoni et al., BMVC 2021
(arXiv 2109.14279).

Notation: C channels, H W image pixels, h w the grid of a map, N = h*w cells. A box is x0, y0, x1,
y1 in pixels.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from os.path import abspath
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_one_process,
    check_range,
    difference,
    first_line,
    inside,
    record,
    replacing,
    report,
    settings,
    truth,
    write_text,
)

VOC_YEARS = {"VOC07": "2007", "VOC12": "2012"}
PICTURES = ("attn", "mask", "pred")

# flags of the LiFT release that never had an effect on its results, and their defaults
NO_EFFECT = {
    "--arch": "vit_small",
    "--patch_size": 16,
    "--which_features": "k",
    "--k_patches": 100,
    "--resize": None,
}


class NoEffect(argparse.Action):
    """Accept a flag that does nothing, and remember it for a note."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        # a new list: the first one is the parser's default, which the next parse starts from
        namespace.no_effect = [*namespace.no_effect, option_string]


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
    add("--imsize", type=int, default=224, help="side of the square input (default: 224)")
    add("--native", action="store_true", help="each image at its own size, as in TokenCut")
    add("--imagenet_norm", action="store_true", help="ImageNet's mean and std for any backbone")
    add("--tau", type=float, default=0.2, help="cosine above which cells are joined (default: 0.2)")
    add("--eps", type=float, default=1e-5, help="weight of all other edges (default: 1e-5)")
    add("--no-binary-graph", action="store_true", help="weigh joined cells by their cosine")
    add("--dinoseg", action="store_true", help="cut the attention of CLS: the baseline DINO-seg")
    add("--dinoseg_head", type=int, default=4, help="its head (default: 4)")
    add("--output_dir", default="outputs", help="for predictions, pictures (default: outputs)")
    add(
        "--save_predictions", type=truth, nargs="?", const=True, default=True, metavar="True|False",
        help="write OUTPUT_DIR/predictions.jsonl and go on from it (default: True)",
    )  # fmt: skip
    add("--no-save_predictions", dest="save_predictions", action="store_false", help="no file")
    add("--visualize", choices=("attn", "pred", "all"), help="draw what was cut, the box, or all")
    add("--save-feat-dir", help="folder for the map [C, h, w] of each image, as .npy")
    add("--json", help="write the JSON line to this file, too")
    for flag, default in NO_EFFECT.items():
        add(flag, action=NoEffect, default=default, help=argparse.SUPPRESS)
    command.set_defaults(no_effect=[])
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
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from extractor import IMAGENET, build_extractor
from lift import check_lift_args, upsampler
from photos import list_images, naming_root, read_image

SMALL_GRAPH = 256  # cells up to which LAPACK is as fast as Lanczos
MOST = 2**14  # cells of the largest graph: its N^2 weights in float32 take 1 GiB


class Sample(NamedTuple):
    """An image to search."""

    name: str
    path: Path
    boxes: np.ndarray | None = None  # annotated, [n, 4] in its pixels; None: nobody annotated it
    upright: bool = False            # turn it as its EXIF says; annotations count pixels as stored


class Source(NamedTuple):
    """The photo of a Sample, and what the backbone sees of it."""

    photo: Image.Image
    images: torch.Tensor    # [1, 3, H, W], normalised and, right and below, maybe padded
    inner: tuple[int, int]  # width and height of the photo in the images, without padding


class Part(NamedTuple):
    """The object of an image, on its grid."""

    heat: np.ndarray  # what was cut, [h, w]: the eigenvector, or the attention of CLS
    mask: np.ndarray  # the object's cells, [h, w]
    seed: int         # the number of the cell that it grew from


class Found(NamedTuple):
    """What the search of one image gave."""

    sample: Sample
    photo: Image.Image
    feats: torch.Tensor           # its map [C, h, w]
    part: Part
    extent: tuple[float, float]   # columns and rows of cells that the photo covers, not padding
    entry: dict[str, Any]         # see `discover`


# ---- data sets ----------------------------------------------------------------------------------


def first_folder(*candidates: Path) -> Path:
    """The first path that is a folder. Raises FileNotFoundError if none is."""
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " or ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"no folder {tried}: correct --dataroot")


def read_text(path: Path) -> str:
    """The text of a file of a data set, with an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"{path} cannot be read ({first_line(error)})"
        raise ValueError(f"{what}: restore it, or correct --dataroot or --set") from error


def is_hard(thing: ElementTree.Element) -> bool:
    """Whether a VOC object is marked difficult or truncated."""
    difficult = int(thing.findtext("difficult") or 0)
    truncated = int(thing.findtext("truncated") or 0)
    return difficult > 0 or truncated > 0


def voc_boxes(path: Path, no_hard: bool = False) -> np.ndarray:
    """The boxes [n, 4] of a VOC annotation file.

    Args:
        no_hard: leave out difficult and truncated objects.
    Raises:
        ValueError: the file is malformed.
    """
    boxes = []
    try:
        for thing in ElementTree.fromstring(read_text(path)).findall("object"):
            if no_hard and is_hard(thing):
                continue
            box = thing.find("bndbox")
            corners = []
            for key in ("xmin", "ymin", "xmax", "ymax"):
                corners.append(int(float(box.findtext(key))))
            boxes.append(corners)
    # a tag that is missing gives None, hence AttributeError and TypeError
    except (
        ElementTree.ParseError, ArithmeticError, AttributeError, TypeError, ValueError
    ) as error:  # fmt: skip
        what = f"{path} is no VOC annotation ({first_line(error)})"
        raise ValueError(f"{what}: restore it") from error

    # VOC counts pixels from 1 and includes the last one: only the minima lose one
    return np.array(boxes, dtype=float).reshape(-1, 4) - [1, 1, 0, 0]


def read_voc(
    root: str | Path, year: str, image_set: str, no_hard: bool = False, annotated: bool = True
) -> list[Sample]:
    """The Samples of PASCAL VOC, in the order of its list.

    Args:
        no_hard: drop difficult and truncated objects, and images that have no others.
        annotated: read the annotation; without it, as for VOC's own test set, boxes are None.
    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed, or a name leaves the folder.
    """
    root = Path(root)
    home = first_folder(
        root / f"VOC{year}/VOCdevkit/VOC{year}", root / f"VOCdevkit/VOC{year}", root / f"VOC{year}"
    )
    samples = []
    for line in read_text(home / f"ImageSets/Main/{image_set}.txt").splitlines():
        if not line.strip():
            continue
        name = line.split()[0]  # a number may follow, for sets of one class
        path = inside(home / "JPEGImages", f"{name}.jpg")
        boxes = None
        if annotated:
            boxes = voc_boxes(inside(home / "Annotations", f"{name}.xml"), no_hard)
            if no_hard and len(boxes) == 0:
                continue
        samples.append(Sample(f"{name}.jpg", path, boxes))
    return samples


def read_coco(path: Path) -> dict[str, Any]:
    """A COCO annotation file. Raises ValueError if it is none."""
    try:
        content = json.loads(read_text(path))
        for image in content["images"]:
            check_id(image["id"])
            if not isinstance(image["file_name"], str):
                raise TypeError(f"file_name {image['file_name']!r}")
        for annotation in content["annotations"]:
            check_id(annotation["image_id"])
            for key in ("bbox", "iscrowd"):
                if key not in annotation:
                    raise KeyError(key)
        return content
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"{path} is no COCO annotation file ({first_line(repr(error))})"
        raise ValueError(f"{what}: restore or remove it") from error


def check_id(value: Any) -> None:
    """Raise TypeError for what cannot be the id of a COCO image."""
    if not isinstance(value, (int, str)):
        raise TypeError(f"id {value!r}")


def select(instances: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The part of a COCO annotation file that is about the images `names`.

    Raises:
        ValueError: one of them is not in it.
    """
    wanted = set(names)
    images = [image for image in instances["images"] if image["file_name"] in wanted]
    found = {image["file_name"] for image in images}
    missing = wanted - found
    if missing:
        what = f"no {min(missing)} in the COCO annotations ({len(missing)} missing)"
        raise ValueError(f"{what}: take those of train2014")

    ids = {image["id"] for image in images}
    annotations = [item for item in instances["annotations"] if item["image_id"] in ids]
    return {**instances, "images": images, "annotations": annotations}


def coco20k_index(root: Path) -> dict[str, Any]:
    """The annotations of COCO20k, as a dict of images and annotations.

    They are a selection from COCO's own file. That is large, so the selection is kept beside the
    list of names, and made again only where that list has changed.
    """
    listed = root / "coco_20k_filenames.txt"
    kept = root / "instances_train2014_sel20k.json"
    if kept.is_file() and not listed.is_file():
        return read_coco(kept)

    names = [Path(line).name for line in read_text(listed).split()]
    if kept.is_file():
        selection = read_coco(kept)
        selected = {image["file_name"] for image in selection["images"]}
        if selected == set(names):
            return selection

    selection = select(read_coco(root / "COCO/annotations/instances_train2014.json"), names)
    try:
        write_text(kept, json.dumps(selection))
    except OSError as error:  # a folder that others own: slower the next time, but no failure
        print(f"note: it will be built again: {error}", file=sys.stderr)
    return selection


def read_coco20k(root: str | Path) -> list[Sample]:
    """The Samples of COCO20k (Vo et al., 2020), in the order of its annotations.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed, or a name leaves the folder.
    """
    root = Path(root)
    folder = first_folder(root / "COCO/images/train2014")
    index = coco20k_index(root)

    boxes = defaultdict(list)  # {image id: its boxes}
    for annotation in index["annotations"]:
        if annotation["iscrowd"]:
            continue
        try:
            x, y, width, height = map(float, annotation["bbox"])
        except (TypeError, ValueError) as error:
            what = f"the COCO annotations in {root} hold a malformed bbox ({first_line(error)})"
            raise ValueError(f"{what}: restore them") from error
        boxes[annotation["image_id"]].append([x, y, x + width, y + height])

    samples = []
    for image in index["images"]:
        name = image["file_name"]
        corners = np.array(boxes[image["id"]], dtype=float).reshape(-1, 4)
        whole_pixels = np.round(corners)
        samples.append(Sample(name, inside(folder, name), whole_pixels))
    return samples


def read_photos(path: str | Path, output_dir: str | Path) -> list[Sample]:
    """Samples without annotation of a photo, a folder or a pattern.

    A Sample is named by the path of its photo below `naming_root`. Pictures that an earlier run
    wrote into `output_dir` are no photos.

    Raises:
        ValueError: there are none.
    """
    endings = tuple(f"_{kind}.png" for kind in PICTURES)
    output_dir = Path(abspath(output_dir))
    files = {}  # {absolute path: path as list_images gives it}
    for file in list_images(path):
        place = Path(abspath(file))
        ours = place.is_relative_to(output_dir) and place.name.endswith(endings)
        if not ours:
            files[place] = file
    if not files:
        raise ValueError(f"no images at {path} but those of an earlier run: pass photos")

    root = abspath(naming_root(path))
    samples = []
    for place, file in files.items():
        name = place.relative_to(root).as_posix()
        samples.append(Sample(name, file, upright=True))
    return samples


# ---- TokenCut -----------------------------------------------------------------------------------


def affinity(feats: torch.Tensor, tau: float, eps: float = 1e-5, binary: bool = True) -> np.ndarray:
    """The graph of a map: the weights [N, N] of the edges between its cells.

    Args:
        feats: [C, h, w].
        binary: a weight is 1 where the cosine exceeds tau, else eps. Without it, a weight is the
            cosine itself where that reaches tau, else eps, and never less than eps.
    Returns:
        float64 up to SMALL_GRAPH cells, else float32.
    Source: TokenCut, section 3.2.
    """
    cells = F.normalize(feats.float().flatten(1).T, dim=1)         # [N, C]
    cosine = (cells @ cells.T).cpu().numpy()                       # [N, N]
    dtype = np.float32
    if len(cosine) <= SMALL_GRAPH:
        dtype = np.float64
    if binary:
        return np.where(cosine > tau, dtype(1), dtype(eps))
    weights = np.where(cosine < tau, eps, cosine).astype(dtype)
    return weights.clip(eps)  # a tau below eps lets smaller cosines pass


def second_eigenvector(graph: np.ndarray) -> np.ndarray:
    """The second smallest eigenvector v [N] of (D - A) v = lambda D v.

    Graphs of up to SMALL_GRAPH cells go to LAPACK. In them cells often tie for the largest entry,
    so that rounding chooses the object. The rounding of LAPACK depends on neither threads nor
    machine, as far as we saw. Larger graphs go to Lanczos in float32.

    Args:
        graph: A, [N, N]; it may be overwritten. D is the diagonal of its row sums.
    Source: Shi and Malik, 2000.
    """
    if np.ptp(graph) <= 1e-5 * np.abs(graph).max():
        # all edges are equal, and every v is as good as any other: LAPACK's is 1 at the second cell
        v = np.zeros(len(graph))
        v[min(1, len(graph) - 1)] = 1
        return v

    degree = graph.sum(1, dtype=np.float64)
    if len(graph) <= SMALL_GRAPH:
        # the second and third of the eigenvectors, as TokenCut asks for them; the second is wanted,
        # and two cells have no third
        last = min(2, len(graph) - 1)
        _, vectors = eigh(np.diag(degree) - graph, np.diag(degree), subset_by_index=[1, last])
        return vectors[:, 0]

    # D^-1/2 A D^-1/2 has the eigenvalues 1 - lambda, and the eigenvectors D^1/2 v: what is wanted
    # becomes the second largest; in place, as a copy may take another GiB
    scale = (1 / np.sqrt(degree)).astype(np.float32)               # [N]
    graph *= scale[:, None]
    graph *= scale

    # the largest eigenvalue is 1, and its unit eigenvector is known: taking away twice their outer
    # product moves it to -1, and the second largest becomes the largest
    first = np.sqrt(degree / degree.sum()).astype(np.float32)      # [N]

    def product(x):
        return graph @ x - 2 * (first @ x) * first

    operator = LinearOperator(graph.shape, product, dtype=np.float32)
    start = np.random.RandomState(0).standard_normal(len(graph)).astype(np.float32)
    _, vectors = eigsh(operator, k=1, which="LA", v0=start)
    return scale * vectors[:, 0]


def component(mask: np.ndarray, seed: int) -> np.ndarray:
    """The 4-connected part of a mask [h, w] that holds the cell number `seed`, as a mask."""
    labels, _ = label(mask)
    return labels == labels.flat[seed]


def tokencut(feats: torch.Tensor, tau: float = 0.2, eps: float = 1e-5, binary: bool = True) -> Part:
    """The object in a map [C, h, w]; its heat is the eigenvector, largest at the seed.

    Source: TokenCut, section 3.2.
    """
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
    return Part(v.reshape(grid), component(mask.reshape(grid), seed), seed)


def cls_attention(extractor: Any, images: torch.Tensor) -> torch.Tensor:
    """How CLS attends to the cells of images [1, 3, H, W]: [1, heads, h, w], of one layer."""
    height, width = extractor.grid(*images.shape[2:])
    attention = extractor.extract_descriptors(images, facet="attn", include_cls=True)
    of_cls = attention[:, 0, 0]                                # [1, T * heads], heads vary fastest
    by_token = of_cls.unflatten(1, (-1, extractor.heads))      # [1, T, heads]
    cells = by_token[:, -height * width :]                     # without prefix tokens
    return cells.mT.unflatten(2, (height, width))              # [1, heads, h, w]


def dinoseg(attention: torch.Tensor, head: int, mass: float = 0.6) -> Part:
    """The object in attention maps [heads, h, w].

    It is the largest connected part of the cells that hold `mass` of one head's attention.

    Source: LOST, section 4.
    """
    heat = attention[head].cpu().numpy()

    # from the weakest cell on, leave out those that together hold the rest
    order = heat.argsort(axis=None)                                # [N], the weakest first
    held = heat.flat[order].cumsum()                               # by a cell and all weaker ones
    mask = np.zeros(heat.shape, dtype=bool)
    mask.flat[order] = held > (1 - mass) * heat.sum()

    labels, _ = label(mask)  # 1, 2, ... for the connected parts, 0 for what is left out
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()

    # the strongest cell of that part; attention is never negative
    seed = np.where(largest, heat, -1).argmax()
    return Part(heat, largest, int(seed))


# ---- boxes --------------------------------------------------------------------------------------


def bounding_box(mask: np.ndarray, cell: tuple[float, float], limit: tuple[int, int]) -> np.ndarray:
    """The box [4] in pixels around the cells of a mask [h, w].

    Args:
        cell: width and height of a cell in pixels.
        limit: width and height of the photo in pixels, to which the box is clipped.
    """
    cell_width, cell_height = cell
    width, height = limit
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    left, right = columns[0] * cell_width, (columns[-1] + 1) * cell_width
    top, bottom = rows[0] * cell_height, (rows[-1] + 1) * cell_height
    return np.array([left, top, min(right, width), min(bottom, height)])


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Areas [...] of boxes [..., 4]; heights get 1e-7, as in YOLOv5's IoU, which LOST took."""
    width = boxes[..., 2] - boxes[..., 0]
    height = boxes[..., 3] - boxes[..., 1] + 1e-7
    return width * height


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU [n] of a box [4] with boxes [n, 4]; 1e-7 more on the union, as in YOLOv5's."""
    left_top = np.maximum(box[:2], boxes[:, :2])
    right_bottom = np.minimum(box[2:], boxes[:, 2:])
    sides = (right_bottom - left_top).clip(0)  # [n, 2], 0 where they do not overlap
    overlap = sides.prod(axis=1)
    union = box_area(box) + box_area(boxes) - overlap + 1e-7
    return overlap / union


# ---- evaluation ---------------------------------------------------------------------------------


def to_input(
    photo: Image.Image, size: int | None, normalize: Callable, patch: int, most: float
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A photo as the backbone's input.

    Args:
        size: side in pixels of the square it is resized to; None leaves its own size, which is
            padded to multiples of the patch, right and below, with zeros.
        most: how many pixels the photo may have after that.
    Returns:
        images [1, 3, H, W], and the width and height of the photo in them, without padding.
    Raises:
        ValueError: more pixels than `most`.
    """
    if size:
        photo = photo.resize((size, size), Image.Resampling.BILINEAR)
    width, height = photo.size
    check_cells(width, height, most)
    images = normalize(to_tensor(photo))[None]                    # [1, 3, H, W]
    if not size:  # -n % patch is what n lacks to the next multiple
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
    return images, (width, height)


def check_cells(width: int, height: int, most: float) -> None:
    """Raise ValueError for an input of more pixels than `most`, which take MOST cells."""
    if width * height > most:
        raise ValueError(
            f"{width}x{height} pixels are more than {MOST} cells, whose graph takes 1 GiB: "
            "pass a smaller --imsize or --lift_iter, or leave out --native"
        )


def read_source(sample: Sample, prepare: Callable) -> Source:
    """The Source of a Sample.

    Args:
        prepare: see `evaluate`.
    Raises:
        ValueError, FileNotFoundError: the photo cannot be read, or is too large.
    """
    photo = read_image(sample.path, upright=sample.upright)
    try:
        images, inner = prepare(photo)
    except ValueError as error:
        raise ValueError(f"{sample.path}: {error}") from error
    return Source(photo, images, inner)


def discover(sample: Sample, source: Source, maps: Callable, cut: Callable) -> Found:
    """Search one Sample.

    The entry of what is found holds `box` in pixels of the input, `photo_box` in pixels of the
    photo, and `seed`. Where there is annotation, it also holds `iou`, the largest with any
    annotated box, and `correct`, whether that is 0.5 or more.

    Args:
        maps, cut: see `evaluate`.
    Raises:
        ValueError: its features are not finite.
    """
    photo, images, inner = source
    feats = maps(images)[0]                                       # [C, h, w]
    if not torch.isfinite(feats).all():
        what = f"the features of {sample.path} are not finite"
        raise ValueError(f"{what}: pass --dtype float32, or another --lift_path")

    cell_width = images.shape[3] / feats.shape[2]
    cell_height = images.shape[2] / feats.shape[1]
    extent = (inner[0] / cell_width, inner[1] / cell_height)

    # cells of nothing but padding are dropped; 1e-9 keeps rounding from adding one
    columns, rows = np.ceil(np.array(extent) - 1e-9).astype(int)
    part = cut(feats[:, :rows, :columns])

    box = bounding_box(part.mask, (cell_width, cell_height), inner)
    scale_x = inner[0] / photo.width
    scale_y = inner[1] / photo.height
    scale = np.array([scale_x, scale_y, scale_x, scale_y])  # input pixels in one of the photo
    entry = {"box": box.tolist(), "photo_box": (box / scale).tolist(), "seed": part.seed}
    if sample.boxes is not None:
        annotated = np.trunc(sample.boxes * scale)                # [n, 4], in the input
        iou = float(box_iou(box, annotated).max(initial=0))
        entry["iou"] = iou
        entry["correct"] = iou >= 0.5
    return Found(sample, photo, feats, part, extent, entry)


def corloc(predictions: dict[str, dict]) -> dict[str, Any]:
    """CorLoc of predictions {name: entry}, entries as from `discover`.

    Returns:
        {"corloc" in percent, "found", "images"}; without annotation {"images"} only.
    """
    images = len(predictions)
    verdicts = [entry["correct"] for entry in predictions.values() if "correct" in entry]
    if not verdicts:
        return {"images": images}
    found = sum(verdicts)
    return {"corloc": 100 * found / len(verdicts), "found": found, "images": images}


def evaluate(
    samples: list[Sample],
    maps: Callable,
    cut: Callable,
    prepare: Callable,
    done: dict[str, dict] | None = None,
    keep: Callable[[Found], None] | None = None,
    skip: bool = False,
) -> dict[str, Any]:
    """Search all Samples that are not done, and take CorLoc over all.

    Args:
        maps: any callable from images [1, 3, H, W] to maps [1, C, h, w].
        cut: from such a map [C, h, w] to a Part.
        prepare: from a photo to images [1, 3, H, W] and its size (W, H) in there.
        done: {name: entry} of Samples that were searched before.
        keep: called with each Found.
        skip: leave out photos that cannot be read or are too large, instead of raising.
    Returns:
        {"corloc", "found", "images", "predictions": {name: entry}, "skipped"}, entries as from
        `discover`, and a line for each photo that is left out.
    """
    done = done or {}
    predictions = {}
    left = []
    for sample in samples:
        if sample.name in done:
            predictions[sample.name] = done[sample.name]
        else:
            left.append(sample)

    searched_before = len(samples) - len(left)
    skipped = []
    bar = tqdm(left, initial=searched_before, total=len(samples), unit="image", disable=None)
    for sample in bar:
        try:
            source = read_source(sample, prepare)
        except (ValueError, OSError) as error:
            if not skip:
                raise
            skipped.append(str(error))
            continue
        found = discover(sample, source, maps, cut)
        if keep:
            keep(found)
        predictions[sample.name] = found.entry
        if "correct" in found.entry:
            score = corloc(predictions)["corloc"]
            bar.set_postfix_str(f"CorLoc {score:.2f}", refresh=False)
    return {**corloc(predictions), "predictions": predictions, "skipped": skipped}


# ---- predictions on disk ------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    """The JSON objects in the lines of a file; [] if there is no file.

    Lines that are no object are left out: a killed run, or a failing disk, cuts lines off.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def is_box(value: Any) -> bool:
    """Whether a value out of a file is a box: four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    # `discover` writes every side as a float, so whatever else is damage
    return all(type(side) is float and np.isfinite(side) for side in value)


def is_whole(line: dict, annotated: bool) -> bool:
    """Whether a line of a predictions file is as `discover` makes it."""
    keys = {"name", "box", "photo_box", "seed"}
    if annotated:
        keys |= {"iou", "correct"}
    if line.keys() != keys or not isinstance(line["name"], str) or type(line["seed"]) is not int:
        return False
    if not is_box(line["box"]) or not is_box(line["photo_box"]):
        return False
    if not annotated:
        return True
    if type(line["iou"]) is not float:
        return False
    return line["correct"] is (line["iou"] >= 0.5)


def resume(
    path: Path, made_by: dict[str, Any], names: set[str], annotated: bool
) -> dict[str, dict]:
    """Begin a predictions file, or go on with the one that is there.

    Its first line is the record of the settings, every other one the entry of an image. Lines that
    are not whole are dropped, and their images searched again.

    Args:
        made_by: command.record of this run.
        names: of its Samples.
        annotated: whether entries hold `iou` and `correct`.
    Returns:
        {name: entry} of what was there.
    Raises:
        ValueError: other settings made the file.
    """
    remedy = "pass another --output_dir, or remove it to begin again"
    lines = read_lines(path)
    if lines:
        before = lines[0].get("settings")
        if not isinstance(before, dict):
            raise ValueError(f"{path} does not begin with the settings that made it: {remedy}")
        changed = difference(before, made_by)
        if changed:
            raise ValueError(f"{path} was written with {changed}: {remedy}")

    entries = {}
    for line in lines[1:]:
        if is_whole(line, annotated):
            name = line.pop("name")
            entries[name] = line
    taken = names & entries.keys()
    if taken:
        note = f"note: {len(taken)} images are taken from {path}: remove it to begin again"
        print(note, file=sys.stderr)

    # write back what was whole, so that new lines follow whole ones
    text = json.dumps({"settings": made_by}) + "\n"
    for name, entry in entries.items():
        text += json.dumps({"name": name, **entry}) + "\n"
    write_text(path, text)
    return entries


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a file, with an error that names it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        remedy = "free some space or pass another --output_dir"
        raise OSError(f"cannot write {path} ({first_line(error)}): {remedy}") from error


# ---- pictures -----------------------------------------------------------------------------------


def enlarge_cells(
    values: np.ndarray, photo: Image.Image, extent: tuple[float, float]
) -> Image.Image:
    """Cells as a picture of a photo's size.

    Args:
        values: uint8, [h, w] or [h, w, 3].
        extent: columns and rows of cells that the photo covers; the rest is padding.
    """
    rows, columns = values.shape[:2]
    # rounding may put the extent a little beyond the last cell, which Pillow refuses
    covered = (0, 0, min(extent[0], columns), min(extent[1], rows))
    return Image.fromarray(values).resize(photo.size, Image.Resampling.NEAREST, box=covered)


def draw_heat(photo: Image.Image, part: Part, extent: tuple[float, float]) -> Image.Image:
    """The photo under what was cut, dark to bright."""
    # the four corner cells of many ViTs are far from all others, and 2 % of a 14x14 grid: without
    # the outermost 3 % they would leave one colour to the rest
    low, high = np.percentile(part.heat, (3, 97))
    # a flat map has low = high, and np.interp wants them to rise
    scaled = np.interp(part.heat, (low, high + 1e-12), (0, 255)).astype(np.uint8)
    bgr = cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS)          # [h, w, 3]
    colours = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return Image.blend(photo, enlarge_cells(colours, photo, extent), 0.65)


def draw_mask(photo: Image.Image, part: Part, extent: tuple[float, float]) -> Image.Image:
    """The photo, dark outside of the object."""
    dark = photo.point(lambda value: value // 4)
    mask = enlarge_cells(part.mask.astype(np.uint8) * 255, photo, extent)
    return Image.composite(photo, dark, mask)


def draw_box(photo: Image.Image, box: list[float], annotated: np.ndarray | None) -> Image.Image:
    """The photo with the box found in red, annotated ones in green."""
    picture = photo.copy()
    pen = ImageDraw.Draw(picture)
    boxes = []
    if annotated is not None:
        for corners in annotated:
            boxes.append((corners, "lime"))
    boxes.append((box, "red"))  # last: over the others

    width = max(2, min(photo.size) // 100)
    for (x0, y0, x1, y1), colour in boxes:
        # Pillow draws the corner it is given, and a box ends before x1 and y1
        last_x = max(x0, x1 - 1)
        last_y = max(y0, y1 - 1)
        pen.rectangle((x0, y0, last_x, last_y), outline=colour, width=width)
    return picture


def save_pictures(folder: str | Path, what: str, found: Found) -> None:
    """Write NAME_attn.png, NAME_mask.png and NAME_pred.png for "all", else the one named."""
    kinds = (what,)
    if what == "all":
        kinds = PICTURES
    for kind in kinds:
        if kind == "attn":
            picture = draw_heat(found.photo, found.part, found.extent)
        elif kind == "mask":
            picture = draw_mask(found.photo, found.part, found.extent)
        else:
            picture = draw_box(found.photo, found.entry["photo_box"], found.sample.boxes)
        with replacing(inside(folder, f"{found.sample.name}_{kind}.png")) as temporary:
            picture.save(temporary)


def save_map(folder: str | Path, found: Found) -> None:
    """Write the map [C, h, w] as NAME.npy into `folder`."""
    with replacing(inside(folder, f"{found.sample.name}.npy")) as temporary:
        np.save(temporary, found.feats.cpu().numpy())


def corners_stand_apart(feats: torch.Tensor) -> bool:
    """Whether the four corner cells of a map [C, h, w] are unlike all others.

    Unlike means: their cosines to the mean descriptor are all less than half of the median cell's.
    So it is in many ViTs, and TokenCut takes the corners for the object.
    """
    unit = F.normalize(feats.float(), dim=0)                       # [C, h, w]
    mean = F.normalize(unit.mean((1, 2)), dim=0)                   # [C]
    cosine = torch.einsum("chw,c->hw", unit, mean)
    corners = cosine[[0, 0, -1, -1], [0, -1, 0, -1]]               # [4]
    return bool(corners.max() < 0.5 * cosine.median())


# ---- command line -------------------------------------------------------------------------------


def drop_flags_without_effect(args: argparse.Namespace) -> None:
    """Take the flags that do nothing off the settings; a note names those that were given."""
    if args.no_effect:
        flags = " ".join(args.no_effect)
        print(f"note: {flags} do nothing, here as in the LiFT release", file=sys.stderr)
    del args.no_effect
    for flag in NO_EFFECT:
        delattr(args, flag.removeprefix("--"))


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that are out of range or contradict each other."""
    check_range(args, imsize=1, dinoseg_head=0)
    if not 0 <= args.tau < 1:
        raise ValueError(f"--tau {args.tau} is out of range: pass a cosine, 0 <= tau < 1")
    if not 0 < args.eps < 1:
        raise ValueError(f"--eps {args.eps} is out of range: pass 0 < eps < 1")
    if args.dinoseg and (args.lift_path or args.upsample):
        what = "--dinoseg cuts the backbone's own attention"
        raise ValueError(f"{what}: leave out --lift_path and --upsample")
    if args.dinoseg and args.my_extractor:
        raise ValueError("--dinoseg cuts the attention of a ViT: leave out --my_extractor")
    if args.no_hard and (args.image_path or args.dataset == "COCO20k"):
        raise ValueError("only VOC marks hard objects: leave out --no_hard")
    if not args.image_path and not args.dataroot:
        raise ValueError("no data: pass --dataroot FOLDER, or --image_path PHOTOS")
    check_one_process()


def check_dinoseg(extractor: Any, head: int) -> None:
    """Raise ValueError if a backbone has no CLS, whose attention is cut, or not this head."""
    if getattr(extractor.model, "cls_token", None) is None:
        what = f"--dinoseg needs a backbone with a CLS token, {extractor.name} has none"
        raise ValueError(f"{what}: pass another --model_type, or leave out --dinoseg")
    if head >= extractor.heads:
        heads = f"0 to {extractor.heads - 1}"
        raise ValueError(f"--dinoseg_head {head} is out of range: pass one of the heads {heads}")


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """The Samples that --image_path, or --dataset, --dataroot and --set, ask for.

    Raises:
        ValueError: there are none.
    """
    if args.image_path:
        return read_photos(args.image_path, args.output_dir)
    annotated = not args.no_evaluation
    if args.dataset in VOC_YEARS:
        year = VOC_YEARS[args.dataset]
        samples = read_voc(args.dataroot, year, args.set, args.no_hard, annotated)
    else:
        samples = read_coco20k(args.dataroot)
        if not annotated:
            samples = [sample._replace(boxes=None) for sample in samples]
    if not samples:
        what = f"{args.dataset} in {args.dataroot} has no images"
        raise ValueError(f"{what}: correct --dataroot or --set, or leave out --no_hard")
    return samples


def table(results: dict[str, Any], predictions: dict[str, dict]) -> str:
    """The results of `evaluate` as text: CorLoc, or without annotation the boxes in the photos."""
    if "corloc" in results:
        counts = f"images {results['images']}   found {results['found']}"
        return f"{counts}   CorLoc {results['corloc']:.2f}"
    lines = [f"{'x0':>7} {'y0':>7} {'x1':>7} {'y1':>7}   photo"]
    for name, entry in predictions.items():
        box = " ".join(f"{corner:7.1f}" for corner in entry["photo_box"])
        lines.append(f"{box}   {name}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Search every image; write predictions and pictures; print CorLoc and, as JSON, settings."""
    drop_flags_without_effect(args)
    check(args)
    samples = read_samples(args)
    check_lift_args(args)
    extractor = build_extractor(args)
    up = upsampler(args, extractor)

    def maps(images):                              # [1, 3, H, W] normalised -> [1, C, h, w]
        if args.dinoseg:
            return cls_attention(extractor, images)
        return up(images, extractor(images))

    if args.dinoseg:
        check_dinoseg(extractor, args.dinoseg_head)
        cut = partial(dinoseg, head=args.dinoseg_head)
    else:
        cut = partial(tokencut, tau=args.tau, eps=args.eps, binary=not args.no_binary_graph)

    size = args.imsize
    if args.native:
        size = None
    elif size % extractor.patch:
        what = f"--imsize {size} is no multiple of the patch ({extractor.patch})"
        raise ValueError(f"{what}: pass one, or --native")
    normalize = extractor.normalize
    if args.imagenet_norm:
        normalize = Normalize(*IMAGENET)

    # a cell of the map takes step / factor pixels a side, so MOST cells are this many pixels
    most = MOST * (extractor.step / up.factor) ** 2
    if size:  # then all photos are alike: told before the first
        check_cells(size, size, most)
    prepare = partial(to_input, size=size, normalize=normalize, patch=extractor.patch, most=most)

    # Left out: --channel and --patch, which are only checked, and where the output goes.
    # --visualize and --save-feat-dir do not decide what is found, and stay in: an image that has a
    # line is not searched again, so its pictures and its map must be there.
    facts = {**extractor.facts(), **up.facts()}
    made_by = record(
        args,
        leave_out=("output_dir", "save_predictions", "json", "channel", "patch"),
        paths=("dataroot", "image_path", "save_feat_dir"),
        **facts,
    )
    done = {}
    file = Path(args.output_dir, "predictions.jsonl")
    if args.save_predictions:
        names = {sample.name for sample in samples}
        done = resume(file, made_by, names, annotated=samples[0].boxes is not None)

    pictures = args.visualize
    if args.image_path and not pictures:
        pictures = "all"
    apart = []  # names of the photos whose corners stand apart

    def keep(found):
        if args.save_feat_dir:
            save_map(args.save_feat_dir, found)
        if pictures:
            save_pictures(args.output_dir, pictures, found)
            rows, columns = found.part.mask.shape
            if not args.dinoseg and corners_stand_apart(found.feats[:, :rows, :columns]):
                apart.append(found.sample.name)
        if args.save_predictions:  # last: an image that has a line has its map and pictures, too
            append_line(file, {"name": found.sample.name, **found.entry})

    results = evaluate(samples, maps, cut, prepare, done, keep, skip=bool(args.image_path))
    predictions = results.pop("predictions")
    skipped = results.pop("skipped")
    if len(samples) == 1 and skipped:
        raise ValueError(skipped[0])
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if args.image_path:
        results["unreadable"] = len(skipped)
    print(table(results, predictions))
    if apart:
        print(
            f"note: in {len(apart)} of these photos the features of the corner cells stand apart "
            "from all others, and what is found may be a corner or all but the corners: "
            "try a higher --tau or, without LiFT, another --facet",
            file=sys.stderr,
        )
    used = settings(args, device=str(extractor.device), **facts)
    report({"settings": used, "results": results}, args.json)

    left = [sample for sample in samples if sample.name not in done]
    if skipped and len(skipped) == len(left):
        raise ValueError(f"none of {len(left)} photos could be read: replace or remove them")


if __name__ == "__main__":
    parser().run(main)
