"""The training loop: exact resume, preemption, out-of-memory fallback, and what is logged.

Nothing in the loop is stateful but the checkpoint (model, optimizer, step, micro-batch count, best value):
batch order is a function of (seed, epoch), noise and dropout of (seed, step). So a run that was killed at any
instant and started again ends in the same weights, bit for bit, as one that was not. The conditions are the
same device, thread count and library versions, which config.json records.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn

from workbench.checkpoints import load_checkpoint, load_safetensors, load_weights, save_checkpoint, save_model
from workbench.config import Config
from workbench.datasets.loading import Batch, Dataset, batch_indices, read_ahead, to_device
from workbench.datasets.splits import mix
from workbench.logs import Log
from workbench.losses import linear_warmup
from workbench.plots import image_grid
from workbench.progress import Progress, write_status
from workbench.runs import Run

PREEMPTED_EXIT = 75
FIXED_SAMPLES = 8

Weights = Callable[[int], Mapping[str, float]]


class Preempted(SystemExit):
    """Training stopped on SIGTERM or SIGUSR1 after writing a checkpoint; leaves the process with exit code 75."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN; nothing of that step was kept."""


class TrainConfig(Config):
    """How a model is trained.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    seed: int = Field(0, ge=0)
    """Seed of the batch order and of all noise."""
    device: str = "auto"
    """`auto` (CUDA where present, else CPU), or a torch device such as `cuda:1`."""
    epochs: int = Field(1, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(64, ge=1)
    """Samples per optimizer step; an incomplete last batch of an epoch is left out."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of Adam in the first epoch."""
    lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate after every epoch."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it."""
    kl_weight: float = Field(1e-4, ge=0)
    """Weight of the KL in nats, against the error per element."""
    kl_warmup_steps: int = Field(0, ge=0)
    """Steps over which the KL weight rises linearly from 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: float32, or bfloat16 autocast."""
    channels_last: bool = True
    """Keep images channels-last in memory, which convolutions are faster on."""
    compile: bool = False
    """Compile the forward pass; pays after some thousand steps."""
    deterministic: bool = True
    """Only deterministic kernels: needed for bit-exact resume on CUDA."""
    log_every: int = Field(50, ge=1)
    """Steps between two rows of metrics.csv."""
    checkpoint_every: int = Field(5000, ge=1)
    """Steps between two checkpoints."""
    images_every: int = Field(5000, ge=1)
    """Steps between two pictures of the fixed validation samples."""


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; `auto` is CUDA where present.

    Raises:
        ValueError: a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: {torch.cuda.device_count()} CUDA devices are present; use 'auto' or 'cpu'")
    return device


def vae_weights(config: TrainConfig) -> Weights:
    """Weights of a VAE's terms at a step: 1 for the error, `kl_weight` with its warm-up for the KL."""
    return lambda step: {"mse": 1.0, "kl": config.kl_weight * linear_warmup(step, config.kl_warmup_steps)}


def draw_noise(seed: int, step: int, samples: int, noise_dim: int) -> Float[Tensor, "b d"]:
    """Standard normal noise for the whole batch of a step: a function of (seed, step) on every device."""
    return torch.randn(samples, noise_dim, generator=torch.Generator().manual_seed(mix(seed, 2, step)))


