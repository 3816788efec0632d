"""Faults in every script: damaged files, kills of it or of its workers, disks, two processes, NaN,
too little memory.

A script must then do its work, or say in one line what is wrong and exit with status 2. It never
prints a traceback, hangs, runs code out of a file, or leaves half a file behind.

`pytest -n 0 -m long tests/test_faults.py -s` runs the campaign itself, some ten minutes on one
core, and prints its figures. Everything here is random weights of a small ViT (timm's test_vit) on
pictures made on the fly.
"""

import ctypes
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, rule_state, rule_vit
from PIL import Image
from safetensors.torch import load_file, save

from lift import LiFT


class Script(NamedTuple):
    """A command under test; {out} in its flags is the folder it writes to."""

    script: str
    flags: str
    going_on: str = ""  # flags to go on after a stop


BACKBONE = "--model_type test_vit --device cpu --backbone_path backbone"
LIFT = "--lift_path lift.pth"

COMMANDS = {
    "extractor": Script(
        "extractor",
        "--image_path photos/0.jpg --output_path {out}/0.pth --load_size 64 --stride 8",
    ),
    "folder": Script(
        "lift_extractor",
        f"--image_path photos --output_path {{out}} --load_size 64 --batch_size 1 {LIFT}",
    ),
    "npz": Script(
        "lift_extractor",
        "--image_path photos/1.png --output_path {out}/1.npz --picture {out}/1.png " + LIFT,
    ),
    "safetensors": Script(
        "lift_extractor",
        "--image_path photos/1.png --output_path {out}/1.safetensors --load_size 64",
    ),
    "train": Script(
        "train_lift",
        "--dataroot photos --output_dir {out} --imsize 64 --batch_size 4 --epochs 2 --save_steps 1 "
        "--val_fraction 0.2 --augment --workers 0",
        "--resume",
    ),
    "cached": Script(
        "train_lift",
        "--dataroot photos --output_dir {out} --imsize 64 --batch_size 4 --epochs 2 --workers 0 "
        "--cache_features {out}/cache",
        "--resume",
    ),
    "evaluate": Script(
        "train_lift",
        "--evaluate lift.pth --val_dataroot photos --imsize 64 --workers 0 --json {out}/line.json",
    ),
    "spair": Script(
        "eval_spair",
        "--dataroot spair --imsize 64 --pairs_per_category 0 --visualize 2 --output_dir {out} "
        "--json {out}/line.json " + LIFT,
    ),
    "davis": Script(
        "eval_davis",
        "--dataroot davis --output_dir {out} --imsize 64 --overlay --json {out}/line.json " + LIFT,
    ),
    "score": Script("eval_davis", "--dataroot davis --score_only masks --output_dir {out}"),
    "voc": Script(
        "eval_tokencut",
        "--dataroot voc --dataset VOC12 --set trainval --imsize 64 --output_dir {out} "
        "--visualize all " + LIFT,
    ),
    "coco": Script(
        "eval_tokencut",
        "--dataroot coco --dataset COCO20k --imsize 64 --output_dir {out} --json {out}/line.json",
    ),
    "movie": Script(
        "eval_davis",
        "--frames movie.avi --mask davis/Annotations/480p/a/00000.png --output_dir {out} "
        "--imsize 64",
    ),
    "segment": Script(
        "eval_segmentation",
        "--dataset folder --dataroot segment --classes 2 --imsize 64 --epochs 2 --visualize 2 "
        "--output_dir {out} --json {out}/line.json " + LIFT,
    ),
    "maps": Script(
        "eval_segmentation",
        "--dataset folder --dataroot segment --classes 2 --imsize 64 --score_only maps "
        "--json {out}/line.json",
    ),
    "visualize": Script(
        "eval_visualize_feats",
        "--dataroot photos --output_dir {out} --imsize 64 --lift_iter 2 --limit 2 --pca "
        "--html {out}/page.html " + LIFT,
    ),
}

DAVIS_FOLDER = "out_davis/davis_vidseg_64_layer5"

