"""Write a backbone with LiFT, or LiFT alone, as an ONNX file, and check it on the spot.

    python export_onnx.py --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16_attend.pth --output features.onnx
    python export_onnx.py --lift_only --lift_path pretrained/lift_vit_mini16_attend.pth \\
        --output lift.onnx

The first file takes images [B, 3, H, W] in 0..1, which it normalises itself, to features
[B, C, 2H/p, 2W/p] float32. The second takes normalised images [B, 3, H, W] and features
[B, C, H/p, W/p] to [B, C, 2H/p, 2W/p]. Both are finer with a larger --lift_iter.

The batch is free. So are the sizes, in multiples of the patch, unless --imsize sets one or the
backbone or upsampler is your own. onnxruntime refuses images of any other size. Before a file is
put in place, onnxruntime must give PyTorch's numbers for three batches of different length and,
where sizes are free, of different sizes.

Takes about half a minute on two cores. Needs the packages in requirements-dev.txt.
"""

import argparse
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from importlib.util import find_spec
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
FREE = "any multiples of the patch"


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--output", required=True, metavar="FILE", help="the .onnx to write")
    add("--lift_only", action="store_true", help="the module without its backbone")
    add(
        "--imsize", type=int, nargs="+", metavar="PIXELS",
        help="one size for all images, a side or H W, in multiples of the patch (default: sizes "
        "are free; 224 with a network of your own)",
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

    Each row of [count, native] holds what the old cells add to a new one: the weights of
    F.interpolate with the scale factor (count + offset) / native. `count` stays free in a file.
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
    how: str, native: tuple[int, int], patches: Tensor, prefix: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Learned positions for any grid, as ViTExtractor._positions gives them, but in one formula.

    That method decides by the size how to interpolate, which a file with free sizes cannot.

    Args:
        how: "dino" or "timm", whose code resamples them.
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
    """The images as they are; but onnxruntime fails here where a side is not in whole patches.

    Without this it would silently drop the pixels that are left over.
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
    """A module to export, what may change in its inputs, and inputs to check it with."""

    module: nn.Module
    batches: list[dict[str, Tensor]]   # inputs by name; the export itself takes the first batch
    free: dict[str, dict[int, Any]]    # torch.export's dynamic shapes: {input: {axis: Dim}}
    sizes: str                         # which image sizes the file takes, in words
    facts: dict[str, Any]              # for the settings
    exporting: Callable = nullcontext  # makes a context for the export alone


def random_images(patch: int, imsize: tuple[int, int] | None) -> list[dict[str, Tensor]]:
    """Three batches of images in 0..1, of one size (H, W) or, where it is None, of three."""
    # nothing may be special in the first, with which the file is exported: more than one image, not
    # square, and not a backbone's native size, which the second has
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
    """The Plan of --lift_only: LiFT alone. ValueError for flags that do not fit it."""
    if not args.lift_path or args.imsize:
        needs = "pass --lift_path FILE, and leave --imsize out"
        raise ValueError(f"--lift_only exports one module, for any size: {needs}")
    file = read_lift(args.lift_path)
    patch = file.patch or args.patch
    if patch is None:
        what = f"neither {args.lift_path} nor a JSON beside it says the module's patch"
        raise ValueError(f"{what}: pass --patch 8 or --patch 16")
    # --model_type is not used here: the settings name the backbone that the module is for
    facts = {"model_type": file.facts.get("backbone"), "patch": patch, "channel": file.channels}
    for flag in ("patch", "channel"):
        given = getattr(args, flag)
        if given not in (None, facts[flag]):
            what = f"--{flag} {given}, but {args.lift_path} is for {facts[flag]}"
            raise ValueError(f"{what}: leave --{flag} out")

    batches = random_images(patch, None)
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        count, _, height, width = batch["images"].shape
        shape = (count, file.channels, height // patch, width // patch)
        batch["feats"] = torch.randn(shape, generator=generator)
    module = LiFTAlone(load_lift(file, patch_size=patch), args.lift_iter)
    return Plan(module.eval(), batches, free_axes(patch, None), FREE, facts)


def plan_whole(args: argparse.Namespace) -> Plan:
    """The Plan of a backbone, and of what upsamples its features."""
    imsize = read_imsize(args.imsize)
    # somebody's own network shows its patch on a square, of which build_features takes the side
    side = min(imsize or IMSIZE)
    features = build_features(argparse.Namespace(**{**vars(args), "imsize": side}))

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


@contextmanager
def telling(what: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """Turn such errors inside into a ValueError of one line that begins with `what`."""
    try:
        yield
    except errors as error:
        reason = first_line(error.__cause__ or error)  # torch.onnx's own text is general advice
        raise ValueError(f"{what} ({reason}): pass another backbone, or --lift_only") from error


@torch.no_grad()
def write(plan: Plan, path: Path) -> None:
    """Export the module of a plan to an ONNX file. ValueError if torch cannot do it."""
    inputs = plan.batches[0]
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs what it does not optimise
    # before it raises, torch logs the model's whole graph and prints it to stderr
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), plan.exporting():
        warnings.simplefilter("ignore")  # torch's about itself
        with telling("torch does not export this model", torch.onnx.OnnxExporterError):
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


@torch.no_grad()
def check(plan: Plan, path: Path) -> float:
    """The largest difference of onnxruntime and PyTorch, as a share of the largest feature.

    Raises:
        ValueError: it is over TOLERANCE or NaN, or onnxruntime cannot load or run the file.
    """
    import onnxruntime

    with telling("onnxruntime does not load this model"):  # its errors have no common base
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    largest = 0.0
    for inputs in plan.batches:
        wanted = plan.module(*inputs.values())
        arrays = {name: value.numpy() for name, value in inputs.items()}
        on_images = f"on images of shape {list(inputs['images'].shape)}"
        with telling(f"onnxruntime does not run this model {on_images}"):
            (found,) = session.run(None, arrays)
        worst = (torch.from_numpy(found) - wanted).abs().max()
        difference = (worst / wanted.abs().max()).item()
        # asked before max(), which would drop a NaN; "not <=" is true for NaN, as ">" is not
        if not difference <= TOLERANCE:
            what = f"onnxruntime differs by {difference:.1e} {on_images}"
            raise ValueError(f"{what}: pass another backbone, or --lift_only")
        largest = max(largest, difference)
    return largest


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong whatever the backbone and the module are."""
    check_range(args, lift_iter=1, patch=1)
    check_one_process()
    wrong = ""
    missing = [name for name in PACKAGES if not find_spec(name)]
    if args.dtype != "float32" or args.device not in ("cpu", "auto"):
        wrong = "files are made in float32 on the CPU: leave --dtype and --device out"
    elif missing:
        remedy = "pip install -r requirements-dev.txt"
        wrong = f"exporting needs the packages {', '.join(missing)}: {remedy}"
    if wrong:
        raise ValueError(wrong)
    args.device = "cpu"  # what auto means here, on a machine with a GPU too


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
