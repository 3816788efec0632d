"""Unsupervised object discovery with TokenCut (Wang et al., CVPR 2022, arXiv 2202.11539): CorLoc of dense features.

    python eval_tokencut.py --dataroot ROOT --dataset VOC12 --set trainval --model_type dino_vits16 --output_dir out/dino
    python eval_tokencut.py --dataroot ROOT --dataset VOC07 --lift_path lift.pth --tau 0.2 --output_dir out/lift
    python eval_tokencut.py --dataroot ROOT --dataset COCO20k --lift_path lift.pth --tau 0.3 --output_dir out/coco
    python eval_tokencut.py --image_path photos/ --lift_path lift.pth --output_dir out/photos      # pictures, no ground truth

The cells of an image are a graph, joined where their descriptors have a cosine above tau. The second smallest eigenvector of
its normalised cut splits it; the connected part around the eigenvector's largest entry is the object. An image counts as
found if the box of that part has an IoU of 0.5 or more with any annotated box; CorLoc is the share of images found.
--dinoseg takes the attention of CLS instead (DINO-seg, the baseline of LOST, Simeoni et al., BMVC 2021, arXiv 2109.14279).

ROOT holds VOC2012/VOCdevkit or VOCdevkit; for COCO20k coco_20k_filenames.txt and COCO/{annotations,images}. Prints CorLoc and,
as the last line, the same and all settings as JSON. OUTPUT_DIR/predictions.jsonl gets a line an image, and a run that was
stopped goes on from it. 60 photos at 224 with ViT-Ti and LiFT take about 7 s on one CPU core.
"""

import json
import sys
from argparse import BooleanOptionalAction
from collections import defaultdict
from functools import partial
from os.path import commonpath
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

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

from extractor import IMAGENET, Command, ViTExtractor, add_backbone_args, list_images, read_image, replacing, settings
from lift import add_lift_args, upsampler

VOC_YEARS = {"VOC07": "2007", "VOC12": "2012"}
SMALL = 256  # cells up to which LAPACK is as fast as Lanczos
MOST = 2**14  # cells of the largest graph: its affinity takes 1 GiB


class Sample(NamedTuple):
    """An image to search; `boxes` [n, 4] are the annotated x0, y0, x1, y1 in its pixels, None where nobody annotated."""

    name: str
    path: Path
    boxes: np.ndarray | None = None


class Part(NamedTuple):
    """The object of an image on its grid: what it was cut by [h, w], the object's cells [h, w], the cell it grew from."""

    heat: np.ndarray
    mask: np.ndarray
    seed: int


# ---- data sets ------------------------------------------------------------------------------------------------------


def first_folder(*candidates):
    """The first path that is a folder. Raises FileNotFoundError if none is."""
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {' or '.join(map(str, candidates))}: correct --dataroot")


def read_text(path):
    """The text of a file of a data set, with an error that names it."""
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or correct --dataroot or --set") from error


