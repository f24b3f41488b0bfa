"""Models for the tests of the flat vector."""

from __future__ import annotations

import re as regex
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from optimisers import functor


@dataclass
class Layer:
    weight: Any
    bias: Any
    name: str = "layer"

    def __call__(self, x):
        return x @ self.weight + self.bias


@functor(children=("a", "c"), trainable=("a",))
class Affine:
    def __init__(self, a, c, note):
        self.a, self.c, self.note = a, c, note


def count(*shape, start=0, dtype=np.float64):
    return (np.arange(np.prod(shape, dtype=int)) + start).reshape(shape).astype(dtype)


def refuses(kind, *parts):
    """Expect an error whose message has these parts, in this order."""
    return pytest.raises(kind, match=".*".join(map(regex.escape, parts)))
