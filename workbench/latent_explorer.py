"""The latent explorer: one widget with a map of latents, the decoded latent beside it, and controls to walk there.

The page holds no mathematics: events set traits, and each is answered at once with what `Exploration` shows for the
state they make together. While an answer is on its way the widget protocol merges what follows, so the latest wins.
"""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn
from traitlets import Bytes, Dict, Enum, Float, Int, List, TraitError, Unicode, validate

from workbench.comparison import decode, encode_split
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import Data, open_data
from workbench.exploration import FIGURE_EVERY, ROUTE_STEPS, SLIDER_STEPS, Exploration, State, save_strip
from workbench.interpolation import METHODS
from workbench.layers import Posterior
from workbench.models import VAES
from workbench.plots import PALETTE, new_figure
from workbench.process import pick_device
from workbench.provenance import check_same_data
from workbench.runs import Run, RunError, load_run

CHOICES = ("mode", "hover", "pin_a", "pin_b", "position", "method", "values", "draw")
"""Traits that together are a `State`."""
MODES = ("hover", "path", "sliders", "draw", "pin")
OTHERS = np.full(3, 190, np.uint8)
LEGEND_NUMBERS = 5
ENCODED = 64
"""Samples encoded at a time."""

_kept: dict[Path, tuple[State, list[str], dict[int, str]]] = {}
"""By run folder: the last state of its explorer, its sliders, and the names of the samples in the state."""


@dataclass(frozen=True)
class Colouring:
    """Colours of points that tell numbers, or classes.

    Args:
        rgb: Colour of each point.
        label: What they tell.
        kind: "numbers" or "classes".
        entries: Text and colour (#rrggbb) of each entry of the legend.
    """

    rgb: UInt8[np.ndarray, "n 3"]
    label: str
    kind: str
    entries: list[list[str]]


def colour_points(values: np.ndarray, label: str) -> Colouring:
    """Colours of numbers, from dark blue (least) to yellow, or of classes.

    Of more than 10 classes the 9 most frequent have a colour, and the others are grey.

    Args:
        values: One number, or one name, per point.
        label: What they are, with their unit.

    Raises:
        DataError: a number is not finite.
    """
    if values.dtype.kind in "fiu":
        return _colour_numbers(values.astype(float), label)
    return _colour_classes(values.astype(str), label)


def _colour_numbers(values: np.ndarray, label: str) -> Colouring:
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise DataError(f"column {label!r}: {broken} of {len(values)} values are not finite; choose another column")
    low, high = values.min(), values.max()
    scale, shares = colormaps["cividis"], np.linspace(0, 1, LEGEND_NUMBERS if high > low else 1)
    rgb = scale((values - low) / ((high - low) or 1.0), bytes=True)[:, :3]
    bar = scale(shares, bytes=True)[:, :3]
    entries = [[f"{low + t * (high - low):.4g}", _hex(colour)] for t, colour in zip(shares, bar, strict=True)]
    return Colouring(rgb, label, "numbers", entries)


def _colour_classes(values: np.ndarray, label: str) -> Colouring:
    names, of_point, counts = np.unique(values, return_inverse=True, return_counts=True)
    several = len(names) > len(PALETTE)
    shown = np.sort(np.argsort(-counts, kind="stable")[: len(PALETTE) - several])
    colours = np.tile(OTHERS, (len(names), 1))
    colours[shown] = np.round(255 * np.array(PALETTE[: len(shown)]))
    entries = [[str(names[i]), _hex(colours[i])] for i in shown]
    if several:
        entries.append([f"{len(names) - len(shown)} others", _hex(OTHERS)])
    return Colouring(colours[of_point], label, "classes", entries)


def _hex(rgb: UInt8[np.ndarray, "3"]) -> str:
    return f"#{rgb.tobytes().hex()}"


