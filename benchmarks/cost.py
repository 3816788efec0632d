"""What LiFT costs: every built-in backbone alone, and with LiFT applied one to four times.

    python benchmarks/cost.py                                    # about 7 minutes on one CPU core
    python benchmarks/cost.py --max_gmacs 0 --output_dir cost    # only what can be counted, 15 s
    python benchmarks/cost.py --backbones vit_mini16 --max_gmacs 10 --output_dir cost       # 30 s

Counts parameters and multiply-adds (MACs), and measures latency and peak memory. Every backbone
reads one image of 224 and one of 448 pixels. dino_vits16 also reads images of 112 to 640 pixels, to
show the growth with the tokens. Weights are random, which changes no figure here. What costs more
than --max_gmacs is counted, not run; its other figures are "-".

- MACs are half the FLOPs that torch's FlopCounterMode counts: those of matrix products, attention
  and convolutions, but not of norms, activations, softmax and interpolation. They are counted on
  the meta device, which computes nothing.
- Latency is the fastest of 2 to 10 runs, after one to warm up. On a CPU it is the processor time of
  one thread, which other programs disturb little; on a GPU it is the time that passes.
- Peak memory is what a run adds to weights and program. On CUDA it is torch's own count. On a CPU
  it is resident memory, good to some 10 MB, and known under Linux only.

Writes cost.md (tables), cost.json (every figure) and cost.png (growth) to --output_dir.
"""

import argparse
import copy
import ctypes
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the nouns lie one folder up

from command import PRECISIONS, Command, progress, report, settings
from files import replacing, write_text


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--backbones", nargs="+", help="named backbones of the README (default: all)")
    add("--max_gmacs", type=float, default=300, help="run nothing dearer (default: 300)")
    add("--output_dir", default=Path("benchmarks"), type=Path, help="(default: benchmarks)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="float32", choices=PRECISIONS, help="precision (default: float32)")
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import timm
import torch
from case import count_macs, load_average, processor, resident
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from backbones import BACKBONES, pick_device
from extractor import ViTExtractor
from lift import LiFT, upsample

STEPS = range(5)  # how often LiFT is applied
SIZES = (224, 448)  # pixels a side, of every backbone

GROWING = "dino_vits16"  # the backbone that shows the growth with the tokens
GROWTH = (112, 160, 224, 320, 448, 640)  # its pixels a side

# of the tables, and of the panels of the picture
TITLES = {"gmacs": "GMACs", "ms": "Milliseconds an image", "peak_mb": "Peak memory, MB"}
AXES = {"gmacs": "GMACs", "ms": "milliseconds", "peak_mb": "peak memory, MB"}
COLOURS = ("#444444", "#1b7fbd", "#2a9d5c", "#e08a1e", "#c8373f")  # one for each of STEPS


# ---- the networks -------------------------------------------------------------------------------


def build(name: str, device: str, dtype: str) -> tuple[ViTExtractor, LiFT]:
    """The extractor of the named row of BACKBONES and its LiFT module, with random weights."""
    tag = BACKBONES[name].tag
    model = timm.create_model(tag, num_classes=0, dynamic_img_size=True)
    device = pick_device(device, dtype)
    extractor = ViTExtractor(name, stride=None, model=model, device=device, dtype=dtype)
    lift = LiFT(extractor.channels, extractor.patch)
    lift = lift.requires_grad_(False).eval()
    lift.fold()
    return extractor, lift.to(extractor.device, extractor.dtype)


def without_storage(extractor: ViTExtractor, lift: LiFT) -> tuple[ViTExtractor, LiFT]:
    """Copies of both on the meta device, where everything has a shape and nothing a value."""
    meta_extractor = copy.deepcopy(extractor).to("meta")
    meta_lift = copy.deepcopy(lift).to("meta")
    return meta_extractor, meta_lift


def dense_features(extractor: ViTExtractor, lift: LiFT, image: Tensor, steps: int) -> Tensor:
    """The work that is counted and measured: [1, 3, H, W] -> [1, C, 2^steps h, 2^steps w]."""
    return upsample(lift, image, extractor(image), steps)


def parameters(module: nn.Module) -> int:
    """How many numbers a module has learned."""
    return sum(weight.numel() for weight in module.parameters())


# ---- what is counted and measured ---------------------------------------------------------------


def start_peak(device: torch.device) -> float | None:
    """Forget the peak of memory and return what is in use, in MB.

    None where nobody counts: on other devices than CUDA and the CPU, and off Linux on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if device.type != "cpu" or platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # Linux's way to forget VmHWM
    return resident("VmRSS")


def read_peak(device: torch.device) -> float:
    """The most memory that was in use since start_peak, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM")


@torch.no_grad()
def measure(run: Callable[[], Tensor], device: torch.device) -> dict[str, float | None]:
    """Time and memory of run().

    It runs 2 to 10 times; from the second time on, no more once 2 s have passed.

    Returns:
        ms: milliseconds of the fastest run.
        peak_mb: MB that a run adds to what is in use; None where nobody counts.
    """
    clock = time.perf_counter
    if device.type == "cpu":
        clock = time.process_time

    run()  # to warm up
    before = start_peak(device)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < 2):
        start = clock()
        run().amax().item()  # .item() waits for a GPU
        seconds.append(clock() - start)

    added = None
    if before is not None:
        added = read_peak(device) - before
    return {"ms": 1000 * min(seconds), "peak_mb": added}


