import base64
import io
import json
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explored import Space, open_space
from PIL import Image
from traitlets import TraitError

from workbench.checkpoints import CheckpointError, save_model
from workbench.comparison import decode, encode_split
from workbench.datasets.frames import DataError
from workbench.latent_explorer import LatentExplorer, colour_points, explore, explore_run
from workbench.layers import Posterior
from workbench.models.conditioners import MLPConditioner, MLPConditionerConfig
from workbench.plots import PALETTE
from workbench.runs import Run, RunError, open_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def space(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    return open_space("clips", tmp_path_factory.mktemp("clips"))


@pytest.fixture
def widget(space: Space, tmp_path: Path) -> LatentExplorer:
    return explore(*space, Run(tmp_path), pins=(2, 5))


def say(widget: LatentExplorer, **traits: Any) -> None:
    """A message of the page, as it arrives."""
    widget.set_state(traits)


def shown(widget: LatentExplorer, name: str = "picture") -> np.ndarray:
    """A picture as the page draws it."""
    rgba = np.frombuffer(getattr(widget, name), np.uint8).reshape(widget.picture_height, widget.picture_width, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def assert_shows(widget: LatentExplorer, space: Space, z: torch.Tensor) -> None:
    np.testing.assert_array_equal(shown(widget), space.data.pixels(decode(space.model, z[None])[0]))


# --- messages and answers ---


def test_every_change_is_answered_once_by_the_picture_of_its_latent(widget: LatentExplorer, space: Space) -> None:
    mu, pictures = space.posterior.mu, [widget.picture]
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
        np.testing.assert_allclose(np.hypot(*widget.here), np.hypot(*widget._space.place(z[None])[0]), rtol=1e-4)
        pictures.append(widget.picture)
    assert len(set(pictures)) == len(pictures), "every picture differs"


def test_an_answer_travels_in_one_message(
    widget: LatentExplorer, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(LatentExplorer, "send_state", lambda self, keys: sent.append(set(keys)))
    say(widget, hover=4, mode="hover")
    answers = [keys for keys in sent if "answered" in keys]
    assert len(answers) == 1 and {"picture", "neighbour", "caption", "here"} <= answers[0]
    say(widget, hover=4, mode="hover")
    assert len([keys for keys in sent if "answered" in keys]) == 1, "what is shown already is not answered again"


def test_the_neighbour_is_the_real_sample_marked_on_the_map(widget: LatentExplorer, space: Space) -> None:
    say(widget, hover=4, mode="hover")
    x = space.samples.prepare(space.samples.batch(np.array([4])))["x"]
    assert widget.neighbour_index == 4
    np.testing.assert_array_equal(shown(widget, "neighbour"), space.data.pixels(x[0]))
    error = float(space.data.error(decode(space.model, space.posterior.mu[4:5]), x))
    assert widget.neighbour_caption == f"nearest sample: {space.samples.name(4)}, distance 0 in z, mse {error:.3g}"
    assert widget.caption == f"sample {space.samples.name(4)}, decoded"
    np.testing.assert_allclose(widget.here, np.frombuffer(widget.points, "<f4").reshape(-1, 2)[4], atol=1e-6)


def test_pins_are_shown_in_the_order_of_their_clicks(space: Space, tmp_path: Path) -> None:
    widget, name = explore(*space, Run(tmp_path)), space.samples.name
    assert (widget.pin_a, widget.pin_b, widget.path, widget.mode) == (-1, -1, b"", "pin")
    assert widget.caption == f"sample {name(0)}, decoded"
    for trait, sample in (("pin_a", 3), ("pin_b", 6), ("pin_a", 1), ("pin_b", 1)):
        say(widget, **{trait: sample, "mode": "pin"})
        assert widget.caption == f"{trait[-1].upper()}: sample {name(sample)}, decoded"
        assert_shows(widget, space, space.posterior.mu[sample])
    say(widget, pin_a=4)
    say(widget, pin_b=-1)
    assert widget.caption == f"A: sample {name(4)}, decoded" and widget.path == b""


def test_the_path_is_drawn_from_a_to_b_as_its_method_goes(widget: LatentExplorer) -> None:
    points = np.frombuffer(widget.points, "<f4").reshape(-1, 2)
    straight = np.frombuffer(widget.path, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(straight[[0, -1]], points[[2, 5]], atol=1e-5)
    say(widget, method="slerp", mode="path")
    arc = np.frombuffer(widget.path, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(arc[[0, -1]], points[[2, 5]], atol=1e-5)
    assert np.abs(arc - straight).max() > 0.01 and widget.caption == "slerp A-B at 0.00"


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
        before = widget.picture, widget.caption, widget.neighbour, widget.here, widget.answered
        say(widget, **traits)
        assert (widget.picture, widget.caption, widget.neighbour, widget.here) == before[:-1]
        assert widget.answered == before[-1] + 1 and widget.path == b""
        with pytest.raises(ValueError, match=message):
            raise ValueError(widget.message)
    say(widget, hover=4, mode="hover")
    assert widget.message == "" and widget.caption == f"sample {space.samples.name(4)}, decoded"


def test_a_sample_that_cannot_be_read_any_more_is_said(
    widget: LatentExplorer, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: object, indices: np.ndarray) -> None:
        raise DataError("clip00 has changed since the data was opened")

    monkeypatch.setattr(type(space.samples), "batch", gone)
    say(widget, hover=4, mode="hover")
    assert widget.message == "clip00 has changed since the data was opened"
    assert widget.caption == "lerp A-B at 0.00"


@pytest.mark.parametrize("trait", ["hover", "pin_a", "pin_b"])
def test_samples_that_are_not_there_are_refused(widget: LatentExplorer, trait: str) -> None:
    for sample in (10, -2):
        with pytest.raises(TraitError, match=f"{trait}={sample}: must be a sample, from 0 to 9, or -1 for none"):
            setattr(widget, trait, sample)
    assert widget.message == "" and getattr(widget, trait) in (-1, 2, 5)


def test_the_path_is_saved_into_the_run_folder(widget: LatentExplorer, tmp_path: Path) -> None:
    picture = widget.picture
    say(widget, save=1)
    assert widget.message == "saved figures/strip-1.png, samples/strip-1.gif, samples/strip-1.npz"
    say(widget, save=2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        *("strip-1.gif", "strip-1.npz", "strip-2.gif", "strip-2.npz"),
    ]
    assert widget.picture == picture
    say(widget, pin_b=-1)
    say(widget, save=3)
    assert widget.message == "no path yet: pin two samples of the map, as A and as B"
    assert not (tmp_path / "figures" / "strip-3.png").exists()


# --- what the page gets once ---


def test_the_page_gets_points_colours_legend_and_sliders(widget: LatentExplorer, space: Space) -> None:
    points = np.frombuffer(widget.points, "<f4").reshape(-1, 2)
    assert len(points) == 10 and points.min() >= 0 and points.max() <= 1
    assert len(widget.colours) == 30 and widget.axes == ["PCA axis 1 of z", "PCA axis 2 of z"]
    assert widget.legend["label"] == "frame" and widget.legend["kind"] == "numbers"
    low = [slider["min"] for slider in widget.dimensions]
    assert all(value <= own.min() for value, own in zip(low, space.posterior.mu.T[[0, 1, 2]], strict=True) if value)
    assert all(slider["min"] < slider["max"] and slider["step"] > 0 for slider in widget.dimensions)
    assert "render" in str(widget._esm)


def test_numbers_are_coloured_from_least_to_most() -> None:
    found = colour_points(np.array([3, 1, 2]), "width [mm]")
    assert (found.label, found.kind) == ("width [mm]", "numbers")
    assert [text for text, _ in found.entries] == ["1", "1.5", "2", "2.5", "3"]
    hexes = ["#" + bytes(rgb).hex() for rgb in found.rgb]
    assert [hexes[1], hexes[2], hexes[0]] == [found.entries[i][1] for i in (0, 2, 4)]
    constant = colour_points(np.full(4, 0.5), "x")
    assert len(constant.entries) == 1 and constant.entries[0][0] == "0.5" and len(np.unique(constant.rgb, axis=0)) == 1


def test_classes_have_colours_of_their_own_and_rare_ones_are_grey() -> None:
    few = colour_points(np.array(["b", "a", "b"], object), "action")
    palette = [tuple(round(255 * part) for part in colour) for colour in PALETTE]
    assert few.kind == "classes" and [text for text, _ in few.entries] == ["a", "b"]
    assert [tuple(rgb) for rgb in few.rgb.tolist()] == [palette[1], palette[0], palette[1]]
    assert len(colour_points(np.arange(10).astype(str), "c").entries) == 10
    many = np.array([f"c{i:02d}" for i in range(12) for _ in range(1 + (i >= 3))])
    found = colour_points(many, "c")
    assert [text for text, _ in found.entries] == [*(f"c{i:02d}" for i in range(3, 12)), "3 others"]
    assert found.entries[-1][1] == "#bebebe" and found.rgb[:3].tolist() == [[190] * 3] * 3
    assert len(np.unique(found.rgb[3:], axis=0)) == 9


def test_columns_that_cannot_colour_are_refused(space: Space, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'height': the data has clip, frame; choose one of them"):
        explore(*space, Run(tmp_path), column="height")
    with pytest.raises(DataError, match=r"column 'x \[mm\]': 2 of 3 values are not finite; choose another column"):
        colour_points(np.array([1.0, np.nan, np.inf]), "x [mm]")


def test_other_columns_colour_by_name(space: Space, tmp_path: Path) -> None:
    widget = explore(*space, Run(tmp_path), "clip")
    assert widget.legend["kind"] == "classes" and widget.legend["label"] == "clip"
    assert [text for text, _ in widget.legend["entries"]] == sorted(set(space.samples.column("clip")))


@pytest.mark.parametrize("pins", [(1, 2, 3), (0, 10), (-1,)])
def test_pins_must_be_samples(space: Space, tmp_path: Path, pins: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pins=\[.*\]: must be at most two samples, from 0 to 9"):
        explore(*space, Run(tmp_path), pins=pins)


# --- without a page, and again ---


def test_without_a_page_there_is_a_picture_of_the_same(widget: LatentExplorer) -> None:
    bundle, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).size == (900, 750)


def test_the_figure_holds_map_pins_and_path_or_what_is_shown(
    widget: LatentExplorer, space: Space, tmp_path: Path
) -> None:
    upper, *lower = widget.figure().axes
    assert [text.get_text() for text in upper.texts] == ["A", "B"] and len(upper.collections[0].get_offsets()) == 10
    assert [ax.get_title() for ax in lower] == [f"{i / 8:g}" for i in range(9)]
    mu = space.posterior.mu
    middle = space.data.pixels(decode(space.model, torch.lerp(mu[2], mu[5], 0.5)[None])[0])
    np.testing.assert_allclose(lower[4].images[0].get_array().astype(int), middle, atol=1)
    assert len(upper.lines) == 1 and len(upper.lines[0].get_xdata()) == 33
    plain = explore(*space, Run(tmp_path / "other")).figure().axes
    assert len(plain[0].texts) == 0 and plain[1].get_title() == f"sample {space.samples.name(0)}, decoded"


def test_a_cell_that_is_run_again_goes_on_where_it_was(widget: LatentExplorer, space: Space, tmp_path: Path) -> None:
    say(widget, pin_a=7, mode="pin")
    say(widget, method="slerp", position=0.4, mode="path")
    again = explore(*space, Run(tmp_path), pins=(2, 5))
    for name in ("pin_a", "pin_b", "position", "method", "mode", "values", "caption", "picture"):
        assert getattr(again, name) == getattr(widget, name), name
    assert (again.pin_a, again.caption, again.message) == (7, "slerp A-B at 0.40", "")
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


# --- runs ---


@pytest.fixture
def finished(space: Space, tmp_path: Path) -> Run:
    run = open_run({"experiment": "e", "run": "r", "data_kind": "clips"} | space.data.config.model_dump(), tmp_path)
    run.record(data={"fingerprint": space.data.fingerprint})
    run.record(model={"kind": "conv_vae"} | space.model.config.model_dump())
    save_model(run.path / "model.safetensors", space.model, "conv_vae")
    return run


def test_a_trained_run_opens_by_its_folder(finished: Run, space: Space) -> None:
    widget = explore_run(finished.path, device="cpu")
    assert_shows(widget, space, encode_split(space.model, space.samples, 16).mu[0])
    say(widget, pin_a=0, pin_b=1, save=1)
    assert (finished.path / "samples" / "strip-1.npz").exists()
    assert len(explore_run(finished.path, "train", "clip", most=4, device="cpu").colours) == 3 * 4


def test_runs_that_cannot_be_explored_are_refused(finished: Run) -> None:
    config = finished.path / "config.json"
    whole, weights = config.read_text(), finished.path / "model.safetensors"
    content = weights.read_bytes()
    config.write_text(whole.replace(finished.config["data"]["fingerprint"], "0" * 16))
    with pytest.raises(RunError, match="was trained on other data or another split"):
        explore_run(finished.path)
    config.write_text(whole)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        explore_run(finished.path)
    weights.unlink()
    with pytest.raises(RunError, match="has no finished model .*run its notebook again to go on"):
        explore_run(finished.path)
    config.write_text(whole[:50])
    with pytest.raises(RunError, match="damaged"):
        explore_run(finished.path)


def test_a_run_of_a_model_without_samples_of_its_own_is_refused(tmp_path: Path) -> None:
    run, model = Run(tmp_path), MLPConditioner(MLPConditionerConfig(width=8))
    (tmp_path / "config.json").write_text(
        json.dumps({"model": {"kind": "mlp_conditioner"} | model.config.model_dump(), "parameters": {}})
    )
    save_model(run.path / "model.safetensors", model, "mlp_conditioner")
    with pytest.raises(RunError, match="holds a model of kind 'mlp_conditioner': must be one of conv_vae, "):
        explore_run(run.path)
