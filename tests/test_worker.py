import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench import launch, worker
from workbench.distributed import ALONE, PeerLost, PeerOutOfMemory
from workbench.process import Preempted
from workbench.worker import Relay, Silent, Stop


def _told(read: int) -> list[dict]:
    lines = os.read(read, 65536).decode().removesuffix("\n").split("\n")
    assert all(line.startswith(launch.MESSAGE) for line in lines)
    return [json.loads(line[1:]) for line in lines]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of a pipe that comes in the place of standard output; nothing there to be read is an error."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(write if descriptor == 1 else descriptor, data))
    yield read
    os.close(read)
    os.close(write)


def test_progress_is_told_from_where_it_began(heard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SHOWN_EVERY", 0.0)
    with Relay(10, "training", "step", 4) as bar:
        bar.update(1, "mse 0.5")
        bar.update(0, "validating")
    told = _told(heard)
    assert [message["kind"] for message in told] == ["progress"] * 4, "at the start, twice, and at the end"
    assert [(m["done"], m["figures"]) for m in told] == [(4, ""), (5, "mse 0.5"), (5, "validating"), (5, "validating")]
    assert all((m["total"], m["initial"]) == (10, 4) for m in told)


def test_a_process_that_does_not_write_tells_nothing(heard: int, capsys: pytest.CaptureFixture) -> None:
    with Silent(10, "training", "step", 4) as bar:
        bar.update(6)
    worker.tell("done")
    assert _told(heard) == [{"kind": "done"}]
    assert capsys.readouterr() == ("", "")


def _trained(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "read_job", lambda path, sha256: ())
    monkeypatch.setattr(worker, "train_into", fails)
    worker._train({"job": "job", "sha256": ""}, ALONE, Stop({"signal": int(signal.SIGTERM)}, None))


def test_an_error_is_told_by_the_process_that_it_is_of(heard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (PeerLost("gone"), PeerOutOfMemory("another process ran out of memory"), ValueError("size=0")):
        with pytest.raises(type(error)):
            _trained(error, monkeypatch)
    (told,) = _told(heard)
    assert (told["kind"], told["name"], told["message"]) == ("error", "ValueError", "size=0")
    assert "in fails" in told["trace"]


@pytest.mark.parametrize("error", [Preempted(75), KeyboardInterrupt("stopped after step 3: run it again to go on")])
def test_having_stopped_is_told_with_the_signal(
    error: BaseException, heard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _trained(error, monkeypatch)
    message = "stopped after step 3" if isinstance(error, KeyboardInterrupt) else "75"
    assert _told(heard) == [{"kind": "left", "number": 15, "message": message}]


def test_a_signal_of_the_parent_comes_as_a_file(tmp_path: Path) -> None:
    noted: dict[str, int] = {}
    stop = Stop(noted, tmp_path / "stop")
    assert stop.get("signal", 0) == 0
    noted["signal"] = int(signal.SIGUSR1)
    assert stop.get("signal", 0) == signal.SIGUSR1
    (tmp_path / "stop").write_text("")
    assert stop.get("signal", 0) == signal.SIGUSR1, "a file that is being written"
    (tmp_path / "stop").write_text("15")
    assert stop.get("signal", 0) == signal.SIGTERM
    assert Stop({}, None).get("signal", 0) == 0
