import itertools
import json

import numpy as np
import pytest

from workbench.datasets import palettes
from workbench.datasets.frames import DataError
from workbench.datasets.palettes import UNKNOWN, Palette, read_palette

COLOURS = [[255, 255, 255], [0, 0, 0], [200, 10, 10]]
PLAIN = "outside: [255, 255, 255]\nwall: [0, 0, 0]\nbed: [200, 10, 10]\n"


@pytest.fixture
def write(tmp_path):
    """Writes a palette file and gives its path."""

    def written(text: str | bytes, name: str = "palette.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def palette(*colours) -> Palette:
    return Palette(tuple(f"c{i}" for i in range(len(colours))), np.array(colours, np.uint8))


# reading


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("palette.yaml", PLAIN),
        ("palette.json", json.dumps({"outside": COLOURS[0], "wall": COLOURS[1], "bed": COLOURS[2]}, indent="\t")),
        (
            "indexed.yaml",
            "bed: {index: 2, rgb: [200, 10, 10]}\nwall: {rgb: [0, 0, 0], index: 1}\n"
            "outside:\n  index: 0\n  rgb: [255, 255, 255]\n",
        ),
        ("indexed.json", '{"wall": {"index": 1, "rgb": [0, 0, 0]}, "outside": {"index": 0, "rgb": [255, 255, 255]}, '
                         '"bed": {"index": 2, "rgb": [200, 10, 10]}}'),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_classes(write, name, text):
    found = read_palette(write(text, name))
    assert found.names == ("outside", "wall", "bed")
    assert found.colours.dtype == np.uint8 and found.colours.tolist() == COLOURS


def test_names_are_read_as_they_are_written(write):
    found = read_palette(write("on: [0, 0, 1]\n007: [0, 0, 2]\n1e3: [0, 0, 0x03]\nnull: [0, 0, 4]\n"))
    assert found.names == ("on", "007", "1e3", "null") and found.colours[:, 2].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2, 3]\nb: [4, 5, 6]\nc: [1, 2, 3]\n", r"classes 'a' and 'c' both have the colour \[1, 2, 3\].*differ"),
        ("a: [1, 2, 3]\nb: [4, 5, 6]\na: [7, 8, 9]\n", "class 'a' is given 2 times; keep one"),
        ("a: {index: 0, rgb: [1, 2, 3]}\nb: {index: 0, rgb: [4, 5, 6]}\n", "index '0' is given 2 times; keep one"),
        ("a: {index: 0, rgb: [1, 2, 3]}\nb: {index: 2, rgb: [4, 5, 6]}\n", "class 'b' has the index 2: .* 0 to 1, as"),
        ("a: {index: -1, rgb: [1, 2, 3]}\nb: {index: 0, rgb: [4, 5, 6]}\n", "class 'a' has the index -1: .* 0 to 1"),
        ("a: {index: 0, rgb: [1, 2, 3]}\nb: [4, 5, 6]\n", "class 'b' has no index, others do; give one to every"),
        ("a: {index: x, rgb: [1, 2, 3]}\nb: {index: 0, rgb: [4, 5, 6]}\n", "index 'x': must be a whole number"),
        ("a: {index: 0, index: 1, rgb: [1, 2, 3]}\nb: [4, 5, 6]\n", "has index, index, rgb: must have index and rgb"),
        ("a: {}\nb: [4, 5, 6]\n", "class 'a' has nothing: must have index and rgb"),
        ("a: [1, 2, 256]\nb: [4, 5, 6]\n", r"class 'a' has 256 in its colour \[1, 2, 256\]: .*0\.\.255; correct"),
        ("a: [1, 2, -1]\nb: [4, 5, 6]\n", r"has -1 in its colour .*0\.\.255"),
        ("a: [1, 2, 0.5]\nb: [4, 5, 6]\n", r"has '0\.5' in its colour .*whole number in 0\.\.255"),
        ("a: [1, 2]\nb: [4, 5, 6]\n", r"class 'a' has the colour \[1, 2\]: must be three numbers; write `name:"),
        ("a: red\nb: [4, 5, 6]\n", "class 'a' has the colour 'red': must be three numbers"),
        ("a: [1, 2, 3]\n", "has 1 classes: must be 2 to 255"),
        ("- [1, 2, 3]\n- [4, 5, 6]\n", "must be a mapping of class names to colours; write `name:"),
        ("", "must be a mapping of class names to colours"),
        ("a: [1, 2\n", r"is no usable YAML \(.*correct it"),
        ("? [a, b]\n: [1, 2, 3]\n", "is no usable YAML .*a name that is no text"),
        ("a: &a [*a, 1, 2]\nb: [4, 5, 6]\n", "nested more than 3 deep"),
        (b"\xff\xfe\x00", "is no usable YAML"),
    ],
)
def test_a_palette_that_cannot_be_used_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(DataError, match=message) as error:
        read_palette(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [1, 2, 3], "b": [4, 5, 6], "a": [7, 8, 9]}', "class 'a' is given 2 times"),
        ('{"a": [1, 2, true], "b": [4, 5, 6]}', "has True in its colour"),
        ('{"a": [1, 2, 3],}', "is no usable JSON"),
        ("[" * 100_000, "is no usable JSON"),
        ("[[1, 2, 3], [4, 5, 6]]", "must be a mapping"),
    ],
)
def test_a_json_palette_is_held_to_the_same_rules(write, text, message):
    with pytest.raises(DataError, match=message):
        read_palette(write(text, "palette.JSON"))


