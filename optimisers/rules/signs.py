"""Steps that go by the sign of a gradient, or of a mean of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..words import (
    maximum,
    minimum,
    sign,
    where,
)
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Decay, Decays, Grow, NonNegative, Range, Shrink


@dataclass(frozen=True)
class SignDescent(ElementwiseRule):
    """Steps of one length, along the sign of the gradient.

    ::

        dx = eta sign(g)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: the length of each element's step.

    Notes
    -----
    Keeps nothing. Same numbers as `optax.sign_sgd`. The sign of a complex number is ``g/|g|``.

    References
    ----------
    J. Bernstein et al.: signSGD: Compressed Optimisation for Non-Convex Problems, 2018,
    arXiv:1802.04434

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.SignDescent(eta=0.1)
    >>> rule.apply((), np.zeros(3), np.array([3.0, 0.0, -4.0]))
    ((), array([ 0.1,  0. , -0.1]))
    """

    eta: NonNegative = 0.001

    _follows = False

    def coefs(self) -> Numbers:
        return (self.eta,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (eta,) = coefs
        return eta * sign(dx), ()


@dataclass(frozen=True)
class Signum(ElementwiseRule):
    """Steps of one length, along the sign of a mean of the gradient.

    ::

        m  = rho m + (1 - rho) g
        dx = eta sign(m)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: the length of each element's step.
    rho : float
        Decay rate of the mean, in [0, 1).

    Notes
    -----
    Keeps ``m``. Same numbers as `optax.signum`, whose ``beta`` is rho here. The sign of a complex
    number is ``m/|m|``.

    References
    ----------
    J. Bernstein et al.: signSGD: Compressed Optimisation for Non-Convex Problems, 2018,
    arXiv:1802.04434

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Signum(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.001
    rho: Decay = 0.9

    slots = ("m",)

    def coefs(self) -> Numbers:
        return self.rho, 1 - self.rho, self.eta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (m,) = state
        rho, rest, eta = coefs
        m = rho * m + rest * dx
        return eta * sign(m), (m,)


@dataclass(frozen=True)
class Rprop(ElementwiseRule):
    """Resilient backpropagation: only the signs of the gradient count.

    ::

        s   = g_old g
        eta = min(eta ell[1], gamma[1]) where s > 0, max(eta ell[0], gamma[0]) where s < 0
        g   = 0 where s < 0
        dx  = eta sign(g)

    Parameters
    ----------
    eta : float
        The step size, in units of x, from which each element starts. It is read once, by `setup`:
        adjusting it later has no effect.
    ell : tuple of two floats
        What a step size is multiplied with where the sign changed, in (0, 1), and where it stayed,
        above 1.
    gamma : tuple of two floats
        Least and largest step size, in units of x; the largest may be inf, which is none.

    Notes
    -----
    Keeps ``g``, the last gradient, and ``eta``, the step sizes. Meant for full batches; real
    parameters only. Same numbers as `torch.optim.Rprop`.

    References
    ----------
    M. Riedmiller, H. Braun: A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm. IEEE International Conference on Neural Networks, 1993,
    doi:10.1109/ICNN.1993.298623

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Rprop(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 1e-3
    ell: tuple[Shrink, Grow] = (0.5, 1.2)
    gamma: Range = (1e-6, 50.0)

    slots = ("g", "eta")
    real_only = True

    def start(self) -> Numbers:
        return 0.0, self.eta

    def coefs(self) -> Numbers:
        return *self.ell, *self.gamma, 0.0

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        g, eta = state
        shrink, grow, low, high, zero = coefs
        trend = g * dx
        longer = minimum(eta * grow, high)
        shorter = maximum(eta * shrink, low)
        eta = where(trend > zero, longer, where(trend < zero, shorter, eta))
        g = where(trend < zero, zero, dx)
        return eta * sign(g), (g, eta)


@dataclass(frozen=True)
class Lion(ElementwiseRule):
    """Evolved sign momentum: every element moves by eta.

    ::

        dx = eta sign(b1 m + (1 - b1) g)      with the old m
        m  = b2 m + (1 - b2) g

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: the length of each element's step.
    beta : tuple of two floats
        ``b1``, the share of the mean in a step, and ``b2``, its decay rate, in [0, 1).

    Notes
    -----
    Keeps ``m``. Same numbers as `optax.lion` with ``b1``, ``b2`` given and no decay; the paper
    has beta (0.9, 0.99) and puts weight decay beside it, as ``OptimiserChain(Lion(eta),
    WeightDecay(eta * l))`` does. Optimisers.jl 0.4.8 differs: it mixes two conventions for b1 and
    b2, and so ends near sign descent.

    References
    ----------
    X. Chen et al.: Symbolic Discovery of Optimization Algorithms, 2023, arXiv:2302.06675

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Lion(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)

    slots = ("m",)

    def coefs(self) -> Numbers:
        b1, b2 = self.beta
        return b1, 1 - b1, b2, 1 - b2, self.eta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (m,) = state
        b1, rest1, b2, rest2, eta = coefs
        return eta * sign(b1 * m + rest1 * dx), (b2 * m + rest2 * dx,)
