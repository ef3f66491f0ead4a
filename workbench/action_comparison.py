"""VAE and latent action models on the same held-out pairs of frames: errors, rates, features for probes, verdicts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.comparison import Distance, Predict, batches, prediction_errors
from workbench.costs import forward_gflops, step_memory_mb
from workbench.datasets.clips import ClipDataset, normalize
from workbench.datasets.frames import DataError, FrameError, load_image
from workbench.datasets.loading import Batch, to_device
from workbench.gains import Gain, gain_db, gain_sentence
from workbench.metrics import image_errors
from workbench.paths import resolve
from workbench.process import out_of_memory
from workbench.rivals import Rival, first_seeds, weighted_loss
from workbench.schedule import TrainConfig

COPY = "copy the first frame"
MEAN = "mean frame"
FLOOR = -1
"""In place of a seed, for what is not trained."""


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

    Latent action models are there a second time, with `one_code` for all pairs.

    Returns:
        Columns name, seed (-1 for floors), group, mse, psnr, ssim, and lpips where a distance is given.
    """
    methods = {(rival.name, rival.seed): rival.predict for rival in models}
    usual = {(r.name, r.seed): usual_code(r, dataset, batch_size) for r in models if r.acts}
    methods |= {(one_code(r.name), r.seed): partial(_under, r, usual[r.name, r.seed]) for r in models if r.acts}
    methods |= {(name, FLOOR): predict for name, predict in floors.items()}
    numbered = {str(i): predict for i, predict in enumerate(methods.values())}
    errors = prediction_errors(numbered, dataset, batch_size, device, distance=distance)
    names = pd.DataFrame(list(methods), columns=["name", "seed"])
    return names.iloc[errors.pop("method").astype(int)].reset_index(drop=True).join(errors)


@torch.inference_mode()
def usual_code(rival: Rival, dataset: ClipDataset, batch_size: int) -> Tensor:
    """The most frequent word of indices among some pairs (n,); of continuous actions, their mean (n, d)."""
    device = next(rival.model.parameters()).device
    found = [rival.model.encode(batch["first"], batch["x"]) for batch in batches(dataset, batch_size, device)]
    if found[0].indices is None:
        return torch.cat([action.codes for action in found]).mean(0)
    words, counts = torch.unique(torch.cat([action.indices for action in found]), dim=0, return_counts=True)
    return words[counts.argmax()]


def _under(rival: Rival, code: Tensor, batch: Batch) -> Tensor:
    """What a model imagines under one code for all pairs."""
    return rival.imagine(batch["first"], code.expand(len(batch["first"]), *code.shape))


def one_code(name: str) -> str:
    """What tables call a latent action model that is given the same, most usual code for every pair."""
    return f"{name}, one code for all"


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
    """Gain of a model over a floor in dB for each of its seeds; over another model, for the seeds of both."""
    own, other = (dict(list(errors[errors["name"] == name].groupby("seed"))) for name in (model, floor))
    found = {}
    for seed, rows in own.items():
        beside = other.get(FLOOR, other.get(seed))
        if beside is not None:
            found[int(seed)] = gain_db(rows["mse"].to_numpy(), beside["mse"].to_numpy(), rows["group"].to_numpy())
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
        memory = _memory(rival, batch, training)
        rows[name] = {
            "parameters": sum(p.numel() for p in rival.model.parameters()),
            "gflops": forward_gflops(rival.predict, batch),
            "memory_mb": memory,
            "training_samples": rival.samples,
            "samples_per_s": rival.samples / rival.seconds if rival.seconds else None,
            "seconds": rival.seconds,
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def _memory(rival: Rival, batch: Batch, training: TrainConfig) -> float:
    """Memory of a training step in MB; NaN where the whole batch does not fit, and training took it in pieces."""
    try:
        return step_memory_mb(rival.model, lambda m, b: weighted_loss(m, b, training), batch, training.precision)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return float("nan")


# --- verdicts ---


def error_verdicts(errors: pd.DataFrame, models: Sequence[Rival], pca: str) -> dict[str, str]:
    """Question and answer for each model beside its own floor, and for LAQ beside a continuous latent action."""
    rows = {}
    for name, rival in first_seeds(models).items():
        for floor, shown in ((COPY, "copy-frame"), (MEAN, MEAN)) if rival.acts else ((pca, pca),):
            rows[f"Does {name} beat {shown}?"] = gain_sentence(gains(errors, name, floor), name, shown)
        if rival.acts:
            other = gains(errors, name, one_code(name))
            rows[f"What does the code of {name} add?"] = gain_sentence(other, name, "itself with one code for all")
    one, continuous = (first_seeds(models).get(name) for name in ("LAQ", "LAQ continuous"))
    if continuous and one.samples == continuous.samples and one.model.config.quantizer != "continuous":
        matched = gains(errors, "LAQ", "LAQ continuous")
        if matched:
            rows["What does quantising the action cost?"] = gain_sentence(matched, "LAQ", "a continuous latent action")
    return rows
