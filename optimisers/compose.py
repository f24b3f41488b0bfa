"""Rules made of rules, and what is not elementwise: chains, norms, means over steps, precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from ._rule import Count, NonNegative, Order, Rule, as_like, count_like, full_like, is_traced
from .rules import _Hold, _Release, _Scale
from .words import absolute, namespace

Array = Any


@dataclass(frozen=True, init=False, repr=False)
class OptimiserChain(Rule):
    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"OptimiserChain takes rules, one after another; got {rule!r}")
            if isinstance(rule, MixedPrecision):
                raise TypeError(
                    "MixedPrecision cannot stand inside a chain; put the chain inside it: "
                    "MixedPrecision(OptimiserChain(...))"
                )
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"

    def init(self, x: Array) -> tuple[Any, ...]:
        return tuple(rule.init(x) for rule in self.rules)

    def apply(
        self, state: tuple[Any, ...], x: Array, dx: Array, *higher: Array
    ) -> tuple[tuple[Any, ...], Array]:
        new = list(state)
        for k, rule in enumerate(self.rules):
            new[k], dx = rule.apply(state[k], x, dx, *higher)
            if dx is None:
                break
        return tuple(new), dx

    def fields(self) -> Iterator[tuple[str, Any]]:
        for rule in self.rules:
            yield from rule.fields()

    def adjust(self, **changes: Any) -> Self:
        return type(self)(*(rule.adjust(**changes) for rule in self.rules))


@dataclass(frozen=True)
class ClipNorm(Rule):
    omega: NonNegative = 10.0
    p: Order = 2.0
    throw: bool = True

    def apply(self, state: tuple[()], x: Array, dx: Array, *higher: Array) -> tuple[Any, Array]:
        factor = self.factor(norm(dx, self.p))
        _, dx = _Scale(factor).apply((), x, dx)
        return state, dx

    def factor(self, norm: Any) -> Any:
        """Return what a gradient of this norm is multiplied with."""
        if is_traced(norm):
            return namespace(norm).minimum(self.omega / norm, 1.0)
        if self.throw and not math.isfinite(norm):
            raise FloatingPointError(
                f"ClipNorm: the gradient has {self.p:g}-norm {norm}; "
                "ClipNorm(..., throw=False) lets such gradients through"
            )
        if math.isnan(norm):
            return norm
        return 1.0 if norm <= self.omega else self.omega / norm


def norm(x: Array, p: float) -> Any:
    """Return the p-norm of all elements of `x`, at least in double for NumPy arrays.

    Numbers are divided by the largest before they are raised to a power, so that no norm of
    representable size overflows or underflows on the way.
    """
    xp = namespace(x)
    size = absolute(x)
    if xp is np:
        size = size.astype(np.result_type(np.float64, size.dtype if size.dtype.kind == "f" else 0))
    if math.prod(x.shape) == 0:
        return 0.0
    if p == 0:
        return xp.sum(as_like(size, size != 0))
    extreme = xp.max(size) if p > 0 else xp.min(size)
    if math.isinf(p):
        return extreme
    unit = xp.where((extreme > 0) & xp.isfinite(extreme), extreme, xp.ones_like(extreme))
    power = xp.sum((size / unit) ** p) ** (1 / p)
    return xp.where((extreme > 0) | (p > 0), unit * power, extreme)


class AccumGradState(NamedTuple):
    sum: Array
    count: Array


@dataclass(frozen=True)
class AccumGrad(Rule):
    n: Count

    fixed = ("n",)

    def init(self, x: Array) -> AccumGradState:
        return AccumGradState(full_like(x, 0.0), count_like(x))

    def apply(
        self, state: AccumGradState, x: Array, dx: Array, *higher: Array
    ) -> tuple[AccumGradState, Array | None]:
        if int(state.count) + 1 < self.n:
            (total,), _ = _Hold().apply((state.sum,), x, dx)
            return AccumGradState(total, as_like(state.count, state.count + 1)), None
        (total,), mean = _Release(self.n).apply((state.sum,), x, dx)
        return AccumGradState(total, as_like(state.count, state.count * 0)), mean


class MixedPrecisionState(NamedTuple):
    master: Array
    state: Any


@dataclass(frozen=True, init=False, repr=False)
class MixedPrecision(Rule):
    dtype: Any
    rule: Rule

    fixed = ("dtype",)

    def __init__(self, dtype: Any, rule: Rule | None = None) -> None:
        if rule is None:
            dtype, rule = np.float32, dtype
        if not isinstance(rule, Rule) or isinstance(rule, MixedPrecision):
            raise TypeError(f"MixedPrecision takes a rule, after the dtype if any; got {rule!r}")
        object.__setattr__(self, "dtype", np.dtype(dtype))
        object.__setattr__(self, "rule", rule)

    def __repr__(self) -> str:
        return f"MixedPrecision({self.dtype.name!r}, {self.rule!r})"

    def init(self, x: Array) -> MixedPrecisionState:
        master = self._lift(x)
        return MixedPrecisionState(master, self.rule.init(master))

    def apply(
        self, state: MixedPrecisionState, x: Array, dx: Array, *higher: Array
    ) -> tuple[MixedPrecisionState, Array]:
        state, new = self.move(state, x, dx, *higher)
        return state, None if new is None else x - new

    def move(
        self, state: MixedPrecisionState, x: Array, dx: Array, *higher: Array
    ) -> tuple[MixedPrecisionState, Array]:
        inner, master = self.rule.move(
            state.state, state.master, *(self._lift(g) for g in (dx, *higher))
        )
        if master is None:
            return MixedPrecisionState(state.master, inner), None
        return MixedPrecisionState(master, inner), as_like(x, master)

    def _lift(self, x: Array) -> Array:
        """Return a copy of `x` in the master's precision."""
        xp = namespace(x)
        if xp is np:
            return x.astype(np.result_type(self.dtype, np.complex64) if x.dtype.kind == "c" else self.dtype)
        return xp.astype(x, getattr(xp, self.dtype.name), copy=True)

    def fields(self) -> Iterator[tuple[str, Any]]:
        yield "dtype", self.dtype
        yield from self.rule.fields()

    def adjust(self, **changes: Any) -> Self:
        if "dtype" in changes:
            return super().adjust(dtype=changes["dtype"])
        return type(self)(self.dtype, self.rule.adjust(**changes))
