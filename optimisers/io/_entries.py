"""What the tables of a file are made of, checked one entry at a time.

Whatever stands in a file, an entry comes out of here as one of the classes below, or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .._arrays.layout import View
from . import _safetensors as form
from ._json import FileFormatError

# --- the entries -----------------------------------------------------------------------------


class Node(dict[Any, Any]):
    """A node: its children by key."""

    __slots__ = ()


@dataclasses.dataclass(eq=False, slots=True)
class LeafNode:
    """A `Leaf`, by the number of its rule."""

    rule: int
    state: Any
    frozen: bool
    skipped: int


@dataclasses.dataclass(eq=False, slots=True)
class ArrayNode:
    """An array, by its number; the one that it shows in another way, if there is a view."""

    tensor: int
    view: View | None


@dataclasses.dataclass(eq=False, slots=True)
class ValueNode:
    """A number, a text, ..., None."""

    value: Any


LEFT_OUT = object()
"""Something that was not saved."""


class Absent:
    """A field of a state that a file of an earlier version does not have."""


ABSENT = Absent()


class StoredTensor(NamedTuple):
    """An array of the file: what it is, where its bytes lie, their checksum if there is one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: View
    entry: form.Entry
    check: int | None


# --- checks --------------------------------------------------------------------------------------


def damaged(what: str) -> NoReturn:
    """Refuse the file."""
    raise FileFormatError(f"the file is damaged: {what}")


def index_of(k: Any, table: Sequence[Any]) -> int:
    """Return `k` if it is the number of an entry of this table."""
    if type(k) is not int or not 0 <= k < len(table):
        damaged(f"{k!r:.40} is no number of an entry")
    return k


def plain(value: Any) -> Any:
    """Return the number, text, ... that a value stands for."""
    if value is None or isinstance(value, str | int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is not tuple or len(value) != 2:
        damaged(f"a value is {value!r:.60}")
    kind, x = value
    try:
        if kind == "int":
            return int(x, 16)
        if kind == "float" and x in ("nan", "inf", "-inf"):
            return float(x)
        if kind == "complex":
            real, imag = map(float.fromhex, x)
            return complex(real, imag)
        if kind == "bytes":
            return bytes.fromhex(x)
        if kind == "dtype":
            form.stored(x, ())
            return form.numpy_dtype(x)
        if kind == "scalar":
            name, text = x
            form.stored(name, ())
            raw = np.frombuffer(bytearray.fromhex(text), np.uint8)
            return form.typed(raw, name, ())[()]
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, FileFormatError):
            raise
    damaged(f"a value is {value!r:.60}")


def are_slow(keys: Sequence[Any]) -> bool:
    """Tell whether Python's dictionaries would take long over such keys.

    The hash of a whole number is known to everyone, so that a file could have keys which find one
    place after another taken. This goes from place to place as dictionaries do, and counts.
    """
    patience = 10_000 + 100 * len(keys)
    size, room, taken = 8, 5, bytearray(8)
    for done, key in enumerate(keys):
        if done == room:
            size = 1 << (3 * done).bit_length()
            room, taken, patience = size * 2 // 3, bytearray(size), patience - done
            for old in keys[:done]:
                patience -= _placed(hash(old), taken, size - 1, patience)
        patience -= _placed(hash(key), taken, size - 1, patience)
        if patience < 0:
            return True
    return False


def _placed(code: int, taken: bytearray, mask: int, patience: int) -> int:
    """Take the first free place for a hash, and return how many were looked at in vain."""
    k = code & mask
    if not taken[k]:
        taken[k] = 1
        return 0
    rest, looked = code & 0xFFFF_FFFF_FFFF_FFFF, 0
    while taken[k] and looked <= patience:
        rest >>= 5
        k = (5 * k + rest + 1) & mask
        looked += 1
    taken[k] = 1
    return looked


def checked_view(shape: Any, order: Any, flips: Any, size: int) -> View:
    """Return a view of an array of this size."""
    axes = range(len(shape)) if form.is_shape(shape) else range(0)
    for numbers in (order, flips):
        is_short = isinstance(numbers, list) and len(numbers) <= form.MAX_AXES
        if not is_short or not all(type(n) is int for n in numbers):
            damaged(f"the layout of a view is {numbers!r:.60}")
    is_order = sorted(order) == [*axes] and {*flips} <= {*axes} and len({*flips}) == len(flips)
    if not form.is_shape(shape) or not is_order or math.prod(shape) != size:
        damaged(f"a view of {size} elements is {[shape, order, flips]!r:.80}")
    return View(tuple(shape), tuple(order), tuple(flips))


_TENSOR = {"name", "dtype", "shape"}


@functools.lru_cache(maxsize=1024)
def c_order(shape: tuple[int, ...]) -> View:
    """Return how a C-contiguous array of this shape is seen."""
    return View(shape, tuple(range(len(shape))), ())


def checked_tensor(
    said: dict[str, Any] | None,
    entries: dict[str, form.Entry],
    check: int,
) -> StoredTensor:
    """Return an array of the text, if the header has it where and as the text says."""
    if said is None or not _TENSOR <= said.keys() <= {*_TENSOR, "order", "flips"}:
        damaged(f"an array is {said!r:.80}")
    name, dtype, shape = said["name"], said["dtype"], said["shape"]
    are_texts = isinstance(name, str) and isinstance(dtype, str)
    if not are_texts or not form.is_shape(shape) or name not in entries:
        damaged(f"an array is {said!r:.80}")
    entry, shape = entries[name], tuple(shape)
    if form.stored(dtype, shape) != (entry.tag, entry.shape):
        damaged(
            f"the array {name!r} should have dtype {dtype} and shape {list(shape)!r:.80}, and lies "
            f"there as {entry.tag} of shape {list(entry.shape)!r:.80}"
        )
    if len(said) == 3:
        layout = c_order(shape)
    else:
        order = said.get("order", [*range(len(shape))])
        layout = checked_view([*shape], order, said.get("flips", []), math.prod(shape))
    return StoredTensor(name, dtype, shape, layout, entry, check)
