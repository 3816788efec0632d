"""joint_bilateral.py against the formula of its paper, and anybody's upsampler on command lines."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from joint_bilateral import joint_bilateral


def slow(images, feats, factor, radius, spatial, colour):
    """The formula, for one output cell after another."""
    batch, channels, height, width = feats.shape
    size = (factor * height, factor * width)
    fine = F.interpolate(images, size, mode="bilinear", antialias=True)
    result = torch.zeros(batch, channels, *size)
    for b in range(batch):
        for y in range(size[0]):
            for x in range(size[1]):
                total = torch.zeros(channels)
                weights = 0.0
                for i in range(y // factor - radius, y // factor + radius + 1):
                    for j in range(x // factor - radius, x // factor + radius + 1):
                        if not (0 <= i < height and 0 <= j < width):
                            continue
                        own_rows = slice(factor * i, factor * (i + 1))
                        own_columns = slice(factor * j, factor * (j + 1))
                        mean = fine[b, :, own_rows, own_columns].mean(dim=(1, 2))
                        down = (y + 0.5) / factor - 0.5 - i
                        right = (x + 0.5) / factor - 0.5 - j
                        near = (down**2 + right**2) / (2 * spatial**2)
                        unlike = (fine[b, :, y, x] - mean).square().sum().item()
                        weight = math.exp(-near - unlike / (2 * colour**2))
                        total += weight * feats[b, :, i, j]
                        weights += weight
                result[b, :, y, x] = total / weights
    return result


@pytest.fixture
def scene():
    """A random photo [2, 3, 48, 64], and features [2, 5, 3, 4] that have nothing to do with it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 64, generator=generator)
    return images, torch.randn(2, 5, 3, 4, generator=generator)


@pytest.mark.parametrize("options", [(2, 2, 0.5, 0.1), (4, 1, 1.0, 0.3), (3, 2, 0.7, math.inf)])
def test_equals_the_formula(scene, options):
    expected = slow(*scene, *options)
    assert torch.allclose(joint_bilateral(*scene, *options), expected, atol=1e-5)


def test_constant_features_stay_constant(scene):
    images, _ = scene
    feats = torch.tensor([3.0, -1.0])[None, :, None, None].expand(2, 2, 3, 4)
    dense = joint_bilateral(images, feats, factor=4)
    assert dense.shape == (2, 2, 12, 16)
    assert torch.allclose(dense, feats[:, :, :1, :1].expand_as(dense))


def test_without_colour_it_is_gaussian_along_each_axis():
    """With colours left out the photo does not count, and the weights are those of two axes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 80, 112, generator=generator)
    feats = torch.randn(1, 6, 5, 7, generator=generator)

    def axis(cells):
        """[2 cells, cells] weights of the coarse cells in the output cells."""
        places = (torch.arange(2 * cells) + 0.5) / 2 - 0.5
        distance = places[:, None] - torch.arange(cells)
        nearest = torch.arange(2 * cells)[:, None] // 2
        weights = torch.exp(-distance.square() / (2 * 0.5**2))
        weights[(nearest - torch.arange(cells)).abs() > 2] = 0
        return weights / weights.sum(dim=1, keepdim=True)

    expected = torch.einsum("yi,xj,bcij->bcyx", axis(5), axis(7), feats)
    assert torch.allclose(joint_bilateral(images, feats, colour=math.inf), expected, atol=1e-5)


def test_it_follows_the_edges_of_the_photo():
    """Left of column 40 all is black, right of it white; in coarse cells of 16 that is 2.5."""
    images = torch.zeros(1, 3, 64, 96)
    images[..., 40:] = 1
    feats = torch.zeros(1, 1, 4, 6)
    feats[..., 3:] = 1
    feats[..., 2] = 0.3  # the cell that the edge cuts

    dense = joint_bilateral(images, feats, factor=16)
    assert (dense[..., :40] < 0.31).all()      # up to the edge nothing of what lies beyond it
    assert (dense[..., 42:] > 0.9).all()       # beyond it, in the very same coarse cell, all of it
    blurred = joint_bilateral(images, feats, factor=16, colour=math.inf)
    assert blurred[0, 0, 32, 42] < 0.7


def test_colours_that_no_cell_has_do_not_make_nan():
    """One white pixel among black cells: every weight is far below what float32 holds."""
    images = torch.zeros(1, 3, 64, 64)
    images[..., 20, 20] = 1
    dense = joint_bilateral(images, torch.ones(1, 2, 4, 4), factor=16, colour=0.01)
    assert torch.allclose(dense, torch.ones(1, 2, 64, 64))


def test_half_precision_and_gradients_reach_the_features(scene):
    images, feats = scene
    dense = joint_bilateral(images, feats.bfloat16())
    assert dense.dtype == torch.bfloat16
    feats.requires_grad_()
    joint_bilateral(images, feats).sum().backward()
    assert feats.grad.abs().min() > 0


# ---- on command lines ---------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path):
    """Flags of a toy data set: one photo to train on and one to score, a red stripe on green."""
    for split in ("train", "val"):
        photo = np.zeros((64, 64, 3), np.uint8)
        labels = np.zeros((64, 64), np.uint8)
        photo[..., 1] = 220
        photo[18:22] = (220, 0, 0)
        labels[18:22] = 1
        for kind, array in (("images", photo), ("masks", labels)):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / split / kind / "a.png")
    return [
        "--dataset", "folder", "--dataroot", tmp_path, "--classes", 2, "--imsize", 64,
        "--lr", 0.05,
    ]  # fmt: skip


def test_joint_bilateral_on_the_command_line(cli, toy, rule_backbone, tmp_path):
    """The stripe lies between two rows of centres, and only a guided upsampler can find it."""
    scores = {}
    for how in ("none", "joint_bilateral:upsampler"):
        flags = ["--upsample", how, "--lift_iter", 4 if ":" in how else 1]
        json_path = tmp_path / "result.json"
        ran = cli("eval_segmentation", *toy, *rule_backbone, *flags, "--json", json_path)
        assert ran.code == 0, ran.err
        scores[how] = json.loads(json_path.read_text())["results"]["miou"]
    assert scores["joint_bilateral:upsampler"] > 99
    assert scores["none"] < 80


def test_an_upsampler_of_your_own(cli, toy, rule_backbone, import_path):
    """The eight lines of docs/upsamplers.md: a function that returns any callable."""
    (import_path / "mine.py").write_text(
        "import torch\n"
        "def load():\n"
        "    def upsample(images, feats):\n"
        "        assert 0 <= images.min() and images.max() <= 1\n"
        "        return torch.nn.functional.interpolate(feats, images.shape[2:])\n"
        "    return upsample\n"
    )
    ran = cli("eval_segmentation", *toy, *rule_backbone, "--upsample", "mine:load")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1].startswith("mIoU")
