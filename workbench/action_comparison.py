"""VAE and latent action models on the same held-out pairs of frames: errors, rates, features for probes, verdicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.comparison import Distance, Predict, prediction_errors
from workbench.costs import forward_gflops, step_memory_mb
from workbench.datasets.clips import ClipDataset, normalize
from workbench.datasets.frames import DataError, FrameError, load_image
from workbench.datasets.loading import Batch, to_device
from workbench.metrics import image_errors
from workbench.paths import resolve
from workbench.probes import (
    Gain,
    gain_db,
    gain_sentence,
)
from workbench.rivals import Rival, first_seeds, weighted_loss
from workbench.schedule import TrainConfig

COPY = "copy the first frame"
MEAN = "mean frame"


# --- pairs ---


def full_pairs(dataset: ClipDataset) -> ClipDataset:
    """The pairs that are `pair_offset` frames apart: none that the end of its clip has shortened.

    Raises:
        DataError: there are none.
    """
    offset = dataset.clips.config.pair_offset
    if not offset:
        raise DataError("pair_offset=0: these are single frames, not pairs; choose a pair_offset of at least 1")
    whole = dataset.slots[:, -1] - dataset.slots[:, 0] == offset
    if not whole.any():
        raise DataError(
            f"pair_offset={offset}: none of {len(dataset)} held-out pairs is so many frames apart, as these clips are "
            "shorter; choose a smaller pair_offset, or hold out more clips"
        )
    return ClipDataset(dataset.clips, dataset.slots[whole], dataset.segment[whole])


def joined(one: ClipDataset, other: ClipDataset) -> ClipDataset:
    """The samples of two splits of the same clips."""
    slots, segment = np.concatenate((one.slots, other.slots)), np.concatenate((one.segment, other.segment))
    return ClipDataset(one.clips, slots, segment)


def displacement(dataset: ClipDataset, columns: Sequence[str]) -> Float[np.ndarray, "n k"]:
    """How far some conditions move from the first frame of each pair to the second, in their units.

    Raises:
        DataError: a column that the data's conditions do not have.
    """
    names, values = dataset.clips.condition_names, dataset.clips.conditions
    absent = [column for column in columns if column not in names]
    if absent:
        raise DataError(f"displacement={absent}: the conditions are {', '.join(names) or 'none'}; choose among them")
    places = [names.index(column) for column in columns]
    first, last = (values[dataset.slots[:, i]][:, places].astype(float) for i in (0, 1))
    return last - first


def open_pair(first: str | Path, second: str | Path, image_size: int, allow_upscale: bool) -> Batch:
    """Two image files as a batch of one pair, cropped and scaled as clips are.

    Raises:
        DataError: one is absent, does not decode, or is too small.
    """
    frames = {}
    for name, path in (("first", resolve(str(first))), ("x", resolve(str(second)))):
        try:
            frames[name] = normalize(torch.from_numpy(load_image(path, image_size, allow_upscale)[0].copy())[None])
        except FrameError as error:
            raise DataError(f"{path}: {error}; give another image file") from None
    return frames


@torch.inference_mode()
def predict_pair(
    models: Sequence[Rival], floors: Mapping[str, Predict], pair: Batch, device: torch.device
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """The second frame of a pair as each model and floor gives it, and its errors (mse, psnr, ssim), one row each."""
    batch = {key: value.to(device) for key, value in pair.items()}
    methods = {rival.name: rival.predict for rival in models} | dict(floors)
    predictions = {name: predict(batch).cpu() for name, predict in methods.items()}
    errors = {name: image_errors(x_hat, pair["x"]) for name, x_hat in predictions.items()}
    rows = {name: {figure: float(value) for figure, value in found.items()} for name, found in errors.items()}
    return predictions, pd.DataFrame.from_dict(rows, orient="index")


# --- errors ---


def pair_errors(
    models: Sequence[Rival],
    floors: Mapping[str, Predict],
    dataset: ClipDataset,
    batch_size: int,
    device: torch.device,
    distance: Distance | None = None,
) -> pd.DataFrame:
    """Errors of the second frames as each model and floor gives them, one row per model, training seed and pair.

    Latent action models are there a second time, `swapped`: under the code of another pair.

    Returns:
        Columns name, seed, group, mse, psnr, ssim, and lpips where a distance is given.
    """
    methods = {(rival.name, rival.seed): rival.predict for rival in models}
    methods |= {(swapped(rival.name), rival.seed): rival.predict_swapped for rival in models if rival.acts}
    methods |= {(name, 0): predict for name, predict in floors.items()}
    numbered = {str(i): predict for i, predict in enumerate(methods.values())}
    errors = prediction_errors(numbered, dataset, batch_size, device, distance=distance)
    names = pd.DataFrame(list(methods), columns=["name", "seed"])
    return names.iloc[errors.pop("method").astype(int)].reset_index(drop=True).join(errors)


def swapped(name: str) -> str:
    """What tables call a latent action model under the codes of other pairs."""
    return f"{name}, code of another pair"


def over_seeds(errors: pd.DataFrame) -> pd.DataFrame:
    """Each figure by name: its mean, its standard error over clips (`_se`), its deviation over seeds (`_sd`); `seeds`.

    The mean is over the clips' means of all seeds; a single seed has no deviation (NaN).
    """
    figures = [column for column in errors if column not in ("name", "seed", "group")]
    of_clip = errors.groupby(["name", "group"], sort=False)[figures].mean().groupby("name", sort=False)
    of_seed = (
        errors.groupby(["name", "seed", "group"], sort=False)[figures].mean().groupby(["name", "seed"], sort=False)
    )
    by_seed = of_seed.mean().groupby("name", sort=False)
    table = of_clip.mean().join(of_clip.sem().add_suffix("_se")).join(by_seed.std().add_suffix("_sd"))
    table = table[[column for name in figures for column in (name, f"{name}_se", f"{name}_sd")]]
    return table.assign(seeds=by_seed.size())


def gains(errors: pd.DataFrame, model: str, floor: str) -> dict[int, Gain]:
    """Gain of a model over a floor in dB for each seed of the model; the floor's seeds, where it has them, in order."""
    of = {name: list(part.groupby("seed")) for name, part in errors.groupby("name") if name in (model, floor)}
    found = {}
    for i, (seed, rows) in enumerate(of[model]):
        other = of[floor][i % len(of[floor])][1]
        found[int(seed)] = gain_db(rows["mse"].to_numpy(), other["mse"].to_numpy(), rows["group"].to_numpy())
    return found


