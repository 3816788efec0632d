"""DAVIS 2017: propagate the first mask of every video by dense features and score J&F, in one command.

    python eval_davis.py --dataroot DAVIS --model_type dino_vits16 --lift_path lift.pth --output_dir results --imsize 224
    python eval_davis.py --dataroot DAVIS --score_only results/davis_vidseg_224_layer11

The first command writes indexed PNGs to results/davis_vidseg_224_layer11/{sequence}/. Interrupted, it goes on at the next
sequence; masks that the same settings made are kept, others are made anew. Both commands score the masks, write
global_results-val.csv and per-sequence_results-val.csv beside them as davis2017-evaluation does, and print a table and one line
of JSON with settings and results (per object: J and F).

Propagation is that of DINO's evaluation (Caron et al., arXiv 2104.14294, after Jabri et al., arXiv 2006.14613): each cell takes
the labels of the most similar cells, within a window, of the first and the last frames. Scores are those of
davis2017-evaluation, semi-supervised: the first and the last frame do not count, 255 is background. Two differences: decay does
not wrap in videos of more than 256 frames, and 255 in a result is background too, with a note, instead of an error.

--dataroot holds Annotations/480p, JPEGImages/480p (--score_only does without) and ImageSets/2017/val.txt.
Time on 2 CPU cores, a frame at 224: about 0.1 s for ViT-S/16 with LiFT, 0.5 s for ViT-S/8 with LiFT, and 1.5 ms to score it.

Notation: h w grid of features, C channels, n labels (background and objects), T context frames, p patch size.
"""

import argparse
import csv
import json
import math
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from extractor import Command, ViTExtractor, add_backbone_args, first_line, read_image, replacing, settings
from lift import add_lift_args, upsampler

TEMPERATURE = 0.1
TILE = 14  # cells, the side of a block of targets: small blocks waste less outside the window, large ones multiply faster
BATCH = 4  # frames that go through the backbone at once
VOID = 255
FPS = 24
CSVS = ("global_results-val.csv", "per-sequence_results-val.csv")
METRICS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


# ---- the data set ---------------------------------------------------------------------------------------------------


class Sequence(NamedTuple):
    """A video: its name, its annotated masks and its frames (none for scoring alone), in order."""

    name: str
    masks: list[Path]
    frames: list[Path]


def find_sequences(dataroot, names, with_frames):
    """The sequences `names`, or those of ImageSets/2017/val.txt, as [Sequence].

    Raises FileNotFoundError for a missing list, folder, frame or annotation.
    """
    root, val = Path(dataroot), Path(dataroot) / "ImageSets/2017/val.txt"
    if not names and not val.is_file():
        raise FileNotFoundError(f"no list of sequences at {val}: correct --dataroot, or name sequences with --sequences")
    names = list(dict.fromkeys(names or val.read_text(errors="replace").split()))
    if not names or max(map(len, names)) > 255:
        raise ValueError(f"{val} names no sequence, or what can be none: restore it, or name sequences with --sequences")
    return [find_sequence(root, name, with_frames) for name in names]


def find_sequence(root, name, with_frames):
    """One Sequence; FileNotFoundError unless it has frames and annotations, in pairs."""
    folders = [(root / "Annotations/480p" / name, "*.png"), (root / "JPEGImages/480p" / name, "*.jpg")]
    masks, frames = (sorted(folder.glob(pattern)) for folder, pattern in folders)
    for found, (folder, pattern) in zip((masks, frames) if with_frames else (masks,), folders):
        if not found:
            raise FileNotFoundError(f"no {pattern} in {folder}: correct --dataroot or --sequences")
    unpaired = sorted({mask.stem for mask in masks} ^ {frame.stem for frame in frames})
    if with_frames and unpaired:
        what = "annotation" if unpaired[0] in {frame.stem for frame in frames} else "frame"
        raise FileNotFoundError(f"{name} has no {what} {unpaired[0]}: restore it in {root}")
    return Sequence(name, masks, frames if with_frames else [])


