"""Building the frame cache: every frame decoded once, by threads, resumable clip by clip.

Threads serve, as Pillow and PyAV release the interpreter lock while they decode.
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from workbench.datasets.cache import FORMAT, LEFT_OUT, CacheSettings, FrameCache, check_broken
from workbench.datasets.frames import (
    DataError,
    FrameError,
    clip_name,
    crop_square,
    decode_video,
    list_frames,
    load_image,
    scan_source,
    video_timestamps,
)
from workbench.datasets.splits import stable_hash
from workbench.progress import Progress

COMMIT_EVERY_BYTES = 256 << 20


def open_cache(
    source: Path, cache_dir: Path, settings: CacheSettings, max_broken_fraction: float, workers: int = 0
) -> FrameCache:
    """Open the cache of a source, decoding it first when there is none for its present listing.

    Changed listings (a clip added, removed, or with another modification time) get a cache of their own;
    an older one is left where it is. A frame overwritten in place inside a clip's folder is not noticed.

    Args:
        workers: Decoding threads; 0 takes one per core.

    Raises:
        DataError: no clips, not enough disk, or more broken frames than `max_broken_fraction`.
    """
    clips = scan_source(source)
    names = [clip_name(entry) for entry, _, _ in clips]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data={str(source)!r}: two clips are named {twice!r} (a folder and a video); rename one")
    key = hashlib.blake2b(repr((FORMAT, str(source.resolve()), settings, clips)).encode(), digest_size=6).hexdigest()
    folder = cache_dir / f"{source.stem}-{settings.image_size}px-{key}"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / f"{folder.name}.lock"):
            if not folder.is_dir():
                root = source if source.is_dir() else source.parent
                CacheBuild(root, [c[0] for c in clips], names, folder, settings, max_broken_fraction).run(workers)
    cache = FrameCache.open(folder)
    meta = cache.meta
    frames, clips = (meta["broken_frames"], meta["slots"]), (meta["broken_clips"], meta["clips"])
    check_broken(frames, clips, max_broken_fraction, folder / "broken.csv")
    return cache


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


@dataclass
class _Clip:
    """What decoding one clip gave."""

    index: int
    crc: int = 0
    grey: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


class CacheBuild:
    """One build of a cache folder; `run` ends with the folder under its final name, or raises.

    Raises:
        DataError: not enough disk, or too many broken frames.
    """

    def __init__(
        self,
        root: Path,
        entries: list[str],
        names: list[str],
        final: Path,
        settings: CacheSettings,
        max_broken: float,
    ) -> None:
        self.root, self.entries, self.names, self.final = root, entries, names, final
        self.settings, self.max_broken = settings, max_broken
        self.folder = final.with_name(final.name + ".partial")
        self.folder.mkdir(exist_ok=True)

    def run(self, workers: int) -> None:
        workers = workers or os.cpu_count() or 1
        with ThreadPool(workers) as pool:
            start = self._count(pool)
            self._check_disk(int(start[-1]))
            self.start, slots = start, int(start[-1])
            self.number = _array(self.folder / "number.npy", np.int32, slots)
            self.crc = _array(self.folder / "crc.npy", np.uint32, len(self.entries))
            self.done = _array(self.folder / "done.npy", np.uint8, len(self.entries))
            self.grey = _array(self.folder / "grey.npy", np.int32, len(self.entries))
            self.broken: list[tuple[str, str, str]] = []
            self._retry_broken()
            self.file = os.open(self.folder / "frames.u8", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(self.file, slots * self.settings.frame_bytes)
                self._decode_all(pool)
            finally:
                os.close(self.file)
        self._finish(slots)

    def _count(self, pool: ThreadPool) -> np.ndarray:
        """First slot of every clip; counted without decoding, and kept for a resumed build."""
        path = self.folder / "start.npy"
        if path.exists():
            return np.load(path)
        counts = np.zeros(len(self.entries) + 1, np.int64)
        with Progress(len(self.entries), "counting frames", "clip") as progress:
            for i, count in enumerate(pool.imap(self._count_clip, range(len(self.entries)), chunksize=16)):
                counts[i + 1] = count
                progress.update()
        start = np.cumsum(counts)
        _save(path, start)
        return start

    def _count_clip(self, index: int) -> int:
        """Slots of one clip; a clip that cannot be listed owns one, which the decoding then reports."""
        try:
            frames = self._frames(index)
        except FrameError:
            return 1
        frames = frames if isinstance(frames, int) else len(frames)
        return -(-frames // self.settings.stride)

    def _frames(self, index: int) -> list[tuple[int, str]] | list[int] | int:
        path = self.root / self.entries[index]
        return list_frames(path) if path.is_dir() else video_timestamps(path)

    def _check_disk(self, slots: int) -> None:
        needed = slots * self.settings.frame_bytes
        present = self.folder / "frames.u8"
        held = present.stat().st_blocks * 512 if present.exists() else 0
        free = shutil.disk_usage(self.folder).free
        print(
            f"decoding {slots:,} frames of {len(self.entries):,} clips into {self.final}: "
            f"{needed / 1e9:.2f} GB, {free / 1e9:.1f} GB free",
            flush=True,
        )
        if needed - held > free * 0.98:
            raise DataError(
                f"the frame cache needs {needed / 1e9:.2f} GB, and {self.folder.parent} has {free / 1e9:.2f} GB free: "
                "set cache_dir to a larger disk, lower image_size, or raise cache_stride"
            )

    def _retry_broken(self) -> None:
        """Mark clips with broken frames as not done: they may have been mended since."""
        report = self.folder / "broken.csv"
        if report.exists():
            with report.open(newline="") as handle:
                retry = {row["clip"] for row in csv.DictReader(handle)}
            self.done[[i for i, name in enumerate(self.names) if name in retry]] = 0

    def _decode_all(self, pool: ThreadPool) -> None:
        todo = np.flatnonzero(self.done == 0)
        slots_done = int((self.start[1:] - self.start[:-1])[self.done == 1].sum())
        pending: list[_Clip] = []
        waiting = 0
        with Progress(int(self.start[-1]), "decoding", "frame", slots_done) as progress:
            for clip in pool.imap_unordered(self._decode_clip, todo):
                slots = int(self.start[clip.index + 1] - self.start[clip.index])
                pending.append(clip)
                waiting += slots * self.settings.frame_bytes
                progress.update(slots, f"{len(self.broken)} broken" if self.broken else "")
                if waiting > COMMIT_EVERY_BYTES:
                    self._commit(pending)
                    waiting = 0
            self._commit(pending)

    def _commit(self, pending: list[_Clip]) -> None:
        """Make decoded clips durable: pixels and numbers first, then the report, then the done flags."""
        os.fdatasync(self.file)
        for clip in pending:
            self.crc[clip.index], self.grey[clip.index] = clip.crc, clip.grey
            self.broken += [(self.names[clip.index], frame, reason) for frame, reason in clip.broken]
        for array in (self.number, self.crc, self.grey):
            array.flush()
        _write_broken(self.folder / "broken.csv", self.broken)
        self.done[[clip.index for clip in pending]] = 1
        self.done.flush()
        pending.clear()
        if len(self.broken) > self.max_broken * int(self.start[-1]):
            self._check_broken(len(self.broken), 0)

    def _check_broken(self, frames: int, clips: int) -> None:
        totals = (frames, int(self.start[-1])), (clips, len(self.names))
        check_broken(*totals, self.max_broken, self.folder / "broken.csv")

    def _decode_clip(self, index: int) -> _Clip:
        clip = _Clip(int(index))
        first, last = int(self.start[index]), int(self.start[index + 1])
        self.number[first:last] = LEFT_OUT
        path = self.root / self.entries[index]
        try:
            frames = self._frames(index)
            (self._decode_folder if path.is_dir() else self._decode_video)(clip, path, frames, first)
        except FrameError as error:
            clip.broken.append(("", str(error)))
        return clip

    def _decode_folder(self, clip: _Clip, path: Path, frames: list[tuple[int, str]], first: int) -> None:
        for slot, (number, name) in enumerate(frames[:: self.settings.stride], start=first):
            try:
                pixels, grey = load_image(path / name, self.settings.image_size, self.settings.allow_upscale)
            except FrameError as error:
                clip.broken.append((name, str(error)))
                continue
            clip.grey += grey
            self._write(clip, slot, number, pixels)

    def _decode_video(self, clip: _Clip, path: Path, stamps: list[int] | int, first: int) -> None:
        count = stamps if isinstance(stamps, int) else len(stamps)
        position = {stamp: i for i, stamp in enumerate(stamps)} if isinstance(stamps, list) else None
        missing, reason = set(range(0, count, self.settings.stride)), "no picture decoded"
        for n, (stamp, image) in enumerate(decode_video(path)):
            if isinstance(image, str):
                reason = f"does not decode: {image}"
                continue
            number = n if position is None else position.get(stamp, -1)
            if not 0 <= number < count:
                raise FrameError(f"gives a frame (timestamp {stamp}) that its container does not announce")
            if number in missing:
                pixels = crop_square(image, self.settings.image_size, self.settings.allow_upscale)
                self._write(clip, first + number // self.settings.stride, number, pixels)
                missing.discard(number)
        clip.broken += [(str(number), reason) for number in sorted(missing)]

    def _write(self, clip: _Clip, slot: int, number: int, pixels: np.ndarray) -> None:
        data = pixels.tobytes()
        written = os.pwrite(self.file, data, slot * len(data))
        if written != len(data):
            raise OSError(f"{self.folder}/frames.u8: wrote {written} of {len(data)} bytes; the disk is full")
        self.number[slot] = number
        clip.crc = zlib.crc32(data, clip.crc)

    def _finish(self, slots: int) -> None:
        """Check the share of broken frames, write what describes the cache, and give it its final name."""
        left_out = self.number == LEFT_OUT
        broken = int(left_out.sum())
        broken_clips = int(np.logical_and.reduceat(left_out, self.start[:-1]).sum())
        self._check_broken(broken, broken_clips)
        names = np.array([name.encode() for name in self.names])
        _save(self.folder / "names.npy", names)
        _save(self.folder / "hashes.npy", stable_hash(self.names))
        digest = hashlib.blake2b(repr((self.settings, names.tobytes())).encode(), digest_size=8)
        for array in (self.start, self.number, self.crc):
            digest.update(np.ascontiguousarray(array).tobytes())
        meta = {
            "format": FORMAT,
            "source": str(self.root),
            "image_size": self.settings.image_size,
            "stride": self.settings.stride,
            "allow_upscale": self.settings.allow_upscale,
            "clips": len(self.names),
            "slots": slots,
            "broken_frames": broken,
            "broken_clips": broken_clips,
            "grey_frames": int(self.grey.sum()),
            "fingerprint": digest.hexdigest(),
        }
        _replace(self.folder / "cache.json", json.dumps(meta, indent=1))
        for helper in ("grey.npy", "done.npy"):
            (self.folder / helper).unlink()
        os.replace(self.folder, self.final)


def _array(path: Path, dtype: type, length: int) -> np.memmap:
    """A writable .npy memory map, kept from an earlier build where there is one."""
    if path.exists():
        return np.lib.format.open_memmap(path, "r+")
    return np.lib.format.open_memmap(path, "w+", dtype, (length,))


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        np.save(handle, array)
    os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_broken(path: Path, rows: list[tuple[str, str, str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as handle:
        csv.writer(handle).writerows([("clip", "frame", "reason"), *rows])
    os.replace(temporary, path)
