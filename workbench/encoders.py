"""Trained autoencoders of floor plans, run by run: what they reconstruct, what their latent is worth, how they trained.

Every figure is of one run, so that runs can be paired by their seed; floors without training stand beside them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.comparison import batches, decode, encode_split, error_table, fit_floors, smoothness
from workbench.datasets.frames import DataError
from workbench.datasets.layouts import LayoutDataset, Layouts
from workbench.datasets.loading import Batch
from workbench.encoder_runs import setting_of
from workbench.interpolation import interpolate
from workbench.layers import Posterior
from workbench.metrics import OVERSAMPLE, PCA, active_units, kl_per_dimension
from workbench.models.layout_autoencoder import Decoded
from workbench.progress import Progress
from workbench.runs import RunError, load_run
from workbench.segmentation import accuracy, class_iou, confusion_matrices, mean_iou
from workbench.stability import stability

ITERATIONS = 12  # of the PCA; where its basis spans all training samples, the first one is exact
NAN = float("nan")

Figures = dict[str, float | int | str]


# --- reconstructions ---


class Tally:
    """Figures of the reconstructions of a split, added up batch by batch.

    Args:
        data: What the split is of.
    """

    def __init__(self, data: Layouts) -> None:
        self.data, self.errors = data, []
        self.counts: dict[str, Tensor] = {}
        self.energy = torch.zeros(2, dtype=torch.float64)

    def add(self, batch: Batch, decoded: Decoded) -> None:
        """Count a prepared batch and what was decoded of it."""
        x, x_hat = batch["x"], decoded.x_hat.float()
        errors = {name: error.double().cpu().numpy() for name, error in self.data.errors(x_hat, x).items()}
        self.errors.append(pd.DataFrame({"method": "", "group": batch["group"].cpu().numpy()} | errors))
        self.energy += torch.stack([gradient_energy(x_hat), gradient_energy(x)]).cpu()
        self._count("colours", self._nearest(x_hat), batch["classes"].cpu(), len(self.data.palette.names))
        for name, logits, target in (("head", decoded.class_logits, "classes"), ("type", decoded.type_logits, "type")):
            if logits is not None:
                self._count(name, logits.argmax(1), batch[target], logits.shape[1])

    def _nearest(self, x_hat: Tensor) -> Tensor:
        """Class of each pixel by the nearest colour of the palette, on the CPU."""
        pixels = np.stack([self.data.pixels(image) for image in x_hat.cpu()])  # (b, h, w, 3)
        nearest, _ = self.data.palette.nearest(pixels.reshape(-1, 3))
        return torch.from_numpy(nearest.reshape(pixels.shape[:-1])).long()

    def _count(self, name: str, predicted: Tensor, target: Tensor, n: int) -> None:
        matrix = confusion_matrices(predicted, target, n).sum(0).cpu()
        self.counts[name] = self.counts.get(name, 0) + matrix

    def figures(self) -> Figures:
        """Figures of all batches so far, as `measure` names them."""
        errors = error_table(pd.concat(self.errors)).iloc[0]
        source = "head" if "head" in self.counts else "colours"
        classes, colours, energy = self.counts[source], self.counts["colours"], self.energy
        of_class = zip(self.data.palette.names, class_iou(classes).tolist(), strict=True)
        return {
            **{name: float(errors[name]) for name in ("mse", "psnr", "ssim")},
            "sharpness": float((energy[0] / energy[1]).sqrt()),
            "classes_from": source,
            "pixel_accuracy": float(accuracy(classes)),
            "mean_iou": float(mean_iou(classes)),
            **{f"iou_{name}": iou for name, iou in of_class},
            "colour_accuracy": float(accuracy(colours)),
            "colour_mean_iou": float(mean_iou(colours)),
            "type_accuracy": float(accuracy(self.counts["type"])) if "type" in self.counts else NAN,
        }


def gradient_energy(x: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Sum of the squared differences between neighbouring pixels, in float64.

    Squared, as the plain magnitude does not see blur: it adds up to the height of an edge however wide the edge is.
    """
    x = x.double()
    return x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum()


