"""Rules one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from .._arrays.dtypes import is_narrow
from .._arrays.states import parts_of_state
from .._arrays.traced import Maybe, chosen
from .._messages.text import short
from ._base import ANEW, Array, Rule, adjusted, refuse_strange, started
from ._measure import only_if
from ._numbers import (
    applied,
    as_like,
)
from ._program import Parts, Program, placed, program_of


@dataclass(frozen=True, init=False, repr=False)
class OptimiserChain(Rule):
    """Rules one after another: each hands its step to the next as the gradient.

    Parameters
    ----------
    *rules : Rule
        Rules in the order in which they see the gradient; chains too. An empty chain steps by the
        gradient itself. `MixedPrecision` goes around a chain, not into it.

    Notes
    -----
    Keeps a tuple of the states of its rules. Where a rule makes no step, as `AccumGrad` may, the
    rules after it are not asked and keep their state. `adjust` changes the rules that have the
    field; the others stay.

    Raises
    ------
    TypeError
        If something is no rule, or `MixedPrecision`.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import ClipGrad, Descent, OptimiserChain
    >>> rule = OptimiserChain(ClipGrad(1.0), Descent(eta=0.1))
    >>> x = np.zeros(2)
    >>> rule.apply(rule.init(x), x, np.array([0.5, -3.0]))
    (((), ()), array([ 0.05, -0.1 ]))
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                from .._messages.mixups import no_rule

                raise no_rule("OptimiserChain takes rules, one after another", rule)
            if rule._is_outermost:
                name = rule._shown_as
                raise TypeError(
                    f"{name} cannot stand inside a chain; put the chain inside it: "
                    f"{name}(OptimiserChain(...))"
                )
        _refuse_behind_owners(rules)
        object.__setattr__(self, "rules", rules)

    def __repr__(self) -> str:
        return f"OptimiserChain({', '.join(map(repr, self.rules))})"

    def init(self, x: Array, *, index: int = 0) -> tuple[Any, ...]:
        return tuple(started(rule, x, index) for rule in self.rules)

    def apply(
        self, state: tuple[Any, ...], x: Array, dx: Array, *higher: Array
    ) -> tuple[tuple[Any, ...], Array]:
        if not isinstance(state, tuple | list) or len(state) != len(self.rules):
            raise TypeError(
                f"{type(self).__name__} keeps the states of its {len(self.rules)} rules, got "
                f"{short(state)}; {ANEW}"
            )
        if is_narrow(x):  # asked by hand: updates hand over float32, and round no step
            return _rounded(x, *applied(self, state, x, dx, *higher))
        new = list(state)
        made: Any = None
        for k, rule in enumerate(self.rules):
            with only_if(made):
                new[k], dx = rule.apply(state[k], x, dx, *higher)
            if made is not None:
                new[k] = chosen(made, new[k], state[k])
            if isinstance(dx, Maybe):
                made = dx.made if made is None else made & dx.made
                dx = dx.step
            if dx is None:
                break
        return tuple(new), dx if made is None or dx is None else Maybe(step=dx, made=made)

    def _evaluated(self, state: Any, x: Array) -> Array:
        for rule, kept in zip(self.rules, state, strict=True):
            x = rule._evaluated(kept, x)
        return x

    def program(self) -> Program | None:
        joined: Program = (Parts(len(self.rules)),)
        for k, rule in enumerate(self.rules):
            if (program := program_of(rule)) is None:
                return None
            joined += placed(program, k)
        return joined

    def fields(self) -> Iterator[tuple[str, Any]]:
        for rule in self.rules:
            yield from rule.fields()

    def adjust(self, **changes: Any) -> Self:
        refuse_strange(self, changes)
        return type(self)(*(adjusted(rule, changes) for rule in self.rules))


def _refuse_behind_owners(rules: tuple[Rule, ...]) -> None:
    """Raise if a rule changes the steps of one that owns its parameter."""
    owner: Rule | None = None
    for rule in rules:
        if owner is not None and not _is_idle(rule):
            raise TypeError(
                f"{owner._shown_as} steps to a value that it computes, so nothing behind it in a "
                f"chain may change the step; got {short(rule)}: put it ahead, or leave it out"
            )
        owner = owner or owner_in(rule)


def _is_idle(rule: Rule) -> bool:
    """Tell whether a rule does nothing: a clip with an infinite limit, or a chain of such."""
    if isinstance(rule, OptimiserChain):
        return all(map(_is_idle, rule.rules))
    return rule._is_idle


def owner_in(rule: Rule) -> Rule | None:
    """Return the rule that owns its parameter, if this is one or holds one."""
    if rule._owns_parameter:
        return rule
    held = parts_of_state((*vars(rule).values(),), tuple)
    owners = (owner_in(part) for part in held if isinstance(part, Rule))
    return next((owner for owner in owners if owner is not None), None)


def _rounded(x: Array, state: Any, dx: Any) -> tuple[Any, Any]:
    """Return a state beside a step in the dtype of `x`."""
    if isinstance(dx, Maybe):
        return state, Maybe(step=as_like(x, dx.step), made=dx.made)
    return state, None if dx is None else as_like(x, dx)
