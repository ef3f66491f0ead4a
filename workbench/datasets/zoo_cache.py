"""The cache of a zoo: the weights of all networks in one file, read once from the files of the zoo and checked.

A finished cache is a folder that is never written again, but for what is computed from it and kept beside these:

| File | Holds |
|---|---|
| weights.bin | flat weights of the networks, one behind the other: float32, or float64 where the zoo is in float64 |
| aside.bin | bytes of their integer and boolean tensors, likewise |
| zoo.json | dtype and architectures; file, id, run, architecture, CRC-32 and properties of each network |

It is built in a folder ending in .partial, begun again after a kill, and renamed when complete. Networks are read from
their places in the file, which is never mapped, so that no more of it is in memory than was asked for.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt32
from torch import Tensor

from workbench.datasets.cache import locked, make_folder, save_array
from workbench.datasets.flat_weights import Architecture, LayerInfo
from workbench.datasets.frames import DataError
from workbench.datasets.scaling import stamp_name
from workbench.datasets.zoo_building import VERSION, build
from workbench.datasets.zoo_files import list_zoo

SHOWN = 40  # characters of the zoo's name in that of its cache


@dataclass
class Zoo:
    """A finished cache, opened for reading; any number of processes and threads may share it.

    Args:
        folder: Of the cache.
        dtype: Of the weights in the files of the zoo, such as `float32`.
        architectures: What layers networks have.
        architecture: Position of each network's architecture in these.
        crc: CRC-32 of each network's weights and of what is aside.
        table: One row per network: file, id, run, architecture, and its other properties.
        given: Names of the properties that the files hold; `id`, `run` and `architecture` may be derived.
        others: Files in the folder of the zoo that were left out.
    """

    folder: Path
    dtype: str
    architectures: list[Architecture]
    architecture: np.ndarray
    crc: UInt32[np.ndarray, " n"]
    table: pd.DataFrame
    given: list[str]
    others: int

    @classmethod
    def open(cls, folder: Path) -> "Zoo":
        """Open a finished cache without reading its weights.

        Raises:
            DataError: a file of it is absent, unreadable or of the wrong length.
        """
        try:
            meta = json.loads((folder / "zoo.json").read_text())
            architectures = [
                Architecture(row["name"], _layers(row["layers"]), _layers(row["aside"]))
                for row in meta["architectures"]
            ]
            columns = meta["columns"]
            number, crc = np.array(columns.pop("architecture")), np.array(columns.pop("crc"), np.uint32)
            names = np.array([architecture.name for architecture in architectures], object)[number]
            table = pd.DataFrame({**columns, "architecture": names, **meta["properties"]})
            zoo = cls(folder, meta["dtype"], architectures, number, crc, table, meta["given"], meta["others"])
            found = [(folder / name).stat().st_size for name in ("weights.bin", "aside.bin")]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"the cache {folder} is damaged ({error}): delete it to read the zoo again") from None
        expected = [int(zoo._start[-1]) * zoo.stored.itemsize, int(zoo._aside_start[-1])]
        if found != expected:
            raise DataError(f"the files of {folder} have {found} bytes, expected {expected}: delete it to read again")
        return zoo

    @cached_property
    def size(self) -> np.ndarray:
        """Weights of each network."""
        return np.array([architecture.size for architecture in self.architectures])[self.architecture]

    @property
    def stored(self) -> np.dtype:
        """Type of the weights in the cache, which holds those of the files exactly."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @cached_property
    def _start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.size)])

    @cached_property
    def _aside_start(self) -> np.ndarray:
        sizes = np.array([_nbytes(architecture.aside) for architecture in self.architectures])
        return np.concatenate([[0], np.cumsum(sizes[self.architecture])])

    def read(self, networks: Sequence[int] | np.ndarray, width: int) -> Float[np.ndarray, "b d"]:
        """Flat weights of some networks, zeros behind them, in the type that is stored.

        Args:
            networks: Positions in the table, in any order.
            width: At least the longest of them.

        Raises:
            DataError: the cache has been removed or cut short.
        """
        rows = np.zeros((len(networks), width), self.stored)
        with self._opened("weights.bin") as handle:
            for row, network in zip(rows, networks, strict=True):
                part = memoryview(row[: self.size[network]]).cast("B")
                handle.seek(int(self._start[network]) * self.stored.itemsize)
                if handle.readinto(part) != len(part):
                    raise DataError(f"{handle.name} ends within network {network}: delete {self.folder} to read again")
        return rows

    def aside(self, network: int | np.integer) -> dict[str, Tensor]:
        """Integer and boolean tensors of one network.

        Raises:
            DataError: the cache has been removed.
        """
        layers = self.architectures[self.architecture[network]].aside
        with self._opened("aside.bin") as handle:
            handle.seek(int(self._aside_start[network]))
            content = bytearray(handle.read(_nbytes(layers)))
        return {layer.name: _tensor(content, layer) for layer in layers}

    def kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that is computed once from the weights and kept in the cache.

        Args:
            name: Stands for all that it depends on, beside the zoo.

        Raises:
            DataError: its file is damaged.
        """
        path = self.folder / f"{name}.npy"
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    save_array(path, compute())
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it, and it is computed again") from None

    def _opened(self, name: str) -> BufferedReader:
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be opened ({error.strerror}); open the data again") from None


def _layers(rows: list[dict]) -> tuple[LayerInfo, ...]:
    return tuple(LayerInfo(**row | {"shape": tuple(row["shape"])}) for row in rows)


def _nbytes(aside: Sequence[LayerInfo]) -> int:
    return sum(layer.size * np.dtype(layer.dtype).itemsize for layer in aside)


def _tensor(content: bytearray, layer: LayerInfo) -> Tensor:
    return torch.from_numpy(np.ndarray(layer.shape, layer.dtype, content, layer.offset).copy())


def open_zoo(source: Path, cache_dir: Path) -> Zoo:
    """Open the cache of a zoo, reading all its files first where they have none as they are now.

    A zoo of which a file was added, removed or written anew gets another cache; the older one is left where it is.

    Args:
        source: The folder of the zoo; see `zoo_files.list_zoo`.
        cache_dir: Folder of the caches.

    Raises:
        DataError: anything about the files that cannot be used as it is; the cache cannot be written, or lies in the
            folder of the zoo.
    """
    files = list_zoo(source)
    zoo, cache = source.resolve(), cache_dir.resolve()
    if cache.is_relative_to(zoo) or cache.is_relative_to(files.root.resolve()):
        raise DataError(
            f"the cache {str(cache_dir)!r} lies in the folder of the zoo {str(source)!r}, as if it were a part of it; "
            "set cache_dir to a folder elsewhere"
        )
    make_folder(cache_dir, "cache_dir")
    stem = f"{source.name[:SHOWN]}-{stamp_name(VERSION, str(files.root.resolve()), files.stamps)}"
    folder = cache_dir / stem
    if not folder.is_dir():
        with locked(cache_dir / f"{stem}.lock"):
            if not folder.is_dir():
                build(source, files, folder)
    return Zoo.open(folder)
