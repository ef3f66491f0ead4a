import numpy as np
import pytest

from workbench.field_traces import BOTTOM, DARKER, HEIGHT, LEFT, RIGHT, TOP, WIDTH, FieldTraces, dashes
from workbench.plots import PALETTE

STEPS, NODES = 41, 6
ACROSS, DOWN = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
COLOURS = [np.round(255 * np.array(colour)) for colour in PALETTE]
UNIT = "temperature [K]"


def traces(steps: int = STEPS, nodes: tuple[int, ...] = (1,), limits: tuple[float, float] = (-1.0, 1.0)) -> FieldTraces:
    return FieldTraces(nodes, limits, steps, UNIT)


def field(values: np.ndarray, node: int = 1) -> np.ndarray:
    """A field whose other nodes hold what is never drawn."""
    whole = np.full((len(values), NODES), 77.0, np.float32)
    whole[:, node] = values
    return whole


def plotted(pixels: np.ndarray) -> np.ndarray:
    return pixels[TOP : HEIGHT - BOTTOM, LEFT : WIDTH - RIGHT].astype(float)


def heights(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """In each column, the mean value that pixels of a colour stand for; NaN where there are none."""
    rows, columns = np.nonzero(np.abs(plotted(pixels) - colour).max(2) < 2)
    sums, counts = (np.bincount(columns, weights, ACROSS) for weights in (rows + 0.5, None))
    with np.errstate(invalid="ignore"):
        return 1.1 - 2.2 * sums / counts / DOWN


def test_a_decoded_field_is_drawn_at_its_values_in_the_colour_of_its_node() -> None:
    curve = np.linspace(0.9, -0.8, STEPS)
    pixels = traces().draw(field(curve), field(np.full(STEPS, -5.0)))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    found = heights(pixels, COLOURS[0])
    expected = np.interp((np.arange(ACROSS) + 0.5) / ACROSS, np.linspace(0, 1, STEPS), curve)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1.1 * 2.2 / DOWN)


def test_a_real_field_is_dashed_and_darker_at_its_values() -> None:
    pixels = traces().draw(field(np.full(STEPS, -5.0)), field(np.full(STEPS, 0.5)))
    found = heights(pixels, np.round(DARKER * COLOURS[0]))
    drawn = np.isfinite(found)
    np.testing.assert_allclose(found[drawn], 0.5, atol=1.1 * 2.2 / DOWN)
    assert 0.4 < drawn.mean() < 0.6 and (np.diff(drawn.astype(int)) == 1).sum() > 15, "pieces and gaps of one length"
    assert not np.isfinite(heights(pixels, COLOURS[0])).any(), "what lies below the limits is not drawn"


def test_every_node_has_a_colour_of_its_own() -> None:
    decoded, real = field(np.full(STEPS, 0.5)), field(np.full(STEPS, 9.0))
    decoded[:, 4], real[:, 4] = -0.5, 9.0
    drawn = traces(nodes=(1, 4))
    pixels = drawn.draw(decoded, real)
    for colour, value in zip(COLOURS, (0.5, -0.5), strict=False):
        np.testing.assert_allclose(heights(pixels, colour), value, atol=1.1 * 2.2 / DOWN)
    assert drawn.caption == "temperature [K] at nodes 1, 4: decoded solid, nearest sample dashed"


def test_nothing_of_one_picture_stays_in_the_next() -> None:
    drawn, low, high = traces(), field(np.full(STEPS, -0.5)), field(np.full(STEPS, 0.5))
    first = drawn.draw(low, high)
    drawn.draw(high, low)
    np.testing.assert_array_equal(drawn.draw(low, high), first)


def test_a_single_time_step_is_a_level_line_and_a_constant_has_room() -> None:
    found = heights(traces(steps=1).draw(field(np.array([0.25])), field(np.array([9.0]))), COLOURS[0])
    np.testing.assert_allclose(found, 0.25, atol=1.1 * 2.2 / DOWN)
    constant = traces(limits=(0.0, 0.0)).draw(field(np.zeros(STEPS)), field(np.full(STEPS, 9.0)))
    rows = np.nonzero(np.abs(plotted(constant) - COLOURS[0]).max(2) < 2)[0]
    assert DOWN / 2 - 2 <= rows.min() <= rows.max() <= DOWN / 2 + 1


@pytest.mark.parametrize("far", [1e5, 1e20])
def test_a_curve_that_leaves_the_frame_comes_back(far: float) -> None:
    curve = np.full(STEPS, 0.5)
    curve[20] = far
    found = heights(traces().draw(field(curve), field(np.full(STEPS, -5.0))), COLOURS[0])
    left, right = (round(ACROSS * step / (STEPS - 1)) for step in (19, 21))  # a line is 2 px wide
    np.testing.assert_allclose(np.delete(found, slice(left - 2, right + 2)), 0.5, atol=1.1 * 2.2 / DOWN)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_fields_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="a field has values that are not finite: the model is broken; take a better"):
        traces().draw(field(np.full(STEPS, broken)), field(np.zeros(STEPS)))


# --- dashes ---


def test_dashes_are_pieces_of_the_line_with_its_corners() -> None:
    line = np.array([[0.0, 0], [3, 0], [3, 4], [9, 4]])  # 13 long
    found = list(dashes(line, 2, 10))
    expected = [
        *([[0, 0], [2, 0]], [[3, 1], [3, 3]]),  # from 0 to 2, from 4 to 6
        *([[4, 4], [6, 4]], [[8, 4], [9, 4]]),  # from 8 to 10, and the rest of that from 12
    ]
    assert len(found) == 4
    for piece, corners in zip(found, expected, strict=True):
        np.testing.assert_allclose(piece, corners)
    around = list(dashes(line, 5, 10))
    np.testing.assert_allclose(around[0], [[0, 0], [3, 0], [3, 2]])


def test_a_long_line_has_longer_dashes_not_more() -> None:
    line = np.stack([np.arange(2000.0), 100.0 * (np.arange(2000) % 2)], 1)
    pieces = list(dashes(line, 5, 60))
    assert len(pieces) == 60
    lengths = [np.hypot(*np.diff(piece, axis=0).T).sum() for piece in pieces]
    np.testing.assert_allclose(lengths, np.hypot(1, 100) * 1999 / 120)
    assert list(dashes(np.zeros((3, 2)), 5, 60)) == []
