"""lift.py against LiFT layer by layer, the reference's checkpoints, and every checkpoint that must be refused."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rule_image, rule_state
from plain_extract import plain_lift

from extractor import Command
from lift import LiFT, add_lift_args, double, load_lift, map_to_tokens, pca_rgb, tokens_to_map, upsample, upsampler

EXTRACTOR = SimpleNamespace(
    name="vit_x", tag="vit_x.tag", layer=11, facet="key", width=16, patch=16, stride=16, device=torch.device("cpu"),
    dtype=torch.float32,
)  # fmt: skip


def rule_lift(width=16, patch=16, **kwargs):
    lift = LiFT(width, patch, **kwargs)
    lift.load_state_dict(rule_state(lift))
    return lift.eval()


def inputs(h, w, patch=16, width=16, batch=2):
    images = torch.cat([rule_image(h * patch, w * patch, seed) for seed in range(batch)])
    return images, torch.randn(batch, width, h, w, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@torch.no_grad()
def test_equals_layer_by_layer(patch, iterations):
    lift, (images, feats) = rule_lift(patch=patch), inputs(3, 5, patch)
    slow = plain_lift(lift, images, feats, iterations)
    found = upsample(lift, images, feats, iterations)
    assert found.shape == (2, 16, 3 * 2**iterations, 5 * 2**iterations)
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)
    steps = upsample(lift, images, feats, iterations, return_all=True)
    assert len(steps) == iterations + 1 and torch.equal(steps[0], feats)
    torch.testing.assert_close(steps[-1], slow, rtol=0, atol=1e-5)


@torch.no_grad()
def test_other_patches_take_the_path_of_16():
    lift, (images, feats) = rule_lift(patch=14), inputs(3, 4, patch=14)
    resized = F.interpolate(images, size=(48, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(lift(images, feats), rule_lift(patch=16)(resized, feats))


def test_parameters_and_keys():
    assert sum(p.numel() for p in LiFT(384).parameters()) == 1_187_280
    assert sum(p.numel() for p in LiFT(768).parameters()) == 4_417_296
    keys = set(LiFT(16).state_dict())
    assert {key.rsplit(".", 1)[0] for key in keys} == {
        *(f"image_convs_1.{i}" for i in (0, 1, 3, 4)), "image_convs_2.0", "image_convs_2.1", "up1.up", "outc",
        *(f"up1.conv_1.double_conv.{i}" for i in (0, 1, 3, 4)),
    }  # fmt: skip
    assert keys == set(LiFT(16, 8).state_dict()) == set(LiFT(16, residual=True).state_dict())
    assert "up1.conv_1.double_conv.0.bias" not in keys


@torch.no_grad()
def test_residual_starts_at_bilinear():
    images, feats = inputs(3, 4)
    assert torch.equal(LiFT(16, residual=True).eval()(images, feats), double(feats))
    plain, residual = rule_lift(), rule_lift(residual=True)
    torch.testing.assert_close(residual(images, feats), plain(images, feats) + double(feats))


@torch.no_grad()
def test_tokens_in_and_out():
    images, feats = inputs(3, 4)
    tokens = feats.flatten(2).transpose(1, 2)
    assert torch.equal(tokens[:, 1 * 4 + 2], feats[:, :, 1, 2]), "row by row"
    assert torch.equal(map_to_tokens(feats), tokens) and torch.equal(tokens_to_map(tokens, (3, 4)), feats)
    found = rule_lift(pre_shape=True, post_shape=True)(images, tokens)
    torch.testing.assert_close(tokens_to_map(found, (6, 8)), rule_lift()(images, feats), rtol=0, atol=1e-6)


@torch.no_grad()
def test_batch_equals_single():
    lift, (images, feats) = rule_lift(), inputs(3, 4, batch=3)
    alone = torch.cat([lift(i[None], f[None]) for i, f in zip(images, feats)])
    torch.testing.assert_close(lift(images, feats), alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_crop_far_from_its_border_is_unchanged():
    lift, (images, feats) = rule_lift(), inputs(16, 16, batch=1)
    whole, part = lift(images, feats), lift(images[..., 64:192], feats[..., 4:12])
    torch.testing.assert_close(part[..., 6:10], whole[..., 14:18], rtol=0, atol=1e-5)


def test_grids_that_do_not_match():
    feats = inputs(3, 4)[1]
    with pytest.raises(ValueError, match=r"grid is 3x4 but an image of 64x64 gives 4x4: resize .* patch \(16\)"):
        rule_lift()(torch.zeros(2, 3, 64, 64), feats)
    with pytest.raises(ValueError, match="image of 50x64"):
        rule_lift()(torch.zeros(2, 3, 50, 64), feats)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def write(folder, state, origin=None, name="x.pth"):
    torch.save(state, folder / name)
    if origin is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps(origin))
    return folder / name


def test_reference_checkpoint(golden_lift, capsys):
    lift = load_lift(golden_lift)
    assert lift.outc.weight.shape == (192, 96, 1, 1)
    assert not lift.training and not lift.residual and not any(p.requires_grad for p in lift.parameters())
    assert capsys.readouterr().err.count("\n") == 1, "one line says that its origin is unknown"


def test_prefix_and_origin(tmp_path, capsys):
    state = rule_state(LiFT(16))
    own = {"backbone": "vit_x.tag", "layer": 11, "facet": "key", "residual": True, "patch": 16}
    lift = load_lift(write(tmp_path, {f"module.{k}": v for k, v in state.items()}, own), EXTRACTOR)
    assert lift.residual and all(torch.equal(lift.state_dict()[k], v) for k, v in state.items())
    write(tmp_path, state, own, "lift.pth")  # lift.json speaks for every checkpoint of a training run
    assert load_lift(write(tmp_path, state, name="lift_3.pth"), EXTRACTOR).residual
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "vit_y.tag"}, "trained for backbone vit_y.tag, not vit_x.tag"),
        ({"layer": 9}, "trained for layer 9, not 11"),
        ({"facet": "value", "layer": 3}, "layer 3, not 11 and facet value, not key"),
    ],
)
def test_another_origin_is_refused(tmp_path, change, message):
    origin = {"backbone": "vit_x.tag", "layer": 11, "facet": "key"} | change
    with pytest.raises(ValueError, match=message):
        load_lift(write(tmp_path, rule_state(LiFT(16)), origin), EXTRACTOR)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = rule_state(LiFT(16))
    short = {k: v for k, v in state.items() if k != "up1.up.bias"}
    cases = {
        "wide": (rule_state(LiFT(32)), "is for descriptors of 32 channels, but vit_x key has 16"),
        "short": (short, "up1.up.bias"),
        "bomb": (state | {"x": Bomb()}, "not a LiFT checkpoint"),
        "list": ([1], "not a LiFT checkpoint"),
        "empty": ({}, "not a LiFT checkpoint"),
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
        load_lift(path, SimpleNamespace(**vars(EXTRACTOR) | {"stride": 8}))
    with pytest.raises(FileNotFoundError, match="--lift_path"):
        load_lift(tmp_path / "none.pth")


# ---- flags and pictures ---------------------------------------------------------------------------------------------


def flags(*args):
    command = Command("")
    add_lift_args(command)
    return command.parse_args([str(a) for a in args])


@torch.no_grad()
def test_upsampler(tmp_path):
    images, feats = inputs(2, 3)
    path = write(tmp_path, rule_state(LiFT(16)), {"backbone": "vit_x.tag", "layer": 11, "facet": "key"})
    none, two = upsampler(flags(), EXTRACTOR), upsampler(flags("--upsample", "bilinear", "--lift_iter", 2), EXTRACTOR)
    lifted = upsampler(flags("--lift_path", path, "--lift_iter", 2), EXTRACTOR)
    assert (none.factor, two.factor, lifted.factor) == (1, 4, 4)
    assert torch.equal(none(images, feats), feats)
    torch.testing.assert_close(two(images, feats), F.interpolate(feats, scale_factor=4, mode="bilinear"))
    torch.testing.assert_close(lifted(images, feats), plain_lift(rule_lift(), images, feats, 2), rtol=0, atol=1e-5)
    assert upsampler(flags("--lift_path", path, "--upsample", "none"), EXTRACTOR).factor == 1
    for bad in (["--upsample", "lift"], ["--lift_path", path, "--lift_iter", -1]):
        with pytest.raises(ValueError, match="pass"):
            upsampler(flags(*bad), EXTRACTOR)


def test_pca_colours_compare_between_maps():
    two_parts = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2).repeat(1, 6, 1)
    two_parts = two_parts + 0.01 * torch.randn(two_parts.shape, generator=torch.Generator().manual_seed(1))
    coarse, fine = pca_rgb([two_parts, two_parts.repeat_interleave(2, 1).repeat_interleave(2, 2)])
    assert coarse.shape == (6, 8, 3) and coarse.dtype == np.uint8
    assert np.array_equal(fine[::2, ::2], coarse), "the same descriptor has the same colour in both"
    between = np.abs(coarse[:, :4].mean((0, 1)) - coarse[:, 4:].mean((0, 1))).max()
    assert between > 150, "two parts, two colours"
    flat = pca_rgb([torch.ones(8, 2, 2)])[0]
    assert (flat == flat[0, 0]).all()
