"""The one path from photos to dense features: normalise, backbone, upsample, check.

    features = build_features(args)          # as the flags say; or Features(extractor, upsampler)
    dense = features(images)                 # images in 0..1 [B, 3, H, W] -> [B, C, f*h, f*w]

Notation: B batch, C channels, H W image pixels, h w the backbone's grid, f the factor by which the
upsampler refines it.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import call_function
from dense import DenseExtractor
from extractor import build_extractor
from files import weights_digest
from lift import LiFT, load_lift, read_lift, upsample

HOW = ("none", "bilinear", "lift")  # and MODULE:FUNCTION


# ---- upsamplers ---------------------------------------------------------------------------------


class Bilinear(nn.Module):
    """Bilinear upsampling, corners not aligned: (images, [B, C, h, w]) -> [B, C, 2^n h, 2^n w]."""

    def __init__(self, iterations: int = 1):
        super().__init__()
        self.factor = 2**iterations

    def forward(self, images: Tensor, feats: Tensor) -> Tensor:
        return F.interpolate(feats, scale_factor=self.factor, mode="bilinear", align_corners=False)

    def facts(self) -> dict[str, Any]:
        """What decides the result, for settings."""
        return {"upsample": "bilinear"}


class Lifted(nn.Module):
    """LiFT applied n times, on images in 0..1: (images, [B, C, h, w]) -> [B, C, 2^n h, 2^n w].

    Args:
        extractor: whose normalisation the module was trained with.
        iterations: n.
    """

    def __init__(self, lift: LiFT, extractor: DenseExtractor, iterations: int = 1):
        super().__init__()
        self.lift = lift
        self.normalize = extractor.normalize
        self.iterations = iterations
        self.factor = 2**iterations

    def forward(self, images: Tensor, feats: Tensor, return_all: bool = False) -> Any:
        """With `return_all` the list of n + 1 maps that begins with `feats`."""
        normalized = self.normalize(images)
        return upsample(self.lift, normalized, feats, self.iterations, return_all)

    def facts(self) -> dict[str, Any]:
        """What decides the result, for settings."""
        return {"upsample": "lift", "lift_digest": weights_digest(self.lift)}


# ---- features -----------------------------------------------------------------------------------


class Features(nn.Module):
    """Images in 0..1 [B, 3, H, W] -> dense features [B, C, f*h, f*w] float32.

    Images may be on any device; the features are on the backbone's.

    Attributes: backbone, upsampler (None: the backbone's own features), factor (f; a fraction where
    somebody's upsampler has one), patch and channels (the backbone's).

    Args:
        upsampler: any callable (images in 0..1, feats [B, C, h, w]) -> [B, C, H', W'].
    Raises:
        ValueError: the upsampler does not take what the backbone gives.
    """

    def __init__(
        self,
        backbone: DenseExtractor,
        upsampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.upsampler = upsampler
        self.patch = backbone.patch
        self.channels = backbone.channels
        self.factor: float = 1
        if upsampler is not None:
            self.factor = getattr(upsampler, "factor", None) or self._read_factor()

    @torch.no_grad()
    def _read_factor(self) -> float:
        """The factor of an upsampler that does not tell it: read off what it gives."""
        side = 4 * self.patch
        try:
            coarse, fine = self(torch.zeros(1, 3, side, side), return_all=True)
            if fine.ndim != 4 or fine.shape[:2] != coarse.shape[:2]:
                raise ValueError(f"it takes {list(coarse.shape)} to {list(fine.shape)}")
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            what = f"the upsampler does not work with this backbone ({error})"
            remedy = "it must take (images, feats [B, C, h, w]) to [B, C, H', W']"
            raise ValueError(f"{what}: {remedy}") from error
        return fine.shape[2] / coarse.shape[2]

    def forward(self, images: Tensor, return_all: bool = False) -> Any:
        """The features of a batch of images.

        Args:
            return_all: a list of maps that begins with the backbone's own and ends with the result;
                with LiFT applied n times, the n - 1 between them too.
        Raises:
            ValueError: the images are not [B, 3, H, W], or features are not finite.
        """
        images = images.to(self.backbone.device, non_blocking=True)
        feats = self.backbone(self.backbone.normalize(images))     # [B, C, h, w]
        maps = [feats]
        if isinstance(self.upsampler, Lifted) and return_all:
            maps = self.upsampler(images, feats, return_all=True)  # n + 1 of them
        elif self.upsampler is not None:
            maps.append(self.upsampler(images, feats).float())
        check_finite(maps[-1], self.backbone.dtype)
        if return_all:
            return maps
        return maps[-1]

    def facts(self) -> dict[str, Any]:
        """What decides the features, for settings."""
        facts = self.backbone.facts()
        if self.upsampler is None:
            facts["upsample"] = "none"
        elif hasattr(self.upsampler, "facts"):
            facts.update(self.upsampler.facts())
        elif isinstance(self.upsampler, nn.Module):  # somebody's own: --upsample names it
            facts["upsampler_digest"] = weights_digest(self.upsampler)
        return facts

    def check_size(self, height: int, width: int, flag: str = "--imsize") -> None:
        """Raise ValueError unless both sides, which `flag` sets, are multiples of the patch."""
        for side in (height, width):
            if side % self.patch:
                below = max(1, side // self.patch) * self.patch
                what = f"{flag} {side} is not a multiple of the patch ({self.patch})"
                raise ValueError(f"{what}: pass {below} or {below + self.patch}")


def check_finite(feats: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for features with NaN or infinity; compiled code does not look.

    Args:
        dtype: the precision that they were computed in.
    """
    if torch.compiler.is_compiling() or feats.isfinite().all():
        return
    precision = str(dtype).removeprefix("torch.")
    remedy = "pass --dtype float32"
    if dtype == torch.float32:
        remedy = "pass other weights"
    raise ValueError(f"the features are not finite in {precision}: {remedy}")


