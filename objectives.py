"""What training minimises, and on what: photos at three sizes, warped copies, losses, scores.

    photos = Photos(paths, imsize=448, downsample="resize", augment=True)
    objective = Objective(lift, "both", centre)
    loss = objective(images, feats)

Only train_lift.py uses it. The losses are those of the LiFT paper, section 3.2, and two of ours:
cosines of centred features, and the matching of points between a photo and a warped copy of it.

Notation: B batch, C channels, h w the patch grid, S pixels of the square photos, P points.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize

from extractor import DenseExtractor
from feature_cache import images_and_features
from features import check_finite
from lift import double
from loading import Loader
from photos import read_image, spread

Key = tuple[int, int]  # (epoch, index): a photo, and the seed of its jitter

MOST_BROKEN = 100  # unreadable photos in a row; more, and the drive is gone
CENTRE_PHOTOS = 64  # that the mean feature is estimated on

# How a copy differs from its photo: see random_warp
WARP_DEGREES = 25
WARP_SCALES = (0.7, 1.5)
WARP_SHIFT = 1 / 8
MATCH_POINTS = 256  # points of a photo, each looked for among as many cells of its copy
# Cosines are divided by these before the softmax. Centred ones differ more from each other.
MATCH_TEMPERATURE = 0.05
MATCH_TEMPERATURE_CENTRED = 0.1

# ---- photos -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Photos(Dataset):
    """Photos as squares of three sizes, uint8.

    photos[epoch, index] is a dict of "full" [3, S, S], "half" [3, S/2, S/2], "quarter" [3, S/4,
    S/4] and "broken". A photo that cannot be read is replaced by the next one that can, and
    "broken" is then its index. Otherwise "broken" is -1. With `augment` the colours are jittered.

    With `warp` a photo comes with a warped copy of it: "full" is then [2, 3, S, S], and so on, and
    "warp" [2, 3] takes places in the copy to those in the photo (see random_warp).

    All that is random follows from (seed, epoch, index). The object holds paths and numbers only,
    so that it is cheap to send to workers.
    """

    paths: list[Path]
    imsize: int
    downsample: str = "stride"
    augment: bool = False
    seed: int = 0
    warp: bool = False

    def __post_init__(self) -> None:
        self.jitter = ColorJitter(0.2, 0.2, 0.2, 0.2) if self.augment else None

    def __len__(self) -> int:
        return len(self.paths)

    def is_random(self) -> bool:
        """Whether a photo looks different in each epoch, and with another seed."""
        return self.jitter is not None or self.warp

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, broken = self.read(index)
        image = resize(image, [self.imsize, self.imsize], InterpolationMode.BILINEAR)
        # jitter and warp draw from torch's global generator, which is put back afterwards
        with torch.random.fork_rng(devices=[]):
            seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
            torch.manual_seed(int(seed))
            item: dict[str, Any] = self.pyramid(self.recolour(image))
            if self.warp:
                warp = random_warp()
                copy = self.pyramid(warped(self.recolour(image), warp))
                for level in copy:
                    item[level] = torch.stack([item[level], copy[level]])
                item["warp"] = warp
        item["broken"] = broken
        return item

    def read(self, index: int) -> tuple[Any, int]:
        """The photo of this index and -1, or the next one that can be read and the index.

        Raises:
            ValueError: MOST_BROKEN photos in a row cannot be read, or all of fewer.
        """
        most = min(len(self), MOST_BROKEN)
        for candidate in range(index, index + most):
            with suppress(ValueError, OSError):
                image = read_image(self.paths[candidate % len(self)])  # the first follows the last
                broken = -1 if candidate == index else index
                return image, broken
        what = f"none of the {most} photos from {self.paths[index]} on can be read"
        raise ValueError(f"{what}: check that they are still there, or pass another --dataroot")

    def recolour(self, image) -> Tensor:
        """A PIL image as uint8 [3, S, S], its colours jittered with `augment`."""
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
    shows the photo turned by up to WARP_DEGREES either way, scaled by a factor within WARP_SCALES
    (its logarithm is uniform), and shifted by up to WARP_SHIFT of the side along each axis.
    """
    for_angle, for_scale, for_x, for_y = torch.rand(4).tolist()  # uniform in 0..1
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
    """The copy [3, S, S] of an image, both uint8; what lies outside the image is its reflection."""
    places = F.affine_grid(warp[None], [1, *image.shape], align_corners=False)  # [1, S, S, 2]
    copy = F.grid_sample(
        image[None].float(), places, padding_mode="reflection", align_corners=False
    )
    return copy[0].round().to(torch.uint8)


