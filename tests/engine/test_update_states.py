"""States that update is given, and leaves: their layout, copies, pickles, and texts."""

from __future__ import annotations

import collections
import copy
import math
import pickle

import numpy as np
from util import (
    BOTH,
    LAYOUTS,
    PUBLIC,
    arrays_in,
    assert_same_bits,
    example,
    native,
    normal,
    parametrize,
    share_memory,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    Descent,
    Leaf,
    Momentum,
    OptimiserChain,
    freeze_,
    setup,
    update,
    update_,
)

# --- states ----------------------------------------------------------------------------------


@BOTH
@parametrize("rule", [Adam(), OptimiserChain(AccumGrad(2), Adam())])
def test_states_whose_arrays_cannot_be_written(call, rule):
    """As they come from a memory-mapped file or from another library."""
    x, g = np.ones(3), np.ones(3)
    state = setup(rule, x)
    expected = state, x
    for _ in range(3):
        expected = update(*expected, g)
        for _, a in arrays_in(state):
            a.flags.writeable = False
        state, x = call(state, x, g)
        assert_same_bits([state, x], list(expected))


@BOTH
def test_states_whose_count_is_a_number(call):
    """Arithmetic on a count makes a NumPy scalar of it."""
    x = np.ones(3)
    state = setup(Adam(), x)
    state, x = update(state, x, np.ones(3))
    m, v, t = state.state
    expected = update(state, x, np.ones(3))
    got = call(Leaf(Adam(), type(state.state)(m, v, t[()])), x, np.ones(3))
    assert_same_bits([got[0].state, got[1]], [expected[0].state, expected[1]])


@BOTH
def test_states_of_another_layout_than_the_parameter(call):
    """After the model was reloaded in another memory order, say."""
    g = normal((4, 3), seed=2)
    x = normal((4, 3))
    state, x = update(setup(Momentum(), x), x, g)
    expected = update(state, x, g)
    for order in "CF":
        for layout in LAYOUTS:
            if layout == "broadcast":
                continue
            s = copy.deepcopy(state)
            s.state = s.state._make([LAYOUTS[layout](s.state.v)])
            leaf, new = call(s, np.array(x, order=order), g)
            assert_same_bits([native(leaf.state.v), new], [expected[0].state.v, expected[1]])


def test_the_state_fits_another_model_of_the_same_shape():
    model = {"w": np.ones(3)}
    state = setup(Momentum(0.5), model)
    _, other = update_(state, {"w": np.full(3, 5.0)}, {"w": np.ones(3)})
    np.testing.assert_array_equal(other["w"], 4.5)
    np.testing.assert_array_equal(model["w"], 1)


# --- copying, pickling, printing -------------------------------------------------------------


def tied_model():
    w = np.ones((2, 3))
    return {"encoder": w, "decoder": w, "bias": np.zeros(2)}


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
    **{f"pickle {p}": lambda x, p=p: pickle.loads(pickle.dumps(x, p)) for p in range(2, 6)},
}


@parametrize("how", COPIES)
def test_copies_of_state_trees_keep_ties(how):
    state = setup(OptimiserChain(ClipGrad(), Adam()), tied_model())
    freeze_(state["bias"])
    twin = COPIES[how](state)
    assert twin["encoder"] is twin["decoder"]
    assert twin["bias"] is not twin["encoder"]
    assert twin["bias"].frozen
    assert not twin["encoder"].frozen
    assert twin["encoder"].rule == state["encoder"].rule
    assert type(twin["encoder"].state) is tuple
    assert_same_bits(twin, state)
    if how != "copy.copy":
        assert share_memory(twin, state) == []


@parametrize("how", [k for k in COPIES if k != "copy.copy"])
@parametrize("rule", [example(cls) for cls in PUBLIC])
def test_states_of_every_rule_survive_copying(rule, how):
    model = {"w": np.ones(3, np.float32)}
    state, model = update(setup(rule, model), model, {"w": np.ones(3)})
    twin = COPIES[how](state)
    assert twin["w"].rule == rule
    assert type(twin["w"].state) is type(state["w"].state)
    assert_same_bits(
        update(twin, model, {"w": np.ones(3)}), update(state, model, {"w": np.ones(3)})
    )


def test_a_shallow_copy_of_a_leaf_is_another_leaf():
    leaf = setup(Momentum(), np.ones(2))
    twin = copy.copy(leaf)
    assert twin is not leaf
    assert twin.state is leaf.state


def test_repr_of_a_leaf():
    leaf = setup(Adam(), np.zeros(2))
    text = (
        "Leaf(Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08), "
        "AdamState(m=array([0., 0.]), v=array([0., 0.]), t=array(0))"
    )
    assert repr(leaf) == text + ")"
    freeze_(leaf)
    assert repr(leaf) == text + ", frozen=True)"
    assert repr(setup(Descent(), np.zeros(2))) == "Leaf(Descent(eta=0.1), ())"


@parametrize("rule", [example(cls) for cls in PUBLIC])
def test_repr_of_a_rule_can_be_pasted_back(rule):
    names = {"inf": math.inf} | {cls.__name__: cls for cls in PUBLIC}
    assert eval(repr(rule), names) == rule
    leaf = setup(rule, np.zeros(2))
    assert repr(leaf).startswith(f"Leaf({rule!r}, ")


def test_leaves_are_mutable_and_made_by_hand():
    leaf = Leaf(Descent(0.5), ())
    assert (leaf.rule, leaf.state, leaf.frozen) == (Descent(0.5), (), False)
    leaf.rule, leaf.frozen = Descent(1.0), True
    assert repr(leaf) == "Leaf(Descent(eta=1.0), (), frozen=True)"
    leaf.frozen = False
    _, new = update(leaf, np.ones(2), np.ones(2))
    np.testing.assert_array_equal(new, 0)
    assert collections.Counter([leaf, leaf])[leaf] == 2  # hashed by identity
