"""Published checkpoints: what their weights are called there and here, and how a model's sizes are read off them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from workbench.config import Config, ConfigError
from workbench.models import laq_published
from workbench.models.conv_vae import ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAEConfig
from workbench.models.laq import LAQConfig
from workbench.models.weight_autoencoder import WeightAutoencoderConfig

Weights = Mapping[str, Tensor]


class CheckpointError(ValueError):
    """A file of weights cannot be read, or does not fit the model; the message names the file and the remedy."""


def rename(keys: Iterable[str], parts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The other name of every key.

    Args:
        keys: Names of weights.
        parts: (part of a name, what stands for it), applied in turn; `{}` is a number, and a part begins a name
            unless it begins with a dot.
    """
    names = {key: key for key in keys}
    for old, new in parts:
        pattern = ("" if old.startswith(".") else "^") + re.escape(old).replace(r"\{\}", r"(\d+)")
        for key, name in names.items():
            names[key] = re.sub(pattern, new.replace("{}", r"\1"), name)
    return names


def levels(weights: Weights, pattern: str) -> list[int]:
    """The numbers that stand in the first group of a pattern among the keys, in order."""
    return sorted({int(match[1]) for key in weights if (match := re.match(pattern, key))})


@dataclass(frozen=True)
class Published:
    """How one code base keeps the weights of one model."""

    kind: str
    """Our model's key in `MODELS`."""
    parts: tuple[tuple[str, str], ...]
    """Parts of their names, and what stands for them in ours; see `rename`."""
    infer: Callable[[Weights, Path], Config]
    """Configuration from the weights under our names."""
    unread: Callable[[Weights], set[str]] = lambda weights: set()
    """Keys, by their names, of layers that their model holds and never reads."""
    absent: Weights = field(default_factory=dict)
    """Weights, by our names, that some of their files lack, and the value they have there."""

    def ours(self, keys: Iterable[str]) -> dict[str, str]:
        """Our name of each of their keys."""
        return rename(keys, self.parts)

    def theirs(self, keys: Iterable[str]) -> dict[str, str]:
        """Their name of each of our keys."""
        return rename(keys, [(ours, theirs) for theirs, ours in self.parts])

    def convert(self, weights: Weights) -> dict[str, Tensor]:
        """Their weights under our names, without those that nothing reads, with those that the file may lack."""
        unread, ours = self.unread(weights), self.ours(weights)
        return {**self.absent, **{ours[key]: tensor for key, tensor in weights.items() if key not in unread}}


class PublishedLAQ:
    """How LAPA keeps the weights of its latent action model; see `models.laq_published`."""

    kind = "laq"

    @staticmethod
    def infer(weights: Weights, path: Path, image_size: int | None = None) -> LAQConfig:
        """Configuration from the weights under our names, and the size of the images, which they do not tell."""
        try:
            return laq_published.infer_config(weights, path, image_size)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    @staticmethod
    def theirs(keys: Iterable[str]) -> dict[str, str]:
        """Their name of each of our keys."""
        return {key: laq_published.published_name(key) for key in keys}

    convert = staticmethod(laq_published.from_published)


CONV_VAE_NAMES = (
    ("fc_mu.", "to_mu."),
    ("fc_var.", "to_logvar."),
    ("decoder_input.", "from_z."),
    ("final_layer.", "to_image."),
)


