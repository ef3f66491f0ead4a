"""Which runs of an experiment are looked at together: finished autoencoders of one kind, on the same samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from workbench.datasets.layouts import Layouts, LayoutsConfig
from workbench.datasets.opening import open_data
from workbench.provenance import check_same_data
from workbench.runs import Run, RunError, differences, read_if_there, read_json


class Sought(NamedTuple):
    """What runs of one kind are known by.

    Args:
        what: What they train.
        data_kind: Parameter of that name.
        setting: A parameter that notebooks on such data have only where they train.
        example: A parameter folder that trains some.
    """

    what: str
    data_kind: str
    setting: str
    example: str


KIND = "layout_autoencoder"
SOUGHT = {
    KIND: Sought("autoencoder of floor plans", "layouts", "latent_channels", "smoke-layouts"),
    "weight_autoencoder": Sought("autoencoder of networks", "weights", "fdim", "smoke-zoo"),
}
OF_OPENING = ("cache_dir", "max_unknown_fraction")
"""Settings of layouts that change neither an image nor its split."""
OF_ONE_RUN = ("experiment", "run", "seed", "device", "cache_dir")
"""Parameters in which the runs of one setting may differ."""


def runs_of(experiment_folder: Path, names: Sequence[str] = (), kind: str = KIND) -> tuple[list[Path], list[str]]:
    """The runs of an experiment with a finished autoencoder, and the names of those that were to have one.

    Args:
        experiment_folder: `outputs/<experiment>`.
        names: Runs to take, in this order. Where none are named: all that have such a model or were begun to train one,
            by setting and seed.
        kind: Of the model, a key of `SOUGHT`.

    Returns:
        Folders of the runs that are complete; names of the others, whether they failed, still run, or never began.

    Raises:
        RunError: a name is none, none is finished, one holds a model of another kind, two have the same setting and
            seed, or two of one setting were trained with other parameters.
    """
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise RunError(f"runs={outside}: must be names of runs in {experiment_folder}, without folders; correct them")
    candidates = [experiment_folder / name for name in names] or _autoencoders(experiment_folder, kind)
    found = [path for path in candidates if _complete(path)]
    failed = [str(path.relative_to(experiment_folder)) for path in candidates if path not in found]
    if not found:
        which = f"none of {', '.join(failed)} is finished" if failed else "there is none"
        remedy = f"train one first, such as with `workbench run params/{SOUGHT[kind].example}`"
        remedy = "see why in their notebooks, and run them again" if failed else remedy
        raise RunError(f"{experiment_folder} has no finished {SOUGHT[kind].what} ({which}): {remedy}")
    taken: dict[tuple[str, int], Path] = {}
    for path in found:
        own, (setting, seed) = read_json(path / "config.json")["model"]["kind"], setting_of(path)
        if own != kind:
            raise RunError(f"{path} holds a {own}, not a {kind}: name runs of that kind")
        if (setting, seed) in taken:
            both = f"{taken[setting, seed].name} and {path.name} are both setting {setting!r} with seed {seed}"
            raise RunError(f"{experiment_folder}: {both}: name one of them")
        taken[setting, seed] = path
    _check_settings(taken)
    return found, failed


def _check_settings(runs: Mapping[tuple[str, int], Path]) -> None:
    """Refuse runs of one setting that differ in more than their seed: their spread would not be that of seeds."""
    first: dict[str, Path] = {}
    for (setting, _), path in runs.items():
        there, here = (_of_setting(other) for other in (first.setdefault(setting, path), path))
        if found := differences(there, here):
            raise RunError(
                f"{first[setting].name} and {path.name} are runs of setting {setting!r} and were trained with other "
                f"parameters: {', '.join(found)} ('there' is {first[setting].name}). Name runs that differ in their "
                "seed alone, or train them in another experiment"
            )


def _of_setting(path: Path) -> dict[str, Any]:
    parameters = read_json(path / "config.json")["parameters"]
    return {name: value for name, value in parameters.items() if name not in OF_ONE_RUN}


def _complete(path: Path) -> bool:
    """Whether a run has a finished model, and its notebook did not fail after the training."""
    failed = read_if_there(path / "status.json").get("state") == "failed" and not Run(path).finished
    return Run(path).trained and "model" in read_if_there(path / "config.json") and not failed


def _autoencoders(folder: Path, kind: str) -> list[Path]:
    """Sub-folders of the runs that train autoencoders, by setting and seed."""
    paths = [file.parent for file in folder.glob("*/config.json")]
    return sorted((path for path in paths if _trains(read_json(path / "config.json"), kind)), key=setting_of)


def _trains(config: Mapping[str, Any], kind: str) -> bool:
    if "model" in config:
        return config["model"]["kind"] == kind
    parameters, sought = config.get("parameters", {}), SOUGHT[kind]
    return parameters.get("data_kind") == sought.data_kind and sought.setting in parameters


def setting_of(path: Path) -> tuple[str, int]:
    """Setting and seed of a run: `wide-2`, trained with seed 2, is a run of `wide`."""
    seed = read_json(path / "config.json")["parameters"]["seed"]
    return path.name.removesuffix(f"-{seed}"), seed


def open_same(paths: Sequence[Path]) -> Layouts:
    """The data that all of these runs were trained on.

    Raises:
        RunError: two were trained on other images, classes or another split; or the data have changed since.
        DataError: the data cannot be used as they are.
    """
    configs = [read_json(path / "config.json") for path in paths]
    samples = [_samples(config) for config in configs]
    for path, other in zip(paths[1:], samples[1:], strict=True):
        if found := differences(samples[0], other):
            raise RunError(
                f"{paths[0].name} and {path.name} were trained on other data or another split: {', '.join(found)} "
                f"('there' is {paths[0].name}), so a comparison would not be fair. Name runs of the same data and "
                "split, or train one of them again"
            )
    data = open_data(configs[0]["parameters"])
    check_same_data(paths[0], configs[0], data.fingerprint)
    return data


def _samples(config: Mapping[str, Any]) -> dict[str, Any]:
    """What says which samples a run was trained on."""
    settings = LayoutsConfig.pick(config["parameters"]).model_dump()
    kept = {name: value for name, value in settings.items() if name not in OF_OPENING}
    return kept | {"fingerprint": config["data"]["fingerprint"]}
