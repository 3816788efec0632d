"""benchmarks/quality.py: cells come from the right scripts, measures are those counted by hand."""

import json
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import quality
import torch
import torch.nn.functional as F
from PIL import Image

from lift import LiFT
from photos import list_images


class Row(NamedTuple):
    """What a row of the tables stands for: the scripts' flags, and what they ask for."""

    flags: list[Any]
    imsize: int
    iterations: int


def wanted_rows(lift):
    """The rows at 64 pixels with the module at a path."""
    return {
        "backbone": Row(["--imsize", 64], 64, 1),
        "+ bilinear": Row(["--imsize", 64, "--upsample", "bilinear"], 64, 1),
        "+ LiFT": Row(["--imsize", 64, "--lift_path", lift], 64, 1),
        "+ LiFT x2": Row(["--imsize", 64, "--lift_path", lift, "--lift_iter", 2], 64, 2),
        "backbone at 128": Row(["--imsize", 128], 128, 1),
    }


@pytest.fixture
def dataroot(tmp_path):
    """A SPair pair of a random photo and the same with noise; both are measured on, too."""
    root = tmp_path / "data"
    images = root / "SPair-71k/JPEGImages/cat"
    pairs = root / "SPair-71k/PairAnnotation/test"
    images.mkdir(parents=True)
    pairs.mkdir(parents=True)

    random = np.random.RandomState(0)
    small = Image.fromarray(random.randint(0, 256, (8, 8, 3), np.uint8))
    photo = small.resize((64, 64), Image.Resampling.BICUBIC)
    noisy = np.asarray(photo) + random.normal(0, 20, (64, 64, 3))
    photo.save(images / "a.png")
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / "b.png")
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
    """The JSON of the last line of a run that went well."""
    assert ran.code == 0, ran.err
    return ran.report()


def iterations_of(features):
    """What --lift_iter was, for the rows above."""
    return max(1, int(features.factor).bit_length() - 1)


@pytest.fixture
def quick(monkeypatch):
    """Few resamples; cost is not measured, its columns tell what it was asked for."""
    monkeypatch.setattr(quality, "RESAMPLES", 200)
    monkeypatch.setattr(
        quality, "cost", lambda features, imsize: {"GMACs": imsize, "ms": iterations_of(features)}
    )


# ---- the command line ---------------------------------------------------------------------------


def test_cells_are_those_of_the_scripts(cli, dataroot, tmp_path, rule_backbone, rule_lift, quick):
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
    for name, row in wanted_rows(rule_lift).items():
        cells = record["rows"][name]
        dot = last(cli("eval_spair", *spair, *row.flags, "--match", "dot"))["results"]["mean"]
        cosine = last(cli("eval_spair", *spair, *row.flags, "--match", "cosine"))["results"]["mean"]
        assert cells["SPair PCK@.1"] == dot["pck@0.1"]
        assert cells["PCK@.05"] == dot["pck@0.05"]
        assert cells["PCK@.1 cos"] == cosine["pck@0.1"]
        assert cells["GMACs"] == row.imsize
        assert cells["ms"] == row.iterations
        assert f"\n| {name} | {quality.number(dot['pck@0.1'])} ± 0" in tables
    finest = record["rows"]["backbone at 128"]  # columns could be mixed up where all are equal
    assert 0 < finest["PCK@.05"] < finest["SPair PCK@.1"]

    # the cosines are those of the training's own validation
    measure = ["--evaluate", rule_lift, "--val_dataroot", photos, "--imsize", 128, "--workers", 0]
    measure += ["--downsample", "resize"]
    wanted = last(cli("train_lift", *measure, *rule_backbone))["results"][str(photos)]

    def same(row, size, name):
        cells = record["rows"][row]
        assert cells[f"cosine {size}"] == pytest.approx(wanted[name], abs=1e-5)
        assert cells[f"centred {size}"] == pytest.approx(wanted[f"{name}_centred"], abs=2e-5)

    same("backbone", "x2", "nearest")
    same("+ bilinear", "x2", "bilinear")
    same("+ LiFT", "x2", "lift")
    same("+ bilinear", "x4", "bilinear_twice")
    same("+ LiFT x2", "x4", "lift_twice")


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


@pytest.fixture
def davis_alone(monkeypatch):
    """DAVIS is the one data set, and is not read: the flags that eval_davis.py would get."""
    given = []

    def columns(dataset, argv):
        given.append(argv)
        return {}

    monkeypatch.setattr(quality, "find_roots", lambda dataroot: {"DAVIS": dataroot})
    monkeypatch.setattr(quality, "davis_columns", columns)
    return given


