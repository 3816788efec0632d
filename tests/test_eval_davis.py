"""eval_davis.py: golden scores and masks, the dense propagation, the scores by definition, odd trees, bad input."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import plain_davis as plain
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import eval_davis
from extractor import ViTExtractor
from lift import load_lift, upsample

PALETTE = [(7 * i) % 256 for i in range(768)]


# ---- small trees ----------------------------------------------------------------------------------------------------


def write_masks(folder, labels):
    """Labels [t, H, W] as folder/00000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(labels):
        image = Image.fromarray(frame.astype(np.uint8))
        image.putpalette(PALETTE)
        image.save(folder / f"{t:05d}.png")


def write_tree(root, videos, frames=True):
    """A DAVIS folder of {name: labels [t, H, W]}; each object is a coloured block on noise."""
    rng = np.random.RandomState(0)
    for name, labels in videos.items():
        write_masks(root / "Annotations/480p" / name, labels)
        colours = rng.randint(0, 256, (256, 3))
        for t, frame in enumerate(labels if frames else ()):
            photo = (0.8 * colours[frame] + 40 * rng.rand(*frame.shape, 3)).astype(np.uint8)
            path = root / "JPEGImages/480p" / name / f"{t:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo).save(path, quality=95)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("\n".join(videos) + "\n")
    return root


