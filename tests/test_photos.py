"""photos.py: every kind of image, where photos are found, their sizes, and their colours."""

import importlib
import os
import sys
import types
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import photos
from photos import (
    as_photo,
    corner_cells,
    fit,
    fitted_size,
    is_strip,
    list_images,
    note_left_out,
    ours,
    pca_rgb,
    read_image,
    sorted_naturally,
    titled_sheet,
)

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GREY] * 3, axis=-1)

# ---- reading ------------------------------------------------------------------------------------


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated by 90 degrees clockwise
    Image.fromarray(np.rot90(RGB)).save(path, exif=exif)


def save_opaque(path):
    Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])).save(path)


READABLE = {
    "grey.png": lambda path: Image.fromarray(GREY).save(path),
    "16bit.png": lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path),
    "float.tiff": lambda path: Image.fromarray(GREY.astype(np.float32)).save(path),
    "0 to 1.tiff": lambda path: Image.fromarray(GREY.astype(np.float32) / 255).save(path),
    "palette.png": lambda path: Image.fromarray(RGB).quantize(256).save(path),
    "rgba.png": save_opaque,
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


@pytest.mark.parametrize("name", ["16bit.png", "rotated.png"])
def test_nothing_is_turned_if_asked(tmp_path, name):
    READABLE[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        stored = as_photo(image, upright=False)
    assert np.array_equal(stored, read_image(tmp_path / name, upright=False))


# ---- transparency and ranges --------------------------------------------------------------------

DISC = np.zeros((16, 16), bool)
DISC[4:12, 4:12] = True
NOISE = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)


def see_through(mode):
    """A green square on transparent pixels, under which lies noise, as a PIL image of a mode."""
    colours = np.where(DISC[..., None], np.array([0, 160, 0], np.uint8), NOISE)
    rgba = Image.fromarray(np.dstack([colours, DISC * np.uint8(255)]))
    if mode == "P":
        palette = Image.fromarray(np.where(DISC, 0, 1).astype(np.uint8)).convert("P")
        palette.putpalette([0, 160, 0, 255, 0, 255])
        return palette
    return rgba.convert(mode)


@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("x.png", "RGBA", {}),
        ("x.webp", "RGBA", {"lossless": True, "exact": True}),
        ("x.tif", "RGBA", {}),
        ("x.png", "LA", {}),
        ("x.png", "P", {"transparency": 1}),
        ("x.gif", "P", {"transparency": 1}),
    ],
)
def test_transparent_pixels_are_white(tmp_path, name, mode, options):
    picture = see_through(mode)
    picture.save(tmp_path / name, **options)
    pixels = np.asarray(read_image(tmp_path / name))
    green = [97, 97, 97] if mode == "LA" else [0, 160, 0]
    assert np.abs(pixels[DISC].astype(int) - green).max() <= 4
    assert (pixels[~DISC] == 255).all()


def test_half_transparent_pixels_are_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 100, 200, 51)).save(tmp_path / "x.png")  # a fifth
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (204, 224, 244)


def test_a_transparent_colour_of_an_rgb_png_is_white(tmp_path):
    picture = Image.new("RGB", (2, 1), (9, 9, 9))
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(tmp_path / "x.png", transparency=(1, 2, 3))
    read = read_image(tmp_path / "x.png")
    assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == ((255, 255, 255), (9, 9, 9))


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))  # [64, 64]
RAMP_8 = np.rint(255 * RAMP).astype(int)


def integers(bits, dtype):
    return np.rint(RAMP * (2**bits - 1)).astype(dtype)


