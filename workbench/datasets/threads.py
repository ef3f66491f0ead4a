"""A function over many items in threads, with bounded memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 4


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results as they come, a few items ahead; closing it waits for the calls that run and drops the rest.

    What ended before an error is given before the error is raised.
    """
    waiting: set[Future] = set()
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                waiting |= {pool.submit(function, item) for item in islice(items, AHEAD * workers - len(waiting))}
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=_failed):
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def _failed(future: Future) -> bool:
    return future.exception() is not None


def usable_cores() -> int:
    """Cores this process may use: those a batch system grants it, not all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
