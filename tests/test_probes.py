from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench import probes
from workbench.datasets.frames import DataError
from workbench.information import one_hot_codes
from workbench.metrics import fit_pca
from workbench.probes import (
    ProbeError,
    ProbeResult,
    advantage_sentence,
    in_enough_clips,
    jackknife_error,
    pca_difference_features,
    probe,
    probe_sentence,
    probe_table,
)

CLIPS, PER_CLIP, CLASSES = 32, 6, 4
CLIP = np.repeat(np.arange(CLIPS), PER_CLIP)
ACTION = np.array(["lift", "none", "push", "turn"])[np.arange(CLIPS) % CLASSES][CLIP]
NUMBER = (np.arange(CLIPS) % CLASSES)[CLIP]
KINDS = ["linear", "mlp"]
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- probes ---


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_the_action_tell_it(kind: str) -> None:
    codes = np.stack([NUMBER, np.random.default_rng(0).integers(0, CLASSES, len(NUMBER))], 1)
    result = probe(one_hot_codes(codes, CLASSES), ACTION, CLIP, kind, folds=3)
    assert result.score > 0.99 and result.chance == 1 / CLASSES and result.n_groups == CLIPS
    assert result.folds == 3 and result.unit == "clips" and result.figure == "balanced accuracy" and result.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_tell_only_the_clip_are_worth_chance(kind: str) -> None:
    """One feature per clip tells the action of a clip seen in training perfectly, and of no other: in folds by sample
    it would score 1."""
    features = np.eye(CLIPS)[CLIP] + 0.01 * noise(len(CLIP), CLIPS)
    assert probe(features, ACTION, CLIP, kind, folds=3).score < 1.4 / CLASSES
    assert (
        probe(features, ACTION, np.arange(len(CLIP)), kind, folds=3).score > 0.9
    )  # every sample called a clip of its own


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_regressed(kind: str) -> None:
    features = noise(len(CLIP), 5)
    target = np.stack([2 * features[:, 0], 1e-3 * features[:, 1] + 7], 1)
    result = probe(torch.from_numpy(features), target, CLIP, kind, folds=2)
    assert result.figure == "R²" and result.chance == 0
    assert result.score > (0.999 if kind == "linear" else 0.8)
    assert probe(features, target[:, 0], CLIP, kind, folds=2).score > (0.999 if kind == "linear" else 0.8)


def test_a_network_finds_what_a_line_cannot() -> None:
    features = noise(len(CLIP), 2)
    target = (np.sign(features[:, 0] * features[:, 1]) > 0).astype(int)
    line, network = (probe(features, target, CLIP, kind, folds=2).score for kind in KINDS)
    assert line < 0.65 and network > 0.8


def test_known_share_of_variance() -> None:
    """Half of the target's variance comes from the feature: R² is a half, from units of any size."""
    features, other = noise(4000, 1), noise(4000, seed=1)
    result = probe(1e4 * features, features[:, 0] + other, np.repeat(np.arange(40), 100))
    assert result.score == pytest.approx(0.5, abs=0.03)
    assert np.mean(result.without) == pytest.approx(result.score, abs=1e-3)
    assert result.error == pytest.approx(np.sqrt(1.25 / 4000), rel=0.5)  # of a mean of 4000 squared normals, with 2 / 4


def test_classes_weigh_equally() -> None:
    """Nine tenths of one class: guessing it is right nine times of ten, and worth chance."""
    few = np.where(np.arange(CLIPS) % 10 == 0, "rare", "usual")[CLIP]
    result = probe(noise(len(CLIP), 1), few, CLIP)
    assert result.score == pytest.approx(0.5, abs=0.1) and result.chance == 0.5


def test_noise_is_worth_chance_on_average_not_less() -> None:
    """Of few clips, the class most frequent in training is the least frequent in the fold held out: guessing it scores
    below chance."""
    clip = np.repeat(np.arange(12), 2)
    labels = (np.arange(12) % 4)[clip]
    scores = [probe(noise(len(clip), 2, seed=seed), labels, clip, folds=4, seed=seed).score for seed in range(10)]
    assert abs(np.mean(scores) - 1 / 4) < 0.1


