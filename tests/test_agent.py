import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from workbench import agent

HERE = {"way": "here", "endpoint": "127.0.0.1:0", "devices": 2, "num_nodes": 1, "node": 0}
JOB = HERE | {"job": "/runs/r/launch-1/job.pkl", "parent": 1}


def _options(job: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], list[str]]:
    """Options that torchrun is started with, and what follows them."""
    from torch.distributed import run

    seen: list[str] = []
    monkeypatch.setattr(run, "main", seen.extend)
    for name in ("GLOO_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    agent.torchrun(job)
    at = seen.index("--module")
    return dict(option.removeprefix("--").split("=", 1) for option in seen[:at]), seen[at:]


def test_one_node_meets_on_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    options, (_, module, role, job) = _options(JOB, monkeypatch)
    assert (module, role) == ("workbench.agent", "worker") and json.loads(job) == JOB | {"parent": os.getpid()}
    assert options["log-dir"] == "/runs/r/launch-1", "it goes with what was sent"
    assert options["nnodes"] == "1" and options["nproc-per-node"] == "2" and options["max-restarts"] == "3"
    assert options["rdzv-endpoint"] == "127.0.0.1:0" and options["local-addr"] == "127.0.0.1"
    assert options["rdzv-conf"].startswith("is_host=1,") and options["signals-to-handle"] == "SIGTERM,SIGINT,SIGUSR1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_the_first_of_several_nodes_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    several = JOB | {"way": "nodes", "num_nodes": 2, "endpoint": "127.0.0.1:29500"}
    for node in (0, 1):
        options, _ = _options(several | {"node": node}, monkeypatch)
        assert options["rdzv-conf"].startswith(f"is_host={1 - node},")
        assert (options["rdzv-endpoint"], options["local-addr"]) == ("127.0.0.1:29500", "127.0.0.1")


def test_an_allocation_is_entered_with_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda name, command: called.append([name, *command]))
    monkeypatch.setattr(agent, "die_with", lambda parent, number: called.append([parent, number]))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    job = JOB | {"way": "slurm", "num_nodes": 3}
    agent.main("agent", json.dumps(job))
    (parent, number), (name, again, *command) = called
    assert (parent, number) == (1, signal.SIGTERM), "srun ends its step on SIGTERM, and leaves it alone when killed"
    assert name == again == "srun" and command[:6] == ["--nodes", "3", "--ntasks", "3", "--ntasks-per-node", "1"]
    assert command[command.index("--cpus-per-task") + 1] == "4"
    assert command[-5:-1] == [sys.executable, "-m", "workbench.agent", "node"] and json.loads(command[-1]) == job


def test_a_node_of_an_allocation_knows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict] = []
    monkeypatch.setattr(agent, "torchrun", begun.append)
    monkeypatch.setenv("SLURM_NODEID", "2")
    agent.main("node", json.dumps(JOB))
    assert begun == [JOB | {"node": 2}]


def test_addresses_and_interfaces() -> None:
    assert agent.own_address("127.0.0.1") == "127.0.0.1"
    assert agent.interface_of("127.0.0.1") == "lo"


def test_a_name_that_stands_for_loopback_is_not_told_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"node1": "127.0.1.1", "node2": "10.0.0.1", agent.ANYWHERE: "10.0.0.1", "localhost": "127.0.0.1"}
    monkeypatch.setattr(agent, "_route_to", ways.__getitem__)
    assert agent.own_address("node1") == agent.own_address("node2") == "10.0.0.1"
    assert agent.own_address("localhost") == "127.0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_process_dies_with_its_parent() -> None:
    child = (
        "import os, time; from workbench.agent import die_with; die_with(os.getppid()); print(os.getpid(), flush=True)"
    )
    child += "; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    orphan.wait(30)


def test_a_process_whose_parent_is_gone_ends_before_it_imports_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "workbench.agent", "worker", json.dumps(JOB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and "psutil" in done.stderr and "torch" not in done.stderr


def test_a_process_of_the_training_becomes_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list = []
    monkeypatch.setattr(agent, "die_with", called.append)
    monkeypatch.setattr(os, "execv", lambda path, command: called.append(command))
    agent.main("worker", json.dumps(JOB))
    assert called == [1, [sys.executable, "-m", "workbench.worker", json.dumps(JOB)]]
