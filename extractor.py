"""Dense descriptors of frozen ViTs: any layer, any facet, any stride, any photo.

    python extractor.py --image_path assets/sample.jpg --output_path sample.pth --model_type dino_vits8 --stride 4 [--bin]

writes the descriptors of one image as a CPU tensor [1, 1, t, C]. In Python:

    extractor = ViTExtractor("dino_vits16", device="cpu")
    images, photo = extractor.preprocess("assets/sample.jpg", load_size=224)
    feats = extractor(images)                                            # [B, C, h, w]

The facets and their use as dense descriptors: Amir et al., "Deep ViT Features as Dense Visual Descriptors", 2021
(arXiv 2112.05814). Backbones come from timm.

Notation: B batch, C channels, p patch size, s stride, H W image pixels, h w descriptor grid, t = h*w, T = t + prefix tokens
(CLS, registers), d channels of one attention head.
"""

import argparse
import glob
import json
import os
import platform
import socket
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file
from timm.layers import apply_rot_embed_cat
from torch import nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_tensor

FACETS = ("key", "query", "value", "token", "attn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the error, at twice the size, is enough
os.umask(UMASK := os.umask(0))  # only reading it changes it, so once, before there are threads


class Backbone(NamedTuple):
    """A named backbone: timm's full tag (untagged names change their weights between releases), normalisation, own file."""

    tag: str
    mean_std: tuple
    file: str | None = None


BACKBONES = {
    "dino_vits16": Backbone("vit_small_patch16_224.dino", IMAGENET),
    "dino_vits8": Backbone("vit_small_patch8_224.dino", IMAGENET),
    "dino_vitb16": Backbone("vit_base_patch16_224.dino", IMAGENET),
    "dino_vitb8": Backbone("vit_base_patch8_224.dino", IMAGENET),
    "vit_small_patch16_224": Backbone("vit_small_patch16_224.augreg_in21k_ft_in1k", HALF),
    "vit_base_patch16_224": Backbone("vit_base_patch16_224.augreg2_in21k_ft_in1k", HALF),
    "vit_base_patch8_224": Backbone("vit_base_patch8_224.augreg2_in21k_ft_in1k", HALF),
    "vit_mini16": Backbone("vit_tiny_patch16_224", HALF, "pretrained/vit_mini16.safetensors"),
}


def first_line(error):
    """The first line of an exception's text, at most 150 characters, for messages."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:150]


# ---- backbones and their weights ------------------------------------------------------------------------------------


def resolve(name):
    """The Backbone of a row of BACKBONES or of any timm name. Raises ValueError for a name that neither knows."""
    if name in BACKBONES:
        return BACKBONES[name]
    if name == "vit_small_patch8_224":
        raise ValueError("no supervised weights of vit_small_patch8_224 exist: take dino_vits8 or vit_base_patch8_224")
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"unknown model {name}: pass one of {', '.join(BACKBONES)}, or the name of a ViT in timm")
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "no tag at all"
        raise ValueError(f"timm has no weights {name}: pass one of {known}") from error
    if cfg is None:
        raise ValueError(f"timm has no weights of {name}: pass a ViT of timm.list_pretrained('vit_*')")
    return Backbone(f"{cfg.architecture}.{cfg.tag}" if cfg.tag else name, (tuple(cfg.mean), tuple(cfg.std)))


def read_tensors(path):
    """The dict of tensors in a .safetensors or .pth file, on the CPU; nothing in the file is executed.

    Raises ValueError for a damaged or unsafe file, FileNotFoundError for a missing one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: correct --backbone_path")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints carry their flags
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"a {type(state).__name__}, no state_dict")
        return state
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} holds no weights ({first_line(error)}): pass a .pth or .safetensors file") from error


