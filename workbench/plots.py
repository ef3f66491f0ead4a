"""Figures of the notebooks: arrays or tensors in, a matplotlib `Figure` out; no model in sight.

A figure is opened through pyplot, so that a notebook's kernel knows how to show it (a bare `Figure` prints as
text there), and closed at once: the last expression of a cell is shown exactly once, and none stays behind.
Colours are seaborn's "colorblind" palette; what colour tells apart, line style, marker or a label tells too.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

Values = Tensor | np.ndarray | pd.Series | Sequence

COLORBLIND = "0173b2 de8f05 029e73 d55e00 cc78bc ca9161 fbafe4 949494 ece133 56b4e9"
PALETTE = [to_rgb(f"#{colour}") for colour in COLORBLIND.split()]  # seaborn itself takes long to import
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_CLASSES = 12
TOLERANCE = 1e-3  # rounding allowed beyond [-1, 1]
GAP = 0.06  # between images, in image widths
BINS = 60
MOST_BARS = 200
"""Of more, one outline is drawn: as bars they would be too thin to see, and slow."""


def image_grid(
    rows: dict[str, Float[Tensor, "n c h w"]],
    titles: Sequence[str] | None = None,
    column_label: str = "sample",
) -> Figure:
    """Labelled rows of images, one column per sample: originals above what models and floors make of them.

    Args:
        rows: Images in [-1, 1] by row label, grey or RGB, equally many in every row; sizes may differ.
        titles: One label per column; counted from 0 where there are none.
        column_label: What the columns are.

    Raises:
        ValueError: Rows or titles of different lengths, values outside [-1, 1], or neither 1 nor 3 channels.
    """
    n = len(next(iter(rows.values()), ()))
    lengths = {label: len(images) for label, images in rows.items()}
    if n == 0 or set(lengths.values()) != {n}:
        raise ValueError(f"rows of {lengths} images: must be equally long and not empty")
    titles = [str(i) for i in range(n)] if titles is None else list(titles)
    if len(titles) != n:
        raise ValueError(f"{len(titles)} titles for {n} columns: must be equally many")
    heights = [images.shape[-2] / images.shape[-1] for images in rows.values()]  # in image widths
    width = float(np.clip(10 / n, 0.5, 1.4))  # [inch] of one image
    margin = 0.1 * max(len(label) for label in rows) + 0.2  # [inch] for the row labels
    fig = new_figure(width * n * (1 + GAP) + margin, width * sum(heights) + 0.1 * len(rows) + 0.5)
    fig.set_layout_engine("compressed", h_pad=0.02)
    axes = fig.subplots(len(rows), squeeze=False, height_ratios=heights)[:, 0]
    for ax, (label, images) in zip(axes, rows.items(), strict=True):
        _draw_row(ax, label, images)
    axes[-1].set_xticks(np.arange(n) * (1 + GAP) + 0.5, titles, fontsize=8)
    axes[-1].set_xlabel(column_label)
    return fig


def frame_strip(clips: dict[str, Float[Tensor, "t c h w"]]) -> Figure:
    """Clips as rows of frames over time, numbered from 0; a shorter one ends in white.

    Args:
        clips: Frames in [-1, 1] by row label, one or more in every row.

    Raises:
        ValueError: As for `image_grid`.
    """
    longest = max(map(len, clips.values()), default=0)
    rows = {name: pad(x, (0, 0) * 3 + (0, longest - len(x)), value=1.0) for name, x in clips.items()}
    return image_grid(rows, column_label="frame")


def _draw_row(ax: Axes, label: str, images: Float[Tensor, "n c h w"]) -> None:
    """Images side by side on one axes, each one unit wide."""
    height = images.shape[-2] / images.shape[-1]
    for i, pixels in enumerate(_pixels(label, images)):
        left = i * (1 + GAP)
        ax.imshow(pixels, extent=(left, left + 1, 0, height), cmap="gray", vmin=0, vmax=1)
    ax.set(xlim=(0, len(images) * (1 + GAP) - GAP), ylim=(0, height), xticks=[], yticks=[])
    ax.set_ylabel(label, rotation=0, ha="right", va="center")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _pixels(label: str, images: Float[Tensor, "n c h w"]) -> np.ndarray:
    """Images as (n, h, w, c) in [0, 1]; refuses values outside [-1, 1] rather than clip them."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {label!r} have {images.shape[1]} channels: must be 1 (grey) or 3 (RGB)")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 - TOLERANCE and high <= 1 + TOLERANCE):  # also true of NaN
        raise ValueError(
            f"images of {label!r} span [{low:.4g}, {high:.4g}]: must lie in [-1, 1]; rescale them, or clamp "
            "what a decoder has overshot"
        )
    return ((_array(images).transpose(0, 2, 3, 1) + 1) / 2).clip(0, 1)


