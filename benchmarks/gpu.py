"""Full-size training steps on a GPU, side by side with plain ones: speed, memory, arithmetic, and from the cache.

`make bench-gpu`. Sizes are those of `params/sthv2`; nothing here has a limit, as GPUs differ.
"""

import copy
import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loops import Blobs, Ours, Pairs, Plain
from benchmarks.report import in_turns
from workbench.config import Config
from workbench.datasets.clips import ClipDataset, ClipsConfig, open_clips
from workbench.datasets.loading import Dataset, batch_indices, kept_on, read_ahead
from workbench.datasets.synthetic import write_pushing
from workbench.models import MODELS
from workbench.objectives import LatentActions, Reconstruction
from workbench.parameters import read_file
from workbench.paths import project_root
from workbench.process import device_name
from workbench.schedule import TrainConfig

ROUNDS, WARMUP = 20, 5
PRODUCT = 8192
"""Side of the matrices whose product measures how fast the device can multiply."""
CACHED_STEPS = 60


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        name: What it is called.
        kind: Its key in `MODELS`.
        file: Its parameter file in `params/sthv2`.
        batch_size: Samples of a step.
        objective, data: What is optimised, and samples to do it on.
    """

    name: str
    kind: str
    file: str
    batch_size: int
    objective: type[Reconstruction] | type[LatentActions]
    data: type[Blobs]

    def sizes(self) -> Config:
        """The model's settings."""
        return MODELS[self.kind][1].pick(self._given())

    def settings(self, device: str) -> TrainConfig:
        """The training's settings."""
        return TrainConfig.pick(self._given() | {"device": device, "batch_size": self.batch_size})

    def _given(self) -> dict[str, object]:
        return read_file(project_root() / "params" / "sthv2" / f"{self.file}.yaml")


CASES = [
    Case("VAE", "conv_vae", "02_train_vae", 64, Reconstruction, Blobs),
    Case("LAQ", "laq", "05_compare_vae_laq", 16, LatentActions, Pairs),
]


def product_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of a square matrix product, the fastest of some."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            a @ b
        _wait(device)

    seconds = min(in_turns({"product": multiply}, rounds=1)["product"] for _ in range(5))
    return 10 * 2 * side**3 / seconds


def step_flops(loop: Plain) -> int:
    """Floating-point operations of one step, of products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loop.train_step()
    return counter.get_total_flops()


def compare(case: Case, sizes: Config, settings: TrainConfig, folder: Path, ceiling: dict[str, float]) -> pd.DataFrame:
    """Time, memory and arithmetic of a step, plainly and here, measured in turns.

    Args:
        case: What is compared.
        sizes, settings: Its model's and its training's.
        folder: For what a training writes.
        ceiling: What the device multiplies per second in fp32 and bf16 [FLOP/s].
    """
    torch.manual_seed(0)
    model, data = MODELS[case.kind][0](sizes), case.data(4 * settings.batch_size + 1, sizes.image_size)
    make: dict[str, Callable[[], Plain | Ours]] = {
        "plain fp32": lambda: Plain(case.objective(copy.deepcopy(model)), data, settings),
        f"here, {settings.precision}": lambda: Ours(case.objective(copy.deepcopy(model)), data, settings, folder),
    }
    device = torch.device(settings.device)
    memory = {name: _peak(build, device) for name, build in make.items()}
    loops = {name: build() for name, build in make.items()}
    flops = step_flops(loops["plain fp32"])
    seconds = in_turns({name: loop.train_step for name, loop in loops.items()}, ROUNDS, WARMUP)
    most = dict(zip(make, (ceiling["fp32"], ceiling[settings.precision]), strict=True))
    return pd.DataFrame(
        {
            "model": f"{case.name}, batch {settings.batch_size}",
            "step": name,
            "ms": 1000 * taken,
            "samples/s": settings.batch_size / taken,
            "times faster": seconds["plain fp32"] / taken,
            "memory [GB]": memory[name] / 1e9,
            "TFLOP/s": flops / taken / 1e12,
            "of the product's": flops / taken / most[name],
        }
        for name, taken in seconds.items()
    )


def _peak(build: Callable[[], Plain | Ours], device: torch.device) -> int:
    """Most memory that a loop takes over two steps, its model and optimizer too [bytes]; 0 where not on CUDA."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loop = build()
    loop.train_step()
    loop.train_step()
    return torch.cuda.max_memory_allocated(device) - before


def cached(case: Case, sizes: Config, settings: TrainConfig, clips: ClipDataset, folder: Path) -> pd.DataFrame:
    """Samples per second of whole training steps on frames from the cache: read ahead, and kept on the device."""
    torch.manual_seed(0)
    model = MODELS[case.kind][0](sizes)
    loop = Ours(case.objective(model), clips, settings, folder)
    device, steps = torch.device(settings.device), CACHED_STEPS

    def train(data: Dataset) -> None:
        batches = read_ahead(data, batch_indices(len(data), settings.batch_size, settings.seed, 0))
        for _, (samples, raw) in zip(range(steps), batches, strict=False):
            loop.trainer._train_step(samples, raw)

    resident = kept_on(device, clips)
    sources = {"read ahead": clips} | ({"kept on the device": resident} if resident is not clips else {})
    seconds = in_turns({name: lambda data=data: train(data) for name, data in sources.items()}, rounds=3)
    rows = [{"frames": name, "samples/s": steps * settings.batch_size / taken} for name, taken in seconds.items()]
    return pd.DataFrame(rows)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Print the tables; exit code 1 where no CUDA device is present."""
    if not torch.cuda.is_available():
        print("no CUDA device is present, so there is nothing to measure: run this where nvidia-smi lists one")
        return 1
    device = torch.device("cuda")
    ceiling = {"fp32": product_flops(device, torch.float32, PRODUCT)}
    ceiling["bf16"] = product_flops(device, torch.bfloat16, PRODUCT)
    print(device_name(device))
    print(
        *(f"product of {PRODUCT} x {PRODUCT} in {name}: {f / 1e12:.0f} TFLOP/s" for name, f in ceiling.items()),
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = [compare(case, case.sizes(), case.settings("cuda"), folder, ceiling) for case in CASES]
        print(pd.concat(tables).to_string(index=False, float_format="{:.3g}".format))
        source = write_pushing(folder / "pushing", clips=64, frames=32, size=256)
        clips = open_clips(ClipsConfig(data=str(source), image_size=256, cache_dir=str(folder / "cache"))).split(
            "train"
        )
        vae = CASES[0]
        print(f"\n{vae.name}, frames of 256 px from the cache")
        table = cached(vae, vae.sizes(), vae.settings("cuda"), clips, folder)
        print(table.to_string(index=False, float_format="{:.3g}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
