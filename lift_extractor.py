"""Dense features of photos: a frozen ViT's descriptors, doubled in resolution by LiFT.

    python lift_extractor.py --image_path assets/sample.jpg --output_path sample.pth \\
        --model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_attend.pth \\
        [--lift_iter 2] [--picture sample.png]
    python lift_extractor.py --image_path photos/ --output_path features/ --format npz \\
        --model_type dino_vits16
    torchrun --nproc_per_node 4 lift_extractor.py --image_path 'photos/**/*.jpg' \\
        --output_path features/

One image and an --output_path that ends in .pth, .npz or .safetensors: that file. Otherwise
--output_path is a folder with one file a photo (cat.jpg.pth, in the photo's subfolder). A run over
the same folder goes on where it was; photos whose files are newer than their features are computed
again. Refused unless --overwrite is given: other settings, and a photo whose name has features of a
photo in another folder. What cannot be read is named at the end.

A .pth is a CPU tensor [1, t, C], row by row. .npz and .safetensors hold the map [C, h, w], its
grid, the photo's size, where its cells lie in the photo (cell (i, j) is centred on pixel
(first_x + j*step_x, first_y + i*step_y)) and the settings. The last line printed is JSON: settings
and counts. A photo at 224 takes about 30 ms on one CPU core with vit_mini16 and LiFT.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    RECORD,
    Command,
    add_backbone_args,
    add_lift_args,
    check_memory,
    check_range,
    check_torchrun,
    claim_folder,
    main_memory,
    rank,
    record,
    replacing,
    report,
    save_tensors,
    settings,
    world_size,
    write_bytes,
)

FORMATS = ("pth", "npz", "safetensors")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FOLDERS = "image_folders"  # of the photos, in the record
LONGEST = 32  # times the shorter side: a strip of 5000x20 pixels is no photo

# Numbers a pixel takes besides its features: 3 channels, and 5 copies of the photo at once (as
# read, in the batch, minus the mean, normalised, channels last).
PHOTO_NUMBERS = 3 * 5

# Flags that do not change what is in a file: how the work is done, where it goes, and the two that
# are only checked. Of image_path the record holds the folders (see claim_output).
NOT_IN_A_FILE = (
    "image_path", "output_path", "picture", "format", "batch_size", "workers", "overwrite",
    "channel", "patch",
)  # fmt: skip


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--image_path", required=True, nargs="+", help="photos, folders, or quoted patterns")
    add("--output_path", required=True, help="the file to write, or a folder for several photos")
    add("--load_size", type=int, default=224, help="shorter side, 0: as it is (default: 224)")
    add("--out_size", type=int, nargs=2, metavar=("H", "W"), help="resize the final map to H x W")
    add("--format", choices=FORMATS, default="pth", help="of files in a folder (default: pth)")
    add("--picture", help="PNG of photo and features as PCA colours; a folder for several photos")
    add("--batch_size", type=int, default=8, help="photos of one size at once (default: 8)")
    add("--workers", type=int, default=0, help="processes that read photos (default: 0)")
    add("--overwrite", action="store_true", help="compute again what the folder already holds")
    add_backbone_args(command)
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm import tqdm

from extractor import DenseExtractor, ViTExtractor, build_extractor, check_facts
from lift import (
    Upsampler,
    check_lift_args,
    load_lift,
    map_to_tokens,
    upsample,
    upsampler,
)
from photos import (
    fit,
    fitted_size,
    list_images,
    naming_root,
    pca_rgb,
    read_image,
    titled_sheet,
)

# ---- in Python ----------------------------------------------------------------------------------


class ViTLiFTExtractor(nn.Module):
    """A frozen ViT with LiFT on top, as the reference release's class of this name offers them.

    A call gives maps; the methods of the release give tokens. It stays in eval mode.

    Attributes: extractor (the ViTExtractor), lift (None without a path), model_type, model,
    lift_path, channel, patch, stride, layer, facet, device.

    Args:
        channel, patch: read off the backbone; given, they must agree with it.
        stride: None is the patch.
        layer: None is the last.
        silent: keep load_lift's note back.
        model, device, backbone_path, dtype, requires_grad: ViTExtractor's.
    Raises:
        ValueError, FileNotFoundError: something does not exist or does not fit together.
    """

    def __init__(
        self,
        model_type: str = "dino_vits8",
        lift_path: str | Path | None = None,
        channel: int | None = None,
        patch: int | None = None,
        stride: int | None = None,
        layer: int | None = None,
        facet: str = "key",
        model: nn.Module | None = None,
        device: str | torch.device | None = "cuda",
        silent: bool = False,
        backbone_path: str | Path | None = None,
        dtype: str = "float32",
        requires_grad: bool = False,
    ):
        super().__init__()
        self.extractor = ViTExtractor(
            model_type, stride, model, device, backbone_path, layer, facet, dtype, requires_grad
        )
        check_facts(self.extractor, channel, patch)
        self.lift = None
        if lift_path:
            self.lift = load_lift(lift_path, self.extractor, silent=silent)

        self.model_type = model_type
        self.lift_path = lift_path
        self.channel = self.extractor.width
        self.patch = self.extractor.patch
        self.stride = self.extractor.step
        self.layer = self.extractor.layer
        self.facet = facet
        self.eval()

    @property
    def model(self) -> nn.Module:
        """The ViT itself."""
        return self.extractor.model

    @property
    def device(self) -> torch.device:
        """Where the ViT is."""
        return self.extractor.device

    def train(self, mode: bool = True) -> "ViTLiFTExtractor":
        """Stay in eval mode: both networks are frozen, and a batch norm must not move."""
        return super().train(False)

    def preprocess(
        self, image_path: Any, load_size: int | tuple[int, int] | None = None
    ) -> tuple[Tensor, Image.Image]:
        """Read, fit and normalise one photo (ViTExtractor.preprocess)."""
        return self.extractor.preprocess(image_path, load_size)

    def forward(self, images: Tensor, iterations: int = 1) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, 2^n h, 2^n w] float32.

        Without a module, the backbone's own [B, C, h, w].
        """
        with torch.set_grad_enabled(self.extractor.gradients and torch.is_grad_enabled()):
            feats = self.extractor(images)
            if self.lift is None:
                return feats
            return upsample(self.lift, images, feats, iterations)

    def extract_descriptors(self, batch: Tensor) -> Tensor:
        """Descriptors [B, t, C] of normalised images, LiFT applied once if there is one."""
        return map_to_tokens(self(batch))

    def extract_descriptors_iterative_lift(
        self, batch: Tensor, lift_iter: int = 1, return_inter: bool = False
    ) -> Any:
        """Descriptors [B, t, C] after `lift_iter` applications of LiFT.

        Args:
            return_inter: return those of every step, as a dict: back, lift_1, lift_2, ...
        Raises:
            ValueError: there is no LiFT.
        """
        if self.lift is None:
            raise ValueError("there is no LiFT to apply: pass lift_path")
        if not return_inter:
            return map_to_tokens(self(batch, lift_iter))
        with torch.set_grad_enabled(self.extractor.gradients and torch.is_grad_enabled()):
            feats = self.extractor(batch)
            steps = upsample(self.lift, batch, feats, lift_iter, return_all=True)
        tokens = {"back": map_to_tokens(steps[0])}
        for number, step in enumerate(steps[1:], 1):
            tokens[f"lift_{number}"] = map_to_tokens(step)
        return tokens


