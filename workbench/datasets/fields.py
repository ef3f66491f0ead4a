"""Fields of simulations over time and nodes, each run with its parameters or a picture, split by run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from workbench.datasets.arrays import LazyArray
from workbench.datasets.cache import make_folder
from workbench.datasets.conditions import Conditions, check_constant
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch
from workbench.datasets.scaling import describe_fields, file_stamp, fit_scaling, stamp_name
from workbench.datasets.splits import SPLITS, digest_of, hash_split, stable_hash
from workbench.field_plots import FieldRaster, field_grid, field_views
from workbench.field_traces import FieldTraces
from workbench.metrics import field_errors, fit_pca
from workbench.paths import outputs_root, resolve

MEMORY_BYTES = 1e9
"""Fields up to this size are read once and kept; larger ones stay in their file."""
SHOWN = (0.2, 0.5, 0.95)
"""Time steps and nodes that figures show [share of all]."""


class SimulationConfig(Config):
    """Where simulations come from.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str = "plate"
    """`plate` (solved here), or a file of fields (runs, steps, nodes) or (runs, steps, nodes, variables)."""
    field: str = ""
    """Name of the fields' array in a file that holds several; empty: its only one."""
    test_data: str = ""
    """A second file, of which every run is held out for the final figures; empty: split by hash."""
    field_unit: str = ""
    """What the fields are, with the unit, as figures name it."""
    time_steps: int = Field(0, ge=0)
    """Only the first time steps (0: all)."""
    node_start: int = Field(0, ge=0)
    """First node."""
    node_end: int = Field(0, ge=0)
    """Node after the last (0: all)."""
    scaling: Literal["node", "global", "standard", "none"] = "node"
    """How fields are scaled into [-1, 1]; see `scaling.fit_scaling`."""
    conditions: str = ""
    """CSV with a header, or folder of pictures; empty: those beside the plate, or none."""
    condition_field: str = ""
    """Name of an array (runs, values) in the file of the fields; empty: none."""
    condition_image_size: int = Field(64, ge=8)
    """Side that pictures are resized to [px]."""
    condition_colour: Literal["grey", "rgb"] = "grey"
    """Channels of the pictures."""
    condition_pca: int = Field(0, ge=0)
    """Principal components that stand for the pictures (0: the pictures themselves)."""
    val_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of runs held out for validation."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of runs held out for the final figures; not used with `test_data`."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split by hash."""
    cache_dir: str = ""
    """Where statistics of the fields are kept (empty: `cache/` in the outputs folder)."""

    @model_validator(mode="after")
    def _consistent(self) -> "SimulationConfig":
        if self.node_end and self.node_end <= self.node_start:
            raise ValueError(f"node_end={self.node_end}: must be above node_start={self.node_start}, or 0 for all")
        if self.conditions and self.condition_field:
            raise ValueError(f"condition_field={self.condition_field!r}: must be empty where conditions are given")
        if self.val_fraction + self.test_fraction >= 1:
            total = self.val_fraction + self.test_fraction
            raise ValueError(f"val_fraction + test_fraction = {total}: must be less than 1, to leave runs to train on")
        return self


class SimulationDataset(torch.utils.data.Dataset):
    """Runs of one split. A sample holds `x` (n, t) scaled, `condition` where there is one, `id` and `group`.

    Args:
        data: The simulations all splits share.
        runs: Position of each sample's run.
    """

    def __init__(self, data: "Simulations", runs: np.ndarray) -> None:
        self.data, self.runs = data, runs

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Batch:
        """Sample `index`, scaled, on the CPU."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.prepare(self.batch([index])).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Raw samples as they travel to the device: `field` (b, t, n, v) in the field's unit."""
        runs = self.runs[np.asarray(indices)]
        group = torch.from_numpy(self.data.group[runs])
        batch = {"field": torch.from_numpy(self.data.read(runs)), "id": group, "group": group}
        return batch | ({"condition": self.data.conditions.batch(runs)} if self.data.conditions else {})

    def conditions(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "b ..."]:
        """Conditions of some samples, without reading their fields."""
        return self.data.conditions.batch(self.runs[np.asarray(indices)])

    def prepare(self, batch: Batch) -> Batch:
        """Scale a raw batch on the device it is on; nodes and variables become the channels of x."""
        x = self.data.scaling.apply(batch["field"])
        return {"x": x} | {key: value for key, value in batch.items() if key != "field"}

    def subset(self, n: int, seed: int = 0) -> "SimulationDataset":
        """At most n runs (0: all), drawn by seed, in their order here."""
        if not n or n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return SimulationDataset(self.data, self.runs[chosen])

    def table(self) -> pd.DataFrame:
        """What is known of each run: its id, and its conditions where they are numbers."""
        table = pd.DataFrame({"run": np.array(self.data.ids, object)[self.runs]})
        conditions = self.data.conditions
        if conditions is not None and conditions.values.ndim == 2:
            table[conditions.names] = conditions.values[self.runs]
        return table

    def column(self, name: str) -> np.ndarray:
        """One column of `table`, such as `run` or a condition.

        Raises:
            DataError: there is no such column.
        """
        table = self.table()
        if name not in table:
            raise DataError(f"column {name!r}: the data has {', '.join(table.columns)}; choose one of them")
        return table[name].to_numpy()

    def name(self, index: int) -> str:
        """Id of a sample's run."""
        return self.data.ids[self.runs[index]]


