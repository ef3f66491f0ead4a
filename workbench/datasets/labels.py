"""Label files of clips: Something-Something v2's JSON lists with their official split, and CSV tables."""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.datasets.frames import DataError, no_collection
from workbench.datasets.splits import SPLITS

_WORDS = {"train": "train", "validation": "val", "test": "test"}
UNLISTED = -1
TEXT_COLUMNS = ("clip", "action")


@no_collection()
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
    files = {path: split for path in sorted(folder.glob("*.json")) if (split := _split_of(path))}
    if not files:
        problem = "no file named …train.json, …validation.json or …test.json" if folder.is_dir() else "no such folder"
        raise DataError(f"labels={str(folder)!r}: {problem}; give the folder of the label files, or leave it empty")
    position = {name: i for i, name in enumerate(clips)}
    split = np.full(len(clips), UNLISTED, np.int8)
    tables = []
    for path, name in files.items():
        table = _read_list(path)
        rows = np.array([position.get(clip, -1) for clip in table.index.tolist()], int)
        absent = table.index[rows < 0].tolist()
        if absent:
            raise DataError(
                f"{path} names {len(absent)} of {len(table)} clips that are absent from the data, such as "
                f"{', '.join(absent[:3])}: add the clips or remove the entries"
            )
        twice = np.flatnonzero(split[rows] != UNLISTED)
        if len(twice):
            raise DataError(f"{path}: clip {table.index[twice[0]]!r} is listed in another label file too; keep one")
        split[rows] = SPLITS.index(name)
        tables.append(table)
    return pd.concat(tables), split


def _split_of(path: Path) -> str | None:
    """The split a file's name ends with, as a word of its own: not that of `latest.json`."""
    word = re.search(rf"(?<![a-z])({'|'.join(_WORDS)})$", path.stem.lower())
    return _WORDS[word[1]] if word else None


def _read_list(path: Path) -> pd.DataFrame:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        ids = [str(entry["id"]) for entry in entries]
        columns = {key: [entry.get(key, "") for entry in entries] for key in ("label", "template", "placeholders")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: must be a JSON list of objects with an 'id' ({error!r}); correct it") from None
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: clip {Counter(ids).most_common(1)[0][0]!r} is listed twice; keep one")
    columns["template"] = pd.Categorical(columns["template"])
    return pd.DataFrame(columns, index=pd.Index(ids, name="clip"))


def read_actions(path: Path, clips: list[str]) -> pd.DataFrame:
    """Read `actions.csv`: one row per clip with an `action` and any further columns, indexed by clip.

    Raises:
        DataError: not a table; a missing or a forbidden column; a clip with no row, or with two.
    """
    table = _read_csv(path, ("clip", "action"))
    if "frame" in table:
        raise DataError(f"{path}: column 'frame' is not of a clip; what changes by frame belongs in conditions.csv")
    if table["clip"].duplicated().any():
        raise DataError(f"{path}: clip {table['clip'][table['clip'].duplicated()].iloc[0]!r} has two rows; keep one")
    table = table.set_index("clip")
    absent = [clip for clip in clips if clip not in table.index]
    if absent:
        raise DataError(f"{path}: no row for clip {absent[0]!r}{_and_more(len(absent))}; add it, or remove the file")
    return table


def read_conditions(path: Path, clips: list[str], clip: np.ndarray, number: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Read `conditions.csv` and look up the row of every frame asked for.

    Args:
        path: CSV with the columns clip, frame (the number in the frame's name; in a video, counted from 0) and
            numeric ones.
        clips: Name of every clip.
        clip: Position in `clips` of each frame's clip.
        number: Number of each frame.

    Returns:
        Names of the numeric columns, and their values, float32 (frames, columns).

    Raises:
        DataError: a missing or non-numeric column, a value that is not finite, a repeated or an absent row.
    """
    table = _read_csv(path, ("clip", "frame"))
    columns = [name for name in table.columns if name not in ("clip", "frame")]
    _check_columns(path, table, columns)
    values = table[columns].to_numpy(np.float32)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            f"{path}: {columns[column]}={values[row, column]} of {_row(table, row)} is not finite"
            f"{_and_more(len(bad))}; mend or remove it"
        )
    twice = np.flatnonzero(table.duplicated(["clip", "frame"])).tolist()
    if twice:
        raise DataError(f"{path}: {_row(table, twice[0])} has two rows; keep one")
    of_clip = pd.Index(clips).get_indexer(table["clip"])
    present = np.flatnonzero(of_clip >= 0)
    index = pd.MultiIndex.from_arrays([of_clip[present], table["frame"].to_numpy()[present]])
    rows = index.get_indexer(pd.MultiIndex.from_arrays([clip, number]))
    absent = np.flatnonzero(rows < 0)
    if len(absent):
        first = f"clip {clips[clip[absent[0]]]!r}, frame {number[absent[0]]}"
        raise DataError(f"{path}: no row for {first}{_and_more(len(absent))}; add it, or remove the file")
    return columns, values[present[rows]]


def _check_columns(path: Path, table: pd.DataFrame, columns: list[str]) -> None:
    if not pd.api.types.is_integer_dtype(table["frame"]):
        raise DataError(f"{path}: column 'frame' must hold whole numbers, the number in each frame's name; correct it")
    if not columns:
        raise DataError(f"{path}: has no column besides 'clip' and 'frame'; add the conditions, or remove the file")
    text = [name for name in columns if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise DataError(f"{path}: column {text[0]!r} is not numeric; conditions are numbers: encode or remove it")


def _read_csv(path: Path, needed: tuple[str, str]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = pd.read_csv(path, index_col=False, nrows=0)
            blank = {name: ["", "nan", "NaN", "NA"] for name in header if name not in TEXT_COLUMNS}
            text = dict.fromkeys(TEXT_COLUMNS, str)  # a clip may be called NA or 007
            table = pd.read_csv(path, index_col=False, dtype=text, na_values=blank, keep_default_na=False)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path}: is not a table of comma-separated values ({error}); correct it") from None
    if not set(needed) <= set(table.columns):
        raise DataError(f"{path}: has columns {', '.join(table.columns)}; needs {needed[0]!r} and {needed[1]!r}")
    return table


def _row(table: pd.DataFrame, row: int) -> str:
    return f"clip {table['clip'].iloc[row]!r}, frame {table['frame'].iloc[row]}"


def _and_more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""
