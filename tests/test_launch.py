"""A training over several processes begins, ends, dies and goes on as one of one process does."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import conditioned
import numpy as np
import psutil
import pytest
import torch
from tiny import Images, N, assert_same, conv_vae, metrics, train

from workbench import launch
from workbench.checkpoints import load_checkpoint
from workbench.launch import LaunchError, read_job, write_job
from workbench.listing import describe_run
from workbench.models.conditioners import CNNConditioner, CNNConditionerConfig
from workbench.models.conv_vae import ConvVAE
from workbench.process import PREEMPTED_EXIT, Preempted
from workbench.runs import Run, run_path
from workbench.schedule import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parent / "launched.py"
needs_two_cores = pytest.mark.skipif(launch.usable_cores() < 2, reason="needs 2 cores")
TAKEN = 24
"""Steps of the script's training."""


class Launched:
    """The script, what it prints, and the processes it has started."""

    def __init__(self, folder: Path, devices: int = 2, *options: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(devices)}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(devices), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.run, self.lines = Run(folder / "e" / "r"), []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.children() if "workbench.worker" in p.cmdline()]

    def step(self) -> int:
        last = self.run.path / "checkpoints" / "last.ckpt"
        return load_checkpoint(last)["step"] if last.exists() else 0

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> float:
        """Seconds until the condition held."""
        started = time.monotonic()
        while not condition():
            assert self.process.poll() is None or condition(), self.process.stderr.read()
            assert time.monotonic() - started < seconds, "".join(self.lines)
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self) -> int:
        code = self.process.wait(90)
        self.reader.join(10)
        return code


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    begun: list[Launched] = []

    def begin(*options: str, devices: int = 2) -> Launched:
        begun.append(Launched(tmp_path, devices, *options))
        return begun[-1]

    yield begin
    for one in begun:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    one = Launched(tmp_path_factory.mktemp("undisturbed"))
    assert one.end() == 0, one.process.stderr.read()
    return one.run


# --- in processes of their own ---


