import builtins
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

from workbench import doctor
from workbench.doctor import Finding, examine, report
from workbench.models.conv_vae import ConvVAE


def test_everything_essential_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 0.0)
    assert report(tmp_path / "outputs") == 0
    out = capsys.readouterr().out
    for line in ("ok       Python 3.", f"ok       torch {torch.__version__}", "ok       forward and backward pass on "):
        assert line in out
    assert "MISSING" not in out and out.endswith("everything essential is there\n")
    assert list((tmp_path / "outputs").iterdir()) == [], "it left something behind"


def test_a_note_is_no_failure_and_a_failure_has_its_remedy(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    findings = [Finding(True, "good"), Finding(False, "slow", "buy a GPU", essential=False)]
    monkeypatch.setattr(doctor, "examine", lambda _: iter(findings))
    assert report(tmp_path) == 0
    findings.append(Finding(False, "broken", "mend it"))
    assert report(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "ok       good",
        "note     slow",
        "         -> buy a GPU",
        "MISSING  broken",
        "         -> mend it",
        "something essential is missing",
    ]


def failing(outputs: Path, capsys: pytest.CaptureFixture) -> list[str]:
    """What is essential and missing, each with its remedy; the exit code must be 1."""
    assert report(outputs) == 1
    lines = capsys.readouterr().out.splitlines()
    return [
        f"{line.removeprefix('MISSING  ')} -> {lines[i + 1].strip(' ->')}"
        for i, line in enumerate(lines)
        if line.startswith("MISSING")
    ]


def test_an_old_python(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_PYTHON", (4, 0))
    (line,) = failing(tmp_path, capsys)
    assert line.startswith("Python 3.") and line.endswith(" -> install Python 3.11 or newer")


def test_no_torch(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_torch(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so.12: cannot open shared object file")
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert failing(tmp_path, capsys) == [
        "torch cannot be imported: libcudart.so.12: cannot open shared object file -> "
        "delete .venv and run `make doctor`"
    ]


def test_no_gpu_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    finding = next(finding for finding in examine(tmp_path) if "CUDA" in finding.text)
    assert finding.text == "no CUDA device: training runs on the CPU" and not finding.ok and not finding.essential
    assert "nothing to do on a machine without a GPU" in finding.remedy


def test_gpus_are_listed_with_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(7e9), int(24e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    texts = [finding.text for finding in doctor._devices()]
    assert texts[1:] == ["cuda:0 card 0, 24.0 GB, 7.0 GB free", "cuda:1 card 1, 24.0 GB, 7.0 GB free"]


def test_a_pass_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(ConvVAE, "loss", fails)
    (line,) = failing(tmp_path, capsys)
    assert line.startswith("forward and backward pass on ")
    assert line.endswith("failed: CUDA error: no kernel image is available -> check driver and torch build")


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert failing(tmp_path / "file" / "outputs", capsys) == [
        f"{tmp_path}/file/outputs cannot be written: Not a directory -> "
        "change its permissions, or name another folder in WORKBENCH_OUTPUTS"
    ]


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10e9, 9e9, 1e9))
    assert failing(tmp_path, capsys) == [
        "1.0 GB free for outputs -> free some space, or name a folder on another disk in WORKBENCH_OUTPUTS"
    ]


def test_no_kernel(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: KernelSpecManager, name: str) -> None:
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert failing(tmp_path, capsys) == [
        f"no Jupyter kernel named python3 -> run `{sys.executable} -m ipykernel install --sys-prefix`"
    ]


@pytest.mark.parametrize("other", ["gone", "another environment", "no python"])
def test_a_kernel_of_another_python(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is the same file: the interpreter of an environment is a link to that of the system."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    if other == "another environment":
        (tmp_path / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
        program.symlink_to(os.path.realpath(sys.executable))
    elif other == "no python":
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    spec = KernelSpec(argv=[str(program), "-m", "ipykernel_launcher"], resource_dir="/r")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    (line,) = failing(tmp_path / "outputs", capsys)
    assert line.startswith(f"kernel python3 starts another Python: {program} -> run `{sys.executable} -m ipykernel")


@pytest.mark.parametrize("program", ["python", "python3", sys.executable])
def test_the_kernel_of_this_python(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec(argv=[program, "-m", "ipykernel_launcher"], resource_dir="/r")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    assert doctor._kernel() == Finding(True, "kernel python3 (/r)")
