"""Fixtures: the golden rule weights, the shared data, and command lines run in this process."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

# One thread, here and in the processes that tests start: on small problems threads mostly wait for
# each other. numpy and torch read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads anything; timm reads it when imported

import pytest
import timm
import torch
from case import rule_image, rule_state  # noqa: F401  # tests take both from here
from safetensors.torch import save_file

from extractor import ViTExtractor
from lift import LiFT

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # whatever OMP_NUM_THREADS the user has set


def rule_vit(tag):
    """timm's ViT `tag` without head, with rule weights."""
    model = timm.create_model(tag, num_classes=0)
    model.load_state_dict(rule_state(model))
    return model


@pytest.fixture(scope="session")
def shared():
    folder = Path(os.environ.get("LIFT_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no shared material at {folder} (set LIFT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden_lift(shared):
    return shared / "golden" / "lift_vit_tiny_patch16_224.pth"


@pytest.fixture(scope="session")
def vit_tiny(shared):
    """Flags of the real vit_tiny_patch16_224."""
    path = shared / "weights/vit_tiny_patch16_224.safetensors"
    return ["--model_type", "vit_tiny_patch16_224", "--backbone_path", str(path)]


@pytest.fixture(scope="session")
def rule_weights(tmp_path_factory):
    """The weight file of a vit_tiny_patch16_224 with rule weights."""
    path = tmp_path_factory.mktemp("backbone") / "rule.safetensors"
    save_file(rule_vit("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def rule_backbone(rule_weights):
    """Flags of a vit_tiny_patch16_224 with rule weights."""
    return ["--model_type", "vit_tiny_patch16_224", "--backbone_path", str(rule_weights)]


@pytest.fixture
def rule_extractor(rule_weights):
    """rule_extractor(layer=..., facet=..., stride=...) -> the same ViT as an extractor on the CPU.

    The stride is the patch, where it is left out.
    """

    def build(stride=None, **options):
        return ViTExtractor(
            "vit_tiny_patch16_224", stride, backbone_path=rule_weights, device="cpu", **options
        )

    return build


@pytest.fixture(scope="session")
def rule_lift(tmp_path_factory):
    """A bare LiFT checkpoint of width 192 with rule weights."""
    path = tmp_path_factory.mktemp("lift") / "rule_lift.pth"
    torch.save(rule_state(LiFT(192, 16)), path)
    return path


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    json: Path

    def report(self):
        """What the script wrote for --json."""
        return json.loads(self.json.read_text())


@pytest.fixture
def import_path(tmp_path, monkeypatch):
    """tmp_path as the working directory; modules imported from there are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    modules_before = set(sys.modules)
    yield tmp_path
    sys.path[:] = path_before
    for name in set(sys.modules) - modules_before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def cli(capfd, tmp_path_factory):
    """cli("eval_spair", "--flag", value...) runs a script's command line in this process: Ran.

    Where the caller gives no --json, the results go to a file of their own, for Ran.report().
    """

    def run(script, *args):
        module = importlib.import_module(script)
        flags = [str(value) for value in args]
        file = tmp_path_factory.mktemp("json") / "results.json"
        if "--json" not in flags:
            flags += ["--json", str(file)]
        code = 0
        capfd.readouterr()
        try:
            module.parser().run(module.main, flags)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Ran(code, out, err, file)

    return run
