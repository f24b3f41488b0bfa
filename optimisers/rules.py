"""Every elementwise rule: fields, slots, coefs, step and docstring, side by side.

To add a rule, write one class here. Exports, kernels, tests and benchmarks find it by themselves.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ._construct import no_name
from ._rule import (
    Count,
    Decay,
    Decays,
    ElementwiseRule,
    Finite,
    Grow,
    NonNegative,
    Range,
    Shrink,
    Upper,
)
from .words import abs2, absolute, clip, ema_weight, maximum, minimum, sign, sqrt, where, zeros_like

Array = Any
Numbers = tuple[Any, ...]
Arrays = tuple[Array, ...]
Stepped = tuple[Array, Arrays]

# --- descent with and without momentum -------------------------------------------------------


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


# --- a step size for each element ------------------------------------------------------------


@dataclass(frozen=True)
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

    Notes
    -----
    Keeps ``q``, the mean of ``|g|²``; if centred, ``l``, the mean of g, and as ``q`` the variance
    around it. Same numbers as `torch.optim.RMSprop`, and `optax.rmsprop` with
    ``eps_in_sqrt=False``. Centred, these keep the mean of ``|g|²`` too and subtract ``|l|²`` from
    it at each step: the same number, but for rounding, which there leaves no digit of a variance
    that is small beside ``|l|²``, or makes it negative and the step NaN. To go on from a state of
    theirs, subtract once: ``q = square_avg - abs(grad_avg)**2``.

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

    slots: ClassVar[tuple[str, ...]] = ("q",)
    fixed = ("centred",)

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
        *,
        centered: bool = False,
    ) -> None:
        values = {"eta": eta, "rho": rho, "epsilon": epsilon, "centred": centred or centered}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    __new__.__signature__ = inspect.signature(__init__)  # type: ignore[attr-defined]

    def coefs(self) -> Numbers:
        return self.rho, 1 - self.rho, self.eta, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (q,) = state
        rho, rest, eta, epsilon = coefs
        q = rho * q + rest * abs2(dx)
        return eta * dx / (sqrt(q) + epsilon), (q,)


class _CentredRMSProp(RMSProp):
    """What ``RMSProp(centred=True)`` makes: it keeps one slot more."""

    slots = ("q", "l")
    _shown_as = "RMSProp"

    def __repr__(self) -> str:
        return super().__repr__().removeprefix("_Centred")

    def coefs(self) -> Numbers:
        return *super().coefs(), self.rho * (1 - self.rho)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        q, l = state  # noqa: E741 (the name in the formula)
        rho, rest, eta, epsilon, share = coefs
        apart = dx - l
        q = rho * q + share * abs2(apart)
        l = l + rest * apart  # noqa: E741
        return eta * dx / (sqrt(q) + epsilon), (q, l)


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
        Where ``acc`` starts, and added to what divides.

    Notes
    -----
    Keeps ``acc``. Same numbers as `torch.optim.Adagrad` with ``eps`` and
    ``initial_accumulator_value`` both epsilon.

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

    slots = ("acc",)

    def start(self) -> Numbers:
        return (self.epsilon,)

    def coefs(self) -> Numbers:
        return self.eta, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (acc,) = state
        eta, epsilon = coefs
        acc = acc + abs2(dx)
        return eta * dx / (sqrt(acc) + epsilon), (acc,)


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


# --- the family of Adam ----------------------------------------------------------------------


@dataclass(frozen=True)
class Adam(ElementwiseRule):
    """Steps along a mean of the gradient, scaled by its root mean square.

    ::

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) |g|²
        dx = eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

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
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `torch.optim.Adam` and `optax.adam`.
    ``OptimiserChain(WeightDecay(l), Adam())`` is torch's ``Adam(weight_decay=l)``.

    References
    ----------
    D. P. Kingma, J. Ba: Adam: A Method for Stochastic Optimization, 2014, arXiv:1412.6980

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Adam(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-8

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_weight(b2, t) ** -0.5
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return rate * m / (scale * sqrt(v) + epsilon), (m, v)


@dataclass(frozen=True)
class AdamW(ElementwiseRule):
    """Adam with weight decay that does not pass through its averages.

    ::

        dx = eta (d + lambda_ x)      if coupled, with the dx of Adam(eta=1) as d
        dx = eta d + lambda_ x        if not

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    lambda_ : float
        Weight decay: per step, x shrinks by the share ``eta lambda_`` if coupled, else `lambda_`.
    epsilon : float
        Added to what divides, in units of g.
    couple : bool
        Whether a change of eta changes the decay with it.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Coupled, it has the same numbers as `torch.optim.AdamW`
    and `optax.adamw`, whose decay is 0.01 and 1e-4 unless set, here 0. Uncoupled is the paper's.

    References
    ----------
    I. Loshchilov, F. Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdamW(eta=0.1, lambda_=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.11, -0.08])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-8
    couple: bool = True

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_weight(b2, t) ** -0.5
        decay = where(self.couple, self.eta * self.lambda_, self.lambda_)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon, decay

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon, decay = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return rate * m / (scale * sqrt(v) + epsilon) + decay * x, (m, v)


@dataclass(frozen=True)
class RAdam(ElementwiseRule):
    """Rectified Adam: plain momentum until the variance of the step size is finite.

    ::

        r_inf = 2 / (1 - b2) - 1
        r     = r_inf - 2 t b2^t / (1 - b2^t)
        dx    = Adam's times sqrt((r-4) (r-2) r_inf / ((r_inf-4) (r_inf-2) r))    if r > 4
        dx    = eta m / (1 - b1^t)                                                otherwise

    Parameters
    ----------
    eta : float
        Learning rate, in units of x once ``r > 4``, before that of x per unit of g.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. `torch.optim.RAdam` asks for ``r > 5``, so it differs at
    step 5 with the default beta; from then on it agrees to about 1e-9, since it adds epsilon
    before the bias correction. The condition is the paper's.

    References
    ----------
    L. Liu, H. Jiang, P. He, W. Chen, X. Liu, J. Gao, J. Han: On the Variance of the Adaptive
    Learning Rate and Beyond, 2019, arXiv:1908.03265

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.RAdam(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.3, -0.4])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-8

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        seen = ema_weight(b2, t)
        r_inf = 2 / (1 - b2) - 1
        r = r_inf - 2 * t * (1 - seen) / seen
        adaptive = r > 4
        r, r_inf = where(adaptive, r, 5.0), where(adaptive, r_inf, 5.0)
        rectifier = ((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)) ** 0.5
        rate, scale = self.eta * rectifier / ema_weight(b1, t), seen**-0.5
        adapt = where(adaptive, 1.0, 0.0)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon, adapt, 0.0, 1.0

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon, adapt, zero, one = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return rate * m / where(adapt > zero, scale * sqrt(v) + epsilon, one), (m, v)


