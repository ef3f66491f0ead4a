"""Clips: folders of frames or videos, as frames or as pairs of frames, split by clip."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from workbench.config import Config
from workbench.datasets.building import open_cache
from workbench.datasets.cache import LEFT_OUT, CacheSettings, FrameCache, locked, make_folder
from workbench.datasets.cutting import cut_clips, sample_slots
from workbench.datasets.frames import DataError
from workbench.datasets.labels import UNLISTED, read_actions, read_conditions, read_labels
from workbench.datasets.loading import Batch
from workbench.datasets.splits import SPLITS, digest_of, hash_split, mix_array
from workbench.datasets.synthetic import write_pushing
from workbench.metrics import image_errors, mse
from workbench.paths import outputs_root, resolve
from workbench.plots import frame_strip, image_grid
from workbench.progress import Progress

SHOWN_FRAMES = 12


class ClipsConfig(Config):
    """Where clips come from and how they are cut into samples.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str = "pushing"
    """`pushing` (rendered here), or a folder of clips, or one video file."""
    labels: str = ""
    """Folder with Something-Something v2's label files; its split is then used. Empty: split by hash."""
    image_size: int = Field(64, ge=8)
    """Side of the square frames [px]."""
    allow_upscale: bool = False
    """Enlarge frames whose shorter side is below `image_size`, instead of refusing them."""
    clip_length: int = Field(0, ge=0)
    """Cut clips or videos into clips of this many frames (0: leave whole); in a folder, those of one stay together."""
    frame_stride: int = Field(1, ge=1)
    """Take every n-th frame of a clip as a sample (or as the first of a pair)."""
    pair_offset: int = Field(0, ge=0)
    """Frames from the first to the second of a pair (0: single frames)."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of clips held out for validation."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of clips held out for the final figures."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split by hash."""
    cache_dir: str = ""
    """Where decoded frames are kept (empty: `cache/` in the outputs folder)."""
    cache_stride: int = Field(1, ge=1)
    """Keep every n-th frame in the cache; strides and offsets then count kept frames."""
    max_broken_fraction: float = Field(0.01, ge=0, le=1)
    """Share of frames, or of whole clips, that may be broken before the run stops."""
    decode_workers: int = Field(0, ge=0)
    """Decoding threads (0: one per core)."""

    @model_validator(mode="after")
    def _leaves_training_data(self) -> "ClipsConfig":
        if self.val_fraction + self.test_fraction >= 1:
            total = self.val_fraction + self.test_fraction
            raise ValueError(f"val_fraction + test_fraction = {total}: must be less than 1, to leave clips to train on")
        return self


