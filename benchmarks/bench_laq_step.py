"""One training step of the latent action model against the same network written and trained plainly."""

import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loops import Ours, Pairs, Plain
from benchmarks.report import in_turns, line, run
from workbench.datasets.loading import Batch
from workbench.models.laq import LAQ, LAQConfig
from workbench.models.laq_transformer import ATTENTION_SCALE, Attention, PositionBias, PositionGenerator, VideoShape
from workbench.objectives import LatentActions, draw_noise
from workbench.schedule import TrainConfig

THREADS = 2
PAIRS, BATCH = 64, 8
SIZES = LAQConfig(image_size=128, patch_size=16, dim=256, spatial_depth=4, temporal_depth=4, heads=8, dim_head=32)
SETTINGS = TrainConfig(batch_size=BATCH, device="cpu", precision="bf16", lr=1e-4, weight_decay=0.01, epochs=100)
STEPS, WARMUP = 30, 2
MIN_RATIO = 1.8
MAX_DEVIATION = 0.02
MAX_DIFFERENCE = 1e-4
CANCELLING = ("position_bias.net.4.bias", "action_conv.2.bias")
"""Constants that cancel in the softmax, and between the two frames: their gradients are nothing but rounding."""


class PlainAttention(Attention):
    """Products and softmax written out, both scales where the reference has them."""

    def forward(self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        source = x if context is None else self.context_norm(context)
        q, k, v = self.to_q(self.norm(x)), *self.to_kv(source).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "n s (h d) -> n h s d", h=self.heads) for t in (q, k, v))
        if context is not None:
            null_k, null_v = rearrange(self.null_kv, "h (m kv) d -> kv 1 h m d", kv=2).expand(-1, len(x), -1, -1, -1)
            k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        logits = torch.einsum("nhid,nhjd->nhij", q, k) * ATTENTION_SCALE
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        out = torch.einsum("nhij,nhjd->nhid", weights, v)
        return self.to_out(rearrange(out, "n h s d -> n s (h d)"))


class PlainGenerator(PositionGenerator):
    """One 3-D convolution, after two empty frames."""

    def forward(self, x: Tensor, shape: VideoShape) -> Tensor:
        video = rearrange(x.reshape(*shape, -1), "b t h w d -> b d t h w")
        out = self.conv(F.pad(video, (1, 1, 1, 1, 2, 0)))
        return rearrange(out, "b d t h w -> b t h w d").reshape(x.shape)


class PlainBias(PositionBias):
    """The network evaluated for every pair of patches."""

    def forward(self, rows: int, columns: int) -> Tensor:
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        offsets = places[:, None] - places
        return rearrange(self.net(offsets.sign() * torch.log(offsets.abs() + 1)), "i j heads -> heads i j")


class PlainLAQ(LAQ):
    """The position bias computed for the encoder and, as in the reference, again for the decoder."""

    def _imagine(self, first: Tensor, patches: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
        return super()._imagine(first, patches, codes, self._bias())


PLAIN = {Attention: PlainAttention, PositionGenerator: PlainGenerator, PositionBias: PlainBias, LAQ: PlainLAQ}


def plain_network(network: LAQ) -> LAQ:
    """The same network and weights, each part written plainly."""
    plain = copy.deepcopy(network)
    for module in plain.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    assert {type(module) for module in plain.modules()} >= set(PLAIN.values()), "a part is not written plainly"
    return plain


def difference(ours: LAQ, plain: LAQ, batch: Batch) -> float:
    """Largest max |a - b| / max |b| of a parameter's gradients, a here, b plainly; CANCELLING by the network's."""
    a, b = (torch.autograd.grad(model.loss(batch)["mse"], list(model.parameters())) for model in (ours, plain))
    names = [name for name, _ in plain.named_parameters()]
    size = {name: gradient.abs().max() for name, gradient in zip(names, b, strict=True)}
    assert all(size[name] > 0 for name in names if name not in CANCELLING), "a parameter has no gradient"
    size |= dict.fromkeys(CANCELLING, max(size.values()))
    return float(torch.stack([(p - q).abs().max() / size[n] for n, p, q in zip(names, a, b, strict=True)]).max())


def main() -> None:
    """Print the ratio of the step times, whether the gradients are the same, and how far the loss curves differ."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    data, network = Pairs(PAIRS + 1, SIZES.image_size), LAQ(SIZES).train()
    other = plain_network(network)
    batch = data.prepare(data.batch(np.arange(BATCH)))
    apart = difference(network, other, batch | {"noise": draw_noise(SETTINGS.seed, 0, BATCH, network.noise_dim)})

    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(LatentActions(other), data, SETTINGS)
        ours = Ours(LatentActions(network), data, SETTINGS, Path(folder))
        actions = {"plain": plain.train_step, "ours": ours.train_step}
        seconds = in_turns(actions, rounds=STEPS - WARMUP, warmup=WARMUP)
    ratio = seconds["plain"] / seconds["ours"]
    what = f"latent action model, batch {BATCH}: {seconds['plain']:.2f} s plainly, {seconds['ours']:.2f} s here"
    line(what, f"{ratio:.2f} times faster", f"at least {MIN_RATIO}", ratio >= MIN_RATIO)

    what = "gradients in float32, largest max |a - b| / max |b| of a parameter"
    line(what, f"{apart:.1e}", f"{MAX_DIFFERENCE:.0e}", apart <= MAX_DIFFERENCE)

    deviation = float(np.abs(np.array(ours.losses) / np.array(plain.losses) - 1).max())
    what = f"loss curves of {STEPS} steps, largest difference at a step"
    line(what, f"{100 * deviation:.2f} %", f"{100 * MAX_DEVIATION:.0f} %", deviation <= MAX_DEVIATION)


if __name__ == "__main__":
    sys.exit(run(main))
