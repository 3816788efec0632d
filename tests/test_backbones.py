"""backbones.py: names, weight files in every format that people have, downloads, devices."""

import argparse
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch
from conftest import ROOT, rule_state, rule_vit
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import backbones
from backbones import BACKBONES, build_backbone, load_backbone_file, pick_device, resolve

SMALL = "test_vit.r160_in1k"  # 6 blocks of 64 channels and 2 heads, patch 16


@pytest.fixture(scope="module")
def small():
    return rule_vit(SMALL)


# ---- names --------------------------------------------------------------------------------------


def test_names():
    for name, row in BACKBONES.items():
        cfg = timm.get_pretrained_cfg(row.tag)
        assert row.mean_std == (tuple(cfg.mean), tuple(cfg.std)), name
        assert row.file or "." in row.tag, "full tags only"
    tag = resolve("vit_tiny_patch16_224").tag
    assert tag == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    wrong = {
        "vit_small_patch8_224": "no supervised weights",
        "vit_foo": "unknown model",
        "vit_tiny_patch16_224.foo": "pass vit_tiny_patch16_224.augreg",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            resolve(name)


# ---- weight files -------------------------------------------------------------------------------


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def test_backbone_files_of_every_kind(tmp_path, small):
    state = small.state_dict()
    head = {"head.weight": torch.zeros(2, 64), "head.bias": torch.zeros(2)}
    student = {key: value + 1 for key, value in state.items()}
    projection = {"head.mlp.0.weight": torch.zeros(1)}
    wrapped = {**prefixed("teacher.backbone.", state), "student.x": torch.zeros(1)}
    kinds = {
        "bare.pth": state,
        "head.pth": {**state, **head},
        "ddp.pth": prefixed("module.", state),
        "full.pth": {
            "student": prefixed("module.backbone.", student),
            "teacher": {**prefixed("backbone.", state), **projection},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
        },
        "wrapped.pth": {"state_dict": wrapped},
        "model.pth": {"model": state},
    }
    for file, content in kinds.items():
        torch.save(content, tmp_path / file)
    save_file({**state, **head}, tmp_path / "head.safetensors")
    for file in [*kinds, "head.safetensors"]:
        built = build_backbone(SMALL, tmp_path / file).state_dict()
        assert all(torch.equal(built[key], state[key]) for key in state), file


def small_model(name, **options):
    """A timm ViT of two blocks with rule weights, and its state."""
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=2, **options)
    model.load_state_dict(rule_state(model), strict=False)  # rotary positions are not weights
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def metas_registers(state):
    """DINOv2's own table of positions has a row for CLS, which timm adds to the token itself."""
    row = torch.full((1, 1, state["cls_token"].shape[2]), 0.25)
    state = dict(state, mask_token=torch.zeros(1, 384), register_tokens=state["reg_token"])
    del state["reg_token"]
    state["cls_token"] = state["cls_token"] - row
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    return state


def metas_dinov3(state):
    metas = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.rand(16)}
    for key, value in state.items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        metas[key.replace("reg_token", "storage_tokens")] = value
    for block in (0, 1):
        metas[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(1152)
        metas[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(1152)
    return metas


# timm's name in a block: that of transformers' ViT and DINOv2, and that of its DINOv3
IN_A_BLOCK = {
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "ls1.gamma": ("layer_scale1.lambda1", None),
    "ls2.gamma": ("layer_scale2.lambda1", None),
    "gamma_1": (None, "layer_scale1.lambda1"),
    "gamma_2": (None, "layer_scale2.lambda1"),
    "mlp.fc1_g": (None, "mlp.gate_proj"),
    "mlp.fc1_x": (None, "mlp.up_proj"),
    "mlp.fc1": ("mlp.fc1", "mlp.up_proj"),
    "mlp.fc2": ("mlp.fc2", "mlp.down_proj"),
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
}


def transformers_names(state, kind):
    """timm's (or Meta's) state under the names of transformers; kind is vit, dinov2 or dinov3."""
    v3 = kind == "dinov3"
    found = {}
    for key, value in state.items():
        patches = "embeddings.patch_embeddings" if v3 else "embeddings.patch_embeddings.projection"
        key = OUTSIDE.get(key, key).replace("patch_embed.proj", patches)
        if key.startswith("norm."):
            key = key if v3 else f"layernorm.{key.removeprefix('norm.')}"
        if not key.startswith("blocks."):
            found[key] = value
            continue
        _, block, name = key.split(".", 2)
        start = f"layer.{block}." if v3 else f"encoder.layer.{block}."
        if "attn.qkv" in name:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3)):
                inner = f"attention.{part[0]}_proj" if v3 else f"attention.attention.{part}"
                found[f"{start}{inner}.{name.split('.')[-1]}"] = tensor.clone()
            continue
        for timms, others in IN_A_BLOCK.items():
            if name.startswith(timms):
                name = name.replace(timms, others[v3])
        if kind == "vit":
            name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        found[start + name] = value
    return found


