"""Probes: how well features tell a target on clips that they are not fitted on, in numbers and words.

Samples of one clip resemble each other, so the clip is the unit: no fold of a probe divides a clip, and uncertainties
are of the score of all samples together, over the clips that are judged. Below, "clip" stands for any such group; of
networks it is the training run.

Sources:
    Alain & Bengio 2017, Understanding intermediate layers using linear classifier probes.
    Efron & Tibshirani 1993, An introduction to the bootstrap, chapter 11 (jackknife).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import t
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
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


# --- probes ---


class ProbeError(DataError):
    """These groups and this target cannot be probed; others may be."""


@dataclass(frozen=True)
class ProbeResult:
    """How well a probe tells the target on clips that it was not fitted on.

    Args:
        kind: "linear" or "mlp".
        figure: "balanced accuracy" (mean share of right answers over the classes) or "R²" (mean over the outputs).
        score: The figure of all judged samples together, each predicted from the folds without its clip.
        without: The same without each judged clip in turn, in the order of the clips' numbers; NaN where what is left
            has no figure: it holds no sample, or an output of it is constant.
        chance: 1 / classes among the judged, which any guess blind to the features expects, the largest class too; 0
            for R².
        folds: Folds that the judged clips were divided into.
        unit: What groups are called in sentences.
    """

    kind: str
    figure: str
    score: float
    without: tuple[float, ...]
    chance: float
    folds: int
    unit: str = "clips"

    @property
    def n_groups(self) -> int:
        """Clips that are judged."""
        return len(self.without)

    @property
    def error(self) -> float:
        """Standard error of the score over the judged clips; see `jackknife_error`."""
        return jackknife_error(self.without)


def jackknife_error(without: Sequence[float] | Float[np.ndarray, " n"]) -> float:
    """Standard error of a figure from what it is without each group in turn; NaN of one group, or where one is NaN.

    Predictions stay as they are: that they depend on the clips they are fitted on, is left out.

    Source: Efron & Tibshirani 1993, chapter 11.
    """
    n, values = len(without), np.asarray(without)
    return float(np.sqrt((n - 1) / n * np.square(values - values.mean()).sum())) if n > 1 else float("nan")


def probe(
    features: Float[np.ndarray, "n d"] | Float[Tensor, "n d"],
    target: Labels | Numbers,
    groups: Whole,
    kind: Kind = "linear",
    folds: int = 5,
    seed: int = 0,
    judged: Bool[np.ndarray, " _"] | None = None,
    unit: str = "clips",
) -> ProbeResult:
    """Cross-validated score of telling a target from features, the folds divided by clip.

    Whole numbers and words are classes: the folds are stratified, classes weigh equally in the score. Floating-point
    numbers are regressed. Features are standardised on what a fold is fitted on.

    Args:
        features: Codes through `one_hot_codes`, latents, or `pca_difference_features`.
        target: Class (n,), or numbers (n,) or (n, k).
        groups: Clip of each sample.
        kind: "linear": logistic regression (classes weighing equally) or ridge, its L2 penalty chosen by
            cross-validation across the clips it is fitted on. "mlp": one hidden layer of 64, stopped early by a third
            of those clips.
        folds: Each holds about as many judged clips; at most one for each of these.
        judged: Samples that the score is of, such as those that the features' encoder was not trained on. Clips without
            any help to fit in every fold. All are judged where None.
        unit: What groups are called in messages and sentences.

    Raises:
        ProbeError: a constant output, too few clips, a class in a single clip, or no sample to judge.
        DataError: values that are not finite, arrays of different lengths, or fewer than 2 folds.
    """
    x = array_of(features).astype(float)
    y, clip = matching("target", target, len(x)), matching("groups", groups, len(x))
    judged = np.ones(len(x), bool) if judged is None else matching("judged", judged, len(x))
    classes = y.dtype.kind not in "fc"
    y = np.unique(y, return_inverse=True)[1] if classes else y.astype(float).reshape(len(x), -1)
    _check_values(x, y, folds)
    folds = min(folds, len(np.unique(clip[judged])))
    _check_groups(y, clip, judged, folds, unit)
    predicted, fit = np.zeros_like(y), _fit_linear if kind == "linear" else _fit_mlp
    with threadpool_limits(1):  # several threads spend their time waiting for each other on so little
        for train, test in _splits(y, clip, judged, folds, seed):
            predicted[test] = fit(x[train], y[train], clip[train], seed)(x[test]).reshape(y[test].shape)
    y, predicted, clip = y[judged], predicted[judged], clip[judged]
    figure = _recall if classes else _r2
    name, chance = ("balanced accuracy", 1 / len(np.unique(y))) if classes else ("R²", 0.0)
    without = tuple(figure(y[clip != g], predicted[clip != g]) for g in np.unique(clip))
    return ProbeResult(kind, name, figure(y, predicted), without, chance, folds, unit)


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
        One row per probe (features, target, kind, figure, score, error, chance, clips, folds), and the results by
        (features, target, kind).
    """
    results = {
        (source, aim, kind): probe(x, y, groups, kind, folds, seed, judged)
        for aim, y in targets.items()
        for source, x in features.items()
        for kind in kinds
    }
    rows = [(*key, r.figure, r.score, r.error, r.chance, r.n_groups, r.folds) for key, r in results.items()]
    columns = ["features", "target", "kind", "figure", "score", "error", "chance", "clips", "folds"]
    return pd.DataFrame(rows, columns=columns), results


