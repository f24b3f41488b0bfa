"""Fixtures of the tests of JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give float32, and float64 in a JAX that is set to 64 bits."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(request.param is np.float64):
        yield request.param
