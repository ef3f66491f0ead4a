import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

from workbench.checkpoints import build_model, load_foreign, load_safetensors, load_weights, save_model
from workbench.config import ConfigError
from workbench.layers import norm
from workbench.losses import residual_kl
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig

REFERENCE = Path(__file__).parents[1] / "data" / "simulation_vae.safetensors"
SMALL = {"nodes": 5, "steps": 4, "latent_dim": 3, "hier_latent_dim": 2, "filters": [6, 4, 3]}

Tensors = dict[str, torch.Tensor]


def small(**settings: Any) -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(HierarchicalVAEConfig(**SMALL | settings))


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fields(model: HierarchicalVAE, n: int = 4) -> torch.Tensor:
    return 0.7 * seeded(n, model.config.nodes, model.config.steps).tanh()


def noise(model: HierarchicalVAE, n: int = 4) -> torch.Tensor:
    return seeded(n, model.noise_dim, seed=2)


# --- the reference implementation ---


@pytest.fixture(scope="module")
def reference() -> tuple[Tensors, HierarchicalVAEConfig]:
    with safe_open(REFERENCE, "pt") as file:
        tensors, theirs = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])
    return tensors, HierarchicalVAEConfig(
        nodes=theirs["num_node"],
        steps=theirs["num_time"],
        latent_dim=theirs["latent_dim"],
        hier_latent_dim=theirs["hierarchical_dim"],
        filters=theirs["num_filter_enc"],
        large=not theirs["small"],
        all_codes=False,
    )


SAVED = {
    "safetensors": ("their.safetensors", lambda weights, path: save_file(weights, path)),
    "pt": ("their.pt", lambda weights, path: torch.save(weights, path)),
    "module.": ("their.pt", lambda weights, path: torch.save({f"module.{k}": v for k, v in weights.items()}, path)),
}


@pytest.mark.parametrize("given", [True, False], ids=["config given", "config inferred"])
@pytest.mark.parametrize("saved", SAVED)
def test_equals_the_reference_implementation(
    reference: tuple[Tensors, HierarchicalVAEConfig], saved: str, given: bool, tmp_path: Path
) -> None:
    tensors, expected = reference
    name, save = SAVED[saved]
    save({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, tmp_path / name)
    model = load_foreign("simulation_vae", tmp_path / name, expected if given else None)
    assert model.config == expected and not model.training
    with torch.inference_mode():
        posterior = model.encode(tensors["input.x"])
        x_hat = model.decode(posterior.mu)
    latents = model.latent_layout.unflatten(posterior.mu)
    assert list(latents) == ["main", "level_0", "level_1"]
    assert tensors["output.reconstruction_fixed"].std() > 0.1, "the reference says nothing"
    for found, wanted in [
        (latents["main"], "mu"),
        (posterior.logvar, "log_var"),
        (latents["level_0"], "xs.0"),
        (latents["level_1"], "xs.1"),
        (x_hat, "reconstruction_fixed"),
    ]:
        torch.testing.assert_close(found, tensors[f"output.{wanted}"], rtol=0, atol=1e-5, msg=wanted)


# --- configuration and sizes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": [6]}, "filters=[6]: must have at least 2 entries"),
        ({"filters": [6, 0, 3]}, "filters=[6, 0, 3]: every entry must be at least 1"),
        ({"latent_dim": 0}, "latent_dim=0: must be at least 1"),
        ({"hier_latent_dim": 0}, "hier_latent_dim=0: must be at least 1"),
        ({"nodes": 0}, "nodes=0: must be at least 1"),
        ({"recon_loss": "l2"}, "recon_loss='l2': must be 'mse', 'mae', 'smooth_l1' or 'huber'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HierarchicalVAEConfig(**SMALL | settings)
    assert str(caught.value) == message


def test_the_sizes_of_the_fields_have_no_default() -> None:
    with pytest.raises(ConfigError, match="nodes.*must be given\nsteps.*must be given"):
        HierarchicalVAEConfig()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("all_codes", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"steps": 17},
        {"steps": 1},
        {"nodes": 13, "filters": [11, 7]},
        {"nodes": 1, "filters": [1, 1, 1, 1], "spectral_norm": False},
    ],
    ids=["small", "odd length", "one step", "prime", "ones"],
)
def test_shapes(sizes: dict, all_codes: bool, large: bool) -> None:
    model = small(**sizes, all_codes=all_codes, large=large)
    x, levels = fields(model, 2), len(model.config.filters) - 1
    posterior = model.encode(x)
    assert posterior.mu.shape == (2, 3 + 2 * levels) and posterior.logvar.shape == (2, 3)
    assert model.latent_layout.shapes == {"main": (3,)} | {f"level_{i}": (2,) for i in range(levels)}
    assert model(x).shape == x.shape and model(x).abs().max() <= 1
    assert model.sample(3, torch.Generator().manual_seed(0)).shape == (3, *x.shape[1:])
    read = model.config.filters[:-1] if all_codes else model.config.filters[1:-1]
    assert model.noise_dim == 3 + sum(read) * model.config.steps
    terms = model.loss({"x": x, "noise": noise(model, 2)})
    assert all(torch.isfinite(term) for term in terms.values())


