"""Arrays that lie on a CUDA device: Numba's, CuPy's, and PyTorch's tensors there.

Each library has a class below that does with its arrays what updates need: where they lie, in which
order, on which stream work with them is enqueued, new ones like them, copies. No library is
imported: whoever hands over an array has done so.

Numba's arrays know no arithmetic and hardly any function; what the array path does with those of
other libraries, kernels do with these (see `_cuda`).
"""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import numba_private
from .library import dtype_name, is_narrow, isnumeric, library_of

Array = Any


class Library(ABC):
    """What is done with the arrays of one library."""

    name: str
    to_host: str
    """How a user brings an array to the host."""
    to_device: str
    """How a user brings an array of the host to the device."""
    stays = True
    """Whether an array has the same memory and layout as long as it lives."""

    @abstractmethod
    def address(self, x: Array) -> int:
        """Return where its first element lies."""

    def dtype(self, x: Array) -> str:
        """Return the name of its dtype."""
        return dtype_name(x.dtype)

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
    def blank(self, x: Array, dtype: str | None = None) -> Array:
        """Return an array of its shape whose elements follow each other as its own do."""

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


class _Numba(Library):
    name = "Numba"
    to_host = ".copy_to_host()"
    to_device = "numba.cuda.to_device(...)"

    def address(self, x: Array) -> int:
        return numba_private.address(x)

    def device(self, x: Array) -> int:
        return numba_private.device(x)

    def stream(self, x: Array) -> int:
        return 0 if not x.stream or numba_private.is_simulated(x) else int(x.stream.handle)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        kind = x.dtype if dtype is None else numpy_dtype(dtype)
        order = axes(self, x)
        strides = _packed_strides(tuple(x.shape), order, kind.itemsize) if order else None
        return _cuda().device_array(tuple(x.shape), kind, strides=strides, stream=x.stream)

    def assign(self, x: Array, values: Any) -> None:
        if 0 in x.shape:
            return
        if numba_private.is_simulated(x):
            numba_private.assign_simulated(x, values)
            return
        if isinstance(values, float):
            values = _cuda().to_device(np.full((1,) * len(x.shape), values, x.dtype))
        # With a stream, and so without waiting for it.
        stream = x.stream or _cuda().default_stream()
        if x.ndim == 0:
            x, values = x.reshape(1), values.reshape(1)
        x.setitem(slice(None), values, stream=stream)


class _Cupy(Library):
    name = "CuPy"
    to_host = ".get()"
    to_device = "cupy.asarray(...)"
    stays = False

    def address(self, x: Array) -> int:
        return int(x.data.ptr)

    def device(self, x: Array) -> int:
        return int(x.device.id)

    def stream(self, x: Array) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream(self.device(x)).ptr)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        return sys.modules["cupy"].empty_like(x, dtype=dtype)

    def assign(self, x: Array, values: Any) -> None:
        x[...] = values if isinstance(values, float) else self.adopt(values)

    def adopt(self, g: Array) -> Array:
        return sys.modules["cupy"].asarray(g)


class _Torch(Library):
    name = "PyTorch"
    to_host = ".cpu()"
    to_device = ".cuda()"
    stays = False

    def address(self, x: Array) -> int:
        return int(x.data_ptr())

    def layout(self, x: Array) -> tuple[Any, ...]:
        return x.shape, x.stride(), x.dtype

    def strides(self, x: Array) -> tuple[int, ...]:
        return tuple(x.stride())

    def device(self, x: Array) -> int:
        return int(x.get_device())

    def stream(self, x: Array) -> int:
        return int(sys.modules["torch"].cuda.current_stream(x.device).cuda_stream)

    def blank(self, x: Array, dtype: str | None = None) -> Array:
        torch: Any = sys.modules["torch"]
        kind = x.dtype if dtype is None else getattr(torch, dtype)
        return torch.empty_like(x.detach(), dtype=kind)

    def assign(self, x: Array, values: Any) -> None:
        torch: Any = sys.modules["torch"]
        with torch.no_grad():
            if isinstance(values, float):
                x.fill_(values)
            else:
                x.copy_(self.adopt(values))

    def adopt(self, g: Array) -> Array:
        torch: Any = sys.modules["torch"]
        return g if isinstance(g, torch.Tensor) else torch.as_tensor(g, device="cuda")


