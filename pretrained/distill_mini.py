"""Train vit_mini16, the small ViT that ships in pretrained/, by distilling the dense features of a teacher.

    python pretrained/distill_mini.py --dataroot ../shared/data/train_images --minutes 60 \\
        --val_dataroot ../shared/data/coco20k ../shared/data/voc --backbone_path vit_tiny_patch16_224.safetensors

Teacher and student are both timm's vit_tiny_patch16_224 (12 blocks, 192 channels, patch 16). No tensor of the teacher
is copied: every parameter of the student, position embedding included, starts random or constant, and all it sees of
the teacher are queries, keys, values and tokens on heavily augmented crops of the photos.

Each block learns to reproduce the teacher's. At first its input is the teacher's own, so that all twelve learn at once,
however bad those before still are; over the first `--forcing` of the run more and more samples enter as the student
itself made them, until it runs end to end. Crops are 112 to 448 pixels wide.

Prints, as it goes, the mean cosine of the student's last-layer keys with the teacher's on the photos of
`--val_dataroot`; writes the weights (float16) and a .json of settings, figures and curve; ends with one line of JSON.
Meant for an hour on 2 CPU cores, or for 8 minutes on an H100 with `--tokens 50176`.
"""

import hashlib
import json
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the nouns lie one folder up

from extractor import Command, ViTExtractor, list_images, load_backbone_file, read_image, replacing, settings

TEACHER, FACETS = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", ("query", "key", "value", "token")
SIZES = (112, 160, 224, 320, 448)  # pixels of a training crop
MEASURED = (112, 224, 448)  # pixels at which student and teacher are compared in the end
CANVAS = 448  # photos are kept in memory as squares of this size


# ---- the two networks -----------------------------------------------------------------------------------------------


def random_student(device, seed):
    """A trainable vit_tiny_patch16_224 without classifier, every parameter random or constant, as an extractor."""
    torch.manual_seed(seed)
    model = timm.create_model(TEACHER.split(".")[0], num_classes=0)
    student = ViTExtractor(TEACHER, model=model, device=device)
    student.model.requires_grad_(True)
    return student


def run_block(block, x):
    """Block input [B, 1+t, C] -> its qkv projection [B, 1+t, 3C] and its output [B, 1+t, C]."""
    qkv = block.attn.qkv(block.norm1(x))
    q, k, v = qkv.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, 1+t, head_dim]
    x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return qkv, x + block.mlp(block.norm2(x))


# ---- photos and crops -----------------------------------------------------------------------------------------------


def load_photos(folders, size):
    """Photos in `folders` -> squares [N, 3, size, size] uint8, aspect ratios W/H [N], one line for each unreadable file.

    Raises ValueError if there is no readable photo.
    """

    def read(path):
        try:
            image = read_image(path)
            return np.array(image.resize((size, size), Image.LANCZOS)), image.width / image.height
        except (ValueError, OSError) as error:
            return None, str(error)

    paths = [path for folder in folders for path in list_images(folder)]
    squares, aspects, broken = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), [], []
    with ThreadPoolExecutor() as pool:
        for pixels, info in tqdm(pool.map(read, paths), "reading photos", len(paths), mininterval=5):
            if pixels is None:
                broken.append(info)
            else:
                squares[len(aspects)] = torch.from_numpy(pixels).permute(2, 0, 1)
                aspects.append(info)
    if not aspects:
        raise ValueError(f"{folders[0]}: none of {len(paths)} images can be read: pass a folder of photos")
    return squares[: len(aspects)], torch.tensor(aspects), broken


