"""What a rule does, as a flat tuple of stages that every engine reads.

A *place* is a path of indices into the state of the rule: () is the whole state, (1, 0) is part 0
of its part 1. A rule of rules joins the programs of the rules in it, with their places behind its
own (`placed`).

    rule                            program
    Adam()                          Step(adam)
    OptimiserChain(clip, adam)      Parts(2), Step(clip, (0,)), Step(adam, (1,))
    ClipNorm()                      Measure(clip_norm), Step(clip_norm)
    AccumGrad(n)                    Hold(n, add, release)
    MixedPrecision("f4", adam)      Master("f4"), Step(adam, (1,))
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _fork
from .._arrays.states import parts_of_state
from .._arrays.traced import (
    attributes,
    holds_abstract,
    holds_traced,
    settled,
    with_attributes,
)

if TYPE_CHECKING:
    from ._base import ElementwiseRule, Rule

Place = tuple[int, ...]


class Step(NamedTuple):
    """One elementwise step; its state is an array for each slot, and then `t` if it counts."""

    rule: ElementwiseRule
    at: Place = ()


class Measure(NamedTuple):
    """Numbers found over an array, axes of it, or the tree, for the coefs of the step that follows.

    Both are of one rule: its `measure` is evaluated and reduced, then its `coefs` is asked.
    """

    rule: ElementwiseRule
    at: Place = ()
    over: str = "array"


class Hold(NamedTuple):
    """Of n gradients, the step `add` takes all but the last, and what follows does not run.

    The last goes to `release`, and on from there. Both steps have one slot; the state is this
    array, and a count of the gradients in it.
    """

    n: int
    at: Place
    add: ElementwiseRule
    release: ElementwiseRule


class Master(NamedTuple):
    """What follows updates a copy of the parameter in this dtype, which is part 0 of the state."""

    dtype: np.dtype[Any]
    at: Place = ()


class Parts(NamedTuple):
    """Nothing is done; the state here is a tuple of n parts, at whose places other stages stand."""

    n: int
    at: Place = ()


Stage = Step | Measure | Hold | Master | Parts
Program = tuple[Stage, ...]


def placed(program: Iterable[Stage], index: int) -> Program:
    """Return a program whose state is part `index` of the state around it."""
    return tuple(stage._replace(at=(index, *stage.at)) for stage in program)


def program_of(rule: Rule) -> Program | None:
    """Return what a rule does, or None if only its `apply` says so.

    A class that overrides `apply` or `move`, and does not say by `program` what these do, has none;
    nor has a rule with numbers that JAX traces or ``torch.vmap`` maps. The numbers in a program are
    ordinary ones.
    """
    if not _says_all(type(rule)):
        return None
    program = rule.program()
    if program is None:
        return None
    stages = []
    for stage in program:
        if isinstance(stage, (Step, Measure)):
            if (ordinary := _in_numbers(stage.rule)) is None:
                return None
            if ordinary is not stage.rule:
                stage = stage._replace(rule=ordinary)
        stages.append(stage)
    return tuple(stages)


def _says_all(cls: type) -> bool:
    """Tell whether `program` is defined no farther up than all else that a step does."""
    for base in cls.__mro__:
        own = vars(base)
        if "program" in own:
            return True
        if "apply" in own or "move" in own:
            return False
    return False


def _in_numbers(rule: Any) -> Any:
    """Return a rule with ordinary numbers, or None if nobody can say yet what they are."""
    numbers = attributes(rule).values()
    if all(map(_is_python, numbers)):
        return rule
    if any(map(holds_traced, numbers)) or any(map(holds_abstract, numbers)):
        return None
    return with_attributes(rule, settled)


def _is_python(value: Any) -> bool:
    """Tell whether a value is a number of Python, or holds nothing else."""
    return all(type(part) in (float, bool, int) for part in parts_of_state(value, tuple))


def numbers(rule: ElementwiseRule, t: Any = None) -> tuple[Any, ...]:
    """Return the numbers that a step takes at count `t`; coefs are asked for here alone.

    And by the CPU kernels, which ask without a call of Python in between; and by `told_numbers`.
    """
    return tuple(rule.coefs(t) if rule.counts else rule.coefs())


TOLD = "t", "before", "sums", "kept", "value", "size"
"""The names by which `coefs` and `measure_coefs` ask for what they need, beside self."""


def asked_by(method: Any) -> tuple[str, ...]:
    """Return for which of `TOLD` a method asks, in its order."""
    return tuple(name for name in inspect.signature(method).parameters if name in TOLD)


def told_numbers(
    rule: ElementwiseRule, method: str, told: Mapping[str, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the numbers that `coefs` or `measure_coefs` makes of what is known, and those kept."""
    asked = {name: told[name] for name in rule.asks[method] if name != "before"}
    if len(asked) < len(rule.asks[method]):
        asked["before"] = told_numbers(rule, "measure_coefs", told)[0]
    made = getattr(rule, method)(**asked)
    if method != "coefs" or not rule.kept:
        return tuple(made), ()
    coefs, kept = made
    return tuple(coefs), tuple(kept)


def is_ours(cls: type[ElementwiseRule]) -> bool:
    """Tell whether a step is one of the library."""
    return cls.step.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_language(rule: ElementwiseRule) -> int:
    """Return how many coefs a user's step takes.

    Raises
    ------
    StepError
        If the step, or the measure, is not in the language of steps.
    """
    if rule.measure is None:
        coefs = len(numbers(rule, 1))
    else:
        before, kinds = measure_form(rule)
        compiler().check(type(rule), before, "measure")
        some = {"t": 1, "sums": (1.0,) * len(kinds), "kept": (), "value": 1.0, "size": 1}
        coefs = len(told_numbers(rule, "coefs", some)[0])
    compiler().check(type(rule), coefs)
    return coefs


def measure_form(rule: ElementwiseRule) -> tuple[int, tuple[str, ...]]:
    """Return how many coefs a measure takes, and how its terms are reduced."""
    before = told_numbers(rule, "measure_coefs", {"t": 1})[0]
    one = np.ones(1)
    terms = rule.measure(one, one, (one,) * len(rule.slots), before)
    return len(before), tuple(getattr(term, "kind", "sum") for term in terms)


@functools.cache
def compiler() -> Any:
    """Return the module that checks and compiles the steps of users, and remembers them."""
    with _fork.compiling:
        from .._steps import compiled

    return compiled
