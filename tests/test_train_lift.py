"""train_lift.py: golden losses, the plain loop, resume, processes, cache, bad input; all on photos of 64 pixels unless golden."""

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
import torch
import torch.nn.functional as F
from conftest import rule_image, rule_state
from PIL import Image
from plain_train import plain_evaluate, plain_features, plain_train, plain_vit
from torch.utils.data import DataLoader, default_collate

import train_lift
from extractor import ViTExtractor
from lift import LiFT, load_lift

# Biases before a batch norm have gradient 0: Adam moves them, and the running means behind them, by noise.
NOISY = [f"image_convs_{n}" for n in ("1.0.bias", "1.3.bias", "2.0.bias")]
NOISY += [f"image_convs_{n}.running_mean" for n in ("1.1", "1.4", "2.1")]


@pytest.fixture(scope="module")
def golden_batch(shared):
    """The golden photos as one batch with their real features."""
    golden = json.loads((shared / "golden/train.json").read_text())
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    extractor = ViTExtractor("vit_tiny_patch16_224", backbone_path=weights, device="cpu")
    photos = train_lift.Photos([shared / "data/train_images" / name for name in golden["images"]], golden["imsize"])
    batch = default_collate([photos[0, i] for i in range(len(photos))])
    _, feats = train_lift.scales(batch, extractor)
    return golden, extractor, batch | dict(zip(("f1", "f2", "f3"), feats))


@pytest.mark.parametrize("loss", ["cosine", "l1", "l2"])
def test_golden_losses_and_weights(golden_batch, loss):
    golden, extractor, batch = golden_batch
    lift = LiFT(192, 16)
    lift.load_state_dict(rule_state(lift))
    model, optimizer = train_lift.Objective(lift, loss), torch.optim.Adam(lift.parameters(), lr=golden["lr"])
    losses = [train_lift.train_step(model, [batch], 1, extractor, optimizer)[0].item() for _ in range(golden["steps"])]
    assert losses == pytest.approx(golden["losses"][loss], rel=1e-4)
    for name, after in golden["after"][loss].items():
        value = lift.state_dict()[name].float()
        # Adam moves every entry by about lr a step, so one whose gradient is rounding noise may end on either side
        either = 2 * golden["steps"] * golden["lr"] / value.numel()
        close = 1e-3 * max(after["std"], abs(after["mean"])) + (golden["lr"] if name in NOISY else either)
        assert value.mean().item() == pytest.approx(after["mean"], abs=close), name
        assert value.numel() == 1 or value.std().item() == pytest.approx(after["std"], abs=close), name


# ---- the command line on a small folder -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small photos, smooth and seeded, in two subfolders."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(8):
        pixels = (rule_image(80, 96, k)[0].permute(1, 2, 0).clamp(-2, 2) * 60 + 128).byte().numpy()
        (root / "ab"[k % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "ab"[k % 2] / f"{k}.jpg", quality=95)
    return root


@pytest.fixture
def flags(folder, tmp_path, rule_backbone):
    """flags(...) -> the flags of a short run on the CPU, and more."""
    common = ["--dataroot", folder, "--output_dir", tmp_path / "runs", "--imsize", 64, "--batch_size", 3, "--workers", 0]
    return lambda *more: [*common, "--device", "cpu", "--epochs", 2, "--val_fraction", 0, *rule_backbone, *more]


@pytest.fixture(scope="module")
def rule_features(rule_backbone):
    vit = plain_vit("vit_tiny_patch16_224", rule_backbone[-1])
    return lambda images: plain_features(vit, images)


def read_run(tmp_path):
    """The only run under tmp_path: its lift.pth, lift.json and the lines of metrics.jsonl."""
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.load(run / "lift.pth", weights_only=True), json.loads((run / "lift.json").read_text()), lines


def order(folder, epoch, seed=0):
    """The photos as an epoch sees them."""
    files = sorted(folder.rglob("*.jpg"))
    return [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed + epoch))]


