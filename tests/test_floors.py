import numpy as np
import pytest
import torch

from workbench.floors import GAMMAS, KERNEL_ALPHAS, RIDGE_ALPHAS, condition_floors

NOISE = 0.01


class Rows:
    """Samples (2, 3) that are a function of three conditions of very different scales."""

    def __init__(self, n: int, seed: int, f: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        c = torch.rand(n, 3, generator=generator) * 2 - 1
        weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
        x = {"linear": c @ weight + 1, "waves": torch.sin(3 * c) @ weight, "square": c.square() @ weight}[f]
        self.x = (x + NOISE * torch.randn(x.shape, generator=generator)).reshape(n, 2, 3)
        self.condition = c * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([5.0, 0.0, -1e4])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": self.x[indices], "condition": self.condition[indices]}

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def name(self, index: int) -> str:
        return str(index)


def errors(f: str, components: int = 6) -> dict[str, float]:
    """Root mean squared error of each floor on samples that it has not seen, by its name up to the bracket."""
    train, val, test = (Rows(n, seed, f) for seed, n in enumerate((80, 30, 200)))
    floors = condition_floors(train, val, components)
    batch = {"x": test.x, "condition": test.condition}
    return {
        name.split(" (")[0]: float((floor(batch) - test.x).square().mean().sqrt()) for name, floor in floors.items()
    }


def test_ridge_recovers_a_linear_map() -> None:
    found = errors("linear")
    assert list(found) == ["mean", "ridge", "kernel ridge"]
    assert found["ridge"] < 1.2 * NOISE < 10 * NOISE < found["mean"]


@pytest.mark.parametrize("f", ["waves", "square"])
def test_kernel_ridge_beats_ridge_where_the_map_is_not_linear(f: str) -> None:
    found = errors(f)
    assert found["kernel ridge"] < 0.3 * found["ridge"]


def test_the_mean_is_that_of_the_training_samples() -> None:
    train = Rows(20, 0, "linear")
    batch = {"x": torch.zeros(4, 2, 3), "condition": torch.zeros(4, 3)}
    x_hat = condition_floors(train, Rows(10, 1, "linear"), 3)["mean"](batch)
    torch.testing.assert_close(x_hat, train.x.mean(0).expand(4, 2, 3))
    assert x_hat.dtype == torch.float32


def test_only_the_choice_looks_at_the_validation_samples() -> None:
    """Of two validation splits that choose the same settings the predictions are the same."""
    train, batch = Rows(40, 0, "linear"), {"x": torch.zeros(4, 2, 3), "condition": Rows(4, 7, "linear").condition}
    one, other = (condition_floors(train, Rows(n, n, "linear"), 4) for n in (30, 31))
    same = one.keys() & other.keys()
    assert len(same) >= 2
    assert all(torch.equal(one[name](batch), other[name](batch)) for name in same)


def test_the_names_hold_the_setting_that_did_best() -> None:
    train, val = Rows(40, 0, "linear"), Rows(30, 1, "linear")
    mean, ridge, kernel = condition_floors(train, val, 6)
    assert mean == "mean"
    alpha = float(ridge.removeprefix("ridge (alpha ").removesuffix(")"))
    assert np.isclose(RIDGE_ALPHAS, alpha).any() and alpha < 1
    alpha, gamma = (float(part.split()[-1]) for part in kernel.removesuffix(")").split(","))
    assert np.isclose(KERNEL_ALPHAS, alpha).any() and np.isclose(GAMMAS / 3, gamma, rtol=0.02).any()
    noise = Rows(30, 1, "linear")
    noise.x = torch.zeros_like(noise.x) + train.x.mean(0)  # what is best predicted by the mean
    _, ridge, _ = condition_floors(train, noise, 6)
    assert ridge == "ridge (alpha 100)"


def test_components_are_at_most_what_the_samples_allow() -> None:
    floors = condition_floors(Rows(4, 0, "linear"), Rows(5, 1, "linear"), 64)
    batch = {"x": torch.zeros(2, 2, 3), "condition": torch.zeros(2, 3)}
    assert all(floor(batch).shape == (2, 2, 3) for floor in floors.values())


def test_pictures_are_flattened() -> None:
    train, val = Rows(20, 0, "linear"), Rows(10, 1, "linear")
    for rows in (train, val):
        rows.condition = rows.condition.reshape(-1, 1, 3, 1)
    assert len(condition_floors(train, val, 3)) == 3


def test_what_never_changes_is_predicted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    train, val = Rows(20, 0, "linear"), Rows(5, 1, "linear")
    train.x, val.x = (torch.full_like(rows.x, 3.0) for rows in (train, val))
    for floor in condition_floors(train, val, 4).values():
        torch.testing.assert_close(floor(val.batch(np.arange(5))), val.x, atol=1e-5, rtol=0)
    assert not recwarn.list
