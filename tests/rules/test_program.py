"""Programs: the flat stages that say what a rule does, and the places of its state."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from util import assert_same_bits, example, parametrize, step

from optimisers import (
    AccumGrad,
    Adam,
    ClipGrad,
    ClipNorm,
    Descent,
    ElementwiseRule,
    MixedPrecision,
    Momentum,
    OptimiserChain,
    Rule,
    WeightDecay,
    setup,
    update_,
)
from optimisers.rules._base import registry
from optimisers.rules._program import (
    Hold,
    Master,
    Measure,
    Parts,
    Step,
    numbers,
    placed,
    program_of,
)

NESTED = OptimiserChain(
    ClipNorm(1.0, p=1.0),
    OptimiserChain(),
    OptimiserChain(WeightDecay(0.1), OptimiserChain(AccumGrad(3), Adam())),
    Momentum(),
)


@dataclass(frozen=True)
class Halved(ElementwiseRule):
    """A user's rule."""

    eta: float = 0.5
    slots = ("v",)

    def coefs(self):
        return (self.eta,)

    @staticmethod
    def step(x, dx, state, coefs):
        (v,) = state
        (eta,) = coefs
        v = eta * v + dx
        return eta * v, (v,)


class Renamed(Adam):
    """A subclass that leaves to Adam all that a step does."""


class Louder(Adam):
    def coefs(self, t):
        return tuple(2 * number for number in super().coefs(t))


RULES = [
    *map(example, registry()),
    Halved(),
    Renamed(),
    Louder(),
    NESTED,
    OptimiserChain(),
    OptimiserChain(Halved(), ClipNorm(), Renamed()),
    MixedPrecision("f8", NESTED),
    MixedPrecision("f2", AccumGrad(2)),
]


def part(state, at):
    return functools.reduce(lambda state, k: state[k], at, state)


@parametrize("rule", [rule for rule in RULES if program_of(rule) is not None])
def test_a_stage_finds_its_state_at_its_place(rule):
    state = rule.init(np.ones(3, np.float32))
    for stage in program_of(rule):
        own = part(state, stage.at)
        if isinstance(stage, Step):
            kept = bool(stage.rule.kept)
            assert len(own) == len(stage.rule.slots) + kept + stage.rule.counts
        elif isinstance(stage, Hold):
            assert [own[0].shape, own[1].shape] == [(3,), ()]
        elif isinstance(stage, Master):
            assert own[0].dtype == stage.dtype
        elif isinstance(stage, Parts):
            assert len(own) == stage.n
        else:
            assert stage.rule.State(*own) == own or own == ()


def test_a_chain_joins_the_programs_of_its_rules():
    clip_norm, chain, wrapped = NESTED.rules[0], NESTED.rules[2], NESTED.rules[2].rules[1]
    scale, hold = program_of(clip_norm)[1].rule, program_of(AccumGrad(3))[0]
    expected = (
        Parts(4),
        Measure(clip_norm, (0,)),
        Step(scale, (0,)),
        Parts(0, (1,)),
        Parts(2, (2,)),
        Step(chain.rules[0], (2, 0)),
        Parts(2, (2, 1)),
        hold._replace(at=(2, 1, 0)),
        Step(wrapped.rules[1], (2, 1, 1)),
        Step(NESTED.rules[3], (3,)),
    )
    assert program_of(NESTED) == expected
    master = Master(np.dtype("f8"))
    assert program_of(MixedPrecision("f8", NESTED)) == (master, *placed(expected, 1))


# --- which rules have none -------------------------------------------------------------------


class OwnApply(Adam):
    def apply(self, state, x, dx, *higher):
        return super().apply(state, x, dx, *higher)


class OwnMove(MixedPrecision):
    def move(self, state, x, dx, *higher):
        return super().move(state, x, dx, *higher)


class Loud:
    """No rule, but what it does is done by one that inherits from it."""

    def apply(self, state, x, dx, *higher):
        return super().apply(state, x, dx, *higher)


class Mixed(Loud, Momentum):
    pass


def doubled(step):
    @functools.wraps(step)
    def twice(*args):
        dx, slots = step(*args)
        return 2 * dx, slots

    return twice


class Decorated(Descent):
    step = staticmethod(doubled(Descent.step))


