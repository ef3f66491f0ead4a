"""The notebooks on simulations, from the data to the walk; on clips nbval runs them."""

import json
from pathlib import Path

import pytest
from projects import write_verdict_of

from workbench.batch import run_folders
from workbench.config import ConfigError
from workbench.datasets.synthetic import write_pushing
from workbench.paths import outputs_root
from workbench.runs import open_run
from workbench.tasks import plan
from workbench.verdicts import read_verdict

ROOT = Path(__file__).parents[1]
QUICK = {"epochs": "3", "arm_epochs": "2", "seeds": "2", "measured_pairs": "4", "floor_components": "16"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.slow
def test_plate_from_data_to_walk(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(outputs))
    monkeypatch.chdir(ROOT)
    assert run_folders([ROOT / "params" / "demo-simulation"], QUICK) == 0
    runs = {run: outputs_root() / "demo-simulation" / run for run in ("data", "vae", "conditioner", "walk")}
    figures = {run: json.loads((path / "summary.json").read_text()) for run, path in runs.items()}
    assert figures["vae"]["relative_l2_pca"] < figures["vae"]["relative_l2_mean"]
    assert figures["conditioner"]["relative_l2_kernel_ridge"] < figures["conditioner"]["relative_l2_ridge"]
    assert {"relative_l2_latent", "relative_l2_end_to_end", "relative_l2_balanced"} <= figures["conditioner"].keys()
    assert (runs["vae"] / "scaling.safetensors").exists()
    drawn = {path.stem for path in (runs["conditioner"] / "figures").glob("*.png")}
    assert {"predictions", "errors", "error_over_conditions", "arms", "curves"} <= drawn
    events = list((runs["conditioner"] / "tensorboard").glob("events*"))
    assert b"E2E/reconstruction" in events[0].read_bytes() and b"E2E/total" in events[0].read_bytes()


@pytest.mark.slow
def test_pictures_as_conditions(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plate, each run known by the picture of its geometry."""
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(outputs))
    monkeypatch.chdir(ROOT)
    pictures = outputs / "cache" / "plate" / "geometry"
    assert pictures.is_dir(), "written by the test before"
    settings = QUICK | {"experiment": "pictures", "conditions": str(pictures), "conditioner": "cnn", "arms": "[]"}
    settings |= {"width": "4", "depth": "3", "colour_by": "run"}
    assert run_folders([ROOT / "params" / "demo-simulation"], settings) == 0
    summary = json.loads((outputs / "pictures" / "conditioner" / "summary.json").read_text())
    assert summary["relative_l2"] > 0 and summary["relative_l2_kernel_ridge"] > 0


@pytest.mark.slow
def test_latent_actions_of_clips_without_labels_and_of_a_pair_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebook 05 on clips of which nothing is known: no probes, but errors, codes, and the images that were given."""
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir(ROOT)
    clips = write_pushing(tmp_path / "clips", clips=40, frames=8, size=64)
    for name in ("actions.csv", "conditions.csv", "pushing.json"):
        (clips / name).unlink()
    folder = ROOT / "params" / "clips"
    settings = {"data": str(clips), "experiment": "unlabelled", "offsets": "[1, 2]", "epochs": "1", "pair_offset": "5"}
    settings |= {"dim": "16", "heads": "2", "dim_head": "8", "hidden_dims": "[8, 16]", "measured_pairs": "4"}
    settings |= {"quantizers": "[]", "kl_weights": "[]", "batch_size": "16", "latent_dim": "8"}
    settings |= {
        f"{name}_image": str(clips / "clip_00000" / f"img_{i:05d}.jpg") for name, i in (("first", 1), ("second", 6))
    }
    assert run_folders([folder], settings) == 0
    run = tmp_path / "outputs" / "unlabelled" / "comparison"
    drawn = {path.stem for path in (run / "figures").glob("*.png")}
    assert {"comparison", "pair", "rate_distortion", "code_grid", "transfer"} <= drawn and "probes" not in drawn
    gate = (run / "gate.csv").read_text()
    assert "Does LAQ beat copy-frame?" in gate and "be read from" not in gate
    summary = json.loads((run / "summary.json").read_text())
    assert summary["mse_copy_the_first_frame"] > 0 and summary["mse_LAQ"] > 0


@pytest.mark.slow
def test_phases_of_floor_plans_begin_from_the_verdict_before(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, and a failed run, have to be accepted there."""
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(outputs))
    monkeypatch.chdir(ROOT)
    first, second, third = (f"layouts/phase1_{i}" for i in (1, 2, 3))
    assert len(plan(ROOT / "params" / first, {})) == 12 * 3 + 1
    chosen = {
        "data_kind": "layouts",
        "data": "plans",
        "image_size": 64,
        "latent_channels": 3,
        "base_channels": 4,
        "lr": 0.005,
    }
    write_verdict_of(first, chosen, decided=False)
    quick = {"epochs": "1", "batch_size": "192", "floor_samples": "50", "floor_components": "4"}
    with pytest.raises(ConfigError, match="one seed decided nothing there: run params/layouts/phase1_1 --seeds 3, or"):
        run_folders([ROOT / "params" / second], quick)
    tasks = plan(ROOT / "params" / second, quick, 2, ["undecided"])
    held = open_run(next(task.resolved for task in tasks if task.name == "V2-1"))
    with held.lock():  # as by another process, so that this run fails
        assert run_folders([ROOT / "params" / second], quick, seeds=2, jobs=2, accept=["undecided"]) == 1
    verdict = read_verdict(outputs / second / "report" / "verdict.yaml")
    assert verdict.failed == ["V2-1"] and verdict.seeds == [0] and not verdict.decided
    assert {name: verdict.parameters[name] for name in chosen} == chosen
    with pytest.raises(ConfigError, match="V2-1 failed there: run params/layouts/phase1_2 again, or go on without"):
        run_folders([ROOT / "params" / third], quick)
    accept = ["failures", "undecided"]
    assert run_folders([ROOT / "params" / third], quick, seeds=1, jobs=2, accept=accept) == 0
    page = (outputs / third / "report" / "report.md").read_text()
    assert "Classes are told by the colours in V1_rgb, V2_rgb; by the head in V1_seg, V1_seg_cls, V2_seg" in page
    assert "V2_seg adds 0.0001 times the KL, the mean over its dimensions" in page and "PCA-49" in page
    drawn = {path.stem for path in (outputs / third / "report" / "figures").glob("*.png")}
    assert drawn == {"dots", "frontier", "curves", "samples", "interpolations", "differences"}
