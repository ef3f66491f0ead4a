from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from workbench.replicate_plots import dots, frontier, loss_curves, paired_differences  # noqa: E402
from workbench.replicates import paired, relative_differences  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_stays_in_pyplot() -> Iterator[None]:
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def legend(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.legends[0].get_texts()]


def fits(fig: Figure) -> bool:
    """All labels and notes lie on the figure."""
    fig.draw_without_rendering()
    axes = [ax for ax in fig.axes if ax.get_visible()]
    shown = [text for ax in axes for text in (ax.xaxis.label, ax.yaxis.label, *ax.texts)]
    for ax in axes:
        low, high = sorted(ax.get_ylim())
        shown += [text for text in ax.get_yticklabels() if low <= text.get_position()[1] <= high]
    boxes = [text.get_window_extent() for text in shown if text.get_text()]
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 + 1 for b in boxes)


def rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "setting": ["V2", "V2", "V2", "V1", "V1", "V1"],
            "seed": [0, 1, 2] * 2,
            "mse": [1.0, 2.0, 6.0, 2.0, 2.0, 2.0],
            "kl_mean": [1.0, 2.0, 3.0] + [np.nan] * 3,
            "zero": [1.0, 2.0, 3.0, 0.0, 0.0, 0.0],
        }
    )


# --- dots ---


def test_dots_draws_every_run_by_seed_and_the_mean() -> None:
    fig = dots(rows(), {"mse": "MSE [1]", "kl_mean": "KL [nats per dimension]"})
    assert fits(fig) and legend(fig) == ["seed 0", "seed 1", "seed 2", "mean"]
    mse, kl = fig.axes
    assert [mse.get_xlabel(), kl.get_xlabel()] == ["MSE [1]", "KL [nats per dimension]"]
    assert [text.get_text() for text in mse.get_yticklabels()] == ["V2", "V1"] and mse.yaxis_inverted()
    for points, offset, values in zip(mse.collections, (-0.25, 0, 0.25), ((1, 2), (2, 2), (6, 2)), strict=True):
        np.testing.assert_allclose(points.get_offsets(), [[values[0], offset], [values[1], 1 + offset]])
    assert mse.lines[0].get_xdata().tolist() == [3, 2] and mse.lines[0].get_ydata().tolist() == [0, 1]


def test_a_figure_that_a_setting_lacks_is_marked_so() -> None:
    kl = dots(rows(), {"kl_mean": "KL"}).axes[0]
    assert [(text.get_text(), text.get_position()[1]) for text in kl.texts] == [("not measured", 1)]


def test_dots_of_one_seed_and_many_figures_fit() -> None:
    one = rows().query("seed == 0")
    fig = dots(one, {name: f"label of {name}" for name in ("mse", "kl_mean", "zero", "seed")})
    assert fits(fig) and len(fig.axes) == 6 and sum(ax.get_visible() for ax in fig.axes) == 4
    np.testing.assert_allclose(fig.axes[0].collections[0].get_offsets(), [[1, 0], [2, 1]])


# --- curves ---


def log(*losses: float) -> pd.DataFrame:
    """A training row and a validation row per epoch."""
    epochs = range(1, len(losses) + 1)
    val = pd.DataFrame({"epoch": epochs, "split": "val", "loss": losses})
    return pd.concat([val.assign(split="train", loss=99.0), val]).sort_values("epoch")


def test_loss_curves_draws_the_mean_and_the_band_of_the_validation() -> None:
    fig = loss_curves({"V1": [log(4, 2, 1), log(8, 4)], "V2": [log(3, 2)]})
    ax = fig.axes[0]
    assert fits(fig) and legend(fig) == ["V1 (2 seeds)", "V2 (1 seed)"] and ax.get_yscale() == "log"
    first, second, mean, *_ = ax.lines
    assert first.get_ydata().tolist() == [4, 2, 1] and second.get_ydata().tolist()[:2] == [8, 4]
    assert mean.get_xdata().tolist() == [1, 2] and mean.get_ydata().tolist() == [6, 3]
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(1.0, 4.0), (2.0, 2.0), (2.0, 4.0), (1.0, 8.0)}
    assert ax.get_xlabel() == "epoch" and "validation loss" in ax.get_ylabel()


