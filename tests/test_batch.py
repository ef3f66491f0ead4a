import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import tiny
from nbformat.v4 import new_code_cell, new_notebook

from workbench import batch
from workbench.batch import LocalKernel, Task, execute, plan, run_folder
from workbench.checkpoints import load_checkpoint
from workbench.config import ConfigError
from workbench.listing import describe_run
from workbench.runs import Run, RunError, open_run

TESTS = Path(__file__).parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = """
experiment: str = "smoke"  # folder in outputs/
run: str = "r"  # folder in the experiment
n: int = 1  # a number
lr: float = 0.1  # another one
dims: list[int] = [1]  # a list
"""
OPEN = """
from workbench import parameters, runs
params = parameters.resolve("{name}", globals())
this_run = runs.open_run(params)
"""


def write_notebook(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    tagged = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    content = new_notebook(cells=[tagged, *map(new_code_cell, cells)], metadata=KERNEL)
    nbformat.write(content, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two notebooks and the parameter folder params/demo for both."""
    for folder in ("notebooks", "params/demo"):
        (tmp_path / folder).mkdir(parents=True)
    write_notebook(tmp_path, "01_first", "print('first', n)")
    write_notebook(tmp_path, "02_second", "print('second', n)")
    write_params(tmp_path, **{"01_first": "run: one\nn: 5", "02_second": "run: two"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / "params" / "demo" / f"{name}.yaml").write_text(text)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that were executed; no kernel starts, each writes its notebook and finishes its run."""
    tasks: list[Task] = []

    def pretend(task: Task, output: Path, root: Path) -> str:
        tasks.append(task)
        nbformat.write(new_notebook(metadata=KERNEL), output)
        if task.given.get("n") == 13:
            return "ValueError in cell [3]: 13"
        Run(output.parent).finish()
        return ""

    monkeypatch.setattr(batch, "execute", pretend)
    return tasks


# --- the plan: everything is checked before anything starts ---


def test_the_plan_holds_every_notebook_in_order_with_its_parameters(project: Path) -> None:
    first, second = plan(project / "params" / "demo", {})
    assert [first.notebook.stem, second.notebook.stem] == ["01_first", "02_second"]
    assert first.given == {"experiment": "demo", "run": "one", "n": 5}
    assert first.resolved == {"experiment": "demo", "run": "one", "n": 5, "lr": 0.1, "dims": [1]}


def test_a_folder_of_folders_names_the_experiment(project: Path) -> None:
    (project / "params" / "layouts").mkdir()
    (project / "params" / "demo").rename(project / "params" / "layouts" / "phase1_1")
    assert plan(project / "params" / "layouts" / "phase1_1", {})[0].resolved["experiment"] == "layouts/phase1_1"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"n": "7"}, {"n": 7}),
        ({"lr": "1e-4"}, {"lr": 1e-4}),
        ({"lr": "2"}, {"lr": 2.0}),
        ({"dims": "[3, 4]"}, {"dims": [3, 4]}),
        ({"run": "5"}, {"run": "5"}),
        ({"run": "a=b"}, {"run": "a=b"}),
    ],
)
def test_overrides_go_to_every_notebook_that_knows_them(project: Path, overrides: dict, expected: dict) -> None:
    for task in plan(project / "params" / "demo", overrides):
        assert {key: task.resolved[key] for key in expected} == expected
        assert {key: task.given[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lrr": "1"}, "unknown parameter 'lrr': did you mean 'lr'?"),
        ({"n": "many"}, "-p n='many', for params/demo/{file}.yaml: must be a whole number"),
        ({"n": "1.5"}, "-p n=1.5, for params/demo/{file}.yaml: must be a whole number"),
        ({"lr": "true"}, "-p lr='true', for params/demo/{file}.yaml: must be a number"),
        ({"dims": "[1, 2"}, "-p dims='[1, 2', for params/demo/{file}.yaml: must be a list, such as [32, 64, 128]"),
    ],
)
def test_a_wrong_override_is_named(project: Path, executed: list, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_folder(project / "params" / "demo", overrides)
    files = ["01_first", "02_second"] if "{file}" in message else [""]
    assert str(caught.value).splitlines() == [message.format(file=file) for file in files]
    assert executed == []


def test_every_problem_of_every_file_is_told_before_the_first_starts(project: Path, executed: list) -> None:
    write_params(project, **{"01_first": "run: one", "02_second": "m: 3\nn: '7'", "03_thrid": "", "04_x": "- a"})
    (project / "params" / "demo" / "05_y.yml").touch()
    with pytest.raises(ConfigError) as caught:
        run_folder(project / "params" / "demo", {"dmis": "[1]"})
    assert str(caught.value).splitlines() == [
        "n='7' in params/demo/02_second.yaml: must be a number, and this is text: write 7 without quotes",
        "unknown parameter 'm' in params/demo/02_second.yaml: must be one of experiment, run, n, lr, dims",
        f"{project}/params/demo/03_thrid.yaml: no notebook of that name; must be one of 01_first, 02_second",
        f"{project}/params/demo/04_x.yaml: no notebook of that name; must be one of 01_first, 02_second",
        f"{project}/params/demo/05_y.yml: must end in .yaml",
        "unknown parameter 'dmis': did you mean 'dims'?",
    ]
    assert executed == [] and not (project / "outputs").exists()


def test_a_notebook_is_suggested(project: Path) -> None:
    (project / "params" / "demo" / "02_secnod.yaml").touch()
    with pytest.raises(ConfigError, match="02_secnod.yaml: no notebook of that name; did you mean '02_second'?"):
        plan(project / "params" / "demo", {})


def test_a_run_of_another_configuration_stops_before_the_first_starts(project: Path, executed: list) -> None:
    begun = open_run({"experiment": "demo", "run": "two", "n": 1, "lr": 0.5, "dims": [1]})
    (begun.path / "metrics.csv").touch()
    with pytest.raises(RunError, match="demo/two holds a run of another configuration:\n  lr: 0.5 there, 0.1 here\n"):
        run_folder(project / "params" / "demo", {})
    assert executed == []


def test_a_folder_outside_of_any_project(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "01_first.yaml").touch()
    with pytest.raises(ConfigError, match=f"{elsewhere}: lies in no project, .*: move it into params/"):
        plan(elsewhere, {})


def test_no_such_folder_and_an_empty_one(project: Path) -> None:
    with pytest.raises(ConfigError, match="params/dmo: no such folder of parameter files"):
        plan(Path("params/dmo"), {})
    (project / "params" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"params/empty: holds no parameter files \(<notebook>.yaml\)"):
        plan(Path("params/empty"), {})


# --- the order of things, without kernels ---


def test_all_notebooks_run_in_order_and_a_second_time_none(
    project: Path, executed: list[Task], capsys: pytest.CaptureFixture
) -> None:
    assert run_folder(project / "params" / "demo", {}) == 0
    assert [task.notebook.stem for task in executed] == ["01_first", "02_second"]
    outputs = project / "outputs" / "demo"
    assert (outputs / "one" / "01_first.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert f"look at {outputs}/*/*.html" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    assert run_folder(project / "params" / "demo", {}) == 0
    assert len(executed) == 2, "a finished notebook ran again"
    assert {path: path.stat().st_mtime_ns for path in outputs.rglob("*")} == before
    assert f"01_first: finished on {time.strftime('%Y-%m-%d')}" in (out := capsys.readouterr().out)
    assert f"left as it is ({outputs}/one)" in out


def test_a_failure_stops_before_the_next(project: Path, executed: list, capsys: pytest.CaptureFixture) -> None:
    write_params(project, **{"01_first": "run: one\nn: 13"})
    assert run_folder(project / "params" / "demo", {}) == 1
    assert [task.notebook.stem for task in executed] == ["01_first"]
    out = capsys.readouterr().out
    assert "01_first: FAILED after 0:0" in out and "ValueError in cell [3]: 13" in out
    assert f"executed notebook: {project}/outputs/demo/one/01_first.ipynb" in out
    assert not (project / "outputs" / "demo" / "one" / "01_first.html").exists()
    assert describe_run(project / "outputs" / "demo" / "one")["state"] == "failed ValueError in cell [3]: 13"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_before_the_next(
    number: int, code: int, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    started = []

    def stopped(task: Task, *_: Any) -> str:
        started.append(task)
        os.kill(os.getpid(), number)
        return "DeadKernelError"

    monkeypatch.setattr(batch, "execute", stopped)
    assert run_folder(project / "params" / "demo", {}) == code
    assert len(started) == 1
    name = signal.Signals(number).name
    assert f"01_first: stopped by {name}; run the same command again to go on" in capsys.readouterr().out


def test_a_kernel_that_was_preempted_alone_asks_to_be_run_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(batch, "execute", lambda *_: "Preempted in cell [4]: 75")
    assert run_folder(project / "params" / "demo", {}) == 75
    assert "stopped by a signal to its kernel; run the same command again" in capsys.readouterr().out


def test_outputs_belong_to_the_project_of_the_parameters(
    project: Path, executed: list, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when called from elsewhere, and kernels get the same absolute folder."""
    monkeypatch.delenv("WORKBENCH_OUTPUTS")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert run_folder(project / "params" / "demo", {}) == 0
    assert (project / "outputs" / "demo" / "one" / "summary.json").exists()
    assert os.environ["WORKBENCH_OUTPUTS"] == str(project / "outputs")


def test_lines_for_a_terminal_and_for_a_log(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "21")
    batch._terminal_line("02_train_vae  0:10  training 5/9")
    assert capsys.readouterr().err == "\r\033[K02_train_vae  0:10  "
    now = 100.0
    monkeypatch.setattr(batch.time, "monotonic", lambda: now)
    show = batch._log_line()
    for _ in range(50):
        now += 1
        show(f"at {now:.0f}")
    assert capsys.readouterr().err == "at 120\nat 140\n"


def test_what_the_kernel_reports_is_shown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import threading

    shown, done, path = [], threading.Event(), project / "status.json"
    monkeypatch.setattr(batch, "REFRESH_SECONDS", 0.01)
    status = {"state": "running", "updated": time.time() + 5, "what": "training", "done": 5, "total": 9}
    path.write_text(json.dumps(status | {"figures": "mse 0.5", "seconds_left": 61.0}))
    watcher = threading.Thread(target=batch._watch, args=(path, "02", done, shown.append))
    watcher.start()
    while not shown:
        time.sleep(0.01)
    done.set()
    watcher.join()
    assert shown[0] == "02  0:00  training 5/9 mse 0.5  1:01 left"


# --- with kernels ---


@pytest.mark.slow
def test_notebooks_are_executed(project: Path, capfd: pytest.CaptureFixture) -> None:
    check = """
import json, os
from ipykernel.connect import get_connection_info
connection = json.loads(get_connection_info())
folder = os.path.dirname(connection["ip"])
print("transport", connection["transport"], oct(os.stat(folder).st_mode)[-3:], folder)
print("values", n, lr, dims, "in", os.getcwd())
"""
    write_notebook(project, "01_first", OPEN.format(name="01_first"), check, "this_run.finish(n=float(n))")
    write_notebook(project, "02_second", "1 / 0", "print('never')")
    assert run_folder(project / "params" / "demo", {"lr": "1e-4", "dims": "[3, 4]"}) == 1
    out, errors = capfd.readouterr()
    assert "ZeroDivisionError in cell [3]: division by zero" in out
    assert f"executed notebook: {project}/outputs/demo/two/02_second.ipynb" in out
    assert "WARNING" not in errors and "Traceback" not in errors
    first = Run(project / "outputs" / "demo" / "one")
    assert first.finished and first.config["parameters"]["lr"] == 1e-4
    page = (first.path / "01_first.html").read_text()
    assert f"values 5 0.0001 [3, 4] in {project}" in page
    text = next(line for line in page.splitlines() if line.startswith("transport ") or ">transport " in line)
    transport, mode, folder = text[text.index("transport ") :].split()[1:4]
    assert (transport, mode) == ("ipc", "700"), "other users could reach the kernel"
    assert not Path(folder).exists(), "the sockets were left behind"
    second = nbformat.read(project / "outputs" / "demo" / "two" / "02_second.ipynb", 4)
    assert [output["ename"] for cell in second.cells for output in cell.get("outputs", []) if "ename" in output] == [
        "ZeroDivisionError"
    ]


def test_an_idle_kernel_is_not_interrupted_before_its_shutdown() -> None:
    """It would print `KeyboardInterrupt caught in kernel` now and then."""
    kernel = LocalKernel(kernel_name="python3")
    with pytest.raises(RuntimeError, match="No kernel is running"):
        asyncio.run(kernel._async_interrupt_kernel())
    kernel.shutting_down = True
    asyncio.run(kernel._async_interrupt_kernel())
    kernel.cleanup_ipc_files()


@pytest.mark.slow
def test_a_kernel_that_dies_is_an_error(project: Path) -> None:
    write_notebook(project, "01_first", "import os; os._exit(9)", "print('never')")
    task = plan(project / "params" / "demo", {})[0]
    assert execute(task, project / "out.ipynb", project).startswith("the kernel died: ")


TRAIN = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import time, torch
import tiny
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit
torch.set_num_threads(1)
config = TrainConfig(**tiny.QUICK | tiny.SETTINGS)
images = tiny.Images(tiny.N, on_batch=lambda number: time.sleep(lr))
"""
FIT = """
model = fit(tiny.conv_vae(), "conv_vae", images, tiny.Images(12, seed=1), config, this_run, vae_weights(config))
this_run.finish()
"""


def command(project: Path, *arguments: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "workbench", "run", "params/demo", *arguments]
    environment = os.environ | {"WORKBENCH_OUTPUTS": str(project / "outputs")}
    return subprocess.Popen(line, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    pytest.fail("it did not come to that in a minute")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_training_that_is_stopped_goes_on_and_ends_as_undisturbed(
    number: int, code: int, project: Path, one_thread: None
) -> None:

    write_notebook(project, "01_first", OPEN.format(name="01_first"), TRAIN, FIT)
    (project / "params" / "demo" / "02_second.yaml").unlink()
    process, run = command(project, "-p", "lr=0.2"), Run(project / "outputs" / "demo" / "one")
    until((run.path / "metrics.csv").exists, process)
    kernels = psutil.Process(process.pid).children()
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    _, alive = psutil.wait_procs(kernels, timeout=20)
    assert kernels and not alive, "the kernel was left behind"
    assert not run.trained and not run.finished
    step = load_checkpoint(run.path / "checkpoints" / "last.ckpt")["step"]
    assert step < tiny.STEPS and (step > 0 or number == signal.SIGKILL)
    process = command(project, "-p", "lr=0.2")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert f"resumed {run.path}/checkpoints/last.ckpt at step {step}" in (run.path / "01_first.ipynb").read_text()
    expected, _ = tiny.train(project / "undisturbed")
    assert (run.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    assert tiny.metrics(run) == tiny.metrics(expected)
