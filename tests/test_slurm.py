"""On a real Slurm of two nodes, started here for these tests, see loopback.py."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
import tiny
from projects import OPEN, PARAMETERS, SEED, make_project, make_sweep, until, write_notebook, write_params

from workbench.__main__ import main
from workbench.checkpoints import load_checkpoint
from workbench.paths import outputs_root
from workbench.runs import Run

ROOT, TESTS = Path(__file__).parents[1], Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not loopback.installed(), reason="needs root and Debian's slurm-wlm: make slurm"),
]
EDITS = {
    r"PARTITION, ACCOUNT = .*": 'PARTITION, ACCOUNT = "main", None',
    r"GPUS, OF_A_RUN, CORES, MEMORY_GB = .*": "GPUS, OF_A_RUN, CORES, MEMORY_GB = 2, 1, 4, 2",
    r"JOBS, WALLTIME = .*": 'JOBS, WALLTIME = 2, "00:10:00"',
}
SOONER = "\nconfig.strategy_period = 1\nProvider.status_polling_interval = 1\n"
WHERE = """
import os
from pathlib import Path
with (Path(os.environ["WORKBENCH_STATUS"]).parent / "where.txt").open("a") as file:
    print(os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"], os.environ["CUDA_VISIBLE_DEVICES"], file=file)
"""
TRAIN = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import time, torch
import tiny
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit
torch.set_num_threads(1)
config = TrainConfig(**tiny.QUICK | tiny.SETTINGS | {{"seed": seed}})
images = tiny.Images(tiny.N, on_batch=lambda number: time.sleep(lr))
model = fit(tiny.conv_vae(), "conv_vae", images, tiny.Images(12, seed=1), config, this_run, vae_weights(config))
this_run.finish()
"""
WAITS = """
import json, signal, time
folder = Path(os.environ["WORKBENCH_STATUS"]).parent
class Preempted(SystemExit):
    pass
def stopped(number, frame):
    raise Preempted(75)
signal.signal(signal.SIGTERM, stopped)
while len((folder / "where.txt").read_text().splitlines()) == 1:
    time.sleep(0.1)
(folder / "summary.json").write_text(json.dumps({"finished": "now"}))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with loopback.cluster(tmp_path_factory.mktemp("slurm") / "base"):
        yield


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """cluster/slurm.py with the marked lines edited, and parsl told to look more often."""
    text = (ROOT / "cluster" / "slurm.py").read_text()
    for pattern, line in EDITS.items():
        text, count = re.subn(pattern, line, text)
        assert count == 1, pattern
    path = tmp_path / "slurm.py"
    path.write_text(text + SOONER)
    return path


def workbench(project: Path, *arguments: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "workbench", *arguments]
    environment = os.environ | {"WORKBENCH_OUTPUTS": str(project / "outputs"), "OMP_NUM_THREADS": "1"}
    log = (project / "driver.log").open("w")
    return subprocess.Popen(line, cwd=project, env=environment, stdout=log, stderr=log, text=True)


def places(run: Run) -> list[list[str]]:
    """Job, node and devices of each start of a run."""
    path = run.path / "where.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def queue() -> str:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout


def trains(run: Run) -> bool:
    last = run.path / "checkpoints" / "last.ckpt"
    return last.exists() and 0 < load_checkpoint(last)["step"] < tiny.STEPS


def test_runs_whose_jobs_are_cancelled_or_warned_go_on_and_end_as_undisturbed(
    slurm: None, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Six seeds, two nodes, two runs on each with a GPU of its own; one job is cancelled, the other one warned."""
    project = make_sweep(tmp_path / "project", monkeypatch)
    write_notebook(project, "02_train", WHERE, OPEN.format(name="02_train"), TRAIN, parameters=PARAMETERS + SEED)
    write_params(project, settings="notebook: 02_train\nsettings: {V1: {lr: 0.6}}")
    for name in ("01_first", "06_report"):
        (project / "params" / "demo" / f"{name}.yaml").unlink()
    folder = project / "outputs" / "demo"
    runs = [Run(folder / f"V1-{seed}") for seed in range(6)]
    process = workbench(project, "run", "params/demo", "--seeds", "6", "--site", str(site))
    until(lambda: sum(map(trains, runs[:4])) == 4, process, project)
    first = {run: places(run)[0] for run in runs[:4]}
    assert sorted((node, device) for _, node, device in first.values()) == [
        ("n1", "0"),
        ("n1", "1"),
        ("n2", "0"),
        ("n2", "1"),
    ]
    jobs = sorted({job for job, _, _ in first.values()})
    assert subprocess.run(["scancel", jobs[0]]).returncode == 0
    assert subprocess.run(["scancel", "--signal=USR1", "--batch", jobs[1]]).returncode == 0
    assert process.wait(timeout=240) == 0, (project / "driver.log").read_text()
    text = (project / "driver.log").read_text()
    for seed, run in enumerate(runs):
        assert len(places(run)) == (2 if seed < 4 else 1), text
        expected, _ = tiny.train(tmp_path / f"undisturbed-{seed}", seed=seed)
        assert (run.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
        assert tiny.metrics(run) == tiny.metrics(expected)
    assert "V1-0: stopped by a signal on n" in text and "V1-5: done on n" in text
    for _ in range(900):
        if not queue():
            break
        time.sleep(0.1)
    assert queue() == "", "a job was left behind"


BOTH = """
import tiny
from workbench.models.conv_vae import ConvVAE
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit
config = TrainConfig(**tiny.QUICK | tiny.SETTINGS | {"devices": devices, "num_nodes": num_nodes})
model, val = tiny.conv_vae(ConvVAE), tiny.Images(12, seed=1)
fit(model, "conv_vae", tiny.Images(tiny.N), val, config, this_run, vae_weights(config))
this_run.finish()
"""


def test_a_training_over_both_nodes_ends_as_one_of_two_processes_on_one(
    slurm: None, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job of two nodes, on whose first the worker is."""
    text = site.read_text().replace("MEMORY_GB = 2, 1, 4, 2", "MEMORY_GB = 1, 1, 2, 2")
    site.write_text(text.replace("init_blocks=1,", "init_blocks=1, nodes_per_block=2,"))
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    project = make_sweep(tmp_path / "project", monkeypatch)
    parameters = f"{PARAMETERS}{SEED}\ndevices: int = 1  # on each node\nnum_nodes: int = 1  # nodes"
    write_notebook(project, "02_train", OPEN.format(name="02_train"), BOTH, parameters=parameters)
    settings = "{both: {num_nodes: 2}, one: {devices: 2}}"
    write_params(project, settings=f"notebook: 02_train\nsettings: {settings}", **{"02_train": ""})
    for name in ("01_first", "06_report"):
        (project / "params" / "demo" / f"{name}.yaml").unlink()
    process = workbench(project, "run", "params/demo", "--site", str(site))
    assert process.wait(timeout=300) == 0, (project / "driver.log").read_text()
    both, one = (Run(project / "outputs" / "demo" / name) for name in ("both-0", "one-0"))
    assert (both.path / "model.safetensors").read_bytes() == (one.path / "model.safetensors").read_bytes()
    assert tiny.metrics(both) == tiny.metrics(one)


def test_a_partition_that_there_is_not(
    slurm: None, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_project(tmp_path / "project", monkeypatch)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # a session changes it
    site.write_text(site.read_text().replace('"main", None', '"nope", None'))
    assert main(["run", "params/demo", "--site", str(site)]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"{site}: the scheduler takes no jobs (partition='nope'): sbatch: error: invalid partition")
    assert text.rstrip().endswith("correct it in the file; `sinfo -s` lists the partitions")
    assert main(["run", "params/demo", "--site", str(site), "--detach"]) == 1
    assert capsys.readouterr().err.startswith(f"{site}: the driver's job is not taken: sbatch: error: invalid part")


def test_a_driver_that_is_a_job_hands_on_to_another_when_its_time_is_up(
    slurm: None, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    project = make_project(tmp_path / "project", monkeypatch)
    (project / "params" / "demo" / "02_second.yaml").unlink()
    write_notebook(project, "01_first", WHERE, WAITS)
    assert main(["run", "params/demo", "--site", str(site), "--detach"]) == 0
    job = re.match(r"job (\d+) runs them", capsys.readouterr().out).group(1)
    run = Run(outputs_root() / "demo" / "one")
    for _ in range(900):
        if places(run):
            break
        time.sleep(0.1)
    assert places(run)[0][0] != job
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    for _ in range(1200):
        if run.finished and not queue():
            break
        time.sleep(0.1)
    drivers = list((outputs_root() / ".parsl" / "drivers").glob("*.stdout"))
    text = "".join(path.read_text() for path in sorted(drivers))
    assert run.finished and len(places(run)) == 2 and len(drivers) == 2, text
    assert "its own time is up: job " in text and "01_first: done on n" in text