def moving(t=6, height=60, width=90, objects=2, seed=0):
    """Labels [t, H, W] of `objects` blocks that drift."""
    rng, labels = np.random.RandomState(seed), np.zeros((t, height, width), np.uint8)
    for k in range(1, objects + 1):
        y, x, dy, dx = rng.randint(0, height // 2), rng.randint(0, width // 2), *rng.randint(-2, 3, 2)
        for i in range(t):
            top, left = max(y + dy * i, 0), max(x + dx * i, 0)
            labels[i, top : top + height // 3, left : left + width // 3] = k
    return labels


def odd_videos():
    """Annotations and results with everything the scores must bear, by name."""
    rng = np.random.RandomState(1)
    void = moving(6, seed=2)
    void[:, 5:12, 20:40] = 255
    pixel = np.zeros((5, 40, 50), np.uint8)
    pixel[:, 0, 0], pixel[:, 39, 49], pixel[:, 39, 0] = 1, 2, 3
    empty = moving(7, objects=2, seed=3)
    empty[2:4] = 0
    gap = moving(5, objects=1, seed=4) * 3  # labels 1 and 2 are never there
    videos = {"void": void, "pixel": pixel, "empty": empty, "gap": gap}
    videos |= {"three": moving(3, seed=5), "long": moving(300, 20, 30, 1)}
    results = {name: np.where(labels == 255, 0, np.roll(labels, 3, axis=2)) for name, labels in videos.items()}
    results["pixel"][2:] = 0
    results["empty"][rng.rand(*empty.shape) > 0.9] = 1
    return videos, results


def scores_of(folder, root, workers=2):
    with ThreadPoolExecutor(workers) as pool:
        return eval_davis.evaluate(folder, eval_davis.find_sequences(root, None, False), pool)


def results_of(ran):
    """What the last line of a run says, if it went well."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out.splitlines()[-1])["results"]


# ---- golden numbers -------------------------------------------------------------------------------------------------


def golden(shared, key):
    return json.loads((shared / "golden/davis.json").read_text())[key]


def test_golden_scores(shared, cli, tmp_path):
    data = shared / "data"
    ran = cli("eval_davis", "--dataroot", data / "DAVIS", "--score_only", data / "DAVIS_osvos_results", "--output_dir", tmp_path)
    found, wanted = results_of(ran), golden(shared, "osvos_results_scored")
    for metric in eval_davis.METRICS:
        assert found[metric] == pytest.approx(wanted[metric], abs=1e-6)
    assert found["per_object"].keys() == wanted["per_object"].keys()
    np.testing.assert_allclose(list(found["per_object"].values()), list(wanted["per_object"].values()), atol=1e-6)
    assert (tmp_path / "global_results-val.csv").read_text() == (
        "J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay\n0.793,0.774,0.845,0.213,0.812,0.896,0.176\n"
    )
    rows = (tmp_path / "per-sequence_results-val.csv").read_text().splitlines()
    assert rows[:2] == ["Sequence,J-Mean,F-Mean", "blackswan_1,0.943,0.974"] and len(rows) == 7


def check_propagation(shared, ran, key, names):
    found, wanted = results_of(ran)["per_object"], golden(shared, key)["per_object"]
    assert list(found) == [f"{name}_1" for name in names]
    for name, values in found.items():
        assert np.mean(values) == pytest.approx(np.mean(wanted[name]), abs=0.002), name


@pytest.mark.parametrize("key", ["with_lift", "without_lift"])
def test_golden_propagation(shared, vit_tiny, golden_lift, cli, tmp_path, key):
    flags = [*vit_tiny, *(["--lift_path", golden_lift] if key == "with_lift" else []), "--sequences", "libby", "--device", "cpu"]
    ran = cli("eval_davis", "--dataroot", shared / "data/DAVIS", "--output_dir", tmp_path, *flags)
    check_propagation(shared, ran, key, ["libby"])
    if key == "with_lift":
        ours, theirs = tmp_path / "davis_vidseg_224_layer11/libby", sorted((shared / "golden/davis_masks/libby").glob("*.png"))
        same = [eval_davis.read_labels(path) == eval_davis.read_labels(ours / path.name) for path in theirs]
        assert len(same) == 49 and np.mean(same) >= 0.995


@pytest.mark.long
@pytest.mark.parametrize("key", ["with_lift", "without_lift"])
def test_golden_propagation_of_all(shared, vit_tiny, golden_lift, cli, tmp_path, key):
    flags = [*vit_tiny, *(["--lift_path", golden_lift] if key == "with_lift" else []), "--device", "cpu"]
    ran = cli("eval_davis", "--dataroot", shared / "data/DAVIS", "--output_dir", tmp_path, *flags)
    check_propagation(shared, ran, key, ["blackswan", "car-shadow", "dog", "drift-chicane", "drift-straight", "libby"])


# ---- propagation against the dense version --------------------------------------------------------------------------


def transfer_both(target, context, radius, topk):
    dense = plain.transfer(target, context, plain.window(*target.shape[1:], radius), topk)
    cells = F.normalize(target, dim=0).permute(1, 2, 0).contiguous()
    return dense, eval_davis.transfer(cells, plain.our_context(context), radius, topk).permute(2, 0, 1)


@pytest.mark.parametrize(
    "h, w, frames, radius, topk",
    [(28, 28, 8, 12, 5), (15, 33, 3, 4, 5), (33, 15, 2, 0, 7), (3, 2, 1, 12, 5), (20, 20, 1, 1, 5), (14, 29, 2, 3, 9999)],
)  # fmt: skip
def test_blocks_equal_the_dense_affinity(h, w, frames, radius, topk):
    torch.manual_seed(0)
    context = [(torch.randn(16, h, w), torch.rand(3, h, w).softmax(0)) for _ in range(frames)]
    dense, ours = transfer_both(torch.randn(16, h, w), context, radius, topk)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("radius, topk", [(12, 5), (2, 5), (0, 3), (3, 1)])
def test_all_ties_vote(radius, topk):
    torch.manual_seed(0)
    target, *context = F.one_hot(torch.randint(0, 3, (4, 17, 19)), 4).permute(0, 3, 1, 2).float()  # cosines are 0 and 1
    context = [(feats, torch.rand(2, 17, 19).softmax(0)) for feats in context]
    dense, ours = transfer_both(target, context, radius, topk)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)
    best = eval_davis.most_similar(torch.tensor([[0.5, 1.0, 1.0, 1.0, 1.0, -1.0]]), 2)[0].exp()
    assert (best > 0).sum() == 4


def test_no_tensor_grows_with_the_square_of_the_cells():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            Largest.numel = max([Largest.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
            return out

    torch.manual_seed(0)
    largest = {}
    for side in (42, 84):  # both have blocks whose windows are complete
        context = plain.our_context([(torch.randn(4, side, side), torch.rand(2, side, side))] * 2)
        Largest.numel = 0
        with Largest():
            eval_davis.transfer(context[0][0], context, 12, 5)
        largest[side] = Largest.numel
    assert largest[84] <= max(largest[42], 84 * 84 * 4 * 2) < 2 * 84**4 / 50


def fake_features(images):
    """Four smooth channels on a grid of 4-pixel cells: [B, 3, H, W] -> [B, 4, h, w]."""
    pooled = F.avg_pool2d(images, 4)
    return torch.cat([pooled - 0.5, pooled.mean(1, keepdim=True).square()], 1)


@pytest.mark.parametrize("n_last_frames, radius", [(7, 12), (0, 3), (2, 0), (20, 4)])
def test_a_video_equals_the_dense_propagation(n_last_frames, radius):
    torch.manual_seed(0)
    labels, frames = moving(1, 70, 110, 3)[0], torch.rand(11, 3, 64, 96)
    wanted = plain.propagate(fake_features, frames, labels, n_last_frames, radius, 5)
    found = list(eval_davis.propagate(fake_features, frames.split(4), labels, n_last_frames, radius, 5))
    assert len(found) == 10
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(eval_davis.harden(a, 4, (110, 70)), plain.harden(b, 4, (110, 70)))


def test_a_channel_that_fills_the_frame_keeps_it():
    for winner in (0, 1):
        soft = torch.zeros(2, 5, 5)
        soft[winner] = 1 - 1e-7 * torch.rand(5, 5)
        assert (eval_davis.harden(soft, 4, (30, 30)) == winner).all()


def test_an_object_between_the_cells_keeps_its_channel(capfd):
    labels = np.zeros((64, 64), np.uint8)
    labels[1, 1], labels[32:, 32:] = 1, 2
    assert eval_davis.one_hot(labels, (4, 4)).shape == (4, 4, 3)
    assert "objects [1]" in capfd.readouterr().err
    still = torch.rand(1, 3, 64, 64).expand(3, -1, -1, -1)
    found = list(eval_davis.propagate(fake_features, [still], labels, topk=1))  # every cell finds itself
    assert found[-1].shape == (3, 16, 16)
    hard = eval_davis.harden(found[-1], 4, (64, 64))
    assert (hard[36:, 36:] == 2).all() and not hard[:28].any() and not hard[:, :28].any()


@pytest.mark.parametrize(
    "frame, patch, wanted",
    [((854, 480), 16, (832, 480)), ((480, 854), 8, (480, 832)), ((1920, 1080), 16, (832, 480)), ((854, 480), 14, (854, 480))],
)
def test_short_side_is_dinos_rule(frame, patch, wanted):
    assert eval_davis.frame_size(*frame, 224, 480, patch) == wanted
    assert eval_davis.frame_size(*frame, 224, None, patch) == (224, 224)


# ---- scores against the definition ----------------------------------------------------------------------------------


def slow_boundary(mask):
    """Pixel by pixel."""
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            edge[y, x] = any(mask[y, x] != mask[i, j] for i, j in neighbours if i < height and j < width)
    return edge


def test_boundary_by_definition():
    rng = np.random.RandomState(0)
    for shape in ((1, 1), (1, 7), (6, 1), (9, 13)):
        for mask in (rng.rand(*shape) > 0.5, np.ones(shape, bool), np.zeros(shape, bool)):
            np.testing.assert_array_equal(eval_davis.boundary(mask), slow_boundary(mask))
            np.testing.assert_array_equal(plain.boundary(mask), slow_boundary(mask))


def test_frames_by_definition():
    rng = np.random.RandomState(0)
    for _ in range(60):
        truth, labels = (rng.randint(0, 4, (2, rng.randint(2, 40), rng.randint(2, 40))) * (rng.rand() > 0.2)).astype(np.uint8)
        part = slice(rng.randint(0, 20), rng.randint(20, 40))
        truth[part], labels[:, part] = 0, 0
        wanted = [[measure(labels == k, truth == k) for measure in (plain.jaccard, plain.contour)] for k in (1, 2, 3)]
        np.testing.assert_allclose(eval_davis.score_frame(labels, truth, 3), wanted, atol=1e-12)


def test_known_scores():
    square = np.zeros((300, 400), np.uint8)  # the disk's radius is 4
    square[100:140, 100:140] = 1
    away = {shift: eval_davis.score_frame(np.roll(square, shift, 1), square, 1)[0] for shift in (0, 4, 20, 100)}
    assert away[0] == (1, 1) and away[4] == (36 / 44, 1) and away[100] == (0, 0)
    assert away[20] == (1 / 3, pytest.approx(58 / 160))  # 2 x 24 of horizontal edges, 2 x 5 where they meet vertical ones
    nothing = np.zeros_like(square)
    assert eval_davis.score_frame(nothing, nothing, 2) == [(1, 1), (1, 1)]
    assert eval_davis.score_frame(nothing, square, 1) == eval_davis.score_frame(square, nothing, 1) == [(0, 0)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 48, 298, 1000])
def test_decay_does_not_wrap(length):
    values = np.linspace(1, 0, length) ** 2
    mean, recall, decay = eval_davis.summary(values)
    assert (mean, recall) == (values.mean(), np.mean(values > 0.5))
    assert decay == pytest.approx(plain.decay(values), abs=1e-12)
    assert decay > 0.5 or length < 4


def test_odd_videos_score_as_by_definition(tmp_path):
    videos, results = odd_videos()
    root = write_tree(tmp_path / "DAVIS", videos, frames=False)
    for name, labels in results.items():
        write_masks(tmp_path / "results" / name, labels)
    found, table, names = scores_of(tmp_path / "results", root), [], []
    for name, labels in videos.items():
        folders = (tmp_path / "results" / name, root / "Annotations/480p" / name)
        table += plain.score(*(sorted(folder.glob("*.png")) for folder in folders))
        names += [f"{name}_{k + 1}" for k in range(np.where(labels[0] == 255, 0, labels[0]).max())]
    assert list(found["per_object"]) == names and "void_2" in names and "gap_3" in names and "pixel_3" in names
    np.testing.assert_allclose(list(found["per_object"].values()), [(row[0], row[3]) for row in table], atol=1e-12)
    np.testing.assert_allclose([found[metric] for metric in eval_davis.METRICS[1:]], np.mean(table, 0), atol=1e-12)
    assert found["J&F-Mean"] == pytest.approx((found["J-Mean"] + found["F-Mean"]) / 2)
    assert scores_of(tmp_path / "results", root, workers=1) == found


def test_the_annotations_themselves_score_one(cli, tmp_path):
    root = write_tree(tmp_path / "DAVIS", odd_videos()[0], frames=False)
    ran = cli("eval_davis", "--dataroot", root, "--score_only", root / "Annotations/480p", "--output_dir", tmp_path / "out")
    found = results_of(ran)
    assert found["J-Mean"] == found["F-Mean"] == found["J-Recall"] == 1 and found["F-Decay"] == 0
    assert "has label 255, which counts as background" in ran.err
    assert "imsize" not in json.loads(ran.out.splitlines()[-1])["settings"]  # it has no part in a score


def test_two_frames_leave_nothing_to_score(cli, tmp_path):
    root = write_tree(tmp_path / "DAVIS", {"two": moving(2), "six": moving(6)}, frames=False)
    masks = root / "Annotations/480p"
    ran = cli("eval_davis", "--dataroot", root, "--score_only", masks, "--output_dir", tmp_path)
    assert results_of(ran)["per_object"]["two_1"] == [None, None] and results_of(ran)["J&F-Mean"] == 1
    assert "not scored" in ran.err and "two_1,,\n" in (tmp_path / "per-sequence_results-val.csv").read_text()
    assert results_of(cli("eval_davis", "--dataroot", root, "--score_only", masks, "--sequences", "two"))["J-Mean"] is None


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "DAVIS", {"one": moving(6, objects=1), "two": moving(2), "three": moving(5, objects=3, seed=7)})


@pytest.mark.parametrize(
    "flags, folder, grid",
    [
        ([], "davis_vidseg_64_layer11", (4, 4)),
        (["--stride", "8", "--layer", "3"], "davis_vidseg_64_layer3", (7, 7)),
        (["--upsample", "bilinear", "--lift_iter", "2"], "davis_vidseg_64_layer11", (16, 16)),
        (["LIFT"], "davis_vidseg_64_layer11", (8, 8)),
        (["--short_side", "64"], "davis_vidseg_short64_layer11", (4, 4)),
        (["--n_last_frames", "1", "--topk", "3", "--size_mask_neighborhood", "2"], "davis_vidseg_64_layer11", (4, 4)),
    ],
)
def test_command_equals_the_plain_pipeline(tree, rule_backbone, rule_lift, cli, tmp_path, flags, folder, grid):
    lift_flags = ["--lift_path", rule_lift] if flags == ["LIFT"] else flags
    common = ["--dataroot", tree, "--imsize", "64", "--output_dir", tmp_path / "out", "--json", tmp_path / "line.json"]
    ran = cli("eval_davis", *common, *rule_backbone, "--device", "cpu", *lift_flags)
    found, masks = results_of(ran), tmp_path / "out" / folder
    line = json.loads((tmp_path / "line.json").read_text())
    assert line["results"] == found and line == json.loads(ran.out.splitlines()[-1])
    assert line["settings"]["layer"] == int(folder[-2:].strip("r")) and (line["sequences"], line["frames"]) == (3, 13)
    assert {path.name for path in masks.glob("*.csv")} == {"global_results-val.csv", "per-sequence_results-val.csv"}

    chosen = dict(zip(flags[::2], flags[1::2])) if flags != ["LIFT"] else {}
    extractor = ViTExtractor(
        rule_backbone[1], backbone_path=rule_backbone[3], device="cpu",
        stride=int(chosen.get("--stride", 16)), layer=int(chosen.get("--layer", 11)),
    )  # fmt: skip
    lift = load_lift(rule_lift, extractor) if flags == ["LIFT"] else None

    def features(images):
        feats = extractor(images)
        feats = upsample(lift, images, feats) if lift else feats
        return feats if "bilinear" not in flags else F.interpolate(feats, scale_factor=4, mode="bilinear")

    for name in ("one", "two", "three"):
        frames = [Image.open(path) for path in sorted((tree / "JPEGImages/480p" / name).glob("*.jpg"))]
        if "--short_side" in flags:  # 90 x 60 -> 64 x 64
            frames = [cv2.resize(np.array(frame), (64, 64)) for frame in frames]
        else:
            frames = [np.array(frame.resize((64, 64), Image.BICUBIC)) for frame in frames]
        images = extractor.normalize(torch.from_numpy(np.stack(frames) / np.float32(255)).permute(0, 3, 1, 2))
        assert features(images[:1]).shape[2:] == grid
        labels = np.array(Image.open(tree / "Annotations/480p" / name / "00000.png"))
        settings = [int(chosen.get(flag, default)) for flag, default in
                    (("--n_last_frames", 7), ("--size_mask_neighborhood", 12), ("--topk", 5))]  # fmt: skip
        wanted = [labels] + [plain.harden(soft, 16, (90, 60)) for soft in plain.propagate(features, images, labels, *settings)]
        written = [Image.open(path) for path in sorted((masks / name).glob("*.png"))]
        assert len(written) == len(frames) and all(image.mode == "P" for image in written)
        assert all(image.getpalette() == PALETTE for image in written)
        assert np.mean([np.array(image) == label for image, label in zip(written, wanted)]) > 0.999
        if name != "two":
            paths = (sorted(folder.glob("*.png")) for folder in (masks / name, tree / "Annotations/480p" / name))
            table = [(row[0], row[3]) for row in plain.score(*paths)]
            np.testing.assert_allclose([found["per_object"][f"{name}_{k + 1}"] for k in range(len(table))], table, atol=1e-12)


@pytest.fixture
def propagate(tree, rule_backbone, cli, tmp_path):
    """Run the command on `tree` at 32 pixels."""
    common = ["--dataroot", tree, "--output_dir", tmp_path / "out", "--imsize", "32", *rule_backbone, "--device", "cpu"]
    return lambda *flags: cli("eval_davis", *common, *flags)


def dates(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.png"))}


def test_interrupted_runs_resume_at_the_next_sequence(propagate, tree, tmp_path):
    masks, broken = tmp_path / "out/davis_vidseg_32_layer11", tree / "JPEGImages/480p/three/00004.jpg"
    photo = broken.read_bytes()
    broken.write_bytes(photo[:300])
    ran = propagate()
    assert ran.code == 2 and str(broken) in ran.err and not ran.out
    before = dates(masks)
    assert len([path for path in before if path.parts[0] != "three"]) == 8
    assert not list(masks.rglob(".*")) and not list(masks.glob("*.csv"))
    broken.write_bytes(photo)
    resumed = results_of(propagate())
    after = dates(masks)
    assert all(after[path] == date for path, date in before.items() if path.parts[0] != "three") and len(after) == 13
    assert dates(masks) == (results_of(propagate()), after)[1]  # finished: nothing is propagated again
    (masks / "one/00003.png").unlink()
    assert results_of(propagate())["per_object"] == resumed["per_object"]
    shutil.rmtree(tmp_path / "out")
    assert results_of(propagate())["per_object"] == resumed["per_object"]


def test_nothing_of_another_run_is_taken_for_this_one(propagate, rule_backbone, tmp_path):
    masks = tmp_path / "out/davis_vidseg_32_layer11"
    masks.mkdir(parents=True)
    for name in eval_davis.CSVS:
        (masks / name).write_text("J&F-Mean\n9.999\n")
    seen = [dates(masks)]
    weights = Path(rule_backbone[3])
    for flags in ([], ["--topk", "1"], ["--upsample", "bilinear"], []):
        results_of(propagate(*flags))
        assert "9.999" not in (masks / eval_davis.CSVS[0]).read_text()
        assert all(date != seen[-1].get(path) for path, date in dates(masks).items())
        seen.append(dates(masks))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))  # trained anew under the same name
    results_of(propagate())
    assert all(date != seen[-1][path] for path, date in dates(masks).items())


def test_overlay_and_video(propagate, tree, tmp_path):
    results_of(propagate("--overlay", "--video", tmp_path / "all.mp4", "--sequences", "one", "three"))
    folder = tmp_path / "out/davis_vidseg_32_layer11"
    video = cv2.VideoCapture(str(tmp_path / "all.mp4"))
    frames = [video.read()[1] for _ in range(int(video.get(cv2.CAP_PROP_FRAME_COUNT)))]
    assert len(frames) == 11 and frames[0].shape == (60, 90, 3)
    for name in ("one", "three"):
        pictures = sorted((folder / "overlay" / name).glob("*.jpg"))
        assert [path.stem for path in pictures] == [path.stem for path in sorted((folder / name).glob("*.png"))]
        labels = eval_davis.read_labels(folder / name / "00000.png")
        paths = pictures[0], tree / f"JPEGImages/480p/{name}/00000.jpg"
        shown, photo = (np.array(Image.open(path)).astype(int) for path in paths)
        change = np.abs(shown - photo).max(2)
        inside = cv2.erode((labels > 0).astype(np.uint8), np.ones((17, 17))) > 0
        outside = cv2.dilate((labels > 0).astype(np.uint8), np.ones((19, 19))) == 0  # JPEG blocks blur the outline
        assert change[inside].mean() > 20 > change[outside].mean()


def test_another_methods_folder_needs_no_frames(tree, cli, tmp_path):
    shutil.rmtree(tree / "JPEGImages")
    results = tmp_path / "results"
    shutil.copytree(tree / "Annotations/480p", results)
    (results / "one/00000.png").unlink()  # the first and the last are not scored
    Image.fromarray(np.array(Image.open(results / "one/00001.png"))).save(results / "one/00001.png")  # grey, no palette
    assert results_of(cli("eval_davis", "--dataroot", tree, "--score_only", results))["J&F-Mean"] == 1
    assert (results / eval_davis.CSVS[0]).is_file()
    ran = cli("eval_davis", "--dataroot", tree, "--score_only", results, "--overlay")
    assert ran.code == 2 and "JPEGImages" in ran.err


def test_a_palette_is_made_where_there_is_none(propagate, tree, tmp_path):
    first = tree / "Annotations/480p/one/00000.png"
    Image.fromarray(np.array(Image.open(first))).save(first)
    results_of(propagate("--sequences", "one"))
    palette = Image.open(tmp_path / "out/davis_vidseg_32_layer11/one/00003.png").getpalette()
    assert palette[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128] and palette == eval_davis.voc_palette()


# ---- bad input ------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


def label(path, value):
    labels = np.array(Image.open(path))
    labels[:3, :3] = value
    Image.fromarray(labels).save(path)


def resize(path):
    image = Image.open(path)
    image.resize((30, 20)).save(path)


def rgb(path):
    Image.open(path).convert("RGB").save(path)


FRAME, MASK, RESULT = "JPEGImages/480p/one/00002.jpg", "Annotations/480p/one/00002.png", "results/one/00002.png"
BAD = {
    "no folder": (lambda root: shutil.rmtree(root), "correct --dataroot"),
    "no list": (lambda root: (root / "ImageSets/2017/val.txt").unlink(), "with --sequences"),
    "empty list": (lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"), "with --sequences"),
    "unknown sequence": (lambda root: (root / "ImageSets/2017/val.txt").write_text("one\nnone\n"), "or --sequences"),
    "no frame": (lambda root: (root / FRAME).unlink(), "has no frame 00002: restore it"),
    "no annotation": (lambda root: (root / MASK).unlink(), "has no annotation 00002: restore it"),
    "no frames": (lambda root: shutil.rmtree(root / "JPEGImages/480p/one"), "correct --dataroot"),
    "broken frame": (lambda root: cut(root / FRAME), "00002.jpg"),
    "broken annotation": (lambda root: cut(root / MASK), "restore it or write it anew"),
    "no PNG": (lambda root: (root / MASK).write_text("no picture"), "restore it or write it anew"),
    "RGB annotation": (lambda root: rgb(root / MASK), "restore it or write it anew"),
    "frame of another size": (lambda root: resize(root / FRAME), "has 30x20 pixels, its annotation 90x60 pixels: take both"),
    "annotation of another size": (lambda root: resize(root / MASK), "to the annotation"),
}
BAD_RESULTS = {
    "no result": (lambda root: (root / RESULT).unlink(), "restore it"),
    "no folder": (lambda root: shutil.rmtree(root / "results"), "restore it"),
    "more objects": (lambda root: label(root / RESULT, 2), "label 2 where the first annotation has 1 objects: keep"),
    "of another size": (lambda root: resize(root / RESULT), "has 30x20 pixels, its annotation 90x60 pixels: resize"),
    "unreadable": (lambda root: cut(root / RESULT), "restore it or write it anew"),
    "RGB": (lambda root: rgb(root / RESULT), "restore it or write it anew"),
}


def one_line(ran, text):
    lines = [line for line in ran.err.splitlines() if not line.startswith("note:")]
    assert ran.code == 2 and not ran.out and len(lines) == 1 and text in lines[0], ran


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(propagate, tree, tmp_path, case):
    kept = tmp_path / "out/davis_vidseg_32_layer11/other/00000.png"
    kept.parent.mkdir(parents=True)
    kept.write_text("written before")
    spoil, text = BAD[case]
    spoil(tree)
    one_line(propagate(), text)
    assert kept.read_text() == "written before" and not list(tmp_path.rglob("*.csv")) and not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_one_line(tree, cli, case):
    shutil.copytree(tree / "Annotations/480p", tree / "results")
    (tree / "results/global_results-val.csv").write_text("of an earlier run")
    spoil, text = BAD_RESULTS[case]
    spoil(tree)
    one_line(cli("eval_davis", "--dataroot", tree, "--score_only", tree / "results"), text)
    if case != "no folder":
        assert (tree / "results/global_results-val.csv").read_text() == "of an earlier run"


def test_a_folder_that_takes_no_files(tree, cli, tmp_path):
    (tmp_path / "taken").write_text("a file")
    masks = tree / "Annotations/480p"
    ran = cli("eval_davis", "--dataroot", tree, "--score_only", masks, "--output_dir", tmp_path / "taken")
    assert ran.code == 2 and "cannot write" in ran.err and "pass another path" in ran.err
    assert json.loads(ran.out.splitlines()[-1])["results"]["J&F-Mean"] == 1  # the scores are not lost


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--topk", "0"], "pass 1 or more"),
        (["--n_last_frames", "-1"], "pass 0 or more"),
        (["--size_mask_neighborhood", "x"], "--size_mask_neighborhood"),
        (["--workers", "0"], "pass 1 or more"),
        (["--video", "x.avi"], "ends in .mp4"),
        (["--imsize", "40"], "multiple of the patch (16)"),
        (["--short_side", "40"], "multiple of the patch (16)"),
        (["--upsample", "lift"], "pass --lift_path FILE"),
        (["--lift_path", "nowhere.pth"], "--lift_path"),
        (["--sequences", "nobody"], "correct --dataroot or --sequences"),
    ],
)
def test_bad_flags_are_one_line(propagate, flags, text):
    one_line(propagate(*flags), text)


def test_as_a_program(tree, tmp_path):
    root = Path(eval_davis.__file__).parent
    command = [sys.executable, root / "eval_davis.py", "--dataroot", tree, "--score_only", tree / "Annotations/480p"]
    ran = subprocess.run([*command, "--output_dir", tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0 and json.loads(ran.stdout.splitlines()[-1])["results"]["J&F-Mean"] == 1
    assert "one_1" in ran.stdout and (tmp_path / "out" / eval_davis.CSVS[1]).is_file()
