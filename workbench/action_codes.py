"""What latent actions say of held-out pairs: codes, rates, and what can be read from them, in numbers and words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.action_comparison import COPY, MEAN, displacement, over_seeds
from workbench.comparison import batches, encode_split
from workbench.datasets.clips import ClipDataset
from workbench.datasets.frames import DataError
from workbench.datasets.splits import SPLITS
from workbench.information import (
    action_sentence,
    code_words,
    collapse_sentence,
    entropy_bits,
    one_hot_codes,
    permutation_test,
)
from workbench.metrics import fit_pca, kl_per_dimension, mse
from workbench.probes import ProbeResult, advantage_sentence, in_enough_clips, pca_difference_features, probe
from workbench.rate_distortion import RatePoint, code_entropy, laq_bits, rate_distortion_table, vae_bits
from workbench.rivals import Rival


@dataclass(frozen=True)
class Actions:
    """What a model says of every pair of a split, on the CPU.

    Args:
        features: What is quantized, or the posterior mean of a continuous action, (n, length, code_dim); of a VAE the
            difference of the posterior means, (n, d).
        indices: Entries of the codebook (n, length); None for continuous ones.
        kl: KL of each pair's second frame or action in nats (n,); None for discrete ones.
        noisy_mse: Error (n,) with a code drawn from its posterior, which is what the KL pays for; None likewise.
    """

    features: Float[Tensor, "n ..."]
    indices: Int[Tensor, "n length"] | None
    kl: Float[Tensor, " n"] | None
    noisy_mse: Float[Tensor, " n"] | None


@torch.inference_mode()
def actions_of(rival: Rival, dataset: ClipDataset, batch_size: int, seed: int = 0) -> Actions:
    """Actions between the frames of every pair; of a VAE, the difference of the posterior means of the two."""
    device, model = next(rival.model.parameters()).device, rival.model
    draw, parts = torch.Generator().manual_seed(seed), []
    for batch in batches(dataset, batch_size, device):
        first, x = batch["first"], batch["x"]
        action = model.encode(first, x) if rival.acts else model.encode(x)
        if rival.acts and action.indices is not None:
            parts.append((action.difference.float(), action.indices, None, None))
            continue
        noise = torch.randn(action.mu.shape, generator=draw).to(device)
        codes = action.mu + torch.exp(0.5 * action.logvar) * noise
        x_hat = rival.imagine(first, codes) if rival.acts else model.decode(codes).clamp(-1, 1)
        features = action.mu if rival.acts else action.mu - model.encode(first).mu
        parts.append((features.float(), None, action.kl(), mse(x_hat, x)))
    columns = zip(*parts, strict=True)
    return Actions(*(None if column[0] is None else torch.cat(column).cpu() for column in columns))


def difference_features(
    train: ClipDataset, dataset: ClipDataset, components: int, samples: int, seed: int
) -> Float[np.ndarray, "n k"]:
    """Pixel differences of pairs along the principal components of those of the training split.

    Args:
        components: At most so many; fewer where the training pairs are fewer.
        samples: Training pairs that the components are fitted on.
    """
    device, train = torch.device("cpu"), train.subset(samples, seed)

    def differences() -> Iterator[Tensor]:
        return (batch["x"] - batch["first"] for batch in batches(train, 64, device))

    pca = fit_pca(differences, min(components, len(train) - 1))
    parts = [pca_difference_features(batch["first"], batch["x"], pca) for batch in batches(dataset, 64, device)]
    return np.concatenate(parts)


def rate_points(rival: Rival, actions: Actions, errors: pd.DataFrame, dataset: ClipDataset) -> list[RatePoint]:
    """Bits and error of a model on the pairs that `actions` and `errors` are of.

    Discrete codes have two rates, their length and their entropy; of continuous ones, the error is that of drawn codes.
    """
    if actions.indices is None:
        groups = dataset.clips.group[dataset.segment]
        error, kl = (pd.Series(t.double().numpy()).groupby(groups).mean() for t in (actions.noisy_mse, actions.kl))
        name, setting = (rival.name, "") if rival.acts else ("VAE", rival.setting)  # a sweep is one line
        values = (vae_bits(float(kl.mean())), float(error.mean()), float(error.sem()))
        return [RatePoint(name, setting, "KL", *values, rival.acts)]
    own = errors[(errors["name"] == rival.name) & (errors["seed"] == rival.seed)]
    error, config = own.groupby("group")["mse"].mean(), rival.model.config
    entropy = code_entropy(actions.indices, config.codebook_size)
    rates = {
        "length × log2(codebook)": laq_bits(config.code_seq_len, config.codebook_size),
        f"entropy ({entropy.estimate})": entropy.bits,
    }
    values = (float(error.mean()), float(error.sem()), True)
    return [RatePoint(rival.name, "", rate, bits, *values) for rate, bits in rates.items()]


def rate_table(
    models: Iterable[Rival], actions: Mapping[str, Actions], errors: pd.DataFrame, dataset: ClipDataset
) -> pd.DataFrame:
    """Bits and error of each model, and of the floors that send nothing; see `rate_distortion_table`.

    Args:
        models: One of each name.
        actions: Of these models, by name, on the pairs of `dataset`.
        errors: On the same pairs, as from `pair_errors`.
        dataset: The pairs.
    """
    points = [point for rival in models for point in rate_points(rival, actions[rival.name], errors, dataset)]
    table, floors = over_seeds(errors), {COPY: True, MEAN: False}
    for name, first in floors.items():
        points.append(RatePoint(name, "", "none", 0.0, *map(float, table.loc[name, ["mse", "mse_se"]]), first))
    return rate_distortion_table(points)


def kl_of(rival: Rival, dataset: ClipDataset, batch_size: int) -> Float[Tensor, " d"]:
    """Mean KL of each dimension of a VAE's latent over some pairs, in nats."""
    posterior = encode_split(rival.model, dataset, batch_size)
    return kl_per_dimension(posterior.mu, posterior.logvar)


