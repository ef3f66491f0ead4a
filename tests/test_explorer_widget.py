import base64
import io
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import Space, assert_shows, open_space, say, shown
from PIL import Image
from traitlets import TraitError

from workbench.colouring import colour_points
from workbench.comparison import decode
from workbench.datasets.frames import DataError
from workbench.explorer_widget import LatentExplorer, restore
from workbench.latent_explorer import explore
from workbench.layers import Posterior
from workbench.runs import Run
from workbench.spaces import Panel, Range, State, Strip, View

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def space(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    return open_space("clips", tmp_path_factory.mktemp("clips"))


@pytest.fixture
def widget(space: Space, tmp_path: Path) -> LatentExplorer:
    return explore(*space, Run(tmp_path), pins=(2, 5))


# --- messages and answers ---


def test_every_change_is_answered_once_by_the_picture_of_its_latent(widget: LatentExplorer, space: Space) -> None:
    mu, pictures = space.posterior.mu, [widget.panels[0]["pixels"]]
    assert_shows(widget, space, mu[2])
    slider = int(widget.dimensions[0]["name"][2])
    moved = mu[2].clone()
    moved[slider] = -1.25
    values = [-1.25, *mu[2][[int(d["name"][2]) for d in widget.dimensions[1:]]].tolist()]
    drawn = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))[0]
    for traits, z in (
        ({"hover": 4, "mode": "hover"}, mu[4]),
        ({"mode": "path", "position": 0.25}, torch.lerp(mu[2], mu[5], 0.25)),
        ({"position": 1.0, "mode": "path"}, mu[5]),
        ({"values": values, "mode": "sliders"}, moved),
        ({"mode": "draw", "draw": 1}, drawn),
        ({"mode": "pin", "pin_b": 7}, mu[7]),
        ({"pin_a": 6, "mode": "pin"}, mu[6]),
    ):
        answered = widget.answered
        say(widget, **traits)
        assert_shows(widget, space, z)
        assert (widget.answered, widget.message) == (answered + 1, "")
        np.testing.assert_allclose(widget.here, widget._space.map.place(z[None])[0], atol=1e-5)
        pictures.append(widget.panels[0]["pixels"])
    assert len(set(pictures)) == len(pictures), "every picture differs"


