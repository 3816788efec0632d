r"""Train a LiFT module for one frozen backbone on any folder of photos (LiFT paper, section 3.2).

    python train_lift.py --dataroot FOLDER --model_type dino_vits16 --save_every 1 --epochs 5 \
        --lr 0.001 --augment --loss cosine --batch_size 256 --output_dir lift_imagenet_trains
    python train_lift.py --dataroot FOLDER --recipe attend --dtype bfloat16
    torchrun --nproc_per_node 8 train_lift.py --dataroot FOLDER --dtype bfloat16 --workers 8
    python train_lift.py ... --resume          # go on where a run was stopped or killed
    python train_lift.py --evaluate lift.pth --val_dataroot FOLDER [FOLDER ...] \
        --model_type dino_vits16

The backbone sees a photo at S, S/2 and S/4 pixels. LiFT learns to make its features at S from those
at S/2, and those at S/2 from those at S/4. --recipe attend trains a better module than the paper's.

A run is written to OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}: `lift_{epoch}.pth` and
`lift.pth` (bare state_dicts), `lift.json` (what they are for and how they were made), `last.pth`
(for --resume) and `metrics.jsonl`.

Every epoch prints how good the module is on photos held out: --val_dataroot, else 2 % of
--dataroot. The measure is the mean cosine of the backbone's features at S with those that LiFT,
bilinear and nearest interpolation make from those at S/2. `twice` is LiFT applied twice to those at
S/4, beside one interpolation of them by 4. A module that is not above bilinear is not worth using.
`centred` is the same after the mean feature of the training photos was subtracted from both sides:
the raw cosine also rewards features that all look like that mean.

Every random choice follows from --seed, epoch and photo alone. So neither --workers, nor a stop and
--resume, nor the number of processes changes which photos are seen: N processes with batch b equal
one with N*b. (On GPUs batch norm is synchronised; on CPUs each process normalises its own b
photos.) On a CPU the same command gives the same weights, to the bit. On CUDA float32 means
float32, not TF32; --dtype bfloat16 is the fast way.

ViT-S/16 at 448 on one CPU core: 1.6 photos/s in float32, 3.4 in bfloat16, 23 from cached features.
"""

import hashlib
import os
import signal
import sys
import tempfile
import time
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import Any

from command import (
    Command,
    add_backbone_args,
    check_range,
    check_torchrun,
    deciding,
    note,
    progress,
    rank,
    report,
    settings,
    world_size,
)
from files import first_line

LOSSES = ("cosine", "l1", "l2", "centred", "both")  # see objectives.loss_between

# what --recipe sets; `paper` is the release's own training
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "augment": False, "loss": "cosine", "epochs": 100, "batch_size": 64, "lr": 0.001,
        "attend": 0, "match": 0.0, "match_end": 1.0, "downsample": "stride", "weight_decay": 0.0,
        "schedule": "constant", "warmup": 0, "views": 4,
    },
    "attend": {
        "augment": True, "loss": "both", "epochs": 15, "batch_size": 8, "lr": 0.003,
        "attend": 1, "match": 0.15, "match_end": 0.4, "downsample": "resize", "weight_decay": 0.01,
        "schedule": "cosine", "warmup": 40, "views": 2,
    },
}  # fmt: skip

# Flags that may change at --resume. They do not decide the weights, with one exception: --schedule
# cosine and --match_end follow the length of the run, and go by the new --epochs.
# Photos count by their names and number: see photo_facts.
MAY_CHANGE = (
    "epochs", "resume", "save_every", "save_steps", "workers", "tensorboard", "compile", "recipe",
    "output_dir", "cache_features", "dataroot", "val_dataroot",
)  # fmt: skip

MATCH_CENTRED = 0.5  # the default of --match_centred, which no folder's name tells

# Below these there is a note
ENOUGH_STEPS = 500  # the modules of pretrained/ took a few thousand
ENOUGH_PHOTOS = 10  # to validate on


