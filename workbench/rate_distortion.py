"""Bits per frame of continuous and discrete codes, in one table with the error they reach.

The bits of a VAE are its KL to the prior: what a frame costs on average with bits-back coding. The bits of discrete
codes are their length times log2 of the codebook, or less where some codes are rarer than others: their entropy.
All leave the decoder's own size out.

Source: Alemi et al. 2018, Fixing a broken ELBO (KL as the rate of a VAE).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from workbench.datasets.frames import DataError
from workbench.information import Indices, check_indices, code_words, entropy_bits

SAMPLES_PER_WORD = 10  # keeps the bias of the joint entropy, about (words - 1) / (2 n ln 2), under 0.08 bits


def vae_bits(kl_nats: int | float) -> float:
    """KL per frame, in nats, as bits; a DataError unless it is a number of at least 0."""
    if not 0 <= kl_nats < np.inf:
        raise DataError(f"kl_nats={kl_nats}: must be a finite number of at least 0; give the unweighted KL per frame")
    return kl_nats / np.log(2).item()


def laq_bits(code_seq_len: int, codebook_size: int) -> float:
    """Bits of a word of `code_seq_len` indices when every word is written at the same length."""
    if code_seq_len < 1 or codebook_size < 2:
        raise DataError(
            f"code_seq_len={code_seq_len}, codebook_size={codebook_size}: must be at least 1 and 2; give the model's"
        )
    return code_seq_len * np.log2(codebook_size).item()


@dataclass(frozen=True)
class CodeEntropy:
    """Entropy of the words of codes in bits, and how it was found: "joint", or "sum of positions"."""

    bits: float
    estimate: str


def code_entropy(indices: Indices, codebook_size: int) -> CodeEntropy:
    """Entropy of code words among the samples: what they cost on average under the best code for each.

    Joint, from the frequencies of whole words, where there are at least 10 samples for every word seen; otherwise the
    sum of the entropies of the positions, an upper bound of it that few samples can give.
    """
    values = check_indices(indices, codebook_size)
    words = code_words(values, codebook_size)
    if len(values) >= SAMPLES_PER_WORD * len(np.unique(words)):
        return CodeEntropy(entropy_bits(words), "joint")
    return CodeEntropy(sum(entropy_bits(position) for position in values.T), "sum of positions")


@dataclass(frozen=True)
class RatePoint:
    """One method at one setting.

    Args:
        method: Name, the same over a sweep of settings.
        setting: What the points of a method differ in, for example "kl_weight 0.01".
        rate: What the bits are: "KL", "length × log2(codebook)", "entropy (joint)", "none".
        bits: Per frame; 0 for floors that send nothing.
        error: On held-out frames, the mean over clips.
        error_se: Its standard error over clips; NaN where unknown.
        given_first_frame: Whether the decoder sees the first frame for nothing, as that of LAQ does and a VAE's does
            not: two tasks, to be told apart wherever the points stand together.
    """

    method: str
    setting: str
    rate: str
    bits: int | float
    error: int | float
    error_se: int | float = float("nan")
    given_first_frame: bool = False


def rate_distortion_table(rows: Sequence[RatePoint]) -> pd.DataFrame:
    """The points in the order of their methods, then of their bits.

    Returns:
        The columns of `RatePoint`, and `dominated`: another point of the same task (`given_first_frame`) has no more
        bits and no more error, and less of one.

    Raises:
        DataError: no points, two of the same method, setting and rate, or bits or an error that is not a number of at
            least 0.
    """
    table = pd.DataFrame([asdict(row) for row in rows])
    if table.empty:
        raise DataError("rows hold 0 points: a rate-distortion table needs at least 1; add a method")
    for row in table.itertuples():
        if not (0 <= row.bits < np.inf and 0 <= row.error < np.inf):
            raise DataError(
                f"{row.method} ({row.setting}): {row.bits} bits with error {row.error}: must be finite and at least 0; "
                "leave the point out, or evaluate it again"
            )
    twice = table[table.duplicated(["method", "setting", "rate"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(f"{row['method']} ({row['setting']}, {row['rate']}) is given twice: must be once; keep one")
    rank = table["method"].map({name: i for i, name in enumerate(table["method"].unique())})
    table = table.assign(rank=rank).sort_values(["rank", "bits"], kind="stable", ignore_index=True)
    return table.drop(columns="rank").assign(dominated=_dominated(table))


def _dominated(table: pd.DataFrame) -> np.ndarray:
    bits, error, task = (table[name].to_numpy() for name in ("bits", "error", "given_first_frame"))
    no_more = (bits <= bits[:, None]) & (error <= error[:, None]) & (task == task[:, None])
    less = (bits < bits[:, None]) | (error < error[:, None])
    return (no_more & less).any(1)
