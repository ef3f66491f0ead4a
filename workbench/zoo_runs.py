"""A trained autoencoder of networks, with its data, latents, rebuilt networks and floors: what notebook 07 looks at."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.comparison import encode_split
from workbench.datasets.opening import open_data
from workbench.datasets.weights import Weights
from workbench.datasets.zoo_networks import runnable
from workbench.provenance import check_same_data
from workbench.rebuilding import Methods, Networks, collect, equal_noise, floors, rebuild
from workbench.runs import load_run

NOISE = "noise of equal size"
DIGITS = "digits"
"""Value of the property `dataset` of networks that can be run here."""


@dataclass(frozen=True)
class ZooRun:
    """One run and what it makes of held-out networks.

    Args:
        model: In evaluation mode.
        data: What it was trained on.
        train, test: Training networks, and held-out ones.
        z_train, z_test: Their latents, posterior means.
        methods: Held-out networks rebuilt: by the VAE, by PCA of as many components, by the mean training network; and
            themselves with noise of the size of the VAE's error.
    """

    model: nn.Module
    data: Weights
    train: Networks
    test: Networks
    z_train: Float[Tensor, "t k"]
    z_test: Float[Tensor, "n k"]
    methods: Methods

    @property
    def vae(self) -> str:
        """Name of the VAE among the methods."""
        return next(iter(self.methods))

    @property
    def pca(self) -> str:
        """Name of the PCA among the methods."""
        return next(name for name in self.methods if name.startswith("PCA-"))

    @property
    def runs_here(self) -> bool:
        """Whether all networks are of the embedded architectures, trained on digits."""
        known = all(runnable({layer.name: layer.shape for layer in a.layers}) for a in self.data.architectures)
        return known and ("dataset" not in self.test.table or set(self.test.table["dataset"]) == {DIGITS})


def open_zoo_run(
    path: Path,
    device: torch.device,
    split: str = "test",
    train_samples: int = 0,
    eval_samples: int = 0,
    batch_size: int = 256,
    seed: int = 0,
    checkpoint: str = "final",
) -> ZooRun:
    """Load a run, encode its networks, and rebuild the held-out ones.

    Args:
        path: Run folder of a `weight_autoencoder`.
        device: Where the model runs.
        split: Which networks are held out: `val` or `test`.
        train_samples: Training networks that floors, probes and draws are fitted on, drawn by seed; 0: all.
        eval_samples: Held-out networks; 0: all.
        batch_size: Networks at a time; does not change the result beyond rounding.
        seed: Of the choice, and of the noise.
        checkpoint: `final` weights, or the `best`.

    Raises:
        RunError: the run is unfinished, or its data have changed since.
        CheckpointError: its files are damaged.
        DataError: the data cannot be used as they are, or an architecture has no training network.
    """
    model, config = load_run(path, checkpoint)
    model.to(device)
    data = open_data(config["parameters"])
    check_same_data(path, config, data.fingerprint)
    sets = (data.split("train").subset(train_samples, seed), data.split(split).subset(eval_samples, seed))
    train, test = (collect(part) for part in sets)
    z_train, z_test = (encode_split(model, part, batch_size).mu for part in sets)
    methods = {f"VAE-{z_test.shape[1]}": rebuild(model, data, z_test, test.architecture, batch_size)}
    noise = equal_noise(test, next(iter(methods.values())), seed)
    methods |= floors(train, test, z_test.shape[1]) | {NOISE: noise}
    return ZooRun(model, data, train, test, z_train, z_test, methods)