# a file of the tree below, and the command that reads it
TARGETS = [
    ("photos/0.jpg", "extractor"),
    ("photos/1.png", "npz"),
    ("photos/1.png", "visualize"),
    ("photos/3.png", "folder"),
    ("photos/2.jpg", "train"),
    ("backbone", "extractor"),
    ("lift.pth", "npz"),
    ("lift.json", "npz"),
    ("lift.pth", "evaluate"),
    ("spair/PairAnnotation/test/0:0-1:cat.json", "spair"),
    ("spair/JPEGImages/cat/0.jpg", "spair"),
    ("davis/Annotations/480p/a/00000.png", "davis"),
    ("davis/Annotations/480p/a/00002.png", "score"),
    ("davis/JPEGImages/480p/a/00001.jpg", "davis"),
    ("davis/ImageSets/2017/val.txt", "davis"),
    ("masks/a/00001.png", "score"),
    ("movie.avi", "movie"),
    (f"{DAVIS_FOLDER}/settings.json", "davis"),
    (f"{DAVIS_FOLDER}/a/00001.png", "davis"),
    ("voc/VOCdevkit/VOC2012/Annotations/1.xml", "voc"),
    ("voc/VOCdevkit/VOC2012/JPEGImages/0.jpg", "voc"),
    ("voc/VOCdevkit/VOC2012/ImageSets/Main/trainval.txt", "voc"),
    ("out_voc/predictions/settings.json", "voc"),
    ("out_voc/predictions/*.jpg.json", "voc"),
    ("coco/instances_train2014_sel20k.json", "coco"),
    ("coco/coco_20k_filenames.txt", "coco"),
    ("coco/COCO/annotations/instances_train2014.json", "coco"),
    ("coco/COCO/images/train2014/0.jpg", "coco"),
    ("segment/images/train/0.jpg", "segment"),
    ("segment/masks/train/1.png", "segment"),
    ("segment/masks/val/0.png", "maps"),
    ("maps/0.png", "maps"),
    ("out_segment/settings.json", "segment"),
    ("out_segment/probe.pth", "segment"),
    ("out_folder/settings.json", "folder"),
    ("out_train/*/last.pth", "train"),
    ("out_cached/cache/*.features", "cached"),
]

FEATURES = [name for name in COMMANDS if name not in ("score", "maps")]  # those that compute them
RESUMED = ("folder", "train", "davis", "voc", "segment")  # what the campaign of kills is about
WITH_WORKERS = ("folder", "train", "cached", "segment")  # and that of killed workers


# ---- a small tree with everything that the scripts read -----------------------------------------


def photo(i, size=(80, 64)):
    """A smooth random photo with a bright square."""
    rng = np.random.RandomState(i)
    small = Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    colour = (255, 255 - 20 * i % 256, 30)
    image.paste(colour, (20 + i % 5, 16, 52, 48))
    return image


def write(path, content):
    """Write text, JSON or an image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        if path.suffix == ".jpg":
            content.save(path, quality=95)
        else:
            content.save(path)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))


def label(k):
    """An indexed mask with one object that moves with k."""
    labels = np.zeros((64, 80), np.uint8)
    labels[16:48, 20 + k : 52 + k] = 1
    image = Image.fromarray(labels)
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def write_weights(root):
    state = rule_state(rule_vit("test_vit"))
    torch.save(state, root / "backbone")
    torch.save(rule_state(LiFT(64, 16)), root / "lift.pth")
    origin = {"backbone": "test_vit.r160_in1k", "layer": 5, "facet": "key"}
    write(root / "lift.json", {**origin, "patch": 16})


def write_photos(root):
    for i in range(12):
        suffix = "jpg"
        if i % 2:
            suffix = "png"
        write(root / f"photos/{i}.{suffix}", photo(i, (64 + 8 * (i % 3), 64)))


def write_spair(root):
    for i in range(3):
        write(root / f"spair/JPEGImages/cat/{i}.jpg", photo(i))
    points = [[30, 20], [40, 40], [12.5, 33]]
    for a, b in ((0, 1), (1, 2)):
        entry = {
            "src_imname": f"{a}.jpg",
            "trg_imname": f"{b}.jpg",
            "trg_bndbox": [10, 10, 60, 60],
            "src_kps": points,
            "trg_kps": points,
        }
        write(root / f"spair/PairAnnotation/test/{a}:{a}-{b}:cat.json", entry)


def write_davis(root):
    write(root / "davis/ImageSets/2017/val.txt", "a\nb\nc\n")
    for name in "abc":
        for k in range(5):
            write(root / f"davis/Annotations/480p/{name}/0000{k}.png", label(2 * k))
            write(root / f"davis/JPEGImages/480p/{name}/0000{k}.jpg", photo(2 * k))
            write(root / f"masks/{name}/0000{k}.png", label(3 * k))

    # by OpenCV's own writer: FFmpeg's would decide in this process what its reader prints
    how = (cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 64))
    writer = cv2.VideoWriter(root / "movie.avi", *how)
    for k in range(5):
        writer.write(np.asarray(photo(2 * k))[..., ::-1])  # BGR
    writer.release()


def write_voc(root):
    voc = root / "voc/VOCdevkit/VOC2012"
    box = "<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>60</xmax><ymax>60</ymax></bndbox>"
    entry = f"<annotation><object><name>cat</name>{box}</object></annotation>"
    for i in range(8):
        write(voc / f"JPEGImages/{i}.jpg", photo(i))
        write(voc / f"Annotations/{i}.xml", entry)
    write(voc / "ImageSets/Main/trainval.txt", "\n".join(str(i) for i in range(8)))


def write_coco(root):
    coco = root / "coco"
    images = []
    boxes = []
    for i in range(3):
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 80, "height": 64})
        boxes.append({"image_id": i, "bbox": [10, 10, 50, 50], "iscrowd": 0})
        write(coco / f"COCO/images/train2014/{i}.jpg", photo(i))
    entry = {"images": images, "annotations": boxes}
    write(coco / "COCO/annotations/instances_train2014.json", entry)
    write(coco / "coco_20k_filenames.txt", "train2014/0.jpg\ntrain2014/1.jpg\n")


def write_segmentation(root):
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            write(root / f"segment/images/{split}/{i}.jpg", photo(i))
            write(root / f"segment/masks/{split}/{i}.png", label(i % 5))
    for i in range(4):
        write(root / f"maps/{i}.png", label(2 * i))


def flags_of(name, out=None, resume=False, more=""):
    """Script and flags of a command, `out` being where it writes, `more` further flags."""
    command = COMMANDS[name]
    line = command.flags.format(out=out or f"out_{name}")
    line = f"{line} {BACKBONE} {more}"
    if resume:
        line = f"{line} {command.going_on}"
    return command.script, line.split()


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The tree; nothing is ever changed in it."""
    root = tmp_path_factory.mktemp("faults") / "tree"
    root.mkdir()
    write_weights(root)
    write_photos(root)
    write_spair(root)
    write_davis(root)
    write_voc(root)
    write_coco(root)
    write_segmentation(root)
    return root


