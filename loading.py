"""Items of a data set, read by worker processes: the one way in which all scripts load photos.

    loader = Loader(photos, workers=4)                           # single items, in their order
    loader = Loader(photos, workers=4, batches=keys_of_batches)  # collated batches
    for item in loader: ...

Whatever happens in a worker (an exception, a kill by the system) ends the loop at once, with a
ValueError that names the cause and the remedy. torch's DataLoader may then wait for ever, and so
may ProcessPoolExecutor: its workers share one pipe, which stays open if one of them is killed in
the middle of an item. Here each worker has its own. Nothing goes through /dev/shm, which is small
in containers.
"""

import copyreg
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from command import is_out_of_memory, out_of_memory
from files import first_line

FEWER = "pass fewer --workers, or --workers 0"
AHEAD = 2  # items for each worker that are asked for before they are needed


class Loader:
    """Items or batches of a data set, in order. It can be iterated again, but not twice at once.

    Args:
        dataset: anything with [key] and len().
        workers: processes that read. They start with the first iteration and live as long as the
            Loader does. 0 reads in this process.
        batches: lists of keys; each becomes one collated batch. None gives the single items 0, 1,
            2, ... as they are.
        pin_memory: put items, which are dicts of tensors, into pinned memory, from which a GPU
            fetches them by itself.
    """

    def __init__(
        self,
        dataset: Dataset,
        workers: int,
        batches: Iterable[Any] | None = None,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.workers = workers
        self.batches = batches
        self.pin_memory = pin_memory
        self.running: list[Worker] = []
        # when the Loader goes, or this process ends: before multiprocessing waits for the workers
        Finalize(self, kill, args=(self.running,), exitpriority=1)

    def __len__(self) -> int:
        keys: Any = self.dataset if self.batches is None else self.batches
        return len(keys)

    def __iter__(self) -> Iterator[Any]:
        """Raises ValueError: something happened in a worker."""
        batched = self.batches is not None
        keys: Any = self.batches if batched else range(len(self))
        if self.workers == 0:
            for key in keys:
                yield self.pinned(fetch(self.dataset, key, batched))
            return

        try:
            while len(self.running) < self.workers:
                self.running.append(Worker(self.dataset, batched))
        except OSError as error:
            self.stop()
            raise ValueError(f"a worker cannot be started ({error}): {FEWER}") from error
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.running:
            idle.put(worker)
        asked: deque[Future] = deque()  # in the order of the keys
        # for each worker a thread that waits for its answer
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                for key in keys:
                    asked.append(threads.submit(self.ask, idle, key))
                    if len(asked) > AHEAD * self.workers:
                        yield asked.popleft().result()
                while asked:
                    yield asked.popleft().result()
            except BaseException:
                self.stop()  # or the threads would wait for answers that nobody wants
                raise

    def ask(self, idle: SimpleQueue, key: Any) -> Any:
        """The item of a key from an idle worker; ValueError if it tells of an error, or dies."""
        worker = idle.get()
        try:
            worker.pipe.send(key)
            item, error = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError) as lost:
            worker.process.join()
            raise ValueError(why_lost(worker.process.exitcode)) from lost
        finally:
            idle.put(worker)
        if error:
            raise ValueError(error)
        return self.pinned(item)

    def pinned(self, item: Any) -> Any:
        """An item, in pinned memory if that is asked for."""
        if not self.pin_memory:
            return item
        return {name: tensor.pin_memory() for name, tensor in item.items()}

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        kill(self.running)


class Worker:
    """A process that reads items, and this process's end of the pipe to it."""

    def __init__(self, dataset: Dataset, batched: bool):
        self.pipe, theirs = multiprocessing.Pipe()
        arguments = (dataset, batched, theirs)
        self.process = multiprocessing.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the worker dies


def kill(workers: list[Worker]) -> None:
    """End the workers of a list, and empty it."""
    for worker in workers:
        worker.process.kill()  # they only read, so nothing is left half done
    for worker in workers:
        worker.process.join()
    workers.clear()


def why_lost(status: int) -> str:
    """What to tell of a worker that ended, in one line."""
    end = f"ended with status {status}"
    if status == -signal.SIGKILL:
        end = "was killed, as the system does where memory runs out"
    elif status < 0:
        end = f"was killed by {signal.Signals(-status).name}"
    return f"a worker {end}: {FEWER}"


# ---- in a worker --------------------------------------------------------------------------------


def work(dataset: Dataset, batched: bool, pipe: Connection) -> None:
    """What a worker does: read the items of the keys that come, until it is killed.

    Ctrl-C and SIGTERM often reach every process of a group. They are meant for the main one. It
    may need its workers until a step of training is done, and ends them afterwards.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the cores, and OpenMP may hang after a fork
    copyreg.pickle(torch.Tensor, as_array)  # half of the time that tensors take by themselves
    with suppress(EOFError, OSError):  # the main process has died
        while True:
            key = pipe.recv()
            try:
                # as bytes: a pipe's own pickles put tensors into /dev/shm, which may be full
                answer = pickle.dumps((fetch(dataset, key, batched), ""))
            except Exception as error:
                answer = pickle.dumps((None, explain(error)))
            pipe.send_bytes(answer)


def explain(error: Exception) -> str:
    """What to tell of an exception in a worker, in one line."""
    if is_out_of_memory(error):
        return f"{out_of_memory(error)}, or pass fewer --workers"
    if isinstance(error, ValueError | OSError) and str(error):  # meant for the user
        return str(error)
    what = f"{type(error).__name__} in a worker ({first_line(error)})"
    return f"{what}: pass --workers 0 to see where"


def as_array(tensor: torch.Tensor) -> tuple:
    """How pickle stores a tensor: as an array, from which it is made again."""
    return torch.from_numpy, (tensor.numpy(),)


def end_with_parent() -> None:
    """Wait until the main process has ended, and end this one at once."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def fetch(dataset: Dataset, key: Any, batched: bool) -> Any:
    """The item of a key, or the collated batch of a list of keys."""
    if not batched:
        return dataset[key]
    return default_collate([dataset[one] for one in key])
