"""One full-size training step against the same network trained plainly, and the loss curves of both."""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.loops import Blobs, Ours, Plain
from benchmarks.report import in_turns, line, run
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.objectives import Reconstruction
from workbench.schedule import TrainConfig

THREADS = 2
SETTINGS = {"precision": "bf16", "channels_last": True, "lr": 1e-4}
MIN_RATIO = 2.2
MAX_DEVIATION = 0.02


def loops(sizes: ConvVAEConfig, data: Blobs, batch_size: int, folder: Path) -> tuple[Plain, Ours]:
    """Both loops over the same data, of networks with the same weights."""
    settings = TrainConfig(batch_size=batch_size, device="cpu", **SETTINGS)
    torch.manual_seed(0)
    model = ConvVAE(sizes)
    plain = Reconstruction(copy.deepcopy(model))
    return Plain(plain, data, settings), Ours(Reconstruction(model), data, settings, folder)


def main() -> None:
    """Print the ratio of the step times at full size, and how far the small loss curves differ."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        full, data = ConvVAEConfig(), Blobs(8, 256)
        plain, ours = loops(full, data, 4, Path(folder))
        seconds = in_turns({"plain": plain.train_step, "ours": ours.train_step}, rounds=8, warmup=2)
        ratio = seconds["plain"] / seconds["ours"]
        what = f"full-size step, batch 4: {seconds['plain']:.2f} s plainly, {seconds['ours']:.2f} s here"
        line(what, f"{ratio:.2f} times faster", f"at least {MIN_RATIO}", ratio >= MIN_RATIO)

        small, data = ConvVAEConfig(image_size=64, latent_dim=32, hidden_dims=[32, 64, 128]), Blobs(2048, 64)
        plain, ours = loops(small, data, 32, Path(folder))
        for _ in range(200):
            plain.train_step()
            ours.train_step()
        deviation = float(np.abs(np.array(ours.losses) / np.array(plain.losses) - 1).max())
        what = "loss curves of 200 steps, small size, largest difference at a step"
        line(what, f"{100 * deviation:.2f} %", f"{100 * MAX_DEVIATION:.0f} %", deviation <= MAX_DEVIATION)


if __name__ == "__main__":
    sys.exit(run(main))
