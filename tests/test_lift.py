"""lift.py against LiFT layer by layer, the reference's checkpoints, and those to be refused."""

import copy
import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, rule_image, rule_state
from plain_extract import plain_lift

from command import Command, add_lift_args, weights_digest
from lift import (
    LiFT,
    attend,
    check_lift_args,
    double,
    load_lift,
    map_to_tokens,
    tokens_to_map,
    upsample,
    upsampler,
)

FACTS = {
    "name": "vit_x",
    "tag": "vit_x.tag",
    "layer": 11,
    "facet": "key",
    "width": 16,
    "patch": 16,
    "step": 16,
    "digest": "1234",
    "device": torch.device("cpu"),
    "dtype": torch.float32,
}
EXTRACTOR = SimpleNamespace(**FACTS)
ORIGIN = {"backbone": "vit_x.tag", "layer": 11, "facet": "key"}


def rule_lift(width=16, patch=16, **kwargs):
    lift = LiFT(width, patch, **kwargs)
    load_rule(lift)
    return lift.eval()


def load_rule(lift):
    """Give a module rule weights; what says which variant it is stays."""
    state = rule_state(lift)
    if "options" in state:
        state["options"] = lift.options
    lift.load_state_dict(state)


def inputs(h, w, patch=16, width=16, batch=2):
    images = torch.cat([rule_image(h * patch, w * patch, seed) for seed in range(batch)])
    feats = torch.randn(batch, width, h, w, generator=torch.Generator().manual_seed(0))
    return images, feats


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@torch.no_grad()
def test_equals_layer_by_layer(patch, iterations):
    lift = rule_lift(patch=patch)
    images, feats = inputs(3, 5, patch)
    slow = plain_lift(lift, images, feats, iterations)
    found = upsample(lift, images, feats, iterations)
    assert found.shape == (2, 16, 3 * 2**iterations, 5 * 2**iterations)
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)

    steps = upsample(lift, images, feats, iterations, return_all=True)
    assert len(steps) == iterations + 1
    assert torch.equal(steps[0], feats)
    torch.testing.assert_close(steps[-1], slow, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="-1 iterations: pass 0 or more"):
        upsample(lift, images, feats, -1)


