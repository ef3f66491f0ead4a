"""Furniture of the rooms of flats: what each kind of room holds, and places for it that leave doors and ways free.

Lengths are whole centimetres, x to the right and y downwards.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import label

TURNING = 90  # free floor behind a door, as deep
SIGHT = 60  # depth before a window that tall things keep out of
BODY = 60  # width of a way from door to door
GRID = 15  # on which ways are sought
OPTIONAL = 0.75  # chance of what a room need not have
REVERSED = 0.35  # chance that the last alternative is tried first


class Rect(NamedTuple):
    """A rectangle."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """From left to right."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """From top to bottom."""
        return self.bottom - self.top

    def meets(self, other: "Rect") -> bool:
        """Whether they have more than a border in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def grown(self, left: int, top: int, right: int, bottom: int) -> "Rect":
        """Each side moved outwards."""
        return Rect(self.left - left, self.top - top, self.right + right, self.bottom + bottom)


class Piece(NamedTuple):
    """A thing in the plan, by its class."""

    name: str
    rect: Rect


class Item(NamedTuple):
    """Pieces that stand together, within `width` along a wall and `depth` away from it, that no other may stand in."""

    width: int
    depth: int
    pieces: tuple[Piece, ...]  # x along the wall, y away from it
    where: str = "corner"  # or "middle" of a wall, or "free" in the room
    tall: bool = False  # not before a window
    label: str = ""  # of the room that holds it


def _one(
    name: str,
    size: tuple[int, int],
    access: int,
    where: str = "corner",
    tall: bool = False,
    label: str = "",
    side: int = 0,
) -> Item:
    """One piece against a wall, with free floor before it, `access` deep, and at its sides."""
    width, depth = size
    piece = Piece(name, Rect(side, 0, side + width, depth))
    return Item(width + 2 * side, depth + access, (piece,), where, tall, label)


def _dining(seats: tuple[int, ...], length: int) -> Item:
    """A free-standing table with seats on both long sides."""
    chairs = [Piece("seat", Rect(x, y, x + 45, y + 40)) for x in seats for y in (30, 160)]
    return Item(length + 60, 230, (*chairs, Piece("table", Rect(30, 70, 30 + length, 160))), "free")


DOUBLE_BED = Item(
    260,
    200,
    (
        Piece("bed", Rect(50, 0, 210, 200)),
        Piece("table", Rect(10, 0, 50, 40)),
        Piece("table", Rect(210, 0, 250, 40)),
    ),
    "middle",
    label="double bedroom",
)
SOFA = Item(220, 200, (Piece("seat", Rect(0, 0, 220, 90)), Piece("table", Rect(55, 130, 165, 190))), "middle")
DESK = Item(120, 120, (Piece("table", Rect(0, 0, 120, 60)), Piece("seat", Rect(40, 60, 80, 100))), "corner")
BREAKFAST = Item(
    160,
    115,
    (
        Piece("table", Rect(45, 0, 115, 110)),
        Piece("seat", Rect(5, 35, 45, 75)),
        Piece("seat", Rect(115, 35, 155, 75)),
    ),
    "middle",
    label="kitchen with table",
)
L_COUNTER = Item(270, 210, (Piece("cabinet", Rect(0, 0, 270, 60)), Piece("cabinet", Rect(0, 60, 60, 210))))
TUB = _one("sanitary", (170, 75), 55, label="bathroom with tub")
SHOWER = _one("sanitary", (90, 90), 50, label="bathroom with shower")
WARDROBES = tuple(_one("cabinet", (width, 60), 60, tall=True) for width in (240, 180, 120))
COUNTERS = (L_COUNTER, *(_one("cabinet", (width, 60), 100) for width in (300, 240, 180)))


class Wish(NamedTuple):
    """Alternatives, of which a room holds the first that has a place."""

    items: tuple[Item, ...]
    needed: bool = False


FURNITURE: dict[str, tuple[Wish, ...]] = {
    "living room": (
        Wish((SOFA,), True),
        Wish((_dining((45, 105), 135), _dining((52,), 90))),
        Wish(tuple(_one("cabinet", (width, 45), 45, "middle") for width in (180, 120))),
        Wish((_one("cabinet", (150, 40), 50, tall=True),)),
    ),
    "bedroom": (
        Wish((DOUBLE_BED, _one("bed", (200, 100), 60, label="single bedroom")), True),
        Wish(WARDROBES, True),
        Wish((DESK,)),
    ),
    "kitchen": (Wish(COUNTERS, True), Wish((BREAKFAST,))),
    "bathroom": (
        Wish((TUB, SHOWER), True),
        Wish((_one("sanitary", (40, 65), 50, side=15),), True),
        Wish((_one("sanitary", (60, 50), 50, "middle", side=5),), True),
        Wish((_one("cabinet", (60, 60), 50),)),
    ),
    "hall": (Wish((_one("cabinet", (150, 60), 0), _one("cabinet", (100, 40), 0))),),
}
KITCHENETTE = Wish((_one("cabinet", (240, 60), 100, label="living kitchen"),), True)
"""What a living room holds besides where the flat has no kitchen."""


