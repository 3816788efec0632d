"""torch.hub entry points: photos in, dense features out.

    features = torch.hub.load("/path/to/this/clone", "lift", source="local", backbone="vit_mini16")
    dense = features(images)                       # [B, 3, H, W] in 0..1 -> [B, C, 2h, 2w], h = H/p, w = W/p
    dense, coarse = features(images, iterations=2, out_size=(480, 640), return_backbone=True)

    lift = torch.hub.load("/path/to/this/clone", "lift_module", source="local", backbone="vit_mini16")
    dense = lift(normalised_images, feats)         # [B, 3, H, W], [B, C, h, w] -> [B, C, 2h, 2w]

With a GitHub repository's name instead of the path, and without `source`, torch.hub fetches it first. The files of this
repository are read by their place, under private names: the caller's own `extractor.py` or `lift.py` stays what it is.
"""

import importlib.util
import pathlib

import torch
from torch import nn

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "huggingface_hub"]

_ROOT = pathlib.Path(__file__).resolve().parent


def _noun(name):
    """The module in this repository's file NAME.py, whatever the caller has imported under that name; not in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"_lift_hub_{name}", _ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lift_file(backbone):
    """The LiFT checkpoint of a backbone that this repository holds, the residual variant first; FileNotFoundError if none."""
    files = [_ROOT / "pretrained" / f"lift_{backbone}{variant}.pth" for variant in ("_residual", "")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(f"pretrained/ has no LiFT for {backbone}: train one with train_lift.py and pass lift_path=FILE")
    return found[0]


class _Features(nn.Module):
    """Images [B, 3, H, W] in 0..1, sides multiples of the patch -> features [B, C, 2^n h, 2^n w] float32, without gradients."""

    def __init__(self, extractor, lift, upsample, **options):
        super().__init__()
        self.extractor, self.lift, self.upsample, self.options = extractor, lift, upsample, options
        self.eval()

    def train(self, mode=True):
        """Keep both frozen networks in eval mode, also inside a model that trains."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images, **options):
        """`iterations`, `out_size` and `return_backbone`, where given, hold for this call."""
        return self._features(images, **self.options | options)

    def _features(self, images, iterations, out_size, return_backbone):
        images = self.extractor.normalize(images)
        feats = self.extractor(images)
        dense = self.upsample(self.lift, images, feats, iterations)
        if out_size is not None:
            dense = nn.functional.interpolate(dense, size=out_size, mode="bilinear", align_corners=False)
        return (dense, feats) if return_backbone else dense


def lift(
    backbone="vit_mini16", lift_path=None, backbone_path=None, iterations=1, out_size=None, return_backbone=False,
    layer=None, facet="key", device="cpu", dtype="float32",
):  # fmt: skip
    """A frozen ViT with LiFT: images [B, 3, H, W] in 0..1 -> features [B, C, 2^n h, 2^n w] float32; it normalises itself.

    `iterations` is n; `out_size`, an int or (H, W), resizes the result bilinearly; with `return_backbone` a call gives (features,
    the backbone's own [B, C, h, w]). These three can be given to a call too. `lift_path` defaults to this repository's module
    for the backbone, `backbone_path` to its weights here or to timm's download; `layer`, `facet` and `dtype` are ViTExtractor's.
    Raises ValueError or FileNotFoundError, in one line, for what does not exist or does not fit together.
    """
    path = _lift_file(backbone) if lift_path is None else lift_path
    extractor = _noun("extractor").ViTExtractor(
        backbone, device=device, backbone_path=backbone_path, layer=layer, facet=facet, dtype=dtype
    )
    noun, options = _noun("lift"), {"iterations": iterations, "out_size": out_size, "return_backbone": return_backbone}
    return _Features(extractor, noun.load_lift(path, extractor), noun.upsample, **options)


def lift_module(backbone="vit_mini16", lift_path=None, patch_size=16):
    """LiFT alone, frozen: lift(normalised images [B, 3, H, W], features [B, C, H/p, W/p]) -> [B, C, 2H/p, 2W/p].

    `lift_path` defaults to this repository's module for `backbone`; `patch_size` is p where no JSON beside the file tells it.
    Raises ValueError or FileNotFoundError, in one line, for a file that is missing or no LiFT checkpoint.
    """
    return _noun("lift").load_lift(_lift_file(backbone) if lift_path is None else lift_path, patch_size=patch_size)
