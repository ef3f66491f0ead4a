import threading
import time

import pytest

from workbench.datasets import threads
from workbench.datasets.threads import AHEAD, in_threads, usable_cores


def test_every_item_gives_one_result():
    assert sorted(in_threads(lambda i: i * i, range(100), 3)) == [i * i for i in range(100)]
    assert list(in_threads(str, [], 3)) == []


def test_workers_run_side_by_side():
    meeting = threading.Barrier(3, timeout=60)
    assert sorted(in_threads(lambda i: (meeting.wait(), i)[1], range(3), 3)) == [0, 1, 2]


def test_items_are_taken_only_a_few_ahead_of_the_results():
    taken = []
    results = in_threads(str, (taken.append(i) or i for i in range(1000)), 2)
    next(results)
    assert len(taken) == 2 * AHEAD
    results.close()
    assert len(taken) == 2 * AHEAD


def test_an_error_surfaces_and_closing_waits_for_what_runs():
    ended, running = [], threading.Event()

    def work(i: int) -> None:
        if i == 0:
            assert running.wait(60)
            raise KeyError("unforeseen")
        running.set()
        time.sleep(0.1)
        ended.append(i)

    with pytest.raises(KeyError, match="unforeseen"):
        list(in_threads(work, range(100), 2))
    count = len(ended)
    time.sleep(0.15)
    assert 1 <= count == len(ended) < 10


def test_what_ended_before_an_error_is_given_before_it(monkeypatch):
    def work(i: int) -> int:
        if i == 7:
            raise KeyError("unforeseen")
        return i

    waited = threads.wait

    def all_at_once(futures, return_when):
        return waited(futures)

    monkeypatch.setattr(threads, "wait", all_at_once)
    given = []
    with pytest.raises(KeyError, match="unforeseen"):
        for result in in_threads(work, range(8), 2):
            given.append(result)
    assert sorted(given) == list(range(7))


def test_cores_are_those_granted(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
    assert usable_cores() == 1
