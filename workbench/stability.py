"""How steadily a training went, from its metrics.csv."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from workbench.datasets.frames import DataError

LAST_SHARE = 1 / 3
SPIKE = 3.0
SPIKE_WINDOW = 20  # logged norms
FIRST_JUDGED = 5
CLOSE = 0.05


@dataclass(frozen=True)
class Stability:
    """What a training's log says of its course.

    Args:
        loss_spread: Standard deviation of the logged training loss about its straight line over the last third of the
            steps, as a share of its mean there: a loss that falls evenly has none. NaN below 3 logged losses there.
        gradient_spikes: Logged gradient norms above 3 times the median of the 20 logged before them, from the 6th on.
        epochs_to_best: First epoch whose validation loss is within 5 % of the lowest.
    """

    loss_spread: float
    gradient_spikes: int
    epochs_to_best: int


def stability(log: pd.DataFrame) -> Stability:
    """Figures of stability of one run.

    Compare only runs that were logged equally often, with batches of one size: a logged loss is that of one batch.

    Args:
        log: Rows of metrics.csv, with the columns step, epoch, split, loss, grad_norm.

    Raises:
        DataError: a column is missing, a figure is not finite, or there was no validation.
    """
    missing = [name for name in ("step", "epoch", "split", "loss", "grad_norm") if name not in log]
    if missing:
        raise DataError(f"metrics.csv without {', '.join(missing)}: must have these columns; give a training's own log")
    train, val = (log[log["split"] == split] for split in ("train", "val"))
    for name, rows in (("train", train), ("val", val)):
        if rows.empty:
            raise DataError(f"metrics.csv has 0 rows of split {name}: must have at least 1; finish an epoch")
    _check_finite(train, ("loss", "grad_norm"))
    _check_finite(val, ("loss",))
    spikes = gradient_spikes(train["grad_norm"].to_numpy(float))
    return Stability(
        loss_spread=loss_spread(train["step"].to_numpy(float), train["loss"].to_numpy(float)),
        gradient_spikes=int(spikes.sum()),
        epochs_to_best=epochs_to_best(val["epoch"].to_numpy(int), val["loss"].to_numpy(float)),
    )


def loss_spread(step: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> float:
    """Standard deviation of a loss about its straight line over the last third of the steps, over its mean there."""
    last = step > step.max() * (1 - LAST_SHARE)
    step, loss = step[last], loss[last]
    if len(loss) < 3:
        return float("nan")
    centred, deviation = step - step.mean(), loss - loss.mean()
    residual = deviation - centred * (centred @ deviation) / (centred @ centred)
    return float(np.sqrt(residual @ residual / (len(loss) - 2)) / loss.mean())


def gradient_spikes(norms: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " judged"]:
    """Which norms, after the first 5, are above 3 times the median of the up to 20 before them."""
    judged = range(FIRST_JUDGED, len(norms))
    return np.array([norms[i] > SPIKE * np.median(norms[max(0, i - SPIKE_WINDOW) : i]) for i in judged], bool)


def epochs_to_best(epoch: Int[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> int:
    """First epoch whose loss exceeds the lowest by at most 5 % of it."""
    best = loss.min()
    return int(epoch[np.argmax(loss <= best + CLOSE * abs(best))])


def _check_finite(rows: pd.DataFrame, names: tuple[str, ...]) -> None:
    for name in names:
        wrong = rows[~np.isfinite(rows[name].to_numpy(float))]
        if len(wrong):
            row = wrong.iloc[0]
            raise DataError(
                f"metrics.csv at step {row['step']} ({row['split']}): {name}={row[name]}: must be finite; "
                "leave this run out, or train it again with a lower lr"
            )
