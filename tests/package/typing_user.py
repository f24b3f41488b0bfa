"""What someone who types their code writes. Never run: `make types` has pyright read it.

A line that must be an error says so in a comment, and pyright reports the comment if it is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import optimisers
from optimisers import Adam, ElementwiseRule, Leaf, OptimiserChain, Rule, WeightDecay
from optimisers.words import abs2, sqrt

Vector = npt.NDArray[np.float32]


@dataclass
class Layer:
    weight: Vector
    bias: Vector
    name: str = "layer"


@dataclass(frozen=True)
class DecayDescent(Rule):
    eta: float = 0.1

    def init(self, x: Any) -> int:
        return 1

    def apply(self, state: int, x: Any, dx: Any, *higher: Any) -> tuple[int, Any]:
        return state + 1, dx * (self.eta / state**0.5)


@dataclass(frozen=True)
class Normalised(ElementwiseRule):
    eta: float = 0.01
    rho: float = 0.9

    slots = ("q",)

    def coefs(self) -> tuple[float, ...]:
        return self.rho, 1 - self.rho, self.eta

    @staticmethod
    def step(x: Any, dx: Any, state: Any, coefs: Any) -> tuple[Any, tuple[Any, ...]]:
        (q,) = state
        rho, rest, eta = coefs
        q = rho * q + rest * abs2(dx)
        return eta * dx / sqrt(q), (q,)


def train(model: Layer, gradient: Layer) -> Layer:
    rule = OptimiserChain(WeightDecay(1e-4), Adam(eta=0.01, beta=(0.9, 0.99)))
    state = optimisers.setup(rule, model)
    state, model = optimisers.update(state, model, gradient)
    state, model = optimisers.update_(state, model, gradient, None)
    optimisers.adjust_(state, 0.001)
    optimisers.adjust_(state, beta=(0.9, 0.95))
    state = optimisers.adjust(state, eta=0.1)
    optimisers.freeze_(state)
    optimisers.thaw_(state)
    return assert_type(model, Layer)


def train_flat(model: Layer, gradient: Layer) -> Layer:
    flat, re = optimisers.destructure(model)
    state = optimisers.setup(DecayDescent(), flat)
    optimisers.update_(state, flat, re.flatten_gradient(gradient))
    count: int = len(re)
    assert count == flat.size
    return re(flat)


def look(model: Layer) -> int:
    for path, array in optimisers.trainables(model, path=True):
        print(str(path), array.shape)
    total = sum(array.size for array in optimisers.trainables(model))
    leaf = Leaf(Adam(), (), frozen=True)
    print(leaf.rule, leaf.state, leaf.frozen, optimisers.__version__)
    return total


def threads() -> int:
    optimisers.set_num_threads(2)
    optimisers.show_versions()
    return assert_type(optimisers.get_num_threads(), int)


Adam(rate=0.1)  # pyright: ignore[reportCallIssue]
Adam("fast")  # pyright: ignore[reportArgumentType]
Adam().eta = 0.1  # pyright: ignore[reportAttributeAccessIssue]
optimisers.setup(Adam(), model=None, rules=())  # pyright: ignore[reportCallIssue]
