"""Write a backbone with LiFT, or LiFT alone, as an ONNX file, and check it on the spot.

    python export_onnx.py --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16_attend.pth --output features.onnx
    python export_onnx.py --lift_only --lift_path pretrained/lift_vit_mini16_attend.pth \\
        --output lift.onnx

The first file takes images [B, 3, H, W] in 0..1, which it normalises itself, to features
[B, C, 2H/p, 2W/p] float32. The second takes normalised images [B, 3, H, W] and features
[B, C, H/p, W/p] to [B, C, 2H/p, 2W/p]. Both are finer with a larger --lift_iter.

The batch is free. So are the sizes, in multiples of the patch, for LiFT and for the backbones of
the README's table; another backbone's file takes --imsize pixels only. Before a file is put in
place, onnxruntime must give PyTorch's numbers for three batches, which differ in the number of
images and, where sizes are free, in their sizes.

Prints one line of JSON: inputs, outputs, the largest difference, all settings. About half a minute
on two cores. Needs the packages of requirements-dev.txt.
"""

import argparse
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_one_process,
    check_range,
    first_line,
    replacing,
    report,
    settings,
)

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-3  # of the largest feature
REMEDY = "pass another backbone, or --lift_only"  # for what cannot be exported


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--output", required=True, help="the .onnx to write")
    add("--lift_only", action="store_true", help="the module without its backbone")
    add("--imsize", type=int, default=224, help="side where sizes are not free (default: 224)")
    add_backbone_args(command, device="cpu")
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import torch
from torch import Tensor, nn
from torch.export import Dim

from extractor import ViTExtractor, build_extractor, is_named
from lift import (
    LiFT,
    Upsampler,
    check_lift_args,
    load_lift,
    read_options,
    read_origin,
    read_state,
    upsample,
    upsampler,
)

# ---- positions for any size ---------------------------------------------------------------------


def cubic_weights(count: int, native: int, offset: Tensor) -> Tensor:
    """Bicubic interpolation along one axis, from `native` to `count` cells, as a matrix.

    The weights are those of F.interpolate with the scale factor (count + offset) / native. The
    operations are such that `count` stays free in an ONNX file.

    Returns:
        [count, native]: what each old cell adds to each new one.
    """
    cells = torch.arange(count, dtype=torch.float32)
    length = cells[-1] + 1  # `count` as a tensor: the number itself would become a constant
    scale = (length + offset) / native
    place = (cells + 0.5) / scale - 0.5        # [count], the new cells' centres among the old ones
    first = place.floor()                      # the old cell at or before each
    past = place - first                       # and how far behind it, 0..1

    # each new cell takes four old ones, weighed by the cubic convolution kernel with a = -0.75
    weights = torch.zeros(count, native)
    for step in (-1, 0, 1, 2):
        distance = (past - step).abs()
        near = (1.25 * distance - 2.25) * distance**2 + 1                     # up to 1 cell away
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3       # 1 to 2 cells away
        share = torch.where(distance <= 1, near, far)                         # [count]
        source = (first + step).clamp(0, native - 1)  # the border is repeated
        is_source = source[:, None] == torch.arange(native)                   # [count, native]
        weights = weights + share[:, None] * is_source
    return weights


