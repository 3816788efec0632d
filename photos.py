"""Photos in and pictures out: read, list and fit any image, show features as colours.

    photo = read_image("assets/sample.jpg")                  # PIL, RGB, upright
    photo = fit(photo, patch=16, load_size=224)              # sides are multiples of 16
    coarse, fine = pca_rgb([feats, dense])                   # [C, h, w] each -> uint8 [h, w, 3]

How pixels become 8-bit RGB:
- Transparent pixels lie on white, as every viewer shows them.
- Of an animation, a document of pages or a pair of pictures the first one counts.
- Of numbers of more than 8 bits, white is the largest number of 8, 10, 12, 14 or 16 bits, the
  fewest that hold the largest value in the file. So a camera's 12 bits in a file of 16 are not
  nearly black. Of floating point numbers up to 1 white is 1.
- Numbers that this does not suit are stretched: their lowest thousandth becomes black, their
  highest white. These are negative ones, those of more than 16 bits, and floating point numbers
  beyond 1 that reach less than a quarter of white.

Notation: C channels, H W image pixels, h w the grid of a map.
"""

import glob
import mmap
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from command import note

Name = TypeVar("Name", str, Path)
LoadSize = int | tuple[int, int] | None  # of the shorter side, (H, W), or the photo's own

# suffixes of the files that count as images in a folder or pattern
IMAGES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".png", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
}  # fmt: skip

# the library for what phones write, where it is installed
HEIC = {".heic", ".heif", ".hif"}
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    IMAGES |= HEIC

# cameras' own files; in some of them Pillow finds nothing but a thumbnail
RAW = {
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf",
    ".pef", ".srw", ".3fr", ".iiq", ".raw", ".rwl", ".x3f",
}  # fmt: skip

# suffixes of other files that may be taken for photos
NOT_READ = HEIC | RAW | {
    ".jxl", ".jxr", ".wdp", ".ico", ".icns", ".pcx", ".psd", ".psb", ".xcf", ".svg", ".svgz",
    ".eps", ".exr", ".hdr", ".dds", ".dcm", ".fits", ".pdf", ".mp4", ".mov", ".m4v", ".avi",
    ".mkv", ".webm",
}  # fmt: skip

MOVIE = ("a movie", "take its frames, as with ffmpeg -i MOVIE frames/%05d.png")
WEB_PAGE = ("a web page", "download the photo itself")
DRAWING = ("an SVG drawing, or other XML", "export it as PNG")
HEIC_PHOTO = ("an HEIC photo", "pip install pillow-heif, or convert it to JPEG")

# what files are that are not photos, by how they begin (at a byte), and what to do with them;
# those in small letters are text, which may begin with blanks and in capitals
SIGNS = (
    (0, b"%PDF", ("a PDF document", "render its pages, as with pdftoppm -png")),
    (4, b"ftyphe", HEIC_PHOTO),
    (4, b"ftypmif1", HEIC_PHOTO),
    (4, b"ftypmsf1", HEIC_PHOTO),
    (4, b"ftyp", MOVIE),
    (8, b"AVI ", MOVIE),
    (0, b"\x1aE\xdf\xa3", MOVIE),
    (0, b"\xff\x0a", ("a JPEG XL photo", "convert it, as with djxl")),
    (4, b"JXL ", ("a JPEG XL photo", "convert it, as with djxl")),
    (0, b"\x93NUMPY", ("a NumPy array", "save it as PNG")),
    (0, b"PK\x03\x04", ("a zip archive", "unpack it")),
    (0, b"version https://git-lfs", ("a pointer of Git LFS", "run git lfs pull")),
    (0, b"<!doctype html", WEB_PAGE),
    (0, b"<html", WEB_PAGE),
    (0, b"<svg", DRAWING),
    (0, b"<?xml", DRAWING),
)

OURS = ("alternatives", "iterations", "pca", "attn", "mask", "pred")  # see `ours`
LONGEST = 32  # times the shorter side: a picture of 5000x20 pixels is a strip, not a photo

TOLD = mmap.mmap(-1, 1)  # a byte that worker processes share, so that a run has one such note

# Pillow warns of large images, and refuses those of twice that size: the refusal is enough
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- reading ------------------------------------------------------------------------------------


