from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.datasets.frames import DataError
from workbench.latent_map import LatentMap
from workbench.projections import Projection
from workbench.spaces import State

PATH = State(pin_a=0, pin_b=1)


class Named:
    """Samples that have names only."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    prepare = batch

    def name(self, index: int) -> str:
        return f"s{index}"


def mapped(z: list[list[float]] | torch.Tensor) -> LatentMap:
    z = torch.as_tensor(z)
    return LatentMap(z, Named(len(z)))


def test_latents_lie_where_their_projection_says() -> None:
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    found, plain = mapped(z), Projection(z)
    np.testing.assert_array_equal(found.points, plain.points.numpy())
    assert found.axes == plain.axes
    np.testing.assert_array_equal(found.place(z[3:5] + 1), plain.place(z[3:5] + 1).numpy())


def test_latents_of_one_dimension_lie_on_a_line() -> None:
    found = mapped([[2.0], [-1], [0.5], [5]])
    np.testing.assert_allclose(np.abs(found.points[:, 0] - found.points[1, 0]), [0.5, 0, 0.25, 1], atol=1e-6)
    assert (found.points[:, 1] == 0.5).all() and found.axes[1] == "no second axis: z is a single number"
    assert found.locate(torch.tensor([0.4]))[1] == 2
    route = found.route(State(pin_a=1, pin_b=3))
    np.testing.assert_allclose(route[[0, -1]], found.points[[1, 3]], atol=1e-6)
    with pytest.raises(ValueError, match="projection='umap': latents of a single number"):
        LatentMap(found.z, found.samples, "umap")


def test_of_equally_near_samples_the_first_is_the_nearest() -> None:
    found = mapped([[3.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 2]])
    assert found.nearest(torch.zeros(3)) == (1, 1.0)
    assert found.nearest(torch.tensor([0.0, -0.5, 0])) == (2, 0.5)


def test_only_finite_latents_are_located() -> None:
    found = mapped([[3.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 2]])
    here, index, distance = found.locate(torch.tensor([0.0, -2, 0]))
    np.testing.assert_array_equal(here, found.place(torch.tensor([[0.0, -2, 0]]))[0])
    assert (index, distance) == (2, 1.0) and found.locate(found.z[1])[1:] == (1, 0.0)
    np.testing.assert_array_equal(found.locate(found.z[1])[0], found.points[1])
    for broken in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="the latent is not finite: the model is broken; take a better checkpoint"):
            found.locate(torch.tensor([0.0, broken, 0]))


def test_paths_go_from_a_to_b() -> None:
    found = mapped([[2.0, 0], [0, 2], [1, 1]])
    ends = torch.tensor([0.0, 1.0])
    for method, middle in (("lerp", [1.0, 1.0]), ("slerp", [2**0.5, 2**0.5])):
        state = replace(PATH, method=method)
        torch.testing.assert_close(found.path(state, ends), found.z[:2])
        torch.testing.assert_close(found.path(state, torch.tensor([0.5]))[0], torch.tensor(middle))
        route = found.route(state)
        np.testing.assert_allclose(route[[0, -1]], found.points[:2], atol=1e-6)
        np.testing.assert_allclose(route[16], found.place(torch.tensor([middle]))[0], atol=1e-6)
    assert found.route(State(pin_a=1)).shape == (0, 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (State(pin_a=1), "no path yet: pin two samples of the map, as A and as B"),
        (State(pin_a=1, pin_b=1, method="slerp"), r"A equal to B \(s1\): slerp is not defined .*or use lerp"),
        (State(pin_a=1, pin_b=2, method="slerp"), "opposite directions have no single shortest arc; use lerp"),
        (State(pin_a=0, pin_b=3), "sample 3: must be from 0 to 2"),
    ],
)
def test_paths_that_are_not_defined_say_why(state: State, message: str) -> None:
    found = mapped([[2.0, 1], [0, 2], [0, -1]])
    with pytest.raises(ValueError, match=message):
        found.path(state, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("z", "n", "message"),
    [
        (torch.randn(2, 3), 2, "2 samples: a map needs at least 3 points; hold out or encode more samples"),
        (torch.randn(4, 3), 5, "4 latents of 5 samples: must be one of each; encode this very split"),
        (torch.tensor([[1.0, 2], [0, 1], [3, torch.inf]]), 3, "1 of 3 latents are not finite: the model is broken"),
    ],
)
def test_latents_that_make_no_map_are_refused(z: torch.Tensor, n: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LatentMap(z, Named(n))
