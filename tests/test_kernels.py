import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from projects import make_project, write_notebook

from workbench.kernels import LocalKernel, execute, forwarded_signals, tell_kernels
from workbench.tasks import plan


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_project(tmp_path, monkeypatch)


def test_an_idle_kernel_is_not_interrupted_before_its_shutdown() -> None:
    """It would print `KeyboardInterrupt caught in kernel` now and then."""
    kernel = LocalKernel(kernel_name="python3")
    with pytest.raises(RuntimeError, match="No kernel is running"):
        asyncio.run(kernel._async_interrupt_kernel())
    kernel.shutting_down = True
    asyncio.run(kernel._async_interrupt_kernel())
    kernel.cleanup_ipc_files()


def test_a_folder_whose_name_is_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "t" * 74)
    with pytest.raises(OSError, match="^TMPDIR=/t*: must have at most 74 characters, .*: set TMPDIR to a shorter one$"):
        LocalKernel(kernel_name="python3")


@pytest.mark.slow
def test_a_kernel_that_dies_is_an_error(project: Path) -> None:
    write_notebook(project, "01_first", "import os; os._exit(9)", "print('never')")
    task = plan(project / "params" / "demo", {})[0]
    assert execute(task, project / "out.ipynb", project).startswith("the kernel died: ")


SIGNALLED = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: print(signal.Signals(number).name, flush=True))
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit())
print("ready", flush=True)
time.sleep(60)
"""


def test_every_kernel_is_told_of_each_signal_once_and_first_to_end() -> None:
    """What is started with `ipykernel` in its command line is a kernel; others get nothing."""
    line = [sys.executable, "-c", SIGNALLED]
    kernel, other = (subprocess.Popen(line + more, stdout=subprocess.PIPE, text=True) for more in (["ipykernel"], []))
    assert kernel.stdout.readline() == other.stdout.readline() == "ready\n"
    told: dict[int, int] = {}
    tell_kernels([], told)
    tell_kernels([signal.SIGINT], told)
    assert kernel.stdout.readline() == "SIGTERM\n"
    tell_kernels([signal.SIGINT], told)
    tell_kernels([signal.SIGINT, signal.SIGINT], told)
    assert kernel.stdout.readline() == "SIGINT\n"
    kernel.send_signal(signal.SIGUSR1)
    other.send_signal(signal.SIGUSR1)
    assert kernel.communicate()[0] == other.communicate()[0] == ""


def test_a_kernel_that_starts_after_a_signal_is_told_too() -> None:
    with forwarded_signals() as arrived:
        os.kill(os.getpid(), signal.SIGUSR1)
        kernel = subprocess.Popen(["ipykernel", "60"], executable="sleep")
        assert kernel.wait(40) == -signal.SIGTERM and arrived == [signal.SIGUSR1]


def test_a_kernel_has_the_projects_folder_and_its_own_variables(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Papermill would change the folder of this whole process, in which other notebooks go on."""
    monkeypatch.chdir("/")
    write_notebook(project, "01_first", "import os; assert (os.getcwd(), os.environ['WHERE']) == (run, 'kernel')")
    task = plan(project / "params" / "demo", {"run": "r"})[0]
    task = replace(task, given=task.given | {"run": str(project)}, environment={"WHERE": "kernel"})
    assert execute(task, project / "out.ipynb", project) == ""
    assert "WHERE" not in os.environ
