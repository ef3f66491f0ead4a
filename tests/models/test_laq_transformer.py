import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from workbench.models.laq_transformer import (
    FEW_KEYS,
    Attention,
    PositionBias,
    PositionGenerator,
    Transformer,
    feed_forward,
)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(layer: Attention, x: torch.Tensor, bias=None, context=None) -> torch.Tensor:  # noqa: ANN001
    """The same with einsum, softmax and both scales where the papers have them."""
    source = x if context is None else layer.context_norm(context)
    q, k, v = layer.to_q(layer.norm(x)), *layer.to_kv(source).chunk(2, dim=-1)
    q, k, v = (rearrange(t, "n s (h d) -> n h s d", h=layer.heads) for t in (q, k, v))
    if context is not None:
        null_k, null_v = (layer.null_kv[None, :, i::2].expand(len(x), -1, -1, -1) for i in (0, 1))
        k, v = torch.cat((null_k, k), 2), torch.cat((null_v, v), 2)
    q, k = F.normalize(q, dim=-1) * layer.q_scale, F.normalize(k, dim=-1) * layer.k_scale
    logits = 8 * torch.einsum("nhid,nhjd->nhij", q, k)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return layer.to_out(rearrange(torch.einsum("nhij,nhjd->nhid", weights, v), "n h s d -> n s (h d)"))


@pytest.mark.parametrize(
    ("tokens", "cross", "biased"),
    [(9, False, True), (2, False, False), (FEW_KEYS + 3, False, False), (9, True, False)],
    ids=["with a bias", "two frames", "many keys", "cross"],
)
def test_attention_and_its_gradients_equal_a_plain_rendering(tokens: int, cross: bool, biased: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, heads=3, dim_head=4, cross=cross)
    for scale in (layer.q_scale, layer.k_scale):
        torch.nn.init.uniform_(scale, 0.5, 2.0)
    given = {"x": random(5, tokens, 12).requires_grad_()}
    if biased:
        given["bias"] = random(3, tokens, tokens).requires_grad_()
    if cross:
        given["context"] = random(5, 4, 12, seed=2).requires_grad_()
    leaves, weight = [*given.values(), *layer.parameters()], random(5, tokens, 12, seed=3)
    outputs = [layer(**given), plain_attention(layer, **given)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    ours, plain = (torch.autograd.grad((out * weight).sum(), leaves) for out in outputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in ours)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_attention_of_zeros_is_finite() -> None:
    """Zero queries and keys have no direction; the gradient of their length must not be infinite."""
    layer, x = Attention(8, 2, 4), torch.zeros(1, 3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("cross", [False, True])
def test_attention_in_bfloat16(cross: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 3, 4, cross=cross), random(2, 5, 12)
    given = {"context": random(2, 4, 12)} if cross else {"bias": random(3, 5, 5)}
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x, **given)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x, **given), rtol=0.1, atol=0.03)


def test_position_bias_is_a_function_of_the_offset_alone() -> None:
    torch.manual_seed(0)
    bias = PositionBias(16, heads=2)
    logits = bias(3, 4)
    for i in range(12):
        for j in range(12):
            offset = torch.tensor([i // 4 - j // 4, i % 4 - j % 4]).float()
            expected = bias.net(offset.sign() * torch.log(1 + offset.abs()))
            torch.testing.assert_close(logits[:, i, j], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_position_generator_is_the_causal_convolution(frames: int) -> None:
    torch.manual_seed(0)
    layer, shape = PositionGenerator(6), (2, frames, 3, 4)
    x = random(2 * frames, 12, 6).requires_grad_()
    video = rearrange(x, "(b t) (h w) d -> b d t h w", b=2, h=3)
    expected = layer.conv(F.pad(video, (1, 1, 1, 1, 2, 0)))  # two empty frames before the first
    expected = rearrange(expected, "b d t h w -> (b t) (h w) d")
    outputs, leaves = [layer(x, shape), expected], [x, *layer.parameters()]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in outputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_position_generator_reads_memory_not_axes() -> None:
    """(b h w) t d and (b t) (h w) d with the same memory give the same."""
    layer, x = PositionGenerator(6), random(24, 2, 6)
    same = layer(x.reshape(4, 12, 6), (2, 2, 3, 4))
    assert torch.equal(layer(x, (2, 2, 3, 4)).flatten(), same.flatten())


def test_a_later_frame_changes_nothing_before_it() -> None:
    torch.manual_seed(0)
    layer, x = PositionGenerator(6), random(2, 12, 6)
    changed = torch.cat((x[:1], x[1:] + 1))
    a, b = layer(x, (1, 2, 3, 4)), layer(changed, (1, 2, 3, 4))
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_feed_forward_is_gated_and_eight_thirds_wide() -> None:
    torch.manual_seed(0)
    layer, x = feed_forward(10), random(3, 10)
    norm, wide, _, back = layer
    assert back.in_features == 26 == int(8 / 3 * 10) and wide.bias is None and back.bias is None
    values, gate = wide(norm(x)).split(26, dim=-1)
    torch.testing.assert_close(layer(x), back(values * F.gelu(gate)))


def test_a_block_adds_each_part_to_its_input() -> None:
    torch.manual_seed(0)
    stack = Transformer(8, depth=2, heads=2, dim_head=4, cross=True)
    x, bias, context, shape = random(2, 6, 8), random(2, 6, 6), random(2, 3, 8), (2, 1, 2, 3)
    expected = x
    for block in stack.blocks:
        expected = expected + block.position(expected, shape)
        expected = expected + block.attention(expected, bias=bias)
        expected = expected + block.cross_attention(expected, context=context)
        expected = expected + block.feed_forward(expected)
    torch.testing.assert_close(stack(x, shape, bias, context), stack.norm(expected))
    assert Transformer(8, 1, 2, 4).blocks[0].cross_attention is None