def fingerprint(root):
    """Size and time of every file below a folder."""
    found = {}
    for path in root.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def copied(tree, folder):
    """A copy of the tree, as the working folder, so that all paths are the same in every copy.

    It is made of hard links. That is fast, but whatever does not replace files as a whole changes
    the tree: that is an AssertionError.
    """
    shutil.rmtree(folder, ignore_errors=True)
    untouched = fingerprint(tree)
    shutil.copytree(tree, folder, copy_function=os.link)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        assert fingerprint(tree) == untouched, "a file was written in place"


@pytest.fixture
def case(tree, tmp_path):
    """A copy of the tree, as the working folder."""
    with copied(tree, tmp_path / "case") as folder:
        yield folder


# ---- what is right ------------------------------------------------------------------------------


class Hang(BaseException):
    """A command took too long. Not an Exception: readers catch those."""


@contextmanager
def within(seconds):
    """Raise Hang if what is inside takes longer."""

    def stop(number, frame):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


REMEDY = (
    r"\b(pass|use|restore|replace|remove|correct|resize|take|choose|free|make|leave|train|keep"
    r"|extract|delete|start|begin|add|save|store|unpack|write)\b"
)


def messages(err):
    """The lines of stderr without progress bars, notes, and the photos that were left out."""
    lines = []
    for line in re.split(r"[\r\n]+", err):
        if "%|" in line:  # a bar, and what was printed behind it
            line = line.partition("%|")[2].partition("]")[2]
        if line.strip() and not line.startswith(("note: ", "skipped: ")):
            lines.append(line)
    return lines


def verdict(code, err):
    """`read` for exit 0, `refused` for exit 2 with one line that ends in a remedy.

    Anything else is an AssertionError.
    """
    assert code in (0, 2), f"exit {code}: {err}"
    assert "Traceback" not in err and "Warning" not in err, err
    if code == 0:
        return "read"
    lines = messages(err)
    assert len(lines) == 1, f"{len(lines)} lines: {err}"
    assert re.search(REMEDY, lines[0]), f"no remedy: {err}"
    assert not re.search(r" \((None|)\)", lines[0]), f"no reason: {err}"
    return "refused"


def no_constant(name):
    """For json.loads: NaN and Infinity are no JSON."""
    pytest.fail(f"{name} in JSON")


def run(cli, name, words="", **how):
    """Run a command of COMMANDS in this process -> `read` or `refused`.

    Args:
        words: what it must say on stderr.
        how: as for flags_of.
    """
    script, flags = flags_of(name, **how)
    with within(60):
        ran = cli(script, *flags)
    assert words in ran.err, ran.err
    if ran.code == 0:
        report = ran.json
        if "--json" in flags:
            report = Path(flags[flags.index("--json") + 1])
        json.loads(report.read_text(), parse_constant=no_constant)
    return verdict(ran.code, ran.err)


# what may differ between two runs with one result. Folders: each copy of the tree lies elsewhere,
# and settings hold absolute paths; rng: how often loaders were begun, which no training depends on
VOLATILE = {
    "dataroot",
    "frames",
    "mask",
    "image_folders",
    "rng",
    "photos_per_s",
    "workers",
    "resume",
    "json",
    "output_dir",
    "output_path",
    "cache_features",
    "picture",
    "html",
    "files",
}


