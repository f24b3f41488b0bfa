"""The words of a step, on numbers of every kind, and the same words in the kernels."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from util import (
    ELEMENTWISE,
    assert_same_values,
    example,
    normal,
    parametrize,
    special,
    special_pairs,
    step,
)

from optimisers import (
    Adam,
    AdaMax,
    AMSGrad,
    ClipGrad,
    ClipNorm,
    ElementwiseRule,
    Lion,
    OptimiserChain,
    RMSProp,
    Rprop,
    ZeroNaN,
    setup,
    update_,
    words,
)
from optimisers.words import (
    abs2,
    absolute,
    clip,
    ema_weight,
    is_complex,
    maximum,
    minimum,
    namespace,
    sign,
    sqrt,
    where,
    zeros_like,
)

pytestmark = [pytest.mark.elsewhere, pytest.mark.portable]

REAL = ["float16", "float32", "float64", "longdouble", "bfloat16"]
COMPLEX = ["complex64", "complex128", "clongdouble"]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def array(values, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.asarray(values).astype(dtype)


def same(got, expected):
    """Tell whether two arrays of one dtype hold the same numbers, NaN equal to NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    return got.shape == expected.shape and bool(
        np.all((got == expected) | ((got != got) & (expected != expected)))
    )


def test_all_public_words_are_listed():
    mine = {n for n, f in vars(words).items() if getattr(f, "__module__", "") == words.__name__}
    assert set(words.__all__) == {n for n in mine if n[0] != "_"} - {
        "namespace",
        "is_complex",
        "Reduced",
    }
    assert words.__all__ == sorted(words.__all__)


# --- on arrays of every dtype ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL)
def test_words_on_real_numbers(dtype):
    x = array([-math.inf, -4, -1, -0.0, 0, 0.25, 9, math.inf, math.nan], dtype)
    assert same(sign(x), array([-1, -1, -1, 0, 0, 1, 1, 1, math.nan], dtype))
    assert same(absolute(x), array([math.inf, 4, 1, 0, 0, 0.25, 9, math.inf, math.nan], dtype))
    assert same(abs2(x), array([math.inf, 16, 1, 0, 0, 0.0625, 81, math.inf, math.nan], dtype))
    assert same(sqrt(x[3:]), array([0, 0, 0.5, 3, math.inf, math.nan], dtype))
    assert same(zeros_like(x), array([0] * 9, dtype))
    assert same(clip(x, x[2], x[5]), array([-1, -1, -1, 0, 0, *[0.25] * 3, math.nan], dtype))
    assert same(where(x > x[4], x, x[1]), array([-4] * 5 + [0.25, 9, math.inf, -4], dtype))
    assert np.isnan(sqrt(x[1:2]).astype(float))


@pytest.mark.parametrize("dtype", REAL)
def test_nan_wins_on_either_side(dtype):
    x = array([math.nan, 1, math.nan, 1, -2, math.inf], dtype)
    y = array([1, math.nan, math.nan, 2, -3, math.nan], dtype)
    assert same(maximum(x, y), array([math.nan] * 3 + [2, -2, math.nan], dtype))
    assert same(minimum(x, y), array([math.nan] * 3 + [1, -3, math.nan], dtype))
    assert np.all(np.isnan(clip(x[:1], x[1], x[1]).astype(float)))
    assert np.all(np.isnan(clip(x[1:2], y[1], x[5]).astype(float)))


@pytest.mark.parametrize("dtype", COMPLEX)
def test_words_on_complex_numbers(dtype):
    z = array([3 + 4j, -5j, 0, -2, complex(math.nan, 1)], dtype)
    real = z.real.dtype
    np.testing.assert_allclose(sign(z[:4]), [0.6 + 0.8j, -1j, 0, -1], rtol=4e-7)
    assert np.isnan(sign(z[4]))
    assert sign(z).dtype == z.dtype
    assert same(absolute(z), array([5, 5, 0, 2, math.nan], real))
    assert same(abs2(z), array([25, 25, 0, 4, math.nan], real))
    np.testing.assert_allclose(sqrt(z[:4]) ** 2, z[:4], rtol=1e-6)
    assert same(zeros_like(z), array([0] * 5, dtype))


