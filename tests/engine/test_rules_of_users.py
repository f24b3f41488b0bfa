"""Rules of users in update and update_: their states, steps, and higher derivatives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from updates import DTYPES, refused
from util import (
    BOTH,
    LAYOUTS,
    PUBLIC,
    arrays_in,
    assert_same_bits,
    example,
    normal,
    parametrize,
    share_memory,
)

from optimisers import (
    AccumGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    MixedPrecision,
    OptimiserChain,
    Rule,
    Sophia,
    adjust,
    setup,
    update,
    update_,
)


@dataclasses.dataclass(frozen=True)
class Curious(Rule):
    """Notes what it is called with; its state is no array."""

    eta: float = 1.0

    def init(self, x):
        return []

    def apply(self, state, x, dx, *higher):
        state.append([np.array(g) if g is not None else None for g in (dx, *higher)])
        return state, self.eta * dx


@BOTH
@parametrize("dtype", DTYPES)
def test_higher_derivatives_are_handed_to_rules(call, dtype):
    model = {"a": np.ones(2, dtype), "b": [np.ones(1, dtype)]}
    rule = OptimiserChain(Descent(0.5), Curious())
    first = {"a": np.ones(2), "b": [np.ones(1)]}
    second = {"a": np.array([2, 3]), "b": None}
    third = {"b": [np.array([5.0])]}
    state, new = call(setup(rule, model), model, first, second, third)
    (seen,) = state["a"].state[1]
    assert [g if g is None else g.tolist() for g in seen] == [[0.5, 0.5], [2, 3], None]
    assert all(g.dtype == ("float32" if dtype == "float16" else dtype) for g in seen[:2])
    (seen,) = state["b"][0].state[1]
    assert [g if g is None else g.tolist() for g in seen] == [[0.5], None, [5]]
    np.testing.assert_array_equal(new["a"], 0.5)


@BOTH
@parametrize("rule", [example(cls) for cls in PUBLIC if cls is not Sophia])
def test_first_order_rules_ignore_higher_derivatives(call, rule):
    x, g = normal(6, np.float32, 1), normal(6, np.float32, 2)
    expected = update(setup(rule, x), x, g)
    assert_same_bits(call(setup(rule, x), x.copy(), g, normal(6), None), expected)


def test_higher_derivatives_must_fit():
    model = {"w": np.ones(2)}
    state = setup(Curious(), model)
    refused(
        ValueError, r"\['w'\].*shape \(3,\)", state, model, {"w": np.ones(2)}, {"w": np.ones(3)}
    )
    refused(ValueError, "'v'", state, model, {"w": np.ones(2)}, {"v": np.ones(3)})


class Opaque:
    def __init__(self):
        self.count = 0
        self.buffer = np.zeros(2)


@dataclasses.dataclass(frozen=True)
class AnyState(Rule):
    def init(self, x):
        return Opaque()

    def apply(self, state, x, dx):
        state.count += 1
        state.buffer += dx
        return state, state.buffer / state.count


@BOTH
def test_any_object_may_be_the_state(call):
    model = {"w": np.ones(2)}
    old = state = setup(AnyState(), model)
    for k in range(3):
        state, model = call(state, model, {"w": np.array([1.0, k])})
    assert state["w"].state.count == 3
    np.testing.assert_array_equal(state["w"].state.buffer, [3, 3])
    np.testing.assert_allclose(model["w"], [1 - 3, 1 - 0 - 0.5 - 1])
    assert (old["w"].state.count == 3) == (call is update_)


@dataclasses.dataclass(frozen=True)
class Hoarder(Rule):
    """Keeps the arrays it is given as they are: the last parameter and the last gradient."""

    def init(self, x):
        return x.copy(), np.zeros_like(x)

    def apply(self, state, x, dx):
        return (x, dx), 0.5 * dx


@dataclasses.dataclass(frozen=True)
class ElementwiseHoarder(ElementwiseRule):
    """The same, and the gradient before the last."""

    slots = ("x", "g", "g2")

    def coefs(self):
        return (0.5,)

    @staticmethod
    def step(x, dx, state, coefs):
        _, g, _ = state
        (half,) = coefs
        return half * dx, (x, dx, g)


@BOTH
@pytest.mark.parametrize("rule", [Hoarder(), ElementwiseHoarder(), OptimiserChain(Hoarder())])
def test_states_keep_nothing_of_parameters_and_gradients(call, rule):
    """A rule may return what it was given as its state; that then has memory of its own."""
    model, grad = {"w": np.ones(3)}, {"w": np.full(3, 2.0)}
    state = setup(rule, model)
    for _ in range(2):
        old_state, old_model = state, model
        state, model = call(state, model, grad)
        if call is update:
            assert share_memory([state, model], [old_state, old_model]) == []
        assert share_memory(state, model) == []
        assert share_memory([state, model], grad) == []
    grad["w"][...] = 77
    model["w"][...] = 88
    _, last_x = next(arrays_in(state["w"].state))
    np.testing.assert_array_equal(last_x, 0.0)  # where the second step began


@dataclasses.dataclass(frozen=True)
class Steady(ElementwiseRule):
    """A user's elementwise rule; one slot never changes."""

    eta: float = 0.5
    slots = ("first", "v")

    def start(self):
        return 3.0, 0.0

    def coefs(self, t):
        return self.eta / t, self.eta

    @staticmethod
    def step(x, dx, state, coefs):
        first, v = state
        rate, eta = coefs
        v = eta * v + dx
        return rate * (v + first), (first, v)


