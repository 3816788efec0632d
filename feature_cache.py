"""Frozen features of photos, computed by the backbone or read from a file of an earlier run.

    photos = cached(photos, extractor, "cache/", views=4, batch_size=64, workers=2)
    images, feats = images_and_features(batch_of_photos, extractor)

Only train_lift.py uses it, for --cache_features. A photo of 448 pixels takes 1 MB with a ViT-S/16
for each of its --views, and twice as much with --match.

Notation: B batch, C channels, p patch size, S pixels of the square photos.
"""

import hashlib
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
        batch: from objectives.Photos, or from Cached, which has features instead of the full image.
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
            pixels = to_device(batch[level], extractor.device)
            image = extractor.normalize(pixels.float() / 255)
        images.append(image)
        if key in batch:  # in float16
            feats.append(to_device(batch[key], extractor.device).float())
        else:
            feats.append(extractor(image))
    return images, feats


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Bring images, or feature maps, to the device; pairs [B, 2, C, h, w] become [2B, C, h, w]."""
    if images.ndim == 5:
        images = images.flatten(0, 1)
    return images.to(device, non_blocking=True)


# ---- the file -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Cached(Dataset):
    """The items of objectives.Photos with their features, read from one file.

    An item has "f1", "f2" and "f3", the features at S, S/2 and S/4, in place of "full": [C, h, w],
    or [2, C, h, w] where photos have warped copies.

    A view is one pass over all photos, each with its own random colours and warp. The file holds
    view after view, with a row for each photo, and epoch e reads view e % views.
    """

    path: Path
    row_type: np.dtype
    views: int
    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        # opened anew for each photo, since a mapped file cannot be handed to a loader's worker
        rows = np.memmap(self.path, self.row_type, "r")
        row = rows[epoch % self.views * len(self) + index]
        # copies, so that the file can be closed
        return {name: torch.from_numpy(np.array(row[name])) for name in self.row_type.names}


def make_row_type(extractor: DenseExtractor, imsize: int, warp: bool) -> np.dtype:
    """The numpy type of one photo's row: its images but the largest, features, mark and warp."""
    pair = (2,) if warp else ()  # goes in front of a shape
    sizes = (imsize, imsize // 2, imsize // 4)
    fields = []
    for level, size in zip(LEVELS[1:], sizes[1:]):
        fields.append((level, "u1", (*pair, 3, size, size)))
    for features, size in zip(FEATURES, sizes):
        side = size // extractor.patch
        fields.append((features, "f2", (*pair, extractor.channels, side, side)))
    fields.append(("broken", "i8", ()))
    if warp:
        fields.append(("warp", "f4", (2, 3)))
    return np.dtype(fields)


def cache_key(photos, extractor: DenseExtractor) -> str:
    """A hash of all that the features depend on: weights, precision, files, augmentation.

    Files count by name, size and date, not by folder: a data set may be moved.
    """
    files = []
    for path in photos.paths:
        status = path.stat()
        files.append((path.name, status.st_size, status.st_mtime_ns))
    # the seed does not count where nothing is random
    seed = photos.seed if photos.is_random() else None
    random = (photos.jitter is not None, photos.warp, seed)

    backbone = (sorted(extractor.facts().items()), (extractor.mean, extractor.std))
    key = (*backbone, files, photos.imsize, photos.downsample, random)
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

    Args:
        photos: an objectives.Photos.
        folder: where the file is, or goes. Its name is a hash of all that it depends on.
        views: how many passes over the photos it holds, see Cached.
        waits: let another process compute them, and wait for its file.
    Raises:
        OSError: the features do not fit on the disk, or cannot be written.
        ValueError: they are not finite, or not in float16.
    """
    row_type = make_row_type(extractor, photos.imsize, photos.warp)
    path = Path(folder) / f"{cache_key(photos, extractor)}_{views}.features"
    dataset = Cached(path, row_type, views, photos.paths)
    while waits and not path.exists():
        time.sleep(0.5)
    if not path.exists():
        fill(dataset, photos, extractor, batch_size, workers)
    return dataset


def fill(dataset: Cached, photos, extractor: DenseExtractor, batch_size: int, workers: int) -> None:
    """Write the file of a data set, whole or not at all; a thread writes while others compute."""
    keys = list(np.ndindex(dataset.views, len(photos)))  # (view, index), in the file's order
    batches = [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]

    folder = dataset.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    needed = len(keys) * dataset.row_type.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"the features take {needed // 2**20} MiB, and {folder} has {free // 2**20} free"
        raise OSError(f"{what}: make room or pass another --cache_features")

    loader = Loader(photos, workers, batches, pin_memory=extractor.device.type == "cuda")
    writing: deque[Future] = deque()
    with replacing(dataset.path) as part, open(part, "wb") as file, ThreadPoolExecutor(1) as writer:
        for batch in progress(loader, total=len(batches), unit="batch", desc="features"):
            _, feats = images_and_features(batch, extractor)
            rows = (file, dataset.row_type, batch, feats, extractor)
            writing.append(writer.submit(write_rows, *rows))
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
    """Append the rows of one batch; ValueError for features that are not finite in float16."""
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
