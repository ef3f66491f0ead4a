import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr
from matplotlib import colormaps
from matplotlib.text import Text
from PIL import Image
from sklearn.decomposition import PCA as ExactPCA

from workbench.config import ConfigError
from workbench.datasets import fields as fields_module
from workbench.datasets import simulation as simulation_module
from workbench.datasets.arrays import LazyArray
from workbench.datasets.fields import SimulationConfig, Simulations
from workbench.datasets.frames import DataError
from workbench.datasets.plate import write_plate
from workbench.datasets.simulation import open_simulation
from workbench.datasets.splits import SPLITS, hash_split, mix_array, stable_hash
from workbench.field_plots import COLOURS
from workbench.field_traces import FieldTraces
from workbench.metrics import field_errors

P, T, N = 24, 5, 7
SHARES = {"val_fraction": 0.25, "test_fraction": 0.25}


def values(runs: int = P, variables: int = 0, seed: int = 0) -> np.ndarray:
    """Fields of which every value is different."""
    shape = (runs, T, N, variables) if variables else (runs, T, N)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def source(tmp_path) -> Path:
    return saved(tmp_path / "fields.npy", values())


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def opened(source: Path, **settings) -> Simulations:
    return open_simulation(SimulationConfig(**{"data": str(source)} | SHARES | settings))


def table_of(path: Path, columns: dict[str, list]) -> Path:
    rows = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")
    return path


def pictures(folder: Path, runs: int = P, side: int = 16) -> Path:
    """Pictures without ids, natural order; the i-th is grey i times 5, with a mark of its own."""
    folder.mkdir()
    for i in range(runs):
        pixels = np.full((side, side), 5 * i, np.uint8)
        pixels[i % side] = 255 - 7 * i
        Image.fromarray(pixels).save(folder / f"run_{i}.png")
    return folder


def whole(data: Simulations, key: str = "field") -> dict[str, np.ndarray]:
    """One key of the raw batch of every sample, by run."""
    found = {}
    for name in SPLITS:
        dataset = data.split(name)
        batch = dataset.batch(np.arange(len(dataset)))[key].numpy()
        found |= {dataset.name(i): batch[i] for i in range(len(dataset))}
    return found


# samples


@pytest.mark.parametrize("in_memory", [True, False])
def test_every_sample_is_the_one_its_index_says(source, monkeypatch, in_memory):
    monkeypatch.setattr(fields_module, "MEMORY_BYTES", 1e9 if in_memory else 0)
    data, array, seen = opened(source, scaling="global"), values(), []
    assert data.report["in_memory"] is in_memory and (data.memory is not None) is in_memory
    for name in SPLITS:
        dataset = data.split(name)
        for i in range(len(dataset)):
            sample, run = dataset[i], int(dataset.name(i))
            seen.append(run)
            assert set(sample) == {"x", "id", "group"}
            expected = (array[run].T - data.scaling.offset.numpy()) / data.scaling.scale.numpy()
            np.testing.assert_allclose(sample["x"], expected, atol=1e-6)
            assert sample["id"] == sample["group"] == int(stable_hash([str(run)])[0])
            assert torch.equal(sample["x"], dataset[i - len(dataset)]["x"])
    assert sorted(seen) == list(range(P))


def test_a_batch_comes_in_the_order_asked_for_and_an_index_beyond_the_split_is_refused(source):
    train = opened(source).split("train")
    batch = train.batch([3, 0, 3])
    assert batch["field"].shape == (3, T, N, 1) and batch["field"].dtype == torch.float32
    for row, i in enumerate([3, 0, 3]):
        assert torch.equal(train.prepare(batch)["x"][row], train[i]["x"])
    for i in (len(train), -len(train) - 1):
        with pytest.raises(IndexError, match=f"^sample {i} of {len(train)}$"):
            train[i]


def test_variables_become_channels_after_each_other(tmp_path):
    array = values(variables=3)
    data = opened(saved(tmp_path / "f.npy", array), scaling="global")
    assert data.sizes == {"nodes": 3 * N, "steps": T}
    train = data.split("train")
    x, field = train.prepare(train.batch([0, 1]))["x"], train.batch([0, 1])["field"]
    scaled = (field - data.scaling.offset) / data.scaling.scale
    for v in range(3):
        torch.testing.assert_close(x[:, v * N : (v + 1) * N], scaled[..., v].transpose(1, 2))
    torch.testing.assert_close(data.physical(x), field, rtol=1e-5, atol=1e-5)


