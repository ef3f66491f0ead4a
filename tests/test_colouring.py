import numpy as np
import pytest

from workbench.colouring import colour_points
from workbench.datasets.frames import DataError
from workbench.plots import PALETTE


def test_numbers_are_coloured_from_least_to_most() -> None:
    found = colour_points(np.array([3.0, 1, 2]), "width [mm]")
    assert (found.label, found.kind) == ("width [mm]", "numbers")
    assert [text for text, _ in found.entries] == ["1", "1.5", "2", "2.5", "3"]
    hexes = ["#" + bytes(rgb).hex() for rgb in found.rgb]
    assert [hexes[1], hexes[2], hexes[0]] == [found.entries[i][1] for i in (0, 2, 4)]
    assert [text for text, _ in colour_points(np.array([3, 1, 2]), "frame").entries] == ["1", "2", "3"]
    constant = colour_points(np.full(4, 0.5), "x")
    assert len(constant.entries) == 1 and constant.entries[0][0] == "0.5" and len(np.unique(constant.rgb, axis=0)) == 1


def test_classes_have_colours_of_their_own_and_rare_ones_are_grey() -> None:
    few = colour_points(np.array(["b", "a", "b"], object), "action")
    palette = [tuple(round(255 * part) for part in colour) for colour in PALETTE]
    assert few.kind == "classes" and [text for text, _ in few.entries] == ["a", "b"]
    assert [tuple(rgb) for rgb in few.rgb.tolist()] == [palette[1], palette[0], palette[1]]
    assert len(colour_points(np.arange(10).astype(str), "c").entries) == 10
    many = np.array([f"c{i:02d}" for i in range(12) for _ in range(1 + (i >= 3))])
    found = colour_points(many, "c")
    assert [text for text, _ in found.entries] == [*(f"c{i:02d}" for i in range(3, 12)), "3 others"]
    assert found.entries[-1][1] == "#bebebe" and found.rgb[:3].tolist() == [[190] * 3] * 3
    assert len(np.unique(found.rgb[3:], axis=0)) == 9


def test_points_know_their_entry_of_the_legend() -> None:
    assert colour_points(np.array([3, 1, 2]), "x").entry_of.tolist() == [0, 0, 0]
    assert colour_points(np.array(["b", "a", "b"], object), "c").entry_of.tolist() == [1, 0, 1]
    many = colour_points(np.array([f"c{i:02d}" for i in range(12) for _ in range(1 + (i >= 3))]), "c")
    for rgb, entry in zip(many.rgb, many.entry_of, strict=True):
        assert many.entries[entry][1] == "#" + rgb.tobytes().hex()


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match=r"column 'x \[mm\]': 2 of 3 values are not finite; choose another column"):
        colour_points(np.array([1.0, np.nan, np.inf]), "x [mm]")
