"""eval_tokencut.py: the golden boxes, dense eigh, small VOC and COCO trees with known objects, every flag, bad input."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageDraw
from plain_tokencut import (
    blobs,
    coco_instances,
    plain_box,
    plain_dinoseg,
    plain_iou,
    plain_select,
    plain_tokencut,
    same_selection,
)
from torchvision.datasets import VOCDetection

import eval_tokencut
from eval_tokencut import MOST, affinity, box_iou, dinoseg, read_coco20k, read_voc, second_eigenvector, to_input, tokencut
from extractor import IMAGENET, ViTExtractor

# ---- small data sets ------------------------------------------------------------------------------------------------

OBJECT = """<object><name>cat</name><difficult>{}</difficult><truncated>{}</truncated>
<part><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""

# name: (size, box x0 y0 x1 y1 of the red object, annotated objects: difficult, truncated, and VOC's corners, from 1)
PHOTOS = {
    "easy": ((224, 224), (48, 64, 112, 160), [(0, 0, 49, 65, 112, 160)]),
    "wide": ((448, 224), (32, 64, 128, 112), [(0, 0, 200, 1, 400, 224), (0, 0, 33, 65, 128, 112)]),
    "difficult": ((224, 224), (0, 0, 64, 64), [(1, 0, 1, 1, 64, 64)]),
    "truncated": ((224, 224), (160, 160, 224, 224), [(0, 1, 161, 161, 224, 224), (0, 0, 1, 1, 20, 20)]),
    "pixel": ((448, 448), (64, 64, 128, 128), [(0, 0, 70, 70, 70, 70)]),
    "empty": ((224, 224), (64, 64, 128, 128), []),
}


def draw(path, size, box):
    """A blue photo with a red object."""
    photo = Image.new("RGB", size, "blue")
    ImageDraw.Draw(photo).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="red")
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, "PNG")  # exact colours, whatever the name says


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """A folder with VOC2012 of the PHOTOS above."""
    root = tmp_path_factory.mktemp("voc")
    home = root / "VOCdevkit/VOC2012"
    for folder in ("Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True)
    for name, (size, box, objects) in PHOTOS.items():
        draw(home / f"JPEGImages/{name}.jpg", size, box)
        xml = "".join(OBJECT.format(*entry) for entry in objects)
        (home / f"Annotations/{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{xml}</annotation>")
    (home / "ImageSets/Main/trainval.txt").write_text("\n".join(PHOTOS) + "\n")
    (home / "ImageSets/Main/val.txt").write_text("easy  1\n\n")
    (home / "ImageSets/Main/none.txt").write_text("\n")
    return root


@pytest.fixture
def coco(tmp_path):
    """A folder with COCO20k of three listed images out of four: one object, a crowd only, none."""
    root = tmp_path / "coco"
    boxes = {1: [[47.6, 64.4, 64.2, 95.9], [0, 0, 1, 1]], 2: [[0, 0, 224, 224]], 3: [], 4: [[1, 2, 3, 4]]}
    for i in boxes:
        draw(root / f"COCO/images/train2014/{i}.jpg", (224, 224), (48, 64, 112, 160))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in boxes]
    annotations = [
        {"image_id": i, "bbox": box, "iscrowd": int(i == 2), "segmentation": []} for i in boxes for box in boxes[i]
    ]
    (root / "COCO/annotations").mkdir()
    write_json(root / "COCO/annotations/instances_train2014.json", {"images": images, "annotations": annotations})
    (root / "coco_20k_filenames.txt").write_text("train2014/3.jpg\ntrain2014/1.jpg\ntrain2014/2.jpg\n")
    return root


def write_json(path, content):
    path.write_text(json.dumps(content))


def colours(images):
    """Features of the backbone that these photos need: the colour of each cell of 16 pixels."""
    return F.avg_pool2d(images, 16)


SQUARE = partial(to_input, size=224, normalize=lambda image: image, patch=16, most=MOST * 256)
NATIVE = partial(SQUARE, size=None)


def run_lines(folder):
    """Settings and {name: entry} of a predictions file."""
    lines = [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]
    return lines[0]["settings"], {line.pop("name"): line for line in lines[1:]}


