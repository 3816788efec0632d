"""LiFT: a small convolutional module that doubles the resolution of a frozen ViT's descriptors.

    lift = load_lift("pretrained/lift_vit_mini16.pth", extractor)
    dense = upsample(lift, images, extractor(images), iterations=2)      # [B, C, 4h, 4w]

Suri et al., "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors",
ECCV 2024 (arXiv 2403.14625).

Notation: B batch, C descriptor channels, p patch size, H W image pixels, h = H/p and w = W/p the
patch grid, t = h*w tokens, R the radius of attention in cells.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import first_line, load_tensors, weights_digest

# ---- tokens and maps ----------------------------------------------------------------------------


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, h*w, C] in row-major order, and their grid (h, w) -> map [B, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(feats: Tensor) -> Tensor:
    """Map [B, C, h, w] -> tokens [B, h*w, C] in row-major order."""
    return feats.flatten(2).transpose(1, 2)


def double(x: Tensor) -> Tensor:
    """Bilinear upsampling of [B, C, h, w] to [B, C, 2h, 2w], corners not aligned."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# ---- the module ---------------------------------------------------------------------------------


def conv_bn_relu(c_in: int, c_out: int, stride: int = 1, bias: bool = True) -> list[nn.Module]:
    """The layers of a 3x3 convolution, its batch norm and a ReLU."""
    convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class ConvLayers(nn.Sequential):
    """Layers of conv_bn_relu, and whatever follows them.

    In eval mode a batch norm is a fixed scale and shift of each channel. It goes into the weights
    of its convolution, which costs next to nothing, instead of over the whole map.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h', w']."""
        if self.training:
            return super().forward(x)
        layers = list(self)
        for number, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                x = conv_with_norm(layer, layers[number + 1], x)
            elif not hasattr(layer, "running_var"):
                x = layer(x)
            # what is left are batch norms: each was applied with the convolution before it
        return x


