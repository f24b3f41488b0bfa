"""Subclasses of NumPy's arrays: they come back whole; those with a mask are refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from util import BOTH, UNMEASURED, arrays_in, example, parametrize, snapshot

from optimisers import (
    Adam,
    Descent,
    MixedPrecision,
    Momentum,
    destructure,
    freeze_,
    minimize,
    setup,
    trainables,
    update,
    update_,
)


class Measured(np.ndarray):
    """Carries a unit, and insists on it: assignments and functions of plain numbers fail."""

    def __new__(cls, values, unit="", dtype=None):
        new = np.array(values, dtype).view(cls)
        new.unit = unit
        return new

    def __array_finalize__(self, other):
        self.unit = getattr(other, "unit", "none")

    def __setitem__(self, key, value):
        raise TypeError("has no unit")

    def __array_ufunc__(self, *args, **kwargs):
        raise TypeError("has no unit")

    def __array_function__(self, *args, **kwargs):
        raise TypeError("has no unit")

    def view(self, *args):
        raise TypeError("has no unit")


def seen(x):
    return type(x), getattr(x, "unit", None), np.asarray(x).tolist()


DTYPES = ["float64", "float32", "float16", "longdouble", "complex128"]


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("rule", [example(cls) for cls in UNMEASURED] + [MixedPrecision(Adam())])
def test_the_class_and_what_it_carries_come_back(call, dtype, rule):
    plain = {"a": np.array([1.0, 2.0, 3.0], dtype), "b": np.array([4.0, 5.0], dtype)}
    model = {"a": Measured(plain["a"], "m"), "b": Measured(plain["b"], "s")}
    strided = Measured(np.zeros((3, 2)), "m", dtype)
    np.asarray(strided)[:, 0] = plain["a"]
    model["c"], plain["c"] = strided[:, 0], plain["a"].copy()
    try:
        state, expected = setup(rule, model), setup(rule, plain)
    except TypeError:
        pytest.skip("the rule compares numbers")
    grad = {"a": np.ones(3, dtype), "b": None, "c": Measured(np.ones(3), "kg", dtype)}
    for _ in range(2):
        state, model = call(state, model, grad)
        expected, plain = call(expected, plain, {"a": np.ones(3, dtype), "c": np.ones(3, dtype)})
    for name, unit in {"a": "m", "b": "s", "c": "m"}.items():
        assert seen(model[name]) == (Measured, unit, plain[name].tolist())
        assert model[name].dtype == dtype
    assert all(type(a) is np.ndarray for _, a in arrays_in(state) if a.ndim)


@parametrize("cls", [np.matrix, np.recarray])
def test_classes_of_numpy_come_back(cls):
    x = np.ones((2, 3)).view(cls)
    _state, new = update(setup(Adam(0.5), x), x, np.ones((2, 3)))
    assert type(new) is cls
    np.testing.assert_allclose(np.asarray(new), 0.5)


def test_a_mapped_parameter_comes_back_as_an_array_in_memory(tmp_path):
    model = {k: np.memmap(tmp_path / k, np.float32, "w+", shape=3) for k in "ab"}
    state, new = update(setup(Momentum(1.0), model), model, {"a": np.ones(3)})
    assert [type(x) for x in new.values()] == [np.ndarray] * 2
    assert not model["a"].any()
    update_(state, model, {"a": np.ones(3)})
    model["a"].flush()
    np.testing.assert_allclose(np.fromfile(tmp_path / "a", np.float32), -1.9)
    flat, re = destructure(model)
    assert type(re(flat)["a"]) is np.ndarray


def test_ties_of_several_classes():
    w = np.arange(6.0).reshape(2, 3)
    tied = np.ndarray.view(w.T, Measured)
    tied.unit = "m"
    model = {"encoder": w, "decoder": tied, "again": w}
    state = setup(Descent(0.5), model)
    _, new = update(state, model, {"encoder": np.ones((2, 3)), "decoder": np.ones((3, 2))})
    assert seen(new["decoder"]) == (Measured, "m", (w - 1).T.tolist())
    assert type(new["encoder"]) is np.ndarray
    assert new["again"] is new["encoder"]
    assert np.shares_memory(new["encoder"], np.asarray(new["decoder"]))


def test_a_read_only_one_is_replaced_by_one_of_its_class():
    x = Measured([1.0, 2.0], "m")
    x.flags.writeable = False
    _, new = update_(setup(Descent(0.5), x), x, np.ones(2))
    assert seen(new) == (Measured, "m", [0.5, 1.5])
    assert x.tolist() == [1, 2]


@parametrize("through", [lambda re: re, copy.deepcopy, lambda re: pickle.loads(pickle.dumps(re))])
def test_the_way_back_from_a_vector_gives_the_class(through):
    model = [Measured([1.0, 2.0], "m"), np.ones(2), Measured([[3.0]], "s", np.float32)]
    flat, re = destructure(model)
    assert type(flat) is np.ndarray
    re = through(re)
    back = re(flat)
    assert [seen(x) for x in back] == [seen(x) for x in model]
    flat, re = destructure(model[:2])
    back = re(flat)
    assert np.shares_memory(np.asarray(back[0]), flat)
    re.copy_into_(model[:2], flat + 1)
    assert seen(model[0]) == (Measured, "m", [2, 3])
    assert re.flatten(model[:2]).tolist() == [2, 3, 2, 2]
    assert re.flatten_gradient([Measured([1.0, 2.0]), None]).tolist() == [1, 2, 0, 0]


def test_minimize_keeps_the_class():
    def loss(model):
        assert seen(model)[:2] == (Measured, "m")
        return float(np.sum(np.asarray(model) ** 2)), 2 * np.asarray(model)

    found = minimize(loss, Measured([1.0, 2.0], "m"), Descent(0.5), 3, progress=False)
    assert seen(found.model) == (Measured, "m", [0, 0])


# --- masks -----------------------------------------------------------------------------------


def masked(*shape, dtype=np.float64):
    return np.ma.masked_equal(np.arange(np.prod(shape), dtype=dtype).reshape(shape), 1)


@BOTH
@parametrize("dtype", DTYPES)
@parametrize("mask", [True, False])
def test_masked_gradients_are_refused(call, dtype, mask):
    model = {"a": np.ones(3, dtype), "b": [np.ones((2, 3), dtype)[:, ::2]]}
    state = setup(Momentum(), model)
    g = masked(2, 2, dtype=dtype) if mask else np.ma.array(np.ones((2, 2)))
    before = snapshot([state, model])
    for more in ({}, {"on_nonfinite": "skip"}):
        with pytest.raises(TypeError, match=r"\['b'\]\[0\].*masked.*filled\(0\).*None"):
            call(state, model, {"a": np.ones(3), "b": [g]}, **more)
    with pytest.raises(TypeError, match=r"\['b'\]\[0\].*masked"):
        call(state, model, {"a": np.ones(3), "b": [np.ones((2, 2))]}, {"b": [g]})
    assert snapshot([state, model]) == before


def test_masked_gradients_of_other_libraries_and_tied_places_are_refused():
    w = np.ones((2, 2))
    state = setup(Descent(), [w, w])
    with pytest.raises(TypeError, match="masked"):
        update_(state, [w, w], [np.ones((2, 2)), masked(2, 2)])
    jnp, torch = pytest.importorskip("jax.numpy"), pytest.importorskip("torch")
    for x in (jnp.ones(3), torch.ones(3)):
        with pytest.raises(TypeError, match="masked"):
            update(setup(Descent(), x), x, masked(3))
    _, re = destructure([np.ones(3)])
    with pytest.raises(TypeError, match="masked"):
        re.flatten_gradient([masked(3)])


def test_masked_parameters_are_refused():
    model = {"a": np.ones(3), "b": [masked(3)]}
    plain = {"a": np.ones(3), "b": [np.ones(3)]}
    flat, re = destructure(plain)
    state = setup(Momentum(), plain)
    grad = {"a": np.ones(3), "b": [np.ones(3)]}
    before = snapshot([state, model])
    for call in (
        lambda: setup(Adam(), model),
        lambda: destructure(model),
        lambda: trainables(model),
        lambda: minimize(lambda m: (0.0, grad), model, Adam(), 1, progress=False),
        lambda: update(state, model, grad),
        lambda: update_(state, model, grad),
        lambda: re.flatten(model),
        lambda: re.copy_into_(model, flat),
    ):
        with pytest.raises(TypeError, match=r"\['b'\]\[0\].*masked.*filled\(0\)"):
            call()
    assert snapshot([state, model]) == before


@BOTH
@parametrize("none", [None, ()])
def test_a_masked_parameter_without_a_gradient_is_refused(call, none):
    state = setup(Momentum(), {"a": np.ones(2), "b": np.ones(3)})
    model = {"a": np.ones(2), "b": masked(3)}
    before = snapshot([state, model])
    for grad in ({"a": np.ones(2), "b": none}, {"b": none}, {"a": np.ones(2)}, None):
        with pytest.raises(TypeError, match=r"\['b'\].*masked"):
            call(state, model, grad)
    one = setup(Momentum(), np.ones(3))
    with pytest.raises(TypeError, match="masked"):
        call(one, model["b"], none)
    assert snapshot([state, model]) == before
    freeze_(state["b"])  # what is not looked at may be anything
    for grad in ({"a": np.ones(2), "b": none}, {"a": np.ones(2), "b": np.ones(3)}):
        state, model = call(state, model, grad)
    assert not np.array_equal(model["a"], np.ones(2))


@pytest.mark.parametrize("grad", [None, np.ones(3)])
def test_a_masked_array_at_another_place_of_a_parameter_is_refused(grad):
    leaf = setup(Momentum(), np.ones(3))
    model = {"a": np.ones(3), "b": masked(3)}
    state, before = {"a": leaf, "b": leaf}, snapshot(model)
    for call in (update, update_):
        with pytest.raises(TypeError, match=r"\['b'\].*masked"):
            call(state, model, {"a": np.ones(3), "b": grad})
        assert snapshot(model) == before


def test_masked_vectors_are_refused():
    _, re = destructure([np.ones(3)])
    for call in (
        lambda: re(masked(3)),
        lambda: re.copy_into_([np.ones(3)], masked(3)),
        lambda: re.flatten([np.ones(3)], out=masked(3)),
    ):
        with pytest.raises(TypeError, match="masked"):
            call()


@BOTH
@parametrize("rule", [Momentum(), MixedPrecision("float64", Momentum())])
def test_masked_states_are_refused(call, rule):
    model = {"w": np.ones(3)}
    state = setup(rule, model)
    _part, *others = state["w"].state
    if others:
        state["w"].state = state["w"].state._replace(master=masked(3))
    else:
        state["w"].state = state["w"].state._make([masked(3)])
    with pytest.raises(TypeError, match=r"state at \['w'\].*masked"):
        call(state, model, {"w": np.ones(3)})
    np.testing.assert_array_equal(model["w"], 1)
