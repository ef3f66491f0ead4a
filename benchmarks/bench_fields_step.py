"""One training step of the VAE of fields against the same network trained plainly, and the loss curves of both."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.report import in_turns, line, run
from workbench.datasets.loading import batch_indices
from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig
from workbench.runs import Run
from workbench.schedule import TrainConfig, vae_weights
from workbench.training import Trainer, draw_noise

THREADS = 2
RUNS, BATCH = 64, 16
SIZES = HierarchicalVAEConfig(nodes=2000, steps=50, filters=[256, 128, 64, 32], latent_dim=32, hier_latent_dim=8)
SETTINGS = TrainConfig(
    batch_size=BATCH, device="cpu", precision="bf16", lr=1e-4, weight_decay=0.01, recon_weight=1e6, epochs=100
)
STEPS, WARMUP = 30, 2
MIN_RATIO = 1.8
MAX_DEVIATION = 0.02
MAX_DIFFERENCE = 1e-5


class Waves:
    """Fields in memory, (nodes, steps) each, within (-0.7, 0.7): a damped travelling wave of random shape per run."""

    def __init__(self, runs: int, nodes: int, steps: int) -> None:
        random = np.random.default_rng(0)
        x, t = np.linspace(0, 1, nodes)[:, None], np.linspace(0, 1, steps)
        length, speed, damping = random.uniform((1, 0.5, 0), (4, 2, 2), (runs, 3)).T[..., None, None]
        fields = 0.7 * np.sin(2 * np.pi * length * (x - speed * t)) * np.exp(-damping * t)
        self.fields = torch.from_numpy(fields.astype(np.float32))

    def __len__(self) -> int:
        return len(self.fields)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"x": self.fields[torch.from_numpy(indices)]}

    @staticmethod
    def prepare(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def name(self, index: int) -> str:
        return str(index)


def plain_network(network: HierarchicalVAE) -> HierarchicalVAE:
    """The same network and weights out of PyTorch's own layers: Conv1d and its spectral norm."""
    plain = HierarchicalVAE(network.config.model_copy(update={"spectral_norm": False}))
    for module in list(plain.modules()):
        if isinstance(module, nn.Conv1d):
            module.__class__ = nn.Conv1d
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
            spectral_norm(module)
    plain.load_state_dict(network.state_dict())
    return plain


class Plain:
    """A plain loop: float32, AdamW as it comes, and the gradient norm of every parameter read on every step."""

    def __init__(self, model: HierarchicalVAE, data: Waves) -> None:
        self.model, self.data, self.losses = model.train(), data, []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS.lr)
        self.weights = vae_weights(SETTINGS, model.terms)(0.0)
        self.indices = batch_indices(len(data), BATCH, SETTINGS.seed, 0)

    def train_step(self) -> None:
        batch = self.data.prepare(self.data.batch(next(self.indices)))
        batch["noise"] = draw_noise(SETTINGS.seed, len(self.losses), BATCH, self.model.noise_dim)
        self.optimizer.zero_grad()
        terms = self.model.loss(batch)
        loss = sum(weight * terms[name] for name, weight in self.weights.items())
        loss.backward()
        self.norms = {name: p.grad.norm().item() for name, p in self.model.named_parameters() if p.grad is not None}
        nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS.grad_clip)
        self.optimizer.step()
        self.losses.append(loss.item())


class Ours:
    """The workbench's trainer, stepped by hand."""

    def __init__(self, model: HierarchicalVAE, data: Waves, folder: Path) -> None:
        weights = vae_weights(SETTINGS, model.terms)
        no_picture = lambda x, x_hat: Figure()  # noqa: E731
        self.trainer = Trainer(model.train(), data, data, SETTINGS, Run(folder), weights, no_picture)
        self.data, self.losses, self.indices = data, [], batch_indices(len(data), BATCH, SETTINGS.seed, 0)

    def train_step(self) -> None:
        indices = next(self.indices)
        self.losses.append(self.trainer._train_step(indices, self.data.batch(indices))["loss"])


@torch.inference_mode()
def difference(a: HierarchicalVAE, b: HierarchicalVAE, x: Tensor) -> float:
    """Largest difference of two networks' reconstructions, in float32."""
    return float((a.eval()(x) - b.eval()(x)).abs().max())


def main() -> None:
    """Print whether both networks are one, the ratio of their step times, and how far their loss curves differ."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    data, network = Waves(RUNS, SIZES.nodes, SIZES.steps), HierarchicalVAE(SIZES)
    other = plain_network(network)
    apart = difference(network, other, data.fields[:BATCH])
    what = f"network of {SIZES.nodes} nodes, {SIZES.steps} steps, against PyTorch's own layers"
    line(what, f"{apart:.1e}", f"{MAX_DIFFERENCE:.0e}", apart <= MAX_DIFFERENCE)

    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Plain(other, data), Ours(network, data, Path(folder))
        actions = {"plain": plain.train_step, "ours": ours.train_step}
        seconds = in_turns(actions, rounds=STEPS - WARMUP, warmup=WARMUP)
    ratio = seconds["plain"] / seconds["ours"]
    what = f"step of the VAE of fields, batch {BATCH}: {seconds['plain']:.2f} s plainly, {seconds['ours']:.2f} s here"
    line(what, f"{ratio:.2f} times faster", f"at least {MIN_RATIO}", ratio >= MIN_RATIO)

    deviation = float(np.abs(np.array(ours.losses) / np.array(plain.losses) - 1).max())
    what = f"loss curves of {STEPS} steps, largest difference at a step"
    line(what, f"{100 * deviation:.2f} %", f"{100 * MAX_DEVIATION:.0f} %", deviation <= MAX_DEVIATION)


if __name__ == "__main__":
    sys.exit(run(main))
