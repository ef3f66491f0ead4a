"""Embedded data sets on disk: written once, whole or not at all, and never over anything else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_once(
    folder: Path, manifest: dict[str, Any], own: Callable[[str], bool], write: Callable[[Path], None]
) -> Path:
    """Write a generated set, unless the folder holds it already; it gets its name only when complete.

    Args:
        folder: Where the set goes; `<folder>.partial` is used while writing.
        manifest: Generator, version and settings; `write` puts them into `<generator>.json`.
        own: Whether a path within the set is of this writer, so that what a killed one left may be removed.
        write: Writes the set into a folder that is absent.

    Raises:
        FileExistsError: The folder exists and is not this set, or `<folder>.partial` holds foreign files.
    """
    if folder.exists():
        _require_same(folder, manifest)
        return folder
    partial = folder.with_name(folder.name + ".partial")
    _clear(partial, own)
    write(partial)
    os.replace(partial, folder)
    return folder


def _require_same(folder: Path, manifest: dict[str, Any]) -> None:
    remedy, generator = "choose another folder or move this one away", manifest["generator"]
    try:
        found = json.loads((folder / f"{generator}.json").read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("generator") != generator:
        raise FileExistsError(f"{folder}: is no {generator} set (no readable {generator}.json in it): {remedy}")
    differences = [f"{k}={found.get(k)}, asked for {k}={v}" for k, v in manifest.items() if found.get(k) != v]
    if differences:
        raise FileExistsError(f"{folder}: is a {generator} set with {'; '.join(differences)}: {remedy}")


def _clear(partial: Path, own: Callable[[str], bool]) -> None:
    """Remove what a killed run left; refuse what is not from this writer."""
    if not partial.exists():
        return
    names = (path.relative_to(partial).as_posix() for path in partial.rglob("*"))
    foreign = sorted(name for name in names if not own(name))
    if foreign or not partial.is_dir():
        raise FileExistsError(f"{partial}: is no leftover of this writer {foreign[:3]}: move it away")
    shutil.rmtree(partial)
