from concurrent.futures import Future
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_notebook
from parsl.executors.errors import BadStateException
from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost
from parsl.jobs.errors import TooManyJobFailuresError
from projects import KERNEL, make_project, make_sweep, write_params

from workbench import dispatch, runs
from workbench.dispatch import Chain, Dispatcher
from workbench.node_tasks import Outcome
from workbench.progress import write_status
from workbench.runs import RunError, open_run
from workbench.tasks import plan_points


class Cluster:
    """Stands for Parsl: what was queued, in order, and the means to end it."""

    def __init__(self, project: Path, **asked: object) -> None:
        self.queued: list[tuple[Chain, Future]] = []
        self.held: list[str] = []
        self.said: list[str] = []
        points = plan_points([project / "params" / "demo"], {}, **asked)
        self.dispatcher = Dispatcher(points, self.submit, self.held.append, self.said.append)
        self.step()

    def submit(self, chain: Chain) -> Future:
        self.queued.append((chain, Future()))
        return self.queued[-1][1]

    def step(self) -> list[str]:
        """Let the dispatcher go on; what it queues meanwhile."""
        before = len(self.queued)
        self.dispatcher.step()
        self.dispatcher.step()
        return [chain.name for chain, _ in self.queued[before:]]

    def end(self, name: str, how: Outcome | Exception | None = None) -> list[str]:
        """End what is called so, well where nothing else is said; what is queued thereupon."""
        chain, future = next((c, f) for c, f in self.queued if c.name == name and not f.done())
        if how is None:
            for task in chain.tasks:
                run = open_run(task.resolved)
                nbformat.write(new_notebook(metadata=KERNEL), run.path / task.notebook.name)
                run.finish()
        if isinstance(how, Exception):
            future.set_exception(how)
        else:
            future.set_result(how or Outcome(0, "", "n1", "p1", 9.0))
        return self.step()


