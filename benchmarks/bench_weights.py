"""Opening a zoo of 10,000 networks of 20,000 weights, and one epoch of it: time, and memory of the process.

Each opening is in a process of its own; the first one reads the networks' files and writes their weights flat, the
second one goes on to read every network of the training split in random order and scale it.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.bench_fields import peak_gb
from benchmarks.report import line, run
from workbench.datasets.loading import batch_indices, read_ahead, to_device
from workbench.datasets.weights import WeightsConfig, open_weights

FILES, NETWORKS = 100, 100  # networks in each file
LAYERS = {"first": (120, 100), "second": (60, 120), "third": (10, 60)}
WEIGHTS = 20_000
BATCH = 64
MAX_SECONDS, MAX_GB = 3.0, 2.0


def main() -> None:
    """Write the zoo, open it twice, and print what the two processes measured."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_zoo(folder / "zoo" / "weights")
        first, second = (in_process(folder, stream) for stream in ("", "stream"))
    gb = FILES * NETWORKS * WEIGHTS * 4 / 1e9
    line(f"first opening of {FILES * NETWORKS} networks, {gb:.1f} GB", f"{first['opening']:.1f} s", "none", True)
    line("  largest memory of its process", f"{first['peak_gb']:.2f} GB", f"{MAX_GB} GB", first["peak_gb"] <= MAX_GB)
    opened = second["opening"]
    line("second opening, in another process", f"{opened:.2f} s", f"{MAX_SECONDS} s", opened <= MAX_SECONDS)
    what = f"  one epoch of {second['samples']} networks, {BATCH} a batch"
    line(what, f"{second['epoch']:.1f} s, {second['samples'] / second['epoch']:.0f} /s", "none", True)
    imports, peak = second["imports_gb"], second["peak_gb"]
    line(
        f"  largest memory of its process ({imports:.2f} GB imports)", f"{peak:.2f} GB", f"{MAX_GB} GB", peak <= MAX_GB
    )


def in_process(folder: Path, stream: str) -> dict[str, float]:
    """What one process measures."""
    command = [sys.executable, "-m", "benchmarks.bench_weights", str(folder), stream]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(folder: Path, stream: bool) -> dict[str, float]:
    """Time of an opening and perhaps of an epoch, and the memory of this process."""
    found = {"imports_gb": peak_gb()}
    started = time.perf_counter()
    data = open_weights(WeightsConfig(data=str(folder / "zoo"), cache_dir=str(folder / "cache")))
    found["opening"] = time.perf_counter() - started
    if stream:
        train, device, seen = data.split("train"), torch.device("cpu"), set()
        started = time.perf_counter()
        indices = islice(batch_indices(len(train), BATCH, 0, 0), len(train) // BATCH)
        for _, raw in read_ahead(train, indices):
            batch = train.prepare(to_device(raw, device))
            if not batch["x"].isfinite().all():
                raise RuntimeError("weights arrived that are not finite")
            seen |= set(batch["id"].tolist())
        if len(seen) != len(train) // BATCH * BATCH:
            raise RuntimeError(f"{len(seen)} different networks arrived of {len(train)}: must be all that fill a batch")
        found |= {"epoch": time.perf_counter() - started, "samples": len(seen)}
    return found | {"peak_gb": peak_gb()}


def write_zoo(folder: Path) -> None:
    """Files of networks with random weights; the layer `bias` makes up their number."""
    folder.mkdir(parents=True)
    shapes = LAYERS | {"bias": (WEIGHTS - sum(rows * columns for rows, columns in LAYERS.values()),)}
    generator = torch.Generator().manual_seed(0)
    for i in range(FILES):
        entries = [
            (
                {"run": i * NETWORKS + j, "accuracy": j / NETWORKS, "dataset": "noise"},
                {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
            )
            for j in range(NETWORKS)
        ]
        torch.save(entries, folder / f"{i:03d}.pt")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]), bool(sys.argv[2]))))
        sys.exit()
    sys.exit(run(main))