_LIBRARIES = {"numba": _Numba(), "cupy": _Cupy()}
_TORCH = _Torch()


def library(x: object) -> Library | None:
    """Return what does the work with `x`, None for what does not lie on a CUDA device."""
    name = library_of(type(x))
    if name == "torch":
        return _TORCH if _is_plain_cuda(x) else None
    return None if name is None else _LIBRARIES.get(name)


def is_numba(x: object) -> bool:
    """Tell whether `x` is a device array of Numba, with which nothing else can compute."""
    return library_of(type(x)) == "numba"


def counts_in_numpy(x: object) -> bool:
    """Tell whether steps of `x` are counted by NumPy: a count on the device had to be waited for.

    PyTorch counts in tensors of its own, on the host.
    """
    return library_of(type(x)) in _LIBRARIES


def _is_plain_cuda(x: Any) -> bool:
    """Tell whether the memory of a tensor holds its numbers, on a device of CUDA, not of ROCm."""
    torch: Any = sys.modules["torch"]
    return bool(
        x.is_cuda
        and torch.version.hip is None
        and x.layout is torch.strided
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not (x.is_conj() or x.is_neg())
    )


def _cuda() -> Any:
    return sys.modules["numba.cuda"]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype by its name, one of ``ml_dtypes`` too."""
    if name != "bfloat16":
        return np.dtype(name)
    found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return found


# --- layouts ---------------------------------------------------------------------------------


def axes(lib: Library, x: Array) -> tuple[int, ...] | None:
    """Return the axes longer than 1 by falling stride; None where the elements leave gaps.

    Arrays of one shape whose axes are alike have their elements in the same order.
    """
    return _axes(tuple(x.shape), lib.strides(x))


def lies_like(lib: Library, a: Any, x: Array) -> bool:
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


@functools.lru_cache(maxsize=4096)
def _axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    if 0 in shape:
        return ()
    found = sorted((k for k, n in enumerate(shape) if n > 1), key=lambda k: -strides[k])
    reach = 1
    for k in reversed(found):
        if strides[k] != reach:
            return None
        reach *= shape[k]
    return tuple(found)


def _packed_strides(
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


def laid_out(lib: Library, g: Array, x: Array) -> Array:
    """Return `g` as an array of the library and layout of `x`, itself if it is one."""
    other = library(g)
    if other is lib and lib.layout(g) == lib.layout(x):
        return g
    if other is not None and axes(other, g) == axes(lib, x):
        return g
    new = lib.blank(x, lib.dtype(g) if other is None else other.dtype(g))
    lib.assign(new, g)
    return new


# --- Numba's arrays as others have them --------------------------------------------------------


def full_like(x: Array, value: float) -> Array:
    """Return an array like `x` filled with a number."""
    lib = _LIBRARIES["numba"]
    new = lib.blank(x)
    lib.assign(new, float(value))
    return new


def fresh(x: Array) -> Array:
    """Return a copy that shares no memory with `x`."""
    lib = library(x)
    assert lib is not None
    return lib.copy(x)


def astype(x: Array, dtype: Any) -> Array:
    """Return a copy of an array of Numba in another dtype."""
    return _LIBRARIES["numba"].copy(x, np.dtype(dtype).name)


def assign(x: Array, values: Any) -> None:
    """Write values, or one number, into an array of Numba."""
    _LIBRARIES["numba"].assign(x, values)


def transposed(x: Array, order: Sequence[int]) -> Array:
    """Return a view of an array of Numba with its axes in another order."""
    if numba_private.is_simulated(x):
        return x.transpose(tuple(order))
    shape, strides = tuple(x.shape), tuple(x.strides)
    return numba_private.view(x, tuple(shape[k] for k in order), tuple(strides[k] for k in order))


def piece(v: Array, start: int, shape: Sequence[int]) -> Array:
    """Return a view, of this shape, of the numbers of a vector of Numba from `start` on."""
    size = math.prod(shape)
    if not size:
        return _cuda().device_array(tuple(shape), v.dtype, stream=v.stream)
    part = v[start : start + size]
    if numba_private.is_simulated(v):
        return part.reshape(tuple(shape))
    reach, strides = v.strides[0], []
    for n in reversed(shape):
        strides.append(reach)
        reach *= n
    return numba_private.view(part, tuple(shape), tuple(reversed(strides)))


def vector(size: int, dtype: Any, like: Array) -> Array:
    """Return a new vector beside an array of Numba."""
    return _cuda().device_array((size,), np.dtype(dtype), stream=like.stream)


# --- gradients -------------------------------------------------------------------------------


def gradient(g: Any, x: Array, where: Callable[[], str]) -> Array:
    """Return `g`, checked to be a gradient for the device array `x`, as an array of its library.

    For Numba, which does not compute, it stays what it is: kernels read it in its own dtype.

    Raises
    ------
    TypeError, ValueError
        If it is none; the message names the place, from `where()`.
    """
    lib, of_g = library(x), library(g)
    assert lib is not None
    if of_g is lib and lib.layout(g) == lib.layout(x) and lib.device(g) == lib.device(x):
        return g
    wide = "float32" if is_narrow(x) else None
    if isinstance(g, numbers.Real) and x.shape == ():
        new = lib.blank(x, wide)
        lib.assign(new, float(g))
        return new
    wanted = (
        f"gradient at {where()}: expected a device array of shape {tuple(x.shape)} and dtype "
        f"{x.dtype} on GPU {lib.device(x)}"
    )
    if of_g is None:
        raise ValueError(
            f"{wanted}, got one on the host ({type(g).__module__}.{type(g).__name__}); "
            f"move it with {lib.to_device}"
        )
    if 0 not in g.shape and of_g.device(g) != lib.device(x):
        raise ValueError(f"{wanted}, got one on GPU {of_g.device(g)}; move it there")
    if tuple(g.shape) != tuple(x.shape):
        raise ValueError(f"{wanted}, got shape {tuple(g.shape)}")
    kind = of_g.dtype(g)
    if kind.startswith("complex") and not lib.dtype(x).startswith("complex"):
        raise TypeError(
            f"{wanted}, got complex numbers ({kind}); take the real part if that is what is meant"
        )
    if not isnumeric(g) and not kind.startswith(("bool", "int", "uint")):
        raise TypeError(f"{wanted}, got dtype {kind}")
    if is_numba(x) and isnumeric(g):
        return g
    if kind == lib.dtype(x):
        return lib.adopt(g)
    new = lib.blank(x, wide)
    lib.assign(new, g)
    return new


def refuse_for_host(g: Any, x: np.ndarray, where: Callable[[], str]) -> None:
    """Raise if a gradient for an array on the host lies on a device.

    Raises
    ------
    ValueError
        With the place, from `where()`, and the way out.
    """
    lib = library(g)
    if lib is not None:
        raise ValueError(
            f"gradient at {where()}: expected an array of shape {tuple(x.shape)} and dtype "
            f"{x.dtype} on the host, got one of {lib.name} on GPU {lib.device(g)}; "
            f"write {lib.to_host}"
        )


def may_overlap(one: Array, other: Array) -> bool:
    """Tell whether the spans of memory of two device arrays meet."""
    spans = []
    for x in (one, other):
        lib = library(x)
        if lib is None or 0 in x.shape:
            return False
        spans.append(span(lib, x))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def span(lib: Library, x: Array) -> tuple[int, int]:
    """Return the lowest address of an array and the one behind its last element."""
    size = itemsize(lib.dtype(x))
    low = high = lib.address(x)
    for n, stride in zip(x.shape, lib.strides(x), strict=True):
        reach = (n - 1) * stride * size
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + size


def itemsize(dtype: str) -> int:
    """Return how many bytes a number has; those of bfloat16 without asking ``ml_dtypes``."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
