"""Convolutional autoencoder of floor plans, deterministic or variational, with a spatial latent.

Papers: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models" (arXiv 2112.10752), for the
spatial latent; Kingma & Welling 2014 (arXiv 1312.6114) for the KL.
The deterministic network is the variational one without `to_logvar`: for one seed all other weights are the same,
whichever heads there are. The log-variance is 0 before training, that of the prior.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.config import Config
from workbench.layers import LatentLayout, Posterior, norm, shard
from workbench.losses import mean_squared_error

WIDEST = 8
UNLABELLED = -1


class LayoutAutoencoderSettings(Config):
    """What a user chooses of a LayoutAutoencoder.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    latent_channels: int = Field(4, ge=1)
    """Channels of the latent grid."""
    base_channels: int = Field(32, ge=1)
    """Channels at full size; each halving of the image doubles them, up to 8 times as many."""
    downsampling_steps: int = Field(3, ge=1)
    """Halvings of the image on the way to the latent grid."""
    variational: bool = True
    """A Gaussian over the latent with a KL to N(0, I); else a point, without noise and without KL."""
    segmentation: bool = True
    """Whether the class of each pixel is decoded too."""
    classification: bool = True
    """Whether the type of the image is told from the latent."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """The term `kl` over the latent's dimensions: their mean, or their sum in nats per image."""


class Halvings(Config):
    """Whether an image can be halved as often as is asked for.

    Raises:
        ConfigError: a value of the wrong type or out of range, or an image size that cannot be halved so often.
    """

    image_size: int = Field(ge=2)
    """Side of the square images [px]; divisible by 2 ** downsampling_steps."""
    downsampling_steps: int = Field(3, ge=1)
    """Halvings of the image on the way to the latent grid."""

    @model_validator(mode="after")
    def _whole(self) -> "Halvings":
        factor = 2**self.downsampling_steps
        below = self.image_size // factor * factor
        if below != self.image_size:
            sizes = f"{below} or {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"image_size={self.image_size}: must be divisible by {factor} = 2 ** downsampling_steps, which is "
                f"{self.downsampling_steps}; the nearest such size is {sizes}"
            )
        return self


class LayoutAutoencoderConfig(LayoutAutoencoderSettings, Halvings):
    """Sizes of a LayoutAutoencoder: the user's, and those of the images.

    Raises:
        ConfigError: a value of the wrong type or out of range, an image size that cannot be halved so often, or a
            head with fewer than 2 classes or types to tell apart.
    """

    in_channels: int = Field(3, ge=1)
    """Channels of the images."""
    n_classes: int = Field(ge=0)
    """Classes of a pixel; 0 where the data have none."""
    n_types: int = Field(ge=0)
    """Types of an image; 0 where the data have none."""

    @model_validator(mode="after")
    def _fits(self) -> "LayoutAutoencoderConfig":
        for head, size in (("segmentation", "n_classes"), ("classification", "n_types")):
            if getattr(self, head) and getattr(self, size) < 2:
                raise ValueError(
                    f"{head}=True: must have 2 or more to tell apart, and {size}={getattr(self, size)}; "
                    f"set {head} to false, or use data that have them"
                )
        return self

    @property
    def grid(self) -> int:
        """Side of the latent grid."""
        return self.image_size // 2**self.downsampling_steps

    @property
    def channels(self) -> list[int]:
        """Channels at full size and after each halving."""
        return [self.base_channels * min(2**i, WIDEST) for i in range(self.downsampling_steps + 1)]


@dataclass(frozen=True)
class Decoded:
    """Everything that a latent says of its image; None where the head is absent.

    Args:
        x_hat: Image in [-1, 1].
        class_logits: Of each pixel, over the classes.
        type_logits: Of the image, over the types.
    """

    x_hat: Float[Tensor, "b c h w"]
    class_logits: Float[Tensor, "b k h w"] | None
    type_logits: Float[Tensor, "b t"] | None


