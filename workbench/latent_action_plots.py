"""Figures of latent actions; arrays or tables in, a matplotlib `Figure` out, as in `plots`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from workbench.plots import LINE_STYLES, MARKERS, PALETTE, image_grid, new_figure

LABELLED_SHARES = 64  # up to so many are written into their cells
LOWEST_R2 = -0.25  # bars of worse probes end here; their numbers stand
HATCHES = ("", "///", "...")
BACKING = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def comparison(
    first: Float[Tensor, "n c h w"],
    x: Float[Tensor, "n c h w"],
    predictions: Mapping[str, Float[Tensor, "n c h w"]],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Both frames of some pairs, what each model makes of the second, and maps of its absolute error.

    Args:
        first, x: The frames of the pairs, in [-1, 1].
        predictions: Of x by name, in [-1, 1]; a floor such as copying the first frame may be among them.
        titles: One per pair.

    Raises:
        ValueError: a prediction of another shape than x, or as for `plots.image_grid`.
    """
    others = {name: tuple(x_hat.shape) for name, x_hat in predictions.items() if x_hat.shape != x.shape}
    if others:
        raise ValueError(f"predictions of shapes {others} of frames of {tuple(x.shape)}: must be equal")
    errors = {name: (x_hat - x).abs().mean(1) for name, x_hat in predictions.items()}  # (n, h, w)
    scale = Normalize(0, max(float(error.max()) for error in errors.values()) or 1.0)
    colours = colormaps["viridis"]
    maps = {
        f"error of {name}": torch.from_numpy(colours(scale(error.cpu().numpy()))[..., :3]).permute(0, 3, 1, 2).float()
        for name, error in errors.items()
    }
    rows = {"first frame": first, "second frame": x} | dict(predictions)
    fig = image_grid(rows | {name: 2 * image - 1 for name, image in maps.items()}, titles, "pair of test frames")
    label = "absolute error, mean over colours [scale -1 to 1]"
    fig.colorbar(ScalarMappable(scale, colours), ax=fig.axes, label=label, shrink=0.5, anchor=(0, 0))
    return fig


def latent_statistics(
    kl: Float[Tensor, " d"], shares: Float[np.ndarray, "length entries"], names: tuple[str, str]
) -> Figure:
    """What the latents of both models hold: KL of each dimension of the VAE, use of each code of the LAQ.

    Args:
        kl: Mean KL of each dimension in nats.
        shares: Share of the samples that choose each entry, one row per place in the word of codes.
        names: Of the VAE and of the LAQ.
    """
    fig = new_figure(10, 3.6)
    left, right = fig.subplots(1, 2)
    heights = np.sort(kl.cpu().numpy())[::-1]
    left.bar(np.arange(1, len(heights) + 1), heights, color=PALETTE[0])
    left.set(xlabel="latent dimension, by descending KL [rank]", ylabel="KL [nats]", ylim=(0, None))
    left.set_title(f"{names[0]}: {heights.sum():.1f} nats in all", fontsize=10)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = right.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    right.set(xlabel="entry of the codebook", ylabel="place in the word")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # there may be a single place
    if shares.size <= LABELLED_SHARES:
        for (row, column), share in np.ndenumerate(shares):
            colour = "black" if share > 0.6 else "white"
            right.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    right.set_title(f"{names[1]}: how often each entry is chosen [%]", fontsize=10)
    fig.colorbar(drawn, ax=right, label="share of the pairs [1]")
    return fig


def rate_distortion(table: pd.DataFrame, label: str) -> Figure:
    """Error over bits per frame, one marker per method and kind of rate, on a logarithmic axis of bits.

    Filled markers code the frame itself, hollow ones predict it from the first frame, which costs them nothing.
    Floors of 0 bits, which a logarithmic axis has no place for, are horizontal lines. Whiskers are standard errors.

    Args:
        table: Columns method, setting, rate, bits, error, error_se, given_first_frame; as from
            `rate_distortion.rate_distortion_table`.
        label: What the error is, with its unit.
    """
    fig = new_figure(9, 5)
    ax = fig.subplots()
    sent, floors = table[table["bits"] > 0], table[table["bits"] == 0]
    for i, ((method, rate), points) in enumerate(sent.groupby(["method", "rate"], sort=False)):
        first = bool(points["given_first_frame"].iloc[0])
        name = f"{method}: {rate}" + (", given the first frame" if first else "")
        _draw_points(ax, points, i, name, hollow=first)
    for i, row in enumerate(floors.itertuples()):
        name = f"{row.method}, 0 bits" + (", given the first frame" if row.given_first_frame else "")
        ax.axhline(row.error, color="0.25", ls=LINE_STYLES[1:][i % 3], lw=1.2, label=name)
    if len(sent):
        ax.set_xscale("log")
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        ax.set_xlim(sent["bits"].min() / 1.5, sent["bits"].max() * 3)  # the settings stand to the right
    ax.margins(y=0.1)
    ax.set(xlabel="rate [bits per frame]", ylabel=label)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def _draw_points(ax: Axes, points: pd.DataFrame, i: int, name: str, hollow: bool) -> None:
    """A sweep of one method as a marked line, its settings written beside the points."""
    colour = PALETTE[i % len(PALETTE)]
    style = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "ls": LINE_STYLES[i % len(LINE_STYLES)], "lw": 1}
    face = "white" if hollow else colour
    whiskers = points["error_se"].fillna(0)
    ax.errorbar(points["bits"], points["error"], whiskers, capsize=3, ms=7, mfc=face, mew=1.5, label=name, **style)
    for row in points.itertuples():
        ax.annotate(row.setting, (row.bits, row.error), (4, 7), textcoords="offset points", fontsize=8)


