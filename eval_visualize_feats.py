"""See what LiFT does to features: self-similarity, iterations and PCA, as pictures or a live page.

    python eval_visualize_feats.py --dataroot photos/ --model dino_vits16 --lift_path lift.pth
    python eval_visualize_feats.py --dataroot cat.jpg --lift_path lift.pth --keep_aspect --pca \\
        --query 120,80 --query 9,210
    python eval_visualize_feats.py --dataroot photos/ --lift_path lift.pth --html page.html

Writes sheets for 20 photos, drawn at random, or for --limit of them. A photo's sheets go into the
same subfolder of OUTPUT_DIR that it has in DATAROOT:

    PHOTO_alternatives.png   the photo, backbone, that doubled bilinearly, backbone on the photo at
                             double size, LiFT
    PHOTO_iterations.png     backbone, LiFT applied once, twice, ... (only with --lift_path)
    PHOTO_pca.png            with --pca: the first three principal components of all these maps, in
                             one basis, as red, green and blue

A map shows the cosine of one cell (the centre, or a --query) to every cell, from its least similar
(dark) to its most similar (bright), as the LiFT paper does (arXiv 2403.14625).

The cells in the four corners stand apart in many ViTs: their cosine to all others is low, whatever
the photo shows there. They are drawn, but do not decide where the dark colours begin.

With --html a page, one file, does the same for the point under the pointer. The last line printed
is JSON: files, what was skipped, settings. A second run overwrites the sheets of the first. A photo
takes about 4 s with ViT-S/16, four iterations and --pca on one CPU core.

Notation: C channels, H W image pixels, h w the grid of a map, Q queries. A point is x, y in pixels
of the photo; a cell is row, column.
"""

import argparse
import base64
import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    check_memory,
    check_one_process,
    check_range,
    replacing,
    report,
    settings,
    weights_digest,
    write_text,
)

SHEETS = ("alternatives", "iterations", "pca")

PANEL = 280  # pixels of the longer side of a panel; more where the backbone sees more
GAP = 12  # white between panels, in pixels
COMPONENTS = 128  # numbers a cell that the page keeps
LONGEST = 16  # how many times its shorter side a photo's longer side may be

LESS_MEMORY = "pass a smaller --imsize or --lift_iter, or a coarser --stride"


def point(text: str) -> tuple[float, float]:
    """The point of --query X,Y."""
    try:
        x, y = text.split(",")
        return float(x), float(y)
    except ValueError:
        remedy = "pass x,y in pixels of the photo, such as 120,80"
        raise argparse.ArgumentTypeError(f"{text!r} is no point: {remedy}") from None


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
    add("--html", help="also one page of all photos, on which the query follows the pointer")
    add("--json", help="write the last line to this file, too")
    add("--lift_path", help="LiFT checkpoint; without it the panels of LiFT are left out")
    add("--lift_iter", type=int, default=4, help="LiFT at most this often in a row (default: 4)")
    add_backbone_args(command)
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
from tqdm import tqdm

from extractor import DenseExtractor, build_extractor
from lift import LiFT, double, load_lift, read_state, upsample
from photos import IMAGES, list_images, naming_root, pca_rgb, read_image

# viridis, from dark to bright: [256, RGB]
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
COLOURS = COLOURS[:, 0, ::-1]  # OpenCV gives [256, 1, BGR]


# ---- maps ---------------------------------------------------------------------------------------


