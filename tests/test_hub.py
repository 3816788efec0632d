"""hubconf.py: the model equals extractor and LiFT put together by hand, and meets any caller's own
files in peace."""

import ast
import copy
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from backbones import resolve
from extractor import ViTExtractor
from lift import LiFT, load_lift, upsample

NAME = "vit_tiny_patch16_224"
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
NOUNS = ("files", "command", "photos", "backbones", "dense", "extractor", "lift", "features")
BACKBONE_OF = {
    "lift_vit_mini16": "vit_mini16",
    "lift_vit_tiny_patch16_224": "vit_tiny_patch16_224",
    "lift_dino_vits16": "dino_vits16",
    "lift_dino_vits8": "dino_vits8",
    "lift_dino_vitb16": "dino_vitb16",
    "lift_dino_vitb8": "dino_vitb8",
    "lift_vit_small_patch16": "vit_small_patch16_224",
    "lift_vit_base_patch16": "vit_base_patch16_224",
    "lift_vit_base_patch8": "vit_base_patch8_224",
}


def hub(entry, **arguments):
    return torch.hub.load(str(ROOT), entry, source="local", **arguments)


def hubconf():
    return torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))


@pytest.fixture(scope="module")
def files(rule_backbone, rule_lift):
    return {"backbone": NAME, "backbone_path": rule_backbone[-1], "lift_path": rule_lift}


@pytest.fixture(scope="module")
def features(files):
    return hub("lift", **files)


@pytest.fixture(scope="module")
def by_hand(files):
    """(images in 0..1, iterations) -> (the backbone's features, LiFT's), without hubconf."""
    path = files["backbone_path"]
    extractor = ViTExtractor(NAME, stride=None, device="cpu", backbone_path=path)
    lift = load_lift(files["lift_path"], extractor)

    @torch.no_grad()
    def run(images, iterations=1):
        normalised = (images - 0.5) / 0.5
        feats = extractor(normalised)
        return feats, upsample(lift, normalised, feats, iterations)

    return run


# ---- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_equals_extractor_and_lift(features, by_hand, iterations):
    dense = features(IMAGES, iterations=iterations)
    assert dense.shape == (2, 192, 4 * 2**iterations, 6 * 2**iterations)
    assert not dense.requires_grad
    torch.testing.assert_close(dense, by_hand(IMAGES, iterations)[1])


def test_options_of_a_call_and_of_the_load(features, files, by_hand):
    options = {"iterations": 2, "out_size": (50, 70), "return_backbone": True}
    feats, dense = by_hand(IMAGES, 2)
    wanted = F.interpolate(dense, size=(50, 70), mode="bilinear", align_corners=False)
    of_the_call = features(IMAGES, **options)
    of_the_load = hub("lift", **files, **options)(IMAGES)
    torch.testing.assert_close(of_the_call, (wanted, feats))
    torch.testing.assert_close(of_the_load, (wanted, feats))

    assert features(IMAGES, out_size=33).shape == (2, 192, 33, 33)
    assert features(IMAGES).shape == (2, 192, 8, 12)  # a call's options hold for that call


def test_layer_and_facet(files):
    pair = {"layer": 4, "facet": "token"}
    _, feats = hub("lift", **files, **pair)(IMAGES, return_backbone=True)
    path = files["backbone_path"]
    extractor = ViTExtractor(NAME, stride=None, device="cpu", backbone_path=path, **pair)
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
    torch.testing.assert_close(features(IMAGES), wanted, rtol=0, atol=0)  # it has not moved


def test_lift_alone(files):
    lift = hub("lift_module", lift_path=files["lift_path"])
    direct = load_lift(files["lift_path"])
    feats = torch.randn(2, 192, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lift(IMAGES, feats), direct(IMAGES, feats))
    for_8 = hub("lift_module", lift_path=files["lift_path"], patch_size=8)
    with pytest.raises(ValueError, match=r"grid is 4x6 but .* 8x12"):
        for_8(IMAGES, feats)


# ---- copies, files, compilers -------------------------------------------------------------------


def changed_copy(features):
    """A deep copy whose last bias is another than the file's."""
    changed = copy.deepcopy(features)
    changed.lift.outc.bias.add_(1)
    return changed


