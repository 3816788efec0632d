"""Dense features of photos: a frozen ViT's descriptors, doubled in resolution by LiFT.

    python lift_extractor.py --image_path assets/sample.jpg --output_path sample.pth \\
        --model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_attend.pth \\
        [--lift_iter 2] [--picture sample.png]
    python lift_extractor.py --image_path photos/ --output_path features/ --format npz \\
        --model_type dino_vits16
    torchrun --nproc_per_node 4 lift_extractor.py --image_path 'photos/**/*.jpg' \\
        --output_path features/

For one photo, --output_path may be a file that ends in .pth, .npz or .safetensors. Otherwise it is
a folder with one file a photo (cat.jpg.pth, in the photo's subfolder). A second run into the same
folder keeps the files that are there and makes the others. Other settings, or photos of another
folder, need --overwrite or another --output_path. Photos that cannot be read, or do not fit into
memory, are named at the end. --json FILE has the counts of photos that were written, kept and
skipped, and all settings.

A .pth is a CPU tensor [1, t, C], row by row. .npz and .safetensors hold the map [C, h, w], its
grid, the photo's size, the settings, and where its cells lie in the photo: cell (i, j) is centred
on pixel (first_x + j*step_x, first_y + i*step_y). A photo at 224 takes about 30 ms on one CPU core
with vit_mini16 and LiFT.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_range,
    check_torchrun,
    deciding,
    rank,
    report,
    settings,
    skipped,
    world_size,
)
from files import Results

FORMATS = ("pth", "npz", "safetensors")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
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

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from extraction import Extraction, Job, Photos
from extractor import ViTExtractor, check_facts
from features import build_features
from lift import load_lift, map_to_tokens, upsample
from loading import Loader
from photos import list_images, naming_root, note_left_out, read_image

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
        silent: print none of load_lift's notes.
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

    def __repr__(self) -> str:
        return f"ViTLiFTExtractor({self.extractor!r}, lift_path={str(self.lift_path)!r})"

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
        """Normalised images [B, 3, H, W] -> the ViT's map, and that after each step of LiFT."""
        gradients = self.extractor.gradients or self.is_trained()
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            feats = self.extractor(images)
            if self.lift is None:
                return [feats]
            return upsample(self.lift, images, feats, iterations, return_all=True)

    def forward(self, images: Tensor, iterations: int = 1) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, 2^n h, 2^n w]; n is 0 without LiFT."""
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


def find_photos(given: list[str]) -> dict[Path, Path]:
    """The photos, each with its name below its root; ValueError if two would get one file."""
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
    """Whether --output_path is the one file to write, and not a folder; ValueError if neither."""
    output = Path(args.output_path)
    if output.is_dir() or args.output_path.endswith(("/", os.sep)):
        return False
    if photos == 1 and output.suffix[1:] in FORMATS:
        return True
    if output.is_file() or output.suffix:
        formats = ", ".join(f".{name}" for name in FORMATS)
        what = f"--output_path {output} is not a folder, nor one of {formats} for one photo"
        raise ValueError(f"{what}: pass one of these, or end a folder's name with /")
    return False


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """All photos, each with the files that are to be written, whether done or not.

    Pictures that an earlier run has drawn among the photos are not photos. Every process of a
    torchrun computes the same list, and takes its part of it.
    """
    photos = find_photos(args.image_path)
    if args.picture:
        drawn = [photo for photo in photos if photo.resolve() == Path(args.picture).resolve()]
        # a run that drew it has written the features, too
        if drawn and (len(photos) == 1 or not Path(args.output_path).is_file()):
            raise ValueError(f"--picture {args.picture} is one of the photos: pass another name")
        for photo in drawn:
            del photos[photo]

    one_file = is_one_file(args, len(photos))
    if args.picture and one_file and Path(args.picture).suffix.lower() not in PICTURES:
        formats = ", ".join(PICTURES)
        what = f"--picture {args.picture} does not name a picture"
        raise ValueError(f"{what}: let it end in one of {formats}")

    jobs = []
    for photo, name in photos.items():
        output = Path(args.output_path)
        picture = Path(args.picture) if args.picture else None
        if not one_file:
            output /= f"{name}.{args.format}"
            if picture:
                picture /= f"{name}.png"
        jobs.append(Job(photo, output, picture))
    pictures = {job.picture.resolve() for job in jobs if job.picture}
    return [job for job in jobs if job.photo.resolve() not in pictures]


# ---- the command --------------------------------------------------------------------------------


def open_folder(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Make the output folder, or see that it was made by the same settings (files.Results).

    The folders of the photos are among them: photos of two folders may have the same names.
    """
    folders = sorted({str(naming_root(path).resolve()) for path in args.image_path})
    decisive = deciding(args, leave_out=NOT_DECIDING, image_folders=folders, **facts)
    own = tuple(f"*.{name}" for name in FORMATS)
    if rank() == 0:
        remedy = "pass --overwrite, or another --output_path"
        Results(args.output_path, decisive, args.overwrite, own, remedy)
    if world_size() > 1:
        dist.barrier()


def finish(counts: dict[str, int]) -> dict[str, int]:
    """Wait for the other processes of a torchrun, leave it, and return the sums of all counts."""
    totals = torch.tensor(list(counts.values()))
    if world_size() > 1:
        dist.all_reduce(totals)
        dist.destroy_process_group()
    return dict(zip(counts, totals.tolist()))


def main(args: argparse.Namespace) -> None:
    """Extract the features of all photos, batch by batch, and report."""
    check_range(args, load_size=0, batch_size=1, workers=0)
    if args.out_size and min(args.out_size) < 1:
        raise ValueError("--out_size needs two positive sizes: pass H W")
    all_jobs = find_jobs(args)
    if len(all_jobs) == 1:
        read_image(all_jobs[0].photo)  # a broken one is told before a backbone is built
    check_torchrun()
    if world_size() > 1:  # the first to finish waits for the slowest, as long as it takes
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    features = build_features(args)
    facts = features.facts()
    used = settings(args, **facts, device=str(features.backbone.device))

    jobs = left = all_jobs[rank() :: world_size()]
    if all_jobs[0].output != Path(args.output_path):  # into a folder
        open_folder(args, facts)
        left = [job for job in jobs if not job.is_done()]
    photos = Photos(left, features.patch, args.load_size or None)
    extraction = Extraction(left, features, used, args.out_size)
    extraction.run(Loader(photos, args.workers), args.batch_size)

    broken = extraction.skipped
    if len(all_jobs) == 1 and broken:
        raise ValueError(f"{broken[0][0]}: {broken[0][1]}")
    for photo, reason in broken:
        skipped(photo, reason)
    written = len(left) - len(broken)
    kept = len(jobs) - len(left)
    counts = finish({"written": written, "kept": kept, "skipped": len(broken)})
    if rank() > 0:
        return  # the first process reports

    for path in args.image_path:
        note_left_out(path)
    done = ", ".join(f"{count} {what}" for what, count in counts.items())
    if Path(args.output_path).is_file():
        done = f"features of a grid of {extraction.grid[0]}x{extraction.grid[1]} cells"
    print(f"{args.output_path}: {done}")
    # an unquoted pattern may be thousands of names
    shown = {"image_path": args.image_path[:3], "image_paths": len(args.image_path)}
    report(args, {**used, **shown, **counts})
    if counts["skipped"] and not counts["written"]:
        raise ValueError(f"none of {counts['skipped']} photos gave features: replace them")


if __name__ == "__main__":
    parser().run(main)