@dataclass(frozen=True)
class AdaMax(ElementwiseRule):
    """Adam with the largest gradient, slowly forgotten, in place of the root mean square.

    ::

        m  = b1 m + (1 - b1) g
        u  = max(b2 u, |g|)
        dx = eta / (1 - b1^t) m / (u + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` of the mean and ``b2`` of the largest, in [0, 1).
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``u`` and the count ``t``. The paper has no epsilon; `torch.optim.Adamax` adds it
    to ``|g|`` inside the maximum, so the numbers differ by about epsilon.

    References
    ----------
    D. P. Kingma, J. Ba: Adam: A Method for Stochastic Optimization, 2014, arXiv:1412.6980

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdaMax(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.1, -0.1])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-8

    slots = ("m", "u")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        return b1, 1 - b1, b2, self.eta / ema_weight(b1, t), self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, u = state
        b1, rest1, b2, rate, epsilon = coefs
        m = b1 * m + rest1 * dx
        u = maximum(b2 * u, absolute(dx))
        return rate * m / (u + epsilon), (m, u)


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
        scale = (b2 / ema_weight(b2, t)) ** 0.5
        return b1, 1 - b1, b2, 1 - b2, rate_m, rate_g, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate_m, rate_g, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return (rate_m * m + rate_g * dx) / (scale * sqrt(v) + epsilon), (m, v)


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
        rate, scale = self.eta / ema_weight(b1, t), ema_weight(b2, t) ** -0.5
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
class AMSGrad(ElementwiseRule):
    """Adam with a scale that never falls.

    ::

        m    = b1 m + (1 - b1) g
        v    = b2 v + (1 - b2) |g|²
        vhat = max(vhat, v)
        dx   = eta m / (sqrt(vhat) + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    epsilon : float
        Where all state starts, and added to what divides.

    Notes
    -----
    Keeps ``m``, ``v`` and ``vhat``. As in the paper nothing is corrected for the start, unlike in
    `torch.optim.Adam` with ``amsgrad=True`` and `optax.amsgrad`. Same formula as Optimisers.jl.

    References
    ----------
    S. J. Reddi, S. Kale, S. Kumar: On the Convergence of Adam and Beyond. ICLR 2018,
    arXiv:1904.09237

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AMSGrad(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.31622757, -0.31622764])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-8

    slots = ("m", "v", "vhat")

    def start(self) -> Numbers:
        return (self.epsilon,) * 3

    def coefs(self) -> Numbers:
        b1, b2 = self.beta
        return b1, 1 - b1, b2, 1 - b2, self.eta, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v, vhat = state
        b1, rest1, b2, rest2, eta, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        vhat = maximum(vhat, v)
        return eta * m / (sqrt(vhat) + epsilon), (m, v, vhat)