def seed_step(seed: int, step: int) -> None:
    """Set the default generators (dropout, augmentation) to a function of (seed, step)."""
    value = mix(seed, 1, step)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: Dataset, batch_size: int, precision: str = "fp32") -> dict[str, float]:
    """Mean of each loss term over a split, without noise, the model in evaluation mode.

    Args:
        model: On the device to use; its mode is left as it was.
        batch_size: Samples at a time; does not change the result beyond rounding.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    sums: dict[str, float] = {}
    blocks = (np.arange(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size))
    for indices, raw in read_ahead(dataset, blocks):
        with autocast(device, precision):
            terms = model.loss(dataset.prepare(to_device(raw, device)))
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
    model.train(was_training)
    return {name: value / len(dataset) for name, value in sums.items()}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def fit(
    model: nn.Module,
    kind: str,
    train: Dataset,
    val: Dataset,
    config: TrainConfig,
    run: Run,
    weights: Weights,
    picture: Callable[[Tensor, Tensor], Figure] | None = None,
) -> nn.Module:
    """Train into a run folder, from its last checkpoint where there is one; load the model if it is finished.

    Args:
        model: Freshly initialised from a fixed seed; `loss(batch)` gives named terms, `noise_dim` its noise.
        kind: Its key in `MODELS`.
        weights: Weight of each term at a step; terms without a weight are logged only.
        picture: Draws (x, x_hat) of the fixed validation samples; rows of images when None.

    Returns:
        The trained model in evaluation mode, on the training device.

    Raises:
        Preempted: SIGTERM or SIGUSR1 arrived; a checkpoint was written, and another `fit` goes on from it.
        KeyboardInterrupt: likewise after SIGINT.
        NonFiniteError: the loss or the gradient is not finite.
        RunError, CheckpointError: the folder is in use, is another model's, or is damaged.
    """
    run.record(model={"kind": kind} | model.config.model_dump())
    model.to(pick_device(config.device), memory_format=torch.channels_last if config.channels_last else None)
    if run.trained:
        load_weights(model, load_safetensors(run.path / "model.safetensors"), run.path / "model.safetensors")
        print(f"{run.path} holds a finished model of this configuration: loaded, not trained")
        return model.eval()
    with run.lock(), deterministic_kernels(config.deterministic), stop_signals() as stop:
        trainer = Trainer(model, train, val, config, run, weights, picture or _rows)
        try:
            trainer.train(stop)
        except BaseException as error:
            write_status("stopped", what="training", done=trainer.step, total=trainer.steps, reason=_reason(error))
            raise
        save_model(run.path / "model.safetensors", model, kind)
    return model.eval()


def _rows(x: Tensor, x_hat: Tensor) -> Figure:
    return image_grid({"original": x, "reconstruction": x_hat})


def _reason(error: BaseException) -> str:
    return f"({type(error).__name__})"


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Only deterministic kernels inside the block; the settings before are put back after it."""
    before, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    cudnn = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = cudnn


