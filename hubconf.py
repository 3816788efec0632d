"""torch.hub entry points: photos in, dense features out.

    features = torch.hub.load("/path/to/this/clone", "lift", source="local", backbone="vit_mini16")
    dense = features(images)              # [B, 3, H, W] in 0..1 -> [B, C, 2h, 2w], h = H/p, w = W/p
    dense = features("cat.jpg")           # or one photo: a path, a PIL image, an array [H, W, 3]
    dense, coarse = features(images, iterations=2, out_size=(480, 640), return_backbone=True)

    lift = torch.hub.load("/path/to/this/clone", "lift_module", source="local")
    dense = lift(normalised_images, feats)           # [B, 3, H, W], [B, C, h, w] -> [B, C, 2h, 2w]

`lift_vit_mini16`, `lift_dino_vits8` and so on are `lift` with that backbone. With a GitHub
repository's name instead of the path, and without `source`, torch.hub fetches it first.

The files of this repository are read by their place, under private names: the caller's own
`extractor.py` or `lift.py` stays what it is.
"""

import contextlib
import importlib.util
import pathlib
import sys
import types
import typing

import torch
import torchvision

dependencies = [
    "torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm",
]  # fmt: skip

_ROOT = pathlib.Path(__file__).resolve().parent

# each imports only those before it
_FILES = (
    "files", "command", "photos", "backbones", "dense", "extractor", "lift", "features",
)  # fmt: skip


# ---- files of this repository -------------------------------------------------------------------


def _read_files() -> dict[str, types.ModuleType]:
    """Execute this repository's _FILES, whatever modules the caller has under their names.

    `import command` in one of them must find ours. So while they are executed the public names in
    sys.modules mean ours, and afterwards again what they meant to the caller.
    """
    callers = {name: sys.modules[name] for name in _FILES if name in sys.modules}
    modules = {}
    try:
        for name in _FILES:
            spec: typing.Any = importlib.util.spec_from_file_location(
                f"_lift_hub_{name}", _ROOT / f"{name}.py"
            )
            modules[name] = importlib.util.module_from_spec(spec)
            sys.modules[name] = modules[name]
            spec.loader.exec_module(modules[name])
    finally:
        for name in _FILES:
            sys.modules.pop(name, None)
        sys.modules.update(callers)
    return modules


def _lift_file(backbone: str) -> pathlib.Path:
    """The LiFT checkpoint of a backbone in this repository, the better variant first.

    Raises:
        FileNotFoundError: there is none.
    """
    # the authors' files of supervised ViTs have no size in their names
    for name in (backbone, backbone.removesuffix("_224")):
        for variant in ("_attend", ""):
            file = _ROOT / "pretrained" / f"lift_{name}{variant}.pth"
            if file.is_file():
                return file
    remedy = "train one with train_lift.py and pass lift_path=FILE"
    raise FileNotFoundError(f"pretrained/ has no LiFT for {backbone}: {remedy}")


