"""J and F of video object segmentation, as davis2017-evaluation computes them (semi-supervised).

    with ThreadPoolExecutor(4) as pool:
        results = evaluate(Path("results"), {"libby": annotations}, pool)   # masks of every frame
    print(table(results))
    write_csv(Path("scores"), results)

The objects of a video are the labels 1..max of its first annotation. Its first and last frames are
not scored, and 255 is background. Two things differ from davis2017-evaluation: decay does not wrap
in videos of more than 256 frames, and 255 in a result is background with a note, not an error.

Notation: H W pixels of a mask.
"""

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from command import note, progress
from files import first_line, replacing

VOID = 255  # pixels that nobody labelled; with --binary the object, as every other value but 0

CSVS = ("global_results-val.csv", "per-sequence_results-val.csv")
METRICS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
WITHOUT = "J&F-Mean without absent labels"

GREY = [label for label in range(256) for _ in range(3)]  # a palette as a flat list


# ---- masks --------------------------------------------------------------------------------------


def voc_palette() -> list[int]:
    """The palette of Pascal VOC as a flat list: a label's bits are dealt to red, green and blue."""
    palette = []
    for label in range(256):
        for channel in range(3):
            bits = [(label >> (3 * turn + channel)) & 1 for turn in range(3)]
            palette.append(bits[0] << 7 | bits[1] << 6 | bits[2] << 5)
    return palette


def davis_palette() -> list[int]:
    """The palette of DAVIS as a flat list: nearly VOC's first 22 colours, then shades of grey."""
    return [min(shade, 191) for shade in voc_palette()[: 3 * 22]] + GREY[3 * 22 :]


def labels_of_colours() -> dict[tuple[int, ...], int]:
    """{(R, G, B): label} of DAVIS's palette, of VOC's, and of grey; the first of them counts."""
    labels: dict[tuple[int, ...], int] = {}
    for palette in (davis_palette(), voc_palette(), GREY):
        for label, colour in enumerate(np.reshape(palette, (256, 3)).tolist()):
            labels.setdefault(tuple(colour), label)
    return labels


LABELS_OF_COLOURS = labels_of_colours()
# the greys that Pillow makes of DAVIS's colours of the labels 1 to 10: no video of it has more
SHADES = (38, 75, 113, 15, 53, 90, 128, 19, 57, 94)


def read_mask(path: Path) -> tuple[np.ndarray, list[int] | None]:
    """Read a mask: indexed, grey of 1, 8 or 16 bits, or in the colours of DAVIS's or VOC's palette.

    Returns:
        Its values [H, W] uint8, and its palette as a flat list, or None.
    Raises:
        FileNotFoundError, ValueError: it is missing, unreadable, or not a map of labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask {path}: restore it, or correct the path")
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # damaged files raise nearly anything
        what = f"{path} is not a readable PNG ({first_line(error)})"
        raise ValueError(f"{what}: restore it or write it anew") from error

    if image.format == "JPEG":
        raise ValueError(f"{path} is a JPEG, which blurs labels: save the mask as a PNG")
    if image.mode in ("P", "L", "1"):
        return np.array(image).astype(np.uint8), image.getpalette()
    if image.mode in ("RGB", "RGBA", "LA", "PA"):
        return read_colours(path, np.array(image.convert("RGBA"))), None

    values = np.array(image)
    if values.max() > 255 and not (values % 257).any():  # 8 bits, stretched to 16
        values = values // 257
    if values.min() < 0 or values.max() > 255:
        what = f"{path} holds values from {values.min()} to {values.max()}, which are not labels"
        raise ValueError(f"{what}: write labels 0, 1, 2, ... up to 254")
    return values.astype(np.uint8), None


def read_colours(path: Path, pixels: np.ndarray) -> np.ndarray:
    """The labels [H, W] uint8 of colours [H, W, 4]; ValueError for a colour in neither palette."""
    red, green, blue, alpha = np.moveaxis(pixels.astype(np.int32), -1, 0)
    codes = np.where(alpha > 0, (red << 16) | (green << 8) | blue, 0)  # transparent: background
    found, places = np.unique(codes, return_inverse=True)

    labels = []
    for code in found.tolist():
        colour = (code >> 16, (code >> 8) & 255, code & 255)
        if colour not in LABELS_OF_COLOURS:
            what = f"{path} has the colour {colour}, which is in neither DAVIS's nor VOC's palette"
            raise ValueError(f"{what}: write labels 0, 1, 2, ... as an indexed or grey PNG")
        labels.append(LABELS_OF_COLOURS[colour])
    return np.array(labels, np.uint8)[places].reshape(codes.shape)


@dataclass
class MaskReader:
    """Reads the masks of one video in one folder as labels [H, W] uint8; 255 is background.

    The first mask that is read decides what grey values mean: those of the palette's colours (38
    for its red, ...) are the labels of these colours.
    """

    binary: bool = False             # there is one object, whatever is not 0
    has_void: bool = False           # 255 was in one of the masks
    has_shades: bool = False         # grey values are those of the palette's colours
    table: np.ndarray | None = None  # the label of each value, [256] uint8

    def __call__(self, path: Path) -> np.ndarray:
        """The labels of a mask. Raises as `read_mask`."""
        values, palette = read_mask(path)
        if VOID in values:
            self.has_void = True
        if self.table is None:
            there = set(np.unique(values).tolist()) - {0, VOID}
            are_shades = SHADES[0] in there and there.issubset(SHADES)
            self.has_shades = are_shades and palette is None and not self.binary

            self.table = np.arange(256, dtype=np.uint8)
            if self.has_shades:
                self.table[list(SHADES)] = range(1, 11)
            self.table[VOID] = 0
            if self.binary:
                self.table[1:] = 1
        return cv2.LUT(values, self.table)

    def objects(self, path: Path) -> np.ndarray:
        """The labels of a video's first annotation; ValueError if none is an object to follow."""
        labels = self(path)
        if labels.any():
            return labels
        what = f"{path} marks no object: restore it, or leave its video out"
        if self.has_void:
            what = f"{path} holds nothing but 0 and 255, which is void in DAVIS 2017"
            what += ": pass --binary if 255 is the object, as in DAVIS 2016"
        raise ValueError(what)


