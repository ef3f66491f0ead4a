"""What a training optimises, and its mean over a split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from workbench.datasets.loading import Batch, Dataset, read_ahead, to_device
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


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    precision: str = "fp32",
    after_batch: Callable[[int], None] | None = None,
    loss: Callable[[Batch], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Mean of each loss term over a split, without noise, the model in evaluation mode.

    Args:
        model: On the device to use; its mode is left as it was.
        batch_size: Samples at a time; does not change the result beyond rounding.
        after_batch: Told the number of samples done so far; what it raises ends the evaluation.
        loss: Terms of a batch; the model's own where None.
    """
    loss = loss or model.loss
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    sums: dict[str, float] = {}
    done = 0
    blocks = (np.arange(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size))
    for indices, raw in read_ahead(dataset, blocks):
        with autocast(device, precision):
            terms = loss(dataset.prepare(to_device(raw, device)))
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        done += len(indices)
        if after_batch:
            after_batch(done)
    model.train(was_training)
    return {name: value / done for name, value in sums.items()}
