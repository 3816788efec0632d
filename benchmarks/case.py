"""One line of the speed table: what is timed, against what, and how the two results are compared."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A pair of callables on the same inputs.

    `setup()` returns (plain, ours), each called without arguments; `same(plain result, our result)` raises AssertionError
    where they differ. `target` is the asked ratio of the plain time to ours, `memory` that of the peak memories.
    """

    name: str
    target: float
    setup: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    same: Callable[[Any, Any], None]
    memory: float | None = None
