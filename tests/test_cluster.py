import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from projects import make_project, until, write_notebook

from workbench import cluster
from workbench.__main__ import main
from workbench.batch import run_folders
from workbench.runs import Run, RunError

ROOT = Path(__file__).parents[1]
BEHAVE = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["WORKBENCH_STATUS"]).parent
starts = folder / "starts"
starts.open("a").write("x")
first = starts.read_text() == "x"
class Preempted(SystemExit):
    pass
if n == 2:
    raise ValueError("two")
if n == 3 and first:
    raise Preempted(75)
if n == 4 and first:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
def stopped(number, frame):
    (folder / "checkpoint").touch()
    raise Preempted(75)
signal.signal(signal.SIGTERM, stopped)
while n == 5 and first:
    time.sleep(0.1)
(folder / "summary.json").write_text(json.dumps({"finished": "now", "threads": os.environ.get("OMP_NUM_THREADS")}))
"""
"""Fails, is preempted, loses its worker, or goes on until it is stopped, the first time."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = make_project(tmp_path, monkeypatch)
    (project / "params" / "demo" / "02_second.yaml").unlink()
    write_notebook(project, "01_first", BEHAVE)
    return project


def workbench(project: Path, *arguments: str) -> subprocess.Popen:
    log = (project / "driver.log").open("w")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["WORKBENCH_OUTPUTS"] = str(project / "outputs")
    line = [sys.executable, "-m", "workbench", "run", "params/demo", *arguments]
    return subprocess.Popen(line, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True)


def below_outputs(project: Path) -> list[str]:
    """Processes whose command line speaks of this project."""
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(project) in line]


@pytest.mark.slow
def test_what_was_stopped_or_lost_is_run_again_and_an_interrupted_driver_goes_on_later(project: Path) -> None:
    """On this machine as a site; another driver is refused meanwhile, and Ctrl-C is pressed twice."""
    process = workbench(project, "--site", str(ROOT / "cluster" / "local.py"), "--grid", "n=1,3,4,5")
    folder = project / "outputs" / "demo"
    runs = {n: Run(folder / f"n={n}" / "one") for n in (1, 3, 4, 5)}
    pages = [runs[n].path / "01_first.html" for n in (1, 3, 4)]
    until(lambda: (runs[5].path / "starts").exists(), process, project)
    with pytest.raises(RunError, match=f"outputs/demo is in use by process {process.pid} on "):
        run_folders([project / "params" / "demo"], {})
    until(lambda: all(page.exists() for page in pages), process, project)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.1)
    ends = 130, -signal.SIGINT  # the same to a shell: the second may come when Python is about to end
    assert process.wait(timeout=180) in ends, (project / "driver.log").read_text()
    until_gone = time.monotonic() + 60
    while below_outputs(project) and time.monotonic() < until_gone:
        time.sleep(0.2)
    assert below_outputs(project) == []
    text = (project / "driver.log").read_text()
    assert "n=3/01_first: stopped by a signal on " in text and "n=4/01_first: lost with its node " in text
    assert "stopped; the same command goes on\n" in text
    assert (runs[5].path / "checkpoint").exists() and not runs[5].finished
    assert run_folders([project / "params" / "demo"], {}, grid=["n=1,3,4,5"]) == 0, "here as well as there"
    assert [(run.path / "starts").read_text() for run in runs.values()] == ["x", "xx", "xx", "xx"]


# --- LSF, as far as its documentation says what it takes ---

OPTIONS = {
    "-J": r"\S+",  # name of the job
    "-W": r"\d+(:\d+)?",  # run limit, [hours:]minutes
    "-o": r"/\S+",  # file of standard output
    "-e": r"/\S+",  # file of standard error
    "-q": r"\S+",  # queue
    "-n": r"\d+(,\d+)?",  # slots: least[,most]
    "-R": r'"span\[ptile=\d+\]"',  # resource requirement: slots on each host
    "-wa": r"(URG|USR1|USR2|INT|TERM)",  # action before a job is ended: a signal's name
    "-wt": r"(\d+:)?\d+",  # how long before, [hours:]minutes; only with -wa
    "-gpu": r"num=\d+(:\S+)?",  # GPUs on each host
}
"""Options of `bsub` with the form of their values, from the reference of IBM Spectrum LSF 10.1."""
BSUB = """#!/bin/bash
# takes a job as bsub does with its script on standard input, and runs it here
[ $# = 0 ] || { echo "arguments: $*" >&2; exit 255; }
id=$(($(ls STUB/*.script 2>/dev/null | wc -l) + 101))
cat >STUB/$id.script
setsid bash STUB/$id.script >STUB/$id.out 2>&1 </dev/null &
echo $! >STUB/$id.pid
echo "Job <$id> is submitted to queue <gpu>."
"""
BJOBS = """#!/bin/bash
echo "$*" >>STUB/bjobs
[ "$1 $2 $3" = "-noheader -o jobid stat" ] || exit 255
for id in "${@:4}"; do kill -0 $(cat STUB/$id.pid) 2>/dev/null && echo "$id RUN" || echo "$id DONE"; done
"""
BKILL = """#!/bin/bash
# LSF signals all processes of a job, twice before it kills them
for id in "$@"; do kill -INT -- -$(cat STUB/$id.pid); echo "Job <$id> is being terminated"; done
sleep 1
for id in "$@"; do kill -TERM -- -$(cat STUB/$id.pid); done
exit 0
"""


