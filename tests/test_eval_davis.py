"""eval_davis.py: golden scores and masks, and the propagation against the dense version.

Then the command line on small trees: videos of your own, what made a folder, doors, bad input.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import plain_davis as plain
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_davis_scores import PALETTE, line_of, moving, results_of, write_tree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import davis_scores
import eval_davis
import features
from command import progress
from davis_scores import read_mask
from files import Results
from lift import load_lift, upsample

# ---- golden numbers -----------------------------------------------------------------------------


def golden(shared, key):
    return json.loads((shared / "golden/davis.json").read_text())[key]


def test_golden_scores(shared, cli, tmp_path):
    data = shared / "data"
    masks = data / "DAVIS_osvos_results"
    ran = cli(
        "eval_davis", "--dataroot", data / "DAVIS", "--score_only", masks, "--output_dir", tmp_path
    )
    found = results_of(ran)
    wanted = golden(shared, "osvos_results_scored")
    for metric in davis_scores.METRICS:
        assert found[metric] == pytest.approx(wanted[metric], abs=1e-6)
    assert found["per_object"].keys() == wanted["per_object"].keys()
    values = list(found["per_object"].values())
    np.testing.assert_allclose(values, list(wanted["per_object"].values()), atol=1e-6)

    assert (tmp_path / "global_results-val.csv").read_text() == (
        "J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay\n"
        "0.793,0.774,0.845,0.213,0.812,0.896,0.176\n"
    )
    rows = (tmp_path / "per-sequence_results-val.csv").read_text().splitlines()
    assert rows[:2] == ["Sequence,J-Mean,F-Mean", "blackswan_1,0.943,0.974"]
    assert len(rows) == 7


@pytest.fixture
def propagate_shared(shared, vit_tiny, golden_lift, cli, tmp_path):
    """Run the shared videos with the real backbone, with or without LiFT, and check J&F."""

    def run(key, names, *flags):
        flags = [*vit_tiny, *flags, "--device", "cpu"]
        if key == "with_lift":
            flags += ["--lift_path", golden_lift]
        data = shared / "data/DAVIS"
        ran = cli("eval_davis", "--dataroot", data, "--output_dir", tmp_path, *flags)
        found = results_of(ran)["per_object"]
        wanted = golden(shared, key)["per_object"]
        assert list(found) == [f"{name}_1" for name in names]
        for name, values in found.items():
            assert np.mean(values) == pytest.approx(np.mean(wanted[name]), abs=0.002), name

    return run


def test_golden_propagation_without_lift(propagate_shared):
    propagate_shared("without_lift", ["libby"], "--sequences", "libby")


def test_golden_propagation_with_lift(shared, propagate_shared, tmp_path):
    propagate_shared("with_lift", ["libby"], "--sequences", "libby")
    ours = tmp_path / "davis_vidseg_224_layer11/libby"
    theirs = sorted((shared / "golden/davis_masks/libby").glob("*.png"))
    same = []
    for path in theirs:
        same.append(read_mask(path)[0] == read_mask(ours / path.name)[0])
    assert len(same) == 49
    assert np.mean(same) >= 0.995


@pytest.mark.long
@pytest.mark.parametrize("key", ["with_lift", "without_lift"])
def test_golden_propagation_of_all(propagate_shared, key):
    names = ["blackswan", "car-shadow", "dog", "drift-chicane", "drift-straight", "libby"]
    propagate_shared(key, names)


# ---- propagation against the dense version ------------------------------------------------------


def transfer_both(target, context, radius, topk):
    """The dense version's segmentation and ours, [n, h, w] each."""
    mask = plain.window(*target.shape[1:], radius)
    dense = plain.transfer(target, context, mask, topk)
    cells = F.normalize(target, dim=0).permute(1, 2, 0).contiguous()
    ours = eval_davis.transfer(cells, plain.our_context(context), radius, topk)
    return dense, ours.permute(2, 0, 1)


@pytest.mark.parametrize(
    "h, w, frames, radius, topk",
    [
        (28, 28, 8, 12, 5),
        (15, 33, 3, 4, 5),
        (33, 15, 2, 0, 7),
        (3, 2, 1, 12, 5),
        (20, 20, 1, 1, 5),
        (14, 29, 2, 3, 9999),
    ],
)
def test_blocks_equal_the_dense_affinity(h, w, frames, radius, topk):
    torch.manual_seed(0)
    context = []
    for _ in range(frames):
        context.append((torch.randn(16, h, w), torch.rand(3, h, w).softmax(0)))
    dense, ours = transfer_both(torch.randn(16, h, w), context, radius, topk)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)


def test_a_window_by_definition():
    far = eval_davis.too_far(6, 1, torch.device("cpu"))
    outside = eval_davis.outside_window(far[2:4, 1:5], far[0:3, 0:4])
    assert outside.shape == (6, 16)
    target = 0
    for y in (2, 3):
        for x in (0, 1, 2):
            wanted = []
            for i in (1, 2, 3, 4):
                for j in (0, 1, 2, 3):
                    wanted.append(abs(y - i) > 1 or abs(x - j) > 1)
            assert outside[target].tolist() == wanted
            target += 1


@pytest.mark.parametrize("radius, topk", [(12, 5), (2, 5), (0, 3), (3, 1)])
def test_all_ties_vote(radius, topk):
    torch.manual_seed(0)
    classes = torch.randint(0, 3, (4, 17, 31))
    maps = F.one_hot(classes, 4).permute(0, 3, 1, 2).float()  # cosines are 0 and 1
    context = []
    for feats in maps[1:]:
        context.append((feats, torch.rand(2, 17, 31).softmax(0)))
    dense, ours = transfer_both(maps[0], context, radius, topk)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)
    cosine = torch.tensor([[0.5, 1.0, 1.0, 1.0, 1.0, -1.0]])
    best = eval_davis.most_similar(cosine, 2)[0].exp()
    assert (best > 0).sum() == 4


@pytest.mark.parametrize("topk", [1, 5, 9999])
def test_a_gpu_weighs_all_sources_and_gets_the_same(topk):
    torch.manual_seed(0)
    for levels in (3, 10**6):  # with many ties, and with none
        cosine = torch.randint(-levels, levels + 1, (40, 300)) / levels
        cosine[:, 7::11] = -torch.inf
        cosine[3, 2:] = -torch.inf  # fewer candidates than votes
        votes = torch.rand(300, 4).softmax(1)
        few = eval_davis.vote_of_few(cosine, votes, topk)
        every = eval_davis.vote_of_all(cosine.clone(), votes, topk)
        torch.testing.assert_close(every, few, atol=1e-6, rtol=0)


