import pytest
import torch

from workbench.layers import Dropout, LatentLayout, Posterior, Shard, shard, sharded


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sample_scales_noise_by_the_standard_deviation() -> None:
    mu, logvar, noise = random(4, 3), random(4, 3, seed=1), random(4, 3, seed=2)
    z = Posterior(mu, logvar).sample(noise)
    torch.testing.assert_close((z - mu) / noise, logvar.exp().sqrt())


def test_a_deterministic_posterior_ignores_noise_and_has_no_kl() -> None:
    mu = random(4, 3)
    posterior = Posterior(mu)
    assert torch.equal(posterior.sample(random(4, 3, seed=1)), mu)
    with pytest.raises(ValueError, match="logvar=None: a deterministic encoder has no KL; leave the term out"):
        posterior.kl()


def test_dimensions_behind_the_variance_are_points() -> None:
    """logvar of 2 of 5 dimensions: noise and KL concern these two, and the other three are as the mean has them."""
    mu, logvar, noise = random(4, 5), random(4, 2, seed=1), random(4, 2, seed=2)
    posterior = Posterior(mu, logvar)
    z = posterior.sample(noise)
    assert z.shape == (4, 5) and torch.equal(z[:, 2:], mu[:, 2:])
    torch.testing.assert_close(z[:, :2], mu[:, :2] + logvar.exp().sqrt() * noise)
    assert torch.equal(posterior.gaussian_mu, mu[:, :2])
    torch.testing.assert_close(posterior.kl(), 0.5 * (mu[:, :2] ** 2 + logvar.exp() - 1 - logvar).sum(1))
    assert torch.equal(posterior.kl(), Posterior(mu[:, :2], logvar).kl())
    assert Posterior(mu).gaussian_mu.shape == (4, 0)


def test_layout_round_trip_in_the_order_given() -> None:
    layout = LatentLayout(main=(5,), grid=(2, 3, 4), level=(1,))
    assert layout.size == 30
    assert layout.slices == {"main": slice(0, 5), "grid": slice(5, 29), "level": slice(29, 30)}
    latents = {name: random(7, *shape, seed=i) for i, (name, shape) in enumerate(layout.shapes.items())}
    z = layout.flatten(dict(reversed(latents.items())))
    assert z.shape == (7, 30)
    assert torch.equal(z[:, 5:29], latents["grid"].reshape(7, 24))
    parts = layout.unflatten(z)
    assert list(parts) == ["main", "grid", "level"]
    for name, part in parts.items():
        assert torch.equal(part, latents[name])
        assert part.untyped_storage().data_ptr() == z.untyped_storage().data_ptr(), "a copy, not a view"


@pytest.mark.parametrize(
    "latents",
    [
        {"a": (2,)},
        {"a": (2,), "b": (3,), "c": (1,)},
        {"a": (2,), "b": (4,)},
        {"a": (2,), "c": (3,)},
    ],
    ids=["missing", "extra", "misshapen", "renamed"],
)
def test_flatten_refuses_other_latents(latents: dict[str, tuple[int, ...]]) -> None:
    layout = LatentLayout(a=(2,), b=(3,))
    with pytest.raises(ValueError) as caught:
        layout.flatten({name: torch.zeros(1, *shape) for name, shape in latents.items()})
    assert str(caught.value) == f"latents of shapes {latents}: must be {layout.shapes}, without the batch axis"


def test_unflatten_refuses_another_length() -> None:
    with pytest.raises(ValueError, match=r"z has 4 values per sample: must have 5 \(\{'a': \(2,\), 'b': \(3,\)\}\)"):
        LatentLayout(a=(2,), b=(3,)).unflatten(torch.zeros(1, 4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [2, 4])
def test_dropout_and_noise_are_drawn_for_the_whole_batch(size: int, memory_format: torch.memory_format) -> None:
    """The parts together have the numbers that one process draws, in every layout of memory."""
    dropout, x = Dropout(0.4), torch.randn(8, 3, 5, 5).contiguous(memory_format=memory_format)
    torch.manual_seed(1)
    whole = torch.cat([dropout(x), torch.randn_like(x)])
    assert (whole == 0).sum() > 100
    kept, drawn = [], []
    for rank, part in enumerate(x.chunk(size)):
        torch.manual_seed(1)
        with sharded(Shard(rank, size)):
            kept.append(dropout(part))
            drawn.append(shard().drawn_like(part, torch.randn_like))
    assert torch.equal(torch.cat([*kept, *drawn]), whole)
    assert shard().size == 1


def test_dropout_is_nothing_at_evaluation_and_at_0() -> None:
    x = torch.randn(4, 3)
    with sharded(Shard(1, 2)):
        assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_sums_over_the_shards() -> None:
    """`gather` gives the rows of all."""
    counts = torch.tensor([1, 2])
    assert torch.equal(Shard().total(counts), counts)
    assert torch.equal(Shard(0, 3, lambda x: torch.cat([x, x, 2 * x])).total(counts), 4 * counts)
