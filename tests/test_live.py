import io
import time
from pathlib import Path

import pytest

from workbench import listing, live
from workbench.__main__ import main
from workbench.live import LiveTable, activity, aligned, clock, table_of_activity, watch
from workbench.progress import write_status
from workbench.runs import STALE_SECONDS, RunError, open_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error of 20 columns and 5 lines."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    return stream


def test_what_a_run_is_doing_is_read_from_its_folder(tmp_path: Path) -> None:
    run = open_run({"experiment": "demo", "run": "vae"}, tmp_path)
    nothing = {"state": "begun", "node": "", "doing": "", "figures": "", "left": ""}
    assert activity(run.path) == nothing
    status = {
        "what": "training",
        "done": 3,
        "total": 8,
        "figures": "mse 0.5",
        "seconds_left": 3675.0,
        "host": "n1.site",
    }
    write_status("running", **status)
    shown = {"node": "n1", "doing": "training 3/8", "figures": "mse 0.5"}
    assert activity(run.path) == shown | {"state": "running", "left": "1:01:15"}
    write_status("running", **status, updated=time.time() - STALE_SECONDS - 1)
    assert activity(run.path) == shown | {"state": "stopped", "left": ""}, "the heartbeat has ceased"
    write_status("failed", reason="ValueError: 13", host="n1")
    assert activity(run.path) == nothing | {"state": "failed ValueError: 13", "node": "n1"}
    run.finish(mse=0.25, mse_se=0.1)
    assert activity(run.path) == nothing | {"state": "finished", "node": "n1", "figures": "mse 0.25"}
    (run.path / "status.json").write_text("{")
    assert "status.json: damaged" in activity(run.path)["state"]
    (run.path / "summary.json").unlink()
    (run.path / "status.json").write_text('{"state": "running"}')
    assert activity(run.path) == nothing | {"state": f"{run.path}/status.json: damaged (no 'updated')"}


def test_the_table_of_a_folder_counts_states(tmp_path: Path) -> None:
    for name in "abc":
        open_run({"experiment": "demo", "run": name}, tmp_path)
    write_status("running", what="training", done=1, total=2, host="n1")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    assert table_of_activity(tmp_path) == [
        "2 begun, 1 running",
        "run     state    node  doing         figures  left",
        "demo/c  running  n1    training 1/2",
        "demo/a  begun",
        "demo/b  begun",
    ]
    assert table_of_activity(tmp_path / "cache") == ["no runs yet"]
    with pytest.raises(RunError, match=f"{tmp_path}/none: no such folder"):
        table_of_activity(tmp_path / "none")


def test_times_and_columns() -> None:
    assert [clock(s) for s in (5.9, 75, 3599, 3600)] == ["0:05", "1:15", "59:59", "1:00:00"]
    assert aligned([{"a": "x", "b": "long"}, {"b": "y"}], ("a", "b")) == ["a  b", "x  long", "   y"]
    assert aligned([]) == []


def test_a_terminal_is_redrawn_in_place_and_cut_to_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now = make_terminal(monkeypatch), 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    table = LiveTable()
    table.show(lambda: ["a", "b" * 30])
    table.show(lambda: pytest.fail("shown too soon"))
    now += 2
    table.show(lambda: [str(i) for i in range(9)])
    table.clear()
    table.clear()
    first, second = f"a\n{'b' * 19}\n", "0\n1\n2\n… and 6 more lines\n"
    assert terminal.getvalue() == f"{first}\033[2F\033[J{second}\033[4F\033[J"


def test_a_log_gets_the_table_now_and_then(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    table, made = LiveTable(), []
    for _ in range(50):
        now += 1
        table.show(lambda: made.append(1) or [f"made {len(made)} times"])
    table.clear()
    assert capsys.readouterr().err == "made 1 times\nmade 2 times\n"


def test_a_table_that_takes_long_is_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = 100.0, []
    make_terminal(monkeypatch)

    def slow() -> list[str]:
        nonlocal now
        now += 3
        made.append(now)
        return ["x"]

    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    table = LiveTable()
    for _ in range(100):
        now += 1
        table.show(slow)
    assert all(after - before >= 30 for before, after in zip(made, made[1:], strict=False)) and len(made) >= 3


def test_watching_ends_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    open_run({"experiment": "demo", "run": "vae"}, tmp_path)
    rounds, found = iter([None, None]), live.run_folders_below
    ways = iter([lambda root: (root / "gone").rename(root), found])

    def sleep(seconds: float) -> None:
        if next(rounds, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", sleep)
    monkeypatch.setattr(live, "run_folders_below", lambda root: next(ways)(root))
    watch(tmp_path)
    assert "demo/vae" in terminal.getvalue(), "a folder that was renamed while it was read ended it"


def test_an_interrupt_ends_the_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(root: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "table_of_runs", interrupted)
    assert main(["runs"]) == 130
    assert capsys.readouterr() == ("", "")
