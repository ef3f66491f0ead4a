"""The embedded data set `plate`: a heated plate with a notch, solved by linear finite elements.

Problem. A steel plate, 0.2 m x 0.1 m and 5 mm thick, begins at the temperature of its surroundings. A heater pressed
against the lower edge gives a constant power; water cools the right edge; everything else is insulated. A notch from
the upper edge throttles the flow of heat. T(x, y, t) is the temperature rise [K]:

    c dT/dt = div(k grad T)    in the plate, with T = 0 at time zero
    k dT/dn = q                on the lower edge, with n pointing outwards
    k dT/dn = -h T             on the right edge
    k dT/dn = 0                on the others

k is the conductivity [W/(m K)], c the heat capacity [J/(m^3 K)], h the heat transfer to the water [W/(m^2 K)], and q
[W/m^2] a Gaussian of x whose integral over the edge is the power. T is proportional to the power; the other four
parameters enter non-linearly. All quantities below are per metre of thickness.

Notch. It is a slot with a round end, filled with insulation. As all runs share their nodes, the mesh does not follow
its wall: k and c of an element are multiplied by v^(1 - s), with v = 0.01 and s the element's share of steel, which
rises smoothly from 0 to 1 as its centroid crosses the wall, over the mean spacing of nodes. So the field depends
smoothly on the notch, and nodes inside it bridge the temperatures of its walls.

Space. With hat functions N_i on a Delaunay triangulation, T = sum_i T_i N_i and

    C dT/dt + (K + H) T = Q
    K_ij = sum_e k_e A_e grad N_i . grad N_j                 A_e: area of element e
    C_ii = sum_e c_e A_e / 3                                 lumped: diagonal
    H_ii = h r_i                                             r_i, l_i: length of the right, lower edge that belongs
    Q_i  = power / thickness * g(x_i) l_i / sum_j g(x_j) l_j    to node i (half-way to its neighbours); g: Gaussian

Time. Crank-Nicolson in its midpoint form, the same matrix in every step and thus one sparse LU per run:

    (C + dt/2 (K + H)) T_mid = C T_old + dt/2 Q,    T_new = 2 T_mid - T_old

Both are of second order, and since the columns of K sum to zero the heat sum_i C_ii T_i changes in each step by
exactly dt sum_i (Q_i - H_ii T_mid,i).

Source: Hughes 1987, The Finite Element Method, chapters 7 and 8.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from scipy.sparse import coo_array, csc_array, diags_array
from scipy.sparse.linalg import splu
from scipy.spatial import Delaunay

from workbench.datasets.generated import write_once

VERSION = 1  # raise it when the same seed no longer gives the same bytes
MANIFEST, FIELDS, GEOMETRY = "plate.json", "fields.npy", "geometry"  # the last is the folder of the pictures
CONDITIONS_CSV, NODES_CSV, TIMES_CSV = "conditions.csv", "nodes.csv", "times.csv"
NODE_STREAM, RUN_STREAM = 1, 2  # each random stream has its own number beside the seed

WIDTH, HEIGHT, THICKNESS = 0.2, 0.1, 0.005  # m
CAPACITY = 3.8e6  # J/(m^3 K), of steel
COOLING = 1000.0  # W/(m^2 K), on the right edge
DURATION = 1800.0  # s
HEATER = 0.015  # m: standard deviation of its flux along the lower edge
NOTCH_RADIUS = 0.008  # m: half the width of the notch
FILLING = 0.01  # conductivity and capacity of the notch in units of the plate's

RANGES = {
    "conductivity": (12.0, 60.0, "W/(m K)"),
    "power": (10.0, 40.0, "W"),
    "source_x": (0.03, 0.15, "m"),
    "notch_depth": (0.03, 0.085, "m"),
    "notch_x": (0.05, 0.17, "m"),
}
"""Lowest and highest value and unit of each parameter; x is measured from the left edge, depth from the upper one."""

CONDUCTIVITY_GREY, POWER_GREY = (50, 150), (160, 255)  # from the lowest value to the highest
DISC_RADIUS = 0.012  # m: of the disc that stands for the heater in a picture, below the plate


class Run(NamedTuple):
    """The five parameters of a run, in the units of `RANGES`."""

    conductivity: float
    power: float
    source_x: float
    notch_depth: float
    notch_x: float


class Mesh(NamedTuple):
    """Triangles between nodes, of any orientation."""

    points: Float[np.ndarray, "n 2"]  # m
    triangles: Int[np.ndarray, "e 3"]  # numbers of their corners


def write_plate(
    folder: Path,
    runs: int = 240,
    steps: int = 32,
    nodes: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set `plate`: temperature fields with their parameters and pictures.

    The folder holds `fields.npy` (runs, steps, nodes) float32 [K], `conditions.csv` (id, five parameters), `nodes.csv`
    (x, y [m]), `times.csv` (time [s]), `geometry/run_000.png` and so on, and `plate.json` with the units. It gets its
    name only when complete; a folder written with the same settings is returned untouched. The parameters are a Latin
    hypercube over `RANGES`.

    Args:
        folder: Where the set goes; `<folder>.partial` is used while writing.
        runs: Number of simulations.
        steps: Times of each, evenly spaced, the first at zero.
        nodes: Nodes of the mesh, the same in all runs.
        seed: Start of every random stream; the same seed gives the same bytes.
        progress: Called after each run with the numbers of runs done and in all.

    Returns:
        The folder.

    Raises:
        ValueError: A number is too small.
        FileExistsError: The folder exists and is not this set, or `<folder>.partial` holds foreign files.
    """
    folder = Path(folder)
    settings = {"runs": runs, "steps": steps, "nodes": nodes, "seed": seed}
    for (name, value), minimum in zip(settings.items(), (1, 2, 100, 0), strict=True):
        if value < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")
    units = {"field": "temperature rise [K]", "nodes": "m", "times": "s"}
    units |= {name: unit for name, (_, _, unit) in RANGES.items()}
    manifest = {"generator": "plate", "version": VERSION, **settings, "units": units}
    return write_once(folder, manifest, _is_own, lambda partial: _write_set(partial, manifest, progress))


