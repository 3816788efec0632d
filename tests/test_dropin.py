"""Code and commands written for the earlier releases run here unchanged.

The client code below is our own, in the manner of dino-vit-features and of the LiFT release: it
uses the names, defaults and shapes that people's scripts rely on. Its numbers are compared with
those of our own scripts and of the map-shaped calls.
"""

import copy
import importlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rule_image, rule_vit
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

from extraction import placement
from extractor import ViTExtractor, log_bin
from lift import LiFT, load_lift, map_to_tokens, upsample
from lift_extractor import ViTLiFTExtractor
from objectives import Objective

NAME = "vit_tiny_patch16_224"


def save_photo(path, height, width, seed):
    image = rule_image(height, width, seed)[0]
    to_pil_image((0.5 + 0.25 * image).clamp(0, 1)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two photos of 48x64 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    first = save_photo(folder / "first.png", 48, 64, seed=0)
    second = save_photo(folder / "second.png", 48, 64, seed=1)
    return first, second


@pytest.fixture(scope="module")
def dino():
    """A ViT-S with six heads and patches of 8, as dino_vits8."""
    return rule_vit("vit_small_patch8_224.dino")


@pytest.fixture(scope="module")
def tiny(rule_backbone):
    """A ViT-Ti with the weights of the fixture rule_backbone."""
    model = rule_vit(NAME)
    model.load_state_dict(load_file(rule_backbone[-1]))
    return model


# ---- a correspondence script of dino-vit-features -----------------------------------------------


def find_correspondences(extractor, path_1, path_2, load_size, layer=9, threshold=0.05):
    """Mutual nearest neighbours among salient cells: two lists of (y, x) in pixels."""
    device = extractor.device
    descriptors, grids, salient, sizes = [], [], [], []
    for path in (path_1, path_2):
        batch, pil = extractor.preprocess(path, load_size)
        found = extractor.extract_descriptors(batch.to(device), layer, "key", True)
        descriptors.append(found)
        grids.append(extractor.num_patches)
        sizes.append(extractor.load_size)
        assert isinstance(pil, Image.Image) and (pil.height, pil.width) == extractor.load_size
        saliency = extractor.extract_saliency_maps(batch.to(device))[0].cpu().numpy()
        salient.append(saliency > threshold)

    unit_1 = F.normalize(descriptors[0][0, 0], dim=1)
    unit_2 = F.normalize(descriptors[1][0, 0], dim=1)
    similarity = unit_1 @ unit_2.T
    to_2 = similarity.argmax(1).numpy()
    to_1 = similarity.argmax(0).numpy()

    points_1, points_2 = [], []
    for cell_1, cell_2 in enumerate(to_2):
        if to_1[cell_2] != cell_1 or not salient[0][cell_1] or not salient[1][cell_2]:
            continue
        for points, cell, grid in ((points_1, cell_1, grids[0]), (points_2, cell_2, grids[1])):
            row, column = cell // grid[1], cell % grid[1]
            y = row * extractor.stride[0] + extractor.p // 2
            x = column * extractor.stride[1] + extractor.model.patch_embed.patch_size // 2
            points.append((int(y), int(x)))
    return points_1, points_2, similarity, sizes


def test_correspondences(photos, dino):
    extractor = ViTExtractor("dino_vits8", 4, dino, "cpu")
    assert extractor.num_patches is None and extractor.load_size is None
    found = find_correspondences(extractor, *photos, load_size=40)
    points_1, points_2, similarity, sizes = found
    assert sizes == [(40, 56), (40, 56)]  # 40x53, in whole patches
    assert 0 < len(points_1) == len(points_2) < 9 * 13

    # the same from maps
    maps = []
    for path in photos:
        images, _ = extractor.preprocess(path, 40)
        maps.append(F.normalize(log_bin(extractor(images, layer=9))[0], dim=1))
    torch.testing.assert_close(similarity, maps[0] @ maps[1].T)

    # pixels are those that our own files of features tell
    place = placement(extractor, (40, 56), (40, 56), extractor.grid(40, 56))
    for y, x in points_1:
        row = (y - place["first_y"]) / place["step_y"]
        column = (x - place["first_x"]) / place["step_x"]
        assert row == int(row) < 9 and column == int(column) < 13


def test_an_image_corresponds_to_itself(photos, dino):
    extractor = ViTExtractor("dino_vits8", 4, dino, "cpu")
    both = (photos[0], photos[0])
    points_1, points_2, _, _ = find_correspondences(extractor, *both, (40, 56), threshold=-1)
    assert points_1 == points_2 and len(points_1) == 9 * 13
    assert points_1[0] == (4, 4) and points_1[-1] == (36, 52)


def test_model_and_stride_by_default(dino):
    extractor = ViTExtractor(model=dino, device="cpu")
    assert extractor.model_type == "dino_vits8"
    assert (extractor.stride[0], extractor.stride[1]) == (4, 4)


def test_pca_of_tokens_with_cls(photos, dino):
    """Descriptors with CLS first; what follows are those without."""
    extractor = ViTExtractor("dino_vits8", 8, dino, "cpu")
    batch, _ = extractor.preprocess(photos[0])
    with_cls = extractor.extract_descriptors(batch, 11, "token", include_cls=True).cpu().numpy()
    without = extractor.extract_descriptors(batch, 11, "token").cpu().numpy()
    rows, columns = extractor.num_patches
    assert with_cls.shape == (1, 1, rows * columns + 1, 384)
    np.testing.assert_allclose(with_cls[:, :, 1:], without)


def test_descriptors_are_those_of_our_command(photos, tiny, rule_backbone, cli, tmp_path):
    out = tmp_path / "descriptors.pth"
    flags = ["--image_path", photos[0], "--output_path", out, "--load_size", 64, "--bin", "True"]
    done = cli("extractor", *flags, *rule_backbone, "--stride", 8, "--device", "cpu")
    assert done.code == 0, done.err

    extractor = ViTExtractor(NAME, 8, tiny, "cpu")
    batch, _ = extractor.preprocess(photos[0], 64)
    wanted = extractor.extract_descriptors(batch, 11, "key", True)
    torch.testing.assert_close(torch.load(out), wanted, rtol=0, atol=0)


# ---- an evaluation script of the LiFT release ---------------------------------------------------


def build_network(tiny, rule_lift):
    network = ViTLiFTExtractor(
        model_type=NAME,
        lift_path=str(rule_lift),
        channel=192,
        patch=16,
        stride=16,
        layer=11,
        facet="key",
        model=tiny,
        device="cpu",
        silent=True,
    )
    network = network.to("cpu")
    return network.eval()


def test_evaluation_loop(tiny, rule_lift):
    """Batches of square images; tokens are folded to a map by the root of their number."""
    network = build_network(tiny, rule_lift)
    assert isinstance(network, torch.nn.Module) and not network.training
    assert (network.channel, network.patch, network.stride) == (192, 16, 16)
    assert (network.layer, network.facet, network.model_type) == (11, "key", NAME)
    assert isinstance(network.lift, LiFT) and network.model is tiny

    extractor = ViTExtractor(NAME, 16, tiny, "cpu")
    lift = load_lift(rule_lift, extractor, silent=True)
    for seed in range(2):
        images = torch.cat([rule_image(64, 64, seed), rule_image(64, 64, seed + 10)])
        with torch.no_grad():
            tokens = network.extract_descriptors(images)
        side = int(math.sqrt(tokens.shape[1]))
        folded = tokens.permute(0, 2, 1).reshape(tokens.shape[0], -1, side, side)

        dense = upsample(lift, images, extractor(images))
        torch.testing.assert_close(tokens, map_to_tokens(dense), rtol=0, atol=0)
        torch.testing.assert_close(folded, dense, rtol=0, atol=0)


def test_what_lies_before_and_between_iterations(tiny, rule_lift):
    network = build_network(tiny, rule_lift)
    images = rule_image(48, 64, seed=3)
    steps = network.extract_descriptors_iterative_lift(images, lift_iter=2, return_inter=True)
    assert list(steps) == ["back", "lift_1", "lift_2"]
    by_vit = network.extractor.extract_descriptors(images)
    torch.testing.assert_close(by_vit[:, 0], steps["back"], rtol=0, atol=0)
    once = network.extract_descriptors(images)
    torch.testing.assert_close(once, steps["lift_1"], rtol=0, atol=0)


def test_without_a_module_the_descriptors_are_the_backbones(tiny):
    network = ViTLiFTExtractor(NAME, model=tiny, device="cpu").eval()
    assert network.lift is None and network.lift_path is None
    images = rule_image(48, 64, seed=4)
    wanted = network.extractor.extract_descriptors(images)[:, 0]
    torch.testing.assert_close(network.extract_descriptors(images), wanted, rtol=0, atol=0)


def test_tokens_are_those_of_our_command(photos, tiny, rule_backbone, rule_lift, cli, tmp_path):
    out = tmp_path / "tokens.pth"
    flags = ["--image_path", photos[0], "--output_path", out, "--load_size", 64]
    lift_flags = ["--lift_path", rule_lift, "--lift_iter", 2, "--device", "cpu"]
    done = cli("lift_extractor", *flags, *rule_backbone, *lift_flags)
    assert done.code == 0, done.err

    network = build_network(tiny, rule_lift)
    batch, _ = network.extractor.preprocess(photos[0], 64)
    wanted = network.extract_descriptors_iterative_lift(batch, 2)
    torch.testing.assert_close(torch.load(out), wanted)


# ---- a training script of the LiFT release ------------------------------------------------------


def test_training_loop(tiny, tmp_path, monkeypatch):
    """Two scales and Adam: step by step the losses of our own training's objective."""
    # DataParallel would move the module to a GPU, away from the photos
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    extractor = ViTExtractor(NAME, 16, tiny, "cpu")
    torch.manual_seed(0)
    lift = LiFT(192, 16, pre_shape=False, post_shape=False)
    ours = copy.deepcopy(lift)

    wrapped = torch.nn.DataParallel(lift)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.001)
    objective = Objective(ours, "cosine")
    our_optimizer = torch.optim.Adam(ours.parameters(), lr=0.001)
    losses, our_losses = [], []
    for step in range(3):
        full = torch.cat([rule_image(128, 128, 2 * step), rule_image(128, 128, 2 * step + 1)])
        half = full[:, :, ::2, ::2]
        quarter = half[:, :, ::2, ::2]

        feats = []
        for images in (full, half, quarter):
            side = images.shape[-1] // 16
            tokens = extractor.extract_descriptors(images)[:, 0]
            feats.append(tokens.permute(0, 2, 1).reshape(2, 192, side, side))
        loss = 0
        for images, coarse, fine in ((half, feats[1], feats[0]), (quarter, feats[2], feats[1])):
            loss = loss + 1 - F.cosine_similarity(wrapped(images, coarse), fine).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

        our_loss = objective([half, quarter], feats)
        our_optimizer.zero_grad()
        our_loss.backward()
        our_optimizer.step()
        our_losses.append(our_loss.item())

    assert losses == pytest.approx(our_losses, rel=1e-5)
    assert losses[2] < losses[0]

    # what is saved has DataParallel's prefix
    torch.save(wrapped.state_dict(), tmp_path / "lift.pth")
    loaded = load_lift(tmp_path / "lift.pth", extractor, silent=True)
    torch.testing.assert_close(loaded(half, feats[1]), lift.eval()(half, feats[1]))


