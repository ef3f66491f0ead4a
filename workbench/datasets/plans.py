"""The embedded data set `plans`: colour-coded floor plans of flats and of their rooms, one class per pixel."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from workbench.datasets.flats import Flat, Room, draw_flat
from workbench.datasets.furniture import Piece, Rect
from workbench.datasets.generated import write_once

VERSION = 1  # raise it when the same seed no longer gives the same bytes
MANIFEST, IMAGES_CSV, PALETTE, IMAGES = "plans.json", "manifest.csv", "palette.yaml", "images"
ORDER_STREAM, SCENE_STREAM = 1, 2  # each random stream has its own number beside the seed
SMALLEST = 32  # px

COLOURS = {
    "outside": (255, 255, 255),
    "wall": (40, 40, 40),
    "door": (200, 135, 70),
    "window": (45, 125, 225),
    "wooden floor": (255, 210, 150),
    "carpet": (190, 165, 235),
    "tiles": (150, 195, 175),
    "bed": (85, 0, 110),
    "table": (150, 20, 0),
    "seat": (175, 45, 125),
    "cabinet": (105, 105, 75),
    "sanitary": (85, 35, 205),
}
"""Classes in the order of their indices. Any two colours lie at least 24 apart in CIELAB, also as seen without one of
the three kinds of cones (simulated after Machado, Oliveira & Fernandes 2009)."""
FLOORS = {
    "living room": "wooden floor",
    "hall": "wooden floor",
    "bedroom": "carpet",
    "kitchen": "tiles",
    "bathroom": "tiles",
}
ROOMS = (3, 4, 5, 3, 4, 6, 3, 4, 5, 3)
"""Rooms of ten flats: four to a flat."""

_INDEX = {name: i for i, name in enumerate(COLOURS)}
_RGB = np.array(list(COLOURS.values()), np.uint8)


def write_plans(
    folder: Path, scenes: int = 240, size: int = 64, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the data set `plans`: an image of each flat, and one of each of its rooms.

    The folder holds `images/flat_0000.png`, `images/flat_0000_room_1.png` and so on, `palette.yaml` (class: colour),
    `manifest.csv` (path, scene, type, label, width and height of what is drawn [m]) and `plans.json`. It gets its name
    only when complete; a folder written with the same settings is returned untouched. A flat has 3 to 6 rooms, every
    ten flats have 40 together: 5 images to a scene. Borders are rounded to pixels; nothing is thinner than one.

    Args:
        folder: Where the set goes; `<folder>.partial` is used while writing.
        scenes: Number of flats.
        size: Side of the square images [px].
        seed: Start of every random stream; the same seed gives the same bytes.
        progress: Called after each flat with the numbers of flats done and in all.

    Returns:
        The folder.

    Raises:
        ValueError: A number is too small.
        FileExistsError: The folder exists and is not this set, or `<folder>.partial` holds foreign files.
    """
    folder = Path(folder)
    settings = {"scenes": scenes, "size": size, "seed": seed}
    for (name, value), minimum in zip(settings.items(), (1, SMALLEST, 0), strict=True):
        if value < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")
    manifest = {"generator": "plans", "version": VERSION, **settings}
    return write_once(folder, manifest, _is_own, lambda partial: _write_set(partial, manifest, progress))


def _is_own(name: str) -> bool:
    files = (MANIFEST, IMAGES_CSV, PALETTE, IMAGES)
    return name in files or re.fullmatch(rf"{IMAGES}/flat_\d{{4,}}(_room_\d)?\.png", name) is not None


def _write_set(folder: Path, manifest: dict, progress: Callable[[int, int], None] | None) -> None:
    (folder / IMAGES).mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    lines = (f"{name}: [{red}, {green}, {blue}]\n" for name, (red, green, blue) in COLOURS.items())
    (folder / PALETTE).write_text("".join(lines))
    scenes, size, seed = manifest["scenes"], manifest["size"], manifest["seed"]
    rows = [("path", "scene", "type", "label", "width", "height")]
    for index in range(scenes):
        scene, flat = f"flat_{index:04d}", draw_scene(index, seed)
        drawn = [(scene, "scene", f"scene of {len(flat.rooms)} rooms", flat.outline, draw_plan(flat, size))]
        drawn += [
            (f"{scene}_room_{i}", room.kind, room.label, room.floor, draw_room(room, size))
            for i, room in enumerate(flat.rooms, start=1)
        ]
        for name, kind, label, rect, classes in drawn:
            path = f"{IMAGES}/{name}.png"
            Image.fromarray(_RGB[classes]).save(folder / path)
            rows.append((path, scene, kind, label, f"{rect.width / 100:.2f}", f"{rect.height / 100:.2f}"))
        if progress is not None:
            progress(index + 1, scenes)
    with (folder / IMAGES_CSV).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def draw_scene(index: int, seed: int) -> Flat:
    """The flat of a scene; it depends on its own number and the seed alone."""
    ten, place = divmod(index, len(ROOMS))
    order = np.random.default_rng([seed, ORDER_STREAM, ten]).permutation(len(ROOMS))
    return draw_flat(ROOMS[order[place]], np.random.default_rng([seed, SCENE_STREAM, index]))


def draw_plan(flat: Flat, size: int) -> UInt8[np.ndarray, "s s"]:
    """Classes of the pixels of a flat, whose longer side spans all but a margin of the image."""
    margin = max(flat.outline.width, flat.outline.height) // 30
    return _paint(flat.rooms, flat.walls, flat.outline.grown(*[margin] * 4), size)


def draw_room(room: Room, size: int) -> UInt8[np.ndarray, "s s"]:
    """Classes of the pixels of a room with the walls around it, whose longer side spans the image."""
    return _paint([room], room.walls, room.outer, size)


def _paint(rooms: Sequence[Room], walls: Sequence[Rect], shown: Rect, size: int) -> UInt8[np.ndarray, "s s"]:
    """Things painted over each other, each at least one pixel wide and high, so that no wall has a gap."""
    pieces = [Piece(FLOORS[room.kind], room.floor) for room in rooms]
    pieces += [piece for room in rooms for piece in room.furniture]
    pieces += [Piece("wall", wall) for wall in walls]
    pieces += [piece for room in rooms for piece in room.openings]
    side = max(shown.width, shown.height)
    left, top = shown.left - (side - shown.width) // 2, shown.top - (side - shown.height) // 2

    def pixels(start: int, end: int) -> slice:  # borders are rounded alike, so that what adjoins there adjoins here
        first, last = ((2 * at * size + side) // (2 * side) for at in (start, end))
        return slice(first, last) if last > first else slice(start * size // side, start * size // side + 1)

    classes = np.full((size, size), _INDEX["outside"], np.uint8)
    for name, rect in pieces:
        classes[pixels(rect.top - top, rect.bottom - top), pixels(rect.left - left, rect.right - left)] = _INDEX[name]
    return classes
