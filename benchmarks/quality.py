"""Quality and cost in tables: a backbone alone, at double size, bilinear, and with LiFT modules.

    python benchmarks/quality.py --dataroot DATAROOT --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16_attend.pth [ANOTHER.pth ...]

Three kinds of figures, each with its standard error:

- on --photos, without annotations: what is made of smaller photos against the backbone's own
  features (cosine, centred cosine, a linear probe), and points found again in turned, scaled and
  shifted copies of each photo (self-match). Of more than 500 photos, 500 are measured, evenly
  spread over the sorted list. --imsize must be a multiple of twice the patch here;
- by this repository's evaluations on whatever of SPair-71k (all pairs), DAVIS, VOC (2007, 2012) and
  COCO20k lies in DATAROOT, at --imsize pixels;
- multiplications, time and peak memory of the features of one image, as in cost.py.

Differences of two rows have 95 % intervals by a paired bootstrap over photos, pairs or objects.
Every module is compared with bilinear upsampling, every further module with the first.

Writes OUTPUT.json and, from it, OUTPUT.md; a table of another backbone that OUTPUT.json holds
stays. The last line printed is this run's part of that JSON, commands included. With the small
data sets of the tables in benchmarks/ a module takes about 10 minutes on two cores. A run that was
stopped goes on where it was if --runs names a folder to keep its masks and boxes in.
"""

import json
import math
import shlex
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie one folder up

from command import (
    Command,
    add_backbone_args,
    check_range,
    first_line,
    plain,
    report,
    settings,
    write_text,
)


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="holds SPair-71k, DAVIS, voc, coco20k, or some of them")
    add("--lift_path", required=True, nargs="+", help="LiFT checkpoints (.pth)")
    add("--imsize", type=int, default=224, help="side of the square input (default: 224)")
    add("--photos", nargs="+", help="folders to measure on (default: those of voc, coco20k)")
    add("--fit_photos", help="other photos, for mean and probe (default: DATAROOT/train_images)")
    add("--output", default=str(ROOT / "benchmarks/quality"), help="tables, without suffix")
    add("--runs", help="folder to keep masks and boxes in (default: a temporary one)")
    add_backbone_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help is answered before the imports that take seconds

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from case import count_macs, processor
from cost import measure
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resize
from tqdm import tqdm

import eval_spair
from extractor import DenseExtractor, build_extractor
from lift import Upsampler, upsampler
from photos import list_images, read_image, spread

BACKBONE = (
    "model_type", "backbone_path", "my_extractor", "facet", "layer", "stride", "device", "dtype",
)  # fmt: skip
NO_LIFT = {"upsample": None, "lift_path": None, "lift_iter": 1}

FIT_PHOTOS = 150   # that the mean feature and the probe are fitted on
MOST_PHOTOS = 500  # that are measured without annotations
KINDS = 32         # k-means clusters, the labels of the probe
COPIES = 3         # of every photo, for the self-match
POINTS = 40        # in every copy
ALPHAS = (0.025, 0.05, 0.1)  # shares of the image's side within which a point is found
RESAMPLES = 10_000

# DINO S/16 in the LiFT paper, second-hand: SPair PCK@.1 and @.05, DAVIS J&F, COCO20k CorLoc
PAPER = {
    "backbone": (24.76, 9.54, 33.0, 53.98),
    "+ bilinear": (26.72, 11.37, 37.0, 51.53),
    "+ LiFT": (28.68, 14.72, 44.3, 58.03),
    "backbone at 448": (28.60, 15.33, 50.9, 57.99),
}
ABOUT = f"""# Quality and cost

Written by `benchmarks/quality.py`. The commands behind every figure are in `quality.json`. Figures
are followed by their standard errors: over photos, image pairs, or objects of videos.

**Without annotations.** Photos are squares of twice --imsize pixels, and are halved with
antialiasing. "x2" is what is made of the halved photo, "x4" of the photo halved twice (backbone:
nearest neighbour). Both are compared with the backbone's own features of the whole photo.
"Centred" subtracts the mean feature of {FIT_PHOTOS} other photos from both sides first. "Probe" is
a linear classifier of {KINDS} k-means labels, fitted on the backbone's own features of the other
photos and applied unchanged: the percentage of cells whose label it finds.

"Self-match" compares each photo at --imsize with {COPIES} copies of it, turned by up to 20 degrees,
scaled by 0.75 to 1.25, shifted by up to 11 % of the side, brightness and contrast jittered. It is
the percentage of {POINTS} points a copy that are found within a share of the side of their true
places, among places 4 pixels of the full photo apart, which are 2 at --imsize.

**On annotated data.** PCK, J&F and CorLoc in percent. "PCK@.1 cos" renormalises descriptors after
interpolation (`--match cosine`).

**Cost.** GMACs are those of linear layers, convolutions and attention for one image
(torch.utils.flop_counter), ms the fastest of 2 to 10 runs (CPU time of all threads), MiB what
memory grows by meanwhile.
"""
NOT_RUN = """
## DINO S/16 in the LiFT paper (not run here)

Figures taken second-hand; neither DINO's weights nor the full data sets were at hand. SPair-71k:
100 pairs a category, drawn.

"""
TRAINED = "lift_imagenet_trains/dino_vits16_0.001_cosine_aug_448"  # the folder of the run below
MODULE = f"""
To reproduce them on the full data, first a module:

    python train_lift.py --dataroot imagenet/train --model_type dino_vits16 --epochs 5 --augment \\
        --batch_size 256
    cp {TRAINED}/lift.pth pretrained/lift_dino_vits16.pth
    cp {TRAINED}/lift.json pretrained/lift_dino_vits16.json
"""


