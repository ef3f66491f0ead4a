"""What latent actions say about actions: probes across clips, and gains over a floor, in numbers and words.

Samples of one clip resemble each other, so the clip (group) is the unit: no fold of a probe divides a clip, and
standard errors of gains are over clips.

Source: Alain & Bengio 2017, Understanding intermediate layers using linear classifier probes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import t
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from workbench.datasets.frames import DataError
from workbench.information import Labels, Whole, array_of, matching
from workbench.metrics import PCA

Numbers = Float[np.ndarray, "_ ..."] | Float[Tensor, "_ ..."]
Split = tuple[np.ndarray, np.ndarray]
Predict = Callable[[np.ndarray], np.ndarray]
Kind = Literal["linear", "mlp"]

INNER_FOLDS = 3
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""C of logistic regression, chosen by cross-validation across the clips of the training folds."""
PENALTIES = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
"""alpha of ridge, chosen in the same way."""
MLP_WIDTH, MLP_BATCH, MLP_EPOCHS, MLP_PATIENCE = 64, 32, 200, 15
MLP_GAIN = 2e-3  # [nats, or of the target's variance] that an epoch must add
LEAST_MSE = 1e-10  # an exact prediction counts as this one, as in `comparison.copy_frame_errors`


# --- probes ---


@dataclass(frozen=True)
class ProbeResult:
    """How well a probe tells the target on clips that it was not fitted on.

    Args:
        kind: "linear" or "mlp".
        figure: "balanced accuracy" (mean share of right answers over the classes) or "R²" (mean over the outputs).
        score: The figure of all samples together, each predicted from the folds without its clip.
        per_fold: The figure of each fold; R² in all of them relative to the variance of all samples judged.
        chance: 1 / classes among the judged, which any guess blind to the features expects, the largest class too; 0
            for R².
        n_groups: Clips that are judged.
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
    judged: Bool[np.ndarray, " _"] | None = None,
) -> ProbeResult:
    """Cross-validated score of telling a target from features, the folds divided by clip.

    Whole numbers and words are classes: the folds are stratified, classes weigh equally in the score. Floating-point
    numbers are regressed. Features are standardised on the training folds.

    Args:
        features: Codes through `one_hot_codes`, latents, or `pca_difference_features`.
        target: Class (n,), or numbers (n,) or (n, k).
        groups: Clip of each sample.
        kind: "linear": logistic regression (classes weighing equally) or ridge, its L2 penalty chosen by
            cross-validation across the clips of the training folds. "mlp": one hidden layer of 64, stopped early by
            a third of those clips.
        judged: Samples that the score is of, such as those that the features' encoder was not trained on; the others
            only help to fit. All where None.

    Raises:
        DataError: values that are not finite, arrays of different lengths, a constant output, fewer clips than folds,
            a class in a single clip, or no sample to judge.
    """
    x = array_of(features).astype(float)
    y, clip = matching("target", target, len(x)), matching("groups", groups, len(x))
    classes = y.dtype.kind not in "fc"
    y = np.unique(y, return_inverse=True)[1] if classes else y.astype(float).reshape(len(x), -1)
    _check_probe(x, y, clip, classes, folds)
    predicted, splits = np.empty_like(y), _splits(y, clip, folds, seed)
    with threadpool_limits(1):  # several threads spend their time waiting for each other on so little
        for train, test in splits:
            fit = _fit_linear if kind == "linear" else _fit_mlp
            predicted[test] = fit(x[train], y[train], clip[train], seed)(x[test]).reshape(y[test].shape)
    judged = np.ones(len(y), bool) if judged is None else matching("judged", judged, len(y))
    if not judged.any():
        raise DataError("judged holds no sample: a probe needs some to be judged by; hold out clips")
    figure = _recall if classes else partial(_r2, variance=y[judged].var(0))
    per_fold = tuple(figure(y, predicted, test[judged[test]]) for _, test in splits if judged[test].any())
    name, chance = ("balanced accuracy", 1 / len(np.unique(y[judged]))) if classes else ("R²", 0.0)
    score = figure(y, predicted, np.flatnonzero(judged))
    return ProbeResult(kind, name, score, per_fold, chance, len(np.unique(clip[judged])))


def probe_table(
    features: Mapping[str, Float[np.ndarray, "n _"] | Float[Tensor, "n _"]],
    targets: Mapping[str, Labels | Numbers],
    groups: Whole,
    kinds: Sequence[Kind] = ("linear", "mlp"),
    folds: int = 5,
    seed: int = 0,
    judged: Bool[np.ndarray, " _"] | None = None,
) -> tuple[pd.DataFrame, dict[tuple[str, str, str], ProbeResult]]:
    """Every probe from every features to every target, on the same folds.

    Returns:
        One row per probe (features, target, kind, figure, score, error, chance, clips), and the results by
        (features, target, kind).
    """
    results = {
        (source, aim, kind): probe(x, y, groups, kind, folds, seed, judged)
        for aim, y in targets.items()
        for source, x in features.items()
        for kind in kinds
    }
    rows = [(*key[:2], r.kind, r.figure, r.score, r.error, r.chance, r.n_groups) for key, r in results.items()]
    columns = ["features", "target", "kind", "figure", "score", "error", "chance", "clips"]
    return pd.DataFrame(rows, columns=columns), results


def in_enough_clips(labels: Labels, groups: Whole, clips: int = 2) -> Bool[np.ndarray, " n"]:
    """Samples whose class occurs in at least so many clips, which a probe across clips needs."""
    values = array_of(labels)
    pairs = pd.DataFrame({"label": values, "clip": matching("groups", groups, len(values))})
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


def _splits(y: np.ndarray, clip: np.ndarray, folds: int, seed: int) -> list[Split]:
    """(training, test) samples of each fold, no clip on both sides; stratified for classes, else at random."""
    largest = np.bincount(y).max() if y.ndim == 1 else len(y)
    if not 2 <= folds <= largest:
        raise DataError(
            f"{folds} folds: must be from 2 to the samples of the largest class, here {largest}; change folds, or use "
            "more clips"
        )
    if y.ndim == 1:
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


def _inner_splits(y: np.ndarray, clip: np.ndarray, seed: int) -> list[Split]:
    """Folds of a training part, by clip: 3, or as many as so few samples allow."""
    largest = np.bincount(y).max() if y.ndim == 1 else len(y)
    return _splits(y, clip, int(min(INNER_FOLDS, len(np.unique(clip)), largest)), seed)


def _fit_linear(x: np.ndarray, y: np.ndarray, clip: np.ndarray, seed: int) -> Predict:
    """Logistic regression for classes (1-D y), ridge for numbers, the penalty chosen across clips."""
    classes = y.ndim == 1
    model = LogisticRegression(class_weight="balanced", max_iter=2000) if classes else Ridge()
    name, values = ("C", INVERSE_PENALTIES) if classes else ("alpha", PENALTIES)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), model),
        {f"{type(model).__name__.lower()}__{name}": values},
        scoring=_score_recall if classes else "r2",
        cv=_inner_splits(y, clip, seed),
        error_score="raise",
    )
    return search.fit(x, y).predict


def _fit_mlp(x: np.ndarray, y: np.ndarray, clip: np.ndarray, seed: int) -> Predict:
    """A network of one hidden layer for classes (1-D y) or numbers, the latter standardised."""
    scaler, splits = StandardScaler().fit(x), _inner_splits(y, clip, seed)
    x = scaler.transform(x)
    if y.ndim == 1:
        best = _early_stopped(MLPClassifier, x, y, splits[0], seed, classes=np.unique(y))
        return lambda x: best.predict(scaler.transform(x))
    mean, scale = y.mean(0), np.where(y.std(0) > 0, y.std(0), 1)
    best = _early_stopped(MLPRegressor, x, (y - mean) / scale, splits[0], seed)
    return lambda x: best.predict(scaler.transform(x)).reshape(len(x), -1) * scale + mean


def _early_stopped(
    network: type[MLPClassifier | MLPRegressor], x: np.ndarray, y: np.ndarray, split: Split, seed: int, **keywords
) -> MLPClassifier | MLPRegressor:
    """The network after the epoch that did best on the samples held out of its training."""
    y = y.squeeze(1) if y.shape[1:] == (1,) else y
    train, held = split
    model = network(
        hidden_layer_sizes=(MLP_WIDTH,),
        alpha=1e-2,
        batch_size=min(MLP_BATCH, len(train)),
        learning_rate_init=3e-3,
        random_state=seed,
    )
    best, lowest, since = model, np.inf, 0
    for _ in range(MLP_EPOCHS):
        model.partial_fit(x[train], y[train], **keywords)
        loss, since = _held_loss(model, x[held], y[held]), since + 1
        if loss < lowest - MLP_GAIN:
            best, lowest, since = deepcopy(model), loss, 0
        if since >= MLP_PATIENCE:
            break
    return best


def _held_loss(model: MLPClassifier | MLPRegressor, x: np.ndarray, y: np.ndarray) -> float:
    """Cross-entropy in nats, or squared error."""
    if isinstance(model, MLPRegressor):
        return float(np.square(model.predict(x) - y).mean())
    share = model.predict_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return float(-np.log(np.maximum(share, 1e-12)).mean())


def _recall(y: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> float:
    """Mean over the classes among the rows of the share of right answers."""
    right = y[rows] == predicted[rows]
    return float(np.mean([right[y[rows] == k].mean() for k in np.unique(y[rows])]))


def _score_recall(model, x: np.ndarray, y: np.ndarray) -> float:
    return _recall(y, model.predict(x), np.arange(len(y)))


def _r2(y: np.ndarray, predicted: np.ndarray, rows: np.ndarray, variance: np.ndarray) -> float:
    """1 - squared error of the rows / variance of all samples judged, mean over the outputs."""
    return float((1 - np.square(y[rows] - predicted[rows]).mean(0) / variance).mean())


def pca_difference_features(
    first: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], pca: PCA
) -> Float[np.ndarray, "n k"]:
    """Coordinates of pixel differences along components fitted on those of training: what nobody has to train."""
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
    model = array_of(mse_model).astype(float)
    floor, clip = matching("mse_floor", mse_floor, len(model)), matching("groups", groups, len(model))
    if not all((values >= 0).all() for values in (model, floor)):  # also true of NaN
        raise DataError("mse of a sample is below 0 or not a number: must be a squared error; check the predictions")
    gain = 10 * np.log10(np.maximum(floor, LEAST_MSE) / np.maximum(model, LEAST_MSE))
    of_clip = pd.Series(gain).groupby(clip).mean()
    return Gain(float(of_clip.mean()), float(of_clip.sem()), float((of_clip > 0).mean()), len(of_clip))


# --- sentences ---


def probe_sentence(result: ProbeResult, features: str = "the codes", target: str = "the action") -> str:
    """The score beside chance, with the range of the folds.

    Above or below chance needs a 95 % interval of Student's t over the folds that leaves chance out.
    """
    beyond, half = result.score - result.chance, t.ppf(0.975, len(result.per_fold) - 1) * result.error
    word = "above chance" if beyond > half else "below chance" if beyond < -half else "not distinguishable from chance"
    name = "an MLP" if result.kind == "mlp" else "a linear"
    times = f", {result.score / result.chance:.1f} times chance" if result.chance else ""
    numbers = f"{result.figure} {result.score:.2f} against {result.chance:.3g}{times}"
    folds = f"{min(result.per_fold):.2f} to {max(result.per_fold):.2f} over {len(result.per_fold)} folds"
    return f"{name} probe from {features} to {target} is {word}: {numbers} ({folds} of {result.n_groups} clips)"


def advantage_sentence(one: ProbeResult, other: ProbeResult, names: tuple[str, str]) -> str:
    """Whether a probe from one kind of features tells more than from another, on the same folds.

    "More" and "less" need a 95 % interval of Student's t over the folds' differences that leaves 0 out.
    """
    difference = np.subtract(one.per_fold, other.per_fold)
    half = t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    mean = difference.mean()
    word = "tells more than" if mean > half else "tells less than" if mean < -half else "is not distinguishable from"
    scores = f"{one.figure} {one.score:.2f} against {other.score:.2f}"
    interval = f"{mean:+.2f} ± {half:.2f} (95 % over {len(difference)} folds)"
    return f"{names[0]} {word} {names[1]}: {scores}, difference {interval}"


def gain_sentence(gains: Mapping[int, Gain], model: str = "LAQ", floor: str = "copy-frame") -> str:
    """ "LAQ beats copy-frame by 2.1 dB (3 of 3 seeds)": the mean over training seeds and the seeds that agree.

    The number of clips follows. A seed is for or against the model where a 95 % interval of Student's t over its clips
    leaves 0 out; the sentence needs more than half of the seeds for either, and a mean gain of that sign.
    """
    mean, clips = float(np.mean([gain.db for gain in gains.values()])), min(gain.n_groups for gain in gains.values())
    reach = {seed: t.ppf(0.975, gain.n_groups - 1) * gain.error for seed, gain in gains.items() if gain.n_groups > 1}
    won = sum(gains[seed].db > half for seed, half in reach.items())
    lost = sum(gains[seed].db < -half for seed, half in reach.items())
    if clips < 2:
        return f"{model} against {floor} cannot be decided on one clip: {mean:+.1f} dB ({len(gains)} seeds)"
    if mean > 0 and 2 * won > len(gains):
        return f"{model} beats {floor} by {mean:.1f} dB ({won} of {len(gains)} seeds; {clips} clips)"
    if mean < 0 and 2 * lost > len(gains):
        return f"{model} falls short of {floor} by {-mean:.1f} dB ({lost} of {len(gains)} seeds; {clips} clips)"
    ahead = f"(ahead in {won} of {len(gains)} seeds; {clips} clips)"
    return f"{model} is not distinguishable from {floor}: {mean:+.1f} dB {ahead}"
