"""Rules as objects: what they print, remember and adjust, their dtypes, and rules of users."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import re
from dataclasses import dataclass

import numpy as np
import pytest
from public_rules import LIMITED, OUTSIDE, PUBLIC_RULES, built
from util import ELEMENTWISE, REGISTERED, example, parametrize, snapshot, step, variants

import optimisers
from optimisers import (
    ADOPT,
    COCOB,
    AccumGrad,
    AdaBelief,
    AdaGrad,
    Adam,
    AdamW,
    AMSGrad,
    ClipGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    Leaf,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    RMSProp,
    Rprop,
    Rule,
    WeightDecay,
    Yogi,
    adjust,
    adjust_,
    setup,
    update,
    update_,
)
from optimisers.rules import _base
from optimisers.words import sign

# --- the registry ----------------------------------------------------------------------------


def test_registry_is_what_the_package_exports():
    exported = {
        name
        for name in dir(optimisers)
        if isinstance(cls := getattr(optimisers, name), type) and issubclass(cls, Rule)
    }
    assert {cls.__name__ for cls in _base.registry()} == exported - {"Rule", "ElementwiseRule"}
    assert len(_base.registry()) == len(set(_base.registry())) > 20


def test_a_users_rule_stays_out_of_the_registry():
    before = _base.registry()
    type("Mine", (Momentum,), {})
    assert _base.registry() == before


@parametrize("cls", [*REGISTERED, Rule, ElementwiseRule])
def test_docstring_tells_all(cls):
    text = inspect.cleandoc(cls.__doc__)
    has_fields = cls in REGISTERED and bool(inspect.signature(cls).parameters)
    for section in ["Parameters"] * has_fields + ["Examples"]:
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for name in inspect.signature(cls).parameters if cls in REGISTERED else []:
        if name not in ("centered", "rules"):
            assert re.search(rf"^{name} : ", text, re.MULTILINE), name


# --- printing and copying --------------------------------------------------------------------


@parametrize("rule", PUBLIC_RULES)
def test_repr_can_be_pasted_back(rule):
    again = eval(repr(rule), {**vars(optimisers), "inf": math.inf})
    assert again == rule
    assert repr(again) == repr(rule)
    assert type(again) is type(rule)


def test_repr():
    assert repr(Adam()) == "Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08)"
    assert repr(RMSProp(centred=True)) == "RMSProp(eta=0.001, rho=0.9, epsilon=1e-08, centred=True)"
    assert repr(OptimiserChain(Descent(1), AccumGrad(2))) == (
        "OptimiserChain(Descent(eta=1), AccumGrad(n=2))"
    )
    assert repr(MixedPrecision(Descent())) == "MixedPrecision('float32', Descent(eta=0.1))"


@parametrize("rule", PUBLIC_RULES)
def test_rules_and_their_states_pickle_and_copy(rule):
    x, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    state, _ = rule.apply(rule.init(x), x, g)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again, kept = pickle.loads(pickle.dumps((rule, state), protocol))
        assert again == rule
        assert type(again) is type(rule)
        assert type(kept) is type(state)
        assert repr(kept) == repr(state)
    for make in copy.copy, copy.deepcopy:
        assert make(rule) == rule
        assert type(make(rule)) is type(rule)
        assert repr(make(state)) == repr(state)


# --- what is remembered ----------------------------------------------------------------------

ALL_ELEMENTWISE = [r for r in PUBLIC_RULES if type(r) in ELEMENTWISE] + [RMSProp(centred=True)]


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (rule, dtype)
        for rule in ALL_ELEMENTWISE
        for dtype in ["float16", "float32", "float64", "longdouble", "complex64"]
        if not (rule.real_only and dtype == "complex64")
    ],
)
def test_state_is_a_named_tuple_of_arrays(rule, dtype):
    x = np.ones((2, 3), dtype)
    counts = "t" in inspect.signature(rule.coefs).parameters
    names = (*rule.slots, "t") if counts else rule.slots
    state = rule.init(x)
    for _ in range(3):
        if not names:
            assert state == ()
            continue
        assert state._fields == names
        assert type(state).__name__ == f"{repr(rule).partition('(')[0]}State"
        for name in rule.slots:
            slot = getattr(state, name)
            assert (type(slot), slot.dtype, slot.shape) == (np.ndarray, x.dtype, x.shape)
        if counts:
            assert (type(state.t), state.t.dtype, state.t.shape) == (np.ndarray, np.int64, ())
        state, dx = rule.apply(state, x, x)
        assert (dx.dtype, dx.shape) == (x.dtype, x.shape)
    if counts:
        assert state.t == 3


def test_where_state_starts():
    x = np.ones(2)
    assert all(np.all(slot == 0.25) for slot in AMSGrad(epsilon=0.25).init(x))
    assert np.all(AdaGrad(epsilon=0.25).init(x).acc == 0.25)
    assert np.all(Rprop(eta=0.25).init(x).eta == 0.25)
    assert np.all(Rprop(eta=0.25).init(x).g == 0)


@parametrize("rule", ALL_ELEMENTWISE)
def test_state_is_native_plain_and_apart(rule):
    x = np.ma.masked_array(np.ones((2, 3), ">f8"), mask=False)
    for slot in rule.init(x):
        assert type(slot) is np.ndarray
        assert slot.dtype.isnative
        assert not np.shares_memory(slot, x)


@parametrize("rule", PUBLIC_RULES)
def test_apply_writes_nothing_and_keeps_nothing(rule):
    x, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    state = rule.init(x)
    given = {"x": x, "g": g, "leaf": Leaf(rule, state)}
    before = snapshot(given)
    new, _ = rule.apply(state, x, g)
    assert snapshot(given) == before

    kept = repr(new)
    x[:], g[:] = 7, 9
    assert repr(new) == kept


# --- dtypes ----------------------------------------------------------------------------------

WITH_EPSILON = [cls for cls in ELEMENTWISE if "epsilon" in inspect.signature(cls).parameters]


def printed(rule, dtype):
    """Return some steps and states of a rule as text, with all their digits."""
    x, g = np.ones(3, dtype), np.array([0, 1e-6, 1], dtype)
    state, text = rule.init(x), ""
    for _ in range(6):  # RAdam divides from its fifth step on
        state, dx = rule.apply(state, x, g)
        assert np.all(np.isfinite(dx))
        text += f"{state}, {dx}"
    return text


@parametrize("cls", WITH_EPSILON)
def test_epsilon_is_what_it_is_in_every_dtype(cls):
    """Narrow numbers are computed with in float32, which has it."""
    start = {"initial": 0.0} if cls is Yogi else {}  # else its root hides them
    tiny, other = example(cls, epsilon=1e-12, **start), example(cls, epsilon=1e-5, **start)
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for dtype in bfloat16, np.float16, np.float32, np.float64:
        assert printed(tiny, dtype) != printed(other, dtype)


def test_where_float16_slots_start():
    x = np.ones(2, np.float16)
    assert np.all(AdaGrad(epsilon=0).init(x).acc == 0)
    assert np.all(AdaGrad(epsilon=1e-300).init(x).acc == 0)
    assert np.all(AdaGrad(epsilon=0.5).init(x).acc == 0.5)


def test_complex_parameters_of_rules_that_compare():
    refusing = [cls for cls in ELEMENTWISE if cls.real_only]
    assert refusing == [ADOPT, COCOB, Rprop, ClipGrad]
    for rule in [*map(example, refusing), OptimiserChain(Descent(), ClipGrad())]:
        with pytest.raises(TypeError, match="takes real parameters only; got complex64") as caught:
            setup(rule, {"a": np.ones(2), "b": [np.ones(2, np.complex64)]})
        assert str(caught.value).startswith("at ['b'][0]: ")
        setup(rule, {"a": np.ones(2), "b": [1j]})


# --- adjusting -------------------------------------------------------------------------------


def test_adjust_reaches_into_chains_and_mixed_precision():
    rule = OptimiserChain(WeightDecay(0.1), OptimiserChain(Momentum(), Descent()), ClipNorm())
    adjusted = rule.adjust(eta=0.7, lambda_=0.2)
    assert adjusted == OptimiserChain(
        WeightDecay(0.2), OptimiserChain(Momentum(0.7), Descent(0.7)), ClipNorm()
    )
    assert MixedPrecision("float64", rule).adjust(eta=0.7, lambda_=0.2) == MixedPrecision(
        "float64", adjusted
    )
    assert rule.adjust(epsilon=1.0) == rule


@pytest.mark.parametrize(("cls", "field", "i", "text"), LIMITED)
def test_adjust_checks_what_it_changes(cls, field, i, text):
    rule = variants(cls)[-1]
    if field in cls.fixed:
        return
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    for value in OUTSIDE[text]:
        with pytest.raises(ValueError, match=r"must be") as expected:
            built(cls, field, i, value)
        bad = getattr(rule, field)
        bad = value if i is None else (*bad[:i], value, *bad[i + 1 :])
        with pytest.raises(ValueError, match=r"must be") as caught:
            rule.adjust(**{field: bad})
        assert str(caught.value) == str(expected.value)
    same = rule.adjust(**{field: getattr(rule, field)})
    assert {f.name: getattr(same, f.name) for f in dataclasses.fields(same)} == values
    assert same == rule
    assert hash(same) == hash(rule)


@parametrize("rule", [Adam(), ClipNorm(), OptimiserChain(Adam()), MixedPrecision(Adam())])
@parametrize("name", ["lr", "etta", "learning_rate"])
def test_adjust_refuses_a_name_that_no_rule_has(rule, name):
    with pytest.raises(TypeError, match=f"no rule here has the field '{name}'"):
        rule.adjust(**{name: 0.1})


@parametrize("rule", PUBLIC_RULES)
def test_adjust_keeps_the_class_and_the_other_fields(rule):
    adjustable = [name for name, _ in rule.fields() if name == "eta"]
    new = rule.adjust(eta=0.125)
    assert type(new) is type(rule)
    for (name, old), (_, now) in zip(rule.fields(), new.fields(), strict=True):
        assert now == (0.125 if name == "eta" else old)
    assert (new == rule) is not bool(adjustable)


FIXED = [
    (RMSProp(), {"centred": True}),
    (RMSProp(centred=True), {"centred": False}),
    (AccumGrad(2), {"n": 3}),
    (OptimiserChain(Adam(), AccumGrad(2)), {"n": 3}),
    (MixedPrecision(Adam()), {"dtype": "float64"}),
    (MixedPrecision(AccumGrad(2)), {"n": 3}),
]


@pytest.mark.parametrize(("rule", "change"), FIXED)
def test_fields_that_shape_the_state_are_fixed(rule, change):
    (name,) = change
    state = setup(rule, {"w": np.ones(2)})
    before = repr(state)
    for call in adjust, adjust_:
        text = f"{name} shapes the state and cannot be adjusted; call setup with a new rule"
        with pytest.raises(TypeError, match=text) as caught:
            call(state, eta=0.5, **change) if "eta" in before else call(state, **change)
        assert "_Centred" not in str(caught.value)
        assert repr(state) == before


def test_adjust_checks_limits():
    state = setup(OptimiserChain(WeightDecay(), Adam()), np.ones(2))
    before = repr(state)
    with pytest.raises(ValueError, match=r"Adam: beta\[1\] must be in \[0, 1\); got 1"):
        adjust_(state, lambda_=0.7, beta=(0.5, 1))
    assert repr(state) == before


def test_a_new_beta_is_used_with_the_old_count():
    x, g = np.array([1.0]), np.array([2.0])
    state, x = update(setup(Adam(), x), x, g)
    state = adjust(state, beta=(0.5, 0.5))
    assert state.state.t == 1
    m, v = state.state.m, state.state.v
    after, _ = update(state, x, g)
    dx = x - _
    m, v = 0.5 * m + 0.5 * g, 0.5 * v + 0.5 * g * g
    np.testing.assert_allclose(dx, 0.001 * (m / 0.75) / (np.sqrt(v / 0.75) + 1e-8), rtol=1e-12)
    assert after.state.t == 2


def test_eta_of_rprop_is_only_where_its_step_sizes_start():
    x, g = np.array([1.0]), np.array([2.0])
    state = adjust(setup(Rprop(eta=0.25), x), eta=9.0)
    _, x = update(state, x, g)
    assert x == 0.75


# --- users' rules ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DecayDescent(Rule):
    eta: float = 0.1

    def init(self, x):
        return 1

    def apply(self, state, x, dx):
        return state + 1, dx * (self.eta / state**0.5)


@pytest.mark.parametrize("call", [update, update_])
def test_the_smallest_rule(call):
    model = {"w": np.array([1.0, 2.0]), "b": np.array(3.0, np.float32)}
    grad = {"w": np.array([1.0, -1.0]), "b": 1.0}
    state = setup(DecayDescent(), model)
    expected = {"w": np.array([1.0, 2.0]), "b": np.array(3.0)}
    for t in range(1, 5):
        state, model = call(state, model, grad)
        expected = {k: x - grad[k] * 0.1 / math.sqrt(t) for k, x in expected.items()}
        np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-15)
        np.testing.assert_allclose(model["b"], expected["b"], rtol=3e-7)
        assert model["b"].dtype == np.float32
        assert state["w"].state == state["b"].state == t + 1


def test_the_smallest_rule_inside_others_and_adjusted():
    x, g = np.array([1.0]), np.array([4.0])
    rule = OptimiserChain(ClipGrad(2.0), DecayDescent(), WeightDecay(0.5))
    state, new = update(setup(rule, x), x, g)
    assert new == 1 - (2 * 0.1 + 0.5)
    assert state.state == ((), 2, ())
    state, new = update(adjust(state, 0.2), x, g)
    np.testing.assert_allclose(new, 1 - (2 * 0.2 / math.sqrt(2) + 0.5), rtol=1e-15)
    x = x.astype(np.float16)
    state, new = update(setup(MixedPrecision(DecayDescent()), x), x, g)
    assert state.state.master == np.float32(1) - np.float32(0.4)


def test_a_rule_without_init_has_no_state():
    class Plain(Rule):
        def apply(self, state, x, dx):
            assert state == ()
            return state, 2 * dx

    state, x = update_(setup(Plain(), np.array([1.0])), np.array([1.0]), np.array([0.25]))
    assert x == 0.5
    assert list(state.rule.fields()) == []


def test_a_rule_must_have_apply():
    class Nothing(Rule):
        pass

    class NoStep(ElementwiseRule):
        pass

    for cls in Nothing, NoStep:
        with pytest.raises(TypeError, match="abstract"):
            cls()


@dataclass(frozen=True)
class SignMomentum(ElementwiseRule):
    eta: float = 0.01
    rho: float = 0.9
    epsilon: float = 1e-12

    slots = ("v", "last")

    def coefs(self, t):
        return self.rho, self.eta / t, self.epsilon

    @staticmethod
    def step(x, dx, state, coefs):
        v, _ = state
        rho, eta, epsilon = coefs
        v = rho * v + dx
        return eta * sign(v) + epsilon, (v, dx)


@pytest.mark.parametrize("call", [update, update_])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex128"])
def test_a_users_elementwise_rule(call, dtype):
    x = np.array([1.0, 2.0, 3.0], dtype)
    state = setup(OptimiserChain(SignMomentum(0.5), WeightDecay(0)), x)
    g = np.array([3.0, 0.0, -4.0], dtype)
    for _ in range(2):
        state, x = call(state, x, g)
    epsilon = 1e-7 if dtype == "float16" else 1e-12
    expected = np.array([1, 2, 3]) - 0.75 * np.array([1, 0, -1]) - 2 * epsilon
    np.testing.assert_allclose(x, expected.astype(dtype), rtol=2e-3 if dtype == "float16" else 1e-7)
    kept = state.state[0]
    assert kept.t == 2
    assert kept._fields == ("v", "last", "t")
    assert type(kept).__name__ == "SignMomentumState"

    g[:] = 7
    assert kept.last[0] == 3, "the state shares memory with the gradient"


class Hoarder(ElementwiseRule):
    slots = ("x", "g", "g2", "twice", "more")

    @staticmethod
    def step(x, dx, state, coefs):
        _, g, *_ = state
        twice = dx + dx
        return dx, (x, dx, g, twice, twice)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_slots_share_memory_with_nothing(library):
    xp = pytest.importorskip(library)
    x, g = xp.ones(2), 2 * xp.ones(2)
    rule = Hoarder()
    old = rule.init(x)
    new, _ = rule.apply(old, x, g)
    after, _ = rule.apply(new, x, g)
    for array in x, g, *old, *new:
        array[:] = 7
    assert [slot.tolist() for slot in after] == [[1, 1], [2, 2], [2, 2], [4, 4], [4, 4]]
    after.twice[:] = 9
    assert after.more.tolist() == [4, 4]


def test_a_step_that_writes_into_its_slots_is_refused():
    class Impure(ElementwiseRule):
        slots = ("v",)

        @staticmethod
        def step(x, dx, state, coefs):
            (v,) = state
            v += dx
            return v, (v,)

    x = np.ones(2)
    state = Impure().init(x)
    with pytest.raises(ValueError, match="read-only"):
        Impure().apply(state, x, x)
    assert state.v.tolist() == [0, 0]
    assert state.v.flags.writeable


def test_annotations_that_cannot_be_read_limit_nothing():
    class Local:
        pass

    @dataclass(frozen=True)
    class Mine(Rule):
        eta: Local
        other: Missing = 3  # noqa: F821

        def apply(self, state, x, dx):
            return state, dx

    assert Mine(-7).eta == -7


def test_a_users_subclass_of_a_built_in_rule():
    @dataclass(frozen=True)
    class Warm(Momentum):
        warm: int = 4

        def coefs(self, t):
            rho, eta = super().coefs()
            return rho, eta * min(1, t / self.warm)

    x, g = np.array([1.0]), np.array([1.0])
    state, new, _ = step(update, setup(Warm(0.5, 0.0), x), x, g)
    assert new == 1 - 0.125
    assert state.state.t == 1
    with pytest.raises(ValueError, match="Warm: eta must be"):
        Warm(-1)


def test_defaults():
    assert (AdamW().lambda_, AdamW().couple, AdaBelief().epsilon) == (0.0, True, 1e-16)
