"""The latent explorer in JupyterLab and Chromium, of a convolutional VAE on two cores."""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.lab import chromium, jupyterlab, missing, open_notebook, run_all, write_notebook
from benchmarks.report import in_turns, line, run
from workbench.datasets.clips import ClipDataset, ClipsConfig, open_clips
from workbench.datasets.synthetic import write_pushing
from workbench.explorer_widget import LatentExplorer
from workbench.field_traces import FieldTraces
from workbench.latent_explorer import explore
from workbench.layers import Posterior
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.runs import Run

if TYPE_CHECKING:
    from playwright.sync_api import Page

THREADS = 2
STAGES = {64: [32, 64, 128], 128: [32, 64, 128, 256]}
"""Channels by side of the frames [px]: those of params/demo, and a stage more."""
LATENT_DIM, SPREAD = 32, 10.0  # far latents, so that what an untrained decoder makes of them differs
POINTS, MANY = 1000, 100_000
PRESSES, MAX_KEY_MS = 40, 60
MOVES, SLOW_S, MAX_SETTLE_S = 300, 0.17, 0.5
MAX_PAINT_S, MAX_HOVER_MS = 2, 100
STEPS, NODES, MIN_FASTER = 500, 3, 3  # of fields over time, and than matplotlib draws them
SIDE, RADIUS = 420, 100  # of the map, and of the moves around its middle [px]
PAUSE_MS, REST_MS = 60, 1500  # between two events, and until all has come to rest
CELL = "from benchmarks.bench_explorer import explorer\nexplorer(size={}, points={}, slow_s={})"
ARRIVAL = """
window.WebSocket = class extends WebSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) => data.byteLength > 1e6 && (window.arrived ??= performance.now()));
  }
};
const look = () => {
  if (!document.querySelector(".latent-explorer[data-answered]")) return requestAnimationFrame(look);
  requestAnimationFrame(() => setTimeout(() => (window.painted = performance.now())));
};
addEventListener("load", look);
"""
WATCH = """
const root = document.querySelector(".latent-explorer"), canvas = root.querySelector(".lx-picture canvas");
const sum = () =>
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.reduce((s, v) => (s * 31 + v) | 0, 0);
const seen = (window.seen = { moves: 0, answers: 0 });
const begin = (event) => Object.assign(seen, { before: sum(), began: event.timeStamp, changed: null });
addEventListener("keydown", begin, { capture: true });
addEventListener("pointermove", (event) => begin(event, (seen.moves += 1)), { capture: true });
new MutationObserver(() => {
  seen.answers += 1;
  seen.settled = performance.now() - seen.began;
  if (sum() !== seen.before) seen.changed ??= seen.settled;
}).observe(root, { attributeFilter: ["data-answered"] });
"""


