import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from encoded import SIZE, Copy, begin, data, stub, trained

from workbench.encoder_runs import open_same, runs_of, setting_of
from workbench.runs import Run, RunError, write_json

pytestmark = pytest.mark.usefixtures("one_thread")


# --- which runs ---


def test_the_runs_of_an_experiment_by_setting_and_seed(trained, data, tmp_path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(trained[0].parent, folder)
    for seed in (10, 2):
        begin(tmp_path, data, f"gauss-{seed}", seed)  # begun, not finished
    run, _ = begin(tmp_path, data, "stopped", 0)
    (run.path / "model.safetensors").touch()  # of what model, nothing says
    for name, kind in (("clips", "conv_vae"), ("data", "")):  # another model; a look at the data
        (folder / name).mkdir()
        content = {"parameters": {"data_kind": "layouts", "seed": 0}} | ({"model": {"kind": kind}} if kind else {})
        (folder / name / "config.json").write_text(json.dumps(content))
    (folder / "clips" / "model.safetensors").touch()
    found, failed = runs_of(folder)
    assert [path.name for path in found] == ["gauss-0", "gauss-1", "point-0", "point-1"]
    assert failed == ["gauss-2", "gauss-10", "stopped"]
    found, failed = runs_of(folder, ["point-1", "gauss-2", "never", "gauss-0"])
    assert [path.name for path in found] == ["point-1", "gauss-0"] and failed == ["gauss-2", "never"]
    with pytest.raises(RunError, match="clips holds a conv_vae, not a layout_autoencoder: name runs of that kind$"):
        runs_of(folder, ["point-1", "clips"])
    with pytest.raises(RunError, match=r"runs=\['../e/point-1'\]: must be names of runs in .*e, without folders; corr"):
        runs_of(folder, ["point-0", "../e/point-1"])


def test_an_experiment_without_a_finished_run_is_refused(data, tmp_path) -> None:
    with pytest.raises(RunError, match=r"absent has no finished autoencoder of floor plans \(there is none\): train"):
        runs_of(tmp_path / "absent")
    begin(tmp_path, data, "a-0", 0)
    for names in ([], ["a-0"]):
        with pytest.raises(RunError, match=r"e has no finished autoencoder .* \(none of a-0 is finished\): see why"):
            runs_of(tmp_path / "e", names)


def test_two_runs_of_one_setting_and_seed_are_refused(stub, tmp_path) -> None:
    path = stub(Copy)
    shutil.copytree(path, path.with_name("Copy-1"))
    assert setting_of(path) == ("Copy-1", 3) == setting_of(path.with_name("Copy-1"))
    for names in ([], ["Copy-1-3", "Copy-1"]):
        with pytest.raises(RunError, match="Copy-1(-3)? and Copy-1(-3)? are both setting 'Copy-1' with seed 3: name"):
            runs_of(path.parent, names)


def test_a_run_whose_notebook_failed_after_its_training_is_no_result(stub) -> None:
    path = stub(Copy)
    write_json(path / "status.json", {"state": "failed", "updated": 0})
    with pytest.raises(RunError, match=f"none of {path.name} is finished"):
        runs_of(path.parent, [path.name])
    Run(path).finish(mse=0.0)
    assert runs_of(path.parent, [path.name]) == ([path], []), "it was run again, to its end"


def test_the_seed_is_the_one_trained_with(trained, data, tmp_path) -> None:
    assert [setting_of(path) for path in trained] == [("point", 0), ("point", 1), ("gauss", 0), ("gauss", 1)]
    run, _ = begin(tmp_path, data, "channels-16", 4)
    assert setting_of(run.path) == ("channels-16", 4)


def test_runs_of_one_setting_that_differ_in_more_than_the_seed_are_refused(trained, tmp_path) -> None:
    folder = Path(shutil.copytree(trained[0].parent, tmp_path / "e"))
    rewrite(folder / "gauss-1", parameters={"device": "cuda"})
    assert len(runs_of(folder)[0]) == 4
    rewrite(folder / "gauss-1", parameters={"epochs": 3, "lr": 0.01})
    message = (
        r"gauss-0 and gauss-1 are runs of setting 'gauss' and were trained with other parameters: epochs: 2 there, 3 "
        r"here, lr: 0.001 there, 0.01 here \('there' is gauss-0\). Name runs that differ in their seed alone"
    )
    with pytest.raises(RunError, match=message):
        runs_of(folder)
    assert runs_of(folder, ["gauss-0", "point-0"])[1] == []


# --- the same data ---


def rewrite(path: Path, **entries: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    for name, values in entries.items():
        config[name] |= values
    (path / "config.json").write_text(json.dumps(config))


def test_runs_of_the_same_data_open_it(trained, data) -> None:
    opened = open_same(trained)
    assert opened.fingerprint == data.fingerprint and opened.config == data.config


@pytest.mark.parametrize(
    ("entries", "difference"),
    [
        ({"parameters": {"split_seed": 1}}, "split_seed: 0 there, 1 here"),
        ({"parameters": {"image_size": 64}}, "image_size: 32 there, 64 here"),
        (
            {"parameters": {"classify_by": "label"}, "data": {"fingerprint": "f00"}},
            "classify_by: type there, label here, fingerprint: [0-9a-f]{16} there, f00 here",
        ),
    ],
)
def test_runs_of_other_data_or_another_split_are_refused(trained, tmp_path, entries, difference) -> None:
    other = shutil.copytree(trained[2], tmp_path / "gauss-0")
    rewrite(other, **entries)
    message = rf"^point-0 and gauss-0 were trained on other data or another split: {difference} \('there' is point-0\)"
    with pytest.raises(RunError, match=message):
        open_same([trained[0], trained[1], other])


def test_where_data_are_cached_and_how_strictly_they_are_opened_are_no_difference(trained, tmp_path) -> None:
    other = shutil.copytree(trained[1], tmp_path / "point-1")
    rewrite(other, parameters={"cache_dir": "elsewhere", "max_unknown_fraction": 0.5})
    assert open_same([trained[0], other]).sizes["image_size"] == SIZE


def test_data_that_have_changed_since_are_refused(trained, tmp_path) -> None:
    paths = [shutil.copytree(path, tmp_path / path.name) for path in trained[:2]]
    for path in paths:
        rewrite(path, data={"fingerprint": "f00"})
    with pytest.raises(RunError, match=r"point-0 was trained on other data or another split \(fingerprint f00, now"):
        open_same(paths)
