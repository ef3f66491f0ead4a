import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from workbench import checkpoints
from workbench.checkpoints import (
    CheckpointError,
    build_model,
    load_checkpoint,
    load_foreign,
    load_safetensors,
    save_checkpoint,
    save_model,
    write_atomically,
)
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig

CONFIG = ConvVAEConfig(image_size=8, latent_dim=3, hidden_dims=[2, 4])
THEIRS = {"to_mu.": "fc_mu.", "to_logvar.": "fc_var.", "from_z.": "decoder_input.", "to_image.": "final_layer."}

Weights = dict[str, torch.Tensor]


@pytest.fixture
def model() -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(CONFIG).eval()


@pytest.fixture
def weights(model: ConvVAE) -> Weights:
    """The model's weights under the names of the reference implementation."""
    return {
        next((theirs + key[len(ours) :] for ours, theirs in THEIRS.items() if key.startswith(ours)), key): value
        for key, value in model.state_dict().items()
    }


class RunsCode:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


# --- foreign files ---


WRAPPED = {
    "plain": lambda weights: weights,
    "model_state_dict": lambda weights: {"model_state_dict": weights, "epoch": 3, "optimizer": {"lr": 0.1}},
    "state_dict": lambda weights: {"state_dict": weights},
    "module.": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "both": lambda weights: {"model_state_dict": {f"module.{key}": value for key, value in weights.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrappings_of_a_state_dict(model: ConvVAE, weights: Weights, wrap: Callable, tmp_path: Path) -> None:
    torch.save(wrap(weights), tmp_path / "their.pt")
    loaded = load_foreign("conv_vae", tmp_path / "their.pt")
    assert loaded.config == CONFIG and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_safetensors_and_the_old_pickle_format(model: ConvVAE, weights: Weights, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "their.safetensors")
    torch.save(weights, tmp_path / "their.pth", _use_new_zipfile_serialization=False)
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    for name in ("their.safetensors", "their.pth"):
        assert torch.equal(load_foreign("conv_vae", str(tmp_path / name))(x), model(x))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: w.pop("fc_mu.bias"), "1 missing: fc_mu.bias;"),
        (lambda w: w.pop("encoder.0.1.running_mean"), "1 missing: encoder.0.1.running_mean;"),
        (lambda w: w.update({"discriminator.weight": torch.zeros(1)}), "1 extra: discriminator.weight;"),
        (
            lambda w: w.update({"final_layer.3.bias": torch.zeros(7)}),
            "1 misshapen: final_layer.3.bias (7,) instead of (3,);",
        ),
        (lambda w: w.update({"final_layer.9.bias": torch.zeros(7)}), "1 extra: final_layer.9.bias;"),
        (
            lambda w: [w.pop(k) for k in list(w) if k.startswith("decoder.")],
            "7 missing: decoder.0.0.weight, decoder.0.0.bias, decoder.0.1.weight, decoder.0.1.bias, "
            "decoder.0.1.running_mean, …;",
        ),
    ],
    ids=["missing", "missing buffer", "extra", "misshapen", "extra renamed", "many"],
)
def test_keys_that_do_not_fit_are_named_as_the_file_names_them(
    weights: Weights, change: Callable, found: str, tmp_path: Path
) -> None:
    change(weights)
    path = tmp_path / "their.pt"
    torch.save(weights, path)
    with pytest.raises(CheckpointError) as caught:
        load_foreign("conv_vae", path)
    message = str(caught.value)
    assert message.startswith(
        f"{path} does not fit ConvVAE(image_size=8 in_channels=3 latent_dim=3 hidden_dims=[2, 4])"
    )
    assert found in message
    assert message.endswith("give the configuration it was trained with")


