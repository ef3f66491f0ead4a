"""Colours of the points of a map: of numbers, or of classes; what colour tells of classes, a marker tells too."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib import colormaps

from workbench.datasets.frames import DataError
from workbench.legends import as_hex, scale_entries
from workbench.plots import PALETTE

OTHERS = np.full(3, 190, np.uint8)


@dataclass(frozen=True)
class Colouring:
    """Colours of points that tell numbers, or classes.

    Args:
        rgb: Colour of each point.
        label: What they tell.
        kind: "numbers" or "classes".
        entries: Text and colour (#rrggbb) of each entry of the legend.
        entry_of: Of classes, the entry of each point; 0 of numbers.
    """

    rgb: UInt8[np.ndarray, "n 3"]
    label: str
    kind: str
    entries: list[list[str]]
    entry_of: Int[np.ndarray, " n"]


def colour_points(values: np.ndarray, label: str) -> Colouring:
    """Colours of numbers, from dark blue (least) to yellow, or of classes.

    Of more than 10 classes the 9 most frequent have a colour, and the others are grey.

    Args:
        values: One number, or one name, per point.
        label: What they are, with their unit.

    Raises:
        DataError: a number is not finite.
    """
    if values.dtype.kind in "fiu":
        return _colour_numbers(values.astype(float), label, whole=values.dtype.kind != "f")
    return _colour_classes(values.astype(str), label)


def _colour_numbers(values: np.ndarray, label: str, whole: bool) -> Colouring:
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise DataError(f"column {label!r}: {broken} of {len(values)} values are not finite; choose another column")
    low, high = float(values.min()), float(values.max())
    rgb = colormaps["cividis"]((values - low) / ((high - low) or 1.0), bytes=True)[:, :3]
    return Colouring(rgb, label, "numbers", scale_entries(low, high, "cividis", whole), np.zeros(len(values), int))


def _colour_classes(values: np.ndarray, label: str) -> Colouring:
    names, of_point, counts = np.unique(values, return_inverse=True, return_counts=True)
    several = len(names) > len(PALETTE)
    shown = np.sort(np.argsort(-counts, kind="stable")[: len(PALETTE) - several])
    colours, entry_of = np.tile(OTHERS, (len(names), 1)), np.full(len(names), len(shown))
    colours[shown], entry_of[shown] = np.round(255 * np.array(PALETTE[: len(shown)])), np.arange(len(shown))
    entries = [[str(names[i]), as_hex(colours[i])] for i in shown]
    if several:
        entries.append([f"{len(names) - len(shown)} others", as_hex(OTHERS)])
    return Colouring(colours[of_point], label, "classes", entries, entry_of[of_point])
