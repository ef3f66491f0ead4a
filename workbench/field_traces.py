"""Fields over time at a few nodes as pixels, fast enough for a slider: matplotlib draws nothing here."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from workbench.plots import PALETTE

WIDTH, HEIGHT = 300, 220  # of the picture [px]
LEFT, TOP, RIGHT, BOTTOM = 48, 24, 10, 34  # margins around the curves [px]
FINER = 2  # curves are drawn on so many times as many pixels each way, and averaged
DASH, MOST_DASHES = 5, 60  # [px] at the least, and of one curve
DARKER = 0.5
FONT = 11  # [px]
FAR = 1e6  # from the upper end of the plot [fine px]
MARGIN = 0.05  # of the limits, above and below
INK, GRID, PAPER = (60, 60, 60), (225, 225, 225), (255, 255, 255)


class FieldTraces:
    """A decoded field at some nodes as solid lines over time, and a real one as dashed lines in a darker shade.

    What lies beyond the limits is cut off at the frame; a field of a single time step is a level line.

    Args:
        nodes: Numbers of the nodes, at most three, whose names stand side by side.
        limits: Values at the lower and the upper end, in the field's unit.
        steps: Time steps of a field.
        label: What the field is, with its unit.

    Attributes: `caption`, what is drawn, in words.
    """

    def __init__(self, nodes: Sequence[int], limits: tuple[float, float], steps: int, label: str) -> None:
        low, high = limits
        margin = MARGIN * (high - low) or abs(low) or 1.0
        self.nodes, self._low, self._high = list(nodes), low - margin, high + margin
        self.caption = f"{label} at nodes {', '.join(map(str, nodes))}: decoded solid, nearest sample dashed"
        self._size = FINER * (WIDTH - LEFT - RIGHT), FINER * (HEIGHT - TOP - BOTTOM)
        self._x = np.linspace(0, self._size[0], max(2, steps))
        self._colours = [tuple(round(255 * part) for part in PALETTE[i]) for i in range(len(self.nodes))]
        rows = _ticks(MaxNLocator(5), self._low, self._high)
        columns = _ticks(MaxNLocator(5, integer=True), 0, steps - 1)
        self._paper, self._plot = self._draw_paper(rows, columns, max(1, steps - 1)), self._draw_grid(rows)

    def draw(self, decoded: Float[np.ndarray, "t n"], real: Float[np.ndarray, "t n"]) -> UInt8[np.ndarray, "h w 3"]:
        """Both fields, in their unit, as pixels.

        Raises:
            ValueError: a value that is not finite.
        """
        plot = self._plot.copy()
        pen = ImageDraw.Draw(plot)
        for node, colour in zip(self.nodes, self._colours, strict=True):
            pen.line(self._place(decoded[:, node]).ravel().tolist(), colour, 2 * FINER)
        for node, colour in zip(self.nodes, self._colours, strict=True):
            shade = tuple(round(DARKER * part) for part in colour)
            for dash in dashes(self._place(real[:, node]), FINER * DASH, MOST_DASHES):
                pen.line(dash.ravel().tolist(), shade, round(1.5 * FINER))
        pixels = self._paper.copy()
        pixels[TOP : HEIGHT - BOTTOM, LEFT : WIDTH - RIGHT] = np.asarray(plot.reduce(FINER))
        return pixels

    def _row(self, values: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
        """Places of values from the top, in fine pixels."""
        return self._size[1] * (self._high - values) / (self._high - self._low)

    def _place(self, values: Float[np.ndarray, " t"]) -> Float[np.ndarray, "k 2"]:
        """Corners of a curve in fine pixels, brought near where they lie so far away that no line can be drawn to."""
        if not np.isfinite(values).all():
            raise ValueError("a field has values that are not finite: the model is broken; take a better checkpoint")
        rows = self._row(values).clip(-FAR, FAR)
        return np.stack([self._x, np.broadcast_to(rows, self._x.shape)], 1)

    def _draw_grid(self, rows: Float[np.ndarray, " r"]) -> Image.Image:
        plot = Image.new("RGB", self._size, PAPER)
        pen = ImageDraw.Draw(plot)
        for row in self._row(rows).tolist():
            pen.line([0, row, self._size[0], row], GRID, FINER)
        return plot

    def _draw_paper(
        self, rows: Float[np.ndarray, " r"], columns: Float[np.ndarray, " c"], last: int
    ) -> UInt8[np.ndarray, "h w 3"]:
        """What stands around the curves: nodes in their colours, numbers at the axes, the frame."""
        paper, font = Image.new("RGB", (WIDTH, HEIGHT), PAPER), ImageFont.load_default(FONT)
        pen, below = ImageDraw.Draw(paper), HEIGHT - BOTTOM
        for i, (node, colour) in enumerate(zip(self.nodes, self._colours, strict=True)):
            pen.text((LEFT + 82 * i, TOP / 2), f"node {node}", colour, font, "lm")
        for tick, row in zip(rows, self._row(rows), strict=True):
            pen.text((LEFT - 5, TOP + row / FINER), f"{tick:.4g}", INK, font, "rm")
        for tick in columns:
            at = LEFT + tick / last * (WIDTH - LEFT - RIGHT)
            pen.line([at, below, at, below + 3], INK)
            pen.text((at, below + 5), f"{tick:.0f}", INK, font, "ma")
        pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 2), "time step", INK, font, "md")
        pen.rectangle([LEFT - 1, TOP - 1, WIDTH - RIGHT, below], outline=INK)
        return np.array(paper)


def _ticks(locator: MaxNLocator, low: int | float, high: int | float) -> Float[np.ndarray, " k"]:
    """Round numbers of an axis, with a true zero."""
    ticks = locator.tick_values(low, high)
    ticks = np.where(np.abs(ticks) <= 1e-9 * (high - low), 0.0, ticks)
    return ticks[(low <= ticks) & (ticks <= high)]


def dashes(line: Float[np.ndarray, "k 2"], length: int | float, most: int) -> Iterator[Float[np.ndarray, "m 2"]]:
    """The drawn pieces of a dashed line: every second one, equally long along the line.

    Args:
        line: Corners.
        length: Of a piece and of a gap, at the least.
        most: Pieces at the most; they are longer where this many would not do.
    """
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])  # (k,)
    length = max(float(length), along[-1] / (2 * most))
    for start in np.arange(0, along[-1], 2 * length):
        end = min(start + length, along[-1])
        inside = np.searchsorted(along, start, "right"), np.searchsorted(along, end)
        ends = np.stack([np.interp([start, end], along, coordinate) for coordinate in line.T], 1)
        yield np.concatenate([ends[:1], line[slice(*inside)], ends[1:]])
