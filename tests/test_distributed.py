"""Several processes, each with a part of every batch, learn what one process with all of it does."""

from functools import partial
from pathlib import Path
from typing import Any

import divided
import pytest
import torch
from divided import BATCH, CASES, STEPS, Tensors, in_processes, stepped, trainer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.distributed import ALONE, PeerLost, World, _forward, synchronised
from workbench.objectives import evaluate
from workbench.worker import Silent

pytestmark = pytest.mark.usefixtures("one_thread")
Rows = dict[str, list[dict[str, float]]]
LENGTHS = {"conv_vae": 50, "laq nsvq": 12}
"""Of the latent action model long enough for unused codes to be replaced."""
OF_A_BATCH = {"layout_autoencoder": ("segmentation", "classification"), "laq nsvq": ("perplexity",)}
"""Terms that are no means over samples."""


@pytest.fixture(scope="module")
def alone(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return _curves(ALONE, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def of_two(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    folder = tmp_path_factory.mktemp("two")
    return in_processes(2, lambda world: _curves(world, folder), folder)


@pytest.fixture(scope="module")
def of_four(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    folder = tmp_path_factory.mktemp("four")
    return in_processes(4, lambda world: _curves(world, folder), folder)


def _curves(world: World, folder: Path) -> Rows:
    return {name: stepped(trainer_of(name, folder, world), LENGTHS.get(name, STEPS)) for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["of_two", "of_four"])
def test_the_loss_curve_is_that_of_one_process(
    case: str, size: str, alone: Rows, request: pytest.FixtureRequest
) -> None:
    for rows in request.getfixturevalue(size):
        for row, expected in zip(rows[case], alone[case], strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_unused_codes_were_replaced_in_these_curves(alone: Rows) -> None:
    assert sum(row["replaced"] for row in alone["laq nsvq"]) > 0


# --- batch norm ---


def _normalised(x: torch.Tensor, aim: torch.Tensor, norm: nn.BatchNorm2d) -> list[torch.Tensor]:
    """Output, gradients and running statistics after one step."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * aim).mean().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def _norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def test_batch_norm_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """Output, gradient and running statistics; samples whose mean is far from 0 and differs between processes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 4, generator=generator) + 100 + torch.arange(8)[:, None, None, None]
    aim = torch.randn(8, 3, 4, 4, generator=generator)
    names = list(nn.Sequential(_norm()).state_dict())

    def work(world: World) -> list[torch.Tensor]:
        norm, part = _norm(), world.part(8)
        with synchronised(nn.Sequential(norm), world):
            found = _normalised(x[part], aim[part], norm)
            assert list(nn.Sequential(norm).state_dict()) == names
        assert norm.eval()(x).shape == x.shape and "forward" not in vars(norm), "it was not put back"
        return [*found, norm.num_batches_tracked]

    first, second = in_processes(2, work, tmp_path)
    whole = _normalised(x, aim, _norm())
    joined = [torch.cat([a, b]) for a, b in zip(first[:2], second[:2], strict=True)]
    averaged = [(a + b) / 2 for a, b in zip(first[2:6], second[2:6], strict=True)]
    joined[1] = joined[1] / 2  # the loss is the mean of the two
    for found, expected in zip([*joined, *averaged], whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(first[4], second[4]) and torch.equal(first[5], second[5]) and first[6] == 1


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 4), (8, 4, 4, 3)])
def test_batch_norm_of_one_process_is_that_of_torch(shape: tuple[int, ...], device: str) -> None:
    """In every layout of memory, as CUDA has kernels of their own for channels-last images."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x = x.movedim(-1, 1) if shape[1] != 3 else x
    kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    norm, own = kind(3).to(device), kind(3).to(device)
    own.forward = partial(_forward, own, ALONE)
    for found, expected in zip(_normalised(x, x.square(), own), _normalised(x, x.square(), norm), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Strict(TorchDispatchMode):
    """Refuses what the CUDA kernel for channels-last images refuses."""

    def __torch_dispatch__(self, op: Any, types: Any, given: tuple = (), kwargs: dict | None = None) -> Any:
        if op is torch.ops.aten.native_batch_norm_backward.default:
            assert given[5] is not None and given[6] is not None, "save_mean should always be defined"
        return op(*given, **kwargs or {})


def test_batch_norm_gives_backward_all_that_cuda_asks_for() -> None:
    norm = _norm()
    norm.forward = partial(_forward, norm, ALONE)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    with Strict():
        norm(x).square().sum().backward()
    assert x.grad is not None


# --- out of memory ---


@pytest.mark.parametrize("case", ["conv_vae", "layout_autoencoder"])
def test_one_process_out_of_memory_makes_all_take_the_step_again(case: str, alone: Rows, tmp_path: Path) -> None:
    """In the middle of the forward pass, when the other waits at the next batch norm, or at the end."""

    def work(world: World) -> list[dict[str, float]]:
        trainer = trainer_of(case, tmp_path, world)
        layer = trainer.model.encoder[1] if case == "conv_vae" else trainer.model.decoder
        forward = layer.forward

        def runs_out(x: torch.Tensor) -> torch.Tensor:
            if world.rank == 1 and trainer.step == 1 and len(x) > BATCH // 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(x)

        layer.forward = runs_out
        return [*stepped(trainer, 3), {"micro_batches": trainer.micro_batches}]

    for *rows, last in in_processes(2, work, tmp_path):
        assert last["micro_batches"] == 4
        tolerance = 1e-5 if case == "layout_autoencoder" else 0.1  # batch norm sees the micro-batches
        for row, expected in zip(rows, alone[case][:3], strict=True):
            assert row["mse"] == pytest.approx(expected["mse"], rel=tolerance)


def test_a_sample_that_does_not_fit_in_one_process_ends_all(tmp_path: Path) -> None:
    def work(world: World) -> str:
        trainer = trainer_of("conv_vae", tmp_path, world)

        def runs_out(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer.loss = runs_out if world.rank == 1 else trainer.loss
        with pytest.raises(torch.OutOfMemoryError) as caught:
            stepped(trainer, 1)
        return str(caught.value)

    other = "another process of the training ran out of memory; lower batch_size"
    assert in_processes(2, work, tmp_path) == [other, "CUDA out of memory."]


# --- validation, and what processes tell each other ---


@pytest.mark.parametrize("samples", [1, 8, 13])
def test_validation_is_the_mean_over_all_samples_in_every_process(samples: int, tmp_path: Path) -> None:
    """With fewer samples than processes have batches, too."""
    data, asked = Tensors(x=divided.images()[:samples]), []

    def work(world: World) -> dict[str, float]:
        model = trainer_of("conv_vae", tmp_path, world).model
        return evaluate(model, data, 4, world=world, after_batch=lambda done: asked.append(world.most(done)))

    expected = evaluate(trainer_of("conv_vae", tmp_path).model, data, 4)
    first, second = in_processes(2, work, tmp_path)
    assert first == second == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", OF_A_BATCH)
def test_terms_of_a_batch_are_validated_on_the_batches_of_one_process(case: str, tmp_path: Path) -> None:
    """Means over what is labelled, of which some samples have more, and the perplexity."""

    def work(world: World) -> float:
        trainer = trainer_of(case, tmp_path, world)
        trainer.stop, trainer.log, trainer.progress = {}, None, Silent(1, "training")
        trainer.weights = lambda share: dict.fromkeys(OF_A_BATCH[case], 1.0)
        trainer._validate()
        return trainer.best

    assert in_processes(2, work, tmp_path) == pytest.approx([work(ALONE)] * 2, rel=1e-6)


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def work(world: World) -> list:
        state = world.first({"a": torch.arange(3), "b": 1.5} if world.rank == 0 else None)
        assert state["a"].tolist() == [0, 1, 2] and state["b"] == 1.5
        tensors = [torch.full((2, 3), float(world.rank)), torch.full((2,), world.rank, dtype=torch.float64)]
        world.mean(tensors)
        rows = world.gather(torch.tensor([[world.rank]]))
        return [world.most(world.rank * 15), world.collect(world.rank), *tensors, rows, world.writes]

    for rank, (most, each, *means, rows, writes) in enumerate(in_processes(3, work, tmp_path)):
        assert most == 30 and each == [0, 1, 2] and rows.tolist() == [[0], [1], [2]]
        assert all(torch.equal(x, torch.ones_like(x)) for x in means), "dtypes are kept apart"
        assert writes == (rank == 0)


def test_a_process_that_dies_ends_the_others_with_an_error_of_its_own(tmp_path: Path) -> None:
    def work(world: World) -> bool:
        if world.rank == 1:
            return True
        with pytest.raises(PeerLost, match="the processes of the training have lost each other: "):
            for _ in range(1000):
                world.most(0)
        return True

    assert in_processes(2, work, tmp_path) == [True, True]


def test_parts_of_a_batch() -> None:
    worlds = [World(rank, 4) for rank in range(4)]
    assert [list(range(32))[world.part(32)] for world in worlds] == [list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    assert list(range(7))[ALONE.part(7)] == list(range(7))
