r"""Train a LiFT module for one frozen backbone on any folder of photos (LiFT paper, section 3.2).

    python train_lift.py --dataroot FOLDER --model_type dino_vits16 --save_every 1 --epochs 5 \
        --lr 0.001 --augment --loss cosine --batch_size 256 --output_dir lift_imagenet_trains
    torchrun --nproc_per_node 8 train_lift.py --dataroot FOLDER --dtype bfloat16 --workers 8
    python train_lift.py --dataroot FOLDER --cache_features CACHE --attend 1 --match 0.1 \
        --loss both --downsample resize      # a better module than the paper's
    python train_lift.py ... --resume          # go on where a stopped or killed run was
    python train_lift.py --evaluate lift.pth --val_dataroot FOLDER [FOLDER ...] \
        --model_type dino_vits16

The backbone sees a photo at S, S/2 and S/4 pixels. LiFT learns to make its features at S from those
at S/2, and those at S/2 from those at S/4.

A run is written to OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}: `lift_{epoch}.pth` and
`lift.pth` (bare state_dicts), `lift.json` (what they are for and how they were made), `last.pth`
(for --resume) and `metrics.jsonl`.

Every epoch prints what the module is worth on photos held out: --val_dataroot, else 2 % of
--dataroot. It is the mean cosine of the backbone's features at S with those that LiFT, bilinear and
nearest interpolation make from those at S/2. `lift_twice` is LiFT applied twice to those at S/4,
and `bilinear_twice` one interpolation of them by 4. A module that is not above bilinear is not
worth using. `_centred` is the same after the mean feature of the training photos was subtracted
from both sides: the raw cosine also rewards features that all look like that mean. The last line is
JSON: settings, metrics, photos that could not be read.

Every random choice follows from --seed, epoch and photo alone. So neither --workers, nor a stop and
--resume, nor the number of processes changes what is seen: N processes with batch b equal one with
N*b. (On GPUs batch norm is synchronised; on CPUs each process normalises its own b photos.) On a
CPU the same command gives the same weights, to the bit. On CUDA float32 means float32, not TF32;
--dtype bfloat16 is the fast way.

ViT-S/16 at 448 on one CPU core: 1.6 photos/s in float32, 3.4 in bfloat16, 23 from cached features.
"""

import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from command import (
    Command,
    add_backbone_args,
    check_range,
    check_torchrun,
    difference,
    first_line,
    load_tensors,
    rank,
    record,
    report,
    save_tensors,
    settings,
    world_size,
    write_text,
)

LOSSES = ("cosine", "l1", "l2", "centred", "both")  # see loss_between

# Flags that may change at --resume. They do not decide the weights, with one exception: --schedule
# cosine ends its decay at --epochs, so a larger --epochs goes on along the longer curve.
ONLY_HOW = (
    "epochs", "resume", "save_every", "save_steps", "workers", "tensorboard", "json", "compile",
    "output_dir", "cache_features",
)  # fmt: skip

LARGEST_LR = 1e37  # Adam's first steps are up to ten times as long, and must be float32 numbers
FEW_STEPS = 500  # the modules of pretrained/ took a few thousand
FEW_PHOTOS = 10  # to validate on
CENTRE_PHOTOS = 64  # that the mean feature is estimated on

# How a copy differs from its photo, for --match: see random_warp
WARP_DEGREES = 25
WARP_SCALES = (0.7, 1.5)
WARP_SHIFT = 1 / 8
MATCH_POINTS = 256  # points of a photo, each looked for among as many cells of its copy
MATCH_TEMPERATURE = 0.1  # cosines are divided by it before the softmax


