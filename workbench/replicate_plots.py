"""Figures of runs replicated over seeds; tables in, a matplotlib `Figure` out, as in `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from workbench.plots import LINE_STYLES, MARKERS, PALETTE, new_figure

COLUMNS = 3  # panels side by side
FAN = 0.5  # of the height of a row, over which its seeds are spread
MEAN = {"color": "black", "marker": "|", "ms": 20, "mew": 2, "ls": "none"}


def pictures(files: Mapping[str, Path]) -> Figure:
    """Pictures from files, one below the other, each under its title."""
    images = {title: plt.imread(path) for title, path in files.items()}
    width = 8.0
    heights = [width * image.shape[0] / image.shape[1] + 0.25 for image in images.values()]
    fig = new_figure(width, sum(heights))
    axes = fig.subplots(len(images), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, image) in zip(axes, images.items(), strict=True):
        ax.imshow(image)
        ax.set_title(title, fontsize=9, loc="left", pad=2)
        ax.axis("off")
    return fig


def dots(rows: pd.DataFrame, figures: Mapping[str, str]) -> Figure:
    """One panel per figure: every run as a dot, by setting, a marker per seed; the black bar is the mean.

    Axes do not begin at 0, unlike those of `plots.arms`: accuracies near 1 would all look alike there.

    Args:
        rows: Columns setting, seed and the figures; a setting whose runs all lack a figure is marked so.
        figures: Label with its unit by column.
    """
    settings, seeds = list(dict.fromkeys(rows["setting"])), sorted(set(rows["seed"]))
    n_columns = min(len(figures), COLUMNS)
    n_rows = -(-len(figures) // n_columns)
    fig = new_figure(3.6 * n_columns + 1, n_rows * (0.36 * len(settings) + 1.1) + 0.4)
    axes = fig.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(figures) :]:
        ax.set_visible(False)
    for ax, (column, label) in zip(axes.flat[: len(figures)], figures.items(), strict=True):
        _draw_dots(ax, rows, column, settings, seeds)
        ax.set_xlabel(label, fontsize=9)
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="x", alpha=0.3)
        sns.despine(ax=ax)
    axes[0, 0].set_yticks(range(len(settings)), settings)
    axes[0, 0].set_ylim(len(settings) - 0.5, -0.5)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(seeds) + 1, fontsize=9)
    return fig


def _draw_dots(ax: Axes, rows: pd.DataFrame, column: str, settings: Sequence[str], seeds: Sequence[int]) -> None:
    places = pd.Series(range(len(settings)), settings, dtype=float)
    offsets = FAN * (np.linspace(0, 1, len(seeds)) - 0.5) if len(seeds) > 1 else [0.0]
    for k, (seed, offset) in enumerate(zip(seeds, offsets, strict=True)):
        part = rows[rows["seed"] == seed]
        style = {"color": PALETTE[k % len(PALETTE)], "marker": MARKERS[k % len(MARKERS)]}
        ax.scatter(part[column], part["setting"].map(places) + offset, s=26, label=f"seed {seed}", zorder=3, **style)
    means = rows.groupby("setting")[column].mean()
    ax.plot(means[settings], places, label="mean", **MEAN)
    for name in means.index[means.isna()]:
        ax.text(
            0.5, places[name], "not measured", transform=ax.get_yaxis_transform(), ha="center", va="center", fontsize=8
        )


def loss_curves(
    logs: Mapping[str, Sequence[pd.DataFrame]],
    figure: str = "loss",
    label: str = "validation loss [weighted sum of the terms]",
) -> Figure:
    """A figure of the validation over epochs: the mean over seeds, a band from the least to the most, each seed thin.

    The mean and the band end where the first of the seeds ends. The axis is logarithmic where all values are positive.
    Losses whose terms or weights differ are not comparable; take a term, such as mse, for those.

    Args:
        logs: Rows of metrics.csv of each run, by setting: columns epoch, split and the figure.
        figure: Column.
        label: What it is, with its unit.

    Raises:
        ValueError: a run has no such figure in validation.
    """
    fig = new_figure(7.5, 4.2)
    ax, lowest = fig.subplots(), np.inf
    for i, (setting, runs) in enumerate(logs.items()):
        curves = pd.concat([_validation(setting, log, figure) for log in runs], axis=1)  # (epochs, seeds)
        colour, whole = PALETTE[i % len(PALETTE)], curves.dropna()
        ax.plot(curves.index, curves, color=colour, lw=0.7, alpha=0.6)
        ax.fill_between(whole.index, whole.min(axis=1), whole.max(axis=1), color=colour, alpha=0.2, lw=0)
        style = {"color": colour, "ls": LINE_STYLES[i % len(LINE_STYLES)], "marker": MARKERS[i % len(MARKERS)]}
        name = f"{setting} ({len(runs)} {'seed' if len(runs) == 1 else 'seeds'})"
        ax.plot(whole.index, whole.mean(axis=1), lw=2, ms=5, label=name, **style)
        lowest = min(lowest, curves.min(axis=None))
    if lowest > 0:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    ax.set(xlabel="epoch", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper", fontsize=9)
    return fig


def _validation(setting: str, log: pd.DataFrame, figure: str) -> pd.Series:
    """The figure by epoch."""
    rows = log[log["split"] == "val"] if "split" in log else log.iloc[:0]
    if rows.empty or figure not in rows or rows[figure].isna().any():
        raise ValueError(f"{figure} of a run of {setting}: must be in every row of split val; its log has {list(log)}")
    return rows.set_index("epoch")[figure]


def paired_differences(table: pd.DataFrame) -> Figure:
    """Differences in percent with their 95 % intervals around 0, a line each; filled where told from seed noise.

    A difference without an interval, of one seed, is a cross; where there is no percentage the line says so.

    Args:
        table: Columns figure, a, b, percent, low, high, distinguishable; as from `replicates.relative_differences`.
            A line is named after its figure, and after its settings where not all are of the same two.
    """
    fig = new_figure(8, 0.42 * len(table) + 1.5)
    ax = fig.subplots()
    one_pair = len(table[["a", "b"]].drop_duplicates()) == 1
    for i, row in enumerate(table.itertuples()):
        _draw_difference(ax, i, row)
    names = [row.figure if one_pair else f"{row.figure}: {row.a} - {row.b}" for row in table.itertuples()]
    ax.set_yticks(range(len(table)), names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.axvline(0, color="black", lw=1)
    pair = f"{table['a'].iloc[0]} - {table['b'].iloc[0]} [% of {table['b'].iloc[0]}]" if one_pair else "a - b [% of b]"
    ax.set_xlabel(f"difference {pair}, mean over seeds and 95 % interval")
    ax.grid(axis="x", alpha=0.3)
    sns.despine(ax=ax, left=True)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return fig


def _draw_difference(ax: Axes, i: int, row: tuple) -> None:
    """One line of the plot, its number written at the right edge."""
    note = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
    if np.isnan(row.percent):
        ax.text(1.01, i, f"no percentage, as {row.b} is 0", **note)
        return
    ax.text(1.01, i, f"{row.percent:+.3g} %", **note)
    if np.isnan(row.low):
        ax.plot(row.percent, i, "x", color="0.35", ms=7, mew=2, label="one seed: cannot be decided")
        return
    told = bool(row.distinguishable)
    name = "told from seed noise" if told else "not told from seed noise"
    colour, marker = (PALETTE[0], "o") if told else (PALETTE[1], "s")
    face = colour if told else "white"
    ax.hlines(i, row.low, row.high, color=colour, lw=2)
    ax.plot(row.percent, i, marker, color=colour, mfc=face, ms=7, mew=1.5, label=name)


def frontier(rows: pd.DataFrame, figure: str, label: str, higher: bool = False) -> Figure:
    """A figure against the size of the latent: the mean of each setting, and a whisker from its least to its most seed.

    Filled settings are on the frontier: none that is no larger is as good. The axis of sizes is logarithmic, that of
    the figure too where less is better and all is positive.

    Args:
        rows: One per run, with the columns setting, latent_size and the figure.
        figure: Column.
        label: What it is, with its unit.
        higher: Whether more is better.
    """
    grouped = rows.groupby("setting", sort=False)
    size, mean = grouped["latent_size"].mean(), grouped[figure].mean()
    least, most = grouped[figure].min(), grouped[figure].max()
    kept = _on_frontier(size, -mean if higher else mean)
    fig = new_figure(7.5, 4.6)
    ax = fig.subplots()
    line = pd.DataFrame({"size": size[kept], "mean": mean[kept]}).sort_values("size")
    ax.step(line["size"], line["mean"], where="post", color=PALETTE[0], ls="--", lw=1, label="frontier")
    for chosen, face, name in ((kept, PALETTE[0], "on the frontier"), (~kept, "white", "one no larger is as good")):
        whiskers = np.stack([(mean - least)[chosen], (most - mean)[chosen]])
        style = {"fmt": "o", "color": PALETTE[0], "mfc": face, "capsize": 3, "ms": 7, "label": name}
        ax.errorbar(size[chosen], mean[chosen], whiskers, **style)
    for _, same in mean.groupby(size):
        for k, name in enumerate(same.sort_values(ascending=False).index):
            right = (k % 2 == 0) != higher  # away from the line
            place = {"ha": "left" if right else "right", "xytext": (6 if right else -6, -12 if k % 2 else 5)}
            ax.annotate(name, (size[name], mean[name]), textcoords="offset points", fontsize=8, **place)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    if not higher and least.min() > 0:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    ax.margins(0.12)
    ax.set(xlabel="latent [numbers per image]", ylabel=label)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=3, fontsize=9)
    return fig


def _on_frontier(size: pd.Series, error: pd.Series) -> pd.Series:
    """Which settings no other, at most as large, undercuts; of equals the first."""
    order = pd.DataFrame({"size": size, "error": error}).sort_values(["size", "error"], kind="stable")
    return (order["error"] < order["error"].cummin().shift(fill_value=np.inf))[size.index]
