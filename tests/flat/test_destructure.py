"""The flat vector: there and back, views and copies, ties, gradients, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import re as regex
import tracemalloc
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import arrays_alone

import optimisers
from optimisers import (
    Adam,
    ElementwiseRule,
    OptimiserChain,
    WeightDecay,
    destructure,
    functor,
    setup,
    trainables,
    update_,
)
from optimisers._trees.parameters import same_elements
from optimisers.rules import _base

pytestmark = pytest.mark.elsewhere

Point = namedtuple("Point", "x y")


@dataclass
class Layer:
    weight: Any
    bias: Any
    name: str = "layer"

    def __call__(self, x):
        return x @ self.weight + self.bias


@functor(children=("a", "c"), trainable=("a",))
class Affine:
    def __init__(self, a, c, note):
        self.a, self.c, self.note = a, c, note


class Table(dict):
    """A dictionary with an attribute."""


def count(*shape, start=0, dtype=np.float64):
    return (np.arange(np.prod(shape, dtype=int)) + start).reshape(shape).astype(dtype)


def refuses(kind, *parts):
    """Expect an error whose message has these parts, in this order."""
    return pytest.raises(kind, match=".*".join(map(regex.escape, parts)))


# --- the vector ------------------------------------------------------------------------------


def test_flat_is_a_contiguous_copy():
    model = {"w": count(2, 3), "b": np.array(9.0)}
    flat, _ = destructure(model)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 9])
    assert type(flat) is np.ndarray
    assert flat.flags.c_contiguous
    assert flat.flags.owndata
    assert flat.flags.writeable
    flat[:] = 0
    np.testing.assert_array_equal(model["w"], count(2, 3))


def test_one_array_is_copied_too():
    x = count(3)
    flat, re = destructure(x)
    assert not np.shares_memory(flat, x)
    assert np.shares_memory(re(flat), flat)
    np.testing.assert_array_equal(re(flat), x)


@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(count(2, 3)),
        count(3, 2).T.copy().T.T,
        count(4, 6)[::2, ::2],
        count(2, 3)[::-1, ::-1][::-1, ::-1],
        np.broadcast_to(count(3), (2, 3)),
        count(2, 3).astype(">f8"),
    ],
)
def test_arrays_are_laid_out_in_c_order(x):
    flat, re = destructure([x])
    np.testing.assert_array_equal(flat, list(x.flat))
    np.testing.assert_array_equal(re(flat)[0], x)
    assert flat.dtype.isnative
    assert re(flat)[0].dtype.isnative


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("f2", "f2"),
        (">f4", "f4"),
        ("f2 f4", "f4"),
        ("f4 f8", "f8"),
        ("f4 c8", "c8"),
        ("f8 c8", "c16"),
        ("f8 g", "g"),
        ("bfloat16", "bfloat16"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("f2 bfloat16", "f4"),
        ("bfloat16 f2 f8", "f8"),
        ("bfloat16 f2 c8", "c8"),
        ("bfloat16 float8_e4m3fn", "f4"),
        ("float8_e4m3fn float8_e5m2", "f4"),
        ("float8_e4m3fn float8_e4m3fnuz", "f4"),
        ("float8_e4m3fn f2", "f4"),
    ],
)
def test_dtype_of_the_vector(dtypes, expected):
    def dtype(name):
        return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if "fl" in name else name)

    found = [dtype(name) for name in dtypes.split()]
    for order in (found, found[::-1]):
        model = [np.array([0.5, -2.0]).astype(d) for d in order]
        flat, re = destructure(model)
        assert flat.dtype == dtype(expected)
        for x, y in zip(re(flat), model, strict=True):
            assert x.dtype == y.dtype.newbyteorder("=")
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(re.flatten(re(flat)), flat)


@pytest.mark.filterwarnings("ignore:nothing to train")
@pytest.mark.parametrize("model", [{}, [1, "a"], None, (), {"n": np.arange(3)}, [np.zeros((0, 3))]])
def test_nothing_to_train(model):
    flat, re = destructure(model)
    assert flat.shape == (0,)
    assert flat.dtype == np.float64
    assert len(re) == 0
    new = re(np.zeros(0))
    assert type(new) is type(model)
    assert repr(new) == repr(model)
    assert type(re([])) is type(model)
    assert re.flatten(model).shape == re.flatten_gradient(None).shape == (0,)
    re.copy_into_(model, flat)
    state = setup(Adam(), flat)
    update_(state, flat, re.flatten_gradient(()))
    with refuses(ValueError, "length 0", "length 1"):
        re([1.0])


def test_overlaps_are_refused():
    x = count(5)
    with refuses(ValueError, "['a']", "['b'][0]", "overlap"):
        destructure({"a": x, "b": [x[1:]]})


def test_deep_models():
    model = [count(2), "end"]
    for _ in range(10_000):
        model = {"next": model}
    flat, re = destructure(model)
    new = re(flat + 1)
    for _ in range(10_000):
        new = new["next"]
    np.testing.assert_array_equal(new[0], [1, 2])
    assert new[1] == "end"
    while type(model) is dict:  # let go level by level
        model = model["next"]


# --- rebuilding ------------------------------------------------------------------------------


def all_kinds():
    return {
        "dict": {2: count(2), "a": count(1)},
        "list": [count(2, 2), 3, None],
        "tuple": (count(), "text", (count(0, 2),)),
        "point": Point(count(2), [count(3)]),
        "namespace": SimpleNamespace(b=count(1), a=count(2)),
        "layer": Layer(count(2, 3), count(3), "first"),
        "affine": Affine(count(2), count(2), "note"),
        "ordered": OrderedDict(z=count(1), a=count(1)),
        "default": defaultdict(list, a=count(3)),
        "alike": [count(2), count(2), count(2), count(), count()],
        "ints": np.arange(3),
        "function": print,
    }


def test_every_kind_of_node_comes_back():
    model = all_kinds()
    flat, re = destructure(model)
    new = re(flat + 100)
    assert list(new) == list(model)
    assert list(new["dict"]) == [2, "a"]
    for key, node in model.items():
        assert type(new[key]) is type(node)
    assert new["layer"].name == "first"
    assert new["affine"].note == "note"
    assert new["default"].default_factory is list
    assert list(new["ordered"]) == ["z", "a"]
    assert list(vars(new["namespace"])) == ["b", "a"]
    for x, y in zip(trainables(new), trainables(model), strict=True):
        assert type(x) is np.ndarray
        np.testing.assert_array_equal(x, y + 100)
    np.testing.assert_array_equal(destructure(new)[0], flat + 100)
    np.testing.assert_array_equal(re.flatten(new), flat + 100)


def test_what_does_not_train_is_shared():
    model = all_kinds()
    model["buffers"] = {"names": ["a", "b"], "n": 3}
    flat, re = destructure(model)
    new = re(flat)
    assert new["ints"] is model["ints"]
    assert new["function"] is print
    assert new["affine"].c is model["affine"].c
    assert new["buffers"] is model["buffers"]


def test_what_trains_elsewhere_follows_where_it_does_not_train():
    """An array is one parameter everywhere, as in `update`."""
    w = count(2)
    model = [w, Affine(count(1), {"mean": w, "n": 3}, "")]
    flat, re = destructure(model)
    assert len(re) == 3
    new = re(flat + 1)
    assert new[1].c["mean"] is new[0]


def test_rebuilding_runs_no_init():
    class Strict:
        def __init__(self, w):
            raise AssertionError

    functor(Strict)
    model = Strict.__new__(Strict)
    model.w = count(2)
    flat, re = destructure(model)
    np.testing.assert_array_equal(re(flat + 1).w, [1, 2])


def test_unflatten_of_a_user_sees_arrays_of_the_right_shape():
    class Pair:
        def __init__(self, both):
            self.both = both

    optimisers.register_node(
        Pair,
        flatten=lambda pair: {"left": pair.both[0], "right": pair.both[1]},
        unflatten=lambda pair, new: Pair(np.stack([new["left"], new["right"]])),
    )
    flat, re = destructure({"pair": Pair(count(2, 3)), "b": count(1)})
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(re(flat + 1)["pair"].both, count(2, 3) + 1)


def test_views_not_copies():
    flat, re = destructure(all_kinds())
    model = re(flat)
    for x in trainables(model):
        assert x.size == 0 or np.shares_memory(x, flat)
    model["layer"].weight[1, 2] = 77.0
    assert 77.0 in flat
    flat[:] = -1
    assert all((x == -1).all() for x in trainables(model))


def test_views_of_a_strided_vector():
    flat, re = destructure({"w": count(2, 3), "rows": [count(2), count(2)], "b": count()})
    every_other = np.zeros(2 * len(re))[::2]
    backwards = np.zeros(len(re))[::-1]
    for v in (every_other, backwards):
        v[:] = flat
        model = re(v)
        np.testing.assert_array_equal(model["w"], count(2, 3))
        assert all(np.shares_memory(x, v) for x in trainables(model))
        model["rows"][1][0] = 5
        assert v[8] == 5


def test_views_of_a_read_only_vector_are_read_only():
    flat, re = destructure({"w": count(2, 3), "rows": [count(2), count(2)], "b": count()})
    flat.flags.writeable = False
    assert not any(x.flags.writeable for x in trainables(re(flat)))
    assert all(x.flags.writeable for x in trainables(re(flat, copy=True)))


def test_views_of_a_mapped_file(tmp_path):
    flat, re = destructure([count(2, 2), count()])
    v = np.memmap(tmp_path / "v", np.float64, "w+", shape=flat.shape)
    model = re(v)
    model[0][1, 1] = 7
    assert v[3] == 7
    assert type(model[0]) is np.ndarray


def test_copies_are_arrays_of_their_own():
    flat, re = destructure(all_kinds())
    model = re(flat, copy=True)
    arrays = trainables(model)
    for x in arrays:
        assert x.flags.owndata
        assert x.flags.c_contiguous
        assert not np.shares_memory(x, flat)
    np.testing.assert_array_equal(re.flatten(model), flat)


@pytest.mark.parametrize("copy", [False, True])
def test_another_dtype_is_cast(copy):
    _, re = destructure([count(2, dtype="f4"), count(dtype="f8"), count(2, dtype="c16")])
    v = np.array([1, 2, 3, 4 + 1j, 5]) + 0.5j
    model = re(v, copy=copy)
    assert [x.dtype for x in model] == ["f4", "f8", "c16"]
    np.testing.assert_array_equal(model[0], [1, 2])
    np.testing.assert_array_equal(model[1], 3)
    np.testing.assert_array_equal(model[2], [4 + 1.5j, 5 + 0.5j])
    assert not np.shares_memory(model[0], v)
    assert np.shares_memory(model[2], v) is not copy


def test_a_cast_for_a_copy_copies_once():
    _, re = destructure([np.zeros(250_000, np.float32)])
    v = np.zeros(250_000)
    tracemalloc.start()
    try:
        re(v, copy=True)
        assert tracemalloc.get_traced_memory()[1] < 1_200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "v", [[1, 2, 3], (1.0, 2.0, 3.0), range(1, 4), np.arange(1, 4), np.float16([1, 2, 3])]
)
def test_what_reads_like_a_vector_of_numbers(v):
    _, re = destructure([count(2), count()])
    first, second = re(v)
    np.testing.assert_array_equal(first, [1.0, 2.0])
    np.testing.assert_array_equal(second, 3.0)
    assert first.dtype == second.dtype == np.float64


def test_casts_that_overflow_do_so_quietly():
    _, re = destructure([count(2, dtype="f4")])
    np.testing.assert_array_equal(re([1e300, 0.0])[0], np.float32([np.inf, 0]))


@pytest.mark.parametrize(
    ("v", "got"),
    [
        (np.zeros(2), "length 2"),
        (np.zeros(4), "length 4"),
        (np.zeros((3, 1)), "shape (3, 1)"),
        (np.float64(1.0), "shape ()"),
        ([], "length 0"),
    ],
)
def test_vectors_that_do_not_fit(v, got):
    _, re = destructure([count(2), count()])
    with refuses(ValueError, "expected a vector of length 3", got):
        re(v)
    with refuses(ValueError, "expected a vector of length 3", got):
        re.copy_into_([count(2), count()], v)


@pytest.mark.parametrize("v", [["a", "b", "c"], [None] * 3, np.zeros(3, "M8[s]"), {"a": 1}, None])
def test_vectors_of_no_numbers(v):
    _, re = destructure([count(2), count()])
    with refuses(TypeError, "expected a vector of 3 numbers", "got dtype"):
        re(v)


def test_calling_the_model():
    model = Layer(count(2, 3), count(3))
    flat, re = destructure(model)
    x = count(4, 2)
    np.testing.assert_array_equal(re(x, flat + 1), re(flat + 1)(x))
    np.testing.assert_array_equal(re(x, flat, copy=True), model(x))
    with refuses(TypeError, "re(v) or re(x, v)", "got 0"):
        re()
    with refuses(TypeError, "re(v) or re(x, v)", "got 3"):
        re(x, x, flat)


def test_length_and_repr():
    flat, re = destructure({"w": count(2, 3), "b": count(3), "name": "a"})
    assert len(re) == len(flat) == 9
    assert repr(re) == "Restructure(dict, 9 numbers in 2 arrays, float64)"
    assert (
        repr(destructure(np.float32([1]))[1]) == "Restructure(array, 1 number in 1 array, float32)"
    )


def test_the_arrays_of_the_model_are_let_go():
    layer = Layer(count(2, 3), count(3))
    model = {"layer": layer, "affine": Affine(count(2), count(2), ""), "t": layer.weight.T}
    seen = [weakref.ref(x) for x in trainables(model)]
    kept = weakref.ref(model["affine"].c)
    flat, re = destructure(model)
    new = re(flat)
    del model, layer
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert kept() is new["affine"].c


def test_vectors_are_let_go():
    flat, re = destructure([count(2)])
    v = flat.copy()
    re(v)
    ref = weakref.ref(v)
    del v
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda re: pickle.loads(pickle.dumps(re))])
def test_copies_of_re(duplicate):
    w = np.ones((200, 300))
    model = [w, w.T, Layer(count(2), count(2)), {"a": (count(), 3)}, SimpleNamespace(b=count(3))]
    flat, re = destructure(model)
    again = duplicate(re)
    assert len(again) == len(re)
    assert repr(again) == repr(re)
    new = again(flat)
    assert np.shares_memory(new[0], flat)
    assert same_elements(new[0], new[1])
    assert type(new[2]) is Layer
    np.testing.assert_array_equal(again.flatten(model), flat)
    grad = arrays_alone(model)
    np.testing.assert_array_equal(again.flatten_gradient(grad), re.flatten_gradient(grad))


def test_a_pickle_is_small():
    _, re = destructure([Layer(np.ones((200, 300)), None)])
    assert len(pickle.dumps(re)) < 5_000


# --- ties ------------------------------------------------------------------------------------


def test_ties_by_identity():
    w = count(2)
    flat, re = destructure({"a": w, "b": [w], "c": count(1)})
    assert len(re) == 3
    model = re(flat)
    assert model["a"] is model["b"][0]
    model = re(flat, copy=True)
    assert model["a"] is model["b"][0]
    model = re(flat.astype("f4"))
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize("copy", [False, True])
def test_ties_by_view(copy):
    w = count(2, 3, 4)
    model = {"a": w.T, "b": w, "c": w.reshape(-1)[::-1], "d": w[:, ::-1].transpose(1, 0, 2)}
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, w.ravel())
    new = re(flat, copy=copy)
    for key, x in model.items():
        np.testing.assert_array_equal(new[key], x)
        assert same_elements(new[key], new["b"])
    assert np.shares_memory(new["b"], flat) is not copy
    flat += 1
    for key, x in model.items():
        np.testing.assert_array_equal(new[key], x if copy else x + 1)


def test_without_a_c_contiguous_place_the_first_counts():
    w = count(2, 3)
    flat, re = destructure([w.T, w[:, ::-1]])
    np.testing.assert_array_equal(flat, w.T.ravel())
    first, second = re(flat)
    np.testing.assert_array_equal(second, w[:, ::-1])
    assert same_elements(first, second)


def test_a_place_that_strides_cannot_reach_is_a_copy():
    w = count(2, 3)
    rest = w.reshape(-1)[::-1].reshape(3, 2)
    model = [w.T, rest]
    flat, re = destructure(model)
    np.testing.assert_array_equal(flat, w.T.ravel())
    first, second = re(flat)
    assert np.shares_memory(first, flat)
    assert not np.shares_memory(second, flat)
    np.testing.assert_array_equal(second, rest)
    np.testing.assert_array_equal(re.flatten([first, second]), flat)
    gradient = re.flatten_gradient([None, count(3, 2)])
    np.testing.assert_array_equal(re(gradient)[1], count(3, 2))


def test_shared_containers_stay_shared():
    layer = {"w": count(2)}
    model = {"a": layer, "b": [layer, layer], "t": (layer,)}
    flat, re = destructure(model)
    assert len(re) == 2
    new = re(flat)
    assert new["a"] is new["b"][0] is new["b"][1] is new["t"][0]
    assert new["a"] is not layer
    gradient = {"a": {"w": [1, 1] * count(2)}, "b": [None, {"w": np.ones(2)}]}
    np.testing.assert_array_equal(re.flatten_gradient(gradient), [1, 2])


def test_one_step_over_the_vector_moves_every_place():
    w = count(2, 3)
    flat, re = destructure({"a": w, "b": w.T})
    model = re(flat)
    grad = {"a": np.ones((2, 3)), "b": 10 * np.ones((3, 2))}
    update_(setup(optimisers.Descent(1.0), flat), flat, re.flatten_gradient(grad))
    np.testing.assert_array_equal(model["a"], w - 11)
    np.testing.assert_array_equal(model["b"], w.T - 11)


# --- flat equals tree ------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
trees = st.recursive(
    shapes.map(lambda shape: np.ones(shape)) | st.sampled_from([None, 3, "a"]),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=2), below, max_size=4)
        | st.tuples(below, below)
        | st.builds(Layer, below, below)
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None)
@given(trees)
def test_there_and_back(model):
    flat, re = destructure(model)
    assert flat.size == sum(x.size for x in trainables(model))
    v = np.random.default_rng(0).standard_normal(len(re))
    new = re(v)
    assert [str(p) for p, _ in trainables(new, path=True)] == [
        str(p) for p, _ in trainables(model, path=True)
    ]
    np.testing.assert_array_equal(re.flatten(new), v)
    np.testing.assert_array_equal(re.flatten_gradient(arrays_alone(new)), v)
    np.testing.assert_array_equal(destructure(new)[0], v)
    re.copy_into_(model, v)
    np.testing.assert_array_equal(re.flatten(model), v)


@pytest.mark.filterwarnings("ignore:nothing to train")
@settings(deadline=None)
@given(trees, st.sampled_from([np.float32, np.float64]))
def test_flat_equals_tree_on_random_models(model, dtype):
    _, re = destructure(model)
    random = np.random.default_rng(0)
    flat = random.standard_normal(len(re)).astype(dtype)
    model, flat_model = re(flat, copy=True), re(flat.copy())
    flat, re = destructure(re(flat.copy()) if flat.dtype == np.float64 else model)
    flat_model = re(flat)
    rule = OptimiserChain(WeightDecay(0.1), Adam(0.1))
    state, flat_state = setup(rule, model), setup(rule, flat)
    for _ in range(3):
        v = random.standard_normal(len(re)).astype(flat.dtype)
        grad = arrays_alone(re(v))
        update_(state, model, grad)
        update_(flat_state, flat, re.flatten_gradient(grad))
    assert re.flatten(model).tobytes() == flat.tobytes()
    assert re.flatten(flat_model).tobytes() == flat.tobytes()


RULES = [
    cls
    for cls in _base.registry()
    if issubclass(cls, ElementwiseRule) and not cls.__abstractmethods__
]


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "c16"])
@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
def test_flat_equals_tree_for_every_elementwise_rule(cls, dtype):
    if dtype == "c16" and cls.real_only:
        pytest.skip("real parameters only")
    random = np.random.default_rng(0)

    def numbers(shape):
        x = random.standard_normal(shape)
        return np.asarray(x + 1j * random.standard_normal(shape) if dtype == "c16" else x, dtype)

    w = numbers((5, 7))
    model = {"w": w, "b": [numbers(3), numbers(()), numbers((2, 0))], "long": numbers(3000)}
    flat, re = destructure(model)
    flat_model = re(flat)
    state, flat_state = setup(cls(), model), setup(cls(), flat)
    for _ in range(5):
        grad = {"w": numbers((5, 7)), "b": [numbers(3), numbers(()), None], "long": numbers(3000)}
        state, model = update_(state, model, grad)
        update_(flat_state, flat, re.flatten_gradient(grad))
    assert model["w"] is w
    assert re.flatten(model).tobytes() == flat.tobytes() == re.flatten(flat_model).tobytes()


# --- flatten ---------------------------------------------------------------------------------


def test_flatten_casts_to_the_dtype_of_the_vector():
    _, re = destructure([count(2, dtype="f4"), count(dtype="f4")])
    flat = re.flatten([np.array([1.0, 2.0]), np.float16([3]).reshape(())])
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, [1, 2, 3])


def test_flatten_into_a_given_vector():
    model = [count(2, 3), count(2, start=6), count(start=8)]
    flat, re = destructure(model)
    for out in (np.full(9, 7.0), np.full(18, 7.0)[::2], np.full(9, 7.0)[::-1], np.ones(9, "f4")):
        assert re.flatten(model, out=out) is out
        np.testing.assert_array_equal(out, flat)
        out[:] = 7
        assert re.flatten_gradient([model[0], None, model[2]], out=out) is out
        np.testing.assert_array_equal(out, [0, 1, 2, 3, 4, 5, 0, 0, 8])


@pytest.mark.parametrize("function", ["flatten", "flatten_gradient"])
def test_flatten_into_the_memory_of_the_model(function):
    model = {"a": count(3), "b": count(3, start=3)}
    flat, re = destructure(model)
    assert getattr(re, function)(re(flat), out=flat) is flat
    np.testing.assert_array_equal(flat, count(6))
    getattr(re, function)({"a": flat[3:], "b": flat[:3]}, out=flat)
    np.testing.assert_array_equal(flat, [3, 4, 5, 0, 1, 2])
    getattr(re, function)({"a": flat[::-2], "b": flat[::2]}, out=flat)
    np.testing.assert_array_equal(flat, [2, 0, 4, 3, 5, 1])


@pytest.mark.parametrize("function", ["flatten", "flatten_gradient"])
@pytest.mark.parametrize(
    ("out", "kind", "got"),
    [
        (np.zeros(4), ValueError, "got shape (4,)"),
        (np.zeros((3, 1)), ValueError, "got shape (3, 1)"),
        (np.zeros(3, int), TypeError, "got dtype int64"),
        ([0.0] * 3, TypeError, "got list"),
        (np.broadcast_to(0.0, 3), ValueError, "read-only"),
    ],
)
def test_vectors_that_cannot_be_written(function, out, kind, got):
    model = [count(2), count()]
    _, re = destructure(model)
    with refuses(kind, "out: expected a writable vector of length 3", got):
        getattr(re, function)(model, out=out)


def test_complex_numbers_do_not_fit_a_real_vector():
    model = [count(2, dtype="c16"), count()]
    flat, re = destructure(model)
    assert flat.dtype == np.complex128
    with refuses(TypeError, "dtype complex128", "got dtype float64"):
        re.flatten(model, out=np.zeros(3))
    with refuses(TypeError, "at [1]", "float64", "complex numbers"):
        re.flatten([model[0], count(dtype="c16")])
    with refuses(TypeError, "at [1]", "complex numbers"):
        re.flatten_gradient([None, np.array(1j)])
    np.testing.assert_array_equal(re.flatten_gradient([np.ones(2), np.ones(())]), [1, 1, 1])


@pytest.mark.parametrize(
    ("model", "kind", "parts"),
    [
        ({"a": [count(2)]}, ValueError, ["(root)", "with 'a', 'b'", "got dict with 'a'"]),
        ({"a": [], "b": count()}, ValueError, ["['a']", "list of 1", "got list of 0"]),
        ({"a": count(2), "b": count()}, ValueError, ["['a']", "list of 1", "got ndarray"]),
        ([1], ValueError, ["(root)", "dict", "got list of 1"]),
        (
            {"a": [count(3)], "b": count()},
            ValueError,
            ["['a'][0]", "shape (2,)", "float64", "got shape (3,)"],
        ),
        ({"a": [None], "b": count()}, TypeError, ["['a'][0]", "shape (2,)", "got None"]),
        ({"a": [np.arange(2)], "b": count()}, TypeError, ["['a'][0]", "array([0, 1])"]),
        ({"a": [count(2)], "b": 1.0}, TypeError, ["['b']", "shape ()", "got 1.0 (float)"]),
    ],
)
def test_models_that_do_not_fit(model, kind, parts):
    _, re = destructure({"a": [count(2)], "b": count()})
    with refuses(kind, *parts):
        re.flatten(model)
    with refuses(kind, *parts):
        re.copy_into_(model, np.ones(3))


def test_flatten_allocates_nothing_of_the_models_size():
    model = {k: np.ones((50, 100)) for k in range(20)}
    model["read only"] = np.broadcast_to(1.0, (50, 100)).copy()
    model["read only"].flags.writeable = False
    flat, re = destructure(model)
    for call in (re.flatten, re.flatten_gradient):
        call(model, out=flat)
        tracemalloc.start()
        try:
            call(model, out=flat)
            assert tracemalloc.get_traced_memory()[1] < 30_000
        finally:
            tracemalloc.stop()


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "expected"),
    [
        (None, [0, 0, 0, 0]),
        ((), [0, 0, 0, 0]),
        ({}, [0, 0, 0, 0]),
        ({"b": np.array(5.0)}, [0, 0, 0, 5]),
        ({"b": 5}, [0, 0, 0, 5]),
        ({"layer": {"bias": np.array([3])}}, [0, 0, 3, 0]),
        ({"layer": SimpleNamespace(weight=np.array([1, 2]))}, [1, 2, 0, 0]),
        ({"layer": Layer(np.array([1.0, 2.0]), None)}, [1, 2, 0, 0]),
        ({"layer": Layer(np.ones(2), (), name=None), "n": None}, [1, 1, 0, 0]),
    ],
)
def test_gradients_like_those_of_update(grad, expected):
    model = {"layer": Layer(count(2), count(1)), "n": 3, "b": count()}
    flat, re = destructure(model)
    found = re.flatten_gradient(grad)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float64
    state = setup(optimisers.Descent(1.0), model)
    update_(state, model, grad)
    np.testing.assert_array_equal(re.flatten(model), flat - expected)


def test_gradients_below_what_does_not_train_are_not_looked_at():
    model = [Affine(count(2), {"mean": count(2)}, ""), "a"]
    _, re = destructure(model)
    grad = [{"a": np.ones(2), "c": "whatever"}, object()]
    np.testing.assert_array_equal(re.flatten_gradient(grad), [1, 1])


def test_no_gradient_is_not_float0():
    jax = pytest.importorskip("jax")
    _, re = destructure([count(2), count()])
    grad = [np.zeros(2, jax.dtypes.float0), 1.0]
    np.testing.assert_array_equal(re.flatten_gradient(grad), [0, 0, 1])


def test_gradients_of_ties_are_summed():
    w = count(2, 3)
    _, re = destructure({"a": w.T, "b": w, "c": w, "d": w[::-1]})
    grad = {"a": count(3, 2), "b": None, "c": np.ones((2, 3)), "d": 100 * count(2, 3)}
    expected = count(3, 2).T + 1 + 100 * count(2, 3)[::-1]
    np.testing.assert_array_equal(re.flatten_gradient(grad), expected.ravel())
    out = np.ones(6)
    re.flatten_gradient(grad, out=out)
    np.testing.assert_array_equal(out, expected.ravel())
    np.testing.assert_array_equal(grad["c"], np.ones((2, 3)))


def test_gradients_of_low_precision_are_summed_in_that_of_the_vector():
    w = np.zeros(2, np.float16)
    _, re = destructure([w, w, np.zeros(1, np.float32)])
    grad = [np.full(2, 60000.0), np.full(2, 60000, np.float16), None]
    np.testing.assert_array_equal(re.flatten_gradient(grad), np.float32([120000, 120000, 0]))


@pytest.mark.parametrize(
    ("grad", "kind", "parts"),
    [
        ({"w": [np.ones(3)]}, ValueError, ["['w'][0]", "shape (2,)", "got shape (3,)"]),
        ({"w": [np.ones(2) * 1j]}, TypeError, ["['w'][0]", "complex"]),
        ({"w": ["a"]}, TypeError, ["['w'][0]", "'a'"]),
        ({"w": []}, ValueError, ["['w']", "list of 1", "list of 0"]),
        ({"w": np.ones(2)}, TypeError, ["['w']", "list of 1", "ndarray"]),
        ({"v": 1}, ValueError, ["(root)", "'w', 'b'", "'v', which the model does not have"]),
        ([1, 2], TypeError, ["(root)", "dict", "list of 2"]),
    ],
)
def test_gradients_that_do_not_fit(grad, kind, parts):
    model = {"w": [count(2)], "b": count()}
    _, re = destructure(model)
    out = np.full(3, 7.0)
    with refuses(kind, *parts):
        re.flatten_gradient(grad, out=out)
    np.testing.assert_array_equal(out, [7, 7, 7])


# --- writing into a model ----------------------------------------------------------------------


def test_copy_into_a_model():
    model = {"w": np.asfortranarray(count(2, 3)), "f": count(2, dtype="f4"), "b": count()}
    arrays = trainables(model)
    _, re = destructure(model)
    v = count(9, start=10)
    assert re.copy_into_(model, v) is None
    assert all(x is y for x, y in zip(trainables(model), arrays, strict=True))
    np.testing.assert_array_equal(model["w"], count(2, 3, start=10))
    np.testing.assert_array_equal(re.flatten(model), v)
    re.copy_into_(model, v * (1 + 1j))
    np.testing.assert_array_equal(re.flatten(model), v)


@pytest.mark.parametrize("lock", ["w", "b"])
def test_copy_into_a_model_that_is_read_only_writes_nothing(lock):
    model = {"w": count(2, 3), "b": count()}
    _, re = destructure(model)
    model[lock].flags.writeable = False
    with refuses(ValueError, f"['{lock}']", "cannot be written"):
        re.copy_into_(model, np.ones(7))
    np.testing.assert_array_equal(re.flatten(model), [0, 1, 2, 3, 4, 5, 0])


def test_copy_into_a_model_that_is_immutable_writes_nothing():
    jnp = pytest.importorskip("jax.numpy")
    model = {"w": count(2), "b": jnp.zeros(1)}
    _, re = destructure(model)
    with refuses(ValueError, "['b']", "cannot be written", "re(v)"):
        re.copy_into_(model, np.ones(3))
    np.testing.assert_array_equal(model["w"], [0, 1])


def test_copy_from_the_memory_of_the_model():
    flat, re = destructure({"a": count(3), "b": count(3)})
    flat[:] = count(6)
    model = re(flat)
    re.copy_into_(model, flat)
    np.testing.assert_array_equal(flat, count(6))
    re.copy_into_(model, flat[::-1])
    np.testing.assert_array_equal(flat, count(6)[::-1])


def test_copy_into_ties_that_are_no_longer_tied():
    w = count(2, 3)
    model = {"a": w, "b": w.T, "c": w}
    _, re = destructure(model)
    re.copy_into_(model, count(6, start=1))
    np.testing.assert_array_equal(w, count(2, 3, start=1))
    separate = {key: x.copy() for key, x in model.items()}
    re.copy_into_(separate, count(6, start=2))
    for key, x in model.items():
        np.testing.assert_array_equal(separate[key], x + 1)


def test_copy_into_new_ties_is_refused():
    _, re = destructure({"a": count(2), "b": count(2)})
    w = count(4)
    with refuses(ValueError, "['a'] and ['b']", "one parameter in this model", "copy one"):
        re.copy_into_({"a": w[:2], "b": w[1::-1]}, np.ones(4))
    with refuses(ValueError, "['a'] and ['b']", "overlap"):
        re.copy_into_({"a": w[:2], "b": w[1:3]}, np.ones(4))
    np.testing.assert_array_equal(w, count(4))


# --- other libraries ---------------------------------------------------------------------------


def test_jax_differentiates_both_ways():
    jax = pytest.importorskip("jax")
    w = count(2, 3, dtype="f4")
    flat, re = destructure({"w": w, "t": w.T, "b": [count(2, dtype="f4")]})

    def loss(v):
        model = re(v)
        return (model["w"] * model["t"].T).sum() + (model["b"][0] ** 3).sum()

    v = flat + 1
    expected = np.concatenate([2 * v[:6], 3 * v[6:] ** 2])
    for function in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(function(v), expected)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(np.stack([v, v]))[1], expected)
    np.testing.assert_allclose(np.diag(jax.hessian(loss)(v))[6:], 6 * v[6:])
    grad = jax.grad(lambda m: (destructure(m)[0] ** 2).sum())(re(v, copy=True))
    np.testing.assert_allclose(grad["b"][0], 2 * v[6:])
    np.testing.assert_allclose(jax.jit(re.flatten)(re(v)), v)  # not in the order of sorted keys
    np.testing.assert_allclose(jax.jit(re.flatten_gradient)({"b": [v[:2]]})[6:], v[:2])


def test_torch_differentiates_both_ways():
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    flat, re = destructure(model)
    assert re(flat)["w"].data_ptr() == flat.data_ptr()
    assert re(flat, copy=True)["w"].data_ptr() != flat.data_ptr()
    v = torch.arange(8.0, requires_grad=True)
    (re(v)["w"] ** 2).sum().backward()
    assert v.grad.tolist() == [0, 2, 4, 6, 8, 10, 0, 0]
    for x in model.values():
        x.requires_grad_()
    (destructure(model)[0] ** 2).sum().backward()
    assert model["w"].grad.tolist() == [[2, 2, 2], [2, 2, 2]]
    re.copy_into_(model, np.arange(8.0))
    assert model["b"].tolist() == [6, 7]
    mixed = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16)}
    flat, re = destructure(mixed)
    assert flat.dtype == torch.float32
    assert re(flat)["b"].dtype == torch.bfloat16


def test_autograd_differentiates_both_ways():
    autograd = pytest.importorskip("autograd")
    w = count(2, 3)
    flat, re = destructure({"w": w, "t": w.T, "b": [count(2), (count(),)]})

    def loss(v):
        model = re(v)
        return (model["w"] * model["t"].T).sum() + (model["b"][0] ** 3).sum()

    v = flat + 1
    np.testing.assert_allclose(
        autograd.grad(loss)(v), np.concatenate([2 * v[:6], 3 * v[6:8] ** 2, [0]])
    )
    model = {"w": w, "b": [count(2), (count(),)]}
    grad = autograd.grad(lambda m: (destructure(m)[0] ** 2).sum())(model)
    np.testing.assert_allclose(grad["w"], 2 * w)
    np.testing.assert_allclose(grad["b"][0], [0, 2])
