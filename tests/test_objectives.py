"""objectives.py: photos and their warped copies, losses, matching, and the order of photos."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import rule_image
from PIL import Image
from plain_train import plain_match_losses
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import objectives
from lift import LiFT
from loading import Loader

TEMPERATURE = objectives.MATCH_TEMPERATURE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small photos, smooth and seeded."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(8):
        image = rule_image(80, 96, k)[0].permute(1, 2, 0)
        pixels = (image.clamp(-2, 2) * 60 + 128).byte().numpy()
        Image.fromarray(pixels).save(root / f"{k}.jpg", quality=95)
    return root


def places_as_features(warp, side=28):
    """Features of a photo and its copy that tell every place, as waves of its coordinates do."""
    centres = (2 * torch.arange(side) + 1) / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    photo = torch.stack([x, y])                                         # [2, h, w]
    ones = torch.ones_like(x)
    copy = torch.einsum("ij,jhw->ihw", warp, torch.stack([x, y, ones]))
    maps = []
    for places in (photo, copy):
        waves = [torch.sin(k * places) for k in (1, 2, 4, 8)]
        waves += [torch.cos(k * places) for k in (1, 2, 4, 8)]
        maps.append(torch.cat(waves))
    return torch.stack(maps)                                            # [2, 16, h, w]


def match_loss(pairs, warp):
    """The mean loss of the points of some pairs."""
    matching = objectives.Matching(tuple(pairs.shape[2:]))
    return matching(pairs, warp, TEMPERATURE) / matching.inside(warp).sum()


def test_matching_equals_the_plain_version():
    torch.manual_seed(0)
    pairs = torch.randn(6, 5, 4, 6)
    warps = torch.stack([objectives.random_warp() for _ in range(3)])
    losses = plain_match_losses(pairs, warps, TEMPERATURE)
    assert len(losses) < 3 * 24, "some cells lie outside, and are left out"
    assert match_loss(pairs, warps) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)

    # and so do the gradients
    found = pairs.clone().requires_grad_()
    match_loss(found, warps).backward()
    wanted = pairs.clone().requires_grad_()
    torch.stack(plain_match_losses(wanted, warps, TEMPERATURE)).mean().backward()
    assert torch.allclose(found.grad, wanted.grad, atol=1e-6)


def test_a_copy_that_shows_nothing_of_its_photo_counts_nothing():
    matching = objectives.Matching((4, 4))
    away = torch.tensor([[[1.0, 0, 9], [0, 1, 0]]])
    pairs = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = matching(pairs, away, TEMPERATURE)
    loss.backward()
    assert loss == 0 and (pairs.grad == 0).all()
    assert objectives.point_weight(matching, away, 0.1).isfinite()


def test_matching_is_best_under_the_true_warp():
    torch.manual_seed(0)
    for _ in range(5):
        warp = objectives.random_warp()
        pair = places_as_features(warp)
        true = match_loss(pair, warp[None])
        other = match_loss(pair, objectives.random_warp()[None])
        assert true < other - 0.05


def test_matching_in_bfloat16_rounds_no_places():
    torch.manual_seed(0)
    warp = objectives.random_warp()
    pair = places_as_features(warp)
    exact = match_loss(pair, warp[None])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = match_loss(pair, warp[None])
    assert rounded == pytest.approx(exact.item(), rel=1e-2)


def test_matching_of_known_features():
    """All alike: each point has as many candidates as cells. All unlike: nothing is mistaken."""
    same = torch.eye(2, 3)[None]  # a copy that is the photo
    alike = torch.ones(2, 5, 4, 4)
    assert match_loss(alike, same) == pytest.approx(math.log(16))
    # each cell has an axis of its own, and a share of .9 in one of all: cosines are .9
    own = math.sqrt(0.1) * torch.eye(16).view(1, 16, 4, 4).expand(2, -1, -1, -1)
    common = torch.full((2, 1, 4, 4), math.sqrt(0.9))
    unlike = torch.cat([own, common], 1)
    expected = math.log(1 + 15 * math.exp(-0.1 / TEMPERATURE))
    assert match_loss(unlike, same) == pytest.approx(expected, rel=1e-3)

    # half of a shifted copy lies outside, and is neither a point nor a candidate
    half = torch.tensor([[[1.0, 0, 1], [0, 1, 0]]])
    assert match_loss(alike, half) == pytest.approx(math.log(8))


def test_cells_to_match_are_spread_over_the_grid():
    cells = objectives.match_cells(28 * 28)
    assert len(cells.unique()) == 256 and torch.equal(cells, objectives.match_cells(28 * 28))
    # each of a parent's four children comes as often, to within three standard errors
    for parity in ((cells % 28) % 2, (cells // 28) % 2):
        assert abs(parity.float().mean() - 0.5) < 3 * 0.5 / 16
    assert sorted(objectives.match_cells(9).tolist()) == list(range(9))


def test_a_copy_shows_what_its_warp_says():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(objectives.warped(image, torch.eye(2, 3)), image)

    # a quarter of the side to the right: the copy's left part is the photo's middle
    shifted = objectives.warped(image, torch.tensor([[1.0, 0, 0.5], [0, 1, 0]]))
    assert torch.equal(shifted[:, :, :24], image[:, :, 8:])
    assert torch.equal(shifted[:, :, 24:], image[:, :, 24:].flip(2))  # mirrored

    # turned by 90 degrees
    turned = objectives.warped(image, torch.tensor([[0, -1.0, 0], [1.0, 0, 0]]))
    assert torch.equal(turned, image.rot90(1, (1, 2)))


def test_warps_stay_within_their_bounds():
    torch.manual_seed(0)
    warps = torch.stack([objectives.random_warp() for _ in range(500)])
    scales = 1 / warps[:, 0, :2].norm(dim=1)
    angles = torch.rad2deg(torch.atan2(warps[:, 1, 0], warps[:, 0, 0]))
    shifts = warps[:, :, 2].abs()
    assert scales.min() >= 0.7 - 1e-6 and scales.max() <= 1.5 + 1e-6
    assert angles.abs().max() <= 25 + 1e-4 and shifts.max() <= 0.25
    # of 500 some come close
    assert scales.min() < 0.7 * 1.02 and scales.max() > 1.5 * 0.98
    assert angles.abs().max() > 25 * 0.98 and shifts.max() > 0.25 * 0.98
    determinants = torch.linalg.det(warps[:, :, :2])
    assert torch.allclose(determinants, scales**-2)  # no shear, no mirror


def test_copies_depend_on_seed_epoch_and_photo_alone(folder):
    paths = sorted(folder.rglob("*.jpg"))
    photos = objectives.Photos(paths, 64, warp=True)
    first = photos[0, 2]
    torch.rand(5)  # moves torch's global generator, which must not count
    again = photos[0, 2]
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[name])), name
    assert torch.equal(first["full"][0], objectives.Photos(paths, 64)[0, 2]["full"])
    assert not torch.equal(first["warp"], photos[1, 2]["warp"])
    assert not torch.equal(first["warp"], photos[0, 3]["warp"])
    other = objectives.Photos(paths, 64, seed=1, warp=True)[0, 2]
    assert not torch.equal(first["warp"], other["warp"])
    copy = objectives.warped(first["full"][0], first["warp"])
    assert torch.equal(first["full"][1], copy)


def test_resize_is_antialiased_and_stride_is_not(folder):
    paths = sorted(folder.rglob("*.jpg"))
    strided = objectives.Photos(paths, 64, "stride")[0, 0]
    resized = objectives.Photos(paths, 64, "resize")[0, 0]
    full = strided["full"].float()
    assert torch.equal(strided["half"], strided["full"][:, ::2, ::2])
    assert torch.equal(strided["quarter"], strided["full"][:, ::4, ::4])
    expected = F.interpolate(full[None], scale_factor=0.5, mode="bilinear", antialias=True)[0]
    assert (resized["half"].float() - expected).abs().max() <= 1
    assert resized["half"].float().var() < strided["half"].float().var()


def test_jitter_depends_on_seed_epoch_and_photo_alone(folder):
    paths = sorted(folder.rglob("*.jpg"))
    photos = objectives.Photos(paths, 64, augment=True)
    first = photos[0, 2]["full"]
    second = photos[1, 2]["full"]
    torch.rand(5)  # moves torch's global generator, which must not count
    (batch,) = Loader(photos, 1, [[(1, 2), (0, 2)]])
    assert torch.equal(batch["full"][1], first) and torch.equal(batch["full"][0], second)
    assert not torch.equal(first, second)
    other = objectives.Photos(paths, 64, augment=True, seed=1)[0, 2]["full"]
    plain = objectives.Photos(paths, 64)[0, 2]["full"]
    assert not torch.equal(first, other) and not torch.equal(first, plain)


def test_loader_workers_get_paths_and_numbers_only(folder):
    """Started by spawn they get the data set by pickle; a backbone in it would be 22 MB."""
    photos = objectives.Photos(sorted(folder.rglob("*.jpg")), 64, augment=True)
    content = pickle.dumps(photos)
    assert len(content) < 5_000
    again = pickle.loads(content)
    assert torch.equal(again[1, 2]["full"], photos[1, 2]["full"])


@pytest.mark.parametrize("skip", [0, 1, 4])
def test_processes_together_see_the_batches_of_one(skip):
    one = list(objectives.stream(12, 4, 2, 0, 1, 0, skip))
    first = list(objectives.stream(12, 2, 2, 0, 2, 0, skip))
    second = list(objectives.stream(12, 2, 2, 1, 2, 0, skip))
    together = [sorted(a + b) for a, b in zip(first, second)]
    assert together == [sorted(keys) for keys in one]
    assert one == list(objectives.stream(12, 4, 2, 0, 1, 0, 0))[skip:]


def test_learning_rate():
    cosine = [objectives.lr_factor(step, 10, "cosine", 0) for step in (0, 5, 10)]
    assert cosine == pytest.approx([1, 0.5, 0])
    warm = [objectives.lr_factor(step, 10, "constant", 3) for step in range(5)]
    assert warm == [0.25, 0.5, 0.75, 1, 1]


def test_matching_is_whole_for_half_of_the_steps_and_then_fades():
    shares = [objectives.match_share(step, 8, 0.2) for step in (0, 4, 6, 8)]
    assert shares == pytest.approx([1, 1, 0.6, 0.2])
    assert objectives.match_share(7, 8, 1.0) == 1


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_step_with_matching_waits_for_no_gpu(heads, precision, monkeypatch):
    """On a fake card: reading a value there, which is to wait for it, raises an exception."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the weight is a number of the CPU

    def to_card(tensor):
        fake = mode.from_tensor(tensor)
        with mode:
            return fake.to("cuda")

    lift = LiFT(48, pre_shape=False, post_shape=False, attend=1, heads=heads)
    model = objectives.Objective(lift, "both", torch.zeros(48, 1, 1), grid=(8, 8))._apply(to_card)
    with mode:
        images = [torch.zeros(4, 3, side, side, device="cuda") for side in (64, 32)]
        feats = [torch.zeros(4, 48, side, side, device="cuda") for side in (8, 4, 2)]
        warp = torch.zeros(2, 2, 3, device="cuda")
        weight = objectives.point_weight(model.matching, warp, 0.1)
        with torch.autocast("cuda", precision, enabled=precision is not None):
            loss = model(images, feats, warp, weight)
        assert loss.device.type == weight.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # the test would notice
            loss.item()


def test_matching_compiles_as_one_graph():
    torch.manual_seed(0)
    lift = LiFT(48, pre_shape=False, post_shape=False, attend=1, heads=3)
    model = objectives.Objective(lift, "both", torch.randn(48, 1, 1), grid=(8, 8))
    images = [torch.randn(4, 3, side, side) for side in (64, 32)]
    feats = [torch.randn(4, 48, side, side) for side in (8, 4, 2)]
    warp = torch.stack([objectives.random_warp() for _ in range(2)])
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for weight in (0.1, 0.2):  # it fades, which must compile nothing anew
        weights = torch.tensor(weight)
        wanted = model(images, feats, warp, weights)
        assert torch.allclose(compiled(images, feats, warp, weights), wanted, rtol=1e-4)
    assert len(graphs) == 1