class TrainCommand(Command):
    """A Command whose flags have the defaults of --recipe; a flag beside it wins."""

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv)
        self.set_defaults(**RECIPES[args.recipe])
        return super().parse_args(argv, namespace)


def by_recipe(flag: str) -> str:
    """The end of a flag's help: its default in each recipe."""
    values = [str(recipe[flag]) for recipe in RECIPES.values()]
    return f" (default: {' / '.join(values)})"


def parser() -> Command:
    """The command line."""
    command = TrainCommand(__doc__)
    add = command.add_argument
    add("--dataroot", metavar="FOLDER", help="photos to train on, with or without subfolders")
    add(
        "--output_dir", metavar="FOLDER", default="lift_imagenet_trains",
        help="each run is written to a subfolder of it (default: %(default)s)",
    )  # fmt: skip
    add(
        "--recipe", choices=tuple(RECIPES), default="paper",
        help="sets the flags whose help gives two defaults, that of paper / that of attend; a flag "
        "beside it wins (default: paper, the release's own training)",
    )  # fmt: skip
    add("--imsize", type=int, default=448, help="S, a multiple of 4 patches (default: 448 pixels)")
    add("--augment", action=BooleanOptionalAction, help=f"jitter colours{by_recipe('augment')}")
    add("--loss", choices=LOSSES, help=f"what is minimised{by_recipe('loss')}")
    add("--epochs", type=int, help=f"passes over the photos{by_recipe('epochs')}")
    add("--batch_size", type=int, help=f"photos per step and process{by_recipe('batch_size')}")
    add("--lr", type=float, help=f"learning rate{by_recipe('lr')}")
    add("--save_every", type=int, default=1, help="epochs between lift_{epoch}.pth (default: 1)")
    add("--resume", action="store_true", help="go on from the folder's last.pth")
    add("--seed", type=int, default=0, help="decides whatever is random (default: 0)")
    add_backbone_args(command)

    group = command.add_argument_group("validation", "What the module is measured on.")
    add = group.add_argument
    held_out = "measure on these, instead of photos held out of --dataroot"
    add("--val_dataroot", nargs="+", metavar="FOLDER", help=held_out)
    add("--val_fraction", type=float, default=0.02, help="share held out, 0..1 (default: 0.02)")
    add("--evaluate", metavar="LIFT", help="do not train: measure this file on --val_dataroot")
    add("--tensorboard", action="store_true", help="show the metrics in TensorBoard")

    group = command.add_argument_group("beyond the paper", "What makes a better module.")
    add = group.add_argument
    add(
        "--attend", type=int, metavar="R",
        help=f"LiFT weighs the features within R cells; 0: the paper's{by_recipe('attend')}",
    )  # fmt: skip
    add(
        "--heads", type=int, metavar="G",
        help="with --attend: groups of channels with weights of their own (default: the "
        "backbone's heads)",
    )  # fmt: skip
    add(
        "--match", type=float, metavar="WEIGHT",
        help="of finding points of a photo in a warped copy of it; 0: do not match"
        f"{by_recipe('match')}",
    )  # fmt: skip
    add(
        "--match_end", type=float, metavar="SHARE",
        help="of --match that is left at the end; it stays whole for half of the steps, and then "
        f"falls linearly{by_recipe('match_end')}",
    )  # fmt: skip
    add(
        "--match_centred", type=float, default=MATCH_CENTRED, metavar="SHARE",
        help="of --match that is on features less their mean, 0..1; the rest is on the features "
        "as they are (default: %(default)s)",
    )  # fmt: skip
    add(
        "--downsample", choices=("stride", "resize"),
        help="how photos are halved: stride takes every 2nd pixel, resize is antialiased"
        f"{by_recipe('downsample')}",
    )  # fmt: skip
    add("--weight_decay", type=float, help=f"AdamW's; 0 is Adam{by_recipe('weight_decay')}")
    add("--schedule", choices=("constant", "cosine"), help=f"of --lr{by_recipe('schedule')}")
    add("--warmup", type=int, help=f"steps until --lr is reached{by_recipe('warmup')}")

    group = command.add_argument_group("speed", "What changes how long it takes.")
    add = group.add_argument
    cpus = min(8, os.cpu_count() - 1)
    workers = "processes that read photos, for each GPU (default: %(default)s)"
    add("--workers", type=int, default=cpus, help=workers)
    add("--compile", action="store_true", help="torch.compile backbone and LiFT")
    cache = "compute the frozen features once, and keep them there in float16"
    add("--cache_features", metavar="FOLDER", help=cache)
    add("--views", type=int, help=f"augmented views of a photo there{by_recipe('views')}")
    steps = "steps between two last.pth; 0: at the ends of epochs only (default: 500)"
    add("--save_steps", type=int, default=500, help=steps)
    command.set_defaults(**RECIPES["paper"])
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from extractor import DenseExtractor, build_extractor
from feature_cache import cached
from lift import LiFT, load_lift, read_lift
from loading import Loader
from objectives import (
    Photos,
    in_order,
    lr_factor,
    match_share,
    mean_feature,
    prepare,
    steps_of_an_epoch,
    stream,
    train_step,
)
from photos import list_images, naming_root
from training_run import Run, Stop, evaluate

