"""What a training writes down: metrics.csv and TensorBoard events, cut back on resume to the step resumed from."""

import csv
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

UNITS = {
    "mse": "per element, squared scale of x",
    "nll": "nats per weight, up to a constant",
    "l1": "per weight, scale of x",
    "mae": "per element, scale of x",
    "smooth_l1": "per element, scale of x",
    "huber": "per element, squared scale of x",
    "segmentation": "cross-entropy, nats per pixel",
    "classification": "cross-entropy, nats per image",
    "kl": "nats",
    "kl_mean": "nats per dimension",
    "kl_total": "nats per sample",
    "kl_levels": "nats per sample",
    "perplexity": "entries of the codebook in a batch",
    "codes_used": "entries of the codebook in a batch",
    "loss": "weighted sum of the terms",
    "grad_norm": "before clipping",
    "memory_mb": "peak",
}


def peak_memory_mb() -> float:
    """Peak memory in MB: of the CUDA allocator where CUDA is in use, else resident memory of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


class Log:
    """Appends rows to metrics.csv and scalars and pictures to TensorBoard; use as a context manager.

    Args:
        folder: Run folder.
        step: Step resumed from; rows of later steps are cut off, as they will be computed again.
        group: First part of the tags of training scalars in TensorBoard, in which the loss is the `total`; those of
            validation follow it with `val`. Empty: `train` and `val` come first.
    """

    def __init__(self, folder: Path, step: int, group: str = "") -> None:
        self.folder, self.path, self.group = folder, folder / "metrics.csv", group
        self.columns: list[str] = []
        self._cut(step)
        self.events = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.events.close()

    def row(self, step: int, epoch: int, split: str, figures: dict[str, Any]) -> None:
        """Write one row; `figures` are unweighted terms, learning rate and the like."""
        entries = {"step": step, "epoch": epoch, "split": split} | figures | {"memory_mb": round(peak_memory_mb(), 1)}
        if not entries.keys() <= set(self.columns):
            self._add_columns([column for column in entries if column not in self.columns])
        self._append([entries.get(column, "") for column in self.columns])
        for name, value in figures.items():
            self.events.add_scalar(self._tag(split, name), value, step)
        self.events.add_scalar(f"{split}/memory_mb", entries["memory_mb"], step)

    def _tag(self, split: str, name: str) -> str:
        """`train/mse [unit]`, or `E2E/mse [unit]` and `E2E val/mse [unit]` in the group E2E."""
        unit = f" [{UNITS[name]}]" if name in UNITS and not self.group else ""
        if self.group:
            split = self.group if split == "train" else f"{self.group} {split}"
            name = "total" if name == "loss" else name
        return f"{split}/{name}{unit}"

    def picture(self, step: int, figure: Figure) -> None:
        """Save the fixed reconstructions as samples/step_<n>.png and show them in TensorBoard."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"step_{step:07d}.png", dpi=80)
        self.events.add_figure("reconstructions", figure, step)

    def _append(self, values: list[Any]) -> None:
        with self.path.open("a", newline="") as handle:
            csv.writer(handle).writerow(values)

    def _add_columns(self, columns: list[str]) -> None:
        """Widen metrics.csv; rows written before have nothing there."""
        rows = self._read()[1:] if self.columns else []
        self.columns += columns
        self._replace([self.columns, *(row + [""] * len(columns) for row in rows)])

    def _cut(self, step: int) -> None:
        if not self.path.exists():
            return
        rows = self._read()
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= step]
        self._replace([rows[0], *kept] if kept else [])
        self.columns = rows[0] if kept else []

    def _read(self) -> list[list[str]]:
        with self.path.open(newline="") as handle:
            return [row for row in csv.reader(handle) if row]

    def _replace(self, rows: list[list[str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as handle:
            csv.writer(handle).writerows(rows)
        os.replace(temporary, self.path)
