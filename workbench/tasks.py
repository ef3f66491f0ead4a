"""The tasks that a parameter folder asks for: every file, sweep and base checked before anything starts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from workbench.config import ConfigError, nearest
from workbench.parameters import Parameter, check, declared, read_file
from workbench.paths import project_root
from workbench.points import grid_points, parse_grid, point_name
from workbench.runs import check_parameters, run_path
from workbench.sweeps import REPORT, SETTINGS, Layer, Problem, Sweep, check_report, find_sweep, merged, placed, spread


@dataclass(frozen=True)
class Task:
    """One notebook to execute.

    Args:
        notebook: Its source.
        given, resolved: Its parameters as given, and with the others at their defaults.
        kind: `swept`, a run of the folder's sweep; `report`, on the runs of that sweep; or neither.
        environment: Variables for its kernel, beside those of this process.
        point: What its point is called, where there are several, see `plan_points`.
    """

    notebook: Path
    given: dict[str, Any]
    resolved: dict[str, Any]
    kind: Literal["plain", "swept", "report"] = "plain"
    environment: dict[str, str] = field(default_factory=dict)
    point: str = ""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        name = self.resolved["run"] if self.kind == "swept" else self.notebook.stem
        return f"{self.point}/{name}" if self.point else name


@dataclass(frozen=True)
class Point:
    """All notebooks of a parameter folder, once.

    Args:
        name: What it is called in messages.
        experiment: Folder in the outputs in which it is, perhaps beside other points.
        root: The project.
        tasks: What to execute, in order.
    """

    name: str
    experiment: str
    root: Path
    tasks: list[Task]


# --- several points ---


def plan_points(
    folders: Sequence[Path],
    overrides: Mapping[str, str],
    seeds: int | None = None,
    accept: Collection[str] = (),
    grid: Sequence[str] = (),
) -> list[Point]:
    """Plan several parameter folders, each for every combination of the grid's values.

    Args:
        folders, overrides, accept: See `plan`.
        seeds: Number of seeds, of the sweep where a folder has one; elsewhere each is a point.
        grid: `key=a,b,c` of each parameter that is varied.

    Raises:
        ConfigError: all problems of all folders and points, one a line.
        RunError: a run folder belongs to other parameters.
    """
    values = parse_grid(grid)
    found = [(f"--grid {key}", "is given with -p too: leave one out") for key in values if key in overrides]
    points: list[Point] = []
    for folder in folders:
        sweep = (folder / SETTINGS).exists()
        try:
            if "seed" in values and (sweep or seeds is not None):
                raise ConfigError([("--grid seed", f"seeds of {folder} are given by --seeds: leave it out")])
            varied = _varied(folder, overrides, None if sweep else seeds, values)
        except ConfigError as error:
            found += error.problems
            continue
        for point, name in varied.items():
            try:
                tasks = plan(folder, overrides, seeds if sweep else None, accept, dict(point), name)
                whole = tasks[0].resolved["experiment"]
                points.append(Point(whole, whole.removesuffix(f"/{name}"), project_root(folder), tasks))
            except ConfigError as error:
                found += error.problems
    found += _twice(points)
    if found:
        raise ConfigError(dict.fromkeys(found))
    several = len(folders) > 1
    return [_labelled(point) for point in points] if several else points


def _varied(
    folder: Path, overrides: Mapping[str, str], seeds: int | None, grid: Mapping[str, Sequence[str]]
) -> dict[tuple[tuple[str, str], ...], str]:
    """The values of each point of a folder, as text, and the point's name.

    Raises:
        ConfigError: no notebook has a seed, or they begin with different ones; or two points are equal.
    """
    _, files, notebooks = _contents(folder)
    parameters = {path: declared(notebooks[path.stem]) for path in files if path.stem in notebooks}
    kinds = {key: parameter.type for known in reversed(parameters.values()) for key, parameter in known.items()}
    values = dict(grid)
    if seeds is not None:
        first = _first_seed(folder, seeds, overrides, parameters)
        values["seed"] = [str(first + number) for number in range(seeds)] if type(first) is int else [str(first)]
    names: dict[tuple[tuple[str, str], ...], str] = {}
    for point in grid_points(values):
        name = point_name({key: _value(text, kinds.get(key, str)) for key, text in point.items()})
        if name in names.values():
            raise ConfigError([(f"--grid for {folder}", f"gives the point {name} twice: leave one out")])
        names[tuple(point.items())] = name
    return names


def _first_seed(
    folder: Path, seeds: int, overrides: Mapping[str, str], parameters: Mapping[Path, Mapping[str, Parameter]]
) -> Any:
    """The seed from which seeds are counted: that of `-p`, or of the parameter files."""
    asked = f"--seeds {seeds}"
    if seeds < 1:
        raise ConfigError([(asked, "must be at least 1")])
    if "seed" in overrides:
        return _value(overrides["seed"], int)
    there = {
        path: read_file(path).get("seed", known["seed"].default)
        for path, known in parameters.items()
        if "seed" in known
    }
    if not there:
        raise ConfigError([(asked, f"no notebook of {folder} declares a parameter seed")])
    if len(set(map(str, there.values()))) > 1:
        given = ", ".join(f"{seed} in {path.name}" for path, seed in there.items())
        raise ConfigError([(asked, f"the notebooks of {folder} begin with different seeds ({given}): give -p seed=0")])
    return next(iter(there.values()))


def _twice(points: Sequence[Point]) -> list[Problem]:
    """Runs that two points would write, or two notebooks of one."""
    owners: dict[tuple[str, str], tuple[Point, Task]] = {}
    found = []
    for point in points:
        for task in point.tasks:
            run = (task.resolved["experiment"], task.resolved["run"])
            owner, other = owners.setdefault(run, (point, task))
            if owner is not point:
                found.append(("/".join(run), "is asked for twice: name each folder once, in an experiment of its own"))
            elif other is not task:
                both = f"is the run of both {other.notebook.stem} and {task.notebook.stem}"
                found.append(("/".join(run), f"{both}: name each in its file; -p experiment=… is for all of them"))
    return found


def _labelled(point: Point) -> Point:
    """A point of several folders, whose tasks are called by their experiment."""
    return replace(point, tasks=[replace(task, point=point.name) for task in point.tasks])


# --- one point ---


def plan(
    folder: Path,
    overrides: Mapping[str, str],
    seeds: int | None = None,
    accept: Collection[str] = (),
    grid: Mapping[str, str] | None = None,
    point: str = "",
) -> list[Task]:
    """Read and check every parameter file of a folder, settings.yaml and its base too.

    Args:
        folder: Holds `<notebook>.yaml` files; they run in the order of their names, a swept one many times.
        overrides: `-p key=value` as text; each goes to every notebook that declares the key.
        seeds: Number of seeds of a sweep; None: as its settings.yaml says.
        accept: See `find_sweep`.
        grid: Values of the point, as text; each goes to every notebook that declares the key.
        point: The point's name, a folder in the experiment; empty where there is one point.

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
        sweep = find_sweep(folder, _relative(folder / SETTINGS, root), notebooks, overrides, seeds, accept, grid or ())
    except ConfigError as error:
        found += error.problems
    for path in files:
        try:
            notebook = _notebook(path, notebooks)
            parameters, place = declared(notebook), _relative(path, root)
            known |= parameters
            own = Layer({"experiment": _experiment(folder, root)} | read_file(path), f" in {place}")
            typed = _typed(overrides, parameters, place, "-p "), _typed(grid or {}, parameters, place, "--grid ")
            tasks += _tasks(notebook, parameters, [own, *typed], sweep, tasks, point)
        except ConfigError as error:
            found += error.problems
    given = [(key, "") for key in overrides] + [(key, " in --grid") for key in grid or ()]
    unknown = [(key, where) for key, where in given if known and key not in known]
    found += [(f"unknown parameter {key!r}{where}", nearest(key, known)) for key, where in unknown]
    if found:
        raise ConfigError(dict.fromkeys(found))
    for task in tasks:
        _check_folder(task)
    return tasks


def _notebook(path: Path, notebooks: Mapping[str, Path]) -> Path:
    """The notebook of a parameter file."""
    if path.suffix != ".yaml":
        raise ConfigError([(str(path), "must end in .yaml")])
    if path.stem not in notebooks:
        raise ConfigError([(str(path), f"no notebook of that name; {nearest(path.stem, notebooks)}")])
    return notebooks[path.stem]


def _typed(given: Mapping[str, str], parameters: Mapping[str, Parameter], place: str, option: str) -> Layer:
    """Those of the values given with an option that a notebook declares."""
    values = {key: _value(text, parameters[key].type) for key, text in given.items() if key in parameters}
    return Layer(values, f", for {place}", option)


def _check_folder(task: Task) -> None:
    if task.kind == "report":
        check_report(task.resolved)
    else:
        check_parameters(run_path(task.resolved), task.resolved)


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
    point: str,
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
        if point and isinstance(given["experiment"], str):
            given["experiment"] += f"/{point}"
        try:
            tasks.append(Task(notebook, given, check(notebook, given, str(notebook)), kind, point=point))
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
