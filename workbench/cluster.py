"""`workbench run … --site FILE`: many runs on the nodes of a cluster, from here or from a job of its own."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from workbench.batch import alone, conclude_all, use_outputs_of
from workbench.dispatch import Chain, Dispatcher, paths_of, running
from workbench.live import LiveTable
from workbench.node_tasks import in_use, on_node
from workbench.paths import OUTPUTS_VARIABLE, outputs_root
from workbench.process import PREEMPTED_EXIT, handled
from workbench.runs import Run
from workbench.sites import Session, Site, load_site, session, submit_driver
from workbench.tasks import Point, plan_points

DETACHED_VARIABLE = "WORKBENCH_DETACHED"
"""Says that this driver is a job itself, which submits its successor when its time is up."""
REFRESH_SECONDS, QUIET_SECONDS = 0.5, 60.0
RELEASE_SECONDS = 30.0
"""How long to wait at the end for trainings that write their checkpoints."""


def run_on_site(
    folders: Sequence[Path],
    overrides: Mapping[str, str],
    path: Path,
    seeds: int | None = None,
    accept: Collection[str] = (),
    grid: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> int:
    """Execute parameter folders on a site, as `run_folders` does here.

    Args:
        folders, overrides, seeds, accept, grid: See `plan_points`.
        path: The site file.
        arguments: The command line with which this can be started again, as a job of its own.

    Raises:
        ConfigError, RunError: before anything starts, or as soon as no job of the site can be used.
    """
    use_outputs_of(folders)
    points = plan_points(folders, overrides, seeds, accept, grid)
    site, started = load_site(path), time.monotonic()
    arrived: list[int] = []
    with alone(points), handled(lambda number, frame: arrived.append(number)):
        dispatcher = _drive(points, site, arrived)
    code = 0 if dispatcher.over else 130 if signal.SIGINT in arrived else PREEMPTED_EXIT
    conclude_all(points, dispatcher.failures, code, time.monotonic() - started)
    if code:
        print("stopped; the same command goes on", flush=True)
    if signal.SIGUSR1 in arrived and code == PREEMPTED_EXIT and DETACHED_VARIABLE in os.environ:
        print(f"its own time is up: job {_submit(site, arguments)} goes on", flush=True)
    return code or int(bool(dispatcher.failures))


def _drive(points: Sequence[Point], site: Site, arrived: Sequence[int]) -> Dispatcher:
    """Execute points until all are over, or a signal has arrived; on that, wait until their runs have stopped."""
    table = LiveTable(QUIET_SECONDS)
    live: list[Session] = []

    def say(line: str) -> None:
        table.clear()
        print(line, flush=True)

    def submit(chain: Chain) -> Future:
        return live[0].submit(on_node, chain.tasks, chain.point.root, str(outputs_root()))

    dispatcher = Dispatcher(points, submit, lambda pool: live[0].hold(pool), say)
    if dispatcher.over:
        return dispatcher
    with session(site) as jobs:
        live.append(jobs)
        while not dispatcher.over and not arrived:
            for warning in jobs.check():
                say(warning)
            dispatcher.step(REFRESH_SECONDS)
            table.show(dispatcher.lines)
        table.clear()
        going = [path for chain in dispatcher.going.values() if running(chain) for path in paths_of(chain)]
    until = time.monotonic() + RELEASE_SECONDS
    while going and time.monotonic() < until:
        going = [path for path in going if in_use(Run(path))]
        time.sleep(REFRESH_SECONDS / 5)
    return dispatcher


def detach(
    folders: Sequence[Path],
    overrides: Mapping[str, str],
    path: Path,
    seeds: int | None = None,
    accept: Collection[str] = (),
    grid: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> int:
    """Check everything, and submit as a job what `run_on_site` would do here; see there.

    Raises:
        ConfigError, RunError: something is wrong, or the scheduler does not take the job.
    """
    use_outputs_of(folders)
    points = plan_points(folders, overrides, seeds, accept, grid)
    site = load_site(path)
    with alone(points):
        pass
    experiments = {outputs_root() / point.experiment for point in points}
    shown = experiments.pop() if len(experiments) == 1 else outputs_root()
    print(f"job {_submit(site, arguments)} runs them; follow it with: workbench runs {shown} --watch")
    print(f"what it prints goes to {outputs_root() / '.parsl' / 'drivers'}")
    return 0


def _submit(site: Site, arguments: Sequence[str]) -> str:
    """Submit a driver with this command line, to work in this folder; the job's id."""
    command = shlex.join([sys.executable, "-u", "-m", "workbench", *arguments])
    variables = shlex.join([f"{OUTPUTS_VARIABLE}={outputs_root()}", f"{DETACHED_VARIABLE}=1"])
    return submit_driver(site, f"cd {shlex.quote(os.getcwd())} && export {variables} && exec {command}")