def frequent_words(actions: Actions, n: int) -> dict[str, Tensor]:
    """The n most frequent words of codes and their share; of continuous actions, those of the first n pairs."""
    if actions.indices is None:
        return {f"of pair {i}": action for i, action in enumerate(actions.features[:n])}
    words, counts = torch.unique(actions.indices, dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:n]
    shares = (counts[order] / len(actions.indices)).tolist()
    return {
        f"{'-'.join(map(str, word.tolist()))} ({share:.0%})": word
        for word, share in zip(words[order], shares, strict=True)
    }


def code_shares(actions: Actions, rival: Rival) -> Float[np.ndarray, "length entries"] | None:
    """Share of the pairs that choose each entry of the codebook at each place of the word; None for continuous ones."""
    if actions.indices is None:
        return None
    size = rival.model.config.codebook_size
    return np.stack([np.bincount(place, minlength=size) / len(place) for place in actions.indices.T.numpy()])


# --- verdicts ---


def code_verdicts(
    models: Sequence[Rival],
    dataset: ClipDataset,
    labels: np.ndarray | None,
    batch_size: int,
    permutations: int,
    folds: int,
    seed: int,
) -> dict[str, str]:
    """Of each latent action model: is its codebook in use, and what do its codes tell of the labels, for every seed.

    All are judged on pairs whose clips no model was trained on. A probe of the labels is fitted where there are several
    seeds, also on the others.

    Args:
        dataset: Held-out pairs, and training pairs to fit probes on.
        labels: Class of each pair; None where nobody knows.
        permutations: Of the labels between clips; p is at least 1 / (permutations + 1).
        folds: Of the probe's cross-validation.
        seed: Of permutations and folds.
    """
    groups, held, rows = dataset.clips.group[dataset.segment], judged(dataset), {}
    for name in dict.fromkeys(rival.name for rival in models if rival.acts):
        found = {r.seed: actions_of(r, dataset, batch_size) for r in models if r.name == name}
        size = next(r for r in models if r.name == name).model.config.codebook_size
        coded = {key: actions.indices for key, actions in found.items() if actions.indices is not None}
        if coded:
            rows[f"Is the codebook of {name} in use?"] = each_seed(
                {key: collapse_sentence(indices[held], size) for key, indices in coded.items()}
            )
        if coded and labels is not None:
            known = (labels[held], groups[held], permutations, seed)
            rows[f"Do the codes of {name} mean actions?"] = each_seed(
                {key: place_sentence(indices[held], size, *known) for key, indices in coded.items()}
            )
        if labels is not None and len(found) > 1:
            means = {key: actions.features.flatten(1) for key, actions in found.items() if key not in coded}
            features = {key: one_hot_codes(indices, size) for key, indices in coded.items()} | means
            known = (labels, groups, "linear", folds, seed, held)
            scores = {key: probe(values, *known) for key, values in features.items()}
            what = f"{name}: {'codes' if coded else 'mean'}"
            rows[f"Can action be read from {what}?"] = seeds_sentence(scores, what)
    return rows


