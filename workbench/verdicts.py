"""Verdicts on replicated runs: the setting they choose, verdict.yaml for the next experiment, and report.md.

Tables of runs are those of `replicates`. Of two settings that nothing tells apart the deterministic one wins; of many
that are as good, the smallest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic import Field

from workbench.checkpoints import write_atomically
from workbench.config import Config, ConfigError
from workbench.criteria import COUNTS, NEITHER, UNDECIDED, Criterion, criterion_row, pair_criteria
from workbench.datasets.frames import DataError
from workbench.replicates import (
    LEAST_SEEDS,
    Paired,
    common_seeds,
    comparable,
    exact_test_is_silent,
    higher_is_better,
    label_of,
    lacking,
    paired,
    sentence,
    spread,
    summarise,
)

TOLERANCE = 0.01
"""A setting is as good as the best where its figure is at most this share of the best one's worse."""
CAUTIONS = {
    "ppl": "A decoder that blurs, or has collapsed, has a low perceptual path length too: read it beside the error.",
    "active_share": "Regularised can only favour the variational setting, KL health only the deterministic one.",
    "seconds": "Seconds are comparable only where the runs had equal machines, and shared them equally.",
}
"""What to bear in mind of some figures."""
STABILITY = ("loss_spread", "gradient_spikes", "epochs_to_best")
NOT_BASE = ("experiment", "run", "seed")
"""Parameters of the winner that the next experiment has its own of."""


class Verdict(Config):
    """What an experiment decided, and what the next one starts from.

    Args:
        experiment: Its name.
        winner, rival: The chosen setting and the second.
        decided: False where there is one common seed only, and the winner merely leads.
        reason: A sentence with numbers.
        parameters: Of the winner, resolved, without experiment, run and seed.
        failed: Names of the runs that failed, and so are in no figure.
        seeds: Those that the comparison rests on.
        criteria: Its rows.

    Raises:
        ConfigError: a key is absent, unknown or of the wrong type.
    """

    experiment: str = Field(min_length=1)
    winner: str = Field(min_length=1)
    rival: str = Field(min_length=1)
    decided: bool
    reason: str
    parameters: dict[str, Any] = Field(min_length=1)
    failed: list[str]
    seeds: list[int]
    criteria: list[Criterion]


# --- decisions ---


def decide_pair(
    rows: pd.DataFrame,
    deterministic: str,
    variational: str,
    experiment: str,
    parameters: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str] = (),
) -> Verdict:
    """Choose the variational setting where more criteria favour it than the deterministic one, else the latter.

    With one common seed nothing is decided, and the winner is the one with more of the better means.

    Args:
        rows: See `criteria.pair_criteria`.
        deterministic, variational: Settings.
        experiment: Its name.
        parameters: Resolved parameters by setting.
        failed: Names of the runs that failed.

    Raises:
        DataError: see `criteria.pair_criteria`; or the parameters of a setting are absent.
    """
    criteria, seeds = pair_criteria(rows, deterministic, variational), common_seeds(rows, deterministic, variational)
    rows = rows[rows["setting"].isin([deterministic, variational])]
    decided = len(seeds) >= LEAST_SEEDS
    voting = [criterion for criterion in criteria if criterion.votes]
    told = [(criterion.favours if decided else criterion.leads, _brief(criterion)) for criterion in voting]
    sides = {name: [brief for side, brief in told if side == name] for name in (variational, deterministic)}
    ahead = len(sides[variational]) - len(sides[deterministic])
    winner, rival = (variational, deterministic) if ahead > 0 else (deterministic, variational)
    favour = " and ".join(f"{len(of)} favour {name} ({'; '.join(of) or 'none'})" for name, of in sides.items())
    count = f"of {len(voting)} criteria {favour}{', and a tie goes to the deterministic one' * (ahead == 0)}"
    verdict = f"{winner} wins: " if decided else f"One seed cannot decide; {winner} would lead: on this seed, "
    reason = f"{verdict}{count}; numbers are {variational} - {deterministic}{_left_out(rows, seeds)}."
    return Verdict(
        experiment=experiment,
        winner=winner,
        rival=rival,
        decided=decided,
        reason=reason,
        parameters=_base(parameters, winner, [deterministic, variational]),
        failed=list(failed),
        seeds=seeds,
        criteria=criteria,
    )


