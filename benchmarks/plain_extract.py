"""Descriptors and LiFT as the reference computes them, and as a user of today would write them.

extractor.py and lift.py must equal both; `python benchmarks/speed.py extract lift` times them.

The reference, `plain_*`: the whole ViT runs with the softmax spelled out; what enters the attention
of the wanted layer is projected again for the facet, as its hook does it; log-binning walks over
the positions; LiFT is applied layer by layer.

Of today, `todays_*`: timm's fused forward with one hook, unfold for the surroundings, and LiFT in
channels-last memory.
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

from extractor import DTYPES, ViTExtractor, log_bin, resolve
from lift import LiFT, upsample

# ---- the reference ------------------------------------------------------------------------------


def plain_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions [1, 1 + N, D] for a grid: bicubic with scale factor (n + 0.1)/sqrt(N)."""
    cls = table[:, :1]
    patches = table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        square,
        scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side),
        mode="bicubic",
        align_corners=False,
        recompute_scale_factor=False,
    )
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def plain_qkv(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of tokens [B, T, D]: [3, B, heads, T, d]."""
    batch, tokens, _ = x.shape
    return attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def plain_attention(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention of tokens [B, T, D] and its softmax [B, heads, T, T]."""
    q, k, v = plain_qkv(attn, x)
    weights = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = weights.softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return attn.proj(out), weights


@torch.no_grad()
def plain_features(
    model: Any, images: Tensor, layer: int, facet: str, stride: int
) -> Tensor:
    """A facet of all tokens of a plain timm ViT with one CLS token, which runs to its end.

    Returns:
        [B, heads, T, d]; of `token` [B, 1, T, D], of `attn` [B, heads, T, T].
    """
    projection = model.patch_embed.proj
    x = F.conv2d(images, projection.weight, projection.bias, stride=stride)
    grid = tuple(x.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
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
    """The same as a map [B, C, h, w] without CLS, head_dim-major (channel = d * heads + head)."""
    patch = model.patch_embed.proj.kernel_size[0]
    rows = 1 + (images.shape[2] - patch) // stride
    columns = 1 + (images.shape[3] - patch) // stride
    x = plain_features(model, images, layer, facet, stride)[:, :, 1:]
    return x.permute(0, 3, 1, 2).reshape(len(images), -1, rows, columns)


def plain_log_bin(feats: Tensor, hierarchy: int = 2) -> Tensor:
    """Log-binned descriptors [B, h*w, 17*C] of a map [B, C, h, w], position by position."""
    batch, channels, height, width = feats.shape
    out = torch.zeros(batch, 17 * channels, height, width)
    pooled = []
    for level in range(hierarchy):
        side = 3**level
        average = F.avg_pool2d(feats, side, 1, side // 2, count_include_pad=False)
        pooled.append(average)

    for y in range(height):
        for x in range(width):
            part = 0
            for level in range(hierarchy):
                step = 3**level
                for i in (y - step, y, y + step):
                    for j in (x - step, x, x + step):
                        if level > 0 and (i, j) == (y, x):
                            continue
                        row = min(max(i, 0), height - 1)
                        column = min(max(j, 0), width - 1)
                        neighbour = pooled[level][:, :, row, column]
                        out[:, part * channels : (part + 1) * channels, y, x] = neighbour
                        part += 1
    return out.flatten(2).transpose(1, 2)


def plain_norm(x: Tensor, bn: Any) -> Tensor:
    """Batch norm with the running statistics, then ReLU."""
    x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    return x.relu_()


@torch.no_grad()
def plain_lift(lift: Any, images: Tensor, feats: Tensor, iterations: int = 1) -> Tensor:
    """LiFT layer by layer, the current image doubled between two applications."""
    one = lift.image_convs_1
    two = lift.image_convs_2
    conv = lift.up1.conv_1.double_conv
    for step in range(iterations):
        if step > 0:
            images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        x = plain_norm(F.conv2d(images, one[0].weight, one[0].bias, 2, 1), one[1])
        x = plain_norm(F.conv2d(x, one[3].weight, one[3].bias, 2, 1), one[4])
        image_2x = x
        if lift.patch_size == 16:
            image_2x = F.max_pool2d(x, 2)
        image_1x = plain_norm(F.conv2d(image_2x, two[0].weight, two[0].bias, 2, 1), two[1])

        x = torch.cat([feats, image_1x], 1)
        x = F.conv_transpose2d(x, lift.up1.up.weight, lift.up1.up.bias, 2)
        x = torch.cat([x, image_2x], 1)
        x = plain_norm(F.conv2d(x, conv[0].weight, None, 1, 1), conv[1])
        x = plain_norm(F.conv2d(x, conv[3].weight, None, 1, 1), conv[4])
        feats = F.conv2d(x, lift.outc.weight, lift.outc.bias)
    return feats


# ---- of today -----------------------------------------------------------------------------------


def todays_map(model: Any, images: Tensor) -> Tensor:
    """Keys of the last block [B, C, h, w] by timm's own fused forward and one hook."""
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
    """LiFT on channels-last tensors, which convolutions like best; the module is so already."""
    images = images.contiguous(memory_format=torch.channels_last)
    feats = feats.contiguous(memory_format=torch.channels_last)
    return plain_lift(lift, images, feats, iterations)


def todays_log_bin(feats: Tensor, hierarchy: int = 2) -> Tensor:
    """Log-binned descriptors [B, h*w, 17*C] of a map [B, C, h, w] by unfold."""
    channels = feats.shape[1]
    bins = []
    for level in range(hierarchy):
        step = 3**level
        pooled = F.avg_pool2d(feats, step, 1, step // 2, count_include_pad=False)
        padded = F.pad(pooled, [step] * 4, mode="replicate")
        around = F.unfold(padded, 3, dilation=step).unflatten(1, (channels, 9))  # [B, C, 9, t]
        if level > 0:
            around = torch.cat([around[:, :, :4], around[:, :, 5:]], 2)
        bins.append(around)
    return torch.cat(bins, 2).permute(0, 3, 2, 1).flatten(2)


# ---- what benchmarks/speed.py times -------------------------------------------------------------


def build(name: str, size: int, dtype: str) -> tuple[Any, ViTExtractor, LiFT]:
    """A random ViT of timm for images of one size, the same as a ViTExtractor, and a random LiFT.

    The ViT of timm gets the extractor's positions, so that both give the same numbers.
    """
    torch.manual_seed(0)
    tag = resolve(name).tag
    native = timm.create_model(tag, num_classes=0).eval()
    vit = timm.create_model(tag, num_classes=0, img_size=size).eval()
    state = native.state_dict()
    patch = native.patch_embed.patch_size[0]
    grid = (size // patch, size // patch)
    state["pos_embed"] = plain_positions(state["pos_embed"], grid)
    vit.load_state_dict(state)

    ours = ViTExtractor(name, stride=None, model=native, device="cpu", dtype=dtype)
    lift = LiFT(ours.width, ours.patch).eval().requires_grad_(False)
    return vit.requires_grad_(False), ours, lift


def setup_lifted(name: str, size: int, dtype: str) -> tuple[Callable[[], Tensor], ...]:
    """Eight random images through a ViT and LiFT. The reference knows float32 only."""
    vit, extractor, lift = build(name, size, dtype)
    images = torch.randn(8, 3, size, size)
    patch = extractor.patch
    precision = DTYPES[dtype]
    low_vit = copy.deepcopy(vit).to(precision)
    low_lift = copy.deepcopy(lift).to(precision, memory_format=torch.channels_last)

    def reference() -> Tensor:
        return plain_lift(lift, images, plain_map(vit, images, extractor.layer, "key", patch))

    @torch.inference_mode()
    def ours() -> Tensor:
        return upsample(low_lift, images, extractor(images))

    @torch.inference_mode()
    def today() -> Tensor:
        low_images = images.to(precision)
        return todays_lift(low_lift, low_images, todays_map(low_vit, low_images)).float()

    return reference, ours, today


def setup_iterated(iterations: int, dtype: str) -> tuple[Callable[[], Tensor], ...]:
    """LiFT alone, several times, on the features of one photo of 224 pixels."""
    torch.manual_seed(0)
    patch = 16
    lift = LiFT(384, patch).eval().requires_grad_(False)
    images = torch.randn(1, 3, 224, 224)
    feats = torch.randn(1, 384, 224 // patch, 224 // patch)
    precision = DTYPES[dtype]
    low_lift = copy.deepcopy(lift).to(precision, memory_format=torch.channels_last)

    def reference() -> Tensor:
        return plain_lift(lift, images, feats, iterations)

    @torch.inference_mode()
    def ours() -> Tensor:
        return upsample(low_lift, images, feats, iterations)

    @torch.inference_mode()
    def today() -> Tensor:
        low_feats = feats.to(precision)
        return todays_lift(low_lift, images.to(precision), low_feats, iterations).float()

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
    """The two agree within a share of the largest value."""
    largest = float(baseline.abs().max())
    torch.testing.assert_close(ours, baseline, rtol=0, atol=tolerance * largest)


def lifted_case(what: str, name: str, size: int, dtype: str, target: float) -> Case:
    """A line for a ViT with LiFT, batch 8."""
    title = f"extract: {what} + LiFT at {size}, batch 8"
    same = close
    if dtype == "bfloat16":
        title += ", bfloat16"
        same = partial(close, tolerance=0.1)
    return Case(title, target, partial(setup_lifted, name, size, dtype), same, 1.0, dtype)


def iterated_case(dtype: str, target: float) -> Case:
    """A line for LiFT applied four times."""
    title = "lift: four times, 14x14 to 224x224 cells"
    same = close
    if dtype == "bfloat16":
        title += ", bfloat16"
        same = partial(close, tolerance=0.1)
    return Case(title, target, partial(setup_iterated, 4, dtype), same, 1.0, dtype)


CASES = [
    lifted_case("S/16", "dino_vits16", 224, "float32", 1.15),
    lifted_case("S/8", "dino_vits8", 224, "float32", 1.5),
    lifted_case("B/16", "dino_vitb16", 224, "float32", 1.15),
    lifted_case("S/16", "dino_vits16", 448, "float32", 1.5),
    lifted_case("S/16", "dino_vits16", 224, "bfloat16", 3.0),
    lifted_case("S/8", "dino_vits8", 224, "bfloat16", 3.0),
    iterated_case("float32", 1.6),
    iterated_case("bfloat16", 1.6),
    Case("extract: log-bin at 28x28", 50.0, setup_log_bin, close, 1.0),
]