def read_image(path: str | Path, upright: bool = True) -> Image.Image:
    """Read any image file as an 8-bit RGB PIL image (see the top of this file).

    Args:
        upright: turn the photo as its EXIF orientation says. Annotations count the pixels as they
            are stored: pass False for a data set.
    Raises:
        FileNotFoundError, ValueError: in one line that names the file and what it is, for one that
            is missing, damaged, over-large or not a photo.
        MemoryError: it does not fit into memory.
    """
    check_path(path)
    path = Path(path)
    if not path.is_file():
        what = "a folder, not an image," if path.is_dir() else "no image"
        raise FileNotFoundError(f"there is {what} at {path}: correct the path")
    if path.suffix.lower() in RAW:
        raise ValueError(f"{path} is a camera's raw file: export it as JPEG or TIFF")
    try:
        with open_image(path) as image:
            if upright:
                return rgb(ImageOps.exif_transpose(image), path)
            pixels = rgb(image, path)
            pixels.info.clear()  # else as_photo would find EXIF's orientation, and turn it
            return pixels
    except MemoryError as error:
        raise MemoryError(f"{path} is too large") from error
    except Exception as error:  # damaged files raise nearly anything
        kind, remedy = what_it_is(path, error)
        raise ValueError(f"{path} is {kind}: {remedy}") from error


def check_path(path: str | Path) -> None:
    """Raise ValueError for an empty path, which would mean the current folder, and for a URL."""
    wrong = ""
    if not str(path).strip():
        wrong = "the path of the photos is empty (an unset variable?): pass a path"
    elif re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # a Path keeps one slash
        wrong = f"{path} is a URL: download the photo, and pass the file"
    if wrong:
        raise ValueError(wrong)


def what_it_is(path: Path, error: Exception) -> tuple[str, str]:
    """What a file is that cannot be read as an image, and what to do."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to be read safely ({error})", "make it smaller"
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        return "an empty file", "replace or remove it"
    text = begin.lstrip().lower()
    for at, sign, known in SIGNS:
        if begin[at:].startswith(sign) or text.startswith(sign):
            return known
    return f"not a readable image ({error or type(error).__name__})", "replace or remove it"


def rgb(image: Image.Image, name: str | Path = "an image") -> Image.Image:
    """A PIL image of any mode as 8-bit RGB; `name` is for the note on its range."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        grey = Image.fromarray(eight_bits(values, image.mode == "F", name))
        return grey.convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def open_image(path: Path) -> Image.Image:
    """Open a file with Pillow, or read by OpenCV what Pillow reads wrong or not at all.

    Of colours in 16 bits Pillow keeps the upper 8, which is right only if all 16 are used. TIFFs
    of several floats a pixel, or of 64 bits, it does not know.
    """
    image = None
    with suppress(UnidentifiedImageError):
        image = Image.open(path)
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        if not deep or image.mode not in ("RGB", "RGBA", "LA"):
            return image
    with path.open("rb") as file:
        is_tiff = file.read(4) in (b"II*\0", b"MM\0*")
    pixels: Any = None
    if image is not None or is_tiff:
        import cv2

        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return Image.open(path)
    pixels = np.atleast_3d(pixels)  # [H, W, 1], or BGR, or BGRA
    if image is not None and pixels[..., :3].max() >= 2**14:
        return image
    floating = pixels.dtype.kind == "f"
    colours = eight_bits(pixels[..., :3].astype(np.float64), floating, path)
    channels = [np.broadcast_to(colours[..., ::-1], (*colours.shape[:2], 3))]
    if pixels.shape[2] == 4:
        channels.append(eight_bits(pixels[..., 3:].astype(np.float64), floating, path))
    picture = Image.fromarray(np.concatenate(channels, axis=2))
    if image is not None:
        picture.info["exif"] = image.getexif().tobytes()
    return picture


def eight_bits(values: np.ndarray, floating: bool, name: str | Path) -> np.ndarray:
    """Numbers of any range as uint8, by the rule at the top of this file, with a note."""
    known = values[np.isfinite(values)]
    if not known.size:
        return np.zeros(values.shape, np.uint8)
    low, high = float(known.min()), float(known.max())
    black = 0.0
    white = 1.0 if floating else 255.0
    for bits in (8, 10, 12, 14, 16):
        if high > white:
            white = 2.0**bits - 1
    if low < 0 or high > white or (floating and 1 < high < white / 4):
        black, white = (float(value) for value in np.percentile(known, (0.1, 99.9)))
    if (black, white) != (0, 1) and TOLD[0] == 0:
        TOLD[0] = 1
        rule = f"{black:g} is read as black, {white:g} as white; other such files by the same rule"
        note(f"{name} has values from {low:g} to {high:g}, and {rule}")

    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    shares = (values - black) / max(white - black, 1e-12)
    return np.rint(255 * shares.clip(0, 1)).astype(np.uint8)


