"""See what LiFT does to features: self-similarity, iterations and PCA, as pictures or a live page.

    python eval_visualize_feats.py --dataroot photos/ --model dino_vits16 --lift_path lift.pth
    python eval_visualize_feats.py --dataroot cat.jpg --lift_path lift.pth --keep_aspect --pca \\
        --query 120,80 --query 9,210
    python eval_visualize_feats.py --dataroot photos/ --lift_path lift.pth --html page.html

Draws sheets of 20 photos (--limit), chosen at random. A photo's sheets go into the same subfolder
of OUTPUT_DIR that it has in DATAROOT:

    PHOTO_alternatives.png   the photo, backbone, that doubled bilinearly, backbone on the photo at
                             double size, LiFT or another --upsample
    PHOTO_iterations.png     backbone, LiFT applied once, twice, ... (only with an upsampler)
    PHOTO_pca.png            with --pca: the first three principal components of all these maps, in
                             one basis, as red, green and blue

A map shows the cosine of one cell (the centre, or a --query) to every cell, from its least similar
(dark) to its most similar (bright), as the LiFT paper does (arXiv 2403.14625).

The cells in the four corners stand apart in many ViTs: their cosine to all others is low, whatever
the photo shows there. They are drawn, but do not decide where the dark colours begin.

With --html the same goes into a page, one file, on which the query follows the pointer; a photo
takes about a megabyte of it with four iterations. A second run overwrites the sheets of the first.
A photo takes about 4 s with ViT-S/16, four iterations and --pca on one CPU core.

Notation: C channels, H W image pixels, h w the grid of a map, Q queries. A point is x, y in pixels
of the photo; a cell is row, column.
"""

import argparse
import base64
import io
import json
import math
import os
import random
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    check_one_process,
    check_range,
    progress,
    report,
    settings,
    skipped,
    why_skipped,
)
from files import replacing, write_text

PANEL = 280  # pixels of the longer side of a panel; more where the backbone sees more
GAP = 12  # white between panels, in pixels

COMPONENTS = 128  # numbers a cell that the page keeps
PAGE = Path(__file__).parent / "assets/page.html"


def point(text: str) -> tuple[float, float]:
    """The point of --query X,Y."""
    try:
        x, y = text.split(",")
        return float(x), float(y)
    except ValueError:
        remedy = "pass x,y in pixels of the photo, such as 120,80"
        raise argparse.ArgumentTypeError(f"{text!r} is not a point: {remedy}") from None


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="a photo, a folder with subfolders, or a quoted pattern")
    add("--output_dir", default="visualizations", help="for the sheets (default: visualizations)")
    add("--imsize", type=int, default=224, help="pixels a side, in whole patches (default: 224)")
    add("--keep_aspect", action="store_true", help="--imsize is the shorter side, not both")
    add("--limit", type=int, default=20, help="photos to draw at random; 0: all (default: 20)")
    add("--seed", type=int, default=0, help="seed of that draw (default: 0)")
    add(
        "--query", type=point, action="append", default=[], metavar="X,Y",
        help="compare with the cell at this pixel of the photo; may be repeated (default: centre)",
    )  # fmt: skip
    add("--hide_marker", action="store_true", help="no ring around the query")
    add("--fontsize", type=int, default=18, help="of the titles, in pixels (default: 18)")
    add("--pca", action="store_true", help="also a sheet of principal components")
    add("--html", metavar="FILE", help="also a page on which the query follows the pointer")
    add_backbone_args(command)

    group = command.add_argument_group("upsampling", "What is compared with the alternatives.")
    add = group.add_argument
    add("--lift_path", metavar="FILE", help="LiFT checkpoint; without it its panels are left out")
    add("--lift_iter", type=int, help="apply LiFT up to this many times in a row (default: 4)")
    add(
        "--upsample", metavar="HOW",
        help="MODULE:FUNCTION for an upsampler of your own, see docs/upsamplers.md, none, bilinear "
        "or lift (default: lift with --lift_path, else none)",
    )  # fmt: skip
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports below

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import resize, to_tensor

