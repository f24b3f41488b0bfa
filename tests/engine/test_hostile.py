"""Input that nobody should hand over: what is refused changes nothing, what is taken is right.

At the top stands each thing that was found here, by a name; below it random trees, arrays, states
and calls. What the kernels make of them must be what the array path makes of them, its slow twin.
"""

from __future__ import annotations

import numpy as np
import pytest
from util import (
    BOTH,
    arrays_in,
    assert_same_bits,
    bits,
    by_arrays,
    normal,
    parametrize,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    freeze_,
    setup,
    update,
    update_,
)

pytestmark = pytest.mark.sanitized

# --- states made by hand ---------------------------------------------------------------------


class Tuple(tuple):
    """A tuple by another name."""


@parametrize("wrap", [lambda r: r, OptimiserChain])
def test_update_leaves_a_state_alone_that_is_a_tuple_by_another_name(wrap):
    x, g = np.ones(3), np.ones(3)
    state = setup(wrap(Momentum(eta=0.5)), x)
    *outer, momentum = (state.state, state.state[0]) if wrap is OptimiserChain else (state.state,)
    state.state = (Tuple(momentum),) if outer else Tuple(momentum)
    new, _ = update(state, x, g)
    assert [bits(a) for _, a in arrays_in(state)] == [bits(np.zeros(3))]
    assert [bits(a) for _, a in arrays_in(new)] == [bits(np.full(3, 0.5))]


@BOTH
def test_a_norm_refuses_a_state_that_is_not_its_own(call):
    rule = OptimiserChain(ClipNorm(), Descent(1.0))
    state, x = Leaf(rule, ((np.full(3, 7.0),), ())), np.ones(3)
    with pytest.raises(TypeError, match="ClipNorm keeps no state, got"):
        call(state, x, np.ones(3))
    assert_same_bits(state.state, ((np.full(3, 7.0),), ()))
    assert_same_bits(x, np.ones(3))


@BOTH
@parametrize("count", [2**63 - 1, 2**62, -1, -(2**63)])
@parametrize("dtype", ["float32", "float64", "float16"])
def test_counts_at_the_end_of_what_can_be_counted(call, count, dtype):
    x = np.ones(3, dtype)
    state = setup(AccumGrad(3), x)
    state.state = state.state._replace(count=np.array(count))
    expected = by_arrays(AccumGrad(3), state.state, x, np.ones(3))
    new, moved = call(state, x, np.ones(3))
    assert_same_bits([new.state, moved], list(expected))


@BOTH
@parametrize("dtype", ["float32", "float64", "float16"])
def test_a_count_stays_at_the_largest_number(call, dtype):
    moved = []
    for count in (2**62, 2**63 - 1):
        x = np.ones(3, dtype)
        state = setup(Adam(0.1), {"w": x})
        state["w"].state = state["w"].state._replace(t=np.array(count))
        state, new = call(state, {"w": x}, {"w": np.ones(3, dtype)})
        moved.append(bits(new["w"]))
    assert int(state["w"].state.t) == 2**63 - 1
    assert moved[0] == moved[1]


@BOTH
@parametrize("count", [-(2**63), -1])
def test_a_count_that_no_formula_takes(call, count):
    x = np.ones(3)
    state = setup(Adam(), {"w": x})
    state["w"].state = state["w"].state._replace(t=np.array(count))
    before = [bits(a) for _, a in arrays_in([state, x])]
    with pytest.raises(ArithmeticError):
        call(state, {"w": x}, {"w": np.ones(3)})
    assert [bits(a) for _, a in arrays_in([state, x])] == before


@BOTH
@parametrize("dtype", ["float64", "float16"])
def test_more_gradients_to_hold_than_can_be_counted(call, dtype):
    x = np.ones(3, dtype)
    state, moved = call(setup(AccumGrad(10**30), x), x, np.ones(3))
    assert int(state.state.count) == 1
    assert_same_bits(moved, np.ones(3, dtype))


# --- memory that is written and read, or written twice ---------------------------------------


def refused(match, state, model, grad):
    before = [bits(a) for _, a in arrays_in([state, model])]
    with pytest.raises(ValueError, match=match):
        update_(state, model, grad)
    assert [bits(a) for _, a in arrays_in([state, model])] == before


