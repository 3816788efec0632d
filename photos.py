"""Photos in and pictures out: read, list and fit any image, show features as colours.

    photo = read_image("assets/sample.jpg")                  # PIL, RGB, upright
    photo = fit(photo, patch=16, load_size=224)              # sides are multiples of 16
    coarse, fine = pca_rgb([feats, dense])                   # [C, h, w] each -> uint8 [h, w, 3]

Notation: C channels, H W image pixels, h w the grid of a map.
"""

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import to_pil_image

# suffixes of the files that count as images in a folder or pattern
IMAGES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".png", ".bmp", ".gif", ".tif", ".tiff",
    ".webp", ".avif", ".ppm", ".pgm",
}  # fmt: skip

# Pillow warns of large images, and refuses those of twice that size: the refusal is enough
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- reading ------------------------------------------------------------------------------------


def read_image(path: str | Path, upright: bool = True) -> Image.Image:
    """Read any image file as an RGB PIL image; 16-bit greys are scaled to 8 bits.

    Args:
        upright: turn the photo as its EXIF orientation says. Annotations count the pixels as they
            are stored: pass False for a data set.
    Raises:
        FileNotFoundError, ValueError: in one line that names the file, for a missing, damaged or
            over-large one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image at {path}: correct the path")
    try:
        with Image.open(path) as image:
            if upright:
                return rgb(ImageOps.exif_transpose(image))
            stored = rgb(image)
            stored.info.clear()  # else as_photo would find EXIF's orientation, and turn it
            return stored
    except Image.DecompressionBombError as error:
        what = f"{path} is too large to be read safely ({error})"
        raise ValueError(f"{what}: make it smaller") from error
    except Exception as error:  # damaged files raise nearly anything
        reason = str(error) or type(error).__name__
        what = f"{path} is not a readable image ({reason})"
        raise ValueError(f"{what}: replace or remove it") from error


def rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits as one of 8; Pillow itself would clip it at 255.

    Floating point values that are all in 0..1 are taken for shares of white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if image.mode == "F" and values.max(initial=0) <= 1:
        values *= 255
    if values.max(initial=0) > 255:
        values /= 257  # 65535 becomes 255
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def as_photo(image: Any) -> Image.Image:
    """An RGB PIL image of a path, a PIL image, an array or a tensor.

    Args:
        image: a path; a PIL image, which is turned as its EXIF says; an array [H, W, 3] uint8; or a
            tensor [3, H, W] or [1, 3, H, W], uint8 or floating point in 0..1.
    Raises:
        FileNotFoundError, ValueError: for what is none of these.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return rgb(ImageOps.exif_transpose(image))
    if isinstance(image, torch.Tensor):
        return tensor_photo(image)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        given = f"{array.dtype} of shape {list(array.shape)}"
        raise ValueError(f"an array of {given} is no photo: pass [H, W, 3] uint8")
    return Image.fromarray(array)


def tensor_photo(image: torch.Tensor) -> Image.Image:
    """A tensor [3, H, W] or [1, 3, H, W], uint8 or in 0..1, as a PIL image; else ValueError."""
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or len(image) != 3:
        raise ValueError(f"a tensor of shape {list(image.shape)} is no photo: pass [3, H, W]")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"a photo with values in {low:.3g}..{high:.3g}: pass 0..1, or uint8")
        image = image.float()
    return to_pil_image(image.cpu())


def list_images(path: str | Path) -> list[Path]:
    """Images of a file, a folder with its subfolders, or a glob pattern, sorted.

    Folders behind links are searched, each once. Hidden files and folders are left out.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = walk(Path(path))
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]

    images = set()  # a pattern may find a file twice
    for file in found:
        if file.suffix.lower() in IMAGES and not file.name.startswith(".") and file.is_file():
            images.add(file)
    if not images:
        remedy = "pass an image, a folder of images or a quoted pattern"
        raise ValueError(f"no images at {path}: {remedy}")
    return sorted(images)


def walk(root: Path) -> list[Path]:
    """All files below a folder, through links too; a folder that two ways lead to counts once."""
    seen = {root.resolve()}
    files = []
    for folder, below, names in os.walk(root, followlinks=True):
        files += [Path(folder, name) for name in names]
        enter = []
        for name in sorted(below):
            place = Path(folder, name).resolve()
            if not name.startswith(".") and place not in seen:
                seen.add(place)
                enter.append(name)
        below[:] = enter  # os.walk goes on with what is left here
    return files


def naming_root(path: str | Path) -> Path:
    """The folder below which the photos of a file, a folder or a pattern are named.

    It is the folder itself, that of the file, or what precedes the first wildcard. It does not
    depend on which photos are there: one that is added later must not get the name, and the
    results, of another.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file():
        return Path(path).parent
    folders = []
    for part in Path(path).parent.parts:
        if set(part) & set("*?["):
            break
        folders.append(part)
    return Path(*folders)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread over the sequence."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


# ---- fitting ------------------------------------------------------------------------------------


