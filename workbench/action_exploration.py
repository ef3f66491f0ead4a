"""What the latent explorer shows of latent actions: what they make of the first frames of pairs.

A pair under the cursor, or pinned, is shown by its first frame, what the model makes of that under the pair's own
action, and what really came next. A's first frame is the one that chosen codes act on, each on the frame that the one
before has made; where actions are continuous, those on the path from A's action to B's act on it.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from workbench.action_codes import Actions, frequent_words
from workbench.datasets.clips import ClipDataset, Clips
from workbench.datasets.frames import DataError
from workbench.datasets.loading import Batch
from workbench.datasets.opening import open_data
from workbench.latent_map import LatentMap
from workbench.models.laq import LAQ
from workbench.process import autocast
from workbench.provenance import check_same_data
from workbench.rivals import Rival
from workbench.runs import RunError, load_run
from workbench.spaces import FIGURE_EVERY, MEASURED, ROUTE_STEPS, Panel, State, Strip, View

CODES = "codes"
"""Column of the pairs' table with their words."""
SHOWN = 6
"""Last frames of a chain that are shown."""
LONGEST = ROUTE_STEPS - 1
"""Codes of a chain."""
CHAIN_MS = 400
"""Duration of a frame in a chain's animation [ms]."""


class CodedPairs(ClipDataset):
    """Pairs of frames whose table has a column `codes` with the word of each.

    Args:
        pairs: The pairs.
        words: One for each.
    """

    def __init__(self, pairs: ClipDataset, words: list[str]) -> None:
        super().__init__(pairs.clips, pairs.slots, pairs.segment)
        self.words = words

    def table(self) -> pd.DataFrame:
        """What is known of each pair, and its word."""
        return super().table().assign(**{CODES: self.words})


