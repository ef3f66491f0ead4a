from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from workbench.checkpoints import load_foreign
from workbench.models import MODELS
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig
from workbench.models.weight_autoencoder import WeightAutoencoder, WeightAutoencoderConfig
from workbench.published import PUBLISHED, CheckpointError, levels, rename

DATA = Path(__file__).parent / "data"
SMALL = HierarchicalVAEConfig(nodes=5, steps=4, latent_dim=3, hier_latent_dim=2, filters=[6, 4, 3], all_codes=False)
GOLDEN = ["conv_vae", "simulation_vae", "weight_autoencoder"]

Weights = dict[str, torch.Tensor]


def golden(kind: str) -> Weights:
    with safe_open(DATA / f"{kind}.safetensors", "pt") as file:
        return {key.removeprefix("weights."): file.get_tensor(key) for key in file.keys() if key[:8] == "weights."}


def published(config: HierarchicalVAEConfig = SMALL) -> Weights:
    """Weights of a small model under their names."""
    torch.manual_seed(0)
    weights = HierarchicalVAE(config).state_dict()
    theirs = PUBLISHED["simulation_vae"].theirs(weights)
    return with_unread({theirs[key]: tensor for key, tensor in weights.items()})


def with_unread(weights: Weights) -> Weights:
    """With the layers that their model never reads, of whatever shape."""
    names = ("encoder.xs_linear.2.bias", "decoder.condition_z.1.2.bias", "decoder.condition_xz.1.2.bias")
    return weights | dict.fromkeys((*names, "decoder.xs_sequence.1.0.bias"), torch.zeros(1))


# --- names ---


def test_parts_of_names_are_replaced_in_turn() -> None:
    keys = ["a.0.x", "b.a.0.x", "a.12.y_v", "other"]
    parts = [("a.{}.", "c.{}.d."), (".y_v", ".z"), ("c.0.", "e.")]
    assert rename(keys, parts) == {"a.0.x": "e.d.x", "b.a.0.x": "b.a.0.x", "a.12.y_v": "c.12.d.z", "other": "other"}


def test_a_dot_in_a_part_is_a_dot() -> None:
    assert rename(["aXb"], [("a.b", "c")]) == {"aXb": "aXb"}


def test_levels_are_numbers_in_order() -> None:
    keys = ("a.10.w", "a.2.w", "a.2.v", "b.3.w", "a.x.w")
    assert levels(dict.fromkeys(keys, torch.zeros(1)), r"a\.(\d+)\.") == [2, 10]


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_names_are_a_bijection(kind: str) -> None:
    importer, keys = PUBLISHED[kind], list(golden(kind))
    ours = importer.ours(keys)
    assert len(set(ours.values())) == len(keys), "two names became one"
    assert importer.theirs(ours.values()) == {name: key for key, name in ours.items()}
    assert any(key != name for key, name in ours.items())


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_names_are_those_of_our_model(kind: str) -> None:
    importer = PUBLISHED[kind]
    read = importer.convert(golden(kind))
    config = importer.infer(read, Path("their.pt"))
    assert read.keys() == MODELS[importer.kind][0](config).state_dict().keys()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"large": True},
        {"spectral_norm": False},
        {"spectral_norm": False, "large": True, "output_norm": False},
        {"filters": [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1], "spectral_norm": False},
        {"filters": [6, 4]},
    ],
    ids=["small", "large", "no spectral norm", "no output norm", "two digits", "two levels"],
)
def test_sizes_and_weights_are_read_off(settings: dict, tmp_path: Path) -> None:
    config = HierarchicalVAEConfig(**SMALL.model_dump() | settings)
    torch.manual_seed(0)
    model, last = HierarchicalVAE(config), len(config.filters) - 1
    theirs = PUBLISHED["simulation_vae"].theirs(model.state_dict())
    weights = {theirs[key]: tensor for key, tensor in model.state_dict().items()}
    weights[f"encoder.xs_linear.{last}.bias"] = torch.zeros(2)
    for group in ("condition_z", "condition_xz", "xs_sequence"):
        weights[f"decoder.{group}.{last - 1}.2.bias"] = torch.zeros(2)
    torch.save(weights, tmp_path / "their.pt")
    again = load_foreign("simulation_vae", tmp_path / "their.pt")
    assert again.config == config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


