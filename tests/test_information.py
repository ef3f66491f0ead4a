import numpy as np
import pytest
import torch

from workbench.datasets.frames import DataError
from workbench.information import (
    action_sentence,
    code_words,
    codebook_use,
    collapse_sentence,
    entropy_bits,
    mutual_information,
    one_hot_codes,
    permutation_test,
    perplexity,
)

K = 8


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def every_word(length: int, k: int = K) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(k)] * length, indexing="ij"), -1).reshape(-1, length)


# --- codes ---


def test_words_are_the_digits_to_the_base_of_the_codebook() -> None:
    np.testing.assert_array_equal(code_words(every_word(3), K), np.arange(K**3))
    assert code_words(torch.tensor([[7, 0, 1]]), K).tolist() == [7 * 64 + 1]
    assert code_words(np.full((1, 21), 7), K).tolist() == [2**63 - 1]


def test_long_words_are_equal_where_their_indices_are() -> None:
    indices = draw().integers(0, 2, (200, 64))
    indices[100:] = indices[:100]
    words = code_words(indices, K)
    np.testing.assert_array_equal(words[:100], words[100:])
    assert len(set(words.tolist())) == 100


def test_one_hot_codes_mark_the_entry_of_each_position() -> None:
    assert one_hot_codes(np.array([[0, 2], [1, 1]]), 3).tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]]


def test_perplexity_counts_the_entries_in_even_use() -> None:
    even, two, one = np.arange(400) % K, np.arange(400) % 2, np.full(400, 5)
    np.testing.assert_allclose(perplexity(np.stack([even, two, one], 1), K), [K, 2, 1])
    assert codebook_use(two[:, None], K) == 2 / K and codebook_use(np.stack([two, one], 1), K) == 3 / K


@pytest.mark.parametrize("function", [code_words, one_hot_codes, perplexity, codebook_use, collapse_sentence])
def test_codes_outside_the_codebook_are_refused(function) -> None:
    for index in (-1, 8):
        with pytest.raises(DataError, match=rf"index {index} of a codebook of 8: must be from 0 to 7"):
            function(np.array([[3, index]]), K)
    with pytest.raises(DataError, match=r"indices of shape \(0, 4\): must hold at least one sample"):
        function(np.zeros((0, 4), int), K)


def test_collapse_is_said_in_words_with_its_numbers() -> None:
    word = np.tile([3, 1], (200, 1))
    assert collapse_sentence(word, K).startswith("collapsed to one code: 3-1 in 100.0% of the samples; 1 code words")
    nearly = word.copy()
    nearly[:8] = draw().integers(4, 8, (8, 2))  # 4 %
    assert collapse_sentence(nearly, K).startswith("collapsed to one code: 3-1 in 96.0% of the samples")
    half = word.copy()
    half[:, 1] = np.arange(200) % K
    assert collapse_sentence(half, K).startswith("partly collapsed: one entry takes over 95% at 1 of 2 positions")
    assert "perplexity 4.50 per position" in collapse_sentence(half, K)
    alive = collapse_sentence(every_word(2), K)
    assert alive.startswith(
        "not collapsed: no entry takes more than 12.5% at any position; 64 code words in 64 samples"
    )
    assert "100% of the 8 entries used" in alive


# --- information ---


def test_entropy_of_even_use_is_its_logarithm() -> None:
    assert entropy_bits(np.arange(64) % K) == pytest.approx(3)
    assert entropy_bits(np.array(["a"] * 3 + ["b"])) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    assert entropy_bits(np.zeros(5, int)) == 0


def test_miller_madow_takes_most_of_the_bias_of_entropy_away() -> None:
    draws = [draw(i).integers(0, 16, 100) for i in range(100)]
    plain, corrected = (np.mean([entropy_bits(d, miller_madow=on) for d in draws]) for on in (False, True))
    assert plain == pytest.approx(4 - 15 / (200 * np.log(2)), abs=0.01)
    assert corrected == pytest.approx(4, abs=0.01)


