"""Frozen networks: their names, their weights in every published format, and devices.

    model = build_backbone("dino_vits16")                         # timm's ViT, without head
    model = build_backbone("dinov2_vits14", "dinov2_vits14_pretrain.pth")

Backbones come from timm. A weight file may have timm's names of the tensors, or those of DINO,
Meta's DINOv2 and DINOv3, Hugging Face's transformers, MAE or MoCo v3, and may be a training's
checkpoint around them (see `load_backbone_file`).
"""

import argparse
import importlib
import inspect
import math
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from command import PRECISIONS, note
from files import first_line, load_tensors

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of red, green and blue
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Backbone(NamedTuple):
    """A named backbone."""

    tag: str  # timm's full name: a name without a tag changes its weights between releases
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    file: str | None = None  # weights in this repository
    positions: str = "dino"  # how they are resampled for other grids: as "dino" or "timm" does it


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
    "dinov2_vits14": Backbone("vit_small_patch14_dinov2.lvd142m", IMAGENET, None, "timm"),
    "dinov2_vitb14": Backbone("vit_base_patch14_dinov2.lvd142m", IMAGENET, None, "timm"),
    "dinov2_vits14_reg": Backbone("vit_small_patch14_reg4_dinov2.lvd142m", IMAGENET, None, "timm"),
    "dinov2_vitb14_reg": Backbone("vit_base_patch14_reg4_dinov2.lvd142m", IMAGENET, None, "timm"),
}


def resolve(name: str) -> Backbone:
    """The row of BACKBONES of this name, or one made for any other model of timm.

    Raises:
        ValueError: neither knows the name.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    cfg = None
    problem = "unknown model"
    if name == "vit_small_patch8_224":  # timm would give DINO's
        problem = "there are no supervised weights of"
    else:
        with suppress(RuntimeError):  # of a tag that does not exist
            cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*") or BACKBONES)
        raise ValueError(f"{problem} {name}: pass {known}, or another ViT of timm")

    tag = name
    if cfg.tag:
        tag = f"{cfg.architecture}.{cfg.tag}"
    for row in BACKBONES.values():
        if row.tag == tag and row.file is None:
            return row
    return Backbone(tag, (tuple(cfg.mean), tuple(cfg.std)), positions="timm")


# ---- weight files -------------------------------------------------------------------------------

# modules that wrap another one add their name to those of all tensors inside
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# the weights of the patch embedding, as timm and as transformers name them; what stands before
# them is a training's own prefix
EMBEDDING = r"(patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?)\.weight$"

# formats by a name that only they have; the first that is found counts
FORMATS = (
    (r"embeddings\.patch_embeddings\.weight$", "transformers' DINOv3"),
    (r"layer\.0\.layer_scale1\.", "transformers' DINOv2"),
    (r"embeddings\.patch_embeddings\.projection\.", "transformers' ViT"),
    (r"storage_tokens$", "Meta's DINOv3"),
    (r"decoder_embed\.", "MAE"),
    (r"register_tokens$|mask_token$", "Meta's DINOv2"),
    (r"base_encoder\.", "MoCo v3"),
    (r"patch_embed\.proj\.", "timm's names"),
)

# names of Hugging Face's transformers -> those of timm and Meta; q, k and v are joined afterwards
TRANSFORMERS = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)

# those of the large DINOv3, whose MLPs have a gate; they are renamed first
GATED = (
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
)

# what a backbone has no use for: heads, decoders, and positions that are computed
DROPPED = (
    "head.", "head_dist.", "classifier.", "pooler.", "decoder", "rope_embed.", "projectors.",
    "local_cls_norm.",
)  # fmt: skip


def load_backbone_file(
    model: nn.Module, path: str | Path, name: str = "the backbone", ema: bool = False
) -> None:
    """Fill a timm ViT from a weight file, strictly; heads are dropped.

    Args:
        name: of the model, for messages.
        ema: take the moving average that timm's training script keeps beside the weights.
    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or does not fit the model.
    """
    loaded = load_tensors(path, "correct backbone_path", "pass a .pth or .safetensors file")
    tensors = flatten(loaded)
    state = translate(one_network(tensors, path, ema), model, path)
    wanted = model.state_dict()

    # timm's filter would resample kernels of another patch, and say nothing
    kernel = "patch_embed.proj.weight"
    both = state.keys() & wanted.keys()
    same_patch = kernel in both and state[kernel].shape[2:] == wanted[kernel].shape[2:]
    if same_patch and "pos_embed" in both:
        state["pos_embed"] = fit_positions(state, model, path)
    if same_patch or kernel not in state:
        module: Any = sys.modules[type(model).__module__]
        with suppress(Exception):  # of a file that does not fit: the comparison below tells it
            state = module.checkpoint_filter_fn(dict(state), model)
    state.pop("mask_token", None)

    wrong = misfit(state, wanted)
    if wrong:
        what = f"{path}, read as {recognise(tensors)}, does not fit {name}, {wrong}"
        raise ValueError(f"{what}: pass the model_type it belongs to")
    model.load_state_dict(state)


def flatten(state: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint's nested dicts, under dotted names without those of wrappers."""
    tensors = {}
    for key, value in state.items():
        parts = [part for part in str(key).split(".") if part not in WRAPPERS]
        name = prefix + ".".join(parts)
        if isinstance(value, dict):
            tensors.update(flatten(value, f"{name}."))
        elif isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def recognise(tensors: dict[str, Tensor]) -> str:
    """The format of a checkpoint, in words."""
    for pattern, form in FORMATS:
        if any(re.search(pattern, name) for name in tensors):
            return form
    return "an unknown format"