def read_indexed(path):
    """An indexed or grey PNG: (its values [H, W] uint8, its palette as a flat list or None).

    Raises FileNotFoundError or ValueError, in one line that names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no mask {path}: restore it, every frame but the first and the last is scored")
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"its mode is {image.mode}")
            return np.array(image).astype(np.uint8), image.getpalette()
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} is not a readable indexed PNG ({first_line(error)}): restore it or write it anew") from error


def read_labels(path):
    """Object labels [H, W] uint8 of an indexed PNG; void (255) is background. Raises as `read_indexed`."""
    values, _ = read_indexed(path)
    values[values == VOID] = 0
    return values


def pixels(size):
    """A size (W, H) as text."""
    return f"{size[0]}x{size[1]} pixels"


def voc_palette():
    """The palette of Pascal VOC, DAVIS's but for a few shades, as a flat list: a label's bits dealt to red, green and blue."""
    label = np.arange(256)[:, None]
    bits = [((label >> (3 * i + np.arange(3))) & 1) << (7 - i) for i in range(3)]  # [256, 3] each
    return sum(bits).ravel().tolist()


def write_indexed(path, labels, palette):
    """Write labels [H, W] uint8 as an indexed PNG, atomically."""
    image = Image.fromarray(labels)
    image.putpalette(palette)
    with replacing(path) as temporary:
        image.save(temporary)


# ---- propagation ----------------------------------------------------------------------------------------------------


def frame_size(width, height, imsize, short_side, patch):
    """Pixels (W, H) at which a frame is read: imsize x imsize, or with `short_side` DINO's rule.

    DINO's: the shorter side gets `short_side`, the other keeps the aspect ratio, cut to a multiple of 64 (of the patch where
    that does not divide 64).
    """
    if not short_side:
        return imsize, imsize
    step = 64 if 64 % patch == 0 else patch
    longer = max(step, int(short_side * max(width, height) / min(width, height) // step * step))
    return (longer, short_side) if width >= height else (short_side, longer)


def read_frame(path, size, imsize, short_side, patch):
    """A frame as a tensor [3, H, W] in 0..1, resized as its protocol asks: PIL bicubic, or cv2 bilinear with `short_side`.

    Raises ValueError unless it has the size (W, H) in pixels of its annotation, `size`.
    """
    photo = read_image(path)
    if photo.size != size:
        raise ValueError(f"{path} has {pixels(photo.size)}, its annotation {pixels(size)}: take both of one resolution")
    wanted = frame_size(*size, imsize, short_side, patch)
    return to_tensor(cv2.resize(np.asarray(photo), wanted) if short_side else photo.resize(wanted, Image.Resampling.BICUBIC))


def batches(read, paths, pool):
    """Yield read(path) of all paths, stacked [B, ...]; the threads of `pool` read a batch while the one before is used."""
    chunks = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    ahead = pool.map(read, chunks[0])
    for following in [*chunks[1:], []]:
        ready, ahead = list(ahead), pool.map(read, following)
        yield torch.stack(ready)


def one_hot(labels, grid):
    """Labels [H, W] uint8 -> soft segmentation [h, w, n] on the grid: nearest pixel, one channel for each of 0..max.

    An object that falls between the cells keeps its channel, empty, and a line on stderr names it.
    """
    small = np.array(Image.fromarray(labels).resize((grid[1], grid[0]), Image.Resampling.NEAREST))
    lost = np.setdiff1d(labels, np.append(small, 0)).tolist()
    if lost:
        print(f"note: objects {lost} fall between the cells of the grid ({grid[0]}x{grid[1]}): not propagated", file=sys.stderr)
    return F.one_hot(torch.from_numpy(small).long(), int(labels.max()) + 1).float()


def propagate(features, images, labels, n_last_frames=7, size_mask_neighborhood=12, topk=5):
    """Yield the soft segmentation [n, h, w] of every frame of a video but the first.

    `features` is any callable [B, 3, H, W] -> [B, C, h, w], `images` an iterable of batches of frames, `labels` [H, W] uint8
    the objects of the first frame. The context of a frame is the first frame and the `n_last_frames` before it.
    """
    first, recent = None, deque(maxlen=n_last_frames)
    for batch in images:
        for cells in F.normalize(features(batch), dim=1).permute(0, 2, 3, 1).contiguous():  # [h, w, C]
            if first is None:
                first = (cells, one_hot(labels, cells.shape[:2]).to(cells.device))
                continue
            segmentation = transfer(cells, [first, *recent], size_mask_neighborhood, topk)  # [h, w, n]
            recent.append((cells, segmentation))
            yield segmentation.permute(2, 0, 1)


def transfer(cells, context, radius, topk):
    """Soft segmentation [h, w, n] of L2-normalised `cells` [h, w, C] from a context of [(cells, segmentation)].

    A target's sources are all cells |di|, |dj| <= radius (0: everywhere) away in all context frames. Those at least as similar
    as the `topk`-th (ties count) vote with weight exp(cos / 0.1). Works in blocks of targets, each against the sources that
    its windows reach: memory and, with a radius, time grow linearly with the number of cells.
    """
    h, w, _ = cells.shape
    radius = radius or max(h, w)
    out = cells.new_empty(h, w, context[0][1].shape[2])
    for top, left in product(range(0, h, TILE), range(0, w, TILE)):
        target = slice(top, top + TILE), slice(left, left + TILE)                                         # a cells
        source = tuple(slice(max(s.start - radius, 0), s.stop + radius) for s in target)                  # b cells
        sources, votes = (torch.cat([frame[i][source].flatten(0, 1) for frame in context]) for i in (0, 1))
        cosine = cells[target].flatten(0, 1) @ sources.T                                                  # [a, T*b]
        cosine.unflatten(1, (len(context), -1)).add_(window(target, source, (h, w), radius, cells.device)[:, None])
        values, indices = most_similar(cosine, topk)                                                      # [a, k]
        weights = (values / TEMPERATURE).softmax(1)
        out[target] = (weights[..., None] * votes[indices]).sum(1).unflatten(0, out[target].shape[:2])    # [a, n]
    return out


def window(target, source, grid, radius, device):
    """0 for the b cells of block `source` inside the window of each of the a cells of block `target`, -inf outside: [a, b]."""
    rows, columns = (
        (torch.arange(size, device=device)[to][:, None] - torch.arange(size, device=device)[at]).abs() > radius
        for size, to, at in zip(grid, target, source)
    )
    far = (rows[:, None, :, None] | columns[None, :, None, :]).flatten(0, 1).flatten(1)
    return torch.zeros(far.shape, device=device).masked_fill_(far, -math.inf)


def most_similar(cosine, topk):
    """The entries of each row [a, N] that are not below its `topk`-th largest: (values, -inf for others, and indices) [a, k]."""
    k = topk
    while True:
        k = min(k + 1, cosine.shape[1])
        values, indices = cosine.topk(k)
        least = values[:, min(topk, k) - 1, None].clamp(min=-2)  # of cosines, -2 is below all and above -inf
        if k == cosine.shape[1] or (values[:, -1:] < least).all():
            return values.masked_fill(values < least, -math.inf), indices
        k *= 2  # ties with the last one: look further


def harden(segmentation, patch, size):
    """Soft segmentation [n, h, w] -> labels [H, W] uint8 at `size` (W, H): bilinear x p, min-max per channel, argmax, nearest."""
    large = F.interpolate(segmentation[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high  # a channel that is the same everywhere stays as it is: nothing to stretch but rounding
    labels = torch.where(flat, large, (large - low) / (high - low)).max(0).indices  # argmax is slow here
    return np.array(Image.fromarray(labels.byte().cpu().numpy()).resize(size, Image.Resampling.NEAREST))


def write_masks(sequence, folder, soft, patch, bar):
    """Write the masks of a sequence to `folder`: the given one, then those of its soft segmentations as they come."""
    given, palette = read_indexed(sequence.masks[0])
    write_indexed(folder / sequence.masks[0].name, given, palette or voc_palette())
    for path, segmentation in zip(sequence.masks[1:], soft):
        write_indexed(folder / path.name, harden(segmentation, patch, given.shape[::-1]), palette or voc_palette())
        bar.update()


def propagate_all(args, sequences, pool):
    """Write the masks of every sequence that these settings have not finished yet; returns their folder."""
    extractor = ViTExtractor.from_args(args)
    up = upsampler(args, extractor)
    args.layer, args.stride, args.upsample, args.device = extractor.layer, extractor.stride, up.how, str(extractor.device)

    def features(frames):  # [B, 3, H, W] in 0..1 -> [B, C, h, w]
        images = extractor.normalize(frames.to(extractor.device))
        return up(images, extractor(images))

    def segment(sequence):
        labels = read_labels(sequence.masks[0])
        read = partial(read_frame, size=labels.shape[::-1], imsize=args.imsize, short_side=args.short_side, patch=extractor.patch)
        images = batches(read, sequence.frames, pool)
        return propagate(features, images, labels, args.n_last_frames, args.size_mask_neighborhood, args.topk)

    size = f"short{args.short_side}" if args.short_side else args.imsize
    masks = Path(args.output_dir or ".") / f"davis_vidseg_{size}_layer{extractor.layer}"
    for name in CSVS:
        (masks / name).unlink(missing_ok=True)  # it tells of other masks
    made_by = provenance(args)
    with tqdm(total=sum(len(s.masks) - 1 for s in sequences), unit="frame", disable=None) as bar:
        for sequence in sequences:
            bar.set_description(sequence.name)
            record = masks / f"{sequence.name}.json"
            if finished(sequence, masks, record, made_by):
                bar.update(len(sequence.masks) - 1)
                continue
            record.unlink(missing_ok=True)
            write_masks(sequence, masks / sequence.name, segment(sequence), extractor.patch, bar)
            with replacing(record) as temporary:
                temporary.write_text(made_by)
    return masks


def provenance(args):
    """What decides the masks, as text: all settings but those of scoring and output, and the age of the weight files."""
    free = ("output_dir", "score_only", "sequences", "workers", "overlay", "video", "json")
    dates = {path: Path(path).stat().st_mtime for path in (args.backbone_path, args.lift_path) if path}
    return json.dumps({name: value for name, value in settings(args).items() if name not in free} | {"files": dates}, indent=1)


def finished(sequence, masks, record, made_by):
    """Whether all masks of the sequence are there, made by the same settings."""
    there = all((masks / sequence.name / path.name).is_file() for path in sequence.masks)
    return there and record.is_file() and record.read_text(errors="replace") == made_by


# ---- scores ---------------------------------------------------------------------------------------------------------


def boundary(mask):
    """Boundary [H, W] bool of a mask [H, W] bool: pixels that differ from their right, lower or lower-right neighbour."""
    padded = np.pad(mask, (0, 1), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def disk(shape):
    """How far two boundaries may be apart: a disk, uint8, whose radius is 0.8 % of the diagonal of (H, W) pixels, rounded up."""
    radius = math.ceil(0.008 * math.hypot(*shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def jaccard(mask, truth):
    """Region similarity J of two masks [H, W] bool: intersection over union, 1 if both are empty (Perazzi et al. 2016)."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def contour(mask, truth, near):
    """Contour accuracy F of two masks [H, W] bool: F-measure of their boundaries, matched within `near` (Perazzi et al. 2016)."""
    edges = boundary(mask), boundary(truth)
    counts = [np.count_nonzero(edge) for edge in edges]
    if not all(counts):
        return float(not any(counts))
    dilated = [cv2.dilate(edge.view(np.uint8), near).view(bool) for edge in edges]
    precision, recall = np.count_nonzero(edges[0] & dilated[1]) / counts[0], np.count_nonzero(edges[1] & dilated[0]) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def crop(labels, truth):
    """The part of two label maps that holds all objects and their boundaries: the rest adds nothing to J and F."""
    x, y, width, height = cv2.boundingRect(labels | truth)
    part = slice(max(y - 1, 0), y + height + 1), slice(max(x - 1, 0), x + width + 1)
    return labels[part], truth[part]


