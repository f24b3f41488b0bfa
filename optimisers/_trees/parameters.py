"""Ties: one parameter at several places of a model.

Two places are tied if they hold the same array object, or views of exactly the same elements of
memory, such as ``w`` and ``w.T`` (NumPy, PyTorch, CuPy). Arrays of JAX tie nothing: they are
immutable, so that one at two places says no more than that both have the same values.
Values that belong to one view are *carried* to another by way of the one order that both share:
that of the addresses.

a) `parameters` finds every trainable array of a model, and `owners` which of them are one;
b) a `View` is what of a strided array's layout is needed to carry values, without the array;
c) whether two arrays overlap only in part is decided exactly, and only among arrays whose spans of
   memory overlap at all: by NumPy where they are few, else by marking the cells they touch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np

from .._arrays import devices
from .._arrays.library import is_immutable, isnumeric, plain, refuse_masked_parameter
from .nodes import trainable_keys
from .paths import KeyPath
from .untrained import refuse_ours, seems_to_train
from .walks import fold

Array = Any
Tree = Any
Place = tuple[KeyPath, Array]
Named = TypeVar("Named")
_Pair = tuple[tuple[Named, Array], tuple[Named, Array]]

FEW = 32  # arrays of NumPy that are compared pair by pair
PATIENCE: Any = 10_000  # what NumPy may try out for a pair; its stubs know of 0 and -1 alone

# --- the parameters of a model ---------------------------------------------------------------


@overload
def trainables(model: Tree, path: Literal[False] = False) -> list[Array]: ...
@overload
def trainables(model: Tree, path: Literal[True]) -> list[Place]: ...
@overload
def trainables(model: Tree, path: bool) -> list[Any]: ...
def trainables(model: Tree, path: bool = False) -> list[Any]:
    """Return the trainable arrays of a model, each once, in the order of its flat vector.

    Parameters
    ----------
    model : tree
        The model.
    path : bool
        Whether to give the place of each array too.

    Returns
    -------
    list of array, or of (KeyPath, array)
        The arrays themselves, not copies. Of a parameter that is at several places, the array at
        the first. An array of JAX at several places is a parameter at each.

    Raises
    ------
    ValueError
        If arrays overlap in memory only in part, or if the model contains itself.

    See Also
    --------
    destructure : copies them into one vector.

    Examples
    --------
    >>> import numpy as np
    >>> from optimisers import trainables
    >>> w = np.ones((2, 3))
    >>> model = {"encoder": w, "bias": np.zeros(2), "decoder": w.T, "name": "tied", "step": 7}
    >>> [x.shape for x in trainables(model)]
    [(2, 3), (2,)]
    >>> [str(path) for path, x in trainables(model, path=True)]
    ["['encoder']", "['bias']"]
    >>> sum(x.size for x in trainables(model))
    8
    """
    places, owner = parameters(model)
    if not places:
        refuse_ours(model)
    found = [place for k, place in enumerate(places) if owner[k] == k]
    return found if path else [x for _, x in found]


def parameters(model: Tree, unknown: list[Place] | None = None) -> tuple[list[Place], list[int]]:
    """Return every place of a trainable array, and for each the first that it is tied to.

    To `unknown` are added the places of what is no parameter, but seems to be one.
    """
    places: list[Place] = []

    def leaf(path: KeyPath, x: Any) -> None:
        if isnumeric(x):
            refuse_masked_parameter(x, lambda: path)
            places.append((path, x))
        elif unknown is not None and seems_to_train(x):
            unknown.append((path, x))

    fold(model, leaf, lambda path, x, results: None, keys=trainable_keys)
    return places, owners(places)


# --- from one view to another ----------------------------------------------------------------


class View(NamedTuple):
    """How an array sees its elements: `seen` and `unseen` go to and from the order of addresses."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The axes by falling stride."""
    flips: tuple[int, ...]
    """The axes that run against the addresses."""

    @classmethod
    def of(cls, x: Array) -> View:
        """Return the view that `x` is."""
        strides = _strides(x)
        order = sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))
        flips = [axis for axis, stride in enumerate(strides) if stride < 0]
        return cls(tuple(x.shape), tuple(order), tuple(flips))

    def unseen(self, values: Array) -> Array:
        """Return values, laid out like this view, with their axes by falling stride."""
        return _transposed(_flipped(values, self.flips), self.order)

    def seen(self, values: Array) -> Array:
        """Return values in the order of addresses as this view shows them.

        A view of `values` where strides allow, which they do if `values` is C-contiguous.
        """
        axes = _reshaped(values, tuple(self.shape[axis] for axis in self.order))
        back = sorted(range(len(self.shape)), key=self.order.__getitem__)
        return _flipped(_transposed(axes, back), self.flips)