def codebook_use(logs: Mapping[str, pd.DataFrame], codebook_size: int) -> Figure:
    """Entries in use and their perplexity over training, and below them the entries replaced at the steps logged.

    Args:
        logs: Rows of training by name of the model: step, perplexity, codes_used and replaced.
        codebook_size: Drawn as the line of even use.
    """
    fig = new_figure(8, 5)
    use, below = fig.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for i, (name, log) in enumerate(logs.items()):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        use.plot(log["step"], log["perplexity"], f"{marker}-", color=colour, ms=4, label=f"{name}: perplexity")
        use.plot(log["step"], log["codes_used"], ":", color=colour, lw=1.6, label=f"{name}: entries used")
        below.plot(log["step"], log["replaced"], f"{marker}-", color=colour, ms=4, lw=0.8)
    use.axhline(codebook_size, color="black", ls="--", lw=1, label=f"all {codebook_size}")
    use.set(ylabel="entries in a batch, mean of places", ylim=(0, codebook_size * 1.08))
    below.set(xlabel="training step", ylabel="entries replaced", ylim=(0, codebook_size * 1.08))
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (use, below):
        ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper", fontsize=9)
    return fig


def code_grid(
    first: Float[Tensor, "m c h w"],
    decoded: Float[Tensor, "k m c h w"],
    codes: Sequence[str],
    titles: Sequence[str] | None = None,
) -> Figure:
    """What each code does to several first frames: a row per code, below the row of the first frames.

    Args:
        first: First frames in [-1, 1].
        decoded: Next frames imagined for each code, clamped to [-1, 1].
        codes: Names of the codes, for example "3" or "3-0-1-7"; a row each.
        titles: One per first frame.

    Raises:
        ValueError: As many names as codes are missing, two are equal, or as for `plots.image_grid`.
    """
    if len(codes) != len(decoded) or len(set(codes)) < len(codes):
        raise ValueError(f"{len(codes)} names {list(codes)} for {len(decoded)} codes: must be one each, all different")
    rows = {"first frame": first} | {f"code {name}": images for name, images in zip(codes, decoded, strict=True)}
    return image_grid(rows, titles, "first frame of a test clip")


def probe_bars(table: pd.DataFrame) -> Figure:
    """Scores of probes: one panel per target, a bar per features and kind of probe, a dotted line at chance.

    Numbers stand at the ends of the bars, standard errors over clips are whiskers. Bars of an R² below -0.25 are cut.

    Args:
        table: Columns features, target, kind, figure, score, error, chance; as from `probes.probe_table`.
    """
    targets = list(dict.fromkeys(table["target"]))
    names, kinds = (list(dict.fromkeys(table[column])) for column in ("features", "kind"))
    fig = new_figure(1.5 + 3.8 * len(targets), 0.3 * len(names) * len(kinds) + 1.6)
    axes = fig.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    for ax, target in zip(axes, targets, strict=True):
        of_target = table[table["target"] == target]
        for i, kind in enumerate(kinds):
            _draw_scores(ax, of_target[of_target["kind"] == kind].set_index("features"), names, i, len(kinds))
        chance, figure = of_target["chance"].iloc[0], of_target["figure"].iloc[0]
        ax.axvline(chance, color="black", ls=":", lw=1.4)
        low = min(0.0, of_target["score"].min())
        ax.set(title=target, xlabel=f"{figure} [1]; chance {chance:.3g} dotted")
        ax.set_xlim(max(1.15 * low, LOWEST_R2), max(of_target["score"].max(), chance, 0.05) * 1.3)
        sns.despine(ax=ax)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(kinds), title="probe")
    return fig


def _draw_scores(ax: Axes, rows: pd.DataFrame, names: Sequence[str], i: int, n_kinds: int) -> None:
    """The bars of one kind of probe, beside those of the others."""
    height = 0.8 / n_kinds
    present = [name for name in names if name in rows.index]
    places = np.array([names.index(name) for name in present]) + (i - (n_kinds - 1) / 2) * height
    scores, errors = (rows.loc[present, column].to_numpy() for column in ("score", "error"))
    style = {"color": PALETTE[i], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}
    ax.barh(places, scores, 0.9 * height, xerr=errors, ecolor="0.3", capsize=2, label=rows["kind"].iloc[0], **style)
    for place, score, error in zip(places, scores, errors, strict=True):
        place = (max(score + error, 0), place)
        ax.annotate(f"{score:.2f}", place, (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=BACKING)
