"""eval_segmentation.py and segmentation_data.py: metrics against torchmetrics, the probe against a
plain loop, every layout, every kind of mask, and the command line on a few real frames."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import eval_segmentation
from eval_segmentation import (
    Batches,
    confusion,
    draw,
    logits_of,
    pixel_loss,
    plan,
    predict,
    score_maps,
    scores,
    to_compute,
    train_probe,
)
from segmentation_data import (
    CITY_LABELS,
    DATASETS,
    IGNORED,
    Sample,
    choose_data,
    class_table,
    read_mask,
    read_photos,
    voc_palette,
)

COLOURS = [(230, 30, 30), (30, 220, 40), (40, 30, 210)]


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if mode:
        picture = picture.convert(mode)
    picture.save(path)


def blocks(number, height=32, width=48):
    """A photo [H, W, 3] in blocks of 8 pixels of COLOURS, and its labels; a block is void (255)."""
    random = np.random.RandomState(number)
    cells = random.randint(len(COLOURS), size=(height // 8, width // 8)).astype(np.uint8)
    labels = np.kron(cells, np.ones((8, 8), np.uint8))
    photo = np.array(COLOURS, np.uint8)[labels]
    labels[:8, 16:24] = 255
    return photo, labels


def write_blocks(root, split, count):
    for number in range(count):
        photo, labels = blocks(number)
        save(root / f"images/{split}/{number}.png", photo)
        save(root / f"masks/{split}/{number}.png", labels)


@pytest.fixture
def toy(tmp_path):
    """The folder of a toy data set of three classes: 6 photos to train on and 3 to score."""
    write_blocks(tmp_path / "toy", "train", 6)
    write_blocks(tmp_path / "toy", "val", 3)
    return tmp_path / "toy"


def toy_photos(root, split="train", size=(32, 48)):
    return read_photos(choose_data("folder", root, 3), root, split, size, squash=True)


def mean_colours(images):
    """A stand-in for a network [B, 3, H, W] -> [B, 4, H/8, W/8]: colours, and the column's number.

    The last channel makes features of a flipped photo other than the features flipped.
    """
    feats = F.avg_pool2d(images, 8)
    column = torch.linspace(0, 1, feats.shape[3]).expand(len(feats), 1, *feats.shape[2:])
    return torch.cat([feats, column], dim=1)


# ---- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["none", "everywhere", "in the truth"])
def test_metrics_are_those_of_torchmetrics(absent):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(-1, 7, (4, 40, 50), generator=generator)
    predicted = torch.randint(0, 7, (4, 40, 50), generator=generator)
    agree = torch.rand(4, 40, 50, generator=generator) < 0.6
    predicted[agree & (truth >= 0)] = truth[agree & (truth >= 0)]
    if absent != "none":
        truth[truth == 5] = 2
    if absent == "everywhere":
        predicted[predicted == 5] = 2

    found = scores(confusion(truth, predicted, 7), list("abcdefg"))
    theirs = {"num_classes": 7, "ignore_index": IGNORED}
    mean = metrics.multiclass_jaccard_index(predicted, truth, average="macro", **theirs)
    each = metrics.multiclass_jaccard_index(predicted, truth, average="none", **theirs)
    accuracy = metrics.multiclass_accuracy(predicted, truth, average="micro", **theirs)
    assert found["miou"] / 100 == pytest.approx(mean.item(), abs=1e-6)
    assert found["accuracy"] / 100 == pytest.approx(accuracy.item(), abs=1e-6)
    for row, theirs in zip(found["classes"], each.tolist()):
        assert (row["iou"] or 0) / 100 == pytest.approx(theirs, abs=1e-6)
    assert (found["classes"][5]["iou"] is None) == (absent == "everywhere")


def test_scores_by_hand():
    truth = torch.tensor([0, 0, 0, 1, 1, IGNORED])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    total = confusion(truth, predicted, 4)
    assert total.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = scores(total, ["a", "b", "c", "d"])
    ious = [row["iou"] for row in found["classes"]]
    assert ious == [pytest.approx(200 / 3), pytest.approx(100 / 3), 0, None]
    assert found["miou"] == pytest.approx(100 / 3)
    assert found["accuracy"] == pytest.approx(60)
    assert found["pixels"] == 5
    assert [row["share"] for row in found["classes"]] == [60, 40, 0, 0]


def test_no_pixel_that_counts_is_an_error():
    total = confusion(torch.full((3,), IGNORED), torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="all are void"):
        scores(total, ["a", "b"])


# ---- data sets ----------------------------------------------------------------------------------


def test_the_command_line_has_all_data_sets():
    assert tuple(DATASETS) == eval_segmentation.NAMES
    lengths = {name: len(data.classes) for name, data in DATASETS.items()}
    assert lengths == {"camvid": 11, "voc": 21, "ade20k": 150, "cityscapes": 19, "folder": 0}
    assert all(len(data.classes) == len(data.labels) for data in DATASETS.values())


# name, split, photos and their masks below the root, labels in the files, classes
LAYOUTS = [
    ("camvid", "test", "test/a.png", "testannot/a.png", [0, 10, 11], [0, 10, -1]),
    ("voc", "val", "VOC2012/JPEGImages/2007_a.jpg", "VOC2012/SegmentationClass/2007_a.png",
     [0, 20, 255], [0, 20, -1]),
    ("voc", "trainaug", "VOCdevkit/VOC2012/JPEGImages/b.jpg",
     "VOCdevkit/VOC2012/SegmentationClassAug/b.png", [0, 20, 255], [0, 20, -1]),
    ("ade20k", "validation", "images/validation/c.jpg", "annotations/validation/c.png",
     [0, 1, 150], [-1, 0, 149]),
    ("ade20k", "training", "ADEChallengeData2016/images/training/c.jpg",
     "ADEChallengeData2016/annotations/training/c.png", [0, 1, 150], [-1, 0, 149]),
    ("cityscapes", "val", "leftImg8bit/val/bonn/bonn_0_leftImg8bit.png",
     "gtFine/val/bonn/bonn_0_gtFine_labelIds.png", [6, 7, 33, 255], [-1, 0, 18, -1]),
    ("folder", "val", "val/images/d.jpg", "val/masks/d.png", [0, 2, 255], [0, 2, -1]),
    ("folder", "val", "images/val/sub/d.jpg", "masks/val/sub/d.png", [0, 2, 255], [0, 2, -1]),
]  # fmt: skip


@pytest.mark.parametrize("name, split, image, mask, labels, classes", LAYOUTS)
def test_layouts(tmp_path, name, split, image, mask, labels, classes):
    save(tmp_path / image, np.zeros((16, 16, 3), np.uint8))
    array = np.resize(np.array(labels, np.uint8), (16, 16))
    save(tmp_path / mask, array)
    if name == "voc":
        list_path = tmp_path / image.split("JPEGImages")[0] / f"ImageSets/Segmentation/{split}.txt"
        list_path.parent.mkdir(parents=True)
        list_path.write_text((tmp_path / image).stem + "\n")

    data = choose_data(name, tmp_path, 3 if name == "folder" else None)
    photos = read_photos(data, tmp_path, split, (16, 16), squash=False)
    assert photos.samples == [Sample(photos.samples[0].name, tmp_path / image, tmp_path / mask)]
    _, read = photos[(0, False)]
    expected = np.resize(np.array(classes), (16, 16))
    assert np.array_equal(read, expected)


def test_every_cityscapes_label_has_one_class():
    table = class_table(DATASETS["cityscapes"])
    assert table[CITY_LABELS].tolist() == list(range(19))
    assert (table[:34] == IGNORED).sum() == 15


def test_names_of_ade20k(tmp_path):
    (tmp_path / "ADEChallengeData2016").mkdir()
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    for number in range(1, 151):
        lines.append(f"{number}\t.1\t9\t9\tthing{number}, also \n".rstrip("\n"))
    path = tmp_path / "ADEChallengeData2016/objectInfo150.txt"
    path.write_text("\n".join(lines))
    assert choose_data("ade20k", tmp_path).classes[149] == "thing150"
    path.unlink()
    assert choose_data("ade20k", tmp_path).classes[149] == "class 150"


# ---- masks --------------------------------------------------------------------------------------

LABELS = np.array([[0, 1, 2], [20, 7, 255]], np.uint8)


def indexed(labels):
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.flatten().tolist())
    picture.putpalette(voc_palette().astype(np.uint8).tobytes())
    return picture


MASKS = {
    "grey": Image.fromarray(LABELS),
    "indexed": indexed(LABELS),
    "indexed_rgb": indexed(LABELS).convert("RGB"),
    "indexed_rgba": indexed(LABELS).convert("RGBA"),
    "grey_rgb": Image.fromarray(LABELS).convert("RGB"),
    "16bit": Image.fromarray(LABELS.astype(np.uint16)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_masks(tmp_path, kind):
    path = tmp_path / "mask.png"
    MASKS[kind].save(path)
    assert np.array_equal(read_mask(path), LABELS)


def test_masks_of_one_bit_and_of_large_labels(tmp_path):
    save(tmp_path / "bit.png", LABELS > 1)
    assert np.array_equal(read_mask(tmp_path / "bit.png"), LABELS > 1)
    save(tmp_path / "large.png", LABELS.astype(np.uint16) * 200)
    assert np.array_equal(read_mask(tmp_path / "large.png"), LABELS.astype(int) * 200)


def test_the_palette_is_that_of_voc():
    palette = voc_palette().tolist()
    assert palette[1] == [128, 0, 0]
    assert palette[15] == [192, 128, 128]
    assert palette[20] == [0, 64, 128]
    assert palette[255] == [224, 224, 192]


def one_sample(folder, photo, labels):
    save(folder / "images/val/a.png", photo)
    save(folder / "masks/val/a.png", labels)
    return toy_photos(folder, "val", (16, 16))


def test_other_labels_are_refused(tmp_path):
    photo, labels = blocks(0)
    labels[3, 4] = 128
    photos = one_sample(tmp_path, photo, labels)
    found = r"a\.png has label 128, but classes are 0 to 2, void \[255\]"
    with pytest.raises(ValueError, match=found):
        photos[(0, False)]


def test_labels_beyond_16_bits_are_refused(tmp_path):
    photo, labels = blocks(0)
    photos = one_sample(tmp_path, photo, labels)
    for wrong in (-7, 2**20):  # a TIFF under the name of a PNG can hold them
        changed = labels.astype(np.int32)
        changed[5, 6] = wrong
        Image.fromarray(changed).save(photos.samples[0].mask, format="TIFF")
        with pytest.raises(ValueError, match=f"has label {wrong}, but"):
            photos[(0, False)]


def test_a_mask_of_another_size_is_refused(tmp_path):
    photo, labels = blocks(0)
    photos = one_sample(tmp_path, photo, labels[:16])
    with pytest.raises(ValueError, match="is 48x16, its photo 48x32: make them of one size"):
        photos[(0, False)]


def test_colours_that_are_no_labels_are_refused(tmp_path):
    photo, _ = blocks(0)
    photos = one_sample(tmp_path, photo, photo)
    with pytest.raises(ValueError, match=r"a colour picture with \(230, 30, 30\)"):
        photos[(0, False)]


def test_a_missing_mask_and_one_that_cannot_be_read(tmp_path):
    photo, labels = blocks(0)
    photos = one_sample(tmp_path, photo, labels)
    path = tmp_path / "masks/val/a.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        photos[(0, False)]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no label map .*a\.png: add it, or remove"):
        toy_photos(tmp_path, "val")


# ---- geometry -----------------------------------------------------------------------------------


def nearest_exact(labels, height, width):
    """Every pixel of the result takes the label in which its centre lies."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[rows][:, columns]