def _is_own(name: str) -> bool:
    files = (MANIFEST, FIELDS, CONDITIONS_CSV, NODES_CSV, TIMES_CSV, GEOMETRY)
    return name in files or re.fullmatch(rf"{GEOMETRY}/run_\d{{3,}}\.png", name) is not None


def _write_set(folder: Path, manifest: dict, progress: Callable[[int, int], None] | None) -> None:
    (folder / GEOMETRY).mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    mesh, times = build_mesh(manifest["nodes"], manifest["seed"]), np.linspace(0.0, DURATION, manifest["steps"])
    runs = draw_runs(manifest["runs"], manifest["seed"])
    names = [f"run_{i:03d}" for i in range(len(runs))]
    conditions = [(name, *run) for name, run in zip(names, runs, strict=True)]
    _write_table(folder / CONDITIONS_CSV, ("id", *Run._fields), conditions)
    _write_table(folder / NODES_CSV, ("x", "y"), mesh.points.tolist())
    _write_table(folder / TIMES_CSV, ("time",), times[:, None].tolist())
    fields = np.empty((len(runs), len(times), len(mesh.points)), np.float32)
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        fields[i] = simulate(mesh, run, times)
        Image.fromarray(draw_geometry(run)).save(folder / GEOMETRY / f"{name}.png")
        if progress is not None:
            progress(i + 1, len(runs))
    np.save(folder / FIELDS, fields)


def _write_table(path: Path, header: tuple, rows: list) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_runs(runs: int, seed: int = 0) -> list[Run]:
    """A Latin hypercube over `RANGES`: of `runs` equal parts of each range, each is met once.

    Values are rounded to five decimals, as they are written.
    """
    rng = np.random.default_rng([seed, RUN_STREAM])
    low, high = np.array([(low, high) for low, high, _ in RANGES.values()]).T
    parts = np.column_stack([rng.permutation(runs) for _ in RANGES])
    values = low + (high - low) * (parts + rng.uniform(size=parts.shape)) / runs
    return [Run(*row) for row in np.round(values, 5).tolist()]


