import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.datasets import plate
from workbench.datasets.plate import (
    CONDUCTIVITY_GREY,
    DISC_RADIUS,
    HEIGHT,
    POWER_GREY,
    RANGES,
    WIDTH,
    Mesh,
    Run,
    areas,
    build_mesh,
    draw_geometry,
    draw_runs,
    lump,
    simulate,
    solve,
    stiffness,
    write_plate,
)

TINY = {"runs": 3, "steps": 3, "nodes": 100}
TIMES = np.linspace(0.0, 1800.0, 9)
MIDDLE = Run(*((low + high) / 2 for low, high, _ in RANGES.values()))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return build_mesh(400)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_plate(tmp_path_factory.mktemp("small") / "plate", runs=20, steps=5, nodes=200, seed=3)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_runs(folder: Path) -> dict[str, Run]:
    with (folder / "conditions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["id"]: Run(*(float(row[name]) for name in Run._fields)) for row in rows}


def uniform(mesh: Mesh, value: float) -> np.ndarray:
    return np.full(len(mesh.triangles), value)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def on_edge(mesh: Mesh, x: float) -> np.ndarray:
    """Length of the edge at x that belongs to each node, by the trapezoidal rule on evenly spaced nodes."""
    on = mesh.points[:, 0] == x
    ends = on & np.isin(mesh.points[:, 1], (0.0, HEIGHT))
    return (on - 0.5 * ends) * HEIGHT / (on.sum() - 1)


# The mesh


def test_mesh_covers_the_plate_with_the_nodes_asked_for(mesh):
    assert mesh.points.shape == (400, 2)
    assert areas(mesh).sum() == pytest.approx(WIDTH * HEIGHT, rel=1e-12)
    assert set(mesh.triangles.ravel()) == set(range(400))
    corners = {(x, y) for x in (0.0, WIDTH) for y in (0.0, HEIGHT)}
    assert corners <= set(map(tuple, mesh.points.tolist()))


def test_nodes_are_irregular_and_triangles_are_not_slim(mesh):
    corners = mesh.points[mesh.triangles]
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1)  # (e, 3)
    least_angle = np.degrees(np.arcsin(2 * areas(mesh) * sides.min(1) / sides.prod(1)))
    assert least_angle.min() > 25
    assert 0.1 < sides.std() / sides.mean() < 0.3
    assert not np.array_equal(mesh.points, build_mesh(400, seed=1).points)


# The solver against closed forms


def test_stiffness_is_symmetric_and_a_uniform_field_drives_no_flow(mesh):
    conductivity = np.random.default_rng(0).uniform(0.1, 10.0, len(mesh.triangles))
    matrix = stiffness(mesh, conductivity).toarray()
    assert np.abs(matrix - matrix.T).max() < 1e-14 * np.abs(matrix).max()
    assert np.abs(matrix.sum(0)).max() < 1e-12 * np.abs(matrix).max()
    x, y = mesh.points.T
    slope = 3 * x - 2 * y  # its energy is |grad|^2 times the integral of the conductivity, exactly
    assert slope @ matrix @ slope == pytest.approx(13 * conductivity @ areas(mesh), rel=1e-12)


def cosine_error(nodes: int) -> float:
    """Relative error of the decay of cos(pi x / W) cos(pi y / H) on an insulated plate: exp(-a k^2 t)."""
    mesh, times, a = build_mesh(nodes), np.linspace(0.0, 100.0, 6), 1e-5
    mode = np.cos(np.pi * mesh.points / (WIDTH, HEIGHT)).prod(1)
    exact = np.exp(-a * np.pi**2 * (WIDTH**-2 + HEIGHT**-2) * times)[:, None] * mode
    found = solve(mesh, uniform(mesh, 40.0), uniform(mesh, 4e6), 0 * mode, times, initial=mode, substeps=20)
    return distance(found[1:], exact[1:])


def test_a_cosine_decays_as_in_closed_form_with_second_order_in_space():
    coarse, fine = cosine_error(200), cosine_error(800)
    assert fine < 0.003
    assert 3 < coarse / fine < 6  # half the spacing, a quarter of the error


