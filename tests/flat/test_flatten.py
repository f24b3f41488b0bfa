"""Models and gradients written into a vector, and a vector into a model."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from vectors import Affine, Layer, count, refuses

import optimisers
from optimisers import destructure, setup, trainables, update_

pytestmark = pytest.mark.elsewhere


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


# --- writing into a model --------------------------------------------------------------------


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
