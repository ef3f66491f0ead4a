"""What is queued on a cluster and when, what is queued again, and what has failed in the end.

A task that its node had to stop is queued again, one whose node was lost up to three times; what fails otherwise is
told at the end. Nothing is remembered but in the run folders: the same command, started again, goes on.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from parsl.executors.errors import BadStateException
from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

from workbench.batch import left_alone, make_way
from workbench.config import ConfigError
from workbench.live import activity, aligned, counted
from workbench.node_tasks import BUSY_SECONDS, Outcome
from workbench.process import PREEMPTED_EXIT
from workbench.runs import Run, RunError, read_if_there, run_path
from workbench.tasks import Point, Task

RETRIES = 3
"""How often a task is queued again whose node was lost."""
HASTY_SECONDS, HASTY = 20.0, 5
"""A task that is stopped this soon after its start, so often in a row, is given up: it would never get anywhere."""


@dataclass(eq=False)
class Chain:
    """Notebooks that are one task, and what became of it.

    Args:
        point: The point to which they belong.
        tasks: The notebooks, one after another.
    """

    point: Point
    tasks: list[Task]
    state: str = "waiting"
    node: str = ""
    note: str = ""
    lost: int = 0
    hasty: int = 0
    due: float = 0.0
    """When it may be queued."""
    seen: dict[Path, float] = field(default_factory=dict)
    """By run folder, the time in its status.json when it was queued: another one means that it is running."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        first, last = self.tasks[0], self.tasks[-1]
        return first.name if first is last else f"{first.name} to {last.notebook.stem}"


