"""DAVIS 2017: propagate the first mask of every video by dense features, and score J&F.

    python eval_davis.py --dataroot DAVIS --model_type dino_vits16 --lift_path lift.pth \\
        --output_dir results
    python eval_davis.py --dataroot DAVIS --score_only masks_of_another_method --output_dir scores

The first command writes indexed PNGs to results/davis_vidseg_224_layer11/{sequence}/ and scores
them. Interrupted, it keeps the sequences that are done and begins the interrupted one anew. The
folder keeps a record of the settings and weights that made its masks. A run with others is refused
there and needs another --output_dir.

The second command scores a folder of {sequence}/*.png and writes nothing into it.

Both write global_results-val.csv and per-sequence_results-val.csv as davis2017-evaluation does,
say where, and print a table of J and F per object and one line of JSON with settings and results.

Propagation is that of DINO's evaluation (Caron et al., arXiv 2104.14294, after Jabri et al., arXiv
2006.14613). Each cell takes the labels of the most similar cells, within a window, of the first and
the last frames. Scores are those of davis2017-evaluation, semi-supervised: the first and the last
frame do not count, and 255 is background. There are two differences. Decay does not wrap in videos
of more than 256 frames. And 255 in a result is background too, with a note, instead of an error.

The masks of DAVIS 2016 are 0 and 255, with 255 for the object: pass --binary.

--dataroot holds Annotations/480p, JPEGImages/480p (--score_only does without) and
ImageSets/2017/val.txt. On 2 CPU cores a frame at 224 takes about 0.1 s with ViT-S/16 and LiFT, 0.5
s with ViT-S/8 and LiFT, and 1.5 ms to score.

Notation: H W image pixels, h w the grid of features, C channels, n labels (background and objects),
T context frames, p patch size.
"""

import argparse
import csv
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from command import (
    RECORD,
    Command,
    add_backbone_args,
    add_lift_args,
    check_memory,
    check_one_process,
    check_range,
    claim_folder,
    first_line,
    inside,
    record,
    replacing,
    report,
    settings,
)


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", required=True, help="DAVIS 2017: Annotations, ImageSets, JPEGImages (480p)")
    add(
        "--output_dir", default="temp_davis_test",
        help="for davis_vidseg_{imsize}_layer{layer}, or with --score_only for the scores "
        "(default: temp_davis_test)",
    )  # fmt: skip
    add("--imsize", type=int, default=224, help="side to which frames are squashed (default: 224)")
    add("--short_side", type=int, help="DINO's resizing instead: pixels of the shorter side")
    add("--n_last_frames", type=int, default=7, help="context besides the first (default: 7)")
    add(
        "--size_mask_neighborhood", type=int, default=12,
        help="radius of the window, in cells; 0: everywhere (default: 12)",
    )  # fmt: skip
    add("--topk", type=int, default=5, help="context cells that vote (default: 5)")
    add("--sequences", nargs="+", help="only these (default: ImageSets/2017/val.txt)")
    add("--binary", action="store_true", help="255 is the object, as in DAVIS 2016, and not void")
    add("--score_only", metavar="DIR", help="propagate nothing, score DIR/{sequence}/*.png")
    add("--workers", type=int, default=4, help="threads for files and scores (default: 4)")
    add("--overlay", action="store_true", help="also write overlay/{sequence}/*.jpg")
    add("--video", metavar="MP4", help="also write the overlays of all sequences as one video")
    add("--json", metavar="FILE", help="also write the last line of the output to this file")
    add_backbone_args(command)
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports below

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from extractor import DenseExtractor, build_extractor
from lift import Upsampler, check_lift_args, upsampler
from photos import read_image

TEMPERATURE = 0.1
TILE = 14  # cells, the side of a block of targets: small blocks waste less, large ones are faster
BATCH = 4  # frames that go through the backbone at once
VOID = 255  # pixels that nobody labelled; with --binary the object
FPS = 24
LONGEST_NAME = 255  # characters of a folder's name
REMEDY = "pass another --output_dir"  # where a folder has masks of something else

CSVS = ("global_results-val.csv", "per-sequence_results-val.csv")
METRICS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")

# what --score_only uses: the rest of the settings is about propagation, and left out of its output
SCORING = (
    "dataroot", "sequences", "binary", "score_only", "workers", "output_dir", "overlay", "video",
    "json", "versions",
)  # fmt: skip

# flags that do not change the masks, or that the facts of backbone and LiFT state better
NOT_IN_MASKS = (
    "output_dir", "sequences", "workers", "score_only", "overlay", "video", "json",
    "model_type", "channel", "patch",
)  # fmt: skip


# ---- the data set -------------------------------------------------------------------------------


class Sequence(NamedTuple):
    """A video."""

    name: str
    masks: list[Path]   # its annotations, in order
    frames: list[Path]  # none for scoring alone