def test_second_order_in_time(mesh):
    mode = np.cos(np.pi * mesh.points[:, 0] / WIDTH)
    source = lump(mesh, uniform(mesh, 4e4)) * (1 + mode)
    problem = uniform(mesh, 40.0), uniform(mesh, 4e6), source, np.array([0.0, 300.0])
    once, twice, exact = (solve(mesh, *problem, initial=mode, substeps=n)[-1] for n in (6, 12, 192))
    assert distance(once, exact) / distance(twice, exact) == pytest.approx(4, abs=0.2)


def test_uniform_heating_of_an_insulated_plate_is_uniform(mesh):
    density = np.random.default_rng(0).uniform(1e6, 9e6, len(mesh.triangles))  # of capacity and of heating alike
    field = solve(mesh, density[::-1] / 1e5, 5 * density, lump(mesh, density), TIMES)
    assert field == pytest.approx(np.repeat(TIMES[:, None] / 5, 400, axis=1), rel=1e-10)


def test_heat_is_conserved(mesh):
    rng = np.random.default_rng(0)
    conductivity, capacity = np.array([[20.0], [1e6]]) * rng.uniform(0.1, 1.0, (2, len(mesh.triangles)))
    source = rng.uniform(0.0, 1.0, 400)
    heat = solve(mesh, conductivity, capacity, source, TIMES) @ lump(mesh, capacity)
    assert heat == pytest.approx(source.sum() * TIMES, rel=1e-10)


def test_a_uniform_loss_lets_a_uniform_field_decay_exponentially(mesh):
    loss, start = lump(mesh, uniform(mesh, 2.0)), np.full(400, 7.0)
    field = solve(mesh, uniform(mesh, 1.0), uniform(mesh, 1000.0), 0 * loss, TIMES, loss, start, substeps=40)
    assert field == pytest.approx(np.repeat(7 * np.exp(-0.002 * TIMES)[:, None], 400, axis=1), rel=1e-4)


def test_the_linear_profile_between_a_heated_and_a_cooled_edge_is_stationary(mesh):
    k, h, q = 20.0, 500.0, 1000.0
    profile = q / h + q / k * (WIDTH - mesh.points[:, 0])
    source, loss = q * on_edge(mesh, 0.0), h * on_edge(mesh, WIDTH)
    field = solve(mesh, uniform(mesh, k), uniform(mesh, 4e6), source, TIMES, loss, profile)
    assert field == pytest.approx(np.tile(profile, (len(TIMES), 1)), rel=1e-10)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_material_must_be_positive(mesh, bad):
    good, source = uniform(mesh, 1.0), np.zeros(400)
    spoilt = np.where(np.arange(len(good)) == 5, bad, good)
    with pytest.raises(ValueError, match=f"^conductivity={bad} in an element: must be positive"):
        solve(mesh, spoilt, good, source, TIMES)
    with pytest.raises(ValueError, match=f"^capacity={bad} in an element: must be positive"):
        solve(mesh, good, spoilt, source, TIMES)


@pytest.mark.parametrize("times", [[0.0], [0.0, 1.0, 3.0], [2.0, 1.0, 0.0], [0.0, 0.0]])
def test_times_must_rise_evenly(mesh, times):
    one = uniform(mesh, 1.0)
    with pytest.raises(ValueError, match=r"^times=.*: must be two or more, rising, evenly spaced"):
        solve(mesh, one, one, np.zeros(400), np.array(times))
    with pytest.raises(ValueError, match="^substeps=0: must be at least 1"):
        solve(mesh, one, one, np.zeros(400), TIMES, substeps=0)


# A run


@pytest.mark.parametrize("name", Run._fields)
def test_every_parameter_moves_the_field_and_all_but_power_not_in_a_straight_line(mesh, name):
    low, high, _ = RANGES[name]
    lowest, middle, highest = (
        simulate(mesh, MIDDLE._replace(**{name: value}), TIMES) for value in (low, (low + high) / 2, high)
    )
    change = np.linalg.norm(highest - lowest) / np.linalg.norm(middle)
    bend = distance((lowest + highest) / 2, middle)
    assert change > 0.08
    assert bend < 1e-12 if name == "power" else bend > 0.03


