"""Numbers on a GPU against the CPU's: run with `-m gpu` on a machine that has one.

In float32, with TF32 off as in the scripts, a descriptor differs by at most 1e-4 of the largest
value. In an evaluation single ties may fall the other way: each test says how many.
"""

import json
import pickle

import pytest
import torch
from conftest import ROOT, rule_image, rule_state, rule_vit
from torchvision.transforms.functional import to_pil_image

from extractor import ViTExtractor, use_full_float32
from lift import LiFT, upsample

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("full_float32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture
def full_float32():
    """As the scripts do; torch's own setting is TF32 in convolutions."""
    use_full_float32()


# ---- features -----------------------------------------------------------------------------------


def features(device, dtype="float32", **variant):
    """Lifted features of rule images by rule weights, on the CPU."""
    vit = ViTExtractor(
        "dino_vits16", 16, rule_vit("vit_small_patch16_224.dino"), device, dtype=dtype
    )
    lift = LiFT(vit.channels, vit.patch, **variant).eval()
    state = rule_state(lift)
    if "options" in state:
        state["options"] = lift.options
    lift.load_state_dict(state)
    lift.to(vit.device, vit.dtype)
    images = torch.cat([rule_image(224, 288, seed) for seed in (0, 1)])
    with torch.no_grad():
        return upsample(lift, images, vit(images), 2).cpu()


@pytest.mark.parametrize("variant", [{}, {"attend": 1}])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_features(dtype, tolerance, variant):
    wanted = features("cpu", **variant)
    found = features(GPU, dtype, **variant)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    assert difference < tolerance, f"{difference:.1e} of the largest value"


def test_hub_and_its_pickle(rule_weights, rule_lift):
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    files = {"backbone_path": rule_weights, "lift_path": rule_lift}
    models = {}
    for device in ("cpu", GPU):
        models[device] = torch.hub.load(
            str(ROOT), "lift_vit_tiny_patch16_224", source="local", device=device, **files
        )
    wanted = models["cpu"](images)
    found = models[GPU](images)
    assert found.device.type == GPU
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))

    again = pickle.loads(pickle.dumps(models[GPU]))
    assert {weight.device.type for weight in again.state_dict().values()} == {GPU}
    torch.testing.assert_close(again(images), found, rtol=0, atol=0)


# ---- training -----------------------------------------------------------------------------------


def test_training_and_resuming(cli, tmp_path, rule_backbone):
    """Three steps, and three more after --resume: the losses are the CPU's."""
    (tmp_path / "photos").mkdir()
    for seed in range(6):
        photo = to_pil_image((0.5 + 0.25 * rule_image(64, 64, seed)[0]).clamp(0, 1))
        photo.save(tmp_path / f"photos/{seed}.png")
    flags = ["--dataroot", tmp_path / "photos", "--imsize", 64, "--batch_size", 2, "--workers", 0]
    flags += ["--val_fraction", 0, "--attend", 1, *rule_backbone]

    losses = {"cpu": [], GPU: []}
    for device, found in losses.items():
        folder = tmp_path / device
        where = ["--output_dir", folder, "--device", device]
        for more in (["--epochs", 1], ["--epochs", 2, "--resume"]):
            ran = cli("train_lift", *flags, *where, *more)
            assert ran.code == 0, ran.err
        (metrics,) = folder.glob("*/metrics.jsonl")
        for line in metrics.read_text().splitlines():
            found.append(json.loads(line)["loss"])
    assert len(losses["cpu"]) == 2
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-3)


# ---- evaluations --------------------------------------------------------------------------------


@pytest.fixture
def on_both(cli, vit_tiny, golden_lift):
    """on_both(script, flags, folder) -> what the script reports on the CPU, and on the GPU.

    With a folder the results go to its subfolders `cpu` and `gpu`.
    """

    def run(script, flags, folder=None):
        reports = []
        for name, device in (("cpu", "cpu"), ("gpu", GPU)):
            where = ["--device", device]
            if folder:
                where += ["--output_dir", folder / name]
            ran = cli(script, *flags, *vit_tiny, "--lift_path", golden_lift, *where)
            assert ran.code == 0, ran.err
            reports.append(ran.report())
        return reports

    return run


def test_spair(on_both, shared):
    """In each category one keypoint may go elsewhere."""
    root = shared / "data/SPair-71k"
    cpu, gpu = on_both("eval_spair", ["--dataroot", root, "--pairs_per_category", 0])
    assert gpu["results"].keys() == cpu["results"].keys()
    for category, wanted in cpu["results"].items():
        if category == "mean":
            continue
        found = gpu["results"][category]
        assert (found["pairs"], found["keypoints"]) == (wanted["pairs"], wanted["keypoints"])
        one_keypoint = 100 / wanted["keypoints"] + 1e-6
        for name in ("pck@0.1", "pck@0.05", "pck@0.01"):
            assert found[name] == pytest.approx(wanted[name], abs=one_keypoint), (category, name)


def test_davis(on_both, shared, tmp_path):
    """J and F are 0..1 and may differ by half a hundredth, a recall by one frame."""
    flags = ["--dataroot", shared / "data/DAVIS", "--sequences", "libby"]
    cpu, gpu = on_both("eval_davis", flags, tmp_path)
    wanted, found = cpu["results"], gpu["results"]
    assert found.keys() == wanted.keys()
    one_frame = 1 / (cpu["frames"] - 2) + 1e-6  # the first and the last frame are not scored
    for name in ("J&F-Mean", "J-Mean", "J-Decay", "F-Mean", "F-Decay"):
        assert found[name] == pytest.approx(wanted[name], abs=0.005), name
    for name in ("J-Recall", "F-Recall"):
        assert found[name] == pytest.approx(wanted[name], abs=one_frame), name
    scores = wanted["per_object"]["libby_1"]
    assert found["per_object"]["libby_1"] == pytest.approx(scores, abs=0.005)


def test_tokencut(on_both, shared, tmp_path):
    """At least 95 % of the boxes are equal."""
    flags = ["--dataroot", shared / "data/voc", "--dataset", "VOC12", "--set", "trainval"]
    on_both("eval_tokencut", flags, tmp_path)
    boxes = {}
    for name in ("cpu", "gpu"):
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines[1:]]  # the first line tells the settings
        boxes[name] = {entry["name"]: entry["box"] for entry in entries}

    assert boxes["gpu"].keys() == boxes["cpu"].keys()
    equal = [boxes["gpu"][photo] == box for photo, box in boxes["cpu"].items()]
    assert sum(equal) >= 0.95 * len(equal), f"{sum(equal)} of {len(equal)}"
