"""Networks of one hidden layer brought into one order of hidden units: the same functions, with comparable weights.

Which of the two linear layers is applied first is told by their shapes alone, as state dicts may be in any order: the
second has as many inputs as the first has outputs. Where the layers would fit the other way round too, or the second is
square, so that it could be recurrent, networks are refused: a wrong guess would change their functions.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench.datasets.flat_weights import Architecture, LayerInfo, flatten, to_state_dicts
from workbench.datasets.frames import DataError
from workbench.datasets.scaling import stamp_name
from workbench.datasets.zoo_cache import Zoo
from workbench.progress import Progress

VERSION = 1  # raise it when the same weights get another order
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
        state: `<p>.weight` of two linear layers, each with or without its `<p>.bias`, in any order.
        reference: Weights of a network with the same layers.

    Raises:
        DataError: the layers are others, or it cannot be told which is applied first; those of the reference differ;
            a hidden unit's weight is not finite.

    Source: Ainsworth, Hayase & Srinivasa 2023, "Git Re-Basin", weight matching.
    """
    hidden = _find_hidden(state)
    _require_same(state, reference)
    order = _order(_units(state, hidden), _units(reference, hidden))
    flat, layers, _ = flatten(state)
    return to_state_dicts(reorder(flat[None], layers, order[None].to(flat.device)), layers)[0]


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
    """The order of hidden units of networks of a zoo, by that of another of its networks; kept in its cache.

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
    architecture = zoo.architectures[used[0]]
    name = f"orders-{stamp_name(VERSION, networks.tolist(), reference)}"
    return torch.from_numpy(zoo.kept(name, lambda: _zoo_orders(zoo, networks, reference, architecture)))


def _zoo_orders(zoo: Zoo, networks: np.ndarray, reference: int, architecture: Architecture) -> Int[np.ndarray, "n h"]:
    layers, size = architecture.layers, architecture.size
    to, orders = torch.from_numpy(zoo.read([reference], size)[0]), []
    with Progress(len(networks), "aligning networks", "network") as progress:
        for part in np.array_split(networks, -(-len(networks) // CHUNK)):
            orders.append(hidden_orders(torch.from_numpy(zoo.read(part, size)), layers, to))
            progress.update(len(part))
    return torch.cat(orders).numpy()


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
    weights = [name for name, tensor in state.items() if tensor.ndim == 2 and name.rpartition(".")[2] == "weight"]
    biases = {name: f"{name.removesuffix('weight')}bias" for name in weights}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
    orders = [(a, b) for a, b in permutations(weights, 2) if shapes[a][0] == shapes[b][1]]
    if (
        len(weights) != 2
        or not orders
        or state.keys() - {*weights, *biases.values()}
        or any(shapes.get(biases[name], shapes[name][:1]) != shapes[name][:1] for name in weights)
        or not all(tensor.is_floating_point() for tensor in state.values())
    ):
        raise DataError(
            f"layers {listed}: only two linear layers, the second as wide as the first has units, can be aligned; "
            "leave networks of other architectures out"
        )
    first, second = orders[0]
    if len(orders) > 1 or len(set(shapes[second])) == 1:
        reason = f"{second} is square and could be recurrent" if len(orders) == 1 else "either could be applied first"
        raise DataError(
            f"layers {listed}: {reason}, which shapes alone do not tell, so that aligning could change the function; "
            "set align to false, or leave these networks out"
        )
    return _Hidden(tuple(name for name in (first, biases[first]) if name in state), second)


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
