"""Ids that a file of fields carries for its runs, by which rows of a table and pictures are matched to them."""

from pathlib import Path
from typing import Any

import numpy as np

from workbench.datasets.arrays import _FORMATS, LazyArray, _netcdf, _readable, open_array
from workbench.datasets.frames import DataError

_NAMES = ("id", "ids")
_FILES = (".npz", ".zarr", ".zarr.zip", ".h5", ".hdf5", ".nc", ".pt")
_RULE = "ids are text or whole numbers: save them as such, or rename the array"


def read_ids(path: Path, runs: int, field: str = "") -> list[str] | None:
    """Read the ids of the runs from the file of their fields.

    They are an array `id` or `ids` of text or whole numbers, one per run: beside the fields, if these lie in a group of
    an .h5 or .zarr, else at the top of the file. A .nc without one may name its runs by text in the coordinate of
    the first dimension of the fields. A .pt holds numbers only.

    Args:
        path: The file. A .npy and a pickle hold one array, and no ids.
        runs: Number of runs of the fields.
        field: Name of the fields in the file; empty for the only array that can be fields.

    Returns:
        Ids in the order of the runs, numbers as text, without white space around them; None where there are none.

    Raises:
        DataError: two arrays of ids; another number of ids than of runs; ids that are neither text nor whole numbers,
            such as floats or Python objects; an empty or repeated id; a damaged file.
    """
    suffix = next((suffix for suffix in _FILES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        return None
    with _readable(path):
        arrays = {array.name: array for array in _FORMATS[suffix](path)}
        array = _beside(path, arrays, field)
        if array is None and suffix == ".nc":
            array = _coordinate(path, arrays, field or open_array(path).name)
        if array is None:
            return None
        _check_kind(array, runs)
        ids = [_text(array, i, value) for i, value in enumerate(_values(array, suffix))]
    _check_different(array, ids)
    return ids


def _beside(path: Path, arrays: dict[str, LazyArray], field: str) -> LazyArray | None:
    group = field.rpartition("/")[0]
    for place in dict.fromkeys([f"{group}/" if group else "", ""]):
        found = [arrays[place + name] for name in _NAMES if place + name in arrays]
        if len(found) > 1:
            raise DataError(f"{path}: holds both {found[0].name!r} and {found[1].name!r}; keep the one of the runs")
        if found:
            return found[0]
    return None


def _coordinate(path: Path, arrays: dict[str, LazyArray], field: str) -> LazyArray | None:
    """Coordinate of the first dimension of the fields, if it is text; numbers there may be any quantity."""
    with _netcdf(path) as variables:
        array = arrays.get(variables[field].dims[0])
    return array if array is not None and array.dtype.kind in "OSTU" else None


def _check_kind(array: LazyArray, runs: int) -> None:
    if array.shape != (runs,):
        count = f"{array.shape[0]} ids" if len(array.shape) == 1 else f"shape {array.shape}"
        raise DataError(f"{_label(array)}: has {count}, the fields have {runs} runs; give one id per run")
    if array.dtype.kind not in "iuOSTU" or array.refusal:
        raise DataError(f"{_label(array)}: holds values of type {array.dtype}; {_RULE}")


def _values(array: LazyArray, suffix: str) -> list[Any]:
    if suffix != ".npz":
        return array.fetch(np.arange(array.shape[0]), ()).tolist()
    if array.dtype.hasobject and array.dtype.kind == "O":
        remedy = "save them as text, with numpy.array(ids, dtype=str)"
        raise DataError(f"{_label(array)}: holds Python objects, which only a pickle can: not read; {remedy}")
    with np.load(array.path, allow_pickle=False) as archive:
        return archive[array.name].tolist()


def _text(array: LazyArray, run: int, value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{_label(array)}: id {value!r} of run {run} is of type {type(value).__name__}; {_RULE}")
    text = str(value).strip()
    if not text:
        raise DataError(f"{_label(array)}: the id of run {run}, counted from 0, is empty; give it one")
    return text


def _check_different(array: LazyArray, ids: list[str]) -> None:
    first: dict[str, int] = {}
    for run, name in enumerate(ids):
        if first.setdefault(name, run) != run:
            raise DataError(
                f"{_label(array)}: id {name!r} is that of runs {first[name]} and {run}, counted from 0; {len(ids)} "
                f"runs have {len(set(ids))} different ids: give each run its own"
            )


def _label(array: LazyArray) -> str:
    return f"{array.path}, ids {array.name!r}"
