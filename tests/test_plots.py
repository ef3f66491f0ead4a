from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from workbench import plots  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_stays_in_pyplot() -> Iterator[None]:
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def log() -> pd.DataFrame:
    """Training rows at every step, validation rows at every second, which log no learning rate."""
    train = pd.DataFrame({"step": [1, 2, 3, 4], "epoch": 0, "split": "train", "mse": [0.4, 0.3, 0.2, 0.1]})
    train = train.assign(kl=[-1.0, 0.0, 1.0, 2.0], lr=1e-3)
    val = pd.DataFrame({"step": [2, 4], "epoch": 0, "split": "val", "mse": [0.35, 0.15], "kl": [0.5, 1.5]})
    return pd.concat([train, val]).sort_values("step")


def assert_reads_well(fig: Figure, n_axes: int) -> None:
    """The figure renders, and each of its axes is labelled both ways."""
    fig.draw_without_rendering()
    assert len(fig.axes) == n_axes
    assert all(ax.get_ylabel() or ax.get_xlabel() for ax in fig.axes)


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# --- images ---


def test_image_grid_draws_the_images_it_is_given() -> None:
    rows = {"original": random(4, 3, 8, 12), "VAE": random(4, 3, 8, 12, seed=1), "grey": random(4, 1, 4, 6)}
    fig = plots.image_grid(rows, titles=["a", "b", "c", "d"], column_label="clip")
    assert_reads_well(fig, 3)
    for ax, (label, images) in zip(fig.axes, rows.items(), strict=True):
        assert ax.get_ylabel() == label and len(ax.images) == 4
        for drawn, x in zip(ax.images, images, strict=True):
            pixels = np.asarray(drawn.get_array())
            assert 0 <= pixels.min() and pixels.max() <= 1
            np.testing.assert_allclose(pixels.reshape(*x.shape[1:], -1), (x.permute(1, 2, 0) + 1) / 2, atol=1e-6)
            assert drawn.get_clim() == (0, 1)
    assert [tick.get_text() for tick in fig.axes[-1].get_xticklabels()] == ["a", "b", "c", "d"]
    assert fig.axes[-1].get_xlabel() == "clip"


def test_row_labels_fit_on_the_figure() -> None:
    fig = plots.image_grid({"original": random(3, 3, 8, 8), "a label of some length": random(3, 3, 8, 8)})
    fig.draw_without_rendering()
    assert all(ax.yaxis.label.get_window_extent().x0 >= 0 for ax in fig.axes)


def test_frame_strip_numbers_the_frames() -> None:
    fig = plots.frame_strip({"truth": random(5, 3, 8, 8), "predicted": random(5, 3, 8, 8)})
    assert_reads_well(fig, 2)
    assert [tick.get_text() for tick in fig.axes[-1].get_xticklabels()] == ["0", "1", "2", "3", "4"]
    assert fig.axes[-1].get_xlabel() == "frame"


@pytest.mark.parametrize("value", [1.01, -1.01, 255.0, float("nan")])
def test_images_outside_the_range_are_refused(value: float) -> None:
    x = torch.zeros(2, 1, 4, 4)
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images of 'VAE' span \[.*\]: must lie in \[-1, 1\]"):
        plots.image_grid({"original": torch.zeros(2, 1, 4, 4), "VAE": x})