def cost_records(
    name: str, sizes: Iterable[int], args: argparse.Namespace, bar: tqdm
) -> list[dict[str, Any]]:
    """What a backbone costs with LiFT: a record for every size and number of steps.

    Returns:
        Dicts of backbone, size, tokens, steps, macs, parameters and lift_parameters. Those
        that were run, up to --max_gmacs, have ms and peak_mb too.
    """
    extractor, lift = build(name, args.device, args.dtype)
    meta_extractor, meta_lift = without_storage(extractor, lift)
    records = []
    for size in sizes:
        image = torch.zeros(1, 3, size, size)  # the extractor takes it to its own device
        rows, columns = extractor.grid(size, size)
        for steps in STEPS:
            macs = count_macs(partial(dense_features, meta_extractor, meta_lift, image, steps))
            record = {
                "backbone": name,
                "size": size,
                "tokens": rows * columns,
                "steps": steps,
                "macs": macs,
                "parameters": parameters(extractor),
                "lift_parameters": parameters(lift),
            }
            if macs <= args.max_gmacs * 1e9:
                run = partial(dense_features, extractor, lift, image, steps)
                record.update(measure(run, extractor.device))
            records.append(record)
            bar.update()
    return records


def paper_facts() -> dict[str, float]:
    """What LiFT adds to ViT-S/16 at 224, in per cent of the backbone, as the LiFT paper states it.

    The paper does not say how much of the backbone it counted, so there are several answers.
    """
    extractor, lift = without_storage(*build("dino_vits16", "cpu", "float32"))
    image = torch.empty(1, 3, 224, 224, device="meta")
    feats = torch.empty(1, 384, 14, 14, device="meta")  # ViT-S/16's map of that image

    added = count_macs(partial(lift, image, feats))
    whole = count_macs(partial(extractor.model.forward_features, image))
    facts = {
        "parameters": 100 * parameters(lift) / parameters(extractor),
        "macs of the whole ViT": 100 * added / whole,
    }
    for layer in (11, 9):  # the last, which runs here, and an earlier one for comparison
        up_to_keys = count_macs(partial(extractor, image, layer=layer))
        facts[f"macs up to the keys of layer {layer}"] = 100 * added / up_to_keys
    return facts


# ---- tables -------------------------------------------------------------------------------------


def figure(record: dict[str, Any], key: str) -> float | None:
    """A record's gmacs, ms or peak_mb; None where it is not known."""
    if key == "gmacs":
        return record["macs"] / 1e9
    return record.get(key)


def steps_name(steps: int) -> str:
    """A number of steps in the words of the tables."""
    if steps == 0:
        return "alone"
    return f"LiFT x{steps}"


def markdown_line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def figure_table(records: list[dict[str, Any]], key: str) -> str:
    """One figure as Markdown: a line a backbone and size, a column a number of steps."""
    lines: dict[tuple[str, int], list[str]] = {}  # {(backbone, size): cells of its line}
    for record in records:
        line = (record["backbone"], record["size"])
        if line not in lines:
            lines[line] = [record["backbone"], str(record["size"]), f"{record['tokens']:,}"]
        cells = lines[line]

        # records come in the order of STEPS, so that each value has its column
        value = figure(record, key)
        if value is None:
            cells.append("-")
        elif key == "gmacs":
            cells.append(f"{value:,.2f}")
        else:
            cells.append(f"{value:,.0f}")

    names = [steps_name(steps) for steps in STEPS]
    table = [markdown_line(["backbone", "pixels", "tokens", *names])]
    table.append("|---" * (3 + len(names)) + "|")
    for cells in lines.values():
        table.append(markdown_line(cells))
    return f"{TITLES[key]}\n\n" + "\n".join(table) + "\n"


