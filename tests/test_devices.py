"""No computation mixes devices, and training waits for none: on pretend CUDA tensors.

FakeTensorMode needs no GPU. It refuses what CUDA refuses, tensors of two devices in one operation,
and what makes the host wait for a GPU: reading values, and shapes that depend on values. Where a
script may wait (it reads a result at the end of a frame or a photo), the fixture `values` lets it.
"""

import ast
import pickle

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.transforms.functional import to_pil_image

import eval_davis
import eval_segmentation
import eval_spair
import eval_tokencut
import eval_visualize_feats
from command import FACETS
from extractor import ViTExtractor
from features import Bilinear, Features, Lifted
from hubconf import _Model
from lift import LiFT, upsample
from objectives import Objective, Photos, train_step
from train_lift import LOSSES

SHAPE = (2, 3, 64, 96)


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)  # what is read from files is on the CPU


@pytest.fixture
def values(monkeypatch):
    """Let conditions be true, and CPU tensors become arrays: for code that may wait."""

    def numpy(tensor):
        if tensor.device.type != "cpu":
            raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
        dtype = str(tensor.dtype).removeprefix("torch.")
        return np.ones(tuple(tensor.shape), dtype)

    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(FakeTensor, "numpy", numpy)


def on_gpu(module, mode):
    """A module on the CPU, as one on a pretend GPU."""

    def move(tensor):
        fake = mode.from_tensor(tensor)
        with mode:
            return fake.to("cuda")

    return module._apply(move)


@pytest.fixture
def vit(mode):
    model = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    return on_gpu(ViTExtractor("vit_small_patch16_224", None, model, "cpu"), mode)


@pytest.fixture
def features(vit, mode):
    """A backbone with a frozen, folded LiFT applied twice, on the pretend GPU."""
    lift = LiFT(384, attend=1, heads=3).requires_grad_(False).eval()
    lift.fold()
    return Features(vit, Lifted(on_gpu(lift, mode), vit, 2))


def is_cuda(tensors):
    return {tensor.device.type for tensor in tensors} == {"cuda"}


# ---- nouns --------------------------------------------------------------------------------------


def test_extractor(vit, mode):
    """With positions off the native grid, all facets at once."""
    with mode:
        images = vit.normalize(torch.zeros(SHAPE))
        assert is_cuda(vit(images, facet=list(FACETS)))
        assert is_cuda([vit.extract_descriptors(images, bin=True)])
        assert is_cuda([vit.extract_saliency_maps(images)])
        assert is_cuda([vit.normalize(torch.zeros(SHAPE, device="cuda"))])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("variant", [{}, {"attend": 1}, {"attend": 2, "heads": 3}])
def test_lift(variant, folded, mode):
    lift = LiFT(48, **variant).eval().requires_grad_(False)
    if folded:
        lift.fold()
    lift = on_gpu(lift, mode)
    with mode:
        feats = torch.zeros(2, 48, 4, 6, device="cuda")
        assert is_cuda(upsample(lift, torch.zeros(SHAPE), feats, 2, return_all=True))


def test_the_one_path(features, mode, values):
    """It reads one value: whether the features are finite."""
    with mode:
        maps = features(torch.zeros(SHAPE), return_all=True)
        assert is_cuda(maps)
        assert maps[-1].shape == (2, 384, 16, 24)
        bilinear = Features(features.backbone, Bilinear(1))
        assert is_cuda([bilinear(torch.zeros(SHAPE))])

        def own(images, feats):
            assert is_cuda([images, feats])
            return feats

        Features(features.backbone, own)(torch.zeros(SHAPE))


def test_hub(features, mode, values, monkeypatch):
    monkeypatch.setattr("hubconf._check_values", lambda images: None)  # it looks at all values
    options = {"iterations": 2, "out_size": (64, 96), "return_backbone": True}
    with mode:
        dense, coarse = _Model(features, options)(torch.zeros(SHAPE))
        assert is_cuda([dense, coarse])
        assert dense.shape == (2, 384, 64, 96)


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture
def gpu_autocast(monkeypatch):
    """Let torch believe that the pretend GPU knows bfloat16."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)


class Backbone(nn.Module):
    """Features of the right shape on one device."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def normalize(self, images):
        return (images - 0.5) / 0.5

    def forward(self, images):
        return images.new_zeros(len(images), 48, images.shape[2] // 16, images.shape[3] // 16)


def pretend_step(device, loss, match, mode, precision=None):
    """One step of training on pretend tensors of a device; its loss."""

    def pretend(module):
        if device == "cuda":
            return on_gpu(module, mode)
        return module._apply(mode.from_tensor)

    grid = None
    pairs = ()
    if match:
        grid = (8, 8)
        pairs = (2,)
    lift = LiFT(48, pre_shape=False, post_shape=False, attend=1, heads=3)
    model = pretend(Objective(lift, loss, torch.zeros(48, 1, 1), grid))
    if match:  # an index on the CPU would be taken, and copied at every step
        assert model.matching.cells.device.type == device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, foreach=True)

    def context():
        return torch.autocast(device, precision, enabled=precision is not None)

    batch = {"broken": torch.tensor([-1, -1])}
    with mode:
        for level, side in (("full", 128), ("half", 64), ("quarter", 32)):
            batch[level] = torch.zeros(2, *pairs, 3, side, side, dtype=torch.uint8)
        if match:
            batch["warp"] = torch.zeros(2, 2, 3)
        found, broken = train_step(model, batch, Backbone(device), optimizer, context, match)
    assert broken == []
    return found


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("match", [0.0, 0.15])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_of_training_stays_on_the_gpu(
    loss, match, precision, mode, gpu_autocast, monkeypatch
):
    """And waits for nothing on its way to the loss: a value that is read would raise."""
    # autograd asks a real driver for the device: the way back is the next test's
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    assert pretend_step("cuda", loss, match, mode, precision).device.type == "cuda"


