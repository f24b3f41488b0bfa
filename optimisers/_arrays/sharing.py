"""Memory that arrays share: which of them are one, which overlap, and values in another view.

Values laid out like one view are *carried* to another view by way of the order that both share, the
order of addresses.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from . import layout
from .layout import Memory, View
from .library import bare, library_for

Array = Any
Named = TypeVar("Named")
_Pair = tuple[tuple[Named, Array], tuple[Named, Array]]

FEW = 32  # arrays of NumPy that are compared pair by pair
PATIENCE: Any = 10_000  # what NumPy may try out for a pair; its stubs know of 0 and -1 alone

# --- from one view to another ----------------------------------------------------------------


def view_of(x: Array) -> View:
    """Return the view that `x` is."""
    return View.of(x.shape, library_for(x).byte_strides(x))


def seen(values: Array, view: View) -> Array:
    """Return values in the order of addresses as a view shows them; a view where strides allow."""
    return library_for(values).seen(values, view)


def unseen(values: Array, view: View) -> Array:
    """Return values, laid out like a view, with their axes by falling stride."""
    return library_for(values).unseen(values, view)


def carry(values: Array, source: Array | View, target: Array | View) -> Array:
    """Return values laid out like `source` as they appear through its other view `target`.

    A view of `values` where strides allow; see `laid_out` for how to make sure that they do.
    """
    source = source if isinstance(source, View) else view_of(source)
    target = target if isinstance(target, View) else view_of(target)
    return seen(unseen(values, source), target)


def laid_out(values: Array, like: Array) -> Array:
    """Return a copy of `values` whose elements follow each other in memory as those of `like`.

    Values carried from it to any other view of the same elements as `like` are a view of it. For
    arrays of other libraries than NumPy it returns `values` itself.
    """
    if not isinstance(values, np.ndarray):
        return values
    view = view_of(like)
    new: np.ndarray = seen(np.array(unseen(values, view), order="C"), view)
    return new


# --- which arrays are one --------------------------------------------------------------------


def memory(x: Array) -> Memory | None:
    """Return where `x` lies; None if that is nowhere, or not known (JAX, traced arrays)."""
    return library_for(x).memory(x)


def host_span(x: Array) -> tuple[int, int] | None:
    """Return the lowest address of an array and the one behind it, where it lies on the host."""
    span = library_for(x).span(x)
    return None if span is None or "cuda" in span[0] else span[1:]


def spans_meet(one: Array, other: Array) -> bool:
    """Tell whether two arrays may share memory; a tensor of the host may do so with NumPy's."""
    spans = [library_for(x).span(x) for x in (one, other)]
    a, b = (span if span is None or "cuda" in span[0] else ("", *span[1:]) for span in spans)
    return layout.spans_meet(a, b)


def same_elements(a: Array, b: Array) -> bool:
    """Tell whether two arrays are the same, or views of exactly the same elements."""
    if a is b:
        return True
    one, other = memory(a), memory(b)
    if one is None or other is None:
        return False
    elements = one.elements()
    return elements is not None and elements == other.elements()


def overlap(arrays: Sequence[tuple[Named, Array]]) -> tuple[Named, Named] | None:
    """Return the names of two arrays that share memory, whole or in part, if any two do."""
    for crowd in crowds(arrays, range(len(arrays))):
        if found := overlapping([arrays[k] for k in sorted(crowd)]):
            return found[0][0], found[1][0]
    return None


def crowds(arrays: Sequence[tuple[Any, Array]], which: Iterable[int]) -> Iterator[list[int]]:
    """Yield the positions of what lies within overlapping spans, if that is more than one."""
    spans = []
    for k in which:
        x = arrays[k][1]
        if (span := library_for(x).span(x)) is not None:
            spans.append((*span, k))
    return layout.crowds(spans)


def overlapping(arrays: Sequence[tuple[Named, Array]]) -> _Pair[Named] | None:
    """Return two of these arrays, which lie on one device, that share memory, if any two do."""
    if len(arrays) <= FEW and all(isinstance(x, np.ndarray) for _, x in arrays):
        with contextlib.suppress(np.exceptions.TooHardError):
            for one, other in itertools.combinations(arrays, 2):
                if np.shares_memory(bare(one[1]), bare(other[1]), max_work=PATIENCE):
                    return one, other
            return None
    found = layout.overlap([cast(Memory, memory(x)) for _, x in arrays])
    return None if found is None else (arrays[found[0]], arrays[found[1]])


def has_own_memory(x: Array) -> bool:
    """Tell whether an array of NumPy owns its memory; two such arrays never share any."""
    return type(x) is np.ndarray and x.base is None and x.flags.owndata
