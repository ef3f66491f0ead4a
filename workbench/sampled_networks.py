"""Networks sampled from a latent space: what they do on the digits held out, and whether they are only remembered.

Distances are Euclidean, between all weights of two networks in their own unit. Networks that a model rebuilds are
pulled towards the mean network, which lies near to every one: such a network has a small distance to the nearest
training network without being a copy of it. What tells one from the other is how much nearer the nearest training run
is than the second-nearest.

Source: Ledoit & Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn
from torch.nn import functional

from workbench.datasets.flat_weights import Architecture, LayerInfo
from workbench.datasets.frames import DataError
from workbench.datasets.weights import WeightDataset, Weights
from workbench.datasets.zoo_networks import digits, logits
from workbench.decoded_networks import as_states, predict, share_correct
from workbench.interpolation import prior_samples
from workbench.rebuilding import MEAN, Networks, rebuild, squared_errors

MEMBERS = 5
"""Networks of an ensemble."""
COPY = 0.1
"""Novelty below which a network counts as a copy of a training network."""
LOWEST = 0.05
"""Share of the rebuilt held-out networks below whose ratios a network counts as nearer to one run than they are."""
HELD_OUT, REBUILT, REMEMBERED = "held-out networks", "rebuilt held-out networks", "rebuilt training networks"
PRIOR, LATENTS = "networks drawn from the prior", "networks drawn from the latents"
NOISE, ENSEMBLE = "training networks with noise", f"ensembles of {MEMBERS} training networks"


def sampled_networks(
    model: nn.Module,
    data: Weights,
    train: Networks,
    test: Networks,
    z_train: Float[Tensor, "n k"],
    rebuilt_train: Float[Tensor, "n d"],
    rebuilt_test: Float[Tensor, "m d"],
    draws: int,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[pd.DataFrame, list[str]]:
    """Networks drawn from a latent space: what they can do, and whether they are memory; beside what costs no model.

    For each architecture by itself, networks are drawn from the prior N(0, I), and from a Gaussian fitted to the
    latents of the training networks. Where the KL weighs next to nothing, latents lie far from the prior, whose draws
    decode to what the model was never trained on. Beside them: held-out networks, as they are and rebuilt;
    rebuilt training networks, as many as draws; the mean network; training networks with noise of the size of the
    held-out networks' error; and the mean softmax of 5 training networks.

    Args:
        model, data: See `rebuilding.rebuild`. The nearest networks are sought in the whole training split of the data.
        train, test: Training networks, perhaps some of them only, and held-out ones.
        z_train: Latents of the training networks.
        rebuilt_train, rebuilt_test: What the model makes of the networks.
        draws: Of each kind and architecture.
        batch_size: Latents, and networks of the training split, at a time.

    Returns:
        Rows, and a sentence on each architecture that is left out. Columns method, architecture, accuracy; novelty:
        distance to the nearest training network, over the median of it for held-out networks (0: a copy; 1: as new as
        another run); ratio: distance to the nearest training run over that to the second-nearest (0: a copy; 1: as near
        to two; NaN of a single run). Both are NaN of ensembles.

    Raises:
        DataError: an architecture that cannot be run, or whose held-out networks are copies of training networks; every
            architecture has fewer than 2 training networks.
    """
    split, parts = data.split("train"), []
    drawable, notes = _drawable(train, test)
    for number, rows, own in drawable:
        architecture, rng = test.architectures[number], np.random.default_rng([seed, number])
        known, rebuilt = (train.weights[own], test.weights[rows]), (rebuilt_train[own], rebuilt_test[rows])
        z = torch.cat([prior_samples(draws, z_train.shape[1], seed), gaussian_draws(z_train[own], draws, rng)])
        drawn = rebuild(model, data, z, np.full(len(z), number), batch_size)
        weights = {PRIOR: drawn[:draws], LATENTS: drawn[draws:]}
        weights |= _controls(*known, *rebuilt, architecture.layers, draws, rng)
        parts.append(_judged(weights, split, architecture, number, batch_size))
        parts.append(_part(ENSEMBLE, architecture, ensemble_accuracies(known[0], architecture, draws, rng)))
    return pd.concat(parts, ignore_index=True), notes


def _drawable(train: Networks, test: Networks) -> tuple[list[tuple[int, np.ndarray, np.ndarray]], list[str]]:
    """Architectures with 2 training networks or more, and a sentence on each other one.

    Of each its number, and the positions of its held-out and of its training networks.
    """
    found, notes = [], []
    for architecture, rows in test.each():
        number = int(test.architecture[rows[0]])
        own = np.flatnonzero(train.architecture == number)
        if len(own) > 1:
            found.append((number, rows, own))
            continue
        size = f"{len(own)} of the {len(train)} training networks taken"
        notes.append(f"architecture {architecture.name!r} has {size}: needs 2 to draw from; it is left out")
    if not found:
        raise DataError(f"no architecture is left to draw from: {'; '.join(notes)}; raise train_samples")
    return found, notes


def _controls(
    train: Tensor,
    test: Tensor,
    rebuilt_train: Tensor,
    rebuilt_test: Tensor,
    layers: Sequence[LayerInfo],
    draws: int,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Networks of one architecture by kind, beside which those drawn stand."""
    some = rng.choice(len(train), min(draws, len(train)), replace=False)
    noisy = add_noise(train[rng.integers(len(train), size=draws)], test, rebuilt_test, layers, rng)
    mean = train.mean(0, keepdim=True)
    return {HELD_OUT: test, REBUILT: rebuilt_test, REMEMBERED: rebuilt_train[some], MEAN: mean, NOISE: noisy}


