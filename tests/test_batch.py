import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import tiny
from nbformat.v4 import new_notebook
from projects import KERNEL, OPEN, PARAMETERS, REPORT, SEED, make_project, make_sweep, write_notebook, write_params

from workbench import batch, runs
from workbench.batch import run_folders
from workbench.checkpoints import load_checkpoint
from workbench.config import ConfigError
from workbench.datasets.threads import usable_cores
from workbench.listing import describe_run
from workbench.paths import outputs_root
from workbench.progress import write_status
from workbench.runs import Run, RunError, open_run
from workbench.tasks import Task, plan

TESTS = Path(__file__).parent


def run_folder(folder: Path, overrides: dict[str, str], **asked: Any) -> int:
    return run_folders([folder], overrides, **asked)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_project(tmp_path, monkeypatch)


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


# --- everything is checked before anything starts ---


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


def test_a_run_of_another_configuration_stops_before_the_first_starts(project: Path, executed: list) -> None:
    begun = open_run({"experiment": "demo", "run": "two", "n": 1, "lr": 0.5, "dims": [1]})
    (begun.path / "metrics.csv").touch()
    with pytest.raises(RunError, match="demo/two holds a run of another configuration:\n  lr: 0.5 there, 0.1 here\n"):
        run_folder(project / "params" / "demo", {})
    assert executed == []


# --- the order of things, without kernels ---


