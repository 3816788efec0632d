"""Semantic segmentation by a linear probe on frozen dense features: mIoU.

    python eval_segmentation.py --dataset camvid --dataroot CamVid --size 176 240 \\
        --model_type vit_mini16 --lift_path pretrained/lift_vit_mini16_attend.pth
    python eval_segmentation.py --dataset voc --dataroot VOCdevkit \\
        --model_type vit_small_patch14_dinov2 --facet token_norm
    python eval_segmentation.py --dataset folder --dataroot MINE --classes 5 --score_only maps/

Upsamplers have been ranked by this evaluation since JAFAR (Couairon et al., 2025). A 1x1
convolution is trained on the raw features of a frozen network: 20 epochs of AdamW, a cosine over
all steps. Where the features are coarser than the labels, the logits are resized bilinearly, so
`--upsample none` is the row that papers call bilinear. The measure is the mean of the classes'
intersection over union, over a whole split. A class that is neither labelled nor predicted there is
left out of the mean, as torchmetrics does. --schedule jafar repeats the learning rates of JAFAR's
first table, whose figures are not comparable with later ones.

Photos are resized to --imsize along the shorter side and cropped at the centre, and labels
likewise; --size squashes both. Half of the batches are flipped. A flipped photo has features of its
own, which are not the features flipped, so both are computed. Features are rounded to half
precision. They are kept in memory up to --cache_gb, and what does not fit is computed again.

Data sets are read as they are published: segmentation_data.py shows the layouts. `--dataset folder`
is ROOT/SPLIT/images and ROOT/SPLIT/masks, or ROOT/images/SPLIT and ROOT/masks/SPLIT, where masks
are PNG files named as the photos, with a class from 0 in each pixel.

Prints a table of the classes, mIoU and accuracy. --output_dir keeps the probe, the label maps and
pictures; a second run of the same settings takes the probe from there.

Notation: B batch, C channels, K classes, h w the grid of the features, H W of the labels.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

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
from files import Results, first_line, load_tensors, save_tensors

NAMES = ("camvid", "voc", "ade20k", "cityscapes", "folder")
JAFAR_STEPS = 20  # from the full learning rate to 0, and as many back, in --schedule jafar

PROBE = "probe.pth"  # in --output_dir
WRITTEN = (PROBE, "predictions/**/*.png", "pictures/**/*.png")

# flags that change how the work is done, or what is drawn, but not the probe or the label maps
NOT_IN_A_RESULT = ("workers", "cache_gb", "visualize", "output_dir", "overwrite")


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    data = command.add_argument_group("data", "What is segmented, and at which size.")
    add = data.add_argument
    add("--dataset", required=True, choices=NAMES, help="the data set")
    add("--dataroot", required=True, help="ROOT, its folder")
    add("--train_split", help="split to train the probe on (default: the training split)")
    add("--split", help="split to score (default: test for camvid, else validation)")
    add("--classes", type=int, help="of --dataset folder: how many; labels count from 0")
    add(
        "--ignore", type=int, nargs="*", metavar="LABEL",
        help="of --dataset folder: labels of pixels that do not count (default: 255)",
    )  # fmt: skip
    add("--imsize", type=int, default=448, help="side of the square in pixels (default: 448)")
    add(
        "--size", type=int, nargs=2, metavar=("H", "W"),
        help="squash photos to H x W pixels, instead of cropping a square",
    )  # fmt: skip

    probe = command.add_argument_group("probe", "How the linear probe is trained.")
    add = probe.add_argument
    add("--epochs", type=int, default=20, help="passes over the photos (default: 20)")
    add("--batch_size", type=int, default=2, help="photos a step (default: 2)")
    add("--lr", type=float, default=5e-4, help="learning rate of AdamW (default: 0.0005)")
    add("--weight_decay", type=float, default=1e-5, help="of AdamW (default: 0.00001)")
    add(
        "--schedule", choices=("cosine", "jafar"), default="cosine",
        help="learning rate: one cosine over all steps, or down and up in every 40 steps "
        "(default: cosine)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="for weights, order and flips (default: 0)")
    add("--cache_gb", type=float, default=4, help="GiB of features kept in memory (default: 4)")
    add("--workers", type=int, default=0, help="processes that read photos (default: 0)")

    output = command.add_argument_group("output", "What is written besides the table.")
    add = output.add_argument
    add("--output_dir", help="folder for probe, label maps and pictures (default: none)")
    add("--overwrite", action="store_true", help="remove what an earlier run has written there")
    add("--visualize", type=int, default=0, metavar="N", help="draw N photos into --output_dir")
    add("--score_only", metavar="DIR", help="score the label maps in DIR, of any other method")
    add_backbone_args(command)
    add_lift_args(command)
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports below

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.functional import to_pil_image

from features import Features, build_features
from loading import Loader
from photos import spread, titled_sheet
from segmentation_data import (
    IGNORED,
    DataSet,
    Key,
    Photos,
    Sample,
    as_classes,
    choose_data,
    read_mask,
    read_photos,
)

Steps = list[list[Key]]  # the photos of every step


# ---- features, computed once --------------------------------------------------------------------


def plan(photos: int, epochs: int, batch_size: int, seed: int) -> Steps:
    """The keys of every step: each epoch has its own order, and half of the batches are flipped."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(epochs):
        order = torch.randperm(photos, generator=generator).tolist()
        for start in range(0, photos, batch_size):
            flipped = torch.rand(1, generator=generator).item() < 0.5
            numbers = order[start : start + batch_size]
            steps.append([(number, flipped) for number in numbers])
    return steps


