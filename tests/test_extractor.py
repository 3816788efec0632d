"""extractor.py against the golden descriptors, the slow version, timm itself, and weight files."""

import copy
import json
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, rule_image, rule_state, rule_vit
from PIL import Image
from plain_extract import plain_features, plain_log_bin, plain_map
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torchvision import transforms

import extractor as extractor_module
from backbones import (
    BACKBONES,
    resolve,
)
from command import FACETS, Command, add_backbone_args
from dense import Device
from extractor import (
    ViTExtractor,
    attention,
    build_extractor,
    check_facts,
    interpolate_positions,
    join_heads,
    log_bin,
    project,
)
from lift import LiFT, map_to_tokens, upsample

SMALL = "test_vit.r160_in1k"  # 6 blocks of 64 channels and 2 heads, patch 16


@pytest.fixture(scope="module")
def small():
    return rule_vit(SMALL)


def extractor(model, stride=None, **kwargs):
    return ViTExtractor(SMALL, stride, model, "cpu", **kwargs)


def assert_near(found, wanted, share=1e-5):
    """Equal within a share of the largest value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


# ---- numbers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_vits():
    return {name: rule_vit(resolve(name).tag) for name in ("dino_vits16", "dino_vits8")}


def golden_descriptors(vit, images, facts):
    """What a golden case asks for, [1, t, C]."""
    what = facts.get("what")
    if what == "saliency":
        return vit.extract_saliency_maps(images)[..., None]
    if what == "bin":
        return vit.extract_descriptors(images, bin=True)[0]
    if what == "cls":
        return vit.extract_descriptors(images, include_cls=True)[0]
    if facts.get("lift"):
        lift = LiFT(vit.channels, vit.patch).eval()
        lift.load_state_dict(rule_state(lift))
        with torch.no_grad():
            return map_to_tokens(upsample(lift, images, vit(images), facts.get("iters", 1)))
    return vit.extract_descriptors(images)[0]


@pytest.mark.parametrize("case", range(18))
def test_golden(shared, golden_vits, case):
    facts = json.loads((shared / "golden/descriptors.json").read_text())[case]
    values = np.load(shared / "golden/descriptors.npz")
    name = facts["model_type"]
    vit = ViTExtractor(
        name,
        facts.get("stride"),
        golden_vits[name],
        "cpu",
        layer=facts["layer"],
        facet=facts["facet"],
    )
    found = golden_descriptors(vit, rule_image(*facts["size"], 0), facts)

    tolerance = 1e-4 * facts["absmax"]
    wanted = values[f"{case:02d}_values"]
    some = found[0].numpy()[values[f"{case:02d}_tokens"]].reshape(wanted.shape)
    assert list(found.shape) == facts["shape"]
    assert np.abs(some - wanted).max() < tolerance
    assert float(found.mean()) == pytest.approx(facts["mean"], abs=tolerance)


SLOW_FACETS = [facet for facet in FACETS if facet != "token_norm"]  # that one: as timm gives it
SIZES = [((160, 160), 16), ((96, 160), 16), ((64, 48), 8), ((48, 48), 4)]


@pytest.mark.parametrize("facet", SLOW_FACETS)
@pytest.mark.parametrize("size, stride", SIZES)
def test_equals_the_whole_forward(small, facet, size, stride, monkeypatch):
    # the slow version reads positions as DINO's code does, which is for rows of BACKBONES
    monkeypatch.setitem(BACKBONES, SMALL, resolve(SMALL)._replace(positions="dino"))
    images = torch.cat([rule_image(*size, seed) for seed in (1, 2)])
    for layer in (0, 5):
        vit = extractor(small, layer=layer, facet=facet, stride=stride)
        slow = plain_map(small, images, layer, facet, stride)
        assert_near(vit(images), slow)
        assert vit.channels == (None if facet == "attn" else slow.shape[1])
        tokens = vit.extract_descriptors(images, include_cls=True)[:, 0]
        slow_tokens = plain_features(small, images, layer, facet, stride)  # CLS first
        assert_near(tokens, join_heads(slow_tokens))


def test_channels_are_head_dim_major(small):
    qkv = small.blocks[5].attn.qkv
    keep = qkv.weight.data.clone()
    try:
        # key, head 1 of 2, head_dim 3 of 32: descriptor channel 3 * 2 + 1
        qkv.weight.data[64 + 32 + 3] = 0
        feats = extractor(small)(rule_image(64, 64, 0))
        assert torch.equal(feats[0, 7], torch.full((4, 4), float(qkv.bias[64 + 32 + 3])))
        assert feats[0, 6].std() > 0
    finally:
        qkv.weight.data = keep


def test_stops_where_the_descriptor_is_complete(small):
    calls = []
    hooks = []
    for name, module in small.named_modules():

        def note(module, args, output, name=name):
            calls.append(name)

        hooks.append(module.register_forward_hook(note))
    try:
        extractor(small, layer=2)(rule_image(64, 64, 0))
    finally:
        for hook in hooks:
            hook.remove()
    assert calls[-1] == "blocks.2.norm1"
    assert "blocks.1" in calls
    unwanted = ("blocks.2.attn", "blocks.2.mlp", "blocks.3", "norm.")
    assert not any(call.startswith(unwanted) for call in calls)
    assert not any(module._forward_hooks for module in small.modules())


def test_several_layers_and_facets_in_one_pass(small):
    vit = extractor(small)
    images = rule_image(64, 96, 0)
    maps = vit(images, layer=[1, 4], facet="token")
    for layer, found in zip([1, 4], maps):
        assert torch.equal(found, vit(images, layer=layer, facet="token"))
    facets = ["key", "token_norm", "token"]
    for facet, found in zip(facets, vit.extract_descriptors(images, 3, facets)):
        assert torch.equal(found, vit.extract_descriptors(images, 3, facet))
    pairs = vit(images, layer=[5, 0], facet=["key", "value"])
    assert torch.equal(pairs[1], vit(images, layer=0, facet="value"))
    with pytest.raises(ValueError, match="longer than"):
        vit(images, layer=[1, 2], facet=facets)


def test_batch_equals_single(small):
    images = torch.cat([rule_image(64, 96, seed) for seed in range(3)])
    alone = torch.cat([extractor(small)(image[None]) for image in images])
    torch.testing.assert_close(extractor(small)(images), alone, rtol=0, atol=1e-5)


def test_built_in_eval_mode_and_frozen():
    vit = extractor(timm.create_model(SMALL, num_classes=0).train())
    assert not any(module.training for module in vit.modules())
    assert not any(p.requires_grad for p in vit.parameters())


def test_gradients_reach_the_images_if_asked(small):
    images = rule_image(32, 32, 0).requires_grad_()
    assert not extractor(small)(images).requires_grad
    extractor(small, requires_grad=True)(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in small.parameters())


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (7, 3), (12, 12)])
def test_log_bin_equals_loops(grid):
    feats = torch.randn(2, 5, *grid, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_bin(feats), plain_log_bin(feats))


def test_saliency():
    vit = ViTExtractor("dino_vits16", 16, rule_vit("vit_small_patch16_224.dino"), "cpu")
    images = torch.cat([rule_image(64, 96, seed) for seed in (0, 1)])
    found = vit.extract_saliency_maps(images)
    slow = plain_features(vit.model, images, 11, "attn", 16)
    slow = slow[:, [0, 2, 4, 5], 0, 1:].mean(1)  # [B, t]
    for one, raw in zip(found, slow):
        wanted = (raw - raw.min()) / (raw.max() - raw.min())
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="6 heads"):
        extractor(rule_vit(SMALL)).extract_saliency_maps(images)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_near(small, dtype, tolerance):
    images = rule_image(64, 64, 0)
    exact = extractor(small)(images)
    half = extractor(rule_vit(SMALL), dtype=dtype)(images)
    assert half.dtype == torch.float32
    assert 0 < float((half - exact).abs().max()) < tolerance * float(exact.abs().max())


def test_copies_and_compiles(small):
    images = rule_image(64, 64, 0)
    vit = extractor(small)
    wanted = vit(images)
    assert torch.equal(copy.deepcopy(vit)(images), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(vit))(images), wanted)
    assert_near(torch.compile(vit)(images), wanted, 1e-4)


# ---- the contract of dino-vit-features ----------------------------------------------------------


def test_what_callers_of_earlier_releases_read():
    vit = ViTExtractor("dino_vits8", 4, rule_vit("vit_small_patch8_224.dino"), "cpu")
    assert (vit.num_patches, vit.load_size) == (None, None)
    images = rule_image(50, 66, 0)  # no multiples of the patch: the last pixels are dropped
    descriptors = vit.extract_descriptors(images, 11, "key", False)
    assert vit.num_patches == (11, 15)
    assert vit.load_size == (50, 66)
    assert descriptors.shape == (1, 1, 11 * 15, 384)
    assert torch.equal(descriptors, vit.extract_descriptors(images[:, :, :48, :64]))
    assert vit.p == 8
    assert vit.stride == (4, 4)
    assert vit.model.patch_embed.patch_size // 2 == 4
    assert vit.model.patch_embed.patch_size[1] == 8
    assert tuple(vit.model.patch_embed.patch_size) == (8, 8)
    assert vit.model_type == "dino_vits8"
    assert (len(vit.mean), len(vit.std)) == (3, 3)
    with pytest.raises(ValueError, match="less than one patch"):
        vit(torch.zeros(1, 3, 7, 64))


def test_extract_features_of_several_layers(small):
    vit = extractor(small)
    images = rule_image(64, 48, 0)
    first, second = vit._extract_features(images, [1, 5], "key")
    assert first.shape == second.shape == (1, 2, 13, 32)
    assert torch.equal(join_heads(second)[:, 1:], vit.extract_descriptors(images)[:, 0])
    in_block_order = vit._extract_features(images, [5, 1], "key")  # as dino-vit-features' hooks do
    assert torch.equal(in_block_order[0], first) and torch.equal(in_block_order[1], second)
    assert vit._extract_features(images, [5], "token")[0].shape == (1, 13, 64)
    assert vit._extract_features(images, [5], "attn")[0].shape == (1, 2, 13, 13)


def test_static_methods_can_be_overridden_and_called(small):
    class Mine(ViTExtractor):
        @staticmethod
        def create_model(model_type):
            return small

    assert Mine(SMALL, 16, device="cpu").model is small
    model = rule_vit(SMALL)
    assert ViTExtractor.patch_vit_resolution(model, 8) is model
    assert model.patch_embed.proj.stride == (8, 8)
    with pytest.raises(ValueError, match="stride 5 does not divide"):
        ViTExtractor.patch_vit_resolution(model, 5)


def test_cuda_on_a_machine_without_is_noted(small, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ViTExtractor(SMALL, 16, small).device.type in ("cpu", "mps")
    err = capsys.readouterr().err
    assert err.startswith("note: there is no GPU here for device='cuda'")
    assert err.count("\n") == 1


class FromElsewhere(ViTExtractor):
    """As other projects write subclasses: attributes first, then the constructor, then again."""

    def __init__(self, model, stride):
        self.device = "cpu"
        self.p = 8
        self.stride = (8, 8)
        self.mean, self.std = (0.1, 0.2, 0.3), (1, 1, 1)
        super().__init__(SMALL, (4, 4), model, "cpu")
        self.device = "cpu"
        self.p = (16, 16)
        self.stride = stride
        self.mean = [0.25, 0.5, 0.75]
        self.std = torch.tensor([0.5, 0.5, 0.25])


def test_subclasses_set_what_they_like(small, tmp_path):
    vit = FromElsewhere(small, (8, 8))
    assert (vit.stride[0], vit.stride, vit.p, vit.patch) == (8, (8, 8), 16, 16)
    assert vit.stride == 8 and vit.stride != (4, 4) and vit.stride // 2 == 4
    assert vit.get_num_patches(64, 32) == (7, 3)
    images = rule_image(64, 32, 0)
    assert torch.equal(vit(images), extractor(small, 8)(images))

    photo = Image.new("RGB", (32, 32), (51, 102, 153))
    pixels = vit.preprocess(photo)[0][0, :, 0, 0]
    torch.testing.assert_close(pixels, torch.tensor([-0.1, -0.2, -0.6]))
    torch.testing.assert_close(vit.preprocess_pil(photo)[0, :, 0, 0], pixels)
    assert (vit.mean, vit.std) == ((0.25, 0.5, 0.75), (0.5, 0.5, 0.25))

    for wrong in ((4, 8), 5, 0, (3, 3)):
        with pytest.raises(ValueError, match=r"pass one "):
            vit.stride = wrong


def test_a_device_is_its_name_and_torchs(small):
    device = extractor(small).device
    for same in ("cpu", torch.device("cpu")):
        assert device == same
        assert same == device
        assert (device != same) is False
    for other in ("cuda", torch.device("cuda"), "cpu:1"):
        assert device != other
    assert Device("cuda:1") == "cuda" and Device("cuda:1") != "cuda:0"
    assert (Device("cuda:1").type, Device("cuda:1").index) == ("cuda", 1)
    assert torch.zeros(1, device=device).to(device).device == device


def test_log_bin_of_raw_features(small):
    vit = extractor(small)
    images = rule_image(64, 48, 0)
    (raw,) = vit._extract_features(images, [5], "key")
    binned = vit._log_bin(raw[:, :, 1:])
    assert torch.equal(binned, vit.extract_descriptors(images, bin=True))


def test_names_that_a_star_import_brings():
    names: dict = {}
    exec("from extractor import *", names)
    used = {"argparse", "torch", "nn", "math", "timm", "types", "transforms", "Path", "Image"}
    assert used | {"List", "Tuple", "Union", "ViTExtractor"} <= set(names)


def test_exact_size_reads_photos_as_dino_vit_features(small, tmp_path):
    """Resize to the shorter side with LANCZOS, no EXIF turning, no whole patches."""
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 101, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "x.png", exif=exif)
    vit = extractor(small, stride=8, exact_size=True)
    images, resized = vit.preprocess(tmp_path / "x.png", 50)
    wanted = transforms.Resize(50, transforms.InterpolationMode.LANCZOS)(photo)
    assert np.array_equal(np.asarray(resized), np.asarray(wanted))
    assert images.shape == (1, 3, 50, 84)
    assert vit(images).shape == (1, 64, 5, 9)  # 2 and 4 pixels fill no cell
    with Image.open(tmp_path / "x.png") as opened:
        assert np.array_equal(vit.preprocess(opened)[1], photo)
    assert extractor(small).preprocess(tmp_path / "x.png")[1].size == (64, 96)


def test_exact_size_on_the_command_line(cli, tmp_path, rule_backbone):
    Image.new("RGB", (101, 60), "red").save(tmp_path / "x.png")
    args = ["--image_path", tmp_path / "x.png", "--output_path", tmp_path / "x.pth", *rule_backbone]
    ran = cli("extractor", *args, "--load_size", 50, "--stride", 16, "--exact_size")
    assert ran.report()["grid"] == [3, 5]  # of 50x84 pixels
    assert "descriptors [1, 1, 15, 192] of a grid of 3x5 cells" in ran.out and ran.err == ""
    ran = cli("extractor", *args, "--load_size", 40, "--stride", 16)
    assert ran.report()["grid"] == [3, 4]  # of 48x64


def test_a_notebook_shows_one_line(small):
    shown = repr(extractor(small))
    wanted = "ViTExtractor('test_vit.r160_in1k', layer=5, facet='key', patch=16, stride=16"
    assert shown.startswith(wanted) and "\n" not in shown


def test_a_photo_instead_of_a_tensor_is_told_to_be_preprocessed(small):
    photo = Image.new("RGB", (32, 32))
    kinds = {"an Image": photo, "a str": "photo.jpg", "a ndarray": np.zeros((32, 32, 3))}
    for kind, given in kinds.items():
        with pytest.raises(ValueError, match=rf"3, H, W., not {kind}: pass preprocess.photo."):
            extractor(small)(given)
    with pytest.raises(ValueError, match=r"not a tensor of shape \[32, 32, 3\]: pass"):
        extractor(small)(torch.zeros(32, 32, 3))


# ---- other ViTs ---------------------------------------------------------------------------------

FAMILIES = {  # name: keyword arguments that make it small
    "deit_tiny_distilled_patch16_224": {},  # two prefix tokens
    "vit_small_patch16_dinov3": {"depth": 2},  # rotary positions, registers, layer scale
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 112},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 112},  # positions of patches only
    "eva02_tiny_patch14_224": {"depth": 2},  # absolute and rotary positions, separate qkv
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # rotary positions that differ by layer
    "vit_base_patch16_siglip_224": {"depth": 1},  # no CLS
    "vit_base_patch16_clip_224": {"depth": 1},  # a norm before the blocks
}


def build_family(name):
    torch.manual_seed(0)
    options = {"num_classes": 0, "dynamic_img_size": True, **FAMILIES[name]}
    return timm.create_model(name, **options).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_any_vit_equals_timm(name):
    model = build_family(name)
    vit = ViTExtractor(name, None, model, "cpu", facet="token")
    side = model.patch_embed.img_size[0]
    images = torch.randn(1, 3, side, side)
    (token,) = vit._extract_features(images, [vit.depth - 1], "token")
    torch.testing.assert_close(
        model.norm(token), model.forward_features(images), rtol=0, atol=1e-4
    )

    # the last layer's attention from our parts: softmax @ value, projected, is what timm's gives
    block = model.blocks[-1]
    rotary = vit._rotary(vit.grid(side, side))[-1]
    seen = {}

    def note(module, args):
        seen["x"] = args[0]

    hook = block.attn.register_forward_pre_hook(note)
    model.forward_features(images)
    hook.remove()
    value = project(block.attn, seen["x"], "value")
    ours = (attention(block.attn, seen["x"], **rotary) @ value).transpose(1, 2).flatten(2)
    if getattr(block.attn, "norm", None) is not None:
        ours = block.attn.norm(ours)
    ours = block.attn.proj(ours)
    torch.testing.assert_close(ours, block.attn(seen["x"], **rotary), rtol=0, atol=1e-4)

    vit.facet = "key"
    p = vit.patch
    assert vit.grid(3 * p, 5 * p) == (3, 5)
    assert vit(torch.randn(1, 3, 3 * p, 5 * p)).shape == (1, vit.channels, 3, 5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows, columns", [(4, 6), (17, 9)])
@torch.no_grad()
def test_any_vit_equals_timm_off_the_native_grid(name, rows, columns):
    model = build_family(name)
    vit = ViTExtractor(name, None, model, "cpu", facet="token")
    images = torch.randn(2, 3, rows * vit.patch, columns * vit.patch)
    for layer in {0, vit.depth - 1}:
        for facet, norm in (("token", False), ("token_norm", True)):
            found = model.forward_intermediates(
                images, indices=[layer], norm=norm, intermediates_only=True
            )
            torch.testing.assert_close(vit(images, layer, facet), found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "resnet18", "vit_small_r26_s32_224"],
)
def test_what_is_no_plain_vit_is_refused(tmp_path, name):
    try:
        model = timm.create_model(name, num_classes=0)
    except TypeError:
        pytest.skip(f"{name} cannot be built here")
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"is not a plain ViT .*: pass a ViT of timm"):
        ViTExtractor(name, None, device="cpu", backbone_path=tmp_path / "x.safetensors")


# ---- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [(14, 14), (28, 28), (37, 37)])
def test_positions_lose_no_row_at_any_size(native):
    patches = torch.randn(1, native[0] * native[1], 1, generator=torch.Generator().manual_seed(0))
    for n in range(1, 141):
        found = interpolate_positions(patches, native, (n, 141 - n))
        assert found.shape == (1, n * (141 - n), 1), n


def test_positions_are_dinos_for_the_named_and_timms_for_others(small):
    table = small.pos_embed
    square = table[:, 1:].transpose(1, 2).unflatten(2, (10, 10))
    scale = (12.1 / 10, 7.1 / 10)
    dino = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
    found = interpolate_positions(table[:, 1:], (10, 10), (12, 7))
    torch.testing.assert_close(found, dino.flatten(2).transpose(1, 2))
    timms = resample_abs_pos_embed(table[:, 1:], [12, 7], [10, 10], num_prefix_tokens=0)
    torch.testing.assert_close(extractor(small)._positions((12, 7))[0], timms)


def test_a_named_backbone_has_the_same_positions_by_timms_name_of_it():
    model = rule_vit("vit_small_patch16_224.dino")
    tables = []
    for name in ("dino_vits16", "vit_small_patch16_224.dino"):
        vit = ViTExtractor(name, stride=None, model=copy.deepcopy(model), device="cpu")
        tables.append(vit._positions((12, 7))[0])
    assert torch.equal(tables[0], tables[1])


def test_registers_of_another_name_are_not_left_out_in_silence(small):
    small = copy.deepcopy(small)
    small.register_tokens = torch.nn.Parameter(torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match=r"not a plain ViT .*register_tokens.: pass .* as b"):
        extractor(small)


# ---- flags and geometry -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"stride": 5}, "stride 5 does not divide the patch .16.: pass one of 1, 2, 4, 8, 16"),
        ({"stride": 0}, "stride 0"),
        ({"layer": 6}, "layer 6 is out of range: .* has layers 0 to 5"),
        ({"layer": -1}, "layer -1"),
        ({"facet": "keys"}, "unknown facet keys: pass one of key, query"),
        ({"dtype": "fp16"}, "unknown dtype fp16: pass one of float32, bfloat16, float16"),
    ],
)
def test_bad_settings(small, kwargs, message):
    with pytest.raises(ValueError, match=message):
        extractor(small, **kwargs)


def test_sizes(small):
    vit = extractor(small)
    assert vit.size(640, 480, 224) == (304, 224)
    assert extractor(small, stride=4).grid(64, 32) == (13, 5)


def test_preprocess_resizes_once(small, tmp_path):
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 100, 3), np.uint8))
    photo.save(tmp_path / "x.png")
    vit = extractor(small)
    images, resized = vit.preprocess(tmp_path / "x.png", 48)
    wanted = np.asarray(photo.resize((80, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(resized), wanted)
    normalised = torch.from_numpy(wanted / 127.5 - 1).float()
    torch.testing.assert_close(images[0].permute(1, 2, 0), normalised, rtol=0, atol=1e-6)
    for same in (photo, np.asarray(photo)):
        assert torch.equal(vit.preprocess(same, 48)[0], images)
    torch.testing.assert_close(vit.normalize(vit.denormalize(images)), images)


def flags(*given):
    command = Command("")
    add_backbone_args(command)
    return command.parse_args([str(value) for value in given])


def test_channel_and_patch_are_checked(rule_backbone):
    vit = build_extractor(flags(*rule_backbone, "--channel", 192, "--patch", 16, "--device", "cpu"))
    assert vit.facts()["stride"] == 16
    with pytest.raises(ValueError, match="--channel 384, but vit_tiny_patch16_224 key has 192"):
        build_extractor(flags(*rule_backbone, "--channel", 384))
    with pytest.raises(ValueError, match=r"^channel 384, but .* has 192: leave channel out"):
        check_facts(vit, 384, None)
    with pytest.raises(ValueError, match=r"--patch 8, but .* has 16: leave --patch out"):
        build_extractor(flags(*rule_backbone, "--patch", 8))


def test_digest_knows_other_weights(small):
    digest = extractor(small).digest
    assert extractor(rule_vit(SMALL), dtype="bfloat16").digest == digest
    other = rule_vit(SMALL)
    other.norm.bias.data[0] += 1
    assert extractor(other).digest != digest


TWO_NETWORKS = """
import torch

