"""Rules that change the gradient for those after them in a chain: decays, clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..words import absolute, clip, sign, where, zeros_like
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import Decay, Finite, NonNegative, Upper
from ._numbers import is_traced


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

    _leads = True

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
    _leads = True

    @property
    def _is_idle(self) -> bool:  # type: ignore[override]
        return not is_traced(self.delta) and self.delta == math.inf

    def coefs(self) -> Numbers:
        return -self.delta, self.delta

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        low, high = coefs
        return clip(dx, low, high), ()


@dataclass(frozen=True)
class ZeroNaN(ElementwiseRule):
    """The gradient with zeros where it is NaN: put it ahead of another rule.

    ::

        dx = 0 where g is NaN, else g

    Notes
    -----
    Keeps nothing. Same numbers as `optax.zero_nans`, which counts them beside. Infinity passes.

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> rule = optimisers.ZeroNaN()
    >>> rule.apply((), np.zeros(3), np.array([0.5, np.nan, -np.inf]))
    ((), array([ 0.5,  0. , -inf]))
    """

    _follows = False

    def coefs(self) -> Numbers:
        return (0.0,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (zero,) = coefs
        return where(absolute(dx) >= zero, dx, zeros_like(dx)), ()


@dataclass(frozen=True)
class Grokfast(ElementwiseRule):
    """The gradient and a multiple of its slow mean: put it ahead of another rule.

    ::

        e  = alpha e + (1 - alpha) g, and g at first
        dx = g + lambda_ e

    Parameters
    ----------
    alpha : float
        Decay rate of the mean, in [0, 1).
    lambda_ : float
        Weight of the mean.

    Notes
    -----
    Keeps ``e`` and the count ``t``. Same numbers as the authors' ``gradfilter_ema``.

    References
    ----------
    J. Lee et al.: Grokfast: Accelerated Grokking by Amplifying Slow Gradients, 2024,
    arXiv:2405.20233

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Grokfast()
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([  9., -12.])
    """

    alpha: Decay = 0.98
    lambda_: NonNegative = 2.0

    slots = ("e",)
    _follows = False

    def coefs(self, t: Any) -> Numbers:
        alpha = where(t > 1, self.alpha, 0.0)
        return alpha, 1 - alpha, self.lambda_

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (e,) = state
        alpha, rest, lambda_ = coefs
        e = alpha * e + rest * dx
        return dx + lambda_ * e, (e,)