def find_sequences(
    dataroot: str | Path, names: list[str] | None, with_frames: bool
) -> list[Sequence]:
    """The sequences `names`, or those of ImageSets/2017/val.txt.

    Raises:
        FileNotFoundError: the list, a folder, a frame or an annotation is missing.
        ValueError: the list names no sequence, or a name can be none or leads out of the data set.
    """
    root = Path(dataroot)
    val = root / "ImageSets/2017/val.txt"
    if names:
        for name in names:
            if not 0 < len(name) <= LONGEST_NAME:
                what = f"--sequences has a name of {len(name)} characters"
                raise ValueError(f"{what}: pass folders of Annotations/480p, or leave it out")
    else:
        if not val.is_file():
            remedy = "correct --dataroot, or name sequences with --sequences"
            raise FileNotFoundError(f"no list of sequences at {val}: {remedy}")
        names = val.read_text(errors="replace").split()

        # file systems take no longer name: a wrong file was read as the list
        if not names or max(len(name) for name in names) > LONGEST_NAME:
            remedy = "restore it, or name sequences with --sequences"
            raise ValueError(f"{val} names no sequence, or what can be none: {remedy}")

    names = list(dict.fromkeys(names))  # each once
    return [find_sequence(root, name, with_frames) for name in names]


def find_sequence(root: Path, name: str, with_frames: bool) -> Sequence:
    """One sequence by its name.

    Raises:
        FileNotFoundError: it has no annotations or frames, or they are not in pairs.
        ValueError: the name leads out of the data set.
    """
    masks = find_files(inside(root / "Annotations/480p", name), "*.png")
    if not with_frames:
        return Sequence(name, masks, [])
    frames = find_files(inside(root / "JPEGImages/480p", name), "*.jpg")

    annotated = {path.stem for path in masks}
    filmed = {path.stem for path in frames}
    unpaired = sorted(annotated ^ filmed)
    if unpaired:
        what = "frame"
        if unpaired[0] in filmed:
            what = "annotation"
        raise FileNotFoundError(f"{name} has no {what} {unpaired[0]}: restore it in {root}")
    return Sequence(name, masks, frames)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, sorted; FileNotFoundError if there is none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder}: correct --dataroot or --sequences")
    return files


def read_indexed(path: Path) -> tuple[np.ndarray, list[int] | None]:
    """Read an indexed or grey PNG.

    Returns:
        Its values [H, W] uint8, and its palette as a flat list, or None.
    Raises:
        FileNotFoundError, ValueError: in one line that names the file.
    """
    if not path.is_file():
        remedy = "restore it, every frame but the first and the last is scored"
        raise FileNotFoundError(f"no mask {path}: {remedy}")
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"its mode is {image.mode}")
            return np.array(image).astype(np.uint8), image.getpalette()
    except Exception as error:  # damaged files raise nearly anything
        what = f"{path} is not a readable indexed PNG ({first_line(error)})"
        raise ValueError(f"{what}: restore it or write it anew") from error


def read_labels(path: Path, binary: bool = False) -> np.ndarray:
    """The object labels [H, W] uint8 of an indexed PNG. Raises as `read_indexed`.

    255 is background, or with `binary` the object 1.
    """
    values, _ = read_indexed(path)
    return to_labels(values, binary)


def to_labels(values: np.ndarray, binary: bool) -> np.ndarray:
    """The values of a mask with 255 as background, or with `binary` as the object 1."""
    meaning = 0
    if binary:
        meaning = 1
    return np.where(values == VOID, meaning, values).astype(np.uint8)


def read_first_labels(sequence: Sequence, binary: bool) -> np.ndarray:
    """The labels [H, W] uint8 of the first annotation.

    Raises:
        ValueError: it is unreadable, or has no object that could be followed.
    """
    path = sequence.masks[0]
    values, _ = read_indexed(path)
    labels = to_labels(values, binary)
    if labels.any():
        return labels
    if VOID in values:
        what = f"{path} holds nothing but 0 and 255, which is void in DAVIS 2017"
        raise ValueError(f"{what}: pass --binary if 255 is the object, as in DAVIS 2016")
    remedy = f"restore it, or leave {sequence.name} out with --sequences"
    raise ValueError(f"{path} marks no object: {remedy}")


def pixels(size: tuple[int, int]) -> str:
    """A size (W, H) as text."""
    return f"{size[0]}x{size[1]} pixels"


def voc_palette() -> list[int]:
    """The palette of Pascal VOC as a flat list; DAVIS's is the same but for a few shades.

    The bits of a label are dealt to red, green and blue, in turn, from the highest bit down.
    """
    palette = []
    for label in range(256):
        for channel in range(3):
            shade = 0
            for turn in range(3):
                bit = (label >> (3 * turn + channel)) & 1
                shade |= bit << (7 - turn)
            palette.append(shade)
    return palette


def write_indexed(path: Path, values: np.ndarray, palette: list[int]) -> None:
    """Write values [H, W] uint8 as an indexed PNG, whole or not at all."""
    image = Image.fromarray(values)
    image.putpalette(palette)
    with replacing(path) as temporary:
        image.save(temporary)


