"""Folders of parameter files through papermill: validated first, executed in order, resumed when run again.

The runs of a sweep go on side by side. Their kernels are processes anyway, so that threads of this process suffice to
wait for them: nothing is imported twice, one handler receives all signals, and every kernel dies with this process.
"""

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from nbformat.reader import NotJSONError

from workbench.config import ConfigError
from workbench.kernels import execute, forwarded_signals, write_page
from workbench.live import clock
from workbench.paths import OUTPUTS_VARIABLE, outputs_root, project_root
from workbench.process import PREEMPTED_EXIT, Preempted
from workbench.progress import STATUS_VARIABLE, write_status
from workbench.provenance import check_source
from workbench.runs import Run, RunError, open_run, read_if_there, read_json
from workbench.sweeps import SETTINGS, set_aside, slots
from workbench.tasks import Point, Task, plan_points

REFRESH_SECONDS = 0.5
QUIET_SECONDS = 20


def run_folders(
    folders: Sequence[Path],
    overrides: Mapping[str, str],
    seeds: int | None = None,
    jobs: int | None = None,
    accept: Collection[str] = (),
    grid: Sequence[str] = (),
) -> int:
    """Execute the notebooks of parameter folders in order; finished ones are left alone, unfinished ones go on.

    Args:
        folders, overrides, seeds, accept, grid: See `plan_points`.
        jobs: Runs of a sweep at one time; None: one for each CUDA device, or one.

    Returns:
        Exit code: 0, 1 after a failure, 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C. What fails ends its point at
        once, a run of a sweep excepted.

    Raises:
        ConfigError, RunError: before anything starts.
    """
    use_outputs_of(folders)
    points = plan_points(folders, overrides, seeds, accept, grid)
    swept = [task for point in points for task in point.tasks if task.kind == "swept"]
    if jobs is not None and not swept:
        names = " ".join(map(str, folders))
        remedy = "leave it out, or run points side by side with --site cluster/local.py"
        rule = f"{names} has no {SETTINGS}: its notebooks run one after another; {remedy}"
        raise ConfigError([(f"--jobs {jobs}", rule)])
    places = slots(jobs, [task.resolved.get("device", "auto") for task in swept])
    started, failures, code = time.monotonic(), [], 0
    with alone(points), forwarded_signals() as arrived:
        for point in points:
            code, failed = _run_point(point, places, arrived)
            failures += failed
            if code > 1:
                break
    conclude_all(points, failures, code, time.monotonic() - started)
    return code if code > 1 else int(bool(failures))


def use_outputs_of(folders: Sequence[Path]) -> None:
    """Set the outputs folder for this process and its kernels, absolute, as these work in another folder.

    Raises:
        ConfigError: the folders lie in different projects.
    """
    roots = dict.fromkeys(map(project_root, folders))
    if len(roots) > 1:
        raise ConfigError([(" ".join(map(str, folders)), "lie in different projects: run them one by one")])
    outputs = outputs_root() if os.environ.get(OUTPUTS_VARIABLE) else next(iter(roots)) / "outputs"
    os.environ[OUTPUTS_VARIABLE] = str(outputs)


def conclude_all(points: Sequence[Point], failures: Sequence[str], code: int, seconds: float) -> None:
    """Say at the end what failed, or where to look."""
    if failures:
        total = sum(len(point.tasks) for point in points)
        heading = f"{len(failures)} of {total} runs failed; the same command tries them again:"
        print(heading, *failures, sep="\n  ", flush=True)
    elif code == 0:
        folders = [point.experiment + "/*" * (point.name != point.experiment) for point in points]
        pages = " ".join(dict.fromkeys(f"{outputs_root()}/{folder}/*/*.html" for folder in folders))
        print(f"done in {clock(seconds)}; look at {pages}", flush=True)


@contextmanager
def alone(points: Sequence[Point]) -> Iterator[None]:
    """Keep other processes from the same experiments, which would start what waits here.

    Raises:
        RunError: another one is at it, or its folder cannot be written.
    """
    with ExitStack() as stack:
        for experiment in sorted({point.experiment for point in points}):
            folder = outputs_root() / experiment
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(Run(folder).lock())
            except OSError as error:
                raise RunError(
                    f"{folder} cannot be written ({error.strerror}): choose another outputs folder with the "
                    f"environment variable {OUTPUTS_VARIABLE}, change its permissions, or make room"
                ) from None
        yield


