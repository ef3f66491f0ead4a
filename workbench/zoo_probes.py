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

from workbench.datasets.flat_weights import LayerInfo
from workbench.datasets.frames import DataError
from workbench.probes import ProbeResult, advantage_sentence, probe
from workbench.rebuilding import Networks, matched, spans, weight_pca

PROPERTIES = ("accuracy", "epoch", "gap")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
LATENT, STATISTICS = "latent", "s(W)"
NETWORKS_PER_COMPONENT = 4  # of the PCA, at least

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


def numeric_properties(networks: Networks, names: Sequence[str] = PROPERTIES) -> list[str]:
    """Those properties that are numbers and differ between the networks of each architecture.

    Raises:
        DataError: none of them is.
    """
    table, found = networks.table, []
    for name in names:
        if name in table and is_numeric_dtype(table[name]) and not is_bool_dtype(table[name]):
            values = [table[name].iloc[rows] for _, rows in networks.each()]
            found += [name] if all(part.nunique(dropna=False) > 1 for part in values) else []
    if not found:
        raise DataError(
            f"properties {', '.join(names)}: none is a number that differs between networks of every architecture; "
            f"the networks have {', '.join(table.columns)}; name one of these that is"
        )
    return found


def property_results(
    train: Networks,
    test: Networks,
    z_train: Float[Tensor, "n k"],
    z_test: Float[Tensor, "m k"],
    names: Sequence[str],
    folds: int = 5,
    seed: int = 0,
) -> dict[tuple[str, str, str], ProbeResult]:
    """How well ridge tells properties of held-out networks from three kinds of features; see `probes.probe`.

    The features: the latent; s(W); and coordinates along principal components of the training networks' weights, as
    many as the latent has dimensions but at most a quarter of the networks. Folds of the cross-validation divide no
    training run. Only held-out networks are judged, as the model and the PCA have not seen them; training networks
    help to fit.

    Args:
        z_train, z_test: Latents, here posterior means.
        names: Properties, see `numeric_properties`.

    Returns:
        R² by architecture, property, and features (`latent`, `s(W)`, `PCA-k`).

    Raises:
        DataError: a property is no number, not finite, or constant; fewer runs than folds; an architecture without
            training networks.
    """
    results = {}
    for name in names:
        numeric_properties(test, [name])
    for architecture, rows, of_train in matched(train, test):
        table = pd.concat([train.table.iloc[of_train], test.table.iloc[rows]])
        weights = torch.cat([train.weights[of_train], test.weights[rows]])[:, : architecture.size]
        runs, judged = table["run"].factorize()[0], np.arange(len(table)) >= len(of_train)
        pca = weight_pca(weights[~judged], min(z_train.shape[1], max(1, len(of_train) // NETWORKS_PER_COMPONENT)))
        features = {
            LATENT: torch.cat([z_train[of_train], z_test[rows]]),
            STATISTICS: layer_statistics(weights, architecture.layers),
            f"PCA-{len(pca.components)}": pca.encode(weights),
        }
        for name in names:
            target = table[name].to_numpy(float)
            for source, x in features.items():
                results[architecture.name, name, source] = probe(x, target, runs, "linear", folds, seed, judged)
    return results


def property_table(results: Results) -> pd.DataFrame:
    """R² of every probe, and which features win.

    Returns:
        Columns architecture, target, features, score, error (standard error over the folds), runs (judged), and best
        (true of the highest score for each target).
    """
    rows = [(*key, found.score, found.error, found.n_groups) for key, found in results.items()]
    table = pd.DataFrame(rows, columns=["architecture", "target", "features", "score", "error", "runs"])
    highest = table.groupby(["architecture", "target"])["score"].transform("max")
    return table.assign(best=table["score"] == highest)


def property_sentences(results: Results) -> list[str]:
    """Whether the latent tells each property better than the other features do, on the same folds."""
    return [
        f"{name} of {architecture} networks: "
        + advantage_sentence(results[architecture, name, LATENT], found, ("the latent", source))
        for (architecture, name, source), found in results.items()
        if source != LATENT
    ]
