import math

import pytest
import torch

from workbench.interpolation import (
    interpolate,
    lerp,
    order_by_kl,
    prior_samples,
    random_pairs,
    slerp,
    traversal,
    traversals,
)

A, B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.6, 0.8, 0.0])  # of unit length
METHODS = ("lerp", "slerp")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_end_points_are_exact(method: str, seed: int) -> None:
    a, b = prior_samples(2, 33, seed)
    path = interpolate(a, b, 7, method)
    assert path.shape == (7, 33)
    assert torch.equal(path[0], a) and torch.equal(path[-1], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_paths_keep_the_dtype(method: str, dtype: torch.dtype) -> None:
    assert interpolate(A.to(dtype), B.to(dtype), 3, method).dtype == dtype


def test_lerp_is_the_straight_line() -> None:
    path = lerp(A, B, torch.tensor([0.25, 0.5, 2.0]))
    torch.testing.assert_close(path, torch.tensor([[0.9, 0.2, 0.0], [0.8, 0.4, 0.0], [0.2, 1.6, 0.0]]))


@pytest.mark.parametrize("angle", [0.01, 0.3, math.acos(0.6), 3.0])
def test_slerp_of_unit_vectors_keeps_norm_and_angular_speed(angle: float) -> None:
    a, b = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    path = interpolate(a, b, 11, "slerp")
    torch.testing.assert_close(path.norm(dim=1), torch.ones(11, dtype=torch.float64))
    angles = torch.linspace(0, angle, 11, dtype=torch.float64)
    torch.testing.assert_close(torch.atan2(path[:, 1], path[:, 0]), angles)


def test_slerp_of_orthogonal_vectors_has_a_closed_form() -> None:
    t = torch.linspace(0, 1, 5)
    path = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), t)
    expected = torch.stack([2 * (t * math.pi / 2).cos(), 3 * (t * math.pi / 2).sin()], dim=1)
    torch.testing.assert_close(path, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-5, 9e-5, 1.1e-4, 1e-3])
def test_slerp_of_nearly_parallel_vectors_tends_to_lerp(angle: float) -> None:
    a, b = torch.tensor([1.0, 0.0]), 2 * torch.tensor([math.cos(angle), math.sin(angle)])
    t = torch.linspace(0, 1, 9)
    torch.testing.assert_close(slerp(a, b, t), lerp(a, b, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, -2 * A, "3.1416 rad apart: opposite directions have no single shortest arc; use lerp"),
        (A, torch.zeros(3), "b 0: a zero vector has no direction; use lerp"),
        (torch.zeros(3), A, "a has length 0 and b 1: a zero vector has no direction; use lerp"),
    ],
)
def test_slerp_refuses_what_has_no_arc(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slerp(a, b, torch.tensor([0.5]))
    assert lerp(a, b, torch.tensor([0.5])).isfinite().all()


def test_interpolate_refuses_unknown_methods_and_single_steps() -> None:
    with pytest.raises(ValueError, match="method='cubic': must be one of lerp, slerp"):
        interpolate(A, B, 3, "cubic")
    with pytest.raises(ValueError, match="steps=1: must be at least 2"):
        interpolate(A, B, 1, "lerp")


@pytest.mark.parametrize("method", METHODS)
def test_ends_of_different_shapes_are_refused(method: str) -> None:
    with pytest.raises((ValueError, TypeError)):  # TypeError from the shape checks that run in tests
        interpolate(A, torch.ones(1), 3, method)


def test_order_by_kl_is_descending_and_stable() -> None:
    kl = torch.tensor([0.5, 2.0, 0.5, 3.0, 0.5, 2.0])
    assert order_by_kl(kl).tolist() == [3, 1, 5, 0, 2, 4]
    assert order_by_kl(torch.zeros(100)).tolist() == list(range(100))


def test_traversal_replaces_one_coordinate_of_a_copy() -> None:
    z = torch.tensor([1.0, 2.0, 3.0])
    path = traversal(z, 1, torch.tensor([-1.0, 0.0]))
    assert torch.equal(path, torch.tensor([[1.0, -1.0, 3.0], [1.0, 0.0, 3.0]]))
    assert torch.equal(z, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("dimension", [-1, 3])
def test_traversal_refuses_dimensions_that_are_not_there(dimension: int) -> None:
    with pytest.raises(ValueError, match=f"dimension={dimension}: must be from 0 to 2, for z of 3 dimensions"):
        traversal(A, dimension, torch.zeros(2))


@pytest.mark.parametrize("dimensions", [[2, 0], torch.tensor([2, 0])])
def test_traversals_are_one_traversal_each(dimensions: list[int] | torch.Tensor) -> None:
    values = torch.linspace(-2, 2, 5)
    stacked = traversals(B, dimensions, values)
    assert stacked.shape == (2, 5, 3)
    assert torch.equal(stacked[0], traversal(B, 2, values)) and torch.equal(stacked[1], traversal(B, 0, values))


def test_prior_samples_are_standard_normal_and_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    z, state = prior_samples(20_000, 2, seed=3), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(prior_samples(20_000, 2, seed=3), z)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was not used
    assert not torch.equal(prior_samples(20_000, 2, seed=4), z)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(2), atol=0.03, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(0, 2), (2, 0)])
def test_prior_samples_refuses_empty_draws(n: int, d: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, d={d}: both must be at least 1"):
        prior_samples(n, d, seed=0)


def test_random_pairs_are_disjoint_and_as_many_as_there_are() -> None:
    pairs = random_pairs(7, 10, torch.Generator().manual_seed(0))
    assert len(pairs) == 3 and len({i for pair in pairs for i in pair}) == 6
    assert random_pairs(7, 2, torch.Generator().manual_seed(0)) == pairs[:2]
    with pytest.raises(ValueError, match="1 sample: a path needs two; hold out more samples"):
        random_pairs(1, 3, torch.Generator())
