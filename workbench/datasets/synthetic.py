"""The embedded data set `pushing`: rendered table-top clips whose true factors are known.

One object (shape, colour, size, position, angle, height) lies on a table, and one pusher does one of eight
actions to it. Lengths are fractions of the image side, x to the right and y downwards, so that a scene looks
the same at every pixel size. Angles are in radians, counter-clockwise as seen in the picture. A lifted object
rises in the picture (y falls) and leaves its shadow behind.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from workbench.datasets.generated import write_once

Array = np.ndarray
VERSION = 1  # raise it when the same seed no longer gives the same bytes
MANIFEST, CONDITIONS_CSV, ACTIONS_CSV = "pushing.json", "conditions.csv", "actions.csv"
SHAPES = ("disc", "square", "triangle")
# Where the pusher is, seen from the object: counter-clockwise from the right-hand side.
PUSHES = {"push_left": 0.0, "push_right": np.pi, "push_away": -np.pi / 2, "push_near": np.pi / 2}
ACTIONS = (*PUSHES, "lift", "turn_left", "turn_right", "no_contact")
LOOKS = ("shape_disc", "shape_square", "shape_triangle", "red", "green", "blue", "size")
CONDITIONS = (*LOOKS, "x", "y", "height", "angle", "pusher_x", "pusher_y", "light")
CHANGES = ("dx", "dy", "dheight", "dangle")

TABLE_STREAM, ORDER_STREAM, CLIP_STREAM = 1, 2, 3  # each random stream has its own number beside the seed
PALETTE = np.array(  # red, yellow, green, blue, purple, cyan
    [(0.80, 0.14, 0.13), (0.86, 0.72, 0.10), (0.16, 0.56, 0.20)]
    + [(0.12, 0.27, 0.80), (0.52, 0.16, 0.62), (0.10, 0.70, 0.76)]
)
POLYGONS = {"square": (4, 0.88, np.pi / 4), "triangle": (3, 0.71, 0.0)}  # sides, inner radius, first corner
ROUND = 0.12  # radius of their corners; all lengths down to MARK are in units of the object's size
REACH = {"disc": 1.0, "square": 1.2, "triangle": 1.3}  # farthest point of a shape from its centre
MARK = (0.42, 0.74, 0.14)  # bar on the object that shows its angle: from, to, radius
KNOB, ARM = 0.064, 0.036  # radii of the pusher's end and of its arm
RISE, GROWTH = 0.18, 0.22  # at height 1: way up in the picture, and relative growth of the object
SHADOW = np.array([0.014, 0.03])  # from a thing on the table to its shadow


class Clip(NamedTuple):
    """All factors of one clip; t runs over its frames."""

    shape: str
    rgb: Array  # (3,)
    size: float  # radius of the disc; the other shapes cover about the same area
    light: float  # gain in the middle of the picture
    slope: Array  # (2,) relative gain from one border to the other along x and y
    centre: Array  # (t, 2) of the object, in the picture
    height: Array  # (t,)
    angle: Array  # (t,)
    pusher: Array  # (t, 2) middle of the knob
    ahead: Array  # (2,) unit vector along the arm towards the knob


def write_pushing(
    folder: Path,
    clips: int = 400,
    frames: int = 16,
    size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set `pushing`: JPEG folders with their truth beside them.

    The folder holds `clip_00000/img_00001.jpg` and so on, `conditions.csv` (clip, frame, true factors of the
    frame), `actions.csv` (clip, action, change from the first frame to the last) and `pushing.json`. It gets
    its name only when complete; a folder written with the same settings is returned untouched.

    Args:
        folder: Where the set goes; `<folder>.partial` is used while writing.
        clips: Number of clips.
        frames: Frames per clip.
        size: Side of the square pictures [px].
        seed: Start of every random stream; the same seed gives the same bytes.
        progress: Called after each clip with the numbers of clips done and in all.

    Returns:
        The folder.

    Raises:
        ValueError: A number is too small.
        FileExistsError: The folder exists and is not this set, or `<folder>.partial` holds foreign files.
    """
    folder = Path(folder)
    settings = {"clips": clips, "frames": frames, "size": size, "seed": seed}
    for (name, value), minimum in zip(settings.items(), (1, 2, 16, 0), strict=True):
        if value < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}")
    manifest = {"generator": "pushing", "version": VERSION, **settings}
    return write_once(folder, manifest, _is_own, lambda partial: _write_set(partial, manifest, progress))