@torch.no_grad()
def compute_maps(
    extractor: DenseExtractor,
    lift: LiFT | None,
    photo: Image.Image,
    size: tuple[int, int],
    iterations: int,
) -> dict[str, Tensor]:
    """The maps to compare of one photo, read at `size` (W, H).

    Returns:
        {title: [C, h, w]}, in this order: the backbone, that doubled bilinearly, the backbone on
        the photo at double size and, with a module, LiFT applied 1 to `iterations` times.
    Raises:
        ValueError: a map holds NaN or infinity.
    """
    images = prepare(extractor, photo, size)                       # [1, 3, H, W]
    feats = extractor(images)                                      # [1, C, h, w]
    large = prepare(extractor, photo, (2 * size[0], 2 * size[1]))  # [1, 3, 2H, 2W]
    maps = {
        "backbone": feats,
        "bilinear": double(feats),
        "backbone, photo at 2x": extractor(large),
    }
    if lift is not None:
        # steps[0] is feats itself
        steps = upsample(lift, images, feats, iterations, return_all=True)
        for number in range(1, iterations + 1):
            title = f"LiFT, {number} times"
            if number == 1:
                title = "LiFT"
            maps[title] = steps[number]

    for title, batch in maps.items():
        if not batch.isfinite().all():
            what = f"the features of {title} hold NaN or infinity in {extractor.dtype}"
            raise ValueError(f"{what}: pass --dtype float32, or other weights")
    return {title: batch[0] for title, batch in maps.items()}


def prepare(extractor: DenseExtractor, photo: Image.Image, size: tuple[int, int]) -> Tensor:
    """A photo at `size` (W, H), normalised, on the extractor's device: [1, 3, H, W]."""
    width, height = size
    # in floating point, as the reference release does it: Pillow's 8-bit result differs by 1e-2
    pixels = resize(to_tensor(photo), [height, width], antialias=True)
    return extractor.normalize(pixels)[None].to(extractor.device)


def cell_at(
    point: tuple[float, float], photo_size: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int]:
    """The cell (row, column) of a grid (h, w) that holds the pixel (x, y) of a photo (W, H)."""
    x, y = point
    row = int(y * grid[0] / photo_size[1])
    column = int(x * grid[1] / photo_size[0])
    return row, column


