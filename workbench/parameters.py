"""Parameters of the notebooks: declared in their `parameters` cell, set by flat YAML files, checked before use."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError, create_model

from workbench.config import Config, ConfigError, problems
from workbench.datasets.clips import ClipsConfig
from workbench.models.conv_vae import ConvVAEConfig
from workbench.paths import project_root
from workbench.training import TrainConfig

CONFIGS: dict[str, tuple[type[Config], ...]] = {
    "01_inspect_data": (ClipsConfig,),
    "02_train_vae": (ClipsConfig, ConvVAEConfig, TrainConfig),
    "04_interpolate_latents": (),
}
"""The settings classes that each notebook's parameters go into; their ranges hold for its parameter files."""

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list[int]": list[int], "list[str]": list[str]}


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = default  # help [unit]` of a parameters cell."""

    type: Any
    default: Any
    help: str


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters a notebook declares, read without running it.

    Raises:
        ConfigError: no cell is tagged `parameters`, or a line of it is not `name: type = literal`.
    """
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if not tagged:
        raise ConfigError([(str(notebook), "must have a cell tagged 'parameters'")])
    source = "".join(tagged[0]["source"])
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        if annotation not in TYPES:
            raise ConfigError([(ast.unparse(node), f"must read `name: type = value`, type one of {', '.join(TYPES)}")])
        text = lines[node.end_lineno - 1].partition("#")[2].strip()
        found[node.target.id] = Parameter(TYPES[annotation], ast.literal_eval(node.value), text)
    return found


def read_file(path: Path) -> dict[str, Any]:
    """A flat YAML parameter file; nothing in it is run.

    Raises:
        ConfigError: it is not YAML, or no mapping of names to values.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError([(str(path), f"is not YAML: {' '.join(str(error).split())}")]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError([(str(path), "must hold lines `name: value`")])
    return content


def check(notebook: Path, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every parameter of a notebook, given values in place of defaults.

    Args:
        notebook: The .ipynb file.
        values: Given values by name.
        source: Where they come from, for the error's message.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a wrong type, a value out of range.
    """
    known = declared(notebook)
    fields = {name: (parameter.type, parameter.default) for name, parameter in known.items()}
    model = create_model("Parameters", __config__=ConfigDict(extra="forbid", strict=True), **fields)
    try:
        resolved = model(**values).model_dump()
    except ValidationError as error:
        raise ConfigError(problems(error, known), source) from None
    for config in CONFIGS.get(notebook.stem, ()):
        try:
            config.pick(resolved)
        except ConfigError as error:
            raise error.at(source) from None
    return resolved


def resolve(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the notebook that is running, with the values they now have, checked.

    Args:
        notebook: Its name without the ending; a copy under another name passes that name.
        namespace: The notebook's `globals()`.

    Raises:
        ConfigError: as `check`.
    """
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    return check(path, {name: namespace[name] for name in declared(path)}, f"notebook {notebook}")
