"""Layouts: colour-coded floor plans of rooms and scenes, as pixels and as classes, split by scene."""

import hashlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from workbench.config import Config
from workbench.datasets.cache import locked, make_folder
from workbench.datasets.clips import Clips, normalize
from workbench.datasets.frames import DataError, FrameError
from workbench.datasets.layout_files import Reader, Scan, list_images, read_manifest, scan_images, scenes_by_name
from workbench.datasets.loading import Batch
from workbench.datasets.palettes import UNKNOWN, read_palette
from workbench.datasets.plans import SMALLEST, write_plans
from workbench.datasets.splits import SPLITS, hash_split, stable_hash
from workbench.datasets.threads import usable_cores
from workbench.legends import as_hex
from workbench.metrics import image_errors, mse
from workbench.paths import outputs_root, resolve
from workbench.progress import Progress

IGNORED = -1
"""The class, in a sample, of a pixel whose colour is unknown."""
MEMORY_BYTES = 1e9
"""Images up to this size together are kept once they are decoded; of more, each is decoded whenever it is asked for."""
SCENES = 240


class LayoutsConfig(Config):
    """Where floor plans come from and how their pixels become classes.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str = "plans"
    """`plans` (drawn here), or a folder of PNG images."""
    palette: str = ""
    """YAML or JSON file of the classes and their colours (empty: `palette.yaml` in the folder)."""
    manifest: str = ""
    """CSV of the images (empty: `manifest.csv` in the folder, where there is one); its column `split` is then used."""
    image_size: int = Field(64, ge=8)
    """Side of the square images [px]; of images twice as large every second pixel is taken, and so on."""
    colour_tolerance: float = Field(16.0, ge=0, le=441)
    """Largest distance in RGB from a pixel to the colour of its class."""
    max_unknown_fraction: float = Field(0.001, ge=0, le=1)
    """Share of pixels farther from every colour that is accepted; they have no class."""
    classify_by: Literal["type", "label"] = "type"
    """Column of the manifest that is a sample's `type`."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of scenes held out for validation."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of scenes held out for the final figures."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split by hash."""
    cache_dir: str = ""
    """Where the counts of a look at all images are kept (empty: `cache/` in the outputs folder)."""

    @model_validator(mode="after")
    def _consistent(self) -> "LayoutsConfig":
        if self.data == "plans" and self.image_size < SMALLEST:
            raise ValueError(f"image_size={self.image_size}: must be at least {SMALLEST} for data='plans'")
        if self.val_fraction + self.test_fraction >= 1:
            total = self.val_fraction + self.test_fraction
            raise ValueError(
                f"val_fraction + test_fraction = {total}: must be less than 1, to leave scenes to train on"
            )
        return self


class LayoutDataset(torch.utils.data.Dataset):
    """Images of one split.

    A sample holds `x` (3, h, w) in [-1, 1], `classes` (h, w) int64, IGNORED where the colour is unknown, `type` where
    the manifest tells it, `id` (stable identity) and `group` (hash of the scene).

    Args:
        data: The images all splits share.
        images: Position of each sample's image.
    """

    def __init__(self, data: "Layouts", images: np.ndarray) -> None:
        self.data, self.images = data, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """Sample `index`, on the CPU."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.prepare(self.batch([index])).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Raw samples as they travel to the device: pixels uint8 (b, h, w, 3), classes uint8 (b, h, w)."""
        images = self.images[np.asarray(indices)]
        layers = torch.from_numpy(self.data.read(images))
        batch = {
            "x": layers[..., :3].contiguous(),
            "classes": layers[..., 3].contiguous(),
            "id": torch.from_numpy(self.data.identity[images]),
            "group": torch.from_numpy(self.data.group[images]),
        }
        return batch | ({"type": torch.from_numpy(self.data.type_of[images])} if self.data.type_names else {})

    @staticmethod
    def prepare(batch: Batch) -> Batch:
        """Normalise the pixels and number the classes of a raw batch, on the device it is on."""
        classes = batch["classes"].long()
        return batch | {"x": normalize(batch["x"]), "classes": classes.masked_fill(classes == UNKNOWN, IGNORED)}

    def subset(self, n: int, seed: int = 0) -> "LayoutDataset":
        """At most n samples (0: all), drawn by seed, in their order here."""
        if not n or n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return LayoutDataset(self.data, self.images[chosen])

    def table(self) -> pd.DataFrame:
        """What is known of each sample: path, scene, and what else the manifest tells."""
        return self.data.rows.iloc[self.images].reset_index(drop=True)

    def column(self, name: str) -> np.ndarray:
        """One column of `table`, such as `scene` or `type`.

        Raises:
            DataError: there is no such column.
        """
        table = self.table()
        if name not in table:
            raise DataError(f"column {name!r}: the data has {', '.join(table.columns)}; choose one of them")
        return table[name].to_numpy()

    def name(self, index: int) -> str:
        """Path of a sample's image within the data folder."""
        return self.data.rows["path"].iloc[self.images[index]]


