"""Conditioners side by side: latent mode, end to end, and each enhanced loss, over seeds, on the same data.

The claims that are weighed are those of the reference system, SimulGen-VAE, for its enhanced losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.comparison import error_table, prediction_errors
from workbench.conditioning import ConditioningConfig, Task, latent_error, predict
from workbench.models.conditioners import Conditioner
from workbench.runs import Run
from workbench.schedule import TrainConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "latent": {},
    "end_to_end": {"mode": "end_to_end"},
    "robust_terms": {"mae_weight": 0.1, "huber_weight": 0.05},
    "perceptual_term": {"perceptual_weight": 0.1},
    "consistency_term": {"consistency_weight": 0.1},
    "balanced": {"preset": "balanced"},
    "robust": {"preset": "robust"},
    "semantic": {"preset": "semantic"},
    "fast": {"preset": "fast"},
    "small_dataset": {"preset": "small_dataset"},
}
"""What each arm changes of latent mode without enhanced losses: one term at a time, then the presets."""
ARMS = tuple(SETTINGS)
PLAIN = {"mode": "latent", "preset": "none"} | dict.fromkeys(
    ("mae_weight", "huber_weight", "perceptual_weight", "consistency_weight"), -1.0
)


@dataclass(frozen=True)
class Claim:
    """What the reference system says of an arm beside latent mode: a gain between `low` and `high` percent."""

    text: str
    arm: str
    figure: str
    low: float
    high: float


CLAIMS = (
    Claim("the robust terms lower the validation error of codes", "robust_terms", "val_latent_error", 15.0, 20.0),
    Claim(
        "the perceptual term lowers the validation error of codes", "perceptual_term", "val_latent_error", 10.0, 15.0
    ),
    Claim("the consistency term lowers the error of codes under noise", "consistency_term", "noisy_error", 20.0, 25.0),
    Claim("all terms together lengthen an epoch", "balanced", "seconds_per_epoch", -35.0, -30.0),
)


def run_arms(
    arms: Sequence[str], seeds: int, base: ConditioningConfig, training: TrainConfig, task: Task, run: Run, noise: float
) -> pd.DataFrame:
    """Train every arm with seeds 0 to `seeds` - 1, each into a part of the run, and measure it on the test split.

    A part that is finished is loaded, so that an interrupted comparison goes on where it was.

    Args:
        base: Network and weights; each arm changes latent mode without enhanced losses by `SETTINGS`.
        noise: Of the conditions, for `noisy_error` [standard deviations].

    Returns:
        One row per arm and seed: arm, seed, latent_error, error (of the data) and noisy_error on the test split,
        val_latent_error (lowest of all epochs), seconds_per_epoch (median), memory_mb (peak of the process so far), and
        epochs_to_goal and seconds_to_goal: until latent mode's lowest validation error with this seed is reached.
    """
    rows = []
    for seed in range(seeds):
        for arm in arms:
            config = base.model_copy(update=PLAIN | SETTINGS[arm])
            settings = training.model_copy(update={"seed": seed})
            part = run.part(f"{arm}-{seed}", arm=arm, **config.model_dump(), **settings.model_dump())
            print(f"{arm}, seed {seed}")
            conditioner = task.train(config, settings, part)
            figures = _test_figures(conditioner, config, task, noise, training.batch_size)
            rows.append({"arm": arm, "seed": seed} | figures | _logged(part, config))
    return _reached(pd.DataFrame(rows))


def _test_figures(
    conditioner: Conditioner, config: ConditioningConfig, task: Task, noise: float, batch_size: int
) -> dict[str, float]:
    """Errors of codes and samples on the test split, and of codes under noise that is the same for every arm."""
    test, vae, device = task.split("test"), task.vae, conditioner.code_mean.device
    conditions = test.conditions()
    draws = torch.randn(conditions.shape, generator=torch.Generator().manual_seed(0))
    std = conditioner.condition_std.cpu().reshape(-1, *[1] * (conditions.dim() - 2))
    codes, noisy = (predict(conditioner, vae, c, batch_size)[0] for c in (conditions, conditions + noise * std * draws))
    methods = {"conditioner": lambda batch: vae.decode(conditioner.codes(batch["condition"]))}
    errors = prediction_errors(methods, test, batch_size, device, task.data.errors)
    return {
        "latent_error": latent_error(conditioner, config, codes, task.z["test"]),
        "noisy_error": latent_error(conditioner, config, noisy, task.z["test"]),
        "error": float(error_table(errors).loc["conditioner", task.data.error_name]),
    }


def _logged(part: Run, config: ConditioningConfig) -> dict[str, Any]:
    """What a training wrote down: errors in validation, speed and memory."""
    log = pd.read_csv(part.path / "metrics.csv")
    val = log[log["split"] == "val"]
    weights = {"latent_main": config.main_weight, "latent_hier": config.hier_weight}
    used = {name: weight for name, weight in weights.items() if name in val}
    latent = sum(weight * val[name] for name, weight in used.items()) / sum(used.values())
    return {
        "val_latent_error": float(latent.min()),
        "curve": list(zip(val["epoch"], val["seconds"], val["error"], strict=True)),
        "seconds_per_epoch": float(val["seconds"].diff().fillna(val["seconds"]).median()),
        "memory_mb": float(log["memory_mb"].max()),
    }


def _reached(rows: pd.DataFrame) -> pd.DataFrame:
    """When each training reaches the lowest validation error of latent mode with the same seed; NaN where never."""
    goals = {row.seed: min(e for _, _, e in row.curve) for row in rows.itertuples() if row.arm == "latent"}
    found = []
    for row in rows.itertuples():
        hits = [(epoch, seconds) for epoch, seconds, e in row.curve if e <= goals.get(row.seed, -np.inf)]
        found.append(hits[0] if hits else (np.nan, np.nan))
    epochs, seconds = zip(*found, strict=True)
    return rows.drop(columns="curve").assign(epochs_to_goal=epochs, seconds_to_goal=seconds)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of each figure by arm, and its standard deviation over seeds (`_sd`)."""
    grouped = rows.drop(columns="seed").groupby("arm", sort=False)
    means, deviations = grouped.mean(), grouped.std().add_suffix("_sd")
    return means.join(deviations)[[name for figure in means for name in (figure, f"{figure}_sd")]]