@pytest.mark.parametrize("dtype", COMPLEX)
def test_real_numbers_in_complex_dress_are_compared(dtype):
    v, w = array([4, 1, 9, math.nan], dtype), array([2, 3, 9, 1], dtype)
    real = v.real.dtype
    assert same(maximum(v, w), array([4, 3, 9, math.nan], real))
    assert same(minimum(v, w.real), array([2, 1, 9, math.nan], real))
    assert same(maximum(v.real, w), array([4, 3, 9, math.nan], real))
    assert same(maximum(v, real.type(3)), array([4, 3, 9, math.nan], real))


def test_great_and_small_complex_numbers():
    z = np.array([3e200 + 4e200j, 3e-200 + 4e-200j, 5e-324j])
    np.testing.assert_allclose(absolute(z), [5e200, 5e-200, 5e-324], rtol=1e-15)
    np.testing.assert_allclose(sign(z), [0.6 + 0.8j, 0.6 + 0.8j, 1j], rtol=1e-15)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX])
def test_words_keep_0_d_numbers_and_precision(dtype):
    x = array(2, dtype)
    real = x.real.dtype if x.dtype.kind == "c" else x.dtype
    for word, kind in (sqrt, x.dtype), (sign, x.dtype), (absolute, real), (abs2, real):
        assert (word(x).dtype, word(x).shape) == (kind, ())
        assert word(x[()]).dtype == kind
    assert maximum(x, real.type(3)).dtype == minimum(x, real.type(1)).dtype == real
    assert clip(x, real.type(0), real.type(1)) == 1


def test_where_takes_plain_conditions():
    x, y = np.ones(2), np.zeros(2)
    for true, false in (True, False), (np.True_, np.False_), (1, 0), ([0], []):
        assert where(true, x, y) is x
        assert where(false, x, y) is y
    assert where(np.array(True), x, y).tolist() == [1, 1]


# --- 1 - beta^t ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 2**-40])
@pytest.mark.parametrize("t", [1, 2, 7, 1000, 10**7])
def test_weight_of_a_mean_in_double(beta, t):
    with mpmath.workdps(60):
        exact = 1 - mpmath.mpf(beta) ** t
        assert abs(ema_weight(beta, t) - exact) <= 2**-52
    for kind in np.float64, np.longdouble:
        assert ema_weight(kind(beta), t) == ema_weight(beta, np.int64(t)) == ema_weight(beta, t)
    narrow = np.float32(beta)
    assert ema_weight(narrow, t) == ema_weight(float(narrow), t)
    assert ema_weight(0, t) == 1


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_weight_of_a_mean_keeps_its_digits_when_traced_in_float32(beta):
    jax = pytest.importorskip("jax")
    traced = jax.jit(lambda t: ema_weight(beta, t))
    both = jax.jit(ema_weight)
    for t in 1, 2, 50, 10_000:
        exact = ema_weight(beta, t)
        assert traced(t).dtype == np.float32
        np.testing.assert_allclose(traced(t), exact, rtol=1e-6)
        np.testing.assert_allclose(both(beta, t), ema_weight(np.float32(beta), t), rtol=1e-6)


# --- other libraries -------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "autograd.numpy"])
def test_words_of_other_libraries(library):
    xp = pytest.importorskip(library)
    x = np.array([-4.0, 0.0, 0.25, 9.0, math.nan], np.float32)
    z = np.array([3 + 4j, 0, -2], np.complex64)
    ours, theirs = xp.asarray(x) if library == "torch" else xp.array(x), x
    number = np.float32(0.5)
    unary = [sign, absolute, abs2, zeros_like, lambda v: sqrt(absolute(v))]
    binary = [maximum, minimum, lambda v, c: clip(v, -c, c), lambda v, c: where(v > c, v, -v)]
    for word in unary:
        np.testing.assert_array_equal(np.asarray(word(ours)), word(theirs))
    for word in binary:
        np.testing.assert_array_equal(np.asarray(word(ours, 0.5)), word(theirs, number))
        assert np.asarray(word(ours, 0.5)).dtype == np.float32
    ours = xp.asarray(z) if library == "torch" else xp.array(z)
    assert is_complex(ours)
    for word in sign, absolute, abs2, sqrt, zeros_like:
        np.testing.assert_allclose(np.asarray(word(ours)), word(z), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(maximum(ours, 0.5)), [3, 0.5, 0.5])


