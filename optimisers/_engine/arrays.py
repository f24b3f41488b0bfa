"""The array path: an update by the array library of the parameter.

Leaves that no kernel takes are evaluated here, with the same steps: NumPy arrays of other dtypes
and layouts, JAX arrays and tracers, tensors without a view, users' rules. Nothing given is written
into; the engine stores the results once all leaves have theirs.
"""

from __future__ import annotations

import collections
import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .._arrays.library import (
    is_abstract,
    is_traced,
    library_for,
    library_of,
    maywrite,
    of_class,
    refuse_masked,
)
from .._arrays.sharing import carry, overlap
from .._arrays.states import map_state, parts_of_state
from .._arrays.traced import Number, with_attributes
from .._pytree import Crossed
from .._trees.nodes import children, rebuild
from ..rules._base import ANEW, ElementwiseRule, Rule
from ..rules._measure import Pass, measures, one_round, shared_in
from ..rules._numbers import moved, read_only
from .batch import Batch, Call, Update, note
from .gradients import checked, named
from .traced import Steps

Array = Any

# --- all leaves ------------------------------------------------------------------------------


class ArrayBatch:
    """Leaves that are evaluated into new arrays by the array library of their parameters."""

    name = "arrays"
    failed = -1

    def __init__(self, update: Update) -> None:
        self.update = update
        self.gs: dict[int, Array] = {}
        self.steps = Steps(evaluate)
        self.stored: list[tuple[int, Array, Array]] = []
        """Indices, arrays of their parameters or states, and the values to write into these."""
        self.new_x: dict[int, Array] = {}
        self.new_state: dict[int, Any] = {}
        self.written_once: set[int] = set()
        """The ids of vectors that leaves share, which are stored already."""
        self.waiting: list[int] = []

    def gather(self, ks: Sequence[int]) -> list[int]:
        for k in ks:
            if (g := self.update.gradient(k)) is not None:
                self.gs[k] = g
        self.waiting = [*self.gs]
        return []

    def indices(self) -> list[int]:
        return [*self.gs]

    def nonfinite(self) -> list[int]:
        gradients = [self.update.gs, *self.update.higher]
        return [k for k in self.gs if self.update.is_bad(k, gradients)]

    def measure(self, whole: Pass) -> dict[int, list[type]]:
        """Evaluate the leaves that can be: all that a rule measures is found with its step."""
        self.waiting = one_round(whole, self.waiting, self._evaluate)
        return {k: measures(self.update.leaves[k].rule) for k in self.waiting}

    def settle(self, before: Sequence[Batch]) -> tuple[int, int] | None:
        if not self.stored:
            return None
        own = self.written()
        others = [batch.written() for batch in before if batch.may_write([x for _, x in own])]
        return overlap(sorted(itertools.chain(own, *others), key=operator.itemgetter(0)))

    def _evaluate(self, k: int) -> None:
        """Evaluate a leaf, and note the arrays to write and their values; write nothing."""
        g, update = self.gs[k], self.update
        leaf, x = update.leaves[k], update.xs[k]
        made, new = _evaluated(self.steps, update, k, g)
        library = library_for(x)
        if update.in_place:
            library.refuse_write(x, new, update.path(k))
        is_known = library_of(new) is library_of(x) or not is_traced(new)
        if update.in_place and new is not None and maywrite(x) and is_known:
            self.stored.append((k, x, new))
        elif new is not None:
            self.new_x[k] = library.like(x, of_class(x, new))
        if update.in_place:
            made = made.state() if type(made) is Crossed else made
            made, writes = rewritten(leaf.state, made)
            shared = {id(vector) for _, vector in shared_in(leaf.state)} if writes else ()
            for old, new in writes:
                if id(old) not in self.written_once:  # else another leaf that shares it writes it
                    self.stored.append((k, old, new))
                if id(old) in shared:
                    self.written_once.add(id(old))
        self.new_state[k] = made

    def calls(self) -> list[Call]:
        calls = [writing(x, values) for _, x, values in self.stored]
        if self.update.in_place:
            leaves = self.update.leaves
            calls += [(setattr, leaves[k], "state", new) for k, new in self.new_state.items()]
        return calls

    def may_write(self, arrays: Sequence[Array]) -> bool:
        return True

    def written(self) -> list[tuple[int, Array]]:
        return [(k, x) for k, x, _ in self.stored]

    def results(self) -> tuple[dict[int, Array], dict[int, Any]]:
        return self.new_x, self.new_state

    def unrecorded(self) -> list[Any]:
        return []


def _evaluated(steps: Steps, update: Update, k: int, g: Array) -> tuple[Any, Array | None]:
    """Return the state and the parameter that a step makes; add the path to errors."""
    leaf, x = update.leaves[k], update.xs[k]
    others = [
        checked(h[k], leaf, x, derivative)
        for h, derivative in named(update.higher, k, update.path_of)
    ]
    if not is_abstract(x):
        refuse_masked_state(leaf.state, update.path(k))
    try:
        return steps.evaluate(leaf, x, [g, *others])
    except FloatingPointError as error:
        raise FloatingPointError(f"at {update.path_of(k)}: {error}") from error
    except Exception as error:
        if type(error) in (TypeError, ValueError) and str(error).endswith(ANEW):
            raise type(error)(f"at {update.path_of(k)}: {error}") from None
        note(error, leaf, update.path_of(k))
        raise