def build_mesh(nodes: int = 1000, seed: int = 0) -> Mesh:
    """Irregular nodes on the whole plate: evenly spaced on its edges, random but nowhere crowded inside.

    Each inner node is, of 30 random candidates, the farthest from all nodes before it (best-candidate sampling);
    three rounds, in each of which they move to the mean of their neighbours, even the triangles out.

    Args:
        nodes: Number of nodes, at least 100, those on the edges included.
        seed: Start of the random stream.

    Source: Mitchell 1991, Spectrally optimal sampling for distribution ray tracing.
    """
    rng = np.random.default_rng([seed, NODE_STREAM])
    spacing = np.sqrt(WIDTH * HEIGHT / nodes)
    points = np.empty((nodes, 2))
    edge = _edge_points(round(WIDTH / spacing), round(HEIGHT / spacing))
    points[: len(edge)] = edge
    margin = np.full(2, spacing / 2)
    for n in range(len(edge), nodes):
        candidates = rng.uniform(margin, np.array([WIDTH, HEIGHT]) - margin, (30, 2))
        distance = ((candidates[:, None] - points[:n]) ** 2).sum(-1)
        points[n] = candidates[distance.min(1).argmax()]
    for _ in range(3):
        triangles = _triangulate(points)
        i, j = triangles.ravel(), np.roll(triangles, 1, axis=1).ravel()
        neighbours = coo_array((np.ones(2 * len(i)), (np.append(i, j), np.append(j, i)))).tocsr()
        means = neighbours @ points / neighbours.sum(1)[:, None]
        points[len(edge) :] = means[len(edge) :]
    return Mesh(points, _triangulate(points))


def _edge_points(columns: int, rows: int) -> Float[np.ndarray, "n 2"]:
    """The nodes on the four edges, with exact coordinates, each corner once."""
    x, y = np.linspace(0.0, WIDTH, columns + 1), np.linspace(0.0, HEIGHT, rows + 1)
    long = [np.column_stack([x, np.full_like(x, level)]) for level in (0.0, HEIGHT)]
    short = [np.column_stack([np.full_like(y, side), y])[1:-1] for side in (0.0, WIDTH)]
    return np.concatenate(long + short)


def _triangulate(points: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, "e 3"]:
    return Delaunay(points).simplices.astype(np.int64)


def simulate(mesh: Mesh, run: Run, times: Float[np.ndarray, " t"]) -> Float[np.ndarray, "t n"]:
    """Temperature rise [K] of a run at evenly spaced times [s], the first of them the time of the cold plate.

    Raises:
        ValueError: A parameter is outside its range in `RANGES`.
    """
    for (name, value), (low, high, unit) in zip(run._asdict().items(), RANGES.values(), strict=True):
        if not low <= value <= high:
            raise ValueError(f"{name}={value} {unit}: must be between {low} and {high}")
    centroids = mesh.points[mesh.triangles].mean(1)
    spacing = np.sqrt(WIDTH * HEIGHT / len(mesh.points))
    steel = _rise(_notch_distance(run, *centroids.T) / spacing)  # (e,) share of each element
    factor = FILLING ** (1 - steel)
    flux = np.exp(-0.5 * ((mesh.points[:, 0] - run.source_x) / HEATER) ** 2) * _edge_length(mesh, 1, 0.0)
    source = run.power / THICKNESS * flux / flux.sum()
    loss = COOLING * _edge_length(mesh, 0, WIDTH)
    return solve(mesh, run.conductivity * factor, CAPACITY * factor, source, times, loss)


