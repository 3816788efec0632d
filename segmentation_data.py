"""Data sets for semantic segmentation: photos, and the class of every pixel.

    data = choose_data("camvid", Path("CamVid"))
    photos = read_photos(data, Path("CamVid"), "test", size=(176, 240), squash=True)
    image, classes = photos[(0, False)]                # [3, H, W] in 0..1, and [H, W]

Layouts of a data set's folder, ROOT:

    camvid      ROOT/train, ROOT/trainannot, and so on: SegNet's copy, where 11 is void
    voc         ROOT or ROOT/VOCdevkit/VOC2012: JPEGImages, SegmentationClass, ImageSets; the masks
                of trainaug are in SegmentationClassAug
    ade20k      ROOT: images/training, annotations/training, and so on, of the scene parsing
                benchmark with 150 classes; 0 is void
    cityscapes  ROOT: leftImg8bit/train/CITY, and gtFine/train/CITY with ..._gtFine_labelIds.png
    folder      ROOT/SPLIT/images and ROOT/SPLIT/masks, or ROOT/images/SPLIT and ROOT/masks/SPLIT

Notation: H W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import InterpolationMode, center_crop, resize, to_tensor

from files import inside
from photos import list_images, read_image

IGNORED = -1  # class of a pixel that does not count
UNKNOWN = -2  # of a label that the data set does not have
LABELS = 2**16  # as many as 16 bits can hold

Key = tuple[int, bool]  # the number of a photo, and whether it is flipped


# ---- data sets ----------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A photo, its mask, and the name of the label map that is predicted for it."""

    name: str
    image: Path
    mask: Path


class DataSet(NamedTuple):
    """The classes and splits of a data set, and where its files are."""

    classes: list[str]  # names
    labels: list[int]   # in the masks: of class 0, of class 1, ...
    void: list[int]     # labels of pixels that do not count
    train: str          # splits
    test: str
    find: Callable[[Path, str], list[Sample]]  # (root, split) -> its photos


def first_of(*choices: Path) -> Path:
    """The first of some folders or files that exists; FileNotFoundError if none does."""
    for path in choices:
        if path.exists():
            return path
    remedy = "pass the data set's folder as --dataroot, and a split that it has"
    raise FileNotFoundError(f"there is no {choices[-1]}: {remedy}")


def with_masks(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[Sample]:
    """All images below a folder, each with its mask: a PNG of the same path below another.

    The names may differ in how they end before the suffix: in `image_end` and `mask_end`.
    """
    samples = []
    for image in list_images(images):
        name = image.relative_to(images).with_suffix("").as_posix()
        mask = masks / f"{name.removesuffix(image_end)}{mask_end}.png"
        samples.append(Sample(name, image, mask))
    return samples


# one function for each of the layouts at the top of this file


def find_camvid(root: Path, split: str) -> list[Sample]:
    return with_masks(first_of(root / split), first_of(root / f"{split}annot"))


def find_voc(root: Path, split: str) -> list[Sample]:
    home = first_of(
        root / "VOC2012/VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012", root / "VOC2012", root
    )
    names = first_of(home / "ImageSets/Segmentation" / f"{split}.txt")
    masks = home / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    samples = []
    for name in names.read_text().split():
        image = inside(home / "JPEGImages", f"{name}.jpg")
        samples.append(Sample(name, image, masks / f"{name}.png"))
    return samples


def find_ade20k(root: Path, split: str) -> list[Sample]:
    home = first_of(root / "ADEChallengeData2016", root)
    return with_masks(first_of(home / "images" / split), first_of(home / "annotations" / split))


def find_cityscapes(root: Path, split: str) -> list[Sample]:
    images = first_of(root / "leftImg8bit" / split)
    masks = first_of(root / "gtFine" / split)
    return with_masks(images, masks, "_leftImg8bit", "_gtFine_labelIds")


def find_folder(root: Path, split: str) -> list[Sample]:
    images = first_of(root / split / "images", root / "images" / split)
    masks = first_of(root / split / "masks", root / "masks" / split)
    return with_masks(images, masks)


CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
)
CITYSCAPES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
    "person rider car truck bus train motorcycle bicycle"
)
CITY_LABELS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CITY_VOID = [label for label in (*range(34), 255) if label not in CITY_LABELS]
ADE20K = [f"class {label}" for label in range(1, 151)]

DATASETS = {
    "camvid": DataSet(CAMVID.split(), [*range(11)], [11], "train", "test", find_camvid),
    "voc": DataSet(VOC.split(), [*range(21)], [255], "train", "val", find_voc),
    "ade20k": DataSet(ADE20K, [*range(1, 151)], [0], "training", "validation", find_ade20k),
    "cityscapes": DataSet(
        CITYSCAPES.split(), CITY_LABELS, CITY_VOID, "train", "val", find_cityscapes
    ),
    "folder": DataSet([], [], [255], "train", "val", find_folder),
}


def choose_data(
    name: str, root: Path, classes: int | None = None, void: list[int] | None = None
) -> DataSet:
    """The DataSet of a name in DATASETS, whose folder is `root`.

    Args:
        classes, void: how many classes "folder" has, and which labels do not count there.
    Raises:
        ValueError: `classes` is missing, or given for a data set that has its own.
    """
    data = DATASETS[name]
    wrong = ""
    if name == "folder" and classes is None:
        wrong = "--dataset folder needs the number of classes: pass --classes K"
    elif name != "folder" and (classes, void) != (None, None):
        wrong = f"{name} has its own classes: leave --classes and --ignore out"
    if wrong:
        raise ValueError(wrong)

    if classes is not None:
        labels = [*range(classes)]
        data = data._replace(classes=[f"class {label}" for label in labels], labels=labels)
    if void is not None:
        data = data._replace(void=void)

    if name == "ade20k":  # a file names its classes, which not every copy has
        path = first_of(root / "ADEChallengeData2016", root) / "objectInfo150.txt"
        if path.is_file():
            lines = path.read_text().splitlines()[1:151]
            names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
            data = data._replace(classes=names)
    return data


