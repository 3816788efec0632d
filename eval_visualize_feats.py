"""See what LiFT does to features: self-similarity, iterations and PCA of any photos, as pictures or a live page.

    python eval_visualize_feats.py --dataroot photos/ --model dino_vits16 --lift_path lift.pth --output_dir vis/
    python eval_visualize_feats.py --dataroot cat.jpg --lift_path lift.pth --query 120,80 --query 9,210 --pca --keep_aspect
    python eval_visualize_feats.py --dataroot photos/ --lift_path lift.pth --limit 5 --html page.html

Writes for each photo, into the same subfolder of OUTPUT_DIR that it has in DATAROOT:
    PHOTO_alternatives.png   the photo, backbone, that doubled bilinearly, backbone on the doubled photo, LiFT
    PHOTO_iterations.png     backbone, LiFT applied once, twice, ... --lift_iter times (only with --lift_path)
    PHOTO_pca.png            with --pca: all of these maps, first three principal components of one basis as RGB
A map shows the cosine of one cell (the centre, or a --query) to every cell, its own minimum to maximum as dark to
bright, as in the self-similarity figures of the LiFT paper (arXiv 2403.14625). With --html a self-contained page does the
same for the point under the pointer. The last line printed is JSON: files, settings. A second run overwrites the first.
A photo takes about 4 s with ViT-S/16, four iterations and --pca on one CPU core.
"""

import base64
import io
import json
import math
import os
import random
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import resize, to_tensor
from tqdm import tqdm

from extractor import Command, ViTExtractor, add_backbone_args, list_images, read_image, replacing, settings
from lift import double, load_lift, pca_rgb, upsample

COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]  # [256, RGB]
PANEL = 280  # pixels of the longer side of a panel; more where the backbone sees more
GAP = 12  # white between panels, in pixels
COMPONENTS = 128  # numbers a cell that the page keeps


# ---- maps -----------------------------------------------------------------------------------------------------------


def compute_maps(extractor, lift, photo, size, iterations):
    """The maps to compare, {title: [C, h, w]}, of a PIL photo at `size` (W, H).

    In order: the backbone, that doubled bilinearly, the backbone on the photo at double size, and unless `lift` is None
    LiFT applied 1 to `iterations` times.
    """

    def features(scale):
        # bilinear with antialias on the float image, as in the reference release: Pillow's 8-bit result differs by 1e-2
        pixels = resize(to_tensor(photo), (scale * size[1], scale * size[0]), antialias=True)
        images = extractor.normalize(pixels)[None].to(extractor.device)
        return images, extractor(images)

    (images, feats), (_, feats_2x) = features(1), features(2)
    maps = {"backbone": feats, "bilinear": double(feats), "backbone, photo at 2x": feats_2x}
    steps = upsample(lift, images, feats, iterations, return_all=True)[1:] if lift else []
    maps |= {f"LiFT, {n} times" if n > 1 else "LiFT": step for n, step in enumerate(steps, 1)}
    return {title: batch[0] for title, batch in maps.items()}


def cell_at(point, photo_size, grid):
    """The cell (row, column) of a grid (h, w) that holds the pixel (x, y) of a photo of (W, H) pixels."""
    return int(point[1] * grid[0] / photo_size[1]), int(point[0] * grid[1] / photo_size[0])


def self_similarity(feats, cells):
    """Cosine of Q cells (row, column) of a map [C, h, w] to all its cells, min-max normalised: [Q, h, w] in 0..1.

    Where all cosines agree to within rounding (a flat map) the result is 0.
    """
    width, x = feats.shape[2], feats.flatten(1)                                          # [C, h*w]
    queries = F.normalize(x[:, [row * width + column for row, column in cells]], dim=0)  # [C, Q]
    squares = sum(rows.square().sum(0) for rows in x.split(64))  # in blocks: x.norm(dim=0) takes five times as long
    cos = queries.T @ x / squares.sqrt().clamp(min=1e-8)                                 # [Q, h*w]
    low, high = cos.aminmax(dim=1, keepdim=True)
    scaled = torch.where(high - low > 1e-6, (cos - low) / (high - low), 0)
    return scaled.unflatten(1, feats.shape[1:])


# ---- sheets ---------------------------------------------------------------------------------------------------------


def colour(values):
    """Values [h, w] in 0..1 -> PIL picture of w x h pixels, dark to bright."""
    return Image.fromarray(COLOURS[(values.cpu().numpy() * 255).round().astype(np.uint8)])


def panel_size(photo, longer):
    """The size (W, H), with this longer side, in which a photo and its maps are shown: in its own aspect, never squeezed."""
    return tuple(max(1, round(longer * side / max(photo.size))) for side in photo.size)


