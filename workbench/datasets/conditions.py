"""What each simulation run was computed from: a row of numbers from a CSV, or a picture."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from workbench.datasets.frames import (
    DECODE_ERRORS,
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    DataError,
    FrameError,
    _to_rgb,
    _why_not,
)

_BLANK = {"", "nan", "na", "n/a", "null", "none", "-nan"}


@dataclass
class Conditions:
    """What the runs were computed from: rows of numbers in their units, or pictures in [0, 1]."""

    names: list[str]
    values: np.ndarray
    """(p, d) float32, or (p, c, s, s) uint8."""

    def batch(self, runs: np.ndarray) -> Tensor:
        """Conditions of some runs, float32."""
        values = torch.from_numpy(self.values[runs])
        return values.float() / 255 if values.dtype == torch.uint8 else values


def read_table(
    path: Path, runs: int, ids: Sequence[str] | None, what: str = "run"
) -> tuple[list[str], Float[np.ndarray, "p d"], list[str] | None]:
    """Read a CSV with a header: one row of numbers per run, and perhaps their ids in a column `id`.

    Args:
        path: The file. With a column `id` its rows are matched to `ids`, in whatever order they are. Where `ids` is
            None and the column holds the whole numbers 0 to runs - 1, or 1 to runs, each once, they are the numbers
            of the runs, and the rows are matched by them; other ids are taken to be in the order of the runs, and
            whole numbers among them must not fall. In both cases the ids become those of the runs. Without that
            column the rows are in the order of the runs.
        runs: Number of runs of the fields.
        ids: Ids of the runs of the fields, in their order; None where the fields carry none.
        what: What a row stands for, for the message on their number.

    Returns:
        Names of the columns; their values in the order of the runs, float32 (runs, columns), in the file's units;
        the ids of the runs, None where neither side has any.

    Raises:
        DataError: no such file; not a table; a nameless, repeated or text column; no column of conditions; a repeated
            or empty id; ids that are whole numbers, not those of the runs, and fall; another number of rows than of
            runs; a run without a row, or a row without a run; a value that is empty or not finite in float32.
    """
    table = _read_csv(path)
    own = _ids(path, table) if "id" in table else None
    columns = table.drop(columns="id", errors="ignore")
    if columns.shape[1] == 0:
        raise DataError(f"{path}: has no column besides 'id'; add the conditions as columns of numbers")
    if own is None or ids is None:
        _check_count(path, table, runs, what)
    if own is not None and ids is None:
        ids = _in_order(own)
        if ids is None:
            _check_ascending(path, own, what)
    values = _numbers(path, columns)
    check_finite(list(columns), values, own, str(path))
    if own is not None and ids is not None:
        values = values[_match(str(path), "row", own, ids)]
    return list(columns), values, list(ids) if ids is not None else own


def _read_csv(path: Path) -> pd.DataFrame:
    """Every cell as text, under column names that are there, and different."""
    if not path.is_file():
        problem = "is a folder, not a CSV file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {problem}; give the path of the CSV with the conditions")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes); it must hold a header and one row per run")
    try:
        cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise DataError(
            f"{path}: is not a table of comma-separated values ({' '.join(str(error).split())}); correct it"
        ) from None
    cells = cells.fillna("").apply(lambda column: column.str.strip())  # a line may be short of cells
    table = cells[1:].set_axis(cells.iloc[0].tolist(), axis=1)
    _check_names(path, list(table))
    if table.empty:
        raise DataError(f"{path}: has a header ({', '.join(table)}) and no rows; add one row per run")
    return table


def _check_names(path: Path, names: list[str]) -> None:
    if "" in names:
        raise DataError(f"{path}: column {names.index('') + 1} of {len(names)} has no name; name or remove it")
    twice = _repeated(names)
    if twice:
        raise DataError(f"{path}: {names.count(twice[0])} columns are called {twice[0]!r}; rename or remove one")
    near = [name for name in names if name.lower() == "id" and name != "id"]
    if near:
        raise DataError(f"{path}: column {near[0]!r}: a column of ids is called 'id'; rename it, or the condition")


def _ids(path: Path, table: pd.DataFrame) -> list[str]:
    own = table["id"].tolist()
    if "" in own:
        raise DataError(f"{path}: row {own.index('') + 1} has no id; give it one, or remove the column 'id'")
    twice = _repeated(own)
    if twice:
        rows = ", ".join(str(row) for row, name in enumerate(own, 1) if name == twice[0])
        raise DataError(f"{path}: id {twice[0]!r} is in rows {rows}{_and_more(twice)}; an id has one row: keep one")
    return own


def _check_count(path: Path, table: pd.DataFrame, runs: int, what: str) -> None:
    if len(table) == runs:
        return
    headless = all(_is_number(name) for name in table)
    hint = f" (its first line, {', '.join(table)}, was read as the names of the columns)" if headless else ""
    raise DataError(f"{path}: has {len(table)} rows{hint}, the fields have {runs} {what}s; give one row per {what}")


def _in_order(own: list[str]) -> list[str] | None:
    """The ids sorted as numbers, if they number the runs from 0 or from 1 without a gap."""
    if not _whole(own):
        return None
    ordered = sorted(own, key=int)
    numbers = [int(name) for name in ordered]
    return ordered if numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(own))) else None


def _whole(own: list[str]) -> bool:
    return all(re.fullmatch("[0-9]+", name) for name in own)


def _check_ascending(path: Path, own: list[str], what: str) -> None:
    """Refuse a shuffled table of numbered runs: by order, most rows would belong to other runs."""
    if not _whole(own):
        return
    for row, (before, name) in enumerate(pairwise(own), 2):
        if int(name) < int(before):
            raise DataError(
                f"{path}: id {name!r} in row {row} comes after {before!r}: the fields carry no ids, so rows are in the "
                f"order of the {what}s; sort the rows by id, or, if they are in that order, remove the column 'id'"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path: Path, columns: pd.DataFrame) -> Float[np.ndarray, "p d"]:
    """The cells as float32; an empty one, and what is too large for float32, is not finite."""
    values = np.empty(columns.shape, np.float32)
    for i, name in enumerate(columns):
        numbers = pd.to_numeric(columns[name], errors="coerce").to_numpy(np.float64)
        text = np.isnan(numbers) & ~columns[name].str.lower().isin(_BLANK).to_numpy()
        if text.any():
            row = int(text.argmax())
            raise DataError(
                f"{path}: column {name!r} holds text, such as {columns[name].iloc[row]!r} in row {row + 1}; "
                "conditions are numbers: encode or remove it"
            )
        with np.errstate(over="ignore"):
            values[:, i] = numbers
    return values


def check_finite(
    names: Sequence[str], values: Float[np.ndarray, "p d"], ids: Sequence[str] | None, source: str
) -> None:
    """Refuse conditions with a value that is empty, NaN or infinite; nothing is put in its place.

    Args:
        names: Names of the columns.
        values: Conditions of every run.
        ids: Ids of the runs, for the message; None: rows are counted from 1.
        source: File the conditions come from.

    Raises:
        DataError: naming the first such value, its column and run, and how many there are in how many runs.
    """
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return
    row, column = bad[0].tolist()
    run = f"row {row + 1}" if ids is None else f"run {ids[row]!r}"
    count, affected = len(bad), len(np.unique(bad[:, 0]))
    raise DataError(
        f"{source}: {names[column]}={values[row, column]} of {run} is empty or not finite ({count} such "
        f"{_plural('value', count)} in {affected} {_plural('run', affected)}); correct it, or remove the run"
    )


def check_constant(names: Sequence[str], values: Float[np.ndarray, "p d"], source: str = "conditions") -> None:
    """Refuse a column with the same value in every run of the training split: it has no scale and says nothing.

    Args:
        names: Names of the columns.
        values: Conditions of the runs of the training split.
        source: File the conditions come from.

    Raises:
        DataError: naming the first such column, its value, and how many more there are.
    """
    constant = np.flatnonzero(values.min(axis=0) == values.max(axis=0)).tolist()
    if constant:
        first = constant[0]
        raise DataError(
            f"{source}: column {names[first]!r} is {values[0, first]:g} in all {len(values)} runs of the training "
            f"split{_and_more(constant)}; a constant condition says nothing: remove the column"
        )


def read_images(
    folder: Path, runs: int, ids: Sequence[str] | None, size: int, colour: Literal["grey", "rgb"]
) -> tuple[UInt8[np.ndarray, "p c s s"], list[str]]:
    """Read one picture per run.

    The whole picture is resized to a square, each pixel the mean of the area it covers; pictures keep no aspect ratio.

    Args:
        folder: Holds the pictures (PNG, JPEG, BMP, WebP). With `ids` they are matched by their names without the
            ending; else they are in the natural order of their names, img_2 before img_10.
        runs: Number of runs of the fields.
        ids: Ids of the runs of the fields, in their order; None where the fields carry none.
        size: Side of the result [px].
        colour: One channel of luma, or three.

    Returns:
        The pictures in the order of the runs; the ids of the runs: `ids`, or the pictures' names without the ending.

    Raises:
        DataError: no such folder, or no picture in it; two pictures of one name; another number of pictures than of
            runs; a run without a picture, or a picture without a run; a picture that does not decode, has
            transparent pixels, or 16 bits per channel.
    """
    names = _list_images(folder)
    stems = [Path(name).stem for name in names]
    if ids is None and len(names) != runs:
        raise DataError(
            f"{folder}: holds {len(names)} pictures ({names[0]} to {names[-1]}), the fields have {runs} runs; give "
            "one picture per run"
        )
    order = range(len(names)) if ids is None else _match(str(folder), "picture", stems, ids)
    pictures = np.stack([_decode(folder / names[i], size, colour) for i in order])
    return pictures, stems if ids is None else list(ids)


def _list_images(folder: Path) -> list[str]:
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {problem}; give the folder of the pictures")
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
    if not names:
        raise DataError(f"{folder}: holds no picture ({', '.join(IMAGE_SUFFIXES)}); give one picture per run")
    names.sort(key=_natural)
    twice = _repeated(Path(name).stem for name in names)
    if twice:
        same = " and ".join(repr(name) for name in names if Path(name).stem == twice[0])
        raise DataError(f"{folder}: {same} are two pictures of the run {twice[0]!r}; keep one")
    return names


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which digits count as numbers: img_2 before img_10; then by the characters."""
    parts = re.findall(r"[0-9]+|[^0-9]+", Path(name).stem)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part.lower()) for part in parts], name


