"""lift_extractor.py by its command line, on photos of every size, against LiFT by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from plain_extract import plain_lift, plain_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import extraction
import features
import lift_extractor as script
from backbones import build_backbone
from extraction import Photos, batches, placement
from extractor import ViTExtractor
from files import SETTINGS
from lift import LiFT, load_lift, map_to_tokens
from lift_extractor import ViTLiFTExtractor, find_jobs

SAMPLE = ROOT / "assets" / "sample.jpg"
NAMES = ("a.png", "b.png", "sub/a.png")


@pytest.fixture
def photos(tmp_path):
    """Three photos of two sizes in a folder with a subfolder, and one that is broken."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, size in {"a.png": (48, 64), "b.png": (48, 64), "sub/a.png": (64, 48)}.items():
        pixels = random.randint(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.jpg").write_bytes(SAMPLE.read_bytes()[:2000])
    return folder


def slow(backbone, lift, path, load_size, iterations=1):
    """What the command must give for a photo: map [1, C, 2^n h, 2^n w] by the plain versions."""
    vit = ViTExtractor(backbone[1], None, device="cpu", backbone_path=backbone[3])
    images, _ = vit.preprocess(path, load_size)
    model = build_backbone(backbone[1], backbone[3]).eval()
    feats = plain_map(model, images, 11, "key", 16)
    return plain_lift(load_lift(lift, silent=True), images, feats, iterations)


def counts(ran):
    """(written, kept, skipped) of a run."""
    results = ran.report()
    return results["written"], results["kept"], results["skipped"]


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2])
def test_reference_command(cli, tmp_path, rule_backbone, rule_lift, iterations):
    out = tmp_path / "sample.pth"
    args = ["--image_path", SAMPLE, "--output_path", out, *rule_backbone, "--lift_path", rule_lift]
    args += ["--load_size", 64, "--channel", 192, "--patch", 16]
    if iterations > 1:
        args += ["--lift_iter", iterations]
    ran = cli("lift_extractor", *args)
    assert ran.code == 0, ran.err
    found = torch.load(out)
    wanted = map_to_tokens(slow(rule_backbone, rule_lift, SAMPLE, 64, iterations))
    assert found.device.type == "cpu"
    assert found.shape == (1, 4 * 6 * 4**iterations, 192)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)

    last = ran.report()
    assert last["written"] == 1
    assert last["load_size"] == 64
    assert last["lift_iter"] == iterations
    assert last["model_type"] == rule_backbone[1]
    assert (last["layer"], last["stride"], last["upsample"]) == (11, 16, "lift"), "resolved"
    assert last["device"] != "auto"


