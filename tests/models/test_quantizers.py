import math

import pytest
import torch

from workbench.models.quantizers import (
    DISCARD_BELOW,
    FSQ,
    NSVQ,
    REPLACEMENT_NOISE,
    GaussianAction,
    LatentAction,
    fsq_levels,
    replacement_due,
)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nsvq(size: int = 5, dim: int = 3) -> NSVQ:
    torch.manual_seed(0)
    return NSVQ(size, dim)


# --- noise substitution ---


def test_without_noise_the_code_is_the_nearest_entry() -> None:
    quantizer, x = nsvq(), random(4, 2, 3)
    action = quantizer(x, None)
    nearest = (x[:, :, None] - quantizer.codebook).square().sum(-1).argmin(-1)
    assert torch.equal(action.indices, nearest) and torch.equal(action.codes, quantizer.codebook[nearest])
    assert torch.equal(quantizer.lookup(nearest), action.codes)
    assert quantizer.usage_batches == 0 and not quantizer.code_usage.any(), "only training counts"


def test_noise_is_as_long_as_the_error_and_points_where_it_is_told() -> None:
    quantizer, x, noise = nsvq(), random(4, 2, 3), random(4, 2, 3, seed=2)
    error = (x - quantizer(x, None).codes).norm(dim=-1)
    substitute = quantizer(x, noise).codes - x
    torch.testing.assert_close(substitute.norm(dim=-1), error)
    torch.testing.assert_close(torch.cosine_similarity(substitute, noise, dim=-1), torch.ones(4, 2))


def test_gradients_of_the_substitute_in_closed_form() -> None:
    """d(x + |x - e| u)/dx = 1 + u (x - e)^T / |x - e|, and the second part, negative, for the entry."""
    quantizer, x, noise = nsvq(size=1), random(1, 1, 3).requires_grad_(), random(1, 1, 3, seed=2)
    weight = torch.tensor([1.0, 2.0, -1.0])
    for_x, for_entry = torch.autograd.grad((quantizer(x, noise).codes * weight).sum(), [x, quantizer.codebook])
    with torch.no_grad():
        away, u = (
            torch.nn.functional.normalize(x - quantizer.codebook, dim=-1).flatten(),
            noise.flatten() / noise.norm(),
        )
        torch.testing.assert_close(for_entry.flatten(), -(weight @ u) * away)
        torch.testing.assert_close(for_x.flatten(), weight + (weight @ u) * away)


def test_an_input_that_is_an_entry_has_finite_gradients() -> None:
    quantizer = nsvq()
    x = quantizer.codebook.detach()[None, :2].clone().requires_grad_()
    quantizer(x, random(1, 2, 3)).codes.sum().backward()
    assert x.grad.isfinite().all() and quantizer.codebook.grad.isfinite().all()


def test_a_batch_counts_each_code_it_meets_once() -> None:
    quantizer = nsvq()
    for chosen in ([0, 0, 3], [3, 3, 3]):
        quantizer(quantizer.codebook.detach()[None, chosen], random(1, 3, 3))
    assert quantizer.code_usage.tolist() == [1, 0, 0, 2, 0] and quantizer.usage_batches == 2
    assert {"code_usage", "usage_batches"} <= quantizer.state_dict().keys(), "a resumed run goes on counting"


def test_unused_codes_become_copies_of_used_ones() -> None:
    quantizer, generator = nsvq(size=8), torch.Generator().manual_seed(0)
    quantizer.code_usage[:] = torch.tensor([20, 0, 0, 2, 0, 1, 0, 0])  # 2 of 20 batches is the threshold
    quantizer.usage_batches.fill_(20)
    before = quantizer.codebook.detach().clone()
    assert quantizer.replace_unused(generator) == 6 and DISCARD_BELOW == 0.1
    after = quantizer.codebook.detach()
    assert torch.equal(after[[0, 3]], before[[0, 3]])
    replaced = after[[1, 2, 4, 5, 6, 7]]
    distance = torch.cdist(replaced, before[[0, 3]])
    assert distance.argmin(1).bincount().tolist() == [3, 3], "used codes take turns"
    size = REPLACEMENT_NOISE * before[[0, 3]].square().mean().sqrt()
    assert (distance.min(1).values > 0.1 * size).all() and (distance.min(1).values < 6 * size).all()
    assert not quantizer.code_usage.any() and quantizer.usage_batches == 0, "counting begins again"
    assert quantizer.codebook.requires_grad and quantizer.codebook.grad_fn is None


