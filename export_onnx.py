"""Write a backbone with LiFT, or LiFT alone, as an ONNX file, and check it on the spot.

    python export_onnx.py --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16_attend.pth --output features.onnx
    python export_onnx.py --lift_only --lift_path pretrained/lift_vit_mini16_attend.pth \\
        --output lift.onnx

The first file takes images [B, 3, H, W] in 0..1, which it normalises itself, to features
[B, C, 2H/p, 2W/p] float32. The second takes normalised images [B, 3, H, W] and features
[B, C, H/p, W/p] to [B, C, 2H/p, 2W/p]. Both are finer with a larger --lift_iter.

The batch is free. So are the sizes, in multiples of the patch, unless --imsize asks for one size or
the backbone or upsampler is your own. onnxruntime refuses images of any other size. Before a file
is put in place, onnxruntime must give PyTorch's numbers for three batches, which differ in the
number of images and, where sizes are free, in their sizes.

Takes about half a minute on two cores. Needs the packages of requirements-dev.txt.
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
    report,
    settings,
)
from files import first_line, replacing

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-3  # of the largest feature
IMSIZE = (224, 224)  # for what cannot have free sizes, where --imsize is left out
REMEDY = "pass another backbone, or --lift_only"  # for what cannot be exported


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--output", required=True, metavar="FILE", help="the .onnx to write")
    add("--lift_only", action="store_true", help="the module without its backbone")
    add(
        "--imsize", type=int, nargs="+", metavar="PIXELS",
        help="one size for all images, a side or H W, in multiples of the patch (default: sizes "
        "are free; with a network of your own 224)",
    )  # fmt: skip
    add_backbone_args(command, device="cpu")
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import torch
from torch import Tensor, nn
from torch.export import Dim

from extractor import ViTExtractor
from features import HOW, Features, build_features
from lift import LiFT, load_lift, read_lift, upsample

# ---- positions for any size ---------------------------------------------------------------------


def cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel, which is zero from a distance of 2 on."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1            # up to 1 cell away
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, far * (distance < 2))


def dino_weights(count: int, native: int, offset: Tensor) -> Tensor:
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

    # each new cell takes four old ones
    weights = torch.zeros(count, native)
    for step in (-1, 0, 1, 2):
        share = cubic((place - first - step).abs(), a=-0.75)                  # [count]
        source = (first + step).clamp(0, native - 1)  # the border is repeated
        is_source = source[:, None] == torch.arange(native)                   # [count, native]
        weights = weights + share[:, None] * is_source
    return weights


def timm_weights(count: int, native: int) -> Tensor:
    """The same for F.interpolate to `count` cells with antialiasing, as timm resamples positions.

    Where cells become fewer, each takes as many more of the old ones; the border is cut off.
    """
    cells = torch.arange(count, dtype=torch.float32)
    scale = native / (cells[-1] + 1)
    place = (cells + 0.5) * scale - 0.5                                       # [count]
    distance = (torch.arange(native) - place[:, None]).abs()                  # [count, native]
    weights = cubic(distance / scale.clamp(min=1), a=-0.5)
    return weights / weights.sum(1, keepdim=True)


def any_size_positions(
    how: str,
    native: tuple[int, int],
    patches: Tensor,
    prefix: Tensor,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Learned positions for any grid, as ViTExtractor._positions gives them.

    That function decides by the size whether and how to interpolate. A file whose sizes are free
    must do with one formula.

    Args:
        how: they are resampled, as "dino" or "timm" does it.
        native: the grid (h0, w0) of the learned positions.
        patches: the learned positions of the patches, [1, h0*w0, D].
        prefix: those of the tokens before them, [1, n, D].
        grid: (h, w).
    Returns:
        The positions of the patches, [1, h*w, D], and `prefix` as it is.
    """
    height, width = grid
    if how == "timm":
        vertical = timm_weights(height, native[0])                        # [h, h0]
        horizontal = timm_weights(width, native[1])                       # [w, w0]
    else:
        # DINO's own code interpolates with the scale (n + 0.1) / native, but not at the native
        # size. There an offset of 0 makes the weights the identity.
        rows = torch.arange(height)[-1] + 1  # as tensors: see dino_weights
        columns = torch.arange(width)[-1] + 1
        is_native = (rows == native[0]) & (columns == native[1])
        offset = 0.1 * (~is_native).float()
        vertical = dino_weights(height, native[0], offset)
        horizontal = dino_weights(width, native[1], offset)

    square = patches.unflatten(1, native)                                 # [1, h0, w0, D]
    resized = torch.einsum("hy,wx,byxd->bhwd", vertical, horizontal, square)
    return resized.flatten(1, 2), prefix