def test_rounding_beyond_the_range_is_accepted() -> None:
    fig = plots.image_grid({"VAE": torch.tensor([-1.0005, 1.0005]).reshape(1, 1, 1, 2)})
    assert np.asarray(fig.axes[0].images[0].get_array()).ravel().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ({}, None, "must be equally long and not empty"),
        ({"a": torch.zeros(0, 1, 4, 4)}, None, "must be equally long and not empty"),
        (
            {"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(3, 1, 4, 4)},
            None,
            "rows of {'a': 2, 'b': 3} images",
        ),
        ({"a": torch.zeros(2, 1, 4, 4)}, ["one"], "1 titles for 2 columns"),
        ({"a": torch.zeros(2, 2, 4, 4)}, None, "images of 'a' have 2 channels: must be 1"),
    ],
)
def test_image_grid_refuses_what_it_cannot_lay_out(rows: dict, titles: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.image_grid(rows, titles)


# --- training and comparison ---


def test_training_curves_draws_both_splits_of_each_term() -> None:
    fig = plots.training_curves(log(), {"mse": "MSE [per element]", "kl": "KL [nats]", "lr": "learning rate"})
    assert_reads_well(fig, 3)
    mse, kl, lr = fig.axes
    assert [ax.get_ylabel() for ax in fig.axes] == ["MSE [per element]", "KL [nats]", "learning rate"]
    assert all(ax.get_xlabel() == "step" for ax in fig.axes)
    train, val = mse.lines
    np.testing.assert_array_equal(train.get_xydata(), [[1, 0.4], [2, 0.3], [3, 0.2], [4, 0.1]])
    np.testing.assert_array_equal(val.get_xydata(), [[2, 0.35], [4, 0.15]])
    assert train.get_marker() == "None" and val.get_marker() == "o"
    assert texts(mse.get_legend()) == ["train", "val"] and texts(lr.get_legend()) == ["train"]
    assert [ax.get_yscale() for ax in fig.axes] == ["log", "linear", "log"]


def test_steps_are_counted_in_whole_numbers() -> None:
    few = log()[lambda rows: rows["step"] <= 2]
    ax = plots.training_curves(few, {"mse": "MSE"}).axes[0]
    assert [tick for tick in ax.get_xticks() if 1 <= tick <= 2] == [1, 2]


@pytest.mark.parametrize("n_terms", [1, 4])
def test_training_curves_has_one_panel_per_term(n_terms: int) -> None:
    metrics = log().assign(**{f"term{i}": 1.0 for i in range(n_terms)})
    assert_reads_well(plots.training_curves(metrics, {f"term{i}": "loss" for i in range(n_terms)}), n_terms)


def test_training_curves_refuses_missing_columns() -> None:
    with pytest.raises(ValueError, match=r"metrics lack \['perplexity'\]"):
        plots.training_curves(log(), {"mse": "MSE", "perplexity": "codes"})
    with pytest.raises(ValueError, match="at least one term"):
        plots.training_curves(log(), {})


def test_error_bars_writes_the_numbers_at_the_bars() -> None:
    table = {"VAE": 0.0213, "PCA-32": 0.0305, "mean image": 0.192}
    fig = plots.error_bars(table, "MSE [per element, [-1, 1] scale]", highlight="VAE")
    assert_reads_well(fig, 1)
    ax = fig.axes[0]
    assert [bar.get_width() for bar in ax.patches] == list(table.values())
    assert [text.get_text() for text in ax.texts] == ["0.0213", "0.0305", "0.192"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(table)
    assert ax.yaxis_inverted() and ax.get_xlabel() == "MSE [per element, [-1, 1] scale]"
    colours = [to_rgb(bar.get_facecolor()) for bar in ax.patches]
    assert colours[0] != colours[1] == colours[2]


def test_error_bars_draws_standard_errors_as_whiskers() -> None:
    fig = plots.error_bars({"VAE": 2.0, "PCA": 3.0}, "error", errors={"PCA": 0.5, "VAE": 0.25})
    spans = [segment[:, 0].tolist() for segment in fig.axes[0].collections[0].get_segments()]
    assert spans == [[1.75, 2.25], [2.5, 3.5]]


def test_copy_frame_curve_draws_both_errors() -> None:
    fig = plots.copy_frame_curve([1, 2, 4], torch.tensor([0.1, 0.2, 0.3]), np.array([16.0, 13.0, 11.2]))
    assert_reads_well(fig, 2)
    np.testing.assert_allclose(fig.axes[0].lines[0].get_xydata(), [[1, 0.1], [2, 0.2], [4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(fig.axes[1].lines[0].get_xydata(), [[1, 16.0], [2, 13.0], [4, 11.2]])
    assert [ax.get_xlabel() for ax in fig.axes] == ["offset [frames]"] * 2
    assert fig.axes[1].get_ylabel() == "PSNR [dB]"


def test_histogram_of_values_gives_each_its_own_shares_on_shared_bins() -> None:
    values = {"train": random(500, 2), "test": random(100, seed=1).numpy() + 1, "pandas": pd.Series([0.5])}
    fig = plots.histogram_of_values(values, "pixel value")
    assert_reads_well(fig, 1)
    steps = [patch.get_data() for patch in fig.axes[0].patches]
    assert texts(fig.axes[0].get_legend()) == list(values)
    for numbers, step in zip(values.values(), steps, strict=True):
        shares = np.histogram(np.asarray(numbers).ravel(), steps[0].edges)[0] / np.size(np.asarray(numbers))
        np.testing.assert_allclose(step.values, shares)
        assert step.values.sum() == pytest.approx(1)


def test_a_shorter_clip_ends_in_white() -> None:
    fig = plots.frame_strip({"short": random(1, 3, 8, 8), "long": random(4, 3, 8, 8)})
    short, long = ([image.get_array() for image in ax.images] for ax in fig.axes)
    assert len(short) == len(long) == 4 and all((image == 1).all() for image in short[1:])
    assert not (short[0] == 1).all() and not (long[3] == 1).all()


def test_a_pca_curve_without_errors_is_drawn(recwarn: pytest.WarningsRecorder) -> None:
    assert plots.pca_curve([0, 1], [0.0, 0.0], "error").axes[0].get_yscale() == "linear" and not recwarn
    assert plots.pca_curve([0, 1], [0.5, 0.0], "error").axes[0].get_yscale() == "log"


def test_pca_curve_stands_beside_the_mean_sample() -> None:
    fig = plots.pca_curve([0, 1, 4, 16], torch.tensor([0.9, 0.5, 0.2, 0.01]), "error of the field [1]")
    assert_reads_well(fig, 1)
    ax = fig.axes[0]
    curve, mean = ax.lines
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0.9], [1, 0.5], [4, 0.2], [16, 0.01]], rtol=1e-6)
    assert list(mean.get_ydata()) == pytest.approx([0.9, 0.9]) and texts(ax.get_legend()) == ["PCA", "mean sample"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "4", "16"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("components [numbers per sample]", "error of the field [1]")


@pytest.mark.parametrize(("n", "panels"), [(1, 1), (2, 2), (4, 4), (5, 8)])
def test_error_over_conditions_has_one_panel_per_condition(n: int, panels: int) -> None:
    conditions = {f"condition {i} [mm]": random(6, seed=i) for i in range(n)}
    errors = pd.Series([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    fig = plots.error_over_conditions(conditions, errors, "relative L2 [1]")
    fig.draw_without_rendering()
    shown = [ax for ax in fig.axes if ax.get_visible()]
    assert len(fig.axes) == panels and [ax.get_xlabel() for ax in shown] == list(conditions)
    for ax, values in zip(shown, conditions.values(), strict=True):
        np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([values, errors], 1), rtol=1e-6)
        assert ax.get_yscale() == "log"
    assert fig.get_supylabel() == "relative L2 [1]"


def test_arms_draws_every_training_and_the_mean() -> None:
    rows = pd.DataFrame(
        {"arm": ["latent", "end_to_end"] * 2, "error": [0.4, 0.1, 0.6, 0.3], "latent_error": [1.0, 2.0, 3.0, 4.0]}
    )
    fig = plots.arms(rows, {"error": "error [1]", "latent_error": "error of the codes [1]"})
    assert_reads_well(fig, 2)
    for ax, column in zip(fig.axes, ("error", "latent_error"), strict=True):
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(
            [rows[column][rows["arm"] == arm].mean() for arm in ("latent", "end_to_end")]
        )
        for i, (points, arm) in enumerate(zip(ax.collections, ("latent", "end_to_end"), strict=True)):
            np.testing.assert_allclose(points.get_offsets(), [[v, i] for v in rows[column][rows["arm"] == arm]])
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["latent", "end_to_end"]
    assert [ax.get_xlabel() for ax in fig.axes] == ["error [1]", "error of the codes [1]"]
    assert fig.axes[0].yaxis_inverted() and fig.axes[0].get_xlim()[0] == 0


# --- latent space ---


def test_kl_spectrum_sorts_the_dimensions() -> None:
    fig = plots.kl_spectrum(torch.tensor([1.0, 4.0, 0.0, 3.0]), "not collapsed: 3 of 4")
    assert_reads_well(fig, 2)
    bars, share = fig.axes
    assert [bar.get_height() for bar in bars.patches] == [4, 3, 1, 0]
    np.testing.assert_allclose(share.lines[0].get_ydata(), [50, 87.5, 100, 100])
    assert bars.get_title() == "not collapsed: 3 of 4" and "[nats]" in bars.get_ylabel()
    assert len(texts(fig.legends[0])) == 2


def test_kl_spectrum_of_a_collapsed_posterior_has_no_share() -> None:
    assert_reads_well(plots.kl_spectrum(torch.zeros(4)), 1)


def test_latent_map_of_numbers_has_a_colour_bar() -> None:
    z = random(20, 2)
    fig = plots.latent_map(z, torch.arange(20), "clip", "PCA of the latents", ("first", "second"))
    assert_reads_well(fig, 2)
    points = fig.axes[0].collections[0]
    np.testing.assert_allclose(points.get_offsets(), z, atol=1e-6)
    np.testing.assert_array_equal(points.get_array(), np.arange(20))
    assert (fig.axes[0].get_xlabel(), fig.axes[0].get_ylabel()) == ("first", "second")
    assert fig.axes[0].get_title() == "PCA of the latents" and fig.axes[1].get_ylabel() == "clip"


@pytest.mark.parametrize("column", [list, pd.Series])
def test_latent_map_of_classes_has_a_legend(column: type) -> None:
    z = random(30, 2)
    names = [f"class {i % 12:02}" for i in range(30)]
    fig = plots.latent_map(z, column(names), "action", "latents")
    assert_reads_well(fig, 1)
    classes = sorted(set(names))
    assert texts(fig.legends[0]) == classes and fig.legends[0].get_title().get_text() == "action"
    for name, drawn in zip(classes, fig.axes[0].collections, strict=True):
        np.testing.assert_allclose(drawn.get_offsets(), z[[i for i in range(30) if names[i] == name]], atol=1e-6)
    looks = {(to_rgb(d.get_facecolor()[0]), d.get_paths()[0].vertices.tobytes()) for d in fig.axes[0].collections}
    assert len(looks) == 12  # colours repeat after ten classes, colour and marker together do not


def test_path_lengths_draws_every_ratio() -> None:
    ratios = {"lerp": torch.tensor([1.5, 1.1, 1.2]), "slerp": [1.0, 1.3]}
    fig = plots.path_lengths(ratios)
    assert_reads_well(fig, 1)
    ax = fig.axes[0]
    drawn = [np.sort(points.get_offsets()[:, 1]) for points in ax.collections]
    np.testing.assert_allclose(drawn[0], [1.1, 1.2, 1.5], rtol=1e-6)
    np.testing.assert_allclose(drawn[1], [1.0, 1.3])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["lerp", "slerp"]
    assert "straight path" in texts(ax.get_legend())


def test_latent_map_of_many_classes_names_the_frequent_ones() -> None:
    classes = [f"class {i:02d}" for i in range(20)]
    column = np.repeat(classes, [1 + i % 7 for i in range(20)])
    z2 = torch.randn(len(column), 2, generator=torch.Generator().manual_seed(0))
    fig = plots.latent_map(z2, column, "class", "many")
    shown = texts(fig.legends[0])
    assert len(shown) == 12 and shown[0] == "9 others"
    assert {f"class {i:02d}" for i in (6, 13, 5, 12, 19)} <= set(shown) and "class 00" not in shown
    assert sum(len(points.get_offsets()) for points in fig.axes[0].collections) == len(column)
