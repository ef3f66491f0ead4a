"""What networks decoded from latents do on the digits held out: rebuilt ones, and those between two.

Sources:
    Efron & Tibshirani 1993, An introduction to the bootstrap, chapter 13 (percentiles).
    Student 1908, The probable error of a mean (paired differences).
    Entezari et al. 2022, The role of permutation invariance in linear mode connectivity, section 2 (barrier).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from scipy.stats import t
from torch import Tensor, nn

from workbench.datasets.flat_weights import Architecture
from workbench.datasets.frames import DataError
from workbench.datasets.weights import Weights
from workbench.datasets.zoo_networks import NETWORKS, digits, logits, runnable
from workbench.interpolation import lerp, random_pairs
from workbench.rebuilding import ALL, MEAN, Methods, Networks, rebuild, spans

GOAL = 0.95
"""Share of its original's accuracy that a rebuilt network should keep."""
DRAWS = 2000  # of the bootstrap
FIGURES = ("accuracy", "agreement")
"""By which methods are compared, in `winner_table`."""
SAME = "not distinguishable"
DIGITS = "digits"
"""Value of the property `dataset` of networks that can be run here."""


def why_not_run(data: Weights) -> str:
    """Why networks cannot be run here: an architecture or dataset of one of them is another; empty where they can."""
    for architecture in data.architectures:
        layers = {layer.name: layer.shape for layer in architecture.layers}
        if runnable(layers) is None:
            return f"its architecture {architecture.name!r} is none of digits-zoo ({', '.join(NETWORKS)})"
    known = data.rows
    named = known["dataset"].fillna("unknown data").astype(str) if "dataset" in known else []
    others = sorted(set(named) - {DIGITS})
    return f"its networks were trained on {', '.join(others)}, not on {DIGITS}" if others else ""


# --- rebuilt ---


@torch.no_grad()
def predict(
    weights: Float[Tensor, "n d"], architecture: Int[np.ndarray, " n"], architectures: Sequence[Architecture]
) -> Int[np.ndarray, "n b"]:
    """Class into which each network puts each of the digits held out.

    Raises:
        DataError: networks of an architecture that is none of the embedded zoo.
    """
    x = digits().test_x
    predicted = np.empty((len(weights), len(x)), int)
    for i in np.unique(architecture):
        rows = np.flatnonzero(architecture == i)
        predicted[rows] = logits(*as_states(weights[rows], architectures[i]), x).argmax(-1).numpy()
    return predicted


def share_correct(predicted: Int[np.ndarray, "n b"]) -> Float64[np.ndarray, " n"]:
    """Accuracy of networks whose classes of the digits held out these are."""
    return (predicted == digits().test_y.numpy()).mean(1)


def as_states(weights: Float[Tensor, "n d"], architecture: Architecture) -> tuple[dict[str, Tensor], str]:
    """One state dict with a leading axis over networks of one architecture, and what it is called in `NETWORKS`.

    Raises:
        DataError: it is none of these.
    """
    name = runnable({layer.name: layer.shape for layer in architecture.layers})
    if name is None:
        layers = ", ".join(f"{layer.name} {list(layer.shape)}" for layer in architecture.layers)
        raise DataError(
            f"architecture {architecture.name!r} ({layers}) cannot be run: only those of digits-zoo can "
            f"({', '.join(NETWORKS)}); leave its networks out, or judge their weights alone"
        )
    parts = zip(architecture.layers, spans(architecture.layers), strict=True)
    return {layer.name: weights[:, s].reshape(-1, *layer.shape) for layer, s in parts}, name


