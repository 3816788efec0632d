"""LiFT: a small convolutional module that doubles the resolution of a frozen ViT's dense descriptors.

    lift = load_lift("pretrained/lift_vit_mini16.pth", extractor)
    dense = upsample(lift, images, extractor(images), iterations=2)      # [B, C, 4h, 4w]

Suri et al., "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors", ECCV 2024 (arXiv 2403.14625).

Notation: B batch, C descriptor channels, p patch size, H W image pixels, h = H/p and w = W/p the patch grid, t = h*w tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

UPSAMPLE = ("none", "bilinear", "lift")


# ---- tokens and maps ------------------------------------------------------------------------------------------------


def tokens_to_map(tokens, grid):
    """Tokens [B, h*w, C] in row-major order, and their grid (h, w) -> map [B, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(feats):
    """Map [B, C, h, w] -> tokens [B, h*w, C] in row-major order."""
    return feats.flatten(2).transpose(1, 2)


def double(x):
    """Bilinear upsampling of [B, C, h, w] to [B, C, 2h, 2w], corners not aligned."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# ---- the module -----------------------------------------------------------------------------------------------------


def conv_bn_relu(c_in, c_out, stride=1, bias=True):
    """The layers of a 3x3 convolution, its batch norm and a ReLU, as a list."""
    return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each with batch norm and ReLU: [B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.double_conv = nn.Sequential(*conv_bn_relu(c_in, c_out, bias=False), *conv_bn_relu(c_out, c_out, bias=False))

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    """Double the grid of `x` [B, c_in, h, w] and fuse it with `skip` [B, c_skip, 2h, 2w] -> [B, c_out, 2h, 2w]."""

    def __init__(self, c_in, c_skip, c_out):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in // 2, 2, stride=2)
        self.conv_1 = DoubleConv(c_in // 2 + c_skip, c_out)

    def forward(self, x, skip):
        return self.conv_1(torch.cat([self.up(x), skip], dim=1))


class LiFT(nn.Module):
    """The LiFT module of one backbone, layer and facet (LiFT paper, section 3 and figure 2).

    `in_channels` is C, `patch_size` the backbone's p. With `pre_shape` features come as tokens [B, h*w, C], with
    `post_shape` they are returned as tokens. With `residual` (not in the paper) the bilinearly doubled features are
    added to the output and the last layer starts at zero: an untrained module is bilinear upsampling, and training
    learns the correction. All variants have the same state_dict keys.
    """

    def __init__(self, in_channels, patch_size=16, pre_shape=False, post_shape=False, residual=False):
        super().__init__()
        self.patch_size, self.pre_shape, self.post_shape, self.residual = patch_size, pre_shape, post_shape, residual
        pool = [] if patch_size == 8 else [nn.MaxPool2d(2)]
        self.image_convs_1 = nn.Sequential(*conv_bn_relu(3, 32, 2), *conv_bn_relu(32, 32, 2), *pool)
        self.image_convs_2 = nn.Sequential(*conv_bn_relu(32, 32, 2))
        self.up1 = Up(in_channels + 32, 32, in_channels // 2)
        self.outc = nn.Conv2d(in_channels // 2, in_channels, 1)
        if residual:
            nn.init.zeros_(self.outc.weight)
            nn.init.zeros_(self.outc.bias)

    def forward(self, images, feats):
        """Normalised images [B, 3, H, W] and their features [B, C, h, w] -> features [B, C, 2h, 2w].

        Raises ValueError unless h = H/p and w = W/p.
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if self.pre_shape and feats.shape[1] == grid[0] * grid[1]:
            feats = tokens_to_map(feats, grid)
        self._check(images, feats, grid)
        if self.patch_size not in (8, 16):  # any other patch takes the path of p = 16, on an image of 16 pixels a cell
            images = F.interpolate(images, size=(16 * grid[0], 16 * grid[1]), mode="bilinear", antialias=True)
        image_2x = self.image_convs_1(images)                        # [B, 32, 2h, 2w]
        image_1x = self.image_convs_2(image_2x)                      # [B, 32, h, w]
        x = self.up1(torch.cat([feats, image_1x], dim=1), image_2x)  # [B, C//2, 2h, 2w]
        x = self.outc(x)                                             # [B, C, 2h, 2w]
        if self.residual:
            x = x + double(feats)
        return map_to_tokens(x) if self.post_shape else x

    def _check(self, images, feats, grid):
        p, size = self.patch_size, tuple(images.shape[2:])
        if size != (grid[0] * p, grid[1] * p) or tuple(feats.shape[2:]) != grid:
            given = "x".join(map(str, feats.shape[2:] if feats.ndim == 4 else feats.shape[1:]))
            raise ValueError(
                f"the feature grid is {given} but an image of {size[0]}x{size[1]} gives {grid[0]}x{grid[1]}: resize the image "
                f"to a multiple of the patch ({p}) and take its features at stride {p}"
            )


def upsample(lift, images, feats, iterations=1, return_all=False):
    """Apply LiFT `iterations` times (LiFT paper, section 3.3): features [B, C, h, w] -> [B, C, 2^n h, 2^n w], float32.

    Between two steps the current image [B, 3, H, W] is doubled bilinearly. The module's own precision is used inside.
    With `return_all` the features after every step are returned, as a list that begins with those given.
    """
    as_lift = {"device": feats.device, "dtype": lift.outc.weight.dtype, "memory_format": torch.channels_last}
    images, steps = images.to(**as_lift), [feats.to(**as_lift)]
    for step in range(iterations):
        images = double(images) if step else images
        steps.append(lift(images, steps[-1] if return_all else steps.pop()))
    return [x.float() for x in steps] if return_all else steps[-1].float()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def read_origin(path):
    """What the module in `path` was trained for: the dict of `NAME.json`, or `lift.json`, beside it; None if neither is there.

    Raises ValueError if that file is no JSON object.
    """
    path = Path(path)
    beside = next((f for f in (path.with_suffix(".json"), path.with_name("lift.json")) if f.is_file()), None)
    if beside is None:
        return None
    try:
        origin = json.loads(beside.read_text())
        return {key: origin[key] for key in ("backbone", "layer", "facet")} | origin
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{beside} does not say backbone, layer and facet ({error!r}): restore or delete it") from error


def read_state(path):
    """The state_dict of a LiFT checkpoint on the CPU, without a `module.` prefix. Never executes what the file holds.

    Raises ValueError for a file that is no checkpoint of tensors, FileNotFoundError for a missing one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no LiFT checkpoint at {path}: train one with train_lift.py or correct --lift_path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not all(isinstance(value, torch.Tensor) for value in state.values()) or "outc.weight" not in state:
            raise TypeError("no tensor outc.weight, or entries that are no tensors")
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("NaN or infinite weights")
        return state
    except Exception as error:  # damaged files raise nearly anything
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:150]
        raise ValueError(f"{path} is not a LiFT checkpoint ({reason}): pass a lift.pth written by train_lift.py") from error


def check_origin(origin, extractor, path):
    """Raise ValueError, in one sentence, if a module with this origin does not belong to the extractor."""
    ours = {"backbone": extractor.tag, "layer": extractor.layer, "facet": extractor.facet}
    wrong = [f"{key} {origin[key]}, not {value}" for key, value in ours.items() if origin[key] != value]
    if wrong:
        raise ValueError(f"{path} was trained for {' and '.join(wrong)}: choose the same or another --lift_path")


def check_width(state, extractor, path):
    """Raise ValueError if the module's width or the extractor's stride makes the two unusable together."""
    width = state["outc.weight"].shape[0]
    if width != extractor.width:
        ours = extractor.width or "as many as there are tokens"
        raise ValueError(
            f"{path} is for descriptors of {width} channels, but {extractor.name} {extractor.facet} has {ours}: "
            "choose its own backbone or another --lift_path"
        )
    if extractor.stride != extractor.patch:
        raise ValueError(
            f"LiFT works on the patch grid, and stride {extractor.stride} is finer than the patch ({extractor.patch}): "
            "leave out --stride for LiFT, or --lift_path for a finer stride"
        )


def load_lift(path, extractor=None, patch_size=16, silent=False):
    """Read the LiFT module at `path` for `extractor` (a ViTExtractor), in eval mode, on its device and in its precision.

    The width is read from the file; a `module.` prefix is stripped; the file is loaded on the CPU with weights only. If a
    JSON file beside it tells the module's origin (see read_origin), another backbone, layer or facet is refused; if none
    does, a line on stderr says so (unless `silent`). Without an extractor only the file is read, and `patch_size` holds
    unless the JSON tells.
    Raises ValueError or FileNotFoundError in one sentence.
    """
    state, origin = read_state(path), read_origin(path)
    if origin is None and not silent:
        print(f"note: no JSON beside {path} tells its backbone, layer and facet; taken on trust", file=sys.stderr)
    if extractor is not None:
        check_width(state, extractor, path)
        if origin:
            check_origin(origin, extractor, path)
    origin = origin or {}
    patch_size = extractor.patch if extractor is not None else origin.get("patch", patch_size)
    lift = LiFT(state["outc.weight"].shape[0], patch_size, residual=bool(origin.get("residual", False)))
    try:
        lift.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}: pass a lift.pth written by train_lift.py") from error
    if extractor is not None:
        lift = lift.to(extractor.device, extractor.dtype)
    return lift.requires_grad_(False).eval()


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_lift_args(parser):
    """Add --lift_path, --lift_iter and --upsample to an argparse parser; `upsampler` reads them."""
    group = parser.add_argument_group("LiFT")
    group.add_argument("--lift_path", help="LiFT checkpoint (.pth); without it the backbone's own features are used")
    group.add_argument("--lift_iter", type=int, default=1, help="how often the resolution is doubled (default: 1)")
    group.add_argument("--upsample", choices=UPSAMPLE, help="how it is doubled (default: lift with --lift_path, else none)")


class Upsampler:
    """(images, feats [B, C, h, w]) -> [B, C, f*h, f*w] by nothing, bilinear interpolation or LiFT; f is `factor`."""

    def __init__(self, how, lift=None, iterations=1):
        self.how, self.lift, self.iterations = how, lift, iterations
        self.factor = 1 if how == "none" else 2**iterations

    def __call__(self, images, feats):
        if self.how == "lift":
            return upsample(self.lift, images, feats, self.iterations)
        if self.how == "bilinear":
            return F.interpolate(feats, scale_factor=self.factor, mode="bilinear", align_corners=False)
        return feats


def upsampler(args, extractor):
    """The Upsampler that --upsample, --lift_path and --lift_iter ask for. Raises ValueError where they contradict."""
    how = args.upsample or ("lift" if args.lift_path else "none")
    if args.lift_iter < 0:
        raise ValueError(f"--lift_iter {args.lift_iter} is negative: pass 0 or more")
    if how == "lift" and not args.lift_path:
        raise ValueError("--upsample lift needs a module: pass --lift_path FILE")
    lift = load_lift(args.lift_path, extractor) if how == "lift" else None
    return Upsampler(how, lift, args.lift_iter)


# ---- pictures -------------------------------------------------------------------------------------------------------


def pca_rgb(maps):
    """Show maps of one image in common colours: their first three principal components as RGB.

    `maps` is a list of tensors [C, h_i, w_i] with one C. One basis is fitted on the L2-normalised cells of all maps, each map
    weighing the same, so that a colour means the same in every picture. Returns a list of uint8 arrays [h_i, w_i, 3].
    """
    cells = [F.normalize(m.detach().cpu().float().flatten(1).t(), dim=1) for m in maps]  # [h*w, C] each
    mean = torch.stack([c.mean(0) for c in cells]).mean(0)
    covariance = sum((c - mean).t() @ (c - mean) / len(c) for c in cells)  # [C, C]
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)  # [C, 3], the strongest first
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # a sign that does not depend on the solver
    colours = [((c - mean) @ basis).numpy() for c in cells]
    spans = np.array([np.percentile(c, (1, 99), axis=0) for c in colours])  # [maps, 2, 3]; the finest map must not decide alone
    low, high = spans[:, 0].min(0), spans[:, 1].max(0)
    scaled = [255 * np.clip((c - low) / np.maximum(high - low, 1e-9), 0, 1) for c in colours]
    return [c.round().astype(np.uint8).reshape(*m.shape[1:], 3) for c, m in zip(scaled, maps)]