def in_enough_clips(labels: Labels, groups: Whole, clips: int = 2) -> Bool[np.ndarray, " n"]:
    """Samples whose class occurs in at least so many clips, which a probe across clips needs."""
    values = array_of(labels)
    pairs = pd.DataFrame({"label": values, "clip": matching("groups", groups, len(values))})
    return (pairs.groupby("label")["clip"].transform("nunique") >= clips).to_numpy()


def _check_values(x: np.ndarray, y: np.ndarray, folds: int) -> None:
    if folds < 2:
        raise DataError(f"folds={folds}: must be at least 2; change folds")
    for name, values in (("features", x), ("target", y)):
        if not np.isfinite(values).all():
            row = np.argwhere(~np.isfinite(values))[0][0]
            raise DataError(f"{name} of sample {row} are not finite: must be; leave the sample out")


def _check_groups(y: np.ndarray, clip: np.ndarray, judged: np.ndarray, folds: int, unit: str) -> None:
    if not judged.any():
        raise ProbeError("judged holds no sample: a probe needs some to be judged by; hold out some " + unit)
    n, held = len(np.unique(clip)), len(np.unique(clip[judged]))
    left = n - int(np.ceil(held / folds))
    if left < 2:
        raise ProbeError(
            f"{folds} folds of {held} judged of {n} {unit}: {left} would be left to fit on, and must be at least 2; "
            f"use more folds, or more {unit}"
        )
    for values, which in ((y, "sample"), *([] if y.ndim == 1 else [(y[judged], "judged sample")])):
        if (values.max(0) == values.min(0)).any():
            raise ProbeError(f"target has the same value in every {which}: a probe needs it to differ; choose another")
    single = (~in_enough_clips(y, clip)).sum() if y.ndim == 1 else 0
    if single:
        raise ProbeError(
            f"target: {single} samples are of a class that only one of the {unit} has: each must be in at least 2; "
            f"keep those of in_enough_clips, or use more {unit}"
        )


def _splits(y: np.ndarray, clip: np.ndarray, judged: np.ndarray, folds: int, seed: int) -> list[Split]:
    """(training, test) samples of each fold: clips with judged samples are dealt out in turn, the others always train.

    In random order; where the target is a class, clips of one class one after the other. A clip of several counts as
    one of its rarest.
    """
    names, number = np.unique(clip, return_inverse=True)
    order = np.random.default_rng(seed).permutation(np.unique(number[judged]))
    if y.ndim == 1:
        holds = np.zeros((len(names), y.max() + 1), bool)
        holds[number, y] = True
        rarest = np.where(holds, holds.sum(0), len(names) + 1).argmin(1)
        order = order[np.argsort(rarest[order], kind="stable")]
    fold = np.full(len(names), -1)
    fold[order] = np.arange(len(order)) % folds
    held = [fold[number] == i for i in range(folds)]
    splits = [(np.flatnonzero(~test), np.flatnonzero(test)) for test in held]
    if any((y[train].max(0) == y[train].min(0)).all() for train, _ in splits):
        raise ProbeError("target is constant in what a fold is fitted on: must vary; use more data, or more folds")
    return splits