def separate(rule, shapes, dtype=np.float64):
    """Return a state tree for arrays of these shapes that have nothing in common."""
    return setup(rule, {name: np.ones(shape, dtype) for name, shape in shapes.items()})


@parametrize("rule", [Descent(1.0), Adam(), MixedPrecision(Adam()), AccumGrad(1)])
@parametrize("dtype", ["float64", "float32", "float16"])
def test_a_read_only_view_of_what_is_written(rule, dtype):
    """Its new values follow from the old ones, whichever leaf comes first."""
    for names in ("ab", "ba"):
        w = normal(5000, dtype)
        view = w[10:4010]
        view.flags.writeable = False
        model = dict(zip(names, (w, view), strict=True))
        grad = {k: normal(x.shape, dtype, 3) for k, x in model.items()}
        state = separate(rule, {k: x.shape for k, x in model.items()}, dtype)
        _, expected = update(state, model, grad)
        _, got = update_(state, model, grad)
        assert_same_bits(got, expected)
        assert got[names[0]] is w


def test_a_count_in_the_memory_of_a_slot():
    state = setup(Adam(), {"w": np.ones(3)})
    m, v, t = state["w"].state
    state["w"].state = type(state["w"].state)(m, v, m[:1].view(np.int64).reshape(()))
    refused(r"\['w'\] itself overlap", state, {"w": np.ones(3)}, {"w": np.ones(3)})
    one, other = np.ones(3), v[:1].view(np.int64).reshape(())
    state = {"a": setup(Adam(), one), "b": setup(Adam(), one)}
    state["a"].state = type(state["a"].state)(m, np.ones(3), t)
    state["b"].state = type(state["b"].state)(v, np.ones(3), other)
    refused(r"\['b'\] itself overlap", state, {"a": one, "b": np.ones(3)}, {"b": np.ones(3)})


def test_one_count_for_two_leaves():
    """If one of them had no gradient, it would go up all the same."""
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = setup(Adam(), model)
    state["b"].state = state["b"].state._replace(t=state["a"].state.t)
    refused(r"\['a'\] and \['b'\] overlap", state, model, model)


SHARED = {
    "a state": (Adam(), lambda state: state),
    "a slot": (Adam(), lambda state: state._replace(t=np.array(0))),
    "a count": (Adam(), lambda state: type(state)(*map(np.copy, state[:2]), state.t)),
    "a state in a chain": (OptimiserChain(Descent(), Adam()), lambda state: (*state,)),
    "a slot in a chain": (
        OptimiserChain(Descent(), Adam()),
        lambda state: ((), state[1]._replace(t=np.array(0))),
    ),
    "a master": (MixedPrecision(Adam()), lambda state: (state[0], (*map(np.copy, state[1]),))),
    "a state beside masters": (
        MixedPrecision(OptimiserChain(Adam())),
        lambda state: (state[0].copy(), state[1]),
    ),
    "a sum": (AccumGrad(3), lambda state: state._replace(count=np.array(0))),
}


@parametrize("shared", SHARED)
def test_two_leaves_that_share(shared):
    rule, other = SHARED[shared]
    dtype = "float16" if isinstance(rule, MixedPrecision) else "float32"
    model = {"a": np.ones(3, dtype), "b": np.ones(3, dtype)}
    one = Leaf(rule, rule.init(model["a"]))
    state = {"a": one, "b": Leaf(rule, other(one.state))}
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap in memory"):
        update_(state, model, model)
    assert_same_bits([*model.values()], [np.ones(3, dtype)] * 2)


@parametrize("wrap", [lambda r: r, OptimiserChain])
def test_a_view_of_a_state_that_nothing_else_holds(wrap):
    """A parameter, and a gradient, that lie in a slot: the slot is held by them and the state."""
    rule, ones = wrap(Momentum(0.5, 0.5)), np.ones(4, np.float32)
    state = setup(rule, ones)
    slot = (state.state[0] if wrap is OptimiserChain else state.state)[0]
    view = slot[:]
    del slot
    with pytest.raises(ValueError, match="overlap in memory"):
        update_(state, view, ones)
    view[...] = 4
    _, x = update_(state, ones.copy(), view)
    np.testing.assert_array_equal(x, 1 - (0.5 * 4 + 0.5 * 4))