def test_references_do_not_make_a_palette_grow(write, monkeypatch):
    plain, visited = palettes._plain, []
    monkeypatch.setattr(palettes, "_plain", lambda node, depth: (visited.append(node), plain(node, depth))[1])
    lines = ["a: &a0 [1, 2, 3]"] + [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(DataError, match="nested more than 3 deep"):
        read_palette(write("\n".join(lines)))
    assert len(visited) < 1000


def test_too_many_classes_are_refused(write):
    lines = [f"c{i}: [{i % 256}, {i // 256}, 0]" for i in range(256)]
    assert len(read_palette(write("\n".join(lines[:255]))).names) == 255
    with pytest.raises(DataError, match="has 256 classes: must be 2 to 255"):
        read_palette(write("\n".join(lines)))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.yaml: cannot be read \(No such file.*correct the path"):
        read_palette(tmp_path / "absent.yaml")


# pixels to classes


def by_hand(image: np.ndarray, colours: list, tolerance: float) -> list[int]:
    """Every pixel's class from the definition, in Python's whole numbers."""
    found = []
    for pixel in image.reshape(-1, 3).tolist():
        distances = [sum((a - b) ** 2 for a, b in zip(pixel, colour, strict=True)) for colour in colours]
        found.append(distances.index(min(distances)) if min(distances) <= tolerance**2 else UNKNOWN)
    return found


@pytest.mark.parametrize("tolerance", [0, 30, 77.5, 442])
def test_classes_are_those_of_the_definition(tolerance):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (9, 3)).tolist()
    image = rng.integers(0, 256, (20, 30, 3), np.uint8)
    image[0, :9] = colours
    classes, unknown = palette(*colours).classify(image, tolerance)
    assert classes.dtype == np.uint8 and classes.ravel().tolist() == by_hand(image, colours, tolerance)
    assert classes[0, :9].tolist() == list(range(9))
    assert sum(unknown.values()) == (classes == UNKNOWN).sum()


def test_of_equally_near_classes_the_first_is_taken():
    image = np.array([[[10, 0, 0]]], np.uint8)
    for order in itertools.permutations([[0, 0, 0], [20, 0, 0], [10, 10, 0]]):
        assert palette(*order).classify(image, 10)[0].item() == 0


def test_the_tolerance_is_the_largest_distance_that_counts():
    image = np.array([[[3, 4, 0], [3, 4, 1]]], np.uint8)
    black_and_white = palette([0, 0, 0], [255, 255, 255])
    assert black_and_white.classify(image, 5)[0].tolist() == [[0, UNKNOWN]]
    assert black_and_white.classify(image, 4.99)[0].tolist() == [[UNKNOWN, UNKNOWN]]
    farthest = palette([0, 0, 0], [1, 0, 0]).classify(np.full((1, 1, 3), 255, np.uint8), 441.1)
    assert farthest[0].item() == 1 and farthest[1] == {}


def test_unknown_colours_are_counted():
    image = np.zeros((4, 5, 3), np.uint8)
    image[1, :3], image[2, 2] = [9, 200, 7], [9, 201, 7]
    classes, unknown = palette([0, 0, 0], [255, 255, 255]).classify(image, 16)
    assert unknown == {(9, 200, 7): 3, (9, 201, 7): 1} and (classes == UNKNOWN).sum() == 4


def test_nearest_gives_exact_squared_distances():
    index, distance = palette([0, 0, 0], [255, 0, 0]).nearest(np.array([[255, 255, 255], [1, 2, 3]], np.uint8))
    assert index.tolist() == [1, 0] and distance.tolist() == [2 * 255**2, 14]
