"""Augmentation of fields in the training of a VAE: noise, scale, mixup, shift in time, cutout; off by default.

Scale, mixup and shift make another field, so they change x, which is both encoded and aimed at. Noise and cutout
spoil a field: they change `input`, which is encoded in place of x, and x stays what the reconstruction is held to.
"""

import torch
from einops import repeat
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.distributions import Beta

from workbench.config import Config
from workbench.datasets.loading import Batch
from workbench.layers import shard

ROUNDING = 1e-9


class AugmentConfig(Config):
    """How training fields are varied; every amount is 0, which is off, unless given.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    augment_noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Standard deviation of the noise on what is encoded [scale of x]."""
    augment_scale: float = Field(0.0, ge=0, lt=1)
    """Fields times a factor, uniform between 1 - augment_scale and 1 + augment_scale."""
    augment_mixup: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Mix pairs of fields with shares from Beta(augment_mixup, augment_mixup)."""
    augment_shift: int = Field(0, ge=0)
    """Largest shift in time, either way [steps]; the first or last step fills the gap."""
    augment_cutout: float = Field(0.0, ge=0, le=1)
    """Largest share of the time steps that a blanked window of what is encoded covers."""

    @property
    def off(self) -> bool:
        """Whether nothing is changed."""
        return not any(self.model_dump().values())


def augment(batch: Batch, config: AugmentConfig) -> Batch:
    """A batch with varied fields, each sample on its own; the batch given is left as it is.

    Draws on the CPU from torch's default generator, so the same seed gives the same fields on every device. Where
    processes divide a batch, it is drawn for the whole of it, and fields are mixed with those of other processes too.

    Args:
        batch: `x` (b, n, t), and whatever else, which is passed on.
        config: Amounts; when all are 0 the batch itself is returned, and nothing is drawn.

    Returns:
        The batch with another `x`; with `input` (b, n, t), made from that x, where noise or cutout is on.

    Raises:
        ValueError: x has not three axes; the batch holds codes `z`, which belong to the field as it was; the
            largest shift leaves no step of the field.
    """
    if config.off:
        return batch
    x = batch["x"]
    _check(batch, config)
    n, own = len(x) * shard().size, shard().own
    if config.augment_scale:
        x = x * own(scale_factors(n, config.augment_scale)).to(x)
    if config.augment_mixup:
        x = mixup(x, config.augment_mixup)
    if config.augment_shift:
        largest = config.augment_shift
        x = shift(x, own(torch.randint(-largest, largest + 1, (n,))))
    augmented = batch | {"x": x}
    spoilt = x
    if config.augment_noise:
        spoilt = spoilt + config.augment_noise * own(torch.randn(n, *x.shape[1:])).to(x)
    if config.augment_cutout:
        spoilt = spoilt * own(cutout_mask(n, x.shape[2], config.augment_cutout)).to(x)
    return augmented if spoilt is x else augmented | {"input": spoilt}


def _check(batch: Batch, config: AugmentConfig) -> None:
    shape = tuple(batch["x"].shape)
    if "z" in batch:
        raise ValueError("the batch holds codes z, which belong to x as it was: augment in the training of a VAE only")
    if len(shape) != 3:
        raise ValueError(f"x has shape {shape}: must be fields (b, n, t) to be augmented; set augment_* to 0")
    if config.augment_shift >= shape[2]:
        steps = f"{shape[2]}, the time steps of x"
        raise ValueError(f"augment_shift={config.augment_shift}: must be less than {steps}; lower it")


def scale_factors(n: int, spread: float) -> Float[Tensor, "n 1 1"]:
    """A factor for each of n samples, uniform between 1 - spread and 1 + spread."""
    return 1 + spread * (2 * torch.rand(n, 1, 1) - 1)


def mixup(x: Float[Tensor, "b n t"], concentration: float) -> Float[Tensor, "b n t"]:
    """share * x + (1 - share) * x in another order, with shares from Beta(concentration, concentration).

    Source: Zhang et al. 2018 (arXiv 1710.09412).
    """
    n, own = len(x) * shard().size, shard().own
    share = own(Beta(concentration, concentration).sample((n, 1, 1))).to(x)
    other = shard().gather(x)[own(torch.randperm(n)).to(x.device)]
    return torch.lerp(other, x, share)


def shift(x: Float[Tensor, "b n t"], steps: Int[Tensor, " b"]) -> Float[Tensor, "b n t"]:
    """Each sample later by its number of steps (earlier when negative); its first or last step fills the gap."""
    last = x.shape[2] - 1
    source = (torch.arange(last + 1) - steps[:, None]).clamp(0, last).to(x.device)  # (b, t)
    return x.gather(2, repeat(source, "b t -> b n t", n=x.shape[1]))


def cutout_mask(n: int, steps: int, share: float) -> Float[Tensor, "n 1 t"]:
    """1, and 0 in a window of each sample that covers from none to `share` of the steps, all as likely."""
    length = torch.randint(0, int(share * steps + ROUNDING) + 1, (n, 1, 1))
    start = (torch.rand(n, 1, 1) * (steps - length + 1)).long()  # from 0 to steps - length
    time = torch.arange(steps)
    return ((time < start) | (time >= start + length)).float()
