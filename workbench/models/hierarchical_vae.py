"""Hierarchical variational autoencoder of simulated fields: one main latent, and one code for each level above it.

Paper: Vahdat & Kautz 2020, "NVAE" (arXiv 2007.03898), for the residual posterior of the levels.
Reference: SimulGen-VAE. A field has nodes as channels, so convolutions run along time, whose length never changes.
Deviations: the KL of a level is that of its residual posterior to its prior (the reference has another formula);
nothing is drawn at evaluation; with `all_codes` the code of the first level is read too (the reference computes it
and leaves it unread); without `output_norm` no norm stands before the last tanh, as a norm over nodes and time gives
every field the same mean and spread.
"""

from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Config
from workbench.layers import LatentLayout, Posterior, norm
from workbench.losses import ERRORS, residual_kl
from workbench.models.spectral_norm import spectral_norm

RESIDUAL_WEIGHT = 0.1
EXPANSION = 5


class HierarchicalVAESettings(Config):
    """What a user chooses of a HierarchicalVAE.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    latent_dim: int = Field(32, ge=1)
    """Length of the main latent."""
    hier_latent_dim: int = Field(8, ge=1)
    """Length of each level's code."""
    filters: list[int] = Field([1024, 512, 256, 128], min_length=2)
    """Channels of the levels, from the field to the main latent."""
    large: bool = False
    """Twice the convolutions in every block."""
    spectral_norm: bool = True
    """Divide every weight by its largest singular value."""
    recon_loss: Literal["mse", "mae", "smooth_l1", "huber"] = "mse"
    """The error between a field and its reconstruction."""
    output_norm: bool = True
    """Normalise before the last tanh, as published; fields whose mean or spread says something need False."""
    all_codes: bool = True
    """Read the code of the first level too; published checkpoints do not."""

    @model_validator(mode="after")
    def _has_channels(self) -> "HierarchicalVAESettings":
        if min(self.filters) < 1:
            raise ValueError(f"filters={self.filters}: every entry must be at least 1")
        return self


class HierarchicalVAEConfig(HierarchicalVAESettings):
    """Sizes of a HierarchicalVAE: the user's, and those of the fields."""

    nodes: int = Field(ge=1)
    """Nodes of the field, times its variables."""
    steps: int = Field(ge=1)
    """Time steps of the field."""


class WideConv(nn.Conv1d):
    """nn.Conv1d that takes the batch for one image of height b: on a CPU, for many channels, 1.3 times as fast."""

    def forward(self, x: Float[Tensor, "b c_in t"]) -> Float[Tensor, "b c_out t"]:
        image = rearrange(x, "b c t -> 1 c b t")
        image = F.conv2d(image, self.weight.unsqueeze(2), self.bias, padding=(0, *self.padding))
        return rearrange(image, "1 c b t -> b c t")


