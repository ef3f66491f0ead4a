"""Cutting clips into samples: which slots of the frame cache make up which clip, frame or pair. Arrays only."""

import numpy as np

FIT_INT32 = 2**30  # with room for an offset


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
        Slots, (n, 1) or for pairs (n, 2); the position in `first` of each sample's clip; and for pairs how many
        were clipped, and how many left out because the first frame is the clip's last.
    """
    counts = -(-length // stride)
    if not offset:
        return _progressions(first, stride, counts)[:, None], _repeated(counts), {}
    offset = min(offset, int(length.max(initial=0)))
    alone, counts = counts.sum(), -(-(length - 1) // stride)  # a clip's last slot begins no pair
    unclipped = -(-np.maximum(length - offset, 0) // stride)
    begin = _progressions(first, stride, counts)
    slots = np.empty((len(begin), 2), begin.dtype)
    slots[:, 0] = begin
    slots[:, 1] = np.repeat((first + length - 1).astype(begin.dtype), counts)
    begin += offset
    np.minimum(begin, slots[:, 1], out=slots[:, 1])
    counted = {
        "clipped_pairs": int((counts - unclipped).sum()),
        "pairs_without_second_frame": int(alone - counts.sum()),
    }
    return slots, _repeated(counts), counted


def _repeated(counts: np.ndarray) -> np.ndarray:
    """Each index i counts[i] times."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _progressions(first: np.ndarray, step: int, counts: np.ndarray) -> np.ndarray:
    """first[i], first[i] + step, … counts[i] times, for every i.

    Made for millions, where touching memory is what takes the time: one pass, in int32 where that suffices.
    """
    total = int(counts.sum())
    largest = max(step * total, int(first.max(initial=0)) + step * int(counts.max(initial=0)))
    kind = np.int32 if largest < FIT_INT32 else np.int64
    values = np.repeat((first - step * (np.cumsum(counts) - counts)).astype(kind), counts)
    values += np.arange(0, step * total, step, dtype=kind)
    return values
