import os
import platform
import signal
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_notebook
from projects import KERNEL, make_project

from workbench import batch, node_tasks
from workbench.listing import describe_run
from workbench.node_tasks import IN_USE_SECONDS, on_node, place_worker
from workbench.paths import outputs_root
from workbench.runs import Run, open_run, read_json, write_json
from workbench.tasks import Task, plan


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Two notebooks, in a process that looks like a worker."""
    project = make_project(tmp_path, monkeypatch)
    for name, value in {"PARSL_WORKER_POOL_ID": "p1", "PARSL_WORKER_COUNT": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORKBENCH_LEAVING", str(tmp_path / "leaving"))
    return plan(project / "params" / "demo", {})


def ends(monkeypatch: pytest.MonkeyPatch, *errors: str) -> list[str]:
    """Let executions end with these errors, one after the other; what each run's state was meanwhile."""
    states, left = [], list(errors)

    def pretend(task: Task, output: Path, root: Path) -> str:
        nbformat.write(new_notebook(metadata=KERNEL), output)
        states.append(describe_run(output.parent)["state"])
        error = left.pop(0)
        if not error:
            Run(output.parent).finish()
        return error

    monkeypatch.setattr(batch, "execute", pretend)
    return states


def ended(tasks: list[Task]) -> Any:
    return on_node(tasks, Path.cwd(), str(outputs_root()))


def test_notebooks_are_executed_in_order_and_say_that_they_run(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ends(monkeypatch, "", "ValueError in cell [3]: 13")
    outcome = ended(tasks)
    assert (outcome.code, outcome.node, outcome.pool) == (1, platform.node(), "p1") and not outcome.leaving
    path = outputs_root() / "demo" / "two"
    assert outcome.failure == f"02_second: ValueError in cell [3]: 13 ({path}/02_second.ipynb)"
    assert states[0] == "running" and outcome.seconds > 0
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    ends(monkeypatch, "")
    assert (ended(tasks).code, ended(tasks).node) == (0, "n7")


def test_what_was_preempted_no_longer_says_that_it_runs(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    ends(monkeypatch, "Preempted in cell [4]: 75")
    outcome = ended(tasks)
    assert (outcome.code, outcome.failure, outcome.leaving) == (75, "", False)
    assert describe_run(outputs_root() / "demo" / "one")["state"] == "stopped"


def test_what_a_failure_before_it_kept_from_beginning_does_not_say_that_it_runs(
    tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(monkeypatch, "")
    assert ended(tasks[:1]).code == 0
    config = outputs_root() / "demo" / "one" / "config.json"
    write_json(config, read_json(config) | {"source": {"run": "gone", "file": "model.safetensors", "weights": "ab"}})
    assert "one was computed from other weights" in ended(tasks).failure
    assert describe_run(outputs_root() / "demo" / "two")["state"] == "stopped"


def test_an_interrupt_from_the_scheduler_is_no_failure(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "KeyboardInterrupt in cell [4]: "

    monkeypatch.setattr(batch, "execute", interrupted)
    assert ended(tasks).code == 75


def test_a_node_that_has_been_told_to_stop_begins_nothing(tasks: list[Task], tmp_path: Path) -> None:
    (tmp_path / "leaving").touch()
    outcome = ended(tasks)
    assert (outcome.code, outcome.seconds, outcome.leaving) == (75, 0.0, True)
    assert not outputs_root().exists()


def test_a_site_may_have_another_launcher(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_LEAVING")
    ends(monkeypatch, "", "")
    assert (ended(tasks).code, ended(tasks).leaving) == (0, False)


def test_a_run_that_somebody_trains_is_waited_for(tasks: list[Task]) -> None:
    run = open_run(tasks[1].resolved)
    with run.lock():
        outcome = ended(tasks)
    assert (outcome.code, outcome.seconds, outcome.later) == (75, 0.0, IN_USE_SECONDS)
    assert outcome.failure.startswith(f"{run.path} is in use by process {os.getpid()} on ")


def test_a_run_of_another_configuration_is_a_failure(tasks: list[Task]) -> None:
    begun = open_run(tasks[0].resolved | {"n": 99})
    (begun.path / "metrics.csv").touch()
    outcome = ended(tasks)
    assert outcome.code == 1
    assert outcome.failure.startswith(f"01_first: RunError: {begun.path} holds a run of another configuration:\n  n: ")


@pytest.mark.parametrize(
    ("granted", "pinned", "expected"),
    [
        ("2,3", "1", "3"),
        ("1", "0", "1"),
        ("GPU-a,GPU-b", "0", "GPU-a"),
        ("", "1", "1"),
        ("0", "GPU-a", "GPU-a"),
        ("4,5,6", "1,2", "5,6"),
    ],
)
def test_a_worker_gets_one_of_the_devices_that_the_scheduler_granted(granted: str, pinned: str, expected: str) -> None:
    """Parsl counts them from 0, whichever the job has."""
    there = {"WORKBENCH_GRANTED_DEVICES": granted, "CUDA_VISIBLE_DEVICES": pinned, "PARSL_WORKER_COUNT": "2"}
    for _ in range(2):
        place_worker(there)
        assert there["CUDA_VISIBLE_DEVICES"] == expected


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_tasks, "usable_cores", lambda: 7)
    for given, expected in (
        ({"PARSL_WORKER_COUNT": "3"}, "2"),
        ({"PARSL_WORKER_COUNT": "9"}, "1"),
        ({"PARSL_WORKER_COUNT": "3", "PARSL_CORES": "32"}, "10"),
        ({"PARSL_WORKER_COUNT": "3", "OMP_NUM_THREADS": "5"}, "5"),
    ):
        place_worker(given)
        assert given["OMP_NUM_THREADS"] == expected and "CUDA_VISIBLE_DEVICES" not in given
