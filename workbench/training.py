"""The training loop: exact resume, preemption, out-of-memory fallback, and what is logged.

Nothing in the loop is stateful but the checkpoint (model, optimizer, step, micro-batch count, best value):
batch order is a function of (seed, epoch), noise and dropout of (seed, step). So a run that was killed at any
instant and started again ends in the same weights, bit for bit, as one that was not. The conditions are the
same device, thread count, number of processes and library versions; a resumed run says so where they are not.

One process or several (`devices`, `num_nodes`) run the same loop on their parts of each batch, see `distributed`.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from workbench.checkpoints import load_checkpoint, load_safetensors, load_weights, save_checkpoint, save_model
from workbench.datasets.loading import Batch, Dataset, batch_indices, kept_on, read_ahead, to_device
from workbench.datasets.splits import mix
from workbench.distributed import ALONE, PeerOutOfMemory, World, mean_terms, synchronised
from workbench.health import Watch, never_finite, not_finite
from workbench.launch import launch
from workbench.layers import sharded
from workbench.logs import Log
from workbench.objectives import Objective, Reconstruction, draw_noise, evaluate
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

    With more than one process (`devices`, `num_nodes`) they are started here, and end with this one, see `launch`.

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
        NonFiniteError: the loss or the gradient is not finite; or no validation is, where the best is to be kept.
        RunError, CheckpointError: the folder is in use, is another model's, or is damaged.
        LaunchError: several processes cannot be started as asked, or have been lost too often.
    """
    run.record(model={"kind": kind} | model.config.model_dump())
    arguments = (model, kind, train, val, config, run, weights, picture, objective)
    if run.trained:
        print(f"{run.path} holds a finished model of this configuration: loaded, not trained")
    elif config.processes > 1:
        with run.lock():
            launch(arguments, config, run)
    else:
        with run.lock(), stop_signals() as stop:
            train_into(*arguments, stop)
        return model.eval()
    _place(model, config)
    load_weights(model, load_safetensors(run.path / "model.safetensors"), run.path / "model.safetensors")
    return model.eval()


