import gc
import json
from pathlib import Path

import numpy as np
import pytest

from workbench.datasets.frames import DataError
from workbench.datasets.labels import read_actions, read_conditions, read_labels

CLIPS = ["1", "2", "3", "4", "NA"]


def conditions(folder: Path, text: str, clips: list[str] = ["a", "b"]) -> tuple[list[str], np.ndarray]:  # noqa: B006
    """Look up frames (b, 2), (a, 1), (a, 3)."""
    (folder / "conditions.csv").write_text(text)
    return read_conditions(folder / "conditions.csv", clips, np.array([1, 0, 0]), np.array([2, 1, 3]))


def refused(error: pytest.ExceptionInfo, path: Path, message: str) -> bool:
    return str(error.value).startswith(str(path)) and message in str(error.value)


# label files of Something-Something v2


def test_the_official_split_is_honoured(tmp_path, write_labels):
    folder = write_labels(tmp_path, train=["4", "1"], validation=["NA"], test=["2"])
    (folder / "something-something-v2-labels.json").write_text(json.dumps({"Pushing something": "0"}))
    table, split = read_labels(folder, CLIPS)
    assert split.tolist() == [0, 2, -1, 0, 1]
    assert table.index.tolist() == ["2", "4", "1", "NA"] and table.index.name == "clip"
    assert table.loc["1", "label"] == "pushing cup 1 from left to right"
    assert table.loc["1", "template"] == "Pushing [something] from left to right"
    assert table.loc["NA", "placeholders"] == ["cup NA"]
    assert table.loc["2", "label"] == ""
    assert gc.isenabled()


def test_numbers_as_ids_are_names(tmp_path):
    (tmp_path / "train.json").write_text('[{"id": 3, "label": "x"}]')
    assert read_labels(tmp_path, CLIPS)[1].tolist() == [-1, -1, 0, -1, -1]


def test_a_file_is_known_by_the_last_word_of_its_name(tmp_path):
    for name in ("latest-train", "my_validation", "TEST", "latest", "train-v1"):
        (tmp_path / f"{name}.json").write_text("[]")
    (tmp_path / "latest-train.json").write_text('[{"id": "1"}]')
    (tmp_path / "latest.json").write_text("not read")
    (tmp_path / "train-v1.json").write_text("not read")
    assert read_labels(tmp_path, CLIPS)[1].tolist() == [0, -1, -1, -1, -1]


def test_absent_clips_are_named(tmp_path, write_labels):
    folder = write_labels(tmp_path, train=["1", "77", "78", "79", "80"])
    with pytest.raises(DataError) as error:
        read_labels(folder, CLIPS)
    assert str(error.value) == (
        f"{folder}/something-something-v2-train.json names 4 of 5 clips that are absent from the data, such as 77, 78, "
        "79: add the clips or remove the entries"
    )


def test_a_clip_in_two_lists_is_refused(tmp_path, write_labels):
    folder = write_labels(tmp_path, train=["1", "2"], validation=["3", "2"])
    with pytest.raises(DataError) as error:
        read_labels(folder, CLIPS)
    path = folder / "something-something-v2-validation.json"
    assert refused(error, path, ": clip '2' is listed in another label file too; keep one")


def test_a_clip_twice_in_one_list_is_refused(tmp_path, write_labels):
    folder = write_labels(tmp_path, train=["1", "3", "2", "3"])
    with pytest.raises(DataError) as error:
        read_labels(folder, CLIPS)
    assert refused(error, folder / "something-something-v2-train.json", ": clip '3' is listed twice; keep one")


@pytest.mark.parametrize("text", ["", "{", '{"1": "x"}', '["1", "2"]', '[{"label": "x"}]', "7", "[[1]]"])
def test_a_malformed_list_is_refused(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError) as error:
        read_labels(tmp_path, CLIPS)
    assert refused(error, tmp_path / "train.json", ": must be a JSON list of objects with an 'id' (")
    assert gc.isenabled()


def test_a_list_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "train.json").write_bytes(b'[{"id": "caf\xe9"}]')
    with pytest.raises(DataError, match="must be a JSON list"):
        read_labels(tmp_path, CLIPS)


