from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as ReferencePCA
from tiny_zoo import Copy, Zoo, networks, open_tiny_zoo
from torch import Tensor

from workbench.comparison import encode_split, fit_predictions
from workbench.datasets.flat_weights import flatten
from workbench.datasets.frames import DataError
from workbench.rebuilding import (
    ALL,
    MEAN,
    Networks,
    equal_noise,
    floors,
    layer_r2,
    mean_network,
    r2_sentence,
    rebuild,
    run_errors,
    split_r2,
    split_sentence,
    squared_errors,
    weight_pca,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"first": 6, "second": 3}
RUNS = ["a", "a", "b", "b", "c", "c"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return open_tiny_zoo(tmp_path_factory.mktemp("zoo"))


def some(seed: int = 0, padding: int = 2) -> Networks:
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
    return networks(torch.nn.functional.pad(weights, (0, padding)), RUNS, SIZES)


def r2(networks: Networks, methods: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    rows = layer_r2(networks, methods)
    return {(row.layer, row.method): row.r2 for row in rows.itertuples()}


# --- networks ---


def test_networks_of_a_split_are_its_flat_weights_in_their_unit(zoo: Zoo) -> None:
    split = zoo.data.split("test")
    assert len(zoo.test) == len(split) and zoo.test.table["id"].tolist() == [split.name(i) for i in range(len(split))]
    for i, row in enumerate(zoo.test.weights):
        flat = flatten(split.state_dict(i))[0]
        assert torch.equal(row[: len(flat)], flat) and not row[len(flat) :].any()
    for architecture, rows in zoo.test.each():
        assert set(zoo.test.table["architecture"].iloc[rows]) == {architecture.name}


def test_an_exact_model_rebuilds_networks_in_their_unit_and_cuts_their_padding(zoo: Zoo) -> None:
    split = zoo.data.split("test")
    z = encode_split(Copy(), split, 5).mu
    assert z.std() == pytest.approx(1, abs=0.3) and zoo.test.weights.std() < 0.6
    weights = rebuild(Copy(), zoo.data, z, zoo.test.architecture, batch_size=4)
    torch.testing.assert_close(weights, zoo.test.weights, atol=1e-6, rtol=1e-5)
    padded = rebuild(Copy(), zoo.data, torch.ones_like(z), zoo.test.architecture)
    assert torch.equal(padded == 0, ~split.prepare(split.batch(np.arange(len(split))))["mask"])


def test_weights_that_are_not_finite_are_refused(zoo: Zoo) -> None:
    z = encode_split(Copy(), zoo.data.split("test"), 8).mu.clone()
    z[3, 5] = torch.nan
    with pytest.raises(DataError, match=r"decoded from 1 of \d+ latents, such as number 3, are not finite: must be"):
        rebuild(Copy(), zoo.data, z, zoo.test.architecture)


# --- floors and controls ---


def test_components_are_those_of_the_reference() -> None:
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    pca, reference = weight_pca(x, 4), ReferencePCA(4, svd_solver="full").fit(x.double().numpy())
    cosines = np.abs((pca.components.double().numpy() * reference.components_).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    np.testing.assert_allclose(pca.explained_variance, reference.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(pca.reconstruct(x), reference.inverse_transform(reference.transform(x)), atol=1e-5)


def test_components_stay_orthonormal_where_networks_are_the_same() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    components = weight_pca(x, 6).components
    torch.testing.assert_close(components @ components.T, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight_pca(x, 6).reconstruct(x), x, atol=1e-5, rtol=0)


def test_floors_are_of_the_training_networks_of_the_architecture(zoo: Zoo) -> None:
    found = floors(zoo.data, zoo.train, zoo.test, 4)
    assert list(found) == [MEAN, "PCA-4", "PCA-4 per architecture"]
    for i, size in enumerate(architecture.size for architecture in zoo.train.architectures):
        of_train, rows = zoo.train.architecture == i, zoo.test.architecture == i
        mean = zoo.train.weights[of_train].mean(0)
        torch.testing.assert_close(found[MEAN][rows], mean.expand(rows.sum(), -1), atol=1e-6, rtol=1e-5)
        expected = weight_pca(zoo.train.weights[of_train, :size], 4).reconstruct(zoo.test.weights[rows, :size])
        torch.testing.assert_close(found["PCA-4 per architecture"][rows, :size], expected)
        assert not any(x_hat[rows, size:].any() for x_hat in found.values())


def test_the_joint_pca_is_that_of_what_the_model_sees(zoo: Zoo) -> None:
    """That of notebook 02, on scaled weights with their padding of 0, all architectures together."""
    held_out = zoo.data.split("test")
    batch = held_out.prepare(held_out.batch(np.arange(len(held_out))))
    of_notebook_02 = fit_predictions(zoo.data.split("train"), 4, 8, torch.device("cpu"))
    expected = zoo.data.denormalize(of_notebook_02.project(batch), batch["architecture"])
    torch.testing.assert_close(floors(zoo.data, zoo.train, zoo.test, 4)["PCA-4"], expected, atol=1e-4, rtol=1e-3)


def test_pca_of_all_training_networks_is_exact_on_them_and_says_its_size(zoo: Zoo) -> None:
    """5 runs of 2 epochs of each architecture: 9 components are all there are; one CNN less, 8; of both, 19 and 18."""
    found = floors(zoo.data, zoo.train, zoo.train, 1000)
    assert list(found) == [MEAN, "PCA-19", "PCA-9 per architecture"]
    for exact in list(found.values())[1:]:
        torch.testing.assert_close(exact, zoo.train.weights, atol=1e-5, rtol=0)
    fewer = np.flatnonzero(zoo.train.architecture == 0)[1:].tolist() + np.flatnonzero(zoo.train.architecture).tolist()
    smaller = Networks(
        zoo.train.weights[fewer], zoo.train.architecture[fewer], zoo.train.architectures, zoo.train.table
    )
    assert list(floors(zoo.data, smaller, zoo.train, 1000))[1:] == ["PCA-18", "PCA-8/9 per architecture"]
    one = smaller.architecture == 1
    alone = Networks(smaller.weights[one], smaller.architecture[one], smaller.architectures, smaller.table)
    assert list(floors(zoo.data, alone, alone, 3)) == [MEAN, "PCA-3"]


def test_an_architecture_without_training_networks_is_refused(zoo: Zoo) -> None:
    rows = np.flatnonzero(zoo.train.architecture == 0)
    only = Networks(
        zoo.train.weights[rows], zoo.train.architecture[rows], zoo.train.architectures, zoo.train.table.iloc[rows]
    )
    with pytest.raises(DataError, match="architecture 'mlp' has 6 networks to rebuild and none among the training"):
        floors(zoo.data, only, zoo.test, 2)


def test_noise_has_the_size_of_the_error_in_each_layer_of_each_network(zoo: Zoo) -> None:
    x_hat = zoo.test.weights * torch.linspace(0, 2, len(zoo.test))[:, None]
    noisy = equal_noise(zoo.test, x_hat, seed=3)
    for architecture, rows in zoo.test.each():
        x = zoo.test.weights[rows]
        errors = (squared_errors(x, other[rows], architecture.layers) for other in (x_hat, noisy))
        np.testing.assert_allclose(*errors, rtol=1e-4, atol=1e-12)
        assert not noisy[rows, architecture.size :].any()
    assert torch.equal(noisy, equal_noise(zoo.test, x_hat, seed=3))
    assert not torch.allclose(noisy, equal_noise(zoo.test, x_hat, seed=4))
    assert torch.equal(equal_noise(zoo.test, zoo.test.weights), zoo.test.weights)


# --- R² ---


def test_r2_of_the_mean_is_zero_of_an_exact_method_one_and_between_them_known() -> None:
    """x_hat half way from the mean to x leaves a quarter of the squared error in every layer."""
    x = some()
    mean = mean_network(x, x)
    found = r2(x, {"exact": x.weights, MEAN: mean, "half": (x.weights + mean) / 2})
    for layer in ("first", "second", ALL):
        assert found[layer, MEAN] == 0 and found[layer, "exact"] == 1
        assert found[layer, "half"] == pytest.approx(0.75, abs=1e-6)


def test_r2_is_one_minus_the_ratio_of_squared_errors_and_padding_does_not_count() -> None:
    x, mean = some(), some(1).weights.mean(0).expand(6, -1)
    x_hat = some(2).weights
    x_hat[:, 9:] = 1e6
    found = r2(x, {MEAN: mean, "other": x_hat})
    for layer, span in (("first", slice(0, 6)), ("second", slice(6, 9)), (ALL, slice(0, 9))):
        ratio = (x_hat - x.weights)[:, span].square().sum() / (mean - x.weights)[:, span].square().sum()
        assert found[layer, "other"] == pytest.approx(1 - float(ratio), rel=1e-5)


def test_architectures_together_add_up_their_errors(zoo: Zoo) -> None:
    methods = {MEAN: torch.zeros_like(zoo.test.weights), "half": zoo.test.weights / 2}
    rows = layer_r2(zoo.test, methods)
    assert list(rows.columns) == ["architecture", "layer", "method", "r2", "r2_se", "runs"]
    assert rows.groupby(["architecture", "layer"], sort=False).ngroups == 6 + 4 + 2 + 1
    last = rows.iloc[-1]
    assert (last["architecture"], last["layer"], last["runs"]) == (ALL, ALL, 6) and last["r2"] == pytest.approx(0.75)
    worse = methods | {"cnn only": zoo.test.weights * torch.from_numpy(zoo.test.architecture == 0)[:, None]}
    found = layer_r2(zoo.test, worse).set_index(["architecture", "layer", "method"])["r2"]
    energy = [zoo.test.weights[zoo.test.architecture == i].square().sum() for i in (0, 1)]
    assert found["cnn", ALL, "cnn only"] == 1 and found["mlp", ALL, "cnn only"] == 0
    assert found[ALL, ALL, "cnn only"] == pytest.approx(float(energy[0] / sum(energy)), rel=1e-5)


def test_the_jackknife_of_runs_that_differ_alike_is_the_standard_error_of_a_mean() -> None:
    """Every run is 6 away from the mean network, squared, and the method's errors are 1.5, 3 and 0 of that."""
    x = networks(torch.ones(6, 3), RUNS, {"only": 3})
    offsets = torch.tensor([0.5, 0.5, 0.5**0.5, 0.5**0.5, 0, 0])[:, None]
    rows = layer_r2(x, {MEAN: torch.zeros(6, 3), "method": x.weights + offsets})
    row = rows[(rows["method"] == "method") & (rows["layer"] == ALL)].iloc[0]
    assert row["r2"] == pytest.approx(1 - 0.25, rel=1e-6) and row["runs"] == 3
    assert row["r2_se"] == pytest.approx(np.std([0.25, 0.5, 0.0], ddof=1) / np.sqrt(3), rel=1e-6)
    alone = replace(x, table=x.table.assign(run="a"))
    assert layer_r2(alone, {MEAN: torch.zeros(6, 3)})["r2_se"].isna().all()


def test_a_layer_that_the_mean_network_has_exactly_has_no_r2() -> None:
    x = some()
    x.weights[:, 6:9] = 1.0
    mean = mean_network(x, x)
    found = r2(x, {MEAN: mean, "other": x.weights + 1})
    assert np.isnan(found["second", "other"]) and found["first", "other"] < 0 and found[ALL, "other"] < 0


def test_errors_are_summed_over_the_networks_of_a_run() -> None:
    x = some()
    errors = run_errors(x, {"method": x.weights + 1.0})
    assert errors.index.tolist() == [("flat", layer, run) for layer in SIZES for run in "abc"]
    np.testing.assert_allclose(errors["method"], [12] * 3 + [6] * 3, rtol=1e-6)


def test_the_sentence_of_two_methods() -> None:
    x = networks(torch.ones(6, 3), RUNS, {"only": 3})
    offsets = torch.tensor([0.5, 0.5, 0.5**0.5, 0.5**0.5, 0, 0])[:, None]
    methods = {MEAN: torch.zeros(6, 3), "VAE": x.weights + offsets, "PCA-2": x.weights + offsets.flip(0)}
    assert r2_sentence(x, methods, "VAE", MEAN) == (
        "VAE explains more of the weights than the mean network: R² 0.750 against 0.000, difference +0.750 ± 0.621 "
        "(95 % over 3 runs, 6 networks); one training seed"
    )
    assert r2_sentence(x, methods, MEAN, "VAE").startswith("the mean network explains less of the weights than VAE: ")
    same = r2_sentence(x, methods, "VAE", "PCA-2")
    assert same.startswith("VAE explains not distinguishably more or less of the weights than PCA-2: R² 0.750 against")
    alone = replace(x, table=x.table.assign(run="a"))
    assert r2_sentence(alone, methods, "VAE", MEAN) == (
        "VAE and the mean network cannot be told apart on one run: R² 0.750 against 0.000"
    )


def test_the_sentence_of_training_and_held_out_networks() -> None:
    """Half of every training network is missing, and one held-out run of three is exact: 0.75 and 1/3."""
    train = networks(torch.tensor([[1.0, -1], [-1, 1], [2, 2], [-2, -2]]), ["a", "b", "c", "d"], {"only": 2})
    test = networks(torch.tensor([[1.0, 1], [1, -1], [-1, -1]]), ["e", "f", "g"], {"only": 2})
    rebuilt = train.weights / 2, test.weights * torch.tensor([1.0, 0, 0])[:, None]
    table = split_r2(train, rebuilt[0], test, rebuilt[1])
    assert table["r2"].tolist() == pytest.approx([0.75, 1 / 3]) and table["networks"].tolist() == [4, 3]
    assert table["half"].tolist() == pytest.approx([0, 4.302653 * np.std([1, 0, 0], ddof=1) / np.sqrt(3)], abs=1e-6)
    assert split_sentence(table, "VAE-1") == (
        "VAE-1 rebuilds its training networks not distinguishably better or worse than held-out ones: R² 0.750 ± 0.000 "
        "on 4 training networks (4 runs), R² 0.333 ± 1.434 on 3 held-out networks (3 runs); 95 % over runs"
    )
    learnt = split_r2(train, rebuilt[0], test, 0 * test.weights)
    assert " better than held-out ones: R² 0.750 " in split_sentence(learnt, "VAE-1")
    swapped = learnt.set_axis(["held-out", "training"])
    assert " worse than held-out ones: " in split_sentence(swapped, "VAE-1")
    alone = split_r2(train, rebuilt[0], replace(test, table=test.table.assign(run="e")), rebuilt[1])
    assert split_sentence(alone, "VAE-1").startswith(
        "whether VAE-1 rebuilds its training networks better than held-out"
    )