def test_errors_are_in_the_unit_of_the_field(source):
    data = opened(source, scaling="node")
    train = data.split("train")
    x, y = train[0]["x"][None], train[1]["x"][None]
    truth = torch.from_numpy(values())[[int(train.name(0)), int(train.name(1))]]
    expected = field_errors(truth[1:], truth[:1])
    found = data.errors(y, x)
    assert list(found) == ["relative_l2", "mse", "mae"]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(data.error(y, x), found["relative_l2"])


@pytest.mark.parametrize(("steps", "start", "end"), [(0, 0, 0), (3, 0, 0), (1, 2, 0), (5, 2, 5), (2, 6, 7)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_range_of_steps_and_nodes_is_that_of_the_array(source, monkeypatch, steps, start, end, in_memory):
    monkeypatch.setattr(fields_module, "MEMORY_BYTES", 1e9 if in_memory else 0)
    data = opened(source, time_steps=steps, node_start=start, node_end=end)
    part = values()[:, : steps or T, start : end or N, None]
    assert data.sizes == {"nodes": part.shape[2], "steps": part.shape[1]}
    for run, field in whole(data).items():
        np.testing.assert_array_equal(field, part[int(run)])
    train = data.split_of == 0
    assert data.report["train_max"] == part[train].max() and data.report["train_min"] == part[train].min()


def test_a_field_of_a_file_with_several_is_chosen_by_name(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["u"], file["v"] = values(), values(seed=1)
    for name, seed in (("u", 0), ("v", 1)):
        found = whole(opened(tmp_path / "f.h5", field=name))
        np.testing.assert_array_equal(found["3"][..., 0], values(seed=seed)[3])
    with pytest.raises(DataError, match="holds several arrays: 'u' .*set field to the name of one$"):
        opened(tmp_path / "f.h5")


# splits


def test_runs_are_split_by_their_position_where_they_have_no_id(source):
    data = opened(source)
    expected = hash_split(stable_hash([str(i) for i in range(P)]), 0, **SHARES)
    np.testing.assert_array_equal(data.split_of, expected)
    assert [data.report[f"{name}_runs"] for name in SPLITS] == np.bincount(expected).tolist()
    assert opened(source, split_seed=1).split_of.tolist() != data.split_of.tolist()


def test_runs_with_ids_stay_on_their_side_whatever_is_added_and_wherever(tmp_path):
    names, rng = [f"case-{i}" for i in range(P)], np.random.default_rng(0)

    def sides(order: list[str], stem: str) -> dict[str, str]:
        numbers = {name: i for i, name in enumerate(sorted(order))}
        csv = table_of(tmp_path / f"{stem}.csv", {"id": order, "power": [numbers[name] for name in order]})
        array = saved(tmp_path / f"{stem}.npy", values(len(order)))
        table = opened(array, conditions=str(csv)).table()
        return dict(zip(table["run"], table["split"], strict=True))

    before = sides(names, "before")
    after = sides(rng.permutation([*names, *(f"new-{i}" for i in range(9))]).tolist(), "after")
    assert set(before.values()) == set(SPLITS) and len(after) == P + 9
    assert {name: after[name] for name in names} == before


def test_every_run_of_the_test_data_is_held_out_and_none_of_the_other(source, tmp_path):
    more = values(6, seed=1) * 100
    data = opened(source, test_data=str(saved(tmp_path / "test.npy", more)))
    assert data.split_of[P:].tolist() == [2] * 6 and 2 not in data.split_of[:P]
    np.testing.assert_array_equal(data.split_of[:P], hash_split(stable_hash(map(str, range(P))), 0, 0.25, 0.0))
    test = data.split("test")
    assert [test.name(i) for i in range(6)] == [f"test/{i}" for i in range(6)]
    np.testing.assert_array_equal(test.batch(range(6))["field"][..., 0], more)
    both = data.read(np.array([P + 1, 3, P, 0]))[..., 0]
    np.testing.assert_array_equal(both, [more[1], values()[3], more[0], values()[0]])
    assert data.report["train_max"] == values()[data.split_of[:P] == 0].max()  # the scale knows nothing of them
    assert not np.isin(data.group[P:], data.group[:P]).any()


def test_test_data_of_other_runs_is_refused(source, tmp_path):
    other = saved(tmp_path / "test.npy", np.zeros((3, T, N + 1), np.float32))
    with pytest.raises(
        DataError, match=rf"^test_data .*test.npy has runs of shape \({T}, {N + 1}\), .* of \({T}, {N}\)"
    ):
        opened(source, test_data=str(other))


@pytest.mark.parametrize("name", ["val", "test"])
def test_an_empty_split_names_its_remedy(source, name):
    data = opened(source, val_fraction=0.0, test_fraction=0.0)
    with pytest.raises(DataError) as error:
        data.split(name)
    remedy = f"raise {name}_fraction, or change split_seed"
    assert str(error.value) == f"the {name} split has none of the {P} runs: {remedy}"
    with pytest.raises(DataError, match="^split 'dev': must be one of train, val, test$"):
        data.split("dev")


def test_nothing_to_train_on_is_refused_at_once(tmp_path):
    array = saved(tmp_path / "f.npy", values(1))
    seed = next(s for s in range(99) if mix_array(stable_hash(["0"]), s)[0] / 2**63 < 0.5)
    with pytest.raises(DataError, match="^the train split has none of the 1 runs: lower val_fraction or test_fraction"):
        opened(array, split_seed=seed)


def test_a_subset_is_drawn_by_seed_and_keeps_the_order(source):
    train = opened(source).split("train")
    names = [train.name(i) for i in range(len(train))]
    some = [train.subset(5, seed=1).name(i) for i in range(5)]
    assert len(set(some)) == 5 and some == sorted(some, key=names.index)
    assert some == [train.subset(5, seed=1).name(i) for i in range(5)]
    assert some != [train.subset(5, seed=2).name(i) for i in range(5)]
    assert train.subset(0) is train and train.subset(10**6) is train
    np.testing.assert_array_equal(train.subset(5, seed=1).batch([2])["field"][0, ..., 0], values()[int(some[2])])


# conditions


def test_conditions_without_ids_are_in_the_order_of_the_runs(source, tmp_path):
    csv = table_of(tmp_path / "c.csv", {"power": range(P), "depth": [i**2 for i in range(P)]})
    data = opened(source, conditions=str(csv))
    assert data.condition_names == ["power", "depth"] and data.report["condition"] == "2"
    for run, condition in whole(data, "condition").items():
        assert condition.tolist() == [int(run), int(run) ** 2]
    val = data.split("val")
    assert torch.equal(val.conditions([1, 0]), val.batch([1, 0])["condition"])
    assert torch.equal(val[1]["condition"], val.conditions([1])[0])


def test_conditions_with_ids_name_the_runs(source, tmp_path):
    names = [f"r{i}" for i in range(P)]
    data = opened(source, conditions=str(table_of(tmp_path / "c.csv", {"id": names, "power": range(P)})))
    assert data.ids == names and data.group.tolist() == stable_hash(names).tolist()
    table = data.table()
    assert list(table) == ["run", "group", "split", "power"] and table["power"].tolist() == list(range(P))
    train = data.split("train")
    assert train.column("run").tolist() == [train.name(i) for i in range(len(train))]
    assert [f"r{value:.0f}" for value in train.column("power")] == train.column("run").tolist()
    with pytest.raises(DataError, match="^column 'colour': the data has run, power; choose one of them$"):
        train.column("colour")


NAMED = [f"case {i:x}" for i in np.random.default_rng(3).permutation(P)]
NUMBERED = np.random.default_rng(3).permutation(P) + 100


def named(path: Path, ids: list[str] | np.ndarray = NAMED, runs: slice = slice(None)) -> Path:
    """A file of fields that carries ids of its runs."""
    fields, ids = values()[runs], np.asarray(ids)[runs]
    if path.suffix == ".npz":
        np.savez(path, field=fields, id=ids)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["field"], file["id"] = fields, ids.astype("S") if ids.dtype.kind == "U" else ids
    elif path.suffix == ".zarr":
        group = zarr.open_group(path, mode="w")
        group["field"], group["ids"] = fields, ids.astype(np.dtypes.StringDType()) if ids.dtype.kind == "U" else ids
    elif path.suffix == ".nc":
        data = {"field": (("run", "time", "node"), fields)} | ({} if ids.dtype.kind == "U" else {"id": ("run", ids)})
        coords = {"run": ids} if ids.dtype.kind == "U" else {}
        xarray.Dataset(data, coords=coords).to_netcdf(path, engine="h5netcdf")
    else:
        torch.save({"field": torch.from_numpy(fields), "id": torch.from_numpy(ids)}, path)
    return path


@pytest.mark.parametrize(
    ("file", "ids"),
    [(f"f{end}", NAMED) for end in (".npz", ".h5", ".zarr", ".nc")]
    + [(f"f{end}", NUMBERED) for end in (".npz", ".h5", ".zarr", ".nc", ".pt")],
)
def test_shuffled_rows_find_the_runs_that_the_file_of_the_fields_names(tmp_path, file, ids):
    names, order = [str(name) for name in ids], np.random.default_rng(5).permutation(P)
    csv = table_of(tmp_path / "c.csv", {"power": order, "id": [names[i] for i in order]})
    data = opened(named(tmp_path / file, ids), conditions=str(csv))
    assert data.ids == names and data.conditions.values[:, 0].tolist() == list(range(P))
    fields, conditions = whole(data), whole(data, "condition")
    for run, name in enumerate(names):
        np.testing.assert_array_equal(fields[name][..., 0], values()[run])
        assert conditions[name].tolist() == [run]


@pytest.mark.parametrize("first", [0, 1])
def test_shuffled_rows_that_number_the_runs_are_matched_to_a_file_without_ids(source, tmp_path, first):
    order = np.random.default_rng(6).permutation(P)
    data = opened(source, conditions=str(table_of(tmp_path / "c.csv", {"id": order + first, "power": order})))
    assert data.ids == [str(i + first) for i in range(P)]
    assert data.conditions.values[:, 0].tolist() == list(range(P))


def test_ids_of_the_file_name_the_runs_without_conditions_or_without_ids_of_theirs(tmp_path):
    source = named(tmp_path / "f.npz")
    plain = opened(source)
    assert plain.ids == NAMED and plain.group.tolist() == stable_hash(NAMED).tolist()
    data = opened(source, conditions=str(table_of(tmp_path / "c.csv", {"power": range(P)})))
    assert data.ids == NAMED and data.conditions.values[:, 0].tolist() == list(range(P))
    assert data.fingerprint == plain.fingerprint
    np.savez(tmp_path / "g.npz", field=values(), inputs=np.arange(2 * P, dtype=np.float32).reshape(P, 2), id=NAMED)
    assert opened(tmp_path / "g.npz", field="field", condition_field="inputs").ids == NAMED


def test_pictures_are_matched_to_the_ids_of_the_file(tmp_path):
    folder = pictures(tmp_path / "geometry")
    ids = [f"run_{i}" for i in np.random.default_rng(7).permutation(P)]
    data = opened(named(tmp_path / "f.npz", ids), conditions=str(folder), condition_image_size=16)
    assert data.ids == ids
    greys = data.conditions.batch(np.arange(P))[:, 0].flatten(1).median(dim=1).values * 255
    assert greys.round().tolist() == [5 * int(name.removeprefix("run_")) for name in ids]
    with pytest.raises(DataError, match="geometry: no picture for runs 'case .* and no run of the fields for pictures"):
        opened(named(tmp_path / "g.npz"), conditions=str(folder))


def test_rows_and_pictures_of_other_runs_than_the_file_names_are_refused(tmp_path):
    csv = table_of(tmp_path / "c.csv", {"id": [*NAMED[1:], "other"], "power": range(P)})
    problem = f"no row for run '{NAMED[0]}' of the fields and no run of the fields for row 'other'"
    with pytest.raises(DataError, match=rf"c.csv: {problem}; there must be one row for each of the {P} runs$"):
        opened(named(tmp_path / "f.npz"), conditions=str(csv))


def test_ids_of_the_test_data_follow_those_of_the_fields(tmp_path):
    train = named(tmp_path / "train.npz", runs=slice(0, 18))
    order = np.random.default_rng(8).permutation(P)
    csv = table_of(tmp_path / "c.csv", {"id": [NAMED[i] for i in order], "power": order})
    settings = {"test_data": str(named(tmp_path / "test.h5", runs=slice(18, P))), "conditions": str(csv)}
    data = opened(train, **settings)
    assert data.ids == NAMED and data.conditions.values[:, 0].tolist() == list(range(P))
    assert data.split_of[18:].tolist() == [2] * 6 and 2 not in data.split_of[:18]


def test_test_data_may_not_repeat_ids_nor_lack_them(tmp_path):
    train = named(tmp_path / "train.npz", runs=slice(0, 18))
    again = named(tmp_path / "test.npz", runs=slice(16, P))
    message = rf"^test_data .*test.npz: id '{NAMED[16]}' is also that of a run of .*train.npz \(2 of 8 runs are such\);"
    with pytest.raises(DataError, match=message):
        opened(train, test_data=str(again))
    without = saved(tmp_path / "test.npy", values()[18:])
    for first, second in ((train, without), (without, train)):
        with pytest.raises(DataError, match=r"test.npy: carries no ids of its runs, .*train.npz does; give both an"):
            opened(first, test_data=str(second))


def test_a_field_of_the_same_file_may_hold_the_conditions(tmp_path):
    inputs = np.random.default_rng(1).random((P, 3)).astype(np.float32)
    for name, some in (("train", slice(0, 18)), ("test", slice(18, P))):
        torch.save(
            {"x": torch.from_numpy(inputs[some]), "y": torch.from_numpy(values()[some])}, tmp_path / f"{name}.pt"
        )
    settings = {"field": "y", "condition_field": "x", "test_data": str(tmp_path / "test.pt")}
    data = opened(tmp_path / "train.pt", **settings)
    assert data.condition_names == ["x[0]", "x[1]", "x[2]"]
    np.testing.assert_array_equal(data.split("test").conditions(range(6)), inputs[18:])
    np.testing.assert_array_equal(data.conditions.values, inputs)
    with pytest.raises(DataError, match=r"condition_field 'y' has shape \(18, 5, 7\), the fields have 18 runs; give"):
        opened(tmp_path / "train.pt", field="y", condition_field="y")


def test_a_condition_field_that_is_not_finite_is_refused(tmp_path):
    inputs = np.ones((P, 2), np.float32)
    inputs[3, 1] = np.nan
    np.savez(tmp_path / "f.npz", x=inputs, y=values())
    with pytest.raises(DataError, match=r"f.npz: x\[1\]=nan of row 4 is empty or not finite \(1 such value in 1 run\)"):
        opened(tmp_path / "f.npz", field="y", condition_field="x")


@pytest.mark.parametrize(("colour", "channels"), [("grey", 1), ("rgb", 3)])
def test_pictures_are_matched_in_natural_order_and_lie_between_0_and_1(source, tmp_path, colour, channels):
    folder = pictures(tmp_path / "geometry")
    data = opened(source, conditions=str(folder), condition_image_size=8, condition_colour=colour)
    assert data.condition_names == [] and data.ids == [f"run_{i}" for i in range(P)]
    assert data.report["condition"] == f"{channels} x 8 x 8"
    condition = data.conditions.batch(np.arange(P))
    assert condition.shape == (P, channels, 8, 8) and condition.dtype == torch.float32
    assert torch.equal(condition[13, :, 0, 0], torch.full((channels,), 5 * 13 / 255))
    assert list(data.split("train").table()) == ["run"]


def test_components_of_pictures_are_those_of_the_training_split(source, tmp_path):
    folder = pictures(tmp_path / "geometry")
    settings = {"conditions": str(folder), "condition_image_size": 16}
    plain, data = opened(source, **settings), opened(source, condition_pca=3, **settings)
    assert data.condition_names == ["PC1", "PC2", "PC3"] and data.conditions.values.shape == (P, 3)
    flat, train = plain.conditions.batch(np.arange(P)).flatten(1).numpy(), data.split_of == 0
    exact = ExactPCA(3).fit(flat[train]).transform(flat)
    np.testing.assert_allclose(np.abs(data.conditions.values), np.abs(exact), atol=1e-3)
    np.testing.assert_allclose(data.conditions.values[train].mean(0), 0, atol=1e-4)
    held_out = next(i for i in range(P) if not train[i])
    Image.new("L", (16, 16), 255).save(folder / f"run_{held_out}.png")
    again = opened(source, condition_pca=3, **settings).conditions.values
    others = np.arange(P) != held_out
    np.testing.assert_allclose(again[others], data.conditions.values[others], atol=1e-5)
    assert np.abs(again[held_out] - data.conditions.values[held_out]).max() > 0.1


def test_components_need_pictures_and_enough_of_them(source, tmp_path):
    csv = table_of(tmp_path / "c.csv", {"power": range(P)})
    for conditions in ("", str(csv)):
        with pytest.raises(DataError, match="^condition_pca=3: the conditions are not pictures; set it to 0$"):
            opened(source, conditions=conditions, condition_pca=3)
    with pytest.raises(
        DataError, match=r"^condition_pca=99: \d+ pictures of the training split, of 64 values each, have"
    ):
        opened(source, conditions=str(pictures(tmp_path / "g")), condition_pca=99, condition_image_size=8)


def test_as_many_conditions_as_runs_are_needed(source, tmp_path):
    csv = table_of(tmp_path / "c.csv", {"power": range(P - 1)})
    with pytest.raises(DataError, match=rf"c.csv: has {P - 1} rows, the fields have {P} runs; give one row per run$"):
        opened(source, conditions=str(csv))
    with pytest.raises(
        DataError, match=rf"holds {P - 2} pictures .* the fields have {P} runs; give one picture per run"
    ):
        opened(source, conditions=str(pictures(tmp_path / "g", P - 2)))
    with pytest.raises(DataError, match="nowhere: no such file; give the path of the CSV"):
        opened(source, conditions=str(tmp_path / "nowhere"))


def test_a_condition_that_is_constant_in_the_training_split_is_refused(source, tmp_path):
    held_out = opened(source).split_of != 0
    columns = {"power": range(P), "depth": [5 if out else 2 for out in held_out]}
    csv = table_of(tmp_path / "c.csv", columns)
    with pytest.raises(DataError, match=rf"column 'depth' is 2 in all {(~held_out).sum()} runs of the training split"):
        opened(source, conditions=str(csv))


# bad fields


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_of_two_runs_the_one_that_is_not_finite_is_named_and_nothing_is_kept(tmp_path, monkeypatch, value, in_memory):
    monkeypatch.setattr(fields_module, "MEMORY_BYTES", 1e9 if in_memory else 0)
    array = values(2)
    array[1, 2, 4] = array[1, 3, 5] = value
    csv = table_of(tmp_path / "c.csv", {"id": ["good", "bad"], "power": [1, 2]})
    settings = {"conditions": str(csv), "val_fraction": 0.0, "test_fraction": 0.0, "node_start": 3}
    place = r"'bad' is not finite at node 4, time step 2 \(2 such values in 1 of 2 runs\); mend the run or remove it"
    source = saved(tmp_path / "f.npy", array)
    with pytest.raises(DataError, match=f"^the field of run {place}: nothing is put in its place$"):
        opened(source, cache_dir=str(tmp_path / "cache"), **settings)
    assert list((tmp_path / "cache" / "simulations").glob("*.npz*")) == []
    assert opened(source, time_steps=2, **settings).report["runs"] == 2  # the part before it is sound


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"time_steps": T + 1}, rf"^time_steps={T + 1}: .*fields.npy has {T} time steps and {N} nodes; lower it$"),
        ({"node_end": N + 1}, rf"^node_end={N + 1}: .* has {T} time steps and {N} nodes; lower it$"),
        ({"node_start": N}, rf"^node_start={N}: .* has {T} time steps and {N} nodes; lower it$"),
    ],
)
def test_a_range_outside_the_data_is_refused(source, settings, message):
    with pytest.raises(DataError, match=message):
        opened(source, **settings)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 2, 2)])