@pytest.mark.parametrize("height, width", [(60, 91), (91, 60), (20, 33)])
def test_shorter_side_and_centre_crop(tmp_path, height, width):
    random = np.random.RandomState(0)
    photo = random.randint(256, size=(height, width, 3)).astype(np.uint8)
    labels = random.randint(3, size=(height, width)).astype(np.uint8)
    save(tmp_path / "images/val/a.png", photo)
    save(tmp_path / "masks/val/a.png", labels)
    data = choose_data("folder", tmp_path, 3)
    photos = read_photos(data, tmp_path, "val", (32, 32), squash=False)
    image, classes = photos[(0, False)]

    theirs = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()]
    )
    assert torch.equal(image, theirs(Image.fromarray(photo)))

    longer = int(32 * max(height, width) / min(height, width))
    size = (32, longer) if height < width else (longer, 32)
    small = nearest_exact(labels, *size)
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    assert np.array_equal(classes, small[top : top + 32, left : left + 32])


def test_squashed(toy):
    image, classes = toy_photos(toy, size=(20, 20))[(2, False)]
    photo, labels = blocks(2)
    theirs = transforms.ToTensor()(transforms.Resize((20, 20))(Image.fromarray(photo)))
    assert torch.equal(image, theirs)
    labels = labels.astype(int)
    labels[labels == 255] = IGNORED
    assert np.array_equal(classes, nearest_exact(labels, 20, 20))


