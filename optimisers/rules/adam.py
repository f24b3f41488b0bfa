"""Adam, and rules that differ from it in how they measure the size of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .._arrays.traced import inverse_root, root
from ..words import abs2, absolute, clip, ema_weight, maximum, sign, sqrt, where
from ._base import Array, Arrays, ElementwiseRule, Numbers, Stepped
from ._fields import UNSAID, Decays, Finite, NonNegative
from ._numbers import ema_scale


@dataclass(frozen=True, repr=False)
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
    epsilon_hat : bool
        Whether epsilon is added before the bias is corrected, the second form in the paper: the
        step is ``eta sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)``.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `torch.optim.Adam` and `optax.adam`;
    with `epsilon_hat` as scikit-learn, Keras, TensorFlow, PennyLane and `torch.optim.SparseAdam`.
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
    epsilon_hat: bool = field(default=False, repr=False, metadata=UNSAID)

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_scale(b2, t)
        epsilon = self.epsilon
        if self.epsilon_hat is not False:  # True, or traced
            epsilon = epsilon * where(self.epsilon_hat, scale, 1.0)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        v = b2 * v + rest2 * abs2(dx)
        return rate * m / (scale * sqrt(v) + epsilon), (m, v)


@dataclass(frozen=True, repr=False)
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
    epsilon_hat : bool
        Whether epsilon is added before the bias is corrected, as in `Adam`.

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
    epsilon_hat: bool = field(default=False, repr=False, metadata=UNSAID)

    slots = ("m", "v")

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_scale(b2, t)
        decay = where(self.couple, self.eta * self.lambda_, self.lambda_)
        epsilon = self.epsilon
        if self.epsilon_hat is not False:  # True, or traced
            epsilon = epsilon * where(self.epsilon_hat, scale, 1.0)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, epsilon, decay

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
        rectifier = root((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        rate, scale = self.eta * rectifier / ema_weight(b1, t), inverse_root(seen)
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
        rate, scale = self.eta / ema_weight(b1, t), ema_scale(b2, t)
        return b1, 1 - b1, b2, 1 - b2, rate, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, s = state
        b1, rest1, b2, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        s = b2 * s + rest2 * abs2(dx - m) + epsilon
        return rate * m / (scale * sqrt(s) + epsilon), (m, s)


@dataclass(frozen=True)
class Yogi(ElementwiseRule):
    """Adam whose mean of squares changes by the size of the gradient, and not of what it lacks.

    ::

        m  = b1 m + (1 - b1) g
        v  = v - (1 - b2) sign(v - |g|²) |g|²
        dx = eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    So a gradient that becomes small lets ``v`` fall slowly, where Adam forgets it.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x.
    beta : tuple of two floats
        Decay rate ``b1`` of the mean of g; ``1 - b2`` is the share of ``|g|²`` by which v changes.
    epsilon : float
        Added to what divides, in units of g.
    initial : float
        Where ``m`` and ``v`` start. It cannot be adjusted later.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `optax.yogi`. TensorFlow Addons starts
    ``m`` at 0. Where all gradients are zero the parameter still moves a little, since ``m`` does
    not start there.

    References
    ----------
    M. Zaheer et al.: Adaptive Methods for Nonconvex Optimization. NeurIPS 2018

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.Yogi(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([ 0.09996143, -0.09997166])
    """

    eta: NonNegative = 0.01
    beta: Decays = (0.9, 0.999)
    epsilon: NonNegative = 1e-3
    initial: NonNegative = 1e-6

    slots = ("m", "v")
    fixed = ("initial",)

    def start(self) -> Numbers:
        return self.initial, self.initial

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        rate, scale = self.eta / ema_weight(b1, t), ema_scale(b2, t)
        return b1, 1 - b1, 1 - b2, rate, scale, self.epsilon

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, rest2, rate, scale, epsilon = coefs
        m = b1 * m + rest1 * dx
        square = abs2(dx)
        v = v - rest2 * sign(v - square) * square
        return rate * m / (scale * sqrt(v) + epsilon), (m, v)


@dataclass(frozen=True)
class ADOPT(ElementwiseRule):
    """Adam that divides each gradient by the mean of squares before it, then takes the mean.

    ::

        u  = clip(g / max(sqrt(v), epsilon), -(t-1)^clip, (t-1)^clip)      with the old v
        m  = b1 m + (1 - b1) u
        v  = b2 v + (1 - b2) |g|²
        dx = eta m

    The first gradient makes no step: it becomes ``v = |g|²``. So it converges for any b2.

    Parameters
    ----------
    eta : float
        Learning rate, in units of x: about the length of a step.
    beta : tuple of two floats
        Decay rates ``b1`` and ``b2`` of the averages of u and ``|g|²``, in [0, 1).
    epsilon : float
        The least that divides, in units of g.
    clip : float, optional
        The power of ``t - 1`` that bounds u; None for no bound. With one, parameters are real.

    Notes
    -----
    Keeps ``m``, ``v`` and the count ``t``. Same numbers as `optax.contrib.adopt`.

    References
    ----------
    S. Taniguchi et al.: ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate, 2024,
    arXiv:2411.02853

    Examples
    --------
    >>> import numpy as np, optimisers
    >>> x, g = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    >>> rule = optimisers.ADOPT(eta=0.1)
    >>> state, dx = rule.apply(rule.init(x), x, g)
    >>> dx
    array([0., 0.])
    >>> state, dx = rule.apply(state, x, g)
    >>> dx
    array([ 0.01, -0.01])
    """

    eta: NonNegative = 0.001
    beta: Decays = (0.9, 0.9999)
    epsilon: NonNegative = 1e-6
    clip: NonNegative | None = 0.25

    slots = ("m", "v")
    fixed = ("clip",)
    _follows = False

    @property
    def real_only(self) -> bool:  # type: ignore[override]
        """Whether parameters are real: numbers are compared with a bound."""
        return self.clip is not None

    def coefs(self, t: Any) -> Numbers:
        b1, b2 = self.beta
        is_first = t <= 1
        limit = -1.0 if self.clip is None else where(is_first, 1, t - 1) ** self.clip
        return (
            *(where(is_first, 1.0, b1), where(is_first, 0.0, 1 - b1)),
            *(where(is_first, 0.0, b2), where(is_first, 1.0, 1 - b2)),
            *(self.eta, self.epsilon, where(is_first, 0.0, limit), 0.0),
        )

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        m, v = state
        b1, rest1, b2, rest2, eta, epsilon, limit, zero = coefs
        u = dx / maximum(sqrt(v), epsilon)
        u = where(limit >= zero, clip(u, -limit, limit), u)
        m = b1 * m + rest1 * u
        v = b2 * v + rest2 * abs2(dx)
        return eta * m, (m, v)