def plain(value):
    """A value without what may differ between two runs with one result, comparable by ==."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def content(path):
    """What a file holds, read as what it is; half a file is an error of any kind."""
    if path.suffix == ".pth":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        del arrays["settings"]
        return plain(arrays)
    if path.suffix == ".jsonl":
        lines = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            name = str(line.get("name", line.get("epoch")))
            assert name not in lines, f"{name} is in {path} twice"
            lines[name] = plain(line)
        return lines
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            image.load()
    return path.read_bytes()


def results(out):
    """What a command wrote, {file: content}.

    Left out are temporary files of a killed process, and safetensors, the order of whose header is
    not fixed.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".safetensors":
            continue
        name = path.relative_to(out).as_posix()
        if path.suffix == ".features":  # named by a hash of absolute paths
            name = f"{path.stat().st_size}.features"
        found[name] = content(path)
    return found


class Whole(NamedTuple):
    """The results of an undisturbed run, its seconds, and the bytes it wrote."""

    results: dict
    seconds: float
    room: int


@pytest.fixture(scope="session")
def whole(tree, tmp_path_factory, fork):
    """whole(name) -> Whole."""
    known = {}
    folder = tmp_path_factory.mktemp("whole")

    def get(name):
        if name not in known:
            with copied(tree, folder / name):
                began = time.time()
                assert fork(name).wait() == "read", name
                seconds = time.time() - began
                out = Path(f"out_{name}")
                room = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
                known[name] = Whole(results(out), seconds, room)
        return known[name]

    return get


# ---- processes that start in an instant, to be killed -------------------------------------------


def work(folder, script, flags, memory, shm):
    """A command as a process of its own, its output in files.

    Args:
        memory: at most so many bytes more than at the start.
        shm: bytes of its own /dev/shm, where this user may mount one.
    """
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # as scripts do it that nobody has forked
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{os.getpid()}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    torch.set_num_threads(1)
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if shm:
        ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: what is mounted now is seen here only
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={shm}", "tmpfs", "/dev/shm"]
        subprocess.run(mount, check=True)
    module = __import__(script)
    module.parser().run(module.main, flags)


class Forked:
    """A command in the working folder, in a process forked from one that has imported all."""

    def __init__(self, context, name, memory=None, shm=None, **how):
        self.folder = Path.cwd()
        arguments = (self.folder, *flags_of(name, **how), memory, shm)
        self.process = context.Process(target=work, args=arguments)
        self.process.start()

    def log(self):
        """What it has printed, on stdout and on stderr."""
        return [(self.folder / f"{name}{self.process.pid}").read_text() for name in ("out", "err")]

    def wait(self, seconds=120):
        """`read` or `refused`, as `verdict` has it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail("hangs")
        return verdict(self.process.exitcode, self.log()[1])

    def workers(self):
        """The ids of its workers, as soon as both are there; fewer if it ends before."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        until = time.monotonic() + 60
        while len(found) < 2 and self.process.is_alive():
            assert time.monotonic() < until, "no workers are started"
            with suppress(OSError):  # it has just ended
                found = [int(pid) for pid in children.read_text().split()]
            time.sleep(0.001)
        return found

    def kill_after(self, seconds):
        """SIGKILL; whether there still was something to kill."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="session")
def fork():
    """fork(name, memory=None, shm=None, **how) -> Forked, `how` as for flags_of."""
    context = multiprocessing.get_context("forkserver")
    scripts = {command.script for command in COMMANDS.values()}
    context.set_forkserver_preload([__name__, *scripts])
    # the server keeps these when it has started; other tests start processes without them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        # the first process waits until the server has imported all: later ones begin at once
        first = context.Process()
        first.start()
        first.join()
    return partial(Forked, context)


# ---- damaged files ------------------------------------------------------------------------------


class Bomb:
    """What it is unpickled to is a call: it makes the folder BOOM."""

    def __reduce__(self):
        return os.mkdir, ("BOOM",)


def truncated(data, rng):
    """A file that ends too early."""
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    """A file with 1, 4 or 32 other bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def zeroed(data, rng):
    """A file with a hole of zeros."""
    at = rng.randrange(len(data))
    length = rng.randrange(1, 2 + len(data) // 2)
    holed = data[:at] + bytes(length) + data[at + length :]
    return holed[: len(data)]


def noise(data, rng):
    """Random bytes."""
    return rng.randbytes(rng.randrange(1, 2000))


def empty(data, rng):
    """No byte."""
    return b""


def repeated(data, rng):
    """A file with its beginning once more at the end."""
    return data + data[: rng.randrange(1, len(data))]


def another_type(data, rng):
    """The bytes of another kind of file."""
    png, jpeg, pth = io.BytesIO(), io.BytesIO(), io.BytesIO()
    photo(3).save(png, "PNG")
    photo(3).save(jpeg, "JPEG")
    torch.save(torch.ones(3), pth)
    others = [
        png.getvalue(),
        jpeg.getvalue(),
        pth.getvalue(),
        pickle.dumps({"a": [1]}),
        b"<a><b/></a>",
        b"[]",
        b"{}",
        b"null",
        b"17",
        b'"a"',
        b"\xff\xfe\x00\x01",
        b"a,b\n1,2\n",
        save({"a": torch.ones(2)}),
    ]
    return rng.choice(others)


def huge(data, rng):
    """A file that claims to be enormous."""
    if data[:4] == b"\x89PNG":
        most = 2**31 - 1
        sides = rng.choice([(most, most), (60000, 60000), (1, most)])
        header = b"IHDR" + struct.pack(">II", *sides) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data[:2] == b"\xff\xd8":
        at = data.index(b"\xff\xc0")
        sides = rng.choice([b"\xff\xff\xff\xff", b"\x00\x01\xff\xff"])
        return data[: at + 5] + sides + data[at + 9 :]
    if data[:2] == b"PK":
        lies = [
            save({"a": torch.ones(1)}).replace(b"[1]", b"[9]"),
            struct.pack("<Q", 2**60) + b"{}",
            data.replace(b"K", b"k"),
        ]
        return rng.choice(lies)
    if data[:1] == b"<":
        return billion_laughs()
    texts = [b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000, b"x" * 10**6, b'{"images": 1e999}']
    return rng.choice(texts)


def billion_laughs():
    """An XML file whose one name would grow to 10^9 words."""
    entities = '<!ENTITY l0 "lol">'
    for i in range(1, 10):
        ten = f"&l{i - 1};" * 10
        entities += f'<!ENTITY l{i} "{ten}">'
    entry = "<annotation><object><name>&l9;</name></object></annotation>"
    return f"<!DOCTYPE a [{entities}]>{entry}".encode()


JUNK = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    float("nan"),
    "",
    "x",
    [],
    {},
    [None],
    [[1, 2], [3]],
    {"a": 1},
]


