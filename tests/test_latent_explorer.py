import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import Space, assert_shows, open_space, say, shown, write_run
from torch import nn

from workbench.checkpoints import CheckpointError, save_model
from workbench.comparison import decode, encode_split
from workbench.datasets.frames import DataError
from workbench.latent_explorer import explore, explore_run, explore_runs
from workbench.models import build_vae
from workbench.models.laq import LAQ, LAQConfig
from workbench.runs import Run, RunError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def space(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    return open_space("clips", tmp_path_factory.mktemp("clips"))


def test_columns_that_are_absent_are_refused(space: Space, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'height': the data has clip, frame; choose one of them"):
        explore(*space, Run(tmp_path), column="height")


def test_other_columns_colour_by_name(space: Space, tmp_path: Path) -> None:
    widget = explore(*space, Run(tmp_path), "clip")
    assert widget.legend["kind"] == "classes" and widget.legend["label"] == "clip"
    assert [text for text, _ in widget.legend["entries"]] == sorted(set(space.samples.column("clip")))


def test_errors_colour_the_map_unless_the_data_have_such_a_column(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget, errors = explore(*space, Run(tmp_path), "error"), space.explore().errors()[0]
    assert (widget.legend["kind"], widget.legend["label"]) == ("numbers", space.data.error_label)
    colours = np.frombuffer(widget.colours, np.uint8).reshape(-1, 3).tolist()
    least, most = (colours[i] for i in (errors.argmin(), errors.argmax()))
    assert [bytes(colour).hex() for colour in (least, most)] == [widget.legend["entries"][i][1][1:] for i in (0, -1)]
    table = space.samples.table().assign(error=["low", "high"] * 5)
    monkeypatch.setattr(type(space.samples), "table", lambda self: table)
    assert explore(*space, Run(tmp_path), "error").legend["label"] == "error"


@pytest.mark.parametrize("pins", [(1, 2, 3), (0, 10), (-1,)])
def test_pins_must_be_samples(space: Space, tmp_path: Path, pins: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pins=\[.*\]: must be at most two samples, from 0 to 9"):
        explore(*space, Run(tmp_path), pins=pins)


# --- runs ---


@pytest.fixture
def finished(space: Space, tmp_path: Path) -> Run:
    return write_run(space, "clips", tmp_path)


def test_a_trained_run_opens_by_its_folder(finished: Run, space: Space) -> None:
    widget = explore_run(finished.path, device="cpu")
    assert_shows(widget, space, encode_split(space.model, space.samples, 16).mu[0])
    say(widget, pin_a=0, pin_b=1, save=1)
    assert (finished.path / "samples" / "strip-1.npz").exists()
    assert len(explore_run(finished.path, "train", "clip", most=4, device="cpu").colours) == 3 * 4


def test_runs_that_cannot_be_explored_are_refused(finished: Run) -> None:
    config = finished.path / "config.json"
    whole, weights = config.read_text(), finished.path / "model.safetensors"
    content = weights.read_bytes()
    config.write_text(whole.replace(finished.config["data"]["fingerprint"], "0" * 16))
    with pytest.raises(RunError, match="was trained on other data or another split"):
        explore_run(finished.path)
    entries = json.loads(whole)
    nameless = {k: v for k, v in entries["parameters"].items() if k != "data_kind"}
    for damaged in ({k: v for k, v in entries.items() if k != "data"}, entries | {"parameters": nameless}):
        config.write_text(json.dumps(damaged))
        for opened in (explore_run, lambda path: explore_runs([path, path.parent])):
            with pytest.raises(RunError, match="config.json says not on which data: restore it, or train the run ag"):
                opened(finished.path)
    config.write_text(whole)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        explore_run(finished.path)
    weights.unlink()
    with pytest.raises(RunError, match="has no finished model .*run its notebook again to go on"):
        explore_run(finished.path)
    config.write_text(whole[:50])
    with pytest.raises(RunError, match="damaged"):
        explore_run(finished.path)


def test_settings_of_the_map_and_of_decoding_are_checked(finished: Run) -> None:
    with pytest.raises(ValueError, match="projection='tsne': must be one of pca, umap"):
        explore_run(finished.path, projection="tsne")
    with pytest.raises(ValueError, match="precision='fp16': must be 'fp32' or 'bf16'"):
        explore_run(finished.path, precision="fp16")


def test_a_run_is_decoded_in_the_precision_it_was_trained_in(finished: Run, space: Space) -> None:
    config = finished.config
    (finished.path / "config.json").write_text(
        json.dumps(config | {"parameters": config["parameters"] | {"precision": "bf16"}})
    )
    z = encode_split(space.model, space.samples, 16).mu[:1]
    with torch.autocast("cpu", torch.bfloat16):
        half = space.data.pixels(decode(space.model, z)[0])
    full = space.data.pixels(decode(space.model, z)[0])
    assert (half != full).any(), "the two precisions can be told apart"
    np.testing.assert_array_equal(shown(explore_run(finished.path, device="cpu")), half)
    np.testing.assert_array_equal(shown(explore_run(finished.path, device="cpu", precision="fp32")), full)


# --- two runs ---


def other_run(space: Space, folder: Path) -> tuple[Run, nn.Module]:
    """A run on the same samples with a longer latent."""
    torch.manual_seed(1)
    model = build_vae({"data_kind": "clips", "latent_dim": 5, "hidden_dims": [4, 6]}, space.data.sizes).eval()
    return write_run(space._replace(model=model), "clips", folder, "other"), model


def test_relative_paths_are_taken_from_the_root_of_the_project(
    finished: Run, space: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    shutil.copytree(finished.path, tmp_path / "outputs" / "e" / "vae")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("WORKBENCH_OUTPUTS", raising=False)
    widget = explore_run("outputs/e/vae", device="cpu")
    assert_shows(widget, space, encode_split(space.model, space.samples, 16).mu[0])


def test_two_runs_stand_side_by_side(finished: Run, space: Space, tmp_path: Path) -> None:
    run, model = other_run(space, tmp_path)
    widget = explore_runs([finished.path, run.path], pins=(1, 4), device="cpu")
    assert [panel["title"] for panel in widget.panels] == ["r", "other", "nearest sample"]
    assert widget.walks and widget.draws and widget.dimensions == widget.conditions == []
    say(widget, position=0.5, mode="path")
    for panel, own in enumerate((space.model, model)):
        mu = encode_split(own, space.samples, 16).mu
        expected = space.data.pixels(decode(own, torch.lerp(mu[1], mu[4], 0.5)[None])[0])
        np.testing.assert_array_equal(shown(widget, panel), expected)
    say(widget, save=1)
    assert widget.message.startswith("saved") and (finished.path / "samples" / "strip-1.npz").exists()


def test_runs_of_other_samples_are_not_compared(finished: Run, space: Space, tmp_path: Path) -> None:
    run, _ = other_run(space, tmp_path)
    whole, digest = run.config, {"fingerprint": "f" * 16}
    for parameters, message in (
        ({"split_seed": 7}, "fingerprint: .* there, f* here, split_seed: 0 there, 7 here"),
        ({}, "were trained on other samples: fingerprint: .*Choose runs of the same data"),
    ):
        config = whole | {"parameters": whole["parameters"] | parameters, "data": digest}
        (run.path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RunError, match=message):
            explore_runs([finished.path, run.path])
    fields = {"parameters": {"data_kind": "simulation", "data": "fields.npy"}, "data": digest}
    (run.path / "config.json").write_text(json.dumps(whole | fields))
    with pytest.raises(RunError, match=r"samples: data_kind: \w+ there, simulation here \('there' is the first"):
        explore_runs([finished.path, run.path])
    config = json.loads(json.dumps(whole))
    config["parameters"] |= {"cache_dir": str(tmp_path / "elsewhere")}
    (run.path / "config.json").write_text(json.dumps(config))
    assert len(explore_runs([finished.path, run.path], device="cpu").panels) == 3, "what changes no sample may differ"


def test_strips_of_two_runs_go_where_they_are_asked_for(finished: Run, space: Space, tmp_path: Path) -> None:
    run, _ = other_run(space, tmp_path)
    report = Run(tmp_path / "report")
    report.path.mkdir()
    widget = explore_runs([finished.path, run.path], report, pins=(1, 4), device="cpu")
    say(widget, save=1)
    assert (report.path / "samples" / "strip-1.npz").exists() and not (finished.path / "samples").exists()


def test_side_by_side_takes_two_autoencoders(finished: Run) -> None:
    path = finished.path
    three = [path, path / "a", path / "b"]
    for paths, found in ((str(path), "1"), ([path, path / ".." / path.name], "1"), ([], "0"), (three, "3")):
        with pytest.raises(RunError, match=rf"{found} run\(s\) \(.*\): must be two different ones; name two"):
            explore_runs(paths)


def test_runs_of_one_name_are_told_apart_by_their_folders(finished: Run, tmp_path: Path) -> None:
    for root in ("one", "other"):
        shutil.copytree(finished.path, tmp_path / root / "e" / "r")
    widget = explore_runs([tmp_path / "one" / "e" / "r", tmp_path / "other" / "e" / "r"], device="cpu")
    assert [panel["title"] for panel in widget.panels] == ["one/e/r", "other/e/r", "nearest sample"]


def test_side_by_side_are_no_models_of_actions(finished: Run, space: Space, tmp_path: Path) -> None:
    run, model = (
        other_run(space, tmp_path),
        LAQ(LAQConfig(image_size=32, patch_size=4, dim=8, heads=1, dim_head=8, spatial_depth=1)),
    )
    path = run[0].path
    (path / "config.json").write_text(
        json.dumps(run[0].config | {"model": {"kind": "laq"} | model.config.model_dump()})
    )
    save_model(path / "model.safetensors", model, "laq")
    with pytest.raises(RunError, match="other holds a model of kind 'laq': must be one of conv_vae, "):
        explore_runs([finished.path, path])
