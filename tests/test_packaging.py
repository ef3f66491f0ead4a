"""pyproject.toml, constraints.txt and environment.yml agree with each other and with what is installed."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), "every line must read name==version"
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names), "a package is pinned twice"
    return dict(zip(names, (version for _, version in pairs), strict=True))


def test_direct_requirements_are_pinned_within_their_ranges() -> None:
    pinned = pins()
    for requirement in DIRECT:
        assert requirement.specifier, f"{requirement.name} has no range"
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert pinned["torch"] == "2.13.0"


def closure() -> set[str]:
    """Names of everything the project needs on this machine, through all levels and extras."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(r.name), extra) for r in DIRECT for extra in ("", *r.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name for name, _ in seen}


def test_every_transitive_version_is_pinned_and_installed() -> None:
    pinned, needed = pins(), closure()
    assert len(needed) > 100
    assert needed <= pinned.keys(), f"not in constraints.txt: {sorted(needed - pinned.keys())}"
    wrong = {n: distribution(n).version for n in needed if Version(distribution(n).version).public != pinned[n]}
    assert not wrong, f"installed versions differ from constraints.txt: {wrong}"


def test_conda_environment_installs_the_same_through_pip() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert packages == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_imports_of_the_package_are_declared() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    names |= {"yaml": "pyyaml", "IPython": "ipykernel", "jupyter_client": "ipykernel"}
    names |= {"jupyter_server": "jupyterlab", "umap": "umap-learn"}
    found = set()
    for path in (ROOT / "workbench").rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    from sys import stdlib_module_names

    third_party = {
        canonicalize_name(names.get(name, name)) for name in found - set(stdlib_module_names) - {"workbench"}
    }
    assert len(third_party) > 10
    third_party -= {"umap-learn"}  # optional: whoever asks for it without having it is told so
    assert third_party <= declared, f"imported but not declared: {sorted(third_party - declared)}"