def test_a_gpu_takes_one_block_and_does_not_wait():
    """A value that is read would raise here, as fake tensors have none."""
    cpu = torch.device("cpu")
    gpu = torch.device("cuda")
    assert eval_davis.block_side(56, 56, 12, 8, cpu) == eval_davis.TILE
    assert eval_davis.block_side(56, 56, 12, 8, gpu) == 56
    assert eval_davis.block_side(112, 112, 12, 8, gpu) == 56
    assert eval_davis.block_side(2, 2, 12, 8, gpu) == 2
    for side, radius in ((400, 12), (400, 400)):
        block = eval_davis.block_side(side, side, radius, 8, gpu)
        assert block**2 * 8 * min(side, block + 2 * radius) ** 2 <= eval_davis.GPU_BLOCK

    with FakeTensorMode():
        cells = torch.zeros(112, 112, 8, device="cuda")
        context = 3 * [(cells, torch.zeros(112, 112, 3, device="cuda"))]
        found = eval_davis.transfer(cells, context, 12, 5)
        assert (found.device.type, found.shape) == ("cuda", (112, 112, 3))


def test_no_tensor_grows_with_the_square_of_the_cells():
    class Largest(TorchDispatchMode):
        """Remembers the size of the largest tensor that is made."""

        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if torch.is_tensor(leaf):
                    Largest.numel = max(Largest.numel, leaf.numel())
            return out

    torch.manual_seed(0)
    tile, radius, frames = eval_davis.TILE, 12, 2
    window = tile + 2 * radius
    block = tile**2 * frames * window**2  # targets x sources
    largest = {}
    for side in (42, 84):  # both have blocks whose windows are complete
        frame = (torch.randn(4, side, side), torch.rand(2, side, side))
        context = plain.our_context([frame, frame])
        Largest.numel = 0
        with Largest():
            eval_davis.transfer(context[0][0], context, 12, 5)
        largest[side] = Largest.numel
    assert largest[42] == largest[84] == block


def fake_features(images):
    """Four smooth channels on a grid of 4-pixel cells: [B, 3, H, W] -> [B, 4, h, w]."""
    pooled = F.avg_pool2d(images, 4)
    square = pooled.mean(1, keepdim=True).square()
    return torch.cat([pooled - 0.5, square], 1)


class FakeBackbone:
    """What Features is to propagate(): four smooth channels on a grid of 4-pixel cells."""

    patch = 4

    def __call__(self, images):
        return fake_features(images)

    def check_size(self, height, width, flag):
        assert height % 4 == width % 4 == 0


@pytest.fixture
def propagate_frames(tmp_path, monkeypatch):
    """Propagate labels through frames [t, H, W, 3] uint8: the soft and the hard segmentations."""

    def run(frames, labels, short_side=None, **options):
        root = tmp_path / "video"
        root.mkdir()
        save_frames(root / "frames", frames)
        Image.fromarray(labels).save(root / "first.png")
        video = eval_davis.own_video(root / "frames", root / "first.png", root)
        given = eval_davis.read_given(video, False)
        results = Results(root / "out", {}, own=("*.png",))

        softs = []
        harden = eval_davis.harden

        def kept(soft, patch, size):
            softs.append(soft)
            return harden(soft, patch, size)

        monkeypatch.setattr(eval_davis, "harden", kept)
        with ThreadPoolExecutor(2) as pool, progress() as bar:
            eval_davis.propagate(
                video, given, FakeBackbone(), results, pool, bar.update, 64, short_side, **options
            )
        masks = sorted((root / "out/frames").glob("*.png"))
        return softs, [read_mask(path)[0] for path in masks]

    return run


def save_frames(folder, frames, name="{:05d}.png"):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(number))


@pytest.mark.parametrize("n_last_frames, radius", [(7, 12), (0, 3), (2, 0), (20, 4)])
def test_a_video_equals_the_dense_propagation(propagate_frames, n_last_frames, radius):
    labels = moving(1, 70, 110, 3)[0]
    frames = np.random.RandomState(0).randint(0, 256, (11, 70, 110, 3), np.uint8)
    images = plain_input([Image.fromarray(frame) for frame in frames])
    wanted = plain.propagate(fake_features, images, labels, n_last_frames, radius, 5)
    softs, masks = propagate_frames(
        frames, labels, n_last_frames=n_last_frames, size_mask_neighborhood=radius
    )
    assert len(softs) == 10
    assert len(masks) == 11
    np.testing.assert_array_equal(masks[0], labels)
    for ours, hard, dense in zip(softs, masks[1:], wanted):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(hard, plain.harden(dense, 4, (110, 70)))


def test_a_channel_that_fills_the_frame_keeps_it():
    torch.manual_seed(0)
    for winner in (0, 1):
        soft = torch.zeros(2, 5, 5)
        soft[winner] = 1 - 1e-7 * torch.rand(5, 5)
        assert (eval_davis.harden(soft, 4, (30, 30)) == winner).all()


def test_an_object_between_the_cells_keeps_its_channel(propagate_frames, capfd):
    labels = np.zeros((64, 64), np.uint8)
    labels[1, 1] = 1
    labels[32:, 32:] = 2
    assert eval_davis.one_hot(labels, (4, 4)).shape == (4, 4, 3)
    assert "objects [1]" in capfd.readouterr().err

    still = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3), np.uint8).repeat(3, axis=0)
    softs, masks = propagate_frames(still, labels, topk=1)
    assert softs[-1].shape == (3, 16, 16)
    hard = masks[-1]  # every cell has found itself
    assert (hard[36:, 36:] == 2).all()
    assert not hard[:28].any()
    assert not hard[:, :28].any()


@pytest.mark.parametrize(
    "frame, patch, wanted",
    [
        ((854, 480), 16, (832, 480)),
        ((480, 854), 8, (480, 832)),
        ((1920, 1080), 16, (832, 480)),
        ((854, 480), 14, (854, 480)),
    ],
)
def test_short_side_is_dinos_rule(frame, patch, wanted):
    assert eval_davis.frame_size(*frame, 224, 480, patch) == wanted
    assert eval_davis.frame_size(*frame, 224, None, patch) == (224, 224)


