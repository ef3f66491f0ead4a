import os
import runpy
import signal

import pytest
import torch

from workbench import process
from workbench.process import deterministic_kernels, leave, pick_device, stop_signals


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == {"signal": signal.SIGINT}
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was ignored")
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_noted_inside_and_handled_as_before_outside(number: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop == {"signal": number}
    assert signal.getsignal(number) == before


def test_leaving_by_the_exception_of_the_signal(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        leave(signal.SIGUSR1, "stopped")
    assert caught.value.code == 75
    with pytest.raises(KeyboardInterrupt, match="^stopped: run it again to go on$"):
        leave(signal.SIGINT, "stopped")
    assert capsys.readouterr().out == "stopped\nstopped\n"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(ValueError) as caught:
        pick_device("gpu")
    assert str(caught.value) == "device='gpu': must be 'auto', 'cpu', 'cuda', 'cuda:0', 'cuda:1' and so on"
    with pytest.raises(ValueError, match="^device='cuda': 0 CUDA devices are present; use 'auto' or 'cpu'$"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="^device='cuda:2': 2 CUDA devices are present; use 'auto' or 'cpu'$"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_products_on_a_gpu_can_be_deterministic_whenever_the_first_one_is(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch reads the variable at the first of them, which a notebook may make before it trains."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    runpy.run_path(process.__file__)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


def test_kernels_are_deterministic_inside_and_as_before_outside() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        raise KeyError
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
