from typing import Any

import pytest
import torch
from torch import nn

from workbench.config import ConfigError
from workbench.losses import ERRORS, huber, mean_absolute_error, mean_squared_error, smooth_l1
from workbench.models.conditioners import MLPConditioner, MLPConditionerConfig
from workbench.models.enhanced_losses import (
    PRESETS,
    Enhancement,
    FeatureNetworks,
    augment_condition,
    consistency,
    enhancement,
)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the errors that a robust loss is made of ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", (0.05**2 + 0.5**2 + 0 + 3**2) / 4),
        ("mae", (0.05 + 0.5 + 0 + 3) / 4),
        ("huber", (0.05**2 / 2 + 0.5**2 / 2 + 0 + (3 - 0.5)) / 4),
        ("smooth_l1", (5 * 0.05**2 + (0.5 - 0.05) + 0 + (3 - 0.05)) / 4),
    ],
)
def test_errors_in_closed_form(name: str, expected: float) -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    x_hat = x + torch.tensor([[0.05, -0.5], [0.0, 3.0]])
    assert ERRORS[name](x_hat, x).item() == pytest.approx(expected, rel=1e-5)


def test_errors_are_known_by_name_and_computed_in_float32() -> None:
    assert ERRORS == {"mse": mean_squared_error, "mae": mean_absolute_error, "smooth_l1": smooth_l1, "huber": huber}
    x = torch.zeros(2, 3000)
    for error in ERRORS.values():
        value = error((x + 0.5).to(torch.bfloat16), x)
        assert value.dtype == torch.float32 and value == error(x + 0.5, x)


@pytest.mark.parametrize(("error", "bend"), [(huber, 1.0), (smooth_l1, 0.1)])
def test_gradient_is_continuous_at_the_bend_and_one_beyond(error: Any, bend: float) -> None:
    for e, slope in ((0.5 * bend, 0.5), (bend * 0.999, 0.999), (bend * 1.001, 1.0), (5 * bend, 1.0)):
        x_hat = torch.tensor([e], requires_grad=True)
        assert torch.autograd.grad(error(x_hat, torch.zeros(1)), x_hat)[0].item() == pytest.approx(slope, rel=1e-4)


# --- perceptual ---


@pytest.mark.parametrize("hier_dim", [0, 6])
def test_equal_codes_have_no_perceptual_distance(hier_dim: int) -> None:
    networks, codes = FeatureNetworks(4, hier_dim), seeded(5, 4 + hier_dim)
    codes[0] = 0
    assert networks(codes, codes).abs() < 1e-6
    assert networks(codes, seeded(5, 4 + hier_dim, seed=1)) > 0.05


