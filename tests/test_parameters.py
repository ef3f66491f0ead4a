import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from workbench.ablation import ARMS
from workbench.augmentation import AugmentConfig
from workbench.conditioning import ConditioningConfig
from workbench.config import ConfigError
from workbench.datasets.clips import ClipsConfig
from workbench.datasets.fields import SimulationConfig
from workbench.datasets.layouts import LayoutsConfig
from workbench.datasets.opening import DATA, DataKind
from workbench.datasets.weights import WeightsConfig
from workbench.models.conv_vae import ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAESettings
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.layout_autoencoder import LayoutAutoencoderSettings
from workbench.models.weight_autoencoder import WeightAutoencoderSettings
from workbench.parameters import CONFIGS, OF_KIND, TYPES, Parameter, check, declared, read_file, resolve
from workbench.schedule import HeadWeights, TrainConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = sorted(path for path in (ROOT / "params").rglob("*.yaml") if path.name != "settings.yaml")
INSPECT, VAE, CONDITIONER = (
    ROOT / "notebooks" / f"{name}.ipynb" for name in ("01_inspect_data", "02_train_vae", "03_train_conditioner")
)


def notebook(folder: Path, parameters: str, name: str = "n.ipynb") -> Path:
    """A notebook with one parameters cell."""
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os"), cell]), folder / name)
    return folder / name


# --- what is shipped ---


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_parameter_file_fits_its_notebook(path: Path) -> None:
    source = ROOT / "notebooks" / f"{path.stem}.ipynb"
    assert source.is_file(), f"{path} belongs to no notebook"
    values = read_file(path)
    resolved = check(source, values, str(path))
    assert resolved.keys() == declared(source).keys()
    assert {name: resolved[name] for name in values} == values


def test_the_full_size_latent_action_model_has_the_published_size() -> None:
    path = ROOT / "params" / "sthv2" / "05_compare_vae_laq.yaml"
    values = check(ROOT / "notebooks" / f"{path.stem}.ipynb", read_file(path), str(path))
    with torch.device("meta"):
        model = LAQ(LAQConfig.pick(values))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 343.8
    published = {"quantizer": "nsvq", "predicts": "frame", "batch_size": 64, "lr": 1e-4, "training_steps": 100_005}
    assert {name: values[name] for name in published} == published
    assert values["pair_offset"] * values["cache_stride"] == 30, "frames of the video"


def test_the_full_size_experiment_is_the_one_of_the_issue() -> None:
    resolved = check(VAE, read_file(ROOT / "params" / "sthv2" / "02_train_vae.yaml"), "sthv2")
    expected = {
        "batch_size": 64,
        "lr": 1e-4,
        "lr_decay": 0.95,
        "epochs": 200,
        "grad_clip": 1.0,
        "kl_weight": 1e-4,
        "checkpoint_every": 5000,
        "images_every": 5000,
        "log_every": 50,
        "hidden_dims": [64, 128, 256, 512, 1024],
        "latent_dim": 256,
        "image_size": 256,
    }
    assert {name: resolved[name] for name in expected} == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_a_default_and_a_help(path: Path) -> None:
    parameters = declared(path)
    assert {"experiment", "run"} <= parameters.keys()
    assert [name for name, parameter in parameters.items() if len(parameter.help) < 5] == []
    check(path, {}, str(path))  # the defaults are in range
    check(path, {name: parameter.default for name, parameter in parameters.items()}, str(path))  # and of their types


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_agree_with_the_settings_they_go_into(path: Path) -> None:
    parameters = declared(path)
    assert path.stem in CONFIGS, "a notebook whose ranges nobody checks"
    kinds = OF_KIND.get(path.stem, {})
    for config in (*CONFIGS[path.stem], *(config for classes in kinds.values() for config in classes)):
        shared = config.model_fields.keys() & parameters.keys()
        assert shared, f"{config.__name__} has nothing to do with {path.stem}"
        for name in shared:
            kind, default = parameters[name].type, parameters[name].default
            field = config.pick({name: parameters[name].default for name in shared})
            assert type(getattr(field, name)) is type(default) or kind is float, name
            wrong: dict[Any, Any] = {str: 1, int: "x", float: "x", bool: "x"}
            wrong |= dict.fromkeys([list[int], list[float], list[str]], "x")
            with pytest.raises(ConfigError, match=name):
                config.pick({name: wrong[kind]})


