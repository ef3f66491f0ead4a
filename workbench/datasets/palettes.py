"""Palettes: which class a colour stands for, read from YAML or JSON, and images mapped to classes by the nearest."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int, UInt8

from workbench.datasets.frames import DataError

UNKNOWN = 255
"""The class of a pixel whose colour is too far from every colour of the palette."""
DEPTH = 3  # of mappings and lists within each other, the whole file counted
FORM = "write `name: [red, green, blue]`, or `name: {index: 0, rgb: [red, green, blue]}` for every class"


@dataclass(frozen=True)
class Palette:
    """Classes and their colours; the index of a class is its place here.

    Args:
        names: One of each class, all different.
        colours: uint8 (k, 3), all different.
    """

    names: tuple[str, ...]
    colours: UInt8[np.ndarray, "k 3"] = field(repr=False)

    def nearest(self, colours: UInt8[np.ndarray, "u 3"]) -> tuple[UInt8[np.ndarray, " u"], Int[np.ndarray, " u"]]:
        """The class nearest to each colour, of equally near ones the first, and its squared distance in RGB, exact."""
        index = np.zeros(len(colours), np.uint8)
        least = np.full(len(colours), np.iinfo(np.int32).max, np.int32)
        for i, own in enumerate(self.colours.astype(np.int32)):
            distance = np.square(colours.astype(np.int32) - own).sum(1, dtype=np.int32)
            nearer = distance < least
            index[nearer], least[nearer] = i, distance[nearer]
        return index, least

    def classify(
        self, image: UInt8[np.ndarray, "h w 3"], tolerance: int | float
    ) -> tuple[UInt8[np.ndarray, "h w"], dict[tuple[int, int, int], int]]:
        """The class of every pixel, and the colours that have none.

        Args:
            image: Pixels.
            tolerance: Largest Euclidean distance in RGB, 0..255 per channel, from a pixel to its class's colour.

        Returns:
            Index of the nearest class, `UNKNOWN` beyond the tolerance; and each unknown colour with its pixels.
        """
        red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
        codes = red << 16 | green << 8 | blue
        found = np.unique(codes)  # an image of a plan has few colours
        colours = (found[:, None] >> np.array([16, 8, 0]) & 255).astype(np.uint8)
        index, distance = self.nearest(colours)
        far = distance > tolerance**2
        index[far] = UNKNOWN
        places = np.searchsorted(found, codes)
        unknown = {}
        if far.any():
            counts = np.bincount(places.ravel())
            unknown = {tuple(colours[i].tolist()): int(counts[i]) for i in np.flatnonzero(far)}
        return index[places], unknown


def read_palette(path: Path) -> Palette:
    """Read a palette file: a mapping of class names to colours, YAML, or JSON where the name ends so.

    A colour is `[red, green, blue]`, 0..255, and classes are then counted from 0 in the order of the file; or every
    class is `{index: i, rgb: [red, green, blue]}`, with the indices 0 to k - 1 in any order.

    Raises:
        DataError: the file cannot be read or has another form; a name, colour or index is given twice; a value is
            not in 0..255; there are fewer than 2 classes, or more than 255.
    """
    entries = _read_pairs(path)
    _check_once(path, "class", [name for name, _ in entries])
    if not 2 <= len(entries) <= UNKNOWN:
        raise DataError(f"{path}: has {len(entries)} classes: must be 2 to {UNKNOWN}; {FORM}")
    given = [(name, *_index_and_colour(path, name, value)) for name, value in entries]
    indices = [index for _, index, _ in given]
    if any(index is not None for index in indices):
        _check_indices(path, given)
        given.sort(key=lambda entry: entry[1])
    first: dict[tuple[int, ...], str] = {}
    for name, _, colour in given:
        if first.setdefault(colour, name) != name:
            both = f"classes {first[colour]!r} and {name!r} both have the colour {list(colour)}"
            raise DataError(f"{path}: {both}: colours must differ; give one of them another, or merge the classes")
    return Palette(tuple(name for name, _, _ in given), np.array([colour for _, _, colour in given], np.uint8))


def _read_pairs(path: Path) -> list[tuple[str, Any]]:
    """Names and values of the file's mapping, also of names given twice; mappings within it are tuples of pairs."""
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        if is_json:
            content = json.loads(text, object_pairs_hook=tuple)
        else:
            content = _plain(yaml.compose(text, Loader=yaml.SafeLoader), DEPTH)
    except OSError as error:
        raise DataError(
            f"palette {path}: cannot be read ({error.strerror}); correct the path, or set palette"
        ) from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        form, what = "JSON" if is_json else "YAML", " ".join(str(error).split())
        raise DataError(f"palette {path}: is no usable {form} ({what}); correct it") from None
    if not isinstance(content, tuple):
        raise DataError(f"palette {path}: must be a mapping of class names to colours; {FORM}")
    return list(content)


def _plain(node: yaml.Node | None, depth: int) -> Any:
    """A YAML node as JSON has it; names stay as written, so that `on` and `007` are names like others."""
    if isinstance(node, yaml.CollectionNode) and not depth:
        raise ValueError(f"is nested more than {DEPTH} deep")  # aliases could make it grow without end
    if isinstance(node, yaml.MappingNode):
        return tuple((_plain_name(key), _plain(value, depth - 1)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value, depth - 1) for value in node.value]
    if node is not None and node.tag == "tag:yaml.org,2002:int":
        return yaml.SafeLoader("").construct_yaml_int(node)
    return None if node is None else node.value


def _plain_name(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("has a name that is no text")
    return node.value


def _index_and_colour(path: Path, name: str, value: Any) -> tuple[int | None, tuple[int, ...]]:
    index = None
    if isinstance(value, tuple):
        if sorted(key for key, _ in value) != ["index", "rgb"]:
            keys = ", ".join(str(key) for key, _ in value) or "nothing"
            raise DataError(f"{path}: class {name!r} has {keys}: must have index and rgb, once each; {FORM}")
        entry = dict(value)
        index, value = entry["index"], entry["rgb"]
        if type(index) is not int:
            raise DataError(f"{path}: class {name!r} has the index {index!r}: must be a whole number; correct it")
    if not isinstance(value, list) or len(value) != 3:
        raise DataError(f"{path}: class {name!r} has the colour {value!r}: must be three numbers; {FORM}")
    wrong = [part for part in value if type(part) is not int or not 0 <= part <= 255]
    if wrong:
        rule = "must be a whole number in 0..255; correct it"
        raise DataError(f"{path}: class {name!r} has {wrong[0]!r} in its colour {value}: {rule}")
    return index, tuple(value)


def _check_indices(path: Path, given: list[tuple[str, int | None, tuple[int, ...]]]) -> None:
    without = [name for name, index, _ in given if index is None]
    if without:
        raise DataError(f"{path}: class {without[0]!r} has no index, others do; give one to every class, or to none")
    _check_once(path, "index", [str(index) for _, index, _ in given])
    wrong = [(name, index) for name, index, _ in given if not 0 <= index < len(given)]
    if wrong:
        rule = f"indices must be 0 to {len(given) - 1}, as there are {len(given)} classes; renumber them"
        raise DataError(f"{path}: class {wrong[0][0]!r} has the index {wrong[0][1]}: {rule}")


def _check_once(path: Path, what: str, values: list[str]) -> None:
    value, times = Counter(values).most_common(1)[0] if values else ("", 1)
    if times > 1:
        raise DataError(f"{path}: {what} {value!r} is given {times} times; keep one, or rename")
