"""Figures of runs replicated over seeds: their spread, paired differences, and what tells these from seed noise.

A table of runs has one row per run: `setting` (text), `seed` (whole number) and figures, NaN where a run has none.

Sources:
    Student 1908, The probable error of a mean (the interval of paired differences).
    Fisher 1935, The design of experiments, section 21 (the exact test by changes of sign).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, t

from workbench.datasets.frames import DataError

LEVEL = 0.05
"""A difference is told from seed noise at this level; intervals hold 1 - LEVEL."""
LEAST_SEEDS = 2
"""Fewer common seeds have no spread, so nothing is decided on them."""
EXACT_SEEDS = 16
"""Up to so many seeds all 2^n assignments of signs are tried; beyond, the interval alone decides."""
ROUNDING = 1e-12
"""A deviation below this share of the mean is that of equal numbers."""
LABELS = {
    "mse": "MSE [per element, [-1, 1] scale]",
    "psnr": "PSNR [dB]",
    "ssim": "SSIM [1]",
    "pixel_accuracy": "pixel accuracy [1]",
    "mean_iou": "mean IoU [1]",
    "colour_accuracy": "pixel accuracy by colours [1]",
    "colour_mean_iou": "mean IoU by colours [1]",
    "type_accuracy": "type accuracy [1]",
    "kl_mean": "KL [nats per dimension]",
    "kl_total": "KL [nats per image]",
    "kl_share": "weighted KL as a share of the loss [1]",
    "active_units": "active units [dimensions]",
    "active_share": "active units as a share of the latent [1]",
    "path_ratio": "decoded path length / straight distance",
    "path_excess": "distance of that ratio from 1",
    "ppl": "perceptual path length [distance / step²]",
    "sharpness": "gradient of reconstructions / of originals",
    "blur": "gradient lost, max(0, 1 - sharpness)",
    "loss_spread": "spread of the training loss, last third [share of its mean]",
    "gradient_spikes": "spikes of the gradient norm [steps logged]",
    "epochs_to_best": "epochs to within 5 % of the best validation loss",
    "latent_size": "latent [numbers per image]",
    "parameters": "parameters",
    "seconds": "training time [s]",
}
HIGHER_IS_BETTER = {"psnr", "ssim", "pixel_accuracy", "mean_iou", "colour_accuracy", "colour_mean_iou", "type_accuracy"}


def label_of(figure: str) -> str:
    """What a figure is, with its unit; the IoU of a class is named after the class, others as their column."""
    if figure.startswith("iou_"):
        return f"IoU of {figure.removeprefix('iou_')} [1]"
    return LABELS.get(figure, figure)


def higher_is_better(figure: str) -> bool:
    """Whether more is better: accuracies, IoU, PSNR and SSIM; of every other figure that is compared, less is."""
    return figure in HIGHER_IS_BETTER or figure.startswith("iou_")


# --- spread ---


def check_rows(rows: pd.DataFrame) -> None:
    """Refuse a table that is not one row per setting and seed.

    Raises:
        DataError: a column is absent or of another type, there is no row, or two are of one setting and seed.
    """
    absent = [name for name in ("setting", "seed") if name not in rows]
    if absent or rows.empty:
        raise DataError(f"table of {len(rows)} runs without {absent or 'a row'}: must have setting, seed and a run")
    if not rows["setting"].map(lambda name: isinstance(name, str)).all() or rows["seed"].dtype.kind not in "iu":
        raise DataError("table of runs: setting must be text and seed a whole number in every row; convert them")
    twice = rows.loc[rows.duplicated(["setting", "seed"]), ["setting", "seed"]]
    if len(twice):
        setting, seed = twice.iloc[0]
        raise DataError(f"{setting} with seed {seed} is there more than once: must be one run; leave the others out")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of each figure by setting, and its standard deviation over seeds (`_sd`), after the number of `seeds`.

    Of the columns those that hold numbers. A figure that one run of a setting lacks is NaN for the setting; the
    deviation is NaN for one seed.
    """
    check_rows(rows)
    figures = rows.drop(columns=["setting", "seed"]).select_dtypes("number").astype(float)
    grouped = figures.groupby(rows["setting"], sort=False)
    whole = grouped.count().eq(grouped.size(), axis=0)
    means, deviations = grouped.mean().where(whole), grouped.std().where(whole).add_suffix("_sd")
    table = means.join(deviations)[[name for figure in figures for name in (figure, f"{figure}_sd")]]
    table.insert(0, "seeds", grouped.size())
    return table