def test_a_flipped_photo_has_flipped_labels(toy):
    photos = toy_photos(toy)
    image, classes = photos[(1, False)]
    mirrored, mirrored_classes = photos[(1, True)]
    assert torch.equal(mirrored, image.flip(2))
    assert torch.equal(mirrored_classes, classes.flip(1))
    assert not torch.equal(mirrored_classes, classes)


# ---- steps and features -------------------------------------------------------------------------


def test_the_plan_takes_every_photo_once_an_epoch_and_flips_half_of_the_batches():
    steps = plan(photos=7, epochs=100, batch_size=2, seed=0)
    assert len(steps) == 4 * 100
    for epoch in range(100):
        keys = [key for step in steps[4 * epoch : 4 * epoch + 4] for key in step]
        assert sorted(number for number, _ in keys) == list(range(7))
    assert all(len({flipped for _, flipped in step}) == 1 for step in steps)
    assert 160 < sum(step[0][1] for step in steps) < 240
    assert steps == plan(7, 100, 2, 0)
    assert steps != plan(7, 100, 2, 1)
    orders = [[number for step in steps[at : at + 4] for number, _ in step] for at in (0, 4)]
    assert orders[0] != orders[1]


def test_what_is_to_be_computed():
    a, b, c = (0, False), (1, False), (0, True)
    steps = [[a, b], [c], [a, b], [c]]
    assert to_compute(steps, 3) == [[a, b], [c], [], []]
    assert to_compute(steps, 2) == [[a, b], [c], [], [c]]
    assert to_compute(steps, 0) == steps


