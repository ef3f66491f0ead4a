from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conditioned import SHORT, SMALL, fitted, hierarchical_vae, simulations, task_of
from tiny import Dies, metrics

from workbench.ablation import ARMS, CLAIMS, PLAIN, SETTINGS, _reached, run_arms, summarise, verdicts
from workbench.conditioning import ConditioningConfig, Task
from workbench.models.enhanced_losses import PRESETS
from workbench.runs import Run, RunError, open_run
from workbench.schedule import TrainConfig
from workbench.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = ("latent_error", "error", "noisy_error", "val_latent_error", "seconds_per_epoch", "memory_mb")


def table(**by_arm: dict[str, list[float]]) -> pd.DataFrame:
    """One row per arm and seed; figures that are not given are 1."""
    rows = []
    for arm, figures in by_arm.items():
        n = len(next(iter(figures.values())))
        for seed in range(n):
            given = {name: figures.get(name, [1.0] * n)[seed] for name in FIGURES}
            rows.append({"arm": arm, "seed": seed} | given)
    return pd.DataFrame(rows)


# --- what is compared ---


def test_the_arms_are_latent_mode_end_to_end_each_term_and_each_preset() -> None:
    terms = ["robust_terms", "perceptual_term", "consistency_term"]
    assert list(ARMS) == ["latent", "end_to_end", *terms, *(name for name in PRESETS if name != "none")]
    for arm, settings in SETTINGS.items():
        config = ConditioningConfig(**PLAIN | settings)
        assert (config.mode == "end_to_end") == (arm == "end_to_end")
        used = {name for name, weight in config.enhanced if weight and name != "mse_weight"}
        expected = {name for name, weight in PRESETS.get(arm, {}).items() if weight and name != "mse_weight"}
        single = {"robust_terms": {"mae_weight", "huber_weight"}, "perceptual_term": {"perceptual_weight"}}
        single["consistency_term"] = {"consistency_weight"}
        assert used == (expected or single.get(arm, set()))
    robust = ConditioningConfig(**SETTINGS["robust_terms"]).enhanced
    assert (robust.mse_weight, robust.mae_weight, robust.huber_weight) == (1.0, 0.1, 0.05)


def test_the_claims_are_those_of_the_reference_system() -> None:
    assert [(claim.arm, claim.figure, claim.low, claim.high) for claim in CLAIMS] == [
        ("robust_terms", "val_latent_error", 15.0, 20.0),
        ("perceptual_term", "val_latent_error", 10.0, 15.0),
        ("consistency_term", "noisy_error", 20.0, 25.0),
        ("balanced", "seconds_per_epoch", -35.0, -30.0),
    ]


# --- sentences ---


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ([0.8, 0.84], "Here by 18.0 % ± 2.8 (standard deviation over 2 seeds): held."),
        ([0.5, 0.5], "Here by 50.0 % ± 0.0 (standard deviation over 2 seeds): held."),
        ([0.9, 0.94], "Here by 8.0 % ± 2.8 (standard deviation over 2 seeds): not held, 7.0 points short."),
        ([1.2, 1.2], "Here by -20.0 % ± 0.0 (standard deviation over 2 seeds): not held, 35.0 points short."),
        ([0.8], "Here by 20.0 % (one seed, which decides nothing): held."),
        ([0.9], "Here by 10.0 % (one seed, which decides nothing): not held, 5.0 points short."),
    ],
)
def test_a_claim_is_held_or_not_and_by_how_much(values: list[float], end: str) -> None:
    rows = table(latent={"error": [1.0] * len(values)}, robust_terms={"val_latent_error": values})
    claim = "Claim: the robust terms lower the validation error of codes, by 15 to 20 %. "
    assert verdicts(rows, "mse") == [claim + end]


@pytest.mark.parametrize(
    ("seconds", "end"),
    [
        ([1.32, 1.34], "Here by 33.0 % ± 1.4 (standard deviation over 2 seeds): held."),
        ([1.02, 1.04], "Here by 3.0 % ± 1.4 (standard deviation over 2 seeds): not held."),
        ([2.0, 2.0], "Here by 100.0 % ± 0.0 (standard deviation over 2 seeds): not held."),
    ],
)
def test_an_epoch_may_be_longer_by_what_is_claimed_no_more_and_no_less(seconds: list[float], end: str) -> None:
    rows = table(latent={"error": [1.0, 1.0]}, balanced={"seconds_per_epoch": seconds})
    assert verdicts(rows, "mse") == [f"Claim: all terms together lengthen an epoch, by 30 to 35 %. {end}"]


def test_a_gain_is_that_beside_latent_mode_with_the_same_seed() -> None:
    """Half of each, whatever the seed's own level; arms may come in any order."""
    rows = table(consistency_term={"noisy_error": [0.5, 5.0, 50.0]}, latent={"noisy_error": [1.0, 10.0, 100.0]}).sample(
        frac=1, random_state=1
    )
    (verdict,) = verdicts(rows, "mse")
    assert "Here by 50.0 % ± 0.0 (standard deviation over 3 seeds): held." in verdict


def test_end_to_end_beside_latent_mode_in_words() -> None:
    rows = table(latent={"error": [0.4, 0.2, 0.3]}, end_to_end={"error": [0.1, 0.25, 0.1]})
    assert verdicts(rows, "relative_l2") == [
        "relative_l2 of the sample end to end 0.15, in latent mode 0.3: lower end to end with 2 of 3 seeds"
    ]