def test_probes_repeat_and_follow_their_seed() -> None:
    features = noise(len(CLIP), 4) + NUMBER[:, None]
    first, again, other = (probe(features, ACTION, CLIP, "mlp", folds=2, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.without != other.without


def test_wide_features_do_not_drown_the_penalty() -> None:
    """More features than samples, one of which tells: the penalty is chosen, so the score stays above chance."""
    features = np.concatenate([4.0 * np.eye(CLASSES)[NUMBER], noise(len(CLIP), 300)], 1)
    assert probe(features, ACTION, CLIP).score > 2 / CLASSES


def test_a_table_of_all_probes() -> None:
    table, results = probe_table(
        {"codes": np.eye(CLASSES)[NUMBER], "noise": noise(len(CLIP), 2)},
        {"action": ACTION, "displacement": 1.0 * NUMBER},
        CLIP,
        kinds=["linear"],
    )
    assert table["features"].tolist() == ["codes", "noise"] * 2 and table["chance"].tolist() == [0.25, 0.25, 0, 0]
    assert table["figure"].tolist() == ["balanced accuracy"] * 2 + ["R²"] * 2 and table["clips"].eq(CLIPS).all()
    assert table["folds"].eq(5).all() and table["error"].tolist() == [result.error for result in results.values()]
    assert table["score"].tolist() == [result.score for result in results.values()]
    assert results["codes", "displacement", "linear"].score > 0.99


def test_classes_of_too_few_clips_are_found() -> None:
    labels, groups = np.array(["a", "a", "b", "b", "c"]), np.array([0, 1, 2, 2, 3])
    assert in_enough_clips(labels, groups).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "folds=1: must be at least 2"),
        ({"groups": CLIP[1:]}, "groups of 191 samples beside 192: must be equally many"),
        ({"target": np.full(len(CLIP), "a")}, "target has the same value in every sample"),
        ({"target": np.where(CLIP == 3, "rare", ACTION)}, "6 samples are of a class that only one of the clips has"),
        ({"features": np.full((len(CLIP), 2), np.nan)}, "features of sample 0 are not finite"),
        ({"target": np.where(CLIP == 2, np.inf, 1.0)}, "target of sample 12 are not finite"),
    ],
)
def test_what_cannot_be_probed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        probe(**({"features": noise(len(CLIP), 2), "target": ACTION, "groups": CLIP} | change))


@pytest.mark.parametrize("kind", KINDS)
def test_only_judged_samples_count_and_the_others_help_to_fit(kind: str) -> None:
    """One clip of each class is judged: too few to learn from, so what is known comes from the others."""
    codes, few = one_hot_codes(NUMBER[:, None], CLASSES), CLIP < CLASSES
    result = probe(codes, ACTION, CLIP, kind, folds=3, judged=few)
    assert result.score == 1 and result.n_groups == CLASSES
    wrong = np.where(few, (NUMBER + 1) % CLASSES, NUMBER)  # the judged ones say another class than the others teach
    assert probe(one_hot_codes(wrong[:, None], CLASSES), ACTION, CLIP, kind, folds=3, judged=few).score < 0.2
    with pytest.raises(ProbeError, match="judged holds no sample: .* hold out some clips"):
        probe(codes, ACTION, CLIP, kind, folds=3, judged=np.zeros(len(CLIP), bool))


def test_pca_features_are_coordinates_of_the_difference() -> None:
    g = torch.Generator().manual_seed(0)
    first, direction = torch.rand(20, 1, 8, 8, generator=g), torch.rand(1, 1, 8, 8, generator=g)
    size = torch.linspace(-1, 1, 20)
    x = first + size.view(-1, 1, 1, 1) * direction
    features = pca_difference_features(first, x, fit_pca(lambda: [x - first], 1))
    assert features.shape == (20, 1)
    np.testing.assert_allclose(abs(features[:, 0]), abs(size) * direction.norm(), atol=1e-4)


