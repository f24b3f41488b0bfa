"""Models of JAX arrays for the tests, rules by name, and how often a function is traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from util import ALONE, EVERY_ELEMENTWISE, normal, variants

from optimisers import Adam, ClipNorm, OptimiserChain, update

jax = pytest.importorskip("jax")
jnp = jax.numpy
tree_map = jax.tree_util.tree_map
leaves_of, structure_of = jax.tree_util.tree_leaves, jax.tree_util.tree_structure

RULES: list[Any] = [*EVERY_ELEMENTWISE, *(r for c in ALONE for r in variants(c))]
RULES += [
    OptimiserChain(ClipNorm(1.0, p), Adam()) for p in (1.0, 2.0, 3.5, np.inf, -np.inf, 0.0, -1.0)
]
NAMED = {f"{k:03} {rule!r}": rule for k, rule in enumerate(RULES)}


def as_jax(tree):
    return tree_map(jnp.asarray, tree)


def as_numpy(tree):
    return tree_map(np.asarray, tree)


def counted(f):
    """Return a compiled function, and a list that grows whenever it is traced."""
    traces = []

    def noted(*args):
        traces.append(1)
        return f(*args)

    return jax.jit(noted), traces


def small(seed=0, dtype=np.float32):
    return {
        "w": jnp.asarray(normal((2, 3), dtype, seed)),
        "b": jnp.asarray(normal(3, dtype, seed + 1)),
    }


def quadratic(model):
    return sum(jnp.sum((x - 1.0) ** 2) for x in leaves_of(model))


def counts_as_numpy(state):
    """Give counts the dtype that NumPy has for them."""
    return tree_map(lambda x: x.astype(np.int64) if x.dtype.kind == "i" else x, state)


def train_step(state, model):
    return update(state, model, jax.grad(quadratic)(model))