def class_table(data: DataSet) -> np.ndarray:
    """The class of every label: 0 to K - 1, IGNORED or UNKNOWN. [LABELS]"""
    table = np.full(LABELS, UNKNOWN, np.int16)
    table[data.labels] = np.arange(len(data.labels))
    table[[label for label in data.void if 0 <= label < LABELS]] = IGNORED
    return table


# ---- photos and masks ---------------------------------------------------------------------------


def voc_palette() -> np.ndarray:
    """The colours [256, 3] in which VOC shows labels: bit 3k + c of a label is bit 7 - k of c."""
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for place in range(8):
        for channel in range(3):
            bit = (labels >> (3 * place + channel)) & 1
            colours[:, channel] += bit << (7 - place)
    return colours


def check_mask(path: Path) -> None:
    """Raise FileNotFoundError unless there is a mask."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no label map {path}: add it, or remove its photo")


def read_mask(path: Path) -> np.ndarray:
    """The labels [H, W] of a mask: indexed, grey of 1, 8 or 16 bits, or in the colours of VOC.

    Raises:
        FileNotFoundError, ValueError: in one line that names the file, for anything else.
    """
    check_mask(path)
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} cannot be read ({error}): replace it") from error
    if image.mode in ("1", "L", "P", "I", "I;16"):
        return np.array(image).astype(np.int64)

    colours = np.array(image.convert("RGB")).astype(np.int64)      # [H, W, 3]
    grey = colours[..., 0]
    if (colours == grey[..., None]).all():
        return grey
    digits = np.array([1, 256, 256**2])  # a colour as one number
    distinct, places = np.unique(colours @ digits, return_inverse=True)
    palette = (voc_palette() @ digits).tolist()
    labels = []
    for colour in distinct.tolist():
        if colour not in palette:
            rgb = (colour % 256, colour // 256 % 256, colour // 256**2)
            what = f"{path} is a colour picture with {rgb}, the colour of no VOC label"
            raise ValueError(f"{what}: store the number of its class in every pixel")
        labels.append(palette.index(colour))
    return np.array(labels)[places].reshape(grey.shape)


def as_classes(labels: np.ndarray, table: np.ndarray, path: Path) -> Tensor:
    """The classes [H, W] int16 of a mask's labels, by class_table. ValueError for other labels."""
    within = labels.clip(0, len(table) - 1)
    classes = np.where(labels == within, table[within], UNKNOWN)
    unknown = labels[classes == UNKNOWN]
    if len(unknown):
        known = np.flatnonzero(table >= 0)
        void = np.flatnonzero(table == IGNORED).tolist()
        has = f"{path} has label {unknown[0]}"
        what = f"{has}, but classes are {known[0]} to {known[-1]}, void {void}"
        raise ValueError(f"{what}: correct it, or pass --classes and --ignore that fit")
    return torch.from_numpy(classes)


@dataclass(eq=False)
class Photos(Dataset):
    """The photos of a split with their classes; a key is (number, flipped)."""

    samples: list[Sample]
    table: np.ndarray      # see class_table
    size: tuple[int, int]  # (H, W) in pixels
    squash: bool           # resize both sides; else the shorter side, and crop at the centre

    def __len__(self) -> int:
        return len(self.samples)

    def resized(self, picture: Any, how: InterpolationMode) -> Any:
        """A photo, or classes [1, H, W], at the size of the evaluation."""
        size = list(self.size)
        if self.squash:
            return resize(picture, size, how)
        return center_crop(resize(picture, size[0], how), size)

    def full_classes(self, number: int) -> Tensor:
        """The classes of a photo's mask at its own size."""
        path = self.samples[number].mask
        return as_classes(read_mask(path), self.table, path)

    def small(self, classes: Tensor) -> Tensor:
        """The classes of a mask at the size of the evaluation. [H, W]"""
        return self.resized(classes[None], InterpolationMode.NEAREST_EXACT)[0]

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """The photo [3, H, W] in 0..1 and its classes [H, W]. ValueError if a file is unusable."""
        number, flipped = key
        sample = self.samples[number]
        photo = read_image(sample.image, upright=False)  # masks count the pixels as stored
        classes = self.full_classes(number)
        height, width = classes.shape
        if photo.size != (width, height):
            what = f"{sample.mask} is {width}x{height}, its photo {photo.width}x{photo.height}"
            raise ValueError(f"{what}: make them of one size")

        image = to_tensor(self.resized(photo, InterpolationMode.BILINEAR))
        classes = self.small(classes)
        if flipped:
            return image.flip(-1), classes.flip(-1)
        return image, classes


def read_photos(
    data: DataSet, root: Path, split: str, size: tuple[int, int], squash: bool
) -> Photos:
    """The Photos of a split. FileNotFoundError or ValueError if photos or masks are missing."""
    samples = data.find(root, split)
    for sample in samples:
        check_mask(sample.mask)
    return Photos(samples, class_table(data), size, squash)
