import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import (
    PER_EPOCH,
    QUICK,
    SETTINGS,
    SMALL,
    STEPS,
    Dies,
    Images,
    N,
    WithDropout,
    assert_same,
    conv_vae,
    metrics,
    script,
    sends,
    stepped,
    train,
)
from torch import nn

from workbench import training
from workbench.checkpoints import CheckpointError, load_checkpoint, load_safetensors
from workbench.datasets.splits import mix
from workbench.models.conv_vae import ConvVAE
from workbench.objectives import evaluate
from workbench.process import Preempted, seed_generators
from workbench.runs import Run, RunError, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import draw_noise, fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = train(tmp_path_factory.mktemp("finished"), kl_rise_to=10 / 12)
    return run


# --- what is learned and logged ---


def test_the_learning_rate_decays_per_epoch(tmp_path: Path) -> None:
    run, _ = train(tmp_path, log_every=1)
    rates = [float(row["lr"]) for row in metrics(run, "train")]
    assert rates == [1e-3 * 0.5**epoch for epoch in range(4) for _ in range(PER_EPOCH)]


def test_the_kl_weight_warms_up_and_terms_are_logged_unweighted(tmp_path: Path) -> None:
    run, _ = train(tmp_path, log_every=1, kl_weight=0.1, kl_rise_to=8 / STEPS)
    rows = metrics(run, "train")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert [int(row["epoch"]) for row in rows] == [1 + step // PER_EPOCH for step in range(STEPS)]
    weights = [float(row["kl_weight"]) for row in rows]
    assert weights == pytest.approx([0.1 * min(1, step / 8) for step in range(STEPS)])
    for row, weight in zip(rows, weights, strict=True):
        assert float(row["loss"]) == pytest.approx(float(row["mse"]) + weight * float(row["kl"]), rel=1e-5)
    assert float(rows[0]["kl"]) > 0.01, "the first KL has weight 0 and is logged all the same"


@pytest.mark.parametrize(("steps", "validated"), [(2, [2]), (7, [3, 6, 7])])
def test_a_training_may_end_within_an_epoch(steps: int, validated: list[int], tmp_path: Path) -> None:
    """Its last step is validated, the cosine has come down by then, and a kill changes none of its bits."""
    settings = {"training_steps": steps, "schedule": "cosine", "log_every": 1}
    expected, _ = train(tmp_path / "undisturbed", **settings)
    assert [int(row["step"]) for row in metrics(expected, "val")] == validated
    rates = [float(row["lr"]) for row in metrics(expected, "train")]
    assert len(rates) == steps and rates == pytest.approx(
        [5e-4 * (1 + np.cos(np.pi * i / steps)) for i in range(steps)]
    )

    def dies(number: int) -> None:
        if number == steps:
            raise Dies

    with pytest.raises(Dies):
        train(tmp_path / "killed", images=Images(N, on_batch=dies), **settings)
    assert_same(train(tmp_path / "killed", **settings)[0], expected)


def test_rows_are_due_at_the_first_every_nth_and_the_last_step(tmp_path: Path) -> None:
    run, _ = train(tmp_path, log_every=8)
    assert [int(row["step"]) for row in metrics(run, "train")] == [1, 8, 12]
    assert [int(row["step"]) for row in metrics(run, "val")] == [3, 6, 9, 12]


def test_validation_equals_ones_own_computation(finished: Run) -> None:
    """Of the final weights, in evaluation mode, without noise, over all samples alike (batches of 8 and 4)."""
    model = conv_vae(ConvVAE)
    model.load_state_dict(load_safetensors(finished.path / "model.safetensors"))
    model.eval()
    x = Images(12, seed=1).x
    with torch.no_grad():
        posterior = model.encode(x)
        error = (model.decode(posterior.mu) - x).square().mean().item()
        kl = 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(1).mean().item()
    row = metrics(finished, "val")[-1]
    assert float(row["mse"]) == pytest.approx(error, rel=1e-5)
    assert float(row["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(row["loss"]) == pytest.approx(error + 1e-4 * kl, rel=1e-5)
    terms = evaluate(model, Images(12, seed=1), 5)
    assert (terms["mse"], terms["kl"]) == pytest.approx((error, kl), rel=1e-5)


def test_evaluation_leaves_mode_and_random_state_alone() -> None:
    model = conv_vae()
    for mode in (True, False):
        model.train(mode)
        before = torch.get_rng_state()
        evaluate(model, Images(12), 4)
        assert model.training == mode and torch.equal(before, torch.get_rng_state())


def test_the_best_checkpoint_is_judged_by_the_final_weights(tmp_path: Path) -> None:
    """The error falls while the KL rises, so that its weight decides which epoch is the best."""
    final = {"mse": 1.0, "kl": 10.0}

    def weights(progress: float) -> dict[str, float]:
        return final if progress == 1 else {"mse": 1.0, "kl": 0.0}

    run, _ = train(tmp_path, weights=weights, lr=1e-2, lr_decay=1.0)
    rows = metrics(run, "val")
    mse, kl = ([float(row[name]) for row in rows] for name in ("mse", "kl"))
    judged = [a + final["kl"] * b for a, b in zip(mse, kl, strict=True)]
    assert np.argmin(judged) != np.argmin(mse), "the test cannot tell the two apart"
    best = load_checkpoint(run.path / "checkpoints" / "best.ckpt")
    assert best["best"] == pytest.approx(min(judged)) and best["step"] == PER_EPOCH * (1 + int(np.argmin(judged)))
    assert [float(row["loss"]) for row in rows] == pytest.approx(judged)


def test_the_gradient_is_clipped_and_its_norm_logged_before_that(tmp_path: Path) -> None:
    trainer, rows = stepped(tmp_path, conv_vae(), steps=1, grad_clip=1e-3)
    clipped = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)
    assert rows[0]["grad_norm"] > 0.01
    free, same = stepped(tmp_path, conv_vae(), steps=1, grad_clip=1e3)
    whole = torch.stack([p.grad.norm() for p in free.model.parameters()]).norm()
    assert (
        whole.item() == pytest.approx(same[0]["grad_norm"], rel=1e-4) == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
    )


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    _, exact = stepped(tmp_path, conv_vae(ConvVAE))
    trainer, rows = stepped(tmp_path, conv_vae(ConvVAE), precision="bf16")
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for row, want in zip(rows, exact, strict=True):
        assert row["mse"] != want["mse"], "bfloat16 was not used"
        assert row["mse"] == pytest.approx(want["mse"], rel=0.02)
    run, _ = train(tmp_path, conv_vae(ConvVAE), precision="bf16")
    assert len(metrics(run, "val")) == 4


def test_the_loss_curve_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """NCHW, unfused Adam, written out: within 2 % at every one of 30 steps, and closer at first."""
    config = TrainConfig(**QUICK | SETTINGS | {"epochs": 10, "kl_weight": 1e-2, "lr": 1e-2, "lr_decay": 0.9})
    images, plain, losses = Images(N), conv_vae(ConvVAE).train(), []
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.lr, fused=False, foreach=False)
    for step in range(30):
        order = torch.randperm(
            N, generator=torch.Generator().manual_seed(training.mix(0, 0, step // PER_EPOCH))
        ).numpy()
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.9 ** (step // PER_EPOCH)
        x = images.batch(order[step % PER_EPOCH * 8 : step % PER_EPOCH * 8 + 8])["x"]
        terms = plain.loss({"x": x, "noise": draw_noise(0, step, 8, 3)})
        loss = terms["mse"] + 1e-2 * terms["kl"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    run, model = train(tmp_path, conv_vae(ConvVAE), log_every=1, **config.model_dump(exclude={"log_every", *QUICK}))
    assert model.encoder[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    logged = [float(row["loss"]) for row in metrics(run, "train")]
    assert logged[0] == pytest.approx(losses[0], rel=1e-5)
    assert logged == pytest.approx(losses, rel=0.02)
    assert losses[-1] < 0.8 * losses[0], "nothing was learned"


@pytest.mark.slow
def test_a_compiled_run_equals_an_uncompiled_one(tmp_path: Path) -> None:
    """In a process of its own, as compilation does not see through the shape checks that run in tests."""
    process = script(tmp_path / "compiled", "--compile")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    expected, _ = train(tmp_path / "plain", conv_vae(ConvVAE), epochs=1)
    compiled = Run(tmp_path / "compiled" / "e" / "r")
    assert compiled.config["parameters"]["compile"]
    for row, want in zip(metrics(compiled), metrics(expected), strict=True):
        assert float(row["loss"]) == pytest.approx(float(want["loss"]), rel=1e-3)


def test_noise_is_a_function_of_seed_and_step() -> None:
    noise = draw_noise(3, 7, 4, 5)
    assert noise.shape == (4, 5) and torch.equal(noise, draw_noise(3, 7, 4, 5))
    assert not torch.equal(noise, draw_noise(3, 8, 4, 5)) and not torch.equal(noise, draw_noise(4, 7, 4, 5))
    seed_generators(mix(3, 1, 7))
    assert not torch.equal(noise, torch.randn(4, 5)), "noise and dropout share their numbers"
    many = draw_noise(0, 0, 1000, 100)
    assert abs(many.mean().item()) < 0.02 and many.std().item() == pytest.approx(1, abs=0.02)


def test_pictures_are_drawn_of_fixed_samples_when_due(tmp_path: Path) -> None:
    drawn = []

    def picture(x: torch.Tensor, x_hat: torch.Tensor) -> Figure:
        drawn.append((x, x_hat))
        return Figure()

    config = TrainConfig(**QUICK | SETTINGS | {"images_every": 5})
    run = open_run({"experiment": "e", "run": "r"}, tmp_path)
    val = Images(15, seed=1)
    model = fit(conv_vae(), "conv_vae", Images(N), val, config, run, vae_weights(config), picture)
    assert sorted(path.name for path in (run.path / "samples").iterdir()) == [
        f"step_{step:07d}.png" for step in (5, 10, 12)
    ]
    spread = val.x[::2]  # eight of fifteen, from the first to the last
    assert all(torch.equal(x, spread) for x, _ in drawn)
    with torch.no_grad():
        torch.testing.assert_close(drawn[-1][1], model(spread))
    assert not torch.equal(drawn[0][1], drawn[-1][1])


def test_a_trained_model_holds_no_gradients(tmp_path: Path) -> None:
    _, model = train(tmp_path, epochs=1)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- run folders ---


def test_a_finished_run_is_loaded_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, trained = train(tmp_path)
    run.finish(mse=1.0)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    capsys.readouterr()
    torch.manual_seed(99)
    again, model = train(tmp_path, WithDropout(SMALL))
    assert {path: path.stat().st_mtime_ns for path in again.path.rglob("*")} == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert not model.training
    assert "holds a finished model of this configuration: loaded, not trained" in capsys.readouterr().out


def test_another_model_in_the_same_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    config = TrainConfig(**QUICK | SETTINGS | {"epochs": 1})
    other = ConvVAE(SMALL.model_copy(update={"latent_dim": 2}))
    run = Run(tmp_path / "e" / "r")
    with pytest.raises(RunError) as caught:
        fit(other, "conv_vae", Images(N), Images(12), config, run, vae_weights(config))
    assert "another configuration:\n  model.latent_dim: 3 there, 2 here\n" in str(caught.value)


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    run = open_run({"experiment": "e", "run": "r", **TrainConfig(**QUICK | SETTINGS).model_dump()}, tmp_path)
    with run.lock(), pytest.raises(RunError, match=f"{run.path} is in use by process {os.getpid()} on "):
        train(tmp_path)
    train(tmp_path)


def test_a_batch_larger_than_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^batch_size=64: must be at most 24, the training samples$"):
        train(tmp_path, batch_size=64)


@pytest.mark.parametrize("damage", ["cut in half", "another file"])
def test_a_damaged_checkpoint_is_named_and_not_replaced(damage: str, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, images=Images(N, on_batch=sends(signal.SIGTERM, 6)))
    last = tmp_path / "e" / "r" / "checkpoints" / "last.ckpt"
    if damage == "another file":
        torch.save({"weight": torch.zeros(3)}, last)
        message = "holds no model, optimizer, step, .*, so no training goes on from it; move it aside"
    else:
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
        message = "damaged or not a checkpoint .*; restore a copy of it, or move it aside to begin again"
    before = last.read_bytes()
    with pytest.raises(CheckpointError, match=f"{last}: {message}"):
        train(tmp_path)
    assert last.read_bytes() == before
