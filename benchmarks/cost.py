"""What LiFT costs: parameters, multiply-adds, latency and peak memory of every built-in backbone with LiFT 0 to 4 times.

    python benchmarks/cost.py                                                # about 7 minutes on one CPU core
    python benchmarks/cost.py --max_gmacs 0 --output_dir cost                # only what can be counted, 15 s
    python benchmarks/cost.py --backbones vit_mini16 --max_gmacs 10 --output_dir cost      # half a minute

Every backbone reads one image of 224 and of 448 pixels; dino_vits16 also of 112 to 640, to show the growth with the tokens.
Weights are random, which changes no figure here. A configuration above --max_gmacs is counted, not run ("-").

MACs are half the FLOPs of torch.utils.flop_counter.FlopCounterMode, which counts matrix products, attention and convolutions
(not norms, activations, softmax, interpolation), on the meta device, which computes nothing. Latency is the fastest of 2 to 10
runs after one to warm up: on a CPU the processor time of one thread, which other programs disturb little, on a GPU the time that
passes. Peak memory is what a run adds to weights and program: torch's count on CUDA; resident memory,
good to some 10 MB, on a CPU under Linux.

Writes cost.md (tables), cost.json (every figure) and cost.png (growth) to --output_dir. The last line is JSON: the settings.
"""

import copy
import ctypes
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from case import processor, resident
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the nouns lie one folder up

from extractor import BACKBONES, DTYPES, Command, ViTExtractor, pick_device, replacing, resolve, settings
from lift import LiFT, upsample

STEPS = range(5)  # how often LiFT is applied
SIZES = (224, 448)
GROWING, GROWTH = "dino_vits16", (112, 160, 224, 320, 448, 640)
COLOURS = ("#444444", "#1b7fbd", "#2a9d5c", "#e08a1e", "#c8373f")  # one for each of STEPS


# ---- the networks ---------------------------------------------------------------------------------------------------


def build(name, device, dtype):
    """An extractor of a row of BACKBONES and its LiFT, random weights."""
    model = timm.create_model(resolve(name).tag, num_classes=0, dynamic_img_size=True)
    extractor = ViTExtractor(name, model=model, device=device, dtype=dtype)
    lift = LiFT(extractor.width, extractor.patch).requires_grad_(False).eval()
    return extractor, lift.to(extractor.device, extractor.dtype)


def without_storage(extractor, lift):
    """Copies of both on the meta device, where everything has a shape and nothing a value."""
    return [copy.deepcopy(module).to("meta") for module in (extractor, lift)]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ---- what is counted and measured -----------------------------------------------------------------------------------


def count_macs(run):
    """Multiply-adds of run()."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def start_peak(device):
    """Forget the peak of memory and return what is in use, in MB; None where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if device.type != "cpu" or platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept would hide the growth
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def read_peak(device):
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident("VmHWM")


@torch.no_grad()
def measure(run, device):
    """The fastest of some runs, in ms, and the memory a run adds, in MB (None where nobody counts)."""
    run()
    before, seconds = start_peak(device), []
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    while len(seconds) < 2 or (sum(seconds) < 2 and len(seconds) < 10):
        start = clock()
        run().amax().item()  # .item() waits for a GPU
        seconds.append(clock() - start)
    return {"ms": 1000 * min(seconds), "peak_mb": None if before is None else read_peak(device) - before}


