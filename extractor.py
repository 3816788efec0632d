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
from pathlib import Path
from typing import Any

from command import (
    FACETS,
    Command,
    add_backbone_args,
    check_range,
    limit_memory,
    report,
    settings,
    truth,
)
from files import save_tensors, weights_digest


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
    add(
        "--exact_size", action="store_true",
        help="read the photo as dino-vit-features does: not turned as its EXIF says, and its sides "
        "not rounded to multiples of the patch",
    )  # fmt: skip
    add_backbone_args(command, stride=4)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from torch import Tensor, nn

from backbones import (
    DTYPES,
    build_backbone,
    call_function,
    pick_device,
    pick_device_or_fall_back,
    resolve,
    use_full_float32,
)
from dense import DenseExtractor, MyExtractor, Side, checked_stride
from photos import as_photo

FOREIGN = ("register_tokens", "storage_tokens", "rope_embed")
TOKENS = ("token", "token_norm")  # facets that are outputs of a block

# what `from extractor import *` also brings in dino-vit-features: its users' code relies on it
import math
import types  # noqa: F401
from typing import List, Tuple, Union  # noqa: F401, UP035

import timm  # noqa: F401
from PIL import Image  # noqa: F401
from torchvision import transforms  # noqa: F401

# ---- frozen ViTs --------------------------------------------------------------------------------


