"""The clips of a source, and their image files: in the order of their numbers, as square uint8 RGB."""

import gc
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
VIDEO_SUFFIXES = (".webm", ".mp4", ".avi", ".mkv")
LARGEST_NUMBER = 2**63 - 1
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
    digits = re.findall(r"[0-9]+", name.rpartition(".")[0])
    return int(digits[-1]) if digits else None


def list_frames(folder: Path) -> list[tuple[int, str]]:
    """The image files of a clip's folder as (number, file name), in the order of their numbers.

    Raises:
        FrameError: the folder holds no image, one without a usable number, or two with the same number.
    """
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    except OSError as error:
        raise FrameError(f"the folder cannot be listed: {error.strerror}") from None
    if not names:
        raise FrameError(f"no frames: the folder holds no file ending in {', '.join(IMAGE_SUFFIXES)}")
    frames: dict[int, str] = {}
    for name in sorted(names):
        number = frame_number(name)
        if number is None:
            raise FrameError(f"frame {name!r} has no number in its name: frames are ordered by it; rename it")
        if number > LARGEST_NUMBER:
            raise FrameError(f"frame {name!r} has a number above {LARGEST_NUMBER}: rename it")
        if number in frames:
            raise FrameError(f"frames {frames[number]!r} and {name!r} have the same number {number}: rename one")
        frames[number] = name
    return sorted(frames.items())


def load_image(path: Path, size: int, allow_upscale: bool) -> tuple[UInt8[np.ndarray, "s s 3"], bool]:
    """Decode one image file, turn it as its EXIF orientation says, and crop it to a square.

    Returns:
        The pixels, and whether the file was grey (its value then fills the three channels).

    Raises:
        FrameError: it does not decode, or its colours or size do not allow a faithful 8-bit RGB square.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if any(";16B" in str(tile[3]) for tile in image.tile):  # Pillow would drop the lower bytes silently
                raise FrameError("has 16 bits per channel: convert it to 8 bits first")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return crop_square(_to_rgb(image), size, allow_upscale), image.mode in ("L", "LA", "1")
    except FrameError:
        raise
    except DECODE_ERRORS as error:
        raise FrameError(_why_not(path, error)) from None


def _why_not(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "empty file (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"does not decode: not an image ({', '.join(IMAGE_FORMATS)})"
    system = error.strerror if isinstance(error, OSError) else None
    return f"does not decode: {system or error}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L", "1") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGB", "L", "1"):
        rgba = image.convert("RGBA")
        if rgba.getextrema()[3][0] < 255:
            raise FrameError("has transparent pixels: flatten it on a background first")
        return rgba.convert("RGB")
    if image.mode == "CMYK":
        raise FrameError("has print colours (CMYK): convert it to RGB with its colour profile first")
    raise FrameError(f"has pixels of mode {image.mode}: convert it to RGB of 8 bits first")


def crop_square(image: Image.Image, size: int, allow_upscale: bool) -> UInt8[np.ndarray, "s s 3"]:
    """Crop the centre, from a whole pixel on, and resize it to `size` px (bicubic, anti-aliased).

    Raises:
        FrameError: the shorter side is below `size` and `allow_upscale` is false.
    """
    short = min(image.size)
    if short < size and not allow_upscale:
        raise FrameError(
            f"is {image.width}x{image.height} px, below image_size={size}: choose image_size of at most {short}, "
            "or set allow_upscale: true"
        )
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def scan_source(source: Path) -> list[tuple[str, int, int]]:
    """The clips of a source as (entry name, mtime [ns], size [bytes]), sorted by name.

    A clip is a sub-folder or a video file; a source that is itself a video file is one clip.

    Raises:
        DataError: the source is absent, holds no clips, gives two the same name, or one that is not UTF-8.
    """
    if source.is_file() and source.suffix.lower() in VIDEO_SUFFIXES:
        stat = source.stat()
        return [(source.name, stat.st_mtime_ns, stat.st_size)]
    if not source.is_dir():
        raise DataError(
            f"data={str(source)!r}: no such folder, and no video ({', '.join(VIDEO_SUFFIXES)}); correct the path"
        )
    clips, others = [], []
    with os.scandir(source) as entries, no_collection():
        for entry in entries:
            name, folder = entry.name, entry.is_dir()
            if name[0] == ".":
                continue
            if folder or name.lower().endswith(VIDEO_SUFFIXES):
                clips.append((name, *_identity(entry, folder)))
            else:
                others.append(name)
    if not clips:
        raise DataError(_no_clips(source, others))
    _check_names(source, [clip[0] for clip in clips])
    return sorted(clips)


def _identity(entry: os.DirEntry, folder: bool) -> tuple[int, int]:
    """What changes when a clip does: (mtime, size); zeros for a link to nothing, which then fails to decode."""
    try:
        stat = entry.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, 0 if folder else stat.st_size


def _check_names(source: Path, entries: list[str]) -> None:
    if not "".join(entries).isascii():
        for entry in entries:
            if entry != entry.encode("utf-8", "replace").decode():
                raise DataError(f"data={str(source)!r}: the name of clip {entry!r} is not UTF-8; rename it")
    names = list(map(clip_name, entries))
    if len(set(names)) < len(names):
        twice = min(name for name, times in Counter(names).items() if times > 1)
        same = " and ".join(repr(entry) for entry in sorted(entries) if clip_name(entry) == twice)
        raise DataError(f"data={str(source)!r}: {same} are two clips of the name {twice!r}; rename one")


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


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for cycles meanwhile: over objects by the hundred thousand it takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