def rows(name, sizes, args, bar):
    """One record for every size and number of LiFT steps of a backbone."""
    extractor, lift = build(name, args.device, args.dtype)
    shapes = without_storage(extractor, lift)
    for size in sizes:
        image = torch.zeros(1, 3, size, size)
        for steps in STEPS:
            macs = count_macs(lambda: upsample(shapes[1], image, shapes[0](image), steps))  # noqa: B023
            record = {
                "backbone": name, "size": size, "tokens": (size // extractor.patch) ** 2, "steps": steps, "macs": macs,
                "parameters": parameters(extractor), "lift_parameters": parameters(lift),
            }  # fmt: skip
            if macs <= args.max_gmacs * 1e9:
                record |= measure(lambda: upsample(lift, image, extractor(image), steps), extractor.device)  # noqa: B023
            bar.update()
            yield record


def paper_facts():
    """What the LiFT paper states for ViT-S/16 at 224, counted here: dict of shares in per cent."""
    shapes = without_storage(*build("dino_vits16", "cpu", "float32"))
    extractor, image = shapes[0], torch.empty(1, 3, 224, 224, device="meta")
    added = count_macs(lambda: shapes[1](image, torch.empty(1, 384, 14, 14, device="meta")))
    whole, facts = count_macs(lambda: extractor.model.forward_features(image)), {}
    facts["parameters"] = 100 * parameters(shapes[1]) / parameters(extractor)
    facts["macs of the whole ViT"] = 100 * added / whole
    for layer in (11, 9):
        extractor.layer = layer
        facts[f"macs up to the keys of layer {layer}"] = 100 * added / count_macs(lambda: extractor(image))
    return facts


# ---- tables and picture ---------------------------------------------------------------------------------------------


def table(records, title, cell):
    """Markdown: a line for each backbone and size, a column for each number of steps, `cell(record)` in it."""
    lines = ["| backbone | pixels | tokens | " + " | ".join(f"LiFT x{n}" if n else "alone" for n in STEPS) + " |"]
    lines.append("|---" * (3 + len(STEPS)) + "|")
    for start in range(0, len(records), len(STEPS)):
        same = records[start : start + len(STEPS)]
        facts = [same[0]["backbone"], str(same[0]["size"]), f"{same[0]['tokens']:,}"]
        lines.append("| " + " | ".join(facts + [cell(record) for record in same]) + " |")
    return "\n".join([title, "", *lines, ""])


def tables(records):
    """The three tables of some records, as Markdown."""
    return "\n".join([
        table(records, "GMACs", lambda r: f"{r['macs'] / 1e9:,.2f}"),
        table(records, "Milliseconds an image", lambda r: f"{r['ms']:,.0f}" if "ms" in r else "-"),
        table(records, "Peak memory, MB", lambda r: f"{r['peak_mb']:,.0f}" if r.get("peak_mb") is not None else "-"),
    ])  # fmt: skip


def parameter_table(records):
    """Markdown: parameters of each backbone and of its LiFT."""
    lines = ["| backbone | parameters, M | LiFT, M | share |", "|---|---|---|---|"]
    for r in {r["backbone"]: r for r in records}.values():
        share = r["lift_parameters"] / r["parameters"]
        lines.append(f"| {r['backbone']} | {r['parameters'] / 1e6:.2f} | {r['lift_parameters'] / 1e6:.2f} | +{share:.1%} |")
    return "\n".join(lines) + "\n"


def exponent(records, steps):
    """b of the power law macs ~ tokens^b through the smallest and the largest of the records with that many steps."""
    first, *_, last = [r for r in records if r["steps"] == steps]
    return math.log(last["macs"] / first["macs"]) / math.log(last["tokens"] / first["tokens"])


def machine(device):
    """The machine, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"one core of {processor()}"


def report(records, growth, facts, about):
    """The Markdown of cost.md."""
    share = {key: f"{value:+.1f} %" for key, value in facts.items()}
    powers = ", ".join(f"{exponent(growth, n):.2f} with LiFT x{n}" if n else f"{exponent(growth, 0):.2f} alone" for n in STEPS)
    return f"""# What LiFT costs

`python benchmarks/cost.py --max_gmacs {about["max_gmacs"]:g}` on {about["machine"]}, load average {about["load"]:.1f} before it
began; torch {about["versions"]["torch"]}, {about["dtype"]}. How it is counted: top of `cost.py`; "-": above --max_gmacs.

{parameter_table(records)}
{tables(records)}
## Against the paper

The LiFT paper states +5.7 % parameters and +22 % FLOPs for DINO ViT-S/16 (taken second-hand). Counted here at 224:

- Parameters: {share["parameters"]}. That is 1.19 M over the 21.67 M of the backbone without a head; over the rounded 21 M of
  DINO's own table the same module is +5.7 %.
- MACs: {share["macs up to the keys of layer 11"]} over what runs here (the last block ends at its keys: no attention, no MLP),
  {share["macs of the whole ViT"]} over the whole ViT. The share falls with the size, as attention grows with the square of the
  tokens, so a larger image does not explain 22 %. Over a backbone that ends at the keys of layer 9 of 0 to 11 it is
  {share["macs up to the keys of layer 9"]}. Which counter, layer and size the paper used is not known to us.

## Growth with the tokens

Each application of LiFT costs four times the one before, and each is linear in the tokens; the backbone's attention is quadratic.
From {growth[0]["tokens"]} to {growth[-1]["tokens"]:,} tokens the MACs of {GROWING} grow as the tokens to a power:
{powers}.

![MACs, latency and memory over the tokens](cost.png)

{tables(growth)}"""


def ticks(values):
    """The exponents of the powers of ten from below the smallest to above the largest of the values."""
    return range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)


def panel(draw, box, title, records, key, font):
    """One log-log diagram in the box (left, top, right, bottom): `key` over tokens, a line for each number of steps."""
    left, top, right, bottom = box
    across, up = ticks([r["tokens"] for r in records]), ticks([r[key] for r in records])

    def place(x, y):  # exponents of ten -> pixels
        x, y = (x - across[0]) / (across[-1] - across[0]), (y - up[0]) / (up[-1] - up[0])
        return left + (right - left) * x, bottom - (bottom - top) * y

    for x in across:
        draw.line([place(x, up[0]), place(x, up[-1])], "#dddddd", 2)
        draw.text((place(x, 0)[0], bottom + 12), f"{10**x:,}", "black", font, anchor="mt")
    for y in up:
        draw.line([place(across[0], y), place(across[-1], y)], "#dddddd", 2)
        draw.text((left - 12, place(0, y)[1]), f"{10.0**y:,g}", "black", font, anchor="rm")
    for steps in STEPS:
        points = [place(math.log10(r["tokens"]), math.log10(r[key])) for r in records if r["steps"] == steps]
        draw.line(points, COLOURS[steps], 5)
        for x, y in points:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), COLOURS[steps])
        name = f"LiFT x{steps}" if steps else "backbone alone"
        draw.text((left + 20, top + 20 + 34 * (len(STEPS) - 1 - steps)), name, COLOURS[steps], font)
    draw.text(((left + right) / 2, top - 20), title, "black", font, anchor="mb")
    draw.text(((left + right) / 2, bottom + 48), "tokens of the backbone", "black", font, anchor="mt")


def picture(growth):
    """The growth of MACs, latency and memory with the tokens, as far as they are known, PIL RGB."""
    growth = [record | {"gmacs": record["macs"] / 1e9} for record in growth]
    titles = {"gmacs": "GMACs", "ms": "milliseconds", "peak_mb": "peak memory, MB"}
    known = {key: [r for r in growth if (r.get(key) or 0) > 0] for key in titles}
    known = {key: some for key, some in known.items() if some}
    width, font = 860, ImageFont.load_default(28)
    sheet = Image.new("RGB", (width * len(known), 800), "white")
    for k, (key, some) in enumerate(known.items()):
        box = (k * width + 150, 80, (k + 1) * width - 70, 690)
        panel(ImageDraw.Draw(sheet), box, f"{GROWING}: {titles[key]}", some, key, font)
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


# ---- the command ----------------------------------------------------------------------------------------------------


def parser():
    """The command line."""
    command = Command(__doc__)
    command.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES), help="(default: all)")
    command.add_argument("--max_gmacs", type=float, default=300, help="do not run what costs more an image (default: 300)")
    command.add_argument("--output_dir", default=Path("benchmarks"), type=Path, help="(default: benchmarks)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    command.add_argument("--dtype", default="float32", choices=list(DTYPES), help="precision inside (default: float32)")
    return command


def main(args):
    """Count, measure, write."""
    torch.set_num_threads(1)
    about = settings(args) | {"load": os.getloadavg()[0], "machine": machine(pick_device(args.device, args.dtype))}
    with tqdm(total=len(STEPS) * (len(SIZES) * len(args.backbones) + len(GROWTH)), unit="row") as bar:
        records = [record for name in args.backbones for record in rows(name, SIZES, args, bar)]
        growth, facts = list(rows(GROWING, GROWTH, args, bar)), paper_facts()
    with replacing(args.output_dir / "cost.md") as temporary:
        temporary.write_text(report(records, growth, facts, about))
    with replacing(args.output_dir / "cost.png") as temporary:
        picture(growth).save(temporary)
    with replacing(args.output_dir / "cost.json") as temporary:
        temporary.write_text(json.dumps({"settings": about, "records": records, "growth": growth, "paper": facts}, indent=1))
    print(json.dumps(about))


if __name__ == "__main__":
    parser().run(main)
