from collections import OrderedDict

import pytest
import torch
from torch import nn

from workbench.datasets.flat_weights import Architecture, LayerInfo, flatten, to_state_dicts
from workbench.datasets.frames import DataError


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bits(tensor[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flatten_and_back_is_the_identity_bit_for_bit(dtype):
    state = convnet().to(dtype).state_dict()
    state["0.bias"] = torch.tensor([-0.0, float("nan"), 1e-7], dtype=dtype)
    state["1.num_batches_tracked"] += 2**60 + 1
    flat, layers, aside = flatten(state)
    assert flat.dtype == dtype and flat.shape == (sum(layer.size for layer in layers),)
    assert [layer.name for layer in layers] == [name for name in state if name != "1.num_batches_tracked"]
    padded = torch.nn.functional.pad(flat, (0, 7), value=9.0)
    (back,) = to_state_dicts(padded[None], layers, aside)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor), name
    convnet().to(dtype).load_state_dict(back)


def test_layers_say_where_each_tensor_lies():
    state = {"a": torch.ones(2, 3), "n": torch.tensor(4), "s": torch.tensor(2.0), "none": torch.zeros(0, 5)}
    flat, layers, aside = flatten(state | {"z": torch.full((2,), 3.0)})
    assert flat.tolist() == [1] * 6 + [2] + [3] * 2 and aside == {"n": torch.tensor(4)}
    assert layers == (
        LayerInfo("a", (2, 3), "float32", 0),
        LayerInfo("s", (), "float32", 6),
        LayerInfo("none", (0, 5), "float32", 7),
        LayerInfo("z", (2,), "float32", 7),
    )
    assert [layer.size for layer in layers] == [6, 1, 0, 2] and Architecture("net", layers).size == 9


def test_layers_laid_out_otherwise_in_memory_are_read_in_their_logical_order():
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    flat, _, _ = flatten({"w": weight.contiguous(memory_format=torch.channels_last), "t": torch.eye(2).t()})
    assert flat.tolist() == [*range(24), 1, 0, 0, 1]


def test_small_expanded_tensors_and_views_of_one_memory_are_read():
    tied = torch.arange(6.0)
    flat, _, _ = flatten({"a": torch.ones(1).expand(3), "b": tied, "c": tied.view(2, 3).T})
    assert flat.tolist() == [1, 1, 1, *range(6), 0, 3, 1, 4, 2, 5]


def test_rows_become_copies_through_which_gradients_flow():
    flat, layers, aside = flatten(convnet().state_dict())
    x_hat = torch.stack([flat, 2 * flat]).requires_grad_()
    first, second = to_state_dicts(x_hat, layers, aside)
    assert torch.equal(second["3.weight"], 2 * first["3.weight"])
    second["3.weight"].sum().backward()
    weight = next(layer for layer in layers if layer.name == "3.weight")
    expected = torch.zeros_like(flat)
    expected[weight.offset : weight.offset + weight.size] = 1
    assert torch.equal(x_hat.grad, torch.stack([torch.zeros_like(flat), expected]))
    first["1.num_batches_tracked"] += 1
    assert second["1.num_batches_tracked"] == aside["1.num_batches_tracked"] == 0
    assert second["0.bias"].untyped_storage().nbytes() == 12, "saving one layer would save the whole batch"


def test_weights_of_another_dtype_become_that_of_the_layers():
    flat, layers, _ = flatten({"w": torch.tensor([0.1, 0.2], dtype=torch.float64)})
    (state,) = to_state_dicts(flat.float()[None], layers)
    assert state["w"].dtype == torch.float64 and torch.allclose(state["w"], flat, atol=1e-7)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "has 0 tensors and no floating-point number"),
        ({"n": torch.tensor(1)}, "has 1 tensors and no floating-point number: it must have weights"),
        ({"w": torch.zeros(0)}, "has 1 tensors and no floating-point number"),
        ({"model": OrderedDict(), "epoch": 3}, "entry 'model' of the state dict is a OrderedDict: must be tensors by"),
        ({0: torch.zeros(1)}, "entry 0 of the state dict is a Tensor: must be tensors by name"),
        (
            {"w": torch.zeros(2).to_sparse()},
            "entry 'w' of the state dict is torch.sparse_coo of torch.float32: must be",
        ),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "entry 'w' .* of torch.complex64: must be a dense tensor that"),
        ({"w": torch.zeros(2, device="meta")}, "entry 'w' of the state dict is meta of torch.float32: must be a dense"),
        (
            {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
            "entry 'w' of the state dict is nested of torch.float32: must be a dense tensor that holds numbers of",
        ),
        (
            {"w": torch.ones(1).expand(10**13)},
            "entry 'w' of the state dict has 10000000000000 elements and memory of 1: is expanded; save tensor.contig",
        ),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1).double(), "c": torch.zeros(1)},
            "differ in dtype: 'a' is float32, 'b' is float64; convert all to one",
        ),
    ],
)
def test_what_is_no_state_dict_of_one_dtype_is_refused(state, message):
    with pytest.raises(DataError, match=message):
        flatten(state)


def test_rows_shorter_than_the_layers_are_refused():
    flat, layers, _ = flatten({"w": torch.zeros(3)})
    with pytest.raises(DataError, match="x_hat has 2 weights a row, the layers 3: rows may be longer only"):
        to_state_dicts(flat[None, :2], layers)