@contextlib.contextmanager
def _named_as_in_python() -> typing.Iterator[None]:
    """Let errors speak of backbone_path and dtype, not of --backbone_path and --dtype."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise type(error)(str(error).replace("--", "")) from None


# ---- the model ----------------------------------------------------------------------------------


def _check_iterations(iterations: int) -> None:
    """Raise ValueError for a negative number."""
    if iterations < 0:
        raise ValueError(f"iterations={iterations} is negative: pass 0 or more")


def _check_values(images: torch.Tensor) -> None:
    """Raise ValueError for images that are not in 0..1: normalised ones, or 0..255.

    A hundredth too much on either side is taken, as rounding may give it. Compiled code does not
    look, because a decision on values would break its graph.
    """
    if torch.compiler.is_compiling() or images.numel() == 0:
        return
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: pass images / 255, in 0..1")
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low < -0.01:
        remedy = "pass them in 0..1, without normalisation: the model normalises them itself"
        raise ValueError(f"images in {low:.3g}..{high:.3g} look normalised already: {remedy}")
    if high > 1.01:
        raise ValueError(f"images in {low:.3g}..{high:.3g}: pass images / 255, in 0..1")


class _Model(torch.nn.Module):
    """Images [B, 3, H, W] in 0..1 -> features [B, C, 2^n h, 2^n w] float32, without gradients.

    It can be copied, compiled and exported. It cannot be pickled, as no other process could import
    its class: save its state_dict, and call torch.hub.load where it is needed again.

    Args:
        features: a Features of this repository, with LiFT.
        options: `iterations`, `out_size` and `return_backbone` of a call that leaves them out.
    """

    def __init__(self, features: typing.Any, options: dict[str, typing.Any]):
        super().__init__()
        self.features = features
        self.options = options
        self.eval()

    @property
    def extractor(self) -> typing.Any:
        """The backbone, a ViTExtractor."""
        return self.features.backbone

    @property
    def lift(self) -> typing.Any:
        """The LiFT module."""
        return self.features.upsampler.lift

    def train(self, mode: bool = True) -> "_Model":
        """Keep both frozen networks in eval mode, also inside a model that trains."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: typing.Any, **options: typing.Any) -> typing.Any:
        """The dense features of images; with return_backbone, also the backbone's own.

        Args:
            images: [B, 3, H, W] in 0..1, with sides that are multiples of the patch; or one photo
                (a path, a PIL image, an array [H, W, 3] uint8), which becomes a batch of one at its
                own size, rounded to such multiples: `preprocess` can make it smaller.
            options: `iterations`, `out_size` and `return_backbone`, for this call only.
        Raises:
            ValueError: the images are not in 0..1 or off the patch grid, or an option is wrong.
        """
        options = {**self.options, **options}
        if torch.compiler.is_compiling():
            return self._run(images, **options)
        with _named_as_in_python():
            return self._run(images, **options)

    def _run(
        self,
        images: typing.Any,
        iterations: int,
        out_size: int | tuple[int, int] | None,
        return_backbone: bool,
    ) -> typing.Any:
        """`forward`, with every option given."""
        _check_iterations(iterations)
        if not isinstance(images, torch.Tensor):
            images = self.preprocess(images)
        _check_values(images)

        features = self.features
        if iterations != features.upsampler.iterations:
            upsampler = type(features.upsampler)(self.lift, self.extractor, iterations)
            features = type(features)(self.extractor, upsampler)
        maps = features(images, return_all=True)
        coarse = maps[0]                                            # [B, C, h, w]
        dense = maps[-1]                                            # [B, C, 2^n h, 2^n w]
        if out_size is not None:
            dense = torch.nn.functional.interpolate(
                dense, size=out_size, mode="bilinear", align_corners=False
            )
        if return_backbone:
            return dense, coarse
        return dense

    def preprocess(
        self, photo: typing.Any, load_size: int | tuple[int, int] | None = None
    ) -> torch.Tensor:
        """One photo (a path, a PIL image, an array [H, W, 3] uint8) -> [1, 3, H, W] in 0..1.

        Args:
            load_size: pixels of the shorter side, or (H, W); None leaves the photo's own.
        """
        _, fitted = self.extractor.preprocess(photo, load_size)
        return torchvision.transforms.functional.to_tensor(fitted)[None]


# ---- entry points -------------------------------------------------------------------------------