def test_a_deep_copy_has_weights_of_its_own(features):
    before = features(IMAGES)
    changed = changed_copy(features)
    torch.testing.assert_close(features(IMAGES), before, rtol=0, atol=0)
    torch.testing.assert_close(changed(IMAGES), before + 1)


@torch.no_grad()
def test_exports(features):
    exported = torch.export.export(features, (IMAGES,), strict=False).module()
    torch.testing.assert_close(exported(IMAGES), features(IMAGES))


def test_weights_are_saved_as_a_state_dict(features, files, tmp_path):
    """As the docstring says: a pickle of the model itself could not be read by anybody."""
    with pytest.raises((pickle.PicklingError, AttributeError, ImportError)):
        pickle.dumps(features)
    changed = changed_copy(features)
    torch.save(changed.state_dict(), tmp_path / "model.pth")
    again = hub("lift", **files)
    again.load_state_dict(torch.load(tmp_path / "model.pth"))
    torch.testing.assert_close(again(IMAGES), changed(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("variant", [{}, {"attend": 1}])
def test_a_deep_copy_of_lift_alone(tmp_path, variant):
    """Also with the patch that a bare file does not tell."""
    torch.save(LiFT(16, 8, **variant).state_dict(), tmp_path / "bare.pth")
    lift = hub("lift_module", lift_path=tmp_path / "bare.pth", patch_size=8)
    feats = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    before = lift(IMAGES, feats)
    assert not lift.training and not lift.outc.weight.requires_grad

    changed = copy.deepcopy(lift)
    changed.outc.bias.add_(1)
    torch.testing.assert_close(lift(IMAGES, feats), before, rtol=0, atol=0)
    torch.testing.assert_close(changed(IMAGES, feats), before + 1)
    assert changed.state_dict().keys() == LiFT(16, 8, **variant).state_dict().keys()


@pytest.mark.skipif(not shutil.which("g++"), reason="the code generator needs a C++ compiler")
def test_compiles_on_a_cpu(files):
    model = hub("lift", **files, layer=0)  # one block: compiling twelve takes minutes
    images = IMAGES[:1, :, :32, :32]
    torch._dynamo.reset()  # nothing that another test has compiled counts
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)


# ---- its own modules ----------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone without modules, named by a relative path."""
    (tmp_path / "clone/pretrained").mkdir(parents=True)
    for name in ("hubconf", *NOUNS):
        shutil.copy(ROOT / f"{name}.py", tmp_path / "clone")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clone"


def put_module(clone, name, backbone, attend=0):
    """A module in the clone, with its JSON."""
    path = clone / f"pretrained/lift_{name}.pth"
    torch.save(LiFT(192, 16, attend=attend).state_dict(), path)
    facts = {"backbone": resolve(backbone).tag, "layer": 11, "facet": "key", "patch": 16}
    path.with_suffix(".json").write_text(json.dumps(facts))


@pytest.mark.parametrize("best", ["", "_attend"])
def test_default_module_is_the_best_variant(clone, files, best):
    put_module(clone, NAME, NAME)
    if best == "_attend":
        put_module(clone, f"{NAME}_attend", NAME, attend=1)

    path = files["backbone_path"]
    model = torch.hub.load("clone", "lift", source="local", backbone=NAME, backbone_path=path)
    alone = torch.hub.load("clone", "lift_module", source="local", backbone=NAME)
    for lift in (model.lift, alone):
        assert lift.radius == int(best == "_attend")


def test_default_module_under_the_authors_name(clone):
    """Their files of supervised ViTs leave the image size out."""
    put_module(clone, "vit_small_patch16", "vit_small_patch16_224", attend=1)
    name = "vit_small_patch16_224"
    assert torch.hub.load("clone", "lift_module", source="local", backbone=name).radius == 1


def test_out_of_the_box():
    """Without any path: the best module and the backbone that lie in pretrained/."""
    extractor = ViTExtractor("vit_mini16", stride=None, device="cpu")
    paths = [ROOT / f"pretrained/lift_vit_mini16{end}.pth" for end in ("_attend", "")]
    best = next(path for path in paths if path.is_file())
    lift = load_lift(best, extractor)
    normalised = (IMAGES - 0.5) / 0.5
    feats = extractor(normalised)
    wanted = upsample(lift, normalised, feats)
    torch.testing.assert_close(hub("lift")(IMAGES), wanted)
    torch.testing.assert_close(hub("lift_vit_mini16")(IMAGES), wanted)
    alone = hub("lift_module")(normalised, feats)
    torch.testing.assert_close(alone, lift(normalised, feats), rtol=0, atol=0)


@pytest.mark.parametrize("entry", BACKBONE_OF)
def test_an_entry_for_each_backbone(monkeypatch, entry):
    """Each calls `lift` with its backbone, and passes the options on."""
    module = hubconf()
    monkeypatch.setattr(module, "lift", lambda backbone, **options: (backbone, options))
    options = {"iterations": 2, "device": "cpu"}
    assert getattr(module, entry)(**options) == (BACKBONE_OF[entry], options)


def test_the_entry_of_a_backbone_gives_what_lift_gives(files, features):
    paths = {key: files[key] for key in ("backbone_path", "lift_path")}
    model = hub("lift_vit_tiny_patch16_224", **paths, return_backbone=True)
    wanted = features(IMAGES, return_backbone=True)
    torch.testing.assert_close(model(IMAGES), wanted, rtol=0, atol=0)


# ---- what is wrong is said ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (
            {"backbone": "dino_vits16", "lift_path": None},
            r"pretrained/ has no LiFT for dino_vits16: train .* pass lift_path",
        ),
        ({"lift_path": "missing.pth"}, r"no LiFT checkpoint at missing.pth: correct lift_path"),
        ({"backbone": "no_such_vit"}, r"unknown model no_such_vit: pass "),
        ({"layer": 12}, r"layer 12 is out of range"),
        ({"dtype": "int8"}, r"unknown dtype int8: pass one of float32, bfloat16, float16"),
    ],
)
def test_what_does_not_exist_is_said_in_one_line(files, change, remedy):
    with pytest.raises((ValueError, OSError), match=remedy) as error:
        hub("lift", **{**files, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"lift_path": "missing.pth"}, {"backbone_path": "missing.pth"}])