def _is_own(name: str) -> bool:
    return name.startswith("clip_") or name in (MANIFEST, CONDITIONS_CSV, ACTIONS_CSV)


def _write_set(folder: Path, manifest: dict, progress: Callable[[int, int], None] | None) -> None:
    clips, seed = manifest["clips"], manifest["seed"]
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    table = _table(manifest["size"], np.random.default_rng([seed, TABLE_STREAM]))
    order = np.random.default_rng([seed, ORDER_STREAM]).permutation(clips) % len(ACTIONS)
    conditions, actions = [("clip", "frame", *CONDITIONS)], [("clip", "action", "action_id", *CHANGES)]
    for index, action_id in enumerate(order):
        name, action = f"clip_{index:05d}", ACTIONS[action_id]
        clip = _draw_clip(action, manifest["frames"], np.random.default_rng([seed, CLIP_STREAM, index]))
        (folder / name).mkdir()
        truth = _truth(clip)
        for t, picture in enumerate(_render(clip, table), start=1):
            Image.fromarray(picture).save(folder / name / f"img_{t:05d}.jpg", quality=92, subsampling=0)
            conditions.append((name, t, *truth[t - 1].tolist()))
        change = (truth[-1] - truth[0])[[CONDITIONS.index(column[1:]) for column in CHANGES]]
        actions.append((name, action, action_id, *(np.round(change, 5) + 0.0).tolist()))
        if progress is not None:
            progress(index + 1, clips)
    for path, rows in ((folder / CONDITIONS_CSV, conditions), (folder / ACTIONS_CSV, actions)):
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def _truth(clip: Clip) -> Array:
    """Factors (t, CONDITIONS), rounded as they are written."""
    looks = [*(clip.shape == shape for shape in SHAPES), *clip.rgb, clip.size]
    moving = np.column_stack([clip.centre, clip.height, clip.angle, clip.pusher])
    return np.round([[*looks, *row, clip.light] for row in moving], 5) + 0.0  # + 0.0 turns -0.0 into 0.0


def _draw_clip(action: str, frames: int, rng: np.random.Generator) -> Clip:
    shape = SHAPES[rng.integers(len(SHAPES))]
    rgb = PALETTE[rng.integers(len(PALETTE))] + rng.uniform(-0.04, 0.04, 3)
    size = rng.uniform(0.11, 0.165)
    light, slope = rng.uniform(0.86, 1.06), rng.uniform(0.0, 0.14) * _unit(rng.uniform(-np.pi, np.pi))
    contact, end = rng.uniform(0.15, 0.3), rng.uniform(0.78, 0.92)  # in units of the clip's duration
    time = np.linspace(0.0, 1.0, frames)
    done = _ease((time - contact) / (end - contact))  # (t,) part of the change, 0 to 1

    shift, rise, turn = _draw_change(action, rng)
    margin = REACH[shape] * size * (1 + GROWTH * rise) + 0.01
    low, high = margin - np.minimum(shift, 0), 1 - margin - np.maximum(shift, 0)
    if action not in PUSHES:
        high[1] -= 2 * KNOB  # room for the pusher on the near side
    centre = rng.uniform(low, high) + done[:, None] * shift
    angle = rng.uniform(-0.6, 0.6) + done * turn
    still = Clip(shape, rgb, size, light, slope, centre, done * rise, angle, centre, np.zeros(2))
    if action == "no_contact":
        pusher, ahead = _pass_by(still, _ease(time / end), rng)
    else:
        pusher, ahead = _touch(still, action, 1 - _ease(time / contact), rng)
    return still._replace(pusher=pusher, ahead=ahead)


