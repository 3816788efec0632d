"""The training loop of LiFT (paper, section 3.2) as one writes it first: the slow, obvious version that train_lift.py must equal.

Every image is decoded in the loop, the backbone runs to its end in float32 with the softmax spelled out, three times a batch, and
LiFT takes one Adam step. `python benchmarks/speed.py train` times the two beside each other.
"""

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms


def plain_vit(name, path=None):
    """A frozen timm ViT in eval mode; weights from the .safetensors file `path`, or random."""
    vit = timm.create_model(name, checkpoint_path=path or "").eval().requires_grad_(False)
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


def plain_train(files, features, lift, batch_size, steps, imsize=448, loss="cosine", lr=1e-3, mean=0.5, std=0.5, accumulate=1):
    """Train `lift` in place on image `files`, in their order, over and over; returns the loss of each of `steps` steps.

    `features` takes images [B, 3, H, W] to [B, C, h, w]. A step's gradient is the mean over `accumulate` batches, each with its
    own batch-norm statistics, which is also what `accumulate` processes do together.
    """
    load = transforms.Compose(
        [transforms.Resize((imsize, imsize)), transforms.ToTensor(), transforms.Normalize([mean] * 3, [std] * 3)]
    )
    adam = torch.optim.Adam(lift.parameters(), lr=lr)
    lift.train()
    losses, at = [], 0
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            x = torch.stack([load(Image.open(files[(at + i) % len(files)]).convert("RGB")) for i in range(batch_size)])
            at += batch_size
            half, quarter = x[:, :, ::2, ::2], x[:, :, ::4, ::4]
            f1, f2, f3 = features(x), features(half), features(quarter)
            value = plain_loss(loss, lift(half, f2), f1) + plain_loss(loss, lift(quarter, f3), f2)
            (value / accumulate).backward()
            total += value.item() / accumulate
        adam.step()
        adam.zero_grad()
        losses.append(total)
    return losses
