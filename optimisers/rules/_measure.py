"""Numbers measured over many elements: how they are reduced, and what they share over the tree.

A rule that measures has, beside its `step`, a `measure`: formulas element by element, whose values
are reduced over the array, over axes of it, or over the tree (`ElementwiseRule.over`). Each is
summed, unless it stands in `words.largest` or `words.norm`.

Over the tree, no array can be stepped before all are measured. The array path therefore *begins*
the step of every array, and stops where a number of the tree is needed (`Unmeasured`). When each
array has been so far, the numbers are combined and the steps are begun again: nothing was written,
and now they find the number. This goes through all rules of rules, chains and users' own, since
none of them has to know of it. `Pass` is the memory of one update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._arrays.library import (
    bare,
    for_sums,
    is_abstract,
    is_traced,
    library_for,
    library_of,
    namespace,
)
from .._arrays.traced import holds_traced
from .._messages.text import short
from ..words import Reduced, absolute, is_complex, where
from ._coefs import told_coefs
from ._program import told_numbers

if TYPE_CHECKING:
    from ._base import ElementwiseRule

Array = Any
Axes = tuple[int, ...] | None
Key = tuple[type, int]
"""A rule of the tree: its class, and the how manieth of that class it is in a leaf."""

# --- over one array --------------------------------------------------------------------------


def reduced(term: Any, order: float, axes: Axes = None) -> tuple[str, Array]:
    """Return how a term of a measure is reduced, and to which number.

    Over axes, the number is an array that broadcasts against the parameter.
    """
    kind, values = term if isinstance(term, Reduced) else ("sum", term)
    if kind == "norm":
        return kind, norm(values, order, axes)
    xp, values = namespace(values), for_sums(values)
    over: dict[str, Any] = {} if axes is None else {"axis": axes, "keepdims": True}
    if kind == "largest" and math.prod(values.shape):
        return kind, xp.max(values, **over)
    return kind, xp.sum(values, **over)


def norm(x: Array, p: float, axes: Axes = None) -> Any:
    """Return the p-norm of all elements of `x`, at least in double for NumPy arrays.

    Numbers are divided by the largest before they are raised to a power (by the smallest, if `p`
    is negative), so that no norm of representable size overflows or underflows on the way.
    """
    over: dict[str, Any] = {} if axes is None else {"axis": axes, "keepdims": True}
    xp = namespace(x)
    if math.prod(x.shape) == 0:
        return xp.sum(absolute(x), **over) if over else 0.0
    x = for_sums(x)
    size = absolute(x)
    if p == 0:
        return xp.sum(xp.astype(size != 0, size.dtype), **over) if over else _nonzero(x, size)
    extreme = xp.max(size, **over) if p > 0 else xp.min(size, **over)
    if math.isinf(p):
        return extreme
    scales = (extreme > 0) & xp.isfinite(extreme)  # else the norm is the extreme: 0, inf or nan
    unit = xp.where(scales, extreme, xp.ones_like(extreme))
    part = size / unit
    some = part > 0  # a power of 0 may have no derivative
    powers = xp.where(some, xp.where(some, part, 1.0) ** p, 0.0)
    total = xp.where(scales, xp.sum(powers, **over), 1.0)
    if abs(p) >= 1:
        found = unit * total ** (1 / p)
    else:  # by halves: for tiny p the whole root alone would overflow
        found = unit * total ** (0.5 / p) * total ** (0.5 / p)
    return xp.where(scales, found, extreme)


def _nonzero(x: Array, size: Array) -> Any:
    return library_for(x).count_nonzero(size)


def known(value: Any) -> Any:
    """Return a measured number as a float, unless it is traced, or waits on a device."""
    if isinstance(value, np.longdouble | np.complexfloating):  # not to be rounded
        return value
    if isinstance(value, int | float | np.generic):
        return float(value)
    return library_for(value).measured(value)


def first_kept(rule: ElementwiseRule, x: Array) -> Array:
    """Return the vector of the numbers that a rule keeps, as they begin.

    Over the tree it ends with a count of its changes, and all leaves begin with one vector.
    """
    if rule.over != "tree":
        return library_for(x).vector_like(x, rule.keep())
    values, whole = (*rule.keep(), 0.0), current()
    if whole is None:
        return library_for(x).vector_like(x, values)
    return whole.first(whole.key(rule), x, values)


def measured(
    rule: ElementwiseRule, x: Array, dx: Array, slots: tuple[Array, ...], state: Any, t: Any
) -> tuple[tuple[Any, ...] | None, Array | None]:
    """Return the coefs of a rule that measures or asks for a value, and what it keeps from now on.

    The coefs are None where the rule hands the gradient on as it is.
    """
    whole, is_tree = current(), rule.over == "tree"
    key = whole.key(rule) if whole is not None and is_tree and rule.measure is not None else None
    vector = state.kept if rule.kept else None
    if vector is not None and whole is not None and key is not None:
        vector = whole.shared(key, vector)
    items = () if vector is None else library_for(vector).items(vector)
    told: dict[str, Any] = {
        "t": items[-1] + 1 if items and is_tree else t,
        "kept": items[: len(rule.kept)],
        "value": _value(rule, whole),
        "size": math.prod(x.shape),
        "sums": (),
    }
    if rule.measure is not None:
        axes = None
        if rule.over == "axes":
            axes = rule.axes(x.ndim)
            if axes is None:
                return None, vector
            told["size"] = math.prod(x.shape[axis] for axis in axes)
        before, _ = told_coefs(rule, x, "measure_coefs", told)
        terms = [reduced(term, rule.order, axes) for term in rule.measure(x, dx, slots, before)]
        sums = tuple(number if axes is not None else known(number) for _, number in terms)
        if axes is None and not all(
            type(number) is float and math.isfinite(number) for number in sums
        ):
            rule.accept(sums)
        if whole is not None and key is not None:
            sums = whole.total(key, rule, tuple(kind for kind, _ in terms), sums)
        told["sums"] = sums
    coefs, kept = told_coefs(rule, x, "coefs", told)
    if vector is None:
        return coefs, None

    def make() -> Array:
        counted = (vector[-1] + 1,) if is_tree else ()
        return library_for(vector).stacked((*kept, *counted), vector)

    if whole is None or key is None:
        return coefs, make()
    return coefs, whole.renewed(key, vector, make)


def _value(rule: ElementwiseRule, whole: Pass | None) -> Any:
    """Return the value of the loss for a rule that asks for it."""
    if not needs_value(type(rule)):
        return None
    if whole is None or whole.value is None:
        raise TypeError(
            f"{rule._shown_as} needs the value of the loss; hand it over: "
            "update(state, model, gradient, value=loss), and so to update_"
        )
    return _number(whole.value)


def needs_value(cls: type[ElementwiseRule]) -> bool:
    """Tell whether a class of rules asks for the value of the loss."""
    return any("value" in asked for asked in cls.asks.values())


def after_measure(
    rule: ElementwiseRule, row: tuple[float, ...], t: int, size: int, whole: Pass | None = None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the coefs that a rule makes of what compiled code has measured, and what it keeps."""
    told = {"t": t, "sums": row, "kept": (), "size": size, "value": _value(rule, whole)}
    return told_numbers(rule, "coefs", told)