def test_an_array_of_another_number_of_axes_is_refused(tmp_path, shape):
    with pytest.raises(DataError, match="f.npy: .*has shape|f.npy: fields of shape"):
        opened(saved(tmp_path / "f.npy", np.zeros(shape, np.float32)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"node_start": 4, "node_end": 3}, "node_end=3: must be above node_start=4, or 0 for all"),
        ({"conditions": "c.csv", "condition_field": "x"}, "condition_field='x': must be empty where conditions are"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "must be less than 1, to leave runs to train on"),
        ({"scaling": "minmax"}, "scaling"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SimulationConfig(**settings)


# statistics kept, and the fingerprint


@pytest.fixture
def readings(monkeypatch) -> list[int]:
    """The runs that are read from files."""
    seen, read = [], LazyArray.read

    def spy(self: LazyArray, runs: np.ndarray, *ranges: slice) -> np.ndarray:
        seen.extend(np.asarray(runs).tolist())
        return read(self, runs, *ranges)

    monkeypatch.setattr(LazyArray, "read", spy)
    monkeypatch.setattr(fields_module, "MEMORY_BYTES", 0)
    return seen


def test_a_second_opening_makes_no_pass(source, readings):
    first = opened(source)
    assert readings == list(range(P))
    second = opened(source, scaling="global", conditions="")
    assert len(readings) == P and second.fingerprint == first.fingerprint
    assert torch.equal(opened(source).scaling.scale, first.scaling.scale) and len(readings) == P
    assert opened(source).report == first.report


@pytest.mark.parametrize("settings", [{"split_seed": 3}, {"time_steps": 2}, {"node_start": 1}, {"val_fraction": 0.1}])
def test_other_runs_or_ranges_are_described_anew(source, readings, settings):
    opened(source)
    opened(source, **settings)
    assert len(readings) == 2 * P


def test_statistics_of_a_file_that_changed_are_made_anew(source, readings):
    before = opened(source)
    saved(source, 3 * values())
    os.utime(source, ns=(1, 10**9))
    after = opened(source)
    assert len(readings) == 2 * P and after.fingerprint != before.fingerprint
    torch.testing.assert_close(after.scaling.scale, 3 * before.scaling.scale)


def test_the_fingerprint_is_of_values_split_ranges_and_ids_not_of_place_or_conditions(source, tmp_path):
    first = opened(source).fingerprint
    (tmp_path / "elsewhere").mkdir()
    csv = table_of(tmp_path / "c.csv", {"power": range(P)})
    same = [opened(saved(tmp_path / "elsewhere" / "g.npy", values())), opened(source, conditions=str(csv))]
    assert {data.fingerprint for data in same} == {first}
    spoilt = values()
    spoilt[-1, -1, -1] += 1
    ids = table_of(tmp_path / "ids.csv", {"id": [f"r{i}" for i in range(P)], "power": range(P)})
    different = [
        opened(saved(tmp_path / "h.npy", spoilt)),
        opened(saved(tmp_path / "i.npy", values().reshape(P, N, T))),
        opened(source, split_seed=1),
        opened(source, time_steps=4),
        opened(source, conditions=str(ids)),
    ]
    assert len({first, *(data.fingerprint for data in different)}) == 6


def test_statistics_are_those_of_the_scaling(source):
    data = opened(source)
    assert set(data.statistics()) == {"offset", "scale"} and data.statistics()["scale"] is data.scaling.scale


# places of nodes, and the plate


def test_places_of_nodes_lie_beside_the_fields_and_follow_their_range(source, tmp_path):
    assert opened(source).coordinates is None
    table_of(tmp_path / "nodes.csv", {"x": range(N), "y": [0.5 * i for i in range(N)]})
    assert opened(source).coordinates.tolist() == [[i, 0.5 * i] for i in range(N)]
    assert opened(source, node_start=2, node_end=4).coordinates.tolist() == [[2, 1], [3, 1.5]]
    table_of(tmp_path / "nodes.csv", {"x": range(N - 1)})
    with pytest.raises(
        DataError, match=f"nodes.csv: has {N - 1} rows, the fields have {N} nodes; give one row per node$"
    ):
        opened(source)


def test_the_grid_shows_fields_in_their_unit_and_counts_variables(tmp_path):
    data = opened(saved(tmp_path / "f.npy", values(variables=2)), field_unit="velocity [m/s]", scaling="node")
    train = data.split("train")
    x = train.prepare(train.batch([0, 1]))["x"]
    fig = data.grid({"true": x, "again": x}, ["a", "b"])
    drawn = np.asarray(fig.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, values(variables=2)[int(train.name(0)), ..., 0].T, atol=1e-5)
    assert "velocity [m/s], first of 2 variables" in fig.axes[-1].get_ylabel().replace("\n", " ")
    assert opened(tmp_path / "f.npy").field_label == "field [its unit]"


def test_pixels_and_views_are_of_the_first_variable_alone(tmp_path):
    """A second variable of another range would leave the first one colour."""
    fields = np.stack([values(), 1000 + values(seed=1)], axis=-1)
    data = opened(saved(tmp_path / "f.npy", fields))
    train = data.split("train")
    x = train.prepare(train.batch(np.arange(len(train))))["x"]
    first = fields[train.runs, ..., 0]
    lowest, highest = np.argwhere(first == first.min())[0], np.argwhere(first == first.max())[0]
    pixels = [data.pixels(x[run])[::-1][node, step] for run, step, node in (lowest, highest)]
    np.testing.assert_allclose(pixels, 255 * colormaps[COLOURS]([0.0, 1.0])[:, :3], atol=1)
    labels = [text.get_text().replace("\n", " ") for text in data.compare(x[:1], {"again": x[:1]}).findobj(Text)]
    assert "field [its unit], first of 2 variables" in labels


def test_traces_are_of_three_nodes_in_the_unit_of_the_field(tmp_path):
    data = opened(saved(tmp_path / "f.npy", values(variables=2)), field_unit="velocity [m/s]", scaling="node")
    train = data.split("train")
    x = train.prepare(train.batch([0, 1]))["x"]
    caption, pixels = data.traces(x[0], x[1])
    nodes = [round(share * (N - 1)) for share in (0.2, 0.5, 0.95)]
    numbers = ", ".join(map(str, nodes))
    said = f"velocity [m/s], first of 2 variables at nodes {numbers}: decoded solid, nearest sample dashed"
    assert caption == said
    first = values(variables=2)[..., 0]
    seen = first[train.runs][..., nodes]
    drawn = FieldTraces(nodes, (float(seen.min()), float(seen.max())), first.shape[1], "")
    # scaling and back moves values by a rounding error, which moves shades of the curves' edges
    expected = drawn.draw(*(first[int(train.name(i))] for i in (0, 1)))
    assert np.abs(pixels.astype(int) - expected).max() <= 2 and not np.array_equal(pixels, data.traces(x[1], x[0])[1])


@pytest.fixture
def plate(monkeypatch) -> None:
    """A small plate in place of the one of 240 runs."""

    def write(folder: Path, progress=None) -> Path:
        return write_plate(folder, runs=12, steps=4, nodes=100, progress=progress)

    monkeypatch.setattr(simulation_module, "write_plate", write)


def test_the_plate_comes_with_conditions_units_and_places(plate):
    data = open_simulation(SimulationConfig(**SHARES))
    assert data.sizes["steps"] == 4 and data.coordinates.shape == (data.sizes["nodes"], 2)
    assert data.ids[3] == "run_003" and data.field_label == "temperature rise [K]"
    assert data.condition_names == ["conductivity", "power", "source_x", "notch_depth", "notch_x"]
    assert set(data.condition_names) < set(data.units)
    folder = Path(os.environ["WORKBENCH_OUTPUTS"]) / "cache" / "plate"
    assert open_simulation(SimulationConfig(**SHARES)).fingerprint == data.fingerprint
    shown = open_simulation(SimulationConfig(conditions=str(folder / "geometry"), condition_image_size=8, **SHARES))
    assert shown.fingerprint == data.fingerprint and shown.ids == data.ids
    assert shown.split("train")[0]["condition"].shape == (1, 8, 8)
