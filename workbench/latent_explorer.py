"""The latent explorer of what a model has learned: a map of held-out samples to walk on, live in JupyterLab."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from workbench.action_codes import Actions, actions_of
from workbench.action_comparison import full_pairs
from workbench.action_exploration import CODES, ActionExploration, load_action_model
from workbench.colouring import colour_points
from workbench.comparison import encode_split
from workbench.datasets.clips import ClipDataset, Clips
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import DATA, Data, open_data
from workbench.exploration import Exploration
from workbench.explorer_widget import LatentExplorer, restore
from workbench.layers import Posterior
from workbench.models import VAES
from workbench.models.conditioners import Conditioner
from workbench.models.laq import LAQ
from workbench.paired_exploration import PairedExploration
from workbench.paths import resolve
from workbench.predictions import Predictor, load_conditioner
from workbench.process import pick_device
from workbench.provenance import check_same_data
from workbench.rivals import Rival
from workbench.runs import Run, RunError, differences, load_run
from workbench.spaces import Space, State

ERROR = "error"
"""Column of errors, which every space has."""
ENCODED = 64
"""Samples encoded at a time."""


def open_explorer(space: Space, data: Data, run: Run, column: str = "", pins: Sequence[int] = ()) -> LatentExplorer:
    """The explorer of any space.

    Its state (pins, place on the path, values of sliders) is kept in memory by run folder, so that a cell which is run
    again goes on where it was.

    Args:
        space: What is explored.
        data: The opened data, which say what columns mean.
        run: Where strips are saved.
        column: Column of the samples that colours the map; the data's main one where empty. Where they have none
            named `error`, that is the error of each as it is decoded.
        pins: Samples pinned as A and B to begin with, at most two.

    Raises:
        DataError: the column is absent, or holds numbers that are not finite.
        ValueError: more than two pins, or pins that are no samples.
    """
    n, colouring = len(space.points), colour_points(*_column(space, data, column or data.main_column))
    if len(pins) > 2 or any(not 0 <= pin < n for pin in pins):
        raise ValueError(f"pins={list(pins)}: must be at most two samples, from 0 to {n - 1}")
    a, b = [*map(int, pins), -1, -1][:2]
    mode = "path" if b >= 0 and space.walks else "conditions" if space.conditions else "pin"
    state, note = restore(space, run, State(pin_a=a, pin_b=b, mode=mode))
    return LatentExplorer(space, colouring, run, state, note)


def _column(space: Space, data: Data, name: str) -> tuple[np.ndarray, str]:
    """Values of a column, one of each sample, and what they are."""
    if name == ERROR and ERROR not in space.samples.table():
        return space.errors()
    return space.samples.column(name), data.condition_label(name)


def explore(
    model: nn.Module,
    samples: Dataset,
    posterior: Posterior,
    data: Data,
    run: Run,
    column: str = "",
    pins: Sequence[int] = (),
    dimensions: int = 6,
    span: int | float = 3.0,
    **settings: Any,
) -> LatentExplorer:
    """The explorer of a model's latent space over some samples.

    Args:
        samples: The samples on the map, a split of the data.
        posterior: Their posterior, see `comparison.encode_split`.
        data: The opened data.
        run, column, pins: See `open_explorer`.
        dimensions, span: See `Exploration`.
        settings: Of it: predictor, precision, projection.

    Raises:
        DataError, ValueError, ImportError: see `Exploration` and `open_explorer`.
    """
    space = Exploration(model, samples, posterior, data, dimensions, span, **settings)
    return open_explorer(space, data, run, column, pins)


def explore_actions(
    rival: Rival,
    pairs: ClipDataset,
    actions: Actions,
    data: Clips,
    run: Run,
    column: str = "",
    pins: Sequence[int] = (),
    **settings: Any,
) -> LatentExplorer:
    """The explorer of latent actions of pairs of frames.

    Args:
        rival, pairs, actions, data: See `ActionExploration`.
        run, column, pins: See `open_explorer`; `codes` is a column too, and where there are codes the main one.
        settings: Of `ActionExploration`: words, precision, projection.

    Raises:
        DataError, ValueError, ImportError: see `ActionExploration` and `open_explorer`.
    """
    space = ActionExploration(rival, pairs, actions, data, **settings)
    return open_explorer(space, data, run, column or (CODES if space.codes else ""), pins)


def explore_run(
    path: str | Path,
    split: str = "test",
    column: str = "",
    most: int = 5000,
    checkpoint: str = "final",
    device: str = "auto",
    precision: str = "",
    projection: str = "pca",
) -> LatentExplorer:
    """The explorer of a trained run; strips go into its folder.

    Of an autoencoder it shows the latents of single samples; of a conditioner those of its VAE, with sliders of the
    conditions; of a LAQ the actions of pairs of frames.

    Args:
        path: Run folder; a relative path is taken from the project's root.
        split: Samples on the map: `train`, `val` or `test`.
        column: See `open_explorer`.
        most: At most so many samples; 0: all.
        checkpoint: `final` weights, or the `best`.
        device: Where the model runs.
        precision: Of decoding, `fp32` or `bf16`; as the run was trained where empty.
        projection: See `Exploration`.

    Raises:
        RunError: the run is unfinished, was trained on other data, or says not on which.
        CheckpointError: its files are damaged.
        DataError, ValueError, ImportError: see `explore`, `explore_actions` and `open_data`.
    """
    path = resolve(path)
    model, trained = _load(path, checkpoint)
    settings = {"precision": precision or _precision_of(trained), "projection": projection}
    if isinstance(model, LAQ):
        rival, data = load_action_model(path, checkpoint)
        rival.model.to(pick_device(device))
        pairs = full_pairs(data.split(split)).subset(most)
        actions = actions_of(rival, pairs, ENCODED)
        return explore_actions(rival, pairs, actions, data, Run(path), column, **settings)
    if isinstance(model, Conditioner):
        conditioner, vae, data = load_conditioner(path, checkpoint)
        samples = data.split(split).subset(most)
        predictor = Predictor(conditioner.to(pick_device(device)), samples, data)
        vae.to(pick_device(device))
        posterior = encode_split(vae, samples, ENCODED)
        return explore(vae, samples, posterior, data, Run(path), column, predictor=predictor, **settings)
    model.to(pick_device(device))
    data = _open_data(path, trained)
    samples = data.split(split).subset(most)
    return explore(model, samples, encode_split(model, samples, ENCODED), data, Run(path), column, **settings)


def explore_runs(
    paths: Sequence[str | Path],
    run: Run | None = None,
    split: str = "test",
    column: str = "",
    pins: Sequence[int] = (),
    most: int = 5000,
    checkpoint: str = "final",
    device: str = "auto",
    precision: str = "",
    projection: str = "pca",
) -> LatentExplorer:
    """The explorer of two trained autoencoders side by side: one A, B and place between them, decoded by each.

    Args:
        paths: Folders of two runs on the same samples.
        run: Where strips are saved; the first of them where there is no other.
        pins: See `open_explorer`.
        split, column, most, checkpoint, device, precision, projection: See `explore_run`.

    Raises:
        RunError: as `explore_run`; or there are not two different runs, or they were trained on other samples, or are
            no autoencoders.
        CheckpointError: files are damaged.
        DataError, ValueError, ImportError: see `PairedExploration`, `Exploration` and `open_explorer`.
    """
    names = _names(paths)
    runs = {path: _load(path, checkpoint) for path in names}
    _check_same_samples({path: trained for path, (_, trained) in runs.items()})
    first = next(iter(runs))
    data = _open_data(first, runs[first][1])
    samples, spaces = data.split(split).subset(most), {}
    for path, (model, trained) in runs.items():
        posterior = encode_split(model.to(pick_device(device)), samples, ENCODED)
        settings = {"precision": precision or _precision_of(trained), "projection": projection}
        spaces[names[path]] = Exploration(model, samples, posterior, data, **settings)
    return open_explorer(PairedExploration(spaces), data, run or Run(first), column, pins)


def _load(path: Path, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_run`, of a run that says what it was trained on."""
    model, trained = load_run(path, checkpoint)
    if "data" not in trained or not {"data_kind", "vae_run"} & trained.get("parameters", {}).keys():
        raise RunError(f"{path / 'config.json'} says not on which data: restore it, or train the run again")
    return model, trained