def fitted_size(
    width: int, height: int, patch: int, load_size: int | tuple[int, int] | None = None
) -> tuple[int, int]:
    """The size (W, H) at which a photo of width x height pixels is read.

    First `load_size` sets the size. Then each side is rounded to the nearest multiple of the
    patch, so that LiFT and backbone see one grid.

    Args:
        load_size: pixels of the shorter side, or both sides (H, W); None leaves the photo's own.
    Raises:
        ValueError: a side is less than one patch.
    """
    if isinstance(load_size, int | np.integer):
        load_size = int(load_size)
        shorter = min(width, height)
        longer = int(load_size * max(width, height) / shorter)
        if width == height:
            width, height = load_size, load_size
        elif width == shorter:
            width, height = load_size, longer
        else:
            width, height = longer, load_size
    elif load_size is not None:
        height, width = load_size

    if min(width, height) < patch:
        size = f"{width}x{height} pixels are less than one patch ({patch})"
        raise ValueError(f"{size}: pass a larger --load_size")
    if width % patch or height % patch:
        width = int(width / patch + 0.5) * patch
        height = int(height / patch + 0.5) * patch
    return width, height


def fit(
    photo: Image.Image, patch: int, load_size: int | tuple[int, int] | None = None
) -> Image.Image:
    """Resize an RGB photo to its fitted size, once, with LANCZOS."""
    size = fitted_size(photo.width, photo.height, patch, load_size)
    if size == photo.size:
        return photo
    return photo.resize(size, Image.Resampling.LANCZOS)


# ---- pictures -----------------------------------------------------------------------------------


def pca_rgb(maps: list[torch.Tensor]) -> list[np.ndarray]:
    """Show maps of one image in common colours: their first three principal components as RGB.

    One basis is fitted on the L2-normalised cells of all maps, and each map weighs the same. So a
    colour means the same in every picture. Corner cells that stand far apart from all others, as
    those of some ViTs do, have no part in the basis and in the range of colours.

    Args:
        maps: tensors [C, h_i, w_i] with one C.
    Returns:
        uint8 arrays [h_i, w_i, 3].
    """
    cells = []    # for each map: its unit cells [h*w, C]
    typical = []  # for each map: those of its cells that decide basis and range of colours
    for feats in maps:
        unit = F.normalize(feats.detach().cpu().float().flatten(1).t(), dim=1)
        cells.append(unit)
        typical.append(unit[is_typical(unit, feats.shape[1], feats.shape[2])])

    # mean and covariance of each map, averaged over maps and not over cells
    mean = torch.stack([unit.mean(0) for unit in typical]).mean(0)
    covariance = torch.zeros(len(mean), len(mean))
    for unit in typical:
        covariance += (unit - mean).t() @ (unit - mean) / len(unit)
    eigenvectors = torch.linalg.eigh(covariance).eigenvectors  # columns, the weakest first
    basis = eigenvectors[:, -3:].flip(1)                       # [C, 3], the strongest first

    # a sign that does not depend on the solver: the largest entry of a component is positive
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()

    # the range of each colour spans every map's own percentiles: the finest must not decide alone
    lows = []
    highs = []
    for unit in typical:
        colours = ((unit - mean) @ basis).numpy()
        low_and_high = np.percentile(colours, (1, 99), axis=0)  # [2, 3]
        lows.append(low_and_high[0])
        highs.append(low_and_high[1])
    low = np.min(lows, axis=0)
    high = np.max(highs, axis=0)

    pictures = []
    for feats, unit in zip(maps, cells):
        colours = ((unit - mean) @ basis).numpy()
        scaled = 255 * np.clip((colours - low) / np.maximum(high - low, 1e-9), 0, 1)
        pictures.append(scaled.round().astype(np.uint8).reshape(*feats.shape[1:], 3))
    return pictures


def is_typical(unit: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask [h*w] of the unit cells [h*w, C]: False for outlying cells in a corner.

    A corner is a fourteenth of each side, which is one cell for 224 pixels and a patch of 16. A
    cell is outlying if its cosine to the mean cell is far below the median: by more than five times
    the median absolute deviation.
    """
    similarity = unit @ F.normalize(unit.mean(0), dim=0)  # [h*w]
    median = similarity.median()
    deviation = (similarity - median).abs().median()
    far = similarity < median - 5 * deviation

    rows = torch.arange(height)
    columns = torch.arange(width)
    high = max(1, round(height / 14))
    wide = max(1, round(width / 14))
    at_top_or_bottom = (rows < high) | (rows >= height - high)
    at_a_side = (columns < wide) | (columns >= width - wide)
    in_corner = at_top_or_bottom[:, None] & at_a_side[None, :]  # [h, w]
    return ~(far & in_corner.flatten())


def titled_sheet(panels: list[tuple[str, Image.Image]], height: int = 336) -> Image.Image:
    """Pictures side by side on white, all of one height, each with its title above.

    The first panel is enlarged smoothly, as a photo; the others cell by cell, as maps.
    """
    bar = 28  # pixels for the titles
    gap = 8   # between pictures
    font = ImageFont.load_default(16)
    photo = panels[0][1]
    width = round(height * photo.width / photo.height)
    sheet = Image.new("RGB", (gap + len(panels) * (width + gap), height + bar + gap), "white")
    draw = ImageDraw.Draw(sheet)

    method = Image.Resampling.LANCZOS
    left = gap
    for title, panel in panels:
        sheet.paste(panel.resize((width, height), method), (left, bar))
        draw.text((left, 5), title, "black", font)
        left += width + gap
        method = Image.Resampling.NEAREST
    return sheet
