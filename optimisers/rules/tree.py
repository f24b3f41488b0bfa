"""Rules that look at the whole tree: one number for all its arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..words import abs2, absolute, ema_weight, norm, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Decay, Decays, Finite, NonNegative, Order, Positive, Upper
from ._numbers import root
from .norms import NormClip, Scaling, clipping


@dataclass(frozen=True)
class ClipGlobalNorm(NormClip):
    """The gradients of all arrays scaled down together to a norm: put it ahead of another rule.

    ::

        dx = g min(omega / N, 1)      N = ‖all g‖_p

    Parameters
    ----------
    omega : float
        Largest norm that passes, in units of g; with inf nothing is scaled, and `norms` tells how
        long the gradients are.
    p : float
        Which norm, as for `ClipNorm`; all arrays need the same one.
    throw : bool
        Whether a norm that is infinite or NaN raises. On a device that waits for the gradients;
        ``throw=False`` does not.

    Raises
    ------
    FloatingPointError
        From an update, with the path of the first array whose gradient is to blame, and before
        anything is written.

    Notes
    -----
    Keeps the last norm, one for all arrays: `norms` reads it. N is over all arrays of one update
    that have a gradient, are not frozen, and have this rule in the same rank: the first
    `ClipGlobalNorm` of each goes with the first of the others. A tied array counts once. Same
    numbers as `optax.clip_by_global_norm`; `torch.nn.utils.clip_grad_norm_` divides by N + 1e-6.

    References
    ----------
    R. Pascanu, T. Mikolov, Y. Bengio: On the Difficulty of Training Recurrent Neural Networks,
    2012, arXiv:1211.5063

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import ClipGlobalNorm, Descent, OptimiserChain, norms, setup, update_
    >>> model = {"w": np.zeros(2), "b": np.zeros(1)}
    >>> state = setup(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)), model)
    >>> grad = {"w": np.array([1.0, -2.0]), "b": np.array([2.0])}
    >>> state, model = update_(state, model, grad)
    >>> model["w"], norms(state)
    (array([-0.33333333,  0.66666667]), (3.0,))
    """

    omega: Upper = 10.0
    p: Order = 2.0
    throw: bool = True

    static = ("p",)
    over = "tree"
    kept = ("norm",)
    common = ("p",)

    def coefs(self, sums: Numbers) -> tuple[Numbers, Numbers]:
        (found,) = sums
        return (clipping(found, self.omega),), sums


@dataclass(frozen=True)
class Polyak(Scaling):
    """The gradient times the step that would reach the least value, if the loss were a line.

    ::

        dx = min((value - floor) / (N² + epsilon), eta) g      N = ‖all g‖

    Parameters
    ----------
    eta : float
        Largest factor.
    floor : float
        The least value of the loss.
    epsilon : float
        Added to what divides.

    Notes
    -----
    Keeps no state, and needs the value of the loss: ``update(state, model, grad, value=loss)``.
    There is no step where ``N² + epsilon`` is below 2.3e-16. A value below `floor` makes a step
    uphill. Same numbers as `optax.polyak_sgd(eta, f_min=floor, eps=epsilon)`.

    References
    ----------
    N. Loizou et al.: Stochastic Polyak Step-size for SGD, 2020, arXiv:2002.10542

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Polyak, setup, update_
    >>> x = np.array([1.0, 2.0])                            # of the loss x @ x
    >>> state, x = update_(setup(Polyak(), x), x, 2 * x, value=x @ x)
    >>> x
    array([0.5, 1. ])
    """

    eta: Upper = 1.0
    floor: Finite = 0.0
    epsilon: NonNegative = 0.0

    over = "tree"

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        return (norm(dx),)

    def coefs(self, sums: Numbers, value: Any) -> Numbers:
        (found,) = sums
        divisor = found * found + self.epsilon
        moves = divisor > _NOTHING
        length = (value - self.floor) / where(moves, divisor, 1.0)
        return (where(moves, where(length < self.eta, length, self.eta), 0.0),)


_NOTHING = 2.220446049250313e-16
"""The least number by which Polyak divides, that of optax."""


@dataclass(frozen=True)
class Prodigy(ElementwiseRule):
    """Adam that finds its learning rate: d, by how far the parameters have come.

    ::

        l   = d eta             (times sqrt(1 - b2^t) / (1 - b1^t) if corrected)
        num = b3 num + (d / d0) l <g, x0 - x>
        m   = b1 m + (1 - b1) d g
        v   = b2 v + (1 - b2) d² |g|²
        s   = b3 s + (d / d0) l g                     (d in place of l if safeguard)
        D   = sum |s|                                 (no step while it is 0)
        d   = max(d, coef num / D), at most growth times the old one
        dx  = l m / (sqrt(v) + d epsilon) + lambda_ l x

    The product and the sum are over the whole tree.

    Parameters
    ----------
    eta : float
        Factor of the rate that is found; leave it at 1, or let a schedule end it.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    beta3 : float, optional
        Decay rate ``b3`` of the sums by which d is found; None, the default, is ``sqrt(b2)``.
    d0 : float
        How d begins, in units of x; rather too small than too large.
    coef : float
        Factor of what is found for d.
    growth : float
        Largest factor by which d grows in a step; inf is no limit.
    lambda_ : float
        Weight decay.
    epsilon : float
        Added to what divides, in units of g.
    corrected : bool
        Whether the averages are corrected for their start at 0.
    safeguard : bool
        Whether warm-up of eta leaves the sums for d as they are without it.

    Raises
    ------
    TypeError
        From `setup`, for complex parameters; from an update, if arrays of the tree have different
        numbers.

    Notes
    -----
    Keeps ``m``, ``v``, ``s``, ``x0``, where the parameter was at first, the count ``t``, and of the
    tree ``d``, the largest ``dmax`` and ``num``. Same numbers as `prodigyopt.Prodigy`, with
    ``use_bias_correction`` for `corrected` and ``safeguard_warmup`` for `safeguard`.

    References
    ----------
    K. Mishchenko, A. Defazio: Prodigy: An Expeditiously Adaptive Parameter-Free Learner, 2023,
    arXiv:2306.06101

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import Prodigy, setup, update_
    >>> x = np.array([3.0, -4.0])
    >>> state = setup(Prodigy(d0=1e-3), x)
    >>> for _ in range(100):
    ...     state, x = update_(state, x, 2 * x)
    >>> bool(x @ x < 1.0), bool(state.state.d > 0.1)
    (True, True)
    """

    eta: NonNegative = 1.0
    beta: Decays = (0.9, 0.999)
    beta3: Decay | None = None
    d0: Positive = 1e-6
    coef: NonNegative = 1.0
    growth: Upper = math.inf
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-8
    corrected: bool = False
    safeguard: bool = False

    fixed = ("d0",)
    real_only = True
    slots = ("m", "v", "s", "x0")
    over = "tree"
    _follows = False
    kept = ("d", "dmax", "num")
    keeps_wide = True  # d² |g|² begins at 1e-12, and s grows beyond float16
    common = ("eta", "beta", "beta3", "d0", "coef", "growth", "corrected", "safeguard")

    def start(self) -> tuple[float | str, ...]:
        return 0.0, 0.0, 0.0, "x"

    def keep(self) -> Numbers:
        return self.d0, self.d0, 0.0

    def measure_coefs(self, t: Any, kept: Numbers) -> Numbers:
        _, b2 = self.beta
        b3 = root(b2) if self.beta3 is None else self.beta3
        d, rate = kept[0], self._rate(t, kept[0])
        return b3, d / self.d0 * (d if self.safeguard else rate)

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        _, _, s, x0 = state
        b3, scale = coefs
        return dx * (x0 - x), absolute(b3 * s + scale * dx)

    def coefs(
        self, t: Any, kept: Numbers, before: Numbers, sums: Numbers
    ) -> tuple[Numbers, Numbers]:
        (d, largest, total), (b3, scale), (product, size) = kept, before, sums
        b1, b2 = self.beta
        rate, moves = self._rate(t, d), size > 0
        total = where(moves, b3 * total + d / self.d0 * rate * product, total)
        found = where(moves, self.coef * total / where(moves, size, 1.0), 0.0)
        # d0 itself may have been rounded.
        begun = where((d <= self.d0 * (1 + 1e-6)) & (found > d), found, d)
        largest = where(found > largest, found, largest)
        # Infinity has no place where derivatives are taken: times 0 it is not a number.
        is_free = self.growth == math.inf
        most = where(is_free, largest, where(is_free, 1.0, self.growth) * begun)
        new = where(moves, where(largest < most, largest, most), d)
        rate = where(moves, rate, 0.0)
        return (
            b1, (1 - b1) * d, b2, (1 - b2) * d * d, b3, scale,
            rate, new * self.epsilon, self.lambda_ * rate,
        ), (new, where(moves, largest, kept[1]), total)  # fmt: skip

    def _rate(self, t: Any, d: Any) -> Any:
        """Return the learning rate at d."""
        if not self.corrected:
            return d * self.eta
        b1, b2 = self.beta
        return d * self.eta * root(ema_weight(b2, t)) / ema_weight(b1, t)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v, s, x0 = state
        b1, rest1, b2, rest2, b3, scale, rate, epsilon, decay = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        s = b3 * s + scale * dx
        return rate * m / (sqrt(v) + epsilon) + decay * x, (m, v, s, x0)
