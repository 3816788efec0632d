"""extractor.py against the golden descriptors, the slow version, timm itself, and every kind of weight and image file."""

import argparse
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, rule_image, rule_state, rule_vit
from PIL import Image
from plain_extract import plain_features, plain_log_bin, plain_map
from safetensors.torch import save_file

from extractor import (
    BACKBONES,
    FACETS,
    ViTExtractor,
    attention,
    build_backbone,
    join_heads,
    list_images,
    load_backbone_file,
    log_bin,
    pick_device,
    project,
    read_image,
    replacing,
    resolve,
)  # fmt: skip
from lift import LiFT, map_to_tokens, upsample

SMALL = "test_vit.r160_in1k"  # 6 blocks of 64 channels and 2 heads, patch 16


@pytest.fixture(scope="module")
def small():
    return rule_vit(SMALL)


def extractor(model, **kwargs):
    return ViTExtractor(SMALL, model=model, device="cpu", **kwargs)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_vits():
    return {name: rule_vit(resolve(name).tag) for name in ("dino_vits16", "dino_vits8")}


@pytest.mark.parametrize("case", range(18))
def test_golden(shared, golden_vits, case):
    facts = json.loads((shared / "golden/descriptors.json").read_text())[case]
    name, what = facts["model_type"], facts.get("what")
    vit = ViTExtractor(
        name, facts.get("stride"), golden_vits[name], "cpu", layer=facts["layer"], facet=facts["facet"]
    )
    images = rule_image(*facts["size"], 0)
    if what == "saliency":
        found = vit.extract_saliency_maps(images)[..., None]
    elif what:
        found = vit.extract_descriptors(images, bin=what == "bin", include_cls=what == "cls")[0]
    elif facts.get("lift"):
        lift = LiFT(vit.width, vit.patch).eval()
        lift.load_state_dict(rule_state(lift))
        with torch.no_grad():
            found = map_to_tokens(upsample(lift, images, vit(images), facts.get("iters", 1)))
    else:
        found = vit.extract_descriptors(images)[0]
    values = np.load(shared / "golden/descriptors.npz")
    assert list(found.shape) == facts["shape"]
    some = found[0].numpy()[values[f"{case:02d}_tokens"]].reshape(values[f"{case:02d}_values"].shape)
    assert np.abs(some - values[f"{case:02d}_values"]).max() < 1e-4 * facts["absmax"]
    assert float(found.mean()) == pytest.approx(facts["mean"], abs=1e-4 * facts["absmax"])


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("size, stride", [((160, 160), 16), ((96, 160), 16), ((64, 48), 8), ((48, 48), 4)])
def test_equals_the_whole_forward(small, facet, size, stride):
    images = torch.cat([rule_image(*size, seed) for seed in (1, 2)])
    for layer in (0, 5):
        vit = extractor(small, layer=layer, facet=facet, stride=stride)
        slow = plain_map(small, images, layer, facet, stride)
        torch.testing.assert_close(vit(images), slow, rtol=0, atol=1e-5 * float(slow.abs().max()))
        assert vit.width == (None if facet == "attn" else slow.shape[1])
        tokens = vit.extract_descriptors(images, include_cls=True)[:, 0]
        slow = plain_features(small, images, layer, facet, stride)  # CLS first
        torch.testing.assert_close(tokens, join_heads(slow), rtol=0, atol=1e-5 * float(slow.abs().max()))


def test_channels_are_head_dim_major(small):
    qkv = small.blocks[5].attn.qkv
    keep = qkv.weight.data.clone()
    try:
        qkv.weight.data[64 + 32 + 3] = 0  # key, head 1 of 2, head_dim 3 of 32: descriptor channel 3 * 2 + 1
        feats = extractor(small)(rule_image(64, 64, 0))
        assert torch.equal(feats[0, 7], torch.full((4, 4), float(qkv.bias[64 + 32 + 3])))
        assert feats[0, 6].std() > 0
    finally:
        qkv.weight.data = keep


