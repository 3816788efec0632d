"""What the benchmarks share: a line of the speed table, shared data, products, CPU and memory."""

import os
import platform
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def shared_folder(*names: str) -> Path:
    """A folder of what lies beside the project, in ../shared or $LIFT_SHARED.

    Raises:
        FileNotFoundError: it is not there.
    """
    shared = os.environ.get("LIFT_SHARED", Path(__file__).parents[2] / "shared")
    folder = Path(shared, *names)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: set LIFT_SHARED")
    return folder


def shared_data(name: str) -> Path:
    """A folder of real data there. Raises as `shared_folder`."""
    return shared_folder("data", name)


def rule_state(module: nn.Module) -> dict[str, Tensor]:
    """A state_dict that depends on nothing but a module's names and shapes (golden/README.md)."""
    state = {}
    for name, value in module.state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        n = torch.from_numpy(random.standard_normal(value.numel()).astype(np.float32))
        n = n.reshape(value.shape)
        if name.endswith("num_batches_tracked"):
            n = torch.zeros_like(value)
        elif name.endswith("running_var"):
            n = 0.5 + n.abs()
        elif n.ndim == 1 and name.endswith("weight"):
            n = 1 + 0.1 * n
        elif n.ndim == 1 or name in ("pos_embed", "cls_token"):
            n = 0.1 * n
        else:
            n = np.float32(0.04) * n
        state[name] = n
    return state


def rule_image(height: int, width: int, seed: int) -> Tensor:
    """A smooth random image [1, 3, H, W], used as if normalised (the rule of golden/README.md)."""
    random = np.random.RandomState(seed)
    small = random.standard_normal((1, 3, height // 16 + 1, width // 16 + 1)).astype(np.float32)
    noise = random.standard_normal((1, 3, height, width)).astype(np.float32)
    smooth = F.interpolate(torch.from_numpy(small), size=(height, width), mode="bilinear")
    return smooth + 0.1 * torch.from_numpy(noise)


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of run().

    Linear layers, convolutions and attention count; element-wise work is free.
    """
    # torch's counter passes over the fused attention of CPUs; the plain one multiplies as often
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # a multiply-accumulate is two FLOPs


def cell(value: Any) -> str:
    """The text of a table cell: three significant digits of a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows {column: value}, all of the same columns, as a Markdown table; nothing without rows."""
    if not rows:
        return ""
    lines = [" | ".join(rows[0]), " | ".join(["---"] * len(rows[0]))]
    for row in rows:
        lines.append(" | ".join(cell(value) for value in row.values()))
    return "".join(f"| {line} |\n" for line in lines)


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
