from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.datasets.conditions import check_constant, check_finite, read_images, read_table
from workbench.datasets.frames import DataError


def table(folder: Path, text: str | bytes, runs: int = 2, ids: list[str] | None = None):
    (folder / "conditions.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(folder / "conditions.csv", runs, ids)


def draw(folder: Path, *names: str, size: tuple[int, int] = (8, 8)) -> list[int]:
    """Even pictures, whose grey is 10 for the first name, 20 for the second …"""
    greys = [10 * (i + 1) for i in range(len(names))]
    for name, grey in zip(names, greys, strict=True):
        Image.new("L", size, grey).save(folder / name)
    return greys


# --- tables ---


def test_rows_without_ids_are_in_the_order_of_the_runs(tmp_path):
    names, values, ids = table(tmp_path, "load, angle\n1,-2e-3\n 0.1 ,7\n")
    assert names == ["load", "angle"] and ids is None
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.float32([[1, -2e-3], [0.1, 7]]))


def test_rows_are_matched_to_the_ids_of_the_runs(tmp_path):
    names, values, ids = table(tmp_path, "load,id\n1,007\n2,NA\n3,7\n", 3, ["7", "007", "NA"])
    assert names == ["load"] and ids == ["7", "007", "NA"]
    assert values.tolist() == [[3], [1], [2]]


def test_rows_without_ids_serve_runs_that_have_them(tmp_path):
    assert table(tmp_path, "load\n1\n2\n", ids=["b", "a"])[2] == ["b", "a"]


def test_ids_of_the_table_become_those_of_the_runs(tmp_path):
    _, values, ids = table(tmp_path, "id,load\nb,1\na,2\n")
    assert ids == ["b", "a"] and values.tolist() == [[1], [2]]


@pytest.mark.parametrize("numbers", [["2", "0", "3", "1"], ["4", "1", "3", "2"], ["02", "00", "03", "01"]])
def test_rows_that_number_the_runs_are_matched_by_number(tmp_path, numbers):
    rows = "".join(f"{number},{10 * int(number)}\n" for number in numbers)
    _, values, ids = table(tmp_path, f"id,load\n{rows}", 4)
    assert ids == sorted(numbers) and values[:, 0].tolist() == [10 * int(number) for number in ids]


def test_numbers_of_ten_runs_and_more_are_ordered_as_numbers(tmp_path):
    numbers = np.random.default_rng(0).permutation(12).tolist()
    _, values, ids = table(tmp_path, "id,load\n" + "".join(f"{number},{number}\n" for number in numbers), 12)
    assert ids == [str(i) for i in range(12)] and values[:, 0].tolist() == list(range(12))


@pytest.mark.parametrize(
    "numbers, row, name, before",
    [([0, 3, 1], 3, "1", "3"), ([3, 2, 4], 2, "2", "3"), ([1, 3, 0], 3, "0", "3"), ([9, 7, 8], 2, "7", "9")],
)
def test_other_numbers_out_of_order_are_refused_where_the_runs_carry_no_ids(tmp_path, numbers, row, name, before):
    """Taken by order, the conditions of one run would be those of another."""
    rows = "".join(f"{number},{number}\n" for number in numbers)
    with pytest.raises(
        DataError, match=f"id '{name}' in row {row} comes after '{before}': the fields carry no ids, so rows are in the"
    ):
        table(tmp_path, f"id,load\n{rows}", 3)
    ids = [str(number) for number in sorted(numbers)]
    assert table(tmp_path, f"id,load\n{rows}", 3, ids)[1][:, 0].tolist() == sorted(numbers)


def test_numbers_with_gaps_in_order_become_the_ids_of_the_runs(tmp_path):
    assert table(tmp_path, "id,load\n9,1\n10,2\n", 2)[2] == ["9", "10"]


def test_numbers_of_more_or_fewer_rows_than_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match="has 3 rows, the fields have 2 runs; give one row per run$"):
        table(tmp_path, "id,load\n1,1\n0,2\n2,3\n")