def test_stops_where_the_descriptor_is_complete(small):
    calls = []
    hooks = [m.register_forward_hook(lambda m, a, y, n=name: calls.append(n)) for name, m in small.named_modules()]
    try:
        extractor(small, layer=2)(rule_image(64, 64, 0))
    finally:
        [hook.remove() for hook in hooks]
    assert calls[-1] == "blocks.2.norm1" and "blocks.1" in calls
    assert not any(call.startswith(("blocks.2.attn", "blocks.2.mlp", "blocks.3", "norm.")) for call in calls)
    with pytest.raises(ValueError, match="multiple of the patch"):
        extractor(small)(torch.zeros(1, 3, 64, 50))
    assert not any(module._forward_hooks for module in small.modules())


def test_batch_equals_single(small):
    images = torch.cat([rule_image(64, 96, seed) for seed in range(3)])
    alone = torch.cat([extractor(small)(image[None]) for image in images])
    torch.testing.assert_close(extractor(small)(images), alone, rtol=0, atol=1e-5)


def test_built_in_eval_mode_and_frozen():
    vit = extractor(timm.create_model(SMALL, num_classes=0).train())
    assert not any(module.training for module in vit.modules())
    assert not any(p.requires_grad for p in vit.parameters())


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (7, 3), (12, 12)])
def test_log_bin_equals_loops(grid):
    feats = torch.randn(2, 5, *grid, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_bin(feats), plain_log_bin(feats))


def test_saliency():
    vit = ViTExtractor("dino_vits16", model=rule_vit("vit_small_patch16_224.dino"), device="cpu")
    images = torch.cat([rule_image(64, 96, seed) for seed in (0, 1)])
    found = vit.extract_saliency_maps(images)
    slow = plain_features(vit.model, images, 11, "attn", 16)[:, [0, 2, 4, 5], 0, 1:].mean(1)  # [B, t]
    for one, raw in zip(found, slow):
        torch.testing.assert_close(one, (raw - raw.min()) / (raw.max() - raw.min()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="6 heads"):
        extractor(rule_vit(SMALL)).extract_saliency_maps(images)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_near(small, dtype, tolerance):
    images, exact = rule_image(64, 64, 0), extractor(small)(rule_image(64, 64, 0))
    half = extractor(rule_vit(SMALL), dtype=dtype)(images)
    assert half.dtype == torch.float32
    assert 0 < float((half - exact).abs().max()) < tolerance * float(exact.abs().max())


# ---- other ViTs -----------------------------------------------------------------------------------------------------

FAMILIES = {  # name: what is special, keyword arguments that make it small
    "deit_tiny_distilled_patch16_224": {},  # two prefix tokens
    "vit_small_patch16_dinov3": {"depth": 2},  # rotary positions, registers, layer scale
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 112},  # positions of the patches only, registers, patch 14
    "eva02_tiny_patch14_224": {"depth": 2},  # absolute and rotary positions, separate qkv
    "vit_small_patch16_rope_mixed_224": {"depth": 2},  # rotary positions that differ by layer
    "vit_base_patch16_siglip_224": {"depth": 1},  # no CLS
    "vit_base_patch16_clip_224": {"depth": 1},  # a norm before the blocks
}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_vit_equals_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **FAMILIES[name]).eval()
    vit = ViTExtractor(name, model=model, device="cpu", facet="token")
    side = model.patch_embed.img_size[0]
    images = torch.randn(1, 3, side, side)  # the native grid: elsewhere timm reads absolute positions its own way
    with torch.no_grad():
        whole = model.forward_features(images)
        token = model.norm(vit._facet(images, vit.depth - 1, "token")[:, 0])
        torch.testing.assert_close(token, whole, rtol=0, atol=1e-4)
        # the last layer's attention from our parts: softmax @ value, projected, is what timm's attention gives
        block, rotary = model.blocks[-1], vit._rotary(vit.grid(side, side))[-1]
        seen = {}
        hook = block.attn.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
        model.forward_features(images)
        hook.remove()
        value = project(block.attn, seen["x"], "value")
        ours = (attention(block.attn, seen["x"], **rotary) @ value).transpose(1, 2).flatten(2)
        ours = block.attn.proj(getattr(block.attn, "norm", torch.nn.Identity())(ours))
        torch.testing.assert_close(ours, block.attn(seen["x"], **rotary), rtol=0, atol=1e-4)
    h, w = vit.grid(3 * vit.patch, 5 * vit.patch)
    vit.facet = "key"
    assert vit(torch.randn(1, 3, 3 * vit.patch, 5 * vit.patch)).shape == (1, vit.width, h, w) and (h, w) == (3, 5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "resnet18", "vit_small_r26_s32_224"])
