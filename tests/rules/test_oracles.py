"""Whole trajectories against judges from outside: published formulas, PyTorch, optax."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from util import name_of, step, variants

from optimisers import (
    ADOPT,
    COCOB,
    AccumGrad,
    AdaBelief,
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    AdEMAMix,
    ClipGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    Lion,
    Momentum,
    NAdamW,
    Nesterov,
    OptimiserChain,
    RAdam,
    RMSProp,
    Rprop,
    ScheduleFreeAdamW,
    ScheduleFreeDescent,
    SignDescent,
    Signum,
    WeightDecay,
    Yogi,
    setup,
    update_,
)
from optimisers.rules._base import registry

STEPS = 16


def drawn(dtype="float64", size=24, seed=0):
    """Return a start and gradients, of ordinary sizes so that no rule is at its edges."""
    draw = np.random.default_rng(seed)
    shape = (STEPS + 1, size)
    values = draw.standard_normal(shape) * 10 ** draw.uniform(-1, 1, shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * draw.standard_normal(shape)
    x, *gs = values.astype(dtype)
    return x, gs


def walked(rule, x, gs, backend):
    """Return the parameter after each step, taken by `update_` or by `apply` alone."""
    path = []
    if backend == "kernels":
        x = x.copy()
        state = setup(rule, x)
        for g in gs:
            state, x, used = step(update_, state, x, g)
            assert set(used.values()) == {"kernels"}
            path.append(x.copy())
    else:
        state = rule.init(x)
        for g in gs:
            state, dx = rule.apply(state, x, g)
            x = x if dx is None else x - dx
            path.append(x)
    return np.array(path)


BACKENDS = pytest.mark.parametrize("backend", ["kernels", "arrays"])


def assert_within(got, expected, rtol):
    """Compare paths, relative to where they are, or to 1 near the origin."""
    got, expected = np.asarray(got), np.asarray(expected)
    scale = np.maximum(1, np.abs(expected))
    worst = np.max(np.abs(got - expected) / scale)
    assert worst <= rtol, f"off by {worst:.2e}, more than {rtol:.0e}"


# --- the published formulas ------------------------------------------------------------------

ELEMENTWISE = [
    cls for cls in registry() if issubclass(cls, ElementwiseRule) and cls.measure is None
]
RULES = [rule for cls in ELEMENTWISE for rule in variants(cls)] + [
    RMSProp(0.01, centred=True),
    AdamW(0.01, lambda_=0.3),
    AdamW(0.01, lambda_=0.3, couple=False),
    Rprop(0.3, ell=(0.4, 1.9), gamma=(0.1, 0.7)),
    RAdam(0.01, beta=(0.8, 0.5)),  # r stays below 4
    RAdam(0.01, beta=(0.8, 0.7)),
    ClipGrad(0.5),
    Adam(0.01, epsilon=0.1, epsilon_hat=True),
    AdaGrad(0.3, initial=0.0),
    RMSProp(0.3, 0.8, 1e-3, initial=1.0, epsilon_inside=True),
    RMSProp(0.3, 0.8, 1e-3, centred=True, initial=0.5, epsilon_inside=True),
    ADOPT(0.3, clip=None),
    AdEMAMix(0.01, warmup=5),
    ScheduleFreeDescent(0.1, warmup=5, lambda_=0.1),
    ScheduleFreeAdamW(0.1, warmup=3, r=0.5, power=1.5),
]


def formula_of(rule):
    """Return the name of the public class that a rule is of."""
    return repr(rule).partition("(")[0]


def test_every_elementwise_rule_has_a_formula():
    oracles = pytest.importorskip("oracles", reason="could not import 'mpmath'")
    assert {cls.__name__ for cls in ELEMENTWISE} == set(oracles.FORMULAS)


def step_tolerance(rule):
    """Return how far one step in double may be off, relative to the step.

    Where 1 - b2^t is small, its own rounding tells: by eps / (1 - b2^t), in the end half of that,
    and in RAdam, where r - 4 is a small difference of large numbers, by its size once more.
    """
    eps = np.finfo(float).eps
    b2 = getattr(rule, "beta", (0, 0))[1]
    if isinstance(rule, RAdam):
        return 64 * eps / (1 - b2) ** 2
    return 32 * eps / (1 - b2)


def formula_path(rule, dtype, seed):
    oracles = pytest.importorskip("oracles", reason="could not import 'mpmath'")
    x, gs = drawn(dtype, seed=seed)
    return x, gs, *oracles.trajectory(formula_of(rule), rule, x, gs)


CASES = pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (rule, dtype)
        for rule in RULES
        for dtype in ["float64", "complex128"]
        if dtype == "float64" or not rule.real_only
    ],
    ids=name_of,
)


@CASES
def test_path_with_50_digits(rule, dtype):
    x, gs, _, path, _ = formula_path(rule, dtype, seed=0)
    reach = np.maximum.accumulate(np.abs(np.vstack([x, path])))[1:]
    for backend in ["kernels", "arrays"] if dtype == "float64" else ["arrays"]:
        off = np.abs(walked(rule, x, gs, backend) - path) / reach
        room = 1e-14 if getattr(rule, "warmup", None) else 3e-15  # digits lost in 1 - b3
        assert np.max(off) < room, (backend, float(np.max(off)))
    moves = (path[0] != x) | (path[1] != path[0])  # the first gradient may set a scale alone
    assert np.all(moves)


@CASES
def test_each_step_with_50_digits(rule, dtype):
    x, gs, steps, _, remembered = formula_path(rule, dtype, seed=1)
    state, room, of_x = rule.init(x), step_tolerance(rule), 0.0
    for g, expected in zip(gs, steps, strict=True):
        state, dx = rule.apply(state, x, g)
        x = x - dx
        if not np.any(expected):
            assert not np.any(dx)
            continue
        off = np.max(np.abs(dx - expected)) / np.max(np.abs(expected))
        of_x = digits_of(rule, x) / np.max(np.abs(expected))
        assert off < room + of_x, (float(off), room)
    for name in rule.slots:
        expected = remembered[name]
        off = np.max(np.abs(getattr(state, name) - expected)) / np.max(np.abs(expected))
        assert off < room + of_x, (name, float(off), room)


def digits_of(rule, x):
    """Return what rounding a number like x costs a rule that keeps such numbers."""
    return np.finfo(float).eps * np.max(np.abs(x)) if rule._owns_parameter else 0


def steps_by(rule, x, gs, asarray):
    x, state = asarray(x), rule.init(asarray(x))
    steps = []
    for g in gs:
        state, dx = rule.apply(state, x, asarray(g))
        assert type(dx) is type(x)
        x = x - dx
        steps.append(np.asarray(dx))
    return np.array(steps)


@CASES
def test_same_numbers_by_other_libraries(rule, dtype):
    x, gs = drawn(dtype)
    expected = steps_by(rule, x, gs, np.asarray)
    room = 8 * np.finfo(dtype).eps * np.max(np.abs(expected), axis=1, keepdims=True)
    room = room + digits_of(rule, x)
    torch = pytest.importorskip("torch")
    assert np.all(np.abs(steps_by(rule, x, gs, torch.asarray) - expected) <= room)
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        assert np.all(np.abs(steps_by(rule, x, gs, jax.numpy.asarray) - expected) <= room)


# --- PyTorch ---------------------------------------------------------------------------------


def by_torch(make, x, gs, before=lambda p: None):
    """Return the parameter after each step of the optimiser that `make(torch, [p])` gives."""
    torch = pytest.importorskip("torch")
    p = torch.tensor(x, requires_grad=True)
    optimiser = make(torch, [p])
    path = []
    for g in gs:
        p.grad = torch.tensor(g)
        before(p)
        optimiser.step()
        path.append(p.detach().numpy().copy())
    return np.array(path)


b = (0.8, 0.97)
TORCH = [
    (Descent(0.3), lambda torch, p: torch.optim.SGD(p, lr=0.3)),
    (Momentum(0.3, 0.8), lambda torch, p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
    (
        Nesterov(0.3, 0.8),
        lambda torch, p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True),
    ),
    (
        OptimiserChain(WeightDecay(0.2), Momentum(0.3, 0.8)),
        lambda torch, p: torch.optim.SGD(p, lr=0.3, momentum=0.8, weight_decay=0.2),
    ),
    (
        RMSProp(0.3, 0.8, 1e-3),
        lambda torch, p: torch.optim.RMSprop(p, lr=0.3, alpha=0.8, eps=1e-3),
    ),
    (
        RMSProp(0.3, 0.8, 1e-3, centred=True),
        lambda torch, p: torch.optim.RMSprop(p, lr=0.3, alpha=0.8, eps=1e-3, centered=True),
    ),
    (
        Rprop(0.3, ell=(0.4, 1.3), gamma=(0.05, 0.5)),
        lambda torch, p: torch.optim.Rprop(p, lr=0.3, etas=(0.4, 1.3), step_sizes=(0.05, 0.5)),
    ),
    (
        AdaGrad(0.3, 1e-8),
        lambda torch, p: torch.optim.Adagrad(p, lr=0.3, eps=1e-8, initial_accumulator_value=1e-8),
    ),
    (AdaGrad(0.3, 1e-8, initial=0.0), lambda torch, p: torch.optim.Adagrad(p, lr=0.3, eps=1e-8)),
    (AdaDelta(0.8, 1e-3), lambda torch, p: torch.optim.Adadelta(p, lr=1, rho=0.8, eps=1e-3)),
    (Adam(), lambda torch, p: torch.optim.Adam(p)),
    (Adam(0.3, b, 1e-3), lambda torch, p: torch.optim.Adam(p, lr=0.3, betas=b, eps=1e-3)),
    (
        OptimiserChain(WeightDecay(0.2), Adam(0.3)),
        lambda torch, p: torch.optim.Adam(p, lr=0.3, weight_decay=0.2),
    ),
    (
        AdamW(0.3, b, 0.2, 1e-3),
        lambda torch, p: torch.optim.AdamW(p, lr=0.3, betas=b, weight_decay=0.2, eps=1e-3),
    ),
]


@BACKENDS
@pytest.mark.parametrize(("rule", "make"), TORCH, ids=name_of)
def test_same_numbers_as_torch(rule, make, backend):
    x, gs = drawn()
    assert_within(walked(rule, x, gs, backend), by_torch(make, x, gs), 5e-15)


@BACKENDS
def test_clip_grad_as_torch(backend):
    x, gs = drawn()
    got = walked(OptimiserChain(ClipGrad(0.5), Descent(0.3)), x, gs, backend)
    clip = pytest.importorskip("torch").nn.utils.clip_grad_value_
    expected = by_torch(TORCH[0][1], x, gs, lambda p: clip([p], 0.5))
    assert_within(got, expected, 5e-15)
    assert not np.array_equal(expected, by_torch(TORCH[0][1], x, gs))


@BACKENDS
def test_radam_as_torch_but_at_step_5(backend):
    x, gs = drawn()
    got = walked(RAdam(0.3), x, gs, backend)
    expected = by_torch(lambda torch, p: torch.optim.RAdam(p, lr=0.3), x, gs)
    steps, torch_steps = np.diff(got, axis=0, prepend=[x]), np.diff(expected, axis=0, prepend=[x])
    assert_within(got[:4], expected[:4], 5e-15)
    assert np.all(abs(steps[4] - torch_steps[4]) > 0.1 * abs(torch_steps[4]))
    # Epsilon, 1e-8, counts for more the smaller the gradient.
    assert_within(steps[5:], torch_steps[5:], 1e-7)
    assert np.median(abs(steps[5:] - torch_steps[5:])) < 1e-9


# --- optax -----------------------------------------------------------------------------------


@contextlib.contextmanager
def in_double():
    """Give `optax`, with JAX computing in double meanwhile."""
    optax = pytest.importorskip("optax")
    import jax

    with jax.enable_x64(True):
        yield optax


def by_optax(make, x, gs):
    """Return the parameter after each step of the transformation that `make(optax)` gives."""
    with in_double() as optax:
        import jax.numpy as jnp

        transformation = make(optax)
        x = jnp.asarray(x)
        state = transformation.init(x)
        path = []
        for g in gs:
            step, state = transformation.update(jnp.asarray(g), state, x)
            x = optax.apply_updates(x, step)
            path.append(np.asarray(x))
        assert x.dtype == np.float64
        return np.array(path)


OPTAX = [
    (Descent(0.3), lambda optax: optax.sgd(0.3)),
    (Momentum(0.3, 0.8), lambda optax: optax.sgd(0.3, momentum=0.8)),
    (Nesterov(0.3, 0.8), lambda optax: optax.sgd(0.3, momentum=0.8, nesterov=True)),
    (
        RMSProp(0.3, 0.8, 1e-3),
        lambda optax: optax.rmsprop(0.3, decay=0.8, eps=1e-3, eps_in_sqrt=False),
    ),
    (
        RMSProp(0.3, 0.8, 1e-3, centred=True),
        lambda optax: optax.rmsprop(0.3, decay=0.8, eps=1e-3, eps_in_sqrt=False, centered=True),
    ),
    (Adam(), lambda optax: optax.adam(0.001)),
    (Adam(0.3, b, 1e-3), lambda optax: optax.adam(0.3, *b, eps=1e-3)),
    (AdamW(0.3, b, 0.2, 1e-3), lambda optax: optax.adamw(0.3, *b, eps=1e-3, weight_decay=0.2)),
    (AdaBelief(0.3), lambda optax: optax.adabelief(0.3)),
    (RMSProp(0.3, 0.8, 1e-3, epsilon_inside=True), lambda optax: optax.rmsprop(0.3, 0.8, 1e-3)),
    (
        RMSProp(0.3, 0.8, 1e-3, initial=1.0, epsilon_inside=True),
        lambda optax: optax.rmsprop(0.3, 0.8, 1e-3, initial_scale=1.0),
    ),
    (SignDescent(0.3), lambda optax: optax.sign_sgd(0.3)),
    (Signum(0.3, 0.8), lambda optax: optax.signum(0.3, 0.8)),
    (Yogi(0.3), lambda optax: optax.yogi(0.3)),
    (ADOPT(0.3), lambda optax: optax.contrib.adopt(0.3)),
    (ADOPT(0.3, clip=None), lambda optax: optax.contrib.adopt(0.3, use_clipping=False)),
    (NAdamW(0.3, b, 0.2), lambda optax: optax.nadamw(0.3, *b, weight_decay=0.2)),
    (AdEMAMix(0.3), lambda optax: optax.contrib.ademamix(0.3, alpha=5.0)),
    (ScheduleFreeDescent(0.3, 0.8), lambda optax: optax.contrib.schedule_free_sgd(0.3, b1=0.8)),
    (
        ScheduleFreeAdamW(0.3, b, lambda_=0.1),
        lambda optax: optax.contrib.schedule_free_adamw(0.3, None, *b, weight_decay=0.1),
    ),
    (COCOB(), lambda optax: optax.contrib.cocob()),
    (Lion(0.3, (0.8, 0.97)), lambda optax: optax.lion(0.3, *b, weight_decay=0)),
    (
        OptimiserChain(Lion(0.3, (0.8, 0.97)), WeightDecay(0.3 * 0.2)),
        lambda optax: optax.lion(0.3, *b, weight_decay=0.2),
    ),
    (
        OptimiserChain(ClipGrad(0.5), Adam(0.3)),
        lambda optax: optax.chain(optax.clip(0.5), optax.adam(0.3)),
    ),
    (
        OptimiserChain(ClipNorm(0.5), Adam(0.3)),
        lambda optax: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.3)),
    ),
]


@BACKENDS
@pytest.mark.parametrize(("rule", "make"), OPTAX, ids=name_of)
def test_same_numbers_as_optax(rule, make, backend):
    x, gs = drawn()
    assert_within(walked(rule, x, gs, backend), by_optax(make, x, gs), 5e-15)


@BACKENDS
def test_means_of_gradients_as_optax(backend):
    x, gs = drawn()
    got = walked(OptimiserChain(AccumGrad(3), Adam(0.3)), x, gs, backend)
    expected = by_optax(lambda optax: optax.MultiSteps(optax.adam(0.3), 3), x, gs)
    assert_within(got, expected, 1e-7)  # its running mean passes through float32
    assert np.array_equal(got[0], x)
    assert not np.array_equal(got[2], x)
