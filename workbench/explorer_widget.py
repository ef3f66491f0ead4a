"""The widget of the latent explorer: a map of samples, beside it what is chosen, and controls to walk there.

The page holds no mathematics: events set traits, and each is answered at once with what the space shows for the state
they make together. While an answer is on its way the widget protocol merges what follows, so the latest wins.
"""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from traitlets import Bool, Bytes, Dict, Enum, Float, Int, List, TraitError, Unicode, validate

from workbench.colouring import Colouring
from workbench.explorer_figure import explorer_figure
from workbench.interpolation import METHODS
from workbench.runs import Run
from workbench.spaces import Panel, Space, State, View, save_strip

CHOICES = {"condition_values": "conditions"} | {
    name: name for name in ("mode", "hover", "pin_a", "pin_b", "position", "method", "values", "draw", "chain")
}
"""Traits that together are a `State`, and what they are called there."""
LISTS = ("values", "conditions", "chain")
"""What of it are lists on the page, and tuples in a state."""
MODES = ("hover", "path", "sliders", "draw", "pin", "conditions", "codes")
SLIDER_STEPS = 200
SCRIPTS = ("explorer_pictures.js", "latent_explorer.js")
"""The page's side, in the order in which it is put together."""

_kept: dict[Path, tuple[State, list[list[str]], dict[int, str]]] = {}
"""By run folder: the last state of its explorer, names of its controls, and names of the samples in the state."""