def nodes(value):
    """All (container, key) of nested dicts and lists."""
    children = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found = []
    for key, child in children:
        found.append((value, key))
        found += nodes(child)
    return found


def mistyped(data, rng):
    """The same kind of file with one value of another type, shape or size, or without it."""
    if data[:2] == b"PK":
        value = torch.load(io.BytesIO(data), weights_only=True)
        change(value, rng, [*JUNK, torch.ones(2, 3), torch.tensor(float("nan"))])
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    if data[:1] == b"<":
        root = ElementTree.fromstring(data)
        node = rng.choice(list(root.iter()))
        if rng.random() < 0.5:
            node.clear()
        node.text = rng.choice(["", "nan", "inf", "1e999", "-5", "x", "9" * 400])
        return ElementTree.tostring(root)
    try:
        text = data.decode()
        parts = text.splitlines()
        if text[:2] == "{\n":  # one value over several lines
            parts = [text]
        values = [json.loads(part) for part in parts]
        change(rng.choice(values), rng, JUNK)
        return "\n".join(json.dumps(value) for value in values).encode()
    except (ValueError, IndexError, AttributeError):
        return flipped(data, rng)


def change(value, rng, junk):
    """Replace one value inside of another by junk, or delete it."""
    container, key = rng.choice(nodes(value))
    if isinstance(container, dict) and rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(junk)


def bomb(data, rng):
    """Pickles that call a function, bare and as torch writes them."""
    if rng.random() < 0.5:
        return pickle.dumps(rng.choice([Bomb(), {"outc.weight": Bomb()}]))
    buffer = io.BytesIO()
    torch.save({"settings": Bomb(), "a": torch.ones(1)}, buffer)
    return buffer.getvalue()


DAMAGES = [
    truncated,
    flipped,
    zeroed,
    noise,
    empty,
    repeated,
    another_type,
    huge,
    mistyped,
    bomb,
]


@pytest.fixture(scope="session")
def used(tree, tmp_path_factory, fork):
    """The tree after runs of what goes on from its own files; two have stopped half way.

    It is to be copied to the folder `case` beside it: settings of results hold absolute paths.
    """
    with copied(tree, tmp_path_factory.mktemp("used") / "case") as folder:
        for name in ("folder", "train", "cached", "davis", "voc", "coco", "segment"):
            assert fork(name).wait() == "read"
        (folder / "out_folder/3.png.pth").unlink()
        (folder / DAVIS_FOLDER / "c/00004.png").unlink()
    return folder.rename(folder.with_name("used"))


# files that nothing can be made of when they are empty, or hold code
WEIGHTS = ("backbone", "lift.pth", "out_train/*/last.pth", "out_segment/probe.pth")


def damage(used, target, name, how, seed, cli):
    """Damage a file of a fresh copy and run the command that reads it -> `read` or `refused`.

    It goes on in its old folder if that is where the file is, and else begins in a new one.
    """
    rng = random.Random(f"{target} {how.__name__} {seed}")
    with copied(used, used.with_name("case")) as folder:
        candidates = list(folder.glob(target))
        path = max(candidates, key=lambda path: path.stat().st_size)  # a cache may hold no photos
        damaged = how(path.read_bytes(), rng)
        path.unlink()  # it is a link to the file of all copies
        path.write_bytes(damaged)
        own = target.startswith("out_")
        try:
            found = run(cli, name, out=f"out_{name}" if own else "out", resume=own)
        finally:
            assert not (folder / "BOOM").exists(), "code was executed"
    if target in WEIGHTS and how in (empty, bomb):
        assert found == "refused", f"{how.__name__} {target} was taken"
    return found


