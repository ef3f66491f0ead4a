"""Two models of the same samples in the latent explorer, side by side: one walk, decoded by each."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from workbench.datasets.frames import DataError
from workbench.exploration import Exploration, record_path
from workbench.spaces import NEAREST, Panel, State, Strip, View

Found = TypeVar("Found")


class PairedExploration:
    """Two latent spaces with the same samples, A, B and place between them; a `spaces.Space`.

    The map and the nearest sample are those of the first. Random draws are of each one's own prior, where both have
    one. There are no sliders, as the dimensions of one latent are not those of the other.

    Args:
        spaces: Two spaces by name.

    Raises:
        DataError: there are not two, or their samples differ.
    """

    def __init__(self, spaces: Mapping[str, Exploration]) -> None:
        if len(spaces) != 2:
            raise DataError(f"{len(spaces)} run(s) ({', '.join(spaces)}): must be two different ones; name two")
        self.spaces = dict(spaces)
        (name, self._first), (_, second) = self.spaces.items()
        _check_samples(self.spaces)
        self.samples, self.data, self.points = self._first.samples, self._first.data, self._first.points
        self.axes = tuple(f"{axis} of {name}" for axis in self._first.axes)
        self.sliders, self.conditions, self.codes = (), (), ()
        self.walks, self.draws = True, self._first.draws and second.draws

    def own_values(self, sample: int) -> tuple[float, ...]:
        """Values of sliders: there are none."""
        return ()

    def own_conditions(self, sample: int) -> tuple[float, ...]:
        """Values of conditions: none are predicted from."""
        return ()

    def errors(self) -> tuple[Float[np.ndarray, " n"], str]:
        """Those of the first."""
        values, label = self._first.errors()
        return values, f"{label} of {next(iter(self.spaces))}"

    def view(self, state: State) -> View:
        """What a state shows.

        Raises:
            ValueError: as `Exploration.view`, with the name of the space in which it shows nothing.
        """
        decoded = self._each(lambda space: space.decoded(state))
        z = next(iter(decoded.values()))[0]
        (here, index, _), near, panels, lines = self._first.map.locate(z), {}, [], []
        _, batch, pixels = self._first.real(index)
        for name, (own_z, x_hat, caption) in decoded.items():
            space = self.spaces[name]
            if state.mode != "draw":  # draws of two priors have no sample in common
                error = float(space.error(x_hat, batch))
                caption = f"{caption}; {space.data.error_name} {error:.3g}"
            panels.append(Panel(name, caption, space.data.pixels(x_hat[0])))
            nearest, distance = space.map.nearest(own_z)
            near.setdefault(self.samples.name(nearest), []).append(f"{distance:.3g} in {name}")
            if line := space.headline(x_hat, index):
                lines.append(f"{name}: {line}")
        told = "; ".join(f"{sample}, distance {', '.join(distances)}" for sample, distances in near.items())
        panels.append(Panel(NEAREST, told, pixels))
        if hasattr(self.data, "traces"):
            for name, (_, x_hat, _) in decoded.items():
                panels.append(Panel(f"{name} over time", *self.data.traces(x_hat[0], batch["x"][0])))
        return View(z, here, tuple(panels), index, "; ".join(lines), self.data.key(batch))

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the path in the first space; none where A or B is not pinned.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        return next(iter(self._each(lambda space: space.route(state)).values()))

    def strip(self, state: State, steps: int) -> Strip:
        """The path in so many pictures, a row for each space.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        strips = self._each(lambda space: space.strip(state, steps))
        first = next(iter(strips.values()))
        rows = {name: pictures for name, strip in strips.items() for pictures in strip.rows.values()}
        return Strip(rows, first.titles, first.label)

    def record(self, state: State) -> tuple[Figure, dict[str, np.ndarray]]:
        """The path to be kept, see `record_path`; `runs`, the names of the spaces, `latents_1` and `latents_2` of them.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        figure, arrays, paths = record_path(self.spaces, state)
        latents = {f"latents_{i + 1}": path.numpy() for i, path in enumerate(paths)}
        return figure, arrays | latents | {"runs": np.array(list(self.spaces))}

    def _each(self, ask: Callable[[Exploration], Found]) -> dict[str, Found]:
        """The answer of each space; what one says why it has none, with its name."""
        found = {}
        for name, space in self.spaces.items():
            try:
                found[name] = ask(space)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found


def _check_samples(spaces: Mapping[str, Exploration]) -> None:
    """Refuse spaces of other samples: A, B and the nearest would be others in each."""
    (one, first), (other, second) = ((name, space.samples) for name, space in spaces.items())
    if len(first) != len(second):
        raise DataError(f"{one} has {len(first)} samples and {other} {len(second)}: must be the same; encode one split")
    for i in range(len(first)):
        if first.name(i) != second.name(i):
            names = f"sample {i} is {first.name(i)} of {one} and {second.name(i)} of {other}"
            raise DataError(f"{names}: must be the same; encode the same samples in the same order")