def enlarge(picture, size):
    """A picture at `size` (W, H) with sharp cells of equal size, which nearest-neighbour alone gives whole factors only."""
    whole = [cells * math.ceil(side / cells) for cells, side in zip(picture.size, size)]
    return picture.resize(whole, Image.NEAREST).resize(size, Image.BOX)


def ring(picture, x, y):
    """The picture with a white ring, edged in black, around the point (x, y) given in 0..1."""
    draw, x, y = ImageDraw.Draw(picture), x * picture.width, y * picture.height
    for radius, width, ink in ((7, 4, "black"), (6, 2, "white")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=width)
    return picture


def grid_title(title, grid):
    """A title with the real grid (h, w) below it."""
    return f"{title}\n{grid[0]}x{grid[1]}"


def similarity_rows(photo, maps, points, size, marker):
    """For each point (x, y) a row of (title, panel of size (W, H)): the photo, then the similarity in each map."""
    rows = [[(f"photo\nx {x:g}, y {y:g}", photo.resize(size), (x / photo.width, y / photo.height))] for x, y in points]
    for title, feats in maps.items():
        h, w = feats.shape[1:]
        cells = [cell_at(point, photo.size, (h, w)) for point in points]
        for row, values, (i, j) in zip(rows, self_similarity(feats, cells), cells):
            picture = enlarge(colour(values), size)
            row.append((grid_title(title, (h, w)), picture, ((j + 0.5) / w, (i + 0.5) / h)))
    return [[(title, ring(picture, *at) if marker else picture) for title, picture, at in row] for row in rows]


def pca_row(photo, maps, size):
    """(title, panel) of the photo and of each map's first three principal components, panels of size (W, H)."""
    row = [("photo\nPCA as RGB", photo.resize(size))]
    for title, rgb in zip(maps, pca_rgb(list(maps.values()))):
        row.append((grid_title(title, rgb.shape), enlarge(Image.fromarray(rgb), size)))
    return row


def sheets(photo, maps, points, size, marker, pca):
    """The sheets of one photo as rows of (title, panel), {name: rows}; arguments as for similarity_rows."""
    rows = similarity_rows(photo, maps, points, size, marker)
    named = {"alternatives": [row[:5] for row in rows]}
    if len(maps) > 3:
        named["iterations"] = [row[:2] + row[4:] for row in rows]
    if pca:
        named["pca"] = [pca_row(photo, maps, size)]
    return named