def figure_tables(records: list[dict[str, Any]]) -> str:
    """The tables of all three figures, as Markdown."""
    return "\n".join([figure_table(records, key) for key in TITLES])


def parameter_table(records: list[dict[str, Any]]) -> str:
    """Parameters of each backbone and of its LiFT module, as Markdown."""
    lines: dict[str, str] = {}  # {backbone: its line}
    for record in records:
        share = record["lift_parameters"] / record["parameters"]
        millions = f"{record['parameters'] / 1e6:.2f}"
        lift_millions = f"{record['lift_parameters'] / 1e6:.2f}"
        cells = [record["backbone"], millions, lift_millions, f"+{share:.1%}"]
        lines[record["backbone"]] = markdown_line(cells)  # the same for each of its records

    header = markdown_line(["backbone", "parameters, M", "LiFT, M", "share"])
    return "\n".join([header, "|---|---|---|---|", *lines.values()]) + "\n"


def exponent(records: list[dict[str, Any]], steps: int) -> float:
    """b of the power law macs ~ tokens^b, through the first and last record with this `steps`."""
    chosen = [record for record in records if record["steps"] == steps]
    first, last = chosen[0], chosen[-1]
    growth = math.log(last["macs"] / first["macs"])
    return growth / math.log(last["tokens"] / first["tokens"])


def machine(device: torch.device) -> str:
    """The machine, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"one core of {processor()}"


def document(
    records: list[dict[str, Any]],
    growth: list[dict[str, Any]],
    facts: dict[str, float],
    about: dict[str, Any],
) -> str:
    """The Markdown of cost.md.

    Args:
        records: of all backbones, at SIZES.
        growth: of GROWING, at GROWTH.
        facts: those of paper_facts.
        about: the settings of the run.
    """
    made = f"`python benchmarks/cost.py --max_gmacs {about['max_gmacs']:g}` on {about['machine']}"
    if about["load"] is not None:
        made += f", load average {about['load']:.1f} before it began"
    made += f"; torch {about['versions']['torch']}, {about['dtype']}"
    share = {key: f"{value:+.1f} %" for key, value in facts.items()}
    powers = [f"{exponent(growth, 0):.2f} alone"]
    for steps in STEPS[1:]:
        powers.append(f"{exponent(growth, steps):.2f} with {steps_name(steps)}")

    return f"""# What LiFT costs

{made}.
How it is counted: top of `cost.py`; "-": above --max_gmacs.

{parameter_table(records)}
{figure_tables(records)}
## Against the paper

The LiFT paper states +5.7 % parameters and +22 % FLOPs for DINO ViT-S/16 (taken second-hand).
Counted here at 224:

- Parameters: {share["parameters"]}. That is 1.19 M over the 21.67 M of the backbone without a head;
  over the rounded 21 M of DINO's own table the same module is +5.7 %.
- MACs: {share["macs up to the keys of layer 11"]} over what runs here. The last block ends at its
  keys, without attention and MLP. Over the whole ViT it is {share["macs of the whole ViT"]}. The
  share falls with the size, as attention grows with the square of the tokens, so a larger image
  does not explain 22 %. Over a backbone that ends at the keys of layer 9 of 0 to 11 it is
  {share["macs up to the keys of layer 9"]}. Which counter, layer and size the paper used is not
  known to us.

## Growth with the tokens

Each application of LiFT costs four times the one before, and each is linear in the tokens. The
backbone's attention is quadratic. From {growth[0]["tokens"]} to {growth[-1]["tokens"]:,} tokens the
MACs of {GROWING} grow as the tokens to a power:
{", ".join(powers)}.

![MACs, latency and memory over the tokens](cost.png)