@contextmanager
def free_positions(extractor: ViTExtractor) -> Iterator[None]:
    """A context in which an extractor takes its positions from any_size_positions."""
    if getattr(extractor.model, "pos_embed", None) is None:  # they are rotary, for any grid
        yield
        return
    native: Any = tuple(extractor.model.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
    patches, prefix = extractor._positions(native)
    extractor._positions = partial(  # type: ignore[method-assign]
        any_size_positions, extractor.positions, native, patches, prefix
    )
    try:
        yield
    finally:
        del extractor._positions  # which lets the class's own be found again


# ---- what is exported ---------------------------------------------------------------------------


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """The images as they are. In a file, onnxruntime stops here where a side has another size.

    Without this it would drop the pixels that fill no patch, without a word.
    """
    cells = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))    # [B, 3, h, p, w, p]
    return cells.flatten(4, 5).flatten(2, 3)


class Whole(nn.Module):
    """Images [B, 3, H, W] in 0..1 -> the features, upsampled: [B, C, f*h, f*w]."""

    def __init__(self, features: Features):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(whole_patches(images, self.features.patch))


class LiFTAlone(nn.Module):
    """Normalised images [B, 3, H, W] and features [B, C, h, w] -> [B, C, 2^n h, 2^n w]."""

    def __init__(self, lift: LiFT, iterations: int):
        super().__init__()
        self.lift = lift
        self.iterations = iterations

    def forward(self, images: Tensor, feats: Tensor) -> Tensor:
        images = whole_patches(images, self.lift.patch_size)
        return upsample(self.lift, images, feats, self.iterations)


class Plan(NamedTuple):
    """A module, what may change in its inputs, and inputs to check it with."""

    module: nn.Module
    batches: list[dict[str, Tensor]]  # inputs by name; the first batch is exported with, too
    free: dict[str, dict[int, Any]]   # torch.export's dynamic shapes: {input: {axis: Dim}}
    sizes: str                        # which image sizes the file takes, in words
    facts: dict[str, Any]             # for the settings
    exporting: Callable = nullcontext  # makes a context that is entered for the export alone


FREE = "any multiples of the patch"


def random_images(patch: int, imsize: tuple[int, int] | None) -> list[dict[str, Tensor]]:
    """Three batches of images in 0..1, of one size (H, W) or, where it is None, of three."""
    # the first is exported with, so nothing in it may be special: no batch of one, not square, and
    # not the native size of a backbone; the others are one image of the native size and another one
    sizes = [(15 * patch, 17 * patch), (14 * patch, 14 * patch), (9 * patch, 20 * patch)]
    if imsize is not None:
        sizes = [imsize] * 3
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count, (height, width) in zip((2, 1, 3), sizes):
        batches.append({"images": torch.rand(count, 3, height, width, generator=generator)})
    return batches


def free_axes(patch: int, imsize: tuple[int, int] | None) -> dict[str, dict[int, Any]]:
    """The axes of images and feats that the caller of a file may choose: {input: {axis: Dim}}."""
    count = Dim("batch")
    if imsize is not None:
        return {"images": {0: count}, "feats": {0: count}}
    rows = Dim("rows", min=2, max=1024)
    columns = Dim("columns", min=2, max=1024)
    return {
        "images": {0: count, 2: patch * rows, 3: patch * columns},
        "feats": {0: count, 2: rows, 3: columns},
    }