def test_what_spreadsheets_write_is_read(tmp_path):
    """A byte order mark, carriage returns, quotes."""
    names, values, ids = table(tmp_path, b'\xef\xbb\xbf"id","load"\r\n"a, b",1\r\nc,2\r\n')
    assert names == ["load"] and ids == ["a, b", "c"] and values.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": is empty (0 bytes); it must hold a header and one row per run"),
        ("\n\n", ": is not a table of comma-separated values (No columns to parse from file); correct it"),
        ("id,load\n", ": has a header (id, load) and no rows; add one row per run"),
        ("a,b\n1,2\n3,4,5\n", ": is not a table of comma-separated values ("),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ": is not a table of comma-separated values ("),
        ("id\na\nb\n", ": has no column besides 'id'; add the conditions as columns of numbers"),
        ("a,b,a\n1,2,3\n4,5,6\n", ": 2 columns are called 'a'; rename or remove one"),
        (",a\n0,2\n1,5\n", ": column 1 of 2 has no name; name or remove it"),
        ("ID,a\n0,2\n1,5\n", ": column 'ID': a column of ids is called 'id'; rename it, or the condition"),
        ("id,a\nx,2\n,5\n", ": row 2 has no id; give it one, or remove the column 'id'"),
        ("id,a\nx,2\nx,5\n", ": id 'x' is in rows 1, 2; an id has one row: keep one"),
        ("id,a\nx,2\ny,5\nx,3\ny,3\n", ": id 'x' is in rows 1, 3, and 1 more; an id has one row: keep one"),
        ("a\n1\n2\n3\n", ": has 3 rows, the fields have 2 runs; give one row per run"),
        ("id,a\nx,1\n", ": has 1 rows, the fields have 2 runs; give one row per run"),
        ("1,2\n3,4\n", ": has 1 rows (its first line, 1, 2, was read as the names of the columns), the fields have 2"),
        ("a,b\n1,2\n3,steel\n", ": column 'b' holds text, such as 'steel' in row 2; conditions are numbers: encode or"),
        ("a,b\n1,True\n3,False\n", ": column 'b' holds text, such as 'True' in row 1; conditions are numbers"),
        ("id,a,b\nx,1,2\ny,3,\n", ": b=nan of run 'y' is empty or not finite (1 such value in 1 run); correct it, or"),
        ("a,b\n1,inf\nNaN,\n", ": b=inf of row 1 is empty or not finite (3 such values in 2 runs); correct it, or"),
        ("a,b\n1,2\n3\n", ": b=nan of row 2 is empty or not finite (1 such value in 1 run); correct it, or remove the"),
        ("a\n1\n1e39\n", ": a=inf of row 2 is empty or not finite (1 such value in 1 run); correct it, or remove the"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, text, message):
    with pytest.raises(DataError) as error:
        table(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'conditions.csv'}{message}")


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a,1", ": no row for run 'b' of the fields; there must be one row for each of the 2 runs"),
        ("a,1\nb,2\nz,3", ": no run of the fields for row 'z'; there must be one row for each of the 2 runs"),
        ("x,1\ny,2", ": no row for runs 'a', 'b' of the fields and no run of the fields for rows 'x', 'y'; there"),
        (
            "a,1\nb,2\n1,0\n2,0\n3,0\n4,0\n5,0\n6,0",
            ": no run of the fields for rows '1', '2', '3', '4', '5', … (6 in all);",
        ),
    ],
)
def test_ids_of_the_fields_and_of_the_table_must_be_the_same(tmp_path, rows, message):
    with pytest.raises(DataError) as error:
        table(tmp_path, f"id,load\n{rows}\n", ids=["a", "b"])
    assert str(error.value).startswith(f"{tmp_path / 'conditions.csv'}{message}")


def test_an_absent_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv: no such file; give the path of the CSV with the conditions$"):
        read_table(tmp_path / "gone.csv", 2, None)
    with pytest.raises(DataError, match="is a folder, not a CSV file; give the path of the CSV with the conditions$"):
        read_table(tmp_path, 2, None)


# --- checks of values from any source ---


def test_values_that_are_not_finite_are_named():
    values = np.zeros((3, 2), np.float32)
    check_finite(["a", "b"], values, None, "fields.npz")
    values[1, 1], values[2, 0] = np.nan, -np.inf
    with pytest.raises(
        DataError, match=r"^fields.npz: b=nan of run 'y' is empty or not finite \(2 such values in 2 runs"
    ):
        check_finite(["a", "b"], values, ["x", "y", "z"], "fields.npz")


def test_a_constant_condition_is_named():
    values = np.float32([[1, 0.5, 2], [3, 0.5, 2], [1, 0.5, 2]])
    check_constant(["a"], values[:, :1])
    with pytest.raises(DataError) as error:
        check_constant(["a", "b", "c"], values, "conditions.csv")
    assert str(error.value) == (
        "conditions.csv: column 'b' is 0.5 in all 3 runs of the training split, and 1 more; a constant condition says "
        "nothing: remove the column"
    )


# --- pictures ---