def spread(mean: int | float, deviation: int | float) -> str:
    """`0.0123 ± 0.0004`, or the number alone where seeds agree or there is one; a dash where there is no figure."""
    if not np.isfinite(mean):
        return "–"
    if np.isfinite(deviation) and deviation > ROUNDING * abs(mean):
        return f"{mean:.4g} ± {deviation:.2g}"
    return f"{mean:,.0f}" if float(mean).is_integer() else f"{mean:.4g}"


# --- pairs ---


@dataclass(frozen=True)
class Paired:
    """A figure of two settings, a and b, at the seeds that both have.

    Args:
        figure: Its column.
        a, b: The settings; differences are a - b.
        seeds: Common to both.
        unpaired: Seeds that only one of them has, left out.
        values_a, values_b: The figure by common seed.
        difference: Mean difference.
        low, high: 95 % confidence interval of the mean difference by Student's t; NaN for one seed.
        p: Two-sided p-value of the exact test over all 2^n changes of sign; NaN above 16 seeds.
    """

    figure: str
    a: str
    b: str
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    values_a: tuple[float, ...]
    values_b: tuple[float, ...]
    difference: float
    low: float
    high: float
    p: float

    @property
    def mean_a(self) -> float:
        """Mean of a over the common seeds."""
        return float(np.mean(self.values_a))

    @property
    def mean_b(self) -> float:
        """Mean of b over the common seeds."""
        return float(np.mean(self.values_b))

    @property
    def percent(self) -> tuple[float, float, float]:
        """Difference and interval in percent of the mean of b; NaN where that is 0, the interval also of one seed."""
        scale = 100 / abs(self.mean_b) if self.mean_b else float("nan")
        return self.difference * scale, self.low * scale, self.high * scale

    @property
    def agree(self) -> int:
        """Seeds whose difference has the sign of the mean difference."""
        differences = np.subtract(self.values_a, self.values_b)
        return int((np.sign(differences) == np.sign(self.difference)).sum())

    @property
    def exact_decides(self) -> bool:
        """Whether so many seeds (6 to 16) can reach p = 0.05 in the exact test."""
        return not exact_test_is_silent(len(self.seeds))

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out and, where the exact test can decide, its p is at most 0.05 too."""
        beyond = self.low > 0 or self.high < 0  # false of NaN
        return beyond and (not self.exact_decides or self.p <= LEVEL)


def paired(rows: pd.DataFrame, figure: str, a: str, b: str) -> Paired:
    """Differences of a figure between two settings, a - b, by common seed.

    Raises:
        DataError: see `common_seeds`; or a run lacks the figure.
    """
    seeds = common_seeds(rows, a, b)
    if gap := lacking(rows[rows["seed"].isin(seeds)], figure, a, b):
        raise DataError(f"{gap}; choose another figure, or leave these runs out")
    by_seed = {name: rows[rows["setting"] == name].set_index("seed")[figure].astype(float) for name in (a, b)}
    x, y = (by_seed[name].loc[seeds].to_numpy() for name in (a, b))
    unpaired = sorted(map(int, by_seed[a].index.symmetric_difference(by_seed[b].index)))
    d = x - y
    half = _half_width(d)
    return Paired(
        figure,
        a,
        b,
        seeds=tuple(seeds),
        unpaired=tuple(unpaired),
        values_a=tuple(x.tolist()),
        values_b=tuple(y.tolist()),
        difference=float(d.mean()),
        low=float(d.mean() - half),
        high=float(d.mean() + half),
        p=_sign_flip_p(d),
    )


def common_seeds(rows: pd.DataFrame, *settings: str) -> list[int]:
    """Seeds that all of some settings have, in order.

    Raises:
        DataError: a setting is unknown or named twice, or no seed is common to all.
    """
    check_rows(rows)
    known = rows["setting"].unique()
    if len(set(settings)) < max(2, len(settings)) or not set(settings) <= set(known):
        raise DataError(f"settings {', '.join(settings)}: must be at least two, all different, of {', '.join(known)}")
    seeds = {name: set(rows.loc[rows["setting"] == name, "seed"].tolist()) for name in settings}
    if common := set.intersection(*seeds.values()):
        return sorted(common)
    theirs = "; ".join(f"{name} has {', '.join(map(str, sorted(found)))}" for name, found in seeds.items())
    raise DataError(
        f"no seed common to all of {len(settings)} settings ({theirs}): must be at least 1; run the missing"
    )


def comparable(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The settings that have at least 2 seeds in common, and those left out for it, the ones with the fewest seeds.

    None is left out where most settings have 1 seed; two always stay.
    """
    check_rows(rows)
    seeds = {name: set(part["seed"].tolist()) for name, part in rows.groupby("setting", sort=False)}
    kept, left_out = list(seeds), []
    if np.median([len(found) for found in seeds.values()]) < LEAST_SEEDS:
        return kept, []
    while len(kept) > 2 and len(set.intersection(*(seeds[name] for name in kept))) < LEAST_SEEDS:
        fewest = min(reversed(kept), key=lambda name: len(seeds[name]))
        kept.remove(fewest)
        left_out.append(fewest)
    return kept, left_out


