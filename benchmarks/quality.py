"""Quality and cost in tables: a backbone alone, at double size, bilinear, and with LiFT modules.

    python benchmarks/quality.py --dataroot DATAROOT --model_type vit_mini16 \\
        --lift_path pretrained/lift_vit_mini16_attend.pth [ANOTHER.pth ...]

Three kinds of figures, each with its standard error:

- on --photos, without annotations: what is made of smaller photos against the backbone's own
  features (cosine, centred cosine, a linear probe), and points found again in turned, scaled and
  shifted copies of each photo (self-match). Of more than 500 photos, 500 are measured, evenly
  spread over the sorted list. --imsize must be a multiple of twice the patch here;
- by this repository's evaluations on whatever of CamVid, DAVIS, DAVIS2016, SPair-71k (all pairs),
  VOC (2007, 2012) and COCO20k lies in DATAROOT, at --imsize pixels (CamVid: 176x240);
- multiplications, time and peak memory of the features of one image, as in cost.py.

Differences of two rows have 95 % intervals by a paired bootstrap over photos, frames, pairs or
objects.
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
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie one folder up

from command import Command, add_backbone_args, check_range, note, progress, report, settings
from files import first_line, plain, write_text


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

import eval_segmentation
import eval_spair
from features import Features, build_features
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
CAMVID = "CamVid mIoU"
CAMVID_RATES = {CAMVID: "0.005", "CamVid at .0005": "0.0005"}  # the second is the protocol's

# DINO S/16 in the LiFT paper, second-hand: SPair PCK@.1 and @.05, DAVIS J&F, COCO20k CorLoc
PAPER = {
    "backbone": (24.76, 9.54, 33.0, 53.98),
    "+ bilinear": (26.72, 11.37, 37.0, 51.53),
    "+ LiFT": (28.68, 14.72, 44.3, 58.03),
    "backbone at 448": (28.60, 15.33, 50.9, 57.99),
}
ABOUT = f"""# Quality and cost

Written by `benchmarks/quality.py`. The commands behind every figure are in `quality.json`. Figures
are followed by their standard errors: over photos, frames, image pairs, or objects of videos.

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

**On annotated data.** mIoU, J&F, PCK and CorLoc in percent. CamVid is a linear probe trained on its
367 training photos and scored on its 233 test photos, at 176x240 pixels, with two learning rates:
`--lr 0.005`, and the protocol's own, at which the probe has not converged
(docs/segmentation.md). Its errors are those of the test photos alone: another seed of the probe
moves a figure by up to half a point. "DAVIS J&F" is of six sequences of DAVIS 2017, "DAVIS 2016
J&F" of eleven others.
"PCK@.1 cos" renormalises descriptors after interpolation (`--match cosine`).

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

    def __len__(self) -> int:
        return len(self.values)

    def figure(self, drawn: np.ndarray | None = None) -> float:
        """The mean of all units, or of those with the numbers `drawn`."""
        if drawn is None:
            drawn = np.arange(len(self))
        return float(np.average(self.values[drawn], weights=self.weights[drawn]))

    def error(self) -> float:
        """The standard error of the mean, if the units are drawn independently."""
        share = self.weights / self.weights.sum()
        return float(np.sqrt((share**2 * (self.values - self.figure()) ** 2).sum()))


class Frames(NamedTuple):
    """The frames whose pixels together have a mean IoU."""

    confusions: np.ndarray  # [n, K, K], truth by prediction

    def __len__(self) -> int:
        return len(self.confusions)

    def figure(self, drawn: np.ndarray | None = None) -> float:
        """The mean IoU of all frames, or of those with the numbers `drawn`, in percent."""
        if drawn is None:
            drawn = np.arange(len(self))
        # how often each is drawn, times its confusion: much faster than to index and add
        times = np.bincount(drawn, minlength=len(self)).astype(float)
        total = np.tensordot(times, self.confusions, axes=1)               # [K, K]
        union = total.sum(0) + total.sum(1) - total.diagonal()
        there = union > 0
        return float(100 * (total.diagonal()[there] / union[there]).mean())

    def error(self) -> float:
        """The standard error of the mean IoU, by the bootstrap over frames."""
        return float(np.std([self.figure(drawn) for drawn in resamples(len(self), 1000)]))


def resamples(count: int, times: int) -> Iterator[np.ndarray]:
    """Numbers of `count` units, drawn with replacement, so many times; always the same ones."""
    random = np.random.default_rng(0)
    for _ in range(times):
        yield random.integers(count, size=count)


