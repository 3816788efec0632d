"""One run of training: where it stands, the folder it is written to, and how good its module is.

    run = Run(folder, extractor, lift, optimizer, steps, settings, deciding)
    run.resume()

Only train_lift.py uses it. No other file writes checkpoints.
"""

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate

from command import note, rank
from extractor import DenseExtractor
from feature_cache import images_and_features
from files import difference, first_line, load_tensors, save_tensors, write_text
from lift import upsample
from loading import Loader
from objectives import scores


@dataclass
class Run:
    """All that changes while training, and the folder it is written to."""

    folder: Path
    extractor: DenseExtractor
    lift: nn.Module                   # what is trained
    optimizer: torch.optim.Optimizer  # and what trains it
    steps: int                        # in an epoch
    settings: dict[str, Any]          # the flags and what they came to, for people
    deciding: dict[str, Any]          # those that decide the weights; --resume compares them

    centre: Tensor | None = None      # the mean feature [C, 1, 1]
    step: int = 0                     # how many are done
    losses: list[float] = field(default_factory=list)            # of each step of this epoch
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of each epoch done
    broken: set[str] = field(default_factory=set)                # photos that could not be read

    def collect(self, losses: list[Tensor], broken: set[str], signal_here: int) -> int:
        """Gather what all processes have seen since the last call, and keep it.

        Args:
            losses: of this process, a scalar for each step since then, at least one.
            broken: paths of photos that this process could not read.
            signal_here: the signal that this process got, or 0.
        Returns:
            The signal that any process got (the largest number of several), or 0.
        """
        mine = (torch.stack(losses).tolist(), broken, signal_here)
        all_losses, all_broken, signals = zip(*gather(mine))
        # the loss of a step is the mean over the processes
        self.losses += np.mean(all_losses, axis=0).tolist()
        self.broken.update(*all_broken)
        return max(signals)

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
        """Measure the module on the held-out photos and add a line to metrics.jsonl."""
        results: dict[str, Any] = {
            "epoch": len(self.metrics) + 1,
            "step": self.step,
            "loss": float(np.mean(self.losses)),
            "photos_per_s": round(speed, 2),
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
        weights = self.lift.state_dict()
        state = {key: value.cpu().contiguous() for key, value in weights.items()}
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
            "downsample": self.settings["downsample"],
            "imsize": self.settings["imsize"],
            "data": self.settings["dataroot"],
            "metrics": self.metrics[-1],
            "settings": self.settings,
        }
        write_text(self.folder / "lift.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")

    def save(self) -> None:
        """Write last.pth, all that --resume needs; which photos come next follows from the step."""
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
        }
        save_tensors(self.folder / "last.pth", state)

    def resume(self) -> None:
        """Go on from last.pth, if it is there.

        Raises:
            ValueError: it is damaged, or from a run with other settings or of more epochs.
        """
        path = self.folder / "last.pth"
        if not path.is_file():
            if rank() == 0:
                note(f"there is no {path} to go on from: training starts from the beginning")
            return
        remedy = "remove it, and start again"
        last = load_tensors(path, remedy, remedy)
        try:
            changed = difference(last["settings"], self.deciding)
            if not changed:
                self.lift.load_state_dict(last["lift"])
                self.optimizer.load_state_dict(last["optimizer"])
                self.centre = last["centre"].to(self.extractor.device)
                self.step = int(last["step"])
                self.losses = list(last["losses"])
                self.metrics = list(last["metrics"])
                self.broken = set(last["broken"])
        except Exception as error:  # damaged files, and those of earlier versions, raise anything
            what = f"{path} is damaged, or from an earlier version ({first_line(error)})"
            raise ValueError(f"{what}: {remedy}") from error
        if changed:
            remedy = "pass the same"
            if changed.startswith("processes"):
                processes = last["settings"]["processes"]
                remedy = f"start it by torchrun --nproc_per_node {processes}"
            raise ValueError(f"{path} was made with {changed}: {remedy}, or another --output_dir")

        epochs = self.settings["epochs"]
        steps = epochs * self.steps
        if self.step > steps:
            # lift.json would name fewer epochs than the module was trained for
            enough = math.ceil(self.step / self.steps)
            what = f"{self.folder} holds {self.step} steps, more than the {steps} of --epochs"
            raise ValueError(f"{what} {epochs}: pass --epochs {enough} or more")


# ---- how good a module is ------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    extractor: DenseExtractor,
    lift: nn.Module,
    loader: Loader,
    centre: Tensor,
    precision: Callable = nullcontext,
    levels: int = 3,
) -> dict[str, Any]:
    """Measure a module on the photos of a loader, of which each process has its own batches.

    Args:
        centre: the mean feature [C, 1, 1].
        precision: makes the context that LiFT runs in.
        levels: 3, or 2 to leave out what is made from S/4.
    Returns:
        Over the photos of all processes: "photos", how many were measured, the means of
        objectives.scores, and "unreadable", the paths of photos that could not be read.
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

    all_totals, all_broken = zip(*gather((totals, broken)))
    everywhere: Counter = Counter()
    for process_totals in all_totals:
        everywhere.update(process_totals)  # a Counter adds
    photos = everywhere.pop("photos", 0)
    means = {name: round(total / max(photos, 1), 5) for name, total in everywhere.items()}
    return {"photos": photos, **means, "unreadable": sorted(set().union(*all_broken))}


def gather(value: Any) -> list[Any]:
    """The values that all processes passed, by rank, for each of them: all must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- how it is stopped --------------------------------------------------------------------------


class Stop:
    """A context in which SIGINT and SIGTERM do not end the process at once.

    The first one is kept in `signal`, for the training loop to look at after the step. A second one
    acts at once, unless it comes within a second of the first: Ctrl-C in a terminal reaches all
    processes, and torchrun then sends them the same signal again.
    """

    def __enter__(self) -> "Stop":
        self.signal = 0
        self.caught_at = 0.0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame) -> None:
        """Handle a signal."""
        if not self.signal:
            self.signal = number
            self.caught_at = time.monotonic()
        elif time.monotonic() - self.caught_at > 1:
            # put the earlier handlers back, and let them have it
            self.__exit__()
            os.kill(os.getpid(), number)
