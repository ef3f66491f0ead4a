import os
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.__main__ import main
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_files import read_entries
from workbench.datasets.zoo_importing import import_zoo

LAYERS = ["torch.nn.Sequential", "torch.nn.Linear", "torch.nn.BatchNorm1d", "torch.nn.ReLU"]


class Touch:
    """Leaves a file behind where its pickle is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Modules alone, and with their properties before or after them."""
    folder = tmp_path / "zoo" / "weights"
    folder.mkdir(parents=True)
    torch.save([network(0), network(1)], folder / "alone.pt")
    torch.save([({"accuracy": 0.5}, network(2)), (network(3), {"accuracy": 0.75})], folder / "pairs.pt")
    return folder.parent


def test_state_dicts_are_those_of_the_modules(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "imported"
    assert import_zoo(zoo, out, LAYERS) == ["alone.pt: 2 networks", "pairs.pt: 2 networks"]
    assert [path.name for path in out.parent.iterdir()] == ["imported"]
    root = out / "weights"
    entries = [entry for name in ("alone.pt", "pairs.pt") for entry in read_entries(root, name, {})]
    for seed, entry in enumerate(entries):
        expected = network(seed).state_dict()
        assert list(entry.state) == list(expected)
        assert all(torch.equal(entry.state[name], tensor) for name, tensor in expected.items())
    assert [entry.properties for entry in entries] == [{}, {}, {"accuracy": 0.5}, {"accuracy": 0.75}]


def test_a_class_that_is_not_named_is_not_built(zoo: Path, tmp_path: Path) -> None:
    names = "torch.nn.modules.activation.ReLU, torch.nn.modules.batchnorm.BatchNorm1d"
    with pytest.raises(DataError, match=f"alone.pt: names {names}, which --classes does not; nothing was run; add"):
        import_zoo(zoo, tmp_path / "new", LAYERS[:2])
    assert not (tmp_path / "new").exists()


def test_nothing_else_in_a_file_is_run(zoo: Path, tmp_path: Path) -> None:
    torch.save([Touch(tmp_path / "ran"), network(0)], zoo / "weights" / "pairs.pt")
    with pytest.raises(DataError, match="pairs.pt: names (posix|nt).system, which --classes does not; nothing was run"):
        import_zoo(zoo, tmp_path / "new", LAYERS)
    with pytest.raises(DataError, match="--classes os.system: must be package.module.Name of a class derived from tor"):
        import_zoo(zoo, tmp_path / "new", [*LAYERS, "os.system"])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "absent_package.Net",
            r"--classes absent_package.Net: cannot be imported \(No module named 'absent_package'\)",
        ),
        (
            "torch.nn.Absent",
            "--classes torch.nn.Absent: cannot be imported .*; correct it, or add its folder to PYTHONP",
        ),
        ("Net", "--classes Net: must be package.module.Name of a class"),
    ],
)
def test_a_class_that_cannot_be_had_is_named(zoo: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_zoo(zoo, tmp_path / "new", [*LAYERS, name])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([3], "entry 0: holds int; must be a module, or a module and a dict of its properties"),
        ([(network(0), network(1))], "entry 0: holds Sequential, Sequential; must be a module, or"),
        (network(0), "holds a Sequential; must be a list of modules, not empty"),
        ([], "holds a list; must be a list of modules, not empty"),
        ([(network(0), {"accuracy": torch.ones(2)})], "entry 0: property 'accuracy' is a Tensor: must be text, a"),
    ],
)
def test_other_content_is_refused(zoo: Path, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, zoo / "weights" / "alone.pt")
    with pytest.raises(DataError, match=message):
        import_zoo(zoo, tmp_path / "new", LAYERS)


def test_half_a_file_no_file_and_a_folder_that_is_there(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--out .*zoo: is there already, and nothing is overwritten; name a new folder"):
        import_zoo(zoo, zoo, LAYERS)
    path = zoo / "weights" / "alone.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"alone.pt: cannot be read \(.*\); copy it again, or save it with torch 1.6"):
        import_zoo(zoo, tmp_path / "new", LAYERS)
    with pytest.raises(DataError, match="cache: no .pt file there; give the folder of the zoo"):
        import_zoo(tmp_path / "cache", tmp_path / "new", LAYERS)


def test_the_command(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["import-zoo", str(zoo), "--out", str(tmp_path / "new"), "--classes"]
    assert main([*arguments, *LAYERS]) == 0
    assert capsys.readouterr().out == f"alone.pt: 2 networks\npairs.pt: 2 networks\nthe zoo is in {tmp_path / 'new'}\n"
    assert main([*arguments, *LAYERS]) == 1
    assert "is there already" in capsys.readouterr().err