def to_compute(steps: Steps, capacity: int) -> Steps:
    """The keys whose features each step has to compute, if the first `capacity` are kept."""
    kept: set[Key] = set()
    lacking = []
    for step in steps:
        new = [key for key in step if key not in kept]
        kept.update(new[: capacity - len(kept)])
        lacking.append(new)
    return lacking


@torch.no_grad()
def half_features(features: Features, images: Tensor) -> Tensor:
    """The features [B, C, h, w] of images, all in half precision, whether they are kept or not."""
    return features(images).half()


class Batches:
    """The features and classes of every step, computed when they are first needed.

    An iteration gives (features [B, C, h, w] in half precision, classes [B, H, W]) in main memory.

    Args:
        steps: see `plan`.
        cache_gb: how many GiB are kept; what does not fit is computed again whenever it is needed.
    """

    def __init__(
        self, features: Features, photos: Photos, steps: Steps, cache_gb: float, workers: int
    ):
        self.features = features
        self.photos = photos
        self.steps = steps
        self.workers = workers

        # all photos take as much memory as the first
        image, classes = photos[steps[0][0]]
        feats = half_features(features, image[None])
        self.channels = feats.shape[1]
        self.capacity = int(cache_gb * 2**30 / (feats.nbytes + classes.nbytes))

        needed = len(set(chain.from_iterable(steps)))
        if needed > self.capacity:
            what = f"--cache_gb {cache_gb:g} keeps the features of {self.capacity} photos of"
            note(f"{what} {needed} (with flipped ones); the others are computed in every epoch")

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        lacking = to_compute(self.steps, self.capacity)
        loader = iter(Loader(self.photos, self.workers, [keys for keys in lacking if keys]))
        kept: dict[Key, tuple[Tensor, Tensor]] = {}
        for step, new in zip(self.steps, lacking):
            entries = {key: kept[key] for key in step if key in kept}
            if new:
                images, classes = next(loader)
                feats = half_features(self.features, images).cpu()
            for number, key in enumerate(new):
                # copies: mere views would keep the whole batch in memory
                entries[key] = (feats[number].clone(), classes[number].clone())
                if len(kept) < self.capacity:
                    kept[key] = entries[key]

            batch_feats = [entries[key][0] for key in step]
            batch_classes = [entries[key][1] for key in step]
            yield torch.stack(batch_feats), torch.stack(batch_classes)


# ---- the probe ----------------------------------------------------------------------------------


def logits_of(probe: nn.Module, feats: Tensor, size: torch.Size) -> Tensor:
    """The probe's logits [B, K, H, W] for features [B, C, h, w] of any precision."""
    logits = probe(feats.float())                                  # [B, K, h, w]
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """The mean cross-entropy [] of the pixels that count; 0 where none does."""
    total = F.cross_entropy(logits, classes.long(), ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp(min=1)


def train_probe(
    batches: Batches,
    classes: int,
    device: torch.device,
    lr: float = 5e-4,
    weight_decay: float = 1e-5,
    schedule: str = "cosine",
    seed: int = 0,
) -> nn.Conv2d:
    """A 1x1 convolution from features to `classes` logits, trained on the batches in their order.

    Raises:
        ValueError: its weights are not finite in the end.
    """
    torch.manual_seed(seed)
    probe = nn.Conv2d(batches.channels, classes, 1).to(device)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr, betas=(0.9, 0.999), weight_decay=weight_decay
    )
    period = JAFAR_STEPS if schedule == "jafar" else len(batches)
    scheduler = CosineAnnealingLR(optimizer, period)

    for feats, labels in progress(batches, unit="step", desc="training"):
        labels = labels.to(device)
        logits = logits_of(probe, feats.to(device), labels.shape[1:])
        loss = pixel_loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    if not probe.weight.isfinite().all():
        raise ValueError(f"the probe's weights are not finite: pass an --lr below {lr:g}")
    return probe


