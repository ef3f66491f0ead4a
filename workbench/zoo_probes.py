"""Properties of networks told from their weights: from a latent, from statistics of layers, and from PCA.

Source: Unterthiner et al. 2020, Predicting neural network accuracy from weights (arXiv 2002.11448).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from torch import Tensor

from workbench.datasets.flat_weights import Architecture, LayerInfo
from workbench.datasets.frames import DataError
from workbench.probes import ProbeError, ProbeResult, advantage_sentence, probe
from workbench.rebuilding import Networks, matched, spans, weight_pca

PROPERTIES = ("accuracy", "epoch", "gap")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
LATENT, STATISTICS = "latent", "s(W)"
NETWORKS_PER_COMPONENT = 4  # of the PCA, at least
LEAST_RUNS = 3  # held out, that a property is judged on
LEVEL = 0.05  # of comparisons that stand out where there is no difference
UNIT = "training runs"

Results = Mapping[tuple[str, str, str], ProbeResult]
"""By architecture, property and features."""


def layer_statistics(weights: Float[Tensor, "n d"], layers: Sequence[LayerInfo]) -> Float64[np.ndarray, "n s"]:
    """s(W): minimum, quartiles, maximum, mean and variance of the weights of each layer that has any, layer by layer.

    Source: Unterthiner et al. 2020.
    """
    columns = []
    for span in spans([layer for layer in layers if layer.size]):
        values = weights[:, span].double().numpy()
        columns += [*np.quantile(values, QUANTILES, axis=1), values.mean(1), values.var(1)]
    return np.stack(columns, axis=1)


def default_properties(networks: Networks) -> list[str]:
    """Those of accuracy, epoch and gap that the networks have."""
    return [name for name in PROPERTIES if name in networks.table]


def numeric_properties(networks: Networks, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those properties that are numbers, and a note on each that is not.

    Raises:
        DataError: networks have no such property, or it is not finite in one of them.
    """
    table, found, notes = networks.table, [], []
    for name in names:
        if name not in table:
            raise DataError(f"property {name!r}: the networks have {', '.join(table.columns)}; name one of these")
        if not is_numeric_dtype(table[name]) or is_bool_dtype(table[name]):
            notes.append(f"{name} is not probed: its values, such as {table[name].iloc[0]}, are no numbers")
            continue
        broken = np.flatnonzero(~np.isfinite(table[name].to_numpy(float)))
        if len(broken):
            network, value = table["id"].iloc[broken[0]], table[name].iloc[broken[0]]
            raise DataError(
                f"property {name!r} of network {network!r} is {value}: must be finite to be probed; correct it, or "
                "leave the property out"
            )
        found.append(name)
    return found, notes


def property_results(
    train: Networks,
    test: Networks,
    z_train: Float[Tensor, "n k"],
    z_test: Float[Tensor, "m k"],
    names: Sequence[str],
    folds: int = 5,
    seed: int = 0,
) -> tuple[dict[tuple[str, str, str], ProbeResult], list[str]]:
    """How well ridge tells properties of held-out networks from three kinds of features; see `probes.probe`.

    The features: the latent; s(W); and coordinates along principal components of the training networks' weights, as
    many as the latent has dimensions but at most a quarter of the networks. Only held-out networks are judged, as the
    model and the PCA have not seen them; their training runs are divided into folds, and training networks help to fit.

    Args:
        z_train, z_test: Latents, here posterior means.
        names: Properties, such as `default_properties`.
        folds: At most one for each held-out training run.

    Returns:
        R² by architecture, property, and features (`latent`, `s(W)`, `PCA-k`); and a note on each property that is left
        out, in one architecture or in all: no number, constant, or of fewer than 3 held-out training runs.

    Raises:
        DataError: see `numeric_properties`; latents that are not finite; an architecture without training networks.
    """
    (names, notes), results = numeric_properties(test, names), {}
    numeric_properties(train, names)
    for architecture, rows, of_train in matched(train, test) if names else ():
        runs = test.table["run"].iloc[rows].nunique()
        if runs < LEAST_RUNS:
            notes.append(
                f"no property of {architecture.name} networks is probed: {runs} training runs are held out, "
                f"and must be at least {LEAST_RUNS}"
            )
            continue
        features = _features(train, test, z_train, z_test, architecture, rows, of_train)
        table = pd.concat([train.table.iloc[of_train], test.table.iloc[rows]])
        known = (table["run"].factorize()[0], "linear", folds, seed, np.arange(len(table)) >= len(of_train), UNIT)
        for name in names:
            target = table[name].to_numpy(float)
            try:
                found = {(architecture.name, name, of): probe(x, target, *known) for of, x in features.items()}
            except ProbeError as error:
                notes.append(f"{name} of {architecture.name} networks is not probed: {error}")
            else:
                results |= found
    return results, notes


def _features(
    train: Networks,
    test: Networks,
    z_train: Tensor,
    z_test: Tensor,
    architecture: Architecture,
    rows: np.ndarray,
    of_train: np.ndarray,
) -> dict[str, np.ndarray | Tensor]:
    """Of training networks of one architecture, then of the held-out ones."""
    weights = torch.cat([train.weights[of_train], test.weights[rows]])[:, : architecture.size]
    k = min(z_train.shape[1], max(1, len(of_train) // NETWORKS_PER_COMPONENT))
    pca = weight_pca(weights[: len(of_train)], k)
    return {
        LATENT: torch.cat([z_train[of_train], z_test[rows]]),
        STATISTICS: layer_statistics(weights, architecture.layers),
        f"PCA-{len(pca.components)}": pca.encode(weights),
    }


def property_table(results: Results) -> pd.DataFrame:
    """R² of every probe, and which features win.

    Returns:
        Columns architecture, target, features, score, error (standard error by the jackknife over training runs), runs
        (judged), folds, and best (true of the highest score for each target).
    """
    rows = [(*key, found.score, found.error, found.n_groups, found.folds) for key, found in results.items()]
    columns = ["architecture", "target", "features", "score", "error", "runs", "folds"]
    table = pd.DataFrame(rows, columns=columns)
    highest = table.groupby(["architecture", "target"])["score"].transform("max")
    return table.assign(best=table["score"] == highest)


def property_sentences(results: Results) -> list[str]:
    """Whether the latent tells each property better than the other features do, judged on the same runs.

    A last sentence says how many comparisons these are, and how many chance alone would let stand out.
    """
    said = [
        f"{name} of {architecture} networks: "
        + advantage_sentence(results[architecture, name, LATENT], found, ("the latent", source))
        for (architecture, name, source), found in results.items()
        if source != LATENT
    ]
    by_chance = f"{len(said)} comparisons at 95 %: were there no differences, about {len(said) * LEVEL:.2g} of them "
    return [*said, by_chance + "would be expected to stand out by chance alone"] if said else []