def draw_sheet(rows, fontsize):
    """Rows of (title, panel), panels of one size, as one PIL picture on white, columns as wide as their titles."""
    font = ImageFont.load_default(fontsize)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    boxes = [[measure.multiline_textbbox((0, 0), title, font) for title, _ in row] for row in rows]
    heading = math.ceil(max(box[3] for row in boxes for box in row)) + GAP // 2
    width, height = rows[0][0][1].size
    columns = [max(width, *(math.ceil(box[2]) for box in column)) + GAP for column in zip(*boxes)]
    sheet = Image.new("RGB", (sum(columns) + GAP, len(rows) * (heading + height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (title, picture) in enumerate(row):
            middle, top = GAP + sum(columns[:c]) + (columns[c] - GAP) // 2, GAP + r * (heading + height + GAP)
            draw.multiline_text((middle, top), title, "black", font, anchor="ma", align="center")
            sheet.paste(picture, (middle - width // 2, top + heading))
    return sheet


# ---- the page -------------------------------------------------------------------------------------------------------


def compact(feats, components=COMPONENTS):
    """A map [C, h, w] small enough for a page: L2-normalised cells in their first principal directions, as int8.

    The directions are not centred, so that dot products of the numbers kept are the cosines, to about 0.01.
    """
    x = F.normalize(feats.cpu().flatten(1), dim=0)                    # [C, h*w]
    directions = torch.linalg.eigh(x @ x.T).eigenvectors[:, -components:]
    z = directions.T @ x                                              # [K, h*w]
    scale = z.abs().amax(1).clamp(min=1e-9) / 127
    codes = (z / scale[:, None]).round().to(torch.int8).T.contiguous().numpy()
    return {"grid": feats.shape[1:], "scale": scale.tolist(), "codes": base64.b64encode(codes).decode()}


def page_entry(name, photo, maps, point, size):
    """One photo of the page, as JSON can hold it: a JPEG of size (W, H), the maps, the point (x, y) to begin with."""
    jpeg = io.BytesIO()
    photo.resize(size).save(jpeg, "JPEG", quality=90)
    return {
        "name": name,
        "jpeg": base64.b64encode(jpeg.getvalue()).decode(),
        "aspect": photo.width / photo.height,
        "point": [point[0] / photo.width, point[1] / photo.height],
        "maps": [{"title": title} | compact(feats) for title, feats in maps.items()],
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Self-similarity of features</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body { font: 16px/1.4 system-ui, sans-serif; color: #111; background: #fff; margin: 1.5rem; }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
section > div { display: grid; gap: 12px; max-width: 1700px;
                grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
figure { margin: 0; }
figcaption { text-align: center; }
.view { position: relative; cursor: crosshair; touch-action: none; }
.view > :first-child { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.ring { position: absolute; width: 10px; height: 10px; margin: -7px; border: 2px solid #fff; border-radius: 50%;
        box-shadow: 0 0 0 1px #000, inset 0 0 0 1px #000; pointer-events: none; }
</style></head><body>
<p>Move the pointer over the photo or a map: each map shows the cosine of the feature under it to all others,
from its least (dark) to its most similar (bright).</p>
<script>
"use strict";
const COLOURS = DATA_COLOURS, PHOTOS = DATA_PHOTOS;

function unpack(map) {                     // int8 codes -> unit vectors, one after the other
  const bytes = Uint8Array.from(atob(map.codes), c => c.charCodeAt(0)), codes = new Int8Array(bytes.buffer);
  const k = map.scale.length, cells = Float32Array.from(codes, (code, i) => code * map.scale[i % k]);
  for (let i = 0; i < cells.length; i += k) {
    const norm = Math.hypot(...cells.subarray(i, i + k)) || 1;
    for (let j = i; j < i + k; j++) cells[j] /= norm;
  }
  return cells;
}

function similarity(cells, k, query) {     // cosine of one cell to all
  const cosines = new Float32Array(cells.length / k);
  for (let i = 0; i < cosines.length; i++)
    for (let j = 0; j < k; j++) cosines[i] += cells[i * k + j] * cells[query * k + j];
  return cosines;
}

function add(tag, parent, properties) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function addView(row, tag, photo, properties) {
  const figure = add("figure", row), view = add("div", figure, {className: "view"});
  const picture = add(tag, view, properties);
  photo.rings.push(add("div", view, {className: "ring"}));
  for (const kind of ["pointermove", "pointerdown"]) view.addEventListener(kind, event => {
    const box = view.getBoundingClientRect(), inside = t => Math.min(Math.max(t, 0), 1 - 1e-6);
    show(photo, inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height));
  });
  return [picture, add("figcaption", figure)];
}

function show(photo, x, y) {               // x, y in 0..1 of the photo
  for (const ring of photo.rings) { ring.style.left = 100 * x + "%"; ring.style.top = 100 * y + "%"; }
  for (const map of photo.maps) {
    const [h, w] = map.grid, query = Math.floor(y * h) * w + Math.floor(x * w);
    const cosines = similarity(map.cells, map.scale.length, query);
    const low = cosines.reduce((a, b) => Math.min(a, b)), high = cosines.reduce((a, b) => Math.max(a, b));
    const context = map.canvas.getContext("2d"), pixels = context.createImageData(w, h);
    cosines.forEach((cosine, i) => {
      const level = high - low > 1e-6 ? Math.round(255 * (cosine - low) / (high - low)) : 0;
      pixels.data.set([...COLOURS[level], 255], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    map.caption.innerText = `${map.title} ${h}x${w}\\ncosine ${low.toFixed(2)} to ${high.toFixed(2)}`;
  }
}

for (const photo of PHOTOS) {
  const section = add("section", document.body);
  add("h2", section, {textContent: photo.name});
  const row = add("div", section);
  photo.rings = [];
  const image = {src: "data:image/jpeg;base64," + photo.jpeg, alt: photo.name, draggable: false};
  addView(row, "img", photo, image)[1].textContent = "photo";
  for (const map of photo.maps) {
    map.cells = unpack(map);
    [map.canvas, map.caption] = addView(row, "canvas", photo, {width: map.grid[1], height: map.grid[0]});
    map.canvas.style.aspectRatio = photo.aspect;
  }
  show(photo, ...photo.point);
}
</script></body></html>
"""


def write_page(path, entries):
    """Write the page of some `page_entry`s: all is in the file, and its own policy forbids it to load anything."""
    photos = json.dumps(entries).replace("<", "\\u003c")  # a file named </script> stays text
    page = PAGE.replace("DATA_COLOURS", json.dumps(COLOURS.tolist())).replace("DATA_PHOTOS", photos)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---- the command line -----------------------------------------------------------------------------------------------


def choose(paths, limit, seed):
    """`limit` of the paths (0: all), drawn without replacement by the seed, in their order."""
    return sorted(random.Random(seed).sample(paths, limit)) if 0 < limit < len(paths) else paths


def check(args, patch):
    """Raise ValueError for settings that no photo can satisfy."""
    for name, least in (("imsize", patch), ("limit", 0), ("lift_iter", 1), ("fontsize", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is too small: pass {least} or more")
    if args.pca and args.facet == "attn":
        raise ValueError("--pca cannot compare attn, which is as wide as its grid: pass another --facet or no --pca")


def check_points(points, photo, path):
    """The points (x, y), or the centre if there is none. Raises ValueError for one outside the photo."""
    for x, y in points:
        if not (0 <= x < photo.width and 0 <= y < photo.height):
            limits = f"pass x from 0 to {photo.width - 1} and y from 0 to {photo.height - 1}"
            raise ValueError(f"--query {x:g},{y:g} is outside {path}: {limits}")
    return points or [(photo.width / 2, photo.height / 2)]


def point(text):
    """Parse the x,y of --query."""
    try:
        x, y = map(float, text.split(","))
        return x, y
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no point: pass x,y in pixels of the photo, such as 120,80") from None


def parser():
    """The command line."""
    command = Command(__doc__)
    command.add_argument("--dataroot", required=True, help="a photo, a folder with its subfolders, or a quoted pattern")
    command.add_argument("--output_dir", default="vis", help="where the sheets go (default: vis)")
    command.add_argument("--imsize", type=int, default=224, help="pixels a side, to the nearest patch (default: 224)")
    command.add_argument("--keep_aspect", action="store_true", help="--imsize is the shorter side (default: a square)")
    command.add_argument("--limit", type=int, default=20, help="how many photos, drawn at random; 0: all (default: 20)")
    command.add_argument("--seed", type=int, default=0, help="seed of that draw (default: 0)")
    query = "compare with the cell at this pixel of the photo; may be repeated (default: the centre)"
    command.add_argument("--query", type=point, action="append", default=[], metavar="X,Y", help=query)
    command.add_argument("--hide_marker", action="store_true", help="no ring around the query")
    command.add_argument("--fontsize", type=int, default=18, help="of the titles, in pixels (default: 18)")
    command.add_argument("--pca", action="store_true", help="also a sheet of principal components")
    command.add_argument("--html", help="also one page of all photos, on which the query follows the pointer")
    command.add_argument("--json", help="write the last line to this file as well")
    command.add_argument("--lift_path", help="LiFT checkpoint; without it the panels of LiFT are left out")
    command.add_argument("--lift_iter", type=int, default=4, help="iterations of LiFT on the second sheet (default: 4)")
    add_backbone_args(command)
    return command


def main(args):
    """Draw the sheets of every photo, and the page; print files and settings as JSON."""
    found = list_images(args.dataroot)
    root = os.path.commonpath([path.parent for path in found])
    extractor = ViTExtractor.from_args(args)
    check(args, extractor.patch)
    lift = load_lift(args.lift_path, extractor) if args.lift_path else None
    files, entries, skipped = [], [], {}
    for path in tqdm(choose(found, args.limit, args.seed), unit="photo", disable=None):
        try:
            photo = read_image(path)
        except (ValueError, OSError) as error:
            skipped[str(path)] = str(error)
            continue
        points = check_points(args.query, photo, path)
        size = extractor.size(*photo.size, args.imsize if args.keep_aspect else (args.imsize, args.imsize))
        maps = compute_maps(extractor, lift, photo, size, args.lift_iter)
        panel = panel_size(photo, max(PANEL, *size))
        for name, rows in sheets(photo, maps, points, panel, not args.hide_marker, args.pca).items():
            files.append(Path(args.output_dir) / path.relative_to(root).with_name(f"{path.name}_{name}.png"))
            with replacing(files[-1]) as temporary:
                draw_sheet(rows, args.fontsize).save(temporary)
        if args.html:
            title = f"{path.relative_to(root)} ({extractor.name}, layer {extractor.layer}, {extractor.facet})"
            entries.append(page_entry(title, photo, dict(list(maps.items())[:4]), points[0], panel))
    if not files:
        raise ValueError(next(iter(skipped.values())))
    if args.html:
        write_page(args.html, entries)
    for error in skipped.values():
        print(f"skipped: {error}", file=sys.stderr)
    report({"files": list(map(str, files)), "skipped": list(skipped), "settings": settings(args)}, args.json)


def report(results, path):
    """Print the results as one line of JSON; write it to `path` as well, if there is one."""
    line = json.dumps(results)
    if path:
        with replacing(path) as temporary:
            temporary.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    parser().run(main)