def _judged(
    weights: dict[str, Tensor], split: WeightDataset, architecture: Architecture, number: int, batch_size: int
) -> pd.DataFrame:
    """Networks of one architecture, run and compared with those of a split."""
    distances = {method: nearest_runs(drawn, split, number, batch_size) for method, drawn in weights.items()}
    unit, parts = _unit(distances[HELD_OUT][:, 0], architecture), []
    for method, drawn in weights.items():
        accuracy = share_correct(predict(drawn, np.full(len(drawn), number), split.data.architectures))
        one, other = distances[method].T
        ratio = np.divide(one, other, out=np.zeros(len(one)), where=other != 0)  # 0 where it copies both
        parts.append(_part(method, architecture, accuracy, one / unit, ratio))
    return pd.concat(parts)


def _part(
    method: str,
    architecture: Architecture,
    accuracy: np.ndarray,
    novelty: np.ndarray | float = np.nan,
    ratio: np.ndarray | float = np.nan,
) -> pd.DataFrame:
    columns = {"method": method, "architecture": architecture.name, "accuracy": accuracy}
    return pd.DataFrame(columns | {"novelty": novelty, "ratio": ratio})


def gaussian_draws(z: Float[Tensor, "n k"], draws: int, rng: np.random.Generator) -> Float[Tensor, "draws k"]:
    """Draws from a Gaussian with the mean of some latents and their covariance, shrunk towards a multiple of I.

    Raises:
        DataError: a single latent.

    Source: Ledoit & Wolf 2004.
    """
    if len(z) < 2:
        raise DataError("1 training network: a Gaussian needs at least 2; leave its architecture out")
    fitted = LedoitWolf().fit(z.double().numpy())
    return torch.from_numpy(rng.multivariate_normal(fitted.location_, fitted.covariance_, draws, method="eigh")).to(z)


def add_noise(
    weights: Float[Tensor, "n d"],
    x: Float[Tensor, "m d"],
    x_hat: Float[Tensor, "m d"],
    layers: Sequence[LayerInfo],
    rng: np.random.Generator,
) -> Float[Tensor, "n d"]:
    """Networks with Gaussian noise whose mean square in each layer is that of x_hat - x over other networks."""
    sizes = np.array([layer.size for layer in layers])
    std = np.repeat(np.sqrt(squared_errors(x, x_hat, layers).mean(0) / np.maximum(sizes, 1)), sizes)
    noise = std * rng.standard_normal((len(weights), len(std)))
    return weights + functional.pad(torch.from_numpy(noise), (0, weights.shape[1] - len(std))).to(weights)


def nearest_runs(
    weights: Float[Tensor, "n d"], split: WeightDataset, architecture: int, batch_size: int = 256
) -> Float64[np.ndarray, "n 2"]:
    """Distance of each network to the nearest network of a split, and to the nearest one of any other training run.

    The split is read in a stream. Exactly 0 for a copy; NaN where there is no other run.

    Args:
        weights: Of one architecture.
        architecture: Its position in `data.architectures`; only networks of it count.
    """
    weights, run = weights.double(), torch.from_numpy(split.data.group[split.networks])
    positions = torch.from_numpy(np.flatnonzero(split.data.architecture[split.networks] == architecture))
    distance = torch.full((len(weights), 2), torch.inf, dtype=torch.float64)  # to the two nearest runs so far
    closest = torch.full((len(weights), 2), -1)  # their networks; -1: none yet
    for block in positions.split(batch_size):
        known = split.batch(block.numpy())["x"].double()
        distance = torch.cat([distance, torch.cdist(weights, known)], 1)  # (n, 2 + b)
        closest = torch.cat([closest, block.expand(len(weights), -1)], 1)
        first = distance.argmin(1, keepdim=True)
        own = run[closest] == run[closest.gather(1, first)]
        others = distance.masked_fill(own, torch.inf)
        second = others.argmin(1, keepdim=True)
        distance = torch.cat([distance.gather(1, first), others.gather(1, second)], 1)
        closest = closest.gather(1, torch.cat([first, second], 1)).masked_fill(distance.isinf(), -1)
    exact = np.full(closest.shape, np.nan)  # cdist rounds where it takes many at once
    for column in (0, 1):
        for rows in torch.nonzero(closest[:, column] >= 0)[:, 0].split(batch_size):
            near = split.batch(closest[rows, column].numpy())["x"].double()
            exact[rows.numpy(), column] = (weights[rows] - near).norm(dim=1).numpy()
    return np.sort(exact, axis=1)


