from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import Space, open_space
from tiny_zoo import Copy

from workbench.datasets.flat_weights import Architecture
from workbench.datasets.zoo_networks import accuracy, digits
from workbench.exploration import Exploration
from workbench.layers import LatentLayout, Posterior
from workbench.network_headlines import NetworkHeadline
from workbench.spaces import State

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def zoo(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Networks of two architectures, each trained a little, and a model whose latent is the network."""
    space = open_space("weights", tmp_path_factory.mktemp("weights"))
    model = Copy().eval()
    model.latent_layout, model.noise_dim = LatentLayout(z=(space.data.max_len,)), 0
    x = space.samples.prepare(space.samples.batch(np.arange(len(space.samples))))["x"]
    return space._replace(model=model, posterior=Posterior(x))


def own_accuracy(zoo: Space, sample: int) -> float:
    """Of a real network, run as its module."""
    name = zoo.samples.table()["architecture"][sample]
    return float(accuracy([zoo.samples.state_dict(sample)], name, digits().test_x, digits().test_y)[0])


def test_a_network_decoded_as_it_was_is_as_good_as_it_was(zoo: Space) -> None:
    explored = Exploration(*zoo)
    for sample in (0, len(zoo.samples) - 1):
        percent = f"{100 * own_accuracy(zoo, sample):.1f} %"
        assert explored.view(State(mode="hover", hover=sample)).headline == (
            f"accuracy {percent} of 500 digits held out (nearest network {percent}, chance 10 %)"
        )


def test_it_is_run_as_the_architecture_of_the_network_beside_it(zoo: Space) -> None:
    headline, last = NetworkHeadline(zoo.data), len(zoo.samples) - 1
    raw = zoo.samples.batch(np.array([last]))
    constant = torch.zeros(1, zoo.data.max_len)
    weights = zoo.data.denormalize(constant, raw["architecture"])
    parts = zoo.samples.state_dict(last, weights[0])
    name = zoo.samples.table()["architecture"][last]
    expected = float(accuracy([parts], name, digits().test_x, digits().test_y)[0])
    assert headline(constant, raw).startswith(f"accuracy {100 * expected:.1f} % of 500 digits")
    assert f"nearest network {100 * own_accuracy(zoo, last):.1f} %" in headline(constant, raw)


def test_networks_that_cannot_be_run_say_why(zoo: Space) -> None:
    foreign = copy(zoo.data)
    foreign.architectures = [Architecture("small", zoo.data.architectures[0].layers[:2])]
    raw = zoo.samples.batch(np.array([0]))
    x = zoo.posterior.mu[:1]
    assert NetworkHeadline(foreign)(x, raw) == (
        "accuracy unknown: its architecture 'small' is none of digits-zoo (mlp, cnn)"
    )
    assert NetworkHeadline(zoo.data)(x * torch.nan, raw) == "accuracy unknown: the decoded weights are not finite"


def test_other_samples_have_no_headline(tmp_path: Path) -> None:
    assert open_space("clips", tmp_path).explore().view(State()).headline == ""