# ---- photos and their features ------------------------------------------------------------------


def split(args) -> tuple[list[Path], list[Path]]:
    """Paths to train on and to validate on: --val_dataroot, or --val_fraction drawn by --seed."""
    paths = list_images(args.dataroot)
    if args.val_dataroot:
        val_paths = []
        for root in args.val_dataroot:
            val_paths += list_images(root)
        return paths, val_paths

    count = int(args.val_fraction * len(paths))
    # numpy's legacy generator is frozen: a seed holds out the same photos in every version
    order = np.random.RandomState(args.seed).permutation(len(paths))
    train_paths = [paths[index] for index in np.sort(order[count:])]
    val_paths = [paths[index] for index in np.sort(order[:count])]
    return train_paths, val_paths


def photo_facts(args, paths: list[Path], val_paths: list[Path]) -> dict[str, Any]:
    """How many photos there are, and a digest of their names below --dataroot and --val_dataroot.

    The folders themselves do not count: a data set may be moved, or reached by another link.
    """
    prefixes = []
    for root in (args.dataroot, *(args.val_dataroot or [])):
        folder = os.path.join(naming_root(root), "")  # with a slash at its end
        prefixes.append(folder.removeprefix("./"))
    facts = {}
    for name, some_paths in (("photos", paths), ("val_photos", val_paths)):
        digest = hashlib.sha256()
        for path in map(str, some_paths):  # Path's own methods take a minute for a million
            prefix = next(prefix for prefix in prefixes if path.startswith(prefix))
            digest.update(path.removeprefix(prefix).encode() + b"\n")
        facts[name] = len(some_paths)
        facts[f"{name}_digest"] = digest.hexdigest()[:16]
    return facts


def keep_features(photos: Photos, args, extractor: DenseExtractor, views: int) -> Any:
    """The photos with their features from --cache_features; without it the photos as they are."""
    if not args.cache_features or not photos.paths:
        return photos
    waits = int(os.environ.get("LOCAL_RANK", 0)) > 0  # for the first process of this machine
    where = args.cache_features
    return cached(photos, extractor, where, views, args.batch_size, args.workers, waits)


def make_loader(photos, batches, args, extractor: DenseExtractor) -> Loader:
    """A Loader over batches of keys, of Photos or of feature_cache.Cached."""
    return Loader(photos, args.workers, batches, pin_memory=extractor.device.type == "cuda")


# ---- processes ----------------------------------------------------------------------------------


def start_processes(args) -> None:
    """Under a torchrun, join the other processes; ValueError if there is no GPU for this one."""
    if world_size() == 1:
        return
    check_torchrun()
    if args.device.startswith("cuda:"):
        what = f"--device {args.device} would put all processes on one GPU"
        raise ValueError(f"{what}: pass --device cuda, and each takes its own")
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(own_gpu(torch.cuda.device_count()))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


