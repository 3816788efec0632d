"""Time every fast path against honest baselines, in one process, on the same inputs.

    python benchmarks/speed.py [WORDS] [--repeats 5] [--json speed.json] [--markdown speed.md]

Each line of the table compares with two baselines, which are checked to give our result first:

- the reference's algorithm as it runs (`plain_*.py`);
- "today": what a user of today would write with well-kept parts, where that is something else.

The floor is the time that the multiplications of our own run take at the machine's matrix rate, in
the precision of the line. The rate is the highest that is seen just before and just after the line
is timed, because a machine's speed changes over minutes. Times are medians, beside the range of
ours. The memory ratio is the smaller baseline's peak divided by ours. Each peak is measured in a
process of its own, during a second call, above what is held before that call; this needs Linux.

WORDS choose the lines whose names contain any of them. All lines take about half an hour on two
cores. Each line is told on stderr as it is measured, and files are written anew after it. A line
with a baseline that gives another result, or without the peaks that were asked for, is told there
too; the rest is measured, and the exit status is 1.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from command import Command, check_range, note, report, skipped
from files import first_line, write_text


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("words", nargs="*", help="only the lines whose names contain one of these")
    add("--repeats", type=int, default=5, help="times each side is timed (default: 5)")
    add("--markdown", help="write the table to this file")
    add("--no_memory", action="store_true", help="leave the peak memory out")
    add("--peak", nargs=2, metavar=("NAME", "SIDE"), help="print one peak in MiB, and no table")
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import ctypes

import numpy as np
import plain_davis
import plain_extract
import plain_spair
import plain_tokencut
import plain_train
import plain_visualize
import timm
import torch
import torch.nn.functional as F
from case import Case, cell, count_macs, load_average, processor, resident, table

from backbones import DTYPES

PLAINS = (
    plain_extract,
    plain_train,
    plain_spair,
    plain_davis,
    plain_tokencut,
    plain_visualize,
)
SIDES = ("reference", "ours", "today")  # in the order of Case.setup


def all_cases() -> list[Case]:
    """Every line, in the order of the table."""
    cases = []
    for plain in PLAINS:
        cases += plain.CASES
    return cases


def chosen_cases(words: list[str]) -> list[Case]:
    """The lines whose names contain one of the words; without words, all.

    Raises:
        ValueError: a word chooses nothing.
    """
    chosen = []
    for case in all_cases():
        if not words or any(word in case.name for word in words):
            chosen.append(case)

    for word in words:
        if not any(word in case.name for case in chosen):
            known = "; ".join(case.name for case in all_cases())
            raise ValueError(f"no line contains {word!r}: pass a part of one of these: {known}")
    return chosen


def named_case(name: str) -> Case:
    """The line of this name. The names of others may contain it.

    Raises:
        ValueError: there is none.
    """
    for case in all_cases():
        if case.name == name:
            return case
    raise ValueError(f"no line is named {name!r}: pass a whole name of the table")


# ---- time ---------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def matrix_rate(precision: str) -> float:
    """The highest rate of multiplications a second that this machine shows just now.

    It is the best of square products, of one of the size of a ViT-S's layer at batch 8, and of the
    same as a 1x1 convolution, for which torch may choose another library.

    Args:
        precision: a key of DTYPES.
    """
    dtype = DTYPES[precision]
    tokens, width, hidden = 8 * 196, 384, 1536
    layer_products = tokens * width * hidden
    layer = torch.randn(hidden, width).to(dtype)
    x = torch.randn(tokens, width).to(dtype)
    kernel = layer[:, :, None, None].contiguous(memory_format=torch.channels_last)
    pixels = torch.randn(8, width, 14, 14).to(dtype).to(memory_format=torch.channels_last)
    small = torch.randn(512, 512).to(dtype)
    large = torch.randn(2048, 2048).to(dtype)

    # the rate so far spares a slow machine the larger products
    rate = highest_rate(512**3, partial(torch.mm, small, small))
    as_linear = highest_rate(layer_products, partial(F.linear, x, layer), rate)
    rate = max(rate, as_linear)
    as_convolution = highest_rate(layer_products, partial(F.conv2d, pixels, kernel), rate)
    rate = max(rate, as_convolution)
    of_large = highest_rate(2048**3, partial(torch.mm, large, large), rate)
    return max(rate, of_large)


def highest_rate(products: int, call: Callable[[], Any], expected: float | None = None) -> float:
    """The highest rate of multiplications a second, in up to 20 calls or about 2 seconds.

    Args:
        products: multiplications of a call.
        expected: a known rate. If a call would take over 2 seconds at it, none is made.
    Returns:
        The rate; 0 where no call was made.
    """
    if expected and products / expected > 2:
        return 0.0
    fastest = seconds(call)
    spent = fastest
    for _ in range(19):
        if spent > 2:
            break
        took = seconds(call)
        fastest = min(fastest, took)
        spent += took
    return products / fastest


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None where either is None or 0."""
    if not above or not below:
        return None
    return above / below


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Check that all sides agree, then time them in turn.

    Returns:
        A row of the table, {column: value}; the memory ratio is left None.
    """
    sides = dict(zip(SIDES, case.setup()))  # "today" is left out where there are two
    expected = sides["ours"]()
    for name, run in sides.items():
        if name != "ours":
            case.same(run(), expected)

    rate = matrix_rate(case.dtype)
    # in turn, so that a slow moment of the machine meets all sides
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(seconds(run))
    median = {name: statistics.median(values) for name, values in times.items()}

    rate = max(rate, matrix_rate(case.dtype))
    floor = count_macs(sides["ours"]) / rate
    ours = median["ours"]
    return {
        "case": case.name,
        "reference s": median["reference"],
        "today s": median.get("today"),
        "floor s": floor or None,  # 0 where ours does not multiply
        "ours s": ours,
        "spread": f"{min(times['ours']):.3g}-{max(times['ours']):.3g}",
        "reference/ours": median["reference"] / ours,
        "asked": case.target,
        "today/ours": ratio(median.get("today"), ours),
        "ours/floor": ratio(ours, floor),
        "memory ratio": None,
        "memory asked": case.memory,
    }


# ---- memory -------------------------------------------------------------------------------------


def print_peak(case: Case, side: str) -> None:
    """Print the MiB by which memory grows at most while one side is called.

    That call is the second one: the first loads libraries and fills caches. Prints "none" for a
    side that does not exist.
    """
    sides = dict(zip(SIDES, case.setup()))
    if side not in sides:
        print("none")
        return
    sides[side]()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew from here
    before = resident("VmRSS")
    sides[side]()
    print(resident("VmHWM") - before)


def memory_ratio(case: Case) -> float:
    """The smaller baseline's peak divided by ours, each side in a fresh process.

    Raises:
        ChildProcessError: such a process failed.
    """
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--peak", case.name, side]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            reason = "no message"
            lines = ran.stderr.strip().splitlines()
            if lines:
                reason = lines[-1]
            raise ChildProcessError(f"{side} ended with status {ran.returncode}: {reason}")
        last = ran.stdout.split()[-1]  # what print_peak prints; a library may print before it
        if last != "none":
            peaks[side] = max(float(last), 1.0)  # below 1 MiB is noise
    ours = peaks.pop("ours")
    return min(peaks.values()) / ours


# ---- output -------------------------------------------------------------------------------------


def machine(rates: dict[str, float]) -> dict[str, Any]:
    """What the figures depend on: CPU, threads, load, matrix rates and versions."""
    facts: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count()}
    facts["threads"] = torch.get_num_threads()
    load = load_average()
    if load is not None:
        facts["load"] = load
    for dtype, rate in rates.items():
        facts[f"{dtype} GFLOP/s"] = round(2 * rate / 1e9)
    facts["python"] = platform.python_version()
    for library in (torch, timm, np):
        facts[library.__name__] = library.__version__
    return facts


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as a Markdown table, and the machine below it."""
    known = ", ".join(f"{name} {cell(value)}" for name, value in facts.items())
    return f"{table(rows)}\n{known}\n"


