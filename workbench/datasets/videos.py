"""Reading videos through PyAV: what their container announces, and their pictures one by one."""

import re
from collections.abc import Iterator
from math import inf
from pathlib import Path

import av
from PIL import Image

from workbench.datasets.frames import FrameError

CUT_SHORT_SECONDS, CUT_SHORT_SHARE = 0.5, 0.1


def video_timestamps(path: Path) -> list[int] | int:
    """What a video's container announces, without decoding: sorted frame timestamps, or a count if it has none.

    Raises:
        FrameError: the file is no video, holds no video stream or no frames, or ends long before its header says.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FrameError("holds no video stream")
            stream, end = container.streams.video[0], 0.0
            stamps = []
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * stream.time_base))
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
            announced = _announced_seconds(container, stream)
    except (av.FFmpegError, OSError) as error:
        raise FrameError(f"cannot be opened as a video: {error.strerror or error}") from None
    if not stamps:
        raise FrameError("holds no video frames")
    if None not in stamps and announced - end > max(CUT_SHORT_SECONDS, CUT_SHORT_SHARE * announced):
        raise FrameError(
            f"is cut short or damaged: its header announces {announced:.2f} s, its frames end at {end:.2f} s; "
            "fetch it again, or re-encode what is left"
        )
    distinct = None not in stamps and len(set(stamps)) == len(stamps)
    return sorted(stamps) if distinct else len(stamps)


def _announced_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Length of the video stream according to the file's header; 0 where it does not say."""
    if stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska, WebM
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def numbered_frames(
    path: Path, stamps: list[int] | int, threads: int = 0
) -> Iterator[tuple[int | None, av.VideoFrame | str]]:
    """Yield (number, frame) in order, counted from 0, and (number or None, reason) for what does not decode.

    Args:
        stamps: What `video_timestamps` gave: frames are placed by their timestamps, or counted if there are none.
        threads: Decoding threads; 0 lets FFmpeg choose.

    Raises:
        FrameError: a frame cannot be placed, so that none can be trusted to be in its place.
    """
    timed = isinstance(stamps, list)
    position = {stamp: i for i, stamp in enumerate(stamps)} if timed else {}
    for n, (stamp, frame) in enumerate(decode_video(path, threads)):
        if isinstance(frame, str) and not timed:
            raise FrameError(f"{frame}; and it holds no timestamps that would place the frames around")
        number = position.get(stamp) if timed else n
        if not isinstance(frame, str) and (number is None or number >= (len(stamps) if timed else stamps)):
            raise FrameError(f"gives a frame (timestamp {stamp}) that its container does not announce")
        yield number, frame


def decode_video(path: Path, threads: int = 0) -> Iterator[tuple[int | None, av.VideoFrame | str]]:
    """Yield (timestamp, frame) for what decodes, and (timestamp or None, reason) for what does not.

    After damage every frame up to the next key frame is left out too: it is predicted from what was lost.

    Raises:
        FrameError: nothing here decodes this video, or it can no longer be read.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise FrameError("is of a codec that this installation of FFmpeg does not decode; re-encode it")
            stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
            yield from _decode(container.demux(stream))
    except (av.FFmpegError, OSError) as error:
        raise FrameError(f"cannot be read: {error.strerror or error}") from None


def _decode(packets: Iterator[av.Packet]) -> Iterator[tuple[int | None, av.VideoFrame | str]]:
    damage = -inf
    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.FFmpegError as error:
            damage = inf if packet.pts is None else packet.pts
            yield None, f"does not decode: {error.strerror or error}"
            continue
        for frame in frames:
            stamp = inf if frame.pts is None else frame.pts
            if frame.is_corrupt:
                damage = stamp
                yield frame.pts, "decodes with damage"
            elif damage > -inf and not (frame.key_frame and stamp > damage):
                yield frame.pts, "follows a damaged frame, from which it is predicted"
            else:
                damage = -inf
                yield frame.pts, frame


def to_image(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as an RGB image, turned as its container says."""
    try:
        image = frame.to_image()
    except (av.FFmpegError, ValueError) as error:
        raise FrameError(f"cannot be converted from {frame.format.name} to RGB: {error}") from None
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
