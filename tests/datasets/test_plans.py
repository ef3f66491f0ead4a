import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, label

from workbench.datasets.flats import DAYLIGHT, INNER, KINDS, OUTER, PROGRAMMES, draw_flat
from workbench.datasets.furniture import TURNING, Rect, before
from workbench.datasets.palettes import read_palette
from workbench.datasets.plans import COLOURS, FLOORS, ROOMS, draw_plan, draw_room, draw_scene, write_plans

CLASS = {name: i for i, name in enumerate(COLOURS)}
TINY = {"scenes": 2, "size": 32}


@pytest.fixture(scope="module")
def flats():
    """Flats of every number of rooms."""
    return [draw_scene(index, seed) for seed in (0, 1) for index in range(10)]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A written set, for statements about its files."""
    return write_plans(tmp_path_factory.mktemp("data") / "plans", scenes=10, size=48)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def centimetres(flat) -> np.ndarray:
    """Classes of a flat, one pixel to 3 cm or less."""
    return draw_plan(flat, max(flat.outline.width, flat.outline.height) // 3)


# flats


def test_rooms_are_those_of_the_programme_and_of_sensible_size(flats):
    assert {len(flat.rooms) for flat in flats} == set(PROGRAMMES)
    for flat in flats:
        assert tuple(room.kind for room in flat.rooms) == PROGRAMMES[len(flat.rooms)]
        for room in flat.rooms:
            kind, (short, long) = KINDS[room.kind], sorted((room.floor.width, room.floor.height))
            assert kind.area[0] <= short * long / 1e4 <= kind.area[1]
            assert short >= kind.width and long <= kind.slender * short


def test_floors_and_walls_fill_the_flat_without_overlap(flats):
    for flat in flats:
        left, top, right, bottom = flat.outline
        count = np.zeros((bottom - top, right - left), int)
        for room in flat.rooms:
            count[room.floor.top - top : room.floor.bottom - top, room.floor.left - left : room.floor.right - left] += 1
        for wall in flat.walls:
            part = count[wall.top - top : wall.bottom - top, wall.left - left : wall.right - left]
            assert (part != 1).all() and min(wall.width, wall.height) in (INNER, OUTER)
            part[:] = 2
        assert (count > 0).all() and count.max() == 2


def test_doors_lead_from_the_first_room_to_each_other_and_never_through_bedroom_or_bathroom(flats):
    for flat in flats:
        doors = [[piece.rect for piece in room.openings if piece.name == "door"] for room in flat.rooms]
        entrance = doors[0][0]
        assert sum(entrance in own for own in doors) == 1
        for i, own in enumerate(doors[1:], start=1):
            kind = flat.rooms[i].kind
            assert any(door in doors[0] for door in own) or kind == "kitchen"
            assert len(own) == 1 or kind == "living room"
            assert all(sum(door in other for other in doors) == 2 for door in own)


def test_windows_give_daylight_and_none_is_on_the_side_of_the_entrance(flats):
    for flat in flats:
        entrance = flat.rooms[0].openings[0].rect
        left, top, right, bottom = flat.outline
        front = [a == b for a, b in zip(entrance, flat.outline, strict=True)]
        assert sum(front) == 1
        for room in flat.rooms:
            windows = [piece.rect for piece in room.openings if piece.name == "window"]
            assert windows or room.kind not in DAYLIGHT
            for window in windows:
                sides = [a == b for a, b in zip(window, flat.outline, strict=True)]
                assert sum(sides) == 1 and sides != front


def test_furniture_stands_in_its_room_apart_and_out_of_the_way_of_doors(flats):
    for room in (room for flat in flats for room in flat.rooms):
        turnings = [before(room.floor, piece.rect, TURNING) for piece in room.openings if piece.name == "door"]
        rects = [piece.rect for piece in room.furniture]
        for i, rect in enumerate(rects):
            assert rect.width > 0 and rect.height > 0
            assert rect.left >= room.floor.left and rect.right <= room.floor.right
            assert rect.top >= room.floor.top and rect.bottom <= room.floor.bottom
            assert not any(rect.meets(turning) for turning in turnings)
            assert not any(rect.meets(other) for other in rects[:i])


def test_wardrobes_can_be_opened_and_stand_before_no_window(flats):
    seen = 0
    for room in (room for flat in flats for room in flat.rooms if room.kind == "bedroom"):
        for piece in (piece for piece in room.furniture if piece.name == "cabinet"):
            left, top, right, bottom = piece.rect
            flat_side = piece.rect.width > piece.rect.height
            first = top == room.floor.top if flat_side else left == room.floor.left
            front = Rect(left, bottom, right, bottom + 60) if first else Rect(left, top - 60, right, top)
            if not flat_side:
                front = Rect(right, top, right + 60, bottom) if first else Rect(left - 60, top, left, bottom)
            assert not any(front.meets(other.rect) for other in room.furniture)
            windows = [other.rect for other in room.openings if other.name == "window"]
            assert not any(piece.rect.meets(before(room.floor, window, 10)) for window in windows)
            seen += 1
    assert seen >= 20


def test_living_rooms_lie_in_every_quarter():
    quarters = set()
    for seed in range(10):
        flat = draw_flat(6, np.random.default_rng(seed))
        left, top, right, bottom = (a - b for a, b in zip(flat.rooms[1].floor, flat.outline, strict=True))
        quarters.add((left + right > 0, top + bottom > 0))
    assert len(quarters) == 4


def test_rooms_hold_what_they_are_for(flats):
    needed = {
        "living room": {"seat"},
        "bedroom": {"bed", "cabinet"},
        "kitchen": {"cabinet"},
        "bathroom": {"sanitary"},
        "hall": set(),
    }
    for room in (room for flat in flats for room in flat.rooms):
        held = [piece.name for piece in room.furniture]
        assert needed[room.kind] <= set(held)
        assert room.kind != "bathroom" or held.count("sanitary") == 3
        assert ("bed" in held) == (room.kind == "bedroom")


def test_every_room_is_reached_from_the_entrance_on_free_floor_half_a_metre_wide(flats):
    for flat in flats:
        classes = centimetres(flat)
        side = max(flat.outline.width, flat.outline.height)
        scale = classes.shape[0] / (side + 2 * (side // 30))
        free = np.isin(classes, [CLASS[name] for name in {"door", *FLOORS.values()}])
        parts, _ = label(binary_erosion(free, np.ones([round(50 * scale)] * 2)))
        reached = []
        for piece in (piece for room in flat.rooms for piece in room.openings if piece.name == "door"):
            x, y = (piece.rect.left + piece.rect.right) / 2, (piece.rect.top + piece.rect.bottom) / 2
            middle = (flat.outline.left + flat.outline.right) / 2, (flat.outline.top + flat.outline.bottom) / 2
            column, row = ((at - m) * scale + len(classes) / 2 for at, m in zip((x, y), middle, strict=True))
            near = parts[max(int(row) - 15, 0) : int(row) + 16, max(int(column) - 15, 0) : int(column) + 16]
            reached.append(set(np.unique(near).tolist()) - {0})
        assert set.intersection(*reached)


@pytest.mark.parametrize("size", [32, 64, 200])
def test_every_room_is_reached_through_doors_at_every_size(flats, size):
    for flat in flats:
        classes = draw_plan(flat, size)
        inside, n_parts = label(~np.isin(classes, [CLASS[name] for name in ("outside", "wall", "window")]))
        assert n_parts == 1, "a room is cut off"
        shut, n_rooms = label(~np.isin(classes, [CLASS[name] for name in ("outside", "wall", "window", "door")]))
        assert n_rooms == len(flat.rooms), "rooms are joined where no door is"


@pytest.mark.parametrize("size", [32, 47, 64, 128])
def test_the_outside_is_a_rectangular_frame_at_every_size(flats, size):
    shown = [draw_plan(flat, size) for flat in flats]
    shown += [draw_room(room, size) for flat in flats[:10] for room in flat.rooms]
    for classes in shown:
        rows, columns = np.nonzero(classes != CLASS["outside"])
        drawn = classes[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (drawn != CLASS["outside"]).all()
        border = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
        assert np.isin(border, [CLASS[name] for name in ("wall", "door", "window")]).all()
        assert max(drawn.shape) >= 0.9 * size


def test_sizes_show_the_same_plan(flats):
    for flat in flats[:10]:
        small, large = draw_plan(flat, 64), draw_plan(flat, 320)
        assert (np.kron(small, np.ones((5, 5), int)) == large).mean() > 0.9
        shares = [np.bincount(classes.ravel(), minlength=12) / classes.size for classes in (small, large)]
        assert np.abs(shares[0] - shares[1]).max() < 0.03


# files


def test_the_same_seed_gives_identical_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = (
        read_bytes(write_plans(tmp_path / name, **TINY, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert [name for name in first if first[name] == other.get(name)] == ["palette.yaml"]


def test_a_flat_depends_on_its_number_and_the_seed_alone(tmp_path, plans):
    few = read_bytes(write_plans(tmp_path / "few", scenes=2, size=48))
    many = read_bytes(plans)
    images = [name for name in few if name.startswith("images")]
    assert len(images) > 7 and all(few[name] == many[name] for name in images)


def test_there_are_five_images_to_a_scene(plans):
    rows = read_rows(plans)
    assert len(ROOMS) == 10 and sum(ROOMS) == 40
    assert len(rows) == 50 and sum(row["type"] == "scene" for row in rows) == 10
    for scene in {row["scene"] for row in rows}:
        own = [row for row in rows if row["scene"] == scene]
        assert own[0]["label"] == f"scene of {len(own) - 1} rooms"
        assert [row["path"] for row in own] == [
            f"images/{scene}.png",
            *(f"images/{scene}_room_{i}.png" for i in range(1, len(own))),
        ]


def test_layout_of_the_folder(plans):
    rows = read_rows(plans)
    assert read_bytes(plans).keys() == {row["path"] for row in rows} | {"manifest.csv", "palette.yaml", "plans.json"}
    manifest = json.loads((plans / "plans.json").read_text())
    assert manifest == {"generator": "plans", "version": 1, "scenes": 10, "size": 48, "seed": 0}
    assert list(rows[0]) == ["path", "scene", "type", "label", "width", "height"]
    assert {row["type"] for row in rows} == {"scene", *KINDS}


def test_every_pixel_has_a_colour_of_the_palette_and_every_class_occurs(plans):
    palette = read_palette(plans / "palette.yaml")
    assert palette.names == tuple(COLOURS) and palette.colours.tolist() == [list(c) for c in COLOURS.values()]
    seen = set()
    for row in read_rows(plans):
        with Image.open(plans / row["path"]) as image:
            assert image.mode == "RGB" and image.size == (48, 48)
            classes, unknown = palette.classify(np.asarray(image), 0)
        assert unknown == {}
        seen |= set(np.unique(classes).tolist())
    assert seen == set(range(12))


def test_the_manifest_tells_what_the_images_show(plans):
    palette = read_palette(plans / "palette.yaml")
    for row in read_rows(plans):
        with Image.open(plans / row["path"]) as image:
            shown = {palette.names[i] for i in np.unique(palette.classify(np.asarray(image), 0)[0])}
        if row["type"] == "scene":
            assert set(FLOORS.values()) - {"wooden floor"} <= shown
        else:
            assert shown & set(FLOORS.values()) == {FLOORS[row["type"]]}
            assert float(row["width"]) * float(row["height"]) <= KINDS[row["type"]].area[1]


def test_colours_are_told_apart_by_every_kind_of_eye():
    """CIELAB distances, colours as seen without one kind of cones (matrices of Machado et al. 2009, severity 1)."""
    eyes = [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    srgb = np.array(list(COLOURS.values())) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for eye in eyes:
        xyz = np.clip(linear @ np.transpose(eye), 0, 1) @ to_xyz.T / [0.95047, 1, 1.08883]
        f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        distance = np.linalg.norm(lab[:, None] - lab, axis=2)
        assert distance[~np.eye(12, dtype=bool)].min() > 24


def test_progress_counts_the_scenes(tmp_path):
    calls = []
    write_plans(tmp_path / "plans", **TINY, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_an_existing_set_is_kept_and_other_settings_are_refused(tmp_path):
    folder = write_plans(tmp_path / "plans", **TINY)
    (folder / "manifest.csv").write_text("edited")
    before = read_bytes(folder)
    assert write_plans(folder, **TINY) == folder and read_bytes(folder) == before
    with pytest.raises(FileExistsError, match="is a plans set with size=32, asked for size=64: choose another"):
        write_plans(folder, scenes=2)


def test_a_killed_run_leaves_no_set_and_the_next_run_completes_it(tmp_path):
    def kill(done: int, total: int) -> None:
        raise KeyboardInterrupt

    folder, partial = tmp_path / "plans", tmp_path / "plans.partial"
    with pytest.raises(KeyboardInterrupt):
        write_plans(folder, **TINY, progress=kill)
    assert partial.is_dir() and not folder.exists()
    write_plans(folder, **TINY)
    assert not partial.exists() and read_bytes(folder) == read_bytes(write_plans(tmp_path / "fresh", **TINY))


def test_a_foreign_partial_folder_is_refused(tmp_path):
    partial = tmp_path / "plans.partial" / "images"
    partial.mkdir(parents=True)
    (partial / "flat_0000.png").write_text("")
    (partial / "photo.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"images/photo\.png.*move it away"):
        write_plans(tmp_path / "plans", **TINY)
    assert (partial / "photo.png").read_text() == "mine"


@pytest.mark.parametrize("name, value, minimum", [("scenes", 0, 1), ("size", 31, 32), ("seed", -1, 0)])
def test_bad_arguments_are_refused(tmp_path, name, value, minimum):
    with pytest.raises(ValueError, match=f"^{name}={value}: must be at least {minimum}$"):
        write_plans(tmp_path / "plans", **{**TINY, name: value})
    assert not list(tmp_path.iterdir())