class Counted:
    """`mean_colours`, counting the images that pass through it."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return mean_colours(images)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", [0, 3, 100])
def test_batches_are_the_same_whatever_is_kept(toy, capsys, kept, workers):
    photos = toy_photos(toy)
    steps = plan(len(photos), epochs=12, batch_size=4, seed=0)
    bytes_each = 4 * 4 * 6 * 2 + photos[(0, False)][1].nbytes
    features = Counted()
    batches = Batches(features, photos, steps, (kept + 0.5) * bytes_each / 2**30, workers)
    assert (batches.channels, batches.capacity, len(batches)) == (4, kept, 24)

    iterator = iter(batches)
    for step, (feats, classes) in zip(steps, iterator, strict=True):
        if iterator.gi_frame:  # None at the end
            assert len(iterator.gi_frame.f_locals["kept"]) <= kept
        expected = torch.stack([photos[key][0] for key in step])
        assert feats.dtype == torch.float16
        assert torch.equal(feats, mean_colours(expected).half())
        assert torch.equal(classes, torch.stack([photos[key][1] for key in step]))

    distinct = len({key for step in steps for key in step})
    assert distinct == 12  # every photo, and every flipped one
    if kept == 100:
        assert features.images == 1 + distinct
        assert capsys.readouterr().err == ""
    else:
        assert features.images == 1 + sum(map(len, to_compute(steps, kept)))
        assert f"keeps the features of {kept} photos of 12" in capsys.readouterr().err


# ---- the probe ----------------------------------------------------------------------------------


def test_void_pixels_have_no_part_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    classes = torch.randint(-1, 3, (2, 4, 5), generator=generator)
    counts = classes >= 0
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[counts], classes[counts])
    loss = pixel_loss(logits, classes)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert (logits.grad.abs().sum(1)[~counts] == 0).all()
    assert pixel_loss(logits, torch.full_like(classes, IGNORED)) == 0


def test_logits_are_resized_and_not_labels():
    probe = torch.nn.Conv2d(2, 3, 1)
    feats = torch.randn(1, 2, 4, 5).half()
    logits = logits_of(probe, feats, torch.Size([11, 13]))
    dense = F.interpolate(feats.float(), (11, 13), mode="bilinear", align_corners=False)
    # weights of interpolation sum to 1, so the bias is the same before and after
    assert torch.allclose(logits, probe(dense), atol=1e-6)
    assert torch.equal(logits_of(probe, feats, torch.Size([4, 5])), probe(feats.float()))


def slow_probe(photos, steps, rates, seed):
    """The probe, trained by a plain loop without a cache; `rates` are those of all steps."""
    torch.manual_seed(seed)
    probe = torch.nn.Conv2d(4, 3, 1)
    optimizer = torch.optim.AdamW(probe.parameters(), betas=(0.9, 0.999), weight_decay=1e-5)
    for step, rate in zip(steps, rates):
        images = torch.stack([photos[key][0] for key in step])
        classes = torch.stack([photos[key][1] for key in step]).long()
        logits = probe(mean_colours(images).half().float())
        logits = F.interpolate(logits, classes.shape[1:], mode="bilinear")
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(logits, classes, ignore_index=IGNORED).backward()
        optimizer.step()
    return probe


@pytest.mark.parametrize("schedule", ["cosine", "jafar"])
def test_training_is_that_of_the_plain_loop(toy, schedule):
    photos = toy_photos(toy)
    steps = plan(len(photos), epochs=18, batch_size=2, seed=4)  # 54 steps
    period = len(steps)
    if schedule == "jafar":
        period = 20
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(len(steps)) / period)) / 2
    if schedule == "jafar":
        assert rates[20] == pytest.approx(0)
        assert rates[40] == pytest.approx(0.05)

    batches = Batches(mean_colours, photos, steps, cache_gb=1, workers=0)
    probe = train_probe(batches, 3, torch.device("cpu"), 0.05, 1e-5, schedule, seed=7)
    expected = slow_probe(photos, steps, rates, seed=7)
    assert torch.allclose(probe.weight, expected.weight, atol=1e-4)
    assert torch.allclose(probe.bias, expected.bias, atol=1e-4)


def test_a_separable_toy_set_is_solved(toy):
    """At the features' own grid every cell has one class; at pixels, bilinear logits smear it."""
    steps = plan(6, epochs=60, batch_size=2, seed=0)
    coarse = toy_photos(toy, size=(32, 48))
    batches = Batches(mean_colours, coarse, steps, cache_gb=1, workers=0)
    probe = train_probe(batches, 3, torch.device("cpu"), lr=0.1)

    fine = scores(predict(mean_colours, probe, toy_photos(toy, "val"), 3, 2), list("abc"))
    assert 60 < fine["miou"] < 99
    assert fine["pixels"] == 3 * (32 * 48 - 64)

    def at_pixels(images):
        return F.interpolate(mean_colours(images), scale_factor=8, mode="nearest")

    exact = scores(predict(at_pixels, probe, toy_photos(toy, "val"), 3, 2), list("abc"))
    assert exact["miou"] == 100


