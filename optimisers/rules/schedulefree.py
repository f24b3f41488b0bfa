"""Rules that need no schedule: they average the path themselves, or find the length of a step.

Each owns its parameter: the step leads to a value that the rule computes from all that it keeps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .._arrays.library import is_abstract, namespace
from .._arrays.traced import promoting, settled
from ..words import abs2, absolute, maximum, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Decay, Finite, NonNegative, Shrink, Steps
from ._numbers import as_count, as_like, ema_scale, widened

EXACT = 128
"""From this step on, sums of powers of the count are taken by the formula of Euler and Maclaurin,
of which four terms then have all digits of double."""


class Shares(NamedTuple):
    """The share that each of the first steps has in the average, and the weight of them all."""

    shares: np.ndarray
    total: float


@functools.lru_cache(maxsize=32)
def _first_shares(warmup: int, r: float, power: float) -> Shares:
    t = np.arange(1.0, max(warmup, EXACT if r else 1) + 1)
    weights = t**r * np.minimum(t / max(warmup, 1), 1) ** power
    totals = np.cumsum(weights)
    shares = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    return Shares(shares, float(totals[-1]))


def _share(t: Any, warmup: int, r: float, power: float) -> Any:
    """Return the share of step t in the average of all steps up to it.

    A step weighs ``t^r lr^power``, by the largest rate so far; of a rate that only the warm-up
    changes, eta cancels.
    """
    shares, total = _first_shares(warmup, r, power)
    n = len(shares)
    if not is_abstract(t):
        t = int(t)
        return float(shares[t - 1]) if t <= n else t**r / (total + _sum_of_powers(n, t, r))
    xp = namespace(t)
    early = xp.take(xp.asarray(shares), xp.astype(where(t <= n, t - 1, n - 1), xp.int64))
    late = where(t <= n, n + 1, t)
    return where(t <= n, early, late**r / (total + _sum_of_powers(n, late, r)))


def _sum_of_powers(n: int, t: Any, r: float) -> Any:
    """Return the sum of ``k^r`` for k from n + 1 to t."""
    if r == 0:
        return t - n

    def antiderivative(k: Any) -> Any:
        a, b, c = 1 / (r + 1), r / 12, r * (r - 1) * (r - 2) / 720
        d = r * (r - 1) * (r - 2) * (r - 3) * (r - 4) / 30240
        return k**r * (a * k + 0.5 + b / k - c / k**3 + d / k**5)

    return antiderivative(t) - antiderivative(float(n))


def _rates(rule: Any, t: Any, b1: Any) -> tuple[Any, ...]:
    """Return whether z starts, beside what to compare with; c; and the rates of z and of y."""
    share = _share(t, rule.warmup, rule.r, rule.power)
    rate = rule.eta
    if rule.warmup:
        rate = rate * where(t < rule.warmup, t / rule.warmup, 1.0)
    return where(t <= 1, 1.0, 0.0), 0.0, share, rate, rate * (1 - b1 * (1 - share))


def _average(b1: Any, state: Any, y: Array) -> Array:
    """Return the average, which lies behind y as seen from z; y itself before the first step."""
    t = as_count(state.t, y)
    share = 1 - 1 / settled(b1)
    if is_abstract(t):
        share = namespace(t).where(t > 0, share, 0.0)
    elif int(t) == 0:
        return y
    with promoting():
        wide = widened(y)
        return as_like(y, wide + share * (widened(state.z) - wide))


@dataclass(frozen=True)
class ScheduleFreeDescent(ElementwiseRule):
    """Gradient descent with an average of its path in place of a schedule.

    ::

        lr = eta min(1, t / warmup)
        c  = t^r lr^power, divided by the sum of it over all steps so far
        d  = g + lambda_ y
        y  = y + c (z - y) - lr (1 - rho (1 - c)) d           with the old z
        z  = z - lr d

    The parameter is y. To evaluate the model, take `evaluation(state, model)`: there it is the
    average ``y + (1 - 1 / rho) (z - y)``.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x per unit of g.
    rho : float
        How near to the average gradients are taken, in (0, 1).
    lambda_ : float
        Weight decay, at y.
    warmup : int
        In how many steps the rate grows to eta.
    r : float
        The power of t in the weight of a step.
    power : float
        The power of the rate in the weight of a step.

    Notes
    -----
    Keeps ``z`` and the count ``t``. It owns its parameter: in a chain only clips with an infinite
    limit may stand behind it. Same numbers as ``schedulefree.SGDScheduleFree``, and without warm-up
    `optax.contrib.schedule_free_sgd`. Another eta later on, by `adjust`, changes no weights here.

    References
    ----------
    A. Defazio et al.: The Road Less Scheduled, 2024, arXiv:2405.15682

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> model, g = {"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, -4.0])}
    >>> state = optimisers.setup(optimisers.ScheduleFreeDescent(eta=0.1), model)
    >>> for _ in range(3):
    ...     state, model = optimisers.update(state, model, g)
    >>> model["w"], optimisers.evaluation(state, model)["w"]
    (array([0.37, 2.84]), array([0.4, 2.8]))
    """

    eta: NonNegative = 1.0
    rho: Shrink = 0.9
    lambda_: Finite = 0.0
    warmup: Steps = 0
    r: NonNegative = 0.0
    power: NonNegative = 2.0

    slots = ("z",)
    fixed = ("warmup", "r", "power")
    static = ("warmup", "r", "power")
    _owns_parameter = True

    def coefs(self, t: Any) -> Numbers:
        return *_rates(self, t, self.rho), self.lambda_

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (z,) = state
        first, zero, share, rate, rate_y, decay = coefs
        z = where(first > zero, x, z)
        d = dx + decay * x
        dx = share * (x - z) + rate_y * d
        z = z - rate * d
        return dx, (z,)

    def _evaluated(self, state: Any, x: Array) -> Array:
        return _average(self.rho, state, x)


@dataclass(frozen=True)
class ScheduleFreeAdamW(ElementwiseRule):
    """Adam's scale with an average of the path in place of momentum and schedule.

    ::

        v  = b2 v + (1 - b2) |g|²
        d  = g / (sqrt(v / (1 - b2^t)) + epsilon) + lambda_ y

    and on with d as `ScheduleFreeDescent` does, with b1 as rho. The parameter is y; to evaluate the
    model, take `evaluation(state, model)`.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step of z.
    beta : tuple of two floats
        How near to the average gradients are taken, ``b1`` in (0, 1), and the decay rate ``b2`` of
        the average of ``|g|²``, in [0, 1).
    lambda_ : float
        Weight decay, at y.
    epsilon : float
        Added to what divides, in units of g.
    warmup : int
        In how many steps the rate grows to eta.
    r : float
        The power of t in the weight of a step.
    power : float
        The power of the rate in the weight of a step.

    Notes
    -----
    Keeps ``z``, ``v`` and the count ``t``. It owns its parameter: in a chain only clips with an
    infinite limit may stand behind it. Same numbers as ``schedulefree.AdamWScheduleFree``, and
    without warm-up `optax.contrib.schedule_free_adamw`. Another eta later on, by `adjust`, changes
    no weights here.

    References
    ----------
    A. Defazio et al.: The Road Less Scheduled, 2024, arXiv:2405.15682

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> model, g = {"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, -4.0])}
    >>> state = optimisers.setup(optimisers.ScheduleFreeAdamW(eta=0.1), model)
    >>> for _ in range(3):
    ...     state, model = optimisers.update(state, model, g)
    >>> np.round(model["w"], 6), np.round(optimisers.evaluation(state, model)["w"], 6)
    (array([0.79, 2.21]), array([0.8, 2.2]))
    """

    eta: NonNegative = 0.0025
    beta: tuple[Shrink, Decay] = (0.9, 0.999)
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-8
    warmup: Steps = 0
    r: NonNegative = 0.0
    power: NonNegative = 2.0

    slots = ("z", "v")
    fixed = ("warmup", "r", "power")
    static = ("warmup", "r", "power")
    _owns_parameter = True

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        scale = ema_scale(b2, t)
        return *_rates(self, t, b1), b2, 1 - b2, scale, self.epsilon, self.lambda_

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        z, v = state
        first, zero, share, rate, rate_y, b2, rest2, scale, epsilon, decay = coefs
        z = where(first > zero, x, z)
        v = b2 * v + rest2 * abs2(dx)
        d = dx / (scale * sqrt(v) + epsilon) + decay * x
        dx = share * (x - z) + rate_y * d
        z = z - rate * d
        return dx, (z, v)

    def _evaluated(self, state: Any, x: Array) -> Array:
        return _average(self.beta[0], state, x)


@dataclass(frozen=True)
class COCOB(ElementwiseRule):
    """Steps by betting on coins: there is no learning rate.

    ::

        L  = max(L, |g|);  a = a + |g|;  r = max(r - g (x - x0), 0);  th = th - g
        x  = x0 + th (L + r) / (L max(a + L, alpha L))          with the first x as x0

    Parameters
    ----------
    alpha : float
        How much is known at first: the larger, the shorter the first steps.

    Notes
    -----
    Keeps ``L``, from 1e-8 on, ``a``, ``r``, ``th``, ``x0`` and the count ``t``. It owns its
    parameter: in a chain only clips with an infinite limit may stand behind it. Same numbers as
    `optax.contrib.cocob`.

    References
    ----------
    F. Orabona, T. Tommasi: Training Deep Networks without Learning Rates Through Coin Betting,
    2017, arXiv:1705.07795

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.COCOB()
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.01, -0.01])
    """

    alpha: NonNegative = 100.0

    slots = ("L", "a", "r", "th", "x0")
    real_only = True
    _owns_parameter = True
    _follows = False

    def coefs(self, t: Any) -> Numbers:
        return where(t <= 1, 1.0, 0.0), 0.0, 1e-8, self.alpha

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        L, a, r, th, x0 = state
        first, zero, least, alpha = coefs
        x0 = where(first > zero, x, x0)
        size = absolute(dx)
        L = maximum(maximum(L, least), size)
        a = a + size
        r = maximum(r - dx * (x - x0), zero)
        th = th - dx
        bet = th * (L + r) / (L * maximum(a + L, alpha * L))
        return x - x0 - bet, (L, a, r, th, x0)
