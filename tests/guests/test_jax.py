"""Models of JAX arrays, traced or not; state trees as pytrees; Equinox and Flax; optree."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from re import sub as substitute
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from util import (
    BOTH,
    EVERY_ELEMENTWISE,
    PUBLIC,
    assert_near,
    assert_same_bits,
    example,
    normal,
    variants,
)

from optimisers import (
    AccumGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RAdam,
    RMSProp,
    Rprop,
    Rule,
    adjust,
    adjust_,
    destructure,
    freeze_,
    setup,
    thaw_,
    trainables,
    update,
    update_,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy
tree_map = jax.tree_util.tree_map
leaves_of, structure_of = jax.tree_util.tree_leaves, jax.tree_util.tree_structure

RULES: list[Any] = [*EVERY_ELEMENTWISE, *(r for c in PUBLIC for r in variants(c))]
RULES += [
    OptimiserChain(ClipNorm(1.0, p), Adam()) for p in (1.0, 2.0, 3.5, np.inf, -np.inf, 0.0, -1.0)
]
NAMED = {f"{k:03} {rule!r}": rule for k, rule in enumerate(RULES)}

x64 = pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])


@x64
def dtype(request):
    """Give float32, and float64 in a JAX that is set to 64 bits."""
    with jax.enable_x64(request.param is np.float64):
        yield request.param


def as_jax(tree):
    return tree_map(jnp.asarray, tree)


def as_numpy(tree):
    return tree_map(np.asarray, tree)


def dtypes_of(tree):
    return [jnp.asarray(x).dtype for x in leaves_of(tree)]


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


# --- the same numbers as in NumPy ----------------------------------------------------------------


def counts_as_numpy(state):
    """Give counts the dtype that NumPy has for them."""
    return tree_map(lambda x: x.astype(np.int64) if x.dtype.kind == "i" else x, state)


def states_of(state):
    return {name: leaf.state for name, leaf in state.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_rule_has_the_numbers_of_numpy(dtype, compiled):
    """Step by step from the same state, to the last places of the largest numbers."""
    rules = {  # a master copy in float32 has last places of its own
        name: rule
        for name, rule in NAMED.items()
        if dtype is np.float32 or not isinstance(rule, MixedPrecision)
    }
    xs = {name: normal(40, dtype) for name in rules}
    state = {name: setup(rule, xs[name]) for name, rule in rules.items()}
    step = jax.jit(update) if compiled else update
    for k in range(8):
        g = {name: normal(40, dtype, 10 + k) for name in rules}
        got_state, got = step(as_jax(state), as_jax(xs), as_jax(g))
        state, xs = update(state, xs, g)
        assert {x.dtype for x in got.values()} == {np.dtype(dtype)}
        assert_near(as_numpy(got), xs)
        assert_near(counts_as_numpy(as_numpy(states_of(got_state))), states_of(state))


@pytest.mark.parametrize("rule", [Adam(), RAdam(), AdamW(beta=(0.5, 0.99999))], ids=repr)
def test_counts_of_any_size_lose_no_digits(rule):
    x, g = normal(20, np.float32), normal(20, np.float32, 1)
    step = jax.jit(update)
    for t in (1, 4, 5, 6, 30, 1000, 10**6):
        leaf = Leaf(rule, rule.State(*(abs(normal(20, np.float32, 3)) for _ in "mv"), np.array(t)))
        _, expected = update(leaf, x, g)
        _, got = step(as_jax(leaf), jnp.asarray(x), jnp.asarray(g))
        moved = np.asarray(got, np.float64) - x
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert np.max(abs(moved - (np.asarray(expected, np.float64) - x))) < 2e-6


def test_numbers_keep_in_float32_what_rounding_them_would_lose():
    """With the 0.999 of float32, ``1 - 0.999`` is off by 1e-5; v would show it."""
    rule, x, g = Adam(), jnp.zeros(3), jnp.ones(3)
    state = setup(rule, x)
    for _ in range(2):
        state, x = jax.jit(update)(state, x, g)
    expected = 1 - 0.999**2
    np.testing.assert_allclose(state.state.v, expected, rtol=3e-7)
    assert abs((1 - np.float32(0.999) ** 2) / expected - 1) > 1e-5


def test_a_trajectory_in_float64_is_that_of_numpy():
    with jax.enable_x64(True):
        rule = OptimiserChain(ClipNorm(2.0), Adam(0.1, (0.8, 0.99)))
        x = normal(5)
        there, here = (setup(rule, jnp.asarray(x)), jnp.asarray(x)), (setup(rule, x), x)
        step = jax.jit(lambda s, x: update(s, x, 2 * x))
        for _ in range(50):
            there = step(*there)
            here = update(*here, 2 * here[1])
        np.testing.assert_allclose(there[1], here[1], rtol=1e-12)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("compiled", [False, True])
def test_other_dtypes_are_kept(name, compiled):
    step = jax.jit(update) if compiled else update
    rules = RULES if compiled else [*map(example, PUBLIC)]  # JAX compiles each operation alone
    rules = [r for r in rules if not (name == "complex64" and getattr(r, "real_only", False))]
    x = {str(k): jnp.asarray([0.5, -1.5, 2.0], name) for k in range(len(rules))}
    g = {key: jnp.asarray([0.5, 0.0, -1.0], name) for key in x}
    state = {key: setup(rule, x[key]) for key, rule in zip(x, rules, strict=True)}
    before = dtypes_of(state)
    for _ in range(3):
        state, x = step(state, x, g)
    assert {a.dtype.name for a in x.values()} == {name}
    assert all(jnp.all(jnp.isfinite(a)) for a in x.values())
    assert dtypes_of(state) == before


def test_epsilon_does_not_vanish_in_float16():
    x = jnp.ones(2, jnp.float16)
    _, eager = update(setup(Adam(), x), x, jnp.zeros(2))
    _, traced = jax.jit(update)(setup(Adam(), x), x, jnp.zeros(2))
    for new in (eager, traced):
        assert_same_bits(np.asarray(new), np.ones(2, np.float16))


# --- models of JAX arrays ------------------------------------------------------------------------


def test_counts_are_whole_numbers_as_jax_has_them():
    assert setup(Adam(), jnp.ones(2)).state.t.dtype == np.int32
    with jax.enable_x64(True):
        assert setup(Adam(), jnp.ones(2)).state.t.dtype == np.int64


def test_update_in_place_gives_a_new_model_and_the_same_state_tree():
    model, g = small(), small(5)
    before, old = as_numpy(model), {**model}
    state = setup(Momentum(0.5), model)
    leaf = state["w"]
    got_state, got = update_(state, model, g)
    assert got_state is state
    assert got_state["w"] is leaf
    assert got is not model
    assert model == old
    assert_same_bits(as_numpy(model), before)
    assert_near(np.asarray(leaf.state.v), 0.5 * np.asarray(g["w"]))
    assert_near(np.asarray(got["w"]), before["w"] - 0.5 * np.asarray(g["w"]))


def test_pure_update_leaves_the_state_alone():
    model = small()
    state = setup(Adam(), model)
    kept = copy.deepcopy(state)
    new, _ = update(state, model, small(3))
    assert_same_bits(as_numpy(states_of(state)), as_numpy(states_of(kept)))
    assert int(new["w"].state.t) == 1


@BOTH
def test_frozen_leaves_stay(call):
    model, g = small(), small(1)
    state = setup(Descent(), model)
    freeze_(state["w"])
    state, new = call(state, model, g)
    assert_same_bits(np.asarray(new["w"]), np.asarray(model["w"]))
    assert np.all(np.asarray(new["b"]) != np.asarray(model["b"]))
    thaw_(state)
    assert np.any(np.asarray(call(state, model, g)[1]["w"]) != np.asarray(model["w"]))


@BOTH
def test_gradients_of_other_libraries_and_dtypes(call):
    x = jnp.asarray([1.0, 2.0])
    for g in (np.array([1.0, 2.0]), np.array([1, 2]), jnp.asarray([1, 2]), jnp.ones(2, "bfloat16")):
        _, new = call(setup(Descent(0.5), x), x, g)
        assert isinstance(new, jax.Array)
        assert_same_bits(np.asarray(new), np.asarray(x) - 0.5 * np.asarray(g).astype(np.float32))
    _, new = call(setup(Descent(0.5), jnp.asarray(1.0)), jnp.asarray(1.0), 1)
    assert float(new) == 0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_no_gradient(compiled):
    """Neither None, nor a missing key, nor float0 moves anything or counts as a step."""
    model = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "n": jnp.arange(2)}
    state = setup(Adam(), model)
    float0 = np.zeros(2, jax.dtypes.float0)
    grad = {"a": None, "c": float0, "n": float0}
    step = lambda s, m: update(s, m, grad)  # noqa: E731
    state, new = (jax.jit(step) if compiled else step)(state, model)
    assert_same_bits(as_numpy(new), as_numpy(model))
    assert [int(state[k].state.t) for k in "abc"] == [0, 0, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_refused_gradients_name_their_place(compiled):
    model = {"a": [jnp.ones(2)]}
    state = setup(Descent(), model)

    def says(error, text, g):
        with pytest.raises(error, match=text):
            (jax.jit(update) if compiled else update)(state, model, {"a": [g]})

    place = r"at \['a'\]\[0\]: expected .*shape \(2,\).*float32, got "
    says(ValueError, place + r"shape \(3,\)", jnp.ones(3))
    says(TypeError, place + "complex", jnp.ones(2, complex))
    if not compiled:  # JAX itself refuses these before
        says(TypeError, place + ".*<U1", np.array(["a", "b"]))
        says(TypeError, place + ".*str", "ab")


def test_a_norm_that_is_not_finite():
    model = {"a": jnp.ones(2)}
    state = setup(OptimiserChain(ClipNorm(), Adam()), model)
    g = {"a": jnp.asarray([jnp.nan, 1.0])}
    with pytest.raises(FloatingPointError, match=r"at \['a'\]: ClipNorm"):
        update_(state, model, g)
    assert int(state["a"].state[1].t) == 0
    _, new = jax.jit(update)(state, model, g)  # where nothing can raise
    assert np.all(np.isnan(new["a"]))


def test_a_traced_limit_of_a_norm():
    x, g = jnp.zeros(2), jnp.asarray([3.0, 4.0])
    clipped = jax.vmap(lambda omega: ClipNorm(omega).apply((), x, g)[1])(jnp.asarray([1.0, 10.0]))
    np.testing.assert_allclose(clipped, [[0.6, 0.8], [3.0, 4.0]], rtol=1e-6)


def test_a_numpy_model_inside_a_traced_function():
    model = {"w": np.array([1.0, 2.0], np.float32)}
    state = setup(Adam(0.1), model)
    for call in (update, update_):
        _, new = jax.jit(lambda g, call=call: call(copy.deepcopy(state), model, {"w": g}))(
            jnp.ones(2)
        )
        np.testing.assert_allclose(new["w"], [0.9, 1.9], rtol=1e-6)
    moved = jax.vmap(lambda eta: update(adjust(state, eta), model, model)[1]["w"])(
        jnp.asarray([0.1, 0.2])
    )
    np.testing.assert_allclose(moved, [[0.9, 1.9], [0.8, 1.8]], rtol=1e-6)
    assert_same_bits(model["w"], np.array([1.0, 2.0], np.float32))


# --- state trees are pytrees ---------------------------------------------------------------------


def test_numbers_and_state_are_children_all_else_is_structure():
    x = jnp.ones(2)
    state = {"w": setup(OptimiserChain(ClipNorm(3.0), AccumGrad(2), RMSProp(0.25)), x)}
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in pairs}
    rule = "['w'].rule.rules"
    assert list(found) == [
        f"{rule}[0].omega", f"{rule}[0].omega.low",
        f"{rule}[2].eta", f"{rule}[2].eta.low",
        f"{rule}[2].rho", f"{rule}[2].rho.low",
        f"{rule}[2].epsilon", f"{rule}[2].epsilon.low",
        "['w'].state[1].sum", "['w'].state[1].count", "['w'].state[2].q",
    ]  # fmt: skip
    assert (found[f"{rule}[2].eta"], found[f"{rule}[2].eta.low"]) == (0.25, 0.0)
    assert found[f"{rule}[2].rho"] + found[f"{rule}[2].rho.low"] == 0.9
    assert found[f"{rule}[2].rho"] == np.float32(0.9)


def test_a_round_trip_changes_nothing():
    def rounded(tree):  # 0.7200000000000001 comes back as 0.72
        return substitute(r"\d+\.\d{9,}", lambda digits: f"{float(digits[0]):.12g}", repr(tree))

    state = {name: setup(rule, np.ones(3, np.float32)) for name, rule in NAMED.items()}
    assert "0.72," in rounded(state) != repr(state)
    assert repr(tree_map(lambda x: x, state)) == repr(state)
    assert repr(jax.device_get(state)) == repr(state)
    there = jax.jit(lambda s: s)(state)
    home = jax.device_get(there)
    for name, leaf in state.items():
        assert type(home[name].rule) is type(leaf.rule)
        assert rounded(there[name].rule) == rounded(home[name].rule) == rounded(leaf.rule)
        assert_near(counts_as_numpy(home[name].state), leaf.state)
    assert structure_of(state) == structure_of(there) == structure_of(home)


def test_structure():
    x = jnp.ones(2)

    def same(one, other):
        return structure_of(setup(one, x)) == structure_of(setup(other, x))

    assert same(Adam(), Adam(0.5, (0.1, 0.2), 1e-3))
    assert same(Descent(1), Descent(0.5))
    assert same(ClipNorm(1.0), ClipNorm(2.0))
    assert not same(ClipNorm(p=1.0), ClipNorm(p=2.0))
    assert not same(ClipNorm(), ClipNorm(throw=False))
    assert not same(AccumGrad(2), AccumGrad(3))
    assert not same(AdamW(), AdamW(couple=False))
    assert not same(MixedPrecision("float32", Adam()), MixedPrecision("bfloat16", Adam()))
    assert not same(Adam(), RAdam())
    frozen = setup(Adam(), x)
    freeze_(frozen)
    assert structure_of(frozen) != structure_of(setup(Adam(), x))


@pytest.mark.parametrize(
    "thing", [None, "text", True, object(), 1j, (1, 2)], ids=lambda x: type(x).__name__
)
def test_leaves_are_made_of_anything(thing):
    """JAX puts what it likes into trees: nothing is checked then, and no `__init__` runs."""
    for rule in RULES:
        state = setup(rule, jnp.ones(2))
        leaves, structure = jax.tree_util.tree_flatten(state)
        made = jax.tree_util.tree_unflatten(structure, [thing] * len(leaves))
        assert isinstance(made, Leaf)
        assert type(made.rule) is type(rule)
        same = [x is thing for x in structure.flatten_up_to(made)]
        assert same == [True] * len(leaves)
        assert isinstance(repr(made), str)


def test_numbers_beyond_float32():
    state = setup(OptimiserChain(ClipNorm(1e300), Adam(epsilon=1e-60)), jnp.ones(2))
    _, new = jax.jit(update)(state, jnp.ones(2), jnp.asarray([1.0, -1.0]))
    np.testing.assert_allclose(new, [0.999, 1.001], rtol=1e-6)
    with jax.enable_x64(True):
        there = jax.jit(lambda s: s)(setup(Adam(epsilon=1e-60, eta=1 / 3), jnp.ones(2)))
        assert (float(there.rule.epsilon), float(there.rule.eta)) == (1e-60, 1 / 3)


def test_what_came_back_from_jit_is_used_like_any_other():
    x, g = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, -1.0])
    rule = OptimiserChain(ClipNorm(1.0), Adam(0.1))
    plain = setup(rule, x)
    there = jax.jit(lambda s: s)(plain)
    for call in (update, update_):
        one, other = call(copy.deepcopy(plain), x, g), call(copy.deepcopy(there), x, g)
        assert_same_bits(np.asarray(one[1]), np.asarray(other[1]))
    assert repr(adjust(there, beta=(0.5, 0.6)).rule) == repr(rule.adjust(beta=(0.5, 0.6)))
    adjust_(there, 0.3)
    assert there.rule.rules[1].eta == 0.3
    again = pickle.loads(pickle.dumps(there))
    assert repr(again) == repr(there)
    at_home = jax.device_get(there)
    _, moved = update(at_home, np.asarray(x), np.asarray(g))  # by the kernels
    np.testing.assert_allclose(moved, update(there, x, g)[1], rtol=1e-6)


def test_a_numpy_model_beside_numbers_of_jax():
    there = jax.jit(lambda s: s)(setup(Momentum(0.5), jnp.ones(2)))
    leaf = Leaf(there.rule, setup(Momentum(0.5), np.ones(2)).state)
    for call in (update, update_):
        _, new = call(copy.deepcopy(leaf), np.ones(2), np.ones(2))
        assert_same_bits(new, np.array([0.5, 0.5]))


# --- whole training steps ------------------------------------------------------------------------


def train_step(state, model):
    return update(state, model, jax.grad(quadratic)(model))


def test_other_numbers_do_not_compile_anew():
    model = small()
    state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.1)), model)
    step, traces = counted(train_step)
    eager_state, eager = train_step(state, model)
    state, model = step(state, model)
    np.testing.assert_allclose(model["w"], eager["w"], rtol=1e-6)
    for changes in ({"eta": 0.5}, {"eta": 1}, {"beta": (0.5, 0)}, {"omega": 3.0, "epsilon": 1e-3}):
        state = adjust(state, **changes)
        eager_state = adjust(eager_state, **changes)
        state, model = step(state, model)
        eager_state, eager = train_step(eager_state, eager)
        np.testing.assert_allclose(model["w"], eager["w"], rtol=1e-5)
        adjust_(state, **changes)
        state, model = step(state, model)
        eager_state, eager = train_step(eager_state, eager)
    assert len(traces) == 1
    step(setup(OptimiserChain(ClipNorm(9.0), Adam(0.7)), small(3)), small(3))
    assert len(traces) == 1
    freeze_(state["w"])
    step(state, model)
    assert len(traces) == 2


@pytest.mark.parametrize("weak", [False, True])
def test_scan(weak, dtype):
    """State and model are a carry: their structure and dtypes do not change on the way."""
    rule = OptimiserChain(ClipNorm(1.0), AccumGrad(2), AdamW(0.1, lambda_=0.01))
    model = {"a": jnp.asarray(2.0), "b": jnp.asarray([3.0, 4.0], dtype)}
    if not weak:
        model["a"] = jnp.asarray(2.0, dtype)
    assert model["a"].weak_type is weak
    state = setup(rule, model)
    carry, _ = jax.lax.scan(lambda c, _: (train_step(*c), None), (state, model), length=12)
    for _ in range(12):
        state, model = train_step(state, model)
    assert structure_of(carry) == structure_of((state, model))
    np.testing.assert_allclose(carry[1]["b"], model["b"], rtol=1e-5)
    np.testing.assert_allclose(carry[1]["a"], model["a"], rtol=1e-5)
    assert carry[1]["b"].dtype == dtype
    assert int(carry[0]["a"].state[2].t) == 6


def test_a_schedule_inside_a_loop():
    x = jnp.asarray([1.0])
    state = setup(Descent(0.5), x)

    def body(carry, _):
        state, x = carry
        state, x = update(state, x, jnp.ones(1))
        return (adjust(state, 0.5 * state.rule.eta), x), x

    (state, _), xs = jax.lax.scan(body, (state, x), length=3)
    np.testing.assert_allclose(xs[:, 0], [0.5, 0.25, 0.125])
    assert state.rule.eta == 0.0625

    def follow(carry, eta):
        state, x = carry
        state, x = update(adjust(state, eta), x, jnp.ones(1))
        return (state, x), x

    _, xs = jax.lax.scan(follow, (state, x), jnp.asarray([0.5, 0.25]))
    np.testing.assert_allclose(xs[:, 0], [0.5, 0.25])


@pytest.mark.parametrize("rule", [Adam(0.1), OptimiserChain(ClipNorm(1.0), Rprop(0.1))], ids=repr)
def test_many_models_at_once(rule):
    """`vmap` gives each model its own norm, counts and numbers."""
    models = {"w": jnp.asarray(normal((4, 3), np.float32)), "b": jnp.arange(4.0)}
    states = jax.vmap(partial(setup, rule))(models)
    for _ in range(3):
        states, models = jax.vmap(train_step)(states, models)
    for k in range(4):
        one = {"w": jnp.asarray(normal((4, 3), np.float32))[k], "b": jnp.arange(4.0)[k]}
        state = setup(rule, one)
        for _ in range(3):
            state, one = train_step(state, one)
        np.testing.assert_allclose(models["w"][k], one["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(models["b"][k], one["b"], rtol=1e-5, atol=1e-6)


def test_many_rates_at_once():
    x, etas = jnp.asarray([1.0, 2.0]), jnp.asarray([0.1, 0.2, 0.4])

    def trained(eta, x):
        state = adjust(setup(Momentum(), x), eta)
        for _ in range(3):
            state, x = train_step(state, x)
        return state, x

    states, found = jax.vmap(trained, (0, None))(etas, x)
    for eta, new in zip(etas, found, strict=True):
        np.testing.assert_allclose(new, trained(float(eta), x)[1], rtol=1e-5)
    states, found = jax.vmap(train_step)(states, found)  # batched numbers go on
    np.testing.assert_allclose(found[1], train_step(*trained(0.2, x))[1], rtol=1e-5)
    states = jax.vmap(adjust)(states, 2 * etas)
    np.testing.assert_allclose(states.rule.eta, 2 * etas)
    assert repr(jax.vmap(lambda s: adjust(s, rho=0.5))(states).rule)


def test_the_rate_and_the_decay_have_gradients():
    """Through several steps, and through a loop: forward, backward and twice."""

    def after(eta, b, loop):
        x = jnp.asarray([3.0, -2.0])
        state = adjust(setup(Adam(), x), eta=eta, beta=(b, 0.99))
        if loop:
            step = lambda c, _: (train_step(*c), None)  # noqa: E731
            (_, new), _ = jax.lax.scan(step, (state, x), length=3)
        else:
            new = x
            for _ in range(3):
                state, new = train_step(state, new)
        return quadratic(new)

    with jax.enable_x64(True):
        near = [after(0.1 + h, 0.5, False) for h in (-1e-5, 1e-5)]
        slope = (near[1] - near[0]) / 2e-5
        near = [after(0.1, 0.5 + h, False) for h in (-1e-5, 1e-5)]
        slope_b = (near[1] - near[0]) / 2e-5
    for loop in (False, True):
        f = partial(after, loop=loop)
        grad, forward = jax.grad(f, argnums=(0, 1)), jax.jacfwd(f, argnums=(0, 1))
        for way in (jax.jit(grad), jax.jit(forward), *([grad] if loop else [])):
            d_eta, d_b = way(0.1, 0.5)
            np.testing.assert_allclose(d_eta, slope, rtol=1e-3)
            np.testing.assert_allclose(d_b, slope_b, rtol=1e-2)
        assert np.all(np.isfinite(jax.jit(jax.hessian(f))(0.1, 0.5)))


# --- accumulation --------------------------------------------------------------------------------

ACCUMULATING = [
    AccumGrad(1),
    AccumGrad(3),
    OptimiserChain(AccumGrad(2), Adam(0.1)),
    OptimiserChain(Momentum(0.5), AccumGrad(2), ClipNorm(0.5), Adam(0.1)),
    OptimiserChain(AccumGrad(2), AccumGrad(2), Momentum(0.1)),
    OptimiserChain(OptimiserChain(AccumGrad(3), Adam(0.1)), Momentum(0.5)),
    MixedPrecision(OptimiserChain(AccumGrad(2), Adam(0.1))),
]


@pytest.mark.parametrize("rule", ACCUMULATING, ids=repr)
def test_accumulation_can_be_traced(rule):
    x = normal(5, np.float32)
    there, here = (setup(rule, jnp.asarray(x)), jnp.asarray(x)), (setup(rule, x), x)
    step, traces = counted(update)
    for k in range(7):
        g = normal(5, np.float32, k)
        there, here = step(*there, jnp.asarray(g)), update(*here, g)
        assert_near(np.asarray(there[1]), here[1])
        assert_near(counts_as_numpy(as_numpy(there[0].state)), here[0].state)
    assert len(traces) == 1


def test_a_swallowed_step_lets_no_nan_through():
    rule = OptimiserChain(AccumGrad(2), ClipNorm(1.0, throw=False), Adam())
    state, x = setup(rule, jnp.ones(2)), jnp.ones(2)
    state, x = jax.jit(update)(state, x, jnp.asarray([jnp.nan, 1.0]))
    assert_same_bits(np.asarray(x), np.ones(2, np.float32))
    assert np.all(np.asarray(state.state[2].m) == 0)
    assert int(state.state[2].t) == 0


# --- ties ----------------------------------------------------------------------------------------


def tied():
    """An array of NumPy at two places; at two places, one of JAX is two parameters."""
    w = np.array([1.0, 2.0], np.float32)
    return {"a": w, "b": [w, np.zeros(2, np.float32)]}


def tied_loss(model):
    return jnp.sum(model["a"] * jnp.asarray([1.0, 0.0])) + jnp.sum(model["b"][0] ** 2)


def test_ties_hold_through_jit():
    model = tied()
    state = setup(Momentum(0.1), model)
    step, traces = counted(lambda s, m: update(s, m, jax.grad(tied_loss)(m)))
    eager_state, eager = state, model
    for _ in range(3):
        state, model = step(state, model)
        eager_state, eager = update(eager_state, eager, jax.grad(tied_loss)(eager))
        assert_same_bits(np.asarray(model["a"]), np.asarray(model["b"][0]))
        np.testing.assert_allclose(model["a"], eager["a"], rtol=1e-6)
    assert eager["a"] is eager["b"][0]
    step(setup(Momentum(0.1), tied()), tied())
    assert len(traces) == 1
    assert state["a"] is not state["b"][0]  # made by JAX, one for each place
    for crossed in (state, pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        new, moved = update(crossed, model, jax.grad(tied_loss)(model))
        assert new["a"] is new["b"][0]
        assert moved["a"] is moved["b"][0]
        written, _ = update_(crossed, model, jax.grad(tied_loss)(model))
        assert written["a"].state is written["b"][0].state
        assert_same_bits(np.asarray(written["a"].state.v), np.asarray(new["a"].state.v))
    again = adjust(state, 0.5)
    _, moved = update(again, model, {"a": jnp.ones(2), "b": [jnp.ones(2), None]})
    assert_same_bits(np.asarray(moved["a"]), np.asarray(moved["b"][0]))


def test_ties_hold_through_a_loop():
    model = tied()
    state = setup(Descent(0.1), model)
    body = lambda c, _: (update(*c, jax.grad(tied_loss)(c[1])), None)  # noqa: E731
    (_, there), _ = jax.lax.scan(body, (state, model), length=3)
    for _ in range(3):
        state, model = update(state, model, jax.grad(tied_loss)(model))
    np.testing.assert_allclose(there["a"], model["a"], rtol=1e-6)
    np.testing.assert_allclose(there["b"][0], model["a"], rtol=1e-6)


def test_models_that_are_tied_alike_are_not_tied_to_each_other():
    model = {"one": tied(), "two": tied()}
    state = {name: setup(Descent(1.0), m) for name, m in model.items()}
    state = jax.jit(lambda s: s)(state)
    grad = {"one": {"a": jnp.ones(2)}}
    _, new = update(state, model, grad)
    assert_same_bits(np.asarray(new["one"]["b"][0]), np.array([0.0, 1.0], np.float32))
    assert_same_bits(np.asarray(new["two"]["a"]), np.array([1.0, 2.0], np.float32))


def test_other_ties_are_other_structure():
    x, y = np.ones(2), np.zeros(2)
    states = [setup(Adam(), m) for m in ([x, x, y, y], [x, y, x, y], [x, y, np.ones(2), y])]
    assert len({structure_of(state) for state in states}) == 3


# --- the flat vector -----------------------------------------------------------------------------


def nested(dtype=np.float32):
    w = normal((2, 3), dtype)
    return as_jax({"layers": [{"w": w, "b": normal(3, dtype)}], "scale": np.array(2.0, dtype)})


def nested_loss(model):
    w, b = model["layers"][0]["w"], model["layers"][0]["b"]
    return jnp.sum(jnp.tanh(w + b) * model["scale"]) ** 2


def test_derivatives_of_a_rebuilt_model(dtype):
    model = nested(dtype)
    flat, re = destructure(model)
    assert isinstance(flat, jax.Array)
    assert flat.dtype == dtype
    assert flat.shape == (10,) == (len(re),)

    def loss(v):
        return nested_loss(re(v))

    g = jax.grad(loss)(flat)
    expected = re.flatten_gradient(jax.grad(nested_loss)(model))
    np.testing.assert_allclose(g, expected, rtol=1e-5)
    t = jnp.ones_like(flat)
    value, slope = jax.jvp(loss, (flat,), (t,))
    np.testing.assert_allclose([value, slope], [nested_loss(model), g.sum()], rtol=1e-4)
    np.testing.assert_allclose(jax.vjp(loss, flat)[1](jnp.ones((), dtype))[0], g, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(flat), g, rtol=1e-4)
    h = jax.jit(jax.hessian(loss))(flat)
    assert h.shape == (10, 10)
    np.testing.assert_allclose(h, h.T, rtol=1e-3, atol=1e-4)
    curvature = jax.jvp(jax.grad(loss), (flat,), (t,))[1]
    np.testing.assert_allclose(h @ t, curvature, rtol=1e-3, atol=1e-4)
    batch = jnp.stack([flat, 2 * flat])
    np.testing.assert_allclose(jax.vmap(loss)(batch), [loss(flat), loss(2 * flat)], rtol=1e-5)
    rebuilt = jax.vmap(re)(batch)
    assert rebuilt["layers"][0]["w"].shape == (2, 2, 3)


def test_the_vector_and_the_list_of_a_traced_model():
    model = nested()

    def by_vector(m):
        return jnp.sum(destructure(m)[0] ** 2)

    def by_list(m):
        return sum(jnp.sum(x**2) for x in trainables(m))

    for f in (by_vector, by_list):
        g = jax.grad(f)(model)
        np.testing.assert_allclose(g["layers"][0]["w"], 2 * model["layers"][0]["w"])
        assert float(g["scale"]) == 4.0
        np.testing.assert_allclose(jax.jit(f)(model), f(model), rtol=1e-6)
    flat, re = destructure(model)
    np.testing.assert_allclose(jax.jit(re.flatten)(model), flat)
    twice = jax.jit(lambda m: re(2 * re.flatten(m)))(model)
    assert float(twice["scale"]) == 4.0
    rows = jax.vmap(lambda m: destructure(m)[0])(tree_map(lambda x: jnp.stack([x, x]), model))
    np.testing.assert_allclose(rows, jnp.stack([flat, flat]))
    h = jax.hessian(lambda m: destructure(m)[0].sum() ** 2)(model)
    assert float(h["scale"]["scale"]) == 2.0


def test_ties_in_a_traced_function_by_an_re_made_outside():
    model = tied()
    flat, re = destructure(model)
    assert flat.shape == (4,)
    rebuilt = jax.jit(re)(flat)
    assert_same_bits(np.asarray(rebuilt["b"][0]), np.asarray(model["a"]))
    g = jax.grad(lambda v: tied_loss(re(v)))(flat)
    np.testing.assert_allclose(g, [3.0, 4.0, 0.0, 0.0])
    g = jax.jit(lambda m: re.flatten_gradient(jax.grad(tied_loss)(m)))(model)
    np.testing.assert_allclose(g, [3.0, 4.0, 0.0, 0.0])


def test_mixed_dtypes_are_cast_back_and_differentiate():
    model = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "n": jnp.arange(2)}
    flat, re = destructure(model)
    assert flat.dtype == np.float32
    rebuilt = jax.jit(re)(2 * flat)
    assert (rebuilt["a"].dtype, rebuilt["b"].dtype) == (jnp.bfloat16, jnp.float16)
    g = jax.grad(lambda v: re(v)["a"].sum().astype(jnp.float32))(flat)
    np.testing.assert_allclose(g, [1.0, 1.0, 0.0, 0.0])


def test_training_the_vector():
    flat, re = destructure(nested())
    state = setup(Adam(0.1), flat)

    @jax.jit
    def step(state, v):
        value, g = jax.value_and_grad(lambda v: nested_loss(re(v)))(v)
        return *update(state, v, g), value

    values = []
    for _ in range(100):
        state, flat, value = step(state, flat)
        values.append(float(value))
    assert values[-1] < 1e-3 * values[0]


# --- users' rules --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecayDescent(Rule):
    eta: float = 0.1
    power: int = 1

    def init(self, x):
        return 1

    def apply(self, state, x, dx):
        scale = self.eta / state**0.5
        for _ in range(self.power - 1):
            dx = dx * abs(dx)
        return state + 1, scale * dx


@dataclass(frozen=True)
class Shrinking(ElementwiseRule):
    rate: float
    span: tuple = (0.5, 2)

    slots = ("s",)

    def coefs(self, t):
        return 1 - self.rate, self.rate / t, *self.span

    @staticmethod
    def step(x, dx, state, coefs):
        (s,) = state
        keep, rate, low, high = coefs
        s = keep * s + rate * dx
        return low * s + high * x, (s,)


@dataclass(frozen=True)
class Steep(Rule):
    p: float = 2.0

    static = ("p",)

    def apply(self, state, x, dx):
        return state, dx if self.p == 1 else dx**self.p


class Handmade(Rule):
    """No dataclass, and with a slot."""

    __slots__ = ("rates",)

    def __init__(self, *rates):
        self.rates = list(rates)

    def apply(self, state, x, dx):
        return state, sum(self.rates) * dx


@dataclass(frozen=True, slots=True)
class Slotted(Rule):
    eta: float = 0.5

    def apply(self, state, x, dx):
        return state, self.eta * dx


@dataclass(frozen=True)
class Twice(Rule):
    rule: Rule
    share: float = 0.5

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx):
        state, dx = self.rule.apply(state, x, dx)
        return state, dx * self.share


@pytest.mark.parametrize(
    "rule",
    [
        DecayDescent(),
        DecayDescent(0.5, 2),
        Shrinking(0.1),
        Steep(1.0),
        Steep(3.0),
        Handmade(0.25, 0.5),
        Slotted(),
        Twice(Adam(0.1)),
        OptimiserChain(ClipNorm(1.0), Twice(OptimiserChain(DecayDescent(), Shrinking(0.2)))),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_of_users_cross(rule):
    x = jnp.asarray([1.0, -2.0])
    step, traces = counted(train_step)
    there = here = (setup(rule, x), x)
    for _ in range(3):
        there, here = step(*there), train_step(*here)
        np.testing.assert_allclose(there[1], here[1], rtol=1e-6)
    assert len(traces) <= 2  # a state that is a Python number becomes an array
    (_, found), _ = jax.lax.scan(lambda c, _: (train_step(*c), None), (setup(rule, x), x), length=3)
    np.testing.assert_allclose(found, here[1], rtol=1e-6)


def test_numbers_of_users_rules():
    x = jnp.ones(2)
    assert structure_of(setup(DecayDescent(0.1), x)) == structure_of(setup(DecayDescent(0.2), x))
    assert structure_of(setup(DecayDescent(power=1), x)) != structure_of(
        setup(DecayDescent(power=2), x)
    )
    assert structure_of(setup(Steep(1.0), x)) != structure_of(setup(Steep(2.0), x))
    assert len(leaves_of(setup(Handmade(0.1, 0.2), x))) == 4
    by_array = setup(Handmade(np.array([1.0, 2.0])), x)
    assert repr(tree_map(lambda a: a, by_array).rule.rates) == repr([np.array([1.0, 2.0])])
    _, new = jax.jit(update)(by_array, x, x)
    np.testing.assert_allclose(new, [0.0, -1.0])


# --- Equinox, Flax -------------------------------------------------------------------------------


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


def test_an_equinox_module_trains(eqx):
    mlp = eqx.nn.MLP(2, 1, 8, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    xs = jnp.asarray(normal((16, 2), np.float32)) / 10
    ys = xs.sum(axis=1)

    def loss(mlp):
        return jnp.mean((jax.vmap(mlp)(xs)[:, 0] - ys) ** 2)

    state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.02)), mlp)
    assert isinstance(state, SimpleNamespace)
    assert isinstance(state.layers[0].weight, Leaf)
    assert repr(state).startswith("namespace(layers=")
    _, eager = update(state, mlp, eqx.filter_grad(loss)(mlp))
    traces = []

    @eqx.filter_jit
    def step(state, mlp):
        traces.append(1)
        return update(state, mlp, eqx.filter_grad(loss)(mlp))

    first = float(loss(mlp))
    state, mlp = step(state, mlp)
    assert type(mlp) is type(eager)
    np.testing.assert_allclose(mlp.layers[0].weight, eager.layers[0].weight, rtol=1e-5)
    for _ in range(60):
        state, mlp = step(state, mlp)
    assert float(loss(mlp)) < 0.2 * first
    assert len(traces) == 1
    assert mlp.in_size == 2


def test_a_module_with_all_kinds_of_fields(eqx):
    class Module(eqx.Module):
        w: jax.Array
        bias: None
        act: Any
        steps: jax.Array
        rate: float
        name: str = eqx.field(static=True)

    module = Module(jnp.ones(2), None, jnp.tanh, jnp.arange(2), 0.5, "first")
    grad = eqx.filter_grad(lambda m: jnp.sum(m.act(m.w) * m.rate))(module)
    state = setup(Descent(1.0), module)
    assert (state.bias, state.act, state.steps, state.rate) == ((), (), (), ())
    assert not hasattr(state, "name")
    _, new = update(state, module, grad)
    np.testing.assert_allclose(new.w, 1 - 0.5 / np.cosh(1) ** 2, rtol=1e-6)
    assert (new.bias, new.act, new.rate, new.name) == (None, jnp.tanh, 0.5, "first")
    assert new.steps is module.steps
    # A state crosses plain jit, too, with the module's arrays.
    params, static = eqx.partition(module, eqx.is_inexact_array)
    _, again = jax.jit(update)(state, params, eqx.filter(grad, eqx.is_array))
    np.testing.assert_allclose(eqx.combine(again, static).w, new.w, rtol=1e-6)
    back = tree_map(lambda x: x, state)
    assert type(back) is type(state)
    assert repr(back) == repr(state)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [".w.rule.eta", ".w.rule.eta.low"]
    assert pickle.loads(pickle.dumps(state)) is not None
    flat, re = destructure(module)
    slope = jax.grad(lambda v: jnp.sum(re(v).w ** 2))(flat)
    np.testing.assert_allclose(slope, [2.0, 2.0])


def test_flax_parameters_train():
    linen = pytest.importorskip("flax.linen")
    core = pytest.importorskip("flax.core")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.tanh(linen.Dense(8)(x)))

    xs = jnp.asarray(normal((16, 2), np.float32)) / 10
    network = Network()
    params = network.init(jax.random.key(0), xs)

    def loss(params):
        return jnp.mean((network.apply(params, xs)[:, 0] - xs.sum(axis=1)) ** 2)

    for model in (params, core.freeze(params)):
        state, new = setup(Adam(0.02), model), model
        step = jax.jit(lambda s, m: update(s, m, jax.grad(loss)(m)))
        for _ in range(60):
            state, new = step(state, new)
        assert type(new) is type(model)
        assert float(loss(new)) < 0.2 * float(loss(model))
        flat, re = destructure(model)
        g = jax.grad(lambda v, re=re: loss(re(v)))(flat)
        np.testing.assert_allclose(
            g, re.flatten_gradient(jax.grad(loss)(model)), rtol=1e-4, atol=1e-6
        )


# --- registering ---------------------------------------------------------------------------------

SCRIPT = """
import pickle, sys
import numpy as np
import optimisers
from optimisers import Adam, setup, update
assert "jax" not in sys.modules and "optree" not in sys.modules
early = setup(Adam(), {"w": np.ones(2)})
pickled = pickle.dumps(early)
import jax, optree
step = jax.jit(update)
g = {"w": np.ones(2)}
{use}
assert float(new["w"][0]) < 1
assert len(optree.tree_leaves(state)) == 11
"""


@pytest.mark.parametrize(
    "use",
    [
        "state, new = step(pickle.loads(pickled), g, g)",
        "state, new = step(setup(Adam(), g), g, g)",
        "optimisers.thaw_(early); state, new = step(early, g, g)",
        "update(early, g, g); state, new = step(early, g, g)",
    ],
)
def test_leaves_are_known_to_jax_when_it_is_imported_late(use):
    script = SCRIPT.replace("{use}", use)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_leaves_are_known_to_jax_when_it_is_imported_first():
    """Unpickling imports this library."""
    pickled = pickle.dumps(setup(Adam(), {"w": np.ones(2)}))
    script = (
        "import jax, pickle, sys\n"
        f"state = pickle.loads({pickled!r})\n"
        "assert len(jax.tree_util.tree_leaves(state)) == 11"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_optree_sees_the_same_leaves():
    optree = pytest.importorskip("optree")
    eqx = pytest.importorskip("equinox")
    state = setup(Adam(), {"w": jnp.ones(2), "m": eqx.nn.Linear(2, 1, key=jax.random.key(0))})
    leaves, spec = optree.tree_flatten(state)
    for x, y in zip(leaves, leaves_of(state), strict=True):
        assert x is y or x == y
    back = optree.tree_unflatten(spec, leaves)
    assert repr(back) == repr(state)
    assert repr(optree.tree_map(lambda x: x, state)) == repr(state)
    paths = optree.tree_paths(state)
    assert ("w", "rule.eta") in paths
    assert ("m", "weight", "state", 0) in paths
