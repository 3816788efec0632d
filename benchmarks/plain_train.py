"""The training loop of LiFT (paper, section 3.2) as one writes it first.

This is the slow, obvious version that train_lift.py must equal. Every image is decoded in the loop.
The backbone runs three times a batch, at S, S/2 and S/4: all of it, in float32, with attention as
two products and a softmax. Then LiFT takes one Adam step.

`python benchmarks/speed.py train` times the two beside each other.

Notation: B batch, C channels, h w the patch grid, S pixels of the square photos.
"""

import atexit
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from case import Case
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

import objectives
import train_lift
from extractor import ViTExtractor
from feature_cache import cached
from lift import LiFT


def plain_vit(name, path=None):
    """A frozen timm ViT in eval mode; weights from the .safetensors file `path`, or random."""
    vit = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    if path:
        state = load_file(path)
        vit.load_state_dict({key: state[key] for key in state if not key.startswith("head.")})
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


def plain_features(vit, images):
    """Keys of the last block: images [B, 3, H, W], normalised -> [B, C, h, w].

    Channel number = (dimension within the head) * heads + head.
    """
    patch = vit.patch_embed.patch_size[0]
    h = images.shape[2] // patch
    w = images.shape[3] // patch
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)         # [B, h*w, C]
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1)         # [B, 1 + h*w, C]
    x = x + plain_positions(vit.pos_embed, h, w)

    caught = []
    qkv = vit.blocks[-1].attn.qkv
    hook = qkv.register_forward_hook(lambda module, args, out: caught.append(out))
    for block in vit.blocks:
        x = block(x)
    hook.remove()

    heads = vit.blocks[-1].attn.num_heads
    keys = caught[0].unflatten(2, (3, heads, -1))[:, 1:, 1]             # [B, h*w, heads, d]
    return keys.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (h, w))  # [B, d*heads, h, w]


def plain_positions(pos_embed, h, w):
    """DINO's interpolation of the position embedding [1, 1+N, C] to the grid (h, w).

    DINO passes a scale factor, with 0.1 added against rounding, and not a size. The two give
    slightly different numbers.
    """
    n = round((pos_embed.shape[1] - 1) ** 0.5)
    if (h, w) == (n, n):
        return pos_embed
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (n, n))
    scale = ((h + 0.1) / n, (w + 0.1) / n)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def plain_loss(kind, out, target, centre=None):
    """The loss of maps [B, C, h, w].

    Args:
        kind: cosine is the mean over all positions of 1 - cos, as CosineEmbeddingLoss has it for
            target 1. l1 and l2 are means over all values. centred is cosine after `centre` was
            subtracted from both sides. both is cosine plus centred.
        centre: the mean feature [C, 1, 1].
    """
    if kind == "l1":
        return F.l1_loss(out, target)
    if kind == "l2":
        return F.mse_loss(out, target)
    if kind == "centred":
        return plain_loss("cosine", out - centre, target - centre)
    if kind == "both":
        return plain_loss("cosine", out, target) + plain_loss("centred", out, target, centre)
    flat_out = out.permute(0, 2, 3, 1).flatten(0, 2)                    # [B*h*w, C]
    flat_target = target.permute(0, 2, 3, 1).flatten(0, 2)
    return F.cosine_embedding_loss(flat_out, flat_target, torch.ones(len(flat_out)))


def plain_match_losses(pairs, warps, temperature):
    """objectives.Matching, point by point: the list of the losses of all points.

    Args:
        pairs: features [2B, C, h, w] of a photo, its copy, the next photo, and so on.
        warps: for each photo [2, 3], from places in the copy to those in the photo.
        temperature: what cosines are divided by.
    """
    h, w = pairs.shape[2:]
    cells = objectives.match_cells(h * w).tolist()
    losses = []
    for number, warp in enumerate(warps):
        photo = pairs[2 * number]
        copy = pairs[2 * number + 1]
        candidates = []
        points = []
        for cell in cells:
            row, column = divmod(cell, w)
            centre_of_cell = torch.tensor([(2 * column + 1) / w - 1, (2 * row + 1) / h - 1, 1])
            x, y = (warp @ centre_of_cell).tolist()
            if abs(x) > 1 or abs(y) > 1:
                continue
            candidates.append(copy[:, row, column])
            place = torch.tensor([[[[x, y]]]])
            sampled = F.grid_sample(photo[None], place, padding_mode="border", align_corners=False)
            points.append(sampled.flatten())
        for own, point in enumerate(points):
            cosines = F.cosine_similarity(point[None], torch.stack(candidates), dim=1)
            shares = (cosines / temperature).softmax(0)
            losses.append(-shares[own].log())
    return losses


def plain_matched(pairs, warps, centre, share):
    """The mean loss of all points: of features as they are, and for a share of centred ones."""
    raw = torch.stack(plain_match_losses(pairs, warps, 0.05)).mean()
    centred = torch.stack(plain_match_losses(pairs - centre, warps, 0.1)).mean()
    return (1 - share) * raw + share * centred


def loading(imsize, mean, std):
    """A function from a PIL image to a normalised square [3, S, S]."""
    return transforms.Compose(
        [
            transforms.Resize((imsize, imsize)),
            transforms.ToTensor(),
            transforms.Normalize([mean] * 3, [std] * 3),
        ]
    )