def conv_with_norm(conv: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """A convolution followed by a batch norm in eval mode, as one convolution."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [c_out]
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each with batch norm and ReLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        layers = conv_bn_relu(c_in, c_out, bias=False) + conv_bn_relu(c_out, c_out, bias=False)
        self.double_conv = ConvLayers(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        return self.double_conv(x)


class Up(nn.Module):
    """Double the grid of a map and fuse it with a finer one."""

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in // 2, 2, stride=2)
        self.conv_1 = DoubleConv(c_in // 2 + c_skip, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, c_in, h, w] and [B, c_skip, 2h, 2w] -> [B, c_out, 2h, 2w]."""
        return self.conv_1(torch.cat([self.up(x), skip], dim=1))


class LiFT(nn.Module):
    """The LiFT module of one backbone, layer and facet (LiFT paper, section 3 and figure 2).

    Two variants are not in the paper. Both add the paper's output, which then starts at zero, to an
    upsampling of the features, so that training learns the correction:

    - `residual`: to the bilinearly doubled features;
    - `attend` = R > 0: to a weighted sum of the (2R+1)^2 coarse features around each fine cell.
      The weights start as those of bilinear upsampling. One more 1x1 convolution, beside the last
      layer and on the same input, adds a learned change to each; it starts at zero too. (UPLiFT's
      local attender, Walmer et al., arXiv 2601.17950, takes a softmax instead.)

    `attend` takes precedence where both are given.

    The paper's module has the reference's state_dict keys. A variant has one entry more, `options`,
    by which load_lift knows it.

    Args:
        in_channels: C.
        patch_size: the backbone's p.
        pre_shape: features may come as tokens [B, h*w, C], as the reference's callers give them.
        post_shape: they are then returned as tokens. A map that comes where tokens may is returned
            as a map.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int = 16,
        pre_shape: bool = True,
        post_shape: bool = True,
        residual: bool = False,
        attend: int = 0,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.pre_shape = pre_shape
        self.post_shape = post_shape
        self.residual = residual
        self.radius = attend

        layers = conv_bn_relu(3, 32, 2) + conv_bn_relu(32, 32, 2)
        if patch_size != 8:
            layers.append(nn.MaxPool2d(2))
        self.image_convs_1 = ConvLayers(*layers)
        self.image_convs_2 = ConvLayers(*conv_bn_relu(32, 32, 2))
        self.up1 = Up(in_channels + 32, 32, in_channels // 2)
        self.outc = nn.Conv2d(in_channels // 2, in_channels, 1)
        if attend:
            self.attend = nn.Conv2d(in_channels // 2, (2 * attend + 1) ** 2, 1)
            start_at_zero(self.attend)
        if residual or attend:
            start_at_zero(self.outc)
            options = torch.tensor([patch_size, int(residual), attend], dtype=torch.float32)
            self.register_buffer("options", options)

    def forward(self, images: Tensor, feats: Tensor) -> Tensor:
        """Double the resolution of an image's features.

        Args:
            images: normalised, [B, 3, H, W].
            feats: [B, C, h, w]; with `pre_shape` tokens [B, h*w, C] too.
        Returns:
            [B, C, 2h, 2w]; with `post_shape`, for tokens, [B, 4*h*w, C].
        Raises:
            ValueError: not h = H/p and w = W/p.
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        # tokens return as tokens and maps as maps; without pre_shape, post_shape alone decides
        as_tokens = self.post_shape
        if self.pre_shape and feats.ndim == 4:
            as_tokens = False
        if self.pre_shape and feats.ndim == 3 and feats.shape[1] == grid[0] * grid[1]:
            feats = tokens_to_map(feats, grid)
        self._check(images, feats, grid)

        if self.patch_size not in (8, 16):
            images = resize_to_cells(images, grid)                   # the path of p = 16
        image_2x = self.image_convs_1(images)                        # [B, 32, 2h, 2w]
        image_1x = self.image_convs_2(image_2x)                      # [B, 32, h, w]
        x = self.up1(torch.cat([feats, image_1x], dim=1), image_2x)  # [B, C//2, 2h, 2w]
        out = self.outc(x)                                           # [B, C, 2h, 2w]
        if self.radius:
            change = self.attend(x)                                  # [B, (2R+1)^2, 2h, 2w]
            out = out + attend(feats, change, self.radius)
        elif self.residual:
            out = out + double(feats)

        if as_tokens:
            return map_to_tokens(out)
        return out

    def _check(self, images: Tensor, feats: Tensor, grid: tuple[int, int]) -> None:
        """Raise ValueError unless the features are those of the patches of the images."""
        p = self.patch_size
        height, width = images.shape[2:]
        if tuple(feats.shape[2:]) != grid:
            given = "x".join(str(size) for size in feats.shape[1:])
            if feats.ndim == 4:
                given = f"{feats.shape[2]}x{feats.shape[3]}"
            raise ValueError(
                f"the feature grid is {given} but an image of {height}x{width} gives "
                f"{grid[0]}x{grid[1]}: resize the image to a multiple of the patch ({p}) and take "
                f"its features at stride {p}"
            )
        if (height, width) != (grid[0] * p, grid[1] * p):
            what = f"an image of {height}x{width} has a side that is no multiple of the patch"
            raise ValueError(f"{what}: resize the image to a multiple of the patch ({p})")


def start_at_zero(layer: Any) -> None:
    """Let a layer give nothing until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def resize_to_cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize images of any patch size to 16 pixels a cell, antialiased.

    In float32: antialiasing does not exist in half precision on a CPU.
    """
    size = (16 * grid[0], 16 * grid[1])
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return resized.to(images.dtype)


def attend(feats: Tensor, change: Tensor, radius: int) -> Tensor:
    """Give every fine cell a weighted sum of the K = (2R+1)^2 coarse features around its parent.

    The parent is the coarse cell that the fine cell is a quarter of. At the border the outermost
    features are repeated.

    Args:
        feats: the coarse features [B, C, h, w].
        change: [B, K, 2h, 2w], what is added to each neighbour's weight in bilinear
            upsampling; neighbours are in row-major order.
    Returns:
        [B, C, 2h, 2w]; where `change` is zero, the features bilinearly doubled.
    """
    height, width = feats.shape[2:]
    size = 2 * radius + 1
    # split each fine axis into the coarse cell and which of its two halves
    change = change.unflatten(3, (width, 2)).unflatten(2, (height, 2))    # [B, K, h, 2, w, 2]
    bilinear = bilinear_weights(radius).to(change.device, change.dtype)   # [K, 2, 2]
    weights = change + bilinear[:, None, :, None, :]
    padded = F.pad(feats, [radius] * 4, mode="replicate")                 # [B, C, h + 2R, w + 2R]

    # channels last: one neighbour after the other is added to all channels of a cell at once, and
    # no tensor of K times the size exists
    padded = padded.permute(0, 2, 3, 1).contiguous()                      # [B, h + 2R, w + 2R, C]
    total = feats.new_zeros(feats.shape[0], height, 2, width, 2, feats.shape[1])
    for number in range(size * size):
        top, left = number // size, number % size
        neighbour = padded[:, top : top + height, None, left : left + width, None]
        total.addcmul_(neighbour, weights[:, number, ..., None])          # [B, h, 2, w, 2, C]
    return total.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)          # [B, C, 2h, 2w]


