"""davis_scores.py: masks of every kind, the scores by definition, golden scores.

Also the small data sets that test_davis_scores.py uses.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import plain_davis as plain
import pytest
from PIL import Image

import davis_scores

PALETTE = [(7 * i) % 256 for i in range(768)]


# ---- small trees --------------------------------------------------------------------------------


def write_masks(folder, labels):
    """Write labels [t, H, W] as folder/00000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(labels):
        image = Image.fromarray(frame.astype(np.uint8))
        image.putpalette(PALETTE)
        image.save(folder / f"{number:05d}.png")


def write_tree(root, videos, frames=True):
    """A DAVIS folder of {name: labels [t, H, W]}; each object is a coloured block on noise."""
    rng = np.random.RandomState(0)
    for name, labels in videos.items():
        write_masks(root / "Annotations/480p" / name, labels)
        colours = rng.randint(0, 256, (256, 3))
        if not frames:
            continue
        folder = root / "JPEGImages/480p" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(labels):
            noise = 40 * rng.rand(*frame.shape, 3)
            photo = (0.8 * colours[frame] + noise).astype(np.uint8)
            Image.fromarray(photo).save(folder / f"{number:05d}.jpg", quality=95)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("\n".join(videos) + "\n")
    return root


def moving(t=6, height=60, width=90, objects=2, seed=0):
    """Labels [t, H, W] of `objects` blocks that drift."""
    rng = np.random.RandomState(seed)
    labels = np.zeros((t, height, width), np.uint8)
    for number in range(1, objects + 1):
        y = rng.randint(0, height // 2)
        x = rng.randint(0, width // 2)
        dy, dx = rng.randint(-2, 3, 2)
        for i in range(t):
            top = max(y + dy * i, 0)
            left = max(x + dx * i, 0)
            labels[i, top : top + height // 3, left : left + width // 3] = number
    return labels


def odd_videos():
    """Annotations and results with everything the scores must bear, by name."""
    rng = np.random.RandomState(1)
    void = moving(6, seed=2)
    void[:, 5:12, 20:40] = 255
    pixel = np.zeros((5, 40, 50), np.uint8)
    pixel[:, 0, 0] = 1
    pixel[:, 39, 49] = 2
    pixel[:, 39, 0] = 3
    empty = moving(7, objects=2, seed=3)
    empty[2:4] = 0
    videos = {
        "void": void,
        "pixel": pixel,
        "empty": empty,
        "gap": moving(5, objects=1, seed=4) * 3,  # labels 1 and 2 are never there
        "three": moving(3, seed=5),
        "long": moving(300, 20, 30, 1),
    }

    results = {}
    for name, labels in videos.items():
        results[name] = np.where(labels == 255, 0, np.roll(labels, 3, axis=2))
    results["pixel"][2:] = 0
    results["empty"][rng.rand(*empty.shape) > 0.9] = 1
    return videos, results


def line_of(ran):
    """What a run writes to --json, if it went well."""
    assert ran.code == 0, ran.err
    return ran.report()


def results_of(ran):
    return line_of(ran)["results"]


def annotations_of(root):
    """{video: annotations} of a data set."""
    found = {}
    for name in (root / "ImageSets/2017/val.txt").read_text().split():
        found[name] = sorted((root / "Annotations/480p" / name).glob("*.png"))
    return found


def scores_of(folder, root, workers=2):
    with ThreadPoolExecutor(workers) as pool:
        return davis_scores.evaluate(folder, annotations_of(root), pool)


# ---- scores against the definition --------------------------------------------------------------


def slow_boundary(mask):
    """Pixel by pixel."""
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for i, j in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                if i < height and j < width and mask[y, x] != mask[i, j]:
                    edge[y, x] = True
    return edge


def test_boundary_by_definition():
    rng = np.random.RandomState(0)
    for shape in ((1, 1), (1, 7), (6, 1), (9, 13)):
        for mask in (rng.rand(*shape) > 0.5, np.ones(shape, bool), np.zeros(shape, bool)):
            np.testing.assert_array_equal(davis_scores.boundary(mask), slow_boundary(mask))
            np.testing.assert_array_equal(plain.boundary(mask), slow_boundary(mask))


def test_frames_by_definition():
    rng = np.random.RandomState(0)
    for _ in range(60):
        height = rng.randint(2, 40)
        width = rng.randint(2, 40)
        both = rng.randint(0, 4, (2, height, width)) * (rng.rand() > 0.2)
        truth, labels = both.astype(np.uint8)
        part = slice(rng.randint(0, 20), rng.randint(20, 40))
        truth[part] = 0
        labels[:, part] = 0
        wanted = []
        for number in (1, 2, 3):
            masks = (labels == number, truth == number)
            wanted.append([plain.jaccard(*masks), plain.contour(*masks)])
        np.testing.assert_allclose(davis_scores.score_frame(labels, truth, 3), wanted, atol=1e-12)


def test_known_scores():
    square = np.zeros((300, 400), np.uint8)  # the disk's radius is 4
    square[100:140, 100:140] = 1
    away = {}
    for shift in (0, 4, 20, 100):
        away[shift] = davis_scores.score_frame(np.roll(square, shift, 1), square, 1)[0]
    assert away[0] == (1, 1)
    assert away[4] == (36 / 44, 1)
    assert away[100] == (0, 0)
    # 2 x 24 of the horizontal edges, 2 x 5 where they meet vertical ones
    assert away[20] == (1 / 3, pytest.approx(58 / 160))

    nothing = np.zeros_like(square)
    assert davis_scores.score_frame(nothing, nothing, 2) == [(1, 1), (1, 1)]
    assert davis_scores.score_frame(nothing, square, 1) == [(0, 0)]
    assert davis_scores.score_frame(square, nothing, 1) == [(0, 0)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 48, 298, 1000])
def test_decay_does_not_wrap(length):
    values = np.linspace(1, 0, length) ** 2
    mean, recall, decay = davis_scores.summary(values)
    assert (mean, recall) == (values.mean(), np.mean(values > 0.5))
    assert decay == pytest.approx(plain.decay(values), abs=1e-12)
    # davis2017-evaluation keeps numbers of frames in 8 bits: there the 257th wraps to the first
    if length >= 4:
        assert decay > 0.5


def test_odd_videos_score_as_by_definition(tmp_path):
    videos, results = odd_videos()
    root = write_tree(tmp_path / "DAVIS", videos, frames=False)
    for name, labels in results.items():
        write_masks(tmp_path / "results" / name, labels)
    found = scores_of(tmp_path / "results", root)

    rows = []
    names = []
    for name, labels in videos.items():
        masks = sorted((tmp_path / "results" / name).glob("*.png"))
        truths = sorted((root / "Annotations/480p" / name).glob("*.png"))
        rows += plain.score(masks, truths)
        objects = np.where(labels[0] == 255, 0, labels[0]).max()
        names += [f"{name}_{number}" for number in range(1, objects + 1)]
    assert list(found["per_object"]) == names
    assert {"void_2", "gap_3", "pixel_3"} <= set(names)

    values = list(found["per_object"].values())
    means = [found[metric] for metric in davis_scores.METRICS[1:]]
    np.testing.assert_allclose(values, [(row[0], row[3]) for row in rows], atol=1e-12)
    np.testing.assert_allclose(means, np.mean(rows, 0), atol=1e-12)
    assert found["J&F-Mean"] == pytest.approx((found["J-Mean"] + found["F-Mean"]) / 2)
    assert scores_of(tmp_path / "results", root, workers=1) == found


def test_the_annotations_themselves_score_one(cli, tmp_path):
    root = write_tree(tmp_path / "DAVIS", odd_videos()[0], frames=False)
    masks = root / "Annotations/480p"
    ran = cli(
        "eval_davis", "--dataroot", root, "--score_only", masks, "--output_dir", tmp_path / "out"
    )
    found = results_of(ran)
    assert found["J-Mean"] == found["F-Mean"] == found["J-Recall"] == 1
    assert found["F-Decay"] == 0
    assert "has label 255, which counts as background" in ran.err
    assert "imsize" not in line_of(ran)["settings"]  # it has no part in a score


def test_two_frames_leave_nothing_to_score(cli, tmp_path):
    root = write_tree(tmp_path / "DAVIS", {"two": moving(2), "six": moving(6)}, frames=False)
    masks = root / "Annotations/480p"
    flags = ["--dataroot", root, "--score_only", masks, "--output_dir", tmp_path]
    ran = cli("eval_davis", *flags)
    assert results_of(ran)["per_object"]["two_1"] == [None, None]
    assert results_of(ran)["J&F-Mean"] == 1
    assert "not scored" in ran.err
    assert "two_1,,\n" in (tmp_path / "per-sequence_results-val.csv").read_text()
    assert results_of(cli("eval_davis", *flags, "--sequences", "two"))["J-Mean"] is None


def test_labels_that_the_first_mask_does_not_show(tmp_path, capfd):
    """They count, as in davis2017-evaluation, which gives 1 to what nobody sees or predicts."""
    plain_video = moving(6, objects=1, seed=3)
    videos = {"five": 5 * plain_video, "one": plain_video}
    root = write_tree(tmp_path / "DAVIS", videos, frames=False)
    for name, labels in videos.items():
        write_masks(tmp_path / "results" / name, np.roll(labels, 2, axis=2))
    found = scores_of(tmp_path / "results", root)

    j_and_f = np.mean(found["per_object"]["one_1"])
    assert j_and_f < 0.95
    assert np.mean(found["per_object"]["five_5"]) == j_and_f
    assert found["per_object"]["five_4"] == [1, 1]
    assert found["J&F-Mean"] == pytest.approx((4 + 2 * j_and_f) / 6)
    assert found["absent"] == {"five": [1, 2, 3, 4]}
    assert found[davis_scores.WITHOUT] == pytest.approx(j_and_f)

    err = capfd.readouterr().err
    assert err.count("note:") == 1
    assert "(five: 1-4); without them" in err
    assert f"{j_and_f:.3f}" in err


def test_nothing_is_noted_where_every_label_is_shown(tmp_path, capfd):
    root = write_tree(tmp_path / "DAVIS", {"two": moving(6, objects=2)}, frames=False)
    found = scores_of(root / "Annotations/480p", root)
    assert found["absent"] == {}
    assert found[davis_scores.WITHOUT] == found["J&F-Mean"] == 1
    assert not capfd.readouterr().err


def test_ranges():
    assert davis_scores.as_ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert davis_scores.as_ranges([]) == ""


# ---- masks of every kind ------------------------------------------------------------------------


def with_palette(labels, palette):
    image = Image.fromarray(labels)
    image.putpalette(palette)
    return image


def as_indexed(labels):
    return with_palette(labels, PALETTE)


def as_grey(labels):
    return Image.fromarray(labels)


def as_three_greys(labels):
    return Image.fromarray(np.stack(3 * [labels], axis=2))


def as_16_bits(labels):
    return Image.fromarray(labels.astype(np.uint16))


def as_stretched_16_bits(labels):
    return Image.fromarray(labels.astype(np.uint16) * 257)


def as_davis_colours(labels):
    return with_palette(labels, davis_scores.davis_palette()).convert("RGB")


def as_voc_colours(labels):
    return with_palette(labels, davis_scores.voc_palette()).convert("RGB")


def as_opaque_colours(labels):
    return as_davis_colours(labels).convert("RGBA")


def on_transparency(labels):
    """Colours on a background that is transparent, and has the colour of label 2 below."""
    pixels = np.array(as_opaque_colours(labels))
    pixels[labels == 0] = (0, 128, 0, 0)
    return Image.fromarray(pixels)


def as_shades(labels):
    return as_davis_colours(labels).convert("L")


KINDS = [
    as_indexed, as_grey, as_three_greys, as_16_bits, as_stretched_16_bits, as_davis_colours,
    as_voc_colours, as_opaque_colours, on_transparency, as_shades,
]  # fmt: skip


def save_masks(folder, labels, kind):
    folder.mkdir(parents=True)
    for number, frame in enumerate(labels):
        kind(frame).save(folder / f"{number:05d}.png")


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_score_as_indexed_ones(tmp_path, kind):
    truth = moving(5, objects=4, seed=6)
    truth[2:][truth[2:] == 1] = 0  # in a later mask the palette's first colour is missing
    result = np.roll(truth, 3, axis=1)
    root = write_tree(tmp_path / "DAVIS", {"cat": truth}, frames=False)
    write_masks(tmp_path / "indexed/cat", result)
    save_masks(tmp_path / "results/cat", result, kind)
    save_masks(tmp_path / "truth/cat", truth, kind)
    wanted = scores_of(tmp_path / "indexed", root)
    assert wanted["J&F-Mean"] < 0.99
    assert scores_of(tmp_path / "results", root) == wanted

    annotations = {"cat": sorted((tmp_path / "truth/cat").glob("*.png"))}
    with ThreadPoolExecutor(1) as pool:
        found = davis_scores.evaluate(tmp_path / "results", annotations, pool)
    assert found == wanted


def test_masks_of_one_bit(tmp_path):
    labels = moving(1, objects=1)[0]
    Image.fromarray(labels > 0).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(davis_scores.read_mask(tmp_path / "bits.png")[0], labels)


def test_shades_are_noted_and_other_greys_are_labels(tmp_path, capfd):
    labels = np.zeros((20, 30), np.uint8)
    labels[:5, :5] = 38
    labels[10:, 10:] = 75
    for values, wanted in ((labels, [0, 1, 2]), (2 * labels, [0, 76, 150])):
        Image.fromarray(values).save(tmp_path / "first.png")
        read = davis_scores.MaskReader()
        assert np.unique(read(tmp_path / "first.png")).tolist() == wanted
        assert read.has_shades == (1 in wanted)

    root = write_tree(tmp_path / "DAVIS", {"cat": moving(4)}, frames=False)
    save_masks(tmp_path / "results/cat", moving(4), as_shades)
    scores_of(tmp_path / "results", root)
    assert f"{tmp_path / 'results/cat'} are grey, in the shades of" in capfd.readouterr().err


def test_one_object_is_whatever_is_not_0_with_binary(tmp_path):
    labels = moving(1, objects=1)[0]
    for value in (1, 38, 128, 255):
        for kind in (as_indexed, as_grey, as_three_greys, as_16_bits, as_stretched_16_bits):
            kind(value * labels).save(tmp_path / "mask.png")
            found = davis_scores.MaskReader(binary=True)(tmp_path / "mask.png")
            np.testing.assert_array_equal(found, labels)


def test_void_in_both_palettes(tmp_path):
    """White in DAVIS's, (224, 224, 192) in VOC's."""
    labels = moving(1)[0]
    labels[:3] = 255
    for kind in (as_davis_colours, as_voc_colours):
        kind(labels).save(tmp_path / "mask.png")
        read = davis_scores.MaskReader()
        found = read(tmp_path / "mask.png")
        np.testing.assert_array_equal(found, np.where(labels == 255, 0, labels))
        assert read.has_void


def test_colours_of_no_palette_and_large_values_are_told(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    with pytest.raises(ValueError, match=r"mask.png has the colour \(255, 0, 0\), which is in"):
        davis_scores.read_mask(path)
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(path)
    with pytest.raises(ValueError, match="holds values from 1000 to 1000"):
        davis_scores.read_mask(path)


def test_the_palette_is_daviss(shared):
    palette = np.loadtxt(shared / "data/DAVIS_palette.txt", dtype=int)
    assert davis_scores.davis_palette() == palette.flatten().tolist()
