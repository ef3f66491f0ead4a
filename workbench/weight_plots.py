"""Figures of network weights and of networks rebuilt from them; arrays in, a matplotlib `Figure` out, as in `plots`.

Weights have one diverging colour scale in a figure, white at 0 and symmetric about it: it ends at the 99.5th percentile
of their absolute values, and what lies beyond has the colour of its end. What is not finite is grey.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from workbench.plots import LINE_STYLES, MARKERS, PALETTE, Values, new_figure

WEIGHT_LABEL = "weight [normalised]"
ACCURACY_LABEL = "accuracy [share correct]"
PERCENTILE = 99.5
GREY = 0.7
COLUMNS = 1000  # of a strip [px]; longer networks are averaged
STRIP_WIDTH, STRIP_HEIGHT, NAME_GAP = 10, 0.17, 0.17  # [inch]
MOST_NAMES = int(STRIP_WIDTH / NAME_GAP) - 2
LOWEST = -1.0  # R²; bars that go lower are cut there and say their value
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")

Weights = Float[Tensor, "b d"] | Float[np.ndarray, "b d"]


def heat_strips(
    rows: dict[str, Weights],
    layers: Sequence[tuple[str, int]],
    titles: Sequence[str] | None = None,
    column_label: str = "",
    label: str = WEIGHT_LABEL,
) -> Figure:
    """Networks as strips of coloured weights in their order, what models make of a network below it.

    Strips of more than 1000 weights are drawn as means of neighbours. Of more than 56 layers the largest are named.

    Args:
        rows: Flat weights by row label, equally many networks in every row; padding behind the last layer is left out.
        layers: Name and number of weights of each layer, in order.
        titles: One label per network; counted from 0 where there are none.
        column_label: What the networks are.
        label: What the weights are, with their unit.

    Raises:
        ValueError: Rows or titles of different lengths, or rows shorter than the layers.
    """
    lengths = {name: len(weights) for name, weights in rows.items()}
    n, size = max(lengths.values(), default=0), sum(length for _, length in layers)
    if n == 0 or set(lengths.values()) != {n}:
        raise ValueError(f"rows of {lengths} networks: must be equally long and not empty")
    titles = [str(i) for i in range(n)] if titles is None else list(titles)
    if len(titles) != n:
        raise ValueError(f"{len(titles)} titles for {n} networks: must be equally many")
    for name, weights in rows.items():
        if weights.shape[1] < size or size == 0:
            raise ValueError(f"row {name!r} has {weights.shape[1]} weights per network, its layers {size}: must fit")
    strips = np.stack([_columns(_array(weights)[:, :size]) for weights in rows.values()], 1)  # (n, rows, columns)
    norm = _symmetric(strips)
    fig = new_figure(STRIP_WIDTH + 2.5, max(2.4, n * (STRIP_HEIGHT * len(rows) + 0.08) + 1.5))
    axes = fig.subplots(n, squeeze=False, sharex=True)[:, 0]
    for ax, strip, title in zip(axes, strips, titles, strict=True):
        ax.imshow(strip, extent=(0, size, len(rows), 0), aspect="auto", interpolation="nearest", cmap=_map(), norm=norm)
        ax.set_yticks(np.arange(len(rows)) + 0.5, list(rows), fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        ax.vlines(np.cumsum([length for _, length in layers])[:-1], 0, len(rows), color="black", lw=0.8)
    _name_layers(axes[0], layers)
    averaged = f"; each column is the mean of about {size / COLUMNS:.2g}" if size > COLUMNS else ""
    axes[-1].set_xlabel(f"weights, in the order of the network [number]{averaged}")
    fig.supylabel(column_label, fontsize=10)
    fig.colorbar(ScalarMappable(norm, _map()), ax=axes, label=label, extend="both", pad=0.01, fraction=0.1, aspect=12)
    return fig


def heat_pixels(x: Weights, limit: int | float | None = None) -> UInt8[np.ndarray, "b h w 3"]:
    """Networks as nearly square pictures, one pixel per weight, row by row; grey behind the last one.

    Args:
        x: Flat weights.
        limit: Absolute weight at the ends of the colour scale, so that pictures of several calls compare; the 99.5th
            percentile of these networks when None.
    """
    weights = _array(x)
    height, width = _heat_shape(weights.shape[1])
    cells = np.full((len(weights), height * width), np.nan)
    cells[:, : weights.shape[1]] = weights
    norm = _symmetric(weights) if limit is None else Normalize(-limit, limit)
    drawn = np.ma.masked_invalid(cells.reshape(-1, height, width))
    return _map()(norm(drawn), bytes=True)[..., :3]


def layer_marks(layers: Sequence[tuple[str, int]], size: int) -> list[list[Any]]:
    """Name, start and end of each layer beside the picture that `heat_pixels` makes of a network [share of its height].

    Layers follow each other row by row, so that one may begin and end within a row.

    Args:
        layers: Name and number of weights of each, in order.
        size: Weights of the network, padding included.
    """
    cells = math.prod(_heat_shape(size))
    ends = np.cumsum([length for _, length in layers])
    return [
        [name, int(end - length) / cells, int(end) / cells] for (name, length), end in zip(layers, ends, strict=True)
    ]


def _heat_shape(size: int) -> tuple[int, int]:
    """Height and width of a picture of so many weights [px]."""
    width = math.ceil(math.sqrt(size))
    return -(-size // width), width


def accuracy_scatter(
    original: Values,
    rebuilt: dict[str, Values],
    controls: Sequence[str] = (),
    label: str = ACCURACY_LABEL,
    title: str = "",
) -> Figure:
    """Accuracy of rebuilt networks over that of their originals, each a mark; on the dotted line nothing is lost.

    Colours go to the methods in their order, then to the controls: as in `layer_bars`, which has no controls.

    Args:
        original: Accuracy of each network.
        rebuilt: That of what each method makes of it, by method.
        controls: Methods drawn with hollow marks, such as the mean network or noise of the same size.
        label: What the figure is, with its unit.
        title: Above the axes, such as the run.

    Raises:
        ValueError: A control that is no method, or accuracies that are not one per network.
    """
    unknown = [name for name in controls if name not in rebuilt]
    if unknown:
        raise ValueError(f"controls {unknown}: must be among {list(rebuilt)}")
    x = _array(original)
    fig = new_figure(6.8, 5)
    ax = fig.subplots()
    places = [name for name in rebuilt if name not in controls] + list(controls)
    for name, values in rebuilt.items():
        i = places.index(name)
        y, colour = _array(values), PALETTE[i % len(PALETTE)]
        if y.shape != x.shape:
            raise ValueError(f"{name!r} has accuracies of shape {y.shape}, the originals {x.shape}: must be the same")
        look = {"facecolors": "none", "lw": 1} if name in controls else {"facecolors": colour, "lw": 0, "zorder": 3}
        marker = MARKERS[i % len(MARKERS)]
        ax.scatter(x, y, s=22, marker=marker, edgecolors=[colour], alpha=0.8, label=name, **look)
    ax.plot([x.min(), x.max()], [x.min(), x.max()], color="black", ls=":", lw=1.2, label="as the original")
    ax.set(xlabel=f"original network: {label}", ylabel=f"rebuilt network: {label}")
    _head(ax, title)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper")
    return fig


def path_lines(
    t: Values, curves: dict[str, Float[np.ndarray, "p t"]], label: str = ACCURACY_LABEL, title: str = ""
) -> Figure:
    """A figure of networks along paths between two of them: mean over pairs as a line, quartiles as a band.

    Args:
        t: Position on the path, from 0 to 1.
        curves: One row per pair of networks, by kind of path.
        label: What the figure is, with its unit.
        title: Above the axes, such as the run.

    Raises:
        ValueError: Curves with another number of positions.
    """
    positions = _array(t)
    fig = new_figure(7.4, 4)
    ax = fig.subplots()
    for i, (name, values) in enumerate(curves.items()):
        if values.shape[1] != len(positions):
            raise ValueError(f"{name!r} has {values.shape[1]} positions, t has {len(positions)}: must be equally many")
        colour, style = PALETTE[i % len(PALETTE)], LINE_STYLES[i % len(LINE_STYLES)]
        ax.fill_between(positions, *np.quantile(values, (0.25, 0.75), axis=0), color=colour, alpha=0.18, lw=0)
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(positions, values.mean(0), color=colour, ls=style, marker=marker, ms=4, lw=1.8, label=name)
    ax.set(xlabel="position on the path from network A (0) to network B (1)", ylabel=label)
    _head(ax, title)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper", title="mean; band: quartiles")
    return fig


def layer_bars(table: pd.DataFrame, label: str = "R² of the weights [1: exact]", title: str = "") -> Figure:
    """Bars of R² by layer and method; 0 is the mean network, and bars below -1 are cut there with their value.

    Args:
        table: One row per layer, one column per method.
        label: What the figure is.
        title: Above the axes, such as the run and the architecture.
    """
    fig = _bars(table, None, label, title)
    fig.axes[0].axhline(0, color="black", lw=1.2, label="mean network")
    fig.axes[0].set_xlabel("layer")
    fig.legend(loc="outside right upper")
    return fig


def property_bars(
    table: pd.DataFrame, label: str = "R² on networks not fitted on [1: exact]", title: str = ""
) -> Figure:
    """Bars of how well features tell properties of networks, with standard errors; 0 is the mean of the property.

    Args:
        table: Columns target, features, score and error, as those of `probes.probe_table`, with one row for each pair
            of target and features.
        label: What the score is.
        title: Above the axes, such as the run and the architecture.

    Raises:
        ValueError: A column is missing, or a pair is there twice.
    """
    missing = [column for column in ("target", "features", "score", "error") if column not in table]
    if missing:
        raise ValueError(f"table lacks {missing}: it has {list(table)}")
    twice = table.duplicated(["target", "features"])
    if twice.any():
        pairs = [tuple(pair) for pair in table.loc[twice, ["target", "features"]].to_numpy()]
        raise ValueError(f"table has several rows of {pairs} (target, features): must have one; choose a kind of probe")
    order = {"index": list(dict.fromkeys(table["target"])), "columns": list(dict.fromkeys(table["features"]))}
    score, error = (
        table.pivot(index="target", columns="features", values=column).reindex(**order) for column in ("score", "error")
    )
    fig = _bars(score, error, label, title)
    fig.axes[0].axhline(0, color="black", lw=1.2, label="mean of the property")
    fig.axes[0].set_xlabel("property")
    fig.legend(loc="outside right upper", title="features")
    return fig


def _bars(values: pd.DataFrame, errors: pd.DataFrame | None, label: str, title: str) -> Figure:
    """A group of bars for each row, with one bar for each column."""
    n_groups, n_bars = values.shape
    fig = new_figure(float(np.clip(0.28 * n_groups * (n_bars + 1) + 3, 6.5, 14)), 4)
    ax, width = fig.subplots(), 0.84 / n_bars
    for i, name in enumerate(values):
        heights, x = _array(values[name]), np.arange(n_groups) + (i - (n_bars - 1) / 2) * width
        whiskers = None if errors is None else _array(errors[name])
        look = {"color": PALETTE[i % len(PALETTE)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
        ax.bar(x, heights, width, yerr=whiskers, capsize=2, label=str(name), **look)
        for place, height in zip(x, heights, strict=True):
            if height < LOWEST:
                box = {"facecolor": "white", "lw": 0, "pad": 1}
                ax.text(place, 0.95 * LOWEST, f"{height:.3g}", rotation=90, ha="center", fontsize=8, bbox=box)
    lowest = np.nanmin((values if errors is None else values - errors).to_numpy())
    ax.set_ylim(LOWEST if lowest < LOWEST else min(1.08 * lowest, 0), 1.05)
    names = [str(name) for name in values.index]
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 8 else {}
    ax.set_xticks(range(n_groups), names, **slanted)
    ax.set_ylabel(label)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    _head(ax, title)
    return fig


def _head(ax: Axes, title: str) -> None:
    """The title of a figure, at the left above its axes."""
    ax.set_title(title, fontsize=10, loc="left")


def _name_layers(ax: Axes, layers: Sequence[tuple[str, int]]) -> None:
    """Names of the layers above their middles, moved apart where they would touch, with a line to the place."""
    ends = np.cumsum([length for _, length in layers])
    largest = sorted(range(len(layers)), key=lambda i: -layers[i][1])[:MOST_NAMES]
    chosen = sorted(largest)
    middles = np.array([ends[i] - layers[i][1] / 2 for i in chosen])
    gap = ends[-1] * NAME_GAP / STRIP_WIDTH
    steps = gap * np.arange(len(middles))
    places = np.maximum.accumulate(middles - steps) + steps
    places = np.minimum(places, ends[-1] - steps[::-1])  # none beyond the end
    for i, middle, place in zip(chosen, middles, places, strict=True):
        ax.annotate(
            layers[i][0],
            xy=(middle, 0),
            xytext=(place, 16),
            textcoords=("data", "offset points"),
            rotation=45,
            rotation_mode="anchor",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.3", "shrinkA": 0, "shrinkB": 0},
        )


def _columns(weights: np.ndarray) -> np.ndarray:
    """Weights (n, d) as at most 1000 columns, each the mean of neighbours."""
    d = weights.shape[1]
    if d <= COLUMNS:
        return weights
    edges = np.linspace(0, d, COLUMNS + 1).astype(int)
    return np.add.reduceat(weights, edges[:-1], axis=1) / np.diff(edges)


def _symmetric(weights: np.ndarray) -> Normalize:
    """The colour scale of these weights."""
    finite = np.abs(weights[np.isfinite(weights)])
    limit = float(np.percentile(finite, PERCENTILE)) if finite.size else 0.0
    return Normalize(-(limit or 1.0), limit or 1.0)


def _map() -> Colormap:
    """Blue below 0, white, red above; grey for what is not finite."""
    return colormaps["RdBu_r"].with_extremes(bad=(GREY, GREY, GREY))


def _array(values: Values) -> np.ndarray:
    """Numbers as a float array on the CPU."""
    return np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, dtype=float)
