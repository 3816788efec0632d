"""LiFT: a small convolutional module that doubles the resolution of a frozen ViT's descriptors.

    lift = load_lift("pretrained/lift_vit_mini16.pth", extractor)
    dense = upsample(lift, images, extractor(images), iterations=2)      # [B, C, 4h, 4w]

Suri et al., "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors",
ECCV 2024 (arXiv 2403.14625).

Notation: B batch, C descriptor channels, p patch size, H W image pixels, h = H/p and w = W/p the
patch grid, t = h*w tokens, R the radius of the attention in cells, G its heads.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import note
from files import first_line, load_tensors

# ---- tokens and maps ----------------------------------------------------------------------------


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, h*w, C] in row-major order, and their grid (h, w) -> map [B, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(feats: Tensor) -> Tensor:
    """Map [B, C, h, w] -> tokens [B, h*w, C] in row-major order."""
    return feats.flatten(2).transpose(1, 2)


def double(x: Tensor) -> Tensor:
    """Bilinear upsampling of [B, C, h, w] to [B, C, 2h, 2w], corners not aligned."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# ---- the module ---------------------------------------------------------------------------------


def conv_bn_relu(c_in: int, c_out: int, stride: int = 1, bias: bool = True) -> list[nn.Module]:
    """The layers of a 3x3 convolution, its batch norm and a ReLU."""
    convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
    return [convolution, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class ConvLayers(nn.Sequential):
    """Layers of conv_bn_relu, and whatever follows them.

    In eval mode a batch norm is a fixed scale and shift of each channel. They go into the weights
    of its convolution, which costs next to nothing, instead of over the whole map. `fold` does that
    once and for all, for a module that is frozen.
    """

    is_folded = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h', w']."""
        if self.training:
            return super().forward(x)
        if self.is_folded and self[0].weight.requires_grad:
            self.unfold()  # somebody trains the weights, in eval mode: what is kept goes stale
        for number, layer in enumerate(self):
            if isinstance(layer, nn.Conv2d):
                weight, bias = self._with_norm(number)
                x = F.conv2d(x, weight, bias, layer.stride, layer.padding)
            elif not hasattr(layer, "running_var"):
                x = layer(x)
            # what is left are batch norms: each was applied with the convolution before it
        return x

    def _with_norm(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution at this place, with the batch norm that follows it."""
        if self.is_folded:
            return self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}")
        return with_norm(self[number], self[number + 1])  # type: ignore[arg-type]

    def fold(self) -> None:
        """Keep every convolution's weights with its batch norm; the state_dict stays as it is."""
        for number, layer in enumerate(self):
            if isinstance(layer, nn.Conv2d):
                weight, bias = with_norm(layer, self[number + 1])
                self.register_buffer(f"weight_{number}", weight.detach(), persistent=False)
                self.register_buffer(f"bias_{number}", bias.detach(), persistent=False)
        self.is_folded = True

    def unfold(self) -> None:
        """Forget what `fold` kept."""
        for name in [name for name, _ in self.named_buffers(recurse=False)]:
            delattr(self, name)
        self.is_folded = False

    def train(self, mode: bool = True) -> "ConvLayers":
        """Training changes the weights, so that what `fold` kept would be outdated."""
        if mode:
            self.unfold()
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """New weights: what `fold` kept is outdated."""
        self.unfold()
        super()._load_from_state_dict(*arguments)