def test_a_configuration_of_another_size_is_refused(weights: Weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "their.pt")
    with pytest.raises(CheckpointError, match=r"fc_mu\.weight \(3, 16\) instead of \(5, 16\)"):
        load_foreign("conv_vae", tmp_path / "their.pt", ConvVAEConfig(image_size=8, latent_dim=5, hidden_dims=[2, 4]))


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, old_format: bool, wrapped: bool) -> None:
    evil, path = RunsCode(tmp_path / "it ran"), tmp_path / "their.pt"
    content = {"model_state_dict": {"a": torch.zeros(1)}, "callback": evil} if wrapped else evil
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError) as caught:
        load_foreign("conv_vae", path)
    assert not (tmp_path / "it ran").exists()
    assert str(caught.value).startswith(f"{path}: refused, as it holds more than tensors and plain values, and reading")
    assert "could run code" in str(caught.value) and "mkdir" in str(caught.value)
    assert "save the state dict alone" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle_that_would_run_code_does_not(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "their.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "it ran"), protocol=protocol))
    with pytest.raises(CheckpointError, match="their.pt: refused, as it holds more"):
        load_foreign("conv_vae", tmp_path / "their.pt")
    assert not (tmp_path / "it ran").exists()
    pickle.loads((tmp_path / "their.pt").read_bytes())  # noqa: S301  the same bytes do run elsewhere
    assert (tmp_path / "it ran").exists()


def test_a_whole_pickled_module_is_refused(model: ConvVAE, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "their.pt")
    with pytest.raises(CheckpointError, match="refused.*GLOBAL workbench.models.conv_vae.ConvVAE"):
        load_foreign("conv_vae", tmp_path / "their.pt")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_short_is_damaged(weights: Weights, tmp_path: Path, share: float, suffix: str) -> None:
    path = tmp_path / f"their{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError) as caught:
        load_foreign("conv_vae", path)
    assert str(caught.value).startswith(f"{path}: damaged or not a ")
    assert "restore a copy of it" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_damage_escapes_as_another_error(weights: Weights, tmp_path: Path) -> None:
    random, path = np.random.default_rng(0), tmp_path / "their.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(150):
        damaged = whole[: random.integers(len(whole))].copy() if random.random() < 0.3 else whole.copy()
        places = random.integers(0, max(1, len(damaged)), 20)
        damaged[places[: len(damaged)]] = random.integers(0, 256, len(places[: len(damaged)]), np.uint8)
        path.write_bytes(damaged.tobytes())
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1)}, "has no encoder.0.0.weight or fc_mu.weight, so it is no conv_vae checkpoint"),
        ({"a": 1.0}, "holds no state dict (names to tensors); give the file of the model's weights"),
        ([torch.zeros(1)], "holds no state dict (names to tensors); give the file of the model's weights"),
        (
            {"encoder.0.0.weight": torch.zeros(4, 3, 3, 3), "fc_mu.weight": torch.zeros(5, 7)},
            "fc_mu.weight reads 7 features, which are no square images of 4 channels",
        ),
        (
            {"encoder.0.0.weight": torch.zeros(4), "fc_mu.weight": torch.zeros(5, 7)},
            "fc_mu.weight must have 2 axes and each encoder.*.0.weight 4; give config",
        ),
        (
            {"a": torch.zeros(1), "module.a": torch.ones(1)},
            "holds some keys both with and without the prefix 'module.'; keep one of each",
        ),
    ],
)
def test_other_content_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "their.pt")
    with pytest.raises(CheckpointError) as caught:
        load_foreign("conv_vae", tmp_path / "their.pt")
    assert str(caught.value) == f"{tmp_path / 'their.pt'}: {message}"


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_an_absent_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_foreign("conv_vae", tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: no such file"


def test_an_unknown_kind() -> None:
    with pytest.raises(CheckpointError, match="kind 'conv_vea': must be one of conv_vae"):
        load_foreign("conv_vea", "x.pt")
    with pytest.raises(CheckpointError, match="model kind 'conv_vea': must be one of conv_vae"):
        build_model("conv_vea", {})


# --- our own files ---


def test_a_saved_model_comes_back(model: ConvVAE, tmp_path: Path) -> None:
    from safetensors import safe_open

    model.to(memory_format=torch.channels_last)
    save_model(tmp_path / "model.safetensors", model, "conv_vae")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"kind": "conv_vae"} | CONFIG.model_dump()
    before = (tmp_path / "model.safetensors").read_bytes()
    save_model(tmp_path / "model.safetensors", model, "conv_vae")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = load_safetensors(tmp_path / "model.safetensors")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_round_trip(model: ConvVAE, tmp_path: Path) -> None:
    state = {"model": model.state_dict(), "step": 7, "best": float("inf"), "validated": True}
    save_checkpoint(tmp_path / "last.ckpt", state)
    again = load_checkpoint(tmp_path / "last.ckpt")
    assert again.keys() == state.keys() and again["best"] == float("inf") and again["step"] == 7
    assert all(torch.equal(again["model"][key], value) for key, value in state["model"].items())
    assert list(tmp_path.iterdir()) == [tmp_path / "last.ckpt"]


@pytest.mark.parametrize("what", ["checkpoint", "bytes"])
def test_dying_before_the_rename_leaves_the_old_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2}) if what == "checkpoint" else write_atomically(path, b"new")
    assert load_checkpoint(path) == {"step": 1}


def test_a_disk_that_fails_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(path, {"step": 2})
    assert str(caught.value) == (
        f"{path}: cannot be written ([Errno 28] No space left on device); the checkpoint before it is whole: "
        "see to the disk and run again"
    )
    assert load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full fails on every write, in torch's archive writer."""
    (tmp_path / "last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="last.ckpt: cannot be written .*No space left on device"):
        save_checkpoint(tmp_path / "last.ckpt", {"a": torch.zeros(100_000)})


def test_a_model_for_which_there_is_no_room_is_named_and_leaves_nothing(model: ConvVAE, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.with_name("model.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError) as caught:
        save_model(path, model, "conv_vae")
    assert str(caught.value) == (
        f"{path}: cannot be written ([Errno 28] No space left on device); the training's checkpoints are whole: see to "
        "the disk and run again"
    )
    assert list(tmp_path.iterdir()) == []