def test_every_training_and_model_setting_can_be_set_in_the_notebook() -> None:
    """Nothing is out of reach; a setting that only code can change would not be recorded."""
    configs = {config for classes in OF_KIND["02_train_vae"].values() for config in classes} | {TrainConfig}
    assert {HierarchicalVAESettings, AugmentConfig, SimulationConfig, ConvVAEConfig, ClipsConfig} < configs
    assert {LayoutsConfig, LayoutAutoencoderSettings, HeadWeights, WeightsConfig, WeightAutoencoderSettings} < configs
    fields = {name for config in configs for name in config.model_fields}
    assert fields - declared(VAE).keys() == {"pair_offset", "in_channels"}, "these a VAE of frames has no use for"


def test_every_setting_of_a_conditioner_can_be_set_in_the_notebook() -> None:
    known = declared(CONDITIONER).keys()
    assert ConditioningConfig.model_fields.keys() - known == set()
    vae_only = {"recon_weight", "kl_weight", "kl_weight_start", "kl_rise_from", "kl_rise_to"}
    assert TrainConfig.model_fields.keys() - known == vae_only | {"channels_last", "compile"}


def test_parameters_of_one_name_mean_the_same_in_all_notebooks() -> None:
    """What 01 and 02 say of the data has the same type and the same help."""
    one, other = declared(INSPECT), declared(VAE)
    shared = DataKind.model_fields.keys() | ClipsConfig.model_fields.keys() | SimulationConfig.model_fields.keys()
    shared &= one.keys()
    assert len(shared) > 20 and {name: one[name] for name in shared} == {name: other[name] for name in shared}


# --- kinds of data ---


@pytest.mark.parametrize(
    ("notebook", "text", "wrong"),
    [
        ("01_inspect_data", "data_kind: simulation\nimage_size: 128", "image_size=128 has simulation"),
        ("01_inspect_data", "data_kind: clips\nscaling: global", "scaling='global' has clips"),
        ("01_inspect_data", "conditions: c.csv\nnode_end: 5", "node_end=5; conditions='c.csv' has clips"),
        ("02_train_vae", "data_kind: simulation\nhidden_dims: [8, 8]", "hidden_dims=[8, 8] has simulation"),
        ("02_train_vae", "data_kind: clips\nfilters: [8, 4]", "filters=[8, 4] has clips"),
        ("02_train_vae", "recon_loss: mae", "recon_loss='mae' has clips"),
        ("02_train_vae", "augment_noise: 0.1", "augment_noise=0.1 has clips"),
        ("02_train_vae", "data_kind: simulation\nclip_length: 4", "clip_length=4 has simulation"),
    ],
)
def test_a_value_for_another_kind_of_data_is_refused(notebook: str, text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(ROOT / "notebooks" / f"{notebook}.ipynb", read_file(tmp_path / "f.yaml"), "f.yaml")
    names, kind = wrong.split(" has ")
    rule = f"has no meaning for data_kind={kind!r}; leave it out, or set data_kind"
    assert str(caught.value).splitlines() == [f"{name} in f.yaml: {rule}" for name in names.split("; ")]


@pytest.mark.parametrize("path", [ROOT / "notebooks" / f"{name}.ipynb" for name in OF_KIND], ids=lambda p: p.stem)
def test_what_two_kinds_share_and_defaults_written_out_are_no_value_for_another_kind(path: Path) -> None:
    defaults = {name: parameter.default for name, parameter in declared(path).items()}
    for kind in DATA:
        check(path, defaults | {"data_kind": kind, "val_fraction": 0.3, "split_seed": 5}, "f.yaml")
    with pytest.raises(ConfigError, match="^data_kind='clisp' in f.yaml: must be 'clips', 'simulation', 'layouts' or"):
        check(path, {"data_kind": "clisp"}, "f.yaml")


def test_only_the_settings_of_the_kind_have_to_fit_each_other() -> None:
    """image_size must be divisible by 2 ** len(hidden_dims) for images alone."""
    assert check(VAE, {"data_kind": "simulation", "filters": [8, 4], "node_end": 7}, "f.yaml")["node_end"] == 7
    with pytest.raises(ConfigError, match="^filters=.8. in f.yaml: must|^filters=.* at least 2 entries"):
        check(VAE, {"data_kind": "simulation", "filters": [8]}, "f.yaml")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_stripped_and_runs_anywhere(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    nbformat.validate(nbformat.read(path, 4))
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"output kept: {source[:60]}"
        tree = ast.parse(source)
        kinds = {type(node) for node in ast.walk(tree)}
        assert not kinds & {ast.ClassDef, ast.AsyncFunctionDef}, f"a class: {source[:60]}"
        assert ast.While not in kinds, f"a loop without an end in sight: {source[:60]}"
        loops = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.For)]
        words = r"batch|loader|epoch|backward|optimizer"
        assert not [loop for loop in loops if re.search(words, loop)], f"a loop over batches: {source[:60]}"
        assert not re.search(r"^\s*[%!]", source, re.MULTILINE), f"a magic command: {source[:60]}"
        if "parameters" not in cell["metadata"].get("tags", []):
            assert len(source.splitlines()) <= 12, f"a long cell: {source[:60]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_stands_before_the_code_and_the_name_is_the_files(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith(f"# {path.stem[:2]} · ")
    assert cells[-1]["cell_type"] == "markdown" and "".join(cells[-1]["source"]).startswith("## What we saw")
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(f'parameters.resolve("{path.stem}", globals())' in source for source in sources) == 1
    kinds = [cell["cell_type"] for cell in cells]
    runs = "".join("c" if kind == "code" else " " for kind in kinds).split()
    assert max(map(len, runs)) <= 3, "more than three code cells without a word"


