import numpy as np
import pandas as pd
import pytest
import torch
from tiny_zoo import Copy, Zoo, open_tiny_zoo
from torch import Tensor

from workbench.datasets.flat_weights import Architecture, flatten
from workbench.datasets.frames import DataError
from workbench.datasets.weights import WeightDataset
from workbench.datasets.zoo_networks import build_mlp, digits
from workbench.decoded_networks import predict, share_correct
from workbench.rebuilding import MEAN, Networks, mean_network, rebuild, squared_errors, weight_pca
from workbench.sampled_networks import (
    ENSEMBLE,
    HELD_OUT,
    LATENTS,
    NOISE,
    PRIOR,
    REBUILT,
    REMEMBERED,
    add_noise,
    ensemble_accuracies,
    gaussian_draws,
    memory_sentence,
    nearest_runs,
    sample_table,
    sampled_networks,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [PRIOR, LATENTS, HELD_OUT, REBUILT, REMEMBERED, MEAN, NOISE, ENSEMBLE]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return open_tiny_zoo(tmp_path_factory.mktemp("zoo"))


class Remembers(Copy):
    """Whatever the latent, it decodes one training network."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def decode(self, z: Tensor) -> Tensor:
        return self.x.expand(len(z), -1)


class Linear(Copy):
    """The 4 principal components of the normalised training networks."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.pca = weight_pca(x, 4)

    def encode(self, x: Tensor) -> Tensor:
        return self.pca.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.pca.decode(z)


def normalised(zoo: Zoo, networks: Networks) -> Tensor:
    return zoo.data.normalize(networks.weights, torch.from_numpy(networks.architecture))


def sample(zoo: Zoo, seed: int = 0, train: Networks | None = None) -> tuple[pd.DataFrame, list[str]]:
    train, model = train or zoo.train, Linear(normalised(zoo, zoo.train))
    z = [model.encode(normalised(zoo, networks)) for networks in (train, zoo.test)]
    rebuilt = [rebuild(model, zoo.data, z[i], found.architecture) for i, found in enumerate((train, zoo.test))]
    return sampled_networks(model, zoo.data, train, zoo.test, z[0], *rebuilt, 7, seed)


def some(networks: Networks, rows: np.ndarray) -> Networks:
    table = networks.table.iloc[rows].reset_index(drop=True)
    return Networks(networks.weights[rows], networks.architecture[rows], networks.architectures, table)


# --- sampled ---


def test_every_kind_of_network_is_there_and_held_out_ones_are_the_unit(zoo: Zoo) -> None:
    rows, notes = sample(zoo)
    table = sample_table(rows)
    assert table.index.tolist() == [(kind, name) for name in ("cnn", "mlp") for kind in KINDS] and not notes
    assert table["networks"].tolist() == [7, 7, 6, 6, 7, 1, 7, 7] * 2
    np.testing.assert_allclose(table.xs(HELD_OUT)["novelty"], 1)
    found = share_correct(predict(zoo.test.weights, zoo.test.architecture, zoo.test.architectures))
    assert sorted(rows.loc[rows["method"] == HELD_OUT, "accuracy"]) == sorted(found)
    figures = rows.set_index("method")[["novelty", "ratio"]]
    assert figures.loc[ENSEMBLE].isna().all(axis=None) and figures.drop(ENSEMBLE).gt(0).all(axis=None)
    assert figures["ratio"].drop(ENSEMBLE).le(1).all()
    assert (table["closest"] <= table["novelty"]).sum() == len(table) - 2  # ensembles have none


def test_draws_are_a_function_of_the_seed(zoo: Zoo) -> None:
    (rows, _), (again, _), (other, _) = sample(zoo), sample(zoo), sample(zoo, seed=1)
    pd.testing.assert_frame_equal(rows, again)
    for kind in (PRIOR, LATENTS, NOISE):
        assert (rows["novelty"] != other["novelty"])[rows["method"] == kind].all()


def test_the_nearest_are_sought_in_the_whole_training_split(zoo: Zoo) -> None:
    """Also where draws are fitted on 3 of 10 training networks of an architecture: no held-out network seems newer."""
    fewer = some(zoo.train, np.r_[0:3, 10:13])
    figures = [
        rows.loc[rows["method"] == HELD_OUT, ["novelty", "ratio"]] for rows, _ in (sample(zoo), sample(zoo, 0, fewer))
    ]
    np.testing.assert_array_equal(*figures)


def test_an_architecture_that_nothing_can_be_drawn_from_is_left_out(zoo: Zoo) -> None:
    one = some(zoo.train, np.r_[0:1, 10:20])
    rows, notes = sample(zoo, 0, one)
    assert set(rows["architecture"]) == {"mlp"}
    assert notes == ["architecture 'cnn' has 1 of the 11 training networks taken: needs 2 to draw from; it is left out"]
    with pytest.raises(
        DataError, match="no architecture is left to draw from: architecture 'cnn' has 1 .*raise train_s"
    ):
        sample(zoo, 0, some(zoo.train, np.array([0, 10])))


# --- memory ---


def test_a_decoder_that_only_remembers_is_found_out(zoo: Zoo) -> None:
    cnn = int(np.flatnonzero(zoo.train.architecture == 0)[0])
    model = Remembers(normalised(zoo, zoo.train)[cnn])
    z = torch.randn(len(zoo.train), 2, generator=torch.Generator().manual_seed(0))
    rebuilt = zoo.train.weights, mean_network(zoo.train, zoo.test)
    rows, _ = sampled_networks(model, zoo.data, zoo.train, zoo.test, z, *rebuilt, 5)
    rows = rows[rows["architecture"] == "cnn"]
    drawn = rows[rows["method"].isin([PRIOR, LATENTS])]
    assert drawn[["novelty", "ratio"]].lt(1e-5).all(axis=None) and len(drawn) == 10
    sentence = memory_sentence(rows)
    assert sentence.startswith(
        "5 of 5 networks drawn from the latents are copies (novelty below 0.1), as are 5 of 5 rebuilt training "
        "networks and 0 of 6 held-out networks (median novelty 0.00 of networks drawn from the latents, 0.00 of "
        "rebuilt training networks, "
    )
    assert "; 5 of 5 networks drawn from the latents are nearer to one run than all but 5 % of rebuilt held" in sentence


def test_memory_that_shrinks_is_told_by_the_ratio_and_not_by_the_distance(zoo: Zoo) -> None:
    """A model that knows 0.6 of what sets a training network apart from the mean network, and nothing of others."""
    mean = mean_network(zoo.train, zoo.train)
    rebuilt = mean + 0.6 * (zoo.train.weights - mean), mean_network(zoo.train, zoo.test)
    model, z = Linear(normalised(zoo, zoo.train)), torch.randn(len(zoo.train), 4)
    rows, _ = sampled_networks(model, zoo.data, zoo.train, zoo.test, z, *rebuilt, 9)
    sentence = memory_sentence(rows)
    assert sentence.startswith(
        "copies cannot be told by distance: 0 of 18 rebuilt training networks have a novelty below 0.1 (median novelty "
    )
    assert ", as are 18 of 18 rebuilt training networks (median ratio " in sentence


KNOWN = {
    HELD_OUT: ([0.9, 0.8], [0.05, 1.95], [0.9, 1.0]),
    REBUILT: ([0.7, 0.7], [0.4, 0.5], [0.8, 0.9]),
    LATENTS: ([0.5, 0.7], [0.5, 0.7], [0.5, 0.9]),
    REMEMBERED: ([0.8, 0.8], [0.05, 0.3], [0.4, 0.5]),
    MEAN: ([0.1], [0.4], [1.0]),
    ENSEMBLE: ([0.95], [np.nan], [np.nan]),
}


def rows_of(**changed: tuple) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"method": name, "architecture": "mlp", "accuracy": a, "novelty": n, "ratio": r})
        for name, (a, n, r) in (KNOWN | changed).items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_the_sentence_has_the_medians_and_the_accuracy_of_every_other_kind() -> None:
    """All but 5 % of rebuilt held-out networks have a ratio of 0.805 or more."""
    assert memory_sentence(rows_of()) == (
        "0 of 2 networks drawn from the latents are copies (novelty below 0.1), as are 1 of 2 rebuilt training "
        "networks and 1 of 2 held-out networks (median novelty 0.60 of networks drawn from the latents, 0.17 of "
        "rebuilt training networks, 1.00 of held-out networks, 0.40 of the mean network); 1 of 2 networks drawn from "
        "the latents are "
        "nearer to one run than all but 5 % of rebuilt held-out networks, as are 2 of 2 rebuilt training networks "
        "(median ratio 0.70 of networks drawn from the latents, 0.45 of rebuilt training networks, 0.85 of rebuilt "
        "held-out networks, 0.95 of held-out networks); median accuracy of networks drawn from the latents 0.600 "
        "(held-out networks 0.850, rebuilt held-out networks 0.700, rebuilt training networks 0.800, mean network "
        "0.100, ensembles of 5 training networks 0.950)"
    )