def conv(c_in: int, c_out: int, width: int) -> list[nn.Module]:
    """Convolution along time that keeps its length, norm, GELU."""
    kind = WideConv if width > 1 else nn.Conv1d
    return [kind(c_in, c_out, width, padding=width // 2), norm(c_out), nn.GELU()]


class Residual(nn.Module):
    """x + 0.1 branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        return x + RESIDUAL_WEIGHT * self.branch(x)


def expand(d: int, channels: int, steps: int) -> nn.Sequential:
    """A vector as a sequence: (b, d) to (b, channels, steps)."""
    unflatten = Rearrange("b (d t) -> b d t", d=d, t=steps)
    return nn.Sequential(nn.Linear(d, d * steps), unflatten, *conv(d, channels, 5))


def gaussian(c_in: int, c_out: int, large: bool) -> nn.Sequential:
    """From a state to mean and log-variance of c_out channels each."""
    repeats = 2 if large else 1
    block = Residual(*(layer for _ in range(repeats) for layer in conv(c_in, c_in, 3)))
    return nn.Sequential(block, nn.GELU(), nn.Conv1d(c_in, 2 * c_out, 3, padding=1))


class EncoderLevel(nn.Module):
    """Change the number of channels, then a residual block."""

    def __init__(self, c_in: int, c_out: int, large: bool) -> None:
        super().__init__()
        more = conv(c_out, c_out, 3) if large else []
        self.project = nn.Sequential(*conv(c_in, c_out, 1), *more)
        self.residual = Residual(*(layer for _ in range(2 if large else 1) for layer in conv(c_out, c_out, 3)))

    def forward(self, x: Float[Tensor, "b c_in t"]) -> Float[Tensor, "b c_out t"]:
        return self.residual(self.project(x))


class DecoderLevel(nn.Module):
    """Change the number of channels, then a residual block; prior and posterior of what is added to its state."""

    def __init__(self, c_in: int, c_out: int, coded: bool, config: HierarchicalVAEConfig) -> None:
        super().__init__()
        wide = EXPANSION * c_out
        self.up = nn.Sequential(nn.ConvTranspose1d(c_in, c_out, 3, padding=1), nn.GELU())
        inner = [*conv(c_out, c_out, 1), *conv(c_out, wide, 5)] if config.large else conv(c_out, wide, 1)
        self.residual = Residual(*inner, *conv(wide, wide, 5), *conv(wide, c_out, 1))
        self.coded = coded
        if coded:
            self.prior = gaussian(c_out, c_out, config.large)
            self.expand = expand(config.hier_latent_dim, c_out, config.steps)
            self.posterior = gaussian(2 * c_out, c_out, config.large)

    def forward(self, state: Float[Tensor, "b c_in t"]) -> Float[Tensor, "b c_out t"]:
        return self.residual(self.up(state))


class HierarchicalVAE(nn.Module):
    """Encoder, main latent and hierarchical codes, top-down decoder; fields (b, n, t) scaled into (-1, 1).

    The flat latent is the main latent, then the codes in the order the decoder reads them, from the deepest
    level but one to the first.

    Args:
        config: Sizes.
    """

    def __init__(self, config: HierarchicalVAEConfig) -> None:
        super().__init__()
        self.config = config
        filters, steps = config.filters, config.steps
        down = list(pairwise([config.nodes, *filters]))
        up = list(pairwise(filters[::-1]))
        self.encoder = nn.ModuleList(EncoderLevel(a, b, config.large) for a, b in down)
        self.to_code = nn.ModuleList(nn.Linear(c * steps, config.hier_latent_dim) for c in filters[:-1])
        self.to_main = nn.Linear(filters[-1] * steps, 2 * config.latent_dim)
        self.start = expand(config.latent_dim, filters[-1], steps)
        coded = [config.all_codes or i < len(up) - 1 for i in range(len(up))]
        self.decoder = nn.ModuleList(DecoderLevel(a, b, c, config) for (a, b), c in zip(up, coded, strict=True))
        last = [norm(config.nodes)] if config.output_norm else []
        self.output = nn.Sequential(nn.Conv1d(filters[0], config.nodes, 1), *last, nn.Tanh())
        codes = {f"level_{i}": (config.hier_latent_dim,) for i in range(len(up))}
        self.latent_layout = LatentLayout(main=(config.latent_dim,), **codes)
        self.level_dims = [c * steps for (_, c), used in zip(up, coded, strict=True) if used]
        self.noise_dim = config.latent_dim + sum(self.level_dims)
        if config.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
                    spectral_norm(module)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of `loss`: the error, then the KLs."""
        return (self.config.recon_loss, "kl", "kl_levels")

    def encode(self, x: Float[Tensor, "b n t"]) -> Posterior:
        """Gaussian over the main latent, and the codes as points.

        Raises:
            ValueError: fields of another number of nodes or time steps.
        """
        expected = (self.config.nodes, self.config.steps)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape[1:])} (n, t): this model was built for {expected}")
        codes = []
        for i, level in enumerate(self.encoder):
            x = level(x)  #                                       (b, filters[i], t)
            flat = rearrange(x, "b c t -> b (c t)")
            if i < len(self.to_code):
                codes.append(self.to_code[i](flat))  #            (b, hier_latent_dim)
        mu, logvar = self.to_main(flat).chunk(2, dim=1)  #        (b, latent_dim) each
        return Posterior(torch.cat([mu, *codes[::-1]], dim=1), logvar)

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b n t"]:
        """Fields from flat latents; what the levels add is the mean of their posterior."""
        latents = list(self.latent_layout.unflatten(z).values())
        return self._descend(latents[0], latents[1:], None)[0]

    def forward(self, x: Float[Tensor, "b n t"]) -> Float[Tensor, "b n t"]:
        """Reconstruction through the posterior mean, without noise."""
        return self.decode(self.encode(x).mu)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms: the error named by `recon_loss`, per element; `kl` of the main latent to N(0, I) and
        `kl_levels` of the levels' posteriors to their priors, in nats (sums over dimensions, batch means).

        `batch["noise"]` (b, noise_dim) is used where given; otherwise noise is drawn in training mode, and at
        evaluation there is none. `batch["input"]`, where given, is encoded in place of x (augmentation).
        """
        posterior = self.encode(batch.get("input", batch["x"]))
        noise = batch.get("noise")
        if noise is None and self.training:
            noise = torch.randn(len(posterior.mu), self.noise_dim, device=posterior.mu.device)
        first, *levels = (None,) if noise is None else noise.split([self.config.latent_dim, *self.level_dims], dim=1)
        z = posterior.mu if first is None else posterior.sample(first)
        latents = list(self.latent_layout.unflatten(z).values())
        x_hat, kl_levels = self._descend(latents[0], latents[1:], levels or None)
        error = ERRORS[self.config.recon_loss](x_hat, batch["x"])
        return {self.config.recon_loss: error, "kl": posterior.kl().mean(), "kl_levels": kl_levels.mean()}

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n n_nodes t"]:
        """Fields from n draws of the prior: of the main latent, then of each level given those above it."""
        noise = torch.randn(n, self.noise_dim, generator=generator).to(next(self.parameters()).device)
        main, *levels = noise.split([self.config.latent_dim, *self.level_dims], dim=1)
        return self._descend(main, [], levels)[0]

    def _descend(
        self, main: Float[Tensor, "b d"], codes: list[Tensor], noise: list[Tensor] | None
    ) -> tuple[Float[Tensor, "b n t"], Float[Tensor, " b"]]:
        """Top-down pass: the field, and the KL of all levels; without codes the levels follow their priors."""
        state, kl = self.start(main), main.new_zeros(len(main), dtype=torch.float32)
        for i, level in enumerate(self.decoder):
            state = level(state)  #                                      (b, c, t)
            if not level.coded:
                break
            mu, logvar = level.prior(state).chunk(2, dim=1)  #           (b, c, t) each
            if codes:
                joined = torch.cat([level.expand(codes[i]), state], dim=1)
                shift, log_scale = level.posterior(joined).chunk(2, dim=1)
                kl = kl + residual_kl(shift, log_scale, logvar)
                mu, logvar = mu + shift, logvar + log_scale
            if noise is not None:
                mu = mu + torch.exp(0.5 * logvar) * rearrange(noise[i], "b (c t) -> b c t", t=mu.shape[2])
            state = state + mu
        return self.output(state), kl
