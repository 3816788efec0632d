"""Dense features of photos: a frozen ViT's descriptors, doubled in resolution by LiFT.

    python lift_extractor.py --image_path assets/sample.jpg --output_path sample.pth \\
        --model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_attend.pth \\
        [--lift_iter 2] [--picture sample.png]
    python lift_extractor.py --image_path photos/ --output_path features/ --format npz \\
        --model_type dino_vits16
    torchrun --nproc_per_node 4 lift_extractor.py --image_path 'photos/**/*.jpg' \\
        --output_path features/

One photo and an --output_path that ends in .pth, .npz or .safetensors: that file. Otherwise
--output_path is a folder with one file a photo (cat.jpg.pth, in the photo's subfolder). A second
run into the same folder keeps the files that are there and makes the others. Other settings, or
photos of another folder, need --overwrite or a folder of their own. A photo that cannot be read, or
does not fit into memory, is named at the end.

A .pth is a CPU tensor [1, t, C], row by row. .npz and .safetensors hold the map [C, h, w], its
grid, the photo's size, where its cells lie in the photo (cell (i, j) is centred on pixel
(first_x + j*step_x, first_y + i*step_y)) and the settings. A photo at 224 takes about 30 ms on one
CPU core with vit_mini16 and LiFT.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_range,
    check_torchrun,
    deciding,
    is_out_of_memory,
    out_of_memory,
    progress,
    rank,
    report,
    settings,
    skipped,
    world_size,
)
from files import Results, replacing, save_tensors, write_bytes

FORMATS = ("pth", "npz", "safetensors")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOST_PIXELS = 2**24  # of a batch: a larger one is no faster
LONGEST_NAME = 255  # bytes, in nearly all file systems
# flags that say how the work is done or where it goes, and two that are only checked
NOT_DECIDING = (
    "image_path", "output_path", "picture", "batch_size", "workers", "overwrite",
    "channel", "patch",
)  # fmt: skip


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--image_path", required=True, nargs="+", help="photos, folders, or quoted patterns")
    add("--output_path", required=True, help="the file to write, or a folder for several photos")
    add(
        "--load_size", type=int, default=224,
        help="pixels of the shorter side; 0 leaves the photo's own (default: 224)",
    )  # fmt: skip
    add(
        "--out_size", type=int, nargs=2, metavar=("H", "W"),
        help="resize the features to H x W cells (default: leave them as they are)",
    )  # fmt: skip
    add("--format", choices=FORMATS, default="pth", help="of files in a folder (default: pth)")
    add("--picture", help="PNG of photo and features as PCA colours; a folder for several photos")
    add("--batch_size", type=int, default=8, help="photos of one size at once (default: 8)")
    add("--workers", type=int, default=0, help="processes that read photos (default: 0)")
    add("--overwrite", action="store_true", help="remove what an earlier run left in the folder")
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
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from extractor import DenseExtractor, ViTExtractor, check_facts
from features import Features, build_features
from lift import load_lift, map_to_tokens, upsample
from loading import Loader
from photos import (
    fit,
    is_strip,
    list_images,
    naming_root,
    note_left_out,
    pca_rgb,
    read_image,
    titled_sheet,
)

# ---- in Python ----------------------------------------------------------------------------------


class ViTLiFTExtractor(nn.Module):
    """A frozen ViT with LiFT on top, as the LiFT release's class of this name offers them.

    A call gives maps; the methods of the release give tokens.

    Attributes: extractor (the ViTExtractor), lift (None without a path), model_type, model,
    lift_path, channel, patch, stride, layer, facet, device.

    Args:
        channel, patch: the backbone's own where left out. With LiFT others are refused.
        stride: None is the patch.
        layer: None is the last.
        silent: keep load_lift's notes back.
        model, device, backbone_path, dtype: ViTExtractor's.
        requires_grad: let gradients reach the images, and LiFT's weights, which are then to be
            trained. The ViT stays frozen. v.lift.requires_grad_() later does the same for LiFT.
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
        self.lift: nn.Module | None = None
        if lift_path:
            check_facts(self.extractor, channel, patch)
            self.lift = load_lift(lift_path, self.extractor, silent=silent)
            self.lift.requires_grad_(requires_grad)

        self.model_type = model_type
        self.lift_path = lift_path
        self.channel = self.extractor.channels
        self.patch = self.extractor.patch
        self.stride = self.extractor.stride
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

    def is_trained(self) -> bool:
        """Whether LiFT's weights are to be trained."""
        return self.lift is not None and any(w.requires_grad for w in self.lift.parameters())

    def train(self, mode: bool = True) -> "ViTLiFTExtractor":
        """Train LiFT, if its weights are to be trained; what is frozen stays in eval mode."""
        super().train(False)
        if self.lift is not None:
            self.lift.train(mode and self.is_trained())
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As every module's; a state_dict of the release holds lift.* only, and no ViT."""
        if not any(key.startswith("extractor.") for key in state_dict):
            backbone = self.extractor.state_dict(prefix="extractor.")
            state_dict = {**backbone, **state_dict}
        return super().load_state_dict(state_dict, strict, assign)

    def preprocess(
        self, image_path: Any, load_size: int | tuple[int, int] | None = None
    ) -> tuple[Tensor, Image.Image]:
        """Read, fit and normalise one photo (ViTExtractor.preprocess)."""
        return self.extractor.preprocess(image_path, load_size)

    def steps(self, images: Tensor, iterations: int) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> the ViT's map, and those after each step of LiFT.

        Without a module it is the ViT's [B, C, h, w] alone.
        """
        gradients = self.extractor.gradients or self.is_trained()
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            feats = self.extractor(images)
            if self.lift is None:
                return [feats]
            return upsample(self.lift, images, feats, iterations, return_all=True)

    def forward(self, images: Tensor, iterations: int = 1) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, 2^n h, 2^n w] float32.

        Without a module, the ViT's own [B, C, h, w].
        """
        return self.steps(images, iterations)[-1]

    def extract_descriptors(self, batch: Tensor) -> Tensor:
        """Descriptors [B, t, C] of normalised images, LiFT applied once if there is one."""
        return map_to_tokens(self(batch))

    def extract_descriptors_iterative_lift(
        self, batch: Tensor, lift_iter: int = 1, return_inter: bool = False
    ) -> Any:
        """Descriptors [B, t, C] after `lift_iter` applications of LiFT, if there is one.

        Args:
            return_inter: return those of every step, as a dict: back, lift_1, lift_2, ...
        """
        if not return_inter:
            return map_to_tokens(self(batch, lift_iter))
        tokens = {}
        for number, feats in enumerate(self.steps(batch, lift_iter)):
            name = f"lift_{number}" if number else "back"
            tokens[name] = map_to_tokens(feats)
        return tokens


