import numpy as np
from matplotlib import colormaps

from workbench.legends import as_hex, scale_entries


def test_a_scale_goes_from_the_least_to_the_most_in_its_colours() -> None:
    entries = scale_entries(-2, 6.5, "cividis")
    assert [text for text, _ in entries] == ["-2", "0.125", "2.25", "4.375", "6.5"]
    ends = [as_hex(np.array(colormaps["cividis"](t, bytes=True)[:3], np.uint8)) for t in (0.0, 1.0)]
    assert [entries[0][1], entries[-1][1]] == ends and len({colour for _, colour in entries}) == 5


def test_of_whole_numbers_the_entries_are_whole_and_in_the_colours_of_these_numbers() -> None:
    assert [text for text, _ in scale_entries(0, 1, "cividis", whole=True)] == ["0", "1"]
    entries = scale_entries(3, 12, "cividis", whole=True)
    assert [text for text, _ in entries] == ["3", "5", "8", "10", "12"]
    assert entries[1][1] == as_hex(np.array(colormaps["cividis"](2 / 9, bytes=True)[:3], np.uint8))
    assert [text for text, _ in scale_entries(1048576, 1048576, "cividis", whole=True)] == ["1048576"]


def test_of_a_single_number_there_is_one_entry() -> None:
    assert [text for text, _ in scale_entries(0.5, 0.5, "cividis")] == ["0.5"]


def test_colours_are_written_with_two_digits_each() -> None:
    assert as_hex(np.array([0, 10, 255], np.uint8)) == "#000aff"
