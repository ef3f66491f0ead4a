from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_zoo import Copy, Zoo, networks, open_tiny_zoo
from torch import Tensor

from workbench import decoded_networks
from workbench.comparison import encode_split
from workbench.datasets.flat_weights import Architecture, flatten
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_networks import accuracy, build_mlp, digits
from workbench.decoded_networks import (
    accuracies,
    accuracy_sentence,
    barriers,
    choose_pairs,
    epoch_table,
    kept_sentence,
    kept_table,
    path_accuracies,
    path_sentence,
    path_table,
    predict,
    share_correct,
    winner_table,
)
from workbench.rebuilding import ALL, Networks, rebuild

pytestmark = pytest.mark.usefixtures("one_thread")
MLP = Architecture("small", flatten(build_mlp().state_dict())[1])
SHARE = torch.bincount(digits().test_y, minlength=10).double() / len(digits().test_y)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return open_tiny_zoo(tmp_path_factory.mktemp("zoo"))


def stubborn(*classes: int) -> Tensor:
    """MLPs that put every digit into one class, with some padding."""
    weights = torch.zeros(len(classes), MLP.size + 3)
    weights[range(len(classes)), torch.tensor(classes) + MLP.size - 10] = 1.0  # the last layer is output.bias
    return weights


def mlps(weights: Tensor, runs: list[str]) -> Networks:
    table = pd.DataFrame({"id": [f"n{i}" for i in range(len(runs))], "run": runs})
    return Networks(weights, np.zeros(len(runs), int), [MLP], table)


def kept_rows(kept: list[float], runs: list[str], **columns: str) -> pd.DataFrame:
    known = {"method": "VAE", "id": "x", "architecture": "mlp", "original": 0.8, "accuracy": 0.4, "agreement": 0.6}
    return pd.DataFrame({"kept": kept, "run": runs} | known | columns)


# --- rebuilt ---


def test_networks_are_run_as_what_they_are(zoo: Zoo) -> None:
    """Also where architectures are mixed: as the state dicts of their files are."""
    found = share_correct(predict(zoo.test.weights, zoo.test.architecture, zoo.test.architectures))
    split, data = zoo.data.split("test"), digits()
    for architecture, rows in zoo.test.each():
        states = [split.state_dict(int(i)) for i in rows]
        expected = accuracy(states, architecture.name, data.test_x, data.test_y)
        assert found[rows].tolist() == expected.tolist()
    assert len(np.unique(found)) > 5


def test_accuracy_of_stubborn_networks_is_the_share_of_their_class() -> None:
    rows = accuracies(mlps(stubborn(3, 5), ["a", "b"]), {"same": stubborn(3, 5), "other": stubborn(3, 6)})
    assert list(rows.columns) == [
        *("method", "id", "run", "architecture", "original", "accuracy", "kept", "agreement"),
    ]
    assert rows["method"].tolist() == ["same", "same", "other", "other"] and rows["id"].tolist() == ["n0", "n1"] * 2
    np.testing.assert_allclose(rows["original"], SHARE[[3, 5, 3, 5]])
    np.testing.assert_allclose(rows["accuracy"], SHARE[[3, 5, 3, 6]])
    np.testing.assert_allclose(rows["kept"], [1, 1, 1, SHARE[6] / SHARE[5]])
    assert rows["agreement"].tolist() == [1, 1, 1, 0] and set(rows["architecture"]) == {"small"}


def test_an_exact_model_keeps_everything(zoo: Zoo) -> None:
    z = encode_split(Copy(), zoo.data.split("test"), 8).mu
    rows = accuracies(zoo.test, {"VAE": rebuild(Copy(), zoo.data, z, zoo.test.architecture)})
    assert (rows["kept"] == 1).all() and (rows["agreement"] == 1).all() and len(rows) == len(zoo.test)


def test_nothing_can_be_kept_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_right = digits()._replace(test_y=torch.full_like(digits().test_y, 3))
    monkeypatch.setattr(decoded_networks, "digits", lambda: nothing_right)
    rows = accuracies(mlps(stubborn(3, 5), ["a", "b"]), {"other": stubborn(3, 3)})
    assert rows["kept"].tolist()[0] == 1 and np.isnan(rows["kept"].tolist()[1])
    assert kept_table(rows)["networks"].tolist() == [1]