# ---- statistics ---------------------------------------------------------------------------------


class Units(NamedTuple):
    """The values whose weighted mean is a figure: one for each photo, image pair, or object."""

    values: np.ndarray   # [n]
    weights: np.ndarray  # [n], of any sum

    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))

    def error(self) -> float:
        """The standard error of the mean, if the units are drawn independently."""
        share = self.weights / self.weights.sum()
        return float(np.sqrt((share**2 * (self.values - self.mean()) ** 2).sum()))


def alike(values: list[float]) -> Units:
    """Units that weigh the same."""
    return Units(np.array(values, dtype=float), np.ones(len(values)))


class Cell(NamedTuple):
    """A cell of the tables: a figure as its script tells it, and the units behind it."""

    value: float
    units: Units


def interval(units: Units, other: Units) -> dict[str, float]:
    """The difference of two figures over the same units, and its 95 % interval by the bootstrap.

    Both have the same weights.
    """
    differences = units.values - other.values
    count = len(differences)
    random = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = random.integers(count, size=count)
        means.append(np.average(differences[drawn], weights=units.weights[drawn]))
    low, high = np.percentile(means, (2.5, 97.5))
    difference = np.average(differences, weights=units.weights)
    return {"difference": float(difference), "low": float(low), "high": float(high)}


# ---- what is compared ---------------------------------------------------------------------------


def module_rows(lift_paths: list[str]) -> dict[str, str]:
    """The names of the modules' rows: {row name: path}.

    Several modules are told apart by their files' names or, where these are equal, by their
    folders, too.
    """
    if len(lift_paths) == 1:
        return {"+ LiFT": lift_paths[0]}
    names = [Path(path).stem for path in lift_paths]
    if len(set(names)) < len(names):
        names = [f"{Path(path).parent.name}/{Path(path).stem}" for path in lift_paths]
    if len(set(names)) < len(names):
        raise ValueError("two of --lift_path have one name: rename one, or pass it once")
    return {f"+ {name}": path for name, path in zip(names, lift_paths)}


def table_rows(lift_paths: list[str], imsize: int) -> dict[str, dict[str, Any]]:
    """The rows of the tables: {row name: flags besides the backbone's}.

    The last one is the backbone at twice the size, `full_size_row`.
    """
    rows: dict[str, dict[str, Any]] = {
        "backbone": {"imsize": imsize},
        "+ bilinear": {"imsize": imsize, "upsample": "bilinear"},
    }
    for name, path in module_rows(lift_paths).items():
        rows[name] = {"imsize": imsize, "lift_path": path}
        rows[f"{name} x2"] = {"imsize": imsize, "lift_path": path, "lift_iter": 2}
    rows[full_size_row(imsize)] = {"imsize": 2 * imsize}
    return rows


def full_size_row(imsize: int) -> str:
    """The name of the row of the backbone at twice the size."""
    return f"backbone at {2 * imsize}"


def compared(lift_paths: list[str]) -> list[tuple[str, str]]:
    """Pairs of rows (one, other) whose differences are told: figure of one less that of other."""
    modules = list(module_rows(lift_paths))
    pairs = [(module, "+ bilinear") for module in modules]
    for later in modules[1:]:
        pairs.append((later, modules[0]))
        pairs.append((f"{later} x2", f"{modules[0]} x2"))
    return pairs


# ---- without annotations ------------------------------------------------------------------------


