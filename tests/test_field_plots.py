import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from workbench.field_plots import COLOURS, FLATTEST, TALLEST, FieldRaster, field_grid, field_views  # noqa: E402

T, N = 4, 12
PLACES = np.stack(np.meshgrid(np.arange(4.0), 0.5 * np.arange(3.0)), -1).reshape(-1, 2)  # 3 wide, 1 high
UNIT = "temperature rise [K]"


@pytest.fixture(autouse=True)
def nothing_stays_in_pyplot():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def fields(k: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed, 1 + seed, (k, T, N)).astype(np.float32)


def one_line(text: str) -> str:
    return text.replace("\n", " ")


def painted(ax: Axes):
    """What bears the colours of a map or of a history."""
    return [*ax.images, *ax.collections][0]


def fits(fig) -> bool:
    """All labels lie on the figure."""
    fig.draw_without_rendering()
    texts = [text for ax in fig.axes for text in (ax.xaxis.label, ax.yaxis.label, ax.title)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 + 1 for b in boxes)


# --- grids ---


def test_a_grid_draws_the_last_time_over_the_plane() -> None:
    rows = {"true": fields(), "predicted": fields(seed=1)}
    fig = field_grid(rows, PLACES, UNIT, ["a", "b", "c"], "test run")
    assert len(fig.axes) == 7 and fits(fig)
    for ax, values in zip(fig.axes, np.concatenate(list(rows.values())), strict=False):
        np.testing.assert_array_equal(painted(ax).get_array(), values[-1])
        mesh = painted(ax)._triangulation
        np.testing.assert_array_equal(np.stack([mesh.x, mesh.y], 1), PLACES)
        assert ax.get_xlim() == (0, 3) and ax.get_ylim() == (0, 1)
    assert [ax.get_ylabel() for ax in fig.axes[:6]] == ["true", "", "", "predicted", "", ""]
    assert [ax.get_xlabel() for ax in fig.axes[3:6]] == ["a", "b", "c"]
    assert fig.axes[-1].get_ylabel() == UNIT
    assert fig.get_supxlabel() == "test run; fields at the last time step"


def test_a_grid_without_places_draws_time_to_the_right_and_nodes_upwards() -> None:
    fig = field_grid({"true": fields(2)}, None, UNIT)
    assert len(fig.axes) == 3 and fits(fig) and fig.get_figheight() >= 1.8
    for ax, values in zip(fig.axes, fields(2), strict=False):
        np.testing.assert_array_equal(painted(ax).get_array(), values.T)
        assert painted(ax).origin == "lower"
    assert [ax.get_xlabel() for ax in fig.axes[:2]] == ["0", "1"]
    assert fig.get_supxlabel() == "run; in each field time to the right, nodes upwards"


@pytest.mark.parametrize("places", [PLACES, None])
def test_one_colour_scale_holds_for_all_fields_and_stands_beside_them(places) -> None:
    rows = {"true": fields(), "predicted": fields(seed=1)}
    fig = field_grid(rows, places, UNIT)
    everything = np.concatenate(list(rows.values()))
    limits = (float(everything.min()), float(everything.max()))
    assert {painted(ax).get_clim() for ax in fig.axes[:-1]} == {limits} and fig.axes[-1].get_ylim() == limits


def test_a_line_of_nodes_is_no_plane() -> None:
    line = np.stack([np.arange(N), 2.0 * np.arange(N)], 1)
    for places in (line, line[:, :1], np.zeros((N, 2))):
        assert field_grid({"true": fields()}, places, UNIT).axes[0].images


def test_of_places_in_space_the_first_two_are_drawn() -> None:
    fig = field_grid({"true": fields()}, np.concatenate([PLACES, PLACES[:, :1]], 1), UNIT)
    np.testing.assert_array_equal(painted(fig.axes[0])._triangulation.y, PLACES[:, 1])


@pytest.mark.parametrize(("stretch", "aspect"), [(1, 1 / 3), (3, 1), (0.01, FLATTEST), (100, TALLEST)])
def test_maps_are_to_scale_within_bounds_and_leave_little_white(stretch: float, aspect: float) -> None:
    rows = {"true": fields(), "predicted": fields(), "third": fields()}
    fig = field_grid(rows, PLACES * [1, stretch], UNIT)
    fig.draw_without_rendering()
    boxes = np.array([ax.get_window_extent().bounds for ax in fig.axes[:-1]]).reshape(3, 3, 4)
    np.testing.assert_allclose(boxes[..., 3] / boxes[..., 2], aspect, rtol=1e-3)
    gaps = -np.diff(boxes[:, 0, 1]) - boxes[1:, 0, 3]
    assert gaps.max() < 0.25 * fig.dpi  # inches between rows


def test_a_long_label_of_the_scale_is_wrapped() -> None:
    label = "pressure at the wall relative to that of the surroundings, mean over the thickness [Pa]"
    fig = field_grid({"true": fields(8)}, None, label)
    assert one_line(fig.axes[-1].get_ylabel()) == label and "\n" in fig.axes[-1].get_ylabel()
    assert fits(fig)