def test_frames_are_read_as_they_are_stored(tmp_path):
    """The masks do not turn with an EXIF orientation."""
    photo = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # orientation: turned by 180 degrees
    photo.save(tmp_path / "turned.jpg", exif=upside_down)
    photo.save(tmp_path / "plain.jpg")
    turned = eval_davis.read_frame(tmp_path / "turned.jpg", (64, 64), (64, 64), False)
    wanted = eval_davis.read_frame(tmp_path / "plain.jpg", (64, 64), (64, 64), False)
    assert torch.equal(turned, wanted)


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    videos = {
        "one": moving(6, objects=1),
        "two": moving(2),
        "three": moving(5, objects=3, seed=7),
    }
    return write_tree(tmp_path / "DAVIS", videos)


def test_defaults_are_those_of_the_release():
    args = eval_davis.parser().parse_args(["--dataroot", "DAVIS"])
    wanted = {
        "model_type": "dino_vits8",
        "facet": "key",
        "channel": None,
        "patch": None,
        "stride": None,
        "layer": None,
        "lift_path": None,
        "output_dir": "temp_davis_test",
        "imsize": 224,
        "n_last_frames": 7,
        "size_mask_neighborhood": 12,
        "topk": 5,
    }
    for name, value in wanted.items():
        assert getattr(args, name) == value, name


def plain_input(frames, short_side=None):
    """Frames as the protocol resizes them to 64 pixels, in 0..1: [t, 3, 64, 64]."""
    resized = []
    for frame in frames:
        if short_side:  # 90 x 60 -> 64 x 64
            resized.append(cv2.resize(np.array(frame), (64, 64)))
        else:
            resized.append(np.array(frame.resize((64, 64), Image.BICUBIC)))
    return torch.from_numpy(np.stack(resized) / np.float32(255)).permute(0, 3, 1, 2)


class Case(NamedTuple):
    """What a run is asked for; the defaults are those of the command, at 64 pixels."""

    folder: str = "davis_vidseg_64_layer11"
    grid: tuple[int, int] = (4, 4)
    layer: int = 11
    stride: int = 16
    upsample: str = "none"
    iterations: int = 1
    last: int = 7
    radius: int = 12
    topk: int = 5
    short_side: int | None = None

    def flags(self):
        """The flags that ask for what is not the default."""
        names = {
            "layer": "--layer",
            "stride": "--stride",
            "upsample": "--upsample",
            "iterations": "--lift_iter",
            "last": "--n_last_frames",
            "radius": "--size_mask_neighborhood",
            "topk": "--topk",
            "short_side": "--short_side",
        }
        flags = []
        for field, flag in names.items():
            value = getattr(self, field)
            if value != self._field_defaults[field]:
                flags += [flag, value]
        return flags


CASES = {
    "defaults": Case(),
    "stride and layer": Case("davis_vidseg_64_layer3", (7, 7), layer=3, stride=8),
    "bilinear twice": Case(grid=(16, 16), upsample="bilinear", iterations=2),
    "lift": Case(grid=(8, 8), upsample="lift"),
    "short side": Case("davis_vidseg_short64_layer11", short_side=64),
    "context": Case(last=1, radius=2, topk=3),
}


def first_labels(tree, name):
    return np.array(Image.open(tree / "Annotations/480p" / name / "00000.png"))


def open_frames(tree, name):
    """The frames of a sequence as PIL images."""
    paths = sorted((tree / "JPEGImages/480p" / name).glob("*.jpg"))
    return [Image.open(path) for path in paths]


@pytest.fixture
def run_case(tree, rule_backbone, rule_lift, cli, tmp_path):
    """Run the command on `tree` as a Case asks for."""

    def run(case, *flags):
        flags = [*flags, "--dataroot", tree, "--imsize", "64", "--output_dir", tmp_path / "out"]
        flags += [*rule_backbone, *case.flags(), "--device", "cpu"]
        if case.upsample == "lift":
            flags += ["--lift_path", rule_lift]
        return cli("eval_davis", *flags)

    return run


@pytest.fixture
def plain_features(rule_extractor, rule_lift):
    """plain_features(case) -> the case's extractor, and what makes its features of images."""

    def build(case):
        extractor = rule_extractor(case.stride, layer=case.layer)
        lift = None
        if case.upsample == "lift":
            lift = load_lift(rule_lift, extractor)

        def features(images):
            feats = extractor(images)
            if lift:
                return upsample(lift, images, feats)
            if case.upsample == "bilinear":
                scale = 2**case.iterations
                return F.interpolate(feats, scale_factor=scale, mode="bilinear")
            return feats

        return extractor, features

    return build


@pytest.mark.parametrize("name", CASES)
def test_command_equals_the_plain_pipeline(tree, run_case, plain_features, tmp_path, name):
    case = CASES[name]
    found = results_of(run_case(case))
    masks = tmp_path / "out" / case.folder
    extractor, features = plain_features(case)

    for name in ("one", "two", "three"):
        frames = open_frames(tree, name)
        images = extractor.normalize(plain_input(frames, case.short_side))
        assert features(images[:1]).shape[2:] == case.grid
        labels = first_labels(tree, name)
        wanted = [labels]
        softs = plain.propagate(features, images, labels, case.last, case.radius, case.topk)
        for soft in softs:
            # as DINO does it: enlarged by the patch, whatever the grid is
            wanted.append(plain.harden(soft, 16, (90, 60)))

        paths = sorted((masks / name).glob("*.png"))
        assert len(paths) == len(frames)
        agreement = []
        for path, label in zip(paths, wanted):
            image = Image.open(path)
            assert image.mode == "P"
            assert image.getpalette() == PALETTE
            agreement.append(np.array(image) == label)
        assert np.mean(agreement) > 0.999

        if name == "two":  # has no frame to score
            continue
        truths = sorted((tree / "Annotations/480p" / name).glob("*.png"))
        for number, row in enumerate(plain.score(paths, truths), 1):
            values = found["per_object"][f"{name}_{number}"]
            np.testing.assert_allclose(values, (row[0], row[3]), atol=1e-12)


