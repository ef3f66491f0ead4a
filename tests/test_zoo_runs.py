from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny_zoo import entries

from workbench.comparison import encode_split
from workbench.datasets.flat_weights import Architecture
from workbench.datasets.weights import Weights, WeightsConfig, open_weights
from workbench.models import build_vae
from workbench.rebuilding import MEAN, layer_r2
from workbench.runs import Run, RunError, load_run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit
from workbench.zoo_runs import NOISE, open_zoo_run

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = {"fdim": 16, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "embed_dim": 1}
SPLIT = {"val_fraction": 0.2, "test_fraction": 0.3, "split_seed": 3}


def write_zoo(folder: Path, **properties: str) -> None:
    (folder / "weights").mkdir(parents=True)
    for name in ("mlp", "cnn"):
        content = [(known | properties, state) for known, state in entries(name)]
        torch.save(content, folder / "weights" / f"{name}.pt")


def train(data: Weights, folder: Path) -> Run:
    """An autoencoder after one epoch."""
    training = TrainConfig(epochs=1, batch_size=8, device="cpu", kl_weight=1e-6).model_dump()
    parameters = {"experiment": "e", "run": "r", "data_kind": "weights"} | data.config.model_dump() | training | SIZES
    run = open_run(parameters, folder)
    run.record(data={"name": "zoo", "fingerprint": data.fingerprint})
    torch.manual_seed(0)
    model, config = build_vae(parameters, data.sizes), TrainConfig.pick(parameters)
    sets = (data.split("train"), data.split("val"), config, run, vae_weights(config, model.terms))
    fit(model, "weight_autoencoder", *sets, lambda x, x_hat: Figure())
    return run


@pytest.fixture(scope="module")
def trained(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Run]:
    folder = tmp_path_factory.mktemp("zoo")
    write_zoo(folder / "zoo", dataset="digits")
    settings = {"data": str(folder / "zoo"), "cache_dir": str(folder / "cache"), "normalize": "global"}
    data = open_weights(WeightsConfig(**settings | SPLIT))
    return data, train(data, folder)


def test_held_out_networks_are_rebuilt_by_the_model_beside_its_floors(trained) -> None:
    data, run = trained
    zoo = open_zoo_run(run.path, CPU, batch_size=5)
    assert (zoo.vae, zoo.pca) == ("VAE-4", "PCA-4")
    assert zoo.floors == [MEAN, "PCA-4", "PCA-4 per architecture"] and list(zoo.methods) == [
        "VAE-4",
        *zoo.floors,
        NOISE,
    ]
    test = data.split("test")
    model = load_run(run.path)[0]
    z = encode_split(model, test, 64).mu
    torch.testing.assert_close(zoo.z_test, z)
    batch = test.prepare(test.batch(np.arange(len(test))))
    with torch.inference_mode():
        x_hat = data.denormalize(model(batch["x"]), batch["architecture"])
    torch.testing.assert_close(zoo.methods["VAE-4"], x_hat)
    train = data.split("train")
    batch = train.prepare(train.batch(np.arange(len(train))))
    with torch.inference_mode():
        torch.testing.assert_close(zoo.rebuilt_train, data.denormalize(model(batch["x"]), batch["architecture"]))
    sizes = np.array([architecture.size for architecture in data.architectures])[zoo.test.architecture]
    assert all(not row[size:].any() for rows in zoo.methods.values() for row, size in zip(rows, sizes, strict=True))
    table = layer_r2(zoo.test, zoo.methods).set_index(["architecture", "layer", "method"])["r2"]
    assert table["all", "all", NOISE] == pytest.approx(table["all", "all", "VAE-4"], abs=1e-5)


def test_fewer_networks_are_drawn_by_seed(trained) -> None:
    path = trained[1].path
    one, same, other = (open_zoo_run(path, CPU, train_samples=9, eval_samples=4, seed=seed) for seed in (0, 0, 1))
    assert len(one.train) == 9 == len(one.z_train) == len(one.rebuilt_train) and len(one.test) == 4
    assert one.test.table["id"].tolist() == same.test.table["id"].tolist() != other.test.table["id"].tolist()
    assert torch.equal(one.methods[NOISE], same.methods[NOISE])


def test_networks_run_here_where_they_were_trained_on_digits(trained, tmp_path: Path) -> None:
    data, run = trained
    zoo = open_zoo_run(run.path, CPU)
    assert zoo.runs_here and zoo.why_not == ""
    foreign = copy(data)
    foreign.architectures = [data.architectures[0], Architecture("small", data.architectures[1].layers[:2])]
    reason = replace(zoo, data=foreign).why_not
    assert reason == "its architecture 'small' is none of digits-zoo (mlp, cnn)"
    write_zoo(tmp_path / "zoo", dataset="svhn")
    settings = {"data": str(tmp_path / "zoo"), "cache_dir": str(tmp_path / "cache")}
    other = train(open_weights(WeightsConfig(**settings | SPLIT)), tmp_path)
    zoo = open_zoo_run(other.path, CPU)
    assert not zoo.runs_here and zoo.why_not == "its networks were trained on svhn, not on digits"


def test_networks_that_have_changed_since_are_refused(trained) -> None:
    data, run = trained
    path = Path(data.config.data) / "weights" / "mlp.pt"
    kept = path.read_bytes()
    torch.save([(known | {"dataset": "digits"}, state) for known, state in entries("mlp")[:-1]], path)
    try:
        with pytest.raises(RunError, match="was trained on other data or another split"):
            open_zoo_run(run.path, CPU)
    finally:
        path.write_bytes(kept)