def test_a_field_of_one_value_is_drawn() -> None:
    for places in (PLACES, None):
        assert fits(field_grid({"true": np.zeros((2, T, N), np.float32)}, places, UNIT))


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ({}, None, "^rows of {} fields: must be equally long and not empty$"),
        ({"a": fields(0)}, None, "^rows of {'a': 0} fields: must be equally long and not empty$"),
        ({"a": fields(2), "b": fields(3)}, None, "^rows of {'a': 2, 'b': 3} fields: must be equally long"),
        ({"a": fields(2)}, ["one"], "^1 titles for 2 columns: must be equally many$"),
    ],
)
def test_a_grid_refuses_what_it_cannot_lay_out(rows: dict, titles: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        field_grid(rows, PLACES, UNIT, titles)


# --- views ---


def curves_of(ax: Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def test_views_show_maps_at_times_and_curves_at_nodes() -> None:
    field, one, two = fields()
    fig = field_views(field, {"one": one, "two": two}, PLACES, UNIT, [0, 2], [1, 5, 11])
    assert fits(fig)
    maps, scale, panels = fig.axes[:6], fig.axes[6], fig.axes[7:]
    expected = [values[step] for values in (field, one, two) for step in (0, 2)]
    for ax, values in zip(maps, expected, strict=True):
        np.testing.assert_array_equal(painted(ax).get_array(), values)
    limits = (float(np.min(expected)), float(np.max(expected)))
    assert {painted(ax).get_clim() for ax in maps} == {limits} and scale.get_ylabel() == UNIT
    assert [ax.get_title() for ax in maps] == ["time step 0", "time step 2", "", "", "", ""]
    assert [ax.get_ylabel() for ax in maps] == ["true", "", "one", "", "two", ""]
    assert [ax.get_title() for ax in panels] == ["node 1", "node 5", "node 11"]
    for ax, node in zip(panels, (1, 5, 11), strict=True):
        assert ax.get_xlabel() == "time step"
        for name, values in {"true": field, "one": one, "two": two}.items():
            np.testing.assert_array_equal(curves_of(ax)[name], values[:, node])
    assert panels[0].get_ylabel() == UNIT and len({ax.get_ylim() for ax in panels}) == 1
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["true", "one", "two"]


def test_views_without_places_are_curves_over_node_numbers() -> None:
    field, one, _ = fields()
    fig = field_views(field, {"one": one}, None, UNIT, [3, 1], [0, 11])
    assert fits(fig)
    upper, lower = fig.axes[:2], fig.axes[2:]
    for ax, step in zip(upper, (3, 1), strict=True):
        assert ax.get_title() == f"time step {step}" and ax.get_xlabel() == "node"
        np.testing.assert_array_equal(curves_of(ax)["one"], one[step])
        np.testing.assert_array_equal(curves_of(ax)["true"], field[step])
    assert upper[0].get_ylabel() == lower[0].get_ylabel() == UNIT and len(lower) == 2


def test_more_predictions_than_colours_are_drawn_apart() -> None:
    fig = field_views(fields()[0], {f"p{i}": fields(1)[0] for i in range(12)}, None, UNIT, [0], [0])
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in fig.axes[0].lines}
    assert len(looks) == 13


# --- pixels ---


def test_each_pixel_has_the_colour_of_the_nearest_node() -> None:
    field = fields(1)[0]
    limits = (float(field.min()), float(field.max()))
    pixels = FieldRaster(PLACES, limits, width=90).draw(field)
    assert pixels.shape == (30, 90, 3) and pixels.dtype == np.uint8
    colours = colormaps[COLOURS]((field[-1] - limits[0]) / (limits[1] - limits[0]), bytes=True)[:, :3]
    for (x, y), colour in zip(PLACES, colours, strict=True):
        row, column = round((1 - y) * 29), round(x / 3 * 89)
        assert pixels[row, column].tolist() == colour.tolist()
    assert {tuple(p) for p in pixels.reshape(-1, 3).tolist()} == {tuple(c) for c in colours.tolist()}


def test_without_places_each_value_is_a_pixel_and_what_lies_beyond_has_the_last_colour() -> None:
    field = np.arange(T * N, dtype=np.float32).reshape(T, N)
    pixels = FieldRaster(None, (10.0, 20.0)).draw(field)
    assert pixels.shape == (N, T, 3)
    first, last = (colormaps[COLOURS](value, bytes=True)[:3] for value in (0.0, 1.0))
    assert tuple(pixels[-1, 0]) == tuple(first) and tuple(pixels[0, -1]) == tuple(last)
    assert tuple(pixels[-11, 0]) == tuple(first) and tuple(pixels[-12, 0]) != tuple(first)


def test_the_scale_of_pixels_has_their_colours() -> None:
    raster = FieldRaster(None, (10.0, 20.0))
    assert raster.shows == "time to the right, nodes upwards"
    assert FieldRaster(PLACES, (10.0, 20.0)).shows == "at the last time step"
    for text, colour in raster.scale:
        drawn = raster.draw(np.full((1, 1), float(text)))[0, 0]
        assert colour == "#" + drawn.tobytes().hex()
    assert [text for text, _ in raster.scale] == ["10", "12.5", "15", "17.5", "20"]
