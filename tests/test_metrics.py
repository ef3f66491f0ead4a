import math

import pytest
import torch
from sklearn.decomposition import PCA as ExactPCA

from workbench.interpolation import lerp
from workbench.metrics import (
    active_units,
    collapse_verdict,
    field_errors,
    fit_mean,
    fit_pca,
    image_errors,
    kl_per_dimension,
    mse,
    path_length_ratio,
    perceptual_path_length,
)

SHAPE = (3, 6, 8)
REFUSED = (ValueError, TypeError)  # TypeError from the shape checks that run in tests


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int) -> torch.Tensor:
    """Samples with a decaying spectrum, as images have, off centre, in one fixed basis."""
    d = math.prod(SHAPE)
    basis = torch.linalg.qr(random(d, d, seed=99)).Q
    scales = torch.arange(1, d + 1) ** -1.0
    return (0.3 + random(n, d, seed=seed) * scales @ basis).reshape(n, *SHAPE)


# --- errors of reconstructions ---


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize(("level", "offset"), [(0.5, 0.2), (-0.1, 0.2), (-0.9, 0.02)])
def test_image_errors_of_a_constant_offset_have_a_closed_form(b: int, level: float, offset: float) -> None:
    x = torch.full((b, 3, 16, 12), level)
    errors = image_errors(x + offset, x)
    c1 = (0.01 * 2) ** 2  # the constant of SSIM's luminance term for a data range of 2
    one, other = level + 1, level + offset + 1
    expected = {
        "mse": offset**2,
        "psnr": 10 * math.log10(4 / offset**2),
        "ssim": (2 * one * other + c1) / (one**2 + other**2 + c1),
    }
    assert list(errors) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(errors[name], torch.full((b,), value), rtol=2e-4, atol=2e-4)


def test_image_errors_are_per_sample() -> None:
    x = random(4, 1, 16, 16).clamp(-1, 1)
    scale = torch.tensor([0.0, 0.1, 0.2, 0.4])
    errors = image_errors(x + scale[:, None, None, None] * random(4, 1, 16, 16, seed=1), x)
    assert errors["mse"][0] == 0 and errors["psnr"][0] == torch.inf
    assert errors["ssim"][0] == pytest.approx(1, abs=1e-5)
    assert (errors["mse"].diff() > 0).all()
    assert (errors["psnr"].diff() < 0).all() and (errors["ssim"].diff() < 0).all()
    for i in range(4):
        alone = image_errors(x[i : i + 1] + scale[i] * random(4, 1, 16, 16, seed=1)[i : i + 1], x[i : i + 1])
        assert all(torch.allclose(alone[name][0], errors[name][i], atol=1e-5) for name in errors)


def test_image_errors_refuses_images_below_the_window() -> None:
    assert image_errors(torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11))["ssim"] == 1
    with pytest.raises(ValueError, match="images of 10 x 32 px: SSIM needs at least 11 x 11 px"):
        image_errors(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))


def test_errors_refuse_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"x_hat of shape \(2, 1\) and x of shape \(2, 3\)"):
        mse(torch.zeros(2, 1), torch.zeros(2, 3))
    with pytest.raises(REFUSED):
        image_errors(torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16))


# --- errors of fields ---


def test_field_errors_of_a_scaled_field_have_a_closed_form() -> None:
    field = random(3, 4, 5, 2)
    factor = torch.tensor([1.1, 0.5, 1.0]).reshape(3, 1, 1, 1)
    errors = field_errors(factor * field, field)
    size = (factor.flatten() - 1).abs()
    assert list(errors) == ["relative_l2", "mse", "mae"]
    torch.testing.assert_close(errors["relative_l2"], size)
    torch.testing.assert_close(errors["mse"], size**2 * field.square().mean((1, 2, 3)))
    torch.testing.assert_close(errors["mae"], size * field.abs().mean((1, 2, 3)))


def test_field_errors_of_an_offset_are_in_the_unit_and_its_square() -> None:
    errors = field_errors(torch.full((2, 3, 4), 13.0), torch.full((2, 3, 4), 10.0))
    for name, expected in {"relative_l2": 0.3, "mse": 9.0, "mae": 3.0}.items():
        torch.testing.assert_close(errors[name], torch.full((2,), expected))


