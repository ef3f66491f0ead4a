"""The spectral norm of the hierarchical VAE: held at one, equal to torch's, with a gradient of its own."""

from collections.abc import Callable

import pytest
import torch

from workbench.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEConfig
from workbench.models.spectral_norm import Quotient, spectral_norm

SMALL = HierarchicalVAEConfig(nodes=5, steps=4, latent_dim=3, hier_latent_dim=2, filters=[6, 4, 3])


def small(normed: bool = True) -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(SMALL.model_copy(update={"spectral_norm": normed}))


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def effective_weights(model: HierarchicalVAE) -> dict[str, torch.Tensor]:
    """Weights as used, as matrices: outputs by the rest."""
    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            transposed = isinstance(module, torch.nn.ConvTranspose1d)
            weight = module.weight.detach()
            matrices[name] = (weight.transpose(0, 1) if transposed else weight).flatten(1)
    return matrices


def largest(model: HierarchicalVAE) -> torch.Tensor:
    return torch.stack([torch.linalg.matrix_norm(w, 2) for w in effective_weights(model).values()])


def test_the_largest_singular_value_is_held_at_one() -> None:
    model = small()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("parametrizations.weight.original"):
                p.copy_(3 * seeded(*p.shape, seed=i))
        model.eval()
        assert (largest(model) - 1).abs().max() > 0.1, "the test would pass anyway"
        model(seeded(4, 5, 4))
        assert (largest(model) - 1).abs().max() > 0.1, "evaluation changed the weights"
        model.train()
        for _ in range(60):
            model(seeded(4, 5, 4))
        model.eval()
    assert len(largest(model)) == sum("weight.original" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(largest(model), torch.ones(len(largest(model))), rtol=0, atol=0.01)
    assert (largest(small(normed=False)) - 1).abs().max() > 0.1


LAYERS = {
    "linear": lambda: torch.nn.Linear(7, 4),
    "convolution": lambda: torch.nn.Conv1d(4, 6, 3),
    "transposed": lambda: torch.nn.ConvTranspose1d(4, 6, 3),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_the_spectral_norm_is_that_of_torch(make: Callable) -> None:
    """Weights, buffers and gradients, from the same draws, over steps in training and one at evaluation.

    In double precision, as rounding grows from step to step.
    """
    layers = []
    for register in (spectral_norm, torch.nn.utils.parametrizations.spectral_norm):
        torch.manual_seed(0)
        layers.append(make().double())
        register(layers[-1])
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    aim = seeded(*ours.parametrizations.weight.original.shape)
    for training in (True, True, True, False):
        for layer in layers:
            layer.train(training).zero_grad()
            (layer.weight * aim).sum().backward()
            with torch.no_grad():
                layer.parametrizations.weight.original.sub_(0.1 * layer.parametrizations.weight.original.grad)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)


def test_the_gradient_of_the_spectral_norm_is_a_finite_difference() -> None:
    weight, u, v = (seeded(*shape, seed=i).double() for i, shape in enumerate([(3, 4), (3,), (4,)]))
    assert torch.autograd.gradcheck(lambda w: Quotient.apply(w, u, v), weight.requires_grad_())


def test_under_autocast_the_spectral_norm_stays_in_float32() -> None:
    model = small().eval()
    exact = largest(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(w.dtype == torch.float32 for w in effective_weights(model).values())
        torch.testing.assert_close(largest(model), exact)
        terms = model.train().loss({"x": seeded(4, 5, 4), "noise": seeded(4, model.noise_dim)})
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())