@pytest.mark.parametrize(
    ("usage", "batches"), [([1, 10, 5], 10), ([0, 0, 0], 0), ([1, 1, 1], 20)], ids=["all used", "no batch", "none used"]
)
def test_nothing_is_replaced(usage: list[int], batches: int) -> None:
    quantizer = nsvq(size=3)
    quantizer.code_usage[:] = torch.tensor(usage)
    quantizer.usage_batches.fill_(batches)
    before = quantizer.codebook.detach().clone()
    assert quantizer.replace_unused(torch.Generator()) == 0
    assert torch.equal(quantizer.codebook, before)


def test_replacement_is_a_function_of_the_generator() -> None:
    results = []
    for seed in (1, 1, 2):
        quantizer = nsvq()
        quantizer.code_usage[2], quantizer.usage_batches[()] = 1, 1
        quantizer.replace_unused(torch.Generator().manual_seed(seed))
        results.append(quantizer.codebook.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_schedule_of_replacement() -> None:
    due = [step for step in range(20_000) if replacement_due(step)]
    assert due == [*range(10, 100, 10), *range(100, 1000, 100), *range(1000, 5000, 500)]


# --- finite scalars ---


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (2, [2]),
        (3, [3]),
        (8, [2, 2, 2]),
        (11, [11]),
        (64, [4, 4, 4]),
        (240, [8, 6, 5]),  # from here on as in table 1 of the paper
        (1000, [8, 5, 5, 5]),
        (4375, [7, 5, 5, 5, 5]),
        (15360, [8, 8, 8, 6, 5]),
        (64000, [8, 8, 8, 5, 5, 5]),
    ],
)
def test_levels(size: int, levels: list[int]) -> None:
    assert fsq_levels(size) == levels


def test_the_product_of_the_levels_is_the_size() -> None:
    assert [size for size in range(2, 1100) if math.prod(fsq_levels(size)) != size] == []


@pytest.mark.parametrize("size", [2, 8, 15, 60])
def test_indices_and_codes_of_finite_scalars(size: int) -> None:
    torch.manual_seed(0)
    quantizer = FSQ(size, code_dim=6)
    codes = quantizer.lookup(torch.arange(size)[None])[0]
    assert len(codes.unique(dim=0)) == size
    action = quantizer(20 * random(200, 4, 6), None)
    assert torch.equal(quantizer.lookup(action.indices), action.codes)
    assert 0 <= action.indices.min() and action.indices.max() < size
    scalars = quantizer.rounding.indices_to_codes(torch.arange(size)[None])
    assert torch.equal(quantizer.rounding.codes_to_indices(scalars)[0], torch.arange(size))
    torch.testing.assert_close(scalars.mean(1), torch.zeros(1, len(quantizer.levels)))  # symmetric about zero


def test_half_of_small_inputs_fall_on_each_of_two_levels() -> None:
    """With levels that are not symmetric, two of them would put nearly all on one."""
    torch.manual_seed(0)
    quantizer = FSQ(2, code_dim=1)
    torch.nn.init.zeros_(quantizer.to_scalars.bias)
    share = quantizer(0.1 * random(1, 1000, 1), None).indices.float().mean()
    assert 0.4 < share < 0.6


def test_finite_scalars_pass_gradients_straight_through() -> None:
    torch.manual_seed(0)
    quantizer, x = FSQ(8, code_dim=6), (0.1 * random(2, 3, 6)).requires_grad_()
    quantizer(x, None).codes.sum().backward()
    assert (x.grad.abs() > 0).all() and all(p.grad.abs().sum() > 0 for p in quantizer.parameters())


# --- a continuous action ---


def test_a_gaussian_action_is_its_mean_or_a_draw() -> None:
    torch.manual_seed(0)
    quantizer, x, noise = GaussianAction(3), random(4, 2, 3), random(4, 2, 3, seed=2)
    still, drawn = quantizer(x, None), quantizer(x, noise)
    assert still.indices is None and torch.equal(still.codes, still.mu)
    torch.testing.assert_close(drawn.codes, still.mu + (0.5 * still.logvar).exp() * noise)


def test_kl_of_an_action_in_closed_form() -> None:
    """KL(N(1, 4) || N(0, 1)) = (1 + 4 - 1 - ln 4) / 2 for each of 2 x 3 numbers."""
    mu, logvar = torch.ones(5, 2, 3), torch.full((5, 2, 3), math.log(4))
    action = LatentAction(mu, mu, None, mu, logvar)
    torch.testing.assert_close(action.kl(), torch.full((5,), 6 * (4 - math.log(4)) / 2))


def test_a_discrete_action_has_no_kl() -> None:
    with pytest.raises(ValueError, match="a discrete latent action has no KL; its rate is at most"):
        nsvq()(random(1, 1, 3), None).kl()


def test_how_much_noise_a_code_takes() -> None:
    assert (NSVQ(4, 3).noise_per_code, FSQ(4, 3).noise_per_code, GaussianAction(3).noise_per_code) == (3, 0, 3)
