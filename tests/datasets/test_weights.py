from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from workbench.config import ConfigError
from workbench.datasets import weight_scaling, zoo_building
from workbench.datasets import weights as weights_module
from workbench.datasets.alignment import align
from workbench.datasets.flat_weights import flatten
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Dataset, epoch_order
from workbench.datasets.opening import Data
from workbench.datasets.splits import SPLITS, stable_hash
from workbench.datasets.weights import WeightDataset, Weights, WeightsConfig, open_weights
from workbench.datasets.zoo_selection import balanced_order

RUNS, EPOCHS = 24, (1, 2)
ARCHITECTURES = ("conv", "linear")


def module(architecture: str, seed: int) -> nn.Module:
    """One of 68 weights with buffers, or one of 9."""
    torch.manual_seed(seed)
    if architecture == "linear":
        return nn.Linear(2, 3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    net[1].num_batches_tracked += 2**40 + seed
    return net


def entry(run: int, epoch: int) -> tuple[dict, dict]:
    """Every second run is of the other architecture; accuracy rises with the run."""
    properties = {"run": f"r{run}", "epoch": epoch, "accuracy": (run + epoch) / 50}
    properties |= {"architecture": ARCHITECTURES[run % 2], "dataset": "mnist" if run % 3 else "svhn", "shared": run > 9}
    return properties, module(ARCHITECTURES[run % 2], 100 * run + epoch).state_dict()


@pytest.fixture
def source(tmp_path) -> Path:
    """A zoo of 24 training runs with two epochs each, in two files."""
    folder = tmp_path / "zoo"
    (folder / "weights").mkdir(parents=True)
    for name, runs in (("few", range(4)), ("many", range(4, RUNS))):
        torch.save([entry(run, epoch) for run in runs for epoch in EPOCHS], folder / "weights" / f"{name}.pt")
    return folder


def opened(folder: Path, **values) -> Weights:
    return open_weights(WeightsConfig(**{"data": str(folder), "val_fraction": 0.25, "test_fraction": 0.2} | values))


def all_of(data: Weights) -> WeightDataset:
    return WeightDataset(data, np.arange(len(data.rows)))


def raw_of(data: Weights) -> torch.Tensor:
    return torch.from_numpy(data.read(np.arange(len(data.rows))))


# samples


def test_opened_weights_keep_the_contract_of_data(source):
    data = opened(source)
    assert isinstance(data, Data) and isinstance(data.split("train"), Dataset)
    assert data.sizes == {"max_len": 68} and data.main_column == "accuracy" and data.group_name == "training runs"
    assert data.condition_names == [] and data.condition_fingerprint == "" and len(data.broken) == 0
    report = data.report
    assert report["networks"] == 48 and report["training_runs"] == 24 and report["architectures"] == 2
    assert report["shortest"] == 9 and report["longest"] == 68 and report["padding"] == round(1 - 77 / 136, 4)
    assert sum(report[f"{name}_runs"] for name in SPLITS) == 24
    assert sum(report[f"{name}_samples"] for name in SPLITS) == 48


def test_a_sample_is_the_one_asked_for(source):
    data = opened(source)
    train = data.split("train")
    for index in (0, 3, len(train) - 1, -1):
        sample, row = train[index], train.table().iloc[index]
        run, architecture = int(row["run"][1:]), row["architecture"]
        flat = flatten(module(architecture, 100 * run + row["epoch"]).state_dict())[0]
        assert data.architectures[sample["architecture"]].name == architecture
        assert sample["x"].shape == (68,) and sample["x"].dtype == torch.float32
        assert sample["mask"].sum() == len(flat) and sample["mask"][: len(flat)].all()
        assert (sample["x"][len(flat) :] == 0).all()
        weights = data.denormalize(sample["x"][None], sample["architecture"][None])[0]
        assert torch.allclose(weights[: len(flat)], flat, atol=1e-6) and (weights[len(flat) :] == 0).all()
        assert sample["group"] == stable_hash([row["run"]])[0] and sample["id"] == stable_hash([row["id"]])[0]
        assert train.name(index) == row["id"]
    for index in (len(train), -len(train) - 1):
        with pytest.raises(IndexError, match=f"^sample {index} of {len(train)}$"):
            train[index]


def test_the_key_of_pixels_is_of_the_own_architecture(source):
    data = opened(source)
    samples = all_of(data)
    for index, names in ((0, ["0.weight", "0.bias"]), (2, ["weight", "bias"])):
        sample = samples.prepare(samples.batch([index]))
        key, size = data.key(sample), data.architectures[int(sample["architecture"][0])].size
        assert key["kind"] == "layers" and [name for name, _, _ in key["entries"]][:2] == names
        starts, ends = np.array([entry[1:] for entry in key["entries"]]).T
        assert starts[0] == 0 and (starts[1:] == ends[:-1]).all() and ends[-1] == pytest.approx(size / (9 * 8))
        height, width, _ = data.pixels(sample["x"][0]).shape
        assert (height, width) == (8, 9)


def test_a_batch_is_in_the_order_asked_for(source):
    train = opened(source).split("train")
    batch = train.prepare(train.batch([5, 0, 5]))
    for row, index in enumerate([5, 0, 5]):
        assert all(torch.equal(batch[key][row], value) for key, value in train[index].items())


def test_all_epochs_of_a_run_are_in_one_split(source):
    data = opened(source)
    table = data.table()
    assert (table.groupby("run")["split"].nunique() == 1).all() and (table.groupby("run").size() == 2).all()
    assert set(table["split"]) == set(SPLITS) and (table.groupby("run")["group"].nunique() == 1).all()
    for name in SPLITS:
        assert data.split(name).column("id").tolist() == table["id"][table["split"] == name].tolist()
    assert opened(source, split_seed=1).table()["split"].tolist() != table["split"].tolist()


def test_the_table_tells_all_properties_with_their_kinds(source):
    table = opened(source).table()
    first = {"file": "few.pt", "id": "few/0", "run": "r0", "architecture": "conv", "epoch": 1, "accuracy": 0.02}
    assert table.iloc[0][list(first)].to_dict() == first and table["shared"].dtype == bool
    assert table["accuracy"].dtype == float and table["epoch"].dtype == int


def test_subset_and_columns(source):
    train = opened(source).split("train")
    some = train.subset(5, seed=1)
    assert len(some) == 5 and set(some.column("id")) < set(train.column("id")) and train.subset(0) is train
    with pytest.raises(DataError, match="column 'loss': the data has file, id, run, architecture, epoch"):
        train.column("loss")


# networks come back


def test_a_network_with_batch_normalisation_comes_back_bit_for_bit(source):
    data = opened(source)
    for position in (0, 2, 47):
        row = data.rows.iloc[position]
        module_ = module(row["architecture"], 100 * int(row["run"][1:]) + row["epoch"])
        for network in (position, row["id"]):
            state = data.state_dict(network)
            assert all(torch.equal(state[key], tensor) for key, tensor in module_.state_dict().items())
            module_.load_state_dict(state)
    train = data.split("train")
    index = train.column("architecture").tolist().index("conv")
    state = train.state_dict(index, torch.arange(70.0))
    assert flatten(state)[0].tolist() == list(range(68))
    assert state["1.num_batches_tracked"] == data.state_dict(train.name(index))["1.num_batches_tracked"] > 2**40
    with pytest.raises(DataError, match="network 'few/99': none of the 48 networks has this id"):
        data.state_dict("few/99")


def test_weights_in_float64_come_back_exactly_and_are_trained_on_in_float32(source):
    states = [module("linear", i).double().state_dict() for i in range(8)]
    for path in (source / "weights").iterdir():
        path.unlink()
    torch.save([({}, {name: t + 1e-12 for name, t in state.items()}) for state in states], source / "weights" / "a.pt")
    data = opened(source, val_fraction=0.0, test_fraction=0.0)
    assert torch.equal(data.state_dict(3)["weight"], states[3]["weight"] + 1e-12)
    assert data.split("train")[0]["x"].dtype == torch.float32 and data.report["dtype"] == "float64"


# scaling


@pytest.mark.parametrize("normalize", ["none", "global", "layer"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scaling_is_fitted_on_the_training_split_without_padding(source, normalize, scale):
    data = opened(source, normalize=normalize, weight_scale=scale)
    train = data.split("train")
    raw, x = train.batch(np.arange(len(train))), train.prepare(train.batch(np.arange(len(train))))
    assert (x["x"][~x["mask"]] == 0).all()
    mean, std = {"mean": 0.0}, {"std": 1.0}
    if normalize == "global":
        values = raw["x"][x["mask"]].double()
        mean, std = values.mean(), values.std(correction=0)
        assert torch.allclose(
            (raw["x"].double() - mean)[x["mask"]] / std * scale, x["x"][x["mask"]].double(), atol=1e-5
        )
        assert data.statistics().keys() == {"mean", "std"}
        assert torch.isclose(data.statistics()["std"], std.float()) and data.statistics()["mean"].shape == ()
    elif normalize == "none":
        assert torch.allclose(raw["x"] * scale, x["x"]) and data.statistics() == {}
    else:
        for number, architecture in enumerate(data.architectures):
            rows = x["architecture"] == number
            for i, layer in enumerate(architecture.layers):
                part = slice(layer.offset, layer.offset + layer.size)
                values, scaled = raw["x"][rows, part].double(), x["x"][rows, part].double()
                spread = values.std(correction=0)
                spread = spread if spread > 1e-9 else torch.ones_like(spread)
                expected = (values - values.mean()) / spread * scale
                assert torch.allclose(scaled, expected, atol=1e-5), layer.name
                fitted = data.statistics()[f"std.{architecture.name}"][i].double()
                assert torch.isclose(fitted, spread)
    architecture = torch.from_numpy(data.architecture)
    back = data.denormalize(data.normalize(raw_of(data), architecture), architecture)
    assert torch.allclose(back, raw_of(data), atol=1e-6, rtol=1e-6)


def test_a_constant_layer_keeps_its_unit(source):
    data = opened(source)
    statistics = data.statistics()
    names = [layer.name for layer in data.architectures[0].layers]
    constant = [names.index(name) for name in ("1.weight", "1.running_mean", "1.running_var")]
    assert statistics["std.conv"][constant].tolist() == [1, 1, 1]
    assert statistics["mean.conv"][constant].tolist() == [1, 0, 1]


def test_moments_do_not_depend_on_how_many_networks_are_read_at_once(source, monkeypatch):
    whole = opened(source, cache_dir=str(source.parent / "a")).statistics()
    monkeypatch.setattr(weight_scaling, "CHUNK_BYTES", 8 * 68 * 3)
    in_parts = opened(source, cache_dir=str(source.parent / "b")).statistics()
    assert all(torch.allclose(in_parts[name], value, atol=1e-7) for name, value in whole.items())


def test_an_architecture_without_training_networks_cannot_be_scaled_by_layer(source):
    torch.save(
        [({**entry(1, 1)[0], "architecture": "odd", "run": "held out"}, {"w": torch.ones(4)})], source / "weights/z.pt"
    )
    seed = next(seed for seed in range(99) if opened(source, normalize="none", split_seed=seed).split_of[-1])
    with pytest.raises(
        DataError, match="normalize='layer': no network of the architecture 'odd' is in the training split"
    ):
        opened(source, split_seed=seed)
    assert opened(source, split_seed=seed, normalize="global").sizes == {"max_len": 68}


# errors


def test_errors_are_means_over_weights_and_never_over_padding(source):
    data = opened(source)
    batch = all_of(data).prepare(all_of(data).batch(np.arange(4)))
    x_hat = torch.where(batch["mask"], batch["x"] + 0.5, torch.nan)
    assert torch.allclose(data.errors(x_hat, batch["x"], batch["mask"])["mse"], torch.full((4,), 0.25))
    assert torch.allclose(data.error(x_hat, batch["x"], batch["mask"]), torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="mask: must be given, as networks are padded"):
        data.errors(x_hat, batch["x"])
    unpadded = opened(source, where=["architecture=linear"])
    x = torch.zeros(2, 9)
    assert unpadded.errors(x + 3, x)["mse"].tolist() == [9, 9]


# which networks


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"where": ["architecture=linear", "epoch=2"]}, lambda t: (t["architecture"] == "linear") & (t["epoch"] == 2)),
        ({"where": ["run=r3", "run=r5", "run=r6"]}, lambda t: t["run"].isin(["r3", "r5", "r6"])),
        ({"where": ["shared=True"], "trained_on": "svhn"}, lambda t: t["shared"] & (t["dataset"] == "svhn")),
        ({"trained_on": "joint"}, lambda t: t["epoch"] > 0),
        ({"topk": 3}, lambda t: t["run"].eq("r23") | (t["run"].eq("r22") & t["epoch"].eq(2))),
        ({"topk": 2, "topk_by": "-accuracy"}, lambda t: t["id"].isin(["few/0", "few/1"])),
        ({"topk": 5, "topk_by": "epoch"}, lambda t: t["id"].isin(["few/1", "few/3", "few/5", "few/7", "many/1"])),
    ],
)
def test_networks_are_chosen_by_their_properties(source, values, kept):
    whole = opened(source).table()
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    chosen = opened(source, **values, **fractions).table()
    assert chosen["id"].tolist() == whole["id"][kept(whole)].tolist() and len(chosen) > 0


