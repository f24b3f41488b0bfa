"""Numbers at the edges of formulas: small variances, infinite limits, counts at their end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from util import PUBLIC, example, parametrize

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    NAdam,
    OptimiserChain,
    RAdam,
    RMSProp,
    Rprop,
    WeightDecay,
    destructure,
    io,
    minimize,
    setup,
    update,
    update_,
)
from optimisers._arrays.library import namespace
from optimisers.rules._numbers import counted
from optimisers.words import ema_weight, sign, sqrt

# --- the variance of a gradient that hardly varies --------------------------------------------


def _as_numpy(values):
    return np.asarray(values)


def _as_jax(values):
    return pytest.importorskip("jax").numpy.asarray(values)


def _as_torch(values):
    return pytest.importorskip("torch").asarray(np.asarray(values))


LIBRARIES = parametrize("library", [_as_numpy, _as_jax, _as_torch])


def walked(rule, gradients, dtype, library=_as_numpy, call=update):
    """Return where the parameter is, from 0, after these gradients."""
    x = library(np.zeros(gradients.shape[1], dtype))
    state = setup(rule, x)
    for g in gradients:
        state, x = call(state, x, library(g.astype(dtype)))
    return np.asarray(x)


def hardly_varying(noise, complex_too=False):
    """Return 200 gradients for 3 elements, near 100, 3 and 1e-3, or on a circle of that size."""
    draw = np.random.default_rng(0)
    gradients = np.array([100.0, 3.0, 1e-3]) * (1 + noise * draw.standard_normal((200, 3)))
    return gradients * np.exp(2j) if complex_too else gradients


@LIBRARIES
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_centred_rmsprop_in_single_precision_follows_double(noise, library):
    rule, gradients = RMSProp(1e-3, centred=True), hardly_varying(noise)
    expected = walked(rule, gradients, np.float64)
    for call in (update, update_) if library is _as_numpy else (update,):
        got = walked(rule, gradients, np.float32, library, call)
        np.testing.assert_allclose(got, expected, rtol=1e-2)


@pytest.mark.parametrize("complex_too", [False, True])
def test_centred_rmsprop_in_single_precision_wherever_it_runs(complex_too):
    rule, gradients = RMSProp(1e-3, centred=True), hardly_varying(1e-3, complex_too)
    single, double = (np.complex64, np.complex128) if complex_too else (np.float32, np.float64)
    expected = walked(rule, gradients, double)
    chain = OptimiserChain(WeightDecay(0.0), rule)
    for other in (rule, chain, MixedPrecision("float32", rule)):
        np.testing.assert_allclose(walked(other, gradients, single), expected, rtol=1e-2)


def test_a_constant_gradient_leaves_no_variance():
    gradients = np.full((2000, 3), [0.1, 1e3, 7.0])
    for dtype in np.float32, np.float64:
        x = np.zeros(3, dtype)
        state = setup(RMSProp(centred=True), x)
        for g in gradients:
            update_(state, x, g.astype(dtype))
        deviation = np.sqrt(state.state.q) / gradients[0]
        assert (deviation < 4 * np.finfo(dtype).eps).all(), deviation
        assert np.isfinite(x).all()


def test_a_centred_rmsprop_of_pytorch_goes_on_here():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(1)
    gradients = torch.asarray(draw.standard_normal((9, 5)) + 0.5)
    p = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.RMSprop([p], lr=0.01, alpha=0.9, eps=1e-6, centered=True)
    x = state = None
    for k, g in enumerate(gradients):
        if k == 4:
            kept = theirs.state[p]
            x = p.detach().clone()
            state = setup(RMSProp(0.01, 0.9, 1e-6, centred=True), x)
            state.state.q.copy_(kept["square_avg"] - kept["grad_avg"].abs() ** 2)
            state.state.l.copy_(kept["grad_avg"])
        if state is not None:
            state, x = update_(state, x, g)
        p.grad = g.clone()
        theirs.step()
    np.testing.assert_allclose(x.numpy(), p.detach().numpy(), rtol=1e-12)


# --- upper limits that are infinite -----------------------------------------------------------

UNLIMITED = [
    (Rprop(0.1, gamma=(1e-6, math.inf)), Rprop(0.1, gamma=(1e-6, 1e30))),
    (OptimiserChain(ClipGrad(math.inf), Descent(0.1)), Descent(0.1)),
    *(
        (OptimiserChain(ClipNorm(math.inf, p, throw), Descent(0.1)), Descent(0.1))
        for p, throw in [(2, True), (2, False), (math.inf, True), (0, True), (-1, False)]
    ),
]
WHERE_LIMITS_ARE = pytest.mark.parametrize(("rule", "same"), UNLIMITED, ids=repr)


@WHERE_LIMITS_ARE
@LIBRARIES
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_infinite_limit_is_none(rule, same, library, dtype):
    gradients = np.array([[3.0, -4.0, 0.5]] * 4)
    for call in (update, update_) if library is _as_numpy else (update,):
        got = walked(rule, gradients, dtype, library, call)
        np.testing.assert_array_equal(got, walked(same, gradients, dtype, library, call))
        assert (got != 0).all()


@WHERE_LIMITS_ARE
def test_an_infinite_limit_under_jit_and_in_files(rule, same, tmp_path):
    state = setup(rule, x := np.ones(3))
    io.save(tmp_path / "file", state)
    assert io.load(tmp_path / "file").rule == rule
    jax = pytest.importorskip("jax")
    x, g = jax.numpy.ones(3), jax.numpy.asarray([3.0, -4.0, 0.5])
    one, other = setup(rule, x), setup(same, x)
    for _ in range(3):
        (one, x), (other, y) = jax.jit(update)(one, x, g), jax.jit(update)(other, x, g)
        np.testing.assert_array_equal(x, y)
    assert one.rule == rule


@LIBRARIES
def test_nothing_is_clipped_by_an_infinite_norm(library):
    """Not even a gradient of which no norm can be told, unless that is to raise."""
    gradients = np.array([[math.nan, math.inf, 2.0]])
    rule = OptimiserChain(ClipNorm(math.inf, throw=False), Descent(1.0))
    got = walked(rule, gradients, np.float32, library)
    np.testing.assert_array_equal(got, [math.nan, -math.inf, -2])
    with pytest.raises(FloatingPointError, match="norm"):
        walked(OptimiserChain(ClipNorm(math.inf), Descent(1.0)), gradients, np.float32, library)


def test_nothing_is_clipped_by_a_traced_infinite_norm():
    jax = pytest.importorskip("jax")
    x, g = jax.numpy.zeros(3), jax.numpy.asarray([math.nan, math.inf, 2.0])
    chain = OptimiserChain(ClipNorm(1.0, throw=False), Descent(1.0))

    @jax.jit
    def stepped(omega):
        return update(setup(chain.adjust(omega=omega), x), x, g)[1]

    np.testing.assert_array_equal(stepped(math.inf), [math.nan, -math.inf, -2])
    np.testing.assert_array_equal(stepped(1.0), [math.nan] * 3)


def test_limits_hold_for_groups_of_pytorch():
    torch = pytest.importorskip("torch")
    from optimisers.torch._optimizer import Optimizer

    p = torch.zeros(2, requires_grad=True)
    group = {"params": [p], "gamma": (1e-6, math.inf)}
    optimizer = Optimizer([group], Rprop(0.1))
    p.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    np.testing.assert_allclose(p.detach(), [-0.1, 0.1], rtol=1e-6)
    for wrong in {"gamma": (50.0, 1e-6)}, {"gamma": (0.0, math.nan)}, {"ell": (1.2, 0.5)}:
        with pytest.raises(ValueError, match=f"^Rprop: {next(iter(wrong))}"):
            Optimizer([{"params": [p], **wrong}], Rprop(0.1))
        optimizer.param_groups[0].update(wrong)
        with pytest.raises(ValueError, match=f"^Rprop: {next(iter(wrong))}"):
            optimizer.step()
        optimizer.param_groups[0].update(gamma=(1e-6, 50.0), ell=(0.5, 1.2))


# --- derivatives where a gradient was zero ------------------------------------------------------

NORMS = [OptimiserChain(ClipNorm(1.0, p), Adam()) for p in (2, 1, 0.5, 3, -1, math.inf, -math.inf)]
LEARNERS = [
    *map(example, PUBLIC),
    *NORMS,
    MixedPrecision(OptimiserChain(ClipNorm(1.0), AccumGrad(2), Adam())),
    RMSProp(centred=True),
]


def after_two_steps(rule, theta, x, alive):
    """Return a number made of the parameter after two steps; where not `alive`, g is 0."""
    state = setup(rule, x)
    for _ in range(2):
        state, x = update(state, x, theta * x * alive)
    return namespace(x).sum(namespace(x).abs(x) ** 2)


@parametrize("rule", LEARNERS)
@pytest.mark.parametrize("alive", [(1, 0), (0, 0)])
def test_the_gradient_through_steps_of_a_dead_parameter(rule, alive):
    jax = pytest.importorskip("jax")
    x, alive = jax.numpy.asarray([1.0, 2.0]), jax.numpy.asarray(alive)

    def outcome(theta):
        return after_two_steps(rule, theta, x, alive)

    slope = jax.jit(jax.grad(outcome))(1.3)
    outcome = jax.jit(outcome)
    difference = (outcome(1.31) - outcome(1.29)) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=5e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(Adam(), "float16"), (Adam(), "bfloat16"), (NORMS[0], "float32"), (NORMS[2], "complex64")],
)
def test_every_kind_of_derivative_through_steps_of_a_dead_parameter(rule, dtype):
    jax = pytest.importorskip("jax")
    x, alive = jax.numpy.asarray([1.0, 2.0], dtype), jax.numpy.asarray([1, 0]).astype(dtype)

    def outcome(theta):
        return after_two_steps(rule, theta.astype(dtype), x, alive).astype("float32")

    theta = jax.numpy.asarray(1.3)
    grad = jax.grad(outcome)
    found = [jax.jit(f)(theta) for f in (grad, jax.jacfwd(outcome), jax.hessian(outcome))]
    found.append(jax.jit(jax.vmap(grad))(jax.numpy.stack([theta, 2 * theta])))
    assert all(np.isfinite(v).all() for v in found), found


@parametrize("rule", LEARNERS)
def test_derivatives_beyond_float16_stay_finite(rule):
    """As that of Adam is where a gradient was zero, 1e5; of the step it is computed in float32."""
    jax = pytest.importorskip("jax")
    x, g = jax.numpy.asarray([1.0, 2.0, 3.0], "float16"), jax.numpy.asarray([3e4, 0.0, 6e-8])

    def outcome(theta):
        state, y = setup(rule, x), x
        for _ in range(2):
            state, y = update(state, y, (theta * g).astype("float16"))
        return jax.numpy.sum(y.astype("float32"))

    assert np.isfinite(jax.jit(jax.grad(outcome))(1.0))


@pytest.mark.parametrize("beta", [(0.9, 0.999), (0.5, 0.25), (0.0, 0.5)])
def test_the_gradient_with_respect_to_the_numbers_of_a_rule(beta):
    jax = pytest.importorskip("jax")
    x, alive = jax.numpy.asarray([1.0, 2.0]), jax.numpy.asarray([1, 0])

    def outcome(rule):
        return after_two_steps(rule, 1.3, x, alive)

    eta, (one, two) = jax.grad(lambda eta, beta: outcome(Adam(eta, beta)), (0, 1))(0.1, beta)
    h = 1e-2
    difference = (outcome(Adam(0.1 + h, beta)) - outcome(Adam(0.1 - h, beta))) / (2 * h)
    np.testing.assert_allclose(eta, difference, rtol=1e-2, atol=1e-3)
    assert np.isfinite([one, two]).all()


def test_the_weight_of_an_average_has_the_derivative_that_it_has():
    jax = pytest.importorskip("jax")
    for t in 1, 2, 7:
        for beta in 0.0, 0.1, 0.49, 0.51, 0.9, 0.999:
            with jax.enable_x64(True):
                value, slope = jax.value_and_grad(ema_weight)(beta, t)
            np.testing.assert_allclose(value, 1 - beta**t, rtol=1e-6)
            if beta > 0 or t > 1:
                np.testing.assert_allclose(slope, -t * beta ** (t - 1), rtol=1e-5, atol=1e-12)
            else:  # by expm1, whose derivative rounds to 0 there: at least it is finite
                assert np.isfinite(slope)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@parametrize("cls", [cls for cls in PUBLIC if cls not in (AccumGrad, ClipNorm)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_the_gradient_through_apply_in_pytorch(cls, dtype):
    torch = pytest.importorskip("torch")
    rule, x = example(cls), torch.tensor([1.0, 2.0]).to(getattr(torch, dtype))
    if getattr(cls, "real_only", False) and x.is_complex():
        return

    def outcome(theta):
        state, y = rule.init(x), x
        for _ in range(2):
            state, dx = rule.apply(state, y, torch.stack([theta, 0 * theta]).to(x.dtype))
            y = y - dx
        return y.abs().square().sum()

    theta = torch.tensor(1.3)
    found = [
        torch.func.grad(outcome)(theta),
        torch.func.jvp(outcome, (theta,), (torch.ones(()),))[1],
        torch.func.vmap(torch.func.grad(outcome))(torch.stack([theta, 2 * theta])),
    ]
    assert all(bool(torch.isfinite(v).all()) for v in found), found


@parametrize("rule", [*map(example, PUBLIC), *NORMS])
def test_the_gradient_through_steps_by_autograd(rule):
    autograd = pytest.importorskip("autograd")
    alive = np.array([1.0, 0.0])
    slope = autograd.grad(lambda theta: after_two_steps(rule, theta, theta * np.ones(2), alive))(
        1.3
    )
    assert np.isfinite(slope)


@LIBRARIES
def test_roots_and_signs_keep_their_values(library):
    x = library(np.array([0.0, 1e-30, 2.25, math.inf, math.nan], np.float32))
    np.testing.assert_array_equal(np.asarray(sqrt(x)), np.sqrt(np.asarray(x)))
    jax = pytest.importorskip("jax")
    y = jax.numpy.asarray(np.asarray(x))
    np.testing.assert_array_equal(jax.jit(sqrt)(y), np.sqrt(np.asarray(x)))
    np.testing.assert_array_equal(jax.vmap(jax.grad(sqrt))(y)[:4], [0, *0.5 / np.sqrt(y[1:4])])


def test_the_sign_of_a_complex_zero_has_a_derivative_in_pytorch():
    torch = pytest.importorskip("torch")
    z = torch.tensor([0j, 3 + 4j], requires_grad=True)
    value = sign(z)
    value.real.sum().backward()
    np.testing.assert_allclose(value.detach(), [0, 0.6 + 0.8j], rtol=1e-6)
    assert bool(torch.isfinite(z.grad.abs()).all())


# --- counts at their end ------------------------------------------------------------------------


def at_count(state, t):
    """Return a state whose counts are all `t`, in their own dtypes."""
    if isinstance(state, tuple):
        named = hasattr(state, "_make")
        made = [
            np.asarray(t, a.dtype) if name == "t" else at_count(a, t)
            for name, a in zip(state._fields if named else [None] * len(state), state, strict=True)
        ]
        return type(state)._make(made) if named else tuple(made)
    return state


COUNTING = [cls for cls in PUBLIC if getattr(cls, "counts", False)]
LAST = 2**31 - 1


@parametrize("rule", [*(cls(0.1) for cls in COUNTING), MixedPrecision(OptimiserChain(NAdam(0.1)))])
def test_counts_of_jax_arrays_stop_at_their_end(rule):
    jax = pytest.importorskip("jax")
    x, g = jax.numpy.ones(2), jax.numpy.asarray([1.0, -2.0])
    late, later = setup(rule, x), setup(rule, np.ones(2, np.float32))
    late.state, later.state = at_count(late.state, LAST - 1), at_count(later.state, LAST - 1)
    _, expected = update(later, np.ones(2, np.float32), np.asarray(g))
    for call in update, jax.jit(update):
        state, y = late, x
        for k in range(3):
            state, y = call(state, y, g)
            if k == 0:
                np.testing.assert_allclose(y, expected, rtol=1e-5)
        leaves = jax.tree_util.tree_leaves(state.state)
        assert [int(a) for a in leaves if getattr(a, "dtype", None) == "int32"] == [LAST]
        assert np.isfinite(y).all()
        assert (np.abs(y - x) > 0.01).all()


@parametrize("library", [_as_numpy, _as_jax, _as_torch])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_a_count_goes_up_by_one_and_stops(library, dtype):
    largest = int(np.iinfo(dtype).max)
    with pytest.importorskip("jax").enable_x64(True):
        for t, expected in [(0, 1), (6, 7), (largest - 1, largest), (largest, largest)]:
            count = library(np.asarray(t, dtype))
            after = counted(count)
            assert after.dtype == count.dtype
            assert int(after) == expected


@pytest.mark.parametrize("call", [update, update_])
@LIBRARIES
def test_the_largest_count_of_all_goes_on(call, library):
    x = library(np.ones(2))
    state = setup(Adam(0.1), x)
    last = np.iinfo(str(state.state.t.dtype).removeprefix("torch.")).max
    state.state = state.state._replace(t=library(np.full((), last, f"int{last.bit_length() + 1}")))
    for _ in range(2):
        state, x = call(state, x, library(np.ones(2)))
    assert int(state.state.t) == last
    assert (np.asarray(x) < 1).all()


# --- strict promotion in JAX --------------------------------------------------------------------

STRICT = [
    *map(example, PUBLIC),
    RAdam(0.01, (0.8, 0.5)),
    RMSProp(centred=True),
    OptimiserChain(ClipNorm(1.0, 0), Adam()),
    OptimiserChain(ClipNorm(1.0, 1), AccumGrad(2), WeightDecay(0.1), Adam()),
    MixedPrecision(OptimiserChain(ClipNorm(1.0), AccumGrad(2), Adam())),
]


@parametrize("rule", STRICT)
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_strict_promotion_gives_the_same_numbers(rule, dtype):
    jax = pytest.importorskip("jax")
    # Products of the gradient with itself are not singular.
    x = jax.numpy.asarray([[1.0, 2.0], [0.5, -1.0]], dtype)
    g = jax.numpy.asarray([[3.0, -4.0], [1.0, 2.0]], dtype)
    try:
        state = setup(rule, x)
    except TypeError:  # real parameters only
        return
    expected = update(*update(state, x, g), g)[1]
    with jax.numpy_dtype_promotion("strict"):
        for call in update, jax.jit(update):
            got = call(*call(setup(rule, x), x, g), g)[1]
            assert got.dtype == x.dtype
            np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_strict_promotion_beside_other_ways_to_take_a_step():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    from optimisers.optax import from_optax, to_optax

    model = {"w": jax.numpy.ones((2, 3)), "b": jax.numpy.ones(())}
    grad = jax.tree.map(lambda x: 3 * x, model)

    def loss(model):
        return (model["w"] ** 2).sum() + model["b"] ** 2

    with jax.numpy_dtype_promotion("strict"):
        chain = OptimiserChain(ClipNorm(1.0), RAdam())
        tx = to_optax(chain)
        updates, _ = jax.jit(tx.update)(grad, tx.init(model), model)
        assert optax.apply_updates(model, updates)["w"].dtype == "float32"
        flat, re = destructure(model)
        _, flat = jax.jit(update)(setup(chain, flat), flat, jax.grad(lambda v: loss(re(v)))(flat))
        found = minimize(loss, model, chain, 3, value_and_grad=jax.value_and_grad, progress=False)
        assert found.history.loss[-1] < found.history.loss[0]
        rule = from_optax(optax.sgd(0.1))
        update(setup(rule, model), model, grad)
        jax.jit(update)(setup(rule, model), model, grad)
        eta = jax.numpy.asarray(0.1)
        stepped = jax.jit(lambda eta: update(setup(chain.adjust(eta=eta), model), model, grad))
        assert stepped(eta)[1]["w"].dtype == "float32"