def furnish(
    kind: str, wishes: Sequence[Wish], floor: Rect, openings: Sequence[Piece], rng: np.random.Generator
) -> tuple[str, list[Piece]] | None:
    """Find places for furniture in a room.

    Args:
        kind: The room's label where no item gives it another.
        wishes: What it is to hold, in the order of their choice of places.
        floor: The room clear of walls.
        openings: Doors and windows in its walls.

    Returns:
        The room's label, and the pieces; or None where something needed has no place.
    """
    doors, windows = ([p.rect for p in openings if p.name == name] for name in ("door", "window"))
    plan = _Plan(floor, [before(floor, r, TURNING) for r in doors], [before(floor, r, SIGHT) for r in windows], [], [])
    name = kind
    for wish in wishes:
        if not wish.needed and rng.random() > OPTIONAL:
            continue
        items = wish.items[::-1] if rng.random() < REVERSED else wish.items
        chosen = next((item for item in items if plan.place(item, rng)), None)
        if chosen is None and wish.needed:
            return None
        name = chosen.label or name if chosen else name
    return name, plan.pieces


def before(floor: Rect, opening: Rect, depth: int) -> Rect:
    """The floor before an opening in a wall of the room."""
    left, top, right, bottom = opening
    if bottom <= floor.top:
        return Rect(left, floor.top, right, floor.top + depth)
    if top >= floor.bottom:
        return Rect(left, floor.bottom - depth, right, floor.bottom)
    if right <= floor.left:
        return Rect(floor.left, top, floor.left + depth, bottom)
    return Rect(floor.right - depth, top, floor.right, bottom)


class _Plan(NamedTuple):
    """A room being furnished."""

    floor: Rect
    turnings: list[Rect]  # behind doors
    sights: list[Rect]  # before windows
    pieces: list[Piece]
    taken: list[Rect]  # by items, with the free floor that they need

    def place(self, item: Item, rng: np.random.Generator) -> bool:
        """Put an item at the first of its places that is free; false where there is none."""
        for pieces, taken in _places(item, self.floor, rng):
            if self._is_free(item, pieces, taken):
                self.pieces.extend(pieces)
                self.taken.append(taken)
                return True
        return False

    def _is_free(self, item: Item, pieces: list[Piece], taken: Rect) -> bool:
        kept = self.turnings + self.taken + (self.sights if item.tall else [])
        rects = [piece.rect for piece in pieces]
        if any(rect.meets(other) for rect in rects for other in kept):
            return False
        if any(taken.meets(piece.rect) for piece in self.pieces):
            return False
        return len(self.turnings) < 2 or self._ways_open(rects)

    def _ways_open(self, rects: list[Rect]) -> bool:
        """Whether someone as wide as BODY can still walk from every door to every other."""
        left, top, right, bottom = self.floor
        half = BODY // 2
        x, y = np.arange(left + half, right - half + 1, GRID), np.arange(top + half, bottom - half + 1, GRID)
        free = np.ones((len(y), len(x)), bool)
        for rect in (*rects, *(piece.rect for piece in self.pieces)):
            rows = slice(*np.searchsorted(y, (rect.top - half + 1, rect.bottom + half)))
            free[rows, slice(*np.searchsorted(x, (rect.left - half + 1, rect.right + half)))] = False
        parts, _ = label(free)
        at = [((r.top + r.bottom) // 2, (r.left + r.right) // 2) for r in self.turnings]
        reached = {int(parts[np.abs(y - row).argmin(), np.abs(x - column).argmin()]) for row, column in at}
        return len(reached) == 1 and 0 not in reached


def _places(item: Item, floor: Rect, rng: np.random.Generator) -> Iterator[tuple[list[Piece], Rect]]:
    """An item at its places in a room, the best first: its pieces, and all that it takes."""
    for side in rng.permutation(4).tolist():
        along, away = (floor.width, floor.height) if side % 2 == 0 else (floor.height, floor.width)
        slack, room = along - item.width, away - item.depth
        if slack < 0 or room < 0:
            continue
        anywhere = (5 * rng.integers(0, slack // 5 + 1, 2)).tolist()
        shifts = {"corner": [0, slack], "middle": [slack // 2], "free": []}[item.where] + anywhere
        if rng.random() < 0.5 and item.where == "corner":
            shifts[:2] = shifts[1::-1]
        for shift in shifts:
            off = int(rng.integers(0, room + 1)) // 5 * 5 if item.where == "free" else 0
            mirrored = 2 * shift > slack
            pieces = [Piece(p.name, _turned(p.rect, item, floor, side, shift, off, mirrored)) for p in item.pieces]
            yield pieces, _turned(Rect(0, 0, item.width, item.depth), item, floor, side, shift, off, mirrored)


def _turned(rect: Rect, item: Item, floor: Rect, side: int, shift: int, off: int, mirrored: bool) -> Rect:
    """From an item's coordinates to the room's: side 0 is its upper wall, 1 the right, 2 the lower, 3 the left."""
    start, end = (item.width - rect.right, item.width - rect.left) if mirrored else (rect.left, rect.right)
    start, end, near, far = start + shift, end + shift, rect.top + off, rect.bottom + off
    match side:
        case 0:
            return Rect(floor.left + start, floor.top + near, floor.left + end, floor.top + far)
        case 1:
            return Rect(floor.right - far, floor.top + start, floor.right - near, floor.top + end)
        case 2:
            return Rect(floor.left + start, floor.bottom - far, floor.left + end, floor.bottom - near)
        case _:
            return Rect(floor.left + near, floor.top + start, floor.left + far, floor.top + end)
