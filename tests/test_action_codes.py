import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from action_pairs import CLASS, CLASSES, CODE, CONSTANT, ENTRIES, NUMBER, SIZE, WORD, laq, told, vae, write_moving

from workbench.action_codes import (
    Actions,
    actions_of,
    advantages,
    code_shares,
    code_verdicts,
    difference_features,
    each_seed,
    frequent_words,
    judged,
    kl_of,
    labelled,
    place_sentence,
    probe_features,
    probe_targets,
    rate_table,
    seeds_sentence,
)
from workbench.action_comparison import COPY, MEAN, displacement, full_pairs, joined, over_seeds, pair_errors
from workbench.datasets.clips import ClipDataset, Clips, ClipsConfig, open_clips
from workbench.datasets.frames import DataError
from workbench.information import one_hot_codes
from workbench.metrics import mse
from workbench.probes import ProbeResult

CPU = torch.device("cpu")
CLIPS = 32
FLOORS = {COPY: lambda batch: batch["first"], MEAN: lambda batch: 0 * batch["x"]}
pytestmark = pytest.mark.usefixtures("one_thread")


def opened(source: Path, **values: str) -> Clips:
    settings = values | {"image_size": SIZE, "pair_offset": 2, "val_fraction": 0.0, "test_fraction": 0.0}
    return open_clips(ClipsConfig(data=str(source), cache_dir=str(source.parent / "cache"), **settings))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> ClipDataset:
    """Two of each clip: 64 of four classes, each with the numbers 0 to 3 equally often."""
    lengths = {f"clip{i:02d}": 4 for i in range(CLIPS)}
    dataset = full_pairs(opened(write_moving(tmp_path_factory.mktemp("clips") / "data", lengths)).split("train"))
    assert len(dataset) == 2 * CLIPS
    return dataset


def in_split(pairs: ClipDataset, numbers: np.ndarray) -> ClipDataset:
    """The same pairs, their clips in the splits of these numbers."""
    return ClipDataset(replace(pairs.clips, split_of=numbers), pairs.slots, pairs.segment)


@pytest.fixture(scope="module")
def held_out(pairs) -> ClipDataset:
    """The pairs, all of them in the test split."""
    return in_split(pairs, np.full(CLIPS, 2))


@pytest.fixture(scope="module")
def uneven(pairs) -> ClipDataset:
    """Some of them: one of some clips, two of others."""
    return pairs.subset(41)


def prepared(dataset: ClipDataset) -> dict[str, torch.Tensor]:
    return dataset.prepare(dataset.batch(range(len(dataset))))


# --- what a model says ---


@torch.inference_mode()
def test_a_vae_says_the_difference_of_its_means(pairs) -> None:
    rival, batch = vae(), prepared(pairs)
    actions, posterior = actions_of(rival, pairs, 10), rival.model.encode(batch["x"])
    torch.testing.assert_close(actions.features, posterior.mu - rival.model.encode(batch["first"]).mu)
    torch.testing.assert_close(actions.kl, posterior.kl())
    assert actions.indices is None and actions.features.shape == (64, 6)


@torch.inference_mode()
@pytest.mark.parametrize("quantizer", ["nsvq", "fsq"])
def test_a_discrete_action_says_its_indices_and_what_it_quantizes(pairs, quantizer) -> None:
    rival, batch = laq(quantizer=quantizer), prepared(pairs)
    actions, action = actions_of(rival, pairs, 10), rival.model.encode(batch["first"], batch["x"])
    assert torch.equal(actions.indices, action.indices) and len(actions.indices.unique()) > 1
    torch.testing.assert_close(actions.features, action.difference)
    assert actions.kl is None and actions.noisy_mse is None


