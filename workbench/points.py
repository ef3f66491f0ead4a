"""Points: one parameter folder many times, for each value that `--grid` gives and for each seed.

The notebooks of a point find each other, as they share its experiment: `<experiment>/lr=0.1,seed=2`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from workbench.config import ConfigError

NAMING = ("experiment", "run")
"""Parameters that name folders, which a point does itself."""
LEGAL, ILLEGAL = re.compile(r"[\w.+-]+"), re.compile(r"[^\w.+-]+")
WIDTH = 100


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each parameter in `--grid key=a,b,c`, as text; commas inside brackets separate nothing.

    Raises:
        ConfigError: a text of another form, a parameter given twice, or one that names folders.
    """
    grid: dict[str, list[str]] = {}
    found = []
    for text in texts:
        key, _, values = text.partition("=")
        if not key or not values:
            found.append((f"--grid {text}", "must read key=a,b,c"))
        elif key in NAMING:
            found.append(
                (f"--grid {text}", f"{key} names folders, and each point has a folder of its own: leave it out")
            )
        elif key in grid:
            found.append((f"--grid {text}", f"{key} is given twice: write all its values behind one --grid"))
        else:
            grid[key] = _split(values)
    if found:
        raise ConfigError(found)
    return grid


def _split(text: str) -> list[str]:
    """`[1, 2],[3]` -> `[1, 2]` and `[3]`."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def grid_points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of the values, the last parameter fastest; one empty point for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def point_name(values: Mapping[str, Any]) -> str:
    """A folder's name for a point, the same however its values were written: `dims=3-4,lr=0.0001,seed=2`.

    Args:
        values: By parameter, as YAML reads them. What no folder's name should hold becomes a dash and a hash.
    """
    name = ",".join(f"{key}={_word(value)}" for key, value in values.items())
    return name if len(name) <= WIDTH else f"{name[:WIDTH]}-{_hash(name)}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = "-".join(map(_word, value)) if isinstance(value, list) else str(value)
    return text if LEGAL.fullmatch(text) else f"{ILLEGAL.sub('-', text)}-{_hash(repr(value))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
