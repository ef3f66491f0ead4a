"""The latent explorer in a real JupyterLab, driven by headless Chromium: what it draws is what Python decodes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conditioned import SHARES, write_simulations
from matplotlib.figure import Figure

from benchmarks.lab import THEME, chromium, jupyterlab, missing
from workbench.action_codes import actions_of, frequent_words
from workbench.action_comparison import full_pairs
from workbench.action_exploration import load_action_model
from workbench.comparison import decode, encode_split
from workbench.conditioning import predict
from workbench.datasets.opening import open_data
from workbench.datasets.synthetic import write_pushing
from workbench.interpolation import METHODS, prior_samples, random_pairs
from workbench.latent_explorer import explore_run
from workbench.latent_map import LatentMap
from workbench.models import VAES, build_vae
from workbench.runs import load_run, open_run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import fit

if missing():
    pytest.skip(missing(), allow_module_level=True)
from explorer_page import Explorer, Project, alone, place, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SAMPLES = 40
CLIPS = {"data_kind": "clips", "hidden_dims": [8, 16, 32], "latent_dim": 6, "image_size": 32}
DECODED, REAL = 1, 2
"""Panels of a pair of frames, after the first frame."""
OVER_TIME = 2
"""Panel of a field, after the decoded one and the real one."""
TRAINING = {"epochs": 8, "batch_size": 32, "lr": 2e-3, "device": "cpu", "images_every": 1000}
CELL = """
from workbench.latent_explorer import explore_run
explore_run({path!r}, most={samples}, device="cpu")
"""
WAVES = {"data_kind": "simulation", "filters": [6, 4], "latent_dim": 3, "hier_latent_dim": 2, "output_norm": False}
PIXEL = "(c, at) => Array.from(c.getContext('2d').getImageData(at.x, at.y, 1, 1).data)"


def train(outputs: Path, experiment: str, parameters: dict[str, Any], **training: Any) -> Path:
    """A run of a small VAE, outputs/<experiment>/vae."""
    parameters = parameters | {"experiment": experiment, "run": "vae", "cache_dir": str(outputs / "cache")}
    opened, config = open_data(parameters), TrainConfig(**TRAINING | training)
    run = open_run(parameters | opened.config.model_dump() | config.model_dump(), outputs)
    run.record(data={"name": "data", "fingerprint": opened.fingerprint})
    torch.manual_seed(0)
    model = build_vae(parameters, opened.sizes)
    sets = (opened.split("train"), opened.split("val"), config, run, vae_weights(config, model.terms))
    fit(model, VAES[parameters["data_kind"]], *sets, lambda x, x_hat: Figure())
    return run.path


class Truth:
    """What Python decodes: the model, its samples and their latents, and where they lie on the map."""

    def __init__(self, path: Path) -> None:
        self.path, (self.model, trained) = path, load_run(path)
        self.data = open_data(trained["parameters"])
        self.samples = self.data.split("test").subset(SAMPLES)
        self.z = encode_split(self.model, self.samples, SAMPLES).mu
        explorer = explore_run(path, most=SAMPLES, device="cpu")
        self.points = np.frombuffer(explorer.points, "<f4").reshape(-1, 2)
        self.colours = np.frombuffer(explorer.colours, np.uint8).reshape(-1, 3)
        self.moves = [int(slider["name"][2 : slider["name"].index("]")]) for slider in explorer.dimensions]
        self.alone = alone(self.points)

    def pixels(self, z: torch.Tensor) -> np.ndarray:
        return self.data.pixels(decode(self.model, z[None])[0])

    def real(self, sample: int) -> np.ndarray:
        return self.data.pixels(self.samples[sample]["x"])

    def between(self, a: int, b: int, position: float, method: str) -> np.ndarray:
        return self.pixels(METHODS[method](self.z[a], self.z[b], torch.tensor([position]))[0])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("browser")
    environment = {"OMP_NUM_THREADS": "1", "WORKBENCH_OUTPUTS": str(folder / "lab" / "outputs")}
    with jupyterlab(folder, **environment) as address, chromium(folder) as page:
        project = Project(folder / "lab", address, page)
        yield project
        assert project.errors == []


@pytest.fixture(scope="module")
def truth(one_thread: None, project: Project) -> Truth:
    data = {"data": str(write_pushing(project.folder / "pushing", 60, 16, 32))}
    return Truth(train(project.folder / "outputs", "clips", CLIPS | data))


@pytest.fixture(scope="module")
def explorer(truth: Truth, project: Project) -> Explorer:
    return project.show("walk", CELL.format(path=str(truth.path), samples=SAMPLES))


def test_it_begins_with_the_first_sample_and_asks_for_pins(explorer: Explorer, truth: Truth) -> None:
    explorer.shows(truth.pixels(truth.z[0]))
    explorer.shows(truth.real(0), "neighbour")
    assert explorer.path.is_disabled() and explorer.message() == "Click two samples on the map to pin A and B."


def test_hovering_decodes_the_sample_under_the_cursor_and_names_it(explorer: Explorer, truth: Truth) -> None:
    for sample in truth.alone:
        where = truth.points[sample]
        expected = truth.pixels(truth.z[sample])
        explorer.changes_to(expected, lambda where=where: explorer.hover(where))
        assert truth.samples.name(sample) in explorer.caption()
        explorer.shows(truth.real(sample), "neighbour")
        colour = explorer.area.locator("canvas").evaluate(PIXEL, place(where))
        assert colour == [*truth.colours[sample].tolist(), 255], "the point is not drawn where it is found"


def test_clicks_pin_a_then_b_and_keys_walk_between_them(explorer: Explorer, truth: Truth) -> None:
    explorer.run_all()
    a, b, _ = truth.alone
    explorer.click(truth.points[a])
    explorer.shows(truth.pixels(truth.z[a]))
    explorer.changes_to(truth.pixels(truth.z[b]), lambda: explorer.click(truth.points[b]))
    assert explorer.area.locator("text").all_text_contents() == ["A", "B"]
    across = [
        float(x) for x in explorer.area.locator("text").evaluate_all("marks => marks.map(m => m.getAttribute('x'))")
    ]
    assert across == pytest.approx([place(truth.points[i])["x"] for i in (a, b)], abs=0.01)
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
    explorer.hover(truth.points[start])
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
    explorer.pin(*truth.points[[a, b]], 90)
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
    explorer.pin(*truth.points[[a, b]])
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


def test_the_strip_is_saved_in_the_run_folder(explorer: Explorer, truth: Truth, project: Project) -> None:
    a, b, _ = truth.alone
    explorer.pin(*truth.points[[a, b]])
    explorer.root.get_by_role("button", name="save strip").click()
    wait_until(lambda: "strip-1" in explorer.message())
    assert (project.folder / "outputs" / "clips" / "vae" / "samples" / "strip-1.npz").exists()


def test_a_cell_that_is_run_again_goes_on_where_it_was(explorer: Explorer, truth: Truth) -> None:
    a, b, _ = truth.alone
    explorer.pin(*truth.points[[a, b]], 30)
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


def test_notebook_04_walks_where_its_paths_are(project: Project, truth: Truth) -> None:
    """All its cells, then keys, mouse and pins."""
    small = {"eval_samples": SAMPLES, "measured_pairs": 2, "measured_steps": 3, "steps": 3, "shown_pairs": 1}
    explorer = project.open("04_interpolate_latents", experiment="clips", device="cpu", **small)
    a, b = random_pairs(SAMPLES, 1, torch.Generator().manual_seed(0))[0]
    explorer.shows(truth.between(a, b, 0.0, "lerp"))
    explorer.path.focus()
    explorer.changes_to(truth.between(a, b, 0.2, "lerp"), lambda: explorer.press(*["ArrowRight"] * 20))
    first, second, third = truth.alone
    explorer.changes_to(truth.pixels(truth.z[third]), lambda: explorer.hover(truth.points[third]))
    explorer.changes_to(truth.pixels(truth.z[first]), lambda: explorer.click(truth.points[first]))
    explorer.changes_to(truth.pixels(truth.z[second]), lambda: explorer.click(truth.points[second]))
    explorer.path.focus()
    explorer.changes_to(truth.between(first, second, 0.21, "lerp"), lambda: explorer.press("ArrowRight"))


def test_notebook_03_redraws_the_field_for_chosen_conditions(project: Project) -> None:
    """All its cells, then mouse, pins, and the sliders of the conditions."""
    outputs, waves = project.folder / "outputs", write_simulations(project.folder / "waves")
    data = {"data": str(waves / "fields.npy"), "conditions": str(waves / "conditions.csv")} | SHARES
    truth = Truth(train(outputs, "waves", WAVES | data, epochs=40, batch_size=8, lr=1e-2))
    small = {"epochs": 20, "batch_size": 8, "lr": 1e-2, "width": 8, "floor_components": 4}
    explorer = project.open("03_train_conditioner", experiment="waves", device="cpu", **small)
    conditioner = load_run(outputs / "waves" / "conditioner")[0]
    first, second, third = truth.alone
    explorer.changes_to(truth.pixels(truth.z[third]), lambda: explorer.hover(truth.points[third]))
    over_time = truth.data.traces(decode(truth.model, truth.z[third][None])[0], truth.samples[third]["x"])[1]
    explorer.shows(over_time, OVER_TIME)
    explorer.changes_to(truth.pixels(truth.z[first]), lambda: explorer.click(truth.points[first]))
    explorer.changes_to(truth.pixels(truth.z[second]), lambda: explorer.click(truth.points[second]))
    amplitude, phase = truth.samples.conditions([second])[0].tolist()
    slider = explorer.root.get_by_label("amplitude", exact=True)
    assert float(slider.input_value()) == pytest.approx(amplitude, abs=0.01), "the sample's own"
    slider.focus()
    for key in ("Home", "End"):
        chosen = torch.tensor([[float(slider.get_attribute({"Home": "min", "End": "max"}[key])), phase]])
        expected = truth.data.pixels(predict(conditioner, truth.model, chosen, 1)[1][0])
        explorer.changes_to(expected, lambda key=key: explorer.press(key))


def test_notebook_05_lets_codes_act_on_a_first_frame(project: Project, truth: Truth) -> None:
    """All its cells, then mouse, a pin, and the buttons of the codes."""
    small = {"image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "dim_head": 8, "hidden_dims": [8, 16]}
    small |= {"training_steps": 40, "batch_size": 16, "lr": 5e-3, "quantizers": [], "kl_weights": []}
    small |= {"frame_stride": 1, "pair_offset": 6, "eval_samples": SAMPLES, "floor_samples": 100}
    small |= {"displacement": [], "folds": 2, "probe_samples": 40, "permutations": 19}
    clips = str(project.folder / "pushing")
    explorer = project.open("05_compare_vae_laq", experiment="clips", device="cpu", data=clips, **small)
    rival, data = load_action_model(project.folder / "outputs" / "clips" / "comparison" / "parts" / "laq-0")
    pairs = full_pairs(data.split("test")).subset(SAMPLES)
    found = actions_of(rival, pairs, SAMPLES)
    points, words = LatentMap(found.features.flatten(1), pairs).points, frequent_words(found, 8)
    act = lambda frame, codes: rival.imagine(frame, codes[None])  # noqa: E731
    pinned, hovered = alone(points, 2)
    first = pairs[pinned]["first"][None]
    for i, choose in ((hovered, explorer.hover), (pinned, explorer.click)):
        own = data.pixels(act(pairs[i]["first"][None], found.indices[i])[0])
        explorer.changes_to(own, lambda i=i, choose=choose: choose(points[i]), DECODED)
    explorer.shows(data.pixels(first[0]))
    explorer.shows(data.pixels(pairs[pinned]["x"]), REAL)
    buttons = explorer.root.get_by_role("group", name="codes").get_by_role("button")
    assert buttons.all_inner_texts() == list(words)
    one, another, *_ = (word for word in words if not torch.equal(words[word], found.indices[pinned]))
    frame = first
    for number, word in ((1, one), (2, another)):
        frame = act(frame, words[word])
        pixels = data.pixels(frame[0])
        assert explorer.apart(pixels, 1) > 1, "the code does nothing"
        explorer.root.get_by_role("button", name=word).press("Enter")
        explorer.shows(pixels, number)
    explorer.root.get_by_role("button", name="clear").click()
    explorer.shows(data.pixels(pairs[pinned]["x"]), REAL)