def measure(
    path: Path,
    dataset: LayoutDataset,
    device: torch.device,
    batch_size: int = 64,
    pairs: int = 32,
    steps: int = 9,
    seed: int = 0,
) -> Figures:
    """Figures of one run on one split, in evaluation mode and without noise.

    Args:
        path: Run folder.
        dataset: Split of the data that the run was trained on, see `open_same`.
        device: Where the model runs.
        batch_size: Samples at a time; does not change the result beyond rounding.
        pairs: Pairs of samples between which latents are interpolated.
        steps: Points of each path, ends included.
        seed: Of the choice of pairs: the same samples for all runs.

    Returns:
        mse (per element, [-1, 1] scale), psnr [dB], ssim: means over the scenes' means.
        sharpness: root mean square difference of neighbouring pixels, over that of the originals; 1 / sqrt(w) where
            every edge is spread over w pixels, above 1 where there is noise.
        pixel_accuracy, mean_iou, iou_<class>: of the split's confusion matrix; NaN for a class neither there nor told.
        classes_from: `head`, or for a model without one `colours`: by the nearest colour of the palette to each pixel
            of the reconstruction.
        colour_accuracy, colour_mean_iou: by the colours in any case, to compare models with and without head.
        type_accuracy: NaN without the head.
        parameters, latent_size (numbers), and those of `latent_figures` and `training_figures`.

    Raises:
        RunError: the run is unfinished or has no metrics.csv.
        CheckpointError: its files are damaged.
        DataError: its log cannot be judged, see `stability`.
        ValueError: the split has 1 sample, or images too small for SSIM.
    """
    model = load_run(path)[0].to(device)
    try:
        of_training = training_figures(_log(path))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    posterior = encode_split(model, dataset, batch_size)
    figures = reconstruction_figures(model, posterior, dataset, batch_size)
    figures |= latent_figures(model, posterior, pairs, steps, seed)
    return figures | {"parameters": sum(p.numel() for p in model.parameters())} | of_training


@torch.inference_mode()
def reconstruction_figures(model: nn.Module, posterior: Posterior, dataset: LayoutDataset, batch_size: int) -> Figures:
    """What a model tells of every sample from its posterior mean: errors, sharpness, classes and types."""
    device, tally = next(model.parameters()).device, Tally(dataset.data)
    means = posterior.mu.split(batch_size)
    for batch, mu in zip(batches(dataset, batch_size, device), means, strict=True):
        tally.add(batch, model.decode_all(mu.to(device)))
    return tally.figures()


def latent_figures(model: nn.Module, posterior: Posterior, pairs: int, steps: int, seed: int) -> Figures:
    """Size and use of a latent, and what its decoder makes of straight paths.

    Returns:
        latent_size; kl_mean [nats per dimension] and kl_total [nats per sample]: NaN for a deterministic model.
        active_units: Dimensions whose mean has a variance above 0.01; of a deterministic model, the scale of whose
            latent nothing sets, it says little.
        path_ratio, ppl: Means over the pairs, see `comparison.smoothness`; ppl in MSE.
    """
    mu, logvar = posterior.mu, posterior.logvar
    kl = torch.full(mu.shape[1:], NAN) if logvar is None else kl_per_dimension(mu, logvar)
    paths = smoothness(model, mu, pairs, steps, seed, methods=("lerp",))
    return {
        "latent_size": mu.shape[1],
        "kl_mean": float(kl.mean()),
        "kl_total": float(kl.sum()),
        "active_units": active_units(mu),
        "path_ratio": float(paths["ratio"].mean()),
        "ppl": float(paths["ppl"].mean()),
    }


def training_figures(log: pd.DataFrame) -> Figures:
    """Figures of a training, from the rows of its metrics.csv.

    Returns:
        seconds: Of training and validation.
        kl_share: The weighted KL over the loss, of the training steps logged in the last epoch that has any; NaN where
            no KL is optimised.
        loss_spread, gradient_spikes, epochs_to_best: see `stability.Stability`.
    """
    found, train = stability(log), log[log["split"] == "train"]
    last = train[train["epoch"] == train["epoch"].max()]
    share = (last["kl_weight"] * last["kl"]).sum() / last["loss"].sum() if "kl_weight" in log else NAN
    return {
        "seconds": float(log["seconds"].iloc[-1]),
        "kl_share": float(share),
        "loss_spread": found.loss_spread,
        "gradient_spikes": found.gradient_spikes,
        "epochs_to_best": found.epochs_to_best,
    }


def _log(path: Path) -> pd.DataFrame:
    """Rows of a run's metrics.csv."""
    if not (path / "metrics.csv").exists():
        raise RunError(f"{path} has no metrics.csv, which its training wrote: put it back, or leave this run out")
    return pd.read_csv(path / "metrics.csv")


# --- all runs ---


def collect(paths: Sequence[Path], data: Layouts, split: str, device: torch.device, **settings: int) -> pd.DataFrame:
    """Figures of several runs on the same samples, one row per run.

    Args:
        settings: batch_size, pairs, steps and seed of `measure`.

    Returns:
        Columns setting, seed, run, and one for each figure.
    """
    dataset, rows = data.split(split), []
    with Progress(len(paths), "measuring runs", "run") as progress:
        for path in paths:
            setting, seed = setting_of(path)
            figures = measure(path, dataset, device, **settings)
            rows.append({"setting": setting, "seed": seed, "run": path.name} | figures)
            progress.update(1, path.name)
    return pd.DataFrame(rows)


