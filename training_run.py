"""One run of training: where it stands, the folder it is written to, and what its module is worth.

    run = Run(args, extractor, steps=100, facts={})
    run.resume()

Only train_lift.py uses it. No other file writes checkpoints.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate

from command import deciding, note, rank, settings
from extractor import DenseExtractor
from feature_cache import images_and_features
from files import difference, first_line, load_tensors, save_tensors, write_text
from lift import LiFT, upsample
from loading import Loader
from objectives import scores

# Flags that may change at --resume. They do not decide the weights, with one exception: the two
# that follow the length of the run, --schedule cosine and --match_end, go by the new --epochs.
# Photos count by their names and number: see train_lift.photo_facts.
ONLY_HOW = (
    "epochs", "resume", "save_every", "save_steps", "workers", "tensorboard", "compile", "recipe",
    "output_dir", "cache_features", "dataroot", "val_dataroot",
)  # fmt: skip


class Run:
    """All that changes while training, and the folder it is written to.

    Attributes:
        lift, optimizer: what is trained, and what trains it.
        centre: the mean feature [C, 1, 1], or None before it is known.
        steps: of an epoch.
        step: how many steps are done.
        losses: a number for each step of this epoch.
        metrics: a dict for each epoch done.
        broken: paths of photos that could not be read.
        settings: the flags and what they came to, for people.
        deciding: the settings that decide the weights; --resume compares them.

    Args:
        facts: what the flags came to.
    """

    def __init__(self, args, extractor: DenseExtractor, steps: int, facts: dict[str, Any]):
        self.args = args
        self.extractor = extractor
        self.folder = run_folder(args, extractor)

        heads = 1
        if args.attend:
            heads = args.heads or extractor.heads
        if extractor.channels % heads:
            what = f"{heads} heads do not divide {extractor.channels} channels"
            raise ValueError(f"{what}: pass --heads 1, or another divisor")
        # the same weights at the start in every process, and after a stop before the first save
        torch.manual_seed(args.seed)
        lift = LiFT(
            extractor.channels,
            extractor.patch,
            pre_shape=False,
            post_shape=False,
            attend=args.attend,
            heads=heads,
        )
        self.lift = lift.to(extractor.device)
        # synchronised batch norm is for GPUs only
        if dist.is_initialized() and extractor.device.type == "cuda":
            self.lift = nn.SyncBatchNorm.convert_sync_batchnorm(self.lift)
        # without weight decay this is the Adam of the paper
        self.optimizer = torch.optim.AdamW(
            self.lift.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )

        self.centre: Tensor | None = None
        self.steps = steps
        self.step = 0
        self.losses: list[float] = []
        self.metrics: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        facts = {**facts, "heads": heads}
        self.settings = settings(args, **facts, device=str(extractor.device))
        self.deciding = deciding(args, leave_out=ONLY_HOW, **facts)

    def collect(self, losses: list[Tensor], broken: set[str], signal_here: int) -> int:
        """Gather what all processes have seen since the last call, and keep it.

        Args:
            losses: of this process, a scalar for each step since then, at least one.
            broken: paths of photos that this process could not read.
            signal_here: the signal that this process has got, or 0.
        Returns:
            The signal that any process has got (the largest number of several), or 0.
        """
        all_losses = []  # [processes, steps]
        signal_of_any = 0
        mine = (torch.stack(losses).tolist(), broken, signal_here)
        for process_losses, process_broken, process_signal in gather(mine):
            all_losses.append(process_losses)
            self.broken |= process_broken
            signal_of_any = max(signal_of_any, process_signal)
        # the loss of a step is the mean of what the processes had
        self.losses += np.mean(all_losses, axis=0).tolist()
        return signal_of_any

    @torch.no_grad()
    def check(self, photos) -> None:
        """Raise ValueError if the module no longer gives finite features: it is not to be kept."""
        # Each process has statistics of its own photos in its batch norms. What is measured and
        # written is the module of the first one.
        if dist.is_initialized():
            for buffer in self.lift.buffers():
                dist.broadcast(buffer, 0)
        first = default_collate([photos[0, 0]])
        images, feats = images_and_features(first, self.extractor, levels=2)
        out = upsample(self.lift.eval(), images[1], feats[1])
        self.lift.train()
        if not out.isfinite().all():
            what = f"the features of LiFT are not finite after step {self.step}"
            kept = f"{self.folder} keeps what was saved before"
            raise ValueError(f"{what} ({kept}): pass a smaller --lr and another --output_dir")

    def end_epoch(self, speed: float, val_loader: Loader, precision: Callable) -> None:
        """Measure the module on the held-out photos and add a line to metrics.jsonl.

        Args:
            speed: photos a second.
        """
        results: dict[str, Any] = {
            "epoch": len(self.metrics) + 1,
            "step": self.step,
            "loss": float(np.mean(self.losses)),
            "photos_per_s": speed,
        }
        if val_loader.dataset.paths:
            lift = self.lift.eval()
            results["val"] = evaluate(self.extractor, lift, val_loader, self.centre, precision)
            self.lift.train()
        self.losses = []
        self.metrics.append(results)
        if rank() == 0:
            # the whole file anew: after --resume it may hold lines of steps that are trained again
            lines = [json.dumps(line, allow_nan=False) + "\n" for line in self.metrics]
            write_text(self.folder / "metrics.jsonl", "".join(lines))

    def export(self, name: str) -> None:
        """Write the module as a bare state_dict, and what it is for beside it as lift.json."""
        if rank() > 0:
            return
        # on the CPU, so that the file can be read where there is no GPU
        state = {}
        for key, value in self.lift.state_dict().items():
            state[key] = value.cpu().contiguous()
        save_tensors(self.folder / name, state)

        extractor = self.extractor
        facts = {
            **extractor.facts(),
            "model_type": extractor.name,
            "patch": extractor.patch,
            "channels": extractor.channels,
            "mean": extractor.mean,
            "std": extractor.std,
            "attend": self.lift.radius,
            "heads": self.lift.heads,
            "downsample": self.args.downsample,
            "imsize": self.args.imsize,
            "data": self.args.dataroot,
            "metrics": self.metrics[-1],
            "settings": self.settings,
        }
        text = json.dumps(facts, indent=1, allow_nan=False)
        write_text(self.folder / "lift.json", text + "\n")

    def save(self) -> None:
        """Write last.pth, all that --resume needs.

        The position in the stream of photos is not in it, because it follows from the step.
        """
        if rank() > 0:
            return
        state = {
            "lift": self.lift.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": self.deciding,
            "centre": self.centre,
            "step": self.step,
            "losses": self.losses,
            "metrics": self.metrics,
            "broken": sorted(self.broken),
            "rng": torch.get_rng_state(),
        }
        save_tensors(self.folder / "last.pth", state)

    def resume(self) -> None:
        """Go on from last.pth, if there is one already.

        Raises:
            ValueError: it is damaged, or one of a run with other settings or of more epochs.
        """
        path = self.folder / "last.pth"
        if not path.is_file():
            if rank() == 0:
                note(f"there is no {path} to go on from: training starts at its beginning")
            return
        remedy = "remove it, and start again"
        last = load_tensors(path, remedy, remedy)
        try:
            changed = difference(last["settings"], self.deciding)
            if not changed:
                self.restore(last)
        except Exception as error:  # damaged files, and those of earlier versions, raise anything
            what = f"{path} is damaged, or of an earlier version ({first_line(error)})"
            raise ValueError(f"{what}: {remedy}") from error
        if changed:
            remedy = "pass the same"
            if changed.startswith("processes"):
                processes = last["settings"]["processes"]
                remedy = f"start it by torchrun --nproc_per_node {processes}"
            raise ValueError(f"{path} was made with {changed}: {remedy}, or another --output_dir")

        steps = self.args.epochs * self.steps
        if self.step > steps:
            # lift.json would name fewer epochs than the module was trained for
            enough = math.ceil(self.step / self.steps)
            what = f"{self.folder} holds {self.step} steps, more than the {steps} of --epochs"
            raise ValueError(f"{what} {self.args.epochs}: pass --epochs {enough} or more")

    def restore(self, last: dict[str, Any]) -> None:
        """Take over what `save` wrote."""
        self.lift.load_state_dict(last["lift"])
        self.optimizer.load_state_dict(last["optimizer"])
        if last["centre"] is not None:
            self.centre = last["centre"].to(self.extractor.device)
        self.step = int(last["step"])
        self.losses = list(last["losses"])
        self.metrics = list(last["metrics"])
        self.broken = set(last["broken"])
        torch.set_rng_state(last["rng"])


def run_folder(args, extractor: DenseExtractor) -> Path:
    """OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}, and more.

    Other flags that decide what module it becomes follow where they are not the paper's.
    """
    name = (args.my_extractor or args.model_type).replace("/", "_").replace(":", "_")
    augment = "aug" if args.augment else "noaug"
    parts = [name, str(args.lr), args.loss, augment, str(args.imsize)]

    # a network of your own has neither layer nor facet
    if extractor.layer is not None and extractor.layer != extractor.depth - 1:
        parts.append(f"layer{extractor.layer}")
    if extractor.facet not in ("key", None):
        parts.append(extractor.facet)
    if args.attend:
        parts.append(f"attend{args.attend}")
    if args.heads:
        parts.append(f"heads{args.heads}")
    if args.match:
        parts.append(f"match{args.match}")
    if args.downsample == "resize":
        parts.append("resize")
    if args.seed:
        parts.append(f"seed{args.seed}")
    return Path(args.output_dir) / "_".join(parts)


# ---- what a module is worth ---------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    extractor: DenseExtractor,
    lift: nn.Module,
    loader: Loader,
    centre: Tensor,
    precision: Callable = nullcontext,
    levels: int = 3,
) -> dict[str, Any]:
    """Measure a module on the photos of a loader.

    Each process of a torchrun measures its own batches, and all return the result over all photos.

    Args:
        centre: the mean feature [C, 1, 1].
        precision: makes the context that LiFT runs in.
        levels: 3, or 2 to leave out what is made from S/4.
    Returns:
        A dict with "photos", how many were measured, the means of objectives.scores, and
        "unreadable", the paths of photos that could not be read.
    """
    totals: Counter = Counter()  # over photos, and how many there are
    broken = set()
    for batch in loader:
        images, feats = images_and_features(batch, extractor, levels)
        twice = None
        with precision():
            once = upsample(lift, images[1], feats[1])
            if levels == 3:
                twice = upsample(lift, images[2], feats[2], iterations=2)
        # where a photo cannot be read, another stands in for it, which counts in its own place only
        was_read = batch["broken"] < 0  # [B]
        for name, cosines in scores(once, twice, feats, centre).items():
            totals[name] += float(cosines[was_read].sum())
        totals["photos"] += int(was_read.sum())
        for index in batch["broken"][~was_read].tolist():
            broken.add(str(loader.dataset.paths[index]))

    everywhere: Counter = Counter()
    unreadable: set[str] = set()
    for process_totals, process_broken in gather((totals, broken)):
        everywhere.update(process_totals)  # a Counter adds
        unreadable |= process_broken
    photos = everywhere.pop("photos", 0)
    means = {name: round(total / max(photos, 1), 5) for name, total in everywhere.items()}
    return {"photos": photos, **means, "unreadable": sorted(unreadable)}


def gather(value: Any) -> list[Any]:
    """The values that all processes passed, in the order of their ranks.

    Every process must call it, and each gets all values. Without a torchrun there is one alone.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
