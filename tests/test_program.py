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
from optimisers._engine import ready
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


@parametrize("rule", RULES)
def test_a_stage_finds_its_state_at_its_place(rule):
    state = rule.init(np.ones(3, np.float32))
    for stage in program_of(rule):
        own = part(state, stage.at)
        if isinstance(stage, Step):
            assert len(own) == len(stage.rule.slots) + stage.rule.counts
        elif isinstance(stage, Hold):
            assert [own[0].shape, own[1].shape] == [(3,), ()]
        elif isinstance(stage, Master):
            assert own[0].dtype == stage.dtype
        elif isinstance(stage, Parts):
            assert len(own) == stage.n
        else:
            assert own == ()


def lowered(plan, at=()):
    """Return the stages of a plan as it was made before there were programs."""
    plans = ready.cuda_kit().plans
    if isinstance(plan, plans.ChainPlan):
        yield Parts, at
        for k, inner in enumerate(plan.parts):
            yield from lowered(inner, (*at, k))
    elif isinstance(plan, plans.MixedPlan):
        yield Master, at
        yield from lowered(plan.inner, (*at, 1))
    elif isinstance(plan, plans.NormPlan):
        yield Measure, at, plan.rule
        yield Step, at, plan.stage.step
    elif isinstance(plan, plans.AccumulatePlan):
        yield Hold, at, plan.n, plan.hold.step, plan.release.step
    else:
        yield Step, at, plan.step


def told(stage):
    if isinstance(stage, Measure):
        return Measure, stage.at, stage.rule
    if isinstance(stage, Hold):
        return Hold, stage.at, stage.n, type(stage.add).step, type(stage.release).step
    if isinstance(stage, Step):
        return Step, stage.at, type(stage.rule).step
    return type(stage), stage.at


@parametrize("rule", RULES)
def test_programs_agree_with_plans(rule):
    assert [*map(told, program_of(rule))] == [*lowered(ready.lower_for_device(rule))]


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
    outcomes = []
    chain = OptimiserChain(ClipGrad(0.5), Adam())
    for rule in (Clipped(), chain, replace(Clipped(), inner=OwnApply())):
        x = np.linspace(-2, 2, 7)
        state = setup(rule, x)
        for _ in range(3):
            state, x, _ = step(update_, state, x, np.sin(3 * x))
        outcomes.append((x, *state.state[1]))
    assert_same_bits(outcomes[1], outcomes[0])
    assert_same_bits(outcomes[2], outcomes[0])


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