def test_the_namespace_of_a_box_is_autograds():
    autograd = pytest.importorskip("autograd")
    seen = []

    def f(x):
        seen.append(namespace(x).__name__)
        return (abs2(x) * sign(x) + maximum(x, 0.5) - minimum(x, 0.5) + sqrt(absolute(x)))[0]

    slope = autograd.grad(f)(np.array([4.0]))
    assert seen == ["autograd.numpy"]
    np.testing.assert_allclose(slope, 2 * 4 + 1 + 0.25)


@pytest.mark.filterwarnings("ignore:Output seems independent")  # of a sign, it is
@parametrize("cls", [cls for cls in ELEMENTWISE if cls.__name__[0] != "_"])
def test_every_step_can_be_differentiated(cls):
    autograd = pytest.importorskip("autograd")
    rule = example(cls)
    x, g = np.array([1.0, -2.0, 0.5]), np.array([0.5, 3.0, -1.0])
    state, _ = rule.apply(rule.init(x), x, 0.9 * g)  # the largest so far has a kink at itself

    def moved(g):
        return (rule.apply(state, x, g)[1] * np.array([1.0, 10.0, 100.0])).sum()

    slope = np.zeros(3) + autograd.grad(moved)(g)
    h = 1e-6
    for i, e in enumerate(np.eye(3)):
        expected = (moved(g + h * e) - moved(g - h * e)) / (2 * h)
        np.testing.assert_allclose(slope[i], expected, rtol=1e-5, atol=1e-8)


