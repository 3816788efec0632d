"""What the benchmarks share: a line of the speed table, counted products, CPU and memory."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Case(NamedTuple):
    """A line of the speed table: one piece of work, done in two or three ways.

    `setup()` makes the inputs and returns callables without arguments, in this order:

    1. the reference's algorithm as it runs;
    2. ours;
    3. where there is one, what a user of today would write with well-kept parts, such as timm's
       fused forward, torchvision or scipy.

    The first and the third are the baselines. `same(result of a baseline, our result)` raises
    AssertionError where they differ.
    """

    name: str
    target: float  # the time of the reference over ours is asked to be this
    setup: Callable[[], tuple[Callable[[], Any], ...]]
    same: Callable[[Any, Any], None]
    memory: float | None = None  # the same for peak memory, of the baseline that takes less
    dtype: str = "float32"  # precision of our products


def shared_data(name: str) -> Path:
    """A folder of real data beside the project, or in $LIFT_SHARED.

    Raises:
        FileNotFoundError: it is not there.
    """
    shared = os.environ.get("LIFT_SHARED", Path(__file__).parents[2] / "shared")
    folder = Path(shared, "data", name)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data at {folder}: set LIFT_SHARED")
    return folder


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of run().

    Linear layers, convolutions and attention count; element-wise work is free.
    """
    # torch's counter passes over the fused attention of CPUs; the plain one multiplies as often
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # a multiply-accumulate is two FLOPs


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def load_average() -> float | None:
    """How many processes were at work in the last minute; None where nobody counts (Windows)."""
    if not hasattr(os, "getloadavg"):
        return None
    return os.getloadavg()[0]


def resident(field: str) -> float:
    """Memory that this process holds, in MiB; Linux only.

    Args:
        field: VmRSS for now, VmHWM for the peak.
    Raises:
        ValueError: the system does not tell it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):  # as "VmRSS:   123456 kB"
            return int(line.split()[1]) / 1024
    raise ValueError(f"the system does not tell {field}: run this under Linux")
