"""What training does when memory runs out or a number is not finite."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import QUICK, SETTINGS, Images, Linear, N, conv_vae, sends, stepped, train

from workbench import training
from workbench.checkpoints import load_checkpoint
from workbench.health import NonFiniteError
from workbench.listing import describe_run
from workbench.models.conv_vae import ConvVAE
from workbench.process import Preempted
from workbench.runs import Run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


# --- out of memory ---


@pytest.mark.parametrize(("most", "sizes"), [(4, [4, 4]), (3, [2, 2, 2, 2]), (1, [1] * 8)])
def test_out_of_memory_divides_the_batch_and_keeps_the_gradient(
    most: int, sizes: list[int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, expected = stepped(tmp_path, Linear(), kl_weight=0.1)
    divided, rows = stepped(tmp_path, Linear(most), kl_weight=0.1)
    assert divided.model.sizes[-len(sizes) :] == sizes and sum(divided.model.sizes[-len(sizes) :]) == 8
    assert divided.micro_batches == len(sizes)
    for one, other in zip(divided.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for row, want in zip(rows, expected, strict=True):
        assert row == pytest.approx(want, rel=1e-4)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == (
        f"out of memory at step 1: going on with {len(sizes)} micro-batches per step; "
        "the gradient stays that of the whole batch, batch norm now sees the micro-batches"
    )
    assert len(told) == int(np.log2(len(sizes))), "told at every step"


def test_an_uneven_batch_weighs_its_parts_by_their_size(tmp_path: Path) -> None:
    """7 samples in 2 parts of 4 and 3."""
    whole, divided = Linear(), Linear(most=4)
    for model in (whole, divided):
        config = TrainConfig(**QUICK | SETTINGS | {"batch_size": 7})
        images = Images(N)
        trainer = Trainer(model, images, images, config, Run(tmp_path), vae_weights(config), lambda a, b: Figure())
        trainer._train_step(np.arange(7), images.batch(np.arange(7)))
    assert divided.sizes == [7, 4, 3]
    for one, other in zip(divided.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_batch_norm_does_not_keep_what_the_failed_attempt_did(tmp_path: Path) -> None:
    model, attempts = conv_vae(ConvVAE), []
    loss = model.loss

    def runs_out_after_the_forward_pass(batch: dict) -> dict:
        terms = loss(batch)
        attempts.append(len(batch["x"]))
        if len(batch["x"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return terms

    model.loss = runs_out_after_the_forward_pass
    stepped(tmp_path, model, steps=1)
    assert attempts == [8, 4, 4]
    assert model.encoder[0][1].num_batches_tracked == 2


def test_the_number_of_micro_batches_survives_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, Linear(most=4), Images(N, on_batch=sends(signal.SIGTERM, 6)))
    assert load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")["micro_batches"] == 2
    capsys.readouterr()
    again = Linear(most=4)
    train(tmp_path, again)
    assert "out of memory" not in capsys.readouterr().out
    assert max(again.sizes) == 4, "validation takes the smaller batches too"


def test_a_sample_that_does_not_fit_ends_it(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        stepped(tmp_path, Linear(most=0))


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried", [8, 4, 2, 1]),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", [8, 4, 2, 1]),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", [8, 4, 2, 1]),
        ("CUDA error: out of memory", [8, 4, 2, 1]),
        ("shapes differ", [8]),
    ],
)
def test_other_allocators_count_as_memory_and_other_errors_do_not(
    message: str, sizes: list[int], tmp_path: Path
) -> None:
    model, found = Linear(), []

    def fails(batch: dict) -> dict:
        found.append(len(batch["x"]))
        raise RuntimeError(message)

    model.loss = fails
    with pytest.raises(RuntimeError, match=re.escape(message)):
        stepped(tmp_path, model)
    assert found == sizes


# --- not finite ---


def test_a_loss_that_is_not_finite_stops_with_everything_named(tmp_path: Path) -> None:
    images, batches = Images(N), training.batch_indices(N, 8, 0, 0)
    step, bad = 2, next(int(batch[3]) for i, batch in enumerate(batches, 1) if i == 2)
    images.x[bad] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, images=images, checkpoint_every=1)
    message = str(caught.value)
    assert message.startswith(f"step {step} is not finite (mse=nan, kl=nan, loss=nan, grad_norm=nan); its samples are ")
    names = message.split("its samples are ")[1].split(";")[0].split(", ")
    assert len(names) == 8 and f"clip{bad:02d}/0" in names
    last = tmp_path / "e" / "r" / "checkpoints" / "last.ckpt"
    assert f"the last good checkpoint is {last} (after step {step - 1})" in message
    assert message.endswith("Look at these samples, lower lr, or use precision fp32, under another run name")
    state = load_checkpoint(last)
    assert state["step"] == step - 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert describe_run(tmp_path / "e" / "r")["state"].endswith("(NonFiniteError)")
    assert not (tmp_path / "e" / "r" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    model = Linear()
    loss = model.loss
    model.loss = lambda batch: loss(batch) | {"mse": loss(batch)["mse"] + (0 * model.decoder.bias).sqrt().sum()}
    with pytest.raises(NonFiniteError, match=r"^step 1 is not finite \(mse=0\.\d+, kl=.*, grad_norm=nan\)"):
        train(tmp_path, model)
    expected, state = Linear().state_dict(), load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(state["model"][key], value) for key, value in expected.items())


def test_a_long_list_of_samples_is_cut(tmp_path: Path) -> None:
    images = Images(80)
    images.x[:] = torch.inf
    with pytest.raises(NonFiniteError, match=r"clip\d\d/0 and 16 more; "):
        train(tmp_path, images=images, batch_size=80)


def test_without_a_finite_validation_there_are_no_best_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    val = Images(12, seed=1)
    val.x[3] = torch.nan
    last = tmp_path / "e" / "r" / "checkpoints" / "last.ckpt"
    with pytest.raises(NonFiniteError, match=f"^no validation loss was finite, .*; the last ones are in {last}. Look"):
        train(tmp_path, val=val, epochs=2, keep="best")
    assert capsys.readouterr().out.count("warning: step 3: validation loss nan is not finite\n") == 1
    run, _ = train(tmp_path / "last", val=val, epochs=2)
    assert run.trained, "the last weights are there all the same"
