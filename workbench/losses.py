"""Loss terms as pure functions, in stated units."""

import torch
from jaxtyping import Float
from torch import Tensor

SMOOTH_L1_BETA = 0.1
HUBER_DELTA = 1.0


def gaussian_kl(mu: Float[Tensor, "b d"], logvar: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """KL(N(mu, diag exp(logvar)) || N(0, I)), summed over latent dimensions.

    Args:
        mu: Posterior mean, dimensionless.
        logvar: Natural logarithm of the posterior variance.

    Returns:
        KL of each sample in nats; the caller takes the batch mean.

    Raises:
        ValueError: mu and logvar have different shapes.

    Source: Kingma & Welling 2014, appendix B.
    """
    if mu.shape != logvar.shape:
        raise ValueError(f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)}: must have the same shape")
    mu, logvar = mu.float(), logvar.float()
    return 0.5 * (mu.square() + (logvar.expm1() - logvar)).sum(1)


def residual_kl(
    shift: Float[Tensor, "b ..."], log_scale: Float[Tensor, "b ..."], prior_logvar: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """KL(N(mu + shift, exp(prior_logvar + log_scale)) || N(mu, exp(prior_logvar))), summed over dimensions.

    Args:
        shift: Mean of the posterior less that of the prior.
        log_scale: Natural logarithm of the posterior's variance over the prior's.
        prior_logvar: Natural logarithm of the prior's variance.

    Returns:
        KL of each sample in nats.

    Source: Vahdat & Kautz 2020, equation 2.
    """
    shift, log_scale, prior_logvar = shift.float(), log_scale.float(), prior_logvar.float()
    per_dimension = shift.square() * torch.exp(-prior_logvar) + log_scale.expm1() - log_scale
    return 0.5 * per_dimension.flatten(1).sum(1)


def linear_ramp(progress: float, start: float, end: float, rise_from: float, rise_to: float) -> float:
    """A weight that is `start` up to a share of training, `end` from a later one on, and a straight line between.

    Args:
        progress: Share of the training's steps already taken, 0 to 1.
        start: Weight until `rise_from`.
        end: Weight from `rise_to` on.
        rise_from: Share of training at which the rise begins.
        rise_to: Share of training at which it ends, not before `rise_from`.
    """
    if progress >= rise_to:
        return end
    if progress <= rise_from:
        return start
    return start + (end - start) * (progress - rise_from) / (rise_to - rise_from)


def mean_squared_error(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Mean over the batch and all elements, in the squared unit of x; computed in float32."""
    return torch.nn.functional.mse_loss(x_hat.float(), x.float())


def mean_absolute_error(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Mean over the batch and all elements, in the unit of x; computed in float32."""
    return torch.nn.functional.l1_loss(x_hat.float(), x.float())


def smooth_l1(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """|d| - beta/2 beyond beta = 0.1, d^2 / (2 beta) below, mean over all elements; in the unit of x."""
    return torch.nn.functional.smooth_l1_loss(x_hat.float(), x.float(), beta=SMOOTH_L1_BETA)


def huber(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """d^2 / 2 up to |d| = delta = 1, delta (|d| - delta/2) beyond, mean over all elements; in the squared unit of x."""
    return torch.nn.functional.huber_loss(x_hat.float(), x.float(), delta=HUBER_DELTA)


ERRORS = {"mse": mean_squared_error, "mae": mean_absolute_error, "smooth_l1": smooth_l1, "huber": huber}
"""Errors between a sample and its reconstruction, by name."""
