"""Zoos of whole pickled modules, turned into zoos of state dicts: `workbench import-zoo`.

Building a module from a pickle runs the code of its class, so that only classes whose names the user types are built.
"""

import importlib
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from workbench.datasets.frames import DataError
from workbench.datasets.zoo_properties import Properties, check_properties

_DAMAGE = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)


def import_zoo(source: Path, out: Path, classes: Sequence[str]) -> list[str]:
    """Write the state dict of every module in the .pt files of a folder, file by file, as notebook 01 reads them.

    A file holds a list whose entries are modules, or pairs of properties and a module, in any order.

    Args:
        source: Folder of .pt files; those in `weights/` where it has one.
        out: A new folder; the files go to its `weights/`.
        classes: Modules that may be built, as `package.module.Name`: those of the networks, and of the layers in them.

    Returns:
        Lines on what was written.

    Raises:
        DataError: no such folder or no file in it; `out` is there already; a class cannot be imported or is no module;
            a file needs other classes (named), is damaged, or holds something else. Nothing is written then.
    """
    folder = source / "weights" if (source / "weights").is_dir() else source
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise DataError(f"{folder}: no .pt file there; give the folder of the zoo")
    if out.exists():
        raise DataError(f"--out {out}: is there already, and nothing is overwritten; name a new folder")
    admitted = [_named(name) for name in classes]
    networks = {path.name: _read(path, admitted) for path in files}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        weights = Path(unfinished) / "zoo" / "weights"
        weights.mkdir(parents=True)
        for name, entries in networks.items():
            torch.save(entries, weights / name)
        weights.parent.rename(out)
    return [f"{name}: {len(entries)} networks" for name, entries in networks.items()]


def _named(name: str) -> type[nn.Module]:
    """The class of that name, which is imported."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"--classes {name}: cannot be imported ({error}); correct it, or add its folder to PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise DataError(f"--classes {name}: must be package.module.Name of a class derived from torch.nn.Module")
    return found


def _read(path: Path, admitted: Sequence[type[nn.Module]]) -> list[tuple[Properties, dict[str, Tensor]]]:
    """Properties and state dict of each network of a file."""
    try:
        with safe_globals(list(admitted)):
            needed = get_unsafe_globals_in_checkpoint(path)
            if needed:
                raise DataError(
                    f"{path}: names {', '.join(sorted(needed))}, which --classes does not; nothing was run; add those "
                    "you trust, or leave the file out"
                )
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except _DAMAGE as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DataError(
            f"{path}: cannot be read ({reason}); copy it again, or save it with torch 1.6 or later"
        ) from error
    if not isinstance(content, list | tuple) or not content:
        raise DataError(f"{path}: holds a {type(content).__name__}; must be a list of modules, not empty")
    return [_entry(f"{path}, entry {position}", entry) for position, entry in enumerate(content)]


def _entry(place: str, entry: Any) -> tuple[Properties, dict[str, Tensor]]:
    parts = list(entry) if isinstance(entry, list | tuple) else [entry]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    properties = [part for part in parts if isinstance(part, Mapping)]
    if len(modules) != 1 or len(modules) + len(properties) != len(parts) or len(properties) > 1:
        found = ", ".join(type(part).__name__ for part in parts)
        raise DataError(f"{place}: holds {found}; must be a module, or a module and a dict of its properties")
    own = dict(properties[0]) if properties else {}
    check_properties(place, own)
    state = nn.Module.state_dict(modules[0])  # not a method of that name that the file may have put in its place
    return own, {name: tensor.detach().clone() for name, tensor in state.items()}
