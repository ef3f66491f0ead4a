"""Label files of clips: Something-Something v2's JSON lists with their official split, and CSV tables."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.datasets.frames import DataError
from workbench.datasets.splits import SPLITS

_WORDS = {"train": "train", "validation": "val", "test": "test"}
UNLISTED = -1


def read_labels(folder: Path, clips: list[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the JSON label files of Something-Something v2 and the split they define.

    Args:
        folder: Holds `…train.json`, `…validation.json`, `…test.json` (any subset): lists of objects with `id`
            and, except for the test list, `label`, `template` and `placeholders`.
        clips: Names of the clips present.

    Returns:
        A table indexed by clip (label, template, placeholders), and for each of `clips` its split's number in
        `SPLITS`, or -1 for a clip in no list.

    Raises:
        DataError: no label file; a file of another form; a clip that is absent, or in two lists.

    Source: Goyal et al. 2017, Something-Something v2, label files as released.
    """
    files = {p: split for p in sorted(folder.glob("*.json")) for word, split in _WORDS.items() if word in p.stem}
    if not files:
        raise DataError(f"labels={str(folder)!r}: no file named …train.json, …validation.json or …test.json")
    position = {name: i for i, name in enumerate(clips)}
    split = np.full(len(clips), UNLISTED, np.int8)
    tables = []
    for path, name in files.items():
        table = _read_list(path)
        absent = [clip for clip in table.index if clip not in position]
        if absent:
            raise DataError(
                f"{path} names {len(absent)} of {len(table)} clips that are absent from the data, such as "
                f"{', '.join(absent[:3])}: add the clips or remove the entries"
            )
        rows = np.array([position[clip] for clip in table.index], int)
        twice = np.flatnonzero(split[rows] != UNLISTED)
        if len(twice):
            raise DataError(f"{path}: clip {table.index[twice[0]]!r} is listed in another label file too; keep one")
        split[rows] = SPLITS.index(name)
        tables.append(table)
    return pd.concat(tables), split


def _read_list(path: Path) -> pd.DataFrame:
    try:
        entries = json.loads(path.read_text())
        ids = [str(entry["id"]) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: must be a JSON list of objects with an 'id' ({error!r})") from None
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: clip {next(i for i in ids if ids.count(i) > 1)!r} is listed twice; keep one")
    columns = {key: [entry.get(key, "") for entry in entries] for key in ("label", "template", "placeholders")}
    columns["template"] = pd.Categorical(columns["template"])
    return pd.DataFrame(columns, index=pd.Index(ids, name="clip"))


def read_actions(path: Path) -> pd.DataFrame:
    """Read `actions.csv`: one row per clip with an `action` and any further columns, indexed by clip."""
    table = pd.read_csv(path, dtype={"clip": str})
    if "clip" not in table or "action" not in table:
        raise DataError(f"{path}: has columns {', '.join(table.columns)}; needs 'clip' and 'action'")
    return table.set_index("clip")


def read_conditions(path: Path, clip: np.ndarray, number: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Read `conditions.csv` and look up the row of every frame asked for.

    Args:
        path: CSV with the columns clip, frame (the number in the frame's name) and numeric ones.
        clip: Name of each frame's clip.
        number: Number of each frame.

    Returns:
        Names of the numeric columns, and their values, float32 (frames, columns).

    Raises:
        DataError: a missing or non-numeric column, a value that is not finite, a repeated or an absent row.
    """
    table = pd.read_csv(path, dtype={"clip": str})
    if not {"clip", "frame"} <= set(table.columns):
        raise DataError(f"{path}: has columns {', '.join(table.columns)}; needs 'clip' and 'frame'")
    columns = [name for name in table.columns if name not in ("clip", "frame")]
    text = [name for name in columns if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise DataError(f"{path}: column {text[0]!r} is not numeric; conditions are numbers: encode or remove it")
    table = table.set_index(["clip", "frame"])
    if not table.index.is_unique:
        raise DataError(f"{path}: {table.index[table.index.duplicated()][0]} (clip, frame) has two rows; keep one")
    rows = table.index.get_indexer(pd.MultiIndex.from_arrays([clip, number]))
    if (rows < 0).any():
        first = int(np.argmax(rows < 0))
        raise DataError(
            f"{path}: no row for clip {clip[first]!r}, frame {number[first]}, and {(rows < 0).sum() - 1} more"
        )
    values = table[columns].to_numpy(np.float32)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{path}: {columns[bad[0, 1]]!r} of {table.index[bad[0, 0]]} is not finite; {len(bad)} in all")
    return columns, values[rows]