def test_pictures_without_ids_are_in_natural_order(tmp_path):
    draw(tmp_path, "img_10.png", "img_9.PNG", "img_2.jpg", "Img_1.png", ".hidden.png")
    (tmp_path / "notes.txt").touch()
    pictures, ids = read_images(tmp_path, 4, None, 4, "grey")
    assert ids == ["Img_1", "img_2", "img_9", "img_10"]
    assert pictures.shape == (4, 1, 4, 4) and pictures.dtype == np.uint8
    assert pictures.mean(axis=(1, 2, 3)).tolist() == [40, 30, 20, 10]


def test_pictures_are_matched_to_the_ids_of_the_runs(tmp_path):
    draw(tmp_path, "a.png", "b.jpeg", "run.3.png")
    pictures, ids = read_images(tmp_path, 3, ["run.3", "a", "b"], 8, "rgb")
    assert ids == ["run.3", "a", "b"]
    assert pictures.shape == (3, 3, 8, 8) and pictures[:, :, 0, 0].tolist() == [[30] * 3, [10] * 3, [20] * 3]


def test_a_picture_is_resized_whole_by_area_means(tmp_path):
    """Rows of 8 x 4 pixels to 4 x 4: each value is the mean of two neighbours; nothing is cropped."""
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8) * 2
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_images(tmp_path, 1, None, 4, "grey")[0][0, 0]
    np.testing.assert_array_equal(picture, pixels.reshape(4, 4, 2).mean(axis=2))


def test_channels_keep_their_order_and_grey_is_luma(tmp_path):
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "a.png")
    assert read_images(tmp_path, 1, None, 2, "rgb")[0][0, :, 0, 0].tolist() == [200, 100, 50]
    assert read_images(tmp_path, 1, None, 2, "grey")[0][0, 0, 0, 0] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


def test_an_opaque_alpha_channel_is_dropped(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 255)).save(tmp_path / "a.png")
    assert read_images(tmp_path, 1, None, 4, "rgb")[0][0, :, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize(
    "runs, counts", [(3, "holds 2 pictures (a.png to b.png), the fields have 3 runs"), (1, "1 runs")]
)
def test_pictures_and_runs_must_be_as_many(tmp_path, runs, counts):
    draw(tmp_path, "b.png", "a.png")
    with pytest.raises(DataError) as error:
        read_images(tmp_path, runs, None, 4, "grey")
    assert counts in str(error.value) and str(error.value).endswith("; give one picture per run")


@pytest.mark.parametrize(
    "ids, message",
    [
        (["a", "b", "c"], ": no picture for run 'c' of the fields; there must be one picture for each of the 3 runs"),
        (["a"], ": no run of the fields for picture 'b'; there must be one picture for each of the 1 runs"),
    ],
)
def test_ids_and_pictures_must_be_the_same(tmp_path, ids, message):
    draw(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError) as error:
        read_images(tmp_path, len(ids), ids, 4, "grey")
    assert str(error.value) == f"{tmp_path}{message}"


def test_two_pictures_of_one_run_are_refused(tmp_path):
    draw(tmp_path, "a.png", "a.jpg")
    with pytest.raises(DataError, match="'a.jpg' and 'a.png' are two pictures of the run 'a'; keep one"):
        read_images(tmp_path, 2, None, 4, "grey")


def test_an_absent_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="gone: no such folder; give the folder of the pictures"):
        read_images(tmp_path / "gone", 2, None, 4, "grey")
    with pytest.raises(DataError, match=r"holds no picture \(\.jpg, \.jpeg, \.png, .*\); give one picture per run"):
        read_images(tmp_path, 2, None, 4, "grey")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"a\.png: is a file, not a folder; give the folder of the pictures"):
        read_images(tmp_path / "a.png", 2, None, 4, "grey")


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    path = tmp_path / "a.png"
    wide = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    cases = {
        "empty file (0 bytes); mend or replace it": lambda: path.write_bytes(b""),
        "does not decode: not an image (": lambda: path.write_bytes(b"text"),
        "does not decode: ": lambda: path.write_bytes(path.read_bytes()[:-30]),
        "has transparent pixels: flatten it on a background first": lambda: Image.new("RGBA", (4, 4)).save(path),
        "has 16 bits per channel: convert it to 8 bits first": lambda: wide.save(path),
    }
    for message, spoil in cases.items():
        Image.effect_noise((32, 32), 50).save(path)
        spoil()
        with pytest.raises(DataError) as error:
            read_images(tmp_path, 1, None, 4, "grey")
        assert str(error.value).startswith(f"{path}: {message}")
