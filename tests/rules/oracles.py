"""The published formulas with 50 digits, written without a look at the rules.

Each takes a rule's hyperparameters `h` (exactly the doubles given), the count of steps `t`, one
parameter `x`, its gradient `g` and what is remembered in `s`, and returns the step `dx`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np

mp = mpmath.mp.clone()
mp.dps = 50

zero = mp.mpf(0)


def sqrt(x: Any) -> Any:
    return mp.sqrt(x)


def abs2(z: Any) -> Any:
    return mp.re(z) ** 2 + mp.im(z) ** 2


def sign(z: Any) -> Any:
    return z / abs(z) if z != 0 else zero


def descent(h, t, x, g, s):
    return h.eta * g


def momentum(h, t, x, g, s):
    s.v = h.rho * s.get("v") + h.eta * g
    return s.v


def nesterov(h, t, x, g, s):
    v = s.get("v")
    s.v = h.rho * v - h.eta * g
    return -(h.rho**2) * v + (1 + h.rho) * h.eta * g


def rmsprop(h, t, x, g, s):
    s.moment = h.rho * s.get("moment", h.initial) + (1 - h.rho) * abs2(g)
    s.l = h.rho * s.get("l") + (1 - h.rho) * g
    s.q = s.moment - abs2(s.l) if h.centred else s.moment
    if h.epsilon_inside:
        return h.eta * g / sqrt(s.q + h.epsilon)
    return h.eta * g / (sqrt(s.q) + h.epsilon)


def rprop(h, t, x, g, s):
    eta, trend = s.get("eta", h.eta), s.get("g") * g
    if trend > 0:
        eta = min(eta * h.ell[1], h.gamma[1])
    if trend < 0:
        eta, g = max(eta * h.ell[0], h.gamma[0]), zero
    s.eta, s.g = eta, g
    return eta * sign(g)


def averages(h, g, s):
    b1, b2 = h.beta
    s.m = b1 * s.get("m") + (1 - b1) * g
    s.v = b2 * s.get("v") + (1 - b2) * abs2(g)
    return b1, b2


def adam(h, t, x, g, s):
    b1, b2 = averages(h, g, s)
    if getattr(h, "epsilon_hat", False):
        return h.eta * sqrt(1 - b2**t) / (1 - b1**t) * s.m / (sqrt(s.v) + h.epsilon)
    return h.eta * (s.m / (1 - b1**t)) / (sqrt(s.v / (1 - b2**t)) + h.epsilon)


def adamw(h, t, x, g, s):
    rate_1 = SimpleNamespace(
        eta=1, beta=h.beta, epsilon=h.epsilon, epsilon_hat=getattr(h, "epsilon_hat", False)
    )
    d = adam(rate_1, t, x, g, s)
    return h.eta * (d + h.lambda_ * x) if h.couple else h.eta * d + h.lambda_ * x


def radam(h, t, x, g, s):
    b2 = h.beta[1]
    r_inf = 2 / (1 - b2) - 1
    r = r_inf - 2 * t * b2**t / (1 - b2**t)
    if r > 4:
        rectifier = sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        return adam(h, t, x, g, s) * rectifier
    b1, b2 = averages(h, g, s)
    return h.eta * s.m / (1 - b1**t)


def adamax(h, t, x, g, s):
    b1, b2 = h.beta
    s.m = b1 * s.get("m") + (1 - b1) * g
    s.u = max(b2 * s.get("u"), abs(g))
    return h.eta / (1 - b1**t) * s.m / (s.u + h.epsilon)


def nadam(h, t, x, g, s):
    b1, b2 = averages(h, g, s)
    ahead = b1 * s.m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return h.eta * ahead / (sqrt(b2 * s.v / (1 - b2**t)) + h.epsilon)


def oadam(h, t, x, g, s):
    term, s.term = s.get("term"), adam(h, t, x, g, s)
    return 2 * s.term - term


def amsgrad(h, t, x, g, s):
    for slot in "m", "v", "vhat":
        s.get(slot, h.epsilon)
    averages(h, g, s)
    s.vhat = max(s.vhat, s.v)
    return h.eta * s.m / (sqrt(s.vhat) + h.epsilon)


def adabelief(h, t, x, g, s):
    b1, b2 = h.beta
    s.m = b1 * s.get("m") + (1 - b1) * g
    s.s = b2 * s.get("s") + (1 - b2) * abs2(g - s.m) + h.epsilon
    return h.eta * s.m / (1 - b1**t) / (sqrt(s.s / (1 - b2**t)) + h.epsilon)


def adagrad(h, t, x, g, s):
    s.acc = s.get("acc", h.epsilon if h.initial is None else h.initial) + abs2(g)
    return h.eta * g / (sqrt(s.acc) + h.epsilon)


def adadelta(h, t, x, g, s):
    s.acc = h.rho * s.get("acc") + (1 - h.rho) * abs2(g)
    dx = g * sqrt(s.get("delta") + h.epsilon) / sqrt(s.acc + h.epsilon)
    s.delta = h.rho * s.delta + (1 - h.rho) * abs2(dx)
    return dx


def lion(h, t, x, g, s):
    b1, b2 = h.beta
    m = s.get("m")
    s.m = b2 * m + (1 - b2) * g
    return h.eta * sign(b1 * m + (1 - b1) * g)


def sign_descent(h, t, x, g, s):
    return h.eta * sign(g)


def signum(h, t, x, g, s):
    s.m = h.rho * s.get("m") + (1 - h.rho) * g
    return h.eta * sign(s.m)


def yogi(h, t, x, g, s):
    b1, b2 = h.beta
    s.m = b1 * s.get("m", h.initial) + (1 - b1) * g
    v = s.get("v", h.initial)
    s.v = v - (1 - b2) * sign(v - abs2(g)) * abs2(g)
    return h.eta * (s.m / (1 - b1**t)) / (sqrt(s.v / (1 - b2**t)) + h.epsilon)


def adopt(h, t, x, g, s):
    b1, b2 = h.beta
    if t == 1:
        s.m, s.v = zero, abs2(g)
        return zero
    u = g / max(sqrt(s.v), h.epsilon)
    if h.clip is not None:
        bound = mp.mpf(t - 1) ** h.clip
        u = min(max(u, -bound), bound)
    s.m = b1 * s.m + (1 - b1) * u
    s.v = b2 * s.v + (1 - b2) * abs2(g)
    return h.eta * s.m


def nadamw(h, t, x, g, s):
    b1, b2 = averages(h, g, s)
    ahead = b1 * s.m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return h.eta * (ahead / (sqrt(s.v / (1 - b2**t)) + h.epsilon) + h.lambda_ * x)


def ademamix(h, t, x, g, s):
    b1, b2, b3 = h.beta
    alpha = h.alpha
    if h.warmup is not None and t < h.warmup:
        done = t / h.warmup
        alpha = done * alpha

        def forgotten(b):
            return mp.log(mp.mpf("0.5")) / mp.log(b + mp.mpf(1e-8)) - 1

        b3 = mp.mpf("0.5") ** (1 / (1 + (1 - done) * forgotten(b1) + done * forgotten(b3)))
    s.m = b1 * s.get("m") + (1 - b1) * g
    s.l = b3 * s.get("l") + (1 - b3) * g
    s.v = b2 * s.get("v") + (1 - b2) * abs2(g)
    u = (s.m / (1 - b1**t) + alpha * s.l) / (sqrt(s.v / (1 - b2**t)) + h.epsilon)
    return h.eta * (u + h.lambda_ * x)


def adan(h, t, x, g, s):
    b1, b2, b3 = h.beta
    d = g - s.gold if t > 1 else zero
    s.gold = g
    s.m = b1 * s.get("m") + (1 - b1) * g
    s.v = b2 * s.get("v") + (1 - b2) * d
    s.n = b3 * s.get("n") + (1 - b3) * abs2(g + b2 * d)
    top = s.m / (1 - b1**t) + b2 * s.v / (1 - b2**t)
    u = top / (sqrt(s.n / (1 - b3**t)) + h.epsilon)
    if h.proximal:
        return x - (x - h.eta * u) / (1 + h.eta * h.lambda_)
    return h.eta * (u + h.lambda_ * x)


def zero_nan(h, t, x, g, s):
    return zero if mp.isnan(g) else g


def grokfast(h, t, x, g, s):
    s.e = g if t == 1 else h.alpha * s.e + (1 - h.alpha) * g
    return g + h.lambda_ * s.e


def schedule_free(h, t, y, d, s, b1):
    """Walk as the authors' code: the rate, the largest so far, weights and their sum are kept."""
    rate = h.eta * min(1, t / h.warmup) if h.warmup else h.eta
    s.largest = max(s.get("largest"), rate)
    weight = mp.mpf(t) ** h.r * s.largest**h.power
    s.weights = s.get("weights") + weight
    c = weight / s.weights if s.weights else zero
    z = s.z if t > 1 else y
    s.z = z - rate * d
    return -(c * (z - y) + rate * (b1 * (1 - c) - 1) * d)


