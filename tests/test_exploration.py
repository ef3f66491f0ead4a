from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import PINNED, Space, clips, open_space, space

from workbench.comparison import decode
from workbench.datasets.frames import DataError
from workbench.exploration import Exploration
from workbench.layers import Posterior
from workbench.metrics import fit_pca, kl_per_dimension
from workbench.spaces import Range, State

pytestmark = pytest.mark.usefixtures("one_thread")


def with_latents(clips: Space, z: torch.Tensor, logvar: torch.Tensor | None = None) -> Space:
    """The first samples with latents of our own."""
    samples = clips.samples.subset(len(z)) if len(z) <= len(clips.samples) else clips.samples
    return clips._replace(samples=samples, posterior=Posterior(z, logvar))


# --- what is shown ---


def expected_latents(space: Space, explored: Exploration) -> dict[State, torch.Tensor]:
    """Latents of some states, each computed here."""
    mu = space.posterior.mu
    a, b = mu[2], mu[5]
    angle = torch.arccos((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))
    arc = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    dimensions = [slider.dimension for slider in explored.sliders]
    moved = a.clone()
    moved[dimensions] = torch.linspace(-1.5, 2.5, len(dimensions))
    values = tuple(torch.linspace(-1.5, 2.5, len(dimensions)).tolist())
    return {
        State(): mu[0],
        State(mode="hover", hover=4): mu[4],
        State(mode="hover"): mu[0],
        replace(PINNED, mode="pin"): a,
        replace(PINNED, mode="pin", pinned="b"): b,
        State(mode="pin", pin_a=2, pinned="b"): a,
        PINNED: a,
        replace(PINNED, position=1.0): b,
        replace(PINNED, position=0.3): 0.7 * a + 0.3 * b,
        replace(PINNED, position=0.3, method="slerp"): arc.float(),
        State(mode="sliders", pin_a=2, values=values): moved,
        State(mode="sliders", values=explored.own_values(0)): mu[0],
    }


def test_every_state_shows_what_its_latent_decodes_to_beside_the_nearest_sample(space: Space) -> None:
    explored, pictures = space.explore(), set()
    batch = space.samples.prepare(space.samples.batch(np.arange(len(space.samples))))
    for state, z in expected_latents(space, explored).items():
        view = explored.view(state)
        torch.testing.assert_close(view.z, z, atol=1e-5, rtol=1e-5)
        x_hat = decode(space.model, view.z[None])
        np.testing.assert_array_equal(view.panels[0].pixels, space.data.pixels(x_hat[0]))
        distances = np.linalg.norm(space.posterior.mu.double().numpy() - view.z.double().numpy(), axis=1)
        nearest = int(distances.argmin())
        assert view.neighbour == nearest
        np.testing.assert_array_equal(view.panels[1].pixels, space.data.pixels(batch["x"][nearest]))
        weights = batch["mask"][nearest] if "mask" in batch else torch.ones_like(batch["x"][nearest], dtype=torch.bool)
        difference, x = (x_hat[0] - batch["x"][nearest])[weights], batch["x"][nearest]
        error = difference.square().mean()
        if space.data.error_name == "relative_l2":
            error = space.data.errors(x_hat, x[None])["relative_l2"][0]
        name = space.samples.name(nearest)
        assert view.panels[1].caption == (
            f"{name}, distance {distances[nearest]:.3g} in z, {space.data.error_name} {error:.3g}"
        )
        pictures.add(view.panels[0].pixels.tobytes())
    assert len(pictures) >= 6, "states show different pictures"


def test_captions_say_what_is_shown(clips: Space) -> None:
    explored = clips.explore(dimensions=2)
    name, (first, second) = clips.samples.name, explored.sliders
    own = explored.own_values(2)
    captions = {
        State(): f"sample {name(0)}, decoded",
        State(mode="hover", hover=4): f"sample {name(4)}, decoded",
        replace(PINNED, mode="pin"): f"A: sample {name(2)}, decoded",
        replace(PINNED, mode="pin", pinned="b"): f"B: sample {name(5)}, decoded",
        replace(PINNED, position=0.354, method="slerp"): "slerp A-B at 0.35",
        State(mode="sliders", pin_a=2, values=own): f"A: sample {name(2)}, decoded",
        State(mode="sliders", values=(explored.own_values(0)[0], 1.5)): (
            f"sample {name(0)}, decoded, with z[{second.dimension}] = 1.50"
        ),
        State(mode="sliders", pin_a=2, values=(-0.25, 1.5)): (
            f"A: sample {name(2)}, decoded, with z[{first.dimension}] = -0.25, z[{second.dimension}] = 1.50"
        ),
        State(mode="draw", draw=7): "draw 7 from the prior",
    }
    assert {state: explored.view(state).panels[0].caption for state in captions} == captions


