import math

import numpy as np
import pandas as pd
import pytest

from workbench.datasets.frames import DataError
from workbench.stability import epochs_to_best, gradient_spikes, loss_spread, stability


def log(losses: list[float], norms: list[float], val: list[float]) -> pd.DataFrame:
    """metrics.csv of a training with a row at every step and a validation after equal shares of them."""
    per_epoch = len(losses) // len(val)
    train = [
        {"step": i, "epoch": (i - 1) // per_epoch + 1, "split": "train", "loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    valid = [{"step": i * per_epoch, "epoch": i, "split": "val", "loss": loss} for i, loss in enumerate(val, 1)]
    return pd.DataFrame(train + valid).sort_values("step", kind="stable", ignore_index=True)


# --- spread of the loss ---


def test_an_even_fall_has_no_spread_and_what_came_before_has_no_say() -> None:
    step = np.arange(1.0, 31)
    loss = np.where(step > 20, 5 - 0.1 * step, 100 * np.sin(step))
    assert loss_spread(step, loss) == pytest.approx(0, abs=1e-12)
    loss[20] += 1
    assert loss_spread(step, loss) > 0.1


@pytest.mark.parametrize("slope", [0.0, -0.02])
@pytest.mark.parametrize("interval", [1, 10])
def test_the_spread_of_a_pattern_about_a_line_has_a_closed_form(slope: float, interval: int) -> None:
    """+c, -c, -c, +c holds no line, so its residual is itself: 8 c^2 over 8 - 2 degrees of freedom."""
    step = interval * np.arange(1.0, 25)
    pattern = 0.3 * np.tile([1.0, -1, -1, 1], 6)
    loss = 2 + slope * (step - step[16:].mean()) + pattern
    assert loss_spread(step, loss) == pytest.approx(0.3 * math.sqrt(8 / 6) / 2)
    assert loss_spread(step, 7 * loss) == pytest.approx(loss_spread(step, loss)), "it is a share of the mean"


def test_two_logged_losses_have_no_spread_to_speak_of() -> None:
    assert math.isnan(loss_spread(np.arange(1.0, 7), np.ones(6)))
    assert loss_spread(np.arange(1.0, 10), np.ones(9)) == 0


# --- spikes of the gradient ---


def test_spikes_are_three_times_the_median_before_them() -> None:
    norms = np.ones(40)
    norms[[10, 20, 30]] = 3.0, 3.1, 50.0
    assert (np.flatnonzero(gradient_spikes(norms)) + 5).tolist() == [20, 30]


def test_the_first_norms_are_not_judged_and_the_median_is_of_recent_ones() -> None:
    norms = np.array([1.0, 1, 1, 1, 100, 1, 1])
    assert gradient_spikes(norms).tolist() == [False, False]
    later = np.array([10.0] * 50 + [1.0] * 20 + [5.0])
    assert gradient_spikes(later)[-1] and not gradient_spikes(later)[:-1].any()
    assert len(gradient_spikes(np.ones(3))) == 0


# --- how soon ---


def test_the_first_epoch_within_five_percent_of_the_best() -> None:
    epoch = np.arange(1, 7)
    assert epochs_to_best(epoch, np.array([3.0, 1.06, 1.05, 1.2, 1.0, 1.01])) == 3
    assert epochs_to_best(epoch, np.array([1.0, 2, 3, 4, 5, 6])) == 1
    assert epochs_to_best(epoch, np.array([-1.0, -1.8, -1.95, -2, -1, -1])) == 3


# --- a whole log ---


def test_figures_of_a_log() -> None:
    losses, norms = [4.0] * 20 + [2.0] * 10, [1.0] * 25 + [4.0] + [1.0] * 4
    found = stability(log(losses, norms, [1.5, 1.04, 1.0]))
    assert found.loss_spread == 0
    assert found.gradient_spikes == 1
    assert found.epochs_to_best == 2


def test_a_log_on_disk_reads_the_same(tmp_path) -> None:
    table = log([3.0 + i % 3 for i in range(12)], [1.0] * 12, [2.0, 1.0])
    table.to_csv(tmp_path / "metrics.csv", index=False)
    assert stability(pd.read_csv(tmp_path / "metrics.csv")) == stability(table)


def test_logs_that_cannot_be_judged_are_refused() -> None:
    table = log([1.0] * 6, [1.0] * 6, [1.0, 1.0])
    with pytest.raises(DataError, match="metrics.csv without epoch, grad_norm: must have these columns"):
        stability(table.drop(columns=["epoch", "grad_norm"]))
    with pytest.raises(DataError, match="0 rows of split val: must have at least 1; finish an epoch"):
        stability(table[table["split"] == "train"])
    for column, split in (("loss", "val"), ("grad_norm", "train")):
        broken = table.copy()
        broken.loc[(broken["split"] == split) & (broken["step"] == 6), column] = np.nan
        with pytest.raises(DataError, match=rf"metrics.csv at step 6 \({split}\): {column}=nan: must be finite"):
            stability(broken)
