"""Autoencoders of floor plans for the tests: hardly trained ones, and some whose figures are known."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from workbench.checkpoints import save_model
from workbench.datasets.layouts import LayoutDataset, Layouts, LayoutsConfig, open_layouts
from workbench.datasets.plans import COLOURS, write_plans
from workbench.encoder_runs import KIND
from workbench.layers import Posterior
from workbench.models import MODELS, build_vae
from workbench.models.layout_autoencoder import Decoded, LayoutAutoencoderConfig
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZE, CLASSES = 32, list(COLOURS)
SIZES = {"latent_channels": 2, "base_channels": 4, "downsampling_steps": 3}
TRAINING = {"epochs": 2, "batch_size": 20, "lr": 1e-3, "device": "cpu", "log_every": 1, "images_every": 2}
QUICK = {"pairs": 4, "steps": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("layouts")
    write_plans(folder / "plans", 20, SIZE)
    settings = {"data": str(folder / "plans"), "image_size": SIZE, "val_fraction": 0.25, "test_fraction": 0.1}
    return open_layouts(LayoutsConfig(**settings, cache_dir=str(folder / "cache")))


@pytest.fixture(scope="module")
def val(data: Layouts) -> LayoutDataset:
    return data.split("val")


def begin(folder: Path, data: Layouts, name: str, seed: int, **settings: Any) -> tuple[Run, dict[str, Any]]:
    """A run folder with its parameters and what it says of the data."""
    training = TrainConfig(**TRAINING, seed=seed).model_dump()
    parameters = {"experiment": "e", "run": name, "data_kind": "layouts"} | data.config.model_dump()
    parameters |= training | SIZES | settings
    run = open_run(parameters, folder)
    run.record(data={"name": "plans", "fingerprint": data.fingerprint})
    return run, parameters


def train(folder: Path, data: Layouts, name: str, seed: int, **settings: Any) -> Path:
    run, parameters = begin(folder, data, name, seed, **settings)
    torch.manual_seed(seed)
    model, config = build_vae(parameters, data.sizes), TrainConfig.pick(parameters)
    sets = (data.split("train"), data.split("val"), config, run, vae_weights(config, model.terms))
    fit(model, KIND, *sets, lambda x, x_hat: Figure())
    return run.path


@pytest.fixture(scope="module")
def trained(one_thread: None, data: Layouts, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two settings with two seeds each, hardly trained; the variational ones with a KL to speak of."""
    folder = tmp_path_factory.mktemp("outputs")
    paths = [train(folder, data, f"point-{seed}", seed, variational=False) for seed in (0, 1)]
    heads = {"segmentation": False, "classification": False}
    return paths + [
        train(folder, data, f"gauss-{seed}", seed, kl_weight=0.01, kl_reduction="sum", **heads) for seed in (0, 1)
    ]


class Copy(nn.Module):
    """Its latent is the image; its head tells every class, or always one class where `constant` is not -1."""

    def __init__(self, config: LayoutAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.scale = config, nn.Parameter(torch.ones(()))
        self.register_buffer("constant", torch.tensor(-1))

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(x.flatten(1) * self.scale)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x = z.unflatten(1, (3, SIZE, SIZE))
        return self.painted(x) if self.constant >= 0 and not self.config.segmentation else x

    def painted(self, x: torch.Tensor) -> torch.Tensor:
        return self.colours()[self.constant].reshape(3, 1, 1).expand_as(x)

    def colours(self) -> torch.Tensor:
        return torch.tensor(list(COLOURS.values())) / 127.5 - 1

    def decode_all(self, z: torch.Tensor) -> Decoded:
        x = self.decode(z)
        logits = -(x[:, None] - self.colours()[:, :, None, None]).square().sum(2)
        if self.constant >= 0:
            logits = nn.functional.one_hot(self.constant, len(CLASSES)).float().reshape(-1, 1, 1).expand_as(logits)
        types = torch.eye(self.config.n_types)[torch.ones(len(z), dtype=torch.int64)]
        return Decoded(x, logits if self.config.segmentation else None, types if self.config.classification else None)


class Linear(Copy):
    """A few random directions of the image, and a decoder linear in them; neither is trained."""

    def __init__(self, config: LayoutAutoencoderConfig) -> None:
        super().__init__(config)
        self.to_z = nn.Linear(3 * SIZE**2, config.latent_channels)
        self.to_x = nn.Linear(config.latent_channels, 3 * SIZE**2)

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(self.to_z(x.flatten(1)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.to_x(z).unflatten(1, (3, SIZE, SIZE))


class Blurred(Copy):
    """Every pixel is the mean of four in a row, itself the first."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(super().decode(z), (0, 3, 0, 0), "replicate")
        return x.unfold(3, 4, 1).mean(-1)


def metrics(losses: list[float], **terms: list[float]) -> pd.DataFrame:
    """metrics.csv of a training that logs two steps in each epoch."""
    rows = [
        {"step": i + 1, "epoch": i // 2 + 1, "split": "train", "loss": loss, "grad_norm": 1.0, "seconds": 0.5 * i}
        | {name: values[i] for name, values in terms.items()}
        for i, loss in enumerate(losses)
    ]
    ends = [{"step": i, "epoch": i // 2, "split": "val", "loss": 1.0, "seconds": 0.5 * i} for i in range(2, 7, 2)]
    return pd.DataFrame(rows + ends).sort_values("step", kind="stable", ignore_index=True)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Layouts):
    """Writes a finished run of a model that was not trained."""

    def write(model_class: type[nn.Module], constant: int = -1, **settings: Any) -> Path:
        monkeypatch.setitem(MODELS, KIND, (model_class, LayoutAutoencoderConfig))
        name = f"{model_class.__name__}{constant}"
        run, parameters = begin(tmp_path, data, f"{name}-3", 3, **settings)
        torch.manual_seed(0)
        model = build_vae(parameters, data.sizes)
        model.constant.fill_(constant)
        save(run, model)
        return run.path

    return write


def save(run: Run, model: nn.Module) -> None:
    run.record(model={"kind": KIND} | model.config.model_dump())
    save_model(run.path / "model.safetensors", model, KIND)
    metrics([1.0] * 6).to_csv(run.path / "metrics.csv", index=False)
