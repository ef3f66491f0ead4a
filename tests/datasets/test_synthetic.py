import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.datasets.synthetic import ACTIONS, GROWTH, KNOB, REACH, SHAPES, write_pushing

SMALL = {"clips": 16, "frames": 4, "size": 32}
TINY = {"clips": 3, "frames": 2, "size": 16}


@pytest.fixture(scope="module")
def pushing(tmp_path_factory):
    """Every action twice, large enough to measure in the pictures."""
    return write_pushing(tmp_path_factory.mktemp("pictures") / "pushing", clips=16, frames=4, size=64)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Many clips in thumbnails, for statements about the tables."""
    return write_pushing(tmp_path_factory.mktemp("tables") / "pushing", clips=171, frames=5, size=16)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def by_clip(folder: Path) -> list[tuple[dict, list[dict]]]:
    """(row of actions.csv, its rows of conditions.csv) of each clip."""
    conditions = read_table(folder / "conditions.csv")
    actions = read_table(folder / "actions.csv")
    return [(action, [row for row in conditions if row["clip"] == action["clip"]]) for action in actions]


def picture(folder: Path, row: dict) -> np.ndarray:
    """Picture (h, w, 3) of a row of conditions.csv, 0 to 1, with its gain of light taken out."""
    with Image.open(folder / row["clip"] / f"img_{int(row['frame']):05d}.jpg") as image:
        return np.asarray(image) / 255 / row["light"]


def colour_at(pixels: np.ndarray, x: float, y: float) -> np.ndarray:
    """Mean of the 3 x 3 pixels around a position, as JPEG disturbs single ones."""
    i, j = int(y * len(pixels)), int(x * len(pixels))
    return pixels[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(axis=(0, 1))


def shape_of(row: dict) -> str:
    (name,) = (name for name in SHAPES if row[f"shape_{name}"] == 1)
    return name


def object_pixels(pixels: np.ndarray, row: dict) -> np.ndarray:
    return np.abs(pixels - [row["red"], row["green"], row["blue"]]).max(axis=-1) < 0.12  # (h, w)


# Files


def test_same_seed_gives_identical_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = (
        read_bytes(write_pushing(tmp_path / name, **SMALL, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert not [name for name in first if first[name] == other[name]]


def test_layout(tmp_path):
    folder = write_pushing(tmp_path / "deep" / "pushing", **SMALL)
    pictures = {f"clip_{i:05d}/img_{t:05d}.jpg" for i in range(16) for t in range(1, 5)}
    assert read_bytes(folder).keys() == pictures | {"conditions.csv", "actions.csv", "pushing.json"}
    assert {Image.open(folder / name).size for name in pictures} == {(32, 32)}
    manifest = json.loads((folder / "pushing.json").read_text())
    assert manifest == {"generator": "pushing", "version": 1, **SMALL, "seed": 0}
    assert [path.name for path in folder.parent.iterdir()] == ["pushing"]


def test_table_columns_and_keys(pushing):
    conditions, actions = (read_table(pushing / f"{name}.csv") for name in ("conditions", "actions"))
    assert " ".join(conditions[0]) == (
        "clip frame shape_disc shape_square shape_triangle red green blue size x y height angle pusher_x pusher_y light"
    )
    assert " ".join(actions[0]) == "clip action action_id dx dy dheight dangle"
    names = [f"clip_{i:05d}" for i in range(16)]
    assert [row["clip"] for row in actions] == names
    assert [(row["clip"], row["frame"]) for row in conditions] == [(n, t) for n in names for t in range(1, 5)]
    assert all(isinstance(v, float) for row in conditions for k, v in row.items() if k != "clip")
    assert all(row["action"] == ACTIONS[int(row["action_id"])] for row in actions)


def test_progress_counts_the_clips(tmp_path):
    calls = []
    write_pushing(tmp_path / "pushing", **TINY, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# Tables


def test_actions_are_balanced_and_shuffled(many):
    ids = [int(row["action_id"]) for row in read_table(many / "actions.csv")]
    counts = np.bincount(ids, minlength=len(ACTIONS))
    assert counts.min() == 171 // 8 and counts.max() == 171 // 8 + 1
    assert ids[:8] != sorted(ids[:8])


def test_changes_are_last_frame_minus_first(many):
    for action, rows in by_clip(many):
        for column in ("x", "y", "height", "angle"):
            assert action[f"d{column}"] == pytest.approx(rows[-1][column] - rows[0][column], abs=1.01e-5)


@pytest.mark.parametrize(
    "name, least",
    [
        ("push_left", {"dx": -0.15}),
        ("push_right", {"dx": 0.15}),
        ("push_away", {"dy": -0.15}),
        ("push_near", {"dy": 0.15}),
        ("lift", {"dheight": 0.5, "dy": -0.09}),
        ("turn_left", {"dangle": math.radians(40)}),
        ("turn_right", {"dangle": -math.radians(40)}),
        ("no_contact", {}),
    ],
)
def test_each_action_changes_what_it_should_and_little_else(many, name, least):
    rows = [row for row in read_table(many / "actions.csv") if row["action"] == name]
    aside = {"dx": 0.03, "dy": 0.03, "dheight": 0, "dangle": 0.15} if name.startswith("push") else {}
    assert len(rows) >= 21
    for row in rows:
        for column in ("dx", "dy", "dheight", "dangle"):
            if column in least:
                assert row[column] / least[column] >= 0.9999
            else:
                assert abs(row[column]) <= aside.get(column, 0)


def test_object_stays_in_the_picture(many):
    for row in read_table(many / "conditions.csv"):
        reach = REACH[shape_of(row)] * row["size"] * (1 + GROWTH * row["height"])
        assert reach <= min(row["x"], row["y"], 1 - row["x"], 1 - row["y"])
        assert 0 <= row["height"] <= 1
        assert all(0 <= row[channel] <= 1 for channel in ("red", "green", "blue"))


def test_pusher_comes_from_the_side_it_pushes_from(many):
    sides = {"push_left": (1, 0), "push_right": (-1, 0), "push_away": (0, 1), "push_near": (0, -1)}
    for action, rows in by_clip(many):
        if action["action"] in sides:
            side = np.array(sides[action["action"]])
            gaps = [side @ (r["pusher_x"] - r["x"], r["pusher_y"] - r["y"]) for r in (rows[0], rows[-1])]
            assert gaps[0] - gaps[1] > 0.15  # it starts at a distance,
            assert 0.6 * rows[0]["size"] < gaps[1] - KNOB < 1.31 * rows[0]["size"]  # and ends at the edge


def test_without_contact_the_pusher_keeps_clear_and_moves(many):
    for action, rows in by_clip(many):
        if action["action"] == "no_contact":
            gaps = [math.hypot(r["pusher_x"] - r["x"], r["pusher_y"] - r["y"]) for r in rows]
            assert min(gaps) > REACH[shape_of(rows[0])] * rows[0]["size"] + KNOB
            assert len({(r["x"], r["y"], r["height"], r["angle"]) for r in rows}) == 1
            path = (rows[-1]["pusher_x"] - rows[0]["pusher_x"], rows[-1]["pusher_y"] - rows[0]["pusher_y"])
            assert math.hypot(*path) > 0.7


# Pictures


def test_every_action_is_seen_in_the_pictures(pushing):
    assert {action["action"] for action, _ in by_clip(pushing)} == set(ACTIONS)
    for _, rows in by_clip(pushing):
        assert np.mean((picture(pushing, rows[0]) - picture(pushing, rows[-1])) ** 2) > 0.003


def test_colour_and_position_agree_with_the_picture(pushing):
    for row in read_table(pushing / "conditions.csv"):
        pixels = picture(pushing, row)
        colour = [row["red"], row["green"], row["blue"]]
        assert colour_at(pixels, row["x"], row["y"]) == pytest.approx(colour, abs=0.06)
        y, x = (np.argwhere(object_pixels(pixels, row)).mean(axis=0) + 0.5) / len(pixels)
        assert math.dist((x, y), (row["x"], row["y"])) < 0.2 * row["size"]


def test_shape_agrees_with_the_picture(pushing):
    farthest = {"disc": 1.0, "square": 1.15, "triangle": 1.26}  # pixel from the centre, in units of the size
    for _, rows in by_clip(pushing):
        pixels = picture(pushing, rows[0])
        y, x = (np.argwhere(object_pixels(pixels, rows[0])).T + 0.5) / len(pixels)
        reach = np.hypot(x - rows[0]["x"], y - rows[0]["y"]).max() / rows[0]["size"]
        assert reach == pytest.approx(farthest[shape_of(rows[0])], abs=0.075)


def test_size_and_height_agree_with_the_picture(pushing):
    for row in read_table(pushing / "conditions.csv"):
        radius = math.sqrt(object_pixels(picture(pushing, row), row).mean() / math.pi)
        assert 0.75 < radius / (row["size"] * (1 + GROWTH * row["height"])) < 1.05


def test_angle_agrees_with_the_mark_on_the_object(pushing):
    for row in read_table(pushing / "conditions.csv"):
        pixels, far = picture(pushing, row), 0.58 * row["size"] * (1 + GROWTH * row["height"])
        step = far * math.cos(row["angle"]), -far * math.sin(row["angle"])
        mark, opposite = (colour_at(pixels, row["x"] + s * step[0], row["y"] + s * step[1]) for s in (1, -1))
        assert mark.min() > 0.5 > opposite.min()


def test_pusher_is_where_the_table_says(pushing):
    seen = 0
    for row in read_table(pushing / "conditions.csv"):
        if 0 < row["pusher_x"] < 1 and 0 < row["pusher_y"] < 1:
            seen += 1
            colour = colour_at(picture(pushing, row), row["pusher_x"], row["pusher_y"])
            assert colour == pytest.approx([0.8, 0.8, 0.8], abs=0.1)
    assert seen > 40


# An existing folder, a killed run, bad arguments


def test_same_settings_leave_the_folder_untouched(tmp_path):
    folder = write_pushing(tmp_path / "pushing", **TINY)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    (folder / "actions.csv").write_text("edited")
    before[folder / "actions.csv"] = (folder / "actions.csv").stat().st_mtime_ns
    assert write_pushing(folder, **TINY) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_other_settings_are_refused(tmp_path):
    folder = write_pushing(tmp_path / "pushing", **TINY)
    before = read_bytes(folder)
    with pytest.raises(FileExistsError) as error:
        write_pushing(folder, **{**TINY, "clips": 4}, seed=7)
    assert str(error.value) == (
        f"{folder}: is a pushing set with clips=3, asked for clips=4; seed=0, asked for seed=7: "
        "choose another folder or move this one away"
    )
    assert read_bytes(folder) == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"generator": "other"}'])
def test_a_foreign_folder_is_refused(tmp_path, content):
    folder = tmp_path / "mine"
    folder.mkdir()
    if content is not None:
        (folder / "pushing.json").write_text(content)
    before = read_bytes(folder)
    with pytest.raises(FileExistsError, match=r"mine: is no pushing set .*choose another folder"):
        write_pushing(folder, **TINY)
    assert read_bytes(folder) == before


def test_a_killed_run_leaves_no_set_and_the_next_run_completes_it(tmp_path):
    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    folder, partial = tmp_path / "pushing", tmp_path / "pushing.partial"
    with pytest.raises(KeyboardInterrupt):
        write_pushing(folder, **TINY, progress=kill)
    assert partial.is_dir() and not folder.exists()
    (partial / "clip_00099").mkdir()
    write_pushing(folder, **TINY)
    assert not partial.exists() and not (folder / "clip_00099").exists()
    assert read_bytes(folder) == read_bytes(write_pushing(tmp_path / "fresh", **TINY))


def test_a_foreign_partial_folder_is_refused(tmp_path):
    partial = tmp_path / "pushing.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"pushing\.partial: .*thesis\.tex.*move it away"):
        write_pushing(tmp_path / "pushing", **TINY)
    assert (partial / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name, value, minimum", [("clips", 0, 1), ("frames", 1, 2), ("size", 15, 16), ("seed", -1, 0)])
def test_bad_arguments_are_refused(tmp_path, name, value, minimum):
    with pytest.raises(ValueError, match=f"^{name}={value}: must be at least {minimum}$"):
        write_pushing(tmp_path / "pushing", **{**TINY, name: value})
    assert not list(tmp_path.iterdir())