def self_similarity(feats: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """Cosine of Q cells (row, column) of a map to all its cells, each min-max normalised.

    Where all cosines agree to within rounding, as on a flat map, the result is 0.

    Args:
        feats: [C, h, w].
    Returns:
        [Q, h, w] in 0..1.
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


def shown_similarity(
    feats: Tensor, cells: list[tuple[int, int]], coarse: tuple[int, int]
) -> Tensor:
    """self_similarity as it is drawn: the corners do not decide where the dark colours begin.

    Args:
        feats: [C, h, w].
        coarse: the grid of the backbone, whose corner cells are meant.
    Returns:
        [Q, h, w] in 0..1.
    """
    values = self_similarity(feats, cells)
    counted = ~corners(feats.shape[1:], coarse).to(values.device)  # [h, w]
    if not counted.any():  # a grid of corners only
        return values

    # the most similar cell stays at 1; corners below the new 0 are cut off there
    low = values[:, counted].amin(1)[:, None, None]                # [Q, 1, 1]
    return ((values - low) / (1 - low).clamp(min=1e-6)).clamp(0, 1)


def corners(grid: tuple[int, int], coarse: tuple[int, int]) -> Tensor:
    """Which cells of a grid (h, w) lie in the four corner cells of a coarse grid: a mask [h, w]."""
    height, width = grid
    rows = max(1, height // coarse[0])    # of the grid in one coarse cell
    columns = max(1, width // coarse[1])
    mask = torch.zeros(grid, dtype=torch.bool)
    for vertical in (slice(0, rows), slice(height - rows, None)):
        for horizontal in (slice(0, columns), slice(width - columns, None)):
            mask[vertical, horizontal] = True
    return mask


# ---- sheets -------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A picture of a sheet, and what stands above it."""

    title: str
    picture: Image.Image


def colour(values: Tensor) -> Image.Image:
    """Values [h, w] in 0..1 -> a picture of w x h pixels, dark to bright."""
    levels = (values.cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(COLOURS[levels])


def panel_size(photo: Image.Image, longer: int) -> tuple[int, int]:
    """The size (W, H), with this longer side, that shows a photo in its own aspect."""
    scale = longer / max(photo.size)
    return max(1, round(scale * photo.width)), max(1, round(scale * photo.height))


def enlarge(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture at `size` (W, H) with sharp cells of equal size."""
    # nearest neighbour makes cells of equal size for whole factors only: enlarge by the next whole
    # factor, beyond `size`, and shrink that to `size` by averaging areas
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


def similarity_rows(
    photo: Image.Image,
    maps: dict[str, Tensor],
    points: list[tuple[float, float]],
    size: tuple[int, int],
    marker: bool,
) -> list[list[Panel]]:
    """A row for each point (x, y): the photo, then the similarity in each map.

    Args:
        maps: {title: [C, h, w]}, the backbone's first.
        size: of the panels, (W, H).
        marker: draw a ring around the point, and in a map around the centre of its cell.
    """
    coarse = next(iter(maps.values())).shape[1:]  # the backbone's grid

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
        similarities = shown_similarity(feats, cells, coarse)      # [Q, h, w]
        for panels, values, (row, column) in zip(rows, similarities, cells):
            picture = enlarge(colour(values), size)
            if marker:
                draw_ring(picture, (column + 0.5) / width, (row + 0.5) / height)
            panels.append(Panel(grid_title(title, (height, width)), picture))
    return rows


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
    """The sheets of one photo, {name of SHEETS: rows of panels}; arguments as similarity_rows."""
    alternatives = []
    iterations = []
    for row in similarity_rows(photo, maps, points, size, marker):
        shown, backbone, bilinear, large = row[:4]  # shown: the photo
        lifted = row[4:]                            # LiFT once, twice, ...; none without a module
        alternatives.append([shown, backbone, bilinear, large, *lifted[:1]])
        iterations.append([shown, backbone, *lifted])

    sheets = {"alternatives": alternatives}
    with_lift = len(maps) > 3
    if with_lift:
        sheets["iterations"] = iterations
    if pca:
        sheets["pca"] = [pca_row(photo, maps, size)]
    return sheets


def draw_sheet(rows: list[list[Panel]], fontsize: int) -> Image.Image:
    """Rows of panels, whose pictures have one size, on white; columns are as wide as their titles.

    Args:
        fontsize: of the titles, in pixels.
    """
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
    """A map [C, h, w] small enough for a page: each cell as numbers of 8 bits.

    They are the coordinates of the L2-normalised cell along the K principal directions in which the
    map is largest. The mean is not taken off, so that dot products of the coordinates are the
    cosines, to about 0.01.

    Returns:
        grid (h, w); codes, int8 [h*w, K] in base64; scale [K], by which the codes are multiplied.
    """
    x = F.normalize(feats.cpu().flatten(1), dim=0)                             # [C, h*w]
    # eigh sorts from the smallest eigenvalue to the largest
    directions = torch.linalg.eigh(x @ x.T).eigenvectors[:, -components:]      # [C, K]
    coordinates = directions.T @ x                                             # [K, h*w]
    scale = coordinates.abs().amax(1).clamp(min=1e-9) / 127                    # [K]
    codes = (coordinates / scale[:, None]).round().to(torch.int8)              # [K, h*w]
    packed = base64.b64encode(codes.T.contiguous().numpy())
    return {"grid": list(feats.shape[1:]), "scale": scale.tolist(), "codes": packed.decode()}


def page_entry(
    name: str,
    photo: Image.Image,
    maps: dict[str, Tensor],
    point: tuple[float, float],
    size: tuple[int, int],
) -> dict[str, Any]:
    """One photo of the page, for JSON: name, a JPEG of `size` (W, H), the first point, the maps."""
    jpeg = io.BytesIO()
    photo.resize(size).save(jpeg, "JPEG", quality=90)
    x, y = point  # in pixels; the page takes it in 0..1 of the photo
    return {
        "name": name,
        "jpeg": base64.b64encode(jpeg.getvalue()).decode(),
        "aspect": photo.width / photo.height,
        "point": [x / photo.width, y / photo.height],
        "maps": [{"title": title, **compact(feats)} for title, feats in maps.items()],
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Self-similarity of features</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 16px/1.4 system-ui, sans-serif; color: #111; background: #fff; margin: 1.5rem; }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
section > div { display: grid; gap: 12px; max-width: 1700px;
                grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
figure { margin: 0; }
figcaption { text-align: center; }
/* a finger that moves up or down scrolls the page, one that moves sideways moves the point */
.view { position: relative; cursor: crosshair; touch-action: pan-y pinch-zoom; }
.view > :first-child { display: block; width: 100%; height: 100%; }
canvas { image-rendering: pixelated; }
.ring { position: absolute; width: 10px; height: 10px; margin: -7px;
        border: 2px solid #fff; border-radius: 50%;
        box-shadow: 0 0 0 1px #000, inset 0 0 0 1px #000; pointer-events: none; }
</style></head><body>
<p>Move the pointer over the photo or a map, or tap it: each map shows the cosine of the feature
there to all others, from its least (dark) to its most similar (bright). The cells in the four
corners stand apart in many ViTs; they do not decide where the dark colours begin.</p>
<script>
"use strict";
const COLOURS = DATA_COLOURS, PHOTOS = DATA_PHOTOS;

// the codes of a map -> unit vectors, one cell after the other
function unpack(map) {
  const bytes = Uint8Array.from(atob(map.codes), c => c.charCodeAt(0));
  const codes = new Int8Array(bytes.buffer);
  const k = map.scale.length;
  const cells = Float32Array.from(codes, (code, i) => code * map.scale[i % k]);
  for (let i = 0; i < cells.length; i += k) {
    const norm = Math.hypot(...cells.subarray(i, i + k)) || 1;
    for (let j = i; j < i + k; j++) cells[j] /= norm;
  }
  return cells;
}

// the cosines of one cell to all
function similarity(cells, k, query) {
  const cosines = new Float32Array(cells.length / k);
  for (let i = 0; i < cosines.length; i++)
    for (let j = 0; j < k; j++) cosines[i] += cells[i * k + j] * cells[query * k + j];
  return cosines;
}

// whether each cell of a grid [h, w] lies in a corner cell of the backbone's grid
function corners(grid, coarse) {
  const [h, w] = grid;
  const rows = Math.max(1, Math.floor(h / coarse[0]));
  const columns = Math.max(1, Math.floor(w / coarse[1]));
  const mask = [];
  for (let i = 0; i < h; i++)
    for (let j = 0; j < w; j++)
      mask.push((i < rows || i >= h - rows) && (j < columns || j >= w - columns));
  return mask;
}

function add(tag, parent, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function addView(row, tag, photo, properties) {
  const figure = add("figure", row);
  const view = add("div", figure, {className: "view"});
  const picture = add(tag, view, properties);
  photo.rings.push(add("div", view, {className: "ring"}));
  const inside = t => Math.min(Math.max(t, 0), 1 - 1e-6);
  for (const kind of ["pointermove", "pointerdown"]) view.addEventListener(kind, event => {
    const box = view.getBoundingClientRect();
    const x = inside((event.clientX - box.left) / box.width);
    const y = inside((event.clientY - box.top) / box.height);
    show(photo, x, y);
  });
  return [picture, add("figcaption", figure)];
}

// draw all maps of a photo for its point (x, y), in 0..1
function show(photo, x, y) {
  for (const ring of photo.rings) {
    ring.style.left = 100 * x + "%";
    ring.style.top = 100 * y + "%";
  }
  for (const map of photo.maps) {
    const [h, w] = map.grid;
    const query = Math.floor(y * h) * w + Math.floor(x * w);
    const cosines = similarity(map.cells, map.scale.length, query);
    const high = cosines.reduce((a, b) => Math.max(a, b));
    const least = cosines.reduce((a, b) => Math.min(a, b));
    let counted = cosines.filter((_, i) => !map.corners[i]);
    if (counted.length === 0) counted = cosines;
    const low = counted.reduce((a, b) => Math.min(a, b));

    const context = map.canvas.getContext("2d");
    const pixels = context.createImageData(w, h);
    cosines.forEach((cosine, i) => {
      let level = 0;
      if (high - least > 1e-6)
        level = Math.max(0, Math.round(255 * (cosine - low) / Math.max(high - low, 1e-6)));
      pixels.data.set([...COLOURS[level], 255], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    const range = `cosine ${low.toFixed(2)} to ${high.toFixed(2)}`;
    map.caption.innerText = `${map.title} ${h}x${w}\\n${range}`;
  }
}

for (const photo of PHOTOS) {
  const section = add("section", document.body);
  add("h2", section, {textContent: photo.name});
  const row = add("div", section);
  photo.rings = [];
  const source = "data:image/jpeg;base64," + photo.jpeg;
  const [, caption] = addView(row, "img", photo, {src: source, alt: photo.name, draggable: false});
  caption.textContent = "photo";
  for (const map of photo.maps) {
    map.cells = unpack(map);
    map.corners = corners(map.grid, photo.maps[0].grid);
    const size = {width: map.grid[1], height: map.grid[0]};
    [map.canvas, map.caption] = addView(row, "canvas", photo, size);
    map.canvas.style.aspectRatio = photo.aspect;
  }
  show(photo, ...photo.point);
}
</script></body></html>
"""


def write_page(path: str | Path, entries: list[dict[str, Any]]) -> None:
    """Write the page of some `page_entry`s.

    All is in the file, and its own policy forbids it to load anything.
    """
    photos = json.dumps(entries).replace("<", "\\u003c")  # a file named </script> stays text
    page = PAGE.replace("DATA_COLOURS", json.dumps(COLOURS.tolist()))
    write_text(path, page.replace("DATA_PHOTOS", photos))


# ---- which photos, and at what size -------------------------------------------------------------


def find_photos(dataroot: str, limit: int, seed: int) -> tuple[list[Path], Path]:
    """Draw `limit` photos (0: all) below `dataroot` at random.

    Sheets of an earlier run are left out, for OUTPUT_DIR may lie in DATAROOT.

    Returns:
        The photos, in the order in which they were listed or, where drawn, sorted; and the folder
        below which their subfolders count (photos.naming_root).
    Raises:
        ValueError: there is no photo.
    """
    found = [path for path in list_images(dataroot) if not is_sheet(path)]
    if not found:
        raise ValueError(f"no images but our own sheets at {dataroot}: pass a folder of photos")
    if 0 < limit < len(found):
        found = sorted(random.Random(seed).sample(found, limit))
    return found, naming_root(dataroot)


def is_sheet(path: Path) -> bool:
    """Whether a file has the name of a sheet of this script, such as cat.jpg_pca.png."""
    for name in SHEETS:
        ending = f"_{name}.png"
        if path.name.endswith(ending):
            return Path(path.name.removesuffix(ending)).suffix.lower() in IMAGES
    return False


def check_points(
    points: list[tuple[float, float]], photo: Image.Image, path: Path
) -> list[tuple[float, float]]:
    """The points (x, y), or the centre if there is none. Raises ValueError for one outside."""
    for x, y in points:
        if not (0 <= x < photo.width and 0 <= y < photo.height):
            limits = f"pass x from 0 to {photo.width - 1} and y from 0 to {photo.height - 1}"
            raise ValueError(f"--query {x:g},{y:g} is outside {path}: {limits}")
    if points:
        return points
    return [(photo.width / 2, photo.height / 2)]


def input_size(
    extractor: DenseExtractor, photo: Image.Image, path: Path, imsize: int, keep_aspect: bool
) -> tuple[int, int]:
    """The size (W, H) at which the backbone sees a photo. Raises ValueError for a long strip."""
    if not keep_aspect:
        return extractor.size(photo.width, photo.height, (imsize, imsize))
    if max(photo.size) > LONGEST * min(photo.size):
        what = f"{path} has {photo.width}x{photo.height} pixels, a strip"
        raise ValueError(f"{what}: resize or cut it, or leave out --keep_aspect")
    return extractor.size(photo.width, photo.height, imsize)


def memory_needed(extractor: DenseExtractor, size: tuple[int, int], iterations: int) -> int:
    """About how many bytes compute_maps takes for a photo at `size` (W, H).

    Every map is kept, and the backbone works on about three times its result, which is counted for
    the largest. The last step of LiFT works on about three times its own result, and on the
    enlarged image and its convolutions: about p^2 numbers for each cell of a patch of p pixels.

    Args:
        iterations: of LiFT; 0 is no LiFT.
    """
    width, height = size
    rows, columns = extractor.grid(height, width)
    cells = rows * columns
    channels = extractor.channels(cells)         # of a map of the photo
    channels_2x = extractor.channels(4 * cells)  # of a map of the photo at double size

    numbers = cells * channels              # backbone
    numbers += 4 * cells * channels         # the same, doubled bilinearly
    numbers += 3 * 4 * cells * channels_2x  # backbone on the photo at double size, as it is made
    numbers += 3 * width * height         # the photo
    numbers += 3 * 4 * width * height     # the photo at double size
    for step in range(1, iterations + 1):
        numbers += 4**step * cells * channels
    if iterations:
        numbers += 4**iterations * cells * (3 * channels + extractor.patch**2)
    return 4 * numbers  # float32


# ---- the command --------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong whatever the photos and the backbone are."""
    check_range(args, imsize=1, limit=0, lift_iter=1, fontsize=1)
    check_one_process()
    for flag in ("pca", "html"):
        if getattr(args, flag) and args.facet == "attn" and not args.my_extractor:
            what = f"--{flag} cannot compare attn, which is as wide as its grid"
            raise ValueError(f"{what}: pass another --facet or no --{flag}")
    if args.html and Path(args.html).is_dir():
        raise ValueError(f"--html {args.html} is a folder: pass a file")
    if args.html and args.json and Path(args.html).resolve() == Path(args.json).resolve():
        raise ValueError(f"--html and --json are one file, {args.json}: pass two")
    if args.lift_path:
        read_state(args.lift_path)  # a wrong file is told before a backbone is downloaded


def main(args: argparse.Namespace) -> None:
    """Draw the sheets of every photo, and the page; print files and settings as JSON."""
    check_flags(args)
    paths, root = find_photos(args.dataroot, args.limit, args.seed)

    extractor = build_extractor(args)
    check_range(args, imsize=extractor.patch)
    lift = None
    iterations = 0
    if args.lift_path:
        lift = load_lift(args.lift_path, extractor)
        iterations = args.lift_iter
    if not args.keep_aspect:
        # every photo is read at one size, so that one check now tells before the first photo
        needed = memory_needed(extractor, (args.imsize, args.imsize), iterations)
        check_memory(needed, "the maps", LESS_MEMORY, extractor.device)

    files = []
    entries = []
    skipped = {}
    for path in tqdm(paths, unit="photo", disable=None):
        try:
            photo = read_image(path)
            points = check_points(args.query, photo, path)
            size = input_size(extractor, photo, path, args.imsize, args.keep_aspect)
            needed = memory_needed(extractor, size, iterations)
            check_memory(needed, "the maps", LESS_MEMORY, extractor.device)
        except (ValueError, OSError) as error:
            skipped[str(path)] = str(error)
            continue
        maps = compute_maps(extractor, lift, photo, size, iterations)

        shown = panel_size(photo, max(PANEL, *size))
        sheets = make_sheets(photo, maps, points, shown, not args.hide_marker, args.pca)
        for name, rows in sheets.items():
            # in the subfolder that the photo has below the root
            sheet = path.relative_to(root).with_name(f"{path.name}_{name}.png")
            file = Path(args.output_dir) / sheet
            with replacing(file) as temporary:
                draw_sheet(rows, args.fontsize).save(temporary)
            files.append(str(file))

        if args.html:
            source = extractor.name
            if extractor.layer is not None:
                source += f", layer {extractor.layer}, {extractor.facet}"
            first_four = dict(list(maps.items())[:4])  # the page shows LiFT applied once, no more
            title = f"{path.relative_to(root)} ({source})"
            entries.append(page_entry(title, photo, first_four, points[0], shown))

    if not files:  # then all were skipped, and the first reason speaks for all
        raise ValueError(next(iter(skipped.values())))
    if args.html:
        write_page(args.html, entries)
    for error in skipped.values():
        print(f"skipped: {error}", file=sys.stderr)
    facts = extractor.facts()
    if lift is not None:
        facts["lift_digest"] = weights_digest(lift)
    used = settings(args, device=str(extractor.device), **facts)
    report({"files": files, "skipped": list(skipped), "settings": used}, args.json)


if __name__ == "__main__":
    parser().run(main)