# --- one leaf --------------------------------------------------------------------------------


def evaluate(
    rule: Rule, state: Any, x: Array, gs: Sequence[Array | None]
) -> tuple[Any, Array | None]:
    """Return new state and parameter by the array library of `x`; write into nothing given.

    The parameter is None where the rule makes no step.
    """
    given = x
    library = library_for(x)
    x = library.for_rule(x)
    if type(rule).apply is not ElementwiseRule.apply:
        state, rule = fresh(state), opened(rule)
    dx, *higher = map(read_only, gs)
    with np.errstate(all="ignore"), library.unrecorded():
        state, new = moved(rule, state, read_only(x), dx, *higher)
    if new is not None:
        if tuple(new.shape) != tuple(x.shape):
            raise ValueError(
                f"{type(rule).__name__}.apply returned a step that makes the parameter's shape "
                f"{tuple(new.shape)} out of {tuple(x.shape)}"
            )
        new = library.restored(new, given)
    return _apart(state, [given, *gs]), new


def opened(value: Any) -> Any:
    """Return a rule with ordinary numbers, as a user's `apply` expects them.

    Rules with a `step` keep the two parts of theirs: they compute with both (see
    `_arrays.traced`).
    """
    return map_state(_opened, value, into=(tuple, list))


def _opened(value: Any) -> Any:
    if type(value) is Number:
        return value.value()
    if isinstance(value, Rule) and type(value).apply is not ElementwiseRule.apply:
        return with_attributes(value, opened)
    return value


def _apart(state: Any, given: list[Array]) -> Any:
    """Return a state that shares no memory with arrays that were `given` to the rule."""
    return map_state(lambda part: library_for(part).apart(part, given), state, into=tuple)


# --- copies and writing ----------------------------------------------------------------------


def fresh(state: Any) -> Any:
    """Return a copy of a state that shares no memory with it."""
    return map_state(_copied, state, into=tuple)


def _copied(part: Any) -> Any:
    """Return a copy of a part; an object that is twice in a list or dict stays one object."""
    library = library_of(part)
    return copy.deepcopy(part) if library is None else library.fresh(part)


def blank(state: Any) -> Any:
    """Return a state of the same form whose arrays are still empty; the rest is copied."""
    return map_state(_blank, state, into=tuple)


def _blank(part: Any) -> Any:
    library = library_of(part)
    return copy.deepcopy(part) if library is None else library.blank(part)


def refuse_masked_state(state: Any, where: Callable[[], str]) -> None:
    """Raise if an array of a state has a mask."""
    for part in parts_of_state(state):
        refuse_masked(part, lambda: f"in the state at {where()}", "its .filled(0) is an array")


def writing(x: Array, new: Array) -> Call:
    """Return the call that writes `new` into an array; one of C, for `at_once`."""
    return library_for(x).write_call(x, new)


def rewritten(old: Any, new: Any) -> tuple[Any, list[tuple[Array, Array]]]:
    """Return the state that takes the place of `old`, and what is to be written into its arrays.

    Its arrays are those of `old`, wherever they can be written and hold what `new` has there; if
    nothing else differs, it is `old` itself.
    """
    writes: list[tuple[Array, Array]] = []
    state = _kept(old, new, writes)
    return state, [(a, _unwritten(b, a, writes)) for a, b in writes]


def _kept(old: Any, new: Any, writes: list[tuple[Array, Array]]) -> Any:
    if old is new:
        return old
    if library_for(old).can_hold(old, new):
        if any(overlap([(0, old), (1, other)]) for other, _ in writes):
            return new  # two parts of one state were one array, which the step has set apart
        writes.append((old, new))
        return old
    before, after = children(old), children(new)
    in_rows = isinstance(old, tuple | list) and isinstance(new, tuple | list)
    fits = len(before) == len(after) if in_rows else before.keys() == after.keys()
    if not after or not fits or not (in_rows or type(old) is type(new)):
        return new
    olds = [*before.values()] if in_rows else [before[key] for key in after]
    parts = [_kept(a, b, writes) for a, b in zip(olds, after.values(), strict=True)]
    if all(map(operator.is_, parts, after.values())):
        return new
    has_items_alone = type(old) in (tuple, list, dict) or hasattr(old, "_fields")
    return old if has_items_alone and all(map(operator.is_, parts, olds)) else rebuild(new, parts)


def _unwritten(values: Array, x: Array, writes: list[tuple[Array, Array]]) -> Array:
    """Return `values`, or a copy where they lie in an array other than `x` that is written."""
    return library_for(values).apart(values, [a for a, _ in writes if a is not x])


def at_once(calls: Iterable[Call]) -> None:
    """Make calls of C functions, all of them whenever Ctrl-C is pressed.

    Python looks for signals between two instructions of its own, and here is one.
    """
    collections.deque(itertools.starmap(operator.call, calls), maxlen=0)


def shown(new: Array, x: Array, other: Array) -> Array:
    """Return `new`, which takes the place of `x`, as what takes that of its other view `other`."""
    return library_for(other).shown_like(other, carry(new, x, other))