def get_probe(
    args: argparse.Namespace, features: Features, data: DataSet, results: Results | None
) -> nn.Conv2d:
    """The probe that an earlier run has left in --output_dir, or else a new one, which is kept."""
    device = features.backbone.device
    if results and results.has(PROBE):
        remedy = "pass --overwrite"
        state = load_tensors(results.path(PROBE), remedy, remedy)
        try:
            probe = nn.Conv2d(state["weight"].shape[1], len(data.classes), 1)
            probe.load_state_dict(state)
            return probe.to(device)
        except (AttributeError, IndexError, KeyError, RuntimeError) as error:
            what = f"{results.path(PROBE)} is damaged ({first_line(error)})"
            raise ValueError(f"{what}: {remedy}") from error

    photos = find_photos(args, data, args.train_split or data.train)
    steps = plan(len(photos), args.epochs, args.batch_size, args.seed)
    batches = Batches(features, photos, steps, args.cache_gb, args.workers)
    options = (args.lr, args.weight_decay, args.schedule, args.seed)
    probe = train_probe(batches, len(data.classes), device, *options)
    if results:
        save_tensors(results.path(PROBE), probe.state_dict())
    return probe


# ---- scores -------------------------------------------------------------------------------------


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (row) are predicted as each (column). [K, K]"""
    counts = truth != IGNORED
    pairs = truth[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def predict(
    features: Features,
    probe: nn.Module,
    photos: Photos,
    classes: int,
    batch_size: int,
    workers: int = 0,
    results: Results | None = None,
) -> Tensor:
    """The confusion [K, K] of the probe's predictions; the label maps go to `results`."""
    keys = [(number, False) for number in range(len(photos))]
    groups = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader = Loader(photos, workers, groups)
    total: Any = 0
    batches = progress(loader, unit="batch", desc="scoring")
    for group, (images, truth) in zip(groups, batches):
        feats = half_features(features, images)
        truth = truth.to(feats.device)
        predicted = logits_of(probe, feats, truth.shape[1:]).argmax(dim=1)      # [B, H, W]
        total = total + confusion(truth, predicted, classes)
        if results is None:
            continue
        for (number, _), labels in zip(group, predicted.cpu().numpy()):
            with results.writing(map_name(photos.samples[number])) as path:
                Image.fromarray(labels.astype(np.min_scalar_type(classes - 1))).save(path)
    return total.cpu()


def map_name(sample: Sample) -> str:
    """The name of a photo's label map in the folder of results."""
    return f"predictions/{sample.name}.png"


def score_maps(folder: Path, photos: Photos, classes: int) -> Tensor:
    """The confusion [K, K] of the label maps in a folder, which hold classes 0 to K - 1.

    They are named as the photos, in subfolders or not, and as large as the masks, or as the
    evaluation's size.

    Raises:
        FileNotFoundError, ValueError: one is missing, of another size, or has another label.
    """
    table = np.arange(classes, dtype=np.int16)  # the class of every label
    total: Any = 0
    for number in progress(range(len(photos)), unit="map", desc="scoring"):
        name = photos.samples[number].name
        path = folder / f"{name}.png"
        if not path.is_file():
            path = folder / f"{Path(name).name}.png"
        labels = read_mask(path)
        truth = photos.full_classes(number)
        if labels.shape != truth.shape:
            truth = photos.small(truth)
        if labels.shape != truth.shape:
            height, width = labels.shape
            what = f"{path} is {width}x{height}"
            raise ValueError(f"{what}: make it as large as {photos.samples[number].mask}")
        labels[truth.numpy() == IGNORED] = 0  # there any label will do
        predicted = as_classes(labels, table, path)
        total = total + confusion(truth, predicted, classes)
    return total


