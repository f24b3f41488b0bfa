"""Small rules, whose generated loops stand in steps.pxi. Read by the generator, never run."""

from __future__ import annotations

from optimisers.words import abs2, absolute, largest, norm, sqrt, where


class _Scale:
    """No slots. It leads others, and reads the gradient alone."""

    _leads = True

    def coefs(self):
        return (self.eta,)

    @staticmethod
    def step(x, dx, state, coefs):
        (eta,) = coefs
        return eta * dx, ()


class WeightDecay:
    """It leads, too. No numbers, a local name that another step has, and the parameter itself."""

    _leads = True

    @staticmethod
    def step(x, dx, state, coefs):
        m = dx - x
        return m + dx, ()


class NoStep:
    """A class without a formula is passed by."""

    step = None


class Measured:
    """A sum, a largest number and a norm, of a slot that it moves on the way."""

    slots = ("m",)

    @staticmethod
    def measure(x, dx, state, coefs):
        (m,) = state
        (rho,) = coefs
        m = rho * m + dx
        return m * x, largest(absolute(dx)), norm(m)

    @staticmethod
    def step(x, dx, state, coefs):
        (m,) = state
        rho, factor = coefs
        m = rho * m + dx
        return factor * m, (m,)


class OfGradient:
    """A measure of the gradient as it is, for which there is no loop."""

    @staticmethod
    def measure(x, dx, state, coefs):
        return (norm(dx),)


class TwoSlots:
    """Slots that exchange their values, statements on the way, a comparison."""

    slots = ("m", "v")

    @staticmethod
    def step(x, dx, state, coefs):
        m, v = state
        rho, rest, zero = coefs
        grown = rho * v + rest * abs2(dx)
        dx = where(grown > zero, dx / sqrt(grown), -dx)
        return dx, (grown, m)
