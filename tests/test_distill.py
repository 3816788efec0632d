"""pretrained/distill_mini.py: how vit_mini16 was made, and the weights that came of it."""

import hashlib
import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from extractor import ViTExtractor

SCRIPT = "pretrained.distill_mini"
distill = importlib.import_module(SCRIPT)


@pytest.fixture
def photos(tmp_path):
    """A folder of six smooth photos of several sizes."""
    rng = np.random.RandomState(0)
    for i in range(6):
        small = Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        small.resize((60 + 10 * i, 80), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def run(cli, photos, rule_backbone, monkeypatch, tmp_path):
    """run(*flags) distils on the photos at 32 pixels -> (Ran, path of the weights)."""
    monkeypatch.setattr(distill, "SIZES", (32, 48))
    monkeypatch.setattr(distill, "MEASURED", (32, 48))
    monkeypatch.setattr(distill, "CANVAS", 64)

    def call(*flags, output=tmp_path / "out/mini.safetensors"):
        common = ["--dataroot", photos, "--val_dataroot", photos, "--backbone_path", rule_backbone[3], "--device", "cpu"]
        return cli(SCRIPT, *common, "--output", output, "--dtype", "float32", "--tokens", 64, *flags), output

    return call


def test_student_shares_nothing_with_the_teacher(rule_backbone):
    teacher = load_file(rule_backbone[3])
    student = distill.random_student("cpu", 0).model.state_dict()
    assert student.keys() == teacher.keys()
    for name, tensor in student.items():
        if tensor.std() > 0:
            assert abs(torch.corrcoef(torch.stack([tensor.flatten(), teacher[name].flatten()]))[0, 1]) < 0.3, name
        else:
            assert tensor.flatten()[0] in (0, 1), name  # biases and gains
    again, other = (distill.random_student("cpu", seed).model.pos_embed for seed in (0, 1))
    assert torch.equal(again, student["pos_embed"]) and not torch.equal(other, again)


@pytest.mark.parametrize("size", [112, 224])
def test_training_sees_what_the_extractor_extracts(rule_backbone, size):
    """A student equal to the teacher has no error, and its last keys are the extractor's."""
    teacher = ViTExtractor("vit_tiny_patch16_224", backbone_path=rule_backbone[3], device="cpu")
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = []

    def match(mine, other, ours, theirs):
        found[:] = [distill.run_block(mine, ours)[0][:, 1:].chunk(3, -1)[1]]
        return distill.match_block(mine, other, ours, theirs)

    with torch.no_grad():
        errors = distill.errors(teacher, teacher, images, 0.5, torch.Generator().manual_seed(0), match)
    assert errors.shape == (14,) and errors.abs().max() < 1e-5
    want = teacher.extract_descriptors(images)[0, 0].unflatten(1, (64, 3)).transpose(1, 2).flatten(1)  # head-major
    assert torch.allclose(found[0][0], want, atol=1e-4)


def test_errors_are_shares():
    theirs = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    assert distill.unexplained(theirs, theirs) == 0
    assert distill.unexplained(theirs.mean((0, 1)).expand_as(theirs), theirs) == pytest.approx(1)
    assert distill.token_error(torch.zeros_like(theirs), theirs) == pytest.approx(1)
    assert distill.token_error(1.5 * theirs, theirs) == pytest.approx(0.25)


def test_schedule():
    assert distill.schedule(0.01, 1.0, 0.4) == (0.5, pytest.approx(0.025))
    assert distill.schedule(0.5, 1.0, 0.4) == (pytest.approx(0.5), 1.0)
    assert distill.schedule(1.0, 1.0, 0.0) == (pytest.approx(0), 1.0)


def test_batches_are_a_function_of_seed_and_step(photos):
    squares, aspects, broken = distill.load_photos([photos], 64)
    assert squares.shape == (6, 3, 64, 64) and squares.dtype == torch.uint8 and not broken
    assert aspects.tolist() == pytest.approx([(60 + 10 * i) / 80 for i in range(6)])
    (a, _), (b, _), (c, _) = (distill.make_batch(squares, aspects, 392, 0, step) for step in (3, 3, 4))
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))
    assert a.min() >= 0 and a.max() <= 1
    assert all(len(x) * (x.shape[-1] // 16) ** 2 <= max(392, 2 * 28**2) for x in (a, c))


def test_crops_are_square_windows_of_the_photo():
    """A photo of coordinates, twice as wide as high: a crop's gradients are the sides of its window."""
    at = torch.arange(256, dtype=torch.uint8)
    photo = torch.stack([at.expand(256, 256), at[:, None].expand(256, 256), at.expand(256, 256)])[None]
    crops = distill.crops(photo, torch.tensor([2.0]), 200, 32, torch.Generator().manual_seed(0))
    dx, dy = crops[:, :2, :-1].diff(dim=3), crops[:, :2, :, :-1].diff(dim=2)
    width, height = ((dx**2 + dy**2).sqrt() * 32 * 255 / 256).flatten(2).median(2).values.T  # shares of the photo's sides
    area, aspect = width * height, 2 * width / height
    assert 0.05 < area.min() < 0.09 and 1.5 < area.max() < 2.1
    assert np.exp(-0.42) < aspect.min() < 0.8 and 1.25 < aspect.max() < np.exp(0.42)
    assert (crops[:, 0].diff(dim=2).sum((1, 2)) < 0).float().mean() == pytest.approx(0.5, abs=0.1)  # flipped


def test_mix_keeps_half():
    images = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mixed = distill.mix(images, torch.Generator().manual_seed(1))
    same = (mixed == images).flatten(1).float().mean(1)
    assert 0.4 < (same == 1).float().mean() < 0.65
    pasted = (same > 0) & (same < 1)
    neighbour = images.roll(1, 0)
    assert pasted.any() and ((mixed == images) | (mixed == neighbour))[pasted].all()
    blended = same == 0
    low, high = torch.minimum(images, neighbour), torch.maximum(images, neighbour)
    assert blended.any() and ((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all()


def test_a_short_run_learns_and_ships(run, photos):
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    ran, output = run("--steps", 40, "--val_every", 0.25, "--lr", 3e-3)
    assert ran.code == 0, ran.err
    record, last_line = json.loads(output.with_suffix(".json").read_text()), json.loads(ran.out.splitlines()[-1])
    cosines = [point["held_out_key"]["48"] for point in record["curve"]]
    assert len(cosines) == 4 and cosines[-1] > cosines[0]
    assert all(row["key"] > row["constant_key"] for row in record["metrics"].values()), record["metrics"]
    assert last_line["metrics"] == record["metrics"] and record["run"]["steps_done"] == 40
    assert "skipped" in ran.out and "broken.jpg" in ran.out and record["data"]["photos"] == 6
    assert output.stat().st_size <= 12e6 and record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert {t.dtype for t in load_file(output).values()} == {torch.float16}
    assert ViTExtractor("vit_mini16", backbone_path=output, device="cpu").width == 192
    assert sorted(p.name for p in output.parent.iterdir()) == ["mini.json", "mini.safetensors"]
    ran, _ = run("--steps", 1)
    assert ran.code == 2 and "there already" in ran.err


def test_resumed_run_ends_with_the_same_weights(run, monkeypatch, tmp_path):
    flags = ("--steps", 6, "--val_every", 0.34)
    ran, whole = run(*flags, output=tmp_path / "whole.safetensors")
    assert ran.code == 0, ran.err
    make_batch = distill.make_batch

    def stop(photos, aspects, tokens, seed, step):
        if step == 4:
            raise KeyboardInterrupt
        return make_batch(photos, aspects, tokens, seed, step)

    monkeypatch.setattr(distill, "make_batch", stop)
    ran, half = run(*flags, output=tmp_path / "half.safetensors")
    assert ran.code == 130 and not half.exists()
    ran, _ = run(*flags, output=half)
    assert ran.code == 2 and "--resume" in ran.err
    monkeypatch.setattr(distill, "make_batch", make_batch)
    ran, _ = run(*flags, "--resume", output=half)
    assert ran.code == 0, ran.err
    want, got = load_file(whole), load_file(half)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--backbone_path", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--dataroot", "nowhere"], "no images at nowhere"),
        (["--resume"], "without --resume"),
        (["--steps", "3", "--lr", "1e30"], "lower --lr"),
    ],
)
def test_bad_input_is_one_line(run, flags, says):
    ran, output = run(*flags)
    assert ran.code == 2 and says in ran.err.splitlines()[-1] and "Traceback" not in ran.err
    assert not output.exists()


def test_shipped_weights(shared):
    """pretrained/vit_mini16.safetensors is what its .json says, and agrees with the teacher on photos nobody trained on."""
    path = distill.Path(distill.__file__).parent / "vit_mini16.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 12e6 and record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    teacher = shared / "weights/vit_tiny_patch16_224.safetensors"
    student, teacher = ViTExtractor("vit_mini16"), ViTExtractor("vit_tiny_patch16_224", backbone_path=teacher)
    photos, _, _ = distill.load_photos([shared / "data/coco20k"], 224)
    cosine, constant = distill.agreement(student, teacher, photos, 224)
    assert cosine == pytest.approx(record["metrics"]["224"]["key"], abs=0.02) and cosine >= 0.80 > constant
