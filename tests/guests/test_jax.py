"""Models of JAX arrays: the numbers of NumPy, gradients, and rules of users."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
from jax_models import (
    NAMED,
    RULES,
    as_jax,
    as_numpy,
    counted,
    counts_as_numpy,
    jnp,
    leaves_of,
    small,
    structure_of,
    train_step,
    tree_map,
)
from util import BOTH, PUBLIC, assert_near, assert_same_bits, decomposes, example, normal

from optimisers import (
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
    Rule,
    adjust,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)

jax = pytest.importorskip("jax")


def dtypes_of(tree):
    return [jnp.asarray(x).dtype for x in leaves_of(tree)]


# --- the same numbers as in NumPy ------------------------------------------------------------


def states_of(state):
    return {name: leaf.state for name, leaf in state.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_rule_has_the_numbers_of_numpy(dtype, compiled):
    """Step by step from the same state, to the last places of the largest numbers.

    Eigenvectors lose more of them, as `test_preconditioners` has it.
    """
    rules = {  # a master copy in float32 has last places of its own
        name: rule
        for name, rule in NAMED.items()
        if (dtype is np.float32 or not isinstance(rule, MixedPrecision)) and not decomposes(rule)
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


# --- models of JAX arrays --------------------------------------------------------------------


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


# --- users' rules ----------------------------------------------------------------------------


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
    assert [len(p) for p in leaves_of(setup(Handmade(0.1, 0.2), x))] == [4]
    by_array = setup(Handmade(np.array([1.0, 2.0])), x)
    assert repr(tree_map(lambda a: a, by_array).rule.rates) == repr([np.array([1.0, 2.0])])
    _, new = jax.jit(update)(by_array, x, x)
    np.testing.assert_allclose(new, [0.0, -1.0])