def any_size_positions(
    native: tuple[int, int], patches: Tensor, prefix: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Learned positions for any grid, as extractor.interpolate_positions gives them.

    That function decides by the size whether and how to interpolate. A file whose sizes are free
    must do with one formula.

    Args:
        native: the grid (h0, w0) of the learned positions.
        patches: the learned positions of the patches, [1, h0*w0, D].
        prefix: those of the tokens before them, [1, n, D].
        grid: (h, w).
    Returns:
        The positions of the patches, [1, h*w, D], and `prefix` as it is.
    """
    height, width = grid
    # height and width as tensors: see cubic_weights
    rows = torch.arange(height)[-1] + 1
    columns = torch.arange(width)[-1] + 1

    # DINO's own code interpolates with the scale (n + 0.1) / native, but not at the native size.
    # There an offset of 0 makes the weights below the identity.
    is_native = (rows == native[0]) & (columns == native[1])
    offset = 0.1 * (~is_native).float()

    square = patches.unflatten(1, native)                                 # [1, h0, w0, D]
    vertical = cubic_weights(height, native[0], offset)                   # [h, h0]
    horizontal = cubic_weights(width, native[1], offset)                  # [w, w0]
    resized = torch.einsum("hy,wx,byxd->bhwd", vertical, horizontal, square)
    return resized.flatten(1, 2), prefix


@contextmanager
def free_positions(extractor: ViTExtractor) -> Iterator[None]:
    """A context in which an extractor takes its positions from any_size_positions."""
    native = tuple(extractor.model.patch_embed.grid_size)
    patches, prefix = extractor._positions(native)
    extractor._positions = partial(any_size_positions, native, patches, prefix)
    try:
        yield
    finally:
        del extractor._positions  # which lets the class's own be found again


# ---- what is exported ---------------------------------------------------------------------------


class BackboneWithLiFT(nn.Module):
    """Images [B, 3, H, W] in 0..1 -> the backbone's features, upsampled: [B, C, f*h, f*w]."""

    def __init__(self, extractor: nn.Module, up: Upsampler):
        super().__init__()
        self.extractor = extractor
        self.lift = up.lift
        self.up = up

    def forward(self, images: Tensor) -> Tensor:
        images = self.extractor.normalize(images)
        return self.up(images, self.extractor(images))


class LiFTAlone(nn.Module):
    """Normalised images [B, 3, H, W] and features [B, C, h, w] -> [B, C, 2^n h, 2^n w]."""

    def __init__(self, lift: LiFT, iterations: int):
        super().__init__()
        self.lift = lift
        self.iterations = iterations

    def forward(self, images: Tensor, feats: Tensor) -> Tensor:
        return upsample(self.lift, images, feats, self.iterations)


class Plan(NamedTuple):
    """A module, what may change in its inputs, and inputs to check it with."""

    module: nn.Module
    batches: list[dict[str, Tensor]]  # inputs by name; the first batch is exported with, too
    free: dict[str, dict[int, Any]]   # torch.export's dynamic shapes: {input: {axis: Dim}}
    sizes: str                        # which image sizes the file takes, in words
    facts: dict[str, Any]             # for the JSON line
    exporting: Callable = nullcontext  # makes a context that is entered for the export alone


def random_images(sizes: list[tuple[int, int, int]]) -> list[dict[str, Tensor]]:
    """Batches of images in 0..1, of these (B, H, W)."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count, height, width in sizes:
        batches.append({"images": torch.rand(count, 3, height, width, generator=generator)})
    return batches


def sizes_to_check(patch: int) -> list[tuple[int, int, int]]:
    """(B, H, W) of three batches."""
    return [
        # exported with, so nothing here may be special: no batch of one, not square, and not the
        # native size of a backbone
        (2, 15 * patch, 17 * patch),
        # checked only: one image of the native size, and one more shape
        (1, 14 * patch, 14 * patch),
        (3, 9 * patch, 20 * patch),
    ]


def free_axes() -> tuple[Dim, Dim, Dim]:
    """The axes that the caller of a file may choose: batch, rows and columns of the patch grid."""
    return Dim("batch"), Dim("rows", min=2, max=1024), Dim("columns", min=2, max=1024)


def plan_lift(args: argparse.Namespace) -> Plan:
    """The Plan of --lift_only: LiFT alone.

    Raises:
        FileNotFoundError: there is no file at --lift_path.
        ValueError: it is no LiFT checkpoint, --patch or --channel are not its own, or nothing tells
            its patch.
    """
    if not args.lift_path:
        raise ValueError("--lift_only needs a module: pass --lift_path FILE")
    origin = read_origin(args.lift_path) or {}
    told = read_options(read_state(args.lift_path), origin)
    patch = told.patch or args.patch
    if patch is None:
        what = f"neither {args.lift_path} nor a JSON beside it tells the module's patch"
        raise ValueError(f"{what}: pass --patch 8 or --patch 16")
    lift = load_lift(args.lift_path, patch_size=patch)
    channels = lift.outc.out_channels
    for flag, given, real in (("patch", args.patch, patch), ("channel", args.channel, channels)):
        if given not in (None, real):
            what = f"--{flag} {given}, but {args.lift_path} is for {real}"
            raise ValueError(f"{what}: leave --{flag} out")

    batches = random_images(sizes_to_check(patch))
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        count, _, height, width = batch["images"].shape
        shape = (count, channels, height // patch, width // patch)
        batch["feats"] = torch.randn(shape, generator=generator)

    count, rows, columns = free_axes()
    free = {
        "images": {0: count, 2: patch * rows, 3: patch * columns},
        "feats": {0: count, 2: rows, 3: columns},
    }
    # --model_type is not used here: the JSON line tells the backbone that the module is for
    facts = {"model_type": origin.get("backbone"), "patch": patch, "channel": channels}
    module = LiFTAlone(lift, args.lift_iter).eval()
    return Plan(module, batches, free, "any multiples of the patch", facts)


def plan_both(args: argparse.Namespace) -> Plan:
    """The Plan of a backbone, and of LiFT where there is one.

    Raises:
        ValueError: sizes cannot be free, and --imsize is no multiple of the patch.
    """
    check_lift_args(args)
    extractor = build_extractor(args)
    up = upsampler(args, extractor)
    module = BackboneWithLiFT(extractor, up).eval()
    patch = extractor.patch
    facts = {**extractor.facts(), **up.facts(), "patch": patch, "channel": extractor.width}

    # sizes are free for backbones whose positions any_size_positions is known to give
    count, rows, columns = free_axes()
    known = is_named(extractor.tag) and not args.my_extractor
    if known and extractor.step == patch:
        batches = random_images(sizes_to_check(patch))
        free = {"images": {0: count, 2: patch * rows, 3: patch * columns}}
        sizes = "any multiples of the patch"
        return Plan(module, batches, free, sizes, facts, partial(free_positions, extractor))

    side = args.imsize
    if side % patch:
        raise ValueError(f"--imsize {side} is no multiple of the patch ({patch}): pass one")
    batches = random_images([(2, side, side), (1, side, side), (3, side, side)])
    return Plan(module, batches, {"images": {0: count}}, f"{side}x{side}", facts)


# ---- export and check ---------------------------------------------------------------------------


def require_packages() -> None:
    """Raise ValueError if one of PACKAGES is not installed."""
    for name in PACKAGES:
        try:
            __import__(name)
        except ImportError as error:
            remedy = "pip install -r requirements-dev.txt"
            raise ValueError(f"exporting needs the package {name}: {remedy}") from error


@torch.no_grad()
def write(plan: Plan, path: Path) -> None:
    """Export the module of a plan to an ONNX file.

    Raises:
        ValueError: torch cannot export it, for example as it decides by the values of the images.
    """
    inputs = plan.batches[0]
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it does not optimise
    # before it raises, torch logs the model's whole graph and prints it to stderr
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), plan.exporting():
        warnings.simplefilter("ignore")  # of torch about itself
        try:
            torch.onnx.export(
                plan.module,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=["features"],
                dynamic_shapes=tuple(plan.free.values()),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)  # its own text is general advice
            raise ValueError(f"torch does not export this model ({reason}): {REMEDY}") from error


@torch.no_grad()
def check(plan: Plan, path: Path) -> float:
    """The largest difference of onnxruntime and PyTorch, as a share of the largest feature.

    Raises:
        ValueError: it is over TOLERANCE or NaN, or onnxruntime cannot load or run the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which have no common base
        what = "onnxruntime does not load this model"
        raise ValueError(f"{what} ({first_line(error)}): {REMEDY}") from error

    largest = 0.0
    for inputs in plan.batches:
        wanted = plan.module(*inputs.values())
        shape = list(inputs["images"].shape)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        try:
            (found,) = session.run(None, arrays)
        except Exception as error:
            what = f"onnxruntime does not run this model on images of shape {shape}"
            raise ValueError(f"{what} ({first_line(error)}): {REMEDY}") from error
        worst = (torch.from_numpy(found) - wanted).abs().max()
        difference = (worst / wanted.abs().max()).item()
        # asked before max(), which would drop a NaN; "not <=" is true for NaN, as ">" is not
        if not difference <= TOLERANCE:
            what = f"onnxruntime differs by {difference:.1e} on images of shape {shape}"
            raise ValueError(f"{what}: {REMEDY}")
        largest = max(largest, difference)
    return largest


def main(args: argparse.Namespace) -> None:
    """Export a module, check the file, and only then put it in place."""
    check_range(args, imsize=1, lift_iter=1, patch=1)
    check_one_process()
    if Path(args.output).suffix != ".onnx":
        what = f"--output {args.output} is no ONNX file"
        raise ValueError(f"{what}: give it a name that ends in .onnx")
    if args.dtype != "float32" or args.device not in ("cpu", "auto"):
        raise ValueError("files are made in float32 on the CPU: leave --dtype and --device out")
    args.device = "cpu"  # what auto means here, on a machine with a GPU too
    require_packages()
    if args.lift_only:
        plan = plan_lift(args)
    else:
        plan = plan_both(args)

    with replacing(args.output) as temporary:
        write(plan, temporary)
        difference = check(plan, temporary)

    line = {
        "settings": settings(args, **plan.facts),
        "inputs": list(plan.free),
        "sizes": plan.sizes,
        "checked": [list(inputs["images"].shape) for inputs in plan.batches],
        "difference": difference,
    }
    report(line)


if __name__ == "__main__":
    parser().run(main)
