"""Arrays of NumPy, and of its subclasses."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from . import dtypes
from .layout import Memory, Span, overlaps_itself
from .library import (
    Call,
    Library,
    check_fit,
    for_step,
    is_abstract,
    is_traced,
    isnumeric,
    library_for,
    library_of,
)

Array = np.ndarray


class Numpy(Library):
    """A pure update returns arrays of the subclass of the parameter; steps see plain arrays."""

    key = "numpy"
    name = "NumPy"
    sums_truth = True
    has_views = True
    keeps_order = True
    mixes_with_numpy = True
    is_differentiated = True

    # --- which arrays ------------------------------------------------------------------------

    def enters_jax(self, x: Array) -> bool:
        return x.dtype.kind in "fc"

    def owns(self, cls: type) -> bool:
        return issubclass(cls, np.ndarray)

    def namespace(self, x: Any) -> Any:
        return np

    def seems_to_train(self, x: Array) -> bool:
        if isnumeric(x):
            return False
        if x.dtype.names:
            return any(x.dtype[name].base.kind in "fc" for name in x.dtype.names)
        return x.dtype == object and any(
            isnumeric(item) or isinstance(item, float | complex | np.inexact)
            for item in itertools.islice(x.flat, 1000)
        )

    def may_write(self, x: Array) -> bool:
        flags = x.flags
        if flags.c_contiguous or not flags.writeable:
            return bool(flags.writeable)
        return not overlaps_itself(x.shape, x.strides, x.itemsize)

    # --- layout ------------------------------------------------------------------------------

    def is_c_contiguous(self, x: Array) -> bool:
        return x.flags.c_contiguous

    def memory(self, x: Array) -> Memory | None:
        if 0 in x.shape:
            return None
        return Memory(x.ctypes.data, x.shape, x.strides, x.itemsize, x.dtype)

    def span(self, x: Array) -> Span | None:
        if not x.flags.c_contiguous:
            return super().span(x)
        if not x.size:
            return None
        address = x.ctypes.data
        return "", address, address + x.nbytes

    def transposed(self, x: Array, order: Sequence[int]) -> Array:
        return x.transpose(tuple(order))

    def reshaped(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x.reshape(shape)

    def view(self, x: Array) -> Array:
        return x

    def views(self, state: Any, x: Array, g: Any) -> tuple[Any, Array, Array] | None:
        if not isinstance(g, np.ndarray):
            return None
        ordered = np.ascontiguousarray if x.flags.c_contiguous else np.asfortranarray
        return state, np.asarray(x), ordered(g).reshape(x.shape)

    # --- new arrays --------------------------------------------------------------------------

    def full_like(self, x: Array, value: Any) -> Any:
        if is_abstract(value):
            return library_for(value).full_like(x, value)
        return np.full_like(x, value, dtype=x.dtype.newbyteorder("="), subok=False)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        return np.empty_like(np.asarray(x))

    def fresh(self, x: Array) -> Array:
        if type(x) is np.ndarray:  # quick, since asked of every array of a state
            return x.copy("K")
        return np.array(x, order="K", subok=not isinstance(x, np.memmap))

    def copied(self, x: Array) -> Array:
        return x.copy()

    def count_like(self, x: Array) -> Array:
        return np.zeros((), np.int64)

    def own_dtype(self, x: Any, dtype: Any) -> Any:
        return dtypes.numpy_dtype(dtype)

    def astype(self, x: Array, dtype: Any) -> Array:
        return np.array(x, dtypes.numpy_dtype(dtype), order="K")

    def as_like(self, x: Array, value: Any) -> Any:
        if is_traced(value):
            return library_for(value).cast(value, x.dtype)
        native = x.dtype.newbyteorder("=")
        return np.array(value, dtype=native, copy=True if value is x else None)

    def numbers(self, x: Array, values: Sequence[Any]) -> tuple[Any, ...]:
        real = x.real.dtype if x.dtype.kind == "c" else x.dtype
        return tuple(
            library_for(n).number(n, real) if is_traced(n) else real.type(n) for n in values
        )

    # --- a step ------------------------------------------------------------------------------

    def bare(self, x: Array) -> Array:
        return np.asarray(x)

    def plain(self, x: Array) -> Array:
        return np.asarray(x)

    def for_rule(self, x: Array) -> Array:
        return _native(x, x.dtype.newbyteorder("="))

    def restored(self, new: Any, x: Array) -> Any:
        return new if is_traced(new) else np.asarray(new, x.dtype)  # its byte order too

    def read_only(self, x: Array) -> Array:
        x = x.view()
        x.flags.writeable = False
        return x

    def apart(self, x: Array, others: Sequence[Any]) -> Array:
        plain = np.asarray(x)
        for other in others:
            if isinstance(other, np.ndarray) and np.may_share_memory(plain, np.asarray(other)):
                return self.fresh(x)
        return x

    def can_hold(self, x: Array, new: Any) -> bool:
        if not isinstance(new, np.ndarray | np.generic) or x.shape != new.shape:
            return False
        same = x.dtype.newbyteorder("=") == new.dtype.newbyteorder("=")
        return same and self.may_write(x)

    def write_call(self, x: Array, new: Any) -> Call:
        # A subclass may write in a way of its own, or refuse to.
        return super().write_call(np.asarray(x), new)

    def of_class(self, x: Array, values: Any) -> Any:
        if type(x) is np.ndarray or isinstance(x, np.memmap) or not isinstance(values, np.ndarray):
            return values
        return np.ndarray.__array_wrap__(x, values)  # not that of the class, which may do anything

    # --- words of steps ----------------------------------------------------------------------

    def beside(self, x: Any, y: Any) -> Any:
        return y

    def sqrt(self, x: Array) -> Any:
        return np.sqrt(x)

    def sign(self, x: Array) -> Any:
        return np.sign(x)

    def measured(self, value: Array) -> Any:
        return value if value.ndim else value.item()

    def stacked(self, values: Sequence[Any], like: Array) -> Any:
        for value in values:
            if is_traced(value):
                return library_for(value).stacked(values, value)
        return np.array(values, like.dtype)

    def for_sums(self, x: Array) -> Any:
        dtype = x.dtype if x.dtype.kind in "fc" else 0
        # In C order, since the bits of a sum depend on the order.
        return np.asarray(x, np.result_type(np.float64, dtype), order="C")

    # --- gradients ---------------------------------------------------------------------------

    def gradient(self, g: Any, x: Array, where: Callable[[], str]) -> Any:
        a = library_for(g).for_numpy(g, x, where)
        if is_abstract(a):
            return library_for(a).gradient(a, x, where)
        if a.shape != x.shape or a.dtype != x.dtype:
            check_fit(a, x, where)
        if is_traced(a):  # a box, which records what is done to it
            return for_step(x, a)
        wide = np.dtype(np.float32) if dtypes.is_narrow(x) else x.dtype.newbyteorder("=")
        return _native(a, wide)

    def is_nonzero(self, g: Any) -> bool:
        if g.dtype == object:
            return any(_says_something(item) for item in np.asarray(g).flat)
        kind = g.dtype.kind
        if kind not in "biufc" and (kind != "V" or dtypes.dtype_name(g.dtype).startswith("void")):
            return False  # text, times; or `float0`, by which JAX says that there is none
        return bool(np.count_nonzero(g != 0))

    # --- between libraries -------------------------------------------------------------------

    def from_numpy(self, a: Array, like: Any) -> Array:
        return a

    def converted(self, x: Array, dtype: Any, copy: bool) -> Array:
        wanted = dtypes.numpy_dtype(dtype)
        if x.dtype.kind == "c" and wanted.kind != "c":
            x = x.real
        return x.astype(wanted, order="C") if copy or x.dtype != wanted else x

    # --- files -------------------------------------------------------------------------------

    def why_unsavable(self, x: Array) -> str:
        if type(x) in (np.ndarray, np.memmap):
            return ""
        return "it may be more than its numbers; take np.asarray of it"

    def loaded(self, a: Any, like: Any) -> Any:
        return a


def _native(a: Any, dtype: np.dtype[Any]) -> Array:
    """Return an array as an aligned one in native byte order, itself if it is one."""
    with np.errstate(all="ignore"):
        return np.require(np.asarray(a), dtype, "A")


def _says_something(x: Any) -> bool:
    library = library_of(x)
    if library is not None:
        return library.is_nonzero(x)
    return isinstance(x, numbers.Number) and bool(cast(Any, x) != 0)


LIBRARY = Numpy()
