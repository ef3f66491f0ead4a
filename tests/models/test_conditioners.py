import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from workbench.checkpoints import build_model, load_safetensors, load_weights, save_model
from workbench.config import ConfigError
from workbench.models import MODELS, conditioners
from workbench.models.conditioners import (
    CNNConditioner,
    CNNConditionerConfig,
    Conditioner,
    MLPConditioner,
    MLPConditionerConfig,
)

SMALL_MLP = {"condition_dim": 3, "main_dim": 4, "hier_dim": 6, "width": 8, "depth": 2}
SMALL_CNN = {"image_size": 16, "image_channels": 3, "main_dim": 4, "hier_dim": 6, "width": 4, "depth": 2}
BOTH = pytest.mark.parametrize("kind", ["mlp", "cnn"])


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(**settings: Any) -> MLPConditioner:
    torch.manual_seed(0)
    return MLPConditioner(MLPConditionerConfig(**SMALL_MLP | settings)).eval()


def cnn(**settings: Any) -> CNNConditioner:
    torch.manual_seed(0)
    return CNNConditioner(CNNConditionerConfig(**SMALL_CNN | settings)).eval()


def pictures(n: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def small(kind: str) -> tuple[Conditioner, torch.Tensor]:
    """A conditioner with scales of its own, and conditions in physical units."""
    model, conditions = (mlp(), 2e3 * seeded(7, 3) + 5e3) if kind == "mlp" else (cnn(), pictures(7))
    model.standardise(conditions, 3 * seeded(7, 10, seed=2) - 1)
    return model, conditions


# --- shapes, files ---


@pytest.mark.parametrize("hier_dim", [0, 6])
@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (mlp, {"depth": 1}),
        (mlp, {"condition_dim": 1}),
        (mlp, {"input_norm": "raw"}),
        (cnn, {}),
        (cnn, {"image_channels": 1}),
        (cnn, {"spatial_attention": True, "spectral_norm": True}),
        (cnn, {"image_size": 2, "depth": 1, "width": 1}),
        (cnn, {"image_size": 22, "depth": 1, "width": 5}),  # a grid of 11 in cells of 2, the last ones cut
    ],
)
def test_codes_have_the_length_of_main_and_hierarchical_latent(build: Any, settings: dict, hier_dim: int) -> None:
    model = build(hier_dim=hier_dim, **settings)
    condition = torch.rand(2, *model.shape)
    assert model.latent_dim == 4 + hier_dim
    assert model(condition).shape == model.codes(condition).shape == (2, 4 + hier_dim)
    assert model.config.hier_dim == hier_dim


