"""feature_cache.py, through train_lift.py --cache_features: what is cached, when, and for what."""

import errno
import fcntl
import json
import os
import shutil
import types

import pytest
import torch
from conftest import rule_image
from PIL import Image
from safetensors.torch import load_file, save_file

import feature_cache
import train_lift
from extractor import ViTExtractor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small photos, smooth and seeded."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(8):
        image = rule_image(80, 96, k)[0].permute(1, 2, 0)
        pixels = (image.clamp(-2, 2) * 60 + 128).byte().numpy()
        Image.fromarray(pixels).save(root / f"{k}.jpg", quality=95)
    return root


@pytest.fixture
def train(cli, folder, tmp_path, rule_backbone):
    """train(name, *flags) runs two epochs -> (Ran, state_dict, lines of metrics.jsonl)."""

    def run(name, *more):
        flags = ["--dataroot", folder, "--output_dir", tmp_path / name, "--imsize", 64]
        flags += ["--batch_size", 3, "--epochs", 2, "--workers", 0, "--device", "cpu"]
        ran = cli("train_lift", *flags, *rule_backbone, *more)
        if ran.code:
            return ran, None, None
        (made,) = (tmp_path / name).iterdir()
        lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        return ran, torch.load(made / "lift.pth", weights_only=True), lines

    return run


def equal(state, other):
    """Two state_dicts agree to the bit."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("match", [0, 0.5])
def test_cached_features_train_alike_and_are_computed_once(train, tmp_path, monkeypatch, match):
    more = ["--augment", "--views", 2, "--loss", "l2", "--val_fraction", 0.25, "--match", match]
    cache = [*more, "--cache_features", tmp_path / "cache"]
    ran, _, live_lines = train("live", *more)
    assert ran.code == 0, ran.err
    ran, state, lines = train("cached", *cache)
    assert ran.code == 0, ran.err
    live_losses = [line["loss"] for line in live_lines]
    assert [line["loss"] for line in lines] == pytest.approx(live_losses, rel=2e-3)
    for name in ("bilinear", "bilinear_centred"):
        assert lines[-1]["val"][name] == pytest.approx(live_lines[-1]["val"][name], abs=1e-3)

    files = sorted((tmp_path / "cache").iterdir())
    content = [file.read_bytes() for file in files]
    assert len(files) == 2
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "fill", None)  # a call would fail
        ran, again, _ = train("again", *cache)
        assert ran.code == 0, ran.err
    equal(again, state)

    for file, whole in zip(files, content):  # a run stopped in the middle of a record
        file.with_suffix(".part").write_bytes(whole[: len(whole) * 2 // 3])
        file.unlink()
    ran, _, _ = train("third", *cache)
    assert ran.code == 0, ran.err
    assert [file.read_bytes() for file in sorted((tmp_path / "cache").iterdir())] == content


def test_the_cache_knows_what_it_depends_on(folder, rule_weights, rule_extractor, tmp_path):
    all_paths = sorted(folder.rglob("*.jpg"))
    backbone = rule_extractor()

    def key(extractor=backbone, paths=all_paths, imsize=64, **options):
        photos = train_lift.Photos(paths, imsize, **options)
        return feature_cache.cache_key(photos, extractor)

    state = load_file(rule_weights)
    state["cls_token"] += 1
    save_file(state, tmp_path / "other.safetensors")
    other_weights = ViTExtractor(
        "vit_tiny_patch16_224",
        stride=None,
        backbone_path=tmp_path / "other.safetensors",
        device="cpu",
    )

    keys = [
        key(),
        key(augment=True),
        key(augment=True, seed=1),
        key(warp=True),
        key(warp=True, seed=1),
        key(imsize=128),
        key(downsample="resize"),
        key(rule_extractor(layer=3)),
        key(rule_extractor(facet="query")),
        key(rule_extractor(dtype="bfloat16")),
        key(other_weights),
        key(paths=all_paths[:3]),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(seed=1) == keys[0]

    copy = shutil.copy(all_paths[0], tmp_path / "copy.jpg")
    before = key(paths=[copy])
    assert key(paths=[copy]) == before
    Image.new("RGB", (96, 80)).save(copy)
    assert key(paths=[copy]) != before


def test_a_full_disk_is_one_line(train, tmp_path, monkeypatch):
    nearly_full = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: nearly_full)
    ran, _, _ = train("run", "--cache_features", tmp_path / "cache")
    assert ran.code == 2 and "pass another --cache_features" in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_system_without_locks_is_one_line(train, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    ran, _, _ = train("run", "--cache_features", tmp_path / "cache")
    assert ran.code == 2 and "cannot be locked" in ran.err and "make room" not in ran.err
    assert "pass a --cache_features on a local disk" in ran.err and ran.err.count("\n") == 1
