"""A state dict as one row of numbers, and back again, bit for bit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.datasets.frames import DataError

FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOATS8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
WHOLE = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
REPEATED = 2**20
"""Elements of a tensor that has more than its storage, as `expand` makes it; larger ones could fill the memory."""


@dataclass(frozen=True)
class LayerInfo:
    """One floating-point tensor of a state dict, and where it lies in the flat weights.

    Args:
        name: Its key in the state dict.
        shape: Of the tensor.
        dtype: Of the tensor, such as `float32`.
        offset: Position of its first element in the flat weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """The layers that some networks have in common.

    Args:
        name: Unique among the architectures of a zoo.
        layers: In the order of the state dict, without gaps.
        aside: The integer and boolean tensors; their offsets are in bytes.
    """

    name: str
    layers: tuple[LayerInfo, ...]
    aside: tuple[LayerInfo, ...] = ()

    @property
    def size(self) -> int:
        """Weights of one network."""
        return sum(layer.size for layer in self.layers)


def flatten(state: Mapping[Any, Any]) -> tuple[Float[Tensor, " d"], tuple[LayerInfo, ...], dict[str, Tensor]]:
    """One row of all floating-point tensors of a state dict, in its order.

    Args:
        state: Dense tensors by name.

    Returns:
        The weights, in the dtype that the tensors have; where each tensor lies in them; and the integer and boolean
        tensors, such as the step counts of batch normalisation, which are no weights.

    Raises:
        DataError: an entry is no dense tensor of numbers; no tensor is of floating point, or two are of different
            floating-point dtypes.
    """
    for name, tensor in state.items():
        check_entry(name, tensor)
    weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    if not any(tensor.numel() for tensor in weights.values()):
        raise DataError(f"the state dict has {len(state)} tensors and no floating-point number: it must have weights")
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in weights.items():
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{name!r} is {_dtype_name(dtype)}" for dtype, name in dtypes.items())
        raise DataError(f"layers of one state dict differ in dtype: {found}; convert all to one, such as float32")
    layers, offset = [], 0
    for name, tensor in weights.items():
        layers.append(LayerInfo(name, tuple(tensor.shape), _dtype_name(tensor.dtype), offset))
        offset += tensor.numel()
    flat = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
    return flat, tuple(layers), {name: tensor for name, tensor in state.items() if name not in weights}


def check_entry(name: Any, tensor: Any) -> None:
    """Raise DataError where an entry of a state dict is no name and dense tensor of numbers with its own memory."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise DataError(
            f"entry {name!r} of the state dict is a {type(tensor).__name__}: must be tensors by name; "
            "save module.state_dict() alone"
        )
    kind = next((kind for kind in ("nested", "meta", "quantized") if getattr(tensor, f"is_{kind}")), tensor.layout)
    if kind != torch.strided or _dtype_name(tensor.dtype) not in (*FLOATS, *FLOATS8, *WHOLE):
        raise DataError(
            f"entry {name!r} of the state dict is {kind} of {tensor.dtype}: must be a dense tensor that holds numbers "
            f"of {', '.join(FLOATS)}, an 8-bit float, {' or '.join(WHOLE)}; convert it"
        )
    elements, held = tensor.numel(), tensor.untyped_storage().nbytes() // tensor.itemsize
    if elements > max(held, REPEATED):
        raise DataError(
            f"entry {name!r} of the state dict has {elements} elements and memory of {held}: is expanded; "
            "save tensor.contiguous(), or leave the network out"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_state_dicts(
    x_hat: Float[Tensor, "b d"], layer_info: Sequence[LayerInfo], aside: Mapping[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """The state dict of each row of flat weights; `flatten` and this are the identity, bit for bit.

    Args:
        x_hat: Weights in their own units; what lies behind the last layer is padding and is ignored.
        layer_info: Of the networks, as `flatten` gives it.
        aside: Integer and boolean tensors that every state dict gets a copy of.

    Returns:
        Copies with the names, shapes and dtypes of the layers, through which gradients flow to `x_hat`.

    Raises:
        DataError: the rows are shorter than the layers.
    """
    needed = max((layer.offset + layer.size for layer in layer_info), default=0)
    if x_hat.shape[1] < needed:
        raise DataError(f"x_hat has {x_hat.shape[1]} weights a row, the layers {needed}: rows may be longer only")
    return [_to_state_dict(row, layer_info, aside or {}) for row in x_hat]


def _to_state_dict(row: Tensor, layer_info: Sequence[LayerInfo], aside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {
        layer.name: row[layer.offset : layer.offset + layer.size]
        .reshape(layer.shape)
        .to(getattr(torch, layer.dtype), copy=True)
        for layer in layer_info
    }
    return state | {name: tensor.clone() for name, tensor in aside.items()}
