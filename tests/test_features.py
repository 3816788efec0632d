"""features.py: the one path against its four steps by hand, and every check that it makes."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import rule_state
from torch import nn

from command import Command, add_backbone_args, add_lift_args
from features import Bilinear, Features, Lifted, build_features, check_finite
from files import weights_digest
from lift import LiFT, load_lift, upsample


def flags(*args):
    command = Command("")
    add_backbone_args(command)
    add_lift_args(command)
    return command.parse_args([str(value) for value in args])


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 48, 64, generator=generator)


@torch.no_grad()
def test_equals_its_steps_by_hand(rule_extractor, rule_lift, images):
    extractor = rule_extractor()
    lift = load_lift(rule_lift, extractor, silent=True)
    normalized = (images - 0.5) / 0.5
    feats = extractor(normalized)

    alone = Features(extractor)
    assert torch.equal(alone(images), feats)
    assert (alone.factor, alone.patch, alone.channels) == (1, 16, 192)

    bilinear = Features(extractor, Bilinear(2))
    wanted = F.interpolate(feats, scale_factor=4, mode="bilinear", align_corners=False)
    assert torch.equal(bilinear(images), wanted)
    assert bilinear.factor == 4

    lifted = Features(extractor, Lifted(lift, extractor, 2))
    steps = upsample(lift, normalized, feats, 2, return_all=True)
    found = lifted(images, return_all=True)
    assert len(found) == len(steps) == 3
    for one, other in zip(found, steps):
        assert torch.equal(one, other)
    assert torch.equal(lifted(images), steps[-1])
    assert lifted.factor == 4


@torch.no_grad()
def test_batch_equals_single(rule_extractor, rule_lift, images):
    extractor = rule_extractor()
    features = Features(extractor, Lifted(load_lift(rule_lift, extractor, silent=True), extractor))
    alone = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(features(images), alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_copies_and_moves(rule_extractor, rule_lift, images):
    extractor = rule_extractor()
    features = Features(extractor, Lifted(load_lift(rule_lift, extractor, silent=True), extractor))
    twin = copy.deepcopy(features)
    assert torch.equal(twin(images), features(images))
    assert twin.upsampler.normalize.__self__ is twin.backbone


# ---- somebody's upsampler -----------------------------------------------------------------------


class ToPixels(nn.Module):
    """As AnyUp or JAFAR: to the size of the images, whatever the grid is."""

    def forward(self, images, feats):
        assert images.min() >= 0
        assert images.max() <= 1
        return F.interpolate(feats, size=images.shape[2:], mode="nearest")


def thrice(images, feats):
    return F.interpolate(feats, scale_factor=3)


@torch.no_grad()
def test_anybodys_upsampler_is_called_with_images_in_0_to_1(rule_extractor, images):
    extractor = rule_extractor()
    to_pixels = Features(extractor, ToPixels())
    assert to_pixels.factor == 16
    feats = extractor(extractor.normalize(images))
    assert torch.equal(to_pixels(images), F.interpolate(feats, scale_factor=16))
    assert Features(extractor, thrice).factor == 3
    assert len(to_pixels(images, return_all=True)) == 2


@pytest.mark.parametrize(
    "upsampler",
    [
        lambda images, feats: feats[0],
        lambda images, feats: feats[:, :5],
        lambda images: images,
        lambda images, feats: None,
        lambda images, feats: feats @ feats.flatten(),
    ],
)
def test_an_upsampler_that_does_something_else_is_refused(rule_extractor, upsampler):
    with pytest.raises(ValueError, match=r"the upsampler does not work .*: it must take"):
        Features(rule_extractor(), upsampler)


UPSAMPLERS = """
import torch.nn.functional as F

def pixels(args):
    def upsample(images, feats):
        return F.interpolate(feats, scale_factor=args.lift_iter + 1)
    return upsample

def nothing():
    return None