# every range that a file may hold: its values, and its suffixes
RANGES = {
    "8 bits in 16": (integers(8, np.uint16), (".png", ".tif")),
    "10 bits in 16": (integers(10, np.uint16), (".png", ".tif")),
    "12 bits in 16": (integers(12, np.uint16), (".png", ".tif")),
    "14 bits in 16": (integers(14, np.uint16), (".png", ".tif")),
    "16 bits in 16": (integers(16, np.uint16), (".png", ".tif")),
    "12 bits in 32": (integers(12, np.int32), (".tif",)),
    "16 bits in 32": (integers(16, np.int32), (".tif",)),
    "20 bits in 32": (integers(20, np.int32), (".tif",)),
    "negative": (integers(11, np.int32) - 1000, (".tif",)),
    "float to 1": (RAMP.astype(np.float32), (".tif",)),
    "float to 255": ((255 * RAMP).astype(np.float32), (".tif",)),
    "float to 4095": ((4095 * RAMP).astype(np.float32), (".tif",)),
    "float to 50, as light": ((50 * RAMP).astype(np.float32), (".tif",)),
    "float of Hounsfield": ((2000 * RAMP - 1000).astype(np.float32), (".tif",)),
}


@pytest.mark.parametrize("name", RANGES)
def test_any_range_becomes_8_bits(tmp_path, name):
    values, suffixes = RANGES[name]
    for suffix in suffixes:
        path = tmp_path / f"x{suffix}"
        Image.fromarray(values).save(path)
        pixels = np.asarray(read_image(path)).astype(int)
        assert np.abs(pixels - RAMP_8[..., None]).max() <= 1, suffix


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_colours_of_any_range_become_8_bits(tmp_path, bits, suffix):
    path = tmp_path / f"x{suffix}"
    colours = np.stack([integers(bits, np.uint16)] * 3, axis=-1)
    colours[..., 2] //= 2  # red: OpenCV writes BGR
    cv2.imwrite(str(path), colours)
    pixels = np.asarray(read_image(path)).astype(int)
    assert np.abs(pixels[..., 2] - RAMP_8).max() <= 1
    assert np.abs(pixels[..., 0] - RAMP_8 / 2).max() <= 1


@pytest.mark.parametrize("top", [1, 4095])
@pytest.mark.parametrize("dtype, channels", [(np.float64, 1), (np.float32, 3), (np.float64, 3)])
def test_tiffs_that_pillow_does_not_know(tmp_path, top, dtype, channels):
    colours = np.stack([top * RAMP] * channels, axis=-1).astype(dtype)
    cv2.imwrite(str(tmp_path / "x.tif"), colours)
    pixels = np.asarray(read_image(tmp_path / "x.tif")).astype(int)
    assert np.abs(pixels - RAMP_8[..., None]).max() <= 1


def test_transparent_colours_of_12_bits(tmp_path):
    colours = np.zeros((4, 4, 4), np.uint16)
    colours[:2] = (4095, 0, 0, 65535)  # blue
    cv2.imwrite(str(tmp_path / "x.png"), colours)
    read = read_image(tmp_path / "x.png")
    assert (read.getpixel((0, 0)), read.getpixel((0, 3))) == ((0, 0, 255), (255, 255, 255))


def test_colours_of_12_bits_are_turned_upright(tmp_path):
    colours = np.zeros((2, 6, 3), np.uint16)
    colours[:, 0] = 4095
    cv2.imwrite(str(tmp_path / "flat.png"), colours)
    exif = Image.Exif()
    exif[0x0112] = 6
    png = (tmp_path / "flat.png").read_bytes()
    content = exif.tobytes()[6:]
    chunk = len(content).to_bytes(4, "big") + b"eXIf" + content
    chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(png[:33] + chunk + png[33:])  # after the header
    read = read_image(tmp_path / "x.png")
    assert read.size == (2, 6) and read.getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "x.png", upright=False).size == (6, 2)


def test_what_is_not_finite_is_black_or_white(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, :3] = (np.nan, np.inf, -np.inf)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert list(np.asarray(read_image(tmp_path / "x.tif"))[0, :3, 0]) == [0, 255, 0]
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "x.tif")
    assert not np.asarray(read_image(tmp_path / "x.tif")).any()