def ratio(a: Any, b: Any) -> Any:
    """Return ``a / b``, or 1 where one of them is 0."""
    has_both = (a > 0) & (b > 0)
    return where(has_both, a / where(has_both, b, 1.0), 1.0)


# --- over the tree ---------------------------------------------------------------------------


def combined(kinds: Sequence[str], rows: Sequence[Sequence[Any]], order: float) -> tuple[Any, ...]:
    """Return the numbers of the tree for those of its arrays, a row for each, in their order.

    All sums over the tree go through here, and so would those over several machines.
    """
    return tuple(_joined(kind, [row[k] for row in rows], order) for k, kind in enumerate(kinds))


def _joined(kind: str, values: list[Any], order: float) -> Any:
    if len(values) == 1:
        return values[0]
    if all(type(v) is float for v in values):
        together = np.array(values)
    else:
        first = next(v for v in values if type(v) is not float)
        together = library_for(first).stacked(values, first)
    if kind == "norm" and order != 0:
        return known(norm(together, order))
    return known(reduced(Reduced("largest", together) if kind == "largest" else together, order)[1])


class Unmeasured(BaseException):
    """Raised where a step needs a number of the tree that is not known yet; never seen outside."""


class Found(NamedTuple):
    """What is known of a rule of the tree."""

    sums: tuple[Any, ...]
    rule: ElementwiseRule


