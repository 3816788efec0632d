"""The images that eval_tokencut.py searches, and what is compared with their annotation.

    samples = read_voc("VOC", "2012", "trainval")
    samples = read_coco20k("COCO20k")
    samples = read_photos("photos/")

Notation: a box is x0, y0, x1, y1 in pixels.
"""

import json
from contextlib import suppress
from os.path import abspath
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from files import first_line, inside, write_text
from photos import list_images, naming_root, ours


class Sample(NamedTuple):
    """An image to search."""

    name: str
    path: Path
    boxes: np.ndarray | None = None  # annotated, [n, 4] in its pixels; None: nobody annotated it
    upright: bool = False            # turn it as its EXIF says; annotations count pixels as stored


def first_folder(*candidates: Path) -> Path:
    """The first of some paths that is a folder; FileNotFoundError if none is."""
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " or ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"there is no folder {tried}: correct --dataroot")


def read_text(path: Path) -> str:
    """The text of a file of a data set; ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"{path} cannot be read ({first_line(error)})"
        raise ValueError(f"{what}: restore it, or correct --dataroot or --set") from error


# ---- PASCAL VOC ---------------------------------------------------------------------------------


def is_hard(thing: ElementTree.Element) -> bool:
    """Whether a VOC object is marked difficult or truncated; files may leave that open."""
    for key in ("difficult", "truncated"):
        mark = thing.findtext(key)
        if mark not in (None, "", "Unspecified") and float(mark) > 0:
            return True
    return False


def voc_boxes(path: Path, no_hard: bool = False) -> np.ndarray:
    """The boxes [n, 4] of a VOC annotation file, maybe without hard ones; ValueError if damaged."""
    boxes = []
    try:
        for thing in ElementTree.fromstring(read_text(path)).findall("object"):
            if no_hard and is_hard(thing):
                continue
            box: Any = thing.find("bndbox")
            keys = ("xmin", "ymin", "xmax", "ymax")
            boxes.append([int(float(box.findtext(key))) for key in keys])
    # a tag that is missing gives None, hence AttributeError and TypeError
    except (
        ElementTree.ParseError, AttributeError, OverflowError, TypeError, ValueError
    ) as error:  # fmt: skip
        what = f"{path} is not a VOC annotation ({first_line(error)})"
        raise ValueError(f"{what}: restore or correct it") from error

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
        FileNotFoundError, ValueError: a file is missing or damaged, or a name leaves the folder.
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
        if not no_hard or boxes is None or len(boxes):
            samples.append(Sample(f"{name}.jpg", path, boxes))
    return samples


# ---- COCO20k ------------------------------------------------------------------------------------


def read_coco(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a COCO annotation file and its `coco_boxes`; ValueError if it is malformed."""
    try:
        content = json.loads(read_text(path))
        return content, coco_boxes(content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"{path} is not a COCO annotation file ({first_line(repr(error))})"
        raise ValueError(f"{what}: restore or remove it") from error


def coco_boxes(content: dict[str, Any]) -> dict[str, np.ndarray]:
    """{file name: boxes [n, 4] of its objects} of COCO's annotations, without crowds."""
    corners: dict[Any, list] = {image["id"]: [] for image in content["images"]}  # boxes by id
    for annotation in content["annotations"]:
        if not annotation["iscrowd"] and annotation["image_id"] in corners:
            x, y, width, height = map(float, annotation["bbox"])
            corners[annotation["image_id"]].append([x, y, x + width, y + height])

    boxes = {}
    for image in content["images"]:
        whole_pixels = np.round(np.array(corners[image["id"]], dtype=float))
        boxes[image["file_name"]] = whole_pixels.reshape(-1, 4)
    return boxes


def select(instances: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The part of a COCO annotation file about the images `names`; ValueError if one is missing."""
    wanted = set(names)
    images = [image for image in instances["images"] if image["file_name"] in wanted]
    missing = wanted - {image["file_name"] for image in images}
    if missing:
        what = f"there is no {min(missing)} in the COCO annotations ({len(missing)} missing)"
        raise ValueError(f"{what}: take those of train2014")

    ids = {image["id"] for image in images}
    annotations = [item for item in instances["annotations"] if item["image_id"] in ids]
    return {**instances, "images": images, "annotations": annotations}


def coco20k_boxes(root: Path) -> dict[str, np.ndarray]:
    """`coco_boxes` of COCO20k: of those images of COCO's own file that are in its list of names.

    COCO's file is large, so the selection is kept beside the list, until that changes.
    """
    listed = root / "coco_20k_filenames.txt"
    kept = root / "instances_train2014_sel20k.json"
    boxes = None
    if kept.is_file():
        _, boxes = read_coco(kept)
        if not listed.is_file():
            return boxes

    names = [Path(line).name for line in read_text(listed).split()]
    if boxes is None or boxes.keys() != set(names):
        instances, _ = read_coco(root / "COCO/annotations/instances_train2014.json")
        selection = select(instances, names)
        boxes = coco_boxes(selection)
        with suppress(OSError):  # in a folder that others own it is not kept
            write_text(kept, json.dumps(selection))
    return boxes


def read_coco20k(root: str | Path, annotated: bool = True) -> list[Sample]:
    """The Samples of COCO20k (Vo et al., 2020); arguments and errors as for `read_voc`."""
    folder = first_folder(Path(root, "COCO/images/train2014"))
    samples = []
    for name, boxes in coco20k_boxes(Path(root)).items():
        samples.append(Sample(name, inside(folder, name), boxes if annotated else None))
    return samples


# ---- photos -------------------------------------------------------------------------------------


def read_photos(path: str | Path) -> list[Sample]:
    """Samples of a photo, a folder or a pattern, named by their paths below `naming_root`.

    Pictures that an earlier run wrote are left out.
    """
    root = abspath(naming_root(path))
    samples = []
    for file in list_images(path):
        if not ours(file):
            name = Path(abspath(file)).relative_to(root).as_posix()
            samples.append(Sample(name, file, upright=True))
    return samples


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


def have_area(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Which boxes [n, 4] have an area inside an image: one that ends before it begins has none."""
    inner = boxes.clip(0, [width, height, width, height])
    return np.all(inner[:, 2:] > inner[:, :2], axis=1)             # [n]


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Areas [...] of boxes [..., 4]; heights get 1e-7, as in YOLOv5's IoU, which LOST took."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1] + 1e-7)


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU [n] of a box [4] with boxes [n, 4]; 1e-7 more on the union, as in YOLOv5's."""
    left_top = np.maximum(box[:2], boxes[:, :2])
    right_bottom = np.minimum(box[2:], boxes[:, 2:])
    overlap = (right_bottom - left_top).clip(0).prod(axis=1)       # [n]
    union = box_area(box) + box_area(boxes) - overlap + 1e-7
    return overlap / union