def own_gpu(gpus: int) -> int:
    """The number of this process's GPU among those that it sees; ValueError if none is left."""
    number = int(os.environ["LOCAL_RANK"])
    if gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0  # not torchrun: Slurm may show each process its own GPU alone
    if number >= gpus:
        what = f"process {number + 1} of this machine gets no GPU, as it has only {gpus}"
        raise ValueError(f"{what}: pass --nproc_per_node {gpus}")
    return number


# ---- one run ------------------------------------------------------------------------------------


def run_folder(args, extractor: DenseExtractor) -> Path:
    """OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}, and what is not the paper's."""
    name = (args.my_extractor or args.model_type).replace("/", "_").replace(":", "_")
    augment = "aug" if args.augment else "noaug"
    parts = [name, str(args.lr), args.loss, augment, str(args.imsize)]

    # a user's own network has neither layer nor facet
    has_layer = extractor.layer is not None and extractor.layer != extractor.depth - 1
    fades = "" if args.match_end == 1 else f"to{args.match_end}"
    further = (
        (has_layer, f"layer{extractor.layer}"),
        (extractor.facet not in ("key", None), extractor.facet),
        (args.attend, f"attend{args.attend}"),
        (args.heads, f"heads{args.heads}"),
        (args.match, f"match{args.match}{fades}"),
        (args.match and args.match_centred != MATCH_CENTRED, f"centred{args.match_centred}"),
        (args.downsample == "resize", "resize"),
        (args.seed, f"seed{args.seed}"),
    )
    parts += [part for is_told, part in further if is_told]
    return Path(args.output_dir) / "_".join(parts)


def new_lift(args, extractor: DenseExtractor) -> nn.Module:
    """The module to train, the same at the start of every run with this --seed.

    Raises:
        ValueError: --heads does not fit the backbone.
    """
    heads = 1
    if args.attend:
        heads = args.heads or extractor.heads
    if extractor.channels % heads:
        what = f"{heads} heads do not divide {extractor.channels} channels"
        raise ValueError(f"{what}: pass --heads 1, or another divisor")
    torch.manual_seed(args.seed)
    lift = LiFT(
        extractor.channels, extractor.patch, pre_shape=False, post_shape=False,
        attend=args.attend, heads=heads,
    )  # fmt: skip
    lift = lift.to(extractor.device)
    # synchronised batch norm is for GPUs only
    if dist.is_initialized() and extractor.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(lift)
    return lift


# ---- training -----------------------------------------------------------------------------------


def train(run: Run, model: nn.Module, loader: Loader, val_loader: Loader, precision, args) -> int:
    """Train until all epochs are complete, or until a signal says stop.

    Returns:
        The signal that stopped it, or 0.
    Raises:
        ValueError: photos cannot be read, or what the module gives is not finite.
    """
    photos = loader.dataset
    photos_per_step = len(photos) / run.steps  # of all processes together
    total = args.epochs * run.steps
    # to read a loss is to wait for the GPU
    read_every = 1 if run.extractor.device.type == "cpu" else 10
    tensorboard = open_tensorboard(args, run.folder)

    losses: list[Tensor] = []  # since the last run.collect, as `broken`
    broken: set[str] = set()
    stopped_by = 0
    bar = tqdm(loader, disable=True)  # one bar is enough
    if rank() == 0:
        bar = progress(loader, total=total - run.step, unit="step")
    with Stop() as stop:
        began = time.time()
        began_at = run.step
        for batch in bar:
            for group in run.optimizer.param_groups:
                group["lr"] = args.lr * lr_factor(run.step, total, args.schedule, args.warmup)
            match = args.match * match_share(run.step, total, args.match_end)
            loss, unreadable = train_step(
                model, batch, run.extractor, run.optimizer, precision, match
            )
            run.step += 1
            losses.append(loss)
            broken.update(str(photos.paths[index]) for index in unreadable)

            epoch_ends = run.step % run.steps == 0
            save_is_due = args.save_steps > 0 and run.step % args.save_steps == 0
            # what follows waits for the GPU, and for the other processes
            if not epoch_ends and not save_is_due and len(losses) < read_every:
                continue
            stopped_by = run.collect(losses, broken, stop.signal)
            losses = []
            broken = set()
            loss_now = f"{run.losses[-1]:.4f}"
            bar.set_postfix(epoch=len(run.metrics) + 1, loss=loss_now, refresh=False)
            if not epoch_ends and not save_is_due and not stopped_by:
                continue

            run.check(photos)
            if epoch_ends:
                speed = (run.step - began_at) * photos_per_step / (time.time() - began)
                run.end_epoch(speed, val_loader, precision)
                tell_epoch(run.metrics[-1], tensorboard)
                epoch = len(run.metrics)
                if epoch % args.save_every == 0:
                    run.export(f"lift_{epoch}.pth")
                began = time.time()
                began_at = run.step
            # after the above, so that an epoch in last.pth has been measured and exported
            run.save()
            if stopped_by:
                break
        if stopped_by and rank() == 0:
            what = f"stopped by {signal.Signals(stopped_by).name} after step {run.step}"
            print(f"{what}: pass --resume to go on", file=sys.stderr)
    return stopped_by