def alike(values: list[float]) -> Units:
    """Units that weigh the same."""
    return Units(np.array(values, dtype=float), np.ones(len(values)))


class Cell(NamedTuple):
    """A cell of the tables: a figure as its script tells it, and the units behind it."""

    value: float
    units: Units | Frames


def interval(units: Units | Frames, other: Units | Frames) -> dict[str, float]:
    """The difference of two figures over the same units, and its 95 % interval by the bootstrap.

    Both have the same weights.
    """
    differences = []
    for drawn in resamples(len(units), RESAMPLES):
        differences.append(units.figure(drawn) - other.figure(drawn))
    low, high = np.percentile(differences, (2.5, 97.5))
    difference = units.figure() - other.figure()
    return {"difference": difference, "low": float(low), "high": float(high)}


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


def maps_of(features: Features, photos: Tensor) -> Tensor:
    """The features [B, C, h, w] of photos [B, 3, S, S] of uint8, on the CPU."""
    return features(photos.float() / 255).cpu()


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
    photo: Tensor, full: Tensor, rows: dict[str, Features], fitted: Fitted
) -> dict[str, dict[str, float]]:
    """What the rows make of the smaller photos, against the features of the whole one.

    Args:
        photo: a square [3, S, S] of uint8.
        full: the backbone's features [C, h, w] of the photo.
        rows: {row name: its features}.
    Returns:
        {row name: {column name: value}}.
    """
    half = smaller(photo[None], 2)
    quarter = smaller(photo[None], 4)

    # what each row makes of the smaller photos: [1, C, h, w]
    x2 = {"backbone": F.interpolate(maps_of(rows["backbone"], half), scale_factor=2)}
    of_quarter = maps_of(rows["backbone"], quarter)
    x4 = {"+ bilinear": F.interpolate(of_quarter, scale_factor=4, mode="bilinear")}
    for name, features in rows.items():
        if features.factor == 2:
            x2[name] = maps_of(features, half)
        elif features.factor == 4:
            x4[name] = maps_of(features, quarter)

    figures: dict[str, dict[str, float]] = {name: {} for name in rows}
    labels = fitted.labels(full)
    for size, made in (("x2", x2), ("x4", x4)):
        for name, feats in made.items():
            mine = feats[0]
            cosines = F.cosine_similarity(mine, full, dim=0)
            centred = F.cosine_similarity(mine - fitted.mean, full - fitted.mean, dim=0)
            figures[name][f"cosine {size}"] = cosines.mean().item()
            figures[name][f"centred {size}"] = centred.mean().item()
            figures[name][f"probe {size}"] = fitted.agreement(mine, labels)
    return figures


def self_matches(
    photo: Tensor, seed: int, rows: dict[str, Features], at_full_size: str
) -> dict[str, dict[str, float]]:
    """How many points each row finds again in COPIES copies of a photo, in percent.

    Args:
        photo, rows: as in upsampled_against_full.
        seed: of the copies.
        at_full_size: the row of the backbone on the whole photo.
    Returns:
        {row name: {column name: value}}.
    """
    side = photo.shape[-1]
    random = np.random.RandomState(seed)
    photo_and_copies = [photo]
    points_and_places = []
    for _ in range(COPIES):
        copy, matrix = turned_copy(photo, random)
        photo_and_copies.append(copy)
        points_and_places.append(points_in_both(matrix, side, random))
    stacked = torch.stack(photo_and_copies)                                # [1 + COPIES, 3, S, S]
    halved = smaller(stacked, 2)

    figures: dict[str, dict[str, float]] = {}
    for name, features in rows.items():
        read = halved
        if name == at_full_size:
            read = stacked
        mine, *of_copies = maps_of(features, read)
        shares = torch.zeros(len(ALPHAS))
        for feats, (points, places) in zip(of_copies, points_and_places):
            shares += self_match(mine, feats, points, places, side) / COPIES
        figures[name] = {}
        for alpha, share in zip(ALPHAS, shares.tolist()):
            figures[name][f"self-match@{alpha}"] = share
    return figures


def measure_photo(
    photo: Tensor, seed: int, rows: dict[str, Features], at_full_size: str, fitted: Fitted
) -> dict[str, dict[str, float]]:
    """All figures of one photo: {row name: {column name: value}}.

    Args:
        photo: a square [3, S, S] of uint8, S twice the --imsize of the tables.
        seed: of its copies.
        rows: {row name: its features}.
        at_full_size: the row of the backbone on photos of side S; all others read those of S/2.
    """
    full = maps_of(rows["backbone"], photo[None])[0]                       # [C, h, w]
    figures = upsampled_against_full(photo, full, rows, fitted)
    # the most that the probe can find: on the features whose labels are asked for
    figures[at_full_size]["probe x2"] = fitted.agreement(full, fitted.labels(full))
    for name, row in self_matches(photo, seed, rows, at_full_size).items():
        figures[name].update(row)
    return figures


