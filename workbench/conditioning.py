"""From conditions to codes to samples: what a conditioner is trained on, and by which of its two objectives."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from workbench.config import Config
from workbench.datasets.loading import Batch, Dataset
from workbench.datasets.opening import Data
from workbench.losses import ERRORS, huber, mean_absolute_error, mean_squared_error
from workbench.models import MODELS
from workbench.models.conditioners import Conditioner
from workbench.models.enhanced_losses import (
    AS_THE_PRESET,
    Enhancement,
    FeatureNetworks,
    augment_condition,
    consistency,
    enhancement,
)
from workbench.runs import Run
from workbench.schedule import TrainConfig, Weights
from workbench.training import fit


class ConditioningConfig(Config):
    """How a conditioner is built, and what it is trained for.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    mode: Literal["latent", "end_to_end"] = "latent"
    """Error of the codes, or of the field that the frozen decoder makes of them."""
    conditioner: Literal["mlp", "cnn"] = "mlp"
    """For rows of numbers, or for pictures."""
    width: int = Field(128, ge=1)
    """Features of the MLP, or channels of the CNN's first stage."""
    depth: int = Field(3, ge=1)
    """Residual blocks of the MLP, or stages of the CNN."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the last block; it grows with depth."""
    input_norm: Literal["embedded", "raw"] = "embedded"
    """Layer norm of the MLP after its first linear layer, or on its input, as published."""
    spatial_attention: bool = False
    """Of the CNN: weigh positions."""
    conditioner_spectral_norm: bool = False
    """Of the CNN: hold the largest singular values of its weights at 1."""
    main_weight: float = Field(10.0, ge=0, allow_inf_nan=False)
    """Weight of the main latent's error, of standardised codes."""
    hier_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the hierarchical codes' error, of standardised codes."""
    field_loss: Literal["mse", "mae", "smooth_l1", "huber"] = "mse"
    """End to end: error of the field on the scale of x."""
    latent_reg_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    """End to end: weight of the weighted latent error."""
    checkpoint_decoder: bool = False
    """End to end: compute the decoder again in the backward pass, for less memory."""
    preset: Literal["none", "balanced", "robust", "semantic", "fast", "small_dataset"] = "none"
    """Weights of the enhanced losses."""
    mae_weight: float = AS_THE_PRESET
    """Weight of the absolute error (-1: as the preset says)."""
    huber_weight: float = AS_THE_PRESET
    """Weight of the Huber error (-1: as the preset says)."""
    perceptual_weight: float = AS_THE_PRESET
    """Weight of the distance between features of the codes (-1: as the preset says)."""
    consistency_weight: float = AS_THE_PRESET
    """Weight of the difference that noise in the condition makes (-1: as the preset says)."""
    consistency_noise: float = Field(0.05, ge=0, allow_inf_nan=False)
    """That noise [standard deviations of the condition]."""
    consistency_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """What the predictions are divided by in that difference."""

    @model_validator(mode="after")
    def _weighted(self) -> "ConditioningConfig":
        if self.main_weight == 0 and self.hier_weight == 0:
            raise ValueError("main_weight=0.0 with hier_weight=0.0: one of them must be more than 0")
        _ = self.enhanced  # refuses weights out of range
        return self

    @property
    def enhanced(self) -> Enhancement:
        """Weights of the enhanced losses, the preset's where none is given."""
        names = ("mae_weight", "huber_weight", "perceptual_weight", "consistency_weight")
        return enhancement(self.preset, **{name: getattr(self, name) for name in names})


