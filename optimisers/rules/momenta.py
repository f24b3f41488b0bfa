"""Adam with another mean of the gradient: one that looks ahead, that corrects itself, or two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .._arrays.library import namespace
from .._arrays.traced import root
from ..words import abs2, ema_weight, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Count, Decays, Finite, NonNegative, ThreeDecays
from ._numbers import ema_scale


@dataclass(frozen=True)
class NAdam(ElementwiseRule):
    """Adam with Nesterov's momentum.

    ::

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) |g|²
        dx = eta (b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t))
             / (sqrt(b2 v / (1 - b2^t)) + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same formula as Optimisers.jl; the numbers differ from
    `torch.optim.NAdam`, which lets b1 grow with t, and from `optax.nadam`, which has no b2 under
    the root.

    References
    ----------
    T. Dozat: Incorporating Nesterov Momentum into Adam. ICLR 2016, workshop track

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.NAdam(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.14744216, -0.14744216])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-8

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate_m = self.eta * b1 / ema_weight(b1, t + 1)
        rate_g = self.eta * (1 - b1) / ema_weight(b1, t)
        scale = root(b2 / ema_weight(b2, t))
        return b1, 1 - b1, b2, 1 - b2, rate_m, rate_g, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate_m, rate_g, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return (rate_m * m + rate_g * dx) / (scale * sqrt(v) + epsilon), (m, v)


@dataclass(frozen=True)
class NAdamW(ElementwiseRule):
    """AdamW with Nesterov's momentum: the mean of the next step, with the gradient of this one.

    ::

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) |g|²
        u  = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)
        dx = eta (u / (sqrt(v / (1 - b2^t)) + epsilon) + lambda_ x)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `optax.nadamw`, whose decay is 1e-4
    unless set. Others go by this name: timm divides both parts of u by ``1 - b1^t``;
    `torch.optim.NAdam` lets b1 grow with the count. `NAdam` has one b2 more.

    References
    ----------
    T. Dozat: Incorporating Nesterov Momentum into Adam. ICLR Workshop 2016;
    I. Loshchilov, F. Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.NAdamW(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.14736842, -0.14736842])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-8

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate_m = self.eta * b1 / ema_weight(b1, t + 1)
        rate_g = self.eta * (1 - b1) / ema_weight(b1, t)
        scale = ema_scale(b2, t)
        decay = self.eta * self.lambda_
        return b1, 1 - b1, b2, 1 - b2, rate_m, rate_g, scale, self.epsilon, decay

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate_m, rate_g, scale, epsilon, decay = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return (rate_m * m + rate_g * dx) / (scale * sqrt(v) + epsilon) + decay * x, (m, v)


@dataclass(frozen=True)
class OAdam(ElementwiseRule):
    """Optimistic Adam, for games such as adversarial training.

    ::

        term' = Adam's dx
        dx    = 2 term' - term        with the old term

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``v``, ``term`` and the count ``t``. Same formula as Optimisers.jl.

    References
    ----------
    C. Daskalakis, A. Ilyas, V. Syrgkanis, H. Zeng: Training GANs with Optimism, 2017,
    arXiv:1711.00141

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.OAdam(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.2, -0.2])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.5, 0.9)
    epsilon: NonNegative = 1e-8

    slots = ("m", "v", "term")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_scale(b2, t)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon, 2.0

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v, term = state
        b1, rest1, b2, rest2, rate, scale, epsilon, two = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        new = rate * m / (scale * sqrt(v) + epsilon)
        return two * new - term, (m, v, new)


