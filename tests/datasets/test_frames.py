import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.datasets.frames import (
    DataError,
    FrameError,
    clip_name,
    crop_square,
    frame_number,
    list_frames,
    load_image,
    scan_source,
)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def picture(width: int, height: int) -> Image.Image:
    """Red rises by 4 per column, green by 4 per row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 4 * np.arange(width)
    pixels[..., 1] = 4 * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    """A 16 x 16 PNG of 16 bits per channel, of which Pillow writes only grey ones."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x12\x34" * 16 * channels) * 16
    header = struct.pack(">IIBBBBB", 16, 16, 16, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# the order of frames


@pytest.mark.parametrize(
    "name, number",
    [
        ("img_00001.jpg", 1),
        ("00012.png", 12),
        ("frame-3.jpg", 3),
        ("frame-10.jpg", 10),
        ("cam2_take7_0042.jpeg", 42),
        ("1699999999999999999.jpg", 1699999999999999999),
        ("7.v2.png", 2),
        ("cover.jpg", None),
        ("cover.mp4.jp2", 4),
    ],
)
def test_a_frame_is_numbered_by_the_last_number_before_its_ending(name, number):
    assert frame_number(name) == number


@pytest.mark.parametrize(
    "names",
    [
        ["img_00001.jpg", "img_00002.jpg", "img_00010.jpg"],
        ["00001.png", "00002.png", "00010.png"],
        ["frame-8.jpg", "frame-9.jpg", "frame-10.jpg", "frame-11.JPG", "frame-100.webp"],
        ["b1.bmp", "a2.jpeg", "0003.png"],
    ],
)
def test_frames_are_ordered_by_number_not_by_name(tmp_path, names):
    touch(tmp_path, *reversed(names), "notes1.txt", ".hidden_5.jpg", "Thumbs.db")
    assert list_frames(tmp_path) == [(frame_number(name), name) for name in names]


@pytest.mark.parametrize(
    "names, message",
    [
        (["img_1.jpg", "img_0001.png"], "frames 'img_0001.png' and 'img_1.jpg' have the same number 1: rename one"),
        (
            ["img_1.jpg", "cover.jpg"],
            "frame 'cover.jpg' has no number in its name: frames are ordered by it; rename it",
        ),
        (["img_99999999999999999999.jpg"], "has a number above 9223372036854775807: rename it"),
        (["a.txt"], "no frames: the folder holds no file ending in .jpg, .jpeg, .png, .bmp, .webp"),
        ([], "no frames: the folder holds no file ending in .jpg"),
    ],
)
def test_frames_that_cannot_be_ordered_are_refused(tmp_path, names, message):
    with pytest.raises(FrameError) as error:
        list_frames(touch(tmp_path / "clip", *names))
    assert message in str(error.value)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    with pytest.raises(FrameError, match="^the folder cannot be listed: No such file or directory$"):
        list_frames(tmp_path / "gone")


# size and crop


@pytest.mark.parametrize("width, height, left, top", [(12, 8, 2, 0), (8, 12, 0, 2), (11, 8, 1, 0), (8, 8, 0, 0)])
def test_without_resizing_the_centre_is_cut_out_pixel_for_pixel(width, height, left, top):
    image = picture(width, height)
    expected = np.asarray(image)[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(crop_square(image, 8, False), expected)


def test_the_shorter_side_is_resized_before_the_centre_is_cropped():
    """Averaging pairs of a ramp gives the ramp between them, away from the picture's edges."""
    pixels = crop_square(picture(48, 32), 16, False)[2:-2, 2:-2].astype(int)
    column, row = np.arange(2, 14), np.arange(2, 14)
    assert np.abs(pixels[..., 0] - 4 * (8 + 2 * column + 0.5)).max() <= 1
    assert np.abs(pixels[..., 1] - 4 * (2 * row + 0.5)[:, None]).max() <= 1


def test_shrinking_averages_rather_than_picks_pixels():
    checks = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(crop_square(checks, 8, False).astype(int) - 127).max() <= 2


def test_a_frame_below_image_size_is_refused_and_enlarged_only_on_request():
    message = r"^is 40x7 px, below image_size=8: choose image_size of at most 7, or set allow_upscale: true$"
    with pytest.raises(FrameError, match=message):
        crop_square(picture(40, 7), 8, False)
    assert (crop_square(Image.new("RGB", (40, 7), (9, 8, 7)), 8, True) == (9, 8, 7)).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    (tmp_path / "1.png").write_bytes(encoded(picture(8, 8), "PNG", exif=exif))
    expected = np.rot90(np.asarray(picture(8, 8)), -1)
    np.testing.assert_array_equal(load_image(tmp_path / "1.png", 8, False)[0], expected)


# colours


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_fills_three_channels_and_is_counted(tmp_path, mode):
    value = {"L": 90, "1": 255, "LA": (90, 255)}[mode]
    Image.new(mode, (8, 8), {"1": 1}.get(mode, value)).save(tmp_path / "1.png")
    pixels, grey = load_image(tmp_path / "1.png", 8, False)
    assert grey and pixels.shape == (8, 8, 3) and (pixels == np.atleast_1d(value)[0]).all()


@pytest.mark.parametrize("mode, kind", [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp"), ("RGB", "webp")])
def test_eight_bit_colours_are_read_as_they_are(tmp_path, mode, kind):
    image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"1.{kind}", **({"lossless": True} if kind == "webp" else {}))
    pixels, grey = load_image(tmp_path / f"1.{kind}", 8, False)
    assert not grey and (pixels == (200, 100, 50)).all()


def refused_pictures() -> dict[str, tuple[bytes, str]]:
    clear = Image.new("RGBA", (16, 16), (1, 2, 3, 255))
    clear.putpixel((3, 3), (1, 2, 3, 254))
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    sixteen = "has 16 bits per channel: convert it to 8 bits first"
    see_through = "has transparent pixels: flatten it on a background first"
    return {
        "cmyk": (encoded(Image.new("CMYK", (16, 16)), "JPEG"), "has print colours (CMYK): convert it to RGB"),
        "16 bit grey": (png_of_16_bits(0, 1), sixteen),
        "16 bit colour": (png_of_16_bits(2, 3), sixteen),
        "16 bit grey and alpha": (png_of_16_bits(4, 2), sixteen),
        "16 bit colour and alpha": (png_of_16_bits(6, 4), sixteen),
        "transparent": (encoded(clear, "PNG"), see_through),
        "transparent palette": (encoded(palette, "PNG", transparency=1), see_through),
        "zero bytes": (b"", "empty file (0 bytes)"),
        "truncated jpeg": (jpeg[:-200], "does not decode: image file is truncated"),
        "truncated png": (png[: len(png) - 30], "does not decode: "),
        "truncated header": (png[:20], "does not decode: "),
        "text": (b"these are no pixels\n" * 9, "does not decode: not an image (JPEG, PNG, BMP, WEBP)"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "does not decode: not an image"),
        "small": (encoded(picture(7, 20), "PNG"), "is 7x20 px, below image_size=8"),
    }


@pytest.mark.parametrize("name", refused_pictures())
def test_a_picture_that_cannot_be_used_says_why(tmp_path, name):
    data, reason = refused_pictures()[name]
    (tmp_path / "1.jpg").write_bytes(data)
    with pytest.raises(FrameError) as error:
        load_image(tmp_path / "1.jpg", 8, False)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)


def test_a_frame_that_is_gone_or_a_folder_says_why(tmp_path):
    (tmp_path / "2.jpg").mkdir()
    for name, reason in {"1.jpg": "No such file or directory", "2.jpg": "Is a directory"}.items():
        with pytest.raises(FrameError, match=f"^does not decode: {reason}$"):
            load_image(tmp_path / name, 8, False)


# sources


def test_clips_are_folders_and_videos_sorted_by_name(tmp_path):
    touch(tmp_path, "9.webm", "b.MP4", "labels.json", ".DS_Store")
    touch(tmp_path / "a.v1", "1.jpg")
    (tmp_path / ".cache").mkdir()
    clips = scan_source(tmp_path)
    assert [clip[0] for clip in clips] == ["9.webm", "a.v1", "b.MP4"]
    assert [clip_name(clip[0]) for clip in clips] == ["9", "a.v1", "b"]
    assert clips[0][1:] == ((tmp_path / "9.webm").stat().st_mtime_ns, 0)
    (tmp_path / "9.webm").write_bytes(b"longer")
    assert scan_source(tmp_path)[0] != clips[0]


def test_a_video_is_a_source_of_one_clip(tmp_path):
    (tmp_path / "take.MKV").write_bytes(b"abc")
    assert scan_source(tmp_path / "take.MKV") == [("take.MKV", (tmp_path / "take.MKV").stat().st_mtime_ns, 3)]


def test_a_link_to_nothing_is_a_clip_that_will_be_reported(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "a.mp4")
    assert scan_source(tmp_path) == [("a.mp4", 0, 0)]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "the folder is empty; it must hold one folder of frames, or one video, per clip"),
        (
            ["a.txt", "b.csv"],
            "no clips found (a folder of frames or a video each); it holds 2 other files, such as 'a.txt'",
        ),
        (["1.jpg", "2.PNG", "x.txt"], "it holds 2 images itself: put the frames of each clip into a folder of its own"),
    ],
)
def test_a_folder_without_clips_is_refused(tmp_path, names, message):
    with pytest.raises(DataError) as error:
        scan_source(touch(tmp_path / "data", *names))
    assert str(error.value).startswith(f"data='{tmp_path}/data': ") and message in str(error.value)


