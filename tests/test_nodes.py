import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

NODE = [sys.executable, "-m", "workbench.nodes"]
POOL = """
import subprocess, sys, time
worker = '''
import os, signal, subprocess, sys, time
def forward(number, frame):
    print("told", signal.Signals(number).name, os.path.exists(os.environ["WORKBENCH_LEAVING"]), flush=True)
    kernel.send_signal(number)
signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
kernel = subprocess.Popen(["ipy" + "kernel", "600"], executable="sleep")
print("ready", kernel.pid, os.environ["WORKBENCH_GRANTED_DEVICES"], flush=True)
print("kernel ended with", kernel.wait(), flush=True)
time.sleep(1)
print("result sent", flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", worker])
time.sleep(600)
"""
"""Stands for Parsl's pool: handles no signal itself, and has a worker with a kernel."""


@pytest.mark.slow
def test_a_signal_reaches_the_notebook_and_the_pool_ends_after_the_result() -> None:
    """Slurm sends its warning to one process, scancel and LSF theirs to all of the job, and LSF SIGINT first."""
    command = [*NODE, sys.executable, "-c", POOL]
    asked = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": "2,3"}, "start_new_session": True}
    ways = {signal.SIGUSR1: os.kill, signal.SIGTERM: os.killpg, signal.SIGINT: os.killpg}
    nodes = {number: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **asked) for number in ways}
    for node in nodes.values():
        assert node.stdout.readline().split()[::2] == ["ready", "2,3"]
    below = [child for node in nodes.values() for child in psutil.Process(node.pid).children(recursive=True)]
    for number, node in nodes.items():
        ways[number](node.pid, number)
    for number, node in nodes.items():
        out, _ = node.communicate(timeout=120)
        assert node.returncode == 0
        lines = set(out.splitlines())
        sent = signal.SIGTERM if number == signal.SIGINT else number
        assert f"told {sent.name} True" in lines, "the mark of leaving comes before the signal"
        assert {f"kernel ended with {-sent}", "result sent"} <= lines
    assert not psutil.wait_procs(below, timeout=30)[1], "a process was left behind"


def test_the_exit_code_of_a_pool_that_ends_by_itself() -> None:
    assert subprocess.run([*NODE, sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3


def test_a_bound_command_dies_with_its_parent(tmp_path: Path) -> None:
    command = [*NODE, "--bound", "sleep", "600"]
    script = f"import subprocess; p = subprocess.Popen({command}); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    while child.cmdline()[:1] != ["sleep"]:
        time.sleep(0.05)
    assert os.getsid(child.pid) == child.pid, "an interrupt from the terminal would reach it"
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([child], timeout=30)[1]


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, workbench.nodes; print(sorted({'torch', 'parsl', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
