import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from workbench.checkpoints import CheckpointError, load_weights
from workbench.config import ConfigError
from workbench.models.laq import CONVOLUTIONS, LAQ, LAQConfig, lengths_of
from workbench.models.laq_published import UNREAD, from_published, infer_config, published_name

REFERENCE = Path(__file__).parents[1] / "data" / "laq.safetensors"
FILE = Path("laq.pt")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference() -> tuple[Weights, dict]:
    with safe_open(REFERENCE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


@pytest.fixture
def published(reference: tuple[Weights, dict]) -> Weights:
    return {k.removeprefix("weights."): v for k, v in reference[0].items() if k.startswith("weights.")}


def loaded(weights: Weights, image_size: int | None = None) -> LAQ:
    ours = from_published(weights)
    model = LAQ(infer_config(ours, FILE, image_size)).eval()
    load_weights(model, ours, FILE, {key: published_name(key) for key in {**ours, **model.state_dict()}})
    return model


# --- the reference implementation ---


def test_equals_the_reference_implementation(reference: tuple[Weights, dict], published: Weights) -> None:
    tensors, config = reference
    model = loaded(published, config["image_size"])
    assert model.config == LAQConfig(code_dim=config.pop("quant_dim"), **config)
    first, x = tensors["input.video"].unbind(2)
    with torch.inference_mode():
        action, tokens = model.encode(first, x), model.tokens(first, x)
        assert torch.equal(action.indices, tensors["output.codes"])
        assert len(tensors["output.codes"].unique()) > 2 and tensors["output.reconstruction"].std() > 0.1
        found = {
            "first_tokens": tokens[:, :1],
            "last_tokens": tokens[:, 1:],
            "reconstruction": model.decode(first, action.indices),
            "reconstruction_all_codes_3": model.decode(first, torch.full_like(action.indices, 3)),
        }
        torch.testing.assert_close(model(first, x), found["reconstruction"], rtol=0, atol=1e-6)
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"output.{name}"], rtol=0, atol=1e-4)


def test_names_are_translated_there_and_back(published: Weights) -> None:
    ours = from_published(published)
    counters = {"quantizer.code_usage", "quantizer.usage_batches"}
    assert len({published_name(key) for key in ours}) == len(ours)
    assert {published_name(key) for key in ours.keys() - counters} <= published.keys()
    dropped = published.keys() - {published_name(key) for key in ours}
    for key in dropped:
        assert re.sub(r"^layers\.\d+\.", "layers.#.", key.split("_transformer.")[1]) in UNREAD
    assert len(dropped) == 6 * 4 + 2 * 2 + 3, "of 6 self-attentions, 2 cross-attentions and 3 stacks"


# --- strictness ---


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w.pop("vq.project_in.bias"), "1 missing: vq.project_in.bias;"),
        (
            lambda w: w.pop("dec_spatial_transformer.layers.1.2.context_norm.gamma"),
            "1 missing: dec_spatial_transformer.layers.1.2.context_norm.gamma;",
        ),
        (lambda w: w.update({"discriminator.beta": torch.zeros(1)}), "1 extra: discriminator.beta;"),
        (
            lambda w: w.update({"enc_spatial_transformer.layers.0.1.norm.beta": torch.full((32,), 0.1)}),
            "1 extra: enc_spatial_transformer.layers.0.1.norm.beta;",
        ),
        (
            lambda w: w.update({"enc_spatial_transformer.layers.0.1.null_kv": torch.ones(2, 4, 16)}),
            "1 extra: enc_spatial_transformer.layers.0.1.null_kv;",
        ),
        (
            lambda w: w.update({"vq.project_out.bias": torch.zeros(7)}),
            "1 misshapen: vq.project_out.bias (7,) instead of (32,);",
        ),
        (
            lambda w: w.update({"enc_temporal_transformer.layers.1.3.4.weight": torch.zeros(32, 7)}),
            "1 misshapen: enc_temporal_transformer.layers.1.3.4.weight (32, 7) instead of (32, 85);",
        ),
    ],
    ids=["missing", "missing norm", "extra", "a beta that counts", "null pairs", "misshapen", "misshapen layer"],
)
def test_keys_that_do_not_fit_are_named_as_the_file_names_them(
    published: Weights, change: Callable, found: str
) -> None:
    change(published)
    with pytest.raises(CheckpointError) as caught:
        loaded(published, 64)
    assert found in str(caught.value)


# --- sizes read off the shapes ---


def on_meta(**values: object) -> tuple[LAQConfig, Weights]:
    small = dict(dim=6, spatial_depth=3, temporal_depth=2, heads=3, dim_head=5, codebook_size=9, code_dim=4)
    config = LAQConfig(**small | values)
    with torch.device("meta"):
        return config, LAQ(config).state_dict()


@pytest.mark.parametrize("length", CONVOLUTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_inferred_at_the_published_image_size(length: int, channels: int) -> None:
    grid = max(grid for grid in (8, 16, 32) if length in lengths_of(grid))
    config, weights = on_meta(code_seq_len=length, patch_size=256 // grid, in_channels=channels)
    assert infer_config(weights, FILE) == config


@pytest.mark.parametrize("length", CONVOLUTIONS)
def test_sizes_are_inferred_where_the_image_size_is_known(length: int) -> None:
    grid = max(grid for grid in range(40) if length in lengths_of(grid))
    config, weights = on_meta(code_seq_len=length, patch_size=5, image_size=5 * grid)
    assert infer_config(weights, FILE, 5 * grid) == config


@pytest.mark.parametrize("length", [1, 2])
def test_convolutions_of_one_grid_tell_the_image_size(length: int) -> None:
    config, weights = on_meta(code_seq_len=length, patch_size=12, image_size=96)
    assert infer_config(weights, FILE) == config


def test_an_image_size_that_cannot_be_told_is_asked_for(published: Weights) -> None:
    message = (
        "laq.pt: its convolutions give 4 codes on images of 64 px or 16 codes on images of 128 px, and the weights do "
        "not tell which; give config, with its image_size"
    )
    with pytest.raises(ValueError) as caught:
        loaded(published)
    assert str(caught.value) == message
    assert loaded(published, 128).config.code_seq_len == 16
    with pytest.raises(ValueError, match="16 codes on images of 128 px, not on image_size=80; give config"):
        loaded(published, 80)
    with pytest.raises(ConfigError, match="image_size=66: must be divisible by patch_size=8"):
        loaded(published, 66)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.clear(), "has no to_patch_emb_first_frame.2.weight, vq.codebooks, .* so it is no laq checkpoint"),
        (lambda w: w.update({"vq.codebooks": torch.zeros(3)}), r"vq.codebooks \(3,\) must have 2 axes; give config"),
        (
            lambda w: w.update({"to_patch_emb_first_frame.2.weight": torch.zeros(32, 191)}),
            "to_patch_emb_first_frame.2.weight reads 191 values, which are no square patches of 3 channels or of 1",
        ),
        (
            lambda w: w.update({"vq.cnn_encoder.2.weight": torch.zeros(8, 8, 5, 5)}),
            r"vq.cnn_encoder has kernels \[\(3, 3\), \(5, 5\)\], which no known code_seq_len has",
        ),
    ],
    ids=["nothing", "axes", "patches", "kernels"],
)
def test_other_content_is_refused(published: Weights, change: Callable, message: str) -> None:
    change(published)
    with pytest.raises(ValueError, match=f"^laq.pt: {message}"):
        loaded(published)