class LatentExplorer(anywidget.AnyWidget):
    """The widget; make it with `explore` or `explore_run`.

    Args:
        space: What is explored.
        colouring: Colours of its samples.
        run: Where strips are saved.
        state: What is shown first.
        message: A note to begin with.
    """

    _esm = Path(__file__).with_name("latent_explorer.js")
    _css = Path(__file__).with_name("latent_explorer.css")

    points = Bytes().tag(sync=True)
    colours = Bytes().tag(sync=True)
    legend = Dict().tag(sync=True)
    axes = List(Unicode()).tag(sync=True)
    dimensions = List(Dict()).tag(sync=True)

    mode = Enum(MODES, "pin").tag(sync=True)
    hover = Int(-1).tag(sync=True)
    pin_a = Int(-1).tag(sync=True)
    pin_b = Int(-1).tag(sync=True)
    position = Float(0.0, min=0.0, max=1.0).tag(sync=True)
    method = Enum(tuple(METHODS), "lerp").tag(sync=True)
    values = List(Float()).tag(sync=True)
    draw = Int(0).tag(sync=True)
    reset = Int(0).tag(sync=True)
    save = Int(0).tag(sync=True)

    picture = Bytes().tag(sync=True)
    picture_width = Int(0).tag(sync=True)
    picture_height = Int(0).tag(sync=True)
    caption = Unicode().tag(sync=True)
    neighbour = Bytes().tag(sync=True)
    neighbour_index = Int(-1).tag(sync=True)
    neighbour_caption = Unicode().tag(sync=True)
    here = List(Float()).tag(sync=True)
    path = Bytes().tag(sync=True)
    message = Unicode().tag(sync=True)
    answered = Int(0).tag(sync=True)

    def __init__(
        self, space: Exploration, colouring: Colouring, run: Run, state: State | None = None, message: str = ""
    ) -> None:
        state = state or State()
        self._space, self._colouring, self._run = space, colouring, run
        self._state = state if state.values else replace(state, values=space.own_values(state.origin))
        self._rgba = np.full((0, 0, 4), 255, np.uint8)
        super().__init__(
            points=space.points.astype("<f4").tobytes(),
            colours=colouring.rgb.tobytes(),
            legend={"label": colouring.label, "kind": colouring.kind, "entries": colouring.entries},
            axes=list(space.axes),
            dimensions=[
                {"name": name, "min": low, "max": high, "step": (high - low) / SLIDER_STEPS}
                for _, name, low, high in space.sliders
            ],
            **{name: getattr(self._state, name) for name in CHOICES if name != "values"},
            values=list(self._state.values),
        )
        self._answer(message)
        if not self.picture:  # a state that was kept may show nothing
            self.mode, self._state = "pin", replace(self._state, mode="pin")
            self._answer(message)
        self.observe(self._choose, CHOICES)
        self.observe(self._go_back, "reset")
        self.observe(self._save_strip, "save")

    @validate("hover", "pin_a", "pin_b")
    def _is_sample(self, proposal: dict[str, Any]) -> int:
        last, sample = len(self._space.z) - 1, proposal["value"]
        if not -1 <= sample <= last:
            raise TraitError(f"{proposal['trait'].name}={sample}: must be a sample, from 0 to {last}, or -1 for none")
        return sample

    def figure(self) -> Figure:
        """The map with A, B and the path between them, and below it decoded latents on the path; where there is no
        path, the sample shown and the real one nearest to it."""
        space, state, rgb = self._space, self._state, self._colouring.rgb / 255
        fig = new_figure(9, 7.5)
        upper, lower = fig.subfigures(2, 1, height_ratios=(5, 1.7))
        ax = upper.subplots()
        ax.scatter(*space.points.T, c=rgb, s=24 if len(rgb) < 2000 else 4)
        ax.plot(*np.frombuffer(self.path, "<f4").reshape(-1, 2).T, color="black", lw=1.5)
        for letter, pin in (("A", state.pin_a), ("B", state.pin_b)):
            if pin >= 0:
                box = {"boxstyle": "circle", "facecolor": "black"}
                ax.text(*space.points[pin], letter, color="white", ha="center", va="center", bbox=box)
        ax.set(xlabel=space.axes[0], ylabel=space.axes[1], xticks=[], yticks=[], aspect="equal")
        dots = [Line2D([], [], ls="", marker="o", color=colour, label=text) for text, colour in self._colouring.entries]
        upper.legend(handles=dots, title=self._colouring.label, loc="outside right upper")
        lower.supxlabel(f"{state.method}, position on the path from A (0) to B (1)" if self.path else "", fontsize=10)
        pictures = self._strip()
        for ax, (title, pixels) in zip(lower.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_axis_off()
            ax.set_title(title, fontsize=9)
        return fig

    def _strip(self) -> list[tuple[str, np.ndarray]]:
        """Pictures with their titles: of the path, or of what is shown."""
        space, state = self._space, self._state
        if self.path:
            positions = np.linspace(0, 1, ROUTE_STEPS)[::FIGURE_EVERY]
            x_hat = decode(space.model, space.path(state, ROUTE_STEPS)[::FIGURE_EVERY])
            return [(f"{t:g}", space.data.pixels(x)) for t, x in zip(positions, x_hat, strict=True)]
        size = (self.picture_height, self.picture_width, 4)
        shown = ((self.caption, self.picture), (self.neighbour_caption, self.neighbour))
        return [(textwrap.fill(text, 45), np.frombuffer(pixels, np.uint8).reshape(size)) for text, pixels in shown]

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and as a picture of the same content where no widget can live."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=100)
        return bundle | {"image/png": base64.b64encode(buffer.getvalue()).decode()}, metadata

    def _choose(self, _change: object) -> None:
        """Answer the state that the traits make together, once, however many of them a message has changed."""
        with self.hold_sync():
            if self.pin_a != self._state.pin_a:
                self.values = list(self._space.own_values(max(self.pin_a, 0)))  # this comes back here
            before = self._state
            pinned = "a" if self.pin_a != before.pin_a else "b" if self.pin_b != before.pin_b else before.pinned
            chosen = {name: getattr(self, name) for name in CHOICES} | {"values": tuple(self.values)}
            state = State(**chosen, pinned=pinned)
            if state != before:
                self._state = state
                self._answer()

    def _answer(self, *notes: str) -> None:
        """Show the state; what cannot be shown stays as it was, and `message` says why."""
        found = [note for note in notes if note]
        with self.hold_sync():
            for part in (self._show_route, self._show_picture):
                try:
                    part()
                except (ValueError, OSError) as error:
                    found.append(str(error))
            self.message = " ".join(dict.fromkeys(found))
            self.answered += 1
        state, name = self._state, self._space.samples.name
        samples = {i: name(i) for i in (state.hover, state.pin_a, state.pin_b) if 0 <= i < len(self._space.z)}
        _kept[self._run.path.resolve()] = state, [slider.name for slider in self._space.sliders], samples

    def _show_route(self) -> None:
        self.path = b""
        self.path = self._space.route(self._state).astype("<f4").tobytes()

    def _show_picture(self) -> None:
        view = self._space.view(self._state)
        self.picture_height, self.picture_width = view.pixels.shape[:2]
        self.picture, self.neighbour = self._as_rgba(view.pixels), self._as_rgba(view.neighbour_pixels)
        self.caption, self.neighbour_caption = view.caption, view.neighbour_caption
        self.neighbour_index, self.here = view.neighbour, view.here.tolist()

    def _as_rgba(self, pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
        """Pixels as a canvas takes them, through a buffer that is used again."""
        if self._rgba.shape[:2] != pixels.shape[:2]:
            self._rgba = np.full((*pixels.shape[:2], 4), 255, np.uint8)
        self._rgba[..., :3] = pixels
        return self._rgba.tobytes()

    def _go_back(self, _change: object) -> None:
        """Sliders back to the latent of A, or of the first sample, which is shown."""
        answered = self.answered
        with self.hold_sync():
            with self.hold_trait_notifications():
                self.values, self.mode = list(self._space.own_values(max(self.pin_a, 0))), "sliders"
            if self.answered == answered:
                self._answer()

    def _save_strip(self, _change: object) -> None:
        with self.hold_sync():
            try:
                files = save_strip(self._space, self._state, self._run)
                self.message = f"saved {', '.join(str(file.relative_to(self._run.path)) for file in files)}"
            except (ValueError, OSError) as error:
                self.message = str(error)
            self.answered += 1


def explore(
    model: nn.Module,
    samples: Dataset,
    posterior: Posterior,
    data: Data,
    run: Run,
    column: str = "",
    pins: Sequence[int] = (),
    dimensions: int = 6,
    span: int | float = 3.0,
) -> LatentExplorer:
    """The explorer of a model's latent space over some samples.

    Its state (pins, place on the path, values of sliders) is kept in memory by run folder, so that a cell which is run
    again goes on where it was.

    Args:
        samples: The samples on the map, a split of the data.
        posterior: Their posterior, see `comparison.encode_split`.
        data: The opened data.
        run: Where strips are saved.
        column: Column of the samples that colours the map; the data's main one where empty.
        pins: Samples pinned as A and B to begin with, at most two.
        dimensions, span: See `Exploration`.

    Raises:
        DataError: see `Exploration`; or the column is absent, or holds numbers that are not finite.
        ValueError: more than two pins, or pins that are no samples.
    """
    space = Exploration(model, samples, posterior, data, dimensions, span)
    column = column or data.main_column
    colouring = colour_points(samples.column(column), data.condition_label(column))
    if len(pins) > 2 or any(not 0 <= pin < len(space.z) for pin in pins):
        raise ValueError(f"pins={list(pins)}: must be at most two samples, from 0 to {len(space.z) - 1}")
    a, b = [*map(int, pins), -1, -1][:2]
    first = State(pin_a=a, pin_b=b, mode="path" if b >= 0 else "pin")
    state, note = _restore(space, run, first)
    return LatentExplorer(space, colouring, run, state, note)


def explore_run(
    path: str | Path,
    split: str = "test",
    column: str = "",
    most: int = 5000,
    checkpoint: str = "final",
    device: str = "auto",
) -> LatentExplorer:
    """The explorer of a trained run, over at most so many samples of a split (0: all); strips go into its folder.

    Raises:
        RunError: the run is unfinished, was trained on other data, or holds no autoencoder of single samples.
        CheckpointError: its files are damaged.
        DataError: see `explore`, and `open_data`.
    """
    path = Path(path)
    model, trained = load_run(path, checkpoint)
    if trained["model"]["kind"] not in VAES.values():
        kind = trained["model"]["kind"]
        raise RunError(f"{path} holds a model of kind {kind!r}: must be one of {', '.join(VAES.values())}")
    model.to(pick_device(device))
    data = open_data(trained["parameters"])
    check_same_data(path, trained, data.fingerprint)
    samples = data.split(split).subset(most)
    return explore(model, samples, encode_split(model, samples, ENCODED), data, Run(path), column)


def _restore(space: Exploration, run: Run, first: State) -> tuple[State, str]:
    """The state that was kept for a run, as far as it fits, and what did not; `first` where there is none."""
    if run.path.resolve() not in _kept:
        return first, ""
    state, sliders, samples = _kept[run.path.resolve()]
    if any(i >= len(space.z) or space.samples.name(i) != name for i, name in samples.items()):
        return first, "The samples are others than before: A and B begin anew."
    if sliders == [slider.name for slider in space.sliders]:
        return state, ""
    return replace(state, values=(), mode="pin" if state.mode == "sliders" else state.mode), ""