@BOTH
@parametrize("dtype", DTYPES)
def test_users_elementwise_rules(call, dtype):
    model = {"w": np.ones(2, dtype), "v": np.ones(2, dtype)}
    old = setup(OptimiserChain(ClipNorm(100.0), Steady()), model)
    state, new = call(old, model, {"w": np.ones(2)})
    np.testing.assert_array_equal(new["w"], 1 - 0.5 * 4)
    state, new = call(state, new, {"w": np.ones(2)})
    np.testing.assert_array_equal(new["w"], -1 - 0.25 * 4.5)
    first, v, t = state["w"].state[1]
    np.testing.assert_array_equal(first, 3)
    np.testing.assert_array_equal(v, 1.5)
    assert int(t) == 2
    assert (first.dtype, t.dtype) == (dtype, np.int64)
    if call is update:
        assert share_memory(state, old) == []


@dataclasses.dataclass(frozen=True)
class Skipping(Rule):
    """Steps every second time."""

    def init(self, x):
        return 0

    def apply(self, state, x, dx):
        return state + 1, dx if state % 2 else None


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("wrap", [lambda r: r, OptimiserChain, MixedPrecision])
def test_a_rule_may_return_no_step(call, dtype, wrap):
    model = {"w": np.ones(2, dtype)}
    old = state = setup(wrap(Skipping()), model)
    for expected in (1, 0, 0, -1):
        state, model = call(state, model, {"w": np.ones(2)})
        np.testing.assert_array_equal(model["w"], expected)
        assert model["w"].dtype == dtype
    assert call is update_ or share_memory(state, old) == []


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("wrap", [lambda r: r, MixedPrecision])
@parametrize("layout", LAYOUTS)
def test_accumulation_on_every_path(call, dtype, wrap, layout):
    """On the steps that it swallows, a new array is as the old one."""
    junk = [np.full(2, 7, dtype) for _ in range(100)]  # so that new memory is not ones by chance
    del junk
    model = {"w": LAYOUTS[layout](np.ones(2, dtype))}
    old = state = setup(wrap(OptimiserChain(AccumGrad(2), Descent(0.5))), model)
    for g, expected, count in ((1, 1, 1), (3, 0, 0), (2, 0, 1), (2, -1, 0)):
        state, model = call(state, model, {"w": np.full(2, float(g))})
        np.testing.assert_array_equal(model["w"], expected)
        assert model["w"].shape == (2,)
        inner = state["w"].state.state if wrap is MixedPrecision else state["w"].state
        assert int(inner[0].count) == count
    assert call is update_ or share_memory(state, old) == []


@pytest.mark.parametrize("cls", [c for c in PUBLIC if not issubclass(c, ElementwiseRule)])
@BOTH
def test_composed_rules_with_an_apply_of_their_own(call, cls):
    """The kernels must not run what a subclass has made its own."""

    class Own(cls):
        def apply(self, state, x, dx, *higher):
            return state, 0.25 * dx

        move = Rule.move

    made = example(cls)
    rule = object.__new__(Own)
    for name, value in vars(made).items():
        object.__setattr__(rule, name, value)
    x = np.ones(2)
    _, new = call(setup(rule, x), x, np.ones(2))
    np.testing.assert_array_equal(new, 0.75)


class Doubling(OptimiserChain):
    """A chain that is a chain, under another name."""


@BOTH
def test_subclasses_of_composed_rules(call):
    x = np.ones(2)
    rule = Doubling(Descent(0.5), Descent(0.5))
    state, new = call(setup(rule, x), x, np.ones(2))
    np.testing.assert_array_equal(new, 0.75)
    assert type(adjust(state, 0.1).rule) is Doubling


@dataclasses.dataclass(frozen=True)
class MovesItself(Descent):
    def move(self, state, x, dx, *higher):
        return state, x + dx


@BOTH
def test_rules_with_a_move_of_their_own(call):
    x = np.ones(2)
    np.testing.assert_array_equal(call(setup(MovesItself(), x), x, np.ones(2))[1], 2)
