"""Plans of flats: rooms cut out of a rectangle, with doors, windows and furniture, at random but liveable.

Lengths are whole centimetres, x to the right and y downwards, so that everything is exact. A drawn flat is kept only
where every room has a sensible size, can be reached without crossing a bedroom, a bathroom or a kitchen, has a window
where it needs one, and holds the furniture that it must.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from workbench.datasets.furniture import FURNITURE, KITCHENETTE, Piece, Rect, furnish

MODULE = 30  # walls between rooms lie on this grid
OUTER, INNER = 30, 12  # thickness of walls
DOOR, ENTRANCE = 90, 100  # widths
JAMB = 15  # least wall beside an opening
DAYLIGHT = ("living room", "bedroom", "kitchen")  # rooms that need a window


class Kind(NamedTuple):
    """What a room must be like, clear of walls."""

    area: tuple[float, float]  # [m^2]
    width: int  # at least
    slender: float  # length to width, at most


KINDS = {
    "living room": Kind((15, 32), 330, 1.7),
    "bedroom": Kind((9, 19), 270, 1.6),
    "kitchen": Kind((6, 13), 200, 2.0),
    "bathroom": Kind((4, 8), 165, 2.0),
    "hall": Kind((3.5, 11), 115, 6.0),
}
PROGRAMMES = {
    3: ("living room", "bedroom", "bathroom"),
    4: ("living room", "kitchen", "bedroom", "bathroom"),
    5: ("hall", "living room", "kitchen", "bedroom", "bathroom"),
    6: ("hall", "living room", "kitchen", "bedroom", "bedroom", "bathroom"),
}
"""The rooms of a flat by their number. The entrance is in the first, and doors lead from there to the others."""


class Room(NamedTuple):
    """A room of a flat."""

    kind: str
    label: str  # the kind, or what tells rooms of a kind apart
    floor: Rect  # clear of walls
    outer: Rect  # the floor and the walls around it
    walls: list[Rect]  # these
    openings: list[Piece]  # doors and windows in them
    furniture: list[Piece]


class Flat(NamedTuple):
    """A flat; the entrance is the first opening of its first room."""

    outline: Rect
    walls: list[Rect]
    rooms: list[Room]


class _Wall(NamedTuple):
    """A wall between two rooms."""

    rooms: tuple[int, int]
    rect: Rect  # as far as through the walls that it meets
    upright: bool

    @property
    def length(self) -> int:
        return self.rect.height if self.upright else self.rect.width


def draw_flat(n_rooms: int, rng: np.random.Generator) -> Flat:
    """Draw flats until one is liveable.

    Args:
        n_rooms: A key of `PROGRAMMES`.
        rng: Where chance comes from; the same state gives the same flat.
    """
    while True:
        flat = _try_flat(PROGRAMMES[n_rooms], rng)
        if flat is not None:
            return flat


def _try_flat(kinds: Sequence[str], rng: np.random.Generator) -> Flat | None:
    inside, cells = _cells([rng.uniform(*KINDS[kind].area) for kind in kinds], rng)
    if not all(_fits(_floor(cell, inside), KINDS[kind]) for cell, kind in zip(cells, kinds, strict=True)):
        return None
    cells = _mirrored(cells, inside, *(rng.random(2) < 0.5).tolist())
    floors = [_floor(cell, inside) for cell in cells]
    walls = _walls(cells)
    openings: list[list[Piece]] = [[] for _ in kinds]
    if not (
        _add_entrance_and_windows(kinds, floors, inside, openings, rng) and _add_doors(kinds, walls, openings, rng)
    ):
        return None
    rooms = []
    for kind, floor, own in zip(kinds, floors, openings, strict=True):
        wishes = FURNITURE[kind]
        if kind == "living room" and "kitchen" not in kinds:
            wishes = (KITCHENETTE, *wishes)
        furnished = furnish(kind, wishes, floor, own, rng)
        if furnished is None:
            return None
        outer = floor.grown(*(OUTER if a == b else INNER for a, b in zip(floor, inside, strict=True)))
        rooms.append(Room(kind, furnished[0], floor, outer, _around(floor, outer), own, furnished[1]))
    outline = inside.grown(*[OUTER] * 4)
    return Flat(outline, [wall.rect for wall in walls] + _around(inside, outline), rooms)


def _around(inner: Rect, outer: Rect) -> list[Rect]:
    """Four walls, whose inner faces are one rectangle and whose outer faces another."""
    beside = outer._replace(right=inner.left), outer._replace(left=inner.right)
    return [*beside, outer._replace(bottom=inner.top), outer._replace(top=inner.bottom)]


def _cells(areas: list[float], rng: np.random.Generator) -> tuple[Rect, list[Rect]]:
    """The inside of the outer walls, and its cells, one for each area, up to the middle of the walls between them."""
    whole = 1.08e4 * sum(areas)  # cm^2; the walls take a share
    long = np.sqrt(whole * rng.uniform(1.0, 1.45))
    width, height = (MODULE * round(side / MODULE) for side in (long, whole / long))
    inside = Rect(0, 0, width, height) if rng.random() < 0.5 else Rect(0, 0, height, width)
    if len(areas) > 5 or (len(areas) == 5 and rng.random() < 0.5):
        order = np.concatenate([[0, 1], rng.permutation(np.arange(2, len(areas)))])
        parts = _cut_along_hall(inside, np.array(areas)[order], rng)
    else:
        order = rng.permutation(len(areas))
        parts = _cut(inside, np.array(areas)[order], rng)
    return inside, [cell for _, cell in sorted(zip(order.tolist(), parts, strict=True))]


def _mirrored(cells: list[Rect], inside: Rect, across: bool, along: bool) -> list[Rect]:
    _, _, width, height = inside
    if across:
        cells = [cell._replace(left=width - cell.right, right=width - cell.left) for cell in cells]
    if along:
        cells = [cell._replace(top=height - cell.bottom, bottom=height - cell.top) for cell in cells]
    return cells


def _cut_along_hall(rect: Rect, areas: np.ndarray, rng: np.random.Generator) -> Iterator[Rect]:
    """A hall between two rows of rooms, and a living room across its end; hall and living room are given first."""
    upright = rect.width > rect.height
    split = 2 + int(rng.integers(1, len(areas) - 2))
    upper, lower = _split(rect, 1 - areas[split:].sum() / areas.sum(), not upright)
    row, living = _split(upper, 1 - areas[1] / areas[:split].sum(), upright)
    row, hall = _split(row, 1 - 5 * MODULE / (row.height if upright else row.width), not upright)
    yield hall
    yield living
    for cells, sizes in ((row, areas[2:split]), (lower, areas[split:])):
        for i, size in enumerate(sizes[:-1]):
            cell, cells = _split(cells, size / sizes[i:].sum(), upright)
            yield cell
        yield cells


def _cut(rect: Rect, areas: np.ndarray, rng: np.random.Generator) -> Iterator[Rect]:
    """A rectangle cut in two again and again, each part as large as the areas that fall to it."""
    if len(areas) == 1:
        yield rect
        return
    first = int(rng.integers(1, len(areas)))
    share = areas[:first].sum() / areas.sum()
    parts = _split(rect, share, rng.random() < (0.8 if rect.width > rect.height else 0.2))
    yield from _cut(parts[0], areas[:first], rng)
    yield from _cut(parts[1], areas[first:], rng)


def _split(rect: Rect, share: float, upright: bool) -> tuple[Rect, Rect]:
    """Two parts, the first with about this share; upright: beside each other."""
    if upright:
        at = rect.left + MODULE * round(share * rect.width / MODULE)
        return rect._replace(right=at), rect._replace(left=at)
    at = rect.top + MODULE * round(share * rect.height / MODULE)
    return rect._replace(bottom=at), rect._replace(top=at)


def _floor(cell: Rect, inside: Rect) -> Rect:
    """What walls leave of a cell: half the thickness of each wall between rooms is the cell's own."""
    return cell.grown(*(0 if a == b else -INNER // 2 for a, b in zip(cell, inside, strict=True)))


def _fits(floor: Rect, kind: Kind) -> bool:
    short, long = sorted((floor.width, floor.height))
    return short >= kind.width and long <= kind.slender * short and kind.area[0] <= short * long / 1e4 <= kind.area[1]


def _walls(cells: list[Rect]) -> list[_Wall]:
    walls, half = [], INNER // 2
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            top, bottom = max(a.top, b.top) - half, min(a.bottom, b.bottom) + half
            left, right = max(a.left, b.left) - half, min(a.right, b.right) + half
            if a.right == b.left and bottom - top > INNER:
                walls.append(_Wall((i, j), Rect(left, top, right, bottom), True))
            elif a.bottom == b.top and right - left > INNER:
                walls.append(_Wall((i, j), Rect(left, top, right, bottom), False))
    return walls


def _add_doors(kinds: Sequence[str], walls: list[_Wall], openings: list[list[Piece]], rng: np.random.Generator) -> bool:
    """A door to each room from the first, or to the kitchen from the living room; false where a wall is too short."""
    joined = {pair: wall for wall in walls for pair in (wall.rooms, wall.rooms[::-1])}
    margin = INNER + JAMB
    for i, kind in enumerate(kinds[1:], start=1):
        others = (0, kinds.index("living room")) if kind == "kitchen" else (0,)
        near = (joined[other, i] for other in others if (other, i) in joined)
        wall = next((wall for wall in near if wall.length >= DOOR + 2 * margin), None)
        if wall is None:
            return False
        last = wall.length - margin - DOOR
        at = (margin, last, (margin + last) // 2)[rng.choice(3, p=(0.4, 0.4, 0.2))]
        left, top, right, bottom = wall.rect
        across = Rect(left, top + at, right, top + at + DOOR)
        door = Piece("door", across if wall.upright else Rect(left + at, top, left + at + DOOR, bottom))
        for room in wall.rooms:
            openings[room].append(door)
    return True


def _add_entrance_and_windows(
    kinds: Sequence[str], floors: list[Rect], inside: Rect, openings: list[list[Piece]], rng: np.random.Generator
) -> bool:
    """The entrance, and windows in the other outer walls; false where a room would lack what it needs."""
    sides = [[side for side in range(4) if floor[side] == inside[side]] for floor in floors]
    for front in rng.permutation(sides[0]).tolist():
        spans = [
            [_span(floor, side) for side in own if side != front] for floor, own in zip(floors, sides, strict=True)
        ]
        low, high = _span(floors[0], front)
        dark = [k for k, s in zip(kinds, spans, strict=True) if k in DAYLIGHT and not any(b - a >= 150 for a, b in s)]
        if dark or high - low < ENTRANCE + 2 * JAMB:
            continue
        at = int(rng.integers(low + JAMB, high - JAMB - ENTRANCE + 1)) // 5 * 5
        openings[0].append(Piece("door", _in_outer_wall(inside, front, at, at + ENTRANCE)))
        for kind, floor, own, found in zip(kinds, floors, sides, openings, strict=True):
            found += _windows(kind, floor, [side for side in own if side != front], inside, rng)
        return True
    return False


def _windows(kind: str, floor: Rect, sides: list[int], inside: Rect, rng: np.random.Generator) -> list[Piece]:
    """One window in the longest wall, perhaps others."""
    found = []
    for side in sorted(sides, key=lambda side: _span(floor, side)[0] - _span(floor, side)[1]):
        low, high = _span(floor, side)
        if kind in DAYLIGHT:
            wide = min(max(MODULE * round(0.5 * (high - low) / MODULE), 90), 240)
            wanted = not found or rng.random() < (0.8 if kind == "living room" else 0.3)
        else:
            wide, wanted = 60, not found and rng.random() < 0.7
        if wanted and high - low >= wide + 2 * JAMB:
            at = (low + high - wide) // 2
            found.append(Piece("window", _in_outer_wall(inside, side, at, at + wide)))
    return found


def _span(floor: Rect, side: int) -> tuple[int, int]:
    """From where to where a side of a room runs; sides are counted as a Rect names them."""
    return (floor.top, floor.bottom) if side in (0, 2) else (floor.left, floor.right)


def _in_outer_wall(inside: Rect, side: int, start: int, end: int) -> Rect:
    """An opening through the outer wall."""
    left, top, right, bottom = inside
    return (
        Rect(left - OUTER, start, left, end),
        Rect(start, top - OUTER, end, top),
        Rect(right, start, right + OUTER, end),
        Rect(start, bottom, end, bottom + OUTER),
    )[side]
