"""Projects of tiny notebooks, with a parameter folder params/demo, for tests of what runs them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from workbench.paths import outputs_root
from workbench.verdicts import Verdict, write_verdict

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = """
experiment: str = "smoke"  # folder in outputs/
run: str = "r"  # folder in the experiment
n: int = 1  # a number
lr: float = 0.1  # another one
dims: list[int] = [1]  # a list
"""
SEED = 'seed: int = 0  # start of every random stream\ndevice: str = "auto"  # where'
REPORT = """
experiment: str = "smoke"  # folder in outputs/
run: str = "r"  # folder in the experiment
runs: list[str] = []  # runs to compare
n: int = 1  # a number
"""
SETTINGS = """
notebook: 02_train
settings:
  V1: {lr: 0.5}
  V2: {lr: 2.0, dims: [3]}
"""
OPEN = """
from workbench import parameters, runs
params = parameters.resolve("{name}", globals())
this_run = runs.open_run(params)
"""


def write_notebook(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    tagged = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    content = new_notebook(cells=[tagged, *map(new_code_cell, cells)], metadata=KERNEL)
    nbformat.write(content, root / "notebooks" / f"{name}.ipynb")


def make_project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, which becomes the working directory."""
    for folder in ("notebooks", "params/demo"):
        (root / folder).mkdir(parents=True)
    write_notebook(root, "01_first", "print('first', n)")
    write_notebook(root, "02_second", "print('second', n)")
    write_params(root, **{"01_first": "run: one\nn: 5", "02_second": "run: two"})
    monkeypatch.chdir(root)
    return root


def write_params(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / "params" / "demo" / f"{name}.yaml").write_text(text)


def make_sweep(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose params/demo sweeps 02_train, after 01_first and before 06_report."""
    make_project(root, monkeypatch)
    (root / "params" / "demo" / "02_second.yaml").unlink()
    write_notebook(root, "02_train", "print('train', seed)", parameters=PARAMETERS + SEED)
    write_notebook(root, "06_report", "print('report', runs)", parameters=REPORT)
    write_params(root, **{"02_train": "n: 5", "06_report": "run: report", "settings": SETTINGS})
    return root


def write_verdict_of(experiment: str, parameters: dict, failed: list[str] | None = None, decided: bool = True) -> Path:
    """A verdict of that experiment's report, in the outputs folder."""
    path = outputs_root() / experiment / "report" / "verdict.yaml"
    path.parent.mkdir(parents=True)
    verdict = Verdict(
        experiment=experiment,
        winner="V1",
        rival="V2",
        decided=decided,
        reason="",
        parameters=parameters,
        failed=failed or [],
        seeds=[0, 1],
        criteria=[],
    )
    write_verdict(path, verdict)
    return path


def until(condition: Callable[[], bool], process: subprocess.Popen, project: Path) -> None:
    """Wait for a condition while a driver runs, which logs into driver.log."""
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, (project / "driver.log").read_text()
        time.sleep(0.1)
    pytest.fail((project / "driver.log").read_text())