def test_plate_begins_cold_and_warms_most_at_the_heater(mesh):
    field = simulate(mesh, MIDDLE, TIMES)
    assert not field[0].any() and (field[1:] > 0).all()
    x, y = mesh.points[field[-1].argmax()]
    assert y == 0 and abs(x - MIDDLE.source_x) < WIDTH / 28


def test_in_the_end_the_water_takes_the_power_of_the_heater(mesh):
    field = simulate(mesh, MIDDLE, np.linspace(0.0, 1e5, 101))
    taken = plate.COOLING * plate.THICKNESS * field @ on_edge(mesh, WIDTH)
    assert taken[-1] == pytest.approx(MIDDLE.power, rel=1e-6)
    assert (np.diff(taken[:20]) > 0).all()


def test_a_deeper_notch_keeps_heat_from_the_cooled_edge(mesh):
    run = MIDDLE._replace(source_x=0.06, notch_x=0.14)
    shallow, deep = (simulate(mesh, run._replace(notch_depth=d), TIMES)[-1] for d in (0.03, 0.085))
    x = mesh.points[:, 0]
    assert (deep > shallow)[x < 0.12].all() and (deep < shallow)[x > 0.16].all()


def test_a_small_shift_of_the_notch_moves_no_node_by_a_jump(mesh):
    fields = [simulate(mesh, MIDDLE._replace(notch_x=x), TIMES) for x in np.linspace(0.1, 0.104, 9).tolist()]
    steps = np.abs(np.diff(fields, axis=0))  # for each 0.5 mm
    assert steps.max() < 0.05 * np.max(fields)


@pytest.mark.parametrize("name", Run._fields)
@pytest.mark.parametrize("beyond", [-1.0, 1e3, np.nan])
def test_parameters_outside_their_range_are_refused(mesh, name, beyond):
    low, high, unit = RANGES[name]
    with pytest.raises(ValueError) as error:
        simulate(mesh, MIDDLE._replace(**{name: beyond}), TIMES)
    assert str(error.value) == f"{name}={beyond} {unit}: must be between {low} and {high}"


def test_runs_cover_every_range_evenly():
    for values, (low, high, _) in zip(np.array(draw_runs(40)).T, RANGES.values(), strict=True):
        assert sorted(((values - low) / (high - low) * 40).astype(int)) == list(range(40))
    assert abs(np.corrcoef(np.array(draw_runs(240)).T) - np.eye(5)).max() < 0.2
    assert draw_runs(4, seed=1) != draw_runs(4, seed=2)


# The picture


def test_a_picture_tells_all_five_parameters():
    for run in draw_runs(30):
        picture = draw_geometry(run).astype(float)
        pixel, greys = WIDTH / 64, (picture.max(), picture[40, 2])
        disc, steel = picture[48:56].sum(0), greys[1]
        assert (np.arange(64) + 0.5) @ disc / disc.sum() * pixel == pytest.approx(run.source_x, abs=3e-4)
        missing = steel - picture[17:22]  # rows cut by every notch
        assert (np.arange(64) + 0.5) @ missing.sum(0) / missing.sum() * pixel == pytest.approx(run.notch_x, abs=3e-4)
        area = (steel - picture[16:48]).sum() / steel * pixel**2
        round_end = (2 - np.pi / 2) * plate.NOTCH_RADIUS**2
        assert (area + round_end) / (2 * plate.NOTCH_RADIUS) == pytest.approx(run.notch_depth, abs=1e-3)
        for grey, (dark, bright), name in zip(
            greys, (POWER_GREY, CONDUCTIVITY_GREY), ("power", "conductivity"), strict=True
        ):
            low, high, _ = RANGES[name]
            share = (getattr(run, name) - low) / (high - low)
            assert (grey - dark) / (bright - dark) == pytest.approx(share, abs=0.006)
    assert 2 * DISC_RADIUS < (WIDTH - HEIGHT) / 2  # the disc fits below the plate


# Files


def test_layout_and_manifest(small):
    pictures = {f"geometry/run_{i:03d}.png" for i in range(20)}
    tables = {"conditions.csv", "nodes.csv", "times.csv"}
    assert read_bytes(small).keys() == pictures | tables | {"fields.npy", "plate.json"}
    assert {(Image.open(small / name).size, Image.open(small / name).mode) for name in pictures} == {((64, 64), "L")}
    manifest = json.loads((small / "plate.json").read_text())
    assert manifest.pop("units") == {
        "field": "temperature rise [K]",
        "nodes": "m",
        "times": "s",
        "conductivity": "W/(m K)",
        "power": "W",
        "source_x": "m",
        "notch_depth": "m",
        "notch_x": "m",
    }
    assert manifest == {"generator": "plate", "version": 1, "runs": 20, "steps": 5, "nodes": 200, "seed": 3}


