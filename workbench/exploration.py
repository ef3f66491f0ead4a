"""The latent explorer without its page: a map of samples, and what each state of a walk among them shows.

A latent is shown by the sample it decodes to, beside the real sample nearest to it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from workbench.comparison import decode, latent_use
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch, Dataset
from workbench.datasets.opening import Data
from workbench.datasets.weights import Weights
from workbench.interpolation import order_by_kl, prior_samples
from workbench.latent_map import LatentMap
from workbench.layers import Posterior
from workbench.network_headlines import NetworkHeadline
from workbench.predictions import Predictor
from workbench.process import autocast
from workbench.spaces import FIGURE_EVERY, MEASURED, NEAREST, ROUTE_STEPS, Panel, State, Strip, View


class Slider(NamedTuple):
    """Range of one latent dimension, in units of the latent."""

    dimension: int
    name: str
    low: float
    high: float


class Exploration:
    """The latent space of a model over some samples, with a map of it, and what each state of a walk shows.

    It is a `spaces.Space`; `sliders` are of the dimensions with the largest KL, or variance where the latent is
    deterministic.

    Args:
        model: Decodes latents, in evaluation mode, wherever it is.
        samples: The real samples.
        posterior: Their posterior; the latents are its means.
        data: What the samples are from; it draws them and measures errors.
        dimensions: Number of sliders; dimensions that nothing moves have none.
        span: Reach of a slider on both sides [standard deviations of the prior, or of deterministic latents]; farther
            where a sample lies farther.
        predictor: Of latents from conditions, which get sliders where they are numbers; where they are pictures, what
            that of the nearest sample predicts is shown.
        precision: Of decoding: `fp32`, or `bf16`.
        projection: Of the map: `pca`, or `umap` where that is installed.

    Raises:
        DataError: latents that are fewer than three, not one of each sample, not as long as the model decodes, or not
            finite.
        ValueError: an unknown projection or precision.
        ImportError: UMAP is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Dataset,
        posterior: Posterior,
        data: Data,
        dimensions: int = 6,
        span: int | float = 3.0,
        predictor: Predictor | None = None,
        precision: str = "fp32",
        projection: str = "pca",
    ) -> None:
        self.map, size = LatentMap(posterior.mu, samples, projection), posterior.mu.shape[1]
        if size != model.latent_layout.size:
            expected = model.latent_layout.size
            raise DataError(f"latents of {size} values: the model decodes {expected}; encode with this model")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r}: must be 'fp32' or 'bf16'")
        self.model, self.samples, self.data, self.z = model, samples, data, self.map.z
        self.points, self.axes = self.map.points, self.map.axes
        self.sliders, self.codes = _make_sliders(posterior, dimensions, span), ()
        self.predictor, self.conditions = predictor, predictor.ranges if predictor else ()
        self._precision, self._headline = precision, NetworkHeadline(data) if isinstance(data, Weights) else None
        self.walks, self.draws = True, bool(model.noise_dim)
        self._gaussian = posterior.logvar is not None and posterior.logvar.shape == self.z.shape
        self._known: tuple[int, Batch, Batch, np.ndarray] | None = None

    @torch.inference_mode()
    def decode(self, z: Float[Tensor, "m d"]) -> Float[Tensor, "m ..."]:
        """Samples that latents decode to, on the CPU in float32."""
        with autocast(next(self.model.parameters()).device, self._precision):
            return decode(self.model, z)

    def own_values(self, sample: int) -> tuple[float, ...]:
        """Values of the sliders at a sample's own latent."""
        z = self.map.latent(sample)
        return tuple(float(z[slider.dimension]) for slider in self.sliders)

    def own_conditions(self, sample: int) -> tuple[float, ...]:
        """A sample's own conditions, one for each slider of them."""
        return self.predictor.own(sample) if self.conditions else ()

    def view(self, state: State) -> View:
        """What a state shows.

        Raises:
            ValueError: it shows nothing: no such sample, no path, no prior, or not one value for each slider; or the
                nearest sample cannot be read.
        """
        z, x_hat, caption = self.decoded(state)
        here, index, distance = self.map.locate(z)
        _, batch, pixels = self.real(index)
        measured = f"distance {distance:.3g} in z, {self.data.error_name} {float(self.error(x_hat, batch)):.3g}"
        told = f"{self.samples.name(index)}, {measured}"
        panels = [Panel("decoded", caption, self.data.pixels(x_hat[0])), Panel(NEAREST, told, pixels)]
        if hasattr(self.data, "traces"):
            panels.append(Panel("over time", *self.data.traces(x_hat[0], batch["x"][0])))
        if self.predictor and not self.conditions:
            panels.append(self._foretell(index, batch))
        return View(z, here, tuple(panels), index, self.headline(x_hat, index), self.data.key(batch))

    def _foretell(self, index: int, batch: Batch) -> Panel:
        """What the conditioner makes of the picture that belongs to a real sample."""
        x_hat = self.decode(self.predictor.own_codes(index)[None])
        measured = f"{self.data.error_name} {float(self.error(x_hat, batch)):.3g}"
        caption = f"from the picture of {self.samples.name(index)}, {measured}"
        return Panel("predicted", caption, self.data.pixels(x_hat[0]))

    def headline(self, x_hat: Float[Tensor, "1 ..."], index: int) -> str:
        """How well a decoded network works beside a real one; empty where samples are no networks."""
        return self._headline(x_hat, self.real(index)[0]) if self._headline else ""

    def decoded(self, state: State) -> tuple[Float[Tensor, " d"], Float[Tensor, "1 ..."], str]:
        """The latent of a state, the sample it decodes to, and what it is.

        Raises:
            ValueError: as `view`.
        """
        if state.mode == "draw":
            return *self._draw(state.draw), f"draw {state.draw} from the prior"
        z, caption = self._latent(state)
        return z, self.decode(z[None]), caption

    def error(self, x_hat: Float[Tensor, "b ..."], batch: Batch) -> Float[Tensor, " b"]:
        """The data's error of decoded samples against real ones."""
        masked = {"mask": batch["mask"]} if "mask" in batch else {}
        return self.data.error(x_hat, batch["x"], **masked)

    def errors(self) -> tuple[Float[np.ndarray, " n"], str]:
        """The data's error of every sample as its latent decodes, and what that is."""
        parts = []
        for chosen in torch.arange(len(self.z)).split(MEASURED):
            batch = self.samples.prepare(self.samples.batch(chosen.numpy()))
            parts.append(self.error(self.decode(self.z[chosen]), batch))
        return torch.cat(parts).double().numpy(), self.data.error_label

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the path, see `LatentMap.route`."""
        return self.map.route(state)

    def strip(self, state: State, steps: int) -> Strip:
        """The path in so many pictures.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        x_hat = self.decode(self.map.path(state, torch.linspace(0, 1, steps)))
        titles = [f"{position:g}" for position in np.linspace(0, 1, steps)]
        rows = {state.method: [self.data.pixels(x) for x in x_hat]}
        return Strip(rows, titles, f"{state.method}, position on the path from A (0) to B (1)")

    def record(self, state: State) -> tuple[Figure, dict[str, np.ndarray]]:
        """The path to be kept: nine pictures between the real samples; `latents` (33, d), `positions` (33,), `method`,
        and `ids` and `names` of A and B.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        figure, arrays, (path,) = record_path({state.method: self}, state)
        return figure, arrays | {"latents": path.numpy()}

    def _latent(self, state: State) -> tuple[Tensor, str]:
        """The latent of a state that is no draw, and what it is."""
        if state.mode == "path":
            z = self.map.path(state, torch.tensor([state.position]))
            return z[0], f"{state.method} A-B at {state.position:.2f}"
        if state.mode == "sliders":
            return self._moved(state)
        if state.mode == "conditions":
            return self._predicted(state)
        z = self.map.latent(state.sample)
        if state.mode == "hover" and state.hover >= 0:
            return z, f"sample {self.samples.name(state.hover)}, decoded"
        b = state.pinned == "b" and state.pin_b >= 0
        return z, self._name_pin("B", state.pin_b) if b else self._name_pin("A", state.pin_a)

    def _moved(self, state: State) -> tuple[Tensor, str]:
        """The latent that sliders start from with their values put in, and which of them have moved."""
        if len(state.values) != len(self.sliders):
            raise ValueError(f"{len(state.values)} values of sliders: must be {len(self.sliders)}, one for each")
        z = self.map.latent(state.origin).clone()
        own, moved = self.own_values(state.origin), []
        for slider, value, before in zip(self.sliders, state.values, own, strict=True):
            z[slider.dimension] = value
            if value != before:
                moved.append(f"z[{slider.dimension}] = {value:.2f}")
        caption = self._name_pin("A", state.pin_a)
        return z, f"{caption}, with {', '.join(moved)}" if moved else caption

    def _predicted(self, state: State) -> tuple[Tensor, str]:
        """The latent that is predicted from conditions, and these."""
        if self.predictor is None:
            raise ValueError("no conditions to predict from: there is no conditioner; see notebook 03")
        z = self.predictor.codes(state.conditions)
        return z, f"predicted from {self.predictor.describe(state.conditions)}"

    @torch.inference_mode()
    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Latent (d,) and sample (1, ...) of a random draw."""
        if not self.draws:
            raise ValueError("no prior to draw from: the latent is deterministic; walk between samples instead")
        if self._gaussian:
            z = prior_samples(1, self.z.shape[1], number)
            return z[0], self.decode(z)
        x = self.model.sample(1, torch.Generator().manual_seed(number))
        return self.model.encode(x).mu[0].float().cpu(), x.float().cpu()

    def _name_pin(self, letter: str, pin: int) -> str:
        """A pinned sample, or the first one where none is pinned, for a caption."""
        sample = f"sample {self.samples.name(max(pin, 0))}, decoded"
        return f"{letter}: {sample}" if pin >= 0 else sample

    def real(self, index: int) -> tuple[Batch, Batch, np.ndarray]:
        """A real sample as a batch of one, raw and prepared, and its pixels; the last one is kept."""
        if self._known is None or self._known[0] != index:
            raw = self.samples.batch(np.array([index]))
            batch = self.samples.prepare(raw)
            self._known = index, raw, batch, self.data.pixels(batch["x"][0].float())
        return self._known[1:]


