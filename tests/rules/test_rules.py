"""Rules as objects: their fields and limits, what they print, remember, pickle and adjust."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import inspect
import math
import pickle
import re
import typing
from dataclasses import dataclass

import numpy as np
import pytest
from util import ELEMENTWISE, PUBLIC, example, parametrize, snapshot, step, variants

import optimisers
from optimisers import (
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
    adjust,
    adjust_,
    setup,
    update,
    update_,
)
from optimisers._messages.text import short
from optimisers.rules import _base, _fields
from optimisers.words import sign

COMPOSED = [
    OptimiserChain(),
    OptimiserChain(Adam()),
    OptimiserChain(ClipNorm(2.0, math.inf), OptimiserChain(WeightDecay(), AccumGrad(3)), Adam(0.1)),
    ClipNorm(),
    ClipNorm(1.0, -math.inf, throw=False),
    AccumGrad(4),
    MixedPrecision(Adam()),
    MixedPrecision("float64", OptimiserChain(ClipGrad(), RMSProp(centred=True))),
    MixedPrecision("float16", AccumGrad(2)),
]
PUBLIC_RULES = [rule for cls in PUBLIC for rule in variants(cls)] + COMPOSED


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


@parametrize("cls", [*PUBLIC, Rule, ElementwiseRule])
def test_docstring_tells_all(cls):
    text = inspect.cleandoc(cls.__doc__)
    for section in ["Parameters"] * (cls in PUBLIC) + ["Examples"]:
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for name in inspect.signature(cls).parameters if cls in PUBLIC else []:
        if name not in ("centered", "rules"):
            assert re.search(rf"^{name} : ", text, re.MULTILINE), name


# --- limits of fields ------------------------------------------------------------------------

INSIDE = {
    "finite": [-3.0, 0, 1e300],
    "finite and at least 0": [0, 0.0, 5e-324, 1e300],
    "at least 0": [0, 0.0, 5e-324, 1e300, math.inf],
    "in [0, 1)": [0, 0.0, 1 - 2**-53],
    "in (0, 1)": [5e-324, 1 - 2**-53],
    "finite and above 1": [1 + 2**-52, 2, 1e300],
    "a number, inf or -inf": [math.inf, -math.inf, 0, -2.5],
    "a whole number, at least 1": [1, 7, 2.0],
}
OUTSIDE = {
    "finite": [math.nan, math.inf, -math.inf, 10**400],
    "finite and at least 0": [-1e-300, math.nan, math.inf, -math.inf, 10**400],
    "at least 0": [-1e-300, math.nan, -math.inf, -(10**400)],
    "in [0, 1)": [1, 1.0, -1e-9, math.nan, math.inf],
    "in (0, 1)": [0, 1, 1.5, -0.5, math.nan, math.inf],
    "finite and above 1": [1, 0.5, -2, math.nan, math.inf, 10**400],
    "a number, inf or -inf": [math.nan],
    "a whole number, at least 1": [0, -1, 1.5, math.nan, math.inf],
}


def limited():
    """Return (class, field, position or None, text of the limit) for each number of each rule."""
    found = []
    for cls in PUBLIC:
        for field, limits in _fields._limits(cls).items():
            pair = typing.get_origin(typing.get_type_hints(cls)[field]) is tuple
            for i, limit in enumerate(limits.each):
                found.append((cls, field, i if pair else None, limit.text))
    return found


def built(cls, field, i, value):
    """Return a rule of this class with this value in a field, or at place i of a pair."""
    if i is not None:
        widest = [0.0, math.inf]  # beside which any value is in order
        is_range = _fields._limits(cls)[field].together
        pair = widest if is_range else list(getattr(example(cls), field))
        pair[i] = value
        value = tuple(pair)
    return example(cls, **{field: value}), value


LIMITED = limited()


def test_every_number_has_a_limit():
    numbers = {
        (cls, f.name)
        for cls in PUBLIC
        for f in dataclasses.fields(cls)
        if isinstance(getattr(example(cls), f.name), int | float | tuple)
        and not isinstance(getattr(example(cls), f.name), bool)
        and cls is not OptimiserChain
    }
    assert {(cls, field) for cls, field, _, _ in LIMITED} == numbers


@pytest.mark.parametrize(("cls", "field", "i", "text"), LIMITED)
def test_values_inside_the_limits(cls, field, i, text):
    for value in INSIDE[text]:
        rule, held = built(cls, field, i, value)
        assert getattr(rule, field) == held


@pytest.mark.parametrize(("cls", "field", "i", "text"), LIMITED)
def test_values_outside_the_limits(cls, field, i, text):
    place = field if i is None else f"{field}[{i}]"
    for value in OUTSIDE[text]:
        with pytest.raises(ValueError, match=r"must be") as caught:
            built(cls, field, i, value)
        message = f"{cls.__name__}: {place} must be {text}; got {value!r}"
        uphill = "; to go uphill, give the gradient with the other sign"
        assert str(caught.value) == message + uphill * (place == "eta" and value < 0)


@pytest.mark.parametrize(("cls", "field", "i", "text"), LIMITED)
@pytest.mark.parametrize("value", ["0.1", None, 1j, [0.1], np.ones(1), b"1"], ids=repr)
def test_values_that_are_no_numbers(cls, field, i, text, value):
    place = field if i is None else f"{field}[{i}]"
    with pytest.raises(TypeError) as caught:
        built(cls, field, i, value)
    message = f"{cls.__name__}: {place} must be a real number, {text}; got {short(value)}"
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "beta", [0.9, (0.9,), (0.9, 0.99, 0.999), np.ones(2), "ab", None], ids=repr
)
def test_pairs_hold_two_numbers(beta):
    with pytest.raises(TypeError, match=re.escape(f"Adam: beta must hold 2 numbers; got {beta!r}")):
        Adam(beta=beta)


RANGES = [(cls, field) for cls in PUBLIC for field, v in _fields._limits(cls).items() if v.together]


@pytest.mark.parametrize(("cls", "field"), RANGES)
def test_the_ends_of_a_range_are_in_order(cls, field):
    for right in (0, 0), (2, 2), (1e-6, math.inf):
        assert getattr(cls(**{field: right}), field) == right
    message = rf"{cls.__name__}: {field} must be \(least, largest\), in this order; got \(2, 1e"
    with pytest.raises(ValueError, match=message):
        cls(**{field: (2, 1e-6)})
    with pytest.raises(ValueError, match=message):
        cls().adjust(**{field: (2, 1e-6)})
    x = np.ones(2)
    state = setup(OptimiserChain(cls()), x)
    with pytest.raises(ValueError, match=message):
        adjust_(state, **{field: (2, 1e-6)})
    assert state.rule == OptimiserChain(cls())


def test_a_whole_number_beyond_all_floats_is_infinite():
    assert ClipGrad(10**400).delta == ClipNorm(10**400).omega == math.inf
    assert ClipNorm(p=-(10**400)).p == -math.inf


def test_messages_of_centred_rmsprop_name_the_public_rule():
    with pytest.raises(ValueError, match=r"^RMSProp: eta must be finite and at least 0; got -1;"):
        RMSProp(-1, centred=True)


# --- construction ----------------------------------------------------------------------------


@parametrize("cls", [c for c in PUBLIC if c not in (OptimiserChain, MixedPrecision)])
def test_fields_in_order_by_position_and_by_name(cls):
    rule = variants(cls)[-1]
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(cls)}
    assert cls(*values.values()) == cls(**values) == rule
    with pytest.raises(TypeError, match="nonsense"):
        cls(**values, nonsense=1)


def test_centered_is_accepted():
    assert RMSProp(centered=True) == RMSProp(centred=True) == RMSProp(0.001, 0.9, 1e-8, True)
    assert RMSProp(centered=True) != RMSProp()
    assert isinstance(RMSProp(centred=True), RMSProp)


def test_a_list_makes_a_pair():
    rule = Adam(beta=[0.8, 0.9])
    assert rule == Adam(beta=(0.8, 0.9))
    assert hash(rule) == hash(Adam(beta=(0.8, 0.9)))


@pytest.mark.parametrize(
    "half",
    [np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), fractions.Fraction(1, 2)],
    ids=repr,
)
def test_every_kind_of_real_number(half):
    rule = Adam(half, [half, half], half)
    assert rule == Adam(0.5, (0.5, 0.5), 0.5)
    assert repr(rule) == repr(Adam(0.5, (0.5, 0.5), 0.5))
    assert repr(AccumGrad(np.int32(3))) == repr(AccumGrad(3.0)) == "AccumGrad(n=3)"


def test_numbers_of_other_libraries():
    torch = pytest.importorskip("torch")
    assert Descent(torch.tensor(0.5)) == Descent(0.5)
    jax = pytest.importorskip("jax")
    assert Descent(jax.numpy.asarray(0.5)) == Descent(0.5)


def test_traced_numbers_are_not_checked():
    jax = pytest.importorskip("jax")

    def stepped(eta, b2):
        rule = Adam(eta, (0.9, b2))
        x = jax.numpy.ones(2)
        return rule.apply(rule.init(x), x, jax.numpy.asarray([3.0, -4.0]))[1]

    np.testing.assert_allclose(jax.jit(stepped)(0.1, 0.999), [0.1, -0.1], rtol=1e-6)
    slope = jax.grad(lambda eta: stepped(eta, 0.999).sum())(-1.0)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@parametrize("rule", PUBLIC_RULES)
def test_rules_are_frozen_and_compare_by_value(rule):
    assert rule == copy.deepcopy(rule)
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert {repr(other) for other in PUBLIC_RULES if other == rule} == {repr(rule)}
    for field in dataclasses.fields(rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, field.name, 0)


def test_chains_and_mixed_precision_refuse_what_is_no_rule():
    with pytest.raises(TypeError, match=r"takes rules, one after another; got 0\.1"):
        OptimiserChain(Adam(), 0.1)
    with pytest.raises(TypeError, match=r"one after another; got \[Descent"):
        OptimiserChain([Descent()])
    with pytest.raises(TypeError, match="takes rules, one after another; got <class"):
        OptimiserChain(Adam)
    with pytest.raises(TypeError, match="takes a rule"):
        MixedPrecision("float32")
    with pytest.raises(TypeError, match="takes a rule"):
        MixedPrecision(MixedPrecision(Adam()))


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

ALL_ELEMENTWISE = [r for r in PUBLIC_RULES if isinstance(r, ElementwiseRule)] + [
    RMSProp(centred=True)
]


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
    tiny, other = example(cls, epsilon=1e-12), example(cls, epsilon=1e-7)
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
    assert refusing == [Rprop, ClipGrad]
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
