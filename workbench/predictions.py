"""Latents predicted from conditions that a person chooses, and the runs whose conditioner does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.conditioning import check_conditions, frozen
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import Data, open_data
from workbench.models.conditioners import Conditioner
from workbench.provenance import check_same_data, check_source
from workbench.runs import Run, RunError, load_run
from workbench.spaces import Range


class Predictor:
    """What a conditioner predicts from numbers, and the numbers of some samples.

    Attributes: `ranges`, one for each condition: its label with its unit, and its values in the training split, wider
    where one of the samples lies outside. Conditions that are pictures have none, as nobody can choose them.

    Args:
        conditioner: In evaluation mode, wherever it is.
        samples: The samples whose own conditions are asked for.
        data: What they are from.

    Raises:
        ValueError: the data have no conditions.
    """

    def __init__(self, conditioner: Conditioner, samples: Dataset, data: Data) -> None:
        check_conditions(data)
        self.conditioner, self.samples, self.ranges, self._own = conditioner, samples, [], torch.empty(len(samples), 0)
        if samples.conditions(np.array([0])).dim() == 2:
            self._own, train = samples.conditions(np.arange(len(samples))), data.split("train")  # (n, c)
            seen = torch.cat([train.conditions(np.arange(len(train))), self._own])
            limits = zip(data.condition_names, seen.amin(0).tolist(), seen.amax(0).tolist(), strict=True)
            self.ranges = [Range(data.condition_label(name), low, high) for name, low, high in limits]

    def own(self, sample: int) -> tuple[float, ...]:
        """Conditions of a sample, in their units."""
        return tuple(self._own[sample].tolist())

    def codes(self, values: Sequence[float]) -> Float[Tensor, " d"]:
        """The flat latent that is predicted, on the CPU.

        Raises:
            ValueError: not one value for each condition, or the conditions are pictures.
        """
        if not self.ranges:
            raise ValueError("the conditions are pictures, which no slider makes: choose a sample of the map")
        if len(values) != len(self.ranges):
            raise ValueError(f"{len(values)} values of conditions: must be {len(self.ranges)}, one for each")
        return self._predict(torch.tensor([list(values)]))

    def own_codes(self, sample: int) -> Float[Tensor, " d"]:
        """The flat latent that is predicted from a sample's own conditions, on the CPU."""
        return self._predict(self.samples.conditions(np.array([sample])))

    @torch.inference_mode()
    def _predict(self, condition: Float[Tensor, "1 c ..."]) -> Float[Tensor, " d"]:
        return self.conditioner.codes(condition.to(self.conditioner.code_mean.device))[0].float().cpu()

    def describe(self, values: Sequence[float]) -> str:
        """The conditions by their labels: `speed [m/s] = 1.25, width [mm] = 3`."""
        return ", ".join(f"{range_.name} = {value:.4g}" for range_, value in zip(self.ranges, values, strict=True))


def load_conditioner(path: str | Path, checkpoint: str = "final") -> tuple[Conditioner, nn.Module, Data]:
    """The conditioner of a run of notebook 03, the VAE whose latents it predicts, frozen, and the data of both.

    Args:
        path: Run folder; the VAE's lies beside it.
        checkpoint: Weights of the conditioner, see `load_run`; the VAE's are those it was trained on.

    Raises:
        RunError: the run is unfinished, holds no conditioner, or is a part of a comparison; or the VAE, the data or
            the conditions are absent or no longer those it was trained on.
        CheckpointError: its files are damaged.
        DataError: see `open_data`.
    """
    path = Path(path)
    conditioner, config = load_run(path, checkpoint)
    if not isinstance(conditioner, Conditioner):
        raise RunError(f"{path} holds a model of kind {config['model']['kind']!r}: must be a conditioner")
    if "source" not in config:
        raise RunError(f"{path} is a part of a comparison, which says not of which VAE: take the run it is a part of")
    check_source(Run(path))
    vae_path, chosen = path.parent / config["source"]["run"], config["parameters"]
    vae, trained = load_run(vae_path, chosen["checkpoint"])
    given = {name: chosen[name] for name in ("conditions", "condition_field") if chosen[name]}
    data = open_data(trained["parameters"] | given)
    check_same_data(vae_path, trained, data.fingerprint)
    _check_same_conditions(path, config, data)
    return conditioner, frozen(vae), data


def _check_same_conditions(path: Path, config: dict[str, Any], data: Data) -> None:
    trained = config["data"]["conditions"]
    if trained != data.condition_fingerprint:
        raise RunError(
            f"{path} was trained on other conditions (fingerprint {trained}, now {data.condition_fingerprint}): put "
            "them back as they were, or train a run on these"
        )