@pytest.mark.slow
def test_what_lsf_is_asked_for_is_documented_and_failures_are_collected(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for bsub, bjobs and bkill run the jobs of cluster/lsf.py here; no LSF was at hand."""
    stub = tmp_path / "stub"
    stub.mkdir()
    for name, text in {"bsub": BSUB, "bjobs": BJOBS, "bkill": BKILL}.items():
        (stub / name).write_text(text.replace("STUB", str(stub)))
        (stub / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    site = tmp_path / "lsf.py"
    text = (ROOT / "cluster" / "lsf.py").read_text()
    text = re.sub(r"GPUS, OF_A_RUN, CORES = .*", "GPUS, OF_A_RUN, CORES = 2, 1, 6", text).replace(
        '"gpu", None', '"gpu", "mine"'
    )
    site.write_text(text + "\nProvider.status_polling_interval = 1\nconfig.strategy_period = 1\n")
    process = workbench(project, "--site", str(site), "--grid", "n=1,2")
    assert process.wait(timeout=300) == 1, (project / "driver.log").read_text()
    outputs = project / "outputs"
    failure = f"  n=2/01_first: ValueError in cell [3]: two ({outputs}/demo/n=2/one/01_first.ipynb)"
    told = (project / "driver.log").read_text().splitlines()[-2:]
    assert told == ["1 of 2 runs failed; the same command tries them again:", failure]
    assert main(["run", "params/demo", "--site", str(site), "--grid", "n=1"]) == 0
    assert len(list((outputs / ".parsl").iterdir())) == 1, "Parsl was started for what is finished"
    script = (stub / "101.script").read_text()
    asked = [line.removeprefix("#BSUB ").partition(" ") for line in script.splitlines() if line.startswith("#BSUB")]
    documented = OPTIONS | {"-P": r"\S+"}  # the project that is charged
    assert {option for option, _, _ in asked} == set(documented)
    for option, _, value in asked:
        assert re.fullmatch(documented[option], value), f"{option} {value}"
    values = {option: value for option, _, value in asked}
    assert (values["-W"], values["-n"], values["-gpu"], values["-wa"], values["-wt"]) == (
        "720",
        "6",
        "num=2",
        "USR1",
        "2",
    )
    assert "-noheader -o jobid stat 101" in (stub / "bjobs").read_text()
    summary = (outputs / "demo" / "n=1" / "one" / "summary.json").read_text()
    assert '"threads": "3"' in summary


# --- a driver that is a job ---


def test_detaching_checks_everything_and_submits_the_same_command(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    submitted: list[str] = []
    monkeypatch.setattr(cluster, "submit_driver", lambda site, script: submitted.append(script) or "41")
    site = str(ROOT / "cluster" / "slurm.py")
    line = ["run", "params/demo", "--site", site, "--grid", "lr=0.1,0.2", "--detach", "-p", "n=4"]
    assert main(line) == 0
    words = f"run params/demo --site {site} --grid lr=0.1,0.2 -p n=4"
    assert submitted[0].endswith(f"exec {sys.executable} -u -m workbench {words}")
    outputs = project / "outputs"
    assert submitted[0].startswith(f"cd {project} && export WORKBENCH_OUTPUTS={outputs} WORKBENCH_DETACHED=1 && ")
    told = capsys.readouterr().out
    assert f"job 41 runs them; follow it with: workbench runs {outputs}/demo --watch" in told
    shutil.copytree(project / "params" / "demo", project / "params" / "other")
    assert main(["run", "params/other", *line[1:]]) == 0 and submitted.pop()
    assert f"follow it with: workbench runs {outputs} --watch" in capsys.readouterr().out
    assert main([*line, "--grid", "nn=3"]) == 1 and len(submitted) == 1
    assert "unknown parameter 'nn' in --grid: did you mean 'n'?" in capsys.readouterr().err
    with Run(outputs / "demo").lock():
        assert main(line) == 1 and len(submitted) == 1
    assert f"{outputs}/demo is in use by process {os.getpid()}" in capsys.readouterr().err