def unwrap(state):
    """The backbone's own entries of a checkpoint: wrappers and prefixes off, classification and projection heads dropped."""
    for wrapper in ("teacher", "state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    if any(key.startswith("teacher.") for key in state):
        state = {key: value for key, value in state.items() if key.startswith("teacher.")}
    tensors = {}
    for key, value in state.items():
        while key.startswith(("module.", "backbone.", "teacher.")):
            key = key.split(".", 1)[1]
        if isinstance(value, torch.Tensor) and not key.startswith(("head.", "head_dist.", "mask_token")):
            tensors[key] = value
    return tensors


def load_backbone_file(model, path):
    """Fill the timm ViT `model` from a file, strictly: ValueError names missing and surplus keys and wrong shapes."""
    state, wanted = unwrap(read_tensors(path)), model.state_dict()
    missing, surplus = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} where {tuple(value.shape)} is wanted"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    found = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    wrong = [f"{len(keys)} {what} ({', '.join(keys[:3] + ['...'] * (len(keys) > 3))})" for what, keys in found.items() if keys]
    if wrong:
        raise ValueError(f"{path} does not fit the backbone, {'; '.join(wrong)}: pass the --model_type it belongs to")
    if not all(state[key].isfinite().all() for key in wanted):
        raise ValueError(f"{path} holds NaN or infinite weights: restore it or pass another file")
    model.load_state_dict(state)


