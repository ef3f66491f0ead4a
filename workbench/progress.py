"""Progress that can be seen from a terminal, a notebook, and another process.

One line with a bar, figures and time left. In a notebook it is a single text output, updated in place, so
that an executed notebook keeps its last state; in a terminal it is a tqdm bar. When the environment variable
WORKBENCH_STATUS names a file, the same figures go there as JSON, at most once a second.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

STATUS_VARIABLE = "WORKBENCH_STATUS"
DISPLAY_SECONDS = 0.2
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
        self._shown = self._reported = 0.0
        self._handle = _notebook_display()
        self._bar = None if self._handle else tqdm(total=total, desc=desc, unit=unit, initial=initial)

    def update(self, n: int = 1, figures: str = "") -> None:
        """Advance by n units; `figures` replaces the text behind the bar when given."""
        self.n += n
        self.figures = figures or self.figures
        now = time.monotonic()
        if now - self._shown >= DISPLAY_SECONDS or self.n >= self.total:
            self._shown = now
            self._show()
        if now - self._reported >= STATUS_SECONDS or self.n >= self.total:
            self._reported = now
            self._report("running")

    def seconds(self) -> float:
        """Seconds since this bar began."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """Time left at the mean speed since this bar began, in seconds; None before the first unit."""
        done = self.n - self.initial
        return self.seconds() / done * (self.total - self.n) if done > 0 else None

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._show()
        if self._bar is not None:
            self._bar.close()
        self._report("running" if kind is None else "stopped")

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.figures, refresh=False)
            self._bar.n = self.n
            self._bar.refresh()
        else:
            self._handle.update({"text/plain": self._line()}, raw=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self.started
        return tqdm.format_meter(
            self.n,
            self.total,
            elapsed,
            prefix=self.desc,
            unit=self.unit,
            initial=self.initial,
            postfix=self.figures or None,
            ncols=110,
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
    """Write {state, host, pid, updated, …} to the file named by WORKBENCH_STATUS, atomically; no file, no-op."""
    target = os.environ.get(STATUS_VARIABLE)
    if not target:
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