@needs_two_cores
@pytest.mark.slow
def test_it_trains_as_one_process_does(undisturbed: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = Images(N)
    alone, _ = train(tmp_path, conv_vae(ConvVAE), images, epochs=8, checkpoint_every=1)
    for row, expected in zip(metrics(undisturbed, "train"), metrics(alone, "train"), strict=True):
        assert {k: float(v or 0) for k, v in row.items() if k != "split"} == pytest.approx(
            {k: float(v or 0) for k, v in expected.items() if k != "split"}, rel=1e-5, abs=1e-7
        )
    assert not list(undisturbed.path.glob("launch-*")), "what was sent is still there"
    last = load_checkpoint(undisturbed.path / "checkpoints" / "last.ckpt")
    assert (last["step"], last["processes"], last["threads"]) == (TAKEN, "2", "1")
    assert (undisturbed.path / "samples" / "step_0000024.png").exists() or list(
        (undisturbed.path / "samples").iterdir()
    )


@needs_two_cores
@pytest.mark.slow
def test_sigterm_and_then_kill_9_of_one_process_change_no_bit(
    undisturbed: Run, launched: Callable[..., Launched]
) -> None:
    """A checkpoint is written at the signal; a process that is killed is made up for within 30 s."""
    one = launched()
    one.wait(lambda: one.step() >= 5)
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == PREEMPTED_EXIT, one.process.stderr.read()
    step = one.step()
    assert 5 <= step < TAKEN
    assert f"stopped by SIGTERM after step {step} of {TAKEN}; a checkpoint was written\n" in one.lines
    assert not one.run.trained and not list(one.run.path.glob("launch-*"))
    again = launched()
    again.wait(lambda: again.step() >= step + 4)
    assert f"resumed {again.run.path}/checkpoints/last.ckpt at step {step} of {TAKEN}\n" in again.lines
    again.workers()[1].kill()
    seconds = again.wait(lambda: sum(line.startswith("resumed ") for line in again.lines) == 2)
    assert seconds < 30, f"it took {seconds:.0f} s"
    assert again.end() == 0, again.process.stderr.read()
    assert not any("bit for bit" in line for line in again.lines)
    assert_same(again.run, undisturbed)


@needs_two_cores
@pytest.mark.slow
def test_kill_9_of_the_parent_leaves_no_process_and_another_number_of_processes_goes_on(
    launched: Callable[..., Launched], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one = launched()
    one.wait(lambda: one.step() >= 3 and len(one.workers()) == 2)
    children = one.children()
    assert len(children) >= 3, "torchrun and two processes"
    one.process.kill()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    step = one.step()
    torch.set_num_threads(2)
    try:
        run, model = train(tmp_path, conv_vae(ConvVAE), Images(N), epochs=8, checkpoint_every=1)
    finally:
        torch.set_num_threads(1)
    said = "not bit for bit as without the interruption, as this has changed: processes: 2 there, 1 here\n"
    assert said in capsys.readouterr().out
    assert run.config["changes"] == [f"step {step}: processes: 2 there, 1 here"]
    assert run.trained and not model.training


@needs_two_cores
@pytest.mark.slow
def test_two_nodes_end_in_the_weights_of_two_processes_on_one(
    undisturbed: Run, launched: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each is told its number and where to meet, and has a whole run folder of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WORKBENCH_RENDEZVOUS", f"127.0.0.1:{probe.getsockname()[1]}")
    nodes = []
    for node in ("0", "1"):
        monkeypatch.setenv("WORKBENCH_NODE_RANK", node)
        nodes.append(launched("--nodes", devices=1))
    for node in nodes:
        assert node.end() == 0, node.process.stderr.read()
    for name in ("r", "r-node1"):
        assert_same(Run(tmp_path / "e" / name), undisturbed)


@needs_two_cores
@pytest.mark.slow
def test_an_error_of_a_process_is_raised_here_with_its_message(launched: Callable[..., Launched]) -> None:
    one = launched("--infinite")
    assert one.end() == 1
    errors = one.process.stderr.read()
    assert "\nworkbench.health.NonFiniteError: step 1 is not finite (mse=nan, " in errors
    assert "its samples are clip" in errors and "\nIn a process of the training:\n" in errors
    assert not list(one.run.path.glob("launch-*")) and not one.run.trained
    assert describe_run(one.run.path)["state"].endswith("(NonFiniteError)")


# --- what they tell ---


def _told(tmp_path: Path, *lines: str, code: int = 0, errors: str = "") -> None:
    """What `launch` makes of lines that processes write."""
    program = f"import sys; sys.stdout.write({''.join(lines)!r}); sys.exit({code})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    (tmp_path / launch.ERRORS).write_text(errors)
    with process.stdout:
        launch._Screen(process, tmp_path, TrainConfig(devices=2)).show()


def _message(kind: str, **entries: Any) -> str:
    return f"{launch.MESSAGE}{json.dumps({'kind': kind} | entries)}\n"


def _progress(done: int) -> str:
    return _message("progress", done=done, total=8, initial=2, figures="mse 0.5")


def test_what_is_printed_is_printed_and_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _told(tmp_path, "resumed ", _progress(2), "at 2\n", _progress(5), _progress(8), _message("done"))
    shown = capsys.readouterr()
    assert shown.out == "resumed at 2\n"
    assert "training: 100%" in shown.err and "8/8" in shown.err and "mse 0.5" in shown.err


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, Preempted)])
def test_a_signal_ends_it_as_in_one_process(
    number: int, expected: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_STATUS", str(tmp_path / "status.json"))
    with pytest.raises(expected) as caught:
        _told(tmp_path, _progress(3), _message("left", number=int(number), message="stopped after step 3"))
    assert str(caught.value) == ("stopped after step 3: run it again to go on" if number == signal.SIGINT else "75")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["done"], status["total"]) == ("stopped", 3, 8)
    assert status["reason"] == f"({expected.__name__})"


