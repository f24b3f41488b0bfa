"""Models rebuilt from the flat vector: views and copies, dtypes, what is kept."""

from __future__ import annotations

import copy
import gc
import pickle
import tracemalloc
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from util import arrays_alone
from vectors import Affine, Layer, count, refuses

import optimisers
from optimisers import destructure, functor, trainables
from optimisers._arrays.sharing import same_elements

pytestmark = pytest.mark.elsewhere


Point = namedtuple("Point", "x y")


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
