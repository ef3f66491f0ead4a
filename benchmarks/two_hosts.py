"""A training over two hosts, one of which is lost and comes back: does it end in the undisturbed run's bits?

The hosts are two network namespaces joined by a pair of virtual interfaces, with addresses kept for documentation.
Needs root and `ip`: `python -m benchmarks.two_hosts`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import line, run
from workbench.provenance import file_digest

NAMES = (f"wb{os.getpid()}a", f"wb{os.getpid()}b")
ADDRESSES = ("192.0.2.1", "192.0.2.2")
PORT = 29500
LOST_AFTER = 10
"""Steps."""
SECONDS = 300


def train(folder: Path) -> None:
    """This host's part of one short training, slow enough to be met in the middle."""
    import torch

    from benchmarks.loops import Blobs
    from workbench.models.conv_vae import ConvVAE, ConvVAEConfig
    from workbench.runs import open_run
    from workbench.schedule import TrainConfig, vae_weights
    from workbench.training import fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = TrainConfig(
        num_nodes=2, epochs=2, batch_size=32, lr=1e-3, device="cpu", checkpoint_every=2, log_every=1, images_every=1000
    )
    run = open_run({"experiment": folder.name, "run": "run", **config.model_dump()}, root=folder.parent)
    model = ConvVAE(ConvVAEConfig(image_size=64, latent_dim=8, hidden_dims=[32, 64, 128]))
    fit(model, "conv_vae", Blobs(640, 64), Blobs(64, 64), config, run, vae_weights(config))


def ip(*words: str) -> None:
    """One `ip` command."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """The namespaces, joined; taken away at the end, with what still runs in them."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", NAMES[0], "netns", NAMES[0], "type", "veth", "peer", "name", NAMES[1], "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            link(name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            if Path("/run/netns", name).exists():
                kill(name)
                ip("netns", "delete", name)


def link(name: str, state: str) -> None:
    """Plug a host's cable in (up) or out (down)."""
    ip("-n", name, "link", "set", name, state)


def kill(name: str) -> None:
    """End every process of a host as a power cut does."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def start(node: int, folder: Path) -> subprocess.Popen:
    """The training on a host."""
    own = {"WORKBENCH_NODE_RANK": str(node), "WORKBENCH_RENDEZVOUS": f"{ADDRESSES[0]}:{PORT}"}
    command = ["ip", "netns", "exec", NAMES[node], sys.executable, "-m", "benchmarks.two_hosts", str(folder)]
    log = (folder.parent / f"{folder.name}-{node}.log").open("a")
    return subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)


def ended(hosts: list[subprocess.Popen], folder: Path) -> None:
    """Wait for both hosts."""
    codes = [host.wait(SECONDS) for host in hosts]
    if codes != [0, 0]:
        logs = "\n".join((folder.parent / f"{folder.name}-{node}.log").read_text() for node in (0, 1))
        raise SystemExit(f"the hosts ended with codes {codes}:\n{logs}")


def steps(folder: Path) -> int:
    """Rows of training steps that the first host has written."""
    path = folder / "run" / "metrics.csv"
    return sum(",train," in row for row in path.read_text().splitlines()) if path.exists() else 0


def main() -> None:
    """Train undisturbed, then with the second host lost in the middle, and compare."""
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("needs root and `ip` (Debian: iproute2), to make network namespaces")
    with tempfile.TemporaryDirectory() as temporary, two_hosts():
        whole, disturbed = Path(temporary, "undisturbed"), Path(temporary, "disturbed")
        ended([start(node, whole) for node in (0, 1)], whole)
        hosts = [start(node, disturbed) for node in (0, 1)]
        while steps(disturbed) < LOST_AFTER:
            time.sleep(0.1)
            if hosts[0].poll() is not None:
                ended(hosts, disturbed)
        link(NAMES[1], "down")  # no farewell reaches the first host
        kill(NAMES[1])
        hosts[1].wait(SECONDS)
        lost_at = steps(disturbed)
        time.sleep(5)
        link(NAMES[1], "up")
        hosts[1], back = start(1, disturbed), time.monotonic()
        resumed = disturbed.parent / "disturbed-0.log"
        while resumed.read_text().count("resumed ") < 1 and hosts[0].poll() is None:
            time.sleep(0.1)
        seconds = time.monotonic() - back
        ended(hosts, disturbed)
        digests = {file_digest(f / r / "model.safetensors") for f in (whole, disturbed) for r in ("run", "run-node1")}
        line("steps before the second host was lost", f"{lost_at}", f">= {LOST_AFTER}", lost_at < steps(whole))
        line("from its return to the resumed training", f"{seconds:.0f} s", "120 s", seconds < 120)
        line("different final weights, of both hosts and both runs", f"{len(digests)}", "1", len(digests) == 1)


if __name__ == "__main__":
    train(Path(sys.argv[1])) if len(sys.argv) > 1 else sys.exit(run(main))