def build_conditioner(config: ConditioningConfig, vae: nn.Module, condition: Float[Tensor, "..."]) -> Conditioner:
    """A freshly initialised conditioner for the conditions of a sample and the latents of a VAE.

    Raises:
        ValueError: rows of numbers for a CNN, or pictures for an MLP; no weight on the only latent.
    """
    main, *hier = vae.latent_layout.shapes.values()
    shared = {"main_dim": int(np.prod(main)), "hier_dim": int(sum(np.prod(shape) for shape in hier))}
    if not shared["hier_dim"] and not config.main_weight:
        raise ValueError("main_weight=0: the VAE has no hierarchical codes, so nothing would be trained; raise it")
    shared |= {"width": config.width, "depth": config.depth, "dropout": config.dropout}
    shape, picture = tuple(condition.shape), condition.dim() == 3
    if picture != (config.conditioner == "cnn"):
        what, other = ("pictures", "cnn") if picture else ("rows of numbers", "mlp")
        raise ValueError(f"conditioner={config.conditioner!r}: the conditions are {what} {shape}; use {other!r}")
    if picture:
        own = {"image_size": shape[-1], "image_channels": shape[0], "spatial_attention": config.spatial_attention}
        own |= {"spectral_norm": config.conditioner_spectral_norm}
    else:
        own = {"condition_dim": shape[0], "input_norm": config.input_norm}
    model_class, config_class = MODELS[f"{config.conditioner}_conditioner"]
    return model_class(config_class(**shared, **own))


def frozen(vae: nn.Module) -> nn.Module:
    """The VAE in evaluation mode, its parameters without gradients and with spectral norms folded into the weights."""
    for module in vae.eval().modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return vae.requires_grad_(False)


def check_conditions(data: Data) -> None:
    """Refuse data without conditions.

    Raises:
        ValueError: with the remedy.
    """
    if not data.condition_fingerprint:
        raise ValueError(
            "the data of this VAE have no conditions, and a conditioner reads nothing else: give `conditions` (a CSV) "
            "or `condition_field`"
        )


class CodedDataset:
    """Samples of a split together with the codes that a VAE gives them.

    A sample holds `condition`, `z` (its flat latent) and, with `samples`, what the split's own samples hold.

    Args:
        dataset: A split with conditions.
        z: Latent of each of its samples.
        samples: Whether x is read too: not needed to train in latent mode.

    Raises:
        ValueError: the split has no conditions, or another number of samples than codes.
    """

    def __init__(self, dataset: Dataset, z: Float[Tensor, "n d"], samples: bool = True) -> None:
        if "condition" not in dataset[0]:
            raise ValueError("the data have no conditions, and a conditioner reads nothing else: give `conditions`")
        if len(z) != len(dataset):
            raise ValueError(f"{len(z)} codes for {len(dataset)} samples: must be as many; encode this very split")
        self.dataset, self.z, self.samples = dataset, z, samples

    def __len__(self) -> int:
        return len(self.dataset)

    def conditions(self) -> Float[Tensor, "n ..."]:
        """The condition of every sample."""
        return self.dataset.conditions(np.arange(len(self)))

    def batch(self, indices: np.ndarray) -> Batch:
        """Raw samples with their codes."""
        raw = self.dataset.batch(indices) if self.samples else {"condition": self.dataset.conditions(indices)}
        return raw | {"z": self.z[torch.as_tensor(indices)]}

    def prepare(self, batch: Batch) -> Batch:
        """Prepare a raw batch on the device it is on."""
        return self.dataset.prepare(batch) if self.samples else batch

    def name(self, index: int) -> str:
        """Name of a sample."""
        return self.dataset.name(index)