# ---- the golden numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lift", [False, True], ids=["backbone", "lift"])
@pytest.mark.parametrize("dataset, tau", [("VOC12", 0.2), ("VOC12", 0.6), ("COCO20k", 0.3)])
def test_golden(cli, shared, vit_tiny, golden_lift, tmp_path, dataset, tau, lift):
    folder, key = {"VOC12": ("voc", "voc12_trainval"), "COCO20k": ("coco20k", "coco20k_train")}[dataset]
    flags = ["--lift_path", golden_lift] if lift else []
    flags += [] if dataset == "COCO20k" else ["--tau", tau]  # COCO20k's is the default
    flags += ["--dataset", dataset, "--dataroot", shared / "data" / folder, "--output_dir", tmp_path, "--device", "cpu"]
    ran = cli("eval_tokencut", *vit_tiny, *flags)
    assert ran.code == 0, ran.err
    golden = json.loads((shared / "golden/tokencut.json").read_text())
    golden = golden[key][f"tau_{tau}"]["with_lift" if lift else "without_lift"]
    line = json.loads(ran.out.splitlines()[-1])
    assert line["results"]["images"] == golden["images"] and line["settings"]["tau"] == tau
    assert abs(line["results"]["corloc"] - golden["corloc"]) <= 0.5
    _, found = run_lines(tmp_path)
    assert found.keys() == golden["predictions"].keys()
    assert np.mean([found[name]["box"] == entry["box"] for name, entry in golden["predictions"].items()]) >= 0.95
    assert np.mean([found[name]["correct"] == entry["correct"] for name, entry in golden["predictions"].items()]) >= 0.95


# ---- the cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, count", [(14, 20), (20, 100)], ids=["lapack", "lanczos"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "weighted"])
def test_same_object_as_dense_eigh(side, count, binary):
    same = 0
    for seed in range(count):
        feats = blobs(side, channels=32, seed=seed)
        heat, mask, cell = plain_tokencut(feats, 0.2, binary=binary)
        part = tokencut(feats, 0.2, binary=binary)
        same += part.seed == cell and plain_box(part.mask, 224) == plain_box(mask, 224)
        cosine = (part.heat * heat).sum() / np.linalg.norm(part.heat) / np.linalg.norm(heat)
        assert part.heat.shape == (side, side) and cosine > 0.999
    assert same >= 0.99 * count


def test_no_large_matrix_in_double_precision():
    assert affinity(blobs(16), 0.2).dtype == np.float64 and affinity(blobs(17), 0.2).dtype == np.float32
    assert affinity(blobs(17), 0.2, binary=False).dtype == np.float32


def test_affinity_known_values():
    feats = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])[:, None]  # cosines 1/sqrt(2), 0, 1/sqrt(2)
    half = 0.5**0.5
    np.testing.assert_array_equal(affinity(feats, 0.5, 0.01), [[1, 1, 0.01], [1, 1, 1], [0.01, 1, 1]])
    np.testing.assert_allclose(affinity(feats, 0.5, 0.01, binary=False), [[1, half, 0.01], [half, 1, half], [0.01, half, 1]])


@pytest.mark.parametrize("side", [12, 30])
def test_object_of_two_regions(side):
    feats = torch.zeros(2, side, side)
    feats[0] = 1
    feats[:, 2:5, 3:8] = torch.tensor([0.0, 1.0])[:, None, None]  # the object
    feats[:, 8, 1] = torch.tensor([0.0, 1.0])                    # as the object, but apart from it
    part = tokencut(feats, 0.2)
    wanted = np.zeros((side, side), bool)
    wanted[2:5, 3:8] = True
    assert (part.mask == wanted).all() and part.mask.flat[part.seed]
    assert part.heat.flat[part.seed] == pytest.approx(part.heat.max())
    mirrored = tokencut(feats.flip(1, 2), 0.2)
    assert mirrored.mask.sum() in (15, 1)  # the seed may be the cell that is apart


@pytest.mark.parametrize("side", [1, 2, 14, 28])
@pytest.mark.parametrize("binary", [True, False])
def test_constant_graph_is_one_defined_cell(side, binary):
    part = tokencut(torch.ones(4, side, side), 0.2, binary=binary)
    assert part.mask.sum() == 1 and part.seed == min(1, side * side - 1) and part.mask.flat[part.seed]