def test_networks_of_other_architectures_cannot_be_run() -> None:
    other = networks(torch.zeros(1, 5), ["a"], {"weight": 3, "bias": 2})
    message = (
        r"architecture 'flat' \(weight \[3\], bias \[2\]\) cannot be run: only those of digits-zoo can \(mlp, cnn\)"
    )
    with pytest.raises(DataError, match=message):
        accuracies(other, {})


@pytest.mark.parametrize("sizes", [[1] * 6, [1, 2, 3, 4, 5, 2, 2, 2, 2]])
def test_the_interval_of_the_median_is_that_of_whole_runs_drawn_anew(sizes: list[int]) -> None:
    n, runs = len(sizes), np.repeat([f"r{i}" for i in range(len(sizes))], sizes)
    values = np.random.default_rng(0).normal(size=len(runs))
    table = kept_table(kept_rows(values.tolist(), runs.tolist()), seed=5)
    names = np.unique(runs)
    drawn = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), 2000)
    by_run = [values[runs == name] for name in names]
    medians = [np.median(np.concatenate([np.tile(v, k) for v, k in zip(by_run, row, strict=True)])) for row in drawn]
    row = table.loc[("VAE", "mlp")]
    np.testing.assert_allclose([row["low"], row["high"]], np.percentile(medians, [2.5, 97.5]))
    assert row["kept"] == np.median(values) and row["runs"] == n and row["networks"] == sum(sizes)


def test_the_table_has_each_architecture_and_all() -> None:
    rows = pd.concat([kept_rows([1.0, 0.9], ["a", "b"]), kept_rows([0.8], ["c"], architecture="cnn")])
    table = kept_table(rows)
    assert table.index.tolist() == [("VAE", "mlp"), ("VAE", "cnn"), ("VAE", ALL)]
    assert table["kept"].tolist() == [0.95, 0.8, 0.9] and table["keep_95"].tolist() == [0.5, 0, 1 / 3]
    assert table["networks"].tolist() == [2, 1, 3] and table["mean_agreement"].eq(0.6).all()
    assert kept_table(rows[rows["architecture"] == "mlp"]).index.tolist() == [("VAE", "mlp")]


@pytest.mark.parametrize(
    ("kept", "word", "numbers"),
    [
        ([0.98, 0.99], "at least", "98.5 % (95 % interval 98.0 to 99.0 % over 2 runs, 2 networks)"),
        ([0.5, 0.6], "less than", "55.0 % (95 % interval 50.0 to 60.0 % over 2 runs, 2 networks)"),
        (
            [0.9498, 0.96],
            "a share not distinguishably above or below",
            "95.5 % (95 % interval 95.0 to 96.0 % over 2 runs, 2 networks)",
        ),
        (
            [0.9, 1.2],
            "a share not distinguishably above or below",
            "105.0 % (95 % interval 90.0 to 120.0 % over 2 runs, 2 networks)",
        ),
    ],
)
def test_the_sentence_of_what_is_kept(kept: list[float], word: str, numbers: str) -> None:
    assert kept_sentence(kept_rows(kept, ["a", "b"]), "VAE") == (
        f"the median network rebuilt by VAE keeps {word} 95 % of its original's accuracy: {numbers}; the mean "
        "agreement with originals is 60.0 % of the digits"
    )


def test_one_run_decides_nothing_of_what_is_kept() -> None:
    assert kept_sentence(kept_rows([0.98, 0.99], ["a", "a"]), "VAE") == (
        "the median network rebuilt by VAE keeps 98.5 %; whether it keeps 95 % of its original's accuracy cannot be "
        "told from one run (2 networks); the mean agreement with originals is 60.0 % of the digits"
    )


def test_what_is_kept_is_told_by_epoch(zoo: Zoo) -> None:
    rows = kept_rows([0.5, 0.7, 0.9, 0.1], list("abca")).assign(epoch=[1, 1, 1, 25], id=list("abcd"))
    table = epoch_table(pd.concat([rows, rows.assign(method="PCA", kept=1.0)]))
    assert table.index.tolist() == ["VAE", "PCA", "networks"] and table.columns.tolist() == [1, 25]
    assert table.to_numpy().tolist() == [[0.7, 0.1], [1, 1], [3, 1]]
    assert accuracies(zoo.test, {"a": zoo.test.weights, "b": zoo.test.weights})["epoch"].tolist() == [1, 2] * 12
    with pytest.raises(DataError, match="networks have no property 'epoch'"):
        epoch_table(rows.drop(columns="epoch"))