def test_draws_are_of_the_prior_and_the_same_for_a_number(clips: Space) -> None:
    explored = clips.explore()
    for number in (1, 2):
        view = explored.view(State(mode="draw", draw=number))
        assert torch.equal(view.z, torch.randn(1, 3, generator=torch.Generator().manual_seed(number))[0])
        sample = clips.model.sample(1, torch.Generator().manual_seed(number))
        np.testing.assert_array_equal(view.panels[0].pixels, clips.data.pixels(sample[0].detach()))


def test_where_the_prior_has_levels_a_draw_is_placed_where_it_is_encoded(tmp_path: Path) -> None:
    space = open_space("simulation", tmp_path)
    view = space.explore().view(State(mode="draw", draw=3))
    with torch.inference_mode():
        x = space.model.sample(1, torch.Generator().manual_seed(3))
        np.testing.assert_array_equal(view.panels[0].pixels, space.data.pixels(x[0]))
        assert torch.equal(view.z, space.model.encode(x).mu[0])


def test_of_equally_near_samples_the_first_is_the_neighbour(clips: Space) -> None:
    z = torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 2]])
    explored = with_latents(clips, z).explore()
    assert explored.map.nearest(torch.zeros(3)) == (1, 1.0)
    assert explored.map.nearest(torch.tensor([0.0, -0.5, 0])) == (2, 0.5)


def test_errors_are_those_that_every_sample_is_shown_with(space: Space) -> None:
    explored, shown = space.explore(), []
    for sample in range(len(space.samples)):
        view = explored.view(State(mode="hover", hover=sample))
        assert view.neighbour == sample
        shown.append(float(view.panels[1].caption.split()[-1]))
    values, label = explored.errors()
    np.testing.assert_allclose(values, shown, rtol=6e-3)
    assert label == space.data.error_label and len(set(shown)) > 3


# --- the map and the sliders ---


def test_the_map_is_pca_at_one_scale_in_the_unit_square(clips: Space) -> None:
    explored, z = clips.explore(), clips.posterior.mu
    plain = fit_pca(lambda: [z], 2).encode(z).numpy()
    low, high = explored.points.min(0), explored.points.max(0)
    np.testing.assert_allclose([low[0], high[0]], [0, 1], atol=1e-6)
    assert 0 < low[1] < high[1] < 1 and low[1] + high[1] == pytest.approx(1, abs=1e-6), "the shorter axis is centred"
    scale = np.ptp(plain[:, 0])
    np.testing.assert_allclose(explored.points - explored.points[0], (plain - plain[0]) / scale, atol=1e-5)
    np.testing.assert_allclose(explored.view(State(mode="hover", hover=3)).here, explored.points[3], atol=1e-6)


def test_latents_that_are_all_the_same_lie_in_the_middle(clips: Space) -> None:
    points = with_latents(clips, torch.ones(4, 3)).explore().points
    np.testing.assert_allclose(points, 0.5)


def test_the_route_is_the_path_on_the_map(clips: Space) -> None:
    explored = clips.explore()
    assert explored.route(State(pin_a=2)).shape == (0, 2)
    straight, arc = explored.route(PINNED), explored.route(replace(PINNED, method="slerp"))
    a, b = explored.points[[2, 5]]
    np.testing.assert_allclose(straight, a + np.linspace(0, 1, len(straight))[:, None] * (b - a), atol=1e-5)
    np.testing.assert_allclose(arc[[0, -1]], [a, b], atol=1e-5)
    assert np.abs(arc - straight).max() > 0.01


