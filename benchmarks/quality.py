"""Quality and cost in one table: a backbone alone, with bilinear upsampling, with LiFT once and twice, and at double size.

    python benchmarks/quality.py --dataroot DATAROOT --model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_residual.pth

Runs this repository's own command lines on whatever of SPair-71k, DAVIS, VOC (2007, 2012) and COCO20k lies in DATAROOT, at
--imsize pixels, all pairs of SPair-71k, and the cosine measure of train_lift.py on --photos. MACs, time and peak memory are
those of the features of one image, as in cost.py. Writes OUTPUT.json and, from it, OUTPUT.md; a table of
another backbone that OUTPUT.json holds stays. The last line printed is this run's part of that JSON, commands included.

With the small data sets of the tables in benchmarks/ about 6 minutes on one CPU core. A run that was stopped goes on where it was
if --runs names a folder to keep its masks and boxes in.
"""

import json
import platform
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts lie one folder up

from cost import measure

from extractor import Command, ViTExtractor, add_backbone_args, replacing, settings
from lift import read_origin, upsampler

BACKBONE = ("model_type", "backbone_path", "facet", "layer", "stride", "device", "dtype")
NO_LIFT = {"upsample": None, "lift_path": None, "lift_iter": 1}

# What train_lift.py's cosine says of a row: features made from S/2, and from S/4 pixels, against the backbone's own at S
COSINES = {"backbone": ("nearest", None), "+ bilinear": ("bilinear", "bilinear_twice"), "+ LiFT": ("lift", None)}
COSINES |= {"+ LiFT x2": (None, "lift_twice")}

# DINO S/16 in the LiFT paper, figures taken second-hand: SPair PCK@.1 and @.05, DAVIS J&F, COCO20k CorLoc
PAPER = {
    "backbone": (24.76, 9.54, 33.0, 53.98),
    "+ bilinear": (26.72, 11.37, 37.0, 51.53),
    "+ LiFT": (28.68, 14.72, 44.3, 58.03),
    "backbone at 448": (28.60, 15.33, 50.9, 57.99),
}
ABOUT = """# Quality and cost

Written by `benchmarks/quality.py`; the commands behind every figure are in `quality.json`. PCK, J&F and CorLoc in percent.
"PCK@.1 cos" renormalises descriptors after interpolation (`--match cosine`). "cosine x2": with the backbone's own features at
double size, of what is made from --imsize pixels (backbone: nearest neighbour); "cosine x4": of what is made from half of that;
photos are halved as in the module's training (strided, or antialiased for the residual modules that ship).
MACs are those of linear layers, convolutions and attention for one image (torch.utils.flop_counter), ms the fastest of 2
to 10 runs (CPU time of all threads), MiB what memory grows by meanwhile.
"""
NOT_RUN = """
## DINO S/16 in the LiFT paper (not run here)

Figures taken second-hand; neither DINO's weights nor the full data sets were at hand. SPair-71k: 100 pairs a category, drawn.

"""
MODULE = """
To reproduce them on the full data, first a module:

    python train_lift.py --dataroot imagenet/train --model_type dino_vits16 --epochs 5 --augment
    cp lift_trains/dino_vits16_0.001_cosine_aug_448/lift.pth pretrained/lift_dino_vits16.pth
    cp lift_trains/dino_vits16_0.001_cosine_aug_448/lift.json pretrained/lift_dino_vits16.json
"""


# ---- what is run ----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A script on a data set, the first of `folders` below --dataroot with one of `markers`; flags; its results as columns."""

    script: str
    folders: tuple
    markers: tuple
    flags: tuple
    columns: Callable[[dict], dict]


def corloc(name, folder, *markers):
    """TokenCut's Task on a data set."""
    return Task("eval_tokencut", (folder, "."), markers, ("--dataset", name), lambda r: {f"{name} CorLoc": r["corloc"]})