def close(state, other):
    """Two trained state_dicts agree to 1 in 1000, except where the gradient is 0."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert name in NOISY or (state[name] - value).float().norm() <= 1e-3 * value.float().norm(), name


def seeded_lift(**options):
    torch.manual_seed(0)
    return LiFT(192, 16, **options)


def test_the_command_equals_the_plain_loop(cli, flags, folder, tmp_path, rule_features):
    ran = cli("train_lift", *flags("--loss", "l2"))
    assert ran.code == 0, ran.err
    state, about, lines = read_run(tmp_path)
    lift, epochs = seeded_lift(), [order(folder, epoch) for epoch in range(2)]
    steps = [[files[at : at + 3]] for files in epochs for at in range(0, 8, 3)]
    losses = plain_train(steps, rule_features, lift, 64, "l2")
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-4)
    close(state, lift.state_dict())
    assert {key: about[key] for key in ("backbone", "layer", "facet", "patch", "width", "residual", "downsample")} == {
        "backbone": "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "layer": 11, "facet": "key", "patch": 16, "width": 192,
        "residual": False, "downsample": "stride",
    }  # fmt: skip
    last = json.loads(ran.out.splitlines()[-1])
    assert last["settings"]["lr"] == 0.001 and last["metrics"] == lines[-1] == about["metrics"]
    assert {f.name for f in (tmp_path / "runs/vit_tiny_patch16_224_0.001_l2_noaug_64").iterdir()} == {
        "lift_1.pth", "lift_2.pth", "lift.pth", "lift.json", "last.pth", "metrics.jsonl",
    }  # fmt: skip


def test_evaluation_equals_the_plain_one(cli, folder, tmp_path, rule_backbone, rule_lift, rule_features):
    flags = ["--evaluate", rule_lift, "--val_dataroot", folder, "--imsize", 64, "--batch_size", 3, "--workers", 0, *rule_backbone]
    ran = cli("train_lift", *flags, "--device", "cpu", "--json", tmp_path / "line.json")
    assert ran.code == 0, ran.err
    last = json.loads(ran.out.splitlines()[-1])
    assert json.loads((tmp_path / "line.json").read_text()) == last
    (results,) = last["results"].values()
    expected = plain_evaluate(sorted(folder.rglob("*.jpg")), rule_features, load_lift(rule_lift), 64)
    assert [results["lift"], results["bilinear"]] == pytest.approx(expected, abs=2e-5)
    assert results["photos"] == 8 and results["unreadable"] == []


def test_an_untrained_residual_module_is_bilinear(cli, flags, tmp_path, folder):
    ran = cli("train_lift", *flags("--residual", "--lr", 0, "--downsample", "resize", "--epochs", 1, "--val_dataroot", folder))
    assert ran.code == 0, ran.err
    _, about, lines = read_run(tmp_path)
    val = lines[-1]["val"]
    assert val["lift"] == val["bilinear"] and val["lift_twice"] == pytest.approx(val["bilinear_twice"], abs=0.05)
    assert val["bilinear"] != val["nearest"]
    assert about["residual"] is True and about["downsample"] == "resize" and about["metrics"]["val"] == val


def test_resize_is_antialiased_and_stride_is_not(folder):
    paths = sorted(folder.rglob("*.jpg"))
    strided, resized = (train_lift.Photos(paths, 64, how)[0, 0] for how in ("stride", "resize"))
    full = strided["full"].float()
    assert torch.equal(strided["half"], strided["full"][:, ::2, ::2])
    assert torch.equal(strided["quarter"], strided["full"][:, ::4, ::4])
    expected = F.interpolate(full[None], scale_factor=0.5, mode="bilinear", antialias=True)[0]
    assert (resized["half"].float() - expected).abs().max() <= 1
    assert resized["half"].float().var() < strided["half"].float().var()


def test_held_out_photos_are_not_trained_on(folder):
    args = train_lift.parser().parse_args(["--dataroot", str(folder), "--val_fraction", "0.25"])
    train, val = train_lift.split(args)
    assert len(val) == 2 and sorted(train + val) == sorted(folder.rglob("*.jpg"))
    assert train_lift.split(args) == (train, val)


# ---- augmentation, order, schedule ----------------------------------------------------------------------------------


def test_jitter_depends_on_seed_epoch_and_photo_alone(folder):
    paths = sorted(folder.rglob("*.jpg"))
    photos = train_lift.Photos(paths, 64, augment=True)
    a, b = photos[0, 2]["full"], photos[1, 2]["full"]
    torch.rand(5)
    (batch,) = DataLoader(photos, batch_sampler=[[(1, 2), (0, 2)]], num_workers=1)
    assert torch.equal(batch["full"][1], a) and torch.equal(batch["full"][0], b) and not torch.equal(a, b)
    other = train_lift.Photos(paths, 64, augment=True, seed=1)[0, 2]["full"]
    assert not torch.equal(a, other) and not torch.equal(a, train_lift.Photos(paths, 64)[0, 2]["full"])


@pytest.mark.parametrize("skip", [0, 1, 4])
def test_processes_together_see_the_batches_of_one(skip):
    one = list(train_lift.stream(12, 4, 2, 0, 1, 0, skip))
    two = [list(train_lift.stream(12, 2, 2, rank, 2, 0, skip)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two)] == [sorted(keys) for keys in one]
    assert one == list(train_lift.stream(12, 4, 2, 0, 1, 0, 0))[skip:]


def test_learning_rate():
    cosine = [train_lift.lr_factor(step, 10, "cosine", 0) for step in (0, 5, 10)]
    assert cosine == pytest.approx([1, 0.5, 0])
    assert [train_lift.lr_factor(step, 10, "constant", 3) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_options_reach_the_optimizer(cli, flags, tmp_path, rule_features, folder):
    """AdamW, cosine with warmup, accumulation and the average, against the same by hand."""
    more = ["--optimizer", "adamw", "--weight_decay", 0.1, "--schedule", "cosine", "--warmup", 1, "--accumulate", 2, "--ema", 0.5]
    assert cli("train_lift", *flags(*more)).code == 0
    state, _, _ = read_run(tmp_path)
    lift = seeded_lift()
    optimizer = torch.optim.AdamW(lift.parameters(), lr=0.001, weight_decay=0.1)
    average, step = None, 0
    for epoch in range(2):
        files = order(folder, epoch)
        for batches in ([files[:3], files[3:6]], [files[6:]]):
            optimizer.param_groups[0]["lr"] = 0.001 * 0.5 * (1 + math.cos(math.pi * step / 4)) * (0.5 if step == 0 else 1)
            plain_train([batches], rule_features, lift, 64, optimizer=optimizer)
            now = {name: value.clone() for name, value in lift.state_dict().items()}
            average = {name: (average[name] + now[name]) / 2 for name in now} if average else now
            step += 1
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    close(*({name: value for name, value in s.items() if name not in counts} for s in (state, average)))


# ---- stopping and going on ------------------------------------------------------------------------------------------


def die_before(monkeypatch, step, how):
    """Let the run call `how` before its optimizer step number `step`."""
    real, calls = train_lift.train_step, itertools.count()

    def dying(*args):
        if next(calls) == step:
            how()
        return real(*args)

    monkeypatch.setattr(train_lift, "train_step", dying)


@pytest.mark.parametrize(("killed", "save_steps"), [(1, 2), (2, 1), (3, 2)])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(cli, flags, tmp_path, monkeypatch, killed, save_steps):
    more = ["--augment", "--save_steps", save_steps, "--schedule", "cosine", "--ema", 0.9, "--val_fraction", 0.25]
    assert cli("train_lift", *flags(*more, "--output_dir", tmp_path / "whole" / "runs")).code == 0

    def kill():
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        die_before(patch, killed, kill)
        assert cli("train_lift", *flags(*more)).code == 9
    ran = cli("train_lift", *flags(*more, "--resume"))
    assert ran.code == 0, ran.err
    (state, _, lines), (whole, _, whole_lines) = read_run(tmp_path), read_run(tmp_path / "whole")
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    for line in lines + whole_lines:
        del line["photos_per_s"]
    assert lines == whole_lines


def test_a_signal_saves_and_says_how_to_go_on(cli, flags, tmp_path, monkeypatch):
    assert cli("train_lift", *flags("--output_dir", tmp_path / "whole" / "runs")).code == 0
    with monkeypatch.context() as patch:
        die_before(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ran = cli("train_lift", *flags("--save_steps", 0))
    assert ran.code == 128 + signal.SIGTERM and "SIGTERM after step 2: pass --resume" in ran.err
    ran = cli("train_lift", *flags("--save_steps", 0))
    assert ran.code == 2 and "pass --resume" in ran.err
    ran = cli("train_lift", *flags("--save_steps", 0, "--resume", "--seed", 3))
    assert ran.code == 2 and "--seed 0" in ran.err
    assert cli("train_lift", *flags("--save_steps", 0, "--resume")).code == 0
    whole = read_run(tmp_path / "whole")[0]
    assert all(torch.equal(value, whole[name]) for name, value in read_run(tmp_path)[0].items())


def test_a_damaged_checkpoint_is_not_resumed(cli, flags, tmp_path):
    run = tmp_path / "runs" / "vit_tiny_patch16_224_0.001_cosine_noaug_64"
    run.mkdir(parents=True)
    (run / "last.pth").write_bytes(b"half a file")
    ran = cli("train_lift", *flags("--resume"))
    assert ran.code == 2 and "last.pth is damaged" in ran.err and ran.err.count("\n") == 1


def test_tensorboard_shows_the_metrics(cli, flags, tmp_path, monkeypatch):
    shown = {}
    writer = types.SimpleNamespace(add_scalar=lambda name, value, step: shown.update({(name, step): value}))
    stub = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    assert cli("train_lift", *flags("--tensorboard", "--val_fraction", 0.25)).code == 0
    _, _, lines = read_run(tmp_path)
    assert [shown["loss", 2], shown["loss", 4]] == [line["loss"] for line in lines]
    assert shown["lift", 4] == lines[1]["val"]["lift"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    ran = cli("train_lift", *flags("--tensorboard", "--output_dir", tmp_path / "other"))
    assert ran.code == 2 and "pip install tensorboard" in ran.err and ran.err.count("\n") == 1


def test_compiled_equals_eager(cli, flags, tmp_path, monkeypatch):
    """Everything but the code generator, which takes minutes on a CPU."""
    assert cli("train_lift", *flags("--output_dir", tmp_path / "eager/runs")).code == 0
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    assert cli("train_lift", *flags("--compile")).code == 0
    assert compiled == ["Objective"] + ["Block"] * 12
    close(read_run(tmp_path)[0], read_run(tmp_path / "eager")[0])


def command(*flags):
    """Environment and arguments of train_lift.py as a program of its own, on as many threads as this one."""
    here = Path(train_lift.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(here.parent)}
    return [sys.executable], [str(here), *map(str, flags)], environment


def test_sigkill(cli, flags, tmp_path):
    """A real SIGKILL at whatever step the run has reached."""
    long = ["--epochs", 12, "--save_every", 12, "--save_steps", 3]
    assert cli("train_lift", *flags(*long, "--output_dir", tmp_path / "whole/runs")).code == 0
    python, script, environment = command(*flags(*long))
    with subprocess.Popen([*python, *script], env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("runs/*/last.pth")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert cli("train_lift", *flags(*long, "--resume")).code == 0
    whole = read_run(tmp_path / "whole")[0]
    assert all(torch.equal(value, whole[name]) for name, value in read_run(tmp_path)[0].items())


def test_two_processes_equal_the_plain_loop_on_both_their_batches(flags, folder, tmp_path, rule_features):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    python, script, environment = command(*flags("--batch_size", 2, "--loss", "l2", "--val_dataroot", folder))
    ran = subprocess.run([*python, *launcher, *script], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    state, _, lines = read_run(tmp_path)
    lift, steps = seeded_lift(), []
    for epoch in range(2):
        files = order(folder, epoch)
        steps += [[files[at : at + 4 : 2], files[at + 1 : at + 4 : 2]] for at in (0, 4)]
    losses = plain_train(steps, rule_features, lift, 64, "l2")
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    own = ("running_mean", "running_var", "num_batches_tracked")  # each process has its own statistics
    close(*({k: v for k, v in s.items() if not k.endswith(own)} for s in (state, lift.state_dict())))
    printed = [line for line in ran.stdout.splitlines() if line and not line.startswith("[Gloo]")]
    assert lines[-1]["val"]["photos"] == 8 and len(printed) == 3, "the first process alone prints"


# ---- cached features ------------------------------------------------------------------------------------------------


def test_cached_features_train_alike_and_are_computed_once(cli, flags, tmp_path, monkeypatch):
    more = ["--augment", "--views", 2, "--loss", "l2", "--val_fraction", 0.25]
    assert cli("train_lift", *flags(*more, "--output_dir", tmp_path / "live/runs")).code == 0
    cache = [*more, "--cache_features", tmp_path / "cache"]
    assert cli("train_lift", *flags(*cache)).code == 0
    (state, _, lines), (_, _, live_lines) = read_run(tmp_path), read_run(tmp_path / "live")
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in live_lines], rel=2e-3)
    assert lines[-1]["val"]["bilinear"] == pytest.approx(live_lines[-1]["val"]["bilinear"], abs=1e-3)

    files = sorted((tmp_path / "cache").iterdir())
    content = [file.read_bytes() for file in files]
    assert len(files) == 2
    monkeypatch.setattr(train_lift, "fill", None)  # a call would fail
    assert cli("train_lift", *flags(*cache, "--output_dir", tmp_path / "again/runs")).code == 0
    assert all(torch.equal(value, state[name]) for name, value in read_run(tmp_path / "again")[0].items())
    monkeypatch.undo()

    for file, bytes_ in zip(files, content):  # a run stopped in the middle of a record
        file.with_suffix(".part").write_bytes(bytes_[: len(bytes_) * 2 // 3])
        file.unlink()
    assert cli("train_lift", *flags(*cache, "--output_dir", tmp_path / "third/runs")).code == 0
    assert [file.read_bytes() for file in sorted((tmp_path / "cache").iterdir())] == content


def test_the_cache_knows_what_it_depends_on(folder, rule_backbone):
    def key(augment=False, imsize=64, downsample="stride", seed=0, n=8, **options):
        paths = sorted(folder.rglob("*.jpg"))[:n]
        extractor = ViTExtractor("vit_tiny_patch16_224", backbone_path=rule_backbone[-1], device="cpu", **options)
        return train_lift.cache_key(train_lift.Photos(paths, imsize, downsample, augment, seed), extractor)

    keys = [key(), key(True), key(True, seed=1), key(imsize=128), key(downsample="resize"), key(layer=3), key(facet="query")]
    keys += [key(dtype="bfloat16"), key(n=3)]
    assert len(set(keys)) == len(keys) and key() == key(seed=1) == keys[0]


# ---- one's own backbone ---------------------------------------------------------------------------------------------

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
    return Tokens(args.seed + 20, None)

def other():
    return nn.Linear(5, 5)

def one_size(args):
    return Tokens(20, 64)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_backbone.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("function", "patch", "width"), [("convolution", 8, 24), ("tokens", 16, 22)])
def test_own_backbone(cli, flags, tmp_path, own, function, patch, width):
    more = ["--my_extractor", f"own_backbone:{function}", "--seed", 2, "--cache_features", tmp_path / "cache"]
    ran = cli("train_lift", *flags(*more))
    assert ran.code == 0, ran.err
    state, about, _ = read_run(tmp_path)
    assert state["outc.weight"].shape[0] == about["width"] == width and about["patch"] == patch
    assert about["backbone"] == f"own_backbone:{function}"


BAD = {
    "own_size": (["--my_extractor", "own_backbone:one_size"], "does not take 32 pixels (made for 64)"),
    "own_other": (["--my_extractor", "own_backbone:other"], "does not take 64 pixels"),
    "attn": (["--facet", "attn"], "pass another backbone or facet"),
    "own_missing": (["--my_extractor", "own_backbone:nothing"], "pass --my_extractor module:function"),
    "own_bare": (["--my_extractor"], "my_extractor(args) in train_lift.py is still empty"),
    "imsize": (["--imsize", 100], "--imsize 100 is no multiple of 4 patches of 16: pass --imsize 64"),
    "loss": (["--loss", "l3"], "unknown --loss l3: pass one of cosine, l1, l2"),
    "one photo": (["--batch_size", 7], "pass a larger --imsize or --batch_size"),
    "stride": (["--stride", 8], "leave out --stride 8"),
    "epochs": (["--epochs", 0], "--epochs 0: pass 1 or more"),
    "no folder": (["--dataroot", "nowhere"], "no images at nowhere"),
    "nothing": (["--evaluate", "lift.pth"], "pass --dataroot FOLDER to train, or --evaluate FILE --val_dataroot"),
    "nan": (["--lr", 1e30, "--save_steps", 1], "at step 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, flags, own, case):
    more, message = BAD[case]
    ran = cli("train_lift", *flags(*more))
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1 and "Traceback" not in ran.err


def test_nan_keeps_the_last_good_checkpoint(cli, flags, tmp_path):
    assert cli("train_lift", *flags("--lr", 1e30, "--save_steps", 1)).code == 2
    (last,) = tmp_path.glob("runs/*/last.pth")
    state = torch.load(last, weights_only=True)
    assert state["step"] == 1 and len(state["losses"]) == 1 and math.isfinite(state["losses"][0])


def test_broken_photos_are_replaced_counted_and_named(cli, flags, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "photos")
    (tmp_path / "photos/a/0.jpg").write_bytes(b"no photo")
    cut = tmp_path / "photos/b/3.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    ran = cli("train_lift", *flags("--dataroot", tmp_path / "photos", "--workers", 1, "--val_dataroot", tmp_path / "photos"))
    assert ran.code == 0, ran.err
    last = json.loads(ran.out.splitlines()[-1])
    assert [Path(name).name for name in last["unreadable"]] == ["0.jpg", "3.jpg"]
    assert last["metrics"]["val"]["photos"] == 6 and len(last["metrics"]["val"]["unreadable"]) == 2
    assert "2 photos could not be read" in ran.out
    for file in (tmp_path / "photos").rglob("*.jpg"):
        file.write_bytes(b"no photo")
    ran = cli("train_lift", *flags("--dataroot", tmp_path / "photos", "--output_dir", tmp_path / "other"))
    assert ran.code == 2 and "none of the 8 photos can be read" in ran.err and ran.err.count("\n") == 1


def test_a_full_disk_is_one_line_and_keeps_what_was_written(cli, flags, tmp_path, monkeypatch):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    die_before(monkeypatch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1])))
    try:
        ran = cli("train_lift", *flags("--save_steps", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code == 2 and "cannot write" in ran.err and ran.err.count("\n") == 1
    (last,) = tmp_path.glob("runs/*/last.pth")
    assert torch.load(last, weights_only=True)["step"] == 2
    assert {file.name for file in last.parent.iterdir()} == {"last.pth", "metrics.jsonl"}
    monkeypatch.undo()
    assert cli("train_lift", *flags("--save_steps", 1, "--resume")).code == 0


def test_a_full_disk_under_the_cache_is_one_line(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lift.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    ran = cli("train_lift", *flags("--cache_features", tmp_path / "cache"))
    assert ran.code == 2 and "pass another --cache_features" in ran.err and ran.err.count("\n") == 1
