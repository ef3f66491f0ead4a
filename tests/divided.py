"""A few steps of each kind of model, in one process or in several that each have a part of every batch."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conditioned
import numpy as np
import tiny
import torch
from matplotlib.figure import Figure
from torch import nn

from workbench.augmentation import AugmentConfig, augment
from workbench.conditioning import CodedDataset, Conditioning, ConditioningConfig, build_conditioner
from workbench.distributed import ALONE, World, joined, synchronised
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.layout_autoencoder import LayoutAutoencoder, LayoutAutoencoderConfig
from workbench.models.weight_autoencoder import WeightAutoencoder, WeightAutoencoderConfig
from workbench.objectives import LatentActions, Objective, Reconstruction
from workbench.runs import Run
from workbench.schedule import TrainConfig, Weights, vae_weights
from workbench.training import Trainer

BATCH = 32
N = 3 * BATCH
STEPS = 6


def in_processes(size: int, work: Callable[[World], Any], folder: Path) -> list[Any]:
    """What `work` gives in each of several processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def begin(rank: int) -> None:
        torch.set_num_threads(1)
        here = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in here.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        with joined("cpu", 0, False) as world:
            torch.save(work(world), folder / f"{rank}.pt")

    context = multiprocessing.get_context("fork")  # imports nothing again
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


class Tensors:
    """Samples in memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.tensors.items()}

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: value[torch.as_tensor(indices)] for name, value in self.tensors.items()}

    @staticmethod
    def prepare(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(batch)

    def name(self, index: int) -> str:
        return str(index)


Case = tuple[nn.Module, Any, Objective | None, Weights]


def images(size: int = 8) -> torch.Tensor:
    return tiny.Images(N, size=size).x


def of_conv_vae() -> Case:
    model = ConvVAE(ConvVAEConfig(image_size=8, latent_dim=3, hidden_dims=[4, 6]))
    return model, Tensors(x=images()), None, vae_weights(TrainConfig(kl_weight=0.01))


def of_hierarchical_vae() -> Case:
    """With every augmentation."""
    model = conditioned.hierarchical_vae()
    amounts = {"noise": 0.1, "scale": 0.1, "mixup": 0.5, "shift": 1, "cutout": 0.3}
    config = AugmentConfig(**{f"augment_{name}": amount for name, amount in amounts.items()})
    x = torch.rand(N, conditioned.NODES, conditioned.STEPS) - 0.5
    objective = Reconstruction(model, lambda batch: augment(batch, config))
    return model, Tensors(x=x), objective, vae_weights(TrainConfig(kl_weight=0.01), model.terms)


def of_laq(quantizer: str) -> Case:
    sizes = {"image_size": 32, "patch_size": 4, "dim": 8, "spatial_depth": 1, "temporal_depth": 1, "heads": 1}
    more = {"dim_head": 8, "code_dim": 4, "code_seq_len": 4, "codebook_size": 16}
    model = LAQ(LAQConfig(**sizes, **more, quantizer=quantizer))
    data = Tensors(first=images(32), x=images(32).roll(1, 0))
    return model, data, LatentActions(model), vae_weights(TrainConfig(), model.terms)


def of_layout_autoencoder() -> Case:
    """With pixels and images that are not labelled, more in some samples than in others."""
    sizes = {"latent_channels": 2, "base_channels": 4, "downsampling_steps": 1, "image_size": 8}
    model = LayoutAutoencoder(LayoutAutoencoderConfig(**sizes, n_classes=3, n_types=2))
    share = torch.linspace(0, 1, N)
    classes = torch.randint(0, 3, (N, 8, 8)).masked_fill(torch.rand(N, 8, 8) < share[:, None, None], -1)
    types = torch.randint(0, 2, (N,)).masked_fill(torch.rand(N) < share, -1)
    data = Tensors(x=images(), classes=classes, type=types)
    return model, data, None, vae_weights(TrainConfig(kl_weight=0.01), model.terms)


def of_weight_autoencoder() -> Case:
    """With dropout and padding."""
    sizes = {"max_len": 20, "fdim": 16, "ch": 2, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 1}
    model = WeightAutoencoder(WeightAutoencoderConfig(**sizes, embed_dim=1, dropout=0.3))
    mask = torch.arange(20) < torch.randint(5, 21, (N, 1))
    data = Tensors(x=torch.randn(N, 20) * mask, mask=mask)
    return model, data, None, vae_weights(TrainConfig(kl_weight=0.01), model.terms)


def of_conditioner(kind: str, **settings: Any) -> Case:
    """With dropout and every term; with a frozen VAE, which has a batch norm, behind it where end to end."""
    vae = conditioned.frozen(ConvVAE(ConvVAEConfig(image_size=8, latent_dim=3, hidden_dims=[4, 6])))
    x = images()
    condition = x.mean(1, keepdim=True)[:, :, ::2, ::2] if kind == "cnn" else torch.randn(N, 5)
    data = CodedDataset(Tensors(x=x, condition=condition), vae.encode(x).mu)
    config = ConditioningConfig(**settings, conditioner=kind, width=8, depth=2, dropout=0.3, preset="balanced")
    model = build_conditioner(config, vae, condition[0])
    model.standardise(condition, data.z)
    objective = Conditioning(model, vae, config, lambda x_hat, x: (x_hat - x).square().flatten(1).mean(1))
    return model, data, objective, objective.weights()


CASES: dict[str, Callable[[], Case]] = {
    "conv_vae": of_conv_vae,
    "hierarchical_vae": of_hierarchical_vae,
    "laq nsvq": lambda: of_laq("nsvq"),
    "laq fsq": lambda: of_laq("fsq"),
    "laq continuous": lambda: of_laq("continuous"),
    "layout_autoencoder": of_layout_autoencoder,
    "weight_autoencoder": of_weight_autoencoder,
    "mlp_conditioner end to end": lambda: of_conditioner("mlp", mode="end_to_end", latent_reg_weight=0.1),
    "mlp_conditioner, decoder computed again": lambda: of_conditioner(
        "mlp", mode="end_to_end", latent_reg_weight=0.1, checkpoint_decoder=True
    ),
    "cnn_conditioner": lambda: of_conditioner("cnn"),
}


def trainer_of(case: str, folder: Path, world: World = ALONE) -> Trainer:
    """A trainer at its start, the same in every process."""
    torch.manual_seed(0)
    model, data, objective, weights = CASES[case]()
    config = TrainConfig(device="cpu", batch_size=BATCH, lr=1e-3, epochs=20)
    run = Run(folder)
    return Trainer(model.train(), data, data, config, run, weights, lambda a, b: Figure(), objective, world)


def stepped(trainer: Trainer, steps: int = STEPS) -> list[dict[str, float]]:
    """Figures of some steps."""
    rows, per_epoch = [], N // BATCH
    with synchronised(trainer.model, trainer.world):
        for step in range(steps):
            indices = (np.arange(BATCH) + step % per_epoch * BATCH) % N
            rows.append(trainer._train_step(indices, trainer.train_set.batch(indices[trainer.part])))
    return rows
