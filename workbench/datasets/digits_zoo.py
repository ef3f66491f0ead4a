"""The embedded data set `digits-zoo`: the weights of small networks in the course of their training.

All networks classify scikit-learn's digits. Half of each family are MLPs and half CNNs (`zoo_networks.NETWORKS`). Each
has a recipe: a learning rate, a weight decay, a subset of the digits, and the order in which these are shown. The
family `independent` has an initialisation for each network, the family `shared` one for each architecture; nothing else
differs between them, as networks of one architecture and `seed` have the same recipe in both.

Training. w and v are all weights of a network and their velocity, g the gradient of the mean cross entropy of a batch:

    v <- 0.9 v + g + weight_decay w,    w <- w - learning_rate v

An epoch shows the subset once, in batches of 32; what is left over is left out. The 500 digits held out by
`zoo_networks.digits` are shown to no network: `accuracy` is the share of them that are classified correctly,
`train_accuracy` that of the network's subset, and `gap` = train_accuracy - accuracy.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from workbench.datasets.frames import DataError
from workbench.datasets.generated import write_once
from workbench.datasets.zoo_networks import NETWORKS, accuracy, digits, layer_shapes, logits, network
from workbench.progress import Progress

VERSION = 2  # raise it when the same seed no longer gives the same weights
MANIFEST, WEIGHTS = "digits-zoo.json", "weights"
FAMILIES = ("shared", "independent")
RECIPE_STREAM, START_STREAM = 1, 2  # each random stream has its own number beside the seed

LEARNING_RATE, WEIGHT_DECAY = (0.01, 0.12), (1e-5, 1e-2)  # lowest and highest, uniform in the logarithm
DATA_FRACTION = (0.2, 1.0)  # of the digits to train on, uniform
EPOCHS = (1, 2, 5, 10, 25)
BATCH_SIZE, MOMENTUM = 32, 0.9

State = dict[str, Tensor]


class Recipe(NamedTuple):
    """How one network is trained."""

    learning_rate: float
    weight_decay: float
    subset: Int[np.ndarray, " m"]  # numbers of the digits to train on
    batches: Int[np.ndarray, "t b"]  # the digits of each step
    epoch_steps: int


def write_digits_zoo(folder: Path, seed: int = 0, runs: int = 300, epochs: Sequence[int] = EPOCHS) -> Path:
    """Train and write the data set `digits-zoo`.

    The folder holds `weights/shared_mlp.pt`, `shared_cnn.pt`, `independent_mlp.pt` and `independent_cnn.pt`, each a
    list of (properties, state dict), and `digits-zoo.json`. It gets its name only when complete; a folder written with
    the same settings is returned untouched. A training run gives an entry for each epoch that is kept; properties are
    id, run, family, architecture, dataset, accuracy, train_accuracy, gap, epoch, learning_rate, weight_decay,
    data_fraction, seed (the number of its recipe).

    Args:
        folder: Where the set goes; `<folder>.partial` is used while writing.
        seed: Start of every random stream; the same seed gives the same weights, and on one machine the same bytes.
        runs: Networks trained in each family.
        epochs: The epochs after which weights are kept, rising; the last ends the training.

    Returns:
        The folder.

    Raises:
        ValueError: A number is too small, runs is odd, or epochs do not rise.
        DataError: The folder is this set and lacks files of weights.
        FileExistsError: The folder exists and is not this set, or `<folder>.partial` holds foreign files.
    """
    folder, epochs = Path(folder), list(epochs)
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0")
    if runs < 2 or runs % 2:
        raise ValueError(f"runs={runs}: must be an even number of at least 2, as half are MLPs and half CNNs")
    if not epochs or epochs[0] < 1 or epochs != sorted(set(epochs)):
        raise ValueError(f"epochs={epochs}: must be one or more, rising, the first at least 1")
    manifest = {"generator": "digits-zoo", "version": VERSION, "seed": seed, "runs": runs, "epochs": epochs}
    with _one_thread():
        write_once(folder, manifest, _is_own, lambda into: _write_set(into, manifest))
    names = (f"{family}_{architecture}.pt" for family in FAMILIES for architecture in NETWORKS)
    absent = [name for name in names if not (folder / WEIGHTS / name).is_file()]
    if absent:
        raise DataError(f"{folder / WEIGHTS} lacks {', '.join(absent)}: delete {folder}, and it is trained again")
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside the block: on steps this small, several spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_own(name: str) -> bool:
    files = re.fullmatch(rf"{WEIGHTS}/({'|'.join(FAMILIES)})_({'|'.join(NETWORKS)})\.pt", name)
    return name in (MANIFEST, WEIGHTS) or files is not None


def _write_set(folder: Path, manifest: dict) -> None:
    (folder / WEIGHTS).mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    seed, each, epochs = manifest["seed"], manifest["runs"] // 2, manifest["epochs"]
    drawn = {name: [draw_recipe(name, i, epochs[-1], seed) for i in range(each)] for name in NETWORKS}
    steps = sum(max(len(recipe.batches) for recipe in recipes) for recipes in drawn.values())
    with Progress(steps * len(FAMILIES), "training digits-zoo", "step") as progress:
        for family in FAMILIES:
            for architecture, recipes in drawn.items():
                start = draw_start(architecture, family, each, seed)
                kept = train(architecture, start, recipes, epochs, progress.update)
                entries = _entries(family, architecture, recipes, kept)
                torch.save(entries, folder / WEIGHTS / f"{family}_{architecture}.pt")


def draw_recipe(architecture: str, number: int, epochs: int, seed: int = 0) -> Recipe:
    """The recipe of a network; it depends on its architecture, its number and the seed alone.

    Learning rate and weight decay are rounded to four digits, as they are written.
    """
    rng = np.random.default_rng([seed, RECIPE_STREAM, list(NETWORKS).index(architecture), number])
    rate, decay = (float(f"{np.exp(rng.uniform(*np.log(ends))):.4g}") for ends in (LEARNING_RATE, WEIGHT_DECAY))
    pool = len(digits().train_x)
    subset = rng.permutation(pool)[: round(rng.uniform(*DATA_FRACTION) * pool)]
    steps = len(subset) // BATCH_SIZE
    shown = [rng.permutation(subset)[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE) for _ in range(epochs)]
    return Recipe(rate, decay, subset, np.concatenate(shown), steps)


def draw_start(architecture: str, family: str, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of n networks before training, with a leading axis n: uniform within ± 1 / sqrt(inputs of a unit)."""
    shapes, number = layer_shapes(architecture), list(NETWORKS).index(architecture)
    # [.., 0] and [..] are one stream, as seeds are filled up with zeros: those of `independent` begin at 1
    streams = [[seed, START_STREAM, number, i + 1 if family == "independent" else 0] for i in range(n)]
    rngs = [np.random.default_rng(stream) for stream in streams]
    start = {}
    for name, shape in shapes.items():
        bound = np.prod(shapes[name.replace("bias", "weight")][1:]) ** -0.5
        start[name] = torch.from_numpy(np.stack([rng.uniform(-bound, bound, shape) for rng in rngs])).float()
    return start