# --- against other methods ---


def contest(one: list[float], other: list[float], runs: list[str]) -> pd.DataFrame:
    """Agreements are those of the other method, plus 0.1."""
    known = {"run": runs, "id": [f"n{i}" for i in range(len(runs))]}
    parts = [
        pd.DataFrame(known | {"method": name, "accuracy": values, "agreement": np.array(other) + 0.1})
        for name, values in (("VAE", one), ("mean network", other))
    ]
    return pd.concat(parts, ignore_index=True)


def test_methods_are_compared_run_by_run() -> None:
    """Runs differ by 0.1, 0.2 and 0.3, whose t-interval is 0.2 ± 4.303 * 0.1 / sqrt(3); the first has 2 networks."""
    rows = contest([0.4, 0.6, 0.7, 0.9], [0.35, 0.45, 0.5, 0.6], ["a", "a", "b", "c"])
    table = winner_table(rows, "VAE")
    assert table.index.tolist() == [("accuracy", "mean network"), ("agreement", "mean network")]
    found = table.loc[("accuracy", "mean network")]
    assert found.tolist()[:4] == pytest.approx([0.7, 0.5, 0.2, 4.302653 * 0.1 / np.sqrt(3)], abs=1e-6)
    assert found.tolist()[4:] == [3, 4, "not distinguishable"]
    assert accuracy_sentence(rows, "VAE", "mean network") == (
        "VAE against the mean network: accuracy 0.700 against 0.500, not distinguishable (difference +0.200 ± 0.248); "
        "agreement 0.600 against 0.600, not distinguishable (difference +0.000 ± 0.000); 95 % over 3 runs, 4 networks"
    )


def test_a_winner_needs_an_interval_without_0() -> None:
    rows = contest([0.5, 0.6, 0.71], [0.3, 0.4, 0.5], ["a", "b", "c"])
    assert winner_table(rows, "VAE")["winner"].tolist() == ["VAE", "not distinguishable"]
    assert winner_table(rows, "mean network")["winner"].tolist() == ["VAE", "not distinguishable"]
    assert "accuracy 0.603 against 0.400, higher (" in accuracy_sentence(rows, "VAE", "mean network")
    assert "accuracy 0.400 against 0.603, lower (" in accuracy_sentence(rows, "mean network", "VAE")
    alone = accuracy_sentence(rows[rows["run"] == "a"], "VAE", "mean network")
    assert "accuracy 0.500 against 0.300, cannot be told apart on one run (difference +0.200); " in alone


# --- between two ---


def test_pairs_are_of_one_architecture_and_of_runs_that_no_other_pair_has(zoo: Zoo) -> None:
    pairs, notes = choose_pairs(zoo.train, 2, seed=1)
    flat, table = [i for pair in pairs for i in pair], zoo.train.table
    assert not notes and len(pairs) == 4 and table["run"].iloc[flat].is_unique and table["epoch"].iloc[flat].eq(2).all()
    assert all(table["architecture"].iloc[a] == table["architecture"].iloc[b] for a, b in pairs)
    assert pairs == choose_pairs(zoo.train, 2, seed=1)[0] != choose_pairs(zoo.train, 2, seed=2)[0]
    first, _ = choose_pairs(replace(zoo.train, table=table.drop(columns="epoch")), 2)
    assert table["epoch"].iloc[[i for pair in first for i in pair]].eq(1).all()
    assert len(choose_pairs(zoo.test, 99)[0]) == 2  # 3 runs of each architecture


def test_an_architecture_of_one_run_has_no_pairs(zoo: Zoo) -> None:
    table = zoo.test.table.copy()
    table.loc[table["architecture"] == "cnn", "run"] = "cnn-0"
    pairs, notes = choose_pairs(replace(zoo.test, table=table), 9)
    assert notes == ["architecture 'cnn' has one run held out: a path needs two; it is left out"]
    assert [table["architecture"].iloc[pair].tolist() for pair in pairs] == [["mlp", "mlp"]]
    with pytest.raises(
        DataError, match=r"no architecture has held-out networks of two runs \(12 networks in all\): a path"
    ):
        choose_pairs(replace(zoo.test, table=table.assign(run=table["architecture"])), 9)


