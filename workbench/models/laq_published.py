"""Published LAQ checkpoints: our names for their weights, and the configuration that their shapes tell.

Source of the names: the LAPA repository, `laq/laq_model`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.models.laq import CONVOLUTIONS, LARGEST_GRID, LAQConfig, lengths_of

_STACKS = {
    "enc_spatial_transformer.": "spatial_encoder.",
    "enc_temporal_transformer.": "temporal_encoder.",
    "dec_spatial_transformer.": "decoder.",
}
_IN_STACK = {
    "layers.#.0.dsconv.": "blocks.#.position.conv.",
    "layers.#.1.norm.gamma": "blocks.#.attention.norm.weight",
    "layers.#.1.": "blocks.#.attention.",
    "layers.#.2.norm.gamma": "blocks.#.cross_attention.norm.weight",
    "layers.#.2.context_norm.gamma": "blocks.#.cross_attention.context_norm.weight",
    "layers.#.2.": "blocks.#.cross_attention.",
    "layers.#.3.4.": "blocks.#.feed_forward.3.",
    "layers.#.3.": "blocks.#.feed_forward.",
    "norm_out.gamma": "norm.weight",
}
NAMES = {stack + name: our + ours for stack, our in _STACKS.items() for name, ours in _IN_STACK.items()} | {
    "to_patch_emb_first_frame.": "to_patches.",
    "to_pixels_first_frame.": "to_pixels.",
    "spatial_rel_pos_bias.net.0.0.": "position_bias.net.0.",
    "spatial_rel_pos_bias.net.1.0.": "position_bias.net.2.",
    "spatial_rel_pos_bias.net.2.": "position_bias.net.4.",
    "vq.codebooks": "quantizer.codebook",
    "vq.project_in.": "action_in.",
    "vq.cnn_encoder.": "action_conv.",
    "vq.project_out.": "action_out.",
}
"""Beginnings of published keys with ours, # for a number; the first that fits counts."""

UNREAD = {
    "layers.#.1.norm.beta": "a buffer of zeros",
    "layers.#.1.context_norm.beta": "a buffer of zeros",
    "layers.#.2.norm.beta": "a buffer of zeros",
    "layers.#.2.context_norm.beta": "a buffer of zeros",
    "norm_out.beta": "a buffer of zeros",
    "layers.#.1.null_kv": "empty: self-attention has no null pairs",
    "layers.#.1.context_norm.gamma": "self-attention has no context to normalise",
}
"""Whole keys within a stack that the published network never reads, or only as nothing, and why."""


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names; unknown keys stay as they are, for a strict loader to refuse.

    The keys of `UNREAD` are left out, but a `beta` that is not zero and a `null_kv` that is not empty stay too. The
    counters of the codebook's use, which published files do not hold, are zero.
    """
    ours = {_renamed(key, NAMES): value for key, value in weights.items() if not _is_unread(key, value)}
    if "quantizer.codebook" in ours:
        ours["quantizer.code_usage"] = torch.zeros(len(ours["quantizer.codebook"]), dtype=torch.int64)
        ours["quantizer.usage_batches"] = torch.zeros((), dtype=torch.int64)
    return ours


def published_name(key: str) -> str:
    """What published files call one of our keys, for messages."""
    return _renamed(key, {ours: theirs for theirs, ours in NAMES.items()})


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if match := re.match(_pattern(old), key):
            return new.replace("#", "".join(match.groups())) + key[match.end() :]
    return key


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\#", r"(\d+)")


def _is_unread(key: str, value: Tensor) -> bool:
    stack = next((stack for stack in _STACKS if key.startswith(stack)), None)
    if stack is None or not any(re.fullmatch(_pattern(name), key.removeprefix(stack)) for name in UNREAD):
        return False
    return key.endswith("gamma") or not value.any()


def infer_config(weights: Mapping[str, Tensor], path: Path, image_size: int | None = None) -> LAQConfig:
    """The configuration of weights with our names, read off their shapes.

    No weight depends on the image size, and the convolutions that lead to 4 and to 16 codes, or to 64 and to 256, have
    the same shapes. Where the image size is not given it is 256 px, as published, if the convolutions give one of
    their numbers of codes at that size; else the one size that fits, where there is only one.

    Args:
        weights: What `from_published` returns.
        path: The file, for messages.
        image_size: Side of the images [px], where it is known.

    Raises:
        ValueError: no LAQ checkpoint, or one whose image size cannot be told.
        ConfigError: an image size that does not fit the patches.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    _check_kind(shapes, path)
    dim, pixels = shapes["to_patches.2.weight"]
    channels, patch = _patches(pixels, path)
    codebook_size, code_dim = shapes["quantizer.codebook"]
    size, length = _image_and_length(shapes, patch, path, image_size)
    return LAQConfig(
        image_size=size,
        in_channels=channels,
        patch_size=patch,
        dim=dim,
        spatial_depth=_depth(shapes, "spatial_encoder"),
        temporal_depth=_depth(shapes, "temporal_encoder"),
        heads=shapes["position_bias.net.4.weight"][0],
        dim_head=shapes["spatial_encoder.blocks.0.attention.q_scale"][0],
        codebook_size=codebook_size,
        code_dim=code_dim,
        code_seq_len=length,
    )


