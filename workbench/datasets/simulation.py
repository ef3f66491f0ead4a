"""Simulations: a file of fields, and a table or pictures of what each run was computed from."""

import json
from pathlib import Path

import numpy as np

from workbench.datasets.arrays import LazyArray, open_array
from workbench.datasets.cache import locked, make_folder
from workbench.datasets.conditions import Conditions, check_finite, read_images, read_table
from workbench.datasets.fields import SimulationConfig, Simulations
from workbench.datasets.frames import DataError
from workbench.datasets.plate import write_plate
from workbench.datasets.run_ids import read_ids
from workbench.paths import outputs_root, resolve
from workbench.progress import Progress


def open_simulation(config: SimulationConfig) -> Simulations:
    """Open simulations; a first opening reads every run once, to check and scale the fields.

    `nodes.csv` (one row of coordinates per node) beside the fields gives the nodes their places in figures.

    Raises:
        DataError: anything about the data that cannot be used as it is.
    """
    source = _source(config)
    folder = source.parent
    arrays = [open_array(source, config.field)]
    if config.test_data:
        arrays.append(open_array(resolve(config.test_data), config.field))
    for array in arrays:
        _check_shape(config, array, arrays[0])
    runs = sum(array.shape[0] for array in arrays)
    conditions, ids = _conditions(config, folder, arrays, runs)
    main = arrays[0].shape[0]
    ids = ids or [str(i) if i < main else f"test/{i - main}" for i in range(runs)]
    manifest = folder / "plate.json"
    units = json.loads(manifest.read_text())["units"] if config.data == "plate" else {}
    return Simulations(config, arrays, ids, conditions, _coordinates(config, folder, arrays[0]), units)


def _source(config: SimulationConfig) -> Path:
    if config.data != "plate":
        return resolve(config.data)
    folder = outputs_root() / "cache" / "plate"
    make_folder(folder.parent, "WORKBENCH_OUTPUTS")
    with locked(folder.with_name("plate.lock")):
        if not folder.exists():
            with Progress(240, "solving plate", "run") as progress:
                return write_plate(folder, progress=lambda done, total: progress.update()) / "fields.npy"
        return write_plate(folder) / "fields.npy"


def _check_shape(config: SimulationConfig, array: LazyArray, first: LazyArray) -> None:
    shape = array.shape
    if len(shape) not in (3, 4):
        raise DataError(f"{array.path}: fields of shape {shape}: must be (runs, steps, nodes) or with variables last")
    if shape[1:] != first.shape[1:]:
        raise DataError(f"test_data {array.path} has runs of shape {shape[1:]}, {first.path} of {first.shape[1:]}")
    for name, value, size in (
        ("time_steps", config.time_steps, shape[1]),
        ("node_end", config.node_end, shape[2]),
        ("node_start", config.node_start + 1, shape[2]),
    ):
        if value > size:
            value = value - (name == "node_start")
            raise DataError(f"{name}={value}: {array.path} has {shape[1]} time steps and {shape[2]} nodes; lower it")


def _ids(config: SimulationConfig, folder: Path, arrays: list[LazyArray], runs: int) -> list[str] | None:
    """Ids that the fields come with, those of `test_data` last; None where they have none."""
    if config.data == "plate":
        return read_table(folder / "conditions.csv", runs, None)[2]
    each = [(array.path, read_ids(array.path, array.shape[0], array.name)) for array in arrays]
    lacking = [path for path, ids in each if ids is None]
    if len(lacking) == len(each):
        return None
    if lacking:
        other = next(path for path, ids in each if ids is not None)
        raise DataError(f"{lacking[0]}: carries no ids of its runs, {other} does; give both an array 'id', or neither")
    ids = [name for _, part in each for name in part]
    if len(set(ids)) < len(ids):
        (main, known), (test, others) = each
        twice = sorted(set(known) & set(others), key=others.index)
        raise DataError(
            f"test_data {test}: id {twice[0]!r} is also that of a run of {main} ({len(twice)} of {len(others)} runs "
            "are such); remove from one file what is in both, or give each run its own id"
        )
    return ids


def _conditions(
    config: SimulationConfig, folder: Path, arrays: list[LazyArray], runs: int
) -> tuple[Conditions | None, list[str] | None]:
    """Conditions and ids of the runs, as far as there are any; rows and pictures are matched to ids of the fields."""
    ids = _ids(config, folder, arrays, runs)
    if config.condition_field:
        return _condition_field(config, arrays), ids
    if not config.conditions and config.data != "plate":
        return None, ids
    path = resolve(config.conditions) if config.conditions else folder / "conditions.csv"
    if path.is_dir():
        pictures, ids = read_images(path, runs, ids, config.condition_image_size, config.condition_colour)
        return Conditions([], pictures), ids
    names, values, ids = read_table(path, runs, ids)
    return Conditions(names, values), ids


def _condition_field(config: SimulationConfig, arrays: list[LazyArray]) -> Conditions:
    """Conditions that lie in the files of the fields, in the order of the runs."""
    parts = [open_array(array.path, config.condition_field) for array in arrays]
    for part, array in zip(parts, arrays, strict=True):
        if len(part.shape) != 2 or part.shape[0] != array.shape[0]:
            found = f"has shape {part.shape}, the fields have {array.shape[0]} runs"
            raise DataError(f"{part.path}: condition_field {config.condition_field!r} {found}; give (runs, values)")
    values = np.concatenate([part.read(np.arange(part.shape[0])) for part in parts])
    names = [f"{config.condition_field}[{i}]" for i in range(values.shape[1])]
    check_finite(names, values, None, str(parts[0].path))
    return Conditions(names, values)


def _coordinates(config: SimulationConfig, folder: Path, array: LazyArray) -> np.ndarray | None:
    path = folder / "nodes.csv"
    if not path.exists():
        return None
    _, places, _ = read_table(path, array.shape[2], None, "node")
    return places[config.node_start : config.node_end or None]
