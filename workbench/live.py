"""What is going on, as a table that is redrawn: the runs of a folder from its files alone, or the tasks of a driver."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench.listing import figures_of, run_folders_below
from workbench.runs import RunError, read_if_there, read_json, run_state

ORDER = ("failed", "running", "stopped", "begun", "finished")
COLUMNS = ("run", "state", "node", "doing", "figures", "left")
ABSENT = dict.fromkeys(COLUMNS[1:], "")
REFRESH_SECONDS = 1.0
QUIET_SECONDS = 20.0
RESTING = 9
"""A table that takes long to make is made for a tenth of the time at most."""


def activity(path: Path) -> dict[str, str]:
    """What a run is doing, from its status.json and summary.json: state, node, doing, figures, left."""
    try:
        summary, status = read_if_there(path / "summary.json"), read_if_there(path / "status.json")
    except RunError as error:
        return ABSENT | {"state": str(error)}
    try:
        return _activity(summary, status)
    except KeyError as error:
        return ABSENT | {"state": f"{path / 'status.json'}: damaged (no {error})"}


def _activity(summary: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, str]:
    state = run_state(summary, {key: value for key, value in status.items() if key != "done"})
    going = state == "running" and "done" in status
    left = status.get("seconds_left") if going else None
    return {
        "state": state,
        "node": status.get("host", "").split(".")[0],
        "doing": f"{status['what']} {status['done']}/{status['total']}" if "done" in status and not summary else "",
        "figures": figures_of(summary) if summary else status.get("figures", ""),
        "left": clock(left) if left is not None else "",
    }


def clock(seconds: int | float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def aligned(rows: Sequence[Mapping[str, str]], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Lines of a table with a header; nothing for no rows."""
    if not rows:
        return []
    cells = [[*columns], *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


class LiveTable:
    """Lines on standard error: redrawn in place on a terminal, in a log shown now and then.

    Args:
        quiet: Seconds between two showings in a log.
    """

    def __init__(self, quiet: int | float = QUIET_SECONDS) -> None:
        self.terminal = sys.stderr.isatty()
        self.every = REFRESH_SECONDS if self.terminal else quiet
        self._drawn = 0
        self._due = time.monotonic() + (0.0 if self.terminal else quiet)

    def show(self, lines: Callable[[], list[str]]) -> None:
        """Show what `lines` gives, if it is time to."""
        if time.monotonic() < self._due:
            return
        begun, found = time.monotonic(), lines()
        self._due = time.monotonic() + max(self.every, RESTING * (time.monotonic() - begun))
        if not self.terminal:
            print(*found, sep="\n", file=sys.stderr, flush=True)
            return
        size = shutil.get_terminal_size()
        if len(found) > size.lines - 1:
            found = [*found[: size.lines - 2], f"… and {len(found) - size.lines + 2} more lines"]
        self.clear()
        print(*(line[: size.columns - 1] for line in found), sep="\n", file=sys.stderr, flush=True)
        self._drawn = len(found)

    def clear(self) -> None:
        """Take the table off the terminal, so that something else can be printed; it comes back when it is due."""
        if self._drawn:
            print(f"\033[{self._drawn}F\033[J", end="", file=sys.stderr, flush=True)
            self._drawn = 0


def table_of_activity(root: Path) -> list[str]:
    """A line for each run below a folder, from their files alone, under how many are in each state.

    Raises:
        RunError: the folder is absent.
    """
    rows = [
        {"run": str(path.relative_to(root)) if path != root else path.name} | activity(path)
        for path in run_folders_below(root)
        if "parameters" in _config(path)
    ]
    states = [row["state"].partition(" ")[0] for row in rows]
    rows = [row for _, row in sorted(zip(states, rows, strict=True), key=lambda pair: _rank(pair[0]))]
    return [counted(states) or "no runs yet", *aligned(rows)]


def _rank(state: str) -> int:
    """What is over comes last, as a terminal may be too low for all."""
    return ORDER.index(state) if state in ORDER else 0


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / "config.json")
    except RunError:
        return {"parameters": {}}  # a damaged one is a run's all the same


def counted(states: Sequence[str]) -> str:
    """`3 finished, 2 running`."""
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def watch(root: Path) -> None:
    """Show the runs below a folder until interrupted.

    Raises:
        RunError: the folder is absent.
    """
    table = LiveTable()
    if not table.terminal:
        print(*table_of_activity(root), sep="\n", file=sys.stderr, flush=True)
    try:
        while True:
            with suppress(FileNotFoundError):  # a folder was renamed meanwhile
                table.show(lambda: table_of_activity(root))
            time.sleep(REFRESH_SECONDS / 4)
    except KeyboardInterrupt:
        return
