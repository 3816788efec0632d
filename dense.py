"""Any frozen network as a function from photos to a map of descriptors.

    images, photo = extractor.preprocess("assets/sample.jpg", load_size=224)   # [1, 3, H, W]
    feats = extractor(images)                                                  # [B, C, h, w]

`DenseExtractor` is what all of them have, so that nothing else asks which one it is: here
`MyExtractor` for anybody's module, and `ViTExtractor` in extractor.py.

Notation: B batch, C channels, p patch size, s stride, H W image pixels, h w descriptor grid,
t = h*w, T = t + prefix tokens (CLS, registers).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from backbones import DTYPES, IMAGENET, pick_device, pick_device_or_fall_back
from files import first_line, weights_digest
from photos import as_photo, fit, fitted_size

# ---- numbers and names that serve two habits ----------------------------------------------------


class Side(int):
    """Pixels along both axes: an int that also serves, and compares, as the pair (s, s).

    timm has pairs where DINO's own ViT has an int, and people's code expects either.
    """

    def __new__(cls, value: Any) -> "Side":
        if isinstance(value, (tuple, list)):
            if len(set(value)) != 1:
                raise ValueError(f"{value} differs between the axes: pass one number")
            value = value[0]
        return super().__new__(cls, value)

    def __getitem__(self, axis: int) -> int:
        return (int(self), int(self))[axis]

    def __iter__(self) -> Iterator[int]:
        return iter((int(self), int(self)))

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (tuple, list)):
            return tuple(self) == tuple(other)
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


class Device(str):
    """The name of a device, which equals that name and the torch.device: people compare either."""

    @property
    def type(self) -> str:
        return torch.device(self).type

    @property
    def index(self) -> int | None:  # type: ignore[override]
        return torch.device(self).index

    def __eq__(self, other: object) -> bool:
        return str(other) in (str(self), self.type)  # "cuda" means any of them

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


# ---- what every extractor has -------------------------------------------------------------------


class DenseExtractor(nn.Module):
    """A frozen network from normalised images [B, 3, H, W] to a map of descriptors [B, C, h, w].

    Attributes: name; tag (the name that a LiFT module's backbone is compared with); model (the
    network itself); layer and facet (None where it has none); patch and stride in pixels; channels
    (C; None for the facet attn, where it grows with the image); heads and depth of a ViT, else 1;
    mean and std, which may be set; digest (of the weights); device and dtype.

    Args:
        mean, std: of red, green and blue, by which images are normalised.
    """

    name: str
    tag: str
    model: nn.Module
    layer: int | None
    facet: str | None
    patch: int
    channels: int | None
    heads: int = 1
    depth: int = 1
    digest: str
    exact_size: bool = False
    mean_rgb: Tensor
    std_rgb: Tensor

    def __init__(self, mean: Any, std: Any):
        super().__init__()
        self.register_buffer("mean_rgb", rgb_column(mean), persistent=False)
        self.register_buffer("std_rgb", rgb_column(std), persistent=False)

    # -- what code of other projects sets, too, sometimes before it calls __init__, which decides --

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of red, green and blue that images are normalised by."""
        return as_numbers(self.mean_rgb)

    @mean.setter
    def mean(self, value: Any) -> None:
        if "_buffers" in self.__dict__:
            self.mean_rgb = rgb_column(value).to(self.mean_rgb.device)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of red, green and blue that images are normalised by."""
        return as_numbers(self.std_rgb)

    @std.setter
    def std(self, value: Any) -> None:
        if "_buffers" in self.__dict__:
            self.std_rgb = rgb_column(value).to(self.std_rgb.device)

    @property
    def stride(self) -> Side:
        """Pixels between descriptors, as a number and as the pair (s, s)."""
        return Side(self._stride)

    @stride.setter
    def stride(self, value: Any) -> None:
        self._stride = checked_stride(value, self.__dict__.get("patch"))

    @property
    def device(self) -> Any:
        """Where the network is; it equals "cpu" as well as torch.device("cpu")."""
        device = self._weight().device
        if torch.compiler.is_compiling():
            return device
        return Device(device)

    @device.setter
    def device(self, value: Any) -> None:
        if "_buffers" in self.__dict__:
            self.to(pick_device_or_fall_back(value, "float32"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision the network runs in."""
        return self._weight().dtype

    def _weight(self) -> Tensor:
        """Some weight of the network."""
        return next(self.model.parameters(), self.mean_rgb)

    # -- images in --

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
        rows = 1 + (height - self.patch) // self._stride
        columns = 1 + (width - self.patch) // self._stride
        return rows, columns

    def size(
        self, width: int, height: int, load_size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The size (W, H) at which a photo is read (photos.fitted_size)."""
        return fitted_size(width, height, self._multiple(), load_size)

    def fit(
        self, photo: Image.Image, load_size: int | tuple[int, int] | None = None
    ) -> Image.Image:
        """Resize an RGB photo to `size`, once."""
        return fit(photo, self._multiple(), load_size)

    def _multiple(self) -> int:
        """What the sides of a photo are rounded to multiples of."""
        return 1 if self.exact_size else self.patch

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
        photo = self.fit(as_photo(image_path, upright=not self.exact_size), load_size)
        return self.preprocess_pil(photo), photo

    def preprocess_pil(self, photo: Image.Image) -> Tensor:
        """Normalise a PIL image of any size as it is: [1, 3, H, W] on the CPU."""
        pixels = transforms.functional.to_tensor(photo.convert("RGB"))
        return ((pixels - self.mean_rgb.cpu()) / self.std_rgb.cpu())[None]

    def check_images(self, images: Any) -> None:
        """Raise ValueError unless these are RGB images of at least one patch."""
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            what = f"the network takes a tensor [B, 3, H, W], not {describe(images)}"
            raise ValueError(f"{what}: pass preprocess(photo)[0]")
        height, width = images.shape[-2:]
        if min(height, width) < self.patch:
            what = f"an image of {height}x{width} pixels is less than one patch ({self.patch})"
            raise ValueError(f"{what}: pass a larger one")

    # -- what it is --

    def facts(self) -> dict[str, Any]:
        """What decides the features."""
        return {
            "backbone": self.tag,
            "layer": self.layer,
            "facet": self.facet,
            "stride": self._stride,
            "digest": self.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def __repr__(self) -> str:
        facts = f"layer={self.layer}, facet={self.facet!r}, patch={self.patch}"
        facts = f"{facts}, stride={self._stride}, channels={self.channels}, device={self.device!r}"
        return f"{type(self).__name__}({self.name!r}, {facts})"


def rgb_column(values: Any) -> Tensor:
    """Three numbers, in a sequence or a tensor, as float32 [3, 1, 1]."""
    return torch.as_tensor(values, dtype=torch.float32).detach().cpu().clone().view(3, 1, 1)


def as_numbers(column: Tensor) -> tuple[float, ...]:
    """A float32 tensor as numbers of seven digits: 0.485, not 0.48500001430511475."""
    numbers = column.flatten().tolist()
    return tuple(round(number, 7) for number in numbers)


def checked_stride(stride: Any, patch: int | None) -> int:
    """A stride, given as a number or a pair; ValueError unless it divides the patch."""
    stride = int(Side(stride))
    if patch is not None and (stride < 1 or patch % stride):
        divisors = ", ".join(str(n) for n in range(1, patch + 1) if patch % n == 0)
        what = f"stride {stride} does not divide the patch ({patch})"
        raise ValueError(f"{what}: pass one of {divisors}")
    return stride


# ---- anybody's module ---------------------------------------------------------------------------


class MyExtractor(DenseExtractor):
    """Any module from images [B, 3, H, W] to [B, C, h, w] or [B, T, C], used like a ViTExtractor.

    The module's attributes `mean` and `std`, where it has them, normalise the images, else
    ImageNet's do. Of T tokens the last h*w are taken: CLS and registers are dropped.

    Args:
        imsize: pixels of the square image by which patch and channels are found out.
    Raises:
        ValueError: the module does not take such an image.
    """

    def __init__(self, module: nn.Module, name: str, imsize: int, device: str, dtype: str):
        mean = getattr(module, "mean", IMAGENET[0])
        std = getattr(module, "std", IMAGENET[1])
        super().__init__(mean, std)
        self.name = self.tag = name
        self.layer = self.facet = None
        place = pick_device(device, dtype)
        self.digest = weights_digest(module)
        self.model = module.to(place, DTYPES[dtype]).requires_grad_(False).eval()
        self.to(place)

        try:
            with torch.no_grad():
                out = self.model(torch.zeros(1, 3, imsize, imsize).to(place, DTYPES[dtype]))
            if not isinstance(out, Tensor) or out.ndim not in (3, 4):
                raise TypeError(f"it gives {describe(out)}, not [B, C, h, w] or [B, T, C]")
            if out.ndim == 3:
                # tokens [1, T, C]; isqrt rounds down: a prefix is too short for one more row
                rows = math.isqrt(out.shape[1])
                self.channels = out.shape[2]
            else:  # a map [1, C, h, w]
                rows = out.shape[2]
                self.channels = out.shape[1]
            self.patch = imsize // rows
            self.stride = self.patch
        except (RuntimeError, AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
            what = f"{name} does not take images of {imsize} pixels ({first_line(error)})"
            raise ValueError(f"{what}: pass a network that does") from error
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, h, w] float32."""
        self.check_images(images)
        weight = self._weight()
        x = self.model(images.to(weight.device, weight.dtype))
        if x.ndim == 3:
            rows, columns = self.grid(*images.shape[-2:])
            if x.shape[1] < rows * columns:
                size = f"{images.shape[2]}x{images.shape[3]}"
                what = f"{self.name} gives {x.shape[1]} tokens for an image of {size}"
                raise ValueError(f"{what}: pass a size that it is made for")
            x = x[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        return x.float()


def describe(out: Any) -> str:
    """What something is, for a message: the shape of a tensor, else its type."""
    if isinstance(out, Tensor):
        return f"a tensor of shape {list(out.shape)}"
    kind = type(out).__name__
    article = "an" if kind[0] in "AEIOaeio" else "a"
    return f"{article} {kind}"
