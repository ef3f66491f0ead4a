"""Figures of fields over nodes and time; arrays in, a matplotlib `Figure` out, as in `plots`.

Values are in the field's unit; one colour scale holds for all fields of a figure and stands beside them. Where the
nodes have places in a plane, a field is drawn on the triangles between neighbouring nodes, linear within each, so a
hole or bay of the domain is filled from its rim. Maps are to scale unless they would be very flat or very tall.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation
from scipy.spatial import cKDTree

from workbench.legends import scale_entries
from workbench.plots import LINE_STYLES, PALETTE, new_figure

COLOURS = "cividis"
FLATTEST, TALLEST = 0.3, 1.5  # height of a map over its width
PANEL = 3.4  # [inch] width of a panel of `field_views`
MAX_MAP_HEIGHT = 1.6  # [inch]
CHARACTER = 0.085  # [inch] of a label


def field_grid(
    rows: dict[str, Float[np.ndarray, "k t n"]],
    coordinates: Float[np.ndarray, "n d"] | None,
    label: str,
    titles: Sequence[str] | None = None,
    column_label: str = "run",
) -> Figure:
    """Labelled rows of fields, one column per sample: at their last time over the plane of the nodes, or over time
    and node number where the nodes have no places in a plane.

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
    places = _triangulate(coordinates)
    width = float(np.clip(11 / n, 0.8, 2.0))  # [inch] of one field
    shape = _aspect(places) if places else 0.8
    fig = new_figure(width * n + 2.0, max(1.8, (width * shape + 0.06) * len(rows) + 0.7))
    axes = fig.subplots(len(rows), n, squeeze=False)
    norm = _limits(list(rows.values()))
    for drawn, (name, fields) in zip(axes, rows.items(), strict=True):
        for ax, values in zip(drawn, fields, strict=True):
            if places:
                _draw_map(ax, values[-1], places, norm)
            else:
                _draw_history(ax, values, norm)
        _name_row(drawn[0], name)
    for ax, title in zip(axes[-1], titles, strict=True):
        ax.set_xlabel(title, fontsize=8)
    how = "fields at the last time step" if places else "in each field time to the right, nodes upwards"
    fig.supxlabel(f"{column_label}; {how}", fontsize=10)
    _add_scale(fig, axes, norm, label)
    return fig


def field_views(
    field: Float[np.ndarray, "t n"],
    predictions: dict[str, Float[np.ndarray, "t n"]],
    coordinates: Float[np.ndarray, "n d"] | None,
    label: str,
    steps: Sequence[int],
    nodes: Sequence[int],
) -> Figure:
    """A true field and its predictions, over the nodes at some times and over time at some nodes.

    Args:
        field: The true field.
        predictions: Predicted fields by name.
        coordinates: Places of the nodes, of which the first two are drawn; nodes without places in a plane are drawn
            by number.
        label: What the field is, with its unit.
        steps: Time steps of the upper panels.
        nodes: Nodes of the lower panels.
    """
    curves = {"true": field} | predictions
    places = _triangulate(coordinates)
    height = min(MAX_MAP_HEIGHT, 0.75 * PANEL * _aspect(places)) * len(curves) + 0.4 if places else 2.9
    fig = new_figure(PANEL * max(len(steps), len(nodes)), height + 2.9)
    upper, lower = fig.subfigures(2, 1, height_ratios=(height, 2.9))
    if places:
        _draw_maps(upper, curves, places, label, steps)
    else:
        over_nodes = {f"time step {step}": {name: values[step] for name, values in curves.items()} for step in steps}
        _draw_panels(upper, over_nodes, "node", label)
    over_time = {f"node {node}": {name: values[:, node] for name, values in curves.items()} for node in nodes}
    _draw_panels(lower, over_time, "time step", label)
    return fig


