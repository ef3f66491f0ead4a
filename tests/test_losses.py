import inspect
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from workbench.losses import gaussian_kl, linear_ramp, mean_squared_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gaussian_kl_equals_torch_distributions() -> None:
    mu, logvar = 2 * random(5, 7), random(5, 7, seed=1)
    posterior = Normal(mu.double(), (0.5 * logvar).exp().double())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mu, logvar), expected.float(), rtol=1e-5, atol=1e-5)


def test_gaussian_kl_closed_forms() -> None:
    zero = torch.zeros(1, 3)
    assert gaussian_kl(zero, zero).item() == 0
    assert gaussian_kl(zero + 2, zero).item() == pytest.approx(3 * 2.0)  # mu^2 / 2 each
    assert gaussian_kl(zero, zero + math.log(4)).item() == pytest.approx(3 * 0.5 * (4 - 1 - math.log(4)))


def test_gaussian_kl_of_half_precision_is_computed_in_float32() -> None:
    mu = torch.full((1, 2000), 5.0, dtype=torch.bfloat16)
    assert gaussian_kl(mu, torch.zeros_like(mu)).item() == 2000 * 12.5


def test_gaussian_kl_refuses_shapes_that_differ() -> None:
    unchecked = inspect.unwrap(gaussian_kl)  # without the shape checks that run in tests
    with pytest.raises(ValueError, match=r"mu \(2, 3\) and logvar \(2, 4\): must have the same shape"):
        unchecked(torch.zeros(2, 3), torch.zeros(2, 4))


def test_linear_ramp() -> None:
    assert [linear_ramp(p / 10, 1.0, 3.0, 0.2, 0.6) for p in (0, 2, 4, 6, 10)] == pytest.approx([1, 1, 2, 3, 3])
    assert linear_ramp(0.0, 1.0, 3.0, 0.0, 0.0) == 3.0
    assert [linear_ramp(p, 1.0, 3.0, 0.5, 0.5) for p in (0.4, 0.5)] == [1.0, 3.0]


def test_mean_squared_error_is_per_element_in_float32() -> None:
    x = torch.zeros(2, 3, 4, 4)
    error = mean_squared_error((x + 0.5).to(torch.bfloat16), x)
    assert error.item() == 0.25 and error.dtype == torch.float32
    x_hat = x.clone()
    x_hat[0, 0, 0, 0] = 96.0
    assert mean_squared_error(x_hat, x).item() == 96.0
