"""The table of runs: what each is, what it is doing, and its figures."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.runs import RunError, read_if_there, read_json, run_state


def describe_run(path: Path) -> dict[str, str]:
    """One row of the table of runs: run, model, data, state, time, figures."""
    config, status = read_json(path / "config.json"), read_if_there(path / "status.json")
    summary = read_if_there(path / "summary.json")
    return {
        "run": f"{path.parent.name}/{path.name}",
        "model": config.get("model", {}).get("kind", ""),
        "data": str(config.get("data", {}).get("name", config["parameters"].get("data", ""))),
        "state": run_state(summary, status),
        "time": _duration(config, summary, status),
        "figures": figures_of(summary),
    }


def figures_of(summary: Mapping[str, Any]) -> str:
    """The first four figures of a summary.json, standard errors left out."""
    figures = {k: v for k, v in summary.items() if isinstance(v, float) and not k.endswith("_se")}
    return "  ".join(f"{k} {v:.4g}" for k, v in list(figures.items())[:4])


def _duration(config: Mapping[str, Any], summary: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    end = summary.get("finished") or (status and datetime.fromtimestamp(status["updated"]).isoformat())
    if not end:
        return ""
    seconds = int((datetime.fromisoformat(end) - datetime.fromisoformat(config["started"])).total_seconds())
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def table_of_runs(root: Path) -> pd.DataFrame:
    """Every run below a folder: run, model, data, state, time, figures; parts of a run are not listed.

    Raises:
        RunError: the folder is absent.
    """
    rows = [_row(path, root) for path in run_folders_below(root)]
    return pd.DataFrame([row for row in rows if row], columns=["run", "model", "data", "state", "time", "figures"])


def run_folders_below(root: Path) -> list[Path]:
    """Folders with a config.json, parts of a run left out.

    Raises:
        RunError: the folder is absent.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder")
    return [path.parent for path in sorted(root.rglob("config.json")) if not _is_part(path.parent)]


def _is_part(path: Path) -> bool:
    """Whether a folder is one of several trainings inside a run, see `Run.part`."""
    return path.parent.name == "parts" and (path.parents[1] / "config.json").exists()


def _row(path: Path, root: Path) -> dict[str, str] | None:
    """A run's row; nothing for a folder that is no run, and the reason where a file is damaged."""
    name = {"run": str(path.relative_to(root)) if path != root else path.name}
    try:
        return describe_run(path) | name if "parameters" in read_json(path / "config.json") else None
    except RunError as error:
        return name | {"model": "", "data": "", "state": str(error), "time": "", "figures": ""}