class Fitted(NamedTuple):
    """What is fitted on other photos: the mean feature, the k-means clusters, and the probe."""

    mean: Tensor     # [C, 1, 1]
    centres: Tensor  # [K, C], of the clusters; for features minus the mean, at unit length
    weight: Tensor   # [K, C], of the probe; for features at unit length
    bias: Tensor     # [K]

    def labels(self, feats: Tensor) -> Tensor:
        """The clusters [h, w] to which the cells of a map [C, h, w] belong."""
        unit = F.normalize(feats - self.mean, dim=0)
        cosines = torch.einsum("chw,kc->khw", unit, self.centres)
        return cosines.argmax(0)

    def agreement(self, feats: Tensor, labels: Tensor) -> float:
        """The percentage of cells of a map [C, h, w] for which the probe finds labels [h, w]."""
        unit = F.normalize(feats, dim=0)
        scores = torch.einsum("chw,kc->khw", unit, self.weight) + self.bias[:, None, None]
        found = scores.argmax(0)                                           # [h, w]
        return 100 * (found == labels).double().mean().item()


def fit(maps: Tensor) -> Fitted:
    """Fit mean, clusters and probe on the backbone's maps [N, C, h, w]."""
    mean = maps.mean((0, 2, 3))
    cells = maps.permute(0, 2, 3, 1).flatten(0, 2)                         # [n, C], n = N*h*w

    # the labels: clusters by cosine
    centred = F.normalize(cells - mean, dim=1)
    clusters = MiniBatchKMeans(KINDS, random_state=0, batch_size=8192, n_init=3)
    clusters.fit(centred.numpy())
    centres = F.normalize(torch.from_numpy(clusters.cluster_centers_).float(), dim=1)
    labels = (centred @ centres.t()).argmax(1)                             # [n]

    # the probe is fitted on standardised inputs, which L-BFGS needs
    unit = F.normalize(cells, dim=1)
    unit_mean = unit.mean(0)
    unit_std = unit.std()
    inputs = (unit - unit_mean) / unit_std
    torch.manual_seed(0)
    probe = nn.Linear(cells.shape[1], KINDS)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(inputs), labels) + 1e-4 * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)

    # the standardisation goes into the weights, so that the probe takes unit features
    weight = probe.weight.detach() / unit_std
    bias = probe.bias.detach() - weight @ unit_mean
    return Fitted(mean[:, None, None], centres, weight, bias)


def read_square(path: Path, side: int) -> Tensor:
    """Read a photo as a square [3, S, S] of uint8, as train_lift.py does."""
    photo = resize(read_image(path), [side, side], InterpolationMode.BILINEAR)
    return pil_to_tensor(photo)


def smaller(photo: Tensor, factor: int) -> Tensor:
    """A square [..., S, S] of uint8 made smaller, antialiased."""
    side = photo.shape[-1] // factor
    return resize(photo, [side, side], antialias=True)


