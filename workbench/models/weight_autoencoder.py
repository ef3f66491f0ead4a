"""Variational autoencoder of the weights of networks: flat weights laid out as an image of one channel, and back.

Papers: Soro et al. 2025, "Diffusion-based neural network weights generation" (arXiv 2402.18153), for weights as images;
Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models" (arXiv 2112.10752), for the network.
Reference: as published, every group norm has 2 groups and an epsilon of 1e-6 whatever the width, a leaky ReLU follows
the linear layer before the encoder (nothing precedes the one after the decoder), maps are halved with zeros at their
right and lower rim alone, attention has one head, and the log-variance is kept within [-30, 20].
Deviations: none in the network of layout `linear`; the published one has no layout `square`, and ignores sides in
`attn_resolutions` that no map has, where ours refuses them. Padding is masked out of the input and of every term.
"""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Config
from workbench.layers import Dropout, LatentLayout, Posterior

GROUPS = 2
EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)

Weights = Float[Tensor, "b d"] | Float[Tensor, "b 1 d"]


class WeightAutoencoderSettings(Config):
    """What a user chooses of a WeightAutoencoder.

    Raises:
        ConfigError: a value of the wrong type or out of range, an `fdim` that is no square or cannot be halved so
            often, or a side in `attn_resolutions` that no map has.
    """

    layout: Literal["linear", "square"] = "linear"
    """How weights become an image: by a linear layer of `fdim` outputs, or as they are, padded with zeros to the
    smallest square that can be halved so often."""
    fdim: int = Field(1024, ge=1)
    """Pixels of the image of layout `linear`, the square of a multiple of 2 ** (len(ch_mult) - 1)."""
    ch: int = Field(32, ge=2)
    """Channels that `ch_mult` multiplies; even, as each norm has 2 groups."""
    ch_mult: list[int] = Field([1, 1, 2], min_length=1)
    """Channels over `ch` at full size and after each halving of the image."""
    num_res_blocks: int = Field(2, ge=1)
    """Residual blocks of each size in the encoder; the decoder has one more."""
    attn_resolutions: list[int] = []
    """Sides [px] of the maps that have attention after each residual block; the smallest has one in any case."""
    z_channels: int = Field(4, ge=1)
    """Channels that the encoder's convolutions end in and the decoder's begin with."""
    embed_dim: int = Field(4, ge=1)
    """Channels of the latent, between 1 x 1 convolutions from and to `z_channels`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the features of each residual block that training drops."""
    weight_error: Literal["l1", "mse"] = "l1"
    """Error between weights that is optimised: absolute or squared."""

    @model_validator(mode="after")
    def _fits(self) -> "WeightAutoencoderSettings":
        if self.ch % GROUPS:
            raise ValueError(f"ch={self.ch}: must be even, as each norm has {GROUPS} groups of channels")
        if min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult={self.ch_mult}: every entry must be at least 1")
        if self.layout == "linear":
            self._check_side()
            self._check_attention(math.isqrt(self.fdim), f"fdim={self.fdim}")
        return self

    @property
    def factor(self) -> int:
        """How many times smaller the latent grid is than the image, by side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def channels(self) -> list[int]:
        """Channels at full size and after each halving."""
        return [self.ch * multiple for multiple in self.ch_mult]

    def _check_side(self) -> None:
        below = math.isqrt(self.fdim) // self.factor * self.factor
        if below**2 != self.fdim:
            above = (below + self.factor) ** 2
            nearest = f"nearest such are {below**2} and {above}" if below else f"smallest such is {above}"
            raise ValueError(
                f"fdim={self.fdim}: must be the square of a multiple of {self.factor} = 2 ** (len(ch_mult) - 1); "
                f"the {nearest}"
            )

    def _check_attention(self, side: int, given: str) -> None:
        sides = [side >> i for i in range(len(self.ch_mult))]
        if not set(self.attn_resolutions) <= set(sides):
            raise ValueError(
                f"attn_resolutions={self.attn_resolutions}: must be sides of maps, and those of {given} and "
                f"ch_mult={self.ch_mult} are {sides} px"
            )


class WeightAutoencoderConfig(WeightAutoencoderSettings):
    """Sizes of a WeightAutoencoder: the user's, and that of the data.

    Raises:
        ConfigError: as the settings.
    """

    max_len: int = Field(ge=1)
    """Weights of a network, with the padding."""

    @model_validator(mode="after")
    def _attends(self) -> "WeightAutoencoderConfig":
        if self.layout == "square":
            self._check_attention(self.side, f"max_len={self.max_len}, layout='square'")
        return self

    @property
    def side(self) -> int:
        """Side of the image [px]."""
        if self.layout == "linear":
            return math.isqrt(self.fdim)
        smallest = math.isqrt(self.max_len - 1) + 1
        return -(-smallest // self.factor) * self.factor

    @property
    def grid(self) -> int:
        """Side of the latent grid."""
        return self.side // self.factor


def norm(channels: int) -> nn.GroupNorm:
    """Group norm as published."""
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


def conv(c_in: int, c_out: int, size: int = 3) -> nn.Conv2d:
    """Convolution that keeps height and width; its size is odd."""
    return nn.Conv2d(c_in, c_out, size, padding=size // 2)


def halve(channels: int) -> nn.Sequential:
    """Half the height and width; zeros are added at the right and lower rim alone, as published."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def double(channels: int) -> nn.Sequential:
    """Twice the height and width, each pixel repeated, and a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, channels))


class Residual(nn.Module):
    """shortcut(x) + branch(x), the branch being norm, swish and convolution, twice."""

    def __init__(self, c_in: int, c_out: int, dropout: float) -> None:
        super().__init__()
        first = (norm(c_in), nn.SiLU(), conv(c_in, c_out))
        self.branch = nn.Sequential(*first, norm(c_out), nn.SiLU(), Dropout(dropout), conv(c_out, c_out))
        self.shortcut = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        return self.shortcut(x) + self.branch(x)


class Attention(nn.Module):
    """x + attention of one head among the pixels of the normalised x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  #  (b, 1, h * w, c)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Level(nn.Module):
    """What is done at one size: residual blocks, each with attention behind it where so asked, and a change of size."""

    def __init__(self, widths: list[int], attention: bool, resize: nn.Module, dropout: float) -> None:
        super().__init__()
        self.residual = nn.ModuleList(Residual(a, b, dropout) for a, b in pairwise(widths))
        self.attention = nn.ModuleList(Attention(b) if attention else nn.Identity() for b in widths[1:])
        self.resize = resize

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        for residual, attention in zip(self.residual, self.attention, strict=True):
            x = attention(residual(x))
        return self.resize(x)


