"""A latent action model goes through the training loop as any model does: logged, resumed to the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny import QUICK, Dies, Images, assert_same, metrics

from workbench.models.laq import LAQ, LAQConfig
from workbench.objectives import LatentActions
from workbench.runs import Run, open_run
from workbench.schedule import TrainConfig
from workbench.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = LAQConfig(
    image_size=16,
    patch_size=2,
    dim=12,
    spatial_depth=1,
    temporal_depth=1,
    heads=2,
    dim_head=4,
    codebook_size=6,
    code_dim=5,
)
SETTINGS = {"epochs": 4, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 2, "log_every": 1}


class Pairs(Images):
    """Blobs and themselves, brighter or darker."""

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        batch = super().batch(indices)
        sign = torch.where(batch["id"] % 2 == 0, 0.3, -0.3)[:, None, None, None]
        return batch | {"first": batch["x"], "x": (batch["x"] + sign).clamp(-1, 1)}


def train(folder: Path, pairs: Pairs | None = None, **settings: int) -> Run:
    """Three of the six codes begin so far away that none of the pairs chooses them."""
    config = TrainConfig(**QUICK | SETTINGS | settings)
    run = open_run({"experiment": "e", "run": "r", **config.model_dump()}, folder)
    torch.manual_seed(0)
    model = LAQ(SIZES)
    model.quantizer.codebook.data[3:] += 100
    sets = (pairs or Pairs(24, size=16), Pairs(8, seed=1, size=16), config, run)
    fit(model, "laq", *sets, lambda progress: {"mse": 1.0}, lambda x, x_hat: Figure(), LatentActions(model))
    return run


def test_codes_are_replaced_on_schedule_and_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    expected = train(tmp_path / "undisturbed")
    rows = metrics(expected, "train")
    replaced = {row["step"]: float(row["replaced"]) for row in rows if float(row["replaced"]) > 0}
    assert list(replaced) == ["10"] and replaced["10"] >= 3, "the schedule: step 10 of 12"
    assert all(row["replaced"] != "" for row in rows)
    for at in (5, 11):

        def dies(number: int, at: int = at) -> None:
            if number == at:
                raise Dies

        folder = tmp_path / f"killed{at}"
        with pytest.raises(Dies):
            train(folder, Pairs(24, size=16, on_batch=dies))
        assert_same(train(folder), expected)


def test_a_replacement_is_logged_whatever_log_every_is(tmp_path: Path) -> None:
    rows = metrics(train(tmp_path, log_every=100), "train")
    assert [row["step"] for row in rows] == ["1", "10", "12"] and float(rows[1]["replaced"]) >= 3