@pytest.mark.parametrize(("target", "name"), TARGETS, ids=lambda value: value.rsplit("/", 1)[-1])
def test_damaged_files(used, cli, target, name):
    """Two kinds of damage for each file; the long part takes all of them."""
    # each file begins at another place of the list, so that all kinds come to their turn
    first = TARGETS.index((target, name))
    damages = [DAMAGES[first % len(DAMAGES)], DAMAGES[(first + 5) % len(DAMAGES)]]
    if target in WEIGHTS:
        damages += [empty, bomb]
    for how in damages:
        damage(used, target, name, how, 0, cli)


@pytest.mark.long
@pytest.mark.parametrize("script", sorted({command.script for command in COMMANDS.values()}))
def test_campaign_of_damaged_files(used, cli, capfd, script):
    """Every damage, twice, of every file that a script reads; all faults are printed."""
    figures = Counter()
    failed = []
    for target, name in TARGETS:
        if COMMANDS[name].script != script:
            continue
        for how in DAMAGES:
            for seed in range(2):
                try:
                    figures[damage(used, target, name, how, seed, cli)] += 1
                except (Exception, Hang, pytest.fail.Exception) as error:
                    what = f"{target} {name} {how.__name__} {seed}"
                    failed.append(f"{what}: {type(error).__name__} {str(error)[:300]}")
                    with capfd.disabled():
                        print(failed[-1], flush=True)
    total = sum(figures.values()) + len(failed)
    with capfd.disabled():
        print(f"\n{script}, damaged files: {total}, {dict(figures)}, failed: {len(failed)}")
    assert not failed, "\n".join(failed)


def test_the_bomb_goes_off_where_it_is_unpickled(case):
    pickle.loads(pickle.dumps({"outc.weight": Bomb()}))
    assert (case / "BOOM").is_dir()


# ---- killed, and gone on ------------------------------------------------------------------------


class Kill(NamedTuple):
    """What came of a run that was killed and gone on with."""

    killed: bool  # it still ran
    written: int  # files at that moment
    equal: bool  # the end is that of an undisturbed run


def killed_and_resumed(tree, folder, name, fork, whole, rng):
    """Kill a run at a random moment and finish it -> Kill."""
    expected = whole(name)
    with copied(tree, folder):
        killed = fork(name).kill_after(rng.uniform(0.02, expected.seconds))
        out = Path(f"out_{name}")
        written = len(results(out))
        assert fork(name, resume=True).wait() == "read"
        return Kill(killed, written, results(out) == expected.results)


@pytest.mark.parametrize("name", RESUMED)
def test_killed_runs_end_with_the_same_result(tree, tmp_path, fork, whole, name):
    rng = random.Random(name)
    for _ in range(20):
        kill = killed_and_resumed(tree, tmp_path / "case", name, fork, whole, rng)
        assert kill.equal
        if kill.killed:
            return
    pytest.fail("20 runs ended before they were killed")


@pytest.mark.long
@pytest.mark.parametrize("name", RESUMED)
def test_campaign_of_kills(tree, tmp_path, fork, whole, capfd, name):
    """13 kills of each command that goes on from its own files."""
    rng = random.Random(name)
    total = 0
    partly = 0  # killed when some of the files were written
    equal = 0
    while total < 13:
        kill = killed_and_resumed(tree, tmp_path / "case", name, fork, whole, rng)
        if kill.killed:
            total += 1
            partly += 0 < kill.written < len(whole(name).results)
            equal += kill.equal
    with capfd.disabled():
        print(f"\n{name}, killed: {total}, some files written: {partly}, resumed equal: {equal}")
    assert equal == total


# ---- workers killed -----------------------------------------------------------------------------

AS_THE_SYSTEM_DOES = (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV)  # memory, a drive, a bug


