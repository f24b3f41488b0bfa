"""Arrays: what is one, of which library, whether it is numeric, whether it may be written.

No array library but NumPy is imported: a foreign array can only be met once its library is loaded.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

__all__ = [
    "dtype_name",
    "is_immutable",
    "is_narrow",
    "is_narrow_dtype",
    "isnumeric",
    "library_of",
    "maywrite",
    "of_class",
    "plain",
    "refuse_masked",
    "refuse_masked_parameter",
]


def isnumeric(x: object) -> bool:
    """Whether `x` is an array of real or complex floating numbers, of any dimension, 0 included.

    These arrays are the parameters of a model: NumPy arrays (also of ``ml_dtypes`` floats such as
    ``bfloat16``), PyTorch tensors, JAX arrays and tracers, CuPy and Numba device arrays, boxes of
    HIPS autograd. Python and NumPy scalars, and arrays of integers or booleans, are not.

    Examples
    --------
    >>> isnumeric(np.ones(3)), isnumeric(np.array(1j)), isnumeric(np.arange(3)), isnumeric(1.0)
    (True, True, False, False)
    """
    dtype: Any
    if type(x) is np.ndarray:  # quick, since asked of every leaf
        dtype = x.dtype
    elif (library := library_of(type(x))) is None:
        return False
    else:
        if library == "autograd":  # a box is what it holds, which may be a plain number
            return isnumeric(cast(Any, x)._value)
        dtype = getattr(x, "dtype", None)
        if library == "torch":
            return bool(dtype.is_floating_point or dtype.is_complex)
    kind = getattr(dtype, "kind", "")
    return kind in _FLOATING or (kind == "V" and _is_named_float(dtype))


@functools.lru_cache(maxsize=256)
def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library and byte order, like ``float32``."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def is_narrow(x: Any) -> bool:
    """Tell whether an array has floating numbers of fewer bits than float32.

    A step on these is computed in float32, and its results are rounded once: see `_rule.moved`.
    """
    return is_narrow_dtype(x.dtype)


@functools.lru_cache(maxsize=256)
def is_narrow_dtype(dtype: Any) -> bool:
    """Tell whether floating numbers of a dtype have fewer bits than those of float32."""
    found = re.match(r"b?float(\d+)", dtype_name(dtype))
    return found is not None and int(found[1]) < 32


def maywrite(x: object) -> bool:
    """Whether the elements of the array `x` may be written in place, each on its own.

    False for what is no array, for read-only and immutable arrays (JAX, traced ones), and for
    arrays that store one element at several places, as a broadcast view does.

    Examples
    --------
    >>> maywrite(np.ones(3)), maywrite(np.broadcast_to(1.0, 3)), maywrite(1.0)
    (True, False, False)
    """
    library = "numpy" if type(x) is np.ndarray else library_of(type(x))
    array = cast(Any, x)
    if library == "numpy":
        flags = array.flags
        if flags.c_contiguous or not flags.writeable:
            return bool(flags.writeable)
        return not _overlaps(array.shape, array.strides, array.itemsize)
    if library == "torch":
        is_strided = array.layout is sys.modules["torch"].strided
        return not (is_strided and _overlaps(array.shape, array.stride(), 1))
    if library in ("cupy", "numba"):
        return not _overlaps(array.shape, array.strides, array.dtype.itemsize)
    return False


def is_immutable(x: object) -> bool:
    """Tell whether nobody at all can write the array `x`, as those of JAX, traced ones included.

    A read-only array of NumPy may be a view of one that is written elsewhere. A box of HIPS
    autograd stands for an array of NumPy.
    """
    return library_of(type(x)) == "jax"


def is_masked(x: object) -> bool:
    """Tell whether `x` is an array with a mask, under which there is no value."""
    for module, name in (("numpy.ma", "MaskedArray"), ("torch.masked", "MaskedTensor")):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and isinstance(x, cls):
            return True
    return False


def refuse_masked(x: object, what: Callable[[], str], mend: str) -> None:
    """Raise if `x` is an array with a mask; `what()` says what is expected and where."""
    if type(x) is not np.ndarray and is_masked(x):
        raise TypeError(
            f"{what()}: expected an array of numbers, got a masked one ({type(x).__name__}), and "
            f"under a mask there is no number; {mend}"
        )


def refuse_masked_parameter(x: object, where: Callable[[], object]) -> None:
    """Raise if `x`, which is to be trained, is an array with a mask."""
    refuse_masked(x, lambda: f"at {where()}", "train its .data, or its .filled(0)")


def of_class(x: object, values: Any) -> Any:
    """Return an array of NumPy as one of the class of `x`, made from `x`, over the same memory.

    So `__array_finalize__` hands on what `x` carries. A mapped file, whose memory is elsewhere, is
    but an array here.
    """
    if type(x) is np.ndarray or not isinstance(x, np.ndarray) or isinstance(x, np.memmap):
        return values
    if not isinstance(values, np.ndarray):
        return values
    return np.ndarray.__array_wrap__(x, values)  # not that of the class, which may do anything


def plain(x: Any) -> Any:
    """Return an array of a subclass of NumPy's as one of NumPy's own; anything else as it is."""
    return np.asarray(x) if isinstance(x, np.ndarray) else x


_FLOATING = frozenset("fc")


@functools.lru_cache(maxsize=256)
def _is_named_float(dtype: object) -> bool:
    """Whether an extension dtype is a float: those of ``ml_dtypes`` are of NumPy's kind "V"."""
    return getattr(dtype, "name", "").startswith(("float", "bfloat"))


def _find_library(cls: type) -> str | None:
    """Name the library whose arrays `cls` belongs to; an instance proves that it is loaded."""
    if issubclass(cls, np.ndarray):
        return "numpy"
    for library, module, name in (
        ("torch", "torch", "Tensor"),
        ("jax", "jax", "Array"),
        ("jax", "jax.core", "Tracer"),
        ("cupy", "cupy", "ndarray"),
        ("autograd", "autograd.numpy.numpy_boxes", "ArrayBox"),
    ):
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type) and issubclass(cls, base):
            return library
    # By name, since numba and numba-cuda keep these classes in different modules.
    for base in cls.__mro__:
        if base.__name__ in ("DeviceNDArrayBase", "FakeCUDAArray") and "numba" in base.__module__:
            return "numba"
    return None


library_of: Callable[[type], str | None] = functools.lru_cache(maxsize=4096)(_find_library)


def _overlaps(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether two elements may share memory: each stride must pass all that lies below it."""
    if 0 in shape:
        return False
    reach = itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False