def test_errors_keep_their_kind_where_it_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^batch_size=64: must be at most 24"):
        _told(tmp_path, _message("error", name="ValueError", message="batch_size=64: must be at most 24", trace=""))
    with pytest.raises(LaunchError, match="^Strange: of its own kind"):
        _told(tmp_path, _message("error", name="Strange", message="of its own kind", trace=""))


def test_processes_that_die_too_often_are_told_of_with_what_they_wrote(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        _told(tmp_path, _progress(3), code=9, errors="\n".join(map(str, range(100))) + "\nno such library\n")
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "2 processes of the training ended with code 9 and no model: run it again to go on from the last checkpoint. "
        "The end of what they wrote:"
    )
    assert lines == [*map(str, range(81, 100)), "no such library"]


# --- what is sent ---


def test_memory_maps_go_by_path_and_come_back_as_they_were(tmp_path: Path) -> None:
    whole = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (1000, 300))
    whole[:] = np.arange(300_000).reshape(1000, 300)
    whole.flush()
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    raw = np.memmap(tmp_path / "a.npy", np.uint8, "r", offset=128)
    parts = {"whole": mapped, "rows": mapped[10:900:7], "view": np.asarray(mapped)[:, 5:90], "turned": mapped.T[::-1]}
    parts |= {"raw": raw, "small": np.arange(3)}
    digest = write_job(tmp_path / "job", (parts, mapped))
    assert (tmp_path / "job").stat().st_size < 5000
    assert (tmp_path / "job").stat().st_mode & 0o777 == 0o600
    again, same = read_job(tmp_path / "job", digest)
    for name, part in parts.items():
        assert np.array_equal(again[name], part) and again[name].strides == part.strides, name
    assert same is again["whole"] and not same.flags.writeable and isinstance(same.base, np.memmap)
    write_job(tmp_path / "twice", tuple(again.values()))
    assert (tmp_path / "twice").stat().st_size < 5000, "what came back goes by path again"


