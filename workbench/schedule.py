"""Settings of a training, and what follows from them at each step: learning rate and weights of the terms."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from workbench.config import Config
from workbench.losses import linear_ramp
from workbench.process import DeviceName

Weights = Callable[[float], Mapping[str, float]]
"""Weight of each term of a loss at a share of the training, 0 to 1; a term without a weight is logged only."""


class TrainConfig(Config):
    """How a model is trained.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    seed: int = Field(0, ge=0)
    """Seed of the batch order and of all noise."""
    device: DeviceName = "auto"
    """`auto` (CUDA where present, else CPU), or a torch device such as `cuda:1`."""
    devices: int = Field(1, ge=1)
    """Processes of the training on each node: one for each GPU, or as many on the CPU."""
    num_nodes: int = Field(1, ge=1)
    """Nodes."""
    epochs: int = Field(1, ge=1)
    """Passes over the training split."""
    training_steps: int = Field(0, ge=0)
    """Optimizer steps in all, in place of `epochs`; 0: as many as the epochs have."""
    batch_size: int = Field(64, ge=1)
    """Samples per optimizer step, of all processes together; an incomplete last batch of an epoch is left out."""
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """Largest learning rate of AdamW."""
    schedule: Literal["exponential", "cosine"] = "exponential"
    """Learning rate after the warm-up: times `lr_decay` after every epoch, or down to 0 along half a cosine."""
    lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate after every epoch, of the exponential schedule."""
    warmup_epochs: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Epochs in which the learning rate rises linearly from 0; a shorter training ends on the way."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay per step and unit of the learning rate."""
    patience: int = Field(0, ge=0)
    """Stop after this many epochs without a lower validation loss; 0: never."""
    keep: Literal["last", "best"] = "last"
    """Weights that the run ends with: the last ones, or those of the lowest validation loss."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it."""
    recon_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Weight of the reconstruction error per element."""
    kl_weight: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """Final weight of the KL in nats."""
    kl_weight_start: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL until `kl_rise_from`."""
    kl_rise_from: float = Field(0.0, ge=0, le=1)
    """Share of training at which the KL weight begins to rise."""
    kl_rise_to: float = Field(0.0, ge=0, le=1)
    """Share of training from which the KL weight is final."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: float32, or bfloat16 autocast."""
    channels_last: bool = True
    """Keep images channels-last in memory, which convolutions are faster on."""
    compile: bool = False
    """Compile the forward pass; pays after some thousand steps."""
    deterministic: bool = True
    """Only deterministic kernels: needed for bit-exact resume on CUDA."""
    log_every: int = Field(50, ge=1)
    """Steps between two rows of metrics.csv."""
    checkpoint_every: int = Field(5000, ge=1)
    """Steps between two checkpoints."""
    images_every: int = Field(5000, ge=0)
    """Steps between two pictures of the fixed validation samples; 0: one after each epoch."""

    @model_validator(mode="after")
    def _in_order(self) -> "TrainConfig":
        if self.kl_rise_from > self.kl_rise_to:
            raise ValueError(f"kl_rise_from={self.kl_rise_from}: must be at most kl_rise_to={self.kl_rise_to}")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        below = self.batch_size // self.processes * self.processes
        if below != self.batch_size:
            sizes = f"{below} or {below + self.processes}" if below else f"{self.processes}"
            raise ValueError(
                f"batch_size={self.batch_size}: must be divisible by {self.processes} = devices * num_nodes, as each "
                f"process takes as many samples of a step; the nearest such size is {sizes}"
            )
        return self

    @property
    def processes(self) -> int:
        """Processes of the training on all nodes."""
        return self.devices * self.num_nodes


class HeadWeights(Config):
    """Weights of what a model of floor plans tells besides the image.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    segmentation_weight: float = Field(0.05, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy of each pixel's class in nats."""
    classification_weight: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy of the image's type in nats."""


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole training."""
    return config.training_steps or config.epochs * steps_per_epoch


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "exponential":
        return config.lr * config.lr_decay ** (step // steps_per_epoch)
    steps = total_steps(config, steps_per_epoch)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def vae_weights(config: TrainConfig, terms: Sequence[str] = ("mse", "kl"), heads: HeadWeights | None = None) -> Weights:
    """Weights of a VAE's terms: `recon_weight` of the first, the error; those of heads; of the KLs one that may rise.

    Args:
        config: Of the training.
        terms: As the model names them.
        heads: Weights of the terms `segmentation` and `classification`, where there are such.
    """
    of_heads = {"segmentation": "segmentation_weight", "classification": "classification_weight"}
    fixed = {name: getattr(heads or HeadWeights(), weight) for name, weight in of_heads.items() if name in terms}

    def weights(progress: float) -> dict[str, float]:
        ramp = (config.kl_weight_start, config.kl_weight, config.kl_rise_from, config.kl_rise_to)
        kl = dict.fromkeys((name for name in terms[1:] if name not in fixed), linear_ramp(progress, *ramp))
        return {terms[0]: config.recon_weight} | fixed | kl

    return weights
