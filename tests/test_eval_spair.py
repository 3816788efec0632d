"""eval_spair.py against the LiFT release's numbers and against the plain algorithm.

Then answers known by construction, what is printed and drawn, and bad input.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from plain_spair import plain_map, plain_pair, plain_spair, todays_spair, write_tree
from torch.utils._python_dispatch import TorchDispatchMode

from eval_spair import (
    Described,
    Match,
    Pair,
    best_pixels,
    chunks,
    draw,
    evaluate,
    images_of,
    letterbox,
    match_pair,
    match_pairs,
    pixel_norms,
    place,
    read_pairs,
)
from extractor import ViTExtractor
from lift import load_lift, tokens_to_map, upsample

SIZE = 64


def pooled(images):
    """A stand-in for a network: one fixed random convolution.

    [B, 3, S, S] in 0..1 -> [B, 24, S/16, S/16]
    """
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(24, 3, 16, 16, generator=generator)
    return F.conv2d(images - 0.5, kernel, stride=16)


class Counted:
    """`pooled`, counting the images that pass through it and the largest batch."""

    def __init__(self):
        self.images = 0
        self.largest = 0

    def __call__(self, images):
        self.images += len(images)
        self.largest = max(self.largest, len(images))
        return pooled(images)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("spair") / "tree")


def report(ran):
    assert ran.code == 0, ran.err
    return ran.report()


# ---- the release's numbers ----------------------------------------------------------------------


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
    root = shared / "data/SPair-71k"
    if style == "_":
        root = underscored
    flags = ["--dataroot", root, "--pairs_per_category", 0, *vit_tiny]
    if key == "with_lift":
        flags += ["--lift_path", golden_lift]

    ran = report(cli("eval_spair", *flags))
    assert (ran["pairs"], ran["keypoints"], ran["images"]) == (22, 160, 16)
    assert ran["results"].keys() == golden.keys()
    for name, row in golden.items():  # the release divides in float32
        assert ran["results"][name] == pytest.approx(row, abs=1e-5), name


# ---- the plain algorithm ------------------------------------------------------------------------


def similarity_maps(match, size, cosine):
    """Similarities [K, S, S] of a match's keypoints with all pixels, from dense maps."""
    source, _, _ = plain_map(pooled, match.pair.source, size)
    target, _, _ = plain_map(pooled, match.pair.target, size)
    if cosine:
        target = F.normalize(target, dim=0)
    x, y = match.source.long().T
    return torch.einsum("ck,cyx->kyx", source[:, y, x], target)


def values_at(maps, points):
    """The values [K] of maps [K, S, S], each at its own point of [K, 2]."""
    return maps[range(len(points)), points[:, 1], points[:, 0]]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", [64, 80])
def test_equals_plain(tree, size, cosine):
    results, predictions = plain_spair(pooled, tree, size, alphas=(0.3, 0.1), cosine=cosine)
    matches = match_pairs(pooled, read_pairs(tree, per_category=0), size, cosine)

    # Outside the centres of border cells all pixels tie, but for rounding. So similarities are
    # compared, and the scores of the plain predictions: those do not depend on our ties.
    alike = []
    with_plain_predictions = []
    for match, predicted in zip(matches, predictions):
        maps = similarity_maps(match, size, cosine)
        at_ours = values_at(maps, match.predicted)
        at_plain = values_at(maps, predicted)
        torch.testing.assert_close(at_ours, at_plain, atol=1e-5, rtol=0)
        alike.append((match.predicted == predicted).all(dim=1))
        with_plain_predictions.append(match._replace(predicted=predicted))
    assert torch.cat(alike).double().mean() > 0.8

    scored = evaluate(with_plain_predictions, (0.3, 0.1))
    assert scored == {name: pytest.approx(row) for name, row in results.items()}
    assert 0 < scored["mean"]["pck@0.3"] < 100


def test_what_a_user_of_today_would_write_gives_the_same(tree):
    """The second baseline of benchmarks/speed.py; as above, ties are left to rounding."""
    results, predictions = plain_spair(pooled, tree, SIZE)
    todays_results, todays_predictions = todays_spair(pooled, tree, SIZE)
    alike = torch.cat(predictions) == torch.cat(todays_predictions)
    assert alike.all(dim=1).double().mean() > 0.8
    one_keypoint = 100 / 30  # of a category
    for name, row in results.items():
        assert todays_results[name] == pytest.approx(row, abs=one_keypoint + 1e-6), name


