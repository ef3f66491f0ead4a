import csv
import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from workbench.datasets import cache
from workbench.datasets.building import open_cache
from workbench.datasets.cache import (
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
from workbench.datasets.frames import DataError


@pytest.fixture
def finished(tmp_path, write_clips) -> FrameCache:
    write_clips(tmp_path / "data", {"a": 3, "b": 2})
    return open_cache(tmp_path / "data", tmp_path / "cache", CacheSettings(8), 0.0, 1)


def test_an_opened_cache_gives_pixels_and_index(finished):
    assert finished.start.tolist() == [0, 3, 5] and finished.number.tolist() == [1, 2, 3, 1, 2]
    assert finished.clip_names() == ["a", "b"]
    pixels = finished.read(np.array([4, 0]))
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 8, 8, 3)
    assert (pixels[0] == (15, 2, 77)).all() and (pixels[1] == (5, 1, 77)).all()


def test_an_opened_cache_cannot_be_written(finished):
    for array in (finished.frames, finished.number, finished.start):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    finished.read(np.array([0]))[:] = 0  # a copy
    assert (finished.read(np.array([0])) == (5, 1, 77)).all()


def test_pixels_of_another_length_are_noticed(finished):
    with (finished.folder / "frames.u8").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(DataError) as error:
        FrameCache.open(finished.folder)
    folder = finished.folder
    assert str(error.value) == f"{folder}/frames.u8 has 961 bytes, expected 960: delete {folder} to decode again"


@pytest.mark.parametrize("name", ["cache.json", "frames.u8", "number.npy", "names.npy"])
@pytest.mark.parametrize("how", ["gone", "empty", "rubbish"])
def test_a_damaged_cache_is_refused_with_the_remedy(finished, name, how):
    path = finished.folder / name
    path.unlink()
    if how != "gone":
        path.write_bytes(b"" if how == "empty" else b"rubbish" * 9)
    with pytest.raises(DataError, match=f"{finished.folder}.*delete .*to decode again$"):
        FrameCache.open(finished.folder)


# where a cache is


def test_every_setting_and_listing_has_a_cache_of_its_own(tmp_path):
    source, clips = tmp_path / "v1.0", [("a", 1, 0), ("b", 2, 0)]
    source.mkdir()
    folders = {
        cache_folders(source, tmp_path, settings, listing)[0]
        for settings in (CacheSettings(8), CacheSettings(16), CacheSettings(8, 2), CacheSettings(8, 1, True))
        for listing in (clips, clips[:1], [("a", 1, 0), ("b", 3, 0)], [("a", 1, 0), ("b", 2, 5)])
    }
    assert len(folders) == 16 and all(folder.name.startswith("v1.0-") for folder in folders)
    final, partial = cache_folders(source, tmp_path, CacheSettings(8), clips)
    assert final == cache_folders(source, tmp_path, CacheSettings(8), list(clips))[0]
    assert partial == cache_folders(source, tmp_path, CacheSettings(8), clips[:1])[1]
    assert partial != cache_folders(tmp_path, tmp_path, CacheSettings(8), clips)[1]


# too much that is broken


@pytest.fixture
def report(tmp_path) -> Path:
    write_broken(
        tmp_path / "broken.csv", [("a", "1.png", "empty"), ("b", "", "no frames"), ("c", "3", "x"), ("d", "4", "y")]
    )
    return tmp_path / "broken.csv"


def test_a_share_up_to_the_limit_is_accepted(report):
    check_broken((1, 100), (0, 5), 0.01, report)
    check_broken((0, 1), (0, 1), 0.0, report)
    check_broken((99, 100), (4, 5), 1.0, report)


@pytest.mark.parametrize("frames, clips", [((2, 100), (0, 5)), ((0, 100), (1, 99))])
def test_a_share_above_the_limit_is_refused_with_the_first_reasons(report, frames, clips):
    with pytest.raises(DataError) as error:
        check_broken(frames, clips, 0.01, report)
    assert str(error.value) == (
        f"{frames[0]} of {frames[1]} frames and {clips[0]} of {clips[1]} whole clips are broken, more than "
        f"max_broken_fraction=0.01: a/1.png empty; b no frames; c/3 x. All found so far are listed in {report}; mend "
        "or remove them, or raise max_broken_fraction"
    )


