"""photos.py: every kind of image, where photos are found, their sizes, and their colours."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from photos import as_photo, fit, fitted_size, list_images, pca_rgb, read_image, titled_sheet

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GREY] * 3, axis=-1)

# ---- reading ------------------------------------------------------------------------------------


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated by 90 degrees clockwise
    Image.fromarray(np.rot90(RGB)).save(path, exif=exif)


def save_with_alpha(path):
    Image.fromarray(np.dstack([RGB, GREY // 2])).save(path)


READABLE = {
    "grey.png": lambda path: Image.fromarray(GREY).save(path),
    "16bit.png": lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path),
    "float.tiff": lambda path: Image.fromarray(GREY.astype(np.float32)).save(path),
    "0 to 1.tiff": lambda path: Image.fromarray(GREY.astype(np.float32) / 255).save(path),
    "palette.png": lambda path: Image.fromarray(RGB).quantize(256).save(path),
    "rgba.png": save_with_alpha,
    "cmyk.tiff": lambda path: Image.fromarray(RGB).convert("CMYK").save(path),
    "rotated.png": save_rotated,
}


@pytest.mark.parametrize("name", READABLE)
def test_images_are_read_upright_as_rgb(tmp_path, name):
    READABLE[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert image.size == (16, 16)
    tolerance = 3 if name == "palette.png" else 0
    assert np.abs(np.asarray(image).astype(int) - GREY[..., None]).max() <= tolerance


@pytest.mark.parametrize("name", ["16bit.png", "rotated.png"])
def test_an_open_image_is_read_as_its_file_is(tmp_path, name):
    READABLE[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(as_photo(image), read_image(tmp_path / name))


def test_numbers_of_numpy_are_sizes():
    assert fitted_size(640, 480, 16, np.int64(224)) == fitted_size(640, 480, 16, 224)


def test_pixels_as_they_are_stored(tmp_path):
    """As the annotations of a data set count them, whatever EXIF says."""
    save_rotated(tmp_path / "rotated.png")
    stored = np.asarray(read_image(tmp_path / "rotated.png", upright=False))
    assert np.array_equal(stored, np.rot90(RGB))
    again = as_photo(read_image(tmp_path / "rotated.png", upright=False))
    assert np.array_equal(again, np.rot90(RGB))


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    jpeg = (ROOT / "assets/sample.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "empty.png").touch()
    for name in ("text.jpg", "cut.jpg"):
        message = f"{name} is not a readable image .*: replace or remove"
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image at"):
        read_image(tmp_path / "none.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large"):
        read_image(ROOT / "assets/sample.jpg")


def test_a_photo_may_come_in_any_form(tmp_path):
    photo = Image.fromarray(RGB)
    photo.save(tmp_path / "x.png")
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    forms = [
        tmp_path / "x.png", str(tmp_path / "x.png"), photo, RGB,
        tensor, tensor[None], tensor / 255,
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(np.asarray(as_photo(form)), RGB)
    assert as_photo(Image.fromarray(GREY)).mode == "RGB"
    for bad in (GREY, RGB / 255, tensor[:2], tensor / 1.0, torch.stack([tensor, tensor])):
        with pytest.raises(ValueError, match=": pass "):
            as_photo(bad)


def test_list_images(tmp_path):
    for name in ("b.JPG", "sub/a.png", "sub/notes.txt", "c.avif", "d.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in ("b.JPG", "c.avif", "d.jfif", "sub/a.png")]
    assert list_images(tmp_path) == everything
    assert list_images(f"{tmp_path}/*.JPG") == [tmp_path / "b.JPG"]
    for nothing in (tmp_path / "none", f"{tmp_path}/*.gif"):
        with pytest.raises(ValueError, match="no images at"):
            list_images(nothing)


def test_folders_behind_links_are_searched_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "class").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert list_images(root) == [root / "class" / "a.jpg"]


def test_hidden_files_are_no_photos(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".a.1234.jpg", ".thumbnails/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / "a.jpg"]
    assert list_images(f"{tmp_path}/*") == [tmp_path / "a.jpg"]


# ---- fitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, load_size, wanted",
    [
        (448, 448, 224, (224, 224)),
        (640, 480, 224, (304, 224)),
        (480, 640, 224, (224, 304)),
        (37, 500, None, (32, 496)),
        (16, 16, None, (16, 16)),
        (24, 100, None, (32, 96)),
        (500, 375, (224, 320), (320, 224)),
        (451, 300, 448, (672, 448)),
    ],
)
def test_sizes(width, height, load_size, wanted):
    assert fitted_size(width, height, 16, load_size) == wanted


def test_less_than_a_patch():
    with pytest.raises(ValueError, match=r"less than one patch \(16\): pass a larger"):
        fitted_size(15, 200, 16)


def test_photos_are_resized_once():
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 100, 3), np.uint8))
    wanted = photo.resize((80, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(fit(photo, 16, 48)), np.asarray(wanted))
    fitting = photo.crop((0, 0, 96, 48))
    assert fit(fitting, 16) is fitting


# ---- pictures -----------------------------------------------------------------------------------


def two_parts():
    """A map [8, 6, 8] whose left and right halves differ, with a little noise."""
    parts = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0))
    feats = parts.repeat_interleave(4, dim=2).repeat(1, 6, 1)
    return feats + 0.01 * torch.randn(feats.shape, generator=torch.Generator().manual_seed(1))


def test_pca_colours_compare_between_maps():
    coarse = two_parts()
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    coarse_rgb, fine_rgb = pca_rgb([coarse, fine])
    assert coarse_rgb.shape == (6, 8, 3)
    assert coarse_rgb.dtype == np.uint8
    assert np.array_equal(fine_rgb[::2, ::2], coarse_rgb), "one descriptor, one colour"
    left, right = coarse_rgb[:, :4].mean((0, 1)), coarse_rgb[:, 4:].mean((0, 1))
    assert np.abs(left - right).max() > 150, "two parts, two colours"


def test_pca_colours_of_a_flat_map():
    flat = pca_rgb([torch.ones(8, 2, 2)])[0]
    assert (flat == flat[0, 0]).all()


def test_corner_cells_do_not_eat_the_range_of_colours():
    generator = torch.Generator().manual_seed(0)
    common = 4 * torch.ones(16, 1, 1)  # all cells share a direction, as keys of a ViT do
    feats = common + torch.randn(16, 12, 12, generator=generator)
    odd = feats.clone()
    for row in (0, -1):
        for column in (0, -1):
            odd[:, row, column] = -10 * common[:, 0, 0] + 20 * torch.eye(16)[0]
    spread = pca_rgb([odd])[0][2:-2, 2:-2].std(axis=(0, 1))
    without = pca_rgb([feats])[0][2:-2, 2:-2].std(axis=(0, 1))
    assert (spread > 0.8 * without.min()).all()


def test_a_sheet_shows_photo_and_maps_side_by_side():
    photo = Image.new("RGB", (200, 100), "blue")
    map_picture = Image.new("RGB", (4, 2), "red")
    sheet = titled_sheet([("photo", photo), ("map", map_picture)], height=100)
    assert sheet.size == (8 + 2 * 208, 136)
    assert sheet.getpixel((100, 80)) == (0, 0, 255)
    assert sheet.getpixel((320, 80)) == (255, 0, 0)
    assert sheet.getpixel((2, 80)) == (255, 255, 255)
