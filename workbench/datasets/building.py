"""Building the frame cache: every frame decoded once, by threads, resumable clip by clip.

Threads serve, as Pillow and PyAV release the interpreter lock while they decode.
"""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from workbench.datasets.cache import (
    FORMAT,
    LEFT_OUT,
    CacheSettings,
    FrameCache,
    cache_folders,
    check_broken,
    full_disk,
    growing_array,
    locked,
    make_folder,
    read_broken,
    save_array,
    write_atomic,
    write_broken,
)
from workbench.datasets.decoding import DecodedFrame, count_slots, decode_clip
from workbench.datasets.frames import DataError, FrameError, clip_name, scan_source
from workbench.datasets.splits import stable_hash
from workbench.datasets.threads import in_threads, usable_cores
from workbench.progress import Progress

COMMIT_EVERY_BYTES = 256 << 20
HELPERS = ("grey.npy", "done.npy", "listing.json")


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
    folder, partial = cache_folders(source, cache_dir, settings, clips)
    if not folder.is_dir():
        make_folder(cache_dir, "cache_dir")
        with locked(partial.with_suffix(".lock")):
            if not folder.is_dir():
                root = source if source.is_dir() else source.parent
                CacheBuild(root, clips, partial, folder, settings, max_broken_fraction, workers).run()
    cache = FrameCache.open(folder)
    meta = cache.meta
    frames, whole = (meta["broken_frames"], meta["slots"]), (meta["broken_clips"], meta["clips"])
    check_broken(frames, whole, max_broken_fraction, folder / "broken.csv", finished=True)
    return cache


@dataclass
class _Clip:
    """What decoding one clip gave."""

    index: int
    crc: int = 0
    grey: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


