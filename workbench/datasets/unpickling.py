"""Pickles of one NumPy array, and PyTorch files of tensors: read without running anything that they name.

A pickle is a small program: it names functions and calls them. The unpickler below knows the handful of names that
NumPy's arrays consist of, and puts in the place of each a stand-in of this module that only takes notes, whatever it
is given. The array is built from these notes afterwards, so that not even NumPy's own functions are called with what
a stranger wrote.

Source: the pickle protocols 0 to 5 (PEP 307, PEP 3154, PEP 574); `ndarray.__reduce_ex__` of NumPy 1 and 2.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from workbench.datasets.frames import DataError

_DAMAGE = (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError)
_DAMAGE += (OverflowError, MemoryError)
_SAVE = "save the array alone, with numpy.save"


class _StandIn:
    """A name of NumPy's in a pickle. With `__setstate__` defined, no pickle can set attributes of the class itself."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state where there is none")


class _Bytes(_StandIn):
    """Stands for `_codecs.encode`: protocols 0 to 2 write bytes as text."""

    __slots__ = ()

    def __new__(cls, text: Any, encoding: Any) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes written as {encoding!r}, where arrays have 'latin1'")
        return text.encode("latin1")


class _Dtype(_StandIn):
    """Stands for `numpy.dtype`: a code such as f8, and the order of its bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def build(self) -> np.dtype:
        """The dtype; of records, strings and dates only the kind, which is enough to refuse them."""
        if not re.fullmatch("[a-zA-Z][0-9]+", self.code) or self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"{self.order}{self.code} is no type of number")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array(_StandIn):
    """Stands for `numpy.ndarray`, and holds what the pickle says of it."""

    __slots__ = ("shape", "dtype", "order", "data", "axes")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, fortran, self.data = state
        self.order, self.axes = "F" if fortran else "C", None

    def build(self) -> np.ndarray:
        """The array, on the bytes as they were read; an array of objects stays empty, to be refused by its dtype."""
        if not isinstance(self.dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a dtype")
        dtype = self.dtype.build()
        if dtype.hasobject:
            return np.empty((0, 0), dtype)
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # str: written by Python 2
        array = np.frombuffer(data, dtype)
        if self.order == "K":
            return array.reshape(self.shape).transpose(self.axes)
        return array.reshape(self.shape, order=self.order)


class _Reconstruct(_StandIn):
    """Stands for `numpy.core.multiarray._reconstruct`, which makes the array that is filled afterwards."""

    __slots__ = ()

    def __new__(cls, kind: Any, shape: Any, code: Any) -> _Array:
        return _Array()


class _FromBuffer(_StandIn):
    """Stands for `numpy.core.numeric._frombuffer`: how protocol 5 writes contiguous arrays."""

    __slots__ = ()

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
        array = _Array()
        array.data, array.dtype, array.shape, array.order, array.axes = data, dtype, shape, order, axes
        return array


_STAND_INS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Bytes,
    "numpy.core.multiarray._reconstruct": _Reconstruct,  # NumPy 1
    "numpy._core.multiarray._reconstruct": _Reconstruct,
    "numpy.core.numeric._frombuffer": _FromBuffer,
    "numpy._core.numeric._frombuffer": _FromBuffer,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the stand-ins and no other name."""

    def __init__(self, path: Path, handle: BinaryIO) -> None:
        super().__init__(handle, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> type:
        """The stand-in of a name; called for every name in the pickle, before anything can be done with it."""
        if f"{module}.{name}" not in _STAND_INS:
            raise DataError(
                f"{self._path}: refused, as it names {module}.{name}: a pickle may hold one NumPy array and nothing "
                f"else; nothing was run; {_SAVE}"
            )
        return _STAND_INS[f"{module}.{name}"]


def read_pickled_array(path: Path) -> np.ndarray:
    """The one array of a pickle, read whole; nothing of what the file names is called.

    Returns:
        The array, read-only, of the dtype it was written with; one of Python objects is empty, whatever it held.

    Raises:
        DataError: the pickle names or holds anything but one array, is damaged, or goes on after the array.
    """
    try:
        with path.open("rb") as handle:
            content = _ArrayUnpickler(path, handle).load()
            more = handle.read(1)
        array = content.build() if isinstance(content, _Array) else None
    except DataError:
        raise
    except _DAMAGE as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a pickle of an array ({reason}); {_SAVE}") from error
    if array is None:
        raise DataError(f"{path}: holds a {type(content).__name__.strip('_')}, not one NumPy array; {_SAVE}")
    if more:
        raise DataError(f"{path}: goes on after its first array; a pickle may hold one: {_SAVE}")
    return array


@contextmanager
def map_tensors(path: Path) -> Iterator[torch.Tensor | dict[str, torch.Tensor]]:
    """The tensor of a PyTorch file, or its tensors by name: mapped, not read; their pages are the kernel's to drop.

    Other values in a dict, such as numbers, are left out.

    Raises:
        DataError: the file holds more than tensors and plain values, or neither a tensor nor a dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error.__context__ or error).split("\n")[0].split(". Please")[0]
        raise DataError(
            f"{path}: refused, as it holds more than tensors ({reason}); nothing was run; save the tensor, or a dict "
            "of tensors, with torch.save"
        ) from None
    if isinstance(content, torch.Tensor):
        yield content.detach()
    elif isinstance(content, dict):
        yield {str(name): value.detach() for name, value in content.items() if isinstance(value, torch.Tensor)}
    else:
        raise DataError(f"{path}: holds a {type(content).__name__}, not a tensor or a dict of tensors; save one")
