import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributions import Laplace, Normal

from workbench.checkpoints import load_foreign
from workbench.config import ConfigError
from workbench.models.weight_autoencoder import Attention, WeightAutoencoder, WeightAutoencoderConfig

REFERENCE = Path(__file__).parents[1] / "data" / "weight_autoencoder.safetensors"
SMALL = {"max_len": 50, "fdim": 64, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3, "embed_dim": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def small(seed: int = 0, **settings: Any) -> WeightAutoencoder:
    torch.manual_seed(seed)
    return WeightAutoencoder(WeightAutoencoderConfig(**SMALL | settings))


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    """Four networks of 50, 31, 31 and 12 weights, 0 where padded."""
    mask = torch.arange(50) < torch.tensor([50, 31, 31, 12])[:, None]
    return {"x": draw(4, 50) * mask, "mask": mask}


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
    theirs = {k: v for k, v in config["ddconfig"].items() if k in WeightAutoencoderConfig.model_fields}
    named = {"max_len": config["ddconfig"]["in_dim"], "embed_dim": config["embed_dim"]}
    expected = WeightAutoencoderConfig(**theirs | named | {"attn_resolutions": [4]})  # none of its maps has a side of 2
    model = load_foreign("weight_autoencoder", tmp_path / "foreign.pt", expected if given else None)
    assert model.config == expected and not model.training
    x = tensors["input.weight"]
    with torch.inference_mode():
        posterior = model.encode(x)
        found = {"mean": posterior.mu, "logvar": posterior.logvar, "kl": posterior.kl(), "reconstruction": model(x)}
        terms = model.loss(x)
    assert tensors["output.reconstruction"].std() > 0.1 < tensors["output.logvar"].std(), "the reference says nothing"
    for name, value in found.items():
        output = tensors[f"output.{name}"]
        torch.testing.assert_close(value, output.flatten(1) if output.dim() > 1 else output, rtol=0, atol=1e-5)
    torch.testing.assert_close(terms["kl"], tensors["output.kl"].mean(), rtol=0, atol=1e-5)
    error = (tensors["output.reconstruction"] - x[:, 0]).abs().mean()
    torch.testing.assert_close(terms["nll"], error, rtol=0, atol=1e-5)  # s is 0 where the file has none


# --- configuration and sizes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fdim": 200, "ch_mult": [1, 1, 2]},
            "fdim=200: must be the square of a multiple of 4 = 2 ** (len(ch_mult) - 1); the nearest such are 144 and "
            "256",
        ),
        (
            {"fdim": 81},
            "fdim=81: must be the square of a multiple of 2 = 2 ** (len(ch_mult) - 1); the nearest such are 64 and 100",
        ),
        (
            {"fdim": 9, "ch_mult": [1, 1, 1]},
            "fdim=9: must be the square of a multiple of 4 = 2 ** (len(ch_mult) - 1); the smallest such is 16",
        ),
        (
            {"attn_resolutions": [4, 2]},
            "attn_resolutions=[4, 2]: must be sides of maps, and those of fdim=64 and ch_mult=[1, 2] are [8, 4] px",
        ),
        (
            {"attn_resolutions": [8, 64], "layout": "square", "max_len": 1000, "ch_mult": [1, 2, 2]},
            "attn_resolutions=[8, 64]: must be sides of maps, and those of max_len=1000, layout='square' and "
            "ch_mult=[1, 2, 2] are [32, 16, 8] px",
        ),
        ({"ch": 5}, "ch=5: must be even, as each norm has 2 groups of channels"),
        ({"ch_mult": [1, 0]}, "ch_mult=[1, 0]: every entry must be at least 1"),
        ({"ch_mult": []}, "ch_mult=[]: must have at least 1 entry"),
        ({"num_res_blocks": 0}, "num_res_blocks=0: must be at least 1"),
        ({"layout": "round"}, "layout='round': must be 'linear' or 'square'"),
        ({"weight_error": "l2"}, "weight_error='l2': must be 'l1' or 'mse'"),
        ({"max_len": 0}, "max_len=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WeightAutoencoderConfig(**SMALL | settings)
    assert str(caught.value) == message


def test_the_config_round_trips_and_its_length_has_no_default() -> None:
    config = WeightAutoencoderConfig(**SMALL | {"layout": "square", "attn_resolutions": [4], "weight_error": "mse"})
    assert WeightAutoencoderConfig(**json.loads(json.dumps(config.model_dump()))) == config
    with pytest.raises(ConfigError, match="max_len.*must be given"):
        WeightAutoencoderConfig()


@pytest.mark.parametrize(
    ("max_len", "levels", "side"), [(1, 1, 1), (1, 3, 4), (16, 3, 4), (17, 3, 8), (50, 1, 8), (64, 1, 8), (65, 2, 10)]
)
def test_a_square_is_the_smallest_that_holds_all_and_can_be_halved(max_len: int, levels: int, side: int) -> None:
    config = WeightAutoencoderConfig(max_len=max_len, layout="square", ch_mult=[1] * levels)
    assert (config.side, config.grid) == (side, side // 2 ** (levels - 1))


@pytest.mark.parametrize("layout", ["linear", "square"])
@pytest.mark.parametrize("ch_mult", [[1], [1, 2], [2, 1, 3]])
@pytest.mark.parametrize("max_len", [1, 49, 64, 77])
def test_shapes(max_len: int, ch_mult: list[int], layout: str) -> None:
    model = small(max_len=max_len, ch_mult=ch_mult, layout=layout, ch=2).eval()
    d = 2 * model.config.grid**2
    with torch.no_grad():
        posterior = model.encode(draw(3, max_len))
        assert posterior.mu.shape == posterior.logvar.shape == (3, d) and model.noise_dim == d
        assert model.latent_layout.shapes == {"z": (2, model.config.grid, model.config.grid)}
        assert model(draw(3, max_len)).shape == model(draw(3, 1, max_len)).shape == (3, max_len)
        assert model.sample(2, torch.Generator().manual_seed(0)).shape == (2, max_len)


def test_a_square_holds_the_weights_row_by_row_and_then_zeros() -> None:
    model, seen = small(layout="square"), []
    model.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = draw(2, 50)
    model.encode(x)
    assert torch.equal(seen[0].flatten(1), torch.cat([x, torch.zeros(2, 14)], 1)) and seen[0].shape == (2, 1, 8, 8)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_attention_stands_where_it_is_asked_for() -> None:
    model = small(ch_mult=[1, 1, 2], attn_resolutions=[4])
    found = {name for name, module in model.named_modules() if isinstance(module, Attention)}
    levels = {"encoder.levels.1.attention.0", "decoder.levels.1.attention.0", "decoder.levels.1.attention.1"}
    assert found == levels | {"encoder.middle.1", "decoder.middle.1"}


@pytest.mark.parametrize("shape", [(2, 49), (2, 2, 50), (50,), (2, 1, 1, 50)])
def test_networks_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        small().loss({"x": torch.zeros(shape)})
    assert str(caught.value) == (
        f"x has shape {shape} (networks, weights): this model was built for networks of 50 weights; open the data "
        "with max_len: 50"
    )


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(4, 49\)"):
        small().loss({"x": draw(4, 50), "mask": torch.ones(4, 49, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"z has 31 values per sample: must have 32"):
        small().decode(torch.zeros(2, 31))


# --- loss, masks and noise ---


@pytest.mark.parametrize("weight_error", ["l1", "mse"])
def test_terms_are_unweighted_and_in_their_units(weight_error: str) -> None:
    model, batch = small(weight_error=weight_error).eval(), padded()
    model.error_logvar.data.fill_(-0.7)
    with torch.no_grad():
        terms, posterior, x_hat = model.loss(batch), model.encode(batch["x"]), model(batch["x"])
    errors = [(a - b)[m] for a, b, m in zip(x_hat, batch["x"], batch["mask"], strict=True)]
    expected = {
        "l1": torch.stack([error.abs().mean() for error in errors]).mean(),
        "mse": torch.stack([error.square().mean() for error in errors]).mean(),
        "kl": 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(1).mean(),
    }
    expected["nll"] = expected[weight_error] / torch.tensor(-0.7).exp() - 0.7
    assert list(terms) == ["nll", "kl", "l1", "mse"] and model.terms == ("nll", "kl")
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)


@pytest.mark.parametrize(("weight_error", "share"), [("l1", 1), ("mse", 0.5)])
def test_the_error_term_is_a_likelihood_up_to_a_constant(weight_error: str, share: float) -> None:
    model, x = small(weight_error=weight_error).eval(), draw(4, 50)
    model.error_logvar.data.fill_(0.4)
    with torch.no_grad():
        term, x_hat = share * model.loss(x)["nll"], model(x)
    scale = torch.tensor(0.4 * share).exp()  # of the Gaussian the variance is exp(s)
    likelihood = (Laplace if weight_error == "l1" else Normal)(x_hat, scale).log_prob(x).mean()
    constant = torch.tensor(2.0).log() if weight_error == "l1" else torch.tensor(2 * torch.pi).log() / 2
    torch.testing.assert_close(term, -likelihood - constant)


@pytest.mark.parametrize("weight_error", ["l1", "mse"])
def test_the_error_term_is_least_where_the_scale_is_the_error(weight_error: str) -> None:
    model, batch = small(weight_error=weight_error).eval(), padded()
    best = model.loss(batch)[weight_error].log().item()

    def nll(s: float) -> torch.Tensor:
        model.error_logvar.data.fill_(s)
        return model.loss(batch)["nll"]

    nll(best).backward()
    assert model.error_logvar.grad.abs() < 1e-6
    assert nll(best - 0.1) > nll(best) < nll(best + 0.1)
    assert nll(best).item() == pytest.approx(1 + best, abs=1e-5)


@pytest.mark.parametrize("layout", ["linear", "square"])
@pytest.mark.parametrize("value", [7.0, float("nan")])
def test_what_is_padded_changes_no_term_and_no_gradient(layout: str, value: float) -> None:
    model, batch = small(layout=layout), padded() | {"noise": draw(4, 32)}
    expected = model.loss(batch)
    (expected["nll"] + expected["kl"]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x = torch.where(batch["mask"], batch["x"], value).requires_grad_()
    terms = model.loss(batch | {"x": x})
    (terms["nll"] + terms["kl"]).backward()
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(x.grad != 0, batch["mask"])


def test_targets_of_padded_weights_are_not_learned() -> None:
    model, batch = small(), padded()
    mask = torch.arange(50).expand(4, 50) < 31
    model.loss(batch | {"mask": mask})["nll"].backward()
    assert torch.equal(model.to_weights.weight.grad.abs().sum(1) > 0, mask[0])
    assert torch.equal(model.from_weights.weight.grad.abs().sum(0) > 0, mask[0])


def test_a_bare_tensor_is_a_batch_without_padding() -> None:
    model, x = small().eval(), draw(4, 50)
    with torch.no_grad():
        expected = model.loss({"x": x, "mask": torch.ones(4, 50, dtype=torch.bool)})
        for batch in (x, x[:, None], {"x": x}, {"x": x[:, None], "mask": torch.ones(4, 1, 50, dtype=torch.bool)}):
            found = model.loss(batch)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, msg=name)


def test_terms_are_means_of_those_of_each_network() -> None:
    """So parts of a batch, weighted by their networks, give the terms and the gradient of the whole."""
    model, batch = small().eval(), padded()
    with torch.no_grad():
        parts = [model.loss({name: value[i : i + 1] for name, value in batch.items()}) for i in range(4)]
        whole = model.loss(batch)
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), value, msg=name)


def test_noise_of_the_batch_is_used() -> None:
    model, x, noise = small().eval(), draw(4, 50), draw(4, 32, seed=2)
    with torch.no_grad():
        posterior = model.encode(x)
        x_hat = model.decode(posterior.mu + (0.5 * posterior.logvar).exp() * noise)
        torch.testing.assert_close(model.loss({"x": x, "noise": noise})["mse"], (x_hat - x).square().mean())


def test_noise_and_dropout_belong_to_training_alone() -> None:
    model, x = small(dropout=0.5), draw(4, 50)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert model.eval().loss(x)["mse"] == model.loss(x)["mse"] and torch.equal(model(x), model(x))
        assert torch.equal(before, torch.get_rng_state()), "evaluation drew a random number"
        given = {"x": x, "noise": draw(4, 32)}
        assert model.train().loss(given)["mse"] != model.loss(given)["mse"]
        plain = small().train()
        assert plain.loss(given)["mse"] == plain.loss(given)["mse"]
        assert plain.loss(x)["mse"] != plain.loss(x)["mse"]


def test_the_log_variance_is_kept_within_its_range() -> None:
    model = small()
    model.to_posterior.bias.data[2:] = torch.tensor([100.0, -100.0])
    logvar = model.encode(draw(2, 50)).logvar.unflatten(1, (2, 16))
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()


@pytest.mark.parametrize("layout", ["linear", "square"])
def test_gradients_reach_every_parameter(layout: str) -> None:
    model = small(layout=layout, ch_mult=[1, 2, 2], attn_resolutions=[8, 4, 2])
    terms = model.loss({"x": draw(4, 50), "noise": draw(4, model.noise_dim)})
    (terms["nll"] + 1e-2 * terms["kl"]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_samples_are_draws_of_the_prior() -> None:
    model = small().eval()
    with torch.no_grad():
        drawn = model.sample(2, torch.Generator().manual_seed(3))
        assert torch.equal(drawn, model.decode(torch.randn(2, 32, generator=torch.Generator().manual_seed(3))))


# --- memory order, precision, learning ---


def test_the_latent_does_not_depend_on_the_order_in_memory() -> None:
    model, x = small(attn_resolutions=[4]).eval(), draw(4, 50)
    with torch.no_grad():
        expected, x_hat = model.encode(x), model(x)
        found = model.to(memory_format=torch.channels_last).encode(x)
        torch.testing.assert_close(found.mu, expected.mu, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.logvar, expected.logvar, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x), x_hat, atol=1e-5, rtol=0)


def test_bfloat16_gives_nearly_the_same_terms_and_float32_latents() -> None:
    model, batch = small(), padded() | {"noise": draw(4, 32)}
    expected = model.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        posterior, terms = model.encode(batch["x"]), model.loss(batch)
    assert posterior.mu.dtype == posterior.logvar.dtype == torch.float32
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.03, atol=0.01, msg=name)


@pytest.mark.parametrize("layout", ["linear", "square"])
def test_four_networks_are_learned_by_heart_and_the_scale_follows(layout: str) -> None:
    model, batch = small(layout=layout), padded()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = model.eval().loss(batch)["l1"].item()
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        terms = model.loss(batch)
        (terms["nll"] + 1e-6 * terms["kl"]).backward()
        optimizer.step()
    assert model.eval().loss(batch)["l1"] < 0.5 * before
    assert model.error_logvar < -0.5
