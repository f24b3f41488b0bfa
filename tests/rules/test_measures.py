"""Rules that measure: over an array, axes of it, or the tree, on every engine."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from composed import on
from measuring import Together, Trusted
from util import MEASURING, assert_same_bits, example, parametrize

from optimisers import (
    LAMB,
    AccumGrad,
    Adam,
    Centralise,
    ClipAdaptive,
    ClipGlobalNorm,
    ClipNorm,
    Descent,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Polyak,
    Prodigy,
    TrustRatio,
    WeightDecay,
    all_finite,
    destructure,
    freeze_,
    minimize,
    norm,
    norms,
    setup,
    thaw_,
    update,
    update_,
)
from optimisers._engine import advance as engine

CLIPPED = OptimiserChain(ClipGlobalNorm(0.5), Adam(0.1))
RULES = [
    *(example(cls) for cls in MEASURING),
    TrustRatio(0.1, 0.01),
    LAMB(0.1, lambda_=0.1),
    Prodigy(d0=1e-2, lambda_=0.1, corrected=True, growth=1.5),
    Prodigy(d0=1e-2, safeguard=True, beta3=0.9),
    ClipGlobalNorm(0.1, 1.0),
    ClipGlobalNorm(0.1, math.inf),
    CLIPPED,
    OptimiserChain(Momentum(), ClipGlobalNorm(0.1), LAMB(0.1), ClipGlobalNorm(1e-3, 3.0)),
    OptimiserChain(WeightDecay(0.1), Centralise(), ClipAdaptive(0.1), Descent(0.1)),
    OptimiserChain(AccumGrad(2), ClipGlobalNorm(0.5), TrustRatio(0.1)),
    MixedPrecision(OptimiserChain(ClipGlobalNorm(0.5), LAMB(0.1))),
]
SHAPES = (), (5,), (4, 3), (2, 3, 4), (0,)


def model_of(dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in SHAPES]


def copied(model: list[np.ndarray]) -> list[np.ndarray]:
    return [x.copy() for x in model]


def gradient(model: list[Any]) -> list[Any]:
    """Return the gradient of sum_k (k + 1) |x - 0.3|²."""
    return [(2 * (k + 1) * (x - 0.3)).astype(x.dtype) for k, x in enumerate(model)]


def loss(model: list[Any]) -> float:
    return float(sum((k + 1) * np.sum((x - 0.3) ** 2) for k, x in enumerate(model)))


def trained(rule: Any, model: Any, call: Any = update_, steps: int = 5) -> Any:
    state, model = setup(rule, model), model
    for _ in range(steps):
        state, model = call(state, model, gradient(model), value=loss(model))
    return state, model


# --- the engines ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@parametrize("rule", [rule for rule in RULES if not isinstance(rule, MixedPrecision)])
def test_kernels_have_the_numbers_of_the_arrays(rule, dtype):
    model = model_of(dtype)
    found = {}
    for backend in "kernels", "arrays":
        _, found[backend] = trained(on(backend, rule), copied(model))
    for a, b in zip(found["kernels"], found["arrays"], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5 if dtype == np.float32 else 1e-12, atol=1e-7)


@parametrize("rule", RULES)
def test_update_in_place_equals_update(rule):
    model = model_of()
    pure, in_place = trained(rule, copied(model), update), trained(rule, copied(model))
    assert_same_bits(pure[1], in_place[1])
    for a, b in zip(pure[0], in_place[0], strict=True):
        assert_same_bits(a.state, b.state)


@pytest.mark.parametrize(
    "rule", [ClipNorm(0.1), CLIPPED, LAMB(), TrustRatio(), Polyak(), ClipGlobalNorm(0.1, 3.0)]
)
def test_they_are_compiled(rule):
    model = model_of(np.float32)
    with engine.watching() as seen:
        trained(rule, model, steps=1)
    assert {backend for _, backend in seen} == {"kernels"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@parametrize("rule", [rule for rule in RULES if not isinstance(rule, Prodigy)])
def test_narrow_numbers_stay_near_those_of_float32(rule, dtype):
    narrow = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    model = [x.astype(narrow) for x in model_of(np.float32)]
    wide = [x.astype(np.float32) for x in model]
    _, got = trained(rule, model, steps=1)
    _, right = trained(rule, wide, steps=1)
    for a, b in zip(got, right, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_norms_in_float32_neither_overflow_nor_vanish(size):
    g = np.array([3, -4], np.float32) * np.float32(size)
    state, x = update(setup(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)), g * 0), g * 0, g)
    assert norms(state) == (pytest.approx(5 * size, rel=1e-6),)
    np.testing.assert_allclose(x, [-0.6, 0.8] if size > 1 else -g, rtol=1e-6)
    _, x = update(setup(TrustRatio(), g), g, g)
    np.testing.assert_allclose(x, 0 * g, atol=1e-6 * size)


@parametrize(
    "rule", [LAMB(0.1), TrustRatio(0.1), CLIPPED, Centralise(), ClipAdaptive(), ClipNorm()]
)
def test_complex_parameters_move_along_real_factors(rule):
    x, g = np.array([[1 + 2j, 3j], [0.5, -1j]]), np.array([[1j, 2.0], [1 + 1j, 3.0]])
    _, new = update(setup(rule, x), x, g)
    assert np.isfinite(new).all()
    assert new.dtype == x.dtype
    if not isinstance(rule, LAMB) and rule is not CLIPPED:
        _, pair = update(setup(rule, np.abs(x)), np.abs(x), np.abs(g))
        assert np.isfinite(pair).all()


def test_prodigy_takes_real_parameters_only():
    with pytest.raises(TypeError, match="real parameters only"):
        setup(Prodigy(), np.ones(2, complex))


@parametrize("rule", RULES)
def test_a_gradient_of_zero_is_harmless_from_the_first_step(rule):
    model = model_of()
    state = setup(rule, model)
    zero = [np.zeros_like(x) for x in model]
    for _ in range(3):
        state, model = update(state, model, zero, value=0.0)
    assert all(np.isfinite(x).all() for x in model)
    state, model = update(state, model, gradient(model), value=1.0)
    assert all(np.isfinite(x).all() for x in model)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads):
    import optimisers

    before = optimisers.get_num_threads()
    rule = OptimiserChain(ClipGlobalNorm(0.1, 3.0), LAMB(0.1))
    x, g = (np.random.default_rng(k).normal(size=300_001).astype(np.float32) for k in (0, 1))
    try:
        optimisers.set_num_threads(threads)
        _, got = update(setup(rule, x), x, g)
        optimisers.set_num_threads(1)
        _, right = update(setup(rule, x), x, g)
    finally:
        optimisers.set_num_threads(before)
    assert_same_bits(got, right)


# --- over the tree ----------------------------------------------------------------------------


def test_a_global_clip_behind_a_decay_equals_that_of_the_flat_vector():
    model = model_of()
    rule = OptimiserChain(WeightDecay(0.1), ClipGlobalNorm(0.5), Momentum(0.1))
    flat, re = destructure(model)
    state, flat_state = setup(rule, model), setup(rule, flat)
    for _ in range(4):
        flat_state, flat = update(flat_state, flat, re.flatten_gradient(gradient(model)))
        state, model = update(state, model, gradient(model))
    np.testing.assert_allclose(destructure(model)[0], flat, rtol=1e-14)


def test_kernels_and_arrays_share_the_norm_of_one_tree():
    model = [np.ones(3), np.ones(4, np.complex128), np.ones((2, 4))[:, ::2]]
    state = setup(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)), model)
    with engine.watching() as seen:
        state, model = update_(state, model, [np.full(3, 2.0), np.full(4, 2j), np.full((2, 2), 2)])
    assert {backend for _, backend in seen} == {"kernels", "arrays"}
    assert norms(state) == (pytest.approx(math.sqrt(44)),)
    np.testing.assert_allclose(model[0], 1 - 2 / math.sqrt(44))
    np.testing.assert_allclose(model[2], 1 - 2 / math.sqrt(44))


def test_frozen_leaves_and_those_without_a_gradient_take_no_part():
    model = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(1)}
    state = setup(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)), model)
    freeze_(state["b"])
    update_(state, model, {"a": np.array([3.0, 0.0]), "b": np.full(2, 9.0), "c": np.array([4.0])})
    assert norms(state) == (5.0,) == norms(state["b"])
    update_(state, model, {"a": np.array([3.0, 0.0]), "b": None, "c": None})
    assert norms(state) == (3.0,)
    assert np.all(model["b"] == 0)


def test_a_tied_array_counts_once():
    w = np.zeros((2, 2))
    model = {"encoder": w, "decoder": w.T}
    state = setup(OptimiserChain(ClipGlobalNorm(1.0), Descent(1.0)), model)
    g = np.array([[3.0, 0.0], [0.0, 0.0]])
    update_(state, model, {"encoder": g, "decoder": g / 3})
    assert norms(state) == (4.0,)
    assert w[0, 0] == -1.0


def test_each_rank_has_a_norm_of_its_own():
    both = OptimiserChain(ClipGlobalNorm(math.inf), Descent(0.5), ClipGlobalNorm(math.inf))
    one = OptimiserChain(ClipGlobalNorm(math.inf), Descent(0.5))
    model = [np.zeros(1), np.zeros(1)]
    state = [setup(both, model[0]), setup(one, model[1])]
    update_(state, model, [np.array([3.0]), np.array([4.0])])
    assert norms(state) == (5.0, 1.5)


def test_rules_of_the_tree_in_opposite_order_are_refused_with_both_paths():
    a, b = ClipGlobalNorm(1.0), Polyak()
    model = [np.ones(2), np.ones(2)]
    state = [setup(OptimiserChain(a, b), model[0]), setup(OptimiserChain(b, a), model[1])]
    before = copied(model)
    with pytest.raises(
        TypeError, match=r"ClipGlobalNorm stands ahead of Polyak at \[0\], .* \[1\]"
    ):
        update_(state, model, [np.ones(2), np.ones(2)], value=1.0)
    assert_same_bits(model, before)


@pytest.mark.parametrize("wide", [False, True])
def test_leaves_that_differ_in_what_shapes_the_norm_are_refused_with_both_paths(wide):
    model = [np.ones(2), np.ones(2, np.longdouble if wide else float)]
    state = [setup(ClipGlobalNorm(p=1.0), model[0]), setup(ClipGlobalNorm(p=2.0), model[1])]
    with pytest.raises(TypeError, match=r"with one p, got 1.0 at \[0\] and 2.0 at \[1\]"):
        update_(state, model, [np.ones(2), np.ones(2)])


def test_leaves_may_differ_in_other_numbers():
    model = [np.zeros(1), np.zeros(1)]
    rules = [OptimiserChain(ClipGlobalNorm(omega), Descent(1.0)) for omega in (1.0, math.inf)]
    state = [setup(rule, x) for rule, x in zip(rules, model, strict=True)]
    update_(state, model, [np.array([3.0]), np.array([4.0])])
    np.testing.assert_allclose(np.concatenate(model), [-0.6, -4.0])


@pytest.mark.parametrize("call", [update, update_])
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_a_norm_that_throws_names_the_path_and_writes_nothing(dtype, call):
    model = {"a": np.ones(2, dtype), "b": np.ones(2, dtype)}
    state = setup(OptimiserChain(Momentum(), ClipGlobalNorm(), LAMB()), model)
    before = copy.deepcopy((model, state["a"].state, state["b"].state))
    with pytest.raises(FloatingPointError, match=r"at \['b'\]: ClipGlobalNorm: .* 2-norm inf"):
        call(state, model, {"a": np.ones(2, dtype), "b": np.array([1, np.inf], dtype)})
    assert_same_bits((model, state["a"].state, state["b"].state), before)
    quiet = OptimiserChain(ClipGlobalNorm(throw=False), Descent())
    _, new = update(
        setup(quiet, model), model, {"a": np.ones(2, dtype), "b": [np.inf, 1] * model["b"]}
    )
    assert np.all(np.isnan(new["b"][:1]))
    assert np.all(new["a"] == 1)


def test_the_first_leaves_of_a_tree_share_what_it_keeps():
    model = model_of()
    state = setup(Prodigy(), model)
    assert len({id(leaf.state.kept) for leaf in state}) == 1
    state, _ = trained(Prodigy(), model)
    assert len({id(leaf.state.kept) for leaf in state}) == 1
    for other in copy.deepcopy(state), pickle.loads(pickle.dumps(state)):
        assert len({id(leaf.state.kept) for leaf in other}) == 1
    pure, _ = trained(Prodigy(), model, update)
    assert len({id(leaf.state.kept) for leaf in pure}) == 1


def test_what_a_tree_keeps_goes_on_in_a_frozen_leaf():
    model = model_of()[:3]
    state = setup(Prodigy(d0=1e-2), model)
    freeze_(state[0])
    for _ in range(3):
        update_(state, model, gradient(model))
    thaw_(state[0])
    assert state[0].state.d == state[1].state.d > 1e-2


def test_of_several_versions_the_one_with_the_largest_count_goes_on():
    model = model_of()[1:3]
    state = setup(Prodigy(d0=1e-2), model)
    first, new = update(state[0], model[0], gradient(model)[0])
    for _ in range(3):
        first, new = update(first, new, gradient(model)[0])
    assert first.state.d > 1e-2
    mixed = [first, copy.deepcopy(state[1])]
    mixed, _ = update(mixed, [new, model[1]], gradient([new, model[1]]))
    assert mixed[0].state.d == mixed[1].state.d >= first.state.d
    assert mixed[0].state.kept[-1] == mixed[1].state.kept[-1] == 5


def test_prodigy_refuses_leaves_with_different_eta():
    model = [np.ones(2), np.ones(2)]
    state = [setup(Prodigy(eta=eta), x) for eta, x in zip((1.0, 0.5), model, strict=True)]
    with pytest.raises(TypeError, match=r"with one eta, got 1.0 at \[0\] and 0.5 at \[1\]"):
        update_(state, model, [np.ones(2), np.ones(2)])


def test_leaves_that_hold_gradients_back_take_no_part():
    rule = OptimiserChain(AccumGrad(2), ClipGlobalNorm(1.0), Descent(1.0))
    model = [np.zeros(1), np.zeros(1)]
    state = setup(rule, model)
    update_(state, model, [np.array([3.0]), np.array([4.0])])
    assert norms(state) == (0.0,)
    update_(state, model, [np.array([3.0]), np.array([4.0])])
    assert norms(state) == (5.0,)
    np.testing.assert_allclose(np.concatenate(model), [-0.6, -0.8])


# --- the value of the loss -------------------------------------------------------------------


def test_a_rule_that_needs_the_value_says_so():
    x = np.ones(2)
    state = setup(OptimiserChain(Polyak(), Descent()), [x])
    with pytest.raises(TypeError, match=r"Polyak needs the value of the loss.*value=loss"):
        update_(state, [x], [x])
    assert np.all(x == 1)


@pytest.mark.parametrize("value", ["1", np.ones(2), 1j, [1.0]])
def test_the_value_is_one_real_number(value):
    x = np.ones(2)
    with pytest.raises(TypeError, match="value must be the loss, one real number"):
        update_(setup(Polyak(), x), x, x, value=value)


def test_other_rules_take_a_value_and_pass_it_over():
    x, y = np.ones(2), np.ones(2)
    update_(setup(Adam(), x), x, x, value=3.0)
    update_(setup(Adam(), y), y, np.ones(2))
    assert_same_bits(x, y)


def test_minimize_hands_the_value_on():
    found = minimize(lambda x: float(x @ x), np.array([3.0, 4.0]), Polyak(), 3, progress=False,
                     value_and_grad=lambda x: (float(x @ x), 2 * x))  # fmt: skip
    np.testing.assert_allclose(found.model, np.array([3.0, 4.0]) / 8)


# --- against formulas -------------------------------------------------------------------------


def test_lamb_is_a_chain():
    rule = LAMB(0.1, lambda_=0.1)
    chain = OptimiserChain(Adam(1.0, epsilon=1e-6), WeightDecay(0.1), TrustRatio(), Descent(0.1))
    _, a = trained(rule, model_of())
    _, b = trained(chain, model_of())
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


@pytest.mark.parametrize("outputs", [0, 1, -1])
def test_centralise_takes_the_mean_of_each_unit(outputs):
    g = np.random.default_rng(0).normal(size=(2, 3, 4))
    others = tuple(k for k in range(3) if k != outputs % 3)
    _, dx = Centralise(outputs).apply((), g, g)
    np.testing.assert_allclose(dx, g - g.mean(others, keepdims=True), atol=1e-15)
    assert_same_bits(Centralise().apply((), g[0, 0], g[0, 0])[1], g[0, 0])


def test_an_axis_that_an_array_does_not_have_is_refused_with_its_path():
    x = {"w": np.ones((2, 2))}
    with pytest.raises(ValueError, match="outputs=2 is no axis of an array with 2 axes"):
        update_(setup(Centralise(2), x), x, x)


@pytest.mark.parametrize("kw", [{}, {"corrected": True}, {"growth": 1.3}, {"safeguard": True}])
def test_prodigy_against_its_formula(kw):
    rule = Prodigy(d0=1e-3, lambda_=0.01, **kw)
    b1, b2 = rule.beta
    b3, q = math.sqrt(b2), np.concatenate
    model = model_of()[1:4]
    x = q([m.ravel() for m in model])
    x0, m, v, s, d, most, num = x.copy(), 0 * x, 0 * x, 0 * x, 1e-3, 1e-3, 0.0
    state = setup(rule, model)
    for t in range(1, 30):
        g = q([a.ravel() for a in gradient(model)])
        state, model = update(state, model, gradient(model))
        rate = d * (math.sqrt(1 - b2**t) / (1 - b1**t) if rule.corrected else 1)
        num = b3 * num + d / 1e-3 * rate * (g @ (x0 - x))
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d * d * g * g
        s = b3 * s + d / 1e-3 * (d if rule.safeguard else rate) * g
        found = num / np.abs(s).sum()
        d = max(d, found) if d == 1e-3 else d
        most = max(most, found)
        d = min(most, rule.growth * d)
        x = x - rate * m / (np.sqrt(v) + d * 1e-8) - 0.01 * rate * x
        np.testing.assert_allclose(q([a.ravel() for a in model]), x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state[0].state.d, d, rtol=1e-12)
    assert d > 1e-3


# --- functions of trees ------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 1.0, 3, 0.5, 0, math.inf, -math.inf])
def test_the_norm_of_a_tree_is_that_of_its_vector(p):
    model = model_of()[:4]
    flat = np.abs(np.concatenate([x.ravel() for x in model]))
    assert norm(model, p) == pytest.approx(np.linalg.norm(flat, p), rel=1e-13)
    assert type(norm(model, p)) is float


def test_norms_of_trees_pass_over_what_is_no_array():
    w = np.array([3.0, 4.0])
    assert norm({"w": w, "name": "layer", "none": None, "tied": w}) == 5.0
    assert norm({}) == 0.0 == norm([np.zeros(0)])
    assert all_finite({"w": w, "name": "layer"}) is True
    assert all_finite([w, np.array([np.nan])]) is False
    with pytest.raises(TypeError, match="p must be a number"):
        norm(w, "2")


def test_norms_of_a_state_without_such_rules_are_none():
    assert norms(setup(Adam(), [np.ones(2)])) == ()
    assert norms(setup(ClipGlobalNorm(), [np.ones(2)])) == (0.0,)


# --- rules of users ----------------------------------------------------------------------------


@parametrize("rule", [Trusted(0.1), Together(0.5), OptimiserChain(ClipGlobalNorm(1.0), Trusted())])
def test_rules_of_users_measure_too(rule):
    pytest.importorskip("numba")
    for dtype in np.float32, np.float64:
        model = model_of(dtype)
        with engine.watching() as seen:
            _, got = trained(rule, copied(model))
        assert {backend for _, backend in seen} == {"kernels"}
        _, right = trained(on("arrays", rule), copied(model))
        for a, b in zip(got, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_a_users_trust_ratio_has_our_numbers():
    _, got = trained(Trusted(0.1), model_of())
    _, right = trained(TrustRatio(0.1), model_of())
    for a, b in zip(got, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
