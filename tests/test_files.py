"""files.py: files that are whole or not there, tensors read safely, one rule for results."""

import os
import pickle
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from files import (
    Results,
    difference,
    first_line,
    inside,
    load_tensors,
    replacing,
    save_tensors,
    weights_digest,
    write_text,
)

# ---- messages -----------------------------------------------------------------------------------


def test_first_line_is_not_cut_inside_a_word():
    assert first_line("one\ntwo") == "one"
    assert first_line(KeyError()) == "KeyError"
    words = "word " * 100
    shortened = first_line(words)
    assert len(shortened) <= 150
    assert set(shortened.split()) == {"word", "..."}


# ---- files --------------------------------------------------------------------------------------


def test_names_that_leave_a_folder_are_refused():
    assert inside("data", "a/b.jpg").parts == ("data", "a", "b.jpg")
    for name in ("../x.jpg", "a/../../x.jpg", "/etc/passwd"):
        with pytest.raises(ValueError, match="leaves the folder"):
            inside("data", name)


def test_replacing_keeps_what_was_there(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")

    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"cannot write .*x.txt \(.*No space.*\): free some space"):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise full
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]

    with pytest.raises(OSError, match="cannot write"), replacing(path / "below" / "a file"):
        pass


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("encoder zip not available")])
def test_only_the_systems_errors_are_about_the_disk(tmp_path, error):
    with pytest.raises(type(error), match=r"^(boom|encoder zip not available)$"):
        with replacing(tmp_path / "x.txt") as temporary:
            temporary.write_text("half")
            raise error
    assert not list(tmp_path.iterdir())


def test_devices_stay_devices_and_links_links(tmp_path):
    write_text(os.devnull, "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "through"


def test_new_files_are_as_private_as_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_tensors_come_back(tmp_path):
    tensors = {"a": torch.arange(3)}
    save_tensors(tmp_path / "x.pth", tensors)
    assert torch.equal(load_tensors(tmp_path / "x.pth", "", "")["a"], tensors["a"])
    with pytest.raises(FileNotFoundError, match=r"there are no weights at .*: look again"):
        load_tensors(tmp_path / "none.pth", "look again", "")


class Settings:
    """A class of somebody's training."""

    def __init__(self):
        self.lr = 0.1


class Bomb:
    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


def test_classes_beside_tensors_are_never_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "model": {"a": torch.arange(3)},
        "best": np.float64(0.5),
        "path": tmp_path,
        "config": Settings(),
        "harmless here": Bomb(subprocess.getoutput, "touch executed"),
    }
    torch.save(content, "x.pth")
    loaded = load_tensors("x.pth", "", "")
    assert torch.equal(loaded["model"]["a"], content["model"]["a"])
    assert {type(loaded[name]).__name__ for name in content if name != "model"} == {"Foreign"}

    whole = torch.nn.Linear(2, 2)
    for bomb in (Bomb(os.system, "touch executed"), Bomb(eval, "open('executed', 'w')"), whole):
        torch.save({"model": bomb}, "x.pth")
        with pytest.raises(ValueError, match="holds more than tensors"):
            load_tensors("x.pth", "", "")
    assert not Path("executed").exists()


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in stored.namelist():
                packed.writestr(name, stored.read(name))
    assert (tmp_path / "packed.pth").stat().st_size < 40_000
    load_tensors(tmp_path / "stored.pth", "", "")
    with pytest.raises(ValueError, match=r"bytes that unpack to 4000.*: pass another"):
        load_tensors(tmp_path / "packed.pth", "", "pass another")


def test_messages_do_not_tell_torchs_history(tmp_path):
    with open(tmp_path / "x.pth", "wb") as file:
        pickle.dump(print, file)
    message = "damaged or holds more than tensors: pass another"
    with pytest.raises(ValueError, match=message) as found:
        load_tensors(tmp_path / "x.pth", "", "pass another")
    assert "PyTorch" not in str(found.value)


def test_digest_follows_names_and_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    before = weights_digest(layer)
    assert weights_digest(layer) == before
    assert weights_digest(torch.nn.Sequential(layer)) != before
    layer.bias.data[0] += 1
    assert weights_digest(layer) != before
    assert len(weights_digest(layer.bfloat16())) == 16


