"""From a split to batches on the device: order, reading ahead, transfer. Nothing here keeps state."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from workbench.datasets.splits import mix

PREFETCHED_BATCHES = 2

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


def read_ahead(dataset: Dataset, indices: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches in order, read by a thread while the step before them runs."""
    with ThreadPoolExecutor(1) as pool:
        pending = [(i, pool.submit(dataset.batch, i)) for i in islice(indices, PREFETCHED_BATCHES)]
        while pending:
            current, reading = pending.pop(0)
            pending += [(i, pool.submit(dataset.batch, i)) for i in islice(indices, 1)]
            yield current, reading.result()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; from pinned memory where that is CUDA."""
    if device.type == "cuda":
        return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
    return {key: value.to(device) for key, value in batch.items()}
