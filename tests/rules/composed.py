"""Rules made of rules, for the tests: marks, and steps by one backend."""

from __future__ import annotations

import pytest
from util import step

from optimisers import OptimiserChain, Rule, setup, update_
from optimisers._engine import cpu

KERNEL_DTYPES = ["float32", "float64"]
BLOCK = cpu.kernels.settings()[1]


class Pass(Rule):
    """Hands the gradient on; the kernels do not know it, so its chain runs on arrays."""

    def apply(self, state, x, dx):
        return state, dx


def on(backend, rule):
    """Return a rule that does the same, by this backend."""
    return rule if backend == "kernels" else OptimiserChain(Pass(), rule)


BACKENDS = pytest.mark.parametrize("backend", ["kernels", "arrays"])


def stepped(rule, x, g, backend=None, call=update_):
    """Return the step that a fresh rule makes of a gradient, and check the backend."""
    before = x.copy()
    _, new, used = step(call, setup(rule, x), x, g)
    assert backend is None or set(used.values()) == {backend}
    return before - new