def _draw_change(action: str, rng: np.random.Generator) -> tuple[Array, float, float]:
    """Change of the object over the clip: shift (2,) in the picture, height, angle."""
    if action in PUSHES:
        ahead = -_unit(PUSHES[action])
        shift = rng.uniform(0.15, 0.35) * ahead + rng.uniform(-0.03, 0.03) * ahead[::-1]
        return shift, 0.0, rng.uniform(-0.15, 0.15)
    if action == "lift":
        rise = rng.uniform(0.5, 1.0)
        return np.array([0.0, -RISE * rise]), rise, 0.0
    sign = {"turn_left": 1, "turn_right": -1, "no_contact": 0}[action]
    return np.zeros(2), 0.0, sign * np.deg2rad(rng.uniform(40, 120))


def _touch(clip: Clip, action: str, gap: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Knob (t, 2) that comes up to the object while gap falls from 1 to 0 and stays at its edge; ahead."""
    middle = PUSHES[action] if action in PUSHES else -np.pi / 2 + rng.uniform(-0.4, 0.4)
    side = np.full(len(gap), middle)
    if action.startswith("turn"):  # the knob goes round with the object, half before and half after middle
        side += clip.angle - (clip.angle[0] + clip.angle[-1]) / 2
    outward, radius = _unit(side), clip.size * (1 + GROWTH * clip.height)
    distance = REACH[clip.shape] * radius + KNOB
    for _ in range(24):  # go inwards by the free distance until the knob touches
        x, y = (distance[:, None] * outward).T
        distance = distance - (_shape_distance(clip.shape, x, y, clip.angle, radius) - KNOB)
    grip = 0.05 if action == "lift" else 0.0  # the knob reaches over the edge of what it lifts
    distance += rng.uniform(0.18, 0.28) * gap - grip * (1 - gap)
    return clip.centre + distance[:, None] * outward, -_unit(middle)


def _pass_by(clip: Clip, done: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Knob (t, 2) that goes straight past the object, on the side with more room; ahead."""
    ahead = _unit(rng.integers(4) * np.pi / 2)
    to_middle = np.full(2, 0.5) - clip.centre[0]
    across = ahead[::-1] * np.sign(ahead[::-1] @ to_middle)
    clearance = REACH[clip.shape] * clip.size + KNOB + rng.uniform(0.03, 0.07)
    along = to_middle @ ahead + rng.uniform(-0.55, -0.4) + done * rng.uniform(0.75, 0.9)
    return clip.centre + clearance * across + along[:, None] * ahead, ahead


def _ease(s: Array) -> Array:
    s = np.clip(s, 0.0, 1.0)
    return s * s * (3 - 2 * s)


def _unit(angle: float | Array) -> Array:
    return np.stack([np.cos(angle), -np.sin(angle)], axis=-1)


def _render(clip: Clip, table: Array) -> Array:
    """Bytes (t, h, w, 3) of all frames of a clip, painted from the table upwards."""
    grid = _grid(len(table[0]))

    def seen_from(points: Array) -> Array:  # (t, 2) -> pixel positions (2, t, h, w)
        return grid[:, None] - _over_pixels(points.T)

    def object_at(points: Array) -> Array:  # (t, 2) -> signed distances (t, h, w)
        return _shape_distance(clip.shape, *seen_from(points), angle, radius)

    height, angle = _over_pixels(clip.height), _over_pixels(clip.angle)  # (t, 1, 1)
    radius = np.float32(clip.size) * (1 + np.float32(GROWTH) * height)
    foot = clip.centre + SHADOW + np.outer(clip.height, (0.07, RISE + 0.01))
    arm, mark = _over_pixels(-clip.ahead[:, None]), _over_pixels(_unit(clip.angle).T)  # (2, t, 1, 1)
    knob = np.hypot(*seen_from(clip.pusher))
    paint = np.repeat(table[None], len(height), axis=0)  # (t, 3, h, w)
    _cover(paint, 0.08, _bar_distance(seen_from(clip.pusher + SHADOW), arm, 0.0, 2.0) - ARM, 0.4, 0.06)
    _cover(paint, 0.08, object_at(foot), 0.55, 0.05 + 0.1 * height)
    _cover(paint, 0.6 * clip.rgb, object_at(clip.centre + (0.0, 0.02)))  # its side, below its top
    _cover(paint, clip.rgb, object_at(clip.centre))
    bar = _bar_distance(seen_from(clip.centre), mark, MARK[0] * radius, MARK[1] * radius)
    _cover(paint, 0.93, bar - MARK[2] * radius)
    arm = _bar_distance(seen_from(clip.pusher), arm, 0.0, 2.0)
    _cover(paint, 0.22, np.minimum(arm - ARM, knob - KNOB))
    _cover(paint, 0.8, knob - 0.7 * KNOB)
    light = clip.light * (1 + np.tensordot(clip.slope, grid - 0.5, 1))  # (h, w)
    paint *= light.astype(np.float32)
    return (np.clip(paint, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _cover(paint: Array, colour: float | Array, distance: Array, opacity=1.0, blur=0.0) -> None:
    """Lay a colour over paint (t, 3, h, w), in place, where distance (t, h, w) is negative."""
    width = np.maximum(blur, 1.2 / len(paint[0, 0])).astype(np.float32)
    cover = np.float32(opacity) * _ease(0.5 - distance / width)
    paint += cover[:, None] * (_over_pixels(np.atleast_1d(colour)) - paint)


def _shape_distance(shape: str, x: Array, y: Array, angle: Array, radius: Array) -> Array:
    """Signed distance from (x, y) to the edge of a turned shape around the origin, negative inside."""
    far = np.hypot(x, y)
    if shape == "disc":
        return far - radius
    sides, inner, corner = POLYGONS[shape]
    half = np.pi / sides  # fold the plane onto the sector of one side, whose middle is at bearing 0
    bearing = np.mod(np.arctan2(-y, x) - angle - corner, 2 * half) - half
    inner = (inner - ROUND) * radius
    across = far * np.cos(bearing) - inner
    beyond = np.abs(far * np.sin(bearing)) - inner * np.float32(np.tan(half))
    return np.where(beyond > 0, np.hypot(across, beyond), across) - ROUND * radius


def _bar_distance(p: Array, along: Array, start: float | Array, stop: float | Array) -> Array:
    """Distance from p (2, t, h, w) to the piece from start to stop of a line along (2, t, 1, 1)."""
    nearest = np.clip((p * along).sum(0), start, stop)
    return np.hypot(*(p - nearest * along))


def _table(size: int, rng: np.random.Generator) -> Array:
    """Four planks with a faint grain (3, h, w)."""
    x, y = _grid(size)
    tone = rng.uniform(-0.025, 0.025, 4)[(y * 4).astype(int)]
    for _ in range(12):
        bend = rng.uniform(0.0, 0.04) * np.sin(2 * np.pi * (x + rng.uniform()))
        waves = rng.uniform(0.0, 1.5) * x + rng.uniform(3.0, 16.0) * (y + bend)
        tone += 0.004 * np.sin(2 * np.pi * (waves + rng.uniform()))
    tone -= 0.06 * _ease(1 - np.abs(y - np.round(y * 4) / 4) * 60) * (np.abs(y - 0.5) < 0.4)
    return _over_pixels(np.array([0.66, 0.60, 0.53])) + tone.astype(np.float32)


def _grid(size: int) -> Array:
    """Picture coordinates x and y of the pixel centres (2, h, w)."""
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.stack(np.meshgrid(ticks, ticks))


def _over_pixels(values: Array) -> Array:
    return values[..., None, None].astype(np.float32)
