"""The CPU kernels: which of their twins this processor runs, and with how many threads."""

from __future__ import annotations

import importlib
import os
from numbers import Real
from typing import Any

from .. import _kernels as baseline
from .._arrays import dlpack
from .._messages.text import short

Array = Any


def _find_kernels() -> dict[str, Any]:
    """Import the twins of the kernels, by instruction set, widest first."""
    found = {}
    for name in baseline.instruction_sets():
        try:
            found[name] = importlib.import_module(f"{baseline.__name__}_{name}")
        except ImportError:  # built by a compiler that cannot
            continue
    return {**found, "baseline": baseline}


def _choose_kernels() -> tuple[str, Any]:
    wanted = os.environ.get("OPTIMISERS_ISA") or next(iter(available))
    if wanted not in available:
        raise ImportError(
            f"OPTIMISERS_ISA={wanted!r}: this build and processor have {', '.join(available)}"
        )
    return wanted, available[wanted]


available = _find_kernels()
isa, kernels = _choose_kernels()
available_isas = tuple(available)
for twin in available.values():
    twin.know_tensors(dlpack.owner())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=kernels.after_fork)


def set_num_threads(n: int) -> None:
    """Set the most threads that an update uses.

    Parameters
    ----------
    n : int
        At least 1; or 0 to do again what OpenMP is told (``OMP_NUM_THREADS``, ``threadpoolctl``).

    Notes
    -----
    The threads are the library's own. An update never waits for one that sleeps, or that the
    system has put aside: the others do its share. Updates may be called from several threads of
    Python; while one uses the threads, the others run on their own.
    """
    told = "the number of threads must be a whole number, 0 or more"
    if not isinstance(n, Real):
        raise TypeError(f"{told}; got {short(n)}")
    if n != int(n) or n < 0:
        raise ValueError(f"{told}; got {n!r}")
    kernels.set_num_threads(int(n))


def get_num_threads() -> int:
    """Return the most threads that an update uses; small ones use fewer."""
    return int(kernels.get_num_threads())
