"""The networks of the embedded zoo, the digits they are trained and judged on, and many of them run at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from workbench.datasets.frames import DataError
from workbench.datasets.splits import mix_array

HELD_OUT = 500
"""Digits that no network of the zoo is trained on."""
CLASSES = 10
CHUNK = 10  # networks at a time: what lies between their layers then fits into the processor's cache

States = Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor]
"""State dicts of n networks of one architecture, or one state dict whose tensors have a leading axis n."""


class Digits(NamedTuple):
    """Grey images in [0, 1] and their classes: those to train on, and those held out."""

    train_x: Float[Tensor, "n 1 8 8"]
    train_y: Int[Tensor, " n"]
    test_x: Float[Tensor, "m 1 8 8"]
    test_y: Int[Tensor, " m"]


@cache
def digits() -> Digits:
    """The 1797 digits of scikit-learn; those held out are the same ever after, and both parts are in random order.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (its test set).
    """
    from sklearn.datasets import load_digits  # takes a second to import, and few need it

    x, y = load_digits(return_X_y=True)
    order = np.argsort(mix_array(np.arange(len(x)), 0))
    x, y = torch.from_numpy(x[order] / 16).float().view(-1, 1, 8, 8), torch.from_numpy(y[order]).long()
    return Digits(x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT])


def build_mlp() -> nn.Module:
    """64 pixels, 24 hidden units, 10 classes: 1810 weights."""
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    model.add_module("hidden", nn.Linear(64, 24))
    model.add_module("relu", nn.ReLU())
    model.add_module("output", nn.Linear(24, CLASSES))
    return model


def build_cnn() -> nn.Module:
    """Two convolutions, to (8, 4, 4) and (16, 2, 2), and a linear layer: 1898 weights."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(1, 8, 3, stride=2, padding=1))
    model.add_module("relu1", nn.ReLU())
    model.add_module("conv2", nn.Conv2d(8, 16, 3))
    model.add_module("relu2", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("output", nn.Linear(64, CLASSES))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": build_mlp, "cnn": build_cnn}
"""Architectures of the zoo; (b, 1, 8, 8) -> (b, 10)."""


def network(architecture: str) -> nn.Module:
    """A network without weights (its tensors are on the device `meta`), for `torch.func.functional_call`.

    Raises:
        DataError: there is no such architecture.
    """
    if architecture not in NETWORKS:
        raise DataError(f"architecture={architecture!r}: is not one that can be run; choose from {', '.join(NETWORKS)}")
    with torch.device("meta"):
        return NETWORKS[architecture]()


@cache
def layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an architecture's weights, in the order of its state dict."""
    return {name: tuple(weight.shape) for name, weight in network(architecture).state_dict().items()}


def runnable(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The architecture whose weights have exactly these names and shapes, in any order; None if there is none."""
    found = {name: tuple(shape) for name, shape in shapes.items()}
    return next((architecture for architecture in NETWORKS if layer_shapes(architecture) == found), None)


def stack(states: States, architecture: str) -> dict[str, Tensor]:
    """One state dict with a leading axis over the networks.

    Raises:
        DataError: there is no network, or one has other layers than the architecture.
    """
    if not states:
        raise DataError("states: hold no network; give one or more")
    expected = layer_shapes(architecture)
    if isinstance(states, Mapping):
        _require_layers("states", {name: tuple(weight.shape[1:]) for name, weight in states.items()}, architecture)
        return {name: states[name] for name in expected}
    for i, state in enumerate(states):
        _require_layers(f"states[{i}]", {name: tuple(weight.shape) for name, weight in state.items()}, architecture)
    return {name: torch.stack([state[name] for state in states]) for name in expected}


def _require_layers(which: str, found: dict[str, tuple[int, ...]], architecture: str) -> None:
    expected = layer_shapes(architecture)
    for name in [*expected, *found]:
        own, right = found.get(name, "absent"), expected.get(name, "absent")
        if own != right:
            raise DataError(
                f"{which}, layer {name!r}: is {own}, and {right} in the architecture {architecture!r}; "
                "run it as the architecture that `runnable` names"
            )


def logits(states: States, architecture: str, x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "n b k"]:
    """Outputs of n networks of one architecture for the same images, in the precision of their weights.

    Raises:
        DataError: there is no network, or one has other layers than the architecture.
    """
    model, stacked = network(architecture), stack(states, architecture)
    x = x.to(next(iter(stacked.values())))
    return vmap(lambda state: functional_call(model, state, x), chunk_size=CHUNK)(stacked)


@torch.no_grad()
def accuracy(
    states: States, architecture: str, x: Float[Tensor, "b 1 8 8"], y: Int[Tensor, " b"]
) -> Float[Tensor, " n"]:
    """Share of the images that each of n networks of one architecture puts into their class, as float64.

    Raises:
        DataError: there is no network, or one has other layers than the architecture.
    """
    predicted = logits(states, architecture, x).argmax(-1)
    return (predicted == y.to(predicted.device)).double().mean(-1)
