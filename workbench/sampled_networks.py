"""Networks sampled from a latent space: what they do on the digits held out, and whether they are only remembered.

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
from workbench.datasets.weights import Weights
from workbench.datasets.zoo_networks import digits, logits
from workbench.decoded_networks import as_states, predict, share_correct
from workbench.interpolation import prior_samples
from workbench.rebuilding import Networks, matched, rebuild, squared_errors

MEMBERS = 5
"""Networks of an ensemble."""
COPY = 0.1
"""Novelty below which a network counts as a copy of a training network."""
HELD_OUT, REBUILT = "held-out networks", "rebuilt held-out networks"
PRIOR, LATENTS = "networks drawn from the prior", "networks drawn from the latents"
NOISE, ENSEMBLE = "training networks with noise", f"ensembles of {MEMBERS} training networks"


def sampled_networks(
    model: nn.Module,
    data: Weights,
    train: Networks,
    test: Networks,
    z_train: Float[Tensor, "n k"],
    x_hat: Float[Tensor, "m d"],
    draws: int,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Networks drawn from a latent space: what they can do, and whether they are memory; beside what costs no model.

    For each architecture by itself, networks are drawn from the prior N(0, I), and from a Gaussian fitted to the
    latents of the training networks. Beside them are the held-out networks and x_hat; training networks with noise of
    the size of x_hat's error; and the mean softmax of 5 training networks.

    Args:
        model, data, batch_size: See `rebuilding.rebuild`.
        train, test: Training networks, and held-out ones.
        z_train: Latents of the training networks.
        x_hat: What the model makes of the held-out networks.
        draws: Of each kind and architecture.

    Returns:
        Columns method, architecture, accuracy, novelty: distance of the weights to the nearest training network, over
        the median of it for held-out networks. 0 is a copy, 1 as new as a network of another run; NaN of ensembles.

    Raises:
        DataError: an architecture that is none of the embedded zoo, with fewer than 2 training networks, or whose
            held-out networks are copies of training networks.
    """
    from_prior, parts = prior_samples(draws, z_train.shape[1], seed), []
    for architecture, rows, of_train in matched(train, test):
        number = int(test.architecture[rows[0]])
        rng = np.random.default_rng([seed, number])
        known, held_out, rebuilt = train.weights[of_train], test.weights[rows], x_hat[rows]
        chosen = known[rng.integers(len(known), size=draws)]
        weights = {HELD_OUT: held_out, REBUILT: rebuilt}
        for name, z in ((PRIOR, from_prior), (LATENTS, gaussian_draws(z_train[of_train], draws, rng))):
            weights[name] = rebuild(model, data, z, np.full(draws, number), batch_size)
        weights[NOISE] = add_noise(chosen, held_out, rebuilt, architecture.layers, rng)
        unit = _unit(nearest(held_out, known), architecture)
        for method, drawn in weights.items():
            found = share_correct(predict(drawn, np.full(len(drawn), number), test.architectures))
            parts.append(_part(method, architecture, found, nearest(drawn, known) / unit))
        right = ensemble_accuracies(known, architecture, draws, rng)
        parts.append(_part(ENSEMBLE, architecture, right, np.full(draws, np.nan)))
    return pd.concat(parts, ignore_index=True)


def _part(method: str, architecture: Architecture, found: np.ndarray, novelty: np.ndarray) -> pd.DataFrame:
    columns = {"method": method, "architecture": architecture.name, "accuracy": found, "novelty": novelty}
    return pd.DataFrame(columns)


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


def nearest(weights: Float[Tensor, "n d"], known: Float[Tensor, "m d"]) -> Float64[np.ndarray, " n"]:
    """Euclidean distance of each row to the nearest known one; exactly 0 for a copy."""
    weights, known = weights.double(), known.double()
    closest = torch.cdist(weights, known).argmin(1)  # its distances are rounded where many are taken at once
    return (weights - known[closest]).norm(dim=1).numpy()


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
    """Of each kind and architecture: median accuracy and novelty, lowest novelty, and number of networks."""
    grouped = rows.groupby(["method", "architecture"], sort=False)
    figures = {"accuracy": ("accuracy", "median"), "novelty": ("novelty", "median"), "closest": ("novelty", "min")}
    return grouped.agg(**figures, networks=("accuracy", "size"))


def memory_sentence(rows: pd.DataFrame, method: str = LATENTS) -> str:
    """How many of the networks drawn are copies, beside how many held-out ones are, and the accuracy of every kind.

    Real networks of other runs can lie as near, such as those of one initialisation that were hardly trained.
    """
    median = rows.groupby("method", sort=False)[["accuracy", "novelty"]].median()
    drawn, held_out = (rows.loc[rows["method"] == name, "novelty"] for name in (method, HELD_OUT))
    others = [f"{name} {found:.3f}" for name, found in median["accuracy"].drop(index=method).items()]
    return (
        f"{(drawn < COPY).sum()} of {len(drawn)} {method} are copies (novelty below {COPY:g}), as are "
        f"{(held_out < COPY).sum()} of {len(held_out)} held-out networks: median novelty "
        f"{median.loc[method, 'novelty']:.2f}, the closest {drawn.min():.2f}; their median accuracy is "
        f"{median.loc[method, 'accuracy']:.3f} ({', '.join(others)})"
    )