def test_where_nothing_is_left_no_limit_helps(report):
    with pytest.raises(
        DataError, match="^5 of 5 frames and 1 of 1 whole clips are broken, and none is left: "
    ) as error:
        check_broken((5, 5), (1, 1), 1.0, report)
    assert str(error.value).endswith("; mend or remove them")


# files


def test_a_report_survives_commas_quotes_and_names_that_are_no_utf8(tmp_path):
    write_broken(tmp_path / "broken.csv", [("a,b", 'x"\n1.png', "why"), ("c", os.fsdecode(b"\xe9.png"), "grün")])
    rows = [
        {"clip": "a,b", "frame": 'x"\n1.png', "reason": "why"},
        {"clip": "c", "frame": "\\udce9.png", "reason": "grün"},
    ]
    assert read_broken(tmp_path / "broken.csv") == rows
    with (tmp_path / "broken.csv").open(newline="", encoding="utf-8") as handle:
        assert next(csv.reader(handle)) == ["clip", "frame", "reason"]
    assert read_broken(tmp_path / "absent.csv") == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "a", lambda handle: handle.write(b"old"))

    def fail(handle) -> None:
        handle.write(b"new")
        raise OSError("pulled the plug")

    with pytest.raises(OSError, match="plug"):
        write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_bytes() == b"old"


def test_an_array_keeps_what_was_written_into_it(tmp_path):
    array = growing_array(tmp_path / "a.npy", np.int64, 4)
    assert array.tolist() == [0, 0, 0, 0]
    array[2] = 7
    array.flush()
    assert growing_array(tmp_path / "a.npy", np.int64, 4).tolist() == [0, 0, 7, 0]
    assert (tmp_path / "a.npy").stat().st_blocks > 0  # not a hole, into which writing on a full disk would kill us
    save_array(tmp_path / "a.npy", np.arange(2))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1] and not list(tmp_path.glob("*.tmp"))


def test_a_lock_waits_for_its_holder_and_says_so(tmp_path, capsys, monkeypatch):
    waiting, entered, flock = threading.Event(), threading.Event(), cache.fcntl.flock

    def watched(handle, mode: int) -> None:
        if not mode & cache.fcntl.LOCK_NB:
            waiting.set()
        flock(handle, mode)

    def second() -> None:
        with locked(tmp_path / "a.lock"):
            entered.set()

    monkeypatch.setattr(cache.fcntl, "flock", watched)
    thread = threading.Thread(target=second)
    with locked(tmp_path / "a.lock"):
        thread.start()
        assert waiting.wait(60) and not entered.wait(0.05)
    assert entered.wait(60)
    thread.join()
    out = capsys.readouterr().out
    assert out == f"another process is making the same data; waiting for it ({tmp_path}/a.lock)\n"


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused_with_its_parameter(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as error:
        make_folder(tmp_path / name, "cache_dir")
    assert str(error.value).startswith(f"cache_dir='{tmp_path}/{name}': cannot be made (")
    assert str(error.value).endswith("); set cache_dir to a folder that you may write")


def test_a_folder_that_cannot_be_written_is_refused_with_its_parameter(tmp_path, monkeypatch):
    make_folder(tmp_path / "new" / "below", "cache_dir")
    assert (tmp_path / "new" / "below").is_dir()
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="^cache_dir='.*/new': is not writable; set cache_dir to a folder that you may"):
        make_folder(tmp_path / "new", "cache_dir")


def test_a_disk_that_fills_up_is_explained_and_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(
        DataError, match=r"^the disk of .* is full \(No space left on device\): make room and start again"
    ):
        with full_disk(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "denied")


def test_the_description_holds_what_a_run_records(finished):
    meta = json.loads((finished.folder / "cache.json").read_text())
    counts = {"clips": 2, "slots": 5, "broken_frames": 0, "broken_clips": 0, "grey_frames": 0}
    settings = {"image_size": 8, "stride": 1, "allow_upscale": False}
    assert counts.items() <= meta.items() and settings.items() <= meta.items() and len(meta["fingerprint"]) == 16