ALL = ("--pairs_per_category", "0")
SPAIR = ("eval_spair", ("SPair-71k", "."), ("PairAnnotation",))
TASKS = (
    Task(*SPAIR, ALL, lambda r: {"SPair PCK@.1": r["mean"]["pck@0.1"], "PCK@.05": r["mean"]["pck@0.05"]}),
    Task(*SPAIR, (*ALL, "--match", "cosine"), lambda r: {"PCK@.1 cos": r["mean"]["pck@0.1"]}),
    Task("eval_davis", ("DAVIS", "."), ("ImageSets/2017/val.txt",), (), lambda r: {"DAVIS J&F": 100 * r["J&F-Mean"]}),
    corloc("VOC07", "voc", "VOC2007", "VOCdevkit/VOC2007"),
    corloc("VOC12", "voc", "VOC2012", "VOCdevkit/VOC2012"),
    corloc("COCO20k", "coco20k", "coco_20k_filenames.txt"),
)


def home(dataroot, task):
    """The folder of a Task's data set, or None."""
    folders = (Path(dataroot, folder) for folder in task.folders)
    return next((folder for folder in folders if any((folder / marker).exists() for marker in task.markers)), None)


def rows(lift_path, imsize):
    """What is compared: {name: settings besides the backbone's}."""
    lift = {"imsize": imsize, "lift_path": lift_path}
    return {
        "backbone": {"imsize": imsize},
        "+ bilinear": {"imsize": imsize, "upsample": "bilinear"},
        "+ LiFT": lift,
        "+ LiFT x2": lift | {"lift_iter": 2},
        f"backbone at {2 * imsize}": {"imsize": 2 * imsize},
    }


def flags(given):
    """Settings as the flags of a command line, those that are None left out."""
    return [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]


def run(script, argv, commands):
    """The results of one of the scripts, run in this process; its command is added to the list `commands`."""
    commands.append(shlex.join(["python", f"{script}.py", *argv]))
    print(commands[-1], file=sys.stderr)
    module = import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        module.parser().run(module.main, [*argv, "--json", f"{folder}/results.json"])
        return json.loads(Path(folder, "results.json").read_text())["results"]


def quality(args, name, row, backbone, commands):
    """The columns of all data sets that are there, for one row."""
    columns, folder = {}, Path(args.runs, args.model_type, name.replace(" ", "_"))
    for task in TASKS:
        root = home(args.dataroot, task)
        if root:
            argv = ["--dataroot", str(root), *task.flags, *flags(backbone | row), "--output_dir", str(folder)]
            if task.script == "eval_tokencut":
                argv[-1] += "/" + task.flags[-1]  # its predictions are those of one data set
            columns |= task.columns(run(task.script, argv, commands))
    return columns


def cosines(args, backbone, commands):
    """train_lift.py's mean cosines over all --photos, halved as in the module's training: {row name: columns}."""
    downsample = (read_origin(args.lift_path) or {}).get("downsample")
    given = {"evaluate": args.lift_path, "downsample": downsample, "imsize": 2 * args.imsize, "batch_size": 4} | backbone
    results = run("train_lift", [*flags(given), "--val_dataroot", *args.photos], commands).values()
    count = sum(r["photos"] for r in results)
    mean = {None: None} | {m: sum(r[m] * r["photos"] for r in results) / count for pair in COSINES.values() for m in pair if m}
    return {row: {"cosine x2": mean[twice], "cosine x4": mean[four]} for row, (twice, four) in COSINES.items()}


# ---- cost -----------------------------------------------------------------------------------------------------------


def linear_flops(x, weight, *_, **__):
    """FLOPs of oneDNN's linear layer from the shapes of its arguments: torch's counter does not know it."""
    return 2 * prod(x) * weight[0]


def count_macs(run):
    """Multiply-accumulates of run(), half of what torch.utils.flop_counter counts; element-wise work is free.

    The fused attention of CPUs is not counted by it either: the plain one, with as many, takes its place.
    """
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping={onednn: linear_flops}) as counter:
        run()
    return counter.get_total_flops() // 2


def cost(args):
    """MACs, time and memory of the features of one image, as columns."""
    extractor = ViTExtractor.from_args(args)
    up, image = upsampler(args, extractor), torch.rand(1, 3, args.imsize, args.imsize)

    def features():
        return up(image, extractor(image))

    spent = measure(features, extractor.device)
    return {"GMACs": count_macs(features) / 1e9, "ms": spent["ms"], "MiB": spent["peak_mb"]}