def _brief(row: Criterion) -> str:
    return row.criterion if row.difference is None else f"{row.criterion} {_difference(row)}"


def _difference(row: Criterion) -> str:
    return f"{row.difference:+,.0f}" if row.figure in COUNTS else f"{row.difference:+.3g}"


def _left_out(rows: pd.DataFrame, seeds: Sequence[int]) -> str:
    others = sorted(set(rows["seed"].tolist()) - set(seeds))
    return f"; seeds left out, as not every setting has them: {', '.join(map(str, others))}" if others else ""


def decide_many(
    rows: pd.DataFrame,
    experiment: str,
    parameters: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str] = (),
    error: str = "pixel_accuracy",
    tolerance: int | float = TOLERANCE,
) -> Verdict:
    """Choose the smallest latent, then the fewest parameters, of the settings that are as good as the best.

    As good is a mean of `error` over the seeds common to all settings that is worse than the best one's by at most
    `tolerance` of it; being not distinguishable from the best is not enough, or the noisiest setting would pass.
    With one common seed the winner merely leads. The rival is the next by the same order; settings that are not as
    good follow by their error. Where failed runs leave fewer than 2 common seeds, settings with the fewest seeds are
    left out, and named.

    Args:
        rows: One per run, with the columns latent_size, parameters and `error`.
        experiment: Its name.
        parameters: Resolved parameters by setting.
        failed: Names of the runs that failed.
        error: A figure of every run, of one meaning in all: colour_accuracy where only some have a segmentation head.
        tolerance: Relative to the best.

    Raises:
        DataError: see `replicates.common_seeds`; a run lacks a figure; or the parameters of a setting are absent.
    """
    names, short = comparable(rows)
    rows = rows[rows["setting"].isin(names)]
    seeds = common_seeds(rows, *names)
    left_out, rows = _left_out(rows, seeds), rows[rows["seed"].isin(seeds)]
    left_out += f"; settings left out, for want of common seeds: {', '.join(short)}" if short else ""
    _check_many(rows, names, error, tolerance)
    means = rows.groupby("setting", sort=False)[[error, "latent_size", "parameters"]].mean()
    (winner, rival, *_), best, good = _ranking(means, tolerance)
    pairs = {name: paired(rows, error, name, best) for name in names if name != best}
    decided = len(seeds) >= LEAST_SEEDS
    reason = _reason_of_many(means, good, pairs, winner, best, tolerance)
    verdict = f"{winner} wins" if decided else f"One seed cannot decide; {winner} would lead"
    return Verdict(
        experiment=experiment,
        winner=winner,
        rival=rival,
        decided=decided,
        reason=f"{verdict}: {reason}{left_out}.",
        parameters=_base(parameters, winner, names),
        failed=list(failed),
        seeds=seeds,
        criteria=[_close(rows, pair, bool(good[name]), tolerance) for name, pair in pairs.items()],
    )


def _check_many(rows: pd.DataFrame, names: Sequence[str], error: str, tolerance: int | float) -> None:
    if not 0 <= tolerance < 1:
        raise DataError(f"tolerance={tolerance}: must be in [0, 1), a share of the best setting's {error}")
    for figure in (error, "latent_size", "parameters"):
        if gap := lacking(rows, figure, *names):
            raise DataError(f"{gap}: must be in every run; leave these settings out, or judge by another error")


def _ranking(means: pd.DataFrame, tolerance: int | float) -> tuple[list[str], str, pd.Series]:
    """Settings in the order of `decide_many`, the one with the best error, and which are as good.

    Args:
        means: By setting: the error, latent_size, parameters.
    """
    error = means.columns[0]
    worse = means[error] * (-1 if higher_is_better(error) else 1)
    worse -= worse.min()
    best = worse.idxmin()
    good = worse <= tolerance * abs(means.loc[best, error])
    ranked = means.assign(group=worse.where(~good, 0), worse=worse)
    order = ranked.sort_values(["group", "latent_size", "parameters", "worse"], kind="stable").index
    return order.tolist(), best, good


