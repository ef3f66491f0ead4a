"""`python -m benchmarks`: every benchmark, one after another; exit code 1 if a limit is missed."""

import sys

from benchmarks import bench_data, bench_index, bench_resume, bench_step, report

for benchmark in (bench_step, bench_data, bench_index, bench_resume):
    print(f"\n{benchmark.__doc__.splitlines()[0]}")
    benchmark.main()
sys.exit(bool(report.failures))
