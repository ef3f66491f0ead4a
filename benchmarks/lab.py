"""JupyterLab, started as by `make lab` but with settings of its own, and Chromium that opens its notebooks."""

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import psutil

from workbench.lab_connection import PromptConnection

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
OWN = ["IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR"]
OWN += ["JUPYTERLAB_WORKSPACES_DIR"]
APP = "window.jupyterapp"
IDLE = f"{APP}?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
NO_KERNELS = f"{APP}?.serviceManager.sessions.shutdownAll()"
THEME = f"theme => {APP}.commands.execute('apputils:change-theme', {{theme}})"
WAIT_MS, START_S = 120_000, 60


def missing() -> str:
    """What driving a browser lacks here, with the remedy; empty where it lacks nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is missing: pip install playwright"
    return "" if CHROMIUM else "Chromium is missing: make browser"


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel), path
    )


@contextmanager
def jupyterlab(folder: Path, **environment: str) -> Iterator[str]:
    """JupyterLab over folder/lab, behind a token; it and its kernels are ended in every case.

    Its settings and the profile of the browser lie in `folder` too.

    Yields:
        The address of a notebook, but for its name: `{}`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), folder / "jupyterlab.log"
    connection = f"{PromptConnection.__module__}.{PromptConnection.__name__}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--expose-app-in-browser"]
    command += [f"--ServerApp.kernel_websocket_connection_class={connection}"]
    own = {name: str(folder / name.lower()) for name in OWN} | {"PYTHONPATH": str(Path(__file__).parents[1])}
    _be_quiet(Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension")
    (folder / "lab").mkdir(exist_ok=True)
    with log.open("w") as out:
        settings = {"cwd": folder / "lab", "env": os.environ | own | environment}
        server = psutil.Popen(command, **settings, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/api?token={token}", log)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
        finally:
            _end(server)


def _be_quiet(folder: Path) -> None:
    """No notices on the page, and nothing fetched for them."""
    folder.mkdir(parents=True)
    (folder / "notification.jupyterlab-settings").write_text('{"checkForUpdates": false, "fetchNews": "false"}')


def _wait_for(server: psutil.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab does not answer:\n{log.read_text()}")


def _end(server: psutil.Popen) -> None:
    """End a server and all that it started; kernels have sessions of their own, which no group signal reaches."""
    family = [server, *(server.children(recursive=True) if server.is_running() else [])]
    server.terminate()
    psutil.wait_procs([server], timeout=15)
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=5)


@contextmanager
def chromium(folder: Path, width: int = 1500, height: int = 1000) -> Iterator["Page"]:
    """A page of headless Chromium, of some size [px]."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        settings = {"executable_path": CHROMIUM, "args": FLAGS, "viewport": {"width": width, "height": height}}
        browser = driver.chromium.launch_persistent_context(str(folder / "profile"), **settings)
        yield browser.pages[0]
        browser.close()


def open_notebook(page: "Page", address: str) -> None:
    """Open a notebook, end the kernels of those before, and wait until its own is ready."""
    page.evaluate(NO_KERNELS)
    page.goto(address, timeout=WAIT_MS)
    page.wait_for_function(IDLE, timeout=WAIT_MS)


def run_all(page: "Page") -> bool:
    """Run all cells; whether none has failed."""
    return page.evaluate(f"{APP}.commands.execute('notebook:run-all-cells')")