def test_errors_name_arguments_and_not_flags(files, change):
    with pytest.raises(OSError) as error:
        hub("lift", **{**files, **change})
    assert "missing.pth" in str(error.value) and "--" not in str(error.value)
    assert next(iter(change)) in str(error.value)


def test_errors_of_a_call_name_no_flags_either(files):
    model = hub("lift", **files, layer=0, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"not finite in bfloat16: pass dtype float32"):
        model(torch.full((1, 3, 32, 32), float("nan")))


def test_a_photo_is_read_and_fitted(features, by_hand, tmp_path):
    """A path, a PIL image or an array; 100 x 70 pixels are rounded to whole patches, 96 x 64."""
    pixels = np.random.RandomState(0).randint(0, 256, (70, 100, 3)).astype(np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(tmp_path / "photo.png")
    fitted = np.asarray(photo.resize((96, 64), Image.Resampling.LANCZOS))
    images = torch.from_numpy(fitted / np.float32(255)).permute(2, 0, 1)[None]
    wanted = by_hand(images)[1]
    for form in (tmp_path / "photo.png", str(tmp_path / "photo.png"), photo, pixels):
        torch.testing.assert_close(features(form), wanted)
    small = features.preprocess(photo, load_size=32)
    assert small.shape == (1, 3, 32, 48) and small.min() >= 0 and small.max() <= 1
    with pytest.raises(OSError, match=r"missing\.jpg"):
        features("missing.jpg")


def test_images_off_the_patch_grid(features):
    message = r"60x96 .*: resize the image to a multiple of the patch"
    with pytest.raises(ValueError, match=message):
        features(IMAGES[:, :, :60])


def test_a_negative_number_of_iterations_of_a_call(features):
    with pytest.raises(ValueError, match=r"-1 iterations: pass 0 or more"):
        features(IMAGES, iterations=-1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES - 0.5) / 0.5, r"look normalised already: pass them in 0..1, without normalis"),
        (IMAGES * 255, r"images in 0.* pass images / 255"),
        ((IMAGES * 255).to(torch.uint8), r"images in 0..25[45]: pass images / 255"),
    ],
    ids=["normalised", "0..255", "uint8"],
)
def test_images_that_are_not_in_0_to_1(features, images, message):
    with pytest.raises(ValueError, match=message):
        features(images)