def is_running(pid):
    """Whether a process runs: not one that has ended and waits to be asked for its status."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Loss(NamedTuple):
    """What came of a run that lost a worker and was gone on with."""

    refused: bool  # it needed the worker, and said so
    seconds: float  # until it ended
    equal: bool  # the end is that of an undisturbed run


def worker_killed_and_resumed(tree, folder, name, fork, whole, number, delay, rng):
    """Kill a worker of a run with two, and finish the run without any -> Loss."""
    expected = whole(name).results
    with copied(tree, folder):
        process = fork(name, more="--workers 2")
        workers = process.workers()
        process.process.join(delay)
        if process.process.is_alive():
            workers += process.workers()  # training has others to validate
        with suppress(ProcessLookupError, IndexError):  # it has ended, or before there were any
            os.kill(rng.choice(workers), number)
        began = time.monotonic()
        found = process.wait()
        seconds = time.monotonic() - began
        if found == "refused":
            said = process.log()[1]
            assert "a worker was killed" in said, said
            assert "--workers 0" in said, said
        assert not any(is_running(pid) for pid in workers)

        out = Path(f"out_{name}")
        assert results(out).keys() <= expected.keys()  # all of it can be read
        assert not list(out.rglob(".*")), "something half"
        assert fork(name, resume=True).wait() == "read"
        return Loss(found == "refused", seconds, results(out) == expected)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_a_killed_worker_ends_the_run_with_one_line(tree, tmp_path, fork, whole, name):
    rng = random.Random(name)
    for _ in range(20):
        loss = worker_killed_and_resumed(
            tree, tmp_path / "case", name, fork, whole, signal.SIGKILL, 0, rng
        )
        assert loss.equal
        assert loss.seconds < 30
        if loss.refused:
            return
    pytest.fail("20 runs ended without the worker")


@pytest.mark.parametrize("name", ["folder", "train", "segment"])
def test_no_shared_memory(case, fork, whole, name):
    """Docker gives 64 MB of it, which are full with photos of a usual size."""
    with mounted(case / "try", "-t", "tmpfs", "tmpfs"):
        pass  # may this user mount?
    process = fork(name, shm=8192, more="--workers 2")
    assert process.wait(120) == "read"
    assert results(case / f"out_{name}") == whole(name).results


@pytest.mark.parametrize("name", ["folder", "train", "segment"])
def test_photos_that_vanish_under_workers(case, fork, name):
    """As on a drive that is unmounted: done with what was read, or refused; never for ever."""
    process = fork(name, more="--workers 2")
    process.workers()
    for folder in ("photos", "segment"):
        shutil.rmtree(folder)
    process.wait(30)


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_campaign_of_killed_workers(tree, tmp_path, fork, whole, capfd, name):
    """12 workers of each command that has some, killed by three signals at random moments."""
    rng = random.Random(name)
    found = []
    while len(found) < 12:
        number = AS_THE_SYSTEM_DOES[len(found) % 3]
        delay = rng.uniform(0, whole(name).seconds)
        loss = worker_killed_and_resumed(
            tree, tmp_path / "case", name, fork, whole, number, delay, rng
        )
        if loss.refused:
            found.append(loss)
    equal = sum(loss.equal for loss in found)
    slowest = max(loss.seconds for loss in found)
    with capfd.disabled():
        print(
            f"\n{name}, workers killed: {len(found)}, refused in one line within {slowest:.1f} s, "
            f"resumed equal: {equal}"
        )
    assert equal == len(found)


# ---- disks --------------------------------------------------------------------------------------


@contextmanager
def mounted(folder, *options):
    """A mount on a folder, for as long as it is used; skips the test if this process may not."""
    folder.mkdir(exist_ok=True)
    ran = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"may not mount here: {ran.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(cli, case, whole, name):
    """Half of the room that is needed: refused, and what was written is whole.

    With more room the run goes on to the same result.
    """
    expected = whole(name)
    out = case / f"out_{name}"
    size = max(4096, expected.room // 2)
    with mounted(out, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        if expected.room < 8192:
            (out / ".filler").write_bytes(bytes(4096))
        assert run(cli, name) == "refused"
        assert results(out).keys() <= expected.results.keys()  # all of it can be read
        assert not [path for path in out.rglob(".*") if path.name != ".filler"]

        (out / ".filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        assert run(cli, name, resume=True) == "read"
        assert results(out) == expected.results


@pytest.mark.parametrize("name", ["npz", "train", "visualize"])
def test_a_limit_of_the_size_of_files(cli, case, whole, name):
    """The same for any user: no file may grow above 8 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert run(cli, name) == "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run(cli, name, resume=True) == "read"
    assert results(case / f"out_{name}") == whole(name).results


@pytest.mark.parametrize("name", [*RESUMED, "spair"])
def test_a_data_set_that_cannot_be_written(cli, case, whole, tmp_path, name):
    expected = whole(name).results
    with mounted(case, "--bind", case):
        subprocess.run(["mount", "-o", "remount,ro,bind", case], check=True)
        os.chdir(case)  # the mount hides the folder we are in
        with pytest.raises(OSError, match="Read-only"):
            (case / "photos/new").touch()
        assert run(cli, name, out=tmp_path / "out") == "read"
        os.chdir(tmp_path)
    assert results(tmp_path / "out") == expected


@pytest.mark.parametrize("name", [*RESUMED, "cached"])
def test_two_processes_in_one_folder(case, fork, whole, name):
    """Both do their work, or the later one is refused; the result is that of one alone."""
    first = fork(name)
    second = fork(name)
    try:
        verdicts = [first.wait(), second.wait()]
    finally:
        first.process.kill()
        second.process.kill()
    assert "read" in verdicts
    assert results(case / f"out_{name}") == whole(name).results


# ---- memory and precision -----------------------------------------------------------------------


