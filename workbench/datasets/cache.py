"""The frame cache: every frame of a folder of clips decoded once into one memory-mapped uint8 file.

A finished cache is a folder that is never written again:

| File | Holds |
|---|---|
| frames.u8 | uint8 (slots, size, size, 3); clip i owns slots start[i] to start[i + 1] |
| start.npy | int64 (clips + 1,) |
| number.npy | int64 (slots,): the frame's number in its clip, -1 where the frame did not decode |
| names.npy, hashes.npy, crc.npy | clip names (UTF-8 bytes), their stable hashes, CRC-32 of their pixels |
| broken.csv | clip, frame, reason of everything left out |
| cache.json | settings, counts, fingerprint |

It is built in a folder ending in .partial and renamed when complete; a build that was killed goes on from
the clips that were finished (see `decoding`).
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int, UInt8

from workbench.datasets.frames import DataError

FORMAT = 2
LEFT_OUT = -1
ARRAYS = ("start", "number", "names", "hashes")


@dataclass(frozen=True)
class CacheSettings:
    """What decides the pixels of a cache: size [px], every `stride`-th frame, enlarging of small frames."""

    image_size: int
    stride: int = 1
    allow_upscale: bool = False

    @property
    def frame_bytes(self) -> int:
        return self.image_size**2 * 3


@dataclass(frozen=True)
class FrameCache:
    """A finished cache, opened read-only; any number of processes may share it."""

    folder: Path
    meta: dict[str, Any]
    frames: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    number: np.ndarray = field(repr=False)
    names: np.ndarray = field(repr=False)
    hashes: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "FrameCache":
        """Open a finished cache without reading its pixels.

        Raises:
            DataError: a file of it is absent, unreadable or of the wrong length.
        """
        try:
            meta = json.loads((folder / "cache.json").read_text())
            size, slots = meta["image_size"], meta["slots"]
            found = (folder / "frames.u8").stat().st_size
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(f"the frame cache {folder} is damaged ({error}): delete it to decode again") from None
        expected = slots * size**2 * 3
        if found != expected:
            raise DataError(
                f"{folder}/frames.u8 has {found} bytes, expected {expected}: delete {folder} to decode again"
            )
        frames = np.memmap(folder / "frames.u8", np.uint8, "r", shape=(slots, size, size, 3))
        return cls(folder, meta, frames, **arrays)

    def clip_names(self) -> list[str]:
        """The name of every clip."""
        return b"/".join(self.names.tolist()).decode().split("/")  # no name holds a slash

    def read(self, slots: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b s s 3"]:
        """Copy frames out of the memory map."""
        return self.frames[slots]


def cache_folders(
    source: Path, cache_dir: Path, settings: CacheSettings, clips: list[tuple[str, int, int]]
) -> tuple[Path, Path]:
    """Where the cache of a source in its present listing is, and where one is built: the same for every listing."""
    source = source.resolve()
    key = hashlib.blake2b(repr((FORMAT, str(source), settings)).encode("utf-8", "surrogateescape"), digest_size=6)
    partial = key.hexdigest()
    key.update(repr(clips).encode())
    final = key.hexdigest()
    prefix = f"{source.name}-{settings.image_size}px"
    return cache_dir / f"{prefix}-{final}", cache_dir / f"{prefix}-{partial}.partial"


def check_broken(
    frames: tuple[int, int], clips: tuple[int, int], max_fraction: float, report: Path, finished: bool = False
) -> None:
    """Raise DataError, quoting the first reasons, when too large a share is broken.

    Args:
        frames: Broken frames, frames in all.
        clips: Clips without one good frame, clips in all.
        max_fraction: Largest share of either that is accepted.
        report: The broken.csv that lists them.
        finished: Whether the cache around it is complete, so that nothing in it is tried again.
    """
    nothing_left = frames[0] == frames[1] or clips[0] == clips[1]
    if not nothing_left and all(broken <= max_fraction * total for broken, total in (frames, clips)):
        return
    rows = read_broken(report)[:3]
    reasons = "; ".join(f"{'/'.join(filter(None, (row['clip'], row['frame'])))} {row['reason']}" for row in rows)
    rule = "and none is left" if nothing_left else f"more than max_broken_fraction={max_fraction}"
    mend = f"mend or remove them, and delete {report.parent}" if finished else "mend or remove them"
    remedy = mend if nothing_left else f"{mend}, or raise max_broken_fraction"
    raise DataError(
        f"{frames[0]} of {frames[1]} frames and {clips[0]} of {clips[1]} whole clips are broken, {rule}: {reasons}. "
        f"All found so far are listed in {report}; {remedy}"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for another process that makes the same data."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is making the same data; waiting for it ({path})", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that after a kill, or a power cut, it is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        write(handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Save a .npy file atomically."""
    write_atomic(path, lambda handle: np.save(handle, array))


def growing_array(path: Path, dtype: type, length: int) -> np.memmap:
    """A writable .npy memory map of zeros, or what an earlier build left in it."""
    if not path.exists():
        save_array(path, np.zeros(length, dtype))  # not sparse: a full disk is noticed here
    return np.lib.format.open_memmap(path, "r+")


def write_broken(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write broken.csv atomically; bytes of a file's name that are not UTF-8 are escaped."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("clip", "frame", "reason"), *rows])
    write_atomic(path, lambda handle: handle.write(text.getvalue().encode("utf-8", "backslashreplace")))


def read_broken(path: Path) -> list[dict[str, str]]:
    """The rows of broken.csv; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def make_folder(path: Path, key: str) -> None:
    """Make a folder to write into.

    Raises:
        DataError: it cannot be made or written; the message names `key`, the parameter it comes from.
    """
    remedy = f"set {key} to a folder that you may write"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{key}={str(path)!r}: cannot be made ({error.strerror}); {remedy}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise DataError(f"{key}={str(path)!r}: is not writable; {remedy}")


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Say what to do when the disk fills up in the middle; what was decoded is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk of {folder} is full ({error.strerror}): make room and start again, it goes on from there; "
            "or set cache_dir to a larger disk"
        ) from error
