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

from lift import (
    ConvLayers,
    LiFT,
    bilinear_weights,
    double,
    load_lift,
    map_to_tokens,
    read_lift,
    tokens_to_map,
    upsample,
    weigh_neighbours,
)

FACTS = {
    "name": "vit_x",
    "tag": "vit_x.tag",
    "layer": 11,
    "facet": "key",
    "channels": 16,
    "patch": 16,
    "stride": 16,
    "digest": "1234",
    "device": torch.device("cpu"),
    "dtype": torch.float32,
}
EXTRACTOR = SimpleNamespace(**FACTS)
ORIGIN = {"backbone": "vit_x.tag", "layer": 11, "facet": "key"}


def rule_lift(channels=16, patch=16, **kwargs):
    lift = LiFT(channels, patch, **kwargs)
    load_rule(lift)
    return lift.eval()


def load_rule(lift):
    """Give a module rule weights; what says which variant it is stays."""
    state = rule_state(lift)
    if "options" in state:
        state["options"] = lift.options
    lift.load_state_dict(state)


def inputs(h, w, patch=16, channels=16, batch=2):
    images = torch.cat([rule_image(h * patch, w * patch, seed) for seed in range(batch)])
    feats = torch.randn(batch, channels, h, w, generator=torch.Generator().manual_seed(0))
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
    attention = {"options", "attend.weight", "attend.bias"}
    assert set(LiFT(16, attend=2).state_dict()) == keys | attention
    value = {"value.weight", "value.bias"}
    assert set(LiFT(16, attend=2, heads=2).state_dict()) == keys | attention | value
    assert "up1.conv_1.double_conv.0.bias" not in keys


@pytest.mark.parametrize("variant", [{}, {"attend": 1}, {"attend": 1, "heads": 3}])
def test_a_seed_starts_from_the_weights_of_the_release(variant):
    """They were printed by the release: layers are made in its order."""
    torch.manual_seed(0)
    lift = LiFT(384, 16, **variant)
    wanted = {
        "image_convs_1.0.weight": (0.151156, -0.161099),
        "up1.up.weight": (-0.00026, 0.018598),
        "image_convs_2.0.weight": (-0.056232, 0.005302),
    }
    if not variant:  # elsewhere it starts at zero
        wanted["outc.weight"] = (0.050602, 0.008401)
    state = lift.state_dict()
    for key, beginning in wanted.items():
        found = state[key].flatten()[:2].tolist()
        assert found == pytest.approx(beginning, abs=1e-6), key


