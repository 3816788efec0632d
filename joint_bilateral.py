"""Joint bilateral upsampling of features, along the edges of the photo: no training, no weights.

    python eval_segmentation.py ... --upsample joint_bilateral:upsampler --lift_iter 2

Every output cell is a weighted mean of the coarse cells around it. The nearer a cell is, and the
more its colour is like the output cell's, the more it weighs (Kopf et al., "Joint Bilateral
Upsampling", 2007):

    weight = exp(-distance^2 / (2 spatial^2)) * exp(-difference of colour^2 / (2 colour^2))

Distances are in coarse cells. The colour of an output cell is that of the photo, resized to the
output grid; the colour of a coarse cell is the mean over its own f x f output cells.

Notation: B batch, C channels, H W image pixels, h w the coarse grid, f the factor.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def upsampler(args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """For --upsample: the factor is 2^n in one step, where n is --lift_iter."""
    return partial(joint_bilateral, factor=2**args.lift_iter)


def joint_bilateral(
    images: Tensor,
    feats: Tensor,
    factor: int = 2,
    radius: int = 2,
    spatial: float = 0.5,
    colour: float = 0.1,
) -> Tensor:
    """Upsample features [B, C, h, w] to [B, C, f*h, f*w], guided by images [B, 3, H, W] in 0..1.

    The defaults are those of Kopf et al.

    Args:
        factor: f.
        radius: the window has 2 * radius + 1 coarse cells a side; cells outside do not count.
        spatial: standard deviation of the distance, in coarse cells.
        colour: standard deviation of the colour, of which each channel is in 0..1; infinite for
            one that does not count.
    """
    height, width = feats.shape[2:]
    fine_size = (factor * height, factor * width)
    fine = F.interpolate(images.float(), fine_size, mode="bilinear", antialias=True)
    coarse = F.avg_pool2d(fine, factor)                            # [B, 3, h, w]

    # every coarse cell with its own f x f output cells: [..., h, f, w, f]
    fine = fine.unflatten(3, (width, factor)).unflatten(2, (height, factor))
    # centres of these output cells, in coarse cells from the centre of theirs: [f]
    centres = (torch.arange(factor, device=feats.device) + 0.5) / factor - 0.5

    steps = range(-radius, radius + 1)
    offsets = [(down, right) for down in steps for right in steps]
    exponents = []
    for down, right in offsets:
        near = (centres - down).square()[:, None, None] + (centres - right).square()
        unlike = (fine - per_cell(shifted(coarse, down, right))).square().sum(1, keepdim=True)
        exponent = -near / (2 * spatial**2) - unlike / (2 * colour**2)
        inside = shifted(torch.ones_like(coarse[:, :1]), down, right)
        exponents.append(exponent.masked_fill(per_cell(inside) == 0, -torch.inf))
    # in softmax the largest is exp(0), so that the weights cannot all vanish
    weights = torch.stack(exponents).softmax(dim=0).to(feats.dtype)  # [K, B, 1, h, f, w, f]

    total = feats.new_zeros(*feats.shape[:2], height, factor, width, factor)
    for number, (down, right) in enumerate(offsets):  # a trace cannot iterate over a tensor
        total.addcmul_(weights[number], per_cell(shifted(feats, down, right)))
    return total.flatten(4).flatten(2, 3)


def shifted(maps: Tensor, down: int, right: int) -> Tensor:
    """A map [B, C, h, w] whose cell (i, j) is that at (i + down, j + right); 0 from outside."""
    height, width = maps.shape[2:]
    edge = max(abs(down), abs(right))
    padded = F.pad(maps, [edge] * 4)
    return padded[:, :, edge + down : edge + down + height, edge + right : edge + right + width]


def per_cell(maps: Tensor) -> Tensor:
    """A map [B, C, h, w] as [B, C, h, 1, w, 1]: it goes with all f x f output cells."""
    return maps[:, :, :, None, :, None]
