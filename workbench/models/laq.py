"""Latent action model: two frames to a few codes, and a first frame with codes to the next frame.

Paper: Ye et al. 2024, "Latent action pretraining from videos" (arXiv 2410.11758).
Reference: `laq` of the LAPA repository. Its checkpoints load, as these peculiarities of it are kept: keys and values of
self-attention are not normalised; the temporal position generators read (patches, frames) as (frames, rows, columns);
codes (n, d) are reshaped to (d, n), not transposed, so that every token the decoder reads mixes all codes, and the
order of the codes matters to it; the decoder sees the first frame's patch embeddings, without gradient, and not its
encoded tokens. So frames and their codes enter the decoder only through layer norms over whole patches.
Deviations: see `quantizers`; two more quantizers; no dropout, which the reference never trained with.
Where asked for, `predicts="change"`: the decoder's output is added to the first frame, and is zero before training, so
that brightness need not pass through those norms.

Scale: x_hat is on the scale of the frames trained on; here that is [-1, 1], in the published checkpoints [0, 1]. Frames
of both scales have the same codes, but for rounding, as the first layer normalises each patch. With a published
checkpoint, x_hat of frames in [-1, 1] is 2 * decode(...) - 1.
"""

from typing import Literal

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from workbench.config import Config
from workbench.layers import LatentLayout, shard
from workbench.losses import mean_squared_error
from workbench.models.laq_transformer import PositionBias, Transformer
from workbench.models.quantizers import FSQ, NSVQ, GaussianAction, LatentAction

CodeSeqLen = Literal[1, 2, 4, 16, 64, 256]
Convolution = tuple[tuple[int, int], int, int]
"""Kernel, stride, padding."""

HALVE: Convolution = ((3, 3), 2, 1)
CONVOLUTIONS: dict[int, tuple[Convolution, ...]] = {
    1: (HALVE, ((4, 4), 1, 0)),
    2: (HALVE, ((3, 4), 1, 0)),
    4: (HALVE, ((3, 3), 1, 0)),
    16: (HALVE, HALVE),
    64: (HALVE,),
    256: (HALVE,),
}
"""How the grid of patches becomes that many codes."""
LARGEST_GRID = 32


def lengths_of(grid: int) -> list[int]:
    """Values of `code_seq_len` that a grid x grid of patches gives."""
    return [length for length, convolutions in CONVOLUTIONS.items() if _codes(grid, convolutions) == length]


def _codes(grid: int, convolutions: tuple[Convolution, ...]) -> int:
    height = width = grid
    for kernel, stride, padding in convolutions:
        height = (height + 2 * padding - kernel[0]) // stride + 1
        width = (width + 2 * padding - kernel[1]) // stride + 1
    return height * width if min(height, width) > 0 else 0