def test_sliders_are_of_the_dimensions_of_largest_kl_and_reach_every_sample(clips: Space) -> None:
    mu = torch.tensor([[0.1, 5.0, 1.0], [0.2, 4.0, -1.0], [-0.1, 0.0, 1.0]])
    logvar = torch.zeros(3, 3)
    first, second = with_latents(clips, mu, logvar).explore(dimensions=2, span=2).sliders
    kl = kl_per_dimension(mu, logvar)
    assert first[:2] == (1, f"z[1], {kl[1]:.3g} nats") and second.dimension == 2
    assert (first.low, first.high, second.low, second.high) == (-2, 5, -2, 2)


def test_of_a_deterministic_latent_dimensions_that_nothing_moves_have_no_slider(clips: Space) -> None:
    mu = torch.tensor([[0.0, 7.0, 1.0], [2.0, 7.0, -1.0], [4.0, 7.0, 3.0]])
    first, second = with_latents(clips, mu).explore(span=1).sliders
    assert {first.name, second.name} == {"z[0], variance 4", "z[2], variance 4"}
    assert (first.low, first.high) == (0, 4), "mean 2, standard deviation 2"


# --- what cannot be shown ---


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.randn(2, 3), "2 samples: a map needs at least 3 points; hold out or encode more samples"),
        (torch.randn(11, 3), "11 latents of 10 samples: must be one of each"),
        (torch.randn(4, 5), "latents of 5 values: the model decodes 3; encode with this model"),
        (torch.tensor([[1.0, 2, torch.nan]] * 4), "4 of 4 latents are not finite: the model is broken"),
    ],
)
def test_latents_that_make_no_map_are_refused(clips: Space, z: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_latents(clips, z).explore()


def test_a_latent_of_one_dimension_is_walked_along_a_line(clips: Space) -> None:
    model = type(clips.model)(clips.model.config.model_copy(update={"latent_dim": 1})).eval()
    z = torch.tensor([[0.5], [-1.0], [2.0]])
    explored = with_latents(clips, z, torch.zeros(3, 1))._replace(model=model).explore()
    assert len(explored.sliders) == 1
    view = explored.view(State(mode="path", pin_a=1, pin_b=2, position=0.25))
    torch.testing.assert_close(view.z, torch.tensor([-0.25]))
    np.testing.assert_array_equal(view.panels[0].pixels, clips.data.pixels(decode(model, view.z[None])[0]))
    np.testing.assert_allclose(view.here, 0.75 * explored.points[1] + 0.25 * explored.points[2], atol=1e-6)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (State(mode="path", pin_a=1), "no path yet: pin two samples of the map, as A and as B"),
        (State(mode="path", pin_a=3, pin_b=3, method="slerp"), r"A equal to B \(.*\): slerp is not defined"),
        (State(mode="path", pin_a=0, pin_b=1, method="slerp"), "3.14.* rad apart: opposite directions .*use lerp"),
        (State(mode="path", pin_a=0, pin_b=2, method="slerp"), "a zero vector has no direction; use lerp"),
        (State(mode="hover", hover=4), "sample 4: must be from 0 to 3"),
        (State(mode="sliders", values=(1.0,)), "1 values of sliders: must be 3, one for each"),
        (State(mode="draw"), "no prior to draw from: the latent is deterministic"),
    ],
)
def test_states_that_show_nothing_say_why(clips: Space, state: State, message: str) -> None:
    z = torch.tensor([[1.0, 2, 3], [-1, -2, -3], [0, 0, 0], [1, 0, 1]])
    model = copy(clips.model)
    model.noise_dim = 0
    explored = with_latents(clips, z)._replace(model=model).explore()
    with pytest.raises(ValueError, match=message):
        explored.view(state)


def test_lerp_goes_where_slerp_cannot(clips: Space) -> None:
    z = torch.tensor([[1.0, 2, 3], [-1, -2, -3], [0, 5, 0]])
    explored = with_latents(clips, z).explore()
    assert explored.view(State(mode="path", pin_a=0, pin_b=1, position=0.5)).z.tolist() == [0, 0, 0]
    assert explored.view(State(mode="path", pin_a=1, pin_b=1, position=0.5)).z.tolist() == [-1, -2, -3]


# --- the key of the pictures, and what else is drawn ---