def test_the_relative_error_of_a_field_of_zeros_is_zero_or_infinite_and_nan_stays() -> None:
    field = torch.zeros(3, 2, 2)
    predicted = field.clone()
    predicted[1], predicted[2, 0, 0] = 1e-3, torch.nan
    relative = field_errors(predicted, field)["relative_l2"]
    assert relative[0] == 0 and relative[1] == torch.inf and relative[2].isnan()


def test_field_errors_refuse_fields_of_other_shapes() -> None:
    with pytest.raises(REFUSED):
        field_errors(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


# --- floors ---


def test_mean_floor_is_the_mean_over_uneven_batches() -> None:
    x = images(50, seed=1)
    floor = fit_mean(x.split(16))
    assert floor.n_samples == 50 and floor.mean.dtype == x.dtype
    torch.testing.assert_close(floor.mean, x.double().mean(0).float(), rtol=0, atol=1e-7)
    assert torch.equal(floor.reconstruct(x[:7]), floor.mean.repeat(7, 1, 1, 1))


def test_mean_floor_errors() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        fit_mean([])
    with pytest.raises(ValueError, match=r"samples of shape \(3, 6, 8\): the floor was fitted on \(1, 6, 8\)"):
        fit_mean([torch.zeros(4, 1, 6, 8)]).reconstruct(torch.zeros(4, *SHAPE))


@pytest.mark.parametrize("n_components", [1, 16])
def test_pca_agrees_with_the_full_decomposition(n_components: int) -> None:
    train, held_out = images(400, seed=1), images(100, seed=2)
    pca = fit_pca(lambda: train.split(64), n_components)
    exact = ExactPCA(n_components, svd_solver="full").fit(train.double().flatten(1).numpy())

    def exact_mse(x: torch.Tensor) -> float:
        flat = x.double().flatten(1).numpy()
        return float(((exact.inverse_transform(exact.transform(flat)) - flat) ** 2).mean())

    ours = {name: mse(pca.reconstruct(x), x).mean().item() for name, x in (("train", train), ("test", held_out))}
    assert ours["test"] == pytest.approx(exact_mse(held_out), rel=1e-3)
    assert exact_mse(train) * (1 - 1e-5) <= ours["train"] <= exact_mse(train) * (1 + 1e-3)
    torch.testing.assert_close(
        pca.explained_variance.double(), torch.from_numpy(exact.explained_variance_), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(n_components), atol=1e-5, rtol=0)
    assert 0 <= pca.last_gain < 1e-4


def test_pca_encodes_and_decodes_in_the_shape_of_a_sample() -> None:
    x = images(200, seed=1)
    pca = fit_pca(lambda: x.split(64), 5)
    z = pca.encode(x)
    assert z.shape == (200, 5) and pca.decode(z).shape == x.shape
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.T.cov(), pca.explained_variance.diag(), atol=1e-4, rtol=0)
    torch.testing.assert_close(pca.encode(pca.decode(z)), z, atol=1e-5, rtol=1e-4)


def test_pca_of_every_component_is_exact_and_depends_on_no_batch_size() -> None:
    x = random(40, 12)
    pca = fit_pca(lambda: [x], 12)
    torch.testing.assert_close(pca.reconstruct(x), x, atol=1e-5, rtol=0)
    again = fit_pca(lambda: x.split(7), 12)
    torch.testing.assert_close(again.explained_variance, pca.explained_variance)


def test_pca_of_samples_without_variance_is_their_mean() -> None:
    x = torch.ones(5, 4)
    pca = fit_pca(lambda: [x], 2)
    assert pca.last_gain == 0 and torch.allclose(pca.reconstruct(x), x)


def test_pca_reads_the_data_twice_more_than_it_iterates() -> None:
    calls = []
    fit_pca(lambda: calls.append(1) or [random(20, 6)], 2, iterations=3)
    assert len(calls) == 5