@dataclass(frozen=True)
class AdaBelief(ElementwiseRule):
    """Adam scaled by how far the gradient strays from its mean.

    ::

        m  = b1 m + (1 - b1) g
        s  = b2 s + (1 - b2) |g - m|² + epsilon       with the new m
        dx = eta (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + epsilon)

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g - m|²``, in [0, 1).
    epsilon : float
        Added to ``s`` and to what divides.

    Notes
    -----
    Keeps ``m``, ``s`` and the count ``t``. Same numbers as `optax.adabelief`.

    References
    ----------
    J. Zhuang, T. Tang, Y. Ding, S. Tatikonda, N. Dvornek, X. Papademetris, J. S. Duncan:
    AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients, 2020,
    arXiv:2010.07468

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.AdaBelief(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.11111111, -0.11111111])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-16

    slots = ("m", "s")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_weight(b2, t) ** -0.5
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, s = state
        b1, rest1, b2, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        s = b2 * s + rest2 * abs2(dx - m) + epsilon
        return rate * m / (scale * sqrt(s) + epsilon), (m, s)


# --- signs -----------------------------------------------------------------------------------


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


# --- rules that change the gradient on its way to another rule -------------------------------


@dataclass(frozen=True)
class WeightDecay(ElementwiseRule):
    """Decay of the parameters, an L2 penalty: put it ahead of another rule.

    ::

        dx = g + lambda_ x

    Parameters
    ----------
    lambda_ : float
        Gradient per unit of x. The penalty is ``lambda_ / 2 sum(|x|²)``.

    Notes
    -----
    Keeps no state. ``OptimiserChain(WeightDecay(l), rule)`` is what PyTorch's ``weight_decay=l``
    does, but in `torch.optim.AdamW`: see `AdamW`.

    References
    ----------
    A. Krogh, J. A. Hertz: A Simple Weight Decay Can Improve Generalization. NIPS 1991

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.WeightDecay(lambda_=0.5)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 3.5, -3. ])
    """

    lambda_: Finite = 5e-4

    def coefs(self) -> Numbers:
        return (self.lambda_,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (lambda_,) = coefs
        return dx + lambda_ * x, ()


@dataclass(frozen=True)
class SignDecay(ElementwiseRule):
    """Decay of the parameters at a constant pace, an L1 penalty: put it ahead of another rule.

    ::

        dx = g + lambda_ sign(x)

    Parameters
    ----------
    lambda_ : float
        Units of g. The penalty is ``lambda_ sum(|x|)``.

    Notes
    -----
    Keeps no state. ``sign(0)`` is 0; a complex x decays towards 0 in a straight line.

    References
    ----------
    R. Tibshirani: Regression Shrinkage and Selection via the Lasso. Journal of the Royal
    Statistical Society B 58 (1996), doi:10.1111/j.2517-6161.1996.tb02080.x

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.SignDecay(lambda_=0.5)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 3.5, -3.5])
    """

    lambda_: Finite = 1e-3

    def coefs(self) -> Numbers:
        return (self.lambda_,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (lambda_,) = coefs
        return dx + lambda_ * sign(x), ()


@dataclass(frozen=True)
class ClipGrad(ElementwiseRule):
    """Every element of the gradient held within limits: put it ahead of another rule.

    ::

        dx = clamp(g, -delta, delta)

    Parameters
    ----------
    delta : float
        The limit, in units of g; inf is none.

    Notes
    -----
    Keeps no state. NaN stays NaN. Real parameters only. Same numbers as
    `torch.nn.utils.clip_grad_value_` and `optax.clip`.

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.ClipGrad(delta=3.5)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 3. , -3.5])
    """

    delta: Upper = 10.0

    real_only = True

    def coefs(self) -> Numbers:
        return -self.delta, self.delta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        low, high = coefs
        return clip(dx, low, high), ()


# --- the elementwise parts of the rules in compose.py ----------------------------------------


@dataclass(frozen=True)
class _Scale(ElementwiseRule):
    """A gradient times a number: what `ClipNorm` does once it knows the norm."""

    factor: float

    def coefs(self) -> Numbers:
        return (self.factor,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (factor,) = coefs
        return factor * dx, ()


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


if not TYPE_CHECKING:  # type checkers know what there is

    def __getattr__(name):
        raise no_name(__name__, name)