def stopped(seconds: float = 99.0, **more: object) -> Outcome:
    return Outcome(75, "", "n1", "p1", seconds, later=0.0, **more)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dispatch, "BUSY_SECONDS", 0.0)
    return make_project(tmp_path, monkeypatch)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep; each record of the time is a second after the one before."""
    seconds = count()
    monkeypatch.setattr(runs, "now", lambda: (datetime(2025, 1, 1) + timedelta(seconds=next(seconds))).isoformat())
    return make_sweep(tmp_path, monkeypatch)


def test_the_notebooks_of_a_point_are_one_task_and_all_points_are_queued_at_once(project: Path) -> None:
    cluster = Cluster(project, grid=["n=1,2"])
    assert [chain.name for chain, _ in cluster.queued] == ["n=1/01_first to 02_second", "n=2/01_first to 02_second"]
    cluster.end("n=1/01_first to 02_second")
    assert not cluster.dispatcher.over
    cluster.end("n=2/01_first to 02_second")
    assert cluster.dispatcher.over and cluster.dispatcher.failures == []
    assert cluster.said[0] == "n=1/01_first to 02_second: done on n1"
    assert Cluster(project, grid=["n=2,1"]).dispatcher.over, "what is finished is left alone"
    assert [chain.name for chain, _ in Cluster(project, grid=["n=1,3"]).queued] == ["n=3/01_first to 02_second"]


def test_a_sweep_waits_for_what_is_before_it_and_the_report_for_the_sweep(sweep: Path) -> None:
    cluster = Cluster(sweep, seeds=2)
    assert [chain.name for chain, _ in cluster.queued] == ["01_first"]
    assert cluster.end("01_first") == ["V1-0", "V2-0", "V1-1", "V2-1"]
    assert cluster.end("V2-0") == cluster.end("V1-0", Outcome(1, "V1-0: 13", "n1", "p1")) == cluster.end("V1-1") == []
    assert cluster.end("V2-1") == ["06_report"], "a failed run does not hold up the report"
    cluster.end("06_report")
    assert cluster.dispatcher.over and cluster.dispatcher.failures == ["V1-0: 13"]
    again = Cluster(sweep, seeds=2)
    assert [chain.name for chain, _ in again.queued] == ["V1-0"]
    assert again.end("V1-0") == ["06_report"], "the report is made anew"


def test_a_failure_leaves_out_what_follows_in_its_point_only(sweep: Path) -> None:
    cluster = Cluster(sweep, grid=["n=1,2"])
    assert cluster.end("n=1/01_first", Outcome(1, "n=1/01_first: ValueError", "n1", "p1")) == []
    assert cluster.end("n=2/01_first") == ["n=2/V1-0", "n=2/V2-0"]
    assert cluster.dispatcher.failures == ["n=1/01_first: ValueError"]
    assert cluster.dispatcher.lines()[0] == "1 failed, 1 finished, 3 left out, 3 waiting"


def test_what_its_node_had_to_stop_is_queued_again_and_the_node_gets_nothing_more(project: Path) -> None:
    cluster = Cluster(project)
    name = "01_first to 02_second"
    assert cluster.end(name, stopped()) == [name] and cluster.held == []
    for _ in range(20):
        assert cluster.end(name, stopped(0.0, leaving=True)) == [name]
    assert cluster.held == ["p1"], "told once"
    cluster.end(name)
    assert cluster.dispatcher.over and cluster.dispatcher.failures == []


def test_what_is_stopped_at_once_again_and_again_is_given_up(project: Path) -> None:
    cluster = Cluster(project)
    name = "01_first to 02_second"
    for seconds in (5.0, 5.0, 5.0, 5.0, 99.0, 5.0, 5.0, 5.0, 5.0):
        assert cluster.end(name, stopped(seconds)) == [name]
    cluster.end(name, stopped(5.0))
    rule = "stopped within 20 s of its start, 5 times: give the site's jobs more time"
    assert cluster.dispatcher.over and cluster.dispatcher.failures == [f"{name}: {rule}"]


@pytest.mark.parametrize("error", [ManagerLost(b"m", "n7"), WorkerLost(0, "n7")])
def test_a_lost_node_is_no_failure_three_times(project: Path, error: Exception) -> None:
    cluster = Cluster(project)
    name = "01_first to 02_second"
    for _ in range(3):
        assert cluster.end(name, error) == [name]
    assert cluster.end(name, error) == [] and cluster.dispatcher.over
    assert cluster.dispatcher.failures == [f"{name}: lost with its node n7, for the 4th time"]


def test_who_trains_there_already_is_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now)
    cluster = Cluster(project)
    name = "01_first to 02_second"
    in_use = Outcome(75, "demo/one is in use by process 5 on n9", "n1", "p1", later=10.0)
    assert cluster.end(name, in_use) == []
    now += 9
    assert cluster.step() == []
    now += 2
    assert cluster.step() == [name]
    assert cluster.said == [f"{name}: demo/one is in use by process 5 on n9; queued again"]


def test_any_other_error_is_a_failure(project: Path) -> None:
    cluster = Cluster(project)
    cluster.end("01_first to 02_second", KeyError("x"))
    assert cluster.dispatcher.failures == ["01_first to 02_second: KeyError: 'x'"]


def test_a_run_that_cannot_be_opened_is_a_failure(sweep: Path) -> None:
    broken = open_run(
        {"experiment": "demo", "run": "V1-0", "n": 5, "lr": 0.5, "dims": [1], "seed": 0, "device": "auto"}
    )
    cluster = Cluster(sweep)
    (broken.path / "summary.json").write_text("{")
    for suffix in ("ipynb", "html"):
        (broken.path / f"02_train.{suffix}").touch()
    assert cluster.end("01_first") == ["V2-0"]
    assert cluster.dispatcher.failures[0].startswith(f"V1-0: {broken.path}/summary.json: damaged")


def test_a_site_without_a_usable_job_ends_it(project: Path) -> None:
    cluster = Cluster(project)
    error = BadStateException(SimpleNamespace(label="slurm"), TooManyJobFailuresError("Error 1:\n\tno such file"))
    with pytest.raises(RunError, match="^no job of the site could be used: .*Error 1: no such file"):
        cluster.end("01_first to 02_second", error)


def test_the_table_tells_what_each_task_is_doing(sweep: Path) -> None:
    write_params(sweep, **{"01_first": "run: one\nn: 5"})
    cluster = Cluster(sweep)
    cluster.end("01_first")
    assert cluster.dispatcher.lines() == ["1 finished, 3 waiting"]
    open_run(cluster.queued[1][0].tasks[0].resolved)
    write_status("running", what="training", done=5, total=9, figures="mse 0.5", seconds_left=61.0, host="n3.site")
    cluster.end("V2-0", stopped())
    assert cluster.dispatcher.lines() == [
        "1 finished, 1 requeued, 1 running, 1 waiting",
        "task  state     node  doing                      figures  left",
        "V1-0  running   n3    training 5/9               mse 0.5  1:01",
        "V2-0  requeued  n1    stopped by a signal on n1",
    ]
