"""export_onnx.py: files that onnxruntime runs at other sizes, with PyTorch's numbers; refusals."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, rule_image, rule_state
from safetensors.torch import save_file

import export_onnx
from extractor import ViTExtractor
from features import Features, Lifted
from lift import LiFT, load_lift, upsample


@pytest.fixture
def runtime():
    """onnxruntime, where the packages of requirements-dev.txt are installed."""
    for name in export_onnx.PACKAGES:
        pytest.importorskip(name, reason=f"exporting needs the package {name}")
    return pytest.importorskip("onnxruntime")


def run(runtime, path, **inputs):
    """What onnxruntime makes of a file."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(features)


def assert_near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "patch_from"),
    [({}, "JSON"), ({}, "flag"), ({"attend": 1}, "file")],
)
@torch.no_grad()
def test_lift_alone_at_any_size(cli, runtime, tmp_path, variant, patch_from):
    """A bare file says nothing of its patch: the JSON beside it does, or --patch."""
    lift = LiFT(24, 8, **variant).eval()
    state = rule_state(lift)
    if "options" in state:
        state["options"] = lift.options
    lift.load_state_dict(state)
    torch.save(state, tmp_path / "lift.pth")
    if patch_from == "JSON":
        origin = {"backbone": "another", "layer": 11, "facet": "key", "patch": 8}
        (tmp_path / "lift.json").write_text(json.dumps(origin))

    output = tmp_path / "lift.onnx"
    flags = ["--lift_only", "--lift_path", tmp_path / "lift.pth", "--lift_iter", 2]
    if patch_from == "flag":
        flags += ["--patch", 8]
    ran = cli("export_onnx", *flags, "--output", output)
    assert ran.code == 0, ran.err
    told = ran.report()
    assert told["inputs"] == ["images", "feats"]
    assert told["difference"] < 1e-4
    assert (told["settings"]["patch"], told["settings"]["channel"]) == (8, 24)

    images = torch.cat([rule_image(40, 56, seed) for seed in range(4)])
    feats = torch.from_numpy(np.random.RandomState(0).randn(4, 24, 5, 7).astype(np.float32))
    found = run(runtime, output, images=images, feats=feats)
    assert_near(found, upsample(lift, images, feats, 2))


@torch.no_grad()
def test_backbone_and_lift_at_any_size(
    cli, runtime, tmp_path, rule_backbone, rule_extractor, rule_lift
):
    output = tmp_path / "features.onnx"
    flags = [*rule_backbone, "--layer", 1, "--lift_path", rule_lift, "--output", output]
    ran = cli("export_onnx", *flags)
    assert ran.code == 0, ran.err
    told = ran.report()
    assert told["sizes"] == "any multiples of the patch"
    assert len({tuple(shape[2:]) for shape in told["checked"]}) >= 2

    vit = rule_extractor(layer=1)
    lift = load_lift(rule_lift, vit, silent=True)
    for height, width in ((224, 224), (224, 96), (320, 400)):
        photos = torch.rand(2, 3, height, width)
        images = vit.normalize(photos)
        wanted = upsample(lift, images, vit(images))
        assert_near(run(runtime, output, images=photos), wanted)
    # of 226 pixels two would be dropped, without a word
    for height, width in ((226, 224), (224, 230)):
        with pytest.raises(Exception, match="reshape"):
            run(runtime, output, images=torch.rand(1, 3, height, width))


def timm_backbone(tmp_path, name):
    """Flags of one of timm's ViTs, with rule weights, and what they mean as an extractor."""
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    weights = tmp_path / "backbone.safetensors"
    save_file({key: value.contiguous() for key, value in rule_state(model).items()}, weights)
    flags = ["--model_type", name, "--backbone_path", weights, "--layer", 1]
    return flags, ViTExtractor(name, None, device="cpu", backbone_path=weights, layer=1)


@torch.no_grad()
def test_one_size_where_it_is_asked_for(cli, runtime, tmp_path):
    assert export_onnx.read_imsize([96]) == (96, 96)
    flags, vit = timm_backbone(tmp_path, "test_vit")
    output = tmp_path / "features.onnx"
    ran = cli("export_onnx", *flags, "--output", output, "--device", "auto", "--imsize", 96, 64)
    assert ran.code == 0, ran.err
    assert ran.report()["sizes"] == "96x64"
    assert ran.report()["settings"]["device"] == "cpu"
    assert len(ran.out.splitlines()) <= 3

    photos = torch.rand(5, 3, 96, 64)
    assert_near(run(runtime, output, images=photos), vit(vit.normalize(photos)))
    with pytest.raises(Exception, match="Expected: 96"):
        run(runtime, output, images=torch.rand(1, 3, 112, 64))


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_positions_of_timm_at_any_size(cli, runtime, tmp_path, name):
    """Learned ones, which timm resamples, and those with rotary ones besides."""
    flags, vit = timm_backbone(tmp_path, name)
    output = tmp_path / "features.onnx"
    ran = cli("export_onnx", *flags, "--output", output)
    assert ran.code == 0, ran.err
    assert ran.report()["sizes"] == "any multiples of the patch"
    for rows, columns in ((10, 10), (4, 14), (16, 6)):
        photos = torch.rand(2, 3, rows * vit.patch, columns * vit.patch)
        assert_near(run(runtime, output, images=photos), vit(vit.normalize(photos)))


