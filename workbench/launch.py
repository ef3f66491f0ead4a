"""A training over several processes, started from the one that the notebook runs in.

`launch` writes what is to be trained into a private folder of the run and starts torchrun (`agent`), which starts the
processes of the training (`worker`), and all of them again from the last checkpoint when one dies, up to three times.
They tell how far they are in lines on standard output; a file in the private folder tells them to stop. They are killed
when this process dies, however it dies (on Linux).

Several nodes (`num_nodes`), in one of two ways:
- In an allocation of Slurm: `srun` starts torchrun once on each node. Relied on: SLURM_JOB_ID and SLURM_JOB_NUM_NODES,
  `srun` and `scontrol` on the PATH, SLURM_NODEID in what srun starts, and an outputs folder that all nodes share.
- Elsewhere the same notebook is run on every node, with WORKBENCH_NODE_RANK (0, 1, …) and WORKBENCH_RENDEZVOUS
  (host:port of node 0) in its environment. Each node has a run folder of its own, `<run>-node1` and so on.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.checkpoints import CheckpointError, build_model
from workbench.datasets.frames import DataError
from workbench.datasets.threads import usable_cores
from workbench.health import NonFiniteError
from workbench.models import MODELS
from workbench.process import PREEMPTED_EXIT, Preempted, handled, leave, pick_device
from workbench.progress import STATUS_VARIABLE, Progress, write_status
from workbench.runs import NODE_VARIABLE, Run, RunError
from workbench.schedule import TrainConfig

RENDEZVOUS_VARIABLE = "WORKBENCH_RENDEZVOUS"
MESSAGE = "\x1e"
"""Begins a line of a worker that is for `launch`, and not for a reader."""
JOB, STOP, ERRORS, PREFIX = "job.pkl", "stop", "errors.log", "launch-"
ENDING_SECONDS = 60
SHOWN_LINES = 20
KNOWN = {
    error.__name__: error
    for error in (
        NonFiniteError,
        CheckpointError,
        DataError,
        RunError,
        ValueError,
        RuntimeError,
        OSError,
        torch.OutOfMemoryError,
    )
}
"""Errors of a worker that are raised here as what they are; others as LaunchError."""
KINDS = {model: kind for kind, (model, _) in MODELS.items()}
OF_THE_STEP_AROUND = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
"""What srun would take from the step or job that it is called in, and what its options here say otherwise."""


class LaunchError(RuntimeError):
    """A training over several processes cannot be started, or has failed; the message says why and what to do."""


def launch(arguments: tuple, config: TrainConfig, run: Run) -> None:
    """Train in other processes; when it returns, the run holds the model.

    Args:
        arguments: Of `training.train_into`, without those that differ between processes.
        config: Of the training, with more than one process.
        run: Whose lock this process holds.

    Raises:
        LaunchError: more devices than there are, no way to reach other nodes, or processes that died too often.
        Preempted, KeyboardInterrupt: as in one process; a checkpoint was written.
        NonFiniteError and other errors: those of a worker.
    """
    where = _where(config)
    for left_over in run.path.glob(f"{PREFIX}*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=run.path))  # mode 0700
    try:
        job = where | {"job": str(folder / JOB), "sha256": write_job(folder / JOB, arguments)}
        torch.cuda.empty_cache()  # what this process keeps of a GPU's memory, they may need
        with _stopping(folder), _started(job, config, folder) as process:
            _Screen(process, folder, config).show()
        _obey(folder, "after the last step; model saved")  # it came after their last look
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # on NFS, what a dying process has open goes the next time


# --- where ---


def _where(config: TrainConfig) -> dict[str, Any]:
    """How the processes find each other, once it is known that there are as many places as processes."""
    device = pick_device(config.device)
    if device.index is not None:
        raise LaunchError(
            f"device={config.device!r} with devices={config.devices}: must name no single device; use 'auto' or 'cuda'"
        )
    present = torch.cuda.device_count() if device.type == "cuda" else usable_cores()
    if config.devices > present:
        kind = "CUDA devices" if device.type == "cuda" else "CPU cores"
        raise LaunchError(
            f"devices={config.devices}: {present} {kind} are present on this node; set devices to at most {present}"
        )
    common = {"device": device.type, "devices": config.devices, "num_nodes": config.num_nodes, "node": 0}
    if config.num_nodes == 1:
        return common | {"way": "here", "endpoint": "127.0.0.1:0"}
    if NODE_VARIABLE in os.environ or RENDEZVOUS_VARIABLE in os.environ:
        return common | {"way": "nodes"} | _from_environment(config.num_nodes)
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        return common | {"way": "slurm", "endpoint": _of_allocation(config.num_nodes)}
    raise LaunchError(
        f"num_nodes={config.num_nodes}: must be 1 outside an allocation of Slurm; or run the same notebook on every "
        f"node, with {NODE_VARIABLE}=0, 1, … and {RENDEZVOUS_VARIABLE}=<address of node 0>:<free port> set"
    )


def _from_environment(num_nodes: int) -> dict[str, Any]:
    node, endpoint = os.environ.get(NODE_VARIABLE, ""), os.environ.get(RENDEZVOUS_VARIABLE, "")
    if not node.isdecimal() or int(node) >= num_nodes:
        raise LaunchError(
            f"{NODE_VARIABLE}={node!r}: must be this node's number, from 0 to {num_nodes - 1}, as num_nodes={num_nodes}"
        )
    if not endpoint.rpartition(":")[0] or not endpoint.rpartition(":")[2].isdecimal():
        raise LaunchError(
            f"{RENDEZVOUS_VARIABLE}={endpoint!r}: must be <address of node 0>:<free port>, the same on every node"
        )
    return {"node": int(node), "endpoint": endpoint}


def _of_allocation(num_nodes: int) -> str:
    """Address of the first node of this Slurm job, and a port that is free here."""
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if num_nodes > allocated:
        job = os.environ["SLURM_JOB_ID"]
        raise LaunchError(f"num_nodes={num_nodes}: job {job} has {allocated}; ask for more with --nodes, or lower it")
    names = _said("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    entries = _said("scontrol", "show", "node", "-o", names[0]).split()
    address = next((e.removeprefix("NodeAddr=") for e in entries if e.startswith("NodeAddr=")), names[0])
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{address}:{probe.getsockname()[1]}"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"{' '.join(command)} failed ({error}): see to Slurm, or set num_nodes: 1") from None


# --- what is trained ---


class _Pickler(cloudpickle.Pickler):
    """Memory-mapped arrays go by path, tensors on a GPU to the GPU of whoever reads them, locks as new ones.

    Models with spectral norms, which refuse to be pickled, go as their configuration and weights.
    """

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) in KINDS and any(map(parametrize.is_parametrized, thing.modules())):
            weights = {name: value.cpu() for name, value in thing.state_dict().items()}
            return _build, (KINDS[type(thing)], thing.config.model_dump(), weights, thing.training)
        if isinstance(thing, np.ndarray) and (mapped := _mapped(thing)):
            return _open_mapped, mapped
        if type(thing) is Tensor and thing.is_cuda:
            return _to_own_gpu, (thing.detach().cpu(), thing.requires_grad)
        if isinstance(thing, type(threading.Lock())):
            return threading.Lock, ()
        return super().reducer_override(thing)


def _mapped(array: np.ndarray) -> tuple | None:
    """File, type, shape, place and strides of a memory-mapped array, or of a part of one; None of another."""
    root, base = None, array
    while isinstance(base, np.ndarray):
        root, base = base, base.base
    if (
        not array.size
        or not isinstance(root, np.memmap)
        or not root.filename
        or root.mode == "c"
        or array.dtype.hasobject
    ):
        return None
    start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return str(root.filename), array.dtype, array.shape, root.offset + start, array.strides


def _open_mapped(path: str, dtype: np.dtype, shape: tuple, offset: int, strides: tuple) -> np.ndarray:
    """The array of `_mapped`, read-only."""
    return np.ndarray(shape, dtype, np.memmap(path, np.uint8, "r"), offset, strides)


def _build(kind: str, config: dict[str, Any], weights: dict[str, Tensor], training: bool) -> nn.Module:
    model = build_model(kind, config)
    model.load_state_dict(weights)
    return model.train(training)


def _to_own_gpu(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.cuda().requires_grad_(requires_grad)


def write_job(path: Path, arguments: tuple) -> str:
    """Write what is to be trained to a file that only this user can read; its SHA-256.

    Raises:
        LaunchError: something in it cannot be sent to another process, or the disk is full.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as handle:
            _Pickler(handle).dump(arguments)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise LaunchError(
            f"the model, its data or its objective cannot be sent to other processes ({error}); set devices: 1"
        ) from error
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written ({error.strerror}); make room there, and run it again") from None
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_job(path: Path, sha256: str) -> tuple:
    """What `write_job` has written; code in it is run, so it has to be that very file.

    Raises:
        LaunchError: its SHA-256 is another one.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise LaunchError(f"{path}: is not the file that this training wrote, so it is not opened; start it again")
    return cloudpickle.loads(content)


# --- processes ---


@contextmanager
def _stopping(folder: Path) -> Iterator[None]:
    """Pass SIGTERM, SIGUSR1 and SIGINT on to the training as a file; a second SIGINT interrupts at once."""

    def ask(number: int, frame: Any) -> None:
        (folder / STOP).write_text(str(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(ask):
        yield


def _obey(folder: Path, how: str) -> None:
    """Leave by the signal that was passed on, if one was; Slurm sends it to the processes too, and they may die of it.

    Raises:
        Preempted, KeyboardInterrupt: see `leave`.
    """
    if (folder / STOP).exists():
        number = int((folder / STOP).read_text())
        leave(number, f"stopped by {signal.Signals(number).name} {how}")


@contextmanager
def _started(job: dict[str, Any], config: TrainConfig, folder: Path) -> Iterator[subprocess.Popen]:
    """torchrun, or srun that starts it; killed at the end of the block if it is still there."""
    threads = max(1, torch.get_num_threads() // config.devices)
    paths = [path or os.getcwd() for path in sys.path]  # what can be imported here can be imported there
    added = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    left_out = {STATUS_VARIABLE, *(OF_THE_STEP_AROUND if job["way"] == "slurm" else ())}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | added
    command = [sys.executable, "-m", "workbench.agent", "agent", json.dumps(job | {"parent": os.getpid()})]
    with (folder / ERRORS).open("w") as errors, ExitStack() as stack:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, errors="replace",
            env=environment, start_new_session=True,
        )  # fmt: skip
        stack.enter_context(process.stdout)
        try:
            yield process
        finally:
            if process.poll() is None and job["way"] == "slurm":
                process.terminate()  # srun ends its step
                try:
                    process.wait(ENDING_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
            process.kill()
            process.wait()


class _Screen:
    """What the processes of a training tell, shown in this one."""

    def __init__(self, process: subprocess.Popen, folder: Path, config: TrainConfig) -> None:
        self.process, self.folder, self.config = process, folder, config
        self.bar: Progress | None = None

    def show(self) -> None:
        """Show what comes, until the training has ended; raise what it raised."""
        with ExitStack() as self.stack:
            try:
                if not self._listen():
                    _obey(self.folder, "with all processes of the training; the last checkpoint is whole")
                    raise LaunchError(self._failure())
            except BaseException as error:
                self._stopped(f"({type(error).__name__})")
                raise

    def _listen(self) -> bool:
        """Whether the training came to its end."""
        for line in self.process.stdout:
            text, sent, message = line.partition(MESSAGE)  # some print without ending their line
            if text:
                print(text, end="", flush=True)
            if not sent:
                continue
            try:
                message = json.loads(message)
            except json.JSONDecodeError:  # srun has mixed long lines of two nodes
                print(message, end="", flush=True)
                continue
            match message.pop("kind"):
                case "progress":
                    self._progress(**message)
                case "left":
                    self._wait()
                    self._leave(**message)
                case "error":
                    raise _error(**message)
                case "done":
                    self._wait()
                    return True
        return False

    def _progress(self, done: int, total: int, initial: int, figures: str) -> None:
        if self.bar is None:
            self.bar = self.stack.enter_context(Progress(total, "training", "step", initial))
        self.bar.update(done - self.bar.n, figures)

    def _leave(self, number: int, message: str) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt(f"{message}: run it again to go on")
        raise Preempted(PREEMPTED_EXIT)

    def _wait(self) -> None:
        """Let all processes end by themselves; `_started` kills what does not."""
        try:
            self.process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            pass

    def _stopped(self, reason: str) -> None:
        done = {"done": self.bar.n, "total": self.bar.total} if self.bar else {}
        self.stack.close()
        write_status("stopped", what="training", **done, reason=reason)

    def _failure(self) -> str:
        lines = (self.folder / ERRORS).read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return (
            f"{self.config.processes} processes of the training ended with code {self.process.wait()} and no model: "
            "run it again to go on from the last checkpoint. The end of what they wrote:\n" + "\n".join(lines)
        )


def _error(name: str, message: str, trace: str) -> Exception:
    error = KNOWN[name](message) if name in KNOWN else LaunchError(f"{name}: {message}")
    error.add_note(f"In a process of the training:\n{trace}")
    return error
