"""Sophia: beside its formula, beside optax, with and without estimates of the curvature."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from optimisers import (
    ClipGrad,
    MixedPrecision,
    OptimiserChain,
    Sophia,
    destructure,
    io,
    setup,
    update,
    update_,
)

BOTH = pytest.mark.parametrize("call", [update, update_])
RULES = [Sophia(0.1), Sophia(0.1, (0.7, 0.8), 0.5, 0.0), Sophia(0.1, rho=2.0)]
EACH = pytest.mark.parametrize("rule", RULES, ids=repr)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def inputs(*shape: int) -> list[tuple[np.ndarray, ...]]:
    """Return gradients, each third one with an estimate of any sign."""
    return [
        (drawn(k, *shape), 3 * drawn(100 + k, *shape))[: 2 if k % 3 == 1 else 1]
        for k in range(1, 20)
    ]


def by_hand(rule: Sophia, x: np.ndarray, given: Any) -> np.ndarray:
    m = h = np.zeros_like(x)
    b1, b2 = rule.beta
    for g, *estimate in given:
        m = b1 * m + (1 - b1) * g
        share = np.minimum(np.abs(m) / np.maximum(rule.rho * h, 1e-15), 1)
        x = x - rule.eta * (np.sign(m) * share + rule.lambda_ * x)
        if estimate:
            h = b2 * h + (1 - b2) * estimate[0]
    return x


def trained(rule: Any, x: Any, given: Any, call: Any = update) -> tuple[Any, Any]:
    state = setup(rule, x)
    for g, *estimate in given:
        state, x = call(state, x, g, *estimate)
    return state, x


@EACH
@BOTH
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_the_formula(rule: Sophia, call: Any, shape: Any) -> None:
    expected = by_hand(rule, drawn(0, *shape), inputs(*shape))
    _, x = trained(rule, drawn(0, *shape), inputs(*shape), call)
    assert np.allclose(x, expected, rtol=1e-13, atol=1e-14)


def test_an_estimate_of_none_keeps_what_there_is() -> None:
    rule, model = Sophia(0.1), {"a": drawn(0, 3), "b": drawn(1, 2)}
    state, model = update(setup(rule, model), model, model, {"a": np.ones(3), "b": None})
    assert np.allclose(state["a"].state.h, 0.01)
    assert not state["b"].state.h.any()


@EACH
def test_tensors_and_arrays_of_jax(rule: Sophia) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    expected = by_hand(rule, drawn(0, 4), inputs(4))
    tensors = [[*map(torch.tensor, given)] for given in inputs(4)]
    assert np.allclose(trained(rule, torch.tensor(drawn(0, 4)), tensors)[1], expected, rtol=1e-12)
    with jax.enable_x64(True):
        arrays = [[*map(jax.numpy.asarray, given)] for given in inputs(4)]
        for call in update, jax.jit(update):
            _, x = trained(rule, jax.numpy.asarray(drawn(0, 4)), arrays, call)
            assert np.allclose(x, expected, rtol=1e-12)


@EACH
@pytest.mark.parametrize("dtype", ["float16", "float32", "longdouble"])
def test_other_dtypes(rule: Sophia, dtype: str) -> None:
    given = [[a.astype(dtype) for a in arrays] for arrays in inputs(6)]
    state, x = trained(rule, drawn(0, 6).astype(dtype), given)
    assert x.dtype == state.state.m.dtype == state.state.h.dtype == dtype
    expected = by_hand(rule, drawn(0, 6), inputs(6))
    assert np.allclose(x.astype(float), expected, atol=max(100 * np.finfo(dtype).eps, 1e-12))


@EACH
def test_inside_other_rules_and_over_the_flat_vector(rule: Sophia) -> None:
    x, given = drawn(0, 4), inputs(4)
    expected = by_hand(rule, x, given)
    for around in OptimiserChain(ClipGrad(100.0), rule), MixedPrecision("float64", rule):
        assert np.allclose(trained(around, x, given)[1], expected, rtol=1e-13)
    flat, re = destructure({"a": x[:1], "b": x[1:]})
    assert np.allclose(re(trained(rule, flat, given)[1])["b"], expected[1:], rtol=1e-13)


def test_files_and_pickles(tmp_path: Any) -> None:
    model, more = {"w": drawn(0, 3)}, {"w": drawn(1, 3)}
    state, model = update(setup(Sophia(0.1), model), model, more, more)
    io.save(tmp_path / "state", state, model)
    expected = update(state, model, more)[1]["w"]
    for again, same in (pickle.loads(pickle.dumps((state, model))), io.load(tmp_path / "state")):
        assert np.array_equal(update(again, same, more)[1]["w"], expected)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="Sophia takes real parameters only; got complex128"):
        setup(Sophia(), np.ones(2, complex))


def test_an_estimate_of_another_shape_is_refused() -> None:
    x = np.ones(3)
    with pytest.raises((TypeError, ValueError), match="shape"):
        update(setup(Sophia(), x), x, x, np.ones(2))


@EACH
def test_without_gradients_nothing_moves_but_what_decays(rule: Sophia) -> None:
    x = np.ones(3)
    _, new = trained(rule.adjust(lambda_=0.0), x, [(np.zeros(3), np.zeros(3))] * 3)
    assert np.array_equal(new, x)