# ---- which photo goes where ---------------------------------------------------------------------


class Job(NamedTuple):
    """One photo, the file of its features, and that of its picture."""

    photo: Path
    output: Path
    picture: Path | None

    def files(self) -> list[Path]:
        """What is to be written."""
        if self.picture is None:
            return [self.output]
        return [self.output, self.picture]

    def is_too_long(self) -> bool:
        """Whether the photo's name is too long for a file with one more suffix."""
        return any(len(os.fsencode(file.name)) > LONGEST_NAME for file in self.files())

    def is_done(self) -> bool:
        """Whether all its files are there."""
        return not self.is_too_long() and all(file.is_file() for file in self.files())


def find_photos(given: list[str]) -> dict[Path, Path]:
    """Find the photos, each with its name below its root (photos.naming_root).

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
            photos[file] = name
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

    Pictures that an earlier run has drawn among the photos are no photos. Every process of a
    torchrun computes the same list, and takes its part of it.

    Raises:
        ValueError: --output_path or --picture cannot be what is to be written, or --picture is one
            of the photos.
    """
    photos = find_photos(args.image_path)
    if args.picture and Path(args.picture).is_file():
        for photo in list(photos):
            if not photo.samefile(args.picture):
                continue
            # a run that drew it has written the features, too
            if len(photos) == 1 or not Path(args.output_path).is_file():
                what = f"--picture {args.picture} is one of the photos"
                raise ValueError(f"{what}: pass another name")
            del photos[photo]

    one_file = is_one_file(args, len(photos))
    if args.picture and one_file and Path(args.picture).suffix.lower() not in PICTURES:
        formats = ", ".join(PICTURES)
        what = f"--picture {args.picture} does not name a picture"
        raise ValueError(f"{what}: let it end in one of {formats}")

    jobs = []
    pictures = set()
    for photo, name in photos.items():
        output = Path(args.output_path)
        if not one_file:
            output = output / f"{name}.{args.format}"
        picture = None
        if args.picture and one_file:
            picture = Path(args.picture)
        elif args.picture:
            picture = Path(args.picture) / f"{name}.png"
            pictures.add(picture.resolve())
        jobs.append(Job(photo, output, picture))
    if not pictures:
        return jobs
    return [job for job in jobs if job.photo.resolve() not in pictures]