def cost_table(models: Sequence[Rival], dataset: ClipDataset, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """What each model costs, of its first seed: parameters, arithmetic, memory, and its training.

    Args:
        models: Trained or loaded.
        dataset: Of which a batch is taken.
        parameters: Of the training (`TrainConfig`): batch size, precision and weights of the terms.

    Returns:
        By name: parameters, gflops (per predicted frame), memory_mb (of a training step), training_samples,
        samples_per_s, seconds; NaN where a loaded file does not tell.
    """
    training, rows = TrainConfig.pick(parameters), {}
    for name, rival in first_seeds(models).items():
        device = next(rival.model.parameters()).device
        count = min(training.batch_size, len(dataset))
        batch = dataset.prepare(to_device(dataset.batch(np.arange(count)), device))
        memory = step_memory_mb(rival.model, lambda m, b: weighted_loss(m, b, training), batch, training.precision)
        rows[name] = {
            "parameters": sum(p.numel() for p in rival.model.parameters()),
            "gflops": forward_gflops(rival.predict, batch),
            "memory_mb": memory,
            "training_samples": rival.samples,
            "samples_per_s": rival.samples / rival.seconds if rival.seconds else None,
            "seconds": rival.seconds,
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


# --- verdicts ---


def error_verdicts(errors: pd.DataFrame, models: Sequence[Rival], pca: str) -> dict[str, str]:
    """Question and answer for each model beside its own floor, and for LAQ beside a continuous latent action."""
    rows = {}
    for name, rival in first_seeds(models).items():
        for floor, shown in ((COPY, "copy-frame"), (MEAN, MEAN)) if rival.acts else ((pca, pca),):
            rows[f"Does {name} beat {shown}?"] = gain_sentence(gains(errors, name, floor), name, shown)
        if rival.acts:
            other = gains(errors, name, swapped(name))
            rows[f"What does the code of {name} add?"] = gain_sentence(other, name, "itself with another pair's code")
    if {"LAQ", "LAQ continuous"} <= {rival.name for rival in models}:
        costs = gain_sentence(gains(errors, "LAQ", "LAQ continuous"), "LAQ", "a continuous latent action")
        rows["What does quantising the action cost?"] = costs
    return rows