def test_a_folder_without_label_files_is_refused(tmp_path):
    (tmp_path / "labels.json").touch()
    remedy = "; give the folder of the label files, or leave it empty"
    for folder, problem in {
        tmp_path: "no file named …train.json, …validation.json or …test.json",
        tmp_path / "gone": "no such folder",
        tmp_path / "labels.json": "no such folder",
    }.items():
        with pytest.raises(DataError) as error:
            read_labels(folder, CLIPS)
        assert str(error.value) == f"labels='{folder}': {problem}{remedy}"


# actions.csv


def test_actions_are_read_by_clip(tmp_path):
    (tmp_path / "actions.csv").write_text("clip,action,speed\nNA,None,0.5\n01,push,1\nelsewhere,lift,2\n")
    table = read_actions(tmp_path / "actions.csv", ["01", "NA"])
    assert table.loc["01", "action"] == "push" and table.loc["NA", "action"] == "None"
    assert table.loc["NA", "speed"] == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("clip,verb\n1,push\n", ": has columns clip, verb; needs 'clip' and 'action'"),
        ("clip,action,frame\n1,push,2\n", "'frame' is not of a clip; what changes by frame belongs in conditions.csv"),
        ("clip,action\n1,push\n1,pull\n2,x\n", ": clip '1' has two rows; keep one"),
        ("clip,action\n1,push\n", ": no row for clip '2'; add it, or remove the file"),
        ("clip,action\n7,push\n", ": no row for clip '1', and 1 more; add it, or remove the file"),
        ("clip,action\n1,push,x,y\n", ": is not a table of comma-separated values ("),
        ("", ": is not a table of comma-separated values (No columns to parse from file); correct it"),
    ],
)
def test_actions_that_cannot_be_used_are_refused(tmp_path, text, message):
    (tmp_path / "actions.csv").write_text(text)
    with pytest.raises(DataError) as error:
        read_actions(tmp_path / "actions.csv", ["1", "2"])
    assert refused(error, tmp_path / "actions.csv", message)


# conditions.csv


def test_conditions_are_found_by_clip_and_frame(tmp_path):
    text = "x,clip,frame,y\n1,a,3,0.5\n2,a,1,-1\n3,c,2,7\n4,b,2,1e3\n5,a,2,0\n"
    names, values = conditions(tmp_path, text)
    assert names == ["x", "y"] and values.dtype == np.float32
    assert values.tolist() == [[4, 1000], [2, -1], [1, 0.5]]


def test_clip_names_that_look_like_numbers_or_nothing_are_names(tmp_path):
    names, values = conditions(tmp_path, "clip,frame,x\nNA,2,1\n007,1,2\n007,3,3\n7,1,9\n", ["007", "NA"])
    assert values.tolist() == [[1], [2], [3]]


ROWS = "a,1,0\na,3,0\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (f"clip,frame,x\n{ROWS}", ": no row for clip 'b', frame 2; add it, or remove the file"),
        ("clip,frame,x\nb,3,1\n", ": no row for clip 'b', frame 2, and 2 more; add it, or remove the file"),
        (f"clip,frame,x\n{ROWS}b,2,high\n", ": column 'x' is not numeric; conditions are numbers: encode or remove it"),
        (f"clip,frame,x\n{ROWS}b,2,\n", ": x=nan of clip 'b', frame 2 is not finite; mend or remove it"),
        (f"clip,frame,x\n{ROWS}b,2,inf\nb,3,nan\n", ": x=inf of clip 'b', frame 2 is not finite, and 1 more; mend"),
        (f"clip,frame,x\n{ROWS}b,2,1\na,3,1\n", ": clip 'a', frame 3 has two rows; keep one"),
        (f"clip,image,x\n{ROWS}b,2,1\n", ": has columns clip, image, x; needs 'clip' and 'frame'"),
        ("clip,frame,x\na,img_1.jpg,0\n", ": column 'frame' must hold whole numbers, the number in each frame's name"),
        ("clip,frame\na,1\n", ": has no column besides 'clip' and 'frame'; add the conditions, or remove the file"),
        ("clip,frame,x\na,1,2\nb,1,2,3,4\n", ": is not a table of comma-separated values ("),
        ("clip,frame,x\na,1,2,3\nb,1,2,3\n", ": is not a table of comma-separated values ("),
    ],
)
def test_conditions_that_cannot_be_used_are_refused(tmp_path, text, message):
    with pytest.raises(DataError) as error:
        conditions(tmp_path, text)
    assert refused(error, tmp_path / "conditions.csv", message)