def record_path(
    spaces: Mapping[str, Exploration], state: State
) -> tuple[Figure, dict[str, np.ndarray], list[Float[Tensor, "t _"]]]:
    """The path from A to B to be kept, through one or several spaces with the same samples.

    Returns:
        A figure with a row for each space, nine decoded pictures between the real samples; `positions` (33,), `method`,
        and `ids` and `names` of A and B; the latents (33, d) in each space.

    Raises:
        ValueError: as `LatentMap.path`.
    """
    positions, pins = torch.linspace(0, 1, ROUTE_STEPS), [state.pin_a, state.pin_b]
    paths = {name: space.map.path(state, positions) for name, space in spaces.items()}
    first = next(iter(spaces.values()))
    batch = first.samples.prepare(first.samples.batch(np.array(pins)))
    a, b = batch["x"].float().split(1)
    rows = {name: torch.cat([a, spaces[name].decode(path[::FIGURE_EVERY]), b]) for name, path in paths.items()}
    titles = ["A", *(f"{position:g}" for position in positions[::FIGURE_EVERY].tolist()), "B"]
    figure = first.data.grid(rows, titles, f"sample A, path decoded ({state.method}) from 0 to 1, sample B")
    arrays = {"positions": positions.numpy(), "method": np.array(state.method), "ids": batch["id"].numpy()}
    return figure, arrays | {"names": np.array([first.samples.name(pin) for pin in pins])}, list(paths.values())


def _make_sliders(posterior: Posterior, dimensions: int, span: int | float) -> list[Slider]:
    use = latent_use(posterior)
    told = "variance {:.3g}" if posterior.logvar is None else "{:.3g} nats"
    low = torch.minimum(use.centre - span * use.scale, use.mu.amin(0)).tolist()
    high = torch.maximum(use.centre + span * use.scale, use.mu.amax(0)).tolist()
    chosen = [d for d in order_by_kl(use.of_dimension).tolist() if low[d] < high[d]][:dimensions]
    return [Slider(d, f"z[{d}], {told.format(float(use.of_dimension[d]))}", low[d], high[d]) for d in chosen]