def test_information_of_a_variable_about_itself_is_its_entropy() -> None:
    labels = draw().choice(["push", "lift", "turn"], 300, p=[0.5, 0.3, 0.2])
    codes = np.unique(labels, return_inverse=True)[1]
    assert mutual_information(codes * 17, labels) == pytest.approx(entropy_bits(labels))
    assert mutual_information(torch.from_numpy(codes), codes // 2) == pytest.approx(entropy_bits(codes // 2))


def test_information_of_a_noisy_channel() -> None:
    """A binary symmetric channel that flips a quarter carries 1 - H(1/4) bits."""
    sent = np.arange(80) % 2
    received = np.where(np.arange(80) // 2 % 4 == 0, 1 - sent, sent)
    assert mutual_information(received, sent) == pytest.approx(1 - entropy_bits(np.array([0, 1, 1, 1])))


def test_information_of_independent_variables_is_its_bias() -> None:
    codes, labels = np.divmod(np.arange(64), K)
    assert mutual_information(codes, labels) == pytest.approx(0, abs=1e-12)
    pairs = [(draw(i).integers(0, 8, 400), draw(i + 1000).integers(0, 8, 400)) for i in range(100)]
    plain, corrected = (np.mean([mutual_information(*p, miller_madow=on) for p in pairs]) for on in (False, True))
    assert plain == pytest.approx(49 / (800 * np.log(2)), rel=0.1)
    assert abs(corrected) < 0.01


def test_permutations_give_p_of_chance_under_independence() -> None:
    """Codes follow the clip, as do labels: only a permutation by clip sees that they are independent."""
    clip = np.repeat(np.arange(24), 10)
    p = []
    for seed in range(200):
        codes, labels = draw(seed).integers(0, 4, 24)[clip], draw(seed + 500).integers(0, 3, 24)[clip]
        p.append(permutation_test(codes, labels, clip, permutations=49, seed=seed).p)
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.09 and 0.4 < np.mean(p) < 0.65


def test_permutations_see_dependence_and_know_the_bias() -> None:
    clip = np.repeat(np.arange(40), 5)
    labels = draw().integers(0, 4, 40)[clip]
    result = permutation_test(labels, labels, clip, permutations=199)
    assert result.p == 1 / 200 and result.bits == pytest.approx(entropy_bits(labels))
    noise = draw(1).integers(0, 100, len(clip))
    result = permutation_test(noise, labels, clip, permutations=199)
    assert result.p > 0.05 and result.chance_bits == pytest.approx(result.bits, abs=0.15) and result.bits > 0.7


def test_labels_that_vary_within_clips_change_places_as_sequences() -> None:
    """Every clip runs through the same labels: whichever sequence it gets, the information is the same."""
    clip = np.repeat(np.arange(10), 6)
    same = np.tile(np.arange(6), 10)
    assert permutation_test(same, same, clip, permutations=49).p == 1
    own = np.concatenate([draw(i).integers(0, 2, 6) for i in range(10)])
    shuffled = draw(3).permutation(60)
    for order in (np.arange(60), shuffled):  # the order of the samples between clips is of no account
        assert permutation_test(own[order], own[order], clip[order], permutations=49).p < 0.1


def test_permutations_that_cannot_be_are_refused() -> None:
    ones = np.zeros(6, int)
    with pytest.raises(DataError, match="groups hold 1 clip: a permutation between clips needs at least 2"):
        permutation_test(np.arange(6), np.arange(6), ones)
    with pytest.raises(DataError, match="labels vary within clips, and all 3 clips differ in length"):
        permutation_test(np.arange(6), np.arange(6), np.array([0, 1, 1, 2, 2, 2]))
    with pytest.raises(DataError, match="labels of 5 samples beside 6: must be equally many"):
        mutual_information(ones, np.arange(5))


def test_the_sentence_has_its_numbers_and_no_verdict_beyond_chance() -> None:
    assert action_sentence(0.94, 3.0, 0.001) == "codes carry 0.9 of 3.0 bits about the action (p = 0.001)"
    assert (
        action_sentence(1.2, 3.0, 0.001, 0.3)
        == "codes carry 0.9 of 3.0 bits about the action (p = 0.001; 1.20 as counted less 0.30 under permuted labels)"
    )
    assert (
        action_sentence(0.94, 3.0, 0.4, label="the displacement")
        == "codes carry no detectable information about the displacement: 0.9 of 3.0 bits (p = 0.4)"
    )
    assert "carry 0.04 of 3.0 bits" in action_sentence(2.93, 3.0, 0.001, 2.89)
