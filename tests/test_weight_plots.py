from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.container import BarContainer  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from workbench import weight_plots as plots  # noqa: E402
from workbench.plots import PALETTE  # noqa: E402

LAYERS = [("0.weight", 40), ("0.bias", 4), ("2.weight", 12)]


@pytest.fixture(autouse=True)
def nothing_stays_in_pyplot() -> Iterator[None]:
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.legends[0].get_texts()]


# --- strips ---


def test_strips_hold_the_weights_of_each_network_in_their_order() -> None:
    rows = {"original": draw(3, 60), "autoencoder": draw(3, 56, seed=1)}
    fig = plots.heat_strips(rows, LAYERS, ["a", "b", "c"], "network", "weight [own units]")
    fig.draw_without_rendering()
    *panels, bar = fig.axes
    for i, ax in enumerate(panels):
        expected = torch.stack([weights[i, :56] for weights in rows.values()])
        np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), expected, rtol=1e-6)
        assert [tick.get_text() for tick in ax.get_yticklabels()] == list(rows) and ax.get_ylabel() == "abc"[i]
        assert [segment[0, 0] for segment in ax.collections[0].get_segments()] == [40, 44]
    assert [text.get_text() for text in panels[0].texts] == ["0.weight", "0.bias", "2.weight"]
    assert [text.xy[0] for text in panels[0].texts] == [20, 42, 50]
    assert bar.get_ylabel() == "weight [own units]" and fig.get_supylabel() == "network"
    assert all(ax.yaxis.label.get_window_extent().x0 >= 0 for ax in panels)


def test_the_colours_of_strips_are_symmetric_and_shared() -> None:
    x = draw(10, 56)
    x[0, 0] = -1000
    fig = plots.heat_strips({"original": x, "half": x / 2}, LAYERS)
    limits = {ax.images[0].get_clim() for ax in fig.axes[:10]}
    limit = np.percentile(torch.stack([x, x / 2]).abs(), 99.5)
    assert len(limits) == 1 and limits.pop() == pytest.approx((-limit, limit))
    assert limit < 10, "one weight took the whole scale"


def test_long_strips_are_means_of_neighbours() -> None:
    x = draw(1, 2500)
    fig = plots.heat_strips({"original": x}, [("weight", 2500)])
    drawn = np.asarray(fig.axes[0].images[0].get_array())
    assert drawn.shape == (1, 1000) and "mean of about 2.5" in fig.axes[0].get_xlabel()
    pairs = drawn.reshape(500, 2) * [2, 3]  # 2 and 3 weights in turn
    np.testing.assert_allclose(pairs.sum(1), x.reshape(500, 5).sum(1), atol=1e-5)
    assert fig.axes[0].get_xlim() == (0, 2500)


