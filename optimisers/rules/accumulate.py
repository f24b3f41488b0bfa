"""The mean of several gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .._arrays.library import is_abstract
from .._arrays.traced import Maybe, chosen
from ..words import zeros_like
from ._base import (
    Array,
    Arrays,
    ElementwiseRule,
    Numbers,
    Rule,
    Stepped,
    checked_state,
    misfit,
)
from ._fields import Count
from ._numbers import (
    as_count,
    as_like,
    count_like,
    counted,
    full_like,
    largest_count,
    widened,
)
from ._program import Hold, Program


class AccumGradState(NamedTuple):
    """The gradients held, added up, and how many they are."""

    sum: Array
    count: Array

    @staticmethod
    def is_wide() -> bool:
        """Tell that its arrays are not rounded to a parameter of narrow numbers."""
        return True

    @staticmethod
    def keeps_count() -> bool:
        """Tell that its last part is a count; see `_pytree`."""
        return True


@dataclass(frozen=True)
class AccumGrad(Rule):
    """The mean of n gradients, once in n steps: put it ahead of another rule.

    ::

        sum = sum + g                     for n - 1 steps, which the parameter does not follow
        dx  = (sum + g) / n; sum = 0      on the n-th

    Parameters
    ----------
    n : int
        How many gradients make a step; it cannot be adjusted later.

    Notes
    -----
    Keeps ``sum`` and ``count``, the number of gradients in it, from 0 to n - 1. The sum is in
    float32 where the parameter's numbers are narrower, else in its dtype; to keep it in that range
    is up to the user. Rules after it count only the steps that are made. While JAX traces, the
    rules after it are evaluated every time, and what they give is used once in n.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import AccumGrad, Descent, OptimiserChain, setup, update_
    >>> x = np.array([0.0])
    >>> state = setup(OptimiserChain(AccumGrad(2), Descent(eta=1.0)), x)
    >>> for g in ([1.0], [3.0], [7.0]):
    ...     state, x = update_(state, x, np.array(g))
    >>> x, state.state[0]
    (array([-2.]), AccumGradState(sum=array([7.]), count=array(1)))
    """

    n: Count

    fixed = ("n",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", int(self.n))

    def init(self, x: Array) -> AccumGradState:
        return AccumGradState(full_like(widened(x), 0.0), count_like(x))

    def apply(
        self, state: AccumGradState, x: Array, dx: Array, *higher: Array
    ) -> tuple[AccumGradState, Array | None]:
        state = checked_state(self, state, AccumGradState)
        if tuple(state.sum.shape) != tuple(x.shape):
            raise ValueError(misfit(self, "sum", state.sum, x))
        # Earlier versions kept the sum as narrow as the parameter is.
        state = AccumGradState(widened(state.sum), as_count(state.count, x))
        if is_abstract(state.count):
            return self._traced(state, x, dx)
        if int(state.count) < self._last(state.count):
            (total,), _ = _Hold().apply((state.sum,), x, dx)
            return AccumGradState(total, as_like(state.count, counted(state.count))), None
        (total,), mean = _Release(self.n).apply((state.sum,), x, dx)
        return AccumGradState(total, as_like(state.count, state.count * 0)), mean

    def program(self) -> Program:
        return (Hold(self.n, (), _Hold(), _Release(self.n)),)

    def _last(self, count: Array) -> int:
        """Return how many gradients are held when the next one makes the step."""
        return min(self.n - 1, largest_count(count))

    def _traced(self, state: AccumGradState, x: Array, dx: Array) -> tuple[AccumGradState, Maybe]:
        made = state.count >= self._last(state.count)
        (total,), _ = _Hold().apply((state.sum,), x, dx)
        (zero,), mean = _Release(self.n).apply((state.sum,), x, dx)
        held = AccumGradState(total, as_like(state.count, counted(state.count)))
        emptied = AccumGradState(zero, as_like(state.count, state.count * 0))
        return chosen(made, emptied, held), Maybe(step=mean, made=made)


@dataclass(frozen=True)
class _Hold(ElementwiseRule):
    """A gradient added to a sum: what `AccumGrad` does on the steps that it swallows."""

    slots = ("sum",)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (sum,) = state
        sum = sum + dx
        return sum, (sum,)


@dataclass(frozen=True)
class _Release(ElementwiseRule):
    """The mean of a sum and a last gradient: what `AccumGrad` does on its n-th step."""

    n: Count

    slots = ("sum",)

    def coefs(self) -> Numbers:
        return (self.n,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (sum,) = state
        (n,) = coefs
        return (sum + dx) / n, (zeros_like(sum),)
