"""What the tests of the explorer share: a small untrained model of each kind of data, with latents far apart."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conditioned import simulations
from PIL import Image
from tiny_zoo import open_tiny_zoo
from torch import nn

from workbench.checkpoints import save_model
from workbench.comparison import decode, encode_split
from workbench.datasets.clips import ClipsConfig, open_clips
from workbench.datasets.layouts import LayoutsConfig, open_layouts
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import Data
from workbench.datasets.plans import write_plans
from workbench.exploration import Exploration
from workbench.explorer_widget import LatentExplorer
from workbench.layers import Posterior
from workbench.models import VAES, build_vae
from workbench.runs import Run, open_run
from workbench.spaces import State

KINDS = ("clips", "simulation", "layouts", "weights")
SIZES = {
    "clips": {"latent_dim": 3, "hidden_dims": [4, 6]},
    "simulation": {"filters": [6, 4], "latent_dim": 3, "hier_latent_dim": 2, "output_norm": False},
    "layouts": {"latent_channels": 2, "base_channels": 4, "downsampling_steps": 3},
    "weights": {"ch": 8, "ch_mult": [1, 1], "z_channels": 2, "embed_dim": 2, "num_res_blocks": 1},
}
SPREAD = 2.0  # standard deviation of the latents, so that decoded samples differ
PINNED = State(mode="path", pin_a=2, pin_b=5)


class Space(NamedTuple):
    """What an exploration is made from."""

    model: nn.Module
    samples: Dataset
    posterior: Posterior
    data: Data

    def explore(self, **settings: Any) -> Exploration:
        return Exploration(*self, **settings)


def open_kind(kind: str, folder: Path) -> Data:
    shares = {"val_fraction": 0.1, "test_fraction": 0.5, "cache_dir": str(folder / "cache")}
    if kind == "clips":
        return open_clips(ClipsConfig(data=str(write_noise(folder / "clips")), image_size=8, **shares))
    if kind == "simulation":
        return simulations(folder / "simulation")
    if kind == "layouts":
        write_plans(folder / "plans", 12, 32)
        return open_layouts(LayoutsConfig(data=str(folder / "plans"), image_size=32, **shares))
    return open_tiny_zoo(folder).data


def write_noise(folder: Path, clips: int = 16) -> Path:
    """Clips of two frames of 8 x 8 random pixels."""
    frames = np.random.default_rng(0).integers(0, 256, (clips, 2, 8, 8, 3), dtype=np.uint8)
    for i, clip in enumerate(frames):
        (folder / f"clip{i:02d}").mkdir(parents=True)
        for n, pixels in enumerate(clip):
            Image.fromarray(pixels).save(folder / f"clip{i:02d}" / f"{n}.png")
    return folder


def open_space(kind: str, folder: Path) -> Space:
    data = open_kind(kind, folder)
    torch.manual_seed(0)
    model = build_vae({"data_kind": kind} | SIZES[kind], data.sizes).eval()
    samples = data.split("test")
    found = encode_split(model, samples, 16)
    return Space(model, samples, Posterior(SPREAD * found.mu / found.mu.std(0), found.logvar), data)


@pytest.fixture(scope="module", params=KINDS)
def space(request: pytest.FixtureRequest, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Of each kind of data."""
    return open_space(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def clips(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Of clips alone."""
    return open_space("clips", tmp_path_factory.mktemp("clips"))


def write_run(space: Space, kind: str, folder: Path, name: str = "r") -> Run:
    """A finished run with a model, as notebook 02 leaves it."""
    parameters = {"experiment": "e", "run": name, "data_kind": kind} | space.data.config.model_dump()
    run = open_run(parameters, folder)
    run.record(data={"fingerprint": space.data.fingerprint})
    run.record(model={"kind": VAES[kind]} | space.model.config.model_dump())
    save_model(run.path / "model.safetensors", space.model, VAES[kind])
    return run


def say(widget: LatentExplorer, **traits: Any) -> None:
    """A message of the page, as it arrives."""
    widget.set_state(traits)


def shown(widget: LatentExplorer, panel: int = 0) -> np.ndarray:
    """A picture as the page draws it."""
    panel = widget.panels[panel]
    rgba = np.frombuffer(panel["pixels"], np.uint8).reshape(panel["height"], panel["width"], 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def assert_shows(widget: LatentExplorer, space: Space, z: torch.Tensor) -> None:
    np.testing.assert_array_equal(shown(widget), space.data.pixels(decode(space.model, z[None])[0]))