@dataclass(frozen=True)
class ByHand(Rule):
    """A rule with an `apply` alone."""

    def apply(self, state, x, dx):
        return state, dx


WITHOUT = [OwnApply(), OwnMove(Adam()), Mixed(), Decorated(), ByHand()]


@parametrize("rule", WITHOUT)
def test_a_rule_that_overrides_what_a_step_does_has_no_program(rule):
    assert program_of(rule) is None


@parametrize("rule", [rule for rule in WITHOUT if not isinstance(rule, MixedPrecision)])
def test_nor_has_a_rule_around_it(rule):
    assert program_of(OptimiserChain(Adam(), rule)) is None
    assert program_of(OptimiserChain(OptimiserChain(rule))) is None
    assert program_of(MixedPrecision("f4", rule)) is None


def test_a_class_that_is_changed_later_has_none(monkeypatch):
    assert program_of(Renamed()) is not None
    monkeypatch.setattr(Renamed, "apply", OwnApply.apply, raising=False)
    assert program_of(Renamed()) is None


# --- programs of users -----------------------------------------------------------------------


@dataclass(frozen=True)
class Clipped(Rule):
    """A rule that says its program beside its `apply`."""

    inner: Rule = field(default_factory=Adam)

    def init(self, x):
        return (), self.inner.init(x)

    def apply(self, state, x, dx):
        _, dx = ClipGrad(0.5).apply((), x, dx)
        inner, dx = self.inner.apply(state[1], x, dx)
        return ((), inner), dx

    def program(self):
        inner = program_of(self.inner)
        return inner and (Parts(2), Step(ClipGrad(0.5), (0,)), *placed(inner, 1))


def test_a_rule_with_a_program_of_its_own_is_compiled():
    x = np.linspace(-2, 2, 7)
    expected = trained(OptimiserChain(ClipGrad(0.5), Adam()), x, "kernels")
    assert_same_bits(trained(Clipped(), x, "kernels"), expected)
    assert_same_bits(trained(replace(Clipped(), inner=OwnApply()), x, "arrays"), expected)


ODD = {
    "a place that is none": (Parts(2), Step(ClipGrad(0.5), (0,)), Step(Adam(), (2,))),
    "a place below 0": (Parts(2), Step(ClipGrad(0.5), (0,)), Step(Adam(), (-1,))),
    "a place within an array": (Parts(2), Step(ClipGrad(0.5), (0,)), Step(Adam(), (1, 0))),
    "another number of parts": (Parts(3), Step(ClipGrad(0.5), (0,)), Step(Adam(), (1,))),
    "a step of another state": (Parts(2), Step(Momentum(), (0,)), Step(Adam(), (1,))),
    "a step that takes no measure": (Measure(ClipNorm(), (1,)), Step(Adam(), (1,))),
    "a measure without a step": (Step(Adam(), (1,)), Measure(ClipNorm(), (0,))),
    "a measure of the tree": (Measure(ClipNorm(), (0,), "tree"), Step(Adam(), (1,))),
    "a master in the middle": (Step(Adam(), (1,)), Master(np.dtype("f4"))),
    "a hold of two slots": (Hold(2, (1,), Adam(), Adam()),),
    "nothing known": ("step",),
}


@parametrize("odd", ODD)
def test_a_program_that_does_not_fit_is_not_run(odd):
    class Odd(Clipped):
        def program(self):
            return ODD[odd]

    x = np.linspace(-2, 2, 7)
    expected = trained(Clipped(), x, "kernels")
    assert_same_bits(trained(Odd(), x, "arrays"), expected)


def trained(rule, x, backend):
    """Return parameter and state of the inner rule after some steps, all by one backend."""
    x = x.copy()
    state = setup(rule, x)
    for _ in range(3):
        state, x, used = step(update_, state, x, np.sin(3 * x))
        assert {*used.values()} == {backend}
    return x, *state.state[1]


def test_numbers_are_those_of_the_count():
    assert numbers(Adam(), 3) == Adam().coefs(3)
    assert numbers(Descent(0.5)) == (0.5,)


def test_the_program_of_a_rule_that_is_traced_is_none():
    jax = pytest.importorskip("jax")
    seen = []

    def look(eta):
        seen.append(program_of(OptimiserChain(Adam(), Descent(eta))))
        return eta

    jax.jit(look)(0.5)
    assert seen == [None]
