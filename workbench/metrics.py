"""Errors of reconstructions, the floors they must beat, and what a latent space is worth.

Images are tensors in [-1, 1] of shape (b, c, h, w), so the data range is 2. Every error is given per sample;
the figure to report is the mean over samples, also for PSNR, where it is not the PSNR of the mean error.

Sources:
    Wang et al. 2004, Image quality assessment: from error visibility to structural similarity.
    Halko, Martinsson & Tropp 2011, Finding structure with randomness, section 4.5 (subspace iteration).
    Burda, Grosse & Salakhutdinov 2016, Importance weighted autoencoders, appendix C (active units).
    Karras, Laine & Aila 2019, A style-based generator architecture for GANs, section 4.1 (path length).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DATA_RANGE = 2.0  # images span [-1, 1]
SSIM_WINDOW = 11  # [px], width of the Gaussian window
OVERSAMPLE = 10  # directions carried beyond n_components, for faster convergence


def mse(x_hat: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean squared error of each sample, per element and on the scale of the data.

    Raises:
        ValueError: x_hat and x have different shapes.
    """
    _check_same_shape("x_hat", x_hat, "x", x)
    return (x_hat - x).square().flatten(1).mean(1)


def image_errors(x_hat: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """Reconstruction errors of each image; the caller takes the mean over samples.

    The luminance term of SSIM is defined for intensities from zero up, so it is computed on x + 1, in [0, 2].

    Args:
        x_hat: Reconstructions, not clipped here.
        x: Originals in [-1, 1], at least 11 px high and wide.

    Returns:
        mse: Per element, on the [-1, 1] scale.
        psnr: 10 log10(4 / mse) in dB; infinite for an exact reconstruction.
        ssim: Structural similarity, at most 1, Gaussian window of 11 px with reflected borders.

    Raises:
        ValueError: The shapes differ, or the images are smaller than the window of SSIM.
    """
    from torchmetrics.functional import image  # here, as it imports scipy, for a second of every process

    _check_same_shape("x_hat", x_hat, "x", x)
    h, w = x.shape[-2:]
    if min(h, w) < SSIM_WINDOW:
        raise ValueError(
            f"images of {h} x {w} px: SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} px; "
            "use larger images, or metrics.mse alone"
        )
    psnr = image.peak_signal_noise_ratio(x_hat, x, data_range=DATA_RANGE, reduction="none", dim=(1, 2, 3))
    ssim = image.structural_similarity_index_measure(x_hat + 1, x + 1, data_range=DATA_RANGE, reduction="none")
    return {"mse": mse(x_hat, x), "psnr": psnr, "ssim": ssim}


def field_errors(field_hat: Float[Tensor, "b ..."], field: Float[Tensor, "b ..."]) -> dict[str, Tensor]:
    """Errors of each predicted field, in the field's own unit; the caller takes the mean over runs.

    Returns:
        relative_l2: Norm of the error over the norm of the field, over all times, nodes and variables; 0 where both
            fields are 0 everywhere, infinite where only the true one is.
        mse: Per value, in the squared unit.
        mae: Per value, in the unit.

    Raises:
        ValueError: The shapes differ.
    """
    _check_same_shape("field_hat", field_hat, "field", field)
    error, field = (field_hat - field).flatten(1), field.flatten(1)
    norm = error.norm(dim=1)
    relative = torch.where(norm == 0, 0.0, norm / field.norm(dim=1))
    return {"relative_l2": relative, "mse": error.square().mean(1), "mae": error.abs().mean(1)}


@dataclass(frozen=True)
class MeanFloor:
    """The mean training sample as the answer to everything: the error of a code of no dimensions.

    Args:
        mean: Mean sample, in the shape of one sample.
        n_samples: Training samples that went into it.
    """

    mean: Float[Tensor, "..."]
    n_samples: int

    def reconstruct(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The mean sample, once for each sample of x."""
        _check_sample_shape(x, self.mean)
        return self.mean.to(x).expand_as(x)


@dataclass(frozen=True)
class PCA:
    """Principal components of the training split: the best linear code of its size.

    Args:
        mean: Mean sample, in the shape of one sample.
        components: Orthonormal rows, by descending variance.
        explained_variance: Variance of the training split along each component.
        last_gain: Share of the captured variance that the last iteration added. Far above 1e-4 the components
            have not converged and flatter the model they are compared with: raise `iterations`.
    """

    mean: Float[Tensor, "..."]
    components: Float[Tensor, "k d"]
    explained_variance: Float[Tensor, " k"]
    last_gain: float

    def encode(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Coordinates of x along the components."""
        _check_sample_shape(x, self.mean)
        return (x - self.mean.to(x)).flatten(1) @ self.components.to(x).T

    def decode(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "b ..."]:
        """The sample at coordinates z, in the shape of the training samples."""
        flat = z @ self.components.to(z)  # (b, d)
        return flat.reshape(len(z), *self.mean.shape) + self.mean.to(z)

    def reconstruct(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Projection of x onto the components; it may leave [-1, 1]."""
        return self.decode(self.encode(x))


def fit_mean(batches: Iterable[Float[Tensor, "_ ..."]]) -> MeanFloor:
    """Mean of the training split, in one pass and in float64; a ValueError where there is no sample."""
    total, n_samples = None, 0
    for x in batches:
        batch_sum = x.double().sum(0)
        total = batch_sum if total is None else total + batch_sum
        n_samples += len(x)
    if n_samples == 0:
        raise ValueError("batches hold 0 samples: a floor needs at least 1; check the training split")
    return MeanFloor((total / n_samples).to(x.dtype), n_samples)


def fit_pca(
    make_batches: Callable[[], Iterable[Float[Tensor, "_ ..."]]],
    n_components: int,
    iterations: int = 8,
    seed: int = 0,
) -> PCA:
    """Principal components by randomised block subspace iteration, streaming over the training split.

    Memory holds (n_components + 10) x d values and one batch, in float64. The data are read iterations + 2
    times: for the mean, for each iteration, and for the Rayleigh-Ritz step that orders the components.

    Args:
        make_batches: Returns the batches of the training split, afresh on every call.
        n_components: Size of the code; for a fair comparison the latent dimension of the model.
        iterations: Multiplications of the basis by the covariance before the Rayleigh-Ritz step.
        seed: Seed of the starting basis.

    Raises:
        ValueError: n_components or iterations is out of range, or the batches cannot be read twice.

    Source: Halko, Martinsson & Tropp 2011, algorithm 4.4.
    """
    floor = fit_mean(make_batches())
    d = floor.mean.numel()
    largest = min(floor.n_samples, d)
    if not 1 <= n_components <= largest:
        raise ValueError(
            f"n_components={n_components}: must be from 1 to {largest}, the smaller of "
            f"{floor.n_samples} samples and {d} values per sample"
        )
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(d, min(n_components + OVERSAMPLE, d), generator=generator, dtype=torch.float64)
    image = image.to(floor.mean.device)
    captured = []
    for _ in range(iterations + 1):
        basis = torch.linalg.qr(image).Q  # (d, p)
        image = _covariance_times(make_batches(), floor, basis)  # (d, p)
        projected = basis.T @ image  # (p, p)
        variances, rotation = torch.linalg.eigh((projected + projected.T) / 2)  # ascending
        captured.append(variances[-n_components:].sum().item())
    components = (basis @ rotation).T.flip(0)[:n_components]  # (k, d)
    variances = variances.flip(0)[:n_components].clamp(min=0)
    gain = max(captured[-1] - captured[-2], 0.0) / captured[-1] if captured[-1] > 0 else 0.0
    dtype = floor.mean.dtype
    return PCA(floor.mean, components.to(dtype), variances.to(dtype), gain)


def _covariance_times(
    batches: Iterable[Float[Tensor, "_ ..."]], floor: MeanFloor, basis: Float[Tensor, "d p"]
) -> Float[Tensor, "d p"]:
    """Sample covariance of the batches times the basis, without forming the covariance."""
    product, n_samples = torch.zeros_like(basis), 0
    for x in batches:
        centred = (x - floor.mean.to(x)).flatten(1).double()  # (b, d)
        product += centred.T @ (centred @ basis)
        n_samples += len(x)
    if n_samples != floor.n_samples:
        raise ValueError(
            f"make_batches gave {floor.n_samples} samples, then {n_samples}: must give all of them on every "
            "call; build the loader or generator inside it"
        )
    return product / max(n_samples - 1, 1)


def kl_per_dimension(mu: Float[Tensor, "b d"], logvar: Float[Tensor, "b d"]) -> Float[Tensor, " d"]:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension in nats, mean over the samples.

    Args:
        mu: Posterior mean, dimensionless.
        logvar: Natural logarithm of the posterior variance.

    Raises:
        ValueError: mu and logvar have different shapes.

    Source: Kingma & Welling 2014, appendix B.
    """
    _check_same_shape("mu", mu, "logvar", logvar)
    return 0.5 * (mu.square() + logvar.expm1() - logvar).mean(0)


def active_units(mu: Float[Tensor, "b d"], threshold: float = 0.01) -> int:
    """Number of latent dimensions whose posterior mean varies over the samples by more than a threshold.

    Args:
        mu: Posterior means of held-out samples, at least 2.
        threshold: Least variance of an active dimension, dimensionless.

    Source: Burda et al. 2016, appendix C.
    """
    if len(mu) < 2:
        raise ValueError(f"mu holds {len(mu)} samples: must be at least 2; pass the whole held-out split")
    return int((mu.var(0) > threshold).sum())


def collapse_verdict(mu: Float[Tensor, "b d"], logvar: Float[Tensor, "b d"] | None, threshold: float = 0.01) -> str:
    """Whether the posterior has collapsed to the prior, as a sentence with its numbers.

    "collapsed" where no latent dimension is active, "partly collapsed" under a quarter, else "not collapsed".

    Args:
        mu: Posterior means of held-out samples, at least 2.
        logvar: Natural logarithm of the posterior variance; None for a deterministic encoder.
        threshold: Least variance of mu of an active dimension.
    """
    active, d = active_units(mu, threshold), mu.shape[1]
    word = "collapsed" if active == 0 else "partly collapsed" if active < d / 4 else "not collapsed"
    verdict = f"{word}: {active} of {d} latent dimensions active (variance of mu above {threshold:g})"
    if logvar is None:
        return f"{verdict}; no KL, the encoder is deterministic"
    return f"{verdict}; total KL {kl_per_dimension(mu, logvar).sum():.1f} nats"


def path_length_ratio(path: Float[Tensor, "t ..."]) -> Float[Tensor, ""]:
    """Length of a decoded path over the straight distance between its ends, at least 1.

    Lengths are Euclidean; a linear decoder under lerp gives 1.

    Args:
        path: Decoded samples in the order of the path, at least 2, its ends not equal.
    """
    _check_steps(path)
    length = path.diff(dim=0).flatten(1).norm(dim=1).sum()
    straight = (path[-1] - path[0]).norm()
    if straight <= 1e-6 * length:
        raise ValueError(
            f"path of length {length:.3g} with ends {straight:.3g} apart: the ratio needs ends that differ; "
            "choose two samples that decode differently"
        )
    return length / straight


def perceptual_path_length(
    path: Float[Tensor, "t ..."],
    distance: Callable[[Float[Tensor, "b ..."], Float[Tensor, "b ..."]], Float[Tensor, " b"]] = mse,
) -> Float[Tensor, ""]:
    """Mean over the steps of a path of distance(x_i, x_i+1) / epsilon^2, with epsilon = 1 / (t - 1).

    Karras et al. take epsilon = 1e-4 at one random place of each path; here every step of the path counts.
    Compare only paths measured with the same distance and the same t.

    Args:
        path: Decoded samples in the order of the path, at least 2.
        distance: Distance per sample, mse or an `LPIPS`.

    Source: Karras et al. 2019, section 4.1.
    """
    _check_steps(path)
    return distance(path[:-1], path[1:]).mean() * (len(path) - 1) ** 2


def _check_steps(path: Tensor) -> None:
    if len(path) < 2:
        raise ValueError(f"a path of {len(path)} samples: must have at least 2; decode more steps")


def _check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} of shape {tuple(a.shape)} and {name_b} of shape {tuple(b.shape)}: must be equal")


def _check_sample_shape(x: Tensor, mean: Tensor) -> None:
    if x.shape[1:] != mean.shape:
        raise ValueError(
            f"samples of shape {tuple(x.shape[1:])}: the floor was fitted on {tuple(mean.shape)}; "
            "fit it on samples of the same shape"
        )
