"""Train vit_mini16, the small ViT that ships in pretrained/, by distilling a teacher.

    python pretrained/distill_mini.py --dataroot ../shared/data/train_images --minutes 60 \\
        --val_dataroot ../shared/data/coco20k ../shared/data/voc \\
        --backbone_path ../shared/weights/vit_tiny_patch16_224.safetensors --output mini.safetensors

Teacher and student are both timm's vit_tiny_patch16_224 (12 blocks, 192 channels, patch 16). No
tensor of the teacher is copied. Every parameter of the student, position embedding included, starts
random or constant. All it sees of the teacher are queries, keys, values and tokens on heavily
augmented crops of the photos.

Each block learns to reproduce the teacher's. At first its input is the teacher's own, so that all
twelve learn at once, however bad those before still are. Over the first `--forcing` of the run more
and more samples enter as the student itself made them, until it runs end to end. Crops are 112 to
448 pixels wide.

As it goes, it prints the mean cosine of the student's last-layer keys with the teacher's on the
photos of `--val_dataroot`. It writes the weights (float16) and a .json of settings, figures and
curve, and ends with a table of these figures. It is meant for an hour on 2 CPU cores, or for 8
minutes on an H100 with `--tokens 50176`.

Notation: B batch, C channels, d those of a head, t patches of an image, S its pixels.
"""

import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the nouns lie one folder up

from command import Command, note, progress, report, settings
from files import replacing, save_tensors, write_text


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", nargs="+", required=True, help="folders of photos to train on")
    add("--val_dataroot", nargs="+", required=True, help="folders of other photos to measure on")
    add("--backbone_path", help="the teacher's weight file instead of a download")
    add(
        "--output", default="pretrained/vit_mini16.safetensors",
        help="where the weights go, and a .json beside them (default: %(default)s)",
    )  # fmt: skip
    add("--minutes", type=float, default=60, help="how long to train (default: 60)")
    add("--steps", type=int, help="how many steps to train, instead of --minutes: repeatable")
    tokens = "patches per step; 196 are a crop of 224 pixels (default: 6272)"
    add("--tokens", type=int, default=6272, help=tokens)
    rate = "peak rate, after 2 %% warmup; then it falls to 0 as a cosine (default: 0.002)"
    add("--lr", type=float, default=2e-3, help=rate)
    add("--weight_decay", type=float, default=0.02, help="AdamW's, of matrices (default: 0.02)")
    forcing = "share of the run in which samples still enter blocks as the teacher's (default: 0.4)"
    add("--forcing", type=float, default=0.4, help=forcing)
    measured = "share of the run between measurements (default: 0.1)"
    add("--val_every", type=float, default=0.1, help=measured)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    precision = "precision while training (default: bfloat16)"
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help=precision)
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    add("--resume", action="store_true", help="go on from the checkpoint beside --output")
    add("--seed", type=int, default=0, help="decides whatever is random (default: 0)")
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from backbones import load_backbone_file
from extractor import ViTExtractor
from photos import list_images, read_image

TEACHER = "vit_tiny_patch16_224"
FACETS = ("query", "key", "value", "token")
SIZES = (112, 160, 224, 320, 448)  # pixels of a training crop
MEASURED = (112, 224, 448)  # pixels at which student and teacher are compared in the end
CANVAS = 448  # photos are kept in memory as squares of this size


# ---- the two networks ---------------------------------------------------------------------------


def random_student(device: str, seed: int) -> ViTExtractor:
    """A trainable ViT of the teacher's shape, every parameter random or constant."""
    torch.manual_seed(seed)
    model = timm.create_model(TEACHER, num_classes=0)
    student = ViTExtractor(TEACHER, stride=None, model=model, device=device)
    student.model.requires_grad_(True)
    return student


