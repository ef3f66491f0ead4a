"""A real Slurm of two nodes on this machine, for tests: root, with `slurmctld`, `slurmd` and `munged` installed.

A node has four CPUs and two stand-in GPUs, character devices, so that jobs get CUDA_VISIBLE_DEVICES as elsewhere.
There is no accounting, no cgroup, and one file system.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_SECONDS = 120
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
InactiveLimit=0
OverTimeLimit=0
GresTypes=gpu
DefMemPerCPU=500
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def installed() -> bool:
    """Whether a cluster can be started here."""
    return os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))


@contextmanager
def cluster(base: Path, kill_wait: int = 10) -> Iterator[None]:
    """Start Slurm, keep its files in a folder, and set SLURM_CONF, by which all its programs find it.

    Args:
        base: An empty folder.
        kill_wait: Seconds from a job's SIGTERM to its SIGKILL.
    """
    ports = _ports()
    text = CONFIG.format(host=socket.gethostname().split(".")[0], ports=ports, base=base, kill_wait=kill_wait)
    (base / "state").mkdir(parents=True)
    (base / "slurm.conf").write_text(text.lstrip())
    (base / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={base}/nvidia[0-1]\n")
    for number in range(2):
        os.mknod(base / f"nvidia{number}", 0o020666, os.makedev(1, 3))
    (base / "munge.key").write_bytes(os.urandom(1024))
    (base / "munge.key").chmod(0o400)
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    options = [f"--{option}={base / name}" for option, name in (names | {"seed-file": "munge.seed"}).items()]
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(base / "slurm.conf")
    commands = [["munged", "--foreground", "--force", *options], ["slurmctld", "-D", "-i"]]
    daemons = []
    try:
        for command in [*commands, *(["slurmd", "-D", "-N", node] for node in ("n1", "n2"))]:
            with (base / f"{command[0]}{command[-1]}.out".replace("/", "-")).open("w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            while command[0] == "munged" and not (base / "munge.socket").exists():
                time.sleep(0.05)
        _wait_until_idle(base)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)
        del os.environ["SLURM_CONF"]
        os.environ.update({} if before is None else {"SLURM_CONF": before})


def _ports() -> list[int]:
    """A free port, and two free ones that follow each other."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            first = two.getsockname()[1]
            try:
                three.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return [one.getsockname()[1], first, first + 1]


def _wait_until_idle(base: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        found = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True)
        if found.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.2)
    raise RuntimeError(f"Slurm did not start: see {base}\n{found.stdout}{found.stderr}")