def as_ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, such as "1-4, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(words)


# ---- the scores of a frame ----------------------------------------------------------------------


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that differ from their right, lower or lower-right neighbour.

    Mask and boundary are [H, W] bool. Of a map of labels, uint8, the boundary is what is not 0.
    """
    padded = np.pad(mask, (0, 1), mode="edge")
    right = mask ^ padded[:-1, 1:]
    lower = mask ^ padded[1:, :-1]
    lower_right = mask ^ padded[1:, 1:]
    return right | lower | lower_right


def disk(shape: tuple[int, int]) -> np.ndarray:
    """How far boundaries may be apart in masks (H, W): a disk of 0.8 % of the diagonal, uint8."""
    radius = math.ceil(0.008 * math.hypot(*shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """Region similarity J: intersection over union of masks [H, W] bool, 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    if union == 0:
        return 1.0
    return np.count_nonzero(mask & truth) / union


def contour(mask: np.ndarray, truth: np.ndarray, near: np.ndarray) -> float:
    """Contour accuracy F: the F-measure of masks' boundaries, matched within the disk `near`."""
    edge = boundary(mask)
    true_edge = boundary(truth)
    count = np.count_nonzero(edge)
    true_count = np.count_nonzero(true_edge)
    if count == 0 and true_count == 0:
        return 1.0
    if count == 0 or true_count == 0:
        return 0.0

    around = cv2.dilate(edge.view(np.uint8), near).view(bool)
    true_around = cv2.dilate(true_edge.view(np.uint8), near).view(bool)
    precision = np.count_nonzero(edge & true_around) / count
    recall = np.count_nonzero(true_edge & around) / true_count
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def score_frame(labels: np.ndarray, truth: np.ndarray, count: int) -> list[tuple[float, float]]:
    """(J, F) of each of the objects 1..count in two label maps [H, W] uint8 of one size."""
    near = disk(truth.shape)

    # only the part that holds all objects and boundaries: the rest adds nothing
    anything = labels | truth  # not 0 where either has an object
    x, y, width, height = cv2.boundingRect(anything)
    rows = slice(max(y - 1, 0), y + height + 1)
    columns = slice(max(x - 1, 0), x + width + 1)
    labels = labels[rows, columns]
    truth = truth[rows, columns]

    scores = []
    for number in range(1, count + 1):
        mask = labels == number
        true_mask = truth == number
        scores.append((jaccard(mask, true_mask), contour(mask, true_mask, near)))
    return scores


# ---- the scores of a video ----------------------------------------------------------------------