def chunked(state):
    """The blocks of DINOv2's training lie in chunks: blocks.CHUNK.BLOCK."""
    return {key.replace("blocks.", "blocks.0."): value for key, value in state.items()}


DINOV2 = ("vit_small_patch14_dinov2", {"img_size": 56})
REGISTERS = ("vit_small_patch14_reg4_dinov2", {"img_size": 56})
DINOV3 = ("vit_small_patch16_dinov3", {})
GATED = ("vit_huge_plus_patch16_dinov3", {"embed_dim": 64, "num_heads": 2})
VIT = ("vit_tiny_patch16_224", {})
DISTILLED = ("deit_tiny_distilled_patch16_224", {})

PUBLISHED = {
    "Meta's DINOv2": (DINOV2, lambda s: {**s, "mask_token": torch.zeros(1, 384)}),
    "Meta's DINOv2 with registers": (REGISTERS, metas_registers),
    "Meta's DINOv3": (DINOV3, metas_dinov3),
    "DINOv2's training": (
        DINOV2,
        lambda s: {
            "teacher": {
                **prefixed("backbone.", chunked({**s, "mask_token": torch.zeros(1, 384)})),
                "dino_head.mlp.0.weight": torch.zeros(1),
            }
        },
    ),
    "transformers' ViT": (
        VIT,
        lambda s: {
            **prefixed("vit.", transformers_names(s, "vit")),
            "classifier.bias": torch.zeros(1),
        },
    ),
    "transformers' ViT, bare": (
        VIT, lambda s: {**transformers_names(s, "vit"), "pooler.dense.bias": torch.zeros(1)},
    ),
    "transformers' DINOv2": (
        DINOV2,
        lambda s: transformers_names({**s, "mask_token": torch.zeros(1, 384)}, "dinov2"),
    ),
    "transformers' DINOv2 with registers": (
        REGISTERS, lambda s: transformers_names(metas_registers(s), "dinov2"),
    ),
    "transformers' DINOv3": (DINOV3, lambda s: transformers_names(s, "dinov3")),
    "transformers' DINOv3, gated": (GATED, lambda s: transformers_names(s, "dinov3")),
    "transformers' DeiT": (
        DISTILLED, lambda s: prefixed("deit.", transformers_names(s, "vit")),
    ),
    "DeiT III": (
        ("deit3_small_patch16_224", {}),
        lambda s: {
            "model": {re.sub(r"ls(\d).gamma", r"gamma_\1", key): v for key, v in s.items()}
        },
    ),
    "MAE": (
        VIT,
        lambda s: {
            "model": {**s, "mask_token": torch.zeros(1), "decoder_embed.bias": torch.zeros(1)}
        },
    ),
    "MoCo v3": (
        VIT,
        lambda s: {
            "arch": "vit_small",
            "state_dict": {
                **prefixed("module.momentum_encoder.", plus_one(s)),
                **prefixed("module.base_encoder.", {**s, "head.0.weight": torch.zeros(1)}),
                "module.predictor.0.weight": torch.zeros(1),
            },
        },
    ),
    "Lightning": (
        VIT,
        lambda s: {
            "epoch": 3,
            "state_dict": {**prefixed("model.backbone.", s), "model.fc.weight": torch.zeros(1)},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1)}}}],
        },
    ),
    "torch.compile": (VIT, lambda s: prefixed("_orig_mod.", s)),
    "torch.compile of blocks, in DDP": (
        VIT,
        lambda s: {
            f"module.{key}".replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in s.items()
        },
    ),
    "timm's training": (
        VIT,
        lambda s: {"state_dict_ema": plus_one(s), "state_dict": s, "arch": "vit", "metric": 0.7},
    ),
    "OpenCLIP": (
        VIT,
        lambda s: {**prefixed("visual.trunk.", s), "logit_scale": torch.zeros(1)},
    ),
}  # fmt: skip