@dataclass
class Layouts:
    """Opened layouts: images, what is known of them, and their split."""

    config: LayoutsConfig
    reader: Reader
    rows: pd.DataFrame
    """One row per image: `path`, `scene`, and what else the manifest tells."""
    split_of: np.ndarray
    """Each image's number in SPLITS, int8."""
    scan: Scan
    others: int = 0
    """Images in the folder that are not PNG, and left out."""
    condition_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.palette = self.reader.palette
        self.group, self.identity = stable_hash(self.rows["scene"]), stable_hash(self.rows["path"])
        labels = self.rows.get(self.config.classify_by, pd.Series(dtype=str))
        self.type_names = sorted(set(labels))
        index = {name: i for i, name in enumerate(self.type_names)}
        self.type_of = labels.map(index).to_numpy(np.int64)
        self.main_column = self.config.classify_by if self.type_names else "scene"
        size = self.config.image_size
        shape = (len(self.rows), size, size, 4)
        self.memory = np.empty(shape, np.uint8) if np.prod(shape, dtype=float) <= MEMORY_BYTES else None
        self.kept = np.zeros(len(self.rows), bool)
        self.report = self._report()

    errors = staticmethod(image_errors)
    """Errors of each image: mse, psnr and ssim."""
    error = staticmethod(mse)
    """The error by which models are compared."""
    error_name = "mse"
    error_label = "error [per element, [-1, 1] scale]"
    group_name = "scenes"
    condition_fingerprint = ""
    grid = staticmethod(Clips.grid)
    pixels = staticmethod(Clips.pixels)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a model takes from the data; `n_types` is 0 where the manifest tells no type."""
        classes = {"n_classes": len(self.palette.names), "n_types": len(self.type_names)}
        return {"image_size": self.config.image_size, "in_channels": 3} | classes

    def read(self, images: np.ndarray) -> UInt8[np.ndarray, "b s s 4"]:
        """Red, green, blue and class of each pixel of some images.

        Raises:
            DataError: an image is no longer what it was when the data was opened.
        """
        if self.memory is None:
            return self._decode(images)
        missing = np.unique(images[~self.kept[images]])
        if len(missing):
            self.memory[missing] = self._decode(missing)
            self.kept[missing] = True
        return self.memory[images]

    def _decode(self, images: np.ndarray) -> np.ndarray:
        def decode(image: int) -> np.ndarray:
            name = self.rows["path"].iloc[image]
            try:
                layers, _, _ = self.reader.read(name)
                same = zlib.crc32(layers) == self.scan.crc[image]
            except FrameError:
                same = False
            if not same:
                raise DataError(f"image {name!r} has changed since the data was opened; restore it, or begin again")
            return layers

        with ThreadPoolExecutor(usable_cores()) as pool:
            return np.stack(list(pool.map(decode, images.tolist())))

    def key(self, batch: Batch) -> dict[str, Any]:
        """Legend of pixels: `entries` of the classes and their colours."""
        colours = [as_hex(colour) for colour in self.palette.colours]
        entries = [list(entry) for entry in zip(self.palette.names, colours, strict=True)]
        return {"kind": "classes", "label": "classes", "entries": entries}

    def examples(self, n: int) -> Figure:
        """The first images of the training split."""
        train = self.split("train")
        indices = np.arange(min(n, len(train)))
        x = train.prepare(train.batch(indices))["x"]
        return self.grid({"training images": x}, train.column(self.main_column)[indices].tolist(), self.main_column)

    def pairs(self, x: Float[Tensor, "b c h w"], x_hat: Float[Tensor, "b c h w"]) -> Figure:
        """Samples above their reconstructions."""
        return self.grid({"original": x, "reconstruction": x_hat})

    def compare(self, x: Float[Tensor, "b c h w"], predictions: dict[str, Tensor]) -> Figure:
        """True images above predicted ones."""
        return self.grid({"true": x} | predictions)

    @staticmethod
    def condition_label(name: str) -> str:
        """A condition with its unit; layouts have none."""
        return name

    @property
    def broken(self) -> pd.DataFrame:
        """Every unknown colour of each image, with the pixels that have it."""
        return pd.read_csv(self.scan.broken, dtype={"image": str}, keep_default_na=False)

    def statistics(self) -> dict[str, Tensor]:
        """Frequency of each class among the pixels of the training split that have one, float32 (k,)."""
        counts = self._class_pixels("train")
        return {"class_frequency": torch.from_numpy((counts / counts.sum()).astype(np.float32))}

    def _class_pixels(self, split: str) -> np.ndarray:
        of_split = self.scan.pixels[self.split_of == SPLITS.index(split)]
        return of_split[:, :-1].sum(0, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the images' names, pixels and classes, of the classes' names and colours, of types and split."""
        texts = self.rows["path"].tolist(), list(self.palette.names), self.type_names
        digest = hashlib.blake2b(repr(texts).encode(), digest_size=8)
        for array in (self.scan.crc, self.palette.colours, self.group, self.split_of, self.type_of):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def split(self, name: str) -> LayoutDataset:
        """The images of `train`, `val` or `test`.

        Raises:
            DataError: no such split, or it is empty.
        """
        _check_split(name, self.rows, self.split_of)
        return LayoutDataset(self, np.flatnonzero(self.split_of == SPLITS.index(name)))

    def table(self) -> pd.DataFrame:
        """One row per image: path, scene, what else the manifest tells, the hash of the scene, and the split."""
        return self.rows.assign(group=self.group, split=np.array(SPLITS, object)[self.split_of])

    def _report(self) -> dict[str, int | float | bool]:
        """Counts that describe the data, as notebook 01 shows them."""
        unknown = self.scan.pixels[:, -1]
        report = {
            "images": len(self.rows),
            "scenes": len(np.unique(self.group)),
            "classes": len(self.palette.names),
            "types": len(self.type_names),
            "side_in_files": self.scan.side,
            "unknown_pixels": int(unknown.sum(dtype=np.int64)),
            "images_with_unknown_pixels": int((unknown > 0).sum()),
            "images_not_png": self.others,
            "in_memory": self.memory is not None,
        }
        for i, name in enumerate(SPLITS):
            here = self.split_of == i
            report |= {f"{name}_scenes": len(np.unique(self.group[here])), f"{name}_samples": int(here.sum())}
        return report


