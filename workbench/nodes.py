"""`python -m workbench.nodes COMMAND…`: a node's worker pool, watched over between the scheduler and the notebooks.

A scheduler's warning (SIGUSR1), its end of a job (SIGTERM, of LSF first SIGINT), and its signal to one shell or to
every process of the job all have to come to the same: trainings write a checkpoint and end, their results reach the
driver, and the pool, which would die of the signal with these results, ends last. So the pool ignores these signals,
each worker passes them on to its notebook, and this process tells the workers and waits for them. It imports nothing
heavy.

`python -m workbench.nodes --bound COMMAND…` runs a command that dies with the process that began it.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

LEAVING_VARIABLE = "WORKBENCH_LEAVING"
"""Names a file that is there once the node has been told to stop; workers then begin nothing."""
GRANTED_VARIABLE = "WORKBENCH_GRANTED_DEVICES"
"""The CUDA devices that the scheduler granted to the job; a worker has one of them by its number in this list."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""How long after the last kernel a worker may need for its result to arrive."""
PR_SET_PDEATHSIG = 1


def watch_over(command: Sequence[str]) -> int:
    """Run a worker pool; on a signal let its notebooks end, and then end it.

    Returns:
        Exit code: the pool's, or 0 where it was ended.
    """
    arrived: list[int] = []
    with tempfile.TemporaryDirectory(prefix="node-") as folder:
        leaving = Path(folder) / "leaving"
        os.environ[LEAVING_VARIABLE] = str(leaving)
        os.environ[GRANTED_VARIABLE] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the pool inherits this
        pool = psutil.Popen(command)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: arrived.append(number))
        told, quiet_since = 0, time.monotonic()
        while pool.poll() is None:
            time.sleep(POLL_SECONDS)
            if told < len(arrived):
                leaving.touch()
                tell(_children(pool), signal.SIGTERM if arrived[-1] == signal.SIGINT else arrived[-1])
                told = len(arrived)
            if not arrived or any(kernels_below(pool)):
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > GRACE_SECONDS:
                end([*_children(pool, recursive=True), pool])
        return 0 if arrived else pool.returncode


def kernels_below(process: psutil.Process) -> Iterator[psutil.Process]:
    """Kernels of notebooks among the processes that a process has started, directly or not."""
    for child in _children(process, recursive=True):
        try:
            if any("ipykernel" in part for part in child.cmdline()):
                yield child
        except psutil.Error:
            continue


def _children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    try:
        return process.children(recursive)
    except psutil.NoSuchProcess:
        return []


def tell(processes: Sequence[psutil.Process], number: int) -> None:
    """Send a signal to those processes that have not ended."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill processes that ignore milder signals, and wait for them."""
    tell(processes, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=POLL_SECONDS)


def bound(command: Sequence[str]) -> None:
    """Become a command in a session of its own that is killed when its parent ends (on Linux)."""
    parent = os.getppid()
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        os.execvp(command[0], list(command))


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(bound(words[1:]) if words[0] == "--bound" else watch_over(words))