def test_without_latent_mode_nothing_can_be_said() -> None:
    assert verdicts(table(end_to_end={"error": [1.0]}, robust_terms={"error": [1.0]}), "mse") == []


def test_means_and_deviations_by_arm_in_their_order() -> None:
    rows = table(latent={"error": [1.0, 2.0, 6.0]}, end_to_end={"error": [3.0, 3.0, 3.0]})
    summary = summarise(rows.assign(epochs_to_goal=[1, np.nan, 3, np.nan, np.nan, np.nan]))
    assert list(summary.index) == ["latent", "end_to_end"] and "seed" not in summary
    assert list(summary.columns[:2]) == ["latent_error", "latent_error_sd"]
    assert summary.loc["latent", "error"] == 3.0 and summary.loc["latent", "error_sd"] == pytest.approx(np.sqrt(7))
    assert summary.loc["end_to_end", ["error", "error_sd"]].tolist() == [3.0, 0.0]
    assert summary.loc["latent", "epochs_to_goal"] == 2 and np.isnan(summary.loc["end_to_end", "epochs_to_goal"])


def test_the_goal_is_the_lowest_error_of_latent_mode_with_the_same_seed() -> None:
    curves = {
        ("latent", 0): [(1, 2.0, 0.9), (2, 4.0, 0.5), (3, 6.0, 0.6)],
        ("latent", 1): [(1, 2.0, 0.3), (2, 4.0, 0.4), (3, 6.0, 0.4)],
        ("end_to_end", 0): [(1, 5.0, 0.5), (2, 10.0, 0.1), (3, 15.0, 0.1)],
        ("end_to_end", 1): [(1, 5.0, 0.5), (2, 10.0, 0.4), (3, 15.0, 0.31)],
    }
    rows = pd.DataFrame({"arm": arm, "seed": seed, "curve": curve} for (arm, seed), curve in curves.items())
    reached = _reached(rows)
    assert reached["epochs_to_goal"].tolist()[:3] == [2, 1, 1] and np.isnan(reached["epochs_to_goal"].iloc[3])
    assert reached["seconds_to_goal"].tolist()[:3] == [4.0, 2.0, 5.0] and "curve" not in reached
    alone = _reached(rows[rows["arm"] == "end_to_end"])
    assert alone["epochs_to_goal"].isna().all(), "without latent mode there is no goal"


# --- training them ---


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    data = simulations(tmp_path_factory.mktemp("fields"))
    return task_of(fitted(hierarchical_vae(), data), data)


def compare(folder: Path, task: Task, arms: list[str], seeds: int = 2, **base: Any) -> tuple[Run, pd.DataFrame]:
    run = open_run({"experiment": "e", "run": "c"}, folder)
    config, training = ConditioningConfig(**SMALL | base), TrainConfig(**SHORT | {"epochs": 2})
    return run, run_arms(arms, seeds, config, training, task, run, noise=0.1)


TIMES = ["seconds_per_epoch", "memory_mb", "seconds_to_goal"]


def test_an_interrupted_comparison_goes_on_where_it_was(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arms = ["latent", "end_to_end"]
    whole, expected = compare(tmp_path / "whole", task, arms)
    assert list(zip(expected["arm"], expected["seed"], strict=True)) == [
        *(("latent", 0), ("end_to_end", 0), ("latent", 1), ("end_to_end", 1))
    ]
    assert np.isfinite(expected[[*FIGURES]]).all().all() and (expected["seconds_per_epoch"] > 0).all()
    assert expected.loc[0, "error"] != expected.loc[2, "error"], "the seed did not matter"
    trained, own = [], Trainer.train

    def dies_in_the_third(self: Trainer, stop: Any) -> None:
        trained.append(self.run.path.name)
        if len(trained) == 3:
            raise Dies
        own(self, stop)

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(Trainer, "train", dies_in_the_third)
        compare(tmp_path / "cut", task, arms)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self, stop: (trained.append(self.run.path.name), own(self, stop))[1])
        capsys.readouterr()
        run, rows = compare(tmp_path / "cut", task, arms)
    assert trained == ["latent-0", "end_to_end-0", "latent-1", "latent-1", "end_to_end-1"]
    assert capsys.readouterr().out.count("holds a finished model of this configuration: loaded") == 2
    pd.testing.assert_frame_equal(rows.drop(columns=TIMES), expected.drop(columns=TIMES))
    assert sorted(path.name for path in (run.path / "parts").iterdir()) == sorted({*trained})
    assert all(metrics(Run(run.path / "parts" / n)) == metrics(Run(whole.path / "parts" / n)) for n in {*trained})
    with pytest.raises(RunError, match=r"parts/latent-0 holds a run of another configuration:\n  dropout: 0.0 there"):
        compare(tmp_path / "cut", task, arms, dropout=0.5)


def test_an_arm_changes_latent_mode_without_enhanced_losses(task: Task, tmp_path: Path) -> None:
    """Whatever the run itself is trained with."""
    run, _ = compare(tmp_path, task, ["latent"], 1, mode="end_to_end", preset="balanced", mae_weight=0.7)
    parameters = Run(run.path / "parts" / "latent-0").config["parameters"]
    assert {name: parameters[name] for name in PLAIN} == PLAIN and parameters["arm"] == "latent"
