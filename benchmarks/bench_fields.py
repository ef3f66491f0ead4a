"""One epoch over an array of fields larger than memory: its time, and the memory of the process.

The file is made of holes, so the time is that of reading and copying without a disk. What the system keeps of the file
in its cache is dropped after each batch, as the reader itself does not: each byte is read once, and on a virtual
machine the time would otherwise be that of being given memory for the cache. The process's own memory is not changed.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import line, run
from workbench.datasets.arrays import LazyArray, open_array

RUNS, STEPS, NODES = 1250, 200, 40_000
BATCH = 16
MAX_GB = 3.0


def main() -> None:
    """Read every run once, in random order, in batches, and check that each arrived."""
    before = peak_gb()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fields.npy"
        write_fields(path)
        fields = open_array(path)
        started = time.perf_counter()
        total = one_pass(fields, np.random.default_rng(0).permutation(RUNS))
        seconds = time.perf_counter() - started
    if total != RUNS * (RUNS + 1) / 2:
        raise RuntimeError(f"the sum over all runs is {total}: must be {RUNS * (RUNS + 1) / 2}; runs were lost")
    gb = RUNS * STEPS * NODES * 4 / 1e9
    peak = peak_gb()
    what = f"{gb:.0f} GB of holes, {BATCH} runs at a time, cache dropped: {seconds:.0f} s"
    line(what, f"{gb / seconds:.1f} GB/s", "none", True)
    line(f"  largest memory of the process ({before:.2f} GB imports)", f"{peak:.2f} GB", f"{MAX_GB} GB", peak <= MAX_GB)


def write_fields(path: Path) -> None:
    """A file of holes, which takes next to no space; the last value of each run is its number, counted from 1."""
    with path.open("wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (RUNS, STEPS, NODES)}
        np.lib.format.write_array_header_1_0(handle, header)
        start = handle.tell()
        for i in range(1, RUNS + 1):
            handle.seek(start + i * STEPS * NODES * 4 - 4)
            handle.write(np.float32(i).tobytes())


def one_pass(fields: LazyArray, order: np.ndarray) -> float:
    """The sum of all values, batch by batch, each copied to a tensor as for a training step."""
    total = 0.0
    for i in range(0, len(order), BATCH):
        total += torch.tensor(fields.read(order[i : i + BATCH])).sum().item()
        drop_cache(fields.path)
    return total


def drop_cache(path: Path) -> None:
    """Let the system forget the file's pages, where it can be told to (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_gb() -> float:
    """Largest resident memory of this process so far; the system states it in units of 1024 bytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    sys.exit(run(main))