def scores(total: Tensor, names: list[str]) -> dict[str, Any]:
    """mIoU, accuracy and each class's figures in percent, from a confusion [K, K].

    A class that is neither labelled nor predicted has no IoU (None), and no part in the mean. One
    that is only predicted has 0. ValueError if no pixel counts.
    """
    labelled = total.sum(dim=1).tolist()
    predicted = total.sum(dim=0).tolist()
    correct = total.diagonal().tolist()
    pixels = sum(labelled)
    if pixels == 0:
        raise ValueError("no pixel of this split counts, all are void: correct the masks")

    rows = []
    for number, name in enumerate(names):
        row = {"class": name, "share": 100 * labelled[number] / pixels, "iou": None}
        union = labelled[number] + predicted[number] - correct[number]
        if union:
            row["iou"] = 100 * correct[number] / union
        rows.append(row)
    counted = [row["iou"] for row in rows if row["iou"] is not None]
    return {
        "miou": sum(counted) / len(counted),
        "accuracy": 100 * sum(correct) / pixels,
        "pixels": pixels,
        "classes": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The result of `scores` as text, a line for each class."""
    lines = [f"{'class':24}{'share':>8}{'IoU':>8}"]
    for row in results["classes"]:
        iou = "-" if row["iou"] is None else f"{row['iou']:.2f}"
        lines.append(f"{row['class']:24}{row['share']:8.2f}{iou:>8}")
    lines.append(f"mIoU {results['miou']:.2f}, accuracy {results['accuracy']:.2f}")
    return "\n".join(lines)


# ---- pictures -----------------------------------------------------------------------------------


def class_colours(classes: int) -> np.ndarray:
    """A colour for each class, and black for IGNORED at the end. [K + 1, 3]"""
    # hues a golden section apart, of three lightnesses in turn: neighbours differ well
    colours = []
    for number in range(classes):
        hue = 360 * (number * 0.618 % 1)
        lightness = (62, 40, 78)[number % 3]
        colours.append(ImageColor.getrgb(f"hsl({hue:.0f}, 75%, {lightness}%)"))
    return np.array([*colours, (0, 0, 0)], np.uint8)


def draw(image: Tensor, truth: np.ndarray, predicted: np.ndarray, names: list[str]) -> Image.Image:
    """A photo [3, H, W], its classes [H, W] and those predicted side by side, and a legend."""
    colours = class_colours(len(names))
    labels = Image.fromarray(colours[truth])
    prediction = Image.fromarray(colours[predicted])
    panels = [("photo", to_pil_image(image)), ("labels", labels), ("prediction", prediction)]
    height = len(truth) * max(1, round(360 / len(truth)))  # whole pixels for each label
    sheet = titled_sheet(panels, height)

    # the classes that occur, in rows of as many as fit
    names = [*names, "(void)"]  # the last, for its number is -1
    present = np.union1d(truth, predicted).tolist()
    columns = max(1, sheet.width // 150)
    rows = math.ceil(len(present) / columns)
    picture = Image.new("RGB", (sheet.width, sheet.height + 24 * rows), "white")
    picture.paste(sheet)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for place, number in enumerate(present):
        left = 8 + 150 * (place % columns)
        top = sheet.height + 24 * (place // columns)
        pen.rectangle([left, top, left + 16, top + 16], fill=tuple(colours[number].tolist()))
        pen.text((left + 22, top + 8), names[number], "black", font, anchor="lm")
    return picture


def save_pictures(photos: Photos, names: list[str], count: int, results: Results) -> None:
    """Draw `count` photos, spread over the split, whose label maps are in the results."""
    for number in spread(range(len(photos)), count):
        sample = photos.samples[number]
        image, truth = photos[(number, False)]
        predicted = read_mask(results.path(map_name(sample)))
        with results.writing(f"pictures/{sample.name}.png") as path:
            draw(image, truth.numpy(), predicted, names).save(path)


# ---- the command --------------------------------------------------------------------------------


def find_photos(args: argparse.Namespace, data: DataSet, split: str) -> Photos:
    """The Photos of a split, at the size that --size or --imsize says."""
    height, width = args.size or (args.imsize, args.imsize)
    return read_photos(data, Path(args.dataroot), split, (height, width), squash=bool(args.size))


def main(args: argparse.Namespace) -> None:
    """Train the probe, score it, and print the table; or score the label maps of --score_only."""
    check_one_process()
    check_range(
        args, imsize=1, classes=2, epochs=1, batch_size=1, lr=0, weight_decay=0, seed=0,
        cache_gb=0, workers=0, visualize=0,
    )  # fmt: skip
    if args.visualize and not args.output_dir:
        raise ValueError("--visualize needs a folder for its pictures: pass --output_dir")
    data = choose_data(args.dataset, Path(args.dataroot), args.classes, args.ignore)
    photos = find_photos(args, data, args.split or data.test)
    classes = len(data.classes)
    facts: dict[str, Any] = {}
    if args.score_only:
        total = score_maps(Path(args.score_only), photos, classes)
    else:
        features = build_features(args)
        features.check_size(*photos.size, "--size" if args.size else "--imsize")
        facts = features.facts()
        results = None
        if args.output_dir:
            decided_by = deciding(args, NOT_IN_A_RESULT, ("dataroot",), **facts)
            results = Results(args.output_dir, decided_by, args.overwrite, WRITTEN)
        probe = get_probe(args, features, data, results)
        total = predict(features, probe, photos, classes, args.batch_size, args.workers, results)
        if results:
            save_pictures(photos, data.classes, args.visualize, results)

    found = scores(total, data.classes)
    print(table(found))
    absent = [row["class"] for row in found["classes"] if row["share"] == 0]
    if absent:
        what = f"no pixel is labelled {', '.join(absent)}"
        note(f"{what}: in the mean it counts 0 if it is predicted, and is left out if it is not")
    report(args, {"settings": settings(args, **facts), "photos": len(photos), "results": found})


if __name__ == "__main__":
    parser().run(main)