def test_a_folder_in_every_format(cli, tmp_path, photos, rule_backbone, rule_lift):
    for kind in ("pth", "npz", "safetensors"):
        out = tmp_path / kind
        args = ["--image_path", photos, "--output_path", out, "--format", kind, "--load_size", 0]
        args += [*rule_backbone, "--lift_path", rule_lift, "--batch_size", 2]
        ran = cli("lift_extractor", *args)
        assert ran.code == 0
        skipped = [line for line in ran.err.splitlines() if line.startswith("skipped: ")]
        assert len(skipped) == 1
        assert "broken.jpg" in skipped[0]
        assert counts(ran) == (3, 0, 1)
        names = sorted(str(file.relative_to(out)) for file in out.rglob(f"*.{kind}"))
        assert names == [f"{name}.{kind}" for name in NAMES]

    for name in NAMES:
        wanted = slow(rule_backbone, rule_lift, photos / name, None)
        tokens = torch.load(tmp_path / f"pth/{name}.pth")
        torch.testing.assert_close(tokens, map_to_tokens(wanted), rtol=0, atol=1e-4)

        arrays = np.load(tmp_path / f"npz/{name}.npz")
        np.testing.assert_allclose(arrays["map"], wanted[0], rtol=0, atol=1e-4)
        assert arrays["grid"].tolist() == list(wanted.shape[2:])
        pixels = [8 * cells for cells in wanted.shape[2:]]
        assert arrays["image_size"].tolist() == pixels
        assert arrays["input_size"].tolist() == pixels
        assert (float(arrays["first_x"]), float(arrays["step_y"])) == (4, 8)
        made_by = json.loads(str(arrays["settings"]))
        assert made_by["format"] == "npz"
        assert made_by["image_path"] == [str(photos / name)], "its own photo only"

        with safe_open(tmp_path / f"safetensors/{name}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("map"), torch.from_numpy(arrays["map"]))
            assert json.loads(file.metadata()["grid"]) == arrays["grid"].tolist()


def test_a_file_out_of_a_batch_holds_its_own_memory_only(cli, tmp_path, photos, rule_backbone):
    args = ["--image_path", photos, *rule_backbone, "--load_size", 48]
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert cli("lift_extractor", *args, "--output_path", together, "--batch_size", 2).code == 0
    assert cli("lift_extractor", *args, "--output_path", alone, "--batch_size", 1).code == 0
    for name in NAMES:
        size = (together / f"{name}.pth").stat().st_size
        assert size == (alone / f"{name}.pth").stat().st_size


def test_picture(cli, tmp_path, rule_backbone, rule_lift):
    args = ["--image_path", SAMPLE, "--output_path", tmp_path / "x.pth", *rule_backbone]
    args += ["--load_size", 64, "--lift_path", rule_lift, "--picture", tmp_path / "x.png"]
    assert cli("lift_extractor", *args).code == 0
    sheet = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    width = round(336 * 96 / 64)
    assert sheet.shape == (336 + 28 + 8, 8 + 3 * (width + 8), 3), "photo, backbone, LiFT"

    photo = sheet[28 : 28 + 336, 8 : 8 + width]
    fitted = Image.open(SAMPLE).resize((96, 64), Image.Resampling.LANCZOS)
    real = fitted.resize((width, 336), Image.Resampling.LANCZOS)
    assert np.abs(photo - np.asarray(real)).mean() < 2
    coarse = sheet[28 : 28 + 336, 16 + width : 16 + 2 * width]
    assert (coarse[:80, :80] == coarse[40, 40]).all(), "one colour a cell"
    assert (sheet[:, -8:] == 255).all()
    assert (sheet[-8:] == 255).all()


def test_out_size_stride_and_placement(cli, tmp_path, rule_backbone, rule_lift):
    base = ["--image_path", SAMPLE, *rule_backbone, "--load_size", 64]
    strided = [*base, "--stride", 8]
    assert cli("lift_extractor", *strided, "--output_path", tmp_path / "s.npz").code == 0
    fine = np.load(tmp_path / "s.npz")
    assert fine["map"].shape == (192, 7, 11)
    sized = [*base, "--lift_path", rule_lift, "--out_size", 30, 40]
    assert cli("lift_extractor", *sized, "--output_path", tmp_path / "o.npz").code == 0
    assert np.load(tmp_path / "o.npz")["map"].shape == (192, 30, 40)

    def half_stride_grid(height, width):
        return 1 + (height - 16) // 8, 1 + (width - 16) // 8

    vit = SimpleNamespace(patch=16, stride=8, grid=half_stride_grid)
    place = placement(vit, (64, 96), (300, 451), (7, 11))
    y, x = 8 * 300 / 64, 8 * 451 / 96  # the first patch's centre is pixel 8, and so is the step
    assert place == pytest.approx({"first_y": y, "first_x": x, "step_y": y, "step_x": x})

    def patch_grid(height, width):
        return height // 16, width // 16

    vit = SimpleNamespace(patch=16, stride=16, grid=patch_grid)
    place = placement(vit, (64, 96), (128, 96), (16, 24))
    # LiFT twice: cells of 4 pixels, and the photo was read at half its height
    assert place == pytest.approx({"first_y": 4, "first_x": 2, "step_y": 8, "step_x": 4})


# ---- going on -----------------------------------------------------------------------------------


def test_resumes_and_overwrites(cli, tmp_path, photos, rule_backbone):
    out = tmp_path / "out"
    args = ["lift_extractor", "--image_path", photos, "--output_path", out, *rule_backbone]
    args += ["--load_size", 32]
    assert counts(cli(*args)) == (3, 0, 1)
    (out / "sub/a.png.pth").write_text("from an earlier run")
    (out / "a.png.pth").unlink()
    assert counts(cli(*args)) == (1, 2, 1)
    assert (out / "sub/a.png.pth").read_text() == "from an earlier run"
    ran = cli(*args)
    assert ran.code == 2, "nothing left but what cannot be read"
    assert "broken.jpg" in ran.err
    (photos / "broken.jpg").unlink()
    ran = cli(*args)
    assert ran.code == 0
    assert counts(ran) == (0, 3, 0)
    assert counts(cli(*args, "--channel", 192, "--patch", 16)) == (0, 3, 0), "only checked"
    assert counts(cli(*args, "--overwrite")) == (3, 0, 0)
    assert torch.load(out / "sub/a.png.pth").shape == (1, 2 * 3, 192)


def test_photos_of_another_folder_are_refused(cli, tmp_path, rule_backbone):
    """Their names may be the same: then they would count as done."""
    for day, colour in (("day1", "red"), ("day2", "blue")):
        (tmp_path / day).mkdir()
        Image.new("RGB", (64, 48), colour).save(tmp_path / day / "1.png")
    out = tmp_path / "out"
    args = ["lift_extractor", "--output_path", f"{out}/", *rule_backbone, "--load_size", 32]
    assert cli(*args, "--image_path", tmp_path / "day1").code == 0
    before = (out / "1.png.pth").read_bytes()

    ran = cli(*args, "--image_path", tmp_path / "day2")
    assert ran.code == 2
    assert f"{out}/ was made with image_folders" in ran.err
    assert "pass --overwrite, or another --output_path" in ran.err
    assert (out / "1.png.pth").read_bytes() == before

    one_of_them = tmp_path / "day1/1.png"
    assert counts(cli(*args, "--image_path", one_of_them)) == (0, 1, 0), "the same folder"
    assert counts(cli(*args, "--image_path", tmp_path / "day2", "--overwrite")) == (1, 0, 0)
    assert (out / "1.png.pth").read_bytes() != before


def test_other_settings_are_refused(cli, tmp_path, photos, rule_backbone, rule_lift):
    out = tmp_path / "out"
    args = ["lift_extractor", "--image_path", photos, "--output_path", out, *rule_backbone]
    args += ["--load_size", 32]
    lifted = [*args, "--lift_path", rule_lift]
    assert cli(*lifted).code == 0
    before = (out / "a.png.pth").read_bytes()

    other = {
        "lift_iter 1, not 2": [*lifted, "--lift_iter", 2],
        "upsample lift, not none": args,
        "facet key, not value": [*lifted, "--facet", "value"],
    }
    for difference, again in other.items():
        ran = cli(*again)
        assert ran.code == 2
        assert f"was made with {difference}: pass --overwrite" in ran.err
    assert (out / "a.png.pth").read_bytes() == before
    assert cli(*lifted, "--lift_iter", 2, "--overwrite").code == 0
    assert torch.load(out / "a.png.pth").shape == (1, 16 * 2 * 3, 192)


def test_overwriting_empties_the_folder_first(cli, tmp_path, photos, rule_backbone):
    (photos / "broken.jpg").unlink()
    out = tmp_path / "out"
    args = ["lift_extractor", "--output_path", f"{out}/", *rule_backbone, "--load_size", 32]
    assert cli(*args, "--image_path", photos).code == 0
    again = [*args, "--image_path", photos / "a.png", "--facet", "value"]
    assert counts(cli(*again, "--overwrite")) == (1, 0, 0)
    assert [str(file.relative_to(out)) for file in out.rglob("*.pth")] == ["a.png.pth"]
    assert json.loads((out / SETTINGS).read_text())["facet"] == "value"
    assert counts(cli(*again)) == (0, 1, 0)


def test_another_module_of_the_same_name_is_refused(cli, tmp_path, photos, rule_backbone):
    torch.manual_seed(0)
    path = tmp_path / "lift.pth"
    args = ["lift_extractor", "--image_path", photos, "--output_path", tmp_path / "out"]
    args += [*rule_backbone, "--load_size", 32, "--lift_path", path]
    torch.save(LiFT(192).state_dict(), path)
    assert cli(*args).code == 0
    torch.save(LiFT(192).state_dict(), path)
    ran = cli(*args)
    assert ran.code == 2
    assert "was made with lift_digest" in ran.err


def test_features_that_nobody_knows_are_kept(cli, tmp_path, photos, rule_backbone):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png.pth").write_text("of somebody else")
    args = ["--image_path", photos, "--output_path", out, *rule_backbone]
    for flags in ([], ["--overwrite"]):
        ran = cli("lift_extractor", *args, *flags)
        assert ran.code == 2
        assert f"no {SETTINGS} says what made it" in ran.err
        assert (out / "a.png.pth").read_text() == "of somebody else"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("cannot write x: free some space")])
