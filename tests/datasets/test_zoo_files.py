import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from workbench.datasets import zoo_building
from workbench.datasets.frames import DataError
from workbench.datasets.zoo_cache import Zoo, open_zoo
from workbench.datasets.zoo_files import list_zoo, read_entries


class Marker:
    """An object whose pickle makes a folder when it is loaded in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state(seed: int, inputs: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(inputs, 2).state_dict()


def bare(folder: Path, properties: dict[str, dict] | None = None, **states) -> Path:
    """Files of one state dict each, and properties.json."""
    for name, content in states.items():
        torch.save(content, folder / f"{name}.pt")
    (folder / "properties.json").write_text(json.dumps(properties or {name: {} for name in states}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "zoo" / "weights").mkdir(parents=True)
    return tmp_path / "zoo" / "weights"


def opened(folder: Path) -> Zoo:
    return open_zoo(folder.parent, folder.parent.parent / "cache")


def refused(folder: Path, message: str) -> str:
    with pytest.raises(DataError, match=message) as error:
        opened(folder)
    cached = (
        list((folder.parent.parent / "cache").glob("zoo-*[!k]")) if (folder.parent.parent / "cache").exists() else []
    )
    assert cached == [], "a refused zoo left a cache"
    return str(error.value)


# what can be read


def test_lists_of_pairs_are_read_in_the_order_of_files_and_entries(folder):
    torch.save([({"accuracy": 0.5 + i / 10, "good": i > 0}, state(i)) for i in range(2)], folder / "b.pt")
    torch.save([[{"accuracy": 1, "good": True}, state(2)]], folder / "a.pt")
    (folder / "notes.txt").write_text("not read")
    zoo = opened(folder)
    assert zoo.table.to_dict("list") == {
        "file": ["a.pt", "b.pt", "b.pt"],
        "id": ["a/0", "b/0", "b/1"],
        "run": ["a/0", "b/0", "b/1"],
        "architecture": ["8 weights"] * 3,
        "accuracy": [1.0, 0.5, 0.6],
        "good": [True, False, True],
    }
    assert zoo.given == ["accuracy", "good"] and zoo.others == 1 and zoo.dtype == "float32"
    for network, seed in enumerate((2, 0, 1)):
        flat = torch.cat([tensor.flatten() for tensor in state(seed).values()])
        assert torch.equal(torch.from_numpy(zoo.read([network], 9)[0]), torch.nn.functional.pad(flat, (0, 1)))


@pytest.mark.parametrize("key", ["file", "id"])
def test_a_csv_beside_single_networks_tells_their_properties(folder, key):
    save_file(state(0), folder / "x.safetensors")
    torch.save(state(1), folder / "y.pt", _use_new_zipfile_serialization=False)
    names = ("y.pt", "x") if key == "file" else ("y", "x")
    (folder / "properties.csv").write_text(
        f"{key},run,accuracy,epoch,deep,note\n{names[0]},007,0.25,3,true,ok\n{names[1]},8,1,4,False,3 of 4\n\n"
    )
    table = opened(folder).table
    assert table["id"].tolist() == ["x", "y"] and table["run"].tolist() == ["8", "007"]
    assert table["accuracy"].tolist() == [1.0, 0.25] and table["epoch"].tolist() == [4, 3]
    assert table["deep"].tolist() == [False, True] and table["note"].tolist() == ["3 of 4", "ok"]


def test_a_json_beside_single_networks_and_folders_in_folders(folder):
    (folder / "deep").mkdir()
    torch.save(state(0), folder / "deep" / "x.pt")
    bare(folder, {"y": {"id": 5, "accuracy": 0.5}, "deep/x": {"id": "x", "accuracy": 0.25}}, y=state(1))
    table = opened(folder).table
    assert table[["file", "id", "accuracy"]].to_numpy().tolist() == [["deep/x.pt", "x", 0.25], ["y.pt", "5", 0.5]]


def test_files_may_lie_in_the_folder_itself(tmp_path):
    torch.save([({}, state(0))], tmp_path / "a.pt")
    assert list_zoo(tmp_path).networks == ["a.pt"] and list_zoo(tmp_path).root == tmp_path


def test_architectures_are_told_apart_by_layers_or_by_their_property(folder):
    torch.save([({}, state(0)), ({}, dict(reversed(state(1).items())))], folder / "a.pt")
    torch.save([({}, state(0, inputs=5))], folder / "b.pt")
    torch.save([({}, {"w": torch.ones(8)})], folder / "c.pt")
    zoo = opened(folder)
    assert zoo.table["architecture"].tolist() == ["8 weights", "8 weights", "12 weights", "8 weights (2)"]
    assert [layer.name for layer in zoo.architectures[0].layers] == ["weight", "bias"]
    flat = torch.cat([state(1)[name].flatten() for name in ("weight", "bias")])
    assert torch.equal(torch.from_numpy(zoo.read([1], 8)[0]), flat), "another order of the same layers"
    shutil.rmtree(folder)
    folder.mkdir()
    entries = [
        ({"architecture": name}, state(i, inputs=3 + (name == "deep"))) for i, name in enumerate(["flat", "deep"] * 2)
    ]
    torch.save(entries, folder / "a.pt")
    assert opened(folder).table["architecture"].tolist() == ["flat", "deep"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_cache_holds_weights_of_every_dtype_exactly(folder, dtype):
    weights = torch.rand(5, dtype=torch.float64).to(dtype)
    torch.save([({}, {"w": weights, "n": torch.tensor([1, 2**50]), "b": torch.tensor(True)})], folder / "a.pt")
    zoo = opened(folder)
    assert zoo.dtype == str(dtype).removeprefix("torch.") == zoo.architectures[0].layers[0].dtype
    assert torch.equal(torch.from_numpy(zoo.read([0], 5)[0]).to(dtype), weights)
    aside = zoo.aside(0)
    assert torch.equal(aside["n"], torch.tensor([1, 2**50])) and torch.equal(aside["b"], torch.tensor(True))


# what is refused: files


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(folder, tmp_path, protocol, zipped):
    marker = Marker(tmp_path / "was run")
    torch.save(
        [({"accuracy": marker}, state(0))],
        folder / "a.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    text = refused(
        folder, r"a\.pt: refused, as it names posix\.mkdir: a file may hold tensors, .* nothing was run; save"
    )
    assert not marker.path.exists() and "import-zoo" not in text
    (folder / "a.pt").write_bytes(pickle.dumps(marker))
    refused(folder, "refused, as it names posix.mkdir")
    assert not marker.path.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_whole_modules_are_refused_with_the_way_out(folder, protocol):
    torch.save([({}, nn.Sequential(nn.Linear(2, 2), nn.Dropout()))], folder / "a.pt", pickle_protocol=protocol)
    names = [f"torch.nn.modules.{name}" for name in ("container.Sequential", "linear.Linear", "dropout.Dropout")]
    message = (
        r"holds whole pickled modules \(it names (.*)\), which can run code .*; nothing was run; `workbench import-zoo"
    )
    text = refused(folder, message)
    assert all(name in text for name in names) and "--classes package.module.Name ..." in text and "_utils" not in text


def test_a_number_of_numpy_is_refused_with_its_name(folder):
    torch.save([({"accuracy": torch.ones(1).numpy()[0]}, state(0))], folder / "a.pt")
    refused(folder, r"refused, as it names numpy\._core\.multiarray\.scalar, .*save state dicts and plain properties")


@pytest.mark.parametrize("share", [0.5, 0.999, 0.0])
@pytest.mark.parametrize("kind", ["list", "state", "safetensors", "legacy"])
def test_half_a_file_is_refused(folder, kind, share):
    path = folder / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(state(0), path)
    else:
        content = [({}, state(i)) for i in range(5)] if kind == "list" else state(0)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    bare(folder, {"a": {}}) if kind != "list" else None
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, rf"{path.name}: cannot be read \(.+\); if it is incomplete or damaged, copy it again, else save")


def rewrite(path: Path, how: int, change=lambda name, data: data) -> None:
    """The records of a .pt written again, stored or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_compressed_records_are_read_as_they_are(folder):
    """They cannot be mapped: what lies in the file is not what the tensors hold."""
    expected = [state(i, inputs=100) for i in range(2)]
    torch.save([({}, weights) for weights in expected], folder / "a.pt")
    rewrite(folder / "a.pt", zipfile.ZIP_DEFLATED)
    zoo = opened(folder)
    for network, weights in enumerate(expected):
        flat = torch.cat([tensor.flatten() for tensor in weights.values()])
        assert torch.equal(torch.from_numpy(zoo.read([network], len(flat))[0]), flat)