def _run_point(point: Point, places: Sequence[Mapping[str, str]], arrived: Sequence[int]) -> tuple[int, list[str]]:
    """Execute a point's tasks in order, those of a sweep side by side; the exit code, and a line for each failure."""
    failures: list[str] = []
    for kind, group in groupby(point.tasks, key=lambda task: task.kind):
        if kind == "swept":
            runner = SweepRunner(list(group), point.root, places, arrived)
            runner.run()
            failures += runner.failures
            if runner.stopped:
                return _stop_code(arrived), failures
            continue
        ended = run_chain(list(group), point.root, arrived)
        if ended.code:
            return ended.code, failures + [ended.failure] * (ended.code == 1)
    return int(bool(failures)), failures


@dataclass(frozen=True)
class Ended:
    """How an execution ended: with exit code 0, 1 (and a line on why), 75 or 130."""

    code: int
    failure: str = ""


def run_chain(tasks: Sequence[Task], root: Path, arrived: Sequence[int] = ()) -> Ended:
    """Execute notebooks one after another, until one fails or is stopped.

    Args:
        tasks: What to execute.
        root: The project; kernels work there.
        arrived: The signals that have arrived, see `forwarded_signals`.
    """
    for task in tasks:
        make_way(task)
        ended = run_task(task, root, arrived)
        if ended.code:
            return ended
    return Ended(0)


def make_way(task: Task) -> None:
    """Set a report aside that is about other runs."""
    if task.kind == "report" and (aside := set_aside(task.resolved)):
        print(f"{task.name}: made anew, as its runs have changed; the old one is kept in {aside}")


def _stop_code(arrived: Sequence[int]) -> int:
    return 130 if signal.SIGINT in arrived else PREEMPTED_EXIT


def run_task(task: Task, root: Path, arrived: Sequence[int] = ()) -> Ended:
    """Execute one notebook into its run folder, and write an HTML page of it; see `run_chain`."""
    run = open_run(task.resolved)
    if left_alone(task, run):
        return Ended(0)
    started = time.monotonic()
    with shown(run, task.name):
        try:
            error = "" if arrived else _execute_with_page(task, run, root)
        except OSError as failure:
            error = f"{type(failure).__name__}: {failure}"
    return _conclude(task, run, error, time.monotonic() - started, arrived)


def left_alone(task: Task, run: Run) -> bool:
    """Whether a run is finished and left as it is; not where a kill or a full disk cut its notebook short."""
    output, page = run.path / task.notebook.name, run.path / f"{task.notebook.stem}.html"
    if not run.finished or not output.exists():
        return False
    check_source(run)
    if not page.exists():
        try:
            write_page(output, page)
        except NotJSONError:
            return False
    print(f"{task.name}: finished on {read_json(run.path / 'summary.json')['finished']}, left as it is ({run.path})")
    return True


def _execute_with_page(task: Task, run: Run, root: Path) -> str:
    output = run.path / task.notebook.name
    error = execute(task, output, root)
    if not error:
        write_page(output, output.with_suffix(".html"))
    return error


def _conclude(task: Task, run: Run, error: str, seconds: float, arrived: Sequence[int]) -> Ended:
    """Say how an execution ended."""
    name, output = task.name, run.path / task.notebook.name
    if error.startswith(Preempted.__name__) or arrived and (error or not run.finished):
        _tell_stopped(run)
        reason = signal.Signals(arrived[0]).name if arrived else "a signal to its kernel"
        print(f"{name}: stopped by {reason}; run the same command again to go on", flush=True)
        return Ended(_stop_code(arrived))
    if error:
        error = _with_remedy(error, run)
        os.environ[STATUS_VARIABLE] = str(run.path / "status.json")
        with suppress(OSError):  # on a full disk
            write_status("failed", reason=error.splitlines()[0])
        print(f"{name}: FAILED after {clock(seconds)}\n{error}\nexecuted notebook: {output}", flush=True)
        return Ended(1, f"{name}: {error.splitlines()[0]} ({output})")
    print(f"{name}: done in {clock(seconds)} ({output.with_suffix('.html')})", flush=True)
    return Ended(0)


def _tell_stopped(run: Run) -> None:
    """Correct the status.json of a kernel that was ended in the middle of something, so that it cannot itself."""
    status = read_if_there(run.path / "status.json")
    if status.get("state") == "running":
        os.environ[STATUS_VARIABLE] = str(run.path / "status.json")
        with suppress(OSError):  # on a full disk
            write_status(**status | {"state": "stopped"})


def _with_remedy(error: str, run: Run) -> str:
    """An error that a full disk causes, said as such; others as they are."""
    if os.strerror(errno.ENOSPC) not in error and os.strerror(errno.EDQUOT) not in error:
        return error
    free = shutil.disk_usage(run.path).free / 1e6
    rule = "a run needs room for its checkpoints: make some, or choose another outputs folder with the environment"
    return f"{run.path}: the disk is full ({free:.0f} MB free); {rule} variable {OUTPUTS_VARIABLE}\n{error}"


# --- sweeps ---