class ViTExtractor(DenseExtractor):
    """A frozen ViT whose call gives a map of descriptors.

    Facets: `key`, `query` and `value` are outputs of a block's qkv projection, before attention;
    `token` is the block's output, before the final norm, and `token_norm` the same after that norm;
    `attn` is its softmax attention to all T tokens.

    Attributes: those of DenseExtractor, and for code written for dino-vit-features model_type, `p`
    (the patch) and, after an extraction, `num_patches` (h, w) and `load_size` (H, W) of the last
    batch.

    Args:
        model_type: a row of BACKBONES or the name of a ViT in timm.
        stride: pixels between descriptors, a divisor of the patch; None is the patch.
        model: a ViT module to use instead of building one.
        device: cuda on a machine without one falls back to what there is, with a note.
        backbone_path: a weight file instead of a download.
        layer: counted from 0; None is the last.
        dtype: precision inside; descriptors are float32. On CUDA torch may run float32 convolutions
            in TF32 unless you set `torch.backends.cudnn.allow_tf32 = False`, as the scripts do.
        requires_grad: let gradients reach the images; the ViT stays frozen.
        exact_size: read photos as dino-vit-features does: not turned as their EXIF says, and their
            sides not rounded to multiples of the patch.
    """

    def __init__(
        self,
        model_type: str = "dino_vits8",
        stride: int | tuple[int, int] | None = 4,
        model: nn.Module | None = None,
        device: str | torch.device | None = "cuda",
        backbone_path: str | Path | None = None,
        layer: int | None = None,
        facet: str = "key",
        dtype: str = "float32",
        requires_grad: bool = False,
        exact_size: bool = False,
    ):
        row = resolve(model_type)
        super().__init__(*row.mean_std)
        self.name = self.model_type = model_type
        self.tag = model_type if row.file else row.tag
        self.positions = row.positions
        self.gradients = requires_grad
        self.exact_size = exact_size

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

    def _read_facts(self, stride: Any, layer: int | None, facet: str) -> None:
        """Read patch, heads, depth and channels off the model; check stride, layer and facet."""
        embed: Any = getattr(self.model, "patch_embed", None)
        blocks: Any = getattr(self.model, "blocks", None)
        projection: Any = getattr(embed, "proj", None)
        of_rgb_patches = isinstance(projection, nn.Conv2d) and projection.in_channels == 3
        of_blocks = blocks and hasattr(getattr(blocks[0], "attn", None), "qkv")
        # parts of Meta's own modules, which timm calls otherwise: they would silently be left out
        foreign = [name for name in FOREIGN if getattr(self.model, name, None) is not None]
        if not of_rgb_patches or not of_blocks or foreign:
            parts = ", ".join(foreign) or "patches of RGB, then blocks with attention"
            what = f"{self.name} is not a plain ViT as timm builds it ({parts})"
            raise ValueError(f"{what}: pass a ViT of timm, or weights as backbone_path")

        self.patch = projection.kernel_size[0]
        embed.patch_size = Side(self.patch)
        self.stride = self.patch if stride is None else stride
        self.depth = len(blocks)
        if layer is None:
            layer = self.depth - 1
        self.layer, self.facet = self._checked(layer, facet)
        attn = blocks[self.layer].attn
        self.heads = attn.num_heads
        if facet == "attn":
            self.channels = None
        elif facet in TOKENS:
            self.channels = projection.out_channels
        else:
            self.channels = attn.proj.in_features

    def _checked(self, layer: int, facet: str) -> tuple[int, str]:
        """A layer and a facet; ValueError unless they exist."""
        wrong = ""
        if not 0 <= layer < self.depth:
            layers = f"{self.name} has layers 0 to {self.depth - 1}"
            wrong = f"layer {layer} is out of range: {layers}, pass one of these"
        elif facet not in FACETS:
            wrong = f"unknown facet {facet}: pass one of {', '.join(FACETS)}"
        if wrong:
            raise ValueError(wrong)
        return layer, facet

    # -- names of dino-vit-features --

    @staticmethod
    def create_model(model_type: str) -> nn.Module:
        """The ViT of a name, with its weights (build_backbone)."""
        return build_backbone(model_type)

    @staticmethod
    def patch_vit_resolution(model: nn.Module, stride: int | tuple[int, int]) -> nn.Module:
        """Change the stride of a ViT in place, as no ViTExtractor does, and return the ViT."""
        projection: Any = model.patch_embed.proj  # type: ignore[union-attr]
        step = checked_stride(stride, projection.kernel_size[0])
        projection.stride = (step, step)
        return model

    @property
    def p(self) -> int:
        """The patch."""
        return self.patch

    @p.setter
    def p(self, value: Any) -> None:
        self.patch = int(Side(value))

    def get_num_patches(self, height: int, width: int) -> tuple[int, int]:
        """The descriptor grid (h, w) of an image."""
        return self.grid(height, width)

    def _log_bin(self, x: Tensor, hierarchy: int = 2) -> Tensor:
        """log_bin of [B, heads, t, d] on the grid of the last batch: [B, 1, t, 17*C]."""
        assert self.num_patches, "nothing was extracted yet"
        feats = join_heads(x).transpose(1, 2).unflatten(2, self.num_patches)
        return log_bin(feats, hierarchy)[:, None]

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

        side = math.isqrt(patches.shape[1])  # a square where the model does not tell its grid
        native = getattr(self.model.patch_embed, "grid_size", None) or (side, side)
        if tuple(grid) == tuple(native):
            return patches, prefix
        if self.positions == "dino":
            return interpolate_positions(patches, native, grid), prefix
        resampled = resample_abs_pos_embed(patches, list(grid), list(native), num_prefix_tokens=0)
        return resampled, prefix

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] -> the tokens that enter the first block [B, T, D], prefix first."""
        patch_embed: Any = self.model.patch_embed
        projection = patch_embed.proj
        # the projection's own weights at our stride: the model itself stays untouched
        x = F.conv2d(images, projection.weight, projection.bias, stride=self._stride)
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
            return [{}] * self.depth
        rope = self.model.rope.get_embed(shape=grid)  # type: ignore[union-attr,operator]
        if getattr(self.model, "rope_mixed", False):  # positions of its own for each block
            return [{"rope": of_block} for of_block in rope]
        return [{"rope": rope}] * self.depth

    def _choose_attention(self, tokens: int) -> None:
        """No fused attention for few tokens in bfloat16 on a CPU: it takes twice the time there."""
        if torch.compiler.is_compiling():
            return
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            for block in self.model.blocks:  # type: ignore[union-attr]
                block.attn.fused_attn = tokens > 512

    def _facets(self, images: Tensor, wanted: list[tuple[int, str]]) -> list[Tensor]:
        """Run the ViT up to the last of the (layer, facet) pairs that are wanted.

        Returns:
            One tensor for each pair, over all T tokens: [B, heads, T, d] for query, key and value,
            [B, 1, T, D] for `token` and `token_norm`, [B, heads, T, T] for `attn`.
        """
        self.check_images(images)
        height, width = images.shape[-2:]
        self.load_size = (height, width)
        self.num_patches = self.grid(height, width)

        found: dict[tuple[int, str], Tensor] = {}
        last = max(layer for layer, _ in wanted)
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            weight = self._weight()
            x = self.embed(images.to(weight.device, weight.dtype), self.num_patches)
            rotary = self._rotary(self.num_patches)
            self._choose_attention(x.shape[1])
            for number in range(last + 1):
                block: Any = self.model.blocks[number]  # type: ignore[index]
                facets = [facet for layer, facet in wanted if layer == number]

                # all facets but tokens are read on the way into the block's attention
                outputs = [facet for facet in facets if facet in TOKENS]
                if len(outputs) < len(facets):
                    entering = attention_input(block, x)
                for facet in facets:
                    if facet == "attn":
                        found[number, facet] = attention(block.attn, entering, **rotary[number])
                    elif facet not in TOKENS:
                        found[number, facet] = project(block.attn, entering, facet)

                # the last block itself has to run only for its output
                if number < last or outputs:
                    x = block(x, **rotary[number])
                if "token" in outputs:
                    found[number, "token"] = x[:, None]
                if "token_norm" in outputs:
                    found[number, "token_norm"] = self.model.norm(x)[:, None]  # type: ignore
        return [found[pair] for pair in wanted]

    def _wanted(self, layer: Any, facet: Any) -> tuple[list[tuple[int, str]], bool]:
        """The (layer, facet) pairs that are asked for, and whether the caller gave a list.

        One goes with every item of the other's list; two lists are paired in order.
        """
        several = isinstance(layer, (list, tuple)) or isinstance(facet, (list, tuple))
        layers = as_list(self.layer if layer is None else layer)
        facets = as_list(self.facet if facet is None else facet)
        if len(layers) == 1:
            layers = layers * len(facets)
        if len(facets) == 1:
            facets = facets * len(layers)
        return [self._checked(*pair) for pair in zip(layers, facets, strict=True)], several

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
        maps = []
        found = self._facets(images, pairs)
        grid = self.grid(*images.shape[-2:])
        for x in found:                                             # [B, heads, T, d]
            tokens = join_heads(x[:, :, self._prefix_count() :])    # [B, t, C]
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))  # [B, C, h, w]
        if several:
            return maps
        return maps[0]

    def _extract_features(
        self, batch: Tensor, layers: list[int], facet: str = "key"
    ) -> list[Tensor]:
        """Several layers in one pass, all T tokens, under the name of dino-vit-features.

        Returns:
            A tensor for each layer, in the order of the blocks as there: [B, heads, T, d], of a
            `token` facet [B, T, D], of `attn` [B, heads, T, T].
        """
        pairs, _ = self._wanted(sorted(set(layers)), facet)
        found = self._facets(batch, pairs)
        if facet in TOKENS:
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
            include_cls: put the CLS token first (t + 1); not with `bin`.
        Raises:
            ValueError: the backbone does not have what is asked for.
        Source: Amir et al., section 3.
        """
        assert not (bin and include_cls), "bins of a CLS token do not exist"
        if include_cls:
            self._check_cls()
        pairs, several = self._wanted(layer, facet)
        descriptors = []
        for x in self._facets(batch, pairs):                      # [B, heads, T, d]
            patches = x[:, :, self._prefix_count() :]
            if include_cls:
                patches = torch.cat([x[:, :, :1], patches], dim=2)
            if bin:
                descriptors.append(self._log_bin(patches))        # [B, 1, t, 17*C]
            else:
                descriptors.append(join_heads(patches)[:, None])  # [B, 1, t, C]
        if several:
            return descriptors
        return descriptors[0]

    def extract_saliency_maps(self, batch: Tensor) -> Tensor:
        """Saliency [B, t] in 0..1: what CLS attends to in the last layer.

        The mean of heads 0, 2, 4 and 5, min-max normalised for each image.

        Raises:
            ValueError: the backbone has no CLS token, or fewer than six heads.
        """
        self._check_cls(heads=6)
        attn = self._facets(batch, [(self.depth - 1, "attn")])[0]            # [B, heads, T, T]
        of_cls = attn[:, [0, 2, 4, 5], 0, self._prefix_count() :]            # [B, 4, t]
        saliency = of_cls.float().mean(1)                                    # [B, t]
        saliency = saliency - saliency.amin(1, keepdim=True)
        highest = saliency.amax(1, keepdim=True)
        return saliency / highest.clamp(min=torch.finfo(saliency.dtype).tiny)  # a flat map gives 0

    def _check_cls(self, heads: int = 1) -> None:
        """Raise ValueError unless the backbone has a CLS token, and so many heads."""
        if self.heads < heads or getattr(self.model, "cls_token", None) is None:
            what = f"a CLS token and {heads} heads are needed, and {self.name} lacks one of them"
            raise ValueError(f"{what}: pass dino_vits8")


