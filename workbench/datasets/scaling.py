"""Scaling of fields, fitted on the training split in a stream, and the check that every value is finite."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from workbench.datasets.cache import write_atomic
from workbench.datasets.frames import DataError
from workbench.progress import Progress

REACH = 0.7
"""Largest scaled value of the training split under `node` and `global` scaling."""
DEVIATION = 0.25
"""Standard deviation of the scaled training split under `standard` scaling."""
CHUNK_BYTES = 64e6

Fields = Float32[np.ndarray, "p t n v"]


@dataclass(frozen=True)
class Statistics:
    """What one pass over the fields finds; minimum, maximum and moments are of the training split."""

    low: Float[np.ndarray, "n v"]
    high: Float[np.ndarray, "n v"]
    mean: Float[np.ndarray, "n v"]
    square: Float[np.ndarray, "n v"]
    """Mean of the squares."""
    digest: str
    """Hash of the values of all runs, in their order."""


@dataclass(frozen=True)
class Scaling:
    """x = (field - offset) / scale, per node and variable.

    Args:
        offset: In the field's unit, (n, v).
        scale: In the field's unit, positive, (n, v).
    """

    offset: Float[Tensor, "n v"]
    scale: Float[Tensor, "n v"]

    def apply(self, field: Float[Tensor, "b t n v"]) -> Float[Tensor, "b t n v"]:
        """From the field's unit to the scale of x, on the field's device."""
        return (field - self.offset.to(field.device)) / self.scale.to(field.device)

    def invert(self, x: Float[Tensor, "b t n v"]) -> Float[Tensor, "b t n v"]:
        """From the scale of x to the field's unit."""
        return x * self.scale.to(x.device) + self.offset.to(x.device)


def fit_scaling(kind: str, found: Statistics) -> Scaling:
    """The scaling of a kind from the statistics of the training split.

    Args:
        kind: `node` (each node's range to [-0.7, 0.7]), `global` (that of each variable over the whole field),
            `standard` (each node to mean 0 and standard deviation 0.25, so that four deviations lie within [-1, 1]),
            or `none`. A node whose value never changes becomes 0.

    Raises:
        DataError: `none`, and values of the training split lie outside [-1, 1], which a model's output cannot reach.
    """
    low, high, mean = found.low, found.high, found.mean
    if kind == "none" and (low.min() < -1 or high.max() > 1):
        raise DataError(
            f"scaling='none': the training split spans {low.min():.4g} to {high.max():.4g}, and a model's output lies "
            "in [-1, 1]; choose node, global or standard"
        )
    if kind == "global":
        low, high = np.broadcast_to(low.min(0), low.shape), np.broadcast_to(high.max(0), high.shape)
    if kind in ("node", "global"):
        offset, scale = (low + high) / 2, (high - low) / (2 * REACH)
    elif kind == "standard":
        offset, scale = mean, np.sqrt(np.maximum(found.square - mean**2, 0)) / DEVIATION
    else:
        offset, scale = np.zeros_like(mean), np.ones_like(mean)
    smallest = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    scale = np.where(scale > smallest, scale, 1.0)
    return Scaling(*(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (offset, scale)))


def describe_fields(
    read: Callable[[np.ndarray], Fields], train: np.ndarray, ids: list[str], run_bytes: int, cached: Path
) -> Statistics:
    """One pass over all runs, kept in a file so that the next opening need not make it.

    Args:
        read: Runs by position.
        train: Whether each run is of the training split.
        ids: Names of the runs, for messages.
        run_bytes: Size of a run in memory.
        cached: File of the result; its name stands for everything that the result depends on.

    Raises:
        DataError: NaN or infinity, with the run, the node and how many there are.
    """
    if cached.exists():
        with np.load(cached, allow_pickle=False) as file:
            return Statistics(*(file[name] for name in ("low", "high", "mean", "square")), str(file["digest"]))
    found = _pass(read, train, ids, max(1, int(CHUNK_BYTES / run_bytes)))
    write_atomic(cached, lambda handle: np.savez(handle, **vars(found)))
    return found


def _pass(read: Callable[[np.ndarray], Fields], train: np.ndarray, ids: list[str], chunk: int) -> Statistics:
    digest, bad, count = hashlib.blake2b(digest_size=8), [], 0
    low = high = total = square = None
    with Progress(len(ids), "reading the fields", "run") as progress:
        for runs in _chunks(len(ids), chunk):
            fields = read(runs)
            digest.update(np.ascontiguousarray(fields))
            progress.update(len(runs))
            broken = ~np.isfinite(fields)
            if broken.any():
                bad += [(int(runs[p]), t, n, v) for p, t, n, v in np.argwhere(broken)[:1].tolist()]
                count += int(broken.sum())
            if bad or not train[runs].any():
                continue
            ours = fields[train[runs]]
            moments = ours.sum((0, 1), dtype=np.float64), np.square(ours, dtype=np.float64).sum((0, 1))
            if total is None:
                low, high, (total, square) = ours.min((0, 1)), ours.max((0, 1)), moments
            else:
                low, high = np.minimum(low, ours.min((0, 1))), np.maximum(high, ours.max((0, 1)))
                total, square = total + moments[0], square + moments[1]
    if bad:
        run, t, n, _ = bad[0]
        raise DataError(
            f"the field of run {ids[run]!r} is not finite at node {n}, time step {t} ({count} such values in all "
            "runs); mend the run or remove it: nothing is put in its place"
        )
    values = int(train.sum()) * fields.shape[1]
    return Statistics(low.astype(float), high.astype(float), total / values, square / values, digest.hexdigest())


def _chunks(n: int, size: int) -> Iterator[np.ndarray]:
    return (np.arange(i, min(i + size, n)) for i in range(0, n, size))


def file_stamp(path: Path) -> list:
    """What changes when a file, or a folder of files, is written anew: names, sizes and times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def stamp_name(*parts: object) -> str:
    """A file name that stands for some values."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=12).hexdigest()
