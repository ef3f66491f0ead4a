"""A run that is killed or stopped anywhere and started again ends as one that was not, bit for bit."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PER_EPOCH, STEPS, Dies, Images, N, assert_same, conv_vae, metrics, script, sends, train, wait_for

from workbench import checkpoints, training
from workbench.checkpoints import load_checkpoint
from workbench.listing import describe_run
from workbench.process import PREEMPTED_EXIT, Preempted
from workbench.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = train(tmp_path_factory.mktemp("undisturbed"), kl_rise_to=10 / 12)
    return run


# --- exact resume ---


def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(undisturbed: Run, tmp_path: Path) -> None:
    torch.rand(7)  # what was drawn before does not matter
    run, model = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)
    other, _ = train(tmp_path / "other", kl_rise_to=10 / 12, seed=1)
    assert metrics(other) != metrics(run)
    assert not model.training


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_dying_in_any_step_and_going_on_changes_nothing(step: int, undisturbed: Run, tmp_path: Path) -> None:
    model = conv_vae()
    loss, taken = model.loss, 0

    def dies(batch: dict) -> dict:
        nonlocal taken
        taken += model.training
        if taken == step:
            raise Dies
        return loss(batch)

    model.loss = dies
    with pytest.raises(Dies):
        train(tmp_path, model, kl_rise_to=10 / 12)
    run, _ = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("save", range(1, 10))
@pytest.mark.parametrize("moment", ["before the rename", "after it"])
def test_dying_in_any_save_and_going_on_changes_nothing(
    save: int, moment: str, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        train(tmp_path, kl_rise_to=10 / 12)
    run, _ = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)


def test_dying_between_the_last_checkpoint_and_the_model(undisturbed: Run, tmp_path: Path, monkeypatch: Any) -> None:
    def dies(*_: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(training, "save_model", dies)
        train(tmp_path, kl_rise_to=10 / 12)
    run, _ = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("every", [1, 3, 6, 1000])
def test_checkpoints_at_epoch_boundaries_and_of_the_start_alone(every: int, undisturbed: Run, tmp_path: Path) -> None:
    def dies(number: int) -> None:
        if number == 9:
            raise Dies

    with pytest.raises(Dies):
        train(tmp_path, images=Images(N, on_batch=dies), kl_rise_to=10 / 12, checkpoint_every=every)
    run, _ = train(tmp_path, kl_rise_to=10 / 12, checkpoint_every=every)
    assert_same(run, undisturbed)


def test_other_threads_are_no_longer_bit_for_bit_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, images=Images(N, on_batch=sends(signal.SIGTERM, 6)))
    with pytest.raises(Preempted):
        train(tmp_path, images=Images(N, on_batch=sends(signal.SIGTERM, 1)))
    assert "bit for bit" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        train(tmp_path)
    finally:
        torch.set_num_threads(1)
    said = "not bit for bit as without the interruption, as this has changed: threads: 1 there, 2 here\n"
    assert said in capsys.readouterr().out


def test_the_best_value_survives_a_restart(tmp_path: Path) -> None:
    """The KL rises with its large weight at the end, so that the best epoch lies before the kill."""

    def weights(progress: float) -> dict[str, float]:
        return {"mse": 1.0, "kl": 10.0 if progress == 1 else 0.0}

    def dies(number: int) -> None:
        if number == 11:
            raise Dies

    settings = {"weights": weights, "lr": 1e-2, "lr_decay": 1.0}
    expected, _ = train(tmp_path / "undisturbed", **settings)
    assert load_checkpoint(expected.path / "checkpoints" / "best.ckpt")["step"] < 9
    with pytest.raises(Dies):
        train(tmp_path, images=Images(N, on_batch=dies), **settings)
    run, _ = train(tmp_path, **settings)
    assert_same(run, expected)


def test_the_start_is_a_checkpoint_so_that_used_or_other_weights_do_not_matter(
    undisturbed: Run, tmp_path: Path
) -> None:
    def dies(number: int) -> None:
        if number == 4:
            raise Dies

    model = conv_vae()
    with pytest.raises(Dies):
        train(tmp_path, model, Images(N, on_batch=dies), kl_rise_to=10 / 12, checkpoint_every=1000)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), conv_vae().parameters(), strict=True))
    run, _ = train(tmp_path, model, kl_rise_to=10 / 12, checkpoint_every=1000)  # the same object, some steps old
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_sigkill_at_random_instants_changes_nothing(undisturbed: Run, tmp_path: Path) -> None:
    """While a batch is read, which is up to two ahead of the steps: the first kill comes after a checkpoint."""
    last, steps = tmp_path / "e" / "r" / "checkpoints" / "last.ckpt", []
    for batch in (5, 4, 4):
        process = script(tmp_path, f"--die-in-read={batch}")
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        steps.append(load_checkpoint(last)["step"])
    assert 0 < steps[0] and steps == sorted(steps) and steps[-1] < STEPS
    process = script(tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(Run(tmp_path / "e" / "r"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("save", [2, 7])
def test_sigkill_inside_a_save_changes_nothing(save: int, undisturbed: Run, tmp_path: Path) -> None:
    process = script(tmp_path, f"--die-in-save={save}")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "e" / "r" / "checkpoints").glob("*.tmp")), "it did not die inside a save"
    process = script(tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(Run(tmp_path / "e" / "r"), undisturbed)


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_leaves_with_75(
    number: int, undisturbed: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as caught:
        train(tmp_path, images=Images(N, on_batch=sends(number, 6)), kl_rise_to=10 / 12, checkpoint_every=1000)
    assert caught.value.code == PREEMPTED_EXIT == 75
    assert signal.getsignal(number) == before
    step = load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")["step"]
    assert 3 <= step <= 6, "batches are read up to two ahead"
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {step} of {STEPS}; a checkpoint was written" in capsys.readouterr().out
    assert describe_run(tmp_path / "e" / "r")["state"] == f"stopped training {step}/{STEPS} (Preempted)"
    run, _ = train(tmp_path, kl_rise_to=10 / 12, checkpoint_every=1000)
    assert f"at step {step} of {STEPS}" in capsys.readouterr().out
    assert_same(run, undisturbed)


def test_ctrl_c_writes_a_checkpoint_and_interrupts(undisturbed: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="a checkpoint was written: run it again to go on"):
        train(tmp_path, images=Images(N, on_batch=sends(signal.SIGINT, 6)), kl_rise_to=10 / 12)
    run, _ = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_signal_during_a_validation_does_not_wait_for_its_end(at: int, undisturbed: Run, tmp_path: Path) -> None:
    """12 images in batches of 8: batches 1 and 2 are the first validation, 3 and 4 the second."""
    with pytest.raises(Preempted):
        train(tmp_path, val=Images(12, seed=1, on_batch=sends(signal.SIGTERM, at)), kl_rise_to=10 / 12)
    state = load_checkpoint(tmp_path / "e" / "r" / "checkpoints" / "last.ckpt")
    assert state["step"] == PER_EPOCH * -(-at // 2), "the step before the validation is lost"
    assert at % 2 == 0 or not state["validated"], "it waited for the end"
    run, _ = train(tmp_path, kl_rise_to=10 / 12)
    assert_same(run, undisturbed)


def test_a_signal_while_the_model_is_saved_is_obeyed_after_it(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training.save_model

    def signalled(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(training, "save_model", signalled)
        train(tmp_path, kl_rise_to=10 / 12)
    assert_same(Run(tmp_path / "e" / "r"), undisturbed)


def test_training_outside_the_main_thread(undisturbed: Run, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(tmp_path,), kwargs={"kl_rise_to": 10 / 12})
    thread.start()
    thread.join()
    assert_same(Run(tmp_path / "e" / "r"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_exit_code_of_a_process(number: int, tmp_path: Path) -> None:
    process = script(tmp_path)
    wait_for("reading", process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "a checkpoint was written" in output and "Traceback" not in errors
    assert (tmp_path / "e" / "r" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Training samples are read once and kept there; reading those of a validation brings the signal."""
    expected, _ = train(tmp_path / "a", device="cuda")
    with pytest.raises(Preempted):
        train(tmp_path / "b", val=Images(12, seed=1, on_batch=sends(signal.SIGTERM, 5)), device="cuda")
    run, _ = train(tmp_path / "b", device="cuda")
    assert_same(run, expected)
