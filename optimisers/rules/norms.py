"""Rules that look at the norm of a gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from .._arrays.library import bare
from ..words import norm, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Order, Upper
from ._numbers import is_traced


class Scaling(ElementwiseRule):
    """A rule that multiplies a gradient with a number, for which it looks at many."""

    _leads = True

    @abstractmethod
    def coefs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the number, and what the rule keeps."""

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (factor,) = coefs
        return factor * dx, ()


def clipping(found: Any, omega: Any) -> Any:
    """Return by what a gradient of this norm is multiplied, so that it is at most omega."""
    if type(found) is float and type(omega) is float:  # asked for each array
        return 1.0 if found <= omega or omega == math.inf else omega / found
    passes = (found <= omega) | (omega == math.inf)
    return where(passes, 1.0, omega / where(passes, 1.0, found))


class NormClip(Scaling):
    """A rule that scales gradients down to a norm; subclasses have these fields."""

    omega: Any
    p: Any
    throw: bool

    @property
    def order(self) -> float:
        return float(self.p)

    @property
    def _is_idle(self) -> bool:  # type: ignore[override]
        return not is_traced(self.omega) and self.omega == math.inf

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        return (norm(dx),)

    def accept(self, sums: Numbers) -> None:
        (found,) = sums
        if self.throw and not is_traced(found) and not math.isfinite(bare(found)):
            raise FloatingPointError(
                f"{self._shown_as}: the gradient has {self.p:g}-norm {found}; "
                f"{self._shown_as}(..., throw=False) lets such gradients through"
            )


@dataclass(frozen=True)
class ClipNorm(NormClip):
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
    _measured_by_cuda = True

    def coefs(self, sums: Numbers) -> Numbers:
        (found,) = sums
        return (clipping(found, self.omega),)
