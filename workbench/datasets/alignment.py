"""Networks of one hidden layer brought into one order of hidden units: the same functions, with comparable weights."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from workbench.datasets.frames import DataError

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
    a, b = _units(state, hidden), _units(reference, hidden)
    similarity = b @ a.T  # (place, unit)
    order = torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
    gain = similarity.gather(1, order[:, None]).sum() - similarity.trace()
    if gain <= ROUNDING * a.norm() * b.norm():
        return dict(state)
    permuted = {name: state[name][order.to(state[name].device)] for name in hidden.incoming}
    permuted[hidden.outgoing] = state[hidden.outgoing][:, order.to(state[hidden.outgoing].device)]
    return {name: permuted.get(name, tensor) for name, tensor in state.items()}


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
