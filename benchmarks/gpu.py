"""A card against the CPU: are its numbers the same, and how fast is it?

    python benchmarks/gpu.py [--device cuda] [--markdown gpu.md] [--json gpu.json]

The numbers are the golden descriptors, and the scores of four evaluations with vit_mini16 and its
LiFT. If one differs by more than its bound, the exit status is 1. They need the data in ../shared,
or in $LIFT_SHARED; what is not there is left out. On a card single ties fall the other way and
sums have another order, so the bounds of scores are wider than that of descriptors.

Speed is that of ViT-S and one LiFT, in float32 without TF32, in bfloat16, and compiled with CUDA
graphs: the median of blocks of ten calls, of one on a CPU. Training is the step alone, with photos
on the card. DAVIS is all from the frame as a tensor to its labels at 854x480, without files.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from command import Command, check_range, note, progress, report, settings, skipped
from files import first_line, write_text


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--imsize", type=int, default=224, help="pixels a side; training has twice (default: 224)")
    add("--batch_size", type=int, default=128, help="images in a call (default: 128)")
    add("--seconds", type=float, default=3, help="how long each figure is timed (default: 3)")
    add("--no_compile", action="store_true", help="leave out what has to be compiled, minutes")
    add("--markdown", help="write the tables to this file")
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import cell, processor, rule_image, rule_state, shared_data, shared_folder, table
from torch import Tensor

import eval_davis
import eval_segmentation
import eval_spair
import eval_tokencut
from backbones import pick_device, resolve, use_full_float32
from extractor import ViTExtractor
from features import Features, Lifted
from lift import LiFT, LiFTFile, load_lift, map_to_tokens, upsample
from objectives import prepare, train_step

SHIPPED = [
    "--model_type", "vit_mini16",
    "--backbone_path", str(ROOT / "pretrained/vit_mini16.safetensors"),
    "--lift_path", str(ROOT / "pretrained/lift_vit_mini16.pth"),
]  # fmt: skip
FRAME = (854, 480)  # (W, H) of a mask of DAVIS


class Evaluation(NamedTuple):
    """A score that the CPU and the card must agree on."""

    name: str
    script: Any
    data: str                     # its folder in the shared data
    flags: list[str]
    where: tuple[str, ...]        # of the score in the script's JSON
    factor: float                 # that makes it percent
    bound: float                  # of the difference, in points


EVALUATIONS = [
    Evaluation(
        "DAVIS J&F", eval_davis, "DAVIS", ["--sequences", "libby"],
        ("results", "J&F-Mean"), 100, 0.5,
    ),
    Evaluation(
        "SPair PCK@.1", eval_spair, "SPair-71k", ["--pairs_per_category", "0"],
        ("results", "mean", "pck@0.1"), 1, 1,
    ),
    Evaluation(  # three of 60 photos
        "VOC12 CorLoc", eval_tokencut, "voc", ["--dataset", "VOC12", "--set", "trainval"],
        ("results", "corloc"), 1, 5,
    ),
    Evaluation(  # the probe is short, and of the smallest split
        "CamVid mIoU", eval_segmentation, "CamVid",
        ["--dataset", "camvid", "--train_split", "val", "--split", "val", "--epochs", "2"],
        ("results", "miou"), 1, 0.5,
    ),
]  # fmt: skip


# ---- equal numbers ------------------------------------------------------------------------------


@cache
def rule_vit(name: str) -> Any:
    """The golden cases' ViT of a row of BACKBONES; to be copied, as an extractor changes it."""
    model = timm.create_model(resolve(name).tag, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(rule_state(model))
    return model


def rule_lift(vit: ViTExtractor) -> LiFT:
    """The golden cases' LiFT, as load_lift makes it of a file."""
    state = rule_state(LiFT(vit.channels, vit.patch))
    file = LiFTFile(Path("golden rule"), state, {}, vit.patch, attend=0, heads=1)
    return load_lift(file, vit, silent=True)


def golden_descriptors(facts: dict[str, Any], device: torch.device) -> Tensor:
    """What a case of golden/descriptors.json asks for, computed on a device: [t, C] on the CPU."""
    name, stride = facts["model_type"], facts.get("stride")
    of_case = {"layer": facts["layer"], "facet": facts["facet"]}
    vit = ViTExtractor(name, stride, copy.deepcopy(rule_vit(name)), device, **of_case)
    images = rule_image(*facts["size"], 0).to(device)
    what = facts.get("what")
    if what == "saliency":
        found = vit.extract_saliency_maps(images)[..., None]
    elif facts.get("lift"):
        feats = upsample(rule_lift(vit), images, vit(images), facts.get("iters", 1))
        found = map_to_tokens(feats)
    else:
        found = vit.extract_descriptors(images, bin=what == "bin", include_cls=what == "cls")[0]
    return found[0].cpu()


def descriptors_row(device: torch.device) -> dict[str, Any]:
    """The largest difference of all golden descriptors, as a share of their largest value.

    Raises:
        FileNotFoundError: they are not there.
    """
    folder = shared_folder("golden")
    values = np.load(folder / "descriptors.npz")
    largest = 0.0
    for number, facts in enumerate(json.loads((folder / "descriptors.json").read_text())):
        tokens = golden_descriptors(facts, device)
        wanted = torch.from_numpy(values[f"{number:02d}_values"])
        found = tokens[values[f"{number:02d}_tokens"]].reshape(wanted.shape)
        largest = max(largest, float((found - wanted).abs().max()) / facts["absmax"])
    return row_of_numbers("golden descriptors, of the largest value", 0.0, largest, 1e-4)


def row_of_numbers(name: str, cpu: float, card: float, bound: float) -> dict[str, Any]:
    """A row of the first table."""
    row = {"number": name, "CPU": cpu, "device": card, "difference": abs(card - cpu)}
    return {**row, "bound": bound, "equal": abs(card - cpu) <= bound}


def evaluate(evaluation: Evaluation, imsize: int, device: torch.device) -> float:
    """The score of one evaluation on a device; what the script prints is dropped.

    Raises:
        FileNotFoundError: its data are not there.
    """
    script = evaluation.script
    data = ["--dataroot", str(shared_data(evaluation.data)), *evaluation.flags]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "results.json")
        flags = ["--imsize", str(imsize), "--device", str(device), "--json", str(file)]
        flags += ["--output_dir", folder]
        script.main(script.parser().parse_args([*data, *SHIPPED, *flags]))
        found = json.loads(file.read_text())
    for key in evaluation.where:
        found = found[key]
    return evaluation.factor * found


