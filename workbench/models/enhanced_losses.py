"""Enhanced losses of conditioners: perceptual and consistency terms, and presets of the weights of all terms.

Every function returns an unweighted term, so that each can be logged alone; the robust terms are the errors of
`workbench.losses`.
Reference: the enhanced losses of SimulGen-VAE (S. Lee), whose weights the presets carry.
Deviations: the feature networks have two layers, GELU, orthogonal weights and small biases, and are compared after
each layer; published are two to three networks of different widths, compared at their ends. The published Huber term
bends at 0.1, as `smooth_l1` does here, ours at 1.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, linear

from workbench.config import Config, ConfigError, nearest
from workbench.layers import shard
from workbench.losses import mean_squared_error

AS_THE_PRESET = -1.0
BIAS = 0.1


class Enhancement(Config):
    """Weight of each term of a conditioner's loss.

    Raises:
        ConfigError: a weight that is negative or not finite.
    """

    mse_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Of the squared error."""
    mae_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the absolute error."""
    huber_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the Huber error."""
    perceptual_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the distance between features of the codes."""
    consistency_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the difference that noise in the input makes."""


PRESETS: dict[str, dict[str, float]] = {
    name: dict(zip(Enhancement.model_fields, weights, strict=True))
    for name, weights in {
        # name          mse  mae   huber perceptual consistency
        "none": (1.0, 0.0, 0.0, 0.0, 0.0),
        "balanced": (1.0, 0.1, 0.05, 0.1, 0.1),
        "robust": (1.0, 0.2, 0.1, 0.05, 0.15),
        "semantic": (1.0, 0.1, 0.05, 0.2, 0.05),
        "fast": (1.0, 0.05, 0.02, 0.0, 0.0),
        "small_dataset": (1.0, 0.1, 0.05, 0.2, 0.15),
    }.items()
}
"""Weights by preset, as published."""


def enhancement(preset: str, **overrides: float) -> Enhancement:
    """The weights of a preset, with some of them replaced.

    Args:
        preset: A key of `PRESETS`.
        overrides: Weights by their name in `Enhancement`; -1.0 leaves what the preset says.

    Raises:
        ConfigError: unknown preset; unknown weight; a weight that is negative or not finite.
    """
    if preset not in PRESETS:
        raise ConfigError([(f"preset={preset!r}", nearest(preset, PRESETS))])
    unknown = [name for name in overrides if name not in Enhancement.model_fields]
    if unknown:
        raise ConfigError([(f"unknown weight {name!r}", nearest(name, Enhancement.model_fields)) for name in unknown])
    given = {name: value for name, value in overrides.items() if value != AS_THE_PRESET}
    rule = f"must be at least 0, or {AS_THE_PRESET} for the weight of preset {preset!r}"
    negative = [(f"{name}={value!r}", rule) for name, value in given.items() if value < 0]
    if negative:
        raise ConfigError(negative)
    return Enhancement(**PRESETS[preset] | given)


class FeatureNetworks(nn.Module):
    """Perceptual distance between codes: 1 - cosine similarity of features of small frozen networks.

    One network of two layers with GELU reads the main codes, another the hierarchical ones. Their weights are functions
    of the arguments alone. They are buffers outside the state dict: no optimizer finds them, no checkpoint holds them.
    The biases give a direction to the features of a zero code, and let length count as well as direction.

    Args:
        main_dim: Length of the main latent.
        hier_dim: Length of all hierarchical codes together; 0 where there are none.
        width: Features of each layer.
        seed: Of the weights.
    """

    def __init__(self, main_dim: int, hier_dim: int = 0, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.dims = [dim for dim in (main_dim, hier_dim) if dim]
        generator = torch.Generator().manual_seed(seed)
        for i, dim in enumerate(self.dims):
            for layer, c_in in enumerate((dim, width)):
                weight = nn.init.orthogonal_(torch.empty(width, c_in), generator=generator)
                bias = BIAS * torch.randn(width, generator=generator)
                self.register_buffer(f"weight_{i}_{layer}", weight, persistent=False)
                self.register_buffer(f"bias_{i}_{layer}", bias, persistent=False)

    def forward(self, pred: Float[Tensor, "b d"], target: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        """Mean over the two depths and the batch, dimensionless; main and hierarchical codes are added, as published.

        In [0, 2] for a single latent and [0, 4] with hierarchical codes; no gradient reaches the target.

        Raises:
            ValueError: codes of another length.
        """
        if pred.shape[1] != sum(self.dims):
            raise ValueError(f"codes of {pred.shape[1]} values: these networks were built for {sum(self.dims)}")
        with torch.autocast(pred.device.type, enabled=False):  # 1 - cosine cancels: not in half precision
            both = torch.stack([pred, target.detach()]).to(self.weight_0_0.dtype)
            parts = both.split(self.dims, dim=2)  # (2, b, main_dim), (2, b, hier_dim)
            return sum(self._distance(i, codes) for i, codes in enumerate(parts))

    def _distance(self, i: int, codes: Float[Tensor, "2 b d"]) -> Float[Tensor, ""]:
        first = gelu(linear(codes, getattr(self, f"weight_{i}_0"), getattr(self, f"bias_{i}_0")))  # (2, b, width)
        second = gelu(linear(first, getattr(self, f"weight_{i}_1"), getattr(self, f"bias_{i}_1")))
        similarity = torch.stack([cosine_similarity(*features, dim=1) for features in (first, second)])
        return 1 - similarity.mean()


def consistency(
    pred: Float[Tensor, "b d"], pred_augmented: Float[Tensor, "b d"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean squared difference of the predictions for an input and for its augmented copy, each over the temperature.

    Args:
        pred: Of the input; no gradient reaches it.
        pred_augmented: Of the augmented copy.
        temperature: In the unit of the predictions; the term goes as its inverse square.

    Raises:
        ValueError: temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be more than 0")
    return mean_squared_error(pred_augmented / temperature, pred.detach() / temperature)


def augment_condition(
    condition: Float[Tensor, "b c ..."], noise: float, std: Float[Tensor, " c"], generator: Generator | None = None
) -> Float[Tensor, "b c ..."]:
    """Conditions with independent normal noise on each number or pixel.

    Args:
        condition: Rows (b, c) in physical units, or images (b, c, h, w) in [0, 1]; noisy pixels may leave that range.
        noise: Standard deviation of the noise, in units of `std`.
        std: Of each column, or of each channel: the conditioner's `condition_std`.
        generator: On the CPU; torch's default generator of the conditions' device where None.
    """
    scale = std if condition.dim() == 2 else rearrange(std, "c -> c 1 1")
    if generator is None:
        return condition + noise * scale * shard().drawn_like(condition, torch.randn_like)
    return condition + noise * scale * torch.randn(condition.shape, generator=generator).to(condition)
