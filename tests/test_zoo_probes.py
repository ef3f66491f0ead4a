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
    default_properties,
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
    results, notes = property_results(train, test, z_train, z_test, ["gap"])
    assert notes == [] and list(results) == [("flat", "gap", name) for name in (LATENT, STATISTICS, "PCA-12")]
    assert results["flat", "gap", STATISTICS].score > 0.99 > 0.2 > results["flat", "gap", LATENT].score
    table = property_table(results)
    assert list(table.columns) == ["architecture", "target", "features", "score", "error", "runs", "folds", "best"]
    assert table.loc[table["best"], "features"].isin([STATISTICS, "PCA-12"]).all() and table["best"].sum() == 1
    assert table["runs"].eq(RUNS).all() and table["folds"].eq(5).all()  # runs held out
    assert {found.unit for found in results.values()} == {"training runs"}


def test_folds_divide_no_run() -> None:
    """A latent that is the run itself tells what is constant in each run, where folds divide runs, and only there."""
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    found = property_results(train, test, z_train, z_test, ["accuracy"])[0]["flat", "accuracy", LATENT].score
    divided = [
        replace(part, table=part.table.assign(run=[f"{name}{i}" for i in range(len(part))]))
        for name, part in (("a", train), ("b", test))
    ]
    known = property_results(*divided, z_train, z_test, ["accuracy"])[0]["flat", "accuracy", LATENT].score
    assert found < 0.1 and known > 0.5


def test_components_are_few_and_of_the_training_networks_alone() -> None:
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    names = [key[2] for key in property_results(train, test, z_train[:, :3], z_test[:, :3], ["gap"])[0]]
    assert names == [LATENT, STATISTICS, "PCA-3"]
    few = replace(train, weights=train.weights[:36], architecture=train.architecture[:36], table=train.table[:36])
    assert "PCA-9" in [key[2] for key in property_results(few, test, z_train[:36], z_test, ["gap"])[0]]
    away = replace(test, weights=test.weights + 100 * torch.eye(12)[0])  # along what no training network varies
    still = replace(train, weights=train.weights * (torch.arange(12) > 0))
    one = property_results(still, away, z_train[:, :1], z_test[:, :1], ["gap"])[0]["flat", "gap", "PCA-1"]
    assert one.score > 0.9  # the one component is still the mean of the second layer


def test_properties_are_numbers() -> None:
    train, _ = zoo("train")
    table = train.table.assign(epoch=25, good=[True, False] * (RUNS * EACH // 2))
    found, notes = numeric_properties(replace(train, table=table), ["accuracy", "epoch", "good", "word"])
    assert found == ["accuracy", "epoch"]
    assert notes == [
        "good is not probed: its values, such as True, are no numbers",
        "word is not probed: its values, such as a, are no numbers",
    ]
    assert default_properties(train) == ["accuracy", "gap"] and numeric_properties(train, []) == ([], [])


def test_misspelt_properties_and_those_that_are_not_finite_are_refused() -> None:
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    with pytest.raises(DataError, match="property 'acuracy': the networks have id, run, .*gap, accuracy, word; name"):
        property_results(train, test, z_train, z_test, ["gap", "acuracy"])
    for place, known in enumerate((train, test)):
        table = known.table.assign(gap=known.table["gap"].where(known.table["id"] != "n7"))
        parts = [train, test]
        parts[place] = replace(known, table=table)
        with pytest.raises(DataError, match="property 'gap' of network 'n7' is nan: must be finite to be probed; corr"):
            property_results(*parts, z_train, z_test, ["accuracy", "gap"])


def test_what_cannot_be_probed_of_one_architecture_is_left_out_with_a_note() -> None:
    """Networks of a second architecture are all of one epoch; held out are 3 runs of the first, of the other 2."""
    (train, z_train), (test, z_test) = ((two(part), z) for part, z in (zoo("train"), zoo("test")))
    train.table["epoch"] = test.table["epoch"] = np.where(np.arange(RUNS * EACH) % 2, 25, np.arange(RUNS * EACH))
    results, notes = property_results(train, test, z_train, z_test, ["gap", "epoch", "word"])
    assert list(dict.fromkeys(key[:2] for key in results)) == [("flat", "gap"), ("flat", "epoch"), ("other", "gap")]
    assert notes == [
        "word is not probed: its values, such as a, are no numbers",
        "epoch of other networks is not probed: target has the same value in every sample: a probe needs it to differ; "
        "choose another",
    ]
    few = [i for i in range(3 * EACH) if i < 2 * EACH or i % 2 == 0]
    small = replace(
        test, weights=test.weights[few], architecture=test.architecture[few], table=test.table.iloc[few].reset_index()
    )
    results, notes = property_results(train, small, z_train, z_test[few], ["gap"])
    assert {key[0] for key in results} == {"flat"} and (
        property_table(results)[["runs", "folds"]] == 3
    ).to_numpy().all()
    assert notes == ["no property of other networks is probed: 2 training runs are held out, and must be at least 3"]


def two(known: Networks) -> Networks:
    """Every second network is of an architecture of another name."""
    other = replace(known.architectures[0], name="other")
    return replace(known, architecture=np.arange(len(known)) % 2, architectures=[*known.architectures, other])


def test_of_no_properties_there_are_no_results() -> None:
    (train, z_train), (test, z_test) = zoo("train"), zoo("test")
    assert property_results(train, test, z_train, z_test, []) == ({}, [])
    assert property_table({}).empty and "best" in property_table({}) and property_sentences({}) == []


def test_the_winner_and_the_sentences() -> None:
    without = {LATENT: (0.59, 0.6, 0.61), STATISTICS: (0.89, 0.9, 0.91), "PCA-2": (0.61, 0.6, 0.59)}
    results = {
        ("mlp", "gap", name): ProbeResult("linear", "R²", values[1], values, 0.0, 3, "training runs")
        for name, values in without.items()
    }
    table = property_table(results)
    assert table["best"].tolist() == [False, True, False]
    assert table["runs"].eq(3).all() and table["folds"].eq(3).all()
    pd.testing.assert_series_equal(table["score"], pd.Series([0.6, 0.9, 0.6]), check_names=False)
    np.testing.assert_allclose(table["error"], np.sqrt(2 / 3 * 0.0002))
    first, second, last = property_sentences(results)
    assert first == (
        "gap of mlp networks: the latent tells less than s(W): R² 0.600 against 0.900, difference -0.300 ± 0.000 "
        "(95 % over 3 training runs)"
    )
    assert second.startswith("gap of mlp networks: the latent is not distinguishable from PCA-2: ")
    assert last == (
        "2 comparisons at 95 %: were there no differences, about 0.1 of them would be expected to stand out by chance "
        "alone"
    )
