"""Hash-based splits and the one integer hash that everything seeded is derived from.

A sample's side depends on its group's name and the seed alone, so that adding data moves no old sample.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

SPLITS = ("train", "val", "test")
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers into one of 63 bits, so that it seeds any generator: splitmix64 over the values in turn.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def mix_array(values: np.ndarray, *more: np.ndarray | int) -> np.ndarray:
    """`mix` of each row of arrays of integers; `mix_array(a, 3)[i] == mix(a[i], 3)`.

    Returns:
        int64 array of the same length, every value non-negative.
    """
    state = np.zeros(len(values), np.uint64)
    with np.errstate(over="ignore"):
        for value in (values, *more):
            state = (state ^ _as_uint64(value)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)


def _as_uint64(value: np.ndarray | int) -> np.ndarray | np.uint64:
    return np.uint64(value & _MASK) if isinstance(value, int) else value.astype(np.uint64)


def stable_hash(names: Iterable[str | bytes]) -> np.ndarray:
    """A non-negative 63-bit hash of each name: the same on every machine and in every process."""
    digests = (hashlib.blake2b(n.encode() if isinstance(n, str) else n, digest_size=8).digest() for n in names)
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)


def digest_of(names: Sequence[str], values: np.ndarray) -> str:
    """Hash of the names and values of some columns."""
    digest = hashlib.blake2b(repr(list(names)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


def hash_split(groups: np.ndarray, seed: int, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Assign each group to train (0), val (1) or test (2).

    Args:
        groups: Stable integer hash of each group, int64.
        seed: Another seed gives another, independent split.
        val_fraction: Expected share of groups in the validation split.
        test_fraction: Expected share of groups in the test split.

    Returns:
        int8 array of the same length; equal groups get equal values.

    Raises:
        ValueError: a fraction is negative, or nothing would be left to train on.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: must not be negative and must sum to "
            "less than 1, or nothing is left to train on"
        )
    u = mix_array(groups, seed) / 2.0**63
    split = np.zeros(len(groups), np.int8)
    split[u < val_fraction + test_fraction] = 2
    split[u < val_fraction] = 1
    return split
