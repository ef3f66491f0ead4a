import collections
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.__main__ import main
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_files import read_entries
from workbench.datasets.zoo_importing import import_zoo, read_module

LAYERS = ["torch.nn.Sequential", "torch.nn.Linear", "torch.nn.BatchNorm1d", "torch.nn.ReLU"]


class Touch:
    """Leaves a file behind where its pickle is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Outer:
    class Inner(nn.Linear):
        """A class within a class."""

        class Innermost(nn.Linear):
            """And one within that."""


class WithBuffers(nn.Module):
    """Persistent buffers and others, a parameter that is None, and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("kept", torch.ones(3))
        self.register_parameter("absent", None)
        self.deep = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
        self.again = self.deep[1]
        self.last = nn.Parameter(torch.ones(1))


class Extra(nn.Linear):
    def get_extra_state(self):
        return None


class OwnStateDict(nn.Linear):
    def state_dict(self, *args, **kwargs):
        return {}


def altered(module: nn.Module, **attributes: object) -> nn.Module:
    """A module whose pickle holds these in the place of what modules have."""
    vars(module).update(attributes)
    return module


def cyclic() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].add_module("me", module)
    return module


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


def test_a_file_may_hold_one_module(zoo: Path, tmp_path: Path) -> None:
    torch.save(network(4), zoo / "weights" / "single.pt")
    assert "single.pt: 1 network" in import_zoo(zoo, tmp_path / "new", LAYERS)
    (entry,) = read_entries(tmp_path / "new" / "weights", "single.pt", {})
    assert all(torch.equal(entry.state[name], tensor) for name, tensor in network(4).state_dict().items())


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
        ("..Net", r"--classes \.\.Net: must be package.module.Name of a class"),
        ("__main__.Net=torch.nn.Absent", "--classes __main__.Net=torch.nn.Absent: cannot be imported"),
        ("__main__.Net=", "--classes __main__.Net=: must be package.module.Name of a class"),
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
        (network(0).state_dict(), "holds a OrderedDict; must be a module, or a list of them, not empty"),
        ([], "holds a list; must be a module, or a list of them, not empty"),
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
    with pytest.raises(DataError, match="SRC='.*cache': no such folder; correct the path"):
        import_zoo(tmp_path / "cache", tmp_path / "new", LAYERS)
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "a.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="states: no .pt file there; give the folder of the zoo"):
        import_zoo(tmp_path / "states", tmp_path / "new", LAYERS)


def import_one(zoo: Path, out: Path, module: nn.Module, classes: list[str]) -> dict[str, torch.Tensor]:
    """The state dict that a module becomes in a zoo of its own."""
    for path in (zoo / "weights").iterdir():
        path.unlink()
    torch.save([module], zoo / "weights" / "a.pt")
    import_zoo(zoo, out, classes)
    return dict(next(read_entries(out / "weights", "a.pt", {})).state)


# classes


@pytest.mark.parametrize("module", [Outer.Inner(2, 3), Outer.Inner.Innermost(2, 3)])
def test_a_class_within_a_class_is_named_with_it(zoo: Path, tmp_path: Path, module: nn.Module) -> None:
    with pytest.raises(
        DataError, match=r"names builtins.getattr, .*\.Outer, .* package.module.Outer.Inner names a class"
    ):
        import_one(zoo, tmp_path / "new", module, ["torch.nn.Linear"])
    classes = [f"{__name__}.{type(module).__qualname__}"]
    found = import_one(zoo, tmp_path / "new", module, classes)
    assert torch.equal(found["weight"], module.weight)
    if type(module) is Outer.Inner:
        torch.save([Outer.Inner.Innermost(2, 3)], zoo / "weights" / "a.pt")
        with pytest.raises(
            DataError, match=r"a.pt: cannot be read \(names .*\.Outer\.Inner\.Innermost, which --classes"
        ):
            import_zoo(zoo, tmp_path / "other", classes)


@pytest.mark.parametrize("name", ["Net", "Holder.Net"])
def test_classes_of_a_script_are_given_their_new_place(zoo: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    """Files of a script call its classes __main__.Net."""
    main_module, script = sys.modules["__main__"], type("Net", (nn.Linear,), {"__module__": "__main__"})
    script.__qualname__ = name
    holder = type("Holder", (), {"__module__": "__main__", "Net": script})
    for attribute, value in (("Net", script), ("Holder", holder)):
        monkeypatch.setattr(main_module, attribute, value, raising=False)
    module = script(2, 3)
    found = import_one(zoo, tmp_path / "new", module, [f"__main__.{name}={__name__}.Outer.Inner"])
    assert torch.equal(found["weight"], module.weight)
    with pytest.raises(DataError, match=r"a.pt: names __main__\.|a.pt: names .*__main__\."):
        import_one(zoo, tmp_path / "other", module, ["torch.nn.Linear"])


# state dicts


@pytest.mark.parametrize("module", [WithBuffers(), nn.Sequential(network(0), network(1)), nn.LSTM(2, 3)])
def test_what_is_read_is_what_state_dict_gives(module: nn.Module) -> None:
    found, expected = list(read_module(module)), module.state_dict()
    assert [name for name, _ in found] == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)


