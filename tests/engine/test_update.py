"""What update and update_ promise (section 3 of the specification), sentence by sentence."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from updates import DTYPES, Data, Layer, Point, both_kinds
from util import (
    BOTH,
    ELEMENTWISE,
    LAYOUTS,
    PUBLIC,
    arrays_in,
    assert_near,
    assert_same_bits,
    example,
    normal,
    parametrize,
    share_memory,
    snapshot,
)

from optimisers import (
    Adam,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    adjust,
    adjust_,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._engine import advance as engine

# --- the pure update -------------------------------------------------------------------------


def shared_rules():
    rules = [example(cls) for cls in PUBLIC]
    return [r for r in rules if not isinstance(r, MixedPrecision)] + [MixedPrecision(Adam())]


@parametrize("rule", shared_rules())
@parametrize("dtype", ["float32", "float16"])
def test_update_shares_no_memory_with_what_it_was_given(rule, dtype):
    model = {k: LAYOUTS[k](normal((4, 3), dtype)) for k in LAYOUTS}
    model |= {"frozen": normal(3, dtype), "none": normal(3, dtype), "missing": normal(3, dtype)}
    state = setup(rule, model)
    freeze_(state["frozen"])
    grad = {k: normal((4, 3), dtype, 2) for k in LAYOUTS} | {
        "frozen": normal(3, dtype),
        "none": None,
    }
    for _ in range(4):  # AccumGrad releases at the third
        before = snapshot([state, model, grad])
        new_state, new_model = update(state, model, grad)
        assert snapshot([state, model, grad]) == before
        assert share_memory([new_state, new_model], [state, model, grad]) == []
        assert all(a.flags.writeable for _, a in arrays_in(new_model))
        state, model = new_state, new_model


def test_update_copies_where_nothing_trains_a_step():
    state, model, grad = both_kinds()
    for nothing in (None, {}, (), {"kernels": None, "arrays": (), "strided": None}):
        new_state, new_model = update(state, model, nothing)
        assert_same_bits([new_state, new_model], [state, model])
        assert share_memory([new_state, new_model], [state, model]) == []
    freeze_(state)
    new_state, new_model = update(state, model, grad)
    assert_same_bits([new_state, new_model], [state, model])
    assert share_memory([new_state, new_model], [state, model]) == []
    assert new_state["kernels"].frozen


def test_update_makes_new_containers_and_carries_the_rest():
    function = len
    model = {
        "w": np.ones(2),
        "list": [np.ones(1), 7],
        "f": function,
        "ints": np.arange(3),
        "s": "x",
    }
    state = setup(Descent(), model)
    new_state, new_model = update(state, model, {"w": np.ones(2)})
    assert new_model is not model
    assert new_model["list"] is not model["list"]
    assert new_state is not state
    assert new_state["w"] is not state["w"]
    assert new_model["ints"] is model["ints"]
    assert (new_model["f"], new_model["s"], new_model["list"][1]) == (function, "x", 7)


def test_update_does_not_touch_hyperparameters_or_identity_of_rules():
    state, model, grad = both_kinds()
    new_state, _ = update(state, model, grad)
    assert all(new_state[k].rule is state[k].rule for k in state)


# --- the update in place ---------------------------------------------------------------------


def test_update_in_place_returns_what_it_was_given():
    state, model, grad = both_kinds()
    leaves, arrays = dict(state), dict(model)
    new_state, new_model = update_(state, model, grad)
    assert new_state is state
    assert new_model is model
    assert all(state[k] is leaves[k] and model[k] is arrays[k] for k in model)


@parametrize("rule", [example(cls) for cls in PUBLIC])
@parametrize("dtype", DTYPES)
def test_update_in_place_equals_update(rule, dtype):
    if dtype == "complex128" and getattr(rule, "real_only", False):
        return
    model = {k: LAYOUTS[k](normal((4, 3), dtype)) for k in LAYOUTS}
    state = setup(rule, model)
    state_, model_ = copy.deepcopy(state), {k: LAYOUTS[k](normal((4, 3), dtype)) for k in LAYOUTS}
    for seed in range(1, 5):
        grad = {k: normal((4, 3), dtype, seed) for k in LAYOUTS}
        state, model = update(state, model, grad)
        state_, model_ = update_(state_, model_, grad)
        native = [
            {k: x.astype(x.dtype.newbyteorder("=")) for k, x in m.items()} for m in (model, model_)
        ]
        # The pure update gives plain arrays, and NumPy sums those in another order.
        same = assert_same_bits if type(rule) in ELEMENTWISE else assert_near
        same([state, native[0]], [state_, native[1]])


@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
def test_state_arrays_are_written_in_place(rule):
    x = normal((3, 2), np.float32)
    leaf = setup(rule, x)
    before = list(arrays_in(leaf.state))
    update_(leaf, x, x.copy())
    assert [id(a) for _, a in before] == [id(a) for _, a in arrays_in(leaf.state)]


def test_read_only_arrays_are_replaced_in_the_returned_model():
    model = {
        "a": np.ones(3),
        "fixed": LAYOUTS["read-only"](np.ones(3)),
        "deep": [np.ones(2, "f2"), 5],
    }
    model["deep"].append(LAYOUTS["read-only"](np.ones(2, np.float16)))
    state = setup(Momentum(0.5), model)
    writable = model["a"], model["deep"][0]
    before = model["fixed"].copy(), model["deep"][2].copy()
    new_state, new = update_(
        state, model, {"a": np.ones(3), "fixed": np.ones(3), "deep": [np.ones(2), None, np.ones(2)]}
    )
    assert new_state is state
    assert new is not model
    assert new["a"] is writable[0]
    assert new["deep"][0] is writable[1]
    np.testing.assert_array_equal(new["a"], 0.5)
    np.testing.assert_array_equal(new["fixed"], 0.5)
    np.testing.assert_array_equal(new["deep"][2], 0.5)
    np.testing.assert_array_equal(model["fixed"], before[0])
    np.testing.assert_array_equal(model["deep"][2], before[1])
    np.testing.assert_array_equal(state["fixed"].state.v, 0.5)


def test_read_only_arrays_without_a_gradient_stay():
    model = {"a": np.ones(3), "fixed": LAYOUTS["read-only"](np.ones(3))}
    state = setup(Momentum(0.5), model)
    _, new = update_(state, model, {"a": np.ones(3)})
    assert new is model


@BOTH
@parametrize("layout", LAYOUTS)
@parametrize("dtype", ["float32", "float16", "complex64"])
def test_a_parameter_keeps_its_dtype(layout, dtype, call):
    model = {"w": LAYOUTS[layout](normal((4, 3), dtype))}
    state = setup(Adam(), model)
    expected = model["w"].dtype
    for _ in range(2):
        state, model = call(state, model, {"w": normal((4, 3))})
        assert model["w"].dtype == expected
        assert state["w"].state.m.dtype == np.dtype(dtype)


# --- no gradient, and zero gradient ----------------------------------------------------------


def nested():
    return {
        "dict": {"a": np.ones(2), "b": np.ones(2, "f2")},
        "list": [np.ones(2), np.ones(2)],
        "tuple": (np.ones(2), "text"),
        "named": Point(np.ones(2), np.ones(1)),
        "object": Layer(np.ones(2), np.ones(1)),
        "data": Data(np.ones(2), np.ones(1)),
        "space": SimpleNamespace(a=np.ones(2)),
    }


NOTHING = [
    None,
    (),
    {},
    {"dict": None, "list": None, "tuple": None, "named": None, "object": None, "data": None},
    {"dict": (), "list": (), "tuple": (), "named": (), "object": (), "data": (), "space": ()},
    {"dict": {}, "object": {}, "data": {}, "space": SimpleNamespace()},
    {
        "dict": {"a": None, "b": ()},
        "list": [None, ()],
        "tuple": (None, None),
        "named": Point(None, ()),
    },
    {"object": Layer(None, None), "data": Data(None, ()), "space": SimpleNamespace(a=None)},
    {
        "object": {"weight": None, "bias": ()},
        "data": SimpleNamespace(weight=()),
        "space": {"a": None},
    },
]


@BOTH
@pytest.mark.parametrize("nothing", NOTHING)
def test_no_gradient_means_no_step_and_no_change_of_state(call, nothing):
    model = nested()
    state = setup(Adam(), model)
    state, model = call(state, model, only_arrays(model))
    before = [(p, a.copy()) for p, a in arrays_in([state, model])]
    with engine.watching() as seen:
        state, model = call(state, model, nothing)
    assert seen == []
    after = list(arrays_in([state, model]))
    assert len(after) == len(before) > 20
    for (place, a), (other, b) in zip(before, after, strict=True):
        assert place == other
        np.testing.assert_array_equal(a, b)


def only_arrays(model):
    """Return a gradient of ones in the structure of `nested`."""
    return {
        "dict": {"a": np.ones(2), "b": np.ones(2)},
        "list": [np.ones(2), np.ones(2)],
        "tuple": (np.ones(2), None),
        "named": Point(np.ones(2), np.ones(1)),
        "object": {"weight": np.ones(2), "bias": np.ones(1)},
        "data": SimpleNamespace(weight=np.ones(2), bias=np.ones(1)),
        "space": {"a": np.ones(2)},
    }


@parametrize("dtype", DTYPES)
def test_a_zero_gradient_is_a_step(dtype):
    model = {"zero": np.ones(2, dtype), "none": np.ones(2, dtype)}
    state = setup(Adam(0.1), model)
    update_(state, model, {"zero": np.ones(2), "none": np.ones(2)})
    np.testing.assert_array_equal(model["zero"], model["none"])
    update_(state, model, {"zero": np.zeros(2), "none": None})
    assert (int(state["zero"].state.t), int(state["none"].state.t)) == (2, 1)
    assert np.all(model["zero"] != model["none"])  # the momentum goes on


@BOTH
def test_a_missing_first_gradient_means_no_step_even_with_higher_ones(call):
    x = np.ones(3)
    state = setup(Momentum(), {"w": x})
    new_state, new = call(state, {"w": x}, {"w": None}, {"w": np.ones(3)})
    np.testing.assert_array_equal(new["w"], 1)
    np.testing.assert_array_equal(new_state["w"].state.v, 0)


# --- deep trees ------------------------------------------------------------------------------

DEPTH = 5000
DEEP = {
    "dict": lambda x: {"k": x},
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "namedtuple": lambda x: Point(x, None),
    "SimpleNamespace": lambda x: SimpleNamespace(k=x),
    "dataclass": lambda x: Data(x, None),
    "functor": lambda x: Layer(x, None),
}


def deep(kind, x):
    for _ in range(DEPTH):
        x = DEEP[kind](x)
    return x


def bottom(tree):
    while not isinstance(tree, np.ndarray | Leaf):
        if isinstance(tree, dict):
            tree = tree["k"]
        elif isinstance(tree, list | tuple):
            tree = tree[0]
        else:
            tree = tree.k if isinstance(tree, SimpleNamespace) else tree.weight
    return tree


@parametrize("kind", DEEP)
def test_deep_trees(kind):
    assert sys.getrecursionlimit() < DEPTH
    model, grad = deep(kind, np.ones(2)), deep(kind, np.ones(2))
    state = setup(Descent(0.25), model)
    state, model = update(state, model, grad)
    np.testing.assert_array_equal(bottom(model), 0.75)
    update_(state, model, grad)
    np.testing.assert_array_equal(bottom(model), 0.5)
    state = adjust(state, 0.5)
    update_(state, model, grad)
    np.testing.assert_array_equal(bottom(model), 0)
    adjust_(state, 1.0)
    freeze_(state)
    update_(state, model, grad)
    np.testing.assert_array_equal(bottom(model), 0)
    thaw_(state)
    update_(state, model, grad)
    np.testing.assert_array_equal(bottom(model), -1)
    with pytest.raises(ValueError, match="expected an array of shape"):
        update_(state, model, deep(kind, np.ones(3)))


# --- freezing --------------------------------------------------------------------------------


@BOTH
def test_frozen_leaves_change_neither_parameter_nor_state(call):
    state, model, grad = both_kinds()
    state, model = call(state, model, grad)
    freeze_(state["arrays"])
    freeze_(state["strided"])
    before = copy.deepcopy([state, model])
    state, model = call(state, model, grad)
    for key in ("arrays", "strided"):
        assert_same_bits([state[key], model[key]], [before[0][key], before[1][key]])
    assert np.all(model["kernels"] != before[1]["kernels"])


GARBAGE = [
    17,
    "text",
    object(),
    np.ones(77),
    np.array(["a"]),
    [1, 2, 3],
    {"no": 1},
    1j * np.ones(2),
]


@BOTH
@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: type(g).__name__)
def test_gradients_below_frozen_leaves_are_not_looked_at(call, garbage):
    model = {
        "on": np.ones(2),
        "off": {"list": [np.ones(2), Layer(np.ones(2), np.ones(1))], "w": np.ones(2)},
    }
    state = setup(Descent(0.5), model)
    freeze_(state["off"])
    for below in (
        garbage,
        {"list": garbage, "w": garbage},
        {"list": [garbage, garbage]},
        {"list": [garbage, {"weight": garbage, "more": 1}], "more": 2},
    ):
        _, new = call(state, copy.deepcopy(model), {"on": np.ones(2), "off": below})
        np.testing.assert_array_equal(new["on"], 0.5)
        np.testing.assert_array_equal(new["off"]["w"], 1)


def test_below_a_partly_frozen_node_gradients_must_fit():
    model = {"a": np.ones(2), "b": np.ones(2)}
    state = setup(Descent(), model)
    freeze_(state["a"])
    with pytest.raises(TypeError, match="dict with 'a', 'b'"):
        update(state, model, "text")
    with pytest.raises(ValueError, match="'c'"):
        update(state, model, {"c": 1})
    _, new = update(state, model, {"a": "text", "b": np.ones(2)})
    np.testing.assert_array_equal(new["b"], 0.9)
