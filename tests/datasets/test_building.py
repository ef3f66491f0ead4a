import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.datasets import building, cache
from workbench.datasets.building import open_cache
from workbench.datasets.cache import CacheSettings, read_broken
from workbench.datasets.frames import DataError

FINISHED = ["broken.csv", "cache.json", "crc.npy", "frames.u8", "hashes.npy", "names.npy", "number.npy", "start.npy"]
LENGTHS = {"a": 3, "b": 1, "c": 4, "d": 2, "e": 3, "f": 2}


@pytest.fixture
def source(tmp_path, write_clips) -> Path:
    return write_clips(tmp_path / "data", LENGTHS)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the clips that get decoded, as they are."""
    names, decode = [], building.decode_clip

    def recorded(path, *args):
        names.append(path.name)
        return decode(path, *args)

    monkeypatch.setattr(building, "decode_clip", recorded)
    return names


def opened(source: Path, settings: CacheSettings | None = None, limit: float = 0.5, workers: int = 2):
    return open_cache(source, source.parent / "cache", settings or CacheSettings(8), limit, workers)


def fingerprint(source: Path, **options) -> str:
    return opened(source, **options).meta["fingerprint"]


def partials(source: Path) -> list[Path]:
    return sorted((source.parent / "cache").glob("*.partial"))


# what is built


def test_the_cache_holds_every_frame_in_order(source, capsys):
    cache = opened(source)
    assert sorted(path.name for path in cache.folder.iterdir()) == FINISHED and not partials(source)
    assert cache.start.tolist() == [0, 3, 4, 8, 10, 13, 15] and cache.clip_names() == list(LENGTHS)
    origin = np.repeat(np.arange(6), list(LENGTHS.values()))
    assert (cache.frames[:, 0, 0, 0] == 10 * origin + 5).all()
    assert (cache.frames[:, 0, 0, 1] == cache.number).all()
    assert cache.number.tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 1, 2, 1, 2, 3, 1, 2]
    assert f"decoding 15 frames of 6 clips into {cache.folder}: 0.00 GB, " in capsys.readouterr().out


def test_folders_and_videos_stand_side_by_side(source, write_video):
    write_video(source / "bb.mp4", "libx264", frames=5)
    write_video(source / "z.webm", "libvpx-vp9", frames=4)
    cache = opened(source)
    assert cache.clip_names() == ["a", "b", "bb", "c", "d", "e", "f", "z"]
    assert cache.number[4:9].tolist() == [0, 1, 2, 3, 4]
    assert np.abs(cache.frames[4:9].mean((1, 2, 3)) - (25 + 9 * np.arange(5))).max() < 5


def test_the_fingerprint_is_of_names_and_pixels_not_of_the_place(source, tmp_path):
    original = fingerprint(source)
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copytree(source, tmp_path / "elsewhere" / "other name"))
    assert fingerprint(copy, workers=1) == original
    assert fingerprint(copy, settings=CacheSettings(8, 2)) != original
    Image.new("RGB", (8, 8), (0, 0, 1)).save(copy / "c" / "img_00002.png")
    os.utime(copy / "c")
    changed = fingerprint(copy)
    assert changed != original
    (copy / "c").rename(copy / "cc")
    assert fingerprint(copy) not in (original, changed)


def test_grey_frames_are_counted(source):
    for clip, number in (("a", 2), ("c", 1), ("c", 4)):
        Image.new("L", (8, 8), 9).save(source / clip / f"img_{number:05d}.png")
    assert opened(source).meta["grey_frames"] == 3


# a second opening


def test_a_second_opening_decodes_nothing(source, decoded):
    first = opened(source)
    assert sorted(decoded) == list(LENGTHS)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = opened(source)
    assert second.meta == first.meta and len(decoded) == len(LENGTHS)
    assert {path: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before


def test_a_changed_listing_gets_a_cache_of_its_own(source, write_clips, decoded):
    first = opened(source)
    write_clips(source, {"bb": 2})
    second = opened(source)
    assert second.folder != first.folder and second.clip_names() == ["a", "b", "bb", "c", "d", "e", "f"]
    shutil.rmtree(source / "bb")
    assert opened(source).folder == first.folder and len(decoded) == 6 + 7


def test_a_stricter_limit_holds_for_a_finished_cache_too(source):
    """What is mended in place does not change the listing, and so not the cache."""
    frame = source / "c" / "img_00002.png"
    good = frame.read_bytes()
    frame.write_bytes(b"")
    folder = opened(source, limit=0.1).folder
    frame.write_bytes(good)
    with pytest.raises(DataError) as error:
        opened(source, limit=0.05)
    told = "1 of 15 frames and 0 of 6 whole clips are broken, more than max_broken_fraction=0.05: c/img_00002.png empty"
    assert str(error.value).startswith(told)
    assert str(error.value).endswith(f"; mend or remove them, and delete {folder}, or raise max_broken_fraction")
    shutil.rmtree(folder)
    assert opened(source, limit=0.05).meta["broken_frames"] == 0


# broken frames


def test_a_broken_frame_is_left_out_and_nothing_takes_its_place(source):
    untouched = opened(source)
    whole = untouched.frames[:].copy(), untouched.number[:].copy()
    jpeg = source / "c" / "img_00002.png"
    jpeg.write_bytes(jpeg.read_bytes()[:-30])
    (source / "e" / "img_00003.png").write_bytes(b"no pixels at all")
    os.utime(source / "c")
    cache = opened(source)
    assert np.flatnonzero(cache.number == -1).tolist() == [5, 12] and cache.meta["broken_frames"] == 2
    good = cache.number != -1
    assert (cache.frames[good] == whole[0][good]).all() and (cache.number[good] == whole[1][good]).all()
    assert (cache.frames[~good] == 0).all()
    rows = read_broken(cache.folder / "broken.csv")
    assert [(row["clip"], row["frame"]) for row in rows] == [("c", "img_00002.png"), ("e", "img_00003.png")]
    assert rows[1]["reason"] == "does not decode: not an image (JPEG, PNG, BMP, WEBP)"


def test_clips_of_which_nothing_can_be_used_own_one_empty_slot(source, write_video):
    (source / "aa").mkdir()
    (source / "g").mkdir()
    (source / "g" / "cover.png").touch()
    (source / "h.mp4").write_bytes(b"rubbish" * 99)
    cut = write_video(source / "i.mkv", "libx264", frames=40, noise=30)
    cut.write_bytes(cut.read_bytes()[:3000])
    cache = opened(source)
    reasons = {
        row["clip"]: (row["frame"], row["reason"].partition(":")[0]) for row in read_broken(cache.folder / "broken.csv")
    }
    assert reasons == {
        "aa": ("", "no frames"),
        "g": ("", "frame 'cover.png' has no number in its name"),
        "h": ("", "cannot be opened as a video"),
        "i": ("", "is cut short or damaged"),
    }
    assert (cache.meta["broken_clips"], cache.meta["broken_frames"], cache.meta["slots"]) == (4, 4, 19)
    names = cache.clip_names()
    assert [cache.number[cache.start[names.index(name)]] for name in reasons] == [-1] * 4


def test_a_clip_given_up_half_way_leaves_nothing_behind(source, monkeypatch):
    decode = building.decode_clip

    def given_up(path, *args):
        for frame in decode(path, *args):
            yield frame
            if path.name == "c" and frame.slot == 1:
                raise building.FrameError("gives a frame that its container does not announce")

    untouched = opened(source).meta["grey_frames"]
    monkeypatch.setattr(building, "decode_clip", given_up)
    cache = opened(source, CacheSettings(8, allow_upscale=True))
    assert cache.number[4:8].tolist() == [-1] * 4 and (cache.number[8:] > 0).all()
    assert np.load(cache.folder / "crc.npy")[2] == 0 and cache.meta["grey_frames"] == untouched
    assert [row["frame"] for row in read_broken(cache.folder / "broken.csv")] == [""]


def test_too_many_broken_frames_stop_the_run_and_mending_in_place_goes_on(source, decoded):
    jpeg = source / "c" / "img_00002.png"
    good = jpeg.read_bytes()
    jpeg.write_bytes(b"")
    with pytest.raises(DataError) as error:
        opened(source, limit=0.01)
    report = partials(source)[0] / "broken.csv"
    assert str(error.value) == (
        "1 of 15 frames and 0 of 6 whole clips are broken, more than max_broken_fraction=0.01: c/img_00002.png empty "
        f"file (0 bytes). All found so far are listed in {report}; mend or remove them, or raise max_broken_fraction"
    )
    del decoded[:]
    jpeg.write_bytes(good)
    cache = opened(source, limit=0.01)
    assert decoded == ["c"] and not partials(source)
    assert cache.meta["broken_frames"] == 0 and read_broken(cache.folder / "broken.csv") == []
    shutil.copytree(source, source.parent / "copy")
    assert fingerprint(source.parent / "copy") == cache.meta["fingerprint"]


def test_a_mended_frame_that_comes_as_a_new_file_costs_its_clip_alone(source, decoded):
    jpeg = source / "c" / "img_00002.png"
    good = jpeg.read_bytes()
    jpeg.write_bytes(b"")
    with pytest.raises(DataError):
        opened(source, limit=0.01)
    del decoded[:]
    (source / "new").write_bytes(good)
    os.replace(source / "new", jpeg)  # changes the folder's modification time, and with it the listing
    os.utime(source / "e")
    opened(source, limit=0.01)
    assert sorted(decoded) == ["c", "e"] and not partials(source)


@pytest.mark.parametrize("remove", ["frame", "clip"])
def test_removing_what_is_broken_begins_anew_and_leaves_no_rest(source, decoded, remove):
    jpeg = source / "c" / "img_00002.png"
    jpeg.write_bytes(b"")
    with pytest.raises(DataError):
        opened(source, limit=0.01)
    del decoded[:]
    jpeg.unlink() if remove == "frame" else shutil.rmtree(source / "c")
    cache = opened(source, limit=0.01)
    kept = [1, 3, 4] if remove == "frame" else []
    assert cache.number.tolist() == [1, 2, 3, 1, *kept, 1, 2, 1, 2, 3, 1, 2]
    assert (cache.frames[:, 0, 0, 1] == cache.number).all()
    assert len(decoded) == (6 if remove == "frame" else 5) and not partials(source)


def test_a_clip_that_could_not_be_counted_at_first_is_counted_again(source, monkeypatch):
    count = building.count_slots
    with monkeypatch.context() as patch, pytest.raises(DataError, match="c has changed since its frames were counted"):
        patch.setattr(building, "count_slots", lambda path, stride: 1 if path.name == "c" else count(path, stride))
        opened(source, limit=0.01)
    assert opened(source, limit=0.01).meta["slots"] == 15


def test_raising_the_limit_goes_on_from_where_it_stopped(source, decoded):
    (source / "c" / "img_00002.png").write_bytes(b"")
    with pytest.raises(DataError):
        opened(source, limit=0.01)
    del decoded[:]
    assert opened(source, limit=0.1).meta["broken_frames"] == 1
    assert decoded == ["c"]


def test_systematic_damage_stops_the_run_early(source, decoded, monkeypatch):
    decode, check, refused = building.decode_clip, building.check_broken, threading.Event()

    def late(path, *args):
        if path.name > "c":  # more than half is broken before
            assert refused.wait(60)
            time.sleep(0.2)
        return decode(path, *args)

    def checked(*args):
        try:
            check(*args)
        finally:
            refused.set()

    monkeypatch.setattr(building, "decode_clip", late)
    monkeypatch.setattr(building, "check_broken", checked)
    monkeypatch.setattr(building, "COMMIT_EVERY_BYTES", 0)
    with pytest.raises(
        DataError, match=r"a/img_00001.png is 8x8 px, below image_size=16: choose image_size of at most 8"
    ):
        opened(source, CacheSettings(16), workers=1)
    assert {"a", "b", "c"} <= set(decoded) and "f" not in decoded


def test_small_frames_are_enlarged_on_request(source):
    assert opened(source, CacheSettings(16, allow_upscale=True)).frames[0].max() == 77


@pytest.mark.parametrize("lengths, clip", [({"a": 3}, "a"), ({"a": 1}, "a")])
def test_where_nothing_is_left_the_run_stops_whatever_the_limit(tmp_path, write_clips, lengths, clip):
    source = write_clips(tmp_path / "data", lengths)
    for path in (source / clip).iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="whole clips are broken, and none is left: a/img_00001.png empty file"):
        opened(source, limit=1.0)


# kills


KILLED = """
import os, signal, sys
from pathlib import Path
from workbench.datasets import building
building.COMMIT_EVERY_BYTES = 0
name, call = sys.argv[2], int(sys.argv[3])
owner = building.os if name == "replace" else Path if name == "unlink" else building
real, calls = getattr(owner, name), []
def kill(*args, **options):
    calls.append(1)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
