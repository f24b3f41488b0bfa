"""Ties: one parameter at several places of a model.

Two places are tied if they hold the same array object, or NumPy arrays that are views of exactly
the same elements, such as ``w`` and ``w.T``. Values that belong to one such view are *carried* to
another by way of the one order that both share: that of the addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._tree import KeyPath

Array = Any


def _address_order(like: np.ndarray) -> tuple[tuple[slice, ...], list[int]]:
    """Return which axes to reverse, and then how to sort them, to walk `like` by address."""
    backwards, forwards = slice(None, None, -1), slice(None)
    flips = tuple(backwards if stride < 0 else forwards for stride in like.strides)
    order = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
    return flips, order


def carry(values: Array, source: np.ndarray, target: np.ndarray) -> Array:
    """Return values laid out like `source` as they appear through its other view `target`.

    A view of `values` where strides allow.
    """
    flips, order = _address_order(source)
    flat = values[flips].transpose(order).reshape(-1)
    flips, order = _address_order(target)
    back = sorted(range(target.ndim), key=order.__getitem__)
    return flat.reshape([target.shape[axis] for axis in order]).transpose(back)[flips]


def _layout(x: np.ndarray) -> tuple[Any, ...] | None:
    """Return what two views of the same elements have in common; None for overlapping elements.

    The lowest address, and the (length, stride) of each axis by falling stride, where axes that
    continue one another count as one.
    """
    flips, order = _address_order(x)
    plain = x[flips].transpose(order)
    axes: list[tuple[int, int]] = []
    for length, stride in zip(plain.shape, plain.strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = axes[-1][0] * length, stride
        else:
            axes.append((length, stride))
    reach = x.itemsize
    for length, stride in reversed(axes):
        if stride < reach:
            return None
        reach = length * stride
    return plain.__array_interface__["data"][0], x.dtype, *axes


def same_elements(a: Array, b: Array) -> bool:
    """Tell whether two arrays are the same, or views of exactly the same elements."""
    if a is b:
        return True
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.size == 0:
        return False
    layout = _layout(a)
    return layout is not None and layout == _layout(b)


def owners(arrays: Sequence[tuple[KeyPath, Array]]) -> list[int]:
    """Return for each array the position of the first that it is tied to; often its own.

    Raises
    ------
    ValueError
        If two arrays share some elements but are not views of exactly the same.
    """
    first: dict[int, int] = {}
    owner = [first.setdefault(id(x), k) for k, (_, x) in enumerate(arrays)]
    distinct = [k for k in first.values() if isinstance(arrays[k][1], np.ndarray)]
    spans = sorted((*np.lib.array_utils.byte_bounds(arrays[k][1]), k) for k in distinct)
    open_spans: list[tuple[int, int]] = []
    for low, high, k in spans:
        x = arrays[k][1]
        if x.size == 0:
            continue
        open_spans = [(end, other) for end, other in open_spans if end > low]
        for _, other in open_spans:
            if same_elements(x, arrays[other][1]):
                owner[k], owner[other] = [min(owner[k], owner[other])] * 2
            elif _overlap(x, arrays[other][1]):
                raise ValueError(_overlap_text(arrays[min(k, other)], arrays[max(k, other)]))
        open_spans.append((high, k))
    return [_root(owner, k) for k in range(len(owner))]


def _root(owner: list[int], k: int) -> int:
    while owner[k] != k:
        k = owner[k]
    return k


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))
    except np.exceptions.TooHardError:
        return True


def _overlap_text(a: tuple[KeyPath, Array], b: tuple[KeyPath, Array]) -> str:
    return (
        f"the arrays at {a[0]} and {b[0]} overlap in memory without being views of exactly the "
        f"same elements: shapes {a[1].shape} and {b[1].shape}; copy one of them"
    )