def numbers(imsize: int, device: torch.device) -> list[dict[str, Any]]:
    """The rows of the first table."""
    rows = []
    try:
        rows.append(descriptors_row(device))
    except FileNotFoundError as error:
        skipped("golden descriptors", first_line(error))
    for evaluation in progress(EVALUATIONS, unit="evaluation"):
        try:
            on_cpu = evaluate(evaluation, imsize, torch.device("cpu"))
            on_device = evaluate(evaluation, imsize, device)
        except FileNotFoundError as error:
            skipped(evaluation.name, first_line(error))
            continue
        rows.append(row_of_numbers(evaluation.name, on_cpu, on_device, evaluation.bound))
    return rows


# ---- speed --------------------------------------------------------------------------------------


def build(patch: int, device: torch.device, dtype: str) -> Features:
    """ViT-S and one LiFT."""
    name = f"dino_vits{patch}"
    extractor = ViTExtractor(name, None, copy.deepcopy(rule_vit(name)), device, dtype=dtype)
    return Features(extractor, Lifted(rule_lift(extractor), extractor))


def wait(device: torch.device) -> None:
    """Wait until a card has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How long a call takes, the median of blocks of calls that fill `seconds`, three at least."""
    calls = 1 if device.type == "cpu" else 10
    for _ in range(3):  # to warm up, to compile, and to record CUDA graphs
        call()
    wait(device)
    times: list[float] = []
    while len(times) < 3 or calls * sum(times) < seconds:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


class Work(NamedTuple):
    """Something that is timed."""

    what: str
    function: Callable
    arguments: tuple[Any, ...]
    count: int | None = None      # images in a call, for a figure per second; None for ms
    asked: str = ""


