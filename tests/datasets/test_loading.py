import threading
from itertools import islice

import numpy as np
import pytest
import torch

from workbench.datasets.loading import (
    FILLED,
    PREFETCHED_BATCHES,
    Resident,
    batch_indices,
    epoch_order,
    kept_on,
    read_ahead,
    to_device,
)


class Numbers:
    """Sample i is the number i; reading those in `bad` fails."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad, self.read = bad, []

    def __len__(self) -> int:
        return 1000

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        self.read.append(indices.tolist())
        if set(self.bad) & set(indices.tolist()):
            raise OSError(f"sample {self.bad[0]} cannot be read")
        return {"x": torch.from_numpy(indices.copy())}

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def name(self, index: int) -> str:
        return str(index)


def taken(n: int, batch_size: int, first: int, count: int, seed: int = 3) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batch_indices(n, batch_size, seed, first), count)]


@pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_an_epoch_is_a_permutation_without_repeats(n, batch_size):
    steps = n // batch_size
    for epoch in range(3):
        seen = sum(taken(n, batch_size, epoch * steps, steps), [])
        assert len(seen) == len(set(seen)) == steps * batch_size and set(seen) <= set(range(n))
        assert seen == epoch_order(n, 3, epoch)[: len(seen)].tolist()


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 7, 30])
def test_batches_from_any_step_are_the_rest_of_those_from_the_start(first):
    assert taken(10, 3, first, 12) == taken(10, 3, 0, first + 12)[first:]


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and all(sorted(order) == list(range(50)) for order in orders)
    state = torch.get_rng_state()
    assert epoch_order(50, 1, 1).tolist() == epoch_order(50, 1, 1).tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="^batch_size=4: must be at most 3, the number of samples$"):
        next(batch_indices(3, 4, 0, 0))


def test_batches_are_read_ahead_in_order():
    data = Numbers()
    batches = read_ahead(data, batch_indices(1000, 8, 0, 0))
    wanted = taken(1000, 8, 0, 20, seed=0)
    for expected in wanted:
        indices, batch = next(batches)
        assert indices.tolist() == expected == batch["x"].tolist()
    batches.close()
    assert data.read == taken(1000, 8, 0, len(data.read), seed=0)
    assert 20 <= len(data.read) <= 20 + PREFETCHED_BATCHES


def test_the_next_batch_is_read_while_this_one_is_used():
    data, reading = Numbers(), threading.Event()
    batch = data.batch

    def watched(indices):
        if indices[0] == 1:
            reading.set()
        return batch(indices)

    data.batch = watched
    batches = read_ahead(data, iter([np.array([0]), np.array([1]), np.array([2])]))
    next(batches)
    assert reading.wait(60)
    assert [indices.tolist() for indices, _ in batches] == [[1], [2]]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_finite_sequence_ends(count):
    blocks = [np.arange(i, i + 2) for i in range(count)]
    assert [indices.tolist() for indices, _ in read_ahead(Numbers(), iter(blocks))] == [
        block.tolist() for block in blocks
    ]


def test_an_error_surfaces_at_the_batch_it_belongs_to():
    batches = read_ahead(Numbers(bad=(2,)), iter([np.array([i]) for i in range(5)]))
    assert [next(batches)[0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="^sample 2 cannot be read$"):
        next(batches)


def test_a_batch_goes_to_the_device_unchanged():
    batch = {"x": torch.arange(3, dtype=torch.uint8), "id": torch.arange(3)}
    moved = to_device(batch, torch.device("cpu"))
    assert moved.keys() == batch.keys() and all(torch.equal(moved[key], batch[key]) for key in batch)
    assert moved["x"].dtype == torch.uint8


def test_a_dataset_may_have_an_order_of_its_own():
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.roll(np.arange(6), epoch + 10 * seed)

    batches = batch_indices(6, 4, seed=0, first_step=1, order=order)
    assert [next(batches).tolist() for _ in range(2)] == [[5, 0, 1, 2], [4, 5, 0, 1]]


def test_resident_samples_are_those_of_the_split():
    split = Numbers()
    here = Resident(split, torch.device("cpu"))
    assert len(split.read) == 2 + len(split) // FILLED and max(map(len, split.read)) == FILLED  # never all at once
    indices = np.array([999, 0, 255, 256, 0])
    assert here.batch(indices)["x"].tolist() == indices.tolist() and len(here) == 1000
    assert here.name(7) == "7" and not hasattr(here, "epoch_order")
    assert len(split.read) == 2 + len(split) // FILLED


@pytest.mark.parametrize("free, kept", [(4 * 8000, True), (4 * 8000 - 1, False)])
def test_samples_are_kept_on_a_gpu_only_where_they_leave_three_quarters_free(monkeypatch, free, kept):
    split, cuda = Numbers(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    here = Resident(split, torch.device("cpu"))
    monkeypatch.setattr("workbench.datasets.loading.Resident", lambda dataset, device: here)
    assert kept_on(cuda, split) is (here if kept else split)
    assert kept_on(torch.device("cpu"), split) is split


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_resident_batches_on_cuda_are_those_that_travel():
    split, cuda = Numbers(), torch.device("cuda")
    indices = np.array([3, 1, 999])
    here = to_device(Resident(split, cuda).batch(indices), cuda)["x"]
    assert here.is_cuda and torch.equal(here, to_device(split.batch(indices), cuda)["x"])
