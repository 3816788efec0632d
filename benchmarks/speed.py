"""Time every fast path against the plain algorithm of the paper, in one process, on the same inputs.

    python benchmarks/speed.py [WORDS] [--repeats 5] [--json speed.json] [--markdown speed.md] [--no_memory]

Each line: the medians of both (with the spread of ours), plain/ours beside the ratio asked for, and the ratio of the peak
memories, each side in a process of its own, above what it holds before it starts. WORDS choose the lines that contain any.
Results are checked to be the same before anything is timed. All of it takes about ten minutes on 2 cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import plain_davis  # noqa: E402
import plain_extract  # noqa: E402
import plain_spair  # noqa: E402
import plain_tokencut  # noqa: E402
import plain_train  # noqa: E402
import plain_visualize  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from case import processor, resident  # noqa: E402

PLAINS = (plain_extract, plain_train, plain_spair, plain_davis, plain_tokencut, plain_visualize)
CASES = [case for plain in PLAINS for case in plain.CASES]
COLUMNS = ("case", "plain s", "ours s", "spread", "ratio", "asked", "memory ratio", "memory asked")


def clock(call):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(case, repeats):
    """Check that both sides agree, then time them in turn: a row of the table."""
    plain, ours = case.setup()
    with torch.no_grad() if case.name.startswith("extract") else torch.enable_grad():
        case.same(plain(), ours())
        pairs = [(clock(plain)[0], clock(ours)[0]) for _ in range(repeats)]
    slow, fast = (statistics.median(times) for times in zip(*pairs))
    mine = [pair[1] for pair in pairs]
    spread = f"{min(mine):.3g}-{max(mine):.3g}"
    return dict(zip(COLUMNS, (case.name, slow, fast, spread, slow / fast, case.target, None, case.memory)))


def peak_of(case, side):
    """MiB that one side takes above what stands before it is called; for a process of its own."""
    both = case.setup()  # either may hold on to files of the other
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    with torch.no_grad() if case.name.startswith("extract") else torch.enable_grad():
        both[side]()
    return resident("VmHWM") - before


def memory_ratio(case):
    """Peak of the plain side over ours, each in a fresh process."""
    peaks = []
    for side in ("0", "1"):
        command = [sys.executable, __file__, "--peak", case.name, side]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return peaks[0] / max(peaks[1], 1)


def machine():
    """What the figures depend on."""
    versions = {"python": platform.python_version()} | {lib.__name__: lib.__version__ for lib in (torch, timm, np)}
    load = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return {"cpu": processor(), "cores": os.cpu_count()} | load | versions


def cell(value):
    """A table cell: three significant digits."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows):
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)] + [[cell(row[column]) for column in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def parse():
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("words", nargs="*", help="only the lines whose name contains one of these")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--json", help="write machine and rows to this file")
    command.add_argument("--markdown", help="write the table to this file")
    command.add_argument("--no_memory", action="store_true", help="leave the peak memory out")
    command.add_argument("--peak", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    return command.parse_args()


def main(args):
    """Measure, line by line."""
    torch.manual_seed(0)
    if args.peak:
        print(peak_of(next(case for case in CASES if case.name == args.peak[0]), int(args.peak[1])))
        return
    rows = []
    for case in CASES:
        if args.words and not any(word in case.name for word in args.words):
            continue
        try:
            row = measure(case, args.repeats)
        except FileNotFoundError as error:
            print(f"{case.name}: left out, {error}", file=sys.stderr)
            continue
        if case.memory and not args.no_memory:
            row["memory ratio"] = memory_ratio(case)
        rows.append(row)
        print("  ".join(f"{column} {cell(row[column])}" for column in COLUMNS if row[column] is not None), flush=True)
    table = markdown(rows) + "\n" + ", ".join(f"{name} {cell(value)}" for name, value in machine().items()) + "\n"
    for file, text in ((args.markdown, table), (args.json, json.dumps({"machine": machine(), "rows": rows}, indent=1))):
        if file:
            Path(file).write_text(text)
    print(table)


if __name__ == "__main__":
    main(parse())
