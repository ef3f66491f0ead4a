"""What a training asks of its process: a device, deterministic kernels, signals that wait for the end of a step."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import torch
from pydantic import AfterValidator

# without it cuBLAS refuses to run deterministically; torch looks once, at the process's first product on a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

PREEMPTED_EXIT = 75
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Said by the CPU's allocator, and by what takes memory of a GPU past torch's."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def known_device(name: str) -> str:
    """The name itself if it is one of a device, which need not be present here; else a ValueError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("must be 'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1' and so on")
    return name


DeviceName = Annotated[str, AfterValidator(known_device)]


class Preempted(SystemExit):
    """Work stopped on SIGTERM or SIGUSR1 and can go on later; leaves the process with exit code 75."""


def leave(number: int, message: str) -> NoReturn:
    """Leave by the exception that belongs to a signal.

    Raises:
        KeyboardInterrupt: the signal is SIGINT.
        Preempted: it is another one.
    """
    print(message, flush=True)
    if number == signal.SIGINT:
        raise KeyboardInterrupt(f"{message}: run it again to go on")
    raise Preempted(PREEMPTED_EXIT)


@contextmanager
def handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handle` receive SIGTERM, SIGUSR1 and SIGINT inside the block.

    Outside the main thread, where Python allows no handlers, they do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def stop_signals() -> Iterator[Mapping[str, int]]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying from them; a second SIGINT interrupts at once.

    Yields:
        A dict that holds the number of the signal under "signal" once one has arrived.
    """
    arrived: dict[str, int] = {}

    def note(number: int, frame: Any) -> None:
        arrived["signal"] = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(note):
        yield arrived


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Only deterministic kernels inside the block; the settings before are put back after it."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; `auto` is CUDA where present.

    Raises:
        ValueError: no such name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(known_device(name))
    except ValueError as error:
        raise ValueError(f"device={name!r}: {error}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: {torch.cuda.device_count()} CUDA devices are present; use 'auto' or 'cpu'")
    return device


def device_name(device: torch.device) -> str:
    """What a device is, for bits that depend on it: the GPU's model with its CUDA and cuDNN, or the CPU's abilities."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast for `bf16`, nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_generators(value: int) -> None:
    """Set the default generators, those of dropout and augmentation, of the CPU and of CUDA where it is in use."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in NO_MEMORY)
