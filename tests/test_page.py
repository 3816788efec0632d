"""The page of eval_visualize_feats.py (assets/page.html): its data, and the page in a real browser.

The browser is a headless Chromium, driven over WebDriver's plain HTTP (Debian's packages chromium
and chromium-driver); without it those tests are skipped.
"""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from test_eval_visualize_feats import levels, save_photo

import eval_visualize_feats as visualize
from features import Features, Lifted
from lift import load_lift
from photos import corner_cells, read_image

# ---- the data -----------------------------------------------------------------------------------


def page_data(page):
    """The photos that a page holds, and its maps decoded to [K, h, w]."""
    text = re.search(r"^const DATA = (.*);$", page.read_text(), re.MULTILINE)[1]
    photos = json.loads(text)["photos"]
    for photo in photos:
        for entry in photo["maps"] + photo["steps"]:
            entry["feats"] = decode(entry)
    return photos


def decode(entry):
    """A map of `compact`, as features [K, h, w]."""
    differences = np.frombuffer(zlib.decompress(base64.b64decode(entry["codes"])), np.int8)
    codes = differences.reshape(-1, *entry["grid"]).cumsum(axis=2, dtype=np.int8)
    return torch.from_numpy(codes.astype(np.float32))


def test_page_holds_everything_in_two_megabytes(cli, rule_backbone, rule_lift, tmp_path):
    name = "</script><b>.png".replace("/", "\u2215")
    photo = save_photo(tmp_path / name, 300, 200)
    page = tmp_path / "new/page.html"
    flags = [*rule_backbone, "--device", "cpu", "--output_dir", tmp_path / "vis", "--keep_aspect"]
    flags += ["--dataroot", photo, "--html", page, "--lift_path", rule_lift]
    ran = cli("eval_visualize_feats", *flags)
    assert ran.code == 0 and str(page) in ran.out and len(ran.out.splitlines()) == 2, ran
    text = page.read_text()
    assert len(text) < 2e6  # the largest backbones keep no more numbers a cell
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|src=[\"'](?!data)|@import|url\(", text)
    assert text.count("<script>") == text.count("</script>") == 1 and "<b>.png" not in text
    (entry,) = page_data(page)
    grids = [entry["grid"] for entry in entry["maps"]]
    assert grids == [[14, 21]] + [[28, 42]] * 3 and entry["point"] == [0.5, 0.5]
    assert [entry["grid"] for entry in entry["steps"]] == [[56, 84], [112, 168], [224, 336]]


def test_page_scrolls_under_a_finger_and_shows_a_smooth_photo():
    text = visualize.PAGE.read_text()
    assert "touch-action: pan-y" in text and "touch-action: none" not in text
    assert 'name="viewport" content="width=device-width' in text
    rules = re.findall(r"^(.*)\{[^}]*image-rendering: pixelated", text, re.MULTILINE)
    assert [rule.strip() for rule in rules] == ["canvas"]  # the maps', not the photo's
    assert "four corners" in text


@pytest.mark.parametrize(("height", "width", "most"), [(20, 30, 0.02), (70, 80, 0.04)])
def test_compact_maps_keep_cosines(height, width, most):
    """Those of the finest maps a little less exactly."""
    torch.manual_seed(0)
    x = torch.randn(384, 40) @ torch.randn(40, height * width)  # features of rank 40, and noise
    feats = (x + 0.1 * torch.randn(x.shape)).view(384, height, width)
    decoded = decode(visualize.compact(feats))
    assert decoded.shape == (128, height, width)
    cells = [(0, 0), (height // 2, width // 2), (height - 1, width - 1)]
    ours = visualize.self_similarity(decoded, cells)
    difference = ours - visualize.self_similarity(feats, cells)
    assert difference.abs().max() < most


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (4, 5), (14, 21), (35, 49), (224, 336)])
def test_the_page_has_the_corners_of_corner_cells(grid):
    height, width = grid
    rows, columns = visualize.compact(torch.ones(1, height, width))["corner"]
    mask = torch.zeros(grid, dtype=torch.bool)
    for vertical in (slice(0, rows), slice(height - rows, None)):
        for horizontal in (slice(0, columns), slice(width - columns, None)):
            mask[vertical, horizontal] = True
    assert torch.equal(mask, corner_cells(height, width))


