"""The tasks that a parameter folder asks for: every file, sweep and base checked before anything starts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from workbench.config import ConfigError, nearest
from workbench.parameters import Parameter, check, declared, read_file
from workbench.paths import project_root
from workbench.runs import check_parameters, run_path
from workbench.sweeps import REPORT, SETTINGS, Layer, Sweep, check_report, find_sweep, merged, placed, spread


@dataclass(frozen=True)
class Task:
    """One notebook to execute.

    Args:
        notebook: Its source.
        given, resolved: Its parameters as given, and with the others at their defaults.
        kind: `swept`, a run of the folder's sweep; `report`, on the runs of that sweep; or neither.
        environment: Variables for its kernel, beside those of this process.
    """

    notebook: Path
    given: dict[str, Any]
    resolved: dict[str, Any]
    kind: Literal["plain", "swept", "report"] = "plain"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.resolved["run"] if self.kind == "swept" else self.notebook.stem


def plan(
    folder: Path, overrides: Mapping[str, str], seeds: int | None = None, accept: Collection[str] = ()
) -> list[Task]:
    """Read and check every parameter file of a folder, settings.yaml and its base too.

    Args:
        folder: Holds `<notebook>.yaml` files; they run in the order of their names, a swept one many times.
        overrides: `-p key=value` as text; each goes to every notebook that declares the key.
        seeds: Number of seeds of a sweep; None: as its settings.yaml says.
        accept: See `find_sweep`.

    Raises:
        ConfigError: all problems of all files, one a line.
        RunError: a run folder belongs to other parameters.
    """
    root, files, notebooks = _contents(folder)
    found: list[tuple[str, str]] = []
    tasks: list[Task] = []
    known: dict[str, Parameter] = {}
    sweep = None
    try:
        place = _relative(folder / SETTINGS, root)
        sweep = find_sweep(folder, place, notebooks, overrides, seeds, accept)
    except ConfigError as error:
        found += error.problems
    for path in files:
        try:
            if path.suffix != ".yaml":
                raise ConfigError([(str(path), "must end in .yaml")])
            if path.stem not in notebooks:
                raise ConfigError([(str(path), f"no notebook of that name; {nearest(path.stem, notebooks)}")])
            parameters, place = declared(notebooks[path.stem]), _relative(path, root)
            known |= parameters
            own = Layer({"experiment": _experiment(folder, root)} | read_file(path), f" in {place}")
            typed = {k: _value(v, parameters[k].type) for k, v in overrides.items() if k in parameters}
            layers = [own, Layer(typed, f", for {place}", "-p ")]
            tasks += _tasks(notebooks[path.stem], parameters, layers, sweep, tasks)
        except ConfigError as error:
            found += error.problems
    found += [(f"unknown parameter {key!r}", nearest(key, known)) for key in overrides if known and key not in known]
    if found:
        raise ConfigError(dict.fromkeys(found))
    for task in tasks:
        check_report(task.resolved) if task.kind == "report" else check_parameters(
            run_path(task.resolved), task.resolved
        )
    return tasks


def _contents(folder: Path) -> tuple[Path, list[Path], dict[str, Path]]:
    """The project of a folder, the folder's parameter files, and the project's notebooks by name."""
    if not folder.is_dir():
        raise ConfigError([(str(folder), "no such folder of parameter files")])
    root = project_root(folder)
    files = [path for path in sorted(folder.glob("*.y*ml")) if path.name != SETTINGS]
    if not files:
        raise ConfigError([(str(folder), "holds no parameter files (<notebook>.yaml)")])
    notebooks = {path.stem: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
    if not notebooks:
        raise ConfigError([(str(folder), "lies in no project, whose notebooks it would be for: move it into params/")])
    return root, files, notebooks


def _tasks(
    notebook: Path,
    parameters: Mapping[str, Parameter],
    layers: list[Layer],
    sweep: Sweep | None,
    before: Sequence[Task],
) -> list[Task]:
    """One notebook's task; or its runs where it is swept; or its report on those before it."""
    swept = [task.resolved["run"] for task in before if task.kind == "swept"]
    kind, ways = "plain", [(layers, {})]
    if sweep and notebook.stem == sweep.notebook:
        kind, ways = "swept", spread(sweep, parameters, *layers)
    elif swept and REPORT in parameters and REPORT not in merged(layers):
        kind, ways = "report", [(layers, {REPORT: swept})]
    found, tasks = [], []
    for where, fixed in ways:
        given = merged(where) | fixed
        try:
            tasks.append(Task(notebook, given, check(notebook, given, str(notebook)), kind))
        except ConfigError as error:
            found += [placed(problem, where, layers[0]) for problem in error.problems]
    if found:
        raise ConfigError(found)
    return tasks


def _relative(path: Path, root: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _experiment(folder: Path, root: Path) -> str:
    """`params/layouts/phase1_1` -> `layouts/phase1_1`."""
    folder, params = folder.resolve(), root / "params"
    return str(folder.relative_to(params)) if folder.is_relative_to(params) else folder.name


def _value(text: str, kind: Any) -> Any:
    """A value typed on the command line; unlike in YAML, 1e-4 is a number here."""
    if kind is str:
        return text
    try:
        return float(text) if kind is float else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
