"""Networks rebuilt from latents, and what is left of their weights beside floors and noise of equal size.

Weights are flat, in their own unit, one row per network, 0 behind a network's last weight. Every floor is fitted on
training networks alone. Networks of one training run resemble each other, so the run is the unit of every uncertainty.

Source: Efron & Tibshirani 1993, An introduction to the bootstrap, chapter 11 (jackknife).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from scipy.stats import t
from torch import Tensor, nn

from workbench.comparison import decode
from workbench.datasets.flat_weights import Architecture, LayerInfo
from workbench.datasets.frames import DataError
from workbench.datasets.weights import WeightDataset, Weights
from workbench.metrics import PCA

MEAN = "mean network"
ALL = "all"
"""In the place of a layer or an architecture: all of them together."""

Methods = Mapping[str, Float[Tensor, "n d"]]
"""What several methods make of the same networks, by name."""


@dataclass(frozen=True)
class Networks:
    """Networks of one split, held in memory.

    Args:
        weights: Flat, in their own unit, 0 behind a network's last weight.
        architecture: Position of each network's architecture in `architectures`.
        architectures: What layers networks have.
        table: One row per network: id, run, and other properties.
    """

    weights: Float[Tensor, "n d"]
    architecture: Int[np.ndarray, " n"]
    architectures: Sequence[Architecture]
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.weights)

    def each(self) -> Iterator[tuple[Architecture, Int[np.ndarray, " _"]]]:
        """Each architecture that occurs, and the positions of its networks."""
        for i in np.unique(self.architecture):
            yield self.architectures[i], np.flatnonzero(self.architecture == i)


def collect(dataset: WeightDataset) -> Networks:
    """All networks of a split, or of a subset of it."""
    raw = dataset.batch(np.arange(len(dataset)))
    return Networks(raw["x"], raw["architecture"].numpy(), dataset.data.architectures, dataset.table())


@torch.no_grad()
def rebuild(
    model: nn.Module, data: Weights, z: Float[Tensor, "n k"], architecture: Int[np.ndarray, " n"], batch_size: int = 256
) -> Float[Tensor, "n d"]:
    """Weights in their own unit that a model decodes from latents, on the CPU.

    Args:
        model: In evaluation mode; `comparison.encode_split` gives the posterior means of a split.
        data: What the model was trained on, for its scaling.
        architecture: Of each network, by which its padding is cut and its weights are scaled.
        batch_size: Latents at a time; does not change the result beyond rounding.

    Raises:
        DataError: weights that are not finite.
    """
    numbers = torch.from_numpy(architecture).split(batch_size)
    parts = zip(z.split(batch_size), numbers, strict=True)
    weights = torch.cat([data.denormalize(decode(model, part), rows) for part, rows in parts])
    broken = np.flatnonzero(~weights.isfinite().all(1))
    if len(broken):
        raise DataError(
            f"the weights decoded from {len(broken)} of {len(z)} latents, such as number {broken[0]}, are not finite: "
            "must be; take an earlier checkpoint, or train with a lower learning rate"
        )
    return weights


# --- floors and controls ---


def matched(
    train: Networks, networks: Networks
) -> Iterator[tuple[Architecture, Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]:
    """Each architecture that occurs, the positions of its networks, and those of its training networks.

    Raises:
        DataError: an architecture without a training network.
    """
    for architecture, rows in networks.each():
        of_train = np.flatnonzero(train.architecture == networks.architecture[rows[0]])
        if not len(of_train):
            raise DataError(
                f"architecture {architecture.name!r} has {len(rows)} networks to rebuild and none among the training "
                "networks: needs at least 1; leave these networks out, raise train_samples, or change split_seed"
            )
        yield architecture, rows, of_train


def weight_pca(weights: Float[Tensor, "n d"], n_components: int) -> PCA:
    """Principal components of networks, exact, from the inner products of the networks.

    Args:
        weights: At least 1 network; the time grows as the cube of their number.
        n_components: Only n - 1, or d, can be had.
    """
    x = weights.double()
    mean, k = x.mean(0), min(n_components, len(x) - 1, x.shape[1])
    centred = x - mean
    directions = torch.linalg.eigh(centred @ centred.T).eigenvectors.flip(1)[:, :k]  # (n, k), by falling variance
    components = torch.linalg.qr(centred.T @ directions).Q  # (d, k)
    variance = (centred @ components).square().sum(0) / max(len(x) - 1, 1)
    return PCA(mean.to(weights), components.T.to(weights), variance.to(weights), last_gain=0.0)


def floors(data: Weights, train: Networks, networks: Networks, n_components: int) -> dict[str, Float[Tensor, "n d"]]:
    """Reconstructions without a model: the mean training network of the architecture, and PCA.

    PCA of all training networks together is what a latent of as many numbers is compared with: it sees what the model
    sees, scaled and with padding of 0, and adds to the mean of each network's architecture, as in notebook 02. Where
    there are several architectures, that of each by itself, in the weights' own unit, stands beside it; it has more
    numbers at its disposal, as many for every architecture.

    Args:
        data: Whose networks they are, for their scaling.
        train: What the floors are fitted on.
        networks: What is rebuilt.
        n_components: As many as the latent has dimensions; at most one less than there are training networks.

    Returns:
        `mean network` and `PCA-k`, k the components that were had; where training networks are of several
        architectures, also `PCA-k per architecture`, as `PCA-64/59 per architecture` where these differ in k.

    Raises:
        DataError: an architecture without a training network.
    """
    found = {MEAN: mean_network(train, networks)}
    rest = []
    for part, mean in ((train, mean_network(train, train)), (networks, found[MEAN])):
        number = torch.from_numpy(part.architecture)
        rest.append(data.normalize(part.weights, number) - data.normalize(mean, number))
    pca = weight_pca(rest[0], n_components)
    scaled = pca.reconstruct(rest[1]) + data.normalize(found[MEAN], number)
    found[f"PCA-{len(pca.components)}"] = data.denormalize(scaled, number)
    if len(np.unique(train.architecture)) > 1:
        single, sizes = torch.zeros_like(networks.weights), []
        for architecture, rows, of_train in matched(train, networks):
            span = slice(architecture.size)
            pca = weight_pca(train.weights[of_train, span], n_components)
            single[rows, span] = pca.reconstruct(networks.weights[rows, span])
            sizes.append(len(pca.components))
        found[f"PCA-{'/'.join(map(str, dict.fromkeys(sizes)))} per architecture"] = single
    return found


def mean_network(train: Networks, networks: Networks) -> Float[Tensor, "n d"]:
    """For each network the mean of the training networks of its architecture.

    Raises:
        DataError: an architecture without a training network.
    """
    mean = torch.zeros_like(networks.weights)
    for _, rows, of_train in matched(train, networks):
        mean[rows] = train.weights[of_train].mean(0)
    return mean


def spans(layers: Sequence[LayerInfo]) -> list[slice]:
    """Where each layer lies in the flat weights."""
    return [slice(layer.offset, layer.offset + layer.size) for layer in layers]


def squared_errors(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], layers: Sequence[LayerInfo]
) -> Float64[np.ndarray, "n l"]:
    """Sum of the squared differences in each layer of each network, in the squared unit of the weights."""
    return np.stack([(x_hat[:, s].double() - x[:, s].double()).square().sum(1).numpy() for s in spans(layers)], 1)


def equal_noise(networks: Networks, x_hat: Float[Tensor, "n d"], seed: int = 0) -> Float[Tensor, "n d"]:
    """The networks plus Gaussian noise, whose squared sum in each layer of each network is that of the error of x_hat.

    Args:
        x_hat: What a method makes of the networks.
        seed: Of a generator of its own.
    """
    generator, noisy = torch.Generator().manual_seed(seed), networks.weights.clone()
    for architecture, rows in networks.each():
        errors = squared_errors(networks.weights[rows], x_hat[rows], architecture.layers)
        for s, error in zip(spans(architecture.layers), torch.from_numpy(errors).sqrt().T, strict=True):
            noise = torch.randn(len(rows), s.stop - s.start, generator=generator, dtype=torch.float64)
            noisy[rows, s] += (noise * (error / noise.norm(dim=1))[:, None]).to(noisy)
    return noisy


# --- R² ---


def run_errors(networks: Networks, methods: Methods) -> pd.DataFrame:
    """Squared error of each method, summed over the networks of a run: rows (architecture, layer, run), a column each.

    In the squared unit of the weights.
    """
    parts = {}
    for architecture, rows in networks.each():
        run = pd.Index(networks.table["run"].iloc[rows], name="run")
        names = pd.Index([layer.name for layer in architecture.layers], name="layer")
        x, columns = networks.weights[rows], {}
        for method, x_hat in methods.items():
            errors = pd.DataFrame(squared_errors(x, x_hat[rows], architecture.layers), run, names)
            columns[method] = errors.groupby("run").sum().T.stack()
        parts[architecture.name] = pd.DataFrame(columns)
    return pd.concat(parts, names=["architecture"])


def layer_r2(networks: Networks, methods: Methods) -> pd.DataFrame:
    """R² of each method in each layer: 1 - its squared error over that of the mean training network, whose R² is 0.

    Errors are summed over all networks, in the weights' own unit. The R² of one layer is the same on any scale; in that
    of all layers those count most in which networks differ most.

    Args:
        methods: One of them `mean network`, see `floors`.

    Returns:
        Columns architecture, layer, method, r2, r2_se (standard error over runs by the jackknife; NaN of one run) and
        runs. The layer `all` is all of them together, and the architecture `all` where there are several. r2 is NaN
        where the mean network is exact.
    """
    errors = run_errors(networks, methods)
    levels = [["architecture", "layer"], ["architecture"], []]
    wanted = levels if errors.index.unique("architecture").size > 1 else levels[:2]
    rows = []
    for level in wanted:
        summed = errors.groupby([*level, "run"], sort=False).sum()
        groups = summed.groupby(level, sort=False) if level else [((), summed)]
        for key, part in groups:
            place = [*key, ALL, ALL][:2]
            rows += [(*place, method, *_r2(part[method], part[MEAN]), len(part)) for method in methods]
    return pd.DataFrame(rows, columns=["architecture", "layer", "method", "r2", "r2_se", "runs"])


def _r2(error: pd.Series, floor: pd.Series) -> tuple[float, float]:
    """1 - error / floor of sums over runs, and the jackknife's standard error over them."""
    e, f, n = error.to_numpy(), floor.to_numpy(), len(error)
    if f.sum() == 0:
        return float("nan"), float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):  # all that the mean network gets wrong may be in one run
        without = (e.sum() - e) / (f.sum() - f)
        spread = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()) if n > 1 else float("nan")
    return float(1 - e.sum() / f.sum()), float(spread)


