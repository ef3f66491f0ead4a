"""What the latent explorer shows for each state it can be in; no widget in sight.

A state is what a person has chosen: samples pinned on the map, a place on the path between them, values of sliders.
For each, an `Exploration` gives the latent, what the model decodes from it, and the real sample nearest to it.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from workbench.checkpoints import write_atomically
from workbench.comparison import decode, latent_use
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch, Dataset
from workbench.datasets.opening import Data
from workbench.interpolation import METHODS, interpolate, order_by_kl, prior_samples
from workbench.layers import Posterior
from workbench.metrics import fit_pca
from workbench.runs import Run

FEWEST = 3
"""Points of a map."""
ROUTE_STEPS = 33
"""Points of the path drawn on the map, and pictures of a saved one."""
FIGURE_EVERY = 4
"""Every fourth of them stands in the figure."""
SLIDER_STEPS = 200
GIF_SIDE, GIF_MS = 320, 60  # [px] at most where it has to be enlarged, [ms] of a picture


@dataclass(frozen=True)
class State:
    """What has been chosen in the explorer.

    Args:
        mode: What the picture shows: the sample under the cursor (`hover`), the place on the `path`, the latent of the
            `sliders`, the random `draw`, or the sample pinned last (`pin`).
        hover, pin_a, pin_b: Samples under the cursor and pinned as A and B; -1: none.
        pinned: Which was pinned last, "a" or "b".
        position: Place on the path, from 0 (A) to 1 (B).
        method: Of the path, "lerp" or "slerp".
        values: Value of each slider.
        draw: Number of the random draw, which is its seed.
    """

    mode: str = "pin"
    hover: int = -1
    pin_a: int = -1
    pin_b: int = -1
    pinned: str = "a"
    position: float = 0.0
    method: str = "lerp"
    values: tuple[float, ...] = ()
    draw: int = 0

    @property
    def origin(self) -> int:
        """The sample that sliders start from: A, or the first one."""
        return max(self.pin_a, 0)


class Slider(NamedTuple):
    """Range of one latent dimension, in units of the latent."""

    dimension: int
    name: str
    low: float
    high: float


@dataclass(frozen=True)
class View:
    """What a state shows.

    Args:
        z: The latent; of a draw from a prior that is not one of the whole latent, the one that the draw is encoded to.
        caption: What it is.
        here: Its map coordinates.
        pixels: The decoded sample.
        neighbour: The real sample whose latent is nearest.
        neighbour_pixels: That sample.
        neighbour_caption: Its name, its distance in the latent space, and the error of the decoded sample against it.
    """

    z: Float[Tensor, " d"]
    caption: str
    here: Float[np.ndarray, "2"]
    pixels: UInt8[np.ndarray, "h w 3"]
    neighbour: int
    neighbour_pixels: UInt8[np.ndarray, "h w 3"]
    neighbour_caption: str


class Exploration:
    """The latent space of a model over some samples, with a map of it (PCA), and what each state of a walk shows.

    Attributes: `points`, map coordinates (n, 2) of the samples in [0, 1] at one scale for both axes; `axes`, their
    names; `sliders`, of the dimensions with the largest KL, or variance where the latent is deterministic.

    Args:
        model: Decodes latents, in evaluation mode, wherever it is.
        samples: The real samples.
        posterior: Their posterior; the latents are its means.
        data: What the samples are from; it draws them and measures errors.
        dimensions: Number of sliders; dimensions that nothing moves have none.
        span: Reach of a slider on both sides [standard deviations of the prior, or of deterministic latents]; farther
            where a sample lies farther.

    Raises:
        DataError: latents that are fewer than three, not one of each sample, not as long as the model decodes, of a
            single dimension, or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Dataset,
        posterior: Posterior,
        data: Data,
        dimensions: int = 6,
        span: int | float = 3.0,
    ) -> None:
        _check(model, samples, posterior.mu)
        self.model, self.samples, self.data, self.z = model, samples, data, posterior.mu.float().clone()
        self._pca = fit_pca(lambda: [self.z], n_components=2)
        flat = self._pca.encode(self.z).double()  # (n, 2)
        low, high = flat.amin(0), flat.amax(0)
        self._centre, self._extent = (low + high) / 2, float((high - low).max()) or 1.0
        self.points, self.axes = self.place(self.z), ("PCA axis 1 of z", "PCA axis 2 of z")
        self.sliders = self._make_sliders(posterior, dimensions, span)
        self._gaussian = posterior.logvar is not None and posterior.logvar.shape == self.z.shape
        self._known: tuple[int, Batch, np.ndarray] | None = None

    def place(self, z: Float[Tensor, "m d"]) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of latents; beyond [0, 1] where they lie outside the samples."""
        return ((self._pca.encode(z).double() - self._centre) / self._extent + 0.5).float().numpy()

    def own_values(self, sample: int) -> tuple[float, ...]:
        """Values of the sliders at a sample's own latent."""
        z = self._latent_of(sample)
        return tuple(float(z[slider.dimension]) for slider in self.sliders)

    def view(self, state: State) -> View:
        """What a state shows.

        Raises:
            ValueError: it shows nothing: no such sample, no path, no prior, or not one value for each slider; or the
                nearest sample cannot be read.
        """
        if state.mode == "draw":
            z, x_hat = self._draw(state.draw)
            caption = f"draw {state.draw} from the prior"
        else:
            z, caption = self._latent(state)
            x_hat = decode(self.model, z[None])
        index, distance = self.nearest(z)
        batch, pixels = self._sample(index)
        masked = {"mask": batch["mask"]} if "mask" in batch else {}
        error = float(self.data.error(x_hat, batch["x"], **masked)[0])
        measured = f"distance {distance:.3g} in z, {self.data.error_name} {error:.3g}"
        told = f"nearest sample: {self.samples.name(index)}, {measured}"
        return View(z, caption, self.place(z[None])[0], self.data.pixels(x_hat[0]), index, pixels, told)

    def nearest(self, z: Float[Tensor, " d"]) -> tuple[int, float]:
        """The sample whose latent is nearest to z, the first of equals, and its Euclidean distance."""
        distances = torch.cdist(z[None], self.z, compute_mode="donot_use_mm_for_euclid_dist")[0]  # (n,)
        index = int(distances.argmin())
        return index, float(distances[index])

    def path(self, state: State, steps: int) -> Float[Tensor, "t d"]:
        """Evenly spaced latents from A to B, both included.

        Raises:
            ValueError: A or B is not pinned; for slerp, they are equal, opposite, or zero.
        """
        return interpolate(*self._ends(state), steps, state.method)

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the path; none where A or B is not pinned.

        Raises:
            ValueError: as `path`.
        """
        if min(state.pin_a, state.pin_b) < 0:
            return np.empty((0, 2), np.float32)
        return self.place(self.path(state, ROUTE_STEPS))

    def _ends(self, state: State) -> tuple[Tensor, Tensor]:
        """Latents of A and B."""
        if min(state.pin_a, state.pin_b) < 0:
            raise ValueError("no path yet: pin two samples of the map, as A and as B")
        a, b = self._latent_of(state.pin_a), self._latent_of(state.pin_b)
        if state.method == "slerp" and torch.equal(a, b):
            raise ValueError(
                f"A equal to B ({self.samples.name(state.pin_a)}): slerp is not defined between a latent and itself, "
                "so nothing moves along it; pin another sample, or use lerp"
            )
        return a, b

    def _latent(self, state: State) -> tuple[Tensor, str]:
        """The latent of a state that is no draw, and what it is."""
        if state.mode == "path":
            z = METHODS[state.method](*self._ends(state), torch.tensor([state.position]))
            return z[0], f"{state.method} A-B at {state.position:.2f}"
        if state.mode == "sliders":
            return self._moved(state)
        if state.mode == "hover" and state.hover >= 0:
            return self._latent_of(state.hover), f"sample {self.samples.name(state.hover)}, decoded"
        letter, pin = ("B", state.pin_b) if state.pinned == "b" and state.pin_b >= 0 else ("A", state.pin_a)
        return self._latent_of(max(pin, 0)), self._name_pin(letter, pin)

    def _moved(self, state: State) -> tuple[Tensor, str]:
        """The latent that sliders start from with their values put in, and which of them have moved."""
        if len(state.values) != len(self.sliders):
            raise ValueError(f"{len(state.values)} values of sliders: must be {len(self.sliders)}, one for each")
        z = self._latent_of(state.origin).clone()
        own, moved = self.own_values(state.origin), []
        for slider, value, before in zip(self.sliders, state.values, own, strict=True):
            z[slider.dimension] = value
            if value != before:
                moved.append(f"z[{slider.dimension}] = {value:.2f}")
        caption = self._name_pin("A", state.pin_a)
        return z, f"{caption}, with {', '.join(moved)}" if moved else caption

    @torch.inference_mode()
    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Latent (d,) and sample (1, ...) of a random draw."""
        if not self.model.noise_dim:
            raise ValueError("no prior to draw from: the latent is deterministic; walk between samples instead")
        if self._gaussian:
            z = prior_samples(1, self.z.shape[1], number)
            return z[0], decode(self.model, z)
        x = self.model.sample(1, torch.Generator().manual_seed(number))
        return self.model.encode(x).mu[0].float().cpu(), x.float().cpu()

    def _latent_of(self, sample: int) -> Tensor:
        if not 0 <= sample < len(self.z):
            raise ValueError(f"sample {sample}: must be from 0 to {len(self.z) - 1}")
        return self.z[sample]

    def _name_pin(self, letter: str, pin: int) -> str:
        """A pinned sample, or the first one where none is pinned, for a caption."""
        sample = f"sample {self.samples.name(max(pin, 0))}, decoded"
        return f"{letter}: {sample}" if pin >= 0 else sample

    def _sample(self, index: int) -> tuple[Batch, np.ndarray]:
        """A real sample as a batch of one, and its pixels; the last one is kept."""
        if self._known is None or self._known[0] != index:
            batch = self.samples.prepare(self.samples.batch(np.array([index])))
            self._known = index, batch, self.data.pixels(batch["x"][0].float())
        return self._known[1:]

    def _make_sliders(self, posterior: Posterior, dimensions: int, span: int | float) -> list[Slider]:
        use = latent_use(posterior)
        told = "variance {:.3g}" if posterior.logvar is None else "{:.3g} nats"
        low = torch.minimum(use.centre - span * use.scale, use.mu.amin(0)).tolist()
        high = torch.maximum(use.centre + span * use.scale, use.mu.amax(0)).tolist()
        chosen = [d for d in order_by_kl(use.of_dimension).tolist() if low[d] < high[d]][:dimensions]
        return [Slider(d, f"z[{d}], {told.format(float(use.of_dimension[d]))}", low[d], high[d]) for d in chosen]


