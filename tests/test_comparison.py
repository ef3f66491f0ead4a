import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Images, conv_vae
from torch import nn

from workbench.comparison import (
    batches,
    copy_frame_errors,
    decode,
    encode_split,
    error_table,
    fit_floors,
    fit_predictions,
    paired_verdict,
    pca_curve,
    prediction_errors,
    reconstruction_errors,
    smoothness,
)
from workbench.datasets.clips import ClipDataset
from workbench.layers import Posterior
from workbench.metrics import mse
from workbench.models.conv_vae import ConvVAE
from workbench.provenance import file_digest

CPU = torch.device("cpu")


class Grouped(Images):
    """Images of which every three belong to one clip."""

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return super().batch(indices) | {"group": torch.as_tensor(indices) // 3}


class Linear(nn.Module):
    """decode(z) = W z, encode(x) = W^T x without variance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(48, 5)).Q)

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(x.flatten(1) @ self.weight)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return (z @ self.weight.T).reshape(len(z), 3, 4, 4)


def errors(**by_method: list[list[float]]) -> pd.DataFrame:
    """One list of samples for each group of each method."""
    return pd.DataFrame(
        {"method": method, "group": group, "mse": value}
        for method, groups in by_method.items()
        for group, values in enumerate(groups)
        for value in values
    )


# --- tables and verdicts ---


def test_the_standard_error_is_over_groups() -> None:
    """Group means 1, 4 and 10: mean 5, deviations -4, -1, 5, variance 21, standard error sqrt(21 / 3)."""
    table = error_table(errors(vae=[[0.0, 2.0], [4.0], [10.0, 10.0, 10.0]], pca=[[1.0], [1.0], [1.0]]))
    assert list(table.columns) == ["mse", "mse_se"] and list(table.index) == ["vae", "pca"]
    assert table.loc["vae", "mse"] == pytest.approx((1 + 4 + 10) / 3), "the mean is over clips"
    assert table.loc["vae", "mse_se"] == pytest.approx(math.sqrt(7))
    assert table.loc["pca", "mse_se"] == 0


def test_every_figure_has_its_standard_error() -> None:
    frame = errors(vae=[[1.0], [2.0]]).assign(psnr=[10.0, 30.0])
    table = error_table(frame)
    assert list(table.columns) == ["mse", "mse_se", "psnr", "psnr_se"]
    assert (table.loc["vae", "psnr"], table.loc["vae", "psnr_se"]) == (20.0, 10.0)


@pytest.mark.parametrize(
    ("vae", "word", "lower"),
    [
        ([0.1, 0.2, 0.3], "below", 3),
        ([0.9, 1.0, 1.1], "above", 0),
        ([0.4, 0.7, 0.3], "not distinguishable from", 2),
    ],
)
def test_the_verdict_in_words(vae: list[float], word: str, lower: int) -> None:
    """PCA is 0.5, 0.6, 0.7; differences of (0.4, 0.4, 0.4), (-0.4, -0.4, -0.4), (0.1, -0.1, 0.4)."""
    pca = [0.5, 0.6, 0.7]
    verdict = paired_verdict(errors(VAE=[[value] for value in vae], PCA=[[value] for value in pca]), "VAE", "PCA")
    gain = np.subtract(pca, vae)
    assert verdict == (
        f"mse of VAE is {word} that of PCA: {np.mean(vae):.5g} against 0.6, difference {gain.mean():+.5g} ± "
        f"{gain.std(ddof=1) / math.sqrt(3):.5g} (standard error over 3 clips), lower on {lower} of them; "
        "one training seed"
    )


def test_the_verdict_names_the_figure_and_the_unit_and_keeps_small_numbers() -> None:
    frame = errors(VAE=[[2e-6], [4e-6]], ridge=[[1e-4], [1e-4]]).rename(columns={"mse": "relative_l2"})
    assert paired_verdict(frame, "VAE", "ridge", "relative_l2", "runs") == (
        "relative_l2 of VAE is below that of ridge: 3e-06 against 0.0001, difference +9.7e-05 ± 1e-06 "
        "(standard error over 2 runs), lower on 2 of them; one training seed"
    )


def test_one_group_decides_nothing() -> None:
    frame = errors(VAE=[[1.0, 3.0]], PCA=[[5.0, 5.0]])
    assert paired_verdict(frame, "VAE", "PCA", unit="runs") == (
        "mse of VAE against PCA cannot be decided on one held-out group of runs: 2 against 5"
    )


def test_two_standard_errors_decide() -> None:
    """Differences d +- 1 over two groups have standard error 1."""
    for mean, word in (
        (2.01, "below"),
        (1.99, "not distinguishable"),
        (-1.99, "not distinguishable"),
        (-2.01, "above"),
    ):
        frame = errors(VAE=[[5.0], [5.0]], PCA=[[5.0 + mean + 1], [5.0 + mean - 1]])
        assert f"mse of VAE is {word}" in paired_verdict(frame, "VAE", "PCA")


def test_groups_are_paired_by_their_means() -> None:
    """The pairing takes out what makes a clip hard: unpaired, these two would not be distinguishable."""
    frame = errors(VAE=[[1.0, 1.0], [101.0]], PCA=[[2.0], [102.0, 102.0, 102.1]])
    assert "mse of VAE is below that of PCA" in paired_verdict(frame, "VAE", "PCA")


# --- over a split ---


def test_reconstruction_errors_are_those_of_each_sample() -> None:
    data = Grouped(7, size=16)
    frame = reconstruction_errors({"same": lambda x: x, "dark": lambda x: x - 0.5}, data, 3, CPU)
    assert list(frame.columns) == ["method", "group", "mse", "psnr", "ssim"]
    dark = frame[frame["method"] == "dark"]
    assert list(dark["group"]) == [0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_allclose(dark["mse"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(dark["psnr"], 10 * math.log10(16), rtol=1e-5)
    assert (frame[frame["method"] == "same"]["mse"] == 0).all()


def test_a_perceptual_distance_adds_its_column() -> None:
    frame = reconstruction_errors(
        {"dark": lambda x: x - 0.5},
        Grouped(4, size=16),
        3,
        CPU,
        distance=lambda a, b: (a - b).abs().flatten(1).amax(1),
    )
    np.testing.assert_allclose(frame["lpips"], 0.5, rtol=1e-5)


def test_prediction_errors_are_of_the_prepared_batch_and_the_datas_own() -> None:
    data = Grouped(7, size=16)
    numbered = lambda batch: 0 * batch["x"] + batch["id"].reshape(-1, 1, 1, 1)  # noqa: E731
    methods = {"itself": lambda batch: batch["x"], "id": numbered}
    own = lambda x_hat, x: {"most": (x_hat - x).abs().flatten(1).amax(1)}  # noqa: E731
    frame = prediction_errors(methods, data, 3, CPU, own)
    assert list(frame.columns) == ["method", "group", "most"]
    assert (frame[frame["method"] == "itself"]["most"] == 0).all()
    expected = [float((i - x).abs().max()) for i, x in enumerate(data.x)]
    np.testing.assert_allclose(frame[frame["method"] == "id"]["most"], expected, rtol=1e-6)


def test_the_pca_curve_is_that_of_the_singular_values() -> None:
    """On the samples it was fitted on, n components leave the squares of the other singular values."""
    data = Images(21)
    curve = pca_curve(data, Grouped(21), [3, 1, 20, 21, 500], lambda x_hat, x: {"error": mse(x_hat, x)}, "error")
    assert list(curve.columns) == ["components", "error"] and curve["components"].tolist() == [0, 1, 3, 20]
    singular = torch.linalg.svdvals((data.x - data.x.mean(0)).flatten(1)) ** 2
    expected = [float(singular[n:].sum()) / data.x.numel() for n in (0, 1, 3)]
    np.testing.assert_allclose(curve["error"][:3], expected, rtol=1e-3)
    assert curve["error"].iloc[3] < 1e-5


def test_the_pca_curve_is_fitted_on_the_training_samples() -> None:
    train, test = Images(20), Grouped(6, seed=5)
    curve = pca_curve(train, test, [4], lambda x_hat, x: {"error": mse(x_hat, x)}, "error")
    assert curve["error"][0] == pytest.approx(float((test.x - train.x.mean(0)).square().mean()), rel=1e-5)
    basis = torch.linalg.svd((train.x - train.x.mean(0)).flatten(1), full_matrices=False).Vh[:4]
    centred = (test.x - train.x.mean(0)).flatten(1)
    left = centred - centred @ basis.T @ basis
    assert curve["error"][1] == pytest.approx(float(left.square().mean()), rel=1e-3)


def test_floors_are_fitted_on_the_split_given() -> None:
    data = Images(30)
    pca, mean = fit_floors(data, 4, batch_size=7)
    torch.testing.assert_close(mean.mean, data.x.mean(0))
    flat = (data.x - data.x.mean(0)).flatten(1)
    expected = torch.linalg.svdvals(flat)[:4] ** 2 / 29
    torch.testing.assert_close(pca.explained_variance, expected, rtol=1e-4, atol=1e-6)


class Padded(Grouped):
    """Every second sample is of an architecture that ends before the last row, where x is 0."""

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__(n, seed)
        self.architecture = torch.arange(n) % 2
        self.mask = torch.ones_like(self.x, dtype=torch.bool)
        self.mask[self.architecture == 1, :, -1] = False
        self.x = torch.where(self.mask, self.x, 0)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        indices = np.asarray(indices)
        return super().batch(indices) | {"architecture": self.architecture[indices], "mask": self.mask[indices]}


def test_floors_of_one_architecture_are_the_usual_ones() -> None:
    data = Images(30)
    (pca, mean), floors = fit_floors(data, 4), fit_predictions(data, 4, 7, CPU)
    batch = {"x": Images(5, seed=1).x}
    torch.testing.assert_close(floors.project(batch), pca.reconstruct(batch["x"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(floors.mean(batch), mean.reconstruct(batch["x"]))
    assert floors.n_samples == 30


def test_floors_of_several_architectures_have_a_mean_for_each() -> None:
    data, test = Padded(40), Padded(6, seed=1)
    floors, batch = fit_predictions(data, 3, 7, CPU), test.batch(np.arange(6))
    means = torch.stack([data.x[data.architecture == i].mean(0) for i in (0, 1)])
    torch.testing.assert_close(floors.mean(batch), means[test.architecture])
    basis = torch.linalg.svd((data.x - means[data.architecture]).flatten(1), full_matrices=False).Vh[:3]
    rest = (test.x - means[test.architecture]).flatten(1)
    expected = means[test.architecture] + (rest @ basis.T @ basis).reshape(test.x.shape)
    torch.testing.assert_close(floors.project(batch), expected, rtol=1e-3, atol=1e-4)


def test_what_is_padded_has_no_error() -> None:
    def errors(x_hat: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        assert mask is not None
        return {"mse": torch.where(mask, x_hat - x, 0).square().flatten(1).sum(1) / mask.flatten(1).sum(1)}

    frame = prediction_errors({"one too much": lambda batch: batch["x"] + 1}, Padded(6), 4, CPU, errors)
    assert np.allclose(frame["mse"], 1)


def test_batches_cover_a_split_once_in_order() -> None:
    data = Images(7)
    parts = list(batches(data, 3, CPU))
    assert [len(part["x"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["x"] for part in parts]), data.x)


def test_encode_split_gives_the_posterior_of_every_sample() -> None:
    model, data = conv_vae(ConvVAE).eval(), Images(7)
    posterior = encode_split(model, data, 3)
    with torch.no_grad():
        expected = model.encode(data.x)
    torch.testing.assert_close(posterior.mu, expected.mu)
    torch.testing.assert_close(posterior.logvar, expected.logvar)
    plain = Images(7)
    plain.x = plain.x[:, :, :4, :4]
    assert encode_split(Linear(), plain, 3).logvar is None


def test_decode_is_without_gradients_in_float32() -> None:
    model = Linear().to(torch.bfloat16)
    x = decode(model, torch.ones(2, 5, dtype=torch.bfloat16))
    assert x.dtype == torch.float32 and not x.requires_grad


# --- paths ---


def test_the_paths_of_a_linear_decoder_are_straight() -> None:
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    frame = smoothness(Linear(), z, pairs=6, steps=9, seed=0)
    assert list(frame["method"]) == ["lerp", "slerp"] * 6
    lerp = frame[frame["method"] == "lerp"]
    np.testing.assert_allclose(lerp["ratio"], 1, rtol=1e-5)
    assert (frame[frame["method"] == "slerp"]["ratio"] > 1.001).all(), "an arc is longer than its chord"


def test_no_pair_is_measured_twice() -> None:
    """Four latents have six pairs, all of different length here; a repeated one would make the error too small."""
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).expand(4, 5)
    frame = smoothness(Linear(), z, pairs=32, steps=9, seed=0, methods=("lerp",))
    np.testing.assert_allclose(sorted((frame["ppl"] * 48 / 5) ** 0.5), [1, 2, 3, 4, 6, 7], rtol=1e-4)


def test_a_single_latent_has_no_path() -> None:
    with pytest.raises(ValueError, match="1 sample: a path needs two; hold out more samples"):
        smoothness(Linear(), torch.ones(1, 5), pairs=2, steps=5, seed=0)


def test_the_perceptual_length_of_a_straight_path_is_the_squared_distance() -> None:
    """A step is d / 8 for eight steps: its mean squared error over 48 values is |d|^2 / 64 / 48, times 8^2."""
    z = torch.stack([torch.zeros(5) + 1e-3, torch.ones(5)])
    frame = smoothness(Linear(), z, pairs=1, steps=9, seed=0)
    assert frame.loc[0, "ppl"] == pytest.approx(5 * 0.999**2 / 48, rel=1e-4)


def test_smoothness_is_a_function_of_the_seed_and_uses_the_distance() -> None:
    z = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    one, same, other = (smoothness(Linear(), z, 3, 5, seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, same)
    assert not one["ratio"].equals(other["ratio"])
    doubled = smoothness(Linear(), z, 3, 5, 0, lambda a, b: 2 * (a - b).square().flatten(1).mean(1))
    np.testing.assert_allclose(doubled["ppl"], 2 * one["ppl"], rtol=1e-5)


# --- frames copied within a clip ---


class Cut:
    """Clips of the given lengths, as much of them as `copy_frame_errors` looks at."""

    def __init__(self, *lengths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.frames = [2 * torch.rand(n, 3, 4, 4, generator=generator) - 1 for n in lengths]

    def clip(self, segment: int) -> torch.Tensor:
        return self.frames[segment]


def clip_dataset(*lengths: int) -> tuple[ClipDataset, Cut]:
    clips: Any = Cut(*lengths)
    dataset = ClipDataset.__new__(ClipDataset)
    dataset.clips, dataset.segment = clips, np.repeat(np.arange(len(lengths)), lengths)
    return dataset, clips


def test_copy_frame_errors_by_brute_force() -> None:
    dataset, clips = clip_dataset(5, 2, 7, 9)
    frame = copy_frame_errors(dataset, [1, 4, 2], max_clips=3).set_index("offset")
    assert list(frame.index) == [1, 4, 2] and list(frame.columns) == ["pairs", "mse", "psnr"]
    for offset in (1, 2, 4):
        pairs = [(x[t], x[t + offset]) for x in clips.frames[:3] for t in range(len(x) - offset)]
        squared = [float((a - b).square().mean()) for a, b in pairs]
        assert frame.loc[offset, "pairs"] == len(pairs)
        assert frame.loc[offset, "mse"] == pytest.approx(np.mean(squared), rel=1e-5)
        assert frame.loc[offset, "psnr"] == pytest.approx(np.mean([10 * math.log10(4 / e) for e in squared]), rel=1e-5)


def test_an_offset_beyond_every_clip_is_a_row_without_pairs() -> None:
    frame = copy_frame_errors(clip_dataset(5, 7)[0], [1, 7], 10).set_index("offset")
    assert frame.loc[1, "pairs"] == 10 and frame.loc[7, "pairs"] == 0 and np.isnan(frame.loc[7, "mse"])


def test_a_path_between_equal_samples_has_no_ratio() -> None:
    frame = smoothness(Linear(), torch.full((4, 5), 0.5), pairs=2, steps=5, seed=0)
    assert frame["ratio"].isna().all() and (frame["ppl"] == 0).all()


def test_equal_frames_have_a_finite_psnr() -> None:
    dataset, clips = clip_dataset(3)
    clips.frames[0][:] = 0.5
    row = copy_frame_errors(dataset, [1], 1).loc[0]
    assert row["mse"] == 0 and row["psnr"] == pytest.approx(106.02, abs=0.01)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([9, 7], "offsets=[9, 7]: the longest clip has 7 frames; choose smaller offsets"),
        ([0, 1], "offset 0: must be at least 1"),
        ([-2], "offset -2: must be at least 1"),
    ],
)
def test_an_offset_that_no_clip_allows(offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        copy_frame_errors(clip_dataset(5, 7)[0], offsets, 10)
    assert str(caught.value) == message


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    for name, content in (("a", b"weights"), ("b", b"weights"), ("c", b"weighty")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 16