# ---- reading ------------------------------------------------------------------------------------

# index of a photo, its pixels [3, H, W] uint8, and its own size (W, H); or, instead of pixels and
# size, None and the reason why it cannot be used
Item = tuple[int, Tensor | None, Any]


class Photos(Dataset):
    """The photos of jobs, read and fitted: photos[i] is an Item.

    It holds paths and numbers only, so that it is cheap to send to a loader's workers.

    Args:
        patch: sides become multiples of it.
        load_size: pixels of the shorter side; None leaves the photo's own.
    """

    def __init__(self, jobs: list[Job], patch: int, load_size: int | None):
        self.jobs = jobs
        self.patch = patch
        self.load_size = load_size

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Item:
        path = self.jobs[index].photo
        try:
            if self.jobs[index].is_too_long():
                raise ValueError("the name is too long for a file of features: shorten it")
            photo = read_image(path)
            if self.load_size and is_strip(*photo.size):
                what = f"{photo.width}x{photo.height} pixels, a strip"
                raise ValueError(f"{what}: cut it, or pass --load_size 0")
            pixels = pil_to_tensor(fit(photo, self.patch, self.load_size))
            return index, pixels, photo.size
        except (ValueError, OSError) as error:
            return index, None, str(error).removeprefix(f"{path} is ")
        except MemoryError as error:
            return index, None, out_of_memory(error)


def batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Collect items into batches of one image size each; what cannot be read comes alone.

    A batch is full with batch_size photos, or MOST_PIXELS. At most four full batches' worth of
    photos waits for others of its size; then the largest batch goes as it is.
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
    step = extractor.stride * base_cells / cells  # in pixels of the input

    # the backbone's first cell is centred on patch/2 and reaches stride/2 to either side: the grid
    # begins at the difference
    begin = (extractor.patch - extractor.stride) / 2
    return (begin + step / 2) * scale, step * scale


def save(path: Path, feats: Tensor, facts: dict[str, Any]) -> None:
    """Write one map [C, h, w] as path's suffix says, whole or not at all.

    Args:
        facts: what goes beside a map, as JSON can hold it.
    """
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


# ---- the work -----------------------------------------------------------------------------------


class Extraction:
    """Extracts photos batch by batch, and writes each batch while the next one is computed.

    Attributes:
        skipped: photos that gave no features, each with the reason.
        grid: (h, w) of the last map that was written.

    Args:
        features: what gives the maps.
        made_by: the settings, which are written into the files.
        out_size: (h, w) that maps are resized to; None leaves them as they are.
    """

    def __init__(
        self, jobs: list[Job], features: Features, made_by: dict[str, Any], out_size: Any = None
    ):
        self.jobs = jobs
        self.features = features
        self.made_by = made_by
        self.out_size = out_size
        self.skipped: list[tuple[Path, str]] = []
        self.grid: tuple[int, ...] = (0, 0)

    def run(self, items: Iterable[Item], batch_size: int) -> None:
        """Make the files of all photos."""
        writing: Future | None = None
        with ThreadPoolExecutor(1) as writer, progress(total=len(self.jobs), unit="photo") as bar:
            for batch in batches(items, batch_size):
                for part, maps in self.compute(batch):
                    if writing:
                        writing.result()  # raises what was raised there
                    writing = writer.submit(self.write, part, maps)
                bar.update(len(batch))
            if writing:
                writing.result()

    def compute(self, batch: list[Item]) -> Iterator[tuple[list[Item], list[Tensor]]]:
        """The maps of a batch; where memory runs out, photo by photo.

        A photo that cannot be read, or does not fit by itself, is skipped.
        """
        index, first, reason = batch[0]
        if first is not None:
            try:
                maps = self.maps([pixels for _, pixels, _ in batch])
            except (MemoryError, RuntimeError) as error:
                reason = memory_error(error)
            else:
                yield batch, maps
                return

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
        for number, (index, pixels, size) in enumerate(batch):
            job = self.jobs[index]
            try:
                save(job.output, final[number], self.facts(job, pixels, size, final.shape[2:]))
                if job.picture:
                    shown = {"backbone": coarse[number]}
                    if self.features.upsampler is not None:
                        shown[self.made_by["upsample"]] = fine[number]
                    with replacing(job.picture) as temporary:
                        draw(to_pil_image(pixels), shown).save(temporary)
            except (MemoryError, RuntimeError) as error:
                self.skipped.append((job.photo, memory_error(error)))

    def facts(self, job: Job, pixels: Any, size: tuple[int, int], grid: Any) -> dict[str, Any]:
        """What is written beside the map of a photo of this size (W, H)."""
        self.grid = tuple(grid)
        photo_size = (size[1], size[0])
        input_size = tuple(pixels.shape[1:])
        return {
            "grid": self.grid,
            "image_size": photo_size,
            "input_size": input_size,
            **placement(self.features.backbone, input_size, photo_size, grid),
            "settings": {**self.made_by, "image_path": [str(job.photo)]},
        }


