"""Frozen features of a batch of photos, computed by the backbone or read from a file made before.

    photos = cached(photos, extractor, "cache/", views=4, batch_size=64, workers=2)
    images, feats = images_and_features(batch_of_photos, extractor)

A backbone that is frozen gives the same features in every epoch, so training can read them instead:
train_lift.py --cache_features. A photo of 448 pixels takes 1 MB with a ViT-S/16, for each of its
views (see --views), and twice as much with --match.

Notation: B batch, C channels, p patch size, S pixels of the square photos.
"""

import hashlib
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from command import progress
from extractor import DenseExtractor
from features import check_finite
from files import replacing
from loading import Loader

# A photo at S, S/2 and S/4 pixels, and the backbone's features of each, as a batch names them
LEVELS = ("full", "half", "quarter")
FEATURES = ("f1", "f2", "f3")

IN_FLIGHT = 4  # batches that were computed and are not yet written


def images_and_features(
    batch: dict[str, Tensor], extractor: DenseExtractor, levels: int = 3
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The normalised images of a batch and their frozen features, on the extractor's device.

    Args:
        batch: of objectives.Photos, or of Cached, which lacks the full image and has the features.
        levels: how many sizes are wanted, the largest first.
    Returns:
        Two lists with an entry for each size: images [B, 3, S, S], [B, 3, S/2, S/2] and so on, and
        features [B, C, S/p, S/p] and so on. An image that the batch lacks is None. Where photos
        come with warped copies there are 2B of each: a photo, its copy, the next photo, ...
    """
    images: list[Tensor | None] = []
    feats = []
    for level, key in zip(LEVELS[:levels], FEATURES[:levels]):
        image = None
        if level in batch:
            pixels = one_after_the_other(batch[level], extractor.device)
            image = extractor.normalize(pixels.float() / 255)
        images.append(image)

        if key in batch:
            stored = one_after_the_other(batch[key], extractor.device)
            feats.append(stored.float())  # they are kept in float16
        else:
            feats.append(extractor(image))
    return images, feats


def one_after_the_other(images: Tensor, device: torch.device) -> Tensor:
    """Bring images, or feature maps, to the device; pairs [B, 2, C, h, w] become [2B, C, h, w]."""
    if images.ndim == 5:
        images = images.flatten(0, 1)
    return images.to(device, non_blocking=True)


# ---- the file -----------------------------------------------------------------------------------


class Cached(Dataset):
    """The items of objectives.Photos with their features, read from one file.

    An item has what Photos gives except "full". In its place come "f1", "f2" and "f3", the features
    at S, S/2 and S/4: [C, h, w], or [2, C, h, w] where photos have warped copies.

    A view is one pass over all photos, each with its own random colours and warp. The file holds a
    row for each (view, photo), all of one size, view by view. Epoch e reads view e % views.
    """

    def __init__(self, path: Path, row_type: np.dtype, views: int, paths: list[Path]):
        self.path = path
        self.row_type = row_type
        self.views = views
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        # opened anew for each photo, since a mapped file cannot be handed to a loader's worker
        rows = np.memmap(self.path, self.row_type, "r")
        view = epoch % self.views
        row = rows[view * len(self) + index]
        # copies, so that the file can be closed
        return {name: torch.from_numpy(np.array(row[name])) for name in self.row_type.names}


def make_row_type(extractor: DenseExtractor, imsize: int, warp: bool = False) -> np.dtype:
    """The numpy type of one photo's row.

    It holds the two smaller images (uint8), the three feature maps (float16) and the mark "broken"
    of objectives.Photos (int64). With `warp` images and maps are pairs, of the photo and its copy,
    and the warp itself (float32) comes last.
    """
    pair: tuple[int, ...] = ()  # goes in front of a shape
    if warp:
        pair = (2,)
    half = imsize // 2
    quarter = imsize // 4
    fields = [
        ("half", "u1", (*pair, 3, half, half)),
        ("quarter", "u1", (*pair, 3, quarter, quarter)),
    ]
    for features, size in zip(FEATURES, (imsize, half, quarter)):
        side = size // extractor.patch
        fields.append((features, "f2", (*pair, extractor.channels, side, side)))
    fields.append(("broken", "i8", ()))
    if warp:
        fields.append(("warp", "f4", (2, 3)))
    return np.dtype(fields)


def cache_key(photos, extractor: DenseExtractor) -> str:
    """A hash of all that the features depend on: weights, precision, files, augmentation.

    Files count by name, size and date, not by folder: a data set may be moved.
    `photos` is an objectives.Photos.
    """
    facts = sorted(extractor.facts().items())
    normalization = (extractor.mean, extractor.std)
    files = []
    for path in photos.paths:
        status = path.stat()
        files.append((path.name, status.st_size, status.st_mtime_ns))
    seed = None  # does not count where nothing is random
    if photos.is_random():
        seed = photos.seed
    random = (photos.jitter is not None, photos.warp, seed)

    key = (facts, normalization, files, photos.imsize, photos.downsample, random)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


def cached(
    photos,
    extractor: DenseExtractor,
    folder: str | Path,
    views: int,
    batch_size: int,
    workers: int,
    waits: bool = False,
) -> Cached:
    """The features of photos, computed now, or read from a file of an earlier run.

    The file is named by a hash of everything that it depends on, and is there as soon as it is
    complete.

    Args:
        photos: an objectives.Photos.
        folder: where the file is, or goes.
        views: how many passes over the photos it holds, see Cached.
        waits: let another process compute them, and wait for its file.
    Raises:
        OSError: the features do not fit on the disk, or cannot be written.
        ValueError: they are not finite, be it only in float16.
    """
    row_type = make_row_type(extractor, photos.imsize, photos.warp)
    path = Path(folder) / f"{cache_key(photos, extractor)}_{views}.features"
    dataset = Cached(path, row_type, views, photos.paths)
    if waits:
        while not path.exists():
            time.sleep(0.5)
        return dataset
    if path.exists():
        return dataset

    keys = []  # in the order of the file: see Cached
    for view in range(views):
        keys += [(view, index) for index in range(len(photos))]
    batches = [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]

    path.parent.mkdir(parents=True, exist_ok=True)
    needed = len(keys) * row_type.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        what = f"the features take {needed // 2**20} MiB, and {folder} has {free // 2**20} free"
        raise OSError(f"{what}: make room or pass another --cache_features")
    with replacing(path) as part:
        with open(part, "wb") as file:
            fill(file, row_type, photos, extractor, batches, workers)
    return dataset


def fill(
    file: BinaryIO,
    row_type: np.dtype,
    photos,
    extractor: DenseExtractor,
    batches: list[list[tuple[int, int]]],
    workers: int,
) -> None:
    """Write the rows of all batches of keys (view, index).

    A thread writes a batch while the next ones are computed.

    Raises:
        OSError: they cannot be written.
        ValueError: features are not finite, be it only in float16.
    """
    loader = Loader(photos, workers, batches, pin_memory=extractor.device.type == "cuda")
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(1) as writer:
        for batch in progress(loader, total=len(batches), unit="batch", desc="features"):
            _, feats = images_and_features(batch, extractor)
            writing.append(writer.submit(write_rows, file, row_type, batch, feats, extractor))
            if len(writing) > IN_FLIGHT:
                writing.popleft().result()
        for written in writing:
            written.result()


def write_rows(
    file: BinaryIO,
    row_type: np.dtype,
    batch: dict[str, Tensor],
    feats: list[Tensor],
    extractor: DenseExtractor,
) -> None:
    """Append the rows of one batch of photos and their features.

    Raises:
        ValueError: features are not finite, be it only in float16.
    """
    values: dict[str, Any] = dict(batch)
    for name, value in zip(FEATURES, feats):
        # on the device, which is faster at it, and half as much is then to be fetched
        half = value.half()
        if not half.isfinite().all():
            check_finite(value, extractor.dtype)
            what = "the features are too large for the float16 of the file"
            raise ValueError(f"{what}: leave out --cache_features")
        values[name] = half

    rows = np.empty(len(batch["broken"]), row_type)
    for name in row_type.names:
        # a photo and its copy are one row: [2B, C, h, w] becomes [B, 2, C, h, w]
        rows[name] = values[name].cpu().numpy().reshape(rows[name].shape)
    file.write(memoryview(rows.view(np.uint8)))