def train_into(
    model: nn.Module,
    kind: str,
    train: Dataset,
    val: Dataset,
    config: TrainConfig,
    run: Run,
    weights: Weights,
    picture: Callable[[Tensor, Tensor], Figure] | None,
    objective: Objective | None,
    stop: Mapping[str, int],
    world: World = ALONE,
    progress: type[Progress] = Progress,
) -> None:
    """What `fit` does in each process of a `world`; `stop` holds a signal's number under "signal" once one has come."""
    _place(model, config)
    with deterministic_kernels(config.deterministic):
        trainer = Trainer(model, train, val, config, run, weights, picture or _rows, objective, world, progress)
        try:
            trainer.train(stop)
        except BaseException as error:
            write_status("stopped", what="training", done=trainer.step, total=trainer.steps, reason=_reason(error))
            raise
        if config.keep == "best" and not trainer.best_step:
            raise never_finite(str(trainer.folder / "last.ckpt"))
        model.zero_grad()  # gives their memory back
        if config.keep == "best":
            path = run.path / "checkpoints" / "best.ckpt"  # of the first node, as `last.ckpt` is in `_resume`
            best = world.first(load_checkpoint(path, ("model",))["model"] if world.rank == 0 else None)
            load_weights(model, best, path)
        if world.writes:
            save_model(run.path / "model.safetensors", model, kind)
        if number := world.most(stop.get("signal", 0)):
            leave(number, f"stopped by {signal.Signals(number).name} after the last step; model saved")


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
    """One training, or the part of it that one of several processes has. Use `fit`."""

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
        world: World = ALONE,
        progress: type[Progress] = Progress,
    ) -> None:
        if config.batch_size > len(train):
            raise ValueError(f"batch_size={config.batch_size}: must be at most {len(train)}, the training samples")
        self.model, self.train_set, self.val_set, self.config, self.run = model, train, val, config, run
        self.weights, self.picture, self.world, self.show_progress = weights, picture, world, progress
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
        self.saved_step, self.part, self.shard = 0, world.part(config.batch_size), world.shard(config.compile)
        self.folder = run.path / "checkpoints"

    def train(self, stop: Mapping[str, int]) -> None:
        """Run from the last checkpoint, or from the start, to the last step; leave when `stop` holds a signal."""
        self.stop = stop
        validated = self._resume()
        config, started = self.config, time.monotonic() - self.seconds
        order = getattr(self.train_set, "epoch_order", None)
        indices = batch_indices(len(self.train_set), config.batch_size, config.seed, self.step, order)
        there = kept_on(self.device, self.train_set)
        batches = read_ahead(there, islice(indices, self.steps - self.step), self.part)
        self.model.train()
        with (
            Log(self.run.path, self.step, self.objective.group) if self.world.writes else nullcontext() as self.log,
            self.show_progress(self.steps, "training", "step", self.step) as self.progress,
            synchronised(self.model, self.world, config.compile),
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
        if self.log and (due or row.get("replaced", 0) > 0):
            self.log.row(self.step, self.epoch, "train", row | {"samples_per_s": speed, "seconds": self.seconds})

    def _finish_step(self) -> None:
        """Validate, draw and save as the step just taken calls for; then leave if a signal has arrived."""
        config = self.config
        if self.step % self.steps_per_epoch == 0 or self.step == self.steps:
            self._validate()
        last = self.done
        if last and self.step < self.steps:
            print(f"stopped early after step {self.step}: no lower validation loss for {config.patience} epochs")
        if self.log and (self.step % (config.images_every or self.steps_per_epoch) == 0 or last):
            self.log.picture(self.step, self._reconstructions())
        if self.step % config.checkpoint_every == 0 or last:
            self._save("last")
        self._leave_if_asked(validated=True)

    def _train_step(self, samples: np.ndarray, raw: Batch) -> dict[str, float]:
        """One optimizer step on one batch; returns the unweighted terms, the loss and the gradient norm."""
        config, weights = self.config, self.weights(self.step / self.steps)
        lr = learning_rate(config, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.train_set.prepare(to_device(raw, self.device))
        if self.model.noise_dim:
            noise = draw_noise(config.seed, self.step, len(samples), self.model.noise_dim)
            batch["noise"] = noise[self.part].to(self.device)
        terms = self._gradient(batch, weights, len(samples) // self.world.size)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip, foreach=True)
        loss = sum(weight * terms[name] for name, weight in weights.items())
        values = torch.stack([*terms.values(), loss, norm]).tolist()
        row = dict(zip([*terms, "loss", "grad_norm"], values, strict=True))
        if not all(map(math.isfinite, values)):
            names = [self.train_set.name(int(i)) for i in samples]
            last = f"{self.folder / 'last.ckpt'} (after step {self.saved_step})"
            raise not_finite(self.step + 1, row, names, last)
        self.optimizer.step()
        self.step += 1
        row |= self.objective.after_step(self.step, torch.Generator().manual_seed(mix(config.seed, 3, self.step)))
        return row | {f"{name}_weight": weight for name, weight in list(weights.items())[1:]} | {"lr": lr}

    def _gradient(self, batch: Batch, weights: Mapping[str, float], n: int) -> dict[str, Tensor]:
        """Gradient of the weighted loss over the batch, in micro-batches; twice as many when memory runs out.

        All processes take the step again if one of them has run out of memory. The terms are those of the whole batch.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        while True:
            try:
                with sharded(self.shard):
                    terms = self._accumulate(batch, weights, n)
                self.world.mean([p.grad for p in self.model.parameters() if p.grad is not None])
                return mean_terms(self.world, terms)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if not isinstance(error, PeerOutOfMemory):
                    self.world.most(1)  # what the others wait for
                if self.micro_batches >= n:
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

    def _validate(self) -> None:
        """Evaluate, log, and keep the best model by the loss at its final weights (after any warm-up)."""
        size = max(1, self.config.batch_size // self.micro_batches)  # of every process, as some terms are of a batch
        how = (size, self.config.precision, self._validating, self.objective.loss, self.world)
        terms = evaluate(self.model, self.val_set, *how)
        weights = self.weights(self.step / self.steps)
        self.watch.validation(self.step, sum(weight * terms[name] for name, weight in weights.items()))
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights(1.0).items())
        if self.log:
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
        if done < samples:
            self._leave_if_asked(validated=False)

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
        if name == "last":
            self.saved_step = self.step
        if not self.world.writes:
            return
        self.folder.mkdir(exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        names = ("step", "micro_batches", "best", "best_step", "seconds")
        progress = {name: getattr(self, name) for name in names} | {"validated": validated}
        save_checkpoint(self.folder / f"{name}.ckpt", state | progress | self._circumstances())

    def _circumstances(self) -> dict[str, str]:
        """What the bits depend on, beside versions."""
        found = {"device": device_name(self.device), "processes": str(self.world.size)}
        return found | ({"threads": str(torch.get_num_threads())} if self.world.size > 1 else {})

    def _resume(self) -> bool:
        """Load the last checkpoint, or write one of the start; whether its step has been validated where due."""
        path, first = self.folder / "last.ckpt", self.world.rank == 0
        if not self.world.first(path.exists()):
            if self.world.size > 1:
                start = {name: value.cpu() for name, value in self.model.state_dict().items()} if first else None
                self.model.load_state_dict(self.world.first(start))
            self._save("last")
            return True
        progress = ("step", "validated", "micro_batches", "best", "best_step", "seconds")
        state = self.world.first(load_checkpoint(path, ("model", "optimizer", *progress)) if first else None)
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.micro_batches = state["step"], state["micro_batches"]
        self.best, self.best_step = state["best"], state["best_step"]
        self.seconds, self.saved_step = state["seconds"], state["step"]
        print(f"resumed {path} at step {self.step} of {self.steps}", flush=True)
        self._note_changes(state)
        return state["validated"]

    def _note_changes(self, state: Mapping[str, Any]) -> None:
        """Say, and write into the run's config.json, what is not as it was when a checkpoint was written."""
        here, there = self._circumstances(), {"processes": "1"} | state
        of_run = [line for line in self.run.changes() if "threads" not in here or not line.startswith("threads:")]
        changes = of_run + differences({key: there.get(key, here[key]) for key in here}, here)
        if changes and self.world.writes:
            print(f"not bit for bit as without the interruption, as this has changed: {'; '.join(changes)}", flush=True)
            self.run.note([f"step {self.step}: {line}" for line in changes])

    def _leave_if_asked(self, validated: bool) -> None:
        """If a signal has arrived at any process, write a checkpoint and leave by the exception that belongs to it."""
        if number := self.world.most(self.stop.get("signal", 0)):
            self._save("last", validated)
            name = signal.Signals(number).name
            leave(number, f"stopped by {name} after step {self.step} of {self.steps}; a checkpoint was written")