def test_a_run_that_is_stopped_goes_on_where_it_was(
    cli, tmp_path, photos, rule_backbone, monkeypatch, error
):
    (photos / "broken.jpg").unlink()
    args = ["lift_extractor", "--image_path", photos, "--output_path", tmp_path / "out"]
    args += [*rule_backbone, "--load_size", 32, "--batch_size", 1]
    real = extraction.save
    saved = []

    def save(*args):
        if len(saved) == 2:
            raise error
        saved.append(args)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "save", save)
        ran = cli(*args)
    if error is KeyboardInterrupt:
        assert ran.code == 130
    else:
        assert ran.code == 2
        assert ran.err.endswith("cannot write x: free some space\n")
    assert counts(cli(*args)) == (1, 2, 0)


def test_pictures_asked_for_later_are_made(cli, tmp_path, photos, rule_backbone):
    args = ["lift_extractor", "--image_path", photos, "--output_path", tmp_path / "out"]
    args += [*rule_backbone, "--load_size", 32]
    assert cli(*args).code == 0
    assert counts(cli(*args, "--picture", tmp_path / "pictures")) == (3, 0, 1)
    for name in NAMES:
        assert (tmp_path / "pictures" / f"{name}.png").is_file()


def test_pictures_of_an_earlier_run_are_no_photos(cli, photos, rule_backbone, monkeypatch):
    (photos / "broken.jpg").unlink()
    monkeypatch.chdir(photos)
    args = ["lift_extractor", "--image_path", ".", "--output_path", "features/", *rule_backbone]
    args += ["--load_size", 32, "--picture", "pictures/"]
    assert counts(cli(*args)) == (3, 0, 0)
    assert counts(cli(*args)) == (0, 3, 0)

    args = ["lift_extractor", "--image_path", "sub", "--output_path", "x.pth", *rule_backbone]
    args += ["--load_size", 32, "--picture", "sub/x.png"]
    assert counts(cli(*args)) == (1, 0, 0)
    assert counts(cli(*args)) == (1, 0, 0), "still one photo, and one file"
    (photos / "x.pth").unlink()
    ran = cli(*args)
    assert ran.code == 2 and "--picture sub/x.png is one of the photos: pass" in ran.err