class CacheBuild:
    """One build of a cache; `run` ends with it in its final folder, or raises.

    Args:
        root: Folder that holds the clips.
        clips: What `scan_source` gave.
        folder: Where it is built.
        final: Where it goes when it is complete.

    Raises:
        DataError: not enough disk, or too many broken frames.
    """

    def __init__(
        self,
        root: Path,
        clips: list[tuple[str, int, int]],
        folder: Path,
        final: Path,
        settings: CacheSettings,
        max_broken: float,
        workers: int,
    ) -> None:
        self.root, self.clips, self.folder, self.final = root, clips, folder, final
        self.settings, self.max_broken = settings, max_broken
        self.workers = workers or usable_cores()
        self.names = [clip_name(entry) for entry, _, _ in clips]

    def run(self) -> None:
        with full_disk(self.folder.parent):
            self.start = self._first_slots()
            self.slots = int(self.start[-1])
            self._check_disk()
            self._open_arrays()
            self.file = os.open(self.folder / "frames.u8", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(self.file, self.slots * self.settings.frame_bytes)
                self._decode_all()
            finally:
                os.close(self.file)
            self._finish()

    def _first_slots(self) -> np.ndarray:
        """First slot of every clip, and of none; an earlier build of the same clips is gone on with.

        Clips changed since then (mended), or of which nothing could be used, are counted and decoded again; where
        they now need another number of slots, or clips came or went, everything is.
        """
        earlier = self.folder / "listing.json"
        listing = [tuple(clip) for clip in json.loads(earlier.read_text())] if earlier.exists() else []
        if [clip[0] for clip in listing] == [clip[0] for clip in self.clips]:
            start = np.load(self.folder / "start.npy")
            given_up = {row["clip"] for row in read_broken(self.folder / "broken.csv") if not row["frame"]}
            changed = [i for i, clip in enumerate(self.clips) if clip != listing[i] or self.names[i] in given_up]
            if np.array_equal(self._count(changed), np.diff(start)[changed]):
                self._forget(changed)
                self._save_listing()
                return start
        if self.folder.exists():
            print(f"clips or frames came or went since {self.folder} was begun: decoding begins again", flush=True)
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        start = np.concatenate([[0], np.cumsum(self._count(range(len(self.clips))))])
        save_array(self.folder / "start.npy", start)
        self._save_listing()
        return start

    def _count(self, clips: Sequence[int]) -> np.ndarray:
        paths = [self.root / self.clips[i][0] for i in clips]
        chunks = range(0, len(paths), 64)
        counts = np.zeros(len(paths), np.int64)

        def count(chunk: int) -> tuple[int, list[int]]:
            return chunk, [count_slots(path, self.settings.stride) for path in paths[chunk : chunk + 64]]

        if paths:
            with Progress(len(paths), "counting frames", "clip") as progress:
                for chunk, slots in in_threads(count, chunks, self.workers):
                    counts[chunk : chunk + 64] = slots
                    progress.update(len(slots))
        return counts

    def _save_listing(self) -> None:
        text = json.dumps(self.clips).encode()
        write_atomic(self.folder / "listing.json", lambda handle: handle.write(text))

    def _forget(self, clips: list[int]) -> None:
        """Mark clips as not decoded."""
        if clips and (self.folder / "done.npy").exists():
            done = growing_array(self.folder / "done.npy", np.uint8, len(self.clips))
            done[clips] = 0
            done.flush()

    def _check_disk(self) -> None:
        needed = self.slots * self.settings.frame_bytes
        present = self.folder / "frames.u8"
        held = present.stat().st_blocks * 512 if present.exists() else 0
        free = shutil.disk_usage(self.folder).free
        print(
            f"decoding {self.slots:,} frames of {len(self.clips):,} clips into {self.final}: "
            f"{needed / 1e9:.2f} GB, {free / 1e9:.1f} GB free",
            flush=True,
        )
        if needed - held > free * 0.98:
            raise DataError(
                f"the frame cache needs {needed / 1e9:.2f} GB, and {self.folder.parent} has {free / 1e9:.2f} GB free: "
                "set cache_dir to a larger disk, lower image_size, or raise cache_stride"
            )

    def _open_arrays(self) -> None:
        """What a build fills in, with what an earlier one left; clips with broken frames are tried again."""
        broken = {row["clip"] for row in read_broken(self.folder / "broken.csv")}
        self._forget([i for i, name in enumerate(self.names) if name in broken])
        self.number = growing_array(self.folder / "number.npy", np.int64, self.slots)
        self.crc = growing_array(self.folder / "crc.npy", np.uint32, len(self.clips))
        self.grey = growing_array(self.folder / "grey.npy", np.int64, len(self.clips))
        self.done = growing_array(self.folder / "done.npy", np.uint8, len(self.clips))
        self.broken: list[tuple[str, str, str]] = []

    def _decode_all(self) -> None:
        todo, slots = np.flatnonzero(self.done == 0).tolist(), np.diff(self.start)
        self.threads_per_clip = max(1, self.workers // max(1, len(todo)))
        self.stopped = False
        pending: list[_Clip] = []
        waiting = 0
        results = in_threads(self._decode_clip, todo, self.workers)
        try:
            with Progress(self.slots, "decoding", "frame", int(slots[self.done == 1].sum())) as progress:
                for clip in results:
                    pending.append(clip)
                    waiting += int(slots[clip.index]) * self.settings.frame_bytes
                    progress.update(int(slots[clip.index]), f"{len(self.broken)} broken" if self.broken else "")
                    if waiting > COMMIT_EVERY_BYTES:
                        self._commit(pending)
                        waiting = 0
            self._commit(pending)
        finally:
            self.stopped = True
            results.close()  # waits for the threads, which write into a file that is closed next

    def _decode_clip(self, index: int) -> _Clip:
        clip, (first, last) = _Clip(index), self.start[index : index + 2].tolist()
        self.number[first:last] = LEFT_OUT
        path = self.root / self.clips[index][0]
        try:
            for frame in decode_clip(path, self.settings, last - first, self.threads_per_clip):
                if self.stopped:
                    raise RuntimeError(f"stopped in the middle of {path}, which is not done")
                self._keep(clip, first, frame)
        except FrameError as error:
            self.number[first:last] = LEFT_OUT
            return _Clip(index, broken=[("", str(error))])
        return clip

    def _keep(self, clip: _Clip, first: int, frame: DecodedFrame) -> None:
        if frame.pixels is None:
            clip.broken.append((frame.name, frame.reason))
            return
        data = frame.pixels.tobytes()
        written = os.pwrite(self.file, data, (first + frame.slot) * len(data))
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.number[first + frame.slot] = frame.number
        clip.crc, clip.grey = zlib.crc32(data, clip.crc), clip.grey + frame.grey

    def _commit(self, pending: list[_Clip]) -> None:
        """Make decoded clips durable: pixels and numbers first, then the report, then the done flags."""
        os.fsync(self.file)
        for clip in pending:
            self.crc[clip.index], self.grey[clip.index] = clip.crc, clip.grey
            self.broken += [(self.names[clip.index], frame, reason) for frame, reason in clip.broken]
        for array in (self.number, self.crc, self.grey):
            array.flush()
        self.broken.sort(key=lambda row: row[0])
        write_broken(self.folder / "broken.csv", self.broken)
        self.done[[clip.index for clip in pending]] = 1
        self.done.flush()
        pending.clear()
        if len(self.broken) > self.max_broken * self.slots:
            self._check_broken(len(self.broken), 0)

    def _check_broken(self, frames: int, clips: int) -> None:
        totals = (frames, self.slots), (clips, len(self.names))
        check_broken(*totals, self.max_broken, self.folder / "broken.csv")

    def _finish(self) -> None:
        """Check the share of broken frames, write what describes the cache, and give it its final name."""
        left_out = self.number == LEFT_OUT
        broken = int(left_out.sum())
        broken_clips = int(np.logical_and.reduceat(left_out, self.start[:-1]).sum())
        self._check_broken(broken, broken_clips)
        names = np.array([name.encode() for name in self.names])
        save_array(self.folder / "names.npy", names)
        save_array(self.folder / "hashes.npy", stable_hash(self.names))
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
            "slots": self.slots,
            "broken_frames": broken,
            "broken_clips": broken_clips,
            "grey_frames": int(self.grey.sum()),
            "fingerprint": digest.hexdigest(),
        }
        write_atomic(self.folder / "cache.json", lambda handle: handle.write(json.dumps(meta, indent=1).encode()))
        os.replace(self.folder, self.final)
        for helper in HELPERS:
            (self.final / helper).unlink(missing_ok=True)
