"""One file, one model; each is known by its kind, as config.json states it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from workbench.config import Config
from workbench.models.conditioners import (
    CNNConditioner,
    CNNConditionerConfig,
    MLPConditioner,
    MLPConditionerConfig,
)
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.layout_autoencoder import LayoutAutoencoder, LayoutAutoencoderConfig
from workbench.models.weight_autoencoder import WeightAutoencoder, WeightAutoencoderConfig

MODELS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "conv_vae": (ConvVAE, ConvVAEConfig),
    "hierarchical_vae": (HierarchicalVAE, HierarchicalVAEConfig),
    "mlp_conditioner": (MLPConditioner, MLPConditionerConfig),
    "cnn_conditioner": (CNNConditioner, CNNConditionerConfig),
    "laq": (LAQ, LAQConfig),
    "layout_autoencoder": (LayoutAutoencoder, LayoutAutoencoderConfig),
    "weight_autoencoder": (WeightAutoencoder, WeightAutoencoderConfig),
}

VAES = {
    "clips": "conv_vae",
    "simulation": "hierarchical_vae",
    "layouts": "layout_autoencoder",
    "weights": "weight_autoencoder",
}
"""The VAE of each kind of data."""


def build_vae(parameters: Mapping[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    """The VAE of a kind of data, freshly initialised.

    Args:
        parameters: `data_kind`, and the model's settings among others.
        sizes: Sizes that the model takes from the data.
    """
    model_class, config_class = MODELS[VAES[parameters["data_kind"]]]
    return model_class(config_class.pick({**parameters, **sizes}))
