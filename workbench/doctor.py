"""`workbench doctor`: what is there, what is missing, and what to do about it."""

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_PYTHON = (3, 11)
MIN_FREE_GB = 2.0
PYTHONS = ("python", f"python{sys.version_info[0]}", f"python{sys.version_info[0]}.{sys.version_info[1]}")
"""Names that a kernel specification may give for the Python that starts the kernel, as jupyter_client reads them."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool
    text: str
    remedy: str = ""
    essential: bool = True


def examine(outputs: Path) -> Iterator[Finding]:
    """Look at everything the workbench needs, in the order in which things build on each other."""
    yield _python()
    torch_found = _torch()
    yield torch_found
    if torch_found.ok:
        yield from _devices()
        yield _step()
    yield _writable(outputs)
    yield _disk(outputs)
    yield _kernel()


def report(outputs: Path) -> int:
    """Print the findings, with a remedy under each that failed; exit code 1 if anything essential did."""
    failed = False
    for finding in examine(outputs):
        mark = "ok     " if finding.ok else "MISSING" if finding.essential else "note   "
        print(f"{mark}  {finding.text}")
        if not finding.ok:
            print(f"         -> {finding.remedy}")
        failed |= finding.essential and not finding.ok
    print("something essential is missing" if failed else "everything essential is there")
    return int(failed)


def _python() -> Finding:
    ok = sys.version_info >= MIN_PYTHON
    return Finding(ok, f"Python {platform.python_version()} ({sys.executable})", "install Python 3.11 or newer")


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(False, f"torch cannot be imported: {error}", "delete .venv and run `make doctor`")
    return Finding(True, f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads")


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield Finding(True, f"memory {memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available")
    if not torch.cuda.is_available():
        remedy = "nothing to do on a machine without a GPU; else check `nvidia-smi` and the driver's version"
        yield Finding(False, "no CUDA device: training runs on the CPU", remedy, essential=False)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(True, f"cuda:{index} {name}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free")


def _step() -> Finding:
    """A forward and a backward pass of the smallest ConvVAE on the device that training would take."""
    import torch

    try:
        from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
        from workbench.process import pick_device
    except ImportError as error:
        return Finding(False, f"the workbench cannot be imported: {error}", "delete .venv and run `make doctor`")
    device = pick_device()
    try:
        model = ConvVAE(ConvVAEConfig(image_size=8, latent_dim=2, hidden_dims=[4, 4])).to(device)
        sum(model.loss({"x": torch.zeros(2, 3, 8, 8, device=device)}).values()).backward()
    except RuntimeError as error:
        return Finding(False, f"forward and backward pass on {device} failed: {error}", "check driver and torch build")
    return Finding(True, f"forward and backward pass on {device}")


def _writable(outputs: Path) -> Finding:
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs):
            pass
    except OSError as error:
        remedy = "change its permissions, or name another folder in WORKBENCH_OUTPUTS"
        return Finding(False, f"{outputs} cannot be written: {error.strerror}", remedy)
    return Finding(True, f"{outputs} can be written")


def _disk(outputs: Path) -> Finding:
    place = next(path for path in (outputs, *outputs.parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    remedy = "free some space, or name a folder on another disk in WORKBENCH_OUTPUTS"
    return Finding(free >= MIN_FREE_GB, f"{free:.1f} GB free for outputs", remedy)


def _kernel() -> Finding:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = f"run `{sys.executable} -m ipykernel install --sys-prefix`"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding(False, "no Jupyter kernel named python3", remedy)
    program = sys.executable if spec.argv[0] in PYTHONS else shutil.which(spec.argv[0])
    if program is None or _prefix(program) != sys.prefix:
        return Finding(False, f"kernel python3 starts another Python: {spec.argv[0]}", remedy)
    return Finding(True, f"kernel python3 ({spec.resource_dir})")


def _prefix(program: str) -> str:
    """The environment that a Python belongs to; empty where it does not start."""
    if program == sys.executable:
        return sys.prefix
    try:
        done = subprocess.run(
            [program, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