def caveats(rows: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the figures of these settings has to know, in sentences.

    Args:
        rows: See `collect`.
        configs: config.json of a run of each setting.
    """
    told = []
    of_source = rows.groupby("classes_from", sort=True)["setting"].unique()
    if len(of_source) > 1:
        names = "; ".join(f"by the {source} in {', '.join(settings)}" for source, settings in of_source.items())
        told.append(f"Classes are told {names}: compare these settings by the figures by colours.")
    for name, config in configs.items():
        if config["model"]["variational"]:
            of_kl = {"mean": "mean over its dimensions", "sum": "sum over its dimensions, in nats per image"}
            what, weight = of_kl[config["model"]["kl_reduction"]], config["parameters"]["kl_weight"]
            share = rows.loc[rows["setting"] == name, "kl_share"].mean()
            told.append(f"{name} adds {weight:g} times the KL, the {what}, to its loss: {100 * share:.2g} % of it.")
    return told


@torch.inference_mode()
def floors(
    data: Layouts, split: str, latent_sizes: Sequence[int], device: torch.device, batch_size: int = 64, samples: int = 0
) -> pd.DataFrame:
    """Figures of what costs no training: the mean image, and PCA with as many dimensions as each latent has.

    Args:
        latent_sizes: Dimensions to compare with; at most one less than the training samples can be had.
        samples: Training samples to fit on; 0: all.

    Returns:
        One row per floor, by size: floor, latent_size (0 for the mean image), and the figures of the reconstructions
        as `measure` names them, classes from the nearest colour.
    """
    train, dataset = data.split("train").subset(samples), data.split(split)
    most = min(len(train) - 1, train[0]["x"].numel())
    sizes = sorted({min(size, most) for size in latent_sizes})
    iterations = 1 if sizes[-1] + OVERSAMPLE >= most else ITERATIONS
    pca, mean = fit_floors(train, sizes[-1], batch_size, device, iterations=iterations)
    methods = {0: mean.reconstruct}
    for n in sizes:
        methods[n] = PCA(pca.mean, pca.components[:n], pca.explained_variance[:n], pca.last_gain).reconstruct
    tallies = {size: Tally(data) for size in methods}
    for batch in batches(dataset, batch_size, device):
        for size, reconstruct in methods.items():
            tallies[size].add(batch, Decoded(reconstruct(batch["x"]).clamp(-1, 1), None, None))
    return pd.DataFrame(
        {"floor": f"PCA-{size}" if size else "mean image", "latent_size": size} | tally.figures()
        for size, tally in tallies.items()
    )


def logs(paths: Sequence[Path]) -> dict[str, list[pd.DataFrame]]:
    """Rows of metrics.csv of every run, by setting, in the order of the runs."""
    settings = dict.fromkeys(setting_of(path)[0] for path in paths)
    return {name: [_log(path) for path in paths if setting_of(path)[0] == name] for name in settings}


def samples_by_epoch(path: Path) -> dict[int, Path]:
    """The pictures of fixed validation samples that a training left: of each epoch that has any, the last one."""
    log = _log(path)
    val = log[log["split"] == "val"]
    pictures = sorted((path / "samples").glob("step_*.png"))
    last = np.searchsorted(val["step"], [int(picture.stem.removeprefix("step_")) for picture in pictures])
    return dict(zip(val["epoch"].iloc[last].tolist(), pictures, strict=True))


def interpolations(
    paths: Sequence[Path], dataset: LayoutDataset, pair: Sequence[int], steps: int, device: torch.device
) -> dict[str, Float[Tensor, "t c h w"]]:
    """The straight path between the latents of the same two samples, decoded by the first run of each setting.

    Args:
        paths: Run folders.
        dataset: Split that the samples are of.
        pair: Positions of the two samples in it.
        steps: Points of the path, ends included.

    Returns:
        Images in [-1, 1] on the CPU, by setting.
    """
    first, drawn = {setting_of(path)[0]: path for path in reversed(paths)}, {}
    x = dataset.prepare(dataset.batch(pair))["x"].to(device)
    for setting, path in sorted(first.items()):
        model = load_run(path)[0].to(device)
        with torch.inference_mode():
            a, b = model.encode(x).mu
        drawn[setting] = decode(model, interpolate(a, b, steps, "lerp"))
    return drawn


def latest_samples(paths: Sequence[Path], n: int) -> dict[str, Path]:
    """The last n pictures (0: all) that the first run of each setting left, by setting and epoch."""
    first = {setting_of(path)[0]: path for path in reversed(paths)}
    kept = {setting: list(samples_by_epoch(path).items())[-n:] for setting, path in sorted(first.items())}
    return {f"{setting}, epoch {epoch}": path for setting, pictures in kept.items() for epoch, path in pictures}