# ---- which photo goes where ---------------------------------------------------------------------


class Job(NamedTuple):
    """One photo, the folder it was found in, the file of its features, and that of its picture."""

    photo: Path
    root: Path
    output: Path
    picture: Path | None

    def is_done(self) -> bool:
        """Whether all its files are there, and none is older than the photo."""
        files = [self.output]
        if self.picture:
            files.append(self.picture)
        changed = self.photo.stat().st_mtime
        return all(file.exists() and file.stat().st_mtime >= changed for file in files)


def find_photos(given: list[str]) -> dict[Path, Path]:
    """Find the photos, each with its root (photos.naming_root).

    The path from there names its output file.

    Raises:
        ValueError: there are none, or two would get one output file.
    """
    photos: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for entry in given:
        root = naming_root(entry)
        for file in list_images(entry):
            name = file.relative_to(root)
            if taken.get(name, file) != file:
                both = f"{taken[name]} and {file} would get one output file"
                raise ValueError(f"{both}: pass the folder that holds them all")
            taken[name] = file
            photos[file] = root
    return photos


def is_one_file(args: argparse.Namespace, photos: int) -> bool:
    """Whether --output_path names the one file to write, and not a folder.

    Raises:
        ValueError: it can be neither.
    """
    output = Path(args.output_path)
    if output.is_dir():
        return False
    named_as_folder = args.output_path.endswith(("/", os.sep))
    if photos == 1 and output.suffix[1:] in FORMATS and not named_as_folder:
        return True
    if output.is_file():
        what = f"{output} is a file, but {photos} photos need a folder"
        raise ValueError(f"{what}: pass another --output_path")
    if output.suffix and not named_as_folder and not output.exists():
        formats = ", ".join(f".{name}" for name in FORMATS)
        what = f"{output} ends in {output.suffix}, and features of one photo go to {formats}"
        raise ValueError(f"{what}: pass such a file, or a folder with / at its end")
    return False


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """All photos, each with the files that are to be written, whether done or not.

    Pictures that an earlier run has drawn among the photos are no photos.

    Under torchrun every process computes the same list and takes its part of it. What exists by
    now must not count here: the other processes may be writing already, and lists would differ.
    But for a --picture that is one of the photos: it is asked before any process can have begun.

    Raises:
        ValueError: --output_path or --picture are no names for what is to be written, or
            --picture is one of the photos.
    """
    photos = find_photos(args.image_path)
    if args.picture and Path(args.picture).is_file():
        for photo in list(photos):
            if not photo.samefile(args.picture):
                continue
            if not Path(args.output_path).is_file():  # a run that drew it has written that, too
                what = f"--picture {args.picture} is one of the photos"
                raise ValueError(f"{what}: pass another name")
            del photos[photo]

    one_file = is_one_file(args, len(photos))
    if args.picture and one_file and Path(args.picture).suffix.lower() not in PICTURES:
        formats = ", ".join(PICTURES)
        what = f"--picture {args.picture} is no picture's name"
        raise ValueError(f"{what}: let it end in one of {formats}")

    jobs = []
    pictures = set()
    for photo, root in photos.items():
        name = photo.relative_to(root)
        output = Path(args.output_path)
        if not one_file:
            output = output / f"{name}.{args.format}"
        picture = None
        if args.picture and one_file:
            picture = Path(args.picture)
        elif args.picture:
            picture = Path(args.picture) / f"{name}.png"
            pictures.add(picture.resolve())
        jobs.append(Job(photo, root, output, picture))
    if not pictures:
        return jobs
    return [job for job in jobs if job.photo.resolve() not in pictures]