def lift(
    backbone: str = "vit_mini16",
    lift_path: str | pathlib.Path | None = None,
    backbone_path: str | pathlib.Path | None = None,
    iterations: int = 1,
    out_size: int | tuple[int, int] | None = None,
    return_backbone: bool = False,
    layer: int | None = None,
    facet: str = "key",
    device: str = "cpu",
    dtype: str = "float32",
) -> torch.nn.Module:
    """A frozen ViT with LiFT: images [B, 3, H, W] in 0..1 -> features [B, C, 2^n h, 2^n w] float32.

    The model normalises the images itself; it takes a path or a PIL image, too. `iterations`,
    `out_size` and `return_backbone` can be given to a call too. On a GPU torch runs convolutions in
    TF32 unless the caller says `torch.backends.cudnn.allow_tf32 = False`, as this repository's
    scripts do.

    Args:
        backbone: a name of the README, or a ViT of timm.
        lift_path: a LiFT checkpoint; this repository's module for the backbone where left out.
        backbone_path: the backbone's weights; those in this repository, or timm's download, where
            left out.
        iterations: n, how often LiFT doubles the resolution.
        out_size: resize the result bilinearly to this size, an int or (H, W).
        return_backbone: return two tensors, these features and the backbone's own [B, C, h, w].
        layer, facet, device: ViTExtractor's.
        dtype: precision inside: float32, bfloat16 or float16.
    Raises:
        ValueError, FileNotFoundError: in one line, for what does not exist or fit together.
    """
    _check_iterations(iterations)
    files = _read_files()
    features = files["features"]
    with _named_as_in_python():
        file = files["lift"].read_lift(lift_path or _lift_file(backbone))
        extractor = files["extractor"].ViTExtractor(
            backbone, None, None, device, backbone_path, layer, facet, dtype
        )
        module = files["lift"].load_lift(file, extractor)
    options = {
        "iterations": iterations,
        "out_size": out_size,
        "return_backbone": return_backbone,
    }
    upsampler = features.Lifted(module, extractor, iterations)
    return _Model(features.Features(extractor, upsampler), options)


def lift_module(
    backbone: str = "vit_mini16",
    lift_path: str | pathlib.Path | None = None,
    patch_size: int = 16,
) -> torch.nn.Module:
    """LiFT alone, frozen: normalised images [B, 3, H, W], feats [B, C, h, w] -> [B, C, 2h, 2w].

    Args:
        backbone: whose module to take where `lift_path` is left out.
        lift_path: a LiFT checkpoint.
        patch_size: p, where neither the file nor a JSON beside it tells it.
    Raises:
        ValueError, FileNotFoundError: in one line, for a file that is missing or no checkpoint.
    """
    lift = _read_files()["lift"]
    with _named_as_in_python():
        return lift.load_lift(lift_path or _lift_file(backbone), patch_size=patch_size)


def lift_vit_mini16(**options: typing.Any) -> torch.nn.Module:
    """`lift` on vit_mini16, 16 pixels a patch, which lies in this repository."""
    return lift("vit_mini16", **options)


def lift_vit_tiny_patch16_224(**options: typing.Any) -> torch.nn.Module:
    """`lift` on the supervised ViT-Ti, 16 pixels a patch."""
    return lift("vit_tiny_patch16_224", **options)


def lift_dino_vits16(**options: typing.Any) -> torch.nn.Module:
    """`lift` on DINO's ViT-S, 16 pixels a patch."""
    return lift("dino_vits16", **options)


def lift_dino_vits8(**options: typing.Any) -> torch.nn.Module:
    """`lift` on DINO's ViT-S, 8 pixels a patch."""
    return lift("dino_vits8", **options)


def lift_dino_vitb16(**options: typing.Any) -> torch.nn.Module:
    """`lift` on DINO's ViT-B, 16 pixels a patch."""
    return lift("dino_vitb16", **options)


def lift_dino_vitb8(**options: typing.Any) -> torch.nn.Module:
    """`lift` on DINO's ViT-B, 8 pixels a patch."""
    return lift("dino_vitb8", **options)


def lift_vit_small_patch16(**options: typing.Any) -> torch.nn.Module:
    """`lift` on the supervised ViT-S, 16 pixels a patch."""
    return lift("vit_small_patch16_224", **options)


def lift_vit_base_patch16(**options: typing.Any) -> torch.nn.Module:
    """`lift` on the supervised ViT-B, 16 pixels a patch."""
    return lift("vit_base_patch16_224", **options)


def lift_vit_base_patch8(**options: typing.Any) -> torch.nn.Module:
    """`lift` on the supervised ViT-B, 8 pixels a patch."""
    return lift("vit_base_patch8_224", **options)
