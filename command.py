"""What every script's command line shares: flags, one-line errors, notes, progress and settings.

Nothing here needs torch at import, so that a script answers `--help` and wrong flags at once:

    if __name__ == "__main__":
        parser().parse_args()  # before the imports that take seconds
"""

import argparse
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from files import first_line, plain, write_text

FACETS = ("key", "query", "value", "token", "token_norm", "attn")
PRECISIONS = ("float32", "bfloat16", "float16")
MY_EXTRACTOR = "extractor:my_extractor"  # what --my_extractor means without a value


# ---- command lines ------------------------------------------------------------------------------


class Command(argparse.ArgumentParser):
    """An argument parser for one script: whatever is wrong is one line on stderr, and status 2.

    Flags cannot be abbreviated. Every script has --json.
    """

    def __init__(self, doc: str | None):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--json", metavar="FILE",
            help="write all settings, versions and results to FILE as JSON; - prints them",
        )  # fmt: skip

    def error(self, message: object) -> None:  # type: ignore[override]
        one_line = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {one_line}\n")

    def run(self, main: Callable[[argparse.Namespace], Any], argv: list[str] | None = None) -> None:
        """Parse the flags, call main(args), and turn the user's errors into one line.

        ValueError and OSError are bad input; LIFT_TRACEBACK=1 raises them with their traceback.
        Memory that ran out is told in one line too. Other errors are bugs, and are raised.
        """
        args = self.parse_args(argv)
        with suppress(ValueError):  # signals are for the main thread
            # an exit like any other, so that temporary files go and worker processes end
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            if args.json and Path(args.json).is_dir():
                raise ValueError(f"--json {args.json} is a folder: pass a file")
            main(args)
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        except (ValueError, OSError) as error:
            if os.environ.get("LIFT_TRACEBACK"):
                raise
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.error(out_of_memory(error))


def truth(text: str) -> bool:
    """The bool of a word on the command line: true, yes, t, y, 1, or false, no, f, n, 0."""
    word = text.lower()
    if word in ("true", "yes", "t", "y", "1"):
        return True
    if word in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False: pass one of them")


def add_backbone_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags that extractor.build_extractor reads; `defaults` overrides theirs by name."""
    stride = defaults.get("stride", "the patch")
    device = defaults.get("device", "auto")
    group = parser.add_argument_group("backbone", "The frozen network whose features are taken.")
    add = group.add_argument
    add(
        "--model_type", "--model", default="dino_vits8",
        help="a name from the README, or any ViT of timm (default: dino_vits8)",
    )  # fmt: skip
    add("--backbone_path", metavar="FILE", help="its weights, instead of a download")
    add("--ema", action="store_true", help="the averaged weights of timm's training checkpoints")
    add(
        "--my_extractor", nargs="?", const=MY_EXTRACTOR, metavar="MODULE:FUNCTION",
        help="a function that returns your own network, instead of --model_type",
    )  # fmt: skip
    add("--facet", default="key", choices=FACETS, help="facet of the descriptors (default: key)")
    add("--layer", type=int, help="layer, counted from 0 (default: the last)")
    add(
        "--stride", type=int,
        help=f"pixels between descriptors, a divisor of the patch (default: {stride})",
    )  # fmt: skip
    add("--channel", type=int, help="channels of the descriptors; only checked")
    add("--patch", type=int, help="patch of the backbone in pixels; only checked")
    add("--device", default="auto", help=f"auto, cpu, cuda, cuda:N or mps (default: {device})")
    add("--dtype", default="float32", choices=PRECISIONS, help="precision (default: float32)")
    parser.set_defaults(**defaults)


def add_lift_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which features.build_features chooses how features are upsampled."""
    group = parser.add_argument_group("upsampling", "What makes the features finer.")
    add = group.add_argument
    add("--lift_path", metavar="FILE", help="LiFT checkpoint; without it features stay as they are")
    add("--lift_iter", type=int, default=1, help="how often resolution is doubled (default: 1)")
    add(
        "--upsample", metavar="HOW",
        help="none, bilinear, lift, or MODULE:FUNCTION for an upsampler of your own, see "
        "docs/upsamplers.md (default: lift with --lift_path, else none)",
    )  # fmt: skip


def check_range(args: argparse.Namespace, **lowest: float) -> None:
    """Raise ValueError for the first flag that is given and below its lowest value."""
    for flag, least in lowest.items():
        value = getattr(args, flag)
        # "not >=" is true for NaN, as "<" is not
        if value is not None and not value >= least:
            raise ValueError(f"--{flag} {value} is too small: pass {least} or more")