@torch.inference_mode()
def test_a_continuous_action_says_its_mean_and_its_kl(pairs) -> None:
    rival, batch = laq(quantizer="continuous"), prepared(pairs)
    actions, action = actions_of(rival, pairs, 10), rival.model.encode(batch["first"], batch["x"])
    torch.testing.assert_close(actions.features, action.mu)
    torch.testing.assert_close(actions.kl, action.kl())
    assert actions.indices is None and actions.features.shape == (64, WORD, CODE)


@torch.inference_mode()
@pytest.mark.parametrize("acts", [False, True])
def test_the_error_under_noise_is_that_of_seeded_draws_from_the_posterior(pairs, acts) -> None:
    rival, batch = laq(quantizer="continuous") if acts else vae(), prepared(pairs)
    given = (batch["first"], batch["x"]) if acts else (batch["x"],)
    posterior = rival.model.encode(*given)
    noise = torch.randn(posterior.mu.shape, generator=torch.Generator().manual_seed(5))
    codes = posterior.mu + posterior.logvar.exp().sqrt() * noise
    x_hat = rival.model.decode(*given[:-1], codes).clamp(-1, 1)
    found = [actions_of(rival, pairs, 64, seed).noisy_mse for seed in (5, 5, 6)]
    torch.testing.assert_close(found[0], mse(x_hat, batch["x"]))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], rtol=1e-6)


@torch.inference_mode()
def test_the_kl_of_each_dimension_adds_up(pairs) -> None:
    rival = vae()
    kl = kl_of(rival, pairs, 10)
    posterior = rival.model.encode(prepared(pairs)["x"])
    by_hand = 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean(0)
    torch.testing.assert_close(kl, by_hand, rtol=1e-3, atol=1e-6)
    assert float(kl.sum()) == pytest.approx(float(actions_of(rival, pairs, 10).kl.mean()), rel=1e-4)


def test_pixel_differences_lie_along_the_training_pairs_principal_components(pairs, uneven) -> None:
    """All 40 of 41 pairs keep their differences whole; the first is the leading singular vector, up to its sign."""
    train, every = ((batch["x"] - batch["first"]).flatten(1).double() for batch in map(prepared, (uneven, pairs)))
    mean = train.mean(0)
    whole = difference_features(uneven, uneven, 99, 0, seed=0)
    assert whole.shape == (41, 40)
    np.testing.assert_allclose(np.square(whole).sum(1), (train - mean).square().sum(1), rtol=1e-4)
    axis = torch.linalg.svd(train - mean, full_matrices=False).Vh[0]
    found = difference_features(uneven, pairs, 1, 0, seed=0)[:, 0]
    expected = (every - mean) @ axis
    np.testing.assert_allclose(found * np.sign(found[0] * float(expected[0])), expected, rtol=1e-3, atol=1e-3)