def with_norm(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does the work of a batch norm in eval mode, too."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [c_out]
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each with batch norm and ReLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        layers = conv_bn_relu(c_in, c_out, bias=False) + conv_bn_relu(c_out, c_out, bias=False)
        self.double_conv = ConvLayers(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, h, w] -> [B, c_out, h, w]."""
        return self.double_conv(x)


class Up(nn.Module):
    """Double the grid of a map and fuse it with a finer one."""

    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_in // 2, 2, stride=2)
        self.conv_1 = DoubleConv(c_in // 2 + c_skip, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, c_in, h, w] and [B, c_skip, 2h, 2w] -> [B, c_out, 2h, 2w]."""
        return self.conv_1(torch.cat([self.up(x), skip], dim=1))


class LiFT(nn.Module):
    """The LiFT module of one backbone, layer and facet (LiFT paper, section 3 and figure 2).

    With `attend` = R > 0 it is a variant that is not in the paper. Every fine cell gets a weighted
    sum of the (2R+1)^2 coarse features around it, and the paper's output, which starts at zero, is
    added to that. The weights start as those of bilinear upsampling. One more 1x1 convolution,
    beside the last layer and on the same input, adds a learned change to each. (UPLiFT's local
    attender, Walmer et al., arXiv 2601.17950, takes a softmax instead.) With `heads` > 1 the
    channels of each head have weights of their own, and a 1x1 convolution `value` first adds a
    learned change to the coarse features. All that is added starts at zero.

    The paper's module has the reference's state_dict keys. A variant has one entry more, `options`,
    by which load_lift knows it. Layers are made in the release's order, so that a seed starts from
    the weights that it has there.

    Args:
        in_channels: C.
        patch_size: the backbone's p.
        pre_shape: features may come as tokens [B, h*w, C], as the reference's callers give them.
        post_shape: they are then returned as tokens. A map that comes where tokens may is returned
            as a map.
        attend: R, in cells.
        heads: of the attention; they divide C.
    """

    bilinear: Tensor  # see bilinear_weights; with `attend` only

    def __init__(
        self,
        in_channels: int,
        patch_size: int = 16,
        pre_shape: bool = True,
        post_shape: bool = True,
        attend: int = 0,
        heads: int = 1,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.pre_shape = pre_shape
        self.post_shape = post_shape
        self.radius = attend
        self.heads = heads

        self.up1 = Up(in_channels + 32, 32, in_channels // 2)
        self.outc = nn.Conv2d(in_channels // 2, in_channels, 1)
        layers = conv_bn_relu(3, 32, 2) + conv_bn_relu(32, 32, 2)
        if patch_size != 8:
            layers.append(nn.MaxPool2d(2))
        self.image_convs_1 = ConvLayers(*layers)
        self.image_convs_2 = ConvLayers(*conv_bn_relu(32, 32, 2))

        self.value: nn.Conv2d | None = None
        if attend:
            self.attend = nn.Conv2d(in_channels // 2, heads * (2 * attend + 1) ** 2, 1)
            if heads > 1:
                self.value = nn.Conv2d(in_channels, in_channels, 1)
                start_at_zero(self.value)
            start_at_zero(self.attend)
            start_at_zero(self.outc)
            # the second number was 1 in residual modules, which are no longer read
            options = torch.tensor([patch_size, 0, attend], dtype=torch.float32)
            self.register_buffer("options", options)
            self.register_buffer("bilinear", bilinear_weights(attend), persistent=False)

    def forward(self, images: Tensor, feats: Tensor) -> Tensor:
        """Double the resolution of an image's features.

        Args:
            images: normalised, [B, 3, H, W].
            feats: [B, C, h, w]; with `pre_shape` tokens [B, h*w, C] too.
        Returns:
            [B, C, 2h, 2w]; with `post_shape`, for tokens, [B, 4*h*w, C].
        Raises:
            ValueError: not h = H/p and w = W/p.
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        # tokens return as tokens and maps as maps; without pre_shape, post_shape alone decides
        as_tokens = self.post_shape and not (self.pre_shape and feats.ndim == 4)
        if self.pre_shape and feats.ndim == 3 and feats.shape[1] == grid[0] * grid[1]:
            feats = tokens_to_map(feats, grid)
        self._check(images, feats, grid)

        if self.patch_size not in (8, 16):
            images = resize_to_cells(images, grid)                   # the path of p = 16
        image_2x = self.image_convs_1(images)                        # [B, 32, 2h, 2w]
        image_1x = self.image_convs_2(image_2x)                      # [B, 32, h, w]
        x = self.up1(torch.cat([feats, image_1x], dim=1), image_2x)  # [B, C//2, 2h, 2w]
        out = self.outc(x)                                           # [B, C, 2h, 2w]
        if self.radius:
            if self.value is not None:
                feats = feats + self.value(feats)
            change = self.attend(x)                                  # [B, G*(2R+1)^2, 2h, 2w]
            out = out + weigh_neighbours(feats, change, self.bilinear, self.radius, self.heads)

        if as_tokens:
            return map_to_tokens(out)
        return out

    def fold(self) -> None:
        """Let batch norms go into the convolutions once and for all; for a frozen module."""
        for module in self.modules():
            if isinstance(module, ConvLayers):
                module.fold()

    def _check(self, images: Tensor, feats: Tensor, grid: tuple[int, int]) -> None:
        """Raise ValueError unless the features are those of the patches of the images."""
        p = self.patch_size
        height, width = images.shape[2:]
        wrong = ""
        remedy = f"resize the image to a multiple of the patch ({p})"
        if tuple(feats.shape[2:]) != grid:
            given = "x".join(str(size) for size in feats.shape[1:])
            if feats.ndim == 4:
                given = f"{feats.shape[2]}x{feats.shape[3]}"
            wanted = f"an image of {height}x{width} gives {grid[0]}x{grid[1]}"
            wrong = f"the feature grid is {given} but {wanted}"
            remedy += f" and take its features at stride {p}"
        elif (height, width) != (grid[0] * p, grid[1] * p):
            wrong = f"an image of {height}x{width} has a side that is not a multiple of the patch"
        if wrong:
            raise ValueError(f"{wrong}: {remedy}")


def start_at_zero(layer: Any) -> None:
    """Let a layer give nothing until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def resize_to_cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize images of any patch size to 16 pixels a cell, antialiased.

    In float32: antialiasing does not exist in half precision on a CPU.
    """
    size = (16 * grid[0], 16 * grid[1])
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return resized.to(images.dtype)


def weigh_neighbours(
    feats: Tensor, change: Tensor, bilinear: Tensor, radius: int, heads: int
) -> Tensor:
    """Give every fine cell a weighted sum of the K = (2R+1)^2 coarse features around its parent.

    The parent is the coarse cell that the fine cell is a quarter of. At the border the outermost
    features are repeated.

    Args:
        feats: the coarse features [B, C, h, w].
        change: [B, G*K, 2h, 2w], what each of the G heads adds to each neighbour's weight in
            bilinear upsampling; neighbours are in row-major order.
        bilinear: those weights, [K, 2, 2] (see bilinear_weights).
        radius: R.
        heads: G. As in the descriptors, channel = d * G + head.
    Returns:
        [B, C, 2h, 2w]; where `change` is zero, the features bilinearly doubled.
    """
    height, width = feats.shape[2:]
    size = 2 * radius + 1
    # split each fine axis into the coarse cell and which of its two halves
    change = change.unflatten(3, (width, 2)).unflatten(2, (height, 2))    # [B, G*K, h, 2, w, 2]
    change = change.unflatten(1, (heads, -1))                             # [B, G, K, h, 2, w, 2]
    weights = change + bilinear.to(change.dtype)[:, None, :, None, :]
    weights = weights.permute(2, 0, 3, 4, 5, 6, 1).contiguous()           # [K, B, h, 2, w, 2, G]

    # channels last, and the channels of a head side by side
    padded = F.pad(feats, [radius] * 4, mode="replicate")                 # [B, C, h + 2R, w + 2R]
    padded = padded.permute(0, 2, 3, 1).unflatten(3, (-1, heads))         # [B, .., .., C/G, G]
    padded = padded.transpose(3, 4).contiguous()                          # [B, .., .., G, C/G]
    neighbours = []                                                       # K of [B, h, w, G, C/G]
    for top in range(size):
        for left in range(size):
            neighbours.append(padded[:, top : top + height, left : left + width])

    if weights.requires_grad:
        # in training a product, whose backward takes a tenth of the time of the sum's below
        by_child = weights.permute(1, 2, 4, 6, 3, 5, 0).flatten(4, 5)     # [B, h, w, G, 4, K]
        sums = by_child @ torch.stack(neighbours, dim=4)                  # [B, h, w, G, 4, C/G]
        total = sums.unflatten(4, (2, 2)).permute(0, 1, 4, 2, 5, 3, 6)
    else:
        # one neighbour after the other, so that no tensor of K times the size exists
        total = feats.new_zeros(feats.shape[0], height, 2, width, 2, heads, feats.shape[1] // heads)
        for number, neighbour in enumerate(neighbours):  # a trace cannot iterate over a tensor
            total.addcmul_(neighbour[:, :, None, :, None], weights[number, ..., None])
    total = total.transpose(5, 6).flatten(5)                              # [B, h, 2, w, 2, C]
    return total.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)          # [B, C, 2h, 2w]


def bilinear_weights(radius: int) -> Tensor:
    """The weights by which bilinear upsampling makes a cell's four children from its neighbours.

    [(2R+1)^2, 2, 2]: the neighbours in row-major order, then a child's row and column. A child's
    centre lies a quarter of a coarse cell from its parent's. A neighbour's weight falls linearly
    with the distance along each axis, to zero at one cell.
    """
    neighbours = torch.arange(-radius, radius + 1, dtype=torch.float32)
    centres = torch.tensor([-0.25, 0.25])
    distance = (neighbours[:, None] - centres[None, :]).abs()             # [2R+1, 2]
    along = (1 - distance).clamp(min=0)
    both = along[:, None, :, None] * along[None, :, None, :]              # [2R+1, 2R+1, 2, 2]
    return both.flatten(0, 1)


def upsample(
    lift: nn.Module, images: Tensor, feats: Tensor, iterations: int = 1, return_all: bool = False
) -> Any:
    """Apply LiFT several times (LiFT paper, section 3.3).

    Between two steps the current image is doubled bilinearly. Inside, the module's own precision is
    used.

    Args:
        images: normalised, [B, 3, H, W].
        feats: [B, C, h, w].
        iterations: n, 0 or more.
        return_all: return the features after every step, as a list that begins with those given.
    Returns:
        [B, C, 2^n h, 2^n w] float32; with `return_all` the list of n + 1 maps.
    Raises:
        ValueError: `iterations` is negative, or images and features do not fit.
    """
    if iterations < 0:
        raise ValueError(f"{iterations} iterations: pass 0 or more")
    outc: Any = lift.outc
    dtype = outc.weight.dtype
    current = images.to(feats.device, dtype, memory_format=torch.channels_last)
    x = feats.to(dtype, memory_format=torch.channels_last)
    steps = [x]
    for step in range(iterations):
        if step > 0:
            current = double(current)
        x = lift(current, x)
        if return_all:
            steps.append(x)
    if return_all:
        return [step_feats.float() for step_feats in steps]
    return x.float()


# ---- checkpoints --------------------------------------------------------------------------------

REMEDY = "pass a lift.pth written by train_lift.py"
AUTHORS_FOLDER = "https://drive.google.com/drive/folders/12Q8n_vur3njOgAO1iu0P6tDIcszrnadd"
AUTHORS_FILES = {
    "lift_dino_vits16.pth",
    "lift_dino_vits8.pth",
    "lift_dino_vitb16.pth",
    "lift_dino_vitb8.pth",
    "lift_vit_small_patch16.pth",
    "lift_vit_base_patch16.pth",
    "lift_vit_base_patch8.pth",
}


class LiFTFile(NamedTuple):
    """A LiFT checkpoint as it was read, before there is a backbone."""

    path: Path
    state: dict[str, Tensor]
    facts: dict[str, Any]  # what it was trained for, from the JSON beside it; empty without one
    patch: int | None      # None: nothing tells it
    attend: int
    heads: int

    @property
    def channels(self) -> int:
        """C."""
        return self.state["outc.weight"].shape[0]


def read_lift(path: str | Path) -> LiFTFile:
    """Read a LiFT checkpoint, and the JSON beside it, on the CPU; nothing in them is executed.

    A `module.` prefix is taken off the keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a LiFT checkpoint, its weights are not finite, or it is a residual
            module, which this version does not run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LiFT checkpoint at {path}: {where_to_get(path)}")
    loaded = load_tensors(path, REMEDY, REMEDY)
    state = {key.removeprefix("module."): value for key, value in loaded.items()}
    others = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
    wrong = ""
    if others:
        wrong = f"is not a LiFT checkpoint ({others[0]} is not a tensor)"
    elif "outc.weight" not in state or state["outc.weight"].ndim != 4:
        wrong = "is not a LiFT checkpoint (it has no outc.weight)"
    elif not all(value.isfinite().all() for value in state.values()):
        wrong = "holds NaN or infinite weights"
    if wrong:
        raise ValueError(f"{path} {wrong}: {REMEDY}")

    facts = read_facts(path)
    patch, residual, radius, heads = facts.get("patch"), facts.get("residual"), 0, 1
    if "options" in state:
        patch, residual, radius = (int(option) for option in state["options"].tolist())
    if "attend.weight" in state:
        heads = len(state["attend.weight"]) // (2 * radius + 1) ** 2
    if residual:
        what = f"{path} is a residual LiFT module, which only versions before this one run"
        raise ValueError(f"{what}: take the backbone's attention module or the paper's")
    return LiFTFile(path, state, facts, patch, radius, heads)


def where_to_get(path: Path) -> str:
    """What to do about a checkpoint that is missing, for the end of a message."""
    if path.name in AUTHORS_FILES:
        return f"download the authors' {path.name} from {AUTHORS_FOLDER}, or train one"
    return "correct --lift_path, or train one with train_lift.py"


def read_facts(path: Path) -> dict[str, Any]:
    """What a module was trained for: the dict of `NAME.json`, or `lift.json`, beside it.

    Returns:
        At least backbone, layer and facet; an empty dict if there is neither file.
    Raises:
        ValueError: the file is not a JSON object with these.
    """
    for beside in (path.with_suffix(".json"), path.with_name("lift.json")):
        if not beside.is_file():
            continue
        try:
            facts = json.loads(beside.read_text())
            for key in ("backbone", "layer", "facet"):
                facts[key]  # raises where it is missing
            return facts
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"{beside} does not say backbone, layer and facet ({error!r})"
            raise ValueError(f"{what}: restore or delete it") from error
    return {}


def check_fits(file: LiFTFile, extractor: Any) -> None:
    """Refuse a module that was trained for another extractor than this one.

    Other weights under the backbone's name are noted on stderr: fine-tuned ones may be meant.

    Raises:
        ValueError: in one sentence, for another backbone, layer, facet, patch, stride or number of
            channels.
    """
    ours = {"backbone": extractor.tag, "layer": extractor.layer, "facet": extractor.facet}
    wrong = []
    for key, value in ours.items():
        if file.facts.get(key, value) != value:
            wrong.append(f"{key} {file.facts[key]}, not {value}")
    if file.patch not in (None, extractor.patch):
        wrong.append(f"patches of {file.patch} pixels, not {extractor.patch}")
    if file.channels != extractor.channels:
        channels = extractor.channels or "as many as there are tokens"
        wrong.append(f"descriptors of {file.channels} channels, not {channels}")
    if wrong:
        what = f"{file.path} was trained for {' and '.join(wrong)}"
        raise ValueError(f"{what}: choose its own backbone, layer and facet, or another module")
    if extractor.stride != extractor.patch:
        raise ValueError(
            f"LiFT works on the patch grid, and stride {extractor.stride} is finer than the patch "
            f"({extractor.patch}): leave out the stride for LiFT, or LiFT for the stride"
        )
    if file.facts.get("digest") not in (None, extractor.digest):
        what = f"{file.path} was trained on other weights of {extractor.name} than these"
        note(f"{what} ({file.facts['digest']}, not {extractor.digest})")


def load_lift(
    path: str | Path | LiFTFile,
    extractor: Any = None,
    patch_size: int = 16,
    silent: bool = False,
) -> LiFT:
    """Make a LiFT module of a checkpoint, frozen and in eval mode, to be used with an extractor.

    It goes to the extractor's device and dtype. If a JSON file beside it tells what it was trained
    for, another backbone, layer or facet is refused; if there is none, a note says so.

    Args:
        path: of the checkpoint, or what read_lift gave.
        extractor: a DenseExtractor; without one only the file counts.
        patch_size: p, where neither extractor nor file tell it.
        silent: keep the note back.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a LiFT checkpoint, or does not fit the extractor.
    """
    file = path if isinstance(path, LiFTFile) else read_lift(path)
    if not file.facts and not silent:
        note(f"no JSON beside {file.path} tells its backbone, layer and facet; taken on trust")
    patch = file.patch or patch_size
    if extractor is not None:
        check_fits(file, extractor)
        patch = extractor.patch
    if file.patch is None and patch not in (8, 16) and not silent:
        note(
            f"for patches of {patch} pixels the image is resized to 16 pixels a cell here; LoftUp's"
            " LiFT pools instead, and a module trained by its code needs its code"
        )

    lift = LiFT(file.channels, patch, attend=file.attend, heads=file.heads)
    try:
        lift.load_state_dict(file.state, strict=True)
    except RuntimeError as error:
        one_line = " ".join(str(error).split())  # torch's own first line names no key
        raise ValueError(f"{file.path}: {first_line(one_line)}: {REMEDY}") from error

    lift.requires_grad_(False).eval()
    lift.fold()
    if extractor is not None:
        lift = lift.to(extractor.device, extractor.dtype)
    return lift
