"""Every elementwise rule: fields, slots, coefs, step and docstring, side by side.

To add a rule, write one class here. Exports, kernels, tests and benchmarks find it by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._rule import Count, Decay, Decays, ElementwiseRule, Finite, NonNegative, registry
from .words import abs2, absolute, clip, ema_weight, maximum, minimum, sign, sqrt, where, zeros_like

Array = Any
Numbers = tuple[Any, ...]
Arrays = tuple[Array, ...]
Stepped = tuple[Array, Arrays]

# --- descent with and without momentum -------------------------------------------------------


@dataclass(frozen=True)
class Descent(ElementwiseRule):
    eta: NonNegative = 0.1

    def coefs(self) -> Numbers:
        return (self.eta,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (eta,) = coefs
        return eta * dx, ()


@dataclass(frozen=True)
class Momentum(ElementwiseRule):
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
    eta: NonNegative = 0.001
    rho: Decay = 0.9
    epsilon: NonNegative = 1e-8
    centred: bool = False

    slots = ("q",)
    fixed = ("centred",)

    def __new__(
        cls,
        eta: float = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-8,
        centred: bool = False,
        *,
        centered: bool = False,
    ) -> RMSProp:
        return super().__new__(_CentredRMSProp if centred or centered else cls)

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

    def __repr__(self) -> str:
        return super().__repr__().removeprefix("_Centred")

    def coefs(self) -> Numbers:
        return *super().coefs(), 0.0

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        q, l = state  # noqa: E741 (the name in the formula)
        rho, rest, eta, epsilon, zero = coefs
        q = rho * q + rest * abs2(dx)
        l = rho * l + rest * dx  # noqa: E741
        return eta * dx / (sqrt(maximum(q - abs2(l), zero)) + epsilon), (q, l)


@dataclass(frozen=True)
class Rprop(ElementwiseRule):
    eta: NonNegative = 1e-3
    ell: tuple[NonNegative, NonNegative] = (0.5, 1.2)
    gamma: tuple[NonNegative, NonNegative] = (1e-6, 50.0)

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
    lambda_: Finite = 5e-4

    def coefs(self) -> Numbers:
        return (self.lambda_,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (lambda_,) = coefs
        return dx + lambda_ * x, ()


@dataclass(frozen=True)
class SignDecay(ElementwiseRule):
    lambda_: Finite = 1e-3

    def coefs(self) -> Numbers:
        return (self.lambda_,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (lambda_,) = coefs
        return dx + lambda_ * sign(x), ()


@dataclass(frozen=True)
class ClipGrad(ElementwiseRule):
    delta: NonNegative = 10.0

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
    """A gradient times a number: what ClipNorm does once it knows the norm."""

    factor: float

    def coefs(self) -> Numbers:
        return (self.factor,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (factor,) = coefs
        return factor * dx, ()


@dataclass(frozen=True)
class _Hold(ElementwiseRule):
    """A gradient added to a sum: what AccumGrad does on the steps that it swallows."""

    slots = ("sum",)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (sum,) = state
        sum = sum + dx
        return sum, (sum,)


@dataclass(frozen=True)
class _Release(ElementwiseRule):
    """The mean of a sum and a last gradient: what AccumGrad does on its n-th step."""

    n: Count

    slots = ("sum",)

    def coefs(self) -> Numbers:
        return (self.n,)

    @staticmethod
    def step(x: Array, dx: Array, state: Arrays, coefs: Numbers) -> Stepped:
        (sum,) = state
        (n,) = coefs
        return (sum + dx) / n, (zeros_like(sum),)


__all__ = [c.__name__ for c in registry() if c.__module__ == __name__]