class Pass:
    """What the rules of one update know together: numbers of the tree, and what the caller told.

    Parameters
    ----------
    states : callable
        Returns the states of all leaves that the update sees, also of those that it does not step.
        It is asked once, when a rule meets numbers that the tree keeps.
    value : optional
        The value of the loss, if the caller gave it.
    path_of : callable
        Gives the path of an index, for messages.
    """

    def __init__(
        self,
        states: Callable[[], Iterable[Any]] = tuple,
        value: Any = None,
        path_of: Callable[[int], str] = str,
    ) -> None:
        self.states: Callable[[], Iterable[Any]] | None = states
        self.value, self.path_of = value, path_of
        self.made: Any = None
        """Whether the step at hand is made, where only JAX will know that."""
        self._found: dict[Key, Found] = {}
        self._rows: dict[Key, dict[int, tuple[Any, ...]]] = {}
        self._kinds: dict[Key, tuple[str, ...]] = {}
        self._rules: dict[Key, tuple[int, ElementwiseRule]] = {}
        self._versions: dict[Key, list[Array]] = {}
        self._old: dict[tuple[Key, Any], Array] = {}
        self._new: dict[tuple[Key, Any], Array] = {}
        self._at = 0
        self._met: dict[type, int] = {}

    def _note_shared(self, state: Any) -> None:
        """Note the numbers of the tree that a leaf has."""
        ranks: dict[type, int] = {}
        for cls, shared in shared_in(state):
            key = cls, ranks.setdefault(cls, 0)
            ranks[cls] += 1
            versions = self._versions.setdefault(key, [])
            if not any(shared is other for other in versions[-1:]):
                versions.append(shared)

    # --- one leaf after the other ------------------------------------------------------------

    def begin(self, k: int) -> None:
        """Begin, perhaps again, with the leaf of this index."""
        self._at, self._met, self.made = k, {}, None

    def key(self, rule: ElementwiseRule) -> Key:
        """Return the key of the next rule of this class in the leaf at hand."""
        cls = type(rule)
        rank = self._met.get(cls, 0)
        self._met[cls] = rank + 1
        return cls, rank

    def first(self, key: Key, x: Array, values: Sequence[float]) -> Array:
        """Return the vector with which the tree begins, one for all leaves of a library."""
        place = key, library_of(x)
        if place not in self._old:
            self._old[place] = library_for(x).vector_like(x, values)
        return self._old[place]

    def shared(self, key: Key, own: Array) -> Array:
        """Return the numbers of the tree, of which a leaf has its `own` version.

        Of several versions that with the largest count, which stands last in each, holds for all.
        """
        if self.states is not None:
            states, self.states = self.states(), None
            for state in states:
                self._note_shared(state)
        place = key, library_of(own)
        if place not in self._old:
            versions = [v for v in self._versions.get(key, []) if library_of(v) is place[1]]
            self._old[place] = latest(versions or [own])
        return self._old[place]

    def total(
        self, key: Key, rule: ElementwiseRule, kinds: tuple[str, ...], row: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Return the sums of the tree, to which the leaf at hand adds a row.

        Raises
        ------
        Unmeasured
            If not all leaves have been here yet.
        """
        if key in self._found:
            return self._found[key].sums
        self._refuse_unlike(key, rule)
        if self.made is not None:
            row = tuple(where(self.made, number, number * 0) for number in row)
        self._rows.setdefault(key, {})[self._at] = row
        self._kinds[key] = kinds
        raise Unmeasured

    def add(
        self,
        rule: ElementwiseRule,
        rank: int,
        kinds: tuple[str, ...],
        places: Sequence[int],
        rows: Sequence[tuple[float, ...]],
    ) -> None:
        """Add what compiled code has measured of the leaves of some indices."""
        key = type(rule), rank
        self._at = places[0]
        self._refuse_unlike(key, rule)
        self._rows.setdefault(key, {}).update(zip(places, rows, strict=True))
        self._kinds[key] = kinds

    def found(self, rule: ElementwiseRule, rank: int) -> tuple[Any, ...] | None:
        """Return the sums of the tree for a rule, if they are known yet."""
        found = self._found.get((type(rule), rank))
        return found and found.sums

    def renewed(self, key: Key, old: Array, make: Callable[[], Array]) -> Array:
        """Return the new numbers of the tree, made once for all leaves of a library."""
        place = key, library_of(old)
        if place not in self._new:
            self._new[place] = make()
        return self._new[place]

    def _refuse_unlike(self, key: Key, rule: ElementwiseRule) -> None:
        """Raise if two leaves differ in what all leaves of a tree must have in common."""
        first, other = self._rules.setdefault(key, (self._at, rule))
        for name in () if other is rule else rule.common:
            a, b = getattr(other, name), getattr(rule, name)
            if not (holds_traced(a) or holds_traced(b)) and a != b:
                (k, a), (other_k, b) = sorted([(first, a), (self._at, b)])
                raise TypeError(
                    f"{rule._shown_as} measures the whole tree with one {name}, got {a} at "
                    f"{self.path_of(k)} and {b} at {self.path_of(other_k)}; adjust one of them"
                )

    # --- one measure after the other -----------------------------------------------------------

    def combine(self, waiting: Callable[[], dict[int, list[type]]]) -> None:
        """Combine the numbers for which leaves wait, of each measure that has seen all its leaves.

        Parameters
        ----------
        waiting : callable
            Returns, for each index of a leaf that waits, the classes of its rules of the tree, in
            order. It is asked if leaves wait for more than one measure.
        """
        for key in self._rows if len(self._rows) == 1 else self._ready(waiting()):
            rule, rows = self._rules[key][1], self._rows[key]
            sums = combined(self._kinds[key], [rows[k] for k in sorted(rows)], rule.order)
            self._found[key] = Found(sums, rule)
        self._rows = {key: rows for key, rows in self._rows.items() if key not in self._found}

    def _ready(self, waiting: dict[int, list[type]]) -> list[Key]:
        """Return for which measures no leaf is still to come.

        Raises
        ------
        TypeError
            If there is none, since two stand in another order in two leaves.
        """
        at = {k: key for key, rows in self._rows.items() for k in rows if k in waiting}
        ready = [
            key
            for key in dict.fromkeys(at.values())
            if not any(
                other != key and _is_ahead(key, other, waiting[k]) for k, other in at.items()
            )
        ]
        if not ready:
            (one, first), *others = at.items()
            two, second = next((k, key) for k, key in others if key != first)
            raise TypeError(
                f"{first[0].__name__} stands ahead of {second[0].__name__} at {self.path_of(one)}, "
                f"and behind it at {self.path_of(two)}: both measure the whole tree, so neither "
                "can be first; give all parameters the same order"
            )
        return ready


def _is_ahead(key: Key, other: Key, classes: Sequence[type]) -> bool:
    """Tell whether a leaf that waits at `other` comes to `key` later."""
    keys: list[Key] = []
    for cls in classes:
        keys.append((cls, sum(other_cls is cls for other_cls, _ in keys)))
    return key in keys and keys.index(key) > keys.index(other)


def _number(value: Any) -> Any:
    """Return the value of a loss as a number, or as it is where it is traced."""
    is_number = isinstance(value, int | float | np.generic) or library_of(value) is not None
    has_dtype = hasattr(value, "dtype")
    if not is_number or np.ndim(value) or (has_dtype and is_complex(value)):
        raise TypeError(
            f"value must be the loss, one real number or a 0-d array of one; got {short(value)}"
        )
    return known(value if is_traced(value) else bare(value))


def latest(versions: list[Array]) -> Array:
    """Return the version with the largest count; of equal ones the first."""
    if all(v is versions[0] for v in versions):
        return versions[0]
    if any(map(is_abstract, versions)):
        xp = namespace(next(v for v in versions if is_abstract(v)))
        rows = xp.stack(versions)
        return rows[xp.argmax(rows[:, -1])]
    return max(versions, key=lambda v: float(v[-1]))


def shared_in(state: Any) -> Iterator[tuple[type, Array]]:
    """Yield the vectors of the tree in a state, each with the class of its rule, in order."""
    cls: type | None = getattr(type(state), "shared_by", None)
    if cls is not None:
        yield cls, state.kept
    if cls is not None or not isinstance(state, tuple | list | dict):
        return
    for part in state.values() if isinstance(state, dict) else state:
        yield from shared_in(part)


def measures(rule: Any) -> list[type]:
    """Return the classes of the rules in a rule that measure the tree, from the outside inwards."""
    found: list[type] = []
    if getattr(rule, "over", None) == "tree" and rule.measure is not None:
        found.append(type(rule))
    for value in vars(rule).values():
        for part in value if isinstance(value, tuple) else (value,):
            if hasattr(type(part), "apply"):
                found += measures(part)
    return found


_current: ContextVar[Pass | None] = ContextVar("optimisers_pass", default=None)


def current() -> Pass | None:
    """Return the pass of the update that is under way in this thread, if it has one."""
    return _current.get()


@contextmanager
def passing(whole: Pass | None) -> Iterator[None]:
    """Make a pass the current one meanwhile."""
    token = _current.set(whole)
    try:
        yield
    finally:
        _current.reset(token)


def one_round(whole: Pass, ks: Sequence[int], evaluate: Callable[[int], None]) -> list[int]:
    """Evaluate leaves; return those that wait for a number of the tree.

    These have been stopped, and are to be evaluated again when `whole` has combined more.
    """
    waiting = []
    with passing(whole):
        for k in ks:
            whole.begin(k)
            try:
                evaluate(k)
            except Unmeasured:
                waiting.append(k)
    return waiting


@contextmanager
def only_if(made: Any) -> Iterator[None]:
    """Count what rules measure meanwhile only where their step is made; None if it is for sure."""
    whole = current()
    if made is None or whole is None:
        yield
        return
    before, whole.made = whole.made, made
    try:
        yield
    finally:
        whole.made = before
