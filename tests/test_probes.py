import numpy as np
import pytest
import torch

from workbench.datasets.frames import DataError
from workbench.information import one_hot_codes
from workbench.metrics import fit_pca
from workbench.probes import (
    Gain,
    ProbeResult,
    advantage_sentence,
    gain_db,
    gain_sentence,
    in_enough_clips,
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
    assert len(result.per_fold) == 3 and result.figure == "balanced accuracy" and result.kind == kind


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
    assert result.score == pytest.approx(np.mean(result.per_fold), abs=1e-6)  # folds of equally many samples


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
    assert first == again and first.per_fold != other.per_fold


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
    assert table["score"].tolist() == [result.score for result in results.values()]
    assert results["codes", "displacement", "linear"].score > 0.99


def test_classes_of_too_few_clips_are_found() -> None:
    labels, groups = np.array(["a", "a", "b", "b", "c"]), np.array([0, 1, 2, 2, 3])
    assert in_enough_clips(labels, groups).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 40}, "folds=40 of 32 clips: folds must be from 2 to the number of clips"),
        ({"groups": CLIP[1:]}, "groups of 191 samples beside 192: must be equally many"),
        ({"target": np.full(len(CLIP), "a")}, "target has the same value in every sample"),
        ({"target": np.where(CLIP == 3, "rare", ACTION)}, "6 samples are of a class that occurs in a single clip"),
        ({"features": np.full((len(CLIP), 2), np.nan)}, "features of sample 0 are not finite"),
        ({"target": np.where(CLIP == 2, np.inf, 1.0)}, "target of sample 12 are not finite"),
        (
            {"target": np.arange(32) // 2, "features": np.eye(32), "groups": np.arange(32)},
            "5 folds: must be from 2 to the samples of the largest class, here 2",
        ),
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
    with pytest.raises(DataError, match="judged holds no sample: .* hold out clips"):
        probe(codes, ACTION, CLIP, kind, folds=3, judged=np.zeros(len(CLIP), bool))


def test_pca_features_are_coordinates_of_the_difference() -> None:
    g = torch.Generator().manual_seed(0)
    first, direction = torch.rand(20, 1, 8, 8, generator=g), torch.rand(1, 1, 8, 8, generator=g)
    size = torch.linspace(-1, 1, 20)
    x = first + size.view(-1, 1, 1, 1) * direction
    features = pca_difference_features(first, x, fit_pca(lambda: [x - first], 1))
    assert features.shape == (20, 1)
    np.testing.assert_allclose(abs(features[:, 0]), abs(size) * direction.norm(), atol=1e-4)


def test_the_sentence_of_a_probe() -> None:
    result = ProbeResult("linear", "balanced accuracy", 0.5, (0.4, 0.5, 0.6), 0.125, 48)
    assert probe_sentence(result) == (
        "a linear probe from the codes to the action is above chance: balanced accuracy 0.50 against 0.125, "
        "4.0 times chance (0.40 to 0.60 over 3 folds of 48 clips)"
    )
    result = ProbeResult("mlp", "R²", 0.05, (-0.2, 0.3, 0.05), 0.0, 9)
    assert probe_sentence(result, "noise", "the displacement") == (
        "an MLP probe from noise to the displacement is not distinguishable from chance: R² 0.05 against 0 "
        "(-0.20 to 0.30 over 3 folds of 9 clips)"
    )
    assert " is below chance: " in probe_sentence(ProbeResult("mlp", "R²", -0.5, (-0.5, -0.52, -0.48), 0.0, 9))


# --- gains ---


def test_gain_is_a_mean_over_clips_of_the_ratio_in_db() -> None:
    floor = torch.full((6,), 0.1)
    model = torch.tensor([0.01, 0.01, 0.01, 0.01, 0.1, 1.0])  # +10 dB in four samples of one clip, 0 and -10
    gain = gain_db(model, floor, np.array([0, 0, 0, 0, 1, 2]))
    assert gain.db == pytest.approx(0, abs=1e-6) and gain.share == pytest.approx(1 / 3) and gain.n_groups == 3
    assert gain.error == pytest.approx(10 / np.sqrt(3), rel=1e-5)
    exact = gain_db(np.zeros(2), np.array([1e-8, 0.0]), np.array([0, 1]))
    assert exact.db == pytest.approx(10)  # 20 and 0


def test_gains_of_no_errors_are_refused() -> None:
    for bad in (-1.0, np.nan):
        with pytest.raises(DataError, match="mse of a sample is below 0 or not a number"):
            gain_db(np.array([bad]), np.array([1.0]), np.array([0]))


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ([2.0, 2.1, 2.2], "LAQ beats copy-frame by 2.1 dB (3 of 3 seeds; 12 clips)"),
        ([2.0, 2.1, 0.1], "LAQ beats copy-frame by 1.4 dB (2 of 3 seeds; 12 clips)"),
        ([2.0, 0.1, -0.1], "LAQ is not distinguishable from copy-frame: +0.7 dB (ahead in 1 of 3 seeds; 12 clips)"),
        ([1.0, 1.0, -5.0], "LAQ is not distinguishable from copy-frame: -1.0 dB (ahead in 2 of 3 seeds; 12 clips)"),
        ([-1.0, -2.0], "LAQ falls short of copy-frame by 1.5 dB (2 of 2 seeds; 12 clips)"),
    ],
)
def test_the_sentence_of_gains_counts_the_seeds_that_agree(gains: list[float], sentence: str) -> None:
    assert gain_sentence({seed: Gain(db, 0.2, 0.9, 12) for seed, db in enumerate(gains)}) == sentence


def test_more_is_told_where_the_folds_agree_on_it() -> None:
    """Student's t of 3 folds reaches 4.303 standard errors: 0.1, 0.2 and 0.3 apart are 0.2 ± 0.25; 0.2 each, ± 0."""
    result = lambda *folds: ProbeResult("linear", "R²", sum(folds) / 3, folds, 0.0, 9)  # noqa: E731
    other = result(0.1, 0.2, 0.3)
    assert advantage_sentence(result(0.2, 0.4, 0.6), other, ("codes", "PCA")) == (
        "codes is not distinguishable from PCA: R² 0.40 against 0.20, difference +0.20 ± 0.25 (95 % over 3 folds)"
    )
    more = advantage_sentence(result(0.3, 0.4, 0.5), other, ("codes", "PCA"))
    assert more.startswith("codes tells more than PCA: R² 0.40 against 0.20, difference +0.20 ± 0.00")
    assert advantage_sentence(result(0.0, 0.1, 0.2), other, ("codes", "PCA")).startswith("codes tells less than PCA")


def test_r2_and_chance_are_of_what_is_judged() -> None:
    """Samples that are not judged vary much more: their variance must not make noise look predicted."""
    few = CLIP < CLIPS // 2
    target = np.where(few, 0.01, 10.0) * np.random.default_rng(0).standard_normal(len(CLIP))
    assert probe(noise(len(CLIP), 2), target, CLIP, judged=few).score < 0.1
    two = np.isin(NUMBER, [0, 1])
    assert probe(noise(len(CLIP), 2), ACTION, CLIP, folds=3, judged=two).chance == 1 / 2


def test_one_clip_decides_nothing() -> None:
    alone = gain_db(np.array([0.1]), np.array([1.0]), np.array([0]))
    assert gain_sentence({0: alone}) == "LAQ against copy-frame cannot be decided on one clip: +10.0 dB (1 seeds)"