# --- the parameters cell ---


def test_declared_reads_types_defaults_and_help(tmp_path: Path) -> None:
    lines = [
        'name: str = "a # b"  # what it is called',
        "dims: list[int] = [1, 2]  # sizes, größer [px]",
        "lr: float = 1.0e-4",
        'grüße: str = "ä"  # umlauts',
    ]
    assert declared(notebook(tmp_path, "\n".join(lines))) == {
        "name": Parameter(str, "a # b", "what it is called"),
        "dims": Parameter(list[int], [1, 2], "sizes, größer [px]"),
        "lr": Parameter(float, 1e-4, ""),
        "grüße": Parameter(str, "ä", "umlauts"),
    }


@pytest.mark.parametrize(
    "line", ["epochs = 3", "epochs: int", "epochs: int = 2 * n", "epochs: int | None = 3", "print('hello')"]
)
def test_another_line_in_the_parameters_cell_is_refused(line: str, tmp_path: Path) -> None:
    path = notebook(tmp_path, f"run: str = 'a'\n{line}")
    with pytest.raises(ConfigError) as caught:
        declared(path)
    assert str(caught.value) == (
        f"{line} in {path}: must read `name: type = value`, type one of {', '.join(TYPES)}, value written out"
    )


def test_a_parameters_cell_that_is_no_python(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n.ipynb: line 2 of its parameters cell: "):
        declared(notebook(tmp_path, "run: str = 'a'\nepochs: int = = 3"))


def test_a_notebook_without_a_parameters_cell(tmp_path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "n.ipynb")
    with pytest.raises(ConfigError, match="n.ipynb: must have a cell tagged 'parameters'"):
        declared(tmp_path / "n.ipynb")


# --- YAML files ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent_dmi: 3", "unknown parameter 'latent_dmi' in f.yaml: did you mean 'latent_dim'?"),
        (
            'epochs: "16"',
            "epochs='16' in f.yaml: must be a number, and this is text: write 16 without quotes",
        ),
        ("epochs: many", "epochs='many' in f.yaml: must be a whole number"),
        (
            "lr: 1e-4",
            "lr='1e-4' in f.yaml: must be a number, and YAML reads 1e-4 as text: write 1.0e-4 or 0.0001 without quotes",
        ),
        ("kl_weight: -1.0e-4", "kl_weight=-0.0001 in f.yaml: must be at least 0"),
        ("val_fraction: -0.1", "val_fraction=-0.1 in f.yaml: must be at least 0"),
        ("hidden_dims: 32, 64", "hidden_dims='32, 64' in f.yaml: must be a list, such as [32, 64, 128]"),
        ("hidden_dims: [32, big]", "hidden_dims[1]='big' in f.yaml: must be a whole number"),
        (
            "image_size: 100\nhidden_dims: [8, 8, 8]",
            "image_size=100 in f.yaml: must be divisible by 8, as 3 entries of hidden_dims halve it; "
            "the nearest such size is 96 or 104",
        ),
        ("run: 5", "run=5 in f.yaml: must be text; put it in quotes"),
        ("run: no", "run=False in f.yaml: must be text; put it in quotes"),
        ("labels:", "labels=None in f.yaml: must be text; put it in quotes"),
        ("compile: 1", "compile=1 in f.yaml: must be true or false"),
        ("device: gpu", "device='gpu' in f.yaml: must be 'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1' and so on"),
        ("precision: fp16", "precision='fp16' in f.yaml: must be 'fp32' or 'bf16'"),
        ("eval_samples: -1", "eval_samples=-1 in f.yaml: must be at least 0"),
        ("lr: {first: 1}", "lr={'first': 1} in f.yaml: must be a number"),
    ],
)
def test_a_wrong_line_is_named_with_its_rule(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(VAE, read_file(tmp_path / "f.yaml"), "f.yaml")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("04_interpolate_latents", "split: tset", "split='tset' in f.yaml: must be 'train', 'val' or 'test'"),
        ("04_interpolate_latents", "checkpoint: last", "checkpoint='last' in f.yaml: must be 'final' or 'best'"),
        ("04_interpolate_latents", "steps: 1", "steps=1 in f.yaml: must be at least 2"),
        ("01_inspect_data", "offsets: []", "offsets=[] in f.yaml: must have at least 1 entry"),
        ("01_inspect_data", "offsets: [1, 0]", "offsets[1]=0 in f.yaml: must be at least 1"),
        ("01_inspect_data", "components: [0]", "components[0]=0 in f.yaml: must be at least 1"),
        ("03_train_conditioner", "mode: e2e", "mode='e2e' in f.yaml: must be 'latent' or 'end_to_end'"),
        ("03_train_conditioner", "seeds: 0", "seeds=0 in f.yaml: must be at least 1"),
        ("03_train_conditioner", "noise: -0.1", "noise=-0.1 in f.yaml: must be at least 0"),
        ("03_train_conditioner", "floor_samples: 1", "floor_samples=1 in f.yaml: must be at least 2"),
        (
            "03_train_conditioner",
            "mae_weight: -0.5",
            "mae_weight=-0.5 in f.yaml: must be at least 0, or -1.0 for the weight of preset 'none'",
        ),
        (
            "03_train_conditioner",
            "main_weight: 0.0\nhier_weight: 0.0",
            "main_weight=0.0 with hier_weight=0.0 in f.yaml: one of them must be more than 0",
        ),
    ],
)
def test_other_notebooks_are_checked_before_they_start(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        check(ROOT / "notebooks" / f"{name}.ipynb", read_file(tmp_path / "f.yaml"), "f.yaml")
    assert str(caught.value) == message


def test_an_unknown_arm_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(CONDITIONER, {"arms": ["latent", "balance"]}, "f.yaml")
    assert str(caught.value).startswith("arms[1]='balance' in f.yaml: must be 'latent', 'end_to_end', 'robust_terms',")
    assert check(CONDITIONER, {"arms": list(ARMS)}, "f.yaml")["arms"] == list(ARMS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr: 0.1\nepochs: 3\nlr: 0.2", "gives lr twice: keep one line of each"),
        (b"- lr\n- epochs", "must hold lines `name: value`, each name a word"),
        (b"just words", "must hold lines `name: value`, each name a word"),
        (b"3: 4", "must hold lines `name: value`, each name a word"),
        (b"yes: 4", "must hold lines `name: value`, each name a word"),
        (b"lr: [1, 2", "is not YAML: while parsing a flow sequence"),
        (b"a: 1\n---\na: 2", "is not YAML: expected a single document"),
        (b"\xff\xfe\x00", "is not YAML: "),
        (b"run: !!python/object/apply:os.system ['touch ran']", "is not YAML: could not determine a constructor"),
    ],
)
def test_an_odd_file_is_refused(content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / "f.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'f.yaml'}: {message}")
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_file(tmp_path)


def test_an_empty_file_leaves_every_default(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("# nothing\n")
    assert read_file(tmp_path / "f.yaml") == {}


# --- in a running notebook ---


def test_resolve_reads_the_values_of_the_namespace() -> None:
    values = {name: parameter.default for name, parameter in declared(VAE).items()}
    namespace = values | {"epochs": 7, "np": object(), "_": 3}
    assert resolve("02_train_vae", namespace) == values | {"epochs": 7}
    with pytest.raises(ConfigError, match="^epochs=0 in notebook 02_train_vae: must be at least 1$"):
        resolve("02_train_vae", values | {"epochs": 0})


def test_resolve_outside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve("02_train_vae", {})
    assert str(caught.value) == (
        f"{tmp_path}/notebooks/02_train_vae.ipynb: no such notebook; start Jupyter inside the project, and pass its "
        "file's name"
    )
