"""Reading a batch from the frame cache, against the training step it feeds and against decoding the JPEGs each time."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_step import SETTINGS, THREADS
from benchmarks.report import in_turns, line, run
from workbench.datasets.clips import ClipsConfig, open_clips
from workbench.datasets.synthetic import write_pushing
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.plots import image_grid
from workbench.runs import Run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer

BATCH, SIZE = 64, 256
MAX_SHARE = 0.05
MIN_RATIO = 20


def main() -> None:
    """Print the share of a step that reading takes, and the ratio to decoding."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = write_pushing(folder / "pushing", clips=16, frames=16, size=SIZE)
        clips = open_clips(ClipsConfig(data=str(source), image_size=SIZE, cache_dir=str(folder / "cache")))
        train = clips.split("train")
        chosen = np.random.default_rng(0).choice(len(train), (8, BATCH))
        files = sorted(source.glob("*/*.jpg"))
        turn = iter(range(10**6))

        def read() -> None:
            train.batch(chosen[next(turn) % len(chosen)])

        def decode() -> None:
            for i in chosen[next(turn) % len(chosen)]:
                np.asarray(Image.open(files[i]).convert("RGB"))

        seconds = in_turns({"cache": read, "jpeg": decode}, rounds=15, warmup=8)
        ratio = seconds["jpeg"] / seconds["cache"]
        jpeg, cache = (1e3 * seconds[name] for name in ("jpeg", "cache"))
        what = f"{BATCH} frames of {SIZE} px: {jpeg:.0f} ms from JPEG, {cache:.1f} ms cached"
        line(what, f"{ratio:.0f} times less", f"at least {MIN_RATIO}", ratio >= MIN_RATIO)

        model = ConvVAE(ConvVAEConfig()).to(memory_format=torch.channels_last).train()
        config = TrainConfig(batch_size=BATCH, device="cpu", **SETTINGS)
        rows = lambda x, x_hat: image_grid({"x": x, "x_hat": x_hat})  # noqa: E731
        trainer = Trainer(model, train, train, config, Run(folder), vae_weights(config), rows)
        raw = train.batch(chosen[0])
        step = in_turns({"step": lambda: trainer._train_step(chosen[0], raw)}, rounds=2)["step"]
        share = seconds["cache"] / step
        what = f"reading the batch, as a share of its full-size step of {step:.1f} s"
        line(what, f"{100 * share:.3f} %", f"{100 * MAX_SHARE:.0f} %", share <= MAX_SHARE)


if __name__ == "__main__":
    sys.exit(run(main))
