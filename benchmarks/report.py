"""What the benchmarks share: timing in turns, and the lines they print."""

import statistics
import time
from collections.abc import Callable

failures: list[str] = []


def in_turns(actions: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each action, measured in turns so that a drift of the machine's speed meets all alike."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(warmup + rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if i >= warmup:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def line(what: str, measured: str, limit: str, ok: bool) -> None:
    """Print one result beside its limit."""
    print(f"{'ok  ' if ok else 'MISS'}  {what:<62} {measured:>22}   limit {limit}", flush=True)
    if not ok:
        failures.append(what)


def run(main: Callable[[], None]) -> int:
    """Run one benchmark as a program: its exit code is 1 if a limit was missed."""
    main()
    return int(bool(failures))
