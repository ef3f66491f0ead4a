import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from workbench import progress
from workbench.progress import Progress, write_status


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_STATUS", str(tmp_path / "status.json"))
    return tmp_path / "status.json"


def test_the_status_file_holds_what_another_process_needs(status: Path, clock: Clock) -> None:
    begun = time.time()
    with Progress(10, "training", "step", initial=2) as bar:
        clock.now += 8
        bar.update(4, "mse 0.5")
    content = json.loads(status.read_text())
    assert content["state"] == "running" and content["pid"] == os.getpid()
    assert begun <= content["updated"] <= time.time()
    assert (content["what"], content["done"], content["total"], content["unit"]) == ("training", 6, 10, "step")
    assert content["figures"] == "mse 0.5"
    assert content["seconds_left"] == pytest.approx(8.0), "4 units took 8 s, 4 are left"


def test_the_status_is_written_once_a_second_and_at_the_end(status: Path, clock: Clock) -> None:
    written = []
    with Progress(100, "training") as bar:
        for _ in range(100):
            clock.now += 0.1
            bar.update()
            done = json.loads(status.read_text())["done"] if status.exists() else None
            written += [done] if not written or written[-1] != done else []
    assert len(written) in (11, 12) and written[-1] == 100


def test_an_error_stops_the_status(status: Path) -> None:
    with pytest.raises(KeyError), Progress(10, "training") as bar:
        bar.update()
        raise KeyError
    assert json.loads(status.read_text())["state"] == "stopped"


def test_no_file_is_named_or_its_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status("running")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORKBENCH_STATUS", str(tmp_path / "moved away" / "status.json"))
    write_status("running")
    assert not list(tmp_path.iterdir())


def test_time_left_is_unknown_before_the_first_unit(clock: Clock) -> None:
    bar = Progress(10, "training", initial=5)
    assert bar.seconds_left() is None
    clock.now += 3
    bar.update()
    assert (bar.seconds(), bar.seconds_left()) == (3.0, 12.0)


def test_a_log_gets_a_line_every_ten_seconds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(1000, "training", "step") as bar:
        for step in range(250):
            clock.now += 0.1
            bar.update(1, f"mse {step}")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3, "at 10 s, 20 s and the end"
    assert "\r" not in log.getvalue()
    assert lines[0].startswith("training:  10%") and "100/1000" in lines[0] and lines[0].endswith("mse 99]")
    assert "250/1000 [00:25<01:15, 10.00step/s, mse 249]" in lines[2]


def test_a_finished_bar_does_not_write_every_update(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(1, "training") as bar:
        bar.update()
        for done in range(50):
            bar.update(0, f"validating {done}/50")
    assert len(log.getvalue().splitlines()) == 1


def test_a_terminal_gets_one_line_that_is_rewritten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    with Progress(100, "training") as bar:
        for _ in range(100):
            clock.now += 0.1
            bar.update(1, "mse 0.123456789")
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    shown = text.split("\r\033[K")[1:]
    assert 40 < len(shown) < 60, "five a second"
    assert all(len(line.rstrip("\n")) < 60 for line in shown), "a line that wraps cannot be rewritten"
    assert "100/100" in shown[-1]


def test_a_notebook_gets_one_output_that_is_updated(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handle:
        shown: list[str] = []

        def update(self, bundle: dict, raw: bool) -> None:
            assert raw
            self.shown.append(bundle["text/plain"])

    handle, log = Handle(), io.StringIO()
    monkeypatch.setattr(progress, "_notebook_display", lambda: handle)
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(10, "training", "step") as bar:
        for _ in range(10):
            clock.now += 1
            bar.update(1, "mse 0.5")
    assert len(handle.shown) == 12 and log.getvalue() == ""
    assert "10/10 [00:10<00:00,  1.00step/s, mse 0.5]" in handle.shown[-1]


def test_no_notebook_is_seen_in_a_plain_process() -> None:
    assert progress._notebook_display() is None