def _decode(path: Path, size: int, colour: str) -> UInt8[np.ndarray, "c s s"]:
    """One picture under the rules that hold for frames of clips."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if any(";16B" in str(tile[3]) for tile in image.tile):  # Pillow would drop the lower bytes silently
                raise FrameError("has 16 bits per channel: convert it to 8 bits first")
            image.load()
            picture = _to_rgb(ImageOps.exif_transpose(image))
    except FrameError as error:
        raise DataError(f"{path}: {error}") from None
    except DECODE_ERRORS as error:
        raise DataError(f"{path}: {_why_not(path, error)}; mend or replace it") from None
    picture = picture.convert("L" if colour == "grey" else "RGB").resize((size, size), Image.Resampling.BOX)
    return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)


def _match(source: str, what: str, own: Sequence[str], ids: Sequence[str]) -> list[int]:
    """Where each id is in `own`; both must hold the same ids."""
    wanted, position = set(ids), {name: i for i, name in enumerate(own)}
    absent = [name for name in ids if name not in position]
    extra = [name for name in own if name not in wanted]
    if absent or extra:
        problems = [f"no {what} for {_listed('run', absent)} of the fields"] * bool(absent)
        problems += [f"no run of the fields for {_listed(what, extra)}"] * bool(extra)
        raise DataError(f"{source}: {' and '.join(problems)}; there must be one {what} for each of the {len(ids)} runs")
    return [position[name] for name in ids]


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
    return f"{_plural(what, len(names))} {shown}"


def _plural(what: str, count: int) -> str:
    return what if count == 1 else f"{what}s"


def _and_more(found: list) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""
