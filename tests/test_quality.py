"""benchmarks/quality.py: cells come from the right scripts, measures are those counted by hand."""

import json

import numpy as np
import pytest
import quality
import torch
import torch.nn.functional as F
from PIL import Image

from extractor import ViTExtractor
from lift import LiFT

ROWS = {
    "backbone": ["--imsize", 64],
    "+ bilinear": ["--imsize", 64, "--upsample", "bilinear"],
    "+ LiFT": ["--imsize", 64, "--lift_path", "LIFT"],
    "+ LiFT x2": ["--imsize", 64, "--lift_path", "LIFT", "--lift_iter", 2],
    "backbone at 128": ["--imsize", 128],
}


@pytest.fixture
def dataroot(tmp_path):
    """One SPair pair of random photos in their places; they are the photos to measure on, too."""
    root = tmp_path / "data"
    images = root / "SPair-71k/JPEGImages/cat"
    pairs = root / "SPair-71k/PairAnnotation/test"
    images.mkdir(parents=True)
    pairs.mkdir(parents=True)

    random = np.random.RandomState(0)
    for name in ("a.png", "b.png"):
        small = Image.fromarray(random.randint(0, 256, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(images / name)
    points = random.randint(0, 64, (20, 2)).tolist()
    entry = {
        "src_imname": "a.png",
        "trg_imname": "b.png",
        "src_kps": points,
        "trg_kps": points,
        "trg_bndbox": [0, 0, 64, 64],
    }
    (pairs / "0:cat.json").write_text(json.dumps(entry))
    return root


def last(ran):
    """The JSON of the last line."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])


@pytest.fixture
def quick(monkeypatch):
    """Few resamples; cost is not measured, its columns tell what it was asked for."""
    monkeypatch.setattr(quality, "RESAMPLES", 200)
    monkeypatch.setattr(
        quality, "cost", lambda extractor, up, imsize: {"GMACs": imsize, "ms": up.iterations}
    )


# ---- the command line ---------------------------------------------------------------------------


def test_cells_are_those_of_the_scripts(
    cli, dataroot, tmp_path, rule_backbone, rule_lift, quick
):
    output = tmp_path / "table"
    photos = dataroot / "SPair-71k/JPEGImages"
    other = {"settings": {"versions": {}}, "command": "another", "machine": "another", "rows": {}}
    output.with_suffix(".json").write_text(json.dumps({"other": other}))
    flags = ["--dataroot", dataroot, "--lift_path", rule_lift, "--imsize", 64, "--output", output]
    flags += ["--photos", photos, "--fit_photos", photos]
    record = last(cli("quality", *flags, *rule_backbone))
    written = json.loads(output.with_suffix(".json").read_text())
    assert written == {"other": other, "vit_tiny_patch16_224": record}

    tables = output.with_suffix(".md").read_text()
    spair = ["--dataroot", dataroot / "SPair-71k", "--pairs_per_category", 0, *rule_backbone]
    for row, flags in ROWS.items():
        flags = [rule_lift if flag == "LIFT" else flag for flag in flags]
        cells = record["rows"][row]
        dot = last(cli("eval_spair", *spair, *flags, "--match", "dot"))["results"]["mean"]
        cosine = last(cli("eval_spair", *spair, *flags, "--match", "cosine"))["results"]["mean"]
        assert cells["SPair PCK@.1"] == dot["pck@0.1"]
        assert cells["PCK@.05"] == dot["pck@0.05"]
        assert cells["PCK@.1 cos"] == cosine["pck@0.1"]
        assert cells["GMACs"] == (128 if row == "backbone at 128" else 64)
        assert cells["ms"] == (2 if row == "+ LiFT x2" else 1)
        assert f"\n| {row} | {quality.number(dot['pck@0.1'])} ± 0." in tables

    # the cosines are those of the training's own validation
    measure = ["--evaluate", rule_lift, "--val_dataroot", photos, "--imsize", 128, "--workers", 0]
    measure += ["--downsample", "resize"]
    wanted = last(cli("train_lift", *measure, *rule_backbone))["results"][str(photos)]
    for row, name in {"backbone": "nearest", "+ bilinear": "bilinear", "+ LiFT": "lift"}.items():
        assert record["rows"][row]["cosine x2"] == pytest.approx(wanted[name], abs=1e-5)
        centred = wanted[f"{name}_centred"]
        assert record["rows"][row]["centred x2"] == pytest.approx(centred, abs=2e-5)
    for row, name in {"+ bilinear": "bilinear_twice", "+ LiFT x2": "lift_twice"}.items():
        assert record["rows"][row]["cosine x4"] == pytest.approx(wanted[name], abs=1e-5)
        centred = wanted[f"{name}_centred"]
        assert record["rows"][row]["centred x4"] == pytest.approx(centred, abs=2e-5)


def test_every_figure_has_an_error_and_modules_are_compared(
    cli, dataroot, tmp_path, rule_backbone, rule_lift, quick
):
    other_lift = tmp_path / "other.pth"
    torch.manual_seed(1)
    torch.save(LiFT(192, 16).state_dict(), other_lift)
    photos = dataroot / "SPair-71k/JPEGImages"
    flags = ["--dataroot", dataroot, "--lift_path", rule_lift, other_lift, "--imsize", 64]
    flags += ["--photos", photos, "--fit_photos", photos, "--output", tmp_path / "table"]
    record = last(cli("quality", *flags, *rule_backbone))

    names = ["+ rule_lift", "+ rule_lift x2", "+ other", "+ other x2"]
    assert list(record["rows"]) == ["backbone", "+ bilinear", *names, "backbone at 128"]
    for name, row in record["rows"].items():
        assert record["errors"][name].keys() == row.keys() - {"GMACs", "ms", "MiB"}
    compared = {(entry["row"], entry["than"]) for entry in record["differences"]}
    assert compared == {
        ("+ rule_lift", "+ bilinear"),
        ("+ other", "+ bilinear"),
        ("+ other", "+ rule_lift"),
        ("+ other x2", "+ rule_lift x2"),
    }
    for entry in record["differences"]:
        mine = record["rows"][entry["row"]][entry["column"]]
        than = record["rows"][entry["than"]][entry["column"]]
        assert entry["difference"] == pytest.approx(mine - than, abs=1e-9)
        assert entry["low"] <= entry["difference"] <= entry["high"]
    columns = {entry["column"] for entry in record["differences"]}
    assert {"cosine x2", "centred x2", "probe x2", "self-match@0.05", "SPair PCK@.1"} <= columns


def test_no_data_is_one_line(cli, tmp_path):
    ran = cli("quality", "--dataroot", tmp_path, "--lift_path", "none.pth")
    assert ran.code == 2 and "correct --dataroot" in ran.err and "Traceback" not in ran.err


def test_modules_of_one_name_are_told_apart_by_their_folders():
    assert list(quality.module_rows(["a/lift.pth"])) == ["+ LiFT"]
    assert list(quality.module_rows(["a/lift.pth", "b/lift.pth"])) == ["+ a/lift", "+ b/lift"]
    with pytest.raises(ValueError, match="rename one"):
        quality.module_rows(["a/lift.pth", "a/lift.pth"])


# ---- cost ---------------------------------------------------------------------------------------


def test_macs_are_those_of_a_count_by_hand(rule_backbone):
    """Linear layers and fused attention, which torch's counter passes over on a CPU, are in."""
    extractor = ViTExtractor(rule_backbone[1], None, device="cpu", backbone_path=rule_backbone[3])
    images = torch.zeros(1, 3, 224, 224)
    width, tokens, cells = 192, 197, 196
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    wanted = cells * 768 * width + 11 * block + tokens * width**2
    assert quality.count_macs(lambda: extractor(images)) == wanted

    mid, half = (width + 32) // 2, width // 2
    photo = 112**2 * 32 * 27 + 56**2 * 32 * 288 + 14**2 * 32 * 288
    fused = cells * (width + 32) * 4 * mid
    fused += 4 * cells * 9 * half * (mid + 32 + half) + 4 * cells * half * width
    lift = LiFT(width).eval()
    feats = torch.zeros(1, width, 14, 14)
    assert quality.count_macs(lambda: lift(images, feats)) == photo + fused


# ---- statistics ---------------------------------------------------------------------------------


def test_errors_are_those_of_the_textbook():
    values = np.random.RandomState(0).randn(50)
    units = quality.alike(list(values))
    assert units.mean() == pytest.approx(values.mean())
    assert units.error() == pytest.approx(values.std() / 50**0.5)
    weighted = quality.Units(np.array([0.0, 100.0]), np.array([3.0, 1.0]))
    assert weighted.mean() == 25
    assert weighted.error() == pytest.approx((0.75**2 * 25**2 + 0.25**2 * 75**2) ** 0.5)


def test_interval_is_paired_and_seeded():
    """What both modules share, such as hard photos, does not widen the interval."""
    random = np.random.RandomState(0)
    hard = 100 * random.randn(200)
    one, other = quality.alike(list(hard + 1 + random.randn(200))), quality.alike(list(hard))
    found = quality.interval(one, other)
    assert found == quality.interval(one, other)
    error = (one.values - other.values).std() / 200**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found["low"] < 1 < found["high"]


# ---- measures -----------------------------------------------------------------------------------


def test_points_of_a_copy_show_the_same():
    """The copy's colours at the places are the photo's at the points, but for the jitter."""
    small = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    photo = F.interpolate(255 * small, size=(448, 448), mode="bicubic")[0].clamp(0, 255).byte()
    for seed in range(5):
        random = np.random.RandomState(seed)
        copy, matrix = quality.turned_copy(photo, random)
        points, places = quality.points_in_both(matrix, 448, random)
        assert len(points) == len(places) == quality.POINTS

        first = sample(photo, points)
        second = sample(copy, places)
        together = np.corrcoef(first.flatten(), second.flatten())[0, 1]
        assert together > 0.98
        assert np.corrcoef(first.flatten(), sample(copy, points).flatten())[0, 1] < 0.9
        size = np.sqrt(np.linalg.det(matrix[:, :2]))
        assert 0.75 <= size <= 1.25


def sample(photo, points):
    """Colours [P, 3] at the nearest pixels."""
    x, y = points.round().long().t()
    return photo[:, y, x].t().numpy().astype(float)


def test_self_match_finds_what_is_the_same():
    torch.manual_seed(0)
    feats = torch.randn(16, 28, 28)
    points = torch.rand(40, 2) * 432 + 8
    same = quality.self_match(feats, feats, points, points, 448)
    assert same[0] > 95 and same.tolist() == sorted(same.tolist())
    moved = points + torch.tensor([32, 0])
    shifted = quality.self_match(feats, feats.roll(2, 2), points, moved, 448)
    assert shifted[1] > 85
    other = quality.self_match(feats, torch.randn(16, 28, 28), points, points, 448)
    assert other[0] < 10


def test_probe_knows_the_features_it_was_fitted_on():
    torch.manual_seed(0)
    centres = torch.randn(40, 24)
    kinds = torch.randint(40, (6, 20, 20))
    maps = centres[kinds].permute(0, 3, 1, 2) + 0.1 * torch.randn(6, 24, 20, 20) + 3
    fitted = quality.fit(maps)
    torch.testing.assert_close(fitted.mean[:, 0, 0], maps.mean((0, 2, 3)))
    labels = fitted.labels(maps[0])
    assert len(labels.unique()) > 20
    assert fitted.agreement(maps[0], labels) > 95
    assert fitted.agreement(maps[1], labels) < 20
    again = quality.fit(maps)
    assert torch.equal(again.weight, fitted.weight)