def save_strip(space: Exploration, state: State, run: Run) -> list[Path]:
    """Write the path from A to B into the run folder, under the first number k that is free.

    `figures/strip-k.png` shows nine of its 33 pictures between the real samples, `samples/strip-k.gif` all of them;
    `samples/strip-k.npz` holds `latents` (33, d), `positions` (33,), `method`, and `ids` and `names` of A and B.

    Returns:
        The three files.

    Raises:
        ValueError: there is no path, see `Exploration.path`.
        OSError: the run folder cannot be written.
    """
    path = space.path(state, ROUTE_STEPS)  # (t, d)
    x_hat, ends, positions = decode(space.model, path), [state.pin_a, state.pin_b], np.linspace(0, 1, ROUTE_STEPS)
    batch = space.samples.prepare(space.samples.batch(np.array(ends)))
    png, gif, npz = _free(run.path)
    npz.parent.mkdir(exist_ok=True)
    facts = {"latents": path.numpy(), "positions": positions, "method": np.array(state.method)}
    buffer = io.BytesIO()
    np.savez(buffer, **facts, ids=batch["id"].numpy(), names=np.array([space.samples.name(i) for i in ends]))
    write_atomically(npz, buffer.getvalue())
    write_atomically(gif, _gif([space.data.pixels(x) for x in x_hat]))
    row = torch.cat([batch["x"][:1].float(), x_hat[::FIGURE_EVERY], batch["x"][1:].float()])
    titles = ["A", *(f"{position:g}" for position in positions[::FIGURE_EVERY]), "B"]
    figure = space.data.grid({state.method: row}, titles, "sample A, decoded path from 0 to 1, sample B")
    run.figure(figure, png.stem)
    return [png, gif, npz]