def test_what_was_written_over_in_a_map_goes_by_content(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    copied = np.load(tmp_path / "a.npy", mmap_mode="c")
    copied[:] = 1
    (again,) = read_job(tmp_path / "job", write_job(tmp_path / "job", (copied,)))
    assert again.tolist() == [1, 1, 1]


def test_closures_locks_and_one_model_in_two_places(tmp_path: Path) -> None:
    model = conv_vae(ConvVAE)
    things = (model, {"same": model}, lambda progress: {"mse": 1 - progress}, threading.Lock())
    again, holder, weights, lock = read_job(tmp_path / "job", write_job(tmp_path / "job", things))
    assert holder["same"] is again and weights(0.25) == {"mse": 0.75} and lock.acquire(blocking=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_models_with_spectral_norms_come_back_as_they_were(tmp_path: Path) -> None:
    vae = conditioned.hierarchical_vae().eval()
    sizes = {"main_dim": 3, "hier_dim": 2, "width": 4, "depth": 1, "image_size": 8}
    conditioner = CNNConditioner(CNNConditionerConfig(**sizes, image_channels=1, spectral_norm=True))
    sent = (vae, conditioner, {"same": vae})
    *again, holder = read_job(tmp_path / "job", write_job(tmp_path / "job", sent))
    assert holder["same"] is again[0] and not again[0].training and again[1].training
    for before, after in zip((vae, conditioner), again, strict=True):
        assert before.state_dict().keys() == after.state_dict().keys() and before.config == after.config
        weights = zip(before.state_dict().values(), after.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be sent to other processes .*; set devices: 1$"):
        write_job(tmp_path / "job", (io.TextIOWrapper(io.BytesIO()),))


def test_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(LaunchError) as caught:
        patch.setattr(launch.os, "open", full)
        write_job(tmp_path / "job", (1,))
    said = "cannot be written (No space left on device); make room there, and run it again"
    assert str(caught.value) == f"{tmp_path}/job: {said}"


def test_a_job_that_is_another_is_not_opened(tmp_path: Path) -> None:
    digest = write_job(tmp_path / "job", (1,))

    class Harmful:
        def __reduce__(self) -> tuple:
            return (tmp_path / "harm").touch, ()

    (tmp_path / "job").write_bytes(cloudpickle.dumps((Harmful(),)))
    with pytest.raises(LaunchError, match="job: is not the file that this training wrote, so it is not opened"):
        read_job(tmp_path / "job", digest)
    assert not (tmp_path / "harm").exists()


# --- where ---


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Slurm nor other nodes."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "WORKBENCH_NODE_RANK", "WORKBENCH_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)


def _refused(**settings: Any) -> str:
    with pytest.raises(LaunchError) as caught:
        launch._where(TrainConfig(**{"device": "cpu", "batch_size": 64} | settings))
    return str(caught.value)


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 2)
    assert _refused(devices=4) == "devices=4: 2 CPU cores are present on this node; set devices to at most 2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for device in ("auto", "cuda"):
        said = "devices=4: 3 CUDA devices are present on this node; set devices to at most 3"
        assert _refused(device=device, devices=4) == said
    single = "device='cuda:1' with devices=2: must name no single device; use 'auto' or 'cuda'"
    assert _refused(device="cuda:1", devices=2) == single


@pytest.mark.usefixtures("nowhere")
def test_several_nodes_need_a_way_to_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _refused(num_nodes=2) == (
        "num_nodes=2: must be 1 outside an allocation of Slurm; or run the same notebook on every node, with "
        "WORKBENCH_NODE_RANK=0, 1, … and WORKBENCH_RENDEZVOUS=<address of node 0>:<free port> set"
    )
    monkeypatch.setenv("WORKBENCH_NODE_RANK", "2")
    rule = "must be this node's number, from 0 to 1, as num_nodes=2"
    assert _refused(num_nodes=2) == f"WORKBENCH_NODE_RANK='2': {rule}"
    monkeypatch.setenv("WORKBENCH_NODE_RANK", "1")
    rule = "must be <address of node 0>:<free port>, the same on every node"
    for endpoint in ("", "here", ":29500", "here:"):
        monkeypatch.setenv("WORKBENCH_RENDEZVOUS", endpoint)
        assert _refused(num_nodes=2) == f"WORKBENCH_RENDEZVOUS={endpoint!r}: {rule}"
    monkeypatch.setenv("WORKBENCH_RENDEZVOUS", "10.0.0.1:29500")
    where = launch._where(TrainConfig(device="cpu", num_nodes=2))
    assert (where["way"], where["node"], where["endpoint"]) == ("nodes", 1, "10.0.0.1:29500")


@pytest.mark.usefixtures("nowhere")
def test_an_allocation_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert _refused(num_nodes=4) == "num_nodes=4: job 7 has 2; ask for more with --nodes, or lower it"


@pytest.mark.usefixtures("nowhere")
def test_the_first_node_of_an_allocation_is_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    answers = {"hostnames": "n3\nn4\n", "node": "NodeName=n3 Arch=x86_64 NodeAddr=10.0.0.3 NodeHostName=n3\n"}
    monkeypatch.setattr(launch, "_said", lambda *command: answers[command[2]])
    host, port = launch._where(TrainConfig(device="cpu", num_nodes=2))["endpoint"].split(":")
    assert host == "10.0.0.3" and 1024 < int(port) < 65536


def test_other_nodes_have_run_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = {"experiment": "e", "run": "r", "num_nodes": 2}
    monkeypatch.setenv("WORKBENCH_NODE_RANK", "0")
    assert run_path(named, tmp_path) == tmp_path / "e" / "r"
    monkeypatch.setenv("WORKBENCH_NODE_RANK", "1")
    assert run_path(named, tmp_path) == tmp_path / "e" / "r-node1"
    assert run_path(named | {"num_nodes": 1}, tmp_path) == tmp_path / "e" / "r"