def machine(device):
    """Where it ran, in words."""
    if torch.cuda.is_available() and not device.startswith("cpu"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(lines):
    """A Markdown table of {row name: {column: value or None}}."""
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    text = [["", *columns]] + [[name, *(number(line.get(column)) for column in columns)] for name, line in lines.items()]
    text[1:1] = [["---"] + ["---:"] * len(columns)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in text)


def number(value):
    """A figure as text: three decimals below 1, two below 100, else none; nothing for None."""
    return "" if value is None else f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 0}f}"


def measured(model, record):
    """The section of one backbone."""
    versions = ", ".join(f"{name} {version}" for name, version in record["settings"]["versions"].items())
    return f"\n## {model}\n\n    {record['command']}\n\n{record['machine']}; {versions}.\n\n{table(record['rows'])}"


def paper():
    """The paper's table, and the commands that would give each of its rows."""
    columns = ("SPair PCK@.1", "PCK@.05", "DAVIS J&F", "COCO20k CorLoc")
    text = NOT_RUN + table({row: dict(zip(columns, values)) for row, values in PAPER.items()}) + MODULE
    for i, row in enumerate(PAPER):
        given = flags({"model_type": "dino_vits16"} | rows("pretrained/lift_dino_vits16.pth", 224)[row])
        masks = ["DAVIS", "--output_dir", f"paper/{i}"]
        boxes = ["COCO20k", "--dataset", "COCO20k", "--output_dir", f"paper/{i}"]
        lines = [["eval_spair.py", "SPair-71k"], ["eval_davis.py", *masks], ["eval_tokencut.py", *boxes]]
        commands = [shlex.join(["python", script, "--dataroot", *rest, *given]) for script, *rest in lines]
        text += f"\n{row}:\n\n" + "".join(f"    {command}\n" for command in commands)
    return text


# ---- command line ---------------------------------------------------------------------------------------------------


def parser():
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="folder that holds SPair-71k, DAVIS, voc (or VOCdevkit), coco20k, or some of them")
    add("--lift_path", required=True, help="LiFT checkpoint (.pth)")
    add("--imsize", type=int, default=224, help="side of the square input in pixels (default: 224)")
    add("--photos", nargs="+", help="folders of photos for the cosine (default: voc and coco20k of DATAROOT)")
    add("--output", default=str(Path(__file__).with_suffix("")), help="tables, without suffix (default: benchmarks/quality)")
    add("--runs", help="folder to keep masks and boxes in, so that a stopped run goes on (default: a temporary one)")
    add_backbone_args(command)
    return command


def main(args):
    if not any(home(args.dataroot, task) for task in TASKS):
        raise ValueError(f"{args.dataroot} holds none of SPair-71k, DAVIS, voc and coco20k: correct --dataroot")
    given, command = settings(args), shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    backbone = {name: getattr(args, name) for name in BACKBONE}
    args.photos = args.photos or [str(p) for p in (Path(args.dataroot, name) for name in ("voc", "coco20k")) if p.is_dir()]
    lines, commands, everything = {}, [], Path(f"{args.output}.json")
    with tempfile.TemporaryDirectory() as temporary:
        args.runs = args.runs or temporary
        near = cosines(args, backbone, commands) if args.photos else {}
        for name, row in rows(args.lift_path, args.imsize).items():
            spent = cost(Namespace(**NO_LIFT | backbone | row))
            lines[name] = quality(args, name, row, backbone, commands) | near.get(name, {}) | spent
    commands = [text.replace(args.runs, "runs") for text in commands]
    record = {"command": command, "settings": given, "machine": machine(args.device), "rows": lines, "commands": commands}
    records = (json.loads(everything.read_text()) if everything.is_file() else {}) | {args.model_type: record}
    with replacing(everything) as file:
        file.write_text(json.dumps(records, indent=1) + "\n")
    with replacing(f"{args.output}.md") as file:
        file.write_text(ABOUT + "".join(measured(*item) for item in records.items()) + paper())
    print(table(lines))
    print(json.dumps(record))


if __name__ == "__main__":
    parser().run(main)