def test_few_training_pairs_give_few_components_and_a_subset_follows_its_seed(pairs) -> None:
    drawn = [difference_features(pairs, pairs, 30, 6, seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (64, 5)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    np.testing.assert_allclose(drawn[0], difference_features(pairs.subset(6, 0), pairs, 30, 0, 7), atol=1e-3)


# --- rates ---


def test_bits_and_errors_of_all_models_and_floors(uneven) -> None:
    models = [laq(), laq("LAQ fsq", "fsq"), laq("LAQ continuous", "continuous")]
    models += [vae("VAE", "kl_weight 0.1"), vae("VAE 0.01", "kl_weight 0.01", seed=1)]
    actions = {rival.name: actions_of(rival, uneven, 16) for rival in models}
    errors = pair_errors([*models, laq(seed=1)], FLOORS, uneven, 16, CPU)
    table = rate_table(models, actions, errors, uneven).set_index(["method", "setting"])
    given = {"LAQ": True, "LAQ fsq": True, "LAQ continuous": True, "VAE": False, COPY: True, MEAN: False}
    assert list(dict.fromkeys(table.index.get_level_values(0))) == list(given)
    for method, first in given.items():
        assert (table.loc[method, "given_first_frame"] == first).all(), method
    clip = uneven.clips.group[uneven.segment]
    over_clips = lambda values: pd.Series(values.double().numpy()).groupby(clip).mean()  # noqa: E731
    for rival in models[2:]:
        row = table.loc[("VAE", rival.setting) if not rival.acts else (rival.name, "")]
        of = actions[rival.name]
        assert row["rate"] == "KL" and row["bits"] == pytest.approx(over_clips(of.kl).mean() / np.log(2))
        assert row["error"] == pytest.approx(over_clips(of.noisy_mse).mean())
        assert row["error_se"] == pytest.approx(over_clips(of.noisy_mse).sem())
    for name in ("LAQ", "LAQ fsq"):
        own = table.loc[name].set_index("rate")
        mean = over_seeds(errors[(errors["name"] == name) & (errors["seed"] == 0)]).loc[name]
        assert own["error"].tolist() == pytest.approx([mean["mse"]] * 2), "of this seed alone"
        assert own["error_se"].tolist() == pytest.approx([mean["mse_se"]] * 2)
        assert own.loc["length × log2(codebook)", "bits"] == pytest.approx(WORD * np.log2(ENTRIES))
        entropy = own["bits"].drop("length × log2(codebook)")
        assert len(entropy) == 1 and entropy.index[0].startswith("entropy (")
        assert 0 < entropy.iloc[0] < own["bits"].max()
    for name in FLOORS:
        row, mean = table.loc[(name, "")], over_seeds(errors).loc[name]
        assert (row["bits"], row["rate"]) == (0, "none")
        assert (row["error"], row["error_se"]) == pytest.approx((mean["mse"], mean["mse_se"]))


def test_the_entropy_of_four_even_codes_is_two_bits(pairs) -> None:
    rival = told(CLASS)
    errors = pair_errors([rival], FLOORS, pairs, 64, CPU)
    table = rate_table([rival], {"LAQ": actions_of(rival, pairs, 64)}, errors, pairs).set_index("rate")
    assert table.loc["entropy (joint)", "bits"] == pytest.approx(2)
    assert table.loc["length × log2(codebook)", "bits"] == pytest.approx(4 * np.log2(6))


# --- codes in figures ---


def spoken(words: dict[tuple[int, ...], int]) -> Actions:
    indices = torch.tensor([word for word, count in words.items() for _ in range(count)])
    return Actions(torch.zeros(len(indices), 2, 3), indices, None, None)


def test_words_come_in_the_order_of_their_frequency() -> None:
    actions = spoken({(0, 3): 2, (5, 5): 3, (1, 0): 10, (0, 2): 5})
    found = frequent_words(actions, 3)
    assert list(found) == ["1-0 (50%)", "0-2 (25%)", "5-5 (15%)"]
    assert [word.tolist() for word in found.values()] == [[1, 0], [0, 2], [5, 5]]
    assert len(frequent_words(actions, 9)) == 4


@torch.inference_mode()
@pytest.mark.parametrize("quantizer", ["nsvq", "fsq", "continuous"])
def test_every_frequent_word_can_be_imagined_on_any_first_frame(pairs, quantizer) -> None:
    rival, batch = laq(quantizer=quantizer), prepared(pairs)
    found = frequent_words(actions_of(rival, pairs, 16), 3)
    assert len(found) == 3
    first = batch["first"][:5]
    drawn = {name: rival.imagine(first, code.expand(5, *code.shape)) for name, code in found.items()}
    assert all(x_hat.shape == first.shape for x_hat in drawn.values())
    if quantizer == "continuous":
        assert list(found) == ["of pair 0", "of pair 1", "of pair 2"]
        whole = rival.imagine(batch["first"][:1], rival.model.encode(batch["first"][:1], batch["x"][:1]).codes)
        torch.testing.assert_close(drawn["of pair 0"][:1], whole)


def test_shares_of_the_entries_at_each_place() -> None:
    shares = code_shares(spoken({(0, 3): 1, (5, 3): 2, (0, 0): 1}), laq())
    np.testing.assert_allclose(shares, [[0.5, 0, 0, 0, 0, 0.5], [0.25, 0, 0, 0.75, 0, 0]])


def test_shares_add_up_at_every_place_and_a_continuous_action_has_none(pairs) -> None:
    rival, continuous = laq(), laq(quantizer="continuous")
    shares = code_shares(actions_of(rival, pairs, 16), rival)
    assert shares.shape == (WORD, ENTRIES)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert code_shares(actions_of(continuous, pairs, 16), continuous) is None


# --- verdicts ---


@pytest.fixture(scope="module")
def verdicts(held_out) -> dict[str, str]:
    """Codes that are the action in one seed and tell nothing of it in another; collapsed ones; continuous ones."""
    models = [told(CLASS), told(NUMBER, seed=1), told(CONSTANT, "LAQ one"), vae()]
    models += [laq("LAQ continuous", "continuous", seed) for seed in (0, 1)]
    return code_verdicts(models, held_out, held_out.column("action").astype(str), 16, permutations=99, folds=4, seed=0)


def test_there_is_a_verdict_of_each_kind_for_each_latent_action(verdicts) -> None:
    """What several seeds say of the probes is one verdict more."""
    assert list(verdicts) == [
        "Is the codebook of LAQ in use?",
        "Do the codes of LAQ mean actions?",
        "Can action be read from LAQ: codes?",
        "Is the codebook of LAQ one in use?",
        "Do the codes of LAQ one mean actions?",
        "Can action be read from LAQ continuous: mean?",
    ]


def test_codes_that_are_the_action_carry_all_of_it_and_independent_ones_nothing(verdicts) -> None:
    """Counted are 2 of 2 bits, and 0, and what chance gives is taken off: of 32 clips, whose codes are all alike, about
    (4 - 1)(4 - 1) / (2 * 32 ln 2) = 0.20 bits; were the 64 samples independent, half as much. All four places of the
    word are the same; p is four times that of one, 1 / 100."""
    one, other = verdicts["Do the codes of LAQ mean actions?"].split(" (seed 0); ")
    numbers = r"([\d.]+) of 2.0 bits.* \(p = ([\d.]+); ([\d.]+) as counted less ([\d.]+) under permuted labels\)"
    carried, p, counted, chance = map(float, re.fullmatch(f"place 0 of 4: codes carry {numbers}", one).groups())
    assert (p, counted) == (0.04, 2) and chance == pytest.approx(0.2, abs=0.05)
    assert carried == pytest.approx(counted - chance, abs=0.05)
    assert other.startswith(
        "place 0 of 4: codes carry no detectable information about the action: 0.00 of 2.0 bits (p = 1; 0.00 as"
    )
    assert other.endswith("(seed 1)")


def test_the_probes_verdict_is_of_all_seeds(verdicts) -> None:
    """The first seed's codes are the action, the second's leave the probe to guess: at most chance."""
    verdict = verdicts["Can action be read from LAQ: codes?"]
    mean, low, high = map(
        float, re.search(r"accuracy ([\d.]+) of .*\(([\d.]+) to ([\d.]+) over 2 seeds", verdict).groups()
    )
    assert high == 1 and low <= 0.3 and mean == pytest.approx((low + high) / 2, abs=0.01)
    assert "of a linear probe from LAQ: codes, against 0.25" in verdict and "32 clips" in verdict
    mean = verdicts["Can action be read from LAQ continuous: mean?"]
    assert "of a linear probe from LAQ continuous: mean, against 0.25" in mean and "over 2 seeds" in mean


def test_collapse_to_one_code_is_said_in_words(verdicts) -> None:
    assert verdicts["Is the codebook of LAQ one in use?"] == (
        "collapsed to one code: 2-2-2-2 in 100.0% of the samples; 1 code words in 64 samples, 17% of the 6 entries "
        "used, perplexity 1.00 per position (seed 0)"
    )
    assert "no detectable information" in verdicts["Do the codes of LAQ one mean actions?"]
    in_use = verdicts["Is the codebook of LAQ in use?"]
    assert in_use.count("not collapsed") == 2 and in_use.count("perplexity 4.00") == 2
    assert "(seed 0); not collapsed" in in_use and in_use.endswith("(seed 1)")


def test_clips_of_the_training_split_help_to_fit_and_are_not_judged(pairs) -> None:
    mixed = in_split(pairs, np.arange(CLIPS) % 2)
    assert judged(mixed).sum() == len(mixed) // 2 and (mixed.segment[judged(mixed)] % 2 == 1).all()
    models = [told(CLASS), told(CLASS, seed=1)]
    said = code_verdicts(models, mixed, mixed.column("action").astype(str), 16, permutations=9, folds=4, seed=0)
    assert f"in {len(mixed) // 2} samples" in said["Is the codebook of LAQ in use?"]
    assert f"folds by clip, {CLIPS // 2} clips" in said["Can action be read from LAQ: codes?"]


def test_without_labels_the_codebooks_use_is_all_that_is_said(held_out) -> None:
    models = [told(CLASS), told(NUMBER, seed=1), laq("LAQ continuous", "continuous")]
    assert list(code_verdicts(models, held_out, None, 16, 9, 4, 0)) == ["Is the codebook of LAQ in use?"]


def test_one_place_that_is_the_action_is_found_among_others_that_are_noise() -> None:
    """Whole words, of which nearly every sample has its own, would tell nothing of it."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 40)
    indices = torch.from_numpy(rng.integers(0, 8, (320, 4)))
    indices[:, 2] = torch.from_numpy(labels)
    sentence = place_sentence(indices, 8, labels.astype(str), np.arange(320) // 4, 99, 0)
    carried, of = map(float, re.match(r"place 2 of 4: codes carry ([\d.]+) of ([\d.]+) bits", sentence).groups())
    assert of == 3 and carried > 2.4 and "(p = 0.04;" in sentence


def test_advantages_are_over_what_nobody_trained_and_over_the_vae() -> None:
    result = ProbeResult("linear", "R²", 0.4, (0.3, 0.5), 0.0, 2)
    names = ("LAQ: codes", "LAQ: before quantising", "PCA of pixel differences", "VAE: difference of latents")
    rows = advantages({(name, "action", kind): result for name in names for kind in ("linear", "mlp")}, "LAQ")
    assert list(rows) == [f"Does LAQ tell the action better than {other}?" for other in names[2:]]
    assert all(
        row.startswith("LAQ: codes is not disting") and row.endswith("one training seed") for row in rows.values()
    )
    assert advantages({}, "LAQ") == {}


def test_each_seed_has_its_sentence() -> None:
    assert each_seed({3: "collapsed", 4: "not collapsed"}) == "collapsed (seed 3); not collapsed (seed 4)"


def test_the_sentence_of_seeds_holds_mean_range_and_chance() -> None:
    of = {
        seed: ProbeResult("linear", "balanced accuracy", score, (score,) * 48, 0.125, 5)
        for seed, score in enumerate((0.5, 0.25, 0.3))
    }
    assert seeds_sentence(of, "its codes") == (
        "balanced accuracy 0.35 of a linear probe from its codes, against 0.125, 2.8 times chance "
        "(0.25 to 0.50 over 3 seeds; folds by clip, 48 clips)"
    )
    assert seeds_sentence({0: ProbeResult("mlp", "R²", 0.5, (0.5,) * 9, 0.0, 5)}, "its mean") == (
        "R² 0.50 of a mlp probe from its mean, against 0 (0.50 to 0.50 over 1 seeds; folds by clip, 9 clips)"
    )


# --- probes ---


def test_targets_of_probes_are_those_asked_for(pairs) -> None:
    targets = probe_targets(pairs, "action", ["height"])
    classes = [CLASSES[int(pairs.name(i)[4:6]) % 4] for i in range(len(pairs))]
    assert targets["action"].tolist() == classes
    np.testing.assert_allclose(targets["displacement"], displacement(pairs, ["height"]))
    np.testing.assert_allclose(targets["displacement"], 0.25, atol=1e-5)
    assert list(probe_targets(pairs, "action", [])) == ["action"]
    assert list(probe_targets(pairs, "", ["x", "height"])) == ["displacement"] and probe_targets(pairs, "", []) == {}
    with pytest.raises(DataError, match="column 'label': the data has clip, frame, action, x, height; choose one"):
        probe_targets(pairs, "label", [])


def test_features_of_probes_say_whose_and_what_they_are(pairs) -> None:
    models = [laq(), laq("LAQ continuous", "continuous"), vae()]
    features = probe_features(models, pairs, 16)
    widths = {"LAQ: codes": WORD * ENTRIES, "LAQ: before quantising": WORD * CODE, "LAQ continuous: mean": WORD * CODE}
    assert {name: values.shape for name, values in features.items()} == {
        name: (64, width) for name, width in (widths | {"VAE: difference of latents": 6}).items()
    }
    said = actions_of(models[0], pairs, 16)
    np.testing.assert_array_equal(features["LAQ: codes"], one_hot_codes(said.indices, ENTRIES))
    np.testing.assert_allclose(features["LAQ: before quantising"], said.features.flatten(1), rtol=1e-4, atol=1e-6)


def labelled_pairs(folder: Path, *classes: str) -> ClipDataset:
    """Two of each clip."""
    source = write_moving(folder / "data", {f"clip{i}": 4 for i in range(len(classes))})
    table = "".join(f"clip{i},{word}\n" for i, word in enumerate(classes))
    (source / "actions.csv").write_text("clip,action\n" + table)
    return full_pairs(opened(source).split("train"))


def test_pairs_without_a_class_that_another_clip_has_are_left_out_aloud(tmp_path, capsys) -> None:
    dataset = labelled_pairs(tmp_path, "push", "push", "lift", "", "turn", "turn", "")
    capsys.readouterr()
    found = labelled(dataset, "action")
    kept = [f"clip{i}/{frames}" for i in (0, 1, 4, 5) for frames in ("1->3", "2->4")]
    assert [found.name(i) for i in range(len(found))] == kept
    said = "6 of 14 pairs have no action that another clip has too: left out of the probes\n"
    assert capsys.readouterr().out == said
    assert labelled(dataset, "") is dataset and len(labelled(found, "action")) == 8
    assert capsys.readouterr().out == ""


def test_clips_of_a_test_list_that_tells_no_labels_are_left_out(tmp_path) -> None:
    source = write_moving(tmp_path / "data", {f"clip{i}": 4 for i in range(7)})
    lists = {"train": [0], "validation": [1, 2, 3], "test": [4, 5, 6]}
    for split, numbers in lists.items():
        labels = {} if split == "test" else {"label": "pushing a cup", "template": "Pushing [something]"}
        entries = [{"id": f"clip{i}"} | labels for i in numbers]
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    clips = opened(source, labels=str(tmp_path))
    held_out = joined(*(full_pairs(clips.split(name)) for name in ("val", "test")))
    for column in ("label", "template"):
        found = labelled(held_out, column)
        assert set(found.table()["clip"]) == {"clip1", "clip2", "clip3"} and len(found) == 6


def test_classes_of_a_single_clip_each_are_refused(tmp_path) -> None:
    with pytest.raises(
        DataError, match="^action='action': none of its classes is that of two held-out clips; choose an"
    ):
        labelled(labelled_pairs(tmp_path, "push", "lift", ""), "action")
    with pytest.raises(DataError, match="column 'label': the data has clip, frame, action"):
        labelled(labelled_pairs(tmp_path / "again", "push"), "label")
