"""Between the host and a device, for the tests."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

reports: list[str] = []
"""Lines to print below the results, such as how many registers a kernel takes."""


def _has_gpu() -> bool:
    from numba import cuda

    return SIMULATED or cuda.is_available()


needs_a_device = pytest.mark.skipif(not _has_gpu(), reason="needs a GPU, or Numba's simulator")


def device(tree: Any) -> Any:
    """Return a tree of dictionaries with Numba's device arrays in place of NumPy's."""
    if isinstance(tree, dict):
        return {key: device(x) for key, x in tree.items()}
    from numba import cuda

    return cuda.to_device(np.array(tree, order="K")) if isinstance(tree, np.ndarray) else tree


def host(tree: Any) -> Any:
    """Return a tree of dictionaries with NumPy's arrays in place of Numba's."""
    if isinstance(tree, dict):
        return {key: host(x) for key, x in tree.items()}
    return tree.copy_to_host() if hasattr(tree, "copy_to_host") else tree


def host_state(state: Any) -> Any:
    """Return a state with NumPy's arrays."""
    if isinstance(state, tuple):
        parts = [host_state(part) for part in state]
        return type(state)._make(parts) if hasattr(state, "_make") else tuple(parts)
    return host(state)
