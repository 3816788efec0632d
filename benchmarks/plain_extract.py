"""Descriptors and LiFT as the reference computes them, and as a user of today would write them.

extractor.py and lift.py must equal both; `python benchmarks/speed.py extract lift` times them.

The reference, `plain_*`: the whole ViT runs, with the softmax spelled out. For a query, key or
value the input of the wanted layer's attention is projected a second time, as the reference's hook
does. Log-binning walks over the positions. LiFT is applied layer by layer.

Of today, `todays_*`: timm's fused forward with one hook, one slice for each neighbour in
log-binning, and LiFT in channels-last memory.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor, nn

from backbones import DTYPES, resolve
from extractor import ViTExtractor, log_bin
from lift import LiFT, upsample

# ---- the reference ------------------------------------------------------------------------------


def plain_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions of a square grid, resized bicubically to another grid.

    Args:
        table: [1, 1 + side^2, D], of CLS and of the patches.
        grid: (h, w).
    Returns:
        [1, 1 + h*w, D]
    """
    cls = table[:, :1]
    patches = table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)     # [1, D, side, side]
    # DINO's own 0.1, against a size that rounding makes one too small; it enters the numbers
    row_scale = (grid[0] + 0.1) / side
    column_scale = (grid[1] + 0.1) / side
    resized = F.interpolate(
        square,
        scale_factor=(row_scale, column_scale),
        mode="bicubic",
        align_corners=False,
        recompute_scale_factor=False,
    )                                                                   # [1, D, h, w]
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def plain_qkv(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values [3, B, heads, T, d] of tokens [B, T, D]."""
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1)     # [B, T, 3, heads, d]
    return qkv.permute(2, 0, 3, 1, 4)


def plain_attention(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention of tokens [B, T, D] and its softmax [B, heads, T, T]."""
    q, k, v = plain_qkv(attn, x)
    weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = weights.softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return attn.proj(out), weights


@torch.no_grad()
def plain_features(model: Any, images: Tensor, layer: int, facet: str, stride: int) -> Tensor:
    """A facet of all tokens at one layer of a timm ViT with one CLS token.

    The layers after it run, too.

    Returns:
        For the facets query, key and value [B, heads, T, d], for `token` [B, 1, T, D], for `attn`
        [B, heads, T, T].
    """
    projection = model.patch_embed.proj
    x = F.conv2d(images, projection.weight, projection.bias, stride=stride)  # [B, D, h, w]
    grid = tuple(x.shape[2:])
    x = x.flatten(2).transpose(1, 2)                                    # [B, h*w, D]
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)       # [B, T, D]
    x = x + plain_positions(model.pos_embed, grid)

    for number, block in enumerate(model.blocks):
        entering = block.norm1(x)
        attended, weights = plain_attention(block.attn, entering)
        x = x + attended
        x = x + block.mlp(block.norm2(x))
        if number == layer:
            if facet == "attn":
                kept = weights
            elif facet == "token":
                kept = x[:, None]
            else:
                index = ("query", "key", "value").index(facet)
                kept = plain_qkv(block.attn, entering)[index]
        del weights  # one softmax at a time, as in the reference
    return kept


def plain_map(model: Any, images: Tensor, layer: int, facet: str, stride: int) -> Tensor:
    """The facet of plain_features as a map [B, C, h, w], without CLS.

    The channels are those of all heads side by side: channel number * heads + head.
    """
    patch = model.patch_embed.proj.kernel_size[0]
    rows = 1 + (images.shape[2] - patch) // stride
    columns = 1 + (images.shape[3] - patch) // stride
    x = plain_features(model, images, layer, facet, stride)[:, :, 1:]   # [B, heads, h*w, d]
    return x.permute(0, 3, 1, 2).reshape(len(images), -1, rows, columns)


def plain_log_bin(feats: Tensor) -> Tensor:
    """Log-binned descriptors [B, h*w, 17*C] of a map [B, C, h, w], position by position.

    The bins of a position are the 3x3 cells around it, and then the 8 cells at distance 3 in a map
    of averages over 3x3 cells. Outside the map the nearest cell stands in.
    """
    batch, channels, height, width = feats.shape
    average = F.avg_pool2d(feats, 3, stride=1, padding=1, count_include_pad=False)
    out = torch.zeros(batch, 17 * channels, height, width)

    for y in range(height):
        for x in range(width):
            first_channel = 0  # of the next bin
            for source, step in ((feats, 1), (average, 3)):
                for i in (y - step, y, y + step):
                    for j in (x - step, x, x + step):
                        if step > 1 and (i, j) == (y, x):
                            continue  # the middle is a bin of the first level only
                        row = min(max(i, 0), height - 1)
                        column = min(max(j, 0), width - 1)
                        end = first_channel + channels
                        out[:, first_channel:end, y, x] = source[:, :, row, column]
                        first_channel = end
    return out.flatten(2).transpose(1, 2)