def voc_boxes(path, no_hard=False):
    """Boxes [n, 4] of a VOC annotation file; its pixels count from 1, so minima lose one. ValueError for a malformed file."""
    try:
        objects = ElementTree.fromstring(read_text(path)).findall("object")
        if no_hard:
            objects = [o for o in objects if not any(int(o.findtext(key) or 0) for key in ("difficult", "truncated"))]
        corners = [[int(float(o.find("bndbox").findtext(key))) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    except (ElementTree.ParseError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no VOC annotation ({error}): restore it") from error
    return np.array(corners, float).reshape(-1, 4) - [1, 1, 0, 0]


def read_voc(root, year, image_set, no_hard=False):
    """The Samples of PASCAL VOC. `no_hard` drops difficult and truncated objects, and images that have no others."""
    root = Path(root)
    home = first_folder(*(root / f"{extra}VOCdevkit/VOC{year}" for extra in (f"VOC{year}/", "")), root / f"VOC{year}")
    names = [line.split()[0] for line in read_text(home / f"ImageSets/Main/{image_set}.txt").splitlines() if line.strip()]
    samples = [
        Sample(f"{name}.jpg", home / f"JPEGImages/{name}.jpg", voc_boxes(home / f"Annotations/{name}.xml", no_hard))
        for name in names
    ]
    return [sample for sample in samples if len(sample.boxes) or not no_hard]


def read_coco(path):
    """A COCO annotation file. Raises ValueError if it is none."""
    try:
        content = json.loads(read_text(path))
        for kind, keys in {"images": {"id", "file_name"}, "annotations": {"image_id", "bbox", "iscrowd"}}.items():
            if any(not keys <= record.keys() for record in content[kind]):
                raise ValueError(f"{kind} without one of {', '.join(sorted(keys))}")
        return content
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no COCO annotation file ({error!r}): restore or remove it") from error


def select(instances, names):
    """The part of a COCO annotation file that is about the images `names`. ValueError if it lacks one of them."""
    wanted = set(names)
    images = [image for image in instances["images"] if image["file_name"] in wanted]
    ids = {image["id"] for image in images}
    if len(ids) < len(wanted):
        missing = min(wanted - {image["file_name"] for image in images})
        raise ValueError(f"no {missing} in the COCO annotations ({len(wanted) - len(ids)} missing): take those of train2014")
    return instances | {"images": images, "annotations": [a for a in instances["annotations"] if a["image_id"] in ids]}


def coco20k_index(root):
    """COCO20k's annotations: the selection beside the list of names, else built from the full file and kept there."""
    listed, kept = root / "coco_20k_filenames.txt", root / "instances_train2014_sel20k.json"
    if kept.is_file() and not listed.is_file():
        return read_coco(kept)
    names = [Path(line).name for line in read_text(listed).split()]
    if kept.is_file():
        selection = read_coco(kept)
        if {image["file_name"] for image in selection["images"]} == set(names):
            return selection
    selection = select(read_coco(root / "COCO/annotations/instances_train2014.json"), names)
    try:
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(selection))
    except OSError as error:
        print(f"note: it will be built again: {error}", file=sys.stderr)
    return selection


def read_coco20k(root):
    """The Samples of COCO20k (Vo et al., 2020), in the order of its annotations, without crowd boxes."""
    folder = first_folder(Path(root) / "COCO/images/train2014")
    index, boxes = coco20k_index(Path(root)), defaultdict(list)
    for annotation in index["annotations"]:
        if not annotation["iscrowd"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
    try:
        arrays = [np.array(boxes[image["id"]], float).reshape(-1, 4) for image in index["images"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the COCO annotations in {root} hold a malformed bbox ({error}): restore them") from error
    corners = [np.round(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])) for xywh in arrays]
    names = [image["file_name"] for image in index["images"]]
    return [Sample(name, folder / name, box) for name, box in zip(names, corners)]


def read_photos(path):
    """Samples without annotation of a photo, a folder or a pattern, named by their path below what they share."""
    paths = list_images(path)
    top = commonpath([p.parent for p in paths])
    return [Sample(p.relative_to(top).as_posix(), p) for p in paths]


# ---- TokenCut -------------------------------------------------------------------------------------------------------


def affinity(feats, tau, eps=1e-5, binary=True):
    """The graph of a map [C, h, w] (TokenCut, section 3.2): [N, N] numpy, 1 where the cosine exceeds tau, else eps.

    Not `binary`: the cosine itself where it reaches tau. float64 up to SMALL cells, else float32.
    """
    cells = F.normalize(feats.float().flatten(1).T, dim=1)       # [N, C]
    cos = (cells @ cells.T).cpu().numpy()                        # [N, N]
    dtype = np.float64 if len(cos) <= SMALL else np.float32
    if binary:
        return np.where(cos > tau, dtype(1), dtype(eps))
    return np.where(cos < tau, eps, cos).astype(dtype).clip(eps)


def second_eigenvector(graph):
    """The second smallest v of (D - A) v = lambda D v (Shi and Malik, 2000), A = `graph` [N, N], which is overwritten.

    Small graphs go to LAPACK: cells often tie for the largest entry, LAPACK's rounding then chooses the object, and in small
    matrices it does not depend on threads or machine as far as we saw. Larger ones go to Lanczos in float32. Where all edges
    are equal every v is as good as any other: it is 1 at the second cell, which is what LAPACK makes of it.
    """
    if np.ptp(graph) <= 1e-5 * np.abs(graph).max():
        return np.eye(1, len(graph), min(1, len(graph) - 1))[0]
    degree = graph.sum(1, dtype=np.float64)
    if len(graph) <= SMALL:
        return eigh(np.diag(degree) - graph, np.diag(degree), subset_by_index=[1, 2])[1][:, 0]
    scale = (1 / np.sqrt(degree)).astype(np.float32)
    graph *= scale[:, None]
    graph *= scale                                               # D^-1/2 A D^-1/2, eigenvalues 1 - lambda
    first = np.sqrt(degree / degree.sum()).astype(np.float32)    # its eigenvector to 1, moved to -1 below

    def product(x):
        return graph @ x - 2 * (first @ x) * first

    start = np.random.RandomState(0).standard_normal(len(graph)).astype(np.float32)
    return scale * eigsh(LinearOperator(graph.shape, product, dtype=np.float32), k=1, which="LA", v0=start)[1][:, 0]


def component(mask, seed):
    """The 4-connected part of a mask [h, w] that holds the cell number `seed`, as a mask."""
    labels, _ = label(mask)
    return labels == labels.flat[seed]


def tokencut(feats, tau=0.2, eps=1e-5, binary=True):
    """The object in a map [C, h, w] (TokenCut, section 3.2): a Part, its heat the eigenvector, largest at the seed."""
    v = second_eigenvector(affinity(feats, tau, eps, binary))
    tie = 1e-5 if v.dtype == np.float32 else 0  # float32 does not tell a tie from rounding: the first cell wins
    seed = int(np.argmax(np.abs(v) >= (1 - tie) * np.abs(v).max()))
    mask = v > v.mean()
    if not mask[seed]:
        v, mask = -v, ~mask
    grid = feats.shape[1:]
    return Part(v.reshape(grid), component(mask.reshape(grid), seed), seed)


def cls_attention(extractor, images):
    """Attention [1, heads, h, w] of CLS to the cells of images [1, 3, H, W], in the extractor's layer."""
    grid = extractor.grid(*images.shape[2:])
    rows = extractor.extract_descriptors(images, facet="attn", include_cls=True)[:, 0, 0]    # [1, T * heads]
    return rows.unflatten(1, (-1, extractor.heads))[:, -grid[0] * grid[1] :].mT.unflatten(2, grid)


def dinoseg(attention, head, mass=0.6):
    """The object in attention maps [heads, h, w]: the largest part of the cells that hold `mass` of a head's attention."""
    if not 0 <= head < len(attention):
        raise ValueError(f"--dinoseg_head {head} is out of range: pass one of the heads 0 to {len(attention) - 1}")
    heat = attention[head].cpu().numpy()
    order = heat.argsort(axis=None)
    mask = np.zeros(heat.shape, bool)
    mask.flat[order] = heat.flat[order].cumsum() > (1 - mass) * heat.sum()
    labels, _ = label(mask)
    largest = labels == 1 + np.bincount(labels[mask] - 1).argmax()
    return Part(heat, largest, int(np.where(largest, heat, -1).argmax()))


# ---- boxes ----------------------------------------------------------------------------------------------------------


def bounding_box(mask, cell, limit):
    """The box x0, y0, x1, y1 in pixels around a mask [h, w] of cells of `cell` (W, H) pixels, clipped to `limit` (W, H)."""
    x, y = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
    return np.minimum(np.array([x[0], y[0], x[-1] + 1, y[-1] + 1]) * np.tile(cell, 2), np.tile(limit, 2))


def box_iou(box, boxes):
    """IoU [n] of a box [4] with boxes [n, 4], all x0, y0, x1, y1; 1e-7 on heights and union, as YOLOv5's, which LOST took."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    inter = sides.clip(0).prod(1)
    area, areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1] + 1e-7) for b in (box, boxes))
    return inter / (area + areas - inter + 1e-7)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def to_input(photo, size, normalize, patch, most):
    """A PIL photo -> (images [1, 3, H, W], its size (W, H) in there): a square of `size`, or, if None, itself.

    Its own size is padded to multiples of the patch, right and below, with zeros. ValueError for more than `most` pixels.
    """
    if size:
        photo = photo.resize((size, size), Image.Resampling.BILINEAR)
    if photo.width * photo.height > most:
        raise ValueError(
            f"{photo.width}x{photo.height} pixels are more than {MOST} cells, whose graph takes 1 GiB: pass a smaller --imsize "
            "or --lift_iter, or leave out --native"
        )
    padding = (0, -photo.width % patch, 0, -photo.height % patch) if not size else (0, 0)
    return F.pad(normalize(to_tensor(photo))[None], padding), photo.size


def discover(sample, maps, cut, prepare):
    """Search one Sample: (photo, map, Part, extent, entry).

    `extent` (w, h) are the cells that the photo covers; cells of nothing but padding are dropped. The entry holds `box` in
    pixels of the input, `photo_box` in those of the photo, `seed`, and where there is annotation `iou`, the largest, and
    `correct`.
    """
    photo = read_image(sample.path)
    images, inner = prepare(photo)
    feats = maps(images)[0]
    if not torch.isfinite(feats).all():
        raise ValueError(f"the features of {sample.path} are not finite: pass --dtype float32")
    cell = np.divide(images.shape[:1:-1], feats.shape[:0:-1])
    extent = inner / cell
    columns, rows = np.ceil(extent - 1e-9).astype(int)
    part = cut(feats[:, :rows, :columns])
    box, scale = bounding_box(part.mask, cell, inner), np.tile(np.divide(inner, photo.size), 2)
    entry = {"box": box.tolist(), "photo_box": (box / scale).tolist(), "seed": part.seed}
    if sample.boxes is not None:
        iou = float(box_iou(box, np.trunc(sample.boxes * scale)).max(initial=0))
        entry |= {"iou": iou, "correct": iou >= 0.5}
    return photo, feats, part, extent, entry


def corloc(predictions):
    """{"corloc" in percent, "found", "images"} of {name: entry}; for photos without annotation the number of images only."""
    verdicts = [entry["correct"] for entry in predictions.values() if "correct" in entry]
    counts = {"corloc": 100 * sum(verdicts) / len(verdicts), "found": sum(verdicts)} if verdicts else {}
    return counts | {"images": len(predictions)}


def evaluate(samples, maps, cut, prepare, predictions=None, show=None):
    """Search all Samples: {"corloc", "found", "images", "predictions": {name: entry}}, entries as from `discover`.

    `maps` is any callable from images [1, 3, H, W] to maps [1, C, h, w], `cut` from such a map [C, h, w] to a Part, `prepare`
    from a photo to (images, its size in there). Samples that `predictions` (a dict, or a Predictions) holds are not searched
    again. `show(sample, photo, map, part, extent, entry)` is called for each one that is.
    """
    predictions = {} if predictions is None else predictions
    left = [sample for sample in samples if sample.name not in predictions]
    bar = tqdm(left, initial=len(samples) - len(left), total=len(samples), unit="image")
    for sample in bar:
        photo, feats, part, extent, entry = discover(sample, maps, cut, prepare)
        if show:
            show(sample, photo, feats, part, extent, entry)
        predictions[sample.name] = entry
        if "correct" in entry:
            bar.set_postfix_str(f"CorLoc {corloc(predictions)['corloc']:.2f}", refresh=False)
    return corloc(predictions) | {"predictions": dict(predictions)}


class Predictions(dict):
    """{name: entry}, of which every new one is at once a line of a file, after a first line with the settings.

    What the file holds already is there from the start, but for lines that a killed run cut off. Raises ValueError for a file
    of other settings.
    """

    def __init__(self, path, settings):
        super().__init__()
        self.path, lines = Path(path), read_lines(path)
        if lines and lines[0].get("settings") != settings:
            raise ValueError(f"{path} was written with other settings: pass another --output_dir, or remove it to begin again")
        keys = {"name", "box", "photo_box", "seed"}
        whole = [line for line in lines[1:] if line.keys() in (keys, keys | {"iou", "correct"})]
        self.update((line["name"], line) for line in whole if isinstance(line["name"], str))
        if self:
            print(f"note: {len(self)} images are taken from {path}: remove it to begin again", file=sys.stderr)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [{"settings": settings}, *self.values()]))

    def __setitem__(self, name, entry):
        super().__setitem__(name, {"name": name} | entry)
        with open(self.path, "a") as file:
            file.write(json.dumps(self[name]) + "\n")


def read_lines(path):
    """The JSON objects in the lines of a file, without lines that are none; [] if there is no file."""
    text, lines = Path(path).read_text(errors="replace") if Path(path).is_file() else "", []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in lines if isinstance(line, dict)]


# ---- pictures -------------------------------------------------------------------------------------------------------


def over(values, photo, extent):
    """Cells as uint8 [h, w] or [h, w, 3], of which the photo covers `extent` (w, h), as a picture of its size."""
    box = (0, 0, *np.minimum(extent, values.shape[1::-1]))
    return Image.fromarray(values).resize(photo.size, Image.Resampling.NEAREST, box=box)


def draw_heat(photo, part, extent):
    """The photo under what was cut, dark to bright."""
    scaled = np.interp(part.heat, (part.heat.min(), part.heat.max() + 1e-12), (0, 255)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return Image.blend(photo, over(colours, photo, extent), 0.65)


def draw_mask(photo, part, extent):
    """The photo, dark outside of the object."""
    dark = photo.point(lambda value: value // 4)
    return Image.composite(photo, dark, over(part.mask.astype(np.uint8) * 255, photo, extent))


def draw_box(photo, box, truth):
    """The photo with the box found in red, annotated ones in green."""
    picture = photo.copy()
    pen, width = ImageDraw.Draw(picture), max(2, min(photo.size) // 100)
    for corners, colour in [(t, "lime") for t in truth] + [(box, "red")]:
        x0, y0, x1, y1 = corners
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
    return picture


def save_pictures(folder, what, sample, photo, part, extent, entry):
    """Write NAME_attn.png, NAME_mask.png and NAME_pred.png, or the one that `what` names, into `folder`."""
    pictures = {
        "attn": lambda: draw_heat(photo, part, extent),
        "mask": lambda: draw_mask(photo, part, extent),
        "pred": lambda: draw_box(photo, entry["photo_box"], [] if sample.boxes is None else sample.boxes),
    }
    for kind in pictures if what == "all" else [what]:
        with replacing(Path(folder, f"{sample.name}_{kind}.png")) as temporary:
            pictures[kind]().save(temporary)


def save_map(folder, sample, feats):
    """Write the map [C, h, w] as NAME.npy into `folder`."""
    with replacing(Path(folder, f"{sample.name}.npy")) as temporary:
        np.save(temporary, feats.cpu().numpy())


# ---- command line ---------------------------------------------------------------------------------------------------


def parser():
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", default="datasets", help="folder that holds the data sets (default: datasets)")
    add("--dataset", choices=(*VOC_YEARS, "COCO20k"), default="VOC07", help="data set (default: VOC07)")
    add("--set", default="trainval", help="image set of VOC (default: trainval); COCO20k is one fixed list")
    add("--no_hard", action="store_true", help="leave out VOC objects marked difficult or truncated")
    add("--image_path", help="a photo, folder or pattern to search instead of a data set")
    add("--imsize", type=int, default=224, help="side of the square input in pixels (default: 224)")
    add("--native", action="store_true", help="each image at its own size instead, padded to the patch, as in TokenCut")
    add("--imagenet_norm", action="store_true", help="ImageNet's mean and std for every backbone, as in the LiFT release")
    add("--tau", type=float, help="cosine above which two cells are joined (default: 0.2; COCO20k: 0.3)")
    add("--eps", type=float, default=1e-5, help="weight of all other edges (default: 1e-5)")
    add("--no-binary-graph", action="store_true", help="weigh joined cells by their cosine")
    add("--dinoseg", action="store_true", help="cut the attention of CLS instead: the baseline DINO-seg")
    add("--dinoseg_head", type=int, default=4, help="its head (default: 4)")
    add("--output_dir", default="outputs", help="folder for predictions and pictures (default: outputs)")
    add("--save_predictions", action=BooleanOptionalAction, default=True, help="write and resume OUTPUT_DIR/predictions.jsonl")
    add("--visualize", choices=("attn", "pred", "all"), help="pictures: what was cut, the box, or both and the mask")
    add("--save-feat-dir", help="folder for the map [C, h, w] of each image, as .npy")
    add("--json", help="write the JSON line to this file, too")
    add_backbone_args(command)
    add_lift_args(command)
    return command


def check(args):
    """Raise ValueError for flags that are out of range or contradict each other."""
    if not 0 <= args.tau < 1:
        raise ValueError(f"--tau {args.tau} is out of range: pass a cosine, 0 <= tau < 1")
    if not 0 < args.eps < 1:
        raise ValueError(f"--eps {args.eps} is out of range: pass 0 < eps < 1")
    if args.imsize < 1:
        raise ValueError(f"--imsize {args.imsize} is out of range: pass a multiple of the patch")
    if args.dinoseg and (args.lift_path or args.upsample):
        raise ValueError("--dinoseg cuts the backbone's own attention: leave out --lift_path and --upsample")
    if args.no_hard and (args.image_path or args.dataset == "COCO20k"):
        raise ValueError("only VOC marks hard objects: leave out --no_hard")


def read_samples(args):
    """The Samples that --image_path, or --dataset, --dataroot and --set, ask for. Raises ValueError if there are none."""
    if args.image_path:
        return read_photos(args.image_path)
    voc = args.dataset in VOC_YEARS
    samples = read_voc(args.dataroot, VOC_YEARS[args.dataset], args.set, args.no_hard) if voc else read_coco20k(args.dataroot)
    if not samples:
        raise ValueError(f"{args.dataset} in {args.dataroot} has no images: correct --dataroot or --set, or leave out --no_hard")
    return samples


def table(results, predictions):
    """The results of `evaluate` as text: CorLoc, or where nobody annotated the box of each photo in its pixels."""
    if "corloc" in results:
        return f"images {results['images']}   found {results['found']}   CorLoc {results['corloc']:.2f}"
    boxes = {name: " ".join(f"{corner:7.1f}" for corner in entry["photo_box"]) for name, entry in predictions.items()}
    return "\n".join(f"{box}   {name}" for name, box in boxes.items())


def main(args):
    if args.tau is None:
        args.tau = 0.3 if args.dataset == "COCO20k" and not args.image_path else 0.2
    check(args)
    samples = read_samples(args)
    extractor = ViTExtractor.from_args(args)
    up = upsampler(args, extractor)

    def maps(images):  # [1, 3, H, W] normalised -> [1, C, h, w]
        return cls_attention(extractor, images) if args.dinoseg else up(images, extractor(images))

    def show(sample, photo, feats, part, extent, entry):
        if args.save_feat_dir:
            save_map(args.save_feat_dir, sample, feats)
        if what:
            save_pictures(args.output_dir, what, sample, photo, part, extent, entry)

    what = args.visualize or ("all" if args.image_path else None)
    cut = partial(dinoseg, head=args.dinoseg_head)
    if not args.dinoseg:
        cut = partial(tokencut, tau=args.tau, eps=args.eps, binary=not args.no_binary_graph)
    prepare = partial(
        to_input, size=None if args.native else args.imsize, patch=extractor.patch,
        normalize=Normalize(*IMAGENET) if args.imagenet_norm else extractor.normalize,
        most=MOST * (extractor.stride / up.factor) ** 2,
    )  # fmt: skip
    decisive = {key: value for key, value in settings(args).items() if key not in ("json", "device", "output_dir", "versions")}
    predictions = Predictions(Path(args.output_dir, "predictions.jsonl"), decisive) if args.save_predictions else {}
    results = evaluate(samples, maps, cut, prepare, predictions, show)
    found = results.pop("predictions")
    print(table(results, found))
    line = json.dumps({"settings": settings(args), "results": results})
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    parser().run(main)