def plain_train(
    steps,
    features,
    lift,
    imsize=448,
    loss="cosine",
    optimizer=None,
    mean=0.5,
    std=0.5,
    centre=None,
):
    """Train `lift` in place.

    Args:
        steps: a list for each step, of its batches of image files. The gradient is the mean over
            these, each with its own batch-norm statistics: more than one batch is what several
            processes do.
        features: takes images [B, 3, H, W] to [B, C, h, w].
    Returns:
        The loss of every step.
    """
    load = loading(imsize, mean, std)
    optimizer = optimizer or torch.optim.Adam(lift.parameters(), lr=1e-3)
    lift.train()
    losses = []
    for batches in steps:
        total = 0.0
        for files in batches:
            x = torch.stack([load(Image.open(file).convert("RGB")) for file in files])
            half = x[:, :, ::2, ::2]
            quarter = x[:, :, ::4, ::4]
            f1 = features(x)
            f2 = features(half)
            f3 = features(quarter)
            finer = plain_loss(loss, lift(half, f2), f1, centre)
            coarser = plain_loss(loss, lift(quarter, f3), f2, centre)
            value = finer + coarser
            (value / len(batches)).backward()
            total += value.item() / len(batches)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def plain_centre(files, features, imsize=448, mean=0.5, std=0.5):
    """The mean feature [C, 1, 1] over all positions of all photos."""
    load = loading(imsize, mean, std)
    means = []
    for file in files:
        feats = features(load(Image.open(file).convert("RGB"))[None])   # [1, C, h, w]
        means.append(feats.mean((0, 2, 3)))
    return torch.stack(means).mean(0)[:, None, None]


def plain_evaluate(files, features, lift, imsize=448, mean=0.5, std=0.5, centre=0.0):
    """What LiFT and bilinear interpolation make of features at S/2, one photo at a time.

    Returns:
        The mean cosine of each with the features at S, after `centre` was subtracted from all.
    """
    load = loading(imsize, mean, std)
    with_lift = 0.0
    with_bilinear = 0.0
    for file in files:
        x = load(Image.open(file).convert("RGB"))[None]
        half = x[:, :, ::2, ::2]
        target = features(x) - centre
        small = features(half)
        made = lift(half, small) - centre
        bilinear = F.interpolate(small, scale_factor=2, mode="bilinear") - centre
        with_lift += F.cosine_similarity(made, target).mean().item()
        with_bilinear += F.cosine_similarity(bilinear, target).mean().item()
    return [with_lift / len(files), with_bilinear / len(files)]


# ---- the cases of benchmarks/speed.py -----------------------------------------------------------


def setup(dtype="float32", cache=False):
    """Two steps of batch 4 at 448, on random photos and a random ViT-S/16.

    Returns:
        Two functions, the plain loop and train_lift.py, each of which trains a new LiFT and returns
        the losses.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = []
    for k in range(4):
        pixels = np.random.RandomState(k).randint(0, 256, (47, 63, 3), np.uint8)
        files.append(folder / f"{k}.jpg")
        Image.fromarray(pixels).resize((500, 375)).save(files[-1])

    torch.manual_seed(0)
    vit = plain_vit("vit_small_patch16_224.augreg_in21k_ft_in1k")
    model = timm.create_model("vit_small_patch16_224.augreg_in21k_ft_in1k", num_classes=0)
    model.load_state_dict(vit.state_dict())
    extractor = ViTExtractor(
        "vit_small_patch16_224", stride=None, model=model, device="cpu", dtype=dtype
    )
    photos = objectives.Photos(files, 448)
    if cache:
        photos = cached(photos, extractor, folder / "cache", views=1, batch_size=4, workers=0)
    args = train_lift.parser().parse_args(["--workers", "0", "--dtype", dtype])

    def new_lift():
        torch.manual_seed(0)
        return LiFT(384, 16, pre_shape=False, post_shape=False)

    def plain():
        return plain_train([[files]] * 2, lambda images: plain_features(vit, images), new_lift())

    def ours():
        lift = new_lift()
        model, precision = objectives.prepare(lift, extractor, "cosine")
        adam = torch.optim.Adam(lift.parameters(), lr=1e-3)
        keys = objectives.in_order(photos, 4) * 2
        losses = []
        for batch in train_lift.make_loader(photos, keys, args, extractor):
            loss, _ = objectives.train_step(model, batch, extractor, adam, precision)
            losses.append(loss.item())
        return losses

    return plain, ours


def same(plain, ours, rel):
    """The losses of the two agree."""
    np.testing.assert_allclose(ours, plain, rtol=rel)


SIZE = "train: ViT-S/16 at 448, batch 4"
CASES = [
    Case(f"{SIZE}, float32", 1.3, setup, partial(same, rel=1e-4), memory=1 / 1.1),
    Case(
        f"{SIZE}, bfloat16",
        3.0,
        partial(setup, "bfloat16"),
        partial(same, rel=2e-2),
        memory=1 / 1.1,
        dtype="bfloat16",
    ),
    Case(
        f"{SIZE}, cached features",
        10.0,
        partial(setup, cache=True),
        partial(same, rel=2e-3),
        memory=1 / 1.1,
    ),
]
