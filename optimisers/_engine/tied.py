"""Ties: one step for the places of one parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np

from .._arrays.library import (
    isnumeric,
    library_for,
    maywrite,
    of_class,
    plain,
    refuse_masked_parameter,
)
from .._arrays.sharing import carry, laid_out, overlap, same_elements
from .._leaf import Leaf
from .._messages.text import short
from ..rules._numbers import read_only, widened
from . import advance as engine
from .arrays import fresh, shown, writing
from .batch import Call
from .gradients import checked

Array = Any


def reunited(leaves: list[Leaf]) -> list[Leaf]:
    """Return for each leaf the first to which it is tied, where JAX has made several of one."""
    first: dict[int, Leaf] = {}
    return [leaf if leaf.tie is None else first.setdefault(id(leaf.tie), leaf) for leaf in leaves]


class Tied:
    """The places of a model, grouped by leaf: one step for each group, spread to its places."""

    def __init__(
        self, leaves: list[Leaf], held: list[Leaf], xs: list[Array], where: Callable[[int], str]
    ) -> None:
        self.held, self.xs, self.where = held, xs, where
        groups: dict[int, list[int]] = {}
        for k, leaf in enumerate(leaves):
            groups.setdefault(id(leaf), []).append(k)
        self.groups = list(groups.values())
        self.leaves = [leaves[group[0]] for group in self.groups]

    def advance(
        self,
        gs: list[Any],
        higher: Sequence[list[Any]],
        in_place: bool,
        on_nonfinite: str,
        value: Any = None,
    ) -> tuple[dict[int, Array], dict[int, Any], list[int]]:
        """Update all places, as `_engine.advance` updates leaves."""
        groups = [*zip(self.leaves, self.groups, strict=True)]
        summed, *higher = [[self._sum(g, *group) for group in groups] for g in (gs, *higher)]
        xs = [self._primary(group) for group in self.groups]

        def where(j: int) -> str:
            return self.where(self.groups[j][0])

        first, states, skipped = engine.advance(
            self.leaves,
            xs,
            summed,
            higher,
            where,
            in_place,
            on_nonfinite,
            partial(self._beside, summed) if in_place else None,
            value,
        )
        new_x: dict[int, Array] = {}
        for j, group in enumerate(self.groups):
            moved = summed[j] is not None and not self.leaves[j].frozen
            x = self.xs[group[0]]
            new = plain(first.get(j))
            if new is None and not in_place:
                new = plain(fresh(x))
            if any(self.xs[k] is not x for k in group):
                new = laid_out(new, x)  # so that each view of x has a view of it
            by_array = {id(x): of_class(x, new)}
            for k in group:
                other = self.xs[k]
                if id(other) not in by_array:
                    made = None
                    if same_elements(x, other):
                        made = None if new is None else of_class(other, shown(new, x, other))
                    elif moved and not (in_place and maywrite(other)):
                        made = of_class(other, plain(fresh(x if new is None else new)))
                    by_array[id(other)] = made
                if by_array[id(other)] is not None:
                    new_x[k] = by_array[id(other)]
        new_state = {self.groups[j][0]: state for j, state in states.items()}
        return new_x, new_state, [self.groups[j][0] for j in skipped]

    def _beside(
        self,
        summed: list[Any],
        new_x: dict[int, Array],
        new_state: dict[int, Any],
        skipped: Sequence[int],
    ) -> list[Call]:
        """Return the calls that write a group's new values into its separate arrays and leaves."""
        calls: list[Call] = []
        written = []
        for j, group in enumerate(self.groups):
            if summed[j] is None or self.leaves[j].frozen:
                continue
            x = self.xs[group[0]]
            if j not in new_x:
                written.append((group[0], x))
            for k in group[1:]:
                other = self.xs[k]
                if other is not x and not same_elements(x, other) and maywrite(other):
                    written.append((k, other))
                    calls.append(writing(other, new_x.get(j, x)))
        if calls and (clash := overlap(written)):
            raise engine.overlapping(*map(self.where, clash))
        return calls + self._told(new_state, skipped)

    def _told(self, new_state: dict[int, Any], skipped: Sequence[int]) -> list[Call]:
        """Return the calls that give the other leaves of a group the new state of its first."""
        calls: list[Call] = []
        passed = set(skipped)
        for j, (leaf, group) in enumerate(zip(self.leaves, self.groups, strict=True)):
            for other in {id(self.held[k]): self.held[k] for k in group}.values():
                if other is not leaf:
                    calls.append((setattr, other, "state", new_state.get(j, leaf.state)))
                    calls.append((setattr, other, "skipped", leaf.skipped + (j in passed)))
        return calls

    def _primary(self, group: list[int]) -> Array:
        """Return the group's first array, read-only if one of its places is."""
        x = self.xs[group[0]]
        return x if all(maywrite(self.xs[k]) for k in group) else read_only(x)

    def _sum(self, gs: list[Any], leaf: Any, group: list[int]) -> Any:
        """Return the sum of a group's gradients as its first place shows it; None without any."""
        first = group[0]
        if len(group) == 1:
            return gs[first]  # the engine checks it
        given = {}
        x, g = self.xs[first], gs[first]
        # PyTorch gives one gradient object of one tensor, summed over its places.
        once = library_for(x).sums_ties and all(self.xs[k] is x and gs[k] is g for k in group)
        for k in group[:1] if once else group:
            as_seen = partial(self._carried, source=first, target=k)
            g = checked(gs[k], leaf, self.xs[k], partial(self.where, k), as_seen)
            if g is not None:
                given[k] = g
        for k in group[1:] if given else ():
            self._refuse_misfit(first, k)
        seen = [self._carried(g, source=k, target=first) for k, g in given.items()]
        return reduce(sum_of_two, seen) if seen else None

    def _carried(self, values: Array, source: int, target: int) -> Array:
        """Return values laid out like the array at one place as the array at another shows them."""
        x, other = self.xs[source], self.xs[target]
        return values if x is other or not same_elements(x, other) else carry(values, x, other)

    def _refuse_misfit(self, first: int, k: int) -> None:
        """Raise if two places are not views of one array, nor can have the same numbers."""
        x, other = self.xs[first], self.xs[k]
        refuse_masked_parameter(other, partial(self.where, k))
        if other is x or (isnumeric(other) and same_elements(x, other)):
            return
        if not isnumeric(other) or other.shape != x.shape or other.dtype != x.dtype:
            raise ValueError(
                f"{self.where(first)} and {self.where(k)} share a Leaf, but are separate arrays, "
                f"{_kind(x)} and {_kind(other)}; call setup anew with this model"
            )


def sum_of_two(a: Array, b: Array) -> Array:
    """Return the sum of two gradients of one parameter, in a dtype in which steps are computed."""
    a, b = widened(a), widened(b)
    if library_for(a).computes:
        with np.errstate(over="ignore", invalid="ignore"):
            return a + b
    return engine.cuda().summed(a, b)


def _kind(x: Any) -> str:
    if not isnumeric(x):
        return short(x)
    return f"of shape {tuple(x.shape)} and dtype {x.dtype}"
