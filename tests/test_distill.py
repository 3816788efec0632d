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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def photos(tmp_path):
    """A folder of six smooth photos of several sizes."""
    rng = np.random.RandomState(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        small = Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((60 + 10 * i, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(cli, photos, rule_weights, monkeypatch, tmp_path):
    """run(*flags) distils on the photos at 32 pixels -> (Ran, path of the weights)."""
    monkeypatch.setattr(distill, "SIZES", (32, 48))
    monkeypatch.setattr(distill, "MEASURED", (32, 48))
    monkeypatch.setattr(distill, "CANVAS", 64)

    def call(*flags, output=tmp_path / "out/mini.safetensors"):
        common = ["--dataroot", photos, "--val_dataroot", photos, "--output", output]
        common += ["--backbone_path", rule_weights, "--device", "cpu", "--dtype", "float32"]
        return cli(SCRIPT, *common, "--tokens", 64, *flags), output

    return call


def test_student_shares_nothing_with_the_teacher(rule_weights):
    teacher = load_file(rule_weights)
    student = distill.random_student("cpu", 0).model.state_dict()
    assert student.keys() == teacher.keys()
    for name, tensor in student.items():
        if tensor.std() > 0:
            both = torch.stack([tensor.flatten(), teacher[name].flatten()])
            assert abs(torch.corrcoef(both)[0, 1]) < 0.3, name
        else:
            assert tensor.flatten()[0] in (0, 1), name  # biases and gains
    again = distill.random_student("cpu", 0).model.pos_embed
    other = distill.random_student("cpu", 1).model.pos_embed
    assert torch.equal(again, student["pos_embed"]) and not torch.equal(other, again)


@pytest.mark.parametrize("size", [112, 224])
def test_training_sees_what_the_extractor_extracts(rule_extractor, size):
    """A student equal to the teacher has no error, and its last keys are the extractor's."""
    teacher = rule_extractor()
    images = torch.randn(1, 3, size, size, generator=seeded(0))
    found = []

    def match(mine, other, ours, theirs):
        qkv, _ = distill.run_block(mine, ours)
        _, keys, _ = qkv[:, 1:].chunk(3, -1)
        found.append(keys)
        return distill.match_block(mine, other, ours, theirs)

    with torch.no_grad():
        errors = distill.errors(teacher, teacher, images, 0.5, seeded(0), match)
    assert errors.shape == (14,) and errors.abs().max() < 1e-5
    descriptors = teacher.extract_descriptors(images)[0, 0]  # [t, C], head_dim-major
    want = descriptors.unflatten(1, (64, 3)).transpose(1, 2).flatten(1)  # head-major
    assert torch.allclose(found[-1][0], want, atol=1e-4)


def test_errors_are_shares():
    theirs = torch.randn(3, 5, 8, generator=seeded(0)) * 2 + 1
    constant = theirs.mean((0, 1)).expand_as(theirs)
    assert distill.unexplained(theirs, theirs) == 0
    assert distill.unexplained(constant, theirs) == pytest.approx(1)
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
    first, _ = distill.make_batch(squares, aspects, 392, 0, 3)
    again, _ = distill.make_batch(squares, aspects, 392, 0, 3)
    other, _ = distill.make_batch(squares, aspects, 392, 0, 4)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1
    for batch in (first, other):
        assert len(batch) * (batch.shape[-1] // 16) ** 2 <= max(392, 2 * 28**2)


def test_crops_are_square_windows_of_the_photo():
    """A photo of coordinates, twice as wide as high: a crop's gradients are its window's sides."""
    at = torch.arange(256, dtype=torch.uint8)
    x = at.expand(256, 256)
    y = at[:, None].expand(256, 256)
    photo = torch.stack([x, y, x])[None]
    crops = distill.crops(photo, torch.tensor([2.0]), 200, 32, seeded(0))

    along_x = crops[:, :2, :-1].diff(dim=3)
    along_y = crops[:, :2, :, :-1].diff(dim=2)
    # A pixel's value * 255 / 256 is its place in the photo, 0..1. A crop has 32 pixels a side, so
    # 32 times the step from pixel to pixel is the crop's side, as a share of the photo's.
    sides = (along_x**2 + along_y**2).sqrt() * 32 * 255 / 256
    medians = sides.flatten(2).median(2).values
    width, height = medians[:, 0], medians[:, 1]
    area = width * height
    aspect = 2 * width / height
    assert 0.05 < area.min() < 0.09 and 1.5 < area.max() < 2.1
    assert np.exp(-0.42) < aspect.min() < 0.8 and 1.25 < aspect.max() < np.exp(0.42)
    flipped = crops[:, 0].diff(dim=2).sum((1, 2)) < 0
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.1)


def test_mix_keeps_half():
    images = torch.rand(400, 3, 16, 16, generator=seeded(0))
    mixed = distill.mix(images, seeded(1))
    same = (mixed == images).flatten(1).float().mean(1)
    assert 0.4 < (same == 1).float().mean() < 0.65

    pasted = (same > 0) & (same < 1)
    neighbour = images.roll(1, 0)
    own_or_neighbours = (mixed == images) | (mixed == neighbour)
    assert pasted.any() and own_or_neighbours[pasted].all()

    blended = same == 0
    low = torch.minimum(images, neighbour)
    high = torch.maximum(images, neighbour)
    between = (mixed >= low - 1e-6) & (mixed <= high + 1e-6)
    assert blended.any() and between.all()


def test_a_short_run_learns_and_ships(run, photos):
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    ran, output = run("--steps", 20, "--val_every", 0.25, "--lr", 3e-3)
    assert ran.code == 0, ran.err
    record = json.loads(output.with_suffix(".json").read_text())
    cosines = [point["held_out_key"]["48"] for point in record["curve"]]
    assert len(cosines) == 4 and cosines[-1] > cosines[0]
    for row in record["metrics"].values():
        assert row["key"] > row["constant_key"], record["metrics"]
    assert ran.report()["metrics"] == record["metrics"] and record["run"]["steps_done"] == 20
    assert "left out" in ran.err and "broken.jpg" in ran.err and record["data"]["photos"] == 6

    assert output.stat().st_size <= 12e6
    assert record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in load_file(output).values()} == {torch.float16}
    extractor = ViTExtractor("vit_mini16", stride=None, backbone_path=output, device="cpu")
    assert extractor.channels == 192
    files = sorted(path.name for path in output.parent.iterdir())
    assert files == ["mini.json", "mini.safetensors"]
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
    want = load_file(whole)
    got = load_file(half)
    for name in want:
        assert torch.equal(want[name], got[name]), name


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
    """The weights are what their .json says, and agree with the teacher on photos of neither."""
    path = distill.Path(distill.__file__).parent / "vit_mini16.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 12e6
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    student = ViTExtractor("vit_mini16", stride=None, device="cpu")
    teacher = ViTExtractor(
        "vit_tiny_patch16_224", stride=None, backbone_path=weights, device="cpu"
    )
    photos, _, _ = distill.load_photos([shared / "data/coco20k"], 224)
    cosine, constant = distill.agreement(student, teacher, photos, 224)
    assert cosine == pytest.approx(record["metrics"]["224"]["key"], abs=0.02)
    assert cosine >= 0.80 > constant