def test_an_answer_travels_in_one_message(
    widget: LatentExplorer, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(LatentExplorer, "send_state", lambda self, keys: sent.append(set(keys)))
    say(widget, hover=4, mode="hover")
    answers = [keys for keys in sent if "answered" in keys]
    assert len(answers) == 1 and {"panels", "here"} <= answers[0]
    say(widget, hover=4, mode="hover")
    assert len([keys for keys in sent if "answered" in keys]) == 1, "what is shown already is not answered again"


def test_the_neighbour_is_the_real_sample_marked_on_the_map(widget: LatentExplorer, space: Space) -> None:
    say(widget, hover=4, mode="hover")
    x = space.samples.prepare(space.samples.batch(np.array([4])))["x"]
    assert widget.neighbour_index == 4
    np.testing.assert_array_equal(shown(widget, 1), space.data.pixels(x[0]))
    error = float(space.data.error(decode(space.model, space.posterior.mu[4:5]), x))
    assert widget.panels[1]["caption"] == f"{space.samples.name(4)}, distance 0 in z, mse {error:.3g}"
    assert widget.panels[0]["caption"] == f"sample {space.samples.name(4)}, decoded"
    np.testing.assert_allclose(widget.here, np.frombuffer(widget.points, "<f4").reshape(-1, 2)[4], atol=1e-6)


def test_pins_are_shown_in_the_order_of_their_clicks(space: Space, tmp_path: Path) -> None:
    widget, name = explore(*space, Run(tmp_path)), space.samples.name
    assert (widget.pin_a, widget.pin_b, widget.path, widget.mode) == (-1, -1, b"", "pin")
    assert widget.panels[0]["caption"] == f"sample {name(0)}, decoded"
    for trait, sample in (("pin_a", 3), ("pin_b", 6), ("pin_a", 1), ("pin_b", 1)):
        say(widget, **{trait: sample, "mode": "pin"})
        assert widget.panels[0]["caption"] == f"{trait[-1].upper()}: sample {name(sample)}, decoded"
        assert_shows(widget, space, space.posterior.mu[sample])
    say(widget, pin_a=4)
    say(widget, pin_b=-1)
    assert widget.panels[0]["caption"] == f"A: sample {name(4)}, decoded" and widget.path == b""


def test_the_path_is_drawn_from_a_to_b_as_its_method_goes(widget: LatentExplorer) -> None:
    points = np.frombuffer(widget.points, "<f4").reshape(-1, 2)
    straight = np.frombuffer(widget.path, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(straight[[0, -1]], points[[2, 5]], atol=1e-5)
    say(widget, method="slerp", mode="path")
    arc = np.frombuffer(widget.path, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(arc[[0, -1]], points[[2, 5]], atol=1e-5)
    assert np.abs(arc - straight).max() > 0.01 and widget.panels[0]["caption"] == "slerp A-B at 0.00"


def test_the_path_is_placed_on_the_map_once(widget: LatentExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, path = [], widget.path
    route = widget._space.route
    monkeypatch.setattr(widget._space, "route", lambda state: asked.append(state) or route(state))
    for step in range(1, 4):
        say(widget, position=step / 4, mode="path")
    assert asked == [] and widget.path == path
    say(widget, pin_b=5, pin_a=3, mode="pin")
    assert len(asked) == 1 and widget.path != path


def test_sliders_follow_a_and_reset_goes_back_to_it(widget: LatentExplorer, space: Space) -> None:
    mu = space.posterior.mu
    order = [int(d["name"][2]) for d in widget.dimensions]
    assert widget.values == mu[2][order].tolist()
    say(widget, pin_a=6, mode="pin")
    assert widget.values == mu[6][order].tolist()
    say(widget, values=[9.0] * 3, mode="sliders")
    assert_shows(widget, space, torch.full((3,), 9.0))
    for _ in range(2):
        answered = widget.answered
        say(widget, reset=widget.reset + 1)
        assert widget.values == mu[6][order].tolist() and widget.mode == "sliders"
        assert widget.answered == answered + 1, "once, also where nothing had moved"
        assert_shows(widget, space, mu[6])


def test_what_is_not_defined_is_said_and_the_picture_stays(space: Space, tmp_path: Path) -> None:
    mu = space.posterior.mu.clone()
    mu[1] = -mu[0]
    model = copy(space.model)
    model.noise_dim = 0
    widget = explore(model, space.samples, Posterior(mu), space.data, Run(tmp_path), pins=(0, 4))
    for traits, message in (
        ({"pin_b": 0, "method": "slerp", "mode": "path"}, "A equal to B .*: slerp is not defined .*so nothing moves"),
        ({"pin_b": 1, "mode": "path"}, "opposite directions have no single shortest arc; use lerp"),
        ({"pin_b": -1, "mode": "path"}, "no path yet: pin two samples of the map"),
        ({"draw": 1, "mode": "draw"}, "no prior to draw from: the latent is deterministic"),
        ({"values": [1.0], "mode": "sliders"}, "1 values of sliders: must be 3"),
    ):
        before = widget.panels, widget.here, widget.answered
        say(widget, **traits)
        assert (widget.panels, widget.here) == before[:-1]
        assert widget.answered == before[-1] + 1 and widget.path == b""
        with pytest.raises(ValueError, match=message):
            raise ValueError(widget.message)
    say(widget, hover=4, mode="hover")
    assert widget.message == "" and widget.panels[0]["caption"] == f"sample {space.samples.name(4)}, decoded"


def test_a_sample_that_cannot_be_read_any_more_is_said(
    widget: LatentExplorer, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: object, indices: np.ndarray) -> None:
        raise DataError("clip00 has changed since the data was opened")

    monkeypatch.setattr(type(space.samples), "batch", gone)
    say(widget, hover=4, mode="hover")
    assert widget.message == "clip00 has changed since the data was opened"
    assert widget.panels[0]["caption"] == "lerp A-B at 0.00"


@pytest.mark.parametrize("trait", ["hover", "pin_a", "pin_b"])
def test_samples_that_are_not_there_are_refused(widget: LatentExplorer, trait: str) -> None:
    for sample in (10, -2):
        with pytest.raises(TraitError, match=f"{trait}={sample}: must be a sample, from 0 to 9, or -1 for none"):
            setattr(widget, trait, sample)
    assert widget.message == "" and getattr(widget, trait) in (-1, 2, 5)


def test_the_path_is_saved_into_the_run_folder(widget: LatentExplorer, tmp_path: Path) -> None:
    panels = widget.panels
    say(widget, save=1)
    assert widget.message == "saved figures/strip-1.png, samples/strip-1.gif, samples/strip-1.npz"
    say(widget, save=2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        *("strip-1.gif", "strip-1.npz", "strip-2.gif", "strip-2.npz"),
    ]
    assert widget.panels == panels
    say(widget, pin_b=-1)
    say(widget, save=3)
    assert widget.message == "no path yet: pin two samples of the map, as A and as B"
    assert not (tmp_path / "figures" / "strip-3.png").exists()


def test_a_run_folder_that_cannot_be_written_is_named(widget: LatentExplorer, tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("no folder")
    panels = widget.panels
    say(widget, save=1)
    assert widget.message.startswith(f"not saved into {tmp_path}: ") and "File exists" in widget.message
    assert widget.panels == panels and not (tmp_path / "figures").exists()


# --- other controls than those of a latent space ---


class Doubled:
    """A space that lets codes add 1 or 10 to a grey level that begins at the number of the sample, and has one
    condition, which is twice that number."""

    points, axes = np.array([[0, 0], [1, 0], [0, 1]], np.float32), ("x", "y")
    sliders, conditions, codes, walks, draws = (), [Range("level [1]", 0.0, 4.0)], ["one", "ten"], False, False

    class samples:  # noqa: N801
        @staticmethod
        def name(index: int) -> str:
            return f"s{index}"

    def own_values(self, sample: int) -> tuple[float, ...]:
        return ()

    def own_conditions(self, sample: int) -> tuple[float, ...]:
        return (2.0 * sample,)

    def errors(self) -> tuple[np.ndarray, str]:
        return np.zeros(3), "error [1]"

    def view(self, state: State) -> View:
        level = state.sample + sum((1, 10)[code] for code in state.chain)
        if state.mode == "conditions":
            level = round(25 * state.conditions[0])
        sizes = ((2, 3), (4, 5))  # of two panels
        panels = tuple(
            Panel(f"p{i}", f"level {level}", np.full((*size, 3), level, np.uint8)) for i, size in enumerate(sizes)
        )
        return View(torch.zeros(1), self.points[state.sample], panels, headline=f"it is {level}", key={"kind": ""})

    def route(self, state: State) -> np.ndarray:
        return np.empty((0, 2), np.float32)

    def strip(self, state: State, steps: int) -> Strip:
        raise ValueError("no strip")

    record = strip


@pytest.fixture
def doubled(tmp_path: Path) -> LatentExplorer:
    return LatentExplorer(Doubled(), colour_points(np.arange(3), "n"), Run(tmp_path))


def test_a_space_has_the_controls_that_it_gives(doubled: LatentExplorer) -> None:
    assert doubled.codes == ["one", "ten"] and not doubled.walks and not doubled.draws and doubled.dimensions == []
    assert doubled.conditions == [{"name": "level [1]", "min": 0.0, "max": 4.0, "step": 0.02}]


def test_chains_are_answered_by_panels_of_any_size(doubled: LatentExplorer) -> None:
    for chain, level in (([0], 1), ([0, 1], 11), ([0, 1, 1], 21), ([0, 1], 11), ([], 0)):
        answered = doubled.answered
        say(doubled, chain=chain, mode="codes")
        assert doubled.answered == answered + 1 and doubled.headline == f"it is {level}"
        assert [(panel["title"], panel["width"], panel["height"]) for panel in doubled.panels] == [
            ("p0", 3, 2),
            ("p1", 5, 4),
        ]
        assert (shown(doubled, 0) == level).all() and (shown(doubled, 1) == level).all()


def test_condition_sliders_follow_the_sample_that_is_shown(doubled: LatentExplorer) -> None:
    assert doubled.condition_values == [0.0]
    for traits, value in (
        ({"hover": 2, "mode": "hover"}, 4.0),
        ({"hover": 1, "mode": "hover"}, 2.0),
        ({"pin_a": 2, "mode": "pin"}, 4.0),
        ({"pin_b": 1, "mode": "pin"}, 2.0),
    ):
        answered = doubled.answered
        say(doubled, **traits)
        assert doubled.condition_values == [value] and doubled.answered == answered + 1
    say(doubled, condition_values=[0.5], mode="conditions")
    assert (shown(doubled) == 12).all() and doubled.condition_values == [0.5]
    answered = doubled.answered
    say(doubled, reset=1)
    assert doubled.condition_values == [4.0] and doubled.answered == answered + 1, "those of A"
    assert doubled.mode == "conditions" and (shown(doubled) == 100).all()


def test_chains_and_conditions_outlive_a_cell(doubled: LatentExplorer, tmp_path: Path) -> None:
    say(doubled, pin_a=1, mode="pin")
    say(doubled, chain=[1, 0], mode="codes")
    space = Doubled()
    state, note = restore(space, Run(tmp_path), State())
    assert (state.chain, state.conditions, state.mode, note) == ((1, 0), (2.0,), "codes", "")
    again = LatentExplorer(space, colour_points(np.arange(3), "n"), Run(tmp_path), state, note)
    assert again.chain == [1, 0] and again.headline == "it is 12"
    space.codes = ["one", "eleven"]
    state, _ = restore(space, Run(tmp_path), State())
    assert (state.chain, state.conditions, state.mode, state.pin_a) == ((), (), "pin", 1), "other codes begin anew"


# --- what the page gets once ---


def test_the_page_gets_points_colours_legend_and_sliders(widget: LatentExplorer, space: Space) -> None:
    points = np.frombuffer(widget.points, "<f4").reshape(-1, 2)
    assert len(points) == 10 and points.min() >= 0 and points.max() <= 1
    assert len(widget.colours) == 30 and widget.axes == ["PCA axis 1 of z", "PCA axis 2 of z"]
    assert widget.legend["label"] == "frame" and widget.legend["kind"] == "numbers"
    for slider in widget.dimensions:
        own = space.posterior.mu[:, int(slider["name"][2])]
        assert slider["min"] <= min(-3, own.min()) < max(3, own.max()) <= slider["max"] and slider["step"] > 0
    assert "render" in str(widget._esm)


# --- without a page, and again ---


def test_without_a_page_there_is_a_picture_of_the_same(widget: LatentExplorer) -> None:
    bundle, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).size == (900, 750)


def test_a_cell_that_is_run_again_goes_on_where_it_was(widget: LatentExplorer, space: Space, tmp_path: Path) -> None:
    say(widget, pin_a=7, mode="pin")
    say(widget, method="slerp", position=0.4, mode="path")
    again = explore(*space, Run(tmp_path), pins=(2, 5))
    for name in ("pin_a", "pin_b", "position", "method", "mode", "values", "panels"):
        assert getattr(again, name) == getattr(widget, name), name
    assert (again.pin_a, again.panels[0]["caption"], again.message) == (7, "slerp A-B at 0.40", "")
    other = explore(*space, Run(tmp_path / "other"), pins=(2, 5))
    assert (other.pin_a, other.method) == (2, "lerp"), "another run has a state of its own"
    say(again, values=[1.0, 2.0, 3.0], mode="sliders")
    fewer = explore(*space, Run(tmp_path), dimensions=2)
    assert (fewer.pin_a, fewer.pin_b, fewer.mode) == (7, 5, "pin"), "sliders that are others begin anew"
    assert fewer.values == list(fewer._space.own_values(7))


def test_a_kept_state_that_shows_nothing_begins_at_a(widget: LatentExplorer, space: Space, tmp_path: Path) -> None:
    say(widget, pin_b=2, method="slerp", mode="path")
    again = explore(*space, Run(tmp_path))
    assert (again.pin_a, again.pin_b, again.mode) == (2, 2, "pin") and "slerp is not defined" in again.message
    assert_shows(again, space, space.posterior.mu[2])


def test_over_other_samples_pins_begin_anew_and_this_is_said(
    widget: LatentExplorer, space: Space, tmp_path: Path
) -> None:
    posterior = Posterior(space.posterior.mu.flip(0)[:6], space.posterior.logvar.flip(0)[:6])
    again = explore(space.model, space.samples.subset(6, seed=1), posterior, space.data, Run(tmp_path), pins=(0, 1))
    assert (again.pin_a, again.pin_b) == (0, 1)
    assert again.message == "The samples are others than before: A and B begin anew."
