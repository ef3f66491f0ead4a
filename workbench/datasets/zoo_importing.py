"""Zoos of whole pickled modules, turned into zoos of state dicts: `workbench import-zoo`.

Building a module from a pickle runs the code of its class, so that only classes whose names the user types are built.
"""

import importlib
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from workbench.datasets.cache import make_folder
from workbench.datasets.flat_weights import check_entry
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_files import DAMAGE, check_records, items, list_zoo
from workbench.datasets.zoo_properties import Properties, check_properties

OWN_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""Methods by which a class makes its state dict another than its parameters and buffers."""
HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")


def import_zoo(source: Path, out: Path, classes: Sequence[str]) -> list[str]:
    """Write the state dict of every module in the .pt files of a zoo, file by file, as notebook 01 reads them.

    A file holds a module, or a list whose entries are modules, or pairs of properties and a module, in any order.

    Args:
        source: Folder of .pt files, or the one that holds it as `weights/`; see `zoo_files.list_zoo`.
        out: A new folder; the files go to its `weights/`.
        classes: Modules that may be built, as `package.module.Name`: those of the networks, and of the layers in them.
            `name=package.module.Name` where the files call a class otherwise, such as `__main__.Net`.

    Returns:
        Lines on what was written, and what was left out.

    Raises:
        DataError: no such folder or no file in it; `out` is there already, or cannot be written; a class cannot be
            imported or is no module; a file needs other classes (named), is damaged, or holds something else. There
            is no `out` then.
    """
    files = list_zoo(source, "SRC")
    names = [name for name in files.networks if name.endswith(".pt")]
    others = [name for name in (*files.networks, files.table) if name and name not in names]
    if not names:
        raise DataError(f"{files.root}: no .pt file there; give the folder of the zoo")
    admitted = _admitted(classes)
    _make_parent(out)
    lines = []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:40]}.") as unfinished:
        weights = Path(unfinished) / "zoo" / "weights"
        for name in names:
            entries = _read(files.root / name, admitted)
            _write(entries, weights / name, out)
            lines.append(f"{name}: {len(entries)} network{'s' * (len(entries) != 1)}")
        try:
            weights.parent.rename(out)
        except OSError as error:
            raise DataError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    return lines + ([f"left out, as they hold no modules: {', '.join(others)}"] if others else [])


def _make_parent(out: Path) -> None:
    try:
        there = out.exists() or out.is_symlink()
    except OSError as error:
        raise DataError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    if there:
        raise DataError(f"--out {out}: is there already, and nothing is overwritten; name a new folder")
    make_folder(out.parent, "--out")


def _write(entries: list[tuple[Properties, dict[str, Tensor]]], path: Path, out: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(entries, path)
    except (OSError, RuntimeError) as error:  # torch.save tells a full disk as RuntimeError
        reason = str(error).split("\n")[0]
        raise DataError(f"--out {out}: cannot be written ({reason}); make room, or name another folder") from None


# classes


def _admitted(classes: Sequence[str]) -> list[Any]:
    """What `safe_globals` is given: each class under the name that files have for it.

    Files name a class within a class as `getattr` of the outer one; what is put in the place of both knows the names
    of the admitted classes, and nothing else.
    """
    parts: dict[str, Any] = {}
    for text in classes:
        name, equals, path = text.partition("=")
        found = _class(path if equals else name, text)
        name = name if equals else f"{found.__module__}.{found.__qualname__}"
        steps = name.split(".") if equals or "." in found.__qualname__ else []
        outer = (".".join(steps[:end]) for end in range(2, len(steps)))
        parts = {step: step for step in outer} | parts | {name: found}
    names = {id(part): name for name, part in parts.items()}

    def within(outer: Any, attribute: str) -> Any:
        name = f"{outer if isinstance(outer, str) else names.get(id(outer))}.{attribute}"
        if name not in parts:
            raise LookupError(f"names {name}, which --classes does not")
        return parts[name]

    nested = [(within, "builtins.getattr")] if any(isinstance(part, str) for part in parts.values()) else []
    return [(part, name) for name, part in parts.items()] + nested


def _class(path: str, text: str) -> type[nn.Module]:
    """The class of that name, perhaps within classes; its module is imported."""
    names = path.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        raise DataError(f"--classes {text}: must be package.module.Name of a class derived from torch.nn.Module")
    try:
        found = _import(names)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"--classes {text}: cannot be imported ({error}); correct it, or add its folder to PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise DataError(f"--classes {text}: must be package.module.Name of a class derived from torch.nn.Module")
    return found


def _import(names: Sequence[str]) -> Any:
    """What has this dotted name, in the longest part of it that is a module."""
    for end in range(len(names) - 1, 0, -1):
        module = ".".join(names[:end])
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:  # of this name, or of one that the module needs
            if end == 1 or not f"{module}.".startswith(f"{error.name}."):
                raise
    for name in names[end:]:
        found = getattr(found, name)
    return found


# files


def _read(path: Path, admitted: Sequence[Any]) -> list[tuple[Properties, dict[str, Tensor]]]:
    """Properties and state dict of each network of a file."""
    try:
        check_records(path)
        with safe_globals(list(admitted)):
            needed = get_unsafe_globals_in_checkpoint(path)
            if needed:
                within = "; package.module.Outer.Inner names a class within a class" * ("builtins.getattr" in needed)
                raise DataError(
                    f"{path}: names {', '.join(sorted(needed))}, which --classes does not; nothing was run; add those "
                    f"you trust, or leave the file out{within}"
                )
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except (*DAMAGE, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DataError(
            f"{path}: cannot be read ({reason}); copy it again, or save it with torch 1.6 or later"
        ) from error
    if isinstance(content, nn.Module):
        return [_entry(str(path), content)]
    if not isinstance(content, list | tuple) or not content:
        raise DataError(f"{path}: holds a {type(content).__name__}; must be a module, or a list of them, not empty")
    return [_entry(f"{path}, entry {position}", entry) for position, entry in enumerate(content)]


def _entry(place: str, entry: Any) -> tuple[Properties, dict[str, Tensor]]:
    parts = list(entry) if isinstance(entry, list | tuple) else [entry]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    properties = [part for part in parts if isinstance(part, dict)]
    if len(modules) != 1 or len(modules) + len(properties) != len(parts) or len(properties) > 1:
        found = ", ".join(type(part).__name__ for part in parts)
        raise DataError(f"{place}: holds {found}; must be a module, or a module and a dict of its properties")
    own = dict(items(properties[0])) if properties else {}
    check_properties(place, own)
    try:
        state: dict[str, Tensor] = {}
        for name, tensor in read_module(modules[0]):
            own_tensor = Tensor.detach(tensor)  # without the attributes that a file can give it
            check_entry(name, own_tensor)
            if name in state:
                raise DataError(f"entry {name!r} of the state dict is there twice: names must be unique")
            state[name] = own_tensor.clone()
        if not state:
            raise DataError("the module has no parameters; leave it out")
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return own, state


def read_module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `module.state_dict()`, in its order, without a call of a method that a file can replace.

    Raises:
        DataError: a class has a state dict of its own; parameters, buffers or parts are not what modules have; a
            module is a part of itself.
    """
    pending: list[tuple[str, Any, tuple[int, ...]]] = [("", module, ())]
    while pending:
        prefix, part, outer = pending.pop()
        place = f"module {prefix[:-1]!r}" if prefix else "the module"
        if id(part) in outer:
            raise DataError(f"{place} is a part of itself, so that its state dict has no end; leave the network out")
        own = [name for name in OWN_STATE if getattr(type(part), name) is not getattr(nn.Module, name)]
        if own or any(_table(place, part, name, object) for name in HOOKS):
            found = f"{type(part).__name__}.{own[0]}" if own else "hooks"
            raise DataError(
                f"{place} makes its state dict by {found}: it is more than its parameters and buffers; save "
                "module.state_dict() with the program that made it"
            )
        passing = vars(part).get("_non_persistent_buffers_set", set())
        if not isinstance(passing, set):
            raise DataError(f"{place}: its _non_persistent_buffers_set is a {type(passing).__name__}, no set")
        for name, tensor in _table(place, part, "_parameters", Tensor):
            yield prefix + name, tensor
        for name, tensor in _table(place, part, "_buffers", Tensor):
            if not set.__contains__(passing, name):
                yield prefix + name, tensor
        children = _table(place, part, "_modules", nn.Module)
        pending += [(f"{prefix}{name}.", child, (*outer, id(part))) for name, child in reversed(children)]


def _table(place: str, module: nn.Module, attribute: str, kind: type) -> list[tuple[Any, Any]]:
    """Entries of a module's dict of parts by name, without those that are None."""
    table = vars(module).get(attribute, {})
    if not isinstance(table, dict):
        raise DataError(f"{place}: its {attribute} is a {type(table).__name__}, no dict; leave the network out")
    parts = [(name, part) for name, part in items(table) if part is not None]
    for name, part in parts:
        if not isinstance(part, kind) or (kind is not object and not isinstance(name, str)):
            raise DataError(
                f"{place}: {name!r} of its {attribute} is a {type(part).__name__}, no {kind.__name__} with a name; "
                "leave the network out"
            )
    return parts
