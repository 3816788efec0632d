"""Items of a data set, read by worker processes: the one way in which all scripts load photos.

    loader = Loader(photos, workers=4)                           # single items, in their order
    loader = Loader(photos, workers=4, batches=keys_of_batches)  # collated batches
    for item in loader: ...

Whatever happens in a worker (an exception, a full /dev/shm, a kill by the system) ends the loop
within seconds, with a ValueError that names the cause and the remedy. torch's DataLoader may wait
for ever, because its workers send their items from a thread whose errors nobody sees. Here a worker
moves its tensors into shared memory and sends them by itself.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import torch
import torch.multiprocessing  # teaches ForkingPickler to hand over tensors in shared memory
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from command import is_out_of_memory, out_of_memory
from files import first_line

AHEAD = 2  # items that each worker reads before they are needed
FEWER = "pass fewer --workers, or --workers 0"
SHM_IS_FULL = (
    "/dev/shm is full, and workers hand over photos through it: pass --workers 0, or give the "
    "container more of it (docker run --shm-size 8g)"
)


class Worker(NamedTuple):
    """A process that reads items, and this process's end of the pipe to it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


class Loader:
    """Items or batches of a data set, in order. It can be iterated again, but not twice at once.

    Args:
        dataset: anything with [key] and len().
        workers: processes that read. They start with the first iteration and live as long as the
            Loader does. 0 reads in this process.
        batches: lists of keys; each becomes one collated batch. None gives the single items 0, 1,
            2, ... as they are.
        pin_memory: put tensors into pinned memory, from which a GPU fetches them by itself.
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
        keys = self.batches
        if keys is None:
            keys = range(len(self))
        if self.workers > 0:
            self.start()
            items = self.from_workers(keys)
        else:
            items = (fetch(self.dataset, key, self.batches is not None) for key in keys)
        if self.pin_memory:
            # in a thread, as the copy takes a while
            pinned = (each_tensor(item, Tensor.pin_memory) for item in items)
            items = in_a_thread(pinned, self.stop)
        return items

    def from_workers(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The items of `keys`, in their order. The workers take turns."""
        asked: deque[Worker] = deque()  # whose answers are to come, in this order
        turns = itertools.cycle(self.running)
        complete = False
        try:
            for key in keys:
                worker = next(turns)
                with suppress(ConnectionError):  # it has died: `take` says why
                    worker.pipe.send(key)
                asked.append(worker)
                if len(asked) > AHEAD * self.workers:
                    yield self.take(asked.popleft())
            while asked:
                yield self.take(asked.popleft())
            complete = True
        finally:
            if not complete:  # answers that nobody wants are on their way
                self.stop()

    def take(self, worker: Worker) -> Any:
        """The next item of a worker; ValueError if it tells of an error, or has died."""
        try:
            item, error = worker.pipe.recv()
        except Exception as failure:
            raise ValueError(why_lost(worker, failure)) from failure
        if error:
            raise ValueError(error)
        if self.pin_memory:  # which copies
            return item
        return each_tensor(item, Tensor.clone)  # so that its shared memory is free again

    def start(self) -> None:
        """Start the workers, unless they are running; ValueError if the system does not let us."""
        if self.running:
            return
        try:
            for _ in range(self.workers):
                ours, theirs = multiprocessing.Pipe()
                arguments = (self.dataset, self.batches is not None, theirs)
                process = multiprocessing.Process(target=work, args=arguments, daemon=True)
                process.start()
                self.running.append(Worker(process, ours))
                theirs.close()  # so that a worker that dies closes the pipe
        except OSError as error:
            self.stop()
            raise ValueError(f"a worker cannot be started ({error}): {FEWER}") from error

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        kill(self.running)


def kill(workers: list[Worker]) -> None:
    """End the workers of a list, and empty it."""
    for worker in workers:
        worker.process.kill()  # they only read, so nothing is left half done
    for worker in workers:
        worker.process.join()
        worker.pipe.close()
    workers.clear()


def why_lost(worker: Worker, failure: Exception) -> str:
    """What to tell of a worker from which no item came."""
    worker.process.join(timeout=1)
    status = worker.process.exitcode
    if status is None:
        return f"photos of a worker did not arrive ({first_line(failure)}): pass --workers 0"
    if status == -signal.SIGBUS:
        return SHM_IS_FULL
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
    # what fails in multiprocessing's own threads when the main process dies is not worth a word
    sys.excepthook = lambda *error: None

    torch.set_num_threads(1)  # the workers share the cores, and OpenMP may hang after a fork
    with suppress(EOFError, OSError):  # the main process has died
        while True:
            pipe.send_bytes(answer(dataset, pipe.recv(), batched))


def end_with_parent() -> None:
    """Wait until the main process has ended, and end this one at once."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def answer(dataset: Dataset, key: Any, batched: bool) -> Any:
    """The bytes to send for a key: a pair of the item, its tensors shared, and of an error."""
    try:
        item = fetch(dataset, key, batched)
        return ForkingPickler.dumps((each_tensor(item, Tensor.share_memory_), ""))
    except Exception as error:
        return ForkingPickler.dumps((None, explain(error)))


def explain(error: Exception) -> str:
    """What to tell of an exception in a worker, in one line."""
    if "No space left on device" in str(error):
        return SHM_IS_FULL
    if is_out_of_memory(error):
        return f"{out_of_memory(error)}, or pass fewer --workers"
    if isinstance(error, ValueError | OSError) and str(error):  # meant for the user
        return str(error)
    what = f"{type(error).__name__} in a worker ({first_line(error)})"
    return f"{what}: pass --workers 0 to see where"


def fetch(dataset: Dataset, key: Any, batched: bool) -> Any:
    """The item of a key, or the collated batch of a list of keys."""
    if not batched:
        return dataset[key]
    return default_collate([dataset[one] for one in key])


# ---- anywhere -----------------------------------------------------------------------------------


def each_tensor(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An item with each tensor replaced by change(tensor), in tuples, lists and dicts too."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, dict):
        return {name: each_tensor(value, change) for name, value in item.items()}
    if isinstance(item, tuple | list):
        return type(item)([each_tensor(value, change) for value in item])
    return item


def in_a_thread(items: Iterator[Any], stop: Callable[[], None]) -> Iterator[Any]:
    """The same items, each made by a thread while the one before it is used.

    Args:
        stop: frees the thread from waiting for an item that nobody wants any more.
    """
    end = object()
    complete = False
    with ThreadPoolExecutor(1) as thread:
        try:
            coming = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
            complete = True
        finally:
            if not complete:
                stop()
