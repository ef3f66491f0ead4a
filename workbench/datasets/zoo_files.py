"""Files of a zoo of trained networks: state dicts and their properties, read without running anything they name."""

import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workbench.datasets.frames import DataError
from workbench.datasets.zoo_properties import TABLES, Properties, check_properties

SUFFIXES = (".pt", ".safetensors")
LISTED = 20  # names of a refused file in a message
DAMAGE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
DAMAGE += (ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file raises, beside `pickle.UnpicklingError`."""
_PLAIN = re.compile(
    r"collections\.OrderedDict|torch\.(_utils|storage)\.\w+|torch\.(\w+Storage|Size|device|bool|[a-z]+[0-9]\w*)"
    r"|torch\.nn\.parameter\.Parameter"
)
"""What files of nothing but tensors name."""
_PICKLES = 4  # in a file of PyTorch before 1.6, up to the one that holds the content


class ZooFiles(NamedTuple):
    """The files of a zoo."""

    root: Path
    """The folder that holds them."""
    networks: list[str]
    """Paths within it of the files of networks, with slashes, sorted."""
    table: str
    """Name of the table of properties beside them; empty where there is none."""
    stamps: list[tuple[str, int, int]]
    """Path, size [bytes] and modification time [ns] of each of them."""
    others: int
    """Files that are neither, and left out."""


class Entry(NamedTuple):
    """One network of a file."""

    place: str
    """Where it is, for messages."""
    default_id: str
    properties: Properties
    state: Mapping[Any, Any]
    """Its state dict, as it stands in the file."""


def list_zoo(folder: Path, key: str = "data") -> ZooFiles:
    """Find the files of networks in `weights/` of a folder, or in the folder itself, and in what folders these hold.

    What begins with a dot is left out.

    Args:
        key: The parameter that the folder comes from, for messages.

    Raises:
        DataError: there is no such folder, it cannot be listed, or has no file of networks; a folder is there twice, by
            a link; two tables of properties, or one that is not beside the networks; a name that is not UTF-8.
    """
    try:
        root = folder / "weights" if (folder / "weights").is_dir() else folder
        there = root.is_dir()
    except OSError as error:
        raise DataError(f"{key}={str(folder)!r}: cannot be opened ({error.strerror}); correct it") from None
    if not there:
        raise DataError(f"{key}={str(folder)!r}: no such folder; correct the path")
    found, others = {}, []
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        if name in TABLES or path.suffix in SUFFIXES:
            found[name] = _stamp(path)
        else:
            others.append(name)
    unreadable = [name for name in sorted(found) if name != name.encode("utf-8", "replace").decode()]
    if unreadable:
        raise DataError(f"{key}={str(folder)!r}: the name {unreadable[0]!r} is not UTF-8; rename it")
    tables, networks = [name for name in TABLES if name in found], sorted(found.keys() - set(TABLES))
    if not networks:
        rest = f"; it holds {len(others)} other files, such as {min(others)!r}" if others else ""
        raise DataError(f"{key}={str(folder)!r}: no file ending in {' or '.join(SUFFIXES)} in {root}{rest}")
    if len(tables) > 1:
        raise DataError(f"{root} holds both {' and '.join(TABLES)}: keep one")
    for name in TABLES if root != folder else ():
        if (folder / name).exists():
            raise DataError(f"{folder / name} is not beside the networks: move it into {root}, or remove it")
    stamps = [(name, *found[name]) for name in sorted(found)]
    return ZooFiles(root, networks, "".join(tables), stamps, len(others))


def _files(root: Path) -> Iterator[Path]:
    """The files in a folder and in those it holds, each of which is seen once."""
    seen: dict[str, str] = {}
    for place, folders, files in os.walk(root, onerror=_refuse_listing, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise DataError(
                f"{place} is the same folder as {seen[real]}: its networks would count twice; remove the link"
            )
        seen[real] = place
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(place, name) for name in files if name[0] != ".")


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend it, or move it away") from None
    return stat.st_size, stat.st_mtime_ns


def _refuse_listing(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); mend it, or move it away") from None


# files of networks


def read_entries(root: Path, name: str, table: Mapping[str, Properties]) -> Iterator[Entry]:
    """The networks of one file, its tensors mapped where the format allows.

    A .pt holds a list of pairs (properties, state dict), or one state dict; a .safetensors holds one state dict, whose
    layers are in the order of their names, as the format keeps no other.

    Args:
        root: Folder of the zoo.
        name: Path within it.
        table: Properties by the file's path within the folder, without its ending, for files of one state dict.

    Raises:
        DataError: the file names more than tensors and plain values, in which case nothing is run; it is incomplete or
            damaged; an entry is no pair; properties are missing, superfluous or not plain.
    """
    path, stem = root / name, name.rpartition(".")[0]
    content = _load_safetensors(path) if name.endswith(".safetensors") else _load_pt(path)
    if isinstance(content, dict):
        if stem not in table:
            tables = " or ".join(str(root / kind) for kind in TABLES)
            raise DataError(f"{path}: is one state dict, and {tables} has no row for {stem!r}; add one")
        yield Entry(str(path), stem, table[stem], _state(content))
        return
    if stem in table:
        raise DataError(f"{path}: is a list with properties of its own, and the table has a row for it; remove the row")
    if not isinstance(content, list | tuple) or not content:
        found = "an empty list" if content in ([], ()) else f"a {type(content).__name__}"
        raise DataError(f"{path}: holds {found}; must be a list of (properties, state dict), or one state dict")
    for position, pair in enumerate(content):
        place = f"{path}, entry {position}"
        properties, state = _pair(place, pair)
        yield Entry(place, f"{stem}/{position}", properties, state)


def _pair(place: str, pair: Any) -> tuple[Properties, Mapping[Any, Any]]:
    parts = [type(part).__name__ for part in pair] if isinstance(pair, list | tuple) else []
    if len(parts) != 2 or not all(isinstance(part, dict) for part in pair):
        found = f"a {type(pair).__name__}" + (f" of {', '.join(parts)}" if parts else "")
        raise DataError(f"{place}: is {found}; must be a pair (properties, state dict), both of them dicts")
    properties = dict(items(pair[0]))
    check_properties(place, properties)
    return properties, _state(pair[1])


def items(content: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Entries of a dict by the method of its class: a file can put an attribute of that name before it."""
    return list((OrderedDict if isinstance(content, OrderedDict) else dict).items(content))


def _state(content: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict with new tensors on the same memory, whose methods are those of their class."""
    return {name: Tensor.detach(part) if isinstance(part, Tensor) else part for name, part in items(content)}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _load_pt(path: Path) -> Any:
    try:
        mapped = check_records(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        names, modules = _named(path)
        if not names:
            raise _unreadable(path, error) from None
        listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        if modules:
            raise DataError(
                f"{path}: refused, as it holds whole pickled modules (it names {listed}), which can run code when they "
                "are loaded; nothing was run; `workbench import-zoo SRC --out DST --classes package.module.Name ...` "
                "writes their state dicts, and admits exactly the classes that you name"
            ) from None
        raise DataError(
            f"{path}: refused, as it names {listed}: a file may hold tensors, text, numbers, and lists and dicts of "
            "them; nothing was run; save state dicts and plain properties with torch.save"
        ) from None
    except DAMAGE as error:
        raise _unreadable(path, error) from None


def check_records(path: Path) -> bool:
    """Whether the tensors of a .pt can be mapped: those of PyTorch before 1.6, or compressed since, cannot.

    Raises:
        ValueError: the bytes of a record are not those that were written, by its CRC-32.
        OSError, zipfile.BadZipFile, zlib.error: the file cannot be read, or is damaged otherwise.
    """
    with path.open("rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.CRC for record in records):  # all are 0 where torch.save was told to write none
            broken = archive.testzip()
            if broken:
                raise ValueError(f"its record {broken!r} has another checksum than was written")
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error.__context__ or error).strip().split("\n")[0] or type(error).__name__).split(". Please")[0]
    return DataError(
        f"{path}: cannot be read ({reason.rstrip('.')}); if it is incomplete or damaged, copy it again, else save "
        "state dicts with torch.save"
    )


def _named(path: Path) -> tuple[list[str], bool]:
    """What the pickles of a file name, beyond what tensors need, and whether they hold the parts of a module.

    The pickles are taken apart by `pickletools`, which runs none of them.
    """
    found: dict[str, bool] = {}
    modules = False
    try:
        with path.open("rb") as handle:
            if zipfile.is_zipfile(handle):
                with zipfile.ZipFile(handle) as archive:
                    member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    modules = _take_apart(archive.read(member), found)
            else:
                handle.seek(0)
                for _ in range(_PICKLES):
                    modules |= _take_apart(handle, found)
    except (*DAMAGE, StopIteration):
        pass  # damaged: what was found so far is told
    names = [name for name in found if not _PLAIN.fullmatch(name)]
    return names, modules


def _take_apart(data: Any, found: dict[str, bool]) -> bool:
    """Add the names in a pickle to `found`; whether it has a text `_parameters`, as the state of a module does."""
    texts, memo, top, modules = [], [], None, False
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST"):
            found[argument.replace(" ", ".")] = True
        elif code.name == "STACK_GLOBAL":
            found[".".join(texts[-2:])] = True
        if code.name == "MEMOIZE":
            memo.append(top)
            continue
        top = argument if isinstance(argument, str) else None
        if code.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
            top = memo[argument]
        if top is not None:
            texts.append(top)
            modules |= top == "_parameters"
    return modules