def as_photo(image: Any, upright: bool = True) -> Image.Image:
    """An RGB PIL image of a path, a PIL image, an array or a tensor.

    Args:
        image: a path; a PIL image; an array [H, W, 3] uint8; or a tensor [3, H, W] or [1, 3, H, W],
            uint8 or floating point in 0..1.
        upright: turn a photo as its EXIF says.
    Raises:
        FileNotFoundError, ValueError: for what is none of these.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, upright)
    if isinstance(image, Image.Image):
        if upright:
            image = ImageOps.exif_transpose(image)
        return rgb(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.is_floating_point():
            image = image.float()
            if image.min() >= 0 and image.max() <= 1:
                image = image.mul(255).byte()
        if image.ndim == 4 and len(image) == 1:
            image = image[0]
        image = image.movedim(0, -1)  # [H, W, 3]
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        given = f"{array.dtype} of shape {list(array.shape)}"
        forms = "pass an array [H, W, 3] uint8, or a tensor [3, H, W], uint8 or in 0..1"
        raise ValueError(f"values of {given} are not a photo: {forms}")
    return Image.fromarray(np.ascontiguousarray(array))


def list_images(path: str | Path) -> list[Path]:
    """Images of a file, a folder with its subfolders, or a glob pattern, sorted.

    Folders behind links are searched, each once. Hidden files and folders are left out.

    Raises:
        ValueError: there is none; says what is there instead.
    """
    check_path(path)
    if Path(path).is_file():
        return [Path(path)]
    files = files_at(path)
    named = [file for file in files if file.suffix.lower() in IMAGES]
    # a link that leads nowhere counts, too, so that whoever reads it says so
    images = [file for file in named if file.is_file() or file.is_symlink()]
    if images:
        return sorted_naturally(images)
    found = left_out(files)
    if found:
        found = f", but {found}"
    elif not Path(path).exists() and not glob.has_magic(str(path)):
        found = ", which does not exist"
    remedy = "pass an image, a folder of images or a quoted pattern"
    raise ValueError(f"there are no images at {path}{found}: {remedy}")


def files_at(path: str | Path) -> list[Path]:
    """Whatever lies below a folder, through links too, or matches a pattern, but hidden files."""
    files = []
    if not Path(path).is_dir():
        files = [Path(name) for name in set(glob.glob(str(path), recursive=True))]
    seen = {Path(path).resolve()}  # two ways may lead to a folder, or one in a circle
    for folder, below, names in os.walk(path, followlinks=True):
        files += [Path(folder, name) for name in names]
        enter = []
        for name in sorted(below):
            place = Path(folder, name).resolve()
            if not name.startswith(".") and place not in seen:
                seen.add(place)
                enter.append(name)
        below[:] = enter  # os.walk goes on with what is left here
    return [file for file in files if not file.name.startswith(".")]


def note_left_out(path: str | Path) -> None:
    """At a script's end: tell in one line which files that may be photos list_images left out."""
    if Path(path).is_file():
        return
    others = left_out(files_at(path))
    if others:
        remedy = "convert them to JPEG (magick mogrify -format jpg FILES), or correct their suffix"
        if any(suffix in others for suffix in HEIC):
            remedy = f"pip install pillow-heif for HEIC, {remedy}"
        note(f"left out for their format: {others}: {remedy}")


def left_out(files: list[Path]) -> str:
    """How many files are not read but may be photos, by suffix: 3 .heic, 1 .jxl."""
    counts = Counter(map(looks_like_a_photo, files))
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()) if suffix)


def looks_like_a_photo(file: Path) -> str:
    """The suffix of a file that is not read but may be a photo; "" for all others."""
    suffix = file.suffix.lower()
    if suffix in IMAGES:
        return ""
    if suffix in NOT_READ:
        return suffix
    if suffix.startswith(tuple(IMAGES)):  # .jpg_large, or a blank at the end
        return repr(suffix)
    if not suffix and file.is_file():
        with suppress(OSError), file.open("rb") as opened:
            if opened.read(3) in (b"\xff\xd8\xff", b"\x89PN"):
                return "without a suffix"
    return ""