setattr(owner, name, kill)
source = Path(sys.argv[1])
building.open_cache(source, source.parent / "cache", building.CacheSettings(8), 0.5, 1)
"""


@pytest.mark.parametrize(
    "function, call, finished",
    [
        ("save_array", 1, 0),  # counted, not yet noted
        ("growing_array", 3, 0),  # the files half made
        ("write_broken", 1, 0),  # decoded, not yet marked as done
        ("write_broken", 4, 3),  # some done
        ("save_array", 3, 6),  # all decoded, half described
        ("unlink", 1, 6),  # finished, not yet tidied up
    ],
)
def test_a_killed_build_goes_on_from_the_clips_that_were_finished(source, decoded, function, call, finished):
    shutil.copytree(source, source.parent / "undisturbed" / "data")
    (source / "c" / "img_00002.png").write_bytes(b"")
    shutil.copytree(source, source.parent / "undisturbed" / "data", dirs_exist_ok=True)
    command = [sys.executable, "-c", KILLED, str(source), function, str(call)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    marks = source.parent.glob("cache/*/done.npy")
    done = next((np.load(path) for path in marks), np.zeros(6, np.uint8))
    assert done.sum() == finished and bool(partials(source)) == (function != "unlink")
    cache = opened(source)
    again = {
        name for name, mark in zip(LENGTHS, done, strict=True) if not mark or name == "c"
    }  # c may have been mended
    assert sorted(decoded) == sorted(again if function != "unlink" else [])
    assert not partials(source) and set(FINISHED) <= {path.name for path in cache.folder.iterdir()}
    assert read_broken(cache.folder / "broken.csv") == [
        {"clip": "c", "frame": "img_00002.png", "reason": "empty file (0 bytes)"}
    ]
    assert cache.meta["fingerprint"] == fingerprint(source.parent / "undisturbed" / "data")


# several processes, and disks


PAUSED = """
import sys, time
from pathlib import Path
from workbench.datasets import building
source, decode = Path(sys.argv[1]), building.decode_clip
def paused(path, *args):
    (source.parent / "started").touch()
    while not (source.parent / "go").exists():
        time.sleep(0.01)
    return decode(path, *args)