def test_rules_that_do_not_find_rebuilt_training_networks_are_not_used() -> None:
    unseen = memory_sentence(rows_of(**{REMEMBERED: ([0.8, 0.8, 0.8], [0.05, 0.3, 0.3], [0.4, 0.9, 0.9])}))
    assert unseen.startswith(
        "copies cannot be told by distance: 1 of 3 rebuilt training networks have a novelty below 0.1 (median novelty"
    )
    assert (
        "; the ratio does not tell memory here: 1 of 3 rebuilt training networks are nearer to one run than all but 5 "
        "% of rebuilt held-out networks (median ratio"
    ) in unseen


# --- distances ---


def test_the_nearest_runs_are_those_of_all_networks_taken_at_once(zoo: Zoo) -> None:
    split, rows = zoo.data.split("train"), zoo.train.architecture == 1
    known, run = zoo.train.weights[rows].double(), zoo.train.table["run"].to_numpy()[rows]
    query = torch.cat([zoo.test.weights[zoo.test.architecture == 1], zoo.train.weights[rows]])
    distance = (query.double()[:, None] - known).norm(dim=2).numpy()
    by_run = np.sort(np.stack([distance[:, run == name].min(1) for name in np.unique(run)], 1), 1)[:, :2]
    for batch_size in (3, 256):
        np.testing.assert_allclose(nearest_runs(query, split, 1, batch_size), by_run, rtol=1e-12)
    assert by_run[6:, 0].tolist() == [0] * 10 and (by_run[6:, 1] > 1).all()