@torch.no_grad()
def test_an_upsampler_of_your_own_is_exported_too(cli, runtime, import_path):
    flags, vit = timm_backbone(import_path, "test_vit")
    (import_path / "own_upsampler.py").write_text(
        "def nearest():\n"
        "    return lambda images, feats: feats.repeat_interleave(2, 2).repeat_interleave(2, 3)\n"
    )
    flags += ["--upsample", "own_upsampler:nearest", "--imsize", 64, 96, "--output", "x.onnx"]
    ran = cli("export_onnx", *flags)
    assert ran.code == 0, ran.err
    photos = torch.rand(2, 3, 64, 96)
    feats = vit(vit.normalize(photos))
    wanted = feats.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_near(run(runtime, "x.onnx", images=photos), wanted)


@torch.no_grad()
def test_the_whole_is_traced_and_exported_with_a_free_batch(rule_extractor, rule_lift):
    """By torch alone, without ONNX."""
    vit = rule_extractor(layer=1)
    lifted = Lifted(load_lift(rule_lift, vit, silent=True), vit)
    module = export_onnx.Whole(Features(vit, lifted)).eval()
    native = torch.rand(1, 3, 224, 224)
    assert_near(torch.jit.trace(module, native)(native), module(native))

    images = torch.rand(3, 3, 64, 96)
    free = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(module, (images,), dynamic_shapes=free).module()
    for count in (1, 5):
        photos = torch.rand(count, 3, 64, 96)
        assert_near(exported(photos), module(photos))


def test_gradients_reach_the_images_through_both(rule_extractor, rule_lift):
    vit = rule_extractor(layer=1, requires_grad=True)
    lifted = Lifted(load_lift(rule_lift, vit, silent=True), vit)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    whole = export_onnx.Whole(Features(vit, lifted))(images)
    (by_both,) = torch.autograd.grad(whole.sum(), images)

    normal = vit.normalize(images)
    without_vit = lifted(images, vit(normal).detach())
    (by_lift,) = torch.autograd.grad(without_vit.sum(), images)
    assert by_lift.abs().max() > 0
    assert (by_both - by_lift).abs().max() > 0.01 * by_both.abs().max()
    assert all(weight.grad is None for weight in vit.parameters())


# ---- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dino", "timm"])
def test_positions_of_any_size_are_the_extractors(rule_extractor, how):
    vit = rule_extractor()
    vit.positions = how
    for height in range(1, 41):
        for width in (height, 14, 20):
            wanted, prefix = vit._positions((height, width))
            with export_onnx.free_positions(vit):
                found, same_prefix = vit._positions((height, width))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            assert torch.equal(prefix, same_prefix)
    assert vit._positions((14, 14))[0].shape == (1, 196, 192)
    assert "_positions" not in vars(vit)


# ---- refusals -----------------------------------------------------------------------------------

SHIPPED = ROOT / "pretrained/lift_vit_mini16.pth"
MODULE = ["--lift_only", "--lift_path", SHIPPED]
MINI = ["--model_type", "vit_mini16"]


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--output", "x.onnx", "--lift_only"], "pass --lift_path FILE"),
        (["--output", "x.onnx", "--dtype", "bfloat16"], "leave --dtype"),
        (["--output", "x.onnx", "--device", "cuda"], "leave --dtype and --device out"),
        (["--output", "x.onnx", "--lift_iter", 0], "pass 1 or more"),
        (["--output", "x.onnx", "--lift_only", "--lift_path", "none.pth"], "correct --lift_path"),
        (["--output", "x.onnx", *MODULE, "--patch", 8], "is for 16: leave --patch out"),
        (["--output", "x.onnx", *MODULE, "--channel", 384], "is for 192: leave --channel out"),
        (["--output", "x.onnx", *MODULE, "--patch", 0], "pass 1 or more"),
        (["--output", "x.onnx", *MODULE, "--imsize", 64], "leave --imsize out"),
        (["--output", "x.onnx", *MINI, "--imsize", 64, 100], "not a multiple of the patch (16)"),
        (["--output", "x.onnx", *MINI, "--imsize", 64, 96, 3], "pass one side or H W"),
        (["--output", "x.onnx", *MINI, "--imsize", 0], "pass one side or H W"),
        # both before a backbone is downloaded
        (["--output", "x.onnx", "--lift_path", "none.pth"], "correct --lift_path"),
        (["--output", "x.onnx", "--upsample", "lift"], "pass --lift_path FILE"),
    ],
)
def test_wrong_flags_are_one_line(cli, monkeypatch, tmp_path, flags, remedy):
    monkeypatch.chdir(tmp_path)  # where x.onnx would be written
    monkeypatch.setattr(export_onnx, "PACKAGES", ())
    ran = cli("export_onnx", *flags)
    assert ran.code == 2 and remedy in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_patch_that_nothing_tells_is_asked_for(cli, runtime, tmp_path, rule_lift):
    flags = ["--lift_only", "--lift_path", rule_lift, "--output", tmp_path / "lift.onnx"]
    ran = cli("export_onnx", *flags)
    assert ran.code == 2 and ran.err.endswith("pass --patch 8 or --patch 16\n")
    assert len(ran.err.splitlines()) == 1


