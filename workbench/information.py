"""What discrete codes hold: their use of the codebook, and their information about labels in bits.

Samples of one clip resemble each other, so permutation tests move labels between clips (groups).

Sources:
    Miller 1955, Note on the bias of information estimates (the Miller-Madow correction).
    Phipson & Smyth 2010, Permutation p-values should never be zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from workbench.datasets.frames import DataError

Indices = Integer[np.ndarray, "n length"] | Integer[Tensor, "n length"]
Whole = Integer[np.ndarray, " _"] | Integer[Tensor, " _"]  # `matching` says where lengths differ
Labels = Shaped[np.ndarray, " _"] | Integer[Tensor, " _"]

COLLAPSED = 0.95  # share of samples at one entry
SIGNIFICANT = 0.05


# --- codes ---


def check_indices(indices: Indices, codebook_size: int) -> Integer[np.ndarray, "n length"]:
    """Indices as an array on the CPU; a DataError where there are none, or one is no entry of the codebook."""
    values = array_of(indices)
    if values.size == 0:
        raise DataError(f"indices of shape {values.shape}: must hold at least one sample; check the split")
    outside = values[(values < 0) | (values >= codebook_size)]
    if outside.size:
        raise DataError(
            f"index {outside.flat[0]} of a codebook of {codebook_size}: must be from 0 to {codebook_size - 1}; "
            "give the codebook_size that the codes were made with"
        )
    return values


def code_words(indices: Indices, codebook_size: int) -> Integer[np.ndarray, " n"]:
    """One whole number for each sample's word of indices, equal where the words are.

    The digits of the number to base `codebook_size`, the first position leading, where 63 bits hold every word;
    otherwise the rank of the word among those given, which means nothing in another call.
    """
    values = check_indices(indices, codebook_size)
    length = values.shape[1]
    if codebook_size**length <= 2**63:
        return values.astype(np.int64) @ np.array([codebook_size**i for i in reversed(range(length))], np.int64)
    return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def one_hot_codes(indices: Indices, codebook_size: int) -> Float[np.ndarray, "n _"]:
    """Codes as features of a probe: position by position, 1 at the entry chosen and 0 elsewhere."""
    values = check_indices(indices, codebook_size)
    return np.eye(codebook_size)[values].reshape(len(values), -1)


def perplexity(indices: Indices, codebook_size: int) -> Float[np.ndarray, " length"]:
    """2^entropy of the entries chosen at each position: 1 where it is always the same, at most `codebook_size`."""
    return np.array([2.0 ** entropy_bits(position) for position in check_indices(indices, codebook_size).T])


def codebook_use(indices: Indices, codebook_size: int) -> float:
    """Share of the codebook's entries that some sample chooses at some position."""
    return len(np.unique(check_indices(indices, codebook_size))) / codebook_size


def collapse_sentence(indices: Indices, codebook_size: int) -> str:
    """Whether the codes have collapsed, in words and numbers: a position has where one entry takes over 95 %."""
    values = check_indices(indices, codebook_size)
    n, length = values.shape
    shares = np.array([np.bincount(position).max() / n for position in values.T])
    words, counts = np.unique(values, axis=0, return_counts=True)
    use = (
        f"{len(words)} code words in {n} samples, {codebook_use(values, codebook_size):.0%} of the {codebook_size} "
        f"entries used, perplexity {perplexity(values, codebook_size).mean():.2f} per position"
    )
    dead = int((shares > COLLAPSED).sum())
    if dead == length:
        word = "-".join(str(entry) for entry in words[counts.argmax()])
        return f"collapsed to one code: {word} in {counts.max() / n:.1%} of the samples; {use}"
    if dead:
        return f"partly collapsed: one entry takes over {COLLAPSED:.0%} at {dead} of {length} positions; {use}"
    return f"not collapsed: no entry takes more than {shares.max():.1%} at any position; {use}"


# --- information ---


def entropy_bits(codes: Labels, miller_madow: bool = False) -> float:
    """Entropy of discrete values, from their frequencies among the samples.

    Args:
        codes: One value per sample.
        miller_madow: Add (values seen - 1) / (2 n ln 2), the leading term of what few samples leave out.
    """
    return _entropy(np.unique(array_of(codes), return_counts=True)[1], miller_madow)


def mutual_information(codes: Whole, labels: Labels, miller_madow: bool = False) -> float:
    """Mutual information of code word and label in bits, from their frequencies among the samples.

    The plain estimate is too large: for independent ones by about (codes - 1)(labels - 1) / (2 n ln 2), more than a
    bit where words are many. `permutation_test` measures that. The correction of Miller and Madow, applied to all
    three entropies, removes its leading term; it may leave a value below 0.
    """
    counts = _contingency(*_both(codes, labels))
    return _information(counts, miller_madow)


class PermutationTest(NamedTuple):
    """Plain mutual information, its p-value, and its mean under permuted labels, which is what chance gives."""

    bits: float
    p: float
    chance_bits: float