def plain_attend(feats, change, radius, heads):
    """Cell by cell, neighbour by neighbour, each head on the channels that are its own."""
    batch, _, height, width = feats.shape
    out = double(feats)
    for image in range(batch):
        for y in range(2 * height):
            for x in range(2 * width):
                number = 0
                for head in range(heads):
                    for dy in range(-radius, radius + 1):
                        for dx in range(-radius, radius + 1):
                            row = min(max(y // 2 + dy, 0), height - 1)
                            column = min(max(x // 2 + dx, 0), width - 1)
                            weight = change[image, number, y, x]
                            neighbour = feats[image, head::heads, row, column]
                            out[image, head::heads, y, x] += weight * neighbour
                            number += 1
    return out


@pytest.mark.parametrize("radius, heads", [(1, 1), (2, 1), (1, 3)])
@torch.no_grad()
def test_attention_equals_loops(radius, heads):
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(2, 6, 3, 4, generator=generator)
    change = torch.randn(2, heads * (2 * radius + 1) ** 2, 6, 8, generator=generator)
    wanted = plain_attend(feats, change, radius, heads)
    found = weigh_neighbours(feats, change, bilinear_weights(radius), radius, heads)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_attention_is_the_same_in_training():
    """There it is a product, for its backward; the gradients are those of the loops."""
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(2, 6, 3, 4, generator=generator)
    change = torch.randn(2, 18, 6, 8, generator=generator)
    found = []
    for attend in (weigh_neighbours, plain_weighing):
        leaf = change.clone().requires_grad_()
        out = attend(feats, leaf, bilinear_weights(1), 1, 2)
        out.square().sum().backward()
        found.append((out.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)


def plain_weighing(feats, change, bilinear, radius, heads):
    """The loops above, with the arguments of weigh_neighbours."""
    return plain_attend(feats, change, radius, heads)


@torch.no_grad()
def test_value_changes_the_coarse_features_first():
    """With heads: what is weighed is feats + value(feats), and the fuser sees feats as they are."""
    images, feats = inputs(3, 4)
    lift = LiFT(16, attend=1, heads=2).eval()
    torch.testing.assert_close(lift(images, feats), double(feats), rtol=0, atol=1e-6)
    lift.value.weight.copy_(0.5 * torch.eye(16)[:, :, None, None])
    torch.testing.assert_close(lift(images, feats), double(1.5 * feats), rtol=0, atol=1e-5)


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
    with pytest.raises(ValueError, match="image of 50x64 has a side that is not a multiple"):
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
    assert lift.radius == 0
    assert not any(p.requires_grad for p in lift.parameters())
    err = capsys.readouterr().err
    assert err.count("\n") == 1, "one line says that its origin is unknown"


def test_prefix_and_origin(tmp_path, capsys):
    state = rule_state(LiFT(16))
    own = {**ORIGIN, "patch": 16}
    prefixed = {f"module.{key}": value for key, value in state.items()}
    lift = load_lift(write(tmp_path, prefixed, own), EXTRACTOR)
    assert all(torch.equal(lift.state_dict()[key], value) for key, value in state.items())
    write(tmp_path, state, own, "lift.pth")  # lift.json speaks for every checkpoint of a run
    assert read_lift(write(tmp_path, state, name="lift_3.pth")).patch == 16
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "variant", [{"attend": 2}, {"attend": 1, "patch": 14}, {"attend": 1, "heads": 2}]
)
@torch.no_grad()
def test_a_variant_without_its_json_loads_as_what_it_is(tmp_path, variant):
    lift = rule_lift(**variant)
    loaded = load_lift(write(tmp_path, lift.state_dict()), silent=True)
    images, feats = inputs(2, 3, patch=variant.get("patch", 16))
    assert torch.equal(loaded(images, feats), lift(images, feats))


def test_a_patch_that_does_not_fit_is_refused(tmp_path):
    path = write(tmp_path, rule_lift(patch=14, attend=1).state_dict())
    with pytest.raises(ValueError, match="trained for patches of 14 pixels, not 16"):
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
        "wide": (rule_state(LiFT(32)), "trained for descriptors of 32 channels, not 16"),
        "short": (short, "up1.up.bias"),
        "bomb": ({**state, "x": Bomb()}, "holds more than tensors"),
        "number": ({**state, "x": 1}, "not a LiFT checkpoint .x is not a tensor."),
        "list": ([1], "cannot read weights"),
        "empty": ({}, "not a LiFT checkpoint"),
        "shape": ({**state, "options": torch.tensor([16.0, 0.0, 1.0])}, "attend.weight"),
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
        load_lift(path, SimpleNamespace(**{**FACTS, "stride": 8}))
    with pytest.raises(FileNotFoundError, match="--lift_path"):
        load_lift(tmp_path / "none.pth")


@pytest.mark.parametrize("told_by", ["options", "JSON"])
def test_a_residual_module_is_refused_in_one_line(tmp_path, told_by):
    state = rule_state(LiFT(16))
    facts = dict(ORIGIN)
    if told_by == "options":
        state["options"] = torch.tensor([16.0, 1.0, 0.0])
    else:
        facts["residual"] = True
    message = "is a residual LiFT module, which only versions before this one run: take the"
    with pytest.raises(ValueError, match=message):
        read_lift(write(tmp_path, state, facts))


def test_the_place_of_the_authors_modules_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download the authors' .* https://drive"):
        read_lift(tmp_path / "lift_dino_vits16.pth")
    with pytest.raises(FileNotFoundError, match=r"correct --lift_path, or train one"):
        read_lift(tmp_path / "mine.pth")


def test_what_a_patch_of_14_means_is_told(tmp_path, capsys):
    path = write(tmp_path, rule_state(LiFT(16)), ORIGIN)
    load_lift(path, patch_size=14)
    assert "LoftUp's LiFT pools instead" in capsys.readouterr().err
    load_lift(path, patch_size=8)
    assert capsys.readouterr().err == ""


# ---- batch norms --------------------------------------------------------------------------------


def folded_layers(lift):
    return [module for module in lift.modules() if isinstance(module, ConvLayers)]


@torch.no_grad()
def test_folding_changes_neither_features_nor_state(tmp_path):
    lift = rule_lift(attend=1, heads=2)
    images, feats = inputs(3, 4)
    wanted = lift(images, feats)
    loaded = load_lift(write(tmp_path, lift.state_dict()), silent=True)
    assert all(layers.is_folded for layers in folded_layers(loaded))
    assert torch.equal(loaded(images, feats), wanted)
    assert loaded.state_dict().keys() == lift.state_dict().keys()
    assert torch.equal(copy.deepcopy(loaded)(images, feats), wanted)


def test_what_was_folded_is_never_outdated(tmp_path):
    """Training, new weights, and gradient steps in eval mode each make it so."""
    images, feats = inputs(3, 4)
    path = write(tmp_path, rule_lift().state_dict())

    def changed(lift):
        with torch.no_grad():
            lift.image_convs_1[0].weight.mul_(2)
        wanted = plain_lift(lift, images, feats, 1)
        torch.testing.assert_close(lift(images, feats), wanted, rtol=0, atol=1e-5)

    trained = load_lift(path, silent=True)
    trained.train()
    changed(trained.eval())

    loaded = load_lift(path, silent=True)
    state = {key: 2 * value for key, value in loaded.state_dict().items()}
    loaded.load_state_dict(state)
    wanted = plain_lift(loaded, images, feats, 1)
    torch.testing.assert_close(loaded(images, feats), wanted, rtol=0, atol=1e-4)

    tuned = load_lift(path, silent=True).requires_grad_(True)
    tuned(images, feats).sum().backward()
    assert tuned.image_convs_1[1].weight.grad.abs().sum() > 0
    changed(tuned.requires_grad_(False))


# ---- the authors' files -------------------------------------------------------------------------


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
