"""feature_cache.py, through train_lift.py --cache_features: what is cached, when, and for what."""

import json
import shutil
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import rule_image
from PIL import Image
from safetensors.torch import load_file, save_file

import feature_cache
from extractor import ViTExtractor
from objectives import Photos


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


def last(ran):
    """The last line on stderr."""
    return ran.err.splitlines()[-1]


@pytest.mark.parametrize("match", [0, 0.5])
def test_cached_features_train_alike_and_are_computed_once(train, tmp_path, monkeypatch, match):
    more = ["--augment", "--views", 2, "--loss", "l2", "--val_fraction", 0.25, "--match", match]
    more += ["--match_centred", 0.33]  # of random features the centred ones feel float16 most
    cache = [*more, "--cache_features", tmp_path / "cache"]
    ran, _, live_lines = train("live", *more)
    assert ran.code == 0, ran.err
    ran, state, lines = train("cached", *cache)
    assert ran.code == 0, ran.err
    live_losses = [line["loss"] for line in live_lines]
    assert [line["loss"] for line in lines] == pytest.approx(live_losses, rel=2e-3)
    for name in ("bilinear", "bilinear_centred"):
        assert lines[-1]["val"][name] == pytest.approx(live_lines[-1]["val"][name], abs=1e-3)

    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "fill", None)  # a call would fail
        ran, again, _ = train("again", *cache)
        assert ran.code == 0, ran.err
    equal(again, state)


def test_the_cache_knows_what_it_depends_on(folder, rule_weights, rule_extractor, tmp_path):
    all_paths = sorted(folder.rglob("*.jpg"))
    backbone = rule_extractor()

    def key(extractor=backbone, paths=all_paths, imsize=64, **options):
        photos = Photos(paths, imsize, **options)
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
    assert [line for line in ran.err.splitlines() if not line.startswith("note:")] == [last(ran)]


def test_the_file_holds_what_the_backbone_gives(folder, rule_extractor, tmp_path):
    """Batches of three, written by a thread, in the order of views and photos."""
    photos = Photos(sorted(folder.iterdir()), 64, augment=True)
    extractor = rule_extractor()
    cached = feature_cache.cached(photos, extractor, tmp_path, views=2, batch_size=3, workers=1)
    for epoch, index in ((0, 0), (0, 7), (1, 2), (3, 2)):
        item = cached[epoch, index]
        wanted = photos[epoch % 2, index]
        assert torch.equal(item["half"], wanted["half"]) and item["broken"] == -1
        for name, level in (("f1", "full"), ("f2", "half"), ("f3", "quarter")):
            image = extractor.normalize(wanted[level][None] / 255)
            feats = extractor(image)[0]
            assert item[name].dtype == torch.float16
            assert torch.allclose(item[name].float(), feats, rtol=2e-3, atol=2e-3), name


def test_no_more_batches_wait_to_be_written_than_memory_holds(
    folder, rule_extractor, tmp_path, monkeypatch
):
    """A disk that is slower than the backbone: computing waits for it."""
    computed = []
    real = feature_cache.images_and_features
    monkeypatch.setattr(
        feature_cache,
        "images_and_features",
        lambda *arguments: computed.append(0) or real(*arguments),
    )
    ahead = []
    write = feature_cache.write_rows

    def slow_write(*arguments):
        time.sleep(0.05)
        write(*arguments)
        written = len(ahead) + 1
        ahead.append(len(computed) - written)

    monkeypatch.setattr(feature_cache, "write_rows", slow_write)
    photos = Photos(sorted(folder.iterdir()), 64, augment=True)
    feature_cache.cached(photos, rule_extractor(), tmp_path, views=3, batch_size=1, workers=0)
    assert len(ahead) == 24 and max(ahead) <= feature_cache.IN_FLIGHT + 1


@pytest.mark.parametrize("what", ["write_rows", "images_and_features"])
def test_a_failure_leaves_no_file(train, tmp_path, monkeypatch, what):
    def fail(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(feature_cache, what, fail)
    ran, _, _ = train("run", "--cache_features", tmp_path / "cache")
    assert ran.code == 2 and "the disk is gone" in ran.err
    assert not list((tmp_path / "cache").iterdir())


def test_a_moved_data_set_has_the_same_file(folder, rule_extractor, tmp_path):
    extractor = rule_extractor()
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)  # with the dates of the files
    keys = []
    for root in (folder, moved):
        photos = Photos(sorted(root.iterdir()), 64)
        keys.append(feature_cache.cache_key(photos, extractor))
    assert keys[0] == keys[1]


def test_the_second_process_of_a_machine_waits_for_the_file_of_the_first(
    folder, rule_extractor, tmp_path, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda seconds: threading.Event().wait(0.01))
    photos = Photos(sorted(folder.iterdir()), 64)
    extractor = rule_extractor()
    common = {"views": 1, "batch_size": 3, "workers": 0}
    with ThreadPoolExecutor(1) as second:
        waiting = second.submit(
            feature_cache.cached, photos, extractor, tmp_path, **common, waits=True
        )
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        first = feature_cache.cached(photos, extractor, tmp_path, **common)
        item = waiting.result(timeout=60)[0, 5]
    assert torch.equal(item["f1"], first[0, 5]["f1"])
    assert [file.suffix for file in tmp_path.iterdir()] == [".features"]