@pytest.mark.parametrize("name", ["stride and layer", "lift"])
def test_json_tells_what_was_left_out(run_case, tmp_path, name):
    case = CASES[name]
    ran = run_case(case, "--json", tmp_path / "line.json")
    assert ran.code == 0, ran.err
    line = json.loads((tmp_path / "line.json").read_text())
    assert (line["sequences"], line["frames"]) == (3, 13)
    used = line["settings"]
    assert (used["layer"], used["stride"], used["device"]) == (case.layer, case.stride, "cpu")
    assert used["upsample"] == case.upsample
    assert used["digest"]
    names = {path.name for path in (tmp_path / "out" / case.folder).glob("*.csv")}
    assert names == set(davis_scores.CSVS)


@pytest.fixture
def propagate(tree, rule_backbone, cli, tmp_path):
    """Run the command on `tree` at 32 pixels."""
    common = ["--dataroot", tree, "--output_dir", tmp_path / "out", "--imsize", "32"]
    common += [*rule_backbone, "--device", "cpu"]

    def run(*flags):
        return cli("eval_davis", *common, *flags)

    return run


def dates(folder):
    """When each PNG below a folder was written."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        found[path.relative_to(folder)] = path.stat().st_mtime_ns
    return found


def test_interrupted_runs_resume_at_the_next_sequence(propagate, tree, tmp_path):
    masks = tmp_path / "out/davis_vidseg_32_layer11"
    broken = tree / "JPEGImages/480p/three/00004.jpg"
    photo = broken.read_bytes()
    broken.write_bytes(photo[:300])
    ran = propagate()
    assert ran.code == 2
    assert str(broken) in ran.err
    assert not ran.out
    before = dates(masks)
    finished = [path for path in before if path.parts[0] != "three"]
    assert len(finished) == 8
    assert not list(masks.rglob(".*"))
    assert not list(masks.glob("*.csv"))

    broken.write_bytes(photo)
    resumed = results_of(propagate())
    after = dates(masks)
    assert len(after) == 13
    for path in finished:
        assert after[path] == before[path]

    results_of(propagate())
    assert dates(masks) == after  # finished: nothing is propagated again
    (masks / "one/00003.png").unlink()
    assert results_of(propagate())["per_object"] == resumed["per_object"]
    shutil.rmtree(tmp_path / "out")
    assert results_of(propagate())["per_object"] == resumed["per_object"]


def test_masks_are_written_by_the_threads_and_features_made_in_inference_mode(
    propagate, monkeypatch
):
    on_main_thread = []
    write = eval_davis.write_mask
    transfer = eval_davis.transfer
    modes = set()

    def watched_write(results, name, values, palette):
        on_main_thread.append(threading.current_thread() is threading.main_thread())
        write(results, name, values, palette)

    def watched_transfer(cells, context, radius, topk):
        modes.add((torch.is_inference_mode_enabled(), cells.is_inference()))
        return transfer(cells, context, radius, topk)

    monkeypatch.setattr(eval_davis, "write_mask", watched_write)
    monkeypatch.setattr(eval_davis, "transfer", watched_transfer)
    results_of(propagate())
    assert on_main_thread.count(True) == 3  # the given masks
    assert on_main_thread.count(False) == 10
    assert modes == {(True, True)}


def test_a_disk_that_fills_up_in_a_thread_is_one_line(propagate, tmp_path, monkeypatch):
    write = eval_davis.write_mask

    def full(results, name, values, palette):
        if name.endswith("00003.png"):
            raise OSError(f"cannot write {name}: free some space")
        write(results, name, values, palette)

    monkeypatch.setattr(eval_davis, "write_mask", full)
    one_line(propagate(), "free some space")
    monkeypatch.undo()
    results_of(propagate())
    assert len(dates(tmp_path / "out")) == 13


# ---- what made a folder -------------------------------------------------------------------------


@pytest.fixture
def refused(propagate, tmp_path):
    """A run with other flags is refused in the folder of one without, and does well elsewhere.

    Two runs with one folder name used to overwrite each other's masks, and mix overlays.
    """

    def check(flags, said):
        results_of(propagate("--overlay"))
        folder = tmp_path / "out/davis_vidseg_32_layer11"
        masks = dates(folder)
        scores = (folder / davis_scores.CSVS[0]).read_text()

        ran = propagate(*flags, "--overlay")
        one_line(ran, said)
        one_line(ran, "pass --overwrite or another --output_dir")
        assert dates(folder) == masks
        assert (folder / davis_scores.CSVS[0]).read_text() == scores

        elsewhere = propagate(*flags, "--output_dir", tmp_path / "other")
        assert results_of(elsewhere)["J&F-Mean"] is not None

    return check


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topk", "1"], "topk 5, not 1"),
        (["--upsample", "bilinear"], "upsample none, not bilinear"),
        (["--n_last_frames", "1"], "n_last_frames 7, not 1"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
        (["--facet", "query"], "facet key, not query"),
        (["--binary"], "binary False, not True"),
    ],
)
def test_a_folder_of_other_settings_is_refused(refused, flags, said):
    refused(flags, said)


def test_a_folder_of_another_upsampling_is_refused(refused, rule_lift):
    refused(["--lift_path", rule_lift], "upsample none, not lift")


def test_a_folder_of_other_weights_is_refused(refused, rule_weights, tmp_path):
    state = load_file(rule_weights)
    state["norm.weight"] = state["norm.weight"] * 1.01
    state["blocks.3.norm1.weight"] = state["blocks.3.norm1.weight"] * 1.01
    save_file(state, tmp_path / "rule.safetensors")
    refused(["--backbone_path", tmp_path / "rule.safetensors"], "was made with digest")


def test_the_same_weights_with_another_date_or_path_are_the_same(
    propagate, rule_weights, tree, tmp_path, monkeypatch
):
    results_of(propagate())
    masks = dates(tmp_path / "out")
    copy = tmp_path / "copy.safetensors"
    shutil.copy(rule_weights, copy)
    os.utime(copy, ns=(0, 10**9))
    monkeypatch.chdir(tmp_path)
    results_of(propagate("--backbone_path", copy, "--dataroot", tree.name, "--workers", "1"))
    assert dates(tmp_path / "out") == masks


def test_overwrite_removes_the_masks_first(propagate, tree, tmp_path):
    results_of(propagate("--overlay"))
    folder = tmp_path / "out/davis_vidseg_32_layer11"
    (folder / "notes.txt").write_text("of mine")
    flags = ["--topk", "1", "--sequences", "one"]
    assert propagate(*flags).code == 2
    results_of(propagate(*flags, "--overwrite"))
    assert {path.parent.name for path in folder.rglob("*.png")} == {"one"}
    assert not list(folder.rglob("*.jpg"))
    assert (folder / "notes.txt").read_text() == "of mine"
    one_line(propagate(), "was made with topk 1, not 5")


def test_scores_of_another_run_are_not_taken_for_this_one(propagate, tree, tmp_path):
    masks = tmp_path / "out/davis_vidseg_32_layer11"
    masks.mkdir(parents=True)
    for name in davis_scores.CSVS:
        (masks / name).write_text("J&F-Mean\n9.999\n")
    (tree / "JPEGImages/480p/one/00002.jpg").rename(tree / "away.jpg")
    (tree / "JPEGImages/480p/one/00002.jpg").write_text("no photo")
    assert propagate().code == 2
    assert not list(masks.glob("*.csv"))
    (tree / "away.jpg").rename(tree / "JPEGImages/480p/one/00002.jpg")
    results_of(propagate())
    assert "9.999" not in (masks / davis_scores.CSVS[0]).read_text()


def test_masks_that_nobody_knows_are_not_overwritten(propagate, tree, tmp_path):
    masks = tmp_path / "out/davis_vidseg_32_layer11"
    shutil.copytree(tree / "Annotations/480p/one", masks / "one")
    before = dates(masks)
    said = "no settings.json says what made it"
    one_line(propagate(), said)
    # a later run of all sequences would take those of "one" for ours
    one_line(propagate("--sequences", "three"), said)
    assert dates(masks) == before


def test_damaged_settings_are_one_line(propagate, tmp_path):
    results_of(propagate())
    (tmp_path / "out/davis_vidseg_32_layer11/settings.json").write_text("{")
    one_line(propagate(), "pass --overwrite or another --output_dir")


# ---- a backbone of one's own --------------------------------------------------------------------


class Patches(torch.nn.Module):
    """Mean colours of 8 x 8 patches; with `value` added to them."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self, images):
        return F.avg_pool2d(images, 8) + self.value