def test_tables_and_fields_agree(small):
    """The rows of the tables, solved again, give the fields; the pictures are theirs."""
    fields = np.load(small / "fields.npy")
    assert fields.shape == (20, 5, 200) and fields.dtype == np.float32 and np.isfinite(fields).all()
    mesh, runs = build_mesh(200, seed=3), read_runs(small)
    assert list(runs) == [f"run_{i:03d}" for i in range(20)]
    times = np.loadtxt(small / "times.csv", skiprows=1)
    assert times.tolist() == [0, 450, 900, 1350, 1800]
    assert np.array_equal(np.loadtxt(small / "nodes.csv", delimiter=",", skiprows=1), mesh.points)
    for field, (name, run) in zip(fields, runs.items(), strict=True):
        assert np.array_equal(field, simulate(mesh, run, times).astype(np.float32))
        assert np.array_equal(np.asarray(Image.open(small / "geometry" / f"{name}.png")), draw_geometry(run))


def test_same_seed_gives_identical_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = (
        read_bytes(write_plate(tmp_path / name, **TINY, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert [name for name in first if first[name] == other[name]] == ["times.csv"]


def test_progress_counts_the_runs(tmp_path):
    calls = []
    write_plate(tmp_path / "deep" / "plate", **TINY, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# An existing folder, a killed run, bad arguments


def test_same_settings_leave_the_folder_untouched(tmp_path):
    folder = write_plate(tmp_path / "plate", **TINY)
    (folder / "conditions.csv").write_text("edited")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert write_plate(folder, **TINY) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_other_settings_are_refused(tmp_path):
    folder = write_plate(tmp_path / "plate", **TINY)
    before = read_bytes(folder)
    with pytest.raises(FileExistsError) as error:
        write_plate(folder, **{**TINY, "runs": 4}, seed=7)
    assert str(error.value) == (
        f"{folder}: is a plate set with runs=3, asked for runs=4; seed=0, asked for seed=7: "
        "choose another folder or move this one away"
    )
    assert read_bytes(folder) == before and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"generator": "pushing"}'])
def test_a_foreign_folder_is_refused(tmp_path, content):
    folder = tmp_path / "mine"
    folder.mkdir()
    if content is not None:
        (folder / "plate.json").write_text(content)
    before = read_bytes(folder)
    with pytest.raises(FileExistsError, match=r"mine: is no plate set .*choose another folder"):
        write_plate(folder, **TINY)
    assert read_bytes(folder) == before


def test_a_killed_run_leaves_no_set_and_the_next_run_completes_it(tmp_path):
    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    folder, partial = tmp_path / "plate", tmp_path / "plate.partial"
    with pytest.raises(KeyboardInterrupt):
        write_plate(folder, **TINY, progress=kill)
    assert partial.is_dir() and not folder.exists()
    (partial / "geometry" / "run_099.png").touch()
    write_plate(folder, **TINY)
    assert not partial.exists() and not (folder / "geometry" / "run_099.png").exists()
    assert read_bytes(folder) == read_bytes(write_plate(tmp_path / "fresh", **TINY))


@pytest.mark.parametrize("name", ["thesis.tex", "geometry/thesis.png"])
def test_a_foreign_partial_folder_is_refused(tmp_path, name):
    mine = tmp_path / "plate.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"plate\.partial: .*thesis\..*move it away"):
        write_plate(tmp_path / "plate", **TINY)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name, value, minimum", [("runs", 0, 1), ("steps", 1, 2), ("nodes", 99, 100), ("seed", -1, 0)])
def test_bad_arguments_are_refused(tmp_path, name, value, minimum):
    with pytest.raises(ValueError, match=f"^{name}={value}: must be at least {minimum}$"):
        write_plate(tmp_path / "plate", **{**TINY, name: value})
    assert not list(tmp_path.iterdir())