def hub_unreachable():
    """Whether a direct connection to timm's model hub fails; its client would try for a minute before it says so."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if getproxies():
        return False
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        return False
    except OSError:
        return True


def download_backbone(tag):
    """timm's ViT `tag` with its weights, from the hub's cache or by download (timm shows the progress).

    Raises ValueError, naming the file to fetch, where neither is possible.
    """
    if hub_unreachable():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # the cache is still read
    try:
        return timm.create_model(tag, pretrained=True, num_classes=0, dynamic_img_size=True)
    except TypeError:  # of a model that is not built this way: for build_backbone to explain
        raise
    except Exception as error:  # the hub's client, the network and the disk each raise their own
        raise ValueError(
            f"cannot download {tag} ({first_line(error)}): fetch model.safetensors from "
            f"https://huggingface.co/timm/{tag} where there is a network, and pass --backbone_path FILE"
        ) from error


def build_backbone(name, backbone_path=None):
    """The timm ViT `name` without head; weights from `backbone_path`, else this repository, else timm's download."""
    row = resolve(name)
    path = backbone_path or (row.file and Path(__file__).parent / row.file)
    try:
        if not path:
            return download_backbone(row.tag)
        model = timm.create_model(row.tag, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise ValueError(f"{name} takes images of one size only, so it is no plain ViT: pass a ViT of timm") from error
    load_backbone_file(model, path)
    return model


# ---- devices --------------------------------------------------------------------------------------------------------


def pick_device(device, dtype="float32"):
    """torch.device for auto|cpu|cuda|cuda:N|mps; ValueError if it is not there or cannot multiply in `dtype`.

    Under torchrun, cuda is the GPU of this process.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        one = torch.ones(1, 1, device=device, dtype=DTYPES[dtype])
        (one @ one).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"no {dtype} on device {device} ({first_line(error)}): pass --device cpu --dtype float32") from error


def linear(layer, x):
    """nn.Linear; float32 on a CPU without gradients goes to oneDNN, at twice the rate of MKL on AMD's processors."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def speed_up_linears(model):
    """Let the linear layers of `model` run by `linear`, where torch has oneDNN; parameters and results stay as they are."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.forward = partial(linear, layer)


# ---- the extractor --------------------------------------------------------------------------------------------------


class ViTExtractor(nn.Module):
    """A frozen ViT whose call gives a map of descriptors: normalised images [B, 3, H, W] -> [B, C, h, w] float32.

    `model_type` is a row of BACKBONES or a timm name; `model` a ViT module to use instead of building one;
    `backbone_path` a weight file instead of a download. `stride` (default: the patch) must divide the patch; `layer` counts
    from 0 (default: the last). Facets: `key`, `query`, `value` are outputs of that block's qkv projection before attention;
    `token` is the block's output before the final norm; `attn` its softmax attention to all T tokens.

    Attributes: name, tag (timm's full name), patch, stride, heads, depth, width (C of the chosen facet), layer, facet,
    mean, std, normalize, device, dtype. Raises ValueError for what does not exist or does not fit.
    """

    def __init__(
        self, model_type="dino_vits8", stride=None, model=None, device="auto",
        backbone_path=None, layer=None, facet="key", dtype="float32",
    ):  # fmt: skip
        super().__init__()
        self.name, self.facet = model_type, facet
        row = resolve(model_type)
        self.tag = model_type if row.file else row.tag
        self.mean, self.std = row.mean_std
        self.normalize = Normalize(self.mean, self.std)
        device = pick_device(device, dtype)
        model = model if model is not None else build_backbone(model_type, backbone_path)
        self.model = model.to(device, DTYPES[dtype]).requires_grad_(False).eval()
        speed_up_linears(self.model)
        self._read_facts(stride, layer)
        self.eval()

    @classmethod
    def from_args(cls, args):
        """The extractor that the flags of add_backbone_args ask for."""
        return cls(
            args.model_type, args.stride, device=args.device, backbone_path=args.backbone_path,
            layer=args.layer, facet=args.facet, dtype=args.dtype,
        )  # fmt: skip

    def _read_facts(self, stride, layer):
        """Read patch, heads, depth, width and native grid off the model, and check stride, layer and facet against them."""
        embed, blocks = getattr(self.model, "patch_embed", None), getattr(self.model, "blocks", None)
        plain = isinstance(getattr(embed, "proj", None), nn.Conv2d) and embed.proj.in_channels == 3
        if not plain or not blocks or not hasattr(getattr(blocks[0], "attn", None), "qkv"):
            raise ValueError(f"{self.name} is no plain ViT (patches of RGB, then blocks with attention): pass a ViT of timm")
        self.patch, self.depth = embed.proj.kernel_size[0], len(blocks)
        self.stride, self.layer = self.patch if stride is None else stride, self._layer(layer)
        check_facet(self.facet)
        self.heads = blocks[0].attn.num_heads
        self.width = descriptor_width(blocks[0].attn, self.facet, embed.proj.out_channels)
        if self.stride < 1 or self.patch % self.stride:
            raise ValueError(f"stride {stride} does not divide the patch ({self.patch}): pass one of {divisors(self.patch)}")

    @property
    def device(self):
        """Where the backbone is."""
        return self.model.patch_embed.proj.weight.device

    @property
    def dtype(self):
        """The precision it runs in."""
        return self.model.patch_embed.proj.weight.dtype

    @property
    def prefix(self):
        """The tokens before the patches, each [1, n, D]: CLS, a distillation token, registers."""
        tokens = [getattr(self.model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        return [token for token in tokens if token is not None]

    def _layer(self, layer):
        layer = self.depth - 1 if layer is None else layer
        if not 0 <= layer < self.depth:
            raise ValueError(f"layer {layer} is out of range: {self.name} has layers 0 to {self.depth - 1}, pass one of these")
        return layer

    # -- geometry --

    def grid(self, height, width):
        """Descriptor grid (h, w) of an image of height x width pixels: 1 + (side - p)//s each."""
        return 1 + (height - self.patch) // self.stride, 1 + (width - self.patch) // self.stride

    def size(self, width, height, load_size=None):
        """The size (W, H) at which a photo of width x height pixels is read.

        An integer `load_size` is the shorter side, a pair (H, W) both. A size with a side that is no multiple of the patch
        goes, both sides, to the nearest multiples, so that LiFT and backbone see one grid. Raises ValueError below one patch.
        """
        if isinstance(load_size, int):
            short = min(width, height)
            width, height = (load_size if s == short else int(load_size * s / short) for s in (width, height))
        elif load_size is not None:
            height, width = load_size
        if min(width, height) < self.patch:
            raise ValueError(f"{width}x{height} pixels are less than one patch ({self.patch}): pass a larger --load_size")
        if width % self.patch or height % self.patch:
            width, height = (int(side / self.patch + 0.5) * self.patch for side in (width, height))
        return width, height

    def fit(self, photo, load_size=None):
        """Resize an RGB photo (PIL) to `size`, once, with LANCZOS."""
        size = self.size(*photo.size, load_size)
        return photo if size == photo.size else photo.resize(size, Image.Resampling.LANCZOS)

    def preprocess(self, image_path, load_size=None):
        """Read and fit an image: (normalised tensor [1, 3, H, W] on the CPU, the resized PIL image)."""
        photo = self.fit(read_image(image_path), load_size)
        return self.normalize(to_tensor(photo))[None], photo

    def denormalize(self, images):
        """Undo `normalize`: [..., 3, H, W] -> the same in 0..1."""
        return images * images.new_tensor(self.std)[:, None, None] + images.new_tensor(self.mean)[:, None, None]

    # -- the forward pass --

    def _positions(self, grid):
        """Learned absolute positions for a grid: ([1, t, D], those of the prefix tokens or None).

        Off the native grid: bicubic, not antialiased, and with the scale factor (n + 0.1)/sqrt(N) given as such. This is how
        DINO's own code reads its weights; timm's antialiased resampling differs by up to 2e-2.
        """
        table = self.model.pos_embed
        kept = 0 if getattr(self.model, "no_embed_class", False) else self._count()
        prefix, patches = table[:, :kept], table[:, kept:]
        side = round(patches.shape[1] ** 0.5)
        native = getattr(self.model.patch_embed, "grid_size", None) or (side, side)
        if tuple(grid) != tuple(native):
            scale = tuple((n + 0.1) / m for n, m in zip(grid, native))
            square = patches.transpose(1, 2).unflatten(2, native).float()  # [1, D, sqrt(N), sqrt(N)]
            square = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
            patches = square.flatten(2).transpose(1, 2).to(table.dtype)
        return patches, prefix

    def embed(self, images, grid):
        """Images -> the tokens that enter the first block [B, T, D], prefix first."""
        embed = self.model.patch_embed
        x = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=self.stride)  # [B, D, h, w]
        x = getattr(embed, "norm", nn.Identity())(x.flatten(2).transpose(1, 2))       # [B, t, D]
        prefix = [token.expand(len(x), -1, -1) for token in self.prefix]
        if getattr(self.model, "pos_embed", None) is not None:
            patches, first = self._positions(grid)
            x = x + patches
            prefix = [torch.cat(prefix, 1) + first] if prefix and first.shape[1] else prefix
        return getattr(self.model, "norm_pre", nn.Identity())(torch.cat([*prefix, x], 1))

    def _rotary(self, grid):
        """Keyword arguments of each block: rotary positions for the grid where the model has them."""
        if getattr(self.model, "rope", None) is None:
            return [{}] * self.depth
        rope = self.model.rope.get_embed(shape=grid)
        return [{"rope": rope[i] if getattr(self.model, "rope_mixed", False) else rope} for i in range(self.depth)]

    def _check_images(self, images):
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {list(images.shape)}: pass [B, 3, H, W]")
        if height % self.patch or width % self.patch or not height * width:
            raise ValueError(f"an image of {height}x{width} pixels: resize it to a multiple of the patch ({self.patch})")

    @torch.no_grad()
    def _facet(self, images, layer, facet):
        """One facet of one layer for all T tokens, split by head: [B, heads, T, d] (`token`: one head; `attn`: d = T).

        Stops where the facet is complete: no later block, no unused projection, attention or MLP.
        """
        self._check_images(images)
        grid = self.grid(*images.shape[-2:])
        x, rotary = self.embed(images.to(self.device, self.dtype), grid), self._rotary(grid)
        self._choose_attention(x.shape[1])
        for block, kwargs in zip(self.model.blocks[:layer], rotary):
            x = block(x, **kwargs)
        block = self.model.blocks[layer]
        if facet == "token":
            return block(x, **rotary[layer])[:, None]
        post_norm = "PostNorm" in type(block).__name__ or "ResPost" in type(block).__name__
        x = x if post_norm else block.norm1(x)
        if facet == "attn":
            return attention(block.attn, x, **rotary[layer])
        return project(block.attn, x, facet)

    def _choose_attention(self, tokens):
        """On a CPU, torch's fused bfloat16 attention takes twice the time of plain products for few tokens."""
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            for block in self.model.blocks:
                block.attn.fused_attn = tokens > 512

    def forward(self, images):
        """Normalised images [B, 3, H, W] -> map [B, C, h, w] float32 of the extractor's layer and facet."""
        x = self._facet(images, self.layer, self.facet)[:, :, self._count() :]
        return join_heads(x).transpose(1, 2).unflatten(2, self.grid(*images.shape[-2:]))

    def _count(self):
        return sum(token.shape[1] for token in self.prefix)

    def extract_descriptors(self, batch, layer=None, facet=None, bin=False, include_cls=False):
        """Descriptors [B, 1, t, C] float32 of normalised images [B, 3, H, W] (Amir et al., section 3).

        Channels are head_dim-major: descriptor channel = d * heads + head, which released LiFT weights rely on. With
        `include_cls` the CLS token comes first (t + 1); registers are always dropped. With `bin` every descriptor gets its
        surroundings, 17 bins of C channels. Raises ValueError for what the backbone does not have.
        """
        layer, facet = self._layer(self.layer if layer is None else layer), facet or self.facet
        check_facet(facet)
        if include_cls and (bin or getattr(self.model, "cls_token", None) is None):
            raise ValueError("include_cls needs a backbone with a CLS token, and no bin: leave one of them out")
        x = self._facet(batch, layer, facet)                            # [B, heads, T, d]
        patches = x[:, :, self._count() :]
        x = torch.cat([x[:, :, :1], patches], 2) if include_cls else patches
        x = join_heads(x)                                               # [B, t, C]
        if bin:
            grid = self.grid(*batch.shape[-2:])
            x = log_bin(x.transpose(1, 2).unflatten(2, grid))
        return x[:, None]

    def extract_saliency_maps(self, batch):
        """Saliency [B, t] in 0..1: attention of CLS in the last layer, mean of heads 0, 2, 4 and 5, min-max per image.

        Raises ValueError for a backbone without CLS token or with fewer than six heads.
        """
        if self.heads < 6 or getattr(self.model, "cls_token", None) is None:
            raise ValueError(f"saliency needs a CLS token and 6 heads, {self.name} has {self.heads} heads: pass dino_vits8")
        attn = self._facet(batch, self.depth - 1, "attn")[:, [0, 2, 4, 5], 0, self._count() :].float().mean(1)  # [B, t]
        low, high = attn.amin(1, keepdim=True), attn.amax(1, keepdim=True)
        return (attn - low) / (high - low).clamp(min=torch.finfo(attn.dtype).tiny)


def check_facet(facet):
    """Raise ValueError for a facet that does not exist."""
    if facet not in FACETS:
        raise ValueError(f"unknown facet {facet}: pass one of {', '.join(FACETS)}")


def project(attn, x, facet):
    """One of query, key, value of an attention layer, before any q/k norm: tokens [B, T, D] -> [B, heads, T, d]."""
    index = ("query", "key", "value").index(facet)
    if attn.qkv is None:
        y = (attn.q_proj, attn.k_proj, attn.v_proj)[index](x)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        y = F.linear(x, attn.qkv.weight.chunk(3)[index], None if bias is None else bias.chunk(3)[index])
    return y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


def join_heads(x):
    """[B, heads, T, d] -> tokens [B, T, C] float32, head_dim-major: channel = d * heads + head."""
    return x.permute(0, 2, 3, 1).flatten(2).float()


def descriptor_width(attn, facet, dim):
    """C of a facet of a ViT of `dim` channels; None for `attn`, where it grows with the number of tokens."""
    if facet in ("token", "attn"):
        return dim if facet == "token" else None
    if attn.qkv is None:
        return getattr(attn, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[facet]).out_features
    return attn.qkv.out_features // 3


def attention(attn, x, rope=None):
    """Softmax attention of an attention layer: tokens [B, T, D] -> [B, heads, T, T]."""
    q, k = project(attn, x, "query"), project(attn, x, "key")
    q, k = getattr(attn, "q_norm", nn.Identity())(q), getattr(attn, "k_norm", nn.Identity())(k)
    if rope is not None:
        first, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        q, k = (torch.cat([y[:, :, :first], apply_rot_embed_cat(y[:, :, first:], rope, half=half)], 2) for y in (q, k))
    return (q * attn.scale @ k.transpose(2, 3)).softmax(-1)


def log_bin(feats, hierarchy=2):
    """Log-binned descriptors (Amir et al., section 3.2): map [B, C, h, w] -> tokens [B, h*w, 17*C].

    Level k averages windows of 3^k (borders count what is inside) and takes the 8 neighbours at distance 3^k, and the centre
    for k = 0, in row-major order; neighbours outside are clamped to the border.
    """
    (b, _, h, w), bins = feats.shape, []
    feats = feats.clone(memory_format=torch.channels_last)  # contiguous() would keep odd strides of a batch of one
    for step in (3**k for k in range(hierarchy)):
        pooled = F.avg_pool2d(feats, step, stride=1, padding=step // 2, count_include_pad=False) if step > 1 else feats
        padded = F.pad(pooled, [step] * 4, mode="replicate").permute(0, 2, 3, 1)  # [B, h + 2*step, w + 2*step, C]
        offsets = [at for at in product((0, step, 2 * step), repeat=2) if step == 1 or at != (step, step)]
        bins += [padded[:, y : y + h, x : x + w] for y, x in offsets]
    return torch.stack(bins, 3).view(b, h * w, -1)


def divisors(n):
    """The divisors of n as text, for messages."""
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)


# ---- files ----------------------------------------------------------------------------------------------------------


def read_image(path):
    """Read any image file, upright, as an RGB PIL image; 16-bit greys are scaled to 8 bits.

    Raises ValueError or OSError, in one line that names the file, for a missing, damaged or over-large one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image at {path}: correct the path")
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these at 255
                values = np.nan_to_num(np.asarray(image, dtype=np.float32))
                scale = 257 if values.max(initial=0) > 255 else 1
                image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to be read safely ({error}): make it smaller") from error
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} is not a readable image ({first_line(error)}): replace or remove it") from error


def list_images(path):
    """Images of a file, a folder (with its subfolders) or a glob pattern, sorted. Raises ValueError if there is none."""
    if Path(path).is_file():
        return [Path(path)]
    found = Path(path).rglob("*") if Path(path).is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(f for f in found if f.suffix.lower() in IMAGES and f.is_file())
    if not files:
        raise ValueError(f"no images at {path}: pass an image, a folder of images or a quoted pattern")
    return files


@contextmanager
def replacing(path):
    """Give a temporary path beside `path`, renamed to it at the end and removed on failure; makes the folder.

    Raises OSError, in one line that names the file, for whatever keeps it from being written.
    """
    path, name = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        yield Path(name)
        os.chmod(name, 0o666 & ~UMASK)  # mkstemp's files are private
        os.replace(name, path)
    except Exception as error:  # a full disk is an OSError to Python, a RuntimeError to torch
        raise OSError(f"cannot write {path} ({first_line(error)}): free some space or pass another path") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)  # still there only if something went wrong


def settings(args):
    """Every flag of a run and the versions that made its numbers, as a dict that JSON can hold."""
    libraries = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np}
    versions = {"python": platform.python_version()} | {name: lib.__version__ for name, lib in libraries.items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()} | {"versions": versions}


# ---- command lines --------------------------------------------------------------------------------------------------


class Command(argparse.ArgumentParser):
    """An argument parser for one script: whatever is wrong is one line on stderr, and exit status 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")

    def run(self, main, argv=None):
        """Call main(args). ValueError and OSError are bad input (with LIFT_TRACEBACK=1 they are raised)."""
        args = self.parse_args(argv)
        try:
            main(args)
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        except (MemoryError, RuntimeError) as error:  # torch's own kinds of it, on a GPU and on a CPU
            if isinstance(error, RuntimeError) and "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
            self.error(f"out of memory ({first_line(error)}): pass smaller images or batches")
        except (ValueError, OSError) as error:
            if os.environ.get("LIFT_TRACEBACK"):
                raise
            self.error(error)


def add_backbone_args(parser, **defaults):
    """Add the flags that ViTExtractor.from_args reads; `defaults` overrides theirs by name."""
    group = parser.add_argument_group("backbone")
    group.add_argument("--model_type", "--model", default="dino_vits16", help=f"{', '.join(BACKBONES)}, or any timm ViT")
    group.add_argument("--backbone_path", help="weight file (.pth, .safetensors) instead of a download")
    group.add_argument("--facet", default="key", choices=FACETS, help="facet of the descriptors (default: key)")
    group.add_argument("--layer", type=int, help="layer, counted from 0 (default: the last)")
    group.add_argument("--stride", type=int, help="pixels between descriptors, a divisor of the patch (default: the patch)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    group.add_argument("--dtype", default="float32", choices=list(DTYPES), help="precision inside (default: float32)")
    parser.set_defaults(**defaults)


def parser():
    """The command line of this file: descriptors of one image, as in Amir et al.'s release."""
    command = Command(__doc__)
    command.add_argument("--image_path", required=True, help="the image")
    command.add_argument("--output_path", required=True, help="the .pth to write")
    command.add_argument("--load_size", type=int, default=224, help="pixels of the shorter side (default: 224)")
    command.add_argument("--bin", nargs="?", const="True", default="False", help="log-binned descriptors (True or False)")
    add_backbone_args(command, model_type="dino_vits8", stride=4)
    return command


def main(args):
    """Write the descriptors [1, 1, t, C] of one image."""
    extractor = ViTExtractor.from_args(args)
    images, _ = extractor.preprocess(args.image_path, args.load_size)
    descriptors = extractor.extract_descriptors(images, bin=args.bin.lower() in ("true", "1", "yes")).cpu()
    with replacing(args.output_path) as temporary:
        torch.save(descriptors, temporary)
    print(json.dumps(settings(args) | {"shape": list(descriptors.shape), "grid": extractor.grid(*images.shape[-2:])}))


if __name__ == "__main__":
    parser().run(main)