def plan_lift(args: argparse.Namespace) -> Plan:
    """The Plan of --lift_only: LiFT alone.

    Raises:
        FileNotFoundError: there is no file at --lift_path.
        ValueError: it is not a LiFT checkpoint, --patch or --channel are not its own, or nothing
            tells its patch.
    """
    if not args.lift_path:
        raise ValueError("--lift_only needs a module: pass --lift_path FILE")
    if args.imsize:
        raise ValueError("sizes are always free with --lift_only: leave --imsize out")
    file = read_lift(args.lift_path)
    patch = file.patch or args.patch
    if patch is None:
        what = f"neither {args.lift_path} nor a JSON beside it tells the module's patch"
        raise ValueError(f"{what}: pass --patch 8 or --patch 16")
    for flag, given, real in (
        ("patch", args.patch, patch),
        ("channel", args.channel, file.channels),
    ):
        if given not in (None, real):
            what = f"--{flag} {given}, but {args.lift_path} is for {real}"
            raise ValueError(f"{what}: leave --{flag} out")

    batches = random_images(patch, None)
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        count, _, height, width = batch["images"].shape
        shape = (count, file.channels, height // patch, width // patch)
        batch["feats"] = torch.randn(shape, generator=generator)

    # --model_type is not used here: the settings name the backbone that the module is for
    facts = {
        "model_type": file.facts.get("backbone"),
        "patch": patch,
        "channel": file.channels,
    }
    module = LiFTAlone(load_lift(file, patch_size=patch), args.lift_iter)
    return Plan(module.eval(), batches, free_axes(patch, None), FREE, facts)


def plan_whole(args: argparse.Namespace) -> Plan:
    """The Plan of a backbone, and of what upsamples its features.

    Raises:
        ValueError: something does not fit, or --imsize is not a multiple of the patch.
    """
    imsize = read_imsize(args.imsize)
    args.imsize = min(imsize or IMSIZE)  # by which the patch of somebody's own network is found
    features = build_features(args)
    args.imsize = imsize

    backbone = features.backbone
    exporting: Callable = nullcontext
    if imsize is None and isinstance(backbone, ViTExtractor) and args.upsample in (None, *HOW):
        exporting = partial(free_positions, backbone)
        sizes = FREE
    else:
        imsize = imsize or IMSIZE
        features.check_size(*imsize)
        sizes = f"{imsize[0]}x{imsize[1]}"

    facts = {**features.facts(), "patch": features.patch, "channel": features.channels}
    free = {"images": free_axes(features.patch, imsize)["images"]}
    batches = random_images(features.patch, imsize)
    return Plan(Whole(features).eval(), batches, free, sizes, facts, exporting)


def read_imsize(sides: list[int] | None) -> tuple[int, int] | None:
    """The size (H, W) of --imsize, which has one number or two; None where it is left out."""
    if sides is None:
        return None
    if len(sides) > 2 or min(sides) < 1:
        given = " ".join(str(side) for side in sides)
        raise ValueError(f"--imsize {given}: pass one side or H W, in pixels")
    return sides[0], sides[-1]


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


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong whatever the backbone and the module are."""
    check_range(args, lift_iter=1, patch=1)
    check_one_process()
    if Path(args.output).suffix != ".onnx":
        what = f"--output {args.output} does not have the name of an ONNX file"
        raise ValueError(f"{what}: give it a name that ends in .onnx")
    if args.dtype != "float32" or args.device not in ("cpu", "auto"):
        raise ValueError("files are made in float32 on the CPU: leave --dtype and --device out")
    args.device = "cpu"  # what auto means here, on a machine with a GPU too
    require_packages()


def main(args: argparse.Namespace) -> None:
    """Export a module, check the file, and only then put it in place."""
    check_flags(args)
    plan = plan_lift(args) if args.lift_only else plan_whole(args)
    with replacing(args.output) as temporary:
        write(plan, temporary)
        difference = check(plan, temporary)

    inputs = " and ".join(plan.free)
    print(f"{args.output} takes {inputs}, any number at once; image sizes: {plan.sizes}")
    print(f"onnxruntime gives PyTorch's features, to {difference:.1e} of the largest")
    results = {
        "settings": settings(args, **plan.facts),
        "inputs": list(plan.free),
        "sizes": plan.sizes,
        "checked": [list(batch["images"].shape) for batch in plan.batches],
        "difference": difference,
    }
    report(args, results)


if __name__ == "__main__":
    parser().run(main)