def plus_one(state):
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_checkpoints_as_they_are_published(tmp_path, capsys, kind):
    (name, options), publish = PUBLISHED[kind]
    model, state = small_model(name, **options)
    torch.save(publish(state), tmp_path / "x.pth")
    model.load_state_dict(plus_one(state))  # so that every tensor must come from the file
    load_backbone_file(model, tmp_path / "x.pth", name)
    for key, value in model.state_dict().items():
        assert (value - state[key]).abs().max() < 1e-6, key
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["Meta's DINOv2 with registers", "Meta's DINOv3"])
def test_metas_weights_are_read_as_timm_reads_them(tmp_path, kind):
    (name, options), publish = PUBLISHED[kind]
    model, state = small_model(name, **options)
    metas = publish(state)
    torch.save(metas, tmp_path / "x.pth")
    load_backbone_file(model, tmp_path / "x.pth", name)

    timms = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=2, **options)
    timms.load_state_dict(sys.modules[type(timms).__module__].checkpoint_filter_fn(metas, timms))
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), timms.eval()(images))


def test_biases_of_dinov3_are_kept_where_they_are_not_zero(tmp_path):
    name = "vit_small_patch16_dinov3"
    model, state = small_model(name)
    metas = metas_dinov3(state)
    metas["blocks.1.attn.qkv.bias"][0] = 0.5
    torch.save(metas, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"biases of queries .*: pass .* that ends in _qkvb"):
        load_backbone_file(model, tmp_path / "x.pth", name)

    with_biases = timm.create_model(f"{name}_qkvb", num_classes=0, depth=2)
    load_backbone_file(with_biases, tmp_path / "x.pth", name)
    assert with_biases.blocks[1].attn.q_bias[0] == 0.5


def test_the_moving_average_is_taken_if_asked(tmp_path):
    model, state = small_model("vit_tiny_patch16_224")
    torch.save({"state_dict": state, "state_dict_ema": plus_one(state)}, tmp_path / "x.pth")
    load_backbone_file(model, tmp_path / "x.pth", ema=True)
    assert torch.equal(model.norm.bias, state["norm.bias"] + 1)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"no moving average .EMA.: leave ema out"):
        load_backbone_file(model, tmp_path / "x.pth", ema=True)