# ---- command lines ------------------------------------------------------------------------------

# what the scripts of both releases share
BACKBONE_FLAGS = {
    "--model_type": "dino_vits8", "--facet": "key", "--channel": None, "--patch": None,
    "--stride": None, "--layer": None,
}  # fmt: skip

# every other flag of the LiFT release's scripts, with its default; SWITCH stands alone
SWITCH = "switch"
PLACEHOLDER = "a path to fill in"
REFERENCE = {
    "train_lift": {
        **BACKBONE_FLAGS,
        "--imsize": 448, "--lr": 0.001, "--epochs": 100, "--batch_size": 64, "--save_every": 1,
        "--augment": SWITCH, "--loss": "cosine", "--output_dir": "lift_imagenet_trains",
        "--dataroot": PLACEHOLDER, "--seed": 0, "--my_extractor": SWITCH,
    },
    "eval_spair": {
        **BACKBONE_FLAGS,
        "--lift_path": None, "--dataroot": PLACEHOLDER, "--imsize": 224, "--seed": 0,
        "--pairs_per_category": 100,
    },
    "eval_davis": {
        **BACKBONE_FLAGS,
        "--lift_path": None, "--dataroot": PLACEHOLDER, "--output_dir": "temp_davis_test",
        "--imsize": 224, "--n_last_frames": 7, "--size_mask_neighborhood": 12, "--topk": 5,
    },
    "eval_tokencut": {
        **BACKBONE_FLAGS,
        "--lift_path": None, "--dataroot": PLACEHOLDER, "--imsize": 224, "--arch": "vit_small",
        "--patch_size": 16, "--dataset": "VOC07", "--save-feat-dir": None, "--set": "train",
        "--image_path": None, "--output_dir": "outputs", "--no_hard": SWITCH,
        "--no_evaluation": SWITCH, "--save_predictions": True, "--visualize": None,
        "--which_features": "k", "--k_patches": 100, "--resize": None, "--tau": 0.2,
        "--eps": 1e-5, "--no-binary-graph": SWITCH, "--dinoseg": SWITCH, "--dinoseg_head": 4,
    },
    "eval_visualize_feats": {
        **BACKBONE_FLAGS,
        "--lift_path": None, "--dataroot": PLACEHOLDER, "--seed": 0,
        "--output_dir": "visualizations", "--imsize": 224, "--hide_marker": SWITCH,
        "--fontsize": 36, "--limit": 20,
    },
    "extractor": {
        "--image_path": PLACEHOLDER, "--output_path": PLACEHOLDER, "--load_size": 224,
        "--stride": 4, "--model_type": "dino_vits8", "--facet": "key", "--layer": 11,
        "--bin": SWITCH,
    },
    "lift_extractor": {
        **BACKBONE_FLAGS,
        "--lift_path": None, "--lift_iter": 1, "--image_path": PLACEHOLDER,
        "--output_path": PLACEHOLDER, "--load_size": 224,
    },
}  # fmt: skip

