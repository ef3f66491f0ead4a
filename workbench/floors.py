"""What prediction from conditions has to beat: the mean sample, ridge, and kernel ridge (scikit-learn)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from workbench.datasets.loading import Batch, Dataset
from workbench.metrics import mse

MEMORY_BYTES = 4e9
RIDGE_ALPHAS = np.logspace(-6, 2, 9)
KERNEL_ALPHAS = np.logspace(-8, -2, 4)
GAMMAS = 3 * np.logspace(-2, 0.5, 8)
"""Of the Gaussian kernel, times the number of conditions."""


@dataclass(frozen=True)
class Regression:
    """Conditions, standardised, to the PCA codes of samples, and those to samples."""

    scaler: StandardScaler
    model: Ridge | KernelRidge
    pca: PCA

    def __call__(self, conditions: Float[np.ndarray, "p c"]) -> Float[np.ndarray, "p d"]:
        """Samples, flattened."""
        return self.pca.inverse_transform(self.model.predict(self.scaler.transform(conditions)))


def condition_floors(
    train: Dataset, val: Dataset, n_components: int, error: Callable[[Tensor, Tensor], Tensor] = mse
) -> dict[str, Callable[[Batch], Tensor]]:
    """Classical predictions of x from conditions, their settings chosen by the mean error on the validation split.

    The mean sample; ridge, and kernel ridge with a Gaussian kernel, from the standardised conditions to PCA codes of
    the samples. Everything but the choice is fitted on the training samples.

    Args:
        train: Samples to fit on; all of them are held in memory.
        val: Samples to choose by.
        n_components: Of the PCA, at most; fewer where there are not so many samples.
        error: Of each sample, (x_hat, x) to it; the data's own.

    Returns:
        Prediction from a prepared batch, by name, the chosen setting in the name.

    Raises:
        ValueError: the training samples take more memory than `MEMORY_BYTES`.
    """
    values = train.prepare(train.batch(np.arange(1)))["x"].numel()
    most = int(MEMORY_BYTES / (8 * values))
    if len(train) > most:
        raise ValueError(
            f"floor_samples: {len(train)} samples of {values} values take {8e-9 * len(train) * values:.1f} GB; set it "
            f"to at most {most}"
        )
    c, x = _arrays(train)
    held_out = val.prepare(val.batch(np.arange(len(val))))
    scaler = StandardScaler().fit(c)
    with np.errstate(invalid="ignore"):  # where x is constant, the shares of its variance are 0 / 0; none is used
        pca = PCA(min(n_components, len(x) - 1, x.shape[1]), random_state=0).fit(x)
    ridges = {f"ridge (alpha {a:g})": Ridge(alpha=a) for a in RIDGE_ALPHAS}
    kernels = {
        f"kernel ridge (alpha {a:g}, gamma {g / c.shape[1]:.2g})": KernelRidge(
            alpha=a, gamma=g / c.shape[1], kernel="rbf"
        )
        for a in KERNEL_ALPHAS
        for g in GAMMAS
    }
    chosen = {"mean": _of_batch(lambda conditions: np.tile(x.mean(0), (len(conditions), 1)))}
    for family in (ridges, kernels):
        best, lowest = None, np.inf
        for name, model in family.items():
            fitted = _of_batch(Regression(scaler, model.fit(scaler.transform(c), pca.transform(x)), pca))
            found = float(error(fitted(held_out), held_out["x"]).mean())
            if found < lowest:
                best, lowest = (name, fitted), found
        chosen[best[0]] = best[1]
    return chosen


def _arrays(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Conditions and samples, flattened, in float64."""
    batch = dataset.prepare(dataset.batch(np.arange(len(dataset))))
    return tuple(batch[key].flatten(1).double().numpy() for key in ("condition", "x"))


def _of_batch(predict: Callable[[np.ndarray], np.ndarray]) -> Callable[[Batch], Tensor]:
    """A prediction from arrays as one from a prepared batch, on its device."""

    def of_batch(batch: Batch) -> Tensor:
        x_hat = predict(batch["condition"].flatten(1).double().cpu().numpy())
        return torch.from_numpy(x_hat).to(batch["x"]).reshape(batch["x"].shape)

    return of_batch