def colours():
    return Patches(0.25)


def not_numbers():
    return Patches(float("nan"))


def test_a_backbone_of_ones_own(tree, cli, tmp_path):
    flags = ["--dataroot", tree, "--output_dir", tmp_path / "out", "--imsize", "64"]
    flags += ["--my_extractor", "test_eval_davis:colours", "--device", "cpu"]
    used = line_of(cli("eval_davis", *flags))["settings"]
    assert (used["backbone"], used["stride"]) == ("test_eval_davis:colours", 8)
    masks = tmp_path / "out/davis_vidseg_64_my_extractor/three"

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    images = (plain_input(open_frames(tree, "three")) - mean) / std
    labels = first_labels(tree, "three")
    agreement = []
    found = sorted(masks.glob("*.png"))[1:]
    for path, soft in zip(found, plain.propagate(colours(), images, labels, 7, 12, 5)):
        agreement.append(np.array(Image.open(path)) == plain.harden(soft, 8, (90, 60)))
    assert len(agreement) == 4
    assert np.mean(agreement) > 0.999


def test_features_that_are_no_numbers_are_refused(tree, cli, tmp_path):
    """They used to make masks, and scores, of nothing."""
    flags = ["--dataroot", tree, "--output_dir", tmp_path / "out", "--imsize", "64"]
    flags += ["--device", "cpu", "--my_extractor"]
    ran = cli("eval_davis", *flags, "test_eval_davis:not_numbers")
    one_line(ran, "are not finite")
    assert not list(tmp_path.rglob("*.csv"))
    assert not list(tmp_path.rglob("out/**/*.png"))


# ---- videos of your own -------------------------------------------------------------------------


@pytest.fixture
def own(tree, propagate, tmp_path):
    """Run the command on frames of your own: the folder of its results, and the run."""

    def run(frames, mask=tree / "Annotations/480p/three/00000.png", *flags):
        flags = ["--dataroot", "", "--frames", frames, "--mask", mask, *flags]
        ran = propagate(*flags)
        assert ran.code == 0, ran.err
        return tmp_path / "out/davis_vidseg_32_layer11", ran

    return run


def read_masks(folder):
    """The masks of a folder, [t, H, W]."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture
def wanted(propagate, tmp_path):
    """The masks of the video `three`, as the data set's command writes them."""
    results_of(propagate("--sequences", "three", "--output_dir", tmp_path / "wanted"))
    return read_masks(tmp_path / "wanted/davis_vidseg_32_layer11/three")


def convert(folder, target, name):
    """The pictures of a folder under other names: one of {number} and a suffix."""
    target.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.jpg"))):
        to = target / name.format(number)
        if to.suffix == ".png":
            Image.open(path).save(to)
        else:
            shutil.copy(path, to)


@pytest.mark.parametrize("name", ["{}.jpg", "{:03d}.JPG", "frame{}.jpeg", "{:05d}.png"])
def test_frames_of_your_own(own, wanted, tree, tmp_path, name):
    convert(tree / "JPEGImages/480p/three", tmp_path / "clip", name)
    (tmp_path / "clip/notes.txt").write_text("no frame")
    shutil.copy(tree / "Annotations/480p/three/00000.png", tmp_path / "clip/first.png")
    folder, ran = own(tmp_path / "clip", tmp_path / "clip/first.png")
    assert "there is nothing to score" in ran.err
    assert f"masks in {folder / 'clip'}, pictures in {folder / 'overlay/clip'}" in ran.out
    assert len(ran.out.splitlines()) == 1
    assert not list(folder.glob("*.csv"))
    assert ran.report()["results"] is None
    np.testing.assert_array_equal(read_masks(folder / "clip"), wanted)
    stems = [Path(name.format(number)).stem for number in range(5)]
    assert {path.stem for path in (folder / "clip").iterdir()} == set(stems)
    assert {path.stem for path in (folder / "overlay/clip").iterdir()} == set(stems)
    assert np.array(Image.open(folder / "overlay/clip" / f"{stems[0]}.jpg")).shape == (60, 90, 3)


