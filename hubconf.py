"""torch.hub entry points: photos in, dense features out.

    features = torch.hub.load("/path/to/this/clone", "lift", source="local", backbone="vit_mini16")
    dense = features(images)              # [B, 3, H, W] in 0..1 -> [B, C, 2h, 2w], h = H/p, w = W/p
    dense, coarse = features(images, iterations=2, out_size=(480, 640), return_backbone=True)

    lift = torch.hub.load("/path/to/this/clone", "lift_module", source="local")
    dense = lift(normalised_images, feats)           # [B, 3, H, W], [B, C, h, w] -> [B, C, 2h, 2w]

`lift_vit_mini16`, `lift_dino_vits8` and so on are `lift` with that backbone. With a GitHub
repository's name instead of the path, and without `source`, torch.hub fetches it first.

The files of this repository are read by their place, under private names: the caller's own
`extractor.py` or `lift.py` stays what it is.
"""

import copy
import functools
import importlib.util
import pathlib
import sys
import types
import typing

import torch

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "huggingface_hub"]

_ROOT = pathlib.Path(__file__).resolve().parent
_FILES = ("command", "photos", "extractor", "lift")  # each imports only those before it


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
    """The LiFT checkpoint of a backbone in this repository, the best variant first.

    Raises:
        FileNotFoundError: there is none.
    """
    # the authors' files of supervised ViTs have no size in their names
    for name in (backbone, backbone.removesuffix("_224")):
        for variant in ("_attend", "_residual", ""):
            file = _ROOT / "pretrained" / f"lift_{name}{variant}.pth"
            if file.is_file():
                return file
    remedy = "train one with train_lift.py and pass lift_path=FILE"
    raise FileNotFoundError(f"pretrained/ has no LiFT for {backbone}: {remedy}")


def _absolute(path: str | pathlib.Path | None) -> str | None:
    """A path made absolute, so that it holds in another working folder too; None stays None."""
    if path is None:
        return None
    return str(pathlib.Path(path).absolute())


# ---- checks -------------------------------------------------------------------------------------


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


# ---- the model ----------------------------------------------------------------------------------


class _LoadedAgain(torch.nn.Module):
    """A module that is unpickled by calling torch.hub again, and then loading its weights.

    An ordinary pickle would name its class, and the classes of these files are known under no name
    that another process could import.
    """

    def _call(self) -> tuple[str, dict[str, typing.Any]]:
        """The entry point that makes the same module, and its arguments."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[typing.Any, ...]:
        entry, arguments = self._call()
        load = functools.partial(torch.hub.load, source="local", **arguments)
        return load, (str(_ROOT), entry), self.state_dict()

    def __setstate__(self, state: dict[str, typing.Any]) -> None:
        """Take over the weights, after going to their device; each keeps its own precision."""
        # LiFT's last layer stands for all of them: it is there in every _LoadedAgain
        for key, weight in state.items():
            if key.endswith("outc.weight"):
                self.to(weight.device)
        self.load_state_dict(state, assign=True)

    def __deepcopy__(self, memo: dict[int, typing.Any]) -> "_LoadedAgain":
        """Copy what is there, without reading files again."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


class _LiFT(_LoadedAgain):
    """What `lift_module` adds to the class LiFT: it can be pickled.

    What is unpickled is frozen and in eval mode, as `lift_module` always gives it.
    """

    patch_size: int
    lift_path: str

    def _call(self) -> tuple[str, dict[str, typing.Any]]:
        return "lift_module", {"lift_path": self.lift_path, "patch_size": self.patch_size}


class _Features(_LoadedAgain):
    """Images [B, 3, H, W] in 0..1 -> features [B, C, 2^n h, 2^n w] float32, without gradients.

    Sides are multiples of the patch.

    Args:
        extractor: a ViTExtractor of this repository.
        lift: the LiFT module.
        upsample: the function lift.upsample of this repository.
        options: `iterations`, `out_size` and `return_backbone` of a call that leaves them out.
        arguments: the other arguments of `lift`, by which __reduce__ makes the same model again.
    """

    def __init__(
        self,
        extractor: torch.nn.Module,
        lift: torch.nn.Module,
        upsample: typing.Callable[..., torch.Tensor],
        options: dict[str, typing.Any],
        arguments: dict[str, typing.Any],
    ):
        super().__init__()
        self.extractor: typing.Any = extractor
        self.lift = lift
        self.upsample = upsample
        self.options = options
        self.arguments = arguments
        self.eval()

    def train(self, mode: bool = True) -> "_Features":
        """Keep both frozen networks in eval mode, also inside a model that trains."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, **options: typing.Any) -> typing.Any:
        """The dense features of images; with return_backbone, also the backbone's own.

        Args:
            options: `iterations`, `out_size` and `return_backbone`, for this call only.
        Raises:
            ValueError: the images are not in 0..1 or off the patch grid, or an option is wrong.
        """
        return self._features(images, **{**self.options, **options})

    def _features(
        self,
        images: torch.Tensor,
        iterations: int,
        out_size: int | tuple[int, int] | None,
        return_backbone: bool,
    ) -> typing.Any:
        """`forward`, with every option given."""
        _check_iterations(iterations)
        _check_values(images)

        images = self.extractor.normalize(images)
        feats = self.extractor(images)                                  # [B, C, h, w]
        dense = self.upsample(self.lift, images, feats, iterations)     # [B, C, 2^n h, 2^n w]
        if out_size is not None:
            dense = torch.nn.functional.interpolate(
                dense, size=out_size, mode="bilinear", align_corners=False
            )
        if return_backbone:
            return dense, feats
        return dense

    def _call(self) -> tuple[str, dict[str, typing.Any]]:
        return "lift", {**self.arguments, **self.options}


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

    The model normalises the images itself. `iterations`, `out_size` and `return_backbone` can be
    given to a call too. On a GPU torch runs convolutions in TF32 unless the caller says
    `torch.backends.cudnn.allow_tf32 = False`, as this repository's scripts do.

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
    precisions = files["command"].PRECISIONS
    if dtype not in precisions:
        raise ValueError(f"unknown dtype {dtype}: pass one of {', '.join(precisions)}")
    if lift_path is None:
        lift_path = _lift_file(backbone)

    extractor = files["extractor"].ViTExtractor(
        backbone,
        stride=None,
        device=device,
        backbone_path=backbone_path,
        layer=layer,
        facet=facet,
        dtype=dtype,
    )
    module = files["lift"].load_lift(lift_path, extractor)

    options = {
        "iterations": iterations,
        "out_size": out_size,
        "return_backbone": return_backbone,
    }
    arguments = {
        "backbone": backbone,
        "lift_path": _absolute(lift_path),
        "backbone_path": _absolute(backbone_path),
        "layer": layer,
        "facet": facet,
        "device": device,
        "dtype": dtype,
    }
    return _Features(extractor, module, files["lift"].upsample, options, arguments)


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
    if lift_path is None:
        lift_path = _lift_file(backbone)
    module = _read_files()["lift"].load_lift(lift_path, patch_size=patch_size)
    # make it a LiFT that can be pickled: a class made on the spot, of _LiFT and its own
    module.__class__ = type("LiFT", (_LiFT, type(module)), {})
    module.lift_path = _absolute(lift_path)
    return module


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
