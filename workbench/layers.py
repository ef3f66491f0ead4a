"""Small blocks that several models share, and what looks across the samples of a batch when processes divide it.

Where several processes train one model, each has as many rows of every batch. Numbers are drawn for the whole batch and
cut, and what is counted over a batch is counted over all of it: so the model learns the same as in one process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.losses import gaussian_kl


@dataclass(frozen=True)
class Shard:
    """Which rows of every batch this process has: part `rank` of `size` equal ones; all of them unless said otherwise.

    Args:
        rank: Of this process.
        size: Processes.
        gather: Rows of all processes, in order; every one of them calls it, as often, with as many rows.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x

    def own(self, drawn: Tensor) -> Tensor:
        """This process's rows of what was drawn for the whole batch."""
        rows = len(drawn) // self.size
        return drawn if self.size == 1 else drawn[self.rank * rows : (self.rank + 1) * rows]

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes; no gradient flows through it."""
        return x if self.size == 1 else self.gather(x[None]).sum(0)

    def drawn_like(self, x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """`draw` of something like x, drawn as for the whole batch."""
        return draw(x) if self.size == 1 else self.own(draw(torch.cat([x.detach()] * self.size)))


_current = [Shard()]


def shard() -> Shard:
    """The rows of every batch that this process has at the moment."""
    return _current[-1]


@contextmanager
def sharded(rows: Shard) -> Iterator[None]:
    """Batches inside the block are parts of larger ones."""
    _current.append(rows)
    try:
        yield
    finally:
        _current.pop()


class Dropout(nn.Dropout):
    """nn.Dropout that leaves out the same elements of a batch however many processes divide it."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        if shard().size == 1 or not self.training or not self.p:
            return super().forward(x)
        return x * shard().drawn_like(x, lambda whole: super(Dropout, self).forward(torch.ones_like(whole)))


@dataclass(frozen=True)
class Posterior:
    """What an encoder returns: a diagonal Gaussian over the leading k of d dimensions of z; the others are points.

    Args:
        mu: Mean, (b, d).
        logvar: Natural logarithm of the variance of the leading dimensions, (b, k); None for a deterministic encoder.
    """

    mu: Float[Tensor, "b d"]
    logvar: Float[Tensor, "b k"] | None = None

    @property
    def gaussian_mu(self) -> Float[Tensor, "b k"]:
        """Mean of the dimensions that have a variance; of none for a deterministic encoder."""
        return self.mu[:, : 0 if self.logvar is None else self.logvar.shape[1]]

    def sample(self, noise: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
        """mu + sigma * noise, with the caller's standard normal noise; mu where there is no variance."""
        if self.logvar is None:
            return self.mu
        drawn = self.gaussian_mu + torch.exp(0.5 * self.logvar) * noise
        return torch.cat([drawn, self.mu[:, drawn.shape[1] :]], dim=1)

    def kl(self) -> Float[Tensor, " b"]:
        """KL to N(0, I) of each sample over the Gaussian dimensions, in nats.

        Raises:
            ValueError: the encoder is deterministic.
        """
        if self.logvar is None:
            raise ValueError("logvar=None: a deterministic encoder has no KL; leave the term out")
        return gaussian_kl(self.gaussian_mu, self.logvar)


class LatentLayout:
    """How a model's latents lie in one flat vector, in the order given.

    Args:
        parts: Shape of each latent without the batch axis, such as `LatentLayout(main=(32,), level_0=(8,))`.
    """

    def __init__(self, **parts: tuple[int, ...]) -> None:
        self.shapes, self.slices, self.size = parts, {}, 0
        for name, shape in parts.items():
            self.slices[name] = slice(self.size, self.size + prod(shape))
            self.size += prod(shape)

    def flatten(self, latents: dict[str, Tensor]) -> Float[Tensor, "b d"]:
        """Join latents of shapes (b, *shape) into one vector per sample.

        Raises:
            ValueError: a latent is missing, unknown or of another shape.
        """
        found = {name: tuple(z.shape[1:]) for name, z in latents.items()}
        if found != self.shapes:
            raise ValueError(f"latents of shapes {found}: must be {self.shapes}, without the batch axis")
        return torch.cat([latents[name].flatten(1) for name in self.shapes], dim=1)

    def unflatten(self, z: Float[Tensor, "b d"]) -> dict[str, Tensor]:
        """The inverse of `flatten`; the parts are views of z.

        Raises:
            ValueError: z has another length.
        """
        if z.shape[1] != self.size:
            raise ValueError(f"z has {z.shape[1]} values per sample: must have {self.size} ({self.shapes})")
        return {name: z[:, part].unflatten(1, self.shapes[name]) for name, part in self.slices.items()}


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of at most 8 groups, of at least 4 channels where it divides so."""
    largest = min(8, max(1, channels // 4))
    return nn.GroupNorm(next(g for g in range(largest, 0, -1) if channels % g == 0), channels)
