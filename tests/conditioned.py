"""What the tests of conditioners share: small simulations and pictures whose samples follow from their conditions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tiny import QUICK, Images
from torch import nn

from workbench.comparison import encode_split
from workbench.conditioning import ConditioningConfig, Task, frozen
from workbench.config import Config
from workbench.datasets.fields import SimulationConfig, Simulations
from workbench.datasets.simulation import open_simulation
from workbench.metrics import mse
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig

RUNS, STEPS, NODES = 40, 4, 5
SIZES = {"train": 24, "val": 8, "test": 8}  # of the pictures
SHARES = {"val_fraction": 0.2, "test_fraction": 0.2}
SMALL = {"width": 8, "depth": 2}
SHORT = QUICK | {"epochs": 3, "batch_size": 8, "lr": 3e-3, "log_every": 1, "checkpoint_every": 2}
ENHANCED = {"mae_weight": 0.2, "huber_weight": 0.1, "perceptual_weight": 0.3, "consistency_weight": 0.4}


def write_simulations(folder: Path, seed: int = 0) -> Path:
    """Waves over the nodes whose amplitude and phase are the conditions, in conditions.csv beside fields.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    conditions = np.random.default_rng(seed).uniform(0.5, 2.0, (RUNS, 2))
    a, b = conditions.T[:, :, None, None]
    t, n = np.linspace(0, 1, STEPS)[:, None], np.arange(NODES)
    np.save(folder / "fields.npy", (a * np.sin(n + 3 * b * t)).astype(np.float32))
    rows = "\n".join(f"{x},{y}" for x, y in conditions)
    (folder / "conditions.csv").write_text(f"amplitude,phase\n{rows}\n")
    return folder


def simulations(folder: Path, **settings: Any) -> Simulations:
    """They, opened; their pictures are empty, as drawing takes longer than training here."""
    write_simulations(folder)
    given = {"data": str(folder / "fields.npy"), "conditions": str(folder / "conditions.csv")}
    data = open_simulation(SimulationConfig(**given | {"cache_dir": str(folder / "cache")} | SHARES | settings))
    data.grid = lambda *_: Figure()
    return data


class Pictures(Images):
    """Mixtures of two images; the conditions are the two shares, or a grey picture of 4 x 4."""

    def __init__(self, n: int, seed: int, drawn: bool) -> None:
        super().__init__(2)
        shares = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 0.5
        self.x = torch.einsum("ns,schw->nchw", shares, self.x)
        self.condition = self.x.mean(1, keepdim=True)[:, :, ::2, ::2] if drawn else shares

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(indices)
        return super().batch(indices) | {"condition": self.condition[chosen], "group": chosen}

    def conditions(self, indices: np.ndarray) -> torch.Tensor:
        return self.condition[torch.as_tensor(indices)]


class PictureData:
    """What a task needs of opened data, with images in memory."""

    config, report, condition_names, broken = Config(), {}, [], pd.DataFrame()
    error_name, error_label, group_name, main_column, fingerprint = "mse", "error", "images", "image", ""
    sizes, condition_fingerprint = SIZES, ""
    error = staticmethod(mse)

    def __init__(self, drawn: bool = False) -> None:
        self.splits = {name: Pictures(n, i, drawn) for i, (name, n) in enumerate(SIZES.items())}

    def split(self, name: str) -> Pictures:
        return self.splits[name]

    def errors(self, x_hat: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mse": mse(x_hat, x)}

    def grid(self, *_: Any) -> Figure:
        return Figure()

    compare = pairs = examples = table = condition_label = pixels = key = statistics = grid


def hierarchical_vae(**settings: Any) -> HierarchicalVAE:
    torch.manual_seed(0)
    sizes = {"nodes": NODES, "steps": STEPS, "filters": [6, 4], "latent_dim": 3, "hier_latent_dim": 2}
    return HierarchicalVAE(HierarchicalVAEConfig(**sizes | {"output_norm": False} | settings))


def conv_vae() -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(ConvVAEConfig(image_size=8, latent_dim=3, hidden_dims=[4, 6]))


def fitted(vae: nn.Module, data: Any, steps: int = 80) -> nn.Module:
    """A VAE whose codes say something: some steps on the error of its reconstructions alone."""
    train = data.split("train")
    x = train.prepare(train.batch(np.arange(len(train))))["x"]
    optimizer = torch.optim.Adam(vae.train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (vae(x) - x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return vae


def task_of(vae: nn.Module, data: Any) -> Task:
    """A frozen VAE, and what it makes of the data."""
    vae = frozen(vae)
    return Task(vae, data, {name: encode_split(vae, data.split(name), 16).mu for name in SIZES})


def train(task: Task, folder: Path, training: dict[str, Any] | None = None, **settings: Any) -> tuple[Run, nn.Module]:
    """A conditioner trained into `folder`/e/c."""
    config, schedule = ConditioningConfig(**SMALL | settings), TrainConfig(**SHORT | (training or {}))
    run = open_run({"experiment": "e", "run": "c", **config.model_dump(), **schedule.model_dump()}, folder)
    return run, task.train(config, schedule, run)
