import av
import numpy as np
import pytest

from workbench.datasets import videos
from workbench.datasets.frames import FrameError
from workbench.datasets.videos import decode_video, numbered_frames, to_image, video_timestamps

CODECS = {
    "mpeg4.mp4": ("mpeg4", {}),
    "h264 with B frames.mp4": ("libx264", {"bf": "3"}),
    "h264.mkv": ("libx264", {}),
    "mpeg4 with B frames.avi": ("mpeg4", {"bf": "2", "b": "4M"}),
    "mjpeg.avi": ("mjpeg", {}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
}


@pytest.fixture(autouse=True)
def quiet():
    """FFmpeg writes its opinion of damaged files to the terminal."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    yield
    av.logging.set_level(level)


def grey(frame: av.VideoFrame) -> float:
    return float(np.asarray(to_image(frame)).mean())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_frame_comes_in_its_place(tmp_path, write_video, name, threads):
    codec, options = CODECS[name]
    path = write_video(tmp_path / name, codec, frames=20, **options)
    stamps = video_timestamps(path)
    assert len(stamps) == 20 and stamps == sorted(stamps)
    frames = list(numbered_frames(path, stamps, threads))
    assert [number for number, _ in frames] == list(range(20))
    shown = np.array([grey(frame) for _, frame in frames])
    assert np.abs(shown - (25 + 9 * np.arange(20))).max() < 5


def test_frames_without_timestamps_are_counted(tmp_path, write_video, monkeypatch):
    path = write_video(tmp_path / "a.mp4", "libx264", frames=6)
    assert [number for number, _ in numbered_frames(path, 6)] == list(range(6))
    with pytest.raises(FrameError, match=r"^gives a frame \(timestamp \d+\) that its container does not announce$"):
        list(numbered_frames(path, 5))
    monkeypatch.setattr(videos, "decode_video", lambda path, threads: iter([(None, "does not decode: bits")]))
    with pytest.raises(FrameError, match="^does not decode: bits; and it holds no timestamps that would place"):
        list(numbered_frames(path, 6))


def test_a_frame_the_container_does_not_announce_is_refused(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", "mpeg4", frames=6)
    with pytest.raises(FrameError, match=r"that its container does not announce$"):
        list(numbered_frames(path, video_timestamps(path)[:-1]))


def test_a_video_is_turned_as_its_container_says(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)  # counter-clockwise
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[:, :24] = 220
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    image = np.asarray(to_image(next(decode_video(tmp_path / "a.mp4"))[1]))
    assert image.shape == (48, 32, 3) and image[:20].max() < 40 and image[28:].min() > 180


# damage


@pytest.mark.parametrize("data", [b"", b"these are no pictures\n" * 40], ids=["empty", "rubbish"])
def test_what_is_no_video_is_refused(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(FrameError, match="^cannot be opened as a video: Invalid data found when processing input$"):
        video_timestamps(tmp_path / "a.mp4")


def test_a_video_that_is_gone_is_refused(tmp_path):
    with pytest.raises(FrameError, match="^cannot be opened as a video: No such file or directory$"):
        video_timestamps(tmp_path / "a.mp4")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(FrameError, match="^holds no video stream$"):
        video_timestamps(tmp_path / "a.mkv")


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mjpeg")])
def test_a_video_cut_short_is_refused_not_taken_for_a_shorter_one(tmp_path, write_video, name, codec):
    path = write_video(tmp_path / name, codec, frames=40, noise=30)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(FrameError) as error:
        video_timestamps(path)
    assert str(error.value).startswith("is cut short or damaged: its header announces 1.60 s, its frames end at 0.")
    assert str(error.value).endswith(" s; fetch it again, or re-encode what is left")


def test_an_mp4_without_its_index_is_refused(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", "libx264", frames=20)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FrameError, match="^cannot be opened as a video: Invalid data"):
        video_timestamps(path)


def test_sound_that_lasts_longer_does_not_make_a_video_cut_short(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        sound = container.add_stream("pcm_s16le", rate=8000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(5):
            picture = np.zeros((32, 48, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 4), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
    assert len(video_timestamps(tmp_path / "a.mkv")) == 5


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_predicted_from_a_damaged_one_are_left_out_up_to_the_next_key_frame(
    tmp_path, write_video, damage, codec
):
    options = {"g": "12", "bf": "0", "sc_threshold": "0" if codec == "libx264" else "1000000000"}
    path = write_video(tmp_path / "a.mp4", codec, frames=24, noise=40, **options)
    untouched = {n: grey(frame) for n, frame in numbered_frames(path, video_timestamps(path), 1)}
    damage(path, 5)
    stamps = video_timestamps(path)
    frames = list(numbered_frames(path, stamps, 1))
    good = {number: frame for number, frame in frames if not isinstance(frame, str)}
    assert len(stamps) == 24 and set(good) == {0, 1, 2, 3, 4, *range(12, 24)}
    assert {n: grey(frame) for n, frame in good.items()} == {n: untouched[n] for n in good}
    reasons = [reason for _, reason in frames if isinstance(reason, str)]
    assert any(reason.startswith(("does not decode: ", "decodes with damage")) for reason in reasons)
    assert "follows a damaged frame, from which it is predicted" in reasons


def test_damage_to_a_frame_that_none_is_predicted_from_costs_that_frame_alone(tmp_path, write_video, damage):
    path = damage(write_video(tmp_path / "a.avi", "mjpeg", frames=12, noise=40), 5)
    frames = numbered_frames(path, video_timestamps(path), 1)
    assert {number for number, frame in frames if not isinstance(frame, str)} == set(range(12)) - {5}


def test_a_codec_without_decoder_is_refused(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", "libx264", frames=6)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xqzw"))
    with pytest.raises(FrameError, match="^is of a codec that this installation of FFmpeg does not decode; re-encode"):
        list(decode_video(path))
