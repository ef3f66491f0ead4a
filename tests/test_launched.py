"""A training over several processes begins, ends, dies and goes on as one of one process does; with real processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from divided import in_processes
from matplotlib.figure import Figure
from tiny import QUICK, SETTINGS, Images, N, assert_same, conv_vae, metrics, train

from workbench import launch
from workbench.checkpoints import load_checkpoint
from workbench.distributed import World
from workbench.listing import describe_run
from workbench.models.conv_vae import ConvVAE
from workbench.process import PREEMPTED_EXIT, Preempted
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import train_into

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parent / "launched.py"
needs_two_cores = pytest.mark.skipif(launch.usable_cores() < 2, reason="needs 2 cores")
LENGTH = {"epochs": 8, "checkpoint_every": 1}
WAIT_SECONDS = 300
TAKEN = 24
"""Steps of the script's training."""


class Launched:
    """The script, what it prints, and the processes it has started."""

    def __init__(self, folder: Path, devices: int = 2, *options: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(devices)}
        command = [sys.executable, str(SCRIPT), str(folder), str(devices), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)
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

    def resumed(self) -> int:
        return sum(line.startswith("resumed ") for line in self.lines)

    def wait(self, condition: Callable[[], bool]) -> None:
        started = time.monotonic()
        while not condition():
            assert self.process.poll() is None or condition(), self.process.stderr.read()
            assert time.monotonic() - started < WAIT_SECONDS, "".join(self.lines)
            time.sleep(0.05)

    def end(self) -> int:
        code = self.process.wait(WAIT_SECONDS)
        self.reader.join(WAIT_SECONDS)
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


def _forked(folder: Path, stop: Mapping[str, int]) -> Run:
    """The script's training, in two processes that nothing starts again."""
    config = TrainConfig(**QUICK | SETTINGS | LENGTH, devices=2)
    run = open_run({"experiment": "e", "run": "r", **config.model_dump()}, folder)
    data = (Images(N), Images(12, seed=1), config, run, vae_weights(config), lambda x, x_hat: Figure(), None)

    def work(world: World) -> bool:
        try:
            train_into(conv_vae(ConvVAE), "conv_vae", *data, stop, world)
        except Preempted:
            assert stop
        return True

    in_processes(2, work, folder)
    return run


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _forked(tmp_path_factory.mktemp("undisturbed"), {})


def test_it_trains_as_one_process_does(undisturbed: Run, tmp_path: Path) -> None:
    alone, _ = train(tmp_path, conv_vae(ConvVAE), Images(N), **LENGTH)
    for row, expected in zip(metrics(undisturbed), metrics(alone), strict=True):
        tolerance = 1e-5 if row["split"] == expected.pop("split") == "train" else 1e-2  # running means, see distributed
        figures, of_one = ({k: float(v or 0) for k, v in r.items() if k != "split"} for r in (row, expected))
        assert figures == pytest.approx(of_one, rel=tolerance, abs=1e-7)
    last = load_checkpoint(undisturbed.path / "checkpoints" / "last.ckpt")
    assert (last["step"], last["processes"], last["threads"]) == (TAKEN, "2", "1")
    assert list((undisturbed.path / "samples").iterdir())


def test_another_number_of_processes_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _forked(tmp_path, {"signal": signal.SIGUSR1})
    capsys.readouterr()
    run, model = train(tmp_path, conv_vae(ConvVAE), Images(N), **LENGTH)
    said = "not bit for bit as without the interruption, as this has changed: processes: 2 there, 1 here\n"
    assert said in capsys.readouterr().out
    assert run.config["changes"] == ["step 1: processes: 2 there, 1 here"]
    assert run.trained and not model.training


@pytest.mark.slow
def test_a_node_that_comes_back_with_nothing_gets_the_best_weights_of_the_first(tmp_path: Path) -> None:
    """Each of two nodes has a run folder of its own; that of the second is lost after the last step."""
    config = TrainConfig(**QUICK | SETTINGS | {"lr": 0.01, "lr_decay": 1.0, "keep": "best"}, devices=2)

    def weights(share: float) -> dict[str, float]:
        return {"mse": 1.0, "kl": 10.0 if share == 1 else 0.0}  # the KL grows, and is judged at the end

    def run_of(rank: int) -> Run:
        return open_run({"experiment": "e", "run": f"r{rank}", **config.model_dump()}, tmp_path)

    def work(world: World) -> int:
        data = (Images(N), Images(12, seed=1), config, run_of(world.rank), weights)
        each = replace(world, writes=True)
        train_into(conv_vae(ConvVAE), "conv_vae", *data, lambda x, x_hat: Figure(), None, {}, each)
        return load_checkpoint(tmp_path / "e" / "r0" / "checkpoints" / "best.ckpt")["step"]

    assert in_processes(2, work, tmp_path)[0] < 12, "the last weights are the best"
    kept = (run_of(0).path / "model.safetensors").read_bytes()
    (run_of(0).path / "model.safetensors").unlink()
    shutil.rmtree(run_of(1).path)
    in_processes(2, work, tmp_path)
    assert [(run_of(rank).path / "model.safetensors").read_bytes() for rank in (0, 1)] == [kept] * 2


@needs_two_cores
@pytest.mark.slow
def test_whatever_ends_it_changes_no_bit(undisturbed: Run, launched: Callable[..., Launched]) -> None:
    """Kill -9 of one process, SIGTERM, data that is not finite, and kill -9 of the parent, one after the other."""
    step = _one_process_killed_then_sigterm(launched("--slowly"))
    _not_finite(launched("--infinite"))
    _parent_killed(launched("--slowly"), step)
    last = launched()
    assert last.end() == 0, last.process.stderr.read()
    assert not any("bit for bit" in line for line in last.lines)
    assert not list(last.run.path.glob("launch-*")), "what was sent is still there"
    assert_same(last.run, undisturbed)


def _one_process_killed_then_sigterm(one: Launched) -> int:
    """The process is made up for, a checkpoint is written at the signal; its step."""
    one.wait(lambda: one.step() >= 3)
    one.workers()[1].kill()
    one.wait(lambda: one.resumed() == 1)
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == PREEMPTED_EXIT, one.process.stderr.read()
    step = one.step()
    assert 3 <= step < TAKEN
    assert f"stopped by SIGTERM after step {step} of {TAKEN}; a checkpoint was written\n" in one.lines
    assert not one.run.trained and not list(one.run.path.glob("launch-*"))
    return step


def _not_finite(one: Launched) -> None:
    """The error of a process is raised in the parent, with its message."""
    assert one.end() == 1
    errors = one.process.stderr.read()
    assert "\nworkbench.health.NonFiniteError: step " in errors and " is not finite (mse=nan, " in errors
    assert "its samples are clip" in errors and "\nIn a process of the training:\n" in errors
    assert not list(one.run.path.glob("launch-*")) and not one.run.trained
    assert describe_run(one.run.path)["state"].endswith("(NonFiniteError)")


def _parent_killed(one: Launched, step: int) -> None:
    """No process is left."""
    one.wait(lambda: one.step() >= step + 2)
    assert f"resumed {one.run.path}/checkpoints/last.ckpt at step {step} of {TAKEN}\n" in one.lines
    children = one.children()
    assert len(children) >= 3, "torchrun and two processes"
    one.process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive and not one.run.trained


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
