"""Files of layouts: the images of a folder, their manifest, and one look at every pixel whose result is kept."""

import csv
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import UInt8, UInt32
from PIL import Image

from workbench.datasets.cache import locked, make_folder, write_atomic
from workbench.datasets.frames import DECODE_ERRORS, IMAGE_SUFFIXES, DataError, FrameError
from workbench.datasets.palettes import UNKNOWN, Palette
from workbench.datasets.scaling import stamp_name
from workbench.datasets.splits import SPLITS
from workbench.datasets.threads import usable_cores
from workbench.progress import Progress

VERSION = 1  # raise it when a look at the same images finds something else
CHUNK = 256  # images looked at before their results are written
NAMED = 3  # examples in a message
MOST_OF_A_SCENE = 50  # images on average, where names tell the scenes
BROKEN_COLUMNS = ("image", "colour", "pixels")


class Listing(NamedTuple):
    """The PNG images of a folder and its sub-folders."""

    names: list[str]
    """Paths within the folder, with slashes, sorted."""
    stamps: list[tuple[int, int]]
    """Size [bytes] and modification time [ns] of each."""
    others: int
    """Images that are not PNG."""


def list_images(folder: Path) -> Listing:
    """Find the images of a folder; what begins with a dot is left out.

    Raises:
        DataError: there is no such folder, it cannot be listed, or it has no PNG; a name is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"data={str(folder)!r}: no such folder; correct the path")
    found, others = {}, 0
    for place, folders, files in os.walk(folder, onerror=_refuse_listing, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in (name for name in files if name[0] != "."):
            suffix = os.path.splitext(name)[1].lower()
            if suffix == ".png":
                found[name if inside == "." else f"{inside}/{name}"] = _stamp(os.path.join(place, name))
            elif suffix in IMAGE_SUFFIXES:
                others += 1
    if not found:
        raise DataError(f"data={str(folder)!r}: holds no PNG image, and {others} others; export the plans as PNG")
    names = sorted(found)
    unreadable = [name for name in names if name != name.encode("utf-8", "replace").decode()]
    if unreadable:
        raise DataError(f"data={str(folder)!r}: the name {unreadable[0]!r} is not UTF-8; rename it")
    return Listing(names, [found[name] for name in names], others)


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a file does; zeros for a link to nothing, which then fails to decode."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _refuse_listing(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); mend it, or move it away") from None


def read_manifest(path: Path, names: list[str]) -> pd.DataFrame:
    """Read a manifest: one row per image with `path` and `scene`, perhaps `type`, `label`, `split` and others.

    Args:
        path: CSV with a header. A path in it is relative to the folder of the images, with slashes; `split` is one of
            train, val and test.
        names: The images that are there.

    Returns:
        Its rows, all as text, in the order of `names`.

    Raises:
        DataError: not a table; a missing column or an empty cell; an image with two rows, absent, or without a row; an
            unknown split; a scene in two splits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"manifest {path}: cannot be read ({error.strerror}); correct the path") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path}: is not a table of comma-separated values ({error}); correct it") from None
    _check_columns(path, table)
    twice = table["path"][table["path"].duplicated()].tolist()
    if twice:
        raise DataError(f"{path}: image {twice[0]!r} has two rows{_and_more(twice)}; keep one")
    known, listed = set(names), set(table["path"])
    absent = [name for name in table["path"] if name not in known]
    if absent:
        remedy = "add the files or remove the rows"
        raise DataError(f"{path} names {len(absent)} images that are absent, such as {_some(absent)}: {remedy}")
    missing = [name for name in names if name not in listed]
    if missing:
        remedy = "add rows or move the files away"
        raise DataError(
            f"{path} has no row for {len(missing)} of {len(names)} images, such as {_some(missing)}: {remedy}"
        )
    if "split" in table:
        _check_splits(path, table)
    return table.set_index("path", drop=False).loc[names].reset_index(drop=True)


def _check_columns(path: Path, table: pd.DataFrame) -> None:
    if not {"path", "scene"} <= set(table.columns):
        raise DataError(f"{path}: has columns {', '.join(table.columns)}; needs 'path' and 'scene'")
    if "group" in table:
        raise DataError(f"{path}: column 'group' is the name of the hash of the scene; call it otherwise")
    for column in ("path", "scene", "type", "label", "split"):
        empty = np.flatnonzero(table[column] == "").tolist() if column in table else []
        if empty:
            where = f"row {empty[0] + 2}" if column == "path" else f"image {table['path'].iloc[empty[0]]!r}"
            remedy = "fill it in" if column in ("path", "scene") else "fill it in, or remove the column"
            raise DataError(f"{path}: {column} of {where} is empty{_and_more(empty)}; {remedy}")


