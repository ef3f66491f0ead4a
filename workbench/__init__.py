"""Latent Workbench: helpers behind a sequence of parameterized notebooks for latent-variable models."""

__version__ = "0.1.0"