# ---- from flags ---------------------------------------------------------------------------------


def how_to_upsample(args: argparse.Namespace) -> str:
    """How --upsample, --lift_path and --lift_iter ask to upsample: one of HOW, or MODULE:FUNCTION.

    Raises:
        ValueError: they contradict each other.
    """
    how = args.upsample
    if how is None:
        how = "lift" if args.lift_path else "none"
    if how not in HOW and ":" not in how:
        raise ValueError(f"--upsample {how}: pass {', '.join(HOW)} or MODULE:FUNCTION")
    if args.lift_iter < 0:
        raise ValueError(f"--lift_iter {args.lift_iter} is negative: pass 0 or more")
    if how == "none" and args.lift_iter > 1:
        what = f"--lift_iter {args.lift_iter} has nothing to repeat"
        raise ValueError(f"{what}: pass --upsample bilinear, or --lift_path FILE")
    if how == "lift" and not args.lift_path:
        raise ValueError("--upsample lift needs a module: pass --lift_path FILE")
    return how


def build_features(args: argparse.Namespace) -> Features:
    """The Features that the flags of add_backbone_args and add_lift_args ask for, frozen.

    The LiFT file is read before the backbone is built, as that may have to be downloaded.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: something does not exist, or does not fit together.
    """
    how = how_to_upsample(args)
    file: Any = None
    if args.lift_path:  # read where it is not used, too: a wrong path is a mistake all the same
        file = read_lift(args.lift_path)
    extractor = build_extractor(args)

    upsampler: Any = None
    if how == "lift":
        upsampler = Lifted(load_lift(file, extractor), extractor, args.lift_iter)
    elif how == "bilinear":
        upsampler = Bilinear(args.lift_iter)
    elif how != "none":
        upsampler = call_function(how, args, "--upsample")
        if not callable(upsampler):
            what = f"--upsample {how} returns {type(upsampler).__name__}"
            raise ValueError(f"{what}: return a function (images, feats) -> feats")
    if isinstance(upsampler, nn.Module):
        upsampler = upsampler.requires_grad_(False).eval().to(extractor.device)
    return Features(extractor, upsampler)