# ---- what is printed ----------------------------------------------------------------------------


def open_tensorboard(args, folder: Path):
    """TensorBoard's writer with --tensorboard, in the first process; else None."""
    if not args.tensorboard or rank() > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        what = "--tensorboard needs a package that is not installed"
        raise ValueError(f"{what}: pip install tensorboard") from error
    return SummaryWriter(folder)


def tell_epoch(results: dict[str, Any], tensorboard) -> None:
    """Print an epoch's results as a line, and show them in TensorBoard if there is one."""
    if rank() > 0:
        return
    line = f"epoch {results['epoch']}  step {results['step']}  loss {results['loss']:.4f}"
    line += f"  {results['photos_per_s']} photos/s"
    val = results.get("val", {})
    if val:
        line += f"  LiFT {val['lift']:.4f} (bilinear {val['bilinear']:.4f})"
        line += f"  twice {val['lift_twice']:.4f} ({val['bilinear_twice']:.4f})"
        line += f"  centred {val['lift_centred']:.4f} ({val['bilinear_centred']:.4f})"
    tqdm.write(line)  # above the bar
    sys.stdout.flush()

    if tensorboard:
        # "val" itself and its list "unreadable" are no numbers
        for name, value in {**results, **val}.items():
            if isinstance(value, int | float):
                tensorboard.add_scalar(name, value, results["step"])
        tensorboard.flush()  # nothing else writes the last events


def tell_run(run: Run, args) -> None:
    """Say where the module is, and what went wrong."""
    results = run.metrics[-1]
    unreadable = set(run.broken)
    if "val" in results:
        unreadable.update(results["val"]["unreadable"])
        note_below_bilinear(results["val"])
    if rank() > 0:
        return
    if unreadable:
        named = ", ".join(sorted(unreadable)[:5])
        more = " and others, see --json" if len(unreadable) > 5 else ""
        note(f"{len(unreadable)} photos could not be read: {named}{more}")
    print(f"written: {run.folder / 'lift.pth'}")
    answer = {"settings": run.settings, "folder": str(run.folder), "metrics": results}
    report(args, {**answer, "unreadable": sorted(unreadable)})


def note_what_is_too_little(photos: int, held_out: int, steps: int) -> None:
    """Say if there is too little to learn from, or to validate on; `steps` of all epochs."""
    if rank() > 0:
        return
    remedy = "pass --val_dataroot FOLDER, or a larger --val_fraction"
    if held_out == 0:
        what = f"none of the {photos} photos is held out"
        note(f"{what}, so nothing will say whether the module is any good: {remedy}")
    elif held_out < ENOUGH_PHOTOS:
        note(f"validated on {held_out} photos only, which says little: {remedy}")
    if steps < ENOUGH_STEPS:
        what = f"{steps} steps in all teach a module little"
        note(f"{what}: pass a smaller --batch_size or more --epochs, or add photos")


