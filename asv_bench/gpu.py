"""Adam on a GPU beside the card's copy, PyTorch's Adam, many small arrays, and a chain of three.

Contenders take turns in one process, run by run; a run is many steps, waited for once, and the
median of the runs counts. PyTorch is left out where it is not installed.

    python asv_bench/gpu.py             # or with --quick
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.device import RULES, cuda, on_device

import optimisers as opt

RUNS = 15
SECONDS = 0.1
"""How long a run lasts at least."""
MOVED_BY_ADAM = 7 * 4
"""Bytes for each number: x, g, m, v are read, x, m, v written."""

Step = Callable[[], Any]


def ours(rule: opt.Rule, count: int, size: int) -> Step:
    """Return a step over so many arrays of so many numbers."""
    model, grad = on_device(count, size), on_device(count, size)
    state = opt.setup(rule, model)
    return lambda: opt.update_(state, model, grad)


def flat(rule: opt.Rule, count: int, size: int) -> Step:
    """Return a step over the flat vector of so many arrays."""
    vector, re = opt.destructure(on_device(count, size))
    gradient = re.flatten_gradient(on_device(count, size))
    state = opt.setup(rule, vector)
    return lambda: opt.update_(state, vector, gradient)


def torch_adam(count: int, size: int, **how: bool) -> Step | None:
    """Return a step of PyTorch's Adam, None where there is no PyTorch for GPUs."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    parameters = [torch.ones(size, device="cuda", requires_grad=True) for _ in range(count)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    return torch.optim.Adam(parameters, **how).step


def copying(size: int) -> Step:
    """Return a copy of so many numbers within the device."""
    source, target = on_device(1, size)[0], on_device(1, size)[0]
    stream = cuda().default_stream()
    return lambda: target.copy_to_device(source, stream=stream)


def alternate(steps: dict[str, Step | None]) -> dict[str, float]:
    """Return the median time of a step of each contender, in seconds."""
    there = {name: step for name, step in steps.items() if step is not None}
    loops = dict.fromkeys(there, 1)
    for name, step in there.items():
        run(step, 3)
        while (taken := run(step, loops[name]) * loops[name]) < SECONDS:
            loops[name] = max(2 * loops[name], int(loops[name] * SECONDS / max(taken, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in there}
    for _ in range(RUNS):
        for name, step in there.items():
            times[name].append(run(step, loops[name]))
    return {name: statistics.median(seen) for name, seen in times.items()}


def run(step: Step, loops: int) -> float:
    """Return the time of one of so many steps, the last of which is waited for."""
    cuda().synchronize()
    begin = time.perf_counter()
    for _ in range(loops):
        step()
    cuda().synchronize()
    return (time.perf_counter() - begin) / loops


def show(heading: str, times: dict[str, float], moved: dict[str, float]) -> None:
    """Print a table of times, and of bandwidths where the bytes that are moved are known."""
    print(f"\n{heading}")
    for name, seconds in times.items():
        rate = f"{moved[name] / seconds / 1e9:9,.0f} GB/s" if name in moved else ""
        print(f"  {name:<34} {1e6 * seconds:12,.1f} us {rate}")


def main() -> None:
    """Print the tables."""
    try:
        device = cuda().get_current_device()
    except NotImplementedError as error:
        sys.exit(f"bench-gpu: {error}")
    n = 1_000_000 if "--quick" in sys.argv else 100_000_000
    print(device.name.decode() if isinstance(device.name, bytes) else device.name)

    adam = MOVED_BY_ADAM * n
    large = {
        "copy": copying(n),
        "optimisers": ours(RULES["Adam"], 1, n),
        "PyTorch, fused": torch_adam(1, n, fused=True),
        "PyTorch, foreach": torch_adam(1, n, foreach=True),
    }
    moved = dict.fromkeys(large, adam) | {"copy": 8 * n}
    show(f"Adam, {n:,} float32", alternate(large), moved)
    large.clear()

    small = {
        "optimisers": ours(RULES["Adam"], 1_000, 64),
        "optimisers, one flat vector": flat(RULES["Adam"], 1_000, 64),
        "PyTorch, fused": torch_adam(1_000, 64, fused=True),
        "PyTorch, foreach": torch_adam(1_000, 64, foreach=True),
    }
    show("Adam, 1,000 arrays of 64 float32", alternate(small), {})

    chains = {name: ours(rule, 1, n) for name, rule in RULES.items() if name != "Descent"}
    show(f"chains, {n:,} float32", alternate(chains), {})


if __name__ == "__main__":
    main()
