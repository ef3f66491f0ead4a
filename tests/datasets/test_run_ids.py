import os
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr

from workbench.datasets.arrays import open_array
from workbench.datasets.frames import DataError
from workbench.datasets.run_ids import read_ids

FIELDS = np.zeros((3, 4, 5), np.float32)
TEXT = ["b", "ä 1", "run_10"]
NUMBERS = [12, -1, 7]
STRINGS = np.dtypes.StringDType()


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, field=FIELDS, **arrays)


def write_packed(path: Path, **arrays: np.ndarray) -> None:
    np.savez_compressed(path, field=FIELDS, **arrays)


def write_hdf5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, array in {"field": FIELDS, **arrays}.items():
            file[name] = array.astype(h5py.string_dtype()) if array.dtype.kind in "UO" else array


def write_zarr(path: Path, **arrays: np.ndarray) -> None:
    group = zarr.open_group(path, mode="w")
    for name, array in {"field": FIELDS, **arrays}.items():
        group[name] = array.astype(STRINGS) if array.dtype.kind == "U" else array


def write_zarr_zip(path: Path, **arrays: np.ndarray) -> None:
    with zarr.storage.ZipStore(path, mode="w") as store:
        group = zarr.open_group(store, mode="w")
        group["field"], group["id"] = FIELDS, arrays["id"].astype(STRINGS)


def write_netcdf(path: Path, **arrays: np.ndarray) -> None:
    data = {name: ("run" if len(array) == 3 else f"of_{name}", array) for name, array in arrays.items()}
    xarray.Dataset({"field": (("run", "time", "node"), FIELDS)} | data).to_netcdf(path, engine="h5netcdf")


def write_tensors(path: Path, **arrays: np.ndarray) -> None:
    torch.save({"field": torch.from_numpy(FIELDS)} | {k: torch.from_numpy(v) for k, v in arrays.items()}, path)


WRITERS: dict[str, Callable] = {
    "a.npz": write_npz,
    "packed.npz": write_packed,
    "a.h5": write_hdf5,
    "a.hdf5": write_hdf5,
    "a.zarr": write_zarr,
    "a.nc": write_netcdf,
    "a.pt": write_tensors,
}


def written(folder: Path, file: str = "a.npz", **arrays) -> Path:
    WRITERS[file](folder / file, **{name: np.asarray(array) for name, array in arrays.items()})
    return folder / file


@pytest.mark.parametrize("name", ["id", "ids"])
@pytest.mark.parametrize("file", [file for file in WRITERS if file != "a.pt"])
def test_text_is_read_as_it_is_in_the_order_of_the_runs(tmp_path, file, name):
    path = written(tmp_path, file, **{name: TEXT})
    assert read_ids(path, 3) == read_ids(path, 3, "field") == TEXT
    assert open_array(path).name == "field"  # ids do not make the choice of the fields ambiguous


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
@pytest.mark.parametrize("file", WRITERS)
def test_whole_numbers_become_text(tmp_path, file, dtype):
    assert read_ids(written(tmp_path, file, ids=np.array(NUMBERS, dtype)), 3) == ["12", "-1", "7"]


def test_numbers_above_the_exact_range_of_floats_stay_exact(tmp_path):
    large = np.array([2**63 + 1, 2**63 + 2, 2**63 + 3], np.uint64)
    assert read_ids(written(tmp_path, id=large), 3) == [str(number) for number in large.tolist()]


def test_a_zip_of_zarr_is_read(tmp_path):
    write_zarr_zip(tmp_path / "a.zarr.zip", id=np.array(TEXT))
    assert read_ids(tmp_path / "a.zarr.zip", 3) == TEXT


@pytest.mark.parametrize("file", ["a.npz", "a.h5"])
def test_bytes_are_utf_8_and_white_space_around_ids_is_left_out(tmp_path, file):
    padded = np.array([f"{name}  ".encode() for name in TEXT])
    assert read_ids(written(tmp_path, file, id=padded), 3) == TEXT
    with pytest.raises(DataError, match="cannot be read .*utf-8.* codec can't decode"):
        read_ids(written(tmp_path, file, id=np.array([b"a", b"b", b"\xff\xfe"])), 3)


@pytest.mark.parametrize("file", WRITERS)
def test_a_file_without_ids_has_none(tmp_path, file):
    assert read_ids(written(tmp_path, file, time=np.arange(4)), 3) is None