def extraction(args: argparse.Namespace, device: torch.device, dtype: str) -> list[Work]:
    """Backbone and LiFT, and LiFT alone."""
    features: Any = build(16, device, dtype)
    size, count = args.imsize, args.batch_size
    images = torch.rand(count, 3, size, size, device=device)
    image = images[:1].clone()
    of_lift = (features.upsampler.lift, image, features.backbone(image))
    return [
        Work(f"S/16 + LiFT at {size}, batch {count}", features, (images,), count),
        Work(f"S/16 + LiFT at {size}, batch 1", features, (image,)),
        Work(f"LiFT alone at {size}, batch 1", upsample, of_lift, asked="0.3"),
    ]


def training(args: argparse.Namespace, device: torch.device, dtype: str, compiled: bool) -> Work:
    """A step of training on photos that are on the device already."""
    extractor = build(16, device, dtype).backbone
    lift = LiFT(extractor.channels, 16, pre_shape=False, post_shape=False).to(device)
    model, precision = prepare(lift, extractor, "cosine", compiled=compiled)
    adam = torch.optim.AdamW(lift.parameters(), lr=1e-3, weight_decay=0)
    batch = {"broken": torch.full([args.batch_size], -1)}
    for level, name in enumerate(("full", "half", "quarter")):
        side = 2 * args.imsize // 2**level
        shape = (args.batch_size, 3, side, side)
        batch[name] = torch.randint(256, shape, dtype=torch.uint8, device=device)
    what = f"training S/16 at {2 * args.imsize}, batch {args.batch_size}"
    arguments = (model, batch, extractor, adam, precision)
    return Work(what, train_step, arguments, args.batch_size, "3,000")


def video(patch: int, size: int, device: torch.device, dtype: str) -> Work:
    """As many frames as eval_davis.py takes at once, and their labels from a context of eight."""
    features = build(patch, device, dtype)
    frames = torch.rand(eval_davis.BATCH, 3, size, size)

    def cells_of(images: Tensor) -> Tensor:
        return F.normalize(features(images), dim=1).permute(0, 2, 3, 1).contiguous()

    context = []
    for cells in cells_of(torch.rand(8, 3, size, size)):                   # [h, w, C]
        votes = torch.rand(*cells.shape[:2], 2, device=device).softmax(2)  # [h, w, n]
        context.append((cells, votes))

    def propagate() -> None:
        for cells in cells_of(frames):
            soft = eval_davis.transfer(cells, context, 12, 5)
            eval_davis.harden(soft.permute(2, 0, 1), patch, FRAME)

    side = 2 * size // patch
    return Work(f"DAVIS, S/{patch} + LiFT ({side}x{side})", propagate, (), len(frames))


def speeds(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of the second table."""
    rows = []
    for how in ("float32", "bfloat16", "bfloat16, compiled"):
        dtype, _, compiled = how.partition(", ")
        if compiled and args.no_compile:
            continue
        works = [*extraction(args, device, dtype), training(args, device, dtype, bool(compiled))]
        if not compiled:
            works += [video(patch, args.imsize, device, dtype) for patch in (16, 8)]
        for work in works:
            function = work.function
            if compiled and function is not train_step:  # its parts are compiled already
                function = torch.compile(function, mode="reduce-overhead")
            took = seconds_of(partial(function, *work.arguments), device, args.seconds)
            value, unit = 1000 * took, "ms"
            if work.count:
                value, unit = work.count / took, "a second"
            print(f"{work.what}, {how}: {cell(value)} {unit}", file=sys.stderr, flush=True)
            row = {"what": work.what, "how": how, "value": value, "unit": unit}
            rows.append({**row, "asked": work.asked})
    return rows


# ---- the command --------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Compare, time, and write the tables."""
    check_range(args, imsize=16, batch_size=1, seconds=0)
    use_full_float32()
    device = pick_device(args.device)
    card = processor()
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    if device.type == "cpu":
        note("there is no card here, or it is not to be used: the CPU is compared with itself")

    equal = numbers(args.imsize, device)
    fast = speeds(args, device)
    about = f"`device` is {card}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    text = f"{about}.\n\n{table(equal)}\n{table(fast)}"
    print(text)
    if args.markdown:
        write_text(args.markdown, text)
    report(args, {"settings": settings(args, card=card), "numbers": equal, "speed": fast})
    if not all(row["equal"] for row in equal):
        sys.exit(1)


if __name__ == "__main__":
    parser().run(main)
