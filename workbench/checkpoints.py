"""Weights on disk: atomic training checkpoints, model.safetensors, and importers of foreign checkpoints.

Nothing here runs code from a file: checkpoints are read with `weights_only`, models as safetensors.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from workbench.config import Config
from workbench.models import MODELS
from workbench.models.conv_vae import ConvVAEConfig


class CheckpointError(ValueError):
    """A file of weights cannot be read, or does not fit the model; the message names the file and the remedy."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that `path` always holds either its old content or all of the new: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        handle.write(data)
        _publish(handle, temporary, path)


def _publish(handle: Any, temporary: Path, path: Path) -> None:
    """Make a written temporary file durable under its final name."""
    handle.flush()
    os.fsync(handle.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically; a kill at any instant leaves the previous checkpoint whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        torch.save(state, handle)
        _publish(handle, temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a training checkpoint onto the CPU, without running code from it.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: refused, as it holds more than tensors and plain values, and reading it could run code ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{path}: no such file") from None
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({reason}); restore a copy of it, or move it aside to begin again"
        ) from None


def save_model(path: Path, model: nn.Module, kind: str) -> None:
    """Write `model.safetensors` atomically, with the model's kind and configuration as metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"kind": kind, "config": json.dumps(model.config.model_dump())}
    write_atomically(path, save(tensors, metadata))


def build_model(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of a known kind.

    Raises:
        CheckpointError: unknown kind.
    """
    if kind not in MODELS:
        raise CheckpointError(f"model kind {kind!r}: must be one of {', '.join(MODELS)}")
    model_class, config_class = MODELS[kind]
    return model_class(config_class(**config))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a model: every key must be there, none may be extra, every shape must fit.

    Raises:
        CheckpointError: naming up to five keys of each kind of misfit.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
        for what, keys in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}({model.config}): {'; '.join(problems)}; "
            "give the configuration it was trained with"
        )
    model.load_state_dict(dict(weights), strict=True)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: absent or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}); restore a copy of it") from None


def load_foreign(kind: str, path: str | Path, config: Config | None = None) -> nn.Module:
    """Load a checkpoint that another code base wrote, strictly, into a model in evaluation mode.

    Accepts safetensors, a plain state dict, `{"model_state_dict": …}` or `{"state_dict": …}`, and keys with a
    `module.` prefix.

    Args:
        kind: A key of `FOREIGN`.
        path: The file.
        config: The model's configuration; read off the shapes when None.

    Raises:
        CheckpointError: unknown kind, damaged file, a file that would run code, or keys that do not fit.
    """
    if kind not in FOREIGN:
        raise CheckpointError(f"kind {kind!r}: must be one of {', '.join(FOREIGN)}")
    path = Path(path)
    weights = _state_dict(path)
    rename, infer = FOREIGN[kind]
    weights = {rename(key): tensor for key, tensor in weights.items()}
    model = MODELS[kind][0](config or infer(weights, path))
    load_weights(model, weights, path)
    return model.eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (names to tensors); give the file of the model's weights")
    return {key.removeprefix("module."): value for key, value in content.items()}


_CONV_VAE_NAMES = {
    "fc_mu.": "to_mu.",
    "fc_var.": "to_logvar.",
    "decoder_input.": "from_z.",
    "final_layer.": "to_image.",
}


def _rename_conv_vae(key: str) -> str:
    return next((ours + key[len(name) :] for name, ours in _CONV_VAE_NAMES.items() if key.startswith(name)), key)


def _infer_conv_vae(weights: Mapping[str, Tensor], path: Path) -> ConvVAEConfig:
    """Sizes of a ConvVAE from the shapes of its encoder and its latent layer."""
    stages = sorted(int(match[1]) for key in weights if (match := re.fullmatch(r"encoder\.(\d+)\.0\.weight", key)))
    if not stages or "to_mu.weight" not in weights:
        raise CheckpointError(f"{path}: has no encoder.0.0.weight or fc_mu.weight, so it is no conv_vae checkpoint")
    dims = [weights[f"encoder.{i}.0.weight"].shape[0] for i in stages]
    latent_dim, features = weights["to_mu.weight"].shape
    return ConvVAEConfig(
        image_size=round((features / dims[-1]) ** 0.5) * 2 ** len(dims),
        in_channels=weights["encoder.0.0.weight"].shape[1],
        latent_dim=latent_dim,
        hidden_dims=dims,
    )


FOREIGN = {"conv_vae": (_rename_conv_vae, _infer_conv_vae)}
