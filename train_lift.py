r"""Train a LiFT module for one frozen backbone on any folder of photos (LiFT paper, section 3.2).

    python train_lift.py --dataroot FOLDER --model_type dino_vits16 --save_every 1 --epochs 5 --lr 0.001 --augment \
        --loss cosine --batch_size 256 --output_dir lift_imagenet_trains
    torchrun --nproc_per_node 8 train_lift.py --dataroot FOLDER --batch_size 32 --dtype bfloat16 --workers 8
    python train_lift.py --dataroot FOLDER --cache_features CACHE --residual --epochs 30 --optimizer adamw --schedule cosine
    python train_lift.py ... --resume                             # go on where a stopped or killed run was
    python train_lift.py --evaluate lift.pth --val_dataroot FOLDER [FOLDER ...] --model_type dino_vits16

The backbone sees a photo at S, S/2 and S/4 pixels; LiFT learns to make its features at S from those at S/2, and at S/2 from
those at S/4. Written to OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}: `lift_{epoch}.pth` and `lift.pth` (bare
state_dicts), `lift.json` (what they are for and how they were made), `last.pth` (for --resume), `metrics.jsonl`.

Every epoch prints, on photos held out (--val_dataroot, else 2 % of --dataroot), the mean cosine of the features at S with those
that LiFT, bilinear and nearest interpolation make at S/2, and with those that LiFT and bilinear make in two steps at S/4: a
module that is not above bilinear is not worth using. The last line is JSON: settings, metrics, photos that could not be read.

Every random choice follows from --seed, epoch and photo alone, so neither --workers, nor a stop and --resume, nor the number of
processes changes what is seen: N processes with batch b equal one with N*b (on GPUs batch norm is synchronised; on CPUs each
process normalises its own b photos). On a CPU the same command gives the same weights, to the bit.

ViT-S/16 at 448 on one CPU core: 1.6 photos/s in float32, 3.4 in bfloat16, 23 from cached features.
"""

import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import ColorJitter, Normalize
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize
from tqdm import tqdm

from extractor import (
    DTYPES,
    Command,
    ViTExtractor,
    add_backbone_args,
    first_line,
    list_images,
    pick_device,
    read_image,
    replacing,
    settings,
)  # fmt: skip
from lift import LiFT, double, load_lift, tokens_to_map, upsample

LEVELS, FEATURES = ("full", "half", "quarter"), ("f1", "f2", "f3")  # a photo at S, S/2 and S/4 pixels, and its features
# Flags that may change at --resume
ONLY_HOW = ("epochs", "resume", "save_every", "save_steps", "workers", "device", "tensorboard", "json", "compile")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# ---- one's own backbone ---------------------------------------------------------------------------------------------


def my_extractor(args):
    """Bare --my_extractor trains on what this returns: write it. `args` are the flags."""
    raise ValueError(
        "my_extractor(args) in train_lift.py is still empty: return there a module that takes images [B, 3, H, W] to "
        "[B, C, h, w] or [B, h*w, C], or pass --my_extractor module:function"
    )


class MyExtractor(nn.Module):
    """Any module from images [B, 3, H, W] to [B, C, h, w] or [B, h*w, C], used like a ViTExtractor.

    Its attributes `mean` and `std`, where it has them, normalise the images, else ImageNet's do. Tokens before the last
    h*w ones (CLS, registers) are dropped where [B, T, C] comes from a square image.
    """

    def __init__(self, module, name, imsize, device, dtype):
        super().__init__()
        self.device, self.dtype, self.name, self.tag = pick_device(device, dtype), DTYPES[dtype], name, name
        self.module = module.to(self.device, self.dtype).requires_grad_(False).eval()
        self.layer = self.facet = None
        self.mean, self.std = getattr(module, "mean", (0.485, 0.456, 0.406)), getattr(module, "std", (0.229, 0.224, 0.225))
        self.normalize = Normalize(self.mean, self.std)
        self.width, rows, _ = probe(self, imsize)
        self.patch = self.stride = imsize // rows

    @torch.no_grad()
    def forward(self, images):
        """Square normalised images [B, 3, S, S] -> map [B, C, h, h] float32."""
        x = self.module(images.to(self.device, self.dtype))
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            x = tokens_to_map(x[:, -side * side :], (side, side))
        return x.float()


