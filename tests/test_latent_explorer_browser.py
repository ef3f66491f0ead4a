"""The latent explorer in a real JupyterLab, driven by headless Chromium: what it draws is what Python decodes."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from matplotlib.figure import Figure

from workbench.comparison import decode, encode_split
from workbench.datasets.opening import open_data
from workbench.datasets.synthetic import write_pushing
from workbench.interpolation import METHODS, prior_samples
from workbench.latent_explorer import explore_run
from workbench.models import build_vae
from workbench.runs import load_run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is missing: apt-get install chromium", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SAMPLES = 40
MODEL = {"hidden_dims": [8, 16, 32], "latent_dim": 6, "image_size": 32}
TRAINING = {"epochs": 8, "batch_size": 32, "lr": 2e-3, "device": "cpu", "images_every": 1000}
CELL = """
from workbench.latent_explorer import explore_run
explore_run({path!r}, most={samples}, device="cpu")
"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
OWN = ["IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR"]
OWN += ["JUPYTERLAB_WORKSPACES_DIR"]
IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
THEME = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
PIXEL = "(c, at) => Array.from(c.getContext('2d').getImageData(at.x, at.y, 1, 1).data)"
PIXELS = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
WAIT_MS, WAIT_S = 120_000, 20


def train(folder: Path) -> Path:
    """A run of a small VAE on 960 frames; some seconds."""
    data = {"data": str(write_pushing(folder / "pushing", 60, 16, 32)), "cache_dir": str(folder / "cache")}
    parameters = {"experiment": "e", "run": "vae", "data_kind": "clips"} | MODEL | data
    opened, config = open_data(parameters), TrainConfig(**TRAINING)
    run = open_run(parameters | opened.config.model_dump() | config.model_dump(), folder)
    run.record(data={"name": "pushing", "fingerprint": opened.fingerprint})
    torch.manual_seed(0)
    model = build_vae(parameters, opened.sizes)
    sets = (opened.split("train"), opened.split("val"), config, run, vae_weights(config, model.terms))
    fit(model, "conv_vae", *sets, lambda x, x_hat: Figure())
    return run.path


class Truth:
    """What Python decodes: the model, its samples and their latents, and where they lie on the map."""

    def __init__(self, path: Path) -> None:
        self.model, trained = load_run(path)
        self.data = open_data(trained["parameters"])
        self.samples = self.data.split("test").subset(SAMPLES)
        self.z = encode_split(self.model, self.samples, SAMPLES).mu
        explorer = explore_run(path, most=SAMPLES, device="cpu")
        self.points = np.frombuffer(explorer.points, "<f4").reshape(-1, 2)
        self.colours = np.frombuffer(explorer.colours, np.uint8).reshape(-1, 3)
        self.moves = [int(slider["name"][2 : slider["name"].index("]")]) for slider in explorer.dimensions]
        spread = np.linalg.norm(self.points[:, None] - self.points[None], axis=-1) + 9 * np.eye(SAMPLES)
        self.alone = np.argsort(-spread.min(1))[:3].tolist()
        """Three samples without others close to them on the map."""

    def pixels(self, z: torch.Tensor) -> np.ndarray:
        return self.data.pixels(decode(self.model, z[None])[0])

    def real(self, sample: int) -> np.ndarray:
        return self.data.pixels(self.samples[sample]["x"])

    def between(self, a: int, b: int, position: float, method: str) -> np.ndarray:
        return self.pixels(METHODS[method](self.z[a], self.z[b], torch.tensor([position]))[0])