def claim_output(folder: Path, jobs: list[Job], made_by: dict[str, Any], overwrite: bool) -> None:
    """Record these settings in the output folder, or refuse a folder of other settings.

    The record holds the photos' folders, too. Others may follow, but not a photo whose name has
    features already, of a photo in another folder: it would count as done.

    With `overwrite`, features of other settings, or of settings that nobody knows, are removed
    first: a run that is stopped must not leave them under the new record.

    Raises:
        ValueError: it holds features of other settings, or of settings that nobody knows.
    """
    remedy = "pass --overwrite, or another --output_path"
    there = [job.output for job in jobs if job.output.exists()]
    has_record = (folder / RECORD).exists()
    if there and not has_record and not overwrite:
        what = f"{there[0]} is there, and no {RECORD} says how it was made"
        raise ValueError(f"{what}: {remedy}")
    if not has_record:
        remove(there)

    folders = {str(job.root.resolve()) for job in jobs}
    before = recorded_folders(folder)
    if before is not None:
        of_others = []
        for job in jobs:
            if job.output.exists() and str(job.root.resolve()) not in before:
                of_others.append(job.output)
        if of_others and not overwrite:
            what = f"{of_others[0]} was made from a photo in another folder"
            raise ValueError(f"{what}: {remedy}")
        remove(of_others)
        folders.update(before)

    try:
        claim_folder(folder, {**made_by, FOLDERS: before}, remedy)
    except ValueError as error:
        if not overwrite:
            raise
        ours = {job.output for job in jobs}
        for file in folder.rglob("*"):
            if file.suffix[1:] in FORMATS and file not in ours:
                what = f"{file} was made with other settings and is not to be made again"
                raise ValueError(f"{what}: pass another --output_path") from error
        remove(there)
    claim_folder(folder, {**made_by, FOLDERS: sorted(folders)}, remedy, renew=True)