def test_the_ends_of_the_range_and_rounding_are_taken(features):
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32) + 1e-6])
    assert features(images).isfinite().all()
    assert features(images.half()).isfinite().all()


# ---- in somebody else's program -----------------------------------------------------------------


def test_entry_points_and_dependencies():
    """Only the entries are listed; `dependencies` is what hubconf and the nouns import beyond
    Python itself, but for what only some photos need."""
    module = hubconf()
    public = [name for name in dir(module) if not name.startswith("_")]
    entries = [name for name in public if callable(getattr(module, name))]
    assert sorted(entries) == sorted(["lift", "lift_module", *BACKBONE_OF])
    assert "[B, 3, H, W] in 0..1" in module.lift.__doc__  # what torch.hub.help prints
    assert all(inspect.getdoc(getattr(module, entry)) for entry in entries)

    imported = set()
    for name in ("hubconf", *NOUNS):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    packages = {name.split(".")[0] for name in imported}
    only_for_some_photos = {"cv2", "pillow_heif"}
    needed = packages - sys.stdlib_module_names - set(NOUNS) - only_for_some_photos
    assert needed == set(module.dependencies)


HOST = """
import json, socket, sys

import command, extractor, utils  # the host's own, before the hub
import torch

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

clone, arguments, image, output = sys.argv[1:]
kwargs = json.loads(arguments)
path = list(sys.path)
features = torch.hub.load(clone, "lift", source="local", **kwargs)
torch.save(features(torch.load(image)), output)
assert sys.path == path
assert sys.modules["command"] is command and sys.modules["extractor"] is extractor

import datasets, lift, photos    # the host's own, after the hub
own = (command, photos, extractor, lift, utils, datasets)
assert clone not in sys.path and {m.WHOSE for m in own} == {"host"}
"""

RAISING_HOST = """
import json, os, sys

import torch

clone, arguments, image, output = sys.argv[1:]
kwargs = json.loads(arguments)
path = list(sys.path)
features = torch.hub.load(clone, "lift", source="local", **kwargs)
torch.save(features(torch.load(image)), output)
assert sys.path == path

try:
    torch.hub.load(clone, "lift", source="local", backbone="no_such_vit")
except (ValueError, OSError):
    pass
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    # ours lie in the clone's own folder; below it may be the virtual environment that this runs in
    assert os.path.dirname(file) != clone, (name, file)
    assert name not in NAMES, name
"""


@pytest.mark.parametrize(
    ("script", "content"),
    [(HOST, "WHOSE = 'host'\n"), (RAISING_HOST, "raise RuntimeError('the host was imported')\n")],
    ids=["importable", "raising"],
)
def test_from_a_host_project_with_files_of_the_same_names(
    tmp_path, files, by_hand, script, content
):
    """A real process, offline, in another folder, whose own modules have our names: some imported
    before and some after, or all such that they cannot be imported."""
    host = tmp_path / "host project"
    host.mkdir()
    for name in (*NOUNS, "utils", "datasets"):
        (host / f"{name}.py").write_text(content)
    (host / "run.py").write_text(f"NAMES = {NOUNS}\n{script}")
    torch.save(IMAGES, host / "images.pth")
    arguments = json.dumps({key: str(value) for key, value in files.items()})
    command = [sys.executable, "run.py", str(ROOT), arguments, "images.pth", "dense.pth"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=host, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(host / "dense.pth"), by_hand(IMAGES)[1])


def test_a_file_that_fails_leaves_the_hosts_modules(clone, monkeypatch):
    """Also where one of our files raises halfway, the names mean the host's modules again."""
    (clone / "extractor.py").write_text("raise RuntimeError('halfway')\n")
    before = {name: sys.modules.get(name) for name in NOUNS}
    with pytest.raises(RuntimeError, match="halfway"):
        torch.hub.load("clone", "lift", source="local")
    assert {name: sys.modules.get(name) for name in NOUNS} == before