def plain_norm_relu(x: Tensor, bn: Any) -> Tensor:
    """Batch norm with the running statistics, then ReLU."""
    x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    return x.relu_()


@torch.no_grad()
def plain_lift(lift: Any, images: Tensor, feats: Tensor, iterations: int = 1) -> Tensor:
    """LiFT layer by layer, the images doubled between two applications.

    Args:
        lift: a LiFT of patch 8 or 16, without `attend`.
        images: [B, 3, H, W].
        feats: [B, C, h, w].
    Returns:
        [B, C, 2^n h, 2^n w] after n iterations.
    """
    one = lift.image_convs_1
    two = lift.image_convs_2
    conv = lift.up1.conv_1.double_conv
    for step in range(iterations):
        if step > 0:
            images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)

        # the image at twice the feature grid, and at the grid itself
        x = F.conv2d(images, one[0].weight, one[0].bias, stride=2, padding=1)
        x = plain_norm_relu(x, one[1])                                  # [B, 32, H/2, W/2]
        x = F.conv2d(x, one[3].weight, one[3].bias, stride=2, padding=1)
        image_2x = plain_norm_relu(x, one[4])                           # [B, 32, H/4, W/4]
        if lift.patch_size == 16:
            image_2x = F.max_pool2d(image_2x, 2)                        # [B, 32, 2h, 2w]
        x = F.conv2d(image_2x, two[0].weight, two[0].bias, stride=2, padding=1)
        image_1x = plain_norm_relu(x, two[1])                           # [B, 32, h, w]

        x = torch.cat([feats, image_1x], 1)                             # [B, C + 32, h, w]
        x = F.conv_transpose2d(x, lift.up1.up.weight, lift.up1.up.bias, stride=2)
        x = torch.cat([x, image_2x], 1)                                 # [B, ..., 2h, 2w]
        x = plain_norm_relu(F.conv2d(x, conv[0].weight, padding=1), conv[1])
        x = plain_norm_relu(F.conv2d(x, conv[3].weight, padding=1), conv[4])
        feats = F.conv2d(x, lift.outc.weight, lift.outc.bias)           # [B, C, 2h, 2w]
    return feats


# ---- of today -----------------------------------------------------------------------------------


def todays_map(model: Any, images: Tensor) -> Tensor:
    """Keys [B, C, h, w] of the last block, by timm's own fused forward and one hook."""
    caught = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        caught["qkv"] = output

    attn = model.blocks[-1].attn
    handle = attn.qkv.register_forward_hook(keep)
    model.forward_features(images)
    handle.remove()

    patch = model.patch_embed.proj.kernel_size[0]
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    qkv = caught["qkv"].unflatten(2, (3, attn.num_heads, -1))           # [B, T, 3, heads, d]
    keys = qkv[:, 1:, 1]                                                # [B, t, heads, d]
    return keys.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, grid)    # [B, d * heads, h, w]