# defaults that are others here, and do the same
SAME = {
    ("train_lift", "--my_extractor"): None,  # no backbone of one's own
    ("extractor", "--layer"): None,          # the last one, which is 11
    ("eval_visualize_feats", "--fontsize"): 18,  # about our own sheets
}

FLAGS = [(script, flag) for script, flags in REFERENCE.items() for flag in flags]


@pytest.fixture(scope="module")
def parsers():
    return {script: importlib.import_module(script).parser() for script in REFERENCE}


def needed(parser, without=None):
    """The required flags of a parser, filled in."""
    argv = []
    for action in parser._actions:
        if action.required and without not in action.option_strings:
            argv += [action.option_strings[0], "x"]
    return argv


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_flags_and_defaults_of_the_release(parsers, cli, script, flag):
    parser = parsers[script]
    default = REFERENCE[script][flag]
    action = parser._option_string_actions[flag]
    args = parser.parse_args(needed(parser))

    if default == PLACEHOLDER:
        # by the parser, or by main where another flag may stand in for it
        done = cli(script, *needed(parser, without=flag))
        assert done.code == 2 and flag in done.err
        return

    wanted = SAME.get((script, flag), default)
    if wanted == SWITCH:
        wanted = False
    assert getattr(args, action.dest) == wanted

    if default == SWITCH:
        parser.parse_args([*needed(parser), flag])
    else:
        value = default
        if value is None:
            value = "1"
            if action.choices:
                value = action.choices[0]
        parser.parse_args([*needed(parser, without=flag), flag, str(value)])


def test_the_table_is_the_releases(shared):
    """The table above is the shared list of flags, with placeholders and switches by name."""
    reference = json.loads((shared / "golden/reference_cli.json").read_text())
    table = {}
    for script, flags in reference.items():
        table[script] = {}
        for flag, facts in flags.items():
            default = facts["default"]
            if facts["switch"]:
                default = SWITCH
            elif facts["required"] or "path/to" in str(default):
                default = PLACEHOLDER
            table[script][flag] = default
    assert table == REFERENCE
