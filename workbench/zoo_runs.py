"""A trained autoencoder of networks, with its data, latents, rebuilt networks and floors: what notebook 07 looks at."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.comparison import encode_split
from workbench.datasets.opening import open_data
from workbench.datasets.weights import Weights
from workbench.decoded_networks import why_not_run
from workbench.provenance import check_same_data
from workbench.rebuilding import MEAN, Methods, Networks, collect, equal_noise, floors, rebuild
from workbench.runs import load_run

NOISE = "noise of equal size"


@dataclass(frozen=True)
class ZooRun:
    """One run and what it makes of held-out networks.

    Args:
        model: In evaluation mode.
        data: What it was trained on.
        train, test: Training networks, and held-out ones.
        z_train, z_test: Their latents, posterior means.
        rebuilt_train: Training networks rebuilt by the VAE.
        methods: Held-out networks rebuilt: by the VAE, and by the floors (`rebuilding.floors`: the mean training
            network, PCA of as many components); and themselves with noise of the size of the VAE's error.
    """

    model: nn.Module
    data: Weights
    train: Networks
    test: Networks
    z_train: Float[Tensor, "t k"]
    z_test: Float[Tensor, "n k"]
    rebuilt_train: Float[Tensor, "t d"]
    methods: Methods

    @property
    def vae(self) -> str:
        """Name of the VAE among the methods."""
        return next(iter(self.methods))

    @property
    def floors(self) -> list[str]:
        """Names of the mean network and of every PCA among the methods."""
        return [name for name in self.methods if name not in (self.vae, NOISE)]

    @property
    def pca(self) -> str:
        """Name of the PCA of all architectures together, which has as many numbers as the latent."""
        return next(name for name in self.floors if name != MEAN)

    @property
    def runs_here(self) -> bool:
        """Whether all networks are of the embedded architectures, trained on digits."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why the networks cannot be run here: one architecture or dataset among them is another; empty where they can.

        The whole zoo is left out then, as figures over a part of its networks would not be its figures.
        """
        return why_not_run(self.data)


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
    """Load a run, encode its networks, and rebuild them.

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
    rebuilt = [
        rebuild(model, data, z, networks.architecture, batch_size) for z, networks in ((z_train, train), (z_test, test))
    ]
    k = z_test.shape[1]
    methods = {f"VAE-{k}": rebuilt[1]} | floors(data, train, test, k) | {NOISE: equal_noise(test, rebuilt[1], seed)}
    return ZooRun(model, data, train, test, z_train, z_test, rebuilt[0], methods)