def carry(values: Array, source: Array | View, target: Array | View) -> Array:
    """Return values laid out like `source` as they appear through its other view `target`.

    A view of `values` where strides allow; see `laid_out` for how to make sure that they do.
    """
    source = source if isinstance(source, View) else View.of(source)
    target = target if isinstance(target, View) else View.of(target)
    return target.seen(source.unseen(values))


def laid_out(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return a copy of `values` whose elements follow each other in memory as those of `like`.

    What is carried from it to any other view of the same elements as `like` is a view of it.
    """
    view = View.of(like)
    new: np.ndarray = view.seen(np.array(view.unseen(values), order="C"))
    return new


def _transposed(a: Array, order: Sequence[int]) -> Array:
    if list(order) == list(range(len(order))):
        return a
    if devices.is_numba(a):
        return devices.transposed(a, order)
    return a.permute(tuple(order)) if hasattr(a, "permute") else a.transpose(tuple(order))


def _flipped(a: Array, axes: Sequence[int]) -> Array:
    if not axes:
        return a
    if hasattr(a, "permute"):  # PyTorch has no negative strides
        return a.flip(tuple(axes))
    return a[tuple(slice(None, None, -1 if k in axes else 1) for k in range(a.ndim))]


def _reshaped(a: Array, shape: tuple[int, ...]) -> Array:
    return a if tuple(a.shape) == shape else a.reshape(shape)


# --- which arrays are one --------------------------------------------------------------------


class _Memory(NamedTuple):
    """Where the elements of an array lie; addresses and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    meaning: Any
    """What the bytes stand for: arrays are tied only if this is the same."""
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

    def elements(self) -> tuple[Any, ...] | None:
        """Return what exactly those arrays have in common that show the same elements.

        The lowest address, and the axes, of which those that continue one another are made one.
        None for an array that shows an element twice.
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
        return self.low(), self.itemsize, self.meaning, *merged


def _strides(x: Array) -> tuple[int, ...]:
    """Return the strides of `x`, in bytes; those of a C-contiguous array where it has none."""
    strides = getattr(x, "strides", None)
    if strides is None and callable(getattr(x, "stride", None)):
        strides = [step * x.element_size() for step in x.stride()]
    if strides is None:
        strides = [math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape))]
    return tuple(strides)


def _memory(x: Array) -> _Memory | None:
    """Return where `x` lies; None if that is nowhere, or nobody's business (JAX, traced arrays)."""
    if 0 in x.shape:
        return None
    if isinstance(x, np.ndarray):
        return _Memory(x.ctypes.data, x.shape, x.strides, x.itemsize, x.dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.layout is not torch.strided or x.is_meta:
            return None
        try:
            address = x.data_ptr()
        except RuntimeError:  # a tensor that is being traced or transformed
            return None
        meaning = x.dtype, x.is_conj(), x.is_neg()
        shape, size = tuple(x.shape), x.element_size()
        if not address:
            return None
        return _Memory(address, shape, _strides(x), size, meaning, str(x.device))
    if (lib := devices.library(x)) is not None:
        size = x.dtype.itemsize
        strides = tuple(x.strides)
        return _Memory(
            lib.address(x), tuple(x.shape), strides, size, x.dtype, f"cuda:{lib.device(x)}"
        )
    return None


def span(x: Array) -> tuple[int, int] | None:
    """Return the lowest address of an array and the one behind it, where it lies on the host."""
    memory = _memory(x)
    return None if memory is None or "cuda" in memory.device else (memory.low(), memory.high())


def same_elements(a: Array, b: Array) -> bool:
    """Tell whether two arrays are the same, or views of exactly the same elements."""
    if a is b:
        return True
    one, other = _memory(a), _memory(b)
    if one is None or other is None or one.device != other.device:
        return False
    elements = one.elements()
    return elements is not None and elements == other.elements()


def owners(arrays: Sequence[Place]) -> list[int]:
    """Return for each array the position of the first that it is tied to; often its own.

    Raises
    ------
    ValueError
        If two arrays share some elements but are not views of exactly the same.
    """
    first: dict[int, int] = {}
    owner = [
        k if is_immutable(x) else first.setdefault(id(x), k) for k, (_, x) in enumerate(arrays)
    ]
    if all(_has_own_memory(arrays[k][1]) for k in first.values()):
        return owner
    for crowd in _crowds(arrays, first.values()):
        shown: dict[Any, int] = {}
        for k in sorted(crowd):
            elements = cast(_Memory, _memory(arrays[k][1])).elements()
            owner[k] = shown.setdefault(k if elements is None else elements, k)
        if found := len(shown) > 1 and _overlap([arrays[k] for k in shown.values()]):
            raise ValueError(_overlap_text(*found))
    return [owner[k] for k in owner]


def _has_own_memory(x: Array) -> bool:
    """Tell whether an array of NumPy is the one that gives its memory back: two never share it."""
    return type(x) is np.ndarray and x.base is None and x.flags.owndata


def overlap(arrays: Sequence[tuple[Named, Array]]) -> tuple[Named, Named] | None:
    """Return the names of two arrays that share memory, whole or in part, if any two do."""
    for crowd in _crowds(arrays, range(len(arrays))):
        if found := _overlap([arrays[k] for k in sorted(crowd)]):
            return found[0][0], found[1][0]
    return None


def _crowds(arrays: Sequence[tuple[Any, Array]], which: Iterable[int]) -> Iterator[list[int]]:
    """Yield the positions of what lies within overlapping spans, if that is more than one."""
    spans: list[tuple[str, int, int, int]] = []
    for k in which:
        x = arrays[k][1]
        if type(x) is np.ndarray and x.flags.c_contiguous:
            if x.size:
                address = x.ctypes.data
                spans.append(("", address, address + x.nbytes, k))
        elif (memory := _memory(x)) is not None:
            spans.append((memory.device, memory.low(), memory.high(), k))
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


def _overlap(arrays: Sequence[tuple[Named, Array]]) -> _Pair[Named] | None:
    """Return two of these arrays that share memory, if any two do."""
    if len(arrays) <= FEW and all(isinstance(x, np.ndarray) for _, x in arrays):
        with contextlib.suppress(np.exceptions.TooHardError):
            for one, other in itertools.combinations(arrays, 2):
                if np.shares_memory(plain(one[1]), plain(other[1]), max_work=PATIENCE):
                    return one, other
            return None
    memories = [cast(_Memory, _memory(x)) for _, x in arrays]
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
            return arrays[holding], arrays[k]
        holder[cells] = k
    return None


def _cells(memory: _Memory, low: int, cell: int) -> np.ndarray:
    """Return the numbers of the cells that an array touches, counted from address `low`."""
    cells = np.array([(memory.low() - low) // cell])
    for length, stride in (*memory.axes(), (memory.itemsize // cell, cell)):
        if stride:
            cells = np.add.outer(cells, np.arange(length) * (stride // cell)).ravel()
    return cells


def _overlap_text(a: Place, b: Place) -> str:
    kinds = ""
    if a[1].dtype != b[1].dtype:
        kinds = f", dtypes {a[1].dtype} and {b[1].dtype}"
    return (
        f"the arrays at {a[0]} and {b[0]} overlap in memory without being views of exactly the "
        f"same elements: shapes {tuple(a[1].shape)} and {tuple(b[1].shape)}{kinds}; "
        "copy one of them"
    )
