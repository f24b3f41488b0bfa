"""What update and update_ promise (section 3 of the specification), sentence by sentence."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import pickle
import sys
from collections import OrderedDict, defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from util import (
    BOTH,
    ELEMENTWISE,
    LAYOUTS,
    PUBLIC,
    arrays_in,
    assert_near,
    assert_same_bits,
    example,
    native,
    normal,
    parametrize,
    share_memory,
    snapshot,
    step,
)

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    adjust,
    adjust_,
    destructure,
    freeze_,
    functor,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._engine import advance as engine

DTYPES = ["float32", "float64", "float16", "complex128"]


def both_kinds(rule=None):
    """Return a model whose leaves take both paths, its state and a gradient."""
    model = {
        "kernels": np.arange(3.0),
        "arrays": np.arange(4, dtype=np.float16),
        "strided": np.arange(8.0)[::2],
    }
    state = setup(rule or OptimiserChain(WeightDecay(0.1), Adam()), model)
    return state, model, {key: np.full(x.shape, 0.5) for key, x in model.items()}


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
        same = assert_same_bits if isinstance(rule, ElementwiseRule) else assert_near
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


class Point(NamedTuple):
    x: object
    y: object


@functor
class Layer:
    def __init__(self, weight, bias, name="layer"):
        self.weight, self.bias, self.name = weight, bias, name

    def __call__(self, x):
        return self.weight @ x + self.bias


@dataclasses.dataclass
class Data:
    weight: object
    bias: object
    size: int = 3


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


# --- structure of gradients ------------------------------------------------------------------


GRADIENTS_OF_OBJECTS = [
    {"weight": np.full(2, 2.0), "bias": np.ones(1)},
    SimpleNamespace(weight=np.full(2, 2.0), bias=np.ones(1)),
    OrderedDict(bias=np.ones(1), weight=np.full(2, 2.0)),
    defaultdict(dict, weight=np.full(2, 2.0), bias=np.ones(1)),
]


@BOTH
@pytest.mark.parametrize("kind", [Layer, Data])
@pytest.mark.parametrize("grad", GRADIENTS_OF_OBJECTS, ids=lambda g: type(g).__name__)
def test_an_object_takes_its_gradient_as_dict_namespace_or_its_like(call, kind, grad):
    for g in (grad, kind(np.full(2, 2.0), np.ones(1))):
        model = kind(np.ones(2), np.ones(1))
        state, new = call(setup(Descent(0.5), model), model, g)
        np.testing.assert_array_equal(new.weight, 0)
        np.testing.assert_array_equal(new.bias, 0.5)
        assert type(new) is kind
        assert isinstance(state, SimpleNamespace)


@BOTH
def test_a_gradient_with_attributes_missing(call):
    model = Layer(np.ones(2), np.ones(1))
    state, new = call(setup(Momentum(0.5), model), model, {"bias": np.ones(1)})
    np.testing.assert_array_equal(new.weight, 1)
    np.testing.assert_array_equal(new.bias, 0.5)
    np.testing.assert_array_equal(state.weight.state.v, 0)


@BOTH
def test_dictionaries_may_be_in_another_order(call):
    model = {"a": np.array([1.0]), "b": np.array([2.0])}
    grad = {"b": np.array([2.0]), "a": np.array([1.0])}
    state = dict(reversed(setup(Descent(1.0), model).items()))
    _, new = call(state, model, grad)
    assert list(new) == ["a", "b"]
    assert_same_bits(new, {"a": np.zeros(1), "b": np.zeros(1)})


@BOTH
@pytest.mark.parametrize(("model", "grad"), [([1], (1,)), ((1,), [1]), (Point(1, 1), (1, 1))])
def test_lists_and_tuples_stand_in_for_each_other(model, grad, call):
    make = model._make if hasattr(model, "_make") else type(model)
    x = make([np.full(2, 1.0 + k) for k in range(len(model))])
    g = type(grad)([np.ones(2)] * len(grad))
    _, new = call(setup(Descent(1.0), x), x, g)
    assert type(new) is type(model)
    np.testing.assert_array_equal(new[0], 0)


NODES = {
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "defaultdict": lambda a, b: defaultdict(list, a=a, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "namedtuple": Point,
    "SimpleNamespace": lambda a, b: SimpleNamespace(a=a, b=b),
    "dataclass": Data,
    "functor": Layer,
    "keys that are no names": lambda a, b: {0: a, ("x", 1): b},
    "nested": lambda a, b: {"outer": [Data((a,), {"k": b})]},
}


@BOTH
@parametrize("kind", NODES)
def test_every_kind_of_node(kind, call):
    make = NODES[kind]
    model = make(np.array([1.0, 2.0]), np.array([3.0], np.float16))
    state = setup(Momentum(0.5), model)
    grad = make(np.array([1.0, 1.0]), np.array([1.0]))
    for _ in range(2):
        state, model = call(state, model, grad)
    expected = make(np.array([1 - 1.45, 2 - 1.45]), np.array([3 - 1.45]))
    assert type(model) is type(expected)
    got = [a for _, a in arrays_in(model)]
    wanted = [a for _, a in arrays_in(expected)]
    assert len(got) == len(wanted) == 2
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    if kind == "defaultdict":
        assert model.default_factory is list


def test_states_of_objects_have_the_names_of_their_attributes():
    model = SimpleNamespace(layers=[Layer(np.ones(2), np.ones(1)), Data(np.ones(2), np.ones(1))])
    state = setup(Momentum(), model)
    assert isinstance(state.layers[0].bias, Leaf)
    assert isinstance(state.layers[1].weight, Leaf)
    assert (state.layers[0].name, state.layers[1].size) == ((), ())


@BOTH
def test_shared_containers_stay_shared(call):
    inner = {"w": np.ones(2)}
    model = {"one": inner, "two": inner, "list": [inner]}
    state = setup(Descent(0.5), model)
    assert state["one"] is state["two"]
    state, new = call(state, model, {"one": {"w": np.ones(2)}, "list": [{"w": np.ones(2)}]})
    assert new["one"] is new["two"] is new["list"][0]
    assert state["one"] is state["two"] is state["list"][0]
    np.testing.assert_array_equal(new["one"]["w"], 0)  # one parameter, gradients summed


@BOTH
def test_non_trainable_parts_are_not_looked_at(call):
    @functor(children=("a", "c"), trainable=("a",))
    class Affine:
        def __init__(self, a, c):
            self.a, self.c = a, c

    model = {"affine": Affine(np.ones(2), np.ones(2)), "text": {"name": "x"}}
    state = setup(Descent(0.5), model)
    assert state["affine"].c == ()
    grad = {"affine": {"a": np.ones(2), "c": "rubbish"}, "text": 17}
    _, new = call(state, model, grad)
    np.testing.assert_array_equal(new["affine"].a, 0.5)
    np.testing.assert_array_equal(new["affine"].c, 1)


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


# --- gradients that alias --------------------------------------------------------------------


ALIASED = [Descent(0.5), Adam(), OptimiserChain(ClipNorm(1.0), Momentum()), MixedPrecision(Adam())]


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_gradients_that_are_parameters(call, dtype, rule):
    a, b = normal(3000, dtype, 1), normal(3000, dtype, 2)
    model = {"a": a.copy(), "b": b.copy()}
    expected = update(setup(rule, model), model, {"a": b, "b": a})
    got = call(setup(rule, model), model, {"a": model["b"], "b": model["a"]})
    assert_same_bits(got, expected)


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_the_gradient_is_the_parameter(call, dtype, rule):
    model = {"a": normal(3000, dtype)}
    state = setup(rule, model)
    for _ in range(3):
        expected = update(copy.deepcopy(state), model, {"a": model["a"].copy()})
        state, model = call(state, model, model)
        assert_same_bits([state, model], expected)


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", ALIASED)
def test_gradients_that_overlap_parameters_in_part(call, dtype, rule):
    room = normal(9000, dtype)
    views = {"a": slice(0, 3000), "b": slice(3000, 6000)}
    others = {"a": slice(1500, 4500), "b": slice(5999, 2999, -1)}
    plain = {k: room[s].copy() for k, s in views.items()}
    grad = {k: room[s].copy() for k, s in others.items()}
    expected = update(setup(rule, plain), plain, grad)
    model = {k: room[s] for k, s in views.items()}
    got = call(setup(rule, model), model, {k: room[s] for k, s in others.items()})
    assert_near(got, expected)  # NumPy may add up the norm of a reversed array in another order


@BOTH
@parametrize("dtype", DTYPES)
def test_gradients_that_alias_state(call, dtype):
    x = normal(3000, dtype)
    model = {"a": x.copy(), "b": x.copy()}
    state = setup(Momentum(), model)
    update_(state, model, {"a": x, "b": x})
    v = state["a"].state.v
    expected = update(copy.deepcopy(state), model, {"a": v.copy(), "b": v.copy()})
    got = call(state, model, {"a": v, "b": v})
    assert_same_bits(got, expected)


@BOTH
def test_gradients_that_alias_across_both_paths(call):
    """A gradient of the kernels lies in a parameter of the array path, and the other way round."""
    room = np.ones(8, np.float64)
    half = np.full(8, 2.0)
    model = {"kernels": half, "arrays": room[::2]}
    plain = {k: x.copy() for k, x in model.items()}
    grad = {"kernels": room, "arrays": half[::2]}
    expected = update(setup(Descent(0.5), plain), plain, {k: g.copy() for k, g in grad.items()})[1]
    assert_same_bits(call(setup(Descent(0.5), model), model, grad)[1], expected)


@BOTH
@parametrize("dtype", ["float64", "float16"])
def test_one_gradient_array_for_many_parameters(call, dtype):
    model = {k: normal(5, dtype, k) for k in range(4)}
    g = normal(5, dtype, 9)
    expected = {k: update(setup(Adam(), x), x, g.copy())[1] for k, x in model.items()}
    assert_same_bits(call(setup(Adam(), model), model, dict.fromkeys(model, g))[1], expected)


# --- gradients of other kinds ----------------------------------------------------------------


@BOTH
@parametrize("dtype", DTYPES)
@parametrize(
    "given", ["int8", "uint16", "int64", "bool", "float16", "float32", "float64", "longdouble"]
)
def test_gradients_of_another_dtype_are_cast(given, dtype, call):
    g = np.array([1, 0, 3, 1], given)
    x = np.ones(4, dtype)
    _, new, used = step(call, setup(Descent(0.5), x), x, g)
    assert new.dtype == dtype
    np.testing.assert_array_equal(new, 1 - 0.5 * g.astype(dtype))
    by_kernels = dtype in ("float16", "float32", "float64")
    assert used == {"(root)": "kernels" if by_kernels else "arrays"}


@BOTH
def test_casts_that_overflow_do_so_quietly(call):
    x = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)}
    _, new = call(setup(Descent(1.0), x), x, {"a": np.full(2, 1e300), "b": np.full(2, 1e300)})
    np.testing.assert_array_equal(new["a"], -np.inf)
    np.testing.assert_array_equal(new["b"], -np.inf)


@BOTH
def test_real_gradients_of_complex_parameters(call):
    x = np.array([1 + 1j, 2])
    _, new = call(setup(Descent(0.5), x), x, np.array([1.0, 2.0]))
    np.testing.assert_array_equal(new, [0.5 + 1j, 1])


@BOTH
def test_numbers_are_gradients_of_arrays_without_dimensions(call):
    model = [np.array(3.0), np.array(3.0), np.array(3.0, np.float32), np.array(3.0, np.float16)]
    _, new = call(setup(Descent(0.5), model), model, [2, np.float32(2), np.array(2), 2.0])
    assert all(isinstance(x, np.ndarray) and x.shape == () for x in new)
    assert [float(x) for x in new] == [2.0] * 4
    assert [x.dtype for x in new] == ["f8", "f8", "f4", "f2"]


@BOTH
@parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_gradients_from_jax(dtype, call):
    jnp = pytest.importorskip("jax.numpy")
    x = np.ones(3, dtype)
    g = jnp.array([1.0, 2.0, 3.0], "float32")
    _, new, _ = step(call, setup(Descent(0.5), x), x, g)
    assert type(new) is np.ndarray
    np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))
    _, new = call(setup(Descent(0.5), np.ones(3, dtype)), np.ones(3, dtype), g.astype("bfloat16"))
    np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))


@BOTH
@parametrize("dtype", ["float32", "float64", "float16", "complex64"])
def test_gradients_from_torch(dtype, call):
    torch = pytest.importorskip("torch")
    x = np.ones(3, dtype)
    for g in (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0])[::2],
    ):
        _, new = call(setup(Descent(0.5), x.copy()), x.copy(), g)
        np.testing.assert_array_equal(new, np.array([0.5, 0, -0.5], dtype))


def test_gradients_from_torch_that_numpy_does_not_know():
    torch = pytest.importorskip("torch")
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    _, new = update(setup(Descent(0.5), np.ones(3)), np.ones(3), g)
    np.testing.assert_array_equal(new, [0.5, 0, -0.5])


@BOTH
def test_symbolic_zeros_of_jax_are_no_gradients(call):
    jax = pytest.importorskip("jax")
    float0 = np.zeros(3, jax.dtypes.float0)
    zero = jax.custom_derivatives.SymbolicZero(jax.core.ShapedArray((3,), np.float32))
    model = {"a": np.ones(3), "b": np.ones(3, np.float16), "c": np.ones(3, np.float32)}
    state = setup(Adam(), model)
    state, new = call(state, model, {"a": float0, "b": float0, "c": zero})
    assert [int(state[k].state.t) for k in "abc"] == [0, 0, 0]
    assert_same_bits(
        new, {"a": np.ones(3), "b": np.ones(3, np.float16), "c": np.ones(3, np.float32)}
    )


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


# --- all or nothing --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scribbler(Rule):
    """A rule that spoils what it can reach, and then raises when it meets its trigger."""

    how: str = "state"
    eta: float = 0.1

    def init(self, x):
        return {"v": np.zeros_like(x), "log": [], "count": 0}

    def apply(self, state, x, dx):
        state["v"][...] = 99
        state["log"].append("was here")
        state["count"] += 1
        if np.any(dx == 666):
            if self.how == "x":
                x[...] = 99
            elif self.how == "dx":
                dx[...] = 99
            elif self.how == "shape":
                return state, np.ones((5, 7, 2))
            elif self.how == "norm":
                raise FloatingPointError("no number")
            raise KeyError("stop here")
        return state, self.eta * dx


def refused(error, match, state, model, grad, *higher):
    """Check that both updates raise, and change nothing at all."""
    before = snapshot([state, model, grad])
    for call in (update, update_):
        with pytest.raises(error, match=match) as caught:
            call(state, model, grad, *higher)
        assert snapshot([state, model, grad]) == before, call.__name__
    return caught.value


@parametrize("how", ["state", "x", "dx", "shape", "norm"])
def test_a_rule_that_raises_at_a_late_leaf(how):
    model = {k: np.ones(3, "f4" if k % 2 else "f2") for k in range(20)}
    state = {k: setup(Scribbler(how) if k % 3 else Adam(), x) for k, x in model.items()}
    grad = {k: np.ones(3) for k in model}
    state, model = update(state, model, grad)
    grad[16] = np.array([1, 666, 1.0])
    error, text = {
        "state": (KeyError, "stop here"),
        "x": (ValueError, "read-only"),
        "dx": (ValueError, "read-only"),
        "shape": (ValueError, "Scribbler"),
        "norm": (FloatingPointError, r"at \[16\]: no number"),
    }[how]
    caught = refused(error, text, state, model, grad)
    if how != "norm":
        notes = "\n".join(caught.__notes__)
        assert "[16]" in notes
        assert "Scribbler" in notes
        assert "nothing was updated" in notes


def test_a_chain_with_a_rule_that_scribbles_and_raises():
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = setup(OptimiserChain(Momentum(), Scribbler(), Adam()), model)
    state, model = update(state, model, {"a": np.ones(3), "b": np.ones(3)})
    raising = {"a": np.ones(3), "b": np.ones(3)}
    state["b"].state[0].v[...] = 0
    raising["b"] = np.full(3, 66600.0)  # momentum makes 666 of it
    refused(KeyError, "stop here", state, model, raising)


@dataclasses.dataclass(frozen=True)
class Impure(ElementwiseRule):
    """A step that writes into its slots, which it should not, and may raise afterwards."""

    eta: float = 0.5
    slots = ("v",)

    def coefs(self):
        return (self.eta,)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        v += dx
        if np.any(dx == 666):
            raise KeyError("stop here")
        return v, (v,)


def test_an_elementwise_step_that_writes_into_its_slots():
    """It is refused, or works on copies; what was there before stays."""
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = setup(Impure(), model)
    refused((KeyError, ValueError), None, state, model, {"a": np.ones(3), "b": np.full(3, 666.0)})
    before = snapshot(state)
    with contextlib.suppress(ValueError):
        update(state, model, {"a": np.ones(3)})
    assert snapshot(state) == before


@parametrize("bad", [np.nan, np.inf])
@parametrize("dtype", ["float32", "float64", "float16"])
@parametrize("wrap", [OptimiserChain, MixedPrecision])
def test_a_norm_late_in_a_chain_that_throws(bad, dtype, wrap):
    inner = OptimiserChain(Adam(), AccumGrad(1))
    rule = wrap(OptimiserChain(Momentum(), inner, ClipNorm(1.0), WeightDecay()))
    model = {k: np.ones(2000, dtype) for k in range(12)}
    state = setup(rule, model)
    state, model = update(state, model, {k: np.ones(2000) for k in model})
    grad = {k: np.ones(2000) for k in model}
    grad[10][1999] = bad
    refused(FloatingPointError, r"at \[10\]: ClipNorm: .*throw=False", state, model, grad)


def test_a_norm_on_the_array_path_throws_before_the_kernels_write():
    model = {"kernels": np.ones(3), "arrays": np.ones(3, np.float16)}
    state = setup(OptimiserChain(Adam(), ClipNorm()), model)
    grad = {"kernels": np.ones(3), "arrays": np.array([1, np.nan, 1])}
    refused(FloatingPointError, r"at \['arrays'\]", state, model, grad)
    grad = {"kernels": np.array([1, np.nan, 1]), "arrays": np.ones(3)}
    refused(FloatingPointError, r"at \['kernels'\]", state, model, grad)


def test_a_wrong_gradient_at_the_last_leaf():
    state, model, grad = both_kinds()
    model["last"] = np.ones((2, 3))
    state["last"] = setup(Adam(), model["last"])
    for wrong in (np.ones((3, 2)), np.ones((2, 3)) * 1j, "text", np.ones((1, 2, 3))):
        refused((ValueError, TypeError), r"\['last'\]", state, model, {**grad, "last": wrong})
    refused(ValueError, "more", state, model, {**grad, "last": np.ones((2, 3)), "more": 1})


def test_parameters_that_overlap_without_being_tied():
    """The state was made for other arrays, so it knows of no tie."""
    state = setup(Adam(), {"a": np.ones(4), "b": np.ones(4)})
    room = np.ones(6)
    model = {"a": room[:4], "b": room[2:]}
    grad = {"a": np.ones(4), "b": np.ones(4)}
    before = snapshot([state, model])
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap"):
        update_(state, model, grad)
    assert snapshot([state, model]) == before


# --- rules of users --------------------------------------------------------------------------


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
@parametrize("rule", [example(cls) for cls in PUBLIC])
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
    names = {cls.__name__: cls for cls in PUBLIC}
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


# --- gradients of objects, and higher derivatives --------------------------------------------


@functor(children=("w",))
class Named:
    scale = 2.0

    def __init__(self):
        self.w, self.name, self.count = np.ones(2), "encoder", 3

    @property
    def size(self):
        return 2

    def forward(self):
        return self.w


@dataclasses.dataclass
class Initialised:
    w: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(2))

    def __post_init__(self):
        self.count = 3


class Attributed(dict):
    count = 3

    def __init__(self):
        super().__init__(w=np.ones(2))
        self.name = "encoder"


OBJECTS = {
    Named: ["name", "count", "scale", "size"],
    Initialised: ["count"],
    Attributed: ["name"],
}


@BOTH
@parametrize("kind", OBJECTS)
@parametrize("like", [dict, SimpleNamespace])
def test_gradients_may_name_attributes_that_are_no_children(call, kind, like):
    more = dict.fromkeys(OBJECTS[kind], np.ones(7))
    model = {"layers": [kind()]}
    grad = {"layers": [like(w=np.ones(2), **more)]}
    _, new = call(setup(Descent(0.5), model), model, grad)
    node = new["layers"][0]
    np.testing.assert_array_equal(node["w"] if kind is Attributed else node.w, 0.5)
    _flat, re = destructure(model)
    assert re.flatten_gradient(grad).tolist() == [1, 1]
    for name in ("weight", "forward", "keys", "__doc__"):
        grad = {"layers": [like(w=np.ones(2), **{name: np.ones(2)})]}
        with pytest.raises(ValueError, match=rf"\['layers'\]\[0\].*'{name}'"):
            call(setup(Descent(0.5), model), model, grad)


def test_keys_that_name_methods_of_containers_are_unknown():
    model = {"w": np.ones(2)}
    with pytest.raises(ValueError, match="'items'"):
        update(setup(Descent(), model), model, {"w": np.ones(2), "items": np.ones(2)})


@dataclasses.dataclass(frozen=True)
class FirstOrder(Rule):
    def apply(self, state, x, dx):
        return state, 0.5 * dx


@dataclasses.dataclass(frozen=True)
class FirstOrderByName(Rule):
    def apply(self, state, x, dx, *, value=None):
        assert value is None
        return state, 0.5 * dx


@dataclasses.dataclass(frozen=True)
class FirstOrderMove(Descent):
    def move(self, state, x, dx):
        return state, x - 0.5 * dx


@dataclasses.dataclass(frozen=True)
class SecondOrder(Rule):
    def apply(self, state, x, dx, ddx=None):
        return state, 0.5 * dx if ddx is None else dx / ddx


@dataclasses.dataclass(frozen=True)
class Wrapping(Rule):
    rule: Rule

    def init(self, x):
        return self.rule.init(x)

    def apply(self, state, x, dx, *higher):
        return self.rule.apply(state, x, dx, *higher)


@BOTH
@parametrize("rule", [FirstOrder(), FirstOrderByName(), SecondOrder(), FirstOrderMove()])
@parametrize(
    "wrap",
    [
        lambda rule: rule,
        lambda rule: OptimiserChain(WeightDecay(0.0), OptimiserChain(rule)),
        lambda rule: MixedPrecision("float64", rule),
        Wrapping,
    ],
)
def test_rules_are_handed_the_derivatives_that_they_take(call, rule, wrap):
    if isinstance(rule, FirstOrderMove):
        rule, wrap = rule, (lambda rule: rule)
    x, second, third = np.full(2, 4.0), np.full(2, 2.0), np.full(2, 9.0)
    for higher in ((), (second,), (second, third), (None, None)):
        _, new = call(setup(wrap(rule), x), x.copy(), np.full(2, 4.0), *higher)
        np.testing.assert_array_equal(new, 2.0)


@BOTH
@parametrize("rule", [*(example(cls) for cls in PUBLIC), FirstOrder()])
@parametrize(
    "wrong",
    [
        (ValueError, {"b": [np.ones(3)]}),
        (TypeError, {"b": [np.ones(2, complex)]}),
        (TypeError, {"b": ["text"]}),
        (ValueError, {"c": np.ones(2)}),
        (TypeError, {"b": 3.0}),
    ],
)
def test_higher_derivatives_must_fit_whatever_the_rule(call, rule, wrong):
    error, higher = wrong
    model = {"a": np.ones(2), "b": [np.ones(2)]}
    state = setup(rule, model)
    grad = {"a": np.ones(2), "b": [np.ones(2)]}
    before = snapshot([state, model])
    place = "'c'" if "c" in higher else r"\['b'\]"
    for given in ((higher,), (None, higher)):
        with pytest.raises(error, match=place):
            call(state, model, grad, *given)
    assert snapshot([state, model]) == before
