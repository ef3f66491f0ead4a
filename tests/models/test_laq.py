import math

import numpy as np
import pytest
import torch

from workbench.config import ConfigError
from workbench.information import perplexity
from workbench.models.laq import CONVOLUTIONS, LAQ, LAQConfig, lengths_of
from workbench.models.quantizers import FSQ, NSVQ, GaussianAction

SIZES = dict(
    image_size=16,
    patch_size=2,
    dim=12,
    spatial_depth=2,
    temporal_depth=1,
    heads=2,
    dim_head=4,
    codebook_size=6,
    code_dim=5,
)
QUANTIZERS = ("nsvq", "fsq", "continuous")


def small(**values: object) -> LAQ:
    torch.manual_seed(0)
    return LAQ(LAQConfig(**SIZES | values))


def frames(model: LAQ, n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    shape = (2, n, model.config.in_channels, model.config.image_size, model.config.image_size)
    first, x = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1
    return {"first": first, "x": x}


def noise(model: LAQ, n: int = 3) -> torch.Tensor:
    return torch.randn(n, model.noise_dim, generator=torch.Generator().manual_seed(2))


# --- sizes ---


def test_parameter_count_at_full_size() -> None:
    """343.8 million; the published one has 24 norms of 1024 numbers besides, which nothing reads."""
    with torch.device("meta"):
        count = sum(p.numel() for p in LAQ(LAQConfig()).parameters())
    assert count == 343_771_504 and round((count + 24 * 1024) / 1e6, 1) == 343.8 == round(count / 1e6, 1)


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [(1, []), (2, []), (6, []), (7, [1, 2, 4]), (8, [1, 2, 4]), (12, []), (13, [16]), (16, [16, 64]), (32, [256])],
)
def test_lengths_of_a_grid(grid: int, lengths: list[int]) -> None:
    assert lengths_of(grid) == lengths


