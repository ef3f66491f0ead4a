"""torchrun on each node of a training, started by `launch`; imports little, as it is started for every training.

`python -m workbench.agent ROLE JOB`, where JOB is JSON and ROLE is `agent`, which starts torchrun here, or srun that
starts `node` on each node of an allocation of Slurm; torchrun starts `worker`, which becomes `workbench.worker`.
"""

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil

MAX_RESTARTS = 3
WAITING_SECONDS = 600
"""How long a node waits for the others, which may come to this training later, or be lost and come back."""
PR_SET_PDEATHSIG = 1
ANYWHERE = "192.0.2.1"
"""An address for documentation: the way there is that to other networks."""


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends; end now if it is gone already. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os._exit(1)


def agent(job: dict[str, Any]) -> None:
    """Become torchrun, or srun that starts it on each node; ends with the process that started it."""
    die_with(job["parent"], signal.SIGTERM if job["way"] == "slurm" else signal.SIGKILL)
    if job["way"] != "slurm":
        torchrun(job)
        return
    nodes = str(job["num_nodes"])
    options = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--overlap", "--cpu-bind=none"]
    options += ["--kill-on-bad-exit=0"]
    if cores := os.environ.get("SLURM_CPUS_ON_NODE"):
        options += ["--cpus-per-task", cores]
    program = [sys.executable, "-m", "workbench.agent", "node", json.dumps(job)]
    os.execvp("srun", ["srun", *options, *program])


def torchrun(job: dict[str, Any]) -> None:
    """Start the processes of this node, and start them again when one dies."""
    from torch.distributed.run import main  # here, as it takes long to import

    host, _, port = job["endpoint"].rpartition(":")
    address = own_address(host) if job["num_nodes"] > 1 else host
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarts fail now and then
    is_host = int(job["node"] == 0)
    options = {
        "nnodes": job["num_nodes"],
        "nproc-per-node": job["devices"],
        "max-restarts": MAX_RESTARTS,
        "signals-to-handle": "SIGTERM,SIGINT,SIGUSR1",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{host}:{port}",
        "rdzv-id": "workbench",
        "rdzv-conf": f"is_host={is_host},join_timeout={WAITING_SECONDS},read_timeout={WAITING_SECONDS}",
        "local-addr": address,
        "log-dir": str(Path(job["job"]).parent),  # else one in /tmp that stays there
    }
    own = json.dumps(job | {"parent": os.getpid()})
    main([*(f"--{key}={value}" for key, value in options.items()), "--module", "workbench.agent", "worker", own])


def own_address(host: str) -> str:
    """The address of this machine that another one at `host` is reached from; of `host` itself, one others may reach.

    A machine's own name often stands for a loopback address, which is of no use to others.
    """
    found = _route_to(host)
    own_name = found.startswith("127.") and not host.startswith("127.") and host != "localhost"
    return _route_to(ANYWHERE) if own_name else found


def _route_to(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """Name of the network interface that has an address."""
    found = [name for name, many in psutil.net_if_addrs().items() if any(one.address == address for one in many)]
    return found[0] if found else "lo"


def main(role: str, job: str) -> None:
    """Begin in a role."""
    settings = json.loads(job)
    if role == "node":
        torchrun(settings | {"node": int(os.environ["SLURM_NODEID"])})
    elif role == "worker":
        die_with(settings["parent"])  # before it imports torch, which takes seconds
        os.execv(sys.executable, [sys.executable, "-m", "workbench.worker", job])
    else:
        agent(settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
