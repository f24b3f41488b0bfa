"""Arrays of a step: wider numbers and the way back, counts, new arrays like given ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arrays.dtypes import dtype_name, is_narrow, largest
from .._arrays.library import (
    as_like,
    for_step,
    is_traced,
    isnumeric,
    library_for,
    library_of,
    namespace,
    widened,
)
from .._arrays.states import map_state
from .._arrays.traced import inverse_root, root
from ..words import ema_weight, maximum, minimum

if TYPE_CHECKING:
    from ._base import Rule

__all__ = [
    "applied",
    "as_count",
    "as_like",
    "cast_like",
    "count_like",
    "counted",
    "for_step",
    "full_like",
    "is_traced",
    "kept_as",
    "largest_count",
    "moved",
    "read_only",
    "root",
    "widened",
]


def moved(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.move(state, x, *gs)`` does, computed in float32 if `x` is narrower.

    Then each result is rounded once: the parameter, and what the rule keeps in such arrays. On the
    way nothing is, from the gradient through a whole chain to the subtraction.
    """
    if not (rule._widens and is_narrow(x)):
        return rule.move(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, new = rule.move(map_state(widened, state, whole="is_wide"), *wide)
    return map_state(_narrowed, state, made, whole="is_wide"), None if new is None else as_like(
        x, new
    )


def applied(rule: Rule, state: Any, x: Any, *gs: Any) -> tuple[Any, Any]:
    """Return what ``rule.apply(state, x, *gs)`` does, as `moved`; the step stays in float32."""
    if not (rule._widens and is_narrow(x)):
        return rule.apply(state, x, *gs)
    wide = (read_only(widened(a)) for a in (x, *gs))
    made, dx = rule.apply(map_state(widened, state, whole="is_wide"), *wide)
    return map_state(_narrowed, state, made, whole="is_wide"), dx


def _narrowed(old: Any, new: Any) -> Any:
    if not (hasattr(old, "dtype") and hasattr(new, "dtype") and is_narrow(old)):
        return new
    # NumPy makes scalars of what is calculated with 0-d arrays.
    return kept_as(old, new) if isinstance(new, np.inexact) or isnumeric(new) else new


def kept_as(old: Any, new: Any) -> Any:
    """Return `new` in the dtype of `old`, the slot whose place it takes; narrow numbers move on.

    They are rounded to nearest, with two exceptions. A change is not lost: where the nearest number
    is the old one, a change of more than a sixteenth of a unit counts twice, four or eight times,
    so that it comes to one unit. An average would else stand still far from what it averages: in
    bfloat16 that of ones, with a decay rate of 0.99, at 0.8. And what is finite stays so: a square
    beyond float16 would else make infinite for ever what divides.
    """
    if not is_narrow(old) or is_narrow(new) or tuple(old.shape) != tuple(new.shape):
        return as_like(old, new)
    most = largest(old.dtype)
    before = widened(old)

    def bounded(value: Any) -> Any:
        return minimum(maximum(value, -most), most)

    found = as_like(old, namespace(new).where(namespace(new).isfinite(new), bounded(new), new))
    is_lost = (widened(found) == before) & (new != before)
    for factor in LOST:
        tried = as_like(old, bounded(before + factor * (new - before)))
        is_same = widened(tried) == before
        found = as_like(old, namespace(tried).where(is_lost & ~is_same, tried, found))
        is_lost = is_lost & is_same
    return found


LOST = 2.0, 4.0, 8.0
"""How often a change counts, one after the other, that rounding would lose."""


def read_only(x: Any) -> Any:
    """Return `x`, or a view of it where NumPy would let a rule write into it."""
    return library_for(x).read_only(x)


def full_like(x: Any, value: float) -> Any:
    """Return an array of the shape, dtype and device of `x`, in native byte order."""
    if dtype_name(x.dtype) == "float8_e8m0fnu":
        raise TypeError(
            "float8_e8m0fnu has no zero, from which what a rule keeps could start; "
            "MixedPrecision(rule) keeps it in float32"
        )
    return library_for(x).full_like(x, value)


def count_like(x: Any) -> Any:
    """Return a 0-d count of zero, made by the library of `x`; on the host for one on a GPU."""
    return library_for(x).count_like(x)


def as_count(t: Any, x: Any) -> Any:
    """Return a count of the library of `x`, where it is a plain number, as a file may have it."""
    library, own = library_of(t), library_for(x)
    is_foreign = library not in (None, own) and not own.mixes_with_numpy
    if not is_foreign and not isinstance(t, int | float | np.number):
        return t
    zero = count_like(x)
    return as_like(zero, zero + min(int(t), largest_count(zero)))


def largest_count(t: Any) -> int:
    """Return the largest number that a count like `t` can be."""
    return int(namespace(t).iinfo(t.dtype).max)


def counted(t: Any) -> Any:
    """Return a count that is one higher, or the same if it is the largest that its dtype holds.

    Counts of JAX arrays are of 32 bits unless it is set to 64. The formulas do not change any more
    where a count stops; one that went over to negative numbers would stop the parameter.
    """
    return library_for(t).counted(t, largest_count(t))


def ema_scale(beta: Any, t: Any) -> Any:
    """Return one over the square root of ``ema_weight(beta, t)``, in one call for plain numbers."""
    if type(beta) is float and type(t) is int:
        return (1.0 - beta**t) ** -0.5
    return inverse_root(ema_weight(beta, t))


def cast_like(x: Any, numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Cast numbers once to the real dtype of `x`, which computes with them."""
    return library_for(x).numbers(x, tuple(numbers))