def cross_entropy(logits: Float[Tensor, "b k ..."], target: Int[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Mean of -log p(target) over the labelled elements, in nats; those with target -1 count nowhere.

    0 where nothing is labelled. Where processes divide a batch, the mean of theirs is that of the batch. The last step
    is that of vectors, which CUDA has a deterministic kernel for.
    """
    log_p = rearrange(F.log_softmax(logits.float(), dim=1), "b k ... -> (b ...) k")
    total = F.nll_loss(log_p, target.flatten(), ignore_index=UNLABELLED, reduction="sum")
    return total * shard().size / shard().total((target != UNLABELLED).sum()).clamp(min=1)


def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution that keeps the size, or halves it with stride 2."""
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)


def zeros(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + branch(x), the branch being norm, SiLU and convolution, twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [(norm(channels), nn.SiLU(), conv(channels, channels)) for _ in range(2)]
        self.branch = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.branch(x)


class LayoutAutoencoder(nn.Module):
    """Encoder, spatial latent, decoder with up to three heads; images in [-1, 1].

    Args:
        config: Sizes.
    """

    def __init__(self, config: LayoutAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, latent = config.channels, config.latent_channels
        stages = list(pairwise(widths))
        self.latent_layout = LatentLayout(z=(latent, config.grid, config.grid))
        self.noise_dim = self.latent_layout.size if config.variational else 0
        down = (layer for a, b in stages for layer in (conv(a, b, stride=2), Residual(b)))
        self.encoder = nn.Sequential(conv(config.in_channels, widths[0]), nn.SiLU(), *down, norm(widths[-1]), nn.SiLU())
        self.to_mu = nn.Conv2d(widths[-1], latent, 1)
        self.from_z = nn.Conv2d(latent, widths[-1], 1)
        up = (layer for a, b in stages[::-1] for layer in (Residual(b), nn.Upsample(scale_factor=2), conv(b, a)))
        self.decoder = nn.Sequential(*up, norm(widths[0]), nn.SiLU())
        self.to_image = nn.Sequential(conv(widths[0], config.in_channels), nn.Tanh())
        self.to_classes = conv(widths[0], config.n_classes) if config.segmentation else None
        self.to_type = nn.Linear(latent, config.n_types) if config.classification else None
        self.to_logvar = zeros(nn.Conv2d(widths[-1], latent, 1)) if config.variational else None

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of `loss` that are optimised: the error, those of the heads, the KL."""
        heads = {"segmentation": self.to_classes, "classification": self.to_type, "kl": self.to_logvar}
        return ("mse", *(name for name, head in heads.items() if head is not None))

    def encode(self, x: Float[Tensor, "b c h w"]) -> Posterior:
        """Posterior over z of each image, in float32; a point where the model is deterministic.

        Raises:
            ValueError: images of another size or number of channels.
        """
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape[1:])} (c, h, w): this model was built for {expected}")
        h = self.encoder(x)  #                                    (b, widths[-1], grid, grid)
        mu = self.latent_layout.flatten({"z": self.to_mu(h)})  #  (b, latent_channels * grid * grid)
        if self.to_logvar is None:
            return Posterior(mu.float())
        return Posterior(mu.float(), self.latent_layout.flatten({"z": self.to_logvar(h)}).float())

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1] from flat latents."""
        return self.to_image(self._features(self.latent_layout.unflatten(z)["z"]))

    def decode_all(self, z: Float[Tensor, "b d"]) -> Decoded:
        """Images, classes of their pixels and their types from flat latents."""
        grid = self.latent_layout.unflatten(z)["z"]  #            (b, latent_channels, grid, grid)
        h = self._features(grid)  #                               (b, widths[0], h, w)
        return Decoded(
            self.to_image(h),
            None if self.to_classes is None else self.to_classes(h),
            None if self.to_type is None else self.to_type(reduce(grid, "b c h w -> b c", "mean")),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Reconstruction through the posterior mean, without noise."""
        return self.decode(self.encode(x).mu)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms of `x`, its `classes` (b, h, w) and its `type` (b,), the last two with -1 for unlabelled.

        `mse` per element on the [-1, 1] scale; with the head, `segmentation` in nats per pixel and `classification`
        in nats per image; where variational, `kl` as `kl_reduction` says, `kl_mean` in nats per dimension and
        `kl_total` in nats per image, the last two to be logged only.
        `batch["noise"]` (b, noise_dim) is used where given; otherwise noise is drawn in training mode, and at
        evaluation there is none: z is the posterior mean.
        """
        posterior, noise = self.encode(batch["x"]), batch.get("noise")
        if noise is None and self.training and self.noise_dim:
            noise = torch.randn_like(posterior.mu)
        decoded = self.decode_all(posterior.mu if noise is None else posterior.sample(noise))
        terms = {"mse": mean_squared_error(decoded.x_hat, batch["x"])}
        if decoded.class_logits is not None:
            terms["segmentation"] = cross_entropy(decoded.class_logits, batch["classes"])
        if decoded.type_logits is not None:
            terms["classification"] = cross_entropy(decoded.type_logits, batch["type"])
        if posterior.logvar is None:
            return terms
        total = posterior.kl().mean()
        mean = total / self.latent_layout.size
        return terms | {"kl": mean if self.config.kl_reduction == "mean" else total, "kl_mean": mean, "kl_total": total}

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n c h w"]:
        """Images decoded from n draws of the prior; the generator is a CPU one.

        Raises:
            ValueError: the model is deterministic.
        """
        if self.to_logvar is None:
            raise ValueError(
                "variational=False: nothing drew the latents to a prior, so there is none to draw from; "
                "decode latents of images, or train with variational: true"
            )
        return self.decode(torch.randn(n, self.noise_dim, generator=generator).to(self.from_z.weight.device))

    def _features(self, grid: Float[Tensor, "b d g g"]) -> Float[Tensor, "b c h w"]:
        """What the heads of the decoder read."""
        return self.decoder(self.from_z(grid))