# --- sentences ---


def result(score: float, *without: float, chance: float = 0.0, **words) -> ProbeResult:
    return ProbeResult(words.pop("kind", "linear"), words.pop("figure", "R²"), score, without, chance, 5, **words)


def test_the_sentence_of_a_probe() -> None:
    """Without each of three 0.38, 0.5 and 0.62: the jackknife's error is sqrt(2 / 3 * 0.0288), and t is 4.303."""
    known = {"figure": "balanced accuracy", "chance": 0.125}
    found = probe_sentence(result(0.5, 0.499, 0.5, 0.501, **known))
    assert found == (
        "a linear probe from the codes to the action is above chance: balanced accuracy 0.50 against 0.125, "
        "4.0 times chance (0.50 to 0.50: 95 % over 3 clips)"
    )
    rough = result(0.5, 0.38, 0.5, 0.62, kind="mlp", unit="training runs")
    assert rough.error == pytest.approx(np.sqrt(2 / 3 * 0.0288))
    assert probe_sentence(rough, "noise", "the gap") == (
        "an MLP probe from noise to the gap is not distinguishable from chance: R² 0.50 against 0 "
        "(-0.10 to 1.10: 95 % over 3 training runs)"
    )
    assert " is below chance: " in probe_sentence(result(-0.5, -0.5, -0.52, -0.48))
    assert probe_sentence(result(0.5, np.nan)).endswith(
        "cannot be told from chance on so few clips (1): R² 0.50 against 0"
    )


def test_more_is_told_where_the_clips_agree_on_it() -> None:
    """Scores that vary much from clip to clip, and alike: it is their difference that counts, of 0.2 ± 4.303 * 0.01155
    without each of three clips."""
    other, names = result(0.2, 0.1, 0.2, 0.3), ("codes", "PCA")
    near = result(0.4, 0.29, 0.4, 0.51)
    assert advantage_sentence(near, other, names) == (
        "neither codes nor PCA is above chance: R² 0.400 against 0.200, difference +0.200 ± 0.050 (95 % over 3 clips)"
    )
    other, near = (replace(part, score=part.score + 0.5) for part in (other, near))
    assert advantage_sentence(near, other, names) == (
        "codes tells more than PCA: R² 0.900 against 0.700, difference +0.200 ± 0.050 (95 % over 3 clips)"
    )
    assert advantage_sentence(other, near, names).startswith("codes tells less than PCA: R² 0.700 against 0.900")
    apart = replace(near, without=(0.5, 0.4, 0.3))
    assert advantage_sentence(apart, other, names).startswith("codes is not distinguishable from PCA: R² 0.900 against")


def test_the_difference_is_that_of_the_printed_scores() -> None:
    found = advantage_sentence(result(0.6504, *[0.65] * 3), result(0.6496, *[0.65] * 3), ("a", "b"))
    assert "R² 0.650 against 0.650, difference +0.000 ± 0.000" in found


def test_one_clip_or_other_clips_decide_nothing() -> None:
    alone = result(0.4, np.nan, unit="training runs")
    assert advantage_sentence(alone, alone, ("codes", "PCA")) == (
        "codes and PCA cannot be told apart on so few training runs (1): R² 0.400 against 0.400"
    )
    with pytest.raises(ValueError, match="1 and 2 training runs are judged: must be the same ones"):
        advantage_sentence(alone, result(0.4, 0.4, 0.4), ("codes", "PCA"))


# --- folds, and what is judged ---


MIXED = np.where(np.arange(CLIPS * PER_CLIP) % PER_CLIP, "still", ACTION)  # one sample of each clip is of its action