def schedule_free_descent(h, t, x, g, s):
    return schedule_free(h, t, x, g + h.lambda_ * x, s, h.rho)


def schedule_free_adamw(h, t, x, g, s):
    b1, b2 = h.beta
    s.v = b2 * s.get("v") + (1 - b2) * abs2(g)
    d = g / (sqrt(s.v / (1 - b2**t)) + h.epsilon) + h.lambda_ * x
    return schedule_free(h, t, x, d, s, b1)


def cocob(h, t, x, g, s):
    s.x0 = s.get("x0", x)
    s.L = max(s.get("L", mp.mpf(1e-8)), abs(g))
    s.a = s.get("a") + abs(g)
    s.r = max(s.get("r") - g * (x - s.x0), zero)
    s.th = s.get("th") - g
    return x - s.x0 - s.th * (s.L + s.r) / (s.L * max(s.a + s.L, h.alpha * s.L))


def weight_decay(h, t, x, g, s):
    return g + h.lambda_ * x


def sign_decay(h, t, x, g, s):
    return g + h.lambda_ * sign(x)


def clip_grad(h, t, x, g, s):
    return max(min(g, h.delta), -h.delta)


FORMULAS = {
    "Descent": descent,
    "Momentum": momentum,
    "Nesterov": nesterov,
    "RMSProp": rmsprop,
    "Rprop": rprop,
    "Adam": adam,
    "AdamW": adamw,
    "RAdam": radam,
    "AdaMax": adamax,
    "NAdam": nadam,
    "OAdam": oadam,
    "AMSGrad": amsgrad,
    "AdaBelief": adabelief,
    "AdaGrad": adagrad,
    "AdaDelta": adadelta,
    "Lion": lion,
    "SignDescent": sign_descent,
    "Signum": signum,
    "Yogi": yogi,
    "ADOPT": adopt,
    "NAdamW": nadamw,
    "AdEMAMix": ademamix,
    "Adan": adan,
    "ScheduleFreeDescent": schedule_free_descent,
    "ScheduleFreeAdamW": schedule_free_adamw,
    "COCOB": cocob,
    "ZeroNaN": zero_nan,
    "Grokfast": grokfast,
    "WeightDecay": weight_decay,
    "SignDecay": sign_decay,
    "ClipGrad": clip_grad,
}