def verdicts(rows: pd.DataFrame, error_name: str) -> list[str]:
    """One sentence on end to end beside latent mode, and one for each claim that the arms trained can weigh.

    A gain is 1 - figure / figure of latent mode with the same seed, in percent; a claim holds where its mean is at
    least the claim's lower end.
    """
    by_seed = {arm: part.set_index("seed") for arm, part in rows.groupby("arm")}
    if "latent" not in by_seed:
        return []
    sentences = [_end_to_end(by_seed, error_name)] if "end_to_end" in by_seed else []
    return sentences + [_verdict(claim, by_seed) for claim in CLAIMS if claim.arm in by_seed]


def _end_to_end(by_seed: dict[str, pd.DataFrame], error_name: str) -> str:
    latent, end_to_end = by_seed["latent"]["error"], by_seed["end_to_end"]["error"]
    lower, n = int((end_to_end < latent).sum()), len(latent)
    return (
        f"{error_name} of the sample end to end {end_to_end.mean():.4g}, in latent mode {latent.mean():.4g}: lower end "
        f"to end with {lower} of {n} seeds{', which decides nothing' if n == 1 else ''}"
    )


def _verdict(claim: Claim, by_seed: dict[str, pd.DataFrame]) -> str:
    gain = 100 * (1 - by_seed[claim.arm][claim.figure] / by_seed["latent"][claim.figure])
    mean, n = gain.mean(), len(gain)
    spread = (
        f" ± {gain.std():.1f} (standard deviation over {n} seeds)" if n > 1 else " (one seed, which decides nothing)"
    )
    if claim.high < 0:
        return (
            f"Claim: {claim.text}, by {-claim.high:g} to {-claim.low:g} %. Here by {-mean:.1f} %{spread}: "
            f"{'held' if claim.low <= mean <= claim.high else 'not held'}."
        )
    held = "held" if mean >= claim.low else f"not held, {claim.low - mean:.1f} points short"
    return f"Claim: {claim.text}, by {claim.low:g} to {claim.high:g} %. Here by {mean:.1f} %{spread}: {held}."
