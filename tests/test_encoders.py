import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from encoded import CLASSES, CPU, QUICK, SIZE, SIZES, Blurred, Copy, Linear, data, metrics, stub, train, trained, val
from torch import nn
from torch.distributions import Normal

from workbench.comparison import batches, encode_split, fit_floors
from workbench.datasets.frames import DataError
from workbench.datasets.layouts import LayoutDataset
from workbench.datasets.plans import COLOURS
from workbench.encoder_runs import KIND, setting_of
from workbench.encoders import (
    caveats,
    collect,
    floors,
    gradient_energy,
    interpolations,
    latent_figures,
    latest_samples,
    logs,
    measure,
    samples_by_epoch,
    setting_of,
    training_figures,
)
from workbench.metrics import image_errors, mse
from workbench.objectives import evaluate
from workbench.runs import RunError, load_run

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_what_a_reader_has_to_know(trained, data) -> None:
    rows = collect(trained, data, "val", CPU, **QUICK)
    configs = {setting_of(path)[0]: json.loads((path / "config.json").read_text()) for path in trained}
    classes, kl = caveats(rows, configs)
    assert classes.startswith("Classes are told by the colours in gauss; by the head in point: compare these settings")
    share = 100 * rows.loc[rows["setting"] == "gauss", "kl_share"].mean()
    what = "the sum over its dimensions, in nats per image"
    assert kl == f"gauss adds 0.01 times the KL, {what}, to its loss: {share:.2g} % of it."
    points = rows["setting"] == "point"
    assert caveats(rows[points], {"point": configs["point"]}) == []


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