def test_a_byte_that_changed_is_noticed(folder):
    torch.save([({}, state(0))], folder / "a.pt")
    content, weights = bytearray((folder / "a.pt").read_bytes()), state(0)["weight"].numpy().tobytes()
    content[content.find(weights) + 2] ^= 0x40
    (folder / "a.pt").write_bytes(content)
    refused(folder, r"a\.pt: cannot be read \(its record 'a/data/0' has another checksum than was written\); if it is")


def test_files_written_without_checksums_are_read(folder):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save([({}, state(0))], folder / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(opened(folder).table) == 1


@pytest.mark.parametrize(
    "pickled", [b"\x80\x02J\x01.", b"\x80\x02X\xff\xff\xff\xff.", b"\x80\x02h\x05.", b"", b"\x80\x02("]
)
def test_a_pickle_that_breaks_off_is_refused(folder, pickled):
    torch.save([({}, state(0))], folder / "a.pt")
    rewrite(folder / "a.pt", zipfile.ZIP_STORED, lambda name, data: pickled if name.endswith("data.pkl") else data)
    refused(folder, r"a\.pt: cannot be read \(.+\); if it is incomplete or damaged, copy it again")
    (folder / "a.pt").write_bytes(pickled)
    refused(folder, r"a\.pt: cannot be read \(.+\); if it is incomplete or damaged, copy it again")


def test_every_half_of_an_older_file_is_refused(folder):
    torch.save([({}, state(0))], folder / "a.pt", _use_new_zipfile_serialization=False)
    content = (folder / "a.pt").read_bytes()
    for length in range(0, len(content), 7):
        (folder / "a.pt").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a\.pt: (cannot be read|refused)"):
            list(read_entries(folder, "a.pt", {}))


class Shadowed:
    """An OrderedDict whose pickle sets attributes of the names of its methods."""

    def __init__(self, content: dict) -> None:
        self.content = content

    def __reduce__(self):
        return OrderedDict, (), dict.fromkeys(("items", "keys", "values", "get"), "x"), None, iter(self.content.items())


def test_attributes_that_shadow_methods_are_not_used(folder):
    weights = state(0) | {"n": torch.arange(3)}
    for tensor in weights.values():
        vars(tensor).update(dict.fromkeys(("numel", "reshape", "detach", "contiguous", "is_floating_point"), "x"))
    torch.save([(Shadowed({"accuracy": 0.5}), Shadowed(weights))], folder / "a.pt")
    zoo = opened(folder)
    assert zoo.table["accuracy"].tolist() == [0.5] and torch.equal(zoo.aside(0)["n"], torch.arange(3))
    assert zoo.read([0], 6)[0].tolist() == state(0)["weight"].flatten().tolist()


@pytest.mark.parametrize("target", [".", "..", "real"])
def test_a_folder_that_is_there_twice_is_refused(folder, target):
    (folder / "real").mkdir()
    torch.save([({}, state(0))], folder / "real" / "a.pt")
    (folder / "again").symlink_to(target)
    refused(folder, r"weights.* is the same folder as .*weights.*: its networks would count twice; remove the link")


def test_what_cannot_be_opened_is_refused(folder):
    torch.save([({}, state(0))], folder / "a.pt")
    (folder / "b.pt").symlink_to("b.pt")
    refused(folder, r"b\.pt: cannot be read \(Too many levels of symbolic links\); mend it, or move it away")
    (folder / "b.pt").unlink()
    (folder / "b.pt").symlink_to("nothing")
    refused(folder, r"b\.pt: cannot be read \(No such file or directory\); mend it")
    with pytest.raises(DataError, match="data='x*': (cannot be opened .*; correct it|no such folder)"):
        list_zoo(Path("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_must_not_be_listed_is_refused(folder):
    (folder / "closed").mkdir(mode=0)
    refused(folder, "closed: cannot be listed .*; mend it, or move it away")


@pytest.mark.parametrize("inside", [".", "weights", "weights/cache", "cache"])
def test_a_cache_in_the_folder_of_the_zoo_is_refused(folder, inside):
    torch.save([({}, state(0))], folder / "a.pt")
    with pytest.raises(
        DataError, match="the cache .* lies in the folder of the zoo .*; set cache_dir to a folder else"
    ):
        open_zoo(folder.parent, folder.parent / inside)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["a.pt", "weights"]


def test_a_folder_with_a_long_name_is_read(tmp_path):
    source = tmp_path / ("x" * 250)
    source.mkdir()
    torch.save([({}, state(0))], source / "a.pt")
    assert len(open_zoo(source, tmp_path / "cache").table) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([state(0)], "a.pt, entry 0: is a OrderedDict; must be a pair"),
        ([({}, state(0)), ({}, state(1), 3)], "a.pt, entry 1: is a tuple of dict, OrderedDict, int; must be a pair"),
        ([({}, torch.zeros(3))], "a.pt, entry 0: is a tuple of dict, Tensor; must be a pair"),
        (
            [({}, {"model": state(0)})],
            "a.pt, entry 0: entry 'model' of the state dict is a OrderedDict: must be tensors",
        ),
        (
            [({}, {"a": torch.zeros(1), "b": torch.zeros(1).half()})],
            "a.pt, entry 0: layers of one state dict differ in",
        ),
        ([], "a.pt: holds an empty list; must be a list of"),
        (torch.zeros(3), "a.pt: holds a Tensor; must be a list of"),
        (state(0), r"a.pt: is one state dict, and .*properties.csv or .*properties.json has no row for 'a'; add one"),
        (
            [({"accuracy": torch.tensor(1.0)}, state(0))],
            "entry 0: property 'accuracy' is a Tensor: must be .*; save float",
        ),
        ([({"accuracy": None}, state(0))], "entry 0: property 'accuracy' is a NoneType: must be text, a whole"),
        ([({"run": 0.5}, state(0))], "entry 0: property 'run' is a float: must be text"),
        ([({"run": ""}, state(0))], "entry 0: property 'run' is empty; fill it in"),
        (
            [({"split": "train"}, state(0))],
            "property 'split': its name must be text, and not one of file, group, split",
        ),
        ([({3: 1}, state(0))], "property 3: its name must be text"),
        (
            [({"x": 10**400}, state(0)), ({"x": 1.5}, state(1))],
            "property 'x' is a whole number of 1329 bits: must fit in",
        ),
        ([({"id": "\udc80"}, state(0))], r"property 'id' has text that is not UTF-8: '\\udc80'; rename it"),
        ([({"\udc80": 1}, state(0))], r"property '\\udc80' has text that is not UTF-8"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(folder, content, message):
    torch.save(content, folder / "a.pt")
    refused(folder, message)


def test_a_folder_without_networks_is_refused(folder):
    refused(folder, r"no file ending in \.pt or \.safetensors in .*weights$")
    (folder / os.fsdecode(b"\xff.pt")).write_bytes(b"")
    refused(folder, "is not UTF-8; rename it")
    (folder / os.fsdecode(b"\xff.pt")).unlink()
    (folder / "net.pth").write_bytes(b"")
    refused(folder, r"in .*weights; it holds 1 other files, such as 'net\.pth'")
    shutil.rmtree(folder.parent)
    with pytest.raises(DataError, match="zoo': no such folder; correct the path"):
        list_zoo(folder.parent)


# what is refused: tables


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("csv", "file,accuracy\nx,1\n", r"y\.pt: is one state dict, and .* has no row for 'y'; add one"),
        (
            "csv",
            "file,accuracy\nx,1\ny,1\nz,1\n",
            "rows for 1 files that are absent, such as z: add the files or remove",
        ),
        ("csv", "file,accuracy\nx,1\ny,1\nx.pt,1\n", "file 'x.pt' has two rows; keep one"),
        ("csv", "file,accuracy\nx,1\ny\n", "row 3 has another number of cells than the header's 2"),
        ("csv", "file,accuracy\nx,1\ny,\n", "file 'y': property 'accuracy' is empty; fill it in"),
        ("csv", "name,accuracy\nx,1\ny,2\n", "has columns name, accuracy; needs 'file' or 'id'"),
        ("csv", "", r"properties\.csv: is not a table of properties"),
        ("json", '{"x": {"a": 1}, "y": {"a": 1}, "x": {}}', "file 'x' has two rows"),
        ("json", '{"x": {"a": 1}, "y": {"a": 1, "a": 2}}', "properties of 'y' must be an object, with each name once"),
        ("json", '{"x": {"a": 1}, "y": {"a": [1]}}', "file 'y': property 'a' is a list: must be text"),
        ("json", '[{"x": 1}]', "must be an object of objects"),
        ("json", '{"x": {"a": 1}, ', "is not a table of properties"),
        ("json", "[" * 100_000, "is not a table of properties"),
        (
            "json",
            '{"x": {"a": 1}, "y": {"b": 1}}',
            r"property 'a' \(and 1 more\) is absent in .*y\.pt and given in .*x\.pt",
        ),
        (
            "json",
            '{"x": {"a": 1}, "y": {"a": "1"}}',
            "property 'a' is of several kinds: 1 in 'x', '1' in 'y'; make it one",
        ),
    ],
)
def test_a_table_that_does_not_go_with_the_files_is_refused(folder, name, text, message):
    bare(folder, x=state(0), y=state(1))
    (folder / "properties.json").unlink()
    (folder / f"properties.{name}").write_text(text)
    refused(folder, message)


def test_two_sources_of_properties_are_refused(folder):
    bare(folder, x=state(0))
    (folder / "properties.csv").write_text("file\nx\n")
    refused(folder, "holds both properties.csv and properties.json: keep one")
    (folder / "properties.csv").unlink()
    torch.save([({}, state(0))], folder / "x.pt")
    refused(folder, r"x\.pt: is a list with properties of its own, and the table has a row for it; remove the row")


def test_a_table_beside_the_folder_of_the_networks_is_refused(folder):
    torch.save(state(0), folder / "x.pt")
    (folder.parent / "properties.csv").write_text("file,run\nx,a\n")
    refused(folder, r"properties\.csv is not beside the networks: move it into .*/weights, or remove it")


# what is refused: networks that do not go together


def test_layers_that_differ_in_one_file_are_refused(folder):
    second = state(1)
    second["scale"] = second.pop("bias")
    torch.save([({}, state(0)), ({}, second)], folder / "a.pt")
    message = (
        r"a\.pt, entry 1 lacks the layers 'bias' and has the extra layers 'scale', other than .*a\.pt, entry 0; "
        "networks of one file must have the same layers: give the entries the property 'architecture', or put them"
    )
    refused(folder, message)
    torch.save([({}, state(0)), ({}, state(1, inputs=4))], folder / "a.pt")
    refused(
        folder, r"entry 1 has 'weight' of float32 \[2, 4\] where others have float32 \[2, 3\], other than .* entry 0"
    )
    torch.save([({}, state(0) | {"n": torch.tensor(1)}), ({}, state(1))], folder / "a.pt")
    refused(folder, "entry 1 lacks the layers 'n'")


def test_layers_that_differ_within_an_architecture_are_refused(folder):
    torch.save([({"architecture": "net"}, state(0))], folder / "a.pt")
    torch.save([({"architecture": "net"}, state(0, inputs=4))], folder / "b.pt")
    refused(
        folder, r"b\.pt, entry 0 has 'weight' .*a\.pt, entry 0; networks of the architecture 'net' must have the same"
    )


def test_a_property_absent_in_some_networks_is_refused(folder):
    torch.save([({"accuracy": 1.0, "run": 1}, state(0)), ({"accuracy": 1.0}, state(1))], folder / "a.pt")
    refused(folder, r"property 'run' is absent in .*entry 1 and given in .*entry 0: all networks must have the same")
    torch.save([({}, state(0)), ({"accuracy": 1.0}, state(1))], folder / "a.pt")
    refused(folder, r"property 'accuracy' is absent in .*entry 0 and given in .*entry 1")


def test_two_networks_with_one_id_are_refused(folder):
    torch.save([({"id": 7}, state(0))], folder / "a.pt")
    torch.save([({"id": 6}, state(0)), ({"id": "7"}, state(1))], folder / "b.pt")
    refused(folder, r"two networks have the id '7': .*a\.pt, entry 0 and .*b\.pt, entry 1; ids must be unique")


def test_several_dtypes_are_refused(folder):
    torch.save([({}, state(0))], folder / "a.pt")
    torch.save([({}, {name: tensor.half() for name, tensor in state(0).items()})], folder / "b.pt")
    refused(folder, r"differ in dtype: .*a\.pt, entry 0 is in float32, .*b\.pt, entry 0 in float16; convert all to one")


def test_weights_that_are_not_finite_are_refused_with_network_and_layer(folder):
    broken, large = state(1), {name: tensor.double() for name, tensor in state(2).items()}
    broken["bias"][0], broken["weight"][1, 1] = torch.inf, torch.nan
    torch.save([({"id": "bad"}, broken), ({"id": "good"}, state(0))], folder / "a.pt")
    refused(
        folder,
        r"the weights of 1 of 2 networks are not finite in float32: 'bad' \(.*a\.pt, entry 0\) in layer 'weight' "
        r"\(2 values in all\); remove these networks: nothing is put in their place",
    )
    large["bias"][0] = 1e39
    torch.save([({}, large)], folder / "a.pt")
    refused(folder, r"'a/0' \(.*entry 0\) in layer 'bias' \(1 values in all\)")


# the cache


def test_a_second_opening_reads_no_network(folder, monkeypatch):
    torch.save([({"accuracy": 0.5}, state(i)) for i in range(3)], folder / "a.pt")
    first = opened(folder)

    def refuse(*_):
        raise AssertionError("a file was read")

    monkeypatch.setattr(zoo_building, "read_entries", refuse)
    again = opened(folder)
    assert again.crc.tolist() == first.crc.tolist() and again.table.equals(first.table)
    assert again.architectures == first.architectures
    os.utime(folder / "a.pt")
    with pytest.raises(AssertionError):
        opened(folder)
    monkeypatch.undo()
    torch.save([({"accuracy": 0.5}, state(i)) for i in range(2)], folder / "a.pt")
    assert len(opened(folder).table) == 2 and len(Zoo.open(first.folder).table) == 3


def test_a_build_that_was_killed_is_begun_again(folder, monkeypatch):
    for name in ("a", "b"):
        torch.save([({}, state(0))], folder / f"{name}.pt")

    def killed(root, name, table):
        if name == "b.pt":
            raise KeyboardInterrupt
        return read_entries(root, name, table)

    monkeypatch.setattr(zoo_building, "read_entries", killed)
    monkeypatch.setattr(zoo_building.shutil, "rmtree", lambda *_, **__: None)  # as after SIGKILL
    with pytest.raises(KeyboardInterrupt):
        opened(folder)
    (partial,) = (folder.parent.parent / "cache").glob("*.partial")
    assert (partial / "weights.bin").exists()
    monkeypatch.undo()
    assert len(opened(folder).table) == 2 and not partial.exists()


def test_files_that_change_while_they_are_read_are_noticed(folder, monkeypatch):
    torch.save([({}, state(0))], folder / "a.pt")

    def growing(*arguments):
        torch.save([({}, state(1))], folder / "b.pt")
        return read_entries(*arguments)

    monkeypatch.setattr(zoo_building, "read_entries", growing)
    refused(folder, "changed while they were read; begin again when they are complete")


@pytest.mark.parametrize("damage", ["shortened", "removed", "not json"])
def test_a_damaged_cache_is_noticed(folder, damage):
    torch.save([({}, state(0))], folder / "a.pt")
    zoo = opened(folder)
    if damage == "not json":
        (zoo.folder / "zoo.json").write_text("{")
    else:
        (zoo.folder / "weights.bin").write_bytes(b"1234") if damage == "shortened" else shutil.rmtree(zoo.folder)
        with pytest.raises(DataError, match="ends within network 0: delete|cannot be opened .*; open the data again"):
            zoo.read([0], 8)
    with pytest.raises(DataError, match=r"have \[4, 0\] bytes, expected \[32, 0\]: delete|is damaged .*: delete it to"):
        Zoo.open(zoo.folder)