def todays_lift(lift: Any, images: Tensor, feats: Tensor, iterations: int = 1) -> Tensor:
    """LiFT on channels-last tensors, which convolutions like best.

    The weights of `lift` should be in that order already, as `lift.to(memory_format=
    torch.channels_last)` makes them: else each convolution reorders them again.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    feats = feats.contiguous(memory_format=torch.channels_last)
    return plain_lift(lift, images, feats, iterations)


def todays_log_bin(feats: Tensor) -> Tensor:
    """Log-binned descriptors [B, h*w, 17*C] of a map [B, C, h, w], one slice for each bin.

    F.unfold would take ten times as long.
    """
    height, width = feats.shape[2:]
    average = F.avg_pool2d(feats, 3, stride=1, padding=1, count_include_pad=False)
    bins = []
    for source, step in ((feats, 1), (average, 3)):
        padded = F.pad(source, [step] * 4, mode="replicate")
        for top in (0, step, 2 * step):
            for left in (0, step, 2 * step):
                if step > 1 and (top, left) == (step, step):
                    continue  # the middle is a bin of the first level only
                bins.append(padded[:, :, top : top + height, left : left + width])
    return torch.cat(bins, 1).flatten(2).transpose(1, 2)                # [B, t, 17 * C]


# ---- what benchmarks/speed.py times -------------------------------------------------------------


def build(name: str, size: int, dtype: str) -> tuple[Any, ViTExtractor, LiFT]:
    """Make one random ViT twice, for the baselines and for us, and a random LiFT.

    The ViT of the baselines is made for images of one size. It gets the positions that the
    extractor interpolates, so that both give the same numbers.

    Returns:
        The ViT of timm; the ViTExtractor, in `dtype`; the LiFT.
    """
    torch.manual_seed(0)
    tag = resolve(name).tag
    native = timm.create_model(tag, num_classes=0).eval()
    vit = timm.create_model(tag, num_classes=0, img_size=size).eval()

    # the weights of `native`, its positions resized
    state = native.state_dict()
    patch = native.patch_embed.patch_size[0]
    grid = (size // patch, size // patch)
    state["pos_embed"] = plain_positions(state["pos_embed"], grid)
    vit.load_state_dict(state)

    ours = ViTExtractor(name, stride=None, model=native, device="cpu", dtype=dtype)
    lift = LiFT(ours.channels, ours.patch).eval().requires_grad_(False)
    lift.fold()  # as load_lift does; the baselines do not use what it keeps
    return vit.requires_grad_(False), ours, lift


def setup_lifted(name: str, size: int, dtype: str) -> tuple[Callable[[], Tensor], ...]:
    """Eight random images through a ViT and LiFT. The reference knows float32 only.

    Returns:
        The three callables of a Case.
    """
    vit, extractor, lift = build(name, size, dtype)
    images = torch.randn(8, 3, size, size)
    patch = extractor.patch
    precision = DTYPES[dtype]
    cast_vit = copy.deepcopy(vit).to(precision)
    cast_lift = copy.deepcopy(lift).to(precision, memory_format=torch.channels_last)

    def reference() -> Tensor:
        feats = plain_map(vit, images, extractor.layer, "key", patch)
        return plain_lift(lift, images, feats)

    @torch.inference_mode()
    def ours() -> Tensor:
        return upsample(cast_lift, images, extractor(images))

    @torch.inference_mode()
    def today() -> Tensor:
        cast_images = images.to(precision)
        feats = todays_map(cast_vit, cast_images)
        return todays_lift(cast_lift, cast_images, feats).float()

    return reference, ours, today


def setup_iterated(iterations: int, dtype: str) -> tuple[Callable[[], Tensor], ...]:
    """LiFT alone, several times, on random features of one random image of 224 pixels."""
    torch.manual_seed(0)
    patch = 16
    lift = LiFT(384, patch).eval().requires_grad_(False)
    lift.fold()
    images = torch.randn(1, 3, 224, 224)
    feats = torch.randn(1, 384, 224 // patch, 224 // patch)
    precision = DTYPES[dtype]
    cast_lift = copy.deepcopy(lift).to(precision, memory_format=torch.channels_last)

    def reference() -> Tensor:
        return plain_lift(lift, images, feats, iterations)

    @torch.inference_mode()
    def ours() -> Tensor:
        return upsample(cast_lift, images, feats, iterations)

    @torch.inference_mode()
    def today() -> Tensor:
        cast_images = images.to(precision)
        cast_feats = feats.to(precision)
        return todays_lift(cast_lift, cast_images, cast_feats, iterations).float()

    return reference, ours, today


def setup_log_bin() -> tuple[Callable[[], Tensor], ...]:
    """One map of 28x28 cells, in the memory order in which a backbone gives it."""
    torch.manual_seed(0)
    feats = torch.randn(1, 28 * 28, 384).transpose(1, 2).unflatten(2, (28, 28))
    return (
        partial(plain_log_bin, feats),
        partial(log_bin, feats),
        partial(todays_log_bin, feats),
    )


def close(baseline: Tensor, ours: Tensor, tolerance: float = 1e-4) -> None:
    """Assert that the two differ by at most `tolerance` times the baseline's largest value."""
    largest = float(baseline.abs().max())
    torch.testing.assert_close(ours, baseline, rtol=0, atol=tolerance * largest)


def lifted_case(what: str, name: str, size: int, dtype: str, target: float) -> Case:
    """The line of the speed table for a ViT with LiFT, batch 8."""
    title = f"extract: {what} + LiFT at {size}, batch 8"
    same = close
    if dtype == "bfloat16":
        title += ", bfloat16"
        same = partial(close, tolerance=0.1)
    setup = partial(setup_lifted, name, size, dtype)
    return Case(title, target, setup, same, memory=1.0, dtype=dtype)


def iterated_case(dtype: str, target: float) -> Case:
    """The line of the speed table for LiFT applied four times."""
    title = "lift: four times, 14x14 to 224x224 cells"
    same = close
    if dtype == "bfloat16":
        title += ", bfloat16"
        same = partial(close, tolerance=0.1)
    return Case(title, target, partial(setup_iterated, 4, dtype), same, memory=1.0, dtype=dtype)


CASES = [
    lifted_case("S/16", "dino_vits16", 224, "float32", 1.15),
    lifted_case("S/8", "dino_vits8", 224, "float32", 1.5),
    lifted_case("B/16", "dino_vitb16", 224, "float32", 1.15),
    lifted_case("S/16", "dino_vits16", 448, "float32", 1.5),
    lifted_case("S/16", "dino_vits16", 224, "bfloat16", 3.0),
    lifted_case("S/8", "dino_vits8", 224, "bfloat16", 3.0),
    iterated_case("float32", 1.6),
    iterated_case("bfloat16", 1.6),
    Case("extract: log-bin at 28x28", 50.0, setup_log_bin, close, memory=1.0),
]
