"""Loss terms as pure functions, in stated units."""

import torch
from jaxtyping import Float
from torch import Tensor


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
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def linear_warmup(step: int, steps: int) -> float:
    """Weight factor that rises from 0 at step 0 to 1 at `steps`, and is 1 when `steps` is 0.

    Args:
        step: Optimizer step, from 0.
        steps: Length of the warm-up [steps].
    """
    return min(1.0, step / steps) if steps else 1.0


def mean_squared_error(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Mean over the batch and all elements, in the squared unit of x; computed in float32."""
    return torch.nn.functional.mse_loss(x_hat.float(), x.float())
