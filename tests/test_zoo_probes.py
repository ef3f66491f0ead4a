from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_zoo import networks
from torch import Tensor

from workbench.datasets.flat_weights import flatten
from workbench.datasets.frames import DataError
from workbench.probes import ProbeResult
from workbench.rebuilding import Networks
from workbench.zoo_probes import (
    LATENT,
    STATISTICS,
    layer_statistics,
    numeric_properties,
    property_results,
    property_sentences,
    property_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS, EACH = 12, 4  # of each split


def zoo(split: str) -> tuple[Networks, Tensor]:
    """Networks whose property `gap` is the mean of their second layer, and `accuracy` one number per run."""
    seed = ["train", "test"].index(split)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(RUNS * EACH, 12, generator=generator)
    weights[:, 8:] += 3 * torch.randn(len(weights), 1, generator=generator)
    run = np.repeat(np.arange(RUNS), EACH)
    per_run = np.random.default_rng(seed).normal(size=RUNS)[run]
    columns = {"gap": weights[:, 8:].mean(1).tolist(), "accuracy": per_run.tolist(), "word": ["a"] * len(run)}
    found = networks(weights, [f"{split}-{i}" for i in run], {"first": 8, "second": 4}, **columns)
    which = torch.nn.functional.one_hot(torch.from_numpy(run + RUNS * seed), 2 * RUNS).float()
    return found, which


def test_statistics_of_a_known_layer() -> None:
    weights = torch.tensor([[0.0, 1, 2, 3, 4, -2, 2, 9, 9], [10, 0, 0, 0, 0, 1, 1, 9, 9]])
    layers = flatten({"first": torch.zeros(5), "none": torch.zeros(0), "second": torch.zeros(2, 1)})[1]
    found = layer_statistics(weights, layers)
    np.testing.assert_allclose(found[0], [0, 1, 2, 3, 4, 2, 2, *(-2, -1, 0, 1, 2, 0, 4)])
    np.testing.assert_allclose(found[1], [0, 0, 0, 0, 10, 2, 16, *(1, 1, 1, 1, 1, 1, 0)])


def test_statistics_do_not_depend_on_the_order_of_a_layers_weights() -> None:
    train, _ = zoo("train")
    layers = train.architectures[0].layers
    order = torch.cat([torch.randperm(8), 8 + torch.randperm(4)])
    np.testing.assert_allclose(
        layer_statistics(train.weights[:, order], layers), layer_statistics(train.weights, layers)
    )


def test_what_a_layers_mean_is_statistics_tell_and_a_latent_of_the_run_does_not() -> None:
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    results = property_results(train, test, z_train, z_test, ["gap"])
    assert list(results) == [("flat", "gap", name) for name in (LATENT, STATISTICS, "PCA-12")]
    assert results["flat", "gap", STATISTICS].score > 0.99 > 0.2 > results["flat", "gap", LATENT].score
    table = property_table(results)
    assert list(table.columns) == ["architecture", "target", "features", "score", "error", "runs", "best"]
    assert table.loc[table["best"], "features"].isin([STATISTICS, "PCA-12"]).all() and table["best"].sum() == 1
    assert table["runs"].tolist() == [RUNS] * 3  # those held out


def test_folds_divide_no_run() -> None:
    """A latent that is the run itself tells what is constant in each run, where folds divide runs, and only there."""
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    found = property_results(train, test, z_train, z_test, ["accuracy"])["flat", "accuracy", LATENT].score
    divided = [
        replace(part, table=part.table.assign(run=[f"{name}{i}" for i in range(len(part))]))
        for name, part in (("a", train), ("b", test))
    ]
    known = property_results(*divided, z_train, z_test, ["accuracy"])["flat", "accuracy", LATENT].score
    assert found < 0.1 and known > 0.5


def test_components_are_few_and_of_the_training_networks_alone() -> None:
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    names = [key[2] for key in property_results(train, test, z_train[:, :3], z_test[:, :3], ["gap"])]
    assert names == [LATENT, STATISTICS, "PCA-3"]
    few = replace(train, weights=train.weights[:36], architecture=train.architecture[:36], table=train.table[:36])
    assert "PCA-9" in [key[2] for key in property_results(few, test, z_train[:36], z_test, ["gap"])]
    away = replace(test, weights=test.weights + 100 * torch.eye(12)[0])  # along what no training network varies
    still = replace(train, weights=train.weights * (torch.arange(12) > 0))
    one = property_results(still, away, z_train[:, :1], z_test[:, :1], ["gap"])["flat", "gap", "PCA-1"]
    assert one.score > 0.9  # the one component is still the mean of the second layer


def test_properties_are_numbers_that_differ() -> None:
    train, _ = zoo("train")
    table = train.table.assign(epoch=25, good=[True, False] * (RUNS * EACH // 2))
    found = numeric_properties(replace(train, table=table), ["accuracy", "epoch", "gap", "good", "word", "absent"])
    assert found == ["accuracy", "gap"] == numeric_properties(train)
    message = "properties epoch, word: none is a number that differs .*; the networks have id, run, .*good; name one"
    with pytest.raises(DataError, match=message):
        numeric_properties(replace(train, table=table), ["epoch", "word"])
    with pytest.raises(DataError, match="properties word: none is a number"):
        property_results(train, train, *[torch.zeros(RUNS * EACH, 2)] * 2, ["gap", "word"])


def test_the_winner_and_the_sentences() -> None:
    folds = {LATENT: (0.5, 0.6, 0.7), STATISTICS: (0.8, 0.9, 1.0), "PCA-2": (0.5, 0.65, 0.65)}
    results = {
        ("mlp", "gap", name): ProbeResult("linear", "R²", float(np.mean(values)), values, 0.0, 9)
        for name, values in folds.items()
    }
    table = property_table(results)
    assert table["best"].tolist() == [False, True, False] and table["runs"].eq(9).all()
    pd.testing.assert_series_equal(table["score"], pd.Series([0.6, 0.9, 0.6]), check_names=False)
    first, second = property_sentences(results)
    assert first.startswith("gap of mlp networks: the latent tells less than s(W): R² 0.60 against 0.90, difference")
    assert second.startswith("gap of mlp networks: the latent is not distinguishable from PCA-2: ")
