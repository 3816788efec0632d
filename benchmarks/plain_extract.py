"""Descriptors and LiFT as one writes them first: the slow, obvious version that extractor.py and lift.py must equal.

The whole ViT runs with the softmax spelled out, hooks keep the qkv product of the wanted layer, which is computed again for
the facet; log-binning walks over the positions; LiFT is applied layer by layer. `python benchmarks/speed.py extract` times
the two beside each other.
"""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from case import Case

from extractor import ViTExtractor, log_bin, resolve
from lift import LiFT, upsample


def plain_positions(table, grid):
    """Learned positions [1, 1 + N, D] for a grid: bicubic with scale factor (n + 0.1)/sqrt(N), CLS apart."""
    cls, patches = table[:, :1], table[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    square = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    return torch.cat([cls, square.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def plain_attention(attn, x, keep):
    """Self-attention of tokens [B, T, D] with explicit softmax; its input and its softmax go into the dict `keep`."""
    b, t, d = x.shape
    q, k, v = attn.qkv(x).reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(2, 3)) * (d // attn.num_heads) ** -0.5).softmax(-1)
    keep.update(input=x, attn=weights)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


@torch.no_grad()
def plain_features(model, images, layer, facet, stride):
    """Tokens [B, heads, T, d] (one head for `token`) of a whole forward of a plain timm ViT with one CLS token."""
    proj = model.patch_embed.proj
    x = F.conv2d(images, proj.weight, proj.bias, stride=stride)
    grid = tuple(x.shape[2:])
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x, keeps = x + plain_positions(model.pos_embed, grid), []
    for block in model.blocks:
        keeps.append({})
        x = x + plain_attention(block.attn, block.norm1(x), keeps[-1])
        x = x + block.mlp(block.norm2(x))
        keeps[-1]["token"] = x
    keep, attn = keeps[layer], model.blocks[layer].attn
    if facet in ("attn", "token"):
        return keep["attn"] if facet == "attn" else keep["token"][:, None]
    b, t, _ = keep["input"].shape
    qkv = attn.qkv(keep["input"]).reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return qkv[("query", "key", "value").index(facet)]


def plain_map(model, images, layer, facet, stride):
    """Map [B, C, h, w] of the same, head_dim-major (channel = d * heads + head)."""
    p = model.patch_embed.proj.kernel_size[0]
    grid = [1 + (side - p) // stride for side in images.shape[2:]]
    x = plain_features(model, images, layer, facet, stride)[:, :, 1:]
    return x.permute(0, 3, 1, 2).reshape(len(images), -1, *grid)


def plain_log_bin(feats, hierarchy=2):
    """Log-binned descriptors [B, h*w, 17*C] of a map [B, C, h, w], position by position."""
    b, c, h, w = feats.shape
    out = torch.zeros(b, 17 * c, h, w)
    pooled = [F.avg_pool2d(feats, 3**k, 1, 3**k // 2, count_include_pad=False) for k in range(hierarchy)]
    for y in range(h):
        for x in range(w):
            part = 0
            for k in range(hierarchy):
                for i in (y - 3**k, y, y + 3**k):
                    for j in (x - 3**k, x, x + 3**k):
                        if (i, j) == (y, x) and k:
                            continue
                        i_in, j_in = min(max(i, 0), h - 1), min(max(j, 0), w - 1)
                        out[:, part * c : (part + 1) * c, y, x] = pooled[k][:, :, i_in, j_in]
                        part += 1
    return out.flatten(2).transpose(1, 2)


def plain_norm(x, bn):
    """Batch norm with the running statistics, then ReLU."""
    shape = (1, -1, 1, 1)
    x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
    return (x * bn.weight.view(shape) + bn.bias.view(shape)).relu()


@torch.no_grad()
def plain_lift(lift, images, feats, iterations=1):
    """LiFT layer by layer, the current image doubled between two applications."""
    one, two, conv = lift.image_convs_1, lift.image_convs_2, lift.up1.conv_1.double_conv
    for step in range(iterations):
        if step:
            images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        x = plain_norm(F.conv2d(images, one[0].weight, one[0].bias, 2, 1), one[1])
        x = plain_norm(F.conv2d(x, one[3].weight, one[3].bias, 2, 1), one[4])
        image_2x = F.max_pool2d(x, 2) if lift.patch_size == 16 else x
        image_1x = plain_norm(F.conv2d(image_2x, two[0].weight, two[0].bias, 2, 1), two[1])
        x = F.conv_transpose2d(torch.cat([feats, image_1x], 1), lift.up1.up.weight, lift.up1.up.bias, 2)
        x = torch.cat([x, image_2x], 1)
        x = plain_norm(F.conv2d(x, conv[0].weight, None, 1, 1), conv[1])
        x = plain_norm(F.conv2d(x, conv[3].weight, None, 1, 1), conv[4])
        feats = F.conv2d(x, lift.outc.weight, lift.outc.bias)
    return feats


# ---- what benchmarks/speed.py times ---------------------------------------------------------------------------------


def setup_lifted(name, dtype):
    """A random ViT-S with a random LiFT on eight random 224 images."""
    torch.manual_seed(0)
    model = timm.create_model(resolve(name).tag, num_classes=0).eval()
    ours = ViTExtractor(name, model=timm.create_model(resolve(name).tag, num_classes=0), device="cpu", dtype=dtype)
    ours.model.load_state_dict(model.state_dict())
    lift, images = LiFT(ours.width, ours.patch).eval(), torch.randn(8, 3, 224, 224)
    fast = LiFT(ours.width, ours.patch).eval().to(ours.dtype)
    fast.load_state_dict(lift.state_dict())
    return (
        lambda: plain_lift(lift, images, plain_map(model, images, ours.layer, "key", ours.patch)),
        lambda: upsample(fast, images, ours(images)),
    )


def setup_log_bin():
    torch.manual_seed(0)
    feats = torch.randn(1, 28 * 28, 384).transpose(1, 2).unflatten(2, (28, 28))  # tokens, as a backbone gives them
    return lambda: plain_log_bin(feats), lambda: log_bin(feats)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(b, a, rtol=0, atol=tolerance * float(a.abs().max()))


CASES = [
    Case("extract: S/16 + LiFT at 224, batch 8", 1.15, partial(setup_lifted, "dino_vits16", "float32"), close, 1.0),
    Case("extract: S/8 + LiFT at 224, batch 8", 1.5, partial(setup_lifted, "dino_vits8", "float32"), close, 1.0),
    Case("extract: S/16 + LiFT, bfloat16", 3.0, partial(setup_lifted, "dino_vits16", "bfloat16"), partial(close, tolerance=0.1)),
    Case("extract: log-bin at 28x28", 50.0, setup_log_bin, close, 1.0),
]