def _check_splits(path: Path, table: pd.DataFrame) -> None:
    wrong = table[~table["split"].isin(SPLITS)]
    if len(wrong):
        name, split = wrong.iloc[0][["path", "split"]]
        raise DataError(f"{path}: split of image {name!r} is {split!r}: must be one of {', '.join(SPLITS)}; correct it")
    of_scene = table.groupby("scene", sort=False)["split"].unique()
    parted = of_scene[of_scene.map(len) > 1]
    if len(parted):
        both = " and ".join(parted.iloc[0])
        more = _and_more(parted.index)
        raise DataError(f"{path}: scene {parted.index[0]!r} is in {both}{more}: must be in one split; correct 'split'")


def scenes_by_name(names: list[str]) -> list[str]:
    """The scene of each image where no manifest tells it.

    Where the images lie in several folders, a folder is a scene, with all the folders in it. Else it is the first
    number in the file's name, so that `flat_12.png` and `flat_12_kitchen.png` belong together; an image without a
    number is a scene of its own.

    Raises:
        DataError: scenes so told have more than 50 images on average, as where folders are splits, or names begin with
            a year.
    """
    parents = [name.split("/")[0] if "/" in name else "." for name in names]
    if len(set(parents)) > 1:
        scenes, by = parents, "folder"
    else:
        numbers = (re.search(r"[0-9]+", name.rpartition("/")[2]) for name in names)
        scenes = [name if number is None else number[0] for name, number in zip(names, numbers, strict=True)]
        by = "first number in the name"
    distinct = sorted(set(scenes))
    if len(names) > MOST_OF_A_SCENE * len(distinct):
        raise DataError(
            f"{len(names)} images of only {len(distinct)} scenes, told by the {by} ({', '.join(distinct[:NAMED])}): "
            f"must be at most {MOST_OF_A_SCENE} images to a scene; name the scenes in manifest.csv (path, scene)"
        )
    return scenes


