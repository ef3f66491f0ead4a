"""What the tests of training share: 8 x 8 images in memory, small models, a short run.

As a script (`python tiny.py FOLDER`) it is the process that tests kill.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from workbench import checkpoints
from workbench.checkpoints import load_checkpoint
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer, fit

SMALL = ConvVAEConfig(image_size=8, latent_dim=3, hidden_dims=[4, 6])
SETTINGS = {"epochs": 4, "batch_size": 8, "lr": 1e-3, "lr_decay": 0.5, "checkpoint_every": 2, "log_every": 2}
N, PER_EPOCH, STEPS = 24, 3, 12  # training images, steps in each of 4 epochs, steps in all
TIMES = ("samples_per_s", "seconds", "memory_mb")
QUICK = {"device": "cpu", "images_every": 1000}


class Images:
    """Random blobs in memory; `on_batch` is called with the number of each batch that is read, from 1."""

    def __init__(self, n: int, seed: int = 0, size: int = 8, on_batch: Callable[[int], None] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        small = torch.rand(n, 3, size // 4, size // 4, generator=generator)
        self.x = 2 * nn.functional.interpolate(small, size=size, mode="bilinear") - 1
        self.on_batch, self.read = on_batch, 0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        self.read += 1
        if self.on_batch:
            self.on_batch(self.read)
        return {"x": self.x[torch.as_tensor(indices)], "id": torch.as_tensor(indices)}

    @staticmethod
    def prepare(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(batch)

    def name(self, index: int) -> str:
        return f"clip{index:02d}/0"


class WithDropout(ConvVAE):
    """A model that draws from the default generator too."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return super().decode(nn.functional.dropout(z, 0.2, self.training))


class Linear(nn.Module):
    """A VAE without batch norm; running out of memory above `most` samples where given."""

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.noise_dim, self.most, self.sizes = SMALL, 3, most, []
        self.encoder, self.decoder = nn.Linear(192, 6), nn.Linear(3, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x.flatten(1))[:, :3]).reshape(x.shape).tanh()

    def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.sizes.append(len(batch["x"]))
        mu, logvar = self.encoder(batch["x"].flatten(1)).chunk(2, 1)
        z = mu + (0.5 * logvar).exp() * batch["noise"] if "noise" in batch else mu
        error = (self.decoder(z).reshape(batch["x"].shape).tanh() - batch["x"]).square().mean()
        if self.most is not None and len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {"mse": error, "kl": 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()}


class Dies(BaseException):
    """Stands for a kill: whatever is not on disk by now is lost."""


def conv_vae(model_class: type[ConvVAE] = WithDropout) -> ConvVAE:
    torch.manual_seed(0)
    return model_class(SMALL)


def train(
    folder: Path,
    model: nn.Module | None = None,
    images: Images | None = None,
    val: Images | None = None,
    weights: Callable | None = None,
    **settings: Any,
) -> tuple[Run, nn.Module]:
    config = TrainConfig(**QUICK | SETTINGS | settings)
    run = open_run({"experiment": "e", "run": "r", **config.model_dump()}, folder)
    images, val = images or Images(N), val or Images(12, seed=1)
    weights = weights or vae_weights(config)
    return run, fit(model or conv_vae(), "conv_vae", images, val, config, run, weights, lambda x, x_hat: Figure())


def stepped(folder: Path, model: nn.Module, steps: int = 3, **settings: Any) -> tuple[Trainer, list[dict[str, float]]]:
    """A trainer after some steps, by hand."""
    config = TrainConfig(**QUICK | SETTINGS | settings)
    images = Images(N)
    trainer = Trainer(model.train(), images, images, config, Run(folder), vae_weights(config), lambda a, b: Figure())
    rows = []
    for step in range(steps):
        indices = np.arange(8) + 8 * step
        rows.append(trainer._train_step(indices, images.batch(indices)))
    return trainer, rows


def metrics(run: Run, split: str = "") -> list[dict[str, str]]:
    """Rows of metrics.csv without what differs from run to run."""
    with (run.path / "metrics.csv").open(newline="") as handle:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(handle)]
    return [row for row in rows if split in ("", row["split"])]


def assert_same(run: Run, expected: Run) -> None:
    """Bit for bit: the final weights, the best ones, and what was logged."""
    assert (run.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    assert metrics(run) == metrics(expected)
    for name in ("best", "last"):
        one, other = (load_checkpoint(r.path / "checkpoints" / f"{name}.ckpt") for r in (run, expected))
        assert {k: one[k] for k in ("step", "best", "micro_batches", "validated")} == {
            k: other[k] for k in ("step", "best", "micro_batches", "validated")
        }
        assert one["model"].keys() == other["model"].keys()
        assert all(torch.equal(one["model"][key], value) for key, value in other["model"].items())


def sends(number: int, at: int) -> Callable[[int], None]:
    """Sends this process a signal while the batch of that number is read."""

    def on_batch(count: int) -> None:
        if count == at:
            os.kill(os.getpid(), number)

    return on_batch


def script(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, __file__, str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(word: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(process.stderr.read())


def main(folder: str, *options: str) -> None:
    """The run of `undisturbed`, a little slower, so that a kill can meet it anywhere."""
    publish, count = checkpoints._publish, 0
    dies = {name: int(number) for name, _, number in (option.partition("=") for option in options) if number}

    def counted(handle: Any, temporary: Path, path: Path) -> None:
        nonlocal count
        count += path.suffix == ".ckpt"
        if count == dies.get("--die-in-save"):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(handle, temporary, path)

    def slowly(number: int) -> None:
        print("reading", flush=True)
        if number == dies.get("--die-in-read"):
            time.sleep(random.uniform(0, 0.1))  # the steps go on meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)

    checkpoints._publish = counted
    torch.set_num_threads(1)
    if "--compile" in options:
        train(Path(folder), conv_vae(ConvVAE), compile=True, epochs=1)
    else:
        train(Path(folder), images=Images(N, on_batch=slowly), kl_rise_to=10 / 12)


if __name__ == "__main__":
    main(*sys.argv[1:])