class LatentExplorer(anywidget.AnyWidget):
    """The widget; make it with a function of `latent_explorer`.

    Args:
        space: What is explored.
        colouring: Colours of its samples.
        run: Where strips are saved.
        state: What is shown first.
        message: A note to begin with.
    """

    _esm = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    _css = Path(__file__).with_name("latent_explorer.css")

    points = Bytes().tag(sync=True)
    colours = Bytes().tag(sync=True)
    legend = Dict().tag(sync=True)
    axes = List(Unicode()).tag(sync=True)
    dimensions = List(Dict()).tag(sync=True)
    conditions = List(Dict()).tag(sync=True)
    codes = List(Unicode()).tag(sync=True)
    walks = Bool(True).tag(sync=True)
    draws = Bool(True).tag(sync=True)

    mode = Enum(MODES, "pin").tag(sync=True)
    hover = Int(-1).tag(sync=True)
    pin_a = Int(-1).tag(sync=True)
    pin_b = Int(-1).tag(sync=True)
    position = Float(0.0, min=0.0, max=1.0).tag(sync=True)
    method = Enum(tuple(METHODS), "lerp").tag(sync=True)
    values = List(Float()).tag(sync=True)
    condition_values = List(Float()).tag(sync=True)
    chain = List(Int()).tag(sync=True)
    draw = Int(0).tag(sync=True)
    reset = Int(0).tag(sync=True)
    save = Int(0).tag(sync=True)

    panels = List(Dict()).tag(sync=True)
    headline = Unicode().tag(sync=True)
    key = Dict().tag(sync=True)
    neighbour_index = Int(-1).tag(sync=True)
    here = List(Float()).tag(sync=True)
    path = Bytes().tag(sync=True)
    message = Unicode().tag(sync=True)
    answered = Int(0).tag(sync=True)

    def __init__(
        self, space: Space, colouring: Colouring, run: Run, state: State | None = None, message: str = ""
    ) -> None:
        self._space, self._colouring, self._run = space, colouring, run
        self._view: View | None = None
        self._walk: tuple[int, int, str] | None = None  # what `path` is drawn of
        self._rgba: dict[tuple[int, ...], np.ndarray] = {}
        self._state = self._with_own(state or State())
        super().__init__(
            points=space.points.astype("<f4").tobytes(),
            colours=colouring.rgb.tobytes(),
            legend={"label": colouring.label, "kind": colouring.kind, "entries": colouring.entries},
            axes=list(space.axes),
            dimensions=_as_sliders(space.sliders),
            conditions=_as_sliders(space.conditions),
            codes=list(space.codes),
            walks=space.walks,
            draws=space.draws,
            **{trait: _plain(getattr(self._state, name)) for trait, name in CHOICES.items()},
        )
        self._answer(message)
        if not self.panels:  # a state that was kept may show nothing
            self.mode, self._state = "pin", replace(self._state, mode="pin")
            self._answer(message)
        self.observe(self._choose, list(CHOICES))
        self.observe(self._go_back, "reset")
        self.observe(self._save_strip, "save")

    @validate("hover", "pin_a", "pin_b")
    def _is_sample(self, proposal: dict[str, Any]) -> int:
        last, sample = len(self._space.points) - 1, proposal["value"]
        if not -1 <= sample <= last:
            raise TraitError(f"{proposal['trait'].name}={sample}: must be a sample, from 0 to {last}, or -1 for none")
        return sample

    def figure(self) -> Figure:
        """What is shown, as `explorer_figure.explorer_figure` draws it."""
        route = np.frombuffer(self.path, "<f4").reshape(-1, 2)
        return explorer_figure(self._space, self._state, self._view, route, self._colouring)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and as a picture of the same content where no widget can live."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=100)
        return bundle | {"image/png": base64.b64encode(buffer.getvalue()).decode()}, metadata

    def _with_own(self, state: State) -> State:
        """A state whose sliders stand at their samples' own values where it has none."""
        values = state.values or self._space.own_values(state.origin)
        return replace(state, values=values, conditions=state.conditions or self._space.own_conditions(state.sample))

    def _choose(self, _change: object) -> None:
        """Answer the state that the traits make together, once, however many of them a message has changed."""
        with self.hold_sync():
            if self.pin_a != self._state.pin_a:
                self.values = list(self._space.own_values(max(self.pin_a, 0)))  # this comes back here
            if self.mode in ("hover", "pin"):
                self.condition_values = list(self._space.own_conditions(self._chosen().sample))  # and this
            state = self._chosen()
            if state != self._state:
                self._state = state
                self._answer()

    def _chosen(self) -> State:
        """The state that the traits make together."""
        before = self._state
        pinned = "a" if self.pin_a != before.pin_a else "b" if self.pin_b != before.pin_b else before.pinned
        chosen = {name: getattr(self, trait) for trait, name in CHOICES.items()}
        return State(**chosen | {name: tuple(chosen[name]) for name in LISTS}, pinned=pinned)

    def _answer(self, *notes: str) -> None:
        """Show the state; what cannot be shown stays as it was, and `message` says why."""
        found = [note for note in notes if note]
        with self.hold_sync():
            for part in (self._show_route, self._show_view):
                try:
                    part()
                except (ValueError, OSError) as error:
                    found.append(str(error))
            self.message = " ".join(dict.fromkeys(found))
            self.answered += 1
        state, name = self._state, self._space.samples.name
        samples = {i: name(i) for i in (state.hover, state.pin_a, state.pin_b) if 0 <= i < len(self._space.points)}
        _kept[self._run.path.resolve()] = state, _controls(self._space), samples

    def _show_route(self) -> None:
        walk = (self._state.pin_a, self._state.pin_b, self._state.method)
        if walk != self._walk:
            self._walk, self.path = None, b""
            self.path = self._space.route(self._state).astype("<f4").tobytes()
            self._walk = walk

    def _show_view(self) -> None:
        view = self._view = self._space.view(self._state)
        self.panels = [self._as_trait(panel) for panel in view.panels]
        self.headline, self.key = view.headline, view.key
        self.neighbour_index, self.here = view.neighbour, view.here.tolist()

    def _as_trait(self, panel: Panel) -> dict[str, Any]:
        height, width = panel.pixels.shape[:2]
        sizes = {"pixels": self._as_rgba(panel.pixels), "width": width, "height": height}
        return {"title": panel.title, "caption": panel.caption} | sizes

    def _as_rgba(self, pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
        """Pixels as a canvas takes them, through a buffer that is used again."""
        shape = pixels.shape[:2]
        if shape not in self._rgba:
            self._rgba[shape] = np.full((*shape, 4), 255, np.uint8)
        self._rgba[shape][..., :3] = pixels
        return self._rgba[shape].tobytes()

    def _go_back(self, _change: object) -> None:
        """Sliders back to what A, or the first sample, has of its own, which is shown."""
        answered, origin = self.answered, max(self.pin_a, 0)
        with self.hold_sync():
            with self.hold_trait_notifications():
                self.values, self.condition_values = (
                    list(own(origin)) for own in (self._space.own_values, self._space.own_conditions)
                )
                self.mode = "sliders" if self.values else "conditions"
            if self.answered == answered:
                self._answer()

    def _save_strip(self, _change: object) -> None:
        with self.hold_sync():
            try:
                files = save_strip(self._space, self._state, self._run)
                self.message = f"saved {', '.join(str(file.relative_to(self._run.path)) for file in files)}"
            except OSError as error:
                self.message = f"not saved into {self._run.path}: {error}"
            except ValueError as error:
                self.message = str(error)
            self.answered += 1


def restore(space: Space, run: Run, first: State) -> tuple[State, str]:
    """The state that was kept for a run, as far as it fits, and what did not; `first` where there is none."""
    if run.path.resolve() not in _kept:
        return first, ""
    state, controls, samples = _kept[run.path.resolve()]
    if any(i >= len(space.points) or space.samples.name(i) != name for i, name in samples.items()):
        return first, "The samples are others than before: A and B begin anew."
    if controls == _controls(space):
        return state, ""
    kept = state.mode in ("hover", "path", "draw", "pin")
    return replace(state, values=(), conditions=(), chain=(), mode=state.mode if kept else "pin"), ""


def _controls(space: Space) -> list[list[str]]:
    """Names of sliders, conditions and codes."""
    return [[slider.name for slider in part] for part in (space.sliders, space.conditions)] + [list(space.codes)]


def _as_sliders(ranges: Any) -> list[dict[str, Any]]:
    return [
        {"name": part.name, "min": part.low, "max": part.high, "step": (part.high - part.low) / SLIDER_STEPS}
        for part in ranges
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
