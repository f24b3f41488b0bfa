"""Rules that look at the norms of an array, or of the units in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..words import abs2, ema_weight, maximum, norm, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Axis, Decays, Finite, NonNegative, Upper
from ._measure import ratio
from ._numbers import ema_scale
from .norms import Scaling


@dataclass(frozen=True)
class TrustRatio(Scaling):
    """The step of each array as long as the array: put it behind another rule.

    ::

        dx = coefficient ‖x‖ / (‖g‖ + epsilon) g      (dx = g where a norm is 0)

    Parameters
    ----------
    coefficient : float
        How long the step is, as a share of the array.
    epsilon : float
        Added to the norm of g, in units of g.

    Notes
    -----
    Keeps no state. Same numbers as `optax.scale_by_trust_ratio(trust_coefficient=coefficient,
    eps=epsilon)`. ``OptimiserChain(Adam(1.0, epsilon=1e-6), WeightDecay(l), TrustRatio(),
    Descent(eta))`` is `LAMB`.

    References
    ----------
    Y. You, I. Gitman, B. Ginsburg: Large Batch Training of Convolutional Networks, 2017,
    arXiv:1708.03888

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.TrustRatio(coefficient=0.1)
    >>> rule.apply((), np.array([6.0, 8.0]), np.array([3.0, -4.0]))
    ((), array([ 0.6, -0.8]))
    """

    coefficient: NonNegative = 1.0
    epsilon: NonNegative = 0.0

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        return norm(x), norm(dx)

    def coefs(self, sums: Numbers) -> Numbers:
        of_x, of_dx = sums
        has_both = (of_x > 0) & (of_dx > 0)
        divisor = where(has_both, of_dx + self.epsilon, 1.0)
        return (where(has_both, self.coefficient * of_x / divisor, 1.0),)


@dataclass(frozen=True)
class LAMB(ElementwiseRule):
    """Adam whose step for each array is as long as the array.

    ::

        m  = b1 m + (1 - b1) g
        v  = b2 v + (1 - b2) |g|²
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon) + lambda_ x
        dx = eta ‖x‖ / ‖u‖ u                          (dx = eta u where a norm is 0)

    Parameters
    ----------
    eta : float
        Learning rate: how long the step is, as a share of the array.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of g and ``|g|²``, in [0, 1).
    lambda_ : float
        Weight decay, inside of the norm of u.
    epsilon : float
        Added to what divides, in units of g.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `optax.lamb(eta, weight_decay=lambda_)`
    and as timm's `Lamb(max_grad_norm=None, always_adapt=True)`.

    References
    ----------
    Y. You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes, 2019,
    arXiv:1904.00962

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([3.0, 4.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.LAMB(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx.round(4)
    array([ 0.3536, -0.3536])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.999)
    lambda_: Finite = 0.0
    epsilon: NonNegative = 1e-6

    slots = ("m", "v")
    _follows = False  # it is measured after all that stands ahead of it

    def measure_coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = 1.0 / ema_weight(b1, t), ema_scale(b2, t)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon, self.lambda_

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon, decay = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        u = rate * m / (scale * sqrt(v) + epsilon) + decay * x
        return norm(x), norm(u)

    def coefs(self, before: Numbers, sums: Numbers) -> Numbers:
        return *before, self.eta * ratio(*sums)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon, decay, share = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        u = rate * m / (scale * sqrt(v) + epsilon) + decay * x
        return share * u, (m, v)


@dataclass(frozen=True)
class Centralise(ElementwiseRule):
    """The gradient of each unit without its mean: put it ahead of another rule.

    ::

        dx = g - mean(g)      the mean over all axes but one; g where there is only one axis

    Parameters
    ----------
    outputs : int
        The axis that counts outputs, which is kept: 0 in the layout of PyTorch, -1 in that of Flax
        and Keras.

    Notes
    -----
    Keeps no state. With ``outputs=0`` it has the same numbers as `optax.centralize()`.

    References
    ----------
    H. Yong, J. Huang, X. Hua, L. Zhang: Gradient Centralization, 2020, arXiv:2004.01461

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.Centralise()
    >>> rule.apply((), np.zeros((2, 2)), np.array([[1.0, 3.0], [2.0, 2.0]]))
    ((), array([[-1.,  1.],
           [ 0.,  0.]]))
    """

    outputs: Axis = 0

    fixed = static = ("outputs",)
    over = "axes"
    _follows = False

    def axes(self, ndim: int) -> tuple[int, ...] | None:
        return None if ndim < 2 else all_but(self.outputs, ndim)

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        return (dx,)

    def coefs(self, sums: Numbers, size: int) -> Numbers:
        return (sums[0] / max(size, 1),)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (mean,) = coefs
        return dx - mean, ()


@dataclass(frozen=True)
class ClipAdaptive(Scaling):
    """The gradient of each unit scaled down to a share of the unit: put it ahead of another rule.

    ::

        most = limit max(‖x‖, epsilon)
        dx   = g if ‖g‖ < most, else g most / max(‖g‖, 1e-6)

    The norms are those of a unit: of all that has one index along the axis that counts outputs; of
    the whole array where it has only one axis, or none.

    Parameters
    ----------
    limit : float
        Largest norm that passes, as a share of that of the unit; inf is no limit.
    outputs : int
        The axis that counts outputs: 0 in the layout of PyTorch, -1 in that of Flax and Keras.
    epsilon : float
        Smallest norm of a unit that counts, in units of x, so that one of zeros can grow.

    Notes
    -----
    Keeps no state. With ``outputs=-1`` it has the same numbers as `optax.adaptive_grad_clip(limit)`
    for matrices and vectors. The paper leaves the last layer out.

    References
    ----------
    A. Brock, S. De, S. L. Smith, K. Simonyan: High-Performance Large-Scale Image Recognition
    Without Normalization, 2021, arXiv:2102.06171

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.ClipAdaptive(limit=0.1)
    >>> rule.apply((), np.array([[3.0, 4.0], [3.0, 4.0]]), np.array([[6.0, 8.0], [0.1, 0.1]]))
    ((), array([[0.3, 0.4],
           [0.1, 0.1]]))
    """

    limit: Upper = 0.01
    outputs: Axis = 0
    epsilon: NonNegative = 1e-3

    fixed = static = ("outputs",)
    over = "axes"

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim)) if ndim < 2 else all_but(self.outputs, ndim)

    @staticmethod
    def measure(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Numbers:
        return norm(x), norm(dx)

    def coefs(self, sums: Numbers) -> Numbers:
        of_x, of_dx = sums
        most = self.limit * maximum(of_x, self.epsilon)
        return (where(of_dx < most, 1.0, most / maximum(of_dx, _LEAST)),)


_LEAST = 1e-6
"""The least norm by which a gradient is divided, of the authors."""


def all_but(axis: int, ndim: int) -> tuple[int, ...]:
    """Return all axes but one.

    Raises
    ------
    ValueError
        If there is no such axis.
    """
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"outputs={axis} is no axis of an array with {ndim} axes; 0 is the first, -1 the last"
        )
    return tuple(k for k in range(ndim) if k != axis % ndim)
