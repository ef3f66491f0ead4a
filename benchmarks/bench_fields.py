"""Opening, and one epoch of training on, an array of fields larger than memory: time, and memory of the process.

The file is made of holes, so the time is that of reading, copying and scaling without a disk. What the system keeps of
the file in its cache is dropped as it grows, as the reader itself does not: each byte is read once in a pass, and on a
virtual machine the time would otherwise be that of being given memory for the cache. The process's own memory is not
changed by that. The model is one weight per node, so that the time is not that of a network.
"""

import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import line, run
from workbench.datasets.fields import SimulationConfig, Simulations
from workbench.datasets.loading import batch_indices, read_ahead, to_device
from workbench.datasets.simulation import open_simulation

RUNS, STEPS, NODES = 1250, 200, 40_000
BATCH = 8
MAX_GB = 3.0


def main() -> None:
    """Open the file, which makes the one pass for its statistics, and train for an epoch in random order."""
    before, gb = peak_gb(), RUNS * STEPS * NODES * 4 / 1e9
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fields.npy"
        write_fields(path)
        config = SimulationConfig(data=str(path), cache_dir=temporary, val_fraction=0.0, test_fraction=0.0)
        with without_cache(path):
            started = time.perf_counter()
            data = open_simulation(config)
            opened = time.perf_counter()
            train_epoch(data)
            trained = time.perf_counter()
    report(f"first opening of {gb:.0f} GB of holes", gb, opened - started)
    report(f"  one epoch of it in random order, {BATCH} runs a batch", gb, trained - opened)
    peak = peak_gb()
    line(f"  largest memory of the process ({before:.2f} GB imports)", f"{peak:.2f} GB", f"{MAX_GB} GB", peak <= MAX_GB)


def report(what: str, gb: float, seconds: float) -> None:
    """Print a time, which has no limit."""
    line(what, f"{seconds:.0f} s, {gb / seconds:.2f} GB/s", "none", True)


def write_fields(path: Path) -> None:
    """A file of holes, which takes next to no space; the last value of each run is its number, counted from 1."""
    with path.open("wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (RUNS, STEPS, NODES)}
        np.lib.format.write_array_header_1_0(handle, header)
        start = handle.tell()
        for i in range(1, RUNS + 1):
            handle.seek(start + i * STEPS * NODES * 4 - 4)
            handle.write(np.float32(i).tobytes())


def train_epoch(data: Simulations) -> None:
    """Read every run of the training split once, scale it, take a step, and check that each run arrived."""
    train, device, seen = data.split("train"), torch.device("cpu"), []
    weight = torch.zeros(NODES, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    for _, raw in read_ahead(train, islice(batch_indices(len(train), BATCH, 0, 0), len(train) // BATCH)):
        x = train.prepare(to_device(raw, device))["x"]  # (b, n, t)
        optimizer.zero_grad()
        (weight @ x - 1).square().mean().backward()
        optimizer.step()
        seen += (x[:, -1, -1] * data.scaling.scale[-1] + data.scaling.offset[-1]).round().int().tolist()
    if len(set(seen)) != len(train) // BATCH * BATCH or not set(seen) <= set(range(1, RUNS + 1)):
        raise RuntimeError(f"{len(set(seen))} different runs arrived of {len(train)}: must be all that fill a batch")


@contextmanager
def without_cache(path: Path) -> Iterator[None]:
    """Let the system forget the file's pages four times a second, where it can be told to (Linux)."""
    done = threading.Event()

    def drop() -> None:
        with path.open("rb") as handle:
            while not done.wait(0.25):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=drop)
    if hasattr(os, "posix_fadvise"):
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def peak_gb() -> float:
    """Largest resident memory of this process so far; the system states it in units of 1024 bytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    sys.exit(run(main))
