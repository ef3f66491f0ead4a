"""What a model costs: arithmetic of one prediction, memory of one training step."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from workbench.datasets.loading import Batch
from workbench.process import autocast

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss that a model would minimise on a batch."""


def forward_gflops(predict: Callable[[Batch], Any], batch: Batch) -> float:
    """Arithmetic of a prediction per sample, in units of 10^9 operations, a multiply-add counted as two.

    Matrix products, convolutions and attention are counted, as they are in all published figures; the rest is not.
    """
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(batch)
    return counter.get_total_flops() / len(batch["x"]) / 1e9


def step_memory_mb(model: nn.Module, loss: Loss, batch: Batch, precision: str) -> float:
    """Peak memory of tensors in one training step in MB: weights, gradients, Adam's state, and what the pass keeps.

    Measured on a copy of the model, in its second step, as the first makes Adam's state. The batch is not counted.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    device = next(model.parameters()).device

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            value = loss(model, batch)
        value.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    kept = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state))
    return (kept + _peak(step, device)) / 1e6


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that a step holds at once beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Held() as held:
        step()
    return held.most


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, from their making until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **kwargs)
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, Tensor)):
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size