def rank() -> int:
    """Which process of a torchrun this is; 0 without one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes a torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_torchrun() -> None:
    """Raise ValueError where RANK and WORLD_SIZE are set, but not what else torchrun sets."""
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        if world_size() > 1 and name not in os.environ:
            what = f"WORLD_SIZE is {world_size()}, but {name} is not set"
            raise ValueError(f"{what}: start the processes with torchrun, or unset WORLD_SIZE")


def check_one_process() -> None:
    """Raise ValueError under a torchrun of several processes: each would do the same work."""
    if world_size() > 1:
        raise ValueError("this script runs as one process: start it with python, not torchrun")


# ---- memory -------------------------------------------------------------------------------------


def limit_memory() -> None:
    """Let this process have no more main memory than the machine, or its container, has.

    A larger allocation then fails with an error, which can be told in one line. Without a limit the
    system promises memory that it does not have, and kills the process when it is used.
    """
    try:
        import resource
    except ImportError:  # Windows refuses such allocations by itself
        return
    # of a container's limit the mapped libraries take a part, too
    limit = min(free_memory(), 0.9 * container_limit())
    if math.isinf(limit):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:  # somebody's own limit, as by ulimit -d
        limit = min(limit, soft)
    with suppress(ValueError, OSError):  # a system that does not know this limit
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), hard))


def free_memory() -> float:
    """The bytes of main memory that this process has or could get; infinite if nobody says."""
    with suppress(OSError, KeyError, ValueError):
        sizes = {}
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, size = line.partition(":")  # as MemAvailable: 12345 kB
            sizes[name] = size
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return int(sizes["MemAvailable"].split()[0]) * 1024 + own
    return math.inf


def container_limit() -> float:
    """The lowest limit in bytes of this process's control groups: Docker's, Slurm's, systemd's.

    A group's limit holds for the groups inside it, so all of them count.
    """
    files = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)  # as 0::/user.slice/session.scope
            folder, name = Path("/sys/fs/cgroup" + group), "memory.max"
            if "memory" in controllers:  # version 1; version 2 has one tree for all controllers
                folder, name = Path("/sys/fs/cgroup/memory" + group), "memory.limit_in_bytes"
            # inside a container the group's path may be the host's: its root is the limit then
            files += [parent / name for parent in (folder, *folder.parents)]

    limit = math.inf
    for file in files:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit = min(limit, int(file.read_text()))
    return limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch raises a RuntimeError, whose words depend on the device."""
    text = str(error)
    words = ("out of memory", "allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def out_of_memory(error: BaseException) -> str:
    """What to tell of such an error, in one line."""
    reason = first_line(error)
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))  # as "20.00 GiB", or "4096 bytes"
    if asked:
        reason = f"it asked for {asked[1]}"
    return f"out of memory ({reason}): use smaller images or batches"


def why_skipped(error: Exception) -> str:
    """Why a photo among others is left out, in one line: bad input, or memory that ran out.

    Any other error is a bug, and raised again.
    """
    if is_out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    raise error


# ---- what made a result -------------------------------------------------------------------------


def settings(args: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """Every flag of a run and the versions behind its numbers, as a dict that JSON can hold.

    Args:
        facts: what the networks are, and whatever was left out on the command line, as it was
            resolved (layer, device, ...).
    """
    import numpy
    import timm
    import torch
    import torchvision

    versions = {"python": platform.python_version()}
    for library in (torch, torchvision, timm, numpy):
        versions[library.__name__] = library.__version__
    return {**plain(vars(args)), **plain(facts), "versions": versions}


def deciding(
    args: argparse.Namespace,
    leave_out: Iterable[str] = (),
    paths: Iterable[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """The settings that decide a result: two runs with equal ones make the same.

    Weight files count by the digests in `facts`, not by their names or dates. The device does not
    count.

    Args:
        leave_out: flags that change how the work is done, or where it goes, but not what comes out.
        paths: flags whose values are paths; they count as absolute ones.
        facts: see `settings`.
    """
    unimportant = {*leave_out, "backbone_path", "lift_path", "device", "json"}
    kept = {name: value for name, value in vars(args).items() if name not in unimportant}
    for name in paths:
        if kept.get(name) is not None:
            kept[name] = str(Path(kept[name]).resolve())
    return plain({**kept, **facts})


# ---- what a script says -------------------------------------------------------------------------


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write a dict as JSON to --json FILE, or print it for --json -; nothing without the flag."""
    if not args.json:
        return
    text = json.dumps(plain(results), allow_nan=False)
    if args.json == "-":
        print(text)
    else:
        write_text(args.json, text + "\n")


def note(text: str) -> None:
    """Tell the user, on stderr, something that they may not expect."""
    print(f"note: {text}", file=sys.stderr)


def skipped(name: str | Path, reason: str) -> None:
    """Tell the user, on stderr, that something was left out, and why."""
    print(f"skipped: {name}: {reason}", file=sys.stderr)


class Lines(io.TextIOBase):
    """Where a bar is drawn if stderr is not a terminal: a line a minute, the first after one."""

    def __init__(self) -> None:
        self.next = time.monotonic() + 60

    def write(self, text: str) -> int:
        line = text.strip()  # tqdm goes back to the start of its line before it draws
        if line and time.monotonic() >= self.next:
            print(line, file=sys.stderr)
            self.next = time.monotonic() + 60
        return len(text)


def progress(
    iterable: Iterable[Any] | None = None,
    total: int | None = None,
    unit: str = "it",
    desc: str | None = None,
) -> tqdm:
    """A bar on stderr over an iterable, or to be updated by hand; it is a context too.

    See Lines for where stderr is not a terminal.
    """
    file: Any = sys.stderr
    if not sys.stderr.isatty():
        file = Lines()
    return tqdm(iterable, total=total, unit=unit, desc=desc, file=file)
