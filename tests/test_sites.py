import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from parsl import DataFlowKernel
from parsl.providers import LocalProvider, LSFProvider, SlurmProvider
from parsl.providers.base import ExecutionProvider

from workbench.config import ConfigError
from workbench.paths import outputs_root
from workbench.runs import RunError
from workbench.sites import NodeLauncher, Session, _Refusals, load_site, own_address, session, submit_driver

ROOT = Path(__file__).parents[1]
EXAMPLES = "cluster/local.py, cluster/slurm.py and cluster/lsf.py are examples"
IMPORTS = "from parsl.config import Config\nfrom parsl.executors import *\n"


# --- the file ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conf = 3", "{path}: must define `config = parsl.config.Config(...)`, and there are only: conf; " + EXAMPLES),
        ("", "{path}: must define `config = parsl.config.Config(...)`, and there is nothing; " + EXAMPLES),
        ("config = {}", "{path}: must define `config = parsl.config.Config(...)`, and `config` is a dict; " + EXAMPLES),
        ("1 / 0", "{path}: fails with ZeroDivisionError: division by zero; " + EXAMPLES),
        (
            "import nothing_of_that_name",
            "{path}: fails with ModuleNotFoundError: No module named 'nothing_of_that_name'; ",
        ),
        ("config = (", "{path}: fails with SyntaxError: '(' was never closed"),
        ("exit(3)", "{path}: fails with SystemExit: 3; " + EXAMPLES),
        (
            IMPORTS + "config = Config()",
            "executors=[ThreadPoolExecutor] in {path}: must be one HighThroughputExecutor; " + EXAMPLES,
        ),
    ],
)
def test_a_file_that_is_no_site(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_no_file() -> None:
    with pytest.raises(ConfigError, match="^cluster/slrum.py: no such site file; cluster/local.py, "):
        load_site(Path("cluster/slrum.py"))


@pytest.mark.parametrize(
    ("name", "provider"), [("local", LocalProvider), ("slurm", SlurmProvider), ("lsf", LSFProvider)]
)
def test_what_is_shipped(name: str, provider: type[ExecutionProvider], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    path = ROOT / "cluster" / f"{name}.py"
    site = load_site(path)
    assert isinstance(site.executor.provider, provider) and isinstance(site.driver, provider)
    assert isinstance(site.executor.provider.launcher, NodeLauncher)
    pinned = {"local": 3, "slurm": 4, "lsf": 4}[name]
    assert site.executor.workers_per_node == len(site.executor.available_accelerators) == pinned
    assert path.read_text().count("# EDIT") == {"local": 2, "slurm": 4, "lsf": 4}[name]


def test_an_address_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian resolves a machine's own name to 127.0.1.1."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    assert own_address() == "10.0.0.7"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    here = [SimpleNamespace(family=socket.AF_INET, address=address) for address in ("127.0.0.1", "10.1.0.9")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": here[:1], "eth0": here[1:]})
    assert own_address() == "10.1.0.9"
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": here[:1]})
    assert own_address() == "127.0.1.1"


# --- nodes ---


def launched(folder: Path, path: str) -> subprocess.CompletedProcess:
    script = NodeLauncher()("echo the pool begins", 1, 1, str(folder))
    return subprocess.run(["bash", "-c", script], env={"PATH": path}, cwd=ROOT, capture_output=True, text=True)


def test_a_node_with_the_environment_begins(tmp_path: Path) -> None:
    done = launched(tmp_path, f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (0, "the pool begins\n")
    assert not (tmp_path / "unfit-nodes").exists()


@pytest.mark.parametrize(
    "python", ["", "#!/bin/sh\necho no module >&2; exit 1", f"#!/bin/sh\nexec {sys.executable} -I -S $@"]
)
def test_a_node_without_the_environment_says_so(tmp_path: Path, python: str) -> None:
    """Without Python, with a broken one, and with one without packages, also where the project is the folder."""
    for program in ("bash", "hostname", "tail", "sh"):
        (tmp_path / program).symlink_to(shutil.which(program))
    if python:
        (tmp_path / "python").write_text(python)
        (tmp_path / "python").chmod(0o755)
    assert launched(tmp_path, str(tmp_path)).returncode == 1
    line = (tmp_path / "unfit-nodes").read_text()
    found = str(tmp_path / "python") if python else "no python"
    assert line.startswith(f"{socket.gethostname()}: {found}: ") and line.count("\n") == 1


# --- jobs ---


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session on a queue that there is not, as if begun."""
    (tmp_path / "submit_scripts").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text((ROOT / "cluster" / "slurm.py").read_text().replace('"gpu", None', '"nope", None'))
    kernel = DataFlowKernel.__new__(DataFlowKernel)
    return Session(load_site(Path("mine.py")), kernel, tmp_path, _Refusals())


def test_a_queue_that_does_not_exist_is_named(jobs: Session) -> None:
    assert jobs.check() == []
    log = logging.getLogger("parsl.test")
    log.addHandler(jobs.refusals)
    log.error("Submit command failed")
    log.error("Retcode:%s STDOUT:%s STDERR:%s", 1, "", "sbatch: error: invalid partition specified: nope\n")
    with pytest.raises(RunError) as caught:
        jobs.check()
    assert str(caught.value) == (
        "mine.py: the scheduler takes no jobs (partition='nope'): sbatch: error: invalid partition specified: nope: "
        "correct it in the file; `sinfo -s` lists the partitions"
    )
    jobs.site.executor.blocks_to_job_id = {"0": "7"}
    assert jobs.check() == [str(caught.value)], "once it has taken a job, this may pass"
    assert jobs.check() == []


def test_one_node_of_two_that_cannot_be_used_is_told_once_and_two_are_too_many(jobs: Session) -> None:
    jobs.site.executor.blocks_to_job_id = {"0": "7", "1": "8"}
    path = jobs.folder / "submit_scripts" / "unfit-nodes"
    path.write_text("n1: no python: python: command not found\n")
    remedy = "let `worker_init` activate an environment, there too, in which `make doctor` is content"
    rule = f"a run cannot begin there; in mine.py {remedy}"
    assert jobs.check() == [f"node n1: no python: python: command not found: {rule}"]
    assert jobs.check() == []
    path.write_text(path.read_text() + "n2: /usr/bin/python: torch missing\n")
    with pytest.raises(
        RunError, match="^node n2: /usr/bin/python: torch missing: a run cannot begin there; in mine.py"
    ):
        jobs.check()


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in `sbatch` that keeps the script and takes the job, unless its partition is `nope`."""
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\nif grep -q partition=nope "$1"; then echo "invalid partition specified: nope" >&2; exit 1; fi\n'
        f'cp "$1" {tmp_path}/script; echo Submitted batch job 41\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "script"


def test_the_driver_is_a_job_itself(scheduler: Path) -> None:
    site = load_site(ROOT / "cluster" / "slurm.py")
    assert submit_driver(site, "cd /here && exec workbench run") == "41"
    lines = scheduler.read_text().splitlines()
    assert lines[-1] == "cd /here && exec workbench run", "the shell that gets the warning becomes the driver"
    assert "#SBATCH --signal=B:USR1@120" in lines and "#SBATCH --cpus-per-task=1" in lines
    assert not any("gpu" in line.lower() and "partition" not in line for line in lines if line.startswith("#SBATCH"))
    assert f"#SBATCH --output={outputs_root()}/.parsl/drivers/workbench" in scheduler.read_text()


def test_a_driver_that_is_not_taken(scheduler: Path, tmp_path: Path) -> None:
    path = tmp_path / "site.py"
    path.write_text((ROOT / "cluster" / "slurm.py").read_text().replace('"gpu", None', '"nope", None'))
    with pytest.raises(RunError, match=f"^{path}: the driver's job is not taken: invalid partition specified: nope$"):
        submit_driver(load_site(path), "exec workbench run")


def test_a_folder_that_parsl_could_not_name_or_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsl writes paths into shell commands as they are."""
    site = load_site(ROOT / "cluster" / "slurm.py")
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(tmp_path / "my runs" / "a&b"))
    with pytest.raises(RunError) as caught, session(site):
        pytest.fail("it began")
    assert str(caught.value) == (
        f"{tmp_path}/my runs/a&b/.parsl: Parsl keeps files there, and names it to shells, which take ' ' '&' apart: "
        "choose another outputs folder with the variable WORKBENCH_OUTPUTS"
    )
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(tmp_path))
    (tmp_path / ".parsl").touch()
    rule = r"cannot be written \(File exists\), and Parsl keeps files there: change its permissions, or make room"
    with pytest.raises(RunError, match=f"^{tmp_path}/.parsl {rule}$"):
        submit_driver(site, "exec workbench run")