def test_what_is_no_plain_vit_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="pass a ViT of timm"):
        try:
            model = timm.create_model(name, num_classes=0)
        except TypeError:
            pytest.skip(f"{name} cannot be built here")
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        ViTExtractor(name, device="cpu", backbone_path=tmp_path / "x.safetensors")


def test_names():
    for name, row in BACKBONES.items():
        cfg = timm.get_pretrained_cfg(row.tag)
        assert row.mean_std == (tuple(cfg.mean), tuple(cfg.std)), name
        assert row.file or "." in row.tag, "full tags only"
    assert resolve("vit_tiny_patch16_224").tag == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    for name, message in {
        "vit_small_patch8_224": "no supervised weights", "vit_foo": "unknown model", "vit_tiny_patch16_224.foo": "pass one of",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            resolve(name)


# ---- weight files ---------------------------------------------------------------------------------------------------


def test_backbone_files_of_every_kind(tmp_path, small):
    state, name = small.state_dict(), SMALL
    head = {"head.weight": torch.zeros(2, 64), "head.bias": torch.zeros(2)}
    kinds = {
        "bare.pth": state,
        "head.pth": state | head,
        "ddp.pth": {f"module.{k}": v for k, v in state.items()},
        "full.pth": {
            "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
            "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.zeros(1)},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
        },
        "wrapped.pth": {"state_dict": {f"teacher.backbone.{k}": v for k, v in state.items()} | {"student.x": torch.zeros(1)}},
        "model.pth": {"model": state},
    }
    for file, content in kinds.items():
        torch.save(content, tmp_path / file)
    save_file(state | head, tmp_path / "head.safetensors")
    for file in [*kinds, "head.safetensors"]:
        built = build_backbone(name, tmp_path / file).state_dict()
        assert all(torch.equal(built[k], state[k]) for k in state), file


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_backbone_files_that_do_not_fit(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = small.state_dict()
    short = {k: v for k, v in state.items() if k != "norm.bias"}
    cases = {
        "missing 1.pth": (short, "missing .norm.bias."),
        "surplus.pth": (state | {"extra.weight": torch.zeros(1)}, "1 surplus .extra.weight."),
        "shape.pth": (state | {"cls_token": torch.zeros(1, 1, 8)}, r"cls_token \(1, 1, 8\) where \(1, 1, 64\) is wanted"),
        "bomb.pth": ({"model": Bomb()}, "holds no weights"),
        "list.pth": ([1, 2], "holds no weights"),
        "text.pth": (None, "holds no weights"),
        "text.safetensors": (None, "holds no weights"),
    }
    for file, (content, message) in cases.items():
        (tmp_path / file).write_text("not weights") if content is None else torch.save(content, tmp_path / file)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone_file(small, tmp_path / file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="--backbone_path"):
        load_backbone_file(small, tmp_path / "none.pth")


def test_download_goes_through_timm(tmp_path):
    """A hub on this machine serves one file; the weights that arrive are those."""
    state = rule_vit(SMALL).state_dict() | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            found = self.path == f"/timm/{SMALL}/resolve/main/model.safetensors"
            self.send_response(200 if found else 404)
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            if found and body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"from extractor import ViTExtractor; print(float(ViTExtractor('{SMALL}', device='cpu').model.pos_embed.sum()))"
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    try:
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(float(state["pos_embed"].sum()), abs=1e-4)


def test_without_a_network(cli, tmp_path):
    ran = cli("extractor", "--image_path", ROOT / "assets/sample.jpg", "--output_path", tmp_path / "x.pth")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "https://huggingface.co/timm/vit_small_patch8_224.dino" in ran.err and "--backbone_path" in ran.err


# ---- flags and geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"stride": 5}, "stride 5 does not divide the patch .16.: pass one of 1, 2, 4, 8, 16"),
        ({"stride": 0}, "stride 0"),
        ({"layer": 6}, "layer 6 is out of range: .* has layers 0 to 5"),
        ({"layer": -1}, "layer -1"),
        ({"facet": "keys"}, "unknown facet keys: pass one of key, query"),
    ],
)
def test_bad_settings(small, kwargs, message):
    with pytest.raises(ValueError, match=message):
        extractor(small, **kwargs)