def normalize(frames: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """Pixels 0..255 to [-1, 1], on the device they are on; the result is channels-last in memory."""
    return frames.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class ClipDataset(torch.utils.data.Dataset):
    """Samples of one split, read from the frame cache.

    A sample holds `x` (the frame, or the second of a pair), for pairs `first`, `condition` where the data has
    conditions, `id` (stable identity) and `group` (hash of the clip).

    Args:
        clips: The clips all splits share.
        slots: Cache slot of each sample, (n, 1), or of both frames of each pair, (n, 2).
        segment: Clip each sample belongs to.
    """

    def __init__(self, clips: "Clips", slots: Int[np.ndarray, "n k"], segment: Int[np.ndarray, " n"]) -> None:
        self.clips, self.slots, self.segment = clips, slots, segment

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int) -> Batch:
        """Sample `index`, normalised, on the CPU."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.prepare(self.batch([index])).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Raw samples as they travel to the device: frames as uint8 (b, h, w, c)."""
        indices = np.asarray(indices)
        slots, cache = self.slots[indices], self.clips.cache
        last = slots[:, -1]
        group = self.clips.group[self.segment[indices]]
        batch = {
            "x": torch.from_numpy(cache.read(last)),
            "id": torch.from_numpy(mix_array(group, *cache.number[slots].T)),
            "group": torch.from_numpy(group),
        }
        if slots.shape[1] == 2:
            batch["first"] = torch.from_numpy(cache.read(slots[:, 0]))
        if self.clips.conditions is not None:
            batch["condition"] = self.conditions(indices)
        return batch

    def conditions(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "b d"]:
        """Conditions of some samples, without reading their frames."""
        return torch.from_numpy(self.clips.conditions[self.slots[np.asarray(indices), -1]])

    @staticmethod
    def prepare(batch: Batch) -> Batch:
        """Normalise a raw batch on the device it is on."""
        return {key: normalize(value) if value.dtype == torch.uint8 else value for key, value in batch.items()}

    def subset(self, n: int, seed: int = 0) -> "ClipDataset":
        """At most n samples (0: all), drawn by seed, in their order here."""
        if not n or n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return ClipDataset(self.clips, self.slots[chosen], self.segment[chosen])

    def table(self) -> pd.DataFrame:
        """What is known of each sample: clip, frame, and the columns of its labels and conditions."""
        last, origin = self.slots[:, -1], self.clips.origin[self.segment]
        names = np.array(self.clips.cache.clip_names(), object)
        table = pd.DataFrame({"clip": names[origin], "frame": self.clips.cache.number[last]})
        if self.clips.labels is not None:
            table = table.join(self.clips.labels, on="clip")
        if self.clips.conditions is not None:
            table[self.clips.condition_names] = self.clips.conditions[last]
        return table

    def column(self, name: str) -> np.ndarray:
        """One column of `table`, such as `frame`, `action` or a condition.

        Raises:
            DataError: there is no such column.
        """
        table = self.table()
        if name not in table:
            raise DataError(f"column {name!r}: the data has {', '.join(table.columns)}; choose one of them")
        return table[name].to_numpy()

    def name(self, index: int) -> str:
        """`clip/frame`, or `clip/first->second` for a pair; frames by the number in their name."""
        numbers = "->".join(str(self.clips.cache.number[slot]) for slot in self.slots[index])
        return f"{self.clips.name(int(self.segment[index]))}/{numbers}"