from features import Features, build_features
from lift import double
from photos import (
    LoadSize,
    corner_cells,
    is_strip,
    list_images,
    naming_root,
    note_left_out,
    ours,
    pca_rgb,
    read_image,
)

# viridis, from dark to bright: [256, RGB]
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
COLOURS = COLOURS[:, 0, ::-1]  # OpenCV gives [256, 1, BGR]


# ---- maps ---------------------------------------------------------------------------------------


@torch.no_grad()
def compute_maps(
    features: Features, photo: Image.Image, size: tuple[int, int], upsampled: str = "LiFT"
) -> dict[str, Tensor]:
    """The maps of one photo, resized to `size` (W, H), that are compared.

    Args:
        upsampled: the title of what the upsampler gives.
    Returns:
        {title: [C, h, w]}, in this order: the backbone, that doubled bilinearly, the backbone on
        the photo at double size and, with an upsampler, what it gives; of LiFT each iteration.
    """
    width, height = size
    feats, *steps = features(pixels(photo, width, height), return_all=True)
    backbone_only = Features(features.backbone)
    maps = {
        "backbone": feats,
        "bilinear": double(feats),
        "backbone, photo at 2x": backbone_only(pixels(photo, 2 * width, 2 * height)),
    }
    for number, step in enumerate(steps, 1):
        title = upsampled
        if number > 1:
            title += f", {number} times"
        maps[title] = step
    return {title: batch[0] for title, batch in maps.items()}


def pixels(photo: Image.Image, width: int, height: int) -> Tensor:
    """A photo at this size, in 0..1: [1, 3, H, W]."""
    # in floating point, as the reference release does it: Pillow's 8-bit result differs by 1e-2
    return resize(to_tensor(photo), [height, width], antialias=True)[None]


def cell_at(
    point: tuple[float, float], photo_size: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int]:
    """The cell (row, column) of a grid (h, w) that holds the pixel (x, y) of a photo (W, H)."""
    x, y = point
    row = int(y * grid[0] / photo_size[1])
    column = int(x * grid[1] / photo_size[0])
    return row, column