def test_the_page_names_a_backbone_of_your_own(cli, import_path):
    source = (
        "from torch import nn\n"
        "def patches():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Tanh())\n"
    )
    (import_path / "own_patches.py").write_text(source)
    flags = ["--device", "cpu", "--imsize", 64, "--output_dir", import_path / "vis"]
    flags += ["--my_extractor", "own_patches:patches", "--html", import_path / "page.html"]
    photo = save_photo(import_path / "a.png", 90, 120)
    ran = cli("eval_visualize_feats", "--dataroot", photo, *flags)
    assert ran.code == 0, ran.err
    (entry,) = page_data(import_path / "page.html")
    assert entry["name"] == "a.png (own_patches:patches)"
    assert len(entry["maps"]) == 3 and entry["steps"] == []


# ---- in a browser -------------------------------------------------------------------------------


class Browser:
    """A headless Chromium under chromedriver, spoken to in WebDriver's plain HTTP and JSON."""

    FLAGS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,900",
    )

    def __init__(self, driver, binary, profile):
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        port = self.port()
        self.url = f"http://127.0.0.1:{port}/session"
        arguments = [*self.FLAGS, f"--user-data-dir={profile}"]
        wanted = {
            "goog:chromeOptions": {"binary": binary, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self("", capabilities={"alwaysMatch": wanted})
        self.url += "/" + session["sessionId"]

    def port(self):
        """The port that the driver names once it has started."""
        for line in self.process.stdout:
            started = re.search(r"started successfully on port (\d+)", line)
            if started:
                return started[1]
        self.process.terminate()
        self.process.wait()
        raise RuntimeError("chromedriver ended before it had started")

    def __call__(self, path, method="POST", **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def script(self, code):
        """The value of an expression of JavaScript on the page."""
        return self("/execute/sync", script=f"return {code}", args=[])

    def point(self, selector, x, y):
        """Move the mouse to (x, y), in 0..1, of the first element of a CSS selector."""
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.script(f"{element}.getBoundingClientRect().toJSON()")
        move = {
            "type": "pointerMove",
            "duration": 0,
            "origin": "viewport",
            "x": round(box["left"] + x * box["width"]),
            "y": round(box["top"] + y * box["height"]),
        }
        mouse = {
            "type": "pointer",
            "id": "mouse",
            "parameters": {"pointerType": "mouse"},
            "actions": [move],
        }
        self("/actions", actions=[mouse])

    def press(self, key):
        """Press and release a key."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def click(self, text):
        """Click the button with this text."""
        buttons = "[...document.querySelectorAll('button')]"
        self.script(f"{buttons}.find(button => button.innerText === {json.dumps(text)}).click()")

    def texts(self, selector):
        """The text of all elements of a CSS selector."""
        elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.script(f"{elements}.map(element => element.innerText)")

    def canvases(self):
        """Pixels [h, w, RGBA] of every canvas of the page."""
        data = "Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        every = "[...document.querySelectorAll('canvas')]"
        pixels = self.script(f"{every}.map(c => [c.height, c.width, {data}])")
        return [np.array(values).reshape(h, w, 4) for h, w, values in pixels]

    def close(self):
        try:
            self("", "DELETE")
        finally:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    binary = None
    for name in ("chromium", "chromium-browser", "google-chrome"):
        binary = binary or shutil.which(name)
    if not driver or not binary:
        pytest.skip("there is no headless browser here: install chromium and chromium-driver")
    browser = Browser(driver, binary, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def maps(rule_extractor, rule_lift, tmp_path):
    """Of two photos, whose page is tmp_path/page.html: [{title: [K, h, w]}], LiFT up to 3 times.

    They are the maps that the page holds; those that it holds them for are near.
    """
    extractor = rule_extractor()
    lifted = Lifted(load_lift(rule_lift, extractor, silent=True), extractor, 3)
    held = []
    entries = []
    for seed in range(2):
        photo = read_image(save_photo(tmp_path / f"{seed}.png", 300, 200, seed))
        maps = visualize.compute_maps(Features(extractor, lifted), photo, (112, 112))
        entry = visualize.page_entry(f"{seed}.png", photo, maps, (10, 190), (280, 187))
        entries.append(entry)
        held.append({each["title"]: decode(each) for each in entry["maps"] + entry["steps"]})
        for title in list(maps)[:4]:
            shown = visualize.shown_similarity(held[-1][title], [(1, 2), (5, 6)])
            exact = visualize.shown_similarity(maps[title], [(1, 2), (5, 6)])
            assert (shown - exact).abs().max() < 0.05
    visualize.write_page(tmp_path / "page.html", entries)
    return held


def check_page(browser, maps, x, y):
    """Every canvas shows the similarity to the point (x, y), and the rings lie on it."""
    expected = []
    for feats in maps:
        cell = visualize.cell_at((x, y), (1, 1), feats.shape[1:])
        expected.append(visualize.shown_similarity(feats, [cell])[0].numpy())

    for _ in range(50):  # maps are unpacked in the background
        shown = browser.canvases()
        grids = [pixels.shape[:2] for pixels in shown]
        if grids == [values.shape for values in expected]:
            worst = max(np.abs(levels(a) - b).max() for a, b in zip(shown, expected))
            if worst < 0.01:
                break
        time.sleep(0.1)
    else:
        raise AssertionError(f"the page does not show the maps of {(x, y)}: {grids}, {worst}")
    assert all(pixels[..., 3].min() == 255 for pixels in shown)

    rings = browser.script(
        "[...document.querySelectorAll('.ring')].map(r => [r.style.left, r.style.top])"
    )
    at = []
    for left, top in rings:
        at.append((float(left.removesuffix("%")) / 100, float(top.removesuffix("%")) / 100))
    assert len(at) == 1 + len(maps) and np.abs(np.array(at) - (x, y)).max() < 0.01


def check_log(browser):
    """There are neither errors nor attempts to load anything."""
    logged = []
    for entry in browser("/se/log", type="browser"):
        if entry["level"] == "SEVERE":
            logged.append(entry["message"])
    assert logged == []


def test_page_follows_the_pointer(browser, maps, tmp_path):
    browser("/url", url=(tmp_path / "page.html").as_uri())
    always = list(maps[0].values())[:4]
    last = list(maps[0].values())[-1]
    check_page(browser, [*always, last], 10 / 300, 190 / 200)
    # the middles of cells of all maps: the pointer stands on whole pixels
    for selector, x, y in (("img", 0.81, 0.26), ("img", 0.31, 0.74), ("canvas", 0.1, 0.9)):
        browser.point(selector, x, y)
        check_page(browser, [*always, last], x, y)

    assert [caption.split("\n")[0] for caption in browser.texts("figcaption")] == [
        "photo",
        "backbone 7x7",
        "bilinear 14x14",
        "backbone, photo at 2x 14x14",
        "LiFT 14x14",
        "LiFT, 3 times 56x56",
    ]
    aspects = browser.script(
        "[...document.querySelectorAll('img, canvas')].map(e => e.clientWidth / e.clientHeight)"
    )
    assert np.abs(np.array(aspects) - 1.5).max() < 0.02  # in the aspect of the photo
    assert browser.script("document.querySelector('img').naturalWidth") == 280
    check_log(browser)


def test_iteration_and_photo_are_chosen_on_the_page(browser, maps, tmp_path):
    browser("/url", url=(tmp_path / "page.html").as_uri())
    assert browser.texts("button") == ["LiFT, 2 times", "LiFT, 3 times"]
    first = list(maps[0].values())
    place = (10 / 300, 190 / 200)
    browser.click("LiFT, 2 times")
    check_page(browser, [*first[:4], first[4]], *place)
    assert browser.texts("button[aria-pressed=true]") == ["LiFT, 2 times"]
    browser.press("3")
    check_page(browser, [*first[:4], first[5]], *place)

    browser.press("\ue014")  # arrow to the right
    second = list(maps[1].values())
    check_page(browser, [*second[:4], second[5]], *place)
    assert browser.script("document.querySelector('select').value") == "1"
    assert "1.png" in browser.texts("figcaption")[0]
    browser.press("\ue014")
    check_page(browser, [*first[:4], first[5]], *place)
    check_log(browser)


def test_panels_fill_the_window(browser, maps, tmp_path):
    """In one direction at least, in as many columns as make the panels largest."""
    browser("/url", url=(tmp_path / "page.html").as_uri())
    for width, height, columns in ((1400, 900, 3), (700, 1200, 2), (1900, 600, 6)):
        browser("/window/rect", width=width, height=height)
        boxes = browser.script(
            "[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().toJSON())"
        )
        inner = browser.script("[innerWidth, innerHeight, document.body.scrollHeight]")
        assert len({round(box["left"]) for box in boxes}) == columns
        assert inner[2] <= inner[1]  # nothing to scroll
        across = boxes[-1]["right"] - boxes[0]["left"]
        down = boxes[-1]["bottom"] - boxes[0]["top"]
        header = boxes[0]["top"]
        assert across > 0.94 * inner[0] or down > 0.9 * (inner[1] - header), (width, height)