def score_frame(labels, truth, count):
    """J and F of objects 1..count in two label maps [H, W] uint8 of one size: [count, 2]."""
    near = disk(truth.shape)
    labels, truth = crop(labels, truth)
    pairs = [(labels == k, truth == k) for k in range(1, count + 1)]
    return [(jaccard(*pair), contour(*pair, near)) for pair in pairs]


def score_sequence(sequence, folder):
    """J and F of every object and scored frame: [objects, 2, frames], for the masks in `folder`.

    Raises ValueError or FileNotFoundError for masks that are missing, unreadable, of another size, or with more objects.
    """
    count, scores, void = int(read_labels(sequence.masks[0]).max()), [], False
    for annotation in sequence.masks[1:-1]:
        path = folder / annotation.name
        truth, (labels, _) = read_labels(annotation), read_indexed(path)
        void |= VOID in labels
        labels[labels == VOID] = 0
        check_result(path, labels, truth, count)
        scores.append(score_frame(labels, truth, count))
    if void:
        print(f"note: {folder} has label {VOID}, which counts as background", file=sys.stderr)
    return np.reshape(scores, (-1, count, 2)).transpose(1, 2, 0)


def check_result(path, labels, truth, count):
    """Raise ValueError unless a result [H, W] has the size of its annotation and no label above `count`."""
    if labels.shape != truth.shape:
        size, wanted = pixels(labels.shape[::-1]), pixels(truth.shape[::-1])
        raise ValueError(f"{path} has {size}, its annotation {wanted}: resize it (nearest) to the annotation")
    if labels.max() > count:
        raise ValueError(f"{path}: label {labels.max()} where the first annotation has {count} objects: keep to their labels")


