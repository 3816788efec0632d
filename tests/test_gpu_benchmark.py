"""benchmarks/gpu.py: what it compares differs where it should, and its times are times.

With the device cpu, at small sizes: there both sides are the same.
"""

import json
import time
from functools import partial

import gpu
import pytest
import torch


def test_tables(cli, shared, tmp_path):
    """Every line that needs no compilation; what is compared is equal on the same device."""
    files = ["--json", tmp_path / "gpu.json", "--markdown", tmp_path / "gpu.md"]
    small = ["--imsize", 32, "--batch_size", 2, "--seconds", 0, "--no_compile"]
    ran = cli("gpu", "--device", "cpu", *small, *files)
    assert ran.code == 0, ran.err
    written = json.loads((tmp_path / "gpu.json").read_text())
    names = [row["number"].split(",")[0] for row in written["numbers"]]
    assert names == ["golden descriptors", *[each.name for each in gpu.EVALUATIONS]]
    descriptors, *scores = written["numbers"]
    assert 0 < descriptors["difference"] < 1e-4
    for row in scores:
        assert row["equal"] and row["device"] == row["CPU"], row
    assert any(row["CPU"] > 0 for row in scores)

    whats = {row["what"] for row in written["speed"]}
    assert len(written["speed"]) == 2 * len(whats) == 12
    assert all(row["value"] > 0 for row in written["speed"])
    text = (tmp_path / "gpu.md").read_text()
    assert text in ran.out
    assert "| LiFT alone at 32, batch 1 | float32 | " in text and "| DAVIS J&F | " in text


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed, and no score is computed."""
    monkeypatch.setattr(gpu, "speeds", lambda args, device: [])
    monkeypatch.setattr(gpu, "evaluate", lambda evaluation, imsize, device: 50.0)


def test_a_difference_beyond_its_bound_ends_with_status_1(cli, quick, monkeypatch):
    """Whatever else agrees; up to the bound it is rounding."""
    row = partial(gpu.row_of_numbers, "descriptors", 0.0, bound=1e-4)
    monkeypatch.setattr(gpu, "descriptors_row", lambda device: row(2e-4))
    ran = cli("gpu", "--device", "cpu")
    assert ran.code == 1 and "| descriptors | 0 | 0.0002 | 0.0002 | 0.0001 | NO |" in ran.out
    monkeypatch.setattr(gpu, "descriptors_row", lambda device: row(1e-5))
    ran = cli("gpu", "--device", "cpu")
    assert ran.code == 0 and "NO" not in ran.out


def test_other_descriptors_are_noticed(shared, monkeypatch):
    """The row's difference is that of the worst value of all cases."""

    def zeros(facts, device):
        return torch.zeros(facts["shape"][1:])

    monkeypatch.setattr(gpu, "golden_descriptors", zeros)
    row = gpu.descriptors_row(torch.device("cpu"))
    assert row["difference"] > 0.5 and not row["equal"]


def test_without_shared_data(cli, quick, monkeypatch, tmp_path):
    """It is told, and the rest is measured."""
    monkeypatch.setenv("LIFT_SHARED", str(tmp_path))
    ran = cli("gpu", "--device", "cpu")
    assert ran.code == 0
    assert f"skipped: golden descriptors: there is no folder {tmp_path / 'golden'}" in ran.err


def test_a_time_is_the_time_of_a_call():
    cpu = torch.device("cpu")
    took = gpu.seconds_of(partial(time.sleep, 0.02), cpu, seconds=0.1)
    assert took == pytest.approx(0.02, rel=0.5)
