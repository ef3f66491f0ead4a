import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad

from workbench.datasets.frames import DataError
from workbench.datasets.zoo_networks import (
    CHUNK,
    HELD_OUT,
    NETWORKS,
    accuracy,
    digits,
    layer_shapes,
    logits,
    network,
    runnable,
    stack,
)


def random_states(architecture: str, n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    random, shapes = torch.Generator().manual_seed(seed), layer_shapes(architecture)
    return [{name: torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()} for _ in range(n)]


# The digits


def test_digits_are_all_those_of_scikit_learn_in_two_parts_without_overlap():
    data = digits()
    x = torch.cat([data.train_x, data.test_x]).flatten(1).numpy() * 16
    y = torch.cat([data.train_y, data.test_y]).numpy()
    source = load_digits()
    order, given = (np.lexsort(images.T) for images in (x, source.data))
    np.testing.assert_array_equal(x[order], source.data[given])
    np.testing.assert_array_equal(y[order], source.target[given])
    assert len(np.unique(x, axis=0)) == len(x)  # no image twice: none is in both parts
    assert (len(data.train_x), len(data.test_x)) == (1797 - HELD_OUT, HELD_OUT) == (1297, 500)


def test_the_held_out_digits_are_the_same_ever_after_and_of_all_classes():
    y = digits().test_y
    assert y[:12].tolist() == [7, 2, 0, 9, 5, 1, 0, 3, 6, 5, 1, 9]
    assert torch.bincount(y, minlength=10).min() >= 35
    assert torch.bincount(digits().train_y, minlength=10).min() >= 110


# The networks


@pytest.mark.parametrize("architecture, weights", [("mlp", 1810), ("cnn", 1898)])
def test_sizes_are_those_documented(architecture, weights):
    assert sum(int(np.prod(shape)) for shape in layer_shapes(architecture).values()) == weights


@pytest.mark.parametrize("architecture", NETWORKS)
def test_many_networks_give_what_each_gives_alone(architecture):
    states, x = random_states(architecture, 2 * CHUNK + 1), digits().test_x[:20]
    together = logits(states, architecture, x)
    for state, own in zip(states, together, strict=True):
        model = NETWORKS[architecture]()
        model.load_state_dict(state)
        torch.testing.assert_close(own, model(x), atol=1e-5, rtol=1e-5)
    assert together.std(dim=0).min() > 0
    assert torch.equal(logits(stack(states, architecture), architecture, x), together)


def test_outputs_have_the_precision_of_the_weights():
    states = [{name: tensor.double() for name, tensor in state.items()} for state in random_states("cnn", 2)]
    assert logits(states, "cnn", digits().test_x[:3]).dtype == torch.float64


def test_gradients_reach_the_weights():
    (state,), x = random_states("cnn", 1), digits().test_x[:5]
    gradient = grad(lambda own: logits([own], "cnn", x).square().sum())(state)
    assert all(tensor.abs().max() > 0 for tensor in gradient.values())


@pytest.mark.parametrize("architecture", NETWORKS)
def test_accuracy_of_networks_that_always_say_one_class_is_the_share_of_the_class(architecture):
    states = random_states(architecture, 10)
    for k, state in enumerate(states):
        state["output.weight"].zero_()
        state["output.bias"].copy_(torch.eye(10)[k])
    x, y = digits().test_x, digits().test_y
    assert accuracy(states, architecture, x, y).tolist() == [(y == k).sum().item() / 500 for k in range(10)]


def test_networks_are_told_apart_by_names_and_shapes():
    for architecture in NETWORKS:
        shapes = layer_shapes(architecture)
        assert (
            runnable({name: tensor.shape for name, tensor in random_states(architecture, 1)[0].items()}) == architecture
        )
        assert runnable(dict(reversed(shapes.items()))) == architecture
        assert runnable({name: shape for name, shape in shapes.items() if name != "output.bias"}) is None
        assert runnable(shapes | {"output.bias": (11,)}) is None
        assert runnable(shapes | {"more": (1,)}) is None
        assert runnable({name.replace("output", "head"): shape for name, shape in shapes.items()}) is None
    assert runnable({}) is None


# Messages


def test_an_unknown_architecture_is_refused():
    with pytest.raises(DataError, match=r"^architecture='rnn': .*choose from mlp, cnn$"):
        network("rnn")
    with pytest.raises(DataError, match="architecture='rnn'"):
        logits(random_states("mlp", 1), "rnn", digits().test_x)


@pytest.mark.parametrize("states", [[], {}])
def test_no_network_is_refused(states):
    with pytest.raises(DataError, match="^states: hold no network"):
        accuracy(states, "mlp", digits().test_x, digits().test_y)


def test_networks_of_another_architecture_are_refused_with_the_layer():
    states = [*random_states("mlp", 2), *random_states("cnn", 1)]
    with pytest.raises(DataError, match=r"^states\[2\], layer 'hidden.weight': is absent, and \(24, 64\) in .*'mlp'"):
        logits(states, "mlp", digits().test_x)
    with pytest.raises(DataError, match=r"^states, layer 'conv1.weight': is absent, and \(8, 1, 3, 3\) in .*'cnn'"):
        logits(stack(states[:2], "mlp"), "cnn", digits().test_x)
    with pytest.raises(DataError, match=r"^states\[0\], layer 'more': is \(1,\), and absent in"):
        logits([states[0] | {"more": torch.ones(1)}], "mlp", digits().test_x)