def accuracies(networks: Networks, methods: Methods) -> pd.DataFrame:
    """What each method makes of each network, run on the digits held out.

    Returns:
        Columns method, id, run, architecture; original (the network's own accuracy), accuracy, kept (accuracy /
        original; NaN where that is 0), agreement (share of the digits that are put into the class into which the
        original puts them), and epoch where networks have it. One row per method and network, in their order.

    Raises:
        DataError: an architecture that is none of the embedded zoo.
    """
    kinds = networks.architecture, networks.architectures
    predicted = predict(networks.weights, *kinds)
    known = {name: networks.table[name].to_numpy() for name in ("id", "run")}
    known["architecture"] = np.array([architecture.name for architecture in kinds[1]], object)[kinds[0]]
    known["original"] = share_correct(predicted)
    parts = []
    for method, x_hat in methods.items():
        rebuilt = predict(x_hat, *kinds)
        figures = {"accuracy": share_correct(rebuilt), "agreement": (rebuilt == predicted).mean(1)}
        parts.append(pd.DataFrame({"method": method, **known, **figures}))
    rows = pd.concat(parts, ignore_index=True)
    rows.insert(6, "kept", (rows["accuracy"] / rows["original"]).where(rows["original"] > 0))
    if "epoch" in networks.table:
        rows["epoch"] = np.tile(networks.table["epoch"].to_numpy(), len(methods))
    return rows


def kept_table(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What the median network keeps of its original's accuracy, by method and architecture, from `accuracies`.

    More than all is kept where a network becomes better than it was; only agreement tells whether it is the same one.

    Returns:
        Index method, architecture (`all` where there are several); columns kept (median), low, high (95 % interval of
        the median by the bootstrap over runs), keep_95 (share of networks that keep 95 % or more); mean_original,
        mean_accuracy, mean_agreement (over networks); networks, runs. Networks without `kept` are left out.
    """
    everything = [rows.assign(architecture=ALL)] if rows["architecture"].nunique() > 1 else []
    both = pd.concat([rows, *everything]).dropna(subset="kept")
    parts = {}
    for key, part in both.groupby(["method", "architecture"], sort=False):
        low, high = _interval(part["kept"].to_numpy(), part["run"].to_numpy(), seed)
        parts[key] = {
            "kept": part["kept"].median(),
            "low": low,
            "high": high,
            "keep_95": (part["kept"] >= GOAL).mean(),
            **part[["original", "accuracy", "agreement"]].mean().add_prefix("mean_"),
            "networks": len(part),
            "runs": part["run"].nunique(),
        }
    table = pd.DataFrame.from_dict(parts, orient="index").astype({"networks": int, "runs": int})
    return table.rename_axis(index=["method", "architecture"])


def _interval(values: np.ndarray, run: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the median of all values, whole runs being drawn anew."""
    order = np.argsort(values, kind="stable")
    values, (names, number) = values[order], np.unique(run[order], return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), DRAWS)
    below = drawn[:, number].cumsum(1)  # values drawn up to each one, (DRAWS, n)
    half = below[:, -1:] / 2
    medians = (values[(below >= half).argmax(1)] + values[(below > half).argmax(1)]) / 2
    return tuple(np.percentile(medians, [2.5, 97.5]).tolist())


def kept_sentence(rows: pd.DataFrame, method: str, seed: int = 0) -> str:
    """Whether the median network that a method rebuilds keeps 95 % of its original's accuracy, with its numbers.

    "At least" and "less than" need a 95 % interval (bootstrap over runs) that lies wholly on that side.
    """
    found = kept_table(rows[rows["method"] == method].assign(architecture=ALL), seed).loc[(method, ALL)]
    kept, low, high, agreement = (100 * found[["kept", "low", "high", "mean_agreement"]]).round(1)
    subject, goal = f"the median network rebuilt by {method} keeps", f"{100 * GOAL:.0f} % of its original's accuracy"
    size = f"{found['networks']:.0f} networks"
    mean = f"the mean agreement with originals is {agreement} % of the digits"
    if found["runs"] < 2:
        return f"{subject} {kept} %; whether it keeps {goal} cannot be told from one run ({size}); {mean}"
    sides = found["low"] >= GOAL, found["high"] < GOAL
    word = "at least" if sides[0] else "less than" if sides[1] else "a share not distinguishably above or below"
    interval = f"{kept} % (95 % interval {low} to {high} % over {found['runs']:.0f} runs, {size})"
    return f"{subject} {word} {goal}: {interval}; {mean}"


