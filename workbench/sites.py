"""Site files, Python that defines a Parsl `config`: what one lacks is said, and its jobs are looked after."""

import logging
import os
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parsl
import psutil
from parsl.config import Config
from parsl.errors import ParslError
from parsl.executors import HighThroughputExecutor
from parsl.executors.high_throughput.executor import DEFAULT_INTERCHANGE_LAUNCH_CMD
from parsl.launchers import SimpleLauncher
from parsl.launchers.base import Launcher
from parsl.providers.base import ExecutionProvider

from workbench.config import ConfigError
from workbench.paths import OUTPUTS_VARIABLE, outputs_root
from workbench.runs import RunError

QUEUES = {"partition": "`sinfo -s` lists the partitions", "queue": "`bqueues` lists the queues"}
UNFIT = "unfit-nodes"
"""File beside the batch scripts to which a node writes that it has not what a run needs."""
CHECK = """
import importlib.util, sys
import workbench.nodes
missing = [name for name in ("papermill", "parsl", "torch") if not importlib.util.find_spec(name)]
sys.exit(", ".join(missing) + " missing" if missing else 0)
"""
SCRIPT = """
if ! found=$(python -P -c {check} 2>&1); then
    echo "$(hostname): $(command -v python || echo no python): $(echo "$found" | tail -n 1)" >>{unfit}
    exit 1
fi
exec python -P -m workbench.nodes {command}
"""


class NodeLauncher(Launcher):
    """Starts the worker pool of a job under `workbench.nodes`, once the node has what a run needs.

    There is one pool in a job, on its first node, as Slurm and LSF start the script there; the other nodes of a job
    are for trainings over several nodes.
    """

    def __call__(self, command: str, tasks_per_node: int, nodes_per_block: int, script_dir: str = "") -> str:
        """The lines of a batch script that run a command of Parsl's."""
        unfit = shlex.quote(str(Path(script_dir or ".").resolve() / UNFIT))
        return SCRIPT.format(check=shlex.quote(CHECK), unfit=unfit, command=command)


def own_address() -> str:
    """An IPv4 address at which others on the network may reach this machine; a loopback one where there is none."""
    try:
        by_name = socket.gethostbyname(socket.gethostname())
    except OSError:
        by_name = "127.0.0.1"
    if not by_name.startswith("127."):
        return by_name
    found = [a.address for entries in psutil.net_if_addrs().values() for a in entries if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), by_name)


# --- the file ---


@dataclass(frozen=True)
class Site:
    """What a site file defines.

    Args:
        path: The file.
        config: Its `config`.
        executor: The one executor of that.
        driver: The provider of the job that `--detach` submits: its `driver`, or else that of the executor.
    """

    path: Path
    config: Config
    executor: HighThroughputExecutor
    driver: ExecutionProvider


def load_site(path: Path) -> Site:
    """Run a site file.

    Raises:
        ConfigError: there is none, it fails, or it defines no Parsl configuration that can be used here.
    """
    example = "cluster/local.py, cluster/slurm.py and cluster/lsf.py are examples"
    if not path.is_file():
        raise ConfigError([(str(path), f"no such site file; {example}")])
    try:
        content = runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it is any code
        raise ConfigError([(str(path), f"fails with {type(error).__name__}: {error}; {example}")]) from error
    config = content.get("config")
    if not isinstance(config, Config):
        names = ", ".join(name for name in content if not name.startswith("_"))
        there = f"there are only: {names}" if names else "there is nothing"
        there = f"`config` is a {type(config).__name__}" if "config" in content else there
        rule = f"must define `config = parsl.config.Config(...)`, and {there}; {example}"
        raise ConfigError([(str(path), rule)])
    executors = list(config.executors)
    if len(executors) != 1 or not isinstance(executors[0], HighThroughputExecutor):
        kinds = ", ".join(type(executor).__name__ for executor in executors)
        raise ConfigError([(f"executors=[{kinds}] in {path}", f"must be one HighThroughputExecutor; {example}")])
    return Site(path, config, executors[0], content.get("driver", executors[0].provider))


# --- its jobs ---


