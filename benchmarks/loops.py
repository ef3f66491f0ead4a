"""The two loops that benchmarks step in turns: a plain one, and the workbench's trainer; and samples to step on."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from workbench.datasets.clips import ClipDataset
from workbench.datasets.loading import Batch, Dataset, batch_indices, to_device
from workbench.datasets.splits import mix
from workbench.objectives import LatentActions, Reconstruction, draw_noise
from workbench.process import pick_device
from workbench.runs import Run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer, _place


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


class Pairs(Blobs):
    """Pairs of frames in memory: a blob, and the next one."""

    def __len__(self) -> int:
        return len(self.frames) - 1

    def batch(self, indices: np.ndarray) -> Batch:
        return {"first": torch.from_numpy(self.frames[indices]), "x": torch.from_numpy(self.frames[indices + 1])}


class Plain:
    """A plain loop: NCHW, float32, Adam as it comes."""

    def __init__(self, objective: Reconstruction | LatentActions, data: Dataset, settings: TrainConfig) -> None:
        self.device = pick_device(settings.device)
        self.objective, self.data, self.settings, self.losses = objective, data, settings, []
        self.model = objective.model.to(self.device).train()
        kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
        self.optimizer = kind(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.weights = vae_weights(settings, self.model.terms)(0.0)
        self.indices = batch_indices(len(data), settings.batch_size, settings.seed, 0)

    def train_step(self) -> None:
        """One optimizer step on the next batch."""
        seed, step = self.settings.seed, len(self.losses)
        frames = self.data.prepare(to_device(self.data.batch(next(self.indices)), self.device))
        batch = {key: value.contiguous() for key, value in frames.items()}
        batch["noise"] = draw_noise(seed, step, self.settings.batch_size, self.model.noise_dim).to(self.device)
        self.optimizer.zero_grad()
        terms = self.objective.loss(batch)
        loss = sum(weight * terms[name] for name, weight in self.weights.items())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.objective.after_step(step + 1, torch.Generator().manual_seed(mix(seed, 3, step + 1)))


class Ours:
    """The workbench's trainer, stepped by hand."""

    def __init__(
        self, objective: Reconstruction | LatentActions, data: Dataset, settings: TrainConfig, folder: Path
    ) -> None:
        model = objective.model.train()
        _place(model, settings)
        weights = vae_weights(settings, model.terms)
        no_picture = lambda x, x_hat: Figure()  # noqa: E731
        self.trainer = Trainer(model, data, data, settings, Run(folder), weights, no_picture, objective)
        self.data, self.losses = data, []
        self.indices = batch_indices(len(data), settings.batch_size, settings.seed, 0)

    def train_step(self) -> None:
        """One optimizer step on the next batch."""
        indices = next(self.indices)
        self.losses.append(self.trainer._train_step(indices, self.data.batch(indices))["loss"])
