"""Arrays that lie on a CUDA device: Numba's, CuPy's, and PyTorch's tensors there.

`DeviceLibrary` adds the questions that updates on a device need: where arrays lie, in which order,
on which stream work with them is enqueued, new arrays like them, and copies.

Numba's arrays have no arithmetic and hardly any functions, so that kernels do for them what array
code does for those of other libraries (see `_cuda`).
"""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from . import dtypes
from .layout import Memory, dense_order, overlaps_itself
from .library import Library, library_of

Array = Any


class DeviceLibrary(Library):
    """A library whose arrays may lie on a CUDA device."""

    to_host = ".get()"
    """How a user brings an array to the host."""
    to_device = "to_device(...)"
    """How a user brings an array of the host to the device."""
    stays = False
    """Whether an array has the same memory and layout as long as it lives."""
    loses_memory = False
    """Whether an array that lives may have given its memory back (see `refuse_lost`)."""

    def is_on_device(self, x: Array) -> bool:
        return True

    def may_write(self, x: Array) -> bool:
        return not overlaps_itself(x.shape, x.strides, x.dtype.itemsize)

    def memory(self, x: Array) -> Memory | None:
        if 0 in x.shape:
            return None
        strides, size = tuple(x.strides), x.dtype.itemsize
        device = f"cuda:{self.device(x)}"
        return Memory(self.address(x), tuple(x.shape), strides, size, x.dtype, device)

    @abstractmethod
    def address(self, x: Array) -> int:
        """Return where its first element lies."""

    def dtype(self, x: Array) -> str:
        """Return the name of its dtype."""
        return dtypes.dtype_name(x.dtype)

    def layout(self, x: Array) -> tuple[Any, ...]:
        """Return what must be the same for two arrays to be alike: shape, strides, dtype."""
        return x.shape, x.strides, x.dtype

    def strides(self, x: Array) -> tuple[int, ...]:
        """Return its strides, in elements."""
        return tuple(s // x.dtype.itemsize for s in x.strides)

    @abstractmethod
    def device(self, x: Array) -> int:
        """Return the number of its device."""

    @abstractmethod
    def stream(self, x: Array) -> int:
        """Return the handle of the stream on which work with it is enqueued."""

    @abstractmethod
    def assign(self, x: Array, values: Any) -> None:
        """Write the values of a device array, of any layout, dtype and library, or a number."""

    def adopt(self, g: Array) -> Array:
        """Return an array of another library as one of this; the same memory."""
        return g

    def copy(self, x: Array, dtype: str | None = None) -> Array:
        """Return a copy that shares no memory."""
        new = self.blank(x, dtype)
        self.assign(new, x)
        return new

    def fresh(self, x: Array) -> Array:
        return self.copy(x)

    def count_like(self, x: Array) -> Any:
        return np.zeros((), np.int64)  # a count on the device had to be waited for

    def can_hold(self, x: Array, new: Any) -> bool:
        if library(new) is not self or x.shape != new.shape:
            return False
        alike = x.dtype == new.dtype and self.device(x) == self.device(new)
        return bool(alike and self.may_write(x))

    def gradient(self, g: Any, x: Array, where: Callable[[], str]) -> Array:
        """Return `g`, checked to be a gradient for the device array `x`, as one of its library.

        For Numba, which does not compute, it stays what it is: kernels read it in its own dtype.
        """
        of_g = library(g)
        if of_g is self and self.layout(g) == self.layout(x) and self.device(g) == self.device(x):
            return g
        wide = "float32" if dtypes.is_narrow(x) else None
        if isinstance(g, numbers.Real) and x.shape == ():
            return self._filled(x, wide, float(g))
        wanted = (
            f"gradient at {where()}: expected a device array of shape {tuple(x.shape)} and dtype "
            f"{x.dtype} on GPU {self.device(x)}"
        )
        if of_g is None:
            raise ValueError(
                f"{wanted}, got one on the host ({type(g).__module__}.{type(g).__name__}); "
                f"move it with {self.to_device}"
            )
        if 0 not in g.shape and of_g.device(g) != self.device(x):
            raise ValueError(f"{wanted}, got one on GPU {of_g.device(g)}; move it there")
        if tuple(g.shape) != tuple(x.shape):
            raise ValueError(f"{wanted}, got shape {tuple(g.shape)}")
        kind = of_g.dtype(g)
        if kind.startswith("complex") and not self.dtype(x).startswith("complex"):
            raise TypeError(
                f"{wanted}, got complex numbers ({kind}); take the real part if that is what is "
                "meant"
            )
        if not of_g.is_numeric(g) and not kind.startswith(("bool", "int", "uint")):
            raise TypeError(f"{wanted}, got dtype {kind}")
        if not self.computes and of_g.is_numeric(g):
            return g
        if kind == self.dtype(x):
            return self.adopt(g)
        return self._filled(x, wide, g)

    def _filled(self, x: Array, dtype: str | None, values: Any) -> Array:
        new = self.blank(x, dtype)
        self.assign(new, values)
        return new

    def for_numpy(self, g: Any, x: np.ndarray, where: Callable[[], str]) -> Any:
        raise ValueError(
            f"gradient at {where()}: expected an array of shape {tuple(x.shape)} and dtype "
            f"{x.dtype} on the host, got one of {self.name} on GPU {self.device(g)}; "
            f"write {self.to_host}"
        )


def library(x: object) -> DeviceLibrary | None:
    """Return what answers for `x`, None for what does not lie on a CUDA device."""
    found = library_of(x)
    if isinstance(found, DeviceLibrary) and found.is_on_device(x):
        return found
    return None


# --- layouts ---------------------------------------------------------------------------------


def axes(lib: DeviceLibrary, x: Array) -> tuple[int, ...] | None:
    """Return the axes longer than 1 by falling stride; None where the elements leave gaps.

    Arrays of one shape whose axes are alike have their elements in the same order.
    """
    return dense_order(tuple(x.shape), lib.strides(x))


def lies_like(lib: DeviceLibrary, a: Any, x: Array) -> bool:
    """Tell whether `a` is an array of the library, device, shape and order of `x`."""
    return (
        library(a) is lib
        and tuple(a.shape) == tuple(x.shape)
        and lib.device(a) == lib.device(x)
        and axes(lib, a) == axes(lib, x)
    )


def size(x: Array) -> int:
    """Return how many elements an array has."""
    return math.prod(x.shape)


def laid_out(lib: DeviceLibrary, g: Array, x: Array) -> Array:
    """Return `g` as an array of the library and layout of `x`, itself if it is one."""
    other = library(g)
    if other is lib and lib.layout(g) == lib.layout(x):
        return g
    if other is not None and axes(other, g) == axes(lib, x):
        return g
    new = lib.blank(x, lib.dtype(g) if other is None else other.dtype(g))
    lib.assign(new, g)
    return new
