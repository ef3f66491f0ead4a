"""Properties of the networks of a zoo, and the tables that hold them beside files of one network each."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.datasets.frames import DataError

TABLES = ("properties.csv", "properties.json")
TEXTS = ("id", "run", "architecture", "dataset")
"""Properties that are text, also where they look like numbers."""
TAKEN = ("file", "group", "split")
"""Columns of the table of networks, which no property may be called."""
NAMED = 3  # examples in a message
WHOLE = (-(2**63), 2**64 - 1)
"""Lowest and highest whole number that a property can be."""
_NUMBER = r"[+-]?(([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?|nan|inf)"

Properties = dict[str, str | int | float | bool]


def check_properties(place: str, properties: Mapping[Any, Any]) -> None:
    """Raise DataError, naming the place, where a property is not plain, is empty, or has a name that is taken."""
    for name, value in properties.items():
        if not isinstance(name, str) or name in TAKEN or not name:
            rule = f"must be text, and not one of {', '.join(TAKEN)}, which the table of networks has"
            raise DataError(f"{place}: property {name!r}: its name {rule}; rename it")
        if type(value) not in (str, int, float, bool) or (name in TEXTS and not isinstance(value, str | int)):
            kind = "text" if name in TEXTS else "text, a whole number, a number or true or false"
            remedy = "save float(value), int(value) or str(value)"
            raise DataError(f"{place}: property {name!r} is a {type(value).__name__}: must be {kind}; {remedy}")
        if value == "":
            raise DataError(f"{place}: property {name!r} is empty; fill it in, or remove it from all networks")
        if type(value) is int and not WHOLE[0] <= value <= WHOLE[1]:
            raise DataError(
                f"{place}: property {name!r} is a whole number of {value.bit_length()} bits: must fit into 64; save it "
                "as a float or as text"
            )
        for text in (name, value):
            if isinstance(text, str) and text != text.encode("utf-8", "replace").decode():
                raise DataError(f"{place}: property {name!r} has text that is not UTF-8: {text!r}; rename it")


def read_table(path: Path, files: list[str]) -> dict[str, Properties]:
    """Properties of files that hold one state dict each, from `properties.csv` or `properties.json` beside them.

    The CSV has a column `file` (or `id`, which then also is the network's id) with the file's path within the folder;
    its ending may be left out. The JSON is an object of such paths and objects of properties.

    Args:
        path: The table.
        files: Paths of the files of networks within its folder.

    Returns:
        Properties by the file's path without its ending.

    Raises:
        DataError: no table; a row twice, or without a file; a property that is empty or not plain.
    """
    try:
        rows = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path}: is not a table of properties ({error}); correct it") from None
    stems = {name: name.rpartition(".")[0] for name in files}
    known, table, absent = set(stems.values()), {}, []
    for file, properties in rows:
        stem = stems.get(file, file)
        if stem in table:
            raise DataError(f"{path}: file {file!r} has two rows; keep one")
        if stem not in known:
            absent.append(file)
        check_properties(f"{path}, file {file!r}", properties)
        table[stem] = properties
    if absent:
        raise DataError(
            f"{path} has rows for {len(absent)} files that are absent, such as {', '.join(absent[:NAMED])}: add the "
            "files or remove the rows"
        )
    return table


def _read_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) and isinstance(p[1], list) for p in pairs):
        raise ValueError("must be an object of objects: {file: {property: value}}")
    for file, properties in pairs:
        names = [pair[0] if isinstance(pair, tuple) else None for pair in properties]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"the properties of {file!r} must be an object, with each name once")
    return [(file, dict(properties)) for file, properties in pairs]


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        header, *rows = csv.reader(handle, strict=True)
    key = next((name for name in ("file", "id") if name in header), None)
    if key is None or len(set(header)) < len(header):
        raise ValueError(f"has columns {', '.join(header)}; needs 'file' or 'id', and each name once")
    uneven = [i for i, row in enumerate(rows, 2) if row and len(row) != len(header)]
    if uneven:
        raise ValueError(f"row {uneven[0]} has another number of cells than the header's {len(header)}")
    columns = {name: [row[i] for row in rows if row] for i, name in enumerate(header)}
    keys = columns.pop("file") if key == "file" else columns["id"]
    typed = {name: cells if name in TEXTS else _typed(cells) for name, cells in columns.items()}
    return [(file, {name: cells[i] for name, cells in typed.items()}) for i, file in enumerate(keys)]


def _typed(cells: list[str]) -> list[str] | list[int] | list[float] | list[bool]:
    """A column as whole numbers, numbers or truth values where all its cells are such, else as it is."""
    for pattern, kind in ((r"[+-]?[0-9]+", int), (_NUMBER, float)):
        if all(re.fullmatch(pattern, cell.strip(), re.IGNORECASE) for cell in cells):
            return [kind(cell) for cell in cells]
    if all(cell.strip().lower() in ("true", "false") for cell in cells):
        return [cell.strip().lower() == "true" for cell in cells]
    return cells


def as_column(name: str, values: list[Any], ids: list[str]) -> list[Any]:
    """Values of one property over all networks, as one kind; whole numbers among others become numbers.

    Raises:
        DataError: text in some networks and numbers, or truth values, in others.
    """
    first = {type(value): i for i, value in reversed(list(enumerate(values)))}
    if first.keys() == {int, float}:
        return [float(value) for value in values]
    if len(first) > 1:
        found = ", ".join(f"{values[i]!r} in {ids[i]!r}" for i in sorted(first.values()))
        raise DataError(f"property {name!r} is of several kinds: {found}; make it one")
    return values