def middle(channels: int, dropout: float) -> nn.Sequential:
    """What is done at the smallest size, after the encoder's levels and before the decoder's."""
    first, second = (Residual(channels, channels, dropout) for _ in range(2))
    return nn.Sequential(first, Attention(channels), second)


def make_encoder(config: WeightAutoencoderConfig) -> nn.Sequential:
    """From (b, 1, side, side) to (b, 2 * z_channels, grid, grid)."""
    widths, last = config.channels, len(config.channels) - 1
    levels = [
        Level(
            [before, *[width] * config.num_res_blocks],
            config.side >> i in config.attn_resolutions,
            halve(width) if i < last else nn.Identity(),
            config.dropout,
        )
        for i, (before, width) in enumerate(pairwise([config.ch, *widths]))
    ]
    parts = {"conv_in": conv(1, config.ch), "levels": nn.Sequential(*levels)}
    parts |= {"middle": middle(widths[-1], config.dropout)}
    parts |= {"norm_out": norm(widths[-1]), "swish": nn.SiLU(), "conv_out": conv(widths[-1], 2 * config.z_channels)}
    return nn.Sequential(OrderedDict(parts))


def make_decoder(config: WeightAutoencoderConfig) -> nn.Sequential:
    """From (b, z_channels, grid, grid) to (b, 1, side, side); level 0 is the one of full size, as in the encoder."""
    widths, last = config.channels, len(config.channels) - 1
    levels = {
        str(i): Level(
            [widths[min(i + 1, last)], *[widths[i]] * (config.num_res_blocks + 1)],
            config.side >> i in config.attn_resolutions,
            double(widths[i]) if i else nn.Identity(),
            config.dropout,
        )
        for i in range(last, -1, -1)
    }
    parts = {"conv_in": conv(config.z_channels, widths[-1]), "middle": middle(widths[-1], config.dropout)}
    parts |= {"levels": nn.Sequential(OrderedDict(levels))}
    parts |= {"norm_out": norm(widths[0]), "swish": nn.SiLU(), "conv_out": conv(widths[0], 1)}
    return nn.Sequential(OrderedDict(parts))


