"""command.py: flags, one-line errors, memory, settings, and what a script says."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from command import (
    Command,
    add_backbone_args,
    add_lift_args,
    check_range,
    check_torchrun,
    container_limit,
    deciding,
    free_memory,
    is_out_of_memory,
    out_of_memory,
    progress,
    report,
    settings,
    why_skipped,
)
from files import difference

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
    what = "there are no images at none.jpg, which does not exist"
    remedy = "pass an image, a folder of images or a quoted pattern"
    assert lines[0] == f"lift_extractor.py: {what}: {remedy}"
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
    assert capsys.readouterr().err.count("use smaller images or batches") == 2
    with pytest.raises(RuntimeError, match="a bug"):
        run(raising(RuntimeError("a bug")))


def test_the_rest_of_an_error_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("LIFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such thing"):
        run(raising(ValueError("no such thing")))


def test_interruption_has_its_own_status(capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


TERMINATED = """
import sys, time
from pathlib import Path
from command import Command
from files import replacing

def main(args):
    with replacing(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("now", flush=True)
        time.sleep(60)

Command("").run(main, [])
"""


def test_sigterm_leaves_no_temporary_file(tmp_path):
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "x.txt")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_ranges():
    args = argparse.Namespace(imsize=8, limit=None)
    check_range(args, imsize=8, limit=1)
    with pytest.raises(ValueError, match="--imsize 8 is too small: pass 9 or more"):
        check_range(args, imsize=9)


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
        ": this script runs as one process: start it with python, not torchrun\n"
    )


# ---- what made a result -------------------------------------------------------------------------


def test_settings_name_flags_what_was_resolved_and_versions():
    args = argparse.Namespace(layer=None, output=ROOT)
    found = settings(args, layer=11)
    assert found["layer"] == 11
    assert found["output"] == str(ROOT)
    assert found["versions"]["torch"] == torch.__version__
    json.dumps(found)


def test_what_decides_a_result_knows_paths_and_weights_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    flags = {"lift_path": "a.pth", "device": "cpu", "workers": 3, "imsize": 224, "json": "-"}
    one = argparse.Namespace(dataroot="photos", **flags)
    other = argparse.Namespace(dataroot=str(tmp_path / "photos"), **{**flags, "lift_path": "b.pth"})

    def decides(args, digest):
        return deciding(args, leave_out=["workers"], paths=["dataroot"], digest=digest)

    assert decides(one, "12") == decides(other, "12")
    assert difference(decides(one, "12"), decides(one, "34")) == "digest 12, not 34"
    assert decides(one, "12").keys() == {"dataroot", "imsize", "digest"}


# ---- what a script says -------------------------------------------------------------------------


def test_report_is_strict_json_and_nothing_unless_asked_for(tmp_path, capsys):
    results = {"a": float("nan"), "b": (1, 2.5)}
    report(argparse.Namespace(json=None), results)
    assert capsys.readouterr().out == ""
    report(argparse.Namespace(json=str(tmp_path / "x.json")), results)
    assert capsys.readouterr().out == ""
    report(argparse.Namespace(json="-"), results)
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": [1, 2.5]}
    assert (tmp_path / "x.json").read_text() == out


def test_json_into_a_folder_is_refused_before_the_work(tmp_path, capsys):
    assert run(raising(AssertionError("the work began")), ["--json", str(tmp_path)]) == 2
    assert "is a folder: pass a file" in capsys.readouterr().err


def test_flags_cannot_be_abbreviated_but_model_is_an_alias(capsys):
    command = Command("")
    add_backbone_args(command)
    add_lift_args(command)
    assert command.parse_args(["--model", "vit_x"]).model_type == "vit_x"
    with pytest.raises(SystemExit):
        command.parse_args(["--model_t", "vit_x"])
    assert "--model_t" in capsys.readouterr().err


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    assert list(progress(range(3), unit="photo", desc="reading")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # it took less than a minute

    minutes = [0.0]
    monkeypatch.setattr("command.time.monotonic", lambda: 60 * minutes[0])
    with progress(total=6, unit="photo", desc="reading") as bar:
        for _ in range(6):
            minutes[0] += 0.5
            bar.update()
            bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "reading" in lines[0]
    assert "2/6" in lines[0]
    assert "6/6" in lines[2]


# ---- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "LOCAL_RANK"])
def test_half_a_torchrun_is_refused(monkeypatch, missing):
    for name in ("MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_torchrun()
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is 2, but {missing} is not set"):
        check_torchrun()


# ---- memory -------------------------------------------------------------------------------------

TOO_MUCH = """
import resource, sys
import torch, numpy
from command import free_memory, is_out_of_memory, limit_memory
limit_memory()
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
assert 0 < soft <= 1.1 * free_memory()
for allocate in (torch.zeros, numpy.ones):
    try:
        allocate(int(free_memory()) // 4)
    except Exception as error:
        assert is_out_of_memory(error), repr(error)
    else:
        raise SystemExit("more than all memory was given")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
def test_more_memory_than_there_is_fails_with_an_error():
    """In a process of its own: the limit holds until the end."""
    ran = subprocess.run(
        [sys.executable, "-c", TOO_MUCH], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout


def test_a_container_has_its_own_limit(monkeypatch):
    """Of the groups a process is in, each has a limit or none."""
    tree = {
        "/proc/self/cgroup": "12:cpu,memory:/docker/abc\n0::/user.slice/job\n1:name=x:/\n",
        "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "4000\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9000\n",
        "/sys/fs/cgroup/user.slice/job/memory.max": "max\n",
        "/sys/fs/cgroup/user.slice/memory.max": "5000\n",
    }

    def read_text(path):
        try:
            return tree[str(path)]
        except KeyError:
            raise FileNotFoundError(str(path)) from None

    monkeypatch.setattr("command.Path.read_text", read_text)
    assert container_limit() == 4000
    tree["/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes"] = "8000\n"
    assert container_limit() == 5000  # of the outer of two groups
    assert free_memory() == float("inf")  # /proc/meminfo is not there


def test_errors_of_memory_are_known_on_every_device():
    for text in (
        "CUDA out of memory. Tried to allocate 2 GiB",
        "MPS backend out of memory",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert out_of_memory(MemoryError()).endswith("use smaller images or batches")
    asked = RuntimeError("can't allocate memory: you tried to allocate 4096 bytes. Error code 12")
    assert out_of_memory(asked).startswith("out of memory (it asked for 4096 bytes): ")


def test_what_is_skipped_is_bad_input_or_too_large_and_a_bug_is_neither():
    assert why_skipped(ValueError("a strip")) == "a strip"
    assert why_skipped(MemoryError()).startswith("out of memory")
    with pytest.raises(RuntimeError, match="a bug"):
        why_skipped(RuntimeError("a bug"))
