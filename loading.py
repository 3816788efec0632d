"""Items of a data set, read by worker processes: the one way in which all scripts load photos.

    loader = Loader(photos, workers=4)                           # single items, in their order
    loader = Loader(photos, workers=4, batches=keys_of_batches)  # collated batches
    for item in loader: ...

Whatever happens in a worker ends the loop within seconds, with a ValueError that names the cause
and the remedy: an exception, a full /dev/shm, a worker that the system kills. torch's DataLoader
waits for ever in some of these cases, because its workers send their items from a thread whose
errors nobody sees. Here a worker moves its tensors into shared memory and sends them by itself. All
workers are killed at the end, however it comes.
"""

import atexit
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
import torch.multiprocessing  # teaches ForkingPickler to hand over tensors in shared memory
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from command import is_out_of_memory, out_of_memory
from files import first_line

AHEAD = 2  # items that each worker reads before they are needed
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
        self.started_by = os.getpid()
        # before multiprocessing's own end, which would wait for the workers
        atexit.register(stop_at_exit, weakref.ref(self))

    def __del__(self) -> None:
        self.stop()

    def __len__(self) -> int:
        if self.batches is None:
            return len(self.dataset)  # type: ignore[arg-type]
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Raises ValueError: something happened in a worker."""
        keys = self.batches
        if keys is None:
            keys = range(len(self))
        if self.workers > 0:
            self.start()
            items = self.from_workers(keys)
        else:
            items = self.from_this_process(keys)
        if self.pin_memory:
            items = in_a_thread(items)  # the copy into pinned memory takes a while
        return items

    def from_this_process(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The items of `keys`, without workers."""
        for key in keys:
            item = fetch(self.dataset, key, self.batches is not None)
            if self.pin_memory:
                item = each_tensor(item, Tensor.pin_memory)
            yield item

    def from_workers(self, keys: Iterable[Any]) -> Iterator[Any]:
        """The items of `keys`, in their order. The workers take turns."""
        asked: deque[Worker] = deque()  # whose answers are to come, in this order
        turns = itertools.cycle(self.running)
        complete = False
        try:
            for key in keys:
                worker = next(turns)
                worker.pipe.send(key)
                asked.append(worker)
                if len(asked) > AHEAD * self.workers:
                    yield self.take(asked.popleft())
            while asked:
                yield self.take(asked.popleft())
            complete = True
        except ConnectionError as error:  # a worker died before it was asked
            raise ValueError(self.why_dead()) from error
        finally:
            if not complete:  # answers that nobody wants are on their way
                self.stop()

    def take(self, worker: Worker) -> Any:
        """The next item of a worker, as soon as it is there.

        Raises:
            ValueError: the worker tells of an error, or one of the workers has died.
        """
        ends = [other.process.sentinel for other in self.running]
        if worker.pipe not in wait([worker.pipe, *ends]):
            raise ValueError(self.why_dead())

        # what waits here waits in memory of this process, and its shared memory is free again
        keep: Callable[[Tensor], Tensor] = Tensor.clone
        if self.pin_memory:
            keep = Tensor.pin_memory
        try:
            item, error = worker.pipe.recv()
            item = each_tensor(item, keep)
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            if isinstance(failure, EOFError | ConnectionError | FileNotFoundError):
                raise ValueError(self.why_dead()) from failure
            what = f"photos of a worker did not arrive ({first_line(failure)})"
            raise ValueError(f"{what}: pass --workers 0") from failure
        if error:
            raise ValueError(error)
        return item

    def start(self) -> None:
        """Start the workers, unless they are running already.

        Raises:
            ValueError: the system does not let them start.
        """
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
            remedy = "pass fewer --workers, or --workers 0"
            raise ValueError(f"a worker cannot be started ({error}): {remedy}") from error

    def stop(self) -> None:
        """End the workers: those that are still busy after a second are killed."""
        if not self.running or os.getpid() != self.started_by:  # a worker has a copy of this
            return
        running = self.running
        self.running = []
        try:
            for worker in running:
                with suppress(OSError):  # it has died already
                    worker.pipe.send(None)  # an idle worker ends now
            until = time.monotonic() + 1
            for worker in running:
                worker.process.join(max(0, until - time.monotonic()))
        finally:
            for worker in running:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()

    def why_dead(self) -> str:
        """What to tell of the worker that has died."""
        status = None
        ended = wait([worker.process.sentinel for worker in self.running], timeout=1)
        for worker in self.running:
            if worker.process.sentinel in ended:
                worker.process.join()
                status = worker.process.exitcode

        remedy = "pass fewer --workers, or --workers 0"
        if status == -signal.SIGBUS:
            return SHM_IS_FULL
        if status == -signal.SIGKILL:
            return f"a worker was killed, as the system does where memory runs out: {remedy}"
        if status is not None and status < 0:
            return f"a worker was killed by {signal.Signals(-status).name}: {remedy}"
        return f"a worker ended with status {status}: {remedy}"


def stop_at_exit(loader: "weakref.ref[Loader]") -> None:
    """Stop a Loader if it still exists."""
    alive = loader()
    if alive:
        alive.stop()


# ---- in a worker --------------------------------------------------------------------------------


def work(dataset: Dataset, batched: bool, pipe: Connection) -> None:
    """What a worker does: read the items of the keys that come, until None comes.

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
        while (key := pipe.recv()) is not None:
            pipe.send_bytes(answer(dataset, key, batched))


def end_with_parent() -> None:
    """Wait until the main process has ended, and end this one at once."""
    parent = multiprocessing.parent_process()
    if parent:
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


def in_a_thread(items: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """The same items, made by a thread of their own, which is a few items ahead."""
    coming: queue.Queue = queue.Queue(ahead)  # of (item, is it the end?, error)
    unwanted = threading.Event()

    def put(*entry: Any) -> None:
        while not unwanted.is_set():
            with suppress(queue.Full):
                coming.put(entry, timeout=0.1)
                return

    def run() -> None:
        try:
            for item in items:
                put(item, False, None)
                if unwanted.is_set():
                    return
            put(None, True, None)
        except BaseException as error:
            put(None, True, error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, is_end, error = coming.get()
            if error:
                raise error
            if is_end:
                return
            yield item
    finally:
        unwanted.set()
        thread.join(1)  # it may be waiting for a photo, from which the end of its worker frees it
