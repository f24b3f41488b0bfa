"""Nothing is left untrained without a word: what `setup` warns of, what an update refuses."""

from __future__ import annotations

import collections
import sys
import types
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from util import BOTH, assert_same_bits, name_of, snapshot

import optimisers
from optimisers import Adam, Descent, destructure, functor, minimize, setup, trainable, update_


class Unregistered:
    """A class of a user's, which is no node."""

    def __init__(self):
        self.w = np.ones(2)


class Foreign:
    """An array of a library that nobody knows."""

    def __init__(self, values, dtype="float32"):
        self.values, self.dtype = np.asarray(values, dtype), np.dtype(dtype)
        self.shape = self.values.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Table:
    """What has a dtype for each column, as tables have it."""

    shape = (3, 2)
    dtypes = ("int64", "Float64")


class Hostile:
    """An object of which nobody may ask anything."""

    def __getattr__(self, name):
        raise RuntimeError(name)


NUMBERS = [0.5, 3, 1j, True, np.float64(0.5), np.float32(2), np.int64(3), np.complex64(1j)]
WHOLE = [np.array([1, 2]), np.array(3), np.array([True, False])]
UNKNOWN = [
    Foreign([1.0, 2.0]),
    Foreign([1j], "complex64"),
    Table(),
    np.array([1.0, 2.0], object),
    np.array([np.ones(2), np.ones(3)], object),
    np.zeros(2, [("x", "f8"), ("n", "i4")]),
]
CALLS = [setup, minimize, destructure]