def test_choosing_moves_no_network_to_another_split(source):
    whole, chosen = (opened(source, where=where).table().set_index("id")["split"] for where in ([], ["epoch=2"]))
    assert len(chosen) == 24 and (chosen == whole[chosen.index]).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"where": ["colour=red"]},
            "property 'colour': the networks have file, id, run, architecture, epoch, accuracy",
        ),
        ({"where": ["epoch=3"]}, "epoch=3: no network has this value; there are 1, 2"),
        (
            {"where": ["run=r1", "architecture=conv"]},
            "no network has run=r1 and architecture=conv together; ask for less",
        ),
        ({"where": ["dataset=svhn"], "trained_on": "mnist"}, "no network has dataset=svhn and dataset=mnist together"),
        ({"trained_on": "stl10"}, "dataset=stl10: no network has this value; there are mnist, svhn"),
        ({"topk": 5, "topk_by": "loss"}, "property 'loss': the networks have .*; correct where, trained_on or topk_by"),
        (
            {"topk": 5, "topk_by": "dataset"},
            "topk_by='dataset': must be a property that is a number; 'dataset' has 'svhn'",
        ),
        ({"topk": 5, "topk_by": "shared"}, "topk_by='shared': must be a property that is a number"),
        ({"topk": 49}, "topk=49: there are 48 networks to choose from; lower it, or set it to 0"),
        (
            {"max_len": 50},
            r"max_len=50: 24 of 48 networks have more weights: 'few/0' \(68\), 'few/1' \(68\), 'few/4' \(68\), \.\.\.; "
            "nothing is cut off: set it to at least 68, or to 0",
        ),
        (
            {"where": ["run=r1"], "test_fraction": 0.99, "val_fraction": 0.0},
            "the train split has none of the 2 networks of 1",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(source, values, message):
    with pytest.raises(DataError, match=message):
        opened(source, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"where": ["epoch"]}, "where='epoch': must read property=value"),
        ({"where": ["=1"]}, "where='=1': must read property=value"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must be less than 1, to leave runs"),
        ({"weight_scale": 0.0}, "weight_scale=0.0: must be at least 1e-06"),
        ({"weight_scale": 1e7}, "weight_scale=10000000.0: must be at most 1e\\+06"),
        ({"normalize": "node"}, "normalize='node': must be 'none', 'global' or 'layer'"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        WeightsConfig(**values)


def test_a_given_length_pads_all_networks(source):
    data = opened(source, max_len=100, where=["architecture=linear"])
    sample = data.split("train")[0]
    assert data.sizes == {"max_len": 100} and sample["x"].shape == (100,) and sample["mask"].sum() == 9
    with pytest.raises(ValueError, match="mask: must be given"):
        data.errors(sample["x"][None], sample["x"][None])


def test_nan_in_the_property_of_a_ranking_is_refused(source):
    torch.save([({**entry(1, 1)[0], "accuracy": float("nan")}, entry(1, 1)[1])], source / "weights" / "z.pt")
    with pytest.raises(DataError, match="topk_by='accuracy': is NaN in 1 networks, such as 'z/0'; leave them out"):
        opened(source, topk=5)
    assert opened(source, topk=30, where=["file=many.pt"]).report["networks"] == 30


def test_large_whole_numbers_are_ranked_as_such(tmp_path):
    values = {"b": 2**63, "a": 0, "d": 2**64 - 1, "c": 2**64 - 1}
    entries = [
        ({"id": name, "seed": value}, module("linear", i).state_dict())
        for i, (name, value) in enumerate(values.items())
    ]
    (tmp_path / "large").mkdir()
    torch.save(entries, tmp_path / "large" / "a.pt")
    for topk_by, best in (("seed", ["c", "d", "b"]), ("-seed", ["a", "b", "c"])):
        for n in (1, 2, 3):
            kept = opened(tmp_path / "large", topk=n, topk_by=topk_by, val_fraction=0.0, test_fraction=0.0)
            assert set(kept.table()["id"]) == set(best[:n])


def test_steps_without_their_run_are_refused(tmp_path):
    (tmp_path / "steps").mkdir()
    torch.save([({"step": i % 2}, module("linear", i).state_dict()) for i in range(6)], tmp_path / "steps" / "a.pt")
    with pytest.raises(
        DataError, match="property 'step', with 2 different values, and no property 'run': all steps of"
    ):
        opened(tmp_path / "steps")


def test_epochs_without_their_run_are_refused_unless_one_is_chosen(source):
    for path in (source / "weights").iterdir():
        entries = torch.load(path, weights_only=True)
        torch.save([({k: v for k, v in p.items() if k != "run"}, state) for p, state in entries], path)
    with pytest.raises(DataError, match="property 'epoch', with 2 different values, and no property 'run'"):
        opened(source)
    assert opened(source, where=["epoch=2"]).report["training_runs"] == 24


# order


@pytest.mark.parametrize("balance", ["file", "architecture"])
def test_balanced_epochs_see_every_label_equally_often(source, balance):
    train = opened(source, balance=balance).split("train")
    labels = train.column(balance)
    orders = [train.epoch_order(seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[3])
    for order in orders:
        assert order.shape == (len(train),) and order.min() >= 0 and order.max() < len(train)
        for first in range(0, len(train) - 1, 2):
            assert len(set(labels[order[first : first + 2]])) == 2, "two samples in turn are of both labels"


def test_a_balanced_order_uses_up_the_samples_of_a_label_before_it_repeats_them():
    labels = np.array([5] * 3 + [2] * 9)
    order = balanced_order(labels, 0, 0)
    rare, frequent = order[labels[order] == 5], order[labels[order] == 2]
    assert len(rare) == len(frequent) == 6 and len(set(frequent)) == 6
    assert sorted(rare[:3]) == sorted(rare[3:]) == [0, 1, 2]
    assert sorted(balanced_order(np.arange(7), 3, 1)) == list(range(7)), "of labels that occur once, a permutation"


def test_without_balance_the_order_is_the_usual_one(source):
    train = opened(source).split("train")
    assert np.array_equal(train.epoch_order(3, 4), epoch_order(len(train), 3, 4))


# cache and fingerprint


def test_a_second_opening_reads_no_network(source, monkeypatch):
    first = opened(source)

    def refuse(*_):
        raise AssertionError("a network was read")

    monkeypatch.setattr(zoo_building, "read_entries", refuse)
    monkeypatch.setattr("workbench.datasets.zoo_cache.Zoo.read", refuse)
    again = opened(source)
    assert again.fingerprint == first.fingerprint and again.report == first.report
    assert all(torch.equal(again.statistics()[name], value) for name, value in first.statistics().items())
    with pytest.raises(AssertionError):
        opened(source, split_seed=1)


def test_the_fingerprint_is_of_weights_split_and_scaling(source):
    settings = ({}, {"split_seed": 1}, {"normalize": "global"}, {"weight_scale": 2.0}, {"max_len": 70}, {"topk": 40})
    found = [opened(source, **values).fingerprint for values in settings]
    entries = torch.load(source / "weights" / "few.pt", weights_only=True)
    entries[3][1]["weight"][0, 0] += 1e-3
    torch.save(entries, source / "weights" / "few.pt")
    found.append(opened(source).fingerprint)
    entries[0][1]["1.num_batches_tracked"] += 1
    torch.save(entries, source / "weights" / "few.pt")
    found.append(opened(source).fingerprint)
    assert len(set(found)) == len(settings) + 2
    torch.save(entries, source / "weights" / "few.pt")
    assert opened(source).fingerprint == found[-1], "a file written anew with the same content"


def test_the_zoo_of_digits_is_trained_where_no_folder_is_given(source, monkeypatch):
    asked = []

    def write(folder: Path) -> Path:
        asked.append(folder)
        return source

    monkeypatch.setattr(weights_module, "write_digits_zoo", write)
    assert open_weights(WeightsConfig()).report["networks"] == 48
    assert asked == [weights_module.outputs_root() / "cache" / "digits-zoo"]


def test_another_folder_in_the_place_of_the_zoo_of_digits_is_told():
    (weights_module.outputs_root() / "cache" / "digits-zoo").mkdir(parents=True)
    with pytest.raises(DataError, match="digits-zoo: is no digits-zoo set .*: choose another folder or move this one"):
        open_weights(WeightsConfig())


# figures


@pytest.mark.parametrize("where", [[], ["architecture=conv"]])
def test_figures_and_pixels(source, where):
    data = opened(source, where=where)
    x = data.split("train")[0]["x"]
    for figure in (data.examples(3), data.pairs(x[None], x[None]), data.compare(x[None], {"predicted": x[None]})):
        assert len(figure.axes) >= 2
    assert ("3.weight" in [text.get_text() for text in figure.axes[0].texts]) == bool(where)
    dark, light = data.pixels(x), data.pixels(x / 2)
    assert dark.shape == (8, 9, 3) and dark.dtype == np.uint8
    assert dark[:, :, 0].astype(int).sum() != light[:, :, 0].astype(int).sum(), "colours are the same in every call"


# alignment


def test_aligned_networks_are_those_that_align_makes(tmp_path):
    """Hidden units in the order of the first training network; functions stay, and padding too."""
    torch.manual_seed(0)
    (tmp_path / "mlps").mkdir()
    mlps = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(12)]
    entries = [({"id": f"n{i}"}, mlp.state_dict()) for i, mlp in enumerate(mlps)]
    torch.save(entries, tmp_path / "mlps" / "all.pt")
    plain, aligned = (opened(tmp_path / "mlps", max_len=50, align=asked) for asked in (False, True))
    reference = plain.state_dict(int(plain.split("train").networks[0]))
    x, moved = torch.randn(5, 4), 0
    for i, row in enumerate(raw_of(aligned)):
        expected, rebuilt = align(plain.state_dict(i), reference), aligned.state_dict(i, row)
        assert all(torch.equal(rebuilt[name], tensor) for name, tensor in expected.items())
        moved += not torch.equal(row, raw_of(plain)[i])
        outputs = [torch.func.functional_call(mlps[0], state, (x,)) for state in (rebuilt, plain.state_dict(i))]
        torch.testing.assert_close(*outputs)
        assert row.shape == (50,) and not row[44:].any()
    assert moved == 11 and aligned.fingerprint != plain.fingerprint


def test_orders_are_kept_in_the_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    (tmp_path / "mlps").mkdir()
    mlps = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(12)]
    torch.save([({}, mlp.state_dict()) for mlp in mlps], tmp_path / "mlps" / "all.pt")
    first = opened(tmp_path / "mlps", align=True)

    def refuse(*_):
        raise AssertionError("networks were aligned again")

    monkeypatch.setattr("workbench.datasets.alignment.hidden_orders", refuse)
    assert torch.equal(opened(tmp_path / "mlps", align=True).orders, first.orders)
    with pytest.raises(AssertionError, match="aligned again"):
        opened(tmp_path / "mlps", align=True, where=["id=all/1", "id=all/2", "id=all/3"], val_fraction=0.0)
    (kept,) = first.zoo.folder.glob("orders-*.npy")
    kept.write_bytes(b"")
    with pytest.raises(DataError, match="orders-.*npy is damaged .*: delete it, and it is computed again"):
        opened(tmp_path / "mlps", align=True)


def test_only_the_longest_networks_are_comparable(source):
    test = opened(source).split("test")
    kept = test.longest()
    assert set(kept.column("architecture")) == {"conv"} and set(test.column("architecture")) == {"conv", "linear"}
    assert len(kept) == (test.column("architecture") == "conv").sum() and kept[0]["mask"].all()
    assert kept.longest().networks.tolist() == kept.networks.tolist()


def test_other_networks_cannot_be_aligned(source):
    with pytest.raises(
        DataError, match="align=True: networks of conv, linear: must be of one architecture; choose one"
    ):
        opened(source, align=True)
    with pytest.raises(DataError, match="layers weight .3, 2., bias .3,.: only two linear layers, the second as wide"):
        opened(source, align=True, where=["architecture=linear"])
