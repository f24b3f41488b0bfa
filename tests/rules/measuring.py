"""Rules of users that measure."""

from dataclasses import dataclass

from optimisers import ElementwiseRule
from optimisers.words import abs2, absolute, largest, norm


@dataclass(frozen=True)
class Trusted(ElementwiseRule):
    """What `TrustRatio` does, by a user."""

    coefficient: float = 1.0

    @staticmethod
    def measure(x, dx, state, coefs):
        return norm(x), norm(dx)

    def coefs(self, sums):
        of_x, of_dx = sums
        return (self.coefficient * of_x / of_dx if of_x > 0 and of_dx > 0 else 1.0,)

    @staticmethod
    def step(x, dx, state, coefs):
        (factor,) = coefs
        return factor * dx, ()


@dataclass(frozen=True)
class Together(ElementwiseRule):
    """Three numbers of the whole tree, and a slot."""

    omega: float = 1.0
    over = "tree"
    slots = ("v",)

    def measure_coefs(self):
        return (0.5,)

    @staticmethod
    def measure(x, dx, state, coefs):
        (v,) = state
        (half,) = coefs
        v = half * v + dx
        return abs2(v), largest(absolute(dx)), dx

    def coefs(self, before, sums, t):
        squares, most, total = sums
        return *before, self.omega / (1.0 + squares + most + total * total + t)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        half, factor = coefs
        v = half * v + dx
        return factor * v, (v,)