def test_numbers_in_names_count_as_numbers(own, propagate, tmp_path):
    """1.jpg, 2.jpg ... 14.jpg used to be taken as 1, 10, 11, in the data set as well."""
    labels = moving(14, objects=2, seed=7)
    padded = write_tree(tmp_path / "padded", {"a": labels})
    plain_names = tmp_path / "plain"
    for part in ("JPEGImages", "Annotations"):
        (plain_names / part / "480p/a").mkdir(parents=True)
        for path in (padded / part / "480p/a").iterdir():
            number = int(path.stem) + 1
            shutil.copy(path, plain_names / part / "480p/a" / f"{number}{path.suffix}")

    found = {}
    for root in (padded, plain_names):
        flags = ["--dataroot", root, "--sequences", "a", "--output_dir", root / "out"]
        found[root.name] = results_of(propagate(*flags))
    assert found["plain"] == found["padded"]

    first = plain_names / "Annotations/480p/a/1.png"
    folder, _ = own(plain_names / "JPEGImages/480p/a", first)
    for number in range(1, 15):
        ours = folder / f"a/{number}.png"
        theirs = tmp_path / f"padded/out/davis_vidseg_32_layer11/a/{number - 1:05d}.png"
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_data_set_may_have_first_masks_alone(propagate, wanted, tree, tmp_path):
    for number in range(1, 5):
        (tree / f"Annotations/480p/three/{number:05d}.png").unlink()
    ran = propagate()
    assert set(results_of(ran)["per_object"]) == {"one_1", "two_1", "two_2"}
    assert "three has the mask of its first frame alone: there is nothing to score" in ran.err
    folder = tmp_path / "out/davis_vidseg_32_layer11"
    np.testing.assert_array_equal(read_masks(folder / "three"), wanted)
    assert len(list((folder / "overlay/three").iterdir())) == 5
    assert not (folder / "overlay/one").exists()


def test_a_data_set_without_the_level_480p(propagate, tree):
    wanted = results_of(propagate())
    for part in ("JPEGImages", "Annotations"):
        for path in (tree / part / "480p").iterdir():
            path.rename(tree / part / path.name)
        (tree / part / "480p").rmdir()
    assert results_of(propagate("--overwrite")) == wanted


def test_a_movie(own, wanted, tree, tmp_path):
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once, by the writer here
    writer = None
    for path in sorted((tree / "JPEGImages/480p/three").glob("*.jpg")):
        picture = cv2.imread(str(path))
        if writer is None:
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), codec, 24, (90, 60))
        writer.write(picture)
    writer.release()
    folder, _ = own(tmp_path / "clip.mp4")
    masks = read_masks(folder / "clip")
    assert (masks == wanted).mean() > 0.95  # what is lost in the codec
    assert len(list((folder / "overlay/clip").iterdir())) == 5


def test_one_picture_is_a_video_too(own, tree, tmp_path):
    convert(tree / "JPEGImages/480p/three", tmp_path / "clip", "{}.jpg")
    for number in range(1, 5):
        (tmp_path / f"clip/{number}.jpg").unlink()
    folder, ran = own(tmp_path / "clip")
    assert "there is nothing to score" in ran.err
    assert len(read_masks(folder / "clip")) == 1


def test_colours_of_the_first_mask_are_labels(own, wanted, tree, tmp_path):
    labels = Image.open(tree / "Annotations/480p/three/00000.png")
    labels.putpalette(davis_scores.davis_palette())
    for mode in ("RGB", "RGBA", "L"):
        labels.convert("RGB").convert(mode).save(tmp_path / "first.png")
        frames = tree / "JPEGImages/480p/three"
        folder, _ = own(frames, tmp_path / "first.png", "--output_dir", tmp_path / mode)
        masks = tmp_path / mode / folder.name / "three"
        np.testing.assert_array_equal(read_masks(masks), wanted)


def test_another_first_mask_is_propagated_anew(own, tree, tmp_path):
    """Its path is the same, and so are all settings."""
    mask = tmp_path / "first.png"
    shutil.copy(tree / "Annotations/480p/three/00000.png", mask)
    frames = tree / "JPEGImages/480p/three"
    folder, _ = own(frames, mask)
    before = dates(folder)
    own(frames, mask)
    assert dates(folder) == before
    masks = read_masks(folder / "three")
    assert 1 in masks[1:]
    labels = np.array(Image.open(mask))
    Image.fromarray(np.where(labels == 1, 0, labels).astype(np.uint8)).save(mask)
    own(frames, mask)
    assert 1 not in read_masks(folder / "three")


@pytest.mark.parametrize(
    "flags, text",
    [
        ([], "pass --dataroot DAVIS, or --frames FOLDER"),
        (["--frames", "clip"], "--frames and --mask need each other"),
        (["--mask", "first.png", "--dataroot", "x"], "--frames and --mask need each other"),
        (["--frames", "clip", "--mask", "first.png", "--dataroot", "x"], "do not go with --frames"),
        (["--frames", "nowhere", "--mask", "first.png"], "as --frames"),
        (["--frames", "empty", "--mask", "first.png"], "there are no pictures in empty: pass"),
        (["--frames", "text.mp4", "--mask", "first.png"], "cannot read --frames text.mp4 as a"),
        (["--frames", "clip", "--mask", "nowhere.png"], "there is no mask nowhere.png"),
        (["--frames", "clip", "--mask", "blurred.jpg"], "is a JPEG, which blurs labels"),
        (["--frames", "clip", "--mask", "small.png"], "90x60 pixels, its mask 30x20 pixels"),
    ],
)
def test_bad_videos_of_your_own_are_one_line(
    tree, rule_backbone, cli, tmp_path, monkeypatch, flags, text
):
    monkeypatch.chdir(tmp_path)
    convert(tree / "JPEGImages/480p/three", tmp_path / "clip", "{}.jpg")
    Path("empty").mkdir()
    Path("text.mp4").write_text("no movie")
    mask = Image.open(tree / "Annotations/480p/three/00000.png")
    mask.save("first.png")
    mask.convert("RGB").save("blurred.jpg")
    mask.resize((30, 20)).save("small.png")
    ran = cli("eval_davis", *rule_backbone, "--imsize", "32", "--device", "cpu", *flags)
    one_line(ran, text)


# ---- masks of 0 and 255 -------------------------------------------------------------------------


@pytest.fixture
def binary_tree(tmp_path):
    """The masks of DAVIS 2016: grey, 255 is the object."""
    root = write_tree(tmp_path / "binary", {"one": moving(6, objects=1)})
    for path in root.rglob("*.png"):
        Image.fromarray(255 * np.array(Image.open(path))).save(path)
    return root