@dataclass(frozen=True)
class Reader:
    """How images become pixels and classes."""

    folder: Path
    palette: Palette
    size: int
    """Side [px]."""
    tolerance: int | float
    """Largest distance from a pixel to the colour of its class, in RGB."""

    def read(self, name: str) -> tuple[UInt8[np.ndarray, "s s 4"], int, dict[tuple[int, int, int], int]]:
        """Decode one image.

        Returns:
            Red, green, blue and class of each pixel; the side of the file's image [px]; unknown colours and how many
            pixels have each.

        Raises:
            FrameError: it does not decode, is not square, or its side is no multiple of `size`; it has an alpha
                channel or more than 8 bits per channel.
        """
        try:
            with Image.open(self.folder / name, formats=("PNG",)) as image:
                self._check(image)
                pixels = np.asarray(image.convert("RGB"))
        except FrameError:
            raise
        except DECODE_ERRORS as error:
            raise FrameError(f"does not decode ({error}); export it again") from None
        step = len(pixels) // self.size
        kept = pixels[step // 2 :: step, step // 2 :: step]
        classes, unknown = self.palette.classify(kept, self.tolerance)
        return np.dstack([kept, classes]), len(pixels), unknown

    def _check(self, image: Image.Image) -> None:
        if "A" in image.getbands() or "transparency" in image.info:
            raise FrameError("has an alpha channel; flatten it on the background")
        if image.mode not in ("RGB", "P", "L", "1") or any(";16B" in str(tile[3]) for tile in image.tile):
            raise FrameError("has more than 8 bits per channel; export it as 8-bit RGB")
        wide, high = image.size
        if wide != high or wide % self.size:
            rule = f"must be square, its side image_size={self.size} or a multiple of that"
            raise FrameError(f"is {wide}x{high} px: {rule}; export it so, or change image_size")


class Scan(NamedTuple):
    """What a look at all images found, in their order."""

    pixels: UInt32[np.ndarray, "n k_plus_1"]
    """Pixels of each class, and last of none."""
    crc: UInt32[np.ndarray, " n"]
    """CRC-32 of what `Reader.read` gives."""
    side: int
    """Side of the images in their files [px]."""
    broken: Path
    """CSV of every unknown colour of each image."""


def scan_images(reader: Reader, listing: Listing, max_unknown_fraction: float, cache_dir: Path) -> Scan:
    """Look at every pixel once; the result is kept in `cache_dir` for as long as files, palette and settings stay.

    Raises:
        DataError: images that cannot be used, or of several sizes; more unknown pixels than allowed.
    """
    make_folder(cache_dir, "cache_dir")
    settings = (VERSION, str(reader.folder), reader.palette.colours.tolist(), reader.size, reader.tolerance)
    stem = f"{reader.folder.name}-{reader.size}px-{stamp_name(settings, listing.names, listing.stamps)}"
    kept, broken = cache_dir / f"{stem}.npz", cache_dir / f"{stem}.csv"
    if not (kept.exists() and broken.exists()):
        with locked(cache_dir / f"{stem}.lock"):
            if not (kept.exists() and broken.exists()):
                _scan(reader, listing.names, max_unknown_fraction, kept, broken)
    with np.load(kept, allow_pickle=False) as file:
        scan = Scan(file["pixels"], file["crc"], int(file["side"]), broken)
    _check_unknown(reader, int(scan.pixels[:, -1].sum()), len(listing.names), max_unknown_fraction, broken)
    return scan


def _scan(reader: Reader, names: list[str], max_unknown: float, kept: Path, broken: Path) -> None:
    classes = len(reader.palette.names)
    pixels, crc = np.zeros((len(names), classes + 1), np.uint32), np.zeros(len(names), np.uint32)
    sides: dict[int, list[str]] = {}
    unusable, unknown_pixels = [], 0
    kept.unlink(missing_ok=True)  # it stands for a whole list beside it
    handle = broken.open("w", newline="", encoding="utf-8")
    with handle, Progress(len(names), "looking at the images", "image") as progress:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(BROKEN_COLUMNS)
        for i, found in enumerate(_look(reader, names)):
            progress.update()
            if isinstance(found, str):
                unusable.append((names[i], found))
                continue
            counts, crc[i], side, unknown = found
            pixels[i] = counts[[*range(classes), UNKNOWN]]
            sides.setdefault(side, []).append(names[i])
            rows.writerows((names[i], "#{:02x}{:02x}{:02x}".format(*colour), n) for colour, n in unknown.items())
            unknown_pixels += int(pixels[i, -1])
            if unknown_pixels > max_unknown * len(names) * reader.size**2:
                break
    _check_unknown(reader, unknown_pixels, len(names), max_unknown, broken)
    if unusable:
        _refuse_unusable(unusable, len(names), broken.with_suffix(".unusable.csv"))
    if len(sides) > 1:
        each = "; ".join(
            f"{len(found)} of {side}x{side} px, such as {found[0]}" for side, found in sorted(sides.items())
        )
        raise DataError(f"data={str(reader.folder)!r} mixes sizes: {each}: must be one; export all images alike")
    write_atomic(kept, lambda file: np.savez(file, pixels=pixels, crc=crc, side=np.array(*sides)))


def _refuse_unusable(unusable: list[tuple[str, str]], images: int, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("image", "reason"), *unusable])
    first = "; ".join(f"{name} {reason}" for name, reason in unusable[:NAMED])
    raise DataError(f"{len(unusable)} of {images} images cannot be used: {first}. All are listed in {path}")


def _look(reader: Reader, names: list[str]) -> Iterator[tuple[np.ndarray, int, int, dict] | str]:
    """Pixels per class, checksum, side and unknown colours of each image, or why it cannot be used."""

    def look(name: str) -> tuple[np.ndarray, int, int, dict] | str:
        try:
            layers, side, unknown = reader.read(name)
        except FrameError as error:
            return str(error)
        return np.bincount(layers[..., 3].ravel(), minlength=UNKNOWN + 1), zlib.crc32(layers), side, unknown

    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, len(names), CHUNK):
            yield from pool.map(look, names[first : first + CHUNK])


def _check_unknown(reader: Reader, unknown: int, images: int, limit: float, broken: Path) -> None:
    total = images * reader.size**2
    if unknown <= limit * total:
        return
    found = pd.read_csv(broken).groupby("colour", sort=False)["pixels"].sum().nlargest(NAMED)
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in found.index], np.uint8)
    near = zip(found.items(), *reader.palette.nearest(colours), strict=True)
    named = "; ".join(
        f"{colour} in {n} pixels ({np.sqrt(distance):.1f} from {reader.palette.names[index]!r})"
        for (colour, n), index, distance in near
    )
    raise DataError(
        f"{unknown} of {total} pixels have a colour farther than colour_tolerance={reader.tolerance} from all of the "
        f"palette, more than max_unknown_fraction={limit}; most often {named}. All found so far are in {broken}: add "
        "them to the palette, mend the images, or raise colour_tolerance or max_unknown_fraction"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED])


def _and_more(found: list | pd.Index) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""
