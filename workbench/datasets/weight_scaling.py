"""Scaling of flat weights, fitted on the training split in a stream; padding stays 0 throughout."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from workbench.datasets.flat_weights import Architecture
from workbench.datasets.frames import DataError
from workbench.datasets.scaling import stamp_name
from workbench.datasets.zoo_cache import Zoo
from workbench.progress import Progress

CHUNK_BYTES = 32e6
Normalize = Literal["none", "global", "layer"]


class Moments(NamedTuple):
    """Of each layer of each architecture in turn, over the networks of a training split."""

    count: Float64[np.ndarray, " l"]
    """Weights."""
    mean: Float64[np.ndarray, " l"]
    square: Float64[np.ndarray, " l"]
    """Sum of the squared deviations from the mean."""

    def merged(self) -> "Moments":
        """Of all layers together.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
        """
        count = self.count.sum()
        mean = (self.count * self.mean).sum() / max(count, 1)
        square = (self.square + self.count * (self.mean - mean) ** 2).sum()
        return Moments(*(np.atleast_1d(value) for value in (count, mean, square)))


def measure(zoo: Zoo, networks: Int[np.ndarray, " n"]) -> Moments:
    """Moments over some networks of a zoo; kept in its cache, so that the next opening need not read them.

    Args:
        networks: Positions in the zoo's table.
    """
    return Moments(*zoo.kept(f"moments-{stamp_name(sorted(networks.tolist()))}", lambda: _pass(zoo, networks)))


def _pass(zoo: Zoo, networks: np.ndarray) -> Float64[np.ndarray, "3 l"]:
    each = []
    with Progress(len(networks), "measuring the weights", "network") as progress:
        for i, architecture in enumerate(zoo.architectures):
            of_architecture = networks[zoo.architecture[networks] == i]
            each.append(_of_architecture(zoo, architecture, of_architecture, progress))
    return np.concatenate(each, axis=1)


def _of_architecture(
    zoo: Zoo, architecture: Architecture, networks: np.ndarray, progress: Progress
) -> Float64[np.ndarray, "3 l"]:
    size = np.array([layer.size for layer in architecture.layers])
    filled = size > 0
    starts = np.array([layer.offset for layer in architecture.layers])[filled]
    moments = np.zeros((3, len(size)))
    count, mean, square = np.zeros((3, filled.sum()))
    chunk = max(1, int(CHUNK_BYTES / (8 * max(1, architecture.size))))
    for first in range(0, len(networks), chunk):
        part = networks[first : first + chunk]
        values = zoo.read(part, architecture.size).astype(np.float64)
        here = size[filled] * len(part)
        part_mean = np.add.reduceat(values.sum(0), starts) / here
        values -= np.repeat(part_mean, size[filled])
        part_square = np.add.reduceat(np.square(values, out=values).sum(0), starts)
        total = count + here
        gap = part_mean - mean
        square += part_square + gap**2 * count * here / total
        mean, count = mean + gap * here / total, total
        progress.update(len(part))
    moments[:, filled] = count, mean, square
    return moments


@dataclass(frozen=True)
class WeightScaling:
    """x = scale * (weight - mean) / std, where a network has a weight, and 0 in the padding behind them.

    Args:
        mean: Of each architecture's weights, in their unit, (a, d).
        std: Likewise, positive.
        size: Weights of a network of each architecture.
        scale: Factor on the normalised weights.
    """

    mean: Float[Tensor, "a d"]
    std: Float[Tensor, "a d"]
    size: Int[Tensor, " a"]
    scale: int | float = 1.0

    def mask(self, architecture: Int[Tensor, " b"]) -> Bool[Tensor, "b d"]:
        """Where networks of these architectures have a weight, on the device of `architecture`."""
        size = self.size.to(architecture.device)[architecture]
        return torch.arange(self.mean.shape[1], device=size.device) < size[:, None]

    def apply(self, weights: Float[Tensor, "b d"], architecture: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """From weights in their own unit to what models see."""
        mean, std = self._of(architecture, weights)
        return torch.where(self.mask(architecture), (weights - mean) / std * self.scale, 0.0)

    def invert(self, x: Float[Tensor, "b d"], architecture: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """From what models see to weights in their own unit."""
        mean, std = self._of(architecture, x)
        return torch.where(self.mask(architecture), x / self.scale * std + mean, 0.0)

    def _of(self, architecture: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like.device)[architecture], self.std.to(like.device)[architecture]


def fit(
    normalize: Normalize,
    zoo: Zoo,
    networks: Int[np.ndarray, " n"],
    used: Int[np.ndarray, " a"],
    max_len: int,
    scale: int | float,
) -> tuple[WeightScaling, dict[str, Tensor]]:
    """The scaling of a kind from the networks of the training split.

    Args:
        normalize: `global` (all weights to mean 0 and standard deviation 1), `layer` (those of each layer of each
            architecture), or `none`. What is constant in the training split becomes 0, and keeps its unit.
        networks: Positions of the training split in the zoo's table.
        used: Positions of the architectures that occur in any split, in the order in which samples number them.
        max_len: Weights of a padded sample.

    Returns:
        The scaling, and what was fitted: `mean` and `std`, of layers one value each as `mean.<architecture>`.

    Raises:
        DataError: `layer`, and no network of an architecture is in the training split.
    """
    size = torch.tensor([zoo.architectures[i].size for i in used])
    shape = (len(used), max_len)
    if normalize == "none":
        return WeightScaling(torch.zeros(1, 1).expand(shape), torch.ones(1, 1).expand(shape), size, scale), {}
    moments = measure(zoo, networks)
    if normalize == "global":
        mean, std = _mean_and_std(moments.merged())
        fitted = {"mean": mean[0], "std": std[0]}
        return WeightScaling(mean.expand(shape), std.expand(shape), size, scale), fitted
    mean, std = torch.zeros(shape), torch.ones(shape)
    ends = np.cumsum([len(architecture.layers) for architecture in zoo.architectures])
    fitted = {}
    for row, i in enumerate(used):
        architecture = zoo.architectures[i]
        layers = slice(ends[i] - len(architecture.layers), ends[i])
        of_layers = _mean_and_std(_trained(architecture, Moments(*(values[layers] for values in moments))))
        sizes = torch.tensor([layer.size for layer in architecture.layers])
        for name, values, into in zip(("mean", "std"), of_layers, (mean, std), strict=True):
            fitted[f"{name}.{architecture.name}"] = values
            into[row, : architecture.size] = values.repeat_interleave(sizes)
    return WeightScaling(mean, std, size, scale), fitted


def _trained(architecture: Architecture, moments: Moments) -> Moments:
    """The moments, if any network went into them."""
    if not moments.count.any():
        raise DataError(
            f"normalize='layer': no network of the architecture {architecture.name!r} is in the training split; "
            "lower val_fraction and test_fraction, change split_seed, or set normalize to global"
        )
    return moments


def _mean_and_std(moments: Moments) -> tuple[Float[Tensor, " l"], Float[Tensor, " l"]]:
    """In float32; a layer whose weights differ by no more than rounding has a standard deviation of 1."""
    std = np.sqrt(moments.square / np.maximum(moments.count, 1))
    rounding = np.finfo(np.float32)
    varies = std > np.maximum(rounding.eps * np.abs(moments.mean), rounding.tiny)
    mean, std = (torch.from_numpy(v.astype(np.float32)) for v in (moments.mean, np.where(varies, std, 1.0)))
    return mean, std