# ---- the order of photos ------------------------------------------------------------------------


def steps_of_an_epoch(photos: int, batch_size: int, world: int) -> int:
    """How many batches each of `world` processes gets in an epoch."""
    return math.ceil(math.ceil(photos / world) / batch_size)


def stream(
    n: int, batch_size: int, epochs: int, rank: int, world: int, seed: int, skip: int
) -> Iterator[list[Key]]:
    """Yield this process's batches of keys, epoch after epoch, each shuffled anew.

    Args:
        n: the number of photos. Where they cannot be dealt out evenly, some come twice in an epoch,
            so that every process has the same number of batches.
        epochs: those before a stop included.
        rank: the number of this process, of `world`.
        skip: how many batches to leave out at the start, as they were seen before a stop.
    """
    # shuffles by default, by seed and epoch
    sampler = DistributedSampler(range(n), world, rank, seed=seed)
    steps = steps_of_an_epoch(n, batch_size, world)
    for epoch in range(skip // steps, epochs):
        sampler.set_epoch(epoch)
        keys = [(epoch, index) for index in sampler]
        for step in range(steps):
            if epoch * steps + step >= skip:
                yield keys[step * batch_size : (step + 1) * batch_size]


def in_order(photos: Dataset, batch_size: int, rank: int = 0, world: int = 1) -> list[list[Key]]:
    """This process's batches of keys, each photo once, in the order of the data set."""
    keys = [(0, index) for index in range(rank, len(photos), world)]
    return [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]


# ---- losses -------------------------------------------------------------------------------------


def cosine_distance(out: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions of 1 - cos, of maps [B, C, h, w]."""
    return 1 - F.cosine_similarity(out, target, dim=1).mean()


def loss_between(loss: str, out: Tensor, target: Tensor, centre: Tensor | None) -> Tensor:
    """One of train_lift.LOSSES between two maps [B, C, h, w].

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


class Matching(nn.Module):
    """How badly points of photos are found again in their warped copies, by their features alone.

    P cells of each copy are chosen by match_cells. The warp says which point of the photo each of
    them shows. That point is looked for among the P cells: the loss is the cross-entropy of its own
    cell, from cosines. This is InfoNCE (van den Oord et al., arXiv 1807.03748) within one image.

    Args:
        grid: (h, w) of the features.
    """

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        height, width = grid
        cells = match_cells(height * width)                             # [P]
        # where their centres lie in a copy, from -1 to 1
        x = (2 * (cells % width) + 1) / width - 1
        y = (2 * (cells // width) + 1) / height - 1
        centres = torch.stack([x, y, torch.ones_like(x)])               # [3, P]
        # A place beyond the centre of the outermost cell counts as that centre: what
        # padding_mode="border" does, which Apple's GPUs lack.
        outermost = torch.tensor([1 - 1 / width, 1 - 1 / height])
        # as buffers they go to the device once, and no step waits for them
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("outermost", outermost, persistent=False)

    def places(self, warp: Tensor) -> Tensor:
        """Where the cells' centres lie in the photos, from -1 to 1: [B, P, 2]."""
        # not as a matrix product, which autocast would round to a tenth of a cell
        places = (warp[:, :, :, None] * self.centres).sum(dim=2)        # [B, 2, P]
        return places.transpose(1, 2)

    def inside(self, warp: Tensor) -> Tensor:
        """Which cells show a place inside their photo, and not its reflection: [B, P]."""
        return (self.places(warp).abs() <= 1).all(dim=2)

    def forward(self, pairs: Tensor, warp: Tensor, temperature: float) -> Tensor:
        """The sum of the losses of all points inside their photos, a scalar.

        Args:
            pairs: features [2B, C, h, w] of a photo, its copy, the next photo, and so on.
            warp: [B, 2, 3], see random_warp.
            temperature: what cosines are divided by.
        """
        photos, copies = pairs.unflatten(0, (-1, 2)).unbind(1)          # [B, C, h, w] each
        in_copy = copies.flatten(2)[:, :, self.cells]                   # [B, C, P]

        inside = self.inside(warp)                                      # [B, P]
        places = self.places(warp).clamp(-self.outermost, self.outermost)
        in_photo = F.grid_sample(photos, places[:, None], align_corners=False)
        in_photo = in_photo.squeeze(2)                                  # [B, C, P]

        points = F.normalize(in_photo, dim=1).transpose(1, 2)           # [B, P, C]
        cosines = points @ F.normalize(in_copy, dim=1)                  # [B, point, cell]
        logits = cosines.float() / temperature
        logits = logits.masked_fill(~inside[:, None, :], -1e4)          # no candidates

        # point i belongs in cell i, so that its loss is that of the diagonal
        losses = logits.logsumexp(dim=2) - logits.diagonal(dim1=1, dim2=2)  # [B, P]
        # a product instead of losses[inside], whose shape a GPU would have to tell first
        return (losses * inside).sum()


def match_cells(count: int) -> Tensor:
    """MATCH_POINTS of the `count` cells of a grid, or all if they are fewer.

    They are random and always the same. LiFT treats all cells alike, and a warp takes them to other
    places in each photo, so drawing them anew at each step would teach it nothing more.
    """
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return shuffled[:MATCH_POINTS]


class Objective(nn.Module):
    """The loss of LiFT over all scales, as a module (LiFT paper, section 3.2).

    Args:
        loss: see loss_between.
        centre: the mean feature [C, 1, 1], for the losses and the matching that need it.
        grid: (h, w) of the features at S, where photos come with warped copies (see Matching).
        match_centred: the share of matching that is on centred features; the rest is on raw ones.
    """

    def __init__(
        self,
        lift: nn.Module,
        loss: str,
        centre: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        match_centred: float = 0.0,
    ):
        super().__init__()
        self.lift = lift
        self.loss = loss
        self.match_centred = match_centred
        self.register_buffer("centre", centre, persistent=False)
        self.matching = None if grid is None else Matching(grid)

    def forward(
        self,
        images: list[Tensor],
        feats: list[Tensor],
        warp: Tensor | None = None,
        point_weight: Tensor | None = None,
    ) -> Tensor:
        """The sum of the losses at S and at S/2, a scalar.

        Args:
            images: normalised, at S/2 and S/4.
            feats: the backbone's, at S, S/2 and S/4.
            warp: [B, 2, 3], where images and features are pairs, see Matching. Points are matched
                on what is made from the features at S/2.
            point_weight: the weight of a point's loss, a scalar.
        """
        total = 0.0
        for level, image in enumerate(images):
            finer = feats[level]                           # [B, C, 2h, 2w]
            coarser = feats[level + 1]                     # [B, C, h, w]
            out = self.lift(image, coarser).float()        # [B, C, 2h, 2w]
            total = total + loss_between(self.loss, out, finer, self.centre)
            if self.matching is not None and level == 0:
                total = total + point_weight * self.matched(out, warp)
        return total

    def matched(self, pairs: Tensor, warp: Tensor) -> Tensor:
        """Matching of features as they are and of centred ones, a scalar.

        Centred ones find more points at the same cost in cosine, at some cost in centred cosine.
        Alone they make videos worse.
        """
        raw = self.matching(pairs, warp, MATCH_TEMPERATURE)
        centred = self.matching(pairs - self.centre, warp, MATCH_TEMPERATURE_CENTRED)
        return (1 - self.match_centred) * raw + self.match_centred * centred


# ---- a step -------------------------------------------------------------------------------------


def prepare(
    lift: nn.Module,
    extractor: DenseExtractor,
    loss: str,
    centre: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    match_centred: float = 0.0,
    compiled: bool = False,
) -> tuple[nn.Module, Callable]:
    """Wrap a LiFT module in its Objective, for training.

    Args:
        loss, centre, grid, match_centred: see Objective.
        compiled: compile it, and the backbone.
    Returns:
        The Objective, in a DistributedDataParallel among several processes, and a function that
        makes the context to call it in: autocast to bfloat16, or none.
    """
    torch.backends.cudnn.benchmark = True  # sizes stay the same
    lift = lift.to(memory_format=torch.channels_last)
    model: nn.Module = Objective(lift, loss, centre, grid, match_centred).to(extractor.device)
    if compiled:
        model.compile()
        # a ViT's blocks share their code: one compilation for all
        for part in getattr(extractor.model, "blocks", [extractor.model]):
            part.compile()
    if dist.is_initialized():
        model = DistributedDataParallel(model)

    # bfloat16 for float16 too: it has the range of float32, and needs no scaling of losses
    precision: Callable = nullcontext
    if extractor.dtype != torch.float32:
        precision = partial(torch.autocast, extractor.device.type, torch.bfloat16)
    return model, precision


def lr_factor(step: int, total: int, schedule: str, warmup: int) -> float:
    """The factor of --lr after `step` steps.

    It grows linearly to 1 over `warmup` steps. With the schedule "cosine" it is also multiplied by
    half a cosine, from 1 at step 0 to 0 at step `total`.
    """
    decay = 1.0
    if schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    growth = min(1.0, (step + 1) / (warmup + 1))
    return decay * growth


def match_share(step: int, total: int, end: float) -> float:
    """The share of --match that counts at `step`: 1 for half of the steps, then linear to `end`."""
    left = min(1.0, 2 - 2 * step / total)  # 1, and then linear to 0
    return end + (1 - end) * left


def train_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    extractor: DenseExtractor,
    optimizer: torch.optim.Optimizer,
    precision: Callable = nullcontext,
    match: float = 0.0,
) -> tuple[Tensor, list[int]]:
    """One step of the optimizer, which waits for no GPU.

    Args:
        model: an Objective, or its DistributedDataParallel.
        batch: from Photos or Cached.
        precision: makes the context that the model runs in.
        match: the weight of matching, where photos come with warped copies.
    Returns:
        The loss, a scalar tensor, and the indices of photos that could not be read.
    """
    images, feats = images_and_features(batch, extractor)
    warp = None
    weight = None
    if "warp" in batch:
        warp = batch["warp"].to(extractor.device, non_blocking=True)
        objective = getattr(model, "module", model)
        weight = point_weight(objective.matching, warp, match)
    with precision():
        loss = model(images[1:], feats, warp, weight)  # LiFT needs no image at S
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    broken = [index for index in batch["broken"].tolist() if index >= 0]  # it is on the CPU
    return loss.detach(), broken


def point_weight(matching: Matching, warp: Tensor, match: float) -> Tensor:
    """The weight of each point: `match` over the number of points in a batch, a scalar.

    Processes have different numbers of points inside their photos, and their gradients are
    averaged. So it is the mean number that counts.
    """
    points = matching.inside(warp).sum().float()
    if dist.is_initialized():
        dist.all_reduce(points)
        points /= dist.get_world_size()
    return match / points.clamp(min=1)


# ---- the mean feature, and what is measured -----------------------------------------------------


@torch.no_grad()
def mean_feature(photos: Dataset, extractor: DenseExtractor) -> Tensor:
    """The mean feature at S of up to CENTRE_PHOTOS photos, evenly spread: [C, 1, 1].

    Raises:
        ValueError: the features are not finite.
    """
    keys = [(0, index) for index in spread(range(len(photos)), CENTRE_PHOTOS)]
    batches = [keys[at : at + 8] for at in range(0, len(keys), 8)]

    total = torch.zeros(extractor.channels, dtype=torch.float64)
    images = 0
    for batch in Loader(photos, 0, batches):
        _, (feats,) = images_and_features(batch, extractor, levels=1)  # [B, C, h, w]
        total += feats.mean((2, 3)).cpu().double().sum(0)
        images += len(feats)  # photos, and their copies if there are any
    mean = total / images
    check_finite(mean, extractor.dtype)
    return mean.float()[:, None, None].to(extractor.device)


def scores(
    lifted: Tensor, lifted_twice: Tensor | None, feats: list[Tensor], centre: Tensor
) -> dict[str, Tensor]:
    """Mean cosines of features made from smaller photos with the backbone's own at S.

    Args:
        lifted: what LiFT made from the features at S/2, [B, C, h, w].
        lifted_twice: what it made from those at S/4, or None.
        feats: the backbone's, at S, S/2 and, for `lifted_twice`, S/4.
        centre: the mean feature [C, 1, 1].
    Returns:
        [B] in -1..1 for "lift", "bilinear" and "nearest", made from S/2, and for "lift_twice" and
        "bilinear_twice", made from S/4. Each comes again as "..._centred": after `centre` was
        subtracted from both sides.
    """
    target = feats[0]  # [B, C, h, w], and so is everything in `made`
    made = {
        "lift": lifted,
        "bilinear": double(feats[1]),
        "nearest": F.interpolate(feats[1], scale_factor=2),
    }
    if lifted_twice is not None:
        made["lift_twice"] = lifted_twice
        made["bilinear_twice"] = F.interpolate(feats[2], scale_factor=4, mode="bilinear")

    found = {}
    for name, map_made in made.items():
        cosines = F.cosine_similarity(map_made, target)                       # [B, h, w]
        found[name] = cosines.mean((1, 2)).cpu().double()
        cosines = F.cosine_similarity(map_made - centre, target - centre)
        found[f"{name}_centred"] = cosines.mean((1, 2)).cpu().double()
    return found