def r2_sentence(networks: Networks, methods: Methods, one: str, other: str) -> str:
    """Whether one method explains more of the weights of all layers than another, with its numbers.

    "More" and "less" need a 95 % interval of Student's t over runs (jackknife) that leaves a difference of 0 out.
    """
    errors = run_errors(networks, methods).groupby("run").sum()
    scores, n = [_r2(errors[name], errors[MEAN])[0] for name in (one, other)], len(errors)
    _, error = _r2(errors[one] - errors[other], errors[MEAN])
    one, other = (f"the {name}" if name == MEAN else name for name in (one, other))
    numbers = f"R² {scores[0]:.3f} against {scores[1]:.3f}"
    if n < 2:
        return f"{one} and {other} cannot be told apart on one run: {numbers}"
    difference, half = scores[0] - scores[1], _quantile(n) * error
    word = "more" if difference > half else "less" if difference < -half else "not distinguishably more or less"
    return (
        f"{one} explains {word} of the weights than {other}: {numbers}, difference {difference:+.3f} ± {half:.3f} "
        f"(95 % over {n} runs, {len(networks)} networks); one training seed"
    )


def split_r2(
    train: Networks, rebuilt_train: Float[Tensor, "t d"], test: Networks, rebuilt_test: Float[Tensor, "n d"]
) -> pd.DataFrame:
    """R² of a model on the networks it was trained on beside that on held-out ones, as `layer_r2` of all layers.

    Where the first is far above the second, the model has learnt its networks rather than what networks have in common.

    Args:
        rebuilt_train, rebuilt_test: What the model makes of the networks.

    Returns:
        Index `training` and `held-out`; columns r2, half (of its 95 % interval, Student's t over runs; NaN of one run),
        networks, runs. The mean network is that of the training networks in both.
    """
    rows = {}
    for name, networks, x_hat in (("training", train, rebuilt_train), ("held-out", test, rebuilt_test)):
        found = layer_r2(networks, {"model": x_hat, MEAN: mean_network(train, networks)})
        last = found[found["method"] == "model"].iloc[-1]
        half = _quantile(int(last["runs"])) * last["r2_se"]
        rows[name] = {"r2": last["r2"], "half": half, "networks": len(networks), "runs": last["runs"]}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"networks": int, "runs": int})


def split_sentence(table: pd.DataFrame, method: str) -> str:
    """Whether a model rebuilds its training networks better than held-out ones, from `split_r2`, with its numbers.

    "Better" and "worse" need 95 % intervals that, as independent ones, leave a difference of 0 out.
    """
    numbers = ", ".join(
        f"R² {row.r2:.3f} ± {row.half:.3f} on {row.networks} {row.Index} networks ({row.runs} runs)"
        for row in table.itertuples()
    )
    if table["half"].isna().any():
        return f"whether {method} rebuilds its training networks better than held-out ones needs 2 runs: {numbers}"
    gap = table.loc["training", "r2"] - table.loc["held-out", "r2"]
    half = float(np.hypot(*table["half"]))
    word = "better than" if gap > half else "worse than" if gap < -half else "not distinguishably better or worse than"
    return f"{method} rebuilds its training networks {word} held-out ones: {numbers}; 95 % over runs"


def _quantile(runs: int) -> float:
    """Of Student's t, for a 95 % interval over runs; NaN of one."""
    return float(t.ppf(0.975, runs - 1)) if runs > 1 else float("nan")
