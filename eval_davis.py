"""Video: propagate the mask of the first frame by dense features, and score J&F (DAVIS 2017).

    python eval_davis.py --dataroot DAVIS --model_type dino_vits16 --lift_path lift.pth \\
        --output_dir results
    python eval_davis.py --dataroot DAVIS --score_only masks_of_another_method --output_dir scores
    python eval_davis.py --frames my_video.mp4 --mask first.png --output_dir results

The first command writes indexed PNGs to results/davis_vidseg_224_layer11/{video}/ and scores them.
Interrupted, it keeps the videos that are done and begins the interrupted one anew. Other settings
or weights need --overwrite or another --output_dir.

The second command scores a folder of {video}/*.png and writes nothing into it. Both write
global_results-val.csv and per-sequence_results-val.csv as davis2017-evaluation does, say where, and
print a table of J and F per object.

The third command is for your own video, a folder of pictures or a movie, and the mask of its first
frame. It also writes pictures of the masks over the frames, as --overlay does for the others. There
is nothing to score. A video of --dataroot may also have the mask of its first frame alone.

Propagation is that of DINO's evaluation (Caron et al., arXiv 2104.14294, after Jabri et al., arXiv
2006.14613). Each cell takes the labels of the most similar cells, within a window, of the first and
the last frames. Numbers in file names count as numbers: 2.jpg comes before 10.jpg.

--dataroot holds Annotations/480p, JPEGImages/480p (--score_only does without) and
ImageSets/2017/val.txt. Data sets without that list, such as MOSE, need --sequences; the level 480p
may be missing. DAVIS 2016, whose masks are 0 and 255 with 255 for the object, needs --binary. On 2
cores a frame at 224 takes 0.1 s with ViT-S/16 and LiFT, 0.5 s with ViT-S/8 and LiFT.

Notation: H W image pixels, h w the grid of features, C channels, n labels (background and objects),
T context frames, p patch size.
"""

import argparse
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_one_process,
    check_range,
    deciding,
    note,
    progress,
    report,
    settings,
)
from files import Results, inside, replacing


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    group = command.add_argument_group("videos", "A data set, or a video of your own.")
    add = group.add_argument
    add("--dataroot", help="DAVIS 2017: Annotations, ImageSets and JPEGImages (480p)")
    add("--sequences", nargs="+", help="only these videos (default: ImageSets/2017/val.txt)")
    add("--frames", metavar="PATH", help="your own video: a folder of pictures, or a movie")
    add("--mask", metavar="PNG", help="with --frames: the labels 0, 1, 2, ... of its first frame")
    add("--binary", action="store_true", help="masks show one object: whatever is not 0")

    group = command.add_argument_group("propagation", "How masks get from frame to frame.")
    add = group.add_argument
    add("--imsize", type=int, default=224, help="pixels that frames are squashed to (default: 224)")
    add("--short_side", type=int, help="DINO's resizing instead: pixels of the shorter side")
    add("--n_last_frames", type=int, default=7, help="context besides the first (default: 7)")
    radius = "radius of the window, in cells; 0: everywhere (default: 12)"
    add("--size_mask_neighborhood", type=int, default=12, help=radius)
    add("--topk", type=int, default=5, help="context cells that vote (default: 5)")

    group = command.add_argument_group("results", "What is written.")
    add = group.add_argument
    folder = "folder for all that is written (default: temp_davis_test)"
    add("--output_dir", default="temp_davis_test", help=folder)
    add("--score_only", metavar="DIR", help="propagate nothing, score DIR/{video}/*.png")
    add("--overlay", action="store_true", help="also write overlay/{video}/*.jpg")
    add("--overwrite", action="store_true", help="first remove the masks of an earlier run")
    add("--workers", type=int, default=4, help="threads for files and scores (default: 4)")
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

from davis_scores import (
    CSVS,
    MaskReader,
    as_ranges,
    boundary,
    evaluate,
    read_mask,
    table,
    voc_palette,
    write_csv,
)
from features import Features, build_features
from photos import IMAGES, read_image, sorted_naturally

