import numpy as np
import pytest
from PIL import Image

from workbench.datasets.cache import CacheSettings
from workbench.datasets.decoding import count_slots, decode_clip
from workbench.datasets.frames import FrameError


def test_a_folder_gives_its_frames_in_the_order_of_their_numbers(tmp_path, write_clips):
    clip = write_clips(tmp_path, {"a": 11}) / "a"
    frames = list(decode_clip(clip, CacheSettings(8), count_slots(clip, 1)))
    assert [frame.slot for frame in frames] == list(range(11))
    assert [frame.number for frame in frames] == list(range(1, 12))
    assert [frame.pixels[0, 0, 1] for frame in frames] == list(range(1, 12))
    assert frames[10].name == "img_00011.png" and not any(frame.grey or frame.reason for frame in frames)


@pytest.mark.parametrize("stride, numbers", [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [1, 3, 5, 7]), (3, [1, 4, 7]), (9, [1])])
def test_a_stride_keeps_every_nth_frame_from_the_first(tmp_path, write_clips, stride, numbers):
    clip = write_clips(tmp_path, {"a": 7}) / "a"
    assert count_slots(clip, stride) == len(numbers)
    frames = list(decode_clip(clip, CacheSettings(8, stride), len(numbers)))
    assert [(frame.slot, frame.number) for frame in frames] == list(enumerate(numbers))


@pytest.mark.parametrize("stride, numbers", [(1, list(range(10))), (4, [0, 4, 8])])
def test_a_video_gives_its_frames_counted_from_0(tmp_path, write_video, stride, numbers):
    path = write_video(tmp_path / "a.mp4", "libx264", frames=10, bf="2")
    assert count_slots(path, stride) == len(numbers)
    frames = list(decode_clip(path, CacheSettings(32, stride), len(numbers)))
    assert [(frame.slot, frame.number, frame.name) for frame in frames] == [
        (slot, number, str(number)) for slot, number in enumerate(numbers)
    ]
    shown = np.array([frame.pixels.mean() for frame in frames])
    assert np.abs(shown - (25 + 9 * np.array(numbers))).max() < 5
    assert frames[0].pixels.shape == (32, 32, 3)


def test_a_frame_that_does_not_decode_keeps_its_slot_empty(tmp_path, write_clips):
    clip = write_clips(tmp_path, {"a": 4}) / "a"
    (clip / "img_00002.png").write_bytes(b"")
    Image.new("L", (8, 8), 9).save(clip / "img_00003.png")
    frames = list(decode_clip(clip, CacheSettings(8), 4))
    assert [frame.pixels is None for frame in frames] == [False, True, False, False]
    assert (frames[1].slot, frames[1].name, frames[1].reason) == (1, "img_00002.png", "empty file (0 bytes)")
    assert [frame.grey for frame in frames] == [False, False, True, False]


def test_a_damaged_video_names_its_missing_frames(tmp_path, write_video, damage):
    path = damage(write_video(tmp_path / "a.avi", "mjpeg", frames=8, noise=40), 2)
    frames = {frame.number: frame for frame in decode_clip(path, CacheSettings(32), 8)}
    assert set(frames) == set(range(8))
    assert [n for n, frame in frames.items() if frame.pixels is None] == [2]
    assert frames[2].name == "2" and frames[2].slot == 2 and "decode" in frames[2].reason


def test_a_clip_that_cannot_be_listed_owns_one_slot_and_says_why(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.mp4").write_bytes(b"rubbish")
    assert count_slots(tmp_path / "a", 1) == count_slots(tmp_path / "b.mp4", 5) == 1
    with pytest.raises(FrameError, match="^no frames: "):
        list(decode_clip(tmp_path / "a", CacheSettings(8), 1))
    with pytest.raises(FrameError, match="^cannot be opened as a video: "):
        list(decode_clip(tmp_path / "b.mp4", CacheSettings(8), 1))


@pytest.mark.parametrize("counted", [3, 5])
def test_a_clip_that_changed_since_it_was_counted_does_not_run_into_its_neighbour(tmp_path, write_clips, counted):
    clip = write_clips(tmp_path, {"a": 4}) / "a"
    with pytest.raises(FrameError, match="^has changed since its frames were counted; start again$"):
        next(decode_clip(clip, CacheSettings(8), counted))


def test_a_video_below_image_size_is_refused_whole(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", "mpeg4", frames=5)
    with pytest.raises(FrameError, match="^is 48x32 px, below image_size=40: choose image_size of at most 32, or set"):
        list(decode_clip(path, CacheSettings(40), 5))
    enlarged = CacheSettings(40, allow_upscale=True)
    assert [frame.pixels.shape for frame in decode_clip(path, enlarged, 5)] == [(40, 40, 3)] * 5