@parametrize("dtype", ["float16", "float64"])
def test_parameters_beside_the_kernels_that_overlap(dtype):
    room = np.ones(8, dtype)
    state = separate(Descent(0.5), {"a": 4, "b": 4}, dtype)
    grad = {"a": np.ones(4), "b": np.ones(4)}
    refused(r"\['a'\] and \['b'\] overlap", state, {"a": room[:4], "b": room[::2]}, grad)
    refused(r"\['a'\] and \['b'\] overlap", state, {"a": room[::2], "b": room[::2]}, grad)
    refused(r"\['a'\] and \['b'\] overlap", state, {"a": room[6::-2], "b": room[::2]}, grad)
    _, model = update_(state, {"a": room[::2], "b": room[1::2]}, grad)  # side by side
    np.testing.assert_array_equal(room, 0.5)
    _, model = update_(state, {"a": np.broadcast_to(room[0], 4), "b": room[::2]}, grad)
    np.testing.assert_array_equal(model["a"], 0)


def test_a_coefficient_that_cannot_be_had_says_where():
    model = {"good": np.ones(3), "bad": np.ones(3)}
    state = setup(Adam(), model)
    state["bad"].state = state["bad"].state._replace(t=np.array(-(2**62)))
    with pytest.raises(OverflowError) as caught:
        update_(state, model, model)
    (note,) = caught.value.__notes__
    assert note.endswith("at ['bad']; nothing was updated")


@parametrize("dtype", ["float16", "float64"])
def test_one_array_at_two_places_of_a_state_that_knows_of_no_tie(dtype):
    """Each place has its own update; in place, that cannot be."""
    w = np.ones(3, dtype)
    state = separate(Descent(0.5), {"a": 3, "b": 3, "c": 3}, dtype)
    freeze_(state["c"])
    model = {"a": w, "b": w, "c": w}
    grad = {"a": np.ones(3), "b": np.zeros(3)}
    _, new = update(state, model, grad)
    assert_same_bits(new, {"a": w - w / 2, "b": w, "c": w})
    assert len({id(x) for x in new.values()}) == 3
    refused(r"\['a'\] and \['b'\] overlap", state, model, grad)


@BOTH
@parametrize("other", [np.ones(2), np.ones(3, np.float32), np.ones(3, complex), None, "text"])
def test_a_leaf_for_two_places_that_cannot_have_the_same_numbers(call, other):
    """Whether or not there is a gradient for both."""
    leaf = setup(Momentum(), np.ones(3))
    state, model = {"a": leaf, "b": leaf}, {"a": np.ones(3), "b": other}
    before = [bits(a) for _, a in arrays_in([state, model])]
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] share a Leaf.* setup anew"):
        call(state, model, {"a": np.ones(3)})
    assert [bits(a) for _, a in arrays_in([state, model])] == before


def test_what_a_step_leaves_alone_is_copied_all_the_same():
    """A state that no rule asks for while gradients are held back, and that holds no array."""
    rule = OptimiserChain(AccumGrad(2), Descent())
    state = setup(rule, np.ones(3))
    state.state = (state.state[0], (["a list", np.ones(2)],))
    new, _ = update(state, np.ones(3), np.ones(3))
    ((kept,),) = new.state[1:]
    assert kept[0] == "a list"
    assert not np.shares_memory(kept[1], state.state[1][0][1])


@parametrize("dtype", ["float16", "float64"])
def test_a_leaf_for_two_places_that_overlap(dtype):
    room = np.ones(6, dtype)
    leaf = setup(Momentum(), np.ones(4, dtype))
    state, grad = {"a": leaf, "b": leaf}, {"a": np.ones(4), "b": np.ones(4)}
    refused(r"\['a'\] and \['b'\] overlap", state, {"a": room[:4], "b": room[2:]}, grad)
    state["c"] = setup(Momentum(), np.ones(4, dtype))
    model, grad["c"] = {"a": np.ones(4, dtype), "b": room[:4], "c": room[2:]}, np.ones(4)
    refused(r"\['b'\] and \['c'\] overlap", state, model, grad)
