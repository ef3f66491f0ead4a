"""What tests of `launch` kill: `python launched.py FOLDER DEVICES [--slowly] [--infinite] [--nodes]` trains."""

import sys
import time
from pathlib import Path

import tiny
import torch

from workbench.models.conv_vae import ConvVAE


def slowly(number: int) -> None:
    """So that a kill can meet it."""
    time.sleep(0.1)


def main(folder: str, devices: str, *options: str) -> None:
    torch.set_num_threads(int(devices))
    images = tiny.Images(tiny.N, on_batch=slowly if "--slowly" in options else None)
    if "--infinite" in options:
        images.x[:] = torch.inf
    places = {"devices": int(devices), "num_nodes": 2 if "--nodes" in options else 1}
    tiny.train(Path(folder), tiny.conv_vae(ConvVAE), images, epochs=8, checkpoint_every=1, **places)


if __name__ == "__main__":
    main(*sys.argv[1:])