def test_paths_begin_and_end_at_the_rebuilt_networks_and_at_the_originals(zoo: Zoo) -> None:
    """A model whose latent leaves half of each weight away."""
    half = Copy()
    half.scale.data *= 0.5
    z = encode_split(half, zoo.data.split("test"), 8).mu
    pairs, _ = choose_pairs(zoo.test, 1)
    paths = path_accuracies(half, zoo.data, zoo.test, z, pairs, 5)
    rebuilt = rebuild(half, zoo.data, z, zoo.test.architecture)
    rows = accuracies(zoo.test, {"VAE": rebuilt})
    with pytest.raises(ValueError, match=r"pair \[0, 11\]: must be of one architecture; take those of choose_pairs"):
        path_accuracies(half, zoo.data, zoo.test, z, [*pairs, [0, 11]], 5)
    for name, column in (("in latents", "accuracy"), ("in weights", "original"), ("in rebuilt weights", "accuracy")):
        assert paths[name].shape == (2, 5)
        assert paths[name][:, [0, -1]].tolist() == rows[column].to_numpy()[pairs].tolist()
    assert not np.array_equal(paths["in latents"], paths["in weights"])
    a, b = zoo.test.weights[pairs[0]]
    middle = predict(torch.stack([(a + b) / 2]), zoo.test.architecture[pairs[0][:1]], zoo.test.architectures)
    assert paths["in weights"][0, 2] == share_correct(middle)[0]


def test_where_latents_are_weights_so_are_the_paths(zoo: Zoo) -> None:
    z = encode_split(Copy(), zoo.data.split("test"), 8).mu
    paths = path_accuracies(Copy(), zoo.data, zoo.test, z, choose_pairs(zoo.test, 1)[0], 4)
    for path in paths.values():
        np.testing.assert_allclose(path, paths["in weights"], atol=0.002 + 1e-9)  # a digit on the border


PATHS = {
    "in latents": np.array([[1.0, 0.7, 0.5], [0.8, 0.8, 0.8]]),
    "in weights": np.array([[1.0, 0.2, 0.5], [0.8, 0.2, 0.8]]),
}


def test_barriers_are_below_the_line_between_the_ends() -> None:
    np.testing.assert_allclose(barriers(PATHS["in latents"]), [0.05, 0], atol=1e-12)
    np.testing.assert_allclose(barriers(PATHS["in weights"]), [0.55, 0.6])
    assert barriers(np.array([[0.2, 0.9, 0.4]])).tolist() == [0]  # a path above its ends
    table = path_table(PATHS)
    assert table.loc["in weights"].tolist() == pytest.approx([0.775, 0.2, 0.575, 0.025, 2])


def test_the_sentence_of_two_paths() -> None:
    assert path_sentence(PATHS, "in latents", "in weights") == (
        "the barrier in latents is not distinguishable from that in weights: 0.025 against 0.575 of accuracy (ends at "
        "0.775 and 0.775), difference -0.550 ± 0.635 (95 % over 2 pairs)"
    )
    many = {name: np.repeat(path, 4, axis=0) for name, path in PATHS.items()}
    assert " in latents is lower than that in weights: " in path_sentence(many, "in latents", "in weights")
    assert " in weights is higher than that in latents: " in path_sentence(many, "in weights", "in latents")
    one = {name: path[:1] for name, path in PATHS.items()}
    assert path_sentence(one, "in latents", "in weights").startswith(
        "the barriers in latents and in weights cannot be told apart on one pair: 0.050 against 0.550"
    )


def test_barriers_between_other_ends_do_not_compare() -> None:
    """Ends that are 0.3 and 0.4 higher: 0.35 ± 12.706 * 0.05 tells nothing of 2 pairs, but 0.35 ± 0.04 of 8."""
    higher = PATHS | {"in weights": PATHS["in latents"] + np.array([[0.3], [0.4]])}
    assert path_sentence(higher, "in latents", "in weights").startswith("the barrier in latents is not distinguishable")
    many = {name: np.repeat(path, 4, axis=0) for name, path in higher.items()}
    assert path_sentence(many, "in latents", "in weights") == (
        "the barriers in latents and in weights do not compare, as their ends differ: accuracy 0.775 and 1.125, "
        "difference -0.350 ± 0.045 (95 % over 8 pairs)"
    )
