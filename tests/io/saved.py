"""Trees to save, and a comparison of what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from util import EVERY_ELEMENTWISE, PUBLIC, bits, normal, variants

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rule,
    WeightDecay,
)
from optimisers.io import load, save


def assert_equal(got: Any, expected: Any) -> None:
    """Compare trees: classes, keys in order, rules, bits."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert [*got] == [*expected]
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, SimpleNamespace) or hasattr(expected, "__dataclass_fields__"):
        if isinstance(expected, Rule):
            assert repr(got) == repr(expected)
        assert_equal(vars(got), vars(expected))
    elif isinstance(expected, Leaf):
        assert_equal(got.rule, expected.rule)
        assert_equal(got.state, expected.state)
        assert got.frozen == expected.frozen
    elif isinstance(expected, np.ndarray | np.generic):
        if expected.dtype.kind == "V":
            assert got.dtype == expected.dtype
            assert got.tobytes() == expected.tobytes()
        else:
            assert got.dtype == expected.dtype.newbyteorder("=")
            assert bits(got)[2:] == bits(expected)[2:]
            assert got.shape == expected.shape
    elif isinstance(expected, float):
        assert got.hex() == expected.hex()
    elif isinstance(expected, complex):
        assert_equal([got.real, got.imag], [expected.real, expected.imag])
    else:
        assert got == expected


def there_and_back(path: Path, *trees: Any, **more: Any) -> Any:
    save(path, *trees, **more)
    return load(path)


EVERY_RULE = [
    *EVERY_ELEMENTWISE,
    *(rule for cls in PUBLIC for rule in variants(cls)),
    ClipNorm(1.5, math.inf, throw=False),
    ClipNorm(p=-math.inf),
    OptimiserChain(),
    OptimiserChain(ClipNorm(), OptimiserChain(AccumGrad(2), WeightDecay()), RMSProp(centred=True)),
    MixedPrecision("float64", OptimiserChain(WeightDecay(), Adam(eta=1 / 3))),
    MixedPrecision(Momentum()),
]


@dataclass(frozen=True)
class Decayed(Rule):
    """A user's rule, with a state that is a number, and all that a field can be."""

    eta: float = 0.1
    weights: Any = None
    names: Any = ("a", [1, {"b": (None, math.inf)}])
    inner: Rule = Momentum()  # noqa: RUF009
    dtype: Any = np.dtype("float32")  # noqa: RUF009

    def init(self, x):
        return 1

    def apply(self, state, x, dx, *higher):
        return state + 1, dx * (self.eta / state**0.5)


def tied_model() -> dict[str, Any]:
    w = normal((4, 3))
    back = w.copy()[::-1]
    return {
        "w": w, "same": w, "transposed": w.T, "flat": w.reshape(-1), "deep": [w[::-1, ::-1]],
        "first": back, "second": back[::-1].reshape(2, 6), "free": w.copy(),
    }  # fmt: skip
