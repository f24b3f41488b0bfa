"""Rules that average their own path, the model to evaluate, and rules that own their parameter."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from optimisers import (
    COCOB,
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Leaf,
    MixedPrecision,
    Muon,
    OptimiserChain,
    ScheduleFreeAdamW,
    ScheduleFreeDescent,
    WeightDecay,
    evaluation,
    freeze_,
    io,
    setup,
    update,
    update_,
)
from optimisers.rules import schedulefree

RULES = [
    ScheduleFreeDescent(0.1, 0.8),
    ScheduleFreeDescent(0.1, warmup=4, lambda_=0.1),
    ScheduleFreeAdamW(0.1),
    ScheduleFreeAdamW(0.1, (0.7, 0.9), warmup=7, r=1.5, power=1.0),
]
EACH = pytest.mark.parametrize("rule", RULES, ids=repr)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def trained(rule: Any, model: Any, gs: Any) -> tuple[Any, Any]:
    state = setup(rule, model)
    for g in gs:
        state, model = update(state, model, g)
    return state, model


# --- shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 7, 300])
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0, 2.5])
def test_shares_are_those_of_the_sum_of_all_weights(warmup: int, r: float) -> None:
    """Also where the sum is taken by a formula."""
    total = 0.0
    for t in range(1, 2000):
        weight = t**r * min(1, t / warmup if warmup else 1) ** 2
        total += weight
        share = schedulefree._share(t, warmup, r, 2.0)
        assert math.isclose(share, weight / total, rel_tol=1e-12), t


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_shares_of_traced_counts(r: float) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        traced = jax.jit(lambda t: schedulefree._share(t, 5, r, 2.0))
        for t in (1, 4, 5, 6, 127, 128, 129, 1000):
            assert math.isclose(traced(t), schedulefree._share(t, 5, r, 2.0), rel_tol=1e-14)


# --- the model to evaluate ---------------------------------------------------------------------


@EACH
def test_the_model_to_evaluate_is_the_weighted_mean_of_z(rule: Any) -> None:
    """Gradients are taken at y, between the mean and z."""
    y, gs = drawn(0, 5), [drawn(k, 5) for k in range(1, 30)]
    b1 = rule.rho if isinstance(rule, ScheduleFreeDescent) else rule.beta[0]
    state, total, mean = setup(rule, y), 0.0, np.zeros(5)
    for t, g in enumerate(gs, start=1):
        state, y = update(state, y, g)
        z = state.state.z
        weight = t**rule.r * min(1, t / rule.warmup if rule.warmup else 1) ** rule.power
        total += weight
        mean += weight / total * (z - mean)
        assert np.allclose(evaluation(state, y), mean, rtol=1e-10, atol=1e-12)
        assert np.allclose(y, b1 * mean + (1 - b1) * z, rtol=1e-10, atol=1e-12)


@EACH
def test_before_the_first_step_it_is_the_model_itself(rule: Any) -> None:
    model = {"w": drawn(0, 3), "n": 1}
    assert evaluation(setup(rule, model), model) is model


def test_other_rules_share_their_arrays() -> None:
    model = {"a": drawn(0, 3), "b": [drawn(1, 2), 7]}
    state = {"a": setup(ScheduleFreeDescent(0.1), model["a"]), "b": setup(Adam(), model["b"])}
    state, model = update(state, model, {"a": drawn(2, 3), "b": [drawn(3, 2), None]})
    state, model = update(state, model, {"a": drawn(2, 3), "b": [drawn(3, 2), None]})
    found = evaluation(state, model)
    assert found["b"][0] is model["b"][0]
    assert found["b"][1] == 7
    assert not np.array_equal(found["a"], model["a"])
    assert evaluation(state["b"], model["b"]) is model["b"]


def test_it_is_found_inside_other_rules() -> None:
    x, gs = drawn(0, 4), [drawn(k, 4) for k in range(1, 6)]
    rule = ScheduleFreeAdamW(0.1)
    expected = evaluation(*trained(rule, x, gs))
    for around in (
        OptimiserChain(rule),
        OptimiserChain(ClipGrad(math.inf), OptimiserChain(rule), ClipNorm(math.inf)),
        MixedPrecision("float64", rule),
        Muon(other=rule),
    ):
        assert np.array_equal(evaluation(*trained(around, x, gs)), expected)
    narrow = MixedPrecision(rule)
    state, y = trained(narrow, x.astype(np.float16), gs)
    found = evaluation(state, y)
    assert found.dtype == np.float16
    assert np.allclose(found, expected, atol=2e-3)


def test_tied_parameters_stay_tied() -> None:
    w = drawn(0, 3)
    state, model = setup(ScheduleFreeDescent(0.1), [w, {"again": w}]), [w, {"again": w}]
    for k in range(3):
        state, model = update_(state, model, [drawn(k, 3), None])
    found = evaluation(state, model)
    assert found[0] is found[1]["again"] is not w


def test_frozen_parameters_and_counts_that_stand() -> None:
    state, model = trained(ScheduleFreeDescent(0.1), [drawn(0, 3)], [[drawn(1, 3)]] * 3)
    before = evaluation(state, model)
    freeze_(state)
    state, model = update(state, model, [drawn(2, 3)])
    assert np.array_equal(evaluation(state, model)[0], before[0])


@EACH
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_its_dtype_is_that_of_the_parameter(rule: Any, dtype: str) -> None:
    x = drawn(0, 3).astype(dtype)
    state, y = trained(rule, x, [drawn(k, 3).astype(dtype) for k in range(1, 5)])
    found = evaluation(state, y)
    assert found.dtype == y.dtype == dtype
    assert np.abs(found - y).max() < 1


@EACH
def test_evaluation_of_tensors_and_arrays_of_jax(rule: Any) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    gs = [drawn(k, 4) for k in range(1, 12)]
    state, y = trained(rule, drawn(0, 4), gs)
    expected = evaluation(state, y)
    state, tensor = trained(rule, torch.tensor(drawn(0, 4)), [*map(torch.tensor, gs)])
    assert np.allclose(tensor, y, rtol=1e-12)
    assert np.allclose(evaluation(state, tensor), expected, rtol=1e-12)
    with jax.enable_x64(True):
        x = jax.numpy.asarray(drawn(0, 4))
        state, step = setup(rule, x), jax.jit(update)
        assert np.array_equal(jax.jit(evaluation)(state, x), x)
        for g in gs:
            state, x = step(state, x, jax.numpy.asarray(g))
        assert np.allclose(x, y, rtol=1e-12)
        for call in evaluation, jax.jit(evaluation):
            assert np.allclose(call(state, x), expected, rtol=1e-12)


def test_a_model_that_does_not_fit_is_refused() -> None:
    state = setup(ScheduleFreeDescent(), {"a": drawn(0, 3)})
    with pytest.raises((TypeError, ValueError), match="state tree has"):
        evaluation(state, {"b": drawn(0, 3)})


@EACH
def test_optax_and_the_model_to_evaluate(rule: Any) -> None:
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    if rule.warmup or rule.r:
        pytest.skip("optax counts a warm-up otherwise, and has no r")
    jnp = jax.numpy
    with jax.enable_x64(True):
        contrib = optax.contrib
        if isinstance(rule, ScheduleFreeDescent):
            tx = contrib.schedule_free_sgd(rule.eta, b1=rule.rho)
        else:
            tx = contrib.schedule_free_adamw(rule.eta, None, *rule.beta)
        x = jnp.asarray(drawn(0, 4))
        kept = tx.init(x)
        for k in range(1, 12):
            dx, kept = tx.update(jnp.asarray(drawn(k, 4)), kept, x)
            x = optax.apply_updates(x, dx)
        theirs = contrib.schedule_free_eval_params(kept, x)
    state, y = trained(rule, drawn(0, 4), [drawn(k, 4) for k in range(1, 12)])
    assert np.allclose(y, x, rtol=1e-13, atol=1e-13)
    assert np.allclose(evaluation(state, y), theirs, rtol=1e-12, atol=1e-12)


def test_it_goes_through_pickles_and_files(tmp_path: Any) -> None:
    state, model = trained(ScheduleFreeAdamW(0.1), {"w": drawn(0, 3)}, [{"w": drawn(1, 3)}] * 3)
    io.save(tmp_path / "state", state, model)
    for again, same in (pickle.loads(pickle.dumps((state, model))), io.load(tmp_path / "state")):
        assert np.array_equal(evaluation(again, same)["w"], evaluation(state, model)["w"])


# --- rules that own the parameter ------------------------------------------------------------


@pytest.mark.parametrize(
    "behind", [WeightDecay(), ClipNorm(5.0), ClipGrad(5.0), Adam(), OptimiserChain(Adam())]
)
@pytest.mark.parametrize("owner", [COCOB(), ScheduleFreeDescent(), OptimiserChain(COCOB())])
def test_nothing_that_changes_steps_stands_behind_an_owner(owner: Any, behind: Any) -> None:
    with pytest.raises(TypeError, match=r"(COCOB|ScheduleFreeDescent) steps to a value.* got "):
        OptimiserChain(owner, behind)
    with pytest.raises(TypeError, match="put it ahead, or leave it out"):
        OptimiserChain(AccumGrad(2), OptimiserChain(owner), OptimiserChain(), behind)


def test_clips_without_a_limit_do_and_all_others_stand_ahead() -> None:
    idle = ClipNorm(math.inf), ClipGrad(math.inf), OptimiserChain(ClipNorm(math.inf))
    rule = OptimiserChain(ClipNorm(1.0), WeightDecay(0.1), AccumGrad(2), COCOB(), *idle)
    x = drawn(0, 3)
    model = update(setup(rule, x), x, x)[1]
    assert np.array_equal(model, x)  # AccumGrad holds it
    with pytest.raises(TypeError, match="COCOB steps to a value"):
        rule.adjust(delta=1.0)


def test_a_rule_with_an_owner_for_some_arrays_is_an_owner() -> None:
    with pytest.raises(TypeError, match="COCOB steps to a value"):
        OptimiserChain(Muon(other=COCOB()), WeightDecay())


def test_the_end_of_cocob_does_not_depend_on_a_rate() -> None:
    target = np.array([3.0, -5.0, 0.01])
    state, x = setup(COCOB(), np.zeros(3)), np.zeros(3)
    for _ in range(3000):
        state, x = update_(state, x, np.sign(x - target))
    assert isinstance(state, Leaf)
    assert np.allclose(x, target, atol=0.5)


def test_owners_in_the_optimizer_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    optimizer_of = pytest.importorskip("optimisers.torch").Optimizer
    for rule in (COCOB(), OptimiserChain(ClipGrad(1.0), COCOB()), MixedPrecision(COCOB())):
        p = torch.nn.Parameter(torch.tensor(drawn(0, 3)))
        optimizer, x = optimizer_of([p], rule), p.detach().numpy().copy()
        state = setup(rule, x)
        for k in range(1, 4):
            p.grad = torch.tensor(drawn(k, 3))
            optimizer.step()
            state, x = update(state, x, drawn(k, 3))
        assert np.array_equal(p.detach().numpy(), x)
        assert optimizer.param_groups[0]["lr"] == 1
        optimizer.param_groups[0]["lr"] = 0.1
        with pytest.raises(TypeError, match=r"COCOB finds the length of its steps.*got 0\.1"):
            optimizer.step()
        assert np.array_equal(p.detach().numpy(), x)
