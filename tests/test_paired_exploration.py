from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import KINDS, PINNED, SIZES, Space, clips, open_space
from PIL import Image

from workbench.comparison import decode, encode_split
from workbench.datasets.frames import DataError
from workbench.layers import Posterior
from workbench.models import build_vae
from workbench.paired_exploration import PairedExploration
from workbench.runs import Run
from workbench.spaces import Space as Walked
from workbench.spaces import State, save_strip

pytestmark = pytest.mark.usefixtures("one_thread")


def retrained(space: Space, kind: str) -> Space:
    """Another model of the same samples."""
    torch.manual_seed(3)
    model = build_vae({"data_kind": kind} | SIZES[kind], space.data.sizes).eval()
    return space._replace(model=model, posterior=encode_split(model, space.samples, 16))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> list[Space]:
    space = open_space(request.param, tmp_path_factory.mktemp(request.param))
    return [space, retrained(space, request.param)]


def paired(one: Space, other: Space) -> PairedExploration:
    return PairedExploration({"one": one.explore(), "other": other.explore()})


def test_one_walk_is_decoded_by_each(pair: list[Space]) -> None:
    found = paired(*pair)
    assert isinstance(found, Walked) and not (found.sliders or found.conditions or found.codes)
    for state in (PINNED, replace(PINNED, position=0.3), replace(PINNED, position=0.3, method="slerp")):
        view, alone = found.view(state), [space.explore().view(state) for space in pair]
        over_time = len(alone[0].panels) > 2
        assert [panel.title for panel in view.panels[:3]] == ["one", "other", "nearest sample"]
        assert [panel.title for panel in view.panels[3:]] == ["one over time", "other over time"] * over_time
        for panel, own in zip(view.panels[3:], alone, strict=False):
            np.testing.assert_array_equal(panel.pixels, own.panels[2].pixels)
        for panel, own in zip(view.panels[:2], alone, strict=True):
            np.testing.assert_array_equal(panel.pixels, own.panels[0].pixels)
            assert panel.caption.startswith(own.panels[0].caption + "; ")
        assert view.neighbour == alone[0].neighbour
        np.testing.assert_array_equal(view.panels[2].pixels, alone[0].panels[1].pixels)
        np.testing.assert_array_equal(view.here, alone[0].here)
        assert torch.equal(view.z, alone[0].z) and view.key == alone[0].key


def test_captions_tell_errors_and_the_nearest_sample_of_each(clips: Space) -> None:
    other = retrained(clips, "clips")
    found, name = paired(clips, other), clips.samples.name
    view = found.view(State(mode="hover", hover=4))
    x = clips.samples.prepare(clips.samples.batch(np.array([4])))["x"]
    for panel, space in zip(view.panels, (clips, other), strict=False):
        error = float(clips.data.error(decode(space.model, space.posterior.mu[4:5]), x)[0])
        assert panel.caption == f"sample {name(4)}, decoded; mse {error:.3g}"
    assert view.panels[2].caption == f"{name(4)}, distance 0 in one, 0 in other"
    between = found.view(replace(PINNED, position=0.5))
    own = [space.explore().view(replace(PINNED, position=0.5)).neighbour for space in (clips, other)]
    assert all(name(sample) in between.panels[2].caption for sample in own)


def test_errors_are_those_of_the_first(clips: Space) -> None:
    values, label = paired(clips, retrained(clips, "clips")).errors()
    np.testing.assert_array_equal(values, clips.explore().errors()[0])
    assert label == "error [per element, [-1, 1] scale] of one"


def test_the_map_is_that_of_the_first(clips: Space) -> None:
    found, first = paired(clips, retrained(clips, "clips")), clips.explore()
    np.testing.assert_array_equal(found.points, first.points)
    assert found.axes == ("PCA axis 1 of z of one", "PCA axis 2 of z of one")
    np.testing.assert_array_equal(found.route(PINNED), first.route(PINNED))
    assert found.route(State()).shape == (0, 2)


def test_both_draw_from_their_priors_or_none_does(clips: Space) -> None:
    other = retrained(clips, "clips")
    found = paired(clips, other)
    view = found.view(State(mode="draw", draw=2))
    for panel, space in zip(view.panels, (clips, other), strict=False):
        expected = space.explore().view(State(mode="draw", draw=2)).panels[0]
        np.testing.assert_array_equal(panel.pixels, expected.pixels)
        assert panel.caption == "draw 2 from the prior", "without an error, as no sample is meant"
    other.model.noise_dim = 0
    fixed = paired(clips, other._replace(posterior=Posterior(other.posterior.mu)))
    assert found.draws and not fixed.draws
    with pytest.raises(ValueError, match="other: no prior to draw from: the latent is deterministic"):
        fixed.view(State(mode="draw", draw=1))


def test_what_one_cannot_show_is_said_with_its_name(clips: Space) -> None:
    other = retrained(clips, "clips")
    mu = other.posterior.mu.clone()
    mu[5] = -mu[2]
    found = paired(clips, other._replace(posterior=Posterior(mu, other.posterior.logvar)))
    assert len(found.view(PINNED).panels) == 3
    with pytest.raises(ValueError, match="other: .* opposite directions have no single shortest arc; use lerp"):
        found.view(replace(PINNED, method="slerp"))
    with pytest.raises(ValueError, match="one: no path yet"):
        found.strip(State(), 9)


def test_a_strip_holds_both(pair: list[Space], tmp_path: Path) -> None:
    png, gif, npz = save_strip(paired(*pair), replace(PINNED, method="slerp"), Run(tmp_path))
    with np.load(npz) as stored:
        assert stored["runs"].tolist() == ["one", "other"] and stored["method"] == "slerp"
        for i, space in enumerate(pair):
            expected = space.explore().map.path(replace(PINNED, method="slerp"), torch.linspace(0, 1, 33))
            np.testing.assert_array_equal(stored[f"latents_{i + 1}"], expected)
        assert "latents" not in stored
    height, width = pair[0].explore().view(PINNED).panels[0].pixels.shape[:2]
    with Image.open(gif) as animation:
        assert animation.width * height == 2 * width * animation.height, "side by side"
    assert Image.open(png).format == "PNG"


def test_spaces_of_other_samples_are_refused(clips: Space) -> None:
    fewer = clips._replace(samples=clips.samples.subset(6), posterior=Posterior(clips.posterior.mu[:6]))
    with pytest.raises(DataError, match="one has 10 samples and other 6: must be the same; encode one split"):
        paired(clips, fewer)
    first = clips._replace(samples=clips.samples.subset(6, seed=1), posterior=Posterior(clips.posterior.mu[:6]))
    with pytest.raises(DataError, match="sample 1 is .* of one and .* of other: must be the same"):
        paired(fewer, first)
    with pytest.raises(DataError, match=r"1 run\(s\) \(one\): must be two different ones; name two"):
        PairedExploration({"one": clips.explore()})
