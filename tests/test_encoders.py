import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal

from workbench.checkpoints import save_model
from workbench.comparison import batches, encode_split, fit_floors
from workbench.datasets.frames import DataError
from workbench.datasets.layouts import LayoutDataset, Layouts, LayoutsConfig, open_layouts
from workbench.datasets.plans import COLOURS, write_plans
from workbench.encoders import (
    KIND,
    collect,
    floors,
    gradient_energy,
    interpolations,
    latent_figures,
    latest_samples,
    logs,
    measure,
    open_same,
    runs_of,
    samples_by_epoch,
    setting_of,
    training_figures,
)
from workbench.layers import Posterior
from workbench.metrics import image_errors, mse
from workbench.models import MODELS, build_vae
from workbench.models.layout_autoencoder import Decoded, LayoutAutoencoderConfig
from workbench.objectives import evaluate
from workbench.runs import Run, RunError, load_run, open_run, write_json
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZE, CLASSES = 32, list(COLOURS)
SIZES = {"latent_channels": 2, "base_channels": 4, "downsampling_steps": 3}
TRAINING = {"epochs": 2, "batch_size": 20, "lr": 1e-3, "device": "cpu", "log_every": 1, "images_every": 2}
QUICK = {"pairs": 4, "steps": 5}


# --- runs to measure ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("layouts")
    write_plans(folder / "plans", 20, SIZE)
    settings = {"data": str(folder / "plans"), "image_size": SIZE, "val_fraction": 0.25, "test_fraction": 0.1}
    return open_layouts(LayoutsConfig(**settings, cache_dir=str(folder / "cache")))


@pytest.fixture(scope="module")
def val(data: Layouts) -> LayoutDataset:
    return data.split("val")


def begin(folder: Path, data: Layouts, name: str, seed: int, **settings: Any) -> tuple[Run, dict[str, Any]]:
    """A run folder with its parameters and what it says of the data."""
    training = TrainConfig(**TRAINING, seed=seed).model_dump()
    parameters = {"experiment": "e", "run": name, "data_kind": "layouts"} | data.config.model_dump()
    parameters |= training | SIZES | settings
    run = open_run(parameters, folder)
    run.record(data={"name": "plans", "fingerprint": data.fingerprint})
    return run, parameters


def train(folder: Path, data: Layouts, name: str, seed: int, **settings: Any) -> Path:
    run, parameters = begin(folder, data, name, seed, **settings)
    torch.manual_seed(seed)
    model, config = build_vae(parameters, data.sizes), TrainConfig.pick(parameters)
    sets = (data.split("train"), data.split("val"), config, run, vae_weights(config, model.terms))
    fit(model, KIND, *sets, lambda x, x_hat: Figure())
    return run.path


