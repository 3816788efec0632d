"""The work of lift_extractor.py: photos in batches of one size, their features, and the files.

    photos = Photos(jobs, patch=16, load_size=224)
    extraction = Extraction(jobs, features, settings)
    extraction.run(Loader(photos, workers=4), batch_size=8)
    extraction.skipped                                       # [(photo, why it has no features)]

Notation: B batch, C channels, H W pixels, h w the grid of a map.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from command import progress, why_skipped
from extractor import DenseExtractor
from features import Features
from files import replacing, save_tensors, write_bytes
from lift import map_to_tokens
from photos import fit, is_strip, pca_rgb, read_image, titled_sheet

MOST_PIXELS = 2**24  # of a batch: a larger one is no faster
LONGEST_NAME = 255  # bytes, in nearly all file systems


# ---- photos in ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """One photo, the file of its features, and that of its picture."""

    photo: Path
    output: Path
    picture: Path | None

    def is_done(self) -> bool:
        """Whether all its files are there."""
        # os.path's is False, too, for a name that is too long
        has_picture = self.picture is None or os.path.isfile(self.picture)
        return has_picture and os.path.isfile(self.output)


# index of a photo, its pixels [3, H, W] uint8, and its own size (W, H); or, instead of pixels and
# size, None and the reason why it cannot be used
Item = tuple[int, Tensor | None, Any]


@dataclass(eq=False)
class Photos(Dataset):
    """The photos of jobs, read and fitted: photos[i] is an Item.

    Args:
        patch: sides become multiples of it.
        load_size: pixels of the shorter side; None leaves the photo's own.
    """

    jobs: list[Job]
    patch: int
    load_size: int | None

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Item:
        path = self.jobs[index].photo
        if len(os.fsencode(self.jobs[index].output.name)) > LONGEST_NAME:
            return index, None, "the name is too long for a file of features: shorten it"
        try:
            photo = read_image(path)
            if self.load_size and is_strip(*photo.size):
                what = f"{photo.width}x{photo.height} pixels, a strip"
                return index, None, f"{what}: cut it, or pass --load_size 0"
            pixels = pil_to_tensor(fit(photo, self.patch, self.load_size))
            return index, pixels, photo.size
        except MemoryError as error:
            return index, None, why_skipped(error)
        except (ValueError, OSError) as error:
            return index, None, str(error).removeprefix(f"{path} is ")


def batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Collect items into batches of one image size each; what cannot be read comes alone.

    A batch is full with batch_size photos, or MOST_PIXELS. At most four full batches wait for
    photos of their size; then the largest batch goes as it is.
    """
    waiting: dict[torch.Size, list[Item]] = {}
    for item in items:
        _, pixels, _ = item
        if pixels is None:
            yield [item]
            continue
        queue = waiting.setdefault(pixels.shape, [])
        queue.append(item)
        if len(queue) == batch_size or pixels_of(queue) >= MOST_PIXELS:
            yield waiting.pop(pixels.shape)
            continue

        count = sum(len(others) for others in waiting.values())
        held = sum(pixels_of(others) for others in waiting.values())
        if count >= 4 * batch_size or held >= 4 * MOST_PIXELS:
            largest = max(waiting, key=lambda size: pixels_of(waiting[size]))
            yield waiting.pop(largest)
    yield from waiting.values()


def pixels_of(queue: list[Item]) -> int:
    """How many pixels the photos of a queue, all of one size, have together."""
    pixels: Any = queue[0][1]
    return len(queue) * pixels[0].numel()


# ---- what is written ----------------------------------------------------------------------------


def placement(
    extractor: DenseExtractor,
    input_size: tuple[int, int],
    photo_size: tuple[int, int],
    grid: tuple[int, int],
) -> dict[str, float]:
    """Where the cells of a map lie, in pixels of the photo.

    Cell (i, j) is centred on (first_x + j*step_x, first_y + i*step_y). An upsampler splits every
    cell of the backbone's grid evenly.

    Args:
        input_size: (H, W) that the backbone saw.
        photo_size: (H, W) of the photo.
        grid: (h, w) of the map.
    """
    place = {}
    coarse = extractor.grid(*input_size)
    for axis, name in enumerate("yx"):
        scale = photo_size[axis] / input_size[axis]
        # in pixels of the input
        step = extractor.stride * coarse[axis] / grid[axis]
        # the backbone's first cell is centred on patch/2 and reaches stride/2 to either side: the
        # grid begins at the difference
        begin = (extractor.patch - extractor.stride) / 2
        place[f"first_{name}"] = (begin + step / 2) * scale
        place[f"step_{name}"] = step * scale
    return place


