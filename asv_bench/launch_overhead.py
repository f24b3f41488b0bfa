"""What an update of device arrays costs on the host, with a driver that does nothing.

Needs no GPU: Numba compiles for one that is not there, and what would reach the driver (launches,
whose arguments are packed all the same, copies, memory) ends in a stub. So the figures are Python's
share of a step: how long until the device has its work.

    python asv_bench/launch_overhead.py             # or with --quick, --profile
"""

from __future__ import annotations

import cProfile
import ctypes
import itertools
import pstats
import sys
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numba.cuda.dispatcher as dispatcher
import numpy as np
from cuda import core
from cuda.core._kernel_arg_handler import ParamHolder
from numba import cuda
from numba.cuda.codegen import CUDACodeLibrary
from numba.cuda.cudadrv import devices
from numba.cuda.cudadrv.devicearray import DeviceNDArray

import optimisers as opt
from optimisers._cuda import launch as _launch

launches = 0
_addresses = itertools.count(1 << 40, 1 << 24)


class Memory:
    """Stands for memory of the device."""

    def __init__(self) -> None:
        self.device_ctypes_pointer = ctypes.c_void_p(next(_addresses))
        self.context = SimpleNamespace(device=SimpleNamespace(id=0))

    def view(self, start: int, stop: int | None = None) -> Memory:
        """Return a part of it."""
        return self


def device_array(
    shape: Any, dtype: Any = np.float64, strides: Any = None, stream: Any = 0
) -> DeviceNDArray:
    """Return an array of the device, without memory behind it."""
    shape = (shape,) if isinstance(shape, int) else shape
    like = np.broadcast_to(np.zeros((), dtype), shape)
    packed = [like.itemsize * int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
    return DeviceNDArray(shape, strides or packed, dtype, stream, gpu_data=Memory())


def install_stub() -> None:
    """Put stubs in place of all that needs a driver."""

    def launch(stream: Any, config: Any, kernel: Any, *args: Any) -> None:
        global launches
        launches += 1
        ParamHolder(args)

    there = SimpleNamespace(id=0, compute_capability=(9, 0))
    function = SimpleNamespace(kernel=object(), module=SimpleNamespace(initialized=True))
    dispatcher.get_current_device = lambda: there
    devices.get_context = lambda number=None: SimpleNamespace(device=there)
    CUDACodeLibrary.get_cufunc = lambda self: function
    cuda.device_array = device_array
    cuda.to_device = lambda values: device_array(values.shape, values.dtype)
    cuda.default_stream = lambda: 0
    DeviceNDArray.setitem = lambda self, key, value, stream=0: None
    core.launch = launch
    cuda.external_stream = lambda handle: 0
    _launch._Staging.send = lambda self, values, target, stream: None
    _launch.devices = lambda: 1


def count_calls(step: Callable[[], None]) -> int:
    """Return how many functions written in Python a step calls, which is steady under load."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, arg: events.append(event))
    step()
    sys.setprofile(None)
    return events.count("call")


def microseconds(rule: opt.Rule, arrays: int) -> float:
    """Return the time of one update of so many arrays in place."""
    global launches
    model: Any = {k: device_array((64,), np.float32) for k in range(arrays)}
    grad: Any = {k: device_array((64,), np.float32) for k in range(arrays)}
    if arrays == 1:
        model, grad = model[0], grad[0]
    state = opt.setup(rule, model)

    def step() -> None:
        opt.update_(state, model, grad)

    step()
    launches = 0
    step()
    least = 1 + 2 * sum(type(r) is opt.ClipNorm for r in getattr(rule, "rules", [rule]))
    assert launches == least, "one launch, and two for each norm"
    assert count_calls(step) <= 70 + 6 * arrays, "a leaf whose job is repeated is asked little"
    if "--profile" in sys.argv:
        with cProfile.Profile() as profile:
            for _ in range(max(1, 5000 // arrays)):
                step()
        pstats.Stats(profile).sort_stats("tottime").print_stats(16)
    loops = max(1, 2000 // arrays)
    return 1e6 * min(timeit.repeat(step, number=loops, repeat=15)) / loops


def main() -> None:
    """Print the table."""
    install_stub()
    chain = opt.OptimiserChain(opt.ClipGrad(), opt.WeightDecay(), opt.Adam())
    clipped = opt.OptimiserChain(opt.ClipNorm(throw=False), opt.Adam())
    rules = {"Descent": opt.Descent(), "Adam": opt.Adam(), "chain of three": chain}
    sizes = (1, 10) if "--quick" in sys.argv else (1, 10, 100, 1000)
    print(f"{'us of a step, by arrays':<24} " + " ".join(f"{n:>9}" for n in sizes))
    for name, rule in {**rules, "ClipNorm, Adam": clipped}.items():
        times = [microseconds(rule, arrays) for arrays in sizes]
        print(f"{name:<24} " + " ".join(f"{time:9.1f}" for time in times), flush=True)


if __name__ == "__main__":
    main()