def summary(values):
    """Mean, recall (share above 0.5) and decay (mean of the first quarter minus that of the last) over frames [frames]."""
    if not len(values):
        return (math.nan,) * 3
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    quarters = [values[i : j + 1].mean() for i, j in pairwise(edges)]
    return values.mean(), (values > 0.5).mean(), quarters[0] - quarters[3]


def evaluate(masks, sequences, pool):
    """Score the folder `masks` of {sequence}/*.png with the threads of `pool`; returns METRICS and `per_object` {name: [J, F]}.

    METRICS are means over all objects of all sequences. What has no scored frame (videos of one or two) is None and left out.
    Raises as `score_sequence`.
    """
    jobs = pool.map(lambda sequence: score_sequence(sequence, masks / sequence.name), sequences)
    scores = list(tqdm(jobs, total=len(sequences), desc="J&F", unit="video", disable=None))
    short = [sequence.name for sequence in sequences if len(sequence.masks) < 3]
    if short:
        print(f"note: not scored, nothing between the first and the last frame: {', '.join(short)}", file=sys.stderr)
    objects = {f"{s.name}_{k + 1}": values for s, found in zip(sequences, scores) for k, values in enumerate(found)}
    table = np.array([[summary(j), summary(f)] for j, f in objects.values()]).reshape(-1, 6)  # J and F: mean, recall, decay
    scored = table[~np.isnan(table[:, 0])]
    means = scored.mean(0) if len(scored) else np.full(6, math.nan)
    results = zip(METRICS, map(number, [(means[0] + means[3]) / 2, *means]))
    return dict(results) | {"per_object": {name: [number(row[0]), number(row[3])] for name, row in zip(objects, table)}}


