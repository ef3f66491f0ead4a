"""The run folder: one per run, never overwritten, never wiped; loaded when finished, resumed when not.

`outputs/<experiment>/<run>/` holds config.json (parameters, model, data, versions), status.json (what is going
on), metrics.csv, summary.json (final figures; there when finished), checkpoints/, model.safetensors, samples/,
figures/, TensorBoard events and the executed notebook.
"""

import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import nn

from workbench import __version__
from workbench.checkpoints import (
    build_model,
    load_checkpoint,
    load_safetensors,
    load_weights,
    write_atomically,
)
from workbench.paths import outputs_root
from workbench.progress import STATUS_VARIABLE

PLACE = ("experiment", "run", "cache_dir", "decode_workers", "devices", "num_nodes")
"""Parameters that say where or how fast, and do not change what a run computes, but for rounding."""
HEADER = ("parameters", "started", "versions", "git_commit")
"""What config.json holds from the start; a run that got anywhere has recorded more."""
RESULTS = ("summary.json", "metrics.csv", "checkpoints", "model.safetensors", "parts")
"""What a run has once it got anywhere."""
NODE_VARIABLE = "WORKBENCH_NODE_RANK"
"""Number of this node, where the same notebook is run on several for one training."""
STALE_SECONDS = 60
REASON_WIDTH = 60
REPLACED = 5
"""How often a file is read again that was replaced while it was read."""


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One run folder; make it with `open_run`."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return read_json(self.path / "config.json")

    @property
    def finished(self) -> bool:
        """Whether the run's notebook came to its end."""
        return (self.path / "summary.json").exists()

    @property
    def trained(self) -> bool:
        """Whether the run holds a finished model."""
        return (self.path / "model.safetensors").exists()

    def changes(self) -> list[str]:
        """One line for each version, and the thread count, that is another one than when the run was begun."""
        return differences(self.config["versions"], versions())

    def record(self, **entries: Any) -> None:
        """Add entries such as `data` or `model` to config.json; on a resumed run they must be as before.

        Raises:
            RunError: an entry differs from what the run was begun with.
        """
        config = self.config
        entries = json.loads(json.dumps(entries, default=_plain))
        for key, value in entries.items():
            if key in config and config[key] != value:
                raise RunError(_conflict(self.path, differences({key: config[key]}, {key: value})))
        if not entries.keys() <= config.keys():
            write_json(self.path / "config.json", config | entries)

    def note(self, changes: list[str]) -> None:
        """Add to `changes` of config.json what was no longer as before when the run went on."""
        config = self.config
        write_json(self.path / "config.json", config | {"changes": [*config.get("changes", []), *changes]})

    def figure(self, figure: Figure, name: str) -> Figure:
        """Save a figure as figures/<name>.png and return it; what no file's name may hold becomes a dash."""
        (self.path / "figures").mkdir(exist_ok=True)
        figure.savefig(self.path / "figures" / f"{re.sub(r'[^ -~]|[/:*?<>|]', '-', name)}.png", dpi=120)
        return figure

    def store(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors, such as what was fitted on the training split, to <name>.safetensors; nothing where none."""
        if tensors:
            write_atomically(self.path / f"{name}.safetensors", save(dict(tensors)))

    def part(self, name: str, **settings: Any) -> "Run":
        """A run inside this one, in `parts/<name>`: one of several trainings that this run compares.

        Raises:
            RunError: the folder belongs to other settings.
        """
        path = self.path / "parts" / name
        check_parameters(path, settings)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "config.json").exists() or changed(path, settings):
            values = (settings, now(), versions(), git_commit())
            write_json(path / "config.json", dict(zip(HEADER, values, strict=True)))
        return Run(path)

    def finish(self, **figures: Any) -> None:
        """Write the final figures to summary.json, which marks the run as finished; a finished one is left as is."""
        if not self.finished:
            write_json(self.path / "summary.json", figures | {"finished": now()})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training into this folder; released however this process ends.

        Raises:
            RunError: another process holds it.
        """
        with (self.path / "run.lock").open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read() or "another process"
                raise RunError(f"{self.path} is in use by {owner}: wait for it, or choose another run") from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}")
            handle.flush()
            yield


def open_run(parameters: Mapping[str, Any], root: Path | None = None) -> Run:
    """Make or reopen the folder `<root>/<experiment>/<run>` of a parameter set.

    Args:
        parameters: Every resolved parameter, `experiment` and `run` among them.
        root: Outputs folder; the project's when None.

    Raises:
        RunError: the folder belongs to another configuration (with the differences), or cannot be written.
    """
    path = run_path(parameters, root)
    check_parameters(path, parameters)
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.environ[STATUS_VARIABLE] = str(path / "status.json")
        if not (path / "config.json").exists() or changed(path, parameters):
            values = (dict(parameters), now(), versions(), git_commit())
            write_json(path / "config.json", dict(zip(HEADER, values, strict=True)))
        elif not (path / "summary.json").exists():
            (path / "config.json").touch()
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): choose another outputs folder with the environment "
            "variable WORKBENCH_OUTPUTS, or change its permissions"
        ) from None
    return Run(path)


def run_path(parameters: Mapping[str, Any], root: Path | None = None) -> Path:
    """The folder `<root>/<experiment>/<run>` of a parameter set; `<run>-node1` on node 1 of a training over several.

    Raises:
        RunError: a name that is empty or leads out of the folder above it.
    """
    for key in ("experiment", "run"):
        parts = str(parameters[key]).split("/")
        if any(part.strip(" .") == "" for part in parts) or (key == "run" and len(parts) > 1):
            raise RunError(f"{key}={parameters[key]!r}: must be a folder's name, such as 'vae'")
    node = os.environ.get(NODE_VARIABLE, "0") if parameters.get("num_nodes", 1) > 1 else "0"
    run = parameters["run"] if node == "0" else f"{parameters['run']}-node{node}"
    return (root or outputs_root()) / parameters["experiment"] / run


