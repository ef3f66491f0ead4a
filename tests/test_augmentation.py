from typing import Any

import numpy as np
import pytest
import torch

from workbench.augmentation import AugmentConfig, augment, cutout_mask, mixup, scale_factors, shift
from workbench.config import ConfigError

EVERY = {
    "augment_noise": 0.1,
    "augment_scale": 0.2,
    "augment_mixup": 0.4,
    "augment_shift": 2,
    "augment_cutout": 0.5,
}

Batch = dict[str, torch.Tensor]


def batch(n: int = 6, nodes: int = 5, steps: int = 8) -> Batch:
    x = torch.randn(n, nodes, steps, generator=torch.Generator().manual_seed(1))
    return {"x": x, "id": torch.arange(n), "noise": torch.ones(n, 3)}


def augmented(given: Batch, seed: int = 0, **settings: Any) -> Batch:
    torch.manual_seed(seed)
    return augment(given, AugmentConfig(**settings))


# --- settings ---


def test_off_by_default_the_batch_is_the_same_and_nothing_is_drawn() -> None:
    given, before = batch(), torch.get_rng_state()
    assert AugmentConfig().off
    assert augment(given, AugmentConfig()) is given and list(given) == ["x", "id", "noise"]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", EVERY)
def test_any_amount_is_not_off(name: str) -> None:
    assert not AugmentConfig(**{name: EVERY[name]}).off
    given = batch()
    changed = augmented(given, **{name: EVERY[name]})
    key = "input" if name in ("augment_noise", "augment_cutout") else "x"
    assert not torch.equal(changed[key], given["x"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment_noise": -0.1}, "augment_noise=-0.1: must be at least 0"),
        ({"augment_noise": float("inf")}, "augment_noise=inf: must be finite"),
        ({"augment_scale": 1.0}, "augment_scale=1.0: must be less than 1"),
        ({"augment_mixup": -1.0}, "augment_mixup=-1.0: must be at least 0"),
        ({"augment_shift": -1}, "augment_shift=-1: must be at least 0"),
        ({"augment_shift": 1.5}, "augment_shift=1.5: must be a whole number"),
        ({"augment_cutout": 1.1}, "augment_cutout=1.1: must be at most 1"),
    ],
)
def test_amounts_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(**settings)
    assert str(caught.value) == message


# --- what holds for all of them ---


def test_the_batch_given_is_left_as_it_is_and_the_rest_is_passed_on() -> None:
    given = batch()
    copies = {key: value.clone() for key, value in given.items()}
    changed = augmented(given, **EVERY)
    assert list(given) == list(copies) and all(torch.equal(given[key], value) for key, value in copies.items())
    assert list(changed) == ["x", "id", "noise", "input"]
    assert changed["id"] is given["id"] and changed["noise"] is given["noise"]
    assert changed["x"].shape == changed["input"].shape == given["x"].shape
    assert changed["x"].dtype == changed["input"].dtype == torch.float32


def test_the_seed_decides() -> None:
    a, b, other = (augmented(batch(), seed, **EVERY) for seed in (0, 0, 1))
    assert torch.equal(a["x"], b["x"]) and torch.equal(a["input"], b["input"])
    assert not torch.equal(a["x"], other["x"]) and not torch.equal(a["input"], other["input"])


def test_double_precision_is_kept() -> None:
    given = batch()
    changed = augmented(given | {"x": given["x"].double()}, **EVERY)
    assert changed["x"].dtype == changed["input"].dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_as_the_cpu_does() -> None:
    given = batch()
    there = augmented({key: value.cuda() for key, value in given.items()}, **EVERY)
    for key, value in augmented(given, **EVERY).items():
        torch.testing.assert_close(there[key].cpu(), value)


@pytest.mark.parametrize(
    ("settings", "key"), [({"augment_noise": 0.1}, "input"), ({"augment_cutout": 0.5}, "input"), (EVERY, "input")]
)
def test_what_is_encoded_is_made_from_the_x_that_is_aimed_at(settings: dict, key: str) -> None:
    """Noise and cutout alone leave x the same object; with the others x is what it is without these two."""
    given = batch()
    clean = {name: value for name, value in settings.items() if name not in ("augment_noise", "augment_cutout")}
    x = augmented(given, **settings)["x"]
    assert torch.equal(x, augmented(given, **clean)["x"])
    assert clean or x is given["x"]


def test_scale_mixup_and_shift_are_aimed_at_too() -> None:
    changed = augmented(batch(), augment_scale=0.2, augment_mixup=0.4, augment_shift=2)
    assert "input" not in changed, "so that x is what is encoded"


def test_a_batch_with_codes_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        augmented(batch() | {"z": torch.zeros(6, 3)}, augment_mixup=0.4)
    assert str(caught.value) == (
        "the batch holds codes z, which belong to x as it was: augment in the training of a VAE only"
    )
    assert "z" in augmented(batch() | {"z": torch.zeros(6, 3)}), "off is off"


def test_images_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        augmented({"x": torch.zeros(2, 3, 4, 4)}, augment_noise=0.1)
    assert str(caught.value) == "x has shape (2, 3, 4, 4): must be fields (b, n, t) to be augmented; set augment_* to 0"


# --- each in closed form ---


