"""One full-size training step against the same network trained plainly, and the loss curves of both."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import in_turns, line, run
from workbench.datasets.clips import ClipDataset, normalize
from workbench.datasets.loading import batch_indices
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.plots import image_grid
from workbench.runs import Run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer, draw_noise, pick_device

THREADS = 2
SETTINGS = {"precision": "bf16", "channels_last": True, "lr": 1e-4}
MIN_RATIO = 2.2
MAX_DEVIATION = 0.02


class Blobs:
    """Frames in memory: one bright blob each, whose place, size and colour are random."""

    prepare = staticmethod(ClipDataset.prepare)

    def __init__(self, n: int, size: int) -> None:
        random = np.random.default_rng(0)
        grid = np.linspace(0, 1, size, dtype=np.float32)
        x, y, radius = random.uniform(0.1, 0.9, (3, n, 1, 1)).astype(np.float32) * [[[[1]]], [[[1]]], [[[0.3]]]]
        inside = np.exp(-((grid - x) ** 2 + (grid[:, None] - y) ** 2) / radius**2)[..., None]
        self.frames = (40 + inside * random.uniform(60, 215, (n, 1, 1, 3))).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(self.frames[indices])}

    def name(self, index: int) -> str:
        return str(index)


class Plain:
    """The same network and loss trained the plain way: NCHW, fp32, Adam as it comes."""

    def __init__(self, config: ConvVAEConfig, data: Blobs, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model, self.data, self.batch_size, self.step = ConvVAE(config).train(), data, batch_size, 0
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=SETTINGS["lr"])
        self.weights = vae_weights(TrainConfig())(0.0)
        self.indices = batch_indices(len(data), batch_size, 0, 0)

    def train_step(self) -> float:
        x = normalize(self.data.batch(next(self.indices))["x"]).contiguous()
        noise = draw_noise(0, self.step, self.batch_size, self.model.noise_dim)
        self.optimizer.zero_grad()
        terms = self.model.loss({"x": x, "noise": noise})
        loss = sum(weight * terms[name] for name, weight in self.weights.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()


class Ours:
    """The workbench's trainer, stepped by hand."""

    def __init__(self, config: ConvVAEConfig, data: Blobs, batch_size: int, folder: Path) -> None:
        torch.manual_seed(0)
        settings = TrainConfig(batch_size=batch_size, device="cpu", **SETTINGS)
        model = ConvVAE(config).to(pick_device("cpu"), memory_format=torch.channels_last).train()
        rows = lambda x, x_hat: image_grid({"x": x, "x_hat": x_hat})  # noqa: E731
        self.trainer = Trainer(model, data, data, settings, Run(folder), vae_weights(settings), rows)
        self.data, self.indices = data, batch_indices(len(data), batch_size, 0, 0)

    def train_step(self) -> float:
        indices = next(self.indices)
        return self.trainer._train_step(indices, self.data.batch(indices))["loss"]


def main() -> None:
    """Print the ratio of the step times at full size, and how far the small loss curves differ."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        full, data = ConvVAEConfig(), Blobs(8, 256)
        plain, ours = Plain(full, data, 4), Ours(full, data, 4, Path(folder))
        seconds = in_turns({"plain": plain.train_step, "ours": ours.train_step}, rounds=8, warmup=2)
        ratio = seconds["plain"] / seconds["ours"]
        what = f"full-size step, batch 4: {seconds['plain']:.2f} s plainly, {seconds['ours']:.2f} s here"
        line(what, f"{ratio:.2f} times faster", f"at least {MIN_RATIO}", ratio >= MIN_RATIO)

        small, data = ConvVAEConfig(image_size=64, latent_dim=32, hidden_dims=[32, 64, 128]), Blobs(2048, 64)
        plain, ours = Plain(small, data, 32), Ours(small, data, 32, Path(folder))
        curves = np.array([[plain.train_step(), ours.train_step()] for _ in range(200)])
        deviation = float(np.abs(curves[:, 1] / curves[:, 0] - 1).max())
        what = "loss curves of 200 steps, small size, largest difference at a step"
        line(what, f"{100 * deviation:.2f} %", f"{100 * MAX_DEVIATION:.0f} %", deviation <= MAX_DEVIATION)


if __name__ == "__main__":
    sys.exit(run(main))