def test_a_backbone_of_ones_own_has_its_own_section(cli, import_path, quick, davis_alone):
    """The default of --model_type, which it does not use, keeps its section and its runs."""
    source = "from torch import nn\ndef patches():\n    return nn.Conv2d(3, 8, 16, 16)\n"
    (import_path / "own_patches.py").write_text(source)
    torch.save(LiFT(8, 16).state_dict(), "lift.pth")
    other = {"settings": {"versions": {}}, "command": "another", "machine": "another", "rows": {}}
    (import_path / "table.json").write_text(json.dumps({"dino_vits8": other}))

    flags = ["--dataroot", ".", "--imsize", 64, "--lift_path", "lift.pth", "--output", "table"]
    flags += ["--my_extractor", "own_patches:patches", "--runs", import_path / "some runs"]
    record = last(cli("quality", *flags))
    written = json.loads((import_path / "table.json").read_text())
    assert written == {"dino_vits8": other, "own_patches:patches": record}

    folder = import_path / "some runs/own_patches_patches/backbone/davis"
    assert davis_alone[0][-2:] == ["--output_dir", str(folder)]
    assert record["commands"][0].endswith(" --output_dir runs/own_patches_patches/backbone/davis")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataroot", "empty"], "empty holds none of .*: correct --dataroot"),
        (["--output", "old"], "old.json was not written by this script .*: remove it, or pass"),
        (["--output", "data"], "cannot write data.json .*: free some space"),
        (["--imsize", 48], "--imsize 48 is not a multiple of 32, twice the patch: pass 64"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(
    cli, dataroot, tmp_path, rule_backbone, rule_lift, monkeypatch, flags, said
):
    def measured(*args):
        raise AssertionError("measured")

    for name in ("fit", "spair_columns", "cost"):
        monkeypatch.setattr(quality, name, measured)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text('{"other": {"rows": {}}}')
    (tmp_path / "data.json").mkdir()
    photos = ["--photos", dataroot, "--fit_photos", dataroot]
    common = ["--dataroot", dataroot, "--lift_path", rule_lift, "--output", "table", "--imsize", 64]
    ran = cli("quality", *common, *photos, *rule_backbone, *flags)
    assert ran.code == 2 and not ran.out
    assert ran.err.count("\n") == 1 and re.search(said, ran.err), ran.err
    assert not (tmp_path / "table.json").exists()


def test_default_photos_are_no_masks(tmp_path):
    year = tmp_path / "voc/VOC2012/VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass"):
        (year / name).mkdir(parents=True)
    coco = tmp_path / "coco20k/COCO/images"
    coco.mkdir(parents=True)
    assert quality.default_photos(str(tmp_path)) == [str(year / "JPEGImages"), str(coco)]


def test_all_shared_photos_are_measured(shared):
    """As many as the committed tables are of."""
    paths = []
    for folder in quality.default_photos(str(shared / "data")):
        paths += list_images(folder)
    assert len(paths) == 84
    assert quality.spread(paths, quality.MOST_PHOTOS) == paths


def test_of_many_photos_some_are_taken_evenly():
    assert quality.spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert quality.spread(list(range(3)), 4) == [0, 1, 2]


def test_modules_of_one_name_are_told_apart_by_their_folders():
    assert list(quality.module_rows(["a/lift.pth"])) == ["+ LiFT"]
    assert list(quality.module_rows(["a/lift.pth", "b/lift.pth"])) == ["+ a/lift", "+ b/lift"]
    with pytest.raises(ValueError, match="rename one"):
        quality.module_rows(["a/lift.pth", "a/lift.pth"])


# ---- statistics ---------------------------------------------------------------------------------


def test_errors_are_those_of_the_textbook():
    values = np.random.RandomState(0).randn(50)
    units = quality.alike(list(values))
    assert units.figure() == pytest.approx(values.mean())
    assert units.error() == pytest.approx(values.std() / 50**0.5)
    # shares 3/4 and 1/4; distances 25 and 75 to the mean
    weighted = quality.Units(np.array([0.0, 100.0]), np.array([3.0, 1.0]))
    assert weighted.figure() == 25
    assert weighted.error() == pytest.approx((0.75**2 * 25**2 + 0.25**2 * 75**2) ** 0.5)


def test_mean_iou_of_frames_is_that_of_their_pixels_together():
    """Classes that no frame has do not count; a frame drawn twice counts twice."""
    one = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    two = np.array([[0, 2, 0], [2, 0, 0], [0, 0, 0]])
    frames = quality.Frames(np.stack([one, two]))
    assert frames.figure(np.array([0])) == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert frames.figure() == pytest.approx(100 * (3 / 8 + 4 / 9) / 2)
    assert frames.figure(np.array([0, 1, 1])) == pytest.approx(100 * (3 / 12 + 4 / 13) / 2)
    assert 0 < frames.error() < 50
    assert quality.interval(frames, frames) == {"difference": 0, "low": 0, "high": 0}


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