def crops(photos, aspects, count, size, rng):
    """`count` crops [count, 3, size, size] in 0..1 of the squares `photos` [N, 3, ., .] uint8 of true aspect `aspects` [N].

    Random in place, scale, aspect, rotation and flip; what lies beyond the photo is its mirror image.
    """

    def uniform(low, high):
        return torch.empty(count, device=photos.device).uniform_(low, high, generator=rng)

    index = torch.randint(len(photos), (count,), device=photos.device, generator=rng)
    area, ratio = uniform(math.log(0.06), math.log(2)).exp(), uniform(-0.4, 0.4).exp() / aspects[index]
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()  # shares of the photo's sides
    x, y = (1 - width).clamp(min=0) * uniform(-1, 1), (1 - height).clamp(min=0) * uniform(-1, 1)
    angle, width = uniform(-1, 1) ** 3 * 0.7, width * uniform(-1, 1).sign()
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([width * cos, -width * sin, x, height * sin, height * cos, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [count, 3, 2 * size, 2 * size], align_corners=False)
    twice = F.grid_sample(photos[index].float() / 255, grid, padding_mode="reflection", align_corners=False)
    smooth = torch.rand((), device=photos.device, generator=rng) < 0.5  # LiFT is trained on strided, aliased images too
    return torch.where(smooth, F.avg_pool2d(twice, 2), twice[:, :, ::2, ::2])


def recolour(images, rng):
    """Images in 0..1 with random brightness, contrast, saturation, hues and noise each, most of them mild, clamped to 0..1."""

    def normal(*shape):
        return torch.randn(len(images), *shape, device=images.device, generator=rng)

    strength = torch.rand(len(images), 1, 1, device=images.device, generator=rng) ** 2
    eye, grey = torch.eye(3, device=images.device), torch.full((3, 3), 1 / 3, device=images.device)
    colours = torch.lerp(eye, grey, 0.5 * strength * normal(1, 1)) + 0.2 * strength * normal(3, 3)
    colours = colours * (0.3 * strength * normal(1, 1)).exp()
    mean, strength = images.mean((2, 3), keepdim=True), strength[..., None]
    images = torch.einsum("bij,bjhw->bihw", colours, images - mean) + mean + 0.15 * strength * normal(3, 1, 1)
    return (images + 0.1 * strength**2 * normal(*images.shape[1:])).clamp(0, 1)


def mix(images, rng):
    """Half of the images as they are, a quarter blended with their neighbour, a quarter with a rectangle of it pasted in."""
    count, size = len(images), images.shape[-1]
    kind, share, *box = torch.rand(6, count, 1, 1, device=images.device, generator=rng)
    at = (torch.arange(size, device=images.device) + 0.5) / size
    inside = ((at - box[0]).abs() < box[2] / 2) & ((at[:, None] - box[1]).abs() < box[3] / 2)  # [count, size, size]
    weight = torch.where(kind < 0.25, inside.float(), torch.where(kind < 0.5, share / 2, 0.0))[:, None]
    return images.lerp(images.roll(1, 0), weight)


def make_batch(photos, aspects, tokens, seed, step):
    """Images [B, 3, S, S] in 0..1 of one random size S, with about `tokens` patches in all, and the generator behind them.

    A function of photos, seed and step, so that a resumed run sees what it would have seen.
    """
    rng = torch.Generator(photos.device).manual_seed(seed * 2**32 + step)
    size = random.Random(f"{seed} {step}").choice(SIZES)
    count = max(2, tokens // (size // 16) ** 2)
    return mix(recolour(crops(photos, aspects, count, size, rng), rng), rng), rng


# ---- the loss, and what is measured ---------------------------------------------------------------------------------


def unexplained(ours, theirs):
    """Share of the teacher's variance that the student misses: 0 for equal features [B, t, C], 1 for the best constant."""
    theirs = theirs.float()
    return (ours - theirs).square().mean() / (theirs - theirs.mean((0, 1))).square().mean()


def token_error(ours, theirs):
    """Squared error of tokens [B, t, C] relative to their own squared length, averaged.

    Relative, because some tokens are a hundred times as long as the rest (Darcet et al., "Vision Transformers Need
    Registers", 2023).
    """
    theirs = theirs.float()
    return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()


def match_block(student, teacher, ours, theirs):
    """A block of each on its own input [B, 1+t, C] -> their outputs [B, 1+t, C], and the student's error (0 is perfect).

    The error adds what is missed of query, key and value, of the direction of keys, and of the tokens.
    """
    with torch.no_grad():
        their_qkv, theirs = run_block(teacher, theirs)
    our_qkv, ours = run_block(student, ours)
    pairs = list(zip(our_qkv.float().chunk(3, -1), their_qkv.float().chunk(3, -1)))
    keys = 1 - F.cosine_similarity(*pairs[1], dim=-1).mean()
    return ours, theirs, sum(unexplained(*pair) for pair in pairs) / 3 + keys + token_error(ours, theirs)


def errors(student, teacher, images, free, rng, match=match_block):
    """Errors [depth + 2] of embedding, blocks and final norm on normalised images [B, 3, S, S].

    A share `free` of the samples enters each block as the student's own tokens, the others as the teacher's.
    """
    grid = student.grid(*images.shape[2:])
    with torch.no_grad():
        theirs = teacher.embed(images, grid)
    ours = student.embed(images, grid)
    result = [token_error(ours, theirs)]
    for mine, other in zip(student.model.blocks, teacher.model.blocks):
        own = torch.rand(len(images), 1, 1, device=images.device, generator=rng) < free
        ours, theirs, error = match(mine, other, torch.where(own, ours, theirs), theirs)
        result.append(error)
    return torch.stack([*result, token_error(student.model.norm(ours), teacher.model.norm(theirs))])


def agreement(student, teacher, photos, size, facet="key"):
    """Mean cosine over the patches of `photos` [N, 3, ., .] uint8 at size x size, in the last layer, in -1..1.

    -> (student with teacher, the teacher's mean over all patches with teacher)
    """
    images = torch.cat([F.interpolate(b / 255, (size, size), mode="bilinear", antialias=True) for b in photos.split(8)])
    ours, theirs = (
        torch.cat([net.extract_descriptors(net.normalize(batch), facet=facet) for batch in images.split(8)])
        for net in (student, teacher)
    )  # [N, 1, t, C]
    constant = theirs.mean((0, 2), keepdim=True)
    return tuple(F.cosine_similarity(x, theirs, dim=-1).mean().item() for x in (ours, constant))


# ---- the run --------------------------------------------------------------------------------------------------------


def schedule(progress, lr, forcing):
    """Progress 0..1 -> learning rate (2 % warmup, then cosine to 0) and the share of samples that run free."""
    rate = lr * min(1, progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
    return rate, min(1.0, progress / forcing) if forcing else 1.0


def optimizer_of(model, decay):
    """AdamW that decays the blocks' matrices alone; each group's `boost` multiplies the learning rate.

    The embedding is one linear map of ill-conditioned input, pixels, and every block stands on it: at five times the rate
    its error falls to a third in the same steps.
    """
    groups = [{"params": [], "boost": boost, "weight_decay": wd} for boost, wd in ((5, 0.0), (1, decay), (1, 0.0))]
    for name, p in model.named_parameters():
        kind = 0 if name.startswith(("pos_embed", "cls_token", "patch_embed")) else 1 if p.ndim > 1 else 2
        groups[kind]["params"].append(p)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(student, teacher, photos, aspects, args, state, check):
    """Train `student` in place on crops of the squares `photos`.

    `state` {step, seconds, optimizer} says where to begin and is kept up to date; `check(progress, errors)` is called
    every `--val_every` of the run and at its end.
    """
    optimizer = optimizer_of(student.model, args.weight_decay)
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
    match = torch.compile(match_block, dynamic=True) if args.compile else match_block
    weights = torch.tensor([1 / 12] * 12 + [1 + 1 / 12, 1 / 12], device=photos.device)
    first, started = state["step"], time.time() - state["seconds"]

    def progress():
        return min(1.0, state["step"] / args.steps if args.steps else state["seconds"] / 60 / args.minutes)

    due, style = progress() + args.val_every, "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc="distilling", mininterval=5, bar_format=style) as bar:
        while progress() < 1:
            rate, free = schedule(progress(), args.lr, args.forcing)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["boost"]
            images, rng = make_batch(photos, aspects, args.tokens, args.seed, state["step"])
            with torch.autocast(photos.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                parts = errors(student, teacher, student.normalize(images), free, rng, match)
            loss = parts @ weights
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if state["step"] == first:  # it may have compiled for a minute: the clock starts now
                started = time.time() - state["seconds"]
            state.update(step=state["step"] + 1, seconds=time.time() - started)
            if state["step"] % 20 == 0:
                bar.set_postfix_str(f"step {state['step']}, loss {loss.item():.3f}, {free:.0%} free", refresh=False)
                bar.update(progress() - bar.n)
            if progress() >= min(1, due):
                due += args.val_every
                state["optimizer"] = optimizer.state_dict()
                check(progress(), parts.tolist())


def begin(args, last):
    """Random student, and the state of a run: at its start, or as the checkpoint `last` left them with --resume.

    Raises ValueError if `--output` or `last` is in the way, FileNotFoundError if there is nothing to resume.
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
            raise ValueError(f"{path} is there already: pass --resume to go on, or another --output, or remove it")
    return student, {"step": 0, "seconds": 0.0, "curve": []}


def parser():
    """The command line."""
    p = Command(__doc__)
    p.add_argument("--dataroot", nargs="+", required=True, help="folders of photos to train on")
    p.add_argument("--val_dataroot", nargs="+", required=True, help="folders of other photos to measure on")
    p.add_argument("--backbone_path", help="the teacher's weight file instead of a download")
    p.add_argument("--output", default="pretrained/vit_mini16.safetensors", help="the weights; beside them a .json")
    p.add_argument("--minutes", type=float, default=60, help="length of the run, wall time of the training itself")
    p.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes: repeatable")
    p.add_argument("--tokens", type=int, default=6272, help="patches a step: 6272 are 32 crops at 224, or 8 at 448")
    p.add_argument("--lr", type=float, default=2e-3, help="AdamW's peak learning rate: 2 %% warmup, then cosine to 0")
    p.add_argument("--weight_decay", type=float, default=0.02)
    p.add_argument("--forcing", type=float, default=0.4, help="share of the run that still uses the teacher's inputs")
    p.add_argument("--val_every", type=float, default=0.1, help="share of the run between measurements and checkpoints")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="autocast while training")
    p.add_argument("--compile", action="store_true", help="torch.compile for the blocks: slow start, faster steps")
    p.add_argument("--resume", action="store_true", help="go on from an interrupted run's checkpoint beside --output")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(args):
    """Train, measure, write."""
    output, last = Path(args.output), Path(args.output).with_suffix(".last.pth")
    student, state = begin(args, last)
    teacher = ViTExtractor(TEACHER, backbone_path=args.backbone_path, device=args.device)
    held_out, _, _ = load_photos(args.val_dataroot, CANVAS)
    photos, aspects, broken = load_photos(args.dataroot, CANVAS)
    held_out, photos, aspects = (tensor.to(student.device) for tensor in (held_out, photos, aspects))

    def check(progress, parts):
        if not all(map(math.isfinite, parts)):
            raise ValueError(f"no finite loss at step {state['step']}: pass a lower --lr (good until {last})")
        with torch.autocast(student.device.type, torch.bfloat16):
            cosines = {size: agreement(student, teacher, held_out, size)[0] for size in MEASURED[1:]}
        minutes = state["seconds"] / 60
        state["curve"].append({"step": state["step"], "minutes": minutes, "held_out_key": cosines, "errors": parts})
        with replacing(last) as temporary:
            torch.save(state | {"student": student.model.state_dict()}, temporary)
        held = ", ".join(f"{cosine:.4f} at {size}" for size, cosine in cosines.items())
        blocks = " ".join(f"{part:.2f}" for part in parts)
        tqdm.write(f"{progress:4.0%} {minutes:5.1f} min, step {state['step']}: held-out keys {held}; errors {blocks}")

    train(student, teacher, photos, aspects, args, state, check)
    with replacing(output) as temporary:
        save_file({name: t.half().cpu().contiguous() for name, t in student.model.state_dict().items()}, temporary)
    load_backbone_file(student.model, output)  # measure what is shipped: rounded to float16
    record = describe(student, teacher, held_out, output) | {
        "data": {"photos": len(photos), "broken": broken, "held_out": len(held_out)},
        "run": settings(args) | {"steps_done": state["step"], "minutes_taken": state["seconds"] / 60},
        "curve": state["curve"],
    }
    with replacing(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    last.unlink()
    for line in broken:
        print(f"skipped {line}")
    for size, row in record["metrics"].items():
        print(f"{size:>4}  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print(json.dumps({"metrics": record["metrics"], "settings": record["run"]}))


def describe(student, teacher, held_out, output):
    """Facts and figures of the written weights, for the .json beside them."""

    def row(size):
        cosines = {facet: agreement(student, teacher, held_out, size, facet)[0] for facet in FACETS}
        return cosines | {"constant_key": agreement(student, teacher, held_out, size)[1]}

    facts = {name: getattr(student, name) for name in ("patch", "width", "heads", "depth", "mean", "std")}
    return {
        "architecture": {"timm": TEACHER.split(".")[0], "num_classes": 0} | facts,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "teacher": TEACHER,
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "metrics": {size: row(size) for size in MEASURED},
    }


if __name__ == "__main__":
    parser().run(main)
