"""Criteria for a variational setting against a deterministic one, a number each.

Tables of runs are those of `replicates`. A difference between two settings counts only where it is told from seed
noise. Every threshold is a constant below.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from workbench.config import Config
from workbench.datasets.frames import DataError
from workbench.replicates import LEAST_SEEDS, Paired, common_seeds, higher_is_better, lacking, paired, sentence

NEITHER = "neither"
UNDECIDED = "cannot decide"
ACTIVE_SHARE = 0.25
"""A regularised latent has at least this share of its dimensions active; with fewer it has partly collapsed."""
COLLAPSED_KL = 0.01
"""A KL below this [nats per dimension] is not in use: the posterior is the prior."""
DOMINANT_SHARE = 0.5
"""A KL term above this share of the loss, both weighted, outweighs the reconstruction and all other terms."""
SIMPLER_SHARE = 0.01
"""A network is simpler where it has fewer parameters by this share: more than a layer for the variance is."""
COUNTS = ("parameters",)
"""Figures that no seed changes, so that one seed decides them."""
BESIDE = ("pixel_accuracy", "mean_iou")
"""Figures that are compared and have no vote: they and the error tell of one thing, which would count three times."""
COMPARED = {
    "smoother latent": "path_excess",
    "better interpolation": "ppl",
    "no added blur": "blur",
    "error, more direct": "mse",
    "pixel accuracy": "pixel_accuracy",
    "mean IoU": "mean_iou",
    "simpler": "parameters",
    "faster": "seconds",
}
"""Criteria that compare a figure of both settings, and favour the better."""

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class Criterion(Config):
    """One row of a comparison; numbers are over the common seeds, and None where there is none.

    Args:
        criterion: What is asked.
        figure: The column that answers.
        means, deviations: Of the figure by setting, over seeds.
        difference, low, high: Mean paired difference, first setting minus second, and its 95 % interval.
        p: Of the exact test.
        favours: A setting, "neither", or "cannot decide".
        leads: Whom it would favour by the means alone: a setting, or "neither".
        sentence: All of this in words.
        votes: Whether it counts in the verdict, or stands beside it.
    """

    criterion: str
    figure: str
    means: dict[str, Number]
    deviations: dict[str, Number]
    difference: Number = None
    low: Number = None
    high: Number = None
    p: Number = None
    favours: str
    leads: str
    sentence: str
    votes: bool = True


def pair_criteria(rows: pd.DataFrame, deterministic: str, variational: str) -> list[Criterion]:
    """The criteria for a variational setting against a deterministic one, over their common seeds.

    Compared, and in favour of the better where the difference is told from seed noise: smoother latent (`path_excess`,
    the distance of path_ratio from 1), better interpolation (ppl), no added blur (`blur`, max(0, 1 - sharpness)), error
    (mse; also what more direct means), simpler (parameters, at least 1 % fewer, where one seed is enough), faster
    (seconds); pixel accuracy and mean IoU stand beside them without a vote.

    Of the variational setting alone: "regularised" favours it where on every seed a quarter of the latent's dimensions
    are active (`active_share`, active_units over latent_size) and the KL is at least 0.01 nats per dimension; "KL
    neither collapsed nor dominant" favours the deterministic setting where on any seed no dimension is active, the KL
    is below that, or kl_share is above 0.5.

    Args:
        rows: Columns path_ratio, ppl, sharpness, mse, pixel_accuracy, mean_iou, parameters, seconds, active_units,
            latent_size, kl_mean, and kl_share, the weighted KL over the loss.
            A criterion whose column is absent, or NaN in a run, cannot be decided.
        deterministic, variational: Settings.

    Raises:
        DataError: see `replicates.common_seeds`; or a kl_share outside [0, 1].
    """
    seeds = common_seeds(rows, deterministic, variational)
    rows = _derived(rows[rows["seed"].isin(seeds)])
    of_pair = [_compared(rows, name, figure, variational, deterministic) for name, figure in COMPARED.items()]
    own = rows[rows["setting"] == variational]
    return of_pair[:2] + [_regularised(own, variational), _kl_health(own, variational, deterministic)] + of_pair[2:]


def _derived(rows: pd.DataFrame) -> pd.DataFrame:
    """The table with path_excess, blur and active_share, where the columns they come from are there."""
    new = {}
    if "path_ratio" in rows:
        new["path_excess"] = (rows["path_ratio"] - 1).abs()
    if "sharpness" in rows:
        new["blur"] = (1 - rows["sharpness"]).clip(lower=0)
    if {"active_units", "latent_size"} <= set(rows):
        new["active_share"] = rows["active_units"] / rows["latent_size"]
    share = rows["kl_share"].dropna() if "kl_share" in rows else pd.Series(dtype=float)
    if not share.between(0, 1).all():
        raise DataError(
            f"kl_share={share[~share.between(0, 1)].iloc[0]:g}: must be in [0, 1], the weighted KL over the loss; "
            "give that"
        )
    return rows.assign(**new)


def _compared(rows: pd.DataFrame, criterion: str, figure: str, a: str, b: str) -> Criterion:
    """The better of a and b in a figure."""
    if gap := lacking(rows, figure, a, b):
        return criterion_row(rows, criterion, figure, (a, b), UNDECIDED, NEITHER, f"cannot be decided: {gap}")
    pair = paired(rows, figure, a, b)
    leads = _better(pair)
    if figure in COUNTS:
        leads = leads if abs(pair.difference) >= SIMPLER_SHARE * min(pair.mean_a, pair.mean_b) else NEITHER
        words = f"{figure} of {a} {pair.mean_a:,.0f}, of {b} {pair.mean_b:,.0f}: the same on every seed"
        return criterion_row(rows, criterion, figure, (a, b), leads, leads, words, pair)
    told = UNDECIDED if len(pair.seeds) < LEAST_SEEDS else leads if pair.distinguishable else NEITHER
    return criterion_row(rows, criterion, figure, (a, b), told, leads, sentence(pair), pair)


def _better(pair: Paired) -> str:
    """The setting with the better mean, told from seed noise or not; "neither" where they are equal."""
    if pair.difference == 0:
        return NEITHER
    return pair.a if (pair.difference > 0) == higher_is_better(pair.figure) else pair.b


def _regularised(own: pd.DataFrame, variational: str) -> Criterion:
    """Whether on every seed enough of the latent is active, and its KL in use."""
    criterion, figure = "regularised", "active_share"
    gaps = [gap for name in (figure, "kl_mean") if (gap := lacking(own, name, variational))]
    if gaps:
        words = f"cannot be decided: {'; '.join(gaps)}"
        return criterion_row(own, criterion, figure, (variational,), UNDECIDED, NEITHER, words)
    holds = (own[figure] >= ACTIVE_SHARE) & (own["kl_mean"] >= COLLAPSED_KL)
    leads = variational if holds.all() else NEITHER
    words = (
        f"{variational} has at least {100 * ACTIVE_SHARE:g} % of its latent active and {COLLAPSED_KL:g} nats of KL per "
        f"dimension on {holds.sum()} of {len(own)} seeds; its least are {100 * own[figure].min():.1f} % and "
        f"{own['kl_mean'].min():.3g} nats"
    )
    return criterion_row(own, criterion, figure, (variational,), _settled(own, leads), leads, words)


def _kl_health(own: pd.DataFrame, variational: str, deterministic: str) -> Criterion:
    """Whether on any seed the KL has collapsed, or outweighs the reconstruction."""
    criterion, figure = "KL neither collapsed nor dominant", "kl_mean"
    gaps = [gap for name in (figure, "active_units") if (gap := lacking(own, name, variational))]
    if gaps:
        words = f"cannot be decided: {'; '.join(gaps)}"
        return criterion_row(own, criterion, figure, (variational,), UNDECIDED, NEITHER, words)
    collapsed = (own["active_units"] == 0) | (own[figure] < COLLAPSED_KL)
    words = f"KL of {variational} collapsed on {collapsed.sum()} of {len(own)} seeds ({own[figure].min():.3g} nats per "
    words += f"dimension and {own['active_units'].min():g} active units or more), "
    if gap := lacking(own, "kl_share", variational):
        dominant, words = 0, f"{words}dominance not measured ({gap})"
    else:
        dominant = int((own["kl_share"] > DOMINANT_SHARE).sum())
        words += f"dominant on {dominant} (at most {100 * own['kl_share'].max():.1f} % of the loss)"
    leads = deterministic if collapsed.any() or dominant else NEITHER
    return criterion_row(own, criterion, figure, (variational,), _settled(own, leads), leads, words)


def _settled(own: pd.DataFrame, leads: str) -> str:
    """Whom a criterion of one setting alone favours: one seed settles nothing."""
    return leads if len(own) >= LEAST_SEEDS else UNDECIDED


def criterion_row(
    rows: pd.DataFrame,
    criterion: str,
    figure: str,
    settings: Sequence[str],
    favours: str,
    leads: str,
    words: str,
    pair: Paired | None = None,
) -> Criterion:
    """A row with the spread of the settings' figures and, of a pair, the difference; see `Criterion`."""
    values = {
        name: rows.loc[rows["setting"] == name, figure].to_numpy(float) if figure in rows else np.array([np.nan])
        for name in settings
    }
    numbers = ("difference",) if figure in COUNTS else ("difference", "low", "high", "p")
    return Criterion(
        criterion=criterion,
        figure=figure,
        means={name: _number(found.mean()) for name, found in values.items()},
        deviations={name: _number(found.std(ddof=1)) if len(found) > 1 else None for name, found in values.items()},
        **{key: _number(getattr(pair, key)) for key in numbers if pair},
        favours=favours,
        leads=leads,
        sentence=words,
        votes=figure not in BESIDE,
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
