"""Spectral normalisation: a layer's weight divided by its largest singular value.

Paper: Miyato et al. 2018, "Spectral normalization for generative adversarial networks" (arXiv 1802.05957).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import register_parametrization

FIRST_ITERATIONS = 15


class Quotient(torch.autograd.Function):
    """W / sigma, where sigma = u W v with u and v as constants. Its gradient reads W twice; that of plain autograd
    makes several passes over W more, which counts in wide layers.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        sigma = torch.dot(u, torch.mv(weight, v))
        ctx.save_for_backward(weight, u, v, sigma)
        return weight / sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, u, v, sigma = ctx.saved_tensors
        along = torch.dot(grad.flatten(), weight.flatten()) / sigma.square()
        return (grad / sigma).addr_(u, -along * v), None, None


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value, which one step of the power iteration follows in training.

    Paper: Miyato et al. 2018 (arXiv 1802.05957). Buffers, random draws and values are those of
    `torch.nn.utils.parametrizations.spectral_norm`; it is faster, and float32 under autocast on every device.

    Args:
        weight: Its output channels are along `dim`.
    """

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        matrix = weight.detach().movedim(dim, 0).flatten(1)
        u, v = (F.normalize(torch.randn_like(matrix.select(axis, 0)), dim=0) for axis in (1, 0))
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        self._iterate(matrix, FIRST_ITERATIONS)

    @torch.no_grad()
    def _iterate(self, matrix: Float[Tensor, "o i"], times: int) -> None:
        for _ in range(times):
            self._u.copy_(F.normalize(torch.mv(matrix, self._v), dim=0))
            self._v.copy_(F.normalize(torch.mv(matrix.T, self._u), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        moved = weight.movedim(self.dim, 0)
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self._iterate(moved.flatten(1), 1)
            normed = Quotient.apply(moved.flatten(1), self._u.clone(), self._v.clone())
        return normed.unflatten(1, moved.shape[1:]).movedim(0, self.dim)


def spectral_norm(module: nn.Module) -> None:
    """Register a SpectralNorm of the weight of a linear or convolution layer."""
    dim = 1 if isinstance(module, nn.ConvTranspose1d) else 0
    register_parametrization(module, "weight", SpectralNorm(module.weight, dim))