class _Refusals(logging.Handler):
    """Remembers what a scheduler answered to jobs it did not take; Parsl only logs that."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Retcode:") and record.args:
            self.texts.append("; ".join(str(part).strip() for part in record.args[1:] if str(part).strip()))


@dataclass
class Session:
    """Jobs of a site while they go on, see `session`."""

    site: Site
    kernel: parsl.DataFlowKernel
    folder: Path
    """Where Parsl writes what it does, the batch scripts and their output."""
    refusals: _Refusals = field(default_factory=_Refusals)
    _told: set[str] = field(default_factory=set)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Queue a call of a function of this package for the workers."""
        label = self.site.executor.label
        return parsl.python_app(function, data_flow_kernel=self.kernel, executors=[label])(*arguments)

    def hold(self, pool: str) -> None:
        """Give no further task to a worker pool, as its node has been told to stop."""
        self.site.executor._hold_manager(pool)

    def check(self) -> list[str]:
        """New warnings about jobs that were not taken, and nodes that cannot be used.

        Raises:
            RunError: the scheduler has taken no job, or no node can be used.
        """
        jobs = len(self.site.executor.blocks_to_job_id)
        refused = [self._refused(text) for text in self.refusals.texts]
        if refused and not jobs:
            raise RunError(refused[0])
        path = self.folder / "submit_scripts" / UNFIT
        unfit = [self._unfit(line) for line in path.read_text().splitlines()] if path.exists() else []
        if unfit and len(unfit) >= jobs:
            raise RunError(unfit[-1])
        new = [warning for warning in dict.fromkeys(refused + unfit) if warning not in self._told]
        self._told |= set(new)
        return new

    def _refused(self, text: str) -> str:
        provider = self.site.executor.provider
        given = {name: value for name in QUEUES if (value := getattr(provider, name, None))}
        named = "".join(f" ({name}={value!r})" for name, value in given.items())
        where = "".join(f"; {QUEUES[name]}" for name in given)
        said = " ".join(text.split())
        return f"{self.site.path}: the scheduler takes no jobs{named}: {said}: correct it in the file{where}"

    def _unfit(self, line: str) -> str:
        remedy = "let `worker_init` activate an environment, there too, in which `make doctor` is content"
        return f"node {line}: a run cannot begin there; in {self.site.path} {remedy}"


def _folder_of(site: Site) -> Path:
    """The folder in which Parsl keeps its files; nodes see it too.

    Raises:
        RunError: it cannot be written, or Parsl, which quotes nothing, could not name it to a shell.
    """
    given = site.config.run_dir
    folder = outputs_root() / ".parsl" if given == "runinfo" else Path(given).resolve()
    if unfit := sorted(set(re.findall(r"[^\w./+=,:@-]", str(folder)))):
        rule = f"Parsl keeps files there, and names it to shells, which take {' '.join(map(repr, unfit))} apart"
        raise RunError(f"{folder}: {rule}: choose another outputs folder with the variable {OUTPUTS_VARIABLE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be written ({error.strerror}), and Parsl keeps files there"
        raise RunError(f"{folder} {rule}: change its permissions, or make room") from None
    return folder


@contextmanager
def session(site: Site) -> Iterator[Session]:
    """Start Parsl on a site; at the end its jobs are cancelled.

    Yields:
        What takes tasks.
    """
    folder, own = _folder_of(site), str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"  # Parsl starts its own programs by name
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]  # of the job in which a driver may run: they would change what it submits
    site.config.run_dir = str(folder)
    if list(site.executor.interchange_launch_cmd) == DEFAULT_INTERCHANGE_LAUNCH_CMD:
        bound = [sys.executable, "-m", "workbench.nodes", "--bound"]
        site.executor.interchange_launch_cmd = [*bound, *DEFAULT_INTERCHANGE_LAUNCH_CMD]
    refusals = _Refusals()
    logging.getLogger("parsl").addHandler(refusals)
    kernel = parsl.load(site.config)
    try:
        yield Session(site, kernel, Path(kernel.run_dir), refusals)
    finally:
        kernel.cleanup()
        logging.getLogger("parsl").removeHandler(refusals)


def submit_driver(site: Site, script: str) -> str:
    """Submit lines of shell as one job of a site; returns the job's id.

    Raises:
        RunError: the scheduler does not take it.
    """
    provider, folder = site.driver, _folder_of(site) / "drivers"
    folder.mkdir(exist_ok=True)
    provider.script_dir, provider.launcher = str(folder), SimpleLauncher()
    refusals = _Refusals()
    logging.getLogger("parsl").addHandler(refusals)
    try:
        job = provider.submit(script, 1, "workbench")
    except ParslError as error:
        raise RunError(f"{site.path}: the driver's job is not taken: {(refusals.texts or [error])[0]}") from None
    finally:
        logging.getLogger("parsl").removeHandler(refusals)
    if job is None:
        raise RunError(f"{site.path}: the driver's job is not taken: {(refusals.texts or ['no reason given'])[0]}")
    return job