@pytest.mark.parametrize("side", [14, 28])
def test_graph_that_falls_apart(side):
    """No two cells are alike: every part is as good as any other, but the answer is one, and always the same."""
    graph = np.where(np.eye(side * side) > 0, np.float32(1), np.float32(1e-5))
    first, second = second_eigenvector(graph.copy()), second_eigenvector(graph.copy())
    assert np.isfinite(first).all() and np.ptp(first) > 0
    np.testing.assert_array_equal(first, second)
    assert tokencut(torch.zeros(4, side, side), 0.2).mask.sum() == 1


def test_ties_go_to_the_first_cell():
    feats = torch.ones(3, 20, 20)
    feats[:2, 0, 5] = feats[:2, 9, 9] = -1  # two cells, alike and unlike all others
    assert tokencut(feats, 0.5).seed == 5


def test_dinoseg_against_plain():
    attention = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) ** 4
    for head in range(3):
        part = dinoseg(attention, head)
        assert part.mask.sum() == plain_dinoseg(attention[head]).sum() > 1
        assert part.mask.flat[part.seed] and attention[head].flatten()[part.seed] == attention[head][part.mask].max()


def test_iou_against_plain():
    corners = np.random.RandomState(0).randint(0, 50, (200, 4)).astype(float)
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1)
    np.testing.assert_allclose(box_iou(boxes[0], boxes), [plain_iou(boxes[0], box) for box in boxes], rtol=1e-12)
    assert box_iou(boxes[0], np.zeros((0, 4))).shape == (0,)
    np.testing.assert_allclose(box_iou(np.array([0.0, 0, 10, 10]), np.array([[5.0, 0, 15, 10]])), 1 / 3, atol=1e-6)


# ---- data sets ------------------------------------------------------------------------------------------------------


def test_voc_equals_torchvision(voc):
    ours, theirs = read_voc(voc, "2012", "trainval"), VOCDetection(voc, "2012", "trainval")
    assert [str(sample.path) for sample in ours] == theirs.images
    for sample, (_, target) in zip(ours, theirs):
        objects = [entry["bndbox"] for entry in target["annotation"].get("object", [])]
        wanted = [[int(b["xmin"]) - 1, int(b["ymin"]) - 1, int(b["xmax"]), int(b["ymax"])] for b in objects]
        assert sample.boxes.tolist() == wanted


@pytest.mark.parametrize("no_hard, images", [(False, 6), (True, 4)])
def test_corloc_of_known_objects(voc, no_hard, images):
    found = ["easy", "wide"] if no_hard else ["easy", "wide", "difficult", "truncated"]
    samples = read_voc(voc, "2012", "trainval", no_hard)
    results = eval_tokencut.evaluate(samples, colours, tokencut, SQUARE)
    assert [name for name, entry in results["predictions"].items() if entry["correct"]] == [f"{name}.jpg" for name in found]
    assert results["images"] == images and results["found"] == len(found)
    assert results["corloc"] == pytest.approx(100 * len(found) / images)
    wide = results["predictions"]["wide.jpg"]
    assert wide["photo_box"] == [32, 64, 128, 112] and wide["box"] == [16, 64, 64, 112] and wide["iou"] == pytest.approx(1)


def test_native_size_pads_and_clips(tmp_path):
    draw(tmp_path / "a.png", (90, 70), (64, 32, 90, 70))
    sample = eval_tokencut.Sample("a.png", tmp_path / "a.png", np.array([[64.0, 32, 90, 70]]))
    images, inner = NATIVE(Image.open(sample.path))
    assert images.shape == (1, 3, 80, 96) and inner == (90, 70) and images[0, :, :, 90:].abs().max() == 0
    fine = partial(F.avg_pool2d, kernel_size=2)  # cells of 2 pixels, of which the last ones hold nothing but padding
    for maps in (colours, fine):
        entry = eval_tokencut.evaluate([sample], maps, tokencut, NATIVE)["predictions"]["a.png"]
        assert entry["box"] == entry["photo_box"] == [64, 32, 90, 70] and entry["correct"]


def test_coco_boxes(coco):
    samples = read_coco20k(coco)
    assert [sample.name for sample in samples] == ["1.jpg", "2.jpg", "3.jpg"]
    assert [sample.boxes.tolist() for sample in samples] == [[[48, 64, 112, 160], [0, 0, 1, 1]], [], []]
    results = eval_tokencut.evaluate(samples, colours, tokencut, SQUARE)
    assert results["found"] == 1 and results["images"] == 3