TEMPERATURE = 0.1
TILE = 14  # cells, the side of a block of targets: small blocks waste less, large ones are faster
GPU_BLOCK = 2**28  # cosines of a block of targets on a GPU (1 GB): there large blocks are faster
BATCH = 4  # frames that go through the backbone at once

# what --score_only uses: the other settings are about propagation, and left out of its output
SCORING = (
    "dataroot", "sequences", "binary", "score_only", "workers", "output_dir", "overlay", "versions",
)  # fmt: skip

# flags that do not change the masks, or that the facts of backbone and LiFT state better
NOT_IN_MASKS = (
    "output_dir", "sequences", "workers", "score_only", "overlay", "overwrite", "model_type",
    "channel", "patch",
)  # fmt: skip


# ---- videos -------------------------------------------------------------------------------------


class Video(NamedTuple):
    """A video and its files, in order."""

    name: str
    frames: list[Path]  # none for scoring alone
    masks: list[Path]   # its annotations: of every frame, or of the first alone
    first_only: bool    # of the first alone: there is nothing to score


def find_videos(dataroot: str | Path, names: list[str] | None, with_frames: bool) -> list[Video]:
    """The videos `names` of a data set, or of its ImageSets/2017/val.txt.

    Raises:
        FileNotFoundError, ValueError: something is missing, or a name leads out of the data set.
    """
    root = Path(dataroot)
    if not names:
        val = root / "ImageSets/2017/val.txt"
        if val.is_file():
            names = val.read_text(errors="replace").split()
        # a name that no folder can have: some other file was read as the list
        if not names or max(len(name) for name in names) > 255:
            remedy = "correct --dataroot, or name videos with --sequences"
            raise FileNotFoundError(f"there is no list of videos at {val}: {remedy}")

    videos = []
    remedy = "correct --dataroot or --sequences"
    for name in dict.fromkeys(names):  # each once
        masks = list_files(inside(part_of(root, "Annotations"), name), {".png"}, remedy)
        if not with_frames:
            videos.append(Video(name, [], masks, False))
            continue
        frames = list_files(inside(part_of(root, "JPEGImages"), name), IMAGES, remedy)
        stems = [path.stem for path in frames]
        annotated = [path.stem for path in masks]
        first_only = annotated == stems[:1] and len(frames) > 1
        missing = sorted_naturally(set(stems) ^ set(annotated))
        if missing and not first_only:
            what = "annotation" if missing[0] in stems else "frame"
            raise FileNotFoundError(f"{name} in {root} has no {what} {missing[0]}: restore it")
        videos.append(Video(name, frames, masks, first_only))
    return videos


def part_of(root: Path, part: str) -> Path:
    """The folder of the annotations or frames of a data set; some leave out the level 480p."""
    folder = root / part / "480p"
    if not folder.is_dir() and (root / part).is_dir():
        return root / part
    return folder


def list_files(
    folder: Path, suffixes: set[str], remedy: str, besides: Path = Path()
) -> list[Path]:
    """The files of a folder with these suffixes but `besides`, in order; an error if none."""
    files = []
    for path in folder.glob("*"):  # of a folder that is not there too: none
        is_hidden = path.name.startswith(".")
        is_other = path.resolve() != besides.resolve()
        if path.suffix.lower() in suffixes and is_other and not is_hidden:
            files.append(path)
    if not files:
        what = "pictures" if len(suffixes) > 1 else "masks (.png)"
        raise FileNotFoundError(f"there are no {what} in {folder}: {remedy}")
    return sorted_naturally(files)


def own_video(path: Path, mask: Path, unpacked: Path) -> Video:
    """The video of --frames and --mask; the frames of a movie are written into `unpacked`."""
    if path.is_file():
        unpack(path, unpacked)
        return Video(path.stem, sorted_naturally(unpacked.iterdir()), [mask], True)
    remedy = "pass a folder of pictures, or a movie, as --frames"
    frames = list_files(path, IMAGES, remedy, besides=mask)
    return Video(path.absolute().name, frames, [mask], True)