def _unit(distances: np.ndarray, architecture: Architecture) -> float:
    unit = float(np.median(distances))
    if unit == 0:
        raise DataError(
            f"held-out networks of the architecture {architecture.name!r} are copies of training networks: novelty "
            "needs others; give networks of one training run the same property 'run'"
        )
    return unit


@torch.no_grad()
def ensemble_accuracies(
    weights: Float[Tensor, "n d"], architecture: Architecture, draws: int, rng: np.random.Generator
) -> Float64[np.ndarray, " draws"]:
    """Accuracy on the digits held out of the mean softmax of 5 networks, drawn without replacement, or of all if fewer.

    Raises:
        DataError: the architecture is none of the embedded zoo.
    """
    data, (states, name) = digits(), as_states(weights, architecture)
    share = logits(states, name, data.test_x).softmax(-1)  # (n, b, k)
    found = []
    for _ in range(draws):
        members = rng.choice(len(weights), min(MEMBERS, len(weights)), replace=False)
        found.append((share[members].mean(0).argmax(-1) == data.test_y).double().mean())
    return torch.stack(found).numpy()


def sample_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each kind and architecture: median accuracy, novelty and ratio, lowest novelty, and number of networks."""
    grouped = rows.groupby(["method", "architecture"], sort=False)
    figures = {name: (name, "median") for name in ("accuracy", "novelty", "ratio")} | {"closest": ("novelty", "min")}
    return grouped.agg(**figures, networks=("accuracy", "size"))


def memory_sentence(rows: pd.DataFrame, method: str = LATENTS) -> str:
    """Whether networks drawn are copies of training networks, as far as that shows; and the accuracy of each kind.

    Training networks that the model rebuilds are what memory looks like: a rule that does not find half of them finds
    no memory. The first rule is the distance (novelty); the second is to be nearer to one training run than to the
    next (ratio) as hardly any rebuilt held-out network is, the lowest 5 % of their architecture.
    """
    counts = pd.DataFrame({"near": rows["novelty"] < COPY, "alone": _alone(rows), "method": rows["method"]})
    found = counts.groupby("method")[["near", "alone"]].sum()
    size = rows["method"].value_counts()
    median = rows.groupby("method", sort=False)[["accuracy", "novelty", "ratio"]].median()

    def share(rule: str, name: str) -> str:
        return f"{found.loc[name, rule]} of {size[name]} {name}"

    def medians(figure: str, *names: str) -> str:
        named = {name: f"the {name}" if name == MEAN else name for name in names}
        return ", ".join(f"{median.loc[name, figure]:.2f} of {words}" for name, words in named.items())

    copies, rule = f"novelty below {COPY:g}", f"nearer to one run than all but {100 * LOWEST:.0f} % of {REBUILT}"
    told = f"copies cannot be told by distance: {share('near', REMEMBERED)} have a {copies}"
    if 2 * found.loc[REMEMBERED, "near"] >= size[REMEMBERED]:
        others = f"{share('near', REMEMBERED)} and {share('near', HELD_OUT)}"
        told = f"{share('near', method)} are copies ({copies}), as are {others}"
    verdict = f"the ratio does not tell memory here: {share('alone', REMEMBERED)} are {rule}"
    if 2 * found.loc[REMEMBERED, "alone"] >= size[REMEMBERED]:
        verdict = f"{share('alone', method)} are {rule}, as are {share('alone', REMEMBERED)}"
    accuracy = [f"{name} {value:.3f}" for name, value in median["accuracy"].drop(index=method).items()]
    return (
        f"{told} (median novelty {medians('novelty', method, REMEMBERED, HELD_OUT, MEAN)}); {verdict} (median ratio "
        f"{medians('ratio', method, REMEMBERED, REBUILT, HELD_OUT)}); median accuracy of {method} "
        f"{median.loc[method, 'accuracy']:.3f} ({', '.join(accuracy)})"
    )


def _alone(rows: pd.DataFrame) -> pd.Series:
    """Whether the ratio is lower than that of all but 5 % of the rebuilt held-out networks of the architecture."""
    of_rebuilt = rows[rows["method"] == REBUILT].groupby("architecture")["ratio"].quantile(LOWEST)
    return rows["ratio"] < rows["architecture"].map(of_rebuilt)