"""


@torch.no_grad()
def test_an_upsampler_by_its_name(rule_backbone, import_path, images):
    (import_path / "mine.py").write_text(UPSAMPLERS)
    features = build_features(flags(*rule_backbone, "--upsample", "mine:pixels", "--lift_iter", 2))
    assert features.factor == 3
    assert features(images).shape == (2, 192, 9, 12)
    for name, message in (
        ("mine:nobody", "--upsample"),
        ("nowhere:pixels", "--upsample"),
        ("mine:nothing", "--upsample"),
    ):
        with pytest.raises(ValueError, match=message):
            build_features(flags(*rule_backbone, "--upsample", name))


# ---- checks -------------------------------------------------------------------------------------


def test_features_that_are_not_finite_are_refused(rule_extractor, images):
    extractor = rule_extractor()
    for dtype, remedy in ((torch.float16, "--dtype float32"), (torch.float32, "other weights")):
        with pytest.raises(ValueError, match=f"not finite in {str(dtype)[6:]}: pass {remedy}"):
            check_finite(torch.tensor([1.0, float("inf")]), dtype)

    def spoilt(images, feats):
        return torch.where(images.mean() > 0, feats * float("nan"), feats)

    features = Features(extractor, spoilt)  # its factor is read from black images
    with pytest.raises(ValueError, match="not finite"):
        features(images)


def test_sizes_are_multiples_of_the_patch(rule_extractor):
    features = Features(rule_extractor())
    features.check_size(224, 448)
    with pytest.raises(ValueError, match=r"--imsize 230 is not a multiple .*\(16\): pass 224 or"):
        features.check_size(224, 230)
    with pytest.raises(ValueError, match=r"--size 8 is not a multiple .*: pass 16 or 32"):
        features.check_size(8, 16, flag="--size")


def test_flags_that_contradict_each_other(rule_backbone, rule_lift):
    nothing_to_repeat = "pass --upsample bilinear, or --lift_path FILE"
    contradictions = [
        (["--upsample", "lift"], "needs a module: pass --lift_path FILE"),
        (["--lift_path", rule_lift, "--lift_iter", -1], "-1 is negative: pass 0 or more"),
        (["--lift_iter", 3], nothing_to_repeat),
        (["--lift_path", rule_lift, "--upsample", "none", "--lift_iter", 2], nothing_to_repeat),
        (["--upsample", "bicubic"], "pass none, bilinear, lift or MODULE:FUNCTION"),
    ]
    for bad, message in contradictions:
        with pytest.raises(ValueError, match=message):
            build_features(flags(*rule_backbone, *bad))


def test_the_lift_file_is_told_before_a_backbone_is_built(tmp_path, rule_lift):
    """The backbone here does not exist, which would be told first otherwise."""
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(rule_lift.read_bytes()[:1000])
    backbone = ["--model_type", "vit_nowhere"]
    for more in ([], ["--upsample", "bilinear"]):
        with pytest.raises(FileNotFoundError, match="there is no LiFT checkpoint at"):
            build_features(flags(*backbone, "--lift_path", tmp_path / "none.pth", *more))
        with pytest.raises(ValueError, match=r"pass a lift.pth written by train_lift.py"):
            build_features(flags(*backbone, "--lift_path", damaged, *more))


def test_a_module_of_another_backbone_is_refused(tmp_path, rule_backbone):
    path = tmp_path / "x.pth"
    torch.save(rule_state(LiFT(192)), path)
    facts = {"backbone": "vit_y", "layer": 11, "facet": "key"}
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="was trained for backbone vit_y, not vit_tiny"):
        build_features(flags(*rule_backbone, "--lift_path", path))
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="stride 8 is finer than the patch"):
        build_features(flags(*rule_backbone, "--lift_path", path, "--stride", 8))


def test_facts_name_what_decides_the_features(rule_backbone, rule_lift, rule_extractor):
    plain = build_features(flags(*rule_backbone)).facts()
    assert plain["upsample"] == "none"
    assert build_features(flags(*rule_backbone, "--upsample", "bilinear")).facts() == {
        **plain, "upsample": "bilinear",
    }  # fmt: skip
    lifted = build_features(flags(*rule_backbone, "--lift_path", rule_lift))
    digest = weights_digest(lifted.upsampler.lift)
    assert lifted.facts() == {**plain, "upsample": "lift", "lift_digest": digest}

    extractor = rule_extractor()
    conv = nn.Conv2d(3, 192, 1)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, images, feats):
            return F.interpolate(feats, scale_factor=2)

    before = Features(extractor, Own()).facts()
    with torch.no_grad():
        conv.weight.mul_(2)
    after = Features(extractor, Own()).facts()
    assert before["upsampler_digest"] != after["upsampler_digest"]
