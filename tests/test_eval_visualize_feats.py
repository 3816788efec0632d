"""eval_visualize_feats.py: golden maps, the plain loop, and sheets read pixel by pixel.

The page has tests of its own, test_page.py.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain_visualize import plain_self_similarity, todays_self_similarity

import eval_visualize_feats as visualize
import features
from extractor import ViTExtractor
from features import Bilinear, Features, Lifted
from lift import load_lift
from photos import corner_cells, read_image


def save_photo(path, width, height, seed=0):
    """A smooth random photo, as a PNG (nothing is lost)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.RandomState(seed).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    smooth.save(path)
    return path


PHOTOS = ["a", "b", "deep/a", "deep/er/c", "deep/er/d"]
ALTERNATIVES = [f"{name}.png_alternatives.png" for name in PHOTOS]


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos of several sizes, flat and nested."""
    for seed, name in enumerate(PHOTOS):
        save_photo(tmp_path / f"photos/{name}.png", 90 + 20 * seed, 120, seed)
    return tmp_path / "photos"


@pytest.fixture
def base(rule_backbone, tmp_path):
    """Flags that draw at 32 pixels with the rule backbone into tmp_path/vis."""
    return ["--device", "cpu", "--imsize", 32, "--output_dir", tmp_path / "vis", *rule_backbone]


@pytest.fixture
def run(cli, base):
    """run(*flags) draws at 64 pixels and returns what it writes for --json."""

    def run(*flags):
        ran = cli("eval_visualize_feats", *base, "--imsize", 64, *flags)
        assert ran.code == 0, ran.err
        return ran.report()

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The rows of every sheet that is drawn, as lists of titles."""
    titles = []
    draw = visualize.draw_sheet

    def spy(rows, fontsize):
        titles.append([[panel.title for panel in row] for row in rows])
        return draw(rows, fontsize)

    monkeypatch.setattr(visualize, "draw_sheet", spy)
    return titles


def names(result, tmp_path):
    """The files of a result, below tmp_path/vis."""
    return sorted(str(Path(file).relative_to(tmp_path / "vis")) for file in result["files"])


def levels(pixels):
    """RGB pixels [..., 3] -> the values in 0..1 that have these colours."""
    table = visualize.COLOURS.astype(int)                      # [256, 3]
    pixels = np.asarray(pixels)[..., None, :3].astype(int)     # [..., 1, 3]
    distance = np.abs(pixels - table).sum(-1)                  # [..., 256]
    return distance.argmin(-1) / 255


def panel_values(sheet, column, grid, shape):
    """Values [h, w] at the cell centres of a panel of `shape` (W, H) in a sheet's last row."""
    width, height = shape
    left = visualize.GAP + column * (width + visualize.GAP)
    top = sheet.height - visualize.GAP - height
    picture = np.asarray(sheet)[top : top + height, left : left + width]
    rows = ((np.arange(grid[0]) + 0.5) * height / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * width / grid[1]).astype(int)
    return levels(picture[rows][:, columns])


def plain_shown(feats, cell):
    """The plain loop, then the range of colours begun at the least value outside the corners."""
    values = plain_self_similarity(feats, *cell)
    height, width = values.shape
    rows, columns = max(1, round(height / 14)), max(1, round(width / 14))
    low = 1.0
    for i in range(height):
        for j in range(width):
            at_side = i < rows or i >= height - rows
            at_end = j < columns or j >= width - columns
            if not (at_side and at_end):
                low = min(low, values[i, j].item())
    return ((values - low) / (1 - low)).clamp(0, 1)


# ---- maps ---------------------------------------------------------------------------------------