{figure_tables(growth)}"""


# ---- the picture --------------------------------------------------------------------------------


def ticks(values: list[float]) -> range:
    """Exponents of the powers of ten from below the smallest to above the largest of the values."""
    lowest = math.floor(math.log10(min(values)))
    highest = math.ceil(math.log10(max(values)))
    return range(lowest, highest + 1)


def position(exponent_of_ten: float, axis: range, start: int, end: int) -> float:
    """The pixel of 10^exponent on a logarithmic axis from pixel `start` to pixel `end`.

    Args:
        axis: the `ticks`; the first lies at `start`, the last at `end`.
    """
    share = (exponent_of_ten - axis[0]) / (axis[-1] - axis[0])
    return start + (end - start) * share


def draw_panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    records: list[dict[str, Any]],
    key: str,
    font: Any,
) -> None:
    """One figure over the tokens, both logarithmic, with a line for each number of steps.

    Args:
        box: the axes, (left, top, right, bottom) in pixels.
        records: those in which the figure is known.
    """
    left, top, right, bottom = box
    middle = (left + right) / 2
    across = ticks([record["tokens"] for record in records])
    up = ticks([figure(record, key) for record in records])

    for power in across:
        x = position(power, across, left, right)
        draw.line([(x, bottom), (x, top)], "#dddddd", 2)
        draw.text((x, bottom + 12), f"{10**power:,}", "black", font, anchor="mt")
    for power in up:
        y = position(power, up, bottom, top)
        draw.line([(left, y), (right, y)], "#dddddd", 2)
        draw.text((left - 12, y), f"{10.0**power:,g}", "black", font, anchor="rm")

    for steps in STEPS:
        points = []
        for record in records:
            if record["steps"] == steps:
                x = position(math.log10(record["tokens"]), across, left, right)
                y = position(math.log10(figure(record, key)), up, bottom, top)
                points.append((x, y))
        draw.line(points, COLOURS[steps], 5)
        for x, y in points:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), COLOURS[steps])

        # the legend has the order of the lines: the dearest at the top
        name = "backbone alone"
        if steps > 0:
            name = steps_name(steps)
        place = len(STEPS) - 1 - steps
        draw.text((left + 20, top + 20 + 34 * place), name, COLOURS[steps], font)

    draw.text((middle, top - 20), f"{GROWING}: {AXES[key]}", "black", font, anchor="mb")
    draw.text((middle, bottom + 48), "tokens of the backbone", "black", font, anchor="mt")


def picture(growth: list[dict[str, Any]]) -> Image.Image:
    """MACs, latency and memory over the tokens, side by side, as far as they are known."""
    known = {}  # {figure: the records that have it}
    for key in AXES:
        shown = []
        for record in growth:
            value = figure(record, key)
            if value is not None and value > 0:  # 0 has no place on a logarithmic axis
                shown.append(record)
        if shown:
            known[key] = shown

    # drawn at twice its size, for smooth lines
    width, height = 860, 800
    font = ImageFont.load_default(28)
    sheet = Image.new("RGB", (width * len(known), height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (key, shown) in enumerate(known.items()):
        # the margins hold the numbers and titles of the axes
        left = number * width + 150
        right = (number + 1) * width - 70
        draw_panel(draw, (left, 80, right, 690), shown, key, font)
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


# ---- the command --------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Count and measure every backbone, and write tables, figures and picture."""
    names = args.backbones or list(BACKBONES)
    for name in names:
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name}: pass some of {', '.join(BACKBONES)}")
    device = pick_device(args.device, args.dtype)
    torch.set_num_threads(1)
    about = settings(
        args,
        backbones=names,
        device=str(device),
        load=load_average(),
        machine=machine(device),
    )

    images = len(SIZES) * len(names) + len(GROWTH)
    with progress(total=images * len(STEPS), unit="row") as bar:
        records = []
        for name in names:
            records += cost_records(name, SIZES, args, bar)
        growth = cost_records(GROWING, GROWTH, args, bar)
        facts = paper_facts()

    figures = {"settings": about, "records": records, "growth": growth, "paper": facts}
    write_text(args.output_dir / "cost.md", document(records, growth, facts, about))
    with replacing(args.output_dir / "cost.png") as temporary:
        picture(growth).save(temporary)
    write_text(args.output_dir / "cost.json", json.dumps(figures, indent=1))
    print(f"written: {args.output_dir / 'cost.md'}")
    report(args, about)


if __name__ == "__main__":
    parser().run(main)