@pytest.mark.parametrize("length", CONVOLUTIONS)
def test_every_length_gives_that_many_codes(length: int) -> None:
    grid = next(grid for grid in range(1, 40) if length in lengths_of(grid))
    model = small(image_size=2 * grid, code_seq_len=length, spatial_depth=1).eval()
    pair = frames(model, n=2)
    action = model.encode(**pair)
    assert action.indices.shape == (2, length) and action.codes.shape == action.difference.shape == (2, length, 5)
    assert model.decode(pair["first"], action.indices).shape == pair["x"].shape
    assert model.noise_dim == model.latent_layout.size == 5 * length


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"image_size": 250, "patch_size": 32},
            "image_size=250: must be divisible by patch_size=32; the nearest such size is 224 or 256",
        ),
        (
            {"image_size": 16, "patch_size": 32},
            "image_size=16: must be divisible by patch_size=32; the nearest such size is 32",
        ),
        (
            {"code_seq_len": 16},
            "code_seq_len=16: 8 x 8 patches (image_size=16, patch_size=2) give 1, 2 or 4 codes; "
            "16 need a grid with a side of 13, 14, 15 or 16, such as of patch_size=1 or image_size=32",
        ),
        (
            {"patch_size": 4},
            "code_seq_len=4: 4 x 4 patches (image_size=16, patch_size=4) give no number of codes; "
            "4 need a grid with a side of 7 or 8, such as of patch_size=2 or image_size=32",
        ),
        (
            {"patch_size": 5, "image_size": 25},
            "code_seq_len=4: 5 x 5 patches (image_size=25, patch_size=5) give no number of codes; "
            "4 need a grid with a side of 7 or 8, such as of image_size=40",
        ),
        ({"code_seq_len": 3}, "code_seq_len=3: must be 1, 2, 4, 16, 64 or 256"),
        ({"codebook_size": 1}, "codebook_size=1: must be at least 2"),
        ({"quantizer": "vq"}, "quantizer='vq': must be 'nsvq', 'fsq' or 'continuous'"),
    ],
)
def test_sizes_that_do_not_fit(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LAQConfig(**SIZES | values)
    assert str(caught.value) == message


def test_other_images_and_codes_are_refused() -> None:
    model = small()
    pair = frames(model)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8, 16\) \(c, h, w\): .* built for \(3, 16, 16\)"):
        model._patches(pair["x"][:, :, :8], "x")
    with pytest.raises(ValueError, match=r"first has shape \(1, 16, 16\)"):
        model.encode(pair["first"][:, :1], pair["x"][:, :1])
    with pytest.raises(ValueError, match=r"first has shape \(3, 8, 8\)"):
        model.decode(pair["first"][:, :, :8, :8], torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes of shape \(3, 2, 5\): must be \(3, 4, 5\) .*of shape \(3, 4\)"):
        model.decode(pair["first"], torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes of shape \(3, 4, 7\): must be \(3, 4, 5\)"):
        model.decode(pair["first"], torch.zeros(3, 4, 7))


@pytest.mark.parametrize("quantizer", ["nsvq", "fsq"])
@pytest.mark.parametrize("index", [-1, 6, 100])
def test_a_code_outside_the_codebook_is_refused(quantizer: str, index: int) -> None:
    model = small(quantizer=quantizer)
    indices = torch.zeros(3, 4, dtype=torch.int64)
    indices[1, 2] = index
    with pytest.raises(ValueError, match=f"^code {index}: must be from 0 to 5, as codebook_size is 6$"):
        model.decode(frames(model)["first"], indices)


def test_a_continuous_action_has_no_indices() -> None:
    model = small(quantizer="continuous")
    with pytest.raises(ValueError, match="quantizer=continuous has no indices: give vectors"):
        model.decode(frames(model)["first"], torch.zeros(3, 4, dtype=torch.int64))


# --- encode and decode ---


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_forward_decodes_what_it_encodes(quantizer: str) -> None:
    model = small(quantizer=quantizer).eval()
    pair = frames(model)
    with torch.no_grad():
        action, x_hat = model.encode(**pair), model(**pair)
        torch.testing.assert_close(model.decode(pair["first"], action.codes), x_hat)
        if quantizer != "continuous":
            torch.testing.assert_close(model.decode(pair["first"], action.indices), x_hat)


def test_the_action_is_a_difference() -> None:
    model = small()
    pair = frames(model)
    tokens = model.tokens(**pair)
    assert tokens.shape == (3, 2, 8, 8, 12)
    same = torch.stack((tokens[:, 0], tokens[:, 0]), 1)
    assert not model._difference(same).any() and model._difference(tokens).any()
    torch.testing.assert_close(model._difference(tokens.flip(1)), -model._difference(tokens))


def test_codes_are_reshaped_not_transposed() -> None:
    """The decoder's token j reads every n-th number of all codes together, from the j-th on."""
    model = small()
    pair, codes, seen = frames(model), torch.randn(3, 4, 5), []
    model.action_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.decode(pair["first"], codes)
    for j in range(4):
        assert torch.equal(seen[0][:, j], codes.flatten(1)[:, j::4])


def test_order_and_choice_of_codes_matter() -> None:
    model, codes = small().eval(), torch.tensor([[0, 1, 2, 3]])
    first = frames(model, n=1)["first"]
    with torch.no_grad():
        here, there, other = (model.decode(first, c) for c in (codes, codes.flip(1), torch.full_like(codes, 5)))
    assert not torch.allclose(here, there, atol=1e-3) and not torch.allclose(here, other, atol=1e-3)


def test_both_scales_of_frames_have_the_same_codes() -> None:
    """[0, 1] and [-1, 1]: the first layer normalises each patch."""
    model = small().eval()
    pair = frames(model, n=8)
    unit = {name: (value + 1) / 2 for name, value in pair.items()}
    with torch.no_grad():
        assert torch.equal(model.encode(**pair).indices, model.encode(**unit).indices)
        torch.testing.assert_close(model(**pair), model(**unit), rtol=0, atol=1e-3)


# --- loss ---


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_terms_of_the_loss(quantizer: str) -> None:
    model = small(quantizer=quantizer).eval()
    pair = frames(model)
    with torch.no_grad():
        terms = model.loss(pair)
        torch.testing.assert_close(terms.pop("mse"), ((model(**pair) - pair["x"]) ** 2).mean())
        if quantizer == "continuous":
            action = model.encode(**pair)
            kl = 0.5 * (action.mu**2 + action.logvar.exp() - 1 - action.logvar).sum((1, 2)).mean()
            torch.testing.assert_close(terms.pop("kl"), kl)
        else:
            indices = model.encode(**pair).indices
            assert float(terms.pop("codes_used")) == np.mean([len(place.unique()) for place in indices.T])
            expected = perplexity(indices, model.config.codebook_size).mean()
            assert float(terms.pop("perplexity")) == pytest.approx(expected, rel=1e-5)
    assert terms == {}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_noise_at_evaluation(quantizer: str) -> None:
    model = small(quantizer=quantizer).eval()
    pair, before = frames(model), torch.get_rng_state()
    with torch.no_grad():
        a, b = model.loss(pair)["mse"], model.loss(pair | {"noise": noise(model)})["mse"]
        assert a == b and torch.equal(model(**pair), model(**pair))
        model.train()
        assert torch.equal(model(**pair), model(**pair)) and torch.equal(
            model.encode(**pair).codes, model.encode(**pair).codes
        )
    assert torch.equal(before, torch.get_rng_state()), "a random number was drawn"
    if quantizer == "nsvq":
        assert model.quantizer.usage_batches == 0


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_is_a_function_of_the_noise_it_is_given(quantizer: str) -> None:
    model = small(quantizer=quantizer)
    assert model.noise_dim == {"nsvq": 20, "fsq": 0, "continuous": 20}[quantizer]
    pair = frames(model)
    with torch.no_grad():
        still = model.eval().loss(pair)["mse"]
        model.train()
        given = [model.loss(pair | {"noise": noise(model)})["mse"] for _ in range(2)]
        drawn = [model.loss(pair)["mse"] for _ in range(2)]
    assert given[0] == given[1]
    assert (drawn[0] != drawn[1]) == (given[0] != still) == (quantizer != "fsq")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_gradients_reach_every_parameter(quantizer: str) -> None:
    model = small(quantizer=quantizer)
    terms = model.loss(frames(model) | {"noise": noise(model)})
    sum(terms.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a difference has no offset, and neither has the softmax
    assert without == [] or set(without) <= {"position_bias.net.4.bias"}, without


def test_the_decoder_teaches_the_patches_nothing() -> None:
    """With no gradient through the code, the patch embedding has none."""
    model = small()
    pair = frames(model)
    model.decode(pair["first"], torch.zeros(3, 4, dtype=torch.int64)).sum().backward()
    assert all(p.grad is None for p in model.to_patches.parameters())
    assert model.to_pixels[0].weight.grad.any()


def test_a_few_steps_learn_a_batch() -> None:
    model = small(codebook_size=4)
    pair, optimizer = frames(model, n=4), torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(pair | {"noise": noise(model, 4)})["mse"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and all(map(math.isfinite, losses))


# --- the codebook in training ---


def test_training_counts_codes_and_replaces_unused_ones() -> None:
    model, generator = small(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.quantizer.codebook[1:] += 1000  # out of reach
    for _ in range(10):
        model.loss(frames(model))
    assert model.quantizer.code_usage.tolist() == [10, 0, 0, 0, 0, 0]
    assert model.replace_unused(generator) == 5
    assert model.quantizer.codebook.abs().max() < 10
    assert model.replace_unused(generator) == 0, "nothing has been counted since"


@pytest.mark.parametrize(("quantizer", "kind"), [("nsvq", NSVQ), ("fsq", FSQ), ("continuous", GaussianAction)])
def test_only_a_learned_codebook_has_codes_to_replace(quantizer: str, kind: type) -> None:
    model = small(quantizer=quantizer)
    model.loss(frames(model))
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert isinstance(model.quantizer, kind)
    if quantizer != "nsvq":
        assert model.replace_unused(torch.Generator()) == 0
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_state_dict_comes_back() -> None:
    for quantizer in QUANTIZERS:
        model, other = small(quantizer=quantizer).eval(), LAQ(LAQConfig(**SIZES | {"quantizer": quantizer})).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(model(**frames(model)), other(**frames(model)))


# --- predicting the change ---


def test_before_training_a_model_of_the_change_copies_the_first_frame() -> None:
    model = small(predicts="change").eval()
    pair = frames(model)
    assert torch.equal(model(**pair), pair["first"])


def test_the_change_is_added_to_the_first_frame_in_every_way_of_decoding() -> None:
    model = small(predicts="change").eval()
    torch.nn.init.normal_(model.to_pixels[0].weight, generator=torch.Generator().manual_seed(3))
    pair = frames(model)
    action, x_hat = model.encode(**pair), model(**pair)
    assert not torch.equal(x_hat, pair["first"])
    for given in (action.indices, action.codes):
        torch.testing.assert_close(model.decode(pair["first"], given), x_hat)
    model.config = model.config.model_copy(update={"predicts": "frame"})
    torch.testing.assert_close(pair["first"] + model(**pair), x_hat)
