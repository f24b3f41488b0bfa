"""Small rules, whose generated loops stand in steps.pxi. Read by the generator, never run."""

from __future__ import annotations

from optimisers.words import abs2, sqrt, where


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