class ActionExploration:
    """Latent actions of pairs of frames on a map, as they are before they are quantized; a `spaces.Space`.

    Discrete actions have `codes`, the most frequent words with their shares of the pairs, which may be chained;
    continuous ones a path from one to another.

    Args:
        rival: A latent action model in evaluation mode, wherever it is.
        pairs: The pairs on the map.
        actions: What the model says of them, see `actions_of`.
        data: What they are from.
        words: So many words, at most.
        precision: Of decoding: `fp32`, or `bf16`.
        projection: Of the map, see `Projection`.

    Raises:
        DataError: the model has no latent actions, or they make no map (see `LatentMap`).
        ValueError, ImportError: see `Projection`; or another precision.
    """

    def __init__(
        self,
        rival: Rival,
        pairs: ClipDataset,
        actions: Actions,
        data: Clips,
        words: int = 8,
        precision: str = "fp32",
        projection: str = "pca",
    ) -> None:
        if not rival.acts:
            raise DataError(f"{rival.name} has no latent actions: explore its latents with `explore`")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r}: must be 'fp32' or 'bf16'")
        self.rival, self.data, self.samples, self._own, self._precision = rival, data, pairs, actions.indices, precision
        self._map, self._shape = LatentMap(actions.features.flatten(1), pairs, projection), actions.features.shape[1:]
        self.points, self.axes = self._map.points, self._map.axes
        self.sliders, self.conditions, self.codes, self._words = (), (), (), ()
        self.walks, self.draws = self._own is None, False
        if self._own is not None:
            frequent = frequent_words(actions, words)
            self.codes, self._words = tuple(frequent), tuple(frequent.values())
            self.samples = CodedPairs(pairs, [spell(word) for word in self._own])
        self._frame = lru_cache(2 * ROUTE_STEPS)(self._make_frame)

    def own_values(self, sample: int) -> tuple[float, ...]:
        """Values of sliders: there are none."""
        return ()

    def own_conditions(self, sample: int) -> tuple[float, ...]:
        """Values of conditions: none are predicted from."""
        return ()

    def errors(self) -> tuple[Float[np.ndarray, " n"], str]:
        """The data's error of every next frame, as it is decoded under the pair's own action, and what that is."""
        parts, codes = [], self._map.z if self._own is None else self._own
        for chosen in torch.arange(len(codes)).split(MEASURED):
            batch = self.samples.prepare(self.samples.batch(chosen.numpy()))
            parts.append(self.data.error(self._act(batch["first"], codes[chosen]), batch["x"]))
        return torch.cat(parts).double().numpy(), self.data.error_label

    def view(self, state: State) -> View:
        """What a state shows.

        Raises:
            ValueError: it shows nothing: no such pair or code, no path, or a chain that is too long; or the frames
                cannot be read.
        """
        if state.mode == "codes" and state.chain:
            panels, word = self._show_chain(state), self._words[state.chain[-1]]
            z = self._map.z[(self._own == word).all(1)].mean(0)  # of the pairs with the last word
        elif state.mode == "path":
            if not self.walks:
                raise ValueError("no path between words of codes: choose codes, which act on the first frame")
            z = self._map.path(state, torch.tensor([state.position]))[0]
            panels = self._show_pair(state.pin_a, state, z, f"under {state.method} A-B at {state.position:.2f}")
        else:
            z = self._map.latent(state.sample)
            panels = self._show_pair(state.sample, state, z)
        here, index, _ = self._map.locate(z)
        return View(z, here, panels, index)

    def route(self, state: State) -> Float[np.ndarray, "m 2"]:
        """Map coordinates of the path between continuous actions; none for words.

        Raises:
            ValueError: as `LatentMap.path`.
        """
        return self._map.route(state) if self.walks else np.empty((0, 2), np.float32)

    def strip(self, state: State, steps: int) -> Strip:
        """The path in so many pictures; of a chain at most so many, the first frame and the last ones.

        Raises:
            ValueError: there is no path, or no chain.
        """
        pixels = self.data.pixels
        if self.walks:
            frames, titles = self._walk(state, steps), [f"{t:g}" for t in np.linspace(0, 1, steps)]
            label = f"{state.method}, position on the path from A's action (0) to B's (1)"
            return Strip({state.method: [pixels(x) for x in frames]}, titles, label)
        frames, titles = self._chain(state)
        kept = [0, *range(max(1, len(frames) - steps + 1), len(frames))]
        rows = {"codes": [pixels(frames[i]) for i in kept]}
        return Strip(rows, [titles[i] for i in kept], "each code acts on the frame before it", CHAIN_MS)

    def record(self, state: State) -> tuple[Figure, dict[str, np.ndarray]]:
        """The walk to be kept, with `ids` and `names` of the pairs it is of.

        Of a path nine frames after A's first frame, `latents` (33, d), `positions` (33,) and `method`; of a chain all
        of its frames, and `indices` (k, length) of its words.

        Raises:
            ValueError: as `strip`.
        """
        pairs = [state.pin_a, state.pin_b] if self.walks else [state.origin]
        names = np.array([self.samples.name(i) for i in pairs])
        of_pairs = {"names": names, "ids": self.samples.batch(np.array(pairs))["id"].numpy()}
        if not self.walks:
            frames, titles = self._chain(state)
            figure = self.data.grid({"codes": frames}, titles, f"codes on the first frame of {names[0]}")
            return figure, of_pairs | {"indices": torch.stack([self._words[i] for i in state.chain]).numpy()}
        positions = torch.linspace(0, 1, ROUTE_STEPS)
        row = torch.cat([self._frame(state.pin_a), self._walk(state, ROUTE_STEPS)[::FIGURE_EVERY]])
        titles = ["first frame", *(f"{t:g}" for t in positions[::FIGURE_EVERY].tolist())]
        label = "A's first frame, and what follows it under actions from A's to B's"
        figure = self.data.grid({state.method: row}, titles, label)
        arrays = {"latents": self._map.path(state, positions).numpy(), "positions": positions.numpy()}
        return figure, of_pairs | arrays | {"method": np.array(state.method)}

    @torch.inference_mode()
    def _act(self, first: Float[Tensor, "b c h w"], codes: Tensor) -> Float[Tensor, "b c h w"]:
        """What words (b, length), or continuous actions (b, d), make of frames; on the CPU."""
        codes = codes.unflatten(1, self._shape) if codes.is_floating_point() else codes
        device = next(self.rival.model.parameters()).device
        with autocast(device, self._precision):
            return self.rival.imagine(first.to(device), codes.to(device)).float().cpu()

    def _read(self, sample: int) -> Batch:
        self._map.latent(sample)  # refuses what is no sample
        return self.samples.prepare(self.samples.batch(np.array([sample])))

    def _make_frame(self, sample: int, chain: tuple[int, ...] = ()) -> Float[Tensor, "1 c h w"]:
        """A pair's first frame after a chain of codes."""
        if not chain:
            return self._read(sample)["first"]
        return self._act(self._frame(sample, chain[:-1]), self._words[chain[-1]][None])

    def _walk(self, state: State, steps: int) -> Float[Tensor, "t c h w"]:
        """A's first frame under actions from A's own to B's."""
        z = self._map.path(state, torch.linspace(0, 1, steps))
        return self._act(self._frame(state.pin_a).expand(steps, -1, -1, -1), z)

    def _chain(self, state: State) -> tuple[Float[Tensor, "t c h w"], list[str]]:
        """The first frame and what the codes make of it one after the other, and the word that leads to each."""
        chain, n = state.chain, len(self._words)
        if not chain:
            raise ValueError("no chain yet: let codes act on the first frame")
        outside = [code for code in chain if not 0 <= code < n]
        if outside:
            raise ValueError(f"code {outside[0]}: there are {n} to choose from, counted from 0")
        if len(chain) > LONGEST:
            raise ValueError(f"a chain of {len(chain)} codes: must be at most {LONGEST}; undo some, or clear it")
        frames = [self._frame(state.origin, chain[:k]) for k in range(len(chain) + 1)]
        return torch.cat(frames), ["first frame", *(spell(self._words[code]) for code in chain)]

    def _show_chain(self, state: State) -> tuple[Panel, ...]:
        frames, titles = self._chain(state)
        first = Panel(titles[0], self._name(state.origin, state), self.data.pixels(frames[0]))
        last = range(max(1, len(frames) - SHOWN), len(frames))
        return first, *(Panel(f"frame {k}", f"after {titles[k]}", self.data.pixels(frames[k])) for k in last)

    def _show_pair(self, sample: int, state: State, z: Float[Tensor, " d"], how: str = "") -> tuple[Panel, ...]:
        """A pair's first frame, what an action makes of it, by default the pair's own, and what really came next."""
        batch, pixels = self._read(sample), self.data.pixels
        codes = z if self._own is None else self._own[sample]
        x_hat = self._act(batch["first"], codes[None])
        if not how:
            own = "its own action" if self._own is None else f"its own codes {spell(codes)}"
            error = float(self.data.error(x_hat, batch["x"])[0])
            how = f"under {own}, {self.data.error_name} {error:.3g}"
        return (
            Panel("first frame", self._name(sample, state), pixels(batch["first"][0])),
            Panel("decoded next frame", how, pixels(x_hat[0])),
            Panel("real next frame", "what came next", pixels(batch["x"][0])),
        )

    def _name(self, sample: int, state: State) -> str:
        """A pair, and whether it is A or B."""
        letters = [letter for letter, pin in (("A", state.pin_a), ("B", state.pin_b)) if pin == sample]
        return f"{' and '.join(letters)}{': ' * bool(letters)}pair {self.samples.name(sample)}"


def spell(word: Int[Tensor, " length"]) -> str:
    """A word of codes as text: `3-1-0-2`."""
    return "-".join(map(str, word.tolist()))


def load_action_model(path: str | Path, checkpoint: str = "final") -> tuple[Rival, Clips]:
    """The latent action model of a run folder, and its clips.

    Raises:
        RunError: the run is unfinished, holds another model, or was trained on other data.
        CheckpointError: its files are damaged.
        DataError: see `open_data`.
    """
    path = Path(path)
    model, config = load_run(path, checkpoint)
    if not isinstance(model, LAQ):
        raise RunError(f"{path} holds a model of kind {config['model']['kind']!r}: must be laq")
    data = open_data(config["parameters"])
    check_same_data(path, config, data.fingerprint)
    return Rival("LAQ", model, config["parameters"]["seed"], str(path)), data
