"""Shapes and types of public signatures are checked while tests run; no test writes into the project's outputs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))  # for what tests share: tiny.py
sys.path.insert(1, str(Path(__file__).parents[1]))  # and share with benchmarks: lab.py
install_import_hook("workbench", "beartype.beartype")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    from workbench.datasets.threads import usable_cores

    torch.set_num_threads(max(1, usable_cores() // workers))  # else all workers wait for each other


@pytest.fixture(autouse=True)
def own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs go to the test's own folder, and no status file of another test is written to."""
    monkeypatch.setenv("WORKBENCH_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("WORKBENCH_STATUS", raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bit-identity holds for one number of threads; for images as small as those of tiny.py one is the fastest too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