class LAQConfig(Config):
    """Sizes of a LAQ.

    Raises:
        ConfigError: a value out of range, an image size that the patches do not fill, or a number of codes that
            the grid of patches cannot give.
    """

    image_size: int = Field(256, ge=1)
    """Side of the square images [px]; divisible by patch_size."""
    in_channels: int = Field(3, ge=1)
    """Channels of the images."""
    patch_size: int = Field(32, ge=1)
    """Side of the square patches [px]."""
    dim: int = Field(1024, ge=1)
    """Width of the transformers."""
    spatial_depth: int = Field(8, ge=1)
    """Layers that attend between patches: so many in the encoder, and so many in the decoder."""
    temporal_depth: int = Field(8, ge=1)
    """Layers that attend between the two frames."""
    heads: int = Field(16, ge=1)
    """Attention heads."""
    dim_head: int = Field(64, ge=1)
    """Width of each head."""
    quantizer: Literal["nsvq", "fsq", "continuous"] = "nsvq"
    """Vectors with noise substitution, finite scalars, or a continuous Gaussian action."""
    codebook_size: int = Field(8, ge=2)
    """Codes to choose from; a continuous action has none."""
    code_dim: int = Field(32, ge=1)
    """Length of a code."""
    code_seq_len: CodeSeqLen = 4
    """Codes for each pair of frames."""
    predicts: Literal["frame", "change"] = "frame"
    """What the decoder gives: the next frame, as published, or what is added to the first frame to make it."""

    @model_validator(mode="after")
    def _fits(self) -> "LAQConfig":
        below = self.image_size // self.patch_size * self.patch_size
        if below != self.image_size:
            sizes = f"{below} or {below + self.patch_size}" if below else f"{self.patch_size}"
            raise ValueError(
                f"image_size={self.image_size}: must be divisible by patch_size={self.patch_size}; "
                f"the nearest such size is {sizes}"
            )
        allowed = lengths_of(self.grid)
        if self.code_seq_len not in allowed:
            grids = [grid for grid in range(1, LARGEST_GRID + 1) if self.code_seq_len in lengths_of(grid)]
            such = [f"patch_size={self.image_size // grid}" for grid in grids if self.image_size % grid == 0][-1:]
            such += [f"image_size={self.patch_size * grids[-1]}"]
            raise ValueError(
                f"code_seq_len={self.code_seq_len}: {self.grid} x {self.grid} patches (image_size={self.image_size}, "
                f"patch_size={self.patch_size}) give {_either(allowed)} codes; {self.code_seq_len} need a grid with "
                f"a side of {_either(grids)}, such as of {_either(such)}"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


def _either(numbers: list[int] | list[str]) -> str:
    *most, last = map(str, numbers or ["no number of"])
    return f"{', '.join(most)} or {last}" if most else last


class LAQ(nn.Module):
    """Encoder of pairs of frames, quantizer, decoder of a first frame and codes.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LAQConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch, code_dim = config.dim, config.patch_size, config.code_dim
        pixels, attention = config.in_channels * patch**2, (config.heads, config.dim_head)
        self.latent_layout = LatentLayout(action=(config.code_seq_len, code_dim))
        cut = Rearrange("b c (h p) (w q) -> b h w (c p q)", p=patch, q=patch)
        join = Rearrange("b h w (c p q) -> b c (h p) (w q)", p=patch, q=patch)
        self.to_patches = nn.Sequential(cut, nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.position_bias = PositionBias(dim, config.heads)
        self.spatial_encoder = Transformer(dim, config.spatial_depth, *attention)
        self.temporal_encoder = Transformer(dim, config.temporal_depth, *attention)
        self.action_in = nn.Linear(dim, code_dim)
        self.action_conv = convolutions(code_dim, config.code_seq_len)
        self.quantizer = build_quantizer(config)
        self.action_out = nn.Linear(code_dim, dim)
        self.decoder = Transformer(dim, config.spatial_depth, *attention, cross=True)
        self.to_pixels = nn.Sequential(nn.Linear(dim, pixels), join)
        if config.predicts == "change":
            nn.init.zeros_(self.to_pixels[0].weight)
            nn.init.zeros_(self.to_pixels[0].bias)
        self.noise_dim = config.code_seq_len * self.quantizer.noise_per_code
        self.terms = ("mse", "kl") if config.quantizer == "continuous" else ("mse",)
        """Terms that the loss weighs, the error first."""

    def tokens(self, first: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 gh gw d"]:
        """Encoded patches of both frames.

        Raises:
            ValueError: images of another size or number of channels.
        """
        return self._tokens(self._patches(first, "first"), self._patches(x, "x"), self._bias())

    def encode(self, first: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> LatentAction:
        """The action between two frames, without noise.

        Raises:
            ValueError: images of another size or number of channels.
        """
        return self.quantizer(self._difference(self.tokens(first, x)), None)

    def decode(
        self, first: Float[Tensor, "b c h w"], codes: Int[Tensor, "b n"] | Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """The frame that follows `first` under an action, inferred or chosen.

        Args:
            first: First frames.
            codes: Indices of codes, or vectors such as `encode(first, x).codes`.

        Raises:
            ValueError: a number of codes, or an index, that this model does not have.
        """
        if not codes.is_floating_point():
            codes = self._lookup(codes)
        expected = (len(first), self.config.code_seq_len, self.config.code_dim)
        if codes.shape != expected:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: must be {expected} (images, code_seq_len, code_dim), or indices "
                f"of shape {expected[:2]}"
            )
        return self._imagine(first, self._patches(first, "first"), codes, self._bias())

    def forward(self, first: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x as it is imagined from `first` and the action between them, without noise."""
        return self._pass(first, x, None)[0]

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms: `mse` of the next frame `x` per element; for a continuous action `kl` in nats (batch mean).

        Discrete ones have two terms for the log, of the entries chosen within the batch, means over the places of the
        word: `perplexity` (2^entropy) and `codes_used` (how many).
        In training mode `batch["noise"]` (b, noise_dim) is used where given, and drawn otherwise; at evaluation there
        is no noise.
        """
        noise = batch.get("noise") if self.training and self.noise_dim else None
        if noise is None and self.training and self.noise_dim:
            noise = torch.randn(len(batch["x"]), self.noise_dim, device=batch["x"].device)
        x_hat, action = self._pass(batch["first"], batch["x"], noise)
        terms = {"mse": mean_squared_error(x_hat, batch["x"])}
        if action.indices is None:
            return terms | {"kl": action.kl().mean()}
        share = nn.functional.one_hot(action.indices, self.config.codebook_size).float().mean(0)  # (n, entries)
        share = shard().total(share) / shard().size
        used = {"perplexity": torch.special.entr(share).sum(1).exp(), "codes_used": (share > 0).sum(1).float()}
        return terms | {name: values.mean() for name, values in used.items()}

    def replace_unused(self, generator: torch.Generator) -> int:
        """Replace unused codes, see `NSVQ.replace_unused`; quantizers without a learned codebook have none: 0."""
        return self.quantizer.replace_unused(generator) if isinstance(self.quantizer, NSVQ) else 0

    def _pass(self, first: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Tensor, LatentAction]:
        """x_hat and the action; patches and bias are computed once for encoder and decoder."""
        if noise is not None:
            noise = rearrange(noise, "b (n d) -> b n d", n=self.config.code_seq_len)
        patches, bias = self._patches(first, "first"), self._bias()
        action = self.quantizer(self._difference(self._tokens(patches, self._patches(x, "x"), bias)), noise)
        return self._imagine(first, patches, action.codes, bias), action

    def _patches(self, frames: Float[Tensor, "b c h w"], name: str) -> Float[Tensor, "b gh gw d"]:
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if tuple(frames.shape[1:]) != expected:
            raise ValueError(
                f"{name} has shape {tuple(frames.shape[1:])} (c, h, w): this model was built for {expected}"
            )
        return self.to_patches(frames)

    def _bias(self) -> Float[Tensor, "heads n n"]:
        return self.position_bias(self.config.grid, self.config.grid)

    def _tokens(self, first: Tensor, last: Tensor, bias: Tensor) -> Float[Tensor, "b 2 gh gw d"]:
        pair = torch.stack((first, last), dim=1)  #                          (b, 2, gh, gw, d)
        b, t, h, w, _ = shape = pair.shape
        x = rearrange(pair, "b t h w d -> (b t) (h w) d")
        x = self.spatial_encoder(x, shape[:4], bias=bias)
        x = rearrange(x, "(b t) (h w) d -> (b h w) t d", t=t, h=h)
        x = self.temporal_encoder(x, shape[:4])
        return rearrange(x, "(b h w) t d -> b t h w d", h=h, w=w)

    def _difference(self, tokens: Float[Tensor, "b 2 gh gw d"]) -> Float[Tensor, "b n code_dim"]:
        x = self.action_in(tokens)  #                                        (b, 2, gh, gw, code_dim)
        x = self.action_conv(rearrange(x, "b t h w d -> (b t) d h w"))  #    (2b, code_dim, ...), n places
        first, last = rearrange(x, "(b t) d h w -> t b (h w) d", t=2)
        return last - first

    def _imagine(self, first: Tensor, patches: Tensor, codes: Tensor, bias: Tensor) -> Float[Tensor, "b c h w"]:
        b, h, w, _ = patches.shape
        mixed = rearrange(rearrange(codes, "b n d -> b (n d)"), "b (d n) -> b n d", d=self.config.code_dim)
        x = rearrange(patches.detach(), "b h w d -> b (h w) d")
        x = self.decoder(x, (b, 1, h, w), bias=bias, context=self.action_out(mixed))
        x = self.to_pixels(rearrange(x, "b (h w) d -> b h w d", h=h))
        return first + x if self.config.predicts == "change" else x

    def _lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        if isinstance(self.quantizer, GaussianAction):
            raise ValueError("quantizer=continuous has no indices: give vectors, such as encode(first, x).codes")
        size = self.config.codebook_size
        outside = indices[(indices < 0) | (indices >= size)]
        if len(outside):
            raise ValueError(f"code {int(outside[0])}: must be from 0 to {size - 1}, as codebook_size is {size}")
        return self.quantizer.lookup(indices)


def convolutions(channels: int, code_seq_len: int) -> nn.Sequential:
    """Convolutions with ReLU between them that lead from a grid to that many places."""
    layers: list[nn.Module] = []
    for kernel, stride, padding in CONVOLUTIONS[code_seq_len]:
        layers += [nn.Conv2d(channels, channels, kernel, stride, padding), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def build_quantizer(config: LAQConfig) -> NSVQ | FSQ | GaussianAction:
    """The quantizer that a configuration names."""
    if config.quantizer == "continuous":
        return GaussianAction(config.code_dim)
    return {"nsvq": NSVQ, "fsq": FSQ}[config.quantizer](config.codebook_size, config.code_dim)