@dataclass
class Conditioning:
    """The objective of a conditioner: condition to codes, and on through the frozen decoder.

    The codes are compared standardised, by the conditioner's own buffers, so that every step from the condition to
    the loss is a tensor operation. In evaluation mode the terms `latent_main`, `latent_hier` and `error` are
    always there, so that all settings can be compared.

    Args:
        conditioner: The model that is trained.
        vae: The model whose codes it predicts, see `frozen`.
        config: Mode, weights and presets.
        error: Error of each sample by which settings are compared: (x_hat, x) on the scale of x.
    """

    conditioner: Conditioner
    vae: nn.Module
    config: ConditioningConfig
    error: Callable[[Tensor, Tensor], Tensor]

    @property
    def group(self) -> str:
        """First part of the tags in TensorBoard."""
        return "E2E" if self.config.mode == "end_to_end" else ""

    @cached_property
    def features(self) -> FeatureNetworks:
        """The networks of the perceptual term, on the conditioner's device."""
        sizes = self.conditioner.config
        with torch.inference_mode(False):  # first used in a validation, their weights must serve a training too
            networks = FeatureNetworks(sizes.main_dim, sizes.hier_dim)
            return networks.to(self.conditioner.code_mean.device)

    def predict(self, batch: Batch) -> Tensor:
        """The sample that the decoder makes of the condition."""
        return self.vae.decode(self.conditioner.codes(batch["condition"]))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted terms of a batch with `condition`, `z` and, end to end, x.

        `latent_main` and `latent_hier`: squared error of standardised codes; `reconstruction`: `field_loss` per
        element of x; `latent_regularization`: mean of the two latent errors by their weights; `mae` and `huber` of x
        end to end, `latent_mae_main`, … of the codes in latent mode; `perceptual` and `consistency`: see
        `models.enhanced_losses`. Evaluated only: `error`, the mean over samples of what settings are compared by.
        """
        model, training = self.conditioner, self.conditioner.training
        predicted = model(batch["condition"])  #                          (b, d), standardised
        target = (batch["z"] - model.code_mean) / model.code_std
        end_to_end = self.config.mode == "end_to_end"
        x_hat = self._decode(predicted * model.code_std + model.code_mean) if end_to_end or not training else None
        terms = {"reconstruction": ERRORS[self.config.field_loss](x_hat, batch["x"])} if end_to_end else {}
        latent = self._latent_errors(mean_squared_error, predicted, target)
        if not end_to_end or not training:
            terms |= {f"latent_{name}": value for name, value in latent.items()}
        if end_to_end:
            terms["latent_regularization"] = self._weighted(latent)
        terms |= self._enhanced(batch, predicted, target, x_hat)
        if not training:
            terms["error"] = self.error(x_hat.float(), batch["x"]).mean()
        return terms

    def _decode(self, z: Float[Tensor, "b d"]) -> Tensor:
        if self.config.checkpoint_decoder and z.requires_grad:
            return checkpoint(self.vae.decode, z, use_reentrant=False)
        return self.vae.decode(z)

    def _latent_errors(self, error: Callable, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """An error of the main latent, and of the hierarchical codes where there are any."""
        main = self.conditioner.config.main_dim
        parts = {"main": slice(None, main), "hier": slice(main, None)}
        used = {name: part for name, part in parts.items() if predicted[:, part].shape[1]}
        return {name: error(predicted[:, part], target[:, part]) for name, part in used.items()}

    def _weighted(self, errors: Mapping[str, Tensor]) -> Tensor:
        """Mean of the errors of main latent and hierarchical codes by their weights."""
        weights = {"main": self.config.main_weight, "hier": self.config.hier_weight}
        total = sum(weights[name] for name in errors)
        return sum(weights[name] * error for name, error in errors.items()) / total

    def _enhanced(self, batch: Batch, predicted: Tensor, target: Tensor, x_hat: Tensor | None) -> dict[str, Tensor]:
        """Those of the enhanced terms that have a weight."""
        weights, terms = self.config.enhanced, {}
        for name, error in (("mae", mean_absolute_error), ("huber", huber)):
            if getattr(weights, f"{name}_weight") and self.config.mode == "end_to_end":
                terms[name] = error(x_hat, batch["x"])
            elif getattr(weights, f"{name}_weight"):
                errors = self._latent_errors(error, predicted, target)
                terms |= {f"latent_{name}_{part}": value for part, value in errors.items()}
        if weights.perceptual_weight:
            terms["perceptual"] = self.features(predicted, target)
        if weights.consistency_weight:
            # evaluated on the same noise every time, whatever was drawn before
            drawn = None if self.conditioner.training else torch.Generator().manual_seed(0)
            std = self.conditioner.condition_std
            noisy = augment_condition(batch["condition"], self.config.consistency_noise, std, drawn)
            terms["consistency"] = consistency(predicted, self.conditioner(noisy), self.config.consistency_temperature)
        return terms

    def after_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """Nothing."""
        return {}

    def weights(self) -> Weights:
        """Weight of each term, the same at every step."""
        config, enhanced = self.config, self.config.enhanced
        parts = {"main": config.main_weight, "hier": config.hier_weight}
        if not self.conditioner.config.hier_dim:
            del parts["hier"]
        if config.mode == "end_to_end":
            weights = {"reconstruction": enhanced.mse_weight, "latent_regularization": config.latent_reg_weight}
            robust = {"mae": enhanced.mae_weight, "huber": enhanced.huber_weight}
        else:
            weights = {f"latent_{part}": enhanced.mse_weight * weight for part, weight in parts.items()}
            errors = {"mae": enhanced.mae_weight, "huber": enhanced.huber_weight}
            robust = {f"latent_{e}_{part}": w * errors[e] for e in errors for part, w in parts.items()}
        more = robust | {"perceptual": enhanced.perceptual_weight, "consistency": enhanced.consistency_weight}
        weights |= {name: weight for name, weight in more.items() if weight}
        return lambda progress: weights


@dataclass
class Task:
    """What the conditioners of one VAE are trained and measured on.

    Args:
        vae: See `frozen`; on the device to train on.
        data: With conditions.
        z: Flat latent of every sample of each split, by the split's name.
    """

    vae: nn.Module
    data: Data
    z: dict[str, Float[Tensor, "n d"]]

    def split(self, name: str, samples: bool = True) -> CodedDataset:
        """A split with its codes; without its samples where only the conditions are needed."""
        return CodedDataset(self.data.split(name), self.z[name], samples)

    def train(self, config: ConditioningConfig, training: TrainConfig, run: Run) -> Conditioner:
        """A conditioner trained into a run folder; initialised from the training's seed.

        Raises:
            ValueError: the data have no conditions, or not those that the conditioner is for.
        """
        train = self.split("train", samples=config.mode == "end_to_end")
        conditions = train.conditions()
        torch.manual_seed(training.seed)
        conditioner = build_conditioner(config, self.vae, conditions[0])
        conditioner.standardise(conditions, self.z["train"])
        objective = Conditioning(conditioner, self.vae, config, self.data.error)

        def picture(x: Tensor, x_hat: Tensor) -> Figure:
            return self.data.grid({"true": x, "predicted": x_hat}, None, "validation sample")

        kind = f"{config.conditioner}_conditioner"
        weights, val = objective.weights(), self.split("val")
        return fit(conditioner, kind, train, val, training, run, weights, picture, objective)


@torch.inference_mode()
def predict(
    conditioner: Conditioner, vae: nn.Module, conditions: Float[Tensor, "n ..."], batch_size: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n ..."]]:
    """Codes and samples predicted from conditions, on the CPU."""
    device = conditioner.code_mean.device
    parts = [conditioner.codes(part.to(device)) for part in conditions.split(batch_size)]
    samples = [vae.decode(z).float().cpu() for z in parts]
    return torch.cat(parts).cpu(), torch.cat(samples)


def latent_error(
    conditioner: Conditioner, config: ConditioningConfig, codes: Float[Tensor, "n d"], z: Float[Tensor, "n d"]
) -> float:
    """Mean squared error of standardised codes, main latent and hierarchical codes by their weights."""
    squared = ((codes - z) / conditioner.code_std.to(z.device)).square()
    main = conditioner.config.main_dim
    parts = [(config.main_weight, squared[:, :main]), (config.hier_weight, squared[:, main:])]
    used = [(weight, part) for weight, part in parts if part.shape[1]]
    return float(sum(weight * part.mean() for weight, part in used) / sum(weight for weight, _ in used))


def prediction_milliseconds(
    conditioner: Conditioner, vae: nn.Module, condition: Float[Tensor, "1 ..."], repeats: int = 50
) -> float:
    """Median time from one condition to one sample [ms], after a first prediction that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        predict(conditioner, vae, condition, 1)
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[1:]))
