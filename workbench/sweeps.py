"""Sweeps: one notebook over settings and seeds, as the settings.yaml of a parameter folder says.

Values of parameters come in layers: the verdict of an earlier sweep, the notebook's own file, the setting, `-p`.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from typing import Any

import torch
import yaml

from workbench.config import ConfigError, nearest
from workbench.datasets.threads import usable_cores
from workbench.parameters import Parameter, read_file
from workbench.paths import outputs_root
from workbench.runs import HEADER, changed, check_parameters, holds_nothing, read_if_there, run_path
from workbench.verdicts import read_verdict

SETTINGS = "settings.yaml"
KEYS = ("notebook", "base", "seeds", "settings")
GIVEN = ("experiment", "run", "seed")
"""Parameters that a setting cannot have, as the sweep gives them."""
NAME = re.compile(r"\w[\w.+-]*")
REPORT = "runs"
"""Parameter of the notebooks that report on a sweep: the names of its runs."""
DEVICES_VARIABLE, THREADS_VARIABLE = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"

Problem = tuple[str, str]


@dataclass(frozen=True)
class Layer:
    """Values of parameters from one place.

    Args:
        values: By parameter.
        after: What an error says of the place, after parameter and value.
        before: Likewise, before them.
    """

    values: Mapping[str, Any]
    after: str = ""
    before: str = ""


@dataclass(frozen=True)
class Sweep:
    """What a settings.yaml asks for.

    Args:
        place: The file, as errors name it.
        notebook: Name of the notebook that is run once for each setting and seed.
        settings: Parameters by the setting's name.
        seeds: Number of seeds.
        base: The values to begin with.
    """

    place: str
    notebook: str
    settings: Mapping[str, Mapping[str, Any]]
    seeds: int
    base: Layer


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Each parameter's value in the last layer that has it."""
    return {key: value for layer in layers for key, value in layer.values.items()}


def placed(problem: Problem, layers: Sequence[Layer], otherwise: Layer) -> Problem:
    """A problem of merged values, with the place where its value was given."""
    what, rule = problem
    unknown, key = re.match(r"unknown parameter '(.*)'$|(\w*)", what, re.DOTALL).groups()
    layer = next((layer for layer in reversed(layers) if (unknown or key) in layer.values), otherwise)
    return f"{layer.before}{what}{layer.after}", rule


# --- settings.yaml ---


def find_sweep(
    folder: Path,
    place: str,
    notebooks: Collection[str],
    overrides: Collection[str] = (),
    seeds: int | None = None,
    accept: Collection[str] = (),
    varied: Collection[str] = (),
) -> Sweep | None:
    """The sweep of a parameter folder; None where it has no settings.yaml.

    Args:
        folder: The parameter folder.
        place: Its settings.yaml, as errors name it.
        notebooks: Names of the project's notebooks.
        overrides: Parameters given with `-p`.
        seeds: Number of seeds; None: as the file says, else 1.
        accept: "failures": take the verdict of a sweep some of whose runs failed; "undecided": one on a single seed.
        varied: Parameters given with `--grid`.

    Raises:
        ConfigError: all problems of the file, of the base, and of what was asked for, one a line.
    """
    found = [(f"--seeds {seeds}", "must be at least 1")] if seeds is not None and seeds < 1 else []
    there = (folder / SETTINGS).exists()
    if there and "run" in overrides:
        found.append(("-p run", "a sweep names its runs itself; to begin others, give -p experiment=<name>"))
    content, base = read_file(folder / SETTINGS) if there else {}, Layer({})
    if there:
        found += _wrong(content, folder, place, notebooks)
        found += _overridden(content.get("settings"), place, overrides, varied)
    try:
        base = _base(content["base"], place, accept) if "base" in content else base
    except ConfigError as error:
        found += error.problems
    if found:
        raise ConfigError(found)
    number = content.get("seeds", 1) if seeds is None else seeds
    return Sweep(place, content["notebook"], content["settings"], number, base) if there else None


