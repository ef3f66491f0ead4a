import numpy as np
import pandas as pd
import pytest
import torch
from tiny_zoo import Copy, Zoo, open_tiny_zoo
from torch import Tensor

from workbench.datasets.flat_weights import Architecture, flatten
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_networks import build_mlp, digits
from workbench.decoded_networks import predict, share_correct
from workbench.rebuilding import floors, rebuild, squared_errors, weight_pca
from workbench.sampled_networks import (
    ENSEMBLE,
    HELD_OUT,
    LATENTS,
    NOISE,
    PRIOR,
    REBUILT,
    add_noise,
    ensemble_accuracies,
    gaussian_draws,
    memory_sentence,
    nearest,
    sample_table,
    sampled_networks,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [HELD_OUT, REBUILT, PRIOR, LATENTS, NOISE, ENSEMBLE]


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


def normalised(zoo: Zoo) -> Tensor:
    return zoo.data.normalize(zoo.train.weights, torch.from_numpy(zoo.train.architecture))


def sample(zoo: Zoo, seed: int = 0) -> pd.DataFrame:
    model = Linear(normalised(zoo))
    test = zoo.data.normalize(zoo.test.weights, torch.from_numpy(zoo.test.architecture))
    x_hat = rebuild(model, zoo.data, model.encode(test), zoo.test.architecture)
    return sampled_networks(model, zoo.data, zoo.train, zoo.test, model.encode(normalised(zoo)), x_hat, 7, seed)


def test_every_kind_of_network_is_there_and_held_out_ones_are_the_unit(zoo: Zoo) -> None:
    rows = sample(zoo)
    table = sample_table(rows)
    assert table.index.tolist() == [(kind, name) for name in ("cnn", "mlp") for kind in KINDS]
    assert table["networks"].tolist() == [6, 6, 7, 7, 7, 7] * 2
    np.testing.assert_allclose(table.xs(HELD_OUT)["novelty"], 1)
    found = share_correct(predict(zoo.test.weights, zoo.test.architecture, zoo.test.architectures))
    assert sorted(rows.loc[rows["method"] == HELD_OUT, "accuracy"]) == sorted(found)
    novelty = rows.set_index("method")["novelty"]
    assert novelty[ENSEMBLE].isna().all() and novelty.drop(ENSEMBLE).gt(0).all()
    assert (table["closest"] < table["novelty"]).tolist() == [True] * 5 + [False] + [True] * 5 + [False]


def test_draws_are_a_function_of_the_seed(zoo: Zoo) -> None:
    rows, again, other = sample(zoo), sample(zoo), sample(zoo, seed=1)
    pd.testing.assert_frame_equal(rows, again)
    for kind in (PRIOR, LATENTS, NOISE):
        assert (rows["novelty"] != other["novelty"])[rows["method"] == kind].all()


def test_a_decoder_that_only_remembers_is_found_out(zoo: Zoo) -> None:
    cnn = int(np.flatnonzero(zoo.train.architecture == 0)[0])
    model = Remembers(normalised(zoo)[cnn])
    z = torch.randn(len(zoo.train), 2, generator=torch.Generator().manual_seed(0))
    x_hat = floors(zoo.train, zoo.test, 1)["mean network"]
    rows = sampled_networks(model, zoo.data, zoo.train, zoo.test, z, x_hat, 5)
    rows = rows[rows["architecture"] == "cnn"]
    drawn = rows[rows["method"].isin([PRIOR, LATENTS])]["novelty"]
    assert drawn.lt(1e-5).all() and len(drawn) == 10
    assert memory_sentence(rows).startswith(
        "5 of 5 networks drawn from the latents are copies (novelty below 0.1), as are 0 of 6 held-out networks: "
        "median novelty 0.00, the closest 0.00; their median accuracy is 0."
    )


def test_the_sentence_has_the_accuracy_of_every_other_kind() -> None:
    rows = pd.DataFrame(
        {
            "method": [HELD_OUT, HELD_OUT, LATENTS, LATENTS, ENSEMBLE],
            "accuracy": [0.9, 0.8, 0.5, 0.7, 0.95],
            "novelty": [0.05, 1.95, 0.5, 0.7, np.nan],
        }
    )
    assert memory_sentence(rows) == (
        "0 of 2 networks drawn from the latents are copies (novelty below 0.1), as are 1 of 2 held-out networks: "
        "median novelty 0.60, the closest 0.50; their median accuracy is 0.600 (held-out networks 0.850, ensembles "
        "of 5 training networks 0.950)"
    )


def test_the_nearest_network_of_a_copy_is_at_no_distance() -> None:
    known = 1e3 + torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    assert nearest(known, known).tolist() == [0] * 40
    apart = torch.zeros(3, 2)
    apart[1:] = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert nearest(apart[1:], torch.tensor([[0.0, 0.0], [30.0, 44.0]])).tolist() == [5, 4]


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
    model = Linear(normalised(zoo))
    z = model.encode(normalised(zoo))
    with pytest.raises(DataError, match="held-out networks of the architecture 'cnn' are copies of training networks"):
        sampled_networks(model, zoo.data, zoo.train, zoo.train, z, zoo.train.weights, 2)
