import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from workbench.checkpoints import load_foreign
from workbench.config import ConfigError
from workbench.models import MODELS
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig

REFERENCE = Path(__file__).parents[1] / "data" / "conv_vae.safetensors"
SMALL = ConvVAEConfig(image_size=16, in_channels=3, latent_dim=5, hidden_dims=[4, 6])


def small(config: ConvVAEConfig = SMALL) -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(config)


def images(n: int = 4, config: ConvVAEConfig = SMALL) -> torch.Tensor:
    shape = (n, config.in_channels, config.image_size, config.image_size)
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1


# --- the reference implementation ---


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(REFERENCE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


@pytest.mark.parametrize("given", [True, False], ids=["config given", "config inferred"])
def test_equals_the_reference_implementation(
    reference: tuple[dict[str, torch.Tensor], dict], given: bool, tmp_path: Path
) -> None:
    tensors, config = reference
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    torch.save(weights, tmp_path / "foreign.pt")
    expected = ConvVAEConfig(**config)
    model = load_foreign("conv_vae", tmp_path / "foreign.pt", expected if given else None)
    assert model.config == expected and not model.training
    with torch.inference_mode():
        posterior = model.encode(tensors["input.image"])
        x_hat = model.decode(posterior.mu)
    assert tensors["output.reconstruction"].std() > 0.01, "the reference says nothing"
    torch.testing.assert_close(posterior.mu, tensors["output.mu"], rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, tensors["output.log_var"], rtol=0, atol=1e-5)
    torch.testing.assert_close(x_hat, tensors["output.reconstruction"], rtol=0, atol=1e-5)


def test_parameter_count_at_full_size() -> None:
    """The sum over layers as published: kernel 3 x 3, weights and bias, two numbers per norm channel."""
    dims, latent, channels, grid = [64, 128, 256, 512, 1024], 256, 3, 256 // 2**5

    def conv(c_in: int, c_out: int) -> int:
        return 9 * c_in * c_out + c_out

    features = dims[-1] * grid**2
    encoder = sum(conv(a, b) + 2 * b for a, b in pairwise([channels, *dims]))
    decoder = sum(conv(a, b) + 2 * b for a, b in pairwise(dims[::-1]))
    linear = 2 * (features + 1) * latent + (latent + 1) * features
    last = conv(dims[0], dims[0]) + 2 * dims[0] + conv(dims[0], channels)
    with torch.device("meta"):
        model = ConvVAE(ConvVAEConfig())
    assert sum(p.numel() for p in model.parameters()) == encoder + linear + decoder + last == 62_980_803


# --- configuration ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_size": 100},
            "image_size=100: must be divisible by 32, as 5 entries of hidden_dims halve it; "
            "the nearest such size is 96 or 128",
        ),
        (
            {"image_size": 6, "hidden_dims": [4, 4, 4]},
            "image_size=6: must be divisible by 8, as 3 entries of hidden_dims halve it; the nearest such size is 8",
        ),
        ({"hidden_dims": [0, 4]}, "hidden_dims=[0, 4]: every entry must be at least 1"),
        ({"hidden_dims": []}, "hidden_dims=[]: must have at least 1 entry"),
        ({"latent_dim": 0}, "latent_dim=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConvVAEConfig(**settings)
    assert str(caught.value) == message


# --- shapes ---


@pytest.mark.parametrize("hidden_dims", [[4], [4, 6], [2, 3, 5, 7]])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(hidden_dims: list[int], channels: int) -> None:
    config = ConvVAEConfig(image_size=32, in_channels=channels, latent_dim=5, hidden_dims=hidden_dims)
    model, x = small(config), images(2, config)
    posterior = model.encode(x)
    assert posterior.mu.shape == posterior.logvar.shape == (2, 5)
    assert model.latent_layout.size == model.noise_dim == 5
    assert model(x).shape == x.shape
    assert model(x).abs().max() <= 1
    assert model.sample(3, torch.Generator().manual_seed(0)).shape == (3, *x.shape[1:])


def test_encode_names_the_shape_it_was_built_for() -> None:
    with pytest.raises(ValueError) as caught:
        small().encode(torch.zeros(2, 3, 16, 8))
    assert str(caught.value) == "x has shape (3, 16, 8) (c, h, w): this model was built for (3, 16, 16)"


# --- loss and noise ---


def test_loss_terms_are_unweighted_and_in_their_units() -> None:
    model, x = small().eval(), images()
    with torch.no_grad():
        terms, posterior = model.loss({"x": x}), model.encode(x)
        x_hat = model.decode(posterior.mu)
    assert list(terms) == ["mse", "kl"]
    kl = 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar)
    torch.testing.assert_close(terms["mse"], ((x_hat - x) ** 2).mean())
    torch.testing.assert_close(terms["kl"], kl.sum(1).mean())


