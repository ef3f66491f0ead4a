"""Where the project and its outputs are; relative paths in parameters are taken from the project's root."""

import os
from pathlib import Path

OUTPUTS_VARIABLE = "WORKBENCH_OUTPUTS"


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that holds `notebooks/` and `params/`; `start` itself where none does."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    return start


def outputs_root() -> Path:
    """The outputs folder: the environment variable WORKBENCH_OUTPUTS, or `outputs/` in the project's root."""
    given = os.environ.get(OUTPUTS_VARIABLE)
    return Path(given).resolve() if given else project_root() / "outputs"


def resolve(path: str | Path) -> Path:
    """A path from a parameter as an absolute one, `~` expanded."""
    return (project_root() / Path(path).expanduser()).resolve()
