"""benchmarks/cost.py: multiply-adds as counted by hand, and tables that say what was run."""

import json

import cost
import pytest
import torch
from PIL import Image


def conv(c_in, c_out, kernel, cells):
    return c_in * c_out * kernel**2 * cells


def lift_macs(c, cells):
    """Multiply-adds of LiFT on `cells` cells of a patch-16 backbone of c channels (LiFT paper, figure 2)."""
    up = (c + 32) // 2
    image = conv(3, 32, 3, 64 * cells) + conv(32, 32, 3, 16 * cells) + conv(32, 32, 3, cells)
    return image + conv(c + 32, up, 2, cells) + conv(up + 32, c // 2, 3, 4 * cells) + conv(c // 2, c // 2, 3, 4 * cells) \
        + conv(c // 2, c, 1, 4 * cells)  # fmt: skip


def backbone_macs(c, cells):
    """Multiply-adds of a ViT with patch 16 and 12 blocks up to the keys of the last block."""
    tokens = cells + 1
    block = 12 * c * c * tokens + 2 * c * tokens**2  # qkv, projection and MLP; q k^T and its product with v
    return 3 * 256 * c * cells + 11 * block + c * c * tokens


@pytest.mark.parametrize(("name", "width"), [("vit_mini16", 192), ("dino_vits16", 384)])
def test_counts_equal_those_by_hand(name, width):
    extractor, lift = cost.without_storage(*cost.build(name, "cpu", "float32"))
    image, cells = torch.empty(1, 3, 224, 224, device="meta"), 196
    for steps in (0, 2):
        counted = cost.count_macs(lambda: cost.upsample(lift, image, extractor(image), steps))  # noqa: B023
        assert counted == backbone_macs(width, cells) + sum(lift_macs(width, cells * 4**n) for n in range(steps))


def test_memory_sees_what_a_run_allocates():
    """Of 64 MB for the result and 128 MB on the way to it, both at once."""
    device = torch.device("cpu")
    if cost.start_peak(device) is None:
        pytest.skip("peak memory of a CPU is read under Linux only")
    torch.set_num_threads(1)
    measured = cost.measure(lambda: torch.ones(2**24) + torch.ones(2**24), device)
    assert 180 < measured["peak_mb"] < 230 and measured["ms"] > 0


def test_command_line(cli, tmp_path, monkeypatch):
    """What costs more than --max_gmacs is counted, not run."""
    monkeypatch.setattr(cost, "GROWTH", (112, 224))
    ran = cli("cost", "--backbones", "vit_mini16", "--max_gmacs", 1.2, "--output_dir", tmp_path, "--device", "cpu")
    assert ran.code == 0 and json.loads(ran.out.splitlines()[-1])["max_gmacs"] == 1.2
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [(r["backbone"], r["size"], r["steps"]) for r in found["records"] if "ms" in r] == [("vit_mini16", 224, 0)]
    assert found["paper"]["parameters"] == pytest.approx(100 * 1_187_280 / 21_665_664)
    lines = (tmp_path / "cost.md").read_text().splitlines()
    assert "| vit_mini16 | 224 | 196 | 1.16 | 1.40 | 2.35 | 6.16 | 21.41 |" in lines
    assert sum(line.startswith("| vit_mini16 | 448 | 784 | - | - | - | - | - |") for line in lines) == 2
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.size == (3 * 430, 400)  # MACs, milliseconds, memory


def test_exponent_is_the_slope_of_a_power_law():
    records = [{"steps": 1, "tokens": t, "macs": 7 * t**2} for t in (10, 30, 500)]
    assert cost.exponent(records, 1) == pytest.approx(2)
