"""hubconf.py: the module equals extractor and LiFT put together by hand, and meets any caller's own files in peace."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from extractor import ViTExtractor, resolve
from lift import load_lift, upsample

NAME = "vit_tiny_patch16_224"
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def hub(entry, **kwargs):
    return torch.hub.load(str(ROOT), entry, source="local", **kwargs)


@pytest.fixture(scope="module")
def files(rule_backbone, rule_lift):
    return {"backbone": NAME, "backbone_path": rule_backbone[-1], "lift_path": rule_lift}


@pytest.fixture(scope="module")
def features(files):
    return hub("lift", **files)


@pytest.fixture(scope="module")
def by_hand(files):
    """(images in 0..1, iterations) -> (the backbone's features, LiFT's), without hubconf."""
    extractor = ViTExtractor(NAME, device="cpu", backbone_path=files["backbone_path"])
    lift = load_lift(files["lift_path"], extractor)

    @torch.no_grad()
    def run(images, iterations=1):
        normalised = (images - 0.5) / 0.5
        feats = extractor(normalised)
        return feats, upsample(lift, normalised, feats, iterations)

    return run


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_equals_extractor_and_lift(features, by_hand, iterations):
    dense = features(IMAGES, iterations=iterations)
    assert dense.shape == (2, 192, 4 * 2**iterations, 6 * 2**iterations) and not dense.requires_grad
    torch.testing.assert_close(dense, by_hand(IMAGES, iterations)[1])


def test_options_of_a_call_and_of_the_load(features, files, by_hand):
    options = {"iterations": 2, "out_size": (50, 70), "return_backbone": True}
    feats, dense = by_hand(IMAGES, 2)
    wanted = F.interpolate(dense, size=(50, 70), mode="bilinear", align_corners=False)
    for pair in (features(IMAGES, **options), hub("lift", **files, **options)(IMAGES)):
        torch.testing.assert_close(pair, (wanted, feats))
    assert features(IMAGES, out_size=33).shape == (2, 192, 33, 33)
    assert features(IMAGES).shape == (2, 192, 8, 12)  # a call's options hold for that call


def test_layer_and_facet(files):
    pair = {"layer": 4, "facet": "token"}
    _, feats = hub("lift", **files, **pair)(IMAGES, return_backbone=True)
    extractor = ViTExtractor(NAME, device="cpu", backbone_path=files["backbone_path"], **pair)
    torch.testing.assert_close(feats, extractor((IMAGES - 0.5) / 0.5))


def test_stays_frozen_inside_a_model_that_trains(features):
    before = features(IMAGES)
    torch.nn.Sequential(features).train()(IMAGES)  # live batch norm would move its statistics
    torch.testing.assert_close(features(IMAGES), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in features.parameters())


def test_follows_where_it_is_put(features):
    wanted = features(IMAGES)
    half = torch.nn.Sequential(copy.deepcopy(features)).to(torch.bfloat16)
    assert half[0].extractor.dtype == torch.bfloat16
    got = half(IMAGES)
    assert got.dtype == torch.float32 and F.cosine_similarity(got, wanted).min() > 0.99
    torch.testing.assert_close(features(IMAGES), wanted, rtol=0, atol=0)  # the original has not moved


def test_lift_alone(files):
    lift, direct = hub("lift_module", lift_path=files["lift_path"]), load_lift(files["lift_path"])
    feats = torch.randn(2, 192, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lift(IMAGES, feats), direct(IMAGES, feats))
    with pytest.raises(ValueError, match=r"grid is 4x6 but .* 8x12"):
        hub("lift_module", lift_path=files["lift_path"], patch_size=8)(IMAGES, feats)


@pytest.mark.parametrize("variants", [("",), ("", "_residual")])
def test_default_module_is_the_residual_one_if_there(tmp_path, monkeypatch, files, variants):
    """A clone with other modules, named by a relative path."""
    (tmp_path / "clone/pretrained").mkdir(parents=True)
    for name in ("hubconf.py", "extractor.py", "lift.py"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    for variant in variants:
        path = tmp_path / f"clone/pretrained/lift_{NAME}{variant}.pth"
        shutil.copy(files["lift_path"], path)
        origin = {"backbone": resolve(NAME).tag, "layer": 11, "facet": "key", "patch": 16, "residual": bool(variant)}
        path.with_suffix(".json").write_text(json.dumps(origin))
    monkeypatch.chdir(tmp_path)
    flags = {"backbone": NAME, "backbone_path": files["backbone_path"]}
    assert torch.hub.load("clone", "lift", source="local", **flags).lift.residual == ("_residual" in variants)
    assert torch.hub.load("clone", "lift_module", source="local", backbone=NAME).residual == ("_residual" in variants)


def test_out_of_the_box():
    """Without any path: the residual module and the backbone that lie in pretrained/."""
    extractor = ViTExtractor("vit_mini16", device="cpu")
    lift, normalised = load_lift(ROOT / "pretrained/lift_vit_mini16_residual.pth", extractor), (IMAGES - 0.5) / 0.5
    wanted = upsample(lift, normalised, extractor(normalised))
    torch.testing.assert_close(hub("lift")(IMAGES), wanted)
    torch.testing.assert_close(hub("lift_module")(normalised, extractor(normalised)), wanted)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"backbone": "dino_vits16", "lift_path": None}, r"pretrained/ has no LiFT for dino_vits16: train .* pass lift_path"),
        ({"lift_path": "missing.pth"}, r"no LiFT checkpoint at missing.pth"),
        ({"backbone": "no_such_vit"}, r"unknown model no_such_vit: pass one of"),
        ({"layer": 12}, r"layer 12 is out of range"),
    ],
)
def test_what_does_not_exist_is_said_in_one_line(files, change, remedy):
    with pytest.raises((ValueError, OSError), match=remedy) as error:
        hub("lift", **files | change)
    assert "\n" not in str(error.value)


def test_images_off_the_patch_grid(features):
    with pytest.raises(ValueError, match=r"60x96 pixels: resize it to a multiple of the patch"):
        features(IMAGES[:, :, :60])


def test_entry_points_and_dependencies():
    """Only the two entries are listed; `dependencies` is what hubconf and the nouns import beyond Python itself."""
    module = torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    assert [name for name in dir(module) if callable(getattr(module, name)) and name[0] != "_"] == ["lift", "lift_module"]
    assert "[B, 3, H, W] in 0..1" in module.lift.__doc__  # what torch.hub.help prints
    imported = set()
    for name in ("hubconf", "extractor", "lift"):
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == set(module.dependencies)


HOST = """
import json, socket, sys

import extractor, utils  # the host's own, before the hub
import torch

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

clone, kwargs, image, output = sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
features = torch.hub.load(clone, "lift", source="local", **kwargs)
torch.save(features(torch.load(image)), output)

import datasets, lift    # the host's own, after the hub
assert clone not in sys.path and {m.WHOSE for m in (extractor, utils, datasets, lift)} == {"host"}
"""


def test_from_a_host_project_with_files_of_the_same_names(tmp_path, files, by_hand):
    """A real process, offline, in another folder, whose own modules have our names, some imported before and some after."""
    host = tmp_path / "host project"
    host.mkdir()
    for name in ("extractor", "lift", "utils", "datasets"):
        (host / f"{name}.py").write_text("WHOSE = 'host'\n")
    (host / "run.py").write_text(HOST)
    torch.save(IMAGES, host / "images.pth")
    kwargs = json.dumps({key: str(value) for key, value in files.items()})
    command = [sys.executable, "run.py", str(ROOT), kwargs, "images.pth", "dense.pth"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=host, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(host / "dense.pth"), by_hand(IMAGES)[1])