def call_function(name, args):
    """Call `module:function`, with the flags if it takes an argument. ValueError if there is no such function."""
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no function {name} ({error}): pass --my_extractor module:function") from error
    return build(args) if inspect.signature(build).parameters else build()


def build_extractor(args):
    """The frozen backbone that the flags ask for. ValueError where it cannot take the three sizes that training needs."""
    if args.my_extractor is None:
        extractor = ViTExtractor.from_args(args)
    else:
        module = call_function(args.my_extractor, args)
        extractor = MyExtractor(module, args.my_extractor, args.imsize, args.device, args.dtype)
    patch = extractor.patch
    if args.imsize % (4 * patch):
        near = max(4 * patch, args.imsize // (4 * patch) * 4 * patch)
        raise ValueError(f"--imsize {args.imsize} is no multiple of 4 patches of {patch}: pass --imsize {near}")
    if extractor.stride != patch:
        raise ValueError(f"LiFT is trained on the patch grid: leave out --stride {extractor.stride}")
    for size in (args.imsize, args.imsize // 2, args.imsize // 4):
        found, wanted = probe(extractor, size), (extractor.width, size // patch, size // patch)
        if found != wanted:
            what = f"{extractor.name} gives maps of {found} at {size} pixels, not {wanted}"
            raise ValueError(f"{what}: pass another backbone or facet")
    return extractor


def probe(extractor, size):
    """The (C, h, w) that a square image of `size` pixels gets. ValueError where the backbone does not take it."""
    try:
        return tuple(extractor(torch.zeros(1, 3, size, size)).shape[1:])
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{extractor.name} does not take {size} pixels ({reason}): pass a backbone that does") from error


# ---- photos ---------------------------------------------------------------------------------------------------------


class Photos(Dataset):
    """Photos as uint8 pyramids: photos[epoch, index] -> {"full": [3, S, S], "half", "quarter", "broken"}.

    A photo that cannot be read is replaced by the next one that can, and its index returned as `broken` (else -1). With
    `augment` the colours are jittered, by a seed made of (seed, epoch, index). ValueError if no photo can be read.
    """

    def __init__(self, paths, imsize, downsample="stride", augment=False, seed=0):
        self.paths, self.imsize, self.downsample, self.seed = paths, imsize, downsample, seed
        self.jitter = ColorJitter(0.2, 0.2, 0.2, 0.2) if augment else None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key
        for at in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_image(self.paths[at])
            except (ValueError, OSError):
                continue
            return self.pyramid(image, (self.seed, epoch, index)) | {"broken": -1 if at == index else index}
        raise ValueError(f"none of the {len(self)} photos can be read: pass another --dataroot")

    def pyramid(self, image, seed):
        image = resize(image, [self.imsize, self.imsize], InterpolationMode.BILINEAR)
        if self.jitter:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
                image = self.jitter(image)
        full = pil_to_tensor(image)
        if self.downsample == "stride":
            half, quarter = full[:, ::2, ::2], full[:, ::4, ::4]
        else:
            half, quarter = (resize(full, [self.imsize // k] * 2, antialias=True) for k in (2, 4))
        return {"full": full, "half": half.contiguous(), "quarter": quarter.contiguous()}


class Cached(Dataset):
    """What Photos gives, with the frozen features f1, f2, f3 in place of the full image, from one file of fixed-size records."""

    def __init__(self, path, record, views, paths):
        self.path, self.record, self.views, self.paths = path, record, views, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key
        records = np.memmap(self.path, self.record, "r")
        row = records[epoch % self.views * len(self) + index]
        return {name: torch.from_numpy(np.array(row[name])) for name in self.record.names}


def cached(photos, extractor, folder, views, batch_size, workers):
    """Compute the frozen features of `views` passes over `photos` once, into a file of `folder`, and return them as a Dataset.

    The file is named by a hash of everything the features depend on. It is written record by record, so that a stopped
    run goes on where it was; a second process waits for the first one. OSError where they do not fit on the disk.
    """
    record, path = record_type(extractor, photos.imsize), Path(folder) / f"{cache_key(photos, extractor)}_{views}.features"
    dataset, part = Cached(path, record, views, photos.paths), path.with_suffix(".part")
    if path.exists():
        return dataset
    keys = [(view, i) for view in range(views) for i in range(len(photos))]
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            lock(file)
            if not path.exists():
                fill(file, record, photos, extractor, keys, batch_size, workers)
                part.rename(path)
    except OSError as error:
        raise OSError(f"cannot write {part} ({error}): make room or pass another --cache_features") from error
    part.unlink(missing_ok=True)  # of a process that had to wait
    return dataset


def lock(file):
    """Wait until no other process fills this file."""
    import fcntl  # not on Windows, where only --cache_features is lost

    fcntl.flock(file, fcntl.LOCK_EX)


def record_type(extractor, imsize):
    """The numpy type of one photo's record: its smaller images, its features at three sizes, and the broken mark."""
    s, c, n = imsize, extractor.width, imsize // extractor.patch
    maps = [(f"f{k + 1}", "f2", (c, n >> k, n >> k)) for k in range(3)]
    return np.dtype([("half", "u1", (3, s // 2, s // 2)), ("quarter", "u1", (3, s // 4, s // 4)), *maps, ("broken", "i8")])


def cache_key(photos, extractor):
    """A hash of all that frozen features depend on: backbone and its weights, precision, files, sizes, augmentation."""
    key = hashlib.sha256()
    facts = (extractor.tag, extractor.layer, extractor.facet, str(extractor.dtype), extractor.mean, extractor.std)
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in photos.paths]
    augment = photos.seed if photos.jitter else None
    key.update(repr((facts, files, photos.imsize, photos.downsample, augment)).encode())
    for name, value in extractor.state_dict().items():
        key.update(name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return key.hexdigest()[:20]


def fill(file, record, photos, extractor, keys, batch_size, workers):
    """Append the records of `keys` that `file` lacks, in the same batches as if it had been empty."""
    done = file.tell() // record.itemsize // batch_size * batch_size
    file.truncate(done * record.itemsize)
    missing, free = (len(keys) - done) * record.itemsize, shutil.disk_usage(Path(file.name).parent).free
    if missing > free:
        raise OSError(f"{missing >> 20} MiB are needed, {free >> 20} are free")
    batches = [keys[at : at + batch_size] for at in range(done, len(keys), batch_size)]
    loader = DataLoader(photos, batch_sampler=batches, num_workers=workers)
    for batch in tqdm(loader, "features", unit="batch", disable=None):
        images, feats = scales(batch, extractor)
        rows = np.zeros(len(images[0]), record)
        for name, values in zip(record.names, (batch["half"], batch["quarter"], *feats, batch["broken"])):
            rows[name] = values.cpu().numpy()
        file.write(rows.tobytes())
    file.flush()


def scales(batch, extractor, levels=3):
    """A batch of Photos or Cached -> its images [B, 3, S/k, S/k], normalised, and features [B, C, S/k/p, S/k/p], k = 1, 2, 4.

    `levels` is how many of these are wanted. The full image of a cached batch is missing: None.
    """

    def moved(name):
        return batch[name].to(extractor.device, non_blocking=True).float()

    images = [extractor.normalize(moved(level) / 255) if level in batch else None for level in LEVELS[:levels]]
    return images, [moved(feats) if feats in batch else extractor(image) for image, feats in zip(images, FEATURES)]


def stream(n, batch_size, epochs, rank, world, seed, skip):
    """Yield this rank's batches of (epoch, index) over all epochs, the first `skip` left out."""
    sampler = DistributedSampler(range(n), world, rank, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        keys = [(epoch, index) for index in sampler]
        for at in range(0, len(keys), batch_size):
            if skip > 0:
                skip -= 1
            else:
                yield keys[at : at + batch_size]


def in_order(photos, batch_size, rank=0, world=1):
    """This rank's batches of (0, index), each photo once."""
    keys = [(0, index) for index in range(rank, len(photos), world)]
    return [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]


def split(args):
    """Paths to train on and to validate on: --val_dataroot, or --val_fraction of the photos, drawn by --seed."""
    paths = list_images(args.dataroot)
    if args.val_dataroot:
        return paths, [path for root in args.val_dataroot for path in list_images(root)]
    held_out = set(np.random.RandomState(args.seed).permutation(len(paths))[: int(args.val_fraction * len(paths))].tolist())
    return [p for i, p in enumerate(paths) if i not in held_out], [paths[i] for i in sorted(held_out)]


# ---- what is optimised and what is measured -------------------------------------------------------------------------


def cosine_loss(out, target):
    """Mean over all positions of 1 - cos."""
    return 1 - F.cosine_similarity(out, target, dim=1).mean()


LOSSES = {"cosine": cosine_loss, "l1": F.l1_loss, "l2": F.mse_loss}


class Objective(nn.Module):
    """The loss of LiFT: images at S/2, S/4 and features at S, S/2, S/4 -> scalar (LiFT paper, section 3.2)."""

    def __init__(self, lift, loss):
        super().__init__()
        self.lift, self.loss = lift, LOSSES[loss]

    def forward(self, images, feats):
        return sum(self.loss(self.lift(x, low).float(), high) for x, low, high in zip(images, feats[1:], feats))


@torch.no_grad()
def evaluate(extractor, lift, loader, precision=nullcontext):
    """Mean cosine, over all positions of all photos, with the backbone's own features at S, of what is made from S/2 and S/4.

    `loader` gives batches of Photos or Cached. Returns a dict: photos, unreadable (paths), and in -1..1 lift, bilinear, nearest
    (from S/2), lift_twice, bilinear_twice (from S/4). Over the processes of a torchrun the photos are added up.
    """
    sums, broken = torch.zeros(6), set()
    for batch in loader:
        (_, half, quarter), (f1, f2, f3) = scales(batch, extractor)
        with precision():
            made = [upsample(lift, half, f2), upsample(lift, quarter, f3, 2)]
        made[1:1] = [double(f2), F.interpolate(f2, scale_factor=2)]
        made.append(F.interpolate(f3, scale_factor=4, mode="bilinear"))
        values = torch.stack([torch.ones_like(f1[:, 0])] + [F.cosine_similarity(m, f1) for m in made])  # [6, B, h, w]
        read = batch["broken"] < 0
        sums = sums + values.mean((2, 3)).cpu().double()[:, read].sum(1)
        broken.update(str(loader.dataset.paths[i]) for i in batch["broken"][~read].tolist())
    n, *cosines = map(sum, zip(*gather(sums.tolist())))
    names = ("lift", "bilinear", "nearest", "lift_twice", "bilinear_twice")
    results = {name: round(value / max(n, 1), 5) for name, value in zip(names, cosines)}
    return {"photos": int(n), **results, "unreadable": sorted(set().union(*gather(broken)))}


def gather(value):
    """The values of all processes, as a list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- one run --------------------------------------------------------------------------------------------------------


class Run:
    """All that changes while training, and the folder it is written to: LiFT, its average, optimizer, schedule, step, metrics."""

    def __init__(self, args, extractor, total):
        torch.manual_seed(args.seed)
        self.lift = LiFT(extractor.width, extractor.patch, residual=args.residual).to(extractor.device)
        if dist.is_initialized() and extractor.device.type == "cuda":
            self.lift = nn.SyncBatchNorm.convert_sync_batchnorm(self.lift)
        self.ema = AveragedModel(self.lift, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
        self.optimizer = OPTIMIZERS[args.optimizer](self.lift.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_factor(step, total, args.schedule, args.warmup))
        self.step, self.losses, self.metrics, self.broken = 0, [], [], set()
        self.args, self.extractor, self.folder, self.origin = args, extractor, run_folder(args), origin(args, extractor)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        self.settings = json.loads(json.dumps(settings(args))) | {"processes": processes}  # plain types, as last.pth needs

    def parts(self):
        """What has a state_dict, by name."""
        named = {"lift": self.lift, "optimizer": self.optimizer, "schedule": self.schedule, "ema": self.ema}
        return {name: part for name, part in named.items() if part is not None}

    def advance(self):
        """Count an optimizer step."""
        self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.lift)
        self.step += 1

    def read(self, losses, broken, stop):
        """Take in the last steps' losses (scalar tensors) and unread photos of all processes; returns a stop signal or 0.

        ValueError where a loss is not finite.
        """
        told = gather((torch.stack(losses).tolist(), broken, stop))
        losses = np.mean([values for values, _, _ in told], axis=0).tolist()
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                kept = f"{self.folder} keeps what was saved before"
                raise ValueError(f"the loss is {loss} at step {step} ({kept}): pass a smaller --lr and another --output_dir")
        self.losses += losses
        self.broken.update(*(broken for _, broken, _ in told))
        return max(stop for _, _, stop in told)

    def end_epoch(self, speed, val_loader, precision):
        """Measure the module on the held-out photos and add a line to metrics.jsonl."""
        results = {"epoch": len(self.metrics) + 1, "step": self.step, "loss": float(np.mean(self.losses)), "photos_per_s": speed}
        if val_loader.dataset.paths:
            results["val"] = evaluate(self.extractor, self.best().eval(), val_loader, precision)
            self.lift.train()
        self.losses = []
        self.metrics.append(results)
        write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.metrics).encode())

    def best(self):
        """The module to use and to ship: the average where there is one."""
        return self.ema.module if self.ema else self.lift

    def export(self, name):
        """Write the module as a bare state_dict, and what it is for beside it as lift.json."""
        write_tensors(self.folder / name, {key: value.cpu().contiguous() for key, value in self.best().state_dict().items()})
        text = json.dumps(self.origin | {"metrics": self.metrics[-1], "settings": self.settings}, indent=1)
        write(self.folder / "lift.json", (text + "\n").encode())

    def save(self):
        """Write last.pth, all that --resume needs: the step is the sampler's position too."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in ("step", "losses", "metrics", "settings")}
        write_tensors(self.folder / "last.pth", state | {"broken": sorted(self.broken), "rng": torch.get_rng_state()})

    def resume(self):
        """Go on from last.pth, if there is one already. ValueError if it is one of another run."""
        path = self.folder / "last.pth"
        if not path.is_file():
            return
        try:
            last = torch.load(path, map_location="cpu", weights_only=True)
            changed = {name: value for name, value in last["settings"].items() if value != self.settings.get(name)}
            if not changed.keys() - {*ONLY_HOW, "versions"}:
                self.restore(last)
                return
        except Exception as error:  # damaged files raise nearly anything
            raise ValueError(f"{path} is damaged ({first_line(error)}): remove it, and start again") from error
        name = min(changed.keys() - {*ONLY_HOW, "versions"})
        raise ValueError(f"{path} was made with --{name} {changed[name]}: pass the same, or another --output_dir")

    def restore(self, last):
        """Take over what `save` wrote."""
        for name, part in self.parts().items():
            part.load_state_dict(last[name])
        self.step, self.losses, self.metrics = int(last["step"]), list(last["losses"]), list(last["metrics"])
        self.broken = set(last["broken"])
        torch.set_rng_state(last["rng"])


def run_folder(args):
    """OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}, and the options that make another kind of module."""
    name = (args.my_extractor or args.model_type).replace("/", "_").replace(":", "_")
    kinds = ["residual"] * args.residual + ["resize"] * (args.downsample == "resize") + ["single"] * args.single_scale
    parts = [name, args.lr, args.loss, "aug" if args.augment else "noaug", args.imsize, *kinds]
    return Path(args.output_dir) / "_".join(map(str, parts))


def origin(args, extractor):
    """What a module is for, as load_lift checks it, and what it was trained on."""
    facts = {"backbone": extractor.tag, "model_type": extractor.name}
    facts |= {name: getattr(extractor, name) for name in ("layer", "facet", "patch", "width", "mean", "std")}
    return facts | {"residual": args.residual, "downsample": args.downsample, "imsize": args.imsize, "data": args.dataroot}


def lr_factor(step, total, schedule, warmup):
    """Share of --lr at an optimizer step: linear over `warmup` steps, then constant or half a cosine down to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * min(step / total, 1))) if schedule == "cosine" else 1.0
    return decay * min(1.0, (step + 1) / (warmup + 1))


def write(path, data):
    """Replace the file by these bytes, in the first process. OSError, in one line, on a full disk; the old file then stays."""
    if not quiet():
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def write_tensors(path, tensors):
    """torch.save to memory first: its own writer turns a full disk into an error that does not say so."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write(path, buffer.getvalue())


# ---- training -------------------------------------------------------------------------------------------------------


def start_processes(args):
    """Join the other processes of a torchrun, if it is one; returns this one's rank and their number."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size()


def quiet():
    """Whether this is another process than the first of a torchrun: it writes and prints nothing."""
    return dist.is_initialized() and dist.get_rank() > 0


class Stop:
    """Remembers a SIGINT or SIGTERM until the step is done; a second one acts at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(self, number, frame):
        self.signal = number
        self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train_step(model, batches, count, extractor, optimizer, precision=nullcontext, levels=3):
    """One optimizer step on the mean loss of `count` batches; returns it (a scalar tensor) and the indices of unread photos."""
    total, broken = 0, []
    for i, batch in enumerate(batches, 1):
        images, feats = scales(batch, extractor, levels)
        with model.no_sync() if dist.is_initialized() and i < count else nullcontext():
            with precision():
                loss = model(images[1:], feats) / count
            loss.backward()
        total += loss.detach()
        broken += [index for index in batch["broken"].tolist() if index >= 0]
    optimizer.step()
    optimizer.zero_grad()
    return total, broken


def train(run, model, loader, val_loader, precision, batches):
    """Train until all epochs of `batches` batches are complete, or until a signal says stop (then SystemExit).

    On a GPU losses are read every 10 steps only, so that it need not wait for them. ValueError where one is not finite.
    """
    args, paths, tell, losses, broken = run.args, loader.dataset.paths, reporter(run.args, run.folder), [], set()
    levels, often = 2 if args.single_scale else 3, 1 if run.extractor.device.type == "cpu" else 10
    steps, loader = math.ceil(batches / args.accumulate), iter(loader)
    each = len(paths) / steps  # photos a step
    bar = tqdm(total=args.epochs * len(paths), initial=run.step * each, unit="photo", unit_scale=True, disable=quiet() or None)
    stop, began, begun_at = Stop(), time.time(), run.step
    while run.step < args.epochs * steps:
        count = min(args.accumulate, batches - run.step % steps * args.accumulate)
        group = itertools.islice(loader, count)
        loss, unread = train_step(model, group, count, run.extractor, run.optimizer, precision, levels)
        run.advance()
        losses.append(loss)
        broken.update(str(paths[i]) for i in unread)
        bar.update(each)
        end, save = run.step % steps == 0, args.save_steps and run.step % args.save_steps == 0
        if not (end or save or len(losses) == often):
            continue
        stopping = run.read(losses, broken, stop.signal)
        losses, broken = [], set()
        bar.set_postfix(epoch=math.ceil(run.step / steps), loss=f"{run.losses[-1]:.4f}")
        if end:
            run.end_epoch(round((run.step - begun_at) * each / (time.time() - began), 2), val_loader, precision)
            tell(run.metrics[-1])
            if len(run.metrics) % args.save_every == 0:
                run.export(f"lift_{len(run.metrics)}.pth")
            began, begun_at = time.time(), run.step
        if end or save or stopping:
            run.save()
        if stopping:
            print(f"stopped by {signal.Signals(stopping).name} after step {run.step}: pass --resume to go on", file=sys.stderr)
            raise SystemExit(128 + stopping)
    stop.restore()
    bar.close()


def reporter(args, folder):
    """A function that prints an epoch's results, and with --tensorboard shows them there. ValueError if it is not installed."""
    if quiet():
        return lambda results: None
    writer = None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from error
        writer = SummaryWriter(folder)

    def tell(results):
        flat = {name: value for name, value in (results | results.get("val", {})).items() if isinstance(value, int | float)}
        tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in flat.items()))
        for name, value in flat.items():
            if writer:
                writer.add_scalar(name, value, results["step"])

    return tell


def load(dataset, keys, args, extractor):
    """A DataLoader over lists of (epoch, index), whose workers stay."""
    return DataLoader(
        dataset, batch_sampler=keys, num_workers=args.workers, pin_memory=extractor.device.type == "cuda",
        persistent_workers=args.workers > 0, worker_init_fn=ignore_interrupt,
    )  # fmt: skip


def ignore_interrupt(worker):
    """Ctrl-C reaches every process: the workers go on, so that the main one can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare(lift, args, extractor):
    """The loss module, distributed and compiled as asked, and the precision it runs in."""
    torch.backends.cudnn.benchmark = True  # sizes stay the same
    model = Objective(lift.to(memory_format=torch.channels_last), args.loss)
    if args.compile:
        model.compile()
        for part in extractor.model.blocks if isinstance(extractor, ViTExtractor) else [extractor.module]:
            part.compile()  # blocks share their code: one compilation for all
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    low = partial(torch.autocast, extractor.device.type, torch.bfloat16)
    return model, nullcontext if extractor.dtype == torch.float32 else low


def check(args):
    """ValueError for flags that make no run."""
    if args.loss not in LOSSES:
        raise ValueError(f"unknown --loss {args.loss}: pass one of {', '.join(LOSSES)}")
    if not (args.val_dataroot if args.evaluate else args.dataroot):
        raise ValueError("nothing to do: pass --dataroot FOLDER to train, or --evaluate FILE --val_dataroot FOLDER to measure")
    for name in ("epochs", "batch_size", "imsize", "save_every", "accumulate", "views"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: pass 1 or more")
    if args.resume or args.evaluate or not run_folder(args).is_dir():
        return
    if any(run_folder(args).glob("*.pth")):
        raise ValueError(f"{run_folder(args)} holds a run: pass --resume, or another --output_dir")


def report(args, results):
    """The last line, and --json FILE: settings and results."""
    if quiet():
        return
    line = json.dumps({"settings": settings(args)} | results)
    print(line)
    if args.json:
        write(args.json, (line + "\n").encode())


def evaluate_files(args, extractor, rank, world):
    """--evaluate: measure a module on each --val_dataroot."""
    lift, results = load_lift(args.evaluate, extractor), {}
    for root in args.val_dataroot:
        photos = Photos(list_images(root), args.imsize, args.downsample)
        loader = load(photos, in_order(photos, args.batch_size, rank, world), args, extractor)
        results[root] = evaluate(extractor, lift, loader)
        if not quiet():
            print(root, "  ".join(f"{name} {value}" for name, value in results[root].items()), sep="  ")
    return {"results": results}


def parser():
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", help="folder of photos, with or without subfolders")
    add("--output_dir", default="lift_trains", help="where runs are written, each into a folder of its own")
    add("--imsize", type=int, default=448, help="S, pixels of the squares trained on, a multiple of 4 patches (default: 448)")
    add("--augment", action="store_true", help="jitter colours")
    add("--loss", default="cosine", help=f"{', '.join(LOSSES)} (default: cosine)")
    add("--epochs", type=int, default=5, help="passes over the photos (default: 5)")
    add("--batch_size", type=int, default=256, help="photos a step and process (default: 256)")
    add("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    add("--save_every", type=int, default=1, help="epochs between lift_{epoch}.pth (default: 1)")
    add("--resume", action="store_true", help="go on from the folder's last.pth")
    add("--seed", type=int, default=0, help="of initialisation, order, jitter and held-out photos (default: 0)")
    add_backbone_args(command)
    add("--my_extractor", nargs="?", const="train_lift:my_extractor", help="module:function that returns a backbone of one's own")
    group = command.add_argument_group("validation")
    group.add_argument("--val_dataroot", nargs="+", help="folders of photos to measure on, instead of held-out ones")
    group.add_argument("--val_fraction", type=float, default=0.02, help="share of the photos held out (default: 0.02)")
    group.add_argument("--evaluate", metavar="LIFT", help="do not train: measure this LiFT checkpoint on --val_dataroot")
    group.add_argument("--tensorboard", action="store_true", help="show the metrics in TensorBoard")
    group.add_argument("--json", help="write the last line to this file too")
    group = command.add_argument_group("beyond the paper")
    group.add_argument("--residual", action="store_true", help="LiFT adds to the bilinearly doubled features")
    group.add_argument("--downsample", choices=("stride", "resize"), default="stride", help="every 2nd pixel, or antialiased")
    group.add_argument("--single_scale", action="store_true", help="learn S/2 -> S alone, without S/4 -> S/2")
    group.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adam", help="(default: adam)")
    group.add_argument("--weight_decay", type=float, default=0.0, help="(default: 0)")
    group.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="of the learning rate")
    group.add_argument("--warmup", type=int, default=0, help="optimizer steps until the learning rate is reached (default: 0)")
    group.add_argument("--ema", type=float, default=0.0, help="decay of an average of the weights to use instead, e.g. 0.999")
    group.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step (default: 1)")
    group = command.add_argument_group("speed")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count() - 1), help="processes that read photos, each rank")
    group.add_argument("--compile", action="store_true", help="torch.compile backbone and LiFT")
    group.add_argument("--cache_features", metavar="DIR", help="compute the frozen features once, float16, and train from them")
    group.add_argument("--views", type=int, default=4, help="augmented views a photo in the cache (default: 4)")
    group.add_argument("--save_steps", type=int, default=500, help="steps between two last.pth, 0: at ends of epochs only")
    return command


def main(args):
    """Train, or with --evaluate measure, one LiFT module."""
    check(args)
    rank, world = start_processes(args)
    extractor = build_extractor(args)
    if args.evaluate:
        return report(args, evaluate_files(args, extractor, rank, world))
    train_paths, val_paths = split(args)
    photos = Photos(train_paths, args.imsize, args.downsample, args.augment, args.seed)
    val_photos = Photos(val_paths, args.imsize, args.downsample)
    photos[0, 0]  # raises where no photo can be read
    share = math.ceil(len(photos) / world)
    batches = math.ceil(share / args.batch_size)  # an epoch and process
    if args.imsize == 4 * extractor.patch and (share - 1) % args.batch_size == 0:
        raise ValueError("a batch of one photo of 4 patches is too little for batch norm: pass a larger --imsize or --batch_size")
    steps = math.ceil(batches / args.accumulate)
    run = Run(args, extractor, args.epochs * steps)
    if args.resume:
        run.resume()
    if args.cache_features:
        cache = partial(cached, extractor=extractor, folder=args.cache_features, batch_size=args.batch_size, workers=args.workers)
        photos, val_photos = cache(photos, views=args.views if args.augment else 1), cache(val_photos, views=1)
    skip = run.step // steps * batches + run.step % steps * args.accumulate
    keys = stream(len(photos), args.batch_size, args.epochs, rank, world, args.seed, skip)
    val_keys = in_order(val_photos, args.batch_size, rank, world)
    model, precision = prepare(run.lift, args, extractor)
    loader, val_loader = load(photos, keys, args, extractor), load(val_photos, val_keys, args, extractor)
    train(run, model, loader, val_loader, precision, batches)
    run.export("lift.pth")
    unreadable = sorted(run.broken.union(run.metrics[-1].get("val", {}).get("unreadable", [])))
    if unreadable and not quiet():
        print(f"{len(unreadable)} photos could not be read: {', '.join(unreadable)}")
    report(args, {"folder": str(run.folder), "metrics": run.metrics[-1], "unreadable": unreadable})


if __name__ == "__main__":
    parser().run(main)
