"""Steps divided by the size that gradients had: RMSProp, AdaGrad, AdaDelta."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..words import abs2, absolute, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import UNSAID, Decay, NonNegative


@dataclass(frozen=True, repr=False)
class RMSProp(ElementwiseRule):
    """Steps scaled by a running root mean square of the gradient, or by its standard deviation.

    ::

        q  = rho q + (1 - rho) |g|²
        dx = eta g / (sqrt(q) + epsilon)

    and if centred::

        q  = rho q + rho (1 - rho) |g - l|²       with the old l
        l  = l + (1 - rho) (g - l)
        dx = eta g / (sqrt(q) + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x.
    rho : float
        Decay rate of the averages, in [0, 1).
    epsilon : float
        Added to what divides, in units of g.
    centred : bool
        Whether to subtract the mean; it cannot be adjusted later. `centered` is accepted too.
    initial : float
        Where ``q`` starts, in units of g²; it cannot be adjusted later.
    epsilon_inside : bool
        Whether epsilon, then in units of g², is added under the root:
        ``dx = eta g / sqrt(q + epsilon)``.

    Notes
    -----
    Keeps ``q``, the mean of ``|g|²``; if centred, ``l``, the mean of g, and as ``q`` the variance
    around it. Same numbers as `torch.optim.RMSprop`, and `optax.rmsprop` with
    ``eps_in_sqrt=False``; with `epsilon_inside` as optax unless told otherwise, TensorFlow and
    PennyLane; with ``initial=1.0`` as ``autograd.misc.optimizers.rmsprop``.

    Centred, PyTorch and optax keep the mean of ``|g|²`` too and subtract ``|l|²`` from it at each
    step: the same number, but for rounding, which there leaves no digit of a variance that is small
    beside ``|l|²``, or makes it negative and the step NaN. To go on from a state of theirs,
    subtract once: ``q = square_avg - abs(grad_avg)**2``.

    References
    ----------
    T. Tieleman, G. Hinton: Lecture 6.5, RMSProp. Neural Networks for Machine Learning, 2012.
    Centred: A. Graves: Generating Sequences With Recurrent Neural Networks, 2013, arXiv:1308.0850

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.RMSProp(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.31622776, -0.31622776])
    """

    eta: NonNegative = 0.001
    rho: Decay = 0.9
    epsilon: NonNegative = 1e-8
    centred: bool = False
    initial: NonNegative = field(default=0.0, repr=False, metadata=UNSAID)
    epsilon_inside: bool = field(default=False, repr=False, metadata=UNSAID)

    slots: ClassVar[tuple[str, ...]] = ("q",)
    fixed = ("centred", "initial")

    def __new__(cls, *args: Any, **kwargs: Any) -> RMSProp:
        centred = any([*args[3:4], kwargs.get("centred"), kwargs.get("centered")])
        made = _CentredRMSProp if centred else cls
        return super().__new__(made, *args, **kwargs)

    def __init__(
        self,
        eta: float = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-8,
        centred: bool = False,
        initial: float = 0.0,
        epsilon_inside: bool = False,
        *,
        centered: bool = False,
    ) -> None:
        values = {
            "eta": eta,
            "rho": rho,
            "epsilon": epsilon,
            "centred": centred or centered,
            "initial": initial,
            "epsilon_inside": epsilon_inside,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    def start(self) -> tuple[float, ...]:
        return (self.initial,)

    def coefs(self) -> Numbers:
        if self.epsilon_inside is False:  # at each step, and not traced
            return self.rho, 1 - self.rho, self.eta, 0.0, self.epsilon
        inside = where(self.epsilon_inside, self.epsilon, 0.0)
        outside = where(self.epsilon_inside, 0.0, self.epsilon)
        return self.rho, 1 - self.rho, self.eta, inside, outside

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (q,) = state
        rho, rest, eta, inside, outside = coefs
        q = rho * q + rest * abs2(dx)
        return eta * dx / (sqrt(q + inside) + outside), (q,)


class _CentredRMSProp(RMSProp):
    """What ``RMSProp(centred=True)`` makes: it keeps one slot more."""

    slots = ("q", "l")
    _shown_as = "RMSProp"

    def start(self) -> tuple[float, ...]:
        return self.initial, 0.0

    def coefs(self) -> Numbers:
        return *super().coefs(), self.rho * (1 - self.rho)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        q, l = state  # noqa: E741 (the name in the formula)
        rho, rest, eta, inside, outside, share = coefs
        apart = dx - l
        q = rho * q + share * abs2(apart)
        l = l + rest * apart  # noqa: E741
        return eta * dx / (sqrt(q + inside) + outside), (q, l)


@dataclass(frozen=True, repr=False)
class AdaGrad(ElementwiseRule):
    """Steps scaled by the root of all squared gradients so far.

    ::

        acc = acc + |g|²
        dx  = eta g / (sqrt(acc) + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x.
    epsilon : float
        Added to what divides, in units of g.
    initial : float, optional
        Where ``acc`` starts, in units of g²; by default at epsilon. It cannot be adjusted later.

    Notes
    -----
    Keeps ``acc``. Same numbers as `torch.optim.Adagrad` with ``eps`` and
    ``initial_accumulator_value`` both epsilon; with ``initial=0.0`` as PyTorch has them unless
    told otherwise, and scikit-learn. An element whose gradient was always zero does not move, also
    where epsilon is 0.

    References
    ----------
    J. Duchi, E. Hazan, Y. Singer: Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization. JMLR 12 (2011)

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdaGrad(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.1
    epsilon: NonNegative = 1e-8
    initial: NonNegative | None = field(default=None, repr=False, metadata=UNSAID)

    slots = ("acc",)
    fixed = ("initial",)

    def start(self) -> Numbers:
        return (self.epsilon if self.initial is None else self.initial,)

    def coefs(self) -> Numbers:
        return self.eta, self.epsilon, 0.0, 1.0

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (acc,) = state
        eta, epsilon, zero, one = coefs
        acc = acc + abs2(dx)
        size = sqrt(acc) + epsilon
        return eta * dx / where(absolute(size) > zero, size, one), (acc,)


@dataclass(frozen=True)
class AdaDelta(ElementwiseRule):
    """Steps in the ratio of the root mean squares of past steps and gradients; no learning rate.

    ::

        acc   = rho acc + (1 - rho) |g|²
        dx    = g sqrt(delta + epsilon) / sqrt(acc + epsilon)
        delta = rho delta + (1 - rho) |dx|²

    Parameters
    ----------
    rho : float
        Decay rate of the averages, in [0, 1).
    epsilon : float
        Sets the size of the first steps, about its root.

    Notes
    -----
    Keeps ``acc`` and ``delta``. Same numbers as `torch.optim.Adadelta` with ``lr=1`` and ``eps``
    set to epsilon (1e-6 there, unless set).

    References
    ----------
    M. D. Zeiler: ADADELTA: An Adaptive Learning Rate Method, 2012, arXiv:1212.5701

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdaDelta(rho=0.9)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.00031623, -0.00031623])
    """

    rho: Decay = 0.9
    epsilon: NonNegative = 1e-8

    slots = ("acc", "delta")

    def coefs(self) -> Numbers:
        return self.rho, 1 - self.rho, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        acc, delta = state
        rho, rest, epsilon = coefs
        acc = rho * acc + rest * abs2(dx)
        dx = dx * sqrt(delta + epsilon) / sqrt(acc + epsilon)
        delta = rho * delta + rest * abs2(dx)
        return dx, (acc, delta)