def test_main_codes_come_first() -> None:
    model, condition = small("mlp")
    before = model(condition)
    with torch.no_grad():
        model.heads.main.bias += 1
    difference = model(condition) - before
    torch.testing.assert_close(difference, torch.tensor([1.0] * 4 + [0.0] * 6).expand(7, 10))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mlp", {}), ("mlp", {"input_norm": "raw"}), ("cnn", {"spectral_norm": True, "spatial_attention": True})],
)
def test_a_conditioner_comes_back_from_its_file(
    kind: str, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales and the vectors of the spectral norm included."""
    monkeypatch.setitem(MODELS, "mlp", (MLPConditioner, MLPConditionerConfig))
    monkeypatch.setitem(MODELS, "cnn", (CNNConditioner, CNNConditionerConfig))
    model = (mlp if kind == "mlp" else cnn)(**settings)
    conditions = seeded(7, 3) if kind == "mlp" else pictures(7)
    model.standardise(conditions, 3 * seeded(7, 10, seed=2))
    save_model(tmp_path / "model.safetensors", model, kind)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "config" in file.metadata()
    again = build_model(kind, model.config.model_dump()).eval()
    assert not torch.equal(again.codes(conditions), model.codes(conditions))
    load_weights(again, load_safetensors(tmp_path / "model.safetensors"), tmp_path)
    assert torch.equal(again.codes(conditions), model.codes(conditions))


@BOTH
def test_conditions_of_another_shape_are_refused(kind: str) -> None:
    model, condition = small(kind)
    shapes = {"mlp": (r"\(2,\)", r"\(3,\)"), "cnn": (r"\(2, 16, 16\)", r"\(3, 16, 16\)")}[kind]
    with pytest.raises(
        ValueError, match=rf"condition of shape {shapes[0]}: this conditioner was built for {shapes[1]}"
    ):
        model(condition[:, :2])


@BOTH
def test_gradients_reach_every_parameter(kind: str) -> None:
    model, condition = small(kind)
    model.codes(condition).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# --- scales ---


@BOTH
def test_a_change_of_units_changes_nothing(kind: str) -> None:
    """Conditions in other units, and codes on another scale, give the same standardised codes once it is told."""
    model, condition = small(kind)
    codes = 3 * seeded(7, 10, seed=2) - 1
    before, before_codes = model(condition), model.codes(condition)
    scale = torch.tensor([1e-3, 20.0, 7.0]).reshape(3, *[1] * (condition.dim() - 2))
    model.standardise(condition * scale + 4 * scale, 10 * codes + 3)
    torch.testing.assert_close(model(condition * scale + 4 * scale), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.codes(condition * scale + 4 * scale), 10 * before_codes + 3, rtol=1e-3, atol=1e-2)


@BOTH
def test_scales_are_those_of_the_training_split(kind: str) -> None:
    model, conditions = small(kind)
    codes = 3 * seeded(7, 10, seed=2) - 1
    axes = [axis for axis in range(conditions.dim()) if axis != 1]
    torch.testing.assert_close(model.condition_mean, conditions.mean(axes))
    torch.testing.assert_close(model.condition_std, conditions.std(axes, correction=0))
    torch.testing.assert_close(model.code_mean, codes.mean(0))
    torch.testing.assert_close(model.code_std, codes.std(0, correction=0))
    torch.testing.assert_close(model.codes(conditions), model(conditions) * model.code_std + model.code_mean)


def test_a_collapsed_latent_dimension_is_predicted_by_its_mean() -> None:
    model, codes = mlp(), 3 * seeded(7, 10, seed=2)
    codes[:, 4] = 0.25
    codes[:, 5] *= 1e-10
    codes[:, 6] *= 1e-6
    model.standardise(seeded(7, 3), codes)
    assert model.code_mean[4] == 0.25
    assert model.code_std[4] == model.code_std[5] == 1
    rest = [0, 1, 2, 3, 6, 7, 8, 9]
    torch.testing.assert_close(model.code_std[rest], codes[:, rest].std(0, correction=0), rtol=1e-5, atol=0)
    model.standardise(seeded(7, 3), torch.full((7, 10), 2.0))
    assert torch.equal(model.code_std, torch.ones(10))


def test_a_condition_that_says_nothing_is_refused() -> None:
    conditions = seeded(7, 3)
    conditions[:, 1] = 0.1
    with pytest.raises(ValueError, match="conditions: column 1 is 0.1 in all 7 training runs.*remove the column"):
        mlp().standardise(conditions, seeded(7, 10))
    images = pictures(7)
    images[:, 2] = 1
    with pytest.raises(ValueError, match="conditions: channel 2 is 1 in all 7 training runs.*remove the channel"):
        cnn().standardise(images, seeded(7, 10))


def test_values_that_are_not_finite_are_refused() -> None:
    conditions, codes = seeded(7, 3), seeded(7, 10)
    conditions[5, 2] = float("nan")
    codes[3, 9] = codes[6, 0] = float("inf")
    with pytest.raises(ValueError, match=r"conditions: 1 values are NaN, infinite .* the first at \[5, 2\]"):
        mlp().standardise(conditions, seeded(7, 10))
    with pytest.raises(ValueError, match=r"codes: 2 values are NaN, infinite .* the first at \[3, 9\]"):
        mlp().standardise(seeded(7, 3), codes)


def test_conditions_and_codes_that_do_not_fit_are_refused_and_nothing_is_set() -> None:
    model = mlp()
    unchecked = inspect.unwrap(MLPConditioner.standardise)  # without the shape checks that run in tests
    with pytest.raises(ValueError, match="7 conditions and 8 codes: must be as many; pair them by run"):
        unchecked(model, seeded(7, 3), seeded(8, 10))
    with pytest.raises(ValueError, match=r"codes of shape \(9,\): this conditioner was built for \(10,\)"):
        unchecked(model, seeded(7, 3), seeded(7, 9))
    with pytest.raises(ValueError, match=r"conditions of shape \(2,\): this conditioner was built for \(3,\)"):
        unchecked(model, seeded(7, 2), seeded(7, 10))
    assert torch.equal(model.code_std, torch.ones(10)) and torch.equal(model.condition_mean, torch.zeros(3))


@BOTH
def test_gradient_at_the_first_layer_equals_a_finite_difference(kind: str) -> None:
    """Through the scaling of the codes: a quarter of the scale would give a quarter of the gradient."""
    model, condition = small(kind)
    model, condition = model.double(), condition.double()
    weight = model.embed[0].weight if kind == "mlp" else model.stem.weight
    direction = seeded(*weight.shape, seed=3).double()

    def error() -> torch.Tensor:
        return (model.codes(condition) - 1).square().sum()

    slope = (torch.autograd.grad(error(), weight)[0] * direction).sum()
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(error())
            weight -= sign * step * direction
    assert slope.abs() > 1e-2
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=0)


# --- MLP ---


def test_a_layer_norm_of_the_input_loses_what_an_embedding_keeps() -> None:
    rows = seeded(5, 3)
    other = 2 * rows + 3
    raw, embedded = mlp(input_norm="raw"), mlp()
    torch.testing.assert_close(raw(other), raw(rows), rtol=0, atol=1e-3)
    assert (embedded(other) - embedded(rows)).abs().amax(1).min() > 0.05
    single = mlp(condition_dim=1)(torch.tensor([[-1.0], [-0.1], [0.1], [1.0]]))
    assert torch.pdist(single).min() > 0.05


def test_dropout_grows_with_depth() -> None:
    model = mlp(depth=4, dropout=0.4)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("build", [mlp, cnn])
def test_dropout_acts_in_training_alone(build: Any) -> None:
    model = build(dropout=0.5)
    condition = torch.rand(2, *model.shape)
    assert torch.equal(model(condition), model(condition))
    model.train()
    assert not torch.equal(model(condition), model(condition))


# --- CNN ---


def blob(row: int, column: int) -> torch.Tensor:
    image = torch.zeros(1, 1, 32, 32)
    image[..., row : row + 2, column : column + 2] = 1
    return image


def test_a_position_that_a_global_average_loses_reaches_the_codes() -> None:
    """Shifted by whole cells and far from the borders: the same feature map but for its place."""
    model = cnn(image_size=32, image_channels=1, depth=1).double()
    a, b = blob(10, 10).double(), blob(18, 14).double()
    maps = [model.stages(model.stem(image)) for image in (a, b)]
    torch.testing.assert_close(maps[0].mean((2, 3)), maps[1].mean((2, 3)), rtol=0, atol=1e-12)
    assert (model(a) - model(b)).abs().max() > 1e-2


def test_brightness_reaches_the_codes() -> None:
    model = cnn(image_channels=1)
    grey = torch.full((1, 1, 16, 16), 0.2)
    assert (model(grey) - model(4 * grey)).abs().max() > 1e-2


def test_squeeze_and_excitation_weighs_channels_by_their_means() -> None:
    torch.manual_seed(0)
    block, x = conditioners.SqueezeExcitation(8), seeded(2, 8, 3, 5)
    weight = block.weigh(x.mean((2, 3)))
    torch.testing.assert_close(block(x), x * weight[:, :, None, None])
    assert weight.min() > 0 and weight.max() < 1


def test_spatial_attention_weighs_positions_alike_in_every_channel() -> None:
    torch.manual_seed(0)
    block, x = conditioners.SpatialAttention(), seeded(2, 8, 9, 9)
    ratio = block(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    changed = x.clone()
    changed[0, :, 0, 0] += 10
    moved = (block(changed) / changed - ratio)[0, 0].abs() > 1e-6
    assert moved[:4, :4].any() and not moved[4:].any() and not moved[:, 4:].any()  # a 7 x 7 kernel reaches 3 px
    assert cnn().config.spatial_attention is False
    assert not any(isinstance(module, conditioners.SpatialAttention) for module in cnn().modules())
    assert any(isinstance(module, conditioners.SpatialAttention) for module in cnn(spatial_attention=True).modules())


def test_spectral_norm_holds_every_weight_but_the_heads() -> None:
    model = cnn(spectral_norm=True, spatial_attention=True).train()
    for _ in range(50):
        model(pictures(2))
    model.eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    largest = {name: torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() for name, m in layers.items()}
    heads = {name for name in largest if name.startswith("heads.")}
    assert heads == {"heads.main", "heads.hier"}
    assert {name: norm for name, norm in largest.items() if name not in heads and abs(norm - 1) > 1e-2} == {}
    assert not hasattr(model.heads.main, "parametrizations")


# --- configuration ---


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (MLPConditionerConfig, {"condition_dim": 0}, "condition_dim=0: must be at least 1"),
        (MLPConditionerConfig, {"hier_dim": -1}, "hier_dim=-1: must be at least 0"),
        (MLPConditionerConfig, {"dropout": 1.0}, "dropout=1.0: must be less than 1"),
        (MLPConditionerConfig, {"input_norm": "none"}, "input_norm='none': must be 'embedded' or 'raw'"),
        (
            MLPConditionerConfig,
            {"input_norm": "raw", "condition_dim": 1},
            "input_norm='raw' with condition_dim=1: the layer norm of a single number is 0 whatever the number; "
            "use 'embedded'",
        ),
        (CNNConditionerConfig, {"image_channels": 2}, "image_channels=2: must be 1 or 3"),
        (
            CNNConditionerConfig,
            {"image_size": 100},
            "image_size=100: must be divisible by 16, as 4 stages (depth) halve it; the nearest such size is 96 or 112",
        ),
        (
            CNNConditionerConfig,
            {"image_size": 6, "depth": 3},
            "image_size=6: must be divisible by 8, as 3 stages (depth) halve it; the nearest such size is 8",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: Any, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert str(caught.value) == message