def self_similarity(feats: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """Cosines [Q, h, w] of Q cells (row, column) of a map [C, h, w] to all its cells, in 0..1.

    They are min-max normalised for each of the Q. Where all cosines agree to within rounding, as on
    a flat map, the result is 0.
    """
    width = feats.shape[2]
    x = feats.flatten(1)                                           # [C, h*w]
    indices = [row * width + column for row, column in cells]
    queries = F.normalize(x[:, indices], dim=0)                    # [C, Q]

    # the norms of all cells, 64 channels at a time: x.norm(dim=0) takes five times as long
    squares = torch.zeros_like(x[0])                               # [h*w]
    for channels in x.split(64):
        squares += channels.square().sum(0)
    norms = squares.sqrt().clamp(min=1e-8)                         # [h*w]

    cosines = queries.T @ x / norms                                # [Q, h*w]
    low, high = cosines.aminmax(dim=1, keepdim=True)
    scaled = torch.where(high - low > 1e-6, (cosines - low) / (high - low), 0)
    return scaled.unflatten(1, feats.shape[1:])


def shown_similarity(feats: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """self_similarity as it is drawn: the corners do not decide where the dark colours begin."""
    values = self_similarity(feats, cells)
    counted = ~corner_cells(feats.shape[1], feats.shape[2]).to(values.device)  # [h, w]
    if not counted.any():  # a grid of corners only
        return values

    # the most similar cell stays at 1; corners below the new 0 are cut off there
    low = values[:, counted].amin(1)[:, None, None]                # [Q, 1, 1]
    return ((values - low) / (1 - low).clamp(min=1e-6)).clamp(0, 1)


# ---- sheets -------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A picture of a sheet, and what stands above it."""

    title: str
    picture: Image.Image


def colour(values: Tensor) -> Image.Image:
    """Values [h, w] in 0..1 -> a picture of w x h pixels, dark to bright."""
    levels = (values.cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(COLOURS[levels])


def enlarge(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture at `size` (W, H) with sharp cells of equal size."""
    # nearest neighbour makes cells of equal size for whole factors only: enlarge by the next whole
    # factor, beyond `size`, then shrink to `size` by averaging areas
    columns, rows = picture.size
    width = columns * math.ceil(size[0] / columns)
    height = rows * math.ceil(size[1] / rows)
    beyond = picture.resize((width, height), Image.Resampling.NEAREST)
    return beyond.resize(size, Image.Resampling.BOX)


def draw_ring(picture: Image.Image, x: float, y: float) -> None:
    """Draw a white ring, edged in black, around the point (x, y), in 0..1 of the picture."""
    draw = ImageDraw.Draw(picture)
    x = x * picture.width
    y = y * picture.height
    for radius, width, ink in ((7, 4, "black"), (6, 2, "white")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=width)


def grid_title(title: str, grid: tuple[int, ...]) -> str:
    """A title with the real grid (h, w) below it."""
    return f"{title}\n{grid[0]}x{grid[1]}"


def pca_row(photo: Image.Image, maps: dict[str, Tensor], size: tuple[int, int]) -> list[Panel]:
    """The photo, and the first three principal components of each map, in panels of `size`."""
    row = [Panel("photo\nPCA as RGB", photo.resize(size))]
    for title, rgb in zip(maps, pca_rgb(list(maps.values()))):
        picture = enlarge(Image.fromarray(rgb), size)
        row.append(Panel(grid_title(title, rgb.shape), picture))
    return row


def make_sheets(
    photo: Image.Image,
    maps: dict[str, Tensor],
    points: list[tuple[float, float]],
    size: tuple[int, int],
    marker: bool,
    pca: bool,
) -> dict[str, list[list[Panel]]]:
    """The sheets of one photo, {name: rows of panels}, with a row for each point (x, y).

    Args:
        maps: {title: [C, h, w]}, see compute_maps.
        size: of the panels, (W, H).
        marker: draw a ring around the point, and in a map around the centre of its cell.
        pca: add the sheet of principal components.
    """
    # each row begins with the photo, and every map adds a panel to every row
    rows = []
    for x, y in points:
        picture = photo.resize(size)
        if marker:
            draw_ring(picture, x / photo.width, y / photo.height)
        rows.append([Panel(f"photo\nx {x:g}, y {y:g}", picture)])

    for title, feats in maps.items():
        height, width = feats.shape[1:]
        cells = [cell_at(point, photo.size, (height, width)) for point in points]
        similarities = shown_similarity(feats, cells)              # [Q, h, w]
        for panels, values, (row, column) in zip(rows, similarities, cells):
            picture = enlarge(colour(values), size)
            if marker:
                draw_ring(picture, (column + 0.5) / width, (row + 0.5) / height)
            panels.append(Panel(grid_title(title, (height, width)), picture))

    # panels: photo, backbone, bilinear, photo at 2x, and LiFT once, twice, ...
    sheets = {"alternatives": [panels[:5] for panels in rows]}
    if len(maps) > 3:  # with an upsampler
        sheets["iterations"] = [panels[:2] + panels[4:] for panels in rows]
    if pca:
        sheets["pca"] = [pca_row(photo, maps, size)]
    return sheets


def draw_sheet(rows: list[list[Panel]], fontsize: int) -> Image.Image:
    """Rows of panels on white, whose pictures have one size, with titles of this size in pixels."""
    font = ImageFont.load_default(fontsize)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    width, height = rows[0][0].picture.size

    # a column is as wide as its widest title or picture, all headings are as high as the highest
    columns = [width] * len(rows[0])  # widths
    heading = 0                       # height
    for row in rows:
        for number, panel in enumerate(row):
            _, _, right, bottom = measure.multiline_textbbox((0, 0), panel.title, font)
            columns[number] = max(columns[number], math.ceil(right))
            heading = max(heading, math.ceil(bottom))
    heading += GAP // 2

    sheet_width = sum(columns) + GAP * (len(columns) + 1)
    sheet_height = len(rows) * (heading + height + GAP) + GAP
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row in rows:
        left = GAP
        for panel, column in zip(row, columns):
            middle = left + column // 2
            draw.multiline_text(
                (middle, top), panel.title, "black", font, anchor="ma", align="center"
            )
            sheet.paste(panel.picture, (middle - width // 2, top + heading))
            left += column + GAP
        top += heading + height + GAP
    return sheet


# ---- the page -----------------------------------------------------------------------------------


def compact(feats: Tensor, components: int = COMPONENTS) -> dict[str, Any]:
    """A map [C, h, w], small enough for a page.

    Cells are L2-normalised, and given by their coordinates along the K principal directions. The
    mean is not taken off, so that dot products of the coordinates are the cosines, to about 0.01.

    Returns:
        grid (h, w); corner (rows, columns), the size of what corner_cells takes for a corner;
        codes, int8 [K, h, w], each the difference to its left neighbour, deflated and in base64.
    """
    height, width = feats.shape[1:]
    x = F.normalize(feats.cpu().flatten(1), dim=0)                             # [C, h*w]
    # eigh sorts from the smallest eigenvalue to the largest
    directions = torch.linalg.eigh(x @ x.T).eigenvectors[:, -components:]      # [C, K]
    coordinates = (directions.T @ x).unflatten(1, (height, width))             # [K, h, w]
    steps = 127
    if height * width > 64**2:  # coarser ones for the finest maps, which take most of the page
        steps = 64
    codes = (coordinates * steps).round().to(torch.int8).numpy()
    # neighbours are alike, so their differences deflate well
    differences = np.diff(codes, axis=2, prepend=np.int8(0))                   # modulo 256
    packed = base64.b64encode(zlib.compress(differences.tobytes(), 9))

    corner = corner_cells(height, width)                                       # [h, w]
    rows = int(corner[: (height + 1) // 2, 0].sum())
    columns = int(corner[0, : (width + 1) // 2].sum())
    return {"grid": [height, width], "corner": [rows, columns], "codes": packed.decode()}


def page_entry(
    name: str,
    photo: Image.Image,
    maps: dict[str, Tensor],
    point: tuple[float, float],
    size: tuple[int, int],
) -> dict[str, Any]:
    """One photo of the page, for JSON: its name, a JPEG of `size` (W, H), the point and the maps.

    The first four maps are always shown; of the others, further iterations, one at a time.
    """
    jpeg = io.BytesIO()
    photo.resize(size).save(jpeg, "JPEG", quality=90)
    x, y = point  # in pixels; for the page in 0..1 of the photo
    compacted = [{"title": title, **compact(feats)} for title, feats in maps.items()]
    return {
        "name": name,
        "jpeg": base64.b64encode(jpeg.getvalue()).decode(),
        "aspect": photo.width / photo.height,
        "point": [x / photo.width, y / photo.height],
        "maps": compacted[:4],
        "steps": compacted[4:],
    }


def write_page(path: str | Path, entries: list[dict[str, Any]]) -> None:
    """Write the page of some `page_entry`s: assets/page.html with the data in it."""
    data = json.dumps({"colours": COLOURS.tolist(), "photos": entries})
    data = data.replace("<", "\\u003c")  # a file named </script> stays text
    write_text(path, PAGE.read_text().replace("/*DATA*/null", data))


# ---- the command --------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong whatever the photos and the backbone are."""
    check_range(args, imsize=1, limit=0, lift_iter=1, fontsize=1)
    check_one_process()
    wrong = ""
    if args.html and Path(args.html).is_dir():
        wrong = f"--html {args.html} is a folder: pass a file"
    for flag in ("pca", "html"):
        if getattr(args, flag) and args.facet == "attn" and not args.my_extractor:
            what = f"--{flag} cannot compare attn, whose channels are the cells of its own grid"
            wrong = f"{what}: pass another --facet, or leave --{flag} out"
    if wrong:
        raise ValueError(wrong)


def choose_photos(dataroot: str, limit: int, seed: int) -> list[Path]:
    """Draw `limit` photos (0: all) below `dataroot` at random, sorted. ValueError without any."""
    # OUTPUT_DIR may be in DATAROOT
    found = [path for path in list_images(dataroot) if not ours(path)]
    if not found:
        raise ValueError(f"there are only our own sheets at {dataroot}: pass a folder of photos")
    if 0 < limit < len(found):
        found = sorted(random.Random(seed).sample(found, limit))
    return found


def check_photo(args: argparse.Namespace, photo: Image.Image) -> None:
    """Raise ValueError for a photo without the cell of a --query, and for a long strip."""
    for x, y in args.query:
        if not (0 <= x < photo.width and 0 <= y < photo.height):
            limits = f"pass x from 0 to {photo.width - 1} and y from 0 to {photo.height - 1}"
            raise ValueError(f"--query {x:g},{y:g} is outside the photo: {limits}")
    if args.keep_aspect and is_strip(photo.width, photo.height):
        what = f"{photo.width}x{photo.height} pixels are a strip"
        raise ValueError(f"{what}: resize or crop it, or leave out --keep_aspect")


def upsampler_title(args: argparse.Namespace) -> str:
    """The title of what --upsample gives."""
    if args.upsample in (None, "none", "lift"):
        return "LiFT"
    if args.upsample == "bilinear":
        return f"bilinear, {2**args.lift_iter}x"
    return args.upsample.split(":")[-1]


def draw_photo(
    args: argparse.Namespace, features: Features, path: Path, name: Path
) -> tuple[dict[str, list[list[Panel]]], dict[str, Any]]:
    """The sheets (see make_sheets) and page_entry of one photo, which is `name` below DATAROOT."""
    if len(os.fsencode(f"{name.name}_alternatives.png")) > 255:
        raise ValueError("the name is too long for the names of its sheets: shorten it")
    photo = read_image(path)
    check_photo(args, photo)
    points = args.query or [(photo.width / 2, photo.height / 2)]

    backbone = features.backbone
    sides: LoadSize = (args.imsize, args.imsize)
    if args.keep_aspect:
        sides = args.imsize  # of the shorter side
    size = backbone.size(photo.width, photo.height, sides)
    maps = compute_maps(features, photo, size, upsampler_title(args))

    # panels show the photo in its own aspect
    scale = max(PANEL, *size) / max(photo.size)
    shown = (max(1, round(scale * photo.width)), max(1, round(scale * photo.height)))
    sheets = make_sheets(photo, maps, points, shown, not args.hide_marker, args.pca)
    if not args.html:
        return sheets, {}
    network = backbone.name
    if backbone.layer is not None:
        network += f", layer {backbone.layer}, {backbone.facet}"
    return sheets, page_entry(f"{name} ({network})", photo, maps, points[0], shown)


def main(args: argparse.Namespace) -> None:
    """Draw the sheets of every photo, and the page."""
    check_flags(args)
    if args.lift_iter is None:
        lifted = args.upsample == "lift" or (args.upsample is None and args.lift_path)
        args.lift_iter = 4 if lifted else 1
    paths = choose_photos(args.dataroot, args.limit, args.seed)
    root = naming_root(args.dataroot)
    features = build_features(args)
    check_range(args, imsize=features.patch)

    files = []
    entries = []
    reasons = {}  # why photos were skipped
    for path in progress(paths, unit="photo"):
        name = path.relative_to(root)
        try:
            sheets, entry = draw_photo(args, features, path, name)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            reasons[str(path)] = why_skipped(error).removeprefix(f"{path} is ")
            continue
        for sheet, rows in sheets.items():
            file = Path(args.output_dir) / name.with_name(f"{name.name}_{sheet}.png")
            with replacing(file) as temporary:
                draw_sheet(rows, args.fontsize).save(temporary)
            files.append(str(file))
        entries.append(entry)

    if not files:
        first, reason = next(iter(reasons.items()))  # it speaks for all
        raise ValueError(f"{first}: {reason}")
    if args.html:
        write_page(args.html, entries)
    for photo, reason in reasons.items():
        skipped(photo, reason)
    note_left_out(args.dataroot)
    print(f"photos: {len(entries)}, sheets: {len(files)}, in {args.output_dir}")
    if args.html:
        print(f"page, to open in a browser: {args.html}")
    used = settings(args, **features.facts())
    report(args, {"files": files, "skipped": list(reasons), "settings": used})


if __name__ == "__main__":
    parser().run(main)
