"""200 tiny notebooks through cluster/local.py with one worker; beside it, at the same time, through papermill alone."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.report import line, run

TASKS, MAX_SECONDS = 200, 0.5
SITE = Path(__file__).parents[1] / "cluster" / "local.py"
CELLS = 'experiment: str = "tiny"\nrun: str = "r"\nn: int = 0'
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
ALONE = """
import sys, papermill
source, out, tasks = sys.argv[1], sys.argv[2], int(sys.argv[3])
for n in range(tasks):
    papermill.execute_notebook(source, f"{out}/{n}.ipynb", {"n": n}, kernel_name="python3", progress_bar=False)
"""


def main() -> None:
    """Both processes begin together, so that whatever else the machine does meets both."""
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary)
        source, site = make_project(project), project / "site.py"
        text = SITE.read_text()
        worker = next(row for row in text.splitlines() if row.startswith("WORKERS = "))
        site.write_text(text.replace(worker, "WORKERS = 1"))
        values = ",".join(map(str, range(TASKS)))
        commands = {
            "papermill": ["-c", ALONE, str(source), str(project / "alone"), str(TASKS)],
            "driver": ["-m", "workbench", "run", "params/tiny", "--site", str(site), "--grid", f"n={values}"],
        }
        seconds = taken(commands, project)
        pages = len(list(project.glob("outputs/tiny/*/r/*.html")))
    each = {name: value / TASKS for name, value in seconds.items()}
    more = each["driver"] - each["papermill"]
    about = f"{TASKS} tiny notebooks, papermill {each['papermill']:.2f} s each, driver {each['driver']:.2f} s"
    line(
        about, f"{more:.2f} s more, ×{each['driver'] / each['papermill']:.2f}", f"{MAX_SECONDS} s", more <= MAX_SECONDS
    )
    line("  of them finished, with a page", str(pages), str(TASKS), pages == TASKS)


def make_project(root: Path) -> Path:
    """A project with one notebook of one line, and its parameter folder."""
    for folder in ("notebooks", "params/tiny", "alone"):
        (root / folder).mkdir(parents=True)
    tagged = new_code_cell(CELLS, metadata={"tags": ["parameters"]})
    path = root / "notebooks" / "01_tiny.ipynb"
    nbformat.write(new_notebook(cells=[tagged, new_code_cell("print(n)")], metadata=KERNEL), path)
    (root / "params" / "tiny" / "01_tiny.yaml").write_text("run: r\n")
    return path


def taken(commands: dict[str, list[str]], folder: Path) -> dict[str, float]:
    """Seconds of each command, all at once; start-up included.

    Raises:
        RuntimeError: one of them failed.
    """
    begun, seconds = time.perf_counter(), {}
    environment = os.environ | {"WORKBENCH_OUTPUTS": str(folder / "outputs")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    going = {
        name: subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, **quiet)
        for name, command in commands.items()
    }
    while going:
        for name in [name for name, process in going.items() if process.poll() is not None]:
            seconds[name] = time.perf_counter() - begun
            if going.pop(name).returncode:
                raise RuntimeError(f"{name} failed: {' '.join(commands[name])}")
        time.sleep(0.05)
    return seconds


if __name__ == "__main__":
    sys.exit(run(main))