def test_masks_of_0_and_255_say_what_they_are(binary_tree, propagate, cli, tmp_path):
    """They used to end in: cannot reshape array of size 0."""
    one_line(propagate("--dataroot", binary_tree), "pass --binary if 255 is the object")
    masks = binary_tree / "Annotations/480p"
    flags = ["--dataroot", binary_tree, "--score_only", masks, "--output_dir", tmp_path / "out"]
    ran = cli("eval_davis", *flags)
    one_line(ran, "pass --binary if 255 is the object")


def test_binary_masks_score_as_those_of_label_1(binary_tree, propagate, cli, tmp_path):
    wanted = results_of(propagate("--sequences", "one"))
    flags = ["--dataroot", binary_tree, "--binary", "--output_dir", tmp_path / "out_binary"]
    assert results_of(propagate(*flags)) == wanted

    masks = tmp_path / "out_binary/davis_vidseg_32_layer11"
    ours = tmp_path / "out/davis_vidseg_32_layer11"
    for path in sorted((ours / "one").glob("*.png")):
        values = np.array(Image.open(masks / "one" / path.name))
        np.testing.assert_array_equal(values, 255 * np.array(Image.open(path)))

    # results may hold 1 or 255
    for folder in (masks, ours):
        flags = ["--dataroot", binary_tree, "--binary", "--score_only", folder]
        ran = cli("eval_davis", *flags, "--output_dir", tmp_path / "scores")
        assert results_of(ran) == wanted
        assert "counts as background" not in ran.err


@pytest.mark.parametrize("value", [1, 128, 255])
def test_binary_masks_are_written_as_the_given_one(binary_tree, propagate, tmp_path, value):
    """A mask of 0 and 1 used to be followed by masks of 0 and 255."""
    for path in binary_tree.rglob("*.png"):
        Image.fromarray(np.uint8(value) * (np.array(Image.open(path)) > 0)).save(path)
    found = results_of(propagate("--dataroot", binary_tree, "--binary"))
    assert found["per_object"].keys() == {"one_1"}
    masks = read_masks(tmp_path / "out/davis_vidseg_32_layer11/one")
    assert len(masks) == 6
    for mask in masks:
        assert np.unique(mask).tolist() == [0, value]


def test_a_first_mask_without_an_object_is_one_line(propagate, tree):
    first = tree / "Annotations/480p/two/00000.png"
    Image.fromarray(np.zeros((60, 90), np.uint8)).save(first)
    one_line(propagate(), f"{first} marks no object: restore it, or leave its video out")


# ---- pictures and scores of others --------------------------------------------------------------


def test_overlay(propagate, tree, tmp_path):
    ran = propagate("--overlay", "--sequences", "one", "three")
    results_of(ran)
    folder = tmp_path / "out/davis_vidseg_32_layer11"
    for name in ("one", "three"):
        pictures = sorted((folder / "overlay" / name).glob("*.jpg"))
        masks = sorted((folder / name).glob("*.png"))
        assert [path.stem for path in pictures] == [path.stem for path in masks]
        labels, _ = read_mask(folder / name / "00000.png")
        shown = np.array(Image.open(pictures[0])).astype(int)
        photo = np.array(Image.open(tree / f"JPEGImages/480p/{name}/00000.jpg")).astype(int)
        change = np.abs(shown - photo).max(2)

        # JPEG blocks blur the outline
        objects = (labels > 0).astype(np.uint8)
        inside = cv2.erode(objects, np.ones((17, 17))) > 0
        outside = cv2.dilate(objects, np.ones((19, 19))) == 0
        assert change[inside].mean() > 20 > change[outside].mean()


def test_another_methods_folder_needs_no_frames(tree, cli, tmp_path):
    shutil.rmtree(tree / "JPEGImages")
    results = tmp_path / "results"
    shutil.copytree(tree / "Annotations/480p", results)
    (results / "one/00000.png").unlink()  # the first and the last are not scored
    path = results / "one/00001.png"
    Image.fromarray(np.array(Image.open(path))).save(path)  # grey, no palette

    flags = ["--dataroot", tree, "--score_only", results, "--output_dir", tmp_path / "scores"]
    assert results_of(cli("eval_davis", *flags))["J&F-Mean"] == 1
    assert (tmp_path / "scores" / davis_scores.CSVS[0]).is_file()
    ran = cli("eval_davis", *flags, "--overlay")
    assert ran.code == 2
    assert "JPEGImages" in ran.err


def test_scoring_writes_nothing_into_the_folder_and_says_where(
    tree, cli, tmp_path, monkeypatch
):
    """It may be somebody else's, or the annotations themselves."""
    monkeypatch.chdir(tmp_path)
    masks = tree / "Annotations/480p"
    before = sorted(masks.rglob("*"))
    ran = cli("eval_davis", "--dataroot", tree, "--score_only", masks, "--overlay")
    assert results_of(ran)["J&F-Mean"] == 1
    assert sorted(masks.rglob("*")) == before
    assert f"the scores are in temp_davis_test/{davis_scores.CSVS[0]}" in ran.err
    assert (tmp_path / "temp_davis_test" / davis_scores.CSVS[0]).is_file()
    assert len(list((tmp_path / "temp_davis_test/overlay/one").glob("*.jpg"))) == 6