def test_formats_of_one_array_have_none(tmp_path):
    np.save(tmp_path / "a.npy", FIELDS)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(FIELDS))
    zarr.create_array(tmp_path / "one.zarr", data=FIELDS)
    torch.save(torch.from_numpy(FIELDS), tmp_path / "one.pt")
    assert [read_ids(tmp_path / name, 3) for name in ("a.npy", "a.pkl", "one.zarr", "one.pt")] == [None] * 4


def test_text_in_the_coordinate_of_the_runs_of_a_netcdf_names_them(tmp_path):
    axes, path = ("case", "time", "node"), tmp_path / "a.nc"
    places = {"node": ["p", "q", "r", "s", "t"]}
    xarray.Dataset({"u": (axes, FIELDS)}, {"case": TEXT} | places).to_netcdf(path, engine="h5netcdf")
    assert read_ids(path, 3) == read_ids(path, 3, "u") == TEXT
    xarray.Dataset({"u": (axes, FIELDS)}, {"case": [2, 1, 0]} | places).to_netcdf(path, engine="h5netcdf")
    assert read_ids(path, 3) is None  # numbers there may be any quantity
    xarray.Dataset({"u": (axes, FIELDS), "id": ("case", NUMBERS)}, {"case": TEXT}).to_netcdf(path, engine="h5netcdf")
    assert read_ids(path, 3) == ["12", "-1", "7"]


def test_ids_beside_the_fields_in_their_group_come_before_those_at_the_top(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["results/field"], file["mesh/id"] = FIELDS, np.arange(9)
    assert read_ids(tmp_path / "a.h5", 3, "results/field") is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["id"] = NUMBERS
    assert read_ids(tmp_path / "a.h5", 3, "results/field") == ["12", "-1", "7"]
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["results/id"] = TEXT
    assert read_ids(tmp_path / "a.h5", 3, "results/field") == TEXT


@pytest.mark.parametrize(
    "ids, message",
    [
        (["a", "b"], "has 2 ids, the fields have 3 runs; give one id per run"),
        ([["a"], ["b"], ["c"]], "has shape (3, 1), the fields have 3 runs; give one id per run"),
        ([0.0, 1.0, 2.0], "holds values of type float64; ids are text or whole numbers: save them as such, or rename"),
        ([True, False, True], "holds values of type bool; ids are text or whole numbers"),
        (["a", " ", "c"], "the id of run 1, counted from 0, is empty; give it one"),
        (["a", "b", "b "], "id 'b' is that of runs 1 and 2, counted from 0; 3 runs have 2 different ids: give each"),
        ([5, 5, 5], "id '5' is that of runs 0 and 1, counted from 0; 3 runs have 1 different ids: give each run its"),
        (np.array(TEXT, object), "holds Python objects, which only a pickle can: not read; save them as text, with nu"),
    ],
)
def test_ids_that_cannot_be_used_are_refused(tmp_path, ids, message):
    path = written(tmp_path, id=ids)
    with pytest.raises(DataError) as error:
        read_ids(path, 3)
    assert str(error.value).startswith(f"{path}, ids 'id': {message}")


@pytest.mark.parametrize("file", WRITERS)
def test_another_number_and_floats_are_refused_in_every_format(tmp_path, file):
    with pytest.raises(DataError, match="ids 'id': has 2 ids, the fields have 3 runs; give one id per run$"):
        read_ids(written(tmp_path, file, id=[4, 5]), 3)
    (tmp_path / "floats").mkdir()
    with pytest.raises(DataError, match="ids 'id': holds values of type float64; ids are text or whole numbers"):
        read_ids(written(tmp_path / "floats", file, id=[0.5, 1, 2]), 3)


def test_tensors_that_numpy_has_no_type_for_are_refused(tmp_path):
    torch.save({"field": torch.zeros(3, 4, 5), "id": torch.arange(3).bfloat16()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="a.pt, ids 'id': holds values of type object; ids are text or whole numbers"):
        read_ids(tmp_path / "a.pt", 3)


def test_two_arrays_of_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match="a.npz: holds both 'id' and 'ids'; keep the one of the runs$"):
        read_ids(written(tmp_path, id=TEXT, ids=NUMBERS), 3)


def test_no_code_of_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = written(tmp_path, id=np.array([Trap(), Trap(), Trap()], object))
    with pytest.raises(DataError, match="holds Python objects"):
        read_ids(path, 3)
    assert not (tmp_path / "ran").exists()
