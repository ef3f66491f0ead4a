import numpy as np
import pytest
import torch

from workbench.datasets.frames import DataError
from workbench.rate_distortion import RatePoint, code_entropy, laq_bits, rate_distortion_table, vae_bits


def point(method: str, setting: str, bits: float, error: float, given: bool = False) -> RatePoint:
    return RatePoint(method, setting, "KL", bits, error, given_first_frame=given)


def test_a_nat_is_1_44_bits() -> None:
    assert vae_bits(np.log(8)) == pytest.approx(3) and vae_bits(0.0) == 0
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(DataError, match=f"kl_nats={bad}: must be a finite number of at least 0"):
            vae_bits(bad)


def test_a_word_costs_its_length_times_the_logarithm_of_the_codebook() -> None:
    assert laq_bits(4, 8) == 12 and laq_bits(1, 10) == pytest.approx(np.log2(10))
    with pytest.raises(DataError, match="code_seq_len=4, codebook_size=1: must be at least 1 and 2"):
        laq_bits(4, 1)


def test_entropy_of_words_is_joint_where_samples_suffice() -> None:
    """Two positions that always agree: 3 bits together, 3 each."""
    indices = torch.arange(80).remainder(8)[:, None].expand(80, 2)
    entropy = code_entropy(indices, 8)
    assert entropy.estimate == "joint" and entropy.bits == pytest.approx(3)
    entropy = code_entropy(indices[:72], 8)
    assert entropy.estimate == "sum of positions" and entropy.bits == pytest.approx(6)


def test_entropy_is_at_most_the_bits_of_the_words() -> None:
    indices = np.random.default_rng(0).integers(0, 8, (300, 4))
    entropy = code_entropy(indices, 8)
    assert entropy.estimate == "sum of positions" and 11.8 < entropy.bits < laq_bits(4, 8)
    with pytest.raises(DataError, match="index 8 of a codebook of 8"):
        code_entropy(indices + 1, 8)


def test_the_table_keeps_the_methods_order_and_sorts_their_bits() -> None:
    table = rate_distortion_table(
        [point("VAE", "b", 30, 0.1), point("LAQ", "", 12, 0.2, given=True), point("VAE", "a", 10, 0.3)]
    )
    assert table["method"].tolist() == ["VAE", "VAE", "LAQ"] and table["bits"].tolist() == [10, 30, 12]
    assert {"setting", "rate", "error", "error_se", "given_first_frame", "dominated"} <= set(table)


def test_points_are_dominated_within_their_task_only() -> None:
    table = rate_distortion_table(
        [
            point("VAE", "a", 10, 0.3),
            point("VAE", "b", 20, 0.3),  # more bits, no less error
            point("VAE", "c", 30, 0.1),
            point("twin", "a", 10, 0.3),  # of equals neither is
            point("LAQ", "", 5, 0.05, given=True),  # better than all, at another task
        ]
    )
    assert table["dominated"].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows hold 0 points"),
        ([point("VAE", "a", np.nan, 0.1)], r"VAE \(a\): nan bits with error 0.1: must be finite and at least 0"),
        ([point("VAE", "a", 1, -0.1)], r"VAE \(a\): 1 bits with error -0.1"),
        ([point("VAE", "a", 1, 0.1), point("VAE", "a", 2, 0.1)], r"VAE \(a, KL\) is given twice"),
    ],
)
def test_points_that_are_none_are_refused(rows: list[RatePoint], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rate_distortion_table(rows)