def png_chunk(kind, data):
    """One chunk of a PNG file."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def write_huge(path, side):
    """A grey PNG of side x side pixels, all black: small on the disk."""
    path.unlink()
    row = bytes(1 + (side + 7) // 8)
    compressor = zlib.compressobj(1)
    data = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


# a photo that each command reads
HUGE = {
    "extractor": "photos/0.jpg",
    "npz": "photos/1.png",
    "spair": "spair/JPEGImages/cat/0.jpg",
    "davis": "davis/JPEGImages/480p/a/00001.jpg",
    "score": "masks/a/00001.png",
    "voc": "voc/VOCdevkit/VOC2012/JPEGImages/0.jpg",
    "coco": "coco/COCO/images/train2014/0.jpg",
    "maps": "maps/0.png",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_photo_of_20000_pixels_a_side_under_a_memory_limit(case, fork, name):
    write_huge(case / HUGE[name], 20000)
    process = fork(name, memory=2**30)
    assert process.wait() == "refused"
    err = process.log()[1]
    assert HUGE[name] in err
    assert "decompression bomb" in err


@pytest.mark.parametrize("name", ["folder", "train"])
def test_a_huge_photo_among_others_is_named_and_left_out(case, fork, name):
    write_huge(case / "photos/1.png", 20000)
    process = fork(name, memory=2**30)
    assert process.wait() == "read"
    assert "photos/1.png" in "".join(process.log())


def test_a_photo_that_memory_does_not_hold(case, fork):
    write_huge(case / "photos/1.png", 13000)
    process = fork("npz", memory=2**28)
    assert process.wait() == "refused"
    err = process.log()[1]
    assert "photos/1.png" in err
    assert "out of memory" in err


def test_features_that_memory_does_not_hold(case, fork):
    process = fork("extractor", memory=2**25, more="--load_size 1280")
    assert process.wait() == "refused"
    assert "out of memory" in process.log()[1]


@pytest.mark.parametrize("name", FEATURES)
def test_a_precision_that_the_device_lacks(cli, case, monkeypatch, name):
    def ones(*shape, dtype=None, **kwargs):
        if dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return torch.full(shape, 1, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones)
    assert run(cli, name, "cpu cannot compute in float16", more="--dtype float16") == "refused"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["folder", "train", "spair", "davis", "voc", "visualize"])
def test_every_precision(cli, case, name, dtype):
    assert run(cli, name, more=f"--dtype {dtype}") == "read"


def test_a_device_that_is_not_there(cli, case):
    for device in ("cuda:7", "mps", "nonsense", "meta"):
        assert run(cli, "extractor", more=f"--device {device}") == "refused"


# ---- NaN and constant images --------------------------------------------------------------------


def replace_photos(root, image):
    """Replace all photos, not masks, by `image(size)`, a PIL image, whatever their suffix."""
    for path in [*root.rglob("*.jpg"), *root.glob("photos/*.png")]:
        size = Image.open(path).size
        path.unlink()
        picture = image(size)
        kind = "PNG"
        if picture.mode == "F":
            kind = "TIFF"
        picture.save(path, kind)


def nan_pixels(size):
    """A photo in floating point, every third row of which is NaN."""
    width, height = size
    values = np.random.RandomState(0).rand(height, width).astype(np.float32) * 255
    values[::3] = np.nan
    return Image.fromarray(values)


def black(size):
    """A black photo."""
    return Image.new("RGB", size)


def check_finite(path):
    """Assert that a file holds no NaN and no infinity, if it is one of tensors or of JSON."""
    if path.suffix == ".pth":
        check_all_finite(torch.load(path))
    elif path.suffix == ".npz":
        check_all_finite(torch.from_numpy(np.load(path)["map"]))
    elif path.suffix == ".safetensors":
        check_all_finite(load_file(path))
    elif path.suffix in (".json", ".jsonl"):
        for line in path.read_text().splitlines():
            assert "NaN" not in line and "Infinity" not in line, path


def check_all_finite(value):
    """The same for tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        assert value.isfinite().all()
    elif isinstance(value, dict):
        check_all_finite(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            check_all_finite(item)


@pytest.mark.parametrize("picture", [black, nan_pixels])
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_constant_images_and_nan_pixels(cli, case, name, picture):
    replace_photos(case, picture)
    assert run(cli, name) == "read"
    for path in (case / f"out_{name}").rglob("*"):
        check_finite(path)


NAN = []
for command_name in FEATURES:
    NAN.append((command_name, "backbone"))
    if "lift.pth" in COMMANDS[command_name].flags:
        NAN.append((command_name, "lift.pth"))


@pytest.mark.parametrize(("name", "where"), NAN)
def test_nan_features(cli, case, name, where):
    """Weights that hold NaN make no result that looks like one."""
    key = "outc.bias"
    if where == "backbone":
        key = "blocks.2.norm1.bias"
    state = torch.load(case / where)
    state[key][:5] = float("nan")
    (case / where).unlink()
    torch.save(state, case / where)
    assert run(cli, name) == "refused"
