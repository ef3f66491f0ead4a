"""Parameters of the notebooks: declared in their `parameters` cell, set by flat YAML files, checked before use."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model, model_validator

from workbench.ablation import ARMS
from workbench.augmentation import AugmentConfig
from workbench.conditioning import ConditioningConfig
from workbench.config import Config, ConfigError, problems
from workbench.datasets.clips import ClipsConfig
from workbench.datasets.fields import SimulationConfig
from workbench.datasets.layouts import LayoutsConfig
from workbench.datasets.opening import DATA, DataKind
from workbench.datasets.weights import WeightsConfig
from workbench.models.conv_vae import ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAESettings
from workbench.models.laq import LAQConfig
from workbench.models.layout_autoencoder import Halvings, LayoutAutoencoderSettings
from workbench.models.weight_autoencoder import WeightAutoencoderSettings
from workbench.paths import project_root
from workbench.process import DeviceName
from workbench.rivals import RivalsConfig
from workbench.schedule import HeadWeights, TrainConfig


class InspectConfig(Config):
    """Ranges of what notebook 01 shows and measures."""

    offsets: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1)
    components: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1)
    shown: int = Field(1, ge=1)
    measured: int = Field(2, ge=2)


class EvaluationConfig(Config):
    """Ranges of how notebook 02 evaluates; 0 samples means all."""

    floor_samples: int = Field(0, ge=0)
    floor_components: int = Field(0, ge=0)
    eval_samples: int = Field(0, ge=0)
    active_threshold: float = Field(0.01, ge=0)


class ConditionerRunConfig(Config):
    """Ranges of what notebook 03 evaluates and compares; 0 samples means all."""

    checkpoint: Literal["final", "best"] = "final"
    eval_samples: int = Field(0, ge=0)
    floor_samples: int = Field(2, ge=2)
    floor_components: int = Field(1, ge=1)
    noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    seeds: int = Field(1, ge=1)
    arms: list[Literal[ARMS]] = Field([])
    arm_epochs: int = Field(0, ge=0)


class WalkConfig(Config):
    """Ranges of the walks of notebook 04; 0 samples means all."""

    checkpoint: Literal["final", "best"] = "final"
    split: Literal["train", "val", "test"] = "test"
    seed: int = Field(0, ge=0)
    device: DeviceName = "auto"
    batch_size: int = Field(64, ge=1)
    eval_samples: int = Field(0, ge=0)
    steps: int = Field(2, ge=2)
    shown_pairs: int = Field(1, ge=1)
    measured_pairs: int = Field(1, ge=1)
    measured_steps: int = Field(2, ge=2)
    dimensions: int = Field(1, ge=1)
    span: float = Field(3.0, gt=0, allow_inf_nan=False)


class ActionComparisonConfig(Config):
    """Ranges of what notebook 05 measures and shows; 0 samples means all."""

    eval_samples: int = Field(0, ge=0)
    floor_samples: int = Field(0, ge=0)
    probe_samples: int = Field(0, ge=0)
    permutations: int = Field(1, ge=1)
    folds: int = Field(2, ge=2)
    shown: int = Field(2, ge=2)
    pair_offset: int = Field(1, ge=1)

    first_image: str = ""
    second_image: str = ""

    @model_validator(mode="after")
    def _whole_pair(self) -> "ActionComparisonConfig":
        if bool(self.first_image) != bool(self.second_image):
            given = f"first_image={self.first_image!r} and second_image={self.second_image!r}"
            raise ValueError(f"{given}: must be given both, or neither")
        return self


class EncoderComparisonConfig(Config):
    """Ranges of what notebook 06 measures; 0 samples means all."""

    split: Literal["train", "val", "test"] = "val"
    error: Literal["mse", "psnr", "ssim", "pixel_accuracy", "mean_iou", "colour_accuracy", "colour_mean_iou"] = "mse"
    tolerance: float = Field(0.01, ge=0, lt=1)
    device: DeviceName = "auto"
    batch_size: int = Field(64, ge=1)
    pairs: int = Field(1, ge=1)
    path_steps: int = Field(2, ge=2)
    shown_epochs: int = Field(0, ge=0)
    floor_samples: int = Field(0, ge=0)
    pair_seed: int = Field(0, ge=0)


class ZooConfig(Config):
    """Ranges of what notebook 07 measures; 0 networks means all."""

    checkpoint: Literal["final", "best"] = "final"
    split: Literal["val", "test"] = "test"
    device: DeviceName = "auto"
    batch_size: int = Field(256, ge=1)
    train_samples: int = Field(0, ge=0)
    eval_samples: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)
    pairs: int = Field(1, ge=1)
    path_steps: int = Field(2, ge=2)
    folds: int = Field(2, ge=2)
    draw_seed: int = Field(0, ge=0)


CONFIGS: dict[str, tuple[type[Config], ...]] = {
    "01_inspect_data": (DataKind, InspectConfig),
    "02_train_vae": (DataKind, TrainConfig, EvaluationConfig),
    "03_train_conditioner": (ConditionerRunConfig, ConditioningConfig, TrainConfig),
    "04_interpolate_latents": (WalkConfig,),
    "05_compare_vae_laq": (ActionComparisonConfig, RivalsConfig, ClipsConfig, TrainConfig, LAQConfig, ConvVAEConfig),
    "06_compare_encoders": (EncoderComparisonConfig,),
    "07_rebuild_weights": (ZooConfig,),
}
"""The settings classes that each notebook's parameters go into; their ranges hold for its parameter files."""

