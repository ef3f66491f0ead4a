"""`python -m benchmarks`: every benchmark in a process of its own; exit code 1 if a limit is missed."""

import subprocess
import sys

from benchmarks import (
    bench_data,
    bench_explorer,
    bench_fields,
    bench_fields_step,
    bench_index,
    bench_laq_step,
    bench_resume,
    bench_step,
    bench_tasks,
    bench_weights,
)

missed = 0
steps = (bench_step, bench_fields_step, bench_laq_step)
runs = (bench_resume, bench_tasks)
for benchmark in (*steps, bench_data, bench_fields, bench_weights, bench_index, *runs, bench_explorer):
    print(f"\n{benchmark.__doc__.splitlines()[0]}", flush=True)
    missed |= subprocess.run([sys.executable, "-m", benchmark.__name__], check=False).returncode
sys.exit(missed)