def place_sentence(
    indices: Int[Tensor, "n length"], size: int, labels: np.ndarray, groups: np.ndarray, permutations: int, seed: int
) -> str:
    """What the most telling place of the word says of the labels, in bits: at least that much the whole word does.

    Whole words are too many beside a few hundred samples for their information to be estimated. p is multiplied by the
    number of places, as the best of them is taken (Bonferroni).
    """
    codes = [code_words(place[:, None], size) for place in indices.T]
    tests = [permutation_test(place, labels, groups, permutations, seed) for place in codes]
    best = max(range(len(tests)), key=lambda i: tests[i].bits - tests[i].chance_bits)
    found, p = tests[best], min(1.0, len(tests) * tests[best].p)
    sentence = action_sentence(found.bits, entropy_bits(labels), p, found.chance_bits)
    return f"place {best} of {len(tests)}: {sentence}"


def each_seed(sentences: Mapping[int, str]) -> str:
    """One sentence for every training seed."""
    return "; ".join(f"{text} (seed {seed})" for seed, text in sentences.items())


# --- probes ---


def probe_targets(dataset: ClipDataset, action: str, moving: Sequence[str]) -> dict[str, np.ndarray]:
    """What probes are to tell of each pair: the class in a column, and how far some conditions move; each where asked.

    Raises:
        DataError: the data have no such column.
    """
    targets = {"action": dataset.column(action).astype(str)} if action else {}
    return targets | ({"displacement": displacement(dataset, moving)} if moving else {})


def judged(dataset: ClipDataset) -> Bool[np.ndarray, " n"]:
    """Which pairs are of clips that no model was trained on."""
    return dataset.clips.split_of[dataset.segment] != SPLITS.index("train")


def labelled(dataset: ClipDataset, column: str) -> ClipDataset:
    """The pairs whose class in a column is known and occurs in at least two clips; all of them for an empty column.

    Raises:
        DataError: the data have no such column, or no such class.
    """
    if not column:
        return dataset
    classes = dataset.column(column)
    known = ~pd.isna(classes) & (classes.astype(str) != "")  # a test list of Something-Something has no labels
    known[known] = in_enough_clips(classes[known].astype(str), dataset.clips.group[dataset.segment[known]])
    if not known.any():
        raise DataError(
            f"action={column!r}: none of its classes is that of two held-out clips; choose another, or none"
        )
    if not known.all():
        print(
            f"{(~known).sum()} of {len(known)} pairs have no {column} that another clip has too: left out of the probes"
        )
    return ClipDataset(dataset.clips, dataset.slots[known], dataset.segment[known])


def probe_features(models: Sequence[Rival], dataset: ClipDataset, batch_size: int) -> dict[str, np.ndarray]:
    """Features of every pair from each model, by a name for figures: codes, latent actions, differences of latents."""
    features = {}
    for rival in models:
        found = actions_of(rival, dataset, batch_size)
        what = "mean" if rival.acts else "difference of latents"
        if found.indices is not None:
            features[f"{rival.name}: codes"] = one_hot_codes(found.indices, rival.model.config.codebook_size)
            what = "before quantising"
        features[f"{rival.name}: {what}"] = found.features.flatten(1).double().numpy()
    return features


def seeds_sentence(results: Mapping[int, ProbeResult], what: str) -> str:
    """The score of a probe over training seeds, beside chance: mean, lowest and highest."""
    scores = [result.score for result in results.values()]
    first = next(iter(results.values()))
    times = f", {np.mean(scores) / first.chance:.1f} times chance" if first.chance else ""
    return (
        f"{first.figure} {np.mean(scores):.2f} of a {first.kind} probe from {what}, against {first.chance:.3g}{times} "
        f"({min(scores):.2f} to {max(scores):.2f} over {len(scores)} seeds; folds by clip, {first.n_groups} clips)"
    )


def advantages(results: Mapping[tuple[str, str, str], ProbeResult], model: str) -> dict[str, str]:
    """Whether linear probes tell more from a model's codes than from what nobody trained, and from the VAE's latents.

    Args:
        results: By (features, target, kind), as from `probe_table`; of the first training seed.
        model: Name of a latent action model.
    """
    rows, targets = {}, dict.fromkeys(target for _, target, _ in results)
    for target in targets:
        own = next((key for key in results if key[0].startswith(f"{model}:") and key[1:] == (target, "linear")), None)
        for other in ("PCA of pixel differences", "VAE: difference of latents"):
            beside = (other, target, "linear")
            if own and beside in results:
                sentence = advantage_sentence(results[own], results[beside], (own[0], other))
                rows[f"Does {model} tell the {target} better than {other}?"] = f"{sentence}; one training seed"
    return rows
