"""What the benchmarks share: a line of the speed table, and what is known of the machine and this process."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A pair of callables on the same inputs.

    `setup()` returns (plain, ours), each called without arguments; `same(plain result, our result)` raises AssertionError
    where they differ. `target` is the asked ratio of the plain time to ours, `memory` that of the peak memories.
    """

    name: str
    target: float
    setup: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    same: Callable[[Any, Any], None]
    memory: float | None = None


def processor():
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def resident(field):
    """VmRSS (now) or VmHWM (peak) of this process, in MiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
