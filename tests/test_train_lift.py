"""train_lift.py: golden losses, the plain loop, resume, signals, processes, bad input.

All of it runs on photos of 64 pixels, unless golden.
"""

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import timm
import torch
from conftest import rule_image, rule_state
from PIL import Image
from plain_train import (
    plain_centre,
    plain_evaluate,
    plain_features,
    plain_loss,
    plain_match_losses,
    plain_matched,
    plain_train,
    plain_vit,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

import objectives
import train_lift
from extractor import ViTExtractor
from feature_cache import images_and_features
from lift import LiFT, load_lift

# Biases before a batch norm have gradient 0: Adam moves them, and the running means behind them, by
# noise.
NOISY = [
    "image_convs_1.0.bias",
    "image_convs_1.3.bias",
    "image_convs_2.0.bias",
    "image_convs_1.1.running_mean",
    "image_convs_1.4.running_mean",
    "image_convs_2.1.running_mean",
]


@pytest.fixture(scope="module")
def golden_batch(shared):
    """The golden photos as one batch with their real features."""
    golden = json.loads((shared / "golden/train.json").read_text())
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    extractor = ViTExtractor(
        "vit_tiny_patch16_224", stride=None, backbone_path=weights, device="cpu"
    )
    paths = [shared / "data/train_images" / name for name in golden["images"]]
    photos = objectives.Photos(paths, golden["imsize"])
    batch = default_collate([photos[0, index] for index in range(len(photos))])
    _, feats = images_and_features(batch, extractor)
    return golden, extractor, {**batch, "f1": feats[0], "f2": feats[1], "f3": feats[2]}


@pytest.mark.parametrize("loss", ["cosine", "l1", "l2"])
def test_golden_losses_and_weights(golden_batch, loss):
    golden, extractor, batch = golden_batch
    lift = LiFT(192, 16, pre_shape=False, post_shape=False)
    lift.load_state_dict(rule_state(lift))
    model = objectives.Objective(lift, loss)
    optimizer = torch.optim.Adam(lift.parameters(), lr=golden["lr"])

    losses = []
    for _ in range(golden["steps"]):
        value, _ = objectives.train_step(model, batch, extractor, optimizer)
        losses.append(value.item())
    assert losses == pytest.approx(golden["losses"][loss], rel=1e-4)

    for name, after in golden["after"][loss].items():
        value = lift.state_dict()[name].float()
        # Adam moves an entry by about lr a step. Where its gradient is noise, so is the direction:
        # one such entry of n may end 2 * steps * lr away, and moves the mean by an n-th of that.
        slack = 2 * golden["steps"] * golden["lr"] / value.numel()
        if name in NOISY:  # every entry is such
            slack = golden["lr"]
        close = 1e-3 * max(after["std"], abs(after["mean"])) + slack
        assert value.mean().item() == pytest.approx(after["mean"], abs=close), name
        if value.numel() > 1:
            assert value.std().item() == pytest.approx(after["std"], abs=close), name


# ---- the command line on a small folder ---------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small photos, smooth and seeded, in two subfolders."""
    root = tmp_path_factory.mktemp("photos")
    (root / "a").mkdir()
    (root / "b").mkdir()
    for k in range(8):
        image = rule_image(80, 96, k)[0].permute(1, 2, 0)
        pixels = (image.clamp(-2, 2) * 60 + 128).byte().numpy()
        Image.fromarray(pixels).save(root / "ab"[k % 2] / f"{k}.jpg", quality=95)
    return root


@pytest.fixture
def flags(folder, tmp_path, rule_backbone):
    """flags(...) -> the flags of a short run on the CPU, and more."""
    common = ["--dataroot", folder, "--output_dir", tmp_path / "runs", "--imsize", 64]
    common += ["--batch_size", 3, "--epochs", 2, "--val_fraction", 0, "--workers", 0]
    common += ["--device", "cpu", *rule_backbone]
    return lambda *more: [*common, *more]


@pytest.fixture
def train(cli, flags):
    """train(...) runs train_lift.py with these flags and more -> Ran."""
    return lambda *more: cli("train_lift", *flags(*more))


@pytest.fixture
def measure(cli, folder, rule_backbone, rule_lift):
    """measure(...) runs train_lift.py --evaluate on the folder with these flags and more -> Ran."""

    def run(*more):
        flags = ["--evaluate", rule_lift, "--val_dataroot", folder, "--imsize", 64]
        flags += ["--batch_size", 3, "--workers", 0, "--device", "cpu", *rule_backbone]
        return cli("train_lift", *flags, *more)

    return run


@pytest.fixture(scope="module")
def rule_features(rule_weights):
    vit = plain_vit("vit_tiny_patch16_224", rule_weights)
    return lambda images: plain_features(vit, images)


def read_run(tmp_path):
    """The only run under tmp_path: its lift.pth, lift.json and the lines of metrics.jsonl."""
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((run / "lift.json").read_text())
    return torch.load(run / "lift.pth", weights_only=True), about, lines


def order(folder, epoch, seed=0):
    """The photos as an epoch sees them."""
    files = sorted(folder.rglob("*.jpg"))
    shuffled = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed + epoch))
    return [files[index] for index in shuffled]


def close(state, other, rel=1e-3):
    """Two trained state_dicts agree to 1 in 1000, except where the gradient is 0."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        if name not in NOISY:
            difference = (state[name] - value).float().norm()
            assert difference <= rel * value.float().norm(), name


def equal(state, other):
    """Two state_dicts agree to the bit."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(state[name], value), name


def without(state, ending):
    """A state_dict without the entries whose names end so."""
    return {name: value for name, value in state.items() if not name.endswith(ending)}


