import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from workbench.latent_action_plots import (  # noqa: E402
    LABELLED_SHARES,
    LOWEST_R2,
    code_grid,
    codebook_use,
    comparison,
    latent_statistics,
    probe_bars,
    rate_distortion,
)
from workbench.rate_distortion import RatePoint, rate_distortion_table  # noqa: E402

UNIT = "MSE [per element, [-1, 1] scale]"


@pytest.fixture(autouse=True)
def nothing_stays_in_pyplot():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def fits(fig: Figure) -> bool:
    """All labels and notes lie on the figure."""
    fig.draw_without_rendering()
    shown = [text for ax in fig.axes for text in (ax.xaxis.label, ax.yaxis.label, ax.title, *ax.texts)]
    boxes = [text.get_window_extent() for text in shown if text.get_text()]
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 + 1 for b in boxes)


def frames() -> tuple[torch.Tensor, torch.Tensor]:
    """First and second frames of three pairs, the second within [-0.5, 0.5]."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(3, 3, 12, 12, generator=generator) - 1, torch.rand(3, 3, 12, 12, generator=generator) - 0.5


def test_comparison_draws_both_frames_the_predictions_and_their_errors() -> None:
    first, x = frames()
    fig = comparison(first, x, {"LAQ": x + 0.1, "copy": first}, ["a", "b", "c"])
    *drawn, bar = fig.axes
    assert fits(fig)
    expected = ["first frame", "second frame", "LAQ", "copy", "error of LAQ", "error of copy"]
    assert [ax.get_ylabel() for ax in drawn] == expected and drawn[-1].get_xlabel() == "pair of test frames"
    assert [text.get_text() for text in drawn[-1].get_xticklabels()] == ["a", "b", "c"]
    for ax, images in zip(drawn, (first, x, x + 0.1, first), strict=False):
        for image, pixels in zip(ax.images, images, strict=True):
            np.testing.assert_allclose(image.get_array(), (pixels.permute(1, 2, 0) + 1) / 2, atol=1e-5)
    most = float((first - x).abs().mean(1).max())
    np.testing.assert_allclose(bar.get_ylim(), (0, most), rtol=1e-5)
    assert bar.get_ylabel() == "absolute error, mean over colours [scale -1 to 1]"


def test_error_maps_are_of_the_mean_over_colours_on_one_scale() -> None:
    """Errors of 0.5 in one colour and -0.25 in another are 0.25 on average; on a scale to 1 that is a quarter up."""
    x = torch.zeros(2, 3, 12, 12)
    near, far = x.clone(), x.clone()
    near[:, 0], near[:, 1], far[1] = 0.5, -0.25, -1.0
    near[0, :, 6:] = 0
    drawn = {ax.get_ylabel(): ax for ax in comparison(x, x, {"near": near, "far": far, "exact": x}).axes}
    colour = lambda level: np.array(colormaps["viridis"](level)[:3])  # noqa: E731
    maps = {
        name: [image.get_array() for image in drawn[f"error of {name}"].images] for name in ("near", "far", "exact")
    }
    for area, level in (
        (maps["near"][0][:6], 0.25),
        (maps["near"][0][6:], 0.0),
        (maps["near"][1], 0.25),
        (maps["far"][0], 0.0),
        (maps["far"][1], 1.0),
        (maps["exact"][1], 0.0),
    ):
        np.testing.assert_allclose(area, np.broadcast_to(colour(level), area.shape), atol=1e-5)


def test_exact_predictions_have_an_error_map_too() -> None:
    x = frames()[1]
    fig = comparison(x, x, {"exact": x})
    zero = colormaps["viridis"](0.0)[:3]
    assert all(np.allclose(image.get_array(), zero, atol=1e-5) for image in fig.axes[3].images)
    assert fig.axes[-1].get_ylim() == (0, 1)


def test_comparison_refuses_rows_that_do_not_match() -> None:
    first, x = frames()
    for other in (x[:2], x[:1], x[..., :6]):
        with pytest.raises(
            ValueError, match=r"predictions of shapes \{'VAE': \(.*\)\} of frames of \(3, 3, 12, 12\): must"
        ):
            comparison(first, x, {"LAQ": x, "VAE": other})
    with pytest.raises(ValueError, match="2 titles for 3 columns"):
        comparison(first, x, {"LAQ": x}, ["a", "b"])
    with pytest.raises(ValueError, match=r"images of 'LAQ' span .*: must lie in \[-1, 1\]"):
        comparison(first, x, {"LAQ": x + 1})


def test_latent_statistics_draw_sorted_kl_and_shares() -> None:
    shares = np.array([[0.25, 0.75, 0.0], [0.5, 0.2, 0.3]])
    fig = latent_statistics(torch.tensor([0.5, 2.0, 0.0, 1.25]), shares, ("VAE", "LAQ fsq"))
    left, right, bar = fig.axes
    assert fits(fig)
    assert [patch.get_height() for patch in left.patches] == [2, 1.25, 0.5, 0]
    assert [patch.get_x() + patch.get_width() / 2 for patch in left.patches] == pytest.approx([1, 2, 3, 4])
    assert left.get_title() == "VAE: 3.8 nats in all" and left.get_ylabel() == "KL [nats]"
    np.testing.assert_array_equal(right.images[0].get_array(), shares)
    assert right.images[0].get_clim() == (0, 1) and bar.get_ylabel() == "share of the pairs [1]"
    written = {tuple(map(int, text.get_position())): text.get_text() for text in right.texts}
    assert written == {(0, 0): "25", (1, 0): "75", (2, 0): "0", (0, 1): "50", (1, 1): "20", (2, 1): "30"}
    assert right.get_title() == "LAQ fsq: how often each entry is chosen [%]"
    assert right.get_xlabel() == "entry of the codebook" and right.get_ylabel() == "place in the word"


def test_numbers_on_bright_cells_are_dark() -> None:
    fig = latent_statistics(torch.ones(2), np.array([[0.9, 0.1]]), ("VAE", "LAQ"))
    assert [to_rgb(text.get_color()) for text in fig.axes[1].texts] == [(0, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize(("length", "entries"), [(1, 8), (4, 8), (256, 8), (4, 1000)])
def test_words_and_codebooks_of_any_size_stay_legible(length: int, entries: int) -> None:
    fig = latent_statistics(torch.ones(32), np.full((length, entries), 1 / entries), ("VAE", "LAQ"))
    assert fits(fig)
    right = fig.axes[1]
    assert len(right.texts) == (length * entries if length * entries <= LABELLED_SHARES else 0)
    for axis, n in ((right.xaxis, entries), (right.yaxis, length)):
        shown = [tick for tick in axis.get_majorticklocs() if -0.5 <= tick <= n - 0.5]
        assert 1 <= len(shown) <= 12 and all(tick == round(tick) for tick in shown)


def points() -> pd.DataFrame:
    sweep = [
        RatePoint("VAE", f"kl_weight {w:g}", "KL", b, e, 0.1 * e) for w, b, e in ((0.1, 9, 0.06), (0.01, 60, 0.02))
    ]
    return rate_distortion_table(
        [
            *sweep,
            RatePoint("LAQ", "4 × 8", "entropy (joint)", 8.7, 0.018, given_first_frame=True),
            RatePoint("copy-frame", "", "none", 0, 0.031, given_first_frame=True),
        ]
    )


def test_rate_distortion_draws_points_over_bits_and_floors_as_lines() -> None:
    fig = rate_distortion(points(), UNIT)
    ax = fig.axes[0]
    assert fits(fig) and ax.get_xscale() == "log"
    assert ax.get_xlabel() == "rate [bits per frame]" and ax.get_ylabel() == UNIT
    vae, laq = (container.lines[0] for container in ax.containers)
    np.testing.assert_allclose(vae.get_xydata(), [[9, 0.06], [60, 0.02]])
    np.testing.assert_allclose(laq.get_xydata(), [[8.7, 0.018]])
    whiskers = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in whiskers], [[0.054, 0.066], [0.018, 0.022]])
    floor = next(line for line in ax.lines if line.get_label().startswith("copy-frame"))
    assert set(floor.get_ydata()) == {0.031}
    assert sorted(texts(fig.legends[0])) == [
        "LAQ: entropy (joint), given the first frame",
        "VAE: KL",
        "copy-frame, 0 bits, given the first frame",
    ]
    assert [text.get_text() for text in ax.texts] == ["kl_weight 0.1", "kl_weight 0.01", "4 × 8"]


def test_the_two_tasks_look_different() -> None:
    vae, laq = (c.lines[0] for c in rate_distortion(points(), UNIT).axes[0].containers)
    assert vae.get_marker() != laq.get_marker() and to_rgb(vae.get_color()) != to_rgb(laq.get_color())
    assert to_rgb(laq.get_markerfacecolor()) == (1, 1, 1) != to_rgb(vae.get_markerfacecolor())


def test_rate_distortion_of_floors_alone() -> None:
    table = points()
    fig = rate_distortion(table[table["bits"] == 0], UNIT)
    assert fits(fig) and fig.axes[0].get_xscale() == "linear"


def test_codebook_use_over_training() -> None:
    """Each model has steps of its own."""
    logs = {
        name: pd.DataFrame({"step": steps, "perplexity": 2.5, "codes_used": used, "replaced": replaced})
        for name, steps, used, replaced in (
            ("LAQ", [1, 20, 40], [3, 5, 8], [0, 4, 1]),
            ("other", [1, 10], [1, 2], [0, 7]),
        )
    }
    fig = codebook_use(logs, 8)
    use, replaced = fig.axes
    assert fits(fig)
    np.testing.assert_array_equal(use.lines[1].get_xydata(), [[1, 3], [20, 5], [40, 8]])
    np.testing.assert_array_equal(use.lines[2].get_xydata(), [[1, 2.5], [10, 2.5]])
    np.testing.assert_array_equal(replaced.lines[1].get_xydata(), [[1, 0], [10, 7]])
    names = ["LAQ: perplexity", "LAQ: entries used", "other: perplexity", "other: entries used", "all 8"]
    assert texts(fig.legends[0]) == names
    assert use.get_ylabel() == "entries in a batch, mean of places" and replaced.get_xlabel() == "training step"


def test_a_row_of_the_code_grid_is_what_a_code_does() -> None:
    first, decoded = torch.zeros(3, 3, 8, 8), torch.linspace(-1, 1, 2).view(2, 1, 1, 1, 1).expand(2, 3, 3, 8, 8)
    fig = code_grid(first, decoded, ["3-0", "3-1"], ["a", "b", "c"])
    assert [ax.get_ylabel() for ax in fig.axes] == ["first frame", "code 3-0", "code 3-1"]
    for ax, value in zip(fig.axes, (0.5, 0, 1), strict=True):
        assert len(ax.images) == 3 and all((image.get_array() == value).all() for image in ax.images)
    for names in (["3-0"], ["3-0", "3-0"]):
        with pytest.raises(ValueError, match="for 2 codes: must be one each, all different"):
            code_grid(first, decoded, names)
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        code_grid(first, 2 * decoded, ["0", "1"])


def probes() -> pd.DataFrame:
    rows = [
        (name, target, kind, figure, score + (kind == "mlp") / 100, 0.02, chance)
        for target, figure, chance in (("action", "balanced accuracy", 0.125), ("displacement", "R²", 0.0))
        for name, score in (("codes", 0.6), ("noise", 0.12 if chance else -3.0))
        for kind in ("linear", "mlp")
    ]
    return pd.DataFrame(rows, columns=["features", "target", "kind", "figure", "score", "error", "chance"])


def test_probe_bars_draw_scores_beside_chance() -> None:
    fig = probe_bars(probes())
    assert fits(fig) and texts(fig.legends[0]) == ["linear", "mlp"]
    for ax, scores, chance in zip(fig.axes, ([0.6, 0.12, 0.61, 0.13], [0.6, -3, 0.61, -2.99]), (0.125, 0), strict=True):
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(scores)
        assert [text.get_text() for text in ax.texts] == [f"{score:.2f}" for score in scores]
        assert any(set(line.get_xdata()) == {chance} for line in ax.lines)
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["codes", "noise"]
    assert fig.axes[0].get_xlabel() == "balanced accuracy [1]; chance 0.125 dotted"
    assert fig.axes[1].get_xlim()[0] == LOWEST_R2 and fig.axes[0].yaxis_inverted()


def test_kinds_of_probe_differ_in_hatch_too() -> None:
    bars = probe_bars(probes()).axes[0].patches
    assert bars[0].get_hatch() != bars[2].get_hatch() and bars[0].get_facecolor() != bars[2].get_facecolor()