def test_names_of_layers_never_touch() -> None:
    layers = [(f"layers.{i}", 1 if i % 2 else 100) for i in range(90)]
    size = sum(length for _, length in layers)
    fig = plots.heat_strips({"original": draw(1, size)}, layers)
    names = fig.axes[0].texts
    places = np.array([name.xyann[0] for name in names])
    assert len(names) == plots.MOST_NAMES and {name.get_text() for name in names} > {
        f"layers.{i}" for i in range(0, 90, 2)
    }
    assert np.diff(places).min() >= 0.999 * size * plots.NAME_GAP / plots.STRIP_WIDTH
    assert places.min() >= 0 and places.max() <= size


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ({}, None, "must be equally long and not empty"),
        ({"a": torch.zeros(0, 56)}, None, "must be equally long and not empty"),
        ({"a": torch.zeros(2, 56), "b": torch.zeros(3, 56)}, None, "rows of {'a': 2, 'b': 3} networks"),
        ({"a": torch.zeros(2, 56)}, ["one"], "1 titles for 2 networks"),
        ({"a": torch.zeros(2, 56), "b": torch.zeros(2, 55)}, None, "row 'b' has 55 weights per network, its layers 56"),
    ],
)
def test_strips_that_cannot_be_laid_out_are_refused(rows: dict, titles: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.heat_strips(rows, LAYERS, titles)


# --- pictures ---


def test_pictures_have_a_pixel_per_weight_and_grey_behind() -> None:
    x = torch.tensor([[0.0, 1.0, -1.0, 5.0, float("nan")]])
    pixels = plots.heat_pixels(x, limit=1)
    assert pixels.shape == (1, 2, 3, 3) and pixels.dtype == np.uint8
    zero, positive, negative, beyond, broken, behind = pixels.reshape(6, 3).astype(int)
    assert zero.min() > 240 and positive[0] > positive[2] and negative[2] > negative[0]
    assert (beyond == positive).all() and (broken == behind).all() and np.ptp(behind) == 0 and behind[0] < 200


def test_the_colours_of_pictures_are_those_of_the_batch_or_of_the_limit() -> None:
    x = draw(3, 49)
    assert (plots.heat_pixels(x) == plots.heat_pixels(10 * x)).all()
    assert (plots.heat_pixels(x, 2.0) != plots.heat_pixels(10 * x, 2.0)).any()
    assert (plots.heat_pixels(x, 2.0)[1:] == plots.heat_pixels(x[1:].numpy(), 2.0)).all()
    assert plots.heat_pixels(torch.zeros(1, 4)).min() > 240


def test_layers_are_marked_where_their_weights_are_drawn() -> None:
    layers, size = [("a", 12), ("b", 3), ("c", 17)], 36  # a picture of 6 x 6, of which 4 weights are padding
    marks = plots.layer_marks(layers, size)
    assert [mark[0] for mark in marks] == ["a", "b", "c"]
    for i, (_, start, end) in enumerate(marks):
        x = torch.zeros(1, size)
        first = sum(length for _, length in layers[:i])
        x[0, first : first + layers[i][1]] = 1.0
        red = plots.heat_pixels(x, limit=1)[0, :, :, 2] < 100  # (h, w)
        assert (6 * start, 6 * end) == pytest.approx((first / 6, (first + layers[i][1]) / 6))
        rows = np.flatnonzero(red.any(1))
        assert (rows[0], rows[-1]) == (int(6 * start + 1e-9), int(np.ceil(6 * end - 1e-9)) - 1)


# --- accuracy ---


def test_every_network_is_a_mark_and_controls_are_hollow() -> None:
    original, rebuilt = torch.linspace(0.5, 0.9, 7), {"VAE": np.linspace(0.4, 0.9, 7), "mean network": [0.1] * 7}
    fig = plots.accuracy_scatter(original, rebuilt, ["mean network"], "accuracy [share]")
    fig.draw_without_rendering()
    ax = fig.axes[0]
    for drawn, values in zip(ax.collections, rebuilt.values(), strict=True):
        np.testing.assert_allclose(drawn.get_offsets(), np.stack([original, values], 1), rtol=1e-6)
    assert [len(drawn.get_facecolors()) for drawn in ax.collections] == [1, 0]
    assert np.allclose(*ax.lines[0].get_data()) and texts(fig) == ["VAE", "mean network", "as the original"]
    assert ax.get_xlabel() == "original network: accuracy [share]"
    assert ax.get_ylabel() == "rebuilt network: accuracy [share]"


def test_accuracies_that_belong_to_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'VAE' has accuracies of shape \(3,\), the originals \(2,\)"):
        plots.accuracy_scatter([0.1, 0.2], {"VAE": [0.1, 0.2, 0.3]})
    with pytest.raises(ValueError, match=r"controls \['mean'\]: must be among \['VAE'\]"):
        plots.accuracy_scatter([0.1, 0.2], {"VAE": [0.1, 0.2]}, ["mean"])


def test_paths_are_means_within_quartiles() -> None:
    values = np.arange(15.0).reshape(5, 3)
    fig = plots.path_lines([0, 0.5, 1], {"latent": values, "weights": -values})
    line, band = fig.axes[0].lines[0], fig.axes[0].collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(line.get_ydata(), [6, 7, 8])
    assert (band[:, 1].min(), band[:, 1].max()) == (3, 11)  # quartiles of the first and of the last position
    assert texts(fig) == ["latent", "weights"] and fig.axes[0].get_ylabel() == plots.ACCURACY_LABEL
    assert len({line.get_linestyle() for line in fig.axes[0].lines}) == 2
    with pytest.raises(ValueError, match="'latent' has 3 positions, t has 2"):
        plots.path_lines([0, 1], {"latent": values})


def test_a_method_has_one_colour_in_marks_and_bars_and_controls_have_those_behind() -> None:
    rebuilt = {"VAE": [0.5, 0.9], "mean network": [0.1, 0.1], "PCA": [0.4, 0.7], "noise": [0.2, 0.3]}
    marks = plots.accuracy_scatter([0.6, 0.9], rebuilt, ["mean network", "noise"]).axes[0].collections
    bars = plots.layer_bars(pd.DataFrame({"VAE": [0.9], "PCA": [0.2]}, index=["layer"])).axes[0].containers
    colours = {name: tuple(drawn.get_edgecolors()[0][:3]) for name, drawn in zip(rebuilt, marks, strict=True)}
    assert colours == {"VAE": PALETTE[0], "mean network": PALETTE[2], "PCA": PALETTE[1], "noise": PALETTE[3]}
    assert [to_rgb(group[0].get_facecolor()) for group in bars] == [colours["VAE"], colours["PCA"]]


def test_titles_stand_above_the_axes() -> None:
    table = pd.DataFrame({"features": ["z"], "target": ["epoch"], "score": [0.1], "error": [0.0]})
    figures = [
        plots.accuracy_scatter([0.1, 0.2], {"VAE": [0.1, 0.2]}, title="run 1"),
        plots.path_lines([0, 1], {"latent": np.ones((2, 2))}, title="run 1"),
        plots.layer_bars(pd.DataFrame({"VAE": [0.9]}, index=["layer"]), title="run 1"),
        plots.property_bars(table, title="run 1"),
    ]
    assert [fig.axes[0].get_title("left") for fig in figures] == ["run 1"] * 4


# --- bars ---


def test_bars_of_layers_stand_in_groups_over_the_mean_network() -> None:
    table = pd.DataFrame({"VAE": [0.9, 0.5], "PCA": [0.2, -0.3]}, index=["0.weight", "0.bias"])
    fig = plots.layer_bars(table)
    ax = fig.axes[0]
    assert [[bar.get_height() for bar in group] for group in ax.containers] == [[0.9, 0.5], [0.2, -0.3]]
    centres = [[bar.get_x() + bar.get_width() / 2 for bar in group] for group in ax.containers]
    np.testing.assert_allclose(np.mean(centres, axis=0), [0, 1])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(table.index)
    assert texts(fig) == ["mean network", "VAE", "PCA"] and ax.lines[0].get_ydata() == [0, 0]
    assert to_rgb(ax.containers[1][0].get_facecolor()) == PALETTE[1] and ax.containers[1][0].get_hatch()
    assert ax.get_ylim()[0] < -0.3 and not ax.texts


def test_bars_that_are_cut_say_their_value() -> None:
    fig = plots.layer_bars(pd.DataFrame({"noise": [-30.25, 0.5, float("nan")]}, index=["a", "b", "c"]))
    assert fig.axes[0].get_ylim()[0] == -1 and [text.get_text() for text in fig.axes[0].texts] == ["-30.2"]


def test_bars_of_properties_have_their_standard_errors() -> None:
    rows = [("latents", "epoch", 0.5, 0.1), ("latents", "accuracy", 0.8, 0.05), ("PCA", "epoch", -0.1, 0.2)]
    table = pd.DataFrame(rows, columns=["features", "target", "score", "error"])
    fig = plots.property_bars(table)
    ax = fig.axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["epoch", "accuracy"]
    bars = [group for group in ax.containers if isinstance(group, BarContainer)]
    assert [bar.get_height() for bar in bars[0]] == [0.5, 0.8] and bars[1][0].get_height() == -0.1
    whiskers = bars[0].errorbar.lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in whiskers], [[0.4, 0.6], [0.75, 0.85]])
    assert texts(fig) == ["mean of the property", "latents", "PCA"] and ax.get_ylim()[0] < -0.3


def test_tables_of_properties_that_do_not_fit_are_refused() -> None:
    table = pd.DataFrame({"features": ["z", "z"], "target": ["epoch"] * 2, "score": [0.1, 0.2], "error": [0.0, 0.0]})
    with pytest.raises(ValueError, match=r"several rows of \[\('epoch', 'z'\)\] \(target, features\)"):
        plots.property_bars(table)
    with pytest.raises(ValueError, match=r"table lacks \['error'\]"):
        plots.property_bars(table.drop(columns="error"))
