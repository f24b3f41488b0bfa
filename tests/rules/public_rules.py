"""Rules of every public class."""

from __future__ import annotations

import math
import typing

from util import PUBLIC, example, variants

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    MixedPrecision,
    OptimiserChain,
    RMSProp,
    WeightDecay,
)
from optimisers.rules import _fields

COMPOSED = [
    OptimiserChain(),
    OptimiserChain(Adam()),
    OptimiserChain(ClipNorm(2.0, math.inf), OptimiserChain(WeightDecay(), AccumGrad(3)), Adam(0.1)),
    ClipNorm(),
    ClipNorm(1.0, -math.inf, throw=False),
    AccumGrad(4),
    MixedPrecision(Adam()),
    MixedPrecision("float64", OptimiserChain(ClipGrad(), RMSProp(centred=True))),
    MixedPrecision("float16", AccumGrad(2)),
]
PUBLIC_RULES = [rule for cls in PUBLIC for rule in variants(cls)] + COMPOSED
OUTSIDE = {
    "finite": [math.nan, math.inf, -math.inf, 10**400],
    "finite and at least 0": [-1e-300, math.nan, math.inf, -math.inf, 10**400],
    "at least 0": [-1e-300, math.nan, -math.inf, -(10**400)],
    "in [0, 1)": [1, 1.0, -1e-9, math.nan, math.inf],
    "in [0, 1]": [1 + 2**-52, 2, -1e-9, math.nan, math.inf],
    "a whole number": [0.5, math.nan, math.inf],
    "finite and above 0": [0, -1e-300, math.nan, math.inf, 10**400],
    "a whole number, at least 0": [-1, 0.5, math.nan, math.inf],
    "in (0, 1)": [0, 1, 1.5, -0.5, math.nan, math.inf],
    "finite and above 1": [1, 0.5, -2, math.nan, math.inf, 10**400],
    "a number, inf or -inf": [math.nan],
    "a whole number, at least 1": [0, -1, 1.5, math.nan, math.inf],
}


def limited():
    """Return (class, field, position or None, text of the limit) for each number of each rule."""
    found = []
    for cls in PUBLIC:
        for field, limits in _fields._limits(cls).items():
            pair = typing.get_origin(typing.get_type_hints(cls)[field]) is tuple
            for i, limit in enumerate(limits.each):
                found.append((cls, field, i if pair else None, limit.text))
    return found


def built(cls, field, i, value):
    """Return a rule of this class with this value in a field, or at place i of a pair."""
    if i is not None:
        widest = [0.0, math.inf]  # beside which any value is in order
        is_range = _fields._limits(cls)[field].together
        pair = widest if is_range else list(getattr(example(cls), field))
        pair[i] = value
        value = tuple(pair)
    return example(cls, **{field: value}), value


LIMITED = limited()
