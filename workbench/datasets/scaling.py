"""Scaling of fields, fitted on the training split in a stream, and the check that every value is finite."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor

from workbench.datasets.cache import locked, write_atomic
from workbench.datasets.frames import DataError
from workbench.progress import Progress

REACH = 0.7
"""Largest scaled value of the training split under `node` and `global` scaling."""
DEVIATION = 0.25
"""Standard deviation of the scaled training split under `standard` scaling."""
CHUNK_BYTES = 32e6
BLOCK = 2**17
"""Values converted to float64 at a time, so few that they stay in the processor's cache."""

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
    """x = (field - offset) / scale, per node and variable; these become the channels of x.

    Args:
        offset: In the field's unit, (n, v).
        scale: In the field's unit, positive, (n, v).
    """

    offset: Float[Tensor, "n v"]
    scale: Float[Tensor, "n v"]

    def apply(self, field: Float[Tensor, "b t n v"]) -> Float[Tensor, "b vn t"]:
        """From the field in its unit to what models see, on the field's device."""
        offset, scale = (rearrange(a.to(field.device), "n v -> (v n) 1") for a in (self.offset, self.scale))
        x = rearrange(field, "b t n v -> b (v n) t").clone(memory_format=torch.contiguous_format)
        return x.sub_(offset).div_(scale)  # in place: a batch may be large

    def invert(self, x: Float[Tensor, "b vn t"]) -> Float[Tensor, "b t n v"]:
        """From what models see to the field in its unit."""
        field = rearrange(x, "b (v n) t -> b t n v", v=self.scale.shape[1])
        return field * self.scale.to(x.device) + self.offset.to(x.device)


def fit_scaling(kind: str, found: Statistics) -> Scaling:
    """The scaling of a kind from the statistics of the training split.

    Args:
        kind: `node` (each node's range to [-0.7, 0.7]), `global` (that of each variable over the whole field),
            `standard` (each node to mean 0 and standard deviation 0.25, so that four deviations lie within [-1, 1]),
            or `none`. A node whose value never changes in the training split becomes 0 under `node` and `standard`;
            its unit stays that of the field.

    Raises:
        DataError: `none` or `standard`, and values of the training split lie outside [-1, 1] when scaled, which a
            model's output cannot reach.
    """
    low, high, mean = found.low, found.high, found.mean
    if kind == "global":
        low, high = np.broadcast_to(low.min(0), low.shape), np.broadcast_to(high.max(0), high.shape)
    if kind in ("node", "global"):
        offset, scale = (low + high) / 2, (high - low) / (2 * REACH)
    elif kind == "standard":
        offset, scale = mean, np.sqrt(np.maximum(found.square - mean**2, 0)) / DEVIATION
    else:
        offset, scale = np.zeros_like(mean), np.ones_like(mean)
    varies = high - low > np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    scale = np.where(varies, scale, 1.0)
    least, most = ((found.low - offset) / scale).min(), ((found.high - offset) / scale).max()
    if kind in ("none", "standard") and (least < -1 or most > 1):
        raise DataError(
            f"scaling={kind!r}: the training split spans {least:.4g} to {most:.4g} when scaled, and a model's output "
            "lies in [-1, 1]; choose node or global"
        )
    return Scaling(*(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (offset, scale)))


def describe_fields(
    read: Callable[[np.ndarray], Fields],
    train: np.ndarray,
    ids: list[str],
    run_bytes: int,
    cached: Path,
    first_node: int = 0,
) -> Statistics:
    """One pass over all runs, kept in a file so that the next opening need not make it.

    Args:
        read: Runs by position; called from another thread.
        train: Whether each run is of the training split.
        ids: Names of the runs, for messages.
        run_bytes: Size of a run in memory.
        cached: File of the result; its name stands for everything that the result depends on.
        first_node: Number of the first node that is read, for messages.

    Raises:
        DataError: NaN or infinity, with the run, the node and how many there are; the file is damaged.
    """
    if not cached.exists():
        with locked(cached.with_suffix(".lock")):
            if not cached.exists():
                found = _pass(read, train, ids, max(1, int(CHUNK_BYTES / run_bytes)), first_node)
                write_atomic(cached, lambda handle: np.savez(handle, **vars(found)))
    try:
        with np.load(cached, allow_pickle=False) as file:
            return Statistics(*(file[name] for name in ("low", "high", "mean", "square")), str(file["digest"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{cached} is damaged ({error}): delete it, and it is computed again") from None


def _pass(
    read: Callable[[np.ndarray], Fields], train: np.ndarray, ids: list[str], chunk: int, first_node: int
) -> Statistics:
    digest, bad = hashlib.blake2b(digest_size=8), []
    low, high, total, square = np.inf, -np.inf, 0.0, 0.0
    with Progress(len(ids), "reading the fields", "run") as progress:
        for runs, fields in _ahead(read, len(ids), chunk, digest.update):
            lowest, highest = fields.min(1), fields.max(1)  # (p, n, v); NaN and infinity come through
            finite = (np.isfinite(lowest) & np.isfinite(highest)).all((1, 2))
            bad += [(ids[runs[i]], *_first_broken(fields[i])) for i in np.flatnonzero(~finite)]
            for i in np.flatnonzero(finite & train[runs]):
                sums = _sums(fields[i])
                low, high = np.minimum(low, lowest[i]), np.maximum(high, highest[i])
                total, square = total + sums[0], square + sums[1]
            progress.update(len(runs))
    if bad:
        name, (step, node, variable), _ = bad[0]
        which = f", variable {variable}" if fields.shape[3] > 1 else ""
        raise DataError(
            f"the field of run {name!r} is not finite at node {first_node + node}, time step {step}{which} "
            f"({sum(found[2] for found in bad)} such values in {len(bad)} of {len(ids)} runs); mend the run or remove "
            "it: nothing is put in its place"
        )
    values = int(train.sum()) * fields.shape[1]
    return Statistics(low.astype(float), high.astype(float), total / values, square / values, digest.hexdigest())


def _ahead(
    read: Callable[[np.ndarray], Fields], n: int, chunk: int, look: Callable[[np.ndarray], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs in chunks; a thread reads the next one and shows it to `look` while the last one is worked on."""

    def load(first: int) -> tuple[np.ndarray, np.ndarray]:
        runs = np.arange(first, min(first + chunk, n))
        fields = np.ascontiguousarray(read(runs))
        look(fields)
        return runs, fields

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, 0)
        for first in range(chunk, n, chunk):
            loaded, coming = coming.result(), pool.submit(load, first)
            yield loaded
        yield coming.result()


def _sums(field: Float32[np.ndarray, "t n v"]) -> tuple[np.ndarray, np.ndarray]:
    """Sums over time of the values and of their squares, in float64."""
    total, square = np.zeros((2, *field.shape[1:]))
    step = max(1, BLOCK // field[0].size)
    for i in range(0, len(field), step):
        block = field[i : i + step].astype(np.float64)
        total += block.sum(0)
        block *= block
        square += block.sum(0)
    return total, square


def _first_broken(field: Float32[np.ndarray, "t n v"]) -> tuple[list[int], int]:
    """Time step, node and variable of the first value that is not finite, and how many there are."""
    broken = np.argwhere(~np.isfinite(field))
    return broken[0].tolist(), len(broken)


def file_stamp(path: Path) -> list:
    """What changes when a file, or a folder of files, is written anew: names, sizes and times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def stamp_name(*parts: object) -> str:
    """A file name that stands for some values."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=12).hexdigest()
