"""Trainings killed with SIGKILL at random instants and resumed: how many end in the undisturbed run's bits."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import line, run
from workbench.provenance import file_digest

KILLS = 20


def train(folder: Path) -> None:
    """One short training into `folder`, with a checkpoint every third step; goes on where it was."""
    import torch

    from benchmarks.loops import Blobs
    from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
    from workbench.runs import open_run
    from workbench.schedule import TrainConfig, vae_weights
    from workbench.training import fit

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = TrainConfig(epochs=4, batch_size=32, lr=1e-3, device="cpu", checkpoint_every=3, log_every=1)
    run = open_run({"experiment": folder.parent.name, "run": folder.name}, root=folder.parents[1])
    data = Blobs(640, 64)
    model = ConvVAE(ConvVAEConfig(image_size=64, latent_dim=8, hidden_dims=[16, 32, 64]))
    fit(model, "conv_vae", data, Blobs(64, 64), config, run, vae_weights(config))


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.bench_resume", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def training_seconds(folder: Path, process: subprocess.Popen) -> float:
    """Wait until the training writes its first row; the time from then to the end."""
    wait_for_rows(folder, process)
    begun = time.monotonic()
    if process.wait():
        raise RuntimeError(f"the undisturbed training in {folder} failed; run it by hand to see why")
    return time.monotonic() - begun


def wait_for_rows(folder: Path, process: subprocess.Popen) -> None:
    while not (folder / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.005)


def main() -> None:
    """Print how many of the killed and resumed trainings end in the same weights, bit for bit."""
    instants, equal, killed, tried = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kills"
        seconds = training_seconds(folder / "undisturbed", start(folder / "undisturbed"))
        expected = file_digest(folder / "undisturbed" / "model.safetensors")
        while killed < KILLS and tried < 3 * KILLS:
            here, tried = folder / f"killed_{tried:02d}", tried + 1
            process = start(here)
            wait_for_rows(here, process)
            time.sleep(instants.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:  # else it had ended before, and another instant is drawn
                killed += 1
                equal += start(here).wait() == 0 and file_digest(here / "model.safetensors") == expected
    line(
        "killed with SIGKILL at a random instant, resumed, same final bits",
        f"{equal} of {killed}",
        f"{KILLS} of {KILLS}",
        equal == KILLS,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        sys.exit(run(main))