def test_the_large_variant_doubles_the_convolutions() -> None:
    def convolutions(model: HierarchicalVAE) -> list[int]:
        blocks = [*model.encoder, *(level.residual for level in model.decoder)]
        blocks += [block for level in model.decoder for block in (level.prior, level.posterior)]
        return [sum(isinstance(m, torch.nn.Conv1d) for m in block.modules()) for block in blocks]

    per_level = [2] * 3 + [3] * 2 + [2, 2] * 2
    more = [4] * 3 + [4] * 2 + [3, 3] * 2
    assert convolutions(small()) == per_level and convolutions(small(large=True)) == more
    widths = {m.kernel_size for m in small(large=True).encoder.modules() if isinstance(m, torch.nn.Conv1d)}
    assert widths == {(1,), (3,)}


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (7, 1), (8, 2), (10, 2), (13, 1), (26, 2), (32, 8), (80, 8), (1024, 8)]
)
def test_groups_of_the_norm(channels: int, groups: int) -> None:
    assert norm(channels).num_groups == groups


def test_encode_names_the_shape_it_was_built_for() -> None:
    with pytest.raises(ValueError) as caught:
        small().encode(torch.zeros(2, 4, 5))
    assert str(caught.value) == "x has shape (4, 5) (n, t): this model was built for (5, 4)"


# --- KL ---


def test_residual_kl_equals_torch_distributions() -> None:
    mu, logvar, shift, log_scale = (seeded(5, 3, 4, seed=i).double() for i in range(4))
    posterior = Normal(mu + shift, (0.5 * (logvar + log_scale)).exp())
    expected = kl_divergence(posterior, Normal(mu, (0.5 * logvar).exp())).sum((1, 2))
    torch.testing.assert_close(residual_kl(shift, log_scale, logvar).double(), expected, rtol=1e-5, atol=1e-5)
    zero = torch.zeros(2, 3)
    assert torch.equal(residual_kl(zero, zero, seeded(2, 3)), torch.zeros(2)), "posterior = prior"


def test_residual_kl_of_half_precision_is_computed_in_float32() -> None:
    shift = torch.full((1, 2000), 5.0, dtype=torch.bfloat16)
    zero = torch.zeros_like(shift)
    assert residual_kl(shift, zero, zero).item() == 2000 * 12.5


