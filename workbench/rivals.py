"""Models of the same pairs of frames, to be compared: trained side by side, or loaded and checked.

A VAE codes the second frame of a pair by itself; a latent action model predicts it from the first frame and a code.
Both are trained on the same pairs, in the same order, for the same number of steps.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.checkpoints import load_foreign
from workbench.config import Config
from workbench.datasets.clips import Clips, ClipsConfig
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch
from workbench.models import MODELS
from workbench.models.conv_vae import ConvVAEConfig
from workbench.models.laq import LAQ, LAQConfig
from workbench.objectives import LatentActions, Objective, Reconstruction
from workbench.paths import project_root
from workbench.process import pick_device
from workbench.provenance import check_same_data, file_digest
from workbench.runs import Run, RunError, differences, load_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

KINDS = {"VAE": "conv_vae", "LAQ": "laq"}
"""The two models that are compared."""
OF_SAMPLES = ("pair_offset", "frame_stride", "cache_dir", "decode_workers", "max_broken_fraction")
"""Settings of clips that change neither a frame nor its split."""


class RivalsConfig(Config):
    """Which models are compared.

    Raises:
        ConfigError: a value of the wrong type or out of range, or a run and a file of the same model.
    """

    vae_run: str = ""
    """Run of the same experiment with a trained VAE; empty: train it here."""
    laq_run: str = ""
    """Run of the same experiment with a trained LAQ; empty: train it here."""
    vae_file: str = ""
    """Published `conv_vae` checkpoint in place of a run."""
    laq_file: str = ""
    """Published `laq` checkpoint, which predicts frames in [0, 1], in place of a run."""
    seeds: int = Field(1, ge=1)
    """Trainings of each of the two models that are trained here, from `seed` on."""
    quantizers: list[Literal["nsvq", "fsq", "continuous"]] = Field([])
    """Further latent actions to train, once each."""
    kl_weights: list[float] = Field([])
    """Further weights of the KL to train a VAE with, once each."""
    vae_lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Largest learning rate of the VAEs."""

    @model_validator(mode="after")
    def _one_source_each(self) -> "RivalsConfig":
        for name, run, file in (("vae", self.vae_run, self.vae_file), ("laq", self.laq_run, self.laq_file)):
            if run and file:
                raise ValueError(f"{name}_run={run!r} and {name}_file={file!r}: give one of them")
        if any(not 0 <= weight < float("inf") for weight in self.kl_weights):
            raise ValueError(f"kl_weights={self.kl_weights}: must be finite and at least 0")
        for name, values in (("quantizers", self.quantizers), ("kl_weights", self.kl_weights)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: must all be different")
        return self


@dataclass(frozen=True)
class Rival:
    """A trained model in the comparison.

    Args:
        name: What tables and figures call it; the same for all seeds.
        model: In evaluation mode, on its device.
        seed: Of its training; 0 for a loaded one.
        source: Where it comes from.
        setting: Value of what a sweep varies.
        samples: Training samples it has seen, repetitions included; None where nobody knows.
        seconds: Training and validation took; None likewise.
        unit_scale: Predicts frames in [0, 1], as published LAQs do.
    """

    name: str
    model: nn.Module
    seed: int
    source: str
    setting: str = ""
    samples: int | None = None
    seconds: float | None = None
    unit_scale: bool = False

    @property
    def acts(self) -> bool:
        """Whether it is a latent action model, and is given the first frame."""
        return isinstance(self.model, LAQ)

    def predict(self, batch: Batch) -> Tensor:
        """The second frames in [-1, 1], clamped to it."""
        if not self.acts:
            return self.model(batch["x"]).clamp(-1, 1)
        return self.imagine(batch["first"], self.model.encode(batch["first"], batch["x"]).codes)

    def imagine(self, first: Tensor, codes: Tensor) -> Tensor:
        """The frames in [-1, 1] that follow `first` under some codes, vectors or indices."""
        x_hat = self.model.decode(first, codes)
        return (2 * x_hat - 1 if self.unit_scale else x_hat).clamp(-1, 1)


def first_seeds(models: Sequence[Rival]) -> dict[str, Rival]:
    """The first training of each, by name."""
    found: dict[str, Rival] = {}
    for rival in models:
        found.setdefault(rival.name, rival)
    return found


def objective_of(model: nn.Module) -> Objective:
    """What the training of one of the two models minimises."""
    return LatentActions(model) if isinstance(model, LAQ) else Reconstruction(model)


def weighted_loss(model: nn.Module, batch: Batch, training: TrainConfig) -> Tensor:
    """The loss at the end of the training."""
    terms = objective_of(model).loss(batch)
    return sum(weight * terms[name] for name, weight in vae_weights(training, model.terms)(1.0).items())


# --- trained here ---


def rivals(parameters: Mapping[str, Any], dataset: Clips, run: Run) -> Iterator[Rival]:
    """The models, one after the other, as they are trained or loaded; those trained before are loaded.

    What is to be loaded is loaded and checked before anything is trained.

    Args:
        parameters: Flat settings: `RivalsConfig`, the sizes of both models, and how they are trained: the same way, but
            for the learning rate.
        run: Each training is a part of it.

    Raises:
        RunError: a run that is absent, unfinished, of another model, or of other frames or another split.
        CheckpointError: a file that is damaged or does not fit.
        DataError: a file's model is made for other images than these.
    """
    config, training = RivalsConfig.pick(parameters), TrainConfig.pick(parameters)
    laq, vae = (kind.pick({**parameters, **dataset.sizes}) for kind in (LAQConfig, ConvVAEConfig))
    seeds = [training.model_copy(update={"seed": training.seed + i}) for i in range(config.seeds)]
    sources = {"LAQ": (config.laq_run, config.laq_file), "VAE": (config.vae_run, config.vae_file)}
    loaded = {name: load(name, *of, training.device, dataset, run) for name, of in sources.items() if any(of)}
    if "LAQ" in loaded:
        yield loaded["LAQ"]
    else:
        for settings in seeds:
            yield train("LAQ", laq.quantizer, laq, settings, dataset, run)
    for quantizer in config.quantizers:
        other = laq.model_copy(update={"quantizer": quantizer})
        if other != laq or "LAQ" in loaded:
            yield train(f"LAQ {quantizer}", quantizer, other, training, dataset, run)
    seeds = [settings.model_copy(update={"lr": config.vae_lr}) for settings in seeds]
    if "VAE" in loaded:
        yield loaded["VAE"]
    else:
        for settings in seeds:
            yield train("VAE", f"kl_weight {training.kl_weight:g}", vae, settings, dataset, run)
    for weight in config.kl_weights:
        if weight != training.kl_weight or "VAE" in loaded:
            settings = seeds[0].model_copy(update={"kl_weight": weight})
            yield train(f"VAE {weight:g}", f"kl_weight {weight:g}", vae, settings, dataset, run)


def train(name: str, setting: str, sizes: Config, training: TrainConfig, dataset: Clips, run: Run) -> Rival:
    """Train a model into a part of the run named after it and its seed; load it where that has been done."""
    kind = KINDS[name.split()[0]]
    settings = {"data_kind": "clips"} | dataset.config.model_dump() | sizes.model_dump() | training.model_dump()
    part = run.part(f"{name.lower().replace(' ', '-')}-{training.seed}", **settings)
    part.record(data={"name": dataset.config.data, "fingerprint": dataset.fingerprint})
    torch.manual_seed(training.seed)
    model = MODELS[kind][0](sizes)
    print(f"{name}, seed {training.seed}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    sets = (dataset.split("train"), dataset.split("val"), training, part, vae_weights(training, model.terms))
    model = fit(model, kind, *sets, dataset.pairs, objective_of(model))
    return Rival(name, model, training.seed, str(part.path), setting, *_training_of(part.path, training.batch_size))


def log_of(rival: Rival) -> pd.DataFrame:
    """Rows of the training's metrics.csv; none for a model from a file."""
    path = Path(rival.source) / "metrics.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["step", "split"])


def _training_of(path: Path, batch_size: int) -> tuple[int, float]:
    """Samples seen and seconds of a training, from its log, which ends with the validation after the last step."""
    with (path / "metrics.csv").open(newline="") as handle:
        last = list(csv.DictReader(handle))[-1]
    return int(last["step"]) * batch_size, float(last["seconds"])


# --- loaded ---


def load(name: str, run_name: str, file: str, device: str, dataset: Clips, run: Run) -> Rival:
    """A trained model from a run beside this one, or from a published file; which weights it has is recorded.

    Raises:
        RunError, CheckpointError, DataError: as for `rivals`.
    """
    path = run.path.parent / run_name if run_name else project_root() / Path(file).expanduser()
    rival = _from_run(name, path, dataset) if run_name else _from_file(name, path, dataset.config.image_size)
    weights = path / "model.safetensors" if run_name else path
    run.record(**{f"{name.lower()}_source": {"path": run_name or file, "weights": file_digest(weights)}})
    rival.model.to(pick_device(device))
    return rival


def _from_run(name: str, path: Path, dataset: Clips) -> Rival:
    model, config = load_run(path)
    found = config["model"]["kind"]
    if found != KINDS[name]:
        raise RunError(f"{path} holds a {found}, not a {KINDS[name]}: name a run of the other kind")
    _check_same_frames(path, config, dataset)
    trained = config["parameters"]
    return Rival(name, model, trained["seed"], str(path), "", *_training_of(path, trained["batch_size"]))


def _check_same_frames(path: Path, trained: dict[str, Any], dataset: Clips) -> None:
    """Refuse a model of other frames or another split: its held-out clips may not be these."""
    there, here = ClipsConfig.pick(trained["parameters"]).model_dump(), dataset.config.model_dump()
    found = differences(*({k: v for k, v in settings.items() if k not in OF_SAMPLES} for settings in (there, here)))
    if found:
        raise RunError(
            f"{path} was trained on other frames or another split, so a comparison would not be fair: "
            f"{'; '.join(found)}. Set these here as they are there, or train on the same"
        )
    check_same_data(path, trained, dataset.fingerprint)


def _from_file(name: str, path: Path, image_size: int) -> Rival:
    model = load_foreign(KINDS[name], path, image_size=image_size)
    if model.config.image_size != image_size:
        raise DataError(
            f"{path}: a model for images of {model.config.image_size} px, and these clips have image_size={image_size}"
            f": set image_size={model.config.image_size}"
        )
    return Rival(name, model, 0, str(path), unit_scale=name == "LAQ")
