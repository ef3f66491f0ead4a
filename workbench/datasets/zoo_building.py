"""Building the cache of a zoo: every network read once, checked against the others, and written flat."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.datasets.cache import write_atomic
from workbench.datasets.flat_weights import Architecture, LayerInfo, flatten
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_files import Entry, ZooFiles, list_zoo, read_entries
from workbench.datasets.zoo_properties import NAMED, Properties, as_column, read_table
from workbench.progress import Progress

VERSION = 2  # raise it when the same files give another cache
OWN = ("id", "run", "architecture")
"""Properties that every network has, given or derived."""


def build(source: Path, files: ZooFiles, folder: Path) -> None:
    """Write the cache of a zoo into a new folder, which gets its name when it is complete.

    Raises:
        DataError: anything about the files that cannot be used as it is; they change meanwhile; the disk is full.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        table = read_table(files.root / files.table, files.networks) if files.table else {}
        with Build(partial) as cache, Progress(len(files.networks), "reading the networks", "file") as progress:
            for name in files.networks:
                for entry in read_entries(files.root, name, table):
                    cache.add(name, entry)
                progress.update()
            cache.finish(files.others)
        if list_zoo(source) != files:
            raise DataError(f"files in {files.root} changed while they were read; begin again when they are complete")
        os.replace(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "make room, or set cache_dir to a larger disk"
        raise DataError(f"the disk of {folder.parent} is full ({error.strerror}): {remedy}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Known(NamedTuple):
    """An architecture, what its tensors are, and the first network that has it."""

    architecture: Architecture
    tensors: dict[str, str]
    place: str


class Build:
    """Networks as they come, checked against those before them and written behind these; a context manager.

    Args:
        folder: Where the files of the cache are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: list[_Known] = []
        self.position: dict[Any, int] = {}  # in `known`, by the architecture's name or by its tensors
        self.columns: dict[str, list] = {name: [] for name in ("file", "id", "run", "architecture", "crc")}
        self.properties: list[Properties] = []
        self.places: dict[str, str] = {}
        self.dtype, self.file, self.of_file = "", "", -1
        self.broken: list[str] = []

    def __enter__(self) -> "Build":
        self.weights, self.aside = ((self.folder / name).open("wb") for name in ("weights.bin", "aside.bin"))
        return self

    def __exit__(self, *error: object) -> None:
        self.weights.close()
        self.aside.close()

    def add(self, file: str, entry: Entry) -> None:
        """Check one network and write it.

        Raises:
            DataError: it does not go with the networks before it.
        """
        self._check_names(entry)
        try:
            with torch.no_grad():
                flat, layers, aside = flatten(entry.state)
        except DataError as error:
            raise DataError(f"{entry.place}: {error}") from None
        self._check_dtype(entry, layers)
        number = self._number(file, entry, layers, aside)
        architecture = self.known[number].architecture
        if layers != architecture.layers:  # in another order
            flat = flatten({layer.name: entry.state[layer.name] for layer in architecture.layers})[0]
        name = self._add_id(entry)
        self._check_finite(name, entry, flat, architecture.layers)
        weights = flat.detach().to(torch.float64 if self.dtype == "float64" else torch.float32).numpy()
        others = b"".join(aside[layer.name].contiguous().numpy().tobytes() for layer in architecture.aside)
        self.weights.write(weights)
        self.aside.write(others)
        run = str(entry.properties.get("run", name))
        row = (file, name, run, number, zlib.crc32(others, zlib.crc32(weights)))
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.properties.append(entry.properties)

    def _check_names(self, entry: Entry) -> None:
        """Every network has the properties that the first one has."""
        first = self.properties[0] if self.properties else entry.properties
        differing = sorted(first.keys() ^ entry.properties.keys())
        if differing:
            here, there = entry.place, next(iter(self.places.values()))
            lacking, having = (here, there) if differing[0] in first else (there, here)
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise DataError(
                f"property {differing[0]!r}{more} is absent in {lacking} and given in {having}: all networks must have "
                "the same properties; add it to all, or remove it"
            )

    def _check_dtype(self, entry: Entry, layers: tuple[LayerInfo, ...]) -> None:
        self.dtype = self.dtype or layers[0].dtype
        if layers[0].dtype != self.dtype:
            raise DataError(
                f"the networks differ in dtype: {self.known[0].place} is in {self.dtype}, {entry.place} in "
                f"{layers[0].dtype}; convert all to one"
            )

    def _add_id(self, entry: Entry) -> str:
        name = str(entry.properties.get("id", entry.default_id))
        if name in self.places:
            raise DataError(
                f"two networks have the id {name!r}: {self.places[name]} and {entry.place}; ids must be unique, rename "
                "or remove one"
            )
        self.places[name] = entry.place
        return name

    def _number(self, file: str, entry: Entry, layers: tuple[LayerInfo, ...], aside: Mapping[str, Tensor]) -> int:
        """Position of a network's architecture, which is new, or whose layers must be those of the network."""
        tensors = {layer.name: f"{layer.dtype} {list(layer.shape)}" for layer in layers}
        tensors |= {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in aside.items()}
        name = entry.properties.get("architecture")
        key = frozenset(tensors.items()) if name is None else str(name)
        number = self.position.get(key)
        if name is None:
            number = self.of_file if file == self.file else number
        if number is None:
            number = self.position[key] = len(self.known)
            title = self._title(layers) if name is None else str(name)
            self.known.append(_Known(Architecture(title, layers, _aside_layers(aside)), tensors, entry.place))
        self.file, self.of_file = file, number
        known = self.known[number]
        if tensors != known.tensors:
            rule = (
                "networks of one file must have the same layers: give the entries the property 'architecture', or put "
                "them into files of their own"
                if name is None
                else f"networks of the architecture {str(name)!r} must have the same layers: correct the property"
            )
            raise DataError(f"{entry.place} {_difference(tensors, known.tensors)}, other than {known.place}; {rule}")
        return number

    def _title(self, layers: tuple[LayerInfo, ...]) -> str:
        """A name for an architecture that has none: its size, numbered where several have it."""
        title = f"{sum(layer.size for layer in layers)} weights"
        same = sum(known.architecture.name.startswith(title) for known in self.known)
        return f"{title} ({same + 1})" if same else title

    def _check_finite(self, name: str, entry: Entry, flat: Tensor, layers: tuple[LayerInfo, ...]) -> None:
        finite = flat.float().isfinite()
        if finite.all():
            return
        counts = {layer.name: int((~finite[layer.offset : layer.offset + layer.size]).sum()) for layer in layers}
        first = next(layer for layer, count in counts.items() if count)
        self.broken.append(f"{name!r} ({entry.place}) in layer {first!r} ({sum(counts.values())} values in all)")

    def finish(self, others: int) -> None:
        """Write what is known of all networks.

        Raises:
            DataError: networks whose weights are not finite; a property of several kinds.
        """
        if self.broken:
            raise DataError(
                f"the weights of {len(self.broken)} of {len(self.properties)} networks are not finite in float32: "
                f"{'; '.join(self.broken[:NAMED])}; remove these networks: nothing is put in their place"
            )
        given = list(self.properties[0])
        properties = {
            name: as_column(name, [row[name] for row in self.properties], self.columns["id"])
            for name in given
            if name not in OWN
        }
        meta = {"dtype": self.dtype, "given": given, "others": others, "properties": properties}
        meta |= {"architectures": [asdict(known.architecture) for known in self.known], "columns": self.columns}
        for handle in (self.weights, self.aside):
            handle.flush()
            os.fsync(handle.fileno())  # before the folder gets its name
        write_atomic(self.folder / "zoo.json", lambda handle: handle.write(json.dumps(meta).encode()))


def _aside_layers(aside: Mapping[str, Tensor]) -> tuple[LayerInfo, ...]:
    layers, offset = [], 0
    for name, tensor in aside.items():
        layers.append(LayerInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset))
        offset += tensor.nbytes
    return tuple(layers)


def _difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """How the tensors of a network differ from those expected."""
    parts = [
        f"{verb} {', '.join(map(repr, names[:NAMED]))}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
        for verb, names in (
            ("lacks the layers", [name for name in expected if name not in found]),
            ("has the extra layers", [name for name in found if name not in expected]),
        )
        if names
    ]
    both = [name for name in expected if name in found and found[name] != expected[name]]
    parts += [f"has {name!r} of {found[name]} where others have {expected[name]}" for name in both[:1]]
    return " and ".join(parts)
