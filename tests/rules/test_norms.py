"""Gradients scaled by their norms: their values, and norms that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from composed import BACKENDS, BLOCK, KERNEL_DTYPES, on, stepped
from util import BOTH, assert_same_bits, snapshot, step

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    Momentum,
    Nesterov,
    OptimiserChain,
    adjust,
    setup,
    update,
)
from optimisers.rules._measure import norm

pytestmark = [pytest.mark.elsewhere, pytest.mark.portable, pytest.mark.sanitized]


ORDERS = pytest.mark.parametrize("p", [2, 1, 0.5, 3, math.inf, -math.inf, 0, -1])


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
