"""Held-out figures beside honest floors, with their uncertainty over groups (clips, runs)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.datasets.clips import ClipDataset
from workbench.datasets.loading import Dataset, read_ahead, to_device
from workbench.interpolation import interpolate
from workbench.layers import Posterior
from workbench.metrics import (
    PCA,
    MeanFloor,
    fit_mean,
    fit_pca,
    image_errors,
    kl_per_dimension,
    mse,
    path_length_ratio,
    perceptual_path_length,
)

Reconstruct = Callable[[Tensor], Tensor]
Predict = Callable[[dict[str, Tensor]], Tensor]
Errors = Callable[..., dict[str, Tensor]]
Distance = Callable[[Tensor, Tensor], Tensor]

STREAMED = 16
"""Samples at a time where each is looked at once and may be large."""
SAME_SAMPLE_MSE = 1e-9
"""Two decoded samples closer than this are the same up to rounding."""


def batches(dataset: Dataset, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Every sample of a split once, in order, prepared on the device."""
    blocks = (np.arange(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size))
    for _, raw in read_ahead(dataset, blocks):
        yield dataset.prepare(to_device(raw, device))


def sample_means(dataset: Dataset) -> Float[Tensor, " n"]:
    """Mean of x over each sample, on its scale."""
    return torch.cat([batch["x"].flatten(1).mean(1) for batch in batches(dataset, STREAMED, torch.device("cpu"))])


@torch.inference_mode()
def fit_floors(
    train: Dataset,
    n_components: int,
    batch_size: int = 256,
    device: torch.device | None = None,
    seed: int = 0,
    iterations: int = 12,
) -> tuple[PCA, MeanFloor]:
    """The two floors of every reconstruction figure, fitted on the training split in a stream.

    Args:
        train: Training split, or a subset of it.
        n_components: Components of the PCA: as many as the latent has dimensions.
        iterations: Passes over the data; `PCA.last_gain` says how far the last one still moved.
    """
    device = device or torch.device("cpu")

    def images() -> Iterator[Tensor]:
        return (batch["x"] for batch in batches(train, batch_size, device))

    return fit_pca(images, n_components, iterations, seed), fit_mean(images())


