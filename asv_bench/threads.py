"""Where does a second thread begin to pay? Prints one thread's time over two threads', by size.

In a row, where the second thread is awake, and after pauses, where it has to be woken. The
crossings give `work_per_thread` and `WAKING` in optimisers/_cpu: run it when nothing else
runs.

    python asv_bench/threads.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

import optimisers
from optimisers._engine import cpu

RULES = (optimisers.Descent(), optimisers.Momentum(), optimisers.Adam())
SIZES = (2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 1_000_000)
REPEATS = 31
PAUSE = 0.0005


def seconds(step: Callable[[], object], loops: int, pause: float) -> float:
    """Return the mean time of a step, of several, each after a pause in which the core is busy."""
    total = 0.0
    for _ in range(loops):
        begin = time.perf_counter()
        while (now := time.perf_counter()) < begin + pause:
            pass
        step()
        total += time.perf_counter() - now
    return total / loops


def compare(rule: optimisers.Rule, n: int, pause: float = 0) -> tuple[float, float]:
    """Return the median times of a step of `n` float32 numbers with one thread and with two."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, n), dtype=np.float32)
    state = optimisers.setup(rule, x)

    def step() -> object:
        return optimisers.update_(state, x, g)

    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(REPEATS):
        for threads, seen in times.items():
            optimisers.set_num_threads(threads)
            step()
            loops = max(1, (40_000 if pause else 400_000) // n)
            seen.append(seconds(step, loops, pause))
    return statistics.median(times[1]), statistics.median(times[2])


def main() -> None:
    """Print the table."""
    cpu.kernels.set_work_per_thread(1)
    in_a_row, paused = "in a row: one, two, gain", "after pauses"
    print(f"{'rule':<10} {'numbers':>9} {'moved':>9} {in_a_row:>32} {paused:>32}")
    for rule in RULES:
        slots = len(rule.slots)
        for n in SIZES:
            moved = 4 * n * (3 + 2 * slots) / 1e6
            texts = [f"{type(rule).__name__:<10} {n:>9,} {moved:>6.2f} MB"]
            for pause in (0, PAUSE):
                one, two = compare(rule, n, pause)
                texts.append(f"{one * 1e6:>9.1f} µs {two * 1e6:>9.1f} µs {one / two:>6.2f}")
            print(*texts, sep="  ")


if __name__ == "__main__":
    main()
