"""Rules made of rules: chains, means over steps, mixed precision."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from composed import BACKENDS, BLOCK, KERNEL_DTYPES, Pass, on, stepped
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
    setup,
    update,
    update_,
)

pytestmark = [pytest.mark.elsewhere, pytest.mark.portable, pytest.mark.sanitized]


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
