"""Gradients by HIPS autograd: of trees, and through the flat vector."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from util import BOTH, PUBLIC, assert_near, example, name_of, normal

from optimisers import (
    Adam,
    ClipNorm,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    adjust,
    destructure,
    functor,
    setup,
    trainables,
    update,
    update_,
)

pytestmark = pytest.mark.elsewhere

autograd = pytest.importorskip("autograd")
anp = autograd.numpy


def nested() -> Any:
    return {"layers": [{"w": normal((2, 3)), "b": normal(3)}], "scale": np.array(0.5), "name": "n"}


def loss(model):
    layer = model["layers"][0]
    return anp.sum(anp.tanh(layer["w"] + layer["b"]) * model["scale"]) ** 2


def difference(f, v, h=1e-6):
    """Return the gradient of `f` by central differences."""
    steps = h * np.eye(v.size)
    return np.array([(f(v + e) - f(v - e)) / (2 * h) for e in steps])


def parameters_of(model):
    return {key: model[key] for key in ("layers", "scale")}


# --- training ------------------------------------------------------------------------------------


@BOTH
def test_gradients_of_trees(call):
    """Autograd gives back dictionaries and lists, which are taken as they are."""
    model = parameters_of(nested())
    state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.05)), model)
    first = loss(model)
    for _ in range(200):
        state, model = call(state, model, autograd.grad(loss)(model))
    assert loss(model) < 1e-3 * first
    assert type(model["layers"][0]["w"]) is np.ndarray
    assert type(model["scale"]) is np.ndarray


def test_gradients_of_lists_and_tuples():
    for make in (list, tuple):
        model = make([np.ones(2), np.zeros(3)])
        g = autograd.grad(lambda m: anp.sum(m[0] ** 2) + anp.sum(m[1]))(model)
        _, new = update(setup(Momentum(0.5), model), model, g)
        assert type(new) is make
        assert_near(list(new), [np.zeros(2), np.full(3, -0.5)])


def test_training_the_vector():
    flat, re = destructure(nested())
    model = re(flat)
    state = setup(Adam(0.05), flat)
    first = loss(model)
    slope = autograd.grad(lambda v: loss(re(v)))
    for _ in range(200):
        update_(state, flat, slope(flat))
    assert loss(model) < 1e-3 * first  # which is made of views


# --- through the flat vector ---------------------------------------------------------------------


def test_the_gradient_of_a_rebuilt_model():
    model = nested()
    flat, re = destructure(model)
    g = autograd.grad(lambda v: loss(re(v)))(flat)
    assert_near(g, re.flatten_gradient(autograd.grad(loss)(parameters_of(model))))
    np.testing.assert_allclose(g, difference(lambda v: loss(re(v)), flat), rtol=1e-5, atol=1e-6)
    copied = autograd.grad(lambda v: loss(re(v, copy=True)))(flat)
    assert_near(copied, g)


def test_the_gradient_of_a_gradient():
    flat, re = destructure(nested())

    def f(v):
        return loss(re(v))

    h = autograd.hessian(f)(flat)
    assert_near(h, h.T)
    expected = [difference(lambda v, k=k: autograd.grad(f)(v)[k], flat) for k in range(flat.size)]
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-5)
    twice = autograd.grad(lambda v: anp.sum(autograd.grad(f)(v) ** 2))(flat)
    np.testing.assert_allclose(twice, 2 * h @ autograd.grad(f)(flat), rtol=1e-8, atol=1e-8)


def test_the_vector_of_a_model_of_boxes():
    model = parameters_of(nested())
    flat, re = destructure(model)
    weights = np.arange(1.0, 1 + flat.size)

    for vector in (lambda m: destructure(m)[0], re.flatten):
        value, g = autograd.value_and_grad(lambda m, v=vector: anp.sum(weights * v(m) ** 2))(model)
        assert_near(value, np.sum(weights * flat**2))
        assert_near(re.flatten_gradient(g), 2 * weights * flat)

    g = autograd.grad(lambda m: loss(destructure(m)[1](destructure(m)[0])))(model)
    assert_near(re.flatten_gradient(g), re.flatten_gradient(autograd.grad(loss)(model)))
    second = autograd.grad(
        lambda m: anp.sum(autograd.grad(lambda n: anp.sum(destructure(n)[0] ** 3))(m)["scale"])
    )(model)
    assert_near(second["scale"], 6 * model["scale"])


def test_the_list_of_a_model_of_boxes():
    model = parameters_of(nested())
    g = autograd.grad(lambda m: sum(anp.sum(x**2) for x in trainables(m)))(model)
    assert_near(destructure(g)[0], 2 * destructure(model)[0])
    seen = []
    autograd.grad(lambda m: seen.extend(trainables(m, path=True)) or anp.sum(m["scale"]))(model)
    assert [str(path) for path, _ in seen] == [str(p) for p, _ in trainables(model, path=True)]


def test_ties_by_an_re_made_outside():
    w = normal((2, 3))
    model = {"a": w, "b": w.T}
    flat, re = destructure(model)

    def tied(m):
        return anp.sum(m["a"] ** 2) + anp.sum(m["b"] * np.arange(6.0).reshape(3, 2))

    g = autograd.grad(lambda v: tied(re(v)))(flat)
    assert_near(g, (2 * w + np.arange(6.0).reshape(3, 2).T).ravel())
    assert_near(re.flatten_gradient(autograd.grad(tied)(model)), g)
    state, new = update(setup(Momentum(0.1), model), model, autograd.grad(tied)(model))
    assert state["a"] is state["b"]
    assert_near(new["b"], new["a"].T)
    assert_near(new["a"].ravel(), w.ravel() - 0.1 * g)


def test_a_gradient_flattened_within_a_gradient():
    model = parameters_of(nested())
    flat, re = destructure(model)
    g = autograd.grad(lambda m: anp.sum(re.flatten_gradient(autograd.grad(loss)(m)) ** 2))(model)
    by_vector = autograd.grad(lambda v: anp.sum(autograd.grad(lambda u: loss(re(u)))(v) ** 2))(flat)
    np.testing.assert_allclose(re.flatten_gradient(g), by_vector, rtol=1e-10, atol=1e-10)


def test_mixed_dtypes():
    model = {"a": np.ones(2, np.float32), "b": np.ones(2)}
    flat, re = destructure(model)
    assert flat.dtype == np.float64
    rebuilt = []
    g = autograd.grad(lambda v: rebuilt.append(re(v)) or anp.sum(rebuilt[0]["a"] ** 2))(flat)
    assert_near(g, np.array([2.0, 2.0, 0.0, 0.0]))
    assert rebuilt[0]["a"].dtype == np.float32


def test_objects():
    @functor
    class Affine:
        def __init__(self, w, b):
            self.w, self.b = w, b

        def __call__(self, x):
            return self.w @ x + self.b

    flat, re = destructure([Affine(np.eye(2), np.zeros(2))])
    x = np.array([1.0, 2.0])
    g = autograd.grad(lambda v: anp.sum(re(v)[0](x)))(flat)
    assert_near(g, np.array([1.0, 2.0, 1.0, 2.0, 1.0, 1.0]))

    @dataclass
    class Scale:
        s: Any

        def __call__(self, x):
            return self.s * x

    flat, re = destructure(Scale(np.array(2.0)))
    assert_near(autograd.grad(lambda v: anp.sum(re(x, v)))(flat), np.array([3.0]))


# --- through updates -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [Momentum(0.1), Adam(0.1), OptimiserChain(ClipNorm(1.0), Momentum(0.1))], ids=repr
)
def test_the_gradient_of_training_steps(rule):
    """With respect to the start and to the rate: boxes go through `update`."""
    start = np.array([3.0, -2.0])

    def after(x, eta):
        state = adjust(setup(rule, x), eta)
        for _ in range(3):
            state, x = update(state, x, 2 * (x - 1.0) * np.array([1.0, 0.5]))
        return anp.sum((x - 1.0) ** 2)

    value = after(start, 0.1)
    assert np.isclose(float(after(start, 0.1)), value)
    by_start, by_rate = autograd.grad(after, (0, 1))(start, 0.1)
    near = difference(lambda x: after(x, 0.1), start)
    np.testing.assert_allclose(by_start, near, rtol=1e-4, atol=1e-6)
    near = (after(start, 0.1 + 1e-6) - after(start, 0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(by_rate, near, rtol=1e-4)


def test_updates_of_trees_within_a_gradient():
    model = parameters_of(nested())

    def after(m):
        state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.1)), m)
        for _ in range(2):
            state, m = update(state, m, autograd.grad(loss)(m))
        return loss(m)

    flat, re = destructure(model)
    g = re.flatten_gradient(autograd.grad(after)(model))
    np.testing.assert_allclose(g, difference(lambda v: after(re(v)), flat), rtol=1e-4, atol=1e-6)


def steps_of(rule, start):
    """Return the function from a factor of the gradients to the model after some steps."""

    def after(theta):
        model, state = start, setup(rule, start)
        for _ in range(3):
            gradient = {key: theta * anp.real(x) * x for key, x in model.items()}
            state, model = update(state, model, gradient)
        return sum(anp.sum(anp.abs(x) ** 2) for x in model.values())

    return after


@pytest.mark.parametrize("dtype", ["f4", "f8", "g", "c16", ">f8"])
@pytest.mark.parametrize("cls", PUBLIC, ids=name_of)
def test_gradients_that_are_boxes_of_parameters_that_are_none(cls, dtype):
    """What the inner gradients depend on, as in meta-learning: the start is a constant."""
    rule = example(cls)
    if dtype == "c16" and getattr(rule, "real_only", False):
        return
    # Under NumPy 2.0 autograd does not find back through a cast of a number without dimensions.
    shape = () if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else (1,)
    start = {"w": np.array([1.0, -2.0, 0.0], dtype), "b": np.full(shape, 0.5, dtype)}
    after = steps_of(rule, start)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autograd's, of what depends on nothing
        slope = autograd.grad(after)(1.3)
    assert np.isfinite(slope)
    if dtype == "f8" and cls is not MixedPrecision:  # whose float32 leaves differences few digits
        near = (after(1.3 + 1e-5) - after(1.3 - 1e-5)) / 2e-5
        np.testing.assert_allclose(slope, near, rtol=1e-3, atol=1e-5)


def test_boxes_are_not_written_into_arrays():
    w = np.array([1.0, 2.0])
    state = setup(Adam(0.1), {"w": w})
    slope = autograd.grad(
        lambda theta: anp.sum(update_(state, {"w": w}, {"w": theta * w})[1]["w"])
    )(1.0)
    assert np.isfinite(slope)
    assert w.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"\['w'\].*shape \(2,\).*got shape \(3,\)"):
        autograd.grad(lambda theta: update(state, {"w": w}, {"w": theta * np.ones(3)}))(1.0)