@pytest.mark.parametrize("target", [ACTION, MIXED, noise(len(CLIP))], ids=["classes", "several in a clip", "numbers"])
def test_every_fold_judges_about_as_many_clips_and_the_others_always_train(target: np.ndarray, monkeypatch) -> None:
    trained = []

    def fit(x: np.ndarray, y: np.ndarray, clip: np.ndarray, seed: int) -> probes.Predict:
        trained.append(set(clip))
        return lambda x: np.zeros(len(x), y.dtype)

    monkeypatch.setattr(probes, "_fit_linear", fit)
    few = CLIP >= CLIPS // 2
    probe(noise(len(CLIP), 2), target, CLIP, folds=5, judged=few)
    held = [set(CLIP) - part for part in trained]
    assert sorted(map(len, held)) == [3, 3, 3, 3, 4] and set.union(*held) == set(CLIP[few])
    if target.dtype.kind == "U":  # 4 clips of each action, all of them in different folds
        assert all(len({clip % CLASSES for clip in part}) == len(part) for part in held)


def test_there_are_no_more_folds_than_judged_clips() -> None:
    few = CLIP < 3
    found = probe(noise(len(CLIP), 2), noise(len(CLIP)), CLIP, folds=5, judged=few)
    assert found.folds == found.n_groups == 3
    alone = probe(noise(len(CLIP), 2), noise(len(CLIP)), CLIP, judged=CLIP == 0)
    assert alone.folds == 1 and np.isnan(alone.error) and np.isfinite(alone.score)
    with pytest.raises(
        ProbeError, match="2 folds of 3 judged of 3 runs: 1 would be left to fit on, .* at least 2; use"
    ):
        probe(noise(18, 2), noise(18), CLIP[:18], folds=2, unit="runs")


def test_a_class_of_two_clips_is_never_held_out_whole() -> None:
    """16 classes of two clips each: every clip is told from the other one of its class, judged or not."""
    target = CLIP // 2
    assert probe(np.eye(16)[target], target, CLIP).score == 1
    assert probe(np.eye(16)[target], target, CLIP, judged=CLIP % 2 == 0).score == 1


def test_the_error_is_that_of_the_pooled_score() -> None:
    """Predictions are constants: the score and its error are those of sums over clips, computed here by hand."""
    target = noise(24)
    clip = np.repeat(np.arange(8), 3)
    found = probe(np.zeros((24, 1)), target, clip, folds=8)
    held = np.array([target[clip != g].mean() for g in range(8)])[clip]
    r2 = lambda rows: 1 - np.square(target - held)[rows].sum() / np.square(target[rows] - target[rows].mean()).sum()  # noqa: E731
    without = np.array([r2(clip != g) for g in range(8)])
    assert found.score == pytest.approx(r2(slice(None))) and found.without == pytest.approx(without)
    assert found.error == pytest.approx(np.sqrt(7 / 8 * np.square(without - without.mean()).sum()))


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = noise(12)
    without = (values.sum() - values) / 11
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / np.sqrt(12))
    assert np.isnan(jackknife_error((0.5,))) and np.isnan(jackknife_error((0.5, np.nan)))


def test_a_target_that_varies_in_one_judged_clip_alone_has_no_error() -> None:
    target = np.where(CLIP == 0, 5.0, np.where(CLIP < 4, 0.1, noise(len(CLIP))))
    found = probe(noise(len(CLIP), 2), target, CLIP, judged=CLIP < 4)
    assert np.isfinite(found.score) and np.isnan(found.error)
    with pytest.raises(ProbeError, match="target has the same value in every judged sample"):
        probe(noise(len(CLIP), 2), target, CLIP, judged=(CLIP > 0) & (CLIP < 4))


def test_r2_and_chance_are_of_what_is_judged() -> None:
    """Samples that are not judged vary much more: their variance must not make noise look predicted."""
    few = CLIP < CLIPS // 2
    target = np.where(few, 0.01, 10.0) * np.random.default_rng(0).standard_normal(len(CLIP))
    assert probe(noise(len(CLIP), 2), target, CLIP, judged=few).score < 0.1
    two = np.isin(NUMBER, [0, 1])
    assert probe(noise(len(CLIP), 2), ACTION, CLIP, folds=3, judged=two).chance == 1 / 2