def epoch_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Median `kept` by method and epoch, from `accuracies` of networks that have epochs; how many there are, last.

    Raises:
        DataError: networks have no epoch.
    """
    if "epoch" not in rows:
        raise DataError("networks have no property 'epoch': needs it; leave this table out")
    table = rows.pivot_table(index="method", columns="epoch", values="kept", aggfunc="median", sort=False)
    table.loc["networks"] = rows.drop_duplicates("id")["epoch"].value_counts()
    return table.sort_index(axis=1)


def winner_table(rows: pd.DataFrame, one: str) -> pd.DataFrame:
    """Accuracy and agreement of a method beside every other one, paired by run, from `accuracies`.

    Each figure is the mean over the networks of a run, then over runs. A winner needs a 95 % interval of Student's t
    over runs that leaves a difference of 0 out.

    Returns:
        Index figure, against (the other method); columns one, other (the two figures), difference, half (of the
        interval; NaN of one run), runs, networks, winner (a method, or `not distinguishable`).
    """
    means = rows.groupby(["run", "method"])[list(FIGURES)].mean().unstack("method")
    found = {}
    for figure in FIGURES:
        for other in rows["method"].unique():
            if other != one:
                a, b = means[figure, one], means[figure, other]
                mean, half = _paired((a - b).to_numpy())
                winner = one if mean > half else other if mean < -half else SAME
                found[figure, other] = (a.mean(), b.mean(), mean, half, len(a), rows["id"].nunique(), winner)
    columns = ["one", "other", "difference", "half", "runs", "networks", "winner"]
    index = pd.MultiIndex.from_tuples(found, names=["figure", "against"])
    return pd.DataFrame(list(found.values()), index, columns)


def accuracy_sentence(rows: pd.DataFrame, one: str, other: str) -> str:
    """Whether what one method rebuilds is more accurate than what another does, and agrees more; see `winner_table`."""
    table = winner_table(rows[rows["method"].isin([one, other])], one)
    parts = []
    for figure in FIGURES:
        row = table.loc[(figure, other)]
        words = {one: "higher", other: "lower", SAME: "not distinguishable"}
        word = "cannot be told apart on one run" if row["runs"] < 2 else words[row["winner"]]
        difference = f"{row['difference']:+.3f}" + ("" if row["runs"] < 2 else f" ± {row['half']:.3f}")
        parts.append(f"{figure} {row['one']:.3f} against {row['other']:.3f}, {word} (difference {difference})")
    one, other = (f"the {name}" if name == MEAN else name for name in (one, other))
    return f"{one} against {other}: {'; '.join(parts)}; 95 % over {row['runs']} runs, {row['networks']} networks"


def _paired(difference: np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95 % interval of Student's t; NaN of one value."""
    n = len(difference)
    half = t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
    return float(difference.mean()), float(half)


# --- between two ---


def choose_pairs(networks: Networks, pairs: int, seed: int = 0) -> tuple[list[list[int]], list[str]]:
    """Positions of pairs of networks of one architecture and two runs; each run is in one pair at most.

    Of each run it is the network of the highest `epoch`, or the first one where networks have none.

    Args:
        pairs: Of each architecture; as many as asked for, or as there are runs.

    Returns:
        The pairs, and a sentence on each architecture that is left out as its networks are of one run.

    Raises:
        DataError: no architecture has networks of two runs.
    """
    generator, chosen, notes = torch.Generator().manual_seed(seed), [], []
    for architecture, rows in networks.each():
        table = networks.table.iloc[rows].reset_index(drop=True)
        if table["run"].nunique() < 2:
            notes.append(f"architecture {architecture.name!r} has one run held out: a path needs two; it is left out")
            continue
        epoch = table["epoch"] if "epoch" in table else pd.Series(0, table.index)
        last = rows[epoch.fillna(-np.inf).groupby(table["run"]).idxmax().to_numpy()]
        chosen += [last[pair].tolist() for pair in random_pairs(len(last), pairs, generator)]
    if not chosen:
        raise DataError(
            f"no architecture has held-out networks of two runs ({len(networks)} networks in all): a path needs these; "
            "raise eval_samples, or the share held out"
        )
    return chosen, notes