_READ = {
    "to_patches.2.weight": 2,
    "quantizer.codebook": 2,
    "position_bias.net.4.weight": 2,
    "action_conv.0.weight": 4,
    "spatial_encoder.blocks.0.attention.q_scale": 1,
}
"""Keys that tell sizes, and their numbers of axes."""


def _check_kind(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    absent = [published_name(key) for key in _READ if key not in shapes]
    if absent:
        raise ValueError(f"{path}: has no {', '.join(absent)}, so it is no laq checkpoint")
    for key, axes in (_READ | {"action_conv.2.weight": 4}).items():
        if key in shapes and len(shapes[key]) != axes:
            raise ValueError(f"{path}: {published_name(key)} {shapes[key]} must have {axes} axes; give config")


def _depth(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    return len({key.split(".")[2] for key in shapes if key.startswith(f"{stack}.blocks.")})


def _patches(pixels: int, path: Path) -> tuple[int, int]:
    """Channels and side of the patches: three channels or one, of which only one choice gives a square."""
    for channels in (3, 1):
        patch = math.isqrt(pixels // channels)
        if channels * patch**2 == pixels:
            return channels, patch
    raise ValueError(
        f"{path}: to_patch_emb_first_frame.2.weight reads {pixels} values, which are no square patches of 3 channels "
        "or of 1; give config"
    )


def _image_and_length(
    shapes: Mapping[str, tuple[int, ...]], patch: int, path: Path, image_size: int | None
) -> tuple[int, int]:
    kernels = [shapes[key][2:] for key in ("action_conv.0.weight", "action_conv.2.weight") if key in shapes]
    fitting = [length for length, layers in CONVOLUTIONS.items() if [kernel for kernel, _, _ in layers] == kernels]
    if not fitting:
        raise ValueError(f"{path}: vq.cnn_encoder has kernels {kernels}, which no known code_seq_len has")
    size = image_size or LAQConfig.model_fields["image_size"].default
    length = next((length for length in fitting if length in lengths_of(size // patch)), None)
    if length is not None and (image_size or size % patch == 0):
        return size, length
    sizes = {n: patch * max(g for g in range(1, LARGEST_GRID + 1) if n in lengths_of(g)) for n in fitting}
    if image_size is None and len(sizes) == 1:
        return sizes[fitting[0]], fitting[0]
    given = f"not on image_size={image_size}" if image_size else "and the weights do not tell which"
    ways = " or ".join(f"{n} codes on images of {size} px" for n, size in sizes.items())
    raise ValueError(f"{path}: its convolutions give {ways}, {given}; give config, with its image_size")