def one_network(tensors: dict[str, Tensor], path: str | Path, ema: bool) -> dict[str, Tensor]:
    """The tensors of one backbone in a checkpoint, without prefix and heads; not of a student."""
    prefixes = {re.sub(EMBEDDING, "", name) for name in tensors if re.search(EMBEDDING, name)}
    averages = {prefix for prefix in prefixes if re.search(r"(^|[._])ema[._]", prefix)}
    if ema and not averages:
        raise ValueError(f"{path} holds no moving average (EMA): leave ema out")
    choices = prefixes - averages
    if ema or not choices:
        choices = averages
    prefix = ""
    if choices:  # rather the teacher than its student, rather MoCo's base encoder than the other
        prefix = min(choices, key=lambda name: ("student" in name, "momentum" in name, name))

    state = {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and not own.startswith(DROPPED):
            state[own] = value
    return state


def translate(state: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """A state under names that timm's own filter can read."""
    if any(name.startswith("embeddings.") for name in state):
        state = from_transformers(state)

    wanted = model.state_dict()
    translated = {}
    for name, value in state.items():
        # DINOv2's training saves chunks of blocks: blocks.CHUNK.BLOCK.
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        if "blocks.0.ls1.gamma" in wanted:  # DeiT III calls them gamma_1
            name = re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name)
        translated[name] = value
    if "register_tokens" in state:
        translated.setdefault("mask_token", torch.zeros(1))  # by this timm knows DINOv2

    # the biases of most DINOv3 are 0, and timm has models without them; its filter drops any others
    with_biases = any(name.endswith("q_bias") for name in wanted)
    if "storage_tokens" in state and not with_biases:
        for name in [name for name in state if name.endswith("attn.qkv.bias")]:
            query, _, value = translated.pop(name).chunk(3)
            if query.any() or value.any():
                what = f"{path} has biases of queries and values"
                raise ValueError(f"{what}: pass the model_type that ends in _qkvb")
    return translated


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names of Hugging Face's transformers -> under Meta's."""
    rules = list(TRANSFORMERS)
    if any(".gate_proj." in name for name in state):
        rules = [*GATED, *TRANSFORMERS]
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    if "pos_embed" not in renamed and "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")  # DINOv3

    joined = {}
    for name, value in renamed.items():
        query = re.fullmatch(r"(.+\.attn\.)q\.(weight|bias)", name)
        if query:
            start, end = query.groups()
            key = renamed.get(f"{start}k.{end}", torch.zeros_like(value))  # DINOv3: no key bias
            joined[f"{start}qkv.{end}"] = torch.cat([value, key, renamed[f"{start}v.{end}"]])
        elif not re.search(r"\.attn\.[kv]\.", name):
            joined[name] = value
    return joined


def fit_positions(state: dict[str, Tensor], model: Any, path: str | Path) -> Tensor:
    """The positions of a state [1, n, D], resampled to the model's grid where theirs differs."""
    table = state["pos_embed"]
    prefix_rows = model.num_prefix_tokens
    if getattr(model, "no_embed_class", False):
        prefix_rows = 0
    if "register_tokens" in state:
        prefix_rows = 1  # Meta's table has a row for CLS, which timm adds to the token itself
    theirs = native_grid(table[0, prefix_rows:])
    ours = tuple(model.patch_embed.grid_size)
    if theirs is None or theirs == ours:
        return table
    sizes = f"{theirs[0]}x{theirs[1]} positions of {path} are resampled to {ours[0]}x{ours[1]}"
    note(f"the {sizes}, the model's own grid")
    return resample_abs_pos_embed(table, list(ours), list(theirs), num_prefix_tokens=prefix_rows)


def native_grid(table: Tensor) -> tuple[int, int] | None:
    """The grid (h, w) of learned positions [h*w, D]; None for a number that gives none."""
    cells = len(table)
    side = math.isqrt(cells)
    if side * side == cells:
        return side, side

    # at most four times as long as wide, and cells above each other are most alike
    likeness = {}
    for width in range(1, cells):
        if cells % width == 0 and cells <= 4 * width**2 <= 16 * cells:
            alike = F.cosine_similarity(table[width:], table[:-width], dim=1)
            likeness[width] = alike.mean().item()
    if not likeness:
        return None
    width = max(likeness, key=lambda width: likeness[width])
    return cells // width, width


def misfit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What keeps a state from being loaded into a model, in words; "" for nothing."""
    shapes = []
    for key in wanted.keys() & state.keys():
        given, right = tuple(state[key].shape), tuple(wanted[key].shape)
        if given != right:
            shapes.append(f"{key} {given} where {right} is wanted")
    found = {
        "missing": wanted.keys() - state.keys(),
        "surplus": state.keys() - wanted.keys(),
        "of another shape": shapes,
        "not finite": [key for key, value in state.items() if not value.isfinite().all()],
    }
    wrong = []
    for what, keys in found.items():
        if keys:
            examples = ", ".join(sorted(keys)[:3])
            if len(keys) > 3:
                examples += ", ..."
            wrong.append(f"{len(keys)} {what} ({examples})")
    return "; ".join(wrong)


# ---- building -----------------------------------------------------------------------------------


def hub_answers() -> bool:
    """Whether timm's hub can be reached; its own client tries for most of a minute to find out."""
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    if hub.scheme in getproxies() or "all" in getproxies():
        return True  # the client goes through the proxy: a direct connection tells nothing
    port = hub.port or {"http": 80, "https": 443}[hub.scheme]
    try:
        socket.create_connection((str(hub.hostname), port), timeout=5).close()
        return True
    except OSError:
        return False


def build_backbone(
    name: str, backbone_path: str | Path | None = None, ema: bool = False
) -> nn.Module:
    """The timm ViT of a name, without head.

    Its weights come from `backbone_path`, else from this repository, else by timm's download.

    Args:
        ema: take the moving average of a timm checkpoint.
    Raises:
        ValueError: the name is not known or not that of a ViT, or its weights cannot be had.
        FileNotFoundError: there is no such file.
    """
    row = resolve(name)
    path = backbone_path
    if path is None and row.file:
        path = Path(__file__).parent / row.file

    constants = huggingface_hub.constants
    offline = constants.HF_HUB_OFFLINE  # the user's own setting, put back for a later try
    try:
        if path is None and not offline:
            constants.HF_HUB_OFFLINE = not hub_answers()  # then it looks into its cache only
        model = timm.create_model(
            row.tag, pretrained=path is None, num_classes=0, dynamic_img_size=True
        )
    except TypeError as error:
        what = f"{name} is not a plain ViT that takes images of any size"
        raise ValueError(f"{what}: pass a ViT of timm") from error
    except Exception as error:  # the hub's client, the network and the disk each raise their own
        reason = first_line(error)
        if constants.HF_HUB_OFFLINE and not offline:
            reason = "there is no connection to the hub"
        raise ValueError(
            f"cannot download {row.tag} ({reason}): pass a weight file as backbone_path, such as "
            f"model.safetensors of https://huggingface.co/timm/{row.tag}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
    if path is not None:
        load_backbone_file(model, path, name, ema)
    return model


def call_function(name: str, args: argparse.Namespace, flag: str = "--my_extractor") -> Any:
    """What somebody's `module:function` returns; it gets the flags if it takes an argument.

    Raises:
        ValueError: there is no such function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # the module is looked for beside the user, too
        sys.path.append(os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        what = f"there is no function {name} ({error})"
        raise ValueError(f"{what}: pass {flag} module:function") from error
    if inspect.signature(build).parameters:
        return build(args)
    return build()


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
        chosen = torch.device(str(device))
        # some devices hold a dtype but cannot multiply in it, so try a product
        one = torch.ones(1, 1, device=chosen, dtype=DTYPES[dtype])
        (one @ one).item()
        return chosen
    except (RuntimeError, AssertionError, TypeError) as error:
        what = f"device {device} cannot compute in {dtype} here ({first_line(error)})"
        known = "auto, cpu, cuda, cuda:N, mps"
        raise ValueError(f"{what}: take another device ({known}) or float32") from error


def pick_device_or_fall_back(device: str | torch.device | None, dtype: str) -> torch.device:
    """pick_device, but without a GPU cuda becomes auto, with a note: earlier code asks for it."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        chosen = pick_device("auto", dtype)
        note(f"there is no GPU here for device={str(device)!r}, running on {chosen}")
        return chosen
    return pick_device(device, dtype)


def use_full_float32() -> None:
    """On CUDA, multiply float32 in full: torch's TF32 has a mantissa of 10 bits, not 23."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