@pytest.mark.parametrize("size", [(224, 448), (384, 384), (96, 96)])
def test_positions_of_another_grid_are_resampled_with_a_note(tmp_path, capsys, size):
    model, state = small_model("vit_tiny_patch16_224")
    # smooth positions, as learned ones are
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    waves = [torch.sin(f * axis / 5 + f) for f in range(1, 97) for axis in (rows / 2, columns / 2)]
    state["pos_embed"][0, 1:] = torch.stack(waves, dim=-1).flatten(0, 1)
    native = [size[0] // 16, size[1] // 16]
    there = resample_abs_pos_embed(state["pos_embed"], native)
    torch.save({**state, "pos_embed": there}, tmp_path / "x.pth")
    load_backbone_file(model, tmp_path / "x.pth")
    wanted = resample_abs_pos_embed(there, [14, 14], native)
    assert torch.equal(model.pos_embed, wanted)
    err = capsys.readouterr().err
    assert f"note: the {native[0]}x{native[1]} positions of" in err and "resampled to 14x14" in err


def test_what_does_not_fit_says_what_it_is_and_what_is_missing(tmp_path):
    model, state = small_model(*DINOV2[:1], **DINOV2[1])
    other, _ = small_model("vit_small_patch16_224")
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "x.pth")
    message = r"read as Meta's DINOv2, does not fit mine, 4 surplus .* is wanted.: pass the model_"
    with pytest.raises(ValueError, match=message):
        load_backbone_file(other, tmp_path / "x.pth", "mine")
    assert torch.equal(other.norm.bias, rule_state(other)["norm.bias"]), "nothing was loaded"

    _, with_registers = small_model(*REGISTERS[:1], **REGISTERS[1])
    torch.save(metas_registers(with_registers), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"1 surplus .register_tokens."):
        load_backbone_file(model, tmp_path / "x.pth")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_backbone_files_that_do_not_fit(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = small.state_dict()
    short = dict(state)
    del short["norm.bias"]
    other_shape = {**state, "cls_token": torch.zeros(1, 1, 8)}
    cases = {
        "missing 1.pth": (short, "missing .norm.bias."),
        "surplus.pth": ({**state, "extra.weight": torch.zeros(1)}, "1 surplus .extra.weight."),
        "shape.pth": (other_shape, r"cls_token \(1, 1, 8\) where \(1, 1, 64\) is wanted"),
        "bomb.pth": ({"model": Bomb()}, "holds more than tensors"),
        "list.pth": ([1, 2], r"cannot read weights from .*\(a list instead of"),
        "text.pth": (None, "damaged or holds more than tensors"),
        "text.safetensors": (None, "cannot read weights from"),
    }
    for file, (content, message) in cases.items():
        if content is None:
            (tmp_path / file).write_text("not weights")
        else:
            torch.save(content, tmp_path / file)
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone_file(small, tmp_path / file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="correct backbone_path"):
        load_backbone_file(small, tmp_path / "none.pth")


def make_hub(content):
    """A server that offers one weight file as timm's hub does."""

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
    return server


def test_download_goes_through_timm(tmp_path):
    """A hub on this machine serves one file; the weights that arrive are those."""
    state = rule_vit(SMALL).state_dict()
    head = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    save_file({**state, **head}, tmp_path / "model.safetensors")
    server = make_hub((tmp_path / "model.safetensors").read_bytes())

    code = (
        "from extractor import ViTExtractor\n"
        f"vit = ViTExtractor('{SMALL}', 16, device='cpu')\n"
        "print(float(vit.model.pos_embed.sum()))"
    )
    env = dict(os.environ)
    env.pop("HF_HUB_OFFLINE", None)
    env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    env["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", code]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(float(state["pos_embed"].sum()), abs=1e-4)


def test_without_a_network(cli, tmp_path):
    photo = ROOT / "assets/sample.jpg"
    ran = cli("extractor", "--image_path", photo, "--output_path", tmp_path / "x.pth")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "https://huggingface.co/timm/vit_small_patch8_224.dino" in ran.err
    assert "as backbone_path" in ran.err


def test_a_failed_connection_leaves_the_hubs_client_as_it_was(monkeypatch):
    constants = huggingface_hub.constants
    seen = []

    def create(tag, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("not in the cache")

    monkeypatch.setattr(backbones.timm, "create_model", create)
    monkeypatch.setattr(backbones, "hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="cannot download"):
        build_backbone("dino_vits16")
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_is_probed_at_the_port_of_its_scheme(monkeypatch):
    probed = []

    def connect(address, timeout):
        probed.append(address)
        raise OSError

    monkeypatch.setattr(backbones.socket, "create_connection", connect)
    monkeypatch.setattr(backbones, "getproxies", lambda: {"no": "example.org"})
    for hub in ("http://mirror", "https://mirror", "http://mirror:8080"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub)
        assert not backbones.hub_answers()
    assert probed == [("mirror", 80), ("mirror", 443), ("mirror", 8080)]

    monkeypatch.setattr(backbones, "getproxies", lambda: {"all": "http://proxy"})
    assert backbones.hub_answers()
    assert len(probed) == 3


def test_a_vit_that_was_never_trained_needs_a_file():
    message = r"No pretrained weights exist for vit_giant_.*: pass .* as backb"
    with pytest.raises(ValueError, match=message):
        build_backbone("vit_giant_patch14_224")


def test_offline_by_the_users_will_probes_nothing(monkeypatch):
    def probe():
        raise AssertionError("the hub was probed")

    monkeypatch.setattr(backbones, "hub_answers", probe)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot download"):
        build_backbone("dino_vits16")


# ---- devices ------------------------------------------------------------------------------------


def test_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"cuda:99 cannot compute .*: take another device"):
        pick_device("cuda:99")
