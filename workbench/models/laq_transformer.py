"""Transformer of the latent action model: cosine attention, position bias, position generator, feed-forward.

Papers: cosine attention and continuous relative position bias, Liu et al. 2022 (Swin V2, arXiv 2111.09883); position
generator, Chu et al. 2021 (arXiv 2102.10882); gated feed-forward, Shazeer 2020 (arXiv 2002.05202).
Reference: the transformer of C-ViViT in phenaki-pytorch (P. Wang), as the LAPA repository uses it.
Deviations: none in the function computed. The position bias is evaluated once for each distinct offset instead of
each pair of patches, and the causal 3-D convolution as 2-D convolutions that leave out the frames of padding.
"""

from contextlib import nullcontext

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_SCALE = 8.0
"""What cosines of queries and keys are multiplied by before the softmax."""
FEW_KEYS = 16
"""Up to so many keys the plain arithmetic is faster on a CPU than the blocked kernel, by two to three times."""
NULL_PAIRS = 2
"""Learned key-value pairs that cross-attention may look at instead of the context."""

VideoShape = tuple[int, int, int, int]
"""Batch, frames, rows and columns of patches."""


class PositionBias(nn.Module):
    """Attention logits for each head, as a learned function of the offset between two patches.

    An offset enters as sign(offset) * log(1 + |offset|) for rows and columns.

    Args:
        dim: Width of the network.
        heads: Attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        hidden = [nn.Linear(2, dim), nn.LeakyReLU(0.1), nn.Linear(dim, dim), nn.LeakyReLU(0.1)]
        self.net = nn.Sequential(*hidden, nn.Linear(dim, heads))

    def forward(self, rows: int, columns: int) -> Float[Tensor, "heads n n"]:
        """Logits between all patches of a grid, n = rows * columns, row by row."""
        device = self.net[0].weight.device
        y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
        dy, dx = torch.arange(1 - rows, rows, device=device), torch.arange(1 - columns, columns, device=device)
        offsets = torch.cartesian_prod(dy, dx).float()  #                    (offsets, 2)
        bias = self.net(offsets.sign() * offsets.abs().log1p())  #           (offsets, heads)
        y, x = torch.cartesian_prod(y, x).unbind(1)  #                       (n) each
        row = y[:, None] - y[None] + rows - 1  #                             (n, n)
        column = x[:, None] - x[None] + columns - 1
        return rearrange(bias[row * (2 * columns - 1) + column], "i j heads -> heads i j")


class PositionGenerator(nn.Module):
    """Depth-wise 3 x 3 x 3 convolution over frames, rows and columns that sees no later frame.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Float[Tensor, "n s d"], shape: VideoShape) -> Float[Tensor, "n s d"]:
        """Features of the same shape as x, whose memory is read as (*shape, d), whatever its axes mean.

        The temporal stack of the published model passes (patches, frames) here and has it read as
        (frames, rows, columns).
        """
        frames = x.reshape(*shape, x.shape[-1])  #                           (b, t, h, w, d)
        out = self._convolve(frames, 0) + self.conv.bias
        for back in range(1, min(shape[1], 3)):
            past = self._convolve(frames[:, :-back], back)
            out = out + F.pad(past, (0, 0, 0, 0, 0, 0, back, 0))
        return out.reshape(x.shape)

    def _convolve(self, frames: Float[Tensor, "b t h w d"], back: int) -> Float[Tensor, "b t h w d"]:
        """What frames contribute to the frame `back` places later; the kernel's last slice is the present."""
        flat = rearrange(frames, "b t h w d -> (b t) d h w")
        flat = F.conv2d(flat, self.conv.weight[:, :, 2 - back], padding=1, groups=flat.shape[1])
        return rearrange(flat, "(b t) d h w -> b t h w d", b=frames.shape[0])