def path_accuracies(
    model: nn.Module,
    data: Weights,
    networks: Networks,
    z: Float[Tensor, "n k"],
    pairs: Sequence[Sequence[int]],
    steps: int,
    batch_size: int = 256,
) -> dict[str, Float64[np.ndarray, "p steps"]]:
    """Accuracy on straight lines between two networks, one row per pair.

    Args:
        model, data, batch_size: See `rebuilding.rebuild`.
        z: Latents of the networks.
        pairs: Positions of two networks of one architecture, see `choose_pairs`.
        steps: Points of a path, evenly spaced, both ends included.

    Returns:
        `in latents`: decoded points between their latents. `in weights`: points between their weights. `in rebuilt
        weights`: between the weights of the two rebuilt networks, which is where the first one begins and ends.

    Raises:
        ValueError: a pair of two architectures.
        DataError: an architecture that is none of the embedded zoo.
    """
    position = torch.linspace(0, 1, steps)
    a, b = np.array(pairs).T
    mixed = np.flatnonzero(networks.architecture[a] != networks.architecture[b])
    if len(mixed):
        raise ValueError(f"pair {pairs[mixed[0]]}: must be of one architecture; take those of choose_pairs")
    architecture = np.repeat(networks.architecture[a], steps)
    ends = [rebuild(model, data, z[end], networks.architecture[end], batch_size) for end in (a, b)]
    lines = {
        "in latents": rebuild(model, data, _lines(z[a], z[b], position), architecture, batch_size),
        "in weights": _lines(networks.weights[a], networks.weights[b], position),
        "in rebuilt weights": _lines(*ends, position),
    }
    return {
        name: share_correct(predict(weights, architecture, networks.architectures)).reshape(len(a), steps)
        for name, weights in lines.items()
    }


def _lines(a: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """Points on the lines between rows of a and b, pair by pair."""
    return torch.cat([lerp(*ends, position) for ends in zip(a, b, strict=True)])


def barriers(path: Float[np.ndarray, "p steps"]) -> Float[np.ndarray, " p"]:
    """How far each path falls below the straight line between the accuracies of its ends, where it falls most.

    Source: Entezari et al. 2022, section 2, there of the loss.
    """
    position = np.linspace(0, 1, path.shape[1])
    line = (1 - position) * path[:, :1] + position * path[:, -1:]
    return (line - path).max(1)


def path_table(paths: Mapping[str, Float[np.ndarray, "p steps"]]) -> pd.DataFrame:
    """Means over pairs by path: accuracy of the ends, lowest accuracy, barrier, and its standard error over pairs."""
    rows = {
        name: {
            "ends": path[:, [0, -1]].mean(),
            "lowest": path.min(1).mean(),
            "barrier": barriers(path).mean(),
            "barrier_se": pd.Series(barriers(path)).sem(),
            "pairs": len(path),
        }
        for name, path in paths.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("path").astype({"pairs": int})


def path_sentence(paths: Mapping[str, Float[np.ndarray, "p steps"]], one: str, other: str) -> str:
    """Whether the barrier is lower on one path than on another, with its numbers; not where their ends differ.

    Where the ends of a path classify little there is little to fall, so that barriers of paths between other ends do
    not compare. "Lower", "higher" and "differ" need a 95 % interval of Student's t over pairs that leaves 0 out.
    """
    n = len(paths[one])
    ends, heights = ([f(paths[name]) for name in (one, other)] for f in (_ends, barriers))
    gap, gap_half = _paired(ends[0] - ends[1])
    mean, half = _paired(heights[0] - heights[1])
    at = " and ".join(f"{values.mean():.3f}" for values in ends)
    numbers = f"{heights[0].mean():.3f} against {heights[1].mean():.3f} of accuracy (ends at {at})"
    if n < 2:
        return f"the barriers {one} and {other} cannot be told apart on one pair: {numbers}"
    over = f"(95 % over {n} pairs)"
    if abs(gap) > gap_half:
        return (
            f"the barriers {one} and {other} do not compare, as their ends differ: accuracy {at}, difference "
            f"{gap:+.3f} ± {gap_half:.3f} {over}"
        )
    word = "lower than" if mean < -half else "higher than" if mean > half else "not distinguishable from"
    return f"the barrier {one} is {word} that {other}: {numbers}, difference {mean:+.3f} ± {half:.3f} {over}"


def _ends(path: np.ndarray) -> np.ndarray:
    """Mean accuracy of the two ends of each path, (p,)."""
    return path[:, [0, -1]].mean(1)