def save(path: Path, feats: Tensor, facts: dict[str, Any]) -> None:
    """Write one map [C, h, w] as path's suffix says, with `facts` that JSON can hold."""
    if path.suffix == ".pth":
        tokens = map_to_tokens(feats[None])
        # a view would be saved with the memory of the whole batch: copy it
        save_tensors(path, tokens.clone(memory_format=torch.contiguous_format))
        return
    if path.suffix == ".npz":
        arrays: Any = {**facts, "settings": json.dumps(facts["settings"])}
        with replacing(path) as temporary:
            np.savez(temporary, map=feats.numpy(), **arrays)
        return
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    # to memory first: its own writer turns a full disk into an error of its own kind
    write_bytes(path, to_safetensors({"map": feats.contiguous()}, metadata))


def draw(photo: Image.Image, maps: dict[str, Tensor]) -> Image.Image:
    """A sheet: the photo, then maps [C, h, w] as colours of one PCA basis, with their titles."""
    panels = [("photo", photo)]
    pictures = pca_rgb(list(maps.values()))
    for (title, feats), rgb in zip(maps.items(), pictures):
        rows, columns = feats.shape[1:]
        panels.append((f"{title} {rows}x{columns}", Image.fromarray(rgb)))
    return titled_sheet(panels)


# ---- the work -----------------------------------------------------------------------------------


@dataclass
class Extraction:
    """Extracts photos batch by batch, and writes each batch while the next one is computed.

    Attributes:
        skipped: photos that gave no features, each with the reason.
        grid: (h, w) of the last map that was written.

    Args:
        features: what gives the maps.
        settings: of the run, which are written into the files.
        out_size: (h, w) that maps are resized to; None leaves them as they are.
    """

    jobs: list[Job]
    features: Features
    settings: dict[str, Any]
    out_size: Any = None
    skipped: list[tuple[Path, str]] = field(default_factory=list, init=False)
    grid: Any = field(default=(0, 0), init=False)

    def run(self, items: Iterable[Item], batch_size: int) -> None:
        """Make the files of all photos; what is raised while one is written is raised here."""
        writing: Future | None = None
        with ThreadPoolExecutor(1) as writer, progress(total=len(self.jobs), unit="photo") as bar:
            for batch in batches(items, batch_size):
                for part, maps in self.compute(batch):
                    if writing:
                        writing.result()
                    writing = writer.submit(self.write, part, maps)
                bar.update(len(batch))
            if writing:
                writing.result()

    def compute(self, batch: list[Item]) -> Iterator[tuple[list[Item], list[Tensor]]]:
        """The maps of a batch; photo by photo where memory runs out. What gives none is skipped."""
        index, first, reason = batch[0]
        if first is not None:
            try:
                yield batch, self.maps([pixels for _, pixels, _ in batch])
                return
            except (MemoryError, RuntimeError) as error:
                reason = why_skipped(error)
        if len(batch) == 1:
            self.skipped.append((self.jobs[index].photo, reason))
            return
        for item in batch:
            yield from self.compute([item])

    @torch.no_grad()
    def maps(self, photos: list[Any]) -> list[Tensor]:
        """Photos [3, H, W] uint8 -> the backbone's maps [B, C, h, w], fine ones, and resized."""
        pixels = torch.stack(photos).to(self.features.backbone.device)
        steps = self.features(pixels.float() / 255, return_all=True)
        fine = final = steps[-1]
        if self.out_size:
            final = F.interpolate(fine, self.out_size, mode="bilinear", align_corners=False)
        return [steps[0], fine, final]

    def write(self, batch: list[Item], maps: list[Tensor]) -> None:
        """Write the files of a batch; a photo for which memory runs out is skipped."""
        coarse, fine, final = maps
        final = final.cpu()
        self.grid = tuple(final.shape[2:])
        for number, (index, pixels, size) in enumerate(batch):
            job = self.jobs[index]
            try:
                save(job.output, final[number], self.facts(job, pixels, size))
                if job.picture:
                    shown = {"backbone": coarse[number]}
                    if self.features.upsampler is not None:
                        shown[self.settings["upsample"]] = fine[number]
                    with replacing(job.picture) as temporary:
                        draw(to_pil_image(pixels), shown).save(temporary)
            except (MemoryError, RuntimeError) as error:
                self.skipped.append((job.photo, why_skipped(error)))

    def facts(self, job: Job, pixels: Any, size: tuple[int, int]) -> dict[str, Any]:
        """What is written beside the map of a photo of this size (W, H)."""
        width, height = size
        input_size = tuple(pixels.shape[1:])
        place = placement(self.features.backbone, input_size, (height, width), self.grid)
        return {
            "grid": self.grid,
            "image_size": (height, width),
            "input_size": input_size,
            **place,
            "settings": {**self.settings, "image_path": [str(job.photo)]},
        }
