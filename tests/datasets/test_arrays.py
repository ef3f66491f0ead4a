import json
import mmap
import os
import pickle
import pickletools
import threading
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr

from workbench.datasets.arrays import LazyArray, open_array
from workbench.datasets.frames import DataError


def write_zarr(path: Path, array: np.ndarray) -> None:
    zarr.create_array(path, data=array, chunks=(2, *array.shape[1:]))


def write_zarr_2(path: Path, array: np.ndarray) -> None:
    zarr.create_array(path, data=array, chunks=(3, *array.shape[1:]), zarr_format=2)


def write_zarr_zip(path: Path, array: np.ndarray) -> None:
    with zarr.storage.ZipStore(path, mode="w") as store:
        zarr.create_array(store, data=array)


def write_hdf5(path: Path, array: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["results/field"] = array


def write_hdf5_chunks(path: Path, array: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("field", data=array, chunks=(2, *array.shape[1:]), compression="gzip")


def write_netcdf(path: Path, array: np.ndarray) -> None:
    axes = ("run", "time", "node", "variable")[: array.ndim]
    xarray.Dataset({"field": (axes, array)}, coords={"time": np.arange(array.shape[1])}).to_netcdf(
        path, engine="h5netcdf"
    )


def write_pickle(path: Path, array: np.ndarray, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(array, protocol))


WRITERS = {
    "a.npy": np.save,
    "stored.npz": lambda path, array: np.savez(path, field=array, time=np.arange(3)),
    "packed.npz": lambda path, array: np.savez_compressed(path, time=np.arange(3), field=array),
    "a.zarr": write_zarr,
    "v2.zarr": write_zarr_2,
    "zip.zarr": write_zarr_zip,
    "a.zarr.zip": write_zarr_zip,
    "a.h5": write_hdf5,
    "chunks.HDF5": write_hdf5_chunks,
    "a.nc": write_netcdf,
    "a.pt": lambda path, array: torch.save(torch.from_numpy(array), path),
    "dict.pt": lambda path, array: torch.save({"field": torch.from_numpy(array), "steps": 3}, path),
    "a.pkl": write_pickle,
    "a.pickle": lambda path, array: write_pickle(path, array, 5),
    "a.pic": lambda path, array: write_pickle(path, array, 2),
}
SHAPES = {3: (7, 5, 6), 4: (7, 5, 6, 2), 2: (7, 6)}
RUNS = [[0], [3, 4, 5], [6, 0, 3], [2, 2, 6, 2], list(range(7)), [5, 4]]


def numbers(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def saved(path: Path, array: np.ndarray) -> LazyArray:
    WRITERS[path.name](path, array)
    return open_array(path)


def refusal(path: Path, name: str = "") -> str:
    with pytest.raises(DataError) as error:
        open_array(path, name)
    assert str(error.value).startswith(str(path))
    return str(error.value)


# every format


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("file", WRITERS)
def test_runs_and_ranges_are_read_as_they_were_written(tmp_path, file, dims):
    whole = numbers(SHAPES[dims])
    array = saved(tmp_path / file, whole)
    assert array.shape == whole.shape and array.dtype == np.float32
    for runs in RUNS:
        values = array.read(runs)
        assert values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
        np.testing.assert_array_equal(values, whole[runs])
        if dims > 2:
            part = array.read(np.array(runs, np.uint8), slice(1, 4), slice(2, None))
            np.testing.assert_array_equal(part, whole[runs][:, 1:4, 2:])
            np.testing.assert_array_equal(array.read(runs, slice(4, 5)), whole[runs][:, 4:5])
            np.testing.assert_array_equal(array.read(runs, nodes=slice(None, 1)), whole[runs][:, :, :1])


DTYPES = ("float16", "float64", "int8", "uint8", "int64", ">f4", ">i2")
UNKNOWN = {("a.pt", ">f4"), ("a.pt", ">i2"), ("a.nc", "float16")}
"""PyTorch has one byte order, netCDF no float16."""


@pytest.mark.parametrize(
    "file, dtype",
    [
        (file, dtype)
        for file in ("a.npy", "stored.npz", "packed.npz", "a.zarr", "a.h5", "a.nc", "a.pt", "a.pkl")
        for dtype in DTYPES
        if (file, dtype) not in UNKNOWN
    ],
)
def test_other_numbers_become_float32(tmp_path, file, dtype):
    whole = numbers((4, 5, 6), dtype)
    array = saved(tmp_path / file, whole)
    assert array.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    values = array.read([3, 0])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, whole[[3, 0]].astype(np.float32))


def test_values_beyond_float32_become_infinite_without_a_warning(tmp_path, recwarn):
    values = saved(tmp_path / "a.npy", np.array([[1e300, -1e300, np.nan]])).read([0])
    np.testing.assert_array_equal(values, [[np.inf, -np.inf, np.nan]])
    assert not recwarn.list


@pytest.mark.parametrize("file", WRITERS)
def test_an_array_is_opened_anew_in_another_process_and_leaves_no_file_open(tmp_path, file):
    array = saved(tmp_path / file, numbers((7, 5, 6)))
    array.read([1])
    sent = pickle.dumps(array)
    assert len(sent) < 400
    copy = pickle.loads(sent)  # noqa: S301
    assert copy == array
    np.testing.assert_array_equal(copy.read([6]), array.read([6]))
    links = Path("/proc/self/fd")
    held = [link.readlink() for link in links.iterdir() if link.is_symlink()] if links.is_dir() else []
    assert not [target for target in held if target.is_relative_to(tmp_path)]


@pytest.mark.parametrize("file", ["a.npy", "packed.npz", "a.zarr", "a.zarr.zip", "chunks.HDF5", "a.nc", "a.pt"])
def test_threads_may_read_at_once(tmp_path, file):
    whole = numbers((7, 5, 6))
    array = saved(tmp_path / file, whole)
    wrong = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(6):
            runs = rng.integers(0, 7, 4)
            if not np.array_equal(array.read(runs), whole[runs]):
                wrong.append(runs)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# memory


def test_runs_of_a_large_npy_are_read_without_loading_or_mapping_it(tmp_path, monkeypatch):
    path, shape = tmp_path / "a.npy", (1000, 100, 10_000)
    with path.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
        start = handle.tell()
        for run in (3, 998):
            handle.seek(start + (run + 1) * 4_000_000 - 4)
            handle.write(np.float32(run).tobytes())
        handle.truncate(start + 4_000_000_000)
    monkeypatch.setattr(mmap, "mmap", None)
    monkeypatch.setattr(np, "memmap", None)
    tracemalloc.start()
    values = open_array(path).read([998, 3])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values[:, -1, -1].tolist() == [998, 3] and np.count_nonzero(values) == 2
    assert peak < 9e6


def test_a_range_of_steps_takes_only_its_bytes(tmp_path):
    array = saved(tmp_path / "a.npy", np.zeros((2, 1000, 1000), "float64"))
    tracemalloc.start()
    array.read([0, 1], slice(500, 510), slice(0, 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 10 * 1000 * 8


def test_a_tensor_is_mapped_only_while_it_is_read(tmp_path):
    path = tmp_path / "a.pt"
    values = saved(path, numbers((7, 5, 6))).read([2, 3])
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(values, numbers((7, 5, 6))[2:4])


def test_a_tensor_file_that_cannot_be_mapped_names_the_way_out(tmp_path, monkeypatch):
    array = saved(tmp_path / "a.pt", numbers((7, 5, 6)))

    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unable to mmap 840 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(DataError, match=r"\(unable to mmap .*; if it is too large for the memory, write it as .npy"):
        array.read([0])


def test_a_compressed_npz_is_read_once(tmp_path, monkeypatch):
    array = saved(tmp_path / "packed.npz", numbers((7, 5, 6)))
    array.read([0])
    monkeypatch.setattr(np, "load", None)
    np.testing.assert_array_equal(array.read([6]), numbers((7, 5, 6))[[6]])


def test_a_chunk_is_decoded_once_for_all_the_runs_in_it(tmp_path, monkeypatch):
    array = saved(tmp_path / "v2.zarr", numbers((7, 5, 6)))
    read = []
    get = zarr.storage.LocalStore.get

    async def count(self, key, *args, **kwargs):
        read.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", count)
    array.read([5, 0, 3, 2, 0])
    assert sorted(key for key in read if key[0].isdigit()) == ["0.0.0", "1.0.0"]


# which array


@pytest.fixture
def several(tmp_path) -> dict[str, Path]:
    """The same arrays in every format that names them."""
    arrays = {"x": numbers((4, 3)), "pressure": numbers((4, 5, 3)), "time": np.arange(5.0)}
    np.savez(tmp_path / "a.npz", **arrays)
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "a.pt")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in arrays.items():
            group.create_array(name, data=array)
            file[name] = array
    axes = {"x": ("run", "value"), "pressure": ("run", "step", "node"), "time": ("step",)}
    dataset = xarray.Dataset({name: (axes[name], array) for name, array in arrays.items()})
    dataset.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    return {suffix: tmp_path / f"a.{suffix}" for suffix in ("npz", "pt", "zarr", "h5", "nc")}


@pytest.mark.parametrize("suffix", ["npz", "pt", "zarr", "h5", "nc"])
def test_one_of_several_is_taken_by_name(several, suffix):
    np.testing.assert_array_equal(open_array(several[suffix], "x").read([3, 1]), numbers((4, 3))[[3, 1]])
    assert open_array(several[suffix], "pressure").shape == (4, 5, 3)
    message = refusal(several[suffix])
    assert "'x' float32 (4, 3)" in message and "'pressure' float32 (4, 5, 3)" in message
    assert "'time' float64 (5,)" in message and message.endswith("; set field to the name of one")
    message = refusal(several[suffix], "presure")
    assert "holds no array 'presure'; the nearest are 'pressure', " in message and "set field to one" in message
    assert "field 'time': has shape (5,): must be (runs, steps, nodes), (runs, " in refusal(several[suffix], "time")


def test_arrays_in_groups_have_paths_as_names(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["out/u"], file["out/v"] = numbers((2, 3, 4)), -numbers((2, 3, 4))
    assert open_array(tmp_path / "a.h5", "out/v").read([1])[0, 2, 3] == -23
    zarr.open_group(tmp_path / "a.zarr", mode="w").create_group("out").create_array("u", data=numbers((2, 3, 4)))
    assert open_array(tmp_path / "a.zarr").name == "out/u"


def test_an_array_without_a_name_is_not_found_by_one(tmp_path):
    for file in ("a.npy", "a.pkl", "a.pt", "a.zarr"):
        saved(tmp_path / file, numbers((2, 3)))
        assert refusal(tmp_path / file, "u").endswith(
            ": holds one array, without a name, and no 'u'; leave field empty"
        )


def test_packed_values_of_a_netcdf_are_unpacked_and_gaps_are_nan(tmp_path):
    field = np.array([[1.5, np.nan], [2.5, -1.0]])
    packed = {"field": {"dtype": "int16", "scale_factor": 0.5, "_FillValue": -999}}
    xarray.Dataset({"field": (("run", "value"), field)}).to_netcdf(
        tmp_path / "a.nc", engine="h5netcdf", encoding=packed
    )
    np.testing.assert_array_equal(open_array(tmp_path / "a.nc").read([0, 1]), field)


def test_many_arrays_are_not_all_listed(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"u{i:02}": numbers((2, 3)) for i in range(25)})
    message = refusal(tmp_path / "a.npz")
    assert "'u19'" in message and "'u20'" not in message and "; and 5 more; set field" in message


# what is asked for


@pytest.mark.parametrize(
    "asked, message",
    [
        (([0, 7],), ": run 7 is not among its 7 runs; count from 0"),
        (([-1],), ": run -1 is not among its 7 runs"),
        (([],), ": runs=[]: must be a row of at least one whole number; count from 0"),
        ((np.array([0.5]),), ": must be a row of at least one whole number"),
        ((np.array([[0]]),), ": must be a row of at least one whole number"),
        (([0], slice(0, 6)), ": steps 0:6:1 must be a range without a stride, of at least one, within 0 to 5; correct"),
        (([0], slice(3, 3)), ": steps 3:3:1 must be"),
        (([0], slice(-2, None)), ": steps -2:5:1 must be"),
        (([0], slice(0, 4, 2)), ": steps 0:4:2 must be"),
        (([0], slice(None), slice(0, 7)), ": nodes 0:7:1 must be a range without a stride, of at least one, within"),
    ],
)
def test_what_lies_outside_is_refused(tmp_path, asked, message):
    array = saved(tmp_path / "a.npy", numbers((7, 5, 6)))
    with pytest.raises(DataError) as error:
        array.read(*asked)
    assert str(error.value).startswith(f"{tmp_path}/a.npy{message[:1]}") and message in str(error.value)


def test_rows_of_values_have_no_steps(tmp_path):
    array = saved(tmp_path / "a.npy", numbers((7, 6)))
    with pytest.raises(DataError, match=r"has shape \(7, 6\), without steps and nodes; ask for no range"):
        array.read([0], slice(0, 3))


# files that cannot be used


def test_a_file_that_is_absent_or_of_no_known_format_is_refused(tmp_path):
    assert refusal(tmp_path / "a.npy").endswith(": no such file; correct the path")
    message = refusal(tmp_path / "a.txt")
    assert ": its ending is unknown; must be one of .npy, .npz, .zarr, " in message and "convert it" in message


@pytest.mark.parametrize("file", [*WRITERS])
def test_damaged_files_are_refused(tmp_path, file):
    path = tmp_path / file
    for content in (b"", b"no such thing", bytes(range(256)) * 20):
        path.write_bytes(content)
        message = refusal(path)
        assert ": cannot be read" in message and message.endswith(
            ("write it as .npy", "save the array alone, with numpy.save")
        )


@pytest.mark.parametrize("file", [file for file in WRITERS if not file.endswith(".zarr") or file == "zip.zarr"])
def test_files_cut_short_are_refused(tmp_path, file):
    path = tmp_path / file
    WRITERS[file](path, np.random.default_rng(0).random((7, 50, 60)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert ": cannot be read" in refusal(path)


def test_a_file_that_changes_after_opening_is_refused(tmp_path):
    for file in ("a.npy", "a.h5", "a.zarr.zip"):
        array = saved(tmp_path / file, numbers((7, 50, 60)))
        with (tmp_path / file).open("r+b") as handle:
            handle.truncate(200)
        with pytest.raises(DataError, match="cannot be read"):
            array.read([6])


def test_a_damaged_chunk_is_refused(tmp_path):
    array = saved(tmp_path / "v2.zarr", numbers((7, 50, 60)))
    (tmp_path / "v2.zarr" / "2.0.0").write_bytes(b"damage")
    assert array.read([0]).shape == (1, 50, 60)
    with pytest.raises(DataError, match="cannot be read .*write it again"):
        array.read([6])


def test_an_npy_that_goes_on_is_refused(tmp_path):
    with (tmp_path / "a.npy").open("wb") as handle:
        np.save(handle, numbers((2, 3)))
        np.save(handle, numbers((2, 3)))
    assert "cannot be read (304 bytes, where its header says 152)" in refusal(tmp_path / "a.npy")


def test_fortran_order_is_refused_where_it_is_slow(tmp_path):
    whole = np.asfortranarray(numbers((4, 5, 6)))
    for file in ("a.npy", "stored.npz"):
        WRITERS[file](tmp_path / file, whole)
        assert "is stored in Fortran order, which scatters a run over the whole file; save it in C order" in refusal(
            tmp_path / file
        )
    np.testing.assert_array_equal(saved(tmp_path / "packed.npz", whole).read([2, 0]), whole[[2, 0]])


@pytest.mark.parametrize("dtype", ["bool", "complex64", "U3", "M8[s]", "object", "i4,f4"])
@pytest.mark.parametrize("file", ["a.npy", "packed.npz", "a.pkl"])
def test_what_is_not_real_numbers_is_refused(tmp_path, file, dtype):
    WRITERS[file](tmp_path / file, np.zeros((3, 4), dtype))
    assert "must be real numbers; convert them to float32" in refusal(tmp_path / file)


def test_truth_values_and_complex_numbers_are_refused_in_every_format(tmp_path):
    for file in ("stored.npz", "a.zarr", "a.h5", "a.pt"):
        for dtype in ("bool", "complex64"):
            path = tmp_path / dtype / file
            path.parent.mkdir(exist_ok=True)
            WRITERS[file](path, np.zeros((3, 4), dtype))
            assert f"holds values of type {dtype}: must be real numbers; convert" in refusal(path)


@pytest.mark.parametrize("file", ["a.npy", "packed.npz", "a.h5", "a.pt", "a.pkl"])
def test_shapes_that_are_not_fields_are_refused(tmp_path, file):
    for shape in ((4,), (2, 2, 2, 2, 2)):
        WRITERS[file](tmp_path / file, np.zeros(shape))
        assert f"has shape {shape}: must be (runs, steps, nodes), (runs, steps, nodes, variables) or" in refusal(
            tmp_path / file
        )
    WRITERS[file](tmp_path / file, np.zeros((0, 4)))
    assert "has shape (0, 4), so holds no values; write it again" in refusal(tmp_path / file)


def test_a_file_without_a_usable_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", time=np.arange(3), mask=np.zeros((2, 2), bool))
    message = refusal(tmp_path / "a.npz")
    assert ": none of its arrays can serve: 'time' has shape (3,)" in message and ". 'mask' holds values of" in message
    for path in (tmp_path / "b.npz", tmp_path / "a.h5"):
        zipfile.ZipFile(path, "w").close() if path.suffix == ".npz" else h5py.File(path, "w").close()
        assert refusal(path).endswith(": holds no array; give the file of the fields")


def test_tensors_that_numpy_does_not_know_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.zeros(2, 3, dtype=torch.bfloat16), path)
    assert "is a tensor of torch.bfloat16, torch.strided: NumPy has no such; save its .to_dense()" in refusal(path)
    torch.save(torch.eye(3).to_sparse(), path)
    assert "torch.sparse_coo: NumPy has no such; save its .to_dense().float()" in refusal(path)
    torch.save([torch.zeros(2, 3)], path)
    assert refusal(path).endswith(": holds a list, not a tensor or a dict of tensors; save one")
    torch.save(torch.zeros(2, 3), path, _use_new_zipfile_serialization=False)
    assert "cannot be read (mmap can only be used with files saved with" in refusal(path)


# pickles


def without_frames(content: bytes) -> bytes:
    """Frames only state lengths, which would no longer hold."""
    places = [place for code, _, place in pickletools.genops(content) if code.name == "FRAME"]
    for place in reversed(places):
        content = content[:place] + content[place + 9 :]
    return content


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("package", [b"numpy._core", b"numpy.core"])
def test_pickles_of_both_generations_of_numpy_and_every_protocol_are_read(tmp_path, protocol, package):
    whole = numbers((3, 4, 5), "float64")
    for array in (whole, np.asfortranarray(whole), whole.transpose(1, 0, 2), whole[::2], whole.astype(">i4")):
        content = without_frames(pickle.dumps(array, protocol))
        for old in (b"numpy._core.multiarray", b"numpy._core.numeric"):
            new = old.replace(b"numpy._core", package)
            content = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
            content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
        assert package in content and (package == b"numpy._core" or b"numpy._core" not in content)
        (tmp_path / "a.pkl").write_bytes(content)
        read = open_array(tmp_path / "a.pkl")
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read.read(range(len(array))), array)


def test_a_pickle_of_python_2_is_read(tmp_path):
    values = np.array([[1.0, -2.5, 3e7], [4, 5, 6]])
    text = repr(values.tobytes())[1:].encode()
    (tmp_path / "a.pkl").write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nI3\ntcnumpy\ndtype\n"
        b"(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS" + text + b"\ntb."
    )
    np.testing.assert_array_equal(open_array(tmp_path / "a.pkl").read([0, 1]), values.astype(np.float32))


class Payload:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Harmless:
    """A class of someone's, of which there is nothing to fear."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(tmp_path, protocol):
    path, owned = tmp_path / "a.pkl", tmp_path / "owned"
    command = f"touch {owned}"
    attack = f"__import__('os').system({command!r})"
    objects = np.empty((2, 2), object)
    objects[:] = Payload(os.system, command)
    for content, name in {
        Payload(os.system, command): "posix.system",
        Payload(eval, attack): "builtins.eval" if protocol > 2 else "__builtin__.eval",
        Payload(Payload, Payload(os.system, command)): f"{__name__}.Payload",
        (numbers((2, 3)).tobytes(), Payload(os.system, command)): "posix.system",
        Payload(getattr, Payload(__import__, "os"), "system"): "getattr",
        Harmless(): f"{__name__}.Harmless" if protocol > 1 else "copy_reg._reconstructor",
        Payload(np.load, "x.npy"): "numpy.load",
    }.items():
        path.write_bytes(pickle.dumps(content, protocol))
        message = refusal(path)
        assert "refused, as it names" in message and name in message and "nothing was run; save the array" in message
    path.write_bytes(pickle.dumps(objects, protocol))
    assert "refused, as it names posix.system" in refusal(path)
    assert not owned.exists()


def test_a_payload_would_run_if_it_were_unpickled(tmp_path):
    """The attack of the test above is one."""
    pickle.loads(pickle.dumps(Payload(os.system, f"touch {tmp_path / 'owned'}")))  # noqa: S301
    assert (tmp_path / "owned").exists()


HEAD = b"\x80\x04"
ARRAY = b"cnumpy\nndarray\n"


@pytest.mark.parametrize(
    "content",
    [
        ARRAY + b"N}\x8c\x05shapeK\x01s\x86b.",  # sets an attribute of the class
        b"cnumpy.core.multiarray\n_reconstruct\nN}\x8c\x07__new__" + ARRAY + b"s\x86b.",
        b"c_codecs\nencode\n}\x8c\x07__new__K\x01sb.",
        b"c_codecs\nencode\n\x8c\x01a\x8c\x06base64\x86R.",  # another codec
        b"cnumpy\ndtype\n\x8c\x0a__class__.x\x85R.",
        ARRAY + b")\x81.",  # an array of which nothing is said
        ARRAY + b")\x81(K\x01K\x02K\x03\x86cnumpy\ndtype\n\x8c\x02f8\x85R\x89C\x08abcdefghtb.",  # bytes too few
        ARRAY + b")\x81(K\x01K\x02\x85cnumpy\ndtype\n\x8c\x05f8,f8\x85R\x89C\x10abcdefghabcdefghtb.",
        ARRAY + b")\x81\x94(K\x01K\x02\x85h\x00\x89C\x00tb.",  # its own dtype
        b"\x97.",  # data kept elsewhere
        b"\x8c\x01xQ.",  # an object kept elsewhere
    ],
)
def test_pickles_that_play_with_the_names_of_arrays_are_refused(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(HEAD + content)
    assert "cannot be read as a pickle of an array (" in refusal(path)
    write_pickle(path, numbers((2, 3)))
    np.testing.assert_array_equal(open_array(path).read([1]), [[3, 4, 5]])


def test_a_name_within_a_name_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(HEAD + b"\x8c\x05numpy\x8c\x16ndarray.__subclasses__\x93.")
    assert "it names numpy.ndarray.__subclasses__" in refusal(tmp_path / "a.pkl")


def test_a_pickle_of_anything_but_one_array_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    for content, kind in ((3, "int"), ({"x": numbers((2, 3))}, "dict"), ([numbers((2, 3))], "list")):
        path.write_bytes(pickle.dumps(content))
        assert f"holds a {kind}, not one NumPy array; save the array alone, with numpy.save" in refusal(path)
    path.write_bytes(pickle.dumps(np.float32(3)))
    assert "it names numpy._core.multiarray.scalar: a pickle may hold one NumPy array and nothing" in refusal(path)
    path.write_bytes(pickle.dumps(numbers((2, 3))) * 2)
    assert "goes on after its first array; a pickle may hold one: save" in refusal(path)


def test_no_code_of_a_pytorch_file_runs(tmp_path):
    for content in (Payload(os.system, f"touch {tmp_path / 'owned'}"), {"x": torch.zeros(2, 3), "y": Harmless()}):
        torch.save(content, tmp_path / "a.pt")
        message = refusal(tmp_path / "a.pt")
        assert ": refused, as it holds more than tensors (" in message and "; nothing was run; save the" in message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("place", [{"compressor": {"id": "pickle"}}, {"filters": [{"id": "pickle"}]}])
def test_no_code_of_a_zarr_runs(tmp_path, place):
    """Version 2 of the format lets a file name its codecs, of which one is pickle."""
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    meta = {"zarr_format": 2, "shape": [2, 3], "chunks": [2, 3], "dtype": "<f8", "fill_value": 0, "order": "C"}
    (folder / ".zarray").write_text(json.dumps({"compressor": None, "filters": None} | meta | place))
    (folder / "0.0").write_bytes(pickle.dumps(Payload(os.system, f"touch {tmp_path / 'owned'}")))
    assert "cannot be read (" in refusal(folder)
    assert not (tmp_path / "owned").exists()