def _inner_splits(y: np.ndarray, clip: np.ndarray, seed: int) -> list[Split]:
    """Folds of a training part, by clip: 3, or 2 of two clips."""
    return _splits(y, clip, np.ones(len(y), bool), min(INNER_FOLDS, len(np.unique(clip))), seed)


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


def _recall(y: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur of the share of right answers; NaN of no sample."""
    of_class, right = np.bincount(y), np.bincount(y, y == predicted)
    return float((right[of_class > 0] / of_class[of_class > 0]).mean()) if len(y) else float("nan")


def _score_recall(model, x: np.ndarray, y: np.ndarray) -> float:
    return _recall(y, model.predict(x))


def _r2(y: np.ndarray, predicted: np.ndarray) -> float:
    """1 - squared error / variance, mean over the outputs; NaN of no sample, or of a constant output."""
    if not len(y) or (y.max(0) == y.min(0)).any():
        return float("nan")
    return float((1 - np.square(y - predicted).mean(0) / y.var(0)).mean())


def pca_difference_features(
    first: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], pca: PCA
) -> Float[np.ndarray, "n k"]:
    """Coordinates of pixel differences along components fitted on those of training: what nobody has to train."""
    return pca.encode(x - first).double().cpu().numpy()


# --- sentences ---


def probe_sentence(result: ProbeResult, features: str = "the codes", target: str = "the action") -> str:
    """The score beside chance, with its 95 % interval: Student's t, standard error by the jackknife over clips.

    Above or below chance needs that interval to leave chance out.
    """
    name = "an MLP" if result.kind == "mlp" else "a linear"
    times = f", {result.score / result.chance:.1f} times chance" if result.chance else ""
    numbers = f"{result.figure} {result.score:.2f} against {result.chance:.3g}{times}"
    name, half = f"{name} probe from {features} to {target}", _reach(result.without)
    if np.isnan(half):
        return f"{name} cannot be told from chance on so few {result.unit} ({result.n_groups}): {numbers}"
    beyond = result.score - result.chance
    word = "above chance" if beyond > half else "below chance" if beyond < -half else "not distinguishable from chance"
    interval = f"{result.score - half:.2f} to {result.score + half:.2f}: 95 % over {result.n_groups} {result.unit}"
    return f"{name} is {word}: {numbers} ({interval})"


def advantage_sentence(one: ProbeResult, other: ProbeResult, names: tuple[str, str]) -> str:
    """Whether a probe from one kind of features tells more than from another, judged on the same clips.

    "More" and "less" need a 95 % interval of the difference of the two scores that leaves 0 out (Student's t, standard
    error by the jackknife over clips, which leaves the same clip out of both), and that the better one is above chance.

    Raises:
        ValueError: the two are not judged on equally many clips.
    """
    if one.n_groups != other.n_groups:
        raise ValueError(f"{one.n_groups} and {other.n_groups} {one.unit} are judged: must be the same ones")
    half = _reach(np.subtract(one.without, other.without))
    scores = f"{one.figure} {one.score:.3f} against {other.score:.3f}"
    if np.isnan(half):
        return f"{names[0]} and {names[1]} cannot be told apart on so few {one.unit} ({one.n_groups}): {scores}"
    difference, best = one.score - other.score, max(one, other, key=lambda result: result.score)
    said = f"{names[0]} tells {'more' if difference > 0 else 'less'} than {names[1]}"
    if abs(difference) <= half:
        said = f"{names[0]} is not distinguishable from {names[1]}"
    elif best.score - best.chance <= _reach(best.without):
        said = f"neither {names[0]} nor {names[1]} is above chance"
    shown = round(one.score, 3) - round(other.score, 3)  # of the scores as they stand there
    return f"{said}: {scores}, difference {shown:+.3f} ± {half:.3f} (95 % over {one.n_groups} {one.unit})"


def _reach(without: Sequence[float] | np.ndarray) -> float:
    """Half of the 95 % interval of a figure; NaN where nothing is known of it."""
    return float(t.ppf(0.975, len(without) - 1)) * jackknife_error(without)
