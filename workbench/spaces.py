"""What the latent explorer asks of any space that it walks in: what is chosen, what that shows, and strips to keep."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from workbench.checkpoints import write_atomically
from workbench.datasets.loading import Dataset
from workbench.runs import Run

ROUTE_STEPS = 33
"""Points of the path drawn on the map, and pictures of a saved one."""
FIGURE_EVERY = 4
"""Every fourth of them stands in a figure."""
GIF_SIDE, GIF_MS = 320, 60  # [px] at most where it has to be enlarged, [ms] of a picture


@dataclass(frozen=True)
class State:
    """What has been chosen in the explorer.

    Args:
        mode: What is shown: the sample under the cursor (`hover`), the place on the `path`, the latent of the
            `sliders`, the random `draw`, the sample pinned last (`pin`), what is predicted from the `conditions`, or
            what the chain of `codes` makes of A.
        hover, pin_a, pin_b: Samples under the cursor and pinned as A and B; -1: none.
        pinned: Which was pinned last, "a" or "b".
        position: Place on the path, from 0 (A) to 1 (B).
        method: Of the path, "lerp" or "slerp".
        values: Value of each slider.
        draw: Number of the random draw, which is its seed.
        conditions: Value of each condition, in its unit.
        chain: Numbers of the codes that act one after the other.
    """

    mode: str = "pin"
    hover: int = -1
    pin_a: int = -1
    pin_b: int = -1
    pinned: str = "a"
    position: float = 0.0
    method: str = "lerp"
    values: tuple[float, ...] = ()
    draw: int = 0
    conditions: tuple[float, ...] = ()
    chain: tuple[int, ...] = ()

    @property
    def origin(self) -> int:
        """The sample that sliders and chains start from: A, or the first one."""
        return max(self.pin_a, 0)

    @property
    def sample(self) -> int:
        """The sample that `hover` and `pin` show: the one under the cursor, the one pinned last, or the first one."""
        if self.mode == "hover" and self.hover >= 0:
            return self.hover
        return self.pin_b if self.pinned == "b" and self.pin_b >= 0 else self.origin


class Range(NamedTuple):
    """Reach of a slider, with its name and unit."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """A picture: its title, what it shows in words, and its pixels."""

    title: str
    caption: str
    pixels: UInt8[np.ndarray, "h w 3"]


MEASURED = 64
"""Samples whose errors are measured at a time."""
NEAREST = "nearest sample"
"""Title of the panel with the nearest real sample."""


@dataclass(frozen=True)
class View:
    """What a state shows.

    Args:
        z: The latent; of a draw from a prior that is not one of the whole latent, the one that the draw is encoded to.
        here: Its map coordinates.
        panels: The pictures, what is decoded first.
        neighbour: The real sample marked on the map, whose latent is nearest; -1: none.
        headline: A short line above the pictures.
        key: Legend of the pictures, see the `key` of opened data.
    """

    z: Float[Tensor, " d"]
    here: Float[np.ndarray, "2"]
    panels: tuple[Panel, ...]
    neighbour: int = -1
    headline: str = ""
    key: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Strip:
    """Pictures of a walk.

    Args:
        rows: Equally many pictures in each row, of one size.
        titles: One for each column.
        label: What the columns are.
        ms: Duration of a column in an animation [ms].
    """

    rows: dict[str, list[UInt8[np.ndarray, "h w 3"]]]
    titles: list[str]
    label: str
    ms: int = GIF_MS


@runtime_checkable
class Space(Protocol):
    """A space with a map of samples, and what each state of a walk shows.

    Attributes: `samples` on the map; `points`, their coordinates (n, 2) in [0, 1], x to the right, y up; `axes`, names
    of these; `sliders` of latent dimensions; `conditions`, sliders of what samples are predicted from; `codes`, names
    of what may be chained; whether it `walks` from A to B, and `draws` at random. Without any, the explorer shows none.
    """

    samples: Dataset
    points: Float[np.ndarray, "n 2"]
    axes: tuple[str, str]
    sliders: Sequence[Any]
    conditions: Sequence[Range]
    codes: Sequence[str]
    walks: bool
    draws: bool

    def own_values(self, sample: int) -> tuple[float, ...]:
        """Values of the sliders at a sample's own latent."""

    def own_conditions(self, sample: int) -> tuple[float, ...]:
        """A sample's own conditions."""

    def errors(self) -> tuple[Float[np.ndarray, " n"], str]:
        """How far what is decoded for each sample is from it, and what that is, with its unit."""

    def view(self, state: State) -> View:
        """What a state shows; a ValueError says why it shows nothing."""

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the walk; none where there is none, a ValueError where it is not defined."""

    def strip(self, state: State, steps: int) -> Strip:
        """The walk in at most so many pictures; a ValueError says why there is none."""

    def record(self, state: State) -> tuple[Figure, dict[str, np.ndarray]]:
        """The walk to be kept: a figure, and its latents with what they belong to; a ValueError as `strip`."""


def save_strip(space: Space, state: State, run: Run) -> list[Path]:
    """Write a walk into the run folder, under the first number k that is free.

    `figures/strip-k.png` shows some of its pictures, `samples/strip-k.gif` all of them (rows side by side), and
    `samples/strip-k.npz` holds the latents.

    Returns:
        The three files.

    Raises:
        ValueError: there is no walk, see `Space.strip`.
        OSError: the run folder cannot be written.
    """
    strip, (figure, arrays) = space.strip(state, ROUTE_STEPS), space.record(state)
    png, gif, npz = _free(run.path)
    npz.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(npz, buffer.getvalue())
    write_atomically(gif, _gif([np.hstack(pictures) for pictures in zip(*strip.rows.values(), strict=True)], strip.ms))
    run.figure(figure, png.stem)
    return [png, gif, npz]


def _free(folder: Path) -> list[Path]:
    """The files of the next strip."""
    for k in count(1):
        files = [
            folder / place for place in (f"figures/strip-{k}.png", f"samples/strip-{k}.gif", f"samples/strip-{k}.npz")
        ]
        if not any(file.exists() for file in files):
            break
    return files


def _gif(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], ms: int) -> bytes:
    """Pictures as an endless animation, enlarged with hard edges in whole steps."""
    factor = max(1, GIF_SIDE // max(pictures[0].shape[:2]))
    frames = [Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)) for pixels in pictures]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=ms, loop=0)
    return buffer.getvalue()
