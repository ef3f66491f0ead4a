"""What a training optimises, with what noise, and its mean over a split."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.datasets.loading import Batch, Dataset, read_ahead, to_device
from workbench.datasets.splits import mix
from workbench.distributed import ALONE, World
from workbench.models.laq import LAQ
from workbench.models.quantizers import replacement_due
from workbench.process import autocast


@runtime_checkable
class Objective(Protocol):
    """What is optimised where that is not the model's own loss."""

    group: str
    """First part of the tags in TensorBoard; empty: the split."""

    def loss(self, batch: Batch) -> dict[str, Tensor]: ...
    def predict(self, batch: Batch) -> Tensor: ...
    def after_step(self, step: int, generator: torch.Generator) -> dict[str, float]: ...


@dataclass
class Reconstruction:
    """A model's own loss, on samples as they are or augmented."""

    model: nn.Module
    augment: Callable[[Batch], Batch] | None = None
    """Applied to training batches; draws from the default generators, which the trainer seeds for each step."""
    group: str = ""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The model's unweighted terms."""
        return self.model.loss(self.augment(batch) if self.augment and self.model.training else batch)

    def predict(self, batch: Batch) -> Tensor:
        """Reconstruction of x."""
        return self.model(batch["x"])

    def after_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """Nothing."""
        return {}


@dataclass
class LatentActions:
    """A latent action model's own loss on pairs of frames; unused codes are replaced on the published schedule."""

    model: LAQ
    group: str = ""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The model's unweighted terms."""
        return self.model.loss(batch)

    def predict(self, batch: Batch) -> Tensor:
        """The next frame, from the first and the action between them."""
        return self.model(batch["first"], batch["x"])

    def after_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """`replaced`: how many codes were, after this step."""
        return {"replaced": float(self.model.replace_unused(generator) if replacement_due(step) else 0)}


def draw_noise(seed: int, step: int, samples: int, noise_dim: int) -> Float[Tensor, "b d"]:
    """Standard normal noise for the whole batch of a step: a function of (seed, step) on every device."""
    return torch.randn(samples, noise_dim, generator=torch.Generator().manual_seed(mix(seed, 2, step)))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    precision: str = "fp32",
    after_batch: Callable[[int], None] | None = None,
    loss: Callable[[Batch], dict[str, Tensor]] | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Mean of each loss term over a split, without noise, the model in evaluation mode.

    Args:
        model: On the device to use; its mode is left as it was.
        batch_size: Samples at a time; only terms of a batch, such as its perplexity, depend on it beyond rounding.
        after_batch: Told the number of samples done so far; what it raises ends the evaluation.
        loss: Terms of a batch; the model's own where None.
        world: Whose processes take the batches in turn; each of them gets the same means.
    """
    loss = loss or model.loss
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    sums: dict[str, float] = {}
    n = len(dataset)
    own = (np.arange(i, min(i + batch_size, n)) for i in range(world.rank * batch_size, n, world.size * batch_size))
    batches = read_ahead(dataset, own)
    for done in range(0, n, world.size * batch_size):  # each process as often, with a batch or without one at the end
        for indices, raw in islice(batches, 1):
            with autocast(device, precision):
                terms = loss(dataset.prepare(to_device(raw, device)))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        if after_batch:
            after_batch(min(done + world.size * batch_size, n))
    model.train(was_training)
    of_all = world.collect(sums)
    return {name: sum(sums.get(name, 0.0) for sums in of_all) / n for name in of_all[0]}