@pytest.fixture(scope="module")
def trained(one_thread: None, data: Layouts, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two settings with two seeds each, hardly trained; the variational ones with a KL to speak of."""
    folder = tmp_path_factory.mktemp("outputs")
    paths = [train(folder, data, f"point-{seed}", seed, variational=False) for seed in (0, 1)]
    heads = {"segmentation": False, "classification": False}
    return paths + [train(folder, data, f"gauss-{seed}", seed, kl_weight=0.01, **heads) for seed in (0, 1)]


class Copy(nn.Module):
    """Its latent is the image; its head tells every class, or always one class where `constant` is not -1."""

    def __init__(self, config: LayoutAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.scale = config, nn.Parameter(torch.ones(()))
        self.register_buffer("constant", torch.tensor(-1))

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(x.flatten(1) * self.scale)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x = z.unflatten(1, (3, SIZE, SIZE))
        return self.painted(x) if self.constant >= 0 and not self.config.segmentation else x

    def painted(self, x: torch.Tensor) -> torch.Tensor:
        return self.colours()[self.constant].reshape(3, 1, 1).expand_as(x)

    def colours(self) -> torch.Tensor:
        return torch.tensor(list(COLOURS.values())) / 127.5 - 1

    def decode_all(self, z: torch.Tensor) -> Decoded:
        x = self.decode(z)
        logits = -(x[:, None] - self.colours()[:, :, None, None]).square().sum(2)
        if self.constant >= 0:
            logits = nn.functional.one_hot(self.constant, len(CLASSES)).float().reshape(-1, 1, 1).expand_as(logits)
        types = torch.eye(self.config.n_types)[torch.ones(len(z), dtype=torch.int64)]
        return Decoded(x, logits if self.config.segmentation else None, types if self.config.classification else None)


class Linear(Copy):
    """A few random directions of the image, and a decoder linear in them; neither is trained."""

    def __init__(self, config: LayoutAutoencoderConfig) -> None:
        super().__init__(config)
        self.to_z = nn.Linear(3 * SIZE**2, config.latent_channels)
        self.to_x = nn.Linear(config.latent_channels, 3 * SIZE**2)

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(self.to_z(x.flatten(1)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.to_x(z).unflatten(1, (3, SIZE, SIZE))


class Blurred(Copy):
    """Every pixel is the mean of four in a row, itself the first."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(super().decode(z), (0, 3, 0, 0), "replicate")
        return x.unfold(3, 4, 1).mean(-1)


def metrics(losses: list[float], **terms: list[float]) -> pd.DataFrame:
    """metrics.csv of a training that logs two steps in each epoch."""
    rows = [
        {"step": i + 1, "epoch": i // 2 + 1, "split": "train", "loss": loss, "grad_norm": 1.0, "seconds": 0.5 * i}
        | {name: values[i] for name, values in terms.items()}
        for i, loss in enumerate(losses)
    ]
    ends = [{"step": i, "epoch": i // 2, "split": "val", "loss": 1.0, "seconds": 0.5 * i} for i in range(2, 7, 2)]
    return pd.DataFrame(rows + ends).sort_values("step", kind="stable", ignore_index=True)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Layouts):
    """Writes a finished run of a model that was not trained."""

    def write(model_class: type[nn.Module], constant: int = -1, **settings: Any) -> Path:
        monkeypatch.setitem(MODELS, KIND, (model_class, LayoutAutoencoderConfig))
        name = f"{model_class.__name__}{constant}"
        run, parameters = begin(tmp_path, data, f"{name}-3", 3, **settings)
        torch.manual_seed(0)
        model = build_vae(parameters, data.sizes)
        model.constant.fill_(constant)
        save(run, model)
        return run.path

    return write


def save(run: Run, model: nn.Module) -> None:
    run.record(model={"kind": KIND} | model.config.model_dump())
    save_model(run.path / "model.safetensors", model, KIND)
    metrics([1.0] * 6).to_csv(run.path / "metrics.csv", index=False)


# --- which runs ---


def test_the_runs_of_an_experiment_by_setting_and_seed(trained, data, tmp_path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(trained[0].parent, folder)
    for seed in (10, 2):
        begin(tmp_path, data, f"gauss-{seed}", seed)  # begun, not finished
    run, _ = begin(tmp_path, data, "stopped", 0)
    (run.path / "model.safetensors").touch()  # of what model, nothing says
    for name, kind in (("clips", "conv_vae"), ("data", "")):  # another model; a look at the data
        (folder / name).mkdir()
        content = {"parameters": {"data_kind": "layouts", "seed": 0}} | ({"model": {"kind": kind}} if kind else {})
        (folder / name / "config.json").write_text(json.dumps(content))
    (folder / "clips" / "model.safetensors").touch()
    found, failed = runs_of(folder)
    assert [path.name for path in found] == ["gauss-0", "gauss-1", "point-0", "point-1"]
    assert failed == ["gauss-2", "gauss-10", "stopped"]
    found, failed = runs_of(folder, ["point-1", "gauss-2", "never", "gauss-0"])
    assert [path.name for path in found] == ["point-1", "gauss-0"] and failed == ["gauss-2", "never"]
    with pytest.raises(RunError, match="clips holds a conv_vae, not a layout_autoencoder: name runs of that kind$"):
        runs_of(folder, ["point-1", "clips"])


def test_an_experiment_without_a_finished_run_is_refused(data, tmp_path) -> None:
    with pytest.raises(RunError, match=r"absent has no finished autoencoder of floor plans \(there is none\): train"):
        runs_of(tmp_path / "absent")
    begin(tmp_path, data, "a-0", 0)
    for names in ([], ["a-0"]):
        with pytest.raises(RunError, match=r"e has no finished autoencoder .* \(none of a-0 is finished\): train one"):
            runs_of(tmp_path / "e", names)


def test_two_runs_of_one_setting_and_seed_are_refused(stub, tmp_path) -> None:
    path = stub(Copy)
    shutil.copytree(path, path.with_name("Copy-1"))
    assert setting_of(path) == ("Copy-1", 3) == setting_of(path.with_name("Copy-1"))
    for names in ([], ["Copy-1-3", "Copy-1"]):
        with pytest.raises(RunError, match="Copy-1(-3)? and Copy-1(-3)? are both setting 'Copy-1' with seed 3: name"):
            runs_of(path.parent, names)


def test_the_seed_is_the_one_trained_with(trained, data, tmp_path) -> None:
    assert [setting_of(path) for path in trained] == [("point", 0), ("point", 1), ("gauss", 0), ("gauss", 1)]
    run, _ = begin(tmp_path, data, "channels-16", 4)
    assert setting_of(run.path) == ("channels-16", 4)


# --- the same data ---


def rewrite(path: Path, **entries: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    for name, values in entries.items():
        config[name] |= values
    (path / "config.json").write_text(json.dumps(config))


def test_runs_of_the_same_data_open_it(trained, data) -> None:
    opened = open_same(trained)
    assert opened.fingerprint == data.fingerprint and opened.config == data.config


@pytest.mark.parametrize(
    ("entries", "difference"),
    [
        ({"parameters": {"split_seed": 1}}, "split_seed: 0 there, 1 here"),
        ({"parameters": {"image_size": 64}}, "image_size: 32 there, 64 here"),
        (
            {"parameters": {"classify_by": "label"}, "data": {"fingerprint": "f00"}},
            "classify_by: type there, label here, fingerprint: [0-9a-f]{16} there, f00 here",
        ),
    ],
)
def test_runs_of_other_data_or_another_split_are_refused(trained, tmp_path, entries, difference) -> None:
    other = shutil.copytree(trained[2], tmp_path / "gauss-0")
    rewrite(other, **entries)
    message = rf"^point-0 and gauss-0 were trained on other data or another split: {difference} \('there' is point-0\)"
    with pytest.raises(RunError, match=message):
        open_same([trained[0], trained[1], other])


def test_where_data_are_cached_and_how_strictly_they_are_opened_are_no_difference(trained, tmp_path) -> None:
    other = shutil.copytree(trained[1], tmp_path / "point-1")
    rewrite(other, parameters={"cache_dir": "elsewhere", "max_unknown_fraction": 0.5})
    assert open_same([trained[0], other]).sizes["image_size"] == SIZE


def test_data_that_have_changed_since_are_refused(trained, tmp_path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained[:2]]
    for path in paths:
        rewrite(path, data={"fingerprint": "f00"})
    with pytest.raises(RunError, match=r"point-0 was trained on other data or another split \(fingerprint f00, now"):
        open_same(paths)


# --- closed forms ---


def shares(dataset: LayoutDataset) -> torch.Tensor:
    classes = torch.cat([batch["classes"].flatten() for batch in batches(dataset, 64, CPU)])
    return torch.bincount(classes, minlength=len(CLASSES)).double() / len(classes)


def test_a_perfect_reconstruction_has_perfect_figures(stub, val) -> None:
    found = measure(stub(Copy), val, CPU, **QUICK)
    assert found["mse"] == 0 and found["psnr"] == math.inf and found["ssim"] == pytest.approx(1, abs=1e-4)
    for name in ("sharpness", "pixel_accuracy", "mean_iou", "colour_accuracy", "colour_mean_iou"):
        assert found[name] == 1, name
    assert {found[f"iou_{name}"] for name in CLASSES} == {1.0} and (shares(val) > 0).all()
    assert found["classes_from"] == "head" and found["latent_size"] == 3 * SIZE**2
    assert math.isnan(found["kl_mean"]) and math.isnan(found["kl_total"]) and found["parameters"] == 1
    types = torch.cat([batch["type"] for batch in batches(val, 64, CPU)])
    assert found["type_accuracy"] == pytest.approx((types == 1).double().mean().item())


@pytest.mark.parametrize("head", [True, False])
def test_a_constant_class_has_its_share_as_iou(stub, val, head: bool) -> None:
    """Told by the head over a perfect image, or by the colour of an image of one colour."""
    constant = CLASSES.index("carpet")
    settings = {"segmentation": head, "classification": False}
    found, share = measure(stub(Copy, constant, **settings), val, CPU, **QUICK), shares(val)
    assert found["classes_from"] == ("head" if head else "colours") and math.isnan(found["type_accuracy"])
    assert found["pixel_accuracy"] == found["iou_carpet"] == pytest.approx(share[constant].item())
    assert found["mean_iou"] == pytest.approx(share[constant].item() / len(CLASSES))
    assert {found[f"iou_{name}"] for name in CLASSES if name != "carpet"} == {0.0}
    assert found["colour_accuracy"] == (1 if head else found["pixel_accuracy"])
    if not head:
        assert found["sharpness"] == 0 and found["path_ratio"] != found["path_ratio"], "all decode to one image"


def test_a_linear_decoder_is_exactly_smooth(stub, val) -> None:
    """Its paths are straight; their perceptual length is the squared distance of the ends, whatever the steps."""
    path = stub(Linear, **SIZES | {"latent_channels": 6, "segmentation": False, "classification": False})
    few, many = (measure(path, val, CPU, pairs=12, steps=steps, seed=1) for steps in (3, 20))
    for found in (few, many):
        assert found["path_ratio"] == pytest.approx(1, abs=1e-6)
    assert few["ppl"] == pytest.approx(many["ppl"], rel=1e-4)
    model, chosen = load_run(path)[0], np.random.default_rng(1)
    z = encode_split(model, val, 64).mu
    with torch.inference_mode():
        ends = [model.decode(z[chosen.choice(len(z), 2, replace=False)]) for _ in range(12)]
    assert few["ppl"] == pytest.approx(np.mean([mse(x[:1], x[1:]).item() for x in ends]), rel=1e-4)
    assert few["latent_size"] == 6 and few["active_units"] <= 6


def test_sharpness_sees_edges_that_are_spread_and_their_height_alone_does_not() -> None:
    step = torch.zeros(1, 3, 16, 32)
    step[..., 16:] = 1.0
    for width in (2, 4, 8):
        ramp = ((torch.arange(32) - 16 + width) / width).clamp(0, 1).expand_as(step).contiguous()
        assert ramp.diff(dim=-1).abs().sum() == step.diff(dim=-1).abs().sum()
        ratio = (gradient_energy(ramp) / gradient_energy(step)).sqrt()
        assert ratio.item() == pytest.approx(width**-0.5)


def test_a_blurred_reconstruction_is_less_sharp(stub, val) -> None:
    found = measure(stub(Blurred, segmentation=False), val, CPU, **QUICK)
    x = torch.cat([batch["x"] for batch in batches(val, 64, CPU)]).double()
    blurred = nn.functional.pad(x, (0, 3, 0, 0), "replicate").unfold(3, 4, 1).mean(-1)
    energy = [sum(np.square(np.diff(v.numpy(), axis=axis)).sum() for axis in (2, 3)) for v in (blurred, x)]
    assert found["sharpness"] == pytest.approx(np.sqrt(energy[0] / energy[1])) and found["sharpness"] < 0.9
    assert found["pixel_accuracy"] == found["colour_accuracy"] < 1


# --- against what is known otherwise ---


def test_figures_of_a_trained_run_are_those_of_its_model(trained, val) -> None:
    found, model = measure(trained[0], val, CPU, **QUICK), load_run(trained[0])[0]
    whole = val.prepare(val.batch(np.arange(len(val))))
    with torch.inference_mode():
        decoded = model.decode_all(model.encode(whole["x"]).mu)
    errors = pd.DataFrame({k: v.numpy() for k, v in image_errors(decoded.x_hat, whole["x"]).items()})
    for name, value in errors.groupby(whole["group"].numpy()).mean().mean().items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    right = decoded.class_logits.argmax(1) == whole["classes"]
    assert found["pixel_accuracy"] == pytest.approx(right.double().mean().item())
    right = decoded.type_logits.argmax(1) == whole["type"]
    assert found["type_accuracy"] == pytest.approx(right.double().mean().item())
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["latent_size"] == 2 * 4 * 4
    assert found["classes_from"] == "head" and math.isnan(found["kl_total"]) and math.isnan(found["kl_share"])


def test_classes_without_a_head_are_those_of_the_nearest_colours(trained, val) -> None:
    found, model = measure(trained[2], val, CPU, **QUICK), load_run(trained[2])[0]
    whole = val.prepare(val.batch(np.arange(len(val))))
    with torch.inference_mode():
        x_hat = (model(whole["x"]) + 1).mul(127.5).round().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(x_hat.double(), torch.tensor(list(COLOURS.values())).double()).argmin(1)
    right = (nearest == whole["classes"].flatten()).double().mean().item()
    assert found["classes_from"] == "colours" and found["pixel_accuracy"] == found["colour_accuracy"]
    assert found["pixel_accuracy"] == pytest.approx(right) and 0 < right < 1


def test_the_kl_is_that_of_the_training_and_its_share_that_of_the_log(trained, val) -> None:
    found, model = measure(trained[2], val, CPU, **QUICK), load_run(trained[2])[0]
    terms = evaluate(model, val, 16)
    assert found["kl_total"] == pytest.approx(terms["kl_total"], rel=1e-5) and found["kl_total"] > 0
    assert found["kl_mean"] == pytest.approx(found["kl_total"] / 32)
    log = pd.read_csv(trained[2] / "metrics.csv")
    last = log[(log["split"] == "train") & (log["epoch"] == 2)]
    share = (0.01 * last["kl_total"]).sum() / (last["mse"] + 0.01 * last["kl_total"]).sum()
    assert found["kl_share"] == pytest.approx(share, rel=1e-5) and found["seconds"] == log["seconds"].max()


def test_the_kl_equals_its_monte_carlo_estimate(trained, val) -> None:
    """log q - log p at 4,000 draws of q for each sample, the variances having been moved away from the prior's."""
    model = load_run(trained[2])[0]
    generator = torch.Generator().manual_seed(0)
    model.to_logvar.weight.data.normal_(0, 0.5, generator=generator)
    model.to_logvar.bias.data.fill_(-2)
    posterior = encode_split(model, val, 16)
    q = Normal(posterior.mu.double(), (0.5 * posterior.logvar.double()).exp())
    z = q.mean + q.stddev * torch.randn(4000, *q.mean.shape, generator=generator)
    estimate = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(2).mean().item()
    found = latent_figures(model, posterior, 2, 3, 0)
    assert found["kl_total"] == pytest.approx(estimate, rel=0.01)
    assert found["kl_mean"] == pytest.approx(estimate / 32, rel=0.01)


def test_batches_do_not_change_the_figures_but_the_choice_of_pairs_does(trained, val) -> None:
    whole, parts, other = (
        measure(trained[0], val, CPU, batch_size=size, pairs=3, steps=4, seed=seed)
        for size, seed in ((64, 0), (7, 0), (64, 1))
    )
    assert whole.keys() == parts.keys() and whole.pop("classes_from") == parts.pop("classes_from")
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    assert other["ppl"] != whole["ppl"] and other["mse"] == whole["mse"]


# --- the training's own figures ---


def test_the_share_of_the_kl_is_of_the_last_logged_epoch() -> None:
    log = metrics([9, 9, 9, 9, 2.0, 3.0], kl=[50, 50, 50, 50, 20.0, 10.0], kl_weight=[0, 0, 0.01, 0.01, 0.02, 0.02])
    found = training_figures(log)
    assert found["kl_share"] == pytest.approx((0.4 + 0.2) / (2 + 3))
    assert found["seconds"] == 3.0 and found["gradient_spikes"] == 0 and found["epochs_to_best"] == 1
    assert math.isnan(training_figures(metrics([1.0] * 6))["kl_share"])


def test_a_run_without_a_log_that_can_be_judged_is_refused(stub, val) -> None:
    path = stub(Copy)
    (path / "metrics.csv").unlink()
    with pytest.raises(RunError, match="Copy-1-3 has no metrics.csv, which its training wrote: put it back, or leave"):
        measure(path, val, CPU)
    metrics([1.0, 1, 1, 1, 1, np.inf]).to_csv(path / "metrics.csv", index=False)
    with pytest.raises(DataError, match=r"Copy-1-3: metrics.csv at step 6 \(train\): loss=inf: must be finite; leave"):
        measure(path, val, CPU)


# --- tables ---


def test_one_row_for_each_run_with_its_setting_and_seed(trained, data, val) -> None:
    table = collect(trained, data, "val", CPU, **QUICK)
    assert list(table)[:3] == ["setting", "seed", "run"]
    assert table["setting"].tolist() == ["point"] * 2 + ["gauss"] * 2 and table["seed"].tolist() == [0, 1, 0, 1]
    assert table["run"].tolist() == [path.name for path in trained]
    assert list(table)[3:] == list(measure(trained[3], val, CPU, **QUICK))
    assert table["kl_total"].isna().tolist() == table["kl_share"].isna().tolist() == [True, True, False, False]
    assert table["type_accuracy"].notna().tolist() == [True, True, False, False]
    assert table["mse"].nunique() == 4, "every row is of its own model"
    same = table[["point" in run for run in table["run"]]].drop(columns=["run", "seed", "setting", "classes_from"])
    single = measure(trained[1], val, CPU, **QUICK)
    assert same.iloc[1].to_dict() == pytest.approx({name: single[name] for name in same}, nan_ok=True)


def test_floors_are_the_mean_image_and_pca_of_the_latents_sizes(data, val) -> None:
    table = floors(data, "val", [8, 32, 8], CPU, batch_size=16).set_index("floor")
    assert list(table.index) == ["mean image", "PCA-8", "PCA-32"] and table["latent_size"].tolist() == [0, 8, 32]
    assert table["mse"].is_monotonic_decreasing and table["pixel_accuracy"].is_monotonic_increasing
    x, groups = (torch.cat([batch[name] for batch in batches(val, 64, CPU)]) for name in ("x", "group"))
    pca, mean = fit_floors(data.split("train"), 32)
    linear = pca.reconstruct(x)
    assert linear.abs().max() > 1.1, "it leaves the range of images, to which it is clamped"
    for name, x_hat in (("mean image", mean.reconstruct(x)), ("PCA-32", linear.clamp(-1, 1))):
        expected = pd.Series(mse(x_hat, x).numpy()).groupby(groups.numpy()).mean().mean()
        assert table.loc[name, "mse"] == pytest.approx(expected, rel=1e-4), name
    assert (table["classes_from"] == "colours").all() and table["type_accuracy"].isna().all()
    alone = floors(data, "val", [8], CPU).set_index("floor").loc["PCA-8"]
    assert alone["mse"] == pytest.approx(table.loc["PCA-8", "mse"], rel=1e-3)


def test_pca_has_no_more_dimensions_than_the_training_samples_allow(data) -> None:
    """With all of them it gives the training samples back."""
    table = floors(data, "train", [2048, 10_000], CPU)
    most = len(data.split("train")) - 1
    assert table["floor"].tolist() == ["mean image", f"PCA-{most}"] and table["latent_size"].tolist() == [0, most]
    assert table["mse"].iloc[1] < 1e-8 and table["pixel_accuracy"].iloc[1] == table["mean_iou"].iloc[1] == 1
    assert floors(data, "val", [2048], CPU, samples=12)["latent_size"].tolist() == [0, 11]


# --- for figures ---


def test_logs_are_grouped_by_setting(trained) -> None:
    found = logs([trained[3], *trained[:2]])
    assert {setting: len(tables) for setting, tables in found.items()} == {"gauss": 1, "point": 2}
    for table, path in zip(found["point"], trained[:2], strict=True):
        pd.testing.assert_frame_equal(table, pd.read_csv(path / "metrics.csv"))


def test_pictures_are_those_of_the_epochs_they_were_drawn_in(trained) -> None:
    log = pd.read_csv(trained[0] / "metrics.csv")
    steps = log[log["split"] == "val"]["step"].tolist()
    assert len(steps) == 2 and steps[0] > 2, "several pictures in each epoch"
    found, end = samples_by_epoch(trained[0]), steps[0] // 2 * 2
    assert {epoch: path.name for epoch, path in found.items()} == {
        1: f"step_{end:07d}.png",
        2: f"step_{steps[1]:07d}.png",
    }
    assert all(path.exists() for path in found.values())
    latest = latest_samples(trained, 1)
    setting = setting_of(trained[0])[0]
    assert latest[f"{setting}, epoch 2"] == found[2] and f"{setting}, epoch 1" not in latest


def test_a_run_whose_notebook_failed_after_its_training_is_no_result(stub) -> None:
    path = stub(Copy)
    write_json(path / "status.json", {"state": "failed", "updated": 0})
    with pytest.raises(RunError, match=f"none of {path.name} is finished"):
        runs_of(path.parent, [path.name])
    Run(path).finish(mse=0.0)
    assert runs_of(path.parent, [path.name]) == ([path], []), "it was run again, to its end"


def test_a_training_without_pictures_has_none(stub) -> None:
    assert samples_by_epoch(stub(Copy)) == {}


def test_the_same_two_samples_are_interpolated_by_each_setting(trained, val, stub) -> None:
    found = interpolations(trained[1:], val, [3, 0], 5, CPU)
    assert list(found) == ["gauss", "point"]
    for (setting, path), run in zip(reversed(found.items()), trained[1:3], strict=True):
        model = load_run(run)[0]
        with torch.inference_mode():
            ends = model(torch.stack([val[3]["x"], val[0]["x"]]))
        assert path.shape == (5, 3, SIZE, SIZE), setting
        torch.testing.assert_close(path[[0, -1]], ends, rtol=0, atol=1e-5)
    copied = interpolations([stub(Copy)], val, [3, 0], 3, CPU)["Copy-1"]
    torch.testing.assert_close(copied[1], (val[3]["x"] + val[0]["x"]) / 2)