def bilinear_weights(radius: int) -> Tensor:
    """The weights by which bilinear upsampling makes a cell's four children from its neighbours.

    [(2R+1)^2, 2, 2]: the neighbours in row-major order, then a child's row and column. A child's
    centre lies a quarter of a coarse cell from its parent's. A neighbour's weight falls linearly
    with the distance along each axis, to zero at one cell.
    """
    neighbours = torch.arange(-radius, radius + 1, dtype=torch.float32)
    centres = torch.tensor([-0.25, 0.25])
    distance = (neighbours[:, None] - centres[None, :]).abs()             # [2R+1, 2]
    along = (1 - distance).clamp(min=0)
    both = along[:, None, :, None] * along[None, :, None, :]              # [2R+1, 2R+1, 2, 2]
    return both.flatten(0, 1)


def upsample(
    lift: nn.Module, images: Tensor, feats: Tensor, iterations: int = 1, return_all: bool = False
) -> Any:
    """Apply LiFT several times (LiFT paper, section 3.3).

    Between two steps the current image is doubled bilinearly. Inside, the module's own precision is
    used.

    Args:
        images: normalised, [B, 3, H, W].
        feats: [B, C, h, w].
        iterations: n, 0 or more.
        return_all: return the features after every step, as a list that begins with those given.
    Returns:
        [B, C, 2^n h, 2^n w] float32; with `return_all` the list of n + 1 maps.
    Raises:
        ValueError: `iterations` is negative, or images and features do not fit.
    """
    if iterations < 0:
        raise ValueError(f"{iterations} iterations: pass 0 or more")
    outc: Any = lift.outc
    dtype = outc.weight.dtype
    current = images.to(feats.device, dtype, memory_format=torch.channels_last)
    x = feats.to(dtype, memory_format=torch.channels_last)
    steps = [x]
    for step in range(iterations):
        if step > 0:
            current = double(current)
        x = lift(current, x)
        if return_all:
            steps.append(x)
    if return_all:
        return [step_feats.float() for step_feats in steps]
    return x.float()


# ---- checkpoints --------------------------------------------------------------------------------


class Options(NamedTuple):
    """What changes the forward of a module."""

    patch: int | None = None  # None: the checkpoint does not say
    residual: bool = False
    attend: int = 0


