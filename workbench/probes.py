"""What latent actions say about actions: information in codes, probes across clips, gains over a floor, in words.

Samples of one clip resemble each other, so the clip (group) is the unit throughout: permutations move labels between
clips, no fold of a probe divides a clip, standard errors are over clips. Entropies are in bits.

Sources:
    Miller 1955, Note on the bias of information estimates (the Miller-Madow correction).
    Phipson & Smyth 2010, Permutation p-values should never be zero.
    Alain & Bengio 2017, Understanding intermediate layers using linear classifier probes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Integer, Shaped
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from workbench.datasets.frames import DataError
from workbench.metrics import PCA, fit_pca

Indices = Integer[np.ndarray, "n length"] | Integer[Tensor, "n length"]
Whole = Integer[np.ndarray, " n"] | Integer[Tensor, " n"]
Labels = Shaped[np.ndarray, " n"] | Integer[Tensor, " n"]
Numbers = Float[np.ndarray, "n ..."] | Float[Tensor, "n ..."]
Splits = list[tuple[np.ndarray, np.ndarray]]
Predict = Callable[[np.ndarray], np.ndarray]
Kind = Literal["linear", "mlp"]

INNER_FOLDS = 3
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""C of logistic regression, chosen by cross-validation across the clips of the training folds."""
PENALTIES = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
"""alpha of ridge, chosen in the same way."""
MLP_WIDTH, MLP_EPOCHS, MLP_PATIENCE = 64, 200, 15
COLLAPSED = 0.95  # share of samples at one entry
LEAST_MSE = 1e-10  # an exact prediction counts as this one, as in `comparison.copy_frame_errors`
SIGNIFICANT = 0.05


# --- codes ---


def check_indices(indices: Indices, codebook_size: int) -> Integer[np.ndarray, "n length"]:
    """Indices as an array on the CPU; a DataError where there are none, or one is no entry of the codebook."""
    values = _array(indices)
    if values.size == 0:
        raise DataError(f"indices of shape {values.shape}: must hold at least one sample; check the split")
    outside = values[(values < 0) | (values >= codebook_size)]
    if outside.size:
        raise DataError(
            f"index {outside.flat[0]} of a codebook of {codebook_size}: must be from 0 to {codebook_size - 1}; "
            "give the codebook_size that the codes were made with"
        )
    return values


def code_words(indices: Indices, codebook_size: int) -> Integer[np.ndarray, " n"]:
    """One whole number for each sample's word of indices, equal where the words are.

    The digits of the number to base `codebook_size`, the first position leading, where 63 bits hold every word;
    otherwise the rank of the word among those given, which means nothing in another call.
    """
    values = check_indices(indices, codebook_size)
    length = values.shape[1]
    if codebook_size**length <= 2**63:
        return values.astype(np.int64) @ np.array([codebook_size**i for i in reversed(range(length))], np.int64)
    return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def one_hot_codes(indices: Indices, codebook_size: int) -> Float[np.ndarray, "n length*codebook_size"]:
    """Codes as features of a probe: position by position, 1 at the entry chosen and 0 elsewhere."""
    values = check_indices(indices, codebook_size)
    return np.eye(codebook_size)[values].reshape(len(values), -1)


def perplexity(indices: Indices, codebook_size: int) -> Float[np.ndarray, " length"]:
    """2^entropy of the entries chosen at each position: 1 where it is always the same, at most `codebook_size`."""
    return np.array([2.0 ** entropy_bits(position) for position in check_indices(indices, codebook_size).T])


def codebook_use(indices: Indices, codebook_size: int) -> float:
    """Share of the codebook's entries that some sample chooses at some position."""
    return len(np.unique(check_indices(indices, codebook_size))) / codebook_size


