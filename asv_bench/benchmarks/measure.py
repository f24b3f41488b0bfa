"""How it is timed: contenders in turn in one process, other things in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from timeit import Timer

import numpy as np

import optimisers as opt

from .models import normal
from .peers import Step, imported_torch

REST = 0.02
"""Seconds of sleep before each run: the threads of the one before have then stopped spinning."""


class Times(dict[str, float]):
    """The median time of one call of each contender, in seconds.

    Parameters
    ----------
    runs : mapping
        By contender, the times of all its runs; those of one round stand at the same place.
    """

    def __init__(self, runs: Mapping[str, Sequence[float]]) -> None:
        super().__init__({name: median(times) for name, times in runs.items()})
        self.runs = runs

    def ratio(self, one: str, other: str) -> float:
        """Return how many times as long one takes as another: the median over the rounds.

        A machine that is slow for a while is so for both sides of a round, where it could make up
        the median of one contender but not of another.
        """
        rounds = zip(self.runs[one], self.runs[other], strict=True)
        return median(a / b for a, b in rounds)


def alternate(steps: Mapping[str, Step | None], runs: int = 15, least: float = 0.002) -> Times:
    """Return how long one call of each contender takes.

    The contenders take turns, run by run, so that a machine that slows down does so for all. A
    run follows one call that is not timed, and repeats a quick step until it lasts `least`
    seconds. None, for a contender that is not installed, is left out.
    """
    timers = {name: Timer(step) for name, step in steps.items() if step is not None}
    calls = {name: _calls(timer, least) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(runs):
        for name, timer in timers.items():
            time.sleep(REST)
            timer.timeit(1)
            times[name].append(timer.timeit(calls[name]) / calls[name])
    return Times(times)


def _calls(timer: Timer, least: float) -> int:
    """Warm up; return how many calls last at least so many seconds."""
    timer.timeit(2)
    calls = 1
    while (seconds := timer.timeit(calls)) < least:
        calls = max(2 * calls, min(int(1.1 * calls * least / seconds), 100 * calls))
    return calls


# --- the limit that memory sets ----------------------------------------------------------------


class Limit:
    """The bandwidth of ``x += a g`` on all threads, over as much memory as a contender uses.

    Caches may hold a part of the arrays, and more of small ones, so a limit is worth something
    only for the same number of bytes. What counts is the faster of PyTorch and our own `Descent`.

    Parameters
    ----------
    nbytes : int
        How much memory a contender works on: parameters, gradients and states.
    """

    def __init__(self, nbytes: int) -> None:
        self.size = max(nbytes // 8, 1)
        x, g = normal(self.size), normal(self.size)
        state = opt.setup(opt.Descent(1e-6), x)
        self.steps: dict[str, Step | None] = {
            "`x += a g` by `Descent`": lambda: opt.update_(state, x, g)
        }
        self.copy: dict[str, Step | None] = {"`x = g` by NumPy": lambda: np.copyto(x, g)}
        if (torch := imported_torch()) is not None:
            xt, gt = torch.from_numpy(x), torch.from_numpy(g)
            self.steps["`x += a g` by PyTorch"] = lambda: xt.add_(gt, alpha=1e-6)

    def rates(self, times: Mapping[str, float]) -> dict[str, float]:
        """Return the bytes that each moved in a second; a copy reads one number, writes one."""
        moved = dict.fromkeys(self.steps, 12) | dict.fromkeys(self.copy, 8)
        return {name: n * self.size / times[name] for name, n in moved.items() if name in times}

    def bandwidth(self, times: Mapping[str, float]) -> float:
        """Return the bytes in a second of the faster ``x += a g``."""
        return max(rate for name, rate in self.rates(times).items() if name in self.steps)

    def share(self, times: Times, name: str, nbytes: int) -> float:
        """Return how near a contender that moves so many bytes comes to the limit."""
        return min(nbytes / (12 * self.size) * times.ratio(limit, name) for limit in self.steps)


# --- in processes of their own ---------------------------------------------------------------


def _in_process(code: str, *args: object, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environ,
    )
    return done.stdout


_IMPORT = """
import sys, time
import numpy
begin = time.perf_counter()
import optimisers
print(time.perf_counter() - begin, *{"jax", "numba", "scipy", "torch"} & {*sys.modules})
"""


def import_time(runs: int = 15) -> tuple[float, set[str]]:
    """Return the seconds that ``import optimisers`` takes beyond NumPy, and what big it imports.

    Its byte code is there, as pip leaves it where it installs; a first run, which counts for
    nothing, sees to that.
    """
    with TemporaryDirectory() as cache:
        byte_code = {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        _, *answers = [_in_process(_IMPORT, **byte_code).split() for _ in range(1 + runs)]
    return median(float(seconds) for seconds, *_ in answers), {
        m for _, *big in answers for m in big
    }


_GROWTH = """
import sys
import numpy as np, optimisers as opt
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
x, g = (np.ones(int(sys.argv[1]), np.float32) for _ in range(2))
state = opt.setup(opt.Adam(), x)
before = peak()
for _ in range(3):
    opt.update_(state, x, g)
print(1024 * (peak() - before))
"""


def memory_growth(size: int) -> int | None:
    """Return by how many bytes `update_` of Adam raises the peak memory; None if not on Linux."""
    if not Path("/proc/self/status").exists():
        return None
    return int(_in_process(_GROWTH, size))
