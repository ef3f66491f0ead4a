"""Arrays of simulation fields in files of many formats: opened lazily, read run by run, no code run from them.

How much of a file is in memory while runs are read from it:
- .npy, and .npz saved without compression: the runs asked for, read from their place in the file, which is never
  mapped. The check sum of such an .npz is not looked at, as that takes the whole file.
- .zarr (a folder, or one zip), .h5, .hdf5, .nc: the runs asked for and the chunks they lie in. Chunks that were never
  written have the fill value that the file states.
- .pt: mapped during each reading; the pages touched count as memory of the process until the reading ends. The map
  is private, so the kernel may refuse one that is larger than the machine's memory.
- .npz saved with compression, and pickles: the whole array, read once and kept.

Files are opened for each reading and closed after it: an array may be read from several threads, after a fork, and
sent to another process, which opens the file itself.
"""

import difflib
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.lib import format as npy

from workbench.datasets.frames import DataError
from workbench.datasets.unpickling import map_tensors, read_pickled_array

Fetch = Callable[[np.ndarray, tuple[slice, ...]], np.ndarray]
"""Runs, in any order, and ranges of the axes after the first -> their values."""
_Opening = Callable[[Path], AbstractContextManager[Any]]

_SHAPES = "(runs, steps, nodes), (runs, steps, nodes, variables) or (runs, values)"
_LISTED = 20
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_DAMAGE = (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, MemoryError)
_DAMAGE += (struct.error, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class LazyArray:
    """A numeric array in a file: (runs, steps, nodes), (runs, steps, nodes, variables) or (runs, values).

    Args:
        path: The file.
        name: The array's name in it; empty where arrays have none.
        shape: Of the whole array.
        dtype: Of the values in the file; they are read as float32.
        fetch: Reads runs from the file.
        refusal: Why the array cannot be read from this file, if it cannot.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Fetch = field(repr=False, compare=False)
    refusal: str = field(default="", repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array as float32."""
        return 4 * math.prod(self.shape)

    def __reduce__(self) -> tuple:
        return open_array, (self.path, self.name)

    def read(
        self, runs: Sequence[int] | np.ndarray, steps: slice = slice(None), nodes: slice = slice(None)
    ) -> Float32[np.ndarray, "runs ..."]:
        """Values of these runs, in the order asked for; a run may be asked for repeatedly.

        Integers and floats of other widths become float32: whole numbers above 2^24 are rounded, and float64 values
        beyond float32's range become infinite, which the caller's check for finite values finds.

        Args:
            runs: Positions along the first axis, from 0.
            steps: Range of the second axis, without a stride; not for an array (runs, values).
            nodes: Range of the third axis, likewise.

        Returns:
            (len(runs), steps, nodes), (len(runs), steps, nodes, variables) or (len(runs), values): a new array.

        Raises:
            DataError: a run or a range outside the array; the file is gone or damaged.
        """
        numbers = self._positions(runs)
        ranges = self._ranges({"steps": steps, "nodes": nodes})
        with _readable(self.path), np.errstate(over="ignore"):
            return np.ascontiguousarray(self.fetch(numbers, ranges), np.float32)

    def _positions(self, runs: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers = np.asarray(runs)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise DataError(f"{self._label}: runs={runs!r}: must be a row of at least one whole number; count from 0")
        outside = numbers[(numbers < 0) | (numbers >= self.shape[0])]
        if len(outside):
            raise DataError(f"{self._label}: run {outside[0]} is not among its {self.shape[0]} runs; count from 0")
        return numbers.astype(np.int64)

    def _ranges(self, given: dict[str, slice]) -> tuple[slice, ...]:
        """The ranges with both ends stated; none for an array (runs, values)."""
        if len(self.shape) == 2:
            if any(part != slice(None) for part in given.values()):
                raise DataError(f"{self._label}: has shape {self.shape}, without steps and nodes; ask for no range")
            return ()
        ranges = []
        for (what, part), size in zip(given.items(), self.shape[1:], strict=False):
            start, stop = part.start or 0, size if part.stop is None else part.stop
            if part.step not in (None, 1) or not 0 <= start < stop <= size:
                rule = f"must be a range without a stride, of at least one, within 0 to {size}; correct it"
                raise DataError(f"{self._label}: {what} {start}:{stop}:{part.step or 1} {rule}")
            ranges.append(slice(start, stop))
        return tuple(ranges)

    @property
    def _label(self) -> str:
        return f"{self.path}, field {self.name!r}" if self.name else str(self.path)

    @property
    def _problem(self) -> str:
        """Why it cannot serve as fields or conditions, with the remedy; empty if it can."""
        if self.refusal:
            return self.refusal
        if self.dtype.kind not in "iuf":
            return f"holds values of type {self.dtype}: must be real numbers; convert them to float32"
        if not 2 <= len(self.shape) <= 4:
            return f"has shape {self.shape}: must be {_SHAPES}; reshape it"
        return f"has shape {self.shape}, so holds no values; write it again" if 0 in self.shape else ""


def open_array(path: Path, name: str = "") -> LazyArray:
    """Open one numeric array of a file; its values are read later.

    Args:
        path: A file ending in .npy .npz .zarr .zarr.zip .h5 .hdf5 .nc .pt .pkl .pickle or .pic; .zarr may be a folder.
        name: Name of the array; empty for the only one, also where the file holds others that cannot be fields, such
            as a row of times.

    Raises:
        DataError: no such file, an unknown ending, a damaged file, one that holds more than arrays and so could run
            code; no array of that name, or several and no name; one that is not of numbers or not of 2 to 4 axes.
    """
    suffix = next((suffix for suffix in _FORMATS if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{path}: its ending is unknown; must be one of {', '.join(_FORMATS)}: convert it to one")
    if not path.exists():
        raise DataError(f"{path}: no such file; correct the path")
    with _readable(path):
        arrays = {array.name: array for array in _FORMATS[suffix](path)}
    array = _choose(path, arrays, name)
    if array._problem:
        raise DataError(f"{array._label}: {array._problem}")
    return array


def _choose(path: Path, arrays: dict[str, LazyArray], name: str) -> LazyArray:
    if not arrays:
        raise DataError(f"{path}: holds no array; give the file of the fields")
    if name in arrays:
        return arrays[name]
    if name and "" in arrays:
        raise DataError(f"{path}: holds one array, without a name, and no {name!r}; leave field empty")
    if name:
        near = ", ".join(map(repr, difflib.get_close_matches(name, arrays, n=3, cutoff=0.0)))
        raise DataError(f"{path}: holds no array {name!r}; the nearest are {near}: set field to one that it holds")
    usable = [array for array in arrays.values() if not array._problem]
    if len(usable) == 1 or len(arrays) == 1:
        return (usable or list(arrays.values()))[0]
    shown = list(arrays.values())[:_LISTED]
    more = f"; and {len(arrays) - _LISTED} more" if len(arrays) > _LISTED else ""
    if usable:
        listed = "; ".join(f"{array.name!r} {array.dtype} {array.shape}" for array in shown)
        raise DataError(f"{path}: holds several arrays: {listed}{more}; set field to the name of one")
    listed = ". ".join(f"{array.name!r} {array._problem}" for array in shown)
    raise DataError(f"{path}: none of its arrays can serve: {listed}{more}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of the libraries that read files, as one that names the file and says what to do."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        reason = (str(error).split("\n")[0] or type(error).__name__).rstrip(".")
        raise DataError(
            f"{path}: cannot be read ({reason}); if it is damaged or of another format, write it again; if it is too "
            "large for the memory, write it as .npy"
        ) from error


# .npy and .npz: values at known places


def _from_npy(path: Path) -> Iterator[LazyArray]:
    with path.open("rb") as handle:
        yield _flat(path, "", handle, os.fstat(handle.fileno()).st_size)


def _from_npz(path: Path) -> Iterator[LazyArray]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as handle:
                if member.compress_type == zipfile.ZIP_STORED:
                    yield _flat(path, name, handle, member.file_size, _start_of(raw, member))
                else:
                    shape, _, dtype = _header(handle)
                    yield LazyArray(path, name, shape, dtype, _Kept(path, name))


def _start_of(raw: BufferedIOBase, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after a header of 30 bytes, its name and its extra field."""
    raw.seek(member.header_offset + 26)
    return member.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))


def _header(handle: BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(handle)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the .npy format, which arrays of numbers do not need")
    return _HEADERS[version](handle)


def _flat(path: Path, name: str, handle: BufferedIOBase, size: int, base: int = 0) -> LazyArray:
    """The array in .npy format of `size` bytes, which in the file begin at `base`."""
    shape, fortran, dtype = _header(handle)
    start = handle.tell()
    expected = start + math.prod(shape) * dtype.itemsize
    if size != expected and not dtype.hasobject:
        raise ValueError(f"{size} bytes, where its header says {expected}")
    refusal = (
        "is stored in Fortran order, which scatters a run over the whole file; "
        "save it in C order, with numpy.save of numpy.ascontiguousarray of it"
    )
    fetch = partial(_fetch_flat, path, base + start, shape, dtype)
    return LazyArray(path, name, shape, dtype, fetch, refusal if fortran else "")


def _fetch_flat(
    path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype, runs: np.ndarray, ranges: tuple[slice, ...]
) -> np.ndarray:
    """Read, of each run, the rows of the steps asked for, into the result itself if no more is to be done to them."""
    ranges = ranges or (slice(0, shape[1]),)
    steps, others = ranges[0], ranges[1:]
    rows = (steps.stop - steps.start, *shape[2:])
    kept = (*(part.stop - part.start for part in ranges), *shape[1 + len(ranges) :])
    out = np.empty((len(runs), *kept), np.float32)
    scratch = None if dtype == np.float32 and rows == kept else np.empty(rows, dtype)
    row = math.prod(shape[2:]) * dtype.itemsize
    with path.open("rb", buffering=0) as handle:
        for into, run in zip(out, runs.tolist(), strict=True):
            handle.seek(start + (run * shape[1] + steps.start) * row)
            _fill(handle, into if scratch is None else scratch)
            if scratch is not None:
                into[...] = scratch[:, *others]
    return out


def _fill(handle: RawIOBase, array: np.ndarray) -> None:
    """Read until the array is full; one call reads 2 GB at most."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        count = handle.readinto(view)
        if not count:
            raise EOFError("the file ends within an array that it held when it was opened")
        view = view[count:]


class _Kept:
    """An array of a compressed .npz, which can only be read whole: once, when first needed."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._lock, self._array = path, name, threading.Lock(), None

    def __call__(self, runs: np.ndarray, ranges: tuple[slice, ...]) -> np.ndarray:
        with self._lock:
            if self._array is None:
                with np.load(self._path, allow_pickle=False) as archive:
                    self._array = archive[self._name]
        return self._array[runs, *ranges]


# .zarr, .h5, .nc and .pt: files whose own libraries read parts of an array


@contextmanager
def _zarr(path: Path) -> Iterator[Any]:
    import zarr  # here and below, as they take long to import and few have such files

    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else zarr.storage.LocalStore(path, read_only=True)
    top = zarr.open(store, mode="r")
    with closing(store):
        yield top


def _from_zarr(path: Path) -> Iterator[LazyArray]:
    with _zarr(path) as top:
        yield from _each(path, _zarr, top.members(max_depth=None) if hasattr(top, "members") else [("", top)])


def _hdf5(path: Path) -> AbstractContextManager[Any]:
    import h5py

    return h5py.File(path, "r")


def _from_hdf5(path: Path) -> Iterator[LazyArray]:
    with _hdf5(path) as file:
        names: list[str] = []
        file.visit(names.append)
        yield from _each(path, _hdf5, ((name, file[name]) for name in names))


@contextmanager
def _netcdf(path: Path) -> Iterator[Any]:
    import xarray

    with xarray.open_dataset(path, engine="h5netcdf", decode_times=False, cache=False) as dataset:
        yield dataset.variables


def _from_netcdf(path: Path) -> Iterator[LazyArray]:
    with _netcdf(path) as variables:
        yield from _each(path, _netcdf, variables.items())


def _each(path: Path, opening: _Opening, nodes: Iterable[tuple[str, Any]]) -> Iterator[LazyArray]:
    """The arrays among the nodes of a file, which may also be groups."""
    for name, node in nodes:
        if hasattr(node, "shape"):
            fetch = partial(_fetch, opening, path, name)
            yield LazyArray(path, name, tuple(node.shape or ()), np.dtype(node.dtype), fetch)


def _fetch(opening: _Opening, path: Path, name: str, runs: np.ndarray, ranges: tuple[slice, ...]) -> np.ndarray:
    """Read each run once, in the order of the file, so that no chunk is decoded twice; then order them as asked."""
    each, place = np.unique(runs, return_inverse=True)
    first, last = int(each[0]), int(each[-1])
    where = slice(first, last + 1) if last - first + 1 == len(each) else each
    with opening(path) as file:
        values = np.asarray((file[name] if name else file)[(where, *ranges)])
    if np.array_equal(each, runs):
        return values if values.flags.owndata else values.copy()  # nothing may hold on to a mapped file
    return values[place]


def _from_tensors(path: Path) -> Iterator[LazyArray]:
    with map_tensors(path) as content:
        for name, tensor in (content if isinstance(content, dict) else {"": content}).items():
            dtype, refusal = np.dtype(object), ""
            try:
                dtype = tensor.numpy().dtype
            except (TypeError, RuntimeError):
                refusal = (
                    f"is a tensor of {tensor.dtype}, {tensor.layout}: NumPy has no such; save its .to_dense().float()"
                )
            yield LazyArray(path, name, tuple(tensor.shape), dtype, partial(_fetch, map_tensors, path, name), refusal)


# pickles


def _from_pickle(path: Path) -> Iterator[LazyArray]:
    array = read_pickled_array(path)
    yield LazyArray(path, "", array.shape, array.dtype, lambda runs, ranges: array[(runs, *ranges)])


_FORMATS: dict[str, Callable[[Path], Iterator[LazyArray]]] = {
    ".npy": _from_npy,
    ".npz": _from_npz,
    ".zarr": _from_zarr,
    ".zarr.zip": _from_zarr,
    ".h5": _from_hdf5,
    ".hdf5": _from_hdf5,
    ".nc": _from_netcdf,
    ".pt": _from_tensors,
    ".pkl": _from_pickle,
    ".pickle": _from_pickle,
    ".pic": _from_pickle,
}