def collapse_sentence(indices: Indices, codebook_size: int) -> str:
    """Whether the codes have collapsed, in words and numbers: a position has where one entry takes over 95 %."""
    values = check_indices(indices, codebook_size)
    n, length = values.shape
    shares = np.array([np.bincount(position).max() / n for position in values.T])
    words, counts = np.unique(values, axis=0, return_counts=True)
    use = (
        f"{len(words)} code words in {n} samples, {codebook_use(values, codebook_size):.0%} of the {codebook_size} "
        f"entries used, perplexity {perplexity(values, codebook_size).mean():.2f} per position"
    )
    dead = int((shares > COLLAPSED).sum())
    if dead == length:
        word = "-".join(str(entry) for entry in words[counts.argmax()])
        return f"collapsed to one code: {word} in {counts.max() / n:.1%} of the samples; {use}"
    if dead:
        return f"partly collapsed: one entry takes over {COLLAPSED:.0%} at {dead} of {length} positions; {use}"
    return f"not collapsed: no entry takes more than {shares.max():.1%} at any position; {use}"


# --- information ---


def entropy_bits(codes: Labels, miller_madow: bool = False) -> float:
    """Entropy of discrete values, from their frequencies among the samples.

    Args:
        codes: One value per sample.
        miller_madow: Add (values seen - 1) / (2 n ln 2), the leading term of what few samples leave out.
    """
    return _entropy(np.unique(_array(codes), return_counts=True)[1], miller_madow)


def mutual_information(codes: Whole, labels: Labels, miller_madow: bool = False) -> float:
    """Mutual information of code word and label in bits, from their frequencies among the samples.

    The plain estimate is too large: for independent ones by about (codes - 1)(labels - 1) / (2 n ln 2), more than a
    bit where words are many. `permutation_test` measures that. The correction of Miller and Madow, applied to all
    three entropies, removes its leading term; it may leave a value below 0.
    """
    counts = _contingency(*_both(codes, labels))
    return _information(counts, miller_madow)


class PermutationTest(NamedTuple):
    """Plain mutual information, its p-value, and its mean under permuted labels, which is what chance gives."""

    bits: float
    p: float
    chance_bits: float


def permutation_test(
    codes: Whole, labels: Labels, groups: Whole, permutations: int = 999, seed: int = 0
) -> PermutationTest:
    """Whether codes and labels depend on each other, by moving labels between clips.

    Labels that are constant within each clip are permuted among all clips; others as whole sequences, in the order of
    the samples, among clips of equally many samples. Both hold the resemblance within clips fixed.
    p = (1 + permutations with at least the information observed) / (1 + permutations).

    Raises:
        DataError: arrays of different lengths, one clip, or labels that vary within clips of which no two are
            equally long.
    """
    word, label = _both(codes, labels)
    clip = np.unique(_matching("groups", groups, len(word)), return_inverse=True)[1]
    shuffle = _shuffler(label, clip, np.random.default_rng(seed))
    observed = _information(_contingency(word, label))
    chance = np.array([_information(_contingency(word, shuffle())) for _ in range(permutations)])
    p = (1 + int((chance >= observed - 1e-9).sum())) / (1 + permutations)
    return PermutationTest(observed, p, float(chance.mean()))


