"""One file, one model; each is known by its kind, as config.json states it."""

from torch import nn

from workbench.config import Config
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig

MODELS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "conv_vae": (ConvVAE, ConvVAEConfig),
    "hierarchical_vae": (HierarchicalVAE, HierarchicalVAEConfig),
}