def test_golden_maps(shared, golden_lift):
    golden = dict(np.load(shared / "golden/visualize.npz"))
    (photo,) = (shared / "data/voc").rglob(str(golden.pop("image")))
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    extractor = ViTExtractor("vit_tiny_patch16_224", None, backbone_path=weights, device="cpu")
    lifted = Lifted(load_lift(golden_lift, extractor), extractor, 4)
    maps = visualize.compute_maps(Features(extractor, lifted), read_image(photo), (224, 224))
    assert len(maps) == len(golden) == 7
    for (title, feats), (name, expected) in zip(maps.items(), golden.items()):
        _, height, width = feats.shape
        ours = visualize.self_similarity(feats, [(height // 2, width // 2)])[0].numpy()
        step = height // len(expected)  # the file keeps every fourth cell of the largest map
        assert np.abs(ours[::step, ::step] - expected).max() < 1e-5, (title, name)


@pytest.mark.parametrize("shape", [(3, 1, 7), (192, 5, 9), (130, 33, 20)])
def test_self_similarity_equals_the_plain_loop(shape):
    feats = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    _, h, w = shape
    cells = [(0, 0), (h // 2, w // 2), (h - 1, w - 1), (0, w - 1)]
    ours = visualize.self_similarity(feats, cells)
    assert ours.shape == (4, h, w)
    for cell, values in zip(cells, ours):
        torch.testing.assert_close(values, plain_self_similarity(feats, *cell), atol=1e-5, rtol=0)
        torch.testing.assert_close(values, todays_self_similarity(feats, *cell), atol=1e-5, rtol=0)
        assert values.min() == 0 and values.max() == 1 and values[cell] == 1


def test_flat_maps_and_empty_cells_have_a_defined_similarity():
    lengths = torch.linspace(1, 2, 20).view(4, 5)
    flat = torch.full((7, 4, 5), 0.3) * lengths  # one direction, several lengths
    assert (visualize.self_similarity(flat, [(1, 1)]) == 0).all()
    assert (visualize.shown_similarity(flat, [(1, 1)]) == 0).all()
    assert (visualize.self_similarity(torch.zeros(7, 4, 5), [(1, 1)]) == 0).all()
    holed = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    holed[:, 0, 0] = 0
    assert visualize.self_similarity(holed, [(1, 1), (0, 0)]).isfinite().all()


def test_cells_of_points():
    for side in range(1, 70):
        for cells in (1, 2, 7, 14, 15, 28, 56):
            size, grid = (side, side), (cells, cells)
            assert visualize.cell_at((side / 2, side / 2), size, grid) == (cells // 2, cells // 2)
            last = visualize.cell_at((side - 1e-3, side - 1e-3), size, grid)
            assert last == (cells - 1, cells - 1)
    assert visualize.cell_at((0, 0), (500, 333), (14, 21)) == (0, 0)
    assert visualize.cell_at((100, 250), (200, 300), (6, 4)) == (5, 2)


def test_corners_that_stand_apart_do_not_eat_the_colours():
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(16, 1, 1, generator=generator) + 0.3 * torch.randn(
        16, 28, 42, generator=generator
    )
    apart = feats.clone()
    for row in (0, 1, 26, 27):
        for column in (0, 1, 2, 39, 40, 41):
            apart[:, row, column] = -feats[:, row, column]

    query = [(10, 15)]
    ours = visualize.shown_similarity(apart, query)[0]
    eaten = visualize.self_similarity(apart, query)[0]
    assert eaten[2:26, 3:39].min() > 0.5 and eaten[0, 0] < 0.3
    counted = ours[~corner_cells(28, 42)]
    assert counted.min() == 0
    assert ours[0, 0] == ours[27, 41] == ours[1, 2] == 0 and ours[10, 15] == 1
    torch.testing.assert_close(ours, plain_shown(apart, (10, 15)), atol=1e-5, rtol=0)


def test_a_grid_of_corners_alone_shows_all_its_cells():
    feats = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    shown = visualize.shown_similarity(feats, [(1, 1)])
    assert torch.equal(shown, visualize.self_similarity(feats, [(1, 1)]))


# ---- sheets -------------------------------------------------------------------------------------


def test_sheets_show_the_maps_of_the_plain_loop(run, rule_extractor, rule_lift, tmp_path):
    photo = save_photo(tmp_path / "photo.png", 150, 100)
    lifted = ["--lift_path", rule_lift, "--lift_iter", 2]
    result = run("--dataroot", photo, *lifted, "--hide_marker", "--query", "140,20")
    assert names(result, tmp_path) == ["photo.png_alternatives.png", "photo.png_iterations.png"]

    extractor = rule_extractor()
    lifted = Lifted(load_lift(rule_lift, extractor), extractor, 2)
    maps = visualize.compute_maps(Features(extractor, lifted), read_image(photo), (64, 64))
    expected = {}
    for title, feats in maps.items():
        cell = visualize.cell_at((140, 20), (150, 100), feats.shape[1:])
        expected[title] = plain_shown(feats, cell).numpy()
    grids = [values.shape for values in expected.values()]
    assert grids == [(4, 4), (8, 8), (8, 8), (8, 8), (16, 16)]

    shape = (visualize.PANEL, 187)  # panels keep the aspect of the photo, 150 x 100
    of_sheets = (list(maps)[:4], ["backbone", "LiFT", "LiFT, 2 times"])
    for file, titles in zip(result["files"], of_sheets):
        sheet = Image.open(file)
        panels = len(titles) + 1  # the photo, too
        assert sheet.width == visualize.GAP + panels * (shape[0] + visualize.GAP)
        for column, title in enumerate(titles, 1):
            values = panel_values(sheet, column, expected[title].shape, shape)
            assert np.abs(values - expected[title]).max() < 0.01, title


def test_markers_lie_on_the_query(run, tmp_path):
    photo = save_photo(tmp_path / "photo.png", 100, 100)
    sheets = []
    for flags in ([], ["--hide_marker"]):
        file = run("--dataroot", photo, "--query", "30,80", *flags)["files"][0]
        sheets.append(np.asarray(Image.open(file)).astype(int))
    changed = np.abs(sheets[0] - sheets[1]).sum(-1) > 0

    side = visualize.PANEL
    top = len(changed) - visualize.GAP - side
    # (y, x) in 0..1 of a panel: the point, then the centres of its cells
    places = [(0.8, 0.3), (0.875, 0.375), (0.8125, 0.3125), (0.8125, 0.3125)]
    for i, (y, x) in enumerate(places):
        left = visualize.GAP + i * (side + visualize.GAP)
        panel = changed[top : top + side, left : left + side]
        row, column = np.argwhere(panel).mean(axis=0)
        assert abs(row - y * side) < 1.5
        assert abs(column - x * side) < 1.5


def test_titles_state_real_grids(run, drawn, photos, rule_lift):
    flags = ["--lift_path", rule_lift, "--lift_iter", 3, "--pca"]
    flags += ["--query", "1,2", "--query", "3,4"]
    run("--dataroot", photos / "a.png", "--imsize", 48, *flags)
    grids = []
    for rows in drawn:
        for row in rows:
            grids.append([title.split("\n")[1] for title in row[1:]])
    alternatives = ["3x3", "6x6", "6x6", "6x6"]
    iterations = ["3x3", "6x6", "12x12", "24x24"]
    pca = alternatives + iterations[2:]
    assert grids == [alternatives, alternatives, iterations, iterations, pca]
    assert [row[0] for row in drawn[0]] == ["photo\nx 1, y 2", "photo\nx 3, y 4"]


def test_keep_aspect_stride_and_layer(run, drawn, photos):
    """The photo has 170 x 120 pixels: 91 x 64, of which 96 x 64 is the nearest in patches."""
    flags = ["--keep_aspect", "--stride", 8, "--layer", 3, "--facet", "token"]
    result = run("--dataroot", photos / "deep/er/d.png", *flags)
    assert [title.split("\n")[1] for title in drawn[0][0][1:]] == ["7x11", "14x22", "15x23"]
    settings = result["settings"]
    assert (settings["stride"], settings["layer"], settings["facet"]) == (8, 3, "token")


def test_lift_panels_are_left_out_without_lift(run, drawn, photos, tmp_path):
    result = run("--dataroot", photos / "b.png")
    assert names(result, tmp_path) == ["b.png_alternatives.png"]
    titles = [title.split("\n")[0] for title in drawn[0][0]]
    assert titles == ["photo", "backbone", "bilinear", "backbone, photo at 2x"]


def test_long_titles_widen_the_sheet(photos, run):
    widths = []
    for size in (8, 18, 60):
        file = run("--dataroot", photos / "b.png", "--fontsize", size)["files"][0]
        widths.append(Image.open(file).width)
    assert widths[0] == widths[1] < widths[2]


def test_sheets_are_white_around_panels_and_titles(run, photos):
    file = run("--dataroot", photos / "b.png")["files"][0]
    sheet = np.asarray(Image.open(file))
    gap = visualize.GAP
    for edge in (sheet[: gap - 2], sheet[-gap:], sheet[:, :gap], sheet[:, -gap:]):
        assert (edge == 255).all()

    titles = sheet[gap : gap + 38]                       # two lines of text, above the panels
    darkest = titles.min(axis=(0, 2))                    # of each column of pixels
    of_panels = darkest[gap:].reshape(4, -1).min(axis=1)
    assert (of_panels < 60).all()  # dark letters above every panel


def test_pca_panels_are_titled_and_of_one_size():
    feats = torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = {"whole": feats, "corner": feats[:, :4, :4]}
    row = visualize.pca_row(Image.new("RGB", (64, 48)), maps, (96, 72))
    assert [panel.title for panel in row] == ["photo\nPCA as RGB", "whole\n8x8", "corner\n4x4"]
    assert [panel.picture.size for panel in row] == [(96, 72)] * 3

    # colours compare between the panels: those of a part are those of the whole there
    whole, corner = visualize.pca_row(Image.new("RGB", (8, 8)), maps, (8, 8))[1:]
    of_cells = np.asarray(corner.picture.resize((4, 4), Image.Resampling.NEAREST))
    assert np.array_equal(np.asarray(whole.picture)[:4, :4], of_cells)


def test_a_backbone_of_your_own(cli, photos, import_path, drawn):
    source = (
        "from torch import nn\n"
        "def patches():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Tanh())\n"
    )
    (import_path / "own_patches.py").write_text(source)
    flags = ["--device", "cpu", "--imsize", 64, "--output_dir", import_path / "vis"]
    flags += ["--my_extractor", "own_patches:patches", "--pca"]
    ran = cli("eval_visualize_feats", "--dataroot", photos / "a.png", *flags)
    assert ran.code == 0, ran.err
    assert [title.split("\n")[1] for title in drawn[0][0][1:]] == ["4x4", "8x8", "8x8"]


def test_an_upsampler_of_your_own_and_bilinear(run, photos, import_path, drawn, rule_lift):
    source = "def coarser():\n    return lambda images, feats: feats[..., ::2, ::2]\n"
    (import_path / "own_upsampler.py").write_text(source)
    run("--dataroot", photos / "a.png", "--upsample", "own_upsampler:coarser")
    run("--dataroot", photos / "a.png", "--upsample", "bilinear", "--lift_iter", 2)
    run("--dataroot", photos / "a.png", "--upsample", "none", "--lift_path", rule_lift)
    last = [titles[0][-1] for titles in drawn]
    assert last == ["coarser\n2x2"] * 2 + ["bilinear, 4x\n16x16"] * 2 + [
        "backbone, photo at 2x\n8x8"
    ]


@torch.no_grad()
def test_maps_of_another_upsampler(rule_extractor):
    extractor = rule_extractor()
    by_another = Features(extractor, Bilinear(1))
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    maps = visualize.compute_maps(by_another, photo, (64, 64), "another")
    assert list(maps)[3:] == ["another"]
    torch.testing.assert_close(maps["another"], maps["bilinear"], rtol=0, atol=0)


# ---- which photos -------------------------------------------------------------------------------


def test_photos_are_drawn_by_the_seed_and_mirrored(run, photos, tmp_path):
    assert names(run("--dataroot", photos, "--limit", 0), tmp_path) == ALTERNATIVES
    assert names(run("--dataroot", photos), tmp_path) == ALTERNATIVES
    draws = []
    for seed in (0, 0, 1, 2, 3):
        result = run("--dataroot", photos, "--limit", 2, "--seed", seed)
        draws.append(tuple(names(result, tmp_path)))
    assert draws[0] == draws[1] and len(set(draws)) > 1
    assert all(len(set(draw)) == 2 for draw in draws)


def test_one_subfolder_is_mirrored(run, tmp_path):
    """Also where all photos lie in it."""
    save_photo(tmp_path / "photos/cats/a.png", 90, 120)
    result = run("--dataroot", tmp_path / "photos")
    assert names(result, tmp_path) == ["cats/a.png_alternatives.png"]


def test_relative_paths(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for dataroot in (".", "**/*.png"):
        assert names(run("--dataroot", dataroot, "--limit", 0), tmp_path) == ALTERNATIVES
    assert names(run("--dataroot", "deep/a.png"), tmp_path) == ["a.png_alternatives.png"]


def test_sheets_of_an_earlier_run_are_no_photos(run, cli, base, photos):
    first = run("--dataroot", photos, "--output_dir", photos, "--pca")
    assert len(first["files"]) == 10
    second = run("--dataroot", photos, "--output_dir", photos / "vis", "--pca")
    assert len(second["files"]) == 10
    assert run("--dataroot", photos, "--output_dir", photos, "--pca")["files"] == first["files"]
    ran = cli("eval_visualize_feats", *base, "--dataroot", photos / "a.png_pca.png")
    assert ran.code == 2 and "our own sheets" in ran.err
    save_photo(photos / "my_pca.png", 64, 64)  # no sheet, whose names hold that of a photo
    assert len(run("--dataroot", photos)["files"]) == 6


def test_json_file_holds_files_and_what_was_resolved(cli, base, photos, rule_lift, tmp_path):
    file = tmp_path / "new/result.json"
    lifted = ["--lift_path", rule_lift, "--lift_iter", 1]
    ran = cli(
        "eval_visualize_feats", *base, "--imsize", 64, "--dataroot", photos / "*.png",
        "--json", file, "--limit", 1, *lifted,
    )  # fmt: skip
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    result = json.loads(file.read_text())
    assert len(result["files"]) == 2 and result["skipped"] == []
    settings = result["settings"]
    assert settings["imsize"] == 64 and settings["versions"]["torch"] == torch.__version__
    assert (settings["layer"], settings["stride"], settings["device"]) == (11, 16, "cpu")
    for digest in ("digest", "lift_digest"):
        assert re.fullmatch("[0-9a-f]{16}", settings[digest])


def test_a_broken_photo_among_others_is_skipped_and_named(cli, base, photos):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    ran = cli("eval_visualize_feats", "--dataroot", photos, *base)
    result = ran.report()
    assert ran.code == 0 and len(result["files"]) == 5
    assert result["skipped"] == [str(photos / "broken.png")]
    assert ran.err.count("\n") == 1 and "broken.png" in ran.err
    ran = cli("eval_visualize_feats", "--dataroot", photos / "broken.png", *base)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "broken.png" in ran.err


def test_a_strip_is_named_and_left_out(run, cli, base, photos):
    save_photo(photos / "strip.png", 3300, 100)
    result = run("--dataroot", photos, "--keep_aspect")
    assert len(result["files"]) == 5 and result["skipped"] == [str(photos / "strip.png")]
    ran = cli("eval_visualize_feats", *base, "--dataroot", photos / "strip.png", "--keep_aspect")
    said = "strip.png: 3300x100.*a strip.*leave out --keep_aspect"
    assert ran.code == 2 and re.search(said, ran.err)
    assert len(run("--dataroot", photos / "strip.png")["files"]) == 1


def test_a_photo_without_the_query_is_named_and_left_out(cli, base, photos, tmp_path):
    """Photos are 90 to 170 pixels wide; the rest is drawn, and the page written."""
    flags = ["--query", "100,50", "--html", tmp_path / "page.html"]
    ran = cli("eval_visualize_feats", "--dataroot", photos, *base, *flags)
    assert ran.code == 0, ran.err
    result = ran.report()
    assert len(result["files"]) == 4 and result["skipped"] == [str(photos / "a.png")]
    said = "skipped: .*a.png: --query 100,50 is outside the photo: pass x from .*\n"
    assert re.fullmatch(said, ran.err)
    assert (tmp_path / "page.html").read_text().count('"jpeg":') == 4


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataroot", "{}/nowhere"], "no images at .*nowhere, which does not exist: pass"),
        (["--dataroot", "{}/empty"], "no images at .*empty: pass an image"),
        (["--query", "90,10"], "--query 90,10 is outside .*x from 0 to 89 and y from 0 to 119"),
        (["--query", "10,-1"], "--query 10,-1 is outside"),
        (["--query", "nan,1"], "outside"),
        (["--query", "10"], "'10' is not a point: pass x,y"),
        (["--query", "a,b"], "'a,b' is not a point: pass x,y"),
        (["--imsize", "15"], "--imsize 15 is too small: pass 16 or more"),
        (["--limit", "-1"], "--limit -1 is too small: pass 0 or more"),
        (["--lift_iter", "0"], "--lift_iter 0 is too small: pass 1 or more"),
        (["--fontsize", "0"], "--fontsize 0 is too small: pass 1 or more"),
        (["--pca", "--facet", "attn"], "--pca cannot .*: pass another --facet, or leave --pca out"),
        (["--html", "x", "--facet", "attn"], "--html cannot .*--facet, or leave --html out"),
        (["--lift_path", "{}/lift.pth"], "no .* at .*lift.pth: "),
        (["--output_dir", "{}/photos/a.png/vis"], "cannot write .*a.png/vis/.*: free some space"),
        (["--html", "{}/photos"], "photos is a folder: pass a file"),
        (["--json", "{}/photos"], "photos is a folder: pass a file"),
        (["--facet", "keys"], "--facet: invalid choice: 'keys'"),
        (["--channel", "191"], "--channel 191, but .* has 192"),
        (["--imsize", "2000000"], "a.png: out of memory .*: use smaller images"),
        (["--dataroot", ""], "the path of the photos is empty"),
        (["--lift_path", "{}/photos/a.png"], "a.png.*: pass a lift.pth"),
        (["--upsample", "lift"], "pass --lift_path FILE"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cli, base, photos, tmp_path, flags, said):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(tmp_path) for flag in flags]
    ran = cli("eval_visualize_feats", "--dataroot", photos / "a.png", *base, *flags)
    assert ran.code == 2 and ran.err.count("\n") == 1 and re.search(said, ran.err), ran
    assert not ran.out
    assert not list(tmp_path.rglob(".*"))  # nothing half-written


def test_one_photo_that_fails_does_not_end_the_run(cli, base, photos, monkeypatch):
    """One takes more memory than there is, and one has too long a name for its sheets."""
    long = save_photo(photos / f"{'x' * 240}.png", 64, 64)
    read = visualize.read_image

    def read_or_fill_the_memory(path):
        if path.name == "b.png":
            torch.empty(2**60)
        return read(path)

    monkeypatch.setattr(visualize, "read_image", read_or_fill_the_memory)
    ran = cli("eval_visualize_feats", "--dataroot", photos, *base)
    assert ran.code == 0, ran.err
    assert ran.report()["skipped"] == [str(photos / "b.png"), str(long)]
    lines = ran.err.splitlines()
    assert re.fullmatch("skipped: .*/b.png: out of memory .*: use smaller images .*", lines[0])
    assert re.fullmatch("skipped: .*xxx.png: the name is too long for the names .*", lines[1])
    assert len(ran.report()["files"]) == 4 and len(lines) == 2


def test_what_is_cheap_is_checked_before_the_backbone_is_built(cli, base, photos, monkeypatch):
    def build(args):
        raise AssertionError("built")

    monkeypatch.setattr(features, "build_extractor", build)
    for flags in (
        ["--limit", -1],
        ["--lift_path", photos / "none.pth"],
        ["--lift_path", photos / "a.png"],
        ["--html", photos],
        ["--dataroot", photos / "none"],
    ):
        ran = cli("eval_visualize_feats", "--dataroot", photos, *base, *flags)
        assert ran.code == 2 and ran.err.count("\n") == 1, ran


def test_features_that_are_not_finite_are_refused(cli, base, photos, rule_lift, tmp_path):
    state = torch.load(rule_lift)
    state["outc.weight"] = state["outc.weight"] * 1e38  # finite weights, infinite features
    assert state["outc.weight"].isfinite().all()
    torch.save(state, tmp_path / "lift.pth")
    flags = ["--lift_path", tmp_path / "lift.pth", "--lift_iter", 2]
    ran = cli("eval_visualize_feats", "--dataroot", photos, *base, *flags)
    assert ran.code == 2 and not (tmp_path / "vis").exists()
    assert re.search("a.png: the features are not finite in float32: pass other weights", ran.err)
