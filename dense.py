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
from photos import LoadSize, as_photo, fit, fitted_size

# ---- a number and a name that compare with what people's code expects ---------------------------


class Side(int):
    """Pixels along both axes: an int that also serves, and compares, as the pair (s, s).

    timm has pairs where DINO's own ViT has an int, and people's code expects either.
    """

    def __new__(cls, value: Any) -> "Side":
        if isinstance(value, (tuple, list)):
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

    Args:
        mean, std: of red, green and blue, by which images are normalised.
    """

    name: str
    tag: str  # the name that a LiFT module's backbone is compared with
    model: nn.Module
    layer: int | None  # None where it has none, as facet
    facet: str | None
    patch: int  # pixels, as stride
    channels: int | None  # C; None for the facet attn, where it grows with the image
    heads: int = 1
    depth: int = 1
    digest: str  # of the weights
    exact_size: bool = False
    mean_rgb: Tensor
    std_rgb: Tensor

    def __init__(self, mean: Any, std: Any):
        super().__init__()
        self.register_buffer("mean_rgb", rgb_column(mean), persistent=False)
        self.register_buffer("std_rgb", rgb_column(std), persistent=False)

    # -- what code of other projects also sets; before __init__ it has no effect --

    @property
    def mean(self) -> tuple[float, ...]:
        """Of red, green and blue, by which images are normalised; as std."""
        return as_numbers(self.mean_rgb)

    @mean.setter
    def mean(self, value: Any) -> None:
        if "_buffers" in self.__dict__:
            self.mean_rgb = rgb_column(value).to(self.mean_rgb.device)

    @property
    def std(self) -> tuple[float, ...]:
        """See mean."""
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
        """Where the network is: equal to "cpu" as well as to torch.device("cpu")."""
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
        return (images - self.mean_rgb.to(images.device)) / self.std_rgb.to(images.device)

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo `normalize`: [..., 3, H, W] -> the same in 0..1."""
        return images * self.std_rgb.to(images.device) + self.mean_rgb.to(images.device)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The descriptor grid (h, w) of an image of H x W pixels: 1 + (side - p)//s each."""
        rows = 1 + (height - self.patch) // self._stride
        columns = 1 + (width - self.patch) // self._stride
        return rows, columns

    def size(self, width: int, height: int, load_size: LoadSize = None) -> tuple[int, int]:
        """The size (W, H) at which a photo is read (photos.fitted_size)."""
        return fitted_size(width, height, 1 if self.exact_size else self.patch, load_size)

    def fit(self, photo: Image.Image, load_size: LoadSize = None) -> Image.Image:
        """Resize an RGB photo to `size`, once."""
        return fit(photo, 1 if self.exact_size else self.patch, load_size)

    def preprocess(self, image_path: Any, load_size: LoadSize = None) -> tuple[Tensor, Image.Image]:
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
        return self.normalize(transforms.functional.to_tensor(photo.convert("RGB")))[None]

    def check_images(self, images: Any) -> None:
        """Raise ValueError unless these are RGB images of at least one patch."""
        wrong = ""
        if not isinstance(images, Tensor):
            article = "an" if type(images).__name__[0] in "AEIOaeio" else "a"
            wrong = f"not {article} {type(images).__name__}: pass preprocess(photo)[0]"
        elif images.ndim != 4 or images.shape[1] != 3:
            wrong = f"not a tensor of shape {list(images.shape)}: pass preprocess(photo)[0]"
        elif min(images.shape[2:]) < self.patch:
            size = f"{images.shape[2]}x{images.shape[3]} pixels"
            wrong = f"and {size} are less than one patch ({self.patch}): pass a larger image"
        if wrong:
            raise ValueError(f"the network takes a tensor [B, 3, H, W], {wrong}")

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
    side = Side(stride)
    if patch is not None and (side != stride or side < 1 or patch % side):
        divisors = ", ".join(str(number) for number in range(1, patch + 1) if patch % number == 0)
        what = f"stride {stride} does not divide the patch ({patch})"
        raise ValueError(f"{what}: pass one of {divisors}")
    return int(side)


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
        super().__init__(getattr(module, "mean", IMAGENET[0]), getattr(module, "std", IMAGENET[1]))
        self.name = self.tag = name
        self.layer = self.facet = None
        place = pick_device(device, dtype)
        image = torch.zeros(1, 3, imsize, imsize, device=place, dtype=DTYPES[dtype])
        try:
            self.digest = weights_digest(module)
            self.model = module.to(place, DTYPES[dtype]).requires_grad_(False).eval()
            with torch.no_grad():
                out = self.model(image)
            if out.ndim == 4:
                _, self.channels, rows, _ = out.shape
            else:
                _, tokens, self.channels = out.shape
                rows = math.isqrt(tokens)  # rounds down: a prefix is too short for one more row
            self.patch = imsize // rows
        except Exception as error:  # of somebody's code
            what = f"{name} cannot be used on images of {imsize} pixels ({first_line(error)})"
            form = "a torch.nn.Module from images [B, 3, H, W] to [B, C, h, w] or [B, T, C]"
            raise ValueError(f"{what}: return {form}") from error
        self.stride = self.patch
        self.to(place).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> map [B, C, h, w] float32."""
        self.check_images(images)
        weight = self._weight()
        x = self.model(images.to(weight.device, weight.dtype))
        if x.ndim == 3:
            rows, columns = self.grid(*images.shape[-2:])
            x = x[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        return x.float()