def encode(extractor: DenseExtractor, photos: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, S, S] of uint8 photos, and their features [B, C, h, w]."""
    images = extractor.normalize(photos.to(extractor.device).float() / 255)
    return images, extractor(images)


def turned_copy(photo: Tensor, random: np.random.RandomState) -> tuple[Tensor, np.ndarray]:
    """Turn, scale, shift and jitter a square [3, S, S] at random.

    Returns:
        The copy [3, S, S], and a matrix [2, 3] from (x, y, 1) in the photo to (x, y) in the copy.
    """
    side = photo.shape[-1]
    angle = np.deg2rad(random.uniform(-20, 20))
    scale = random.uniform(0.75, 1.25)
    shift = random.uniform(-side * 25 / 224, side * 25 / 224, 2)  # up to 11 % of the side
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]])

    # around the centre: x -> turn @ (x - centre) + centre + shift
    centre = np.array([(side - 1) / 2, (side - 1) / 2])
    matrix = np.column_stack([turn, centre + shift - turn @ centre])       # [2, 3]

    pixels = photo.permute(1, 2, 0).numpy()                                # [S, S, 3]
    turned = cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR)
    brightness, contrast = random.uniform(0.8, 1.2, 2)
    jittered = turned.astype(np.float32) * brightness
    jittered = (jittered - jittered.mean()) * contrast + jittered.mean()
    copy = torch.from_numpy(jittered.clip(0, 255).astype(np.uint8))
    return copy.permute(2, 0, 1), matrix


def points_in_both(
    matrix: np.ndarray, side: int, random: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """Random points of a photo that its copy shows too, and their places in the copy.

    Args:
        matrix: [2, 3], from photo to copy (see turned_copy).
    Returns:
        Both [P, 2] as (x, y), P = POINTS; less if the copy shows too little of the photo.
    """
    # five times as many as needed, as some leave the copy; a few pixels from all borders
    points = random.uniform(8, side - 8, (5 * POINTS, 2))
    places = points @ matrix[:, :2].T + matrix[:, 2]
    inside = ((places >= 4) & (places <= side - 5)).all(axis=1)
    chosen = np.flatnonzero(inside)[:POINTS]
    return torch.from_numpy(points[chosen]).float(), torch.from_numpy(places[chosen]).float()


def self_match(feats: Tensor, copy: Tensor, points: Tensor, places: Tensor, side: int) -> Tensor:
    """The percentages of points that are found again, one for each of ALPHAS.

    Each point is looked for among places 4 pixels of the full photo apart, which are 2 at --imsize.

    Args:
        feats, copy: maps [C, h, w] of a photo of side x side pixels and of its copy.
        points, places: [P, 2] as (x, y), in pixels, pixel centres being whole numbers.
    """
    corners = (points + 0.5) / side * 2 - 1  # in -1..1 from corner to corner, for grid_sample
    sampled = F.grid_sample(
        feats[None], corners[None, None], padding_mode="border", align_corners=False
    )                                                                      # [1, C, 1, P]
    queries = F.normalize(sampled[0, :, 0], dim=0)                         # [C, P]

    per_side = side // 4
    dense = F.interpolate(copy[None], (per_side, per_side), mode="bilinear", align_corners=False)
    keys = F.normalize(dense[0].flatten(1), dim=0)                         # [C, per_side^2]
    best = (queries.t() @ keys).argmax(1)                                  # [P]
    cells = torch.stack([best % per_side, best // per_side], dim=1)        # [P, 2] as (x, y)
    found = (cells + 0.5) * 4 - 0.5                                        # the cells' centres
    distances = (found - places).norm(dim=1) / side
    return torch.stack([100 * (distances < alpha).double().mean() for alpha in ALPHAS])


def upsampled_against_full(
    photo: Tensor,
    half: tuple[Tensor, Tensor],
    full: Tensor,
    extractor: DenseExtractor,
    ups: dict[str, Upsampler],
    fitted: Fitted,
) -> dict[str, dict[str, float]]:
    """What the rows make of the smaller photos, against the features of the whole one.

    Args:
        photo: a square [3, S, S] of uint8.
        half: its `encode`d half.
        full: the backbone's features [C, h, w] of the photo.
        ups: {row name: its upsampler}.
    Returns:
        {row name: {column name: value}}.
    """
    half_images, half_feats = half                                         # [1, C, h/2, w/2]
    quarter_images, quarter = encode(extractor, smaller(photo[None], 4))   # [1, C, h/4, w/4]

    # what each row makes of the smaller photos: [1, C, h, w]
    x2 = {"backbone": F.interpolate(half_feats, scale_factor=2)}
    x4 = {"+ bilinear": F.interpolate(quarter, scale_factor=4, mode="bilinear")}
    for name, up in ups.items():
        if up.factor == 2:
            x2[name] = up(half_images, half_feats)
        elif up.factor == 4:
            x4[name] = up(quarter_images, quarter)

    figures: dict[str, dict[str, float]] = {name: {} for name in ups}
    labels = fitted.labels(full)
    for size, made in (("x2", x2), ("x4", x4)):
        for name, feats in made.items():
            mine = feats[0].cpu()
            cosines = F.cosine_similarity(mine, full, dim=0)
            centred = F.cosine_similarity(mine - fitted.mean, full - fitted.mean, dim=0)
            figures[name][f"cosine {size}"] = cosines.mean().item()
            figures[name][f"centred {size}"] = centred.mean().item()
            figures[name][f"probe {size}"] = fitted.agreement(mine, labels)
    return figures


def self_matches(
    photo: Tensor,
    seed: int,
    half: tuple[Tensor, Tensor],
    full: Tensor,
    extractor: DenseExtractor,
    ups: dict[str, Upsampler],
    at_full_size: str,
) -> dict[str, dict[str, float]]:
    """How many points each row finds again in COPIES copies of a photo, in percent.

    Args:
        photo, half, full, ups: as in upsampled_against_full.
        seed: of the copies.
        at_full_size: the row of the backbone on the whole photo.
    Returns:
        {row name: {column name: value}}.
    """
    side = photo.shape[-1]
    random = np.random.RandomState(seed)
    copies = []
    points_and_places = []
    for _ in range(COPIES):
        copy, matrix = turned_copy(photo, random)
        copies.append(copy)
        points_and_places.append(points_in_both(matrix, side, random))
    stacked = torch.stack(copies)                                          # [COPIES, 3, S, S]

    half_images, half_feats = half
    half_copy_images, half_copy_feats = encode(extractor, smaller(stacked, 2))
    figures: dict[str, dict[str, float]] = {}
    for name, up in ups.items():
        if name == at_full_size:
            mine = full
            _, of_copies = encode(extractor, stacked)
        else:
            mine = up(half_images, half_feats)[0].cpu()
            of_copies = up(half_copy_images, half_copy_feats)

        shares = torch.zeros(len(ALPHAS))
        for feats, (points, places) in zip(of_copies.cpu(), points_and_places):
            shares += self_match(mine, feats, points, places, side) / COPIES
        figures[name] = {}
        for alpha, share in zip(ALPHAS, shares.tolist()):
            figures[name][f"self-match@{alpha}"] = share
    return figures


def measure_photo(
    photo: Tensor,
    seed: int,
    extractor: DenseExtractor,
    ups: dict[str, Upsampler],
    at_full_size: str,
    fitted: Fitted,
) -> dict[str, dict[str, float]]:
    """All figures of one photo: {row name: {column name: value}}.

    Args:
        photo: a square [3, S, S] of uint8, S twice the --imsize of the tables.
        seed: of its copies.
        ups: {row name: its upsampler}.
        at_full_size: the row of the backbone on photos of side S; all others read those of S/2.
    """
    _, full_feats = encode(extractor, photo[None])
    full = full_feats[0].cpu()                                             # [C, h, w]
    half = encode(extractor, smaller(photo[None], 2))

    figures = upsampled_against_full(photo, half, full, extractor, ups, fitted)
    # the most that the probe can find: on the features whose labels are asked for
    figures[at_full_size]["probe x2"] = fitted.agreement(full, fitted.labels(full))

    matches = self_matches(photo, seed, half, full, extractor, ups, at_full_size)
    for name, row in matches.items():
        figures[name].update(row)
    return figures


@torch.no_grad()
def maps_to_fit(paths: list[Path], extractor: DenseExtractor, side: int) -> Tensor:
    """The backbone's maps [N, C, h, w] of FIT_PHOTOS photos, evenly spread over the list."""
    maps = []
    for path in tqdm(spread(paths, FIT_PHOTOS), desc="fit", unit="photo", disable=None):
        photo = read_square(path, side)
        _, feats = encode(extractor, photo[None])
        maps.append(feats.cpu())
    return torch.cat(maps)