@torch.no_grad()
def maps_to_fit(paths: list[Path], backbone: Features, side: int) -> Tensor:
    """The backbone's maps [N, C, h, w] of FIT_PHOTOS photos, evenly spread over the list."""
    maps = []
    for path in progress(spread(paths, FIT_PHOTOS), desc="fit", unit="photo"):
        maps.append(maps_of(backbone, read_square(path, side)[None]))
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
        what = f"--imsize {imsize} is not a multiple of {step}, twice the patch"
        raise ValueError(f"{what}: pass {step * math.ceil(imsize / step)}")


@torch.no_grad()
def measure_photos(args: Namespace, rows: dict[str, Features]) -> dict[str, dict[str, Cell]]:
    """The figures that need no annotations: {row name: {title: cell}}.

    Without photos the rows are empty, and a note on stderr says so.
    """
    folder = folder_to_fit(args)
    if folder is None:
        note("no figures without annotations: they need --photos and --fit_photos")
        return {name: {} for name in rows}

    side = 2 * args.imsize
    maps = maps_to_fit(list_images(folder), rows["backbone"], side)
    with torch.enable_grad():  # the probe is trained
        fitted = fit(maps)
    paths = []
    for root in args.photos:
        paths += list_images(root)
    paths = spread(paths, MOST_PHOTOS)

    at_full_size = full_size_row(args.imsize)
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in rows}
    for index, path in enumerate(progress(paths, desc="photos", unit="photo")):
        photo = read_square(path, side)
        figures = measure_photo(photo, index, rows, at_full_size, fitted)
        for name, row in figures.items():
            for title, value in row.items():
                found[name][title].append(value)

    cells: dict[str, dict[str, Cell]] = {name: {} for name in rows}
    for name, row in found.items():
        for title, values in row.items():
            units = alike(values)
            cells[name][title] = Cell(units.figure(), units)
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
        "CamVid": (("CamVid", "."), ("trainannot",)),
        "DAVIS": (("DAVIS", "."), ("ImageSets/2017/val.txt",)),
        "DAVIS 2016": (("DAVIS2016",), ("ImageSets/2017/val.txt",)),
        "SPair": (("SPair-71k", "."), ("PairAnnotation",)),
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


def camvid_cell(argv: list[str], root: Path, size: tuple[int, int], folder: Path) -> Cell:
    """The mean IoU of CamVid's test photos; the units are these photos.

    Args:
        size: (H, W) at which they are read.
        folder: where these flags let eval_segmentation.py write its label maps.
    """
    results = run("eval_segmentation", argv)
    data = eval_segmentation.choose_data("camvid", root, None, None)
    photos = eval_segmentation.read_photos(data, root, data.test, size, squash=True)
    classes = len(data.classes)
    confusions = []
    for number, sample in enumerate(photos.samples):
        predicted = eval_segmentation.read_mask(folder / eval_segmentation.map_name(sample))
        truth = photos.small(photos.full_classes(number))
        found = eval_segmentation.confusion(truth, torch.from_numpy(predicted), classes)
        confusions.append(found.numpy())
    return Cell(results["miou"], Frames(np.stack(confusions)))


def spair_columns(root: Path, features: Features, imsize: int) -> dict[str, Cell]:
    """PCK of all pairs, by dot products and by cosines; the units are pairs."""
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