def test_all_notebooks_run_in_order_and_a_second_time_none(
    project: Path, executed: list[Task], capsys: pytest.CaptureFixture
) -> None:
    assert run_folder(project / "params" / "demo", {}) == 0
    assert [task.notebook.stem for task in executed] == ["01_first", "02_second"]
    outputs = project / "outputs" / "demo"
    assert (outputs / "one" / "01_first.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert f"look at {outputs}/*/*.html" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*") if path.name != "run.lock"}
    assert run_folder(project / "params" / "demo", {}) == 0
    assert len(executed) == 2, "a finished notebook ran again"
    assert {path: path.stat().st_mtime_ns for path in outputs.rglob("*") if path.name != "run.lock"} == before
    assert f"01_first: finished on {time.strftime('%Y-%m-%d')}" in (out := capsys.readouterr().out)
    assert f"left as it is ({outputs}/one)" in out


def test_a_notebook_that_was_cut_short_is_executed_again(project: Path, executed: list[Task]) -> None:
    """As by a full disk, after its run was finished."""
    assert run_folder(project / "params" / "demo", {}) == 0
    folder = outputs_root() / "demo" / "two"
    (folder / "02_second.html").unlink()
    whole = (folder / "02_second.ipynb").read_text()
    for rest in ("", whole[: len(whole) // 2]):
        (folder / "02_second.ipynb").write_text(rest)
        executed.clear()
        assert run_folder(project / "params" / "demo", {}) == 0
        assert [task.name for task in executed] == ["02_second"] and (folder / "02_second.html").exists()
        (folder / "02_second.html").unlink()


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


def test_what_a_signal_ended_in_the_middle_may_begin_with_other_parameters_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> str:
        write_status("running", what="decoding", done=1, total=9)
        os.kill(os.getpid(), signal.SIGINT)
        return "the kernel died"

    monkeypatch.setattr(batch, "execute", stopped)
    assert run_folder(project / "params" / "demo", {}) == 130
    assert describe_run(outputs_root() / "demo" / "one")["state"] == "stopped decoding 1/9"
    assert plan(project / "params" / "demo", {"lr": "0.7"})[0].resolved["lr"] == 0.7


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
    shown, done, path = [], threading.Event(), project / "status.json"
    monkeypatch.setattr(batch, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(batch.time, "monotonic", lambda: 100.0)
    status = {"state": "running", "updated": time.time() + 5, "what": "training", "done": 5, "total": 9}
    path.write_text(json.dumps(status | {"figures": "mse 0.5", "seconds_left": 61.0}))
    watcher = threading.Thread(target=batch._watch, args=(path, "02", done, shown.append))
    watcher.start()
    while not shown:
        time.sleep(0.01)
    done.set()
    watcher.join()
    assert shown[0] == "02  0:00  training 5/9 mse 0.5  1:01 left"


# --- several points, without kernels ---


def test_every_point_is_executed_and_a_failure_ends_its_own_only(
    project: Path, executed: list[Task], capsys: pytest.CaptureFixture
) -> None:
    assert run_folder(project / "params" / "demo", {}, grid=["n=12,13,14"]) == 1
    names = ["n=12/01_first", "n=12/02_second", "n=13/01_first", "n=14/01_first", "n=14/02_second"]
    assert [task.name for task in executed] == names
    folder = outputs_root() / "demo"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "1 of 6 runs failed; the same command tries them again:",
        f"  n=13/01_first: ValueError in cell [3]: 13 ({folder}/n=13/one/01_first.ipynb)",
    ]
    assert run_folder(project / "params" / "demo", {}, grid=["n=14,15"]) == 0
    assert [task.name for task in executed[5:]] == ["n=15/01_first", "n=15/02_second"], "what is finished ran again"
    assert f"look at {folder}/*/*/*.html" in capsys.readouterr().out


def test_several_folders_are_executed_in_order(project: Path, executed: list[Task]) -> None:
    (project / "params" / "other").mkdir()
    (project / "params" / "other" / "01_first.yaml").write_text("run: one")
    assert run_folders([project / "params" / name for name in ("other", "demo")], {}) == 0
    assert [task.name for task in executed] == ["other/01_first", "demo/01_first", "demo/02_second"]
    with pytest.raises(ConfigError, match="^--jobs 2: .*other .*params/demo has no settings.yaml: .*; leave it out"):
        run_folders([project / "params" / name for name in ("other", "demo")], {}, jobs=2)


def test_folders_of_two_projects_are_refused(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("notebooks", "params/demo"):
        (elsewhere / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="lie in different projects: run them one by one"):
        run_folders([project / "params" / "demo", elsewhere / "params" / "demo"], {})


def test_two_processes_at_one_experiment_are_one_too_many(project: Path, executed: list) -> None:
    folder = outputs_root() / "demo"
    folder.mkdir(parents=True)
    for grid in ([], ["n=1,2"]):
        with Run(folder).lock(), pytest.raises(RunError, match=f"^{folder} is in use by process {os.getpid()} on "):
            run_folder(project / "params" / "demo", {}, grid=grid)
    assert executed == []


# --- sweeps, without kernels ---


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parameter folder of a sweep; each record of the time is a second after the one before."""
    seconds = count()
    monkeypatch.setattr(runs, "now", lambda: (datetime(2025, 1, 1) + timedelta(seconds=next(seconds))).isoformat())
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # else as many go on at one time
    return make_sweep(tmp_path, monkeypatch) / "params" / "demo"


class Pretended:
    """What was executed, and how each ends: by name an error, or something to do first."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.ends: dict[str, str | Callable[[], str]] = {}

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def __call__(self, task: Task, output: Path, root: Path) -> str:
        self.tasks.append(task)
        nbformat.write(new_notebook(metadata=KERNEL), output)
        end = self.ends.get(task.name, "")
        error = end if isinstance(end, str) else end()
        if not error:
            Run(output.parent).finish()
        return error


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    execute = Pretended()
    monkeypatch.setattr(batch, "execute", execute)
    return execute


def test_a_sweep_runs_between_the_others_and_a_second_time_nothing(sweep: Path, pretended: Pretended) -> None:
    assert run_folder(sweep, {}, seeds=2) == 0
    assert pretended.names == ["01_first", "V1-0", "V2-0", "V1-1", "V2-1", "06_report"]
    assert (outputs_root() / "demo" / "V2-1" / "02_train.html").exists()
    pretended.tasks.clear()
    assert run_folder(sweep, {}, seeds=2) == 0
    assert pretended.names == []
    assert run_folder(sweep, {}, seeds=3) == 0
    assert pretended.names == ["V1-2", "V2-2", "06_report"], "more seeds: a report on all of them"
    assert (outputs_root() / "demo" / "report.1" / "summary.json").exists()


def test_a_failed_run_stops_no_other_and_is_tried_again(
    sweep: Path, pretended: Pretended, capsys: pytest.CaptureFixture
) -> None:
    pretended.ends = {"V1-0": "ValueError in cell [3]: 13\nmore of it"}
    assert run_folder(sweep, {}, seeds=2) == 1
    assert pretended.names == ["01_first", "V1-0", "V2-0", "V1-1", "V2-1", "06_report"]
    place = outputs_root() / "demo" / "V1-0"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "1 of 6 runs failed; the same command tries them again:",
        f"  V1-0: ValueError in cell [3]: 13 ({place}/02_train.ipynb)",
    ]
    assert describe_run(place)["state"] == "failed ValueError in cell [3]: 13"
    pretended.tasks.clear()
    assert run_folder(sweep, {}, seeds=2) == 1
    assert pretended.names == ["V1-0"], "the report knows of the failure already"
    pretended.tasks.clear()
    pretended.ends = {}
    assert run_folder(sweep, {}, seeds=2) == 0
    assert pretended.names == ["V1-0", "06_report"]
    kept = outputs_root() / "demo" / "report.1"
    assert f"06_report: made anew, as its runs have changed; the old one is kept in {kept}" in capsys.readouterr().out


def test_whatever_happens_to_a_run_stops_no_other(
    sweep: Path, pretended: Pretended, capsys: pytest.CaptureFixture
) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device")

    pretended.ends = {"V1-0": full}
    assert run_folder(sweep, {}) == 1
    assert pretended.names == ["01_first", "V1-0", "V2-0", "06_report"]
    assert f"  V1-0: {outputs_root()}/demo/V1-0: the disk is full (" in capsys.readouterr().out
    config = outputs_root() / "demo" / "V2-0" / "config.json"
    source = {"run": "gone", "file": "model.safetensors", "weights": "ab"}
    runs.write_json(config, runs.read_json(config) | {"source": source})
    pretended.ends = {}
    assert run_folder(sweep, {}) == 1
    assert pretended.names[4:] == ["V1-0", "06_report"]
    assert f"  V2-0: {config.parent} was computed from other weights" in capsys.readouterr().out


def test_a_failure_before_the_sweep_stops_it(sweep: Path, pretended: Pretended) -> None:
    pretended.ends = {"01_first": "ValueError in cell [3]: 13"}
    assert run_folder(sweep, {}) == 1
    assert pretended.names == ["01_first"]


def test_as_many_runs_go_on_at_one_time_as_there_are_jobs(
    sweep: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until another is there, and has a device that no other one has meanwhile."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    both = threading.Barrier(2, timeout=120)

    def meet() -> str:
        return "" if both.wait() < 2 else "three"

    pretended.ends = {f"V{i}-{seed}": meet for i in (1, 2) for seed in range(3)}
    assert run_folder(sweep, {}, seeds=3) == 0
    runs_of_sweep = [task for task in pretended.tasks if task.kind == "swept"]
    assert len(runs_of_sweep) == 6
    for pair in zip(runs_of_sweep[::2], runs_of_sweep[1::2], strict=True):
        assert sorted(task.environment["CUDA_VISIBLE_DEVICES"] for task in pair) == ["0", "1"]
    files = {task.name: task.environment["WORKBENCH_STATUS"] for task in runs_of_sweep}
    assert files == {name: str(outputs_root() / "demo" / name / "status.json") for name in files}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_a_sweep(
    number: int, code: int, sweep: Path, pretended: Pretended, capsys: pytest.CaptureFixture
) -> None:
    def stopped() -> str:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        return "DeadKernelError"

    pretended.ends = {"V2-0": stopped}
    assert run_folder(sweep, {}, seeds=3) == code
    assert pretended.names == ["01_first", "V1-0", "V2-0"]
    name = signal.Signals(number).name
    assert f"V2-0: stopped by {name}; run the same command again to go on" in capsys.readouterr().out
    pretended.ends = {}
    assert run_folder(sweep, {}, seeds=3) == 0
    assert pretended.names[3:] == ["V2-0", "V1-1", "V2-1", "V1-2", "V2-2", "06_report"]


def test_a_run_that_was_preempted_alone_holds_up_the_report_only(sweep: Path, pretended: Pretended) -> None:
    pretended.ends = {"V1-0": "Preempted in cell [4]: 75"}
    assert run_folder(sweep, {}) == 75
    assert pretended.names == ["01_first", "V1-0", "V2-0"]


def test_two_processes_at_one_sweep_are_one_too_many(sweep: Path, pretended: Pretended) -> None:
    folder = outputs_root() / "demo"
    folder.mkdir(parents=True)
    with Run(folder).lock(), pytest.raises(RunError, match=f"^{folder} is in use by process {os.getpid()} on "):
        run_folder(sweep, {})
    assert pretended.names == []


def test_outputs_that_cannot_be_written(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(sweep / "settings.yaml"))
    rule = "choose another outputs folder with the environment variable WORKBENCH_OUTPUTS, change its permissions, or"
    with pytest.raises(RunError, match=rf"settings.yaml/demo cannot be written \(.*\): {rule}"):
        run_folder(sweep, {})


def test_the_line_of_a_sweep_tells_of_every_run_that_goes_on(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task for task in plan(sweep, {}, seeds=2) if task.kind == "swept"]
    runner = batch.SweepRunner(tasks, sweep.parents[1], [{}], [])
    monkeypatch.setattr(batch.time, "monotonic", lambda: 100.0)
    for task in tasks[:2]:
        runner.going[Future()] = batch.Execution(task, open_run(task.resolved), {}, started=100.0)
        runner.waiting.popleft()
    runner.waiting.pop()
    status = {"state": "running", "updated": time.time() + 5, "what": "training", "done": 5, "total": 9}
    (outputs_root() / "demo" / "V2-0" / "status.json").write_text(json.dumps(status | {"seconds_left": 61.0}))
    assert runner._line() == "1/4 runs  |  V1-0  0:00  |  V2-0  0:00  training 5/9   1:01 left"


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
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    pytest.fail("it did not come to that in five minutes")


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
    out, _ = process.communicate(timeout=180)
    assert process.returncode == code, out
    _, alive = psutil.wait_procs(kernels, timeout=60)
    assert kernels and not alive, "the kernel was left behind"
    assert not run.trained and not run.finished
    step = load_checkpoint(run.path / "checkpoints" / "last.ckpt")["step"]
    assert step < tiny.STEPS and (step > 0 or number == signal.SIGKILL)
    process = command(project, "-p", "lr=0.2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert f"resumed {run.path}/checkpoints/last.ckpt at step {step}" in (run.path / "01_first.ipynb").read_text()
    expected, _ = tiny.train(project / "undisturbed")
    assert (run.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    assert tiny.metrics(run) == tiny.metrics(expected)


FILL = """
def fill(number):
    if number != 7 or (this_run.path.parent / "filler").exists():
        return
    with (this_run.path.parent / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1000))
        except OSError:
            pass
images.on_batch = fill
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
def test_on_a_full_disk_a_run_says_so_and_goes_on_once_there_is_room(
    project: Path, one_thread: None, capsys: pytest.CaptureFixture
) -> None:
    write_notebook(project, "01_first", OPEN.format(name="01_first"), TRAIN, FILL, FIT)
    (project / "params" / "demo" / "02_second.yaml").unlink()
    disk = outputs_root()
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5M", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        assert run_folder(project / "params" / "demo", {"lr": "0.0"}) == 1
        run = Run(disk / "demo" / "one")
        rule = "a run needs room for its checkpoints: make some, or choose another outputs folder with"
        assert f"  01_first: {run.path}: the disk is full (0 MB free); {rule}" in capsys.readouterr().out
        assert 0 < load_checkpoint(run.path / "checkpoints" / "last.ckpt")["step"] < tiny.STEPS
        (disk / "demo" / "filler").write_bytes(b"")
        assert run_folder(project / "params" / "demo", {"lr": "0.0"}) == 0
        assert "resumed" in (run.path / "01_first.ipynb").read_text()
        expected, _ = tiny.train(project / "undisturbed")
        assert (run.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
        assert tiny.metrics(run) == tiny.metrics(expected)
    finally:
        subprocess.run(["umount", disk], check=True)


SHOW = """
import os
from pathlib import Path
print("in", os.getcwd(), os.environ["OMP_NUM_THREADS"], Path(os.environ["WORKBENCH_STATUS"]).parent.name)
"""


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_side_by_side(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    project, folder = make_sweep(tmp_path, monkeypatch), tmp_path / "outputs" / "demo"
    cells = (
        SHOW,
        OPEN.format(name="02_train"),
        TRAIN,
        FIT.replace("this_run.finish", "assert lr < 0.25; this_run.finish"),
    )
    write_notebook(project, "02_train", *cells, parameters=PARAMETERS + SEED)
    report = "print('of', [name for name in runs if (this_run.path.parent / name / 'summary.json').exists()])"
    opened = OPEN.format(name="06_report").replace("workbench import parameters, runs", "workbench import parameters")
    opened = opened.replace("this_run = runs.", "from workbench.runs import open_run\nthis_run = ")
    write_notebook(project, "06_report", opened, report, "this_run.finish()", parameters=REPORT)
    write_params(project, settings="notebook: 02_train\nsettings: {V1: {lr: 0.2}, V2: {lr: 0.3}}")
    runs_of_sweep = [Run(folder / name) for name in ("V1-0", "V2-0")]
    process = command(project, "--jobs", "2")
    until(lambda: all((run.path / "metrics.csv").exists() for run in runs_of_sweep), process)
    kernels = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 130, out
    assert len(kernels) == 2 and not psutil.wait_procs(kernels, timeout=60)[1], "a kernel was left behind"
    steps = [load_checkpoint(run.path / "checkpoints" / "last.ckpt")["step"] for run in runs_of_sweep]
    assert all(0 < step < tiny.STEPS for step in steps) and not (folder / "report").exists()
    process = command(project, "--jobs", "2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "  V2-0: AssertionError in cell [6]: " in out and "1 of 4 runs failed" in out
    for run, step in zip(runs_of_sweep, steps, strict=True):
        executed = (run.path / "02_train.ipynb").read_text()
        assert f"resumed {run.path}/checkpoints/last.ckpt at step {step}" in executed
        assert f"in {project} {max(1, usable_cores() // 2)} {run.path.name}" in executed
    assert "of ['V1-0']" in (folder / "report" / "06_report.ipynb").read_text()
    expected, _ = tiny.train(project / "undisturbed")
    assert (runs_of_sweep[0].path / "model.safetensors").read_bytes() == (
        expected.path / "model.safetensors"
    ).read_bytes()
