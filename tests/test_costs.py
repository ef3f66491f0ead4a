"""Arithmetic and memory of models whose figures are known in closed form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from workbench.costs import forward_gflops, step_memory_mb
from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
from workbench.models.laq import LAQ, LAQConfig

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT = 4  # bytes
DIM, HEADS, WIDTH, CODES, CODE_DIM = 12, 2, 4, 4, 5  # of the latent action model, whose grid has 8 x 8 patches


@pytest.fixture
def laq() -> LAQ:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "dim": DIM, "spatial_depth": 1, "temporal_depth": 1, "heads": HEADS}
    sizes |= {"dim_head": WIDTH, "codebook_size": 6, "code_dim": CODE_DIM, "code_seq_len": CODES}
    return LAQ(LAQConfig(**sizes)).eval()


def pairs(n: int) -> dict[str, Tensor]:
    first, x = torch.rand(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
    return {"first": first, "x": x}


def operations(predict: Callable[[Tensor], Tensor], *shape: int) -> float:
    """Of one sample."""
    return forward_gflops(lambda batch: predict(batch["x"]), {"x": torch.zeros(shape)}) * 1e9


def step_bytes(model: nn.Module, *shape: int, precision: str = "fp32") -> int:
    """Bytes of a step that minimises the sum of the model's output."""
    return round(1e6 * step_memory_mb(model, lambda m, batch: m(batch["x"]).sum(), {"x": torch.ones(shape)}, precision))


def kept_bytes(model: nn.Module) -> int:
    """Weights, Adam's two moments and its step counter for each of them, buffers."""
    return sum(3 * w.nbytes + FLOAT for w in model.parameters()) + sum(b.nbytes for b in model.buffers())


# --- arithmetic ---


@pytest.mark.parametrize("batch", [1, 7])
def test_a_linear_layer_multiplies_and_adds_once_for_each_weight_and_row(batch: int) -> None:
    layer = nn.Linear(10, 6)
    assert operations(layer, batch, 10) == pytest.approx(2 * 10 * 6)
    assert operations(layer, batch, 9, 10) == pytest.approx(9 * 2 * 10 * 6)


@pytest.mark.parametrize(
    ("layer", "places"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 16 * 12),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), 8 * 6),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), 16 * 12 / 4),
        (nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1), 16 * 12),
    ],
    ids=["every pixel", "stride", "groups", "transposed"],
)
def test_a_convolution_applies_its_kernel_at_every_place(layer: nn.Module, places: float) -> None:
    """Places are those of the output, or of the input of a transposed one."""
    assert operations(layer, 5, 4, 16, 12) == pytest.approx(2 * places * 4 * 8 * 3 * 3)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_its_scores_and_its_sums(masked: bool) -> None:
    heads, queries, keys, width = 2, 9, 13, 4
    other, mask = torch.zeros(5, heads, keys, width), torch.zeros(queries, keys) if masked else None
    found = operations(lambda q: scaled_dot_product_attention(q, other, other, mask), 5, heads, queries, width)
    assert found == pytest.approx(2 * (2 * heads * queries * keys * width))


def test_a_vae_costs_what_its_layers_do() -> None:
    """Sizes 3 x 16 x 16, 4 x 8 x 8, 6 x 4 x 4, twice 5 (mean and variance), and back by transposed convolutions."""
    vae = ConvVAE(ConvVAEConfig(image_size=16, latent_dim=5, hidden_dims=[4, 6])).eval()
    encoder = 9 * (3 * 4 * 64 + 4 * 6 * 16) + 2 * 96 * 5
    decoder = 5 * 96 + 9 * (6 * 4 * 16 + 4 * 4 * 64 + 4 * 3 * 256)
    assert operations(vae, 3, 3, 16, 16) == pytest.approx(2 * (encoder + decoder))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_latent_action_model_costs_what_its_layers_do(laq: LAQ, batch: int) -> None:
    """Attention with its few keys goes another way than with many, and counts as much; a batch shares its bias."""
    inner, hidden, n = HEADS * WIDTH, 8 * DIM // 3, 64

    def block(tokens: int, keys: int, convolved: int) -> int:
        projections, scores = 4 * DIM * inner, 2 * keys * inner
        return tokens * (projections + scores + 3 * DIM * hidden) + convolved * n * 9 * DIM

    cross = n * (2 * DIM * inner + 2 * (CODES + 2) * inner) + CODES * 2 * DIM * inner
    encoder = 2 * n * 12 * DIM + block(2 * n, keys=n, convolved=3) + block(2 * n, keys=2, convolved=3)
    action = 2 * (n * DIM * CODE_DIM + 9 * CODE_DIM**2 * (16 + CODES)) + CODES * CODE_DIM * DIM
    decoder = block(n, keys=n, convolved=1) + cross + n * DIM * 12
    bias = 15 * 15 * (2 * DIM + DIM * DIM + DIM * HEADS)
    found = forward_gflops(lambda b: laq(b["first"], b["x"]), pairs(batch)) * 1e9
    assert found == pytest.approx(2 * (encoder + action + decoder + bias / batch))