def note_below_bilinear(results: dict[str, Any]) -> None:
    """Say if a module was measured below the interpolation that it is to replace."""
    if rank() == 0 and results["photos"] and results["lift"] < results["bilinear"]:
        note(
            f"LiFT ({results['lift']:.2f}) is below bilinear interpolation "
            f"({results['bilinear']:.2f}), so this module is not worth using. What usually helps: "
            "more steps (a smaller --batch_size, more --epochs), more photos, --recipe attend"
        )


def print_table(root: str, results: dict[str, Any]) -> None:
    """Print what was measured on one folder."""
    print(f"{root}: {results['photos']} photos")
    print(f"  {'':18} cosine  centred")
    for name in results:
        if f"{name}_centred" in results:
            label = name.replace("_", " ").replace("lift", "LiFT")
            print(f"  {label:18}{results[name]:7.4f}  {results[f'{name}_centred']:7.4f}")


# ---- the command --------------------------------------------------------------------------------


def check(args) -> None:
    """Raise ValueError or OSError for flags that make no run, before anything is read."""
    needed = args.val_dataroot if args.evaluate else args.dataroot
    if not needed:
        raise ValueError(
            "nothing to do: pass --dataroot FOLDER to train, or --evaluate FILE --val_dataroot "
            "FOLDER to measure"
        )
    check_range(
        args, epochs=1, batch_size=1, imsize=1, save_every=1, views=1, heads=1, seed=0, warmup=0,
        save_steps=0, workers=0, weight_decay=0, attend=0, match=0, match_end=0, match_centred=0,
        val_fraction=0, lr=0,
    )  # fmt: skip
    # a photo must be left to train on; Adam's first steps, ten times --lr, must be float32 numbers
    for flag, limit in (("val_fraction", 1), ("lr", 1e37)):
        value = getattr(args, flag)
        if value >= limit:
            raise ValueError(f"--{flag} {value} is too large: pass less than {limit}")
    if args.match_centred > 1:
        raise ValueError(f"--match_centred {args.match_centred} is not a share: pass 0 to 1")
    if args.evaluate:
        if not Path(args.evaluate).is_file():
            what = f"there is no LiFT checkpoint at {args.evaluate}"
            raise FileNotFoundError(f"{what}: train one with --dataroot, or correct --evaluate")
        return
    try:  # better now than after an epoch
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    except OSError as error:
        what = f"cannot write into {args.output_dir} ({first_line(error)})"
        raise OSError(f"{what}: pass another --output_dir") from error