@pytest.mark.parametrize("name", ["absent", "archive.zip"])
def test_a_source_that_is_neither_folder_nor_video_is_refused(tmp_path, name):
    (tmp_path / "archive.zip").touch()
    with pytest.raises(DataError) as error:
        scan_source(tmp_path / name)
    rule = "no such folder, and no video (.webm, .mp4, .avi, .mkv); correct the path"
    assert str(error.value) == f"data='{tmp_path}/{name}': {rule}"


@pytest.mark.parametrize("second", ["a", "a.webm"])
def test_two_clips_of_the_same_name_are_refused(tmp_path, second):
    touch(tmp_path, "a.mp4", "b.mp4")
    touch(tmp_path, second) if "." in second else (tmp_path / second).mkdir()
    first, last = sorted(["a.mp4", second])
    with pytest.raises(DataError, match=f"'{first}' and '{last}' are two clips of the name 'a'; rename one$"):
        scan_source(tmp_path)


def test_a_clip_whose_name_is_not_utf8_is_refused_before_anything_is_decoded(tmp_path):
    (tmp_path / "grün").mkdir()
    assert scan_source(tmp_path)[0][0] == "grün"
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"the name of clip 'caf\\udce9' is not UTF-8; rename it$"):
        scan_source(tmp_path)
