"""Progress that can be seen from a terminal, a notebook, and another process.

One line with a bar, figures and time left. In a notebook it is a single text output, updated in place, so
that an executed notebook keeps its last state; in a terminal it is rewritten, in a log it is a line now and then.
When the environment variable WORKBENCH_STATUS names a file, the same figures go there as JSON, at most once a second.
"""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

STATUS_VARIABLE = "WORKBENCH_STATUS"
DISPLAY_SECONDS = 0.2
LOG_SECONDS = 10.0
NOTEBOOK_COLUMNS = 110
STATUS_SECONDS = 1.0


class Progress:
    """A bar over `total` units of work; use as a context manager.

    Args:
        total: Units of work in all.
        desc: What is being done.
        unit: Name of one unit.
        initial: Units already done before (a resumed run).
    """

    def __init__(self, total: int, desc: str, unit: str = "it", initial: int = 0) -> None:
        self.total, self.desc, self.unit, self.initial, self.n = total, desc, unit, initial, initial
        self.started = time.monotonic()
        self.figures = ""
        self._reported = 0.0
        self._shown = self.started
        self._handle = _notebook_display()
        self._terminal = sys.stderr.isatty()
        self._interval = DISPLAY_SECONDS if self._handle or self._terminal else LOG_SECONDS

    def update(self, n: int = 1, figures: str = "") -> None:
        """Advance by n units; `figures` replaces the text behind the bar when given."""
        self.n += n
        self.figures = figures or self.figures
        now, completed = time.monotonic(), n > 0 and self.n >= self.total
        if now - self._shown >= self._interval:
            self._shown = now
            self._show()
        if now - self._reported >= STATUS_SECONDS or completed:
            self._reported = now
            self._report("running")

    def seconds(self) -> float:
        """Seconds since this bar began."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """Time left at the mean speed since this bar began, in seconds; None before the first unit."""
        done = self.n - self.initial
        return self.seconds() / done * (self.total - self.n) if done > 0 else None

    def __enter__(self) -> "Progress":
        if self._handle or self._terminal:
            self._show()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._show()
        if self._terminal and not self._handle:
            print(file=sys.stderr, flush=True)
        self._report("running" if kind is None else "stopped")

    def _show(self) -> None:
        if self._handle:
            self._handle.update({"text/plain": self._line(NOTEBOOK_COLUMNS)}, raw=True)
        elif self._terminal:
            line = self._line(shutil.get_terminal_size().columns - 1)
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(self._line(None), file=sys.stderr, flush=True)

    def _line(self, columns: int | None) -> str:
        return tqdm.format_meter(
            self.n,
            self.total,
            self.seconds(),
            prefix=self.desc,
            unit=self.unit,
            initial=self.initial,
            postfix=self.figures or None,
            ncols=columns,
        )

    def _report(self, state: str) -> None:
        write_status(
            state,
            what=self.desc,
            done=self.n,
            total=self.total,
            unit=self.unit,
            figures=self.figures,
            seconds_left=self.seconds_left(),
        )


def write_status(state: str, **entries: Any) -> None:
    """Write {state, host, pid, updated, …} to the file named by WORKBENCH_STATUS, atomically.

    Nothing is written where no file is named, or where its folder has been moved away.
    """
    target = os.environ.get(STATUS_VARIABLE)
    if not target or not Path(target).parent.is_dir():
        return
    entries = {
        "state": state,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "updated": time.time(),
    } | entries
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(entries))
    os.replace(temporary, target)


def _notebook_display() -> Any | None:
    """A display handle when running in a Jupyter kernel, else None."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return display({"text/plain": ""}, raw=True, display_id=True)