def read_origin(path: str | Path) -> dict[str, Any] | None:
    """What a module was trained for: the dict of `NAME.json`, or `lift.json`, beside it.

    Returns:
        At least backbone, layer and facet; None if there is neither file.
    Raises:
        ValueError: the file is no JSON object with these.
    """
    path = Path(path)
    for beside in (path.with_suffix(".json"), path.with_name("lift.json")):
        if not beside.is_file():
            continue
        try:
            origin = json.loads(beside.read_text())
            for key in ("backbone", "layer", "facet"):
                origin[key]  # raises where it is missing
            return origin
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"{beside} does not say backbone, layer and facet ({error!r})"
            raise ValueError(f"{what}: restore or delete it") from error
    return None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state_dict of a LiFT checkpoint on the CPU, without a `module.` prefix.

    Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no LiFT checkpoint, or its weights are not finite.
    """
    if not Path(path).is_file():
        remedy = "train one with train_lift.py or correct --lift_path"
        raise FileNotFoundError(f"no LiFT checkpoint at {path}: {remedy}")
    remedy = "pass a lift.pth written by train_lift.py"
    loaded = load_tensors(path, remedy, remedy)

    state = {}
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} is not a LiFT checkpoint ({key} is no tensor): {remedy}")
        if not value.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinite weights: {remedy}")
        state[key.removeprefix("module.")] = value
    if "outc.weight" not in state or state["outc.weight"].ndim != 4:
        raise ValueError(f"{path} is not a LiFT checkpoint (no outc.weight): {remedy}")
    return state


def read_options(state: dict[str, Tensor], origin: dict[str, Any]) -> Options:
    """What a checkpoint, or the JSON beside it, says of its module's forward.

    A file without an `options` entry holds the paper's module, or one from before that entry
    existed: such a residual module is known by its JSON alone.
    """
    if "options" in state:
        patch, residual, attend = state["options"].tolist()
        return Options(int(patch), bool(residual), int(attend))
    return Options(origin.get("patch"), bool(origin.get("residual", False)))


def check_origin(origin: dict[str, Any], extractor: Any, path: str | Path) -> None:
    """Refuse a module that was trained for another extractor than this one.

    Other weights under the backbone's name are noted on stderr: fine-tuned ones may be meant.

    Raises:
        ValueError: in one sentence, for another backbone, layer or facet.
    """
    ours = {"backbone": extractor.tag, "layer": extractor.layer, "facet": extractor.facet}
    wrong = []
    for key, value in ours.items():
        if origin[key] != value:
            wrong.append(f"{key} {origin[key]}, not {value}")
    if wrong:
        differences = " and ".join(wrong)
        remedy = "choose the same or another --lift_path"
        raise ValueError(f"{path} was trained for {differences}: {remedy}")
    if origin.get("digest") not in (None, extractor.digest):
        what = f"{path} was trained on other weights of {extractor.name} than these"
        print(f"note: {what} ({origin['digest']}, not {extractor.digest})", file=sys.stderr)


def check_width(state: dict[str, Tensor], extractor: Any, path: str | Path) -> None:
    """Raise ValueError unless module and extractor have one width, and the stride is the patch."""
    width = state["outc.weight"].shape[0]
    if width != extractor.width:
        ours = extractor.width or "as many as there are tokens"
        raise ValueError(
            f"{path} is for descriptors of {width} channels, but {extractor.name} "
            f"{extractor.facet} has {ours}: choose its own backbone or another --lift_path"
        )
    if extractor.step != extractor.patch:
        raise ValueError(
            f"LiFT works on the patch grid, and stride {extractor.step} is finer than the patch "
            f"({extractor.patch}): leave out --stride for LiFT, or --lift_path for a finer stride"
        )


def load_lift(
    path: str | Path, extractor: Any = None, patch_size: int = 16, silent: bool = False
) -> LiFT:
    """Read a LiFT module, frozen and in eval mode, to be used with an extractor.

    It goes to the extractor's device and dtype. If a JSON file beside it tells its origin (see
    read_origin), another backbone, layer or facet is refused; if none does, a line on stderr says
    so.

    Args:
        extractor: a ViTExtractor or MyExtractor; without one only the file is read.
        patch_size: p, where neither extractor nor file tell it.
        silent: keep that line back.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no LiFT checkpoint, or does not fit the extractor.
    """
    state = read_state(path)
    origin = read_origin(path)
    if origin is None and not silent:
        what = f"no JSON beside {path} tells its backbone, layer and facet"
        print(f"note: {what}; taken on trust", file=sys.stderr)
    options = read_options(state, origin or {})
    patch = options.patch or patch_size

    if extractor is not None:
        check_width(state, extractor, path)
        if origin:
            check_origin(origin, extractor, path)
        if options.patch not in (None, extractor.patch):
            what = f"{path} is for patches of {options.patch} pixels, not {extractor.patch}"
            raise ValueError(f"{what}: choose its own backbone or another --lift_path")
        patch = extractor.patch

    width = state["outc.weight"].shape[0]
    try:
        lift = LiFT(width, patch, residual=options.residual, attend=options.attend)
        if options.residual and "options" not in state:
            # a residual module from before that entry existed
            state["options"] = lift.state_dict()["options"]
        lift.load_state_dict(state, strict=True)
    except RuntimeError as error:
        one_line = " ".join(str(error).split())  # torch's own first line names no key
        reason = first_line(one_line)
        raise ValueError(f"{path}: {reason}: pass a lift.pth written by train_lift.py") from error
    if extractor is not None:
        lift = lift.to(extractor.device, extractor.dtype)
    return lift.requires_grad_(False).eval()


# ---- from flags ---------------------------------------------------------------------------------


class Upsampler:
    """Upsample features by LiFT, bilinearly, or not at all.

    A call takes (images, feats [B, C, h, w]) to [B, C, f*h, f*w].

    Attributes: how (none, bilinear or lift), lift (the module or None), iterations, factor (f).
    """

    def __init__(self, how: str, lift: LiFT | None = None, iterations: int = 1):
        self.how = how
        self.lift = lift
        self.iterations = iterations
        self.factor = 2**iterations
        if how == "none":
            self.factor = 1

    def __call__(self, images: Tensor, feats: Tensor) -> Tensor:
        if self.how == "none":
            return feats
        if self.lift is None:
            scale = self.factor
            return F.interpolate(feats, scale_factor=scale, mode="bilinear", align_corners=False)
        return upsample(self.lift, images, feats, self.iterations)

    def facts(self) -> dict[str, Any]:
        """What decides the result, for settings and records."""
        facts: dict[str, Any] = {"upsample": self.how}
        if self.lift is not None:
            facts["lift_digest"] = weights_digest(self.lift)
        return facts


def how_to_upsample(args: argparse.Namespace) -> str:
    """How --upsample, --lift_path and --lift_iter ask to upsample: one of UPSAMPLE.

    Raises:
        ValueError: they contradict each other.
    """
    how = args.upsample
    if how is None and args.lift_path:
        how = "lift"
    elif how is None:
        how = "none"

    if args.lift_iter < 0:
        raise ValueError(f"--lift_iter {args.lift_iter} is negative: pass 0 or more")
    if how == "none" and args.lift_iter > 1:
        what = f"--lift_iter {args.lift_iter} has nothing to repeat"
        raise ValueError(f"{what}: pass --upsample bilinear, or lift with --lift_path FILE")
    if how == "lift" and not args.lift_path:
        raise ValueError("--upsample lift needs a module: pass --lift_path FILE")
    return how


def check_lift_args(args: argparse.Namespace) -> None:
    """Tell what is wrong with the flags of add_lift_args before a backbone is downloaded for them.

    Whether the module fits is known with the backbone only: `upsampler` checks that.

    Raises:
        FileNotFoundError: there is no file at --lift_path.
        ValueError: it is no LiFT checkpoint, or the flags contradict each other.
    """
    how_to_upsample(args)
    if args.lift_path:
        read_state(args.lift_path)


def upsampler(args: argparse.Namespace, extractor: Any) -> Upsampler:
    """The Upsampler that --upsample, --lift_path and --lift_iter ask for.

    Raises:
        FileNotFoundError: there is no file at --lift_path.
        ValueError: the flags contradict each other, or the module does not fit.
    """
    how = how_to_upsample(args)
    lift = None
    if how == "lift":
        lift = load_lift(args.lift_path, extractor)
    return Upsampler(how, lift, args.lift_iter)
