"""Conditioners: from the parameters of a run, or a picture of its geometry, to the flat latent of a VAE.

Papers: Hu et al. 2018, "Squeeze-and-excitation networks" (arXiv 1709.01507); Woo et al. 2018, "CBAM" (arXiv
1807.06521), its spatial half; Miyato et al. 2018, "Spectral normalization" (arXiv 1802.05957).
Reference: the latent conditioners of SimulGen-VAE (S. Lee).
Deviations: the mean and standard deviation of conditions and codes are buffers, so that inputs are in physical units
and the gradient passes through the scaling of the codes. The MLP embeds its input before the first layer norm: a layer
norm of the input itself cannot tell a row a from s * a + t (`input_norm="raw"` keeps it). The CNN normalises inside
its residual branches only, so that brightness survives, and keeps a coarse grid of positions up to its last layers.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.config import Config
from workbench.layers import Dropout
from workbench.models.spectral_norm import spectral_norm

COLLAPSED = 1e-8
GRID = 4
SQUEEZE = 4
GROUPS = 4


class MLPConditionerConfig(Config):
    """Sizes of an MLPConditioner.

    Raises:
        ConfigError: a value out of range, or `input_norm="raw"` with a single number as condition.
    """

    condition_dim: int = Field(1, ge=1)
    """Numbers per condition."""
    main_dim: int = Field(32, ge=1)
    """Length of the main latent."""
    hier_dim: int = Field(0, ge=0)
    """Length of all hierarchical codes together; 0 for a VAE with a single latent."""
    width: int = Field(128, ge=1)
    """Features between the residual blocks."""
    depth: int = Field(3, ge=1)
    """Residual blocks."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the last block; block i of 1 … depth has dropout * i / depth."""
    input_norm: Literal["embedded", "raw"] = "embedded"
    """Layer norm after the first linear layer, or before it."""

    @model_validator(mode="after")
    def _informative(self) -> "MLPConditionerConfig":
        if self.input_norm == "raw" and self.condition_dim == 1:
            raise ValueError(
                "input_norm='raw' with condition_dim=1: the layer norm of a single number is 0 whatever the number; "
                "use 'embedded'"
            )
        return self


class CNNConditionerConfig(Config):
    """Sizes of a CNNConditioner.

    Raises:
        ConfigError: a value out of range, or an image size that the stages cannot halve exactly.
    """

    image_size: int = Field(64, ge=2)
    """Side of the square images [px]; divisible by 2 ** depth."""
    image_channels: Literal[1, 3] = 1
    """Grey or RGB."""
    main_dim: int = Field(32, ge=1)
    """Length of the main latent."""
    hier_dim: int = Field(0, ge=0)
    """Length of all hierarchical codes together; 0 for a VAE with a single latent."""
    width: int = Field(16, ge=1)
    """Channels of the first stage; each further stage doubles them."""
    depth: int = Field(4, ge=1)
    """Stages, each of which halves the image."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the last layer norm."""
    spatial_attention: bool = False
    """Weigh the positions of each stage's feature map."""
    spectral_norm: bool = False
    """Hold the largest singular value of every weight but the heads' at 1."""

    @model_validator(mode="after")
    def _divisible(self) -> "CNNConditionerConfig":
        factor = 2**self.depth
        below = self.image_size // factor * factor
        if below != self.image_size:
            sizes = f"{below} or {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"image_size={self.image_size}: must be divisible by {factor}, as {self.depth} stages (depth) halve "
                f"it; the nearest such size is {sizes}"
            )
        return self

    @property
    def grid(self) -> int:
        """Side of the last feature map."""
        return self.image_size // 2**self.depth


