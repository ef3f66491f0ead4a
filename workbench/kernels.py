"""Notebooks executed by papermill, each in a kernel of its own, and the signals passed on to these kernels."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import papermill
import psutil
from jupyter_client import AsyncKernelManager
from nbconvert import HTMLExporter

from workbench.checkpoints import write_atomically
from workbench.process import handled
from workbench.tasks import Task

POLL_SECONDS = 0.2
LONGEST_FOLDER = 74
"""Characters of the folder of temporary files; the path of a socket in it, 29 longer, has at most 103 on macOS."""
_CONVERTING = threading.Lock()


class LocalKernel(AsyncKernelManager):
    """A kernel spoken to through sockets in a private folder, not through TCP ports that other users can reach."""

    launch: ClassVar[dict[str, Any]] = {}
    """Arguments of its process."""

    def __init__(self, **settings: Any) -> None:
        folder = tempfile.gettempdir()
        if len(folder) > LONGEST_FOLDER:
            rule = f"must have at most {LONGEST_FOLDER} characters, as kernels have sockets in it"
            raise OSError(f"TMPDIR={folder}: {rule}: set TMPDIR to a shorter one")
        self._sockets = tempfile.TemporaryDirectory(prefix="kernel-")
        super().__init__(transport="ipc", connection_file=f"{self._sockets.name}/kernel.json", **settings)

    async def _async_pre_start_kernel(self, **settings: Any) -> tuple[list[str], dict[str, Any]]:
        """Also where papermill would change the folder, or one would change the environment, of this whole process."""
        return await super()._async_pre_start_kernel(**settings | self.launch)

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

    class Kernel(LocalKernel):
        launch: ClassVar[dict[str, Any]] = {"cwd": str(root), "env": os.environ | task.environment}

    try:
        papermill.execute_notebook(
            str(task.notebook),
            str(output),
            parameters=task.given,
            kernel_name="python3",
            kernel_manager_class=Kernel,
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
    with _CONVERTING:
        body, _ = _exporter().from_filename(str(notebook))
    write_atomically(page, body.encode())


@cache
def _exporter() -> HTMLExporter:
    """One for all pages, as half of a small page's time goes into its templates."""
    return HTMLExporter()


@contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Pass SIGTERM, SIGUSR1 and SIGINT on to the kernels, those that start later too, see `tell_kernels`.

    Yields:
        The signals that arrived.
    """
    arrived: list[int] = []
    over = threading.Event()

    def pass_on() -> None:
        told: dict[int, int] = {}
        while not over.wait(POLL_SECONDS):
            tell_kernels(arrived, told)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        with handled(lambda number, frame: arrived.append(number)):
            yield arrived
    finally:
        over.set()
        thread.join()


def tell_kernels(arrived: Sequence[int], told: dict[int, int]) -> None:
    """Pass on each signal once to every kernel, those that started after it too.

    The first one a kernel gets is SIGTERM, on which a training writes its checkpoint and everything else ends: a
    kernel ignores SIGINT while it starts and between two cells.

    Args:
        arrived: The signals.
        told: How many of them each process has been told of.
    """
    for kernel in kernels() if arrived else ():
        if told.get(kernel.pid, 0) < len(arrived):
            _send(kernel, arrived[-1] if kernel.pid in told else signal.SIGTERM)
            told[kernel.pid] = len(arrived)


def kernels() -> list[psutil.Process]:
    """Kernels that this process has started, and that have not ended."""
    found = []
    for child in psutil.Process().children():
        try:
            if any("ipykernel" in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def _send(kernel: psutil.Process, number: int) -> None:
    try:
        kernel.send_signal(number)
    except psutil.NoSuchProcess:
        pass