def folder_to_fit(args: Namespace) -> Path | None:
    """The photos to fit on; None where the figures without annotations are not measured."""
    folder = Path(args.dataroot, "train_images")
    if args.fit_photos:
        folder = Path(args.fit_photos)
    if not args.photos or not folder.exists():
        return None
    return folder


def check_imsize(imsize: int, patch: int) -> None:
    """Raise ValueError unless half of imsize, at which photos are read too, is in whole patches."""
    step = 2 * patch
    if imsize % step:
        what = f"--imsize {imsize} is no multiple of {step}, twice the patch"
        raise ValueError(f"{what}: pass {step * math.ceil(imsize / step)}")


@torch.no_grad()
def measure_photos(
    args: Namespace, extractor: DenseExtractor, ups: dict[str, Upsampler]
) -> dict[str, dict[str, Cell]]:
    """The figures that need no annotations: {row name: {title: cell}}.

    Without photos the rows are empty, and a note on stderr says so.
    """
    folder = folder_to_fit(args)
    if folder is None:
        what = "no figures without annotations"
        print(f"note: {what}: they need --photos and --fit_photos", file=sys.stderr)
        return {name: {} for name in ups}

    side = 2 * args.imsize
    maps = maps_to_fit(list_images(folder), extractor, side)
    with torch.enable_grad():  # the probe is trained
        fitted = fit(maps)
    paths = []
    for root in args.photos:
        paths += list_images(root)
    paths = spread(paths, MOST_PHOTOS)

    at_full_size = full_size_row(args.imsize)
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ups}
    for index, path in enumerate(tqdm(paths, desc="photos", unit="photo", disable=None)):
        photo = read_square(path, side)
        figures = measure_photo(photo, index, extractor, ups, at_full_size, fitted)
        for name, row in figures.items():
            for title, value in row.items():
                found[name][title].append(value)

    cells: dict[str, dict[str, Cell]] = {name: {} for name in ups}
    for name, row in found.items():
        for title, values in row.items():
            units = alike(values)
            cells[name][title] = Cell(units.mean(), units)
    return cells


# ---- on annotated data --------------------------------------------------------------------------


def find_root(dataroot: str, folders: tuple[str, ...], markers: tuple[str, ...]) -> Path | None:
    """The first of the folders below DATAROOT that holds one of the markers, or None."""
    for folder in folders:
        root = Path(dataroot, folder)
        if any((root / marker).exists() for marker in markers):
            return root
    return None


def find_roots(dataroot: str) -> dict[str, Path]:
    """{data set: its folder} of those that are there."""
    # {data set: (names that its folder may have, what lies in it)}
    places = {
        "SPair": (("SPair-71k", "."), ("PairAnnotation",)),
        "DAVIS": (("DAVIS", "."), ("ImageSets/2017/val.txt",)),
        "VOC07": (("voc", "."), ("VOC2007", "VOCdevkit/VOC2007")),
        "VOC12": (("voc", "."), ("VOC2012", "VOCdevkit/VOC2012")),
        "COCO20k": (("coco20k", "."), ("coco_20k_filenames.txt",)),
    }
    roots = {}
    for name, (folders, markers) in places.items():
        root = find_root(dataroot, folders, markers)
        if root is not None:
            roots[name] = root
    return roots