def test_cosine_is_another_matching(tree):
    pairs = read_pairs(tree, per_category=0)
    dot = match_pairs(pooled, pairs, SIZE, cosine=False)
    cosine = match_pairs(pooled, pairs, SIZE, cosine=True)
    assert any(not torch.equal(a.predicted, b.predicted) for a, b in zip(dot, cosine))


ROWS = {
    "none": [],
    "bilinear": ["--upsample", "bilinear"],
    "stride": ["--stride", "8"],
    "lift": ["--lift_path"],
    "iterated": ["--lift_iter", "2", "--lift_path"],
    "layer": ["--layer", "6"],
    "own": ["--upsample", "test_eval_spair:tripled"],
}
# the photos are random: few keypoints are found nearby
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0)


@pytest.fixture(scope="module")
def many_keypoints(tmp_path_factory):
    """Enough of them to tell the rows apart: 6 pairs of 50 in each category."""
    return write_tree(tmp_path_factory.mktemp("spair") / "many", keypoints=50)


@pytest.fixture(scope="module")
def plain_rows(many_keypoints, rule_weights, rule_lift):
    """The results of the plain algorithm for every row."""
    results = {}
    for row, flags in ROWS.items():
        stride = 16
        if row == "stride":
            stride = 8
        layer = None
        if "--layer" in flags:
            layer = 6
        extractor = ViTExtractor(
            "vit_tiny_patch16_224", stride, backbone_path=rule_weights, device="cpu", layer=layer
        )
        features = features_of(row, extractor, rule_lift)
        results[row], _ = plain_spair(features, many_keypoints, SIZE, ALPHAS)
    return results


def tripled():
    """Somebody's own upsampler: every cell becomes 3x3 cells, mixed with the colours there."""

    def upsample(images, feats):
        height, width = feats.shape[2:]
        fine = F.interpolate(feats, scale_factor=3, mode="bicubic")
        colours = F.interpolate(images, (3 * height, 3 * width), mode="area").mean(1, True)
        return fine * (0.5 + colours)

    return upsample


def features_of(row, extractor, lift_path):
    """What plain_spair takes, for a row."""
    if "--lift_path" in ROWS[row]:
        lift = load_lift(lift_path, extractor)

    def features(images):
        images = extractor.normalize(images)
        feats = extractor(images)
        if row == "own":
            return tripled()(extractor.denormalize(images), feats)
        if row == "bilinear":
            return F.interpolate(feats, scale_factor=2, mode="bilinear")
        if row == "lift":
            return upsample(lift, images, feats, 1)
        if row == "iterated":
            return upsample(lift, images, feats, 2)
        return feats

    return features


def largest_difference(results, others):
    """Between the PCK of two results of `evaluate`, in percent."""
    differences = []
    for name, row in results.items():
        for alpha in ALPHAS:
            key = f"pck@{alpha}"
            differences.append(abs(row[key] - others[name][key]))
    return max(differences)


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_paper(cli, many_keypoints, rule_backbone, rule_lift, plain_rows, row):
    flags = ["--dataroot", many_keypoints, "--imsize", SIZE, "--pairs_per_category", 0]
    flags += ["--alpha", *ALPHAS, "--device", "cpu", *rule_backbone, *ROWS[row]]
    if "--lift_path" in flags:
        flags.append(rule_lift)
    results = report(cli("eval_spair", *flags))["results"]

    assert results.keys() == plain_rows[row].keys()
    for name in ("cat", "dog"):
        assert (results[name]["pairs"], results[name]["keypoints"]) == (6, 300)
    for other, expected in plain_rows.items():
        difference = largest_difference(results, expected)
        if other == row:
            assert difference < 1.5, results  # rounding may part ties
        else:
            assert difference > 3, f"no other than {other}"


