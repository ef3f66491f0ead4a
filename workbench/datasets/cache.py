"""The frame cache: every frame of a folder of clips decoded once into one memory-mapped uint8 file.

A finished cache is a folder that is never written again:

| File | Holds |
|---|---|
| frames.u8 | uint8 (slots, size, size, 3); clip i owns slots start[i] to start[i + 1] |
| start.npy | int64 (clips + 1,) |
| number.npy | int32 (slots,): the frame's number in its clip, -1 where the frame did not decode |
| names.npy, hashes.npy, crc.npy | clip names (UTF-8 bytes), their stable hashes, CRC-32 of their pixels |
| broken.csv | clip, frame, reason of everything left out |
| cache.json | settings, counts, fingerprint |

It is built in a folder ending in .partial and renamed when complete; a build that was killed goes on from
the clips that were finished (see `decoding`).
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from workbench.datasets.frames import DataError

FORMAT = 1
LEFT_OUT = -1


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
        """Open a finished cache without reading its pixels."""
        meta = json.loads((folder / "cache.json").read_text())
        size, slots = meta["image_size"], meta["slots"]
        expected, found = slots * size**2 * 3, (folder / "frames.u8").stat().st_size
        if found != expected:
            raise DataError(
                f"{folder}/frames.u8 has {found} bytes, expected {expected}: delete {folder} to decode again"
            )
        frames = np.memmap(folder / "frames.u8", np.uint8, "r", shape=(slots, size, size, 3))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("start", "number", "names", "hashes")
        }
        return cls(folder, meta, frames, **arrays)

    def read(self, slots: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b s s 3"]:
        """Copy frames out of the memory map."""
        return self.frames[slots]


def check_broken(frames: tuple[int, int], clips: tuple[int, int], max_fraction: float, report: Path) -> None:
    """Raise DataError, quoting the first reasons, when too large a share is broken.

    Args:
        frames: Broken frames, frames in all.
        clips: Clips without one good frame, clips in all.
        max_fraction: Largest share of either that is accepted.
        report: The broken.csv that lists them.
    """
    if all(broken <= max_fraction * total and broken < total for broken, total in (frames, clips)):
        return
    with report.open(newline="") as handle:
        rows = [row for _, row in zip(range(3), csv.DictReader(handle), strict=False)]
    reasons = "; ".join(f"{row['clip']}/{row['frame']}: {row['reason']}" for row in rows)
    raise DataError(
        f"{frames[0]} of {frames[1]} frames and {clips[0]} of {clips[1]} whole clips are broken, more than "
        f"max_broken_fraction={max_fraction}: {reasons}. All are listed in {report}; mend or remove them, or raise "
        "max_broken_fraction"
    )
