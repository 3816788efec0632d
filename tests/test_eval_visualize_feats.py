"""eval_visualize_feats.py: golden maps, the plain loop, sheets and the page (in a headless browser) read pixel by pixel."""

import base64
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain_visualize import plain_self_similarity

import eval_visualize_feats as visualize
from extractor import ViTExtractor, read_image
from lift import load_lift

ROOT = Path(visualize.__file__).parent


def save_photo(path, width, height, seed=0):
    """A smooth random photo, as a PNG (nothing is lost)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.RandomState(seed).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(small).resize((width, height), Image.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos of several sizes, flat and nested."""
    names = ["a.png", "b.png", "deep/a.png", "deep/er/c.png", "deep/er/d.png"]
    for seed, name in enumerate(names):
        save_photo(tmp_path / "photos" / name, 90 + 20 * seed, 120, seed)
    return tmp_path / "photos"


@pytest.fixture
def run(cli, rule_backbone, tmp_path):
    """run(*flags) draws at 64 pixels with the rule backbone into tmp_path/vis and returns the JSON of the last line."""

    base = ["--device", "cpu", "--imsize", 64, "--output_dir", tmp_path / "vis", *rule_backbone]

    def run(*flags):
        ran = cli("eval_visualize_feats", *base, *flags)
        assert ran.code == 0, ran.err
        return json.loads(ran.out.splitlines()[-1])

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The rows of every sheet that is drawn, as lists of titles."""
    titles, draw = [], visualize.draw_sheet

    def spy(rows, fontsize):
        titles.append([[title for title, _ in row] for row in rows])
        return draw(rows, fontsize)

    monkeypatch.setattr(visualize, "draw_sheet", spy)
    return titles


def names(result, tmp_path):
    return sorted(str(Path(f).relative_to(tmp_path / "vis")) for f in result["files"])


def levels(pixels):
    """RGB pixels [..., 3] -> the values in 0..1 that have these colours."""
    table = visualize.COLOURS.astype(int)
    return np.abs(np.asarray(pixels)[..., None, :3].astype(int) - table).sum(-1).argmin(-1) / 255


def panel_values(sheet, column, grid, shape):
    """Values [h, w] read from the cell centres of a panel of `shape` (W, H) in the last row of a sheet of such panels."""
    left, top = 12 + column * (shape[0] + 12), sheet.height - 12 - shape[1]
    picture = np.asarray(sheet)[top : top + shape[1], left : left + shape[0]]
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(grid, reversed(shape)))
    return levels(picture[rows][:, columns])


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_golden_maps(shared, vit_tiny, golden_lift):
    golden = dict(np.load(shared / "golden/visualize.npz"))
    (photo,) = (shared / "data/voc").rglob(str(golden.pop("image")))
    extractor = ViTExtractor(vit_tiny[1], backbone_path=vit_tiny[3], device="cpu")
    maps = visualize.compute_maps(extractor, load_lift(golden_lift, extractor), read_image(photo), (224, 224), 4)
    assert len(maps) == len(golden) == 7
    for (title, feats), (name, expected) in zip(maps.items(), golden.items()):
        _, h, w = feats.shape
        ours = visualize.self_similarity(feats, [(h // 2, w // 2)])[0].numpy()
        step = h // len(expected)  # the file keeps every fourth cell of the largest map
        assert np.abs(ours[::step, ::step] - expected).max() < 1e-4, (title, name)


@pytest.mark.parametrize("shape", [(3, 1, 7), (192, 5, 9), (130, 33, 20)])
def test_self_similarity_equals_the_plain_loop(shape):
    feats = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    _, h, w = shape
    cells = [(0, 0), (h // 2, w // 2), (h - 1, w - 1), (0, w - 1)]
    ours = visualize.self_similarity(feats, cells)
    assert ours.shape == (4, h, w)
    for cell, values in zip(cells, ours):
        torch.testing.assert_close(values, plain_self_similarity(feats, *cell), atol=1e-5, rtol=0)
        assert values.min() == 0 and values.max() == 1 and values[cell] == 1


def test_flat_maps_and_empty_cells_have_a_defined_similarity():
    flat = torch.full((7, 4, 5), 0.3) * torch.linspace(1, 2, 20).view(4, 5)  # one direction, several lengths
    assert (visualize.self_similarity(flat, [(1, 1)]) == 0).all()
    assert (visualize.self_similarity(torch.zeros(7, 4, 5), [(1, 1)]) == 0).all()
    holed = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    holed[:, 0, 0] = 0
    assert visualize.self_similarity(holed, [(1, 1), (0, 0)]).isfinite().all()


def test_cells_of_points():
    for side in range(1, 70):
        for cells in (1, 2, 7, 14, 15, 28, 56):
            assert visualize.cell_at((side / 2, side / 2), (side, side), (cells, cells)) == (cells // 2,) * 2
            assert visualize.cell_at((side - 1e-3, side - 1), (side, side), (cells, cells))[1] == cells - 1
    assert visualize.cell_at((0, 0), (500, 333), (14, 21)) == (0, 0)
    assert visualize.cell_at((100, 250), (200, 300), (6, 4)) == (5, 2)


# ---- sheets ---------------------------------------------------------------------------------------------------------


def test_sheets_show_the_maps_of_the_plain_loop(run, rule_backbone, rule_lift, tmp_path):
    photo = save_photo(tmp_path / "photo.png", 150, 100)
    result = run("--dataroot", photo, "--lift_path", rule_lift, "--lift_iter", 2, "--hide_marker", "--query", "140,20")
    assert names(result, tmp_path) == ["photo.png_alternatives.png", "photo.png_iterations.png"]
    extractor = ViTExtractor(rule_backbone[1], backbone_path=rule_backbone[3], device="cpu")
    maps = visualize.compute_maps(extractor, load_lift(rule_lift, extractor), read_image(photo), (64, 64), 2)
    cells = {title: visualize.cell_at((140, 20), (150, 100), feats.shape[1:]) for title, feats in maps.items()}
    expected = {title: plain_self_similarity(feats, *cells[title]) for title, feats in maps.items()}
    assert [tuple(values.shape) for values in expected.values()] == [(4, 4), (8, 8), (8, 8), (8, 8), (16, 16)]
    for file, titles in zip(result["files"], (list(maps)[:4], ["backbone", "LiFT", "LiFT, 2 times"])):
        sheet, shape = Image.open(file), (280, 187)  # panels keep the aspect of the photo
        assert sheet.width == 12 + (len(titles) + 1) * (shape[0] + 12)
        for column, title in enumerate(titles, 1):
            values = panel_values(sheet, column, expected[title].shape, shape)
            assert np.abs(values - expected[title].numpy()).max() < 0.01, title


def test_markers_lie_on_the_query(run, tmp_path):
    photo = save_photo(tmp_path / "photo.png", 100, 100)
    sheets = []
    for flags in ([], ["--hide_marker"]):
        file = run("--dataroot", photo, "--query", "30,80", *flags)["files"][0]
        sheets.append(np.asarray(Image.open(file)).astype(int))
    changed = np.abs(sheets[0] - sheets[1]).sum(-1) > 0
    top = len(changed) - 12 - 280
    where = [np.argwhere(changed[:, 12 + 292 * i : 292 * (i + 1)]).mean(0) - (top, 0) for i in range(4)]
    cells = [(80, 30), (87.5, 37.5), (81.25, 31.25), (81.25, 31.25)]  # (y, x) in percent: the point, its cells' centres
    assert np.abs(np.array(where) - 2.8 * np.array(cells)).max() < 1.5


def test_titles_state_real_grids(run, drawn, photos, rule_lift):
    flags = ["--lift_path", rule_lift, "--lift_iter", 3, "--pca", "--query", "1,2", "--query", "3,4"]
    run("--dataroot", photos / "a.png", "--imsize", 48, *flags)
    grids = [[title.split("\n")[1] for title in row[1:]] for rows in drawn for row in rows]
    alternatives, iterations = ["3x3", "6x6", "6x6", "6x6"], ["3x3", "6x6", "12x12", "24x24"]
    assert grids == [alternatives] * 2 + [iterations] * 2 + [alternatives + iterations[2:]]
    assert [row[0] for row in drawn[0]] == ["photo\nx 1, y 2", "photo\nx 3, y 4"]


def test_keep_aspect_stride_and_layer(run, drawn, photos):
    """deep/er/d.png has 170 x 120 pixels: 91 x 64 at --imsize 64, of which 96 x 64 is the nearest multiple of the patch."""
    run("--dataroot", photos / "deep/er/d.png", "--keep_aspect", "--stride", 8, "--layer", 3, "--facet", "token")
    assert [title.split("\n")[1] for title in drawn[0][0][1:]] == ["7x11", "14x22", "15x23"]


def test_lift_panels_are_left_out_without_lift(run, drawn, photos, tmp_path):
    result = run("--dataroot", photos / "b.png")
    assert names(result, tmp_path) == ["b.png_alternatives.png"]
    assert [title.split("\n")[0] for title in drawn[0][0]] == ["photo", "backbone", "bilinear", "backbone, photo at 2x"]


def test_long_titles_widen_the_sheet(photos, run):
    widths = [Image.open(run("--dataroot", photos / "b.png", "--fontsize", size)["files"][0]).width for size in (8, 18, 60)]
    assert widths[0] == widths[1] < widths[2]


def test_sheets_are_white_around_panels_and_titles(run, photos):
    sheet = np.asarray(Image.open(run("--dataroot", photos / "b.png")["files"][0]))
    for edge in (sheet[:10], sheet[-12:], sheet[:, :12], sheet[:, -12:]):
        assert (edge == 255).all()
    titles = sheet[12:50].min(axis=(0, 2))
    assert (titles.reshape(-1)[12:].reshape(4, -1).min(1) < 60).all()  # dark letters above every panel


def test_pca_colours_compare_between_maps():
    feats = torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0))
    photo = Image.new("RGB", (64, 64))
    (_, whole), (_, corner) = visualize.pca_row(photo, {"whole": feats, "corner": feats[:, :4, :4]}, (64, 64))[1:]
    whole, corner = np.asarray(whole)[4::8, 4::8], np.asarray(corner)[8::16, 8::16]
    assert np.array_equal(whole[:4, :4], corner) and whole.std() > 30


# ---- which photos ---------------------------------------------------------------------------------------------------


def test_photos_are_drawn_by_the_seed_and_mirrored(run, photos, tmp_path):
    everything = [f"{name}.png_alternatives.png" for name in ("a", "b", "deep/a", "deep/er/c", "deep/er/d")]
    assert names(run("--dataroot", photos, "--limit", 0), tmp_path) == everything
    assert names(run("--dataroot", photos), tmp_path) == everything
    draws = [names(run("--dataroot", photos, "--limit", 2, "--seed", seed), tmp_path) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(map(tuple, draws))) > 1 and all(len(set(d)) == 2 for d in draws)


def test_relative_paths(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for dataroot in (".", "**/*.png"):
        drawn = names(run("--dataroot", dataroot, "--limit", 0), tmp_path)
        assert drawn == [f"{name}.png_alternatives.png" for name in ("a", "b", "deep/a", "deep/er/c", "deep/er/d")]
    assert names(run("--dataroot", "deep/a.png"), tmp_path) == ["a.png_alternatives.png"]


def test_json_file_holds_the_last_line(run, photos, tmp_path):
    result = run("--dataroot", photos / "*.png", "--json", tmp_path / "new/result.json", "--limit", 1)
    assert json.loads((tmp_path / "new/result.json").read_text()) == result
    assert result["settings"]["imsize"] == 64 and result["settings"]["versions"]["torch"] == torch.__version__


def test_a_broken_photo_among_others_is_skipped_and_named(cli, photos, rule_backbone, tmp_path):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    flags = ["--device", "cpu", "--imsize", 32, "--output_dir", tmp_path / "vis", *rule_backbone]
    ran = cli("eval_visualize_feats", "--dataroot", photos, *flags)
    result = json.loads(ran.out.splitlines()[-1])
    assert ran.code == 0 and len(result["files"]) == 5 and result["skipped"] == [str(photos / "broken.png")]
    assert ran.err.count("\n") == 1 and "broken.png" in ran.err
    ran = cli("eval_visualize_feats", "--dataroot", photos / "broken.png", *flags)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "broken.png" in ran.err


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataroot", "{}/nowhere"], "nowhere"),
        (["--dataroot", "{}/empty"], "no images"),
        (["--query", "90,10"], "--query 90,10 is outside .*pass x from 0 to 89 and y from 0 to 119"),
        (["--query", "10,-1"], "--query 10,-1 is outside"),
        (["--query", "nan,1"], "outside"),
        (["--query", "10"], "'10' is no point: pass x,y"),
        (["--query", "a,b"], "'a,b' is no point: pass x,y"),
        (["--imsize", "15"], "--imsize 15 is too small: pass 16 or more"),
        (["--limit", "-1"], "--limit -1 is too small: pass 0 or more"),
        (["--lift_iter", "0"], "--lift_iter 0 is too small: pass 1 or more"),
        (["--fontsize", "0"], "--fontsize 0 is too small: pass 1 or more"),
        (["--pca", "--facet", "attn"], "pass another --facet"),
        (["--lift_path", "{}/lift.pth"], "lift.pth"),
        (["--output_dir", "{}/photos/a.png/vis"], "a.png"),
        (["--html", "{}/photos"], "photos"),
        (["--facet", "keys"], "keys"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cli, photos, rule_backbone, tmp_path, flags, said):
    (tmp_path / "empty").mkdir()
    flags = [flag.format(tmp_path) for flag in flags]
    base = ["--device", "cpu", "--imsize", 32, "--output_dir", tmp_path / "vis", "--dataroot", photos / "a.png", *rule_backbone]
    ran = cli("eval_visualize_feats", *base, *flags)
    assert ran.code == 2 and ran.err.count("\n") == 1 and re.search(said, ran.err) and not ran.out, ran
    assert not list(tmp_path.rglob(".*"))  # nothing half-written


def test_bad_input_as_a_command(tmp_path):
    command = [sys.executable, ROOT / "eval_visualize_feats.py", "--dataroot", tmp_path / "nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "nowhere" in ran.stderr


# ---- the page -------------------------------------------------------------------------------------------------------


def page_data(page):
    """The photos that a page holds, and its maps decoded to [K, h, w]."""
    photos = json.loads(re.search(r"PHOTOS = (.*);$", page.read_text(), re.M)[1])
    for photo in photos:
        for m in photo["maps"]:
            codes = np.frombuffer(base64.b64decode(m["codes"]), np.int8).reshape(*m["grid"], -1)
            m["feats"] = torch.from_numpy(codes * np.float32(m["scale"])).permute(2, 0, 1)
    return photos


def test_page_holds_everything_in_8_megabytes(run, rule_lift, tmp_path):
    photo = save_photo(tmp_path / "</script><b>.png".replace("/", "\u2215"), 300, 200)
    page = tmp_path / "new/page.html"
    run("--dataroot", photo, "--imsize", 224, "--keep_aspect", "--lift_path", rule_lift, "--html", page, "--lift_iter", 1)
    text = page.read_text()
    assert len(text) < 2e6  # the largest backbones keep no more numbers a cell
    assert "default-src 'none'" in text and not re.search(r"https?:|src=[\"'](?!data)|@import|url\(", text)
    assert text.count("<script>") == text.count("</script>") == 1 and "<b>.png" not in text
    (entry,) = page_data(page)
    assert [m["grid"] for m in entry["maps"]] == [[14, 21]] + [[28, 42]] * 3 and entry["point"] == [0.5, 0.5]


def test_compact_maps_keep_cosines():
    torch.manual_seed(0)
    x = torch.randn(384, 40) @ torch.randn(40, 20 * 30)  # features of rank 40, and noise
    feats = (x + 0.1 * torch.randn(x.shape)).view(384, 20, 30)
    kept = visualize.compact(feats)
    codes = np.frombuffer(base64.b64decode(kept["codes"]), np.int8).reshape(20 * 30, 128)
    decoded = torch.from_numpy(codes * np.float32(kept["scale"])).T.view(128, 20, 30)
    cells = [(0, 0), (10, 15), (19, 29)]
    difference = visualize.self_similarity(decoded, cells) - visualize.self_similarity(feats, cells)
    assert difference.abs().max() < 0.02


class Browser:
    """A headless Chromium under chromedriver, spoken to in WebDriver's plain HTTP and JSON."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--window-size=1400,900",
    )  # fmt: skip

    def __init__(self, driver, binary, profile):
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        port = next(found[1] for line in self.process.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": binary, "args": [*self.FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def __call__(self, path, method="POST", **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def script(self, code):
        return self("/execute/sync", script=f"return {code}", args=[])

    def point(self, selector, x, y):
        """Move the mouse to (x, y), in 0..1, of the first element of a CSS selector."""
        box = self.script(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        at = {"x": round(box["left"] + x * box["width"]), "y": round(box["top"] + y * box["height"])}
        move = {"type": "pointerMove", "duration": 0, "origin": "viewport"} | at
        self("/actions", actions=[{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}])

    def canvases(self):
        """Pixels [h, w, RGBA] of every canvas of the page."""
        pixels = "[...document.querySelectorAll('canvas')].map(c => [c.height, c.width, Array.from("
        pixels = self.script(pixels + "c.getContext('2d').getImageData(0, 0, c.width, c.height).data)])")
        return [np.array(values).reshape(h, w, 4) for h, w, values in pixels]

    def close(self):
        try:
            self("", "DELETE")
        finally:
            self.process.terminate()
            self.process.wait()


@pytest.fixture
def browser(tmp_path):
    driver = shutil.which("chromedriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not driver or not binary:
        pytest.skip("no headless browser here: install chromium and chromium-driver")
    browser = Browser(driver, binary, tmp_path / "profile")
    yield browser
    browser.close()


def test_page_follows_the_pointer(browser, run, rule_backbone, rule_lift, tmp_path):
    photo, page = save_photo(tmp_path / "photo.png", 300, 200), tmp_path / "page.html"
    run("--dataroot", photo, "--imsize", 112, "--lift_path", rule_lift, "--html", page, "--query", "10,190", "--lift_iter", 1)
    extractor = ViTExtractor(rule_backbone[1], backbone_path=rule_backbone[3], device="cpu")
    maps = visualize.compute_maps(extractor, load_lift(rule_lift, extractor), read_image(photo), (112, 112), 1)

    def check(x, y):
        """Every canvas shows the exact self-similarity of the point; the captions and rings tell the same."""
        for feats, pixels in zip(maps.values(), browser.canvases(), strict=True):
            cell = visualize.cell_at((x, y), (1, 1), feats.shape[1:])
            expected = visualize.self_similarity(feats, [cell])[0].numpy()
            assert pixels[..., 3].min() == 255 and np.abs(levels(pixels) - expected).max() < 0.05
        rings = browser.script("[...document.querySelectorAll('.ring')].map(r => [r.style.left, r.style.top])")
        at = [[float(side.removesuffix("%")) / 100 for side in ring] for ring in rings]
        assert len(at) == 5 and np.abs(np.array(at) - (x, y)).max() < 0.01

    browser("/url", url=page.as_uri())
    check(10 / 300, 190 / 200)
    for selector, x, y in (("img", 0.8, 0.25), ("img", 0.31, 0.7), ("canvas", 0.1, 0.9)):
        browser.point(selector, x, y)
        check(x, y)
    captions = browser.script("[...document.querySelectorAll('figcaption')].map(c => c.innerText)")
    titles = ["photo", "backbone 7x7", "bilinear 14x14", "backbone, photo at 2x 14x14", "LiFT 14x14"]
    assert [c.split("\n")[0] for c in captions] == titles
    shown = browser.script("[...document.querySelectorAll('img, canvas')].map(e => e.clientWidth / e.clientHeight)")
    assert np.abs(np.array(shown) - 1.5).max() < 0.02  # in the aspect of the photo
    assert browser.script("document.querySelector('img').naturalWidth") == 280
    logged = [entry["message"] for entry in browser("/se/log", type="browser") if entry["level"] == "SEVERE"]
    assert logged == []  # neither errors nor attempts to load anything
