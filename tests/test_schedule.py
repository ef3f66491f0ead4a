import math
from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.schedule import TrainConfig, learning_rate, vae_weights

PER_EPOCH = 5


def rates(**settings: Any) -> list[float]:
    config = TrainConfig(lr=0.1, **{"epochs": 4} | settings)
    return [learning_rate(config, step, PER_EPOCH) for step in range(config.epochs * PER_EPOCH)]


# --- learning rate ---


def test_the_rate_is_constant_by_default() -> None:
    assert rates() == [0.1] * 20


def test_exponential_decays_per_epoch() -> None:
    assert rates(lr_decay=0.5) == pytest.approx([0.1 * 0.5**epoch for epoch in range(4) for _ in range(PER_EPOCH)])


def test_cosine_falls_along_half_a_wave() -> None:
    found = rates(schedule="cosine")
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    assert found[0] == 0.1 and found[10] == pytest.approx(0.05) and 0 < found[-1] < 0.001
    assert found == sorted(found, reverse=True)


def test_cosine_has_no_use_for_the_decay() -> None:
    assert rates(schedule="cosine", lr_decay=0.5) == rates(schedule="cosine")


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_the_warm_up_rises_to_the_whole_rate(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_epochs=2)
    assert found[:10] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(0.1) and max(found) == pytest.approx(0.1)


def test_cosine_after_a_warm_up_still_ends_at_nothing() -> None:
    found = rates(schedule="cosine", warmup_epochs=2)
    assert found[10:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])


def test_a_warm_up_of_part_of_an_epoch() -> None:
    """Half an epoch of 5 steps: 2.5 steps."""
    assert rates(warmup_epochs=0.5)[:4] == pytest.approx([0.04, 0.08, 0.1, 0.1])
    assert rates(warmup_epochs=0.1)[0] == 0.1, "half a step is none"


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_a_warm_up_of_the_whole_training(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_epochs=4) == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])


# --- weights of the terms ---


def test_the_kl_weight_rises_between_two_shares_of_the_training() -> None:
    config = TrainConfig(recon_weight=1e6, kl_weight_start=1e-4, kl_weight=1.0, kl_rise_from=0.3, kl_rise_to=0.8)
    weights = vae_weights(config)
    assert [weights(p)["kl"] for p in (0.0, 0.3, 0.8, 1.0)] == [1e-4, 1e-4, 1.0, 1.0]
    assert weights(0.55)["kl"] == pytest.approx((1e-4 + 1) / 2)
    assert {weights(p / 10)["mse"] for p in range(11)} == {1e6}


def test_without_a_rise_the_kl_weight_is_final_from_the_start() -> None:
    weights = vae_weights(TrainConfig(kl_weight=0.1))
    assert [weights(p) for p in (0.0, 0.5, 1.0)] == [{"mse": 1.0, "kl": 0.1}] * 3


def test_the_first_term_is_the_error_and_the_others_share_one_weight() -> None:
    weights = vae_weights(TrainConfig(recon_weight=2.0, kl_weight=0.1), ("huber", "kl", "kl_levels"))
    assert weights(1.0) == {"huber": 2.0, "kl": 0.1, "kl_levels": 0.1}
    assert list(weights(0.0)) == ["huber", "kl", "kl_levels"]


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_rise_from": 0.8, "kl_rise_to": 0.3}, "kl_rise_from=0.8: must be at most kl_rise_to=0.3"),
        ({"kl_rise_to": 1.5}, "kl_rise_to=1.5: must be at most 1"),
        ({"warmup_epochs": -1.0}, "warmup_epochs=-1.0: must be at least 0"),
        ({"schedule": "linear"}, "schedule='linear': must be 'exponential' or 'cosine'"),
        ({"keep": "first"}, "keep='first': must be 'last' or 'best'"),
        ({"patience": -1}, "patience=-1: must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be at least 0"),
        ({"lr": 0.0}, "lr=0.0: must be more than 0"),
        ({"lr_decay": 1.1}, "lr_decay=1.1: must be at most 1"),
        ({"recon_weight": 0.0}, "recon_weight=0.0: must be more than 0"),
        ({"devices": 0}, "devices=0: must be at least 1"),
        ({"num_nodes": 0}, "num_nodes=0: must be at least 1"),
        (
            {"batch_size": 30, "devices": 2, "num_nodes": 2},
            "batch_size=30: must be divisible by 4 = devices * num_nodes, as each process takes as many samples of a "
            "step; the nearest such size is 28 or 32",
        ),
        (
            {"batch_size": 3, "devices": 8},
            "batch_size=3: must be divisible by 8 = devices * num_nodes, as each process takes as many samples of a "
            "step; the nearest such size is 8",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    assert str(caught.value) == message