@dataclass(frozen=True)
class Floors:
    """What a reconstruction has to beat, as predictions of x from prepared batches.

    Args:
        means: Mean training sample of each architecture; one row where the data have no architectures.
        pca: Of what these means leave of the training samples.
        n_samples: Training samples.
    """

    means: Float[Tensor, "a ..."]
    pca: PCA
    n_samples: int

    def mean(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean training sample, that of the sample's architecture where it has one."""
        rows = batch.get("architecture", torch.zeros(len(batch["x"]), dtype=torch.int64))
        return self.means.to(batch["x"])[rows.to(batch["x"].device)]

    def project(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean, and the part of the rest that lies along the components."""
        mean, components = self.mean(batch), self.pca.components.to(batch["x"])
        rest = (batch["x"] - mean).flatten(1)  # (b, d)
        return mean + (rest @ components.T @ components).reshape(mean.shape)


@torch.inference_mode()
def fit_predictions(
    train: Dataset, n_components: int, batch_size: int, device: torch.device, seed: int = 0, iterations: int = 12
) -> Floors:
    """The two floors of a reconstruction figure, fitted on the training split in a stream.

    Padded samples count nowhere in the mean of another architecture, and padding is nothing that PCA has to explain.

    Args:
        train, n_components, iterations: See `fit_floors`.
    """
    sums, counts = {}, {}
    for batch in batches(train, batch_size, device):
        rows = batch.get("architecture", torch.zeros(len(batch["x"]), dtype=torch.int64))
        for row in rows.unique().tolist():
            x = batch["x"][(rows == row).to(batch["x"].device)]
            sums[row] = sums.get(row, 0) + x.double().sum(0)
            counts[row] = counts.get(row, 0) + len(x)
    means = torch.zeros(max(sums) + 1, *x.shape[1:], dtype=x.dtype, device=x.device)
    for row, total in sums.items():
        means[row] = (total / counts[row]).to(x.dtype)
    floors = Floors(means, PCA(means[0], x.new_zeros(0, means[0].numel()), x.new_zeros(0), 0.0), sum(counts.values()))

    def rest() -> Iterator[Tensor]:
        return (batch["x"] - floors.mean(batch) for batch in batches(train, batch_size, device))

    return replace(floors, pca=fit_pca(rest, n_components, iterations, seed))


@torch.inference_mode()
def prediction_errors(
    methods: dict[str, Predict],
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    errors: Errors = image_errors,
    distance: Distance | None = None,
) -> pd.DataFrame:
    """Errors of several predictions of the same samples, one row per method and sample.

    Args:
        methods: Prediction of x by name, from a prepared batch.
        errors: Errors of each sample by name, (x_hat, x) to them, and `mask` where samples have one; the data's own.
        distance: A perceptual distance, adding the column `lpips`.

    Returns:
        Columns method, group, and one for each error.
    """
    parts = []
    for batch in batches(dataset, batch_size, device):
        for name, predict in methods.items():
            x, x_hat = batch["x"], predict(batch)
            masked = {"mask": batch["mask"]} if "mask" in batch else {}
            figures = errors(x_hat, x, **masked) | ({"lpips": distance(x_hat, x)} if distance else {})
            columns = {key: value.double().cpu().numpy() for key, value in figures.items()}
            parts.append(pd.DataFrame({"method": name, "group": batch["group"].cpu().numpy()} | columns))
    return pd.concat(parts, ignore_index=True)


def reconstruction_errors(
    methods: dict[str, Reconstruct],
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    errors: Errors = image_errors,
    distance: Distance | None = None,
) -> pd.DataFrame:
    """As `prediction_errors`, of methods that go from x to x_hat."""
    of_batch = {name: lambda batch, f=reconstruct: f(batch["x"]) for name, reconstruct in methods.items()}
    return prediction_errors(of_batch, dataset, batch_size, device, errors, distance)


def error_table(errors: pd.DataFrame) -> pd.DataFrame:
    """Mean of each figure by method over the groups' means, and its standard error over groups (`mse_se`, …).

    Samples of one group, such as the frames of a clip, resemble each other, so the group is the unit of both.
    """
    figures = [column for column in errors if column not in ("method", "group")]
    grouped = errors.groupby(["method", "group"], sort=False)[figures].mean().groupby("method", sort=False)
    return grouped.mean().join(grouped.sem().add_suffix("_se"))[
        [name for figure in figures for name in (figure, f"{figure}_se")]
    ]


def paired_verdict(errors: pd.DataFrame, method: str, floor: str, figure: str = "mse", unit: str = "clips") -> str:
    """A sentence on whether a method's error is below a floor's, paired by group, with its numbers.

    "Below" and "above" need a mean difference of at least two standard errors over the groups.
    """
    by_group = errors.pivot_table(index="group", columns="method", values=figure)
    gain = by_group[floor] - by_group[method]
    mean, error = gain.mean(), gain.sem()
    if len(gain) < 2:
        return (
            f"{figure} of {method} against {floor} cannot be decided on one held-out group of {unit}: "
            f"{by_group[method].mean():.5g} against {by_group[floor].mean():.5g}"
        )
    word = "below" if mean > 2 * error else "above" if mean < -2 * error else "not distinguishable from"
    return (
        f"{figure} of {method} is {word} that of {floor}: {by_group[method].mean():.5g} against "
        f"{by_group[floor].mean():.5g}, difference {mean:+.5g} ± {error:.5g} (standard error over {len(gain)} {unit}), "
        f"lower on {int((gain > 0).sum())} of them; one training seed"
    )


@torch.inference_mode()
def encode_split(model: nn.Module, dataset: Dataset, batch_size: int) -> Posterior:
    """Posterior of every sample of a split, on the CPU."""
    device = next(model.parameters()).device
    posteriors = [model.encode(batch["x"]) for batch in batches(dataset, batch_size, device)]
    mu = torch.cat([p.mu for p in posteriors]).cpu()
    stochastic = posteriors[0].logvar is not None
    return Posterior(mu, torch.cat([p.logvar for p in posteriors]).cpu() if stochastic else None)


@dataclass(frozen=True)
class LatentUse:
    """How much each dimension of a latent carries over some samples.

    Args:
        mu: Posterior means of the Gaussian dimensions, or of all where there are none.
        of_dimension: KL of each in nats, or the variance of its mean.
        label: Which of the two.
        centre, scale: Of each dimension: 0 and 1 of the prior, or mean and standard deviation where there is none.
    """

    mu: Float[Tensor, "n d"]
    of_dimension: Float[Tensor, " d"]
    label: str
    centre: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]


def latent_use(posterior: Posterior) -> LatentUse:
    """KL of each Gaussian dimension; of a deterministic latent, the variance of each."""
    if posterior.logvar is None:
        mu = posterior.mu
        return LatentUse(mu, mu.var(0), "variance of mu [1]", mu.mean(0), mu.std(0))
    mu = posterior.gaussian_mu
    return LatentUse(
        mu, kl_per_dimension(mu, posterior.logvar), "KL [nats]", torch.zeros_like(mu[0]), mu.new_ones(mu.shape[1])
    )


@torch.inference_mode()
def decode(model: nn.Module, z: Float[Tensor, "b d"]) -> Float[Tensor, "b ..."]:
    """Decode latents on the model's device; the result is on the CPU, in float32."""
    return model.decode(z.to(next(model.parameters()).device)).float().cpu()


def smoothness(
    model: nn.Module,
    z: Float[Tensor, "n d"],
    pairs: int,
    steps: int,
    seed: int,
    distance: Distance = mse,
    methods: Sequence[str] = ("lerp", "slerp"),
) -> pd.DataFrame:
    """Path-length ratio and perceptual path length of decoded paths between random pairs of latents.

    Args:
        pairs: How many, none of them twice; fewer where the latents have no more.

    Returns:
        One row per pair and method: method, ratio (1 is a straight path; NaN where both ends decode to the same
        sample, between which no path is straight), ppl (in units of `distance`).

    Raises:
        ValueError: there are fewer than two latents.
    """
    rows = []
    for a, b in _different_pairs(len(z), pairs, seed):
        for method in methods:
            path = decode(model, interpolate(z[a], z[b], steps, method))
            moved = float(mse(path[:1], path[-1:])) > SAME_SAMPLE_MSE
            ratio = float(path_length_ratio(path)) if moved else float("nan")
            rows.append({"method": method, "ratio": ratio, "ppl": float(perceptual_path_length(path, distance))})
    return pd.DataFrame(rows)


def _different_pairs(n: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """Random pairs of n, in the order in which they are drawn first."""
    if n < 2:
        raise ValueError(f"{n} sample: a path needs two; hold out more samples")
    draw, drawn = np.random.default_rng(seed), {}
    while len(drawn) < min(pairs, n * (n - 1) // 2):
        a, b = draw.choice(n, 2, replace=False).tolist()
        drawn.setdefault(frozenset((a, b)), (a, b))
    return list(drawn.values())


@torch.inference_mode()
def copy_frame_errors(dataset: ClipDataset, offsets: Sequence[int], max_clips: int) -> pd.DataFrame:
    """Error of predicting a frame by the one `offset` frames before it in the same clip.

    Args:
        dataset: Its clips are used, the first `max_clips` of them.
        offsets: Distances in frames that decoded, from 1.

    Returns:
        Columns offset, pairs, mse (per element, [-1, 1] scale), psnr (mean over pairs, dB), one row per offset;
        an offset that no clip is long enough for has 0 pairs and NaN.

    Raises:
        ValueError: an offset below 1, or no clip is long enough for any.
    """
    if min(offsets) < 1:
        raise ValueError(f"offset {min(offsets)}: must be at least 1")
    errors: dict[int, list[Tensor]] = {offset: [] for offset in offsets}
    longest = 0
    for segment in np.unique(dataset.segment)[:max_clips]:
        clip = dataset.clips.clip(segment)
        longest = max(longest, len(clip))
        for offset in errors:
            errors[offset].append(mse(clip[offset:], clip[: max(0, len(clip) - offset)]))
    if longest <= min(offsets):
        raise ValueError(f"offsets={list(offsets)}: the longest clip has {longest} frames; choose smaller offsets")
    rows = []
    for offset in offsets:
        error = torch.cat(errors[offset])
        psnr = 10 * torch.log10(4 / error.clamp_min(1e-10))
        rows.append({"offset": offset, "pairs": len(error), "mse": float(error.mean()), "psnr": float(psnr.mean())})
    return pd.DataFrame(rows)


@torch.inference_mode()
def pca_curve(train: Dataset, test: Dataset, components: Sequence[int], errors: Errors, error: str) -> pd.DataFrame:
    """How many numbers a sample needs: held-out error of PCA by its number of components, fitted on `train`.

    Returns:
        Columns components and `error`, one row per number of components that the training samples allow, from 0 (the
        mean sample).
    """
    device = torch.device("cpu")
    values = train.prepare(train.batch(np.arange(1)))["x"].numel()
    allowed = sorted({0, *(n for n in components if n < min(len(train), values))})
    pca = fit_pca(lambda: (batch["x"] for batch in batches(train, STREAMED, device)), max(allowed[-1], 1))
    methods = {str(n): partial(_projected, pca, n) for n in allowed}
    table = error_table(reconstruction_errors(methods, test, STREAMED, device, errors))
    return pd.DataFrame({"components": allowed, error: table.loc[list(methods), error].to_numpy()})


def _projected(pca: PCA, n: int, x: Tensor) -> Tensor:
    """x through the first n components."""
    z = pca.encode(x)
    z[:, n:] = 0
    return pca.decode(z)