def open_layouts(config: LayoutsConfig) -> Layouts:
    """Open floor plans; a first opening looks at every pixel once, to count the classes and check the colours.

    Raises:
        DataError: anything about the data that cannot be used as it is.
    """
    folder = _source(config)
    listing = list_images(folder)
    palette = read_palette(resolve(config.palette) if config.palette else folder / "palette.yaml")
    reader = Reader(folder, palette, config.image_size, config.colour_tolerance)
    manifest = resolve(config.manifest) if config.manifest else folder / "manifest.csv"
    if config.manifest or manifest.exists():
        rows = read_manifest(manifest, listing.names)
    else:
        rows = pd.DataFrame({"path": listing.names, "scene": scenes_by_name(listing.names)})
    if config.classify_by == "label" and "label" not in rows:
        raise DataError(f"classify_by='label': {manifest} has no column 'label'; add it, or classify by 'type'")
    if "split" in rows:
        split_of = rows.pop("split").map(SPLITS.index).to_numpy(np.int8)
    else:
        groups = stable_hash(rows["scene"])
        split_of = hash_split(groups, config.split_seed, config.val_fraction, config.test_fraction)
    _check_split("train", rows, split_of)
    cache_dir = resolve(config.cache_dir) if config.cache_dir else outputs_root() / "cache"
    scan = scan_images(reader, listing, config.max_unknown_fraction, cache_dir / "layouts")
    layouts = Layouts(config, reader, rows, split_of, scan, listing.others)
    _check_classes(layouts)
    return layouts


def _source(config: LayoutsConfig) -> Path:
    if config.data != "plans":
        return resolve(config.data)
    size = config.image_size
    folder = outputs_root() / "cache" / f"plans-{size}px"
    make_folder(folder.parent, "WORKBENCH_OUTPUTS")
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with Progress(SCENES, "drawing plans", "scene") as progress:
                return write_plans(folder, SCENES, size, progress=lambda done, total: progress.update())
        return write_plans(folder, SCENES, size)


def _check_split(name: str, rows: pd.DataFrame, split_of: np.ndarray) -> None:
    """Raise DataError where there is no such split, or it is empty."""
    if name not in SPLITS:
        raise DataError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
    if not (split_of == SPLITS.index(name)).any():
        remedy = "lower val_fraction or test_fraction" if name == "train" else f"raise {name}_fraction"
        found = f"none of the {len(rows)} images of {rows['scene'].nunique()} scenes"
        raise DataError(f"the {name} split has {found}: {remedy}, or change split_seed, or the manifest's 'split'")


def _check_classes(layouts: Layouts) -> None:
    """Refuse a class of pixels or a type of images that the training split lacks: nothing could learn it."""
    remedy = "change split_seed, lower val_fraction and test_fraction, or add images to the training split"
    lacking = [layouts.palette.names[i] for i in np.flatnonzero(layouts._class_pixels("train") == 0)]
    if lacking:
        found = f"class {lacking[0]!r} has no pixel in the training split{_and_more(lacking)}"
        raise DataError(f"{found}: every class must occur there; {remedy}, or take the class out of the palette")
    if layouts.type_names:
        present = set(layouts.split("train").column(layouts.main_column))
        lacking = [name for name in layouts.type_names if name not in present]
        if lacking:
            found = f"{layouts.main_column} {lacking[0]!r} has no image in the training split{_and_more(lacking)}"
            raise DataError(f"{found}: every {layouts.main_column} must occur there; {remedy}")


def _and_more(found: list[str]) -> str:
    return f", and {len(found) - 1} more" if len(found) > 1 else ""