class FieldRaster:
    """Fields as pixels, fast enough for a slider: each pixel has the colour of the node nearest to it.

    A field is drawn at its last time over the plane of the nodes, or over time (to the right) and node number
    (upwards) where the nodes have no places in a plane.

    Args:
        coordinates: Places of the nodes, of which the first two are drawn.
        limits: Values of the first and the last colour, in the field's unit.
        width: Of the picture of a plane [px]; without a plane each value is one pixel.
    """

    def __init__(
        self, coordinates: Float[np.ndarray, "n d"] | None, limits: tuple[float, float], width: int = 160
    ) -> None:
        self._norm, self._nearest = Normalize(*limits), None
        places = _triangulate(coordinates)
        if places:
            shape = round(width * _aspect(places)), width
            x, y = (
                np.interp((np.arange(n) + 0.5) / n, (0, 1), (c.min(), c.max()))
                for n, c in zip(shape[::-1], (places.x, places.y), strict=True)
            )
            pixels = np.stack(np.meshgrid(x, y[::-1]), -1)  # (h, w, 2)
            self._nearest = cKDTree(np.stack([places.x, places.y], 1)).query(pixels)[1]

    @property
    def shows(self) -> str:
        """Which part of a field is drawn."""
        return "time to the right, nodes upwards" if self._nearest is None else "at the last time step"

    @property
    def scale(self) -> list[list[str]]:
        """Some values and their colours (#rrggbb), from the least to the most."""
        return scale_entries(float(self._norm.vmin), float(self._norm.vmax), COLOURS)

    def draw(self, field: Float[np.ndarray, "t n"]) -> UInt8[np.ndarray, "h w 3"]:
        """A field as pixels; values beyond the limits have the colour of the nearer limit."""
        values = field.T[::-1] if self._nearest is None else field[-1][self._nearest]
        return colormaps[COLOURS](self._norm(values), bytes=True)[..., :3]


def _triangulate(coordinates: np.ndarray | None) -> Triangulation | None:
    """Triangles between the nodes; None where these have no places, or none that span a plane."""
    if coordinates is None or coordinates.shape[1] < 2:
        return None
    places = coordinates[:, :2] - coordinates[:, :2].mean(0)
    return Triangulation(*coordinates[:, :2].T) if np.linalg.matrix_rank(places, rtol=1e-6) == 2 else None


def _aspect(places: Triangulation) -> float:
    """Height of a map over its width."""
    return float(np.clip(np.ptp(places.y) / np.ptp(places.x), FLATTEST, TALLEST))


def _limits(fields: list[np.ndarray]) -> Normalize:
    """One colour scale for all fields."""
    return Normalize(min(float(f.min()) for f in fields), max(float(f.max()) for f in fields))


def _draw_map(ax: Axes, values: np.ndarray, places: Triangulation, norm: Normalize) -> None:
    """A field (n,) at one time, over the plane."""
    ax.tripcolor(places, values, shading="gouraud", cmap=COLOURS, norm=norm, rasterized=True)
    ax.set(xticks=[], yticks=[], box_aspect=_aspect(places))
    ax.margins(0)


def _draw_history(ax: Axes, values: np.ndarray, norm: Normalize) -> None:
    """A field (t, n) over time and node number."""
    ax.imshow(values.T, origin="lower", aspect="auto", interpolation="nearest", cmap=COLOURS, norm=norm)
    ax.set(xticks=[], yticks=[])


def _name_row(ax: Axes, name: str) -> None:
    ax.set_ylabel(name, rotation=0, ha="right", va="center")


def _add_scale(fig: Figure | SubFigure, axes: np.ndarray, norm: Normalize, label: str) -> None:
    """The colour scale of all axes, its label in as many lines as the figure's height asks for."""
    height = fig.bbox.height / fig.dpi  # [inch]
    wrapped = textwrap.fill(label, max(10, int(0.8 * height / CHARACTER)))
    fig.colorbar(ScalarMappable(norm, COLOURS), ax=axes, label=wrapped, pad=0.01, fraction=0.1)


def _draw_maps(
    fig: SubFigure, curves: dict[str, np.ndarray], places: Triangulation, label: str, steps: Sequence[int]
) -> None:
    """One row per field, one column per time step."""
    norm = _limits([values[list(steps)] for values in curves.values()])
    axes = fig.subplots(len(curves), len(steps), squeeze=False)
    for drawn, (name, values) in zip(axes, curves.items(), strict=True):
        for ax, step in zip(drawn, steps, strict=True):
            _draw_map(ax, values[step], places, norm)
        _name_row(drawn[0], name)
    for ax, step in zip(axes[0], steps, strict=True):
        ax.set_title(f"time step {step}")
    _add_scale(fig, axes, norm, label)


def _draw_panels(fig: SubFigure, panels: dict[str, dict[str, np.ndarray]], x_label: str, label: str) -> None:
    """Panels side by side by title, each with the same curves."""
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for i, (name, values) in enumerate(curves.items()):
            style = {"lw": 2.5, "alpha": 0.5} if i == 0 else {"lw": 1.4}
            look = {"color": PALETTE[i % len(PALETTE)], "ls": LINE_STYLES[i % len(LINE_STYLES)]}
            ax.plot(values, label=name, **look, **style)
        ax.set(xlabel=x_label, title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    axes[0].legend()