def permutation_test(
    codes: Whole, labels: Labels, groups: Whole, permutations: int = 999, seed: int = 0
) -> PermutationTest:
    """Whether codes and labels depend on each other, by moving labels between clips.

    Labels that are constant within each clip are permuted among all clips; others as whole sequences, in the order of
    the samples, among clips of equally many samples. Both hold the resemblance within clips fixed.
    p = (1 + permutations with at least the information observed) / (1 + permutations).

    Raises:
        DataError: arrays of different lengths, one clip, or labels that vary within clips of which no two are
            equally long.
    """
    word, label = _both(codes, labels)
    clip = np.unique(matching("groups", groups, len(word)), return_inverse=True)[1]
    shuffle = _shuffler(label, clip, np.random.default_rng(seed))
    observed = _information(_contingency(word, label))
    chance = np.array([_information(_contingency(word, shuffle())) for _ in range(permutations)])
    p = (1 + int((chance >= observed - 1e-9).sum())) / (1 + permutations)
    return PermutationTest(observed, p, float(chance.mean()))


def _shuffler(label: np.ndarray, clip: np.ndarray, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """Draws permutations of labels between clips."""
    sizes = np.bincount(clip)
    if len(sizes) < 2:
        raise DataError("groups hold 1 clip: a permutation between clips needs at least 2; use more clips")
    of_clip = label[np.unique(clip, return_index=True)[1]]
    if (of_clip[clip] == label).all():
        return lambda: rng.permutation(of_clip)[clip]
    order = np.argsort(clip, kind="stable")
    blocks = [order[np.isin(clip[order], np.flatnonzero(sizes == n))].reshape(-1, n) for n in np.unique(sizes)]
    if max(len(block) for block in blocks) < 2:
        raise DataError(
            f"labels vary within clips, and all {len(sizes)} clips differ in length: none can change places; "
            "take equally many samples from each clip"
        )

    def shuffled() -> np.ndarray:
        moved = label.copy()
        for block in blocks:
            moved[block] = label[rng.permutation(block)]
        return moved

    return shuffled


def _both(codes: Whole, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Codes and labels, each numbered from 0."""
    values = array_of(codes)
    labels = matching("labels", labels, len(values))
    return tuple(np.unique(column, return_inverse=True)[1] for column in (values, labels))


def _contingency(word: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How often each word goes with each label: (words, labels)."""
    n_labels = label.max() + 1
    counts = np.bincount(word * n_labels + label, minlength=(word.max() + 1) * n_labels)
    return counts.reshape(-1, n_labels)


def _information(counts: np.ndarray, miller_madow: bool = False) -> float:
    terms = (counts.sum(1), counts.sum(0), counts.ravel())
    of_word, of_label, joint = (_entropy(term[term > 0], miller_madow) for term in terms)
    information = of_word + of_label - joint
    return information if miller_madow else max(information, 0.0)  # rounding


def _entropy(counts: np.ndarray, miller_madow: bool) -> float:
    n = counts.sum()
    plain = np.log2(n) - (counts * np.log2(counts)).sum() / n
    return float(plain + (len(counts) - 1) / (2 * n * np.log(2)) * miller_madow)


def action_sentence(
    mi_bits: int | float,
    label_entropy_bits: int | float,
    p: int | float,
    chance_bits: int | float | None = None,
    label: str = "the action",
) -> str:
    """ "codes carry 0.9 of 3.0 bits about the action (p = 0.001)"; that they carry none where p is above 0.05.

    Args:
        mi_bits: `PermutationTest.bits`.
        chance_bits: `PermutationTest.chance_bits`: taken off the information, and both numbers then stand in the
            brackets. Give it wherever words are many beside the samples.
    """
    beyond = mi_bits if chance_bits is None else max(mi_bits - chance_bits, 0.0)
    carried = f"{beyond:.1f}" if beyond >= 0.1 else f"{beyond:.2f}"
    counted = "" if chance_bits is None else f"; {mi_bits:.2f} as counted less {chance_bits:.2f} under permuted labels"
    numbers = f"{carried} of {label_entropy_bits:.1f} bits"
    if p > SIGNIFICANT:
        return f"codes carry no detectable information about {label}: {numbers} (p = {p:.2g}{counted})"
    return f"codes carry {numbers} about {label} (p = {p:.2g}{counted})"


def array_of(values: Shaped[np.ndarray, "..."] | Tensor) -> np.ndarray:
    """Values as an array on the CPU."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def matching(name: str, values: Shaped[np.ndarray, "..."] | Tensor, n: int) -> np.ndarray:
    """Values as an array on the CPU; a DataError where they are not n, one per sample."""
    values = array_of(values)
    if len(values) != n:
        raise DataError(f"{name} of {len(values)} samples beside {n}: must be equally many; take them from one split")
    return values
