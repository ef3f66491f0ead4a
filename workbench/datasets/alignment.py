"""Networks of one hidden layer brought into one order of hidden units: the same functions, with comparable weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench.datasets.flat_weights import LayerInfo, to_state_dicts
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_cache import Zoo
from workbench.progress import Progress

CHUNK = 256  # networks aligned at a time
ROUNDING = 1e-12
"""Gains in similarity below this share of the weights' norms are no reason to permute."""


class _Hidden(NamedTuple):
    """Where the hidden units are: along axis 0 of the tensors `incoming`, and along axis 1 of `outgoing`."""

    incoming: tuple[str, ...]
    outgoing: str


def align(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Permute the hidden units of a network so that its weights are as similar to the reference as they can be.

    The similarity is the sum over all weights and biases of w * w_reference, whose largest value is found exactly (an
    assignment of units to places). The order of two linear layers' hidden units is free where what lies between them
    does the same to each, so the function stays the same but for rounding. An aligned network stays as it is.

    Args:
        state: Weights of two linear layers in the order they are applied, each with or without a bias after it.
        reference: Weights of a network with the same layers.

    Raises:
        DataError: the layers are others, those of the reference differ, or a hidden unit's weight is not finite.

    Source: Ainsworth, Hayase & Srinivasa 2023, "Git Re-Basin", weight matching.
    """
    hidden = _find_hidden(state)
    _require_same(state, reference)
    order = _order(_units(state, hidden), _units(reference, hidden))
    permuted = {name: state[name][order.to(state[name].device)] for name in hidden.incoming}
    permuted[hidden.outgoing] = state[hidden.outgoing][:, order.to(state[hidden.outgoing].device)]
    return {name: permuted.get(name, tensor) for name, tensor in state.items()}


def hidden_orders(
    weights: Float[Tensor, "n d"], layers: Sequence[LayerInfo], reference: Float[Tensor, " d"]
) -> Int[Tensor, "n h"]:
    """The order of hidden units in which `align` would bring each of some flat networks.

    Raises:
        DataError: as `align`.
    """
    state = to_state_dicts(reference[None], layers)[0]
    hidden = _find_hidden(state)
    units = _units(state, hidden)
    return torch.stack([_order(_units(own, hidden), units) for own in to_state_dicts(weights, layers)])


def zoo_orders(zoo: Zoo, networks: Int[np.ndarray, " n"], reference: int) -> Int[Tensor, "n h"]:
    """The order of hidden units of networks of a zoo, by that of another of its networks.

    Args:
        networks: Positions in the zoo's table.
        reference: Likewise.

    Raises:
        DataError: networks of several architectures, or as `align`.
    """
    used = np.unique(zoo.architecture[networks])
    if len(used) > 1:
        names = ", ".join(zoo.architectures[i].name for i in used)
        raise DataError(f"align=True: networks of {names}: must be of one architecture; choose one by where")
    layers, size = zoo.architectures[used[0]].layers, zoo.architectures[used[0]].size
    to, orders = torch.from_numpy(zoo.read([reference], size)[0]), []
    with Progress(len(networks), "aligning networks", "network") as progress:
        for part in np.array_split(networks, -(-len(networks) // CHUNK)):
            orders.append(hidden_orders(torch.from_numpy(zoo.read(part, size)), layers, to))
            progress.update(len(part))
    return torch.cat(orders)


def reorder(
    weights: Float[Tensor, "n d"], layers: Sequence[LayerInfo], orders: Int[Tensor, "n h"]
) -> Float[Tensor, "n d"]:
    """Flat networks with their hidden units in the given orders; what lies behind their weights stays."""
    hidden, aligned = _find_hidden(to_state_dicts(weights[:1], layers)[0]), weights.clone()
    for layer in layers:
        place = slice(layer.offset, layer.offset + layer.size)
        part = weights[:, place].unflatten(1, layer.shape)
        if layer.name in hidden.incoming:
            index = orders.reshape(*orders.shape, *[1] * (part.ndim - 2)).expand_as(part)
            aligned[:, place] = part.gather(1, index).flatten(1)
        elif layer.name == hidden.outgoing:
            aligned[:, place] = part.gather(2, orders[:, None].expand_as(part)).flatten(1)
    return aligned


def _order(units: Tensor, reference: Tensor) -> Tensor:
    """The unit that belongs in each place; as they are where nothing but rounding is gained."""
    similarity = reference @ units.T  # (place, unit)
    order = torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
    gain = similarity.gather(1, order[:, None]).sum() - similarity.trace()
    return torch.arange(len(units)) if gain <= ROUNDING * units.norm() * reference.norm() else order


def _find_hidden(state: Mapping[str, Tensor]) -> _Hidden:
    names = list(state)
    weights = [i for i, name in enumerate(names) if state[name].ndim == 2]
    if len(weights) == 2 and weights[0] == 0 and all(tensor.is_floating_point() for tensor in state.values()):
        first, second = names[: weights[1]], names[weights[1] :]
        inner, outer = state[first[0]], state[second[0]]
        biases = [tuple(state[name].shape) for name in first[1:]], [tuple(state[name].shape) for name in second[1:]]
        fits = zip(biases, (inner, outer), strict=True)
        if len(inner) == outer.shape[1] and all(own in ([], [(len(weight),)]) for own, weight in fits):
            return _Hidden(tuple(first), second[0])
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "none"
    raise DataError(
        f"layers {shapes}: only two linear layers, the second as wide as the first has units, can be aligned; "
        "leave networks of other architectures out"
    )


def _require_same(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    for name in [*state, *reference]:
        own, other = (tuple(of[name].shape) if name in of else "absent" for of in (state, reference))
        if own != other:
            raise DataError(f"layer {name!r}: is {own}, and {other} in the reference; align networks of equal layers")


def _units(state: Mapping[str, Tensor], hidden: _Hidden) -> Tensor:
    """All weights of each hidden unit, (h, incoming + 1 + outgoing), as float64."""
    parts = [state[name].flatten(1) if state[name].ndim == 2 else state[name][:, None] for name in hidden.incoming]
    units = torch.cat([part.detach().double().cpu() for part in (*parts, state[hidden.outgoing].mT)], dim=1)
    if not units.isfinite().all():
        raise DataError(
            f"layers {', '.join((*hidden.incoming, hidden.outgoing))}: hold values that are not finite; "
            "leave the network out"
        )
    return units