def one_line(text):
    """Whether a command printed one line on stderr, notes apart."""
    lines = [line for line in text.splitlines() if not line.startswith("note: ")]
    return len(lines) == 1 and text.endswith("\n")


def seeded_lift(**options):
    torch.manual_seed(0)
    return LiFT(192, 16, pre_shape=False, post_shape=False, **options)


def results_of(ran):
    """What a command has written for --json; strict, so that NaN is an error."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(ran.json.read_text(), parse_constant=refuse)


def test_the_command_equals_the_plain_loop(train, folder, tmp_path, rule_features):
    ran = train("--loss", "l2")
    assert ran.code == 0, ran.err
    state, about, lines = read_run(tmp_path)

    steps = []
    for epoch in range(2):
        files = order(folder, epoch)
        steps += [[files[0:3]], [files[3:6]], [files[6:8]]]
    lift = seeded_lift()
    losses = plain_train(steps, rule_features, lift, 64, "l2")
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-4)
    close(state, lift.state_dict())

    expected = {
        "backbone": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "layer": 11,
        "facet": "key",
        "patch": 16,
        "channels": 192,
        "attend": 0,
        "heads": 1,
        "downsample": "stride",
    }
    assert {key: about[key] for key in expected} == expected
    last = results_of(ran)
    assert last["settings"]["lr"] == 0.001 and last["metrics"] == lines[-1] == about["metrics"]
    written = (tmp_path / "runs/vit_tiny_patch16_224_0.001_l2_noaug_64").iterdir()
    assert {file.name for file in written} == {
        "lift_1.pth", "lift_2.pth", "lift.pth", "lift.json", "last.pth", "metrics.jsonl",
    }  # fmt: skip


def test_what_was_left_out_is_written_as_it_was_resolved(train, tmp_path, rule_extractor):
    ran = train("--epochs", 1)
    _, about, _ = read_run(tmp_path)
    for known in (results_of(ran)["settings"], about["settings"]):
        assert known["layer"] == 11 and known["stride"] == known["patch"] == 16
        assert known["channel"] == 192 and known["device"] == "cpu" and known["processes"] == 1
    assert about["digest"] == rule_extractor().digest


@pytest.fixture
def other_weights(rule_weights, tmp_path):
    """A weight file of the same backbone, fine-tuned, as it were."""
    state = load_file(rule_weights)
    state["cls_token"] = state["cls_token"] + 1
    save_file(state, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_evaluation_equals_the_plain_one(measure, folder, tmp_path, rule_lift, rule_features):
    ran = measure("--json", "-")
    assert ran.code == 0, ran.err
    (results,) = json.loads(ran.out.splitlines()[-1])["results"].values()

    files = sorted(folder.rglob("*.jpg"))
    centre = plain_centre(files, rule_features, 64)
    raw = plain_evaluate(files, rule_features, load_lift(rule_lift), 64)
    assert [results["lift"], results["bilinear"]] == pytest.approx(raw, abs=2e-5)
    centred = plain_evaluate(files, rule_features, load_lift(rule_lift), 64, centre=centre)
    found = [results["lift_centred"], results["bilinear_centred"]]
    assert found == pytest.approx(centred, abs=2e-5)
    assert abs(raw[1] - centred[1]) > 0.01
    assert results["photos"] == 8 and results["unreadable"] == []

    # the mean may be that of other photos, those trained on
    known = folder / "a"
    (results,) = results_of(measure("--dataroot", known))["results"].values()
    centre = plain_centre(sorted(known.iterdir()), rule_features, 64)
    expected = plain_evaluate(files, rule_features, load_lift(rule_lift), 64, centre=centre)
    found = [results["lift_centred"], results["bilinear_centred"]]
    assert found == pytest.approx(expected, abs=2e-5)


def test_evaluation_needs_no_four_patches(measure, folder, rule_lift, rule_features, tmp_path):
    """96 pixels are six patches of 16: S/2 can be measured, S/4 cannot."""
    ran = measure("--imsize", 96)
    assert ran.code == 0, ran.err
    (results,) = results_of(ran)["results"].values()
    files = sorted(folder.rglob("*.jpg"))
    expected = plain_evaluate(files, rule_features, load_lift(rule_lift), 96)
    assert [results["lift"], results["bilinear"]] == pytest.approx(expected, abs=2e-5)
    assert "lift_twice" not in results and "bilinear_twice" not in results

    ran = measure("--imsize", 80)
    assert ran.code == 2 and "not a multiple of 2 patches of 16: pass --imsize 64" in ran.err
    ran = measure("--evaluate", tmp_path / "none.pth")
    assert ran.code == 2 and "correct --evaluate" in ran.err and one_line(ran.err)


@pytest.mark.parametrize("heads", [1, 3])
def test_untrained_attention_is_bilinear(train, tmp_path, folder, heads):
    more = ["--attend", 1, "--heads", heads, "--lr", 0, "--downsample", "resize", "--epochs", 1]
    ran = train(*more, "--val_dataroot", folder)
    assert ran.code == 0, ran.err
    _, about, lines = read_run(tmp_path)
    val = lines[-1]["val"]
    assert val["lift"] == pytest.approx(val["bilinear"], abs=1e-5)
    assert val["lift_centred"] == pytest.approx(val["bilinear_centred"], abs=1e-5)
    assert val["bilinear_centred"] != val["bilinear"]
    assert val["lift_twice"] == pytest.approx(val["bilinear_twice"], abs=0.05)
    assert val["bilinear"] != val["nearest"]
    assert (about["attend"], about["heads"]) == (1, heads)
    assert about["downsample"] == "resize"
    assert about["metrics"]["val"] == val


@pytest.mark.parametrize("loss", ["centred", "both"])
def test_centred_losses_equal_the_plain_ones(train, folder, tmp_path, rule_features, loss):
    ran = train("--loss", loss, "--attend", 1, "--epochs", 1)
    assert ran.code == 0, ran.err
    state, about, lines = read_run(tmp_path)

    files = order(folder, 0)
    lift = seeded_lift(attend=1, heads=3)  # the backbone has as many
    centre = plain_centre(sorted(files), rule_features, 64)
    steps = [[files[0:3]], [files[3:6]], [files[6:8]]]
    losses = plain_train(steps, rule_features, lift, 64, loss, centre=centre)
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    # outc starts at zero, so that the first gradients are all but rounding, which Adam magnifies
    close(state, lift.state_dict(), rel=2e-2)
    assert about["attend"] == 1
    name = f"vit_tiny_patch16_224_0.001_{loss}_noaug_64_attend1"
    loaded = load_lift(tmp_path / "runs" / name / "lift.pth")
    assert (loaded.radius, loaded.heads) == (1, 3)


# ---- recipes ------------------------------------------------------------------------------------


def test_a_recipe_sets_defaults_and_flags_beside_it_win():
    def flags(*argv):
        return vars(train_lift.parser().parse_args(list(argv)))

    paper = flags()
    assert paper == flags("--recipe", "paper")
    for name, value in train_lift.RECIPES["paper"].items():
        assert paper[name] == value, name
    attend = flags("--recipe", "attend")
    for name, value in train_lift.RECIPES["attend"].items():
        assert attend[name] == value != paper[name], name

    # whatever their order, and where the flag has the other recipe's value
    mixed = flags("--lr", "0.001", "--no-augment", "--recipe", "attend", "--match", "0")
    assert (mixed["lr"], mixed["augment"], mixed["match"]) == (0.001, False, 0)
    assert mixed["batch_size"] == attend["batch_size"]


def test_settings_show_what_a_recipe_set(train, tmp_path):
    more = ["--recipe", "attend", "--epochs", 1, "--batch_size", 4]
    ran = train(*more)
    assert ran.code == 0, ran.err
    _, about, _ = read_run(tmp_path)
    for known in (results_of(ran)["settings"], about["settings"]):
        assert known["recipe"] == "attend" and known["loss"] == "both" and known["attend"] == 1
        assert known["heads"] == 3 and known["match_end"] == 0.4 and known["batch_size"] == 4
    assert (about["attend"], about["heads"], about["downsample"]) == (1, 3, "resize")

    # how its flags were set does not matter at --resume
    for name, value in train_lift.RECIPES["attend"].items():
        if value is True:
            more += [f"--{name}"]
        elif name not in ("epochs", "batch_size"):
            more += [f"--{name}", value]
    more[1] = "paper"
    ran = train(*more, "--resume")
    assert ran.code == 0 and "there is no" not in ran.err, ran.err


# ---- points of a photo and its warped copy ------------------------------------------------------


def test_matching_equals_the_plain_version(train, folder, tmp_path, rule_features):
    """The loss of the first epoch, whose photos and copies are those of the data set."""
    more = ["--match", 0.5, "--loss", "both", "--attend", 1, "--epochs", 1, "--augment"]
    more += ["--match_centred", 0.25]
    ran = train(*more)
    assert ran.code == 0, ran.err
    _, _, lines = read_run(tmp_path)

    paths = sorted(folder.rglob("*.jpg"))
    photos = objectives.Photos(paths, 64, augment=True, warp=True)
    centre = plain_pair_centre(photos, rule_features)
    lift = seeded_lift(attend=1, heads=3)
    optimizer = torch.optim.Adam(lift.parameters(), lr=0.001)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for indices in (shuffled[0:3], shuffled[3:6], shuffled[6:8]):
        items = [photos[0, index] for index in indices]
        levels = []
        for level in ("full", "half", "quarter"):
            pixels = torch.cat([item[level] for item in items])
            levels.append((pixels / 255 - 0.5) / 0.5)
        f1, f2, f3 = [rule_features(images) for images in levels]
        out = lift(levels[1], f2)
        loss = plain_loss("both", out, f1, centre)
        warps = [item["warp"] for item in items]
        loss = loss + 0.5 * plain_matched(out, warps, centre, 0.25)
        loss = loss + plain_loss("both", lift(levels[2], f3), f2, centre)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def plain_pair_centre(photos, features):
    """The mean feature [C, 1, 1] of photos and copies."""
    means = []
    for index in range(len(photos)):
        images = (photos[0, index]["full"] / 255 - 0.5) / 0.5
        means.append(features(images).mean((0, 2, 3)))
    return torch.stack(means).mean(0)[:, None, None]


def test_held_out_photos_are_not_trained_on(folder):
    flags = ["--dataroot", str(folder), "--val_fraction", "0.25"]
    args = train_lift.parser().parse_args(flags)
    train, val = train_lift.split(args)
    assert len(val) == 2 and sorted(train + val) == sorted(folder.rglob("*.jpg"))
    assert train_lift.split(args) == (train, val)


def test_too_little_is_said(train, folder):
    """No photo held out, few of them, few steps, and a module that is worse than bilinear."""
    ran = train()
    assert "none of the 8 photos is held out" in ran.err and "pass --val_dataroot" in ran.err
    assert "note: 6 steps in all" in ran.err and "below bilinear" not in ran.err

    ran = train("--val_fraction", 0.25, "--loss", "l1", "--seed", 1)
    assert "validated on 2 photos only" in ran.err and "held out" not in ran.err
    val = results_of(ran)["metrics"]["val"]
    assert val["lift"] < val["bilinear"] - 0.1
    said = f"note: LiFT ({val['lift']:.2f}) is below bilinear interpolation ({val['bilinear']:.2f})"
    assert said in ran.err and "What usually helps" in ran.err


def test_enough_is_not_talked_about(capsys):
    train_lift.note_what_is_too_little(photos=1000, held_out=20, steps=1000)
    train_lift.note_below_bilinear({"photos": 20, "lift": 0.8, "bilinear": 0.8})
    assert capsys.readouterr() == ("", "")


def test_evaluation_says_what_is_below_bilinear(measure):
    ran = measure()
    assert ran.code == 0 and "is below bilinear interpolation" in ran.err


# ---- augmentation, order, schedule --------------------------------------------------------------


def test_options_reach_the_optimizer(train, tmp_path, rule_features, folder):
    """AdamW, cosine with warmup, against the same by hand."""
    more = ["--weight_decay", 0.1, "--schedule", "cosine", "--warmup", 1]
    assert train(*more).code == 0
    state, _, _ = read_run(tmp_path)

    lift = seeded_lift()
    optimizer = torch.optim.AdamW(lift.parameters(), lr=0.001, weight_decay=0.1)
    step = 0
    for epoch in range(2):
        files = order(folder, epoch)
        for batch in (files[:3], files[3:6], files[6:]):
            warmup = 0.5 if step == 0 else 1
            decay = 0.5 * (1 + math.cos(math.pi * step / 6))
            optimizer.param_groups[0]["lr"] = 0.001 * decay * warmup
            plain_train([[batch]], rule_features, lift, 64, optimizer=optimizer)
            step += 1
    close(state, lift.state_dict())


# ---- stopping and going on ----------------------------------------------------------------------


def die_before(monkeypatch, step, how):
    """Let the run call `how` before its optimizer step number `step`."""
    real = train_lift.train_step
    calls = itertools.count()

    def dying(*args):
        if next(calls) == step:
            how()
        return real(*args)

    monkeypatch.setattr(train_lift, "train_step", dying)


@pytest.mark.parametrize(("killed", "save_steps"), [(1, 2), (2, 1), (3, 2)])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    train, tmp_path, monkeypatch, killed, save_steps
):
    more = ["--augment", "--save_steps", save_steps, "--schedule", "cosine"]
    more += ["--val_fraction", 0.25, "--loss", "both"]
    assert train(*more, "--output_dir", tmp_path / "whole" / "runs").code == 0

    def kill():
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        die_before(patch, killed, kill)
        assert train(*more).code == 9
    ran = train(*more, "--resume")
    assert ran.code == 0, ran.err
    state, _, lines = read_run(tmp_path)
    whole, _, whole_lines = read_run(tmp_path / "whole")
    equal(state, whole)
    for line in lines + whole_lines:
        del line["photos_per_s"]
    assert lines == whole_lines


def test_a_signal_saves_and_says_how_to_go_on(train, tmp_path, monkeypatch):
    assert train("--output_dir", tmp_path / "whole" / "runs").code == 0
    with monkeypatch.context() as patch:
        die_before(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ran = train("--save_steps", 0)
    assert ran.code == 128 + signal.SIGTERM
    assert "SIGTERM after step 2: pass --resume" in ran.err
    ran = train("--save_steps", 0)
    assert ran.code == 2 and "pass --resume" in ran.err
    ran = train("--save_steps", 0, "--resume", "--batch_size", 4)
    assert ran.code == 2 and "made with batch_size 3, not 4: pass the same" in ran.err
    assert train("--save_steps", 0, "--resume").code == 0
    equal(read_run(tmp_path)[0], read_run(tmp_path / "whole")[0])


def test_a_run_is_resumed_from_its_folder_spelled_otherwise(train, folder, tmp_path, monkeypatch):
    assert train("--epochs", 1).code == 0
    monkeypatch.chdir(folder.parent)
    other = f"../{folder.parent.name}/{folder.name}"
    ran = train("--resume", "--dataroot", other)
    assert ran.code == 0, ran.err
    assert len(read_run(tmp_path)[2]) == 2


def test_a_run_is_resumed_after_its_photos_were_moved(train, folder, tmp_path):
    """What counts are their names below the root, and how many there are."""
    photos = tmp_path / "photos"
    val_photos = tmp_path / "val_photos"
    shutil.copytree(folder, photos)
    shutil.copytree(folder / "a", val_photos)
    more = ["--dataroot", photos, "--val_dataroot", val_photos]
    assert train(*more, "--output_dir", tmp_path / "whole" / "runs").code == 0
    assert train(*more, "--epochs", 1).code == 0

    moved = (tmp_path / "drive").mkdir() or tmp_path / "drive/photos"
    photos.rename(moved)
    linked = tmp_path / "link"
    linked.symlink_to(val_photos)
    ran = train("--dataroot", moved, "--val_dataroot", linked, "--resume")
    assert ran.code == 0, ran.err
    equal(read_run(tmp_path)[0], read_run(tmp_path / "whole")[0])

    # a pattern over the same photos
    ran = train("--dataroot", f"{moved}/**/*.jpg", "--val_dataroot", linked, "--resume")
    assert ran.code == 0, ran.err

    # other names, and as many
    (moved / "a/0.jpg").rename(moved / "a/00.jpg")
    ran = train("--dataroot", moved, "--val_dataroot", linked, "--resume", "--epochs", 3)
    assert ran.code == 2 and "made with photos_digest" in ran.err and one_line(ran.err)


def test_nothing_to_resume_is_said(train):
    ran = train("--resume", "--epochs", 1)
    assert ran.code == 0 and "last.pth to go on from" in ran.err


def test_what_decides_the_weights_must_stay(train, folder, tmp_path, other_weights):
    """The photos, the weights of the backbone, the number of processes."""
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    more = ["--dataroot", photos, "--epochs", 1]
    assert train(*more).code == 0

    ran = train(*more, "--resume", "--backbone_path", other_weights)
    assert ran.code == 2 and "made with digest" in ran.err

    shutil.copy(photos / "a/0.jpg", photos / "a/8.jpg")
    ran = train(*more, "--resume")
    assert ran.code == 2 and "made with photos 8, not 9: pass the same" in ran.err
    (photos / "a/8.jpg").unlink()

    (last,) = tmp_path.glob("runs/*/last.pth")
    state = torch.load(last, weights_only=True)
    state["settings"]["processes"] = 2
    torch.save(state, last)
    ran = train(*more, "--resume")
    assert ran.code == 2 and one_line(ran.err) and "--processes" not in ran.err
    assert "processes 2, not 1: start it by torchrun --nproc_per_node 2" in ran.err


def test_a_run_is_not_resumed_to_fewer_epochs(train, tmp_path):
    """Its module would be of more training than its settings and metrics tell."""
    assert train().code == 0
    (lift,) = tmp_path.glob("runs/*/lift.pth")
    before = lift.read_bytes()
    ran = train("--epochs", 1, "--resume")
    assert ran.code == 2 and one_line(ran.err)
    told = "holds 6 steps, more than the 3 of --epochs 1: pass --epochs 2 or more\n"
    assert ran.err.endswith(told)
    assert lift.read_bytes() == before
    assert train("--resume").code == 0  # as many as were made is no error


def test_a_damaged_checkpoint_is_not_resumed(train, tmp_path):
    run = tmp_path / "runs" / "vit_tiny_patch16_224_0.001_cosine_noaug_64"
    run.mkdir(parents=True)
    (run / "last.pth").write_bytes(b"half a file")
    ran = train("--resume")
    assert ran.code == 2 and "cannot read weights from" in ran.err
    assert ran.err.endswith("remove it, and start again\n") and one_line(ran.err)


def test_tensorboard_shows_the_metrics(train, tmp_path, monkeypatch):
    shown = {}
    on_disk = {}

    def add_scalar(name, value, step):
        shown[name, step] = value

    # it keeps events in memory, and writes none of them by itself when the process ends
    writer = types.SimpleNamespace(add_scalar=add_scalar, flush=lambda: on_disk.update(shown))
    stub = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    assert train("--tensorboard", "--val_fraction", 0.25).code == 0
    _, _, lines = read_run(tmp_path)
    assert [on_disk["loss", 2], on_disk["loss", 4]] == [line["loss"] for line in lines]
    assert on_disk["lift", 4] == lines[1]["val"]["lift"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    ran = train("--tensorboard", "--output_dir", tmp_path / "other")
    assert ran.code == 2 and "pip install tensorboard" in ran.err and one_line(ran.err)


# ---- compiled -----------------------------------------------------------------------------------


def test_compiled_equals_eager(train, tmp_path, monkeypatch):
    """Everything but the code generator, on a backbone of the usual depth."""
    assert train("--output_dir", tmp_path / "eager/runs").code == 0
    compile_module = torch.nn.Module.compile
    compiled = []

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    assert train("--compile").code == 0
    assert compiled == ["Objective"] + ["Block"] * 12
    close(read_run(tmp_path)[0], read_run(tmp_path / "eager")[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="the code generator needs a C++ compiler")
def test_compile_runs_on_a_cpu(cli, folder, tmp_path):
    """With the code generator, on timm's smallest ViT; float32, where it once crashed."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "backbone.safetensors")
    flags = ["--dataroot", folder, "--imsize", 64, "--batch_size", 4, "--epochs", 1]
    flags += ["--val_fraction", 0, "--workers", 0, "--device", "cpu", "--model_type", "test_vit"]
    flags += ["--backbone_path", tmp_path / "backbone.safetensors"]
    assert cli("train_lift", *flags, "--output_dir", tmp_path / "eager/runs").code == 0
    ran = cli("train_lift", *flags, "--output_dir", tmp_path / "runs", "--compile")
    assert ran.code == 0, ran.err
    compiled = read_run(tmp_path)
    eager = read_run(tmp_path / "eager")
    assert compiled[2][0]["loss"] == pytest.approx(eager[2][0]["loss"], rel=1e-4)


