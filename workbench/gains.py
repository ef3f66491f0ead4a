"""Gains of a model over a floor in dB, clip by clip, in numbers and words.

Samples of one clip resemble each other, so the clip (group) is the unit: standard errors are over clips.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import t
from torch import Tensor

from workbench.datasets.frames import DataError
from workbench.information import Whole, array_of, matching

Errors = Float[np.ndarray, " _"] | Float[Tensor, " _"]  # `matching` says where lengths differ

LEAST_MSE = 1e-10  # an exact prediction counts as this one, as in `comparison.copy_frame_errors`


@dataclass(frozen=True)
class Gain:
    """Mean gain over a floor: the mean over clips of the mean over each clip's samples.

    Args:
        db: 10 log10(floor's error / model's error) in dB, above 0 where the model is better; the difference in PSNR.
        error: Standard error over clips in dB; NaN for one clip.
        share: Clips with a gain above 0, as a share.
        n_groups: Clips.
    """

    db: float
    error: float
    share: float
    n_groups: int


def gain_db(mse_model: Errors, mse_floor: Errors, groups: Whole) -> Gain:
    """Gain of a model over a floor on the same samples; errors below 1e-10 count as 1e-10.

    Args:
        mse_model, mse_floor: Mean squared error of each sample (n,).
        groups: Clip of each sample.
    """
    model = array_of(mse_model).astype(float)
    floor, clip = matching("mse_floor", mse_floor, len(model)), matching("groups", groups, len(model))
    if not all((values >= 0).all() for values in (model, floor)):  # also true of NaN
        raise DataError("mse of a sample is below 0 or not a number: must be a squared error; check the predictions")
    gain = 10 * np.log10(np.maximum(floor, LEAST_MSE) / np.maximum(model, LEAST_MSE))
    of_clip = pd.Series(gain).groupby(clip).mean()
    return Gain(float(of_clip.mean()), float(of_clip.sem()), float((of_clip > 0).mean()), len(of_clip))


def gain_sentence(gains: Mapping[int, Gain], model: str = "LAQ", floor: str = "copy-frame") -> str:
    """ "LAQ beats copy-frame by 2.1 dB (3 of 3 seeds)": the mean over training seeds and the seeds that agree.

    The number of clips follows. A seed is for or against the model where a 95 % interval of Student's t over its clips
    leaves 0 out; the sentence needs more than half of the seeds for either, and a mean gain of that sign.
    """
    mean, clips = float(np.mean([gain.db for gain in gains.values()])), min(gain.n_groups for gain in gains.values())
    reach = {seed: t.ppf(0.975, gain.n_groups - 1) * gain.error for seed, gain in gains.items() if gain.n_groups > 1}
    won = sum(gains[seed].db > half for seed, half in reach.items())
    lost = sum(gains[seed].db < -half for seed, half in reach.items())
    if clips < 2:
        return f"{model} against {floor} cannot be decided on one clip: {mean:+.1f} dB ({len(gains)} seeds)"
    if mean > 0 and 2 * won > len(gains):
        return f"{model} beats {floor} by {mean:.1f} dB ({won} of {len(gains)} seeds; {clips} clips)"
    if mean < 0 and 2 * lost > len(gains):
        return f"{model} falls short of {floor} by {-mean:.1f} dB ({lost} of {len(gains)} seeds; {clips} clips)"
    ahead = f"(ahead in {won} of {len(gains)} seeds; {clips} clips)"
    return f"{model} is not distinguishable from {floor}: {mean:+.1f} dB {ahead}"
