import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from workbench.checkpoints import CheckpointError, load_safetensors, save_checkpoint, save_model
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.progress import STATUS_VARIABLE, write_status
from workbench.runs import (
    Run,
    RunError,
    differences,
    find_run,
    load_run,
    open_run,
    read_if_there,
)

PARAMETERS = {"experiment": "demo", "run": "vae", "data": "pushing", "lr": 1e-4, "hidden_dims": [16, 32]}
SMALL = ConvVAEConfig(image_size=8, latent_dim=2, hidden_dims=[2])


def finished_run(root: Path, **parameters: Any) -> Run:
    """A run as training leaves it, with weights that differ between final and best."""
    run = open_run(PARAMETERS | parameters, root)
    run.record(model={"kind": "conv_vae"} | SMALL.model_dump())
    (run.path / "checkpoints").mkdir()
    torch.manual_seed(0)
    save_checkpoint(run.path / "checkpoints" / "best.ckpt", {"model": ConvVAE(SMALL).state_dict()})
    save_model(run.path / "model.safetensors", ConvVAE(SMALL), "conv_vae")
    return run


# --- opening ---


def test_a_new_run_writes_its_configuration(tmp_path: Path) -> None:
    run = open_run(PARAMETERS)
    assert run.path == tmp_path / "outputs" / "demo" / "vae", "WORKBENCH_OUTPUTS is not honoured"
    assert run.config["parameters"] == PARAMETERS
    assert run.config["versions"]["torch"] == torch.__version__
    assert run.config["started"] <= time.strftime("%Y-%m-%dT%H:%M:%S")
    assert not run.trained and not run.finished
    assert os.environ[STATUS_VARIABLE] == str(run.path / "status.json")


def test_the_same_configuration_is_opened_again_and_places_do_not_count(tmp_path: Path) -> None:
    places = {"cache_dir": "/a", "decode_workers": 1, "devices": 1, "num_nodes": 1}
    before = open_run(PARAMETERS | places, tmp_path).config
    again = open_run(PARAMETERS | {"cache_dir": "/b", "decode_workers": 9, "devices": 2, "num_nodes": 2}, tmp_path)
    assert again.config == before


def test_another_configuration_is_refused_with_each_difference(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.record(data={"fingerprint": "7"})
    (run.path / "metrics.csv").touch()
    path, before = run.path, (run.path / "config.json").read_bytes()
    other = {k: v for k, v in PARAMETERS.items() if k != "data"} | {"lr": 1e-3, "hidden_dims": [16, 64], "seed": 3}
    with pytest.raises(RunError) as caught:
        open_run(other, tmp_path)
    assert str(caught.value).splitlines() == [
        f"{path} holds a run of another configuration:",
        "  data: pushing there, absent here",
        "  hidden_dims: [16, 32] there, [16, 64] here",
        "  lr: 0.0001 there, 0.001 here",
        "  seed: absent there, 3 here",
        "Give another `experiment` or `run` name, or move the folder away.",
    ]
    assert (path / "config.json").read_bytes() == before


def test_a_run_that_stopped_before_its_data_begins_with_other_parameters(tmp_path: Path) -> None:
    path = open_run(PARAMETERS | {"data": "/mistyped"}, tmp_path).path
    (path / "01_inspect_data.ipynb").write_text("the executed notebook, with the error")
    assert open_run(PARAMETERS, tmp_path).config["parameters"] == PARAMETERS
    write_status("running", what="decoding", done=1, total=9)
    with pytest.raises(RunError, match="another configuration:\n  lr: 0.0001 there, 0.5 here"):
        open_run(PARAMETERS | {"lr": 0.5}, tmp_path)
    write_status("stopped", what="decoding", done=1, total=9)
    assert open_run(PARAMETERS | {"lr": 0.5}, tmp_path).config["parameters"]["lr"] == 0.5


def test_differences_name_nested_entries() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}) == ["a.c: 2 there, 5 here"]