def _wrong(content: Mapping[str, Any], folder: Path, place: str, notebooks: Collection[str]) -> list[Problem]:
    """What is wrong with a settings.yaml, its base apart."""
    found = [(f"unknown key {key!r} in {place}", nearest(key, KEYS)) for key in content if key not in KEYS]
    notebook, seeds = content.get("notebook"), content.get("seeds", 1)
    if notebook is None:
        found.append((place, "must name the notebook that is swept, such as `notebook: 02_train_vae`"))
    elif not isinstance(notebook, str) or notebook not in notebooks:
        rule = f"no notebook of that name; {nearest(str(notebook), notebooks)}"
        found.append((f"notebook={notebook!r} in {place}", rule))
    elif not (folder / f"{notebook}.yaml").exists():
        found.append((f"notebook={notebook!r} in {place}", f"{notebook}.yaml must lie beside it, if only empty"))
    if type(seeds) is not int or seeds < 1:
        found.append((f"seeds={seeds!r} in {place}", "must be a whole number, at least 1"))
    return found + _wrong_settings(content.get("settings"), place) + _twice(folder / SETTINGS, place)


def _overridden(settings: Any, place: str, overrides: Collection[str], varied: Collection[str]) -> list[Problem]:
    """Settings that would be the same with what was given with `-p` and `--grid`."""
    of_settings = settings if isinstance(settings, dict) else {}
    left = {
        name: {key: value for key, value in values.items() if key not in {*overrides, *varied}}
        for name, values in of_settings.items()
        if isinstance(values, dict) and values.keys() & {*overrides, *varied}
    }
    given = " ".join([*(f"-p {key}" for key in overrides), *(f"--grid {key}" for key in varied)])
    return [
        (given, f"makes settings {one} and {other} of {place} the same: leave out what they vary")
        for one, other in combinations(left, 2)
        if left[one] == left[other]
    ]


def _twice(path: Path, place: str) -> list[Problem]:
    """Settings, and parameters of one setting, that are given twice: of these YAML keeps the last."""
    settings = dict(_entries(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))).get("settings")
    nodes = [(place, settings)] + [(f"{place}, setting {name}", node) for name, node in _entries(settings)]
    found = []
    for where, node in nodes:
        names = [name for name, _ in _entries(node)]
        found += [
            (f"{name} in {where}", "is given twice: keep one") for name in dict.fromkeys(names) if names.count(name) > 1
        ]
    return found


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _wrong_settings(settings: Any, place: str) -> list[Problem]:
    if not isinstance(settings, dict) or not settings:
        rule = "must hold a line for each setting, such as `V1: {variational: false}`"
        return [(f"settings in {place}", rule)]
    found = []
    for name, values in settings.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            rule = "must be a folder's name, of letters, digits and . _ + - (a number in quotes)"
            found.append((f"setting {name!r} in {place}", rule))
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            rule = "must hold parameters and their values, such as {variational: false}"
            found.append((f"setting {name}={values!r} in {place}", rule))
            continue
        where = f" in {place}, setting {name}"
        found += [
            (f"{key}={values[key]!r}{where}", "the sweep gives it: leave it out") for key in GIVEN if key in values
        ]
    return found


def _base(base: Any, place: str, accept: Collection[str]) -> Layer:
    """The parameters that an earlier sweep's verdict gives."""
    if not isinstance(base, str) or not re.fullmatch(rf"({NAME.pattern}/)+{NAME.pattern}", base):
        rule = "must be the experiment and run of a report, such as layouts/phase1_1/report"
        raise ConfigError([(f"base={base!r} in {place}", rule)])
    path, again = outputs_root() / base / "verdict.yaml", f"run params/{base.rpartition('/')[0]}"
    if not path.exists():
        raise ConfigError([(f"base={base!r} in {place}", f"no verdict there yet: {again} first ({path})")])
    verdict = read_verdict(path)
    if verdict.failed and "failures" not in accept:
        rule = f"{', '.join(verdict.failed)} failed there: {again} again, or go on without with --accept-failures"
        raise ConfigError([(f"base={base!r} in {place}", rule)])
    if not verdict.decided and "undecided" not in accept:
        rule = f"one seed decided nothing there: {again} --seeds 3, or begin from {verdict.winner}, which led, with "
        raise ConfigError([(f"base={base!r} in {place}", f"{rule}--accept-undecided")])
    return Layer(verdict.parameters, f" in {path}")


