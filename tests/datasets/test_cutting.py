import numpy as np
import pytest

from workbench.datasets.cutting import cut_clips, sample_slots

CASES = [np.random.default_rng(seed) for seed in range(30)]


def lengths(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1, 12, rng.integers(1, 6))


@pytest.mark.parametrize("rng", CASES, ids=str)
def test_clips_are_cut_as_by_hand(rng):
    length, clip_length = lengths(rng), int(rng.integers(0, 6))
    start = np.concatenate([[0], np.cumsum(length)])
    expected = []
    for source, (first, last) in enumerate(zip(start[:-1], start[1:], strict=True)):
        for at in range(first, last, clip_length or last):
            expected.append((at, min(clip_length or last, last - at), source))
    if not clip_length:
        expected = [(int(first), int(n), i) for i, (first, n) in enumerate(zip(start[:-1], length, strict=True))]
    assert list(zip(*(array.tolist() for array in cut_clips(start, clip_length)), strict=True)) == expected


@pytest.mark.parametrize("rng", CASES, ids=str)
def test_single_frames_are_every_nth_of_a_clip(rng):
    length, stride = lengths(rng), int(rng.integers(1, 6))
    first = np.cumsum(length) + rng.integers(0, 50)
    slots, clip, counted = sample_slots(first, length, stride, 0)
    by_hand = [(i, first[i] + n) for i in range(len(length)) for n in range(0, length[i], stride)]
    assert list(zip(clip.tolist(), slots[:, 0].tolist(), strict=True)) == by_hand
    assert slots.shape == (len(by_hand), 1) and counted == {}


@pytest.mark.parametrize("rng", CASES, ids=str)
def test_pairs_reach_offset_frames_on_or_to_the_clips_end(rng):
    length, stride, offset = lengths(rng), int(rng.integers(1, 5)), int(rng.integers(1, 8))
    first = np.cumsum(length) + rng.integers(0, 50)
    slots, clip, counted = sample_slots(first, length, stride, offset)
    by_hand, clipped, alone = [], 0, 0
    for i in range(len(length)):
        for n in range(0, length[i], stride):
            second = min(n + offset, length[i] - 1)
            if second == n:
                alone += 1
            else:
                by_hand.append((i, first[i] + n, first[i] + second))
                clipped += second < n + offset
    assert list(zip(clip.tolist(), *slots.T.tolist(), strict=True)) == by_hand
    assert counted == {"clipped_pairs": clipped, "pairs_without_second_frame": alone}


@pytest.mark.parametrize("offset", [0, 40, 2**40])
def test_slots_beyond_32_bits_are_right(offset):
    first, length = np.array([2**31 - 20, 2**31 - 10, 2**33]), np.array([10, 30, 5])
    slots = sample_slots(first, length, 3, offset)[0]
    small = sample_slots(first - 2**31 + 20, length, 3, offset)[0]
    assert slots.dtype == np.int64 and small.dtype == np.int64
    assert (slots - (2**31 - 20) == small).all()
    few = sample_slots(first[:2] - 2**31 + 20, length[:2], 3, offset)[0]
    assert few.dtype == np.int32 and (few == small[: len(few)]).all()
    wide = sample_slots(np.arange(3) * 5, np.full(3, 5), 2**30, offset)[0]
    assert wide[:, 0].tolist() == [0, 5, 10]


def test_no_clips_give_no_samples():
    empty = np.zeros(0, np.int64)
    assert sample_slots(empty, empty, 2, 0)[0].shape == (0, 1)
    slots, clip, counted = sample_slots(empty, empty, 2, 3)
    assert slots.shape == (0, 2) and clip.shape == (0,)
    assert counted == {"clipped_pairs": 0, "pairs_without_second_frame": 0}