def infer_conv_vae(weights: Weights, path: Path) -> ConvVAEConfig:
    """Sizes of a ConvVAE from the shapes of its encoder and its latent layer."""
    stages = levels(weights, r"encoder\.(\d+)\.0\.weight")
    convolutions = [weights[f"encoder.{i}.0.weight"] for i in stages]
    if not stages or "to_mu.weight" not in weights:
        raise CheckpointError(f"{path}: has no encoder.0.0.weight or fc_mu.weight, so it is no conv_vae checkpoint")
    if weights["to_mu.weight"].dim() != 2 or any(convolution.dim() != 4 for convolution in convolutions):
        raise CheckpointError(f"{path}: fc_mu.weight must have 2 axes and each encoder.*.0.weight 4; give config")
    dims = [convolution.shape[0] for convolution in convolutions]
    latent_dim, features = weights["to_mu.weight"].shape
    grid = math.isqrt(features // dims[-1])
    if grid == 0 or features != dims[-1] * grid**2:
        raise CheckpointError(
            f"{path}: fc_mu.weight reads {features} features, which are no square images of {dims[-1]} channels"
        )
    return ConvVAEConfig(
        image_size=grid * 2 ** len(dims),
        in_channels=convolutions[0].shape[1],
        latent_dim=latent_dim,
        hidden_dims=dims,
    )


SIMULATION_VAE_NAMES = (
    ("encoder.encoder_blocks.{}.module_list.0._seq.", "encoder.{}.project."),
    ("encoder.encoder_residual_blocks.{}.seq.", "encoder.{}.residual.branch."),
    ("encoder.xs_linear.", "to_code."),
    ("encoder.last_x_linear.", "to_main."),
    ("decoder.sequence_start.0.", "start."),
    ("decoder.decoder_blocks.{}.module_list.0._seq.", "decoder.{}.up."),
    ("decoder.decoder_residual_blocks.{}.seq.", "decoder.{}.residual.branch."),
    ("decoder.condition_z.{}.0._seq.", "decoder.{}.prior.0.branch."),
    ("decoder.condition_z.{}.2.", "decoder.{}.prior.2."),
    ("decoder.condition_xz.{}.0._seq.", "decoder.{}.posterior.0.branch."),
    ("decoder.condition_xz.{}.2.", "decoder.{}.posterior.2."),
    ("decoder.xs_sequence.{}.", "decoder.{}.expand."),
    ("decoder.recon.", "output."),
    (".weight_orig", ".parametrizations.weight.original"),
    (".weight_u", ".parametrizations.weight.0._u"),
    (".weight_v", ".parametrizations.weight.0._v"),
)


def unread_simulation_vae(weights: Weights) -> set[str]:
    """The last level's code in the encoder, and the last level's prior, posterior and expansion in the decoder."""
    unread = set()
    for group in (r"encoder\.xs_linear", r"decoder\.condition_z", r"decoder\.condition_xz", r"decoder\.xs_sequence"):
        numbers = levels(weights, rf"{group}\.(\d+)\.")
        unread |= {key for key in weights if numbers and re.match(rf"{group}\.{numbers[-1]}\.", key)}
    return unread


def infer_simulation_vae(weights: Weights, path: Path) -> HierarchicalVAEConfig:
    """Sizes of a HierarchicalVAE from the shapes of its weights."""
    normed = "to_main.parametrizations.weight.original" in weights
    weight = "parametrizations.weight.original" if normed else "weight"
    numbers = levels(weights, r"encoder\.(\d+)\.project\.")
    projections = [f"encoder.{i}.project.0.{weight}" for i in numbers]
    main, code = f"to_main.{weight}", f"to_code.0.{weight}"
    if len(numbers) < 2 or any(key not in weights for key in (*projections, main, code)):
        raise CheckpointError(
            f"{path}: has no encoder.encoder_blocks.*, encoder.last_x_linear or encoder.xs_linear.0 of the simulation "
            "VAE, so it is no simulation_vae checkpoint"
        )
    axes = [weights[key].dim() for key in (main, code, *projections)]
    if axes != [2, 2] + [3] * len(numbers):
        raise CheckpointError(
            f"{path}: encoder.last_x_linear and encoder.xs_linear.0 must have weights of 2 axes and each "
            "encoder.encoder_blocks.* of 3; give config"
        )
    filters = [weights[key].shape[0] for key in projections]
    outputs, features = weights[main].shape
    if 0 in (outputs, features, *filters) or features % filters[-1] or outputs % 2:
        raise CheckpointError(
            f"{path}: encoder.last_x_linear has a weight of shape {(outputs, features)}, which is not twice the main "
            f"latent by {filters[-1]} channels times the time steps"
        )
    return HierarchicalVAEConfig(
        nodes=weights[projections[0]].shape[1],
        steps=features // filters[-1],
        latent_dim=outputs // 2,
        hier_latent_dim=weights[code].shape[0],
        filters=filters,
        large=f"encoder.0.project.3.{weight}" in weights,
        spectral_norm=normed,
        output_norm="output.1.weight" in weights,
        all_codes=False,
    )


WEIGHT_AUTOENCODER_NAMES = (
    ("encoder.fc_in.", "from_weights."),
    ("decoder.fc_out.", "to_weights."),
    ("quant_conv.", "to_posterior."),
    ("post_quant_conv.", "from_z."),
    ("loss.logvar", "error_logvar"),
    ("encoder.down.{}.downsample.conv.", "encoder.levels.{}.resize.1."),
    ("decoder.up.{}.upsample.conv.", "decoder.levels.{}.resize.1."),
    ("encoder.down.", "encoder.levels."),
    ("decoder.up.", "decoder.levels."),
    (".mid.block_1.", ".middle.0."),
    (".mid.attn_1.", ".middle.1."),
    (".mid.block_2.", ".middle.2."),
    (".block.", ".residual."),
    (".attn.", ".attention."),
    (".norm1.", ".branch.0."),
    (".conv1.", ".branch.2."),
    (".norm2.", ".branch.3."),
    (".conv2.", ".branch.6."),
    (".nin_shortcut.", ".shortcut."),
    (".proj_out.", ".out."),
)


def unread_weight_autoencoder(weights: Weights) -> set[str]:
    """What only its published training reads, such as a discriminator; the learned log-variance is ours too."""
    return {key for key in weights if key.startswith("loss.") and key != "loss.logvar"}


def infer_weight_autoencoder(weights: Weights, path: Path) -> WeightAutoencoderConfig:
    """Sizes of a WeightAutoencoder from the shapes of its weights, which tell neither `dropout` nor `weight_error`."""
    stages = levels(weights, r"encoder\.levels\.(\d+)\.residual\.0\.branch\.2\.weight")
    convolutions = [f"encoder.levels.{i}.residual.0.branch.2.weight" for i in stages]
    convolutions += ["encoder.conv_in.weight", "decoder.conv_in.weight", "from_z.weight"]
    if not stages or any(key not in weights for key in ("from_weights.weight", *convolutions)):
        raise CheckpointError(
            f"{path}: has no encoder.fc_in, encoder.conv_in, encoder.down.*.block.0, decoder.conv_in or "
            "post_quant_conv, so it is no weight_autoencoder checkpoint"
        )
    if weights["from_weights.weight"].dim() != 2 or any(weights[key].dim() != 4 for key in convolutions):
        raise CheckpointError(
            f"{path}: encoder.fc_in must have a weight of 2 axes and each convolution one of 4; give config"
        )
    (fdim, max_len), blocks = weights["from_weights.weight"].shape, r"encoder\.levels\.0\.residual\.(\d+)\."
    *widths, ch = (weights[key].shape[0] for key in convolutions[:-2])
    attended = [i for i in stages if f"encoder.levels.{i}.attention.0.q.weight" in weights]
    try:
        return WeightAutoencoderConfig(
            max_len=max_len,
            fdim=fdim,
            ch=ch,
            ch_mult=[width // max(ch, 1) for width in widths],
            num_res_blocks=len(levels(weights, blocks)),
            attn_resolutions=[math.isqrt(fdim) >> i for i in attended],
            z_channels=weights["decoder.conv_in.weight"].shape[1],
            embed_dim=weights["from_z.weight"].shape[1],
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; give the configuration it was trained with") from None


PUBLISHED: dict[str, Published | PublishedLAQ] = {
    "conv_vae": Published("conv_vae", CONV_VAE_NAMES, infer_conv_vae),
    "simulation_vae": Published("hierarchical_vae", SIMULATION_VAE_NAMES, infer_simulation_vae, unread_simulation_vae),
    "laq": PublishedLAQ(),
    "weight_autoencoder": Published(
        "weight_autoencoder",
        WEIGHT_AUTOENCODER_NAMES,
        infer_weight_autoencoder,
        unread_weight_autoencoder,
        {"error_logvar": torch.zeros(())},
    ),
}
"""What `load_foreign` knows, by the name of the published model."""