class Memory(SimpleNamespace):
    """What a formula remembers of one element."""

    def get(self, name: str, start: Any = zero) -> Any:
        return self.__dict__.setdefault(name, start)


def exact(value: Any) -> Any:
    """Return a number, or a tuple of them, with all digits of what it is in double."""
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    if isinstance(value, complex):
        return mp.mpc(value.real, value.imag)
    return value if value is None or isinstance(value, bool) else mp.mpf(value)


def trajectory(
    name: str, rule: Any, x: np.ndarray, gs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the steps, the parameter after each, and what is remembered at the end.

    As the formula `name` has them: arrays of objects with 50 digits, a row for each step.
    """
    h = SimpleNamespace(**{f.name: exact(getattr(rule, f.name)) for f in dataclasses.fields(rule)})
    xs = [exact(v) for v in x.tolist()]
    memories = [Memory() for _ in xs]
    steps, path = [], []
    for t, g in enumerate(gs, start=1):
        elements = zip(xs, g.tolist(), memories, strict=True)
        dx = [FORMULAS[name](h, t, v, exact(d), s) for v, d, s in elements]
        xs = [v - d for v, d in zip(xs, dx, strict=True)]
        steps.append(dx)
        path.append(xs)
    slots = {k: np.array([vars(s)[k] for s in memories], object) for k in vars(memories[0])}
    return np.array(steps, object), np.array(path, object), slots