@torch.no_grad()
def test_other_patches_take_the_path_of_16():
    lift = rule_lift(patch=14)
    images, feats = inputs(3, 4, patch=14)
    resized = F.interpolate(images, size=(48, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(lift(images, feats), rule_lift(patch=16)(resized, feats))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_patches_in_half_precision(dtype):
    lift = rule_lift(patch=14)
    images, feats = inputs(3, 4, patch=14)
    exact = lift(images, feats)
    half = upsample(rule_lift(patch=14).to(dtype), images, feats)
    assert float((half - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_parameters_and_keys():
    assert sum(p.numel() for p in LiFT(384).parameters()) == 1_187_280
    assert sum(p.numel() for p in LiFT(768).parameters()) == 4_417_296
    keys = set(LiFT(16).state_dict())
    layers = {"image_convs_2.0", "image_convs_2.1", "up1.up", "outc"}
    for number in (0, 1, 3, 4):
        layers.add(f"image_convs_1.{number}")
        layers.add(f"up1.conv_1.double_conv.{number}")
    assert {key.rsplit(".", 1)[0] for key in keys} == layers
    assert keys == set(LiFT(16, 8).state_dict())
    assert set(LiFT(16, residual=True).state_dict()) == keys | {"options"}
    attention = {"options", "attend.weight", "attend.bias"}
    assert set(LiFT(16, attend=2).state_dict()) == keys | attention
    assert "up1.conv_1.double_conv.0.bias" not in keys


@torch.no_grad()
def test_residual_starts_at_bilinear():
    images, feats = inputs(3, 4)
    assert torch.equal(LiFT(16, residual=True).eval()(images, feats), double(feats))
    plain = rule_lift()
    residual = rule_lift(residual=True)
    wanted = plain(images, feats) + double(feats)
    torch.testing.assert_close(residual(images, feats), wanted)


def plain_attend(feats, change, radius):
    """Cell by cell, neighbour by neighbour."""
    batch, _, height, width = feats.shape
    out = double(feats)
    for image in range(batch):
        for y in range(2 * height):
            for x in range(2 * width):
                number = 0
                for dy in range(-radius, radius + 1):
                    for dx in range(-radius, radius + 1):
                        row = min(max(y // 2 + dy, 0), height - 1)
                        column = min(max(x // 2 + dx, 0), width - 1)
                        weight = change[image, number, y, x]
                        out[image, :, y, x] += weight * feats[image, :, row, column]
                        number += 1
    return out


@pytest.mark.parametrize("radius", [1, 2])
@torch.no_grad()
def test_attention_equals_loops(radius):
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(2, 5, 3, 4, generator=generator)
    change = torch.randn(2, (2 * radius + 1) ** 2, 6, 8, generator=generator)
    wanted = plain_attend(feats, change, radius)
    torch.testing.assert_close(attend(feats, change, radius), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_starts_at_bilinear_and_the_rest_is_the_papers():
    images, feats = inputs(4, 5)
    for radius in (1, 2):
        found = LiFT(16, attend=radius).eval()(images, feats)
        torch.testing.assert_close(found, double(feats), rtol=0, atol=1e-6)
    plain = rule_lift()
    lift = rule_lift(attend=1)
    lift.attend.weight.zero_()
    lift.attend.bias.zero_()
    wanted = plain(images, feats) + double(feats)
    torch.testing.assert_close(lift(images, feats), wanted, rtol=0, atol=1e-5)
    lift.attend.bias.fill_(1 / 9)  # every neighbour alike: their mean is added
    mean = F.avg_pool2d(F.pad(feats, [1] * 4, mode="replicate"), 3, stride=1)
    wanted += F.interpolate(mean, scale_factor=2)
    torch.testing.assert_close(lift(images, feats), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tokens_in_and_out():
    images, feats = inputs(3, 4)
    tokens = feats.flatten(2).transpose(1, 2)
    assert torch.equal(tokens[:, 1 * 4 + 2], feats[:, :, 1, 2]), "row by row"
    assert torch.equal(map_to_tokens(feats), tokens)
    assert torch.equal(tokens_to_map(tokens, (3, 4)), feats)

    wanted = rule_lift(pre_shape=False, post_shape=False)(images, feats)
    found = rule_lift()(images, tokens)
    torch.testing.assert_close(tokens_to_map(found, (6, 8)), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(rule_lift()(images, feats), wanted)
    only_out = rule_lift(pre_shape=False)(images, feats)
    torch.testing.assert_close(only_out, map_to_tokens(wanted))
    with pytest.raises(ValueError, match="grid is 12x16 but"):
        rule_lift(pre_shape=False)(images, tokens)


@torch.no_grad()
def test_batch_equals_single():
    lift = rule_lift()
    images, feats = inputs(3, 4, batch=3)
    alone = torch.cat([lift(i[None], f[None]) for i, f in zip(images, feats)])
    torch.testing.assert_close(lift(images, feats), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", [{}, {"attend": 2}])
@torch.no_grad()
def test_a_crop_far_from_its_border_is_unchanged(variant):
    lift = rule_lift(**variant)
    images, feats = inputs(16, 16, batch=1)
    whole = lift(images, feats)
    part = lift(images[..., 64:192], feats[..., 4:12])
    torch.testing.assert_close(part[..., 6:10], whole[..., 14:18], rtol=0, atol=1e-5)


def test_grids_that_do_not_match():
    feats = inputs(3, 4)[1]
    message = r"grid is 3x4 but an image of 64x64 gives 4x4: resize .* patch \(16\)"
    with pytest.raises(ValueError, match=message):
        rule_lift()(torch.zeros(2, 3, 64, 64), feats)
    with pytest.raises(ValueError, match="image of 50x64 has a side that is no multiple"):
        rule_lift()(torch.zeros(2, 3, 50, 64), feats)


@pytest.mark.parametrize("variant", [{}, {"attend": 1}])
def test_gradients_reach_features_and_images(variant):
    images, feats = inputs(2, 3)
    images.requires_grad_()
    feats.requires_grad_()
    upsample(rule_lift(**variant), images, feats, 2).sum().backward()
    assert images.grad.abs().sum() > 0
    assert feats.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", [{}, {"attend": 1}])
def test_copies_and_compiles(variant):
    lift = rule_lift(**variant)
    images, feats = inputs(2, 3)
    with torch.no_grad():
        wanted = lift(images, feats)
        assert torch.equal(copy.deepcopy(lift)(images, feats), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(lift))(images, feats), wanted)
        torch.testing.assert_close(torch.jit.trace(lift, (images, feats))(images, feats), wanted)
        compiled = torch.compile(lift)(images, feats)
        torch.testing.assert_close(compiled, wanted, rtol=0, atol=1e-4)

        batch = torch.export.Dim("batch", min=1, max=64)
        shapes = ({0: batch}, {0: batch})
        exported = torch.export.export(lift, (images, feats), dynamic_shapes=shapes).module()
        one = exported(images[:1], feats[:1])
        torch.testing.assert_close(one, wanted[:1], rtol=0, atol=1e-5)


# ---- checkpoints --------------------------------------------------------------------------------


def write(folder, state, origin=None, name="x.pth"):
    torch.save(state, folder / name)
    if origin is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps(origin))
    return folder / name


def test_reference_checkpoint(golden_lift, capsys):
    lift = load_lift(golden_lift)
    assert lift.outc.weight.shape == (192, 96, 1, 1)
    assert not lift.training
    assert not lift.residual
    assert lift.radius == 0
    assert not any(p.requires_grad for p in lift.parameters())
    err = capsys.readouterr().err
    assert err.count("\n") == 1, "one line says that its origin is unknown"


def test_prefix_and_origin(tmp_path, capsys):
    state = rule_state(LiFT(16))
    own = {**ORIGIN, "residual": True, "patch": 16}
    prefixed = {f"module.{key}": value for key, value in state.items()}
    lift = load_lift(write(tmp_path, prefixed, own), EXTRACTOR)
    assert lift.residual, "a residual module of before its state said so"
    assert all(torch.equal(lift.state_dict()[key], value) for key, value in state.items())
    write(tmp_path, state, own, "lift.pth")  # lift.json speaks for every checkpoint of a run
    assert load_lift(write(tmp_path, state, name="lift_3.pth"), EXTRACTOR).residual
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variant", [{"residual": True}, {"attend": 2}, {"attend": 1, "patch": 14}])
@torch.no_grad()
def test_a_variant_without_its_json_loads_as_what_it_is(tmp_path, variant):
    lift = rule_lift(**variant)
    loaded = load_lift(write(tmp_path, lift.state_dict()), silent=True)
    images, feats = inputs(2, 3, patch=variant.get("patch", 16))
    assert torch.equal(loaded(images, feats), lift(images, feats))


def test_a_patch_that_does_not_fit_is_refused(tmp_path):
    path = write(tmp_path, rule_lift(patch=14, attend=1).state_dict())
    with pytest.raises(ValueError, match="is for patches of 14 pixels, not 16"):
        load_lift(path, EXTRACTOR)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "vit_y.tag"}, "trained for backbone vit_y.tag, not vit_x.tag"),
        ({"layer": 9}, "trained for layer 9, not 11"),
        ({"facet": "value", "layer": 3}, "layer 3, not 11 and facet value, not key"),
    ],
)
def test_another_origin_is_refused(tmp_path, change, message):
    path = write(tmp_path, rule_state(LiFT(16)), {**ORIGIN, **change})
    with pytest.raises(ValueError, match=message):
        load_lift(path, EXTRACTOR)


def test_other_weights_of_the_backbone_are_noted(tmp_path, capsys):
    load_lift(write(tmp_path, rule_state(LiFT(16)), {**ORIGIN, "digest": "1234"}), EXTRACTOR)
    assert capsys.readouterr().err == ""
    load_lift(write(tmp_path, rule_state(LiFT(16)), {**ORIGIN, "digest": "5678"}), EXTRACTOR)
    assert "trained on other weights of vit_x than these" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = rule_state(LiFT(16))
    short = dict(state)
    del short["up1.up.bias"]
    cases = {
        "wide": (rule_state(LiFT(32)), "is for descriptors of 32 channels, but vit_x key has 16"),
        "short": (short, "up1.up.bias"),
        "bomb": ({**state, "x": Bomb()}, "holds more than tensors"),
        "number": ({**state, "x": 1}, "not a LiFT checkpoint .x is no tensor."),
        "list": ([1], "holds no weights"),
        "empty": ({}, "not a LiFT checkpoint"),
        "nan": ({**state, "outc.bias": torch.full((16,), float("nan"))}, "holds NaN"),
    }
    for name, (content, message) in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_lift(write(tmp_path, content, name=f"{name}.pth"), EXTRACTOR)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()

    path = write(tmp_path, state)
    path.with_suffix(".json").write_text('{"layer": 11')
    with pytest.raises(ValueError, match=r"x\.json does not say"):
        load_lift(path, EXTRACTOR)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="stride 8 is finer than the patch"):
        load_lift(path, SimpleNamespace(**{**FACTS, "step": 8}))
    with pytest.raises(FileNotFoundError, match="--lift_path"):
        load_lift(tmp_path / "none.pth")


def test_names_of_the_authors_modules_are_checked():
    """A module dropped in under these names is checked like ours, not taken on trust."""
    wanted = {
        "lift_dino_vits16": ("vit_small_patch16_224.dino", 16, 384),
        "lift_dino_vits8": ("vit_small_patch8_224.dino", 8, 384),
        "lift_dino_vitb16": ("vit_base_patch16_224.dino", 16, 768),
        "lift_dino_vitb8": ("vit_base_patch8_224.dino", 8, 768),
        "lift_vit_small_patch16": ("vit_small_patch16_224.augreg_in21k_ft_in1k", 16, 384),
        "lift_vit_base_patch16": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", 16, 768),
        "lift_vit_base_patch8": ("vit_base_patch8_224.augreg2_in21k_ft_in1k", 8, 768),
    }
    for name, (backbone, patch, width) in wanted.items():
        origin = json.loads((ROOT / "pretrained" / f"{name}.json").read_text())
        assert (origin["backbone"], origin["patch"], origin["width"]) == (backbone, patch, width)
        assert (origin["layer"], origin["facet"]) == (11, "key")


# ---- from flags ---------------------------------------------------------------------------------


def flags(*args):
    command = Command("")
    add_lift_args(command)
    return command.parse_args([str(value) for value in args])


@torch.no_grad()
def test_upsampler(tmp_path):
    images, feats = inputs(2, 3)
    path = write(tmp_path, rule_state(LiFT(16)), ORIGIN)
    none = upsampler(flags(), EXTRACTOR)
    two = upsampler(flags("--upsample", "bilinear", "--lift_iter", 2), EXTRACTOR)
    lifted = upsampler(flags("--lift_path", path, "--lift_iter", 2), EXTRACTOR)
    assert (none.factor, two.factor, lifted.factor) == (1, 4, 4)
    assert torch.equal(none(images, feats), feats)
    bilinear = F.interpolate(feats, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(two(images, feats), bilinear)
    slow = plain_lift(rule_lift(), images, feats, 2)
    torch.testing.assert_close(lifted(images, feats), slow, rtol=0, atol=1e-5)
    assert upsampler(flags("--lift_path", path, "--upsample", "none"), EXTRACTOR).factor == 1
    assert none.facts() == {"upsample": "none"}
    digest = weights_digest(lifted.lift)
    assert lifted.facts() == {"upsample": "lift", "lift_digest": digest}

    nothing_to_repeat = "pass --upsample bilinear, or lift with --lift_path FILE"
    contradictions = [
        (["--upsample", "lift"], "needs a module: pass --lift_path FILE"),
        (["--lift_path", path, "--lift_iter", -1], "-1 is negative: pass 0 or more"),
        (["--lift_iter", 3], nothing_to_repeat),
        (["--lift_path", path, "--upsample", "none", "--lift_iter", 2], nothing_to_repeat),
    ]
    for bad, message in contradictions:
        with pytest.raises(ValueError, match=message):
            upsampler(flags(*bad), EXTRACTOR)
        with pytest.raises(ValueError, match=message):
            check_lift_args(flags(*bad))


def test_flags_of_lift_are_checked_without_a_backbone(tmp_path):
    """The file, too, and also where it is not used."""
    good = tmp_path / "lift.pth"
    torch.save(rule_lift().state_dict(), good)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(good.read_bytes()[:1000])

    check_lift_args(flags())
    check_lift_args(flags("--lift_path", good, "--lift_iter", 2))
    missing = r"no LiFT checkpoint at .* correct --lift_path"
    for more in ([], ["--upsample", "bilinear"]):
        with pytest.raises(FileNotFoundError, match=missing):
            check_lift_args(flags("--lift_path", tmp_path / "none.pth", *more))
        with pytest.raises(ValueError, match=r"pass a lift.pth written by train_lift.py"):
            check_lift_args(flags("--lift_path", damaged, *more))
