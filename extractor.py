"""Dense descriptors of frozen ViTs: any layer, any facet, any stride, any photo.

    python extractor.py --image_path assets/sample.jpg --output_path sample.pth \\
        --model_type dino_vits8 --stride 4 [--bin]

writes the descriptors of one image as a CPU tensor [1, 1, t, C]. In Python:

    extractor = ViTExtractor("dino_vits16", stride=16, device="cpu")
    images, photo = extractor.preprocess("assets/sample.jpg", load_size=224)
    feats = extractor(images)                                            # [B, C, h, w]

The facets and their use as dense descriptors: Amir et al., "Deep ViT Features as Dense Visual
Descriptors", 2021 (arXiv 2112.05814). Backbones come from timm.

Notation: B batch, C channels, p patch size, s stride, H W image pixels, h w descriptor grid,
t = h*w, T = t + prefix tokens (CLS, registers), D channels of the ViT, d those of one head.
"""

import argparse
import importlib
import inspect
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from command import (
    FACETS,
    PRECISIONS,
    Command,
    add_backbone_args,
    check_range,
    first_line,
    load_tensors,
    report,
    save_tensors,
    settings,
    truth,
    weights_digest,
)


def parser() -> Command:
    """The command line of this file: descriptors of one image, as in Amir et al.'s release."""
    command = Command(__doc__)
    add = command.add_argument
    add("--image_path", required=True, help="the image")
    add("--output_path", required=True, help="the .pth to write")
    add(
        "--load_size", type=int, default=224,
        help="pixels of the shorter side; 0 leaves the photo's own (default: 224)",
    )  # fmt: skip
    add("--bin", nargs="?", type=truth, const=True, default=False, help="log-binned (True, False)")
    add_backbone_args(command, stride=4)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from photos import as_photo, fit, fitted_size

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of red, green and blue
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Backbone(NamedTuple):
    """A named backbone."""

    tag: str  # timm's full name: a name without a tag changes its weights between releases
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    file: str | None = None  # weights in this repository