def memory_error(error: Exception) -> str:
    """What to tell of an error for which memory ran out; any other is raised again."""
    if not is_out_of_memory(error):
        raise error
    return out_of_memory(error)


# ---- the command --------------------------------------------------------------------------------


def start_processes() -> None:
    """Join the other processes of a torchrun, if it is one.

    The first to finish waits for the slowest, as long as it takes.

    Raises:
        ValueError: torchrun's RANK and WORLD_SIZE are set, but not by torchrun.
    """
    check_torchrun()
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def leave_processes() -> None:
    """Wait for the other processes of a torchrun, which ends them all as soon as one fails."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def open_folder(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Make the output folder, or see that it was made by the same settings (files.Results).

    The folders of the photos are settings too: their photos may have the same names.
    """
    folders = sorted({str(naming_root(path).resolve()) for path in args.image_path})
    made_by = deciding(args, leave_out=NOT_DECIDING, image_folders=folders, **facts)
    own = tuple(f"*.{name}" for name in FORMATS)
    if rank() == 0:
        remedy = "pass --overwrite, or another --output_path"
        Results(args.output_path, made_by, args.overwrite, own, remedy)
    if dist.is_initialized():
        dist.barrier()


def add_up(counts: list[int]) -> list[int]:
    """The sums of the counts of all processes of a torchrun."""
    if not dist.is_initialized():
        return counts
    totals = torch.tensor(counts)
    dist.all_reduce(totals)
    return totals.tolist()


def tell(
    args: argparse.Namespace, made_by: dict[str, Any], counts: dict[str, int], grid: Any
) -> None:
    """Say what was written, to a person and for --json."""
    for path in args.image_path:
        note_left_out(path)
    where = args.output_path
    if Path(where).is_dir():
        print(f"{where}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    elif counts["written"]:
        print(f"{where}: features of a grid of {grid[0]}x{grid[1]} cells")
    # an unquoted pattern may be thousands of names
    shown = {"image_path": args.image_path[:3], "image_paths": len(args.image_path)}
    report(args, {**made_by, **shown, **counts})


def main(args: argparse.Namespace) -> None:
    """Extract the features of all photos, batch by batch, and report."""
    check_range(args, load_size=0, batch_size=1, workers=0)
    if args.out_size and min(args.out_size) < 1:
        raise ValueError("--out_size needs two positive sizes: pass H W")
    all_jobs = find_jobs(args)
    if len(all_jobs) == 1:
        read_image(all_jobs[0].photo)  # a broken one is told before a backbone is built
    start_processes()
    features = build_features(args)
    facts = features.facts()
    made_by = settings(args, **facts, device=str(features.backbone.device))

    jobs = left = all_jobs[rank() :: world_size()]
    if all_jobs[0].output != Path(args.output_path):  # a folder
        open_folder(args, facts)
        left = [job for job in jobs if not job.is_done()]
    photos = Photos(left, features.patch, args.load_size or None)
    extraction = Extraction(left, features, made_by, args.out_size)
    extraction.run(Loader(photos, args.workers), args.batch_size)

    broken = extraction.skipped
    if len(all_jobs) == 1 and broken:
        raise ValueError(f"{broken[0][0]}: {broken[0][1]}")
    for photo, reason in broken:
        skipped(photo, reason)
    # over all processes: one that met only broken photos has not failed
    written, kept, missing = add_up(
        [len(left) - len(broken), len(jobs) - len(left), len(broken)]
    )
    if rank() == 0:
        counts = {"written": written, "kept": kept, "skipped": missing}
        tell(args, made_by, counts, extraction.grid)
    leave_processes()
    if missing and not written:
        if rank() > 0:  # the first process says why
            raise SystemExit(2)
        raise ValueError(f"none of {missing} photos gave features: replace or remove them")


if __name__ == "__main__":
    parser().run(main)