@pytest.mark.parametrize("all_codes", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_kl_terms_equal_torch_distributions_of_what_the_levels_say(all_codes: bool, training: bool) -> None:
    """Priors and posteriors of the levels are overheard, and compared as distributions."""
    model = small(all_codes=all_codes, spectral_norm=False).train(training)
    x, said = fields(model), {"prior": [], "posterior": []}
    for level in model.decoder:
        for name, heard in said.items():
            if level.coded:
                getattr(level, name).register_forward_hook(lambda *call, heard=heard: heard.append(call[2]))
    with torch.no_grad():
        terms, main = model.loss({"x": x, "noise": noise(model)}), model.encode(x)
    assert len(said["prior"]) == len(said["posterior"]) == (2 if all_codes else 1)
    expected = torch.zeros(4, dtype=torch.float64)
    for prior, posterior in zip(said["prior"], said["posterior"], strict=True):
        mu, logvar = prior.double().chunk(2, 1)
        shift, log_scale = posterior.double().chunk(2, 1)
        p, q = Normal(mu, (0.5 * logvar).exp()), Normal(mu + shift, (0.5 * (logvar + log_scale)).exp())
        expected += kl_divergence(q, p).sum((1, 2))
    torch.testing.assert_close(terms["kl_levels"].double(), expected.mean(), rtol=1e-5, atol=1e-6)
    q = Normal(main.mu[:, :3], (0.5 * main.logvar).exp())
    torch.testing.assert_close(terms["kl"], kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean())
    assert terms["kl_levels"] > 0.1 and terms["kl"] > 0.01, "nothing was compared"


# --- loss and noise ---

ERRORS: dict[str, Callable] = {
    "mse": lambda d: d**2,
    "mae": lambda d: d.abs(),
    "smooth_l1": lambda d: torch.where(d.abs() < 0.1, d**2 / 0.2, d.abs() - 0.05),
    "huber": lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_is_the_one_asked_for_per_element(name: str) -> None:
    model = small(recon_loss=name).eval()
    x = fields(model)
    with torch.no_grad():
        terms, x_hat = model.loss({"x": x}), model(x)
    assert tuple(terms) == model.terms == (name, "kl", "kl_levels")
    torch.testing.assert_close(terms[name], ERRORS[name](x_hat - x).mean())


def test_no_noise_at_evaluation_and_some_in_training() -> None:
    model = small(spectral_norm=False).eval()
    x, before = fields(model), torch.get_rng_state()
    with torch.no_grad():
        assert model.loss({"x": x}) == model.loss({"x": x})
        z = model.encode(x).mu
        assert torch.equal(model.decode(z), model.decode(z)) and torch.equal(model(x), model.decode(z))
        assert torch.equal(before, torch.get_rng_state()), "evaluation drew a random number"
        model.train()
        assert model.loss({"x": x})["mse"] != model.loss({"x": x})["mse"]


@pytest.mark.parametrize("all_codes", [False, True])
def test_noise_of_the_batch_is_used_in_every_part(all_codes: bool) -> None:
    model = small(all_codes=all_codes, spectral_norm=False).train()
    x, drawn, before = fields(model), noise(model), torch.get_rng_state()
    with torch.no_grad():
        loss = model.loss({"x": x, "noise": drawn})["mse"]
        assert model.loss({"x": x, "noise": drawn})["mse"] == loss
        assert torch.equal(before, torch.get_rng_state()), "the loss drew a random number all the same"
        parts = [model.config.latent_dim, *model.level_dims]
        assert sum(parts) == model.noise_dim
        for i in range(len(parts)):
            changed = list(drawn.split(parts, 1))
            changed[i] = -changed[i]
            assert model.loss({"x": x, "noise": torch.cat(changed, 1)})["mse"] != loss, f"part {i} is unread"
        without = model.loss({"x": x, "noise": torch.zeros_like(drawn)})
        assert without == model.eval().loss({"x": x}), "noise of 0 is no noise"


def test_levels_are_drawn_from_their_posteriors() -> None:
    """Written out: each level adds a draw from its prior shifted and scaled by its posterior."""
    model = small(spectral_norm=False).train()
    x, drawn = fields(model), noise(model)
    main, *parts = drawn.split([3, *model.level_dims], 1)
    with torch.no_grad():
        posterior = model.encode(x)
        latents = model.latent_layout.unflatten(posterior.mu)
        state = model.start(latents["main"] + (0.5 * posterior.logvar).exp() * main)
        for i, level in enumerate(model.decoder):
            state = level(state)
            mu, logvar = level.prior(state).chunk(2, 1)
            shift, log_scale = level.posterior(torch.cat([level.expand(latents[f"level_{i}"]), state], 1)).chunk(2, 1)
            state = state + mu + shift + (0.5 * (logvar + log_scale)).exp() * parts[i].reshape(mu.shape)
        expected = (model.output(state) - x).square().mean()
        torch.testing.assert_close(model.loss({"x": x, "noise": drawn})["mse"], expected)


def test_input_is_encoded_in_place_of_x() -> None:
    model = small().eval()
    x, spoilt = fields(model), fields(model) + 0.1 * seeded(4, 5, 4, seed=3)
    with torch.no_grad():
        terms, clean = model.loss({"x": x, "input": spoilt}), model.loss({"x": spoilt})
        torch.testing.assert_close(terms["mse"], (model(spoilt) - x).square().mean())
    assert terms["kl"] == clean["kl"] and terms["kl_levels"] == clean["kl_levels"]
    assert terms["mse"] != clean["mse"]


# --- nothing is dead ---


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("all_codes", "dead"), [(True, set()), (False, {"to_code.0.weight", "to_code.0.bias"})], ids=["all codes", "not"]
)
def test_gradients_reach_every_parameter(all_codes: bool, dead: set[str], large: bool) -> None:
    """Without `all_codes` the code of the first level is computed for nothing, as published."""
    model = small(all_codes=all_codes, large=large, spectral_norm=False)
    sum(model.loss({"x": fields(model), "noise": noise(model)}).values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == dead


def test_gradients_pass_through_the_spectral_norm() -> None:
    model = small()
    sum(model.loss({"x": fields(model), "noise": noise(model)}).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("all_codes", "unread"), [(True, []), (False, ["level_1"])])
def test_the_field_depends_on_every_part_of_the_latent(all_codes: bool, unread: list[str]) -> None:
    model = small(all_codes=all_codes).eval()
    with torch.no_grad():
        z = model.encode(fields(model)).mu
        latents, x_hat = model.latent_layout.unflatten(z), model.decode(z)
        for name, part in latents.items():
            changed = model.decode(model.latent_layout.flatten(latents | {name: part + 1}))
            assert torch.equal(changed, x_hat) == (name in unread), name


# --- what is kept, drawn and put out ---


@pytest.mark.parametrize("normed", [False, True])
def test_a_saved_model_comes_back(normed: bool, tmp_path: Path) -> None:
    model = small(spectral_norm=normed, large=True, recon_loss="huber").train()
    with torch.no_grad():
        model(fields(model))
    save_model(tmp_path / "model.safetensors", model.eval(), "hierarchical_vae")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    again = build_model(config.pop("kind"), config)
    load_weights(again, load_safetensors(tmp_path / "model.safetensors"), tmp_path)
    assert again.config == model.config
    x = fields(model)
    with torch.inference_mode():
        assert torch.equal(again.eval()(x), model(x)) and again.loss({"x": x}) == model.loss({"x": x})


@pytest.mark.parametrize("all_codes", [False, True])
def test_samples_follow_the_priors_from_the_main_latent_down(all_codes: bool) -> None:
    """Written out level by level; the noise is a function of the generator, and the codes have no part in it."""
    model = small(all_codes=all_codes).eval()
    drawn = torch.randn(6, model.noise_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        a, b = (model.sample(6, torch.Generator().manual_seed(3)) for _ in range(2))
        parts = list(drawn.split([3, *model.level_dims], 1))
        state = model.start(parts.pop(0))
        for level in model.decoder:
            state = level(state)
            if level.coded:
                mu, logvar = level.prior(state).chunk(2, 1)
                state = state + mu + (0.5 * logvar).exp() * parts.pop(0).reshape(mu.shape)
        expected = model.output(state)
    assert not parts and torch.equal(a, b)
    torch.testing.assert_close(a, expected)


def test_a_norm_before_the_tanh_gives_every_field_the_same_mean_and_spread() -> None:
    """What `output_norm=False` is for: fields that differ in mean or spread cannot be told apart by either."""

    def before_tanh(output_norm: bool) -> torch.Tensor:
        model = small(output_norm=output_norm, spectral_norm=False).eval()
        with torch.no_grad():
            return model.decode(3 * seeded(6, model.latent_layout.size)).double().atanh().flatten(1)

    normed, free = before_tanh(True), before_tanh(False)
    torch.testing.assert_close(normed.mean(1), torch.zeros(6).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(normed.std(1, correction=0), torch.ones(6).double(), rtol=0, atol=1e-2)
    assert free.mean(1).std() > 100 * normed.mean(1).std(), "without it the means differ"
    assert free.std(1).std() > 100 * normed.std(1).std(), "without it the spreads differ"


def test_decode_names_the_length_of_its_latents() -> None:
    with pytest.raises(ValueError, match=r"z has 6 values per sample: must have 7 \(\{'main': \(3,\), 'level_0'"):
        small().decode(torch.zeros(1, 6))