def test_a_run_has_one_note_on_ranges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photos, "TOLD", bytearray(1))
    for name in ("a.png", "b.png"):
        Image.fromarray(integers(12, np.uint16)).save(tmp_path / name)
        read_image(tmp_path / name)
    err = capsys.readouterr().err
    assert "a.png has values from 0 to 4095, and 0 is read as black, 4095 as white" in err
    assert err.count("\n") == 1


# ---- any form, any name -------------------------------------------------------------------------


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
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*none.jpg"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="there is a folder, not an image, at"):
        read_image(tmp_path)
    with monkeypatch.context() as smaller:
        smaller.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match="too large"):
            read_image(ROOT / "assets/sample.jpg")

    def no_memory(path):
        raise MemoryError

    monkeypatch.setattr(photos, "open_image", no_memory)
    with pytest.raises(MemoryError, match=r"sample.jpg is too large"):
        read_image(ROOT / "assets/sample.jpg")


NOT_IMAGES = {
    "empty.png": (b"", "an empty file: replace"),
    "doc.pdf": (b"%PDF-1.7\n", "a PDF document: render its pages"),
    "clip.mp4": (b"\0\0\0\x20ftypisom" + bytes(9), "a movie: take its frames, as with ffmpeg"),
    "clip.mov": (b"\0\0\0\x14ftypqt  " + bytes(9), "a movie: take its frames, as with ffmpeg"),
    "clip.avi": (b"RIFF\0\0\0\0AVI LIST", "a movie: take its frames, as with ffmpeg"),
    "clip.webm": (b"\x1aE\xdf\xa3" + bytes(9), "a movie: take its frames, as with ffmpeg"),
    "page.jpg": (b"\n<!DOCTYPE html><html>", "a web page: download the photo itself"),
    "404.jpg": (b"<html><body>404", "a web page: download the photo itself"),
    "pic.svg": (b"<svg xmlns=''/>", "an SVG drawing, or other XML: export it as PNG"),
    "a.npy": (b"\x93NUMPY" + bytes(9), "a NumPy array: save it as PNG"),
    "a.zip": (b"PK\3\4" + bytes(9), "a zip archive: unpack it"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS: run git lfs"),
    "i.heic": (b"\0\0\0\x18ftypheic" + bytes(9), "an HEIC photo: pip install pillow-heif"),
    "i.jpg": (b"\0\0\0\x18ftypmif1" + bytes(9), "an HEIC photo: pip install pillow-heif"),
    "x.jxl": (b"\xff\x0a" + bytes(9), "a JPEG XL photo: convert it"),
    "y.jxl": (b"\0\0\0\x0cJXL " + bytes(9), "a JPEG XL photo: convert it"),
    "raw.NEF": (b"II*\0" + bytes(9), "a camera's raw file: export it as JPEG or TIFF"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_a_file_that_is_not_a_photo_is_called_what_it_is(tmp_path, name):
    content, message = NOT_IMAGES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is {message}") as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path, message",
    [
        ("", "the path of the photos is empty .an unset variable..: pass a path"),
        ("  ", "the path of the photos is empty"),
        ("https://example.org/a.jpg", "is a URL: download the photo"),
        ("s3://bucket/a.jpg", "is a URL: download the photo"),
        (Path("http://x/a.jpg"), "is a URL: download the photo"),
    ],
)
def test_paths_that_are_none(path, message):
    for function in (read_image, list_images, as_photo):
        with pytest.raises(ValueError, match=message):
            function(path)


def test_the_first_picture_of_several_counts(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    for name in ("x.gif", "x.webp", "x.png", "x.tif", "x.mpo", "x.jpg"):
        options = {"format": "MPO"} if name == "x.jpg" else {}
        red.save(tmp_path / name, save_all=True, append_images=[blue], **options)
        pixel = read_image(tmp_path / name).getpixel((4, 4))
        assert np.abs(np.array(pixel) - (255, 0, 0)).max() <= 2, name


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
    with pytest.raises(ValueError, match=r"no images at .*none, which does not exist: pass"):
        list_images(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no images at .*gif: pass"):
        list_images(f"{tmp_path}/*.gif")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip.mp4").touch()
    with pytest.raises(ValueError, match=r"no images at .*videos, but 1 .mp4: pass"):
        list_images(tmp_path / "videos")


def test_numbers_in_names_count_as_numbers(tmp_path):
    names = ["10.jpg", "9.jpg", "1.jpg", "b2/3.jpg", "b10/1.jpg", "frame_1.jpg", "frame_02.jpg"]
    wanted = ["1.jpg", "9.jpg", "10.jpg", "b2/3.jpg", "b10/1.jpg", "frame_1.jpg", "frame_02.jpg"]
    assert sorted_naturally(names) == wanted
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / name for name in wanted]
    equal_length = ["a-.jpg", "a1.jpg", "aa.jpg", "A1.jpg", "00010.jpg", "00009.jpg"]
    assert sorted_naturally(equal_length) == sorted(equal_length)
    assert sorted_naturally(["01.jpg", "1.jpg"]) == sorted_naturally(["1.jpg", "01.jpg"])


def save_as(suffix, path):
    path.with_suffix(suffix).write_bytes(path.read_bytes())


def test_what_is_left_out_is_told_in_one_line(tmp_path, capsys):
    photo = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(photo)
    for suffix in (".heic", ".HEIC", ".dng", ".jxl", ".jpg_large", ".jpg ", "", ".ico", ".pdf"):
        save_as(suffix, photo)
    for name in ("notes.txt", "README", ".hidden.heic", "labels.json"):
        (tmp_path / name).write_text("hi")
    os.mkfifo(tmp_path / "fifo")  # nobody writes into it: opening it would never end
    os.mkfifo(tmp_path / "fifo.jpg")
    note_left_out(tmp_path)
    err = capsys.readouterr().err
    assert err.startswith(
        "note: left out for their format: 1 '.jpg ', 1 '.jpg_large', 1 .dng, 2 .heic, 1 .ico, "
        "1 .jxl, 1 .pdf, 1 without a suffix: pip install pillow-heif for HEIC, convert them to JPEG"
    )
    assert err.count("\n") == 1
    assert list_images(tmp_path) == [photo]
    for path in (photo, f"{tmp_path}/*.jpg"):
        note_left_out(path)
    assert capsys.readouterr().err == ""


def test_phones_photos_are_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    registered = []
    library = types.ModuleType("pillow_heif")
    library.register_heif_opener = lambda: registered.append(True)
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    spec = importlib.util.spec_from_file_location("photos_with_heif", photos.__file__)
    with_heif = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(with_heif)
    assert registered
    (tmp_path / "a.HEIC").touch()
    assert with_heif.list_images(tmp_path) == [tmp_path / "a.HEIC"]


def test_pictures_of_ours():
    for name in ("cat.jpg_pca.png", "out/cat.PNG_mask.png", "a_b.jpeg_iterations.png"):
        assert ours(name), name
    for name in ("cat_pca.png", "cat.jpg_pca.jpg", "cat.jpg.png", "mask.png", "cat.txt_mask.png"):
        assert not ours(name), name


def test_folders_behind_links_are_searched_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "class").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert list_images(root) == [root / "class" / "a.jpg"]


def test_a_link_that_leads_nowhere_is_listed_to_be_named(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert list_images(tmp_path) == [tmp_path / "a.jpg"]
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*a.jpg"):
        read_image(tmp_path / "a.jpg")


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


def test_strips():
    assert is_strip(5000, 20) and is_strip(20, 5000)
    assert not is_strip(1700, 100) and not is_strip(640, 20)


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


def test_corner_cells():
    assert corner_cells(14, 14).nonzero().tolist() == [[0, 0], [0, 13], [13, 0], [13, 13]]
    assert corner_cells(28, 14).sum() == 4 * 2
    assert corner_cells(1, 3).tolist() == [[True, False, True]]


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