def remove(files: list[Path]) -> None:
    """Remove files, some of which may be gone already."""
    for file in files:
        file.unlink(missing_ok=True)


def recorded_folders(folder: Path) -> list[str] | None:
    """The photos' folders in the record of an output folder.

    None where it does not tell: there is no record, or one of an earlier version, or a damaged one,
    of which claim_folder speaks.
    """
    try:
        return json.loads((folder / RECORD).read_text()).get(FOLDERS)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


# ---- reading ------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What decides how much memory a photo takes; small, to be sent to a loader's workers.

    Attributes: patch, step, channels of the backbone (None for the facet attn, whose number grows
    with the photo), heads, the factor by which the grid is upsampled, the cells of --out_size (0
    without it), the device, and the bytes of main memory.
    """

    patch: int
    step: int
    channels: int | None
    heads: int
    factor: int
    out_cells: int = 0
    device: str = "cpu"
    there: float = float("inf")

    def at_once(self, width: int, height: int, most: int) -> int:
        """How many photos of this size to take at once: at most `most`, or what memory holds.

        Half of it is left for the photos that wait, and for all else. CUDA has memory of its own.
        """
        if self.device.startswith("cuda"):
            return most
        fitting = self.there / 2 / self.needed(width, height)
        return max(1, int(min(most, fitting)))

    def needed(self, width: int, height: int) -> int:
        """About how many bytes a photo fitted to this size takes in the end."""
        cells = width * height / self.step**2
        channels: float
        if self.channels is None:
            channels = self.heads * cells  # each head's attention to every cell
        else:
            channels = self.channels

        # the result about three times: while its last step is made, and while it is written
        per_cell = 3 * channels * self.factor**2
        if self.factor > 1:
            # the backbone's own, and the enlarged image with LiFT's convolutions
            per_cell += channels + self.factor**2 * self.patch**2
        resized = 3 * channels * self.out_cells
        return int(4 * (cells * per_cell + resized + PHOTO_NUMBERS * width * height))


def memory_of(
    extractor: DenseExtractor, up: Upsampler, out_size: tuple[int, int] | None = None
) -> Memory:
    """The Memory of a backbone, what upsamples it, and the --out_size (h, w) of its maps."""
    out_cells = 0
    if out_size:
        out_cells = out_size[0] * out_size[1]
    return Memory(
        extractor.patch,
        extractor.step,
        extractor.width,
        extractor.heads,
        up.factor,
        out_cells,
        str(extractor.device),
        main_memory(),
    )


class Photos(Dataset):
    """Photos by their paths, read and fitted.

    photos[i] is (i, image [3, H, W] in 0..1, the photo's own (W, H)), or (i, None, what is wrong).
    It holds paths and numbers only, so that it is cheap to send to a loader's workers.

    Args:
        patch: sides become multiples of it.
        load_size: pixels of the shorter side; None leaves the photo's own.
        memory: what a photo will take.
    """

    def __init__(self, paths: list[Path], patch: int, load_size: int | None, memory: Memory):
        self.paths = paths
        self.patch = patch
        self.load_size = load_size
        self.memory = memory

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Any]:
        path = self.paths[index]
        try:
            photo = read_image(path)
            self.check_size(path, photo)
            return index, to_tensor(fit(photo, self.patch, self.load_size)), photo.size
        except (ValueError, OSError) as error:
            return index, None, str(error)

    def check_size(self, path: Path, photo: Image.Image) -> None:
        """Raise ValueError for a strip that would become huge, or for more than the memory."""
        if self.load_size and max(photo.size) > LONGEST * min(photo.size):
            what = f"{path} has {photo.width}x{photo.height} pixels, a strip"
            raise ValueError(f"{what}: cut it, or pass --load_size 0")
        width, height = fitted_size(photo.width, photo.height, self.patch, self.load_size)
        remedy = "pass a smaller --load_size, --lift_iter or --out_size"
        needed = self.memory.needed(width, height)
        check_memory(needed, f"the features of {path}", remedy, self.memory.device)


Item = tuple[int, Tensor | None, Any]


def batches(items: Iterable[Item], batch_size: int, memory: Memory) -> Iterator[list[Item]]:
    """Collect items into batches of one image size each; what cannot be read comes alone.

    A batch is smaller than batch_size where the memory does not hold so many. At most four batches'
    worth of photos is kept waiting, and about a quarter of the memory. Then the fullest batch goes
    as it is.
    """
    waiting: dict[Any, list[Item]] = {}
    for item in items:
        image = item[1]
        if image is None:
            yield [item]
            continue
        queue = waiting.setdefault(image.shape, [])
        queue.append(item)
        height, width = image.shape[1:]
        if len(queue) >= memory.at_once(width, height, batch_size):
            yield waiting.pop(image.shape)
            continue

        count = sum(len(others) for others in waiting.values())
        held = sum(bytes_of(others) for others in waiting.values())
        if held > memory.there / 4:
            largest = max(waiting, key=lambda size: bytes_of(waiting[size]))
            yield waiting.pop(largest)
        elif count >= 4 * batch_size:
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            yield waiting.pop(fullest)
    yield from waiting.values()


def bytes_of(queue: list[Item]) -> int:
    """The bytes of the images that wait in a queue."""
    return sum(image.nbytes for _, image, _ in queue)


# ---- what is written ----------------------------------------------------------------------------


def placement(
    extractor: DenseExtractor,
    input_size: tuple[int, int],
    photo_size: tuple[int, int],
    grid: tuple[int, int],
) -> dict[str, float]:
    """Where the cells of a map lie, in pixels of the photo.

    Cell (i, j) is centred on (first_x + j*step_x, first_y + i*step_y). LiFT splits every cell of
    the backbone's grid evenly.

    Args:
        input_size: (H, W) that the backbone saw.
        photo_size: (H, W) of the photo.
        grid: (h, w) of the map.
    """
    rows, columns = extractor.grid(*input_size)
    first_y, step_y = along_one_axis(extractor, input_size[0], photo_size[0], rows, grid[0])
    first_x, step_x = along_one_axis(extractor, input_size[1], photo_size[1], columns, grid[1])
    return {"first_y": first_y, "first_x": first_x, "step_y": step_y, "step_x": step_x}


def along_one_axis(
    extractor: DenseExtractor, side: int, photo_side: int, base_cells: int, cells: int
) -> tuple[float, float]:
    """Centre of the first cell and distance of two cells along one axis, in pixels of the photo.

    Args:
        side: pixels of the input that the backbone saw.
        base_cells: cells of the backbone's grid.
        cells: cells of the final map.
    """
    scale = photo_side / side
    step = extractor.step * base_cells / cells  # in pixels of the input

    # the backbone's first cell is centred on patch/2 and reaches step/2 to either side: the grid
    # begins at the difference
    begin = (extractor.patch - extractor.step) / 2
    return (begin + step / 2) * scale, step * scale


def save(path: Path, feats: Tensor, facts: dict[str, Any]) -> None:
    """Write one map [C, h, w] as path's suffix says, whole or not at all.

    Args:
        facts: what goes beside a map, as JSON can hold it.
    """
    feats = feats.cpu()
    if path.suffix == ".pth":
        tokens = map_to_tokens(feats[None])
        # a view would be saved with the memory of the whole batch: copy it
        save_tensors(path, tokens.clone(memory_format=torch.contiguous_format))
        return
    if path.suffix == ".npz":
        arrays = {}
        for key, value in facts.items():
            if key != "settings":
                arrays[key] = np.asarray(value)
        text = json.dumps(facts["settings"])
        with replacing(path) as temporary:
            np.savez(temporary, map=feats.numpy(), settings=text, **arrays)
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


# ---- the command --------------------------------------------------------------------------------


@torch.no_grad()
def process(
    batch: list[Item],
    jobs: list[Job],
    extractor: DenseExtractor,
    up: Upsampler,
    out_size: tuple[int, int] | None,
    run_settings: dict[str, Any],
) -> None:
    """Extract one batch of Photos' items of one size, and write its files.

    Raises:
        ValueError: features are not finite.
    """
    pixels = torch.stack([image for _, image, _ in batch])
    images = extractor.normalize(pixels.to(extractor.device))
    feats = extractor(images)
    dense = up(images, feats)
    final = dense
    if out_size:
        final = F.interpolate(dense, size=out_size, mode="bilinear", align_corners=False)

    for number, (index, image, (width, height)) in enumerate(batch):
        job = jobs[index]
        if not final[number].isfinite().all():
            what = f"the features of {job.photo} are not finite in {run_settings['dtype']}"
            raise ValueError(f"{what}: pass --dtype float32")
        input_size = tuple(image.shape[1:])
        grid = tuple(final.shape[2:])
        place = placement(extractor, input_size, (height, width), grid)
        facts = {
            "grid": grid,
            "image_size": (height, width),
            "input_size": input_size,
            **place,
            "settings": {**run_settings, "image_path": [str(job.photo)]},
        }
        save(job.output, final[number], facts)
        if job.picture:
            maps = {"backbone": feats[number]}
            if up.factor > 1:
                maps[up.how] = dense[number]
            with replacing(job.picture) as temporary:
                draw(to_pil_image(image), maps).save(temporary)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for what is wrong whatever the backbone is."""
    check_range(args, load_size=0, lift_iter=0, batch_size=1, workers=0)
    if args.out_size and min(args.out_size) < 1:
        raise ValueError("--out_size needs two positive sizes: pass H W")
    check_lift_args(args)


def start_processes() -> None:
    """Join the other processes of a torchrun, if it is one.

    The first to finish waits for the slowest, as long as it takes.

    Raises:
        ValueError: torchrun's RANK and WORLD_SIZE are set, but not by torchrun.
    """
    check_torchrun()
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def wait_for_all() -> None:
    """Wait until all processes of a torchrun have come here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(counts: list[int]) -> list[int]:
    """The sums of the counts of all processes of a torchrun."""
    if not dist.is_initialized():
        return counts
    totals = torch.tensor(counts)
    dist.all_reduce(totals)
    return totals.tolist()


def main(args: argparse.Namespace) -> None:
    """Extract the features of all photos, batch by batch, and report."""
    check_flags(args)
    all_jobs = find_jobs(args)
    into_folder = all_jobs[0].output != Path(args.output_path)
    if len(all_jobs) == 1:
        read_image(all_jobs[0].photo)  # told before a backbone is built
    start_processes()
    extractor = build_extractor(args)
    up = upsampler(args, extractor)
    facts = {**extractor.facts(), **up.facts()}

    if into_folder and rank() == 0:
        made_by = record(args, leave_out=NOT_IN_A_FILE, **facts)
        claim_output(Path(args.output_path), all_jobs, made_by, args.overwrite)
    wait_for_all()

    jobs = all_jobs[rank() :: world_size()]
    left = jobs
    if into_folder and not args.overwrite:
        left = [job for job in jobs if not job.is_done()]

    run_settings = settings(args, **facts, device=str(extractor.device))
    memory = memory_of(extractor, up, args.out_size)
    photos = Photos([job.photo for job in left], extractor.patch, args.load_size or None, memory)
    loader = DataLoader(photos, batch_size=None, num_workers=args.workers)
    unreadable = []
    disable = None  # tqdm's word for: only where stderr is no terminal
    if len(left) < 2:
        disable = True
    with tqdm(total=len(left), unit="photo", disable=disable) as bar:
        for batch in batches(loader, args.batch_size, memory):
            _, image, size_or_error = batch[0]
            if image is None:
                unreadable.append(size_or_error)
            else:
                process(batch, left, extractor, up, args.out_size, run_settings)
            bar.update(len(batch))

    if len(all_jobs) == 1 and unreadable:
        raise ValueError(unreadable[0])
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)

    # over all processes: one that met only broken photos has not failed
    wanted, broken, skipped = add_up([len(left), len(unreadable), len(jobs) - len(left)])
    if rank() == 0:
        counts = {"written": wanted - broken, "skipped": skipped, "unreadable": broken}
        summary = {**run_settings, **counts}
        # an unquoted pattern may be thousands of names
        summary["image_path"] = args.image_path[:3]
        summary["image_paths"] = len(args.image_path)
        report(summary)
    wait_for_all()  # torchrun ends the others as soon as one fails
    if wanted and broken == wanted:
        if rank() > 0:  # the first process says why
            raise SystemExit(2)
        raise ValueError(f"none of {wanted} photos could be read: replace or remove them")


if __name__ == "__main__":
    parser().run(main)