def unit(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Vectors of length 1, in float32; zeros stay zeros."""
    x = x.float()
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def attend(
    q: Float[Tensor, "n h s d"],
    k: Float[Tensor, "n h m d"],
    v: Float[Tensor, "n h m d"],
    bias: Float[Tensor, "h s m"] | None,
) -> Float[Tensor, "n h s d"]:
    """Softmax of scaled products and a bias, times values."""
    mask = None if bias is None else bias[None].to(q.dtype)
    few_keys_on_a_cpu = k.shape[2] <= FEW_KEYS and not q.is_cuda
    with sdpa_kernel(SDPBackend.MATH) if few_keys_on_a_cpu else nullcontext():
        return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=ATTENTION_SCALE)


class Attention(nn.Module):
    """Attention between unit queries and keys, each scaled by a learned factor per dimension.

    Self-attention takes queries from the normalised input, but keys and values from the input as it is;
    cross-attention takes keys and values from the normalised context and from learned null pairs.

    Args:
        dim: Width of the input and of the context.
        heads: Attention heads.
        dim_head: Width of each head.
        cross: Whether a context will be given.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, cross: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.context_norm = nn.LayerNorm(dim, bias=False) if cross else None
        self.null_kv = nn.Parameter(torch.randn(heads, 2 * NULL_PAIRS, dim_head)) if cross else None

    def forward(
        self,
        x: Float[Tensor, "n s d"],
        bias: Float[Tensor, "heads s s"] | None = None,
        context: Float[Tensor, "n m d"] | None = None,
    ) -> Float[Tensor, "n s d"]:
        """What each of the s tokens gathers; `bias` is for self-attention, `context` for cross-attention."""
        source = x if context is None else self.context_norm(context)
        q = rearrange(self.to_q(self.norm(x)), "n s (h d) -> n h s d", h=self.heads)
        k, v = rearrange(self.to_kv(source), "n m (kv h d) -> kv n h m d", kv=2, h=self.heads)
        if self.null_kv is not None:
            nulls = rearrange(self.null_kv, "h (m kv) d -> kv 1 h m d", kv=2).expand(-1, len(x), -1, -1, -1)
            k, v = (torch.cat((null, t.to(null.dtype)), dim=2) for null, t in zip(nulls, (k, v), strict=True))
        q, k = unit(q) * (self.q_scale * self.k_scale), unit(k)  #           both scales may stand on one side
        out = attend(q, k, v, bias)
        return self.to_out(rearrange(out, "n h s d -> n s (h d)"))


class GatedGELU(nn.Module):
    """The first half of the features times the GELU of the second."""

    def forward(self, x: Float[Tensor, "... two_d"]) -> Float[Tensor, "... d"]:
        """Half as many features."""
        values, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * values


def feed_forward(dim: int) -> nn.Sequential:
    """Normalise, widen to int(8/3 dim) gated features, and come back."""
    width = 8 * dim // 3
    wide, back = nn.Linear(dim, 2 * width, bias=False), nn.Linear(width, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), wide, GatedGELU(), back)


class Block(nn.Module):
    """Position generator, self-attention, cross-attention where asked for, feed-forward; each added to its input."""

    def __init__(self, dim: int, heads: int, dim_head: int, cross: bool) -> None:
        super().__init__()
        self.position = PositionGenerator(dim)
        self.attention = Attention(dim, heads, dim_head)
        self.cross_attention = Attention(dim, heads, dim_head, cross=True) if cross else None
        self.feed_forward = feed_forward(dim)

    def forward(
        self,
        x: Float[Tensor, "n s d"],
        shape: VideoShape,
        bias: Float[Tensor, "heads s s"] | None,
        context: Float[Tensor, "n m d"] | None,
    ) -> Float[Tensor, "n s d"]:
        """One layer."""
        x = x + self.position(x, shape)
        x = x + self.attention(x, bias=bias)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, context=context)
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        dim: Width.
        depth: Blocks.
        heads: Attention heads.
        dim_head: Width of each head.
        cross: Whether every block has cross-attention to a context.
    """

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, cross: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dim_head, cross) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "n s d"],
        shape: VideoShape,
        bias: Float[Tensor, "heads s s"] | None = None,
        context: Float[Tensor, "n m d"] | None = None,
    ) -> Float[Tensor, "n s d"]:
        """Attend within each of the n sequences of s tokens.

        Args:
            x: Tokens.
            shape: Batch, frames, rows and columns: how the position generators read the memory of x.
            bias: Logits added in self-attention, the same in every block.
            context: m tokens for each sequence that cross-attention reads.
        """
        for block in self.blocks:
            x = block(x, shape, bias, context)
        return self.norm(x)
