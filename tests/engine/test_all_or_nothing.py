"""An update that is refused, late or early, changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
from updates import both_kinds, refused
from util import parametrize, snapshot

from optimisers import (
    AccumGrad,
    Adam,
    ClipNorm,
    ElementwiseRule,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    setup,
    update,
    update_,
)


@dataclasses.dataclass(frozen=True)
class Scribbler(Rule):
    """A rule that spoils what it can reach, and then raises when it meets its trigger."""

    how: str = "state"
    eta: float = 0.1

    def init(self, x):
        return {"v": np.zeros_like(x), "log": [], "count": 0}

    def apply(self, state, x, dx):
        state["v"][...] = 99
        state["log"].append("was here")
        state["count"] += 1
        if np.any(dx == 666):
            if self.how == "x":
                x[...] = 99
            elif self.how == "dx":
                dx[...] = 99
            elif self.how == "shape":
                return state, np.ones((5, 7, 2))
            elif self.how == "norm":
                raise FloatingPointError("no number")
            raise KeyError("stop here")
        return state, self.eta * dx


@parametrize("how", ["state", "x", "dx", "shape", "norm"])
def test_a_rule_that_raises_at_a_late_leaf(how):
    model = {k: np.ones(3, "f4" if k % 2 else "f2") for k in range(20)}
    state = {k: setup(Scribbler(how) if k % 3 else Adam(), x) for k, x in model.items()}
    grad = {k: np.ones(3) for k in model}
    state, model = update(state, model, grad)
    grad[16] = np.array([1, 666, 1.0])
    error, text = {
        "state": (KeyError, "stop here"),
        "x": (ValueError, "read-only"),
        "dx": (ValueError, "read-only"),
        "shape": (ValueError, "Scribbler"),
        "norm": (FloatingPointError, r"at \[16\]: no number"),
    }[how]
    caught = refused(error, text, state, model, grad)
    if how != "norm":
        notes = "\n".join(caught.__notes__)
        assert "[16]" in notes
        assert "Scribbler" in notes
        assert "nothing was updated" in notes


def test_a_chain_with_a_rule_that_scribbles_and_raises():
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = setup(OptimiserChain(Momentum(), Scribbler(), Adam()), model)
    state, model = update(state, model, {"a": np.ones(3), "b": np.ones(3)})
    raising = {"a": np.ones(3), "b": np.ones(3)}
    state["b"].state[0].v[...] = 0
    raising["b"] = np.full(3, 66600.0)  # momentum makes 666 of it
    refused(KeyError, "stop here", state, model, raising)


@dataclasses.dataclass(frozen=True)
class Impure(ElementwiseRule):
    """A step that writes into its slots, which it should not, and may raise afterwards."""

    eta: float = 0.5
    slots = ("v",)

    def coefs(self):
        return (self.eta,)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        v += dx
        if np.any(dx == 666):
            raise KeyError("stop here")
        return v, (v,)


def test_an_elementwise_step_that_writes_into_its_slots():
    """It is refused, or works on copies; what was there before stays."""
    model = {"a": np.ones(3), "b": np.ones(3)}
    state = setup(Impure(), model)
    refused((KeyError, ValueError), None, state, model, {"a": np.ones(3), "b": np.full(3, 666.0)})
    before = snapshot(state)
    with contextlib.suppress(ValueError):
        update(state, model, {"a": np.ones(3)})
    assert snapshot(state) == before


@parametrize("bad", [np.nan, np.inf])
@parametrize("dtype", ["float32", "float64", "float16"])
@parametrize("wrap", [OptimiserChain, MixedPrecision])
def test_a_norm_late_in_a_chain_that_throws(bad, dtype, wrap):
    inner = OptimiserChain(Adam(), AccumGrad(1))
    rule = wrap(OptimiserChain(Momentum(), inner, ClipNorm(1.0), WeightDecay()))
    model = {k: np.ones(2000, dtype) for k in range(12)}
    state = setup(rule, model)
    state, model = update(state, model, {k: np.ones(2000) for k in model})
    grad = {k: np.ones(2000) for k in model}
    grad[10][1999] = bad
    refused(FloatingPointError, r"at \[10\]: ClipNorm: .*throw=False", state, model, grad)


def test_a_norm_on_the_array_path_throws_before_the_kernels_write():
    model = {"kernels": np.ones(3), "arrays": np.ones(3, np.float16)}
    state = setup(OptimiserChain(Adam(), ClipNorm()), model)
    grad = {"kernels": np.ones(3), "arrays": np.array([1, np.nan, 1])}
    refused(FloatingPointError, r"at \['arrays'\]", state, model, grad)
    grad = {"kernels": np.array([1, np.nan, 1]), "arrays": np.ones(3)}
    refused(FloatingPointError, r"at \['kernels'\]", state, model, grad)


def test_a_wrong_gradient_at_the_last_leaf():
    state, model, grad = both_kinds()
    model["last"] = np.ones((2, 3))
    state["last"] = setup(Adam(), model["last"])
    for wrong in (np.ones((3, 2)), np.ones((2, 3)) * 1j, "text", np.ones((1, 2, 3))):
        refused((ValueError, TypeError), r"\['last'\]", state, model, {**grad, "last": wrong})
    refused(ValueError, "more", state, model, {**grad, "last": np.ones((2, 3)), "more": 1})


def test_parameters_that_overlap_without_being_tied():
    """The state was made for other arrays, so it knows of no tie."""
    state = setup(Adam(), {"a": np.ones(4), "b": np.ones(4)})
    room = np.ones(6)
    model = {"a": room[:4], "b": room[2:]}
    grad = {"a": np.ones(4), "b": np.ones(4)}
    before = snapshot([state, model])
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\] overlap"):
        update_(state, model, grad)
    assert snapshot([state, model]) == before
