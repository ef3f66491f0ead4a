import numpy as np
import pytest
import torch

from workbench.datasets.frames import DataError
from workbench.gains import Gain, gain_db, gain_sentence


def test_gain_is_a_mean_over_clips_of_the_ratio_in_db() -> None:
    floor = torch.full((6,), 0.1)
    model = torch.tensor([0.01, 0.01, 0.01, 0.01, 0.1, 1.0])  # +10 dB in four samples of one clip, 0 and -10
    gain = gain_db(model, floor, np.array([0, 0, 0, 0, 1, 2]))
    assert gain.db == pytest.approx(0, abs=1e-6) and gain.share == pytest.approx(1 / 3) and gain.n_groups == 3
    assert gain.error == pytest.approx(10 / np.sqrt(3), rel=1e-5)
    exact = gain_db(np.zeros(2), np.array([1e-8, 0.0]), np.array([0, 1]))
    assert exact.db == pytest.approx(10)  # 20 and 0


def test_gains_of_no_errors_are_refused() -> None:
    for bad in (-1.0, np.nan):
        with pytest.raises(DataError, match="mse of a sample is below 0 or not a number"):
            gain_db(np.array([bad]), np.array([1.0]), np.array([0]))


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ([2.0, 2.1, 2.2], "LAQ beats copy-frame by 2.1 dB (3 of 3 seeds; 12 clips)"),
        ([2.0, 2.1, 0.1], "LAQ beats copy-frame by 1.4 dB (2 of 3 seeds; 12 clips)"),
        ([2.0, 0.1, -0.1], "LAQ is not distinguishable from copy-frame: +0.7 dB (ahead in 1 of 3 seeds; 12 clips)"),
        ([1.0, 1.0, -5.0], "LAQ is not distinguishable from copy-frame: -1.0 dB (ahead in 2 of 3 seeds; 12 clips)"),
        ([-1.0, -2.0], "LAQ falls short of copy-frame by 1.5 dB (2 of 2 seeds; 12 clips)"),
    ],
)
def test_the_sentence_of_gains_counts_the_seeds_that_agree(gains: list[float], sentence: str) -> None:
    assert gain_sentence({seed: Gain(db, 0.2, 0.9, 12) for seed, db in enumerate(gains)}) == sentence


def test_one_clip_decides_nothing() -> None:
    alone = gain_db(np.array([0.1]), np.array([1.0]), np.array([0]))
    assert gain_sentence({0: alone}) == "LAQ against copy-frame cannot be decided on one clip: +10.0 dB (1 seeds)"
