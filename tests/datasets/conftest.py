"""Small sources of clips whose every pixel is known."""

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


def colour(clip: int, number: int) -> tuple[int, int, int]:
    """The colour of a whole frame, which says where it comes from."""
    return 10 * clip + 5, number, 77


@pytest.fixture
def write_clips() -> Callable[..., Path]:
    """Writes folders of PNG frames, `lengths` giving the frames of each; frame n of the i-th is of `colour(i, n)`."""

    def write(folder: Path, lengths: dict[str, int], size: tuple[int, int] = (8, 8), first: int = 1) -> Path:
        for i, (name, length) in enumerate(lengths.items()):
            (folder / name).mkdir(parents=True)
            for n in range(first, first + length):
                Image.new("RGB", size, colour(i, n)).save(folder / name / f"img_{n:05d}.png")
        return folder

    return write


@pytest.fixture
def write_video() -> Callable[..., Path]:
    """Writes a video whose n-th frame has the grey value `brightness(n)`, with noise where damage is to be felt."""

    def write(
        path: Path, codec: str, frames: int = 12, size: tuple[int, int] = (48, 32), noise: int = 0, **options: str
    ) -> Path:
        rng = np.random.default_rng(0)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for n in range(frames):
                grey = brightness(n) + rng.integers(-noise, noise + 1, (size[1], size[0], 1))
                picture = np.clip(grey, 0, 255).astype(np.uint8).repeat(3, 2)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture
def damage() -> Callable[[Path, int], Path]:
    """Overwrites most of the n-th packet of a video with zeros, in place."""

    def overwrite(path: Path, n: int) -> Path:
        with av.open(str(path)) as container:
            packet = [packet for packet in container.demux(video=0) if packet.size][n]
            start, size = packet.pos, packet.size
        data = bytearray(path.read_bytes())
        where = data.index(bytes(packet), start)
        data[where + size // 4 : where + size] = bytes(size - size // 4)
        path.write_bytes(bytes(data))
        return path

    return overwrite


def brightness(number: int) -> int:
    """Grey value of the n-th frame of a video: 9 apart, more than a codec's error."""
    return 25 + 9 * number


@pytest.fixture
def write_labels() -> Callable[..., Path]:
    """Writes label files as Something-Something v2 names and fills them, from the ids of each split."""

    def write(folder: Path, **ids: list[str]) -> Path:
        folder.mkdir(exist_ok=True)
        for split, names in ids.items():
            entries = [{"id": name} for name in names]
            if split != "test":
                entries = [
                    {
                        "id": name,
                        "label": f"pushing cup {name} from left to right",
                        "template": "Pushing [something] from left to right",
                        "placeholders": [f"cup {name}"],
                    }
                    for name in names
                ]
            (folder / f"something-something-v2-{split}.json").write_text(json.dumps(entries))
        return folder

    return write
