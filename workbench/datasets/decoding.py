"""Decoding one clip, a folder of frames or a video, into the slots of the frame cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.datasets.cache import CacheSettings
from workbench.datasets.frames import FrameError, crop_square, list_frames, load_image
from workbench.datasets.videos import numbered_frames, to_image, video_timestamps


@dataclass
class DecodedFrame:
    """One slot of a clip: its pixels, uint8 (s, s, 3), or the reason why it has none."""

    slot: int
    number: int
    name: str
    pixels: np.ndarray | None = None
    grey: bool = False
    reason: str = ""


def count_slots(path: Path, stride: int) -> int:
    """Slots of a clip, counted without decoding; one that cannot be listed owns one, reported when decoded."""
    try:
        return _slots(_listing(path), stride)
    except FrameError:
        return 1


def decode_clip(path: Path, settings: CacheSettings, slots: int, threads: int = 0) -> Iterator[DecodedFrame]:
    """Every slot of a clip, in the order of decoding.

    Args:
        path: Folder of frames, or video.
        slots: What `count_slots` gave.
        threads: Threads of the video decoder; 0 lets FFmpeg choose.

    Raises:
        FrameError: nothing of the clip can be used.
    """
    listing = _listing(path)
    if _slots(listing, settings.stride) != slots:
        raise FrameError("has changed since its frames were counted; start again")
    if path.is_dir():
        yield from _decode_folder(path, listing, settings)
    else:
        yield from _decode_video(path, listing, settings, threads)


def _listing(path: Path) -> list[tuple[int, str]] | list[int] | int:
    return list_frames(path) if path.is_dir() else video_timestamps(path)


def _slots(listing: list | int, stride: int) -> int:
    return -(-(listing if isinstance(listing, int) else len(listing)) // stride)


def _decode_folder(path: Path, frames: list[tuple[int, str]], settings: CacheSettings) -> Iterator[DecodedFrame]:
    for slot, (number, name) in enumerate(frames[:: settings.stride]):
        try:
            pixels, grey = load_image(path / name, settings.image_size, settings.allow_upscale)
        except FrameError as error:
            yield DecodedFrame(slot, number, name, reason=str(error))
        else:
            yield DecodedFrame(slot, number, name, pixels, grey)


def _decode_video(path: Path, stamps: list[int] | int, settings: CacheSettings, threads: int) -> Iterator[DecodedFrame]:
    count = stamps if isinstance(stamps, int) else len(stamps)
    missing = dict.fromkeys(range(0, count, settings.stride), "")
    last_reason = "no picture decoded"
    for number, frame in numbered_frames(path, stamps, threads):
        if isinstance(frame, str):
            last_reason = frame
            if number in missing:
                missing[number] = frame
        elif number in missing:
            pixels = crop_square(to_image(frame), settings.image_size, settings.allow_upscale)
            del missing[number]
            yield DecodedFrame(number // settings.stride, number, str(number), pixels)
    for number, reason in missing.items():
        yield DecodedFrame(number // settings.stride, number, str(number), reason=reason or last_reason)