# ---- one rule for results -----------------------------------------------------------------------


def fill(folder, names, settings, **options):
    """What every script does: keep what is there, write the rest; returns what was written."""
    results = Results(folder, settings, own=("*.txt",), **options)
    written = []
    for name in names:
        if results.has(name):
            continue
        with results.writing(name) as path:
            path.write_text(f"{settings} {name}")
        written.append(name)
    return written


def test_a_second_run_keeps_what_is_there(tmp_path):
    settings = {"lift_iter": 1, "size": (2, 3)}
    assert fill(tmp_path / "x", ["a.txt", "b/c.txt"], settings) == ["a.txt", "b/c.txt"]
    assert fill(tmp_path / "x", ["a.txt", "b/c.txt", "d.txt"], settings) == ["d.txt"]
    assert sorted(path.name for path in (tmp_path / "x").rglob("*.*")) == [
        "a.txt", "c.txt", "d.txt", "settings.json",
    ]  # fmt: skip


def test_other_settings_are_refused_and_overwrite_empties_the_folder(tmp_path):
    fill(tmp_path, ["a.txt", "b.txt"], {"lift_iter": 1})
    (tmp_path / "notes.md").write_text("somebody's own")
    with pytest.raises(ValueError, match=r"was made with lift_iter 1, not 2: pass --overwrite"):
        fill(tmp_path, ["a.txt"], {"lift_iter": 2})
    assert fill(tmp_path, ["a.txt"], {"lift_iter": 2}, overwrite=True) == ["a.txt"]
    # b.txt would else stand under settings that did not make it
    assert not (tmp_path / "b.txt").exists()
    assert (tmp_path / "notes.md").exists()
    assert fill(tmp_path, ["a.txt"], {"lift_iter": 2}) == []


def test_files_that_nobody_knows_are_neither_kept_nor_removed(tmp_path):
    (tmp_path / "a.txt").write_text("whose?")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"a.txt is there, and no settings.json says what"):
            fill(tmp_path, ["a.txt"], {}, overwrite=overwrite)
    assert (tmp_path / "a.txt").read_text() == "whose?"


@pytest.mark.parametrize("content", ["{", "[1]", "3", ""])
def test_damaged_settings_are_told(tmp_path, content):
    fill(tmp_path, ["a.txt"], {"lift_iter": 1})
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json is damaged .*: pass --overwrite"):
        fill(tmp_path, ["a.txt"], {"lift_iter": 1})
    assert fill(tmp_path, ["a.txt"], {"lift_iter": 1}, overwrite=True) == ["a.txt"]
    assert fill(tmp_path, ["a.txt"], {"lift_iter": 1}) == []


def test_a_run_that_came_to_nothing_does_not_keep_the_folder(tmp_path):
    fill(tmp_path, [], {"lift_iter": 1})
    assert fill(tmp_path, ["a.txt"], {"lift_iter": 2}) == ["a.txt"]


KILLED = """
import sys, time
from files import Results
results = Results(sys.argv[1], {"n": 1}, own=("*.txt",))
for number in range(3):
    with results.writing(f"{number}.txt") as path:
        path.write_text("first half, ")
        if number == 2:
            print("now", flush=True)
            time.sleep(60)
        path.write_text("first half, second half")
"""


def test_a_kill_loses_the_file_being_written_and_no_other(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    assert sorted(path.name for path in tmp_path.glob("[!.]*.txt")) == ["0.txt", "1.txt"]
    results = Results(tmp_path, {"n": 1}, own=("*.txt",))
    assert [results.has(f"{number}.txt") for number in range(3)] == [True, True, False]


def test_names_do_not_leave_the_folder(tmp_path):
    results = Results(tmp_path / "x", {})
    with pytest.raises(ValueError, match="leaves the folder"):
        with results.writing("../a.pth"):
            pass


def test_difference_names_one_setting_and_digests_last():
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "b None, not 2"
    with_names = {"digest": "1", "upsample": "none"}
    assert difference(with_names, {"digest": "2", "upsample": "lift"}) == "upsample none, not lift"
    assert difference({"digest": "12"}, {"digest": "34"}) == "digest 12, not 34"