def _close(rows: pd.DataFrame, pair: Paired, good: bool, tolerance: int | float) -> Criterion:
    """Whether a setting, a, is within the tolerance of the best, b, or beyond it, told from seed noise."""
    leads = NEITHER if good else pair.b
    told = leads if len(pair.seeds) >= LEAST_SEEDS and (good or pair.distinguishable) else UNDECIDED
    place = "within" if good else "beyond"
    words = f"{sentence(pair)}; {pair.percent[0]:+.2g} % of {pair.b}, {place} the tolerance of {100 * tolerance:g} %"
    return criterion_row(rows, f"{pair.a} close to the best", pair.figure, (pair.a, pair.b), told, leads, words, pair)


def _reason_of_many(
    means: pd.DataFrame, good: pd.Series, pairs: Mapping[str, Paired], winner: str, best: str, tolerance: int | float
) -> str:
    """Why the winner: its size, how good it is, and which smaller settings the seeds do not rule out."""
    error = means.columns[0]
    size = {name: tuple(means.loc[name, ["latent_size", "parameters"]]) for name in means.index}
    reached = {name: _least_worse(pair) <= tolerance * abs(pair.mean_b) for name, pair in pairs.items()}
    smaller = [name for name in pairs if not good[name] and size[name] < size[winner] and reached[name]]
    value, most = (f"{means.loc[name, error]:.4g}" for name in (winner, best))
    beside = (
        f"{value}, the best"
        if winner == best
        else f"{value} against {most} of {best} ({pairs[winner].percent[0]:+.2g} %)"
    )
    also = f"; smaller, and not ruled out by the seeds: {', '.join(smaller)}" if smaller else ""
    return (
        f"of the {good.sum()} settings (of {len(means)}) within {100 * tolerance:g} % of the best {error} it has the "
        f"smallest latent, {means.loc[winner, 'latent_size']:,.0f} numbers, then the fewest parameters, "
        f"{means.loc[winner, 'parameters']:,.0f}: {error} {beside}{also}"
    )


def _least_worse(pair: Paired) -> float:
    """How much worse a is than b, at the end of the interval that is kindest to a; NaN for one seed."""
    return -pair.high if higher_is_better(pair.figure) else pair.low


def _base(parameters: Mapping[str, Mapping[str, Any]], winner: str, names: Sequence[str]) -> dict[str, Any]:
    """The winner's parameters that the next experiment starts from, as plain values."""
    absent = [name for name in names if name not in parameters]
    if absent:
        raise DataError(
            f"parameters of {', '.join(absent)} are absent: must be given for every setting that is compared"
        )
    return _plain({key: value for key, value in parameters[winner].items() if key not in NOT_BASE})