def test_noise_of_the_batch_is_used() -> None:
    model, x = small().eval(), images()
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        posterior = model.encode(x)
        x_hat = model.decode(posterior.mu + (0.5 * posterior.logvar).exp() * noise)
        torch.testing.assert_close(model.loss({"x": x, "noise": noise})["mse"], ((x_hat - x) ** 2).mean())
        assert model.loss({"x": x})["mse"] != model.loss({"x": x, "noise": noise})["mse"]


def test_no_noise_at_evaluation_and_some_in_training() -> None:
    model, x = small(), images()
    before = torch.get_rng_state()
    model.eval()
    with torch.no_grad():
        assert model.loss({"x": x})["mse"] == model.loss({"x": x})["mse"]
        assert torch.equal(model(x), model(x))
        assert torch.equal(before, torch.get_rng_state()), "evaluation drew a random number"
        model.train()
        assert model.loss({"x": x})["mse"] != model.loss({"x": x})["mse"]


def test_gradients_reach_every_parameter() -> None:
    model = small()
    terms = model.loss({"x": images(), "noise": torch.ones(4, 5)})
    (terms["mse"] + 1e-2 * terms["kl"]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    cancelled_by_batch_norm = [  # a bias before a batch norm is subtracted again, so its gradient is rounding
        name for name in without if name.endswith(".0.bias") or name == "to_image.0.bias"
    ]
    assert set(without) <= set(cancelled_by_batch_norm), without


def test_under_autocast_the_latent_stays_in_float32() -> None:
    model = small().eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encoder(images())
        posterior = model.encode(images())
        x_hat = model.decode(posterior.mu)
    assert features.dtype == x_hat.dtype == torch.bfloat16
    for layer, found in ((model.to_mu, posterior.mu), (model.to_logvar, posterior.logvar)):
        assert torch.equal(found, nn.functional.linear(features.flatten(1).float(), layer.weight, layer.bias))
    x_hat.float().square().mean().backward()
    assert model.from_z.weight.grad.abs().sum() > 0 and model.to_mu.weight.grad.abs().sum() > 0
    torch.testing.assert_close(x_hat.float(), model.decode(posterior.mu), atol=0.02, rtol=0.02)


def test_samples_are_a_function_of_the_generator() -> None:
    model = small().eval()
    with torch.no_grad():
        a, b = (model.sample(2, torch.Generator().manual_seed(3)) for _ in range(2))
        expected = model.decode(torch.randn(2, 5, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(a, b) and torch.equal(a, expected)


# --- what every model promises ---


EXAMPLES = {
    "conv_vae": {"image_size": 16, "latent_dim": 5, "hidden_dims": [4, 6]},
    "hierarchical_vae": {"nodes": 5, "steps": 4, "filters": [6, 4, 3]},
    "mlp_conditioner": {"condition_dim": 3, "main_dim": 4, "width": 8},
    "cnn_conditioner": {"image_size": 16, "main_dim": 4, "width": 4, "depth": 2},
    "laq": {
        "image_size": 64,
        "patch_size": 8,
        "dim": 16,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "heads": 2,
        "dim_head": 8,
    },
    "layout_autoencoder": {"image_size": 16, "base_channels": 4, "n_classes": 3, "n_types": 2},
    "weight_autoencoder": {"max_len": 50, "fdim": 64, "ch": 4, "ch_mult": [1, 2]},
}
"""Settings of a small model of each kind; a new kind adds its own."""


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_known_by_its_kind_and_its_config_round_trips(kind: str) -> None:
    assert kind in EXAMPLES, f"model kind {kind!r} has no small example: add its settings to EXAMPLES"
    model_class, config_class = MODELS[kind]
    config = config_class(**EXAMPLES[kind])
    assert issubclass(model_class, nn.Module)
    assert config_class(**json.loads(json.dumps(config.model_dump()))) == config
