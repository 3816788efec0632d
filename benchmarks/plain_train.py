"""The training loop of LiFT (paper, section 3.2) as one writes it first: the slow, obvious version that train_lift.py must equal.

Every image is decoded in the loop, the backbone runs to its end in float32 with the softmax spelled out, three times a batch, and
LiFT takes one Adam step. `python benchmarks/speed.py train` times the two beside each other.
"""

import itertools
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

import train_lift
from extractor import ViTExtractor
from lift import LiFT


def plain_vit(name, path=None):
    """A frozen timm ViT in eval mode; weights from the .safetensors file `path`, or random."""
    vit = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    if path:
        vit.load_state_dict({key: value for key, value in load_file(path).items() if not key.startswith("head.")})
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


def plain_features(vit, images):
    """Keys of the last block: images [B, 3, H, W], normalised -> [B, C, h, w], channel = d * heads + head."""
    patch = vit.patch_embed.patch_size[0]
    h, w = images.shape[2] // patch, images.shape[3] // patch
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)                 # [B, h*w, C]
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + plain_positions(vit.pos_embed, h, w)
    caught = {}
    hook = vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: caught.update(qkv=out))
    for block in vit.blocks:
        x = block(x)
    hook.remove()
    heads = vit.blocks[-1].attn.num_heads
    keys = caught["qkv"].unflatten(2, (3, heads, -1))[:, 1:, 1]                 # [B, h*w, heads, d], without CLS
    return keys.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (h, w))          # [B, d*heads, h, w]


def plain_positions(pos_embed, h, w):
    """DINO's interpolation of the position embedding [1, 1+N, C] to the grid (h, w): a scale factor, not a size."""
    n = round((pos_embed.shape[1] - 1) ** 0.5)
    if (h, w) == (n, n):
        return pos_embed
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (n, n))
    grid = F.interpolate(grid, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def plain_loss(kind, out, target):
    """cosine: mean over all positions of 1 - cos, as CosineEmbeddingLoss with target 1; l1, l2: mean over all values."""
    if kind == "cosine":
        flat = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in (out, target)]     # [B*h*w, C]
        return F.cosine_embedding_loss(*flat, torch.ones(len(flat[0])))
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](out, target)


def plain_train(steps, features, lift, imsize=448, loss="cosine", optimizer=None, mean=0.5, std=0.5):
    """Train `lift` in place; returns the loss of every step.

    A step is a list of batches of image files. Its gradient is the mean over its batches, each with its own batch-norm
    statistics: more than one batch is what gradient accumulation, or several processes, do. `features` takes images
    [B, 3, H, W] to [B, C, h, w].
    """
    load = transforms.Compose(
        [transforms.Resize((imsize, imsize)), transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)]
    )
    optimizer = optimizer or torch.optim.Adam(lift.parameters(), lr=1e-3)
    lift.train()
    losses = []
    for batches in steps:
        total = 0.0
        for files in batches:
            x = torch.stack([load(Image.open(file).convert("RGB")) for file in files])
            half, quarter = x[:, :, ::2, ::2], x[:, :, ::4, ::4]
            f1, f2, f3 = features(x), features(half), features(quarter)
            value = plain_loss(loss, lift(half, f2), f1) + plain_loss(loss, lift(quarter, f3), f2)
            (value / len(batches)).backward()
            total += value.item() / len(batches)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def plain_evaluate(files, features, lift, imsize=448, mean=0.5, std=0.5):
    """Mean cosine with the features at S of what LiFT and bilinear interpolation make of those at S/2, one photo at a time."""
    load = transforms.Compose(
        [transforms.Resize((imsize, imsize)), transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)]
    )
    sums = torch.zeros(2)
    for file in files:
        x = load(Image.open(file).convert("RGB"))[None]
        target, small = features(x), features(x[:, :, ::2, ::2])
        made = [lift(x[:, :, ::2, ::2], small), F.interpolate(small, scale_factor=2, mode="bilinear")]
        sums += torch.stack([F.cosine_similarity(m, target).mean() for m in made])
    return (sums / len(files)).tolist()


# ---- the cases of benchmarks/speed.py ---------------------------------------------------------------------------------


def setup(dtype="float32", cache=False):
    """Two steps of batch 4 at 448 on random photos and a random ViT-S/16: the plain loop and train_lift.py's."""
    folder = Path(tempfile.mkdtemp())
    files = [folder / f"{k}.jpg" for k in range(4)]
    for k, file in enumerate(files):
        Image.fromarray(np.random.RandomState(k).randint(0, 256, (47, 63, 3), np.uint8)).resize((500, 375)).save(file)
    torch.manual_seed(0)
    vit = plain_vit("vit_small_patch16_224.augreg_in21k_ft_in1k")
    model = timm.create_model("vit_small_patch16_224.augreg_in21k_ft_in1k", num_classes=0)
    model.load_state_dict(vit.state_dict())
    extractor = ViTExtractor("vit_small_patch16_224", model=model, device="cpu", dtype=dtype)
    photos = train_lift.Photos(files, 448)
    if cache:
        photos = train_lift.cached(photos, extractor, folder / "cache", views=1, batch_size=4, workers=0)
    args = train_lift.parser().parse_args(["--workers", "0", "--dtype", dtype])

    def plain():
        torch.manual_seed(0)
        return plain_train([[files]] * 2, lambda images: plain_features(vit, images), LiFT(384, 16))

    def ours():
        torch.manual_seed(0)
        lift = LiFT(384, 16)
        model, precision = train_lift.prepare(lift, args, extractor)
        adam = torch.optim.Adam(lift.parameters(), lr=1e-3)
        batches = iter(train_lift.load(photos, train_lift.in_order(photos, 4) * 2, args, extractor))
        step = partial(train_lift.train_step, model, count=1, extractor=extractor, optimizer=adam, precision=precision)
        return [step(batches=itertools.islice(batches, 1))[0].item() for _ in range(2)]

    return plain, ours


def same(plain, ours, rel):
    """The losses of the two agree."""
    np.testing.assert_allclose(ours, plain, rtol=rel)


SIZE = "train: ViT-S/16 at 448, batch 4"
CASES = [
    Case(f"{SIZE}, float32", 1.3, setup, partial(same, rel=1e-4), memory=1 / 1.1),
    Case(f"{SIZE}, bfloat16", 3.0, partial(setup, "bfloat16"), partial(same, rel=2e-2), memory=1 / 1.1),
    Case(f"{SIZE}, cached features", 10.0, partial(setup, cache=True), partial(same, rel=2e-3), memory=1 / 1.1),
]