@pytest.mark.parametrize("match", [0.0, 0.15])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_of_training_reads_no_value(loss, match, mode):
    """Forward, backward and the optimizer's step: what would be a wait on a GPU raises here."""
    pretend_step("cpu", loss, match, mode)


def test_a_step_that_waits_is_found(mode):
    """What the test above would say of `losses[inside].mean()`, which was once there."""
    with mode:
        losses = torch.zeros(2, 5, device="cuda")
        with pytest.raises(Exception, match=r"aten\.nonzero"):
            losses[losses > 0].mean()


def test_what_goes_to_a_loaders_workers_holds_no_tensor_of_a_gpu(tmp_path):
    """A CUDA tensor in a data set would start CUDA in every worker."""
    photos = Photos([tmp_path / "a.jpg"], 64, augment=True, warp=True)
    assert b"torch" not in pickle.dumps(photos.__dict__.get("paths"))
    for name, value in vars(photos).items():
        assert not isinstance(value, torch.Tensor), name


# ---- evaluations --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(14, 14), (40, 44)])
def test_propagation_waits_for_nothing(grid, mode):
    height, width = grid
    with mode:
        cells = torch.zeros(height, width, 48, device="cuda")
        soft = torch.zeros(height, width, 3, device="cuda")
        carried = eval_davis.transfer(cells, [(cells, soft), (cells, soft)], 12, 5)
        assert is_cuda([carried])
        assert carried.shape == (height, width, 3)


def test_masks_are_hardened_on_the_gpu(mode, values):
    with mode:
        hard = eval_davis.harden(torch.zeros(3, 14, 14, device="cuda"), 16, (80, 60))
    assert hard.shape == (60, 80)


@pytest.mark.parametrize("cosine", [True, False])
def test_matching(cosine, mode):
    with mode:
        feats = torch.zeros(48, 4, 4, device="cuda")
        norm = None
        if cosine:
            norm = eval_spair.pixel_norms(feats, 64)
        image = eval_spair.Described(feats, norm, (64, 64), 1.0, torch.zeros(2))
        found = eval_spair.best_pixels(image, image, torch.ones(5, 2), 64)
        assert (found.device.type, found.shape) == ("cpu", (5, 2))  # as the annotations


def test_object_discovery(vit, mode, values):
    with mode:
        feats = vit(torch.zeros(SHAPE))[0]
        assert eval_tokencut.affinity(feats, 0.2).shape == (24, 24)
        attention = eval_tokencut.cls_attention(vit, torch.zeros(SHAPE))
        assert eval_tokencut.dinoseg(attention[0], 4).mask.shape == (4, 6)
        assert eval_tokencut.corners_stand_apart(torch.zeros(48, 4, 6, device="cuda"))


def test_the_probe(mode):
    """Its training step waits for nothing; labels may be smaller or larger than the map."""
    probe = on_gpu(nn.Conv2d(48, 11, 1), mode)
    with mode:
        feats = torch.zeros(2, 48, 11, 15, dtype=torch.float16, device="cuda")
        labels = torch.zeros(2, 176, 240, dtype=torch.uint8, device="cuda")
        logits = eval_segmentation.logits_of(probe, feats, labels.shape[1:])
        loss = eval_segmentation.pixel_loss(logits, labels)
        assert is_cuda([logits, loss])


def test_sheets(features, mode, values):
    photo = to_pil_image(torch.zeros(3, 64, 96))
    with mode:
        maps = eval_visualize_feats.compute_maps(features, photo, (96, 64))
        assert is_cuda(maps.values())
        similarity = eval_visualize_feats.self_similarity(maps["LiFT"], [(1, 2)])
        eval_visualize_feats.colour(similarity[0])


# ---- files --------------------------------------------------------------------------------------


def test_every_file_of_tensors_is_read_onto_the_cpu():
    """A checkpoint of a GPU would else be refused on a machine without one."""
    calls = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("pretrained/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "load" and getattr(node.func.value, "id", "") == "torch":
                calls += 1
                given = {keyword.arg for keyword in node.keywords}
                assert "map_location" in given, f"{path.name}:{node.lineno}"
                assert "weights_only" in given, f"{path.name}:{node.lineno}"
    assert calls > 0


def test_no_script_calls_cuda_by_name():
    """`.cuda()` would fail elsewhere; everything follows the backbone's device."""
    for path in ROOT.glob("*.py"):
        assert ".cuda()" not in path.read_text(), path.name