# ---- several processes --------------------------------------------------------------------------


def test_jobs_do_not_depend_on_what_is_there(photos, tmp_path):
    """A rank may look when another has finished: its share must not depend on that."""
    out = tmp_path / "out"
    args = Namespace(image_path=[str(photos)], output_path=str(out), format="pth", picture=None)
    first = find_jobs(args)
    for job in first[::2]:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        job.output.touch()
    assert find_jobs(args) == first, "what is there does not change what is shared out"
    names = {str(job.output.relative_to(out)) for job in first}
    assert names == {"a.png.pth", "b.png.pth", "broken.jpg.pth", "sub/a.png.pth"}


def test_ranks_share_the_work(tmp_path, photos, rule_backbone):
    """Three ranks get a.png and sub/a.png, b.png, and broken.jpg: the last has not failed."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3"]
    command += ["--master_port", "0", "--standalone", ROOT / "lift_extractor.py"]
    command += ["--image_path", photos, "--output_path", out, *rule_backbone, "--load_size", "32"]
    command += ["--device", "cpu", "--json", tmp_path / "results.json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    names = {str(file.relative_to(out)) for file in out.rglob("*.pth")}
    assert names == {"a.png.pth", "b.png.pth", "sub/a.png.pth"}

    assert ran.stdout == f"{out}: 3 written, 0 kept, 1 skipped\n", "one process tells the sum"
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["written"], results["skipped"]) == (3, 1), "no file is written twice"
    assert ran.stderr.count("skipped: ") == 1
    assert "destroy_process_group" not in ran.stderr, "as torch asks where it was not called"


def test_ranks_without_a_torchrun_are_told_before_the_work(
    cli, tmp_path, photos, rule_backbone, monkeypatch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    args = ["--image_path", photos, "--output_path", tmp_path / "out", *rule_backbone]
    ran = cli("lift_extractor", *args)
    assert ran.code == 2
    assert "start the processes with torchrun, or unset WORLD_SIZE" in ran.err
    assert not (tmp_path / "out").exists()


# ---- reading ------------------------------------------------------------------------------------


def test_patterns_and_workers(cli, tmp_path, photos, rule_backbone):
    out = tmp_path / "out"
    once_more = [photos / "b.png"] * 3
    args = ["--image_path", f"{photos}/**/a.png", *once_more, "--output_path", out]
    args += [*rule_backbone, "--load_size", 32, "--workers", 1, "--format", "npz"]
    ran = cli("lift_extractor", *args)
    assert ran.code == 0, ran.err
    files = {str(file.relative_to(out)) for file in out.rglob("*.npz")}
    assert files == {f"{name}.npz" for name in NAMES}
    assert len(ran.report()["image_path"]) == 3, "a long list is not repeated"
    assert ran.report()["image_paths"] == 4


def test_two_photos_of_one_name_are_named(cli, tmp_path, photos, rule_backbone):
    args = ["--image_path", photos / "a.png", photos / "sub/a.png", "--output_path", tmp_path / "o"]
    ran = cli("lift_extractor", *args, *rule_backbone)
    assert ran.code == 2
    assert f"{photos / 'a.png'} and {photos / 'sub/a.png'} would get one output file" in ran.err


def test_batches_are_of_one_size():
    sizes = [1, 2, 1, 3, 2, 1, 1, 4, 5, 6, 7, 8, 9, 10]
    items = []
    for index, size in enumerate(sizes):
        image = torch.zeros(3, size, size)
        if size == 4:
            image = None  # cannot be read
        items.append((index, image, None))
    found = list(batches(items, 2))

    indices = []
    everything = []
    for batch in found:
        assert len(batch) <= 2
        shapes = {None if image is None else image.shape for _, image, _ in batch}
        assert len(shapes) == 1
        indices.append([index for index, _, _ in batch])
        everything += indices[-1]
    assert sorted(everything) == list(range(len(sizes)))
    assert indices[:2] == [[0, 2], [1, 4]]


def most_waiting(sizes, batch_size):
    """How many of the photos of these sizes (H, W) wait at most when a batch comes."""
    taken = 0

    def items():
        nonlocal taken
        for height, width in sizes:
            taken += 1
            yield taken, torch.zeros(3, height, width), None

    most = 0
    done = 0
    for batch in batches(items(), batch_size):
        most = max(most, taken - done)
        done += len(batch)
    assert done == len(sizes)
    return most


def test_few_photos_wait_for_others_of_their_size(monkeypatch):
    sizes = [(1, 1 + number) for number in range(30)]
    assert most_waiting(sizes, 2) == 8, "four batches"
    monkeypatch.setattr(extraction, "MOST_PIXELS", 400)
    sizes = [(16, 16), (8, 32), (4, 64), (2, 128), (1, 256), (32, 8), (64, 4), (128, 2), (256, 1)]
    assert most_waiting(sizes, 3) == 7, "1600 pixels are less than those of seven"


def test_large_photos_come_in_small_batches(monkeypatch):
    monkeypatch.setattr(extraction, "MOST_PIXELS", 3 * 32 * 32)
    items = [(number, torch.zeros(3, 32, 32), None) for number in range(7)]
    assert [len(batch) for batch in batches(items, 4)] == [3, 3, 1]
    items = [(number, torch.zeros(3, 100, 100), None) for number in range(2)]
    assert [len(batch) for batch in batches(items, 4)] == [1, 1]


# ---- what cannot be used ------------------------------------------------------------------------


def test_each_photo_that_is_left_out_is_named_with_the_reason(cli, tmp_path, photos, rule_backbone):
    Image.new("RGB", (60, 1)).save(photos / "strip.png")
    Image.new("RGB", (15, 15)).save(photos / "tiny.png")
    Image.new("RGB", (64, 48)).save(photos / f"{'n' * 248}.png")  # 252 bytes, and .pth
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    out = tmp_path / "out"
    args = ["--image_path", photos, "--output_path", out, *rule_backbone]
    ran = cli("lift_extractor", *args, "--load_size", 0)
    assert ran.code == 0
    assert counts(ran) == (3, 0, 4)
    lines = ran.err.splitlines()
    assert f"skipped: {photos}/tiny.png: 15x15 pixels are less than one patch (16)" in ran.err
    assert f"skipped: {photos}/strip.png: 60x1 pixels are less than one patch" in ran.err
    assert "nnn.png: the name is too long for a file of features: shorten it" in ran.err
    assert f"skipped: {photos}/broken.jpg: not a readable image" in ran.err
    assert len([line for line in lines if line.startswith("skipped: ")]) == 4
    assert ".heic" in ran.err
    assert ran.out == f"{out}: 3 written, 0 kept, 4 skipped\n"

    ran = cli("lift_extractor", *args, "--load_size", 32, "--overwrite")
    assert counts(ran) == (4, 0, 3), "tiny.png is enlarged"
    assert "strip.png: 60x1 pixels, a strip: cut it, or pass --load_size 0" in ran.err


def test_a_photo_without_features_alone_is_an_error(cli, tmp_path, rule_backbone):
    path = tmp_path / "x.png"
    Image.new("RGB", (15, 15)).save(path)
    args = ["--image_path", path, *rule_backbone, "--load_size", 0]
    for out in (tmp_path / "x.pth", tmp_path / "folder"):
        ran = cli("lift_extractor", *args, "--output_path", out)
        assert ran.code == 2
        assert ran.err.endswith(
            f"{path}: 15x15 pixels are less than one patch (16): pass a larger load_size\n"
        )


class FeaturesOfLittleMemory:
    """Features whose memory holds so many pixels."""

    def __init__(self, real, most):
        self.real = real
        self.most = most

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, images, return_all):
        if images[:, 0].numel() > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nof which ...")
        return self.real(images, return_all=return_all)


def test_a_batch_that_does_not_fit_is_tried_photo_by_photo(
    cli, tmp_path, photos, rule_backbone, monkeypatch
):
    Image.new("RGB", (128, 96)).save(photos / "large.png")
    real = script.build_features
    monkeypatch.setattr(
        script, "build_features", lambda args: FeaturesOfLittleMemory(real(args), 48 * 64)
    )
    args = ["--image_path", photos, "--output_path", tmp_path / "out", *rule_backbone]
    ran = cli("lift_extractor", *args, "--load_size", 0)
    assert ran.code == 0, ran.err
    assert counts(ran) == (3, 0, 2)
    assert f"skipped: {photos}/large.png: out of memory (it asked for 2.00 GiB)" in ran.err
    assert not (tmp_path / "out/large.png.pth").exists()
    assert (tmp_path / "out/b.png.pth").exists(), "one of a batch of two"


def limited(gigabytes, *args):
    """The script as a process that may have so much memory: (status, stdout, stderr)."""
    command = f'ulimit -d {int(gigabytes * 2**20)} && exec "$@"'
    args = [str(arg) for arg in args]
    ran = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, ROOT / "lift_extractor.py", *args],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_a_photo_too_large_for_the_memory_does_not_end_the_run(
    tmp_path, photos, rule_backbone, rule_lift
):
    (photos / "broken.jpg").unlink()
    Image.new("RGB", (12000, 9000)).save(photos / "large.png")
    out = tmp_path / "out"
    args = ["--image_path", photos, "--output_path", out, *rule_backbone, "--device", "cpu"]
    status, stdout, stderr = limited(1.5, *args, "--lift_path", rule_lift, "--load_size", 0)
    assert (status, stdout) == (0, f"{out}: 3 written, 0 kept, 1 skipped\n"), stderr
    assert f"skipped: {photos}/large.png: out of memory (" in stderr


@pytest.mark.parametrize("flags", [["--lift_iter", 12], ["--load_size", 100000]])
def test_absurd_sizes_are_one_line(tmp_path, rule_backbone, rule_lift, flags):
    out = tmp_path / "x.pth"
    args = ["--image_path", SAMPLE, "--output_path", out, *rule_backbone, "--device", "cpu"]
    status, _, stderr = limited(1.5, *args, "--lift_path", rule_lift, *flags)
    errors = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert (status, len(errors)) == (2, 1), stderr
    assert f"{SAMPLE}: out of memory" in errors[0]
    assert not out.exists()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("fault", [killed, full])
def test_a_fault_in_a_worker_ends_the_run(cli, tmp_path, photos, rule_backbone, monkeypatch, fault):
    (photos / "broken.jpg").unlink()
    out = tmp_path / "out"
    real = Photos.__getitem__

    def read(self, index):
        until = time.monotonic() + 60
        while index == 2 and time.monotonic() < until:
            if list(out.rglob("*.pth")):  # something is written, which must be kept
                fault()
            time.sleep(0.05)
        return real(self, index)

    args = ["lift_extractor", "--image_path", photos, "--output_path", out]
    args += [*rule_backbone, "--load_size", 32, "--workers", 1, "--batch_size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(Photos, "__getitem__", read)
        ran = cli(*args)
    assert ran.code == 2
    errors = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert "--workers 0" in errors[0]
    written, kept, missing = counts(cli(*args))
    assert (written + kept, missing) == (3, 0)
    assert kept >= 1


# ---- numbers that are not finite ----------------------------------------------------------------


def test_features_that_are_not_finite_are_refused(cli, tmp_path, rule_backbone, monkeypatch):
    state = load_file(rule_backbone[3])
    state["blocks.11.attn.qkv.bias"] = torch.full_like(state["blocks.11.attn.qkv.bias"], 1e5)
    save_file(state, tmp_path / "loud.safetensors")  # 1e5 is more than float16 can hold
    args = ["--image_path", SAMPLE, "--output_path", tmp_path / "x.pth", "--load_size", 32]
    args += [rule_backbone[0], rule_backbone[1], "--backbone_path", tmp_path / "loud.safetensors"]
    assert cli("lift_extractor", *args).code == 0
    (tmp_path / "x.pth").unlink()
    ran = cli("lift_extractor", *args, "--dtype", "float16", "--picture", tmp_path / "x.png")
    assert ran.code == 2
    assert "are not finite in float16: pass --dtype float32" in ran.err
    assert not (tmp_path / "x.pth").exists()
    assert not (tmp_path / "x.png").exists()


# ---- in Python ----------------------------------------------------------------------------------


def test_reference_api(rule_backbone, rule_lift):
    name, path = rule_backbone[1], rule_backbone[3]
    model = ViTLiFTExtractor(
        name, rule_lift, 192, 16, device="cpu", silent=True, backbone_path=path
    )
    assert isinstance(model, torch.nn.Module)
    assert not model.train().training, "a frozen module stays in eval mode"
    assert model.to("cpu").eval() is model
    assert (model.channel, model.patch, model.stride, model.layer) == (192, 16, 16, 11)
    assert (model.facet, model.model_type, model.lift_path) == ("key", name, rule_lift)
    assert model.model is model.extractor.model
    assert model.device.type == "cpu"
    assert repr(model).startswith("ViTLiFTExtractor(ViTExtractor('vit_tiny_patch16_224'")
    assert "\n" not in repr(model)

    images, _ = model.preprocess(SAMPLE, 64)
    assert torch.equal(model.preprocess(Image.open(SAMPLE), 64)[0], images)
    once = slow(rule_backbone, rule_lift, SAMPLE, 64)
    twice = slow(rule_backbone, rule_lift, SAMPLE, 64, 2)
    near = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(model(images), once, **near)
    torch.testing.assert_close(model.extract_descriptors(images), map_to_tokens(once), **near)
    found = model.extract_descriptors_iterative_lift(images, 2)
    torch.testing.assert_close(found, map_to_tokens(twice), **near)
    steps = model.extract_descriptors_iterative_lift(images, 2, return_inter=True)
    assert list(steps) == ["back", "lift_1", "lift_2"]
    assert [step.shape[1] for step in steps.values()] == [24, 4 * 24, 16 * 24]
    torch.testing.assert_close(steps["lift_1"], map_to_tokens(once), **near)
    torch.testing.assert_close(steps["lift_2"], map_to_tokens(twice), **near)

    bare = ViTLiFTExtractor(name, device="cpu", backbone_path=path)
    assert bare.lift is None
    assert bare.extract_descriptors(images).shape == (1, 24, 192)
    back = bare.extract_descriptors(images)
    assert torch.equal(bare.extract_descriptors_iterative_lift(images, 3), back)
    steps = bare.extract_descriptors_iterative_lift(images, 3, return_inter=True)
    assert list(steps) == ["back"]
    assert torch.equal(steps["back"], back)

    unused = ViTLiFTExtractor(name, None, 768, 8, 16, device="cpu", backbone_path=path)
    assert (unused.channel, unused.patch) == (192, 16), "the release's defaults, of no effect there"
    with pytest.raises(ValueError, match="channel 768"):
        ViTLiFTExtractor(name, rule_lift, 768, device="cpu", silent=True, backbone_path=path)
    with pytest.raises(ValueError, match="preprocess"):
        model(SAMPLE)


def test_a_state_dict_of_the_release_holds_lift_only(rule_backbone, rule_lift):
    flags = {"device": "cpu", "silent": True, "backbone_path": rule_backbone[3]}
    model = ViTLiFTExtractor(rule_backbone[1], rule_lift, **flags)
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    before = model(images)
    torch.manual_seed(0)
    other = LiFT(192)
    state = {f"lift.{name}": value for name, value in other.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.equal(model(images), before)
    other.requires_grad_(False).eval()
    torch.testing.assert_close(model(images), other(images, model.extractor(images)))

    again = ViTLiFTExtractor(rule_backbone[1], rule_lift, **flags)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    del state["lift.outc.bias"]
    with pytest.raises(RuntimeError, match=r"lift\.outc\.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="foreign"):
        model.load_state_dict({**model.state_dict(), "foreign": torch.zeros(1)})


@pytest.mark.parametrize("later", [False, True])
def test_lift_can_be_fine_tuned(rule_backbone, rule_lift, later):
    """By requires_grad=True, or by making its weights trainable later; the ViT stays frozen."""
    model = ViTLiFTExtractor(
        rule_backbone[1], rule_lift, device="cpu", silent=True,
        backbone_path=rule_backbone[3], requires_grad=not later,
    )  # fmt: skip
    if later:
        assert not model.extract_descriptors(torch.zeros(1, 3, 32, 32)).requires_grad
        model.lift.requires_grad_(True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == sum(
        weight.numel() for weight in LiFT(192).parameters()
    )
    assert model.train().lift.training
    assert not model.extractor.training
    model.eval()

    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(2):
        loss = model.extract_descriptors_iterative_lift(images, 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(weight.grad is None for weight in model.extractor.parameters())
    with torch.no_grad():
        assert not model(images).requires_grad


@pytest.mark.parametrize("size", [(224, 224), (298, 224), (16, 16), (37, 500), (320, 240)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_real_weights_on_real_photos(
    shared, vit_tiny, golden_lift, tmp_path, cli, size, iterations
):
    first = sorted((shared / "data/coco20k").rglob("*.jpg"))[0]
    Image.open(first).convert("RGB").resize(size).save(tmp_path / "x.png")
    args = ["--image_path", tmp_path / "x.png", "--output_path", tmp_path / "x.npz", *vit_tiny]
    args += ["--load_size", 0, "--lift_path", golden_lift, "--lift_iter", iterations]
    assert cli("lift_extractor", *args).code == 0
    feats = np.load(tmp_path / "x.npz")["map"]
    grid = [max(1, int(side / 16 + 0.5)) * 2**iterations for side in reversed(size)]
    assert list(feats.shape) == [192, *grid]
    wanted = slow(vit_tiny, golden_lift, tmp_path / "x.png", None, iterations)[0]
    np.testing.assert_allclose(feats, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


OWN = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 192, 16, stride=16)
"""


