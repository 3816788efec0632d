"""train_lift.py: golden losses, the plain loop, resume, processes, cache, bad input; all on photos of 64 pixels unless golden."""

import json

import pytest
import torch
from conftest import rule_state
from torch.utils.data import default_collate

import train_lift
from extractor import ViTExtractor
from lift import LiFT

# Biases before a batch norm have gradient 0: Adam moves them, and the running means behind them, by noise.
NOISY = [f"image_convs_{name}" for name in ("1.0.bias", "1.3.bias", "2.0.bias", *(f"{n}.running_mean" for n in ("1.1", "1.4", "2.1")))]


@pytest.fixture(scope="module")
def golden_batch(shared):
    """The golden photos as one batch with their real features."""
    golden = json.loads((shared / "golden/train.json").read_text())
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    extractor = ViTExtractor("vit_tiny_patch16_224", backbone_path=weights, device="cpu")
    photos = train_lift.Photos([shared / "data/train_images" / name for name in golden["images"]], golden["imsize"])
    batch = default_collate([photos[0, i] for i in range(len(photos))])
    _, feats = train_lift.scales(batch, extractor)
    return golden, extractor, batch | dict(zip(("f1", "f2", "f3"), feats))


@pytest.mark.parametrize("loss", ["cosine", "l1", "l2"])
def test_golden_losses_and_weights(golden_batch, loss):
    golden, extractor, batch = golden_batch
    lift = LiFT(192, 16)
    lift.load_state_dict(rule_state(lift))
    model, optimizer = train_lift.Objective(lift, loss), torch.optim.Adam(lift.parameters(), lr=golden["lr"])
    losses = [train_lift.train_step(model, [batch], 1, extractor, optimizer)[0].item() for _ in range(golden["steps"])]
    assert losses == pytest.approx(golden["losses"][loss], rel=1e-4)
    for name, after in golden["after"][loss].items():
        value = lift.state_dict()[name].float()
        close = 1e-3 * max(after["std"], abs(after["mean"])) + (golden["lr"] if name in NOISY else 0)
        assert value.mean().item() == pytest.approx(after["mean"], abs=close), name
        assert value.numel() == 1 or value.std().item() == pytest.approx(after["std"], abs=close), name
