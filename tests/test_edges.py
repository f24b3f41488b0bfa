"""Numbers at the edges of formulas: small variances, infinite limits, counts at their end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from util import parametrize

from optimisers import (
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    RMSProp,
    Rprop,
    WeightDecay,
    io,
    setup,
    update,
    update_,
)

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
    from optimisers.torch import Optimizer

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