@dataclass(frozen=True)
class Execution:
    """A run of a sweep that is going on, and the environment variables that no other one has meanwhile."""

    task: Task
    run: Run
    place: Mapping[str, str]
    started: float = field(default_factory=time.monotonic)
    begun: float = field(default_factory=time.time)


class SweepRunner:
    """Executes the runs of a sweep, as many at one time as there are places; one that fails does not stop the others.

    Args:
        tasks: The runs.
        root: The project; kernels work there.
        places: Environment variables of the runs that go on at one time, see `slots`.
        arrived: The signals that have arrived, see `forwarded_signals`.
    """

    def __init__(
        self, tasks: Sequence[Task], root: Path, places: Sequence[Mapping[str, str]], arrived: Sequence[int]
    ) -> None:
        self.tasks, self.root, self.arrived = tasks, root, arrived
        self.waiting, self.free, self.size = deque(tasks), deque(places), len(places)
        self.going: dict[Future, Execution] = {}
        self.failures: list[str] = []
        """A line for each run that failed."""
        self.stopped = False
        """Whether a run was stopped, or not begun, because of a signal."""

    def run(self) -> None:
        """Execute them all, or as many as are finished or stopped when a signal has arrived."""
        show = _terminal_line if sys.stderr.isatty() else _log_line()
        with ThreadPoolExecutor(self.size) as pool:
            while self.going or (self.waiting and not self.arrived):
                while self.waiting and self.free and not self.arrived:
                    self._begin(self.waiting.popleft(), pool)
                for future in wait(self.going, REFRESH_SECONDS, FIRST_COMPLETED).done:
                    self._end(self.going.pop(future), future)
                show(self._line())
        _clear_line()
        self.stopped |= bool(self.waiting)

    def _begin(self, task: Task, pool: ThreadPoolExecutor) -> None:
        """Begin a run in a free place, unless it is finished, or cannot be opened."""
        _clear_line()
        try:
            run = open_run(task.resolved)
            if left_alone(task, run):
                return
        except (RunError, ConfigError, OSError) as error:
            print(f"{task.name}: FAILED\n{error}", flush=True)
            self.failures.append(f"{task.name}: {str(error).splitlines()[0]}")
            return
        print(f"{task.name}: running in {run.path}", flush=True)
        execution = Execution(task, run, self.free.popleft())
        own = replace(task, environment={**execution.place, STATUS_VARIABLE: str(run.path / "status.json")})
        self.going[pool.submit(_execute_with_page, own, run, self.root)] = execution

    def _end(self, execution: Execution, future: Future) -> None:
        """Conclude a run, in whatever way it has ended."""
        _clear_line()
        self.free.append(execution.place)
        task, run, failure = execution.task, execution.run, future.exception()
        error = f"{type(failure).__name__}: {failure}" if failure else future.result()
        ended = _conclude(task, run, error, time.monotonic() - execution.started, self.arrived)
        if ended.code == 1:
            self.failures.append(ended.failure)
        self.stopped |= ended.code > 1

    def _line(self) -> str:
        over = len(self.tasks) - len(self.waiting) - len(self.going)
        states = [_state(e.task.name, e.run.path / "status.json", e.started, e.begun) for e in self.going.values()]
        return "  |  ".join([f"{over}/{len(self.tasks)} runs", *states])


# --- what can be seen of it ---


@contextmanager
def shown(run: Run, name: str) -> Iterator[None]:
    """Show what the kernel reports in status.json: a line that is rewritten, or a line now and then in a log."""
    done = threading.Event()
    show = _terminal_line if sys.stderr.isatty() else _log_line()
    thread = threading.Thread(target=_watch, args=(run.path / "status.json", name, done, show), daemon=True)
    print(f"{name}: running in {run.path}", flush=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _clear_line()


def _watch(path: Path, name: str, done: threading.Event, show: Callable[[str], None]) -> None:
    started, begun = time.monotonic(), time.time()
    while not done.wait(REFRESH_SECONDS):
        show(_state(name, path, started, begun))


def _state(name: str, path: Path, started: float, begun: float) -> str:
    """What status.json says of a run since it was begun, in a line."""
    line = f"{name}  {clock(time.monotonic() - started)}"
    status = read_if_there(path)
    if status.get("updated", 0) >= begun and "done" in status:
        left = status["seconds_left"] if status["state"] == "running" else None
        line += f"  {status['what']} {status['done']}/{status['total']} {status.get('figures', '')}"
        line += f"  {clock(left)} left" if left else ""
    return line


def _clear_line() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _terminal_line(line: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    print(f"\r\033[K{line[:width]}", end="", file=sys.stderr, flush=True)


def _log_line() -> Callable[[str], None]:
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_SECONDS:
            last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show
