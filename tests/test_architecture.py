"""Imports look down only, and some habits of the house are held by reading the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workbench"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {
        "workbench",
        "agent",
        "paths",
        "config",
        "progress",
        "process",
        "nodes",
        "simulgen",
        "importing",
        "lab_connection",
    },
    {
        "losses",
        "layers",
        "metrics",
        "lpips",
        "interpolation",
        "plots",
        "field_plots",
        "field_traces",
        "latent_action_plots",
        "segmentation",
        "replicate_plots",
        "weight_plots",
        "distributed",
        "legends",
        "projections",
    },
    {"datasets"},
    {"models"},
    {"published"},
    {"checkpoints"},
    {"runs"},
    {"listing", "live", "schedule", "health", "objectives", "augmentation", "logs", "provenance", "costs", "launch"},
    {"training", "conditioning", "worker"},
    {
        "comparison",
        "floors",
        "gains",
        "information",
        "probes",
        "rate_distortion",
        "stability",
        "rebuilding",
        "decoded_networks",
        "sampled_networks",
        "zoo_probes",
    },
    {"ablation", "rivals", "encoder_runs", "encoders", "replicates", "criteria", "verdicts"},
    {
        "action_comparison",
        "action_codes",
        "zoo_runs",
        "colouring",
        "network_headlines",
        "spaces",
        "latent_map",
        "predictions",
        "exploration",
        "paired_exploration",
        "action_exploration",
    },
    {"explorer_figure", "explorer_widget", "latent_explorer"},
    {"parameters"},
    {"points", "sweeps", "tasks", "kernels"},
    {"batch"},
    {"sites", "node_tasks", "dispatch", "cluster"},
    {"doctor", "__main__"},
]
"""From the ground up; a module imports modules of lower layers, and of its own."""


def layer(module: str) -> int:
    """`workbench.datasets.clips` -> 2."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "workbench"
    return next(i for i, names in enumerate(LAYERS) if name in names)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> set[str]:
    """Modules of the workbench that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if is_module(name) else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "workbench"}


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_look_down_only(path: Path) -> None:
    own = layer(module_name(path))
    upward = [name for name in imported(ast.parse(path.read_text())) if layer(name) > own]
    assert upward == []


def test_the_order_is_really_held(tmp_path: Path) -> None:
    """The reader of imports sees every form of them."""
    source = """
import workbench.training
from workbench import batch, __version__
def f():
    from workbench.models.conv_vae import ConvVAE
    from workbench.runs import Run
"""
    assert imported(ast.parse(source)) == {
        "workbench.training",
        "workbench.batch",
        "workbench",
        "workbench.models.conv_vae",
        "workbench.runs",
    }


def test_parsl_is_imported_for_a_site_only() -> None:
    """Where nothing of a lower layer needs it, and the command imports nothing before it knows what is asked."""
    users = {module_name(path) for path in FILES if re.search(r"(?m)^(from|import) parsl\b", path.read_text())}
    assert users and {layer(name) for name in users} == {layer("workbench.cluster")}
    command = ast.parse((PACKAGE / "__main__.py").read_text())
    assert not imported(ast.Module([node for node in command.body if "Import" in type(node).__name__], []))


def test_models_know_no_training_and_no_files() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        names = {name.split(".")[1] for name in imported(ast.parse(path.read_text())) if "." in name}
        assert names <= {"config", "layers", "losses", "models"}, path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_habits_not_to_be_repeated(path: Path) -> None:
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("Exception", "everything"), f"line {node.lineno}: except {caught}"
            if caught == "BaseException":
                assert any(isinstance(inner, ast.Raise) for inner in node.body), f"line {node.lineno}: swallowed"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") != "False", f"line {node.lineno}: {called}(weights_only=False)"
            assert called == "zip" or given.get("strict") != "False", f"line {node.lineno}: {called}(strict=False)"
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec", "np.load") or (
                called == "np.load" and given.get("allow_pickle", "False") == "False"
            ), f"line {node.lineno}: {called}"
            assert called != "torch.load" or given.get("weights_only") == "True", f"line {node.lineno}: torch.load"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
    assert path.stem not in ("utils", "helpers")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in public if node.name[0] != "_" and not ast.get_docstring(node)] == []


def test_tests_mirror_modules() -> None:
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    modules = {path.stem.strip("_") for path in FILES if path.stem not in ("__init__", "paths")}
    modules -= {path.stem for path in (PACKAGE / "datasets").glob("*.py")}  # tested by what they do together
    assert modules - tested == set()