def sorted_naturally(names: Iterable[Name]) -> list[Name]:
    """Names or paths in order; numbers in them count as numbers, so 2.jpg comes before 10.jpg."""

    def key(name: Name) -> tuple[list[str], str]:
        parts = [re.sub(r"\d+", lambda run: run[0].zfill(32), part) for part in Path(name).parts]
        return parts, str(name)  # 1.jpg and 01.jpg: the same number

    return sorted(names, key=key)


def ours(path: str | Path) -> bool:
    """Whether a file has the name of a picture that one of our scripts wrote: cat.jpg_pca.png."""
    photo, _, kind = Path(path).stem.rpartition("_")
    return kind in OURS and Path(path).suffix == ".png" and Path(photo).suffix.lower() in IMAGES


def naming_root(path: str | Path) -> Path:
    """The folder below which photos are named: PATH itself, that of a file, or before a wildcard.

    It does not depend on which photos are there: one that is added later must not get the name,
    and the results, of another.
    """
    if Path(path).is_dir():
        return Path(path)
    folder = Path(path).parent
    while glob.has_magic(str(folder)) and not Path(path).is_file():
        folder = folder.parent
    return folder


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread over the sequence."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


# ---- fitting ------------------------------------------------------------------------------------


def is_strip(width: int, height: int) -> bool:
    """Whether a picture is so long that its resized version would be huge."""
    return max(width, height) > LONGEST * min(width, height)


def fitted_size(width: int, height: int, patch: int, load_size: LoadSize = None) -> tuple[int, int]:
    """The size (W, H) at which a photo of width x height pixels is read.

    First `load_size` sets the size. Then each side is rounded to the nearest multiple of the
    patch, so that LiFT and backbone see one grid.

    Args:
        load_size: pixels of the shorter side, or both sides (H, W); None leaves the photo's own.
    Raises:
        ValueError: a side is less than one patch.
    """
    if isinstance(load_size, int | np.integer):
        shorter = min(width, height)
        # int() of the quotient, as torchvision's Resize rounds
        width = int(load_size * width / shorter)
        height = int(load_size * height / shorter)
    elif load_size is not None:
        height, width = load_size

    if min(width, height) < patch:
        size = f"{width}x{height} pixels are less than one patch ({patch})"
        raise ValueError(f"{size}: pass a larger load_size")
    width = int(width / patch + 0.5) * patch
    height = int(height / patch + 0.5) * patch
    return width, height


def fit(photo: Image.Image, patch: int, load_size: LoadSize = None) -> Image.Image:
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
    colours = [((unit - mean) @ basis).numpy() for unit in typical]
    low = np.min([np.percentile(of_map, 1, axis=0) for of_map in colours], axis=0)    # [3]
    high = np.max([np.percentile(of_map, 99, axis=0) for of_map in colours], axis=0)  # [3]

    pictures = []
    for feats, unit in zip(maps, cells):
        shares = (((unit - mean) @ basis).numpy() - low) / np.maximum(high - low, 1e-9)
        scaled = 255 * np.clip(shares, 0, 1)
        pictures.append(scaled.round().astype(np.uint8).reshape(*feats.shape[1:], 3))
    return pictures


def is_typical(unit: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask [h*w] of the unit cells [h*w, C]: False for outlying cells in a corner.

    They are far below the median cosine to the mean cell: by over five median deviations.
    """
    similarity = unit @ F.normalize(unit.mean(0), dim=0)  # [h*w]
    median = similarity.median()
    deviation = (similarity - median).abs().median()
    far = similarity < median - 5 * deviation
    return ~(far & corner_cells(height, width).flatten())


def corner_cells(height: int, width: int) -> torch.Tensor:
    """Which cells of a grid lie in its corners, which stand apart in many ViTs: a mask [h, w].

    A corner is a fourteenth of each side, which is one cell for 224 pixels and a patch of 16.
    """
    high = max(1, round(height / 14))
    wide = max(1, round(width / 14))
    corners = torch.zeros(height, width, dtype=torch.bool)
    for rows in (slice(0, high), slice(-high, None)):
        corners[rows, :wide] = True
        corners[rows, -wide:] = True
    return corners


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