@pytest.mark.parametrize(
    ("name", "value"), [("run", ""), ("run", ".."), ("run", "a/b"), ("experiment", "/tmp"), ("experiment", "a/../..")]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        open_run(PARAMETERS | {name: value}, tmp_path)
    assert str(caught.value) == f"{name}={value!r}: must be a folder's name, such as 'vae'"
    assert not list(tmp_path.iterdir())


def test_an_experiment_may_lie_in_a_folder_of_experiments(tmp_path: Path) -> None:
    assert open_run(PARAMETERS | {"experiment": "layouts/phase1_1"}, tmp_path).path.exists()


def test_an_outputs_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # below a file nothing can be made, not even by root
    with pytest.raises(RunError) as caught:
        open_run(PARAMETERS, tmp_path / "file" / "outputs")
    assert str(caught.value) == (
        f"{tmp_path}/file/outputs/demo/vae cannot be written (Not a directory): choose another outputs folder with the "
        "environment variable WORKBENCH_OUTPUTS, or change its permissions"
    )


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "vae"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(RunError) as caught:
        open_run(PARAMETERS, tmp_path)
    assert str(caught.value) == f"{folder} is not empty and holds no config.json: choose another run, or move it away"
    (folder / "config.json").write_text('{"something": "else"}')
    with pytest.raises(RunError) as caught:
        open_run(PARAMETERS, tmp_path)
    assert str(caught.value) == (f"{folder}: its config.json is not that of a run: choose another run, or move it away")
    assert {path.name for path in folder.iterdir()} == {"thesis.tex", "config.json"}


def test_a_kill_while_config_json_is_written_does_not_block_the_run(tmp_path: Path) -> None:
    (tmp_path / "demo" / "vae").mkdir(parents=True)
    (tmp_path / "demo" / "vae" / "config.json.tmp").write_text('{"parame')
    assert open_run(PARAMETERS, tmp_path).config["parameters"] == PARAMETERS


@pytest.mark.parametrize("damage", ['{"parameters": {"lr"', "[1, 2]", "\x00\x00"])
def test_damaged_json_is_named(damage: str, tmp_path: Path) -> None:
    path = open_run(PARAMETERS, tmp_path).path / "config.json"
    path.write_text(damage)
    with pytest.raises(RunError) as caught:
        open_run(PARAMETERS, tmp_path)
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert str(caught.value).endswith("; restore it, or move the run folder away")


def test_a_file_that_another_node_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS; status.json is replaced every second."""
    run, read, left = open_run(PARAMETERS, tmp_path), Path.read_text, [errno.ESTALE, errno.ESTALE]

    def replaced(path: Path) -> str:
        if left:
            raise OSError(number := left.pop(), os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_text", replaced)
    assert run.config["parameters"] == PARAMETERS and not left
    left[:] = [errno.ENOENT]
    assert read_if_there(run.path / "config.json") == {}, "gone since somebody looked"
    left[:] = [errno.EIO]
    with pytest.raises(OSError, match="Input/output error"):
        read_if_there(run.path / "config.json")


# --- what a run records ---


def test_record_keeps_entries_and_refuses_others(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.record(data={"name": "pushing", "fingerprint": np.int64(7)}, where=Path("/a"))
    assert run.config["data"] == {"name": "pushing", "fingerprint": 7} and run.config["where"] == "/a"
    before = (run.path / "config.json").stat().st_mtime_ns
    run.record(data={"name": "pushing", "fingerprint": 7})
    assert (run.path / "config.json").stat().st_mtime_ns == before, "an unchanged configuration was written again"
    with pytest.raises(RunError, match=r"another configuration:\n  data.fingerprint: 7 there, 8 here\n"):
        run.record(model={"kind": "x"}, data={"name": "pushing", "fingerprint": 8})
    assert "model" not in run.config


def test_finish_writes_the_figures_once(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.finish(mse=np.float32(0.5), active=torch.tensor(3), verdicts=["good"])
    summary = json.loads((run.path / "summary.json").read_text())
    assert run.finished and (summary["mse"], summary["active"], summary["verdicts"]) == (0.5, 3, ["good"])
    run.finish(mse=0.9)
    assert json.loads((run.path / "summary.json").read_text()) == summary


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set cannot be stored as JSON"):
        open_run(PARAMETERS, tmp_path).record(data={1, 2})


def test_a_figure_is_saved_and_returned(tmp_path: Path) -> None:
    run, figure = open_run(PARAMETERS, tmp_path), Figure()
    assert run.figure(figure, "curves") is figure
    assert (run.path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    run.figure(figure, "layers_a/b: *ä")
    assert (run.path / "figures" / "layers_a-b- --.png").exists()


def test_a_run_in_use_is_refused_and_freed_by_a_kill(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    script = (
        "import sys, time; from pathlib import Path; from workbench.runs import Run\n"
        "with Run(Path(sys.argv[1])).lock():\n    print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(RunError) as caught, run.lock():
        pass
    assert f"{run.path} is in use by process {other.pid} on " in str(caught.value)
    assert str(caught.value).endswith(": wait for it, or choose another run")
    other.kill()
    other.wait()
    with run.lock():
        assert f"process {os.getpid()} on " in (run.path / "run.lock").read_text()


def test_tensors_are_stored_beside_the_configuration(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.store("scaling", {})
    assert not (run.path / "scaling.safetensors").exists(), "a file of nothing"
    tensors = {"offset": torch.tensor([1.5, -2.0]), "scale": torch.ones(2, 3)}
    for factor in (1, 2):
        run.store("scaling", {name: factor * value for name, value in tensors.items()})
        stored = load_safetensors(run.path / "scaling.safetensors")
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], factor * value) for name, value in tensors.items())
    assert {path.name for path in run.path.iterdir()} == {"config.json", "scaling.safetensors"}


def test_a_part_is_a_run_inside_a_run(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    before = os.environ[STATUS_VARIABLE]
    part = run.part("latent-0", mode="latent", seed=0)
    assert part.path == run.path / "parts" / "latent-0" and not part.trained
    assert part.config["parameters"] == {"mode": "latent", "seed": 0}
    assert part.config["versions"] == run.config["versions"]
    assert os.environ[STATUS_VARIABLE] == before, "the run that is going on is the outer one"
    part.record(model={"kind": "mlp_conditioner"})
    (part.path / "metrics.csv").touch()
    content = (part.path / "config.json").read_bytes()
    assert run.part("latent-0", mode="latent", seed=0) == part
    assert (part.path / "config.json").read_bytes() == content
    with pytest.raises(
        RunError, match=r"parts/latent-0 holds a run of another configuration:\n  seed: 0 there, 1 here"
    ):
        run.part("latent-0", mode="latent", seed=1)
    assert run.part("latent-1", mode="latent", seed=1).path != part.path


def test_a_part_that_had_recorded_nothing_begins_with_other_settings(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.part("a", seed=0)
    assert run.part("a", seed=1).config["parameters"] == {"seed": 1}


# --- loading ---


@pytest.mark.parametrize("checkpoint", ["final", "best"])
def test_load_run_gives_the_weights_asked_for(checkpoint: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    model, config = load_run(run.path, checkpoint)
    torch.manual_seed(0)
    best, final = ConvVAE(SMALL), ConvVAE(SMALL)  # in the order in which they were made
    expected = {"final": final, "best": best}[checkpoint].state_dict()
    assert config["parameters"] == PARAMETERS and model.config == SMALL and not model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_load_run_says_what_is_the_matter(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path}: no run there \\(no config.json\\); name a run that trains"):
        load_run(tmp_path)
    begun = open_run(PARAMETERS | {"run": "begun"}, tmp_path)
    with pytest.raises(RunError) as caught:
        load_run(begun.path)
    assert str(caught.value) == (f"{begun.path} has no finished model (state: begun): run its notebook again to go on")
    begun.finish(mse=0.5)
    with pytest.raises(RunError, match=r"begun has no finished model \(state: finished\): name a run that trains"):
        load_run(begun.path)
    begun.part("laq-0", lr=0.1)
    with pytest.raises(RunError, match=f"finished\\): name one of those in {begun.path}/parts: laq-0$"):
        load_run(begun.path)
    run = finished_run(tmp_path)
    with pytest.raises(RunError, match="demo: no run there .*; name one of those in .*/demo: begun, vae$"):
        load_run(run.path.parent)
    with pytest.raises(RunError, match="checkpoint='fnal': must be 'final' or 'best'"):
        load_run(run.path, "fnal")
    (run.path / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(CheckpointError, match="best.ckpt: no such file"):
        load_run(run.path, "best")
    whole = (run.path / "model.safetensors").read_bytes()
    (run.path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors: damaged or not a safetensors file"):
        load_run(run.path)


def test_find_run_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        find_run("demo", "vae", tmp_path)
    assert str(caught.value) == (
        f"no run 'vae' in {tmp_path}/demo; it has no runs yet: train it first with notebook 02, or name another"
    )
    open_run(PARAMETERS | {"run": "b"}, tmp_path)
    path = open_run(PARAMETERS | {"run": "a"}, tmp_path).path
    assert find_run("demo", "a", tmp_path) == path
    with pytest.raises(RunError, match="no run 'vae' in .*; it has a, b: train it first"):
        find_run("demo", "vae", tmp_path)


def test_what_has_changed_is_added_to_what_had_before(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    before = run.config
    run.note(["step 3: processes: 2 there, 1 here"])
    run.note(["step 9: processes: 1 there, 4 here"])
    assert run.config == before | {
        "changes": ["step 3: processes: 2 there, 1 here", "step 9: processes: 1 there, 4 here"]
    }
