from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from action_pairs import SIZE, laq, vae, write_moving
from PIL import Image

from workbench import action_comparison
from workbench.action_comparison import (
    COPY,
    FLOOR,
    MEAN,
    cost_table,
    displacement,
    error_verdicts,
    full_pairs,
    gains,
    joined,
    one_code,
    open_pair,
    over_seeds,
    pair_errors,
    predict_pair,
    usual_code,
)
from workbench.costs import forward_gflops
from workbench.datasets.clips import ClipDataset, Clips, ClipsConfig, open_clips
from workbench.datasets.frames import DataError
from workbench.metrics import image_errors, mse

CPU = torch.device("cpu")
LENGTHS = {f"clip{i:02d}": 2 + i % 5 for i in range(24)}
OFFSET = 3
FLOORS = {COPY: lambda batch: batch["first"], MEAN: lambda batch: 0 * batch["x"]}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Frames of 24 x 20 px, to be cropped and scaled to 16."""
    return write_moving(tmp_path_factory.mktemp("clips"), LENGTHS, (24, 20))


def opened(source: Path, **values) -> Clips:
    settings = {"data": str(source), "image_size": SIZE, "pair_offset": OFFSET, "cache_dir": str(source.parent / "c")}
    return open_clips(ClipsConfig(**settings | {"val_fraction": 0.3, "test_fraction": 0.3} | values))


@pytest.fixture(scope="module")
def clips(source) -> Clips:
    return opened(source)


@pytest.fixture(scope="module")
def pairs(clips) -> ClipDataset:
    return full_pairs(clips.split("test"))


def names(dataset: ClipDataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def prepared(dataset: ClipDataset) -> dict[str, torch.Tensor]:
    return dataset.prepare(dataset.batch(range(len(dataset))))


# --- pairs ---


@pytest.mark.parametrize("stride", [1, 2])
def test_full_pairs_are_exactly_those_at_the_offset(source, stride) -> None:
    clips = opened(source, frame_stride=stride)
    for split in ("train", "val", "test"):
        dataset = clips.split(split)
        full = full_pairs(dataset)
        there = dict.fromkeys(name.split("/")[0] for name in names(dataset))
        whole = [f"{c}/{n}->{n + OFFSET}" for c in there for n in range(1, LENGTHS[c] - OFFSET + 1, stride)]
        assert names(full) == whole and 0 < len(whole) < len(dataset)
        assert torch.equal(prepared(full)["id"], prepared(dataset)["id"][[name in whole for name in names(dataset)]])


def test_pairs_that_a_clips_end_has_shortened_are_no_full_pairs(source, clips) -> None:
    dataset = clips.split("test")
    short = dataset.slots[:, 1] - dataset.slots[:, 0] < OFFSET
    shortened = ClipDataset(clips, dataset.slots[short], dataset.segment[short])
    with pytest.raises(DataError) as error:
        full_pairs(shortened)
    assert str(error.value) == (
        f"pair_offset=3: none of {short.sum()} held-out pairs is so many frames apart, as these clips are shorter; "
        "choose a smaller pair_offset, or hold out more clips"
    )
    with pytest.raises(DataError, match="^pair_offset=0: these are single frames, not pairs; choose a pair_offset of"):
        full_pairs(opened(source, pair_offset=0).split("test"))


def test_joined_splits_hold_the_samples_of_both(clips) -> None:
    one, other = full_pairs(clips.split("val")), full_pairs(clips.split("test"))
    both = joined(one, other)
    assert names(both) == names(one) + names(other)
    for key, values in prepared(both).items():
        assert torch.equal(values, torch.cat([prepared(one)[key], prepared(other)[key]])), key


def test_displacement_is_the_difference_of_the_conditions_in_their_file(source, pairs) -> None:
    known = pd.read_csv(source / "conditions.csv").set_index(["clip", "frame"])
    ends = [(clip, *map(int, frames.split("->"))) for clip, frames in (name.split("/") for name in names(pairs))]
    for columns in (["x"], ["height", "x"]):
        expected = [(known.loc[(c, last), columns] - known.loc[(c, first), columns]) for c, first, last in ends]
        np.testing.assert_allclose(displacement(pairs, columns), np.array(expected), atol=1e-5)


def test_unknown_conditions_are_refused_by_name(tmp_path, source, pairs) -> None:
    with pytest.raises(DataError) as error:
        displacement(pairs, ["x", "angle", "y"])
    assert str(error.value) == "displacement=['angle', 'y']: the conditions are x, height; choose among them"
    write_moving(tmp_path / "plain", {f"c{i}": 4 for i in range(3)})
    (tmp_path / "plain" / "conditions.csv").unlink()
    plain = opened(tmp_path / "plain", val_fraction=0.0, test_fraction=0.0).split("train")
    with pytest.raises(DataError, match=r"displacement=\['x'\]: the conditions are none"):
        displacement(plain, ["x"])


# --- a pair of files ---


def files_of(source: Path, name: str) -> list[Path]:
    clip, frames = name.split("/")
    return [source / clip / f"img_{int(number):05d}.png" for number in frames.split("->")]


def test_a_pair_of_files_is_cropped_and_scaled_as_clips_are(source, pairs) -> None:
    for i in (0, len(pairs) - 1):
        first, second = files_of(source, pairs.name(i))
        found, there = open_pair(first, str(second), SIZE, False), pairs[i]
        assert set(found) == {"first", "x"} and found["x"].shape == (1, 3, SIZE, SIZE)
        assert torch.equal(found["first"][0], there["first"]) and torch.equal(found["x"][0], there["x"])
        assert not torch.equal(found["first"], found["x"])


def test_small_files_are_enlarged_where_that_is_allowed(source, tmp_path) -> None:
    Image.new("RGB", (8, 9), (255, 0, 51)).save(tmp_path / "small.png")
    pair = open_pair(tmp_path / "small.png", tmp_path / "small.png", SIZE, True)
    torch.testing.assert_close(pair["x"], torch.tensor([1, -1, -0.6]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.png", "does not decode: No such file or directory"),
        ("empty.png", r"empty file \(0 bytes\)"),
        ("cut.png", "does not decode: .*truncated"),
        ("text.png", r"does not decode: not an image \(JPEG, PNG, BMP, WEBP\)"),
        ("small.png", "is 8x9 px, below image_size=16: choose image_size of at most 8, or set allow_upscale: true"),
        (".", "does not decode: Is a directory"),
    ],
)
def test_files_that_are_no_frames_are_refused_with_their_path(source, tmp_path, name, reason) -> None:
    good = source / "clip00" / "img_00001.png"
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "text.png").write_text("clip,frame\n")
    Image.new("RGB", (8, 9)).save(tmp_path / "small.png")
    for pair in ((tmp_path / name, good), (good, tmp_path / name)):
        with pytest.raises(DataError, match=f"^{tmp_path / name}: {reason}.*; give another image file$"):
            open_pair(*pair, SIZE, False)


@torch.inference_mode()
def test_each_model_and_floor_predicts_a_pair(source, pairs) -> None:
    models, pair = [laq(), vae()], open_pair(*files_of(source, pairs.name(0)), SIZE, False)
    predictions, table = predict_pair(models, FLOORS, pair, CPU)
    assert list(predictions) == list(table.index) == ["LAQ", "VAE", COPY, MEAN]
    expected = {"LAQ": models[0].model(pair["first"], pair["x"]), "VAE": models[1].model(pair["x"])}
    expected = {name: x_hat.clamp(-1, 1) for name, x_hat in expected.items()} | {
        COPY: pair["first"],
        MEAN: 0 * pair["x"],
    }
    for name, x_hat in expected.items():
        torch.testing.assert_close(predictions[name], x_hat)
        errors = {figure: float(value) for figure, value in image_errors(x_hat, pair["x"]).items()}
        assert table.loc[name].to_dict() == pytest.approx(errors, rel=1e-4)
    assert list(table) == ["mse", "psnr", "ssim"]


# --- errors ---


def test_errors_of_every_model_seed_and_floor_stand_in_one_table(pairs) -> None:
    models = [laq(), laq(seed=1), vae()]
    errors = pair_errors(models, FLOORS, pairs, 5, CPU, lambda a, b: (a - b).abs().flatten(1).amax(1))
    assert list(errors) == ["name", "seed", "group", "mse", "psnr", "ssim", "lpips"]
    batch, found = prepared(pairs), {key: part for key, part in errors.groupby(["name", "seed"])}
    methods = {(r.name, r.seed): r.predict for r in models} | {(name, FLOOR): floor for name, floor in FLOORS.items()}
    others = {(one_code("LAQ"), 0), (one_code("LAQ"), 1)}
    assert set(found) == set(methods) | others and len(errors) == 7 * len(pairs)
    with torch.inference_mode():
        for key, predict in methods.items():
            x_hat, part = predict(batch), found[key]
            assert part["group"].tolist() == batch["group"].tolist()
            np.testing.assert_allclose(part["mse"], mse(x_hat, batch["x"]), rtol=1e-4)
            np.testing.assert_allclose(part["lpips"], (x_hat - batch["x"]).abs().flatten(1).amax(1), rtol=1e-4)
    assert not np.allclose(found["LAQ", 0]["mse"], found["LAQ", 1]["mse"], rtol=1e-3)


def test_latent_actions_are_there_again_under_one_code_for_all_pairs(pairs) -> None:
    """The most frequent word, or the mean action; the batches do not matter."""
    models = [laq(), laq("LAQ continuous", "continuous", seed=3), vae()]
    errors, n = pair_errors(models, {}, pairs, 5, CPU).set_index(["name", "seed"]), len(pairs)
    batch, names = prepared(pairs), ["LAQ", "LAQ continuous", "VAE"]
    assert list(dict.fromkeys(errors.index.get_level_values(0))) == [*names, *map(one_code, names[:2])]
    for rival in models[:2]:
        with torch.inference_mode():
            action = rival.model.encode(batch["first"], batch["x"])
            code = usual_code(rival, pairs, 5)
            if action.indices is None:
                torch.testing.assert_close(code, action.mu.mean(0))
            else:
                same = (action.indices[:, None] == action.indices).all(-1).sum(1)
                assert (action.indices == code).all(-1).sum() == same.max()
            x_hat = rival.model.decode(batch["first"], code.expand(n, *code.shape)).clamp(-1, 1)
        found = errors.loc[(one_code(rival.name), rival.seed), "mse"]
        np.testing.assert_allclose(found, mse(x_hat, batch["x"]), rtol=1e-4)
        assert not np.allclose(found, errors.loc[(rival.name, rival.seed), "mse"], rtol=1e-4)


def test_the_copy_of_an_identical_frame_is_exact(clips, pairs) -> None:
    still = ClipDataset(clips, pairs.slots[:, [1, 1]], pairs.segment)
    errors = pair_errors([], {COPY: FLOORS[COPY]}, still, 5, CPU)
    assert (errors["mse"] == 0).all() and np.isinf(errors["psnr"]).all()
    np.testing.assert_allclose(errors["ssim"], 1, atol=1e-6)


def rows(name: str, **by_seed: list[list[float]]) -> pd.DataFrame:
    """Errors of a name: for each seed (`s0`), one list of samples for each clip."""
    return pd.DataFrame(
        {"name": name, "seed": int(seed[1:]), "group": group, "mse": value}
        for seed, groups in by_seed.items()
        for group, values in enumerate(groups)
        for value in values
    )


def test_means_over_clips_and_seeds_by_hand() -> None:
    """Clip means of seed 0 are 1 and 4, of seed 1 they are 3 and 8; over the seeds 2 and 6; of the seeds 2.5 and 5.5.

    The mean of 2 and 6 is 4, its standard error sqrt(8) / sqrt(2) = 2; the deviation of 2.5 and 5.5 is 3 / sqrt(2).
    """
    model = rows("LAQ", s0=[[1.0], [2.0, 4.0, 6.0]], s1=[[3.0], [8.0, 8.0, 8.0]])
    floor = rows(COPY, s0=[[7.0], [7.0, 8.0, 9.0]])
    table = over_seeds(pd.concat([model, floor]).assign(psnr=10.0))
    assert list(table) == ["mse", "mse_se", "mse_sd", "psnr", "psnr_se", "psnr_sd", "seeds"]
    assert list(table.index) == ["LAQ", COPY] and table["seeds"].tolist() == [2, 1]
    assert table.loc["LAQ", ["mse", "mse_se", "mse_sd"]].tolist() == pytest.approx([4, 2, 3 / np.sqrt(2)])
    assert table.loc[COPY, ["mse", "mse_se"]].tolist() == pytest.approx([7.5, 0.5])
    assert np.isnan(table.loc[COPY, "mse_sd"])
    assert table.loc["LAQ", ["psnr", "psnr_se", "psnr_sd"]].tolist() == [10, 0, 0]


def test_half_the_error_is_a_gain_of_3_db() -> None:
    floor = rows(COPY, s0=[[0.2], [0.4, 0.1, 0.3], [0.5]]).assign(seed=FLOOR)
    model = pd.concat([floor.assign(name="LAQ", seed=seed, mse=floor["mse"] / 2**seed) for seed in (1, 2)])
    found = gains(pd.concat([model, floor]), "LAQ", COPY)
    assert list(found) == [1, 2]
    for seed, gain in found.items():
        assert gain.db == pytest.approx(10 * seed * np.log10(2)) and gain.n_groups == 3
        assert gain.share == 1 and gain.error == pytest.approx(0, abs=1e-9)


def test_only_the_same_seeds_of_two_models_are_compared() -> None:
    """Each seed of the model errs half as much as the same seed of the other, a hundred times less than the next."""
    other = pd.concat([rows("other", s0=[[0.1], [0.3]]), rows("other", s1=[[10.0], [30.0]])])
    model = pd.concat([other, rows("other", s2=[[7.0], [9.0]])]).assign(name="LAQ")
    found = gains(pd.concat([other, model.assign(mse=model["mse"] / 2)]), "LAQ", "other")
    assert {seed: gain.db for seed, gain in found.items()} == pytest.approx(dict.fromkeys([0, 1], 10 * np.log10(2)))


def test_verdicts_on_errors_hold_their_numbers() -> None:
    """Of two seeds with a half and a fifth of copy-frame's error: +3.0 and +7.0 dB, on average +5.0.

    With one code for all they err twice and ten times as much as with their own: +3.0 and +10.0 dB.
    """
    copy = rows(COPY, s0=[[0.2], [0.4, 0.1], [0.5]]).assign(seed=FLOOR)
    shares = {
        ("LAQ", 0): 0.5,
        ("LAQ", 1): 0.2,
        ("LAQ continuous", 0): 0.1,
        (one_code("LAQ"), 0): 1,
        (one_code("LAQ"), 1): 2,
        (one_code("LAQ continuous"), 0): 0.1,
        ("VAE", 0): 1,
        (MEAN, FLOOR): 10,
        ("PCA-4", FLOOR): 0.1,
    }
    others = [copy.assign(name=name, seed=seed, mse=share * copy["mse"]) for (name, seed), share in shares.items()]
    models = [laq(), laq(seed=1), laq("LAQ continuous", "continuous"), vae()]
    assert error_verdicts(pd.concat([copy, *others]), models, "PCA-4") == {
        "Does LAQ beat copy-frame?": "LAQ beats copy-frame by 5.0 dB (2 of 2 seeds; 3 clips)",
        "Does LAQ beat mean frame?": "LAQ beats mean frame by 15.0 dB (2 of 2 seeds; 3 clips)",
        "Does LAQ continuous beat copy-frame?": "LAQ continuous beats copy-frame by 10.0 dB (1 of 1 seeds; 3 clips)",
        "Does LAQ continuous beat mean frame?": "LAQ continuous beats mean frame by 20.0 dB (1 of 1 seeds; 3 clips)",
        "Does VAE beat PCA-4?": "VAE falls short of PCA-4 by 10.0 dB (1 of 1 seeds; 3 clips)",
        "What does the code of LAQ add?": "LAQ beats itself with one code for all by 6.5 dB (2 of 2 seeds; 3 clips)",
        "What does the code of LAQ continuous add?": (
            "LAQ continuous is not distinguishable from itself with one code for all: +0.0 dB "
            "(ahead in 0 of 1 seeds; 3 clips)"
        ),
        "What does quantising the action cost?": (
            "LAQ falls short of a continuous latent action by 7.0 dB (1 of 1 seeds; 3 clips)"
        ),
    }
    alone = error_verdicts(pd.concat([copy, *others]), models[:2], "PCA-4")
    assert list(alone) == [question for question in alone if " LAQ " in question] and len(alone) == 3


def test_memory_of_a_batch_that_does_not_fit_is_unknown(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training went on in smaller pieces; another error is not hidden."""

    def fails(error: RuntimeError):
        def step(*given: object) -> float:
            raise error

        return step

    monkeypatch.setattr(action_comparison, "step_memory_mb", fails(torch.OutOfMemoryError("CUDA out of memory.")))
    table = cost_table([laq()], pairs, {"batch_size": 4})
    assert np.isnan(table.loc["LAQ", "memory_mb"]) and table.loc["LAQ", "gflops"] > 0
    monkeypatch.setattr(action_comparison, "step_memory_mb", fails(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        cost_table([laq()], pairs, {"batch_size": 4})


def test_costs_are_of_the_first_seed_and_unknown_ones_are_nan(pairs) -> None:
    models = [laq(samples=1200, seconds=8.0), laq(seed=1, samples=1200, seconds=1.0), vae()]
    table = cost_table(models, pairs, {"batch_size": 4, "kl_weight": 1e-3, "precision": "fp32"})
    assert list(table) == ["parameters", "gflops", "memory_mb", "training_samples", "samples_per_s", "seconds"]
    assert list(table.index) == ["LAQ", "VAE"]
    assert table.loc["LAQ", ["training_samples", "samples_per_s", "seconds"]].tolist() == [1200, 150, 8]
    assert table.loc["VAE", ["training_samples", "samples_per_s", "seconds"]].isna().all(), "a loaded file has no log"
    batch = pairs.prepare(pairs.batch(range(4)))
    for rival in (models[0], models[2]):
        count = sum(p.numel() for p in rival.model.parameters())
        row = table.loc[rival.name]
        assert row["parameters"] == count and row["gflops"] == pytest.approx(forward_gflops(rival.predict, batch))
        assert row["memory_mb"] > 4 * 4 * count / 1e6, "weights, gradients and two moments in float32"
        assert not rival.model.training and all(p.grad is None for p in rival.model.parameters())
