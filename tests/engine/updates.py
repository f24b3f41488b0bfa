"""Models and marks that several tests of update share."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
from util import snapshot

from optimisers import Adam, OptimiserChain, WeightDecay, functor, setup, update, update_

DTYPES = ["float32", "float64", "float16", "complex128"]


def both_kinds(rule=None):
    """Return a model whose leaves take both paths, its state and a gradient."""
    model = {
        "kernels": np.arange(3.0),
        "arrays": np.arange(4, dtype=np.float16),
        "strided": np.arange(8.0)[::2],
    }
    state = setup(rule or OptimiserChain(WeightDecay(0.1), Adam()), model)
    return state, model, {key: np.full(x.shape, 0.5) for key, x in model.items()}


class Point(NamedTuple):
    x: object
    y: object


@functor
class Layer:
    def __init__(self, weight, bias, name="layer"):
        self.weight, self.bias, self.name = weight, bias, name

    def __call__(self, x):
        return self.weight @ x + self.bias


@dataclasses.dataclass
class Data:
    weight: object
    bias: object
    size: int = 3


def refused(error, match, state, model, grad, *higher):
    """Check that both updates raise, and change nothing at all."""
    before = snapshot([state, model, grad])
    for call in (update, update_):
        with pytest.raises(error, match=match) as caught:
            call(state, model, grad, *higher)
        assert snapshot([state, model, grad]) == before, call.__name__
    return caught.value