# ---- processes of their own ---------------------------------------------------------------------


def program(*flags, processes=1):
    """train_lift.py as a program, or as several by torchrun: its command line and environment."""
    script = Path(train_lift.__file__)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc_per_node", str(processes)]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(script.parent)
    environment["OMP_NUM_THREADS"] = "1"
    return [*start, str(script), *[str(flag) for flag in flags]], environment


def wait_for(process, tmp_path, pattern):
    """Wait until the run has written a file of this pattern; fail where it ends before."""
    deadline = time.monotonic() + 300  # a crowded machine is slow
    while not list(tmp_path.glob(pattern)):
        if process.poll() is not None:
            said = ""
            if process.stderr:
                said = process.stderr.read()
            pytest.fail(f"it ended with {process.returncode} and no {pattern}: {said}")
        if time.monotonic() > deadline:
            pytest.fail(f"no {pattern} after five minutes")
        time.sleep(0.01)


def test_sigkill(train, flags, tmp_path):
    """A real SIGKILL at whatever step the run has reached."""
    long = ["--epochs", 12, "--save_every", 12, "--save_steps", 3]
    assert train(*long, "--output_dir", tmp_path / "whole/runs").code == 0
    start, environment = program(*flags(*long))
    with subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(process, tmp_path, "runs/*/last.pth")
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert train(*long, "--resume").code == 0
    equal(read_run(tmp_path)[0], read_run(tmp_path / "whole")[0])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_whole_group_saves(flags, folder, tmp_path, processes):
    """As Ctrl-C and most job systems send it; torchrun passes it on to its processes."""
    long = ["--epochs", 1000, "--save_every", 1000, "--save_steps", 0, "--workers", 2]
    long += ["--batch_size", 4 // processes, "--val_dataroot", folder]
    start, environment = program(*flags(*long), processes=processes)
    with subprocess.Popen(
        start,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_for(process, tmp_path, "runs/*/metrics.jsonl")
            (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
            last = metrics.with_name("last.pth")
            os.killpg(process.pid, signal.SIGTERM)
            _, said = process.communicate(timeout=180)
        finally:
            # Whatever failed above, nobody is to wait for its 1000 epochs. torchrun's processes are
            # groups of their own: it must have the time to end them.
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert said.count("stopped by SIGTERM after step") == 1, said
    assert "DataLoader worker" not in said
    step = int(said.split("stopped by SIGTERM after step ")[1].split(":")[0])
    assert torch.load(last, weights_only=True)["step"] == step
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("loss", ["l2", "both"])
def test_two_processes_equal_the_plain_loop_on_both_their_batches(
    flags, measure, folder, tmp_path, rule_features, loss
):
    more = ["--batch_size", 2, "--loss", loss, "--val_dataroot", folder]
    start, environment = program(*flags(*more), processes=2)
    ran = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    state, _, lines = read_run(tmp_path)

    steps = []
    for epoch in range(2):
        files = order(folder, epoch)
        for at in (0, 4):
            steps.append([files[at : at + 4 : 2], files[at + 1 : at + 4 : 2]])
    lift = seeded_lift()
    centre = plain_centre(sorted(files), rule_features, 64)
    losses = plain_train(steps, rule_features, lift, 64, loss, centre=centre)
    means = [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-4)
    own = ("running_mean", "running_var", "num_batches_tracked")  # each process has its own
    rel = 1e-3 if loss == "l2" else 1e-2  # of cosines some gradients are all but rounding
    close(without(state, own), without(lift.state_dict(), own), rel)

    printed = []
    for line in ran.stdout.splitlines():
        if line and not line.startswith("[Gloo]"):
            printed.append(line)
    assert lines[-1]["val"]["photos"] == 8
    assert len(printed) == 3, "the first process alone prints"
    assert ran.stderr.count("note: 4 steps in all") == 1

    # what was measured is what was exported, though each process has batch norms of its own
    (lift,) = tmp_path.glob("runs/*/lift.pth")
    (again,) = results_of(measure("--evaluate", lift))["results"].values()
    for name in ("lift", "lift_twice", "lift_centred"):
        assert lines[-1]["val"][name] == pytest.approx(again[name], abs=2e-5), name


def test_matching_of_two_processes_equals_that_of_one(flags, folder, tmp_path, rule_features):
    """Though their photos have different numbers of points: as many weigh as much."""
    more = ["--batch_size", 2, "--epochs", 1, "--match", 0.5, "--loss", "both"]
    start, environment = program(*flags(*more), processes=2)
    ran = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    _, _, lines = read_run(tmp_path)

    photos = objectives.Photos(sorted(folder.rglob("*.jpg")), 64, warp=True)
    centre = plain_pair_centre(photos, rule_features)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    lift = seeded_lift()
    optimizer = torch.optim.Adam(lift.parameters(), lr=0.001)
    losses = []
    for at in (0, 4):
        total = torch.zeros(())
        raw = []
        centred = []
        for process in (0, 1):
            indices = shuffled[at + process : at + 4 : 2]
            items = [photos[0, index] for index in indices]
            levels = []
            for level in ("full", "half", "quarter"):
                pixels = torch.cat([item[level] for item in items])
                levels.append((pixels / 255 - 0.5) / 0.5)
            f1, f2, f3 = [rule_features(images) for images in levels]
            out = lift(levels[1], f2)
            total = total + plain_loss("both", out, f1, centre) / 2
            total = total + plain_loss("both", lift(levels[2], f3), f2, centre) / 2
            warps = [item["warp"] for item in items]
            raw += plain_match_losses(out, warps, 0.05)
            centred += plain_match_losses(out - centre, warps, 0.1)
        matched = (torch.stack(raw).mean() + torch.stack(centred).mean()) / 2
        loss = total + 0.5 * matched
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert lines[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("gpus", "number", "by_torchrun", "wanted"),
    [
        (4, "2", True, 2),
        (1, "0", True, 0),
        (1, "3", False, 0),  # Slurm shows each process its own GPU alone
        (4, "2", False, 2),
        (1, "1", True, None),
        (2, "2", False, None),
    ],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, gpus, number, by_torchrun, wanted):
    monkeypatch.setenv("LOCAL_RANK", number)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if wanted is None:
        with pytest.raises(ValueError, match=f"pass --nproc_per_node {gpus}"):
            train_lift.own_gpu(gpus)
    else:
        assert train_lift.own_gpu(gpus) == wanted


def test_one_gpu_for_all_processes_is_refused(train, monkeypatch):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = train("--device", "cuda:0")
    assert ran.code == 2 and "pass --device cuda" in ran.err and one_line(ran.err)
    monkeypatch.delenv("LOCAL_RANK")
    ran = train()
    assert ran.code == 2 and "LOCAL_RANK is not set" in ran.err and one_line(ran.err)


# what happens to a worker, or to what it reads, and what the command then says
ACCIDENTS = {
    "photos vanish": "check that they are still there",
    "a worker is killed": "a worker was killed",
    "everybody is told to end": "stopped by SIGTERM after step",
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_ends_the_run_and_keeps_what_was_written(flags, folder, tmp_path, accident):
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    long = ["--dataroot", photos, "--epochs", 10_000, "--save_every", 10_000, "--workers", 2]
    start, environment = program(*flags(*long))
    with subprocess.Popen(
        start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for(process, tmp_path, "runs/*/metrics.jsonl")
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if accident == "photos vanish":
                shutil.rmtree(photos)
            elif accident == "a worker is killed":
                os.kill(int(workers[0]), signal.SIGKILL)
            else:
                for number in (*workers, process.pid):
                    os.kill(int(number), signal.SIGTERM)
            _, said = process.communicate(timeout=180)
        finally:
            process.kill()
    assert ACCIDENTS[accident] in said and one_line(said), said
    assert process.returncode == (128 + signal.SIGTERM if "told" in accident else 2)
    (last,) = tmp_path.glob("runs/*/last.pth")
    assert torch.load(last, weights_only=True)["step"] >= 3
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists(), "no worker outlives the run"


def test_processes_that_torchrun_did_not_start(train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ran = train()
    assert ran.code == 2 and "start the processes with torchrun" in ran.err and one_line(ran.err)


def test_a_folder_that_cannot_be_written_is_found_first(train, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_lift, "build_extractor", None)  # a call would fail
    ran = train("--output_dir", tmp_path / "file/runs")
    assert ran.code == 2 and "pass another --output_dir" in ran.err and one_line(ran.err)


@pytest.mark.parametrize(
    ("more", "ending"),
    [
        (["--layer", 11], "_64"),
        (["--layer", 9], "_64_layer9"),
        (["--facet", "token"], "_64_token"),
        (["--layer", 3, "--facet", "query", "--attend", 1], "_64_layer3_query_attend1"),
        (["--attend", 1, "--heads", 2], "_64_attend1_heads2"),
        (["--match", 0.5], "_64_match0.5"),
        (["--match", 0.5, "--match_end", 0.2], "_64_match0.5to0.2"),
        (["--match", 0.5, "--match_centred", 1], "_64_match0.5_centred1.0"),
        (["--seed", 3], "_64_seed3"),
    ],
)
def test_folders_name_layer_and_facet(flags, rule_extractor, tmp_path, more, ending):
    args = train_lift.parser().parse_args([str(flag) for flag in flags(*more)])
    run = train_lift.run_folder(args, rule_extractor(layer=args.layer, facet=args.facet))
    assert run == tmp_path / f"runs/vit_tiny_patch16_224_0.001_cosine_noaug{ending}"


def test_another_layer_and_facet_are_trained_for_and_recorded(train, tmp_path):
    ran = train("--epochs", 1, "--layer", 3, "--facet", "query")
    assert ran.code == 0
    _, about, _ = read_run(tmp_path)
    assert (about["layer"], about["facet"]) == (3, "query")
    assert about["settings"]["layer"] == 3


# ---- one's own backbone -------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

def convolution():
    return nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24))

class Tokens(nn.Module):
    def __init__(self, channels, size):
        super().__init__()
        self.size, self.proj = size, nn.Conv2d(3, channels, 16, 16)

    def forward(self, images):
        assert self.size in (None, images.shape[-1]), f"made for {self.size}"
        x = self.proj(images).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], x], 1)

def tokens(args):
    return Tokens(args.seed + 20, None)  # the flags reach it

def other():
    return nn.Linear(5, 5)

def one_size(args):
    return Tokens(20, 64)
"""


@pytest.fixture
def own(import_path):
    (import_path / "own_backbone.py").write_text(OWN)


@pytest.mark.parametrize(
    ("function", "patch", "channels"), [("convolution", 8, 24), ("tokens", 16, 22)]
)
def test_own_backbone(train, tmp_path, own, function, patch, channels):
    # `tokens` has --seed + 20 channels
    more = ["--my_extractor", f"own_backbone:{function}", "--seed", 2]
    ran = train(*more, "--cache_features", tmp_path / "cache")
    assert ran.code == 0, ran.err
    state, about, _ = read_run(tmp_path)
    assert state["outc.weight"].shape[0] == about["channels"] == channels
    assert about["patch"] == patch
    assert about["backbone"] == f"own_backbone:{function}"


# ---- bad input ----------------------------------------------------------------------------------

BAD = {
    "own_size": (
        ["--my_extractor", "own_backbone:one_size"],
        "does not take 32 pixels (made for 64)",
    ),
    "own_other": (
        ["--my_extractor", "own_backbone:other"],
        "cannot be used on images of 64 pixels",
    ),
    "attn": (["--facet", "attn"], "pass another backbone or facet"),
    "heads": (["--attend", 1, "--heads", 5], "5 heads do not divide 192 channels: pass --heads 1"),
    "no heads": (["--heads", 0], "--heads 0 is too small: pass 1 or more"),
    "match_end": (["--match_end", -1], "--match_end -1.0 is too small: pass 0 or more"),
    "match_centred": (["--match_centred", 2], "--match_centred 2.0 is not a share: pass 0 to 1"),
    "own_missing": (
        ["--my_extractor", "own_backbone:nothing"],
        "pass --my_extractor module:function",
    ),
    "own_bare": (["--my_extractor"], "my_extractor(args) in extractor.py is still empty"),
    "imsize": (
        ["--imsize", 100],
        "--imsize 100 is not a multiple of 4 patches of 16: pass --imsize 64",
    ),
    "loss": (["--loss", "l3"], "--loss: invalid choice: 'l3' (choose from "),
    "stride": (["--stride", 8], "leave out --stride 8"),
    "channel": (["--channel", 384], "leave --channel out"),
    "epochs": (["--epochs", 0], "--epochs 0 is too small: pass 1 or more"),
    "val_fraction": (["--val_fraction", -0.5], "--val_fraction -0.5 is too small: pass 0"),
    "all held out": (["--val_fraction", 1], "--val_fraction 1.0 is too large: pass less than 1"),
    "warmup": (["--warmup", -1], "--warmup -1 is too small: pass 0 or more"),
    "save_steps": (["--save_steps", -3], "--save_steps -3 is too small: pass 0 or more"),
    "attend": (["--attend", -1], "--attend -1 is too small: pass 0 or more"),
    "no match": (["--match", "nan"], "--match nan is too small: pass 0 or more"),
    "match": (["--match", -0.1], "--match -0.1 is too small: pass 0 or more"),
    "no folder": (["--dataroot", "nowhere"], "no images at nowhere"),
    "nothing": (
        ["--evaluate", "lift.pth"],
        "pass --dataroot FOLDER to train, or --evaluate FILE --val_dataroot",
    ),
    "lr": (["--lr", 1e38], "--lr 1e+38 is too large: pass less than 1e+37"),
    "no lr": (["--lr", "nan"], "--lr nan is too small: pass 0 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(train, own, case):
    more, message = BAD[case]
    ran = train(*more)
    assert ran.code == 2 and message in ran.err
    assert one_line(ran.err) and "Traceback" not in ran.err


def test_nan_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    real = train_lift.train_step

    def spoil_the_second(model, *arguments):
        answer = real(model, *arguments)
        if len(calls) == 1:
            model.lift.outc.weight.data.fill_(math.nan)
        calls.append(model)
        return answer

    calls = []
    monkeypatch.setattr(train_lift, "train_step", spoil_the_second)
    ran = train("--save_steps", 1)
    assert ran.code == 2 and "not finite after step 2" in ran.err
    (last,) = tmp_path.glob("runs/*/last.pth")
    state = torch.load(last, weights_only=True)
    assert state["step"] == 1
    assert len(state["losses"]) == 1 and math.isfinite(state["losses"][0])
    for value in state["lift"].values():
        assert value.isfinite().all()


@pytest.mark.parametrize("validated", [False, True])
def test_a_last_step_that_diverges_is_an_error(train, tmp_path, folder, validated):
    """One step in all: its loss is finite, and what it makes of the weights is not usable."""
    more = ["--lr", 1e30, "--epochs", 1, "--batch_size", 8]
    if validated:
        more += ["--val_dataroot", folder]
    ran = train(*more)
    assert ran.code == 2 and one_line(ran.err)
    assert "not finite after step 1" in ran.err and "pass a smaller --lr" in ran.err
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("validated", [False, True])
def test_features_that_overflow_are_no_matter_of_the_lr(
    train, folder, rule_weights, tmp_path, validated
):
    """Keys of 100,000 are numbers in float32, but neither in float16 nor in a cache."""
    state = load_file(rule_weights)
    _, keys, _ = state["blocks.11.attn.qkv.bias"].chunk(3)
    keys += 1e5
    save_file(state, tmp_path / "large.safetensors")
    more = ["--backbone_path", tmp_path / "large.safetensors", "--epochs", 1]
    if validated:
        more += ["--val_dataroot", folder]
    cases = [
        (["--dtype", "float16"], "not finite in float16: pass --dtype float32"),
        (["--cache_features", tmp_path / "cache"], "leave out --cache_features"),
    ]
    for flags, message in cases:
        ran = train(*more, *flags)
        assert ran.code == 2 and message in ran.err and one_line(ran.err)
    ran = train(*more)
    assert ran.code == 0, ran.err


def test_broken_photos_are_replaced_counted_and_named(train, folder, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    (photos / "a/0.jpg").write_bytes(b"no photo")
    cut = photos / "b/3.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    more = ["--dataroot", photos, "--val_dataroot", photos, "--workers", 1]
    ran = train(*more)
    assert ran.code == 0, ran.err
    last = results_of(ran)
    assert [Path(name).name for name in last["unreadable"]] == ["0.jpg", "3.jpg"]
    val = last["metrics"]["val"]
    assert val["photos"] == 6 and len(val["unreadable"]) == 2
    assert "2 photos could not be read" in ran.err
    for file in photos.rglob("*.jpg"):
        file.write_bytes(b"no photo")
    ran = train("--dataroot", photos, "--output_dir", tmp_path / "other")
    assert ran.code == 2 and "none of the 8 photos from" in ran.err and "can be read" in ran.err
    assert one_line(ran.err)


def test_a_full_disk_is_one_line_and_keeps_what_was_written(train, tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    die_before(monkeypatch, 2, fill_the_disk)
    try:
        ran = train("--save_steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 2 and "cannot write" in ran.err and one_line(ran.err)
    (last,) = tmp_path.glob("runs/*/last.pth")
    assert torch.load(last, weights_only=True)["step"] == 2
    assert {file.name for file in last.parent.iterdir()} == {"last.pth", "metrics.jsonl"}
    monkeypatch.undo()
    assert train("--save_steps", 1, "--resume").code == 0