class Heads(nn.Module):
    """One linear layer for the main latent, and one for the hierarchical codes where there are any."""

    def __init__(self, features: int, main_dim: int, hier_dim: int) -> None:
        super().__init__()
        self.main = nn.Linear(features, main_dim)
        self.hier = nn.Linear(features, hier_dim) if hier_dim else None

    def forward(self, h: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """Main first, then hierarchical: (b, main_dim + hier_dim)."""
        return self.main(h) if self.hier is None else torch.cat([self.main(h), self.hier(h)], dim=1)


class Conditioner(nn.Module):
    """What both conditioners share: the scales of conditions and codes, and the codes in the VAE's own units.

    Attributes: `config`; `latent_dim`, the length of the flat latent; `noise_dim`, 0; the buffers `condition_mean`
    and `condition_std` (one value per column or channel) and `code_mean` and `code_std` (one per latent dimension),
    0 and 1 until `standardise` sets them.

    Args:
        config: Sizes.
        shape: Shape of one condition; the first axis is the one that is standardised.
    """

    def __init__(self, config: MLPConditionerConfig | CNNConditionerConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.latent_dim, self.noise_dim = config.main_dim + config.hier_dim, 0
        for name, size in (("condition", shape[0]), ("code", self.latent_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def codes(self, condition: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """The flat latent of the VAE in its own units: forward * code_std + code_mean."""
        return self(condition) * self.code_std + self.code_mean

    @torch.no_grad()
    def standardise(self, conditions: Float[Tensor, "p ..."], codes: Float[Tensor, "p d"]) -> None:
        """Set the four buffers from the training split: mean and standard deviation (divided by p, not p - 1).

        A latent dimension whose standard deviation is at most 1e-8 of the largest has collapsed: it is predicted by its
        mean, and its scale is 1.

        Args:
            conditions: All training conditions, in physical units; images in [0, 1].
            codes: Their flat latents, in the VAE's units.

        Raises:
            ValueError: shapes that do not fit; a value that is not finite; a constant column or channel.
        """
        self._check("conditions", conditions, self.shape)
        self._check("codes", codes, (self.latent_dim,))
        if len(conditions) != len(codes):
            raise ValueError(f"{len(conditions)} conditions and {len(codes)} codes: must be as many; pair them by run")
        conditions, codes = conditions.to(self.condition_mean.dtype), codes.to(self.code_mean.dtype)
        _refuse_non_finite("conditions", conditions)
        _refuse_non_finite("codes", codes)
        _refuse_constant(conditions, "channel" if len(self.shape) > 1 else "column")
        mean, std = _mean_and_std(conditions)
        code_mean, code_std = _mean_and_std(codes)
        code_std[code_std <= COLLAPSED * code_std.max()] = 1.0
        self.condition_mean.copy_(mean)
        self.condition_std.copy_(std)
        self.code_mean.copy_(code_mean)
        self.code_std.copy_(code_std)

    def _check(self, what: str, values: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(values.shape[1:]) != shape:
            raise ValueError(f"{what} of shape {tuple(values.shape[1:])}: this conditioner was built for {shape}")

    def _standardised(self, condition: Tensor) -> Tensor:
        self._check("condition", condition, self.shape)
        mean, std = self.condition_mean, self.condition_std
        if len(self.shape) > 1:
            mean, std = rearrange(mean, "c -> c 1 1"), rearrange(std, "c -> c 1 1")
        return (condition - mean) / std


def _mean_and_std(values: Float[Tensor, "p c ..."]) -> tuple[Tensor, Tensor]:
    """Of each entry of the second axis, one at a time in float64."""
    entries = [values[:, i].double() for i in range(values.shape[1])]
    return torch.stack([x.mean() for x in entries]), torch.stack([x.std(correction=0) for x in entries])


def _refuse_non_finite(what: str, values: Float[Tensor, "p c ..."]) -> None:
    bad = ~torch.isfinite(values)
    if bad.any():
        row, entry = bad.nonzero()[0, :2].tolist()
        raise ValueError(
            f"{what}: {int(bad.sum())} values are NaN, infinite or too large for {values.dtype}, the first at "
            f"[{row}, {entry}]; correct the data"
        )


def _refuse_constant(conditions: Float[Tensor, "p c ..."], kind: str) -> None:
    for i in range(conditions.shape[1]):
        low, high = conditions[:, i].aminmax()
        if low == high:
            raise ValueError(
                f"conditions: {kind} {i} is {low:g} in all {len(conditions)} training runs, and a constant cannot be "
                f"standardised; remove the {kind}"
            )


class ResidualMLP(nn.Module):
    """x + Linear(Dropout(GELU(Linear(LayerNorm(x))))), twice as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        inner = [nn.Linear(width, 2 * width), nn.GELU(), Dropout(dropout), nn.Linear(2 * width, width)]
        self.branch = nn.Sequential(nn.LayerNorm(width), *inner)

    def forward(self, x: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """Of the same shape."""
        return x + self.branch(x)


class MLPConditioner(Conditioner):
    """Rows of numbers in physical units to standardised codes.

    Args:
        config: Sizes.
    """

    def __init__(self, config: MLPConditionerConfig) -> None:
        super().__init__(config, (config.condition_dim,))
        width, depth = config.width, config.depth
        embed, raw = nn.Linear(config.condition_dim, width), config.input_norm == "raw"
        ordered = [nn.LayerNorm(config.condition_dim), embed] if raw else [embed, nn.LayerNorm(width)]
        self.embed = nn.Sequential(*ordered, nn.GELU())
        self.blocks = nn.Sequential(*(ResidualMLP(width, config.dropout * i / depth) for i in range(1, depth + 1)))
        self.norm = nn.LayerNorm(width)
        self.heads = Heads(width, config.main_dim, config.hier_dim)

    def forward(self, condition: Float[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        """Standardised flat codes, main first.

        Raises:
            ValueError: conditions of another length.
        """
        h = self.embed(self._standardised(condition))  # (b, width)
        h = self.norm(self.blocks(h))  #                 (b, width)
        return self.heads(h)  #                          (b, main_dim + hier_dim)


class SqueezeExcitation(nn.Module):
    """Weigh each channel by a function of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // SQUEEZE)
        self.weigh = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels), nn.Sigmoid())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Of the same shape."""
        weight = self.weigh(reduce(x, "b c h w -> b c", "mean"))
        return x * rearrange(weight, "b c -> b c 1 1")


class SpatialAttention(nn.Module):
    """Weigh each position by a 7 × 7 convolution of the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Of the same shape."""
        maps = [reduce(x, "b c h w -> b 1 h w", "mean"), x.amax(dim=1, keepdim=True)]
        return x * torch.sigmoid(self.conv(torch.cat(maps, dim=1)))


class ResidualConv(nn.Module):
    """x plus two normalised 3 × 3 convolutions of it, weighed by channel and, where asked for, by position."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        branch: list[nn.Module] = []
        for _ in range(2):
            norm = nn.GroupNorm(math.gcd(GROUPS, channels), channels)
            branch += [norm, nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.branch = nn.Sequential(*branch, SqueezeExcitation(channels), *[SpatialAttention()] * attention)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Of the same shape."""
        return x + self.branch(x)


class CNNConditioner(Conditioner):
    """Images in [0, 1] to standardised codes.

    The last feature map is averaged over cells, not over the whole image, and flattened: a code that depends on where
    a notch lies needs its position. The cells, squares of side max(1, map's side // 4), form a grid of 4 × 4; of up to
    7 × 7, cut at the far edges, where the map's side is no multiple of 4; a smaller map is kept as it is.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CNNConditionerConfig) -> None:
        super().__init__(config, (config.image_channels, config.image_size, config.image_size))
        self.stem = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        dims = [config.width, *(config.width * 2**i for i in range(config.depth))]
        self.stages = nn.Sequential()
        for c_in, c_out in pairwise(dims):
            halve = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
            self.stages.append(nn.Sequential(halve, ResidualConv(c_out, config.spatial_attention)))
        cell = max(1, config.grid // GRID)
        self.pool = nn.AvgPool2d(cell, ceil_mode=True)  # unlike adaptive pooling, deterministic on a GPU
        self.mix = nn.Linear(dims[-1] * math.ceil(config.grid / cell) ** 2, dims[-1])
        self.norm = nn.Sequential(nn.GELU(), Dropout(config.dropout), nn.LayerNorm(dims[-1]))
        self.heads = Heads(dims[-1], config.main_dim, config.hier_dim)
        if config.spectral_norm:
            for module in [*self.stem.modules(), *self.stages.modules(), self.mix]:
                if isinstance(module, nn.Conv2d | nn.Linear):
                    spectral_norm(module)

    def forward(self, condition: Float[Tensor, "b c s s"]) -> Float[Tensor, "b d"]:
        """Standardised flat codes, main first.

        Raises:
            ValueError: images of another size or number of channels.
        """
        h = self.stem(self._standardised(condition))  # (b, width, s, s)
        h = self.pool(self.stages(h))  #                (b, width * 2^(depth - 1), 4, 4)
        h = self.mix(rearrange(h, "b c h w -> b (c h w)"))
        return self.heads(self.norm(h))  #              (b, main_dim + hier_dim)
