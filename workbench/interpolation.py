"""Walks through a latent space: straight and spherical paths, traversals, draws from the prior.

Everything works on flat latent vectors, so on every model.

Sources:
    Shoemake 1985, Animating rotation with quaternion curves (slerp).
    White 2016, Sampling generative networks (slerp between latents, whose lengths may differ).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

PARALLEL = 1e-4  # [rad], below it slerp and lerp agree to 1e-8 of the vectors' length
ANTIPODAL = 1e-3  # [rad] from pi, where the sine that slerp divides by has lost its digits


def lerp(a: Float[Tensor, " d"], b: Float[Tensor, " d"], t: Float[Tensor, " t"]) -> Float[Tensor, "t d"]:
    """Points (1 - t) a + t b on the straight line through a and b; exactly a at t = 0 and b at t = 1.

    Args:
        a: Latent at t = 0.
        b: Latent at t = 1.
        t: Positions along the path; outside [0, 1] the line is continued.

    Raises:
        ValueError: a and b have different shapes.
    """
    _check_ends(a, b)
    t = t[:, None]  # (t, 1)
    return (1 - t) * a + t * b


def slerp(a: Float[Tensor, " d"], b: Float[Tensor, " d"], t: Float[Tensor, " t"]) -> Float[Tensor, "t d"]:
    """Points (sin((1 - t) w) a + sin(t w) b) / sin(w), with w the angle between a and b.

    Between vectors of equal length a great arc at constant speed; between unequal ones the length changes
    smoothly. Nearly parallel vectors take the limit of small w, which is lerp.

    Args:
        a: Latent at t = 0.
        b: Latent at t = 1.
        t: Positions along the path.

    Raises:
        ValueError: a or b is zero, or they point in opposite directions, or their shapes differ.

    Source: Shoemake 1985, section 3.3.
    """
    _check_ends(a, b)
    angle = _angle(a, b)
    if angle < PARALLEL:
        return lerp(a, b, t)
    if math.pi - angle < ANTIPODAL:
        raise ValueError(
            f"a and b are {angle:.4f} rad apart: opposite directions have no single shortest arc; use lerp"
        )
    t = t[:, None]  # (t, 1)
    weight_a, weight_b = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return weight_a / torch.sin(angle) * a + weight_b / torch.sin(angle) * b


METHODS = {"lerp": lerp, "slerp": slerp}


def interpolate(a: Float[Tensor, " d"], b: Float[Tensor, " d"], steps: int, method: str) -> Float[Tensor, "t d"]:
    """Evenly spaced points of the path from a to b, both ends included.

    Args:
        a: First latent.
        b: Last latent.
        steps: Number of points, ends included, at least 2.
        method: "lerp" or "slerp".

    Raises:
        ValueError: An unknown method, or fewer than two steps.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if steps < 2:
        raise ValueError(f"steps={steps}: must be at least 2, the two ends")
    return METHODS[method](a, b, torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device))


def order_by_kl(kl: Float[Tensor, " d"]) -> Int[Tensor, " d"]:
    """Latent dimensions from the most to the least informative; equal ones keep their order.

    Args:
        kl: KL of each dimension in nats, see `metrics.kl_per_dimension`.
    """
    return kl.argsort(descending=True, stable=True)


def traversal(z: Float[Tensor, " d"], dimension: int, values: Float[Tensor, " t"]) -> Float[Tensor, "t d"]:
    """Copies of z with one coordinate replaced by each value in turn.

    Args:
        z: Latent to start from; left as it is.
        dimension: Coordinate to replace, counted from 0.
        values: Its new values.

    Raises:
        ValueError: z has no such dimension.
    """
    if not 0 <= dimension < len(z):
        raise ValueError(f"dimension={dimension}: must be from 0 to {len(z) - 1}, for z of {len(z)} dimensions")
    path = z.repeat(len(values), 1)  # (t, d)
    path[:, dimension] = values.to(z)
    return path


def traversals(
    z: Float[Tensor, " d"], dimensions: Int[Tensor, " n"] | Sequence[int], values: Float[Tensor, " t"]
) -> Float[Tensor, "n t d"]:
    """One traversal for each of several dimensions, see `traversal`.

    Args:
        z: Latent to start from.
        dimensions: Coordinates to replace, one per traversal, for example the first of `order_by_kl`.
        values: New values, the same for every coordinate.
    """
    return torch.stack([traversal(z, int(dimension), values) for dimension in dimensions])


def random_pairs(n: int, pairs: int, generator: torch.Generator) -> list[list[int]]:
    """Positions of pairs of different samples, none in two pairs; as many as asked for, or as n allows.

    Raises:
        ValueError: n is below 2.
    """
    if n < 2:
        raise ValueError(f"{n} sample: a path needs two; hold out more samples")
    return torch.randperm(n, generator=generator)[: 2 * min(pairs, n // 2)].reshape(-1, 2).tolist()


def prior_samples(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Draws from the standard normal prior, the same for a seed whatever else draws random numbers.

    Args:
        n: Number of samples, at least 1.
        d: Latent dimensions, at least 1.
        seed: Seed of a CPU generator of its own.

    Raises:
        ValueError: n or d is below 1.
    """
    if min(n, d) < 1:
        raise ValueError(f"n={n}, d={d}: both must be at least 1")
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _angle(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """Angle in rad, by Kahan's formula; arccos would lose half the digits at small angles."""
    length_a, length_b = a.norm(), b.norm()
    if length_a == 0 or length_b == 0:
        raise ValueError(f"a has length {length_a:.3g} and b {length_b:.3g}: a zero vector has no direction; use lerp")
    a, b = a / length_a, b / length_b
    return 2 * torch.atan2((a - b).norm(), (a + b).norm())


def _check_ends(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)}: must be equal")
