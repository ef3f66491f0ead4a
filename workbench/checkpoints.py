"""Weights on disk: atomic training checkpoints, model.safetensors, and importers of foreign checkpoints.

Nothing here runs code from a file: checkpoints are read with `weights_only`, models as safetensors.
"""

import json
import os
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from workbench.config import Config
from workbench.models import MODELS
from workbench.published import PUBLISHED, CheckpointError

DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
"""What reading a damaged checkpoint raises."""
NAMED_KEYS = 5


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that `path` always holds either its old content or all of the new: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            _publish(handle, temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
    """Save tensors and plain values atomically; a kill at any instant leaves the previous checkpoint whole.

    Raises:
        CheckpointError: the disk is full, or fails otherwise.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as handle:
            torch.save(state, handle)
            _publish(handle, temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error  # torch hides the disk's error
        reason = str(cause).split("\n")[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); the checkpoint before it is whole: see to the disk and run again"
        ) from None


def load_checkpoint(path: Path, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without running code from it.

    Args:
        path: The file.
        needs: Keys that it must have.

    Raises:
        CheckpointError: the file is damaged, holds anything but tensors and plain values, or lacks a key.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no state dict (names to tensors); give the file of the model's weights")
    absent = [key for key in needs if key not in content]
    if absent:
        raise CheckpointError(f"{path}: holds no {', '.join(absent)}, so no training goes on from it; move it aside")
    return content


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error.__context__ or error).split("\n")[0].split(". Please")[0]
        raise CheckpointError(
            f"{path}: refused, as it holds more than tensors and plain values, and reading that could run code "
            f"({reason}); save the state dict alone, with torch.save or as safetensors"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except DAMAGE as error:
        reason = str(error).split("\n")[0].split(". This is")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({reason}); restore a copy of it, or move it aside to begin again"
        ) from None


def save_model(path: Path, model: nn.Module, kind: str) -> None:
    """Write `model.safetensors` atomically, with the model's kind and configuration as metadata key `config`.

    One key alone, as safetensors writes several in no fixed order: the same weights give the same bytes.

    Raises:
        CheckpointError: the disk is full, or fails otherwise.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"config": json.dumps({"kind": kind} | model.config.model_dump())}
    try:
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        whole = "the training's checkpoints are whole: see to the disk and run again"
        raise CheckpointError(f"{path}: cannot be written ({error}); {whole}") from None


def build_model(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of a known kind.

    Raises:
        CheckpointError: unknown kind.
    """
    if kind not in MODELS:
        raise CheckpointError(f"model kind {kind!r}: must be one of {', '.join(MODELS)}")
    model_class, config_class = MODELS[kind]
    return model_class(config_class(**config))


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: Path, names: Mapping[str, str] | None = None
) -> None:
    """Copy weights into a model: every key must be there, none may be extra, every shape must fit.

    Args:
        names: What a message calls a key, where the file has another name for it.

    Raises:
        CheckpointError: naming up to five keys of each kind of misfit.
    """
    expected, named = model.state_dict(), names or {}
    missing = [named.get(key, key) for key in expected if key not in weights]
    extra = [named.get(key, key) for key in weights if key not in expected]
    misshapen = [
        f"{named.get(key, key)} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:NAMED_KEYS])}{', …' if len(keys) > NAMED_KEYS else ''}"
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


def load_foreign(kind: str, path: str | Path, config: Config | None = None, image_size: int | None = None) -> nn.Module:
    """Load a checkpoint that another code base wrote, strictly, into a model in evaluation mode.

    Accepts safetensors, a plain state dict, `{"model_state_dict": …}` or `{"state_dict": …}`, and keys with a
    `module.` prefix.

    Args:
        kind: A key of `PUBLISHED`.
        path: The file.
        config: The model's configuration; read off the shapes when None.
        image_size: Side of the images [px], for kinds whose weights do not tell it (`laq`), where it is known.

    Raises:
        CheckpointError: unknown kind, damaged file, a file that would run code, or keys that do not fit.
    """
    if kind not in PUBLISHED:
        raise CheckpointError(f"kind {kind!r}: must be one of {', '.join(PUBLISHED)}")
    path = Path(path)
    weights = _state_dict(path)
    published = PUBLISHED[kind]
    weights = published.convert(weights)
    known = (image_size,) if kind == "laq" else ()
    model = MODELS[published.kind][0](config or published.infer(weights, path, *known))
    load_weights(model, weights, path, published.theirs({**model.state_dict(), **weights}))
    return model.eval()


def _state_dict(path: Path) -> dict[str, Tensor]:
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    for wrapper in ("model_state_dict", "state_dict"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no state dict (names to tensors); give the file of the model's weights")
    weights = {str(key).removeprefix("module."): value for key, value in content.items()}
    if len(weights) < len(content):
        raise CheckpointError(f"{path}: holds some keys both with and without the prefix 'module.'; keep one of each")
    return weights
