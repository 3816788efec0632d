"""Frozen features of a batch of photos, computed by the backbone or read from a file made before.

    photos = cached(photos, extractor, "cache/", views=4, batch_size=64, workers=2)
    images, feats = images_and_features(batch_of_photos, extractor)

A backbone that is frozen gives the same features in every epoch, so training can read them instead:
train_lift.py --cache_features. A photo of 448 pixels takes 1 MB with a ViT-S/16, for each of its
views (4 with --augment, see --views), and twice as much with --match.

Notation: B batch, C channels, p patch size, S pixels of the square photos.
"""

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from extractor import DenseExtractor

# A photo at S, S/2 and S/4 pixels, and the backbone's features of each, as a batch names them
LEVELS = ("full", "half", "quarter")
FEATURES = ("f1", "f2", "f3")


def images_and_features(
    batch: dict[str, Tensor], extractor: DenseExtractor, levels: int = 3
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The normalised images of a batch and their frozen features, on the extractor's device.

    Args:
        batch: of train_lift.Photos, or of Cached, which lacks the full image and has the features.
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


def check_finite(feats: Tensor, extractor: DenseExtractor) -> None:
    """Raise ValueError for features that nothing can be learned from, nor measured with."""
    if feats.isfinite().all():
        return
    remedy = "pass --dtype float32"
    if extractor.dtype == torch.float32:
        remedy = "pass other weights"
    precision = str(extractor.dtype).removeprefix("torch.")
    raise ValueError(f"the features of {extractor.name} are not finite in {precision}: {remedy}")


def one_after_the_other(images: Tensor, device: torch.device) -> Tensor:
    """Bring images, or feature maps, to the device; pairs [B, 2, C, h, w] become [2B, C, h, w]."""
    if images.ndim == 5:
        images = images.flatten(0, 1)
    return images.to(device, non_blocking=True)


# ---- the file -----------------------------------------------------------------------------------


class Cached(Dataset):
    """The items of train_lift.Photos with their features, read from one file.

    An item has what Photos gives except "full". In its place come "f1", "f2" and "f3", the features
    at S, S/2 and S/4: [C, h, w], or [2, C, h, w] where photos have warped copies.

    A view is one pass over all photos, each with its own random colours and warp. The file holds a
    record for each (view, photo), all of one size, view by view. Epoch e reads view e % views.
    """

    def __init__(self, path: Path, record: np.dtype, views: int, paths: list[Path]):
        self.path = path
        self.record = record
        self.views = views
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        # opened anew for each photo, since a mapped file cannot be handed to a loader's worker
        records = np.memmap(self.path, self.record, "r")
        view = epoch % self.views
        row = records[view * len(self) + index]
        # copies, so that the file can be closed
        return {name: torch.from_numpy(np.array(row[name])) for name in self.record.names}


def record_type(extractor: DenseExtractor, imsize: int, warp: bool = False) -> np.dtype:
    """The numpy type of one photo's record.

    It holds the two smaller images (uint8), the three feature maps (float16) and the mark "broken"
    of train_lift.Photos (int64). With `warp` images and maps are pairs, of the photo and its copy,
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
        fields.append((features, "f2", (*pair, extractor.width, side, side)))
    fields.append(("broken", "i8", ()))
    if warp:
        fields.append(("warp", "f4", (2, 3)))
    return np.dtype(fields)


def cache_key(photos, extractor: DenseExtractor) -> str:
    """A hash of all that the features depend on: weights, precision, files, augmentation.

    `photos` is a train_lift.Photos.
    """
    facts = sorted(extractor.facts().items())
    normalization = (extractor.mean, extractor.std)
    files = []
    for path in photos.paths:
        status = path.stat()
        files.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    seed = None  # does not count where nothing is random
    if photos.is_random():
        seed = photos.seed
    random = (photos.jitter is not None, photos.warp, seed)

    key = (facts, normalization, files, photos.imsize, photos.downsample, random)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


def cached(
    photos, extractor: DenseExtractor, folder: str | Path, views: int, batch_size: int, workers: int
) -> Cached:
    """The features of photos, computed now, or read from a file of an earlier run.

    The file is named by a hash of everything that it depends on. It is written batch by batch, so
    that a stopped run goes on where it was. A second process waits for the first one.

    Args:
        photos: a train_lift.Photos.
        folder: where the file is, or goes.
        views: how many passes over the photos it holds, see Cached.
    Raises:
        OSError: the features do not fit on the disk, or cannot be written.
        ValueError: they are not finite, be it only in float16, or the folder has no locks.
    """
    record = record_type(extractor, photos.imsize, photos.warp)
    path = Path(folder) / f"{cache_key(photos, extractor)}_{views}.features"
    dataset = Cached(path, record, views, photos.paths)
    if path.exists():
        return dataset

    keys = []  # in the order of the file: see Cached
    for view in range(views):
        keys += [(view, index) for index in range(len(photos))]

    part = path.with_suffix(".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            wait_for_lock(file)
            # whoever had the lock before may have finished the file
            if not path.exists():
                fill(file, record, photos, extractor, keys, batch_size, workers)
                part.rename(path)
    except OSError as error:
        remedy = "make room or pass another --cache_features"
        raise OSError(f"cannot write {part} ({error}): {remedy}") from error
    # a process that came just as another one renamed its .part has opened a new, empty one
    part.unlink(missing_ok=True)
    return dataset


def wait_for_lock(file: BinaryIO) -> None:
    """Wait until no other process fills this file.

    Raises:
        ValueError: its file system has no locks. Two processes would mix up their records.
    """
    import fcntl  # not on Windows, where only --cache_features is lost

    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        remedy = "pass a --cache_features on a local disk"
        raise ValueError(f"{file.name} cannot be locked ({error}): {remedy}") from error


def fill(
    file: BinaryIO,
    record: np.dtype,
    photos,
    extractor: DenseExtractor,
    keys: list[tuple[int, int]],
    batch_size: int,
    workers: int,
) -> None:
    """Append the records of `keys` (view, index) that `file` lacks.

    A batch that a stopped run left incomplete is computed anew. So with the same batch_size the
    batches, and with them the last bits of the features, are those of a run that was never stopped.

    Raises:
        OSError: there is less room on the disk than they take.
        ValueError: features are not finite, be it only in float16.
    """
    # tell() is where the file ended when it was opened, and another process may have written since
    file.seek(0, os.SEEK_END)
    complete_records = file.tell() // record.itemsize
    complete_batches = complete_records // batch_size
    done = complete_batches * batch_size  # records that are kept
    file.truncate(done * record.itemsize)

    needed = (len(keys) - done) * record.itemsize
    free = shutil.disk_usage(Path(file.name).parent).free
    if needed > free:
        raise OSError(f"{needed // 2**20} MiB are needed, {free // 2**20} are free")

    batches = [keys[at : at + batch_size] for at in range(done, len(keys), batch_size)]
    loader = DataLoader(
        photos, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals
    )
    for batch in tqdm(loader, "features", unit="batch", disable=None):
        _, feats = images_and_features(batch, extractor)
        rows = np.zeros(len(batch["broken"]), record)
        for name, value in zip(FEATURES, feats):
            # a photo and its copy are one row: [2B, C, h, w] becomes [B, 2, C, h, w]
            with np.errstate(over="ignore"):  # too large a number becomes inf, which is told below
                rows[name] = value.reshape(rows[name].shape).cpu().numpy()
            if not np.isfinite(rows[name]).all():
                check_finite(value, extractor)
                what = f"the features of {extractor.name} are too large for the float16 of the file"
                raise ValueError(f"{what}: leave out --cache_features")
        for name in record.names:
            if name not in FEATURES:
                rows[name] = batch[name].numpy()
        file.write(rows.tobytes())
    file.flush()


def ignore_signals(worker: int) -> None:
    """Let the worker of a DataLoader ignore Ctrl-C and SIGTERM; `worker` is its number.

    Both signals reach every process of a group. The main one needs its workers until its step is
    done. They end when it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