def test_a_palette_is_made_where_there_is_none(propagate, tree, tmp_path):
    first = tree / "Annotations/480p/one/00000.png"
    Image.fromarray(np.array(Image.open(first))).save(first)
    results_of(propagate("--sequences", "one"))
    written = tmp_path / "out/davis_vidseg_32_layer11/one/00003.png"
    palette = Image.open(written).getpalette()
    assert palette[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert palette == davis_scores.voc_palette()


# ---- bad input ----------------------------------------------------------------------------------


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def label(path, value):
    labels = np.array(Image.open(path))
    labels[:3, :3] = value
    Image.fromarray(labels).save(path)


def resize(path):
    image = Image.open(path)
    image.resize((30, 20)).save(path)


def rgb(path):
    Image.open(path).convert("RGB").save(path)


VAL = "ImageSets/2017/val.txt"
FRAME = "JPEGImages/480p/one/00002.jpg"
MASK = "Annotations/480p/one/00002.png"
RESULT = "results/one/00002.png"
BAD = {
    "no folder": (lambda root: shutil.rmtree(root), "correct --dataroot"),
    "no list": (lambda root: (root / VAL).unlink(), "with --sequences"),
    "empty list": (lambda root: (root / VAL).write_text("\n"), "with --sequences"),
    "unknown sequence": (lambda root: (root / VAL).write_text("one\nnone\n"), "or --sequences"),
    "a name that leaves": (
        lambda root: (root / VAL).write_text("one\n../../../out\n"),
        "'../../../out' leaves the folder",
    ),
    "an absolute name": (
        lambda root: (root / VAL).write_text(f"{root}/Annotations/480p/one\n"),
        "leaves the folder",
    ),
    "no frame": (lambda root: (root / FRAME).unlink(), "has no frame 00002: restore it"),
    "no annotation": (lambda root: (root / MASK).unlink(), "has no annotation 00002: restore it"),
    "no frames": (
        lambda root: shutil.rmtree(root / "JPEGImages/480p/one"),
        "correct --dataroot",
    ),
    "broken frame": (lambda root: cut(root / FRAME), "00002.jpg"),
    "broken annotation": (lambda root: cut(root / MASK), "restore it or write it anew"),
    "no PNG": (lambda root: (root / MASK).write_text("no picture"), "restore it or write it anew"),
    "RGB annotation": (lambda root: rgb(root / MASK), "in neither DAVIS's nor VOC's palette"),
    "frame of another size": (
        lambda root: resize(root / FRAME),
        "has 30x20 pixels, its mask 90x60 pixels: take both",
    ),
    "annotation of another size": (lambda root: resize(root / MASK), "to the annotation"),
}
BAD_RESULTS = {
    "no result": (lambda root: (root / RESULT).unlink(), "restore it"),
    "no folder": (lambda root: shutil.rmtree(root / "results"), "restore it"),
    "more objects": (
        lambda root: label(root / RESULT, 2),
        "has label 2, and the first annotation none above 1: use its labels",
    ),
    "of another size": (
        lambda root: resize(root / RESULT),
        "has 30x20 pixels, its annotation 90x60 pixels: resize",
    ),
    "unreadable": (lambda root: cut(root / RESULT), "restore it or write it anew"),
    "RGB": (lambda root: rgb(root / RESULT), "in neither DAVIS's nor VOC's palette"),
}


def one_line(ran, text):
    """The run was refused by one line with `text`; notes may stand before it."""
    lines = [line for line in ran.err.splitlines() if not line.startswith("note:")]
    assert ran.code == 2, ran
    assert not ran.out, ran
    assert len(lines) == 1, ran
    assert text in lines[0], ran


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(propagate, tree, tmp_path, case):
    kept = tmp_path / "out/davis_vidseg_32_layer11/other/notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("written before")
    spoil, text = BAD[case]
    spoil(tree)
    one_line(propagate(), text)
    assert kept.read_text() == "written before"
    assert not list(tmp_path.rglob("*.csv"))
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_one_line(tree, cli, case):
    results = tree / "results"
    shutil.copytree(tree / "Annotations/480p", results)
    (results / "global_results-val.csv").write_text("of an earlier run")
    spoil, text = BAD_RESULTS[case]
    spoil(tree)
    flags = ["--dataroot", tree, "--score_only", results, "--output_dir", results]
    one_line(cli("eval_davis", *flags), text)
    if case != "no folder":
        assert (results / "global_results-val.csv").read_text() == "of an earlier run"


def test_a_folder_that_takes_no_files(tree, cli, tmp_path):
    (tmp_path / "taken").write_text("a file")
    masks = tree / "Annotations/480p"
    flags = ["--dataroot", tree, "--score_only", masks, "--output_dir", tmp_path / "taken"]
    ran = cli("eval_davis", *flags)
    assert ran.code == 2
    assert "cannot write" in ran.err
    assert "choose another path" in ran.err
    assert "J&F-Mean   1.000" in ran.out  # the scores are not lost


def test_scores_are_written_before_a_json_file_that_cannot_be(tree, cli, tmp_path):
    (tmp_path / "taken").write_text("a file")
    masks = tree / "Annotations/480p"
    flags = ["--dataroot", tree, "--score_only", masks, "--output_dir", tmp_path / "scores"]
    ran = cli("eval_davis", *flags, "--json", tmp_path / "taken/line.json")
    assert ran.code == 2
    assert "cannot write" in ran.err
    assert "J&F-Mean   1.000" in ran.out
    for name in davis_scores.CSVS:
        assert (tmp_path / "scores" / name).is_file()


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--topk", "0"], "pass 1 or more"),
        (["--n_last_frames", "-1"], "pass 0 or more"),
        (["--size_mask_neighborhood", "x"], "--size_mask_neighborhood"),
        (["--size_mask_neighborhood", "-1"], "pass 0 or more"),
        (["--short_side", "0"], "pass 1 or more"),
        (["--workers", "0"], "pass 1 or more"),
        (["--imsize", "40"], "--imsize 40 is not a multiple of the patch (16)"),
        (["--short_side", "40"], "--short_side 40 is not a multiple of the patch (16)"),
        (["--upsample", "bilinear", "--lift_iter", "14"], "out of memory"),
        (["--upsample", "lift"], "pass --lift_path FILE"),
        (["--lift_path", "nowhere.pth"], "--lift_path"),
        (["--sequences", "nobody"], "correct --dataroot or --sequences"),
        (["--sequences", "../480p/one"], "leaves the folder"),
        (["--sequences", "one", "x" * 256], "File name too long"),
        (["--sequences", ""], "correct --dataroot or --sequences"),
        (["--bin"], "--bin"),
    ],
)
def test_bad_flags_are_one_line(propagate, flags, text):
    one_line(propagate(*flags), text)


def test_cheap_things_are_checked_before_the_backbone_is_built(propagate, monkeypatch):
    """A module that is not there used to wait for a download."""

    def never(*args, **options):
        raise AssertionError("the backbone was built")

    monkeypatch.setattr(features, "build_extractor", never)
    for flags in (
        ["--lift_path", "nowhere.pth"],
        ["--upsample", "lift"],
        ["--topk", "0"],
        ["--sequences", "nobody"],
    ):
        assert propagate(*flags).code == 2


def test_as_a_program(tree, tmp_path):
    script = Path(eval_davis.__file__)
    masks = tree / "Annotations/480p"
    command = [sys.executable, script, "--dataroot", tree, "--score_only", masks]
    command += ["--output_dir", tmp_path / "out"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[1].split() == ["one_1", "1.000", "1.000"]
    assert (tmp_path / "out" / davis_scores.CSVS[1]).is_file()
