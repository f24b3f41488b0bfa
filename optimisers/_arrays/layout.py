"""Layouts: how the elements of an array lie in memory, and which arrays share some of them.

Shapes, strides and addresses are all that this file knows, of arrays of any library. It is the only
file that compares strides and addresses.

a) A `View` is the part of an array's layout that is needed to carry values, without the array;
b) a `Memory` says where the elements of an array lie;
c) whether two arrays overlap only in part is decided exactly, by marking the cells of memory that
   they touch, and only among arrays whose spans overlap at all (`crowds`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Span = tuple[str, int, int]
"""A device, the lowest address of an array there, and the one behind its last element."""


class View(NamedTuple):
    """How an array shows its elements.

    `sharing.seen` and `sharing.unseen` go from the order of addresses to a view, and back, by the
    functions of each library.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The axes by falling stride."""
    flips: tuple[int, ...]
    """The axes that run against the addresses."""

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int]) -> View:
        """Return the view that an array of this layout is."""
        order = sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))
        flips = [axis for axis, stride in enumerate(strides) if stride < 0]
        return cls(tuple(shape), tuple(order), tuple(flips))

    def is_ordered(self) -> bool:
        """Tell whether the axes come by falling stride as they are."""
        return self.order == tuple(range(len(self.order)))

    def is_c_order(self) -> bool:
        """Tell whether this is the view of a C-contiguous array."""
        return not self.flips and self.is_ordered()

    def back(self) -> list[int]:
        """Return the order of axes that undoes `order`."""
        return sorted(range(len(self.shape)), key=self.order.__getitem__)


class Memory(NamedTuple):
    """Where the elements of an array lie; addresses and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    meaning: Any
    """The dtype, or another object for it: arrays are tied only if this is the same."""
    device: str = ""

    def axes(self) -> list[tuple[int, int]]:
        """Return length and absolute stride of each axis longer than 1, by falling stride."""
        axes = [(n, abs(s)) for n, s in zip(self.shape, self.strides, strict=True) if n > 1]
        return sorted(axes, key=lambda axis: -axis[1])

    def low(self) -> int:
        """Return the lowest address."""
        below = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True) if s < 0]
        return self.address + sum(below)

    def high(self) -> int:
        """Return the address behind the last element."""
        return self.low() + sum((n - 1) * s for n, s in self.axes()) + self.itemsize

    def span(self) -> Span:
        """Return its device, its lowest address and the one behind its last element."""
        return self.device, self.low(), self.high()

    def elements(self) -> tuple[Any, ...] | None:
        """Return a tuple that is equal for exactly those arrays that show the same elements.

        It has the device, the lowest address, and the axes, of which those that continue one
        another are joined. None for an array that shows an element twice.
        """
        merged: list[tuple[int, int]] = []
        axes = self.axes()
        for length, stride in axes:
            if merged and merged[-1][1] == length * stride:
                merged[-1] = merged[-1][0] * length, stride
            else:
                merged.append((length, stride))
        reach = self.itemsize
        for length, stride in reversed(axes):
            if stride < reach:
                return None
            reach += (length - 1) * stride
        return self.device, self.low(), self.itemsize, self.meaning, *merged


# --- one array -------------------------------------------------------------------------------


def c_strides(shape: Sequence[int], itemsize: int = 1) -> tuple[int, ...]:
    """Return the strides of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def overlaps_itself(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether two elements may share memory: each stride must pass all that lies below it."""
    if 0 in shape:
        return False
    reach = itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


@functools.lru_cache(maxsize=4096)
def dense_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the axes longer than 1 by falling stride; None where the elements leave gaps.

    Strides are in elements. Arrays of one shape whose answers are alike have their elements in the
    same order.
    """
    if 0 in shape:
        return ()
    found = sorted((k for k, n in enumerate(shape) if n > 1), key=lambda k: -strides[k])
    reach = 1
    for k in reversed(found):
        if strides[k] != reach:
            return None
        reach *= shape[k]
    return tuple(found)


def packed_strides(
    shape: tuple[int, ...], order: Sequence[int], itemsize: int
) -> tuple[int, ...] | None:
    """Return strides, in bytes, without gaps and in this order of axes; None for C order."""
    if list(order) == sorted(order):
        return None
    strides, reach = [itemsize] * len(shape), itemsize
    for k in reversed(order):
        strides[k] = reach
        reach *= shape[k]
    return tuple(strides)


# --- several arrays --------------------------------------------------------------------------


def spans_meet(one: Span | None, other: Span | None) -> bool:
    """Tell whether two spans of memory, where there are any, have an address in common."""
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] < other[2] and other[1] < one[2]


def crowds(spans: Iterable[tuple[str, int, int, int]]) -> Iterator[list[int]]:
    """Yield lists of two or more numbers whose spans overlap.

    Each span is given with its number at the end.
    """
    crowd: list[int] = []
    where, end = "", 0
    for device, low, high, k in sorted(spans):
        if low >= end or device != where:
            if len(crowd) > 1:
                yield crowd
            crowd, where, end = [], device, high
        crowd.append(k)
        end = max(end, high)
    if len(crowd) > 1:
        yield crowd


def overlap(memories: Sequence[Memory]) -> tuple[int, int] | None:
    """Return the positions of two of these arrays, of one device, that share an address."""
    low = min(memory.low() for memory in memories)
    # A cell is the largest unit of which all offsets, strides and items are multiples.
    cell = math.gcd(
        *(number for m in memories for number in (m.low() - low, m.itemsize)),
        *(stride for m in memories for _, stride in m.axes()),
    )
    touched: Sequence[np.ndarray] = [_cells(memory, low, cell) for memory in memories]
    count = max(int(cells.max()) for cells in touched) + 1
    if count > 2**24 + 16 * sum(cells.size for cells in touched):  # far apart: number them anew
        found, numbers = np.unique(np.concatenate(touched), return_inverse=True)
        touched = np.split(numbers, np.cumsum([cells.size for cells in touched])[:-1])
        count = found.size
    holder = np.full(count, -1, np.int32)
    for k, cells in enumerate(touched):
        holding = int(holder[cells].max())
        if holding >= 0:
            return holding, k
        holder[cells] = k
    return None


def _cells(memory: Memory, low: int, cell: int) -> np.ndarray:
    """Return the numbers of the cells that an array touches, counted from address `low`."""
    cells = np.array([(memory.low() - low) // cell])
    for length, stride in (*memory.axes(), (memory.itemsize // cell, cell)):
        if stride:
            cells = np.add.outer(cells, np.arange(length) * (stride // cell)).ravel()
    return cells