def check_sizes(extractor: DenseExtractor, args, levels: int) -> None:
    """Raise ValueError unless the backbone gives LiFT's grids at S, S/2 and, for 3 levels, S/4."""
    patch = extractor.patch
    patches = 2 ** (levels - 1)  # at S, for each patch at the smallest size
    unit = patches * patch
    if args.imsize % unit:
        near = max(unit, args.imsize // unit * unit)
        what = f"--imsize {args.imsize} is not a multiple of {patches} patches of {patch}"
        raise ValueError(f"{what}: pass --imsize {near}")

    remedy = "pass another backbone or facet"
    if extractor.stride != patch:
        remedy = f"leave out --stride {extractor.stride}"  # LiFT works on the patch grid
    for level in range(levels):
        size = args.imsize // 2**level
        wanted = (extractor.channels, size // patch, size // patch)
        problem = ""
        try:
            found = tuple(extractor(torch.zeros(1, 3, size, size)).shape[1:])
            if found != wanted:
                problem = f"its features are {found}, not {wanted}"
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            problem = first_line(error)
        if problem:
            raise ValueError(f"{extractor.name} does not take {size} pixels ({problem}): {remedy}")


def measure(args) -> None:
    """--evaluate: measure a module on each --val_dataroot.

    The centre is the mean feature of --dataroot, where it is given, else of the photos measured.
    """
    file = read_lift(args.evaluate)
    data = {}  # photos by folder
    for root in [*args.val_dataroot, args.dataroot]:
        if root:
            data[root] = Photos(list_images(root), args.imsize, args.downsample)

    extractor = build_extractor(args)
    levels = 3
    if args.imsize % (4 * extractor.patch):
        levels = 2  # S/4 is no whole number of patches, and nothing is made from it
    check_sizes(extractor, args, levels)
    lift = load_lift(file, extractor)

    results = {}
    for root in args.val_dataroot:
        photos = data[root]
        centre = mean_feature(data[args.dataroot or root], extractor)
        key_batches = in_order(photos, args.batch_size, rank(), world_size())
        loader = make_loader(photos, key_batches, args, extractor)
        results[root] = evaluate(extractor, lift, loader, centre, levels=levels)
        loader.stop()
        if rank() == 0:
            print_table(root, results[root])
        note_below_bilinear(results[root])
    if rank() == 0:
        facts = {**facts_of(extractor), "device": str(extractor.device)}
        report(args, {"settings": settings(args, **facts), "results": results})


def facts_of(extractor: DenseExtractor) -> dict[str, Any]:
    """What the flags of the backbone came to, and how many processes there are."""
    return {
        **extractor.facts(),
        "channel": extractor.channels,
        "patch": extractor.patch,
        "processes": world_size(),
    }


def begin(args, extractor: DenseExtractor, paths: list[Path], val_paths: list[Path]) -> Run:
    """A new run, or with --resume the one that is in the folder.

    Raises:
        ValueError: the folder holds another run.
    """
    lift = new_lift(args, extractor)
    # without weight decay this is the Adam of the paper
    adam = torch.optim.AdamW(lift.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = steps_of_an_epoch(len(paths), args.batch_size, world_size())
    facts = {**facts_of(extractor), **photo_facts(args, paths, val_paths)}
    facts["cached"] = args.cache_features is not None
    facts["heads"] = lift.heads
    known = settings(args, **facts, device=str(extractor.device))
    decide = deciding(args, leave_out=MAY_CHANGE, **facts)
    run = Run(run_folder(args, extractor), extractor, lift, adam, steps, known, decide)
    if args.resume:
        run.resume()
    elif any(run.folder.glob("*.pth")):
        raise ValueError(f"{run.folder} holds a run: pass --resume, or another --output_dir")
    note_what_is_too_little(len(paths), len(val_paths), args.epochs * steps)
    return run


def train_one(args) -> int:
    """Train one module. Returns the signal that stopped it, or 0."""
    paths, val_paths = split(args)
    photos = Photos(paths, args.imsize, args.downsample, args.augment, args.seed, args.match > 0)
    val_photos = Photos(val_paths, args.imsize, args.downsample)
    photos[0, 0]  # raises where no photo can be read
    extractor = build_extractor(args)
    check_sizes(extractor, args, levels=3)
    run = begin(args, extractor, paths, val_paths)

    views = args.views if photos.is_random() else 1
    photos = keep_features(photos, args, extractor, views)
    val_photos = keep_features(val_photos, args, extractor, 1)
    if run.centre is None:
        run.centre = mean_feature(photos, extractor)
    process, world, batch_size = rank(), world_size(), args.batch_size
    keys = stream(len(photos), batch_size, args.epochs, process, world, args.seed, run.step)
    loader = make_loader(photos, keys, args, extractor)
    val_keys = in_order(val_photos, batch_size, process, world)
    val_loader = make_loader(val_photos, val_keys, args, extractor)

    grid = extractor.grid(args.imsize, args.imsize) if args.match else None
    model, precision = prepare(
        run.lift, extractor, args.loss, run.centre, grid, args.match_centred, args.compile
    )
    stopped_by = train(run, model, loader, val_loader, precision, args)
    if not stopped_by:
        run.export("lift.pth")
        tell_run(run, args)
    return stopped_by


def main(args) -> None:
    """Train, or with --evaluate measure, one LiFT module."""
    check(args)
    start_processes(args)
    stopped_by = 0
    if args.evaluate:
        measure(args)
    else:
        stopped_by = train_one(args)
    # not after an error: some processes may be gone, and this one would wait for them
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    parser().run(main)