def train(
    architecture: str,
    start: dict[str, Tensor],
    recipes: Sequence[Recipe],
    epochs: Sequence[int],
    after_step: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Tensor]]:
    """Train n networks of one architecture at once; what one does after the end of its recipe is not kept.

    Args:
        start: Weights with a leading axis n.
        recipes: Of each network.
        epochs: The epochs after which weights are kept, rising.
        after_step: Called after each step of all.

    Returns:
        For each of the epochs the weights, with a leading axis n.
    """
    data, step = digits(), vmap(partial(_step, network(architecture)))
    rate = torch.tensor([recipe.learning_rate for recipe in recipes], dtype=torch.float32)
    decay = torch.tensor([recipe.weight_decay for recipe in recipes], dtype=torch.float32)
    ends = {epoch: torch.tensor([epoch * recipe.epoch_steps for recipe in recipes]) for epoch in epochs}
    weights, velocity = start, {name: torch.zeros_like(weight) for name, weight in start.items()}
    kept = {epoch: {name: torch.empty_like(weight) for name, weight in start.items()} for epoch in epochs}
    for t, shown in enumerate(_shown(recipes), start=1):
        weights, velocity = step(weights, velocity, rate, decay, data.train_x[shown], data.train_y[shown])
        for epoch, end in ends.items():
            if (t == end).any():
                for name, weight in weights.items():
                    kept[epoch][name][t == end] = weight[t == end]
        after_step()
    return kept


def _shown(recipes: Sequence[Recipe]) -> Int[Tensor, "t n b"]:
    """The digits of each step of all; the first digit again and again where a recipe is over."""
    longest = max(len(recipe.batches) for recipe in recipes)
    shown = torch.zeros(longest, len(recipes), BATCH_SIZE, dtype=torch.int64)
    for i, recipe in enumerate(recipes):
        shown[: len(recipe.batches), i] = torch.from_numpy(recipe.batches)
    return shown


def _step(
    model: nn.Module, weights: State, velocity: State, rate: Tensor, decay: Tensor, x: Tensor, y: Tensor
) -> tuple[State, State]:
    """One step of one network, by the formula at the head of this module."""
    gradient = grad(lambda own: cross_entropy(functional_call(model, own, x), y))(weights)
    velocity = {name: MOMENTUM * velocity[name] + gradient[name] + decay * weights[name] for name in weights}
    return {name: weights[name] - rate * velocity[name] for name in weights}, velocity


def _entries(
    family: str, architecture: str, recipes: Sequence[Recipe], kept: dict[int, State]
) -> list[tuple[dict[str, Any], State]]:
    """Properties and weights of each run at each epoch."""
    data, entries = digits(), []
    for epoch, weights in kept.items():
        tested = accuracy(weights, architecture, data.test_x, data.test_y).tolist()
        right = logits(weights, architecture, data.train_x).argmax(-1) == data.train_y
        for i, recipe in enumerate(recipes):
            run, trained = f"{family}-{architecture}-{i:03d}", right[i, recipe.subset].double().mean().item()
            properties = {
                "id": f"{run}-epoch-{epoch:02d}",
                "run": run,
                "family": family,
                "architecture": architecture,
                "dataset": "digits",
                "accuracy": tested[i],
                "train_accuracy": trained,
                "gap": trained - tested[i],
                "epoch": epoch,
                "learning_rate": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
                "data_fraction": len(recipe.subset) / len(data.train_x),
                "seed": i,
            }
            entries.append((properties, {name: weight[i].clone() for name, weight in weights.items()}))
    return sorted(entries, key=lambda entry: (entry[0]["seed"], entry[0]["epoch"]))
