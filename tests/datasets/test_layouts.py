import csv
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from workbench.config import ConfigError
from workbench.datasets import layouts as layouts_module
from workbench.datasets.frames import DataError
from workbench.datasets.layout_files import scenes_by_name
from workbench.datasets.layouts import IGNORED, Layouts, LayoutsConfig, open_layouts
from workbench.datasets.loading import Dataset
from workbench.datasets.opening import Data
from workbench.datasets.plans import COLOURS, write_plans
from workbench.datasets.splits import SPLITS, hash_split, stable_hash

RGB = np.array([[255, 255, 255], [0, 0, 0], [200, 10, 10]], np.uint8)  # outside, wall, bed
PALETTE = "outside: [255, 255, 255]\nwall: [0, 0, 0]\nbed: [200, 10, 10]\n"
SCENES = [f"s{i:02d}" for i in range(20)]
SIZE = 16


def classes_of(scene: int, image: int) -> np.ndarray:
    """Classes of an image, which say where it comes from."""
    classes = np.zeros((SIZE, SIZE), np.uint8)
    classes[:2] = 2
    classes[2 + scene % 13, : 1 + image] = 1
    classes[3:, 1 + scene % 15] = 1
    return classes


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of 20 scenes with two images each, their palette and manifest."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "palette.yaml").write_text(PALETTE)
    rows = [("path", "scene", "type", "label")]
    for i, scene in enumerate(SCENES):
        for n, kind in enumerate(("scene", "bedroom")):
            rows.append((f"images/{scene}_{n}.png", scene, kind, f"{kind} {i % 2}"))
            Image.fromarray(RGB[classes_of(i, n)]).save(folder / rows[-1][0])
    write_manifest(folder, rows)
    return folder


