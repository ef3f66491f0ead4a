"""A map of latents: where each lies in a plane, which is nearest to another, and the paths between two of them."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.datasets.frames import DataError
from workbench.datasets.loading import Dataset
from workbench.interpolation import METHODS
from workbench.projections import Projection
from workbench.spaces import ROUTE_STEPS, State

FEWEST = 3
"""Points of a map."""


class LatentMap:
    """Latents of some samples in the plane, by PCA or by UMAP.

    Attributes: `z`, the latents; `points`, their coordinates (n, 2) in [0, 1], at one scale for both axes; `axes`,
    names of these.

    Args:
        z: Latents, one of each sample.
        samples: Their samples, which have names.
        projection: `pca`, or `umap` where that is installed.

    Raises:
        DataError: latents that are fewer than three, not one of each sample, or not finite.
        ValueError, ImportError: see `projections.Projection`.
    """

    def __init__(self, z: Float[Tensor, "n d"], samples: Dataset, projection: str = "pca") -> None:
        _check(z, samples)
        self.z, self.samples = z.float().clone(), samples
        self._projection = Projection(self.z, projection)
        self.points, self.axes = self._projection.points.numpy(), self._projection.axes

    def place(self, z: Float[Tensor, "m d"]) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of latents; beyond [0, 1] where they lie outside the samples."""
        return self._projection.place(z).numpy()

    def nearest(self, z: Float[Tensor, " d"]) -> tuple[int, float]:
        """The sample whose latent is nearest to z, the first of equals, and its Euclidean distance."""
        distances = torch.cdist(z[None], self.z, compute_mode="donot_use_mm_for_euclid_dist")[0]  # (n,)
        index = int(distances.argmin())
        return index, float(distances[index])

    def locate(self, z: Float[Tensor, " d"]) -> tuple[Float[np.ndarray, "2"], int, float]:
        """Map coordinates of a latent, of a sample's own one exactly those of its point; and `nearest`.

        Raises:
            ValueError: it is not finite.
        """
        if not bool(torch.isfinite(z).all()):
            raise ValueError("the latent is not finite: the model is broken; take a better checkpoint")
        index, distance = self.nearest(z)
        return self.points[index] if distance == 0 else self.place(z[None])[0], index, distance

    def latent(self, sample: int) -> Float[Tensor, " d"]:
        """The latent of a sample.

        Raises:
            ValueError: there is no such sample.
        """
        if not 0 <= sample < len(self.z):
            raise ValueError(f"sample {sample}: must be from 0 to {len(self.z) - 1}")
        return self.z[sample]

    def path(self, state: State, positions: Float[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Latents on the way from A (0) to B (1).

        Raises:
            ValueError: A or B is not pinned; for slerp, they are equal, opposite, or zero.
        """
        if min(state.pin_a, state.pin_b) < 0:
            raise ValueError("no path yet: pin two samples of the map, as A and as B")
        a, b = self.latent(state.pin_a), self.latent(state.pin_b)
        if state.method == "slerp" and torch.equal(a, b):
            raise ValueError(
                f"A equal to B ({self.samples.name(state.pin_a)}): slerp is not defined between a latent and itself, "
                "so nothing moves along it; pin another sample, or use lerp"
            )
        return METHODS[state.method](a, b, positions)

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the path; none where A or B is not pinned.

        Raises:
            ValueError: as `path`.
        """
        if min(state.pin_a, state.pin_b) < 0:
            return np.empty((0, 2), np.float32)
        return self._projection.place(self.path(state, torch.linspace(0, 1, ROUTE_STEPS))).numpy()


def _check(z: Float[Tensor, "n d"], samples: Dataset) -> None:
    n = len(z)
    if n < FEWEST:
        raise DataError(f"{n} samples: a map needs at least {FEWEST} points; hold out or encode more samples")
    if n != len(samples):
        raise DataError(f"{n} latents of {len(samples)} samples: must be one of each; encode this very split")
    broken = int((~torch.isfinite(z)).any(1).sum())
    if broken:
        raise DataError(f"{broken} of {n} latents are not finite: the model is broken; take a better checkpoint")