def training_curves(metrics: pd.DataFrame, terms: dict[str, str]) -> Figure:
    """One panel per logged term over the steps: training as a thin line, validation as a marked one.

    A vertical axis is logarithmic where all its values are positive.

    Args:
        metrics: One row per logged step with columns step, split ("train" or "val") and the terms; empty
            cells are left out.
        terms: Axis label with its unit by column, for example {"kl": "KL [nats]"}.

    Raises:
        ValueError: A column is missing, or there are no terms.
    """
    missing = [column for column in ("step", "split", *terms) if column not in metrics]
    if missing or not terms:
        raise ValueError(f"metrics lack {missing}: need step, split and at least one term; they have {list(metrics)}")
    n_columns = min(len(terms), 3)
    n_rows = -(-len(terms) // n_columns)
    fig = new_figure(4.2 * n_columns, 3 * n_rows)
    axes = [fig.add_subplot(n_rows, n_columns, i + 1) for i in range(len(terms))]
    for ax, (column, label) in zip(axes, terms.items(), strict=True):
        values = metrics[column].dropna()
        if len(values) and (values > 0).all():
            ax.set_yscale("log")
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        _draw_splits(ax, metrics, column)
        ax.set(title=column, xlabel="step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_ylabel(label, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend()
    return fig


def _draw_splits(ax: Axes, metrics: pd.DataFrame, column: str) -> None:
    styles = {"train": {"lw": 1}, "val": {"lw": 1.5, "ls": "--", "marker": "o", "ms": 4}}
    for i, (split, style) in enumerate(styles.items()):
        logged = metrics.loc[metrics["split"] == split, ["step", column]].dropna()
        if len(logged):
            ax.plot(logged["step"], logged[column], color=PALETTE[i], label=split, **style)


def error_bars(
    table: dict[str, float], label: str, highlight: str = "", errors: dict[str, float] | None = None
) -> Figure:
    """Horizontal bars, one per method, with the numbers written at their ends.

    Args:
        table: Error by method, drawn from top to bottom.
        label: What is measured, with its unit.
        highlight: Method drawn in a colour of its own, say the model among its floors; none where empty.
        errors: Standard error by method, drawn as whiskers.
    """
    fig = new_figure(7, 0.45 * len(table) + 1.1)
    ax = fig.subplots()
    colours = [PALETTE[1] if method == highlight else PALETTE[0] for method in table]
    whiskers = [errors[method] for method in table] if errors else None
    bars = ax.barh(list(table), list(table.values()), xerr=whiskers, capsize=3, color=colours)
    ax.bar_label(bars, fmt="{:.4g}", padding=4)
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.set(xlabel=label)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def copy_frame_curve(offsets: Values, mse: Values, psnr: Values) -> Figure:
    """Error of giving an earlier frame as the prediction of a later one, against how much earlier it is.

    Args:
        offsets: Distance between the two frames, in frames.
        mse: Mean squared error per element on the [-1, 1] scale, one per offset.
        psnr: Mean peak signal-to-noise ratio in dB, one per offset.
    """
    fig = new_figure(9, 3.2)
    labels = ("MSE [per element, [-1, 1] scale]", "PSNR [dB]")
    for ax, values, label in zip(fig.subplots(1, 2), (mse, psnr), labels, strict=True):
        ax.plot(_array(offsets), _array(values), "o-", color=PALETTE[0])
        ax.set(xlabel="offset [frames]", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    return fig


def pca_curve(components: Values, errors: Values, label: str) -> Figure:
    """Held-out error of PCA against its number of components, the first being none: the mean sample.

    Args:
        components: Number of components, from 0.
        errors: One for each.
        label: What the error is, with its unit.
    """
    fig = new_figure(6, 3.4)
    ax = fig.subplots()
    ax.plot(_array(components), _array(errors), "o-", color=PALETTE[0], label="PCA")
    ax.axhline(float(_array(errors)[0]), color="black", ls=":", label="mean sample")
    ax.set_xscale("symlog", base=2, linthresh=1)
    ax.set_yscale("log" if (_array(errors) > 0).any() else "linear")
    ax.set_xticks(_array(components), [f"{n:g}" for n in _array(components)])
    ax.set(xlabel="components [numbers per sample]", ylabel=label)
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def histogram_of_values(values: dict[str, Values], label: str) -> Figure:
    """Step histograms on shared bins, one per channel or split, each as shares of its own values.

    Args:
        values: Numbers by name, of any shape.
        label: What they are, with its unit.
    """
    arrays = {name: _array(numbers).ravel() for name, numbers in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=BINS)
    fig = new_figure(7, 3.4)
    ax = fig.subplots()
    for i, (name, numbers) in enumerate(arrays.items()):
        shares = np.histogram(numbers, edges)[0] / len(numbers)
        style = LINE_STYLES[i % len(LINE_STYLES)]
        ax.stairs(shares, edges, color=PALETTE[i % len(PALETTE)], ls=style, lw=1.6, label=name)
    ax.set(xlabel=label, ylabel=f"share of values per bin ({BINS} bins)")
    ax.legend()
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def kl_spectrum(kl: Float[Tensor, " d"], threshold_note: str | None = None, label: str = "KL [nats]") -> Figure:
    """KL of every latent dimension, largest first, and the share of the total they reach together.

    Args:
        kl: KL of each dimension in nats, see `metrics.kl_per_dimension`; or its variance, where there is none.
        threshold_note: A sentence for the title, for example how many dimensions are active.
        label: Which of the two, with its unit.
    """
    what = label.partition(" [")[0]
    heights = np.sort(_array(kl))[::-1]
    ranks = np.arange(1, len(heights) + 1)
    fig = new_figure(float(np.clip(0.2 * len(heights) + 2, 6, 12)), 3.6)
    ax = fig.subplots()
    if len(heights) <= MOST_BARS:
        ax.bar(ranks, heights, color=PALETTE[0], label=f"{what} of the dimension")
    else:
        ax.stairs(heights, np.append(ranks, len(ranks) + 1) - 0.5, fill=True, color=PALETTE[0])
        ax.patches[-1].set_label(f"{what} of the dimension")
    ax.set(xlabel=f"latent dimensions, by descending {what} [rank]", ylabel=label, ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(threshold_note or "", fontsize=10)
    handles = ax.get_legend_handles_labels()
    if heights.sum() > 0:
        share = ax.twinx()
        share.plot(
            ranks,
            100 * heights.cumsum() / heights.sum(),
            ".-" if len(heights) <= MOST_BARS else "-",
            color=PALETTE[1],
            label="cumulative share",
        )
        share.set(ylabel=f"share of the total {what} [%]", ylim=(0, 105))
        handles = [a + b for a, b in zip(handles, share.get_legend_handles_labels(), strict=True)]
    fig.legend(*handles, loc="outside lower center", ncols=2)
    return fig


def latent_map(
    z2: Float[Tensor, "n 2"],
    colour: Values,
    label: str,
    title: str,
    axis_labels: tuple[str, str] = ("map axis 1", "map axis 2"),
) -> Figure:
    """Scatter of 2-D points, coloured by a numeric column (with a colour bar) or by classes (with a legend).

    Of more than 12 classes the 11 most frequent have a colour, and the others are grey.

    Args:
        z2: Latents, or a projection of them.
        colour: One number, or one class name, per point.
        label: What the colour shows, with its unit.
        title: What is mapped and how.
        axis_labels: Labels of the two axes.
    """
    points, column = _array(z2), np.asarray(colour)
    fig = new_figure(7, 5)
    ax = fig.subplots()
    ax.set(title=title, xlabel=axis_labels[0], ylabel=axis_labels[1])
    if column.dtype.kind in "fiu":
        fig.colorbar(ax.scatter(*points.T, c=column, s=14, cmap="cividis"), label=label)
        return fig
    names, counts = np.unique(column.astype(str), return_counts=True)
    shown = (
        names if len(names) <= MAX_CLASSES else np.sort(names[np.argsort(-counts, kind="stable")[: MAX_CLASSES - 1]])
    )
    others = ~np.isin(column.astype(str), shown)
    if others.any():
        name = f"{len(names) - len(shown)} others"
        ax.scatter(*points[others].T, s=10, color="0.75", marker=".", label=name)
    for i, name in enumerate(shown):
        of_class = points[column.astype(str) == name]
        marker = MARKERS[i % len(MARKERS)]
        ax.scatter(*of_class.T, s=18, color=PALETTE[i % len(PALETTE)], marker=marker, label=name)
    fig.legend(title=label, loc="outside right upper")
    return fig


def path_lengths(ratios: dict[str, Values]) -> Figure:
    """Path length ratios of each method as points over a box of their quartiles; 1 is a straight path.

    Args:
        ratios: Ratios by method, see `metrics.path_length_ratio`.
    """
    fig = new_figure(1.6 * len(ratios) + 2.4, 4)
    ax = fig.subplots()
    jitter = np.random.default_rng(0)  # of its own, so that drawing changes no other draw
    for i, values in enumerate(ratios.values()):
        values = _array(values)
        values = values[~np.isnan(values)]
        ax.boxplot(values, positions=[i], widths=0.4, showfliers=False, medianprops={"color": "black"})
        ax.scatter(i + jitter.uniform(-0.15, 0.15, len(values)), values, s=10, alpha=0.6, color=PALETTE[i])
    ax.axhline(1, color="black", ls=":", label="straight path")
    ax.set_xticks(range(len(ratios)), list(ratios))
    ax.set(xlabel="interpolation", ylabel="decoded path length / straight distance")
    ax.legend()
    return fig


def error_over_conditions(conditions: dict[str, Values], errors: Values, label: str) -> Figure:
    """One panel per condition: the error of each sample over the condition's value.

    Args:
        conditions: Values by the condition's name, one per sample.
        errors: One per sample.
        label: What the error is, with its unit.
    """
    n_columns = min(len(conditions), 4)
    n_rows = -(-len(conditions) // n_columns)
    fig = new_figure(3.1 * n_columns, 2.6 * n_rows)
    axes = fig.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(conditions) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes.flat[: len(conditions)], conditions.items(), strict=True):
        ax.scatter(_array(values), _array(errors), s=12, alpha=0.7, color=PALETTE[0])
        ax.set(xlabel=name, yscale="log")
        ax.grid(alpha=0.3)
    fig.supylabel(label, fontsize=9)
    return fig


def arms(rows: pd.DataFrame, figures: dict[str, str]) -> Figure:
    """One panel per figure: every training as a dot, by setting; the bar is their mean.

    Args:
        rows: One row per training, with the column arm and one for each figure.
        figures: Label with its unit by column.
    """
    names = list(dict.fromkeys(rows["arm"]))
    fig = new_figure(4.6 * len(figures) + 1, 0.42 * len(names) + 1.2)
    axes = fig.subplots(1, len(figures), squeeze=False, sharey=True)[0]
    for ax, (column, label) in zip(axes, figures.items(), strict=True):
        for i, name in enumerate(names):
            values = _array(rows.loc[rows["arm"] == name, column])
            ax.barh(i, values.mean(), color=PALETTE[0], alpha=0.35)
            ax.scatter(values, np.full(len(values), i), color="black", s=16, zorder=3)
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel=label, xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    return fig


def new_figure(width: int | float, height: int | float) -> Figure:
    """An empty figure of a size in inches that pyplot has already let go of."""
    fig = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(fig)
    return fig


def _array(values: Values) -> np.ndarray:
    """Numbers as a float array on the CPU."""
    return np.asarray(values.detach().cpu().float() if isinstance(values, Tensor) else values, dtype=float)
