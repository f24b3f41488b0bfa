"""Training steps that JAX traces: loops, accumulation, ties, the flat vector."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
from jax_models import (
    as_jax,
    as_numpy,
    counted,
    counts_as_numpy,
    jnp,
    quadratic,
    small,
    structure_of,
    train_step,
    tree_map,
)
from util import assert_near, assert_same_bits, normal

from optimisers import (
    AccumGrad,
    Adam,
    AdamW,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rprop,
    adjust,
    adjust_,
    destructure,
    freeze_,
    setup,
    trainables,
    update,
    update_,
)

jax = pytest.importorskip("jax")


# --- whole training steps --------------------------------------------------------------------


def test_other_numbers_do_not_compile_anew():
    model = small()
    state = setup(OptimiserChain(ClipNorm(1.0), Adam(0.1)), model)
    step, traces = counted(train_step)
    eager_state, eager = train_step(state, model)
    state, model = step(state, model)
    np.testing.assert_allclose(model["w"], eager["w"], rtol=1e-6)
    for changes in ({"eta": 0.5}, {"eta": 1}, {"beta": (0.5, 0)}, {"omega": 3.0, "epsilon": 1e-3}):
        state = adjust(state, **changes)
        eager_state = adjust(eager_state, **changes)
        state, model = step(state, model)
        eager_state, eager = train_step(eager_state, eager)
        np.testing.assert_allclose(model["w"], eager["w"], rtol=1e-5)
        adjust_(state, **changes)
        state, model = step(state, model)
        eager_state, eager = train_step(eager_state, eager)
    assert len(traces) == 1
    step(setup(OptimiserChain(ClipNorm(9.0), Adam(0.7)), small(3)), small(3))
    assert len(traces) == 1
    freeze_(state["w"])
    step(state, model)
    assert len(traces) == 2


@pytest.mark.parametrize("weak", [False, True])
def test_scan(weak, dtype):
    """State and model are a carry: their structure and dtypes do not change on the way."""
    rule = OptimiserChain(ClipNorm(1.0), AccumGrad(2), AdamW(0.1, lambda_=0.01))
    model = {"a": jnp.asarray(2.0), "b": jnp.asarray([3.0, 4.0], dtype)}
    if not weak:
        model["a"] = jnp.asarray(2.0, dtype)
    assert model["a"].weak_type is weak
    state = setup(rule, model)
    carry, _ = jax.lax.scan(lambda c, _: (train_step(*c), None), (state, model), length=12)
    for _ in range(12):
        state, model = train_step(state, model)
    assert structure_of(carry) == structure_of((state, model))
    np.testing.assert_allclose(carry[1]["b"], model["b"], rtol=1e-5)
    np.testing.assert_allclose(carry[1]["a"], model["a"], rtol=1e-5)
    assert carry[1]["b"].dtype == dtype
    assert int(carry[0]["a"].state[2].t) == 6


def test_a_schedule_inside_a_loop():
    x = jnp.asarray([1.0])
    state = setup(Descent(0.5), x)

    def body(carry, _):
        state, x = carry
        state, x = update(state, x, jnp.ones(1))
        return (adjust(state, 0.5 * state.rule.eta), x), x

    (state, _), xs = jax.lax.scan(body, (state, x), length=3)
    np.testing.assert_allclose(xs[:, 0], [0.5, 0.25, 0.125])
    assert state.rule.eta == 0.0625

    def follow(carry, eta):
        state, x = carry
        state, x = update(adjust(state, eta), x, jnp.ones(1))
        return (state, x), x

    _, xs = jax.lax.scan(follow, (state, x), jnp.asarray([0.5, 0.25]))
    np.testing.assert_allclose(xs[:, 0], [0.5, 0.25])


@pytest.mark.parametrize("rule", [Adam(0.1), OptimiserChain(ClipNorm(1.0), Rprop(0.1))], ids=repr)
def test_many_models_at_once(rule):
    """`vmap` gives each model its own norm, counts and numbers."""
    models = {"w": jnp.asarray(normal((4, 3), np.float32)), "b": jnp.arange(4.0)}
    states = jax.vmap(partial(setup, rule))(models)
    for _ in range(3):
        states, models = jax.vmap(train_step)(states, models)
    for k in range(4):
        one = {"w": jnp.asarray(normal((4, 3), np.float32))[k], "b": jnp.arange(4.0)[k]}
        state = setup(rule, one)
        for _ in range(3):
            state, one = train_step(state, one)
        np.testing.assert_allclose(models["w"][k], one["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(models["b"][k], one["b"], rtol=1e-5, atol=1e-6)


def test_many_rates_at_once():
    x, etas = jnp.asarray([1.0, 2.0]), jnp.asarray([0.1, 0.2, 0.4])

    def trained(eta, x):
        state = adjust(setup(Momentum(), x), eta)
        for _ in range(3):
            state, x = train_step(state, x)
        return state, x

    states, found = jax.vmap(trained, (0, None))(etas, x)
    for eta, new in zip(etas, found, strict=True):
        np.testing.assert_allclose(new, trained(float(eta), x)[1], rtol=1e-5)
    states, found = jax.vmap(train_step)(states, found)  # batched numbers go on
    np.testing.assert_allclose(found[1], train_step(*trained(0.2, x))[1], rtol=1e-5)
    states = jax.vmap(adjust)(states, 2 * etas)
    np.testing.assert_allclose(states.rule.eta, 2 * etas)
    assert repr(jax.vmap(lambda s: adjust(s, rho=0.5))(states).rule)


def test_the_rate_and_the_decay_have_gradients():
    """Through several steps, and through a loop: forward, backward and twice."""

    def after(eta, b, loop):
        x = jnp.asarray([3.0, -2.0])
        state = adjust(setup(Adam(), x), eta=eta, beta=(b, 0.99))
        if loop:
            step = lambda c, _: (train_step(*c), None)  # noqa: E731
            (_, new), _ = jax.lax.scan(step, (state, x), length=3)
        else:
            new = x
            for _ in range(3):
                state, new = train_step(state, new)
        return quadratic(new)

    with jax.enable_x64(True):
        near = [after(0.1 + h, 0.5, False) for h in (-1e-5, 1e-5)]
        slope = (near[1] - near[0]) / 2e-5
        near = [after(0.1, 0.5 + h, False) for h in (-1e-5, 1e-5)]
        slope_b = (near[1] - near[0]) / 2e-5
    for loop in (False, True):
        f = partial(after, loop=loop)
        grad, forward = jax.grad(f, argnums=(0, 1)), jax.jacfwd(f, argnums=(0, 1))
        for way in (jax.jit(grad), jax.jit(forward), *([grad] if loop else [])):
            d_eta, d_b = way(0.1, 0.5)
            np.testing.assert_allclose(d_eta, slope, rtol=1e-3)
            np.testing.assert_allclose(d_b, slope_b, rtol=1e-2)
        assert np.all(np.isfinite(jax.jit(jax.hessian(f))(0.1, 0.5)))


# --- accumulation ----------------------------------------------------------------------------

ACCUMULATING = [
    AccumGrad(1),
    AccumGrad(3),
    OptimiserChain(AccumGrad(2), Adam(0.1)),
    OptimiserChain(Momentum(0.5), AccumGrad(2), ClipNorm(0.5), Adam(0.1)),
    OptimiserChain(AccumGrad(2), AccumGrad(2), Momentum(0.1)),
    OptimiserChain(OptimiserChain(AccumGrad(3), Adam(0.1)), Momentum(0.5)),
    MixedPrecision(OptimiserChain(AccumGrad(2), Adam(0.1))),
]


@pytest.mark.parametrize("rule", ACCUMULATING, ids=repr)
def test_accumulation_can_be_traced(rule):
    x = normal(5, np.float32)
    there, here = (setup(rule, jnp.asarray(x)), jnp.asarray(x)), (setup(rule, x), x)
    step, traces = counted(update)
    for k in range(7):
        g = normal(5, np.float32, k)
        there, here = step(*there, jnp.asarray(g)), update(*here, g)
        assert_near(np.asarray(there[1]), here[1])
        assert_near(counts_as_numpy(as_numpy(there[0].state)), here[0].state)
    assert len(traces) == 1


def test_a_swallowed_step_lets_no_nan_through():
    rule = OptimiserChain(AccumGrad(2), ClipNorm(1.0, throw=False), Adam())
    state, x = setup(rule, jnp.ones(2)), jnp.ones(2)
    state, x = jax.jit(update)(state, x, jnp.asarray([jnp.nan, 1.0]))
    assert_same_bits(np.asarray(x), np.ones(2, np.float32))
    assert np.all(np.asarray(state.state[2].m) == 0)
    assert int(state.state[2].t) == 0


# --- ties ------------------------------------------------------------------------------------


def tied():
    """An array of NumPy at two places; at two places, one of JAX is two parameters."""
    w = np.array([1.0, 2.0], np.float32)
    return {"a": w, "b": [w, np.zeros(2, np.float32)]}


def tied_loss(model):
    return jnp.sum(model["a"] * jnp.asarray([1.0, 0.0])) + jnp.sum(model["b"][0] ** 2)


def test_ties_hold_through_jit():
    model = tied()
    state = setup(Momentum(0.1), model)
    step, traces = counted(lambda s, m: update(s, m, jax.grad(tied_loss)(m)))
    eager_state, eager = state, model
    for _ in range(3):
        state, model = step(state, model)
        eager_state, eager = update(eager_state, eager, jax.grad(tied_loss)(eager))
        assert_same_bits(np.asarray(model["a"]), np.asarray(model["b"][0]))
        np.testing.assert_allclose(model["a"], eager["a"], rtol=1e-6)
    assert eager["a"] is eager["b"][0]
    step(setup(Momentum(0.1), tied()), tied())
    assert len(traces) == 1
    assert state["a"] is not state["b"][0]  # made by JAX, one for each place
    for crossed in (state, pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        new, moved = update(crossed, model, jax.grad(tied_loss)(model))
        assert new["a"] is new["b"][0]
        assert moved["a"] is moved["b"][0]
        written, _ = update_(crossed, model, jax.grad(tied_loss)(model))
        assert written["a"].state is written["b"][0].state
        assert_same_bits(np.asarray(written["a"].state.v), np.asarray(new["a"].state.v))
    again = adjust(state, 0.5)
    _, moved = update(again, model, {"a": jnp.ones(2), "b": [jnp.ones(2), None]})
    assert_same_bits(np.asarray(moved["a"]), np.asarray(moved["b"][0]))


def test_ties_hold_through_a_loop():
    model = tied()
    state = setup(Descent(0.1), model)
    body = lambda c, _: (update(*c, jax.grad(tied_loss)(c[1])), None)  # noqa: E731
    (_, there), _ = jax.lax.scan(body, (state, model), length=3)
    for _ in range(3):
        state, model = update(state, model, jax.grad(tied_loss)(model))
    np.testing.assert_allclose(there["a"], model["a"], rtol=1e-6)
    np.testing.assert_allclose(there["b"][0], model["a"], rtol=1e-6)


def test_models_that_are_tied_alike_are_not_tied_to_each_other():
    model = {"one": tied(), "two": tied()}
    state = {name: setup(Descent(1.0), m) for name, m in model.items()}
    state = jax.jit(lambda s: s)(state)
    grad = {"one": {"a": jnp.ones(2)}}
    _, new = update(state, model, grad)
    assert_same_bits(np.asarray(new["one"]["b"][0]), np.array([0.0, 1.0], np.float32))
    assert_same_bits(np.asarray(new["two"]["a"]), np.array([1.0, 2.0], np.float32))


def test_other_ties_are_other_structure():
    x, y = np.ones(2), np.zeros(2)
    states = [setup(Adam(), m) for m in ([x, x, y, y], [x, y, x, y], [x, y, np.ones(2), y])]
    assert len({structure_of(state) for state in states}) == 3


# --- the flat vector -------------------------------------------------------------------------


def nested(dtype=np.float32):
    w = normal((2, 3), dtype)
    return as_jax({"layers": [{"w": w, "b": normal(3, dtype)}], "scale": np.array(2.0, dtype)})


def nested_loss(model):
    w, b = model["layers"][0]["w"], model["layers"][0]["b"]
    return jnp.sum(jnp.tanh(w + b) * model["scale"]) ** 2


def test_derivatives_of_a_rebuilt_model(dtype):
    model = nested(dtype)
    flat, re = destructure(model)
    assert isinstance(flat, jax.Array)
    assert flat.dtype == dtype
    assert flat.shape == (10,) == (len(re),)

    def loss(v):
        return nested_loss(re(v))

    g = jax.grad(loss)(flat)
    expected = re.flatten_gradient(jax.grad(nested_loss)(model))
    np.testing.assert_allclose(g, expected, rtol=1e-5)
    t = jnp.ones_like(flat)
    value, slope = jax.jvp(loss, (flat,), (t,))
    np.testing.assert_allclose([value, slope], [nested_loss(model), g.sum()], rtol=1e-4)
    np.testing.assert_allclose(jax.vjp(loss, flat)[1](jnp.ones((), dtype))[0], g, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(flat), g, rtol=1e-4)
    h = jax.jit(jax.hessian(loss))(flat)
    assert h.shape == (10, 10)
    np.testing.assert_allclose(h, h.T, rtol=1e-3, atol=1e-4)
    curvature = jax.jvp(jax.grad(loss), (flat,), (t,))[1]
    np.testing.assert_allclose(h @ t, curvature, rtol=1e-3, atol=1e-4)
    batch = jnp.stack([flat, 2 * flat])
    np.testing.assert_allclose(jax.vmap(loss)(batch), [loss(flat), loss(2 * flat)], rtol=1e-5)
    rebuilt = jax.vmap(re)(batch)
    assert rebuilt["layers"][0]["w"].shape == (2, 2, 3)


def test_the_vector_and_the_list_of_a_traced_model():
    model = nested()

    def by_vector(m):
        return jnp.sum(destructure(m)[0] ** 2)

    def by_list(m):
        return sum(jnp.sum(x**2) for x in trainables(m))

    for f in (by_vector, by_list):
        g = jax.grad(f)(model)
        np.testing.assert_allclose(g["layers"][0]["w"], 2 * model["layers"][0]["w"])
        assert float(g["scale"]) == 4.0
        np.testing.assert_allclose(jax.jit(f)(model), f(model), rtol=1e-6)
    flat, re = destructure(model)
    np.testing.assert_allclose(jax.jit(re.flatten)(model), flat)
    twice = jax.jit(lambda m: re(2 * re.flatten(m)))(model)
    assert float(twice["scale"]) == 4.0
    rows = jax.vmap(lambda m: destructure(m)[0])(tree_map(lambda x: jnp.stack([x, x]), model))
    np.testing.assert_allclose(rows, jnp.stack([flat, flat]))
    h = jax.hessian(lambda m: destructure(m)[0].sum() ** 2)(model)
    assert float(h["scale"]["scale"]) == 2.0


def test_ties_in_a_traced_function_by_an_re_made_outside():
    model = tied()
    flat, re = destructure(model)
    assert flat.shape == (4,)
    rebuilt = jax.jit(re)(flat)
    assert_same_bits(np.asarray(rebuilt["b"][0]), np.asarray(model["a"]))
    g = jax.grad(lambda v: tied_loss(re(v)))(flat)
    np.testing.assert_allclose(g, [3.0, 4.0, 0.0, 0.0])
    g = jax.jit(lambda m: re.flatten_gradient(jax.grad(tied_loss)(m)))(model)
    np.testing.assert_allclose(g, [3.0, 4.0, 0.0, 0.0])


def test_mixed_dtypes_are_cast_back_and_differentiate():
    model = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16), "n": jnp.arange(2)}
    flat, re = destructure(model)
    assert flat.dtype == np.float32
    rebuilt = jax.jit(re)(2 * flat)
    assert (rebuilt["a"].dtype, rebuilt["b"].dtype) == (jnp.bfloat16, jnp.float16)
    g = jax.grad(lambda v: re(v)["a"].sum().astype(jnp.float32))(flat)
    np.testing.assert_allclose(g, [1.0, 1.0, 0.0, 0.0])


def test_training_the_vector():
    flat, re = destructure(nested())
    state = setup(Adam(0.1), flat)

    @jax.jit
    def step(state, v):
        value, g = jax.value_and_grad(lambda v: nested_loss(re(v)))(v)
        return *update(state, v, g), value

    values = []
    for _ in range(100):
        state, flat, value = step(state, flat)
        values.append(float(value))
    assert values[-1] < 1e-3 * values[0]
