"""loading.py: items in order, and an end at once whatever happens in a worker."""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from loading import Loader


class Numbers:
    """Items of each kind of container; `fault` happens at item 5, where there is one."""

    def __init__(self, fault=None, length=20):
        self.fault = fault
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        if key == 5 and self.fault:
            self.fault()
        return {"pixels": torch.full((3, 4), key), "none": torch.zeros(0)}, str(key), [key]


def worker_pids(loader):
    return [worker.process.pid for worker in loader.running]


def is_alive(pid):
    """Whether a process runs; an orphan that nobody has waited for yet does not."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


# ---- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_and_again(workers):
    loader = Loader(Numbers(), workers)
    assert len(loader) == 20
    for _ in range(2):
        items = list(loader)
        assert [name for _, name, _ in items] == [str(key) for key in range(20)]
        for key, (tensors, _, _) in enumerate(items):
            assert torch.equal(tensors["pixels"], torch.full((3, 4), key))
            assert tensors["none"].shape == (0,)
            tensors["pixels"] += 1  # its memory is its own
    loader.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_collated_as_torch_does(workers):
    keys = [[3, 1], [4, 0], [9]]
    loader = Loader(Numbers(), workers, keys)
    assert len(loader) == 3
    found = list(loader)
    assert [tensors["pixels"][:, 0, 0].tolist() for tensors, _, _ in found] == keys
    assert [numbers[0].tolist() for _, _, numbers in found] == keys
    loader.stop()


def test_workers_live_through_iterations_but_not_a_broken_one():
    loader = Loader(Numbers(), 2)
    list(loader)
    pids = worker_pids(loader)
    list(loader)
    assert worker_pids(loader) == pids
    for _ in loader:
        break
    assert not any(is_alive(pid) for pid in pids)
    assert len(list(loader)) == 20, "new ones"
    loader.stop()


def test_workers_end_with_their_loader():
    loader = Loader(Numbers(), 2)
    list(loader)
    pids = worker_pids(loader)
    assert all(is_alive(pid) for pid in pids)
    del loader
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_memory(monkeypatch, workers):
    class Tensors(Numbers):
        def __getitem__(self, key):
            return {"pixels": torch.full((3,), key)}

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    items = list(Loader(Tensors(), workers, pin_memory=True))
    assert [int(item["pixels"][0]) for item in items] == list(range(100, 120))


def test_endless_batches_are_asked_for_as_needed():
    def batches():
        for number in range(10**9):
            yield [number % 20]

    loader = Loader(Numbers(), 2, batches())
    coming = iter(loader)
    assert [next(coming)[1] for _ in range(3)] == [("0",), ("1",), ("2",)]
    coming.close()
    assert loader.running == []


def test_a_loop_that_ends_early_waits_for_no_worker():
    loader = Loader(Numbers(lambda: time.sleep(1000)), 2)
    coming = iter(loader)
    began = time.monotonic()
    for _ in range(4):
        next(coming)
    coming.close()  # a thread waits for item 5, or will
    assert time.monotonic() - began < 20
    assert loader.running == []


# ---- what happens in a worker -------------------------------------------------------------------


def photos_vanish():
    raise ValueError("no photo can be read: replace or remove them")


def file_is_gone():
    Path("/none/photo.jpg").read_bytes()


def bug():
    return {}["pixels"]


def memory():
    raise MemoryError("Unable to allocate memory for 8 GB")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def crashed():
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def exits():
    os._exit(3)


FAULTS = {
    photos_vanish: "no photo can be read: replace or remove them",
    file_is_gone: "No such file or directory: '/none/photo.jpg'",
    bug: "KeyError in a worker ('pixels'): pass --workers 0",
    memory: "out of memory",
    killed: "a worker was killed, as the system does where memory runs out: pass fewer --workers",
    crashed: "a worker was killed by SIGSEGV: pass fewer --workers, or --workers 0",
    exits: "a worker ended with status 3: pass fewer --workers, or --workers 0",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_worker_ends_the_loop_with_one_line(fault):
    loader = Loader(Numbers(fault), 3)
    began = time.monotonic()
    items = iter(loader)
    next(items)
    pids = worker_pids(loader)
    with pytest.raises(ValueError) as raised:
        for _ in items:
            pass
    assert FAULTS[fault] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 20
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(ValueError):  # the loader starts new workers, and meets the same
        list(loader)


def test_a_worker_killed_from_outside_is_told():
    """As the system does it: while the others go on, and nothing is asked of it."""
    loader = Loader(Numbers(length=10**6), 3)
    with pytest.raises(ValueError, match="as the system does where memory runs out"):
        for number, _ in enumerate(loader):
            if number == 3:
                os.kill(worker_pids(loader)[1], signal.SIGKILL)
    assert loader.running == []


class Large:
    """Items of 4 MB, far more than a pipe holds."""

    def __len__(self):
        return 10**6

    def __getitem__(self, key):
        return torch.zeros(2**20)


def test_a_worker_killed_in_the_middle_of_an_item_is_told():
    for number in range(5):
        loader = Loader(Large(), 2)
        items = iter(loader)
        next(items)
        time.sleep(number * 0.005)
        os.kill(worker_pids(loader)[0], signal.SIGKILL)
        with pytest.raises(ValueError, match="as the system does where memory runs out"):
            for _ in items:
                pass


def test_memory_that_runs_out_in_the_main_process_is_told_as_such(monkeypatch):
    def loads(content):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(pickle, "loads", loads)
    with pytest.raises(RuntimeError, match="allocate memory"):
        list(Loader(Numbers(), 1))


def test_workers_that_cannot_start(monkeypatch):
    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ValueError, match=r"a worker cannot be started .*pass fewer --workers"):
        list(Loader(Numbers(), 2))


# ---- whole processes ----------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
import torch
from loading import Loader

class Slow:
    def __len__(self):
        return 10**6
    def __getitem__(self, key):
        if {stuck} and key >= 4:
            time.sleep(1000)
        return torch.zeros({numbers})

if __name__ == "__main__":
    # a shell's background job ignores it, and so would this process of a test
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loader = Loader(Slow(), 2)
    if {keep_term}:
        signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
    try:
        for number, _ in enumerate(loader):
            if number == 2:
                print(*[worker.process.pid for worker in loader.running], flush=True)
            if {keep_term} and number == {most}:
                break
    except ValueError as error:
        raise SystemExit(f"one line: {{error}}")
    print("complete", flush=True)
"""


