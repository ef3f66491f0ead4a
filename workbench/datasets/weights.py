"""Weights: a zoo of trained networks, each flattened to one row of numbers, split by training run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor

from workbench.config import Config
from workbench.datasets.alignment import reorder, zoo_orders
from workbench.datasets.cache import locked, make_folder
from workbench.datasets.digits_zoo import write_digits_zoo
from workbench.datasets.flat_weights import to_state_dicts
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch, epoch_order
from workbench.datasets.splits import SPLITS, hash_split, stable_hash
from workbench.datasets.weight_scaling import Normalize, fit
from workbench.datasets.zoo_cache import Zoo, open_zoo
from workbench.datasets.zoo_selection import ALL, balanced_order, best, check_runs, fitting_length, keep, parse_where
from workbench.paths import outputs_root, resolve
from workbench.weight_plots import heat_pixels, heat_strips, layer_marks

SCALED_BY = 16
"""Networks that the scale of colours is taken from."""


class WeightsConfig(Config):
    """Where trained networks come from, which of them are used, and how their weights are scaled.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str = "digits-zoo"
    """`digits-zoo` (trained here), or a folder of `.pt` or `.safetensors` files, perhaps in its `weights/`."""
    where: list[str] = Field([])
    """`property=value`, compared as text: only networks that have it; several values of a property are alternatives."""
    trained_on: str = ""
    """Only networks with this value of the property `dataset`, such as mnist (empty or joint: all)."""
    topk: int = Field(0, ge=0)
    """Only so many networks, the best of those left (0: all)."""
    topk_by: str = Field("accuracy", min_length=1)
    """Property by which they are ranked, highest first; with a minus before it, lowest first."""
    max_len: int = Field(0, ge=0)
    """Weights of a sample; shorter networks are padded, longer ones refused (0: the longest network)."""
    normalize: Normalize = "layer"
    """`global`: all weights to mean 0 and standard deviation 1; `layer`: those of each layer; or `none`."""
    weight_scale: float = Field(1.0, ge=1e-6, le=1e6, allow_inf_nan=False)
    """Factor on the normalised weights."""
    align: bool = False
    """Bring the hidden units of two linear layers into one order; refused with as many outputs as inputs or units."""
    balance: Literal["none", "file", "architecture"] = "none"
    """Draw as many samples from each file, or of each architecture, in every epoch of training."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of training runs held out for validation."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of training runs held out for the final figures."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split by hash."""
    cache_dir: str = ""
    """Where the flat weights are kept (empty: `cache/` in the outputs folder)."""

    @model_validator(mode="after")
    def _consistent(self) -> "WeightsConfig":
        parse_where(self.where)
        if self.val_fraction + self.test_fraction >= 1:
            total = self.val_fraction + self.test_fraction
            raise ValueError(f"val_fraction + test_fraction = {total}: must be less than 1, to leave runs to train on")
        return self