def unpack(movie: Path, folder: Path) -> None:
    """Write the frames of a movie as folder/00000.jpg, 00001.jpg, ...; ValueError without any."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # one line of ours is enough
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(str(movie))
    number = 0
    there, picture = capture.read()
    while there:
        photo = Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        photo.save(folder / f"{number:05d}.jpg", quality=95, subsampling=0)
        number += 1
        there, picture = capture.read()
    if number == 0:
        what = f"OpenCV cannot read --frames {movie} as a movie"
        raise ValueError(f"{what}: pass a folder of its frames")


# ---- frames -------------------------------------------------------------------------------------


def frame_size(
    width: int, height: int, imsize: int, short_side: int | None, patch: int
) -> tuple[int, int]:
    """Pixels (W, H) at which a frame of width x height pixels is read.

    imsize x imsize, or with `short_side` DINO's rule: the longer side keeps the aspect ratio, cut
    to a multiple of 64 (of the patch where that does not divide 64).
    """
    if not short_side:
        return imsize, imsize
    step = patch if 64 % patch else 64
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
        size: (W, H) of its annotation; a frame of another size is a ValueError.
        input_size: (W, H) to which it is resized.
        by_cv2: bilinear by cv2, as DINO's protocol does it, instead of bicubic by PIL.
    """
    photo = read_image(path, upright=False)  # annotations count the pixels as stored
    if photo.size != size:
        width, height = size
        what = f"{path} has {photo.width}x{photo.height} pixels, its mask {width}x{height} pixels"
        raise ValueError(f"{what}: take both of one resolution")
    if by_cv2:
        return to_tensor(cv2.resize(np.asarray(photo), input_size))
    return to_tensor(photo.resize(input_size, Image.Resampling.BICUBIC))


# ---- propagation --------------------------------------------------------------------------------


class Given(NamedTuple):
    """The mask of the first frame of a video."""

    labels: np.ndarray         # [H, W] uint8
    values: np.ndarray         # the same as it is written: with void, and in its own values
    unit: int                  # the value that stands for label 1
    palette: list[int] | None


def read_given(video: Video, binary: bool) -> Given:
    """The mask of the first frame. Raises as `MaskReader.objects`."""
    path = video.masks[0]
    labels = MaskReader(binary).objects(path)
    values, palette = read_mask(path)
    unit = int(values.max()) if binary else 1  # of a binary mask 1, or 255 in DAVIS 2016
    values = np.where(labels > 0, labels * np.uint8(unit), values)
    return Given(labels, values, unit, palette)