# --- memory ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 300])
def test_a_linear_layer_holds_its_output_or_its_gradient(batch: int, bias: bool) -> None:
    """The gradient does not need the output, which is gone by then; the loss and its gradient are a number each."""
    model = nn.Linear(10, 6, bias=bias)
    output, gradient = batch * 6 * FLOAT, sum(w.nbytes for w in model.parameters()) + FLOAT
    assert step_bytes(model, batch, 10) == kept_bytes(model) + max(output, gradient) + FLOAT


class Scale(nn.Module):
    """A factor for each element, and a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(n))
        self.register_buffer("offset", torch.zeros(3 * n))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_gradient_of_each_sample_stands_beside_its_sum_and_buffers_count(batch: int) -> None:
    model = Scale(10)
    of_each = batch * 10 * FLOAT
    assert step_bytes(model, batch, 10) == kept_bytes(model) + of_each + model.factor.nbytes + 2 * FLOAT
    assert kept_bytes(model) == (3 * 10 + 1 + 30) * FLOAT


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_memory_grows_by_what_each_sample_keeps(depth: int) -> None:
    """The output of each tanh is kept for its gradient; beside them stands the one tensor that is being made."""
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())))
    found = [step_bytes(model, batch, 16) for batch in (64, 128, 256, 512)]
    growth = [(more - less) / n for less, more, n in zip(found, found[1:], (64, 128, 256), strict=False)]
    assert growth == 3 * [(depth + 1) * 16 * FLOAT]
    halves = [step_bytes(model, batch, 16, precision="bf16") for batch in (256, 512)]
    assert found[3] - found[2] > halves[1] - halves[0] > 256 * depth * 16 * FLOAT / 2


def test_a_latent_action_model_holds_at_least_its_gradient_and_more_for_more_pairs(laq: LAQ) -> None:
    found = [1e6 * step_memory_mb(laq, lambda m, b: m.loss(b)["mse"], pairs(n), "fp32") for n in (1, 8, 64)]
    weights = sum(w.nbytes for w in laq.parameters())
    assert kept_bytes(laq) + weights < found[0] < found[1] < found[2]
    assert (found[2] - found[1]) / 56 == pytest.approx((found[1] - found[0]) / 7, rel=0.1), "linear in the batch"


def test_measuring_changes_neither_the_model_nor_the_batch(laq: LAQ) -> None:
    """Not the weights, nor the count of the codes' use, which a training step adds to."""
    batch, pointers = pairs(4), [w.data_ptr() for w in laq.parameters()]
    weights, frames = ({k: v.clone() for k, v in of.items()} for of in (laq.state_dict(), batch))
    used = []

    def loss(model: LAQ, batch: dict[str, Tensor]) -> Tensor:
        assert model is not laq and model.training
        value = model.loss(batch)["mse"]
        used.append(int(model.quantizer.usage_batches))
        return value

    forward_gflops(lambda b: laq(b["first"], b["x"]), batch)
    step_memory_mb(laq, loss, batch, "fp32")
    assert used == [1, 2], "the copy counted: it was really trained"
    assert not laq.training and all(w.grad is None for w in laq.parameters())
    assert [w.data_ptr() for w in laq.parameters()] == pointers
    for now, before in ((laq.state_dict(), weights), (batch, frames)):
        assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)