def davis_columns(dataset: str, argv: list[str]) -> dict[str, Cell]:
    """J&F of DAVIS, or of DAVIS 2016; the units are objects."""
    results = run("eval_davis", argv)
    objects = []
    for region, contour in results["per_object"].values():
        if region is not None:  # None: nothing of a short video is scored
            objects.append(50 * (region + contour))  # the mean of both, in percent
    return {f"{dataset} J&F": Cell(100 * results["J&F-Mean"], alike(objects))}


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
    args: Namespace, name: str, row: dict[str, Any], features: Features
) -> tuple[dict[str, Cell], list[str]]:
    """The figures of one row on all data sets that are there.

    Args:
        name, row: of table_rows.
    Returns:
        {title: cell}, and the command lines that give these figures.
    """
    model = features.backbone.name.replace("/", "_").replace(":", "_")
    below = Path(model, name.replace(" ", "_").replace("/", "_"))
    folder = Path(args.runs, below)
    told = Path("runs", below)  # in the command lines: a folder of no machine in particular
    backbone = {flag: getattr(args, flag) for flag in BACKBONE}
    given = as_flags({**backbone, **row})
    cells: dict[str, Cell] = {}
    commands = []
    for dataset, root in find_roots(args.dataroot).items():
        argv = ["--dataroot", str(root)]
        if dataset == "CamVid":
            scale = row["imsize"] // args.imsize  # 2 in the row of the backbone at twice the size
            size = (176 * scale, 240 * scale)
            flags = {flag: value for flag, value in {**backbone, **row}.items() if flag != "imsize"}
            argv += ["--dataset", "camvid", "--size", *map(str, size), *as_flags(flags)]
            rates = dict(CAMVID_RATES)
            if scale > 1:  # four times the pixels: at the second rate it would take too long
                rates = {CAMVID: CAMVID_RATES[CAMVID]}
            for title, rate in rates.items():
                below = Path("camvid", rate)
                with_rate = [*argv, "--lr", rate, "--output_dir"]
                commands.append(as_command("eval_segmentation", [*with_rate, str(told / below)]))
                output = folder / below
                cells[title] = camvid_cell([*with_rate, str(output)], root, size, output)
        elif dataset == "SPair":
            # both commands in one, with the extractor that is here
            argv += ["--pairs_per_category", "0", *given]
            commands.append(as_command("eval_spair", argv))
            commands.append(as_command("eval_spair", [*argv, "--match", "cosine"]))
            cells.update(spair_columns(root, features, row["imsize"]))
        elif dataset.startswith("DAVIS"):
            if dataset == "DAVIS 2016":
                argv += ["--binary"]
            argv += [*given, "--output_dir"]
            place = dataset.replace(" ", "").lower()
            commands.append(as_command("eval_davis", [*argv, str(told / place)]))
            cells.update(davis_columns(dataset, [*argv, str(folder / place)]))
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


def cost(features: Features, imsize: int) -> dict[str, float | None]:
    """Multiplications, time and memory of the features of one image, as columns."""
    image = torch.rand(1, 3, imsize, imsize)

    def once() -> Tensor:
        return features(image)

    spent = measure(once, features.backbone.device)
    return {"GMACs": count_macs(once) / 1e9, "ms": spent["ms"], "MiB": spent["peak_mb"]}


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


def features_of(args: Namespace, row: dict[str, Any]) -> Features:
    """The Features of a row of table_rows."""
    return build_features(Namespace(**{**vars(args), **NO_LIFT, **row}))


def measure_all(args: Namespace, features: dict[str, Features]) -> dict[str, Any]:
    """Rows, errors, differences and commands of one backbone."""
    rows = table_rows(args.lift_path, args.imsize)
    of_photos = measure_photos(args, features)
    cells = {}
    commands = []
    values: dict[str, dict[str, float | None]] = {}
    errors = {}
    for name, row in rows.items():
        of_data, used = data_columns(args, name, row, features[name])
        commands += used
        cells[name] = {**of_data, **of_photos[name]}
        values[name] = {title: cell.value for title, cell in cells[name].items()}
        errors[name] = {title: cell.units.error() for title, cell in cells[name].items()}
        values[name].update(cost(features[name], row["imsize"]))
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
        what = f"{path} was not written by this script ({first_line(error)})"
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
        what = f"{args.dataroot} holds none of CamVid, DAVIS, SPair-71k, voc and coco20k"
        raise ValueError(f"{what}: correct --dataroot")
    if args.photos is None:
        args.photos = default_photos(args.dataroot)
    records = earlier_records(Path(f"{args.output}.json"))
    rows = table_rows(args.lift_path, args.imsize)
    backbone = features_of(args, rows["backbone"]).backbone
    if folder_to_fit(args) is not None:
        check_imsize(args.imsize, backbone.patch)
    used = settings(args, **backbone.facts())

    # as they were: a place that cannot be written to is told now, and not after an hour
    write_tables(args.output, records)
    features = {name: features_of(args, row) for name, row in rows.items()}
    with tempfile.TemporaryDirectory() as temporary:
        if args.runs is None:
            args.runs = temporary
        measured = measure_all(args, features)

    record = {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "settings": used,
        "machine": machine(backbone.device),
        **measured,
    }
    records[backbone.name] = plain(record)
    print(section(backbone.name, record))
    report(args, record)
    write_tables(args.output, records)


if __name__ == "__main__":
    parser().run(main)
