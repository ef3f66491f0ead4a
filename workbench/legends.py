"""Entries of legends as pages and figures draw them: a text and a colour."""

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps

NUMBERS = 5
"""Entries of a scale, at most."""


def scale_entries(low: int | float, high: int | float, colours: str, whole: bool = False) -> list[list[str]]:
    """Text and colour (#rrggbb) of five numbers from the least to the most, or of as many as differ.

    Args:
        low, high: Where the scale begins and ends.
        colours: Name of a colour map of matplotlib.
        whole: Whether there are only whole numbers, so that the entries are too.
    """
    numbers = np.linspace(low, high, NUMBERS)
    numbers = np.unique(numbers.round() if whole else numbers)
    bar = colormaps[colours]((numbers - low) / ((high - low) or 1.0), bytes=True)[:, :3]
    texts = [f"{number:.0f}" if whole else f"{number:.4g}" for number in numbers]
    return [[text, as_hex(colour)] for text, colour in zip(texts, bar, strict=True)]


def as_hex(rgb: UInt8[np.ndarray, "3"]) -> str:
    """A colour as #rrggbb."""
    return f"#{rgb.tobytes().hex()}"