def test_epochs_are_counted_in_whole_numbers_even_of_one() -> None:
    ax = loss_curves({"V1": [log(4)]}).axes[0]
    assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [1]


def test_loss_curves_of_a_term_below_0_are_on_a_linear_axis() -> None:
    logs = {"V1": [log(1, -1).rename(columns={"loss": "kl"})]}
    assert loss_curves(logs, "kl", "KL [nats]").axes[0].get_yscale() == "linear"
    for broken in (logs["V1"][0], log(1).query("split == 'train'"), log(1, np.nan), pd.DataFrame({"step": [1]})):
        with pytest.raises(ValueError, match="loss of a run of V1: must be in every row of split val; its log has"):
            loss_curves({"V1": [broken]})


# --- differences ---


def test_differences_are_drawn_with_their_intervals_around_0() -> None:
    pairs = [paired(rows(), figure, "V2", "V1") for figure in ("mse", "zero")]
    three = rows().assign(mse=[1.0, 1.1, 0.9, 2.0, 2.0, 2.0])
    table = relative_differences([paired(three, "mse", "V2", "V1"), *pairs])
    fig = paired_differences(table)
    ax = fig.axes[0]
    assert fits(fig) and legend(fig) == ["told from seed noise", "not told from seed noise"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["mse", "mse", "zero"]
    assert [text.get_text() for text in ax.texts] == ["-50 %", "+50 %", "no percentage, as V1 is 0"]
    assert ax.get_xlabel() == "difference V2 - V1 [% of V1], mean over seeds and 95 % interval"
    for i, drawn in enumerate(ax.collections):
        np.testing.assert_allclose(drawn.get_segments()[0], [[table["low"][i], i], [table["high"][i], i]])
    told, not_told = ax.lines[:2]
    assert told.get_xdata() == [-50] and told.get_markerfacecolor() != "white"
    assert not_told.get_xdata() == [50] and not_told.get_markerfacecolor() == "white"


def test_one_seed_is_a_cross_without_an_interval_and_lines_of_other_pairs_are_named() -> None:
    one = paired(rows().query("seed == 0"), "mse", "V2", "V1")
    fig = paired_differences(relative_differences([one, paired(rows(), "mse", "V1", "V2")]))
    ax = fig.axes[0]
    assert fits(fig) and legend(fig) == ["one seed: cannot be decided", "not told from seed noise"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["mse: V2 - V1", "mse: V1 - V2"]
    assert ax.lines[0].get_marker() == "x" and ax.lines[0].get_xdata() == [-50] and len(ax.collections) == 1


# --- frontier ---


def shapes() -> pd.DataFrame:
    """Error by seed; `b` is undercut by `a` of its size, `d` by the smaller `a`."""
    errors = {"a": (64, [1.0, 3.0]), "b": (64, [4.0, 4.0]), "c": (256, [1.0, 1.0]), "d": (256, [2.0, 2.0])}
    table = [(name, k, size, e) for name, (size, values) in errors.items() for k, e in enumerate(values)]
    return pd.DataFrame(table, columns=["setting", "seed", "latent_size", "mse"])


def test_the_frontier_has_those_that_no_latent_as_small_undercuts() -> None:
    fig = frontier(shapes(), "mse", "MSE [1]")
    ax = fig.axes[0]
    assert fits(fig) and set(legend(fig)) == {"frontier", "on the frontier", "one no larger is as good"}
    line, kept, undercut = (ax.lines[0], *(container.lines[0] for container in ax.containers))
    assert line.get_xdata().tolist() == kept.get_xdata().tolist() == [64, 256]
    assert line.get_ydata().tolist() == kept.get_ydata().tolist() == [2, 1]
    assert undercut.get_xydata().tolist() == [[64, 4], [256, 2]]
    whisker = ax.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(whisker, [[64, 1], [64, 3]])
    assert {text.get_text() for text in ax.texts} == {"a", "b", "c", "d"} and ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent [numbers per image]", "MSE [1]")


def test_where_more_is_better_the_frontier_turns_over() -> None:
    ax = frontier(shapes().rename(columns={"mse": "accuracy"}), "accuracy", "accuracy [1]", higher=True).axes[0]
    assert ax.containers[0].lines[0].get_xydata().tolist() == [[64, 4]] and ax.get_yscale() == "linear"
