"""Entries of legends as pages and figures draw them: a text and a colour."""

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps

NUMBERS = 5
"""Entries of a scale."""


def scale_entries(low: int | float, high: int | float, colours: str) -> list[list[str]]:
    """Text and colour (#rrggbb) of five numbers from the least to the most, or of one where these are equal.

    Args:
        low, high: Where the scale begins and ends.
        colours: Name of a colour map of matplotlib.
    """
    shares = np.linspace(0, 1, NUMBERS if high > low else 1)
    bar = colormaps[colours](shares, bytes=True)[:, :3]
    return [[f"{low + t * (high - low):.4g}", as_hex(colour)] for t, colour in zip(shares, bar, strict=True)]


def as_hex(rgb: UInt8[np.ndarray, "3"]) -> str:
    """A colour as #rrggbb."""
    return f"#{rgb.tobytes().hex()}"