@dataclass
class Clips:
    """Opened clips: the cache, its cut into clips (segments), and their split."""

    config: ClipsConfig
    cache: FrameCache
    first: np.ndarray
    """First slot of each clip, int64."""
    length: np.ndarray
    """Slots of each clip, int64."""
    origin: np.ndarray
    """Cached folder or video each clip is cut from, int32."""
    group: np.ndarray
    """Stable hash of what a split must not part, int64: the clip; of clips cut from several videos, the video."""
    split_of: np.ndarray
    """Each clip's number in SPLITS, or -1: in no label file."""
    labels: pd.DataFrame | None = None
    """One row per clip: `action`, or `label` and `template`."""
    condition_names: list[str] = field(default_factory=list)
    conditions: np.ndarray | None = None
    """Condition of every cache slot, float32 (slots, d)."""

    def __post_init__(self) -> None:
        parts = {name: self._cut(np.flatnonzero(self.split_of == i)) for i, name in enumerate(SPLITS)}
        self._datasets = {name: dataset for name, (dataset, _) in parts.items()}
        self.report = self._report(parts)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a model takes from the data."""
        return {"image_size": self.config.image_size, "in_channels": 3}

    errors = staticmethod(image_errors)
    """Errors of each frame: mse, psnr and ssim."""
    error = staticmethod(mse)
    """The error by which models are compared."""
    error_name = "mse"
    error_label = "error [per element, [-1, 1] scale]"
    group_name = "clips"
    main_column = "frame"

    @staticmethod
    def grid(rows: dict[str, Tensor], titles: Sequence[str] | None = None, column_label: str = "sample") -> Figure:
        """Labelled rows of frames; what a decoder or a floor has overshot is clamped."""
        return image_grid({label: x.float().cpu().clamp(-1, 1) for label, x in rows.items()}, titles, column_label)

    @staticmethod
    def pixels(x: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
        """A frame as pixels."""
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()

    @staticmethod
    def key(batch: Batch) -> dict[str, Any]:
        """Legend of pixels: frames need none."""
        return {}

    def examples(self, n: int) -> Figure:
        """The first clips of the training split, in time from left to right."""
        segments = [int(segment) for segment in dict.fromkeys(self.split("train").segment)][:n]
        return frame_strip({self.name(segment): self.clip(segment)[:SHOWN_FRAMES] for segment in segments})

    @property
    def broken(self) -> pd.DataFrame:
        """Every frame that did not decode, with the reason."""
        return pd.read_csv(self.cache.folder / "broken.csv", dtype=str)

    def pairs(self, x: Float[Tensor, "b c h w"], x_hat: Float[Tensor, "b c h w"]) -> Figure:
        """Samples above their reconstructions."""
        return self.grid({"original": x, "reconstruction": x_hat})

    def compare(self, x: Float[Tensor, "b c h w"], predictions: dict[str, Tensor]) -> Figure:
        """True frames above predicted ones."""
        return self.grid({"true": x} | predictions)

    @staticmethod
    def condition_label(name: str) -> str:
        """A condition with its unit; those of clips are plain numbers."""
        return name

    @staticmethod
    def statistics() -> dict[str, Tensor]:
        """What was fitted on the training split: nothing, pixels have a scale of their own."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Hash of the clips' names and decoded pixels, of their split, and of their conditions."""
        digest = hashlib.blake2b(self.cache.meta["fingerprint"].encode(), digest_size=8)
        for array in (self.length, self.group, self.split_of, self.conditions):
            digest.update(b"" if array is None else np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def condition_fingerprint(self) -> str:
        """Hash of the conditions of all frames; empty where there are none."""
        return "" if self.conditions is None else digest_of(self.condition_names, self.conditions)

    def split(self, name: str) -> ClipDataset:
        """The samples of `train`, `val` or `test`.

        Raises:
            DataError: no such split, or it is empty.
        """
        if name not in SPLITS:
            raise DataError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
        dataset = self._datasets[name]
        if not len(dataset):
            remedy = f"raise {name}_fraction or change split_seed"
            if name == "train":
                remedy = "lower val_fraction or test_fraction, change split_seed, or cut long clips by clip_length"
            share = f"{self.report[f'{name}_clips']} of {len(self.first)} clips"
            remedy = "add its label file" if self.config.labels else remedy
            raise DataError(f"the {name} split has no samples ({share}): {remedy}")
        return dataset

    def name(self, segment: int) -> str:
        """A clip's name; `video@frame` for one cut from a longer video."""
        name = self.cache.names[self.origin[segment]].decode()
        offset = self.first[segment] - self.cache.start[self.origin[segment]]
        return f"{name}@{offset:05d}" if self.config.clip_length else name

    def table(self) -> pd.DataFrame:
        """One row per clip: its name, group, split (empty: in no label file), length in frames, and its labels."""
        table = pd.DataFrame({"clip": np.array(self.cache.clip_names(), object)[self.origin], "group": self.group})
        table["split"] = np.array([*SPLITS, ""], object)[self.split_of]
        table["frames"] = self.length
        return table if self.labels is None else table.join(self.labels, on="clip")

    def clip(self, segment: int) -> Float[Tensor, "t c h w"]:
        """All frames of one clip that decoded, in [-1, 1]."""
        slots = np.arange(self.first[segment], self.first[segment] + self.length[segment])
        return normalize(torch.from_numpy(self.cache.read(slots[self.cache.number[slots] != LEFT_OUT])))

    def _cut(self, segments: np.ndarray) -> tuple[ClipDataset, dict[str, int]]:
        """Samples of some clips, and the counts of what was clipped or left out."""
        stride, offset = self.config.frame_stride, self.config.pair_offset
        slots, nth, counted = sample_slots(self.first[segments], self.length[segments], stride, offset)
        if self.cache.meta["broken_frames"]:
            whole = (self.cache.number[slots] != LEFT_OUT).all(1)
            slots, nth = slots[whole], nth[whole]
        return ClipDataset(self, slots, segments.astype(np.int32)[nth]), counted

    def _report(self, parts: dict[str, tuple[ClipDataset, dict[str, int]]]) -> dict[str, int | str]:
        """Counts that describe the data, as notebook 01 shows them."""
        meta = self.cache.meta
        report = {
            "clips": len(self.first),
            "frames": meta["slots"] - meta["broken_frames"],
            "broken_frames": meta["broken_frames"],
            "grey_frames": meta["grey_frames"],
            "clips_of_one_frame": int((self.length == 1).sum()),
            "clips_in_no_label_file": int((self.split_of == UNLISTED).sum()),
            "cache_gb": round(self.cache.frames.nbytes / 1e9, 3),
        }
        for i, (name, (dataset, counted)) in enumerate(parts.items()):
            report |= {f"{name}_clips": int((self.split_of == i).sum()), f"{name}_samples": len(dataset)}
            report |= {key: report.get(key, 0) + value for key, value in counted.items()}
        return report


def open_clips(config: ClipsConfig) -> Clips:
    """Open clips, decoding them into the cache first where that has not been done.

    `conditions.csv` (clip, frame, numbers) and `actions.csv` (clip, action, …) are read where the data folder
    holds them.

    Raises:
        DataError: anything about the data that cannot be used as it is.
    """
    cache_dir = resolve(config.cache_dir) if config.cache_dir else outputs_root() / "cache"
    source = _source(config)
    settings = CacheSettings(config.image_size, config.cache_stride, config.allow_upscale)
    cache = open_cache(source, cache_dir, settings, config.max_broken_fraction, config.decode_workers)
    first, length, origin = cut_clips(np.asarray(cache.start), config.clip_length)
    group = np.asarray(cache.hashes)[origin]
    if config.clip_length and source.is_file():
        group = mix_array(group, first - cache.start[origin])
    labels, split_of = _labels_and_split(config, source, cache, origin, group)
    clips = Clips(config, cache, first, length, origin, group, split_of, labels)
    if source.is_dir() and (source / "conditions.csv").exists():
        clips.condition_names, clips.conditions = _conditions(source / "conditions.csv", cache)
    if config.pair_offset and not (length > 1).any():
        raise DataError(f"pair_offset={config.pair_offset}: every clip has a single frame; set it to 0 for no pairs")
    if config.pair_offset and not (length > config.pair_offset).any():
        raise DataError(
            f"pair_offset={config.pair_offset} frames is longer than every clip (the longest has {length.max()} "
            f"frames): choose at most {length.max() - 1}"
        )
    clips.split("train")
    return clips


def _source(config: ClipsConfig) -> Path:
    if config.data != "pushing":
        return resolve(config.data)
    folder = outputs_root() / "cache" / "pushing"
    make_folder(folder.parent, "WORKBENCH_OUTPUTS")
    with locked(folder.with_name("pushing.lock")):
        if not folder.exists():
            with Progress(400, "rendering pushing", "clip") as progress:
                return write_pushing(folder, progress=lambda done, total: progress.update())
        return write_pushing(folder)


def _labels_and_split(
    config: ClipsConfig, source: Path, cache: FrameCache, origin: np.ndarray, group: np.ndarray
) -> tuple[pd.DataFrame | None, np.ndarray]:
    if config.labels:
        labels, split = read_labels(resolve(config.labels), cache.clip_names())
        return labels, split[origin]
    actions = source / "actions.csv"
    labels = read_actions(actions, cache.clip_names()) if source.is_dir() and actions.exists() else None
    return labels, hash_split(group, config.split_seed, config.val_fraction, config.test_fraction)


def _conditions(path: Path, cache: FrameCache) -> tuple[list[str], np.ndarray]:
    """The condition of every slot that decoded; zeros, never read, in the others."""
    number = np.asarray(cache.number)
    good = number != LEFT_OUT
    clip = np.repeat(np.arange(len(cache.names)), np.diff(cache.start))
    names, values = read_conditions(path, cache.clip_names(), clip[good], number[good])
    conditions = np.zeros((len(number), len(names)), np.float32)
    conditions[good] = values
    return names, conditions
