"""benchmarks/quality.py: every cell comes from the right script with the right flags, MACs are those of a count by hand."""

import json

import numpy as np
import pytest
import quality
import torch
from PIL import Image

from extractor import ViTExtractor
from lift import LiFT


@pytest.fixture
def dataroot(tmp_path):
    """One SPair pair of random photos in their places; they are the photos for the cosine, too."""
    root, random = tmp_path / "data", np.random.RandomState(0)
    images, pairs = root / "SPair-71k/JPEGImages/cat", root / "SPair-71k/PairAnnotation/test"
    images.mkdir(parents=True)
    pairs.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        small = Image.fromarray(random.randint(0, 256, (8, 8, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(images / name)
    points = random.randint(0, 64, (20, 2)).tolist()
    entry = {"src_imname": "a.png", "trg_imname": "b.png", "src_kps": points, "trg_kps": points, "trg_bndbox": [0, 0, 64, 64]}
    (pairs / "0:cat.json").write_text(json.dumps(entry))
    return root


def last(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])


def test_cells_are_those_of_the_scripts(cli, dataroot, tmp_path, rule_backbone, rule_lift, monkeypatch):
    monkeypatch.setattr(quality, "cost", lambda args: {"GMACs": args.imsize, "ms": args.lift_iter})
    output, photos = tmp_path / "table", dataroot / "SPair-71k/JPEGImages"
    other = {"settings": {"versions": {}}, "command": "another", "machine": "another", "rows": {}}
    output.with_suffix(".json").write_text(json.dumps({"other": other}))
    flags = ["--dataroot", dataroot, "--lift_path", rule_lift, "--imsize", 64, "--photos", photos, "--output", output]
    record = last(cli("quality", *flags, *rule_backbone))
    assert json.loads(output.with_suffix(".json").read_text()) == {"other": other, "vit_tiny_patch16_224": record}

    spair = ["--dataroot", dataroot / "SPair-71k", "--pairs_per_category", 0, *rule_backbone]
    lift = ["--imsize", 64, "--lift_path", rule_lift]
    for row, flags in {
        "backbone": ["--imsize", 64],
        "+ bilinear": ["--imsize", 64, "--upsample", "bilinear"],
        "+ LiFT": lift,
        "+ LiFT x2": [*lift, "--lift_iter", 2],
        "backbone at 128": ["--imsize", 128],
    }.items():
        cells = record["rows"][row]
        dot, cosine = (last(cli("eval_spair", *spair, *flags, "--match", m))["results"]["mean"] for m in ("dot", "cosine"))
        wanted = [dot["pck@0.1"], dot["pck@0.05"], cosine["pck@0.1"]]
        assert [cells[name] for name in ("SPair PCK@.1", "PCK@.05", "PCK@.1 cos")] == wanted
        assert cells["GMACs"] == (128 if row == "backbone at 128" else 64)
        assert cells["ms"] == (2 if row == "+ LiFT x2" else 1)
        assert f"\n| {row} | {quality.number(wanted[0])} |" in output.with_suffix(".md").read_text()

    measure = ["--evaluate", rule_lift, "--val_dataroot", photos, "--imsize", 128, "--workers", 0]
    wanted = last(cli("train_lift", *measure, *rule_backbone))["results"][str(photos)]
    twice, four = ({row: cells.get(f"cosine {n}") for row, cells in record["rows"].items()} for n in ("x2", "x4"))
    names = ("backbone", "+ bilinear", "+ LiFT")
    assert [twice[name] for name in names] == pytest.approx([wanted[name] for name in ("nearest", "bilinear", "lift")])
    assert four["+ bilinear"] == pytest.approx(wanted["bilinear_twice"])
    assert four["+ LiFT x2"] == pytest.approx(wanted["lift_twice"])


def test_macs_are_those_of_a_count_by_hand(rule_backbone):
    """oneDNN's linear layers and fused attention, which torch's counter passes over, are in."""
    extractor = ViTExtractor(rule_backbone[1], device="cpu", backbone_path=rule_backbone[3])
    images, width, tokens, cells = torch.zeros(1, 3, 224, 224), 192, 197, 196
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert quality.count_macs(lambda: extractor(images)) == cells * 768 * width + 11 * block + tokens * width**2
    mid, half = (width + 32) // 2, width // 2
    photo = 112**2 * 32 * 27 + 56**2 * 32 * 288 + 14**2 * 32 * 288
    fused = cells * (width + 32) * 4 * mid + 4 * cells * 9 * half * (mid + 32 + half) + 4 * cells * half * width
    lift, feats = LiFT(width).eval(), torch.zeros(1, width, 14, 14)
    assert quality.count_macs(lambda: lift(images, feats)) == photo + fused


def test_no_data_is_one_line(cli, tmp_path):
    ran = cli("quality", "--dataroot", tmp_path, "--lift_path", "none.pth")
    assert ran.code == 2 and "correct --dataroot" in ran.err and "Traceback" not in ran.err