def test_a_rate_that_is_too_high_is_one_line(toy):
    batches = Batches(mean_colours, toy_photos(toy), plan(6, 1, 2, 0), 1, 0)
    with pytest.raises(ValueError, match="weights are not finite: pass an --lr below"):
        train_probe(batches, 3, torch.device("cpu"), lr=float("inf"))


# ---- label maps of others -----------------------------------------------------------------------


def test_label_maps_are_scored_at_either_size(toy, tmp_path):
    photos = toy_photos(toy, "val", size=(16, 24))
    for number in range(3):
        truth = photos.full_classes(number).numpy()
        wrong = np.where(truth == 2, 0, truth)
        save(tmp_path / f"maps/{number}.png", np.where(truth < 0, 255, wrong).astype(np.uint8))
    large = score_maps(tmp_path / "maps", photos, 3)
    assert large.sum() == 3 * (32 * 48 - 64)
    assert large[2, 0] > 0 and large[2, 2] == 0 and large[0, 1] == 0

    for number in range(3):
        small = photos.small(photos.full_classes(number)).clamp(min=0)
        save(tmp_path / f"maps/{number}.png", small.numpy().astype(np.uint8))
    small = score_maps(tmp_path / "maps", photos, 3)
    assert small.sum() == 3 * (16 * 24 - 16)
    assert small.diagonal().sum() == small.sum()