def as_flags(given: dict[str, Any]) -> list[str]:
    """Settings as the flags of a command line, those that are None left out."""
    flags = []
    for name, value in given.items():
        if value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def as_command(script: str, argv: list[str]) -> str:
    """A command line as a person would type it."""
    return shlex.join(["python", f"{script}.py", *argv])


def run(script: str, argv: list[str]) -> dict[str, Any]:
    """The results of one of the scripts, run in this process."""
    print(as_command(script, argv), file=sys.stderr)
    module = import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        module.parser().run(module.main, [*argv, "--json", str(file)])
        return json.loads(file.read_text())["results"]


def pair_units(matches: list[eval_spair.Match], alpha: float) -> Units:
    """The PCK of every pair, so weighed that their mean is the mean over the categories.

    A keypoint weighs the same as the others of its category, and all categories weigh the same.
    """
    keypoints: dict[str, int] = defaultdict(int)  # of each category
    for match in matches:
        keypoints[match.pair.category] += len(match.source)
    values = []
    weights = []
    for match in matches:
        share_of_category = len(match.source) / keypoints[match.pair.category]
        values.append(100 * eval_spair.correct(match, alpha).double().mean().item())
        weights.append(share_of_category / len(keypoints))
    return Units(np.array(values), np.array(weights))


def spair_columns(
    root: Path, extractor: DenseExtractor, up: Upsampler, imsize: int
) -> dict[str, Cell]:
    """PCK of all pairs, by dot products and by cosines; the units are pairs."""

    def features(images: Tensor) -> Tensor:
        images = extractor.normalize(images.to(extractor.device))
        return up(images, extractor(images))

    pairs = eval_spair.read_pairs(root, per_category=0)
    alphas_by_dot = {"SPair PCK@.1": 0.1, "PCK@.05": 0.05}
    alphas_by_cosine = {"PCK@.1 cos": 0.1}
    cells = {}
    for cosine, alphas in ((False, alphas_by_dot), (True, alphas_by_cosine)):
        matches = eval_spair.match_pairs(features, pairs, imsize, cosine)
        means = eval_spair.evaluate(matches)["mean"]
        for title, alpha in alphas.items():
            cells[title] = Cell(means[f"pck@{alpha}"], pair_units(matches, alpha))
    return cells


def davis_columns(argv: list[str]) -> dict[str, Cell]:
    """J&F of DAVIS; the units are objects."""
    results = run("eval_davis", argv)
    objects = []
    for region, contour in results["per_object"].values():
        if region is not None:  # None: nothing of a short video is scored
            objects.append(50 * (region + contour))  # the mean of both, in percent
    return {"DAVIS J&F": Cell(100 * results["J&F-Mean"], alike(objects))}


