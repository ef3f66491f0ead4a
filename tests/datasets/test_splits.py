import subprocess
import sys

import numpy as np
import pytest

from workbench.datasets.splits import SPLITS, hash_split, mix, mix_array, stable_hash

GROUPS = stable_hash(str(i) for i in range(20_000))
INTEGERS = [0, 1, -1, 7, 2**31, -(2**40), 2**63 - 1, -(2**63)]


# The numbers that follow may never change: data order, noise and splits of every past run rest on them.


@pytest.mark.parametrize(
    "values, expected",
    [
        ((), 0),
        ((0,), 0xE220A8397B1DCDAF >> 1),  # first number of the published splitmix64 seeded with 0
        ((1,), 5225608189600411232),
        ((1, 2), 6804074658870690613),
        ((2, 1), 8085905411993364802),
        ((-1, 7, 3), 3419779109952231948),
    ],
)
def test_mix_never_changes(values, expected):
    assert mix(*values) == expected


def test_hashes_of_names_never_change():
    expected = [1702698405120146464, 4226560797588928834, 7951282866530079772, 555299668100379892]
    assert stable_hash(["a", "b", "clip_00001", "grün"]).tolist() == expected


def test_splits_never_change():
    groups = stable_hash(f"clip_{i:05d}" for i in range(20))
    assert hash_split(groups, 0, 0.2, 0.2).tolist() == [0] * 8 + [2, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0]
    assert hash_split(groups, 1, 0.2, 0.2).tolist() == [1, 0, 0, 2, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]


def test_another_process_hashes_alike():
    code = "from workbench.datasets.splits import stable_hash; print(stable_hash(['clip_00001'])[0])"
    out = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    assert int(out.stdout) == 7951282866530079772


# mix


@pytest.mark.parametrize("more", [(), (3,), (-1, 2**62)])
def test_mix_array_is_mix_of_each_row(more):
    values = np.array(INTEGERS, np.int64)
    assert mix_array(values, *more).tolist() == [mix(value, *more) for value in INTEGERS]
    assert mix_array(values, values[::-1]).tolist() == [
        mix(*pair) for pair in zip(INTEGERS, INTEGERS[::-1], strict=True)
    ]
    assert mix_array(np.array([5, -1], np.int32), 3).tolist() == [mix(5, 3), mix(-1, 3)]


def test_mixed_values_seed_any_generator():
    mixed = mix_array(np.arange(10_000))
    assert mixed.dtype == np.int64 and mixed.min() >= 0 and len(set(mixed.tolist())) == 10_000
    assert abs((mixed / 2.0**63).mean() - 0.5) < 4 / np.sqrt(12 * 10_000)


def test_the_order_of_values_matters():
    assert len({mix(1, 2), mix(2, 1), mix(1), mix(2), mix(1, 2, 0), mix(0, 1, 2)}) == 6


# names


def test_names_and_their_bytes_hash_alike_and_apart():
    assert stable_hash([b"a", "grün".encode()]).tolist() == stable_hash(["a", "grün"]).tolist()
    assert len(set(GROUPS.tolist())) == len(GROUPS) and GROUPS.min() >= 0 and GROUPS.dtype == np.int64
    assert stable_hash([]).shape == (0,)


# splits


@pytest.mark.parametrize("val, test", [(0.1, 0.1), (0.3, 0.0), (0.0, 0.25), (0.02, 0.5)])
def test_shares_are_as_asked_for(val, test):
    split = hash_split(GROUPS, 0, val, test)
    for number, share in enumerate((1 - val - test, val, test)):
        sigma = np.sqrt(len(GROUPS) * share * (1 - share))
        assert abs((split == number).sum() - len(GROUPS) * share) <= 4 * sigma
    assert SPLITS == ("train", "val", "test")


def test_equal_groups_fall_on_the_same_side():
    split = hash_split(np.repeat(GROUPS[:500], 4), 3, 0.2, 0.2).reshape(500, 4)
    assert (split == split[:, :1]).all() and set(split[:, 0]) == {0, 1, 2}


def test_adding_groups_moves_no_old_one():
    few = hash_split(GROUPS[:300], 5, 0.2, 0.2)
    more = hash_split(np.concatenate([GROUPS[5000:5100], GROUPS[:300]]), 5, 0.2, 0.2)
    assert (more[100:] == few).all()


def test_a_larger_validation_share_keeps_the_old_one():
    small, large = (hash_split(GROUPS, 0, val, 0.1) == 1 for val in (0.1, 0.2))
    assert (large | ~small).all() and large.sum() > small.sum()


def test_seeds_give_independent_splits():
    first, second = (hash_split(GROUPS, seed, 0.5, 0.0) == 1 for seed in (0, 1))
    agree = (first == second).sum()
    assert abs(agree - len(GROUPS) / 2) < 4 * np.sqrt(len(GROUPS) / 4)


@pytest.mark.parametrize("val, test", [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (1.0, 0.0)])
def test_fractions_that_leave_nothing_are_refused(val, test):
    with pytest.raises(ValueError) as error:
        hash_split(GROUPS, 0, val, test)
    rule = "must not be negative and must sum to less than 1, or nothing is left to train on"
    assert str(error.value) == f"val_fraction={val}, test_fraction={test}: {rule}"