def test_bad_label_maps(toy, tmp_path):
    photos = toy_photos(toy, "val")
    with pytest.raises(FileNotFoundError, match="there is no label map"):
        score_maps(tmp_path, photos, 3)
    save(tmp_path / "0.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(ValueError, match=r"0\.png is 6x5: make it as large as"):
        score_maps(tmp_path, photos, 3)
    save(tmp_path / "0.png", np.full((32, 48), 3, np.uint8))
    with pytest.raises(ValueError, match=r"0\.png has label 3, but classes are 0 to 2"):
        score_maps(tmp_path, photos, 3)


# ---- pictures -----------------------------------------------------------------------------------


def test_a_picture_shows_photo_truth_and_prediction(toy):
    image, truth = toy_photos(toy)[(0, False)]
    truth = truth.numpy()
    picture = np.asarray(draw(image, truth, truth.clip(0), ["a", "b", "c"]))
    scale = round(360 / 32)
    width = 48 * scale
    assert picture.shape[1] == 3 * width + 4 * 8
    middle = scale // 2
    rows = np.arange(32) * scale + middle + 28  # below the titles
    columns = np.arange(48) * scale + middle + 8
    of_truth = picture[rows][:, width + 8 + columns]
    of_prediction = picture[rows][:, 2 * (width + 8) + columns]
    assert (of_truth[truth == IGNORED] == 0).all()
    assert np.array_equal(of_truth[truth >= 0], of_prediction[truth >= 0])
    assert len(np.unique(of_truth[truth >= 0], axis=0)) == 3


# ---- the command line ---------------------------------------------------------------------------


def line(ran):
    """The one line of an error."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    return ran.err


def folder_flags(root):
    return ["--dataset", "folder", "--dataroot", root, "--classes", 3, "--size", 32, 48]


def test_command_line_errors(cli, toy, tmp_path):
    def refused(*flags):
        return line(cli("eval_segmentation", *flags))

    camvid = ["--dataset", "camvid", "--dataroot", toy]
    assert "needs the number of classes" in refused("--dataset", "folder", "--dataroot", toy)
    assert "camvid has its own classes" in refused(*camvid, "--classes", 3)
    assert "toy/test: pass the data set's folder" in refused(*camvid)
    assert "val.txt: pass the data set's folder" in refused("--dataset", "voc", "--dataroot", toy)
    assert "pass --output_dir" in refused(*folder_flags(toy), "--visualize", 1)
    assert "--lr nan is too small" in refused(*folder_flags(toy), "--lr", "nan")
    assert "images/test: pass the data set's folder" in refused(
        *folder_flags(toy), "--split", "test"
    )
    maps = tmp_path / "nothing"
    assert "there is no label map" in refused(*folder_flags(toy), "--score_only", maps)


def test_a_class_that_never_occurs_is_noted(cli, toy):
    maps = toy / "masks/val"
    for path in maps.iterdir():
        labels = np.array(Image.open(path))
        save(path, np.where(labels == 1, 0, labels).astype(np.uint8))
    ran = cli("eval_segmentation", *folder_flags(toy), "--score_only", maps)
    assert ran.code == 0, ran.err
    assert "note: no pixel is labelled class 1" in ran.err
    assert ran.out.splitlines()[2].split() == ["class", "1", "0.00", "-"]
    assert ran.out.splitlines()[-1] == "mIoU 100.00, accuracy 100.00"


def test_a_size_off_the_patch_is_refused(cli, toy, rule_backbone):
    flags = [*folder_flags(toy)[:-2], 30, 48]
    ran = cli("eval_segmentation", *flags, *rule_backbone)
    assert "--size 30 is not a multiple of the patch (16): pass 16 or 32" in line(ran)


@pytest.fixture(scope="module")
def camvid(shared, tmp_path_factory):
    """Eight real frames to train on and four to score."""
    root = tmp_path_factory.mktemp("camvid") / "CamVid"
    for split, count in (("train", 8), ("test", 4)):
        source = shared / "data/CamVid"
        for image in sorted((source / split).iterdir())[::40][:count]:
            for name in (f"{split}/{image.name}", f"{split}annot/{image.stem}.png"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(source / name, root / name)
    return root


def test_camvid_from_the_command_line(cli, camvid, vit_tiny, tmp_path):
    output = tmp_path / "out"
    flags = ["--dataset", "camvid", "--dataroot", camvid, "--size", 96, 128, "--epochs", 6]
    flags += ["--lr", 0.005, *vit_tiny]
    kept = ["--output_dir", output, "--visualize", 2]
    first = cli("eval_segmentation", *flags, *kept, "--json", tmp_path / "first.json")
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert len(lines) == 1 + 11 + 1
    assert lines[4].startswith("road")

    report = json.loads((tmp_path / "first.json").read_text())
    assert report["photos"] == 4
    assert report["settings"]["facet"] == "key"
    results = report["results"]
    assert results["accuracy"] > 50
    assert results["miou"] > 15
    assert lines[-1] == f"mIoU {results['miou']:.2f}, accuracy {results['accuracy']:.2f}"
    assert len(list((output / "predictions").iterdir())) == 4
    assert len(list((output / "pictures").iterdir())) == 2

    # the same again takes the probe that is there; without a folder it comes out the same
    (output / "predictions" / sorted(os.listdir(output / "predictions"))[0]).unlink()
    written = (output / "probe.pth").stat().st_mtime_ns
    again = cli("eval_segmentation", *flags, *kept)
    assert again.out == first.out
    assert (output / "probe.pth").stat().st_mtime_ns == written
    assert len(list((output / "predictions").iterdir())) == 4
    assert cli("eval_segmentation", *flags, "--cache_gb", 0).out == first.out

    # its label maps are anybody's
    maps = ["--score_only", output / "predictions"]
    assert cli("eval_segmentation", *flags, *maps).out == first.out

    other = cli("eval_segmentation", *flags, "--seed", 1, *kept)
    assert "was made with seed 0, not 1: pass --overwrite" in line(other)