def corloc_columns(dataset: str, argv: list[str], folder: Path) -> dict[str, Cell]:
    """CorLoc of a data set of TokenCut; the units are photos, read from its predictions.

    Args:
        folder: where these flags let eval_tokencut.py write its predictions.
    """
    results = run("eval_tokencut", argv)
    photos = []
    for line in Path(folder, "predictions.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "correct" in entry:
            photos.append(100.0 * entry["correct"])  # 0 or 100
    return {f"{dataset} CorLoc": Cell(results["corloc"], alike(photos))}


def data_columns(
    args: Namespace, name: str, row: dict[str, Any], extractor: DenseExtractor, up: Upsampler
) -> tuple[dict[str, Cell], list[str]]:
    """The figures of one row on all data sets that are there.

    Args:
        name, row: of table_rows.
    Returns:
        {title: cell}, and the command lines that give these figures.
    """
    model = extractor.name.replace("/", "_").replace(":", "_")
    below = Path(model, name.replace(" ", "_").replace("/", "_"))
    folder = Path(args.runs, below)
    told = Path("runs", below)  # in the command lines: a folder of no machine in particular
    backbone = {flag: getattr(args, flag) for flag in BACKBONE}
    given = as_flags({**backbone, **row})
    cells: dict[str, Cell] = {}
    commands = []
    for dataset, root in find_roots(args.dataroot).items():
        argv = ["--dataroot", str(root)]
        if dataset == "SPair":
            # both commands in one, with the extractor that is here
            argv += ["--pairs_per_category", "0", *given]
            commands.append(as_command("eval_spair", argv))
            commands.append(as_command("eval_spair", [*argv, "--match", "cosine"]))
            cells.update(spair_columns(root, extractor, up, row["imsize"]))
        elif dataset == "DAVIS":
            argv += [*given, "--output_dir"]
            commands.append(as_command("eval_davis", [*argv, str(told)]))
            cells.update(davis_columns([*argv, str(folder)]))
        else:
            argv += ["--dataset", dataset]
            if dataset == "COCO20k":
                argv += ["--tau", "0.3"]  # of the LiFT paper
            else:
                argv += ["--set", "trainval"]
            argv += [*given, "--output_dir"]
            commands.append(as_command("eval_tokencut", [*argv, str(told / dataset)]))
            output = folder / dataset
            cells.update(corloc_columns(dataset, [*argv, str(output)], output))
    return cells, commands


# ---- cost ---------------------------------------------------------------------------------------


def cost(extractor: DenseExtractor, up: Upsampler, imsize: int) -> dict[str, float | None]:
    """Multiplications, time and memory of the features of one image, as columns."""
    image = torch.rand(1, 3, imsize, imsize)

    def features() -> Tensor:
        return up(image, extractor(image))

    spent = measure(features, extractor.device)
    return {"GMACs": count_macs(features) / 1e9, "ms": spent["ms"], "MiB": spent["peak_mb"]}


def machine(device: torch.device) -> str:
    """Where it ran, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


# ---- tables -------------------------------------------------------------------------------------

COST = ("GMACs", "ms", "MiB")


def number(value: float | None) -> str:
    """A figure as text: three decimals below 1, two below 100, else none. None is empty text."""
    if value is None:
        return ""
    decimals = 0
    if abs(value) < 1:
        decimals = 3
    elif abs(value) < 100:
        decimals = 2
    return f"{value:.{decimals}f}"


def with_error(value: float | None, error: float | None) -> str:
    """A figure and its standard error, with the decimals of the figure."""
    text = number(value)
    if value is None or error is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {error:.{decimals}f}"


def table(lines: dict[str, dict[str, str]], titles: list[str]) -> str:
    """A Markdown table of {row name: {title: text}}."""
    text = f"|  | {' | '.join(titles)} |\n"
    text += f"| --- | {' | '.join(['---:'] * len(titles))} |\n"
    for name, line in lines.items():
        cells = [line.get(title, "") for title in titles]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def titles_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """All titles of the rows, in the order in which they first come."""
    titles: dict[str, None] = {}
    for row in rows.values():
        titles.update(dict.fromkeys(row))
    return list(titles)


def is_of_photos(title: str) -> bool:
    """Whether a column needs no annotations."""
    return title.startswith(("cosine", "centred", "probe", "self-match"))


def tables(record: dict[str, Any]) -> str:
    """The tables of one backbone: on data sets, on photos, and of cost.

    A table without columns is left out.
    """
    errors = record.get("errors", {})
    lines: dict[str, dict[str, str]] = {}
    for name, row in record["rows"].items():
        row_errors = errors.get(name, {})
        lines[name] = {}
        for title, value in row.items():
            lines[name][title] = with_error(value, row_errors.get(title))

    of_photos: list[str] = []
    of_data: list[str] = []
    of_cost: list[str] = []
    for title in titles_of(lines):
        if title in COST:
            of_cost.append(title)
        elif is_of_photos(title):
            of_photos.append(title)
        else:
            of_data.append(title)
    parts = [table(lines, titles) for titles in (of_data, of_photos, of_cost) if titles]
    return "\n".join(parts)


def differences_table(differences: list[dict[str, Any]]) -> str:
    """Differences of rows with their intervals; in bold where zero lies outside."""
    lines: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in differences:
        decimals = 1
        if entry["column"].startswith(("cosine", "centred")):
            decimals = 3
        difference = f"{entry['difference']:+.{decimals}f}"
        low = f"{entry['low']:+.{decimals}f}"
        high = f"{entry['high']:+.{decimals}f}"
        text = f"{difference} ({low} to {high})"
        if entry["low"] > 0 or entry["high"] < 0:
            text = f"**{text}**"

        name = f"{entry['row']} less {entry['than'].removeprefix('+ ')}"
        lines[name][entry["column"]] = text
    return table(lines, titles_of(lines))


def section(model: str, record: dict[str, Any]) -> str:
    """The section of one backbone in the Markdown file."""
    libraries = record["settings"]["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    text = f"\n## {model}\n\n    {record['command']}\n\n{record['machine']}; {versions}.\n\n"
    text += tables(record)
    if record.get("differences"):
        text += "\nDifferences, with 95 % intervals; bold where they leave out zero:\n\n"
        text += differences_table(record["differences"])
    return text


def paper() -> str:
    """The paper's table, and the commands that would give each of its rows."""
    titles = ["SPair PCK@.1", "PCK@.05", "DAVIS J&F", "COCO20k CorLoc"]
    lines = {}
    for row, values in PAPER.items():
        lines[row] = {title: number(value) for title, value in zip(titles, values)}
    text = NOT_RUN + table(lines, titles) + MODULE

    rows = table_rows(["pretrained/lift_dino_vits16.pth"], 224)  # PAPER's rows are among them
    for index, row in enumerate(PAPER):
        given = as_flags({"model_type": "dino_vits16", **rows[row]})
        output = ["--output_dir", f"paper/{index}"]
        coco = ["--dataset", "COCO20k", "--tau", "0.3", *output]
        commands = [
            as_command("eval_spair", ["--dataroot", "SPair-71k", *given]),
            as_command("eval_davis", ["--dataroot", "DAVIS", *output, *given]),
            as_command("eval_tokencut", ["--dataroot", "COCO20k", *coco, *given]),
        ]
        text += f"\n{row}:\n\n" + "".join(f"    {command}\n" for command in commands)
    return text


# ---- the whole ----------------------------------------------------------------------------------


def default_photos(dataroot: str) -> list[str]:
    """The folders of photos that are measured on where none are given.

    Only photos lie in them: VOC also has masks, which are images, too.
    """
    voc = Path(dataroot, "voc")
    folders = sorted(voc.glob("VOCdevkit/*/JPEGImages"))
    folders += sorted(voc.glob("*/VOCdevkit/*/JPEGImages"))
    folders.append(Path(dataroot, "coco20k/COCO/images"))
    return [str(folder) for folder in folders if folder.is_dir()]


def differences_of(
    cells: dict[str, dict[str, Cell]], pairs: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The differences of pairs of rows in every column that both have.

    Args:
        cells: {row name: {title: cell}}.
        pairs: as `compared` gives them.
    """
    found = []
    for row, than in pairs:
        for title, cell in cells[row].items():
            if title in cells[than]:
                entry: dict[str, Any] = {"row": row, "than": than, "column": title}
                entry.update(interval(cell.units, cells[than][title].units))
                found.append(entry)
    return found


def measure_all(args: Namespace, extractor: DenseExtractor) -> dict[str, Any]:
    """Rows, errors, differences and commands of one backbone."""
    rows = table_rows(args.lift_path, args.imsize)
    ups = {}
    for name, row in rows.items():
        flags = {**NO_LIFT, **row}  # all that `upsampler` reads
        ups[name] = upsampler(Namespace(**flags), extractor)

    of_photos = measure_photos(args, extractor, ups)
    cells = {}
    commands = []
    values: dict[str, dict[str, float | None]] = {}
    errors = {}
    for name, row in rows.items():
        of_data, used = data_columns(args, name, row, extractor, ups[name])
        commands += used
        cells[name] = {**of_data, **of_photos[name]}
        values[name] = {title: cell.value for title, cell in cells[name].items()}
        errors[name] = {title: cell.units.error() for title, cell in cells[name].items()}
        values[name].update(cost(extractor, ups[name], row["imsize"]))
    return {
        "rows": values,
        "errors": errors,
        "differences": differences_of(cells, compared(args.lift_path)),
        "commands": commands,
    }


def earlier_records(path: Path) -> dict[str, Any]:
    """What an earlier run wrote: {backbone: its record}, empty without such a file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        records = json.loads(path.read_text())
        for model, record in records.items():
            section(model, record)  # whether it can be told anew
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{path} holds no tables of this script ({first_line(error)})"
        raise ValueError(f"{what}: remove it, or pass another --output") from error
    return records


def write_tables(output: str, records: dict[str, Any]) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    text = ABOUT
    for model, record in records.items():
        text += section(model, record)
    text += paper()
    write_text(f"{output}.json", json.dumps(records, indent=1) + "\n")
    write_text(f"{output}.md", text)


def main(args: Namespace) -> None:
    """Measure one backbone, print its section and its JSON, and write both files anew."""
    check_range(args, imsize=1)
    if not find_roots(args.dataroot):
        what = f"{args.dataroot} holds none of SPair-71k, DAVIS, voc and coco20k"
        raise ValueError(f"{what}: correct --dataroot")
    if args.photos is None:
        args.photos = default_photos(args.dataroot)
    records = earlier_records(Path(f"{args.output}.json"))
    extractor = build_extractor(args)
    if folder_to_fit(args) is not None:
        check_imsize(args.imsize, extractor.patch)
    used = settings(args, device=str(extractor.device), **extractor.facts())

    # as they were: a place that cannot be written to is told now, and not after an hour
    write_tables(args.output, records)
    with tempfile.TemporaryDirectory() as temporary:
        if args.runs is None:
            args.runs = temporary
        measured = measure_all(args, extractor)

    record = {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "settings": used,
        "machine": machine(extractor.device),
        **measured,
    }
    records[extractor.name] = plain(record)
    print(section(extractor.name, record))
    report(record)
    write_tables(args.output, records)


if __name__ == "__main__":
    parser().run(main)