def maps():
    return torch.nn.Conv2d(3, 5, 8, stride=8)

class Tokens(torch.nn.Module):
    std = (0.25, 0.25, 0.25)
    def __init__(self, channels):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.conv = torch.nn.Conv2d(3, channels, 8, stride=8)
    def forward(self, images):
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], 1)   # a prefix token first

def tokens(args):
    return Tokens(args.channel)

def nothing():
    Tokens(5)

class Pair(Tokens):
    def forward(self, images):
        return super().forward(images), images

def pair():
    return Pair(5)

class Vector(Tokens):
    def forward(self, images):
        return super().forward(images).mean(1)

def vector():
    return Vector(5)
"""


def test_ones_own_backbone(import_path):
    (import_path / "two_networks.py").write_text(TWO_NETWORKS)
    maps = build_extractor(flags("--my_extractor", "two_networks:maps", "--device", "cpu"))
    tokens = build_extractor(
        flags("--my_extractor", "two_networks:tokens", "--channel", 7, "--device", "cpu")
    )
    images = torch.randn(2, 3, 32, 48)
    assert maps(images).shape == (2, 5, 4, 6)
    assert (maps.patch, maps.channels, maps.layer) == (8, 5, None)
    assert tokens(images).shape == (2, 7, 4, 6)
    assert tokens.mean == (0.4, 0.5, 0.6)  # numbers, which JSON can hold
    assert not tokens.mean_rgb.requires_grad
    torch.testing.assert_close(tokens(images), tokens.model.conv(images))
    with pytest.raises(ValueError, match=r"no function two_networks:none .*: pass --my_extractor"):
        build_extractor(flags("--my_extractor", "two_networks:none"))
    with pytest.raises(ValueError, match="is still empty"):
        build_extractor(flags("--my_extractor"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "nothing cannot be used .*'NoneType' .*: return a torch.nn.Module"),
        ("pair", r"'tuple' object .*: return a torch.nn.Module .* to \[B, C, h, w\]"),
        ("vector", r"not enough values .*: return a torch.nn.Module .* to \[B, C, h, w\]"),
    ],
)
def test_what_is_no_backbone_of_ones_own(import_path, name, message):
    (import_path / "two_networks.py").write_text(TWO_NETWORKS)
    with pytest.raises(ValueError, match=message):
        build_extractor(flags("--my_extractor", f"two_networks:{name}", "--device", "cpu"))


def test_own_command_line(cli, tmp_path, rule_backbone):
    photo = ROOT / "assets/sample.jpg"
    args = ["--image_path", photo, "--load_size", 32, "--stride", 16, *rule_backbone]
    assert cli("extractor", *args, "--output_path", tmp_path / "x.pth").code == 0
    binned_path = tmp_path / "bin.pth"
    assert cli("extractor", *args, "--output_path", binned_path, "--bin", "True").code == 0
    plain = torch.load(tmp_path / "x.pth")
    binned = torch.load(binned_path)
    assert plain.shape == (1, 1, 6, 192)
    assert binned.shape == (1, 1, 6, 17 * 192)
    centre = binned[0, 0, :, 4 * 192 : 5 * 192]  # the fifth bin is the cell itself
    torch.testing.assert_close(centre, plain[0, 0])

    ran = cli("extractor", *args, "--output_path", binned_path, "--bin", "ture")
    assert ran.code == 2 and "'ture' is neither True nor False" in ran.err


def test_a_missing_photo_is_told_before_a_backbone_is_built(cli, tmp_path, monkeypatch):
    def build(args):
        raise AssertionError("a backbone was built")

    monkeypatch.setattr(extractor_module, "build_extractor", build)
    ran = cli("extractor", "--image_path", tmp_path / "none.jpg", "--output_path", "x.pth")
    assert ran.code == 2
    assert "no image at" in ran.err
