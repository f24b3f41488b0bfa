"""Updates of arrays on a GPU; asv skips them where there is none."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

import optimisers as opt

from .rules import CHAINS

RULES = {"Descent": opt.Descent(), "Adam": opt.Adam()} | {
    name: opt.OptimiserChain(*rules) for name, rules in list(CHAINS.items())[:2]
}


def cuda() -> Any:
    """Return Numba's module for GPUs.

    Raises
    ------
    NotImplementedError
        If there is no GPU, or nothing that compiles for it: then asv skips.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        raise NotImplementedError("numba-cuda is not installed")
    from numba import cuda

    if not cuda.is_available():
        raise NotImplementedError("there is no GPU")
    return cuda


def on_device(count: int, size: int, dtype: str = "float32") -> list[Any]:
    """Return so many arrays of so many ones on the device."""
    flat = cuda().device_array(count * size, dtype)
    flat[...] = np.dtype(dtype).type(1)
    return [flat[k * size : (k + 1) * size] for k in range(count)]


class Device:
    """One step, waited for, of a rule over one large array and over many small ones."""

    params = (list(RULES), [(1, 100_000_000), (1, 1_000_000), (1_000, 64)])
    param_names = ("rule", "arrays")

    def setup(self, rule: str, arrays: tuple[int, int]) -> None:
        self.cuda = cuda()
        self.model, self.grad = on_device(*arrays), on_device(*arrays)
        self.state = opt.setup(RULES[rule], self.model)
        self.time_update_(rule, arrays)

    def time_update_(self, rule: str, arrays: tuple[int, int]) -> None:
        opt.update_(self.state, self.model, self.grad)
        self.cuda.synchronize()