def test_bin(cli, tree, rule_backbone, rule_extractor):
    """The log-binned descriptors of dino-vit-features, of any layer."""
    extractor = rule_extractor(layer=6)

    def features(images):
        tokens = extractor.extract_descriptors(extractor.normalize(images), bin=True)
        return tokens_to_map(tokens[:, 0], extractor.num_patches)                 # [B, 17*C, h, w]

    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 0, "--device", "cpu"]
    flags += ["--layer", 6, "--alpha", 0.3, *rule_backbone]
    ran = report(cli("eval_spair", *flags, "--bin"))
    assert ran["settings"]["bin"] is True
    matches = match_pairs(features, read_pairs(tree, per_category=0), SIZE)
    expected, _ = plain_spair(features, tree, SIZE, (0.3,))
    one_keypoint = 100 / 30  # of a category: rounding may part ties
    for name, row in ran["results"].items():
        assert row == pytest.approx(evaluate(matches, (0.3,))[name]), name
        assert row == pytest.approx(expected[name], abs=one_keypoint + 1e-6), name
    assert report(cli("eval_spair", *flags))["results"] != ran["results"]


# ---- each image once, bounded memory ------------------------------------------------------------


def test_each_image_once(tree):
    features = Counted()
    pairs = read_pairs(tree, per_category=30)
    matches = match_pairs(features, pairs, SIZE, batch_size=2)
    assert (features.images, features.largest) == (6, 2)
    assert [match.pair.path for match in matches] == [pair.path for pair in pairs]


def test_small_cache(tree):
    features = Counted()
    pairs = read_pairs(tree, per_category=0)
    small = match_pairs(features, pairs, SIZE, cache_mb=0)
    large = match_pairs(pooled, pairs, SIZE)
    assert features.images > 6
    for match, other in zip(small, large):
        assert match.pair is other.pair
        assert torch.equal(match.predicted, other.predicted)


@pytest.mark.parametrize("capacity", [2, 3, 5, 7, 20])
def test_chunks(tmp_path, capacity):
    tree = write_tree(tmp_path, ("cat",), images=7, keypoints=1)
    pairs = read_pairs(tree, per_category=0)
    parts = chunks(pairs, capacity)
    paths = []
    for part in parts:
        assert len(images_of(part)) <= capacity
        paths += [pair.path for pair in part]
    assert sorted(paths) == [pair.path for pair in pairs]
    assert (len(parts) == 1) == (capacity >= 7)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = out
        if not isinstance(out, (tuple, list)):  # such as those of split and max
            returned = [out]
        for value in returned:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("cosine", [False, True])
def test_no_dense_map(tree, cosine):
    def features(images):
        return pooled(images).repeat(1, 20, 1, 1)

    with Largest() as largest:
        match_pairs(features, read_pairs(tree, per_category=0), SIZE, cosine, batch_size=1)
    # the similarities of 5 keypoints were seen, and nothing near the 480 channels at all pixels
    assert 5 * SIZE * SIZE <= largest.numel <= 16 * SIZE * SIZE


# ---- answers known by construction --------------------------------------------------------------


def described(feats, norm=None):
    return Described(feats, norm, (SIZE, SIZE), 1.0, torch.zeros(2))


