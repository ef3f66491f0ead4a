"""Reading frames: image files in the order of their numbers, and videos through PyAV, as square uint8 RGB."""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
VIDEO_SUFFIXES = (".webm", ".mp4", ".avi", ".mkv")
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """A data folder cannot be used as it is; the message names the file, the rule and the remedy."""


class FrameError(ValueError):
    """A frame that cannot be used; the message is the reason, as it stands in broken.csv."""


def frame_number(name: str) -> int | None:
    """The last number in a file's name, whatever precedes it: `img_00012.jpg` -> 12; None without one."""
    digits = re.findall(r"\d+", name.rpartition(".")[0])
    return int(digits[-1]) if digits else None


def list_frames(folder: Path) -> list[tuple[int, str]]:
    """The image files of a clip's folder as (number, file name), in the order of their numbers.

    Raises:
        FrameError: the folder holds no image, one without a number, or two with the same number.
    """
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    if not names:
        raise FrameError(f"no frames: the folder holds no file ending in {', '.join(IMAGE_SUFFIXES)}")
    frames: dict[int, str] = {}
    for name in names:
        number = frame_number(name)
        if number is None:
            raise FrameError(f"frame {name!r} has no number in its name: frames are ordered by it")
        if number in frames:
            raise FrameError(f"frames {frames[number]!r} and {name!r} have the same number {number}")
        frames[number] = name
    return sorted(frames.items())


def load_image(path: Path, size: int, allow_upscale: bool) -> tuple[UInt8[np.ndarray, "s s 3"], bool]:
    """Decode one image file and crop it to a square.

    Returns:
        The pixels, and whether the file was grey (its value then fills the three channels).

    Raises:
        FrameError: it does not decode, or its colours or size do not allow a faithful 8-bit RGB square.
    """
    try:
        with Image.open(path) as image:
            image.load()
            rgb = _to_rgb(image)
            return crop_square(rgb, size, allow_upscale), image.mode in ("L", "LA", "1")
    except FrameError:
        raise
    except DECODE_ERRORS as error:
        if path.is_file() and path.stat().st_size == 0:
            raise FrameError("empty file (0 bytes)") from None
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise FrameError(f"does not decode: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L", "1") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGB", "L"):
        rgba = image.convert("RGBA")
        if rgba.getextrema()[3][0] < 255:
            raise FrameError("has transparent pixels: flatten it on a background first")
        return rgba.convert("RGB")
    if image.mode == "CMYK":
        raise FrameError("has print colours (CMYK): convert it to RGB with its colour profile first")
    raise FrameError(f"has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits first")


def crop_square(image: Image.Image, size: int, allow_upscale: bool) -> UInt8[np.ndarray, "s s 3"]:
    """Resize the shorter side to `size` px (bicubic, anti-aliased) and crop the centre.

    Raises:
        FrameError: the shorter side is below `size` and `allow_upscale` is false.
    """
    short = min(image.size)
    if short < size and not allow_upscale:
        raise FrameError(
            f"is {image.width}x{image.height} px, below image_size={size}: choose image_size of at most {short}, "
            "or set allow_upscale: true"
        )
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def video_timestamps(path: Path) -> list[int] | int:
    """What a video's container announces, without decoding: sorted frame timestamps, or a count if it has none.

    Raises:
        FrameError: the file is no video, or holds no video stream or no frames.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FrameError("holds no video stream")
            packets = (p for p in container.demux(video=0) if p.size and not p.is_discard)
            stamps = [packet.pts for packet in packets]
    except (av.FFmpegError, OSError) as error:
        raise FrameError(f"cannot be opened as a video: {error.strerror or error}") from None
    if not stamps:
        raise FrameError("holds no video frames")
    distinct = None not in stamps and len(set(stamps)) == len(stamps)
    return sorted(stamps) if distinct else len(stamps)


def decode_video(path: Path) -> Iterator[tuple[int | None, Image.Image | str]]:
    """Yield (timestamp, RGB image) for each frame that decodes, and (None, reason) for each packet that does not."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except StopIteration:
                return
            except av.error.EOFError:
                return
            except av.FFmpegError as error:
                yield None, error.strerror or str(error)
                continue
            for frame in frames:
                yield frame.pts, frame.to_image()


def scan_source(source: Path) -> list[tuple[str, int, int]]:
    """The clips of a source as (entry name, mtime [ns], size [bytes]), sorted by name.

    A clip is a sub-folder or a video file; a source that is itself a video file is one clip.

    Raises:
        DataError: the source is absent, holds no clips, or gives two clips the same name.
    """
    if source.is_file() and source.suffix.lower() in VIDEO_SUFFIXES:
        stat = source.stat()
        return [(source.name, stat.st_mtime_ns, stat.st_size)]
    if not source.is_dir():
        raise DataError(f"data={str(source)!r}: no such folder or video ({', '.join(VIDEO_SUFFIXES)})")
    clips, others = [], []
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir() or entry.name.lower().endswith(VIDEO_SUFFIXES):
                stat = entry.stat()
                clips.append((entry.name, stat.st_mtime_ns, 0 if entry.is_dir() else stat.st_size))
            else:
                others.append(entry.name)
    if not clips:
        raise DataError(_no_clips(source, others))
    return sorted(clips)


def _no_clips(source: Path, others: list[str]) -> str:
    if not others:
        return f"data={str(source)!r}: the folder is empty; it must hold one folder of frames, or one video, per clip"
    images = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in others)
    remedy = (
        f"it holds {images} images itself: put the frames of each clip into a folder of its own"
        if images
        else f"it holds {len(others)} other files, such as {min(others)!r}"
    )
    return f"data={str(source)!r}: no clips found (a folder of frames or a video each); {remedy}"


def clip_name(entry: str) -> str:
    """A clip's name: its folder's name, or its video's without the ending."""
    return entry.rpartition(".")[0] if entry.lower().endswith(VIDEO_SUFFIXES) else entry
