import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from workbench.config import ConfigError
from workbench.models.layout_autoencoder import LayoutAutoencoder, LayoutAutoencoderConfig, cross_entropy

SMALL = {
    "image_size": 16,
    "n_classes": 5,
    "n_types": 3,
    "latent_channels": 3,
    "base_channels": 4,
    "downsampling_steps": 2,
}
SHAPES = [(16, 4), (8, 3), (4, 3), (8, 4), (16, 5), (32, 4), (4, 4), (8, 5), (16, 3), (2, 3), (8, 6), (4, 2)]

pytestmark = pytest.mark.usefixtures("one_thread")


def small(seed: int = 0, **settings: Any) -> LayoutAutoencoder:
    torch.manual_seed(seed)
    return LayoutAutoencoder(LayoutAutoencoderConfig(**SMALL | settings))


def stirred(**settings: Any) -> LayoutAutoencoder:
    """A model whose log-variances differ, as after training."""
    model = small(**settings)
    generator = torch.Generator().manual_seed(3)
    model.to_logvar.weight.data.normal_(0, 0.5, generator=generator)
    model.to_logvar.bias.data.fill_(-2)
    model.to_mu.weight.data *= 3
    return model


def plans(n: int = 4, size: int = 16) -> dict[str, torch.Tensor]:
    """Blocks of 4 px, each of a random class, coloured by it."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 5, (n, size // 4, size // 4), generator=generator)
    classes = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    palette = 2 * torch.rand(5, 3, generator=generator) - 1
    return {
        "x": palette[classes].permute(0, 3, 1, 2).contiguous(),
        "classes": classes,
        "type": torch.arange(n) % 3,
    }


def noise(model: LayoutAutoencoder, n: int = 4) -> torch.Tensor:
    return torch.randn(n, model.noise_dim, generator=torch.Generator().manual_seed(2))


# --- configuration and sizes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_size": 100, "downsampling_steps": 3},
            "image_size=100: must be divisible by 8 = 2 ** downsampling_steps, which is 3; "
            "the nearest such size is 96 or 104",
        ),
        (
            {"image_size": 6, "downsampling_steps": 4},
            "image_size=6: must be divisible by 16 = 2 ** downsampling_steps, which is 4; the nearest such size is 16",
        ),
        (
            {"n_types": 1},
            "classification=True: must have 2 or more to tell apart, and n_types=1; set classification to false, or "
            "use data that have them",
        ),
        (
            {"n_classes": 0},
            "segmentation=True: must have 2 or more to tell apart, and n_classes=0; set segmentation to false, or "
            "use data that have them",
        ),
        ({"kl_reduction": "batch"}, "kl_reduction='batch': must be 'mean' or 'sum'"),
        ({"latent_channels": 0}, "latent_channels=0: must be at least 1"),
        ({"downsampling_steps": 0}, "downsampling_steps=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayoutAutoencoderConfig(**SMALL | settings)
    assert str(caught.value) == message


def test_the_sizes_of_the_data_have_no_default() -> None:
    with pytest.raises(
        ConfigError, match="image_size.*must be given\nn_classes.*must be given\nn_types.*must be given"
    ):
        LayoutAutoencoderConfig()


def test_the_config_round_trips() -> None:
    config = LayoutAutoencoderConfig(**SMALL | {"classification": False, "n_types": 0, "kl_reduction": "mean"})
    assert LayoutAutoencoderConfig(**json.loads(json.dumps(config.model_dump()))) == config


def test_channels_double_up_to_eight_times_the_base() -> None:
    config = LayoutAutoencoderConfig(**SMALL | {"image_size": 64, "downsampling_steps": 5})
    assert config.channels == [4, 8, 16, 32, 32, 32]


@pytest.mark.parametrize("variational", [True, False])
@pytest.mark.parametrize(("latent_channels", "steps"), SHAPES)
def test_shapes(latent_channels: int, steps: int, variational: bool) -> None:
    sizes = {"image_size": 64, "latent_channels": latent_channels, "downsampling_steps": steps, "base_channels": 2}
    model, x = small(**sizes, variational=variational), plans(2, 64)["x"]
    grid = 64 // 2**steps
    d = latent_channels * grid**2
    with torch.no_grad():
        posterior, decoded = model.encode(x), model.decode_all(model.encode(x).mu)
        assert posterior.mu.shape == (2, d) and model.latent_layout.shapes == {"z": (latent_channels, grid, grid)}
        assert model.noise_dim == (d if variational else 0)
        assert posterior.logvar.shape == (2, d) if variational else posterior.logvar is None
        assert decoded.x_hat.shape == x.shape and decoded.x_hat.abs().max() <= 1
        assert decoded.class_logits.shape == (2, 5, 64, 64) and decoded.type_logits.shape == (2, 3)
        assert torch.equal(model(x), decoded.x_hat) and torch.equal(model.decode(posterior.mu), decoded.x_hat)


def test_errors_name_the_shape_the_model_was_built_for() -> None:
    with pytest.raises(ValueError) as caught:
        small().encode(torch.zeros(2, 3, 16, 8))
    assert str(caught.value) == "x has shape (3, 16, 8) (c, h, w): this model was built for (3, 16, 16)"
    with pytest.raises(ValueError, match=r"z has 47 values per sample: must have 48 \({'z': \(3, 4, 4\)}\)"):
        small().decode(torch.zeros(2, 47))


def test_a_latent_keeps_its_place() -> None:
    """Changing a cell of the grid changes most the quarter of the image that it lies in."""
    model = small(image_size=32).eval()
    z = torch.zeros(1, 3, 8, 8)
    z[0, :, 1, 6] = 1
    with torch.no_grad():
        difference = (model.decode(z.flatten(1)) - model.decode(torch.zeros(1, 192))).abs().sum((0, 1))
    upper_left, upper_right, lower_left, lower_right = difference.reshape(2, 16, 2, 16).sum((1, 3)).flatten()
    assert upper_right > upper_left + lower_left + lower_right


# --- deterministic and variational, with and without heads ---


def test_the_deterministic_network_is_the_variational_one_without_logvar() -> None:
    one, other, batch = small(variational=False), small(), plans()
    weights = other.state_dict()
    logvar = {name for name in weights if name.startswith("to_logvar")}
    assert logvar and one.state_dict().keys() == weights.keys() - logvar
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    with torch.no_grad():
        deterministic, variational = one.train().loss(batch), other.eval().loss(batch)
        assert torch.equal(one(batch["x"]), other(batch["x"]))
    assert list(deterministic) == ["mse", "segmentation", "classification"]
    assert all(torch.equal(value, variational[name]) for name, value in deterministic.items())
    assert not torch.equal(one.state_dict()["to_mu.weight"], small(seed=1).state_dict()["to_mu.weight"])


@pytest.mark.parametrize("heads", [(False, False), (True, False)])
def test_leaving_a_head_out_changes_no_other_weight(heads: tuple[bool, bool]) -> None:
    some, every = small(segmentation=heads[0], classification=heads[1]).state_dict(), small().state_dict()
    assert all(torch.equal(value, every[name]) for name, value in some.items())
    left_out = {name.partition(".")[0] for name in every.keys() - some.keys()}
    assert left_out == ({"to_type"} if heads[0] else {"to_classes", "to_type"})


@pytest.mark.parametrize("variational", [True, False])
@pytest.mark.parametrize("segmentation", [True, False])
@pytest.mark.parametrize("classification", [True, False])
def test_terms_are_those_of_the_parts(variational: bool, segmentation: bool, classification: bool) -> None:
    parts = {"segmentation": segmentation, "classification": classification, "variational": variational}
    sizes = {"n_classes": 5 * segmentation, "n_types": 3 * classification}
    model, batch = small(**parts, **sizes), plans()
    present = [
        name for name, part in zip(("segmentation", "classification", "kl"), parts.values(), strict=True) if part
    ]
    assert model.terms == ("mse", *present)
    read = {"x": True, "classes": segmentation, "type": classification}
    terms = model.loss({name: batch[name] for name, used in read.items() if used})
    assert list(terms) == [*model.terms, *(["kl_mean", "kl_total"] if variational else [])]
    decoded = model.decode_all(model.encode(batch["x"]).mu)
    assert (decoded.class_logits is None, decoded.type_logits is None) == (not segmentation, not classification)


def test_the_variance_starts_at_that_of_the_prior() -> None:
    assert torch.equal(small().encode(plans()["x"]).logvar, torch.zeros(4, 48))


# --- loss and noise ---


def test_terms_are_unweighted_and_in_their_units() -> None:
    model, batch = stirred().eval(), plans()
    with torch.no_grad():
        terms, posterior = model.loss(batch), model.encode(batch["x"])
        decoded = model.decode_all(posterior.mu)
    kl = 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar)
    expected = {
        "mse": (decoded.x_hat - batch["x"]).square().mean(),
        "segmentation": nn.functional.cross_entropy(decoded.class_logits, batch["classes"]),
        "classification": nn.functional.cross_entropy(decoded.type_logits, batch["type"]),
        "kl_mean": kl.mean(),
        "kl_total": kl.sum(1).mean(),
    }
    assert list(terms) == ["mse", "segmentation", "classification", "kl", "kl_mean", "kl_total"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_kl_is_reduced_as_named(reduction: str) -> None:
    terms = stirred(kl_reduction=reduction).loss(plans())
    assert torch.equal(terms["kl"], terms["kl_mean" if reduction == "mean" else "kl_total"])
    torch.testing.assert_close(terms["kl_total"], 48 * terms["kl_mean"])


def test_the_kl_equals_its_monte_carlo_estimate() -> None:
    """log q - log p at 200,000 draws of q, in chunks."""
    model, x = stirred(), plans(2)["x"]
    with torch.no_grad():
        posterior, terms = model.encode(x), model.loss(plans(2))
    q = Normal(posterior.mu.double(), (0.5 * posterior.logvar.double()).exp())
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(20):
        noise = torch.randn(10_000, *q.mean.shape, generator=generator)
        z = q.mean + q.stddev * noise
        estimates.append((q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(2).mean())
    estimate = torch.stack(estimates).mean().item()
    assert estimate > 10 and posterior.logvar.std() > 0.1, "a KL that says nothing"
    assert terms["kl_total"].item() == pytest.approx(estimate, rel=0.01)
    assert terms["kl_mean"].item() == pytest.approx(estimate / 48, rel=0.01)


def test_cross_entropy_ignores_what_is_unlabelled() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.arange(24).reshape(2, 3, 4) % 6 - 1
    expected = nn.functional.cross_entropy(logits, target, ignore_index=-1)
    found = cross_entropy(logits, target)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.equal(logits.grad.abs().sum(1) == 0, target == -1)
    assert cross_entropy(logits, torch.full_like(target, -1)) == 0
    assert cross_entropy(torch.zeros(2, 7), torch.tensor([3, -1])).item() == pytest.approx(math.log(7))


def test_unlabelled_pixels_have_no_say_in_the_loss() -> None:
    model, batch = small().eval(), plans()
    hidden = batch["classes"].clone()
    hidden[:, :5] = -1
    with torch.no_grad():
        logits = model.decode_all(model.encode(batch["x"]).mu).class_logits
        term = model.loss(batch | {"classes": hidden})["segmentation"]
    torch.testing.assert_close(term, nn.functional.cross_entropy(logits[:, :, 5:], batch["classes"][:, 5:]))


def test_noise_of_the_batch_is_used() -> None:
    model, batch = stirred().eval(), plans()
    with torch.no_grad():
        posterior = model.encode(batch["x"])
        decoded = model.decode_all(posterior.mu + (0.5 * posterior.logvar).exp() * noise(model))
        terms = model.loss(batch | {"noise": noise(model)})
    torch.testing.assert_close(terms["mse"], (decoded.x_hat - batch["x"]).square().mean())
    torch.testing.assert_close(
        terms["segmentation"], nn.functional.cross_entropy(decoded.class_logits, batch["classes"])
    )


@pytest.mark.parametrize("variational", [True, False])
def test_noise_is_drawn_in_training_alone_and_never_for_a_point(variational: bool) -> None:
    model, batch = small(variational=variational), plans()
    before = torch.get_rng_state()
    with torch.no_grad():
        assert model.eval().loss(batch)["mse"] == model.loss(batch)["mse"]
        assert torch.equal(before, torch.get_rng_state()), "evaluation drew a random number"
        assert (model.train().loss(batch)["mse"] == model.loss(batch)["mse"]) == (not variational)
    assert torch.equal(before, torch.get_rng_state()) == (not variational)


@pytest.mark.parametrize("variational", [True, False])
def test_gradients_reach_every_parameter(variational: bool) -> None:
    model = small(variational=variational)
    terms = model.loss(plans() | ({"noise": noise(model)} if variational else {}))
    sum(terms[name] for name in model.terms).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_samples_are_draws_of_the_prior_where_there_is_one() -> None:
    model = small().eval()
    with torch.no_grad():
        drawn = model.sample(2, torch.Generator().manual_seed(3))
        expected = model.decode(torch.randn(2, 48, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(drawn, expected)
    with pytest.raises(ValueError, match="variational=False: .*there is none to draw from; decode latents of images"):
        small(variational=False).sample(2)


# --- memory order and precision ---


def test_the_latent_does_not_depend_on_the_order_in_memory() -> None:
    model, x = stirred().eval(), plans()["x"]
    with torch.no_grad():
        contiguous = model.encode(x)
        x_hat = model.decode(contiguous.mu)
        last = model.to(memory_format=torch.channels_last).encode(x.contiguous(memory_format=torch.channels_last))
        assert model.encoder(x).is_contiguous(memory_format=torch.channels_last), "the test compares nothing"
        torch.testing.assert_close(last.mu, contiguous.mu, atol=1e-5, rtol=0)
        torch.testing.assert_close(last.logvar, contiguous.logvar, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(last.mu), x_hat, atol=1e-5, rtol=0)


def test_bfloat16_gives_nearly_the_same_terms_and_float32_latents() -> None:
    model, batch = stirred(), plans()
    given = batch | {"noise": noise(model)}
    expected = model.loss(given)
    with torch.autocast("cpu", torch.bfloat16):
        posterior, terms = model.encode(batch["x"]), model.loss(given)
    assert posterior.mu.dtype == posterior.logvar.dtype == torch.float32
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.03, atol=0.01, msg=name)
    sum(terms[name] for name in model.terms).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- learning ---


def test_eight_plans_are_learned_by_heart() -> None:
    model, batch = small(variational=False, base_channels=8), plans(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        terms = model.loss(batch)
        optimizer.zero_grad()
        (terms["mse"] + terms["segmentation"] + terms["classification"]).backward()
        optimizer.step()
    with torch.no_grad():
        decoded = model.eval().decode_all(model.encode(batch["x"]).mu)
    assert (decoded.class_logits.argmax(1) == batch["classes"]).float().mean() > 0.9
    assert (decoded.type_logits.argmax(1) == batch["type"]).float().mean() > 0.9
    assert terms["mse"] < 0.2 * batch["x"].var()
