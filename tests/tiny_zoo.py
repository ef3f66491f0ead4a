"""A zoo of untrained networks for the tests, and models of weights whose figures are known."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.datasets.digits_zoo import draw_start
from workbench.datasets.flat_weights import Architecture, flatten
from workbench.datasets.weights import Weights, WeightsConfig, open_weights
from workbench.layers import Posterior
from workbench.rebuilding import Networks, collect

RUNS, EPOCHS = 8, 2  # of each architecture


class Zoo(NamedTuple):
    """Opened networks, and the two splits of them."""

    data: Weights
    train: Networks
    test: Networks


def open_tiny_zoo(folder: Path) -> Zoo:
    """Two architectures, of which each run moves away from a common start; 5 runs of each in train, 3 in test."""
    weights = folder / "zoo" / "weights"
    weights.mkdir(parents=True)
    for name in ("mlp", "cnn"):
        torch.save(entries(name), weights / f"{name}.pt")
    settings = {"val_fraction": 0.0, "test_fraction": 0.4, "split_seed": 3, "cache_dir": str(folder / "cache")}
    data = open_weights(WeightsConfig(data=str(folder / "zoo"), **settings))
    return Zoo(data, collect(data.split("train")), collect(data.split("test")))


def entries(name: str) -> list[tuple[dict, dict[str, Tensor]]]:
    generator, found = torch.Generator().manual_seed(0), []
    start = {layer: weight[0] for layer, weight in draw_start(name, "shared", 1).items()}
    for run in range(RUNS):
        state = start
        for epoch in range(1, EPOCHS + 1):
            state = {
                layer: weight + 0.2 * torch.randn(weight.shape, generator=generator) for layer, weight in state.items()
            }
            known = {"id": f"{name}-{run}-{epoch}", "run": f"{name}-{run}", "architecture": name, "epoch": epoch}
            found.append((known, state))
    return found


class Copy(nn.Module):
    """Its latent is x."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.scale * z


def networks(weights: Tensor, runs: list[str], sizes: dict[str, int], **columns: list) -> Networks:
    """Networks of one architecture whose layers have these sizes."""
    layers = flatten({name: torch.zeros(size) for name, size in sizes.items()})[1]
    table = pd.DataFrame({"id": [f"n{i}" for i in range(len(runs))], "run": runs, "architecture": "flat"} | columns)
    return Networks(weights, np.zeros(len(runs), int), [Architecture("flat", layers)], table)