@dataclass
class Simulations:
    """Opened simulations: fields, conditions, scaling, and their split."""

    config: SimulationConfig
    arrays: list[LazyArray]
    ids: list[str]
    conditions: Conditions | None
    coordinates: Float[np.ndarray, "n k"] | None
    """Places of the nodes, where `nodes.csv` lies beside the fields."""
    units: dict[str, str]
    """Unit of the field and of each condition, where known."""
    memory: np.ndarray | None = None
    split_of: np.ndarray = field(init=False)
    """Each run's number in SPLITS."""

    def __post_init__(self) -> None:
        config = self.config
        self.group = stable_hash(self.ids)
        test = 0.0 if config.test_data else config.test_fraction
        self.split_of = hash_split(self.group, config.split_seed, config.val_fraction, test)
        self.split_of[self.arrays[0].shape[0] :] = SPLITS.index("test")
        if self._run_bytes * len(self.ids) <= MEMORY_BYTES:
            self.memory = self._from_files(np.arange(len(self.ids)))
        self.split("train")
        train = self.split_of == SPLITS.index("train")
        found = describe_fields(self.read, train, self.ids, self._run_bytes, self._cached(), config.node_start)
        self.scaling, self.low, self.high = fit_scaling(config.scaling, found), found.low, found.high
        self.fingerprint = stamp_name(found.digest, self._run_shape, self.group.tolist(), self.split_of.tolist())
        self._prepare_conditions(train)
        self.report = self._report(found.low, found.high)

    @property
    def _run_bytes(self) -> int:
        steps, nodes, variables = self._run_shape
        return 4 * steps * nodes * variables

    @property
    def _run_shape(self) -> tuple[int, int, int]:
        """Time steps, nodes and variables of a run, in the ranges asked for."""
        shape = self.arrays[0].shape
        nodes = (self.config.node_end or shape[2]) - self.config.node_start
        return self.config.time_steps or shape[1], nodes, shape[3] if len(shape) == 4 else 1

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that a model takes from the data."""
        steps, nodes, variables = self._run_shape
        return {"nodes": nodes * variables, "steps": steps}

    @property
    def condition_names(self) -> list[str]:
        """Names of the conditions that are numbers."""
        return [] if self.conditions is None else self.conditions.names

    @property
    def condition_fingerprint(self) -> str:
        """Hash of the conditions of all runs; empty where there are none."""
        return "" if self.conditions is None else digest_of(self.conditions.names, self.conditions.values)

    @property
    def field_label(self) -> str:
        """What the field is, with its unit."""
        return self.config.field_unit or self.units.get("field", "field [its unit]")

    def read(self, runs: np.ndarray) -> Float[np.ndarray, "p t n v"]:
        """Fields of some runs in their unit, float32."""
        return self.memory[runs] if self.memory is not None else self._from_files(runs)

    def _from_files(self, runs: np.ndarray) -> np.ndarray:
        steps, nodes, variables = self._run_shape
        fields = np.empty((len(runs), steps, nodes, variables), np.float32)
        start, first = self.config.node_start, 0
        for array in self.arrays:
            inside = (runs >= first) & (runs < first + array.shape[0])
            if inside.any():
                part = array.read(runs[inside] - first, slice(0, steps), slice(start, start + nodes))
                part = part.reshape(len(part), steps, nodes, variables)
                if inside.all():
                    return part
                fields[inside] = part
            first += array.shape[0]
        return fields

    def _cached(self) -> Path:
        """File of the statistics of these runs, ranges and this split."""
        root = resolve(self.config.cache_dir) if self.config.cache_dir else outputs_root() / "cache"
        folder = root / "simulations"
        make_folder(folder, "cache_dir")
        files = [[file_stamp(array.path), array.name] for array in self.arrays]
        ranges = [self._run_shape, self.config.node_start]
        return folder / f"{stamp_name(files, ranges, self.group.tolist(), self.split_of.tolist())}.npz"

    def _prepare_conditions(self, train: np.ndarray) -> None:
        """Refuse what says nothing; pictures become their principal components where so asked."""
        conditions, components = self.conditions, self.config.condition_pca
        if components and (conditions is None or conditions.values.ndim == 2):
            raise DataError(f"condition_pca={components}: the conditions are not pictures; set it to 0")
        if conditions is None:
            return
        if conditions.values.ndim == 2:
            check_constant(conditions.names, conditions.values[train], self.config.conditions or "conditions")
        elif components:
            pictures = conditions.batch(np.arange(len(self.ids)))
            most = min(int(train.sum()), pictures[0].numel())
            if components > most:
                raise DataError(
                    f"condition_pca={components}: {train.sum()} pictures of the training split, of "
                    f"{pictures[0].numel()} values each, have at most {most}; lower it"
                )
            pca = fit_pca(lambda: [pictures[torch.from_numpy(train)]], components)
            self.conditions = Conditions([f"PC{i + 1}" for i in range(components)], pca.encode(pictures).numpy())

    def split(self, name: str) -> SimulationDataset:
        """The runs of `train`, `val` or `test`.

        Raises:
            DataError: no such split, or it is empty.
        """
        if name not in SPLITS:
            raise DataError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
        runs = np.flatnonzero(self.split_of == SPLITS.index(name))
        if not len(runs):
            remedy = "lower val_fraction or test_fraction" if name == "train" else f"raise {name}_fraction"
            raise DataError(f"the {name} split has none of the {len(self.ids)} runs: {remedy}, or change split_seed")
        return SimulationDataset(self, runs)

    def table(self) -> pd.DataFrame:
        """One row per run: id, group, split, and its conditions where they are numbers."""
        table = SimulationDataset(self, np.arange(len(self.ids))).table()
        table.insert(1, "group", self.group)
        table.insert(2, "split", np.array(SPLITS, object)[self.split_of])
        return table

    def physical(self, x: Float[Tensor, "b vn t"]) -> Float[Tensor, "b t n v"]:
        """From what models see to the field in its unit."""
        return self.scaling.invert(x)

    def errors(self, x_hat: Float[Tensor, "b vn t"], x: Float[Tensor, "b vn t"]) -> dict[str, Tensor]:
        """Errors of each field in its unit: relative_l2, mse, mae; the mean over variables where there are several."""
        pairs = zip(self.physical(x_hat).unbind(3), self.physical(x).unbind(3), strict=True)
        found = [field_errors(variable_hat, variable) for variable_hat, variable in pairs]
        return {name: torch.stack([errors[name] for errors in found]).mean(0) for name in found[0]}

    error_name = "relative_l2"
    error_label = "relative L2 error of the field [1]"
    group_name = "runs"

    def error(self, x_hat: Float[Tensor, "b vn t"], x: Float[Tensor, "b vn t"]) -> Float[Tensor, " b"]:
        """The error by which models are compared."""
        return self.errors(x_hat, x)[self.error_name]

    def grid(self, rows: dict[str, Tensor], titles: Sequence[str] | None = None, column_label: str = "run") -> Figure:
        """Labelled rows of fields (k, n, t) as models see them, their first variable drawn in its unit."""
        fields = {label: self.physical(x.float().cpu())[..., 0].numpy() for label, x in rows.items()}
        return field_grid(fields, self.coordinates, self._drawn_label, titles, column_label)

    @property
    def _drawn_label(self) -> str:
        """What figures draw: the field, of several variables the first."""
        variables = self._run_shape[2]
        return self.field_label + (f", first of {variables} variables" if variables > 1 else "")

    @property
    def main_column(self) -> str:
        """The column of a split's table that says most: the first condition, or the run."""
        return (self.condition_names or ["run"])[0]

    @cached_property
    def raster(self) -> FieldRaster:
        """How a field's first variable becomes pixels."""
        return FieldRaster(self.coordinates, (float(self.low[:, 0].min()), float(self.high[:, 0].max())))

    def pixels(self, x: Float[Tensor, "vn t"]) -> UInt8[np.ndarray, "h w 3"]:
        """A field as pixels, its first variable; colours span that variable's values in the training split."""
        return self.raster.draw(self.physical(x[None].float().cpu())[0, ..., 0].numpy())

    def key(self, batch: Batch) -> dict[str, Any]:
        """Legend of pixels: `label` with the field's unit, and `entries` of numbers and their colours."""
        label = f"{self._drawn_label}, {self.raster.shows}"
        return {"kind": "numbers", "label": label, "entries": self.raster.scale}

    @cached_property
    def _traces(self) -> FieldTraces:
        nodes = list(dict.fromkeys(round(share * (len(self.low) - 1)) for share in SHOWN))
        limits = float(self.low[nodes, 0].min()), float(self.high[nodes, 0].max())
        return FieldTraces(nodes, limits, self._run_shape[0], self._drawn_label)

    def traces(self, x_hat: Float[Tensor, "vn t"], x: Float[Tensor, "vn t"]) -> tuple[str, UInt8[np.ndarray, "h w 3"]]:
        """A decoded and a real field over time at three nodes, their first variable: what is drawn, and the pixels."""
        fields = self.physical(torch.stack([x_hat, x]).float().cpu())[..., 0].numpy()
        return self._traces.caption, self._traces.draw(*fields)

    def examples(self, n: int) -> Figure:
        """The first runs of the training split."""
        train = self.split("train")
        x = train.prepare(train.batch(np.arange(min(n, len(train)))))["x"]
        return self.grid({"training runs": x}, [train.name(i) for i in range(len(x))])

    @property
    def broken(self) -> pd.DataFrame:
        """Nothing: a run with a value that is not finite is refused."""
        return pd.DataFrame(columns=["run", "reason"])

    def pairs(self, x: Float[Tensor, "b vn t"], x_hat: Float[Tensor, "b vn t"]) -> Figure:
        """Samples above their reconstructions."""
        return self.grid({"original": x, "reconstruction": x_hat})

    def compare(self, x: Float[Tensor, "b vn t"], predictions: dict[str, Tensor]) -> Figure:
        """The first of some true fields and its predictions, at three times and at three nodes."""
        fields = {name: self.physical(f[:1].float().cpu())[0, ..., 0].numpy() for name, f in predictions.items()}
        true = self.physical(x[:1].float().cpu())[0, ..., 0].numpy()
        steps, nodes = ([round(share * (size - 1)) for share in SHOWN] for size in true.shape)
        return field_views(true, fields, self.coordinates, self._drawn_label, steps, nodes)

    def condition_label(self, name: str) -> str:
        """A condition with its unit, where known."""
        return f"{name} [{self.units[name]}]" if name in self.units else name

    def statistics(self) -> dict[str, Tensor]:
        """What was fitted on the training split, for the run folder."""
        return {"offset": self.scaling.offset, "scale": self.scaling.scale}

    def _report(self, low: np.ndarray, high: np.ndarray) -> dict[str, int | float | str]:
        steps, nodes, variables = self._run_shape
        report = {"runs": len(self.ids), "time_steps": steps, "nodes": nodes, "variables": variables}
        report |= {f"{name}_runs": int((self.split_of == i).sum()) for i, name in enumerate(SPLITS)}
        constant = int((high == low).sum())
        values = {"train_min": float(low.min()), "train_max": float(high.max()), "constant_nodes": constant}
        shape = list(self.conditions.values.shape[1:]) if self.conditions is not None else []
        return (
            report | values | {"condition": " x ".join(map(str, shape)) or "none", "in_memory": self.memory is not None}
        )