# --- what their model never reads ---


def test_unread_keys_are_exactly_those_of_the_last_level() -> None:
    weights = golden("simulation_vae")
    unread = PUBLISHED["simulation_vae"].unread(weights)
    groups = ("encoder.xs_linear.2.", "decoder.condition_z.1.", "decoder.condition_xz.1.", "decoder.xs_sequence.1.")
    assert unread == {key for key in weights if key.startswith(groups)}
    assert all(any(key.startswith(group) for key in unread) for group in groups)
    assert PUBLISHED["conv_vae"].unread(golden("conv_vae")) == set()


# --- what does not fit ---

NO_CHECKPOINT = (
    "has no encoder.encoder_blocks.*, encoder.last_x_linear or encoder.xs_linear.0 of the simulation VAE, so it is no "
    "simulation_vae checkpoint"
)
AXES = (
    "encoder.last_x_linear and encoder.xs_linear.0 must have weights of 2 axes and each encoder.encoder_blocks.* of 3; "
    "give config"
)
MAIN, FIRST, SECOND = (
    f"encoder.{layer}.weight_orig"
    for layer in (
        "last_x_linear",
        "encoder_blocks.0.module_list.0._seq.0",
        "encoder_blocks.1.module_list.0._seq.0",
    )
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.clear() or w.update(a=torch.zeros(1)), NO_CHECKPOINT),
        (lambda w: w.pop(MAIN), NO_CHECKPOINT),
        (lambda w: w.pop("encoder.xs_linear.0.weight_orig"), NO_CHECKPOINT),
        (lambda w: w.pop(SECOND), NO_CHECKPOINT),
        (lambda w: w.update({MAIN: torch.zeros(6)}), AXES),
        (lambda w: w.update({FIRST: torch.zeros(6, 5)}), AXES),
        (
            lambda w: w.update({MAIN: torch.zeros(6, 13)}),
            "encoder.last_x_linear has a weight of shape (6, 13), which is not twice the main latent by 3 channels "
            "times the time steps",
        ),
        (
            lambda w: w.update({MAIN: torch.zeros(7, 12)}),
            "encoder.last_x_linear has a weight of shape (7, 12), which is not twice the main latent by 3 channels "
            "times the time steps",
        ),
        (
            lambda w: w.update({MAIN: torch.zeros(6, 0)}),
            "encoder.last_x_linear has a weight of shape (6, 0), which is not twice the main latent by 3 channels "
            "times the time steps",
        ),
    ],
    ids=["other", "no main", "no code", "no level", "main axes", "level axes", "features", "odd latent", "empty"],
)
def test_other_content_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    weights = published()
    change(weights)
    torch.save(weights, tmp_path / "their.pt")
    with pytest.raises(CheckpointError) as caught:
        load_foreign("simulation_vae", tmp_path / "their.pt")
    assert str(caught.value) == f"{tmp_path / 'their.pt'}: {message}"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w.pop("encoder.last_x_linear.weight_u"), "1 missing: encoder.last_x_linear.weight_u;"),
        (lambda w: w.pop("decoder.recon.1.bias"), "1 missing: decoder.recon.1.bias;"),
        (lambda w: w.update({"critic.weight": torch.zeros(1)}), "1 extra: critic.weight;"),
        (
            lambda w: w.update({"decoder.condition_z.0.2.bias": torch.zeros(7)}),
            "1 misshapen: decoder.condition_z.0.2.bias (7,) instead of (8,);",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named_as_the_file_names_them(change: Callable, found: str, tmp_path: Path) -> None:
    weights = published()
    change(weights)
    torch.save(weights, tmp_path / "their.pt")
    with pytest.raises(CheckpointError) as caught:
        load_foreign("simulation_vae", tmp_path / "their.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'their.pt'} does not fit HierarchicalVAE(")
    assert found in str(caught.value)
    assert str(caught.value).endswith("give the configuration it was trained with")


def test_a_configuration_that_reads_every_code_is_refused(tmp_path: Path) -> None:
    """The published weights of the first level were never trained, so they are not to be read."""
    torch.save(published(), tmp_path / "their.pt")
    with pytest.raises(CheckpointError, match=r"missing: decoder\.condition_z\.1\.0\._seq\.0\.bias"):
        load_foreign("simulation_vae", tmp_path / "their.pt", SMALL.model_copy(update={"all_codes": True}))


# --- the autoencoder of weights ---


def published_weight_autoencoder(**settings: Any) -> tuple[WeightAutoencoder, Weights]:
    """A small model, and its weights under their names."""
    small = {"max_len": 9, "fdim": 64, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 3}
    torch.manual_seed(0)
    model = WeightAutoencoder(WeightAutoencoderConfig(**small | settings))
    model.error_logvar.data.fill_(-2.5)
    theirs = PUBLISHED["weight_autoencoder"].theirs(model.state_dict())
    return model, {theirs[key]: tensor for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ch_mult": [1], "fdim": 25, "embed_dim": 7},
        {"ch_mult": [2, 1, 3], "num_res_blocks": 2, "attn_resolutions": [8, 2], "ch": 2},
    ],
    ids=["small", "one level", "attention"],
)
def test_an_autoencoder_of_weights_is_read_off_with_its_learned_scale(settings: dict, tmp_path: Path) -> None:
    model, weights = published_weight_autoencoder(**settings)
    assert {"loss.logvar", "encoder.mid.attn_1.proj_out.bias", "decoder.up.0.block.1.conv2.weight"} <= weights.keys()
    discriminator = {"loss.discriminator.main.0.bias": torch.zeros(3)}
    torch.save({"state_dict": weights | discriminator}, tmp_path / "their.pt")
    again = load_foreign("weight_autoencoder", tmp_path / "their.pt")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("encoder.fc_in.weight"),
            "has no encoder.fc_in, encoder.conv_in, encoder.down.*.block.0, decoder.conv_in or post_quant_conv, so it "
            "is no weight_autoencoder checkpoint",
        ),
        (
            lambda w: w.update({"decoder.conv_in.weight": torch.zeros(8, 3)}),
            "encoder.fc_in must have a weight of 2 axes and each convolution one of 4; give config",
        ),
        (
            lambda w: w.update({"encoder.fc_in.weight": torch.zeros(60, 9)}),
            "fdim=60: must be the square of a multiple of 2 = 2 ** (len(ch_mult) - 1); the nearest such are 36 and 64; "
            "give the configuration it was trained with",
        ),
        (
            lambda w: w.update({"encoder.conv_in.weight": torch.zeros(0, 1, 3, 3)}),
            "ch=0: must be at least 2; give the configuration it was trained with",
        ),
    ],
    ids=["no input layer", "axes", "no square", "empty"],
)
def test_other_content_is_no_autoencoder_of_weights(change: Callable, message: str, tmp_path: Path) -> None:
    _, weights = published_weight_autoencoder()
    change(weights)
    torch.save(weights, tmp_path / "their.pt")
    with pytest.raises(CheckpointError) as caught:
        load_foreign("weight_autoencoder", tmp_path / "their.pt")
    assert str(caught.value) == f"{tmp_path / 'their.pt'}: {message}"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w.pop("decoder.fc_out.bias"), "1 missing: decoder.fc_out.bias;"),
        (lambda w: w.pop("decoder.up.1.upsample.conv.bias"), "1 missing: decoder.up.1.upsample.conv.bias;"),
        (
            lambda w: w.update({"encoder.down.1.attn.0.q.bias": torch.zeros(8)}),
            "1 extra: encoder.down.1.attn.0.q.bias;",
        ),
        (
            lambda w: w.update({"encoder.conv_in.weight": torch.zeros(4, 2, 3, 3)}),
            "1 misshapen: encoder.conv_in.weight (4, 2, 3, 3) instead of (4, 1, 3, 3);",
        ),
    ],
    ids=["missing", "missing level", "extra", "two channels"],
)
def test_weights_that_do_not_fit_their_autoencoder_are_named(change: Callable, found: str, tmp_path: Path) -> None:
    _, weights = published_weight_autoencoder()
    change(weights)
    torch.save(weights, tmp_path / "their.pt")
    with pytest.raises(CheckpointError) as caught:
        load_foreign("weight_autoencoder", tmp_path / "their.pt")
    assert found in str(caught.value)
