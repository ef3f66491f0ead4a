from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from workbench.datasets.alignment import align
from workbench.datasets.frames import DataError


def linear_pair(
    inputs: int = 7, units: int = 5, outputs: int = 3, bias: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of two linear layers, in which no two are equal."""
    layers = nn.Sequential(nn.Linear(inputs, units, bias=bias), nn.ReLU(), nn.Linear(units, outputs, bias=bias))
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=random) for name, tensor in layers.state_dict().items()}


def permute(state: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The hidden units of two linear layers, with or without biases, in another order."""
    last = "2.weight"
    return {
        name: tensor[:, order] if name == last else tensor[order] if name.startswith("0.") else tensor
        for name, tensor in state.items()
    }


def similarity(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name].double() * b[name].double()).sum().item() for name in a)


def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = nn.functional.linear(x, state["0.weight"], state.get("0.bias")).relu()
    return nn.functional.linear(hidden, state["2.weight"], state.get("2.bias"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [1, 7, 24, 64])  # 7: as many as inputs
def test_a_permutation_is_undone_exactly(units, bias):
    reference = linear_pair(units=units, bias=bias)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(1)).tolist()
    aligned = align(permute(reference, order), reference)
    assert list(aligned) == list(reference)
    assert all(torch.equal(aligned[name], reference[name]) for name in reference)


def test_a_permutation_is_undone_where_weights_moved_a_little():
    reference = linear_pair(units=24)
    noise = linear_pair(units=24, seed=1)
    moved = {name: tensor + 0.1 * noise[name] for name, tensor in reference.items()}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2)).tolist()
    aligned = align(permute(moved, order), reference)
    assert all(torch.equal(aligned[name], moved[name]) for name in moved)


def test_no_other_order_is_more_similar():
    state, reference = linear_pair(seed=1), linear_pair(seed=2)
    best = max(similarity(permute(state, list(order)), reference) for order in permutations(range(5)))
    assert similarity(state, reference) < best
    assert similarity(align(state, reference), reference) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_stays_the_same(dtype):
    state, reference = (
        {name: tensor.to(dtype) for name, tensor in linear_pair(units=24, seed=seed).items()} for seed in (1, 2)
    )
    aligned, x = align(state, reference), torch.randn(50, 7, dtype=dtype)
    assert not torch.equal(aligned["0.weight"], state["0.weight"])
    assert {name: (t.shape, t.dtype) for name, t in aligned.items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    torch.testing.assert_close(run(aligned, x), run(state, x))


def test_the_network_given_is_left_as_it_is():
    state, reference = linear_pair(seed=1), linear_pair(seed=2)
    before = {name: tensor.clone() for name, tensor in state.items()}
    align(state, reference)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("seed", range(5))
def test_aligning_twice_is_aligning_once(seed):
    state, reference = linear_pair(units=24, seed=seed), linear_pair(units=24, seed=seed + 10)
    state["0.weight"][[3, 8, 11]] = state["0.weight"][20].clone()  # units between which nothing tells
    state["0.bias"][[3, 8, 11]] = state["0.bias"][20].clone()
    reference["0.weight"][5:9], reference["0.bias"][5:9], reference["2.weight"][:, 5:9] = 0, 0, 0
    once = align(state, reference)
    twice = align(once, reference)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a.weight": (5, 7)},
        {"a.weight": (5, 7), "b.weight": (5, 5), "c.weight": (3, 5)},
        {"a.weight": (8, 1, 3, 3), "a.bias": (8,), "b.weight": (3, 8)},
        {"a.weight": (5, 7), "b.weight": (3, 6)},
        {"a.weight": (5, 7), "norm.weight": (5,), "norm.bias": (5,), "b.weight": (3, 5)},
        {"a.weight": (5, 7), "a.bias": (4,), "b.weight": (3, 5)},
        {"a.weight": (5, 7), "b.weight": (3, 5), "b.bias": (5,)},
        {"a.weight": (5, 7), "b.weight": (3, 5), "c.bias": (3,)},
        {"a.weight": (5, 7), "b.weight": (3, 5), "count": ()},
        {"weight_ih_l0": (5, 7), "weight_hh_l0": (5, 5)},
        {"in_proj_weight": (15, 5), "out_proj.weight": (5, 5)},
    ],
)
def test_other_layers_are_refused(shapes):
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(DataError, match=r"^layers .*: only two linear layers.* leave networks of other architectures"):
        align(state, state)


@pytest.mark.parametrize("order", [sorted, reversed])
def test_layers_are_told_by_names_and_shapes_in_any_order(order):
    state, reference = linear_pair(seed=1), linear_pair(seed=2)
    expected, names = align(state, reference), list(order(state))
    aligned = align({name: state[name] for name in names}, {name: reference[name] for name in names})
    assert list(aligned) == names and not torch.equal(expected["0.weight"], state["0.weight"])
    assert all(torch.equal(aligned[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ((5, 5), (5, 5), "either could be applied first"),
        ((5, 3), (3, 5), "either could be applied first"),
        ((5, 3), (5, 5), "b.weight is square and could be recurrent"),
    ],
)
def test_layers_of_which_shapes_do_not_tell_the_first_are_refused(first, second, reason):
    state = {"a.weight": torch.ones(first), "b.weight": torch.ones(second)}
    for names in (state, reversed(state)):
        with pytest.raises(DataError, match=rf"^layers .*: {reason}, which shapes alone do not tell, .*; set align to"):
            align({name: state[name] for name in names}, state)


def test_the_message_names_the_layers():
    with pytest.raises(DataError, match=r"^layers a.weight \(5, 7\), b.weight \(3, 6\): only two"):
        align({"a.weight": torch.ones(5, 7), "b.weight": torch.ones(3, 6)}, linear_pair())


def test_integer_weights_are_refused():
    state = {name: tensor.long() for name, tensor in linear_pair().items()}
    with pytest.raises(DataError, match="only two linear layers"):
        align(state, state)


def test_a_reference_of_other_layers_is_refused():
    with pytest.raises(DataError, match=r"^layer '0.weight': is \(5, 7\), and \(6, 7\) in the reference; align"):
        align(linear_pair(), linear_pair(units=6))
    with pytest.raises(DataError, match=r"^layer '0.bias': is \(5,\), and absent in the reference"):
        align(linear_pair(), linear_pair(bias=False))
    with pytest.raises(DataError, match=r"^layer '0.bias': is absent, and \(5,\) in the reference"):
        align(linear_pair(bias=False), linear_pair())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(which, value):
    pair = [linear_pair(seed=1), linear_pair(seed=2)]
    pair[which]["2.weight"][1, 2] = value
    with pytest.raises(DataError, match=r"2\.weight: hold values that are not finite; leave"):
        align(*pair)
