"""Convolutional variational autoencoder of single frames.

Paper: Kingma & Welling 2014, "Auto-encoding variational Bayes" (arXiv 1312.6114).
Reference: the vanilla VAE of PyTorch-VAE (A. K. Subramanian), for a variable image size.
Deviations: none in the network. The KL is summed over dimensions and averaged over the batch, in nats, its
weight belongs to training; noise can be given with the batch, so that a step can be repeated exactly.
"""

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.config import Config
from workbench.layers import LatentLayout, Posterior
from workbench.losses import mean_squared_error


class ConvVAEConfig(Config):
    """Sizes of a ConvVAE.

    Raises:
        ConfigError: a value out of range, or an image size that the stages cannot halve exactly.
    """

    image_size: int = Field(256, ge=2)
    """Side of the square images [px]; divisible by 2 ** len(hidden_dims)."""
    in_channels: int = Field(3, ge=1)
    """Channels of the images."""
    latent_dim: int = Field(256, ge=1)
    """Length of z."""
    hidden_dims: list[int] = Field([64, 128, 256, 512, 1024], min_length=1)
    """Channels after each halving of the image."""

    @model_validator(mode="after")
    def _divisible(self) -> "ConvVAEConfig":
        if min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims={self.hidden_dims}: every entry must be at least 1")
        factor = 2 ** len(self.hidden_dims)
        below = self.image_size // factor * factor
        if below != self.image_size:
            sizes = f"{below} or {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"image_size={self.image_size}: must be divisible by {factor}, as {len(self.hidden_dims)} entries of "
                f"hidden_dims halve it; the nearest such size is {sizes}"
            )
        return self

    @property
    def grid(self) -> int:
        """Side of the last feature map."""
        return self.image_size // 2 ** len(self.hidden_dims)


def down(c_in: int, c_out: int) -> nn.Sequential:
    """Halve height and width."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.LeakyReLU())


def up(c_in: int, c_out: int) -> list[nn.Module]:
    """Double height and width."""
    conv = nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=1)
    return [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU()]


class Linear(nn.Linear):
    """In float32 under autocast too: between a large grid and few numbers, casting the weights is most of the work."""

    def forward(self, x: Float[Tensor, "b c_in"]) -> Float[Tensor, "b c_out"]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class ConvVAE(nn.Module):
    """Encoder, Gaussian latent, decoder; images in [-1, 1].

    Args:
        config: Sizes.
    """

    def __init__(self, config: ConvVAEConfig) -> None:
        super().__init__()
        self.config = config
        dims, features = config.hidden_dims, config.hidden_dims[-1] * config.grid**2
        self.latent_layout = LatentLayout(z=(config.latent_dim,))
        self.noise_dim = config.latent_dim
        self.terms = ("mse", "kl")
        self.encoder = nn.Sequential(*(down(a, b) for a, b in pairwise([config.in_channels, *dims])))
        self.to_mu = Linear(features, config.latent_dim)
        self.to_logvar = Linear(features, config.latent_dim)
        self.from_z = Linear(config.latent_dim, features)
        self.decoder = nn.Sequential(*(nn.Sequential(*up(a, b)) for a, b in pairwise(dims[::-1])))
        last = nn.Conv2d(dims[0], config.in_channels, 3, padding=1)
        self.to_image = nn.Sequential(*up(dims[0], dims[0]), last, nn.Tanh())

    def encode(self, x: Float[Tensor, "b c h w"]) -> Posterior:
        """Posterior over z of each image.

        Raises:
            ValueError: images of another size or number of channels.
        """
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape[1:])} (c, h, w): this model was built for {expected}")
        h = self.encoder(x)  #                  (b, dims[-1], grid, grid)
        h = rearrange(h, "b c h w -> b (c h w)")
        return Posterior(self.to_mu(h), self.to_logvar(h))  # (b, latent_dim) each

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1] from latents."""
        h = self.from_z(z)
        h = rearrange(h, "b (c h w) -> b c h w", h=self.config.grid, w=self.config.grid)
        h = self.decoder(h)  #                  (b, dims[0], h / 2, w / 2)
        return self.to_image(h)  #              (b, c, h, w)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Reconstruction through the posterior mean, without noise."""
        return self.decode(self.encode(x).mu)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms: `mse` per element on the [-1, 1] scale, `kl` in nats (sum over z, batch mean).

        `batch["noise"]` (b, latent_dim) is used where given; otherwise noise is drawn in training mode, and at
        evaluation there is none: z is the posterior mean.
        """
        posterior = self.encode(batch["x"])
        noise = batch.get("noise")
        if noise is None and self.training:
            noise = torch.randn_like(posterior.mu)
        z = posterior.mu if noise is None else posterior.sample(noise)
        return {"mse": mean_squared_error(self.decode(z), batch["x"]), "kl": posterior.kl().mean()}

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n c h w"]:
        """Images decoded from n draws of the prior; the generator is a CPU one."""
        return self.decode(torch.randn(n, self.noise_dim, generator=generator).to(self.from_z.weight.device))
