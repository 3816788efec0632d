"""What the benchmarks share: a line of the speed table, a count of products, the machine."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Case(NamedTuple):
    """A line of the speed table: up to three callables without arguments, on the same inputs.

    `setup()` returns them in this order:

    1. the reference's algorithm as it runs;
    2. ours;
    3. where there is one, what a user of today would write with well-kept parts, such as timm's
       fused forward, torchvision or scipy.

    `same(result of a baseline, our result)` raises AssertionError where they differ.
    """

    name: str
    target: float  # asked ratio of the reference's time to ours
    setup: Callable[[], tuple[Callable[[], Any], ...]]
    same: Callable[[Any, Any], None]
    memory: float | None = None  # asked ratio of the smaller baseline's peak to ours
    dtype: str = "float32"  # precision of our products


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of run(), half of the FLOPs that torch.utils.flop_counter counts.

    Those are of linear layers, convolutions and attention; element-wise work is free. The fused
    attention of CPUs is not counted, so the plain one, which has as many, takes its place.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the system does not tell {field}: pass --no_memory")