BRANCH = """
import torch

class Branch(torch.nn.Module):
    def forward(self, images):
        if images.max() > 0:
            images = 2 * images
        return torch.nn.functional.avg_pool2d(images, 16)

def branch():
    return Branch()
"""


def test_a_backbone_that_torch_does_not_export_is_told_in_one_line(cli, runtime, import_path):
    """It decides by the values of the images."""
    (import_path / "mine.py").write_text(BRANCH)
    flags = ["--my_extractor", "mine:branch", "--imsize", 32, "--output", "x.onnx"]
    ran = cli("export_onnx", *flags)
    assert ran.code == 2 and "torch does not export this model (Could not guard" in ran.err
    assert ran.err.endswith("pass another backbone, or --lift_only\n")
    assert len(ran.err.splitlines()) == 1
    assert not (import_path / "x.onnx").exists()


def test_missing_package_is_one_line(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("no_such_package",))
    ran = cli("export_onnx", *MODULE, "--output", tmp_path / "lift.onnx")
    assert ran.code == 2
    assert "pip install -r requirements-dev.txt" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_file_that_differs_is_not_put_in_place(cli, runtime, monkeypatch, tmp_path):
    monkeypatch.setattr(export_onnx, "TOLERANCE", 0.0)
    ran = cli("export_onnx", *MODULE, "--output", tmp_path / "lift.onnx")
    assert ran.code == 2 and "onnxruntime differs by" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_gives_nan_is_refused(runtime, tmp_path):
    batches = [{"images": torch.rand(1, 3, 32, 32)}, {"images": torch.full((1, 3, 32, 32), -1.0)}]
    plan = export_onnx.Plan(Root(), batches, {"images": {}}, "32x32", {})
    export_onnx.write(plan, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="onnxruntime differs by nan"):
        export_onnx.check(plan, tmp_path / "x.onnx")


class Root(torch.nn.Module):
    """Square roots, which are NaN below zero."""

    def forward(self, images):
        return images.sqrt()


def test_a_file_that_onnxruntime_does_not_take_is_told_in_one_line(runtime, tmp_path):
    """One that cannot be loaded, and one that is loaded but does not take the inputs."""
    images = {"images": torch.rand(1, 3, 32, 32)}
    module = torch.nn.Identity()
    plan = export_onnx.Plan(module, [images], {"images": {}}, "32x32", {})
    path = tmp_path / "x.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"does not load this model .*: pass another backbone"):
        export_onnx.check(plan, path)

    export_onnx.write(plan, path)
    other = plan._replace(batches=[{"images": torch.rand(1, 3, 48, 32)}])
    message = r"does not run this model on images of shape \[1, 3, 48, 32\] .*: pass another"
    with pytest.raises(ValueError, match=message):
        export_onnx.check(other, path)


def test_a_file_is_loaded_once_for_all_batches(runtime, monkeypatch, tmp_path):
    batches = [{"images": torch.rand(count, 3, 32, 32)} for count in (2, 1, 3)]
    free = {"images": {0: torch.export.Dim("batch")}}
    plan = export_onnx.Plan(torch.nn.Sigmoid(), batches, free, "32x32", {})
    export_onnx.write(plan, tmp_path / "x.onnx")

    loaded = []
    session = runtime.InferenceSession

    def counted(*args, **kwargs):
        loaded.append(args)
        return session(*args, **kwargs)

    monkeypatch.setattr(runtime, "InferenceSession", counted)
    assert export_onnx.check(plan, tmp_path / "x.onnx") < 1e-4
    assert len(loaded) == 1