def run_block(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run one block of a ViT on its input [B, 1+t, C].

    Returns:
        Its qkv projection [B, 1+t, 3C], and its output [B, 1+t, C].
    """
    qkv = block.attn.qkv(block.norm1(x))                    # [B, 1+t, 3C]
    by_head = qkv.unflatten(2, (3, block.attn.num_heads, -1))
    q, k, v = by_head.permute(2, 0, 3, 1, 4)                # [B, heads, 1+t, d] each
    attended = F.scaled_dot_product_attention(q, k, v)
    attended = attended.transpose(1, 2).flatten(2)          # [B, 1+t, C]
    x = x + block.attn.proj(attended)
    return qkv, x + block.mlp(block.norm2(x))


# ---- photos and crops ---------------------------------------------------------------------------


def load_photos(folders: list[str], size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Read all photos of some folders as squares.

    Returns:
        Squares [N, 3, size, size] uint8, true aspect ratios W/H [N], and a line for each file that
        could not be read.
    Raises:
        ValueError: none can be read.
    """

    def read(path):
        """(pixels, aspect) of a photo, or (None, what is wrong with it)."""
        try:
            image = read_image(path)
            square = image.resize((size, size), Image.LANCZOS)
            return np.array(square), image.width / image.height
        except (ValueError, OSError) as error:
            return None, str(error)

    paths = []
    for folder in folders:
        paths += list_images(folder)

    squares = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    aspects = []
    broken = []
    with ThreadPoolExecutor() as pool:
        photos = progress(pool.map(read, paths), len(paths), "photo", "reading photos")
        for pixels, aspect_or_error in photos:
            if pixels is None:
                broken.append(aspect_or_error)
            else:
                # the readable ones lie side by side
                squares[len(aspects)] = torch.from_numpy(pixels).permute(2, 0, 1)
                aspects.append(aspect_or_error)
    if not aspects:
        what = f"none of the {len(paths)} images at {' '.join(map(str, folders))} can be read"
        raise ValueError(f"{what}: pass a folder of photos")
    return squares[: len(aspects)], torch.tensor(aspects), broken


def crops(
    photos: Tensor, aspects: Tensor, count: int, size: int, rng: torch.Generator
) -> Tensor:
    """Cut out `count` crops, random in place, scale, aspect, rotation and flip.

    What lies beyond the photo is its mirror image.

    Args:
        photos: squares [N, 3, ., .] uint8.
        aspects: of the photos as they were, [N].
    Returns:
        [count, 3, size, size] in 0..1.
    """

    def uniform(low, high):
        return torch.empty(count, device=photos.device).uniform_(low, high, generator=rng)

    index = torch.randint(len(photos), (count,), device=photos.device, generator=rng)

    # width and height are shares of the photo's sides, x and y places of the centre in -1..1
    area = uniform(math.log(0.06), math.log(2)).exp()
    ratio = uniform(-0.4, 0.4).exp() / aspects[index]
    width = (area * ratio).sqrt()
    height = (area / ratio).sqrt()
    x = (1 - width).clamp(min=0) * uniform(-1, 1)
    y = (1 - height).clamp(min=0) * uniform(-1, 1)
    angle = uniform(-1, 1) ** 3 * 0.7       # radians, mostly small
    width = width * uniform(-1, 1).sign()   # a negative width is a mirror image

    cos = angle.cos()
    sin = angle.sin()
    # the matrix from places in the crop to places in the photo, both -1..1, row by row
    entries = [width * cos, -width * sin, x, height * sin, height * cos, y]
    theta = torch.stack(entries, 1).view(-1, 2, 3)          # [count, 2, 3]

    # sampled at twice the size, and halved below
    grid = F.affine_grid(theta, [count, 3, 2 * size, 2 * size], align_corners=False)
    chosen = photos[index].float() / 255
    twice = F.grid_sample(chosen, grid, padding_mode="reflection", align_corners=False)

    # LiFT is trained on strided, aliased images too
    smooth = torch.rand((), device=photos.device, generator=rng) < 0.5
    return torch.where(smooth, F.avg_pool2d(twice, 2), twice[:, :, ::2, ::2])


def recolour(images: Tensor, rng: torch.Generator) -> Tensor:
    """Give each image [B, 3, S, S] its own brightness, contrast, saturation, hues and noise.

    Most of the changes are mild. The result is clamped to 0..1.
    """

    def normal(*shape):
        return torch.randn(len(images), *shape, device=images.device, generator=rng)

    strength = torch.rand(len(images), 1, 1, device=images.device, generator=rng) ** 2

    # a matrix [B, 3, 3] towards grey, with hues mixed and contrast scaled
    eye = torch.eye(3, device=images.device)
    grey = torch.full((3, 3), 1 / 3, device=images.device)
    colours = torch.lerp(eye, grey, 0.5 * strength * normal(1, 1)) + 0.2 * strength * normal(3, 3)
    colours = colours * (0.3 * strength * normal(1, 1)).exp()

    mean = images.mean((2, 3), keepdim=True)
    strength = strength[..., None]
    images = torch.einsum("bij,bjhw->bihw", colours, images - mean) + mean
    images = images + 0.15 * strength * normal(3, 1, 1)
    noise = 0.1 * strength**2 * normal(*images.shape[1:])
    return (images + noise).clamp(0, 1)


def mix(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mix images [B, 3, S, S] with their neighbours in the batch.

    A half stays as it is, a quarter is blended, and in a quarter a rectangle is pasted in.
    """
    count = len(images)
    size = images.shape[-1]
    random_numbers = torch.rand(6, count, 1, 1, device=images.device, generator=rng)
    kind, share, x, y, width, height = random_numbers

    at = (torch.arange(size, device=images.device) + 0.5) / size
    # (x, y) is the centre of the rectangle, as shares of the image
    columns = (at - x).abs() < width / 2                 # [B, 1, S]
    rows = (at[:, None] - y).abs() < height / 2          # [B, S, 1]
    pasted = (columns & rows).float()                    # [B, S, S]
    # how much of the neighbour comes in: none, up to a half everywhere, or all of a rectangle
    weight = torch.where(kind < 0.5, share / 2, 0.0)     # [B, 1, 1]
    weight = torch.where(kind < 0.25, pasted, weight)    # [B, S, S]
    return images.lerp(images.roll(1, 0), weight[:, None])


def make_batch(
    photos: Tensor, aspects: Tensor, tokens: int, seed: int, step: int
) -> tuple[Tensor, torch.Generator]:
    """Images [B, 3, S, S] in 0..1 of one random size S, and the generator behind them.

    It is a function of photos, seed and step, so that a resumed run sees what it would have seen.

    Args:
        tokens: about how many patches all images have together.
    """
    rng = torch.Generator(photos.device).manual_seed(seed * 2**32 + step)
    size = random.Random(f"{seed} {step}").choice(SIZES)
    count = max(2, tokens // (size // 16) ** 2)
    images = crops(photos, aspects, count, size, rng)
    return mix(recolour(images, rng), rng), rng


# ---- the loss, and what is measured -------------------------------------------------------------


def unexplained(ours: Tensor, theirs: Tensor) -> Tensor:
    """The share of the teacher's variance that the student misses, of features [B, t, C].

    It is 0 for equal features, 1 for the best constant.
    """
    theirs = theirs.float()
    variance = (theirs - theirs.mean((0, 1))).square().mean()
    return (ours - theirs).square().mean() / variance


def token_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """The squared error of tokens [B, t, C] relative to their own squared length, averaged.

    It is relative because some tokens are a hundred times as long as the rest.

    Source: Darcet et al., "Vision Transformers Need Registers", 2023.
    """
    theirs = theirs.float()
    squared_error = (ours - theirs).square().sum(-1)
    return (squared_error / theirs.square().sum(-1)).mean()


def match_block(
    student: nn.Module, teacher: nn.Module, ours: Tensor, theirs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the student's block on `ours` and the teacher's on `theirs`, and compare.

    Args:
        student, teacher: the two blocks, at the same depth.
        ours, theirs: their inputs [B, 1+t, C].
    Returns:
        Their outputs [B, 1+t, C], and the student's error: what it misses of query, key and value,
        of the direction of keys, and of the tokens. 0 is perfect.
    """
    with torch.no_grad():
        their_qkv, theirs = run_block(teacher, theirs)
    our_qkv, ours = run_block(student, ours)

    our_parts = our_qkv.float().chunk(3, -1)  # query, key and value, [B, 1+t, C] each
    their_parts = their_qkv.float().chunk(3, -1)
    missed = sum(unexplained(mine, other) for mine, other in zip(our_parts, their_parts)) / 3
    direction = 1 - F.cosine_similarity(our_parts[1], their_parts[1], dim=-1).mean()
    return ours, theirs, missed + direction + token_error(ours, theirs)


def errors(
    student: ViTExtractor,
    teacher: ViTExtractor,
    images: Tensor,
    free: float,
    rng: torch.Generator,
    match: Callable = match_block,
) -> Tensor:
    """The student's errors on normalised images [B, 3, S, S].

    Args:
        free: the share of samples that enter each block as the student's own tokens; the others
            enter as the teacher's.
    Returns:
        [depth + 2]: of the embedding, of every block, and of the final norm.
    """
    grid = student.grid(*images.shape[2:])
    with torch.no_grad():
        theirs = teacher.embed(images, grid)
    ours = student.embed(images, grid)
    result = [token_error(ours, theirs)]

    for our_block, their_block in zip(student.model.blocks, teacher.model.blocks):
        own = torch.rand(len(images), 1, 1, device=images.device, generator=rng) < free
        entering = torch.where(own, ours, theirs)                   # [B, 1+t, C]
        ours, theirs, error = match(our_block, their_block, entering, theirs)
        result.append(error)

    last = token_error(student.model.norm(ours), teacher.model.norm(theirs))
    return torch.stack([*result, last])


def agreement(
    student: ViTExtractor, teacher: ViTExtractor, photos: Tensor, size: int, facet: str = "key"
) -> tuple[float, float]:
    """Mean cosines with the teacher's features in the last layer, over all patches, in -1..1.

    Args:
        photos: [N, 3, ., .] uint8.
        size: the backbones see the photos at size x size pixels.
    Returns:
        That of the student's features, and that of the best constant: the teacher's mean.
    """
    ours = []
    theirs = []
    for some in photos.split(8):
        small = F.interpolate(some / 255, (size, size), mode="bilinear", antialias=True)
        ours.append(student.extract_descriptors(student.normalize(small), facet=facet))
        theirs.append(teacher.extract_descriptors(teacher.normalize(small), facet=facet))
    ours = torch.cat(ours)                          # [N, 1, t, C]
    theirs = torch.cat(theirs)

    constant = theirs.mean((0, 2), keepdim=True)    # [1, 1, 1, C]
    of_student = F.cosine_similarity(ours, theirs, dim=-1).mean().item()
    of_constant = F.cosine_similarity(constant, theirs, dim=-1).mean().item()
    return of_student, of_constant


# ---- the run ------------------------------------------------------------------------------------


def schedule(done: float, lr: float, forcing: float) -> tuple[float, float]:
    """The learning rate, and the share of samples that run free, when 0..1 of the run is done.

    The rate has 2 % warmup, then falls as half a cosine to 0.
    """
    warmup = done / 0.02
    decay = 0.5 + 0.5 * math.cos(math.pi * done)
    rate = lr * min(1, warmup, decay)
    if forcing == 0:
        return rate, 1.0
    return rate, min(1.0, done / forcing)


def optimizer_of(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    """AdamW that decays the blocks' matrices alone; each group's `boost` multiplies the rate.

    The embedding is one linear map of ill-conditioned input, pixels, and every block stands on it:
    at five times the rate its error falls to a third in the same steps.
    """
    embedding = []
    matrices = []
    vectors = []
    for name, parameter in model.named_parameters():
        if name.startswith(("pos_embed", "cls_token", "patch_embed")):
            embedding.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": embedding, "boost": 5, "weight_decay": 0.0},
        {"params": matrices, "boost": 1, "weight_decay": decay},
        {"params": vectors, "boost": 1, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(
    student: ViTExtractor,
    teacher: ViTExtractor,
    photos: Tensor,
    aspects: Tensor,
    args,
    state: dict[str, Any],
    check: Callable[[float, list[float]], None],
) -> None:
    """Train the student in place on crops of the squares `photos`.

    Args:
        state: its step, seconds and optimizer say where to begin, and are kept up to date.
        check: called every `--val_every` of the run, and at its end, with the share of the run that
            is done and the errors of the last step.
    """
    optimizer = optimizer_of(student.model, args.weight_decay)
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
    match = match_block
    if args.compile:
        match = torch.compile(match_block, dynamic=True)

    # every error counts a twelfth, and the last block's, whose keys are used, one more
    weights = torch.full((14,), 1 / 12, device=photos.device)
    weights[12] += 1

    first = state["step"]
    started = time.time() - state["seconds"]

    def done():
        """The share of the run that is done, 0..1."""
        if args.steps:
            return min(1.0, state["step"] / args.steps)
        return min(1.0, state["seconds"] / 60 / args.minutes)

    due = done() + args.val_every
    style = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc="distilling", mininterval=5, bar_format=style) as bar:
        while done() < 1:
            rate, free = schedule(done(), args.lr, args.forcing)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["boost"]

            images, rng = make_batch(photos, aspects, args.tokens, args.seed, state["step"])
            low = args.dtype == "bfloat16"
            with torch.autocast(photos.device.type, torch.bfloat16, enabled=low):
                parts = errors(student, teacher, student.normalize(images), free, rng, match)
            loss = parts @ weights
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            # the first step may have compiled for a minute, which is not counted
            if state["step"] == first:
                started = time.time() - state["seconds"]
            state["step"] += 1
            state["seconds"] = time.time() - started

            if state["step"] % 20 == 0:
                text = f"step {state['step']}, loss {loss.item():.3f}, {free:.0%} free"
                bar.set_postfix_str(text, refresh=False)
                bar.update(done() - bar.n)
            if done() >= min(1, due):
                due += args.val_every
                state["optimizer"] = optimizer.state_dict()
                check(done(), parts.tolist())


def begin(args, last: Path) -> tuple[ViTExtractor, dict[str, Any]]:
    """The student and the state of a run: new, or with --resume those in the file `last`.

    Raises:
        ValueError: `--output` or `last` would be overwritten.
        FileNotFoundError: there is nothing to resume.
    """
    student = random_student(args.device, args.seed)
    if args.resume and not last.is_file():
        raise FileNotFoundError(f"{last} is not there: start without --resume")
    if args.resume:
        state = torch.load(last, map_location=student.device, weights_only=True)
        student.model.load_state_dict(state.pop("student"))
        return student, state
    for path in (last, Path(args.output)):
        if path.exists():
            remedy = "pass --resume to go on, or another --output, or remove it"
            raise ValueError(f"{path} is there already: {remedy}")
    return student, {"step": 0, "seconds": 0.0, "curve": []}


def describe(
    student: ViTExtractor, teacher: ViTExtractor, held_out: Tensor, output: Path
) -> dict[str, Any]:
    """Facts and figures of the written weights, for the .json beside them."""
    metrics = {}
    for size in MEASURED:
        row = {}
        for facet in FACETS:
            row[facet], _ = agreement(student, teacher, held_out, size, facet)
        _, row["constant_key"] = agreement(student, teacher, held_out, size)
        metrics[size] = row

    architecture = {"timm": TEACHER, "num_classes": 0}
    for name in ("patch", "channels", "heads", "depth", "mean", "std"):
        architecture[name] = getattr(student, name)
    return {
        "architecture": architecture,
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "teacher": teacher.tag,
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "metrics": metrics,
    }


def main(args) -> None:
    """Train, measure, write."""
    output = Path(args.output)
    last = output.with_suffix(".last.pth")
    student, state = begin(args, last)
    teacher = ViTExtractor(
        TEACHER, stride=None, backbone_path=args.backbone_path, device=args.device
    )
    held_out, _, _ = load_photos(args.val_dataroot, CANVAS)
    photos, aspects, broken = load_photos(args.dataroot, CANVAS)
    held_out = held_out.to(student.device)
    photos = photos.to(student.device)
    aspects = aspects.to(student.device)

    def check(done, parts):
        """Measure on the held-out photos, print it, and write the checkpoint."""
        if not all(math.isfinite(part) for part in parts):
            what = f"the loss is not finite at step {state['step']}"
            raise ValueError(f"{what}: pass a lower --lr and another --output")
        cosines = {}
        with torch.autocast(student.device.type, torch.bfloat16):
            for size in MEASURED[1:]:
                cosines[size], _ = agreement(student, teacher, held_out, size)
        minutes = state["seconds"] / 60
        point = {"step": state["step"], "minutes": minutes}
        state["curve"].append({**point, "held_out_key": cosines, "errors": parts})
        save_tensors(last, {**state, "student": student.model.state_dict()})

        held = ", ".join(f"{cosine:.4f} at {size}" for size, cosine in cosines.items())
        listed = " ".join(f"{part:.2f}" for part in parts)
        when = f"{done:4.0%} {minutes:5.1f} min, step {state['step']}"
        tqdm.write(f"{when}: held-out keys {held}; errors {listed}")

    train(student, teacher, photos, aspects, args, state, check)

    weights = {}
    for name, tensor in student.model.state_dict().items():
        weights[name] = tensor.half().cpu().contiguous()
    with replacing(output) as temporary:
        save_file(weights, temporary)
    load_backbone_file(student.model, output)  # measure what is shipped: rounded to float16

    about = describe(student, teacher, held_out, output)
    about["data"] = {"photos": len(photos), "broken": broken, "held_out": len(held_out)}
    about["run"] = {
        **settings(args),
        "steps_done": state["step"],
        "minutes_taken": state["seconds"] / 60,
    }
    about["curve"] = state["curve"]
    write_text(output.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    last.unlink()

    for line in broken:
        note(f"left out: {line}")
    for size, row in about["metrics"].items():
        figures = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
        print(f"{size:>4}  {figures}")
    report(args, {"metrics": about["metrics"], "settings": about["run"]})


if __name__ == "__main__":
    parser().run(main)