def _notch_distance(run: Run, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of (x, y) from the wall of the notch [m], negative inside."""
    end = HEIGHT - run.notch_depth + NOTCH_RADIUS  # height of the middle of its round end
    return np.hypot(x - run.notch_x, np.maximum(end - y, 0.0)) - NOTCH_RADIUS


def _rise(distance: np.ndarray) -> np.ndarray:
    """From 0 at distance -1/2 smoothly to 1 at distance 1/2."""
    s = np.clip(0.5 + distance, 0.0, 1.0)
    return s * s * (3 - 2 * s)


def _edge_length(mesh: Mesh, axis: int, level: float) -> Float[np.ndarray, " n"]:
    """Length [m] of the edge x = level (axis 0) or y = level (axis 1) that belongs to each node."""
    on = np.flatnonzero(mesh.points[:, axis] == level)
    on = on[np.argsort(mesh.points[on, 1 - axis])]
    half = np.diff(mesh.points[on, 1 - axis]) / 2
    length = np.zeros(len(mesh.points))
    length[on] = np.append(half, 0.0) + np.append(0.0, half)
    return length


def solve(
    mesh: Mesh,
    conductivity: Float[np.ndarray, " e"],
    capacity: Float[np.ndarray, " e"],
    source: Float[np.ndarray, " n"],
    times: Float[np.ndarray, " t"],
    loss: Float[np.ndarray, " n"] | None = None,
    initial: Float[np.ndarray, " n"] | None = None,
    substeps: int = 4,
) -> Float[np.ndarray, "t n"]:
    """Temperature rise [K] at the nodes of an insulated plate, by the scheme at the head of this module.

    Args:
        mesh: Nodes and elements.
        conductivity: Of each element [W/(m K)].
        capacity: Of each element [J/(m^3 K)].
        source: Power that enters at each node, per metre of thickness [W/m].
        times: Evenly spaced [s]; the first is that of the initial field.
        loss: Power that leaves at each node, per metre of thickness and kelvin [W/(m K)]; None for none.
        initial: Temperature rise at the first time [K]; None for zero.
        substeps: Steps of the scheme from one time to the next.

    Raises:
        ValueError: A conductivity or capacity is not positive, substeps is below 1, or the times do not rise evenly.
    """
    for name, values in (("conductivity", conductivity), ("capacity", capacity)):
        if not (values > 0).all():
            raise ValueError(f"{name}={values[~(values > 0)][0]} in an element: must be positive")
    if substeps < 1:
        raise ValueError(f"substeps={substeps}: must be at least 1")
    step = (times[-1] - times[0]) / max(len(times) - 1, 1) / substeps
    if step <= 0 or not np.allclose(np.diff(times), step * substeps, rtol=1e-6, atol=0):
        raise ValueError(f"times={times}: must be two or more, rising, evenly spaced")
    heat = lump(mesh, capacity)
    flow = stiffness(mesh, conductivity) + diags_array(np.zeros_like(heat) if loss is None else loss)
    matrix = diags_array(heat) + step / 2 * flow
    factors = splu(csc_array(matrix), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    field = np.zeros((len(times), len(heat)))
    if initial is not None:
        field[0] = initial
    for t in range(1, len(times)):
        field[t] = field[t - 1]
        for _ in range(substeps):
            field[t] = 2 * factors.solve(heat * field[t] + step / 2 * source) - field[t]
    return field


def lump(mesh: Mesh, density: Float[np.ndarray, " e"]) -> Float[np.ndarray, " n"]:
    """Integral of an element-wise density over the third of each element that belongs to a node."""
    shares = np.repeat(density * areas(mesh) / 3, 3)
    return np.bincount(mesh.triangles.ravel(), shares, minlength=len(mesh.points))


def areas(mesh: Mesh) -> Float[np.ndarray, " e"]:
    """Areas of the elements [m^2]."""
    a, b = np.moveaxis(mesh.points[mesh.triangles[:, 1:]] - mesh.points[mesh.triangles[:, :1]], 1, 0)
    return np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2


def stiffness(mesh: Mesh, conductivity: Float[np.ndarray, " e"]) -> csc_array:
    """The matrix K (n, n) of the scheme: heat flow out of each node per metre of thickness and kelvin [W/(m K)].

    With s_i the side opposite to corner i, grad N_i . grad N_j = s_i . s_j / (2 A_e)^2.
    """
    corners = mesh.points[mesh.triangles]  # (e, 3, 2)
    sides = np.roll(corners, -1, axis=1) - np.roll(corners, -2, axis=1)
    local = np.einsum("e,eid,ejd->eij", conductivity / (4 * areas(mesh)), sides, sides)
    rows, columns = np.repeat(mesh.triangles, 3, axis=1).ravel(), np.tile(mesh.triangles, 3).ravel()
    n = len(mesh.points)
    return coo_array((local.ravel(), (rows, columns)), shape=(n, n)).tocsc()


def draw_geometry(run: Run, size: int = 64) -> UInt8[np.ndarray, "s s"]:
    """A grey picture of the plate, as wide as the picture, with black around it and in the notch.

    The grey of the plate tells the conductivity and that of the disc, which marks the heater, the power; both are
    linear in the parameter. Pixels on a border are mixed in proportion: positions are told to a fraction of a pixel.
    """
    pixel = WIDTH / size
    centre = (np.arange(size) + 0.5) * pixel
    x, y = np.meshgrid(centre, (WIDTH + HEIGHT) / 2 - centre)  # y upwards, the plate in the middle
    grey = np.zeros((size, size))
    for distance, value in (
        (np.minimum(np.minimum(y, HEIGHT - y), _notch_distance(run, x, y)), _grey(run, "conductivity")),
        (DISC_RADIUS - np.hypot(x - run.source_x, y + DISC_RADIUS), _grey(run, "power")),
    ):
        grey += np.clip(0.5 + distance / pixel, 0.0, 1.0) * (value - grey)
    return np.round(grey).astype(np.uint8)


def _grey(run: Run, name: str) -> float:
    (low, high, _), (dark, bright) = RANGES[name], CONDUCTIVITY_GREY if name == "conductivity" else POWER_GREY
    return dark + (bright - dark) * (getattr(run, name) - low) / (high - low)