def explorer(size: int, points: int, slow_s: float) -> LatentExplorer:
    """What a cell of the notebook shows: an explorer of an untrained VAE, its decoder slowed."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = ConvVAE(ConvVAEConfig(image_size=size, latent_dim=LATENT_DIM, hidden_dims=STAGES[size])).eval()
    decode = model.decode
    model.decode = lambda z: (time.sleep(slow_s), decode(z))[1]
    folder = Path(f"clips-{size}")
    settings = {"data": str(write_pushing(folder / "pushing", 80, 16, size)), "cache_dir": str(folder / "cache")}
    data = open_clips(ClipsConfig(image_size=size, **settings))
    train = data.split("train")
    samples = ClipDataset(data, *(np.resize(rows, (points, *rows.shape[1:])) for rows in (train.slots, train.segment)))
    posterior = Posterior(SPREAD * torch.randn(points, LATENT_DIM), torch.zeros(points, LATENT_DIM))
    return explore(model, samples, posterior, data, Run(folder), pins=[0, 1])


class Watched:
    """Notebooks with one explorer each, opened one after the other in a page that is watched."""

    def __init__(self, page: "Page", address: str, folder: Path) -> None:
        self.page, self.address, self.folder = page, address, folder

    def open(self, size: int, points: int = POINTS, slow_s: float = 0.0) -> None:
        """Open a notebook with an explorer, see there."""
        name = f"{size}-{points}-{slow_s}.ipynb"
        write_notebook(self.folder / name, CELL.format(size, points, slow_s))
        open_notebook(self.page, self.address.format(name))
        assert run_all(self.page), "the cell has failed"
        self.area = self.page.locator(".latent-explorer[data-answered] .lx-area")
        self.area.wait_for()
        self.page.wait_for_timeout(REST_MS)
        self.page.evaluate(f"() => {{{WATCH}}}")

    def changed(self, act: Callable[[], object]) -> float:
        """Milliseconds from an event to changed pixels."""
        self.page.evaluate("seen.changed = null")
        act()
        self.page.wait_for_function("seen.changed !== null", polling=20, timeout=10_000)
        self.page.wait_for_timeout(PAUSE_MS)
        return self.page.evaluate("seen.changed")

    def press(self) -> float:
        """A step of the slider from A to B."""
        return self.changed(lambda: self.page.keyboard.press("ArrowRight"))

    def hover(self, i: int) -> float:
        """A move of the mouse to the i-th place."""
        x, y = place(i)
        return self.changed(lambda: self.area.hover(position={"x": x, "y": y}, force=True))

    def flood(self) -> float:
        """Milliseconds from the last of many moves, one right after the other, to the last picture."""
        box = self.area.bounding_box()
        for i in range(MOVES):
            x, y = place(i)
            self.page.mouse.move(box["x"] + x, box["y"] + y)
        self.page.wait_for_timeout(REST_MS)
        return self.page.evaluate("seen.settled")


def place(i: int) -> tuple[float, float]:
    """The i-th of places around the middle of the map, each far from the one before [px]."""
    angle, radius = 2.4 * i, RADIUS * (0.5 + 0.5 * (0.618 * i % 1))
    return SIDE / 2 + radius * math.cos(angle), SIDE / 2 + radius * math.sin(angle)


def report_presses(watched: Watched) -> None:
    """From key press to changed pixels, at each size."""
    for size in STAGES:
        watched.open(size)
        watched.page.locator(".latent-explorer input[type=range]").first.focus()
        taken = [watched.press() for _ in range(PRESSES)]
        median, what = statistics.median(taken), f"{size} px: key press to changed pixels, median of {PRESSES}"
        line(what, f"{median:.0f} ms ({min(taken):.0f}-{max(taken):.0f})", f"{MAX_KEY_MS} ms", median < MAX_KEY_MS)


def report_flood(watched: Watched) -> None:
    """How long after many moves of the mouse a slow decoder comes to rest, and that it shows the last of them."""
    watched.open(64, slow_s=SLOW_S)
    caption = watched.page.locator(".latent-explorer figcaption").first
    watched.hover(MOVES - 1)
    last = caption.inner_text()
    watched.hover(0)
    watched.page.evaluate("Object.assign(seen, {moves: 0, answers: 0})")
    settled = watched.flood() / 1000
    moves, answers = watched.page.evaluate("[seen.moves, seen.answers]")
    ok = settled < MAX_SETTLE_S and caption.inner_text() == last and moves == MOVES
    what = f"decoder of {1000 * SLOW_S:.0f} ms: {moves} mouse moves, {answers} answers, at rest after"
    line(what, f"{settled:.2f} s", f"{MAX_SETTLE_S} s", ok)


def report_many(watched: Watched) -> None:
    """A map of many points: from the arrival of the data to the first paint, and from a move to changed pixels."""
    watched.page.add_init_script(ARRIVAL)
    watched.open(64, MANY)
    painted = watched.page.evaluate("painted - arrived") / 1000
    what = f"{MANY:,} points: arrival of the data to first paint"
    line(what, f"{painted:.2f} s", f"{MAX_PAINT_S} s", painted < MAX_PAINT_S)
    taken = [watched.hover(i) for i in range(PRESSES)]
    median, what = statistics.median(taken), f"{MANY:,} points: mouse move to changed pixels, median of {PRESSES}"
    line(what, f"{median:.0f} ms ({min(taken):.0f}-{max(taken):.0f})", f"{MAX_HOVER_MS} ms", median < MAX_HOVER_MS)


def report_traces() -> None:
    """Curves of fields over time, drawn as the explorer does and by matplotlib."""
    real = np.sin(np.linspace(0, 20, STEPS))[:, None] * np.arange(1, 1 + NODES, dtype=np.float32)  # (t, n)
    decoded, traces = real + np.float32(0.1), FieldTraces(range(NODES), (-3, 3), STEPS, "a field")

    def plot() -> None:
        figure = Figure((3, 2.2))
        axes = figure.add_subplot()
        axes.plot(decoded)
        axes.plot(real, "--")
        FigureCanvasAgg(figure).draw()

    taken = in_turns({"own": lambda: traces.draw(decoded, real), "matplotlib": plot}, rounds=20)
    faster, what = taken["matplotlib"] / taken["own"], f"{NODES} curves of {STEPS} steps, times faster than matplotlib"
    line(what, f"{faster:.1f} ({1000 * taken['own']:.1f} ms)", f"at least {MIN_FASTER}", faster >= MIN_FASTER)


def main() -> None:
    """Print how soon the explorer answers keys and moves of the mouse, and how soon it shows many points."""
    report_traces()
    if reason := missing():
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as address, chromium(Path(folder)) as page:
        watched = Watched(page, address, Path(folder) / "lab")
        report_presses(watched)
        report_flood(watched)
        report_many(watched)


if __name__ == "__main__":
    sys.exit(run(main))