def interpolate_positions(
    patches: Tensor, native: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Positions [1, N, D] of the native grid -> [1, t, D] of another one, as DINO's own code does.

    Bicubic, not antialiased, with the scale factor (n + 0.1)/sqrt(N) given as such.
    """
    square = patches.transpose(1, 2).unflatten(2, native).float()              # [1, D, H0, W0]
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
    if tuple(resized.shape[2:]) != tuple(grid):  # at a few sizes the rule loses a row
        resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(patches.dtype)                # [1, t, D]


def as_list(value: Any) -> list[Any]:
    """A list of a list, a tuple or a single value."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def attention_input(block: Any, x: Tensor) -> Tensor:
    """What a block's attention reads: its tokens normed, except in post-norm blocks."""
    kind = type(block).__name__
    if "PostNorm" in kind or "ResPost" in kind:
        return x
    return block.norm1(x)


def project(attn: Any, x: Tensor, facet: str) -> Tensor:
    """Query, key or value of tokens [B, T, D], before any norm of these: [B, heads, T, d]."""
    index = ("query", "key", "value").index(facet)
    if attn.qkv is None:
        y = (attn.q_proj, attn.k_proj, attn.v_proj)[index](x)
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
        if level > 0:
            pooled = F.avg_pool2d(feats, step, stride=1, padding=step // 2, count_include_pad=False)
        padded = F.pad(pooled, [step] * 4, mode="replicate")
        padded = padded.permute(0, 2, 3, 1)                 # [B, h + 2*step, w + 2*step, C]
        for top in (0, step, 2 * step):
            for left in (0, step, 2 * step):
                is_centre = top == step and left == step
                if level > 0 and is_centre:
                    continue
                bins.append(padded[:, top : top + height, left : left + width])
    return torch.stack(bins, 3).view(batch, height * width, -1)  # from [B, h, w, 17, C]


# ---- other networks ----------------------------------------------------------------------------


def my_extractor(args: argparse.Namespace) -> nn.Module:
    """Bare --my_extractor uses what this returns: write it. `args` are the flags."""
    what = "my_extractor(args) in extractor.py is still empty"
    raise ValueError(f"{what}: write it, or pass --my_extractor module:function")


# ---- from flags ---------------------------------------------------------------------------------


def build_extractor(args: argparse.Namespace) -> DenseExtractor:
    """The frozen network that the flags of add_backbone_args ask for.

    Raises:
        ValueError: something does not exist, or does not fit together.
    """
    use_full_float32()
    device = pick_device(args.device, args.dtype)
    if device.type == "cpu":
        limit_memory()
    extractor: DenseExtractor
    if args.my_extractor:
        module = call_function(args.my_extractor, args)
        imsize = getattr(args, "imsize", 224)
        extractor = MyExtractor(module, args.my_extractor, imsize, args.device, args.dtype)
    else:
        model = build_backbone(args.model_type, args.backbone_path, getattr(args, "ema", False))
        extractor = ViTExtractor(
            args.model_type, args.stride, model, device,
            layer=args.layer, facet=args.facet, dtype=args.dtype,
        )  # fmt: skip
    check_facts(extractor, args.channel, args.patch, "--")
    return extractor


def check_facts(
    extractor: DenseExtractor, channel: int | None, patch: int | None, dashes: str = ""
) -> None:
    """Raise ValueError if channel or patch are given (as flags, with dashes) and not its own."""
    facts = {"channel": (channel, extractor.channels), "patch": (patch, extractor.patch)}
    for name, (given, real) in facts.items():
        if given not in (None, real):
            what = f"{dashes}{name} {given}, but {extractor.name} {extractor.facet} has {real}"
            raise ValueError(f"{what}: leave {dashes}{name} out")


def main(args: argparse.Namespace) -> None:
    """Write the descriptors [1, 1, t, C] of one image."""
    check_range(args, load_size=0)
    if Path(args.output_path).suffix in (".npz", ".safetensors"):
        what = f"--output_path {args.output_path}, but only .pth is written here"
        raise ValueError(f"{what}: let it end in .pth, or use lift_extractor.py")
    as_photo(args.image_path)  # a missing photo is told before a backbone is built
    extractor = build_extractor(args)
    extractor.exact_size = args.exact_size
    images, _ = extractor.preprocess(args.image_path, args.load_size or None)

    feats = extractor(images)                           # [1, C, h, w]
    grid = list(feats.shape[2:])
    if args.bin:
        descriptors = log_bin(feats)                    # [1, t, 17*C]
    else:
        descriptors = feats.flatten(2).transpose(1, 2)  # [1, t, C]
    descriptors = descriptors[:, None].cpu().contiguous()
    save_tensors(args.output_path, descriptors)

    shape = list(descriptors.shape)
    print(f"{args.output_path}: descriptors {shape} of a grid of {grid[0]}x{grid[1]} cells")
    report(args, {**settings(args, **extractor.facts()), "shape": shape, "grid": grid})


if __name__ == "__main__":
    parser().run(main)