@pytest.mark.parametrize("n_components", [0, 7, 21])
def test_pca_refuses_more_components_than_the_data_have(n_components: int) -> None:
    with pytest.raises(ValueError, match=f"n_components={n_components}: must be from 1 to 6, the smaller of 20"):
        fit_pca(lambda: [random(20, 6)], n_components)


def test_pca_refuses_batches_that_cannot_be_read_again_and_other_shapes() -> None:
    used_up = iter([random(20, 6)])
    with pytest.raises(ValueError, match="make_batches gave 20 samples, then 0"):
        fit_pca(lambda: used_up, 2)
    with pytest.raises(ValueError, match="iterations=0: must be at least 1"):
        fit_pca(lambda: [random(20, 6)], 2, iterations=0)
    with pytest.raises(ValueError, match="fitted on"):
        fit_pca(lambda: [random(20, 6)], 2).encode(torch.zeros(3, 1))


# --- latent diagnostics ---


def test_kl_per_dimension_agrees_with_torch_distributions() -> None:
    mu, logvar = random(64, 5), random(64, 5, seed=1)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_dimension(mu, logvar), expected)
    assert torch.equal(kl_per_dimension(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(3))
    assert torch.equal(kl_per_dimension(torch.ones(2, 1), torch.zeros(2, 1)), torch.tensor([0.5]))


def test_active_units_counts_variances_above_the_threshold() -> None:
    mu = torch.tensor([[1.0], [-1.0]]) * torch.tensor([0.0, 0.05, 0.1, 2.0])  # variances 0, 0.005, 0.02, 8
    assert active_units(mu + 5) == 2
    assert active_units(mu, threshold=0.001) == 3
    assert active_units(mu, threshold=10.0) == 0
    with pytest.raises(ValueError, match="mu holds 1 samples: must be at least 2"):
        active_units(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("active", "word"),
    [(0, "collapsed"), (1, "partly collapsed"), (7, "partly collapsed"), (8, "not collapsed")],
)
def test_collapse_verdict_says_it_in_words(active: int, word: str) -> None:
    mu = torch.zeros(2, 32)
    mu[:, :active] = torch.tensor([[1.0], [-1.0]])  # KL 0.5 nats in each active dimension
    expected = f"{word}: {active} of 32 latent dimensions active (variance of mu above 0.01)"
    assert collapse_verdict(mu, torch.zeros(2, 32)) == f"{expected}; total KL {active / 2:.1f} nats"
    assert collapse_verdict(mu, None) == f"{expected}; no KL, the encoder is deterministic"


# --- paths ---


def test_path_length_ratio_of_known_curves() -> None:
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert path_length_ratio(corner).item() == pytest.approx(math.sqrt(2))
    assert path_length_ratio(torch.stack([angle.cos(), angle.sin()], 1)).item() == pytest.approx(math.pi / 2, rel=1e-6)


def test_path_length_ratio_of_a_linear_decoder_is_one() -> None:
    z = lerp(random(8), random(8, seed=1), torch.linspace(0, 1, 20))
    path = (z @ random(8, 48, seed=2)).reshape(20, 3, 4, 4)
    assert path_length_ratio(path).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("path", [torch.zeros(5, 2), torch.tensor([[0.0], [1.0], [0.0]])])
def test_path_length_ratio_refuses_equal_ends(path: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needs ends that differ"):
        path_length_ratio(path)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_perceptual_path_length_of_a_straight_path_is_the_error_between_its_ends(steps: int) -> None:
    a, b = random(12), random(12, seed=1)
    path = lerp(a, b, torch.linspace(0, 1, steps))
    assert perceptual_path_length(path).item() == pytest.approx((b - a).square().mean().item(), rel=1e-4)


def test_perceptual_path_length_takes_any_distance_between_neighbours() -> None:
    path = torch.tensor([[0.0], [1.0], [3.0]])
    length = perceptual_path_length(path, lambda x, y: (y - x).abs().flatten(1).sum(1))
    assert length.item() == (1 + 2) / 2 * 2**2


@pytest.mark.parametrize("measure", [path_length_ratio, perceptual_path_length])
def test_a_path_needs_two_samples(measure) -> None:
    with pytest.raises(ValueError, match="a path of 1 samples: must have at least 2"):
        measure(torch.zeros(1, 3))