def number(value):
    """A float for JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


# ---- output ---------------------------------------------------------------------------------------------------------


def three(value):
    """Three decimals, or nothing for None, as in the CSV files of davis2017-evaluation."""
    return "" if value is None else f"{value:.3f}"


def write_csv(folder, results):
    """Write the two CSV files of davis2017-evaluation: global and per sequence (that is: per object) results.

    Raises OSError where the folder takes no files.
    """
    per_object = [(name, *map(three, values)) for name, values in results["per_object"].items()]
    tables = [[METRICS, [three(results[metric]) for metric in METRICS]], [("Sequence", "J-Mean", "F-Mean"), *per_object]]
    for name, rows in zip(CSVS, tables):
        with replacing(folder / name) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def print_table(results):
    """Print J and F per object, then the means."""
    width = max(map(len, [*results["per_object"], *METRICS]))
    print(f"{'':{width}}       J       F")
    for name, (j, f) in results["per_object"].items():
        print(f"{name:{width}} {three(j) or '-':>7} {three(f) or '-':>7}")
    for metric in METRICS:
        print(f"{metric:{width}} {three(results[metric]) or '-':>7}")


def pictures(masks, sequences):
    """Yield (sequence name, frame name, RGB [H, W, 3] uint8) of all frames with a mask: objects tinted, outlined in white."""
    for sequence in sequences:
        for path in sequence.frames:
            mask = masks / sequence.name / f"{path.stem}.png"
            if mask.is_file():  # other methods may leave out the first and the last
                labels, palette = read_indexed(mask)
                colours = np.reshape(palette or voc_palette(), (-1, 3)).astype(np.uint8)
                photo = np.asarray(read_image(path).resize(labels.shape[::-1]))
                picture = np.where(labels[..., None] > 0, photo // 2 + colours[labels] // 2, photo)
                picture[boundary(labels) > 0] = 255
                yield sequence.name, path.stem, picture


def write_overlays(folder, masks, sequences):
    """Write the `pictures` as JPEG files folder/{sequence}/{frame}.jpg."""
    for name, frame, picture in pictures(masks, sequences):
        with replacing(folder / name / f"{frame}.jpg") as temporary:
            Image.fromarray(picture).save(temporary, quality=90)


def write_video(path, masks, sequences):
    """Write the `pictures` of all sequences, one after another, as one MPEG-4 file of the first frame's size.

    Raises ValueError where OpenCV has no encoder for it.
    """
    size = read_image(sequences[0].frames[0]).size
    with replacing(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), FPS, size)
        if not writer.isOpened():
            raise ValueError(f"this OpenCV cannot write {path}: install opencv-python from PyPI, or take --overlay")
        for _, _, picture in pictures(masks, sequences):
            writer.write(cv2.cvtColor(cv2.resize(picture, size), cv2.COLOR_RGB2BGR))
        writer.release()


# ---- the command line -----------------------------------------------------------------------------------------------


def at_least(low):
    """An argparse type: an integer not below `low`."""

    def integer(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is too small: pass {low} or more")
        return int(text)

    return integer


def parser():
    """The command line of this file."""
    command = Command(__doc__)
    command.add_argument("--dataroot", required=True, help="DAVIS 2017: Annotations, ImageSets and JPEGImages (480p)")
    command.add_argument("--output_dir", help="folder for davis_vidseg_{imsize}_layer{layer} (default: this one)")
    command.add_argument("--imsize", type=at_least(1), default=224, help="pixels of a side, frames being squashed (default: 224)")
    command.add_argument("--short_side", type=at_least(1), help="DINO's resizing instead: pixels of the shorter side, e.g. 480")
    command.add_argument("--n_last_frames", type=at_least(0), default=7, help="context frames besides the first (default: 7)")
    command.add_argument("--size_mask_neighborhood", type=at_least(0), default=12, help="window, in cells; 0: all (default: 12)")
    command.add_argument("--topk", type=at_least(1), default=5, help="context cells that vote (default: 5)")
    command.add_argument("--sequences", nargs="+", help="only these (default: ImageSets/2017/val.txt)")
    command.add_argument("--score_only", metavar="DIR", help="score DIR/{sequence}/*.png; CSVs go to --output_dir (default: DIR)")
    command.add_argument("--workers", type=at_least(1), default=4, help="threads that read frames and score videos (default: 4)")
    command.add_argument("--overlay", action="store_true", help="also write overlay/{sequence}/*.jpg: masks over frames")
    command.add_argument("--video", metavar="MP4", help="also write masks over frames as a video, all sequences in one")
    command.add_argument("--json", metavar="FILE", help="also write the last line of the output to this file")
    add_backbone_args(command)
    add_lift_args(command)
    return command


def main(args):
    """Propagate (unless --score_only), score, write and print."""
    if args.video and Path(args.video).suffix != ".mp4":
        raise ValueError(f"--video {args.video} is no MPEG-4 file: give it a name that ends in .mp4")
    sequences = find_sequences(args.dataroot, args.sequences, not args.score_only or args.overlay or args.video)
    with ThreadPoolExecutor(args.workers) as pool:
        masks = Path(args.score_only) if args.score_only else propagate_all(args, sequences, pool)
        results = evaluate(masks, sequences, pool)
    counts = {"sequences": len(sequences), "frames": sum(len(sequence.masks) for sequence in sequences)}
    line = json.dumps({"settings": used(args), **counts, "results": results})
    print_table(results)
    print(line)  # before anything is written that might fail
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(line + "\n")
    folder = Path(args.output_dir) if args.score_only and args.output_dir else masks
    write_csv(folder, results)
    if args.overlay:
        write_overlays(folder / "overlay", masks, sequences)
    if args.video:
        write_video(args.video, masks, sequences)


def used(args):
    """The settings that had a part in the result: with --score_only none of the propagation's."""
    scoring = ("dataroot", "sequences", "score_only", "workers", "output_dir", "overlay", "video", "json", "versions")
    return {name: value for name, value in settings(args).items() if name in scoring or not args.score_only}


if __name__ == "__main__":
    parser().run(main)
