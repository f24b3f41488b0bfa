"""Fields of rules: their limits, and how a rule is made of them."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import math
import re

import numpy as np
import pytest
from public_rules import LIMITED, OUTSIDE, PUBLIC_RULES, built
from util import PUBLIC, example, may_be_none, parametrize, variants

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    MixedPrecision,
    OptimiserChain,
    RMSProp,
    adjust_,
    setup,
)
from optimisers._messages.text import short
from optimisers.rules import _fields

# --- limits of fields ------------------------------------------------------------------------

INSIDE = {
    "finite": [-3.0, 0, 1e300],
    "finite and at least 0": [0, 0.0, 5e-324, 1e300],
    "at least 0": [0, 0.0, 5e-324, 1e300, math.inf],
    "in [0, 1)": [0, 0.0, 1 - 2**-53],
    "in [0, 1]": [0, 0.0, 1, 1.0],
    "a whole number": [0, -1, 3],
    "finite and above 0": [5e-324, 1, 1e300],
    "a whole number, at least 0": [0, 1, 3],
    "in (0, 1)": [5e-324, 1 - 2**-53],
    "finite and above 1": [1 + 2**-52, 2, 1e300],
    "a number, inf or -inf": [math.inf, -math.inf, 0, -2.5],
    "a whole number, at least 1": [1, 7, 2.0],
}


def test_every_number_has_a_limit():
    numbers = {
        (cls, f.name)
        for cls in PUBLIC
        for f in dataclasses.fields(cls)
        if isinstance(getattr(example(cls), f.name), int | float | tuple)
        and not isinstance(getattr(example(cls), f.name), bool)
        and cls is not OptimiserChain
    }
    fields = {(cls, f.name) for cls in PUBLIC for f in dataclasses.fields(cls)}
    numbers |= {(cls, field) for cls, field in fields if may_be_none(cls, field)}
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
    if value is None and may_be_none(cls, field):
        assert getattr(built(cls, field, i, None)[0], field) is None
        return
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