def one_hot(labels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Labels [H, W] uint8 -> soft segmentation [h, w, n] on the grid, by the nearest pixel.

    There is a channel for each of 0..max. An object that falls between the cells keeps its channel,
    empty, and a note names it.
    """
    height, width = grid
    image = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    small = np.array(image)
    lost = np.setdiff1d(labels[labels > 0], small).tolist()
    if lost:
        what = f"objects [{as_ranges(lost)}] fall between the cells of the {height}x{width} grid"
        note(f"{what} and are not propagated: pass a larger --imsize")
    return F.one_hot(torch.from_numpy(small).long(), int(labels.max()) + 1).float()


def propagate(
    video: Video,
    given: Given,
    features: Features,
    results: Results,
    pool: ThreadPoolExecutor,
    advance: Callable[[], Any],
    imsize: int = 224,
    short_side: int | None = None,
    n_last_frames: int = 7,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
) -> None:
    """Write a mask for every frame of a video: {name}/{frame}.png in the results.

    The context of a frame is the first frame and the `n_last_frames` before it. The threads of
    `pool` read the next frames and write masks meanwhile.

    Args:
        advance: called after each frame.
    """
    height, width = given.labels.shape
    size = frame_size(width, height, imsize, short_side, features.patch)
    features.check_size(size[1], size[0], "--short_side" if short_side else "--imsize")
    read = partial(read_frame, size=(width, height), input_size=size, by_cv2=short_side is not None)

    recent: deque = deque(maxlen=n_last_frames)
    writing = []
    reading = pool.map(read, video.frames[:BATCH])
    for start in range(0, len(video.frames), BATCH):
        images = torch.stack(list(reading))                                # [B, 3, H, W]
        reading = pool.map(read, video.frames[start + BATCH : start + 2 * BATCH])

        maps = F.normalize(features(images), dim=1)                        # [B, C, h, w]
        maps = maps.permute(0, 2, 3, 1).contiguous()
        for number, cells in enumerate(maps, start):                       # [h, w, C]
            if number == 0:
                first = (cells, one_hot(given.labels, cells.shape[:2]).to(cells.device))
                continue
            context = [first, *recent]
            soft = transfer(cells, context, size_mask_neighborhood, topk)  # [h, w, n]
            recent.append((cells, soft))
            hard = harden(soft.permute(2, 0, 1), features.patch, (width, height))
            values = hard * np.uint8(given.unit)
            name = mask_name(video, number)
            writing.append(pool.submit(write_mask, results, name, values, given.palette))
            advance()

    for written in writing:
        written.result()  # raises what the thread raised
    write_mask(results, mask_name(video, 0), given.values, given.palette)
    advance()


def transfer(cells: Tensor, context: list[tuple[Tensor, Tensor]], radius: int, topk: int) -> Tensor:
    """Carry the segmentations of a context over to a frame: its soft segmentation [h, w, n].

    The sources of a target cell are all cells of all context frames that are at most `radius` away
    along both axes. Those that are at least as similar as the `topk`-th vote, ties included, with
    weight exp(cosine / 0.1).

    Works in blocks of targets, each against the sources that its windows reach. So memory and, with
    a radius, time grow linearly with the number of cells.

    Args:
        cells: L2-normalised features of the frame, [h, w, C].
        context: pairs of the same [h, w, C] and a soft segmentation [h, w, n].
        radius: 0 is everywhere.
    """
    height, width, _ = cells.shape
    if radius == 0:
        radius = max(height, width)
    _, segmentation = context[0]
    out = cells.new_empty(height, width, segmentation.shape[2])
    side = block_side(height, width, radius, len(context), cells.device)
    far_rows = too_far(height, radius, cells.device)    # [h, h]
    far_columns = too_far(width, radius, cells.device)  # [w, w]

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
        rows = far_rows[target_rows, source_rows]                     # [a_h, b_h]
        columns = far_columns[target_columns, source_columns]         # [a_w, b_w]
        outside = outside_window(rows, columns)                       # [a, b]
        # a view: the sources that are filled with -inf here are so in `cosine`
        by_frame = cosine.unflatten(1, (len(context), -1))            # [a, T, b]
        by_frame.masked_fill_(outside[:, None], -math.inf)

        if cells.device.type == "cpu":
            carried = vote_of_few(cosine, votes, topk)                # [a, n]
        else:
            carried = vote_of_all(cosine, votes, topk)
        out[target_rows, target_columns] = carried.unflatten(0, targets.shape[:2])
    return out


def block_side(height: int, width: int, radius: int, frames: int, device: torch.device) -> int:
    """The side of a block of targets in a grid of h x w cells, with sources in T `frames`.

    On a CPU a small grid is one block, if the blocks would share nearly all of their sources. On a
    GPU blocks are as large as its memory allows, since each of them has its own launches.
    """
    if device.type == "cpu":
        reach = TILE + 2 * radius  # of the sources of a block
        if max(height, width) <= min(2 * TILE, reach):
            return 2 * TILE
        return TILE

    side = max(height, width)
    while side > TILE:
        targets = min(side, height) * min(side, width)
        sources = min(side + 2 * radius, height) * min(side + 2 * radius, width)
        if targets * sources * frames <= GPU_BLOCK:
            break
        side = math.ceil(side / 2)
    return side


def too_far(count: int, radius: int, device: torch.device) -> Tensor:
    """Which cells along one axis are more than `radius` apart: [count, count]."""
    cells = torch.arange(count, device=device)
    return (cells[:, None] - cells[None, :]).abs() > radius


def outside_window(rows: Tensor, columns: Tensor) -> Tensor:
    """What is too far along the rows [a_h, b_h] or the columns [a_w, b_w]: [a, b]."""
    outside = rows[:, None, :, None] | columns[None, :, None, :]  # [a_h, a_w, b_h, b_w]
    return outside.flatten(2).flatten(0, 1)


def vote_of_few(cosine: Tensor, votes: Tensor, topk: int) -> Tensor:
    """The mean vote [a, n] of the most similar sources, weighted by exp(cosine / 0.1).

    Args:
        cosine: [a, N], -inf for what has no vote.
        votes: [N, n].
    """
    values, indices = most_similar(cosine, topk)                      # [a, k]
    weights = (values / TEMPERATURE).softmax(dim=1)
    return (weights[..., None] * votes[indices]).sum(dim=1)


def vote_of_all(cosine: Tensor, votes: Tensor, topk: int) -> Tensor:
    """The same for a GPU: every source votes, most of them with weight 0.

    So nobody waits to hear how many sources tie with the `topk`-th. Changes `cosine`.
    """
    best = cosine.topk(min(topk, cosine.shape[1])).values             # [a, k]
    cosine.masked_fill_(cosine < best[:, -1:], -math.inf)
    return (cosine / TEMPERATURE).softmax(dim=1) @ votes


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

    It is enlarged p times bilinearly, and each channel stretched to 0..1. The largest channel is
    the label, resized by the nearest neighbour.
    """
    large = F.interpolate(segmentation[None], scale_factor=float(patch), mode="bilinear")[0]
    low = large.amin((1, 2), keepdim=True)
    high = large.amax((1, 2), keepdim=True)

    # in a channel that is the same everywhere there is nothing to stretch but rounding
    flat = high - low <= 1e-6 * high
    stretched = torch.where(flat, large, (large - low) / (high - low))

    labels = stretched.max(0).indices  # argmax is slow here
    image = Image.fromarray(labels.byte().cpu().numpy())
    return np.array(image.resize(size, Image.Resampling.NEAREST))


# ---- results ------------------------------------------------------------------------------------


def open_results(args: argparse.Namespace, features: Features) -> Results:
    """The folder of the masks, without scores of an earlier run, which tell of other masks."""
    size = args.imsize
    if args.short_side:
        size = f"short{args.short_side}"
    source = f"layer{features.backbone.layer}"
    if args.my_extractor:
        source = "my_extractor"  # it has no layers
    folder = Path(args.output_dir, f"davis_vidseg_{size}_{source}")
    decisive = deciding(args, NOT_IN_MASKS, ("dataroot", "frames", "mask"), **features.facts())
    remedy = "pass --overwrite or another --output_dir"
    results = Results(folder, decisive, args.overwrite, ("*.png", "*.jpg"), remedy)
    for name in CSVS:
        results.path(name).unlink(missing_ok=True)
    return results


def mask_name(video: Video, number: int) -> str:
    """The name of the mask of a frame in the results."""
    return f"{video.name}/{video.frames[number].stem}.png"


def write_mask(results: Results, name: str, values: np.ndarray, palette: list[int] | None) -> None:
    """Write values [H, W] uint8 as an indexed PNG."""
    image = Image.fromarray(values)
    image.putpalette(palette or voc_palette())
    with results.writing(name) as path:
        image.save(path)


def is_done(video: Video, given: Given, results: Results) -> bool:
    """Whether all masks of a video are there, and come from the mask that is given now."""
    if not all(results.has(mask_name(video, number)) for number in range(len(video.frames))):
        return False
    values, _ = read_mask(results.path(mask_name(video, 0)))
    return np.array_equal(values, given.values)


def write_overlay(frame: Path, mask: Path, path: Path) -> None:
    """Write a frame with its objects tinted and outlined in white, if its mask is there."""
    if not mask.is_file():  # other methods may leave out the first and the last
        return
    values, palette = read_mask(mask)
    height, width = values.shape
    palette = (palette or voc_palette()) + 768 * [0]  # a file may have fewer than 256 colours
    colours = np.reshape(palette[:768], (256, 3)).astype(np.uint8)
    photo = np.asarray(read_image(frame, upright=False).resize((width, height)))
    tinted = photo // 2 + colours[values] // 2
    shown = np.where(values[..., None] > 0, tinted, photo)
    shown[boundary(values) > 0] = 255
    with replacing(path) as temporary:
        Image.fromarray(shown).save(temporary, quality=90)


def write_overlays(
    folder: Path, masks: Path, videos: list[Video], pool: ThreadPoolExecutor
) -> None:
    """Write the pictures of all frames as folder/{video}/{frame}.jpg."""
    writing = []
    for video in videos:
        for frame in video.frames:
            mask = masks / video.name / f"{frame.stem}.png"
            path = folder / video.name / f"{frame.stem}.jpg"
            writing.append(pool.submit(write_overlay, frame, mask, path))
    for written in progress(writing, unit="picture", desc="overlay"):
        written.result()


# ---- the command line ---------------------------------------------------------------------------


def videos_of(args: argparse.Namespace, unpacked: Path) -> list[Video]:
    """The videos that the flags name; ValueError for flags that contradict each other.

    Args:
        unpacked: an empty folder for the frames of a movie.
    """
    own = "--frames FOLDER --mask FIRST.png"
    what = ""
    if not args.dataroot and not args.frames:
        what = f"there is no video: pass --dataroot DAVIS, or {own}"
    elif bool(args.frames) != bool(args.mask):
        what = f"--frames and --mask need each other: pass {own}"
    elif args.frames and (args.dataroot or args.sequences or args.score_only):
        what = f"--dataroot, --sequences and --score_only do not go with {own}: leave them out"
    if what:
        raise ValueError(what)
    if args.frames:
        return [own_video(Path(args.frames), Path(args.mask), unpacked)]
    return find_videos(args.dataroot, args.sequences, not args.score_only or args.overlay)


def propagate_all(
    args: argparse.Namespace, videos: list[Video], pool: ThreadPoolExecutor
) -> tuple[Path, dict[str, Any]]:
    """Propagate the videos that are not done yet; the folder of the masks, and the settings."""
    features = build_features(args)
    results = open_results(args, features)
    count = sum(len(video.frames) for video in videos)
    with torch.inference_mode(), progress(total=count, unit="frame") as bar:
        for video in videos:
            bar.set_description(video.name, refresh=False)
            given = read_given(video, args.binary)
            if is_done(video, given, results):
                bar.update(len(video.frames))
                continue
            propagate(
                video, given, features, results, pool, bar.update, args.imsize, args.short_side,
                args.n_last_frames, args.size_mask_neighborhood, args.topk,
            )  # fmt: skip
    facts = {**features.facts(), "device": str(features.backbone.device)}
    return results.folder, settings(args, **facts)


def main(args: argparse.Namespace) -> None:
    """Propagate (unless --score_only), score, print and write."""
    check_range(
        args, imsize=1, short_side=1, n_last_frames=0, size_mask_neighborhood=0, topk=1, workers=1
    )
    check_one_process()
    with TemporaryDirectory() as unpacked, ThreadPoolExecutor(args.workers) as pool:
        videos = videos_of(args, Path(unpacked))
        for video in videos:
            read_given(video, args.binary)  # a bad one is told before a backbone is built
        if args.score_only:
            masks = Path(args.score_only)
            folder = Path(args.output_dir)  # the masks may be somebody else's
            used = {name: value for name, value in settings(args).items() if name in SCORING}
        else:
            masks, used = propagate_all(args, videos, pool)
            folder = masks

        results = None
        scored = {video.name: video.masks for video in videos if not video.first_only}
        if scored:
            results = evaluate(masks, scored, pool, args.binary)
            print(table(results))
            write_csv(folder, results)
            note(f"the scores are in {folder / CSVS[0]} and {CSVS[1]}")
        frames = sum(max(len(video.frames), len(video.masks)) for video in videos)
        counts = {"sequences": len(videos), "frames": frames}
        report(args, {"settings": used, **counts, "results": results})

        drawn = [video for video in videos if video.first_only or args.overlay]
        write_overlays(folder / "overlay", masks, drawn, pool)
        for video in drawn:
            if video.first_only:
                what = f"{video.name} has the mask of its first frame alone"
                note(f"{what}: there is nothing to score")
                pictures = folder / "overlay" / video.name
                print(f"masks in {masks / video.name}, pictures in {pictures}")


if __name__ == "__main__":
    parser().run(main)