building.decode_clip = paused
building.open_cache(source, source.parent / "cache", building.CacheSettings(8), 0.5, 1)
"""


def test_a_second_process_waits_for_the_first_and_uses_its_cache(source, decoded, monkeypatch):
    waiting, flock, found = threading.Event(), cache.fcntl.flock, []

    def watched(handle, mode: int) -> None:
        if not mode & cache.fcntl.LOCK_NB:
            waiting.set()
        flock(handle, mode)

    monkeypatch.setattr(cache.fcntl, "flock", watched)
    first = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(source)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (source.parent / "started").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    second = threading.Thread(target=lambda: found.append(opened(source)))
    second.start()
    assert waiting.wait(60) and not found
    (source.parent / "go").touch()
    second.join(60)
    assert first.wait(60) == 0 and found[0].number.shape == (15,) and decoded == []


@pytest.mark.parametrize("where", ["in a thread", "outside"])
def test_no_thread_writes_after_a_build_has_failed(source, monkeypatch, where):
    """A pixel written into a file that is closed by then could land in any file opened after it."""
    decode, write, close = building.decode_clip, os.pwrite, os.close
    writing, closed, late = threading.Event(), [], []

    def fail(*args):
        assert writing.wait(60)
        raise RuntimeError("unforeseen")

    def fails(path, *args):
        if path.name == "a" and where == "in a thread":
            fail()
        yield from decode(path, *args)

    def slow_write(file, data, offset):
        writing.set()
        time.sleep(0.2)
        late.append(file in closed)
        return write(file, data, offset)

    monkeypatch.setattr(building, "COMMIT_EVERY_BYTES", 0)
    monkeypatch.setattr(building.CacheBuild, "_commit", fail)
    monkeypatch.setattr(building, "decode_clip", fails)
    monkeypatch.setattr(building.os, "pwrite", slow_write)
    monkeypatch.setattr(building.os, "close", lambda file: (closed.append(file), close(file)))
    with pytest.raises(RuntimeError, match="unforeseen"):
        opened(source)
    time.sleep(0.3)
    assert closed and late and not any(late)


def test_a_build_that_is_interrupted_neither_waits_for_long_clips_nor_keeps_halves_of_them(source, monkeypatch):
    decode, commit, begun = building.decode_clip, building.CacheBuild._commit, threading.Event()
    waited = []

    def endless(path, *args):
        for frame in decode(path, *args):
            if path.name == "c" and frame.slot == 1:
                begun.set()
                for _ in range(6000):
                    time.sleep(0.01)
                    yield frame
                waited.append(path)
            yield frame

    def interrupted(self, pending):
        commit(self, pending)
        assert begun.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "COMMIT_EVERY_BYTES", 0)
        patch.setattr(building, "decode_clip", endless)
        patch.setattr(building.CacheBuild, "_commit", interrupted)
        opened(source)
    assert np.load(partials(source)[0] / "done.npy").sum() == 1 and not waited
    cache = opened(source)
    assert cache.meta["broken_frames"] == 0 and (cache.frames[:, 0, 0, 1] == cache.number).all()


def test_a_disk_too_small_is_noticed_before_anything_is_decoded(source, decoded, monkeypatch):
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError) as error:
        opened(source)
    folder = source.parent / "cache"
    assert str(error.value) == (
        f"the frame cache needs 0.00 GB, and {folder} has 0.00 GB free: set cache_dir to a larger disk, lower "
        "image_size, or raise cache_stride"
    )
    assert decoded == [] and not list(folder.glob("*/frames.u8"))
    usage.free = 15 * 192 * 2
    assert opened(source).meta["slots"] == 15


def test_a_resumed_build_needs_room_only_for_what_is_missing(source, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(DataError, match="damaged"):
        patch.setattr(building.CacheBuild, "_finish", lambda self: None)
        opened(source)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage)
    assert opened(source).meta["slots"] == 15


@pytest.mark.parametrize("how", ["short", "error"])
def test_a_disk_that_fills_up_stops_the_run_and_room_lets_it_go_on(source, monkeypatch, decoded, how):
    write, calls = os.pwrite, []

    def full(file, data, offset):
        calls.append(1)
        if len(calls) < 6:
            return write(file, data, offset)
        if how == "short":
            return write(file, data[:10], offset)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(building, "COMMIT_EVERY_BYTES", 0)
    monkeypatch.setattr(building.os, "pwrite", full)
    with pytest.raises(
        DataError, match=f"^the disk of {source.parent}/cache is full .* make room and start again, it goes"
    ):
        opened(source, workers=1)
    monkeypatch.setattr(building.os, "pwrite", write)
    del decoded[:]
    cache = opened(source)
    assert "a" not in decoded and (cache.frames[:, 0, 0, 1] == cache.number).all()


def test_a_cache_folder_that_cannot_be_made_is_refused(source):
    (source.parent / "file").touch()
    with pytest.raises(
        DataError, match="^cache_dir='.*/file/cache': cannot be made .*; set cache_dir to a folder that you"
    ):
        open_cache(source, source.parent / "file" / "cache", CacheSettings(8), 0.0)


def test_the_listing_of_an_unfinished_build_is_kept_beside_it(source):
    (source / "c" / "img_00002.png").write_bytes(b"")
    with pytest.raises(DataError):
        opened(source, limit=0.01)
    listing = json.loads((partials(source)[0] / "listing.json").read_text())
    assert [entry for entry, _, _ in listing] == list(LENGTHS)
