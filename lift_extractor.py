"""Dense features of photos: a frozen ViT's descriptors, doubled in resolution by LiFT as often as you like.

    python lift_extractor.py --image_path assets/sample.jpg --output_path sample.pth --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16.pth [--lift_iter 4] [--picture sample.png]
    python lift_extractor.py --image_path photos/ --output_path features/ --format npz --model_type dino_vits16
    torchrun --nproc_per_node 4 lift_extractor.py --image_path 'photos/**/*.jpg' --output_path features/

One image and an --output_path that ends in .pth, .npz or .safetensors: that file. Otherwise --output_path is a folder with one
file a photo (cat.jpg.pth, in the photo's subfolder); what exists is skipped, what cannot be read is named at the end.
A .pth is a CPU tensor [1, t, C], row by row; .npz and .safetensors hold the map [C, h, w], its grid, the photo's size, where its
cells lie in the photo (cell (i, j) is centred on pixel (first_x + j*step_x, first_y + i*step_y)) and the settings.
The last line printed is JSON: settings and counts. A photo at 224 takes 30 ms on one CPU core with vit_mini16 and LiFT.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm import tqdm

from extractor import Command, ViTExtractor, add_backbone_args, list_images, read_image, replacing, settings
from lift import add_lift_args, load_lift, map_to_tokens, pca_rgb, upsample, upsampler

FORMATS = ("pth", "npz", "safetensors")


class ViTLiFTExtractor:
    """A ViTExtractor with LiFT on top (both as the reference release's class of this name offers them).

    `channel` and `patch` are read off the backbone; given, they must agree with it. Without `lift_path` the features are the
    backbone's own. `silent` keeps load_lift's notice back. A call gives maps: images [B, 3, H, W] -> [B, C, 2h, 2w].
    Raises ValueError for what does not fit together.
    """

    def __init__(
        self, model_type="dino_vits16", lift_path=None, channel=None, patch=None, stride=None, layer=None, facet="key",
        model=None, device="auto", silent=False, backbone_path=None, dtype="float32",
    ):  # fmt: skip
        self.vit = ViTExtractor(model_type, stride, model, device, backbone_path, layer, facet, dtype)
        check_facts(self.vit, channel, patch)
        self.lift = load_lift(lift_path, self.vit, silent=silent) if lift_path else None

    def preprocess(self, image_path, load_size=None):
        """Read and fit an image: (normalised tensor [1, 3, H, W] on the CPU, the resized PIL image)."""
        return self.vit.preprocess(image_path, load_size)

    @torch.no_grad()
    def __call__(self, images, iterations=1):
        """Normalised images [B, 3, H, W] -> map [B, C, 2^n h, 2^n w] float32 (the backbone's [B, C, h, w] without LiFT)."""
        feats = self.vit(images)
        return upsample(self.lift, images, feats, iterations) if self.lift else feats

    def extract_descriptors(self, batch):
        """Descriptors [B, t, C] of normalised images, LiFT applied once."""
        return map_to_tokens(self(batch))

    @torch.no_grad()
    def extract_descriptors_iterative_lift(self, batch, lift_iter=1, return_inter=False):
        """Descriptors [B, t, C] after `lift_iter` applications of LiFT; with `return_inter` the list of those of every step."""
        if self.lift is None:
            raise ValueError("there is no LiFT to apply: pass lift_path")
        steps = upsample(self.lift, batch, self.vit(batch), lift_iter, return_all=return_inter)
        return [map_to_tokens(feats) for feats in steps[1:]] if return_inter else map_to_tokens(steps)


def check_facts(extractor, channel=None, patch=None):
    """Raise ValueError if channel or patch, where given, are not the extractor's."""
    for flag, given, real in (("channel", channel, extractor.width), ("patch", patch, extractor.patch)):
        if given not in (None, real):
            raise ValueError(f"--{flag} {given}, but {extractor.name} {extractor.facet} has {real}: leave --{flag} out")


# ---- which photo goes where -----------------------------------------------------------------------------------------


def find_photos(given):
    """Photos of files, folders and patterns: {path: its path below the folder given, or below all that a pattern found}."""
    photos = {}
    for entry in given:
        files = list_images(entry)
        root = entry if Path(entry).is_dir() else os.path.commonpath([file.parent for file in files])
        photos |= {file: file.relative_to(root) for file in files}
    if len(set(photos.values())) < len(photos):
        raise ValueError("two of the photos would get one output file: pass the folder that holds them all")
    return photos


def find_jobs(args):
    """This process's share of the work: list of (photo, output file)."""
    photos, output = find_photos(args.image_path), Path(args.output_path)
    one_file = len(photos) == 1 and output.suffix[1:] in FORMATS and not output.is_dir()
    if output.is_file() and not one_file:
        raise ValueError(f"{output} is a file, but {len(photos)} photos need a folder: pass another --output_path")
    jobs = [(photo, output if one_file else output / f"{name}.{args.format}") for photo, name in photos.items()]
    # shared out before looking at what exists: the other processes are writing by now
    jobs = jobs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    return [job for job in jobs if one_file or args.overwrite or not job[1].exists()]


class Photos(Dataset):
    """Photos by their paths: (index, normalised image [3, H, W], the photo's own (W, H)), or (index, None, what is wrong)."""

    def __init__(self, paths, extractor, load_size):
        self.paths, self.extractor, self.load_size = paths, extractor, load_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            photo = read_image(self.paths[index])
            fitted = to_tensor(self.extractor.fit(photo, self.load_size))
            return index, self.extractor.normalize(fitted), photo.size
        except (ValueError, OSError) as error:
            return index, None, str(error)


def batches(photos, batch_size):
    """Batch items of one size; at most four batches wait for company, then the fullest goes as it is."""
    waiting = {}
    for item in photos:
        queue = waiting.setdefault(None if item[1] is None else item[1].shape, [])
        queue.append(item)
        if len(queue) == batch_size or item[1] is None:
            yield waiting.pop(None if item[1] is None else item[1].shape)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


# ---- what is written ------------------------------------------------------------------------------------------------


def placement(extractor, input_size, photo_size, grid):
    """Where the cells of a map lie, in pixels of the photo: (i, j) is centred on (first_x + j*step_x, first_y + i*step_y).

    `input_size` and `photo_size` are (H, W), `grid` is (h, w) after LiFT, which splits every cell of the backbone's grid evenly.
    """
    first, step = [], []
    for side, photo, base, cells in zip(input_size, photo_size, extractor.grid(*input_size), grid):
        split, scale = cells / base, photo / side
        step.append(extractor.stride / split * scale)
        first.append((extractor.patch / 2 - extractor.stride / 2 + extractor.stride / split / 2) * scale)
    return {"first_y": first[0], "first_x": first[1], "step_y": step[0], "step_x": step[1]}


def save(path, feats, facts):
    """Write one map [C, h, w] as path's suffix says, atomically; `facts` (a dict for JSON) goes beside a map."""
    feats = feats.cpu()
    with replacing(path) as temporary:
        if path.suffix == ".pth":
            torch.save(map_to_tokens(feats[None]).contiguous(), temporary)  # [1, t, C], as the reference writes
        elif path.suffix == ".npz":
            arrays = {key: np.asarray(value) for key, value in facts.items() if key != "settings"}
            np.savez(temporary, map=feats.numpy(), settings=json.dumps(facts["settings"]), **arrays)
        else:
            save_file({"map": feats.contiguous()}, temporary, {key: json.dumps(value) for key, value in facts.items()})


def picture(photo, maps, height=336):
    """A sheet on white, PIL RGB: the photo, then the maps {title: [C, h, w]} as colours of one PCA basis, titles above."""
    width, bar, gap = round(height * photo.width / photo.height), 28, 8
    panels = [photo.resize((width, height), Image.Resampling.LANCZOS)]
    panels += [Image.fromarray(rgb).resize((width, height), Image.Resampling.NEAREST) for rgb in pca_rgb(list(maps.values()))]
    sheet = Image.new("RGB", (gap + len(panels) * (width + gap), height + bar + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    titles = ["photo"] + [f"{title} {feats.shape[1]}x{feats.shape[2]}" for title, feats in maps.items()]
    for i, (panel, title) in enumerate(zip(panels, titles)):
        sheet.paste(panel, (gap + i * (width + gap), bar))
        draw.text((gap + i * (width + gap), 5), title, "black", font)
    return sheet


# ---- the command ----------------------------------------------------------------------------------------------------


def parser():
    """The command line."""
    command = Command(__doc__)
    command.add_argument("--image_path", required=True, nargs="+", help="photos, folders of photos, or quoted patterns")
    command.add_argument("--output_path", required=True, help="the file to write, or a folder for several photos")
    command.add_argument("--load_size", type=int, default=224, help="pixels of the shorter side; 0: as it is (default: 224)")
    command.add_argument("--channel", type=int, help="channels of the descriptors; only checked (default: the backbone's)")
    command.add_argument("--patch", type=int, help="patch of the backbone; only checked (default: the backbone's)")
    command.add_argument("--out_size", type=int, nargs=2, metavar=("H", "W"), help="resize the final map bilinearly to H x W")
    command.add_argument("--format", choices=FORMATS, default="pth", help="of the files in a folder (default: pth)")
    command.add_argument("--picture", help="a PNG of photo, backbone and LiFT as PCA colours; a folder for several photos")
    command.add_argument("--batch_size", type=int, default=8, help="photos of one size at once (default: 8)")
    command.add_argument("--workers", type=int, default=0, help="processes that read photos (default: 0, this one)")
    command.add_argument("--overwrite", action="store_true", help="compute again what the output folder already holds")
    add_backbone_args(command)
    add_lift_args(command)
    return command


def check_flags(args):
    """Raise ValueError for flags out of range."""
    for flag, low in (("load_size", 0), ("lift_iter", 0), ("batch_size", 1), ("workers", 0)):
        if getattr(args, flag) < low:
            raise ValueError(f"--{flag} {getattr(args, flag)} is too small: pass {low} or more")
    if args.out_size and min(args.out_size) < 1:
        raise ValueError("--out_size needs two positive sizes: pass H W")


def picture_path(args, output):
    """Where the picture of the photo whose features go to `output` is written."""
    below = Path(args.output_path) in output.parents
    return Path(args.picture) / output.relative_to(args.output_path).with_suffix(".png") if below else Path(args.picture)


@torch.no_grad()
def process(batch, jobs, extractor, up, args):
    """Extract one batch of Photos' items of one size, and write its files."""
    images = torch.stack([image for _, image, _ in batch]).to(extractor.device)
    feats = extractor(images)
    dense = up(images, feats)
    final = F.interpolate(dense, size=args.out_size, mode="bilinear", align_corners=False) if args.out_size else dense
    for k, (index, image, (width, height)) in enumerate(batch):
        sizes = {"grid": list(final.shape[2:]), "image_size": [height, width], "input_size": list(image.shape[1:])}
        place = placement(extractor, sizes["input_size"], sizes["image_size"], sizes["grid"])
        save(jobs[index][1], final[k], sizes | place | {"settings": settings(args)})
        if args.picture:
            maps = {"backbone": feats[k]} | ({up.how: dense[k]} if up.factor > 1 else {})
            photo = to_pil_image(extractor.denormalize(image).clamp(0, 1))
            with replacing(picture_path(args, jobs[index][1])) as temporary:
                picture(photo, maps).save(temporary)


def main(args):
    """Extract, batch by batch, and report."""
    check_flags(args)
    jobs = find_jobs(args)
    extractor = ViTExtractor.from_args(args)
    check_facts(extractor, args.channel, args.patch)
    up = upsampler(args, extractor)
    photos = Photos([photo for photo, _ in jobs], extractor, args.load_size or None)
    bar, unreadable = tqdm(total=len(jobs), unit="photo", disable=len(jobs) < 2 or None), []
    for batch in batches(DataLoader(photos, batch_size=None, num_workers=args.workers), args.batch_size):
        if batch[0][1] is None:
            unreadable.append(batch[0][2])
        else:
            process(batch, jobs, extractor, up, args)
        bar.update(len(batch))
    bar.close()
    if unreadable and len(unreadable) == len(jobs):
        raise ValueError(unreadable[0] if len(jobs) == 1 else f"none of {len(jobs)} photos could be read: {unreadable[0]}")
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)
    print(json.dumps(settings(args) | {"written": len(jobs) - len(unreadable), "unreadable": len(unreadable)}))


if __name__ == "__main__":
    parser().run(main)
