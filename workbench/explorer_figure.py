"""What the latent explorer shows as a figure, for pages on which no widget can live."""

import textwrap
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from workbench.colouring import Colouring
from workbench.plots import MARKERS, new_figure
from workbench.spaces import FIGURE_EVERY, ROUTE_STEPS, Space, State, Strip, View

MARGIN = 0.04  # around the points, which lie in [0, 1]
FEW = 3600
"""Points up to which each is drawn large, with a marker of its class; more are plain squares, as on the page."""
WALKING = ("path", "pin", "codes")
"""Modes in which the whole walk is shown."""
WRAPPED, KEY_WRAPPED = 110, 20  # [characters] of all captions together, and of a key
NAMED = 1 / 14  # share of a picture's height from which a layer has its name beside it
MAP_HEIGHT, STRIP_HEIGHT, PANEL_HEIGHT = 5.6, 1.9, 2.8
"""Of the map, of a row of a walk, and of what a state shows [inch]."""


def explorer_figure(
    space: Space, state: State, view: View | None, route: Float[np.ndarray, "m 2"], colouring: Colouring
) -> Figure:
    """The map with A, B and the walk between them; below it what the state shows, which while walking or pinning is
    the whole walk, where there is one; beside it the keys of both. Classes of points have markers of their own.

    Args:
        space: What is explored.
        state: What has been chosen.
        view: What that shows; None where it shows nothing.
        route: Map coordinates of the walk.
        colouring: Of the samples.
    """
    strip = _strip_of(space, state) if state.mode in WALKING else None
    height = STRIP_HEIGHT * len(strip.rows) if strip else PANEL_HEIGHT
    fig = new_figure(9, MAP_HEIGHT + height)
    upper, lower = fig.subfigures(2, 1, height_ratios=(MAP_HEIGHT, height))
    _draw_map(upper.subplots(), space, state, route, colouring)
    title = textwrap.fill(colouring.label, KEY_WRAPPED)
    upper.legend(handles=_handles(colouring), title=title, loc="outside right upper")
    if strip:
        _draw_strip(lower, strip)
    elif view:
        _draw_panels(lower, view)
    key = view.key if view else {}
    if key.get("kind") in ("numbers", "classes"):
        _add_key(upper, key)
    elif key.get("kind") == "layers":
        _mark_layers(lower.axes[0], key)
    return fig


def _strip_of(space: Space, state: State) -> Strip | None:
    """Pictures of the walk; None where there is no walk."""
    try:
        return space.strip(state, (ROUTE_STEPS - 1) // FIGURE_EVERY + 1)
    except (ValueError, OSError):
        return None


def _draw_map(ax: Axes, space: Space, state: State, route: np.ndarray, colouring: Colouring) -> None:
    rgb = colouring.rgb / 255
    looks = {"s": 24} if len(rgb) <= FEW else {"s": 4, "linewidths": 0}
    for entry in np.unique(colouring.entry_of):
        of_entry = colouring.entry_of == entry
        ax.scatter(*space.points[of_entry].T, c=rgb[of_entry], marker=_marker(colouring, int(entry)), **looks)
    ax.plot(*route.T, color="black", lw=1.5)
    for letter, pin in (("A", state.pin_a), ("B", state.pin_b)):
        if pin >= 0:
            box = {"boxstyle": "circle", "facecolor": "black"}
            ax.text(*space.points[pin], letter, color="white", ha="center", va="center", bbox=box)
    ends = np.concatenate([route.ravel(), (0, 1)])
    reach = ends.min() - MARGIN, ends.max() + MARGIN
    ax.set(xlabel=space.axes[0], ylabel=space.axes[1], xticks=[], yticks=[], xlim=reach, ylim=reach, aspect="equal")


def _marker(colouring: Colouring, entry: int) -> str:
    """Of the points of an entry of the legend: squares of many, else shapes of classes, and discs of numbers."""
    if len(colouring.rgb) > FEW:
        return "s"
    return MARKERS[entry % len(MARKERS) if colouring.kind == "classes" else 0]


def _handles(colouring: Colouring) -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker=_marker(colouring, i), color=colour, label=text)
        for i, (text, colour) in enumerate(colouring.entries)
    ]


def _draw_strip(fig: SubFigure, strip: Strip) -> None:
    axes = fig.subplots(len(strip.rows), len(strip.titles), squeeze=False)
    for row, (name, pictures) in zip(axes, strip.rows.items(), strict=True):
        _show(row, pictures)
        if len(strip.rows) > 1:
            row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, rotation=90, ha="right", va="center", fontsize=9)
    for ax, title in zip(axes[0], strip.titles, strict=True):
        ax.set_title(title, fontsize=9)
    fig.supxlabel(strip.label, fontsize=10)


def _draw_panels(fig: SubFigure, view: View) -> None:
    axes = fig.subplots(1, len(view.panels), squeeze=False)[0]
    _show(axes, [panel.pixels for panel in view.panels])
    for ax, panel in zip(axes, view.panels, strict=True):
        ax.set_title(f"{panel.title}\n{textwrap.fill(panel.caption, WRAPPED // len(view.panels))}", fontsize=9)
    fig.suptitle(view.headline, fontsize=11)


def _add_key(fig: SubFigure, key: dict[str, Any]) -> None:
    looks = {"ls": "", "marker": "s", "markeredgecolor": "0.5"}
    squares = [Line2D([], [], color=colour, label=text, **looks) for text, colour in key["entries"]]
    title = textwrap.fill(key["label"], KEY_WRAPPED)
    fig.legend(handles=squares, title=title, loc="outside right lower", fontsize=9, title_fontsize=9)


def _mark_layers(ax: Axes, key: dict[str, Any]) -> None:
    """Where layers begin, as ticks beside a picture, and names of those that have room."""
    height = ax.get_images()[0].get_size()[0]
    named = [(name, (start + end) / 2) for name, start, end in key["entries"] if end - start >= NAMED]
    starts = [height * start - 0.5 for _, start, _ in key["entries"]]
    ax.set_axis_on()
    ax.spines[:].set_visible(False)
    ax.set_yticks([height * middle - 0.5 for _, middle in named], [name for name, _ in named], fontsize=8)
    ax.set_yticks(starts, minor=True)
    ax.tick_params(axis="y", which="major", length=0, pad=8)
    ax.tick_params(axis="y", which="minor", length=7)
    ax.set(xticks=[], xlabel=textwrap.fill(key["label"], 2 * KEY_WRAPPED))


def _show(axes: np.ndarray, pictures: list[np.ndarray]) -> None:
    for ax, pixels in zip(axes, pictures, strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_axis_off()