def parser() -> Command:
    """The command line."""
    command = Command(__doc__)
    add = command.add_argument
    add("--dataroot", help="folder of photos, with or without subfolders")
    add(
        "--output_dir",
        default="lift_imagenet_trains",
        help="where runs are written, each into a folder of its own (default: %(default)s)",
    )
    add("--imsize", type=int, default=448, help="S, a multiple of 4 patches (default: 448)")
    add("--augment", action="store_true", help="jitter colours")
    add("--loss", default="cosine", help=f"{', '.join(LOSSES)} (default: cosine)")
    add("--epochs", type=int, default=100, help="passes over the photos (default: 100)")
    add("--batch_size", type=int, default=64, help="photos a step and process (default: 64)")
    add("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    add("--save_every", type=int, default=1, help="epochs between lift_{epoch}.pth (default: 1)")
    add("--resume", action="store_true", help="go on from the folder's last.pth")
    add(
        "--seed", type=int, default=0,
        help="of initialisation, order, jitter and held-out photos (default: 0)",
    )  # fmt: skip
    add_backbone_args(command)

    add = command.add_argument_group("validation").add_argument
    add("--val_dataroot", nargs="+", help="folders to measure on, instead of held-out photos")
    add("--val_fraction", type=float, default=0.02, help="share held out (default: 0.02)")
    add("--evaluate", metavar="LIFT", help="do not train: measure this file on --val_dataroot")
    add("--tensorboard", action="store_true", help="show the metrics in TensorBoard")
    add("--json", help="write the last line to this file too")

    add = command.add_argument_group("beyond the paper").add_argument
    add("--residual", action="store_true", help="LiFT adds to the bilinearly doubled features")
    add("--attend", type=int, default=0, metavar="R", help="LiFT weighs features R cells around")
    add(
        "--match", type=float, default=0.0, metavar="WEIGHT",
        help="also learn to find points of a photo in a warped copy of it (default: 0, off)",
    )  # fmt: skip
    add(
        "--downsample", choices=("stride", "resize"), default="stride",
        help="halve photos by every 2nd pixel, or antialiased (default: stride)",
    )  # fmt: skip
    add("--weight_decay", type=float, default=0.0, help="AdamW's (default: 0, which is Adam)")
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of --lr")
    add("--warmup", type=int, default=0, help="steps until --lr is reached (default: 0)")
    add("--accumulate", type=int, default=1, help="batches an optimizer step (default: 1)")

    add = command.add_argument_group("speed").add_argument
    add(
        "--workers", type=int, default=min(8, os.cpu_count() - 1),
        help="processes that read photos, each rank (default: %(default)s)",
    )  # fmt: skip
    add("--compile", action="store_true", help="torch.compile backbone and LiFT")
    add("--cache_features", metavar="DIR", help="compute the frozen features once, in float16")
    add("--views", type=int, default=4, help="augmented views a photo in the cache (default: 4)")
    add(
        "--save_steps", type=int, default=500,
        help="steps between two last.pth, 0: at ends of epochs only (default: 500)",
    )  # fmt: skip
    return command


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong flags are answered before the slow imports

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize
from tqdm import tqdm

from extractor import DenseExtractor, ViTExtractor, build_extractor
from feature_cache import cached, check_finite, ignore_signals, images_and_features
from lift import LiFT, double, load_lift, upsample
from photos import list_images, read_image, spread

Key = tuple[int, int]  # (epoch, index): a photo, and the seed of its jitter

# ---- photos -------------------------------------------------------------------------------------


class Photos(Dataset):
    """Photos as squares of three sizes, uint8.

    photos[epoch, index] is a dict of "full" [3, S, S], "half" [3, S/2, S/2], "quarter" [3, S/4,
    S/4] and "broken". A photo that cannot be read is replaced by the next one that can, and
    "broken" is then its index. Otherwise "broken" is -1. With `augment` the colours are jittered.

    With `warp` a photo comes with a warped copy of it: "full" is then [2, 3, S, S], and so on, and
    "warp" [2, 3] takes places in the copy to those in the photo (see random_warp).

    All that is random follows from (seed, epoch, index). It holds paths and numbers only, so that
    it is cheap to send to a loader's workers.

    Raises:
        ValueError: no photo can be read.
    """

    def __init__(
        self,
        paths: list[Path],
        imsize: int,
        downsample: str = "stride",
        augment: bool = False,
        seed: int = 0,
        warp: bool = False,
    ):
        self.paths = paths
        self.imsize = imsize
        self.downsample = downsample
        self.seed = seed
        self.warp = warp
        self.jitter = None
        if augment:
            self.jitter = ColorJitter(0.2, 0.2, 0.2, 0.2)

    def __len__(self) -> int:
        return len(self.paths)

    def is_random(self) -> bool:
        """Whether a photo looks different in each epoch, and with another seed."""
        return self.jitter is not None or self.warp

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        # this photo, those behind it, and then those from the first one on
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_image(self.paths[candidate])
            except (ValueError, OSError):
                continue
            item: dict[str, Any] = self.make_item(image, (self.seed, epoch, index))
            item["broken"] = -1
            if candidate != index:
                item["broken"] = index
            return item
        raise ValueError(f"none of the {len(self)} photos can be read: pass another --dataroot")

    def make_item(self, image, seed: tuple[int, int, int]) -> dict[str, Any]:
        """What photos[epoch, index] gives of a PIL image, without "broken".

        Args:
            seed: decides jitter and warp; no two keys have the same.
        """
        image = resize(image, [self.imsize, self.imsize], InterpolationMode.BILINEAR)
        # jitter and warp draw from torch's global generator, which is put back afterwards
        with torch.random.fork_rng(devices=[]):
            one_number = np.random.SeedSequence(seed).generate_state(1)[0]
            torch.manual_seed(int(one_number))
            photo = self.pyramid(self.recolour(image))
            if not self.warp:
                return photo
            warp = random_warp()
            copy = self.pyramid(warped(self.recolour(image), warp))

        item = {}
        for level in photo:
            item[level] = torch.stack([photo[level], copy[level]])
        item["warp"] = warp
        return item

    def recolour(self, image) -> Tensor:
        """A PIL image as uint8 [3, S, S], its colours jittered where they are to be."""
        if self.jitter:
            image = self.jitter(image)
        return pil_to_tensor(image)

    def pyramid(self, full: Tensor) -> dict[str, Tensor]:
        """An image [3, S, S] in S, S/2 and S/4 pixels."""
        if self.downsample == "stride":
            half = full[:, ::2, ::2]
            quarter = full[:, ::4, ::4]
        else:
            half = resize(full, [self.imsize // 2] * 2, antialias=True)
            quarter = resize(full, [self.imsize // 4] * 2, antialias=True)
        return {"full": full, "half": half.contiguous(), "quarter": quarter.contiguous()}


def random_warp() -> Tensor:
    """A random matrix [2, 3] that takes places in a copy to those in its photo.

    A place is (x, y, 1), with x and y from -1 to 1 between the outer edges of the image. The copy
    shows the photo turned by up to WARP_DEGREES either way, scaled by a factor of WARP_SCALES (its
    logarithm is uniform), and shifted by up to WARP_SHIFT of the side along each axis. The numbers
    are drawn from torch's global generator.
    """
    for_angle, for_scale, for_x, for_y = torch.rand(4).tolist()  # each in 0..1
    angle = math.radians(WARP_DEGREES) * (2 * for_angle - 1)
    smallest, largest = WARP_SCALES
    scale = smallest * (largest / smallest) ** for_scale
    right = 2 * WARP_SHIFT * (2 * for_x - 1)  # sides are 2 long
    down = 2 * WARP_SHIFT * (2 * for_y - 1)

    # from copy to photo: where the copy shows things larger, places move together
    cosine = math.cos(angle) / scale
    sine = math.sin(angle) / scale
    return torch.tensor([[cosine, -sine, right], [sine, cosine, down]])


def warped(image: Tensor, warp: Tensor) -> Tensor:
    """The copy of an image [3, S, S] uint8 that a warp describes; both have one shape and type.

    What lies outside the photo is mirrored at its border.
    """
    places = F.affine_grid(warp[None], [1, *image.shape], align_corners=False)  # [1, S, S, 2]
    copy = F.grid_sample(
        image[None].float(), places, padding_mode="reflection", align_corners=False
    )
    return copy[0].round().to(torch.uint8)


def split(args) -> tuple[list[Path], list[Path]]:
    """Paths to train on and to validate on: --val_dataroot, or --val_fraction drawn by --seed."""
    paths = list_images(args.dataroot)
    if args.val_dataroot:
        val_paths = []
        for root in args.val_dataroot:
            val_paths += list_images(root)
        return paths, val_paths

    count = int(args.val_fraction * len(paths))
    # numpy's legacy generator is frozen: a seed holds out the same photos in every version
    order = np.random.RandomState(args.seed).permutation(len(paths))
    held_out = set(order[:count].tolist())
    train_paths = [path for index, path in enumerate(paths) if index not in held_out]
    val_paths = [paths[index] for index in sorted(held_out)]
    return train_paths, val_paths


def stream(
    n: int, batch_size: int, epochs: int, rank: int, world: int, seed: int, skip: int
) -> Iterator[list[Key]]:
    """Yield this process's batches of keys, epoch after epoch, each epoch in an order of its own.

    Args:
        n: how many photos there are. Where they cannot be dealt out evenly, some come twice in an
            epoch, so that every process has as many batches.
        epochs: how many there are from the beginning, those before a stop included.
        rank: the number of this process, of `world`.
        skip: leave out so many batches at the start, as they were seen before a stop.
    """
    # shuffles by default, by seed and epoch
    sampler = DistributedSampler(range(n), world, rank, seed=seed)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        keys = [(epoch, index) for index in sampler]
        for at in range(0, len(keys), batch_size):
            if skip > 0:
                skip -= 1
            else:
                yield keys[at : at + batch_size]


def in_order(photos: Dataset, batch_size: int, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """This process's batches of keys, each photo once, in the order of the data set."""
    keys = [(0, index) for index in range(rank, len(photos), world)]
    return [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]


def make_loader(
    dataset: Dataset, batches: Iterable[list[Key]], args, extractor: DenseExtractor
) -> DataLoader:
    """A DataLoader over batches of keys.

    Its workers live as long as it does, and ignore signals: those are for this process.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.workers,
        pin_memory=extractor.device.type == "cuda",
        persistent_workers=args.workers > 0,
        worker_init_fn=ignore_signals,
    )


# ---- what is optimised --------------------------------------------------------------------------


def cosine_distance(out: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions of 1 - cos, of maps [B, C, h, w]."""
    return 1 - F.cosine_similarity(out, target, dim=1).mean()


def loss_between(loss: str, out: Tensor, target: Tensor, centre: Tensor | None) -> Tensor:
    """One of LOSSES between two maps [B, C, h, w].

    Args:
        loss: cosine, l1 and l2 are the paper's. centred is the cosine after `centre` was subtracted
            from both sides, both is the sum of the two cosines.
        centre: the mean feature [C, 1, 1]; only for these two.
    """
    if loss == "l1":
        return F.l1_loss(out, target)
    if loss == "l2":
        return F.mse_loss(out, target)
    if loss == "cosine":
        return cosine_distance(out, target)
    centred = cosine_distance(out - centre, target - centre)
    if loss == "centred":
        return centred
    return cosine_distance(out, target) + centred


def match_cells(count: int) -> Tensor:
    """MATCH_POINTS of the `count` cells of a grid, or all if they are fewer.

    They are spread at random and always the same. LiFT treats all cells alike, and a warp takes
    them to other places in each photo, so new ones at each step would teach it nothing more.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(count, generator=generator)
    return shuffled[:MATCH_POINTS]


def match_loss(pairs: Tensor, warp: Tensor, centre: Tensor) -> Tensor:
    """How badly points of photos are found again in their warped copies, by their features alone.

    P cells of each copy are chosen by match_cells. The warp says which point of the photo each of
    them shows. That point is looked for among the P cells: the loss is the cross-entropy of its own
    cell, from cosines of centred features. This is InfoNCE (van den Oord et al., arXiv 1807.03748)
    over the places of one image.

    Args:
        pairs: features [2B, C, h, w] of a photo, its copy, the next photo, and so on.
        warp: [B, 2, 3], from places in the copy to those in the photo: see random_warp.
        centre: the mean feature [C, 1, 1].
    Returns:
        The mean over all points, a scalar.
    """
    # photos and copies take turns in the batch
    centred = (pairs - centre).unflatten(0, (-1, 2))                      # [B, 2, C, h, w]
    photos = centred[:, 0]                                                # [B, C, h, w]
    copies = centred[:, 1]                                                # [B, C, h, w]
    height, width = pairs.shape[2:]
    cells = match_cells(height * width).to(pairs.device)                  # [P]
    in_copy = copies.flatten(2)[:, :, cells]                              # [B, C, P]

    # where the cells' centres lie in the copies, from -1 to 1, and then in the photos
    x = (2 * (cells % width) + 1) / width - 1
    y = (2 * (cells // width) + 1) / height - 1
    centres = torch.stack([x, y, torch.ones_like(x)])                     # [3, P]
    # not as a matrix product, which autocast would round to a tenth of a cell
    places = (warp[:, :, :, None] * centres).sum(dim=2)                   # [B, 2, P]
    places = places.transpose(1, 2)                                       # [B, P, 2]
    inside = (places.abs() <= 1).all(dim=2)                               # [B, P]
    in_photo = F.grid_sample(
        photos, places[:, None], padding_mode="border", align_corners=False
    )                                                                     # [B, C, 1, P]
    in_photo = in_photo.squeeze(2)                                        # [B, C, P]

    points = F.normalize(in_photo, dim=1).transpose(1, 2)                 # [B, P, C]
    cosines = points @ F.normalize(in_copy, dim=1)                        # [B, point, cell]
    logits = cosines.float() / MATCH_TEMPERATURE
    # a cell that lies outside the photo shows its mirrored border: no point is to be found there
    logits = logits.masked_fill(~inside[:, None, :], -1e4)

    # point i belongs in cell i
    own = torch.arange(len(cells), device=pairs.device).expand(len(logits), -1)  # [B, P]
    # cross_entropy wants the classes, which are the cells, as axis 1
    losses = F.cross_entropy(logits.transpose(1, 2), own, reduction="none")      # [B, P]
    return losses[inside].mean()


class Objective(nn.Module):
    """The loss of LiFT over all scales, as a module (LiFT paper, section 3.2).

    `match` is the weight of match_loss, which is not in the paper, on the features at S.
    """

    def __init__(
        self, lift: nn.Module, loss: str, centre: Tensor | None = None, match: float = 0.0
    ):
        super().__init__()
        self.lift = lift
        self.loss = loss
        self.centre = centre
        self.match = match

    def forward(
        self, images: list[Tensor], feats: list[Tensor], warp: Tensor | None = None
    ) -> Tensor:
        """The sum of the losses at S and at S/2, a scalar.

        Args:
            images: normalised, at S/2 and S/4.
            feats: the backbone's, at S, S/2 and S/4.
            warp: [B, 2, 3], for `match` only; images and features are then pairs, see match_loss.
        """
        total = 0.0
        for level, image in enumerate(images):
            finer = feats[level]                           # [B, C, 2h, 2w]
            coarser = feats[level + 1]                     # [B, C, h, w]
            out = self.lift(image, coarser).float()        # [B, C, 2h, 2w]
            total = total + loss_between(self.loss, out, finer, self.centre)
            if self.match and level == 0:
                total = total + self.match * match_loss(out, warp, self.centre)
        return total


@torch.no_grad()
def mean_feature(
    photos: Dataset, extractor: DenseExtractor, rank: int = 0, world: int = 1
) -> Tensor:
    """The mean of the features at S over up to CENTRE_PHOTOS photos, evenly spread: [C, 1, 1].

    Each process computes its share of them, and all return the same mean.

    Raises:
        ValueError: the features are not finite.
    """
    chosen = spread(range(len(photos)), CENTRE_PHOTOS)
    mine = chosen[rank::world]

    total = torch.zeros(extractor.width, dtype=torch.float64)
    images = 0
    for at in range(0, len(mine), 8):
        batch = default_collate([photos[0, index] for index in mine[at : at + 8]])
        _, by_level = images_and_features(batch, extractor, levels=1)
        feats = by_level[0]  # [B, C, h, w]
        total += feats.mean((2, 3)).cpu().double().sum(0)
        images += len(feats)  # photos, and their copies if there are any

    all_totals = torch.zeros_like(total)
    all_images = 0
    for process_total, process_images in gather((total, images)):
        all_totals += process_total
        all_images += process_images
    mean = all_totals / all_images
    check_finite(mean, extractor)
    return mean.float()[:, None, None].to(extractor.device)


# ---- what is measured ---------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    extractor: DenseExtractor,
    lift: nn.Module,
    loader: DataLoader,
    centre: Tensor,
    precision: Callable = nullcontext,
    levels: int = 3,
) -> dict[str, Any]:
    """Compare features that are made from smaller photos with the backbone's own at S.

    Each process of a torchrun measures its own batches, and all return the result over all photos.

    Args:
        loader: gives batches of Photos or Cached.
        centre: the mean feature [C, 1, 1].
        precision: makes the context that LiFT runs in.
        levels: 3, or 2 to leave out what is made from S/4.
    Returns:
        A dict with "photos", how many were measured, and "unreadable", the paths of the others.
        "lift", "bilinear" and "nearest" (from S/2), "lift_twice" and "bilinear_twice" (from S/4)
        are mean cosines over all positions of all photos, in -1..1. Each of these is there again
        with "_centred" behind its name.
    """
    names = ["lift", "bilinear", "nearest"]
    if levels == 3:
        names += ["lift_twice", "bilinear_twice"]
    # sums over photos, two for each name, side by side: of the raw cosine, and of the centred one
    totals = torch.zeros(2 * len(names), dtype=torch.float64)
    photos = 0
    broken = set()  # paths

    for batch in loader:
        images, feats = images_and_features(batch, extractor, levels)
        target = feats[0]  # [B, C, h, w], and so is everything in `made`

        made = {}
        with precision():
            made["lift"] = upsample(lift, images[1], feats[1])
        made["bilinear"] = double(feats[1])
        made["nearest"] = F.interpolate(feats[1], scale_factor=2)
        if levels == 3:
            with precision():
                made["lift_twice"] = upsample(lift, images[2], feats[2], iterations=2)
            made["bilinear_twice"] = F.interpolate(feats[2], scale_factor=4, mode="bilinear")

        cosines = []  # at every position, [B, h, w] each, in the order of totals
        for name in names:
            cosines.append(F.cosine_similarity(made[name], target))
            cosines.append(F.cosine_similarity(made[name] - centre, target - centre))
        per_photo = torch.stack(cosines).mean((2, 3)).cpu().double()  # [2 * names, B]

        # where a photo cannot be read, another stands in for it, which counts in its own place only
        was_read = batch["broken"] < 0  # [B]
        totals += per_photo[:, was_read].sum(1)
        photos += int(was_read.sum())
        for index in batch["broken"][~was_read].tolist():
            broken.add(str(loader.dataset.paths[index]))

    all_photos = 0
    all_totals = torch.zeros_like(totals)
    unreadable: set[str] = set()
    for process_photos, process_totals, process_broken in gather((photos, totals, broken)):
        all_photos += process_photos
        all_totals += process_totals
        unreadable |= process_broken

    means = (all_totals / max(all_photos, 1)).view(len(names), 2).tolist()
    results: dict[str, Any] = {"photos": all_photos}
    for name, (raw, centred) in zip(names, means):
        results[name] = round(raw, 5)
        results[f"{name}_centred"] = round(centred, 5)
    results["unreadable"] = sorted(unreadable)
    return results


def note_below_bilinear(results: dict[str, Any]) -> None:
    """Print a note if a module was measured below the interpolation that it is to replace."""
    if rank() == 0 and results["photos"] and results["lift"] < results["bilinear"]:
        print(
            f"note: LiFT ({results['lift']:.2f}) is below bilinear interpolation "
            f"({results['bilinear']:.2f}), so this module is not worth using. What usually helps: "
            "more steps (a smaller --batch_size, more --epochs), more photos, --attend 1"
        )


def gather(value: Any) -> list[Any]:
    """The values that all processes passed, in the order of their ranks.

    Every process must call it, and each gets all values. Without a torchrun there is one alone.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- one run ------------------------------------------------------------------------------------


class Run:
    """All that changes while training, and the folder it is written to.

    Attributes:
        lift, optimizer, schedule: what is trained, and what trains it.
        centre: the mean feature [C, 1, 1], or None before it is known.
        sample: an image at S/2 and its features, a batch of one; for `check_output`.
        step: optimizer steps done.
        losses: a number for each step of this epoch.
        metrics: a dict for each epoch done.
        broken: paths of photos that could not be read.
        settings: the flags and what they came to, for the output.
        record: what decides the weights; --resume compares it.

    Args:
        folder: where its files go.
        total_steps: optimizer steps of all epochs.
        photos: how many there are to train on.
    """

    def __init__(
        self, args, extractor: DenseExtractor, folder: Path, total_steps: int, photos: int
    ):
        self.args = args
        self.extractor = extractor
        self.folder = folder

        # the same weights at the start in every process, and after a stop before the first save
        torch.manual_seed(args.seed)
        lift = LiFT(
            extractor.width,
            extractor.patch,
            pre_shape=False,
            post_shape=False,
            residual=args.residual,
            attend=args.attend,
        )
        self.lift = lift.to(extractor.device)
        # synchronised batch norm is for GPUs only
        if dist.is_initialized() and extractor.device.type == "cuda":
            self.lift = nn.SyncBatchNorm.convert_sync_batchnorm(self.lift)

        # without weight decay this is the Adam of the paper
        self.optimizer = torch.optim.AdamW(
            self.lift.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
        factor = partial(lr_factor, total=total_steps, schedule=args.schedule, warmup=args.warmup)
        self.schedule = LambdaLR(self.optimizer, factor)

        self.centre: Tensor | None = None
        self.sample: tuple[Tensor, Tensor] | None = None
        self.step = 0
        self.losses: list[float] = []
        self.metrics: list[dict[str, Any]] = []
        self.broken: set[str] = set()

        facts = {**extractor.facts(), "channel": extractor.width, "patch": extractor.patch}
        self.settings = settings(
            args, **facts, device=str(extractor.device), processes=world_size()
        )
        self.record = record(
            args,
            leave_out=ONLY_HOW,
            paths=("dataroot", "val_dataroot"),
            **facts,
            cached=args.cache_features is not None,
            photos=photos,
            processes=world_size(),
        )

    def parts(self) -> dict[str, Any]:
        """Everything that has a state_dict of its own, by the name it has in last.pth."""
        return {"lift": self.lift, "optimizer": self.optimizer, "schedule": self.schedule}

    def collect(self, losses: list[Tensor], broken: set[str], signal_here: int) -> int:
        """Gather what all processes have seen since the last call, check it, and keep it.

        Args:
            losses: of this process, a scalar for each step since then, at least one.
            broken: paths of photos that this process could not read.
            signal_here: the signal that this process has got, or 0.
        Returns:
            The signal that any process has got (the largest number of several), or 0.
        Raises:
            ValueError: a loss or a weight is not finite.
        """
        # a weight may be spoilt by the last step, whose own loss was finite
        weights = self.lift.state_dict().values()
        finite = bool(torch.stack([value.isfinite().all() for value in weights]).all())

        all_losses = []  # [processes, steps]
        all_broken = set()
        all_finite = True
        signal_of_any = 0
        mine = (torch.stack(losses).tolist(), broken, signal_here, finite)
        for process_losses, process_broken, process_signal, process_finite in gather(mine):
            all_losses.append(process_losses)
            all_broken |= process_broken
            signal_of_any = max(signal_of_any, process_signal)
            all_finite = all_finite and process_finite

        # the loss of a step is the mean of what the processes had
        means = np.mean(all_losses, axis=0).tolist()
        first_step = self.step - len(means) + 1  # self.step is that of the last loss
        for step, loss in enumerate(means, first_step):
            if not math.isfinite(loss):
                raise self.diverged(f"the loss is {loss} at step {step}")
        if not all_finite:
            raise self.diverged(f"the weights are not finite after step {self.step}")

        self.losses += means
        self.broken |= all_broken
        return signal_of_any

    def diverged(self, what: str) -> ValueError:
        """The error to raise where numbers are not finite; `what` says which."""
        kept = f"{self.folder} keeps what was saved before"
        return ValueError(f"{what} ({kept}): pass a smaller --lr and another --output_dir")

    @torch.no_grad()
    def check_output(self) -> None:
        """Raise ValueError unless the module still gives finite features.

        The last step of an epoch may have spoilt the weights, and no later loss would show it.
        """
        image, feats = self.sample
        out = upsample(self.lift.eval(), image, feats)
        self.lift.train()
        if not out.isfinite().all():
            raise self.diverged(f"the features are not finite after step {self.step}")

    def end_epoch(self, speed: float, val_loader: DataLoader, precision: Callable) -> None:
        """Measure the module on the held-out photos and add a line to metrics.jsonl.

        Args:
            speed: photos a second.
        """
        # Each process has statistics of its own photos in its batch norms. What is measured must be
        # what is exported: the module of the first one.
        if dist.is_initialized():
            for buffer in self.lift.buffers():
                dist.broadcast(buffer, 0)
        self.check_output()
        results: dict[str, Any] = {
            "epoch": len(self.metrics) + 1,
            "step": self.step,
            "loss": float(np.mean(self.losses)),
            "photos_per_s": speed,
        }
        if val_loader.dataset.paths:
            lift = self.lift.eval()
            val = evaluate(self.extractor, lift, val_loader, self.centre, precision)
            self.lift.train()
            # the sum of the two is finite only if both are
            if not math.isfinite(val["lift"] + val["lift_twice"]):
                raise self.diverged(f"the features are not finite after step {self.step}")
            results["val"] = val
        self.losses = []
        self.metrics.append(results)
        if rank() == 0:
            # the whole file anew: after --resume it may hold lines of steps that are trained again
            lines = [json.dumps(line, allow_nan=False) + "\n" for line in self.metrics]
            write_text(self.folder / "metrics.jsonl", "".join(lines))

    def export(self, name: str) -> None:
        """Write the module as a bare state_dict, and what it is for beside it as lift.json."""
        if rank() > 0:
            return
        # on the CPU, so that the file can be read where there is no GPU
        state = {}
        for key, value in self.lift.state_dict().items():
            state[key] = value.cpu().contiguous()
        save_tensors(self.folder / name, state)

        extractor = self.extractor
        origin = {
            "backbone": extractor.tag,
            "digest": extractor.digest,
            "model_type": extractor.name,
            "layer": extractor.layer,
            "facet": extractor.facet,
            "patch": extractor.patch,
            "width": extractor.width,
            "mean": extractor.mean,
            "std": extractor.std,
            "residual": self.args.residual,
            "attend": self.args.attend,
            "downsample": self.args.downsample,
            "imsize": self.args.imsize,
            "data": self.args.dataroot,
            "metrics": self.metrics[-1],
            "settings": self.settings,
        }
        text = json.dumps(origin, indent=1, allow_nan=False)
        write_text(self.folder / "lift.json", text + "\n")

    def save(self) -> None:
        """Write last.pth, all that --resume needs.

        The position in the stream of photos is not in it, because it follows from the step.
        """
        if rank() > 0:
            return
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["record"] = self.record
        state["centre"] = self.centre
        state["step"] = self.step
        state["losses"] = self.losses
        state["metrics"] = self.metrics
        state["broken"] = sorted(self.broken)
        state["rng"] = torch.get_rng_state()
        save_tensors(self.folder / "last.pth", state)

    def resume(self) -> None:
        """Go on from last.pth, if there is one already.

        Raises:
            ValueError: it is damaged, or one of a run with other settings.
        """
        path = self.folder / "last.pth"
        if not path.is_file():
            return
        remedy = "remove it, and start again"
        last = load_tensors(path, remedy, remedy)
        try:
            # a flag of earlier versions, which did nothing at its default
            if not last["record"].get("ema"):
                last["record"].pop("ema", None)
            changed = difference(last["record"], self.record)
            if not changed:
                self.restore(last)
                return
        except Exception as error:  # damaged files raise nearly anything
            raise ValueError(f"{path} is damaged ({first_line(error)}): {remedy}") from error

        # the file is sound, but of another run
        remedy = "pass the same"
        if changed.startswith("processes"):
            remedy = f"start it by torchrun --nproc_per_node {last['record']['processes']}"
        raise ValueError(f"{path} was made with {changed}: {remedy}, or another --output_dir")

    def restore(self, last: dict[str, Any]) -> None:
        """Take over what `save` wrote."""
        for name, part in self.parts().items():
            part.load_state_dict(last[name])
        if last["centre"] is not None:
            self.centre = last["centre"].to(self.extractor.device)
        self.step = int(last["step"])
        self.losses = list(last["losses"])
        self.metrics = list(last["metrics"])
        self.broken = set(last["broken"])
        torch.set_rng_state(last["rng"])


def lr_factor(step: int, total: int, schedule: str, warmup: int) -> float:
    """The factor of --lr after `step` optimizer steps: the product of a warmup and a decay.

    The warmup grows linearly to 1 over `warmup` steps. The decay is 1 with the schedule constant.
    With cosine it falls as half a cosine from 1 at step 0 to 0 at step `total`.
    """
    decay = 1.0
    if schedule == "cosine":
        progress = min(step / total, 1)
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    growth = min(1.0, (step + 1) / (warmup + 1))
    return decay * growth


# ---- the folder of a run ------------------------------------------------------------------------


def run_folder(args, extractor: DenseExtractor) -> Path:
    """OUTPUT_DIR/{model_type}_{lr}_{loss}_{aug|noaug}_{imsize}, and more.

    Other flags that decide what module it becomes follow where they are not the default.
    """
    name = (args.my_extractor or args.model_type).replace("/", "_").replace(":", "_")
    augment = "aug" if args.augment else "noaug"
    parts = [name, str(args.lr), args.loss, augment, str(args.imsize)]

    if isinstance(extractor, ViTExtractor):
        if extractor.layer != extractor.depth - 1:
            parts.append(f"layer{extractor.layer}")
        if extractor.facet != "key":
            parts.append(extractor.facet)
    if args.residual:
        parts.append("residual")
    if args.attend:
        parts.append(f"attend{args.attend}")
    if args.match:
        parts.append(f"match{args.match}")
    if args.downsample == "resize":
        parts.append("resize")
    return Path(args.output_dir) / "_".join(parts)


def try_to_write(folder: str) -> None:
    """Make the folder and a file in it: better that this fails now than after an epoch.

    Raises:
        OSError: in one line that ends in the remedy.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "pass another --output_dir"
        raise OSError(f"cannot write into {folder} ({first_line(error)}): {remedy}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other trainings out of the folder.

    The lock is the system's, on the folder itself: it leaves no file, and ends with the process.

    Raises:
        ValueError: another training has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: there is no such lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        what = f"another training is writing into {folder}"
        raise ValueError(f"{what}: wait for it, or pass another --output_dir") from error
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(handle)


# ---- training -----------------------------------------------------------------------------------


def start_processes(args) -> None:
    """Join the other processes of a torchrun, if it is one."""
    if world_size() == 1:
        return
    check_torchrun()
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


class Stop:
    """A context in which SIGINT and SIGTERM do not end the process at once.

    The first one is kept in `signal`, for the training loop to look at after the step. A second one
    acts at once, unless it comes within a second of the first: Ctrl-C in a terminal reaches all
    processes, and torchrun then sends them the same signal again.
    """

    def __enter__(self) -> "Stop":
        self.signal = 0
        self.caught_at = 0.0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number: int, frame) -> None:
        """The handler of both signals."""
        if not self.signal:
            self.signal = number
            self.caught_at = time.monotonic()
        elif time.monotonic() - self.caught_at > 1:
            # put the handlers of before back, and let them have it
            self.__exit__()
            os.kill(os.getpid(), number)


def train_step(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    count: int,
    extractor: DenseExtractor,
    optimizer: torch.optim.Optimizer,
    precision: Callable = nullcontext,
) -> tuple[Tensor, list[int]]:
    """One optimizer step on the mean loss of several batches.

    Args:
        model: an Objective, or its DistributedDataParallel.
        batches: of Photos or Cached; there are `count`.
        precision: makes the context that the model runs in.
    Returns:
        The loss, a scalar tensor, and the indices of photos that could not be read.
    """
    total = 0
    broken = []
    for number, batch in enumerate(batches, 1):
        images, feats = images_and_features(batch, extractor)
        warp = None
        if "warp" in batch:
            warp = batch["warp"].to(extractor.device)
        # processes exchange their gradients at the last batch only
        exchange_or_not: Any = nullcontext()
        if dist.is_initialized() and number < count:
            exchange_or_not = model.no_sync()
        with exchange_or_not:
            with precision():
                loss = model(images[1:], feats, warp) / count  # LiFT needs no image at S
            loss.backward()
        total += loss.detach()
        broken += [index for index in batch["broken"].tolist() if index >= 0]
    optimizer.step()
    optimizer.zero_grad()
    return total, broken


def train(
    run: Run,
    model: nn.Module,
    loader: DataLoader,
    val_loader: DataLoader,
    precision: Callable,
    batches: int,
) -> None:
    """Train until all epochs are complete, or until a signal says stop.

    On a GPU losses are read every 10 steps only, so that it need not wait for them.

    Args:
        batches: of an epoch, in each process.
    Raises:
        ValueError: losses, weights or features are not finite.
        SystemExit: after a signal; last.pth is saved.
    """
    args = run.args
    paths = loader.dataset.paths
    steps = math.ceil(batches / args.accumulate)  # of an epoch
    photos_a_step = len(paths) / steps  # of all processes together
    read_every = 1 if run.extractor.device.type == "cpu" else 10
    tensorboard = open_tensorboard(args, run.folder)

    # of the steps since the last run.collect
    losses: list[Tensor] = []
    broken: set[str] = set()
    bar = tqdm(
        total=args.epochs * len(paths),
        initial=run.step * photos_a_step,
        unit="photo",
        unit_scale=True,
        disable=rank() > 0 or None,  # None: tqdm shows it in a terminal only
    )
    with bar, Stop() as stop:
        # workers begin here, after the handlers are set, and inherit them until they set their own
        coming = iter(loader)
        began = time.time()
        began_at = run.step
        while run.step < args.epochs * steps:
            # the last step of an epoch takes the batches that are left
            steps_done = run.step % steps  # of this epoch
            batches_left = batches - steps_done * args.accumulate
            count = min(args.accumulate, batches_left)
            group = itertools.islice(coming, count)
            loss, unreadable = train_step(
                model, group, count, run.extractor, run.optimizer, precision
            )
            run.schedule.step()
            run.step += 1
            losses.append(loss)
            broken.update(str(paths[index]) for index in unreadable)
            bar.update(photos_a_step)

            epoch_ends = run.step % steps == 0
            save_is_due = args.save_steps > 0 and run.step % args.save_steps == 0
            # what follows waits for the GPU, and for the other processes
            if not epoch_ends and not save_is_due and len(losses) < read_every:
                continue
            stopped_by = run.collect(losses, broken, stop.signal)
            losses = []
            broken = set()
            bar.set_postfix(epoch=math.ceil(run.step / steps), loss=f"{run.losses[-1]:.4f}")

            if epoch_ends:
                speed = (run.step - began_at) * photos_a_step / (time.time() - began)
                run.end_epoch(round(speed, 2), val_loader, precision)
                tell(run.metrics[-1], tensorboard)
                epoch = len(run.metrics)
                if epoch % args.save_every == 0:
                    run.export(f"lift_{epoch}.pth")
                began = time.time()
                began_at = run.step
            # after the above, so that an epoch in last.pth has been measured and exported
            if epoch_ends or save_is_due or stopped_by:
                run.save()
            if stopped_by:
                if rank() == 0:
                    name = signal.Signals(stopped_by).name
                    remedy = "pass --resume to go on"
                    print(f"stopped by {name} after step {run.step}: {remedy}", file=sys.stderr)
                raise SystemExit(128 + stopped_by)


def open_tensorboard(args, folder: Path):
    """TensorBoard's writer with --tensorboard, in the first process; None in all other cases.

    Raises:
        ValueError: it is not installed.
    """
    if not args.tensorboard or rank() > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        what = "--tensorboard needs a package that is not installed"
        raise ValueError(f"{what}: pip install tensorboard") from error
    return SummaryWriter(folder)


def tell(results: dict[str, Any], tensorboard) -> None:
    """Print an epoch's results as a line, and show them in TensorBoard where there is one."""
    if rank() > 0:
        return
    # in one dict, of which "val" itself and its list "unreadable" are left out: they are no numbers
    everything = dict(results)
    everything.update(results.get("val", {}))
    numbers = {}
    for name, value in everything.items():
        if isinstance(value, int | float):
            numbers[name] = value
    tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in numbers.items()))
    if tensorboard:
        for name, value in numbers.items():
            tensorboard.add_scalar(name, value, results["step"])
        tensorboard.flush()  # nothing else writes the last events


def prepare(
    lift: nn.Module, args, extractor: DenseExtractor, centre: Tensor | None = None
) -> tuple[nn.Module, Callable]:
    """Make the model to train of a LiFT module, compiled and distributed as the flags ask.

    Returns:
        An Objective (or its DistributedDataParallel), and a function that makes the context to call
        it in: autocast to bfloat16, or none.
    """
    torch.backends.cudnn.benchmark = True  # sizes stay the same
    lift = lift.to(memory_format=torch.channels_last)
    model: nn.Module = Objective(lift, args.loss, centre, args.match)
    if args.compile:
        model.compile()
        if isinstance(extractor, ViTExtractor):
            for block in extractor.model.blocks:  # they share their code: one compilation for all
                block.compile()
        else:
            extractor.module.compile()
    if dist.is_initialized():
        model = DistributedDataParallel(model)

    # bfloat16 for float16 too: it has the range of float32, and needs no scaling of losses
    precision: Callable = nullcontext
    if extractor.dtype != torch.float32:
        precision = partial(torch.autocast, extractor.device.type, torch.bfloat16)
    return model, precision


# ---- the command --------------------------------------------------------------------------------


def check(args) -> None:
    """Raise ValueError or FileNotFoundError for flags that make no run, before anything is read."""
    if args.loss not in LOSSES:
        raise ValueError(f"unknown --loss {args.loss}: pass one of {', '.join(LOSSES)}")
    needed = args.val_dataroot if args.evaluate else args.dataroot
    if not needed:
        raise ValueError(
            "nothing to do: pass --dataroot FOLDER to train, or --evaluate FILE --val_dataroot "
            "FOLDER to measure"
        )
    if args.evaluate and not Path(args.evaluate).is_file():
        remedy = "train one with --dataroot or correct --evaluate"
        raise FileNotFoundError(f"no LiFT checkpoint at {args.evaluate}: {remedy}")
    check_range(
        args, epochs=1, batch_size=1, imsize=1, save_every=1, accumulate=1, views=1, seed=0,
        warmup=0, save_steps=0, workers=0, weight_decay=0, attend=0, match=0, val_fraction=0,
    )  # fmt: skip
    if args.val_fraction >= 1:
        what = f"--val_fraction {args.val_fraction} leaves no photo to train on"
        raise ValueError(f"{what}: pass less than 1")
    if not 0 <= args.lr <= LARGEST_LR:
        raise ValueError(f"--lr {args.lr} is no learning rate: pass a smaller one, e.g. 0.001")


def check_sizes(extractor: DenseExtractor, imsize: int, levels: int) -> None:
    """Raise ValueError unless the backbone gives LiFT's grids at S, S/2 and, for 3 levels, S/4."""
    patch = extractor.patch
    patches = 2 ** (levels - 1)  # at S, for each patch at the smallest size
    unit = patches * patch
    if imsize % unit:
        near = max(unit, imsize // unit * unit)
        what = f"--imsize {imsize} is no multiple of {patches} patches of {patch}"
        raise ValueError(f"{what}: pass --imsize {near}")
    if extractor.step != patch:
        raise ValueError(f"LiFT is trained on the patch grid: leave out --stride {extractor.step}")

    for level in range(levels):
        size = imsize // 2**level
        try:
            found = tuple(extractor(torch.zeros(1, 3, size, size)).shape[1:])
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            what = f"{extractor.name} does not take {size} pixels ({first_line(error)})"
            raise ValueError(f"{what}: pass a backbone that does") from error
        wanted = (extractor.width, size // patch, size // patch)
        if found != wanted:
            what = f"{extractor.name} gives maps of {found} at {size} pixels, not {wanted}"
            raise ValueError(f"{what}: pass another backbone or facet")


def note_what_is_too_little(args, photos: int, held_out: int, steps: int) -> None:
    """Print a note on whatever is too little to learn from, or to be measured on.

    Args:
        photos: how many there are to train on.
        held_out: how many there are to validate on.
        steps: of the optimizer, in all epochs.
    """
    if rank() > 0:
        return
    remedy = "pass --val_dataroot FOLDER, or a larger --val_fraction"
    if held_out == 0:
        what = f"note: none of the {photos} photos is held out"
        print(f"{what}, so nothing will say whether the module is any good: {remedy}")
    elif held_out < FEW_PHOTOS:
        print(f"note: validated on {held_out} photos only, which says little: {remedy}")
    if steps < FEW_STEPS:
        what = f"note: {steps} optimizer steps in all teach a module little"
        print(f"{what}: pass a smaller --batch_size or more --epochs, or add photos")


def evaluate_files(args) -> None:
    """--evaluate: measure a module on each --val_dataroot.

    The centre is the mean feature of --dataroot, where it is given, else of the photos measured.
    """
    measured = {}
    for root in args.val_dataroot:
        measured[root] = Photos(list_images(root), args.imsize, args.downsample)
    trained_on = None
    if args.dataroot:
        trained_on = Photos(list_images(args.dataroot), args.imsize, args.downsample)

    extractor = build_extractor(args)
    levels = 3
    if args.imsize % (4 * extractor.patch):
        levels = 2  # S/4 is no whole number of patches, and nothing is made from it
    check_sizes(extractor, args.imsize, levels)
    lift = load_lift(args.evaluate, extractor)

    results = {}
    for root, photos in measured.items():
        centred_on = photos
        if trained_on is not None:
            centred_on = trained_on
        centre = mean_feature(centred_on, extractor, rank(), world_size())
        key_batches = in_order(photos, args.batch_size, rank(), world_size())
        loader = make_loader(photos, key_batches, args, extractor)
        results[root] = evaluate(extractor, lift, loader, centre, levels=levels)
        if rank() == 0:
            figures = "  ".join(f"{name} {value}" for name, value in results[root].items())
            print(f"{root}  {figures}")
        note_below_bilinear(results[root])

    if rank() == 0:
        facts = {**extractor.facts(), "channel": extractor.width, "patch": extractor.patch}
        known = settings(args, **facts, device=str(extractor.device), processes=world_size())
        report({"settings": known, "results": results}, args.json)


def main(args) -> None:
    """Train, or with --evaluate measure, one LiFT module."""
    check(args)
    start_processes(args)
    if args.evaluate:
        evaluate_files(args)
        return

    train_paths, val_paths = split(args)
    warp = args.match > 0
    photos = Photos(train_paths, args.imsize, args.downsample, args.augment, args.seed, warp)
    val_photos = Photos(val_paths, args.imsize, args.downsample)
    photos[0, 0]  # raises where no photo can be read
    try_to_write(args.output_dir)

    extractor = build_extractor(args)
    check_sizes(extractor, args.imsize, levels=3)
    folder = run_folder(args, extractor)
    lock = nullcontext()
    if rank() == 0:
        lock = locked(folder)
    with lock:
        if not args.resume and any(folder.glob("*.pth")):
            raise ValueError(f"{folder} holds a run: pass --resume, or another --output_dir")
        train_into(folder, args, extractor, photos, val_photos)


def train_into(
    folder: Path, args, extractor: DenseExtractor, photos: Photos, val_photos: Photos
) -> None:
    """Train a module, and write everything about it into the folder."""
    # all of one epoch
    world = world_size()
    share = math.ceil(len(photos) / world)  # photos of each process, see stream
    batches = math.ceil(share / args.batch_size)  # of each process
    steps = math.ceil(batches / args.accumulate)

    # LiFT's deepest batch norm needs more than one value. It gets one alone where S/4 is a single
    # patch and the last batch of an epoch a single photo.
    one_patch = args.imsize == 4 * extractor.patch
    one_photo = share % args.batch_size == 1 or args.batch_size == 1
    if one_patch and one_photo:
        raise ValueError(
            "a batch of one photo of 4 patches is too little for batch norm: pass a larger "
            "--imsize or --batch_size"
        )

    run = Run(args, extractor, folder, args.epochs * steps, len(photos))
    if args.resume:
        run.resume()
    if run.step > args.epochs * steps:
        # lift.json would name fewer epochs than the module was trained for
        enough = math.ceil(run.step / steps)
        what = f"{folder} holds {run.step} steps, more than the {args.epochs * steps} of --epochs"
        raise ValueError(f"{what} {args.epochs}: pass --epochs {enough} or more")
    note_what_is_too_little(args, len(photos), len(val_photos), args.epochs * steps)

    if args.cache_features:
        cache = partial(
            cached,
            extractor=extractor,
            folder=args.cache_features,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        views = 1
        if photos.is_random():
            views = args.views
        photos = cache(photos, views=views)
        val_photos = cache(val_photos, views=1)

    # validation measures centred cosines too, whatever the loss
    centred_loss = args.loss in ("centred", "both") or args.match > 0
    centre_needed = centred_loss or len(val_photos) > 0
    if run.centre is None and centre_needed:
        run.centre = mean_feature(photos, extractor, rank(), world)
    # one photo at S/2, for run.check_output
    images, feats = images_and_features(default_collate([photos[0, 0]]), extractor, levels=2)
    for features in feats:
        check_finite(features, extractor)
    run.sample = (images[1], feats[1])

    # How many batches have been seen before a stop. Whole epochs are counted by their batches,
    # because the last step of an epoch may have taken fewer than the others.
    epochs_done = run.step // steps
    steps_since = run.step % steps
    skip = epochs_done * batches + steps_since * args.accumulate
    key_batches = stream(len(photos), args.batch_size, args.epochs, rank(), world, args.seed, skip)
    val_key_batches = in_order(val_photos, args.batch_size, rank(), world)
    loader = make_loader(photos, key_batches, args, extractor)
    val_loader = make_loader(val_photos, val_key_batches, args, extractor)

    model, precision = prepare(run.lift, args, extractor, run.centre)
    train(run, model, loader, val_loader, precision, batches)
    run.export("lift.pth")

    results = run.metrics[-1]
    unreadable = set(run.broken)
    if "val" in results:
        unreadable.update(results["val"]["unreadable"])
        note_below_bilinear(results["val"])
    if rank() == 0:
        if unreadable:
            names = ", ".join(sorted(unreadable))
            print(f"{len(unreadable)} photos could not be read: {names}")
        report(
            {
                "settings": run.settings,
                "folder": str(folder),
                "metrics": results,
                "unreadable": sorted(unreadable),
            },
            args.json,
        )


if __name__ == "__main__":
    parser().run(main)