OF_KIND: dict[str, dict[str, tuple[type[Config], ...]]] = {
    "01_inspect_data": {kind: (config,) for kind, (config, _) in DATA.items()},
    "02_train_vae": {
        "clips": (ClipsConfig, ConvVAEConfig),
        "simulation": (SimulationConfig, HierarchicalVAESettings, AugmentConfig),
        "layouts": (LayoutsConfig, LayoutAutoencoderSettings, Halvings, HeadWeights),
        "weights": (WeightsConfig, WeightAutoencoderSettings),
    },
}
"""Further ones of notebooks with a `data_kind`, by kind; what only other kinds have must keep its default."""

LISTS = {"list[int]": list[int], "list[float]": list[float], "list[str]": list[str]}
TYPES = {"str": str, "int": int, "float": float, "bool": bool} | LISTS


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
    try:
        nodes = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError([(str(notebook), f"line {error.lineno} of its parameters cell: {error.msg}")]) from None
    return dict(_parameter(node, source.splitlines(), notebook) for node in nodes)


def _parameter(node: ast.stmt, lines: list[str], notebook: Path) -> tuple[str, Parameter]:
    """Name and content of one line of a parameters cell."""
    try:
        kind, default = TYPES[ast.unparse(node.annotation)], ast.literal_eval(node.value)
    except (AttributeError, KeyError, ValueError):
        rule = f"must read `name: type = value`, type one of {', '.join(TYPES)}, value written out"
        raise ConfigError([(f"{ast.unparse(node)} in {notebook}", rule)]) from None
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    return node.target.id, Parameter(kind, default, rest.partition("#")[2].strip())


def read_file(path: Path) -> dict[str, Any]:
    """A flat YAML parameter file; nothing in it is run.

    Raises:
        ConfigError: it cannot be read, is not YAML, no mapping of names to values, or gives a name twice.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([(str(path), f"is not YAML: {' '.join(str(error).split())}")]) from None
    except OSError as error:
        raise ConfigError([(str(path), f"cannot be read: {error.strerror}")]) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError([(str(path), "must hold lines `name: value`, each name a word")])
    names = [key.value for key, _ in root.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError([(str(path), f"gives {', '.join(twice)} twice: keep one line of each")])
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
    kinds = OF_KIND.get(notebook.stem, {})
    try:
        for config in CONFIGS.get(notebook.stem, ()):
            config.pick(resolved)
        for config in kinds.get(resolved.get("data_kind"), ()):
            config.pick(resolved)
        _refuse_of_other_kinds(kinds, resolved, known)
    except ConfigError as error:
        raise error.at(source) from None
    return resolved


def _refuse_of_other_kinds(
    kinds: Mapping[str, tuple[type[Config], ...]], resolved: Mapping[str, Any], known: Mapping[str, Parameter]
) -> None:
    """Refuse a value for a parameter that the kind of data does not have, as it would change nothing."""
    if not kinds:
        return
    fields = {kind: {name for config in configs for name in config.model_fields} for kind, configs in kinds.items()}
    kind = resolved["data_kind"]
    elsewhere = set().union(*fields.values()) - fields[kind]
    changed = [name for name in known if name in elsewhere and resolved[name] != known[name].default]
    if changed:
        rule = f"has no meaning for data_kind={kind!r}; leave it out, or set data_kind"
        raise ConfigError([(f"{name}={resolved[name]!r}", rule) for name in changed])


def resolve(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the notebook that is running, with the values they now have, checked.

    Args:
        notebook: Its name without the ending; a copy under another name passes that name.
        namespace: The notebook's `globals()`.

    Raises:
        ConfigError: as `check`, or the notebook is not in the project.
    """
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        raise ConfigError([(str(path), "no such notebook; start Jupyter inside the project, and pass its file's name")])
    return check(path, {name: namespace[name] for name in declared(path)}, f"notebook {notebook}")