def test_ones_own_backbone(cli, import_path, rule_lift):
    (import_path / "own_network.py").write_text(OWN)
    args = ["--image_path", SAMPLE, "--output_path", "x.npz", "--load_size", 64]
    args += ["--my_extractor", "own_network:build", "--lift_path", rule_lift]
    ran = cli("lift_extractor", *args)
    assert ran.code == 0, ran.err
    assert np.load("x.npz")["map"].shape == (192, 8, 12)


# ---- bad input ----------------------------------------------------------------------------------

BAD = {
    "missing photo": (
        ["--image_path", "none.jpg"],
        "there are no images at none.jpg, which does not exist",
    ),
    "no image": (["--image_path", "text.jpg"], "text.jpg is not a readable image"),
    "truncated": (["--image_path", "cut.jpg"], "cut.jpg is not a readable image"),
    "tiny photo": (
        ["--image_path", "tiny.png", "--load_size", "0"],
        "less than one patch (16): pass a larger load_size",
    ),
    "empty folder": (["--image_path", "."], "there are no images at ."),
    "model": (["--model_type", "vit_foo"], "unknown model vit_foo: pass dino_vits16"),
    "facet": (["--facet", "keys"], "invalid choice"),
    "layer": (["--layer", "12"], "layer 12 is out of range"),
    "stride": (["--stride", "5"], "stride 5 does not divide the patch"),
    "stride with LiFT": (
        ["--stride", "8", "--lift_path", "LIFT"],
        "leave out the stride for LiFT",
    ),
    "channel": (["--channel", "384"], "leave --channel out"),
    "no LiFT": (["--upsample", "lift"], "pass --lift_path"),
    "lift_iter": (["--lift_iter", "-1"], "pass 0 or more"),
    "lift_iter without LiFT": (["--lift_iter", "3"], "has nothing to repeat"),
    "out_size": (["--out_size", "0", "4"], "pass H W"),
    "width": (["--lift_path", "wide.pth"], "384 channels"),
    "missing LiFT": (["--lift_path", "none.pth"], "there is no LiFT checkpoint at none.pth"),
    "missing weights": (["--backbone_path", "none.pth"], "there are no weights at none.pth"),
    "device": (["--device", "cuda:77"], "take another device (auto, cpu"),
    "unwritable": (["--output_path", "text.jpg/x/y.pth"], "cannot write text.jpg/x/y.pth"),
    "output is a file": (
        ["--image_path", "text.jpg", str(SAMPLE), "--output_path", "text.jpg"],
        "text.jpg is not a folder, nor one of .pth, .npz, .safetensors for one photo",
    ),
    "no picture": (["--picture", "x.txt"], "does not name a picture: let it end in one of .png"),
    "picture over the photo": (
        ["--image_path", "tiny.png", "--picture", "./tiny.png"],
        "--picture ./tiny.png is one of the photos: pass another name",
    ),
    "another suffix": (["--output_path", "x.pt"], "x.pt is not a folder, nor one of .pth"),
    "empty path": (["--image_path", ""], "the path of the photos is empty"),
    "a URL": (["--image_path", "https://a.org/x.jpg"], "is a URL: download the photo"),
    "a movie": (["--image_path", "clip.mp4"], "is a movie: take its frames"),
    "unknown flag": (["--lift_itre", "2"], "unrecognized arguments"),
}