@dataclass(frozen=True)
class AdEMAMix(ElementwiseRule):
    """AdamW along two means of the gradient, one that forgets soon and one that remembers long.

    ::

        m  = b1 m + (1 - b1) g
        l  = b3 l + (1 - b3) g
        v  = b2 v + (1 - b2) |g|²
        dx = eta ((m / (1 - b1^t) + alpha l) / (sqrt(v / (1 - b2^t)) + epsilon) + lambda_ x)

    In the first `warmup` steps alpha grows from 0 in proportion to t, and the half-life of ``l``
    from that of ``m`` to its own.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of three floats
        Decay rates ``b1``, ``b2`` and ``b3``, in [0, 1).
    alpha : float
        Weight of ``l``.
    warmup : int, optional
        Number of steps until alpha and b3 have their values; None for at once.
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_``.
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``l``, ``v`` and the count ``t``. Same numbers as the authors' code with
    ``alpha=5.0`` (2 unless set), and as `optax.contrib.ademamix` without a warm-up; its schedules
    count from 0.

    References
    ----------
    M. Pagliardini, P. Ablin, D. Grangier: The AdEMAMix Optimizer: Better, Faster, Older, 2024,
    arXiv:2409.03137

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdEMAMix(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.10005, -0.10005])
    """

    eta: NonNegative = 0.001
    beta: ThreeDecays = (0.9, 0.999, 0.9999)
    alpha: NonNegative = 5.0
    warmup: Count | None = None
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-8

    slots = ("m", "l", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2, b3 = self.beta
        alpha = self.alpha
        if self.warmup is not None:
            done = where(t < self.warmup, t / self.warmup, 1.0)
            alpha = done * alpha
            half_life = (1 - done) * _half_life(b1) + done * _half_life(b3)
            b3 = where(t < self.warmup, 0.5 ** (1 / (1 + half_life)), b3)
        rate = self.eta / ema_weight(b1, t), self.eta * alpha
        scale, decay = ema_scale(b2, t), self.eta * self.lambda_
        return b1, 1 - b1, b2, 1 - b2, b3, 1 - b3, *rate, scale, self.epsilon, decay

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, l, v = state  # noqa: E741 (the name in the formula)
        b1, rest1, b2, rest2, b3, rest3, rate_m, rate_l, scale, epsilon, decay = coefs
        m = b1 * m + rest1 * dx
        l = b3 * l + rest3 * dx  # noqa: E741
        v = b2 * v + rest2 * abs2(dx)
        dx = (rate_m * m + rate_l * l) / (scale * sqrt(v) + epsilon) + decay * x
        return dx, (m, l, v)


def _half_life(beta: Any) -> Any:
    """Return after how many steps a mean has forgotten half of a number, less one."""
    beta = beta + 1e-8  # the authors' guard, which counts in the digits that they print
    log = math.log if isinstance(beta, float) else namespace(beta).log
    return math.log(0.5) / log(beta) - 1


@dataclass(frozen=True)
class Adan(ElementwiseRule):
    """Adam with Nesterov's momentum by the change of the gradient from step to step.

    ::

        d  = g - gold, and 0 at first; gold = g
        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) d
        n  = b3 n + (1 - b3) |g + b2 d|²
        u  = (m / (1 - b1^t) + b2 v / (1 - b2^t)) / (sqrt(n / (1 - b3^t)) + epsilon)
        dx = eta (u + lambda_ x) / (1 + eta lambda_)      if proximal, else without what divides

    Parameters
    ----------
    eta : float
        Learning rate, in units of x.
    beta : tuple of three floats
        Decay rates ``b1``, ``b2`` and ``b3``, in [0, 1).
    lambda_ : float
        Weight decay.
    epsilon : float
        Added to what divides, in units of g.
    proximal : bool
        Whether the decay is that of a proximal step.

    Notes
    -----
    Keeps ``m``, ``v``, ``n``, ``gold`` and the count ``t``. Same numbers as the authors' code,
    where `proximal` is ``no_prox=False``. `optax.adan` differs: it weighs d and v with ``1 - b2``.

    References
    ----------
    X. Xie et al.: Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models,
    2022, arXiv:2208.06677

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Adan(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.001
    beta: ThreeDecays = (0.98, 0.92, 0.99)
    lambda_: NonNegative = 0.0
    epsilon: NonNegative = 1e-8
    proximal: bool = True

    slots = ("m", "v", "n", "gold")

    def coefs(self, t: Any) -> Numbers:
        b1, b2, b3 = self.beta
        eta = self.eta / where(self.proximal, 1 + self.eta * self.lambda_, 1.0)
        rates = eta / ema_weight(b1, t), eta * b2 / ema_weight(b2, t)
        scale, decay = ema_scale(b3, t), eta * self.lambda_
        changes = where(t > 1, 1.0, 0.0)
        return b1, 1 - b1, b2, 1 - b2, b3, 1 - b3, *rates, scale, self.epsilon, decay, changes

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v, n, gold = state
        b1, rest1, b2, rest2, b3, rest3, rate_m, rate_v, scale, epsilon, decay, changes = coefs
        d = changes * (dx - gold)
        gold = dx
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * d
        n = b3 * n + rest3 * abs2(dx + b2 * d)
        dx = (rate_m * m + rate_v * v) / (scale * sqrt(n) + epsilon) + decay * x
        return dx, (m, v, n, gold)
