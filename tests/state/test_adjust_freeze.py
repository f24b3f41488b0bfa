"""Changing hyperparameters, freezing and thawing, of whole state trees and of parts."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from util import (
    ELEMENTWISE,
    PUBLIC,
    assert_same_bits,
    example,
    moved,
    parametrize,
    share_memory,
    snapshot,
)

from optimisers import (
    AccumGrad,
    AdaGrad,
    Adam,
    ClipNorm,
    Descent,
    Leaf,
    MixedPrecision,
    Momentum,
    Nesterov,
    OptimiserChain,
    RMSProp,
    Rprop,
    Rule,
    WeightDecay,
    adjust,
    adjust_,
    freeze_,
    setup,
    thaw_,
    update,
    update_,
)


def trained(rule):
    """Return the state after a step, and the model."""
    model = {"w": np.ones(3), "layers": [np.ones(2, np.float16), {"b": np.ones(1)}]}
    grad = {"w": np.ones(3), "layers": [np.ones(2), {"b": np.ones(1)}]}
    return update(setup(rule, model), model, grad)


def adjusted_in_place(state, *args, **fields):
    state = copy.deepcopy(state)
    assert adjust_(state, *args, **fields) is None
    return state


BOTH = pytest.mark.parametrize("call", [adjust, adjusted_in_place])


# --- adjusting -------------------------------------------------------------------------------


@BOTH
def test_adjust_by_position_and_by_name(call):
    state, _ = trained(Adam())
    for new in (call(state, 0.5), call(state, eta=0.5)):
        assert new["w"].rule == new["layers"][0].rule == Adam(eta=0.5)
    new = call(state, 0.5, beta=(0.5, 0.6), epsilon=0)
    assert new["layers"][1]["b"].rule == Adam(0.5, (0.5, 0.6), 0)
    assert state["w"].rule == Adam()


@BOTH
@parametrize("rule", [example(cls) for cls in PUBLIC])
def test_every_field_of_every_rule_can_be_adjusted_unless_it_is_fixed(rule, call):
    state = setup(rule, {"w": np.ones(2)})
    fixed = {name for r in [rule, *getattr(rule, "rules", ())] for name in r.fixed}
    for name, value in rule.fields():
        new = value if not isinstance(value, float | tuple) else moved(value)
        if name in fixed:
            with pytest.raises(TypeError, match=f"{name} shapes the state and cannot be adjusted"):
                call(state, **{name: new})
        else:
            assert dict(call(state, **{name: new})["w"].rule.fields())[name] == new


@BOTH
def test_adjust_keeps_what_the_rules_remember(call):
    state, _ = trained(OptimiserChain(ClipNorm(), Adam()))
    freeze_(state["layers"])
    new = call(state, 0.5, omega=3.0)
    assert_same_bits(new, state)
    assert [new["w"].frozen, new["layers"][0].frozen] == [False, True]
    assert new["w"].rule == OptimiserChain(ClipNorm(3.0), Adam(0.5))


def test_adjust_shares_no_memory():
    state, _ = trained(Adam())
    new = adjust(state, 0.5)
    assert share_memory(new, state) == []
    assert new is not state
    assert new["layers"] is not state["layers"]


def test_adjust_in_place_keeps_leaves_and_arrays():
    state, _ = trained(Adam())
    leaf, inner = state["w"], state["w"].state
    adjust_(state, 0.5)
    assert state["w"] is leaf
    assert leaf.state is inner


@BOTH
def test_parts_of_a_state_tree(call):
    state, _ = trained(Momentum())
    assert call(state["w"], 0.5).rule == Momentum(0.5)
    assert call(state["layers"][1], 0.5)["b"].rule == Momentum(0.5)
    adjust_(state["layers"], rho=0.5)
    assert [
        leaf.rule.rho for leaf in (state["w"], state["layers"][0], state["layers"][1]["b"])
    ] == [0.9, 0.5, 0.5]


@BOTH
def test_rules_of_a_chain_that_have_no_such_field_stay(call):
    rule = OptimiserChain(WeightDecay(0.1), OptimiserChain(Momentum(), ClipNorm()), Adam())
    state = setup(rule, {"w": np.ones(2)})
    new = call(state, 0.5)["w"].rule
    assert new == OptimiserChain(
        WeightDecay(0.1), OptimiserChain(Momentum(0.5), ClipNorm()), Adam(0.5)
    )
    assert call(state, rho=0.5)["w"].rule.rules[1].rules[0] == Momentum(rho=0.5)
    assert call(state, omega=1.0, lambda_=0.2)["w"].rule.rules[0] == WeightDecay(0.2)


@BOTH
def test_leaves_whose_rule_has_no_such_field_stay(call):
    state = {"a": setup(Momentum(), np.ones(2)), "b": setup(WeightDecay(0.1), np.ones(2)), "c": ()}
    new = call(state, rho=0.5)
    assert (new["a"].rule, new["b"].rule, new["c"]) == (Momentum(rho=0.5), WeightDecay(0.1), ())
    assert call(state, 0.5)["a"].rule == Momentum(0.5)


@BOTH
def test_an_unknown_field_lists_those_there_are(call):
    state = {
        "a": setup(OptimiserChain(WeightDecay(), Adam()), np.ones(2)),
        "b": setup(Momentum(), np.ones(2)),
    }
    with pytest.raises(TypeError, match=r"'learning_rate'.*beta, .*epsilon_hat, eta, lambda_, rho"):
        call(state, learning_rate=0.1)
    with pytest.raises(TypeError, match="'lr', 'decay'"):
        call(state, 0.5, lr=0.1, decay=1)
    with pytest.raises(TypeError, match=r"'eta'.*lambda_"):
        call(setup(WeightDecay(), np.ones(2)), 0.1)


@BOTH
def test_eta_twice(call):
    with pytest.raises(TypeError, match="eta twice"):
        call(setup(Adam(), np.ones(2)), 0.1, eta=0.1)


@parametrize(
    "fields",
    [
        {"eta": -1.0},
        {"eta": "fast"},
        {"eta": np.ones(2)},
        {"beta": (0.9,)},
        {"beta": (0.9, 1.0)},
        {"rho": 0.5, "eta": np.nan},
        {"eta": 0.5, "unknown": 1},
        {"eta": 0.5, "n": 2},
        {"eta": 0.5, "lambda_": np.inf},
    ],
)
def test_a_refused_adjust_changes_nothing(fields):
    rule = OptimiserChain(Momentum(), AccumGrad(3), WeightDecay())
    model = {"a": np.ones(2), "b": np.ones(2)}
    state = {
        "a": setup(Momentum(), model["a"]),
        "b": setup(rule, model["b"]),
        "c": setup(Adam(), model["a"]),
    }
    before = snapshot(state)
    for call in (adjust, adjust_):
        with pytest.raises((TypeError, ValueError)):
            call(state, **fields)
        assert snapshot(state) == before


@BOTH
@parametrize(
    "case",
    [
        (RMSProp(centred=True), "centred", False),
        (AccumGrad(3), "n", 4),
        (OptimiserChain(AccumGrad(3), Adam()), "n", 4),
        (MixedPrecision(Adam()), "dtype", np.float64),
        (MixedPrecision(OptimiserChain(AccumGrad(2))), "n", 3),
    ],
)
def test_fields_that_shape_the_state(call, case):
    rule, name, value = case
    state = setup(rule, np.ones(2))
    with pytest.raises(TypeError, match=f"{name} shapes the state and cannot be adjusted"):
        call(state, **{name: value})


@BOTH
def test_inner_fields_of_mixed_precision(call):
    state = setup(MixedPrecision("float64", Adam()), np.ones(2, np.float32))
    assert call(state, 0.5).rule == MixedPrecision("float64", Adam(0.5))


@BOTH
def test_ties_survive(call):
    w = np.ones((2, 2))
    state = setup(Adam(), {"w": w, "wt": w.T})
    new = call(state, 0.5)
    assert new["w"] is new["wt"]
    assert new["w"].rule == Adam(0.5)


@BOTH
def test_shared_rules_stay_shared(call):
    state, _ = trained(Adam())
    assert state["w"].rule is state["layers"][0].rule
    new = call(state, 0.5)
    assert new["w"].rule is new["layers"][0].rule is new["layers"][1]["b"].rule


def test_the_new_rate_counts_from_the_next_step():
    x = np.ones(2)
    state = setup(Descent(0.5), x)
    update_(state, x, np.ones(2))
    adjust_(state, 0.25)
    update_(state, x, np.ones(2))
    np.testing.assert_array_equal(x, 0.25)
    adjust_(state, 0)
    update_(state, x, np.ones(2))
    np.testing.assert_array_equal(x, 0.25)


def test_the_new_beta_is_used_with_the_old_count():
    g = np.array([2.0])
    state, x = update(setup(Adam(1.0, (0.9, 0.999), 0), np.zeros(1)), np.zeros(1), g)
    state = adjust(state, beta=(0.5, 0.999))
    _, new = update(state, x, g)
    m = 0.5 * (0.1 * 2) + 0.5 * 2
    np.testing.assert_allclose(x - new, (m / (1 - 0.5**2)) / 2)


def test_the_eta_of_rprop_is_only_where_it_starts():
    x = np.ones(2)
    state = setup(Rprop(eta=0.5), x)
    adjust_(state, 0.25)
    update_(state, x, np.ones(2))
    np.testing.assert_array_equal(x, 0.5)
    assert "start" in Rprop.__doc__


@dataclasses.dataclass(frozen=True)
class Own(Rule):
    rate: float = 0.1
    name: str = "own"

    def apply(self, state, x, dx):
        return state, self.rate * dx


class NoDataclass(Rule):
    def apply(self, state, x, dx):
        return state, dx


@BOTH
def test_fields_of_users_rules(call):
    state = setup(OptimiserChain(Own(), NoDataclass()), np.ones(2))
    assert call(state, rate=0.5, name="x").rule.rules[0] == Own(0.5, "x")
    with pytest.raises(TypeError, match=r"'eta'.*name, rate"):
        call(state, 0.5)


@BOTH
def test_a_model_is_no_state_tree(call):
    for model in ({"layers": [np.ones(2)]}, np.ones(2), SimpleNamespace(w=np.ones(2, np.float16))):
        with pytest.raises(TypeError, match=r"state tree.*is this the model"):
            call(model, 0.5)


@BOTH
def test_a_state_tree_without_leaves(call):
    assert call({"name": (), "f": ()}, 0.5) == {"name": (), "f": ()}
    assert call((), 0.5) == ()


# --- freezing --------------------------------------------------------------------------------


def frozen(state):
    return [state["w"].frozen, state["layers"][0].frozen, state["layers"][1]["b"].frozen]


def test_freeze_and_thaw_wholes_and_parts():
    state, _ = trained(Adam())
    assert frozen(state) == [False] * 3
    assert freeze_(state) is None
    assert frozen(state) == [True] * 3
    assert thaw_(state["layers"]) is None
    assert frozen(state) == [True, False, False]
    freeze_(state["layers"][1]["b"])
    freeze_(state["layers"][1]["b"])
    assert frozen(state) == [True, False, True]
    thaw_(state)
    assert frozen(state) == [False] * 3


@parametrize("rule", [example(cls) for cls in ELEMENTWISE])
@parametrize("dtype", ["float64", "float16"])
def test_thawed_leaves_go_on_as_if_nothing_had_been(rule, dtype):
    g = np.array([1.0, -2.0])
    x = np.ones(2, dtype)
    state = setup(rule, x)
    expected, result = copy.deepcopy(state), x.copy()
    for pause in (False, True, True, False):
        (freeze_ if pause else thaw_)(state)
        update_(state, x, g)
        if not pause:
            update_(expected, result, g)
    assert_same_bits([state, x], [expected, result])


def test_freezing_one_place_of_a_tie_freezes_both():
    w = np.ones((2, 2))
    model = {"w": w, "wt": w.T}
    state = setup(Adam(), model)
    freeze_(state["w"])
    assert state["wt"].frozen
    update_(state, model, {"wt": np.ones((2, 2))})
    np.testing.assert_array_equal(w, 1)


def test_frozen_leaves_can_be_adjusted():
    state, _ = trained(AdaGrad())
    freeze_(state)
    adjust_(state, 0.5)
    assert state["w"].rule == AdaGrad(0.5)
    assert frozen(adjust(state, 0.25)) == [True] * 3


@pytest.mark.parametrize("call", [freeze_, thaw_])
def test_freezing_a_model(call):
    w = np.ones(2)
    for model in ({"w": w, "other": 3}, w, [{"a": w}]):
        with pytest.raises(TypeError, match=r"expected a state tree.*is this the model"):
            call(model)
    with pytest.raises(TypeError, match=r"\['a'\]\[1\]"):
        call({"a": [(), w]})


@pytest.mark.parametrize("call", [freeze_, thaw_])
def test_a_refused_freeze_changes_nothing(call):
    state, _ = trained(Nesterov())
    freeze_(state["layers"][0])
    before = frozen(state)
    with pytest.raises(TypeError, match="state tree"):
        call({**state, "more": np.ones(2)})
    assert frozen(state) == before


def test_leaves_made_frozen():
    leaf = Leaf(Descent(), (), frozen=True)
    x = np.ones(2)
    update_(leaf, x, np.ones(2))
    np.testing.assert_array_equal(x, 1)
