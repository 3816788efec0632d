"""torch.hub entry points: photos in, dense features out.

    features = torch.hub.load("/path/to/this/clone", "lift", source="local", backbone="vit_mini16")
    dense = features(images)              # [B, 3, H, W] in 0..1 -> [B, C, 2h, 2w], h = H/p, w = W/p
    dense = features("cat.jpg")           # or one photo: a path, a PIL image, an array [H, W, 3]
    dense, coarse = features(images, iterations=2, out_size=(480, 640), return_backbone=True)

    lift = torch.hub.load("/path/to/this/clone", "lift_module", source="local")
    dense = lift(normalised_images, feats)           # [B, 3, H, W], [B, C, h, w] -> [B, C, 2h, 2w]

`lift_vit_mini16`, `lift_dino_vits8` and so on are `lift` with that backbone. With a GitHub
repository's name instead of the path, and without `source`, torch.hub fetches it first. The
caller's own `extractor.py` or `lift.py` stays what it is.
"""

# torch.hub offers every callable without an underscore: of other modules none is imported by name
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
    """Execute this repository's _FILES, whatever modules the caller has under their names."""
    # `import command` in one of them must find ours: while they are executed, the names in
    # sys.modules mean our files, and afterwards what they meant to the caller
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
    """The LiFT checkpoint of a backbone in this repository, the better variant first."""
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


def _check_values(images: torch.Tensor) -> None:
    """Raise ValueError for images that are not in 0..1, give or take a hundredth for rounding."""
    # a decision by values would break the graph of compiled code
    if torch.compiler.is_compiling() or images.numel() == 0:
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    outside = low < -0.01 or high > 1.01
    if images.is_floating_point() and not outside:
        return
    what = f"images in {low:.3g}..{high:.3g}"
    remedy = "pass images / 255, in 0..1"
    if low < -0.01:
        what += " look normalised already"
        remedy = "pass them in 0..1, without normalisation: the model normalises them itself"
    raise ValueError(f"{what}: {remedy}")


class _Model(torch.nn.Module):
    """Images [B, 3, H, W] in 0..1 -> features [B, C, 2^n h, 2^n w] float32, without gradients.

    It can be copied, compiled and exported. It cannot be pickled, as no other process could import
    its class: save its state_dict, and call torch.hub.load where it is needed again.

    Args:
        features: a Features of this repository, with LiFT.
        options: `iterations`, `out_size` and `return_backbone`, where a call leaves them out.
    """

    def __init__(self, features: typing.Any, options: dict[str, typing.Any]):
        super().__init__()
        self.features = features
        self.options = options
        self.eval()

    @property
    def extractor(self) -> typing.Any:
        """The backbone: a ViTExtractor."""
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
                (a path, a PIL image, an array [H, W, 3] uint8), which becomes a batch of one, its
                sides rounded to such multiples (to resize it, see `preprocess`).
            options: `iterations`, `out_size` and `return_backbone`, for this call only.
        Raises:
            ValueError: the images are not in 0..1 or off the patch grid, or an option is wrong.
        """
        return self._run(images, **{**self.options, **options})

    @_named_as_in_python()
    def _run(
        self, images: typing.Any, iterations: int, out_size: typing.Any, return_backbone: bool
    ) -> typing.Any:
        """`forward`, with every option given."""
        if not isinstance(images, torch.Tensor):
            images = self.preprocess(images)
        _check_values(images)

        features = self.features
        if iterations != features.upsampler.iterations:
            # their classes, Lifted and Features, have no name here: see _read_files
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


@_named_as_in_python()
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

    The model normalises the images itself; it takes a path or a PIL image, too. A call can have its
    own `iterations`, `out_size` and `return_backbone`. On a GPU torch runs convolutions in TF32,
    unless you set `torch.backends.cudnn.allow_tf32 = False`, as this repository's scripts do.

    Args:
        backbone: a name from the README, or any ViT of timm.
        lift_path: a LiFT checkpoint (default: this repository's module for the backbone).
        backbone_path: the backbone's weights (default: this repository's, or timm's download).
        iterations: n, how often LiFT doubles the resolution.
        out_size: resize the result bilinearly to this size, an int or (H, W).
        return_backbone: return two tensors, these features and the backbone's own [B, C, h, w].
        layer, facet, device: ViTExtractor's.
        dtype: precision inside: float32, bfloat16 or float16.
    Raises:
        ValueError, FileNotFoundError: in one line, for what does not exist or fit together.
    """
    files = _read_files()
    file = files["lift"].read_lift(lift_path or _lift_file(backbone))
    extractor = files["extractor"].ViTExtractor(
        backbone, None, None, device, backbone_path, layer, facet, dtype
    )
    module = files["lift"].load_lift(file, extractor)
    upsampler = files["features"].Lifted(module, extractor, iterations)
    features = files["features"].Features(extractor, upsampler)
    options = {"iterations": iterations, "out_size": out_size, "return_backbone": return_backbone}
    return _Model(features, options)


@_named_as_in_python()
def lift_module(
    backbone: str = "vit_mini16",
    lift_path: str | pathlib.Path | None = None,
    patch_size: int = 16,
) -> torch.nn.Module:
    """LiFT alone, frozen: normalised images [B, 3, H, W], feats [B, C, h, w] -> [B, C, 2h, 2w].

    Args:
        backbone: whose module to take if there is no `lift_path`.
        lift_path: a LiFT checkpoint.
        patch_size: p, used where neither the file nor a JSON beside it says it.
    Raises:
        ValueError, FileNotFoundError: in one line, for a file that is missing or no checkpoint.
    """
    file = lift_path or _lift_file(backbone)
    return _read_files()["lift"].load_lift(file, patch_size=patch_size)


def _entry(backbone: str, words: str) -> typing.Callable[..., torch.nn.Module]:
    """The entry point `lift` with one backbone, which `words` describe for torch.hub.help."""

    def entry(**options: typing.Any) -> torch.nn.Module:
        return lift(backbone, **options)

    entry.__doc__ = f"`lift` with {words}."
    return entry


lift_vit_mini16 = _entry("vit_mini16", "vit_mini16, 16 pixels a patch, which is in this repository")
lift_vit_tiny_patch16_224 = _entry("vit_tiny_patch16_224", "the supervised ViT-Ti/16")
lift_dino_vits16 = _entry("dino_vits16", "DINO's ViT-S/16")
lift_dino_vits8 = _entry("dino_vits8", "DINO's ViT-S/8")
lift_dino_vitb16 = _entry("dino_vitb16", "DINO's ViT-B/16")
lift_dino_vitb8 = _entry("dino_vitb8", "DINO's ViT-B/8")
lift_vit_small_patch16 = _entry("vit_small_patch16_224", "the supervised ViT-S/16")
lift_vit_base_patch16 = _entry("vit_base_patch16_224", "the supervised ViT-B/16")
lift_vit_base_patch8 = _entry("vit_base_patch8_224", "the supervised ViT-B/8")