def test_a_rule_can_be_differentiated_by_its_hyperparameters():
    autograd = pytest.importorskip("autograd")
    x, g = np.array([1.0, -2.0]), np.array([0.5, 3.0])

    def moved(h):
        rule = OptimiserChain(ClipNorm(h[0]), Adam(h[1], (h[2], 0.9)))
        state, dx = rule.apply(rule.init(x), x, g)
        _, more = rule.apply(state, x - dx, g + x)
        return ((dx + 2 * more) * np.array([1.0, 10.0])).sum()

    at = np.array([2.0, 0.1, 0.8])
    slope = autograd.grad(moved)(at)
    for i, e in enumerate(1e-6 * np.eye(3)):
        expected = (moved(at + e) - moved(at - e)) / 2e-6
        np.testing.assert_allclose(slope[i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Output seems independent")
@parametrize("cls", [cls for cls in ELEMENTWISE if cls.__name__[0] != "_"])
def test_the_parameter_may_be_a_box(cls):
    autograd = pytest.importorskip("autograd")
    rule, g = example(cls), np.array([0.5, 3.0, -1.0])

    def moved(x):
        state = rule.init(x)
        for _ in range(2):
            state, dx = rule.apply(state, x, g * x)
            x = x - dx
        return (x * np.array([1.0, 10.0, 100.0])).sum()

    x = np.array([1.0, -2.0, 0.5])
    slope = np.zeros(3) + autograd.grad(moved)(x)
    for i, e in enumerate(1e-6 * np.eye(3)):
        expected = (moved(x + e) - moved(x - e)) / 2e-6
        np.testing.assert_allclose(slope[i], expected, rtol=1e-5, atol=1e-7)


# --- the kernels' words ----------------------------------------------------------------------
# Rules in which one word decides, taken by the kernels to where its value can be read.

KERNEL_DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def by_kernels(rule, x, grad, **slots):
    """Return the step of a rule as the kernels make it, and the new state."""
    state = setup(rule, x)
    for name, values in slots.items():
        getattr(state.state, name)[:] = values
    with np.errstate(all="ignore"):
        state, new, used = step(update_, state, x, grad)
        assert set(used.values()) == {"kernels"}
        return 0 - new, state.state


@KERNEL_DTYPES
def test_sign_in_the_kernels(dtype):
    g = special(dtype)
    dx, _ = by_kernels(Lion(1.0, (0, 0)), np.zeros_like(g), g)
    assert_same_values(dx, sign(g))
    assert np.isnan(dx[np.isnan(g)]).all()
    assert np.isnan(g).any()


@KERNEL_DTYPES
@pytest.mark.parametrize("delta", [0.0, 1e-40, 1.25, 1e30])
def test_clip_in_the_kernels(dtype, delta):
    g = special(dtype)
    dx, _ = by_kernels(ClipGrad(delta), np.zeros_like(g), g)
    low, high = np.asarray([-delta, delta], dtype)
    assert_same_values(dx, clip(g, low, high))


@KERNEL_DTYPES
@pytest.mark.parametrize("g", [0.0, -0.0, 1.0, -1.0])
def test_clip_to_zero_leaves_the_upper_limit(dtype, g):
    x = np.full(100, -0.0, dtype)  # minus 0 stays -0, minus -0 would be 0
    update_(setup(ClipGrad(0.0), x), x, np.full(100, g, dtype))
    assert np.signbit(x).all()


@KERNEL_DTYPES
def test_maximum_and_absolute_in_the_kernels(dtype):
    u, g = special_pairs(dtype)
    with np.errstate(all="ignore"):
        _, state = by_kernels(AdaMax(beta=(0, 0.5)), np.zeros_like(g), g, u=u)
        assert_same_values(state.u, maximum(np.asarray(0.5, dtype) * u, absolute(g)))
        _, state = by_kernels(AMSGrad(beta=(0, 0)), np.zeros_like(g), g, vhat=u)
        expected = maximum(u, np.asarray(0, dtype) + abs2(g))
    assert_same_values(state.vhat, expected)
    assert np.isnan(state.vhat[np.isnan(u) | np.isnan(g)]).all()


@KERNEL_DTYPES
def test_sqrt_in_the_kernels(dtype):
    q = normal(1000, dtype) ** 2
    one = np.ones_like(q)
    dx, _ = by_kernels(RMSProp(1.0, 1 - 2**-53, 0.0), np.zeros_like(q), one, q=q)
    rho, rest = np.asarray([1 - 2**-53, 2**-53], dtype)
    assert_same_values(dx, one / sqrt(rho * q + rest))


@KERNEL_DTYPES
def test_minimum_and_where_in_the_kernels(dtype):
    rule = Rprop(1.0, ell=(0.5, 2.0), gamma=(0.25, 3.0))
    last, g = special_pairs(dtype)
    for eta in 0.3, 1.0, 2.0, math.nan:
        dx, state = by_kernels(rule, np.zeros_like(g), g, g=last, eta=eta)
        with np.errstate(all="ignore"):
            trend = last * g
        grown, shrunk = np.asarray([min(2 * eta, 3), max(eta / 2, 0.25)], dtype)
        if math.isnan(eta):
            grown = shrunk = np.asarray(math.nan, dtype)
        expected = np.where(trend > 0, grown, np.where(trend < 0, shrunk, np.asarray(eta, dtype)))
        assert_same_values(state.eta, expected)
        assert_same_values(state.g, np.where(trend < 0, np.asarray(0, dtype), g))
        assert_same_values(dx, 0 - (0 - expected * sign(np.where(trend < 0, 0, g))).astype(dtype))


@KERNEL_DTYPES
def test_nan_and_infinity_reach_the_parameter(dtype):
    for cls in ELEMENTWISE:
        if cls.__name__[0] == "_" or not issubclass(cls, ElementwiseRule):
            continue
        x = np.ones(4, dtype)
        g = np.array([1, math.nan, -1, math.nan], dtype)
        _, new, used = step(update_, setup(example(cls), x), x, g)
        assert set(used.values()) == {"kernels"}
        through = cls is not ZeroNaN  # whose formula says so
        assert np.isnan(new).tolist() == [False, through, False, through], cls
