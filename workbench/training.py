"""The training loop: exact resume, preemption, out-of-memory fallback, and what is logged.

Nothing in the loop is stateful but the checkpoint (model, optimizer, step, micro-batch count, best value):
batch order is a function of (seed, epoch), noise and dropout of (seed, step). So a run that was killed at any
instant and started again ends in the same weights, bit for bit, as one that was not. The conditions are the
same device, thread count and library versions; a resumed run says so where they are not.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from workbench.checkpoints import load_checkpoint, load_safetensors, load_weights, save_checkpoint, save_model
from workbench.datasets.loading import Batch, Dataset, batch_indices, read_ahead, to_device
from workbench.datasets.splits import mix
from workbench.health import Watch
from workbench.logs import Log
from workbench.objectives import Objective, Reconstruction, evaluate
from workbench.plots import image_grid
from workbench.process import (
    autocast,
    deterministic_kernels,
    device_name,
    leave,
    out_of_memory,
    pick_device,
    seed_generators,
    stop_signals,
)
from workbench.progress import Progress, write_status
from workbench.runs import Run, differences
from workbench.schedule import TrainConfig, Weights, learning_rate, total_steps

FIXED_SAMPLES = 8
NAMED_SAMPLES = 64


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; nothing of that step was kept."""


def draw_noise(seed: int, step: int, samples: int, noise_dim: int) -> Float[Tensor, "b d"]:
    """Standard normal noise for the whole batch of a step: a function of (seed, step) on every device."""
    return torch.randn(samples, noise_dim, generator=torch.Generator().manual_seed(mix(seed, 2, step)))


def fit(
    model: nn.Module,
    kind: str,
    train: Dataset,
    val: Dataset,
    config: TrainConfig,
    run: Run,
    weights: Weights,
    picture: Callable[[Tensor, Tensor], Figure] | None = None,
    objective: Objective | None = None,
) -> nn.Module:
    """Train into a run folder, from its last checkpoint where there is one; load the model if it is finished.

    Args:
        model: Freshly initialised from a fixed seed; `loss(batch)` gives named terms, `noise_dim` its noise.
        kind: Its key in `MODELS`.
        weights: Weight of each term at a share of the training; terms without a weight are logged only.
        picture: Draws (x, x_hat) of the fixed validation samples; rows of images when None.
        objective: What is optimised; the model's own loss when None.

    Returns:
        The trained model in evaluation mode, on the training device.

    Raises:
        Preempted: SIGTERM or SIGUSR1 arrived; a checkpoint was written, and another `fit` goes on from it.
        KeyboardInterrupt: likewise after SIGINT.
        NonFiniteError: the loss or the gradient is not finite.
        RunError, CheckpointError: the folder is in use, is another model's, or is damaged.
    """
    run.record(model={"kind": kind} | model.config.model_dump())
    _place(model, config)
    if run.trained:
        load_weights(model, load_safetensors(run.path / "model.safetensors"), run.path / "model.safetensors")
        print(f"{run.path} holds a finished model of this configuration: loaded, not trained")
        return model.eval()
    with run.lock(), deterministic_kernels(config.deterministic), stop_signals() as stop:
        trainer = Trainer(model, train, val, config, run, weights, picture or _rows, objective)
        try:
            trainer.train(stop)
        except BaseException as error:
            write_status("stopped", what="training", done=trainer.step, total=trainer.steps, reason=_reason(error))
            raise
        if config.keep == "best":
            path = run.path / "checkpoints" / "best.ckpt"
            load_weights(model, load_checkpoint(path, ("model",))["model"], path)
        save_model(run.path / "model.safetensors", model, kind)
        if stop:
            leave(stop["signal"], f"stopped by {signal.Signals(stop['signal']).name} after the last step; model saved")
    return model.eval()


def _place(model: nn.Module, config: TrainConfig) -> None:
    """Move a model to its device; weights of images channels-last where so set, others have no such order."""
    model.to(pick_device(config.device))
    for weight in (p for p in model.parameters() if config.channels_last and p.dim() == 4):
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor, x_hat: Tensor) -> Figure:
    return image_grid({"original": x, "reconstruction": x_hat})


def _reason(error: BaseException) -> str:
    return f"({type(error).__name__})"