class Started:
    """A process of SCRIPT in a group of its own, and the ids of its workers."""

    def __init__(self, tmp_path, prefix=(), **options):
        script = tmp_path / "script.py"
        values = {"stuck": 0, "numbers": 9, "keep_term": 0, "most": 10**3, **options}
        script.write_text(SCRIPT.format(**values))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        self.workers = [int(pid) for pid in self.process.stdout.readline().split()]

    def end(self):
        """(status, stdout, stderr), at the latest after 30 seconds; no worker may be left."""
        try:
            # a worker that lives keeps the pipes open
            out, err = self.process.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stuck_and_to_all", [0, 1])
def test_a_signal_ends_the_process_and_its_workers(tmp_path, number, stuck_and_to_all):
    """To the process alone, or to its whole group while its workers hang."""
    started = Started(tmp_path, stuck=stuck_and_to_all)
    assert len(started.workers) == 2
    if stuck_and_to_all and number != signal.SIGKILL:
        os.killpg(started.process.pid, number)
    else:
        started.process.send_signal(number)
    status, out, err = started.end()
    assert status == -number
    assert out == ""
    assert err.count("Traceback") == (number == signal.SIGINT), "the workers say nothing"


def test_sigterm_to_the_whole_group_lets_the_main_process_go_on(tmp_path):
    """So that training can save: it keeps the signal for the end of its step."""
    started = Started(tmp_path, keep_term=1)
    os.killpg(started.process.pid, signal.SIGTERM)
    status, out, err = started.end()
    assert (status, err) == (0, "")
    assert out.splitlines() == ["term", "complete"]


def test_workers_that_are_not_forked(tmp_path):
    """As on other systems, and in later Pythons: all that goes to a worker can be pickled."""
    script = tmp_path / "script.py"
    script.write_text(NOT_FORKED)
    ran = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stderr == ""
    assert ran.stdout == "3\nKeyError in a worker (3): pass --workers 0 to see where\n"


NOT_FORKED = """
import multiprocessing
import torch
from loading import Loader

class Few(dict):
    def __len__(self):
        return 4

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    few = Few({key: torch.zeros(1) for key in range(3)})
    read = 0
    try:
        for _ in Loader(few, 1):
            read += 1
    except ValueError as error:
        print(read)
        print(error)
"""


def small_shm(megabytes):
    """A command's prefix that gives it a small /dev/shm of its own, or a skip."""
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    prefix = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a tmpfs")
    return prefix


def test_a_full_shared_memory_is_not_needed(tmp_path):
    """Items of 16 MB; Docker gives containers 64 MB of /dev/shm, of which others take a part."""
    started = Started(tmp_path, small_shm(1), numbers=4 * 2**20, keep_term=1, most=20)
    status, out, err = started.end()
    assert (status, err) == (0, "")
    assert out == "complete\n"