def lacking(rows: pd.DataFrame, figure: str, *settings: str) -> str:
    """Which of some settings lack a figure, and on which seeds, in words; empty where all runs have it."""
    found = []
    for name in settings:
        part = rows[rows["setting"] == name]
        values = part[figure].to_numpy(float) if figure in rows else np.full(len(part), np.nan)
        without = part.loc[~np.isfinite(values), "seed"]
        if len(without):
            where = "" if len(without) == len(part) else f" with seed {', '.join(map(str, without))}"
            found.append(f"{name}{where} has no such figure")
    return f"{figure}: {', '.join(found)}" if found else ""


def smallest_p(n: int) -> float:
    """Least p that the exact two-sided test can give with n seeds: 2 / 2^n."""
    return 2.0 ** (1 - n)


def _half_width(d: np.ndarray) -> float:
    """Half the interval of Student's t about a mean; NaN for one value."""
    n = len(d)
    return float(t.ppf(1 - LEVEL / 2, n - 1) * d.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def _sign_flip_p(d: np.ndarray) -> float:
    """Share of all changes of sign whose mean is at least as far from 0."""
    if len(d) == 1:
        return 1.0
    if len(d) > EXACT_SEEDS:
        return float("nan")
    test = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, batch=4096)
    return float(test.pvalue)


def sentence(pair: Paired, label: str = "") -> str:
    """Whether a figure of a is below, above or not distinguishable from that of b, with its numbers.

    Args:
        pair: See `paired`; what "distinguishable" takes is in `Paired.distinguishable`.
        label: What to call the figure; its column where empty.
    """
    name, n = label or pair.figure, len(pair.seeds)
    left = f"; seeds left out, as only one has them: {', '.join(map(str, pair.unpaired))}" if pair.unpaired else ""
    if n == 1:
        values = f"{pair.mean_a:.4g} against {pair.mean_b:.4g}"
        return f"{name} of {pair.a} against {pair.b} cannot be decided on one seed: {values}{left}"
    way = ("lower", "equal", "higher")[int(np.sign(pair.difference)) + 1]
    word = ("below" if pair.difference < 0 else "above") if pair.distinguishable else "not distinguishable from"
    exact = f"p = {pair.p:.3g} in the exact sign-flip test" if pair.exact_decides else exact_test_is_silent(n)
    return (
        f"{name} of {pair.a} is {word} that of {pair.b}: {pair.mean_a:.4g} against {pair.mean_b:.4g}, difference "
        f"{pair.difference:+.3g} (95 % interval {pair.low:+.3g} to {pair.high:+.3g} over {n} seeds), "
        f"{way} on {pair.agree} of {n}; {exact}{left}"
    )


def exact_test_is_silent(n: int) -> str:
    """Why the exact test decides nothing with n seeds, in words; empty where it does (6 to 16 seeds)."""
    if n > EXACT_SEEDS:
        return f"{n} seeds are too many for the exact test (up to {EXACT_SEEDS}), so the interval alone speaks"
    if smallest_p(n) > LEVEL:
        least = f"smallest p {smallest_p(n):.3g}"
        return f"{n} seeds cannot reach {LEVEL:g} in the exact test ({least}), so the interval alone speaks"
    return ""


def relative_differences(pairs: Iterable[Paired]) -> pd.DataFrame:
    """Differences and their intervals in percent of the mean of b, for figures of all units on one axis.

    Returns:
        Columns figure, a, b, percent, low, high, distinguishable; see `Paired.percent`.
    """
    rows = [(pair.figure, pair.a, pair.b, *pair.percent, pair.distinguishable) for pair in pairs]
    return pd.DataFrame(rows, columns=["figure", "a", "b", "percent", "low", "high", "distinguishable"])
