import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from workbench.metrics import fit_pca
from workbench.projections import Projection

Z = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


def test_pca_is_the_default_at_one_scale_in_the_unit_square() -> None:
    found, plain = Projection(Z), fit_pca(lambda: [Z], 2).encode(Z)
    assert found.axes == ("PCA axis 1 of z", "PCA axis 2 of z")
    spans = found.points.amax(0) - found.points.amin(0)
    assert spans.max() == pytest.approx(1, abs=1e-6) and found.points.amin() >= -1e-6
    scale = (plain.amax(0) - plain.amin(0)).max()
    torch.testing.assert_close(found.points - found.points[0], (plain - plain[0]) / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.place(Z), found.points, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.flat, plain.double(), atol=1e-6, rtol=0)


def test_single_numbers_lie_on_a_level_line_in_their_own_unit() -> None:
    z = Z[:, :1]
    found = Projection(z)
    assert found.flat[:, 0].std() == pytest.approx(float(z.std()), rel=1e-5) and not found.flat[:, 1].any()


def test_another_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="projection='tsne': must be one of pca, umap"):
        Projection(Z, "tsne")


def test_without_umap_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    with pytest.raises(ImportError, match="UMAP is not installed; install it with `pip install umap-learn`, or use"):
        Projection(Z, "umap")


class Shear:
    """In the place of UMAP: a map that is not linear, and what it was asked for."""

    asked: dict = {}

    def __init__(self, **settings: object) -> None:
        Shear.asked = settings

    def fit(self, z: np.ndarray) -> "Shear":
        self.embedding_ = self.transform(z)
        return self

    def transform(self, z: np.ndarray) -> np.ndarray:
        return np.stack([z[:, 0], z[:, 1] + z[:, 0] ** 3], 1).astype(np.float32)


def test_umap_places_latents_by_its_own_transform_and_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("umap")
    module.UMAP = Shear
    monkeypatch.setitem(sys.modules, "umap", module)
    found = Projection(Z[:9], "umap")
    assert found.axes == ("UMAP axis 1 of z", "UMAP axis 2 of z")
    assert Shear.asked["random_state"] == 0 and Shear.asked["n_neighbors"] == 8, "fewer samples than neighbours"
    flat = torch.from_numpy(Shear().transform(Z.numpy()))
    extent = (flat[:9].amax(0) - flat[:9].amin(0)).max()
    placed = found.place(Z)
    torch.testing.assert_close(placed - placed[0], (flat - flat[0]) / extent, atol=1e-5, rtol=1e-5)


def test_latents_without_a_map_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("umap")
    module.UMAP = type("Lost", (Shear,), {"transform": lambda self, z: np.full((len(z), 2), np.nan, np.float32)})
    monkeypatch.setitem(sys.modules, "umap", module)
    with pytest.raises(ValueError, match="UMAP finds no map of latents that are all the same; use 'pca'"):
        Projection(Z, "umap")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="UMAP is not installed: pip install umap-learn")
def test_umap_keeps_apart_what_is_apart_and_is_the_same_again() -> None:
    z = torch.cat([Z[:20], Z[20:] + 30])
    one, other = Projection(z, "umap"), Projection(z, "umap")
    assert torch.equal(one.points, other.points) and torch.equal(one.place(z[:1]), one.place(z[:1]))
    centres = one.points[:20].mean(0), one.points[20:].mean(0)
    spread = max(float((part - part.mean(0)).norm(dim=1).max()) for part in (one.points[:20], one.points[20:]))
    assert float((centres[0] - centres[1]).norm()) > spread