class WeightAutoencoder(nn.Module):
    """Encoder, Gaussian spatial latent, decoder; normalised flat weights, 0 where padded.

    Args:
        config: Sizes.
    """

    def __init__(self, config: WeightAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_layout = LatentLayout(z=(config.embed_dim, config.grid, config.grid))
        self.noise_dim = self.latent_layout.size
        self.terms = ("nll", "kl")
        linear, pixels = config.layout == "linear", config.side**2
        self.from_weights = nn.Linear(config.max_len, pixels) if linear else None
        self.encoder = make_encoder(config)
        self.to_posterior = conv(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.from_z = conv(config.embed_dim, config.z_channels, 1)
        self.decoder = make_decoder(config)
        self.to_weights = nn.Linear(pixels, config.max_len) if linear else None
        self.error_logvar = nn.Parameter(torch.zeros(()))
        """s of the term `nll`: the logarithm of the error that the model expects of a weight."""

    def encode(self, x: Weights) -> Posterior:
        """Posterior over z of each network, in float32.

        Args:
            x: Normalised weights, 0 where padded.

        Raises:
            ValueError: networks of another length.
        """
        h = self._image(self._flat(x))  #                              (b, 1, side, side)
        h = self.to_posterior(self.encoder(h))  #                      (b, 2 * embed_dim, grid, grid)
        mu, logvar = (self.latent_layout.flatten({"z": part}).float() for part in h.chunk(2, dim=1))
        return Posterior(mu, logvar.clamp(*LOGVAR_RANGE))  #           (b, embed_dim * grid * grid) each

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        """Normalised weights from flat latents; those where a network is padded mean nothing."""
        h = self.from_z(self.latent_layout.unflatten(z)["z"])  #       (b, z_channels, grid, grid)
        h = rearrange(self.decoder(h), "b 1 h w -> b (h w)")
        return h[:, : self.config.max_len] if self.to_weights is None else self.to_weights(h)  # (b, max_len)

    def forward(self, x: Weights) -> Float[Tensor, "b n"]:
        """Reconstruction through the posterior mean, without noise."""
        return self.decode(self.encode(x).mu)

    def loss(self, batch: dict[str, Tensor] | Weights) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms of `x` and, where networks are padded, of `mask` (b, max_len): True where a weight is.

        `nll`: error / exp(s) + s with a learned s, least where exp(s) is the error; it is that of `weight_error`.
        For `l1` this is the negative log-likelihood of a Laplace distribution, in nats per weight, less log 2; for
        `mse` twice that of a Gaussian, less log 2 pi. `kl`: nats per network (sum over z, batch mean). `l1` and `mse`
        per weight, on the normalised scale, to be logged only. Errors are the mean over the weights of each network,
        then over networks: padding has no say in them, and long networks no more than short ones.

        `batch["noise"]` (b, noise_dim) is used where given; otherwise noise is drawn in training mode, and at
        evaluation there is none: z is the posterior mean. A bare tensor is a batch of unpadded networks.

        Raises:
            ValueError: networks of another length, or a mask of another shape.
        """
        batch = {"x": batch} if isinstance(batch, Tensor) else batch
        x, mask, noise = self._flat(batch["x"]), batch.get("mask"), batch.get("noise")
        if mask is not None:
            mask = self._flat(mask, "mask")
            x = x.masked_fill(~mask, 0)
        posterior = self.encode(x)
        if noise is None and self.training:
            noise = torch.randn_like(posterior.mu)
        x_hat = self.decode(posterior.mu if noise is None else posterior.sample(noise))
        error = (x_hat.float() - x.float()).abs()
        errors = {"l1": masked_mean(error, mask), "mse": masked_mean(error.square(), mask)}
        nll = errors[self.config.weight_error] * torch.exp(-self.error_logvar) + self.error_logvar
        return {"nll": nll, "kl": posterior.kl().mean()} | errors

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """Normalised weights decoded from n draws of the prior; the generator is a CPU one."""
        return self.decode(torch.randn(n, self.noise_dim, generator=generator).to(self.error_logvar.device))

    def _flat(self, x: Tensor, name: str = "x") -> Tensor:
        """x or a mask of it as (b, max_len)."""
        flat = x[:, 0] if x.dim() == 3 and x.shape[1] == 1 else x
        if flat.dim() != 2 or flat.shape[1] != self.config.max_len:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} (networks, weights): this model was built for networks of "
                f"{self.config.max_len} weights; open the data with max_len: {self.config.max_len}"
            )
        return flat

    def _image(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 side side"]:
        """What the encoder reads."""
        if self.from_weights is None:
            pixels = F.pad(x, (0, self.config.side**2 - self.config.max_len))
        else:
            pixels = F.leaky_relu(self.from_weights(x))
        return rearrange(pixels, "b (h w) -> b 1 h w", h=self.config.side)


def masked_mean(values: Float[Tensor, "b d"], mask: Bool[Tensor, "b d"] | None) -> Float[Tensor, ""]:
    """Mean over the elements of each row where the mask is True, or all without one, then over rows; NaN if none is."""
    if mask is None:
        return values.mean()
    return (values.masked_fill(~mask, 0).sum(1) / mask.sum(1)).mean()