def test_every_kind_has_the_key_of_its_pictures(space: Space) -> None:
    view = space.explore().view(State(mode="hover", hover=1))
    batch = space.samples.prepare(space.samples.batch(np.array([1])))
    assert view.key == space.data.key(batch)
    kinds = {"Clips": None, "Simulations": "numbers", "Layouts": "classes", "Weights": "layers"}
    assert view.key.get("kind") == kinds[type(space.data).__name__]


def test_the_key_is_that_of_the_nearest_network(tmp_path: Path) -> None:
    space = open_space("weights", tmp_path)
    explored, names = space.explore(), space.samples.table()["architecture"]
    first, last = (explored.view(State(mode="hover", hover=i)).key["entries"] for i in (0, len(names) - 1))
    assert names.iloc[0] != names.iloc[-1] and [e[0] for e in first] != [e[0] for e in last]


def test_fields_are_drawn_over_time_too(tmp_path: Path) -> None:
    space = open_space("simulation", tmp_path)
    *_, traces = space.explore().view(State(mode="hover", hover=2)).panels
    x_hat, x = decode(space.model, space.posterior.mu[2:3])[0], space.samples[2]["x"]
    caption, pixels = space.data.traces(x_hat, x)
    assert (traces.title, traces.caption) == ("over time", caption)
    np.testing.assert_array_equal(traces.pixels, pixels)


def test_a_sample_lies_exactly_on_its_point(clips: Space) -> None:
    explored = clips.explore()
    explored.map.place = None  # it is not placed anew, which could be elsewhere
    np.testing.assert_array_equal(explored.view(State(mode="hover", hover=3)).here, explored.points[3])


# --- precision ---


def test_decoding_in_half_precision_differs_by_its_rounding_alone(clips: Space) -> None:
    full, half = (clips.explore(precision=precision).decoded(State())[1] for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="precision='fp16': must be 'fp32' or 'bf16'"):
        clips.explore(precision="fp16")


# --- conditions ---


class Doubling:
    """Predicts the latent (2 a, b, 0) from conditions a and b."""

    ranges = [Range("speed [m/s]", 0.0, 2.0), Range("width [mm]", -1.0, 1.0)]

    def own(self, sample: int) -> tuple[float, ...]:
        return (0.1 * sample, 0.5)

    def codes(self, values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor([2 * values[0], values[1], 0.0])

    def describe(self, values: tuple[float, ...]) -> str:
        return f"speed {values[0]:g}, width {values[1]:g}"


def test_what_is_predicted_from_conditions_is_decoded(clips: Space) -> None:
    explored = clips.explore()
    assert explored.conditions == () and explored.own_conditions(2) == ()
    with pytest.raises(ValueError, match="no conditions to predict from: there is no conditioner; see notebook 03"):
        explored.view(State(mode="conditions", conditions=(1.0,)))
    explored.predictor, explored.conditions = Doubling(), Doubling.ranges
    assert explored.own_conditions(2) == (0.2, 0.5)
    view = explored.view(State(mode="conditions", conditions=(1.5, -0.5)))
    assert view.z.tolist() == [3.0, -0.5, 0.0] and view.panels[0].caption == "predicted from speed 1.5, width -0.5"
    np.testing.assert_array_equal(view.panels[0].pixels, clips.data.pixels(decode(clips.model, view.z[None])[0]))
    np.testing.assert_array_equal(view.here, explored.map.place(view.z[None])[0])


def test_what_the_picture_of_the_nearest_sample_predicts_is_decoded_beside_it(clips: Space) -> None:
    class Ones:
        """Predicts (n, 1, 1) from the picture of the n-th sample."""

        ranges = ()

        def own_codes(self, sample: int) -> torch.Tensor:
            return torch.tensor([float(sample), 1.0, 1.0])

    explored = clips.explore()
    explored.predictor = Ones()
    view = explored.view(State(mode="hover", hover=4))
    x_hat, x = decode(clips.model, torch.tensor([[4.0, 1.0, 1.0]])), clips.samples[4]["x"][None]
    predicted = view.panels[-1]
    told = f"from the picture of {clips.samples.name(4)}, mse {float(clips.data.error(x_hat, x)):.3g}"
    assert len(view.panels) == 3 and (predicted.title, predicted.caption) == ("predicted", told)
    np.testing.assert_array_equal(predicted.pixels, clips.data.pixels(x_hat[0]))