def test_perceptual_distance_by_hand() -> None:
    """Mean over two depths and the batch, the parts added."""
    networks = FeatureNetworks(4, 6, width=8).double()
    pred, target = seeded(5, 10).double(), seeded(5, 10, seed=1).double()
    total = 0.0
    for i, part in enumerate((slice(0, 4), slice(4, 10))):
        a, b, similarities = pred[:, part], target[:, part], []
        for layer in range(2):
            weight, bias = getattr(networks, f"weight_{i}_{layer}"), getattr(networks, f"bias_{i}_{layer}")
            a, b = (nn.functional.gelu(h @ weight.T + bias) for h in (a, b))
            similarities.append(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
        total += 1 - (similarities[0] + similarities[1]) / 2
    torch.testing.assert_close(networks(pred, target), total)


def test_perceptual_gradient_equals_a_finite_difference_and_spares_the_target() -> None:
    networks = FeatureNetworks(4, 6).double()
    pred, target = seeded(5, 10).double().requires_grad_(), seeded(5, 10, seed=1).double().requires_grad_()
    networks(pred, target).backward()
    assert target.grad is None and pred.grad.norm() > 1e-3
    direction, step = seeded(5, 10, seed=2).double(), 1e-6
    with torch.no_grad():
        rise = networks(pred + step * direction, target) - networks(pred - step * direction, target)
    torch.testing.assert_close((pred.grad * direction).sum(), rise / (2 * step), rtol=1e-6, atol=0)


def test_feature_networks_are_frozen_and_in_no_state_dict() -> None:
    networks = FeatureNetworks(4, 6)
    assert list(networks.parameters()) == [] and networks.state_dict() == {}
    assert not any(buffer.requires_grad for buffer in networks.buffers())
    conditioner = MLPConditioner(MLPConditionerConfig(main_dim=4, hier_dim=6, width=8))
    before = list(conditioner.state_dict())
    conditioner.perceptual = networks
    assert list(conditioner.state_dict()) == before


def test_feature_networks_are_a_function_of_seed_and_sizes() -> None:
    pred, target = seeded(5, 10), seeded(5, 10, seed=1)
    before = torch.get_rng_state()
    first = FeatureNetworks(4, 6)(pred, target)
    assert torch.equal(before, torch.get_rng_state()), "the default generator was used"
    torch.manual_seed(7)
    assert FeatureNetworks(4, 6)(pred, target) == first
    assert FeatureNetworks(4, 6, seed=1)(pred, target) != first


@pytest.mark.parametrize(("dim", "width"), [(4, 8), (12, 8)])
def test_feature_networks_are_orthogonal(dim: int, width: int) -> None:
    networks = FeatureNetworks(dim, width=width)
    for weight in (networks.weight_0_0, networks.weight_0_1):
        singular = torch.linalg.svdvals(weight)
        torch.testing.assert_close(singular, torch.ones_like(singular))


def test_perceptual_distance_is_not_taken_in_half_precision() -> None:
    networks, codes = FeatureNetworks(4, 6), seeded(5, 10)
    expected = networks(codes + 0.01, codes)
    exact = FeatureNetworks(4, 6).double()(codes.double() + 0.01, codes.double())
    assert expected.item() == pytest.approx(exact.item(), rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert networks(codes + 0.01, codes) == expected


def test_codes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 9 values: these networks were built for 10"):
        FeatureNetworks(4, 6)(seeded(5, 9), seeded(5, 9))


# --- consistency ---


def test_consistency_in_closed_form() -> None:
    pred = torch.tensor([[1.0, 2.0]], requires_grad=True)
    augmented = torch.tensor([[1.0, 5.0]], requires_grad=True)
    value = consistency(pred, augmented, temperature=2.0)
    assert value.item() == pytest.approx((3 / 2) ** 2 / 2)
    value.backward()
    assert pred.grad is None
    torch.testing.assert_close(augmented.grad, torch.tensor([[0.0, 2 * 3 / 2**2 / 2]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature=.*: must be more than 0"):
        consistency(seeded(2, 3), seeded(2, 3), temperature)


@pytest.mark.parametrize("shape", [(4000, 2), (50, 2, 16, 16)])
def test_noise_is_in_units_of_each_column_or_channel(shape: tuple[int, ...]) -> None:
    condition, std = torch.zeros(shape), torch.tensor([2.0, 300.0])
    torch.manual_seed(0)
    noisy = augment_condition(condition, 0.1, std)
    torch.manual_seed(0)
    assert torch.equal(noisy, augment_condition(condition, 0.1, std))
    assert not torch.equal(noisy, augment_condition(condition, 0.1, std))
    axes = [axis for axis in range(len(shape)) if axis != 1]
    torch.testing.assert_close(noisy.std(axes), 0.1 * std, rtol=0.05, atol=0)
    assert torch.equal(augment_condition(condition + 1, 0.0, std), condition + 1)
    state = torch.get_rng_state()
    drawn = [augment_condition(condition, 0.1, std, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], condition) and torch.equal(torch.get_rng_state(), state)


# --- presets ---


def test_presets_as_published() -> None:
    assert list(PRESETS) == ["none", "balanced", "robust", "semantic", "fast", "small_dataset"]
    assert enhancement("none") == Enhancement() == Enhancement(mse_weight=1.0)
    assert enhancement("balanced") == Enhancement(
        mse_weight=1.0, mae_weight=0.1, huber_weight=0.05, perceptual_weight=0.1, consistency_weight=0.1
    )
    assert enhancement("fast").perceptual_weight == enhancement("fast").consistency_weight == 0
    assert all(weights["mse_weight"] == 1 for weights in PRESETS.values())


@pytest.mark.parametrize("name", Enhancement.model_fields)
def test_every_weight_of_a_preset_can_be_replaced(name: str) -> None:
    replaced = enhancement("robust", **{name: 0.7}).model_dump()
    assert replaced == enhancement("robust").model_dump() | {name: 0.7}
    assert enhancement("robust", **{name: -1.0}) == enhancement("robust")
    assert getattr(enhancement("robust", **{name: 0.0}), name) == 0


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("robst", {}, "preset='robst': did you mean 'robust'?"),
        ("", {}, "preset='': must be one of none, balanced, robust, semantic, fast, small_dataset"),
        (
            "fast",
            {"mae_weight": -0.5},
            "mae_weight=-0.5: must be at least 0, or -1.0 for the weight of preset 'fast'",
        ),
        ("fast", {"maeweight": -1.0}, "unknown weight 'maeweight': did you mean 'mae_weight'?"),
        ("fast", {"mae_weight": float("nan")}, "mae_weight=nan: must be finite"),
        ("fast", {"mae_weight": float("inf")}, "mae_weight=inf: must be finite"),
    ],
)
def test_presets_and_weights_that_mean_nothing_are_refused(preset: str, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        enhancement(preset, **overrides)
    assert str(caught.value) == message
