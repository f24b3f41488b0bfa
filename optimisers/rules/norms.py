"""Rules that look at the norm of a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._arrays.library import bare, for_sums, library_for, namespace
from .._arrays.traced import promoting
from ..words import absolute, where
from ._base import (
    Array,
    Arrays,
    ElementwiseRule,
    Numbers,
    Rule,
    Stepped,
)
from ._fields import Order, Upper
from ._numbers import (
    is_traced,
)
from ._program import Measure, Program, Step


@dataclass(frozen=True)
class ClipNorm(Rule):
    """The gradient of each array scaled down to a norm: put it ahead of another rule.

    ::

        dx = g min(omega / ‖g‖_p, 1)

    Parameters
    ----------
    omega : float
        Largest norm that passes, in units of g (for p of 0, a count); inf is no limit, and leaves
        what `throw` says.
    p : float
        Which norm, ``sum(|g|^p)^(1/p)``: 2 by default; inf and -inf take the largest and the
        smallest element, 0 counts those that are not zero.
    throw : bool
        Whether a norm that is infinite or NaN raises; if not, the step is NaN, or 0 where an
        infinite norm meets a finite element. While JAX traces, nothing can raise: as if False.

    Raises
    ------
    FloatingPointError
        From an update, with the path of the array and before anything is written.

    Notes
    -----
    Keeps no state. Norms are those of `numpy.linalg.norm`, taken in double where the library has
    it at hand, and neither overflow nor underflow on the way. Each array has a norm of its own,
    unlike in `torch.nn.utils.clip_grad_norm_` and `optax.clip_by_global_norm`.

    References
    ----------
    R. Pascanu, T. Mikolov, Y. Bengio: On the Difficulty of Training Recurrent Neural Networks,
    2012, arXiv:1211.5063

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.ClipNorm(omega=1.0)
    >>> rule.apply((), np.zeros(2), np.array([3.0, -4.0]))
    ((), array([ 0.6, -0.8]))
    """

    omega: Upper = 10.0
    p: Order = 2.0
    throw: bool = True

    static = ("p",)

    def apply(self, state: tuple[()], x: Array, dx: Array, *higher: Array) -> tuple[Any, Array]:
        with promoting():
            factor = self.factor(norm(dx, self.p))
        _, dx = _Scale(factor).apply((), x, dx)
        return state, dx

    @property
    def _is_idle(self) -> bool:  # type: ignore[override]
        return not is_traced(self.omega) and self.omega == math.inf

    def program(self) -> Program:
        return Measure(self), Step(_Scale(1.0))

    def factor(self, norm: Any) -> Any:
        """Return what a gradient of this norm is multiplied with."""
        if is_traced(norm) or is_traced(self.omega):
            passes = (norm <= self.omega) | (self.omega == math.inf)
            return where(passes, 1.0, self.omega / where(passes, 1.0, norm))
        if self.throw and not math.isfinite(bare(norm)):
            raise FloatingPointError(
                f"ClipNorm: the gradient has {self.p:g}-norm {norm}; "
                "ClipNorm(..., throw=False) lets such gradients through"
            )
        if norm <= self.omega or self.omega == math.inf:
            return 1.0
        return self.omega / norm


def norm(x: Array, p: float) -> Any:
    """Return the p-norm of all elements of `x`, at least in double for NumPy arrays.

    Numbers are divided by the largest before they are raised to a power (by the smallest, if `p`
    is negative), so that no norm of representable size overflows or underflows on the way.
    """
    if math.prod(x.shape) == 0:
        return 0.0
    xp = namespace(x)
    x = for_sums(x)
    size = absolute(x)
    if p == 0:
        return library_for(x).count_nonzero(size)
    extreme = xp.max(size) if p > 0 else xp.min(size)
    if math.isinf(p):
        return extreme
    scales = (extreme > 0) & xp.isfinite(extreme)  # else the norm is the extreme: 0, inf or nan
    unit = xp.where(scales, extreme, xp.ones_like(extreme))
    part = size / unit
    some = part > 0  # a power of 0 may have no derivative
    total = xp.where(scales, xp.sum(xp.where(some, xp.where(some, part, 1.0) ** p, 0.0)), 1.0)
    if abs(p) >= 1:
        found = unit * total ** (1 / p)
    else:  # by halves: for tiny p the whole root alone would overflow
        found = unit * total ** (0.5 / p) * total ** (0.5 / p)
    return xp.where(scales, found, extreme)


@dataclass(frozen=True)
class _Scale(ElementwiseRule):
    """A gradient times a number: what `ClipNorm` does once it knows the norm."""

    factor: float

    _leads = True

    def coefs(self) -> Numbers:
        return (self.factor,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (factor,) = coefs
        return factor * dx, ()