# ---- frames -------------------------------------------------------------------------------------


def frame_size(
    width: int, height: int, imsize: int, short_side: int | None, patch: int
) -> tuple[int, int]:
    """Pixels (W, H) at which a frame of width x height pixels is read.

    imsize x imsize, or with `short_side` DINO's rule. There the shorter side gets `short_side`, and
    the longer one keeps the aspect ratio, cut to a multiple of 64 (of the patch where that does not
    divide 64).
    """
    if not short_side:
        return imsize, imsize
    step = 64
    if 64 % patch:
        step = patch
    exact = short_side * max(width, height) / min(width, height)
    longer = max(step, int(exact // step * step))
    if width >= height:
        return longer, short_side
    return short_side, longer


def read_frame(
    path: Path, size: tuple[int, int], input_size: tuple[int, int], by_cv2: bool
) -> Tensor:
    """A frame as a tensor [3, H, W] in 0..1.

    Args:
        size: (W, H) of its annotation, in pixels.
        input_size: (W, H) to which it is resized.
        by_cv2: bilinear by cv2, as DINO's protocol does it, instead of bicubic by PIL.
    Raises:
        ValueError: it is unreadable, or has another size than its annotation.
    """
    photo = read_image(path, upright=False)  # annotations count the pixels as stored
    if photo.size != size:
        what = f"{path} has {pixels(photo.size)}, its annotation {pixels(size)}"
        raise ValueError(f"{what}: take both of one resolution")
    if by_cv2:
        return to_tensor(cv2.resize(np.asarray(photo), input_size))
    return to_tensor(photo.resize(input_size, Image.Resampling.BICUBIC))


def batches(
    read: Callable[[Path], Tensor], paths: list[Path], pool: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """Yield read(path) of all paths, stacked [B, ...].

    The threads of `pool` read a batch while the one before is used.
    """
    chunks = []
    for start in range(0, len(paths), BATCH):
        chunks.append(paths[start : start + BATCH])

    reading = pool.map(read, chunks[0])
    for number in range(len(chunks)):
        frames = list(reading)
        if number + 1 < len(chunks):
            reading = pool.map(read, chunks[number + 1])
        yield torch.stack(frames)


# ---- propagation --------------------------------------------------------------------------------


def one_hot(labels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Labels [H, W] uint8 -> soft segmentation [h, w, n] on the grid, by the nearest pixel.

    There is a channel for each of 0..max. An object that falls between the cells keeps its channel,
    empty, and a line on stderr names it.
    """
    height, width = grid
    image = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    small = np.array(image)
    lost = np.setdiff1d(labels[labels > 0], small).tolist()
    if lost:
        what = f"objects {lost} fall between the cells of the grid ({height}x{width})"
        print(f"note: {what}: not propagated", file=sys.stderr)
    return F.one_hot(torch.from_numpy(small).long(), int(labels.max()) + 1).float()


def propagate(
    features: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    labels: np.ndarray,
    n_last_frames: int = 7,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
) -> Iterator[Tensor]:
    """Yield the soft segmentation [n, h, w] of every frame of a video but the first.

    The context of a frame is the first frame and the `n_last_frames` before it.

    Args:
        features: any callable [B, 3, H, W] -> [B, C, h, w].
        images: batches of frames.
        labels: the objects of the first frame, [H, W] uint8.
        size_mask_neighborhood: radius of the window in cells; 0 is everywhere.
        topk: how many cells of the context vote.
    """
    first = None
    recent: deque = deque(maxlen=n_last_frames)
    for batch in images:
        maps = F.normalize(features(batch), dim=1)                    # [B, C, h, w]
        for cells in maps.permute(0, 2, 3, 1).contiguous():           # [h, w, C]
            if first is None:
                given = one_hot(labels, cells.shape[:2]).to(cells.device)
                first = (cells, given)
                continue
            context = [first, *recent]
            segmentation = transfer(cells, context, size_mask_neighborhood, topk)  # [h, w, n]
            recent.append((cells, segmentation))
            yield segmentation.permute(2, 0, 1)


def transfer(
    cells: Tensor, context: list[tuple[Tensor, Tensor]], radius: int, topk: int
) -> Tensor:
    """Carry the segmentations of a context over to a frame.

    The sources of a target cell are all cells of all context frames that are at most `radius` away
    along both axes. Those that are at least as similar as the `topk`-th vote, ties included, with
    weight exp(cosine / 0.1).

    Works in blocks of targets, each against the sources that its windows reach. So memory and, with
    a radius, time grow linearly with the number of cells.

    Args:
        cells: L2-normalised features of the frame, [h, w, C].
        context: pairs of the same [h, w, C] and a soft segmentation [h, w, n].
        radius: 0 is everywhere.
    Returns:
        Soft segmentation [h, w, n].
    """
    height, width, _ = cells.shape
    if radius == 0:
        radius = max(height, width)
    _, first_segmentation = context[0]
    label_count = first_segmentation.shape[2]
    out = cells.new_empty(height, width, label_count)
    side = block_side(height, width, radius)

    for top, left in product(range(0, height, side), range(0, width, side)):
        target_rows = slice(top, min(top + side, height))
        target_columns = slice(left, min(left + side, width))
        source_rows = slice(max(top - radius, 0), min(target_rows.stop + radius, height))
        source_columns = slice(max(left - radius, 0), min(target_columns.stop + radius, width))

        # the block has a = a_h * a_w targets, and in each context frame b = b_h * b_w sources
        source_cells = []
        source_votes = []
        for frame_cells, segmentation in context:
            source_cells.append(frame_cells[source_rows, source_columns])   # [b_h, b_w, C]
            source_votes.append(segmentation[source_rows, source_columns])  # [b_h, b_w, n]
        sources = torch.cat(source_cells).flatten(0, 1)               # [T*b, C]
        votes = torch.cat(source_votes).flatten(0, 1)                 # [T*b, n]

        targets = cells[target_rows, target_columns]                  # [a_h, a_w, C]
        cosine = targets.flatten(0, 1) @ sources.t()                  # [a, T*b]
        outside = outside_window(
            (height, width), target_rows, target_columns, source_rows, source_columns, radius,
            cells.device,
        )  # fmt: skip
        # a view: the sources that are filled with -inf here are so in `cosine`
        by_frame = cosine.unflatten(1, (len(context), -1))            # [a, T, b]
        by_frame.masked_fill_(outside[:, None], -math.inf)

        values, indices = most_similar(cosine, topk)                  # [a, k]
        weights = (values / TEMPERATURE).softmax(dim=1)
        carried = (weights[..., None] * votes[indices]).sum(dim=1)    # [a, n]
        out[target_rows, target_columns] = carried.unflatten(0, targets.shape[:2])
    return out


def block_side(height: int, width: int, radius: int) -> int:
    """The side of a block of targets in a grid of h x w cells, for a window of this radius.

    A small grid is one block, if the blocks would share nearly all of their sources.
    """
    reach = TILE + 2 * radius  # of the sources of a block
    if max(height, width) <= min(2 * TILE, reach):
        return 2 * TILE
    return TILE


def too_far(
    size: int, target: slice, source: slice, radius: int, device: torch.device
) -> Tensor:
    """Along one axis: is each source cell over `radius` cells from each target? [targets, sources]

    Args:
        size: cells of the axis.
        target, source: the parts of it that are compared.
    """
    cells = torch.arange(size, device=device)
    distance = cells[target, None] - cells[None, source]
    return distance.abs() > radius


def outside_window(
    grid: tuple[int, int],
    target_rows: slice,
    target_columns: slice,
    source_rows: slice,
    source_columns: slice,
    radius: int,
    device: torch.device,
) -> Tensor:
    """Whether each cell of a source block is outside the window of each of a target block: [a, b].

    The window is a square, so a source is outside if either coordinate is too far.
    """
    height, width = grid
    rows = too_far(height, target_rows, source_rows, radius, device)          # [a_h, b_h]
    columns = too_far(width, target_columns, source_columns, radius, device)  # [a_w, b_w]
    outside = rows[:, None, :, None] | columns[None, :, None, :]              # [a_h, a_w, b_h, b_w]
    return outside.flatten(2).flatten(0, 1)                                   # [a, b]


def most_similar(cosine: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The entries of each row that are not below its `topk`-th largest.

    Args:
        cosine: [a, N], -inf for what is no candidate.
    Returns:
        values and indices, both [a, k]. k is large enough for the row with the most entries. In the
        others the values of what is too small are -inf.
    """
    count = cosine.shape[1]
    # one more than is needed shows whether there are ties with the last one
    k = min(topk + 1, count)
    while True:
        values, indices = cosine.topk(k)
        least = values[:, min(topk, k) - 1, None]                     # [a, 1]
        least = least.clamp(min=-2)  # below all cosines, and above -inf

        # done if the last value of every row is too small: then no tie lies beyond it
        if k == count or (values[:, -1:] < least).all():
            return values.masked_fill(values < least, -math.inf), indices
        k = min(2 * k, count)


def harden(segmentation: Tensor, patch: int, size: tuple[int, int]) -> np.ndarray:
    """Soft segmentation [n, h, w] -> labels [H, W] uint8 at `size` (W, H).

    Enlarged p times bilinearly, each channel stretched to 0..1, the largest channel taken, and
    resized by the nearest neighbour.
    """
    scale = float(patch)
    large = F.interpolate(segmentation[None], scale_factor=scale, mode="bilinear")[0]
    low = large.amin((1, 2), keepdim=True)
    high = large.amax((1, 2), keepdim=True)

    # in a channel that is the same everywhere there is nothing to stretch but rounding
    flat = high - low <= 1e-6 * high
    stretched = torch.where(flat, large, (large - low) / (high - low))

    labels = stretched.max(0).indices  # argmax is slow here
    image = Image.fromarray(labels.byte().cpu().numpy())
    return np.array(image.resize(size, Image.Resampling.NEAREST))


def write_masks(
    sequence: Sequence, folder: Path, labels: Iterable[np.ndarray], pool: ThreadPoolExecutor,
    bar: tqdm, binary: bool,
) -> None:  # fmt: skip
    """Write the masks of a sequence to a folder: `labels` as they come, then the first annotation.

    The threads of `pool` write while the next ones are computed. The annotation is written last, so
    that a run which fails at its first features leaves no mask.

    Args:
        labels: [H, W] uint8 of every frame but the first.
        binary: write 255 for the object, as the given mask has it.
    Raises:
        OSError: the folder takes no files.
    """
    given, palette = read_indexed(sequence.masks[0])
    palette = palette or voc_palette()

    writing = []
    for path, found in zip(sequence.masks[1:], labels):
        if binary:
            found = np.where(found == 1, VOID, found).astype(np.uint8)
        writing.append(pool.submit(write_indexed, folder / path.name, found, palette))
        bar.update()
    for written in writing:
        written.result()  # raises what the thread raised
    write_indexed(folder / sequence.masks[0].name, given, palette)


def finished(sequence: Sequence, folder: Path) -> bool:
    """Whether all masks of a sequence are there."""
    return all((folder / path.name).is_file() for path in sequence.masks)


def claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Keep a record of what makes the masks of a folder, before the first of them is made.

    A record of a run that came to no mask is replaced. So two runs that start at once may both get
    through here, and `propagate_all` looks again before each mask.

    Raises:
        ValueError: they were made by something else, or nobody knows by what.
    """
    has_masks = any(folder.rglob("*.png"))  # of any sequence: a later run may score them all
    if has_masks and not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has masks and no record of what made them: {REMEDY}")
    claim_folder(folder, made_by, REMEDY, renew=not has_masks)


def propagate_all(
    args: argparse.Namespace, sequences: list[Sequence], pool: ThreadPoolExecutor
) -> tuple[Path, dict[str, Any]]:
    """Write the masks of every sequence that is not finished yet.

    Returns:
        Their folder, and the settings as they were resolved.
    Raises:
        ValueError: something does not fit together, or the folder holds results of other settings.
    """
    check_lift_args(args)
    extractor = build_extractor(args)
    up = upsampler(args, extractor)
    facts = {**extractor.facts(), **up.facts()}

    size = str(args.imsize)
    flag = "--imsize"
    if args.short_side:
        size = f"short{args.short_side}"
        flag = "--short_side"
    source = f"layer{extractor.layer}"
    if args.my_extractor:
        source = "my_extractor"  # has no layers
    folder = Path(args.output_dir, f"davis_vidseg_{size}_{source}")
    made_by = record(args, leave_out=NOT_IN_MASKS, paths=("dataroot",), **facts)
    claim(folder, made_by)
    for name in CSVS:
        (folder / name).unlink(missing_ok=True)  # it tells of other masks

    def features(frames):                                  # [B, 3, H, W] in 0..1 -> [B, C, h, w]
        images = extractor.normalize(frames.to(extractor.device))
        feats = up(images, extractor(images))
        if not feats.isfinite().all():
            remedy = "pass --dtype float32, or another --lift_path"
            raise ValueError(f"the features of the frames are not finite: {remedy}")
        return feats

    def harden_all(soft, photo_size):              # of each segmentation: labels at (W, H)
        for segmentation in soft:
            # before each mask: another run may have replaced the record while there was no mask
            claim_folder(folder, made_by, REMEDY)
            yield harden(segmentation, extractor.patch, photo_size)

    count = sum(len(sequence.masks) - 1 for sequence in sequences)
    with torch.inference_mode(), tqdm(total=count, unit="frame", disable=None) as bar:
        for sequence in sequences:
            bar.set_description(sequence.name)
            if finished(sequence, folder / sequence.name):
                bar.update(len(sequence.masks) - 1)
                continue

            first = read_first_labels(sequence, args.binary)
            height, width = first.shape
            input_size = frame_size(width, height, args.imsize, args.short_side, extractor.patch)
            check_frame_size(input_size, extractor.patch, flag)
            context = 1 + min(args.n_last_frames, len(sequence.frames))
            needed = memory_needed(
                extractor, up, input_size, int(first.max()) + 1, context,
                args.size_mask_neighborhood,
            )  # fmt: skip
            check_memory(
                needed,
                f"frames of {pixels(input_size)}",
                f"pass a smaller {flag} or --lift_iter",
                device=extractor.device,
            )
            read = partial(
                read_frame,
                size=(width, height),
                input_size=input_size,
                by_cv2=args.short_side is not None,
            )
            soft = propagate(
                features,
                batches(read, sequence.frames, pool),
                first,
                args.n_last_frames,
                args.size_mask_neighborhood,
                args.topk,
            )
            hard = harden_all(soft, (width, height))
            write_masks(sequence, folder / sequence.name, hard, pool, bar, args.binary)
    return folder, settings(args, device=str(extractor.device), **facts)


def check_frame_size(size: tuple[int, int], patch: int, flag: str) -> None:
    """Raise ValueError unless both sides (W, H), which `flag` sets, are multiples of the patch."""
    if size[0] % patch or size[1] % patch:
        what = f"frames are read at {pixels(size)}, which is no multiple of the patch ({patch})"
        raise ValueError(f"{what}: pass another {flag}")


def memory_needed(
    extractor: DenseExtractor,
    up: Upsampler,
    size: tuple[int, int],
    label_count: int,
    context: int,
    radius: int,
) -> int:
    """About how many bytes the propagation takes for frames that are read at `size` (W, H).

    Args:
        label_count: n.
        context: frames whose cells may vote.
        radius: of the window in cells; 0 is everywhere.
    """
    width, height = size
    rows, columns = extractor.grid(height, width)
    channels = extractor.channels(rows * columns)
    cells = rows * columns * up.factor**2
    if radius == 0:
        radius = max(rows, columns) * up.factor
    side = block_side(rows * up.factor, columns * up.factor, radius)
    # of a block of targets, in each frame of the context
    sources = min(cells, (side + 2 * radius) ** 2)

    # a batch as it is read, the next one, normalised, and channels last for LiFT
    numbers = 4 * BATCH * 3 * width * height
    # one block of a ViT: its input and output, queries, keys and values, and an MLP of four times
    # the width; the facet attn has no width, and its map is larger than these
    numbers += 14 * BATCH * rows * columns * (extractor.width or 0)
    # its features about three times: as they are made, normalised, and channels last
    numbers += 3 * BATCH * cells * channels
    if up.factor > 1:
        numbers += BATCH * cells * extractor.patch**2   # LiFT's enlarged image and convolutions
    numbers += context * cells * (channels + label_count)
    numbers += 2 * side**2 * context * sources          # cosines, and which are outside
    numbers += 3 * label_count * cells * extractor.patch**2  # enlarged to be hardened
    return 4 * numbers  # float32


# ---- scores -------------------------------------------------------------------------------------


def boundary(mask: np.ndarray) -> np.ndarray:
    """The boundary of a mask, both [H, W] bool.

    Those are the pixels that differ from their right, lower or lower-right neighbour. A map of
    labels, uint8, may be passed as well: the boundary is then what is not 0 in the result.
    """
    padded = np.pad(mask, (0, 1), mode="edge")
    right = mask ^ padded[:-1, 1:]
    lower = mask ^ padded[1:, :-1]
    lower_right = mask ^ padded[1:, 1:]
    return right | lower | lower_right


def disk(shape: tuple[int, int]) -> np.ndarray:
    """How far two boundaries may be apart in masks of `shape` (H, W): a disk, uint8.

    Its radius is 0.8 % of the diagonal, rounded up.
    """
    radius = math.ceil(0.008 * math.hypot(*shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """Region similarity J of two masks [H, W] bool (Perazzi et al. 2016).

    That is intersection over union, and 1 if both are empty.
    """
    union = np.count_nonzero(mask | truth)
    if union == 0:
        return 1.0
    return np.count_nonzero(mask & truth) / union


def contour(mask: np.ndarray, truth: np.ndarray, near: np.ndarray) -> float:
    """Contour accuracy F of two masks [H, W] bool (Perazzi et al. 2016).

    That is the F-measure of their boundaries, matched within the disk `near`.
    """
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


def crop(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of two label maps that holds all objects and boundaries; the rest adds nothing."""
    anything = labels | truth  # not 0 where either has an object
    x, y, width, height = cv2.boundingRect(anything)
    rows = slice(max(y - 1, 0), y + height + 1)
    columns = slice(max(x - 1, 0), x + width + 1)
    return labels[rows, columns], truth[rows, columns]


def score_frame(labels: np.ndarray, truth: np.ndarray, count: int) -> list[tuple[float, float]]:
    """(J, F) of each of the objects 1..count in two label maps [H, W] uint8 of one size."""
    near = disk(truth.shape)
    labels, truth = crop(labels, truth)
    scores = []
    for number in range(1, count + 1):
        mask = labels == number
        true_mask = truth == number
        scores.append((jaccard(mask, true_mask), contour(mask, true_mask, near)))
    return scores


def score_sequence(sequence: Sequence, folder: Path, binary: bool = False) -> np.ndarray:
    """J and F of every object and scored frame, for the masks in a folder.

    Returns:
        [objects, 2, frames].
    Raises:
        ValueError, FileNotFoundError: masks are missing, unreadable, of another size, or have more
            objects.
    """
    count = int(read_first_labels(sequence, binary).max())
    scores = []
    has_void = False
    for annotation in sequence.masks[1:-1]:
        path = folder / annotation.name
        truth = read_labels(annotation, binary)
        values, _ = read_indexed(path)
        if VOID in values:
            has_void = True
        labels = to_labels(values, binary)
        check_result(path, labels, truth, count)
        scores.append(score_frame(labels, truth, count))

    if has_void and not binary:
        what = f"{folder} has label {VOID}, which counts as background"
        print(f"note: {what} (--binary: as the object)", file=sys.stderr)
    by_frame = np.reshape(scores, (-1, count, 2))  # [frames, objects, 2], also for no frame
    return by_frame.transpose(1, 2, 0)


def check_result(path: Path, labels: np.ndarray, truth: np.ndarray, count: int) -> None:
    """Raise ValueError unless a result has its annotation's size and no label above `count`."""
    if labels.shape != truth.shape:
        size = pixels(labels.shape[::-1])
        wanted = pixels(truth.shape[::-1])
        what = f"{path} has {size}, its annotation {wanted}"
        raise ValueError(f"{what}: resize it (nearest) to the annotation")
    if labels.max() > count:
        what = f"{path}: label {labels.max()} where the first annotation has {count} objects"
        raise ValueError(f"{what}: keep to their labels")


def summary(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of one object's J or F, given for its frames: [frames].

    Recall is the share above 0.5. Decay is the mean of the first quarter of the frames minus that
    of the last. All three are NaN if there is no frame.
    """
    if len(values) == 0:
        return math.nan, math.nan, math.nan

    # as in davis2017-evaluation: halves are rounded up, and quarters share the frame at their edge
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first = values[edges[0] : edges[1] + 1].mean()
    last = values[edges[3] : edges[4] + 1].mean()
    return values.mean(), (values > 0.5).mean(), first - last


def evaluate(
    masks: Path, sequences: list[Sequence], pool: ThreadPoolExecutor, binary: bool = False
) -> dict[str, Any]:
    """Score the folder `masks` of {sequence}/*.png with the threads of `pool`.

    Returns:
        METRICS, which are means over all objects of all sequences, and `per_object`, {name: [J,
        F]}. Objects without a scored frame, those of videos of one or two, are None and left out.
    Raises:
        ValueError, FileNotFoundError: as `score_sequence`.
    """

    def score(sequence):
        return score_sequence(sequence, masks / sequence.name, binary)

    jobs = pool.map(score, sequences)
    scores = list(tqdm(jobs, total=len(sequences), desc="J&F", unit="video", disable=None))
    short = [sequence.name for sequence in sequences if len(sequence.masks) < 3]
    if short:
        names = ", ".join(short)
        what = "not scored, nothing between the first and the last frame"
        print(f"note: {what}: {names}", file=sys.stderr)

    per_object = {}
    scored = []  # for each object with a scored frame: mean, recall and decay of J, then of F
    for sequence, found in zip(sequences, scores):
        for number, (region, edge) in enumerate(found, 1):
            j = summary(region)
            f = summary(edge)
            name = f"{sequence.name}_{number}"
            per_object[name] = [number_or_none(j[0]), number_or_none(f[0])]
            if len(region):
                scored.append(j + f)

    means = np.full(6, math.nan)
    if scored:
        means = np.mean(scored, axis=0)
    j_and_f = (means[0] + means[3]) / 2
    results: dict[str, Any] = {METRICS[0]: number_or_none(j_and_f)}
    for metric, mean in zip(METRICS[1:], means):
        results[metric] = number_or_none(mean)
    results["per_object"] = per_object
    return results


def number_or_none(value: float) -> float | None:
    """A float for JSON, which has no NaN."""
    if math.isnan(value):
        return None
    return float(value)


# ---- output -------------------------------------------------------------------------------------


def three(value: float | None) -> str:
    """Three decimals, as in the CSV files of davis2017-evaluation; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3f}"


def write_csv(folder: Path, results: dict[str, Any]) -> None:
    """Write the two CSV files of davis2017-evaluation: the global results, and those per object.

    Raises:
        OSError: the folder takes no files.
    """
    overall = [METRICS, [three(results[metric]) for metric in METRICS]]
    each = [("Sequence", "J-Mean", "F-Mean")]
    for name, (region, edge) in results["per_object"].items():
        each.append((name, three(region), three(edge)))
    for name, rows in zip(CSVS, (overall, each)):
        with replacing(folder / name) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def table(results: dict[str, Any]) -> str:
    """J and F of each object, then the means, as text."""
    width = max(len(name) for name in (*results["per_object"], *METRICS))
    lines = [f"{'':{width}}       J       F"]
    for name, (region, edge) in results["per_object"].items():
        lines.append(f"{name:{width}} {three(region) or '-':>7} {three(edge) or '-':>7}")
    for metric in METRICS:
        lines.append(f"{metric:{width}} {three(results[metric]) or '-':>7}")
    return "\n".join(lines)


def pictures(masks: Path, sequences: list[Sequence]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield every frame that has a mask, its objects tinted and outlined in white.

    Yields:
        The name of the sequence, that of the frame, and RGB [H, W, 3] uint8.
    """
    for sequence in sequences:
        for path in sequence.frames:
            mask = masks / sequence.name / f"{path.stem}.png"
            if not mask.is_file():  # other methods may leave out the first and the last
                continue
            values, palette = read_indexed(mask)
            height, width = values.shape
            colours = np.reshape(palette or voc_palette(), (-1, 3)).astype(np.uint8)
            photo = np.asarray(read_image(path, upright=False).resize((width, height)))
            tinted = photo // 2 + colours[values] // 2
            picture = np.where(values[..., None] > 0, tinted, photo)
            picture[boundary(values) > 0] = 255
            yield sequence.name, path.stem, picture


def write_overlays(folder: Path, masks: Path, sequences: list[Sequence]) -> None:
    """Write the `pictures` as JPEG files folder/{sequence}/{frame}.jpg."""
    for name, frame, picture in pictures(masks, sequences):
        with replacing(folder / name / f"{frame}.jpg") as temporary:
            Image.fromarray(picture).save(temporary, quality=90)


def write_video(path: str, masks: Path, sequences: list[Sequence]) -> None:
    """Write the `pictures` of all sequences, one after another, as one video.

    Frames have the size of the first one, without the last row or column of an odd size, which
    H.264 does not take.

    Raises:
        ValueError: OpenCV has no encoder for it.
    """
    width, height = read_image(sequences[0].frames[0], upright=False).size
    size = (width - width % 2, height - height % 2)
    with replacing(path) as temporary:
        writer = open_video(temporary, path, size)
        for _, _, picture in pictures(masks, sequences):
            resized = cv2.resize(picture, (width, height))[: size[1], : size[0]]
            writer.write(cv2.cvtColor(resized, cv2.COLOR_RGB2BGR))
        writer.release()


def open_video(temporary: Path, path: str, size: tuple[int, int]) -> cv2.VideoWriter:
    """A writer of H.264, or where OpenCV has none, of MPEG-4 part 2, with a note.

    Args:
        temporary, path: where it writes, and the name for messages.
        size: (W, H).
    Raises:
        ValueError: OpenCV has neither.
    """
    # both libraries print what they tried: one line of ours is enough
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        h264 = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"avc1"), FPS, size)
        if h264.isOpened():
            return h264
        mpeg4 = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), FPS, size)
    finally:
        cv2.utils.logging.setLogLevel(level)

    if not mpeg4.isOpened():
        remedy = "install opencv-python from PyPI, or take --overlay"
        raise ValueError(f"this OpenCV cannot write {path}: {remedy}")
    print(
        f"note: this OpenCV has no H.264 encoder: {path} is MPEG-4 part 2, which browsers and "
        f"QuickTime do not play; for them: ffmpeg -i {path} -pix_fmt yuv420p h264.mp4",
        file=sys.stderr,
    )
    return mpeg4


# ---- the command line ---------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot be meant."""
    check_range(
        args, imsize=1, short_side=1, n_last_frames=0, size_mask_neighborhood=0, topk=1, workers=1
    )
    if args.video and Path(args.video).suffix != ".mp4":
        what = f"--video {args.video} is no MPEG-4 file"
        raise ValueError(f"{what}: give it a name that ends in .mp4")
    check_one_process()


def main(args: argparse.Namespace) -> None:
    """Propagate (unless --score_only), score, write and print."""
    check(args)
    with_frames = not args.score_only or args.overlay or args.video is not None
    sequences = find_sequences(args.dataroot, args.sequences, with_frames)
    for sequence in sequences:
        read_first_labels(sequence, args.binary)  # told before a backbone is built

    with ThreadPoolExecutor(args.workers) as pool:
        if args.score_only:
            masks = Path(args.score_only)
            folder = Path(args.output_dir)  # the masks may be somebody else's
            used = {}
            for name, value in settings(args).items():
                if name in SCORING:
                    used[name] = value
        else:
            masks, used = propagate_all(args, sequences, pool)
            folder = masks
        results = evaluate(masks, sequences, pool, args.binary)

    frames = sum(len(sequence.masks) for sequence in sequences)
    line = {"settings": used, "sequences": len(sequences), "frames": frames, "results": results}
    print(table(results))
    try:
        write_csv(folder, results)
    finally:  # where that fails, the line is still printed
        report(line, args.json)
    print(f"note: the scores are in {folder / CSVS[0]} and {CSVS[1]}", file=sys.stderr)

    if args.overlay:
        write_overlays(folder / "overlay", masks, sequences)
    if args.video:
        write_video(args.video, masks, sequences)


if __name__ == "__main__":
    parser().run(main)