# what is told before a backbone is built
CHEAP = (
    "missing photo", "no image", "missing LiFT", "out_size", "another suffix", "lift_iter",
    "lift_iter without LiFT", "no LiFT", "no picture", "picture over the photo",
)  # fmt: skip


def test_cheap_cases_are_cases():
    assert set(CHEAP) <= set(BAD)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli, tmp_path, monkeypatch, rule_backbone, rule_lift, case):
    def build(args):
        raise AssertionError("a backbone was built")

    if case in CHEAP:
        monkeypatch.setattr(features, "build_extractor", build)
    monkeypatch.chdir(tmp_path)
    if case != "empty folder":
        (tmp_path / "text.jpg").write_text("hello")
        (tmp_path / "cut.jpg").write_bytes(SAMPLE.read_bytes()[:5000])
        (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(64))
        Image.new("RGB", (200, 15)).save(tmp_path / "tiny.png")
        torch.save({"outc.weight": torch.zeros(384, 192, 1, 1)}, tmp_path / "wide.pth")
    before = sorted(tmp_path.rglob("*"))

    flags, message = BAD[case]
    flags = [str(rule_lift) if flag == "LIFT" else flag for flag in flags]
    args = ["--image_path", SAMPLE, "--output_path", "out/x.pth", *rule_backbone, *flags]
    ran = cli("lift_extractor", *args)
    errors = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert ran.code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"
