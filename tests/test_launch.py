"""Where the processes of a training are started, what is sent to them, and what they tell."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import conditioned
import numpy as np
import pytest
import torch
from tiny import conv_vae

from workbench import launch
from workbench.launch import LaunchError, read_job, write_job
from workbench.models.conditioners import CNNConditioner, CNNConditionerConfig
from workbench.models.conv_vae import ConvVAE
from workbench.process import Preempted
from workbench.runs import Run, run_path
from workbench.schedule import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_a_full_disk_is_an_error_of_the_system_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        _told(tmp_path, _message("error", name="OSError", message="[Errno 28] No space left on device", trace=""))


def test_a_torn_message_is_shown_and_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _told(tmp_path, _progress(3)[:20] + "\n", _message("done"))
    assert '{"kind": "progress"' in capsys.readouterr().out


def test_a_signal_that_comes_last_is_obeyed_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the processes have looked for one for the last time."""

    class Screen:
        def __init__(self, process: subprocess.Popen, folder: Path, config: TrainConfig) -> None:
            pass

        def show(self) -> None:
            assert freed, "this process keeps memory of a GPU that the others may need"
            os.kill(os.getpid(), signal.SIGUSR1)

    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(launch, "_Screen", Screen)
    monkeypatch.setattr(launch, "usable_cores", lambda: 2)
    with pytest.raises(Preempted, match="75"):
        launch.launch((), TrainConfig(devices=2, device="cpu"), Run(tmp_path))
    assert not list(tmp_path.iterdir())


def test_processes_that_died_of_the_signal_too_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Slurm sends it to all of a job; before they can note it, or when they take too long to end a step."""
    monkeypatch.setenv("WORKBENCH_STATUS", str(tmp_path / "status.json"))
    (tmp_path / launch.STOP).write_text(str(int(signal.SIGTERM)))
    with pytest.raises(Preempted, match="75"):
        _told(tmp_path, _progress(3), code=1)
    said = "stopped by SIGTERM with all processes of the training; the last checkpoint is whole\n"
    assert capsys.readouterr().out == said
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "(Preempted)"


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
