"""A rule that is also told how a function bends: Sophia."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .._arrays.dtypes import is_narrow
from .._arrays.traced import promoting
from ..words import clip, is_complex, maximum
from ._base import Array, Rule, checked_state, misfit
from ._fields import Decays, Finite, NonNegative
from ._numbers import applied, as_like, full_like


class SophiaState(NamedTuple):
    """The mean of the gradient, and that of the estimates of the Hessian's diagonal."""

    m: Array
    h: Array


@dataclass(frozen=True)
class Sophia(Rule):
    """Steps by the curvature of each element, and of length eta at most.

    ::

        m  = b1 m + (1 - b1) g
        dx = eta (clip(m / max(rho h, 1e-15), -1, 1) + lambda_ x)      with the old h
        h  = b2 h + (1 - b2) the estimate, where there is one

    An estimate of the Hessian's diagonal is handed over behind the gradient, as once in 10 steps:
    ``update(state, model, g, estimate)``. By Hutchinson it is u times the product of the Hessian
    with u, for random signs u; by Gauss and Newton the batch size times ``g²``, with the gradient
    for labels that are drawn from the model. Where there has been none, a step goes by the sign of
    m.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: the longest step of an element.
    beta : tuple of two floats
        Decay rates ``b1`` of the mean of g and ``b2`` of that of the estimates, in [0, 1).
    rho : float
        How far to trust the curvature: the larger, the shorter the steps.
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.

    Notes
    -----
    Keeps ``m`` and ``h``. Same numbers as the authors' ``SophiaG`` with ``bs=1``, but where an
    estimate is negative: theirs turns the step around. `optax.contrib.sophia` corrects m for the
    start.

    Raises
    ------
    TypeError
        In `setup`, for complex parameters.

    References
    ----------
    H. Liu et al.: Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training, 2023, arXiv:2305.14342

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g, h = np.array([1.0, 2.0]), np.array([3.0, -0.4]), np.array([10.0, 500.0])
    >>> rule = optimisers.Sophia(eta=0.1, lambda_=0.0)
    >>> state, x = optimisers.update(optimisers.setup(rule, x), x, g, h)
    >>> state, x = optimisers.update(state, x, g)
    >>> np.round(x, 3)
    array([0.8  , 2.114])
    """

    eta: NonNegative = 1e-4
    beta: Decays = (0.965, 0.99)
    rho: NonNegative = 0.04
    lambda_: Finite = 0.1

    real_only = True

    def init(self, x: Array) -> SophiaState:
        if is_complex(x):
            raise TypeError(f"{self._shown_as} takes real parameters only; got {x.dtype}")
        return SophiaState(full_like(x, 0.0), full_like(x, 0.0))

    def apply(self, state: Any, x: Array, dx: Array, *higher: Array | None) -> tuple[Any, Any]:
        if is_narrow(x):  # asked by hand: updates hand over float32
            state, dx = applied(self, state, x, dx, *higher)
            return state, as_like(x, dx)
        state = checked_state(self, state, SophiaState)
        for name, slot in zip(state._fields, state, strict=True):
            if tuple(slot.shape) != tuple(x.shape):
                raise ValueError(misfit(self, name, slot, x))
        b1, b2 = self.beta
        with promoting():
            m, h = b1 * state.m + (1 - b1) * dx, state.h
            step = clip(m / maximum(self.rho * h, full_like(h, 1e-15)), -1.0, 1.0)
            step = self.eta * (step + self.lambda_ * x)
            h = h * 1 if not higher or higher[0] is None else b2 * h + (1 - b2) * higher[0]
            return SophiaState(as_like(state.m, m), as_like(state.h, h)), as_like(x, step)