def test_finds_permuted_cells():
    cells = torch.eye(16)  # 4 x 4 cells, all different
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    source = described(cells.T.reshape(16, 4, 4))
    target = described(cells[order].T.reshape(16, 4, 4))
    centres = []
    for cell in range(16):
        centres.append([16 * (cell % 4) + 8, 16 * (cell // 4) + 8])

    x, y = best_pixels(source, target, torch.tensor(centres).float(), SIZE).T
    assert torch.equal(y // 16 * 4 + x // 16, order.argsort())
    assert x.dtype == y.dtype == torch.int64


def test_first_of_equals():
    flat = described(torch.ones(1, 4, 4))
    assert best_pixels(flat, flat, torch.tensor([[40.0, 50.0]]), SIZE).tolist() == [[0, 0]]


def test_pixel_norms():
    feats = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    slow = F.interpolate(feats[None], (SIZE, SIZE), mode="bilinear")[0].norm(dim=0)
    torch.testing.assert_close(pixel_norms(feats, SIZE), slow)


@pytest.mark.parametrize(
    "shape, resized, offset",
    [
        ((120, 90), (64, 48), (0, 8)),
        ((61, 127), (31, 64), (16, 0)),
        ((64, 1), (64, 1), (0, 31)),
        ((1000, 1), (64, 1), (0, 31)),  # not 0 pixels high
    ],
)
def test_letterbox(shape, resized, offset):
    square, scale, at = letterbox(Image.new("RGB", shape, "white"), SIZE)
    assert (square.size, scale) == ((SIZE, SIZE), SIZE / max(shape))
    assert tuple(at.tolist()) == offset
    assert square.getbbox() == (*offset, offset[0] + resized[0], offset[1] + resized[1])


def test_letterbox_rounds_like_numpy():
    square, _, _ = letterbox(Image.new("RGB", (4, 1), "white"), 10)
    assert square.getbbox() == (0, 4, 10, 6)  # 2.5 -> 2


def test_place():
    image = Described(None, None, (120, 90), SIZE / 120, torch.tensor([0, 8]))
    corners = torch.tensor([[0.0, 0.0], [119, 89]])
    torch.testing.assert_close(place(corners, image), torch.tensor([[0, 8], [63.46667, 55.46667]]))
    for point in ([120.0, 3], [3, 90.0], [-1, 3], [float("nan"), 3]):
        points = torch.tensor([[1, 1], point])
        pair = Pair("a.json", "cat", "source", "target", points, points, 10.0)
        with pytest.raises(ValueError, match=r"a\.json: keypoint .* outside its 120x90 image"):
            match_pair(pair, {"source": image, "target": image}, SIZE)


def match_at(category, distances, extent=10.0, path=None):
    """A Match whose predictions miss by these distances."""
    pair = Pair(path, category, path, path, None, None, extent)
    truth = torch.full((len(distances), 2), 20.0)
    missed = torch.tensor([[distance, 0.0] for distance in distances])
    return Match(pair, truth, truth, truth + missed, extent)


MATCHES = [
    match_at("a", [0, 5, 9, 9]),
    match_at("a", [0]),
    match_at("b", [4, 9, 9, 9, 9]),
]


@pytest.mark.parametrize(
    "average, a, mean",
    [
        ("category", 100 * 2 / 5, 100 * (2 / 5 + 1 / 5) / 2),
        ("keypoint", 100 * 2 / 5, 100 * 3 / 10),
        ("image", 100 * (1 / 4 + 1) / 2, 100 * (1 / 4 + 1 + 1 / 5) / 3),
    ],
)
def test_average(average, a, mean):
    results = evaluate(MATCHES, (0.5,), average=average)
    assert results["a"] == pytest.approx({"pairs": 2, "keypoints": 5, "pck@0.5": a})
    assert results["b"] == pytest.approx({"pairs": 1, "keypoints": 5, "pck@0.5": 20})
    assert results["mean"] == pytest.approx({"pck@0.5": mean})


@pytest.mark.parametrize("threshold, hits", [("lt", 2), ("le", 3)])
def test_threshold(threshold, hits):
    results = evaluate(MATCHES[:2], (0.5,), threshold)
    assert results["a"]["pck@0.5"] == pytest.approx(100 * hits / 5)


# ---- pairs --------------------------------------------------------------------------------------


def test_sampling(tree):
    random = np.random.RandomState(3)
    cats = random.choice(6, 10)
    dogs = random.choice(6, 10)
    pairs = read_pairs(tree, per_category=10, seed=3)
    everything = read_pairs(tree, per_category=0)

    def by_category(path):
        return path.stem.split(":")[1], path

    paths = [pair.path for pair in everything]
    assert paths == sorted(paths, key=by_category)
    expected = [paths[number] for number in cats] + [paths[6 + number] for number in dogs]
    assert [pair.path for pair in pairs] == expected
    assert [pair.category for pair in pairs] == ["cat"] * 10 + ["dog"] * 10


def test_categories_and_split(cli, tmp_path, rule_backbone):
    tree = write_tree(tmp_path, ("cow", "cat", "at"), images=2)
    (tree / "PairAnnotation/test").rename(tree / "PairAnnotation/val")
    flags = ["--dataroot", tree, "--imsize", SIZE, "--split", "val", *rule_backbone]
    flags += ["--categories", "cow", "at", "--pairs_per_category", 3]
    ran = report(cli("eval_spair", *flags))
    rows = [(name, row.get("pairs")) for name, row in ran["results"].items()]
    assert rows == [("at", 3), ("cow", 3), ("mean", None)]


# ---- output -------------------------------------------------------------------------------------


def test_output(cli, tree, tmp_path, rule_backbone):
    file = tmp_path / "new/result.json"
    pictures = tmp_path / "pictures"
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 2]
    flags += ["--match", "cosine", "--threshold", "le", "--average", "image", "--json", file]
    flags += ["--visualize", 3, "--output_dir", pictures, *rule_backbone]
    ran = cli("eval_spair", *flags)
    assert ran.code == 0, ran.err
    line = json.loads(file.read_text())
    assert line["settings"]["match"] == "cosine"
    assert line["settings"]["versions"]["torch"] == torch.__version__
    assert (line["pairs"], line["keypoints"]) == (4, 20)

    mean_line = next(row for row in ran.out.splitlines() if row.startswith("mean"))
    mean = line["results"]["mean"]
    keys = ("pck@0.1", "pck@0.05", "pck@0.01")
    assert len(ran.out.splitlines()) == 4  # header, two categories and the mean: a table only
    assert mean_line.split()[1:] == [f"{mean[key]:.2f}" for key in keys]

    assert 1 <= len(list(pictures.glob("*_*.png"))) <= 3
    assert not list(pictures.glob("*:*"))
    assert len(list(pictures.iterdir())) == len(list(pictures.glob("*.png")))
    for path in pictures.iterdir():
        assert Image.open(path).size == (896, 480)  # two squares of 448, the legend below


def test_json_on_stdout(cli, tree, rule_backbone):
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 1, *rule_backbone]
    ran = cli("eval_spair", *flags, "--json", "-")
    line = json.loads(ran.out.splitlines()[-1])
    assert line["results"].keys() == {"cat", "dog", "mean"}
    assert line["pairs"] == 2


def test_settings_say_what_was_left_out(cli, tree, rule_backbone, rule_lift):
    """They used to be null."""
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 1, "--device", "cpu"]
    flags += rule_backbone
    used = report(cli("eval_spair", *flags))["settings"]
    assert (used["layer"], used["stride"], used["upsample"]) == (11, 16, "none")
    assert used["categories"] == ["cat", "dog"]
    assert used["batch_size"] == 4 * 224**2 // SIZE**2
    assert used["device"] == "cpu"

    lifted = report(cli("eval_spair", *flags, "--lift_path", rule_lift))["settings"]
    assert lifted["upsample"] == "lift"
    assert lifted["digest"] == used["digest"]
    assert len(lifted["lift_digest"]) == 16


def mean_colours():
    """A backbone of one's own: the colours of cells of 8 pixels."""
    return torch.nn.AvgPool2d(8)


def test_a_backbone_of_ones_own(cli, tree):
    flags = ["--dataroot", tree, "--imsize", SIZE, "--pairs_per_category", 0, "--device", "cpu"]
    ran = report(
        cli("eval_spair", *flags, "--my_extractor", "test_eval_spair:mean_colours", "--alpha", 0.3)
    )
    assert (ran["settings"]["backbone"], ran["settings"]["stride"]) == (
        "test_eval_spair:mean_colours", 8,
    )  # fmt: skip

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def features(images):
        return F.avg_pool2d((images - mean) / std, 8)

    matches = match_pairs(features, read_pairs(tree, per_category=0), SIZE)
    assert ran["results"] == evaluate(matches, (0.3,))


def test_draw(tmp_path):
    black = tmp_path / "black.png"
    Image.new("RGB", (SIZE, SIZE)).save(black)
    match = match_at("a", [0.0, 40.0], path=black)
    picture = draw(match, SIZE, 0.1, "lt", side=2 * SIZE)
    assert picture.size == (4 * SIZE, 2 * SIZE + 32)
    assert picture.getpixel((40, 40)) == (0, 255, 255)  # second keypoint over the first, source
    assert picture.getpixel((2 * SIZE + 120, 40)) == (0, 255, 255)  # its prediction in the target
    assert picture.getpixel((2 * SIZE + 80, 40)) == (255, 0, 0)  # a red line: wrong
    right = draw(match, SIZE, 5, "lt", side=2 * SIZE)
    assert right.getpixel((2 * SIZE + 80, 40)) == (0, 255, 0)  # green: right


def test_pixels_are_drawn_as_stored(tmp_path):
    """The keypoints count those; the photo used to be turned."""
    photo = Image.new("RGB", (SIZE, SIZE))
    photo.paste("white", (0, 0, SIZE, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(tmp_path / "photo.png", exif=exif)
    match = match_at("a", [0.0], path=tmp_path / "photo.png")
    picture = draw(match, SIZE, 0.1, "lt", side=SIZE)
    for x in (5, SIZE + 5):  # in the source and in the target
        assert picture.getpixel((x, 5)) == (255, 255, 255)
        assert picture.getpixel((x, SIZE - 5)) == (0, 0, 0)


def test_legend(tmp_path):
    """Pictures used to say nowhere what ring, disc and line are."""
    black = tmp_path / "black.png"
    Image.new("RGB", (SIZE, SIZE)).save(black)
    match = match_at("a", [0.0], path=black)
    sheet = draw(match, SIZE, 0.1, "lt")
    assert sheet.size == (896, 480)
    legend = sheet.crop((0, 449, 896, 480))
    left, _, right, _ = ImageChops.invert(legend).getbbox()  # of the text on white
    assert 8 < left < 20
    assert 700 < right < 890
    other = draw(match, SIZE, 0.05, "lt").crop((0, 449, 896, 480))
    assert other.tobytes() != legend.tobytes()  # it names the threshold


# ---- bad input ----------------------------------------------------------------------------------


def first_annotation(root):
    return sorted(root.glob("PairAnnotation/test/*cat.json"))[0]


def change(**entries):
    """A way to spoil a tree: other entries in its first annotation, None for none."""

    def spoil(root):
        path = first_annotation(root)
        entry = json.loads(path.read_text())
        for key, value in entries.items():
            entry[key] = value
            if value is None:
                del entry[key]
        path.write_text(json.dumps(entry))

    return spoil


def no_change(root):
    pass


def no_annotations(root):
    shutil.rmtree(root / "PairAnnotation")


def no_images(root):
    shutil.rmtree(root / "JPEGImages")


def empty_category(root):
    (root / "JPEGImages/zebra").mkdir()


def malformed(root):
    first_annotation(root).write_text('{"src_kps": [')


def a_list(root):
    first_annotation(root).write_text("[]")


def missing_image(root):
    (root / "JPEGImages/dog/0002.jpg").unlink()


def truncated(root):
    path = root / "JPEGImages/cat/0001.jpg"
    path.write_bytes(path.read_bytes()[:300])


POINTS = [[5, 5]] * 5
NOT_NUMBERS = ["--my_extractor", "test_eval_spair:not_numbers"]
SPOILED = {
    "no such folder": (no_annotations, [], "--dataroot"),
    "no images folder": (no_images, [], "--dataroot"),
    "no such split": (no_change, ["--split", "trn"], "--split"),
    "unknown category": (no_change, ["--categories", "cat", "bird"], "'bird'"),
    "category without pairs": (empty_category, [], "'zebra'"),
    "malformed JSON": (malformed, [], "annotation"),
    "not an object": (a_list, [], "annotation"),
    "missing key": (change(trg_bndbox=None), [], "trg_bndbox"),
    "null points": (change(src_kps=[None] * 5), [], "src_kps"),
    "points are an object": (change(src_kps={}), [], "annotation"),
    "counts differ": (change(src_kps=POINTS[:2]), [], "src_kps"),
    "no keypoints": (change(src_kps=[], trg_kps=[]), [], "src_kps"),
    "an empty box": (change(trg_bndbox=[5, 5, 5, 5]), [], "trg_bndbox"),
    "a box that is no number": (change(trg_bndbox=[5, 5, float("nan"), 9]), [], "trg_bndbox"),
    "source keypoint outside": (change(src_kps=[*POINTS[:4], [4000, -7]]), [], "[4000.0, -7.0]"),
    "keypoint beyond float32": (change(trg_kps=[*POINTS[:4], [1e300, 3]]), [], "trg_kps"),
    "target keypoint is NaN": (change(trg_kps=[*POINTS[:4], [float("nan"), 3]]), [], "trg_kps"),
    "a name that leaves": (change(src_imname="../dog/0000.jpg"), [], "leaves the folder"),
    "an absolute name": (change(trg_imname="/etc/passwd"), [], "leaves the folder"),
    "a name that is a number": (change(trg_imname=3), [], "annotation"),
    "missing image": (missing_image, [], "0002.jpg"),
    "truncated image": (truncated, [], "0001.jpg"),
    "imsize": (no_change, ["--imsize", 70], "70 is not a multiple of the patch (16)"),
    "no imsize": (no_change, ["--imsize", 0], "--imsize"),
    "huge imsize": (no_change, ["--imsize", 160000], "pass 4096 or less"),
    "negative count": (no_change, ["--pairs_per_category", -1], "--pairs_per_category"),
    "negative seed": (no_change, ["--seed", -1], "--seed"),
    "no batch": (no_change, ["--batch_size", 0], "--batch_size"),
    "lift without module": (no_change, ["--upsample", "lift"], "--lift_path"),
    "features are no numbers": (no_change, NOT_NUMBERS, "not finite in float32: pass"),
}  # fmt: skip


def turned(root):
    """The pixels stay where they are, but their EXIF orientation tells viewers to turn them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    for path in (root / "JPEGImages/cat").iterdir():
        Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("spoil", [turned, change(trg_kps=[[5, -7], *POINTS[:4]])])
def test_what_is_odd_but_evaluated(tree, tmp_path, spoil):
    """Photos used to be turned, and a target keypoint outside its image ended the run."""
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    spoil(root)
    match = match_pairs(pooled, read_pairs(root, per_category=0), SIZE)[0]
    predicted, truth, extent = plain_pair(pooled, match.pair.path, root, SIZE)

    torch.testing.assert_close(match.target, truth)
    assert match.extent == pytest.approx(extent)
    maps = similarity_maps(match, SIZE, cosine=False)
    at_ours = values_at(maps, match.predicted)
    at_plain = values_at(maps, predicted)
    torch.testing.assert_close(at_ours, at_plain, atol=1e-5, rtol=0)


def not_numbers():
    """A backbone whose features are NaN, as where float16 overflows."""

    class NotNumbers(torch.nn.Module):
        def forward(self, images):
            return F.avg_pool2d(images, 16) * float("nan")

    return NotNumbers()


@pytest.mark.parametrize("case", SPOILED)
def test_bad_input(cli, tree, tmp_path, rule_backbone, case):
    spoil, flags, word = SPOILED[case]
    shutil.copytree(tree, tmp_path / "tree")
    spoil(tmp_path / "tree")
    (tmp_path / "result.json").write_text("an earlier result")
    common = ["--dataroot", tmp_path / "tree", "--imsize", SIZE, "--pairs_per_category", 0]
    common += ["--json", tmp_path / "result.json", *rule_backbone]
    ran = cli("eval_spair", *common, *flags)

    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert word in ran.err, ran.err
    assert ":" in ran.err, ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "tree"]
    assert (tmp_path / "result.json").read_text() == "an earlier result"


@pytest.mark.parametrize("wrong", ["image", "module"])
def test_what_is_cheap_is_checked_before_the_backbone(cli, tree, tmp_path, wrong):
    """The backbone used to come first, which may be a download."""
    shutil.copytree(tree, tmp_path / "tree")
    flags = ["--dataroot", tmp_path / "tree", "--pairs_per_category", 0]
    flags += ["--backbone_path", tmp_path / "no_backbone.pth"]
    if wrong == "image":
        missing_image(tmp_path / "tree")
        word = "0002.jpg"
    else:
        flags += ["--lift_path", tmp_path / "no_module.pth"]
        word = "no_module.pth"
    ran = cli("eval_spair", *flags)
    assert ran.code == 2
    assert word in ran.err
    assert "no_backbone" not in ran.err
