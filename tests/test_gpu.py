"""Numbers on a GPU against the CPU's: run with `-m gpu` on a machine that has one.

Bounds: a descriptor differs by at most 1e-4 of the largest value in float32 (TF32 is off); figures
of an evaluation, in percent, by at most half a point, since single ties may fall the other way.
"""

import json

import pytest
import torch
from conftest import rule_image, rule_state, rule_vit

from extractor import ViTExtractor
from lift import LiFT, upsample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def features(device, dtype="float32"):
    """Lifted features of rule images by rule weights, on the CPU."""
    vit = ViTExtractor(
        "dino_vits16", 16, rule_vit("vit_small_patch16_224.dino"), device, dtype=dtype
    )
    lift = LiFT(vit.width, vit.patch).eval()
    lift.load_state_dict(rule_state(lift))
    lift.to(vit.device, vit.dtype)
    images = torch.cat([rule_image(224, 288, seed) for seed in (0, 1)])
    with torch.no_grad():
        return upsample(lift, images, vit(images), 2).cpu()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_features(dtype, tolerance):
    wanted = features("cpu")
    found = features("cuda", dtype)
    difference = float((found - wanted).abs().max())
    assert difference < tolerance * float(wanted.abs().max())


def last_line(ran):
    """The results in the JSON that a script prints last."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out.strip().splitlines()[-1])["results"]


def numbers(results):
    """All numbers of nested results, by their place."""
    if isinstance(results, (int, float)):
        return {"": float(results)}
    found = {}
    if isinstance(results, dict):
        for name, inner in results.items():
            for place, value in numbers(inner).items():
                found[f"{name} {place}"] = value
    return found


EVALUATIONS = {
    "eval_spair": ["--dataroot", "SPair-71k", "--pairs_per_category", 0],
    "eval_davis": ["--dataroot", "DAVIS", "--sequences", "libby"],
    "eval_tokencut": ["--dataroot", "voc", "--dataset", "VOC12", "--set", "trainval"],
}


@pytest.mark.parametrize("script", EVALUATIONS)
def test_evaluations(cli, tmp_path, shared, vit_tiny, golden_lift, script):
    args = list(EVALUATIONS[script])
    args[1] = shared / "data" / args[1]
    args += [*vit_tiny, "--lift_path", golden_lift]
    results = {}
    for device in ("cpu", "cuda"):
        where = []
        if script != "eval_spair":
            where = ["--output_dir", tmp_path / device]
        results[device] = numbers(last_line(cli(script, *args, *where, "--device", device)))
    assert results["cpu"].keys() == results["cuda"].keys()
    for place, value in results["cpu"].items():
        assert results["cuda"][place] == pytest.approx(value, abs=0.5), place
