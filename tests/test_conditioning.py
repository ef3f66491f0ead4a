import csv
import math
from pathlib import Path
from typing import Any

import conditioned
import numpy as np
import pytest
import torch
from conditioned import ENHANCED, SMALL, PictureData, fitted, hierarchical_vae, simulations, task_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Dies, assert_same, metrics
from torch import nn
from torch.nn.utils import parametrize

from workbench.conditioning import (
    CodedDataset,
    Conditioning,
    ConditioningConfig,
    Task,
    build_conditioner,
    frozen,
    latent_error,
    predict,
    prediction_milliseconds,
)
from workbench.config import ConfigError
from workbench.health import NonFiniteError
from workbench.models.enhanced_losses import PRESETS
from workbench.process import Preempted
from workbench.provenance import check_same_data
from workbench.runs import Run, RunError, open_run
from workbench.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
END = {"mode": "end_to_end"}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Simulations with the codes of a hierarchical VAE with spectral norms."""
    data = simulations(tmp_path_factory.mktemp("fields"))
    return task_of(fitted(hierarchical_vae(), data), data)


@pytest.fixture(scope="module")
def pictures() -> Task:
    """Images with the codes of a VAE with a single latent, and with rows of numbers as conditions."""
    return task_of(fitted(conditioned.conv_vae(), PictureData()), PictureData())


def objective_of(task: Task, **settings: Any) -> tuple[Conditioning, dict[str, torch.Tensor]]:
    """The objective of a fresh conditioner in training mode, and a batch of the training split."""
    config, coded = ConditioningConfig(**SMALL | settings), task.split("train")
    torch.manual_seed(0)
    conditioner = build_conditioner(config, task.vae, coded.conditions()[0])
    conditioner.standardise(coded.conditions(), task.z["train"])
    batch = coded.prepare(coded.batch(np.arange(8)))
    return Conditioning(conditioner.train(), task.vae, config, task.data.error), batch


def total(objective: Conditioning, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    terms = objective.loss(batch)
    return sum(weight * terms[name] for name, weight in objective.weights()(0.0).items())


def gradients(objective: Conditioning, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model = objective.conditioner
    model.zero_grad()
    total(objective, batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# --- the gradient end to end ---


@pytest.mark.parametrize("which", ["fields", "pictures"])
@pytest.mark.parametrize("latent_reg_weight", [0.0, 0.5])
def test_the_gradient_at_the_first_layer_is_the_finite_difference(
    which: str, latent_reg_weight: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the decoder and the scaling of the codes, in float64: errors in float32 would drown the difference."""
    task = request.getfixturevalue(which)
    objective, batch = objective_of(task, latent_reg_weight=latent_reg_weight, **END)
    squared = lambda a, b: (a - b).square().mean()  # noqa: E731
    monkeypatch.setattr("workbench.conditioning.ERRORS", {"mse": squared})
    monkeypatch.setattr("workbench.conditioning.mean_squared_error", squared)
    objective.conditioner.double(), objective.vae.double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    try:
        weight = objective.conditioner.embed[0].weight
        total(objective, batch).backward()
        assert weight.grad.abs().min() > 0 and weight.grad.abs().max() > 1e-5
        for i in (0, weight.numel() // 2, weight.numel() - 1):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weight.flatten()[i] += step
                    sides.append(float(total(objective, batch)))
                    weight.flatten()[i] -= step
            assert float(weight.grad.flatten()[i]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)
    finally:
        objective.vae.float()


def test_the_scale_of_the_codes_is_in_the_gradient(fields: Task) -> None:
    """The field follows z = s * std + mean: with a std of 0 nothing of the field's error reaches the conditioner."""
    objective, batch = objective_of(fields, **END)
    assert all(gradient.abs().max() > 0 for gradient in gradients(objective, batch))
    objective.conditioner.zero_grad()
    objective.conditioner.code_std.zero_()
    predicted = objective.conditioner(batch["condition"])
    x_hat = fields.vae.decode(predicted * objective.conditioner.code_std + objective.conditioner.code_mean)
    x_hat.square().mean().backward()
    assert all(not p.grad.abs().max() for p in objective.conditioner.parameters() if p.grad is not None)


@pytest.mark.parametrize("enhanced", [{}, ENHANCED])
def test_computing_the_decoder_again_gives_the_same_gradients(fields: Task, enhanced: dict, monkeypatch: Any) -> None:
    found, calls = [], []
    decode = fields.vae.decode
    monkeypatch.setattr(fields.vae, "decode", lambda z: calls.append(len(z)) or decode(z))
    for again in (False, True):
        objective, batch = objective_of(fields, checkpoint_decoder=again, **END, **enhanced)
        torch.manual_seed(3)  # the noise of the consistency term
        found.append(gradients(objective, batch))
    assert len(calls) == 3, "the decoder was not computed again"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_micro_batches_give_the_gradient_of_the_whole_batch(fields: Task) -> None:
    """What the loop does when memory runs out."""
    objective, batch = objective_of(fields, latent_reg_weight=0.3, **END)
    whole = gradients(objective, batch)
    objective.conditioner.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        (0.5 * total(objective, {key: value[half] for key, value in batch.items()})).backward()
    for parameter, expected in zip(objective.conditioner.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


# --- the frozen VAE ---


@pytest.mark.parametrize("which", ["fields", "pictures"])
def test_training_end_to_end_leaves_the_vae_as_it_was(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    task = request.getfixturevalue(which)
    before = {key: value.clone() for key, value in task.vae.state_dict().items()}
    _, conditioner = train(task, tmp_path, **END, **ENHANCED)
    assert before.keys() == task.vae.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in task.vae.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in task.vae.parameters()) and not task.vae.training
    fresh = objective_of(task, **END)[0].conditioner
    moved = [not torch.equal(a, b) for a, b in zip(conditioner.parameters(), fresh.parameters(), strict=True)]
    assert all(moved), "some layer was never trained"


def test_frozen_folds_spectral_norms_into_the_weights() -> None:
    vae, x = hierarchical_vae(), torch.rand(3, conditioned.NODES, conditioned.STEPS)
    parametrized = [module for module in vae.modules() if parametrize.is_parametrized(module)]
    with torch.no_grad():
        z = vae.eval().encode(x)
        expected = z.mu, z.logvar, vae.decode(z.mu)
    folded = frozen(vae.train())
    assert folded is vae and parametrized and not any(map(parametrize.is_parametrized, vae.modules()))
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    z = vae.encode(x)
    for value, before in zip((z.mu, z.logvar, vae.decode(z.mu)), expected, strict=True):
        torch.testing.assert_close(value, before, rtol=1e-5, atol=1e-6)
    assert frozen(vae) is vae, "a second time"


# --- terms and weights ---


def test_the_codes_are_standardised_by_the_training_split(fields: Task, tmp_path: Path) -> None:
    _, conditioner = train(fields, tmp_path, {"epochs": 1})
    z, c = fields.z["train"], fields.split("train").conditions()
    torch.testing.assert_close(conditioner.code_mean, z.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditioner.code_std, z.std(0, correction=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(conditioner.condition_mean, c.mean(0))
    torch.testing.assert_close(conditioner.condition_std, c.std(0, correction=0))


def test_predicting_the_mean_has_an_error_of_one(fields: Task) -> None:
    objective, _ = objective_of(fields)
    nn.init.zeros_(objective.conditioner.heads.main.weight), nn.init.zeros_(objective.conditioner.heads.main.bias)
    nn.init.zeros_(objective.conditioner.heads.hier.weight), nn.init.zeros_(objective.conditioner.heads.hier.bias)
    coded = fields.split("train")
    with torch.no_grad():
        terms = objective.loss(coded.prepare(coded.batch(np.arange(len(coded)))))
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {"latent_main": 1.0, "latent_hier": 1.0}, rel=1e-4
    )


def test_latent_mode_weighs_main_and_hierarchical_codes_ten_to_one(fields: Task) -> None:
    objective, batch = objective_of(fields)
    assert objective.weights()(0.0) == {"latent_main": 10.0, "latent_hier": 1.0}
    predicted = objective.conditioner(batch["condition"])
    squared = (predicted - (batch["z"] - objective.conditioner.code_mean) / objective.conditioner.code_std).square()
    expected = 10 * squared[:, :3].mean() + squared[:, 3:].mean()
    torch.testing.assert_close(total(objective, batch), expected)


def test_the_terms_of_a_single_latent(pictures: Task) -> None:
    objective, batch = objective_of(pictures)
    assert objective.weights()(0.5) == {"latent_main": 10.0}
    assert objective.loss(batch).keys() == {"latent_main"}


def test_end_to_end_the_error_is_that_of_the_decoded_codes(fields: Task) -> None:
    for name, error in (("mse", nn.functional.mse_loss), ("mae", nn.functional.l1_loss)):
        objective, batch = objective_of(fields, field_loss=name, latent_reg_weight=0.5, **END)
        terms = objective.loss(batch)
        assert terms.keys() == {"reconstruction", "latent_regularization"}
        x_hat = fields.vae.decode(objective.conditioner.codes(batch["condition"]))
        torch.testing.assert_close(terms["reconstruction"], error(x_hat, batch["x"]))
        torch.testing.assert_close(objective.predict(batch), x_hat)
        latent = objective_of(fields)[0].loss(batch)
        expected = (10 * latent["latent_main"] + latent["latent_hier"]) / 11
        torch.testing.assert_close(terms["latent_regularization"], expected)
        assert objective.weights()(0.0) == {"reconstruction": 1.0, "latent_regularization": 0.5}


@pytest.mark.parametrize("settings", [{}, END, END | ENHANCED])
def test_in_evaluation_every_setting_logs_what_they_are_compared_by(fields: Task, settings: dict) -> None:
    objective, batch = objective_of(fields, **settings)
    objective.conditioner.eval()
    with torch.no_grad():
        terms = objective.loss(batch)
        plain = objective_of(fields)[0]
        plain.conditioner.eval()
        expected = plain.loss(batch)
    assert {"latent_main", "latent_hier", "error"} <= terms.keys()
    torch.testing.assert_close({k: terms[k] for k in expected}, expected)
    error = fields.data.error(fields.vae.decode(objective.conditioner.codes(batch["condition"])), batch["x"])
    torch.testing.assert_close(terms["error"], error.mean())


@pytest.mark.parametrize("mode", ["latent", "end_to_end"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_a_preset_adds_its_terms_with_its_weights(fields: Task, mode: str, preset: str) -> None:
    """In latent mode each robust error weighs as the squared one does: 10 for the main latent, 1 for the others."""
    objective, batch = objective_of(fields, mode=mode, preset=preset)
    weights = {name.removesuffix("_weight"): weight for name, weight in PRESETS[preset].items() if weight}
    codes = {"perceptual", "consistency"}
    expected = {name: weight for name, weight in weights.items() if name in codes}
    if mode == "latent":
        expected |= {"latent_main": 10.0, "latent_hier": 1.0}
        for name in weights.keys() & {"mae", "huber"}:
            expected |= {f"latent_{name}_main": 10 * weights[name], f"latent_{name}_hier": weights[name]}
    else:
        expected |= {"reconstruction": 1.0, "latent_regularization": 0.0}
        expected |= {name: weights[name] for name in weights.keys() & {"mae", "huber"}}
    found = dict(objective.weights()(0.0))
    assert found.pop("latent_regularization", 0.0) == expected.pop("latent_regularization", 0.0) == 0.0
    assert found == pytest.approx(expected)
    assert expected.keys() <= objective.loss(batch).keys()


def test_the_robust_terms_are_of_what_is_compared_in_the_mode(fields: Task) -> None:
    objective, batch = objective_of(fields, mae_weight=1.0)
    target = (batch["z"] - objective.conditioner.code_mean) / objective.conditioner.code_std
    absolute = (objective.conditioner(batch["condition"]) - target).abs()
    terms = objective.loss(batch)
    torch.testing.assert_close(terms["latent_mae_main"], absolute[:, :3].mean())
    torch.testing.assert_close(terms["latent_mae_hier"], absolute[:, 3:].mean())
    objective, batch = objective_of(fields, mae_weight=1.0, **END)
    torch.testing.assert_close(objective.loss(batch)["mae"], (objective.predict(batch) - batch["x"]).abs().mean())


def test_the_consistency_term_is_the_change_that_noise_makes(fields: Task) -> None:
    settings = {"consistency_weight": 1.0, "consistency_noise": 0.3, "consistency_temperature": 2.0}
    objective, batch = objective_of(fields, **settings)
    torch.manual_seed(5)
    term = objective.loss(batch)["consistency"]
    torch.manual_seed(5)
    model, c = objective.conditioner, batch["condition"]
    noisy = model(c + 0.3 * model.condition_std * torch.randn_like(c))
    torch.testing.assert_close(term, ((noisy - model(c)) / 2).square().mean())


def test_evaluation_draws_nothing_from_the_default_generator(fields: Task) -> None:
    """So that the best epoch does not depend on what was drawn before, as after a restart."""
    objective, batch = objective_of(fields, consistency_weight=1.0)
    objective.conditioner.eval()
    before = torch.get_rng_state()
    first = objective.loss(batch)["consistency"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(objective.loss(batch)["consistency"], first) and first > 0


# --- settings and data that do not fit ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mae_weight": -0.5}, "mae_weight=-0.5: must be at least 0, or -1.0 for the weight of preset 'none'"),
        ({"huber_weight": math.inf}, "huber_weight=inf: must be finite"),
        ({"preset": "roboust"}, "preset='roboust': must be 'none', 'balanced', 'robust', 'semantic', 'fast' or "),
        ({"field_loss": "l2"}, "field_loss='l2': must be 'mse', 'mae', 'smooth_l1' or 'huber'"),
        (
            {"main_weight": 0.0, "hier_weight": 0.0},
            "main_weight=0.0 with hier_weight=0.0: one of them must be more than 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConditioningConfig(**settings)
    assert str(caught.value).startswith(message)


def test_the_wrong_conditioner_is_refused(fields: Task) -> None:
    drawn = task_of(conditioned.conv_vae(), PictureData(drawn=True))
    with pytest.raises(ValueError) as caught:
        objective_of(drawn)
    assert str(caught.value) == "conditioner='mlp': the conditions are pictures (1, 4, 4); use 'cnn'"
    with pytest.raises(ValueError) as caught:
        objective_of(fields, conditioner="cnn")
    assert str(caught.value) == "conditioner='cnn': the conditions are rows of numbers (2,); use 'mlp'"


def test_data_without_conditions_are_refused(tmp_path: Path) -> None:
    conditioned.write_simulations(tmp_path)
    data = simulations(tmp_path, conditions="")
    with pytest.raises(ValueError) as caught:
        task_of(hierarchical_vae(), data).split("train")
    assert str(caught.value) == ("the data have no conditions, and a conditioner reads nothing else: give `conditions`")


def test_codes_of_another_split_are_refused(fields: Task) -> None:
    train_split, n = fields.data.split("train"), len(fields.z["train"])
    with pytest.raises(ValueError, match=rf"^3 codes for {n} samples: must be as many; encode this very split$"):
        CodedDataset(train_split, fields.z["train"][:3])


def test_data_that_the_vae_was_not_trained_on_are_refused(tmp_path: Path) -> None:
    """As notebook 03 does it; other conditions, or none, do not change what the fields are."""
    run = open_run({"experiment": "e", "run": "vae"}, tmp_path / "outputs")
    trained = simulations(tmp_path / "a", conditions="")
    run.record(data={"name": "a", "fingerprint": trained.fingerprint})
    check_same_data(run.path, run.config, simulations(tmp_path / "a").fingerprint)
    changed = simulations(tmp_path / "a", time_steps=3), simulations(tmp_path / "a", split_seed=1)
    np.save(tmp_path / "a" / "fields.npy", 2 * np.load(tmp_path / "a" / "fields.npy"))
    table = str(tmp_path / "a" / "conditions.csv")
    settings = {"data": str(tmp_path / "a" / "fields.npy"), "conditions": table, **conditioned.SHARES}
    changed += (conditioned.open_simulation(conditioned.SimulationConfig(**settings)),)
    for data in changed:
        message = rf"vae was trained on other data or another split \(fingerprint {trained.fingerprint}, now "
        with pytest.raises(RunError, match=message):
            check_same_data(run.path, run.config, data.fingerprint)


# --- coded samples ---


@pytest.mark.parametrize("samples", [True, False])
def test_a_coded_batch_pairs_samples_and_codes(fields: Task, samples: bool) -> None:
    coded, plain = fields.split("val", samples), fields.data.split("val")
    indices = np.array([3, 0])
    batch, expected = coded.prepare(coded.batch(indices)), plain.prepare(plain.batch(indices))
    assert batch.keys() == ({"x", "id", "group", "condition", "z"} if samples else {"condition", "z"})
    assert torch.equal(batch["z"], fields.z["val"][[3, 0]])
    assert all(torch.equal(batch[key], expected[key]) for key in batch if key != "z")
    assert torch.equal(coded.conditions()[[3, 0]], batch["condition"]) and len(coded) == len(plain)
    assert coded.name(3) == plain.name(3)


# --- training ---


def test_each_term_is_logged_alone_unweighted(fields: Task, tmp_path: Path) -> None:
    run, _ = train(fields, tmp_path, **END, **ENHANCED, latent_reg_weight=0.5)
    rows = metrics(run, "train")
    names = {"reconstruction": 1.0, "latent_regularization": 0.5}
    names |= {name.removesuffix("_weight"): weight for name, weight in ENHANCED.items()}
    for row in rows:
        loss = sum(weight * float(row[name]) for name, weight in names.items())
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        assert all(float(row[name]) > 0 for name in names)
    assert all(
        {*names, "latent_main", "latent_hier", "error"} <= {k for k, v in row.items() if v}
        for row in metrics(run, "val")
    )


def test_memory_is_logged_and_a_picture_is_drawn(fields: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fields.data, "grid")  # the real one
    run, _ = train(fields, tmp_path, {"epochs": 1}, **END)
    with (run.path / "metrics.csv").open(newline="") as handle:
        assert all(float(row["memory_mb"]) > 10 for row in csv.DictReader(handle))
    assert len(list((run.path / "samples").glob("*.png"))) == 1


def scalars(run: Run) -> set[str]:
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_the_tags_in_tensorboard(fields: Task, tmp_path: Path) -> None:
    every = {"grad_norm", "lr", "samples_per_s", "seconds"}
    run, _ = train(fields, tmp_path / "a", {"epochs": 1}, **END, **ENHANCED)
    named = {"reconstruction", "latent_regularization", "total", "mae", "huber", "perceptual", "consistency"}
    weights = {f"{name}_weight" for name in named - {"reconstruction", "total"}}
    val = named | {"latent_main", "latent_hier", "error", "seconds"}
    assert scalars(run) == {
        *(f"E2E/{name}" for name in named | weights | every),
        *(f"E2E val/{name}" for name in val),
        *("train/memory_mb", "val/memory_mb"),
    }
    run, _ = train(fields, tmp_path / "b", {"epochs": 1})
    assert {"train/latent_main", "train/latent_hier", "val/error"} <= scalars(run)
    assert not any(tag.startswith("E2E") for tag in scalars(run))


@pytest.mark.parametrize("settings", [{}, END])
@pytest.mark.parametrize("which", ["fields", "pictures"])
def test_both_modes_learn_with_every_vae(
    which: str, settings: dict, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run, model = train(request.getfixturevalue(which), tmp_path, {"epochs": 15, "lr": 1e-2}, **settings)
    errors = [float(row["error"]) for row in metrics(run, "val")]
    assert errors[-1] < 0.8 * errors[0] and not model.training
    assert run.config["model"]["kind"] == "mlp_conditioner"


def test_a_cnn_conditioner_is_trained_through_the_decoder(tmp_path: Path) -> None:
    task = task_of(fitted(conditioned.conv_vae(), PictureData()), PictureData(drawn=True))
    run, _ = train(task, tmp_path, {"epochs": 8, "lr": 1e-2}, conditioner="cnn", depth=1, width=4, **END)
    errors = [float(row["error"]) for row in metrics(run, "val")]
    assert errors[-1] < errors[0] and run.config["model"]["kind"] == "cnn_conditioner"


def test_a_term_that_is_not_finite_stops_the_run_and_names_its_samples(
    fields: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.conditioning.consistency", lambda a, b, t: (a - b).square().mean() * math.nan)
    with pytest.raises(NonFiniteError) as caught:
        train(fields, tmp_path, **END, consistency_weight=0.1)
    message = str(caught.value)
    assert "step 1 is not finite (" in message and "consistency=nan" in message and "reconstruction=0." in message
    names = {fields.data.split("train").name(i) for i in range(len(fields.z["train"]))}
    listed = message.partition("its samples are ")[2].partition(";")[0].split(", ")
    assert len(listed) == 8 and set(listed) <= names


# --- resuming ---


RESUMED = END | ENHANCED | {"dropout": 0.3, "latent_reg_weight": 0.1}


@pytest.fixture(scope="module")
def undisturbed(fields: Task, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(fields, tmp_path_factory.mktemp("undisturbed"), **RESUMED)[0]


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_training_that_died_goes_on_to_the_same_bits(
    step: int, fields: Task, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Dies):
        taken, own = 0, Trainer._train_step

        def dies(self: Trainer, *arguments: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == step:
                raise Dies
            return own(self, *arguments)

        patch.setattr(Trainer, "_train_step", dies)
        train(fields, tmp_path, **RESUMED)
    torch.rand(step)  # what was drawn before does not matter
    run, _ = train(fields, tmp_path, **RESUMED)
    assert_same(run, undisturbed)


def test_a_training_stopped_in_its_validation_goes_on(
    fields: Task, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks of the perceptual term are then made in a validation, without gradients."""
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        own = Trainer._validating

        def stops(self: Trainer, done: int) -> None:
            self.stop = {"signal": 15}
            own(self, 0)

        patch.setattr(Trainer, "_validating", stops)
        train(fields, tmp_path, **RESUMED)
    run, _ = train(fields, tmp_path, **RESUMED)
    assert_same(run, undisturbed)


def test_a_finished_training_is_loaded(
    fields: Task, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Trainer, "train", None)
    _, model = train(fields, undisturbed.path.parents[1], **RESUMED)
    assert "holds a finished model" in capsys.readouterr().out and not model.training


# --- predicting ---


def test_predictions_are_the_decoded_codes(fields: Task, tmp_path: Path) -> None:
    _, model = train(fields, tmp_path, {"epochs": 1}, dropout=0.5)
    conditions = fields.split("test").conditions()
    codes, samples = predict(model, fields.vae, conditions, 3)
    with torch.no_grad():
        torch.testing.assert_close(codes, model.codes(conditions))
        torch.testing.assert_close(samples, fields.vae.decode(codes))
    assert samples.shape == (len(conditions), conditioned.NODES, conditioned.STEPS)


def test_the_latent_error_is_weighed_and_standardised(fields: Task) -> None:
    objective, _ = objective_of(fields)
    model, z = objective.conditioner, fields.z["test"]
    config = objective.config
    assert latent_error(model, config, z, z) == 0
    assert latent_error(model, config, z + model.code_std, z) == pytest.approx(1, rel=1e-4)
    moved = z.clone()
    moved[:, :3] += 2 * model.code_std[:3]
    assert latent_error(model, config, moved, z) == pytest.approx(4 * 10 / 11, rel=1e-4)


def test_a_prediction_takes_milliseconds(fields: Task) -> None:
    objective, batch = objective_of(fields)
    milliseconds = prediction_milliseconds(objective.conditioner.eval(), fields.vae, batch["condition"][:1], 20)
    assert 0 < milliseconds < 50
