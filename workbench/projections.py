"""Maps of latents: where each lies in the plane, by PCA or by UMAP.

Source: McInnes, Healy & Melville 2018, UMAP: uniform manifold approximation and projection.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from workbench.metrics import fit_pca

NEIGHBOURS = 15
"""Of UMAP, its own default."""
SEED = 0

Encode = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m 2"]]


class Projection:
    """A map of latents, at one scale for both axes.

    Attributes: `points` (n, 2), map coordinates of the latents that it was made from, x to the right and y up, in
    [0, 1] with the shorter axis in the middle; `flat` (n, 2), the same before they are scaled, for PCA in units of the
    latents; `axes`, their names.

    Args:
        z: Latents, at least three.
        method: `pca`, the two directions in which they vary most, and a level line where they are of one dimension; or
            `umap`, which keeps neighbours together and is the same for the same latents.

    Raises:
        ValueError: another method, or latents of which UMAP finds no map: all the same, or single numbers.
        ImportError: UMAP is not installed.
    """

    def __init__(self, z: Float[Tensor, "n d"], method: str = "pca") -> None:
        if method not in METHODS:
            raise ValueError(f"projection={method!r}: must be one of {', '.join(METHODS)}")
        flat, self._encode, name = METHODS[method](z)  # (n, 2)
        low, high = flat.amin(0), flat.amax(0)
        self._centre, self._extent = (low + high) / 2, float((high - low).max()) or 1.0
        self.flat = flat
        second = f"{name} axis 2 of z" if z.shape[1] > 1 else "no second axis: z is a single number"
        self.points, self.axes = self._scale(flat), (f"{name} axis 1 of z", second)

    def place(self, z: Float[Tensor, "m d"]) -> Float[Tensor, "m 2"]:
        """Map coordinates of any latents; beyond [0, 1] where they lie outside the others."""
        return self._scale(self._encode(z))

    def _scale(self, flat: Tensor) -> Tensor:
        return ((flat.double() - self._centre) / self._extent + 0.5).float()


def _pca(z: Float[Tensor, "n d"]) -> tuple[Tensor, Encode, str]:
    pca = fit_pca(lambda: [z], n_components=min(2, z.shape[1]))

    def encode(z: Tensor) -> Tensor:
        flat = pca.encode(z)
        return pad(flat, (0, 2 - flat.shape[1]))  # (n, 2)

    return encode(z).double(), encode, "PCA"


def _umap(z: Float[Tensor, "n d"]) -> tuple[Tensor, Encode, str]:
    if z.shape[1] < 2:
        raise ValueError("projection='umap': latents of a single number, which is a map already; use 'pca'")
    try:
        from umap import UMAP  # not everyone has it, and it takes seconds to import
    except ImportError:
        raise ImportError(
            "projection='umap': UMAP is not installed; install it with `pip install umap-learn`, or use 'pca'"
        ) from None
    settings = {"n_neighbors": min(NEIGHBOURS, len(z) - 1), "init": "pca", "random_state": SEED, "n_jobs": 1}
    fitted = UMAP(n_components=2, **settings).fit(z.numpy())
    if not np.isfinite(fitted.embedding_).all():
        raise ValueError("projection='umap': UMAP finds no map of latents that are all the same; use 'pca'")
    fitted.transform(z[:1].numpy())  # compiles, so that no one has to wait for the first latent that is placed
    return torch.from_numpy(fitted.embedding_).double(), lambda z: torch.from_numpy(fitted.transform(z.numpy())), "UMAP"


METHODS = {"pca": _pca, "umap": _umap}