# --- its runs ---


def spread(
    sweep: Sweep, parameters: Mapping[str, Parameter], own: Layer, *typed: Layer
) -> Iterator[tuple[list[Layer], dict[str, Any]]]:
    """The layers of each run of a sweep, and its `run` and `seed`; all settings of a seed come before the next seed.

    Args:
        sweep: What is swept.
        parameters: Those that the notebook declares.
        own: Its parameter file; seeds are counted from the `seed` there.
        typed: What was given with `-p` and `--grid`; a `seed` there counts more.

    Raises:
        ConfigError: the notebook has no `run` or no `seed`, or its file gives a `run`.
    """
    absent = [name for name in ("run", "seed") if name not in parameters]
    if absent:
        rule = f"declares no parameter {' and '.join(absent)}, and so cannot be swept"
        raise ConfigError([(f"notebook={sweep.notebook!r} in {sweep.place}", rule)])
    if "run" in own.values:
        raise ConfigError([(f"run={own.values['run']!r}{own.after}", "the sweep gives it: leave it out")])
    first = merged([Layer({"seed": parameters["seed"].default}), own, *typed])["seed"]
    for number in range(sweep.seeds):
        seed = first + number if type(first) is int else first
        for name, values in sweep.settings.items():
            setting = Layer(values, f" in {sweep.place}, setting {name}")
            yield [sweep.base, own, setting, *typed], {"run": f"{name}-{seed}", "seed": seed}


def slots(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables of the runs that go on at one time: for each a CUDA device, or a share of the cores.

    Args:
        jobs: Runs at a time; None: as many as there are CUDA devices, or one without. More than devices share them.
        devices: The parameter `device` of each run of the sweep.

    Raises:
        ConfigError: less than one, or a run asks for a device by a number that it would not see.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError([(f"--jobs {jobs}", "must be at least 1")])
    present = 0 if set(devices) <= {"cpu"} else torch.cuda.device_count()
    jobs = min(jobs or max(1, present), max(1, len(devices)))
    if not present:
        own = jobs == 1 or THREADS_VARIABLE in os.environ
        return [{} if own else {THREADS_VARIABLE: str(max(1, usable_cores() // jobs))} for _ in range(jobs)]
    numbered = sorted({name for name in devices if re.fullmatch(r"cuda:[1-9]\d*", name)})
    if numbered:
        rule = f"each run of a sweep sees one device: write 'auto', and choose devices with {DEVICES_VARIABLE}"
        raise ConfigError([(f"device={name!r}", rule) for name in numbered])
    visible = [name for name in os.environ.get(DEVICES_VARIABLE, "").split(",") if name]
    names = visible or [str(i) for i in range(present)]
    return [{DEVICES_VARIABLE: names[i % present]} for i in range(jobs)]


# --- reports on it ---


def check_report(parameters: Mapping[str, Any]) -> None:
    """As `check_parameters` for a report that may exist on other runs.

    Raises:
        RunError: its folder belongs to parameters that differ in more than the runs.
    """
    path = run_path(parameters)
    there = read_if_there(path / "config.json").get("parameters", {})
    check_parameters(path, dict(parameters) | {name: there[name] for name in (REPORT,) if name in there})


def set_aside(parameters: Mapping[str, Any]) -> Path | None:
    """Rename the folder of a report that is about other runs, or was made before the last of its runs finished.

    Args:
        parameters: Those of the report; `runs` names runs of its experiment.

    Returns:
        The folder's new name; None where it may stay, or there is none.
    """
    path = run_path(parameters)
    config = read_if_there(path / "config.json")
    if holds_nothing(path) and not config.keys() - set(HEADER):
        return None
    made = _finished(path) or config["started"]
    if not changed(path, parameters) and all(_finished(path.parent / run) <= made for run in parameters[REPORT]):
        return None
    aside = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return path.rename(next(name for name in aside if not name.exists()))


def _finished(path: Path) -> str:
    """When a run finished, ISO 8601; nothing where it has not."""
    return read_if_there(path / "summary.json").get("finished", "")
