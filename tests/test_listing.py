import json
import time
from pathlib import Path

import pytest

from workbench.listing import describe_run, table_of_runs
from workbench.progress import write_status
from workbench.runs import STALE_SECONDS, RunError, open_run

PARAMETERS = {"experiment": "demo", "run": "vae", "data": "pushing"}


def test_states_of_a_run(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    assert describe_run(run.path) == {
        "run": "demo/vae",
        "model": "",
        "data": "pushing",
        "state": "begun",
        "time": "",
        "figures": "",
    }
    write_status("running", what="training", done=3, total=8)
    assert describe_run(run.path)["state"] == "running training 3/8"
    write_status("running", what="training", done=3, total=8, updated=time.time() - STALE_SECONDS - 1)
    assert describe_run(run.path)["state"] == "stopped training 3/8", "a heartbeat that has ceased"
    write_status("stopped", what="training", done=5, total=8, reason="(Preempted)")
    assert describe_run(run.path)["state"] == "stopped training 5/8 (Preempted)"
    run.record(model={"kind": "conv_vae"}, data={"name": "cockatoo", "fingerprint": "f"})
    run.finish(mse=0.012345, psnr=20.5, active=3, verdicts=["good"])
    row = describe_run(run.path)
    assert (row["model"], row["data"], row["state"]) == ("conv_vae", "cockatoo", "finished")
    assert row["figures"] == "mse 0.01235  psnr 20.5"


def test_the_time_of_a_run(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.finish()
    for name, entry, value in (
        ("config", "started", "2026-01-01T10:00:00"),
        ("summary", "finished", "2026-01-01T13:04:05"),
    ):
        path = run.path / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    assert describe_run(run.path)["time"] == "3:04:05"


def test_the_table_holds_every_run_and_survives_a_damaged_one(tmp_path: Path) -> None:
    open_run(PARAMETERS, tmp_path).finish(mse=0.5)
    broken = open_run(PARAMETERS | {"run": "broken"}, tmp_path)
    (broken.path / "status.json").write_text("{")
    open_run(PARAMETERS | {"experiment": "layouts/one", "run": "a"}, tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    table = table_of_runs(tmp_path).set_index("run")
    assert list(table.index) == ["demo/broken", "demo/vae", "layouts/one/a"]
    assert table.loc["demo/vae", "state"] == "finished" and table.loc["layouts/one/a", "state"] == "begun"
    assert f"{broken.path}/status.json: damaged" in table.loc["demo/broken", "state"]


def test_the_table_of_nothing(tmp_path: Path) -> None:
    assert len(table_of_runs(tmp_path)) == 0
    with pytest.raises(RunError, match=f"{tmp_path}/none: no such folder"):
        table_of_runs(tmp_path / "none")


def test_the_parts_of_a_run_are_not_listed(tmp_path: Path) -> None:
    """An experiment may have that name all the same."""
    open_run(PARAMETERS, tmp_path).part("latent-0", seed=0)
    open_run(PARAMETERS | {"experiment": "parts"}, tmp_path)
    assert list(table_of_runs(tmp_path)["run"]) == ["demo/vae", "parts/vae"]


def test_standard_errors_are_left_out_of_the_figures(tmp_path: Path) -> None:
    run = open_run(PARAMETERS, tmp_path)
    run.finish(mse=0.5, mse_se=0.1, psnr=20.0, psnr_se=1.0, a=1.0, b=2.0, c=3.0)
    assert describe_run(run.path)["figures"] == "mse 0.5  psnr 20  a 1  b 2"
