"""What the tests in a real JupyterLab share: a project of their own, and the explorer on its page."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Locator, Page

from benchmarks.lab import open_notebook, run_all, write_notebook

ROOT = Path(__file__).parents[1]
PIXELS = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
FORGET = "document.querySelectorAll('.latent-explorer').forEach(root => root.remove())"
WAIT_S = 60
MAP, MARGIN = 420, 16  # of the map [px]


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, f"did not come about within {WAIT_S} s"
        time.sleep(0.02)


class Project:
    """A project with outputs and notebooks of its own, in JupyterLab.

    Args:
        folder: Where it lies.
        address: Of its notebooks, see `benchmarks.lab.jupyterlab`.
        page: Opens them.
    """

    def __init__(self, folder: Path, address: str, page: Page) -> None:
        self.folder, self.address, self.page, self.errors = folder, address, page, []
        (folder / "notebooks").mkdir()
        (folder / "params").mkdir()
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, name: str, **parameters: Any) -> "Explorer":
        """A copy of a notebook with other parameters, opened; all its cells are run."""
        notebook = load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
        nbformat.write(parameterize_notebook(notebook, parameters), self._path(name))
        return self._shown(name)

    def show(self, name: str, cell: str) -> "Explorer":
        """A notebook of one cell, opened and run."""
        write_notebook(self._path(name), cell)
        return self._shown(name)

    def _path(self, name: str) -> Path:
        return self.folder / "notebooks" / f"{name}.ipynb"

    def _shown(self, name: str) -> "Explorer":
        """Without what JupyterLab says of the kernel that is ended, of the notebook before."""
        found = len(self.errors)
        open_notebook(self.page, self.address.format(f"notebooks/{name}.ipynb"))
        del self.errors[found:]
        return Explorer(self.page)


class Explorer:
    """The explorer on the page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.run_all()

    def run_all(self) -> None:
        """Run all cells; any explorer there was is replaced."""
        self.page.evaluate(FORGET)
        assert run_all(self.page), "a cell has failed"
        self.root = self.page.locator(".latent-explorer[data-answered]")
        self.root.wait_for()
        self.area, self.path = self.root.locator(".lx-area"), self.root.get_by_label("A → B", exact=True)

    @property
    def answered(self) -> int:
        return int(self.root.get_attribute("data-answered"))

    def panel(self, picture: str | int) -> Locator:
        """A picture: `picture`, the first one; `neighbour`, that of the nearest sample; or by its number."""
        return self.root.locator(f".lx-{picture}" if isinstance(picture, str) else f"[data-panel='{picture}']")

    def drawn(self, picture: str | int = "picture") -> np.ndarray:
        """Pixels (h, w, 3) on a canvas."""
        canvas = self.panel(picture).locator("canvas")
        height, width = int(canvas.get_attribute("height")), int(canvas.get_attribute("width"))
        rgba = np.array(canvas.evaluate(PIXELS), np.uint8).reshape(height, width, 4)
        assert (rgba[..., 3] == 255).all()
        return rgba[..., :3]

    def apart(self, expected: np.ndarray, picture: str | int = "picture") -> int:
        """Largest difference between what is drawn and pixels [of 255]."""
        return int(np.abs(self.drawn(picture).astype(int) - expected).max())

    def caption(self) -> str:
        return self.panel("picture").locator("figcaption").inner_text()

    def message(self) -> str:
        return self.root.get_by_role("status").inner_text()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def hover(self, point: np.ndarray) -> None:
        self.area.hover(position=place(point))

    def click(self, point: np.ndarray) -> None:
        self.area.click(position=place(point))

    def pin(self, a: np.ndarray, b: np.ndarray, position: int = 0) -> None:
        """Pin two samples by keys, and go to a place on the path [percent] with the method lerp."""
        for point, key in ((a, "a"), (b, "b")):
            self.hover(point)
            self.area.press(key)
        self.root.get_by_label("slerp").check()
        self.root.get_by_label("lerp", exact=True).check()
        self.path.focus()
        self.press("Home", *["ArrowRight"] * position)

    def shows(self, expected: np.ndarray, picture: str | int = "picture") -> None:
        """Wait until the canvas holds these pixels, up to the last digit of rounding."""
        wait_until(lambda: self.apart(expected, picture) <= 1)

    def changes_to(self, expected: np.ndarray, act: Callable[[], object], picture: str | int = "picture") -> None:
        """What is drawn before `act` is something else, and after it this."""
        assert self.apart(expected, picture) > 1, "the picture need not change"
        act()
        self.shows(expected, picture)


def place(point: np.ndarray) -> dict[str, float]:
    """Where a point of the map lies in its area [px]."""
    x, y = point.tolist()
    return {"x": MARGIN + (MAP - 2 * MARGIN) * x, "y": MARGIN + (MAP - 2 * MARGIN) * (1 - y)}


def alone(points: np.ndarray, count: int = 3) -> list[int]:
    """Points without others close to them."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1) + 9 * np.eye(len(points))
    return np.argsort(-apart.min(1))[:count].tolist()