class Trainer:
    """One training in one process. Use `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        val: Dataset,
        config: TrainConfig,
        run: Run,
        weights: Weights,
        picture: Callable[[Tensor, Tensor], Figure],
        objective: Objective | None = None,
    ) -> None:
        if config.batch_size > len(train):
            raise ValueError(f"batch_size={config.batch_size}: must be at most {len(train)}, the training samples")
        self.model, self.train_set, self.val_set, self.config, self.run = model, train, val, config, run
        self.weights, self.picture = weights, picture
        self.device = next(model.parameters()).device
        self.objective = objective or Reconstruction(model)
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam  # equal at 0, where AdamW's is slower
        self.optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.loss = torch.compile(self.objective.loss) if config.compile else self.objective.loss
        self.watch = Watch()
        self.steps_per_epoch = len(train) // config.batch_size
        self.steps = total_steps(config, self.steps_per_epoch)
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        self.step, self.micro_batches, self.best, self.best_step, self.seconds = 0, 1, math.inf, 0, 0.0
        self.saved_step = 0
        self.folder = run.path / "checkpoints"

    def train(self, stop: Mapping[str, int]) -> None:
        """Run from the last checkpoint, or from the start, to the last step; leave when `stop` holds a signal."""
        self.stop = stop
        validated = self._resume()
        config, started = self.config, time.monotonic() - self.seconds
        order = getattr(self.train_set, "epoch_order", None)
        indices = batch_indices(len(self.train_set), config.batch_size, config.seed, self.step, order)
        batches = read_ahead(self.train_set, islice(indices, self.steps - self.step))
        self.model.train()
        with (
            Log(self.run.path, self.step, self.objective.group) as self.log,
            Progress(self.steps, "training", "step", self.step) as self.progress,
        ):
            if not validated:
                self._finish_step()
            for samples, raw in batches:
                if self.done:
                    break
                row = self._train_step(samples, raw)
                self.seconds = time.monotonic() - started
                self._show_step(row)
                self._finish_step()

    @property
    def epoch(self) -> int:
        """Epoch of the last step taken, from 1."""
        return (self.step - 1) // self.steps_per_epoch + 1

    @property
    def done(self) -> bool:
        """Whether the last step has been taken, or the validation loss has not fallen for too long."""
        waited = self.step - self.best_step >= self.config.patience * self.steps_per_epoch
        return self.step == self.steps or (0 < self.config.patience and waited)

    def _show_step(self, row: dict[str, Any]) -> None:
        """Progress and, where due, a row of metrics.csv for the step just taken."""
        config = self.config
        speed = config.batch_size * (self.progress.n + 1 - self.progress.initial) / self.progress.seconds()
        self.watch.step(self.step, row["loss"], row["grad_norm"])
        terms = " ".join(f"{name} {row[name]:.4g}" for name in self.weights(0.0))
        self.progress.update(1, f"epoch {self.epoch}/{self.epochs} {terms} {speed:.0f} samples/s")
        due = self.step == 1 or self.step % config.log_every == 0 or self.step == self.steps
        if due or row.get("replaced", 0) > 0:
            self.log.row(self.step, self.epoch, "train", row | {"samples_per_s": speed, "seconds": self.seconds})

    def _finish_step(self) -> None:
        """Validate, draw and save as the step just taken calls for; then leave if a signal has arrived."""
        config = self.config
        if self.step % self.steps_per_epoch == 0 or self.step == self.steps:
            self._validate()
        last = self.done
        if last and self.step < self.steps:
            print(f"stopped early after step {self.step}: no lower validation loss for {config.patience} epochs")
        if self.step % (config.images_every or self.steps_per_epoch) == 0 or last:
            self.log.picture(self.step, self._reconstructions())
        if self.step % config.checkpoint_every == 0 or last:
            self._save("last")
        if self.stop:
            self._leave(validated=True)

    def _train_step(self, samples: np.ndarray, raw: Batch) -> dict[str, float]:
        """One optimizer step on one batch; returns the unweighted terms, the loss and the gradient norm."""
        config, weights = self.config, self.weights(self.step / self.steps)
        lr = learning_rate(config, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.train_set.prepare(to_device(raw, self.device))
        if self.model.noise_dim:
            noise = draw_noise(config.seed, self.step, len(samples), self.model.noise_dim)
            batch["noise"] = noise.to(self.device)
        terms = self._gradient(batch, weights, len(samples))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip, foreach=True)
        loss = sum(weight * terms[name] for name, weight in weights.items())
        values = torch.stack([*terms.values(), loss, norm]).tolist()
        row = dict(zip([*terms, "loss", "grad_norm"], values, strict=True))
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(self._not_finite(row, samples))
        self.optimizer.step()
        self.step += 1
        row |= self.objective.after_step(self.step, torch.Generator().manual_seed(mix(config.seed, 3, self.step)))
        return row | {f"{name}_weight": weight for name, weight in list(weights.items())[1:]} | {"lr": lr}

    def _gradient(self, batch: Batch, weights: Mapping[str, float], n: int) -> dict[str, Tensor]:
        """Gradient of the weighted loss over the batch, in micro-batches; twice as many when memory runs out."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        while True:
            try:
                return self._accumulate(batch, weights, n)
            except RuntimeError as error:
                if not out_of_memory(error) or self.micro_batches >= n:
                    raise
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batches = min(2 * self.micro_batches, n)
            print(
                f"out of memory at step {self.step + 1}: going on with {self.micro_batches} micro-batches per step; "
                "the gradient stays that of the whole batch, batch norm now sees the micro-batches",
                flush=True,
            )

    def _accumulate(self, batch: Batch, weights: Mapping[str, float], n: int) -> dict[str, Tensor]:
        seed_generators(mix(self.config.seed, 1, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in torch.arange(n).chunk(self.micro_batches):
            micro = {key: value[part[0] : part[-1] + 1] for key, value in batch.items()}
            with autocast(self.device, self.config.precision):
                terms = self.loss(micro)
            share = len(part) / n
            sum(weight * share * terms[name] for name, weight in weights.items()).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + share * value.detach()
        return totals

    def _not_finite(self, row: Mapping[str, float], samples: np.ndarray) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in row.items())
        names = ", ".join(self.train_set.name(int(i)) for i in samples[:NAMED_SAMPLES])
        more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
        return (
            f"step {self.step + 1} is not finite ({values}); its samples are {names}{more}; the last good checkpoint "
            f"is {self.folder / 'last.ckpt'} (after step {self.saved_step}). Look at these samples, lower lr, or use "
            "precision fp32, under another run name"
        )

    def _validate(self) -> None:
        """Evaluate, log, and keep the best model by the loss at its final weights (after any warm-up)."""
        size = max(1, self.config.batch_size // self.micro_batches)
        terms = evaluate(self.model, self.val_set, size, self.config.precision, self._validating, self.objective.loss)
        weights = self.weights(self.step / self.steps)
        self.watch.validation(self.step, sum(weight * terms[name] for name, weight in weights.items()))
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights(1.0).items())
        self.log.row(self.step, self.epoch, "val", terms | {"seconds": self.seconds})
        shown = " ".join(f"{name} {terms[name]:.4g}" for name in self.weights(0.0))
        self.progress.update(0, f"epoch {self.epoch}/{self.epochs} validation {shown}")
        if terms["loss"] < self.best:
            self.best, self.best_step = terms["loss"], self.step
            self._save("best")

    def _validating(self, done: int) -> None:
        """Show how far the validation is; a signal ends it, and it is done anew after resuming."""
        samples = len(self.val_set)
        self.progress.update(0, f"epoch {self.epoch}/{self.epochs} validating {done}/{samples}")
        if self.stop and done < samples:
            self._leave(validated=False)

    @torch.inference_mode()
    def _reconstructions(self) -> Figure:
        """The fixed validation samples beside their reconstructions."""
        last = len(self.val_set) - 1
        raw = self.val_set.batch(np.linspace(0, last, min(FIXED_SAMPLES, last + 1)).astype(int))
        batch = self.val_set.prepare(to_device(raw, self.device))
        self.model.eval()
        x_hat = self.objective.predict(batch)
        self.model.train()
        return self.picture(batch["x"].cpu(), x_hat.float().cpu())

    def _save(self, name: str, validated: bool = True) -> None:
        """Write a checkpoint; `validated` says that what its step called for has been done."""
        self.folder.mkdir(exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        progress = {
            "step": self.step,
            "validated": validated,
            "micro_batches": self.micro_batches,
            "best": self.best,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "device": device_name(self.device),
        }
        save_checkpoint(self.folder / f"{name}.ckpt", state | progress)
        if name == "last":
            self.saved_step = self.step

    def _resume(self) -> bool:
        """Load the last checkpoint, or write one of the start; whether its step has been validated where due."""
        path = self.folder / "last.ckpt"
        if not path.exists():
            self._save("last")
            return True
        progress = ("step", "validated", "micro_batches", "best", "best_step", "seconds")
        state = load_checkpoint(path, ("model", "optimizer", *progress))
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.micro_batches = state["step"], state["micro_batches"]
        self.best, self.best_step = state["best"], state["best_step"]
        self.seconds, self.saved_step = state["seconds"], state["step"]
        print(f"resumed {path} at step {self.step} of {self.steps}", flush=True)
        if changes := self.run.changes() + differences(
            {"device": state["device"]}, {"device": device_name(self.device)}
        ):
            print(f"not bit for bit as without the interruption, as this has changed: {'; '.join(changes)}", flush=True)
        return state["validated"]

    def _leave(self, validated: bool) -> NoReturn:
        """Write a checkpoint and leave, by the exception that belongs to the signal."""
        self._save("last", validated)
        name = signal.Signals(self.stop["signal"]).name
        leave(
            self.stop["signal"], f"stopped by {name} after step {self.step} of {self.steps}; a checkpoint was written"
        )
