"""Rules made of rules: chains, norms, means over steps, mixed precision; by both backends."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from util import BOTH, assert_near, assert_same_bits, by_arrays, normal, parametrize, snapshot, step

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
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rule,
    SignDecay,
    WeightDecay,
    adjust,
    setup,
    update,
    update_,
)
from optimisers._engine import cpu
from optimisers.rules.norms import norm

pytestmark = [pytest.mark.elsewhere, pytest.mark.portable, pytest.mark.sanitized]

ORDERS = pytest.mark.parametrize("p", [2, 1, 0.5, 3, math.inf, -math.inf, 0, -1])
KERNEL_DTYPES = ["float32", "float64"]
BLOCK = cpu.kernels.settings()[1]


class Pass(Rule):
    """Hands the gradient on; the kernels do not know it, so its chain runs on arrays."""

    def apply(self, state, x, dx):
        return state, dx


def on(backend, rule):
    """Return a rule that does the same, by this backend."""
    return rule if backend == "kernels" else OptimiserChain(Pass(), rule)


BACKENDS = pytest.mark.parametrize("backend", ["kernels", "arrays"])


def stepped(rule, x, g, backend=None, call=update_):
    """Return the step that a fresh rule makes of a gradient, and check the backend."""
    before = x.copy()
    _, new, used = step(call, setup(rule, x), x, g)
    assert backend is None or set(used.values()) == {backend}
    return before - new


# --- chains ----------------------------------------------------------------------------------


@BACKENDS
@BOTH
def test_each_rule_hands_its_step_to_the_next(call, backend):
    x, g = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    rule = on(backend, OptimiserChain(WeightDecay(0.5), ClipGrad(2.0), Momentum(0.1, 0.5)))
    state, x, used = step(call, setup(rule, x), x, g)
    assert set(used.values()) == {backend}
    np.testing.assert_allclose(x, [1 - 0.2, -2 + 0.05], rtol=1e-15)
    _, x = call(state, x, np.array([0.0, 0.0]))
    np.testing.assert_allclose(x, [0.8 - 0.1 - 0.04, -1.95 + 0.025 + 0.0975], rtol=1e-15)


@BACKENDS
def test_an_empty_chain_steps_by_the_gradient(backend):
    x, g = normal(5), normal(5, seed=1)
    assert_same_bits(stepped(on(backend, OptimiserChain()), x.copy(), g, backend), x - (x - g))
    assert setup(OptimiserChain(), x).state == ()


def test_an_empty_chain_keeps_nothing_of_the_gradient():
    x, g = np.ones(3), np.ones(3)
    _, new = update(setup(OptimiserChain(Pass()), x), x, g)
    assert not np.shares_memory(new, g)


@BACKENDS
def test_chains_nest(backend):
    flat = OptimiserChain(WeightDecay(0.1), Adam(), SignDecay(0.2), Momentum())
    nested = OptimiserChain(
        OptimiserChain(),
        OptimiserChain(WeightDecay(0.1), OptimiserChain(OptimiserChain(Adam()), SignDecay(0.2))),
        Momentum(),
    )
    paths = []
    for rule in flat, nested:
        x = normal(50)
        state = setup(on(backend, rule), x)
        for k in range(3):
            state, x = update_(state, x, normal(50, seed=k))
        paths.append(x)
    assert_same_bits(*paths)


def test_state_of_a_chain():
    rule = OptimiserChain(Descent(), OptimiserChain(Adam()), AccumGrad(2))
    nothing, (adam,), accum = setup(rule, np.ones((2, 3))).state
    assert nothing == ()
    assert adam._fields == ("m", "v", "t")
    assert (accum.sum.shape, accum.count.dtype) == ((2, 3), np.int64)


@pytest.mark.parametrize("wrap", [lambda r: (r,), lambda r: (Adam(), r), lambda r: (r, Adam())])
def test_mixed_precision_stands_around_chains_not_inside(wrap):
    text = r"^MixedPrecision cannot stand inside a chain; put the chain inside it: MixedPrecision"
    with pytest.raises(TypeError, match=text):
        OptimiserChain(*wrap(MixedPrecision(Descent())))


class Sometimes(Rule):
    """Makes a step whenever the gradient is positive."""

    def init(self, x):
        return 0

    def apply(self, state, x, dx):
        return state + 1, dx if dx > 0 else None


@BOTH
def test_none_ends_the_chain_for_this_step(call):
    x = np.array([1.0])
    state = setup(OptimiserChain(Momentum(1.0, 0.5), Sometimes(), Adam()), x)
    state, new = call(state, x, np.array([-1.0]))
    assert new == 1
    momentum, count, adam = state.state
    assert (momentum.v, count, adam.t, adam.m) == (-1, 1, 0, 0)
    state, new = call(state, new, np.array([2.0]))
    momentum, count, adam = state.state
    assert (momentum.v, count, adam.t) == (1.5, 2, 1)
    assert new == 1 - 0.001 * 1.5 / (1.5 + 1e-8)


@BOTH
def test_higher_derivatives_reach_every_rule(call):
    class Newton(Rule):
        def apply(self, state, x, dx, hessian):
            return state, dx / hessian

    rule = OptimiserChain(Descent(0.5), OptimiserChain(Newton()), Descent(0.5))
    x = np.array([1.0, 2.0])
    _, x = call(setup(rule, x), x, np.array([4.0, 8.0]), np.array([2.0, 8.0]))
    assert x.tolist() == [1 - 0.5, 2 - 0.25]

    low = np.array([1.0, 2.0], np.float16)
    state = setup(MixedPrecision(rule), low)
    state, low = call(state, low, np.array([4.0, 8.0]), np.array([2.0, 8.0]))
    assert low.tolist() == [0.5, 1.75]


def logged(method):
    @functools.wraps(method)
    def call(*args, **named):
        return method(*args, **named)

    return call


class Halving(Rule):
    def apply(self, state, x, dx):
        return state, dx / 2


class Mixin:
    def apply(self, state, x, dx):
        return state, dx / 2


def half(state, x, dx):
    return state, dx / 2


FIRST_ORDER = {
    "method": Halving,
    "inherited": type("Inherited", (Halving,), {}),
    "mixed in": type("MixedIn", (Mixin, Rule), {}),
    "static": type("Static", (Rule,), {"apply": staticmethod(half)}),
    "of the class": type("OfClass", (Rule,), {"apply": classmethod(Mixin.apply)}),
    "decorated": type("Decorated", (Rule,), {"apply": logged(Mixin.apply)}),
    "decorated again": type("Again", (Rule,), {"apply": logged(logged(Halving.apply))}),
    "decorated and static": type("Both", (Rule,), {"apply": staticmethod(logged(half))}),
    "by another name": type("Named", (Rule,), {"halved": Mixin.apply, "apply": Mixin.apply}),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_higher_derivatives_are_not_handed_to_what_takes_none(call, kind):
    rule, one = FIRST_ORDER[kind](), np.array([1.0])
    for each in rule, OptimiserChain(rule), MixedPrecision(rule):
        x = np.array([4.0])
        _, x = call(setup(each, x), x, np.array([2.0]), one, one)
        assert x == 3


def test_a_decorator_that_takes_higher_derivatives_is_handed_them():
    def dividing(method):
        @functools.wraps(method)
        def apply(self, state, x, dx, *higher):
            return method(self, state, x, dx / higher[0])

        return apply

    rule = type("Dividing", (Rule,), {"apply": dividing(Mixin.apply)})()
    x = np.array([4.0])
    assert update(setup(rule, x), x, np.array([2.0]), np.array([2.0]))[1] == 3.5


# --- norms -----------------------------------------------------------------------------------


def expected_norm(g, p):
    return np.linalg.norm(g.astype(complex if g.dtype.kind == "c" else float).ravel(), p)


@ORDERS
@pytest.mark.parametrize("shape", [1, 7, (4, 5), BLOCK - 1, BLOCK + 1, (3, BLOCK + 5)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_norms_are_those_of_numpy(dtype, shape, p):
    g = np.asarray(np.random.default_rng(3).standard_normal(shape), dtype)
    size = expected_norm(g, p)
    eps = np.finfo(dtype).eps
    for share in 0.25, 0.999, 1.001, 4.0:
        expected = g * np.asarray(min(share, 1), dtype)
        for backend in "kernels", "arrays":
            got = stepped(on(backend, ClipNorm(share * size, p)), np.zeros_like(g), g, backend)
            np.testing.assert_allclose(got, expected, rtol=4 * eps)
            if share > 1:
                assert_same_bits(got, g)


@ORDERS
@BACKENDS
@pytest.mark.parametrize("size", [1e200, 1e-200, 1e-300, 1e306])
def test_norms_neither_overflow_nor_underflow(size, backend, p):
    g = np.array([3.0, -4.0, 1.0, 2.5]) * size
    plain = expected_norm(g / size, p)
    omega = plain / 2 if p == 0 else plain * size / 2
    got = stepped(on(backend, ClipNorm(omega, p)), np.zeros(4), g, backend)
    np.testing.assert_allclose(got, g / 2, rtol=1e-14)
    np.testing.assert_allclose(norm(g, p), plain if p == 0 else plain * size, rtol=1e-14)


@ORDERS
@BACKENDS
@pytest.mark.parametrize("size", [1e30, 1e37, 1e-30, 1e-40])
def test_norms_in_float32_are_taken_in_double(size, backend, p):
    g = np.array([3.0, -4.0, 1.0, 2.5] * 5, np.float32) * np.float32(size)
    omega = expected_norm(g, p) / 2
    got = stepped(on(backend, ClipNorm(omega, p)), np.zeros_like(g), g, backend)
    np.testing.assert_allclose(got, g / 2, rtol=1e-6, atol=2e-45)


@ORDERS
@BACKENDS
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_zero_or_empty_gradient_stays(dtype, shape, backend, p):
    zero = np.zeros(shape, dtype)
    assert_same_bits(stepped(on(backend, ClipNorm(1.0, p)), zero.copy(), zero, backend), zero)
    assert_same_bits(stepped(on(backend, ClipNorm(0.0, p)), zero.copy(), zero, backend), zero)


@ORDERS
@BACKENDS
def test_a_single_element(backend, p):
    g = np.array(-8.0)
    expected = -8 if p == 0 else -2
    assert stepped(on(backend, ClipNorm(2.0, p)), np.zeros(()), g, backend) == expected


@BACKENDS
@pytest.mark.parametrize("p", [-1, -0.5, -math.inf])
def test_negative_orders_with_a_zero_among_the_elements(backend, p):
    g = np.array([3.0, 0.0, -4.0])
    assert_same_bits(stepped(on(backend, ClipNorm(1e-9, p)), np.zeros(3), g, backend), g)


@BACKENDS
def test_an_omega_of_zero_takes_all(backend):
    g = np.array([3.0, -4.0])
    assert np.all(stepped(on(backend, ClipNorm(0.0)), np.zeros(2), g, backend) == 0)


@ORDERS
@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "longdouble", "complex64", "complex128", "clongdouble"]
)
@pytest.mark.parametrize("shape", [(), (6,), (0, 2)])
def test_norms_of_other_dtypes(shape, dtype, p):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    draw = np.random.default_rng(1)
    g = np.asarray(draw.standard_normal(shape)).astype(dtype)
    if g.dtype.kind == "c":
        g = g + g.dtype.type(1j) * draw.standard_normal(shape).astype(g.real.dtype)
        g = np.asarray(g, dtype)
    size = expected_norm(g, p) if g.size else 0.0
    eps = {"f2": 2.0**-10, "V2": 2.0**-7, "c8": 2.0**-23}.get(g.dtype.str[1:], 2.0**-52)
    np.testing.assert_allclose(np.asarray(norm(g, p), float), size, rtol=1e-14)
    backend = "kernels" if g.dtype.itemsize == 2 else "arrays"
    got = stepped(ClipNorm(size / 2, p), np.zeros_like(g), g, backend if g.size else None)
    assert got.dtype == g.dtype
    wide_type = complex if g.dtype.kind == "c" else float
    np.testing.assert_allclose(got.astype(wide_type), g.astype(wide_type) / 2, rtol=8 * eps)


def test_a_float16_norm_beyond_float16():
    g = np.full(100, 60000, np.float16)
    for backend in "kernels", "arrays":
        got = stepped(on(backend, ClipNorm(300.0)), np.zeros_like(g), g, backend)
        np.testing.assert_allclose(got.astype(float), 30, rtol=2e-3)


def test_complex_numbers_of_great_size():
    g = np.array([3e38 + 3e38j, 1e38j], np.complex64)
    got = stepped(ClipNorm(1e38, 2), np.zeros_like(g), g, "arrays")
    np.testing.assert_allclose(got, g / (np.sqrt(19)), rtol=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax"])
@ORDERS
def test_norms_by_other_libraries(library, p):
    xp = pytest.importorskip("jax.numpy" if library == "jax" else "torch")
    g = np.array([[3.0, -4.0, 0.5], [2.0, 1e-3, -1.0]], np.float32)
    for dtype in "float32", "float16", "bfloat16":
        given = xp.asarray(g, dtype=getattr(xp, dtype))
        exact = np.asarray(given.tolist())
        size = expected_norm(exact, p)
        rule = ClipNorm(size / 2, p)
        _, got = rule.apply((), xp.zeros_like(given), given)
        assert got.dtype == given.dtype
        rtol = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
        np.testing.assert_allclose(np.asarray(got.tolist()), exact / 2, rtol=rtol)
        assert ClipNorm(2 * size, p).apply((), given, given)[1].tolist() == given.tolist()


def test_norms_under_tracing_do_not_throw():
    jax = pytest.importorskip("jax")
    clip = jax.jit(lambda omega, g: ClipNorm(omega).apply((), g, g)[1])
    g = np.array([3.0, -4.0], np.float32)
    np.testing.assert_allclose(clip(1.0, g), g / 5, rtol=1e-6)
    np.testing.assert_allclose(clip(6.0, g), g)
    np.testing.assert_allclose(clip(0.0, 0 * g), 0 * g)
    assert np.all(np.isnan(clip(1.0, g * np.float32(np.nan))))
    rule = jax.jit(lambda g: ClipNorm(1.0, math.inf).apply((), g, g)[1])
    np.testing.assert_allclose(rule(g), g / 4, rtol=1e-6)


# --- norms that are not finite ---------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]
CHAINS = {
    "alone": lambda clip: clip,
    "last": lambda clip: OptimiserChain(Adam(), Momentum(), clip),
    "between": lambda clip: OptimiserChain(Momentum(), ClipNorm(1.0, throw=False), clip, Adam()),
    "after": lambda clip: OptimiserChain(AccumGrad(1), OptimiserChain(Nesterov(), clip)),
}


@BACKENDS
@BOTH
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", CHAINS)
def test_a_bad_norm_throws_before_anything_is_written(place, bad, call, backend):
    rule = on(backend, CHAINS[place](ClipNorm(1.0)))
    model = {"a": np.ones(3), "b": [np.ones(2), np.ones((2, 2))], "c": np.ones(BLOCK + 1)}
    state = setup(rule, model)
    good = {"a": np.ones(3), "b": [np.ones(2), np.full((2, 2), 2.0)], "c": np.ones(BLOCK + 1)}
    state, model, used = step(call, state, model, good)
    assert set(used.values()) == {backend}
    before = snapshot((model, state))

    grad = {"a": np.ones(3), "b": [np.ones(2), np.array([[1.0, bad], [0, 1]])], "c": 2 * good["c"]}
    with pytest.raises(FloatingPointError) as caught:
        call(state, model, grad)
    assert "at ['b'][1]: ClipNorm: the gradient has 2-norm nan" in str(caught.value) or (
        "at ['b'][1]: ClipNorm: the gradient has 2-norm inf" in str(caught.value)
    )
    assert "throw=False" in str(caught.value)
    assert snapshot((model, state)) == before
    call(state, model, good)


@BOTH
def test_a_bad_norm_by_one_backend_stops_the_other(call):
    for bad in "a", "b":
        model = {"a": np.ones(2, np.float32), "b": np.ones(2, np.longdouble), "c": np.ones(2)}
        state = setup(OptimiserChain(Adam(), ClipNorm()), model)
        state, model, used = step(call, state, model, {k: np.ones(2) for k in model})
        assert set(used.values()) == {"kernels", "arrays"}
        before = snapshot((model, state))
        grad = {k: np.full(2, math.nan if k == bad else 1.0) for k in model}
        with pytest.raises(FloatingPointError, match=rf"at \['{bad}'\]: ClipNorm"):
            call(state, model, grad)
        assert snapshot((model, state)) == before


@BACKENDS
def test_a_norm_beyond_all_doubles_throws(backend):
    g = np.full(4, 1.5e308)
    rule = on(backend, ClipNorm(1.0))
    with pytest.raises(FloatingPointError, match="2-norm inf"):
        stepped(rule, np.zeros(4), g)
    assert np.all(np.isfinite(stepped(on(backend, ClipNorm(1.0, math.inf)), np.zeros(4), g)))


@BACKENDS
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_what_does_not_throw_lets_nan_through(dtype, backend):
    def clipped(g, p=2.0):
        rule = on(backend, ClipNorm(1.0, p, throw=False))
        return stepped(rule, np.zeros(3, dtype), np.array(g, dtype), backend)

    assert np.all(np.isnan(clipped([1.0, math.nan, 2.0])))
    assert_same_bits(clipped([1.0, math.inf, 2.0]), np.array([0, math.nan, 0], dtype))
    assert np.all(np.isnan(clipped([1.0, math.nan, 2.0], -1)))
    np.testing.assert_allclose(clipped([3.0, 0.0, -4.0]), [0.6, 0, -0.8], rtol=1e-6)


@BACKENDS
def test_throw_reads_adjusted_values(backend):
    x = np.ones(2)
    state = adjust(setup(on(backend, ClipNorm(1.0)), x), omega=0.5, throw=False)
    _, new = update(state, x, np.array([3.0, -4.0]))
    np.testing.assert_allclose(new, [0.7, 1.4], rtol=1e-14)
    assert np.all(np.isnan(update(state, x, np.array([3.0, math.nan]))[1]))


# --- means over steps ------------------------------------------------------------------------


@BACKENDS
@BOTH
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_accumulated_gradients(dtype, call, backend):
    x = np.array([1.0, 2.0], dtype)
    state = setup(on(backend, AccumGrad(3)), x)

    def kept():
        found = state.state if backend == "kernels" else state.state[1]
        assert found.sum.dtype == dtype
        assert (found.count.dtype, found.count.shape) == (np.int64, ())
        return found.sum.tolist(), int(found.count)

    assert kept() == ([0, 0], 0)
    for start in [1.0, 2.0], [-1.0, 1.5]:
        for k, g in enumerate([[3.0, 0.0], [1.0, 1.0], [2.0, 0.5]]):
            assert x.tolist() == start
            state, x, used = step(call, state, x, np.array(g, dtype))
            assert set(used.values()) == {backend}
            assert kept() == [([3, 0], 1), ([4, 1], 2), ([0, 0], 0)][k]
    assert x.tolist() == [-3, 1]


@BACKENDS
@BOTH
def test_rules_after_accumulation_see_only_the_means(call, backend):
    rule = OptimiserChain(WeightDecay(0.5), AccumGrad(2), OptimiserChain(Adam(0.1), RMSProp()))
    x = y = normal(7)
    state, plain = setup(on(backend, rule), x), setup(rule.rules[2], y)
    for k in range(4):
        g, h = normal(7, seed=2 * k + 1), normal(7, seed=2 * k + 2)
        for given in g, h:
            before = snapshot(state.state)
            state, x, used = step(call, state, x.copy(), given)
            assert set(used.values()) == {backend}
        plain, y = update(plain, y, (g + 0.5 * y + (h + 0.5 * y)) / 2)
        np.testing.assert_allclose(x, y, rtol=1e-14)
        after = snapshot(state.state)
        assert len(after) == len(before)
        later = state.state[2] if backend == "kernels" else state.state[1][2]
        assert later[0].t == k + 1


@BACKENDS
@BOTH
def test_a_swallowed_step_leaves_the_state_of_later_rules(call, backend):
    rule = on(backend, OptimiserChain(Momentum(1.0, 0.5), AccumGrad(2), Adam(), Momentum()))
    x = np.ones(3)
    state = setup(rule, x)
    for k in range(2):
        state, x = call(state, x, np.full(3, k + 1.0))
    states = state.state if backend == "kernels" else state.state[1]
    before = snapshot(list(states[2:]))
    kept_x = x.copy()
    state, x = call(state, x, np.ones(3))
    states = state.state if backend == "kernels" else state.state[1]
    after = snapshot(list(states[2:]))
    if call is update_ and backend == "kernels":
        assert after == before
    values = [entry[-1] for entry in after]
    assert values == [entry[-1] for entry in before]
    assert np.array_equal(x, kept_x)
    assert states[0].v.tolist() == [2.25] * 3
    assert states[1].count == 1


@BOTH
def test_accumulation_inside_accumulation(call):
    x = np.zeros(1)
    state = setup(OptimiserChain(AccumGrad(2), AccumGrad(3), Descent(1.0)), x)
    for k in range(1, 13):
        state, x = call(state, x, np.array([float(k)]))
        assert x == {6: -3.5, 12: -13.0}.get(k, x[0])
        assert (x == 0) == (k < 6)
    assert x == -13


@BOTH
def test_no_gradient_is_not_accumulated(call):
    x = np.zeros(1)
    state = setup(AccumGrad(2), x)
    for g, count in (np.ones(1), 1), (None, 1), ((), 1), (np.zeros(1), 0):
        state, x = call(state, x, g)
        assert state.state.count == count
    assert x == -0.5


def test_one_gradient_makes_a_step_at_once():
    x, g = normal(9), normal(9, seed=1)
    assert_same_bits(update(setup(AccumGrad(1), x), x, g)[1], x - g)


@pytest.mark.parametrize("dtype", ["float16", "complex64", "longdouble", "bfloat16"])
@BOTH
def test_accumulation_in_other_dtypes(call, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = np.array([1.0, 2.0]).astype(dtype)
    state = setup(OptimiserChain(AccumGrad(2), Descent(0.5)), x)
    for g in 1.0, 3.0:
        state, x = call(state, x, np.full(2, g).astype(dtype))
    assert x.astype(complex).tolist() == [0, 1]
    assert state.state[0].sum.dtype == (x.dtype if x.dtype.itemsize > 2 else np.float32)


def test_accumulation_with_arrays_of_jax():
    jax = pytest.importorskip("jax")
    rule, x = AccumGrad(2), jax.numpy.ones(2)
    state, dx = rule.apply(rule.init(x), x, x)
    assert dx is None
    state, dx = rule.apply(state, x, 3 * x)
    assert dx.tolist() == [2, 2]


@pytest.mark.parametrize("n", [2**31, 2**63, 2**80])
def test_a_window_longer_than_a_count_can_be(n):
    jax = pytest.importorskip("jax")
    x = jax.numpy.zeros(1)
    state = setup(OptimiserChain(AccumGrad(n), Descent(1.0)), x)
    for call in update, update_, jax.jit(update):
        state, x = call(state, x, jax.numpy.ones(1))
    held, _ = state.state
    assert (float(held.sum[0]), int(held.count), float(x[0])) == (3, 3, 0)

    full = held._replace(count=jax.numpy.asarray(2**31 - 1, held.count.dtype))
    for call in update, jax.jit(update):
        state.state = full, ()
        after, x = call(state, x, jax.numpy.ones(1))
        assert int(after.state[0].count) == 0  # the largest is the last, it does not go negative


# --- mixed precision -------------------------------------------------------------------------


def narrow(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


INNER = [
    Adam(0.01),
    RMSProp(centred=True),
    OptimiserChain(WeightDecay(0.1), ClipNorm(0.5), Momentum()),
    OptimiserChain(AccumGrad(2), Adam(0.01)),
]


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("master", ["float32", "float64"])
@parametrize("rule", INNER)
def test_the_master_copy_follows_the_rule_in_its_own_precision(rule, master, dtype, call):
    low = normal((3, 5), np.float32).astype(narrow(dtype))
    high = low.astype(np.result_type(master, np.complex64) if dtype == "complex64" else master)
    state, plain = setup(MixedPrecision(master, rule), low), setup(rule, high)
    assert state.state.master.dtype == high.dtype
    for k in range(4):
        assert not np.shares_memory(state.state.master, low)
        g = normal((3, 5), seed=k + 1).astype(low.dtype)
        state, low = call(state, low, g)
        plain, high = call(plain, high, g.astype(high.dtype))
        assert_near(state.state.master, high)
        assert_near(Leaf(rule, state.state.state), plain)
        assert_same_bits(low.astype(complex), state.state.master.astype(low.dtype).astype(complex))


@BOTH
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_master_of_the_same_dtype_is_another_array(library, call):
    xp = pytest.importorskip(library)

    class Halved(Rule):
        def apply(self, state, x, dx):
            return state, dx / 2

    x = xp.ones(3, dtype=xp.float32)
    state = setup(MixedPrecision(Halved()), x)
    for _ in range(2):
        state, x = call(state, x, xp.ones(3, dtype=xp.float32))
    x *= 2
    assert x.tolist() == [0, 0, 0]
    x += 1
    assert state.state.master.tolist() == [0, 0, 0]


def test_steps_too_small_for_the_parameter_add_up():
    x = np.ones(2, np.float16)
    states = {rule: setup(rule, x) for rule in (Descent(2**-13), MixedPrecision(Descent(2**-13)))}
    ends = []
    for state in states.values():
        end = x.copy()
        for _ in range(64):
            state, end = update_(state, end, np.ones(2))
        ends.append(end.tolist())
    assert ends == [[1, 1], [1 - 2**-7] * 2]


SMALL = 2.0**-30


@BOTH
@parametrize("of_g", ["float16", "bfloat16", "float32", "float64"])
@parametrize("dtype", ["float16", "bfloat16"])
@parametrize(
    "places",
    [
        lambda a: {"a": a},
        lambda a: {"a": a, "b": a},
        lambda a: {"a": a, "b": a.T, "c": a[::-1, ::-1]},
        lambda a: {"a": a, "b": a.reshape(6)},
    ],
)
def test_gradients_are_not_rounded_to_a_narrow_parameter(places, dtype, of_g, call):
    """float16 has no 2**-30, and bfloat16 rounds 1 + 2**-8; a gradient in either has no more."""
    g = np.array([[1 + 2**-8, SMALL, 0], [2 * SMALL, 3, 4]]).astype(narrow(of_g))
    model = places(np.zeros((2, 3), narrow(dtype)))
    state = setup(MixedPrecision(Descent(1.0)), model)
    state, _, used = step(call, state, model, places(g))
    assert state["a"].state.master.tolist() == (-len(model) * g).astype(np.float32).tolist()
    assert set(used.values()) == {"kernels"}


@BOTH
def test_a_gradient_that_the_parameter_could_not_hold_is_finite(call):
    x, g = np.zeros(2, np.float16), np.full(2, 1e6, np.float32)
    state = setup(MixedPrecision(Descent(1e-6)), x)
    state, x = call(state, x, g, on_nonfinite="raise")
    np.testing.assert_allclose(x, -1, rtol=1e-3)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_are_not_rounded_to_a_narrow_parameter_of_other_libraries(library):
    xp = pytest.importorskip("jax.numpy" if library == "jax" else "torch")
    for g in xp.asarray([SMALL]), np.array([SMALL]):
        x = xp.zeros(1, dtype=xp.float16)
        state, _ = update(setup(MixedPrecision(Descent(1.0)), x), x, g)
        assert state.state.master.dtype == xp.float32
        assert state.state.master.tolist() == [-SMALL]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: MixedPrecision(Adam()), "MixedPrecision('float32', Adam("),
        (lambda: MixedPrecision("float64", Adam()), "MixedPrecision('float64', Adam("),
        (lambda: MixedPrecision(np.float64, Adam()), "MixedPrecision('float64', Adam("),
        (lambda: MixedPrecision(float, Adam()), "MixedPrecision('float64', Adam("),
        (lambda: MixedPrecision(dtype="f2", rule=Adam()), "MixedPrecision('float16', Adam("),
        (lambda: MixedPrecision(">f4", Adam()), "MixedPrecision('float32', Adam("),
    ],
)
def test_dtype_comes_first_if_at_all(made, expected):
    assert repr(made()).startswith(expected)
    assert setup(made(), np.ones(2, np.float16)).state.master.dtype.isnative


def test_dtypes_of_ml_dtypes_and_torch():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    rule = MixedPrecision(bfloat16, Descent())
    assert repr(rule) == "MixedPrecision('bfloat16', Descent(eta=0.1))"
    assert setup(rule, np.ones(2, np.float16)).state.master.dtype == bfloat16
    torch = pytest.importorskip("torch")
    assert MixedPrecision(torch.bfloat16, Descent()) == rule


@pytest.mark.parametrize("dtype", ["int32", bool, np.complex64, "U3", "V8", object, None, "none"])
def test_the_master_must_be_real_and_floating(dtype):
    with pytest.raises(TypeError, match="MixedPrecision: dtype must be a real floating dtype; got"):
        MixedPrecision(dtype, Adam())


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_mixed_precision_by_other_libraries(library):
    xp = pytest.importorskip("jax.numpy" if library == "jax" else "torch")
    x = xp.asarray([1.0, 2.0], dtype=xp.bfloat16)
    rule = MixedPrecision(Adam(0.25))
    state, new = rule.move(rule.init(x), x, xp.ones_like(x))
    assert state.master.dtype == state.state.m.dtype == xp.float32
    assert new.dtype == xp.bfloat16
    np.testing.assert_allclose(new.tolist(), [0.75, 1.75], rtol=1e-6)
    z = xp.asarray([1.0 + 2j], dtype=xp.complex64)
    assert rule.init(z).master.tolist() == [1 + 2j]


def test_apply_of_mixed_precision_gives_the_step_of_the_parameter():
    x = np.array([1.0, 2.0], np.float16)
    rule = MixedPrecision(Descent(0.5))
    state, dx = rule.apply(rule.init(x), x, np.ones(2, np.float16))
    assert (x - dx).tolist() == state.master.tolist() == [0.5, 1.5]


# --- both backends ---------------------------------------------------------------------------

COMPOSITIONS = [
    ClipNorm(0.5),
    ClipNorm(0.5, 1),
    ClipNorm(0.5, 3.5),
    ClipNorm(1e-3, -2),
    OptimiserChain(ClipNorm(0.5), Adam()),
    OptimiserChain(Adam(), ClipNorm(1e-3, 1), Momentum(), ClipNorm(1e-4)),
    OptimiserChain(WeightDecay(0.1), AccumGrad(2), ClipNorm(0.1), Adam()),
    OptimiserChain(ClipNorm(1.0), AccumGrad(3), Nesterov()),
    OptimiserChain(OptimiserChain(Momentum(), ClipNorm(0.1)), RMSProp(centred=True)),
]


@BOTH
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@parametrize("rule", COMPOSITIONS)
def test_kernels_and_arrays_agree(rule, dtype, call):
    sizes = [(), 3, (2, BLOCK), 5 * BLOCK + 1]
    model = {str(size): normal(size, dtype) for size in sizes}
    state = setup(rule, model)
    for k in range(5):
        grad = {str(size): normal(size, dtype, seed=k + 1) for size in sizes}
        expected = {n: by_arrays(rule, state[n].state, x, grad[n]) for n, x in model.items()}
        state, model, used = step(call, state, model, grad)
        assert set(used.values()) == {"kernels"}
        assert_near(model, {n: x for n, (_, x) in expected.items()})
        assert_near(
            {n: leaf.state for n, leaf in state.items()}, {n: s for n, (s, _) in expected.items()}
        )


@BOTH
def test_a_users_rule_beside_built_in_ones(call):
    class Halve(ElementwiseRule):
        def coefs(self):
            return (0.5,)

        @staticmethod
        def step(x, dx, state, coefs):
            (half,) = coefs
            return half * dx, ()

    x = np.array([1.0])
    rule = OptimiserChain(Halve(), ClipNorm(1.0), AccumGrad(2), Halve())
    state = setup(rule, x)
    for _ in range(2):
        state, x = call(state, x, np.array([4.0]))
    assert x == 0.5