@contextmanager
def started(folder: Path) -> Iterator[str]:
    """JupyterLab over a folder, behind a token; its address. It and its kernels are ended in every case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--expose-app-in-browser"]
    own = {name: str(folder.parent / name.lower()) for name in OWN}
    notices = folder.parent / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    notices.mkdir(parents=True)
    (notices / "notification.jupyterlab-settings").write_text('{"checkForUpdates": false, "fetchNews": "false"}')
    environment = os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with (folder.parent / "jupyterlab.log").open("w") as log:
        server = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_server(server, f"http://127.0.0.1:{port}/api?token={token}", folder.parent / "jupyterlab.log")
            yield f"http://127.0.0.1:{port}/lab/tree/walk.ipynb?token={token}&reset"
        finally:
            end(server)


def wait_for_server(server: psutil.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab does not answer:\n{log.read_text()}")


def end(server: psutil.Popen) -> None:
    """End a server and all that it started; kernels have sessions of their own, which no group signal reaches."""
    family = [server, *(server.children(recursive=True) if server.is_running() else [])]
    server.terminate()
    psutil.wait_procs([server], timeout=15)
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=5)


@contextmanager
def opened_page(address: str, profile: Path) -> Iterator[playwright.Page]:
    """The notebook in Chromium, its kernel ready."""
    with playwright.sync_playwright() as driver:
        settings = {"executable_path": CHROMIUM, "args": FLAGS, "viewport": {"width": 1500, "height": 1000}}
        browser = driver.chromium.launch_persistent_context(str(profile), **settings)
        page = browser.pages[0]
        page.goto(address, timeout=WAIT_MS)
        page.wait_for_function(IDLE, timeout=WAIT_MS)
        yield page
        browser.close()


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, f"did not come about within {WAIT_S} s"
        time.sleep(0.02)


class Explorer:
    """The explorer on the page."""

    def __init__(self, page: playwright.Page, truth: Truth) -> None:
        self.page, self.truth, self.errors = page, truth, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.run_all()

    def run_all(self) -> None:
        """Run all cells; any explorer there was is replaced."""
        self.page.evaluate("document.querySelectorAll('.latent-explorer').forEach(root => root.remove())")
        self.page.evaluate(RUN)
        self.root = self.page.locator(".latent-explorer[data-answered]")
        self.root.wait_for(timeout=WAIT_MS)
        self.area, self.path = self.root.locator(".lx-area"), self.root.get_by_label("A → B", exact=True)

    @property
    def answered(self) -> int:
        return int(self.root.get_attribute("data-answered"))

    def drawn(self, picture: str = "picture") -> np.ndarray:
        """Pixels (h, w, 3) on a canvas."""
        canvas = self.root.locator(f".lx-{picture} canvas")
        height, width = int(canvas.get_attribute("height")), int(canvas.get_attribute("width"))
        rgba = np.array(canvas.evaluate(PIXELS), np.uint8).reshape(height, width, 4)
        assert (rgba[..., 3] == 255).all()
        return rgba[..., :3]

    def apart(self, expected: np.ndarray, picture: str = "picture") -> int:
        """Largest difference between what is drawn and pixels [of 255]."""
        return int(np.abs(self.drawn(picture).astype(int) - expected).max())

    def caption(self) -> str:
        return self.root.locator(".lx-picture figcaption").inner_text()

    def message(self) -> str:
        return self.root.get_by_role("status").inner_text()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def point(self, sample: int) -> dict[str, float]:
        """Where a sample lies in the area of the map [px]."""
        x, y = self.truth.points[sample].tolist()
        return {"x": 16 + 388 * x, "y": 16 + 388 * (1 - y)}

    def pin(self, a: int, b: int, position: int = 0) -> None:
        """Pin two samples by keys, and go to a place on the path [percent] with the method lerp."""
        for sample, key in ((a, "a"), (b, "b")):
            self.area.hover(position=self.point(sample))
            self.area.press(key)
        self.root.get_by_label("slerp").check()
        self.root.get_by_label("lerp", exact=True).check()
        self.path.focus()
        self.press("Home", *["ArrowRight"] * position)

    def shows(self, expected: np.ndarray, picture: str = "picture") -> None:
        """Wait until the canvas holds these pixels, up to the last digit of rounding."""
        wait_until(lambda: self.apart(expected, picture) <= 1)

    def changes_to(self, expected: np.ndarray, act: Callable[[], object]) -> None:
        """What is drawn before `act` is something else, and after it this."""
        assert self.apart(expected) > 1, "the picture need not change"
        act()
        self.shows(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def truth(one_thread: None, folder: Path) -> Truth:
    return Truth(train(folder))


@pytest.fixture(scope="module")
def explorer(truth: Truth, folder: Path) -> Iterator[Explorer]:
    lab = folder / "lab"
    lab.mkdir()
    cell = nbformat.v4.new_code_cell(CELL.format(path=str(folder / "e" / "vae"), samples=SAMPLES))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), lab / "walk.ipynb")
    with started(lab) as address, opened_page(address, folder / "profile") as page:
        explorer = Explorer(page, truth)
        yield explorer
        assert explorer.errors == []


def test_it_begins_with_the_first_sample_and_asks_for_pins(explorer: Explorer, truth: Truth) -> None:
    explorer.shows(truth.pixels(truth.z[0]))
    explorer.shows(truth.real(0), "neighbour")
    assert explorer.path.is_disabled() and explorer.message() == "Click two samples on the map to pin A and B."


def test_hovering_decodes_the_sample_under_the_cursor_and_names_it(explorer: Explorer, truth: Truth) -> None:
    for sample in truth.alone:
        where = explorer.point(sample)
        expected = truth.pixels(truth.z[sample])
        explorer.changes_to(expected, lambda where=where: explorer.area.hover(position=where))
        assert truth.samples.name(sample) in explorer.caption()
        explorer.shows(truth.real(sample), "neighbour")
        colour = explorer.area.locator("canvas").evaluate(PIXEL, where)
        assert colour == [*truth.colours[sample].tolist(), 255], "the point is not drawn where it is found"


def test_clicks_pin_a_then_b_and_keys_walk_between_them(explorer: Explorer, truth: Truth) -> None:
    explorer.run_all()
    a, b, _ = truth.alone
    explorer.area.click(position=explorer.point(a))
    explorer.shows(truth.pixels(truth.z[a]))
    explorer.changes_to(truth.pixels(truth.z[b]), lambda: explorer.area.click(position=explorer.point(b)))
    assert explorer.area.locator("text").all_text_contents() == ["A", "B"]
    across = [
        float(x) for x in explorer.area.locator("text").evaluate_all("marks => marks.map(m => m.getAttribute('x'))")
    ]
    assert across == pytest.approx([explorer.point(a)["x"], explorer.point(b)["x"]], abs=0.01)
    explorer.path.focus()
    explorer.changes_to(truth.between(a, b, 0.01, "lerp"), lambda: explorer.press("ArrowRight"))
    explorer.changes_to(truth.between(a, b, 0.4, "lerp"), lambda: explorer.press(*["ArrowRight"] * 39))
    assert explorer.caption() == "lerp A-B at 0.40"
    explorer.root.get_by_label("lerp", exact=True).focus()
    explorer.press("ArrowRight")
    explorer.shows(truth.between(a, b, 0.4, "slerp"))
    assert explorer.caption() == "slerp A-B at 0.40"
    explorer.path.focus()
    explorer.changes_to(truth.pixels(truth.z[b]), lambda: explorer.press("End"))


def test_arrows_go_from_sample_to_sample_on_the_map_and_enter_pins(explorer: Explorer, truth: Truth) -> None:
    start = truth.alone[0]
    explorer.area.hover(position=explorer.point(start))
    explorer.area.focus()
    apart = truth.points - truth.points[start]
    for key, along, across in (("ArrowRight", 0, 1), ("ArrowLeft", 0, 1), ("ArrowUp", 1, 0), ("ArrowDown", 1, 0)):
        ahead = apart[:, along] * (-1 if key in ("ArrowLeft", "ArrowDown") else 1)
        seen = np.flatnonzero((ahead > 0) & (np.abs(apart[:, across]) <= ahead))
        if len(seen):
            break
    nearest = int(seen[np.argmin(np.linalg.norm(apart[seen], axis=1))])
    explorer.changes_to(truth.pixels(truth.z[nearest]), lambda: explorer.press(key))
    explorer.press("b")
    explorer.press("Enter")
    wait_until(lambda: "A: sample" in explorer.caption())
    assert truth.samples.name(nearest) in explorer.caption()


def test_play_takes_every_step_to_b_and_loop_comes_back(explorer: Explorer, truth: Truth) -> None:
    a, b, _ = truth.alone
    explorer.pin(a, b, 90)
    explorer.shows(truth.between(a, b, 0.9, "lerp"))
    before = explorer.answered
    explorer.changes_to(truth.pixels(truth.z[b]), lambda: explorer.press("p"))
    wait_until(lambda: explorer.root.get_by_role("button", name="play").is_visible())
    assert explorer.answered == before + 10
    explorer.root.get_by_label("loop").check()
    explorer.path.focus()
    explorer.press(*["ArrowLeft"] * 3, "p")
    wait_until(lambda: float(explorer.path.input_value()) < 0.95)  # from 0.97 only by way of B
    explorer.press("p")
    explorer.root.get_by_role("button", name="play").wait_for()
    explorer.shows(truth.between(a, b, float(explorer.path.input_value()), "lerp"))
    explorer.root.get_by_label("loop").uncheck()


def test_sliders_move_their_dimension_and_reset_goes_back_to_a(explorer: Explorer, truth: Truth) -> None:
    a, b, _ = truth.alone
    explorer.pin(a, b)
    explorer.shows(truth.pixels(truth.z[a]))
    slider = explorer.root.locator(".lx-dimensions input").first
    slider.focus()
    moved = truth.z[a].clone()
    moved[truth.moves[0]] = float(slider.get_attribute("max"))
    explorer.changes_to(truth.pixels(moved), lambda: explorer.press("End"))
    explorer.changes_to(truth.pixels(truth.z[a]), lambda: explorer.root.get_by_role("button", name="reset").click())


def test_a_random_draw_is_one_of_the_prior(explorer: Explorer, truth: Truth) -> None:
    size = truth.z.shape[1]
    button = explorer.root.get_by_role("button", name="random draw")
    explorer.changes_to(truth.pixels(prior_samples(1, size, 1)[0]), button.click)
    explorer.changes_to(truth.pixels(prior_samples(1, size, 2)[0]), button.click)


def test_the_strip_is_saved_in_the_run_folder(explorer: Explorer, truth: Truth, folder: Path) -> None:
    a, b, _ = truth.alone
    explorer.pin(a, b)
    explorer.root.get_by_role("button", name="save strip").click()
    wait_until(lambda: "strip-1" in explorer.message())
    assert (folder / "e" / "vae" / "samples" / "strip-1.npz").exists()


def test_a_cell_that_is_run_again_goes_on_where_it_was(explorer: Explorer, truth: Truth) -> None:
    a, b, _ = truth.alone
    explorer.pin(a, b, 30)
    explorer.shows(truth.between(a, b, 0.3, "lerp"))
    explorer.run_all()
    explorer.shows(truth.between(a, b, 0.3, "lerp"))
    assert explorer.path.input_value() == "0.3"


CONTRAST = """node => {
  const paint = colour => {
    const c = document.createElement("canvas").getContext("2d");
    [c.fillStyle] = [getComputedStyle(document.querySelector(".jp-Notebook")).backgroundColor];
    c.fillRect(0, 0, 1, 1);
    c.fillStyle = colour;
    c.fillRect(0, 0, 1, 1);
    return c.getImageData(0, 0, 1, 1).data;
  };
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = paint(colour)[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const style = getComputedStyle(node);
  const ink = light(node.tagName === "path" ? style.stroke : style.color), ground = light("transparent");
  return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_text_and_marks_are_readable(explorer: Explorer, theme: str) -> None:
    """Contrast as WCAG 2 defines it, at least 4.5."""
    explorer.page.evaluate(THEME, theme)
    explorer.page.locator(f"body[data-jp-theme-name='{theme}']").wait_for(state="attached")
    for part in ("figcaption", ".lx-marks", ".lx-label", ".lx-slider", "path:not(.lx-halo)"):
        assert explorer.root.locator(part).first.evaluate(CONTRAST) >= 4.5, part