def write_manifest(folder: Path, rows: list[tuple]) -> None:
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def manifest_rows(folder: Path) -> list[list[str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.reader(file))


def opened(folder: Path, **values) -> Layouts:
    return open_layouts(LayoutsConfig(**{"data": str(folder), "image_size": SIZE, "val_fraction": 0.25} | values))


def repaint(path: Path, **places) -> None:
    """Give some pixels, by (row, column), another colour."""
    with Image.open(path) as image:
        pixels = np.array(image)
    for colour, (rows, columns) in places.items():
        pixels[rows, columns] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    Image.fromarray(pixels).save(path)


# samples


def test_opened_layouts_keep_the_contract_of_data(source):
    data = opened(source)
    assert isinstance(data, Data) and isinstance(data.split("train"), Dataset)
    assert data.sizes == {"image_size": SIZE, "in_channels": 3, "n_classes": 3, "n_types": 2}
    assert data.error_name == "mse" and data.group_name == "scenes" and data.main_column == "type"
    assert data.condition_names == [] and data.condition_fingerprint == ""
    report = data.report
    assert report["images"] == 40 and report["scenes"] == 20 and report["unknown_pixels"] == 0
    assert sum(report[f"{name}_scenes"] for name in SPLITS) == 20
    assert sum(report[f"{name}_samples"] for name in SPLITS) == 40 and len(data.broken) == 0


def test_a_sample_is_the_one_asked_for(source):
    train = opened(source).split("train")
    for index in (0, 3, len(train) - 1, -1):
        sample, name = train[index], train.name(index % len(train))
        scene, n = int(name[8:10]), int(name[11])
        classes = classes_of(scene, n)
        assert sample["classes"].dtype == torch.int64 and sample["classes"].tolist() == classes.tolist()
        pixels = torch.from_numpy(RGB[classes]).permute(2, 0, 1)
        assert torch.equal(sample["x"], pixels.float().div(127.5).sub(1))
        assert sample["type"] == ("bedroom", "scene").index("scene" if n == 0 else "bedroom")
        assert sample["group"] == stable_hash([SCENES[scene]])[0] and sample["id"] == stable_hash([name])[0]
    for index in (len(train), -len(train) - 1):
        with pytest.raises(IndexError, match=f"^sample {index} of {len(train)}$"):
            train[index]


def test_a_batch_travels_as_bytes_in_the_order_asked_for(source):
    train = opened(source).split("train")
    batch = train.batch([5, 0, 5])
    assert batch["x"].dtype == batch["classes"].dtype == torch.uint8
    assert batch["x"].shape == (3, SIZE, SIZE, 3) and batch["classes"].shape == (3, SIZE, SIZE)
    for row, index in enumerate([5, 0, 5]):
        assert all(torch.equal(train.prepare(batch)[key][row], value) for key, value in train[index].items())


def test_the_split_is_by_hash_of_the_scene_and_parts_none(source):
    data = opened(source, test_fraction=0.25)
    split = hash_split(stable_hash(SCENES), 0, 0.25, 0.25)
    table = data.table()
    assert list(table) == ["path", "scene", "type", "label", "group", "split"]
    assert dict(zip(table["scene"], table["split"], strict=True)) == {
        scene: SPLITS[side] for scene, side in zip(SCENES, split, strict=True)
    }
    assert (table.groupby("scene")["split"].nunique() == 1).all()
    for name in SPLITS:
        assert data.split(name).column("scene").tolist() == table["scene"][table["split"] == name].tolist()


def test_a_split_of_the_manifest_is_used_instead(source):
    rows = manifest_rows(source)
    side = {scene: SPLITS[min(i // 10, 2)] for i, scene in enumerate(SCENES)}
    side[SCENES[0]] = "test"
    write_manifest(source, [[*rows[0], "split"], *([*row, side[row[1]]] for row in rows[1:])])
    data = opened(source)
    table = data.table()
    assert table["split"].tolist() == [side[scene] for scene in table["scene"]]
    assert data.report["test_scenes"] == 1 and "split" not in data.split("val").table()


def test_labels_stand_for_types_where_asked(source):
    data = opened(source, classify_by="label")
    assert data.sizes["n_types"] == 4 and data.main_column == "label"
    train = data.split("train")
    names = [data.type_names[i] for i in train.batch(np.arange(len(train)))["type"].tolist()]
    assert names == train.column("label").tolist()


def test_without_a_manifest_the_name_tells_the_scene(source):
    (source / "manifest.csv").unlink()
    data = opened(source)
    assert data.sizes["n_types"] == 0 and data.main_column == "scene" and "type" not in data.split("train")[0]
    assert data.report["scenes"] == 20
    assert set(data.table()["scene"]) == {f"{i:02d}" for i in range(20)}


@pytest.mark.parametrize(
    ("names", "scenes"),
    [
        (["flat_12.png", "flat_12_kitchen.png", "kitchen-13.png"], ["12", "12", "13"]),
        (["images/7.png", "images/7_2.png", "images/x.png"], ["7", "7", "images/x.png"]),
        (["a/1.png", "a/2.png", "b/1.png", "3.png"], ["a", "a", "b", "."]),
        (["a/all.png", "a/rooms/1.png", "b/rooms/1.png"], ["a", "a", "b"]),
    ],
)
def test_scenes_by_name(names, scenes):
    assert scenes_by_name(names) == scenes


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("plan-2024-{}.png", "101 images of only 1 scenes, told by the first number in the name (2024): must be at"),
        ("{side}/{}.png", "101 images of only 2 scenes, told by the folder (train, val): must be at most 50 images to"),
    ],
)
def test_names_that_hardly_tell_scenes_are_refused(pattern, told):
    names = [pattern.format(i, side=("train", "val")[i % 2]) for i in range(101)]
    with pytest.raises(DataError, match=re.escape(told)):
        scenes_by_name(names)


def test_larger_images_are_sampled_at_the_middle_of_each_square(source):
    fine = np.random.default_rng(0).integers(0, 3, (20, 2, 3 * SIZE, 3 * SIZE))
    for i, scene in enumerate(SCENES):
        for n in range(2):
            Image.fromarray(RGB[fine[i, n]]).save(source / f"images/{scene}_{n}.png")
    data = opened(source)
    assert data.report["side_in_files"] == 3 * SIZE
    found = data.read(np.arange(40))[..., 3]
    assert np.array_equal(found, fine.reshape(40, 3 * SIZE, 3 * SIZE)[:, 1::3, 1::3])


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_other_ways_to_store_the_same_pixels_are_read_alike(source, mode):
    if mode != "P":
        (source / "palette.yaml").write_text("outside: [255, 255, 255]\nwall: [0, 0, 0]\n")
    fingerprints = []
    for last in ("RGB", mode):
        for path in (source / "images").iterdir():
            with Image.open(path) as image:
                image.convert(mode, dither=0, palette=Image.Palette.ADAPTIVE).convert(last).save(path)
        fingerprints.append(opened(source, max_unknown_fraction=1.0).fingerprint)
    with Image.open(path) as image:
        assert image.mode == mode
    assert fingerprints[0] == fingerprints[1]


def test_subset_and_columns(source):
    train = opened(source).split("train")
    some = train.subset(5, seed=1)
    assert len(some) == 5 and set(some.column("path")) < set(train.column("path")) and train.subset(0) is train
    assert [some.name(i) for i in range(5)] == sorted(some.name(i) for i in range(5))
    with pytest.raises(DataError, match="column 'area': the data has path, scene, type, label; choose one"):
        train.column("area")


def test_frequencies_are_of_the_training_split(source):
    data = opened(source)
    train = data.split("train")
    classes = train.batch(np.arange(len(train)))["classes"]
    by_hand = torch.bincount(classes.flatten().long(), minlength=3) / classes.numel()
    frequency = data.statistics()["class_frequency"]
    assert frequency.dtype == torch.float32 and torch.allclose(frequency, by_hand, rtol=1e-6)


# memory, cache, fingerprint


def test_images_too_many_for_memory_are_decoded_whenever_they_are_asked_for(source, monkeypatch):
    kept = opened(source)
    monkeypatch.setattr(layouts_module, "MEMORY_BYTES", 0)
    lazy = opened(source)
    assert kept.report["in_memory"] and not lazy.report["in_memory"]
    images = np.array([3, 3, 17, 0])
    for _ in range(2):
        assert np.array_equal(kept.read(images), lazy.read(images))


def test_a_second_opening_decodes_nothing(source, monkeypatch):
    first = opened(source)

    def refuse(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("workbench.datasets.layout_files.Reader.read", refuse)
    again = opened(source)
    assert again.fingerprint == first.fingerprint and again.report == first.report
    assert torch.equal(again.statistics()["class_frequency"], first.statistics()["class_frequency"])
    with pytest.raises(AssertionError):
        opened(source, colour_tolerance=3.0)
    (source / "palette.yaml").write_text(PALETTE.replace("[0, 0, 0]", "[1, 0, 0]"))
    with pytest.raises(AssertionError):
        opened(source)
    (source / "palette.yaml").write_text(PALETTE)
    os.utime(source / "images/s00_0.png")
    with pytest.raises(AssertionError):
        opened(source)


def test_the_key_of_pixels_is_the_palette(source):
    data = open_layouts(LayoutsConfig(data=str(source), image_size=SIZE))
    batch = data.split("train").prepare(data.split("train").batch(np.array([0])))
    key = data.key(batch)
    assert key["kind"] == "classes" and [name for name, _ in key["entries"]] == ["outside", "wall", "bed"]
    drawn = {"#" + colour.tobytes().hex() for colour in np.unique(data.pixels(batch["x"][0]).reshape(-1, 3), axis=0)}
    assert drawn <= {colour for _, colour in key["entries"]} and len(drawn) == 3


def test_the_fingerprint_is_of_pixels_palette_split_and_types(source):
    found = [opened(source).fingerprint, opened(source, split_seed=1).fingerprint]
    found.append(opened(source, classify_by="label").fingerprint)
    repaint(source / "images/s00_0.png", **{"#000000": (0, 0)})
    found.append(opened(source).fingerprint)
    (source / "palette.yaml").write_text(PALETTE.replace("bed", "sofa"))
    found.append(opened(source).fingerprint)
    (source / "palette.yaml").write_text(PALETTE.replace("[0, 0, 0]", "[1, 0, 0]").replace("bed", "sofa"))
    found.append(opened(source).fingerprint)
    assert len(set(found)) == 6 and found[-1] == opened(source).fingerprint


@pytest.mark.parametrize("change", ["repainted", "removed"])
def test_an_image_that_changes_after_opening_is_noticed(source, change):
    data = opened(source)
    if change == "removed":
        (source / "images/s03_1.png").unlink()
    else:
        repaint(source / "images/s03_1.png", **{"#000000": (0, 0)})
    with pytest.raises(DataError, match=r"image 'images/s03_1\.png' has changed since the data was opened"):
        data.read(np.arange(40))


# unknown colours


def test_unknown_colours_are_listed_and_their_pixels_have_no_class(source):
    repaint(source / "images/s00_0.png", **{"#00ff00": (slice(4, 6), slice(0, 3)), "#0000ff": (9, 9)})
    repaint(source / "images/s05_1.png", **{"#00ff00": (7, 7), "#c80a14": (8, 8)})
    data = opened(source, max_unknown_fraction=8 / (40 * SIZE**2))
    broken = data.broken.sort_values(["image", "colour"]).to_numpy().tolist()
    assert broken == [
        ["images/s00_0.png", "#0000ff", 1],
        ["images/s00_0.png", "#00ff00", 6],
        ["images/s05_1.png", "#00ff00", 1],
    ]
    assert data.report["unknown_pixels"] == 8 and data.report["images_with_unknown_pixels"] == 2
    whole = layouts_module.LayoutDataset(data, np.arange(40))
    classes = whole.prepare(whole.batch(np.arange(40)))["classes"]
    assert (classes == IGNORED).sum() == 8 and (classes[0, 4:6, :3] == IGNORED).all()
    assert classes[11, 8, 8] == 2, "a colour within the tolerance has its class"
    assert torch.isclose(data.statistics()["class_frequency"].sum(), torch.tensor(1.0))


def test_too_many_unknown_pixels_are_refused_with_the_most_frequent_colours(source):
    repaint(source / "images/s00_0.png", **{"#00ff00": (slice(4, 6), slice(0, 3)), "#0000ff": (9, 9)})
    limit = 6.9 / (40 * SIZE**2)
    message = (
        rf"^7 of 10240 pixels have a colour farther than colour_tolerance=16\.0 .*max_unknown_fraction={limit:.4}.*; "
        r"most often #00ff00 in 6 pixels \(255\.0 from 'wall'\); #0000ff in 1 pixels .*\. All found so far are in "
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message) as error:
            opened(source, max_unknown_fraction=limit)
        listed = str(error.value).split("found so far are in ")[1].split(": add")[0]
        assert pd.read_csv(listed)["pixels"].sum() == 7
    assert opened(source, max_unknown_fraction=7 / (40 * SIZE**2)).report["unknown_pixels"] == 7
    with pytest.raises(DataError, match="^7 of 10240 pixels"):  # also when the counts are kept
        opened(source, max_unknown_fraction=limit)


# images that cannot be used


def save_alpha(path):
    Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255)).save(path)


def save_transparent(path):
    Image.new("P", (SIZE, SIZE)).save(path, transparency=0)


def save_16_bit(path):
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(path)


def save_oblong(path):
    Image.new("RGB", (SIZE, 2 * SIZE)).save(path)


def save_odd(path):
    Image.new("RGB", (24, 24)).save(path)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_alpha, "has an alpha channel; flatten it"),
        (save_transparent, "has an alpha channel; flatten it"),
        (save_16_bit, "has more than 8 bits per channel; export"),
        (save_oblong, "is 16x32 px: must be square, its side image_size=16 or a multiple of that; export"),
        (save_odd, "is 24x24 px: must be square, its side image_size=16 or a multiple"),
        (lambda path: path.write_bytes(b""), r"does not decode \(.*export it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), r"does not decode \("),
        (lambda path: Image.new("RGB", (SIZE, SIZE)).save(path, "JPEG"), r"does not decode \("),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(source, save, message):
    save(source / "images/s07_1.png")
    with pytest.raises(DataError, match=rf"^1 of 40 images cannot be used: images/s07_1\.png {message}"):
        opened(source)


def test_unusable_images_are_counted_and_listed(source):
    for i in range(5):
        save_alpha(source / f"images/s{i:02d}_0.png")
    with pytest.raises(DataError, match=r"^5 of 40 .*s00_0.*; .*s01_0.*; .*s02_0[^;]*; flatten .* listed in ") as error:
        opened(source)
    listed = pd.read_csv(str(error.value).split("listed in ")[1])
    assert listed["image"].tolist() == [f"images/s{i:02d}_0.png" for i in range(5)]
    assert set(listed["reason"]) == {"has an alpha channel; flatten it on the background"}


def test_mixed_sizes_are_refused(source):
    Image.fromarray(RGB[np.ones((32, 32), int)]).save(source / "images/s00_1.png")
    found = r"39 of 16x16 px, such as images/s00_0\.png; 1 of 32x32 px, such as images/s00_1\.png: must be one"
    with pytest.raises(DataError, match=f"mixes sizes: {found}"):
        opened(source)


def test_an_absent_or_empty_folder_is_refused(tmp_path, source):
    with pytest.raises(DataError, match=r"data='.*absent': no such folder"):
        opened(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "a.jpg")
    with pytest.raises(DataError, match="holds no PNG image, and 1 others; export"):
        opened(tmp_path / "empty")
    (source / "palette.yaml").unlink()
    with pytest.raises(DataError, match=r"palette\.yaml: cannot be read .*or set palette"):
        opened(source)


def test_a_name_that_is_not_utf8_is_refused(source):
    (source / "images" / os.fsdecode(b"s\xff.png")).write_bytes(b"")
    with pytest.raises(DataError, match="the name 'images/s.*png' is not UTF-8; rename it"):
        opened(source)


def test_images_that_are_no_png_are_counted_and_hidden_ones_are_not(source):
    Image.new("RGB", (8, 8)).save(source / "preview.jpg")
    (source / ".thumbs").mkdir()
    for hidden in ("images/._s00_0.png", ".thumbs/s00.png"):
        (source / hidden).write_bytes(b"")
    data = opened(source)
    assert data.report["images_not_png"] == 1 and data.report["images"] == 40


# manifests


def row_of(rows: list[list[str]], path: str) -> list[str]:
    return next(row for row in rows if row[0] == path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda rows: [*rows, ["images/a.png", "a", "scene", "x"], ["b.png", "a", "scene", "x"]],
            r"manifest\.csv names 2 images that are absent, such as images/a\.png, b\.png: add the files or remove",
        ),
        (
            lambda rows: rows[:-3],
            r"has no row for 3 of 40 images, such as images/s18_1\.png, images/s19_0\.png, .*: add rows or move",
        ),
        (lambda rows: [*rows, rows[1]], r"image 'images/s00_0\.png' has two rows; keep one"),
        (lambda rows: [row[:1] for row in rows], "has columns path; needs 'path' and 'scene'"),
        (lambda rows: [["path;scene"], *rows[1:]], "is not a table of comma-separated values"),
        (lambda rows: [*rows[:1], [rows[1][0], "", "scene", "x"], *rows[2:]], "scene of image 'images/s00_0.*is empty"),
        (lambda rows: [*rows[:1], [*rows[1][:2], "", "x"], *rows[2:]], "type of image .* is empty; fill it in, or rem"),
        (lambda rows: [*rows[:1], rows[1][:2], *rows[2:]], "type of image 'images/s00_0.png' is empty; fill it in"),
        (lambda rows: [*rows, ["", "a", "b", "c"]], "path of row 42 is empty; fill it in"),
        (lambda rows: [[*row, "group" if i == 0 else "1"] for i, row in enumerate(rows)], "column 'group' is the name"),
        (
            lambda rows: [[*row, "split" if i == 0 else "validation"] for i, row in enumerate(rows)],
            r"split of image 'images/s00_0\.png' is 'validation': must be one of train, val, test; correct it",
        ),
        (
            lambda rows: [[*row, "split" if i == 0 else ("val", "train")[i % 2]] for i, row in enumerate(rows)],
            r"scene 's00' is in train and val, and 19 more: must be in one split; correct 'split'",
        ),
        (
            lambda rows: [[*row, "split" if i == 0 else "test"] for i, row in enumerate(rows)],
            r"the train split has none of the 40 images of 20 scenes: lower .*, or the manifest's 'split'",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(source, edit, message):
    write_manifest(source, edit(manifest_rows(source)))
    with pytest.raises(DataError, match=message):
        opened(source)


def test_a_manifest_may_lie_elsewhere_in_another_order_and_hold_more(source, tmp_path):
    rows = manifest_rows(source)
    expected = opened(source)
    (source / "manifest.csv").unlink()
    write_manifest(tmp_path, [[*rows[0], "area"], *([*row, "12.5"] for row in rows[:0:-1])])
    data = opened(source, manifest=str(tmp_path / "manifest.csv"))
    assert data.fingerprint == expected.fingerprint and (data.table()["area"] == "12.5").all()
    with pytest.raises(DataError, match=r"manifest .*absent\.csv: cannot be read"):
        opened(source, manifest=str(tmp_path / "absent.csv"))


def test_a_label_that_is_not_there_cannot_be_asked_for(source):
    write_manifest(source, [row[:3] for row in manifest_rows(source)])
    with pytest.raises(DataError, match="classify_by='label': .*has no column 'label'; add it"):
        opened(source, classify_by="label")


# the training split


def test_a_class_that_the_training_split_lacks_is_refused(source):
    (source / "palette.yaml").write_text(PALETTE + "window: [0, 0, 200]\nstairs: [0, 200, 0]\n")
    repaint(source / "images/s00_0.png", **{"#0000c8": (0, 0)})
    message = r"class '{}' has no pixel in the training split{}: every class must occur there; change split_seed, lower"
    rows = manifest_rows(source)
    for side, found in (("val", message.format("window", ", and 1 more")), ("train", message.format("stairs", ""))):
        write_manifest(
            source,
            [[*rows[0], "split"], *([*row, side if row[1] == "s00" else "train"] for row in rows[1:])],
        )
        with pytest.raises(DataError, match=found):
            opened(source)


def test_a_type_that_the_training_split_lacks_is_refused(source):
    rows = [[*row, "train"] for row in manifest_rows(source)]
    rows[0][-1], rows[1][2], rows[1][-1], rows[2][-1] = "split", "hall", "val", "val"
    write_manifest(source, rows)
    with pytest.raises(DataError, match="^type 'hall' has no image in the training split: every type must occur there"):
        opened(source)


def test_an_empty_split_is_refused_when_it_is_asked_for(source):
    data = opened(source, test_fraction=0.0)
    with pytest.raises(DataError, match="the test split has none of the 40 images of 20 scenes: raise test_fraction"):
        data.split("test")
    with pytest.raises(DataError, match="split 'all': must be one of train, val, test"):
        data.split("all")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 31}, "image_size=31: must be at least 32 for data='plans'"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"val_fraction \+ test_fraction = 1.0: must be less than 1"),
        ({"classify_by": "kind"}, "classify_by='kind': must be 'type' or 'label'"),
        ({"colour_tolerance": -1.0}, "colour_tolerance=-1.0: must be at least 0"),
        ({"palete": "x"}, "unknown parameter 'palete': did you mean 'palette'"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LayoutsConfig(**values)


# figures


def test_samples_are_drawn_as_figures_and_as_pixels(source):
    data = opened(source)
    train = data.split("train")
    x = train.prepare(train.batch(np.arange(3)))["x"]
    for figure in (data.grid({"a": x}), data.pairs(x, 1.1 * x), data.compare(x, {"b": x}), data.examples(4)):
        figure.draw_without_rendering()
    assert np.array_equal(data.pixels(x[1]), train.batch([1])["x"][0].numpy())
    assert [label.get_text() for label in data.examples(2).axes[0].get_xticklabels()] == ["scene", "bedroom"]


def test_errors_are_those_of_images(source):
    data = opened(source)
    x = data.split("train")[0]["x"][None]
    assert data.error(x, x).item() == 0 and set(data.errors(x, x)) == {"mse", "psnr", "ssim"}
    assert data.errors(-x, x)["mse"].item() == data.error(-x, x).item() == pytest.approx((4 * x**2).mean().item())


# the embedded set


def test_plans_are_opened_and_each_class_is_learnt_from(tmp_path):
    data = opened(write_plans(tmp_path / "plans", scenes=10, size=32), image_size=32)
    assert data.palette.names == tuple(COLOURS) and data.sizes["n_types"] == 6
    assert (data.statistics()["class_frequency"] > 0).all() and data.report["unknown_pixels"] == 0
    assert data.report["images"] == 50 and (data.table().groupby("scene")["split"].nunique() == 1).all()


@pytest.mark.slow
def test_plans_are_the_default(tmp_path):
    data = open_layouts(LayoutsConfig())
    assert data.report["images"] == 1200 and data.report["scenes"] == 240 and data.sizes["image_size"] == 64
    assert len(data.split("val")) > 60 and len(data.split("test")) > 60
    assert (data.statistics()["class_frequency"] > 0.005).all()
    assert open_layouts(LayoutsConfig()).fingerprint == data.fingerprint
    assert open_layouts(LayoutsConfig(classify_by="label")).sizes["n_types"] == 13