def test_where_there_is_one_run_there_is_no_second(zoo: Zoo) -> None:
    split = zoo.data.split("train")
    rows = np.flatnonzero(split.table()["run"] == split.table()["run"][0])
    found = nearest_runs(zoo.test.weights[:2], WeightDataset(zoo.data, split.networks[rows]), 0)
    assert np.isnan(found[:, 1]).all() and (found[:, 0] > 0).all()


# --- draws, noise, ensembles ---


def test_draws_have_mean_and_covariance_of_the_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, generator=generator) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]]) + torch.tensor([5.0, -1.0])
    drawn = gaussian_draws(z, 4000, np.random.default_rng(0))
    torch.testing.assert_close(drawn.mean(0), z.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), z.T.cov(), atol=0.2, rtol=0)
    with pytest.raises(DataError, match="1 training network: a Gaussian needs at least 2"):
        gaussian_draws(z[:1], 3, np.random.default_rng(0))


def test_noise_has_the_mean_square_of_the_error_in_each_layer(zoo: Zoo) -> None:
    architecture, (_, rows) = zoo.test.architectures[0], next(zoo.test.each())
    x = zoo.test.weights[rows]
    x_hat = x * torch.linspace(0, 1, x.shape[1])
    clean = x[:1].repeat(300, 1)
    noisy = add_noise(clean, x, x_hat, architecture.layers, np.random.default_rng(0))
    found, expected = (squared_errors(*pair, architecture.layers).mean(0) for pair in ((clean, noisy), (x, x_hat)))
    np.testing.assert_allclose(found, expected, rtol=0.15)
    assert torch.equal(noisy[:, architecture.size :], clean[:, architecture.size :])


def test_an_ensemble_answers_what_its_members_answer_on_average() -> None:
    """Three say 3 at odds of e^1, one says 5 at odds of e^9 and one 5 at e^0.5: their mean says 5."""
    mlp = Architecture("mlp", flatten(build_mlp().state_dict())[1])
    share = torch.bincount(digits().test_y, minlength=10).double() / len(digits().test_y)
    weights = torch.zeros(5, mlp.size)
    weights[:3, mlp.size - 7] = 1.0
    weights[3:, mlp.size - 5] = torch.tensor([9.0, 0.5])
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(ensemble_accuracies(weights, mlp, 2, rng), [share[5]] * 2)
    np.testing.assert_allclose(ensemble_accuracies(weights[:3], mlp, 1, rng), share[3])


def test_held_out_networks_that_are_training_networks_are_refused(zoo: Zoo) -> None:
    model = Linear(normalised(zoo, zoo.train))
    z, known = model.encode(normalised(zoo, zoo.train)), (zoo.train.weights, zoo.train.weights)
    with pytest.raises(DataError, match="held-out networks of the architecture 'cnn' are copies of training networks"):
        sampled_networks(model, zoo.data, zoo.train, zoo.train, z, *known, 2)
