import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.datasets.clips import Clips
from workbench.datasets.fields import Simulations
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import DATA, Data, DataKind, open_data
from workbench.metrics import field_errors, mse

CLIPS = {"data_kind": "clips", "image_size": 16, "max_broken_fraction": 0.0}


@pytest.fixture
def parameters(tmp_path, write_clips):
    """Flat parameters of tiny data of each kind, among others that belong to no data."""
    source = write_clips(tmp_path / "clips", {f"c{i:02d}": 2 for i in range(20)}, (16, 16))
    rows = [f"c{i:02d},{frame},{10 * i + frame}\n" for i in range(20) for frame in (1, 2)]
    (source / "conditions.csv").write_text("clip,frame,power\n" + "".join(rows))
    np.save(tmp_path / "f.npy", np.random.default_rng(0).standard_normal((20, 3, 6)).astype(np.float32))
    (tmp_path / "c.csv").write_text("power\n" + "\n".join(map(str, range(20))) + "\n")
    (tmp_path / "nodes.csv").write_text("x,y\n0,0\n1,0\n2,0\n0,1\n1,1\n2,1\n")
    simulation = {"data": str(tmp_path / "f.npy"), "conditions": str(tmp_path / "c.csv")}
    shared = {"val_fraction": 0.25, "test_fraction": 0.25, "latent_dim": 3, "epochs": 2}
    return {
        "clips": CLIPS | shared | {"data": str(source)},
        "simulation": {"data_kind": "simulation"} | shared | simulation,
    }


@pytest.mark.parametrize(("kind", "opened_class"), [("clips", Clips), ("simulation", Simulations)])
def test_parameters_of_a_kind_open_data_that_keep_the_contract(parameters, kind, opened_class):
    data = open_data(parameters[kind])
    assert isinstance(data, opened_class) and isinstance(data, Data)
    assert data.config.val_fraction == 0.25 and isinstance(data.config, DATA[kind][0])
    train = data.split("train")
    assert isinstance(train, Dataset)
    batch = train.prepare(train.batch(np.arange(2)))
    assert {"x", "id", "group", "condition"} <= set(batch) and data.condition_names == ["power"]
    assert data.main_column in train.table() and data.table()["split"].isin(["train", "val", "test"]).all()
    assert f"train_{data.group_name}" in data.report and len(data.broken) == 0
    assert len(data.fingerprint) >= 12 and data.fingerprint == open_data(parameters[kind]).fingerprint


@pytest.mark.parametrize("kind", ["clips", "simulation"])
def test_the_error_is_one_of_the_errors_and_zero_for_the_sample_itself(parameters, kind):
    data = open_data(parameters[kind])
    train = data.split("train")
    x = train.prepare(train.batch(np.arange(2)))["x"]
    x_hat = x.flip(0)
    assert (data.errors(x_hat, x)[data.error_name] == data.error(x_hat, x)).all()
    assert (data.error(x, x) == 0).all() and (data.error(x_hat, x) > 0).all()
    by_hand = mse(x_hat, x)
    if kind == "simulation":
        by_hand = field_errors(data.physical(x_hat), data.physical(x))["relative_l2"]
    assert data.error(x_hat, x).tolist() == by_hand.tolist()


@pytest.mark.parametrize("kind", ["clips", "simulation"])
def test_samples_are_drawn_as_figures_and_as_pixels(parameters, kind):
    data = open_data(parameters[kind])
    train = data.split("train")
    x = train.prepare(train.batch(np.arange(3)))["x"]
    for figure in (data.grid({"a": x, "b": x}, ["1", "2", "3"], "sample"), data.examples(2)):
        figure.draw_without_rendering()
    pixels = data.pixels(x[0])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert not np.array_equal(pixels, data.pixels(x[1]))


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="data_kind='simulations'.*simulation"):
        open_data({"data_kind": "simulations"})
    with pytest.raises(ConfigError):
        DataKind(data_kind="waits")


def test_a_setting_out_of_range_is_refused_by_its_kind(parameters):
    with pytest.raises(ConfigError, match="time_steps"):
        open_data(parameters["simulation"] | {"time_steps": -1})
