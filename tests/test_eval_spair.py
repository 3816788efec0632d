"""eval_spair.py against the LiFT release's numbers, the plain algorithm, answers known by construction, and bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from plain_spair import plain_map, plain_spair, write_tree
from torch.utils._python_dispatch import TorchDispatchMode

from eval_spair import (
    Described,
    Match,
    Pair,
    best_pixels,
    chunks,
    draw,
    evaluate,
    letterbox,
    match_pairs,
    pixel_norms,
    place,
    read_pairs,
)
from extractor import ViTExtractor
from lift import load_lift, upsample

SIZE = 64


def pooled(images):
    """A stand-in for a network: [B, 3, S, S] in 0..1 -> [B, 24, S/16, S/16] by one fixed random convolution."""
    kernel = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return F.conv2d(images - 0.5, kernel, stride=16)


class Counted:
    """`pooled`, counting the images that pass through it and the largest batch."""

    def __init__(self):
        self.images, self.largest = 0, 0

    def __call__(self, images):
        self.images, self.largest = self.images + len(images), max(self.largest, len(images))
        return pooled(images)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("spair") / "tree")


def last_json(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])


# ---- the release's numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def underscored(shared, tmp_path_factory):
    """The shared sample with its annotations named `..._category.json`."""
    root = tmp_path_factory.mktemp("spair") / "underscored"
    (root / "PairAnnotation/test").mkdir(parents=True)
    (root / "JPEGImages").symlink_to(shared / "data/SPair-71k/JPEGImages")
    for path in (shared / "data/SPair-71k/PairAnnotation/test").iterdir():
        shutil.copyfile(path, root / "PairAnnotation/test" / path.name.replace(":", "_"))
    return root


@pytest.mark.parametrize("key, style", [("without_lift", "_"), ("with_lift", ":")])
def test_golden(cli, shared, underscored, vit_tiny, golden_lift, key, style):
    golden = json.loads((shared / "golden/spair.json").read_text())[key]
    root = underscored if style == "_" else shared / "data/SPair-71k"
    lift = ["--lift_path", golden_lift] if key == "with_lift" else []
    ran = last_json(cli("eval_spair", "--dataroot", root, "--pairs_per_category", 0, *vit_tiny, *lift))
    assert (ran["pairs"], ran["keypoints"], ran["images"]) == (22, 160, 16)
    assert ran["results"].keys() == golden.keys()
    for name, row in golden.items():  # the release divides in float32
        assert ran["results"][name] == pytest.approx(row, abs=1e-5), name


# ---- the plain algorithm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", [64, 80])
def test_equals_plain(tree, size, cosine):
    results, predictions = plain_spair(pooled, tree, size, alphas=(0.3, 0.1), cosine=cosine)
    matches = match_pairs(pooled, read_pairs(tree, per_category=0), size, cosine)
    for match, predicted in zip(matches, predictions):  # outside the centres of border cells all pixels tie, but for rounding
        source, target = (plain_map(pooled, path, size)[0] for path in (match.pair.source, match.pair.target))
        target = F.normalize(target, dim=0) if cosine else target
        x, y = match.source.long().T
        similarity = torch.einsum("ck,cyx->kyx", source[:, y, x], target)
        at_ours, at_plain = (similarity[range(len(p)), p[:, 1], p[:, 0]] for p in (match.predicted, predicted))
        torch.testing.assert_close(at_ours, at_plain, atol=1e-5, rtol=0)
    alike = torch.cat([(match.predicted == p).all(dim=1) for match, p in zip(matches, predictions)])
    assert alike.double().mean() > 0.8
    scored = evaluate([match._replace(predicted=p) for match, p in zip(matches, predictions)], (0.3, 0.1))
    assert scored == {name: pytest.approx(row) for name, row in results.items()}
    assert 0 < scored["mean"]["pck@0.3"] < 100


def test_cosine_is_another_matching(tree):
    pairs = read_pairs(tree, per_category=0)
    dot, cosine = (match_pairs(pooled, pairs, SIZE, cosine=c) for c in (False, True))
    assert any(not torch.equal(a.predicted, b.predicted) for a, b in zip(dot, cosine))


ROWS = {
    "none": [],
    "bilinear": ["--upsample", "bilinear"],
    "stride": ["--stride", "8"],
    "lift": ["--lift_path"],
    "iterated": ["--lift_iter", "2", "--lift_path"],
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_paper(cli, tree, rule_backbone, rule_lift, row):
    lift = [rule_lift] if "--lift_path" in ROWS[row] else []
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 0, "--alpha", 0.3, "--device", "cpu"]
    ran = last_json(cli("eval_spair", *flags, *rule_backbone, *ROWS[row], *lift))
    stride = 8 if row == "stride" else None
    extractor = ViTExtractor("vit_tiny_patch16_224", stride, backbone_path=rule_backbone[3], device="cpu")

    def features(images):
        images = extractor.normalize(images)
        feats = extractor(images)
        if row == "bilinear":
            return F.interpolate(feats, scale_factor=2, mode="bilinear")
        if lift:
            return upsample(load_lift(rule_lift, extractor), images, feats, 2 if row == "iterated" else 1)
        return feats

    results, _ = plain_spair(features, tree, SIZE, alphas=(0.3,))
    for name, row in results.items():  # up to one of 30 keypoints, for a tie that rounding parts
        assert ran["results"][name] == pytest.approx(row, abs=100 / 30 + 1e-6), name


# ---- each image once, bounded memory --------------------------------------------------------------------------------


def test_each_image_once(tree):
    features, pairs = Counted(), read_pairs(tree, per_category=30)
    matches = match_pairs(features, pairs, SIZE, batch_size=2)
    assert (features.images, features.largest) == (6, 2)
    assert [match.pair.path for match in matches] == [pair.path for pair in pairs]


def test_small_cache(tree):
    features, pairs = Counted(), read_pairs(tree, per_category=0)
    small = match_pairs(features, pairs, SIZE, cache_mb=0)
    assert features.images > 6
    for match, other in zip(small, match_pairs(pooled, pairs, SIZE)):
        assert match.pair is other.pair and torch.equal(match.predicted, other.predicted)


@pytest.mark.parametrize("capacity", [2, 3, 5, 7, 20])
def test_chunks(tmp_path, capacity):
    pairs = read_pairs(write_tree(tmp_path, ("cat",), images=7, keypoints=1), per_category=0)
    parts = chunks(pairs, capacity)
    assert sorted(pair.path for part in parts for pair in part) == [pair.path for pair in pairs]
    assert all(len({image for pair in part for image in pair[2:4]}) <= capacity for part in parts)
    assert (len(parts) == 1) == (capacity >= 7)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("cosine", [False, True])
def test_no_dense_map(tree, cosine):
    def features(images):
        return pooled(images).repeat(1, 20, 1, 1)

    with Largest() as largest:
        match_pairs(features, read_pairs(tree, per_category=0), SIZE, cosine, batch_size=1)
    assert SIZE * SIZE < largest.numel <= SIZE * SIZE * 16  # of 480 channels


# ---- answers known by construction ----------------------------------------------------------------------------------


def described(feats, norm=None):
    return Described(feats, norm, (SIZE, SIZE), 1.0, torch.zeros(2))


def test_finds_permuted_cells():
    cells = torch.eye(16)                                                        # 4 x 4 cells, all different
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    source, target = (described(c.T.reshape(16, 4, 4)) for c in (cells, cells[order]))
    centres = torch.tensor([[16 * (i % 4) + 8, 16 * (i // 4) + 8] for i in range(16)]).float()
    x, y = best_pixels(source, target, centres, SIZE).T
    assert torch.equal(y // 16 * 4 + x // 16, order.argsort())
    assert x.dtype == y.dtype == torch.int64


def test_first_of_equals():
    flat = described(torch.ones(1, 4, 4))
    assert best_pixels(flat, flat, torch.tensor([[40.0, 50.0]]), SIZE).tolist() == [[0, 0]]


def test_pixel_norms():
    feats = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    slow = F.interpolate(feats[None], (SIZE, SIZE), mode="bilinear")[0].norm(dim=0)
    torch.testing.assert_close(pixel_norms(feats, SIZE), slow)


@pytest.mark.parametrize("shape, resized, offset", [
    ((120, 90), (64, 48), (0, 8)),
    ((61, 127), (31, 64), (16, 0)),
    ((64, 1), (64, 1), (0, 31)),
])  # fmt: skip
def test_letterbox(shape, resized, offset):
    square, scale, at = letterbox(Image.new("RGB", shape, "white"), SIZE)
    assert (square.size, scale, tuple(at.tolist())) == ((SIZE, SIZE), SIZE / max(shape), offset)
    assert square.getbbox() == (*offset, offset[0] + resized[0], offset[1] + resized[1])


def test_letterbox_rounds_like_numpy():
    assert letterbox(Image.new("RGB", (4, 1), "white"), 10)[0].getbbox() == (0, 4, 10, 6)  # 2.5 -> 2


def test_place():
    image = Described(None, None, (120, 90), SIZE / 120, torch.tensor([0, 8]))
    placed = place(torch.tensor([[0.0, 0.0], [119, 89]]), image, "")
    torch.testing.assert_close(placed, torch.tensor([[0, 8], [63.46667, 55.46667]]))
    for point in ([120.0, 3], [3, 90.0], [-1, 3], [float("nan"), 3]):
        with pytest.raises(ValueError, match="outside its 120x90 image"):
            place(torch.tensor([[1, 1], point]), image, "")


def match_at(category, distances, extent=10.0, path=None):
    """A Match whose predictions miss by these distances."""
    pair = Pair(path, category, path, path, None, None, extent)
    truth = torch.full((len(distances), 2), 20.0)
    return Match(pair, truth, truth, truth + torch.tensor([[d, 0.0] for d in distances]), extent)


MATCHES = [match_at("a", [0, 5, 9, 9]), match_at("a", [0]), match_at("b", [4, 9, 9, 9, 9])]


@pytest.mark.parametrize("average, a, mean", [
    ("category", 100 * 2 / 5, 100 * (2 / 5 + 1 / 5) / 2),
    ("keypoint", 100 * 2 / 5, 100 * 3 / 10),
    ("image", 100 * (1 / 4 + 1) / 2, 100 * (1 / 4 + 1 + 1 / 5) / 3),
])  # fmt: skip
def test_average(average, a, mean):
    results = evaluate(MATCHES, (0.5,), average=average)
    assert results["a"] == pytest.approx({"pairs": 2, "keypoints": 5, "pck@0.5": a})
    assert results["b"] == pytest.approx({"pairs": 1, "keypoints": 5, "pck@0.5": 20})
    assert results["mean"] == pytest.approx({"pck@0.5": mean})


@pytest.mark.parametrize("threshold, hits", [("lt", 2), ("le", 3)])
def test_threshold(threshold, hits):
    assert evaluate(MATCHES[:2], (0.5,), threshold)["a"]["pck@0.5"] == pytest.approx(100 * hits / 5)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_sampling(tree):
    np.random.seed(3)
    expected = [np.random.choice(6, 10) for _ in range(2)]
    pairs, everything = read_pairs(tree, per_category=10, seed=3), read_pairs(tree, per_category=0)
    assert [pair.path for pair in everything] == sorted((pair.path for pair in everything), key=lambda p: (p.name[-8:], p))
    assert [pair.path for pair in pairs] == [everything[6 * c + i].path for c in range(2) for i in expected[c]]
    assert [pair.category for pair in pairs] == ["cat"] * 10 + ["dog"] * 10


def test_categories_and_split(cli, tmp_path, rule_backbone):
    tree = write_tree(tmp_path, ("cow", "cat", "at"), images=2)
    (tree / "PairAnnotation/test").rename(tree / "PairAnnotation/val")
    flags = ["--dataroot", tree, "--imsize", SIZE, "--split", "val", *rule_backbone]
    ran = last_json(cli("eval_spair", *flags, "--categories", "cow", "at", "--pairs_per_category", 3))
    assert [(name, row.get("pairs")) for name, row in ran["results"].items()] == [("at", 3), ("cow", 3), ("mean", None)]


# ---- output ---------------------------------------------------------------------------------------------------------


def test_output(cli, tree, tmp_path, rule_backbone):
    file, pictures = tmp_path / "new/result.json", tmp_path / "pictures"
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 2, "--match", "cosine", "--threshold", "le"]
    flags += ["--average", "image", "--json", file, "--visualize", 3, "--output_dir", pictures, *rule_backbone]
    ran = cli("eval_spair", *flags)
    line = last_json(ran)
    assert json.loads(file.read_text()) == line
    assert line["settings"]["match"] == "cosine" and line["settings"]["versions"]["torch"] == torch.__version__
    assert (line["pairs"], line["keypoints"]) == (4, 20)
    mean = next(row for row in ran.out.splitlines() if row.startswith("mean")).split()[1:]
    assert mean == [f"{line['results']['mean'][key]:.2f}" for key in ("pck@0.1", "pck@0.05", "pck@0.01")]
    assert 1 <= len(list(pictures.glob("*_*.png"))) <= 3
    assert not list(pictures.glob("*:*")) and len(list(pictures.iterdir())) == len(list(pictures.glob("*.png")))


def test_draw(tmp_path):
    black = tmp_path / "black.png"
    Image.new("RGB", (SIZE, SIZE)).save(black)
    match = match_at("a", [0.0, 40.0], path=black)
    picture = draw(match, SIZE, 0.1, "lt", side=2 * SIZE)
    assert picture.size == (4 * SIZE, 2 * SIZE)
    assert picture.getpixel((40, 40)) == (0, 255, 255)                            # second keypoint over the first, source
    assert picture.getpixel((2 * SIZE + 120, 40)) == (0, 255, 255)                # its prediction in the target
    assert picture.getpixel((2 * SIZE + 80, 40)) == (255, 0, 0)                   # a red line: wrong
    right = draw(match, SIZE, 5, "lt", side=2 * SIZE)
    assert right.getpixel((2 * SIZE + 80, 40)) == (0, 255, 0)                     # green: right


# ---- bad input ------------------------------------------------------------------------------------------------------


def first_annotation(root):
    return sorted(root.glob("PairAnnotation/test/*cat.json"))[0]


def change(**entries):
    def spoil(root):
        path = first_annotation(root)
        entry = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in entry.items() if value is not None}))

    return spoil


def empty_category(root):
    (root / "JPEGImages/zebra").mkdir()


def truncated(root):
    path = root / "JPEGImages/cat/0001.jpg"
    path.write_bytes(path.read_bytes()[:300])


POINTS = [[5, 5]] * 5
SPOILED = {
    "no such folder": (lambda root: shutil.rmtree(root / "PairAnnotation"), [], "--dataroot"),
    "no images folder": (lambda root: shutil.rmtree(root / "JPEGImages"), [], "--dataroot"),
    "no such split": (lambda root: None, ["--split", "trn"], "--split"),
    "unknown category": (lambda root: None, ["--categories", "cat", "bird"], "'bird'"),
    "category without pairs": (empty_category, [], "'zebra'"),
    "malformed JSON": (lambda root: first_annotation(root).write_text('{"src_kps": ['), [], "annotation"),
    "not an object": (lambda root: first_annotation(root).write_text("[]"), [], "annotation"),
    "missing key": (change(trg_bndbox=None), [], "trg_bndbox"),
    "null points": (change(src_kps=[None] * 5), [], "src_kps"),
    "points are an object": (change(src_kps={}), [], "annotation"),
    "counts differ": (change(src_kps=POINTS[:2]), [], "src_kps"),
    "no keypoints": (change(src_kps=[], trg_kps=[]), [], "src_kps"),
    "source keypoint outside": (change(src_kps=[*POINTS[:4], [4000, 3]]), [], "4000"),
    "target keypoint outside": (change(trg_kps=[[5, -7], *POINTS[:4]]), [], "-7"),
    "missing image": (lambda root: (root / "JPEGImages/dog/0002.jpg").unlink(), [], "0002.jpg"),
    "truncated image": (truncated, [], "0001.jpg"),
    "imsize": (lambda root: None, ["--imsize", 70], "16"),
    "no imsize": (lambda root: None, ["--imsize", 0], "--imsize"),
    "negative count": (lambda root: None, ["--pairs_per_category", -1], "--pairs_per_category"),
    "no batch": (lambda root: None, ["--batch_size", 0], "--batch_size"),
    "lift without module": (lambda root: None, ["--upsample", "lift"], "--lift_path"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_input(cli, tree, tmp_path, rule_backbone, case):
    spoil, flags, word = SPOILED[case]
    shutil.copytree(tree, tmp_path / "tree")
    spoil(tmp_path / "tree")
    (tmp_path / "result.json").write_text("an earlier result")
    common = ["--dataroot", tmp_path / "tree", "--imsize", SIZE, "--pairs_per_category", 0]
    ran = cli("eval_spair", *common, "--json", tmp_path / "result.json", *rule_backbone, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1 and word in ran.err and ":" in ran.err, ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "tree"]
    assert (tmp_path / "result.json").read_text() == "an earlier result"


def test_as_a_program(tmp_path, rule_backbone):
    script = Path(__file__).parent.parent / "eval_spair.py"
    command = [sys.executable, script, "--dataroot", tmp_path / "nowhere", *rule_backbone]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and "nowhere" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