@contextmanager
def stop_signals() -> Iterator[dict[str, int]]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying from them; a second SIGINT interrupts at once.

    Yields:
        A dict that holds the number of the signal under "signal" once one has arrived. Outside the main thread,
        where Python allows no handlers, it stays empty.
    """
    arrived: dict[str, int] = {}

    def note(number: int, frame: Any) -> None:
        arrived["signal"] = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    ) -> None:
        if config.batch_size > len(train):
            raise ValueError(f"batch_size={config.batch_size}: must be at most {len(train)}, the training samples")
        self.model, self.train_set, self.val_set, self.config, self.run = model, train, val, config, run
        self.weights, self.picture = weights, picture
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        self.loss = torch.compile(model.loss) if config.compile else model.loss
        self.steps_per_epoch = len(train) // config.batch_size
        self.steps = config.epochs * self.steps_per_epoch
        self.step, self.micro_batches, self.best, self.seconds = 0, 1, math.inf, 0.0
        self.folder = run.path / "checkpoints"

    def train(self, stop: Mapping[str, int]) -> None:
        """Run from the last checkpoint, or from the start, to the last step."""
        self._resume()
        config, started = self.config, time.monotonic() - self.seconds
        indices = batch_indices(len(self.train_set), config.batch_size, config.seed, self.step)
        batches = read_ahead(self.train_set, islice(indices, self.steps - self.step))
        self.model.train()
        with (
            Log(self.run.path, self.step) as log,
            Progress(self.steps, "training", "step", self.step) as progress,
        ):
            for samples, raw in batches:
                row = self._train_step(samples, raw)
                self.seconds = time.monotonic() - started
                self._after_step(row, log, progress)
                if stop:
                    self._stop(stop["signal"])

    def _after_step(self, row: dict[str, Any], log: Log, progress: Progress) -> None:
        """Log, validate, draw and save what is due after the step just taken."""
        config, epoch = self.config, (self.step - 1) // self.steps_per_epoch
        left = self.steps - self.step
        speed = config.batch_size * (progress.n + 1 - progress.initial) / progress.seconds()
        terms = " ".join(f"{name} {row[name]:.4g}" for name in self.weights(0))
        progress.update(1, f"epoch {epoch + 1}/{config.epochs} {terms} {speed:.0f} samples/s")
        if self.step == 1 or self.step % config.log_every == 0 or left == 0:
            log.row(self.step, epoch + 1, "train", row | {"samples_per_s": speed, "seconds": self.seconds})
        if self.step % self.steps_per_epoch == 0 or left == 0:
            self._validate(log, epoch + 1)
        if self.step % config.images_every == 0 or left == 0:
            log.picture(self.step, self._reconstructions())
        if self.step % config.checkpoint_every == 0 or left == 0:
            self._save("last")

    def _train_step(self, samples: np.ndarray, raw: Batch) -> dict[str, float]:
        """One optimizer step on one batch; returns the unweighted terms, the loss and the gradient norm."""
        config, weights = self.config, self.weights(self.step)
        learning_rate = config.lr * config.lr_decay ** (self.step // self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
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
        return row | {f"{name}_weight": w for name, w in weights.items() if name != "mse"} | {"lr": learning_rate}

    def _gradient(self, batch: Batch, weights: Mapping[str, float], n: int) -> dict[str, Tensor]:
        """Gradient of the weighted loss over the batch, in micro-batches; twice as many when memory runs out."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        while True:
            try:
                return self._accumulate(batch, weights, n)
            except RuntimeError as error:
                if not _out_of_memory(error) or self.micro_batches >= n:
                    raise
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batches = min(2 * self.micro_batches, n)
            print(
                f"out of memory at step {self.step}: going on with {self.micro_batches} micro-batches per step; the "
                "gradient stays that of the whole batch, batch norm now sees the micro-batches",
                flush=True,
            )

    def _accumulate(self, batch: Batch, weights: Mapping[str, float], n: int) -> dict[str, Tensor]:
        seed_step(self.config.seed, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in torch.arange(n, device=self.device).chunk(self.micro_batches):
            micro = batch if len(part) == n else {key: value[part] for key, value in batch.items()}
            with autocast(self.device, self.config.precision):
                terms = self.loss(micro)
            share = len(part) / n
            sum(weight * share * terms[name] for name, weight in weights.items()).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + share * value.detach()
        return totals

    def _not_finite(self, row: Mapping[str, float], samples: np.ndarray) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in row.items())
        names = ", ".join(self.train_set.name(i) for i in samples[:FIXED_SAMPLES])
        more = f" and {len(samples) - FIXED_SAMPLES} more" if len(samples) > FIXED_SAMPLES else ""
        last = self.folder / "last.ckpt"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written yet"
        return (
            f"step {self.step} is not finite ({values}); its samples are {names}{more}; {good}. Look at these samples, "
            "lower lr, or use precision fp32, under another run name"
        )

    def _validate(self, log: Log, epoch: int) -> None:
        """Evaluate, log, and keep the best model by the loss at its final weights (after any warm-up)."""
        size = max(1, self.config.batch_size // self.micro_batches)
        terms = evaluate(self.model, self.val_set, size, self.config.precision)
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights(self.steps).items())
        log.row(self.step, epoch, "val", terms | {"seconds": self.seconds})
        if terms["loss"] < self.best:
            self.best = terms["loss"]
            self._save("best")

    @torch.inference_mode()
    def _reconstructions(self) -> Figure:
        """The fixed validation samples beside their reconstructions."""
        raw = self.val_set.batch(np.arange(min(FIXED_SAMPLES, len(self.val_set))))
        x = self.val_set.prepare(to_device(raw, self.device))["x"]
        self.model.eval()
        x_hat = self.model(x)
        self.model.train()
        return self.picture(x.cpu(), x_hat.float().cpu())

    def _save(self, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        progress = {
            "step": self.step,
            "micro_batches": self.micro_batches,
            "best": self.best,
            "seconds": self.seconds,
        }
        save_checkpoint(self.folder / f"{name}.ckpt", state | progress)

    def _resume(self) -> None:
        path = self.folder / "last.ckpt"
        if not path.exists():
            return
        state = load_checkpoint(path)
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.micro_batches = state["step"], state["micro_batches"]
        self.best, self.seconds = state["best"], state["seconds"]
        print(f"resumed {path} at step {self.step} of {self.steps}", flush=True)

    def _stop(self, number: int) -> None:
        """Write a checkpoint and leave, by the exception that belongs to the signal."""
        self._save("last")
        place = (
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.steps}; a checkpoint was written"
        )
        print(place, flush=True)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(f"{place}: run it again to go on")
        raise Preempted(PREEMPTED_EXIT)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