def test_no_method_of_an_instance_is_called(zoo: Path, tmp_path: Path) -> None:
    """An attribute `state_dict` of a part, which a file may hold, would hide the part's weights."""
    own = dict.fromkeys(("state_dict", "_save_to_state_dict", "named_parameters"), collections.OrderedDict)
    module = nn.Sequential(altered(nn.Linear(2, 3), **own), nn.Linear(3, 1))
    vars(module[0].bias).update(dict.fromkeys(("numel", "detach", "clone", "untyped_storage"), "x"))
    found = import_one(zoo, tmp_path / "new", module, LAYERS)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found["0.bias"].tolist() == module[0].bias.tolist()


OWN_STATE = "it is more than its parameters and buffers; save module.state_dict"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Extra(2, 2), f"the module makes its state dict by Extra.get_extra_state: {OWN_STATE}"),
        (nn.Sequential(OwnStateDict(2, 2)), f"module '0' makes its state dict by OwnStateDict.state_dict: {OWN_STATE}"),
        (
            altered(nn.Linear(2, 2), _state_dict_hooks={0: nn.Linear}),
            f"the module makes its state dict by hooks: {OWN_STATE}",
        ),
        (altered(nn.Linear(2, 2), _parameters="x"), "the module: its _parameters is a str, no dict; leave the network"),
        (altered(nn.Linear(2, 2), _buffers={"b": 3}), "'b' of its _buffers is a int, no Tensor with a name; leave"),
        (altered(nn.Sequential(), _modules={"c": 3}), "'c' of its _modules is a int, no Module with a name; leave the"),
        (
            altered(nn.Linear(2, 2), _parameters={3: torch.ones(1)}),
            "3 of its _parameters is a Tensor, no Tensor with a",
        ),
        (altered(nn.Linear(2, 2), _non_persistent_buffers_set=3), "its _non_persistent_buffers_set is a int, no set"),
        (
            altered(nn.Sequential(nn.Linear(1, 1)), _buffers={"0.bias": torch.ones(1)}),
            "entry '0.bias' .* is there twice",
        ),
        (altered(nn.Linear(2, 2), _parameters={"w": torch.eye(2).to_sparse()}), "entry 'w' .* is torch.sparse_coo of"),
        (cyclic(), "module '0.me' is a part of itself, so that its state dict has no end; leave the network out"),
        (nn.Sequential(), "the module has no parameters; leave it out"),
    ],
)
def test_what_has_no_plain_state_dict_is_refused(zoo: Path, tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(DataError, match=f"a.pt, entry 0: .*{message}"):
        import_one(zoo, tmp_path / "new", module, [*LAYERS, f"{__name__}.Extra", f"{__name__}.OwnStateDict"])
    assert not (tmp_path / "new").exists()


# files


def test_the_files_are_those_that_opening_reads(zoo: Path, tmp_path: Path) -> None:
    """Sub-folders too, and nothing that begins with a dot."""
    for name in ("deep/more.pt", ".hidden/a.pt", "._alone.pt"):
        (zoo / "weights" / name).parent.mkdir(exist_ok=True)
        torch.save([network(4)] if name[0] == "d" else "not read", zoo / "weights" / name)
    (zoo / "weights" / "state.safetensors").write_bytes(b"")
    written = ["alone.pt: 2 networks", "deep/more.pt: 1 network", "pairs.pt: 2 networks"]
    left_out = "left out, as they hold no modules: state.safetensors"
    assert import_zoo(zoo, tmp_path / "new", LAYERS) == [*written, left_out]
    found = sorted(path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.pt"))
    assert found == ["weights/alone.pt", "weights/deep/more.pt", "weights/pairs.pt"]


def test_a_folder_that_cannot_be_made_is_told(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out=.*file.*: cannot be made .*; set --out to a folder that you may write"):
        import_zoo(zoo, tmp_path / "file" / "new", LAYERS)
    with pytest.raises(DataError, match="--out .*xxx: cannot be (made|written) .*; "):
        import_zoo(zoo, tmp_path / ("x" * 300), LAYERS)


def test_a_byte_that_changed_is_noticed(zoo: Path, tmp_path: Path) -> None:
    path = zoo / "weights" / "alone.pt"
    content, weights = bytearray(path.read_bytes()), network(0)[0].weight.detach().numpy().tobytes()
    content[content.find(weights)] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"alone.pt: cannot be read \(its record 'alone/data/\d+' has another checksum"):
        import_zoo(zoo, tmp_path / "new", LAYERS)


def test_the_command(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["import-zoo", str(zoo), "--out", str(tmp_path / "new"), "--classes"]
    assert main([*arguments, *LAYERS]) == 0
    assert capsys.readouterr().out == f"alone.pt: 2 networks\npairs.pt: 2 networks\nthe zoo is in {tmp_path / 'new'}\n"
    assert main([*arguments, *LAYERS]) == 1
    assert "is there already" in capsys.readouterr().err
