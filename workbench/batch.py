"""A folder of parameter files through papermill: validated first, executed in order, resumed when run again."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
import psutil
import yaml
from jupyter_client import AsyncKernelManager
from nbconvert import HTMLExporter

from workbench.checkpoints import write_atomically
from workbench.config import ConfigError, nearest
from workbench.parameters import check, declared, read_file
from workbench.paths import OUTPUTS_VARIABLE, outputs_root, project_root
from workbench.process import PREEMPTED_EXIT, Preempted, handled
from workbench.progress import write_status
from workbench.provenance import check_source
from workbench.runs import Run, check_parameters, open_run, read_json, run_path

REFRESH_SECONDS = 0.5
QUIET_SECONDS = 20


@dataclass(frozen=True)
class Task:
    """One notebook to execute: its source, its parameters as given and as resolved."""

    notebook: Path
    given: dict[str, Any]
    resolved: dict[str, Any]


def plan(folder: Path, overrides: Mapping[str, str]) -> list[Task]:
    """Read and check every parameter file of a folder.

    Args:
        folder: Holds `<notebook>.yaml` files; they run in the order of their names.
        overrides: `-p key=value` as text; each goes to every notebook that declares the key.

    Raises:
        ConfigError: all problems of all files, one a line.
    """
    if not folder.is_dir():
        raise ConfigError([(str(folder), "no such folder of parameter files")])
    root = project_root(folder)
    files = sorted(folder.glob("*.y*ml"))
    if not files:
        raise ConfigError([(str(folder), "holds no parameter files (<notebook>.yaml)")])
    notebooks = {path.stem: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
    if not notebooks:
        raise ConfigError([(str(folder), "lies in no project, whose notebooks it would be for: move it into params/")])
    found: list[tuple[str, str]] = []
    tasks, known = [], set()
    for path in files:
        try:
            if path.suffix != ".yaml":
                raise ConfigError([(str(path), "must end in .yaml")])
            if path.stem not in notebooks:
                raise ConfigError([(str(path), f"no notebook of that name; {nearest(path.stem, notebooks)}")])
            parameters = declared(notebooks[path.stem])
            known |= parameters.keys()
            given = {"experiment": _experiment(folder, root)} | read_file(path)
            given |= {k: _value(v, parameters[k].type) for k, v in overrides.items() if k in parameters}
            resolved = check(notebooks[path.stem], given, _relative(path, root))
            check_parameters(run_path(resolved), resolved)
            tasks.append(Task(notebooks[path.stem], given, resolved))
        except ConfigError as error:
            found += [_placed(problem, path, root, overrides) for problem in error.problems]
    found += [(f"unknown parameter {key!r}", nearest(key, known)) for key in overrides if known and key not in known]
    if found:
        raise ConfigError(found)
    return tasks


def _placed(problem: tuple[str, str], path: Path, root: Path, overrides: Mapping[str, str]) -> tuple[str, str]:
    """The problem with the place where the value was given."""
    what, rule = problem
    place = _relative(path, root)
    if what.partition("=")[0] in overrides:
        return f"-p {what}, for {place}", rule
    return (what if place in what or str(path) in what else f"{what} in {place}", rule)


def _relative(path: Path, root: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _experiment(folder: Path, root: Path) -> str:
    """`params/layouts/phase1_1` -> `layouts/phase1_1`."""
    folder, params = folder.resolve(), root / "params"
    return str(folder.relative_to(params)) if folder.is_relative_to(params) else folder.name


def _value(text: str, kind: Any) -> Any:
    """A value typed on the command line; unlike in YAML, 1e-4 is a number here."""
    if kind is str:
        return text
    try:
        return float(text) if kind is float else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def run_folder(folder: Path, overrides: Mapping[str, str]) -> int:
    """Execute a folder's notebooks in order; finished ones are left alone, unfinished ones go on.

    Returns:
        Exit code: 0, 1 at the first failure, 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C.

    Raises:
        ConfigError, RunError: before anything starts.
    """
    root = project_root(folder)
    outputs = outputs_root() if os.environ.get(OUTPUTS_VARIABLE) else root / "outputs"
    os.environ[OUTPUTS_VARIABLE] = str(outputs)  # absolute, as kernels work in another folder
    tasks = plan(folder, overrides)
    started = time.monotonic()
    with forwarded_signals() as arrived:
        for task in tasks:
            code = run_task(task, root, arrived)
            if code:
                return code
    pages = outputs / tasks[0].resolved["experiment"] / "*" / "*.html"
    print(f"done in {_clock(time.monotonic() - started)}; look at {pages}")
    return 0


def run_task(task: Task, root: Path, arrived: Sequence[int] = ()) -> int:
    """Execute one notebook into its run folder, and write an HTML page of it.

    Args:
        task: What to execute.
        root: The project; kernels work there.
        arrived: The signals that have arrived, see `forwarded_signals`.
    """
    run, name = open_run(task.resolved), task.notebook.stem
    output, page = run.path / task.notebook.name, run.path / f"{name}.html"
    if run.finished and output.exists():
        check_source(run)
        if not page.exists():
            write_page(output, page)
        print(f"{name}: finished on {read_json(run.path / 'summary.json')['finished']}, left as it is ({run.path})")
        return 0
    started = time.monotonic()
    with shown(run, name):
        error = "" if arrived else execute(task, output, root)
    if arrived or error.startswith(Preempted.__name__):
        reason = signal.Signals(arrived[0]).name if arrived else "a signal to its kernel"
        print(f"{name}: stopped by {reason}; run the same command again to go on")
        return 130 if signal.SIGINT in arrived else PREEMPTED_EXIT
    if error:
        write_status("failed", reason=error.splitlines()[0])
        print(f"{name}: FAILED after {_clock(time.monotonic() - started)}\n{error}\nexecuted notebook: {output}")
        return 1
    write_page(output, page)
    print(f"{name}: done in {_clock(time.monotonic() - started)} ({page})")
    return 0


class LocalKernel(AsyncKernelManager):
    """A kernel spoken to through sockets in a private folder, not through TCP ports that other users can reach."""

    def __init__(self, **settings: Any) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="kernel-")
        super().__init__(transport="ipc", connection_file=f"{self._sockets.name}/kernel.json", **settings)

    def cleanup_ipc_files(self) -> None:
        """Remove the folder too, once the kernel has ended."""
        super().cleanup_ipc_files()
        self._sockets.cleanup()

    async def _async_interrupt_kernel(self) -> None:
        """Not before a shutdown: the kernel is idle then, and would only report the interrupt as an error."""
        if not self.shutting_down:
            await super()._async_interrupt_kernel()


def execute(task: Task, output: Path, root: Path) -> str:
    """Run a notebook through papermill; the error of the failing cell, or nothing.

    The input is copied first: papermill then writes every cell's outcome into `output` as it goes.
    """
    try:
        papermill.execute_notebook(
            str(task.notebook),
            str(output),
            parameters=task.given,
            kernel_name="python3",
            kernel_manager_class=LocalKernel,
            cwd=str(root),
            progress_bar=False,
            store_widget_state=False,
        )
    except papermill.PapermillExecutionError as error:
        return f"{error.ename} in cell [{error.exec_count}]: {error.evalue}"
    except RuntimeError as error:  # DeadKernelError, or a kernel that died while it started
        return f"the kernel died: {error} (out of memory, or killed from outside)"
    return ""


def write_page(notebook: Path, page: Path) -> None:
    """Convert an executed notebook to one HTML file, pictures included."""
    body, _ = HTMLExporter().from_filename(str(notebook))
    write_atomically(page, body.encode())


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Pass SIGTERM, SIGUSR1 and SIGINT on to the kernel, so that a training writes its checkpoint.

    Yields:
        The signals that arrived.
    """
    arrived: list[int] = []

    def forward(number: int, frame: Any) -> None:
        arrived.append(number)
        for child in psutil.Process().children():
            try:
                if any("ipykernel" in part for part in child.cmdline()):
                    child.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    with handled(forward):
        yield arrived


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
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _watch(path: Path, name: str, done: threading.Event, show: Callable[[str], None]) -> None:
    started, begun = time.monotonic(), time.time()
    while not done.wait(REFRESH_SECONDS):
        line = f"{name}  {_clock(time.monotonic() - started)}"
        status = read_json(path) if path.exists() else {}
        if status.get("updated", 0) >= begun and "done" in status:
            left = status["seconds_left"] if status["state"] == "running" else None
            line += f"  {status['what']} {status['done']}/{status['total']} {status.get('figures', '')}"
            line += f"  {_clock(left)} left" if left else ""
        show(line)


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


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