def _free(folder: Path) -> list[Path]:
    """The files of the next strip."""
    for k in count(1):
        files = [
            folder / place for place in (f"figures/strip-{k}.png", f"samples/strip-{k}.gif", f"samples/strip-{k}.npz")
        ]
        if not any(file.exists() for file in files):
            break
    return files


def _gif(pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> bytes:
    """Pictures as an endless animation, enlarged with hard edges in whole steps."""
    factor = max(1, GIF_SIDE // max(pictures[0].shape[:2]))
    frames = [Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)) for pixels in pictures]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=GIF_MS, loop=0)
    return buffer.getvalue()


def _check(model: nn.Module, samples: Dataset, z: Tensor) -> None:
    n, d = z.shape
    if n < FEWEST:
        raise DataError(f"{n} samples: a map needs at least {FEWEST} points; hold out or encode more samples")
    if n != len(samples):
        raise DataError(f"{n} latents of {len(samples)} samples: must be one of each; encode this very split")
    if d != model.latent_layout.size:
        raise DataError(f"latents of {d} values: the model decodes {model.latent_layout.size}; encode with this model")
    if d < 2:
        raise DataError("latents of 1 value: a map needs at least 2; train a model with a larger latent")
    broken = int((~torch.isfinite(z)).any(1).sum())
    if broken:
        raise DataError(f"{broken} of {n} latents are not finite: the model is broken; take a better checkpoint")
