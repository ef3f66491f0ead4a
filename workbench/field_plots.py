"""Figures of fields over nodes and time; arrays in, a matplotlib `Figure` out, as in `plots`.

Values are in the field's unit; one colour scale holds for a whole figure and stands beside it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from workbench.plots import LINE_STYLES, PALETTE, new_figure

COLOURS = "cividis"


def field_grid(
    rows: dict[str, Float[np.ndarray, "k t n"]],
    coordinates: Float[np.ndarray, "n d"] | None,
    label: str,
    titles: Sequence[str] | None = None,
    column_label: str = "run",
) -> Figure:
    """Labelled rows of fields, one column per sample: at their last time over the plane of the nodes, or over time
    and node number where the nodes have no places.

    Args:
        rows: Fields by row label, equally many in every row.
        coordinates: Places of the nodes, of which the first two are drawn.
        label: What the field is, with its unit.
        titles: One label per column; counted from 0 where there are none.
        column_label: What the columns are.

    Raises:
        ValueError: Rows or titles of different lengths.
    """
    lengths = {name: len(fields) for name, fields in rows.items()}
    n = max(lengths.values(), default=0)
    if n == 0 or set(lengths.values()) != {n}:
        raise ValueError(f"rows of {lengths} fields: must be equally long and not empty")
    titles = [str(i) for i in range(n)] if titles is None else list(titles)
    if len(titles) != n:
        raise ValueError(f"{len(titles)} titles for {n} columns: must be equally many")
    width = float(np.clip(11 / n, 0.8, 2.0))  # [inch] of one field
    fig = new_figure(width * n + 2.2, 0.8 * width * len(rows) + 0.9)
    axes = fig.subplots(len(rows), n, squeeze=False)
    limits = _limits(list(rows.values()))
    for drawn, (name, fields) in zip(axes, rows.items(), strict=True):
        for ax, values in zip(drawn, fields, strict=True):
            _draw_field(ax, values, coordinates, limits)
        drawn[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, title in zip(axes[-1], titles, strict=True):
        ax.set_xlabel(title, fontsize=8)
    what = f"{label} at the last time" if coordinates is not None else f"{label}; time to the right, nodes upwards"
    fig.colorbar(ScalarMappable(Normalize(*limits), COLOURS), ax=axes, label=what, shrink=0.9)
    fig.supxlabel(column_label, fontsize=10)
    return fig


def _limits(fields: list[np.ndarray]) -> tuple[float, float]:
    return min(float(f.min()) for f in fields), max(float(f.max()) for f in fields)


def _draw_field(ax: Axes, values: np.ndarray, coordinates: np.ndarray | None, limits: tuple[float, float]) -> None:
    """One field (t, n) without ticks."""
    low, high = limits
    if coordinates is None or coordinates.shape[1] < 2:
        ax.imshow(values.T, origin="lower", aspect="auto", cmap=COLOURS, vmin=low, vmax=high)
    else:
        _draw_nodes(ax, values[-1], coordinates, limits)
    ax.set(xticks=[], yticks=[])


def _draw_nodes(ax: Axes, values: np.ndarray, coordinates: np.ndarray, limits: tuple[float, float]) -> None:
    x, y = coordinates[:, 0], coordinates[:, 1]
    area = ax.bbox.width * ax.bbox.height * (72 / ax.figure.dpi) ** 2
    size = float(np.clip(1.5 * area / len(x), 0.5, 60))
    ax.scatter(x, y, c=values, s=size, marker="s", linewidths=0, cmap=COLOURS, vmin=limits[0], vmax=limits[1])
    ax.set_aspect("equal")


def field_views(
    field: Float[np.ndarray, "t n"],
    predictions: dict[str, Float[np.ndarray, "t n"]],
    coordinates: Float[np.ndarray, "n d"] | None,
    label: str,
    steps: Sequence[int],
    nodes: Sequence[int],
) -> Figure:
    """A true field and its predictions, over the nodes at three times and over time at three nodes.

    Args:
        field: The true field.
        predictions: Predicted fields by name.
        coordinates: Places of the nodes; without them the nodes are drawn by number.
        label: What the field is, with its unit.
        steps: Time steps of the upper panels.
        nodes: Nodes of the lower panels.
    """
    fig = new_figure(4.0 * max(len(steps), len(nodes)), 6.4)
    upper, lower = fig.subfigures(2, 1)
    curves = {"true": field} | predictions
    mapped = coordinates is not None and coordinates.shape[1] == 2
    _draw_over_nodes(upper, curves, coordinates if mapped else None, label, steps)
    for ax, node in zip(lower.subplots(1, len(nodes), sharey=True, squeeze=False)[0], nodes, strict=True):
        _draw_curves(ax, {name: values[:, node] for name, values in curves.items()})
        ax.set(xlabel="time step", title=f"node {node}")
        if node == nodes[0]:
            ax.set_ylabel(label)
            ax.legend()
    return fig


def _draw_over_nodes(
    fig: Figure, curves: dict[str, np.ndarray], coordinates: np.ndarray | None, label: str, steps: Sequence[int]
) -> None:
    if coordinates is None:
        for ax, step in zip(fig.subplots(1, len(steps), sharey=True, squeeze=False)[0], steps, strict=True):
            _draw_curves(ax, {name: values[step] for name, values in curves.items()})
            ax.set(xlabel="node", title=f"time step {step}")
            if step == steps[0]:
                ax.set_ylabel(label)
        return
    limits = _limits([values[list(steps)] for values in curves.values()])
    axes = fig.subplots(len(curves), len(steps), squeeze=False)
    for drawn, (name, values) in zip(axes, curves.items(), strict=True):
        for ax, step in zip(drawn, steps, strict=True):
            _draw_nodes(ax, values[step], coordinates, limits)
            ax.set(xticks=[], yticks=[])
            if name == "true":
                ax.set_title(f"time step {step}", fontsize=10)
        drawn[0].set_ylabel(name, rotation=0, ha="right", va="center")
    fig.colorbar(ScalarMappable(Normalize(*limits), COLOURS), ax=axes, label=label)


def _draw_curves(ax: Axes, curves: dict[str, np.ndarray]) -> None:
    for i, (name, values) in enumerate(curves.items()):
        style = {"lw": 2.5, "alpha": 0.5} if i == 0 else {"lw": 1.4}
        ax.plot(values, color=PALETTE[i], ls=LINE_STYLES[i % len(LINE_STYLES)], label=name, **style)
    ax.grid(alpha=0.3)