def _shuffler(label: np.ndarray, clip: np.ndarray, rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """Draws permutations of labels between clips."""
    sizes = np.bincount(clip)
    if len(sizes) < 2:
        raise DataError("groups hold 1 clip: a permutation between clips needs at least 2; use more clips")
    of_clip = label[np.unique(clip, return_index=True)[1]]
    if (of_clip[clip] == label).all():
        return lambda: rng.permutation(of_clip)[clip]
    order = np.argsort(clip, kind="stable")
    blocks = [order[np.isin(clip[order], np.flatnonzero(sizes == n))].reshape(-1, n) for n in np.unique(sizes)]
    if max(len(block) for block in blocks) < 2:
        raise DataError(
            f"labels vary within clips, and all {len(sizes)} clips differ in length: none can change places; "
            "take equally many samples from each clip"
        )

    def shuffled() -> np.ndarray:
        moved = label.copy()
        for block in blocks:
            moved[block] = label[rng.permutation(block)]
        return moved

    return shuffled


def _both(codes: Whole, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Codes and labels, each numbered from 0."""
    values = _array(codes)
    labels = _matching("labels", labels, len(values))
    return tuple(np.unique(column, return_inverse=True)[1] for column in (values, labels))


def _contingency(word: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How often each word goes with each label: (words, labels)."""
    n_labels = label.max() + 1
    counts = np.bincount(word * n_labels + label, minlength=(word.max() + 1) * n_labels)
    return counts.reshape(-1, n_labels)


def _information(counts: np.ndarray, miller_madow: bool = False) -> float:
    terms = (counts.sum(1), counts.sum(0), counts.ravel())
    of_word, of_label, joint = (_entropy(term[term > 0], miller_madow) for term in terms)
    information = of_word + of_label - joint
    return information if miller_madow else max(information, 0.0)  # rounding


def _entropy(counts: np.ndarray, miller_madow: bool) -> float:
    n = counts.sum()
    plain = np.log2(n) - (counts * np.log2(counts)).sum() / n
    return float(plain + (len(counts) - 1) / (2 * n * np.log(2)) * miller_madow)


# --- probes ---


@dataclass(frozen=True)
class ProbeResult:
    """How well a probe tells the target on clips that it was not fitted on.

    Args:
        kind: "linear" or "mlp".
        figure: "balanced accuracy" (mean share of right answers over the classes) or "R²" (mean over the outputs).
        score: The figure of all samples together, each predicted from the folds without its clip.
        per_fold: The figure of each fold; R² in all of them relative to the variance of all samples.
        chance: 1 / classes, which any guess blind to the features expects, the largest class too; 0 for R².
        n_groups: Clips.
    """

    kind: str
    figure: str
    score: float
    per_fold: tuple[float, ...]
    chance: float
    n_groups: int

    @property
    def error(self) -> float:
        """Standard error of the score over the folds; rough, as folds share what they are fitted on."""
        return float(np.std(self.per_fold, ddof=1) / np.sqrt(len(self.per_fold)))


def probe(
    features: Float[np.ndarray, "n d"] | Float[Tensor, "n d"],
    target: Labels | Numbers,
    groups: Whole,
    kind: Kind = "linear",
    folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Cross-validated score of telling a target from features, the folds divided by clip.

    Whole numbers and words are classes: the folds are stratified, classes weigh equally in the score. Floating-point
    numbers are regressed. Features are standardised on the training folds.

    Args:
        features: Codes through `one_hot_codes`, latents, or `pca_difference_features`.
        target: Class (n,), or numbers (n,) or (n, k).
        groups: Clip of each sample.
        kind: "linear": logistic regression or ridge with an L2 penalty chosen by cross-validation across the clips of
            the training folds. "mlp": one hidden layer of 64, stopped early by a third of those clips.

    Raises:
        DataError: values that are not finite, arrays of different lengths, a constant output, fewer clips than folds,
            or a class in a single clip.
    """
    x = _array(features).astype(float)
    y, clip = _matching("target", target, len(x)), _matching("groups", groups, len(x))
    classes = y.dtype.kind not in "fc"
    y = np.unique(y, return_inverse=True)[1] if classes else y.astype(float).reshape(len(x), -1)
    _check_probe(x, y, clip, classes, folds)
    predicted, splits = np.empty_like(y), _splits(y, clip, folds, seed)
    for train, test in splits:
        fit = _fit_linear if kind == "linear" else _fit_mlp
        predicted[test] = fit(x[train], y[train], clip[train], seed)(x[test])
    figure = _recall if classes else _r2
    per_fold = tuple(figure(y, predicted, test) for _, test in splits)
    return ProbeResult(
        kind,
        "balanced accuracy" if classes else "R²",
        figure(y, predicted, np.arange(len(y))),
        per_fold,
        1 / (y.max() + 1) if classes else 0.0,
        len(np.unique(clip)),
    )


def probe_table(
    features: Mapping[str, Float[np.ndarray, "n _"] | Float[Tensor, "n _"]],
    targets: Mapping[str, Labels | Numbers],
    groups: Whole,
    kinds: Sequence[Kind] = ("linear", "mlp"),
    folds: int = 5,
    seed: int = 0,
) -> tuple[pd.DataFrame, dict[tuple[str, str, str], ProbeResult]]:
    """Every probe from every features to every target, on the same folds.

    Returns:
        One row per probe (features, target, kind, figure, score, error, chance, clips), and the results by
        (features, target, kind).
    """
    results = {
        (source, aim, kind): probe(x, y, groups, kind, folds, seed)
        for aim, y in targets.items()
        for source, x in features.items()
        for kind in kinds
    }
    rows = [(*key[:2], r.kind, r.figure, r.score, r.error, r.chance, r.n_groups) for key, r in results.items()]
    columns = ["features", "target", "kind", "figure", "score", "error", "chance", "clips"]
    return pd.DataFrame(rows, columns=columns), results


def in_enough_clips(labels: Labels, groups: Whole, clips: int = 2) -> Bool[np.ndarray, " n"]:
    """Samples whose class occurs in at least so many clips, which a probe across clips needs."""
    values = _array(labels)
    pairs = pd.DataFrame({"label": values, "clip": _matching("groups", groups, len(values))})
    return (pairs.groupby("label")["clip"].transform("nunique") >= clips).to_numpy()


def _check_probe(x: np.ndarray, y: np.ndarray, clip: np.ndarray, classes: bool, folds: int) -> None:
    n_clips = len(np.unique(clip))
    if not 2 <= folds <= n_clips or n_clips < 3:
        raise DataError(
            f"folds={folds} of {n_clips} clips: folds must be from 2 to the number of clips, and clips at least 3; "
            "change folds, or use more clips"
        )
    for name, values in (("features", x), ("target", y)):
        if not np.isfinite(values).all():
            row = np.argwhere(~np.isfinite(values))[0][0]
            raise DataError(f"{name} of sample {row} are not finite: must be; leave the sample out")
    if (y.max(0) == y.min(0)).any():
        raise DataError("target has the same value in every sample: a probe needs it to differ; choose another")
    single = (~in_enough_clips(y, clip)).sum() if classes else 0
    if single:
        raise DataError(
            f"target: {single} samples are of a class that occurs in a single clip: each must be in at least 2; "
            "keep those of in_enough_clips, or use more clips"
        )


def _splits(y: np.ndarray, clip: np.ndarray, folds: int, seed: int) -> Splits:
    """(training, test) samples of each fold, no clip on both sides; stratified for classes, else at random."""
    if y.ndim == 1:
        folds = min(folds, np.bincount(y).max())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # said by in_enough_clips
            folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            splits = [(train, test) for train, test in folder.split(y, y, clip) if len(test)]
    else:
        parts = np.array_split(np.random.default_rng(seed).permutation(np.unique(clip)), folds)
        held = [np.isin(clip, part) for part in parts]
        splits = [(np.flatnonzero(~test), np.flatnonzero(test)) for test in held]
    if any(len(np.unique(y[train], axis=0)) < 2 for train, _ in splits):
        raise DataError(
            f"target is constant in all clips of a fold's training part ({len(np.unique(clip))} clips, {folds} folds): "
            "must vary; use more clips, or more folds"
        )
    return splits


def _fit_linear(x: np.ndarray, y: np.ndarray, clip: np.ndarray, seed: int) -> Predict:
    """Logistic regression for classes (1-D y), ridge for numbers, the penalty chosen across clips."""
    classes = y.ndim == 1
    model = LogisticRegression(max_iter=2000) if classes else Ridge()
    name, values = ("C", INVERSE_PENALTIES) if classes else ("alpha", PENALTIES)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), model),
        {f"{type(model).__name__.lower()}__{name}": values},
        scoring=_score_recall if classes else "r2",
        cv=_splits(y, clip, min(INNER_FOLDS, len(np.unique(clip))), seed),
        error_score="raise",
    )
    return search.fit(x, y).predict


def _fit_mlp(x: np.ndarray, y: np.ndarray, clip: np.ndarray, seed: int) -> Predict:
    """One hidden layer, of the epoch that did best on the clips held out of its training."""
    scaler, mean, scale = StandardScaler().fit(x), 0.0, 1.0
    model = (MLPClassifier if y.ndim == 1 else MLPRegressor)(
        (MLP_WIDTH,), alpha=1e-2, batch_size=min(32, len(x)), learning_rate_init=3e-3, random_state=seed
    )
    keywords = {"classes": np.unique(y)} if y.ndim == 1 else {}
    if y.ndim == 2:
        mean, scale = y.mean(0), np.where(y.std(0) > 0, y.std(0), 1)
    x, y = scaler.transform(x), y if y.ndim == 1 else (y - mean) / scale
    train, held = _splits(y, clip, min(INNER_FOLDS, len(np.unique(clip))), seed)[0]
    best, lowest, since = model, np.inf, 0
    for _ in range(MLP_EPOCHS):
        model.partial_fit(x[train], y[train], **keywords)
        loss, since = _held_loss(model, x[held], y[held]), since + 1
        if loss < lowest:
            best, lowest, since = deepcopy(model), loss, 0
        if since >= MLP_PATIENCE:
            break
    if y.ndim == 1:
        return lambda x: best.predict(scaler.transform(x))
    return lambda x: best.predict(scaler.transform(x)).reshape(len(x), -1) * scale + mean


def _held_loss(model: MLPClassifier | MLPRegressor, x: np.ndarray, y: np.ndarray) -> float:
    """Cross-entropy in nats, or squared error."""
    if y.ndim == 2:
        return float(np.square(model.predict(x).reshape(y.shape) - y).mean())
    share = model.predict_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return float(-np.log(np.maximum(share, 1e-12)).mean())


def _recall(y: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> float:
    """Mean over the classes among the rows of the share of right answers."""
    right = y[rows] == predicted[rows]
    return float(np.mean([right[y[rows] == k].mean() for k in np.unique(y[rows])]))


def _score_recall(model, x: np.ndarray, y: np.ndarray) -> float:
    return _recall(y, model.predict(x), np.arange(len(y)))


def _r2(y: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> float:
    """1 - squared error of the rows / variance of all samples, mean over the outputs."""
    return float((1 - np.square(y[rows] - predicted[rows]).mean(0) / y.var(0)).mean())


def fit_difference_pca(first: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], n_components: int) -> PCA:
    """Principal components of the pixel differences x - first; fit them on training pairs."""
    return fit_pca(lambda: [x - first], n_components)


def pca_difference_features(
    first: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], pca: PCA
) -> Float[np.ndarray, "n k"]:
    """Coordinates of pixel differences along fitted components: what a probe gets without any learnt encoder."""
    return pca.encode(x - first).double().cpu().numpy()


# --- gains ---


@dataclass(frozen=True)
class Gain:
    """Mean gain over a floor: the mean over clips of the mean over each clip's samples.

    Args:
        db: 10 log10(floor's error / model's error) in dB, above 0 where the model is better; the difference in PSNR.
        error: Standard error over clips in dB; NaN for one clip.
        share: Clips with a gain above 0, as a share.
        n_groups: Clips.
    """

    db: float
    error: float
    share: float
    n_groups: int


def gain_db(mse_model: Numbers, mse_floor: Numbers, groups: Whole) -> Gain:
    """Gain of a model over a floor on the same samples; errors below 1e-10 count as 1e-10.

    Args:
        mse_model, mse_floor: Mean squared error of each sample (n,).
        groups: Clip of each sample.
    """
    model = _array(mse_model).astype(float)
    floor, clip = _matching("mse_floor", mse_floor, len(model)), _matching("groups", groups, len(model))
    if not all((values >= 0).all() for values in (model, floor)):  # also true of NaN
        raise DataError("mse of a sample is below 0 or not a number: must be a squared error; check the predictions")
    gain = 10 * np.log10(np.maximum(floor, LEAST_MSE) / np.maximum(model, LEAST_MSE))
    of_clip = pd.Series(gain).groupby(clip).mean()
    return Gain(float(of_clip.mean()), float(of_clip.sem()), float((of_clip > 0).mean()), len(of_clip))


# --- sentences ---


def action_sentence(
    mi_bits: float, label_entropy_bits: float, p: float, chance_bits: float | None = None, label: str = "the action"
) -> str:
    """ "codes carry 0.9 of 3.0 bits about the action (p = 0.001)"; says "no information" where p is above 0.05.

    Args:
        chance_bits: What permuted labels give, `PermutationTest.chance_bits`: part of `mi_bits` in a small sample.
    """
    numbers = f"{mi_bits:.1f} of {label_entropy_bits:.1f} bits"
    tail = f"p = {p:.2g}" + ("" if chance_bits is None else f"; permuted labels give {chance_bits:.1f} bits")
    if p > SIGNIFICANT:
        return f"codes carry no information about {label} that chance would not: {numbers} ({tail})"
    return f"codes carry {numbers} about {label} ({tail})"


def probe_sentence(result: ProbeResult, features: str = "the codes", target: str = "the action") -> str:
    """The score beside chance, with the range of the folds; above or below it by two standard errors over the folds."""
    beyond = (result.score - result.chance) / max(result.error, 1e-12)
    times = f", {result.score / result.chance:.1f} times chance" if result.chance else ""
    word = "above chance" if beyond > 2 else "below chance" if beyond < -2 else "not distinguishable from chance"
    return (
        f"a {result.kind} probe from {features} to {target} is {word}: {result.figure} {result.score:.2f} against "
        f"{result.chance:.3g}{times} ({min(result.per_fold):.2f} to {max(result.per_fold):.2f} over "
        f"{len(result.per_fold)} folds of {result.n_groups} clips)"
    )


def gain_sentence(gains: Mapping[int, Gain], model: str = "LAQ", floor: str = "copy-frame") -> str:
    """ "LAQ beats copy-frame by 2.1 dB (3 of 3 seeds)": the mean over training seeds and the seeds that agree.

    A seed is for or against the model by two standard errors over its clips; the sentence needs more than half of
    the seeds for either, and a mean gain of that sign.
    """
    mean = float(np.mean([gain.db for gain in gains.values()]))
    won = sum(gain.db > 2 * gain.error for gain in gains.values())
    lost = sum(gain.db < -2 * gain.error for gain in gains.values())
    if min(gain.n_groups for gain in gains.values()) < 2:
        return f"{model} against {floor} cannot be decided on one clip: {mean:+.1f} dB ({len(gains)} seeds)"
    if mean > 0 and 2 * won > len(gains):
        return f"{model} beats {floor} by {mean:.1f} dB ({won} of {len(gains)} seeds)"
    if mean < 0 and 2 * lost > len(gains):
        return f"{model} falls short of {floor} by {-mean:.1f} dB ({lost} of {len(gains)} seeds)"
    return f"{model} is not distinguishable from {floor}: {mean:+.1f} dB (ahead in {won} of {len(gains)} seeds)"


# --- arrays ---


def _array(values: Shaped[np.ndarray, "..."] | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _matching(name: str, values: Shaped[np.ndarray, "..."] | Tensor, n: int) -> np.ndarray:
    """An array of n samples."""
    values = _array(values)
    if len(values) != n:
        raise DataError(f"{name} of {len(values)} samples beside {n}: must be equally many; take them from one split")
    return values
