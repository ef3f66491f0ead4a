import os
import subprocess
import sys
from pathlib import Path

import pytest

from workbench import batch, cluster, doctor, runs
from workbench.__main__ import main
from workbench.config import ConfigError
from workbench.runs import RunError, open_run


def test_runs_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "now", lambda: "2026-01-01T10:00:00")
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs yet\n"
    long = "a" * 80
    open_run({"experiment": "demo", "run": "vae", "data": long}, tmp_path).finish(mse=0.0123456)
    assert main(["runs", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "model", "data", "state", "time", "figures"]
    assert row.split() == ["demo/vae", long, "finished", "0:00:00", "mse", "0.01235"]


def test_runs_takes_the_projects_outputs_by_default(capsys: pytest.CaptureFixture) -> None:
    open_run({"experiment": "demo", "run": "vae"})
    assert main(["runs"]) == 0
    assert "demo/vae" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ConfigError([("a=1", "no")]), RunError("in use")])
def test_an_error_of_the_users_making_is_one_message(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr(batch, "run_folders", fails)
    assert main(["run", "params/demo"]) == 1
    output = capsys.readouterr()
    assert output.err == f"{error}\n" and output.out == ""


def test_run_passes_folder_overrides_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(batch, "run_folders", lambda *arguments: called.append(arguments) or 75)
    assert main(["run", "params/demo", "-p", "lr=1e-4", "-p", "run=a=b"]) == 75
    assert called.pop() == ([Path("params/demo")], {"lr": "1e-4", "run": "a=b"}, None, None, [], [])
    assert main(["run", "params/demo", "--seeds", "3", "--jobs", "2", "--accept-failures", "--accept-undecided"]) == 75
    assert called.pop() == ([Path("params/demo")], {}, 3, 2, ["failures", "undecided"], [])
    assert main(["run", "params/demo", "params/zoo", "--grid", "lr=1,2", "--grid", "n=3"]) == 75
    assert called.pop() == ([Path("params/demo"), Path("params/zoo")], {}, None, None, [], ["lr=1,2", "n=3"])


def test_a_site_gets_the_command_that_a_job_can_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("run_on_site", "detach"):
        monkeypatch.setattr(cluster, name, lambda *arguments, name=name: called.append((name, *arguments)) or 3)
    line = ["run", "params/demo", "--site", "cluster/slurm.py", "--seeds", "2", "--grid", "lr=1,2", "--accept-failures"]
    asked = ([Path("params/demo")], {}, Path("cluster/slurm.py"), 2, ["failures"], ["lr=1,2"], line)
    assert main(line) == 3 and called.pop() == ("run_on_site", *asked)
    assert main([*line, "--detach"]) == 3 and called.pop() == ("detach", *asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--detach"], "--detach: needs --site FILE, a cluster to which it can be submitted\n"),
        (
            ["--site", "a.py", "--jobs", "2"],
            "--jobs 2: a.py says how many runs go on at one time: leave it out\n",
        ),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "params/demo", *words]) == 1
    assert capsys.readouterr().err == message


def test_watching_is_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["runs", str(tmp_path / "none"), "--watch"]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/none: no such folder\n"


def test_an_override_without_a_value(capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "params/demo", "-p", "lr", "-p", "n"]) == 1
    assert capsys.readouterr().err == "-p lr: must read key=value\n-p n: must read key=value\n"


def test_import_config_writes_the_folder_and_names_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    condition, preset, out = tmp_path / "condition.txt", tmp_path / "preset.txt", tmp_path / "params" / "mine"
    condition.write_text("title\nDim1 484\nDim2 200\nTraining_epochs 12\n")
    preset.write_text("names\n3\n0\n64 32\n16 4\n")
    assert main(["import-config", str(condition), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"Dim1=484 ({condition}, line 2): the number of runs is read off the data",
        f"parameter files of notebooks 01 to 04 are in {out}",
    ]
    assert "epochs: 12  # Training_epochs\n" in (out / "02_train_vae.yaml").read_text()
    assert main(["import-config", str(condition), str(preset), "--out", str(tmp_path / "other")]) == 0
    assert "filters: [64, 32]" in (tmp_path / "other" / "02_train_vae.yaml").read_text()


def test_import_config_refuses_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    condition, out = tmp_path / "condition.txt", tmp_path / "mine"
    condition.write_text("title\nBatchsize 16\n")
    assert main(["import-config", str(condition), "--out", str(out)]) == 1
    output = capsys.readouterr()
    assert output.err == f"unknown key 'Batchsize' in {condition}, line 2: did you mean 'Batch_size'?\n"
    assert output.out == "" and not out.exists()
    assert main(["import-config", str(tmp_path / "gone.txt"), "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/gone.txt: cannot be read: No such file or directory\n"


def test_doctor_looks_at_the_outputs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 0.0)
    assert main(["doctor"]) == 0
    assert f"ok       {tmp_path}/outputs can be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rnu"],
        ["run"],
        ["run", "params/demo", "--seeds", "x"],
        ["run", "params/demo", "--det"],
        ["import-config"],
        ["import-config", "condition.txt"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: workbench" in capsys.readouterr().err


def test_help_answers_at_once() -> None:
    """Nothing heavy is imported for it."""
    script = "import sys, workbench.__main__ as m; m.parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.slow
def test_the_package_is_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "run", "none"], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 1 and done.stderr == "none: no such folder of parameter files\n"