def test_coco_selection_is_kept_beside_the_list_and_renewed(coco):
    kept, full = coco / "instances_train2014_sel20k.json", coco / "COCO/annotations/instances_train2014.json"
    first = read_coco20k(coco)
    assert [image["file_name"] for image in json.loads(kept.read_text())["images"]] == ["1.jpg", "2.jpg", "3.jpg"]
    hidden = full.rename(coco / "hidden")
    assert str(read_coco20k(coco)) == str(first)  # from the file kept
    (coco / "coco_20k_filenames.txt").rename(coco / "no_list")
    assert str(read_coco20k(coco)) == str(first)  # and without the list
    (coco / "coco_20k_filenames.txt").write_text("train2014/4.jpg")
    hidden.rename(full)
    assert [sample.boxes.tolist() for sample in read_coco20k(coco)] == [[[1, 2, 4, 6]]]  # another list: built again


def test_coco_selection_in_a_folder_that_cannot_be_written(coco, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(eval_tokencut, "replacing", refuse)
    assert len(read_coco20k(coco)) == 3
    assert "Permission denied" in capsys.readouterr().err


def test_select_against_plain():
    instances = coco_instances(images=300, boxes=2000)
    names = [image["file_name"] for image in instances["images"][::3]]
    same_selection(plain_select(instances, names), eval_tokencut.select(instances, names))


# ---- the command line, on rule weights ------------------------------------------------------------------------------


@pytest.fixture
def run(cli, voc, rule_backbone, tmp_path):
    """run(flags...) evaluates the small VOC -> (JSON line, settings in the predictions file, {name: entry})."""

    def call(*flags, folder="out"):
        base = ["--dataroot", voc, "--dataset", "VOC12", "--device", "cpu", "--output_dir", tmp_path / folder]
        ran = cli("eval_tokencut", *rule_backbone, *base, *flags)
        assert ran.code == 0, ran.err
        return json.loads(ran.out.splitlines()[-1]), *run_lines(tmp_path / folder)

    return call


def test_line_table_and_json_file(cli, voc, rule_backbone, tmp_path):
    flags = ["--dataroot", voc, "--dataset", "VOC12", "--set", "val", "--output_dir", tmp_path]
    ran = cli("eval_tokencut", *rule_backbone, *flags, "--json", tmp_path / "deep/line.json")
    table, line = ran.out.splitlines()
    assert (tmp_path / "deep/line.json").read_text() == line + "\n"
    results = json.loads(line)["results"]
    assert results.keys() == {"corloc", "found", "images"} and results["images"] == 1
    assert table.split() == ["images", "1", "found", str(results["found"]), "CorLoc", f"{results['corloc']:.2f}"]
    assert "CorLoc" in ran.err and "1/1" in ran.err


def test_predictions_equal_plain(run, voc, tmp_path):
    line, settings, found = run("--save-feat-dir", tmp_path / "maps", "--tau", 0.9)
    assert settings["tau"] == 0.9 and list(found) == [f"{name}.jpg" for name in PHOTOS]
    assert line["results"]["images"] == len(PHOTOS)
    for sample in read_voc(voc, "2012", "trainval"):
        feats = torch.from_numpy(np.load(tmp_path / f"maps/{sample.name}.npy"))
        _, mask, seed = plain_tokencut(feats, 0.9)
        entry, size = found[sample.name], Image.open(sample.path).size
        assert feats.shape == (192, 14, 14)
        assert (entry["box"], entry["seed"]) == (plain_box(mask, 224), seed)
        truth = [[int(x * 224 / side) for x, side in zip(box, size * 2)] for box in sample.boxes]
        assert entry["iou"] == pytest.approx(max((plain_iou(entry["box"], box) for box in truth), default=0))


def test_flags_of_the_graph(cli, rule_backbone, tmp_path):
    for i in range(6):
        pixels = np.random.RandomState(i).randint(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    variants = {"base": (0.7, 1e-5, True), "tau": (0.8, 1e-5, True), "eps": (0.7, 0.5, True), "weighted": (0.7, 1e-5, False)}
    boxes = {}
    for name, (tau, eps, binary) in variants.items():
        out = tmp_path / name
        flags = ["--tau", tau, "--eps", eps, "--visualize", "pred"] + ["--no-binary-graph"] * (not binary)
        paths = ["--image_path", tmp_path / "?.png", "--output_dir", out, "--save-feat-dir", out / "maps"]
        assert cli("eval_tokencut", *rule_backbone, *paths, *flags).code == 0
        boxes[name] = [entry["box"] for entry in run_lines(out)[1].values()]
        maps = [torch.from_numpy(np.load(out / f"maps/{i}.png.npy")) for i in range(6)]
        assert boxes[name] == [plain_box(plain_tokencut(feats, tau, eps, binary)[1], 224) for feats in maps]
    assert all(boxes[name] != boxes["base"] for name in ("tau", "eps", "weighted"))


def test_flags_of_the_input(run, rule_backbone, voc, tmp_path):
    extractor = ViTExtractor(rule_backbone[1], backbone_path=rule_backbone[3], device="cpu")
    photo = Image.open(voc / "VOCdevkit/VOC2012/JPEGImages/wide.jpg")
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    for name, flags, size, (m, s) in [
        ("own", [], (224, 224), (0.5, 0.5)),
        ("small", ["--imsize", 64], (64, 64), (0.5, 0.5)),
        ("imagenet", ["--imagenet_norm"], (224, 224), (mean, std)),
        ("native", ["--native"], photo.size, (0.5, 0.5)),
    ]:
        run("--save-feat-dir", tmp_path / name / "maps", *flags, folder=name)
        pixels = torch.from_numpy(np.array(photo.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        wanted = extractor(((pixels - m) / s)[None].float())[0]
        np.testing.assert_allclose(np.load(tmp_path / name / "maps/wide.jpg.npy"), wanted, atol=1e-4)


def test_upsampling_and_no_hard(run, rule_lift, tmp_path):
    for name, flags, grid in [("bi", ["--upsample", "bilinear"], 28), ("lift", ["--lift_path", rule_lift, "--lift_iter", 2], 56)]:
        line, *_ = run("--save-feat-dir", tmp_path / name / "maps", "--no_hard", *flags, folder=name)
        assert np.load(tmp_path / name / "maps/easy.jpg.npy").shape == (192, grid, grid)
        assert line["results"]["images"] == 4


def test_dinoseg(run, rule_backbone, voc):
    found = [run("--dinoseg", "--dinoseg_head", head, folder=f"head{head}")[2] for head in (0, 2)]
    extractor = ViTExtractor(rule_backbone[1], backbone_path=rule_backbone[3], device="cpu")
    images, _ = SQUARE(Image.open(voc / "VOCdevkit/VOC2012/JPEGImages/pixel.jpg"), normalize=extractor.normalize)
    caught = {}
    block = extractor.model.blocks[-1]
    hook = block.attn.qkv.register_forward_hook(lambda module, args, output: caught.update(qkv=output))
    extractor.model(images)
    hook.remove()
    q, k, _ = caught["qkv"].unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
    attention = (q[:, :, :1] @ k.mT / 8).softmax(-1)[0, :, 0, 1:].unflatten(1, (14, 14))
    for head, entries in zip((0, 2), found):
        assert entries["pixel.jpg"]["box"] == plain_box(plain_dinoseg(attention[head]), 224)


def test_without_predictions(cli, voc, rule_backbone, tmp_path):
    flags = ["--dataroot", voc, "--dataset", "VOC12", "--output_dir", tmp_path / "out", "--no-save_predictions"]
    ran = cli("eval_tokencut", *rule_backbone, *flags)
    assert ran.code == 0 and not (tmp_path / "out").exists()
    assert json.loads(ran.out.splitlines()[-1])["results"]["images"] == len(PHOTOS)


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, kinds", [("attn", ["attn"]), ("pred", ["pred"]), ("all", ["attn", "mask", "pred"])])
def test_visualize(run, tmp_path, what, kinds):
    _, _, found = run("--set", "val", "--visualize", what)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in pictures] == [f"easy.jpg_{kind}.png" for kind in kinds]
    assert all(Image.open(path).size == (224, 224) for path in pictures)
    if "pred" in kinds:
        picture = Image.open(tmp_path / "out/easy.jpg_pred.png")
        x0, y0, _, _ = map(int, found["easy.jpg"]["photo_box"])
        assert picture.getpixel((x0, y0)) == (255, 0, 0) and picture.getpixel((48, 100)) in ((0, 255, 0), (255, 0, 0))


def test_pictures_show_what_was_found(voc, tmp_path):
    sample = read_voc(voc, "2012", "trainval")[1]
    photo, _, part, extent, entry = eval_tokencut.discover(sample, colours, tokencut, SQUARE)
    eval_tokencut.save_pictures(tmp_path, "all", sample, photo, part, extent, entry)
    heat, mask, box = (Image.open(tmp_path / f"wide.jpg_{kind}.png") for kind in ("attn", "mask", "pred"))
    assert heat.size == mask.size == box.size == (448, 224)
    inside, outside = (80, 90), (300, 90)
    assert mask.getpixel(inside) == (255, 0, 0) and mask.getpixel(outside) == (0, 0, 63)
    assert heat.getpixel(inside)[1] > heat.getpixel(outside)[1] + 50  # viridis ends in yellow and begins in violet
    assert box.getpixel((32, 64)) == box.getpixel((127, 111)) == (255, 0, 0) and box.getpixel((210, 0)) == (0, 255, 0)


def test_photos_without_ground_truth(cli, rule_backbone, tmp_path):
    draw(tmp_path / "photos/a.png", (100, 60), (10, 10, 40, 40))
    draw(tmp_path / "photos/deep/b.png", (60, 100), (10, 10, 40, 40))
    flags = [*rule_backbone, "--imsize", 64, "--image_path"]
    ran = cli("eval_tokencut", *flags, tmp_path / "photos", "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    names = {f"{name}_{kind}.png" for name in ("a.png", "deep/b.png") for kind in ("attn", "mask", "pred")}
    out = tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == names
    assert Image.open(out / "deep/b.png_mask.png").size == (60, 100)
    _, found = run_lines(out)
    assert "correct" not in found["a.png"]
    assert json.loads(ran.out.splitlines()[-1])["results"] == {"images": 2}
    table = [line.split() for line in ran.out.splitlines()[:-1]]
    assert [row[4] for row in table] == ["a.png", "deep/b.png"]
    assert [float(x) for x in table[0][:4]] == pytest.approx(found["a.png"]["photo_box"], abs=0.05)
    one = cli("eval_tokencut", *flags, tmp_path / "photos/a.png", "--output_dir", tmp_path / "one", "--visualize", "pred")
    assert one.code == 0 and [p.name for p in (tmp_path / "one").glob("*.png")] == ["a.png_pred.png"]


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_resume_from_a_file_that_was_cut_off(run, tmp_path, monkeypatch):
    line, _, found = run()
    file = tmp_path / "out/predictions.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    damaged = lines[3].replace("seed", "sead")
    file.write_text("".join(lines[:3]) + damaged + lines[4][:20])  # as a failing disk and a killed run leave it
    read, read_image = [], eval_tokencut.read_image
    monkeypatch.setattr(eval_tokencut, "read_image", lambda path: read.append(path.stem) or read_image(path))
    again, _, found_again = run()
    assert read == list(PHOTOS)[2:]
    assert again["results"] == line["results"] and found_again == found and file.read_text() == whole
    run()
    assert len(read) == len(PHOTOS) - 2 and file.read_text() == whole


def test_a_run_stopped_by_an_image_goes_on(cli, rule_backbone, tmp_path):
    draw(tmp_path / "photos/a.png", (64, 64), (0, 0, 32, 32))
    (tmp_path / "photos/b.png").write_bytes(b"no image")
    flags = [*rule_backbone, "--imsize", 64, "--image_path", tmp_path / "photos", "--output_dir", tmp_path / "out"]
    ran = cli("eval_tokencut", *flags)
    assert ran.code == 2 and "b.png is not a readable image" in ran.err.splitlines()[-1]
    assert list(run_lines(tmp_path / "out")[1]) == ["a.png"]
    draw(tmp_path / "photos/b.png", (64, 64), (0, 0, 32, 32))
    assert cli("eval_tokencut", *flags).code == 0
    assert list(run_lines(tmp_path / "out")[1]) == ["a.png", "b.png"]


def test_other_settings_do_not_mix(run, cli, voc, rule_backbone, tmp_path):
    run("--set", "val")
    before = (tmp_path / "out/predictions.jsonl").read_text()
    flags = ["--dataroot", voc, "--dataset", "VOC12", "--set", "val", "--output_dir", tmp_path / "out", "--tau", 0.3]
    ran = cli("eval_tokencut", *rule_backbone, *flags)
    assert ran.code == 2 and "predictions.jsonl was written with other settings" in ran.err
    assert (tmp_path / "out/predictions.jsonl").read_text() == before


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataroot", "nowhere"], "no folder nowhere"),
        (["--dataset", "VOC07"], "VOC2007: correct --dataroot"),
        (["--dataset", "ImageNet"], "invalid choice: 'ImageNet'"),
        (["--dataset", "COCO20k"], "COCO/images/train2014: correct --dataroot"),
        (["--set", "test"], "test.txt cannot be read"),
        (["--set", "none"], "has no images"),
        (["--tau", "1.5"], "--tau 1.5 is out of range"),
        (["--tau", "nan"], "--tau nan is out of range"),
        (["--eps", "0"], "--eps 0.0 is out of range"),
        (["--imsize", "0"], "--imsize 0 is out of range"),
        (["--imsize", "100"], "multiple of the patch (16)"),
        (["--imsize", "2064"], "more than 16384 cells"),
        (["--dinoseg", "--dinoseg_head", "3"], "--dinoseg_head 3 is out of range: pass one of the heads 0 to 2"),
        (["--dinoseg", "--upsample", "bilinear"], "leave out --lift_path and --upsample"),
        (["--no_hard", "--image_path", "."], "leave out --no_hard"),
        (["--image_path", "nowhere.jpg"], "no images at nowhere.jpg"),
    ],
)
def test_bad_flags(cli, voc, rule_backbone, tmp_path, flags, message):
    base = ["--dataroot", voc, "--dataset", "VOC12", "--device", "cpu", "--output_dir", tmp_path]
    ran = cli("eval_tokencut", *rule_backbone, *base, *flags)
    assert ran.code == 2 and message in ran.err.splitlines()[-1] and "Traceback" not in ran.err and not ran.out


@pytest.mark.parametrize(
    "content",
    ["", "<object>", "<object/></a>", OBJECT.format(0, 0, 1, 1, "x", 4) + "</a>", OBJECT.format(0, "?", 1, 1, 2, 2) + "</a>"],
    ids=["empty", "cut off", "no box", "no number", "no flag"],
)
def test_malformed_xml_is_named(tmp_path, content):
    file = tmp_path / "a.xml"
    file.write_text("<a>" * bool(content) + content)
    with pytest.raises(ValueError, match=r"a\.xml is no VOC annotation \(.*\): restore it"):
        eval_tokencut.voc_boxes(file, no_hard=True)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no COCO annotation file"),
        ("[]", "is no COCO annotation file"),
        ('{"images": []}', "is no COCO annotation file"),
        ('{"images": [{"id": 1}], "annotations": []}', "is no COCO annotation file"),
        ('{"images": [], "annotations": []}', r"no 1\.jpg in the COCO annotations \(3 missing\)"),
    ],
)
def test_malformed_json_is_named(coco, content, message):
    (coco / "COCO/annotations/instances_train2014.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_coco20k(coco)
    assert not (coco / "instances_train2014_sel20k.json").exists()


def test_malformed_coco_box_and_missing_list(coco):
    full = coco / "COCO/annotations/instances_train2014.json"
    content = json.loads(full.read_text())
    content["annotations"][0]["bbox"] = [1, 2, 3]
    write_json(full, content)
    with pytest.raises(ValueError, match="malformed bbox"):
        read_coco20k(coco)
    (coco / "instances_train2014_sel20k.json").unlink()
    (coco / "coco_20k_filenames.txt").unlink()
    with pytest.raises(ValueError, match=r"coco_20k_filenames\.txt cannot be read"):
        read_coco20k(coco)


def test_features_that_are_not_finite(voc):
    with pytest.raises(ValueError, match=r"features of .*easy\.jpg are not finite"):
        eval_tokencut.evaluate(read_voc(voc, "2012", "val"), lambda images: colours(images) / 0, tokencut, SQUARE)


def test_as_a_process(tmp_path):
    command = [sys.executable, ROOT / "eval_tokencut.py", "--dataroot", tmp_path / "none", "--dataset", "VOC12"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and ran.stderr.endswith("correct --dataroot\n")
    assert not list(tmp_path.iterdir())