class Dispatcher:
    """Decides what is queued when; knows Parsl only by the futures that it is given.

    Args:
        points: All that is to be executed.
        submit: Queues a chain.
        hold: Takes a worker pool, by name, out of use.
        say: Prints a line.
    """

    def __init__(
        self,
        points: Sequence[Point],
        submit: Callable[[Chain], Future],
        hold: Callable[[str], None],
        say: Callable[[str], None] = print,
    ) -> None:
        self.submit, self.hold, self.say = submit, hold, say
        self.waiting: list[Chain] = []
        self.going: dict[Future, Chain] = {}
        self.failures: list[str] = []
        self.held: set[str] = set()
        self.stages = {id(point): deque(_stages(point)) for point in points}
        self.chains = [chain for stages in self.stages.values() for stage in stages for chain in stage]
        self.open: dict[int, set[Chain]] = {}
        for point in points:
            self._next_stage(point)

    @property
    def over(self) -> bool:
        """Whether nothing waits and nothing goes on."""
        return not self.waiting and not self.going

    def step(self, seconds: float = 0.0) -> None:
        """Queue what is due, wait so long for something to end, and conclude what has ended."""
        now = time.monotonic()
        for chain in [chain for chain in self.waiting if chain.due <= now]:
            self.waiting.remove(chain)
            chain.seen = {path: _updated(path) for path in paths_of(chain)}
            self.going[self.submit(chain)] = chain
        if not self.going:
            time.sleep(seconds)
        for future in wait(self.going, seconds, FIRST_COMPLETED).done if self.going else ():
            self._end(self.going.pop(future), future)

    def _next_stage(self, point: Point) -> None:
        """Begin the next part of a point: notebooks before a sweep, its runs, or those after it."""
        while self.stages[id(point)]:
            stage = self.stages[id(point)].popleft()
            self.open[id(point)] = set(stage)
            for chain in stage:
                self._begin(chain)
            if self.open[id(point)]:
                return

    def _begin(self, chain: Chain) -> None:
        """Let a chain wait for its turn, unless it is finished, or cannot be opened."""
        try:
            finished = all(_finished(task) for task in chain.tasks)
        except (RunError, ConfigError, OSError) as error:
            self._fail(chain, f"{chain.name}: {str(error).splitlines()[0]}")
            return
        if finished:
            chain.state = "finished"
            self.open[id(chain.point)].discard(chain)
        else:
            self.waiting.append(chain)

    def _end(self, chain: Chain, future: Future) -> None:
        error = future.exception()
        if isinstance(error, BadStateException):
            raise RunError(f"no job of the site could be used: {' '.join(str(error).split())}")
        if isinstance(error, ManagerLost | WorkerLost):
            chain.node, chain.lost = error.hostname, chain.lost + 1
            note = f"lost with its node {chain.node}"
            if chain.lost <= RETRIES:
                self._again(chain, note, BUSY_SECONDS)
            else:
                self._fail(chain, f"{chain.name}: {note}, for the {chain.lost}th time")
        elif error:
            self._fail(chain, f"{chain.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            self._conclude(chain, future.result())
        if chain.state in ("finished", "failed"):
            self._left(chain)

    def _conclude(self, chain: Chain, outcome: Outcome) -> None:
        chain.node = outcome.node
        if outcome.code == 0:
            chain.state = "finished"
            self.say(f"{chain.name}: done on {outcome.node}")
        elif outcome.code != PREEMPTED_EXIT:
            self._fail(chain, outcome.failure)
        else:
            if outcome.leaving and outcome.pool not in self.held:
                self.held.add(outcome.pool)
                self.hold(outcome.pool)
            if outcome.seconds:
                chain.hasty = chain.hasty + 1 if outcome.seconds < HASTY_SECONDS else 0
            if chain.hasty >= HASTY:
                rule = (
                    f"stopped within {HASTY_SECONDS:.0f} s of its start, {HASTY} times: give the site's jobs more time"
                )
                self._fail(chain, f"{chain.name}: {rule}")
            else:
                node = outcome.node
                how = f"stopped by a signal on {node}" if outcome.seconds else f"not begun, as {node} was told to stop"
                self._again(chain, outcome.failure or how, outcome.later)

    def _again(self, chain: Chain, note: str, later: float) -> None:
        if chain.note != note:
            self.say(f"{chain.name}: {note}; queued again")
        chain.state, chain.note, chain.due = "requeued", note, time.monotonic() + later
        self.waiting.append(chain)

    def _fail(self, chain: Chain, failure: str) -> None:
        """Note a failure; what follows in its point is left out, unless it is a run of a sweep."""
        chain.state, chain.note = "failed", failure
        self.failures.append(failure)
        self.say(f"{chain.name}: FAILED on {chain.node or 'this machine'}\n{failure}")
        if chain.tasks[0].kind != "swept":
            for stage in self.stages[id(chain.point)]:
                for later in stage:
                    later.state = "left out"
            self.stages[id(chain.point)].clear()
        self.open[id(chain.point)].discard(chain)

    def _left(self, chain: Chain) -> None:
        """Begin what waited for this chain, once it was the last."""
        left = self.open[id(chain.point)]
        left.discard(chain)
        if not left:
            self._next_stage(chain.point)

    def lines(self) -> list[str]:
        """The table of tasks: how many are in each state, and a line for each that goes on or is queued again."""
        rows, states = [], []
        for chain in self.chains:
            found = running(chain) if chain in self.going.values() else {}
            states.append("running" if found else chain.state)
            if found or chain.state == "requeued":
                rows.append({"task": chain.name, "state": chain.state, "node": chain.node, "doing": chain.note} | found)
        return [counted(states), *aligned(rows, ("task", "state", "node", "doing", "figures", "left"))]


def _stages(point: Point) -> list[list[Chain]]:
    """A point's tasks: each run of a sweep is a chain of its own, what stands before or after them another one."""
    stages = []
    for swept, group in groupby(point.tasks, key=lambda task: task.kind == "swept"):
        tasks = list(group)
        stages.append([Chain(point, [task]) for task in tasks] if swept else [Chain(point, tasks)])
    return stages


def _finished(task: Task) -> bool:
    make_way(task)
    return left_alone(task, Run(run_path(task.resolved)))


def paths_of(chain: Chain) -> list[Path]:
    """The run folders of a chain."""
    return [run_path(task.resolved) for task in chain.tasks]


def _updated(path: Path) -> float:
    """The time in a run's status.json; 0 where there is none, or it cannot be read."""
    try:
        return read_if_there(path / "status.json").get("updated", 0.0)
    except RunError:
        return 0.0


def running(chain: Chain) -> dict[str, str]:
    """What the run of a chain that has shown life last is doing; nothing where none has since it was queued."""
    updated = {path: time for path in paths_of(chain) if (time := _updated(path)) != chain.seen.get(path)}
    if not updated:
        return {}
    return activity(max(updated, key=updated.__getitem__)) | {"state": "running"}