class WeightDataset(torch.utils.data.Dataset):
    """Networks of one split.

    A sample holds `x` (d,) float32, scaled, 0 behind the network's weights; `mask` (d,), true where a weight is; `id`
    (stable identity), `group` (hash of the training run) and `architecture` (position in `data.architectures`).
    Weights in float64 are rounded to float32.

    Args:
        data: The networks all splits share.
        networks: Position of each sample's network in the table of the data.
    """

    def __init__(self, data: "Weights", networks: Int[np.ndarray, " n"]) -> None:
        self.data, self.networks = data, networks

    def __len__(self) -> int:
        return len(self.networks)

    def __getitem__(self, index: int) -> Batch:
        """Sample `index`, scaled, on the CPU."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.prepare(self.batch([index])).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Raw samples as they travel to the device: weights in their own unit, float32 (b, d)."""
        networks, data = self.networks[np.asarray(indices)], self.data
        return {
            "x": torch.from_numpy(data.read(networks)),
            "id": torch.from_numpy(data.identity[networks]),
            "group": torch.from_numpy(data.group[networks]),
            "architecture": torch.from_numpy(data.architecture[networks]),
        }

    def prepare(self, batch: Batch) -> Batch:
        """Scale a raw batch on the device it is on, and add its mask."""
        architecture = batch["architecture"]
        mask = self.data.scaling.mask(architecture)
        return batch | {"x": self.data.normalize(batch["x"], architecture), "mask": mask}

    def epoch_order(self, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
        """Samples of an epoch in their order, balanced as the settings say: a function of (seed, epoch) alone."""
        balance = self.data.config.balance
        if balance == "none":
            return epoch_order(len(self), seed, epoch)
        labels = np.unique(self.column(balance).astype(str), return_inverse=True)[1]
        return balanced_order(labels, seed, epoch)

    def subset(self, n: int, seed: int = 0) -> "WeightDataset":
        """At most n samples (0: all), drawn by seed, in their order here."""
        if not n or n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return WeightDataset(self.data, self.networks[chosen])

    def longest(self) -> "WeightDataset":
        """The networks of the longest architecture: the only one whose samples are the same all along.

        Paths between architectures mean nothing, nor does what a decoder puts where shorter ones are padded.
        """
        size = np.array([architecture.size for architecture in self.data.architectures])
        here = self.data.architecture[self.networks]
        return WeightDataset(self.data, self.networks[here == np.unique(here)[size[np.unique(here)].argmax()]])

    def table(self) -> pd.DataFrame:
        """What is known of each sample: file, id, run, architecture, and its other properties."""
        return self.data.rows.iloc[self.networks].reset_index(drop=True)

    def column(self, name: str) -> np.ndarray:
        """One column of `table`, such as `accuracy`.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.data.rows:
            raise DataError(f"column {name!r}: the data has {', '.join(self.data.rows.columns)}; choose one of them")
        return self.data.rows[name].to_numpy()[self.networks]

    def name(self, index: int) -> str:
        """Id of a sample's network."""
        return self.data.rows["id"].iloc[self.networks[index]]

    def state_dict(self, index: int, flat: Float[Tensor, " d"] | None = None) -> dict[str, Tensor]:
        """`Weights.state_dict` of a sample's network."""
        return self.data.state_dict(int(self.networks[index]), flat)


@dataclass
class Weights:
    """Opened networks: their weights, what is known of them, their split, and their scaling.

    Args:
        config: The settings.
        zoo: All networks that the files hold.
        networks: Positions in the zoo's table of the networks that are used.
    """

    config: WeightsConfig
    zoo: Zoo
    networks: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        self.rows = self.zoo.table.iloc[self.networks].reset_index(drop=True)
        self.group, self.identity = stable_hash(self.rows["run"]), stable_hash(self.rows["id"])
        config = self.config
        self.split_of = hash_split(self.group, config.split_seed, config.val_fraction, config.test_fraction)
        used, self.architecture = np.unique(self.zoo.architecture[self.networks], return_inverse=True)
        self.architectures = [self.zoo.architectures[i] for i in used]
        self.max_len = fitting_length(self.rows["id"].tolist(), self.zoo.size[self.networks], config.max_len)
        self.padded = any(architecture.size < self.max_len for architecture in self.architectures)
        train = self.networks[self.split("train").networks]
        self.scaling, self._fitted = fit(config.normalize, self.zoo, train, used, self.max_len, config.weight_scale)
        self.orders = zoo_orders(self.zoo, self.networks, int(train[0])) if config.align else None
        self.condition_names: list[str] = []
        self.main_column = "accuracy" if "accuracy" in self.rows else "architecture"
        self.report = self._report()

    error_name = "mse"
    error_label = "error [per weight, scale of x]"
    group_name = "training runs"
    condition_fingerprint = ""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a model takes from the data."""
        return {"max_len": self.max_len}

    def read(self, networks: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b d"]:
        """Weights of some networks in their own unit, float32, zeros behind them; aligned where the settings say so."""
        weights = self.zoo.read(self.networks[networks], self.max_len).astype(np.float32, copy=False)
        if self.orders is None:
            return weights
        return reorder(torch.from_numpy(weights), self.architectures[0].layers, self.orders[networks]).numpy()

    def normalize(self, weights: Float[Tensor, "b d"], architecture: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """From weights in their own unit to what models see; 0 where the architecture has no weight."""
        return self.scaling.apply(weights, architecture)

    def denormalize(self, x: Float[Tensor, "b d"], architecture: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """From what models see to weights in their own unit; 0 where the architecture has no weight."""
        return self.scaling.invert(x, architecture)

    def state_dict(self, network: int | str, flat: Float[Tensor, " d"] | None = None) -> dict[str, Tensor]:
        """A state dict that the network's module loads, strictly.

        Args:
            network: Position in `table`, or id.
            flat: Weights in their own unit, perhaps padded; those of the file when None, bit for bit, not aligned.

        Raises:
            DataError: no network has this id.
        """
        if isinstance(network, str):
            found = np.flatnonzero(self.rows["id"] == network)
            if not len(found):
                raise DataError(f"network {network!r}: none of the {len(self.rows)} networks has this id; see table()")
            network = int(found[0])
        position = int(self.networks[network])
        if flat is None:
            flat = torch.from_numpy(self.zoo.read([position], self.max_len)[0])
        layers = self.architectures[self.architecture[network]].layers
        return to_state_dicts(flat[None], layers, self.zoo.aside(position))[0]

    def errors(
        self, x_hat: Float[Tensor, "b d"], x: Float[Tensor, "b d"], mask: Bool[Tensor, "b d"] | None = None
    ) -> dict[str, Tensor]:
        """Errors of each network, on the scale of x: `mse`, the mean over its weights.

        Args:
            mask: Where a weight is; may be left out where no network is padded.

        Raises:
            ValueError: no mask, and networks are padded.
        """
        if mask is None:
            if self.padded:
                raise ValueError("mask: must be given, as networks are padded; take it from the batch")
            mask = torch.ones_like(x, dtype=torch.bool)
        squares = torch.where(mask, x_hat - x, 0.0).square()
        return {"mse": squares.sum(1) / mask.sum(1)}

    def error(
        self, x_hat: Float[Tensor, "b d"], x: Float[Tensor, "b d"], mask: Bool[Tensor, "b d"] | None = None
    ) -> Float[Tensor, " b"]:
        """The error by which models are compared."""
        return self.errors(x_hat, x, mask)[self.error_name]

    def grid(
        self, rows: dict[str, Tensor], titles: Sequence[str] | None = None, column_label: str = "network"
    ) -> Figure:
        """Labelled rows of weights (k, d) as models see them, with the layers marked where all networks share them."""
        layers = [("all layers", self.max_len)]
        if len(self.architectures) == 1:
            layers = [(layer.name, layer.size) for layer in self.architectures[0].layers]
        return heat_strips({label: x.float().cpu() for label, x in rows.items()}, layers, titles, column_label)

    def pairs(self, x: Float[Tensor, "b d"], x_hat: Float[Tensor, "b d"]) -> Figure:
        """Samples above their reconstructions."""
        return self.grid({"original": x, "reconstruction": x_hat})

    def compare(self, x: Float[Tensor, "b d"], predictions: dict[str, Tensor]) -> Figure:
        """True weights above predicted ones."""
        return self.grid({"true": x} | predictions)

    def pixels(self, x: Float[Tensor, " d"]) -> UInt8[np.ndarray, "h w 3"]:
        """Weights as pixels, row by row; the colours are the same in every call."""
        return heat_pixels(x[None].float().cpu(), self._limit)[0]

    def key(self, batch: Batch) -> dict[str, Any]:
        """Legend of pixels: `entries` of the first network's layers, see `weight_plots.layer_marks`."""
        layers = [(layer.name, layer.size) for layer in self.architectures[int(batch["architecture"][0])].layers]
        label = f"layers; weights from {-self._limit:.2g} (blue) to {self._limit:.2g} (red)"
        return {"kind": "layers", "label": label, "entries": layer_marks(layers, self.max_len)}

    @cached_property
    def _limit(self) -> float:
        """Where the colours of pixels end: three standard deviations of some networks of the training split."""
        train = self.split("train")
        batch = train.prepare(train.batch(np.arange(min(SCALED_BY, len(train)))))
        return 3 * float(batch["x"][batch["mask"]].std(correction=0)) or 1.0

    def examples(self, n: int) -> Figure:
        """The first networks of the training split."""
        train = self.split("train")
        indices = np.arange(min(n, len(train)))
        x = train.prepare(train.batch(indices))["x"]
        return self.grid({"training networks": x}, [train.name(i) for i in range(len(x))])

    @staticmethod
    def condition_label(name: str) -> str:
        """A condition with its unit; weights have none."""
        return name

    @property
    def broken(self) -> pd.DataFrame:
        """Nothing: a network that cannot be used is refused."""
        return pd.DataFrame(columns=["network", "reason"])

    def statistics(self) -> dict[str, Tensor]:
        """What was fitted on the training split, float32: `mean` and `std`, with `.<architecture>` of each layer."""
        return dict(self._fitted)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, ids, training runs, architectures and split, and of how the weights are scaled."""
        texts = self.rows["id"].tolist(), self.architectures, self.max_len, self.zoo.dtype
        digest = hashlib.blake2b(repr(texts).encode(), digest_size=8)
        digest.update(repr((self.config.normalize, self.config.weight_scale, self.config.align)).encode())
        for array in (self.zoo.crc[self.networks], self.architecture, self.group, self.split_of):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def split(self, name: str) -> WeightDataset:
        """The networks of `train`, `val` or `test`.

        Raises:
            DataError: no such split, or it is empty.
        """
        if name not in SPLITS:
            raise DataError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
        networks = np.flatnonzero(self.split_of == SPLITS.index(name))
        if not len(networks):
            remedy = "lower val_fraction or test_fraction" if name == "train" else f"raise {name}_fraction"
            found = f"none of the {len(self.rows)} networks of {self.rows['run'].nunique()} training runs"
            raise DataError(f"the {name} split has {found}: {remedy}, or change split_seed")
        return WeightDataset(self, networks)

    def table(self) -> pd.DataFrame:
        """One row per network: file, id, run, architecture, its other properties, hash of the run, and split."""
        return self.rows.assign(group=self.group, split=np.array(SPLITS, object)[self.split_of])

    def _report(self) -> dict[str, int | float | str]:
        """Counts that describe the data, as notebook 01 shows them."""
        sizes = self.zoo.size[self.networks]
        report = {
            "networks": len(self.rows),
            "networks_left_out": len(self.zoo.table) - len(self.rows),
            "training_runs": len(np.unique(self.group)),
            "architectures": len(self.architectures),
            "files": self.rows["file"].nunique(),
            "files_not_read": self.zoo.others,
            "shortest": int(sizes.min()),
            "longest": int(sizes.max()),
            "padding": round(1 - float(sizes.mean()) / self.max_len, 4),
            "dtype": self.zoo.dtype,
            "cache_gb": round(int(self.zoo.size.sum()) * self.zoo.stored.itemsize / 1e9, 3),
        }
        for i, name in enumerate(SPLITS):
            here = self.split_of == i
            report |= {f"{name}_runs": len(np.unique(self.group[here])), f"{name}_samples": int(here.sum())}
        return report


def open_weights(config: WeightsConfig) -> Weights:
    """Open a zoo of networks; a first opening reads every network once, to check it and write its weights flat.

    Raises:
        DataError: anything about the data that cannot be used as it is.
    """
    cache_dir = resolve(config.cache_dir) if config.cache_dir else outputs_root() / "cache"
    zoo = open_zoo(_source(config), cache_dir / "weights")
    wanted = list(parse_where(config.where).items())
    if config.trained_on not in ALL:
        wanted.append(("dataset", [config.trained_on]))
    networks = best(zoo.table, keep(zoo.table, wanted), config.topk, config.topk_by)
    check_runs(zoo.table.iloc[networks], zoo.given)
    return Weights(config, zoo, networks)


def _source(config: WeightsConfig) -> Path:
    if config.data != "digits-zoo":
        return resolve(config.data)
    folder = outputs_root() / "cache" / "digits-zoo"
    make_folder(folder.parent, "WORKBENCH_OUTPUTS")
    with locked(folder.with_name("digits-zoo.lock")):
        try:
            return write_digits_zoo(folder)
        except FileExistsError as error:  # of an earlier version
            raise DataError(str(error)) from None
