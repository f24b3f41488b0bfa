"""Gradient descent, with and without momentum."""

from __future__ import annotations

from dataclasses import dataclass

from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Decay, NonNegative


@dataclass(frozen=True)
class Descent(ElementwiseRule):
    """Gradient descent.

    ::

        dx = eta g

    Parameters
    ----------
    eta : float
        Learning rate: units of x per unit of g.

    Notes
    -----
    Keeps no state. Same numbers as `torch.optim.SGD` and `optax.sgd`.

    References
    ----------
    H. Robbins, S. Monro: A Stochastic Approximation Method. Annals of Mathematical Statistics 22
    (1951), doi:10.1214/aoms/1177729586

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Descent(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.3, -0.4])
    """

    eta: NonNegative = 0.1

    def coefs(self) -> Numbers:
        return (self.eta,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (eta,) = coefs
        return eta * dx, ()


@dataclass(frozen=True)
class Momentum(ElementwiseRule):
    """Gradient descent with momentum.

    ::

        v  = rho v + eta g
        dx = v

    Parameters
    ----------
    eta : float
        Learning rate: units of x per unit of g.
    rho : float
        Share of the last step that goes into the next, in [0, 1).

    Notes
    -----
    Keeps ``v``, the last step. Same numbers as `torch.optim.SGD` and `optax.sgd` while eta is
    constant: there ``v`` is free of eta, here a new eta tells only on the gradients to come.

    References
    ----------
    B. T. Polyak: Some Methods of Speeding up the Convergence of Iteration Methods. USSR
    Computational Mathematics and Mathematical Physics 4 (1964), doi:10.1016/0041-5553(64)90137-5

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Momentum(eta=0.1, rho=0.9)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.3, -0.4])
    """

    eta: NonNegative = 0.01
    rho: Decay = 0.9

    slots = ("v",)

    def coefs(self) -> Numbers:
        return self.rho, self.eta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (v,) = state
        rho, eta = coefs
        v = rho * v + eta * dx
        return v, (v,)


@dataclass(frozen=True)
class Nesterov(ElementwiseRule):
    """Gradient descent with Nesterov's momentum.

    ::

        dx = -rho² v + (1 + rho) eta g      with the old v
        v  = rho v - eta g

    Parameters
    ----------
    eta : float
        Learning rate: units of x per unit of g.
    rho : float
        Share of the last velocity that goes into the next, in [0, 1).

    Notes
    -----
    Keeps ``v``, a velocity (it points downhill). Same numbers as `torch.optim.SGD` and `optax.sgd`
    with ``nesterov=True`` while eta is constant.

    References
    ----------
    I. Sutskever, J. Martens, G. Dahl, G. Hinton: On the Importance of Initialization and Momentum
    in Deep Learning. ICML 2013

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Nesterov(eta=0.1, rho=0.9)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.57, -0.76])
    """

    eta: NonNegative = 0.001
    rho: Decay = 0.9

    slots = ("v",)

    def coefs(self) -> Numbers:
        return self.rho, self.eta, self.rho * self.rho, (1 + self.rho) * self.eta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (v,) = state
        rho, eta, rho2, ahead = coefs
        return ahead * dx - rho2 * v, (rho * v - eta * dx,)
