"""From a split to batches on the device: order, reading ahead, transfer. Nothing here keeps state."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from workbench.datasets.splits import mix

PREFETCHED_BATCHES = 2
RESIDENT_SHARE = 0.25
"""Of a GPU's free memory, the most that samples may take up; the rest is for models and activations."""
FILLED = 256
"""Samples that are copied to a device at a time."""

Batch = dict[str, Tensor]


@runtime_checkable
class Dataset(Protocol):
    """What the loop needs of a split: its length, raw batches, their preparation on the device, and names."""

    def __len__(self) -> int: ...
    def batch(self, indices: np.ndarray) -> Batch: ...
    def prepare(self, batch: Batch) -> Batch: ...
    def name(self, index: int) -> str: ...


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the n samples in an epoch: a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, 0, epoch))).numpy()


def batch_indices(
    n: int, batch_size: int, seed: int, first_step: int, order: Callable[[int, int], np.ndarray] | None = None
) -> Iterator[np.ndarray]:
    """Endless sample indices of each step's batch, beginning at any step; every epoch leaves out n % batch_size.

    Args:
        order: The n samples of an epoch, from (seed, epoch), where a dataset has an order of its own.

    Raises:
        ValueError: the samples do not fill one batch.
    """
    per_epoch = n // batch_size
    if not per_epoch:
        raise ValueError(f"batch_size={batch_size}: must be at most {n}, the number of samples")
    epoch, within = divmod(first_step, per_epoch)
    while True:
        samples = order(seed, epoch) if order else epoch_order(n, seed, epoch)
        for i in range(within, per_epoch):
            yield samples[i * batch_size : (i + 1) * batch_size]
        epoch, within = epoch + 1, 0


def read_ahead(
    dataset: Dataset, indices: Iterator[np.ndarray], part: slice = slice(None)
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches in order, read by a thread while the step before them runs.

    Args:
        indices: Of each batch; they come back with it.
        part: Of each batch that is read.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = [(i, pool.submit(dataset.batch, i[part])) for i in islice(indices, PREFETCHED_BATCHES)]
        while pending:
            current, reading = pending.pop(0)
            pending += [(i, pool.submit(dataset.batch, i[part])) for i in islice(indices, 1)]
            yield current, reading.result()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device, from pinned memory where that is CUDA; tensors that are there stay as they are."""
    if device.type != "cuda":
        return {key: value.to(device) for key, value in batch.items()}
    here = {key: value if value.is_cuda else value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in here.items()}


class Resident:
    """A split whose raw samples lie on a device, so that batches are cut out there; they hold what the split's do.

    Args:
        dataset: The split; what is not about reading it, such as `prepare`, is its own.
        device: Where the samples are copied to.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self._dataset, n = dataset, len(dataset)
        one = dataset.batch(np.arange(1))
        self._raw = {k: torch.empty((n, *v.shape[1:]), dtype=v.dtype, device=device) for k, v in one.items()}
        for start in range(0, n, FILLED):
            for key, value in dataset.batch(np.arange(start, min(start + FILLED, n))).items():
                self._raw[key][start : start + len(value)] = value.to(device)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def batch(self, indices: np.ndarray) -> Batch:
        """The raw samples of some indices, on the device."""
        return {key: value[torch.from_numpy(indices).to(value.device)] for key, value in self._raw.items()}


def kept_on(device: torch.device, dataset: Dataset) -> Dataset:
    """The split itself, or its samples on the device where that is CUDA and they fit with room to spare.

    They fit where they take up a quarter of the memory that is free, at most.
    """
    if device.type != "cuda":
        return dataset
    size = len(dataset) * sum(value.nbytes for value in dataset.batch(np.arange(1)).values())
    return Resident(dataset, device) if size <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0] else dataset
