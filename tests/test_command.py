"""command.py: one-line errors, what made a result, and files that are whole or not there."""

import argparse
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

from command import (
    Command,
    add_backbone_args,
    check_memory,
    check_range,
    claim_folder,
    difference,
    first_line,
    inside,
    load_tensors,
    record,
    replacing,
    report,
    save_tensors,
    settings,
    weights_digest,
    write_text,
)

# ---- command lines ------------------------------------------------------------------------------

# one process for all of them: each would import torch, timm and scipy
PROGRAMS = """
import json, runpy, sys

for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        print(command[0], stop.code)
"""


def test_scripts_as_programs_say_in_one_line_what_is_wrong(tmp_path):
    flags = {
        "lift_extractor.py": ["--image_path", "none.jpg", "--output_path", "x.pth"],
        "eval_spair.py": ["--dataroot", "none"],
        "eval_tokencut.py": ["--dataroot", "none", "--dataset", "VOC12"],
        "eval_visualize_feats.py": ["--dataroot", "none"],
    }
    commands = [[str(ROOT / script), *flags[script]] for script in flags]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAMS, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{command[0]} 2" for command in commands]

    lines = ran.stderr.splitlines()
    assert len(lines) == len(flags), ran.stderr
    for script, line in zip(flags, lines):
        assert line.startswith(f"{script}: ") and "none" in line
    remedy = "pass an image, a folder of images or a quoted pattern"
    assert lines[0] == f"lift_extractor.py: no images at none.jpg: {remedy}"
    assert lines[2].endswith("correct --dataroot")
    assert not list(tmp_path.iterdir())


def run(main, argv=()):
    """Run a command line whose work is `main`; returns its exit status."""
    command = Command("What it does.")
    add_backbone_args(command)
    try:
        command.run(main, list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def raising(error):
    """A main that raises this."""

    def main(args):
        raise error

    return main


def test_bad_input_is_one_line_and_status_2(capsys):
    assert run(raising(ValueError("no such\nthing: pass another"))) == 2
    err = capsys.readouterr().err
    assert err.endswith(": no such thing: pass another\n")
    assert err.count("\n") == 1


def test_memory_that_ran_out_is_bad_input_too_and_a_bug_is_not(capsys):
    assert run(raising(RuntimeError("CUDA out of memory. Tried to allocate"))) == 2
    assert run(raising(MemoryError())) == 2
    assert capsys.readouterr().err.count("pass smaller images or batches") == 2
    with pytest.raises(RuntimeError, match="a bug"):
        run(raising(RuntimeError("a bug")))


def test_the_rest_of_an_error_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("LIFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such thing"):
        run(raising(ValueError("no such thing")))


def test_interruption_has_its_own_status(capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_first_line_is_not_cut_inside_a_word():
    assert first_line("one\ntwo") == "one"
    assert first_line(KeyError()) == "KeyError"
    words = "word " * 100
    shortened = first_line(words)
    assert len(shortened) <= 150
    assert set(shortened.split()) == {"word", "..."}


def test_ranges():
    args = argparse.Namespace(imsize=8, limit=None)
    check_range(args, imsize=8, limit=1)
    with pytest.raises(ValueError, match="--imsize 8 is too small: pass 9 or more"):
        check_range(args, imsize=9)


def test_memory_is_checked_where_it_is_main_memory():
    much = 2**60
    for device in ("cpu", "mps"):
        with pytest.raises(ValueError, match=r"maps take .* GB, .*: pass less"):
            check_memory(much, "maps", "pass less", device)
    check_memory(much, "maps", "pass less", "cuda:1")
    check_memory(1, "maps", "pass less")


@pytest.mark.parametrize(
    "script, flags",
    [
        ("eval_davis", ["--dataroot", "nowhere"]),
        ("eval_spair", ["--dataroot", "nowhere"]),
        ("eval_tokencut", ["--dataroot", "nowhere"]),
        ("eval_visualize_feats", ["--dataroot", "nowhere"]),
        ("export_onnx", ["--output", "x.onnx"]),
    ],
)
def test_several_processes_are_refused_by_what_one_does(cli, monkeypatch, script, flags):
    """Each would do all the work, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ran = cli(script, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith(
        ": this is the work of one process: start it with python, not torchrun\n"
    )


# ---- what made a result -------------------------------------------------------------------------


def test_settings_name_flags_what_was_resolved_and_versions():
    args = argparse.Namespace(layer=None, output=ROOT)
    found = settings(args, layer=11)
    assert found["layer"] == 11
    assert found["output"] == str(ROOT)
    assert found["versions"]["torch"] == torch.__version__
    json.dumps(found)


def test_a_record_knows_paths_and_weights_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    flags = {"lift_path": "a.pth", "device": "cpu", "workers": 3, "imsize": 224}
    one = argparse.Namespace(dataroot="photos", **flags)
    other = argparse.Namespace(dataroot=str(tmp_path / "photos"), **{**flags, "lift_path": "b.pth"})

    def recorded(args, digest):
        return record(args, leave_out=["workers"], paths=["dataroot"], digest=digest)

    assert recorded(one, "12") == recorded(other, "12")
    assert difference(recorded(one, "12"), recorded(other, "12")) == ""
    assert difference(recorded(one, "12"), recorded(one, "34")) == "digest 12, not 34"
    assert "workers" not in recorded(one, "12")
    with_names = {"digest": "1", "upsample": "none"}
    assert difference(with_names, {"digest": "2", "upsample": "lift"}) == "upsample none, not lift"


def test_a_folder_belongs_to_what_made_it(tmp_path):
    claim_folder(tmp_path / "x", {"lift_iter": 1, "size": (2, 3)}, "pass --overwrite")
    claim_folder(tmp_path / "x", {"lift_iter": 1, "size": (2, 3)}, "pass --overwrite")
    with pytest.raises(ValueError, match=r"was made with lift_iter 1, not 2: pass --overwrite"):
        claim_folder(tmp_path / "x", {"lift_iter": 2, "size": (2, 3)}, "pass --overwrite")
    claim_folder(tmp_path / "x", {"lift_iter": 2}, "pass --overwrite", renew=True)
    claim_folder(tmp_path / "x", {"lift_iter": 2}, "pass --overwrite")
    for damaged in ("{", "[1]", "3"):
        (tmp_path / "x" / "record.json").write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            claim_folder(tmp_path / "x", {"lift_iter": 2}, "pass --overwrite")


def test_digest_follows_names_and_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    before = weights_digest(layer)
    assert weights_digest(layer) == before
    assert weights_digest(torch.nn.Sequential(layer)) != before
    layer.bias.data[0] += 1
    assert weights_digest(layer) != before
    assert len(weights_digest(layer.bfloat16())) == 16


def test_report_is_strict_json(tmp_path, capsys):
    report({"a": float("nan"), "b": (1, 2.5)}, tmp_path / "x.json")
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [1, 2.5]}
    assert (tmp_path / "x.json").read_text() == out


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
    with pytest.raises(FileNotFoundError, match=r"no weights at .*: look again"):
        load_tensors(tmp_path / "none.pth", "look again", "")


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