def score_video(
    annotations: list[Path], folder: Path, binary: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Score the masks in a folder, which have the names of the annotations.

    Returns:
        J and F [objects, 2, scored frames], and the objects that the first annotation lacks.
    """
    read_truth = MaskReader(binary)
    read_result = MaskReader(binary)
    first = read_truth.objects(annotations[0])
    count = int(first.max())
    absent = np.setdiff1d(np.arange(1, count + 1), first).tolist()

    scores = []
    for annotation in annotations[1:-1]:
        path = folder / f"{annotation.stem}.png"
        truth = read_truth(annotation)
        labels = read_result(path)
        check_result(path, labels, truth, count)
        scores.append(score_frame(labels, truth, count))

    if read_result.has_void and not binary:
        what = f"{folder} has label {VOID}, which counts as background"
        note(f"{what} (--binary: as the object)")
    for read, where in ((read_truth, annotations[0].parent), (read_result, folder)):
        if read.has_shades:
            what = f"the masks in {where} are grey, in the shades of DAVIS's palette"
            note(f"{what}: they were read as the labels of its colours")
    by_frame = np.reshape(scores, (-1, count, 2))  # [frames, objects, 2], also for no frame
    return by_frame.transpose(1, 2, 0), absent


def check_result(path: Path, labels: np.ndarray, truth: np.ndarray, count: int) -> None:
    """Raise ValueError unless a result has its annotation's size and no label above `count`."""
    what = ""
    if labels.shape != truth.shape:
        height, width = labels.shape
        true_height, true_width = truth.shape
        what = f"{width}x{height} pixels, its annotation {true_width}x{true_height} pixels"
        what += ": resize it (nearest neighbour) to the annotation"
    elif labels.max() > count:
        what = f"label {labels.max()}, and the first annotation none above {count}"
        what += ": use its labels, or pass --binary for one object that is not 0"
    if what:
        raise ValueError(f"{path} has {what}")


def summary(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of one object's J or F, given for its frames: [frames].

    Recall is the share above 0.5. Decay is the mean of the first quarter of the frames minus that
    of the last. All three are NaN without a frame.
    """
    if len(values) == 0:
        return math.nan, math.nan, math.nan

    # as in davis2017-evaluation: halves are rounded up, and quarters share the frame at their edge
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first = values[edges[0] : edges[1] + 1].mean()
    last = values[edges[3] : edges[4] + 1].mean()
    return values.mean(), (values > 0.5).mean(), first - last


# ---- the scores of all videos -------------------------------------------------------------------


def evaluate(
    masks: Path, annotations: dict[str, list[Path]], pool: ThreadPoolExecutor, binary: bool = False
) -> dict[str, Any]:
    """Score the folders masks/{video} with the threads of `pool`.

    Args:
        annotations: of every video, in the order of its frames.
    Returns:
        METRICS, which are means over all objects of all videos, and `per_object`, {name: [J, F]}.
        Objects of videos of one or two frames have no scored frame: they are NaN, and left out of
        the means. `absent`, {video: labels}, names objects that the first annotation does not show.
        They count, as in davis2017-evaluation; WITHOUT is the mean of the others.
    Raises:
        ValueError, FileNotFoundError: masks are missing, unreadable, of another size, or have more
            objects.
    """
    folders = [masks / video for video in annotations]
    jobs = pool.map(partial(score_video, binary=binary), annotations.values(), folders)
    scores = list(progress(jobs, total=len(folders), unit="video", desc="J&F"))
    short = [video for video, paths in annotations.items() if len(paths) < 3]
    if short:
        what = "not scored, since nothing lies between the first and the last frame"
        note(f"{what}: {', '.join(short)}")

    per_object = {}
    absent = {}
    every = []  # for each object: mean, recall and decay of J, then of F
    shown = []  # those of objects that the first annotation shows
    for video, (by_object, lacking) in zip(annotations, scores):
        if lacking:
            absent[video] = lacking
        for number, (region, edge) in enumerate(by_object, 1):
            row = summary(region) + summary(edge)
            per_object[f"{video}_{number}"] = [row[0], row[3]]
            every.append(row)
            if number not in lacking:
                shown.append(row)

    means = mean_of_scored(every)
    without = j_and_f(mean_of_scored(shown))
    if absent:
        labels = "; ".join(f"{video}: {as_ranges(numbers)}" for video, numbers in absent.items())
        what = "labels that the first mask does not show count, as in davis2017-evaluation"
        mean = rounded(without) or "-"
        note(f"{what} ({labels}); without them J&F-Mean is {mean} (--binary: all are one object)")
    results = dict(zip(METRICS, [j_and_f(means), *means]))
    return {**results, "per_object": per_object, "absent": absent, WITHOUT: without}


def mean_of_scored(rows: list[Any]) -> list[float]:
    """The column means of rows of six numbers; rows of NaN are left out, NaN if all are."""
    scored = [row for row in rows if not math.isnan(row[0])]
    if not scored:
        return 6 * [math.nan]
    return np.mean(scored, axis=0).tolist()


def j_and_f(means: list[float]) -> float:
    """The mean of the means of J and F, in a row of six numbers."""
    return (means[0] + means[3]) / 2


def rounded(value: float) -> str:
    """Three decimals, as in the CSV files of davis2017-evaluation; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.3f}"


def write_csv(folder: Path, results: dict[str, Any]) -> None:
    """Write the two CSV files of davis2017-evaluation: the global results, and those per object."""
    overall = [list(METRICS), [rounded(results[metric]) for metric in METRICS]]
    each = [["Sequence", "J-Mean", "F-Mean"]]
    for name, (region, edge) in results["per_object"].items():
        each.append([name, rounded(region), rounded(edge)])
    for name, rows in zip(CSVS, (overall, each)):
        with replacing(folder / name) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def table(results: dict[str, Any]) -> str:
    """J and F of each object, then the means, as text."""
    width = max(len(name) for name in (*results["per_object"], *METRICS))
    lines = [f"{'':{width}}       J       F"]
    for name, (region, edge) in results["per_object"].items():
        lines.append(f"{name:{width}} {rounded(region) or '-':>7} {rounded(edge) or '-':>7}")
    for metric in METRICS:
        lines.append(f"{metric:{width}} {rounded(results[metric]) or '-':>7}")
    return "\n".join(lines)
