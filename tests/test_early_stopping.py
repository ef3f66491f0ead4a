"""Early stopping, the weights that are kept, and objectives other than the model's own loss."""

import csv
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import PER_EPOCH, QUICK, SETTINGS, Dies, Images, N, assert_same, conv_vae, metrics, sends, train
from torch import nn

from workbench import checkpoints, training
from workbench.checkpoints import load_checkpoint, load_safetensors
from workbench.objectives import Reconstruction
from workbench.process import Preempted
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, BEST, PATIENCE = 7, 3, 2
STOP = PER_EPOCH * (BEST + PATIENCE)


def rising(progress: float) -> dict[str, float]:
    """The KL has no weight while training, so that it grows, and one when validations are judged."""
    return {"mse": 1.0, "kl": 0.3 if progress == 1 else 0.0}


EARLY = {"weights": rising, "lr": 1e-2, "lr_decay": 1.0, "epochs": EPOCHS, "patience": PATIENCE, "keep": "best"}


@pytest.fixture(scope="module")
def stopped(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = train(tmp_path_factory.mktemp("stopped"), **EARLY)
    return run


def checkpoint(run: Run, name: str) -> dict[str, Any]:
    return load_checkpoint(run.path / "checkpoints" / f"{name}.ckpt")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- when it stops ---


def test_it_stops_when_patience_runs_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, model = train(tmp_path, **EARLY)
    losses = [float(row["loss"]) for row in metrics(run, "val")]
    assert losses.index(min(losses)) + 1 == BEST, "the best epoch is another one than the tests are made for"
    assert len(losses) == BEST + PATIENCE < EPOCHS
    assert checkpoint(run, "last")["step"] == STOP and checkpoint(run, "best")["step"] == PER_EPOCH * BEST
    assert max(int(row["step"]) for row in metrics(run)) == STOP
    said = f"stopped early after step {STOP}: no lower validation loss for {PATIENCE} epochs\n"
    assert capsys.readouterr().out.count(said) == 1
    assert run.trained and not model.training


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_counted_from_the_best_epoch(patience: int, tmp_path: Path) -> None:
    run, _ = train(tmp_path, **EARLY | {"patience": patience})
    losses = [float(row["loss"]) for row in metrics(run, "val")]
    assert len(losses) == losses.index(min(losses)) + 1 + patience


def test_with_as_much_patience_as_there_are_epochs_all_are_run(
    stopped: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, _ = train(tmp_path, **EARLY | {"patience": EPOCHS})
    assert len(metrics(run, "val")) == EPOCHS and "stopped early" not in capsys.readouterr().out
    assert metrics(run)[: len(metrics(stopped))] == metrics(stopped), "patience changes what is computed"


def test_a_loss_that_keeps_falling_is_not_stopped(tmp_path: Path) -> None:
    run, _ = train(tmp_path, lr=3e-3, lr_decay=1.0, patience=1, weights=lambda progress: {"mse": 1.0})
    losses = [float(row["loss"]) for row in metrics(run, "val")]
    assert losses == sorted(losses, reverse=True), "the loss does not keep falling"
    assert len(losses) == SETTINGS["epochs"]


def test_without_patience_all_epochs_are_run(stopped: Run, tmp_path: Path) -> None:
    run, _ = train(tmp_path, **EARLY | {"patience": 0})
    assert len(metrics(run, "val")) == EPOCHS
    assert same_weights(checkpoint(run, "best")["model"], checkpoint(stopped, "best")["model"])


def test_the_picture_is_that_of_the_last_step(stopped: Run) -> None:
    assert [path.name for path in (stopped.path / "samples").iterdir()] == [f"step_{STOP:07d}.png"]


# --- what is kept ---


def test_the_best_weights_are_kept_where_asked(stopped: Run, tmp_path: Path) -> None:
    best, last = checkpoint(stopped, "best")["model"], checkpoint(stopped, "last")["model"]
    assert not same_weights(best, last), "the test cannot tell them apart"
    assert same_weights(load_safetensors(stopped.path / "model.safetensors"), best)
    run, model = train(tmp_path, **EARLY | {"keep": "last"})
    assert same_weights(load_safetensors(run.path / "model.safetensors"), last)
    assert same_weights(model.state_dict(), last)


def test_the_model_that_is_returned_is_the_one_that_is_kept(stopped: Run, tmp_path: Path) -> None:
    kept = load_safetensors(stopped.path / "model.safetensors")
    for _ in ("trained", "loaded"):
        _, model = train(tmp_path, **EARLY)
        assert same_weights(model.state_dict(), kept)


# --- killed and started again ---


@pytest.mark.parametrize("step", [9, 10, STOP])
def test_dying_in_a_step_and_going_on_changes_nothing(step: int, stopped: Run, tmp_path: Path) -> None:
    model, taken = conv_vae(), 0
    loss = model.loss

    def dies(batch: dict) -> dict:
        nonlocal taken
        taken += model.training
        if taken == step:
            raise Dies
        return loss(batch)

    model.loss = dies
    with pytest.raises(Dies):
        train(tmp_path, model, **EARLY)
    run, _ = train(tmp_path, **EARLY)
    assert_same(run, stopped)


@pytest.mark.parametrize("save", [8, 9, 12])
@pytest.mark.parametrize("moment", ["before the rename", "after it"])
def test_dying_in_any_save_and_going_on_changes_nothing(
    save: int, moment: str, stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 is the last that is the best, 9 the one after it, 12 that of the early stop."""
    publish, count = checkpoints._publish, 0

    def dies(handle: Any, temporary: Path, path: Path) -> None:
        nonlocal count
        count += path.suffix == ".ckpt"
        if count == save and moment == "after it":
            publish(handle, temporary, path)
        if count == save:
            raise Dies
        publish(handle, temporary, path)

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(checkpoints, "_publish", dies)
        train(tmp_path, **EARLY)
    run, _ = train(tmp_path, **EARLY)
    assert_same(run, stopped)


@pytest.mark.parametrize("name", ["save_model", "load_weights"])
def test_dying_between_the_early_stop_and_the_model(
    name: str, stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(training, name, dies)
        train(tmp_path, **EARLY)
    assert load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")["step"] == STOP
    run, _ = train(tmp_path, **EARLY)
    assert_same(run, stopped)


@pytest.mark.parametrize("at", [5, 9, 10])
def test_a_signal_in_a_validation_is_obeyed_and_changes_nothing(at: int, stopped: Run, tmp_path: Path) -> None:
    """12 images in batches of 8: batches 5 and 6 are the best validation, 9 and 10 the one that stops the training."""
    with pytest.raises(Preempted):
        train(tmp_path, val=Images(12, seed=1, on_batch=sends(signal.SIGTERM, at)), **EARLY)
    state = load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")
    assert state["step"] == PER_EPOCH * -(-at // 2)
    run, _ = train(tmp_path, **EARLY)
    assert_same(run, stopped)


def test_the_patience_already_used_up_survives_a_restart(stopped: Run, tmp_path: Path) -> None:
    """Stopped again and again: the best epoch is remembered, not begun anew."""
    steps, last = [], tmp_path / "e" / "r" / "checkpoints" / "last.ckpt"
    while not steps or steps[-1] < STOP:
        with pytest.raises(Preempted):
            train(tmp_path, images=Images(N, on_batch=sends(signal.SIGTERM, 6)), **EARLY)
        steps.append(load_checkpoint(last)["step"])
    assert len(steps) > 2, "it was not stopped often"
    run, _ = train(tmp_path, **EARLY)
    assert_same(run, stopped)


# --- another objective ---


class Brightness(nn.Module):
    """Learns the mean colour of images."""

    noise_dim = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.colour = conv_vae().config, nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.colour.expand_as(x)


class ToColour:
    """Squared error to a colour; a term that is logged only, and one that only validation has."""

    group = "E2E"

    def __init__(self, model: Brightness) -> None:
        self.model, self.modes = model, []

    def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.modes.append(self.model.training)
        error = self.model(batch["x"]) - batch["x"]
        terms = {"reconstruction": error.square().mean(), "mae": error.abs().mean()}
        return terms if self.model.training else terms | {"worst": error.abs().max()}

    def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch["x"])

    def after_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        return {}


def train_colour(
    folder: Path, images: Images | None = None, picture: Callable = lambda x, x_hat: Figure(), **settings: Any
) -> tuple[Run, Brightness, ToColour]:
    config = TrainConfig(**QUICK | SETTINGS | {"lr": 0.1, "lr_decay": 1.0, "grad_clip": 100.0} | settings)
    run = open_run({"experiment": "e", "run": "r", **config.model_dump()}, folder)
    model = Brightness()
    data, objective = (images or Images(N), Images(12, seed=1)), ToColour(model)
    fit(model, "conv_vae", *data, config, run, lambda progress: {"reconstruction": 1.0}, picture, objective)
    return run, model, objective


def test_the_objective_is_what_is_optimised_logged_and_judged(tmp_path: Path) -> None:
    run, model, objective = train_colour(tmp_path, epochs=20, log_every=1)
    assert (model.colour[:, 0, 0] - Images(N).x.mean((0, 2, 3))).abs().max() < 0.1, "not learned"
    for row in metrics(run, "train"):
        assert row["loss"] == row["reconstruction"] and float(row["mae"]) > 0 and row["worst"] == ""
    x = Images(12, seed=1).x
    row = metrics(run, "val")[-1]
    assert float(row["reconstruction"]) == pytest.approx((model.colour - x).square().mean().item(), rel=1e-5)
    assert min(float(row["loss"]) for row in metrics(run, "val")) == pytest.approx(checkpoint(run, "best")["best"])
    assert objective.modes.count(True) == 60 and objective.modes.count(False) == 40


def test_pictures_are_of_the_prediction(tmp_path: Path) -> None:
    drawn = []
    _, model, _ = train_colour(tmp_path, picture=lambda x, x_hat: drawn.append((x, x_hat)) or Figure())
    (x, x_hat), *_ = drawn
    assert len(drawn) == 1 and torch.equal(x_hat, model(x).detach())


def test_a_term_that_only_validation_has_gets_its_column(tmp_path: Path) -> None:
    run, _, _ = train_colour(tmp_path, log_every=1)
    with (run.path / "metrics.csv").open(newline="") as handle:
        header, *rows = csv.reader(handle)
    assert header[:5] == ["step", "epoch", "split", "reconstruction", "mae"] and header[-1] == "worst"
    assert {len(row) for row in rows} == {len(header)}
    assert [row["step"] for row in metrics(run)] == ["1", "2", "3", "3", "4", "5", "6", "6"] + [
        str(step) for step in (7, 8, 9, 9, 10, 11, 12, 12)
    ], "no row was lost when the column was added"
    assert all((row["worst"] != "") == (row["split"] == "val") for row in metrics(run))
    assert all(row["lr"] == "" for row in metrics(run, "val"))


@pytest.mark.parametrize("at", [3, 5, 11])
def test_a_column_added_later_survives_a_restart(at: int, tmp_path: Path) -> None:
    expected, _, _ = train_colour(tmp_path / "whole", log_every=1)

    def dies(number: int) -> None:
        if number == at:
            raise Dies

    with pytest.raises(Dies):
        train_colour(tmp_path, Images(N, on_batch=dies), log_every=1)
    run, _, _ = train_colour(tmp_path, log_every=1)
    assert_same(run, expected)


def test_tags_of_a_group(tmp_path: Path) -> None:
    run, _, _ = train_colour(tmp_path, log_every=1)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"E2E/{name}" for name in ("reconstruction", "mae", "total", "grad_norm", "lr", "samples_per_s", "seconds")),
        *(f"E2E val/{name}" for name in ("reconstruction", "mae", "worst", "total", "seconds")),
        "train/memory_mb",
        "val/memory_mb",
    }
    totals = [event.value for event in events.Scalars("E2E/total")]
    assert totals == pytest.approx([float(row["loss"]) for row in metrics(run, "train")])


def test_the_models_own_loss_is_the_objective_by_default(tmp_path: Path) -> None:
    """Given or not, the same bits; and augmentation changes training rows, not what validation is computed on."""
    expected, _ = train(tmp_path / "default")
    config = TrainConfig(**QUICK | SETTINGS)
    runs = []
    for name, change in (("given", None), ("augmented", lambda batch: batch | {"x": 0.5 * batch["x"]})):
        run, model = open_run({"experiment": "e", "run": "r", **config.model_dump()}, tmp_path / name), conv_vae()
        data, drawn = (Images(N), Images(12, seed=1)), lambda x, x_hat: Figure()
        fit(model, "conv_vae", *data, config, run, vae_weights(config), drawn, Reconstruction(model, change))
        runs.append(run)
    assert_same(runs[0], expected)
    first, plain = metrics(runs[1], "train")[0], metrics(expected, "train")[0]
    assert float(first["mse"]) < 0.5 * float(plain["mse"])
    assert float(metrics(runs[1], "val")[-1]["mse"]) > float(first["mse"])