def call(function, model):
    """Hand a model to one of `CALLS`; return its warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if function is minimize:
            minimize(lambda m: (9.0, None), model, Descent(0.1), steps=2)
        elif function is setup:
            setup(Descent(0.1), model)
        else:
            destructure(model)
    return seen


@pytest.fixture(params=CALLS, ids=lambda function: function.__name__)
def taker(request):
    return request.param


def warned(seen, *parts):
    assert [w.category for w in seen] == [UserWarning], [str(w.message) for w in seen]
    assert seen[0].filename == __file__
    for part in parts:
        assert part in str(seen[0].message)


# --- nothing to train ------------------------------------------------------------------------


@pytest.mark.parametrize("x", [*NUMBERS, *WHOLE, None, "text"], ids=repr)
@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"a": [x]}], ids=["root", "below"])
def test_a_model_without_parameters_is_warned_of(taker, x, place):
    model = place(x)
    where = "the model" if model is x else "['a'][0]"
    what = str(x.dtype) if isinstance(x, np.ndarray) else repr(x)
    warned(call(taker, model), "nothing to train", where, what)


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (0.5, "np.asarray(0.5)"),
        ([3], "np.asarray(3.0)"),
        ({"c": np.complex64(1j)}, "np.asarray(1j)"),
        (np.array([1, 2]), ".astype(float)"),
        (Unregistered(), "@functor"),
        ({"net": Unregistered()}, "@functor"),
        (types.MappingProxyType({"w": np.ones(2)}), "dict(...)"),
        (collections.UserDict(w=np.ones(2)), "dict(...)"),
        (Foreign([1.0]), "np.asarray"),
        ({"w": iter([np.ones(2)])}, "list(...)"),
        ({"layer": Unregistered}, "instance"),
        ({}, "nothing in it"),
        ([], "nothing in it"),
        ((), "nothing in it"),
        ([[], {}], "nothing in it"),
    ],
    ids=lambda x: name_of(x)[:25],
)
def test_the_warning_says_what_to_write(taker, model, way):
    warned(call(taker, model), "nothing to train", way)


def test_a_long_list_of_numbers_is_not_spelt_out(taker):
    seen = call(taker, [0.5] * 1000)
    warned(seen, "[0] is 0.5", "997 more")
    assert len(str(seen[0].message)) < 400


def test_a_run_from_a_state_without_leaves_is_warned_of():
    with pytest.warns(UserWarning, match="nothing to train") as seen:
        minimize(lambda m: (9.0, None), {"a": 1.0}, None, 2, state={"a": ()})
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_what_trainable_leaves_out_is_silent_beside_others(taker):
    @functor(trainable=("w",))
    class Net:
        def __init__(self):
            self.w, self.table, self.c = np.ones(2), Foreign([1.0]), [1.0, 2.0]

    assert not call(taker, {"net": Net(), "step": 3, "name": "x", "none": None, "empty": {}})

    @functor(trainable=())
    class Fixed(Net):
        pass

    assert not call(taker, {"net": Net(), "fixed": Fixed()})
    warned(call(taker, Fixed()), "`trainable` leaves out all")


def test_models_that_train_are_silent(taker):
    ordinary = {"w": np.ones(2), "at": np.arange(3), "names": np.array(["a", "b"]), "n": 3}
    objects = {"labels": np.array(["a", 3], object), "h": Hostile(), "kind": np.float32}
    assert not call(taker, {**ordinary, **objects, "dtype": np.dtype("f4")})


@pytest.mark.parametrize("x", UNKNOWN, ids=lambda x: f"{type(x).__name__}-{x.shape}")
def test_arrays_that_are_not_known_are_warned_of_beside_others(taker, x):
    warned(call(taker, {"w": np.ones(2), "other": {"x": x}}), "not trained", "['other']['x']")
    warned(call(taker, [1.0, "text", None, {}, x]), "nothing to train", "[4]")


def test_arrays_of_other_libraries():
    sparse = pytest.importorskip("scipy.sparse")

    def make():
        return sparse.csr_array(np.eye(2))

    model = {"w": np.ones(2), "x": make()}
    with pytest.warns(UserWarning, match=r"\['x'\]"):
        state = setup(Descent(), model)
    with pytest.raises(TypeError, match=r"at \['x'\]"):
        update_(state, model, {"w": np.ones(2), "x": make()})
    update_(state, model, {"w": np.ones(2), "x": make() * 0})


# --- no tree ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (iter([np.ones(2)]), "list(...)"),
        ((x for x in [np.ones(2)]), "list(...)"),
        (map(np.asarray, [1.0]), "list(...)"),
        (Unregistered, "instance"),
        (dict, "instance"),
    ],
    ids=lambda x: name_of(x)[:20],
)
def test_what_is_no_tree_is_refused(taker, model, way):
    with pytest.raises(TypeError) as error:
        call(taker, model)
    assert taker.__name__ in str(error.value)
    assert way in str(error.value)


def test_modules_of_pytorch_are_refused(taker):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"dict\(module.named_parameters\(\)\)"):
        call(taker, module)
    for generator in (module.parameters(), module.named_parameters()):
        with pytest.raises(TypeError, match=r"dict\(...\)"):
            call(taker, generator)
    assert not call(taker, {name: p.detach() for name, p in module.named_parameters()})
    if taker is setup:
        assert not call(taker, dict(module.named_parameters()))
    for beside in {}, {"w": np.ones(2)}:
        warned(call(taker, {**beside, "net": module}), "['net']", "named_parameters")
    assert not call(taker, {"w": np.ones(2), "act": torch.nn.ReLU()})


# --- gradients of what is not trained --------------------------------------------------------


def zero(x):
    """Return the zero gradient of what `something` gives a gradient for."""
    return [0.0, 0.0] if isinstance(x, list) else np.zeros(np.shape(x))


LOST = [
    *((x, 1.5) for x in NUMBERS),
    *((x, np.float64(1.5)) for x in NUMBERS),
    (0.5, np.array(1.5)),
    (0.5, np.nan),
    (0.5, Fraction(1, 2)),
    (0.5, Decimal("0.5")),
    (0.5, True),
    (0.5, [1.0]),
    ([0.0, 1.0], [0.0, 1.0]),
    ([0.0, 1.0], np.array([1.5, 1.0])),
    ((0.0, 1.0), np.array([1.5, 1.0])),
    ([0.0, 1.0], [1.0]),
    *((x, np.full(np.shape(x), 1.5)) for x in WHOLE),
    (np.array([1, 2]), np.array([0, 1])),
    (np.array([1, 2]), np.array([0.0, 1.0], object)),
    *((x, np.ones(x.shape)) for x in UNKNOWN),
    (Foreign([1.0, 2.0]), Foreign([1.0, 1.0])),
    (Unregistered(), {"w": np.ones(2)}),
]


@BOTH
@pytest.mark.filterwarnings("ignore:(not trained|nothing to train)")
@pytest.mark.parametrize(("x", "g"), LOST, ids=lambda x: f"{type(x).__name__}")
@pytest.mark.parametrize("beside", [True, False])
def test_a_gradient_of_what_is_not_trained_is_refused(call, x, g, beside):
    model = {"w": np.ones(2), "net": {"b": x}} if beside else {"net": {"b": x}}
    state = setup(Adam(0.1), model)
    grad = {"w": np.ones(2), "net": {"b": g}} if beside else {"net": {"b": g}}
    before = snapshot([state, model.get("w")])
    with pytest.raises(TypeError, match=r"at \['net'\]\['b'\].*(trains|node).*None"):
        call(state, model, grad)
    assert_same_bits(snapshot([state, model.get("w")]), before)
    for nothing in (None, (), zero(x), 0):
        if not (isinstance(x, list | tuple) and isinstance(nothing, int)):
            call(state, model, {**grad, "net": {"b": nothing}})
    call(state, model, {**grad, "net": {}})


@BOTH
@pytest.mark.filterwarnings("ignore:nothing to train")
@pytest.mark.parametrize("x", [0.5, np.arange(2)], ids=repr)
def test_a_gradient_of_a_root_that_is_not_trained_is_refused(call, x):
    with pytest.raises(TypeError, match=r"at \(root\)"):
        call(setup(Descent(), x), x, np.ones(np.shape(x)))
    call(setup(Descent(), x), x, np.zeros(np.shape(x)))


@BOTH
@pytest.mark.parametrize("where", ["first", "last"])
def test_it_is_found_wherever_it_stands(call, where):
    arrays = {f"w{k}": np.ones(2) for k in range(20)}
    below = [{"w": np.ones(2), "b": 0.5}]
    model = {"below": below, **arrays} if where == "first" else {**arrays, "below": below}
    state = setup(Descent(), model)
    grad = {**model, "below": [{"w": np.ones(2), "b": np.float64(2)}]}
    with pytest.raises(TypeError, match=r"at \['below'\]\[0\]\['b'\]"):
        call(state, model, grad)
    assert all((a == 1).all() for a in arrays.values())


@BOTH
def test_higher_derivatives_are_looked_at_too(call):
    model = {"w": np.ones(2), "b": 0.5}
    grad = {"w": np.ones(2), "b": None}
    with pytest.raises(TypeError, match=r"at \['b'\]"):
        call(setup(Descent(), model), model, grad, {"w": np.ones(2), "b": 1.0})


@BOTH
def test_what_trainable_leaves_out_may_have_a_gradient(call):
    @functor(trainable=("w",))
    class Net:
        def __init__(self, w, c, n, below):
            self.w, self.c, self.n, self.below = w, c, n, below

    class Fixed(dict):
        pass

    trainable.register(Fixed)(lambda x: ())
    model = {"net": Net(np.ones(2), np.ones(2), 0.5, [0.5]), "fixed": Fixed(a=0.5, b=[1.0])}
    state = setup(Descent(0.5), model)
    grad = {
        "net": Net(np.ones(2), np.ones(2), 1.5, [1.5]),
        "fixed": Fixed(a=1.5, b=[2.0]),
    }
    _, new = call(state, model, grad)
    np.testing.assert_array_equal(new["net"].w, 0.5)
    np.testing.assert_array_equal(new["net"].c, 1)
    assert new["net"].n == 0.5


@BOTH
def test_a_gradient_of_the_models_class_has_its_configuration(call):
    @functor
    class Layer:
        def __init__(self, w, slope, at):
            self.w, self.slope, self.at = w, slope, at

    at = np.arange(2)
    model = Layer(np.ones(2), 0.25, at)
    _, new = call(setup(Descent(0.5), model), model, Layer(np.ones(2), 0.25, at))
    np.testing.assert_array_equal(new.w, 0.5)
    for other in (Layer(np.ones(2), 0.5, at), Layer(np.ones(2), 0.25, at + 1)):
        with pytest.raises(TypeError, match=r"at (slope|at)"):
            call(setup(Descent(0.5), model), model, other)


def test_the_flat_vector_and_the_loop_refuse_it_too():
    model = {"w": np.ones(2), "b": 0.5}
    _, re = destructure(model)
    with pytest.raises(TypeError, match=r"at \['b'\].*np.asarray\(0.5\)"):
        re.flatten_gradient({"w": np.ones(2), "b": 1.5})
    out = np.zeros(2)
    with pytest.raises(TypeError, match=r"at \['b'\]"):
        re.flatten_gradient({"w": np.ones(2), "b": 1.5}, out=out)
    assert not out.any()
    re.flatten_gradient({"w": np.ones(2), "b": 0.0})
    with pytest.raises(TypeError, match=r"at \['b'\]"):
        minimize(lambda m: (1.0, {"w": np.ones(2), "b": 1.5}), model, Descent(), 3)
    minimize(lambda m: (1.0, {"w": np.ones(2), "b": 0.0}), model, Descent(), 3)


def test_gradients_of_jax():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    model = {"w": jnp.ones(2), "n": jnp.arange(2), "k": 3}

    def loss(m):
        return jnp.sum(m["w"] ** 2 * m["k"]) + jnp.sum(m["n"])

    state = setup(Descent(0.1), model)
    grad = jax.grad(loss, allow_int=True)(model)  # float0 for whole numbers
    optimisers.update(state, model, grad)
    for g in (jnp.ones(2), jnp.ones(2, "bfloat16"), np.ones(2)):
        with pytest.raises(TypeError, match=r"at \['n'\]"):
            optimisers.update(state, model, {**grad, "n": g})
        optimisers.update(state, model, {**grad, "n": g * 0})
        traced = jax.jit(lambda g: optimisers.update(state, model, {**grad, "n": g})[1]["w"])
        traced(g)
    model["k"] = 2.0
    grad = jax.grad(loss, allow_int=True)(model)
    with pytest.raises(TypeError, match=r"at \['k'\].*np.asarray\(2.0\)"):
        optimisers.update(state, model, grad)


def test_gradients_of_pytorch():
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(2), "n": torch.arange(2), "k": 3.0}
    state = setup(Descent(0.1), model)
    ones = torch.ones(2)
    for key, g in (
        ("n", ones),
        ("n", ones.to(torch.bfloat16)),
        ("n", ones.to_sparse()),
        ("k", torch.tensor(1.0, requires_grad=True)),
    ):
        with pytest.raises(TypeError, match=rf"at \['{key}'\]"):
            update_(state, model, {"w": ones, key: g})
        update_(state, model, {"w": ones, key: g.detach() * 0})
    torch.testing.assert_close(model["w"], torch.full((2,), 0.6))


def test_gradients_of_autograd():
    np_ = pytest.importorskip("autograd.numpy")
    autograd = sys.modules["autograd"]
    model = {"w": np.ones(2), "b": 0.5}
    gradient = autograd.grad(lambda m: np_.sum(m["w"]) * m["b"])
    with pytest.raises(TypeError, match=r"at \['b'\]"):
        update_(setup(Descent(), model), model, gradient(model))
    gradient = autograd.grad(lambda m: np_.sum(m["w"]))
    update_(setup(Descent(), model), model, gradient(model))
