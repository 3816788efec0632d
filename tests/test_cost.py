"""benchmarks/cost.py: multiply-adds as counted by hand, and tables that say what was run."""

import json
from functools import partial

import cost
import pytest
import torch
from PIL import Image


def conv(c_in, c_out, kernel, cells):
    """Multiply-adds of a convolution that writes so many cells."""
    return c_in * c_out * kernel**2 * cells


def lift_macs(c, cells):
    """Multiply-adds of LiFT on so many cells of a patch-16 backbone of c channels.

    Source: LiFT paper, figure 2.
    """
    # the image's convolutions write 64, 16 and 1 pixels a cell
    image = conv(3, 32, 3, 64 * cells)
    image += conv(32, 32, 3, 16 * cells)
    image += conv(32, 32, 3, cells)

    # a transposed convolution writes four pixels for each that it reads
    up = (c + 32) // 2
    feats = conv(c + 32, up, 2, cells)
    feats += conv(up + 32, c // 2, 3, 4 * cells)
    feats += conv(c // 2, c // 2, 3, 4 * cells)
    feats += conv(c // 2, c, 1, 4 * cells)
    return image + feats


def backbone_macs(c, cells):
    """Multiply-adds of a ViT with patch 16 and 12 blocks, up to the keys of the last block."""
    tokens = cells + 1
    embedding = 3 * 256 * c * cells
    linear = 12 * c * c * tokens     # qkv, projection and MLP
    attention = 2 * c * tokens**2    # q k^T, and its product with v
    keys = c * c * tokens
    return embedding + 11 * (linear + attention) + keys


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("name", "width"), [("vit_mini16", 192), ("dino_vits16", 384)])
def test_counts_equal_those_by_hand(name, width, device):
    """Fused attention, which torch's counter passes over on a CPU, is in."""
    extractor, lift = cost.build(name, "cpu", "float32")
    if device == "meta":
        extractor, lift = cost.without_storage(extractor, lift)
    image = torch.zeros(1, 3, 224, 224, device=device)
    cells = 196
    for steps in (0, 2):
        counted = cost.count_macs(partial(cost.dense_features, extractor, lift, image, steps))
        expected = backbone_macs(width, cells)
        for step in range(steps):
            expected += lift_macs(width, cells * 4**step)
        assert counted == expected


def test_memory_sees_what_a_run_allocates():
    """Of 64 MB for the result and 128 MB on the way to it, both at once."""
    device = torch.device("cpu")
    if cost.start_peak(device) is None:
        pytest.skip("peak memory of a CPU is read under Linux only")
    measured = cost.measure(lambda: torch.ones(2**24) + torch.ones(2**24), device)
    assert 180 < measured["peak_mb"] < 230
    assert measured["ms"] > 0


def test_command_line(cli, tmp_path, monkeypatch):
    """What costs more than --max_gmacs is counted, not run."""
    monkeypatch.setattr(cost, "GROWTH", (112, 224))
    flags = ["--backbones", "vit_mini16", "--max_gmacs", 1.2, "--device", "cpu"]
    ran = cli("cost", *flags, "--output_dir", tmp_path)
    assert ran.code == 0
    assert ran.report()["max_gmacs"] == 1.2

    found = json.loads((tmp_path / "cost.json").read_text())
    measured = []
    for record in found["records"]:
        if "ms" in record:
            measured.append((record["backbone"], record["size"], record["steps"]))
    assert measured == [("vit_mini16", 224, 0)]
    assert found["paper"]["parameters"] == pytest.approx(100 * 1_187_280 / 21_665_664)

    text = (tmp_path / "cost.md").read_text()
    lines = text.splitlines()
    assert "| vit_mini16 | 224 | 196 | 1.16 | 1.40 | 2.35 | 6.16 | 21.41 |" in lines
    unknown = "| vit_mini16 | 448 | 784 | - | - | - | - | - |"  # of time and of memory
    unknown_lines = [line for line in lines if line.startswith(unknown)]
    assert len(unknown_lines) == 2

    assert "load average" in text
    about = {**found["settings"], "load": None}  # as on Windows, which counts none
    text = cost.document(found["records"], found["growth"], found["paper"], about)
    assert "load average" not in text

    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.size == (3 * 430, 400)  # MACs, milliseconds, memory


def test_unknown_backbone_is_one_line(cli, tmp_path):
    """It is told before anything is counted."""
    ran = cli("cost", "--backbones", "vit_mini16", "resnet50", "--output_dir", tmp_path)
    assert ran.code == 2
    assert "unknown backbone resnet50: pass some of dino_vits16, " in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_exponent_is_the_slope_of_a_power_law():
    records = [{"steps": 1, "tokens": tokens, "macs": 7 * tokens**2} for tokens in (10, 30, 500)]
    assert cost.exponent(records, 1) == pytest.approx(2)