def _open_data(path: Path, trained: dict[str, Any]) -> Data:
    """The data of a run, as they were when it was trained."""
    data = open_data(trained["parameters"])
    check_same_data(path, trained, data.fingerprint)
    return data


def _names(paths: Sequence[str | Path]) -> dict[Path, str]:
    """The folders of two runs, and as much of the end of each as tells them apart.

    Raises:
        RunError: there are not two different ones.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    folders = list(dict.fromkeys(map(resolve, paths)))
    if len(folders) != 2:
        raise RunError(f"{len(folders)} run(s) ({', '.join(map(str, paths))}): must be two different ones; name two")
    one, other = (list(reversed(folder.parts)) for folder in folders)
    same = next(i for i, (a, b) in enumerate(zip_longest(one, other)) if a != b)
    return {folder: "/".join(folder.parts[-same - 1 :]) for folder in folders}


def _precision_of(trained: dict[str, Any]) -> str:
    """The precision that a run was trained in."""
    return trained["parameters"].get("precision", "fp32")


def _check_same_samples(runs: dict[Path, dict[str, Any]]) -> None:
    """Refuse runs that are no autoencoders of the same samples; the settings in which their data differ are named."""
    samples = []
    for path, trained in runs.items():
        kind, parameters = trained["model"]["kind"], trained["parameters"]
        if kind not in VAES.values():
            raise RunError(f"{path} holds a model of kind {kind!r}: must be one of {', '.join(VAES.values())}")
        settings = DATA[parameters["data_kind"]][0].pick(parameters).model_dump()
        samples.append({"data_kind": parameters["data_kind"], "fingerprint": trained["data"]["fingerprint"]} | settings)
    first = next(iter(runs))
    for path, other in zip(runs, samples, strict=True):
        if other["fingerprint"] != samples[0]["fingerprint"]:
            found = differences(samples[0], other)
            kinds = [line for line in found if line.startswith("data_kind:")]  # nothing else is common to two kinds
            raise RunError(
                f"{first} and {path} were trained on other samples: {', '.join(kinds or found)} ('there' is the first "
                "of them). Choose runs of the same data and split, or train one of them again"
            )