def test_device_that_is_not_there():
    with pytest.raises(ValueError, match="pass --device cpu"):
        pick_device("cuda:99")


def test_sizes(small):
    vit = extractor(small)
    known = {
        (448, 448, 224): (224, 224), (640, 480, 224): (304, 224), (480, 640, 224): (224, 304), (37, 500, None): (32, 496),
        (16, 16, None): (16, 16), (24, 100, None): (32, 96), (500, 375, (224, 320)): (320, 224), (451, 300, 448): (672, 448),
    }  # fmt: skip
    for (width, height, load), size in known.items():
        assert vit.size(width, height, load) == size
    with pytest.raises(ValueError, match=r"less than one patch \(16\): pass a larger"):
        vit.size(15, 200)
    assert extractor(small, stride=4).grid(64, 32) == (13, 5)


def test_preprocess_resizes_once(small, tmp_path):
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 100, 3), np.uint8))
    photo.save(tmp_path / "x.png")
    images, resized = extractor(small).preprocess(tmp_path / "x.png", 48)
    wanted = np.asarray(photo.resize((80, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(resized), wanted)
    torch.testing.assert_close(images[0].permute(1, 2, 0), torch.from_numpy(wanted / 127.5 - 1).float(), rtol=0, atol=1e-6)


def test_own_command_line(cli, tmp_path, rule_backbone):
    args = ["--image_path", ROOT / "assets/sample.jpg", "--load_size", 32, "--stride", 16, *rule_backbone, "--output_path"]
    assert cli("extractor", *args, tmp_path / "x.pth").code == 0
    assert cli("extractor", *args, tmp_path / "bin.pth", "--bin", "True").code == 0
    plain, binned = torch.load(tmp_path / "x.pth"), torch.load(tmp_path / "bin.pth")
    assert plain.shape == (1, 1, 6, 192) and binned.shape == (1, 1, 6, 17 * 192)
    centre = binned[0, 0, :, 4 * 192 : 5 * 192]  # the fifth bin is the cell itself
    torch.testing.assert_close(centre, plain[0, 0])


# ---- images and files -----------------------------------------------------------------------------------------------

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def exif_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated by 90 degrees clockwise
    Image.fromarray(np.rot90(np.stack([GREY] * 3, -1))).save(path, exif=exif)


READABLE = {
    "grey.png": lambda p: Image.fromarray(GREY).save(p),
    "16bit.png": lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p),
    "float.tiff": lambda p: Image.fromarray(GREY.astype(np.float32)).save(p),
    "palette.png": lambda p: Image.fromarray(np.stack([GREY] * 3, -1)).quantize(256).save(p),
    "rgba.png": lambda p: Image.fromarray(np.stack([GREY] * 3 + [GREY // 2], -1)).save(p),
    "cmyk.tiff": lambda p: Image.fromarray(np.stack([GREY] * 3, -1)).convert("CMYK").save(p),
    "rotated.png": exif_rotated,
}


@pytest.mark.parametrize("name", READABLE)
def test_images_are_read_upright_as_rgb(tmp_path, name):
    READABLE[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (16, 16)
    assert np.abs(np.asarray(image).astype(int) - GREY[..., None]).max() <= (3 if name == "palette.png" else 0)


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    jpeg = (ROOT / "assets/sample.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "empty.png").touch()
    for name in ("text.jpg", "cut.jpg", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable image .*: replace or remove it"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image at"):
        read_image(tmp_path / "none.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large"):
        read_image(ROOT / "assets/sample.jpg")


def test_list_images(tmp_path):
    for name in ("b.JPG", "sub/a.png", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / "b.JPG", tmp_path / "sub/a.png"]
    assert list_images(f"{tmp_path}/*.JPG") == [tmp_path / "b.JPG"]
    for nothing in (tmp_path / "none", f"{tmp_path}/*.gif"):
        with pytest.raises(ValueError, match="no images at"):
            list_images(nothing)


def test_replacing_keeps_what_was_there(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(OSError, match=r"cannot write .*x.txt \(boom\): free some space"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("boom")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="cannot write"), replacing(path / "below" / "a file"):
        pass
