"""Codes of latent actions: noise-substituted vectors, finite scalars, or a continuous Gaussian.

Papers: noise substitution (NSVQ), Vali & Bäckström 2022 (IEEE Access 10); finite scalars (FSQ), Mentzer et al. 2024
(arXiv 2309.15505), from vector-quantize-pytorch (P. Wang).
Deviations from the NSVQ of the LAPA repository: no noise at evaluation; replacement of unused codes is a method of its
own, whose threshold is a share of the training batches since the last replacement, not of the batch size, and whose
noise is a share of the codes' size, where theirs (1e-12) vanishes in float32.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.layers import shard
from workbench.losses import gaussian_kl

DISCARD_BELOW = 0.1
"""A code that was chosen in a smaller share of the batches is unused."""
REPLACEMENT_NOISE = 0.3
"""Standard deviation of the noise on a replaced code, in units of the RMS of the codes it is copied from."""


@dataclass(frozen=True)
class LatentAction:
    """What changes between two frames, as n codes.

    Args:
        difference: What is quantized: the later frame's features less the first's.
        codes: What the decoder reads.
        indices: Entries of the codebook; None for a continuous action.
        mu: Posterior mean; None for a discrete action.
        logvar: Natural logarithm of the posterior variance; None for a discrete action.
    """

    difference: Float[Tensor, "b n d"]
    codes: Float[Tensor, "b n d"]
    indices: Int[Tensor, "b n"] | None = None
    mu: Float[Tensor, "b n d"] | None = None
    logvar: Float[Tensor, "b n d"] | None = None

    def kl(self) -> Float[Tensor, " b"]:
        """KL of each sample's action to N(0, I), summed over its codes, in nats.

        Raises:
            ValueError: the action is discrete.
        """
        if self.mu is None or self.logvar is None:
            raise ValueError(
                "a discrete latent action has no KL; its rate is at most code_seq_len * log2(codebook_size)"
            )
        return gaussian_kl(self.mu.flatten(1), self.logvar.flatten(1))


def replacement_due(step: int) -> bool:
    """Whether unused codes are replaced after this training step: rarer with time, never from 5,000 on.

    Args:
        step: Optimizer steps so far; every 10 below 100, every 100 below 1,000, every 500 below 5,000, not at 0.
    """
    period = 10 if step < 100 else 100 if step < 1000 else 500
    return 0 < step < 5000 and step % period == 0


class NSVQ(nn.Module):
    """A learned codebook; in training the code is the input plus noise as long as its distance to the nearest entry.

    Args:
        codebook_size: Entries.
        code_dim: Length of an entry.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.register_buffer("code_usage", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("usage_batches", torch.zeros((), dtype=torch.int64))
        self.noise_per_code = code_dim

    def forward(self, difference: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"] | None) -> LatentAction:
        """The nearest codes; with noise, its substitute for them, and each code met is counted once."""
        difference = difference.float()
        indices = self._nearest(difference)  #                               (b, n)
        codes = self.codebook[indices]  #                                    (b, n, d)
        if noise is not None:
            error = torch.linalg.vector_norm(difference - codes, dim=-1, keepdim=True)
            codes = difference + error * torch.nn.functional.normalize(noise, dim=-1)
            met = torch.zeros_like(self.code_usage).index_fill_(0, indices.flatten(), 1)
            self.code_usage += shard().total(met).clamp(max=1)
            self.usage_batches += 1
        return LatentAction(difference, codes, indices)

    @torch.no_grad()
    def _nearest(self, difference: Float[Tensor, "b n d"]) -> Int[Tensor, "b n"]:
        distances = torch.cdist(difference, self.codebook[None], compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(-1)

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Entries of the codebook."""
        return self.codebook[indices]

    @torch.no_grad()
    def replace_unused(self, generator: torch.Generator) -> int:
        """Put copies of used codes, with a little noise, in the place of unused ones; counting begins again.

        Nothing is replaced where no training batch was counted, or where every code or none was used enough.

        Args:
            generator: Source of the choice and the noise, on the CPU.

        Returns:
            How many codes were replaced.
        """
        share = self.code_usage / self.usage_batches.clamp(min=1)
        used, unused = (share >= DISCARD_BELOW).nonzero().flatten(), (share < DISCARD_BELOW).nonzero().flatten()
        self.code_usage.zero_()
        self.usage_batches.zero_()
        if not len(used) or not len(unused):
            return 0
        order = torch.randperm(len(used), generator=generator).repeat(math.ceil(len(unused) / len(used)))
        copied = self.codebook[used[order[: len(unused)].to(used.device)]]
        noise = torch.randn(copied.shape, generator=generator).to(copied)
        self.codebook[unused] = copied + REPLACEMENT_NOISE * copied.square().mean().sqrt() * noise
        return len(unused)


def fsq_levels(codebook_size: int) -> list[int]:
    """Numbers of levels whose product is the codebook's size: about three bits, and at least three scalars if it can.

    Examples: 8 gives [2, 2, 2], 64 [4, 4, 4], 240 [8, 6, 5], 1000 [8, 5, 5, 5]: above 200 these are the levels that
    Mentzer et al. recommend, at the sizes where they do.
    """
    primes, rest, divisor = [], codebook_size, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor = divisor + 1 if divisor * divisor <= rest else max(rest, 2)
    scalars = max(3, math.ceil(math.log2(codebook_size) / 3))
    levels = [1] * min(scalars, len(primes))
    for prime in reversed(primes):
        levels[levels.index(min(levels))] *= prime
    return sorted(levels, reverse=True)


class FSQ(nn.Module):
    """A few scalars, each bounded and rounded to its levels; nothing to learn but the projections.

    The levels lie symmetrically about zero, as two levels cannot be told apart otherwise.

    Args:
        codebook_size: Product of the levels; see `fsq_levels`.
        code_dim: Length of a code.
    """

    noise_per_code = 0

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        from vector_quantize_pytorch import FSQ as Rounding  # takes longer to import than all of this package

        super().__init__()
        self.levels = fsq_levels(codebook_size)
        self.to_scalars = nn.Linear(code_dim, len(self.levels))
        self.from_scalars = nn.Linear(len(self.levels), code_dim)
        self.rounding = Rounding(self.levels, preserve_symmetry=True, return_indices=False)

    def forward(self, difference: Float[Tensor, "b n d"], noise: None = None) -> LatentAction:
        """Rounded codes, with straight-through gradients."""
        scalars = self.rounding.quantize(self.to_scalars(difference).float())  # (b, n, levels)
        indices = self.rounding.codes_to_indices(scalars.detach()).long()  #    (b, n)
        return LatentAction(difference, self.from_scalars(scalars), indices)

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of indices, the first scalar running fastest."""
        return self.from_scalars(self.rounding.indices_to_codes(indices))


class GaussianAction(nn.Module):
    """A continuous action with a diagonal Gaussian posterior.

    Args:
        code_dim: Length of a code.
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__()
        self.to_mu = nn.Linear(code_dim, code_dim)
        self.to_logvar = nn.Linear(code_dim, code_dim)
        self.noise_per_code = code_dim

    def forward(self, difference: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"] | None) -> LatentAction:
        """The posterior; the code is its mean, or with noise a draw from it."""
        mu, logvar = self.to_mu(difference), self.to_logvar(difference)
        codes = mu if noise is None else mu + torch.exp(0.5 * logvar) * noise
        return LatentAction(difference, codes, None, mu, logvar)
