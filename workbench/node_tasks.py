"""What a worker on a node of a cluster does: a task's notebooks, one after another, on its device and its cores."""

import os
import platform
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workbench.batch import run_chain
from workbench.config import ConfigError
from workbench.datasets.threads import usable_cores
from workbench.kernels import forwarded_signals
from workbench.nodes import GRANTED_VARIABLE, LEAVING_VARIABLE
from workbench.paths import OUTPUTS_VARIABLE
from workbench.process import PREEMPTED_EXIT
from workbench.progress import STATUS_VARIABLE, write_status
from workbench.runs import Run, RunError, open_run, read_if_there, run_path
from workbench.sweeps import DEVICES_VARIABLE, THREADS_VARIABLE
from workbench.tasks import Task

BUSY_SECONDS, IN_USE_SECONDS = 1.0, 10.0
"""When to try again what a node could not begin: as it was told to stop, or as somebody else trains there."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended on a node.

    Args:
        code, failure: See `Ended`.
        node, pool: Where it was, and Parsl's name of the workers there.
        seconds: How long it took; 0 where nothing was begun.
        leaving: Whether the node has been told to stop.
        later: Seconds after which to try again.
    """

    code: int
    failure: str
    node: str
    pool: str
    seconds: float = 0.0
    leaving: bool = False
    later: float = BUSY_SECONDS


def on_node(tasks: Sequence[Task], root: Path, place: str) -> Outcome:
    """Execute notebooks one after another, in a worker on a node, for the outputs folder at that place."""
    os.environ[OUTPUTS_VARIABLE] = place
    place_worker(os.environ)
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    pool = os.environ["PARSL_WORKER_POOL_ID"]
    begun = time.monotonic()
    with forwarded_signals() as arrived:
        if _leaving():
            return Outcome(PREEMPTED_EXIT, "", node, pool, leaving=True)
        try:
            for task in tasks:  # left over from a driver that was killed
                if owner := in_use(Run(run_path(task.resolved))):
                    return Outcome(PREEMPTED_EXIT, owner, node, pool, later=IN_USE_SECONDS)
            with _begun(tasks):
                ended = run_chain(tasks, root, arrived)
            code, failure = min(ended.code, PREEMPTED_EXIT), ended.failure  # an interrupt comes from the scheduler too
        except (RunError, ConfigError, OSError) as error:
            code, failure = 1, f"{tasks[0].name}: {type(error).__name__}: {error}"
    return Outcome(code, failure, node, pool, time.monotonic() - begun, _leaving())


def _leaving() -> bool:
    """Whether the node has been told to stop; False where a site has another launcher than `NodeLauncher`."""
    mark = os.environ.get(LEAVING_VARIABLE, "")
    return bool(mark) and Path(mark).exists()


def place_worker(environment: MutableMapping[str, str]) -> None:
    """Give a worker its devices out of those that the scheduler granted, and its share of the cores; once."""
    granted = [name for name in environment.pop(GRANTED_VARIABLE, "").split(",") if name]
    pinned = environment.get(DEVICES_VARIABLE, "").split(",")
    if all(number.isdigit() and int(number) < len(granted) for number in pinned):
        environment[DEVICES_VARIABLE] = ",".join(granted[int(number)] for number in pinned)
    if THREADS_VARIABLE not in environment:
        cores = int(environment.get("PARSL_CORES") or usable_cores())
        environment[THREADS_VARIABLE] = str(max(1, cores // int(environment["PARSL_WORKER_COUNT"])))


def in_use(run: Run) -> str:
    """Who is training into a run's folder, in words; nothing where nobody is."""
    if (run.path / "run.lock").exists() and not run.finished:
        try:
            with run.lock():
                pass
        except RunError as error:
            return str(error)
    return ""


@contextmanager
def _begun(tasks: Sequence[Task]) -> Iterator[None]:
    """Let the first unfinished run say that it is running, and where, while its kernel starts."""
    unfinished = [task for task in tasks if not Run(run_path(task.resolved)).finished]
    if unfinished:
        open_run(unfinished[0].resolved)
        write_status("running")
    try:
        yield
    finally:
        for path in [run_path(task.resolved) for task in unfinished[:1]]:
            if read_if_there(path / "status.json").get("pid") == os.getpid() and not Run(path).finished:
                os.environ[STATUS_VARIABLE] = str(path / "status.json")
                write_status("stopped")
