"""Cutting clips into samples: which slots of the frame cache make up which clip, frame or pair. Arrays only."""

import numpy as np


def cut_clips(start: np.ndarray, clip_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut what was cached, each folder or video, into clips.

    Args:
        start: First slot of each, and of none, int64 (n + 1,).
        clip_length: Slots of a clip, the last of each possibly shorter; 0 leaves them whole.

    Returns:
        First slot and length of each clip, and the number of the folder or video it is cut from.
    """
    length = np.diff(start)
    if not clip_length:
        return start[:-1], length, np.arange(len(length), dtype=np.int32)
    pieces = -(-length // clip_length)
    source = _repeated(pieces)
    first = _progressions(start[:-1], clip_length, pieces)
    return first, np.minimum(clip_length, start[source + 1] - first), source


def sample_slots(
    first: np.ndarray, length: np.ndarray, stride: int, offset: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Slots of every sample of some clips, in order.

    Args:
        first: First slot of each clip.
        length: Slots of each clip.
        stride: Take every stride-th slot.
        offset: Slots to the second frame of a pair, at most to the clip's end; 0 for single frames.

    Returns:
        Slots, int64 (n, 1) or for pairs (n, 2); the position in `first` of each sample's clip, int32; and for
        pairs how many were clipped, and how many left out because the first frame is the clip's last.
    """
    if not offset:
        counts = -(-length // stride)
        return _progressions(first, stride, counts)[:, None], _repeated(counts), {}
    counts = -(-(length - 1) // stride)  # a clip's last slot begins no pair
    slots = np.empty((int(counts.sum()), 2), np.int64)
    slots[:, 0] = _progressions(first, stride, counts)
    np.minimum(slots[:, 0] + offset, np.repeat(first + length - 1, counts), out=slots[:, 1])
    counted = {
        "clipped_pairs": int((slots[:, 1] - slots[:, 0] < offset).sum()),
        "pairs_without_second_frame": int((-(-length // stride) - counts).sum()),
    }
    return slots, _repeated(counts), counted


def _repeated(counts: np.ndarray) -> np.ndarray:
    """Each index i counts[i] times."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _progressions(first: np.ndarray, step: int, counts: np.ndarray) -> np.ndarray:
    """first[i], first[i] + step, … counts[i] times, for every i; made for millions: one pass, no copies."""
    values = np.repeat(first - step * (np.cumsum(counts) - counts), counts)
    values += np.arange(0, step * len(values), step)
    return values