def write_table(args: Namespace, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the files that --markdown and --json name."""
    if args.markdown:
        write_text(args.markdown, markdown(rows, facts))
    if args.json != "-":  # that is for the end
        report(args, {"machine": facts, "rows": rows})


def main(args: Namespace) -> None:
    """Measure and write line by line, then print the table; with --peak, print one peak."""
    check_range(args, repeats=1)
    torch.manual_seed(0)
    if args.peak:
        name, side = args.peak
        print_peak(named_case(name), side)
        return

    cases = chosen_cases(args.words)
    with_memory = not args.no_memory
    if with_memory and platform.system() != "Linux":
        note("peak memory is read under Linux only: left out")
        with_memory = False
    rates = {precision: matrix_rate(precision) for precision in ("float32", "bfloat16")}
    facts = machine(rates)
    rows = []
    failed = False
    for case in cases:
        if rates[case.dtype] < rates["float32"]:  # the machine only emulates this precision
            skipped(case.name, f"{case.dtype} is slower than float32 on this machine")
            continue
        try:
            row = measure(case, args.repeats)
        except FileNotFoundError as error:
            skipped(case.name, first_line(error))
            continue
        except AssertionError as error:
            failed = True
            skipped(case.name, f"a baseline gives another result ({first_line(error)})")
            continue

        if case.memory and with_memory:
            try:
                row["memory ratio"] = memory_ratio(case)
            except ChildProcessError as error:
                failed = True
                note(f"{case.name}: no memory ratio, {first_line(error)}")
        rows.append(row)
        write_table(args, rows, facts)
        told = [f"{column} {cell(value)}" for column, value in row.items() if value is not None]
        print("  ".join(told), file=sys.stderr, flush=True)

    print(markdown(rows, facts))
    report(args, {"machine": facts, "rows": rows})
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser().run(main)