def _plain(value: Any) -> Any:
    """Dicts, lists and Python's own numbers in place of mappings, tuples and NumPy's numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


# --- files ---


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write verdict.yaml, so that it holds either its old content or all of the new."""
    text = yaml.safe_dump(verdict.model_dump(), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(path, text.encode())


def read_verdict(path: Path) -> Verdict:
    """Read what `write_verdict` wrote, without running code from it.

    Raises:
        ConfigError: no such file, not YAML, or keys that are absent, unknown or of the wrong type.
    """
    remedy = "run the experiment that writes it again"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError([(str(path), "no such file; run the experiment that writes it first")]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([(str(path), f"damaged or not YAML ({reason}); {remedy}")]) from None
    rows = content.get("criteria") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _named(row) for row in [content, *rows]):
        raise ConfigError([(str(path), f"holds no verdict (keys and values, with a list of criteria); {remedy}")])
    try:
        return Verdict(**content | {"criteria": [Criterion(**row) for row in rows]})
    except ConfigError as error:
        raise error.at(f"{path} (damaged: {remedy})") from None


def _named(row: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in row)


# --- report ---


def report(
    question: str, rows: pd.DataFrame, verdict: Verdict, limits: Sequence[str] = (), floors: pd.DataFrame | None = None
) -> str:
    """The page report.md: the answer, every setting's figures, floors, criteria, stability, and what is left open.

    Args:
        question: What the experiment asked; the title.
        rows: One per run; figures in the order of their columns.
        verdict: See `decide_pair` and `decide_many`.
        limits: Sentences on the data, beside those on the statistics.
        floors: Figures of what costs no training, one row per floor, its name in the first column.
    """
    table = summarise(rows)
    figures = [name for name in rows if name in table and name not in ("seeds", *STABILITY)]
    failed = f"**Failed runs, in none of these figures: {', '.join(verdict.failed)}.**\n\n" if verdict.failed else ""
    seeds = len(verdict.seeds)
    criteria = [
        [row.criterion, row.favours if row.votes else f"{row.favours} (no vote)", _numbers(row, seeds)]
        for row in verdict.criteria
    ]
    settings = _spreads(table, ["seeds", *figures])
    sections = {
        "Settings": f"Mean ± standard deviation over seeds, where these differ.\n\n{settings}",
        "Floors": "Not measured." if floors is None else _floors(floors),
        "Criteria": _markdown(["criterion", "favours", "numbers"], criteria),
        "Stability": _spreads(table, [name for name in STABILITY if name in table]),
        "Limits": "\n".join(f"- {limit}" for limit in [*_limits(verdict), *limits]),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {question}\n\n{failed}{verdict.reason}\n\n{body}\n"


def _floors(floors: pd.DataFrame) -> str:
    """A figure a line, a floor a column."""
    table = floors.set_index(floors.columns[0])
    lines = [[label_of(name), *(spread(value, float("nan")) for value in table[name])] for name in table]
    return _markdown(["figure", *table.index], lines)


def _numbers(row: Criterion, n: int) -> str:
    """Figures of a comparison, its difference and interval; of a criterion without, its sentence."""
    if row.difference is None:
        return row.sentence
    values = [f"{name} {spread(mean, row.deviations[name] or 0)}" for name, mean in row.means.items()]
    base = abs(list(row.means.values())[-1])
    share = f", {100 * row.difference / base:+.2g} %" if base else ""
    interval = "" if row.low is None else f" (95 % interval {row.low:+.3g} to {row.high:+.3g})"
    p = "" if row.p is None or exact_test_is_silent(n) else f", p = {row.p:.3g}"
    return f"{row.figure}: {', '.join(values)}; difference {_difference(row)}{share}{interval}{p}"


def _spreads(table: pd.DataFrame, figures: Sequence[str]) -> str:
    """A figure a line, a setting a column."""
    if not figures:
        return "Not measured."
    lines = []
    for name in figures:
        if name == "seeds":
            cells = [f"{count}" for count in table[name]]
        else:
            cells = [spread(*pair) for pair in zip(table[name], table[f"{name}_sd"], strict=True)]
        lines.append([label_of(name), *cells])
    return _markdown(["figure", *table.index], lines)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _limits(verdict: Verdict) -> list[str]:
    """What the statistics leave open."""
    n, compared = len(verdict.seeds), sum(row.low is not None for row in verdict.criteria)
    if n < LEAST_SEEDS:
        return ["One common seed: the differences cannot be told from seed noise, and nothing here is decided."]
    exact = exact_test_is_silent(n) or "A difference counts where its interval leaves 0 out and p is at most 0.05"
    return [
        f"{n} seeds in common ({', '.join(map(str, verdict.seeds))}). {exact}.",
        "Intervals are those of Student's t, and hold for differences that are spread normally over seeds. Each of "
        f"{compared} misses the truth one time in 20 by itself; together they miss more often.",
        "Seeds change the training, not the data: nothing is said of other data or another split.",
    ] + [CAUTIONS[row.figure] for row in verdict.criteria if row.figure in CAUTIONS]