BACKBONES = {
    "dino_vits16": Backbone("vit_small_patch16_224.dino", IMAGENET),
    "dino_vits8": Backbone("vit_small_patch8_224.dino", IMAGENET),
    "dino_vitb16": Backbone("vit_base_patch16_224.dino", IMAGENET),
    "dino_vitb8": Backbone("vit_base_patch8_224.dino", IMAGENET),
    "vit_tiny_patch16_224": Backbone("vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF),
    "vit_small_patch16_224": Backbone("vit_small_patch16_224.augreg_in21k_ft_in1k", HALF),
    "vit_base_patch16_224": Backbone("vit_base_patch16_224.augreg2_in21k_ft_in1k", HALF),
    "vit_base_patch8_224": Backbone("vit_base_patch8_224.augreg2_in21k_ft_in1k", HALF),
    "vit_mini16": Backbone("vit_tiny_patch16_224", HALF, "pretrained/vit_mini16.safetensors"),
}


# ---- backbones and their weights ----------------------------------------------------------------


def resolve(name: str) -> Backbone:
    """The row of BACKBONES of this name, or one made for any other model of timm.

    Raises:
        ValueError: neither knows the name.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name == "vit_small_patch8_224":
        instead = "take dino_vits8 or vit_base_patch8_224"
        raise ValueError(f"no supervised weights of vit_small_patch8_224 exist: {instead}")

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        known = ", ".join(BACKBONES)
        raise ValueError(f"unknown model {name}: pass one of {known}, or the name of a ViT in timm")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "no tag at all"
        raise ValueError(f"timm has no weights {name}: pass one of {known}") from error
    if cfg is None:
        known = "a ViT of timm.list_pretrained('vit_*')"
        raise ValueError(f"timm has no weights of {name}: pass {known}")

    tag = name
    if cfg.tag:
        tag = f"{cfg.architecture}.{cfg.tag}"
    return Backbone(tag, (tuple(cfg.mean), tuple(cfg.std)))


def is_named(tag: str) -> bool:
    """Whether a backbone stands in BACKBONES, be it by its name there or by timm's full name."""
    if tag in BACKBONES:
        return True
    return any(row.tag == tag for row in BACKBONES.values())


def unwrap(state: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's own tensors of a checkpoint.

    Wrappers and prefixes of DINO's and timm's training scripts are taken off; classification and
    projection heads are dropped.
    """
    for wrapper in ("teacher", "state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]

    only_teacher = any(key.startswith("teacher.") for key in state)
    tensors = {}
    for key, value in state.items():
        if only_teacher and not key.startswith("teacher."):
            continue
        while key.startswith(("module.", "backbone.", "teacher.")):
            key = key.split(".", 1)[1]
        if isinstance(value, Tensor) and not key.startswith(("head.", "head_dist.", "mask_token")):
            tensors[key] = value
    return tensors


def load_backbone_file(model: nn.Module, path: str | Path) -> None:
    """Fill a timm ViT from a weight file, strictly.

    Raises:
        ValueError: names missing and surplus keys, wrong shapes, or weights that are not finite.
    """
    loaded = load_tensors(path, "correct --backbone_path", "pass a .pth or .safetensors file")
    state = unwrap(loaded)
    wanted = model.state_dict()

    shapes = []
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            given = tuple(state[key].shape)
            shapes.append(f"{key} {given} where {tuple(value.shape)} is wanted")
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "surplus": sorted(state.keys() - wanted.keys()),
        "of another shape": shapes,
    }

    wrong = []
    for what, keys in found.items():
        if keys:
            examples = ", ".join(keys[:3])
            if len(keys) > 3:
                examples += ", ..."
            wrong.append(f"{len(keys)} {what} ({examples})")
    if wrong:
        all_wrong = "; ".join(wrong)
        remedy = "pass the --model_type it belongs to"
        raise ValueError(f"{path} does not fit the backbone, {all_wrong}: {remedy}")
    if not all(state[key].isfinite().all() for key in wanted):
        raise ValueError(f"{path} holds NaN or infinite weights: restore it or pass another file")
    model.load_state_dict(state)


def hub_unreachable() -> bool:
    """Whether a direct connection to timm's model hub fails.

    The hub's own client would try for a minute before it says so.
    """
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = getproxies()
    if hub.scheme in proxies or "all" in proxies:
        return False  # the client goes through the proxy: a direct connection tells nothing
    port = hub.port
    if port is None:
        port = 80 if hub.scheme == "http" else 443
    try:
        socket.create_connection((str(hub.hostname), port), timeout=5).close()
        return False
    except OSError:
        return True


@contextmanager
def hub_offline_if_unreachable() -> Iterator[None]:
    """Let the hub's client read nothing but its cache where there is no way to the hub.

    Its own setting is put back afterwards, for a later try and for the host program.
    """
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    if not before and hub_unreachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def download_backbone(tag: str) -> nn.Module:
    """timm's ViT with its weights, from the hub's cache or by download; timm shows the progress.

    Raises:
        ValueError: neither is possible; names the file to fetch.
    """
    cfg: Any = timm.get_pretrained_cfg(tag)
    if not cfg.has_weights:
        raise ValueError(f"timm has no weights of {tag}: pass --backbone_path FILE")
    try:
        with hub_offline_if_unreachable():
            return timm.create_model(tag, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError:  # of a model that is not built this way: for build_backbone to explain
        raise
    except Exception as error:  # the hub's client, the network and the disk each raise their own
        raise ValueError(
            f"cannot download {tag} ({first_line(error)}): fetch model.safetensors from "
            f"https://huggingface.co/timm/{tag} where there is a network, and pass "
            "--backbone_path FILE"
        ) from error


def build_backbone(name: str, backbone_path: str | Path | None = None) -> nn.Module:
    """The timm ViT of a name, without head.

    Its weights come from `backbone_path`, else from this repository, else by timm's download.

    Raises:
        ValueError: the name is not known, is no ViT's, or its weights cannot be had.
        FileNotFoundError: there is no such file.
    """
    row = resolve(name)
    path = backbone_path
    if path is None and row.file:
        path = Path(__file__).parent / row.file
    try:
        if path is None:
            return download_backbone(row.tag)
        model = timm.create_model(row.tag, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        remedy = "pass a ViT of timm"
        raise ValueError(f"{name} is no plain ViT for images of any size: {remedy}") from error
    load_backbone_file(model, path)
    return model


# ---- devices ------------------------------------------------------------------------------------


def pick_device(device: str | torch.device | None, dtype: str = "float32") -> torch.device:
    """The torch.device of auto, cpu, cuda, cuda:N or mps; under torchrun, cuda is this process's.

    Raises:
        ValueError: it is not there, cannot multiply in `dtype`, or there is no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype}: pass one of {', '.join(DTYPES)}")
    if device in (None, "auto"):
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        # some devices hold a dtype but cannot multiply in it, so try a product
        one = torch.ones(1, 1, device=device, dtype=DTYPES[dtype])
        (one @ one).item()
        return torch.device(str(device))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        remedy = "pass --device cpu --dtype float32"
        raise ValueError(f"no {dtype} on device {device} ({reason}): {remedy}") from error


def pick_device_or_fall_back(device: str | torch.device | None, dtype: str) -> torch.device:
    """The device that is asked for, or `auto` with a note if it is cuda and there is no GPU.

    Code of earlier releases asks for cuda on every machine.
    """
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        chosen = pick_device("auto", dtype)
        print(f"note: no GPU here for device={device!r}, running on {chosen}", file=sys.stderr)
        return chosen
    return pick_device(device, dtype)


def use_full_float32() -> None:
    """Let float32 mean float32 on CUDA.

    Without this, torch runs convolutions in TF32, whose mantissa has 10 bits instead of 23.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def as_numbers(channels: Tensor) -> tuple[float, ...]:
    """A float32 tensor as numbers of seven digits: 0.485, not 0.48500001430511475."""
    numbers = channels.flatten().tolist()
    return tuple(round(number, 7) for number in numbers)


# ---- what every extractor has -------------------------------------------------------------------


class DenseExtractor(nn.Module):
    """A frozen network from normalised images [B, 3, H, W] to a map of descriptors [B, C, h, w].

    Attributes: name, tag (the name that a LiFT module's origin is compared with), layer, facet,
    patch and step (pixels), width (C; None for the facet attn), heads (1 where attn is no facet),
    mean, std, digest (of the weights).
    """

    name: str
    tag: str
    layer: int | None
    facet: str | None
    patch: int
    step: int
    width: int | None
    heads: int = 1
    digest: str
    mean_rgb: Tensor
    std_rgb: Tensor

    def set_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Keep mean and std as numbers, and as buffers, which are on the device already.

        Args:
            mean, std: of red, green and blue; a module of one's own may have them as tensors.
        """
        mean_rgb = torch.as_tensor(mean, dtype=torch.float32).detach().cpu().clone()
        std_rgb = torch.as_tensor(std, dtype=torch.float32).detach().cpu().clone()
        self.mean = as_numbers(mean_rgb)
        self.std = as_numbers(std_rgb)
        self.register_buffer("mean_rgb", mean_rgb.view(3, 1, 1), persistent=False)
        self.register_buffer("std_rgb", std_rgb.view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W] in 0..1 -> normalised, where they are."""
        mean = self.mean_rgb.to(images.device)
        std = self.std_rgb.to(images.device)
        return (images - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo `normalize`: [..., 3, H, W] -> the same in 0..1."""
        mean = self.mean_rgb.to(images.device)
        std = self.std_rgb.to(images.device)
        return images * std + mean

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The descriptor grid (h, w) of an image of H x W pixels: 1 + (side - p)//s each."""
        rows = 1 + (height - self.patch) // self.step
        columns = 1 + (width - self.patch) // self.step
        return rows, columns

    def channels(self, cells: int) -> int:
        """Channels of a map of so many cells: C, or for the facet attn a cell's whole attention.

        That is each head's attention to every cell.
        """
        return self.width or self.heads * cells

    def size(
        self, width: int, height: int, load_size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The size (W, H) at which a photo is read (photos.fitted_size)."""
        return fitted_size(width, height, self.patch, load_size)

    def fit(
        self, photo: Image.Image, load_size: int | tuple[int, int] | None = None
    ) -> Image.Image:
        """Resize an RGB photo to `size`, once."""
        return fit(photo, self.patch, load_size)

    def preprocess(
        self, image_path: Any, load_size: int | tuple[int, int] | None = None
    ) -> tuple[Tensor, Image.Image]:
        """Read, fit and normalise one photo.

        Args:
            image_path: a path, a PIL image, an array [H, W, 3] uint8 or a tensor [3, H, W].
            load_size: pixels of the shorter side, or (H, W); None leaves the photo's own.
        Returns:
            The normalised tensor [1, 3, H, W] on the CPU, and the resized PIL image.
        """
        photo = self.fit(as_photo(image_path), load_size)
        mean = self.mean_rgb.cpu()
        std = self.std_rgb.cpu()
        return ((to_tensor(photo) - mean) / std)[None], photo

    def facts(self) -> dict[str, Any]:
        """What decides the features, for settings and records."""
        return {
            "backbone": self.tag,
            "layer": self.layer,
            "facet": self.facet,
            "stride": self.step,
            "digest": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


# ---- frozen ViTs --------------------------------------------------------------------------------


class Side(int):
    """A number of pixels for both axes, which serves as an int and as a pair.

    timm keeps the patch size as a pair; code written for DINO's own ViT reads it as an int.
    """

    def __getitem__(self, axis: int) -> int:
        return (int(self), int(self))[axis]

    def __iter__(self) -> Iterator[int]:
        return iter((int(self), int(self)))

    def __len__(self) -> int:
        return 2


class ViTExtractor(DenseExtractor):
    """A frozen ViT whose call gives a map of descriptors.

    Facets: `key`, `query` and `value` are outputs of a block's qkv projection, before attention;
    `token` is the block's output, before the final norm; `attn` is its softmax attention to all T
    tokens.

    Attributes: those of DenseExtractor, and model_type, model, device, dtype, depth, heads; `p`
    (the patch) and `stride` (the pair (s, s)) for code written for dino-vit-features, and, after an
    extraction, `num_patches` (h, w) and `load_size` (H, W) of the last batch.

    Args:
        model_type: a row of BACKBONES or the name of a ViT in timm.
        stride: pixels between descriptors, a divisor of the patch; None is the patch.
        model: a ViT module to use instead of building one.
        device: cuda on a machine without one falls back to what there is, with a note.
        backbone_path: a weight file instead of a download.
        layer: counted from 0; None is the last.
        dtype: precision inside; descriptors are float32.
        requires_grad: let gradients reach the images; the ViT stays frozen.
    Raises:
        ValueError: something does not exist or does not fit.
    """

    def __init__(
        self,
        model_type: str = "dino_vits8",
        stride: int | None = 4,
        model: nn.Module | None = None,
        device: str | torch.device | None = "cuda",
        backbone_path: str | Path | None = None,
        layer: int | None = None,
        facet: str = "key",
        dtype: str = "float32",
        requires_grad: bool = False,
    ):
        super().__init__()
        row = resolve(model_type)
        self.name = self.model_type = model_type
        self.tag = row.tag
        if row.file:
            self.tag = model_type
        self.gradients = requires_grad
        self.set_normalization(*row.mean_std)

        device = pick_device_or_fall_back(device, dtype)
        if model is None and backbone_path is None:
            model = self.create_model(model_type)
        elif model is None:
            model = build_backbone(model_type, backbone_path)
        self.digest = weights_digest(model)  # of the weights as they are in the file
        self.model = model.to(device, DTYPES[dtype]).requires_grad_(False).eval()
        self.to(device)

        self._read_facts(stride, layer, facet)
        self.num_patches: tuple[int, int] | None = None
        self.load_size: tuple[int, int] | None = None
        self.eval()

    @staticmethod
    def create_model(model_type: str) -> nn.Module:
        """The ViT of a name, with its weights (build_backbone)."""
        return build_backbone(model_type)

    @staticmethod
    def patch_vit_resolution(model: nn.Module, stride: int) -> nn.Module:
        """Change the stride of a ViT's patch embedding, in place, and return the ViT.

        A ViTExtractor does this for itself, without touching the model.
        """
        projection: Any = model.patch_embed.proj  # type: ignore[union-attr]
        patch = projection.kernel_size[0]
        if stride < 1 or patch % stride:
            raise ValueError(f"stride {stride} does not divide the patch ({patch})")
        projection.stride = (stride, stride)
        return model

    def _read_facts(self, stride: int | None, layer: int | None, facet: str) -> None:
        """Read patch, heads, depth and width off the model; check stride, layer and facet."""
        embed: Any = getattr(self.model, "patch_embed", None)
        blocks: Any = getattr(self.model, "blocks", None)
        projection: Any = getattr(embed, "proj", None)
        of_rgb_patches = isinstance(projection, nn.Conv2d) and projection.in_channels == 3
        if not of_rgb_patches or not blocks or not hasattr(getattr(blocks[0], "attn", None), "qkv"):
            what = f"{self.name} is no plain ViT (patches of RGB, then blocks with attention)"
            raise ValueError(f"{what}: pass a ViT of timm")
        for foreign in ("register_tokens", "storage_tokens", "rope_embed"):
            if getattr(self.model, foreign, None) is not None:  # would silently be left out
                what = f"the module has {foreign}, which is not timm's name of it"
                raise ValueError(f"{what}: pass the --model_type of timm")

        self.patch = projection.kernel_size[0]
        embed.patch_size = Side(self.patch)
        if stride is None:
            stride = self.patch
        self.step = stride
        if self.step < 1 or self.patch % self.step:
            possible = divisors(self.patch)
            what = f"stride {stride} does not divide the patch ({self.patch})"
            raise ValueError(f"{what}: pass one of {possible}")

        self.depth = len(blocks)
        self.layer = self._checked_layer(layer)
        check_facet(facet)
        self.facet = facet
        attention_layer = blocks[self.layer].attn
        self.heads = attention_layer.num_heads
        self.width = descriptor_width(attention_layer, facet, projection.out_channels)

    def _checked_layer(self, layer: int | None) -> int:
        """A layer that exists; None is the last one."""
        if layer is None:
            return self.depth - 1
        if not 0 <= layer < self.depth:
            layers = f"{self.name} has layers 0 to {self.depth - 1}"
            raise ValueError(f"layer {layer} is out of range: {layers}, pass one of these")
        return layer

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.model.patch_embed.proj.weight.device  # type: ignore[union-attr,return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The precision it runs in."""
        return self.model.patch_embed.proj.weight.dtype  # type: ignore[union-attr,return-value]

    @property
    def p(self) -> int:
        """The patch, under the name of dino-vit-features."""
        return self.patch

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels between descriptors along both axes, as dino-vit-features has them: (s, s)."""
        return self.step, self.step

    # -- the forward pass --

    def _prefix_tokens(self) -> list[Tensor]:
        """The tokens before the patches, each [1, n, D]: CLS, a distillation token, registers."""
        names = ("cls_token", "dist_token", "reg_token")
        tokens = [getattr(self.model, name, None) for name in names]
        return [token for token in tokens if token is not None]

    def _prefix_count(self) -> int:
        """How many tokens stand before those of the patches."""
        return sum(token.shape[1] for token in self._prefix_tokens())

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Learned absolute positions for a grid: [1, t, D], and those of the prefix tokens."""
        table: Any = self.model.pos_embed
        prefix_rows = self._prefix_count()
        if getattr(self.model, "no_embed_class", False):
            prefix_rows = 0  # the table has rows for patches only
        prefix = table[:, :prefix_rows]
        patches = table[:, prefix_rows:]

        # the grid that the table was trained for; where the model does not tell it, a square one
        native = getattr(self.model.patch_embed, "grid_size", None)
        if native is None:
            side = round(patches.shape[1] ** 0.5)
            native = (side, side)
        if tuple(grid) == tuple(native):
            return patches, prefix
        if is_named(self.tag):
            return interpolate_positions(patches, native, grid), prefix
        resampled = resample_abs_pos_embed(patches, list(grid), list(native), num_prefix_tokens=0)
        return resampled, prefix

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] -> the tokens that enter the first block [B, T, D], prefix first."""
        patch_embed: Any = self.model.patch_embed
        projection = patch_embed.proj
        # the projection's own weights at our stride: the model itself stays untouched
        x = F.conv2d(images, projection.weight, projection.bias, stride=self.step)  # [B, D, h, w]
        x = x.flatten(2).transpose(1, 2)                                            # [B, t, D]
        if getattr(patch_embed, "norm", None) is not None:
            x = patch_embed.norm(x)

        prefix = self._prefix_tokens()  # each [1, n, D]
        if getattr(self.model, "pos_embed", None) is not None:
            patch_positions, prefix_positions = self._positions(grid)
            x = x + patch_positions
            if prefix and prefix_positions.shape[1]:
                prefix = [torch.cat(prefix, dim=1) + prefix_positions]
        before = [token.expand(x.shape[0], -1, -1) for token in prefix]
        x = torch.cat([*before, x], dim=1)                                          # [B, T, D]
        if getattr(self.model, "norm_pre", None) is not None:
            x = self.model.norm_pre(x)  # type: ignore[operator]
        return x

    def _rotary(self, grid: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Keyword arguments of each block: rotary positions where the model has them."""
        if getattr(self.model, "rope", None) is None:
            return [{} for _ in range(self.depth)]
        rope = self.model.rope.get_embed(shape=grid)  # type: ignore[union-attr,operator]
        if getattr(self.model, "rope_mixed", False):  # positions of its own for each block
            return [{"rope": rope[number]} for number in range(self.depth)]
        return [{"rope": rope} for _ in range(self.depth)]

    def _check_images(self, images: Tensor) -> None:
        """Raise ValueError unless these are RGB images of at least one patch."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {list(images.shape)}: pass [B, 3, H, W]")
        height, width = images.shape[-2:]
        if min(height, width) < self.patch:
            what = f"an image of {height}x{width} pixels is less than one patch ({self.patch})"
            raise ValueError(f"{what}: pass a larger one")

    def _choose_attention(self, tokens: int) -> None:
        """Switch fused attention off where plain products are faster.

        On a CPU, torch's fused attention in bfloat16 takes twice their time for few tokens.
        """
        if torch.compiler.is_compiling():
            return
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            for block in self.model.blocks:  # type: ignore[union-attr]
                block.attn.fused_attn = tokens > 512

    def _facets(self, images: Tensor, wanted: list[tuple[int, str]]) -> list[Tensor]:
        """Run the ViT once and collect the (layer, facet) pairs that are wanted.

        Only what they need is computed: the pass ends where the last of them is complete.

        Returns:
            One tensor for each pair, over all T tokens: [B, heads, T, d] for query, key and value,
            [B, 1, T, D] for `token`, [B, heads, T, T] for `attn`.
        """
        self._check_images(images)
        height, width = images.shape[-2:]
        self.load_size = (height, width)
        self.num_patches = self.grid(height, width)

        found: dict[tuple[int, str], Tensor] = {}
        last = max(layer for layer, _ in wanted)
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            x = self.embed(images.to(self.device, self.dtype), self.num_patches)
            rotary = self._rotary(self.num_patches)
            self._choose_attention(x.shape[1])
            for number in range(last + 1):
                block: Any = self.model.blocks[number]  # type: ignore[index]
                facets = [facet for layer, facet in wanted if layer == number]

                # all facets but `token` are read on the way into the block's attention
                if any(facet != "token" for facet in facets):
                    entering = attention_input(block, x)
                for facet in facets:
                    if facet == "attn":
                        found[number, facet] = attention(block.attn, entering, **rotary[number])
                    elif facet != "token":
                        found[number, facet] = project(block.attn, entering, facet)

                # the last block itself has to run only for its output
                if number < last or "token" in facets:
                    x = block(x, **rotary[number])
                if "token" in facets:
                    found[number, "token"] = x[:, None]
        return [found[pair] for pair in wanted]

    def _wanted(self, layer: Any, facet: Any) -> tuple[list[tuple[int, str]], bool]:
        """The (layer, facet) pairs that are asked for, and whether the caller gave a list.

        One facet goes with every layer of a list, and one layer with every facet. Two lists of
        equal length are paired in order. None is the extractor's own.
        """
        several = isinstance(layer, (list, tuple)) or isinstance(facet, (list, tuple))
        layers = as_list(layer)
        facets = as_list(facet)
        if len(layers) == 1:
            layers = layers * len(facets)
        if len(facets) == 1:
            facets = facets * len(layers)
        if len(layers) != len(facets) or not layers:
            given = f"{len(layers)} layers and {len(facets)} facets"
            raise ValueError(f"{given} do not pair: pass as many of both, or one of either")

        pairs = []
        for one_layer, one_facet in zip(layers, facets):
            if one_layer is None:
                one_layer = self.layer
            if one_facet is None:
                one_facet = self.facet
            check_facet(one_facet)
            pairs.append((self._checked_layer(one_layer), one_facet))
        return pairs, several

    def forward(self, images: Tensor, layer: Any = None, facet: Any = None) -> Any:
        """Normalised images [B, 3, H, W] -> map [B, C, h, w] float32.

        Rows and columns of pixels at the end that fill no patch are dropped.

        Args:
            layer, facet: the extractor's own where left out; a list of either gives a list of maps
                from one pass.
        Raises:
            ValueError: the images have another shape, or layer or facet do not exist.
        """
        pairs, several = self._wanted(layer, facet)
        found = self._facets(images, pairs)
        grid = self.grid(*images.shape[-2:])
        maps = []
        for x in found:
            patches = x[:, :, self._prefix_count() :]                             # [B, heads, t, d]
            tokens = join_heads(patches)                                          # [B, t, C]
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))                # [B, C, h, w]
        if several:
            return maps
        return maps[0]

    def _extract_features(
        self, batch: Tensor, layers: list[int], facet: str = "key"
    ) -> list[Tensor]:
        """Several layers in one pass, all T tokens, under the name of dino-vit-features.

        Returns:
            A tensor a layer: [B, heads, T, d], of `token` [B, T, D], of `attn` [B, heads, T, T].
        """
        pairs, _ = self._wanted(list(layers), facet)
        found = self._facets(batch, pairs)
        if facet == "token":
            return [x[:, 0] for x in found]
        return found

    def extract_descriptors(
        self,
        batch: Tensor,
        layer: Any = None,
        facet: Any = None,
        bin: bool = False,
        include_cls: bool = False,
    ) -> Any:
        """Descriptors [B, 1, t, C] float32 of normalised images [B, 3, H, W].

        Channels are head_dim-major: descriptor channel = d * heads + head. Released LiFT weights
        rely on it. Registers are always dropped.

        Args:
            layer, facet: the extractor's own where left out; a list of either gives a list.
            bin: add the surroundings of every descriptor, 17 bins of C channels.
            include_cls: put the CLS token first (t + 1).
        Raises:
            ValueError: the backbone does not have what is asked for.
        Source: Amir et al., section 3.
        """
        if include_cls and (bin or getattr(self.model, "cls_token", None) is None):
            what = "include_cls needs a backbone with a CLS token, and no bin"
            raise ValueError(f"{what}: leave one of them out")

        pairs, several = self._wanted(layer, facet)
        descriptors = []
        for x in self._facets(batch, pairs):                       # [B, heads, T, d]
            patches = x[:, :, self._prefix_count() :]
            if include_cls:
                patches = torch.cat([x[:, :, :1], patches], dim=2)
            tokens = join_heads(patches)                           # [B, t, C]
            if bin:
                grid = self.grid(*batch.shape[-2:])
                feats = tokens.transpose(1, 2).unflatten(2, grid)  # [B, C, h, w]
                tokens = log_bin(feats)                            # [B, t, 17*C]
            descriptors.append(tokens[:, None])
        if several:
            return descriptors
        return descriptors[0]

    def extract_saliency_maps(self, batch: Tensor) -> Tensor:
        """Saliency [B, t] in 0..1: what CLS attends to in the last layer.

        The mean of heads 0, 2, 4 and 5, min-max normalised for each image.

        Raises:
            ValueError: the backbone has no CLS token, or fewer than six heads.
        """
        if self.heads < 6 or getattr(self.model, "cls_token", None) is None:
            what = f"saliency needs a CLS token and 6 heads, {self.name} has {self.heads} heads"
            raise ValueError(f"{what}: pass dino_vits8")
        attn = self._facets(batch, [(self.depth - 1, "attn")])[0]            # [B, heads, T, T]
        of_cls = attn[:, [0, 2, 4, 5], 0, self._prefix_count() :]            # [B, 4, t]
        saliency = of_cls.float().mean(1)                                    # [B, t]
        low = saliency.amin(1, keepdim=True)
        high = saliency.amax(1, keepdim=True)
        span = (high - low).clamp(min=torch.finfo(saliency.dtype).tiny)      # a flat map gives 0
        return (saliency - low) / span


def interpolate_positions(
    patches: Tensor, native: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Positions [1, N, D] of the native grid -> [1, t, D] of another one, as DINO's own code does.

    Bicubic, not antialiased, with the scale factor (n + 0.1)/sqrt(N) given as such. timm's
    antialiased resampling differs by up to 2e-2.
    """
    square = patches.transpose(1, 2).unflatten(2, native).float()              # [1, D, H0, W0]
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    resized = F.interpolate(
        square,
        scale_factor=scale,
        mode="bicubic",
        align_corners=False,
        recompute_scale_factor=False,
    )
    if tuple(resized.shape[2:]) != tuple(grid):  # at a few sizes the rule loses a row
        resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(patches.dtype)                # [1, t, D]


def as_list(value: Any) -> list[Any]:
    """A list of a list, a tuple or a single value."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def check_facet(facet: str) -> None:
    """Raise ValueError for a facet that does not exist."""
    if facet not in FACETS:
        raise ValueError(f"unknown facet {facet}: pass one of {', '.join(FACETS)}")


def attention_input(block: Any, x: Tensor) -> Tensor:
    """What a block's attention reads: its tokens normed, except in post-norm blocks."""
    kind = type(block).__name__
    if "PostNorm" in kind or "ResPost" in kind:
        return x
    return block.norm1(x)


def project(attn: Any, x: Tensor, facet: str) -> Tensor:
    """One of query, key and value of an attention layer, before any norm of queries and keys.

    Args:
        x: tokens [B, T, D].
    Returns:
        [B, heads, T, d].
    """
    index = ("query", "key", "value").index(facet)
    if attn.qkv is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        y = layers[index](x)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        if bias is not None:
            bias = bias.chunk(3)[index]
        y = F.linear(x, attn.qkv.weight.chunk(3)[index], bias)
    return y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> tokens [B, T, C] float32, head_dim-major: channel = d * heads + head."""
    return x.permute(0, 2, 3, 1).flatten(2).float()


def descriptor_width(attn: Any, facet: str, dim: int) -> int | None:
    """C of a facet of a ViT of `dim` channels; None for `attn`, where it grows with the tokens."""
    if facet == "token":
        return dim
    if facet == "attn":
        return None
    if attn.qkv is None:
        name = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[facet]
        return getattr(attn, name).out_features
    return attn.qkv.out_features // 3


def attention(attn: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """The softmax attention of an attention layer: tokens [B, T, D] -> [B, heads, T, T]."""
    q = project(attn, x, "query")
    k = project(attn, x, "key")
    if getattr(attn, "q_norm", None) is not None:
        q = attn.q_norm(q)
    if getattr(attn, "k_norm", None) is not None:
        k = attn.k_norm(k)
    if rope is not None:
        q = rotate(attn, q, rope)
        k = rotate(attn, k, rope)
    return (q * attn.scale @ k.transpose(2, 3)).softmax(-1)


def rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Apply rotary positions to queries or keys [B, heads, T, d]; prefix tokens have none."""
    first = attn.num_prefix_tokens
    half = getattr(attn, "rotate_half", False)
    rotated = apply_rot_embed_cat(x[:, :, first:], rope, half=half)
    return torch.cat([x[:, :, :first], rotated], dim=2)


def log_bin(feats: Tensor, hierarchy: int = 2) -> Tensor:
    """Log-binned descriptors: map [B, C, h, w] -> tokens [B, h*w, 17*C].

    Level k first averages the map over windows of 3^k x 3^k cells; at the border, over the cells
    that exist. Each cell then takes its 8 neighbours at distance 3^k, in row-major order, and at
    level 0 itself in their middle. Where a neighbour lies outside, the nearest border cell stands
    in. Two levels make 9 + 8 = 17 bins.

    Source: Amir et al., section 3.2.
    """
    batch, _, height, width = feats.shape
    # channels last makes the slices below cheap to stack; contiguous() may return its input, as it
    # ignores the strides of axes of length 1
    feats = feats.clone(memory_format=torch.channels_last)
    bins = []
    for level in range(hierarchy):
        step = 3**level
        pooled = feats
        if step > 1:
            pooled = F.avg_pool2d(
                feats, step, stride=1, padding=step // 2, count_include_pad=False
            )
        padded = F.pad(pooled, [step] * 4, mode="replicate")
        padded = padded.permute(0, 2, 3, 1)                 # [B, h + 2*step, w + 2*step, C]
        for top in (0, step, 2 * step):
            for left in (0, step, 2 * step):
                is_centre = top == step and left == step
                if level > 0 and is_centre:
                    continue
                bins.append(padded[:, top : top + height, left : left + width])
    return torch.stack(bins, 3).view(batch, height * width, -1)  # from [B, h, w, 17, C]


def divisors(n: int) -> str:
    """The divisors of n as text, for messages."""
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)


# ---- one's own backbone -------------------------------------------------------------------------


def my_extractor(args: argparse.Namespace) -> nn.Module:
    """Bare --my_extractor uses what this returns: write it. `args` are the flags."""
    raise ValueError(
        "my_extractor(args) in extractor.py is still empty: return there a module that takes "
        "images [B, 3, H, W] to [B, C, h, w] or [B, h*w, C], or pass --my_extractor "
        "module:function"
    )


class MyExtractor(DenseExtractor):
    """Any module from images [B, 3, H, W] to [B, C, h, w] or [B, T, C], used like a ViTExtractor.

    The module's attributes `mean` and `std`, where it has them, normalise the images, else
    ImageNet's do. Of T tokens the last h*w are taken: CLS and registers are dropped.

    Args:
        imsize: pixels of the square image by which patch and width are found out.
    Raises:
        ValueError: the module does not take such an image.
    """

    def __init__(self, module: nn.Module, name: str, imsize: int, device: str, dtype: str):
        super().__init__()
        self.name = self.tag = name
        self.layer = self.facet = None
        mean = getattr(module, "mean", IMAGENET[0])
        std = getattr(module, "std", IMAGENET[1])
        self.set_normalization(mean, std)

        self.device = pick_device(device, dtype)
        self.dtype = DTYPES[dtype]
        self.digest = weights_digest(module)
        self.module = module.to(self.device, self.dtype).requires_grad_(False).eval()
        self.to(self.device)

        try:
            with torch.no_grad():
                out = self.module(torch.zeros(1, 3, imsize, imsize).to(self.device, self.dtype))
            if not isinstance(out, Tensor) or out.ndim not in (3, 4):
                raise TypeError(f"it gives {describe(out)}, not [B, C, h, w] or [B, T, C]")
            if out.ndim == 3:
                # tokens [1, T, C]; isqrt rounds down: a prefix is too short for one more row
                rows = math.isqrt(out.shape[1])
                self.width = out.shape[2]
            else:  # a map [1, C, h, w]
                rows = out.shape[2]
                self.width = out.shape[1]
            self.patch = self.step = imsize // rows
        except (RuntimeError, AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
            reason = first_line(error)
            what = f"{name} does not take {imsize} pixels ({reason})"
            raise ValueError(f"{what}: pass a backbone that does") from error
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, h, w] float32."""
        x = self.module(images.to(self.device, self.dtype))
        if x.ndim == 3:
            rows, columns = self.grid(*images.shape[-2:])
            if x.shape[1] < rows * columns:
                size = f"{images.shape[2]}x{images.shape[3]}"
                what = f"{self.name} gives {x.shape[1]} tokens for an image of {size}"
                raise ValueError(f"{what}: pass one of its own size")
            x = x[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        return x.float()


def describe(out: Any) -> str:
    """What something is, for a message: the shape of a tensor, else its type."""
    if isinstance(out, Tensor):
        return f"a tensor of shape {list(out.shape)}"
    return f"a {type(out).__name__}"


def call_function(name: str, args: argparse.Namespace) -> nn.Module:
    """Call `module:function`, with the flags if it takes an argument.

    Raises:
        ValueError: there is no such function, or it returns no torch module.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # the module is looked for beside the user, too
        sys.path.append(os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "pass --my_extractor module:function"
        raise ValueError(f"no function {name} ({error}): {remedy}") from error
    if inspect.signature(build).parameters:
        built = build(args)
    else:
        built = build()
    if not isinstance(built, nn.Module):
        what = f"{name} returns {describe(built)}"
        raise ValueError(f"{what}: return a torch.nn.Module from images to features")
    return built


# ---- from flags ---------------------------------------------------------------------------------


def build_extractor(args: argparse.Namespace) -> DenseExtractor:
    """The frozen network that the flags of add_backbone_args ask for.

    Raises:
        ValueError: something does not exist, or does not fit together.
    """
    use_full_float32()
    extractor: DenseExtractor
    if args.my_extractor:
        module = call_function(args.my_extractor, args)
        imsize = getattr(args, "imsize", 224)
        extractor = MyExtractor(module, args.my_extractor, imsize, args.device, args.dtype)
    else:
        extractor = ViTExtractor(
            args.model_type,
            args.stride,
            device=pick_device(args.device, args.dtype),
            backbone_path=args.backbone_path,
            layer=args.layer,
            facet=args.facet,
            dtype=args.dtype,
        )
    check_facts(extractor, args.channel, args.patch)
    return extractor


def check_facts(
    extractor: DenseExtractor, channel: int | None = None, patch: int | None = None
) -> None:
    """Raise ValueError if channel or patch, where given, are not the extractor's."""
    for flag, given, real in (
        ("channel", channel, extractor.width),
        ("patch", patch, extractor.patch),
    ):
        if given not in (None, real):
            what = f"--{flag} {given}, but {extractor.name} {extractor.facet} has {real}"
            raise ValueError(f"{what}: leave --{flag} out")


def main(args: argparse.Namespace) -> None:
    """Write the descriptors [1, 1, t, C] of one image."""
    check_range(args, load_size=0)
    if Path(args.output_path).suffix in (".npz", ".safetensors"):
        what = f"--output_path {args.output_path}, but only .pth is written here"
        raise ValueError(f"{what}: let it end in .pth, or take lift_extractor.py")
    as_photo(args.image_path)  # a missing photo is told before a backbone is built
    extractor = build_extractor(args)
    images, _ = extractor.preprocess(args.image_path, args.load_size or None)
    if not isinstance(extractor, ViTExtractor):
        raise ValueError("this script shows a ViT's facets: leave --my_extractor out")
    descriptors = extractor.extract_descriptors(images, bin=args.bin).cpu()
    save_tensors(args.output_path, descriptors)
    grid = extractor.grid(*images.shape[-2:])
    report({**settings(args, **extractor.facts()), "shape": list(descriptors.shape), "grid": grid})


if __name__ == "__main__":
    parser().run(main)