def holds_nothing(path: Path) -> bool:
    """Whether a run stopped before it had trained or compared anything, and may begin with other parameters."""
    status = read_if_there(path / "status.json")
    return not any((path / name).exists() for name in RESULTS) and not run_state({}, status).startswith("running")


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse a folder whose config.json was written for other parameters, unless the run holds nothing yet.

    Raises:
        RunError: with one line per difference; or the folder is no run's.
    """
    if not (path / "config.json").exists():
        if path.is_dir() and any(entry.suffix != ".tmp" for entry in path.iterdir()):
            raise RunError(f"{path} is not empty and holds no config.json: choose another run, or move it away")
        return
    config = read_json(path / "config.json")
    if "parameters" not in config:
        raise RunError(f"{path}: its config.json is not that of a run: choose another run, or move it away")
    found = changed(path, parameters)
    if found and not holds_nothing(path):
        raise RunError(_conflict(path, found))


def changed(path: Path, parameters: Mapping[str, Any]) -> list[str]:
    """One line for each parameter that is not as in a run's config.json and changes what the run computes."""
    there = {k: v for k, v in read_json(path / "config.json")["parameters"].items() if k not in PLACE}
    return differences(there, {k: v for k, v in parameters.items() if k not in PLACE})


def _conflict(path: Path, found: list[str]) -> str:
    lines = "\n".join(f"  {line}" for line in found)
    remedy = "Give another `experiment` or `run` name, or move the folder away."
    return f"{path} holds a run of another configuration:\n{lines}\n{remedy}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs: `lr: 0.001 there, 0.0001 here`."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new, name = before.get(key, "absent"), after.get(key, "absent"), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif old != new:
            lines.append(f"{name}: {old} there, {new} here")
    return lines


def find_run(experiment: str, run: str, root: Path | None = None) -> Path:
    """Folder of an existing run.

    Raises:
        RunError: there is none; the runs of the experiment are listed.
    """
    folder = (root or outputs_root()) / experiment
    if not (folder / run / "config.json").exists():
        present = sorted(path.parent.name for path in folder.glob("*/config.json"))
        known = f"; it has {', '.join(present)}" if present else "; it has no runs yet"
        raise RunError(f"no run {run!r} in {folder}{known}: train it first with notebook 02, or name another")
    return folder / run


def load_run(path: str | Path, checkpoint: str = "final") -> tuple[nn.Module, dict[str, Any]]:
    """The trained model of a run, in evaluation mode on the CPU, and the run's config.json.

    Args:
        path: Run folder.
        checkpoint: `final` (the weights training ended with) or `best` (lowest validation loss).

    Raises:
        RunError: no such run, or it is unfinished.
        CheckpointError: its files are damaged.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise RunError(f"{path}: no run there (no config.json); {_runs_in(path)}")
    config, weights = read_json(path / "config.json"), path / weights_file(checkpoint)
    if "model" not in config or not (path / "model.safetensors").exists():
        summary = read_if_there(path / "summary.json")
        state = run_state(summary, read_if_there(path / "status.json"))
        remedy = _runs_in(path / "parts") if summary else "run its notebook again to go on"
        raise RunError(f"{path} has no finished model (state: {state}): {remedy}")
    model = build_model(config["model"]["kind"], {k: v for k, v in config["model"].items() if k != "kind"})
    final = checkpoint == "final"
    load_weights(model, load_safetensors(weights) if final else load_checkpoint(weights)["model"], weights)
    return model.eval(), config


def _runs_in(folder: Path) -> str:
    """What to name in the place of a folder that holds no model."""
    present = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"name one of those in {folder}: {', '.join(present)}" if present else "name a run that trains a model"


def weights_file(checkpoint: str) -> str:
    """File of a run folder with its `final` weights (what training ended with) or the `best` (by validation loss).

    Raises:
        RunError: another name.
    """
    files = {"final": "model.safetensors", "best": "checkpoints/best.ckpt"}
    if checkpoint not in files:
        raise RunError(f"checkpoint={checkpoint!r}: must be 'final' or 'best'")
    return files[checkpoint]


def run_state(summary: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """What a run is doing, in words, from its summary.json and status.json."""
    if summary:
        return "finished"
    if not status:
        return "begun"
    progress = f"{status['what']} {status['done']}/{status['total']}" if "done" in status else ""
    state = status["state"]
    if state == "running" and time.time() - status["updated"] > STALE_SECONDS:
        state = "stopped"
    reason = textwrap.shorten(status.get("reason", ""), REASON_WIDTH, placeholder=" …")
    return " ".join(part for part in (state, progress, reason) if part)


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the number of threads."""
    packages = ("numpy", "torchmetrics", "pillow", "av")
    return {
        "workbench": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    } | {name: version(name) for name in packages}


def git_commit() -> str:
    """Commit of the working tree, with `+changes` where files differ; empty outside a git checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+changes",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def now() -> str:
    """Local time to the second, ISO 8601."""
    return datetime.now().isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file.

    Raises:
        RunError: it is damaged.
    """
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); restore it, or move the run folder away") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged (no names and values); restore it, or move the run folder away")
    return content


def _text(path: Path) -> str:
    """What a file holds; read again where another node replaced it meanwhile, which NFS tells as an error."""
    for _ in range(REPLACED):
        try:
            return path.read_text()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_text()


def read_if_there(path: Path) -> dict[str, Any]:
    """Content of a JSON file; nothing where there is none, or none any more."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; NumPy and torch scalars become plain numbers."""
    write_atomically(path, (json.dumps(content, indent=1, default=_plain) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")