def test_noise_has_the_standard_deviation_asked_for() -> None:
    given = {"x": torch.zeros(20, 50, 30)}
    drawn = augmented(given, augment_noise=0.3)["input"]
    assert drawn.std().item() == pytest.approx(0.3, rel=0.02) and abs(drawn.mean().item()) < 0.01
    torch.manual_seed(0)
    assert torch.equal(drawn, 0.3 * torch.randn(20, 50, 30))


def test_scale_is_one_factor_for_each_sample() -> None:
    given = batch()
    ratio = (augmented(given, augment_scale=0.2)["x"] / given["x"]).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert len(ratio[:, 0].unique()) == 6 and (ratio - 1).abs().max() <= 0.2 + 1e-6
    torch.manual_seed(0)
    many = scale_factors(10_000, 0.2)
    assert 0.8 <= many.min() < 0.801 and 1.199 < many.max() <= 1.2
    assert many.std().item() == pytest.approx(0.4 / np.sqrt(12), rel=0.03), "uniform"


def test_mixup_lies_between_two_fields_of_the_batch() -> None:
    """Sample i holds i in every place but one, which says by i squared which other sample was mixed in."""
    x = torch.arange(6.0)[:, None, None].repeat(1, 2, 3)
    x[:, 1, 2] = torch.arange(6.0) ** 2
    torch.manual_seed(0)
    mixed = mixup(x, 0.4)
    value, square = mixed[:, 0, 0], mixed[:, 1, 2]
    changed = 0
    for i in range(6):
        pairs = [(j, (value[i] - j) / (i - j)) for j in range(6) if j != i]
        fits = [j for j, share in pairs if torch.isclose(share * i**2 + (1 - share) * j**2, square[i], atol=1e-4)]
        alone = torch.isclose(value[i], x[i, 0, 0])
        assert alone or any(-1e-6 <= share <= 1 + 1e-6 for j, share in pairs if j in fits)
        changed += not alone
        assert torch.allclose(mixed[i].flatten()[:-1], value[i]), "one share for the whole field"
    assert changed >= 3
    assert torch.equal(mixup(x[:1], 0.4), x[:1]), "a sample alone has no other"


@pytest.mark.parametrize("concentration", [0.01, 0.4, 1.0, 50.0])
def test_shares_of_mixup_are_of_a_beta_distribution(concentration: float) -> None:
    """Variance of Beta(a, a): 1 / (4 (2 a + 1)). Two kinds of field, 0 and 1, are mixed."""
    torch.manual_seed(0)
    x = torch.arange(40_000.0)[:, None, None] % 2
    mixed = mixup(x, concentration).flatten()
    assert torch.isfinite(mixed).all() and mixed.min() >= 0 and mixed.max() <= 1
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.01)
    share = 1 / 4 + 1 / (4 * (2 * concentration + 1))  # E[s^2], which E[mixed^2] follows from
    both, one = 1 / 4, 1 / 2  # x and its other are both 1; exactly one of them is
    assert mixed.square().mean().item() == pytest.approx(both + one * share, abs=0.01)


def test_shift_repeats_the_edges() -> None:
    x = torch.arange(1.0, 6.0).expand(5, 2, 5)
    shifted = shift(x, torch.tensor([0, 1, 2, -1, -4]))
    assert shifted[:, 0].tolist() == [
        [1, 2, 3, 4, 5],
        [1, 1, 2, 3, 4],
        [1, 1, 1, 2, 3],
        [2, 3, 4, 5, 5],
        [5, 5, 5, 5, 5],
    ]
    assert torch.equal(shifted[:, 0], shifted[:, 1]), "all nodes alike"


def test_shifts_are_drawn_evenly_both_ways() -> None:
    given = {"x": torch.arange(7.0).expand(5000, 1, 7)}
    middle = augmented(given, augment_shift=2)["x"][:, 0, 3]
    steps, counts = (3 - middle).unique(return_counts=True)
    assert steps.tolist() == [-2, -1, 0, 1, 2] and counts.min() > 900


@pytest.mark.parametrize("steps", [1, 4])
def test_a_shift_that_leaves_nothing_is_refused(steps: int) -> None:
    with pytest.raises(ValueError) as caught:
        augmented(batch(steps=steps), augment_shift=4)
    assert str(caught.value) == f"augment_shift=4: must be less than {steps}, the time steps of x; lower it"


def test_cutout_blanks_one_window_of_all_nodes() -> None:
    given = {"x": torch.ones(4000, 2, 10)}
    drawn = augmented(given, augment_cutout=0.3)["input"]
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and set(drawn.unique().tolist()) == {0.0, 1.0}
    blank = drawn[:, 0] == 0
    assert torch.bincount(blank.sum(1)).min() > 900 and blank.sum(1).max() == 3, "0, 1, 2 and 3 steps, evenly"
    edges = blank[:, 1:] != blank[:, :-1]
    assert edges.sum(1).max() <= 2, "one window"
    one = blank[blank.sum(1) == 1]
    assert one.sum(0).min() > 50, "a window begins anywhere"


@pytest.mark.parametrize(("steps", "share", "longest"), [(10, 0.7, 7), (100, 0.29, 29), (4, 0.2, 0), (5, 1.0, 5)])
def test_the_longest_window_is_the_share_of_the_steps(steps: int, share: float, longest: int) -> None:
    torch.manual_seed(0)
    mask = cutout_mask(3000, steps, share)
    assert mask.shape == (3000, 1, steps) and (mask == 0).sum((1, 2)).max() == longest
