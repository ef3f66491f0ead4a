"""One process of a training over several, which `agent` becomes: `python -m workbench.worker JOB`, of `launch`."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from workbench.distributed import PeerLost, PeerOutOfMemory, World, joined
from workbench.launch import MESSAGE, STOP, read_job
from workbench.process import Preempted, stop_signals
from workbench.progress import Progress
from workbench.training import train_into

SHOWN_EVERY = 0.2


class Stop(dict):
    """Like what `stop_signals` gives; also holds a signal that `launch` was sent and has left in a file."""

    def __init__(self, noted: dict[str, int], path: Path | None) -> None:
        super().__init__()
        self.noted, self.path = noted, path

    def get(self, key: str, default: int = 0) -> int:
        """The number of the signal, or `default`."""
        if self.path and self.path.exists() and (text := self.path.read_text()):
            return int(text)
        return self.noted.get(key, default)


def tell(kind: str, **entries: Any) -> None:
    """One line to `launch`, in one write, so that lines of several processes do not mix."""
    os.write(1, f"{MESSAGE}{json.dumps({'kind': kind} | entries)}\n".encode())


class Relay(Progress):
    """Tells `launch` how far the training is, which shows it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.n, self._interval = self.initial, SHOWN_EVERY

    def _show(self) -> None:
        tell("progress", done=self.n, total=self.total, initial=self.initial, figures=self.figures)

    def __enter__(self) -> "Relay":
        self._show()
        return self


class Silent(Progress):
    """Tells nobody."""

    def _show(self) -> None:
        return


def train(job: dict[str, Any]) -> None:
    """Train as one of several processes; ends with torchrun."""
    with stop_signals() as noted:
        if job["device"] == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with joined(job["device"], job["node"], job["way"] == "nodes") as world:
            stop = Stop(noted, Path(job["job"]).with_name(STOP) if world.writes else None)
            _train(job, world, stop)


def _train(job: dict[str, Any], world: World, stop: Stop) -> None:
    if not world.writes:
        sys.stdout = open(os.devnull, "w")
    try:
        train_into(*read_job(Path(job["job"]), job["sha256"]), stop, world, Relay if world.writes else Silent)
    except (PeerLost, PeerOutOfMemory):
        raise  # torchrun starts all processes again, or the one that ran out of memory tells of it
    except (Preempted, KeyboardInterrupt) as error:
        number = world.most(stop.get("signal"))
        if world.writes:
            tell("left", number=number, message=str(error).partition(": run it")[0])
        return
    except BaseException as error:
        tell("error", name=type(error).__name__, message=str(error), trace="".join(traceback.format_exception(error)))
        raise
    if world.writes:
        tell("done")


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
