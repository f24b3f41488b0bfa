"""The vector in which the numbers and counts of a leaf cross into JAX."""

from __future__ import annotations

import numpy as np
import pytest

from optimisers import (
    Adam,
    AdamW,
    Descent,
    Momentum,
    adjust,
    adjust_,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy


def counted(function):
    """Return a compiled function, and a list that gets longer each time that it is traced."""
    traces = []

    @jax.jit
    def compiled(*args):
        traces.append(1)
        return function(*args)

    return compiled, traces


def trained(rule=None, steps=3):
    model = {"a": jnp.ones(3), "b": jnp.arange(4.0)}
    state = setup(rule or Adam(0.1), model)
    step, traces = counted(lambda s, m: update(s, m, m))
    for _ in range(steps):
        state, model = step(state, model)
    return state, model, step, traces


def test_a_leaf_crosses_as_one_vector_and_its_arrays():
    assert len(jax.tree_util.tree_leaves(setup(Adam(), jnp.ones(2)))) == 3
    assert len(jax.tree_util.tree_leaves(setup(Momentum(), jnp.ones(2)))) == 2
    assert len(jax.tree_util.tree_leaves(setup(Descent(), jnp.ones(2)))) == 1


def test_steps_go_on_between_calls_that_change_the_state():
    state, model, step, traces = trained()
    state = adjust(state, 0.2)
    state, model = step(state, model)
    assert (state["a"].rule.eta, int(state["a"].state.t)) == (0.2, 4)
    adjust_(state, 0.3)
    state, model = step(state, model)
    assert (state["a"].rule.eta, int(state["a"].state.t)) == (0.3, 5)
    assert len(traces) == 1
    freeze_(state["b"])
    state, model = step(state, model)
    assert [int(state[k].state.t) for k in "ab"] == [6, 5]
    thaw_(state)
    state, model = update(state, model, model)
    assert [int(state[k].state.t) for k in "ab"] == [7, 6]
    update_(state, model, model)
    state, model = step(state, model)
    assert [int(state[k].state.t) for k in "ab"] == [9, 8]


def test_equal_leaves_are_traced_once():
    calls = []

    class Counting(AdamW):
        def coefs(self, t):
            calls.append(t)
            return super().coefs(t)

    model = {k: jnp.ones(3) for k in range(5)}
    state = setup(Counting(), model)
    jax.jit(update)(state, model, model)
    assert len(calls) == 1
    jax.jit(lambda *args: update(*args))(state, model, model)
    assert len(calls) == 2  # the next trace sees the rule as it is then


def test_numbers_and_counts_may_be_asked_for_in_a_branch():
    state, model, *_ = trained()

    @jax.jit
    def step(state, model):
        leaf, positive = state["a"], model["a"][0] > -9
        eta = jax.lax.cond(positive, lambda: leaf.rule.eta * 1.0, lambda: leaf.rule.eta * 2.0)
        t = jax.lax.cond(positive, lambda: leaf.state.t, lambda: leaf.state.t + 1)
        return update(state, model, model)[0], eta, t, leaf.state.t + 0

    new, eta, t, again = step(state, model)
    np.testing.assert_allclose(eta, 0.1, rtol=1e-6)
    assert (int(t), int(again), int(new["a"].state.t)) == (3, 3, 4)


def test_no_tracer_is_kept():
    state, model, *_ = trained()
    with jax.checking_leaks():
        jax.jit(lambda s, m: update(s, m, m))(state, model)


def test_states_may_be_stacked():
    state, model, *_ = trained()
    both = jax.tree_util.tree_map(lambda *xs: jnp.stack(xs), state, state)
    np.testing.assert_allclose(both["a"].rule.eta, [0.1, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(both["a"].state.t, [3, 3])
    models = jax.tree_util.tree_map(lambda x: jnp.stack([x, x]), model)
    new, _ = jax.vmap(lambda s, m: update(s, m, m))(both, models)
    np.testing.assert_array_equal(new["a"].state.t, [4, 4])


def test_a_count_stops_at_its_largest():
    leaf, x, step = setup(Adam(), jnp.ones(2)), jnp.ones(2), jax.jit(update)
    leaf.state = leaf.state._replace(t=jnp.asarray(2**31 - 2, jnp.int32))
    for _ in range(3):
        leaf, x = step(leaf, x, x)
        assert int(leaf.state.t) == 2**31 - 1
