"""lift_extractor.py by its command line, on photos of every size, against LiFT applied by hand."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from plain_extract import plain_lift, plain_map
from safetensors import safe_open

from extractor import ViTExtractor, build_backbone
from lift import load_lift, map_to_tokens
from lift_extractor import ViTLiFTExtractor, batches, placement

SAMPLE = ROOT / "assets" / "sample.jpg"


@pytest.fixture
def photos(tmp_path):
    """Three photos of two sizes in a folder with a subfolder, and one that is broken."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, size in {"a.png": (48, 64), "b.png": (48, 64), "sub/a.png": (64, 48)}.items():
        Image.fromarray(random.randint(0, 255, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(SAMPLE.read_bytes()[:2000])
    return folder


def slow(backbone, lift, path, load_size, iterations=1):
    """What the command must give for a photo: map [1, C, 2^n h, 2^n w] by the plain versions."""
    vit = ViTExtractor(backbone[1], device="cpu", backbone_path=backbone[3])
    images, _ = vit.preprocess(path, load_size)
    model = build_backbone(backbone[1], backbone[3]).eval()
    return plain_lift(load_lift(lift, silent=True), images, plain_map(model, images, 11, "key", 16), iterations)


@pytest.mark.parametrize("iterations", [1, 2])
def test_reference_command(cli, tmp_path, rule_backbone, rule_lift, iterations):
    more = ["--lift_iter", iterations] if iterations > 1 else []
    args = ["--image_path", SAMPLE, "--output_path", tmp_path / "sample.pth", *rule_backbone, "--lift_path", rule_lift]
    ran = cli("lift_extractor", *args, "--load_size", 64, "--channel", 192, "--patch", 16, *more)
    assert ran.code == 0, ran.err
    found = torch.load(tmp_path / "sample.pth")
    wanted = map_to_tokens(slow(rule_backbone, rule_lift, SAMPLE, 64, iterations))
    assert found.device.type == "cpu" and found.shape == (1, 4 * 6 * 4**iterations, 192)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    last = json.loads(ran.out.splitlines()[-1])
    assert (last["written"], last["load_size"], last["lift_iter"], last["model_type"]) == (1, 64, iterations, rule_backbone[1])


def test_a_folder_in_every_format(cli, tmp_path, photos, rule_backbone, rule_lift):
    for kind in ("pth", "npz", "safetensors"):
        args = ["--image_path", photos, "--output_path", tmp_path / kind, "--format", kind, "--load_size", 0]
        ran = cli("lift_extractor", *args, *rule_backbone, "--lift_path", rule_lift, "--batch_size", 2)
        assert ran.code == 0
        assert [line for line in ran.err.splitlines() if line.startswith("skipped: ") and "broken.jpg" in line]
        last = json.loads(ran.out.splitlines()[-1])
        assert (last["written"], last["unreadable"]) == (3, 1)
        names = sorted(str(f.relative_to(tmp_path / kind)) for f in (tmp_path / kind).rglob("*.*"))
        assert names == [f"{name}.{kind}" for name in ("a.png", "b.png", "sub/a.png")]
    for name in ("a.png", "b.png", "sub/a.png"):
        wanted = slow(rule_backbone, rule_lift, photos / name, None)
        tokens = torch.load(tmp_path / f"pth/{name}.pth")
        torch.testing.assert_close(tokens, map_to_tokens(wanted), rtol=0, atol=1e-4)
        arrays = np.load(tmp_path / f"npz/{name}.npz")
        np.testing.assert_allclose(arrays["map"], wanted[0], rtol=0, atol=1e-4)
        assert arrays["grid"].tolist() == list(wanted.shape[2:])
        assert arrays["image_size"].tolist() == arrays["input_size"].tolist() == [8 * n for n in wanted.shape[2:]]
        assert (float(arrays["first_x"]), float(arrays["step_y"])) == (4, 8)
        assert json.loads(str(arrays["settings"]))["format"] == "npz"
        with safe_open(tmp_path / f"safetensors/{name}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("map"), torch.from_numpy(arrays["map"]))
            assert json.loads(file.metadata()["grid"]) == arrays["grid"].tolist()


def test_resumes_and_overwrites(cli, tmp_path, photos, rule_backbone):
    out = tmp_path / "out"
    args = ["lift_extractor", "--image_path", photos, "--output_path", out, *rule_backbone, "--load_size", 32]
    (out / "sub").mkdir(parents=True)
    (out / "sub/a.png.pth").write_text("from an earlier run")
    assert json.loads(cli(*args).out.splitlines()[-1])["written"] == 2
    assert (out / "sub/a.png.pth").read_text() == "from an earlier run"
    ran = cli(*args)
    assert ran.code == 2 and "broken.jpg" in ran.err, "nothing left but what cannot be read"
    (photos / "broken.jpg").unlink()
    ran = cli(*args)
    assert ran.code == 0 and json.loads(ran.out.splitlines()[-1])["written"] == 0
    assert json.loads(cli(*args, "--overwrite").out.splitlines()[-1])["written"] == 3
    assert torch.load(out / "sub/a.png.pth").shape == (1, 2 * 3, 192)


def test_ranks_share_the_work(cli, tmp_path, photos, rule_backbone, monkeypatch):
    (photos / "broken.jpg").unlink()
    written = []
    for rank in (0, 1):  # into one folder, the second when the first has finished: its share must not depend on that
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        args = ["--image_path", photos, "--output_path", tmp_path / "out", *rule_backbone, "--load_size", 32]
        written.append(json.loads(cli("lift_extractor", *args).out.splitlines()[-1])["written"])
    assert written == [2, 1], "no file is written twice"
    names = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.pth")}
    assert names == {"a.png.pth", "b.png.pth", "sub/a.png.pth"}


def test_patterns_and_workers(cli, tmp_path, photos, rule_backbone):
    args = ["--image_path", f"{photos}/**/a.png", photos / "b.png", "--output_path", tmp_path / "out", *rule_backbone]
    ran = cli("lift_extractor", *args, "--load_size", 32, "--workers", 1, "--format", "npz")
    assert ran.code == 0, ran.err
    assert {f.name for f in (tmp_path / "out").rglob("*.npz")} == {"a.png.npz", "b.png.npz"}
    assert len(list((tmp_path / "out").rglob("*.npz"))) == 3


def test_batches_are_of_one_size():
    sizes = [1, 2, 1, 3, 2, 1, 1, 4, 5, 6, 7, 8, 9, 10]
    items = [(i, None if s == 4 else torch.zeros(3, s, s), None) for i, s in enumerate(sizes)]
    found = list(batches(items, 2))
    assert sorted(i for batch in found for i, *_ in batch) == list(range(len(sizes)))
    for batch in found:
        assert len(batch) <= 2 and len({item[1] if item[1] is None else item[1].shape for item in batch}) == 1
    assert [[i for i, *_ in batch] for batch in found][:2] == [[0, 2], [1, 4]]


def test_picture(cli, tmp_path, rule_backbone, rule_lift):
    args = ["--image_path", SAMPLE, "--output_path", tmp_path / "x.pth", *rule_backbone, "--load_size", 64]
    assert cli("lift_extractor", *args, "--lift_path", rule_lift, "--picture", tmp_path / "x.png").code == 0
    sheet = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    width = round(336 * 96 / 64)
    assert sheet.shape == (336 + 28 + 8, 8 + 3 * (width + 8), 3), "photo, backbone, LiFT"
    photo = sheet[28 : 28 + 336, 8 : 8 + width]
    real = Image.open(SAMPLE).resize((96, 64), Image.Resampling.LANCZOS).resize((width, 336), Image.Resampling.LANCZOS)
    assert np.abs(photo - np.asarray(real)).mean() < 2
    coarse = sheet[28 : 28 + 336, 16 + width : 16 + 2 * width]
    assert (coarse[:80, :80] == coarse[40, 40]).all(), "one colour a cell"
    assert (sheet[:, -8:] == 255).all() and (sheet[-8:] == 255).all()


def test_out_size_stride_and_placement(cli, tmp_path, rule_backbone, rule_lift):
    base = ["--image_path", SAMPLE, *rule_backbone, "--load_size", 64]
    assert cli("lift_extractor", *base, "--output_path", tmp_path / "s.npz", "--stride", 8).code == 0
    fine = np.load(tmp_path / "s.npz")
    assert fine["map"].shape == (192, 7, 11)
    sized = [*base, "--lift_path", rule_lift, "--out_size", 30, 40]
    assert cli("lift_extractor", *sized, "--output_path", tmp_path / "o.npz").code == 0
    assert np.load(tmp_path / "o.npz")["map"].shape == (192, 30, 40)
    vit = SimpleNamespace(patch=16, stride=8, grid=lambda h, w: (1 + (h - 16) // 8, 1 + (w - 16) // 8))
    place = placement(vit, (64, 96), (300, 451), (7, 11))
    assert place["first_y"] == pytest.approx(8 * 300 / 64), "the first patch is centred on pixel 8 of the resized photo"
    assert place["step_x"] == pytest.approx(8 * 451 / 96)
    vit = SimpleNamespace(patch=16, stride=16, grid=lambda h, w: (h // 16, w // 16))
    place = placement(vit, (64, 96), (64, 96), (16, 24))
    assert (place["first_x"], place["step_x"]) == (2, 4), "LiFT twice: cells of 4 pixels"


def test_reference_api(rule_backbone, rule_lift):
    name, path = rule_backbone[1], rule_backbone[3]
    vit = ViTLiFTExtractor(name, rule_lift, 192, 16, device="cpu", silent=True, backbone_path=path)
    images, _ = vit.preprocess(SAMPLE, 64)
    once, twice = slow(rule_backbone, rule_lift, SAMPLE, 64), slow(rule_backbone, rule_lift, SAMPLE, 64, 2)
    torch.testing.assert_close(vit(images), once, rtol=0, atol=1e-4)
    torch.testing.assert_close(vit.extract_descriptors(images), map_to_tokens(once), rtol=0, atol=1e-4)
    torch.testing.assert_close(vit.extract_descriptors_iterative_lift(images, 2), map_to_tokens(twice), rtol=0, atol=1e-4)
    steps = vit.extract_descriptors_iterative_lift(images, 2, return_inter=True)
    assert [step.shape[1] for step in steps] == [4 * 24, 16 * 24]
    torch.testing.assert_close(steps[1], map_to_tokens(twice), rtol=0, atol=1e-4)
    bare = ViTLiFTExtractor(name, device="cpu", backbone_path=path)
    assert bare.extract_descriptors(images).shape == (1, 24, 192)
    with pytest.raises(ValueError, match="pass lift_path"):
        bare.extract_descriptors_iterative_lift(images)


@pytest.mark.parametrize("size", [(224, 224), (298, 224), (16, 16), (37, 500), (320, 240)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_real_weights_on_real_photos(shared, vit_tiny, golden_lift, tmp_path, cli, size, iterations):
    photo = Image.open(sorted((shared / "data/coco20k").rglob("*.jpg"))[0]).convert("RGB").resize(size)
    photo.save(tmp_path / "x.png")
    args = ["--image_path", tmp_path / "x.png", "--output_path", tmp_path / "x.npz", *vit_tiny, "--load_size", 0]
    assert cli("lift_extractor", *args, "--lift_path", golden_lift, "--lift_iter", iterations).code == 0
    feats = np.load(tmp_path / "x.npz")["map"]
    grid = [max(1, int(side / 16 + 0.5)) * 2**iterations for side in reversed(size)]
    assert list(feats.shape) == [192, *grid] and np.isfinite(feats).all() and feats.std() > 0.01


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "missing photo": (["--image_path", "none.jpg"], "no images at none.jpg"),
    "no image": (["--image_path", "text.jpg"], "text.jpg is not a readable image"),
    "truncated": (["--image_path", "cut.jpg"], "cut.jpg is not a readable image"),
    "tiny photo": (["--image_path", "tiny.png", "--load_size", "0"], "less than one patch (16): pass a larger --load_size"),
    "empty folder": (["--image_path", "."], "no images at"),
    "model": (["--model_type", "vit_foo"], "unknown model vit_foo: pass one of dino_vits16"),
    "facet": (["--facet", "keys"], "invalid choice"),
    "layer": (["--layer", "12"], "layer 12 is out of range"),
    "stride": (["--stride", "5"], "stride 5 does not divide the patch"),
    "stride with LiFT": (["--stride", "8", "--lift_path", "LIFT"], "leave out --stride for LiFT"),
    "channel": (["--channel", "384"], "leave --channel out"),
    "no LiFT": (["--upsample", "lift"], "pass --lift_path"),
    "lift_iter": (["--lift_iter", "-1"], "pass 0 or more"),
    "out_size": (["--out_size", "0", "4"], "pass H W"),
    "width": (["--lift_path", "wide.pth"], "384 channels"),
    "missing LiFT": (["--lift_path", "none.pth"], "no LiFT checkpoint at none.pth"),
    "missing weights": (["--backbone_path", "none.pth"], "no weights at none.pth"),
    "device": (["--device", "cuda:77"], "pass --device cpu"),
    "unwritable": (["--output_path", "text.jpg/x/y.pth"], "cannot write text.jpg/x/y.pth"),
    "output is a file": (["--image_path", "text.jpg", str(SAMPLE), "--output_path", "text.jpg"], "pass another --output_path"),
    "unknown flag": (["--lift_itre", "2"], "unrecognized arguments"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli, tmp_path, monkeypatch, rule_backbone, rule_lift, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("hello") if case != "empty folder" else None
    if case != "empty folder":
        (tmp_path / "cut.jpg").write_bytes(SAMPLE.read_bytes()[:5000])
        Image.new("RGB", (200, 15)).save(tmp_path / "tiny.png")
        torch.save({"outc.weight": torch.zeros(384, 192, 1, 1)}, tmp_path / "wide.pth")
    before = sorted(tmp_path.rglob("*"))
    args = ["--image_path", SAMPLE, "--output_path", "out/x.pth", *rule_backbone]
    flags, message = BAD[case]
    ran = cli("lift_extractor", *args, *[str(rule_lift) if flag == "LIFT" else flag for flag in flags])
    errors = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert ran.code == 2 and len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_as_a_process(tmp_path):
    args = [sys.executable, "lift_extractor.py", "--image_path", "none.jpg", "--output_path", str(tmp_path / "x.pth")]
    ran = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "lift_extractor.py: no images at none.jpg: pass an image, a folder of images or a quoted pattern\n"
